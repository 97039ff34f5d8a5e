"""The norms of the rows of an adapted weight, without making it: what DoRA divides by."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from pykernels import backends, check, check_lora, library

OP = "dora_norm"


def dora_norm(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The norms of the rows of W + s B A (Liu et al., 2024, section 4): what DoRA's m is divided by.

    W is read once. CUDA's kernel adds up squares of elements in float64; elsewhere the norm comes from
    ||W_i||^2 + 2 s <(W A^T)_i, B_i> + s^2 B_i (A A^T) B_i^T by torch's products in float32. As frozen weights
    do not change, an inference server keeps the result. A layer with magnitude m is then, norm and m being
    [out],

        ``lora_linear(x, weight, lora_A, lora_B, scaling=s, bias=bias, column_scale=m / norm)``

    and training as PEFT has it treats the norm as a constant.

    Args:
        weight: tensor [out, in]: float32, bfloat16, float16 or float64.
        lora_A: tensor [r, in] of weight's dtype or float32.
        lora_B: tensor [out, r] of lora_A's dtype.
        scaling: the adapter's s.

    Returns:
        A new tensor [out], float32 (float64 for a float64 weight), without a gradient.

    Raises:
        ValueError, TypeError, NotImplementedError (sparse weight): an argument breaks a rule above.
    """
    weight, lora_A, lora_B = (library.constant(t) for t in (weight, lora_A, lora_B))
    if not library.needed(weight, lora_A, lora_B):
        _examine(weight, lora_A, lora_B)
        return _norm(weight, lora_A, lora_B, check.number(OP, "scaling", scaling))
    if not is_compiling():
        scaling = check.number(OP, "scaling", scaling)
    return library.call(OP, None, weight, lora_A, lora_B, library.numbers([scaling]))


def _examine(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
    check.matrix(OP, "weight", weight, weight, ["out", "in"])
    if weight.dtype not in check.FLOAT_DTYPES:
        raise TypeError(f"{OP}: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    check_lora.factors(OP, ("lora_A", "lora_B"), weight, weight, lora_A, lora_B)


def _norm(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = backends.call(OP, weight)(weight.resolve_neg(), lora_A, lora_B, scaling)
        return result


def _run(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    _examine(weight, lora_A, lora_B)
    return _norm(weight, lora_A, lora_B, float(scaling))


def _fake(
    weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: torch.Tensor
) -> torch.Tensor:
    _examine(weight, lora_A, lora_B)
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(weight.shape[0], dtype=kind)


library.define(OP, "Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling", _run, _fake, out=False)
