"""Low-rank adapters merged into a weight: one read and one write of it, whatever their number and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.compiler import is_compiling

from pykernels import backends, check, check_lora, library
from pykernels.ops.lora import LoRA
from pykernels.ops.lora_pass import everyday_merge
from pykernels.ops.merge_lora_peft import merge_as_peft
from pykernels.uncast import uncast

OP, IN_ORDER = "merge_lora", "merge_in_order"
ROUNDINGS = ("once", "peft")


def merge_lora(
    weight: torch.Tensor,
    adapters: Sequence[LoRA],
    *,
    fan_in_fan_out: bool = False,
    out: torch.Tensor | None = None,
    rounding: str = "once",
) -> torch.Tensor:
    """W + sum of scaling * B @ A over the adapters (Hu et al., 2021, section 4.1).

    An adapter with a magnitude m is DoRA's (Liu et al., 2024, section 4): in the order given, what has been
    merged so far, with this adapter, is multiplied by ``m / ||W + scaling * B @ A||`` per output, the norm
    being that of the unmerged weight with this adapter alone, as PEFT 0.21.2 has it. A norm of 0 divides.

    Args:
        weight: contiguous tensor [out, in]: float32, bfloat16, float16 or float64. Rows may be a part of a
            larger weight, with the same rows of B and magnitude: the bits are the same ("once" alone).
        adapters: one or more; each has its own rank. Tensors of any strides on the weight's device; float64
            only with a weight of float64.
        fan_in_fan_out: the weight is [in, out] and gets ``(B @ A).T``; norms are then those of columns, and
            parts of rows go with the same columns of A, where there is no magnitude.
        out: contiguous tensor of the weight's shape to fill; may be ``weight``. Of the weight's dtype with
            "peft". None where a gradient is asked for.
        rounding: "once": the sum in float32 (float64 with float64), rounded once. "peft": one adapter after
            another, each rounded to the weight's dtype, bit for bit as PEFT 0.21.2 merges on the same torch.

    Returns:
        The merged weight (``out`` where given). Differentiable in ``weight``, A and B unless an adapter has a
        magnitude; roundings pass gradients as they are.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the text names it and its value.
    """
    if not is_compiling():
        done = everyday_merge(weight, adapters, fan_in_fan_out, out, rounding)
        if done is not None:
            return done
    given = list(adapters) if isinstance(adapters, Sequence) else []
    if library.needed(weight, *(t for a in given for t in tensors_of(a))):
        if not is_compiling():
            check_lora.adapters(OP, weight, adapters, fan_in_fan_out)
        if _learned(weight, given):
            check.no_out(OP, out)
        rules = {"fan_in_fan_out": fan_in_fan_out, "rounding": rounding}
        return library.call(OP, out, weight, *_split(given), **rules)
    return _merge(weight, adapters, fan_in_fan_out, out, rounding)


def merge_in_order(
    weight: torch.Tensor, adapters: Sequence[LoRA], *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`merge_lora` without gradients, on CUDA devices too with the bits of the CPU's kernel.

    Raises as it does, and RuntimeError where :func:`serves_in_order` says no.
    """
    return _merge(weight, adapters, False, out, "once", IN_ORDER)


def serves_in_order(device: torch.device) -> bool:
    """Whether :func:`merge_in_order` runs on a device; RuntimeError where a forced backend does not."""
    return backends.find(IN_ORDER, torch.empty(0, device=device)) is not None


def tensors_of(adapter: object) -> list[torch.Tensor]:
    """The tensors of an adapter, or what stands in their place."""
    return [x for x in adapter if isinstance(x, torch.Tensor)] if isinstance(adapter, LoRA) else []


def _learned(weight: torch.Tensor, adapters: Sequence[LoRA]) -> bool:
    """Whether a gradient is asked for; refuses one that nothing here gives."""
    named = {"weight": weight}
    for i, adapter in enumerate(adapters):
        named |= {f"adapters[{i}].A": adapter.A, f"adapters[{i}].B": adapter.B}
        if adapter.magnitude is not None:
            named |= {f"adapters[{i}].magnitude": adapter.magnitude}
    if any(a.magnitude is not None for a in adapters):
        for name, tensor in named.items():
            check.no_gradient(OP, name, tensor)
    return any(map(library.wants_gradient, named.values()))


Split: TypeAlias = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, list[torch.Tensor], list[int]]


def _split(adapters: Sequence[LoRA]) -> Split:
    """A, B, scaling, and the magnitudes with their adapters' numbers: what a schema can say.

    The scalings are a tensor: a list of numbers would be compiled in, each time anew.
    """
    dora = [i for i, a in enumerate(adapters) if a.magnitude is not None]
    magnitude = [a.magnitude for a in adapters if a.magnitude is not None]
    scaling = library.numbers([a.scaling for a in adapters])
    return [a.A for a in adapters], [a.B for a in adapters], scaling, magnitude, dora


def _joined(
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: Sequence[float],
    magnitude: list[torch.Tensor],
    dora: list[int],
) -> list[LoRA]:
    """What :func:`_split` took."""
    of = dict(zip(dora, magnitude, strict=True))
    return [LoRA(a, b, s, of.get(i)) for i, (a, b, s) in enumerate(zip(A, B, scaling, strict=True))]


def _merge(
    weight: torch.Tensor,
    adapters: Sequence[LoRA],
    fan_in_fan_out: bool,
    out: torch.Tensor | None,
    rounding: str,
    row: str = OP,
) -> torch.Tensor:
    scaling = check_lora.adapters(OP, weight, adapters, fan_in_fan_out)
    check.choice(OP, "rounding", rounding, ROUNDINGS)
    out = backends.output(OP, out, weight.dtype if rounding == "peft" else None, weight, [weight])
    for i, adapter in enumerate(adapters):
        for name in ("A", "B", "magnitude"):
            check_lora.apart(OP, out, f"adapters[{i}].{name}", getattr(adapter, name))
    A, B, magnitude = [a.A for a in adapters], [a.B for a in adapters], [a.magnitude for a in adapters]
    if weight.numel():
        run = merge_as_peft if rounding == "peft" else backends.call(row, weight)
        run(out, weight, A, B, scaling, magnitude, fan_in_fan_out)
    return out


def _run(
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: torch.Tensor,
    magnitude: list[torch.Tensor],
    dora: list[int],
    *,
    fan_in_fan_out: bool,
    rounding: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return _merge(weight, _joined(A, B, scaling.tolist(), magnitude, dora), fan_in_fan_out, out, rounding)


def _fake(
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: torch.Tensor,
    magnitude: list[torch.Tensor],
    dora: list[int],
    *,
    fan_in_fan_out: bool,
    rounding: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    shaped = _joined(A, B, [1.0] * len(A), magnitude, dora)  # their values are seen at the call
    check_lora.adapters(OP, weight, shaped, fan_in_fan_out)
    check.choice(OP, "rounding", rounding, ROUNDINGS)
    return library.empty(OP, weight, weight.dtype if rounding == "peft" else None, out)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    _, A, B, scaling, _, _ = inputs
    ctx.save_for_backward(scaling, *A, *B)
    ctx.fan_in_fan_out = keyword_only_inputs["fan_in_fan_out"]


@uncast
def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    """With G the gradient [out, in]: G itself, s * B.T @ G and s * G @ A.T."""
    scaling, *factors = ctx.saved_tensors
    count = len(factors) // 2
    g = grad.t() if ctx.fan_in_fan_out else grad
    wide = g if g.dtype == torch.float64 else g.float()
    by_A, by_B = [], []
    for a, b, s in zip(factors[:count], factors[count:], scaling.unbind(), strict=True):
        by_A.append((s * (b.to(wide.dtype).t() @ wide)).to(a.dtype))
        by_B.append((s * (wide @ a.to(wide.dtype).t())).to(b.dtype))
    return grad, by_A, by_B, None, [], []  # no magnitude where a gradient is asked for


@uncast
def _tangent(
    y: torch.Tensor, primals: Any, tangents: Any, *, fan_in_fan_out: bool, rounding: str
) -> torch.Tensor:
    """The weight's, and s (dB A + B dA) of every adapter."""
    weight, A, B, scaling, magnitude, _ = primals
    by_weight, by_A, by_B, *_ = tangents
    if magnitude:
        library.refuse_tangent(OP)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    found = torch.zeros_like(y, dtype=wide) if by_weight is None else by_weight.to(wide)
    for a, b, s, da, db in zip(A, B, scaling.unbind(), by_A, by_B, strict=True):
        for left, right in ((db, a), (b, da)):
            if left is not None and right is not None:
                delta = s * (left.to(wide) @ right.to(wide))
                found = found + (delta.t() if fan_in_fan_out else delta)
    return found.to(y.dtype)


library.define(
    OP,
    "Tensor weight, Tensor[] A, Tensor[] B, Tensor scaling, Tensor[] magnitude, int[] dora, *, "
    "bool fan_in_fan_out, str rounding",
    _run,
    _fake,
    out=True,
)
library.differentiate(OP, _setup_context, _backward, _tangent)
