"""`prepare` against a plain loop on one core: json, the same tokenizer's own encode, megatron-core's builder.

    python tests/bench/bench_prepare.py [--megabytes 100] [--text FILE]

Both write the same .bin, which is compared. The text is FILE's, or made-up sentences, in documents of 2 kB.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "la",
    "me",
    "ni",
    "so",
    "tu",
    "ra",
    "pan",
    "ter",
    "ing",
    "sh",
    "ment",
    "ly",
)
PREPARE = """
import resource, sys, time
from pathlib import Path
from megatron_mixtral.jobs import prepare
from megatron_mixtral.spec.jobs import PrepareConfig
begun = time.process_time()
source, tokenizer, output = sys.argv[1:]
prepare.run(PrepareConfig(inputs=[source], output=output, tokenizer=tokenizer, workers=1), Path(output).parent)
print("SECONDS", time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
PLAIN = """
import json, resource, sys, time
import numpy, sentencepiece, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
begun = time.process_time()
source, tokenizer, output = sys.argv[1:]
model = sentencepiece.SentencePieceProcessor(model_file=tokenizer + "/tokenizer.model")
builder = IndexedDatasetBuilder(output + ".bin", dtype=numpy.uint16)
with open(source) as stream:
    for line in stream:
        ids = [model.bos_id(), *model.encode(json.loads(line)["text"]), model.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
builder.finalize(output + ".idx")
print("SECONDS", time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def sentences(size: int) -> str:
    """English-like text: words by Zipf's law, a fresh one now and then."""
    draw = random.Random(1)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(40_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    parts: list[str] = []
    total = 0
    while total < size:
        chosen = draw.choices(words, weights, k=2000)
        text = " ".join(word + draw.choice(("", "", "", "", ",", ".\n")) for word in chosen)
        parts.append(f"{text} {draw.randrange(10**6)} ")
        total += len(parts[-1])
    return "".join(parts)


def write_corpus(path: Path, megabytes: float, text: Path | None) -> int:
    size, written = int(megabytes * 1e6), 0
    body = text.read_text() if text else sentences(min(size, 20_000_000))
    with path.open("w") as stream:
        while written < size:
            for start in range(0, len(body), 2000):
                line = json.dumps({"text": body[start : start + 2000]}) + "\n"
                written += stream.write(line)
                if written >= size:
                    break
    return written


def measured(program: str, *arguments: str) -> tuple[float, float]:
    """(seconds of processor time, MiB at most) of one single-threaded process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("SECONDS"))
    seconds, memory = line.split()[1:]
    return float(seconds), float(memory)


def compare(folder: Path, megabytes: float, text: Path | None) -> dict[str, float]:
    """Megabytes a second and MiB of both, after a check that they wrote the same."""
    from megatron_mixtral.jobs import tiny

    words = folder / "words"
    words.mkdir()
    tiny.write_tokenizer(words)
    corpus = folder / "corpus.jsonl"
    size = write_corpus(corpus, megabytes, text) / 1e6
    begun = time.monotonic()
    ours, our_memory = measured(PREPARE, str(corpus), str(words), str(folder / "ours"))
    plain, plain_memory = measured(PLAIN, str(corpus), str(words), str(folder / "plain"))
    assert (folder / "ours.bin").read_bytes() == (folder / "plain.bin").read_bytes(), "they differ"
    return {
        "megabytes": size,
        "ours": size / ours,
        "plain": size / plain,
        "ratio": plain / ours,
        "our_memory": our_memory,
        "plain_memory": plain_memory,
        "seconds": time.monotonic() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--text", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name), asked.megabytes, asked.text)
    print(f"{found['megabytes']:.0f} MB of JSONL on one core, MB a second of processor time:")
    print(f"prepare     {found['ours']:6.2f} MB/s, {found['our_memory']:.0f} MiB at most")
    print(f"plain loop  {found['plain']:6.2f} MB/s, {found['plain_memory']:.0f} MiB at most")
    print(f"prepare is {found['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
