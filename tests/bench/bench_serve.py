"""A soak: a small model served for 15 minutes at 80 % of what this machine can do, and what that left behind.

    python tests/bench/bench_serve.py --minutes 15 --ranks 1

Ends with 1 when a request failed, or memory, open files or threads grew.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import small_server
import soak

MOST_GROWTH_MB = 20
MOST_CONNECTIONS = 20  # that the crowd keeps open


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--share", type=float, default=0.8, help="of the measured capacity")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2), help="2 are two pipeline stages")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = small_server.make_model(Path(name) / "hub")
        layout = {"pipeline": asked.ranks}
        with small_server.server(Path(name) / "run", model, ranks=asked.ranks, layout=layout) as running:
            found = soak.soak(running, seconds=60 * asked.minutes, share=asked.share, probe_seconds=20)
            running.stop()
    return report(found, asked.share)


def report(found: soak.Watched, share: float) -> int:
    """Print the figures; 0 when all of them are as they should be."""
    print(
        f"capacity          {found.capacity:8.1f} requests/s, asked at {share:.0%} of it for {found.seconds:.0f} s"
    )
    print(
        f"answered          {found.answered:8d}, {found.left} clients left on purpose, {len(found.errors)} errors"
    )
    print(f"whole answers     {found.wait(0.5):8.3f} s in the middle, {found.wait(0.99):.3f} s at p99")
    print(
        f"memory            {found.memory[0]:8.1f} MB at first, {found.memory[-1]:.1f} at last, {found.growth:+.1f}"
    )
    print(f"open files        {found.descriptors[0]:8d} at first, {found.descriptors[-1]} at last")
    print(f"threads           {found.threads[0]:8d} at first, {found.threads[-1]} at last")
    for error in found.errors[:5]:
        print(f"error: {error}")
    files = found.descriptors[-1] - found.descriptors[0]
    flat = found.growth < MOST_GROWTH_MB and files <= MOST_CONNECTIONS and found.threads[-1] <= found.threads[0]
    return int(bool(found.errors) or not flat)


if __name__ == "__main__":
    sys.exit(main())
