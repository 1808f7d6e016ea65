"""Our own Triton kernels: one pass over memory where torch needs several, forward and backward.

Results don't depend on them: `model` uses them if `missing()` returns None.
"""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels on CPU, for tests


def missing() -> str | None:
    """Why these kernels can't run on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "no GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "a GPU older than compute capability 8.0"
    return None
