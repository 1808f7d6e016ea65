"""Kernels of our own, in Triton: what torch does in several passes over memory done in one, forward and backward.

No kernel is needed for a right answer: `model` takes these parts where `missing()` finds nothing missing.
"""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels on CPU, for tests


def missing() -> str | None:
    """What stands in the way of these kernels on this machine; None when they can be used."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "no GPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "a GPU older than compute capability 8.0"
    return None
