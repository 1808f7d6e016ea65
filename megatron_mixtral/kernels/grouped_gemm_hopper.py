"""Grouped matmuls for Hopper, in tiles that fit the rows left.

With some hundred rows an expert, tiles of one height would be a fifth empty. So an expert's last rows get a tile of
half the height. The copy engine reads all tiles. Shapes: R rows sorted by expert, E experts, `ends` [E] int32 where
each one's rows end, K depth, N width of a product, F expert width.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_mixtral.kernels import fp8_rows

# The fastest of a dozen on an H200 at Mixtral 8x7B's sizes, from 64 rows an expert to 1,024, in bf16 and in FP8.
HIGH = 128  # rows of a tile; half as many if at most half are left
WIDE = 128  # columns of a tile; the same number for gate and for up
DEPTH = 128  # bytes of a row that are read at a time
STAGES = 4  # pipelined steps


@triton.jit
def _find(tile, ends, columns, E: tl.constexpr, HIGH: tl.constexpr):  # noqa: ANN001, ANN202
    """The tile's expert (-1: no such tile), first row, end of rows, and column."""
    expert, first, end, own, high = -1, 0, 0, 0, 1
    begin, before = 0, 0
    for e in tl.static_range(E):
        stop = tl.load(ends + e)
        here = tl.cdiv(stop - begin, HIGH)
        mine = (expert < 0) & (tile < before + here * columns)
        expert = tl.where(mine, e, expert)
        first = tl.where(mine, begin, first)
        end = tl.where(mine, stop, end)
        own = tl.where(mine, tile - before, own)
        high = tl.where(mine, here, high)
        before += here * columns
        begin = stop
    return expert, first + own % high * HIGH, end, own // high  # neighbouring tiles share their weights


@triton.jit
def _tile(  # noqa: ANN202
    x, weight, x_scale, w_scale, probs, out, expert, row, end, column, depth, width,  # noqa: ANN001
    GATED: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    at = expert * width * (2 if GATED else 1) + column
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    up = tl.zeros([ROWS, WIDE], tl.float32)
    for k in range(0, depth, DEEP):
        value = x.load([row, k])
        sums = tl.dot(value, weight.load([at, k]).T, sums)
        if GATED:
            up = tl.dot(value, weight.load([at + width, k]).T, up)
    rows, columns = row + tl.arange(0, ROWS), tl.arange(0, WIDE)
    inside = rows < end
    if w_scale is not None:
        own = tl.load(x_scale + rows, mask=inside, other=0.0)[:, None]
        within = column + columns < width
        sums *= own * tl.load(w_scale + at + columns, mask=within, other=0.0)[None, :]
        if GATED:
            up *= own * tl.load(w_scale + at + width + columns, mask=within, other=0.0)[None, :]
    if GATED:
        p = tl.load(probs + rows, mask=inside, other=0.0).to(tl.float32)
        sums = sums * tl.sigmoid(sums) * up * p[:, None]
    to = out + rows.to(tl.int64)[:, None] * width + (column + columns)[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & (column + columns < width)[None, :])


@triton.jit
def _product(  # noqa: ANN202
    high, low, weight, x_scale, w_scale, probs, ends, out, depth, width,  # noqa: ANN001
    GATED: tl.constexpr, E: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Both `high` and `low` are the rows, read so many at a time."""
    expert, row, end, strip = _find(tl.program_id(0), ends, tl.cdiv(width, WIDE), E, HIGH)
    if expert >= 0:
        column = strip * WIDE
        if end - row > HIGH // 2:
            _tile(
                high, weight, x_scale, w_scale, probs, out, expert, row, end, column, depth, width,
                GATED, HIGH, WIDE, DEEP,
            )  # fmt: skip
        else:
            _tile(
                low, weight, x_scale, w_scale, probs, out, expert, row, end, column, depth, width,
                GATED, HIGH // 2, WIDE, DEEP,
            )  # fmt: skip


def _run(x: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor, probs: Tensor | None) -> Tensor:
    count, depth, width = weight.shape
    width //= 1 if probs is None else 2
    out = x.new_empty(len(x), width)
    if not len(x):
        return out
    x, x_scale = (x.contiguous(), None) if scale is None else fp8_rows.rows(x)
    deep, matrices = DEPTH // x.itemsize, weight.transpose(1, 2).view(-1, depth)
    read = TensorDescriptor.from_tensor
    _product[((len(x) // HIGH + count) * triton.cdiv(width, WIDE),)](
        read(x, [HIGH, deep]), read(x, [HIGH // 2, deep]), read(matrices, [WIDE, deep]), x_scale, scale, probs,
        ends, out, depth, width, GATED=probs is not None, E=count, HIGH=HIGH, WIDE=WIDE, DEEP=deep, num_warps=8,
        num_stages=STAGES,
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [R, K], weight [E, K, N] -> [R, N] in the type of x; columns of the weight lie end to end.

    With `scale` [E, N] the weight is e4m3, and each row of x is rounded to e4m3 as well.
    """
    return _run(x, weight, scale, ends, None)


def swiglu(x: Tensor, weight: Tensor, probs: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """x [R, K], weight [E, K, 2F] (gate, then up), probs [R] -> silu(gate) * up * p, [R, F]; `scale` [E, 2F]."""
    return _run(x, weight, scale, ends, probs)
