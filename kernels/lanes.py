"""What every Triton kernel does to elements: read at any byte address, widen, key, round, write.

Everything works on bits where a cast would do: Triton's interpreter truncates float32 to bfloat16, and no
cast promises the canonical NaN. Kernels are launched with ``enable_fp_fusion=False``, so a product and a sum
are rounded one by one, as in ``csrc/math``.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = tl.constexpr(0x7F800001)
"""The least key of a NaN: cuts never exceed it, so that a NaN is never cut away."""
KEYS = tl.constexpr(0x7FFFFFFF)
NAN_KEY = tl.constexpr(0x7FC00000)


@triton.jit
def fetch(place, mask, WHOLE: tl.constexpr):
    """Load [..]; 0 where ``mask`` is false. WHOLE: it is true everywhere, which lets loads be wide."""
    if WHOLE:
        bits = tl.load(place)
    else:
        bits = tl.load(place, mask=mask, other=0)
    return bits


@triton.jit
def words(address, start, lane, mask, WORD: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """Unsigned words of 16 or 32 bits at ``start + lane``. ALIGN: 16 bytes, 1 element, or 0 for any byte."""
    if ALIGN == 0:
        SIZE: tl.constexpr = WORD.primitive_bitwidth // 8
        place = (address + start * SIZE).to(tl.pointer_type(tl.uint8)) + lane * SIZE
        bits = fetch(place, mask, WHOLE).to(WORD)
        for b in tl.static_range(1, SIZE):
            bits |= fetch(place + b, mask, WHOLE).to(WORD) << (8 * b)
    else:
        place = address.to(tl.pointer_type(WORD))
        if ALIGN == 16:  # said twice, as a start of 0 takes what is said of the sum along
            place = tl.multiple_of(tl.multiple_of(place, 16) + start, 16)
        else:
            place += start
        bits = fetch(place + lane, mask, WHOLE)
    return bits


@triton.jit
def read(address, start, lane, mask, DTYPE: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """Elements ``start + lane`` of the DTYPE tensor at a byte address, as float32; 0 where masked."""
    if DTYPE == tl.float32:
        value = words(address, start, lane, mask, tl.uint32, ALIGN, WHOLE).to(tl.float32, bitcast=True)
    else:
        half = words(address, start, lane, mask, tl.uint16, ALIGN, WHOLE)
        if DTYPE == tl.bfloat16:
            value = (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            value = half.to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 -> bits of DTYPE, to nearest even, any NaN the canonical one; to float64 exactly."""
    nan = value != value
    if DTYPE == tl.float32:
        bits = tl.where(nan, 0x7FC00000, value.to(tl.uint32, bitcast=True))
    elif DTYPE == tl.bfloat16:
        wide = value.to(tl.uint32, bitcast=True)
        bits = tl.where(nan, 0x7FC0, (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.uint16)
    elif DTYPE == tl.float16:
        bits = tl.where(nan, 0x7E00, value.to(tl.float16).to(tl.uint16, bitcast=True)).to(tl.uint16)
    else:
        bits = tl.where(nan, 0x7FF8000000000000, value.to(tl.float64).to(tl.uint64, bitcast=True))
    return bits


@triton.jit
def write(address, start, lane, mask, bits, ALIGN: tl.constexpr, WHOLE: tl.constexpr):
    """Store unsigned words at ``start + lane``; any byte address, as :func:`words` reads them."""
    if ALIGN == 0:
        SIZE: tl.constexpr = bits.dtype.primitive_bitwidth // 8
        place = (address + start * SIZE).to(tl.pointer_type(tl.uint8)) + lane * SIZE
        for b in tl.static_range(SIZE):
            tl.store(place + b, (bits >> (8 * b)).to(tl.uint8), mask=mask)
    else:
        place = address.to(tl.pointer_type(bits.dtype)) + start
        if ALIGN == 16:
            place = tl.multiple_of(place, 16)
        if WHOLE:
            tl.store(place + lane, bits)
        else:
            tl.store(place + lane, bits, mask=mask)


@triton.jit
def magnitude(delta):
    """float32 -> int32 key: the bits of |delta|, which order like |delta|, NaN above Inf.

    All NaN have the key of the canonical one, as a GPU makes another NaN than a CPU.
    """
    return tl.minimum((delta.to(tl.uint32, bitcast=True) & KEYS).to(tl.int32), NAN_KEY)


@triton.jit
def draws(key, model, call, BLOCK: tl.constexpr):
    """The 16-bit draws of BLOCK / 128 tiles of 128 elements, [BLOCK] int32, from their calls [BLOCK / 8]
    int64.

    A tile's 16 calls follow each other, and begin at an eighth of its first flat index. Every bit of a call
    of Philox4x32-10 is used: words [tile, lane, j] become [tile, j, lane], each of which gives two neighbours
    their draws, the low half first (Decision f of the method notes).
    """
    zero = tl.zeros([BLOCK // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        key, call.to(tl.uint32), (call >> 32).to(tl.uint32), zero + model.to(tl.uint32), zero
    )
    by_call = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [calls, 2, 2]: word 2x + y stands at [x, y]
    by_tile = tl.permute(tl.reshape(by_call, [BLOCK // 128, 16, 4]), [0, 2, 1])
    pairs = tl.reshape(by_tile, [BLOCK // 2])
    return tl.interleave((pairs & 0xFFFF).to(tl.int32), (pairs >> 16).to(tl.int32))
