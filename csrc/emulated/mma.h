// Tensor cores and their loads on the host: the lanes of a warp exchange what each holds.
#pragma once
#include <algorithm>

#include "../math/dtype.h"
#include "cuda.h"

namespace pk::emulated {

/// Towards zero.
inline float cut_to_float(double x) {
  const float y = float(x);
  return std::isfinite(y) && std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

/// sum + x0 y0 + .. + x7 y7 as on sm_80: one unit below the last bit of the largest, what is lower is cut
/// off.
inline float add_eight(float sum, const float* x, const float* y) {
  double term[9] = {sum}, largest = std::fabs(double(sum)), plain = sum;
  for (int k = 0; k < 8; k++) {
    term[k + 1] = double(x[k]) * double(y[k]);
    plain += term[k + 1];
    largest = std::max(largest, std::fabs(term[k + 1]));
  }
  if (!std::isfinite(plain) || largest == 0) return float(plain);
  int exponent;
  std::frexp(largest, &exponent);
  const int shift = 25 - exponent;
  double cut = 0;
  for (const double t : term) cut += std::trunc(std::ldexp(t, shift));
  return cut_to_float(std::ldexp(cut, -shift));
}

/// Half `high` of a word.
template <class T>
float half_of(uint64_t word, int high) {
  return to_float(T{uint16_t(word >> (16 * high))});
}

/// sum [16][8] += left [16][16] @ right [16][8]; see csrc/cuda/mma.h.
template <class T>
void multiply(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  const int group = int(threadIdx.x % kWarp) / 4, place = int(threadIdx.x % kWarp) % 4;
  float rows[2][16], columns[2][16];
  for (int k8 = 0; k8 < 2; k8++) {  // 8 ranks at a time
    const uint64_t* all = block.exchange(left[2 * k8] | uint64_t(left[2 * k8 + 1]) << 32);
    for (int i = 0; i < 8; i++)
      for (int r = 0; r < 2; r++) rows[r][8 * k8 + i] = half_of<T>(all[group * 4 + i / 2] >> (32 * r), i % 2);
  }
  const uint64_t* all = block.exchange(right[0] | uint64_t(right[1]) << 32);
  for (int k = 0; k < 16; k++)
    for (int c = 0; c < 2; c++)
      columns[c][k] = half_of<T>(all[(2 * place + c) * 4 + k % 8 / 2] >> (32 * (k / 8)), k % 2);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k += 8) sum[i] = add_eight(sum[i], rows[i / 2] + k, columns[i % 2] + k);
}

/// min.bf16x2 and max.bf16x2 against the largest finite numbers: of a number and a NaN, the number.
inline uint32_t calm(uint32_t word) {
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t half = word >> shift & 0xFFFFu, key = half & 0x7FFFu;
    if (key < 0x7F80u) continue;
    const uint32_t sign = key > 0x7F80u ? 0 : half & 0x8000u;
    word = (word & ~(0xFFFFu << shift)) | (sign | 0x7F7Fu) << shift;
  }
  return word;
}

/// ldmatrix.x4, or its .trans.
inline void load_matrices(uint32_t (&word)[4], const void* row, bool turned) {
  const int group = int(threadIdx.x % kWarp) / 4, place = int(threadIdx.x % kWarp) % 4;
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix is not aligned");
  const uint64_t* rows = block.exchange(uint64_t(reinterpret_cast<uintptr_t>(row)));
  for (int m = 0; m < 4; m++) {
    word[m] = 0;
    for (int i = 0; i < 2; i++) {
      const int r = turned ? 2 * place + i : group, c = turned ? group : 2 * place + i;
      uint16_t half;
      memcpy(&half, reinterpret_cast<const char*>(uintptr_t(rows[8 * m + r])) + 2 * c, 2);
      word[m] |= uint32_t(half) << (16 * i);
    }
  }
}

/// For the test of csrc/cuda/mma.h: sum [16][8] += left [16][16] @ right [16][8], and the parts of floats.
void multiply_one(float* sum, const uint16_t* left, const uint16_t* right, int dtype);
void split_all(const float* x, uint16_t* parts, int64_t numel);

}  // namespace pk::emulated
