"""A frozen linear layer with one low-rank adapter, forward and backward in the fewest passes."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from pykernels import check, check_lora, library
from pykernels.ops import lora_pass
from pykernels.ops.draws import rescale_factor

OP = "lora_linear"


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    column_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias + scaling * dropout(x) A^T B^T (Hu et al., 2021, section 4.1), as PEFT's layers have it.

    With ``column_scale`` all but the bias is multiplied by it. DoRA (Liu et al., 2024, section 4) of m [out]
    is ``column_scale=m / dora_norm(weight, lora_A, lora_B, scaling)``, which inference keeps. Where PEFT
    trains DoRA it drops from the frozen product too; here only the adapter's branch drops.

    On a CPU 16-bit inputs are computed in float32 throughout and rounded once, and no bit depends on threads;
    float32 inputs of many rows go to torch's product, whose bits may. Which elements dropout keeps is drawn
    by Philox from the seed and the element's place in x, alike on every backend, and drawn again for the
    gradient: neither a mask nor a copy of x is kept.

    Args:
        x: tensor [*, in] of any strides: float32, bfloat16, float16, or float64 (through the reference).
        weight: tensor [out, in] of any strides, of x's dtype and device.
        lora_A: tensor [r, in], of x's dtype or float32.
        lora_B: tensor [out, r] of lora_A's dtype.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: tensor [out] of x's dtype, or None.
        dropout: probability, taken to the nearest 1 / 65536, of an element of x to be dropped on the
            adapter's branch; what is left is divided by 1 - dropout.
        seed: 64-bit seed of what is dropped; None draws one from torch's default generator, so
            ``torch.manual_seed`` decides. A CUDA graph keeps the seed of its capture: every replay drops the
            same elements.
        column_scale: tensor [out] of x's dtype or float32, or None. In the CPU's kernels it costs no pass and
            no rounding, where it is a contiguous float32 tensor, nothing is dropped and no gradient recorded;
            elsewhere it is a product of torch's, rounded once more.

    Returns:
        A new tensor [*, out] of x's dtype, differentiable (once) in all six tensors.

    Raises:
        ValueError, TypeError, NotImplementedError (sparse x): an argument breaks a rule above; the text names
        it and its value.
    """
    traced = is_compiling()
    if not traced:
        if type(dropout) is float and dropout == 0.0:
            done = lora_pass.everyday(x, weight, lora_A, lora_B, scaling, bias, column_scale)
            if done is not None:
                return done
        scaling = check.number(OP, "scaling", scaling)
    if column_scale is not None:
        check_lora.layer(OP, x, weight, bias)
        check.matrix(OP, "column_scale", column_scale, x, [weight.shape[0]], wide=True)
        y = lora_linear(x, weight, lora_A, lora_B, scaling=scaling, dropout=dropout, seed=seed)
        return _scaled(y, column_scale, bias)
    threshold = lora_pass.keeping(OP, dropout)
    if traced or bias is not None or not check_lora.fits(x, weight, lora_A, lora_B):
        check_lora.layer(OP, x, weight, bias)
        check_lora.factors(OP, ("lora_A", "lora_B"), x, weight, lora_A, lora_B)
    scaling = scaling * rescale_factor(threshold, "density")
    drops = threshold < lora_pass.ALL
    if not library.needed(x, weight, lora_A, lora_B, bias):
        key = (_drawn() if seed is None else check.seed(OP, seed)) if drops else 0
        return lora_pass.forward(x, weight, [(lora_A, lora_B, scaling)], None, bias, threshold, key)[0]
    factor = library.numbers([scaling])
    key_tensor = None
    if drops:
        key_tensor = _draw() if seed is None else _written(library.signed(check.seed(OP, seed)))
    return lora_pass.operator(x, weight, [lora_A], [lora_B], factor, None, bias, threshold, key_tensor)


def _scaled(y: torch.Tensor, column_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """column_scale * y + bias in y's dtype: rounded once, and in place where nobody could tell."""
    if bias is not None:
        return torch.addcmul(bias, y, column_scale).to(y.dtype)
    if library.needed(y, column_scale):
        return (y * column_scale).to(y.dtype)
    return y.mul_(column_scale)


def _draw() -> torch.Tensor:
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def _written(seed: int) -> torch.Tensor:
    return torch.full((), seed, dtype=torch.int64, device="cpu")


def _drawn() -> int:
    return int(_draw())
