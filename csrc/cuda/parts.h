// Numbers of any dtype as the 16-bit numbers that tensor cores multiply.
#pragma once
#include "../math/dtype.h"

namespace pk::cuda {

constexpr int kStep = 16;      // ranks of one product
constexpr int kMostParts = 3;  // of a float32

/// How many bf16 hold a number of this dtype exactly.
PK_HD int parts_of(int dtype) { return dtype == kBF16 ? 1 : dtype == kF16 ? 2 : kMostParts; }

/// x as the sum of three bf16, exactly (but for what is below 2^-133): each is what is left cut off to eight
/// bits, so that none overflows. Of what is not finite: the value, then 0.
PK_HD void split(float x, bf16 (&part)[kMostParts]) {
  const uint32_t key = float_bits(x) & kAbs;
  for (int i = 0; i < kMostParts; i++) {
    const uint32_t bits = float_bits(x) & 0xFFFF0000u;
    part[i].bits = uint16_t(bits >> 16);
    x -= bits_float(bits);
  }
  if (key >= kInfinity) {
    if (key > kInfinity) part[0].bits = uint16_t(kNaN >> 16);
    part[1].bits = part[2].bits = 0;
  }
}

/// What the pairs that `each_pair` leaves out are at most of a product: 2^-7 * 2^-15 twice, and 2^-30.
constexpr float kLeftOut = 0x1.01p-21f;

}  // namespace pk::cuda
