"""Adapters to test with, and the bound on what a merge of them may be off by.

A compiled merge computes every element in float32: each element of the scaled factor is rounded once, R
products are added to 0 one after another by fused operations, and one more adds the weight, times its scale
(a float32 too) behind a magnitude. So a term passes at most R + 3 roundings, |e| <= u = 2**-24 each:

    |r - truth| <= g * M,  g = (R + 3) u / (1 - (R + 3) u),  M = |c W| + sum |c_i s_i B_i| @ |A_i|

where c are products of the magnitudes' factors. A factor m / norm is off by what the norm is: its elements by
(r + 2) u of |W| + |s B| @ |A|, so the norm by no more than that matrix' norm times as much; the sums of
squares in float64 add nothing that counts. Rounding to a half adds half a unit in the last place.

Tensor cores multiply 16 ranks at a time, in parts of the numbers where those have more than eight bits; the
sum of 16 is scaled and added to what came before by one fused operation, so that no term passes more
roundings than above. What a product of parts cuts off is at most CUT of the largest of what it adds, no more
than |B| @ |A| of these ranks, as parts have the sign of their number; so a chain of such products, and the
parts that are left out, lose at most :func:`cut_of` of |B| @ |A|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pykernels import LoRA
from pykernels.ref.merge_lora import merged
from tests.bounds import U, half_ulp

CUT, LEFT_OUT = 11 * 2.0**-23, 1.01 * 2.0**-21
"""As ``kCut`` and ``kLeftOut`` in csrc/cuda/mma.h."""
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bf16 a number is."""


def cut_of(adapters: Sequence[LoRA]) -> float:
    """What tensor cores lose of |B| @ |A|, of the adapter that loses most."""
    most = 0.0
    for a in adapters:
        left, right = PARTS[a.B.dtype], PARTS[a.A.dtype]
        pairs = sum(i + j <= 2 for i in range(left) for j in range(right))
        if a.A.dtype == a.B.dtype == torch.float16:
            pairs = 1
        chain = (1 + CUT) ** pairs - 1
        most = max(most, chain + (LEFT_OUT if left + right > 4 else 0.0))
    return most


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    """Normal numbers, the same for the same arguments."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def adapter(out: int, into: int, rank: int, seed: int, *, dora: bool = False, dtype=torch.float32) -> LoRA:
    """An adapter of about a tenth of the weight that :func:`weight` gives, its scaling no power of two."""
    A = random(rank, into, seed=seed, dtype=dtype)
    B = random(out, rank, seed=seed + 1, dtype=dtype, size=0.002)
    magnitude = random(out, seed=seed + 2).abs() + 0.5 if dora else None
    return LoRA(A, B, 0.7 + 0.1 * (seed % 5), magnitude)


def weight(out: int, into: int, dtype: torch.dtype, *, fan_in_fan_out: bool = False) -> torch.Tensor:
    """[out, in], or turned."""
    w = random(out, into, seed=99, dtype=dtype, size=0.02)
    return w.t().contiguous() if fan_in_fan_out else w


def split(adapters: Sequence[LoRA]) -> tuple[list, list, list, list]:
    """As the rows of backends take adapters."""
    return tuple(list(part) for part in zip(*adapters, strict=True))


def truth(w: torch.Tensor, adapters: Sequence[LoRA], fan_in_fan_out: bool = False) -> torch.Tensor:
    """The merged weight, float64."""
    if fan_in_fan_out:
        return merged(w.t(), *split(adapters)).t()
    return merged(w, *split(adapters))


def bound(
    w: torch.Tensor,
    adapters: Sequence[LoRA],
    dtype: torch.dtype,
    fan_in_fan_out: bool = False,
    cut: float = 0.0,
):
    """Largest allowed |out - truth|; ``cut``: what products lose besides, of |B| @ |A|."""
    if fan_in_fan_out:
        w = w.t()
    start = w.double()
    size, lost = start.abs(), torch.zeros_like(start)
    doubt = torch.zeros(len(w), 1, dtype=torch.float64)
    for a in adapters:
        delta = a.scaling * (a.B.double() @ a.A.double())
        most = abs(a.scaling) * (a.B.double().abs() @ a.A.double().abs())
        size, lost = size + most, lost + cut * most
        if a.magnitude is not None:
            norm = torch.linalg.vector_norm(start + delta, dim=1)
            factor = (a.magnitude.double().abs() / norm)[:, None]
            size, lost = size * factor, lost * factor
            spread = torch.linalg.vector_norm(start.abs() + most, dim=1) / norm
            doubt = doubt + (((len(a.A) + 3) * U + cut) * spread)[:, None]
    roundings = sum(len(a.A) for a in adapters) + 3
    allowed = (roundings * U / (1 - roundings * U) + doubt) * size + lost
    if fan_in_fan_out:
        allowed = allowed.t()
    exact = truth(w.t() if fan_in_fan_out else w, adapters, fan_in_fan_out)
    return allowed + half_ulp(exact.abs() + allowed, dtype)


def assert_merged(
    out: torch.Tensor,
    w: torch.Tensor,
    adapters: Sequence[LoRA],
    fan_in_fan_out: bool = False,
    cut: float = 0.0,
):
    """``out`` must be within the bound."""
    off = (out.double() - truth(w, adapters, fan_in_fan_out)).abs()
    allowed = bound(w, adapters, out.dtype, fan_in_fan_out, cut)
    assert bool((off <= allowed).all()), f"{float((off / allowed).max()):.2f} times the bound"
