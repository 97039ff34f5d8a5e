"""Matrix products of mixed types on tensor cores, at float32's accuracy: operands split into bfloat16 parts.

A bfloat16 is one part, a float16 two, a float32 three: leading bits cut off, not rounded, so nothing
overflows and the parts add up to the number exactly. Of all pairs the terms above 2**-24 of the product are
summed, in float32, the smallest first. The first part of an Inf or NaN is itself, the others are 0; beside
a number of one part, Inf times a part that is 0 gives NaN: a result that is not finite stays so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pykernels.kernels.launch import INTERPRETED

_HOST = tl.constexpr(INTERPRETED)
"""The interpreter multiplies bfloat16 wrongly: there every operand goes through float32, which holds it."""


@triton.jit
def dot(acc, a, b):
    """acc + a b, the operands of one type and taken exactly."""
    if _HOST:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def leading(value):
    """float32 -> the part of its upper 16 bits, float32; a NaN stays one."""
    bits = value.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return tl.where(value == value, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def behind(value, part):
    """What a part leaves of a number."""
    return tl.where(tl.abs(part) < float("inf"), value - part, 0.0)


@triton.jit
def exactly(value, DTYPE: tl.constexpr):
    """A float32 tile in the type that holds it."""
    if not _HOST:
        value = value.to(DTYPE)
    return value


@triton.jit
def multiply(acc, a, b, A: tl.constexpr, B: tl.constexpr):
    """acc [m, n] + a [m, k] b [k, n]: tiles that hold numbers of types A and B, in these or in float32."""
    if A == B and A != tl.float32:
        acc = dot(acc, exactly(a, A), exactly(b, A))
    else:
        OF_A: tl.constexpr = 3 if A == tl.float32 else (2 if A == tl.float16 else 1)
        OF_B: tl.constexpr = 3 if B == tl.float32 else (2 if B == tl.float16 else 1)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        a0 = leading(a)
        b0 = leading(b)
        a1 = behind(a, a0)
        b1 = behind(b, b0)
        if OF_A == 3:
            a2 = behind(a1, leading(a1))
            acc = dot(acc, exactly(a2, tl.bfloat16), exactly(b0, tl.bfloat16))
            a1 = leading(a1)
        if OF_B == 3:
            b2 = behind(b1, leading(b1))
            acc = dot(acc, exactly(a0, tl.bfloat16), exactly(b2, tl.bfloat16))
            b1 = leading(b1)
        if OF_A > 1 and OF_B > 1:
            acc = dot(acc, exactly(a1, tl.bfloat16), exactly(b1, tl.bfloat16))
        if OF_A > 1:
            acc = dot(acc, exactly(a1, tl.bfloat16), exactly(b0, tl.bfloat16))
        if OF_B > 1:
            acc = dot(acc, exactly(a0, tl.bfloat16), exactly(b1, tl.bfloat16))
        acc = dot(acc, exactly(a0, tl.bfloat16), exactly(b0, tl.bfloat16))
    return acc
