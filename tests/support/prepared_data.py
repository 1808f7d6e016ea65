"""Training data as `prepare` leaves it: made from files or written outright, and read back."""

import json

import numpy as np

from megatron_mixtral.data import indexed
from megatron_mixtral.data.dataset import Documents
from megatron_mixtral.jobs.prepare import run
from megatron_mixtral.spec.jobs import PrepareConfig

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A mixture."},
]


def write_jsonl(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def prepare(tmp_path, tokenizer_folder, *inputs, **options):
    config = PrepareConfig(
        inputs=[str(i) for i in inputs],
        output=str(tmp_path / "out"),
        tokenizer=str(tokenizer_folder),
        **{"workers": 1, **options},
    )
    run(config, tmp_path)
    return tmp_path / "out"


def stored(prefix):
    read = Documents(prefix)
    return [tuple(part.tolist() for part in read.read(i, 0, None)) for i in range(len(read))]


def write_chats(prefix, lengths, learnt=0.5):
    """Documents whose tokens are all different modulo 64, each with a part that is learnt at its end."""
    lengths = np.array(lengths, dtype=np.int32)
    np.concatenate([(np.arange(n) * 5 + i) % 64 for i, n in enumerate(lengths)]).astype(np.uint16).tofile(
        f"{prefix}.bin"
    )
    mask = np.concatenate([np.arange(n) >= min(n * (1 - learnt), n - 1) for n in lengths]).astype(np.uint8)
    mask.tofile(f"{prefix}_mask.bin")
    indexed.write_index(prefix.with_name(f"{prefix.name}.idx"), lengths, np.dtype(np.uint16))
    indexed.write_index(prefix.with_name(f"{prefix.name}_mask.idx"), lengths, np.dtype(np.uint8))
    return Documents(prefix)
