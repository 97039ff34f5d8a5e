// Philox4x32-10 (Salmon et al., 2011), on one counter or on lanes of counters.
//
// W holds one 32-bit word in the low half of each 64-bit lane; the high halves are scratch. It needs
// mul_low(W, uint32_t) -> 64-bit products, high(W) -> products' high words in the low halves, and xor3(W, W,
// uint32_t).
#pragma once
#include "dtype.h"

namespace pk {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

namespace {

template <class W>
PK_HD void philox10(W& c0, W& c1, W& c2, W& c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; round++) {
    const W p0 = mul_low(c0, kPhiloxM0), p1 = mul_low(c2, kPhiloxM1);
    c0 = xor3(high(p1), c1, k0);
    c2 = xor3(high(p0), c3, k1);
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

}  // namespace
}  // namespace pk
