"""A converted model of Mixtral 8x7B's full width on a GPU: does megatron-core load it, and compute with it?

Two layers of random weights, about 6 GB, are made and converted; then, by each version of megatron-core asked for,
loaded, read back from the GPU and held against the digests of the conversion, and the logits of a prompt against
transformers'. Without a GPU it runs on the CPU, where `--tiny` makes that quick.

    python tests/bench/gpu_convert.py --megatron-path DIR --megatron-path OTHER

DIR is a folder with a megatron-core in it, as `pip install --target DIR megatron-core==0.16.1` makes; without any
the installed one is used.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
from bench_convert import MIXTRAL_8X7B, make
from bench_convert import convert as converted

from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.copying import Target

TINY = MIXTRAL_8X7B | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "vocab_size": 999}
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 300.0  # seconds


def make_fresh(folder: Path, config: dict) -> int:
    """A hub folder with weights as a fresh model's: normal numbers of deviation 0.02, norms about 1."""
    random = np.random.default_rng(4)
    noise = random.standard_normal(32 << 20, np.float32) * np.float32(0.02)
    weights, norms = bf16(noise), bf16(1 + noise[: 1 << 16])

    def write(stream: BinaryIO, target: Target) -> None:
        some, left = norms if len(target.sizes) == 1 else weights, target.nbytes // 2
        at = int(random.integers(len(some)))  # another place for each, or all experts would be one
        while left:
            part = some[at : at + left]
            stream.write(part.data)
            left, at = left - len(part), 0

    return make(folder, config, write)


def bf16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def load(source: Path, folder: Path) -> None:
    """Load the converted folder by the megatron-core that is found first, and prove what it holds and computes."""
    begun = time.perf_counter()
    from megatron_mixtral.checkpoint import compare_logits, save_load
    from megatron_mixtral.mcore import cpu
    from megatron_mixtral.model import build
    from megatron_mixtral.weights import folder as weights_folder

    import megatron.core

    where = "the GPU" if cpu.HAVE_GPU else "the CPU"
    print(
        f"\nmegatron-core {megatron.core.__version__}, imported in {time.perf_counter() - begun:.1f} s", flush=True
    )
    shape, release = MixtralShape.from_folder(source), folder / "release"
    with compare_logits.alone():
        begun = time.perf_counter()
        built = build.build(shape, Layout(), precision="bf16", random_weights=False, fuse=False)
        save_load.load_weights(built, release)
        print(f"  loaded onto {where} in {time.perf_counter() - begun:.1f} s", flush=True)
        begun = time.perf_counter()
        wrong = differing(built, shape, weights_folder.read_marker(release)["digests"])
        assert not wrong, f"{wrong[0]} isn't what was converted"
        print(f"  every tensor on it has its digest ({time.perf_counter() - begun:.1f} s)", flush=True)
        del built
    begun = time.perf_counter()
    print("  ", end="")
    compare_logits.check(source, folder, dtype=None, prompt="A mixture of experts", tolerance=1e-3)
    print(f"  transformers agrees, in fp32 ({time.perf_counter() - begun:.1f} s)", flush=True)


def differing(built, shape: MixtralShape, digests: dict[str, str]) -> list[str]:
    """The hub's tensors that, put together from the model's parameters, have another digest."""
    import torch
    from blake3 import blake3

    from megatron_mixtral.checkpoint import compare_logits
    from megatron_mixtral.weights.tensors import links, megatron_axes

    planes = {}
    for shard in [shard for part in compare_logits._shards(built) for shard in part]:
        axes, front = megatron_axes(shard.key), shard.prepend_axis_num
        for own in np.ndindex(*shard.data.shape[: axes - front]):
            offset = shard.global_offset
            index = (*offset[:front], *(o + i for o, i in zip(offset[front:axes], own, strict=True)))
            planes.setdefault((shard.key, index), []).append((offset[axes], shard.data[own]))
    found = {}
    for link in links(shape):
        rows, digest = link.megatron, found.setdefault(link.hub.name, blake3(max_threads=blake3.AUTO))
        for first, plane in sorted(planes[rows.name, rows.index], key=lambda part: part[0]):
            part = plane[max(0, rows.start - first) : max(0, rows.stop - first)]
            digest.update(part.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return [name for name, digest in found.items() if digest.hexdigest() != digests[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatron-path", action="append", type=Path, help="folder with a megatron-core; repeat it"
    )
    parser.add_argument("--folder", type=Path, help="where to; by default memory where 30 GB of it are free")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a try without a GPU")
    parser.add_argument("--load", nargs=2, type=Path, metavar=("HUB", "CONVERTED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 30e9
    where = options.folder or (SHARED_MEMORY if roomy else Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder, begun = Path(name), time.perf_counter()
        size = make_fresh(folder / "hub", TINY if options.tiny else MIXTRAL_8X7B)
        print(f"{size / 1e9:.2f} GB made in {time.perf_counter() - begun:.1f} s")
        seconds, _ = converted(folder / "hub", folder / "megatron", "megatron", 2)
        print(f"converted by 2 processes in {seconds:.1f} s", flush=True)
        paths = options.megatron_path or [None]
        sys.exit(max(loaded_by(paths, folder / "hub", folder / "megatron")))


def loaded_by(paths: list[Path | None], source: Path, folder: Path) -> list[int]:
    """Exit codes of the processes that load it, one for each megatron-core, all at once; prints what they say."""
    root = str(Path(__file__).resolve().parents[2])
    started = []
    for path in paths:
        first = [str(path.absolute())] if path else []
        search = [*first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), root]
        # Compiling megatron-core's small helpers would take longer than all the rest.
        more = {"PYTHONPATH": os.pathsep.join(search), "TORCHDYNAMO_DISABLE": "1"}
        command = [sys.executable, __file__, "--load", str(source), str(folder)]
        started.append(
            subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    codes = []
    for process in started:
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        print(said.decode(errors="replace"), flush=True)
        codes.append(abs(process.returncode))
    return codes


if __name__ == "__main__":
    main()
