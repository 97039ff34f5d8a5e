// What the engine and the benchmarks need beside the ops: a count of NaN and Inf, and the ideal pass.
// Traffic: count_nonfinite reads numel * sizeof(T). ideal reads n inputs and writes one output of the same
// bytes.
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

template <class T>
int64_t nonfinite(const void* data, int64_t begin, int64_t end) {
  const U infinity = broadcast(kInfinity);
  int64_t i = begin, count = 0;
  while (i + kGroup <= end) {
    Counter counter;
    for (const int64_t stop = end - i > kChunk ? i + kChunk : end; i + kGroup <= stop; i += kGroup) {
      const Pair x = load(static_cast<const T*>(data) + i);
      counter.add(at_least(key(x.a), infinity), at_least(key(x.b), infinity));
    }
    count += counter.total();
  }
  for (; i < end; i++) count += (float_bits(element<T>(data, i)) & kAbs) >= kInfinity;
  return count;
}

}  // namespace

int64_t count_nonfinite(int dtype, const void* data, int64_t begin, int64_t end) {
  if (dtype == kF32) return nonfinite<float>(data, begin, end);
  if (dtype == kBF16) return nonfinite<bf16>(data, begin, end);
  return nonfinite<f16>(data, begin, end);
}

/// XOR of all inputs, written past the cache: the least that any merge of the same buffers must move. Units:
/// 64 bytes.
void ideal(void* out, const void* const* inputs, int n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
#if defined(PK_AVX512)
    __m512i x = _mm512_loadu_si512(static_cast<const char*>(inputs[0]) + 64 * i);
    for (int m = 1; m < n; m++)
      x = _mm512_xor_si512(x, _mm512_loadu_si512(static_cast<const char*>(inputs[m]) + 64 * i));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(out) + 64 * i), x);
#else
    uint64_t x[8], y[8];
    memcpy(x, static_cast<const char*>(inputs[0]) + 64 * i, 64);
    for (int m = 1; m < n; m++) {
      memcpy(y, static_cast<const char*>(inputs[m]) + 64 * i, 64);
      for (int l = 0; l < 8; l++) x[l] ^= y[l];
    }
    memcpy(static_cast<char*>(out) + 64 * i, x, 64);
#endif
  }
  fence();
}

}  // namespace pk::cpu::PK_ISA
