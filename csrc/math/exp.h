// The exponential without a maximum: e^x = p * 2^n with p in [0.70, 1.42], as in The Two-Pass Softmax
// Algorithm (Dukhan and Ablavatski, 2020). Over any lane type V that has fma, as_power and arithmetic.
#pragma once
#include "dtype.h"

#ifdef __CUDACC__  // nvcc keeps tables where only kernels read them
#define PK_TABLE __device__ constexpr
#define PK_BY_TABLE __device__ inline
#define PK_WITHIN PK_HD
#else
#define PK_TABLE constexpr
#define PK_BY_TABLE inline
#define PK_WITHIN PK_HD __attribute__((always_inline))  // a call would pass registers through memory
#endif

namespace pk {

// Tables printed by fit_exp.py. Relative errors for |t| <= 0.36: 6e-9 (degree 6; in float 1e-7), 3.5e-6
// (degree 4), 1e-10 (e^t - 1).
PK_TABLE float kExp6[] = {0x1p+0f,        0x1.fffffap-2f, 0x1.555474p-3f,
                          0x1.5559d4p-5f, 0x1.124fd2p-7f, 0x1.69d018p-10f};
PK_TABLE float kExp4[] = {0x1.fffaf8p-1f, 0x1.00049cp-1f, 0x1.57ffaep-3f, 0x1.53f988p-5f};
PK_TABLE double kMinus1[] = {0x1.fffffffff2d15p-1,  0x1.0000000023ea6p-1, 0x1.5555558888fbep-3,
                             0x1.555554d9dc3edp-5,  0x1.111095211c8b1p-7, 0x1.6c17745467634p-10,
                             0x1.a1995e85de76fp-13, 0x1.a019e50fe09ccp-16};

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2High = 0x1.62e43p-1f, kLn2Low = -0x1.05c61p-29f;
constexpr float kRound = 0x1.8p+23f;  // added, it rounds to an integer that then stands in the low bits

/// Past this, x * log2(e) rounds to the wrong integer too often.
constexpr float kLargest = 1e6f;

/// As many powers of two stand above 2^E in the numbers that exponentials give: all of them are normal
/// floats, though the results that they stand for reach down to 2^-152.
constexpr int kLift = 64;
/// Terms below 2^(E - 152) are taken for that: they round to 0, and no sum can tell.
constexpr int kDeepest = 152;

namespace {  // internal linkage, as in dtype.h

/// What an exponent E makes of the constants of `lifted_exp`.
struct Reference {
  float magic, low;
};
PK_HD Reference reference(int exponent, float deepest = kDeepest) {
  return {kRound + float(127 + kLift - exponent),
          float((double(exponent) - double(deepest)) * 0.6931471805599453)};
}

/// The integer next to x * log2(e), |x| < kLargest.
PK_HD int nearest_exponent(float x) {
#if defined(__FMA__) || defined(__CUDACC__) || defined(__ARM_FEATURE_FMA)
  const float r = __builtin_fmaf(x, kLog2E, kRound);
#else
  const float r = float(double(x) * double(kLog2E) + double(kRound));
#endif
  return int(r - kRound);
}

/// 1 + c[0] t + c[1] t^2 + ..., by Horner.
template <class V, int degree>
PK_WITHIN V polynomial(const float (&c)[degree], V t) {
  V p = V::of(c[degree - 1]);
  for (int k = degree - 2; k >= 0; k--) p = fma(p, t, V::of(c[k]));
  return fma(p, t, V::of(1));
}

/// The power of two next to e^x times 2^lift, in `power`, and e^x divided by it as the result.
template <int degree, class V>
PK_WITHIN V mantissa(V x, V magic, V& power) {
  const V r = fma(x, V::of(kLog2E), magic), n = r - magic;
  const V t = fma(n, V::of(-kLn2Low), fma(n, V::of(-kLn2High), x));
  power = as_power(r);
  if constexpr (degree == 6)
    return polynomial(kExp6, t);
  else
    return polynomial(kExp4, t);
}

/// c * tanh(x / c), by e^2u - 1 = 2^n (e^t - 1) + (2^n - 1): no digits are lost near 0. In double, so that
/// logits are rounded once, and without branches, so that a compiler makes lanes of a loop over it.
PK_BY_TABLE float capped(float x, double cap) {
  constexpr double round = 0x1.8p+52;
  const double u = double(x) / cap, size = u < 0 ? -u : u, v = 2 * (size > 15 ? 15 : size);
  const double r = v * 0x1.71547652b82fep+0 + round, n = r - round, t = v - n * 0x1.62e42fefa39efp-1;
  uint64_t bits;
  memcpy(&bits, &r, 8);
  bits = (bits + 1023) << 52;
  double power, q = kMinus1[7];
  memcpy(&power, &bits, 8);
  for (int k = 6; k >= 0; k--) q = q * t + kMinus1[k];
  const double less_1 = power * (t * q) + (power - 1), y = less_1 / (less_1 + 2);
  return float((u < 0 ? -y : y) * cap);
}

}  // namespace

}  // namespace pk
