"""e^x = p * 2^n over tiles of rows, as in csrc/math/exp.h: lifted exponentials, their exact sums, the last
rounding.

A number e^z stands as w = p * 2^(n - E + 44), E the row's one exponent, and sums count whole units of
2^(E - 44) in 64-bit integers. Integers add up to the same number in every order, so the bits of a sum depend
on neither the layout of a tile nor what else a program holds.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

LOG2E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e43p-1"))
LN2_LOW = tl.constexpr(float.fromhex("-0x1.05c61p-29"))
LN2 = tl.constexpr(0.6931471805599453)
ROUND = tl.constexpr(float.fromhex("0x1.8p+23"))
"""Added to a float32, it rounds to an integer, which then stands in the low bits."""
WIDE_ROUND = tl.constexpr(float.fromhex("0x1.8p+52"))
EXP6 = tl.constexpr(
    tuple(
        float.fromhex(c)
        for c in (
            "0x1p+0",
            "0x1.fffffap-2",
            "0x1.555474p-3",
            "0x1.5559d4p-5",
            "0x1.124fd2p-7",
            "0x1.69d018p-10",
        )
    )
)
EXP4 = tl.constexpr(
    tuple(float.fromhex(c) for c in ("0x1.fffaf8p-1", "0x1.00049cp-1", "0x1.57ffaep-3", "0x1.53f988p-5"))
)
MINUS1 = tl.constexpr(
    tuple(
        float.fromhex(c)
        for c in (
            "0x1.fffffffff2d15p-1",
            "0x1.0000000023ea6p-1",
            "0x1.5555558888fbep-3",
            "0x1.555554d9dc3edp-5",
            "0x1.111095211c8b1p-7",
            "0x1.6c17745467634p-10",
            "0x1.a1995e85de76fp-13",
            "0x1.a019e50fe09ccp-16",
        )
    )
)
"""Printed by csrc/math/fit_exp.py."""

LARGEST = tl.constexpr(1e6)
"""Past this, x * log2(e) rounds to the wrong integer too often: such rows are shifted by their largest z."""
MOST_TERMS = 1 << 17
"""Terms whose sum fits 63 bits: 1.42 * 2^44 * 2^17."""
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once. The interpreter's own rounds the product first."""
    if INTERPRETED:
        result = (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        result = tl.fma(a, b, c)
    return result


@triton.jit
def larger(a, b):
    """The larger; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(z):
    """[LINES, N] -> [LINES]: the largest, NaN if one is."""
    if INTERPRETED:
        nan = tl.sum((z != z).to(tl.int32), 1) > 0
        most = tl.where(nan, INFINITY - INFINITY, tl.max(tl.where(z != z, -INFINITY, z), 1))
    else:
        most = tl.reduce(z, 1, larger)
    return most


@triton.jit
def nearest_exponent(x):
    """The integer next to x * log2(e), x taken for +-LARGEST beyond; int32."""
    near = tl.where(x > LARGEST, LARGEST, tl.where(x > -LARGEST, x, -LARGEST))
    return (fma(near, LOG2E, ROUND) - ROUND).to(tl.int32)


@triton.jit
def in_range(most):
    """Whether a row's exponent may come from its largest z as it is; NaN: no."""
    return (most > -LARGEST) & (most < LARGEST)


@triton.jit
def finite(x):
    """Whether x is a number and not infinite."""
    return x - x == 0


@triton.jit
def reference(most):
    """(shift, E) of rows by their largest z: e^z is worked out as e^(z - shift), in units of 2^E."""
    within = in_range(most)
    shift = tl.where(within, 0.0, tl.where(finite(most), most, 0.0))
    return shift, tl.where(within, nearest_exponent(most), 0)


@triton.jit
def lifted_exp(z, exponent, DEGREE: tl.constexpr):
    """w = e^z * 2^(44 - E). What is below 2^(E - 152) is taken for that: it rounds to 0, no sum can tell."""
    low = (exponent - 152).to(tl.float32) * LN2
    magic = (171 - exponent).to(tl.float32) + ROUND
    x = larger(z, low)
    r = fma(x, LOG2E, magic)
    n = r - magic
    t = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    C: tl.constexpr = EXP6 if DEGREE == 6 else EXP4
    p = fma(t, C[DEGREE - 1], C[DEGREE - 2])
    for k in tl.static_range(DEGREE - 2):
        p = fma(p, t, C[DEGREE - 3 - k])
    p = fma(p, t, 1.0)
    return p * (r.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(total):
    """1 / total of a positive float64, as float32 but for its last bit."""
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    near = tl.div_rn(1.0, high)
    return fma(fma(-high, near, 1.0) - low * near, near, near)


@triton.jit
def capped(x, cap):
    """c * tanh(x / c) in float64, rounded once: e^2u - 1 = 2^n (e^t - 1) + (2^n - 1) loses no digits at 0."""
    u = x.to(tl.float64) / cap
    size = tl.abs(u)
    v = 2 * tl.where(size > 15, 15.0, size)
    r = v * 1.4426950408889634 + WIDE_ROUND
    t = v - (r - WIDE_ROUND) * LN2
    power = ((r.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    q = t * 0 + MINUS1[7]
    for k in tl.static_range(7):
        q = q * t + MINUS1[6 - k]
    less_1 = power * (t * q) + (power - 1)
    y = less_1 / (less_1 + 2)
    return (tl.where(u < 0, -y, y) * cap).to(tl.float32)


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """float32 -> bits of DTYPE, to nearest even, any NaN the canonical one."""
    nan = value != value
    if DTYPE == tl.float32:
        bits = tl.where(nan, 0x7FC00000, value.to(tl.uint32, bitcast=True))
    elif DTYPE == tl.float16:
        bits = tl.where(nan, 0x7E00, value.to(tl.float16).to(tl.uint16, bitcast=True)).to(tl.uint16)
    elif INTERPRETED:  # whose cast to bfloat16 truncates
        wide = value.to(tl.uint32, bitcast=True)
        bits = tl.where(nan, 0x7FC0, (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        bits = tl.where(nan, 0x7FC0, value.to(tl.bfloat16).to(tl.uint16, bitcast=True)).to(tl.uint16)
    return bits
