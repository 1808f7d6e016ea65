"""What every rank starts with: its place from the environment, a cheap import, CPU in CUDA's stead."""

import importlib
import os
import subprocess
import sys

import pytest
from spawn_ranks import free_port, ranks


def mistakes():
    """What `initialize` says of environments and layouts that can't be."""
    from megatron_mixtral.errors import JobError
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.spec.layout import Layout

    said = []
    for layout, forgotten in ((Layout(pipeline=2), None), (Layout(expert=3), None), (Layout(), "MASTER_PORT")):
        kept = os.environ.pop(forgotten) if forgotten else None
        try:
            ranks.initialize(layout)
        except JobError as error:
            said.append((str(error), error.exit_code))
        if kept:
            os.environ[forgotten] = kept
    return said


def test_impossible_places_are_said_before_anything_opens():
    pipeline, expert, environment = ranks(1, mistakes)[0]
    assert "1 rank doesn't fit: DP = 1 / (TP 1 x PP 2 x CP 1) = 0.5, not whole" in pipeline[0]
    assert "expert DP = 1 / (ETP 1 x EP 3 x PP 1) = 0.333, not whole" in expert[0]
    assert "WORLD_SIZE is set but not MASTER_PORT" in environment[0]
    assert [code for _, code in (pipeline, expert, environment)] == [2, 2, 1]


def imported():
    from megatron_mixtral.checkpoint import save_load  # noqa: F401

    heavy = ("torch._dynamo", "torch._inductor", "transformers", "megatron_mixtral.model.fused")
    return [name for name in heavy if name in sys.modules]


def test_a_rank_on_cpu_imports_no_compiler():
    assert ranks(1, imported, env={"CUDA_VISIBLE_DEVICES": ""}) == [[]]


def on_cpu():
    """Every way to name CUDA, on a machine without; where the tensors lie."""
    import torch

    from megatron_mixtral.mcore import cpu

    assert not cpu.HAVE_GPU
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device(), pin_memory=True),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda:0", dtype=torch.int64),
        torch.ones(2).cuda(),
        torch.ones(2).new_zeros(3, device="cuda"),
    ]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event(enable_timing=True).record()
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    drawn = torch.rand(1).item()
    torch.manual_seed(3)
    assert drawn == torch.rand(1).item()
    return [tensor.device.type for tensor in made]


def test_code_written_for_cuda_runs_on_cpu():
    assert set(ranks(1, on_cpu, env={"CUDA_VISIBLE_DEVICES": ""})[0]) == {"cpu"}


def test_a_device_context_still_reaches_every_factory():
    """transformers builds its models under one; where it doesn't reach, their buffers stay as memory was."""
    code = (
        "from megatron_mixtral.mcore import compat\nimport torch\n"
        "with torch.device('meta'):\n    assert torch.arange(3).is_meta and torch.empty(2).is_meta\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_torchrun_starts_ranks_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from megatron_mixtral.mcore import ranks\n"
        "from megatron_mixtral.spec.layout import Layout\n"
        "ranks.initialize(Layout(pipeline=2), timeout=60)\n"
        "print('place', *ranks.data_parallel())\n"
        "ranks.shutdown()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    done = subprocess.run(
        [*command, str(free_port()), str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("place 0 1") == 2


def test_what_is_patched_is_there_to_be_patched():
    import pkgutil

    from megatron_mixtral.mcore import compat

    names = {patch.what for patch in compat.PATCHES}
    names -= {"megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda"}  # Apex's, if it is there
    for name in names:
        pkgutil.resolve_name(name)  # AttributeError names what upstream has renamed


def late():
    importlib.import_module("megatron.core")
    importlib.import_module("megatron_mixtral.mcore.compat")


def test_importing_megatron_first_is_an_error_and_not_a_slow_surprise():
    with pytest.raises(AssertionError, match=r"import megatron_mixtral\.mcore before megatron\.core"):
        ranks(1, late, env={"CUDA_VISIBLE_DEVICES": ""})
