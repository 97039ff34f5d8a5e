// What an adapter adds to one row: a panel of its factor would be read as often as it was written.
// Traffic: reads n1 - n0 rows of B once, adds to a row of sums in the caches; writes no panel.
#include "gemm_panel.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kColumns = 8, kRanks = 16;  // of a square, which is turned at once
constexpr int kSquares = 4;               // side by side

#if defined(PK_AVX512) || defined(PK_AVX2)
/// sums[c] += sum over k of low[k] * (scale * from[c][k]): the chain that a panel would give, in S squares.
/// All squares are turned first: a chain is slow and the next square's far behind it, so that chains go side
/// by side.
template <int S>
PK_IN void add_columns(const bf16* from, int64_t step, int64_t rank, float scale, const float* low,
                       float* sums) {
  __m256 turned[kGemmDepth / kRanks][S][kColumns];
  for (int64_t k = 0; k < rank; k += kRanks)
    for (int q = 0; q < S; q++) {
      __m256 pairs[kColumns];
      for (int c = 0; c < kColumns; c++)
        pairs[c] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (q * kColumns + c) * step + k));
      transpose(pairs);
      for (int c = 0; c < kColumns; c++) turned[k / kRanks][q][c] = pairs[c];
    }
  const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xFFFF0000u))), s = _mm256_set1_ps(scale);
  __m256 sum[S];
  for (__m256& t : sum) t = _mm256_setzero_ps();
  for (int64_t k = 0; k < rank; k += kRanks)
    for (int i = 0; i < kRanks / 2; i++) {
      const __m256 h0 = _mm256_set1_ps(low[k + 2 * i]), h1 = _mm256_set1_ps(low[k + 2 * i + 1]);
      for (int q = 0; q < S; q++) {
        const __m256 pair = turned[k / kRanks][q][i];
        const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pair), 16));
        sum[q] = _mm256_fmadd_ps(h0, _mm256_mul_ps(even, s), sum[q]);
        sum[q] = _mm256_fmadd_ps(h1, _mm256_mul_ps(_mm256_and_ps(pair, high), s), sum[q]);
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
  for (; n + kSquares * kColumns <= n1 - n0; n += kSquares * kColumns)
    add_columns<kSquares>(from + n * high.col, high.col, rank, scale, low, sums + n);
  for (; n < n1 - n0; n += kColumns) add_columns<1>(from + n * high.col, high.col, rank, scale, low, sums + n);
  return true;
}

}  // namespace pk::cpu::PK_ISA
