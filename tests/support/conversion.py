"""A conversion in this process, and the bytes it wrote."""

from pathlib import Path

from megatron_mixtral.jobs import convert
from megatron_mixtral.spec.jobs import ConvertConfig


def run(source, output, run_dir, **config):
    convert.run(ConvertConfig(source=str(source), output=str(output), **config), run_dir)


def contents(folder: Path):
    """Relative name -> bytes of every file; the marker alone tells where its source lay."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
