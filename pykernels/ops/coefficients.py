"""Weights and lambda: numbers, or tensors that stay on the device and are never waited for.

One rule folds them everywhere: weight * scale / divisor in float64, then float32. Tensors go the same way as
numbers, operation by operation, so the bits are the same; whether a tensor is read by the host or by the
kernel depends on the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from pykernels import backends, check
from pykernels.check import is_tensor

Given: TypeAlias = float | Sequence[float] | torch.Tensor
"""A weight as users give it: one number, one per model, or a tensor of either."""
Weights: TypeAlias = Sequence[float] | torch.Tensor
"""One number per model, or a tensor [n] on the device."""
Scalar: TypeAlias = float | torch.Tensor


def weights(op: str, value: Given, like: torch.Tensor, models: int) -> Weights:
    """``weight``, checked: a list, or a tensor [n] where the kernels of ``op`` read such.

    Raises ValueError or TypeError, as :mod:`check` words it.
    """
    if not is_tensor(value):
        return check.per_model(op, "weight", value, models)
    check.coefficient(op, "weight", value, like, models)
    if backends.device_side(op, like):
        return value.detach().expand(models)
    return check.per_model(op, "weight", value.tolist(), models)


def scalar(op: str, name: str, value: Scalar, like: torch.Tensor) -> Scalar:
    """``lambda_``, checked: a float, or a tensor [] where the kernels of ``op`` read such."""
    if not is_tensor(value):
        return check.number(op, name, value)
    check.coefficient(op, name, value, like, None)
    return value.detach() if backends.device_side(op, like) else check.number(op, name, value.item())


def split(op: str, value: Given, models: int) -> tuple[list[float] | None, torch.Tensor | None]:
    """``weight`` as a schema has it: numbers, or a tensor, and None for the other."""
    if is_tensor(value):
        return None, value
    return check.per_model(op, "weight", value, models), None


def split_scalar(op: str, name: str, value: Scalar) -> tuple[float | None, torch.Tensor | None]:
    """``lambda_`` as a schema has it: a number, or a tensor, and None for the other."""
    if is_tensor(value):
        return None, value
    return check.number(op, name, value), None


def examine(op: str, like: torch.Tensor, models: int, weight: Given) -> None:
    """Check ``weight`` without reading a tensor's values."""
    if is_tensor(weight):
        check.coefficient(op, "weight", weight, like, models)
    else:
        check.per_model(op, "weight", weight, models)


def examine_scalar(op: str, name: str, like: torch.Tensor, value: Scalar) -> None:
    """Check ``lambda_`` without reading a tensor's value."""
    if is_tensor(value):
        check.coefficient(op, name, value, like, None)
    else:
        check.number(op, name, value)


def joined(weight: list[float] | None, tensor: torch.Tensor | None) -> Given:
    """What :func:`split` took apart."""
    return (weight or []) if tensor is None else tensor


def joined_scalar(number: float | None, tensor: torch.Tensor | None) -> Scalar:
    """What :func:`split_scalar` took apart."""
    return (1.0 if number is None else number) if tensor is None else tensor


def taking(weight: Weights) -> Sequence[int]:
    """The models that take part: those of weight 0 do not, and kernels see to it where a tensor says so."""
    if is_tensor(weight) or 0 not in weight:
        return range(len(weight))
    return [i for i, w in enumerate(weight) if w != 0]


def partaking(tuned: Sequence[torch.Tensor], weight: Weights) -> tuple[Sequence[torch.Tensor], Weights]:
    """The models that take part, and their weights."""
    part = taking(weight)
    return (tuned, weight) if len(part) == len(tuned) else ([tuned[i] for i in part], pick(weight, part))


def pick(weight: Weights, models: Sequence[int]) -> Weights:
    """The weights of some models; a tensor's are all picked."""
    return weight if len(models) == len(weight) else [float(weight[i]) for i in models]


def narrow(value: Weights) -> Weights:
    """As kernels take it: numbers as they are, a tensor [n] in contiguous float32."""
    return marked(value.to(torch.float32), value) if is_tensor(value) else value


def marked(weight: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """float32 weights [n] as kernels read them: +0 for a model that was ``given`` weight 0 and takes no part.

    One that takes part may have become 0 on the way (lambda 0, underflow): it gets -0, and its NaN counts.
    """
    none = torch.zeros_like(weight)
    return torch.where(given == 0, none, torch.where(weight == 0, -none, weight))


def narrow_scalar(value: Scalar) -> Scalar:
    """As kernels take it: a number as it is, a tensor [] in float32."""
    return value.to(torch.float32) if is_tensor(value) else value


def fold(weight: Weights, scale: list[float] | Scalar, total: Scalar, like: torch.Tensor) -> Weights:
    """weight * scale / total per model: numbers, or a float32 tensor when any of them is a tensor."""
    if not (is_tensor(weight) or is_tensor(scale) or is_tensor(total)):
        if isinstance(scale, list):
            return [w * s / total for w, s in zip(weight, scale, strict=True)]
        return [w * scale / total for w in weight]
    # Tensor by tensor: CUDA divides by a number by multiplying with its reciprocal.
    given = wide(weight, like)
    return marked((given * wide(scale, like) / wide(total, like)).to(torch.float32), given)


def wide(value: Weights | Scalar, like: torch.Tensor) -> torch.Tensor:
    """float64 on the device of ``like``; numbers get there as arguments of fills, which nobody waits for."""
    if is_tensor(value):
        return value.to(torch.float64)
    if isinstance(value, float | int):
        return torch.full((), value, dtype=torch.float64, device=like.device)
    return torch.stack([wide(float(v), like) for v in value])


def divisor(weight: Weights) -> Scalar:
    """The sum of the weights, exactly 0 becoming 1."""
    if is_tensor(weight):
        summed = sum_of(weight)
        return summed.where(summed != 0, 1.0)
    total, size = 0.0, 0.0  # a loop, as sum() compensates from Python 3.12 on
    for w in weight:
        total += w
        size += abs(w)
    if abs(total) > 1e-5 * size:
        return total
    short = np.float32(0)
    for w in weight:
        short += np.float32(w)
    return float(short) or 1.0


def sum_of(weight: torch.Tensor) -> torch.Tensor:
    """The sum of the weights [n] from the first to the last, float64 [].

    Where the weights nearly cancel it is their float32 sum, as kernels add shares: so a sum is exactly 0 for
    both or for neither. 64 float32 additions are not off by 1e-5 of the weights' size.
    """
    both = torch.stack([weight.to(torch.float64), weight.to(torch.float64).abs()])
    total, short = both.new_zeros(2), weight.new_zeros((), dtype=torch.float32)
    for pair, w in zip(both.unbind(1), weight.to(torch.float32).unbind(), strict=True):
        total = total + pair
        short = short + w
    return torch.where(total[0].abs() > 1e-5 * total[1], total[0], short.to(torch.float64))
