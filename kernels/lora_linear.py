"""LoRA's linear layers in Triton: shrink, one product that starts from the adapter's term, and reductions.

Forward: two launches, one of them small; backward: dh, dX in one product, and two launches for each of dA and
dB. What is dropped is drawn anew wherever it is wanted. Deterministic: every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels.kernels.lora_product import product
from pykernels.kernels.lora_reduce import reduce
from pykernels.kernels.lora_rows import FACTOR_A, FACTOR_B, Adapter, Gradients, factors_of, sort_rows
from pykernels.kernels.lora_shrink import DROPS_NOTHING, shrink

KEEPS_ALL = (DROPS_NOTHING, 0)
MOST_ROWS = 2**31 - 1
"""Kernels number rows in 32 bits (``lora_rows.rows_at``); a result of so many would rarely fit a device."""


def lora_linear(
    out: torch.Tensor,
    h: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    index: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: int = DROPS_NOTHING,
    key: int = 0,
) -> None:
    """out [M, N] = x [M, K] W^T + s h B^T + bias, and h [M, ranks] = (x without what is dropped) A^T.

    Rows whose index names no adapter and is not -1 become NaN. Raises ValueError for more than MOST_ROWS.
    """
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"lora_linear: x must have at most {MOST_ROWS} rows in Triton, got {x.shape[0]}")
    rows, factors = sort_rows(index), factors_of(adapters, index)
    shrink(h, x, rows, factors, FACTOR_A, (threshold, _signed(key)))
    bias = None if bias is None else bias.resolve_neg().contiguous()
    product(out, x, weight.resolve_neg().t(), h, rows, factors, FACTOR_B, bias, KEEPS_ALL)


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
    threshold: int = DROPS_NOTHING,
    key: int = 0,
) -> None:
    """Fills the gradients that are asked for, contiguous ones. Rows without an adapter add nothing."""
    if by_weight is not None:
        torch.mm(grad.t(), x, out=by_weight)
    to_a, to_b = _like_factors(by_a, adapters), _like_factors(by_b, adapters)
    rows, factors = sort_rows(index), factors_of(adapters, index, to_a, to_b)
    starts = None
    if rows.ids is not None:
        starts = torch.searchsorted(rows.ids, torch.arange(len(adapters) + 1, device=x.device))
    drop = (threshold, _signed(key))
    reduce(to_b, h, grad, rows, starts, factors, FACTOR_B, KEEPS_ALL)
    if by_x is not None or any(to is not None for to in by_a):
        by_h = torch.empty_like(h)
        shrink(by_h, grad, rows, factors, FACTOR_B, KEEPS_ALL)
        reduce(to_a, by_h, x, rows, starts, factors, FACTOR_A, drop)
        if by_x is not None:
            product(by_x, grad, weight.resolve_neg(), by_h, rows, factors, FACTOR_A, None, drop)
    for wanted, found in zip([*by_a, *by_b], [*to_a, *to_b], strict=True):
        if wanted is not None and found is not None and wanted is not found:
            wanted.copy_(found)


def _like_factors(targets: Gradients, adapters: Sequence[Adapter]) -> list[torch.Tensor | None]:
    """Where adapters differ in dtype, all are worked on in float32, and so are their gradients."""
    mixed = len({a.dtype for a, _, _ in adapters}) > 1
    return [t if t is None or not mixed else torch.empty_like(t, dtype=torch.float32) for t in targets]


def _signed(key: int) -> int:
    return key - (1 << 64) if key >= 1 << 63 else key
