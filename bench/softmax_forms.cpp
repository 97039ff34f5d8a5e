// The algorithms that The Two-Pass Softmax Algorithm (Dukhan and Ablavatski, 2020) compares, one row on one
// thread, for the sweep of softmax_sweep.py: peers, not kernels. Compiled with -O3 -march=native where it
// runs.
//
//   recompute  max; sum; exponentials again: 3 reads, 1 write      reload  max; exponentials stored, sum;
//   scale two_pass   pairs (m, n) for m * 2^n, as published: 2 reads, 1 write     (3 reads, 2 writes)
//
// Vectors are the compiler's; n elements, the tail of less than a step is left to the caller (kStep).
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kUnroll = 4, kStep = kLanes * kUnroll;

typedef float V __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));

V load(const float* x) { return *reinterpret_cast<const V*>(x); }
void store(float* y, V v) { *reinterpret_cast<V*>(y) = v; }
V larger(V a, V b) { return a > b ? a : b; }

template <class Fold>
float across(V v, Fold fold) {
  float r = v[0];
  for (int i = 1; i < kLanes; i++) r = fold(r, v[i]);
  return r;
}

/// m * 2^n for a whole n: one instruction of AVX-512; elsewhere n is clamped and becomes an exponent.
V scaled(V m, V n) {
#ifdef __AVX512F__
  return _mm512_scalef_ps(m, n);
#else
  n = larger(n, V{} - 127.0f);
  const V magic = n + (0x1.8p23f + 127);
  I bits;
  memcpy(&bits, &magic, sizeof bits);
  bits <<= 23;
  V power;
  memcpy(&power, &bits, sizeof power);
  return m * power;
#endif
}

/// e^x = m * 2^n, |n| < 2^22.
inline void pair(V x, V& m, V& n) {
  n = (x * 0x1.715476p+0f + 0x1.8p23f) - 0x1.8p23f;
  V t = x - n * 0x1.62E43p-1f;
  t = t + n * 0x1.05C61p-29f;
  V p = t * 0x1.0F9F9Cp-7f + 0x1.573A1Ap-5f;
  p = p * t + 0x1.555A80p-3f;
  p = p * t + 0x1.FFFDC6p-2f;
  p = p * t + 0x1.FFFFF6p-1f;
  m = p * t + 1.0f;
}
inline V exponential(V x) {
  V m, n;
  pair(x, m, n);
  return scaled(m, n);
}

float maximum(const float* x, int64_t n) {
  V most[kUnroll];
  for (int k = 0; k < kUnroll; k++) most[k] = load(x + k * kLanes);
  for (int64_t i = kStep; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) most[k] = larger(most[k], load(x + i + k * kLanes));
  return across(larger(larger(most[0], most[1]), larger(most[2], most[3])),
                [](float a, float b) { return a > b ? a : b; });
}
float total(const V (&sum)[kUnroll]) {
  return across((sum[0] + sum[1]) + (sum[2] + sum[3]), [](float a, float b) { return a + b; });
}

}  // namespace

extern "C" {

int64_t step() { return kStep; }

void recompute(const float* x, float* y, int64_t n) {
  const float most = maximum(x, n);
  V sum[kUnroll] = {};
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) sum[k] += exponential(load(x + i + k * kLanes) - most);
  const float scale = 1 / total(sum);
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++)
      store(y + i + k * kLanes, exponential(load(x + i + k * kLanes) - most) * scale);
}

void reload(const float* x, float* y, int64_t n) {
  const float most = maximum(x, n);
  V sum[kUnroll] = {};
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) {
      const V e = exponential(load(x + i + k * kLanes) - most);
      sum[k] += e;
      store(y + i + k * kLanes, e);
    }
  const float scale = 1 / total(sum);
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) store(y + i + k * kLanes, load(y + i + k * kLanes) * scale);
}

void two_pass(const float* x, float* y, int64_t n) {
  V sum[kUnroll] = {}, power[kUnroll];
  for (int k = 0; k < kUnroll; k++) power[k] = V{} - 0x1p22f;
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) {
      V m, e;
      pair(load(x + i + k * kLanes), m, e);
      const V most = larger(power[k], e);
      sum[k] = scaled(sum[k], power[k] - most) + scaled(m, e - most);
      power[k] = most;
    }
  const V top = larger(larger(power[0], power[1]), larger(power[2], power[3]));
  const float most = across(top, [](float a, float b) { return a > b ? a : b; });
  for (int k = 0; k < kUnroll; k++) sum[k] = scaled(sum[k], power[k] - most);
  const float scale = 1 / total(sum);
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kUnroll; k++) {
      V m, e;
      pair(load(x + i + k * kLanes), m, e);
      store(y + i + k * kLanes, scaled(m * scale, e - most));
    }
}

}  // extern "C"
