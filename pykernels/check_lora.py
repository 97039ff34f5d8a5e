"""The words of the errors about low-rank adapters and their layers, and their checks; see check.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pykernels import check, memory


def adapters(op: str, weight: torch.Tensor, given: Sequence[Any], fan_in_fan_out: bool) -> list[float]:
    """One or more LoRA that fit ``weight``, [out, in] (or [in, out]); returns their scalings."""
    check.one_tensor(op, "weight", weight)
    check.choice(op, "fan_in_fan_out", fan_in_fan_out, (True, False))
    if weight.dim() != 2:
        rule = "[in, out]" if fan_in_fan_out else "[out, in]"
        raise ValueError(f"{op}: weight must have shape {rule}, got {list(weight.shape)}")
    rows, columns = reversed(weight.shape) if fan_in_fan_out else weight.shape
    sequence(op, given)
    return [one(op, f"adapters[{i}]", adapter, weight, rows, columns) for i, adapter in enumerate(given)]


def sequence(op: str, given: Sequence[Any]) -> None:
    """``adapters`` must be a sequence of one or more LoRA."""
    if isinstance(given, tuple) and hasattr(given, "scaling"):
        raise TypeError(f"{op}: adapters must be a sequence of LoRA, got one LoRA")
    if isinstance(given, torch.Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"{op}: adapters must be a sequence of LoRA, got {type(given).__name__}")
    if not given:
        raise ValueError(f"{op}: adapters must hold at least one LoRA, got none")
    for i, adapter in enumerate(given):
        if not hasattr(adapter, "scaling"):
            raise TypeError(f"{op}: adapters[{i}] must be a LoRA, got {type(adapter).__name__}")


def one(
    op: str, name: str, adapter: Any, like: torch.Tensor, rows: int, columns: int, first: str = "weight"
) -> float:
    """An adapter of a weight [rows, columns] on ``like``'s device, in a dtype that its own holds."""
    factors = {f"{name}.A": adapter.A, f"{name}.B": adapter.B}
    if adapter.magnitude is not None:
        factors[f"{name}.magnitude"] = adapter.magnitude
    wide = "float32, bfloat16, float16" + (" or float64" if like.dtype == torch.float64 else "")
    for which, tensor in factors.items():
        check.beside(op, which, tensor, like, None, first)
        if tensor.dtype not in check.FLOAT_DTYPES or (tensor.dtype == torch.float64 != like.dtype):
            raise TypeError(f"{op}: {which} must be {wide} beside {like.dtype}, got {tensor.dtype}")
    if adapter.B.dtype != adapter.A.dtype:
        raise TypeError(f"{op}: {name}.B must have A's dtype {adapter.A.dtype}, got {adapter.B.dtype}")
    if adapter.A.dim() != 2 or adapter.A.shape[0] < 1 or adapter.A.shape[1] != columns:
        raise ValueError(f"{op}: {name}.A must have shape [r, {columns}], got {list(adapter.A.shape)}")
    rank = adapter.A.shape[0]
    if adapter.B.dim() != 2 or adapter.B.shape[0] != rows or adapter.B.shape[1] != rank:
        raise ValueError(f"{op}: {name}.B must have shape [{rows}, {rank}], got {list(adapter.B.shape)}")
    if adapter.magnitude is not None and (adapter.magnitude.dim() != 1 or len(adapter.magnitude) != rows):
        raise ValueError(
            f"{op}: {name}.magnitude must have shape [{rows}], got {list(adapter.magnitude.shape)}"
        )
    return check.number(op, f"{name}.scaling", adapter.scaling)


def apart(op: str, out: torch.Tensor, name: str, tensor: torch.Tensor | None) -> None:
    """``out`` must share no memory with a tensor that is read while it is written."""
    if tensor is not None and not check.apart(out, tensor):
        raise ValueError(f"{op}: out must share no memory with {name}")


def finite(op: str, name: str, tensor: torch.Tensor, when: str) -> None:
    """No element may be NaN or infinite."""
    if not tensor.isfinite().all():
        at = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{op}: {name} must be finite {when}, got {tensor[tuple(at)].item()} at {at}")


def alike(op: str, given: Sequence[Any]) -> list[float]:
    """One or more LoRA of one shape, dtype and device, without a magnitude; returns their scalings."""
    sequence(op, given)
    first = given[0]
    for name, tensor, shape in (("A", first.A, "[r, in]"), ("B", first.B, "[out, r]")):
        check.beside(op, f"adapters[0].{name}", tensor, tensor, None)
        if tensor.dtype not in check.FLOAT_DTYPES:
            raise TypeError(
                f"{op}: adapters[0].{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.dim() != 2:
            raise ValueError(f"{op}: adapters[0].{name} must have shape {shape}, got {list(tensor.shape)}")
    for i, adapter in enumerate(given):
        if adapter.magnitude is not None:
            raise ValueError(
                f"{op}: adapters[{i}].magnitude must be None: what a magnitude changes depends on the weight"
            )
    rows, columns, like = len(first.B), first.A.shape[1], first.A
    scaling = [one(op, f"adapters[{i}]", a, like, rows, columns, "adapters[0]") for i, a in enumerate(given)]
    for i, adapter in enumerate(given):
        if adapter.A.dtype != like.dtype:
            raise TypeError(
                f"{op}: adapters[{i}].A must have adapters[0]'s dtype {like.dtype}, got {adapter.A.dtype}"
            )
    return scaling


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
        if type(t) not in memory.PLAIN or t.dtype is not dtype or not t.is_cpu:
            return False
        if t.layout is not torch.strided:
            return False
    n, k = weight.shape if weight.dim() == 2 else (-1, -1)
    return (
        memory.hold((x, weight, *low))
        and x.shape[-1] == k
        and all(
            a.dim() == b.dim() == 2 and a.shape[1] == k and b.shape == (n, a.shape[0]) and a.shape[0] > 0
            for a, b in zip(low[::2], low[1::2], strict=True)
        )
    )
