"""LoRA's linear layers on the CPU: three products of ours (``csrc/drive/gemm.cpp``), or torch's in float32.

16-bit products are ours: operands become float32 in the caches, sums are float32, and each result is rounded
once. In float32 torch's library is the one to beat: products of many rows and gradients are torch's, the
adapter added in place; those of few rows are ours, and those with dropout, whose mask is drawn where x is
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from pykernels import lora_linear_torch, products
from pykernels.lora_linear_torch import ALL, Adapter
from pykernels.native import FLOAT_ROWS

Segments = list[tuple[int, int]]


def lora_linear(
    out: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int = ALL,
    key: int = 0,
) -> None:
    """out [M, N] = x [M, K] W^T + s h B^T + bias, and h [M, ranks] = (x without what is dropped) A^T."""
    if not _few_rows(x, weight) and _torch_is_faster(x, threshold):
        return lora_linear_torch.lora_linear(out, h, x, weight, adapters, index, bias, threshold, key)
    weight, adapters = _stored(weight, adapters)
    if bias is not None:
        bias = bias.resolve_neg().contiguous()
    rows, segments = _sorted(index, len(adapters), x.shape[0])
    drop = (threshold, key, x.shape[1])
    down, up = [a.t() for a, _, _ in adapters], [(h, b.t(), s) for _, b, s in adapters]
    if threshold == ALL:
        return products.product(out, x, weight.t(), rows, segments, up, bias, factors=down)
    products.shrink(h, x, rows, segments, down, drop)
    products.product(out, x, weight.t(), rows, segments, up, bias)


def lora_linear_backward(
    by_x: torch.Tensor | None,
    by_weight: torch.Tensor | None,
    by_a: Sequence[torch.Tensor | None],
    by_b: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor | None,
    threshold: int = ALL,
    key: int = 0,
) -> None:
    """Fills the gradients that are asked for."""
    if _torch_is_faster(x, threshold):
        return lora_linear_torch.lora_linear_backward(
            by_x, by_weight, by_a, by_b, grad, h, x, weight, adapters, index, threshold, key
        )
    weight, adapters = _stored(weight, adapters)
    rows, segments = _sorted(index, len(adapters), x.shape[0])
    drop = (threshold, key, x.shape[1])
    if by_weight is not None:
        products.product(by_weight, grad.t(), x, None, [], [], None)
    for segment, to, (_, _, s) in zip(segments, by_b, adapters, strict=True):
        if to is not None:
            products.reduce(to.t(), h, grad, rows, segment, s)
    if by_x is None and not any(to is not None for to in by_a):
        return
    by_h = torch.empty_like(h)
    up, down = [b for _, b, _ in adapters], [(by_h, a, s) for a, _, s in adapters]
    together = by_x is not None and threshold == ALL
    if not together:
        products.shrink(by_h, grad, rows, segments, up)
    if by_x is not None:
        factors = up if together else ()
        products.product(by_x, grad, weight, rows, segments, down, None, drop, factors)
    for segment, to, (_, _, s) in zip(segments, by_a, adapters, strict=True):
        if to is not None:
            products.reduce(to, by_h, x, rows, segment, s, drop)


def _torch_is_faster(x: torch.Tensor, threshold: int) -> bool:
    return x.dtype == torch.float32 and threshold == ALL


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product x W^T reads W as it lies, for fewer rows than torch's library wants."""
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return False
    return x.shape[0] <= FLOAT_ROWS


def _stored(weight: torch.Tensor, adapters: Sequence[Adapter]) -> tuple[torch.Tensor, Sequence[Adapter]]:
    """Kernels read what is in memory, of any strides, and a negated view is not."""
    return weight.resolve_neg(), [(a.resolve_neg(), b.resolve_neg(), s) for a, b, s in adapters]


def _sorted(index: torch.Tensor | None, adapters: int, m: int) -> tuple[torch.Tensor | None, Segments]:
    """The rows in the order of their adapters (None: as they are), and each adapter's stretch of them."""
    if index is None:
        return None, [(0, m)]
    counts = torch.bincount(index + 1, minlength=adapters + 1)
    ends = counts.cumsum(0).tolist()
    return torch.argsort(index, stable=True), list(pairwise(ends))
