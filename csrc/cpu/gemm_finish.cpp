// The end of a matrix product: sums times what scales their columns, plus bias, rounded once.
// Traffic: reads a tile of sums from the caches, writes every element of the result once.
#include "gemm_jobs.h"
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

template <class T>
void finish_row(const float* c, const float* scale, const float* bias, int64_t count, T* out, int64_t step) {
  alignas(64) T rounded[kGemmWidth];
  const bool whole = step == 1 && count % kGroup == 0;
  T* to = whole ? out : rounded;
  for (int64_t n = 0; n < count; n += kGroup) {
    const Pair sum = load(c + n), s = load(scale + n), b = load(bias + n);
    put_as<float>(dtype_of<T>(), to, n, {fma(sum.a, s.a, b.a), fma(sum.b, s.b, b.b)}, false);
  }
  if (whole) return;
  if (step == 1)
    memcpy(static_cast<void*>(out), rounded, size_t(count) * sizeof(T));
  else
    for (int64_t n = 0; n < count; n++) memcpy(static_cast<void*>(out + n * step), rounded + n, sizeof(T));
}

template <class T>
void finish(const float* c, const GemmOut& out, const int64_t* rows, int64_t i0, int64_t i1, int64_t n0,
            int64_t n1) {
  alignas(64) float scale[kGemmWidth], bias[kGemmWidth];
  for (int64_t n = 0; n < kGemmWidth; n++) {
    const bool inside = n < n1 - n0;
    scale[n] = inside && out.scale ? element<float>(out.scale, n0 + n) : 1.0f;
    bias[n] = inside ? element<T>(out.bias, n0 + n) : 0.0f;
  }
  if (!out.bias)  // x + (-0) is x, zeros included
    for (float& b : bias) b = -0.0f;
  for (int64_t i = i0; i < i1; i++, c += kGemmWidth) {
    T* to = static_cast<T*>(out.data) + (rows ? rows[i] : i) * out.row + n0 * out.col;
    finish_row(c, scale, bias, n1 - n0, to, out.col);
  }
}

}  // namespace

void gemm_finish(const float* c, const GemmOut& out, const int64_t* rows, int64_t i0, int64_t i1, int64_t n0,
                 int64_t n1) {
  if (out.dtype == kF32) return finish<float>(c, out, rows, i0, i1, n0, n1);
  if (out.dtype == kBF16) return finish<bf16>(c, out, rows, i0, i1, n0, n1);
  return finish<f16>(c, out, rows, i0, i1, n0, n1);
}

}  // namespace pk::cpu::PK_ISA
