"""The norms of the rows of an adapted weight, without making it: what DoRA divides by."""

from __future__ import annotations

import torch

from pykernels import backends, check, check_lora

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
    check.matrix(OP, "weight", weight, weight, ["out", "in"])
    if weight.dtype not in check.FLOAT_DTYPES:
        raise TypeError(f"{OP}: weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    check_lora.factors(OP, ("lora_A", "lora_B"), weight, weight, lora_A, lora_B)
    s = check.number(OP, "scaling", scaling)
    with torch.no_grad():
        result: torch.Tensor = backends.call(OP, weight)(weight.resolve_neg(), lora_A, lora_B, s)
        return result
