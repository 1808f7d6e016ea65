"""Grouped matmuls: each row with its own expert's matrix, and each expert's rows with each other.

It chooses the fastest available way. To train: quack's kernels for Hopper where that package is installed, else
torch's grouped matmul and cuBLAS. To serve on Hopper: our own. Where none of them runs: one matmul after another.
Weights in FP8 (e4m3) have a scale for each row of a matrix, which is a column here. Shapes: R rows sorted by
expert, E experts.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixtral import kernels
from megatron_mixtral.kernels import wgrad

# Scales of both matrices of each expert, [E, 2F] and [E, H] in fp32, if the weights are FP8.
Scales = tuple[Tensor, Tensor] | tuple[None, None]


class Products(Protocol):
    """Made from the number of rows of each expert, for one pass: forward, and in training backward."""

    def of(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [R, K], weight [E, K, N] -> [R, N] in the type of x; `scale` [E, N] if the weight is in FP8."""

    def swiglu(self, x: Tensor, weight: Tensor, probs: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [R, K], weight [E, K, 2F] (gate, then up), probs [R] -> silu(gate) * up * p, [R, F]."""
        from megatron_mixtral.kernels import swiglu as activation  # imports triton

        return activation.forward(self.of(x, weight, scale), probs)

    def between(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad [R, N], x [R, K] -> [E, N, K], in their type."""
        raise NotImplementedError

    def add_between(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """The same, added to `total` in fp32."""
        raise NotImplementedError


class OneByOne(Products):
    """For any device and type; asks the host for the counts."""

    def __init__(self, counts: Tensor) -> None:
        self.host = wgrad.CountsOnHost(counts)

    def of(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        counts = self.host.get()  # what is beyond them is nobody's
        parts = [part @ w.to(x.dtype) for part, w in zip(x[: sum(counts)].split(counts), weight, strict=True)]
        if scale is not None:
            parts = [(part * own).to(x.dtype) for part, own in zip(parts, scale, strict=True)]
        return torch.cat(parts)

    def between(self, grad: Tensor, x: Tensor) -> Tensor:
        parts = zip(grad.split(self.host.get()), x.split(self.host.get()), strict=True)
        return torch.stack([g.t() @ part for g, part in parts])

    def add_between(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        wgrad.add_products(total, grad, x, self.host.get())


class Grouped(OneByOne):
    """By torch's grouped matmul; fp32 weight gradients by cuBLAS, whose counts were copied to the host earlier."""

    def __init__(self, counts: Tensor, *, adds: bool) -> None:
        self.counts = counts
        self.ends = counts.cumsum(0, dtype=torch.int32)
        self._host = wgrad.CountsOnHost(counts) if adds else None

    @property
    def host(self) -> wgrad.CountsOnHost:  # type: ignore[override]
        if self._host is None:
            self._host = wgrad.CountsOnHost(self.counts)
        return self._host

    def of(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        assert scale is None
        return F.grouped_mm(x, weight, offs=self.ends)

    def between(self, grad: Tensor, x: Tensor) -> Tensor:
        return F.grouped_mm(grad.t(), x, offs=self.ends)


class Tiled(Products):
    """By our own kernels, forward only; with weights in FP8 rows become e4m3 as well."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def of(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        from megatron_mixtral.kernels import grouped_gemm_hopper

        return grouped_gemm_hopper.product(x, weight, self.ends, scale)

    def swiglu(self, x: Tensor, weight: Tensor, probs: Tensor, scale: Tensor | None = None) -> Tensor:
        from megatron_mixtral.kernels import grouped_gemm_hopper

        return grouped_gemm_hopper.swiglu(x, weight, probs, self.ends, scale)


class Quack(Products):
    """By quack's grouped kernels, except for matmuls with an untransposed matrix, where torch's are faster.

    Counts are never copied to the host.
    """

    def __init__(self, counts: Tensor) -> None:
        self.bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

    def of(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        assert scale is None
        if weight.stride(1) != 1:
            return F.grouped_mm(x, weight, offs=self.bounds[1:])
        out = x.new_empty(x.shape[0], weight.shape[2])
        if out.numel():
            _quack()(x, weight, out, cu_seqlens_m=self.bounds)
        return out

    def between(self, grad: Tensor, x: Tensor) -> Tensor:
        out = x.new_zeros(self.bounds.shape[0] - 1, grad.shape[1], x.shape[1])
        if x.numel():
            _quack()(grad.t(), x, out, cu_seqlens_k=self.bounds)
        return out

    def add_between(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        if x.numel():
            _quack()(grad.t(), x, total, cu_seqlens_k=self.bounds, add_to_output=True)


@functools.cache
def _quack() -> Callable[..., Any]:
    """quack's matmul with the fastest of six tile sizes at Mixtral 8x7B's sizes on an H200."""
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_tuned

    tiles = GemmConfig(
        tile_m=128,
        tile_n=192,
        pingpong=True,
        cluster_m=2,
        cluster_n=1,
        device_capacity=9,
        is_dynamic_persistent=False,
    )
    return functools.partial(gemm_tuned.fn, config=tiles)


@functools.cache
def _quack_version() -> str | None:
    """quack's version; None if it isn't installed, or the chip differs from the one it was tuned for."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    return importlib.metadata.version("quack-kernels") if importlib.util.find_spec("quack") else None


def describe() -> str:
    """How the experts' matmuls are computed on this machine, for a log."""
    if version := _quack_version():
        return f"experts by quack {version}"
    return "experts by torch's grouped matmul" if grouped_mm_serves() else "experts one by one"


def best(counts: Tensor, *weights: Tensor) -> Products:
    """The fastest way for these weights to be trained.

    Our own kernels aren't used: they draw so much power that the clock falls, and a pass took 3 % longer.
    """
    if not grouped_mm_serves(*weights):
        return OneByOne(counts)
    counts = counts.to(weights[0].device, torch.int32, non_blocking=True)
    if _quack_version():
        return Quack(counts)
    return Grouped(counts, adds=any(map(wgrad.accumulates, weights)))


def best_forward(ends: Tensor, *weights: Tensor) -> Products:
    """The fastest way for these weights to be served; `ends` [E] int32 where the rows of each expert end."""
    if tiles_serve(*weights):
        return Tiled(ends)  # type: ignore[abstract]  # forward only
    return best(ends.diff(prepend=ends.new_zeros(1)), *weights)


def grouped_mm_serves(*weights: Tensor) -> bool:
    """Whether one grouped matmul can do all experts: bf16 on a GPU with rows of whole 16 bytes."""
    return (
        torch.cuda.is_available()
        and hasattr(F, "grouped_mm")
        and all(
            w.is_cuda and w.dtype == torch.bfloat16 and w.shape[-1] % 8 == 0 and w.shape[-2] % 8 == 0
            for w in weights
        )
    )


def tiles_serve(*weights: Tensor) -> bool:
    """Whether our own grouped matmul can do all experts: bf16 or e4m3 on Hopper, rows of whole 16 bytes."""
    return _have_tiles() and all(
        w.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and w.is_cuda
        and all(size * w.itemsize % 16 == 0 for size in w.shape[1:])
        for w in weights
    )


@functools.cache
def _have_tiles() -> bool:
    return (
        kernels.missing() is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] == 9
        and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    )
