"""megatron-core, imported in the one order that works: import this package, or a part, before `megatron.core`.

Where no GPU is visible, `cpu` stands in for CUDA before megatron-core sees torch; then `compat` applies its table
of patches. `ranks` has the process group.
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
    """Without megatron-core's warnings about packages that we do without, and torch's about what it calls."""
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
    """While megatron-core is imported: it takes them along, 0.4 s a rank, for records that are kept elsewhere."""
    absent = [name for name in ("torch.utils.tensorboard", "wandb") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """While megatron-core is imported on CPU: no torch.compile.

    Its helpers are decorated with it, which alone doubles the import time and would need a C++ compiler at the
    first step; where there is no GPU they run as written.
    """
    compiler = torch.compile
    if not cpu.HAVE_GPU:
        torch.compile = lambda function=None, **_: function if function else (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler  # type: ignore[assignment]


def _leave_dynamo_out() -> None:
    """Optimizers' methods import torch._dynamo, a second and a half a rank, to tell it to leave them alone.

    It isn't used on CPU: mark them as told already.
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


os.environ.setdefault("NO_VCS_VERSION", "1")  # newer ones ask git for their version, a process a rank
_import_megatron()

from megatron_mixtral.mcore import compat  # noqa: E402, F401 - it mends what was just imported
