"""Attention over a paged cache of keys and values, and writes to the cache: for one new token a request, or for
whole prompts.

Shapes: T tokens of all requests in a row, R requests, N query heads in G groups of n, D head size, P pages of S
positions each. `real` (one number on the device) is the number of tokens that aren't padding; padding fills a CUDA
graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # positions read at once; divides a page
ROWS = 64  # positions of a prompt in one program


@triton.jit
def _rotate_and_store(  # noqa: ANN202
    mixed, q, keys, values, position, page, offset, stride, real, frequency,  # noqa: ANN001
    groups, queries, page_size, D: tl.constexpr, HEADS: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    """mixed [T, G, (n + 2) D] -> q [T, N, D], and writes keys and values to the cache."""
    token = tl.program_id(0).to(tl.int64)
    per = queries + 2
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, kind = head // per, head % per
    inside = head < groups * per
    half: tl.constexpr = D // 2
    column = tl.arange(0, half)
    angle = tl.load(position + token * stride).to(tl.float32) * tl.load(frequency + column)
    dtype = mixed.dtype.element_ty
    c = tl.cos(angle).to(dtype).to(tl.float32)[None, :]
    s = tl.sin(angle).to(dtype).to(tl.float32)[None, :]
    at = mixed + (token * groups * per + head)[:, None] * D + column[None, :]
    low = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=inside[:, None], other=0.0).to(tl.float32)
    turned_low, turned_high = (low * c - high * s).to(dtype), (high * c + low * s).to(dtype)
    is_q = (inside & (kind < queries))[:, None]
    q_at = q + (token * groups * queries + group * queries + kind)[:, None] * D + column[None, :]
    tl.store(q_at, turned_low, mask=is_q)
    tl.store(q_at + half, turned_high, mask=is_q)
    counts = inside & (token < tl.load(real))
    page_at = tl.load(page + token * stride).to(tl.int64) * page_size
    row = (page_at + tl.load(offset + token * stride)) * groups + group
    cache_at = row[:, None] * D + column[None, :]
    is_k, is_v = (counts & (kind == queries))[:, None], (counts & (kind == queries + 1))[:, None]
    tl.store(keys + cache_at, turned_low, mask=is_k)
    tl.store(keys + cache_at + half, turned_high, mask=is_k)
    tl.store(values + cache_at, low.to(dtype), mask=is_v)
    tl.store(values + cache_at + half, high.to(dtype), mask=is_v)


def rotate_and_store(
    mixed: Tensor, cache: Tensor, position: Tensor, page: Tensor, offset: Tensor, real: Tensor, frequency: Tensor
) -> Tensor:
    """mixed [T, G, (n + 2) D], cache [2, P, S, G, D], frequency [D / 2] -> q [T, N, D].

    Of each token: its position in its request, its page and its place there; three [T] of one stride.
    """
    tokens, groups, wide = mixed.shape
    size = cache.shape[-1]
    queries = wide // size - 2
    q = mixed.new_empty(tokens, groups * queries, size)
    grid = (tokens, triton.cdiv(groups * (queries + 2), 16))
    _rotate_and_store[grid](
        mixed, q, cache[0], cache[1], position, page, offset, position.stride(0), real, frequency, groups, queries,
        cache.shape[2], D=size, HEADS=16, num_warps=4,
    )  # fmt: skip
    return q


@triton.jit
def _decode(  # noqa: ANN202
    q, keys, values, lengths, table, real, out, partial, weights, pages, scale, window,  # noqa: ANN001
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One token a request: program (request, group, split) reads its part of the request's positions."""
    request, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.where(request < tl.load(real), tl.load(lengths + request), 0)
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin, end = split * part, tl.minimum(split * part + part, length)
    first = tl.maximum(length - window, 0)
    begin = tl.maximum(begin, first // BLOCK * BLOCK)
    head, column = tl.arange(0, PADDED), tl.arange(0, D)
    heads = head < QUERIES
    q_at = (request * GROUPS * QUERIES + group * QUERIES + head)[:, None] * D + column[None, :]
    query = tl.load(q + q_at, mask=heads[:, None], other=0.0)
    largest = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    sums = tl.zeros([PADDED, D], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        page = tl.load(table + request * pages + start // PAGE).to(tl.int64)
        row = (page * PAGE + position % PAGE) * GROUPS + group
        seen = (position < end) & (position >= first)
        at = row[:, None] * D + column[None, :]
        key = tl.load(keys + at, mask=seen[:, None], other=0.0)
        value = tl.load(values + at, mask=seen[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        kept = tl.exp(largest - higher)
        total = total * kept + tl.sum(share, 1)
        sums = sums * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        largest = higher
    if SPLITS == 1:
        result = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + q_at, result.to(out.dtype.element_ty), mask=heads[:, None])
    else:
        row = (request * GROUPS * QUERIES + group * QUERIES + head) * SPLITS + split
        tl.store(partial + row[:, None] * D + column[None, :], sums, mask=heads[:, None])
        tl.store(weights + row * 2, largest, mask=heads)
        tl.store(weights + row * 2 + 1, total, mask=heads)


@triton.jit
def _join(partial, weights, out, D: tl.constexpr, SPLITS: tl.constexpr):  # noqa: ANN001, ANN202
    """Combine the parts of one head of one request, weighted by their softmax sums."""
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, D)
    largest = tl.load(weights + (row * SPLITS + split) * 2)
    total = tl.load(weights + (row * SPLITS + split) * 2 + 1)
    top = tl.max(largest)
    factor = tl.where(total > 0, tl.exp(largest - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    whole = tl.sum(total * factor)
    sums = tl.load(partial + (row * SPLITS + split)[:, None] * D + column[None, :])
    result = tl.sum(sums * factor[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + row * D + column, result.to(out.dtype.element_ty))


def _stages(q: Tensor) -> int:
    """Blocks of positions under way; of fp32 they take twice the room."""
    return 3 if q.dtype.itemsize == 2 else 1


def _splits(programs: int) -> int:
    """Number of parts of each request's positions, a power of two, so all multiprocessors have a program."""
    return next(parts for parts in (16, 8, 4, 2, 1) if parts * programs <= 264 or parts == 1)


def decode(
    q: Tensor, cache: Tensor, lengths: Tensor, table: Tensor, real: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """q [R, N, D], cache [2, P, S, G, D], lengths [R], table [R, most pages] -> [R, N, D]; 0 from `real` on."""
    requests, heads, size = q.shape
    groups, page = cache.shape[3], cache.shape[2]
    splits = _splits(requests * groups)
    out = torch.empty_like(q)
    partial = q.new_empty(requests * heads * splits * size if splits > 1 else 1, dtype=torch.float32)
    weights = q.new_empty(requests * heads * splits * 2 if splits > 1 else 1, dtype=torch.float32)
    _decode[(requests, groups, splits)](
        q, cache[0], cache[1], lengths, table, real, out, partial, weights, table.stride(0), scale,
        window or 2**30, GROUPS=groups, QUERIES=heads // groups, PADDED=max(16, heads // groups), D=size, PAGE=page,
        BLOCK=min(BLOCK, page), SPLITS=splits, num_warps=4, num_stages=_stages(q),
    )  # fmt: skip
    if splits > 1:
        _join[(requests * heads,)](partial, weights, out, D=size, SPLITS=splits, num_warps=2)
    return out


@triton.jit
def _cut(bounds, real, requests, rows, most, REQUESTS: tl.constexpr, ROWS: tl.constexpr):  # noqa: ANN001, ANN202
    """One program for each request: its blocks of rows, and where each begins."""
    own, index = tl.program_id(0), tl.arange(0, REQUESTS)
    bound = tl.load(bounds + index, mask=index <= most, other=2**30)
    following = tl.load(bounds + index + 1, mask=index < most, other=2**30)
    count = tl.min(
        tl.where(bound >= tl.load(real), index, REQUESTS)
    )  # all tokens end there; later entries are stale
    if own < count:
        blocks = (following - bound + ROWS - 1) // ROWS
        first = tl.sum(tl.where(index < own, blocks, 0))
        for block in range(tl.sum(tl.where(index == own, blocks, 0))):
            tl.store(requests + first + block, own)
            tl.store(rows + first + block, block * ROWS)


@triton.jit
def _prompts(  # noqa: ANN202
    q, keys, values, bounds, lengths, table, requests, rows, out, pages, scale, window,  # noqa: ANN001
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Any number of tokens a request: program (block, head), over all positions up to each row's own."""
    request = tl.load(requests + tl.program_id(0)).to(tl.int64)
    if request >= 0:
        head = tl.program_id(1)
        above = tl.load(rows + tl.program_id(0))
        begin, end = tl.load(bounds + request), tl.load(bounds + request + 1)
        length = tl.load(lengths + request)
        row, column = above + tl.arange(0, ROWS), tl.arange(0, D)
        inside = begin + row < end
        at = ((begin + row).to(tl.int64) * GROUPS * QUERIES + head)[:, None] * D + column[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        before = length - (end - begin)
        own = before + row  # the row's position in its request
        stop = tl.minimum(before + above + ROWS, length)
        start = tl.maximum(before + above - window + 1, 0) // BLOCK * BLOCK
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, D], tl.float32)
        for first in range(start, stop, BLOCK):
            position = first + tl.arange(0, BLOCK)
            page = tl.load(table + request * pages + first // PAGE).to(tl.int64)
            cache_at = ((page * PAGE + position % PAGE) * GROUPS + head // QUERIES)[:, None] * D + column[None, :]
            key = tl.load(keys + cache_at, mask=(position < length)[:, None], other=0.0)
            value = tl.load(values + cache_at, mask=(position < length)[:, None], other=0.0)
            seen = (position[None, :] <= own[:, None]) & (position[None, :] > own[:, None] - window)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp(score - safe[:, None])
            kept = tl.exp(largest - safe)
            total = total * kept + tl.sum(share, 1)
            sums = sums * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
            largest = higher
        result = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside[:, None])


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A batch of prompts in blocks of rows: each block's request (-1: none) and first row."""

    requests: Tensor  # [blocks] int32
    rows: Tensor  # [blocks] int32


def cut(bounds: Tensor, real: Tensor, tokens: int, requests: int) -> Cut:
    """Request r has rows bounds[r] to bounds[r + 1], up to `real` of at most `tokens`.

    Entries of bounds [most + 1] beyond `requests` are ignored.
    """
    most, blocks = len(bounds) - 1, tokens // ROWS + min(requests, tokens)
    made = Cut(requests=bounds.new_full((blocks,), -1), rows=bounds.new_empty(blocks))
    _cut[(requests,)](
        bounds, real, made.requests, made.rows, most, REQUESTS=triton.next_power_of_2(most + 1), ROWS=ROWS
    )  # fmt: skip
    return made


def prompts(
    q: Tensor, cache: Tensor, bounds: Tensor, lengths: Tensor, table: Tensor, cut: Cut, *, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """q [T, N, D] -> [T, N, D], 0 where no request has a row; lengths [most], table [most, most pages]."""
    heads, size = q.shape[1:]
    groups, page = cache.shape[3], cache.shape[2]
    out = torch.zeros_like(q)
    _prompts[(len(cut.requests), heads)](
        q, cache[0], cache[1], bounds, lengths, table, cut.requests, cut.rows, out, table.stride(0), scale,
        window or 2**30, GROUPS=groups, QUERIES=heads // groups, D=size, PAGE=page, ROWS=ROWS,
        BLOCK=min(BLOCK, page), num_warps=4, num_stages=_stages(q),
    )  # fmt: skip
    return out
