"""A frozen linear layer whose rows take different adapters, each of its own rank (Chen et al., 2023, Punica).

Rows are sorted by adapter, so every adapter is read once and pays for its own rank and rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling

from pykernels import check, check_lora, library, memory
from pykernels.ops import lora_pass
from pykernels.ops.lora import LoRA

OP = lora_pass.GROUPED
_LARGE = 2.0**100
"""Scalings below this need no closer look."""


def lora_linear_grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[LoRA],
    index: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row i is x[i] W^T + bias + s_a x[i] A_a^T B_a^T with a = index[i]; -1 is no adapter.

    Args:
        x: tensor [*, in] of any strides: float32, bfloat16, float16, or float64 (through the reference).
        weight: tensor [out, in] of any strides, of x's dtype and device.
        adapters: sequence of :class:`LoRA`: A [r, in] and B [out, r] of x's dtype or float32, each with a
            rank and scaling of its own; without a magnitude.
        index: int64 tensor [*] on x's device, values from -1 to len(adapters) - 1. Not looked at by a graph
            that is being compiled, but by every run of it. On a GPU nobody waits for it: CUDA's kernels make
            rows of other values NaN, and a graph can capture the call, ranks above 512 apart.
        bias: tensor [out] of x's dtype, or None.

    Returns:
        A new tensor [*, out] of x's dtype, differentiable (once) in x, weight, bias and every A and B.

    Raises:
        ValueError, TypeError, NotImplementedError (sparse x): an argument breaks a rule above; the text names
        it and its value.
    """
    if not is_compiling():
        done = lora_pass.everyday_grouped(x, weight, adapters, index, bias)
        if done is not None:
            return done
    check_lora.layer(OP, x, weight, bias)
    given = _examine(x, weight, adapters)
    _examine_index(x, index)
    lora_a, lora_b = [a.A for a in given], [a.B for a in given]
    if not library.needed(x, weight, bias, *lora_a, *lora_b):
        each = [(a.A, a.B, float(a.scaling)) for a in given]
        flat = lora_pass.examined(OP, index, len(given))
        return lora_pass.forward(x, weight, each, flat, bias)[0]
    scaling = library.numbers([a.scaling for a in given])
    return lora_pass.operator(x, weight, lora_a, lora_b, scaling, index.reshape(-1), bias)


def _examine(x: torch.Tensor, weight: torch.Tensor, adapters: Sequence[LoRA]) -> Sequence[LoRA]:
    if isinstance(adapters, torch.Tensor | LoRA) or not isinstance(adapters, Sequence):
        raise TypeError(f"{OP}: adapters must be a sequence of LoRA, got {type(adapters).__name__}")
    for i, adapter in enumerate(adapters):
        if not is_compiling() and _everyday(adapter) and check_lora.fits(x, weight, *adapter[:2]):
            continue
        name = f"adapters[{i}]"
        if not isinstance(adapter, LoRA):
            raise TypeError(f"{OP}: {name} must be a LoRA, got {type(adapter).__name__}")
        check_lora.factors(OP, (f"{name}.A", f"{name}.B"), x, weight, adapter.A, adapter.B)
        if not is_compiling():
            check.number(OP, f"{name}.scaling", adapter.scaling)
        if adapter.magnitude is not None:
            raise ValueError(
                f"{OP}: {name}.magnitude must be None, as rows of DoRA scale the frozen product too: "
                "merge it, or use lora_linear and dora_norm"
            )
    return adapters


def _everyday(adapter: LoRA) -> bool:
    plain = type(adapter) is LoRA and adapter.magnitude is None
    return plain and type(adapter.scaling) is float and abs(adapter.scaling) < _LARGE


def _examine_index(x: torch.Tensor, index: torch.Tensor) -> None:
    if not isinstance(index, torch.Tensor):
        raise TypeError(f"{OP}: index must be a tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{OP}: index must be int64, got {index.dtype}")
    if index.shape != x.shape[:-1]:
        raise ValueError(f"{OP}: index must have shape {list(x.shape[:-1])}, got {list(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"{OP}: index must be on x's device {x.device}, got {index.device}")
    memory.examine(OP, "index", index)
