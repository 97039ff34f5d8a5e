"""What other projects do in LoRA's linear layers, written as plain torch after their descriptions.

x [M, K], weight [N, K], A [r, K], B [N, r] of one dtype; each function returns y [M, N] and has gradients,
but for vLLM's, which serves only. The kernels of those projects save launches beyond what stands here; the
passes over memory are theirs, where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear, pad

Tensor = torch.Tensor


def addmm(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """The frozen product, and the adapter added to it in place: the obvious best of torch without kernels."""
    low = linear(torch.dropout(x, dropout, True) if dropout else x, A)
    return linear(x, weight).addmm_(low, B.t(), alpha=scaling)


def peft(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """What PEFT's Linear.forward computes (peft/tuners/lora/layer.py), without its modules."""
    low = torch.dropout(x, dropout, True) if dropout else x
    return linear(x, weight) + linear(linear(low, A), B) * scaling


class _Unsloth(torch.autograd.Function):
    """``LoRA_W`` of unsloth/kernels/fast_lora.py: nothing but x is kept, h and dY B are computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling = scaling
        y = x @ weight.t()
        if x.shape[0] == 1:  # as its decoding does: two products with a vector
            y[0].addmv_(B, torch.mv(A, x[0]), alpha=scaling)
            return y
        return y.addmm_(x @ A.t(), B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight, A, B = ctx.saved_tensors
        by_a = torch.mm((grad @ B).t(), x).mul_(ctx.scaling)
        by_b = torch.mm(grad.t(), x @ A.t()).mul_(ctx.scaling)
        by_x = torch.mm(grad, weight).addmm_(grad @ B, A, alpha=ctx.scaling)
        return by_x, None, by_a, by_b, None


def unsloth(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Unsloth's scheme (unsloth/kernels/fast_lora.py and utils.py); it has none with dropout."""
    result: Tensor = _Unsloth.apply(x, weight, A, B, scaling)
    return result


class _LoraFusion(torch.autograd.Function):
    """lorafusion/ops/lora_v1.py: what is dropped out of x and a mask of a byte per element are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        low = dropped @ A.t()
        ctx.save_for_backward(dropped, mask, low, weight, A, B)
        ctx.scaling, ctx.dropout = s, p
        return torch.mm(low, (B * s).t()).addmm_(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        dropped, mask, low, weight, A, B = ctx.saved_tensors
        by_b = torch.mm(grad.t(), low).mul_(ctx.scaling)
        by_low = torch.mm(grad, B).mul_(ctx.scaling)
        by_a = torch.mm(by_low.t(), dropped)
        by_x = torch.mm(by_low, A)
        if mask is not None:
            by_x.mul_(mask).div_(1 - ctx.dropout)
        return by_x.addmm_(grad, weight), None, by_a, by_b, None, None


def lorafusion(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """LoRAFusion's scheme (Zhu et al., 2026, section 4): the graph is split at h, all else is fused.

    Its products start from the adapter's part, which is an addition in place here.
    """
    result: Tensor = _LoraFusion.apply(x, weight, A, B, scaling, dropout)
    return result


def vllm(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """vLLM's lora_shrink and lora_expand (vllm/lora/ops/triton_ops): h in float32, y read again."""
    low = torch.zeros(x.shape[0], A.shape[0], dtype=torch.float32, device=x.device)
    low += x @ A.t()
    return linear(x, weight).addmm_(low.to(x.dtype), B.t(), alpha=scaling)


def stacked(adapters: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """A [n, R, K] and s B [n, N, R] of many adapters, filled with zeros up to the largest rank R."""
    most = max(a.A.shape[0] for a in adapters)
    A = torch.stack([pad(a.A, (0, 0, 0, most - a.A.shape[0])) for a in adapters])
    B = torch.stack([pad(a.B * a.scaling, (0, most - a.B.shape[1])) for a in adapters])
    return A, B


def vllm_grouped(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor) -> Tensor:
    """bgmv of vllm/lora/ops/torch_ops/lora_ops.py on :func:`stacked` adapters: each row gathers its own.

    The gathered copies are passes that vLLM's kernels for a GPU do not make.
    """
    low = torch.einsum("mk,mrk->mr", x, A[index])
    return linear(x, weight).add_(torch.einsum("mr,mnr->mn", low, B[index]))
