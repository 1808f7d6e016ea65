"""One reading of a run's data before its first step: what would poison training is named, the rest gets a digest.

Ranks share the reading, so that it takes a second a gigabyte and rank; a resumed run compares the digest.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from blake3 import blake3

from megatron_mixtral.data.dataset import Documents
from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import InputError

BLOCK = 64 << 20  # bytes that one rank reads at a time


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """What one stretch of tokens holds; `stranger` is an id that the model doesn't know, and its place."""

    number: int
    digest: str
    learnt: int
    stranger: tuple[int, int] | None


def check(documents: Documents, vocab_size: int) -> str:
    """The digest of `documents`; on every rank alike `InputError` for an id that the model doesn't know, or for a
    mask that says nothing."""
    numbers = range(dist.get_rank(), _count(documents), dist.get_world_size())
    mine = [_block(documents, number, vocab_size) for number in numbers]
    blocks = sorted((b for rank in collectives.gathered(mine) for b in rank), key=lambda b: b.number)
    for index, place in (b.stranger for b in blocks if b.stranger):
        at = int(np.searchsorted(documents.starts, place, side="right")) - 1
        raise InputError(
            f"{documents.prefix}.bin: document {at} holds token {index}, but the model's vocabulary has "
            f"{vocab_size}: its last one is {vocab_size - 1}"
        )
    if documents.masks is not None:
        _check_mask(documents.prefix, sum(b.learnt for b in blocks), len(documents.tokens))
    return collectives.on_first_rank(lambda: _joined(documents.prefix, blocks))


def _joined(prefix: Path, blocks: list[TokenBlock]) -> str:
    """One digest of the index and of all blocks, whoever read them."""
    whole = blake3(Path(f"{prefix}.idx").read_bytes())
    for block in blocks:
        whole.update(bytes.fromhex(block.digest))
    return whole.hexdigest()


def _check_mask(prefix: Path, learnt: int, tokens: int) -> None:
    if learnt in (0, tokens):
        share = "no token" if not learnt else "every token, questions too,"
        raise InputError(f"{prefix}_mask.bin: {share} is to be learnt; prepare the data again")


def _count(documents: Documents) -> int:
    return math.ceil(documents.tokens.nbytes / BLOCK)


def _block(documents: Documents, number: int, vocab_size: int) -> TokenBlock:
    step = BLOCK // documents.tokens.itemsize
    span = slice(number * step, (number + 1) * step)
    tokens = np.ascontiguousarray(documents.tokens[span])
    digest, learnt, stranger = blake3(tokens.data.cast("B")), len(tokens), None
    if documents.masks is not None:
        mask = np.ascontiguousarray(documents.masks[span])
        digest.update(mask.data.cast("B"))
        learnt = int(np.count_nonzero(mask))
    if tokens.max() >= vocab_size or tokens.min() < 0:
        place = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
        stranger = int(tokens[place]), number * step + place
    return TokenBlock(number=number, digest=digest.hexdigest(), learnt=learnt, stranger=stranger)
