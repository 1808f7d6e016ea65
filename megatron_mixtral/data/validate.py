"""Reads a run's data once before its first step: bad data is an error, and good data gets a digest.

The ranks share the reading. A resumed run compares the digest.
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
    """The result for one segment of tokens; `stranger` is an id beyond the vocabulary, and its index."""

    number: int
    digest: str
    learnt: int
    stranger: tuple[int, int] | None


def check(documents: Documents, vocab_size: int) -> str:
    """The digest of `documents`; `InputError` on every rank for an id beyond the vocabulary, or for a mask that
    selects no token or every token.
    """
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
    """One digest of the index and of all blocks; it doesn't depend on which rank read them."""
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
