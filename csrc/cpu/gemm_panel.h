// Panels of the right operand: kPanel columns side by side, k by k. And how columns are turned into one.
#pragma once
#include "gemm_jobs.h"
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kPanelParts = 2;
constexpr int kPanel = kPanelParts * kLanes;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // rows whose sums stay in registers
using Columns = float[kPanel][kGemmDepth + kGroup];

#if defined(PK_AVX512) || defined(PK_AVX2)
/// The transpose of eight rows of eight words.
PK_IN void transpose(__m256 (&r)[8]) {
  __m256 s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  __m256 t[8];
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      t[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0x44);
      t[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + 2 + j], 0xEE);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

/// Eight columns of eight: to[k * kPanel + c] = from[c * step + k].
PK_IN void turn_square(const float* from, int64_t step, float* to) {
  __m256 r[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * step);
  transpose(r);
  for (int i = 0; i < 8; i++) _mm256_storeu_ps(to + i * kPanel, r[i]);
}
constexpr int kTurned = 8;

/// Eight columns of sixteen, turned as pairs of bfloat16 and widened after: a third of the shuffles.
PK_IN void turn_halves(const bf16* from, int64_t step, float* to) {
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xFFFF0000u)));
  __m256 r[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * step));
  transpose(r);
  for (int i = 0; i < 8; i++, to += 2 * kPanel) {
    _mm256_storeu_ps(to, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r[i]), 16)));
    _mm256_storeu_ps(to + kPanel, _mm256_and_ps(r[i], high));
  }
}
constexpr int kHalvesTurned = 16;
#else
PK_IN void turn_square(const float* from, int64_t step, float* to) {
  for (int k = 0; k < 4; k++)
    for (int c = 0; c < 4; c++) to[k * kPanel + c] = from[c * step + k];
}
constexpr int kTurned = 4;

PK_IN void turn_halves(const bf16* from, int64_t step, float* to) {
  for (int k = 0; k < 4; k++)
    for (int c = 0; c < 8; c++) to[k * kPanel + c] = element<bf16>(from, c * step + k);
}
constexpr int kHalvesTurned = 4;
#endif

/// The first `depth` elements of every column into a panel.
PK_IN void turn(const Columns& columns, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + kTurned <= depth; k += kTurned)
    for (int c = 0; c < kPanel; c += kTurned)
      turn_square(&columns[c][k], kGemmDepth + kGroup, to + k * kPanel + c);
  for (; k < depth; k++)
    for (int c = 0; c < kPanel; c++) to[k * kPanel + c] = columns[c][k];
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
