// The elected sign of every element.
// Traffic: reads n deltas once, writes one byte an element: n * numel * sizeof(T) + numel. One pass.
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

/// A NaN casts no vote here: there is no merged value that could carry it.
template <class T>
void elect(int8_t* out, const Merge& job, bool plain, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kGroup) {
    F pos[2] = {F::of(0), F::of(0)}, neg[2] = {F::of(0), F::of(0)};
    const int64_t count = end - i < kGroup ? end - i : kGroup;
    for (int m = 0; m < job.n; m++) {
      T padded[kGroup] = {};
      const T* data = static_cast<const T*>(job.models[m].data) + i;
      if (count < kGroup)
        data = static_cast<T*>(memcpy(static_cast<void*>(padded), data, size_t(count) * sizeof(T)));
      const Pair x = load(data);
      const F weight = broadcast(plain ? 1.0f : job.models[m].weight);
      const F vote[2] = {x.a * weight, x.b * weight};
      for (int h = 0; h < 2; h++) {
        pos[h] = add_where(pos[h], positive(vote[h]), vote[h]);
        neg[h] = add_where(neg[h], negative(vote[h]), vote[h]);
      }
    }
    const uint32_t up = element_bits<T>(not_less(pos[0], -neg[0]), not_less(pos[1], -neg[1]));
    for (int64_t e = 0; e < count; e++) out[i + e] = (up >> e) & 1u ? 1 : -1;
  }
}

}  // namespace

void elect_sign(int8_t* out, const Merge& job, int combine, int64_t begin, int64_t end) {
  const bool plain = combine == kPlain;
  if (job.dtype == kF32) return elect<float>(out, job, plain, begin, end);
  if (job.dtype == kBF16) return elect<bf16>(out, job, plain, begin, end);
  return elect<f16>(out, job, plain, begin, end);
}

}  // namespace pk::cpu::PK_ISA
