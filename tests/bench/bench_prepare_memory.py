"""Memory of `prepare` over a large input: its peak over the first tenth of the time, and over all of it.

    python tests/bench/bench_prepare_memory.py [--gigabytes 1] [--workers 2] [--only NAME]

All processes of the job count, shared pages once (PSS). Fails where memory grows by more than `GROWTH` MB after the
first tenth, or where a single line takes more than `A_LINE` times its own size; and where a job that is killed on
the way and started again writes anything else than one left alone.
"""

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from bench_prepare import sentences

GROWTH = 100  # MB
A_LINE = 12  # sizes of one line that is the whole input
EVERY = 0.25  # seconds between samples


@dataclass(frozen=True, kw_only=True)
class Seen:
    """MB of all processes as time went, from the moment the first output was there."""

    samples: list[float]
    seconds: float

    @property
    def early(self) -> float:
        return max(self.samples[: max(len(self.samples) // 10, 1)])

    @property
    def peak(self) -> float:
        return max(self.samples)


def write_lines(path: Path, size: int) -> None:
    """Texts and conversations in turn, `size` bytes of JSONL; compressed where the name says so."""
    body = sentences(20_000_000)
    draw = random.Random(2)
    written = 0
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as stream:
        while written < size:
            at = draw.randrange(len(body) - 4000)
            line = {"text": body[at : at + 3000]}
            if draw.random() < 0.5:
                said = body[at : at + 300], body[at + 300 : at + 3000]
                roles = zip(("user", "assistant"), said, strict=True)
                line = {"messages": [{"role": r, "content": c} for r, c in roles]}
            written += stream.write(json.dumps(line) + "\n")


def write_one_line(path: Path, size: int) -> None:
    path.write_text(json.dumps({"text": sentences(size)}) + "\n")


class Preparation:
    """The job, as a script runs it, in a folder of its own."""

    def __init__(self, folder: Path, source: Path, words: Path, workers: int) -> None:
        self.folder, self.prefix = folder, folder / "out"
        folder.mkdir()
        config = {"inputs": [str(source)], "output": str(self.prefix), "tokenizer": str(words), "workers": workers}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "megatron_mixtral", "prepare", "--config", str(self.folder / "config.yaml")]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(argv, stdout=log, stderr=log)

    def watched(self) -> Seen:
        process, samples, begun = self.start(), [], time.monotonic()
        while process.poll() is None:
            if any(self.folder.glob("out.parts/*.bin")):
                samples.append(memory(process.pid))
            time.sleep(EVERY)
        assert process.returncode == 0, (self.folder / "log").read_text()
        return Seen(samples=samples or [0.0], seconds=time.monotonic() - begun)

    def killed(self, when: Callable[[], bool]) -> None:
        """Start it and end it, children and all, as soon as `when()`."""
        process = self.start()
        while not when():
            assert process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.01)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.kill()
        psutil.wait_procs(family)
        process.wait()

    def digest(self) -> str:
        whole = hashlib.sha256()
        for name in ("out.bin", "out.idx", "out_mask.bin", "out_mask.idx"):
            path = self.folder / name
            if path.exists():
                with path.open("rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()


def memory(pid: int) -> float:
    """MB of a process and its children."""
    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0.0
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("plain", "gz", "line", "killed"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        failed = [text for text in _all(Path(name), asked) if text]
    sys.exit("\n".join(failed))


def _all(folder: Path, asked: argparse.Namespace) -> Iterator[str]:
    from megatron_mixtral.jobs import tiny

    words = folder / "words"
    words.mkdir()
    tiny.write_tokenizer(words)
    size = int(asked.gigabytes * 1e9)
    cases = {"plain": ("lines.jsonl", write_lines, size), "gz": ("lines.jsonl.gz", write_lines, size)}
    cases["line"] = ("line.jsonl", write_one_line, size // 20)
    for case, (file, write, length) in cases.items():
        if asked.only not in (None, case) and (case, asked.only) != ("plain", "killed"):
            continue
        source = folder / file
        write(source, length)
        job = Preparation(folder / case, source, words, asked.workers)
        yield _told(case, length, job.watched())
        if case == "plain" and asked.only in (None, "killed"):
            yield _resumed(job.digest(), Preparation(folder / "killed", source, words, asked.workers))
        source.unlink()


def _told(case: str, length: int, seen: Seen) -> str:
    grown, allowed = seen.peak - seen.early, GROWTH
    if case == "line":
        grown, allowed = seen.peak, A_LINE * length / 1e6
    print(
        f"{case:6} {length / 1e6:6.0f} MB in {seen.seconds:5.1f} s: {seen.early:5.0f} MB in the first tenth, "
        f"{seen.peak:5.0f} MB at most, {seen.samples[-1]:5.0f} MB at the end",
        flush=True,
    )
    return f"{case}: {grown:.0f} MB, {allowed:.0f} allowed" if grown > allowed else ""


def _resumed(wanted: str, job: Preparation) -> str:
    parts = job.folder / "out.parts"
    for share in (2, 20, 60):
        job.killed(lambda share=share: len(list(parts.glob("*.json"))) >= share)
    seen = job.watched()
    same = job.digest() == wanted
    print(f"killed three times, then {seen.seconds:.1f} s: {'the same' if same else 'OTHER'} files", flush=True)
    return "" if same else "killed and started again it wrote other files"


if __name__ == "__main__":
    main()
