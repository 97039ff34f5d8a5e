// TIES: trim by magnitude, elect, average; with known cuts, or with the search for the cuts in the same pass.
// Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). The fused pass
// also writes and re-reads (n + 1) * sizeof(T) + 8 bytes per uncertain element (0 to 4 % of them).
#include "merge_loop.h"

namespace pk::cpu::PK_ISA {

void ties_merge(const Merge& job, int combine, int64_t begin, int64_t end) {
  if (combine == kSum) return merge_any<KeepLarge, Sum>(job, begin, end);
  if (combine == kWeighted) return merge_any<KeepLarge, Weighted>(job, begin, end);
  return merge_any<KeepLarge, Plain>(job, begin, end);
}

namespace {

/// Inputs may stand at any byte; records are aligned.
template <class T>
PK_IN void copy_element(void* to, int64_t r, const void* from, int64_t e) {
  memcpy(static_cast<char*>(to) + r * int64_t(sizeof(T)),
         static_cast<const char*>(from) + e * int64_t(sizeof(T)), sizeof(T));
}

template <class T>
void record(const Merge& job, Records& records, int64_t i, uint32_t uncertain) {
  int64_t r = records.stored;
  for (; uncertain; uncertain &= uncertain - 1, r++) {
    const int64_t e = i + __builtin_ctz(uncertain);
    records.index[r] = e;
    if (job.base) copy_element<T>(records.base, r, job.base, e);
    for (int m = 0; m < job.n; m++) copy_element<T>(records.tuned[m], r, job.models[m].data, e);
  }
  records.stored = r;
}

/// Merges with every band's certain part; elements inside a band are merged as dropped and put on record.
template <class T, class Combine>
void fused(const Merge& job, Band* bands, Records& records, int64_t begin, int64_t end) {
  const F lambda = broadcast(job.lambda);
  const int n = job.n;
  Counter above[kMaxModels], at_least_low[kMaxModels];
  for (int64_t i = begin; i < end; i += kGroup) {
    const Pair base = load_or_zero<T>(job.base, i);
    Combine a, b;
    M open_a = at_least(broadcast(0u), broadcast(1u)), open_b = open_a;  // none
    for (int m = 0; m < n; m++) {
      const Model& model = job.models[m];
      const Pair x = load(static_cast<const T*>(model.data) + i);
      const Pair d = {x.a - base.a, x.b - base.b};
      const U ka = key(d.a), kb = key(d.b), low = broadcast(bands[m].low), high = broadcast(bands[m].high);
      const M la = at_least(ka, low), lb = at_least(kb, low);
      M ha = at_least(ka, high), hb = at_least(kb, high);
      above[m].add(ha, hb);
      if (bands[m].single) {
        at_least_low[m].add(la, lb);
        if (bands[m].keep_low) ha = la, hb = lb;
      } else {
        open_a = open_a | and_not(la, ha);
        open_b = open_b | and_not(lb, hb);
      }
      a.add(ha, d.a, model);
      b.add(hb, d.b, model);
    }
    put_as<T>(job.out_dtype, job.out, i, {base.a + lambda * a.value(), base.b + lambda * b.value()},
              job.stream);
    if (any(open_a, open_b)) {
      if (records.stored + kGroup <= records.capacity)
        record<T>(job, records, i, element_bits<T>(open_a, open_b));
      else
        records.overflow = true;
    }
  }
  for (int m = 0; m < n; m++) {
    bands[m].above += above[m].total();
    bands[m].at_least += at_least_low[m].total();
  }
  if (job.stream) fence();
}

template <class Combine>
void fused_any(const Merge& job, Band* bands, Records& records, int64_t begin, int64_t end) {
  if (job.dtype == kF32) return fused<float, Combine>(job, bands, records, begin, end);
  if (job.dtype == kBF16) return fused<bf16, Combine>(job, bands, records, begin, end);
  return fused<f16, Combine>(job, bands, records, begin, end);
}

}  // namespace

/// Elements [begin, end), a multiple of 128 of them.
void ties_fused(const Merge& job, int combine, Band* bands, Records* records, int64_t begin, int64_t end) {
  if (combine == kSum) return fused_any<Sum>(job, bands, *records, begin, end);
  if (combine == kWeighted) return fused_any<Weighted>(job, bands, *records, begin, end);
  return fused_any<Plain>(job, bands, *records, begin, end);
}

}  // namespace pk::cpu::PK_ISA
