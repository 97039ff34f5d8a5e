"""The one error bound of every merge, derived from the order of operations that ``csrc/math`` fixes.

A compiled merge of n models computes, in float32 and in this order,

    v_i = w_i * d_i;  s = v_1 + ... + v_n;  q = s / den;  p = lambda * q;  r = base + p;  out = round(r)

where d_i, w_i, den and lambda are the same float32 numbers in the reference, which keeps s, q, p and r in
float64. Every operation errs by a factor (1 + e), |e| <= u = 2**-24, and, where a product or quotient is
subnormal, by at most eta = 2**-150 more (sums of floats are exact there). A term w_i * d_i passes 1
product, n - 1 sums (the sum with the starting zero is exact), 1 quotient, 1 product with lambda and 1 sum
with the base: n + 3 roundings. So

    |r - truth| <= g * M + A,  g = (n + 3) u / (1 - (n + 3) u),
    M = |base| + |lambda| * T / |den|,  T = sum of |w_i d_i| over the terms that are added up,
    A = 2 eta * (1 + |lambda| + n |lambda / den|),

the factor 2 in A taking up the later (1 + e). The last rounding adds half a unit in the last place of the
output dtype at |truth| + g M + A, or nothing for float32 and wider, since r is a float32. A linear merge
has no quotient and no lambda: the same formula with den = lambda = 1, a little generous.

NaN must be where the truth has it, and Inf with its sign. An output dtype's overflow to Inf is right where
the truth lies, within the bound, at or past the midpoint above the largest finite number. Where T, T /
|den| or M could pass the largest float32 though the truth is finite, an intermediate result may overflow:
the element is free.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pykernels.ref.consensus import agreeing, divisor, scaled

U = 2.0**-24
ETA = 2.0**-150
PRECISION = {torch.float16: (11, -14), torch.bfloat16: (8, -126)}  # significant bits, least normal exponent
LARGEST = torch.finfo(torch.float32).max


class Terms(NamedTuple):
    """What the bound needs of a merge: |base|, T and |den| per element (float64), |lambda| and n."""

    base: torch.Tensor | float
    total: torch.Tensor
    divisor: torch.Tensor | float
    lambda_: float
    models: int


def linear_terms(base, deltas, weight) -> Terms:
    """Terms of base + sum(weight * delta); ``deltas`` float32."""
    total = sum(abs(w) * d.double().abs() for w, d in zip(weight, deltas, strict=True))
    return Terms(0.0 if base is None else base.double().abs(), total, 1.0, 1.0, len(deltas))


def consensus_terms(base, deltas, weight, vote, share, lambda_, elect) -> Terms:
    """Terms of base + lambda * consensus; ``deltas`` float32, 0 where trimmed or dropped."""
    if elect is None:
        terms = linear_terms(base, deltas, weight)
        return terms._replace(lambda_=abs(lambda_))
    values = scaled(deltas, weight)
    agree = agreeing(values if vote is None else scaled(deltas, vote))
    total = sum(torch.where(a, v, 0.0).double().abs() for v, a in zip(values, agree, strict=True))
    den = divisor(agree, share, deltas[0]).double().abs()
    return Terms(0.0 if base is None else base.double().abs(), total, den, abs(lambda_), len(deltas))


def half_ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of ``dtype`` at ``magnitude`` (float64); 0 for float32 and wider."""
    if dtype not in PRECISION:
        return torch.zeros_like(magnitude)
    bits, least = PRECISION[dtype]
    exponent = torch.frexp(magnitude).exponent - 1
    return torch.ldexp(torch.ones_like(magnitude), exponent.clamp(min=least) - bits)


def tolerance(truth: torch.Tensor, terms: Terms, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest allowed |out - truth|, where an intermediate result may overflow), for finite ``truth``."""
    roundings = terms.models + 3
    g = roundings * U / (1 - roundings * U)
    m = terms.base + terms.lambda_ * terms.total / terms.divisor
    a = 2 * ETA * (1 + terms.lambda_ + terms.models * terms.lambda_ / terms.divisor)
    arithmetic = g * m + a
    peak = torch.maximum(torch.maximum(terms.total, terms.total / terms.divisor), m)
    return arithmetic + half_ulp(truth.abs() + arithmetic, dtype), peak * (1 + g) > LARGEST


def assert_within(out: torch.Tensor, truth: torch.Tensor, terms: Terms) -> None:
    """``out`` (any float dtype) must lie within the bound around ``truth`` (float64)."""
    allowed, free = tolerance(truth, terms, out.dtype)
    got, limit = out.double(), torch.finfo(torch.float32 if out.dtype == torch.float64 else out.dtype)
    midpoint = limit.max + float(half_ulp(torch.tensor(limit.max, dtype=torch.float64), out.dtype))
    overflows = got.isinf() & (got.sign() == truth.sign()) & (truth.abs() + allowed >= midpoint)
    same = (got == truth) | (got.isnan() & truth.isnan()) | ((got - truth).abs() <= allowed)
    good = same | overflows | (free & truth.isfinite())
    if not bool(good.all()):
        bad = torch.nonzero(~good.reshape(-1)).reshape(-1)
        rows = [
            f"  [{i}] got {got.reshape(-1)[i]:.9g}, truth {truth.reshape(-1)[i]:.9g}, "
            f"allowed {allowed.reshape(-1)[i]:.3g}"
            for i in bad[:5].tolist()
        ]
        raise AssertionError(f"{len(bad)} of {got.numel()} elements outside the bound:\n" + "\n".join(rows))


def assert_same_specials(out: torch.Tensor, truth: torch.Tensor) -> None:
    """Infinities of a sign and NaN stand where the truth has them."""
    assert torch.equal(out.isnan(), truth.isnan())
    for infinity in (float("inf"), float("-inf")):
        assert torch.equal(out == infinity, truth == infinity)


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal dtype, shape and bits, NaN and the sign of zero included."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = torch.nonzero((got.view(kind) != wanted.view(kind)).reshape(-1)).reshape(-1)
    if len(differ):
        i = int(differ[0])
        raise AssertionError(
            f"{len(differ)} of {got.numel()} elements differ, first at {i}: "
            f"{got.reshape(-1)[i].item()!r} and {wanted.reshape(-1)[i].item()!r}"
        )


DEPTH = 256
"""Terms of a chain in a matrix product of ours (kGemmDepth in csrc/cpu/gemm_jobs.h)."""


def chain(terms: int) -> int:
    """Roundings that a term of a product of ours passes: its chain of multiply-adds, then sums of chains."""
    return min(terms, DEPTH) + -(-terms // DEPTH)


def assert_within_sum(out: torch.Tensor, truth: torch.Tensor, size: torch.Tensor, roundings: int) -> None:
    """A float32 sum, rounded once: its terms pass ``roundings`` roundings and add up to ``size`` in size.

    |sum - truth| <= g size + 2 n eta, with g = n u / (1 - n u): what every order of operations keeps.
    """
    g = roundings * U / (1 - roundings * U)
    room = g * size + roundings * 2 * ETA
    allowed = room + half_ulp(truth.abs() + room, out.dtype)
    off = (out.double() - truth).abs()
    bad = torch.nonzero((~(off <= allowed)).reshape(-1)).reshape(-1)
    if len(bad):
        i = int(bad[0])
        raise AssertionError(
            f"{len(bad)} of {out.numel()} elements outside the bound, first at {i}: off by "
            f"{off.reshape(-1)[i]:.3g} from {truth.reshape(-1)[i]:.9g}, allowed {allowed.reshape(-1)[i]:.3g}"
        )
