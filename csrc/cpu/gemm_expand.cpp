// What an adapter adds to one row: a panel of its factor would be read as often as it was written.
// Traffic: reads n1 - n0 rows of B once, adds to a row of sums in the caches; writes no panel.
#include "gemm_panel.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kColumns = 8, kRanks = 16;  // turned at a time

#if defined(PK_AVX512) || defined(PK_AVX2)
/// sums[c] += sum over k of low[k] * (scale * from[c][k]): the chain that a panel would give, in S squares.
template <int S>
PK_IN void add_columns(const bf16* from, int64_t step, int64_t rank, float scale, const float* low,
                       float* sums) {
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xFFFF0000u))), s = _mm256_set1_ps(scale);
  __m256 sum[S];
  for (__m256& t : sum) t = _mm256_setzero_ps();
  for (int64_t k = 0; k < rank; k += kRanks) {
    __m256 pairs[S][kColumns];
    for (int q = 0; q < S; q++) {
      for (int c = 0; c < kColumns; c++)
        pairs[q][c] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (q * kColumns + c) * step + k));
      transpose(pairs[q]);
    }
    for (int i = 0; i < kRanks / 2; i++) {
      const __m256 h0 = _mm256_set1_ps(low[k + 2 * i]), h1 = _mm256_set1_ps(low[k + 2 * i + 1]);
      for (int q = 0; q < S; q++) {
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs[q][i]), 16));
        sum[q] = _mm256_fmadd_ps(h0, _mm256_mul_ps(even, s), sum[q]);
        sum[q] = _mm256_fmadd_ps(h1, _mm256_mul_ps(_mm256_and_ps(pairs[q][i], high), s), sum[q]);
      }
    }
  }
  for (int q = 0; q < S; q++)
    _mm256_storeu_ps(sums + q * kColumns, _mm256_add_ps(_mm256_loadu_ps(sums + q * kColumns), sum[q]));
}
#else
template <int S>
PK_IN void add_columns(const bf16* from, int64_t step, int64_t rank, float scale, const float* low,
                       float* sums) {
  for (int c = 0; c < S * kColumns; c += kLanes) {
    F sum = F::of(0);
    for (int64_t k = 0; k < rank; k++) {
      alignas(64) float column[kLanes];
      for (int l = 0; l < kLanes; l++) column[l] = element<bf16>(from, (c + l) * step + k) * scale;
      sum = fma(F::of(low[k]), load_floats(column), sum);
    }
    store(sums + c, load_floats(sums + c) + sum);
  }
}
#endif

}  // namespace

bool gemm_expand(const Matrix& high, int64_t rank, int64_t n0, int64_t n1, float scale, const float* low,
                 float* sums) {
  if (high.dtype != kBF16 || high.row != 1 || rank % kRanks || rank > kGemmDepth || (n1 - n0) % kColumns)
    return false;
  const bf16* from = static_cast<const bf16*>(high.data) + n0 * high.col;
  int64_t n = 0;
  for (; n + 2 * kColumns <= n1 - n0; n += 2 * kColumns)
    add_columns<2>(from + n * high.col, high.col, rank, scale, low, sums + n);
  if (n < n1 - n0) add_columns<1>(from + n * high.col, high.col, rank, scale, low, sums + n);
  return true;
}

}  // namespace pk::cpu::PK_ISA
