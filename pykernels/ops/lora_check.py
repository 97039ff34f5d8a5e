"""The boundary of LoRA's linear layers: what x, the frozen layer and an adapter must look like."""

from __future__ import annotations

import torch

from pykernels import check
from pykernels.ops.draws import STEPS


def layer(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """x [*, K] of a float dtype; weight [N, K] and bias [N] of the same dtype and device."""
    if isinstance(x, torch.Tensor) and x.dtype not in check.FLOAT_DTYPES:
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check.row_input(op, x, None)
    if not x.dim():
        raise ValueError(f"{op}: x must have at least one dimension, got shape []")
    check.matrix(op, "weight", weight, x, ["out", x.shape[-1]])
    if bias is not None:
        check.matrix(op, "bias", bias, x, [weight.shape[0]])


def factors(
    op: str, names: tuple[str, str], x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> None:
    """A [r, K] and B [N, r], r at least 1, of one dtype: x's, or float32 as trainers keep them."""
    check.matrix(op, names[0], a, x, ["r", x.shape[-1]], wide=True)
    if not a.shape[0]:
        raise ValueError(f"{op}: {names[0]} must have a rank of at least 1, got shape {list(a.shape)}")
    check.matrix(op, names[1], b, x, [weight.shape[0], a.shape[0]], wide=True)
    if a.dtype != b.dtype:
        raise TypeError(f"{op}: {names[1]} must have {names[0]}'s dtype {a.dtype}, got {b.dtype}")


def fits(x: torch.Tensor, weight: torch.Tensor, *low: torch.Tensor) -> bool:
    """Whether a call is an everyday one: plain CPU tensors of one dtype, adapters A and B that fit.

    Where not, :func:`layer` and :func:`factors` find the words or that all is well; they take longer than a
    small product.
    """
    dtype = x.dtype if type(x) is torch.Tensor and x.is_cpu else None
    if dtype not in check.FLOAT_DTYPES or not x.dim():
        return False
    for t in (x, weight, *low):
        if type(t) not in _KINDS or t.dtype is not dtype or not t.is_cpu or t.layout is not torch.strided:
            return False
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    return x.shape[-1] == k and all(
        a.dim() == b.dim() == 2 and a.shape[1] == k and b.shape == (n, a.shape[0]) and a.shape[0] > 0
        for a, b in zip(low[::2], low[1::2], strict=True)
    )


_KINDS = frozenset({torch.Tensor, torch.nn.Parameter})


def keeping(op: str, dropout: float) -> int:
    """How many of the 65536 values of a draw keep an element."""
    if dropout == 0.0 and type(dropout) is float:
        return STEPS
    p = check.number(op, "dropout", dropout)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: dropout must lie in [0, 1], got {p}")
    return round((1.0 - p) * STEPS)
