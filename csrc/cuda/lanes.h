// One float as the lane type of csrc/math: the mathematics of a GPU thread is what the CPU's vectors do.
#pragma once
#include "../math/dtype.h"
#include "device.h"

namespace pk {

PK_HD bool positive_or_nan(float x) { return !(x <= 0); }
PK_HD bool negative(float x) { return x < 0; }
PK_HD bool not_less(float a, float b) { return !(a < b); }
PK_HD bool is_zero(float x) { return x == 0; }
PK_HD float select(bool m, float a, float b) { return m ? a : b; }
PK_HD float add_where(float sum, bool m, float x) { return m ? sum + x : sum; }

/// A 32-bit word of Philox in the low half; the high half is scratch.
struct Word {
  uint64_t v;
};
PK_HD Word mul_low(Word a, uint32_t b) { return {uint64_t(uint32_t(a.v)) * b}; }
PK_HD Word high(Word a) { return {a.v >> 32}; }
PK_HD Word xor3(Word a, Word b, uint32_t c) { return {uint64_t(uint32_t(a.v) ^ uint32_t(b.v) ^ c)}; }

}  // namespace pk

#include "../math/elect.h"
#include "../math/philox.h"

namespace pk {

template <>
struct Fill<float> {
  PK_HD static float of(float x) { return x; }
};

/// The key of a float; all NaN have that of the canonical one, as a GPU makes another NaN than a CPU.
PK_HD uint32_t magnitude_key(float delta) {
  const uint32_t key = float_bits(delta) & kAbs;
  return key < kNaN ? key : kNaN;
}
PK_HD bool is_nan(float x) { return x != x; }

}  // namespace pk
