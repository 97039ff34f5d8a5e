"""The Two-Pass Softmax Algorithm (Dukhan and Ablavatski, 2020, arXiv:2001.04438), as published.

No backend runs this: it stands here to show where the published kernel is no drop-in for ``torch.softmax``
(+inf in a row, rows of finfo.min, logits past 2**22, float32 sums over long rows).
"""

from __future__ import annotations

import math

import torch

LANES = 16
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693147182464599609375, -1.904654290582768e-9
"""ln 2 rounded to float32, and what is missing."""
POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1", "0x1p0")
)
"""The published coefficients of e**t for |t| <= ln(2) / 2, the highest degree first."""


def two_pass_softmax(x: torch.Tensor) -> torch.Tensor:
    """x [rows, n] float32 -> softmax over n, float32, with float32 pairs (m, e) for m * 2**e throughout.

    Sixteen lanes sum every sixteenth element; a tail is filled with -inf.
    """
    m, e = _pair(x)
    total, power = _sum(m, e)
    return _scale(m * (1 / total), e - power)


def _pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e**x as (m, e): range reduction in two steps, then the polynomial, all by fused operations."""
    e = (x * torch.tensor(LOG2_E)).round()
    t = _fma(e, -LN2_HIGH, x)
    t = _fma(e, -LN2_LOW, t)
    m = torch.full_like(x, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        m = _fma(m, t, coefficient)
    return m, e


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """a * b + c of float32 numbers: the product is exact in float64."""
    wide = a.double() * b + c
    return wide.to(torch.float32)


def _sum(m: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of pairs [rows, n] as one pair [rows, 1]: lane by lane, then over the lanes."""
    short = -m.shape[1] % LANES
    m = torch.nn.functional.pad(m, (0, short)).view(len(m), -1, LANES)
    e = torch.nn.functional.pad(e, (0, short), value=-math.inf).view(len(e), -1, LANES)
    total, power = m[:, 0], e[:, 0]
    for i in range(1, m.shape[1]):
        most = torch.maximum(power, e[:, i])
        total = _scale(m[:, i], e[:, i] - most) + _scale(total, power - most)
        power = most
    most = power.amax(1, keepdim=True)
    return _scale(total, power - most).sum(1, keepdim=True), most


def _scale(m: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """m * 2**e as VSCALEFPS has it: e of -inf gives 0 and e of +inf gives inf, even for a NaN in m."""
    scaled = (m.double() * e.double().clamp(-1000, 1000).exp2()).to(torch.float32)
    scaled = scaled.where(e != -math.inf, 0.0)
    return scaled.where((e != math.inf) | ~m.isnan(), math.inf)
