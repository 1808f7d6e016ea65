"""Imports megatron-core in the order that works: import this package, or a part of it, before `megatron.core`.

Without a GPU, `cpu` replaces CUDA before megatron-core sees torch. Then `compat` applies its table of patches.
`ranks` has the process group.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mixtral.mcore import cpu


@contextmanager
def quiet() -> Iterator[None]:
    """Without megatron-core's warnings about unused packages, and torch's about functions that it calls."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_recorders() -> Iterator[None]:
    """Hides recorders (TensorBoard, W&B) while megatron-core is imported: it would import them, 0.4 s a rank, and
    we don't use them there.
    """
    absent = [name for name in ("torch.utils.tensorboard", "wandb") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Turns torch.compile off while megatron-core is imported on CPU.

    Its helpers are decorated with torch.compile, which doubles the import time and needs a C++ compiler at the
    first step. Without a GPU they run uncompiled.
    """
    compiler = torch.compile
    if not cpu.HAVE_GPU:
        torch.compile = lambda function=None, **_: function if function else (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler  # type: ignore[assignment]


def _leave_dynamo_out() -> None:
    """Optimizers' methods import torch._dynamo, 1.5 s a rank, only to exclude themselves from it.

    dynamo isn't used on CPU, so mark them as excluded already.
    """
    for method in vars(torch.optim.Optimizer).values():
        if (plain := getattr(method, "__wrapped__", None)) is not None:
            plain.__dynamo_disable = plain
    torch.optim.Adam.step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[method-assign, attr-defined]


def _import_megatron() -> None:
    if not cpu.HAVE_GPU:
        assert "megatron.core" not in sys.modules, "import megatron_mixtral.mcore before megatron.core"
        cpu.install()
        _leave_dynamo_out()
    with quiet(), _uncompiled(), without_recorders():
        import megatron.core.distributed
        import megatron.core.jit
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.tensor_parallel
    if not cpu.HAVE_GPU:
        megatron.core.jit.disable_jit_fuser()  # for the modules still to be imported


os.environ.setdefault(
    "NO_VCS_VERSION", "1"
)  # newer versions ask git for their version, with a process for each rank
_import_megatron()

from megatron_mixtral.mcore import compat  # noqa: E402, F401 - it mends what was just imported
