// Passes of the search for the k-th magnitude: sample, count and compact, histogram, locate an equal.
// Traffic: count_band reads base and n tuned tensors once: (n + 1) * numel * sizeof(T), and writes 4 bytes
// per key in the band (about 1 % of the elements). The histogram reads base and one tuned tensor per round.
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

template <class T>
PK_IN uint32_t element_key(const void* base, const void* data, int64_t i) {
  return float_bits(element<T>(data, i) - element<T>(base, i)) & kAbs;
}
template <class T>
PK_IN void pair_keys(const void* base, const void* data, int64_t i, U& a, U& b) {
  const Pair x = load(static_cast<const T*>(data) + i), zero = load_or_zero<T>(base, i);
  a = key(x.a - zero.a);
  b = key(x.b - zero.b);
}

/// Element numbers of the lanes of half 0 or 1 of the pair that starts at element i.
template <class T>
PK_IN U lane_numbers(uint32_t i, uint32_t half) {
  uint32_t n[kLanes];
  for (uint32_t l = 0; l < kLanes; l++) n[l] = i + (kParted<T> ? 2 * l + half : l + half * kLanes);
  return load_words(n);
}

/// One value: count the equals and those above. No key is written.
template <class T>
void count_single(const void* base, Band& band, int64_t begin, int64_t end) {
  const U low = broadcast(band.low), high = broadcast(band.high);
  Counter above, at_least_low;
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    U a, b;
    pair_keys<T>(base, band.data, i, a, b);
    above.add(at_least(a, high), at_least(b, high));
    at_least_low.add(at_least(a, low), at_least(b, low));
  }
  band.above += above.total();
  band.at_least += at_least_low.total();
  for (; i < end; i++) {
    const uint32_t k = element_key<T>(base, band.data, i);
    band.above += k >= band.high;
    band.at_least += k >= band.low;
  }
}

/// A band: count those above it, write the keys in it. at_least is then above + stored.
template <class T>
void count_and_compact(const void* base, Band& band, int64_t begin, int64_t end) {
  const U low = broadcast(band.low), high = broadcast(band.high);
  Counter above;
  int64_t i = begin, stored = band.stored;
  for (; i + kGroup <= end; i += kGroup) {
    U a, b;
    pair_keys<T>(base, band.data, i, a, b);
    const M ha = at_least(a, high), hb = at_least(b, high);
    const M in_a = and_not(at_least(a, low), ha), in_b = and_not(at_least(b, low), hb);
    above.add(ha, hb);
    if (any(in_a, in_b)) {
      stored += compress(band.keys + stored, in_a, a);
      stored += compress(band.keys + stored, in_b, b);
    }
  }
  int64_t higher = above.total();
  for (; i < end; i++) {
    const uint32_t k = element_key<T>(base, band.data, i);
    higher += k >= band.high;
    if (k >= band.low && k < band.high) band.keys[stored++] = k;
  }
  band.above += higher;
  band.at_least += higher + stored - band.stored;
  band.stored = stored;
}

template <class T>
void count(const void* base, Band* bands, int n, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;
       at += kBlock) {  // model by model: few streams, and the base block stays cached
    const int64_t stop = at + kBlock < end ? at + kBlock : end;
    for (int m = 0; m < n; m++) {
      Band& band = bands[m];
      if (band.single)
        count_single<T>(base, band, at, stop);
      else if (band.stored + kBlock + kGroup <= band.capacity)
        count_and_compact<T>(base, band, at, stop);
      else
        band.stored = band.capacity;  // full: the driver sees it and falls back
    }
  }
}

template <class T>
void gather(const void* base, const void* data, const int64_t* starts, int64_t groups, uint32_t* keys) {
  for (int64_t g = 0; g < groups; g++) {
    if (g + 8 < groups) {
      __builtin_prefetch(static_cast<const T*>(data) + starts[g + 8]);
      if (base) __builtin_prefetch(static_cast<const T*>(base) + starts[g + 8]);
    }
    for (int i = 0; i < kSampleGroup; i += kGroup) {
      U a, b;
      pair_keys<T>(base, data, starts[g] + i, a, b);
      store(keys + g * kSampleGroup + i, a);
      store(keys + g * kSampleGroup + i + kLanes, b);
    }
  }
}

/// Keys of one model's records that lie in its band, and which records they are, in no particular order.
template <class T>
int64_t in_band(const Records& records, int model, uint32_t low, uint32_t high, uint32_t* keys,
                uint32_t* places) {
  const void* data = records.tuned[model];
  const U from = broadcast(low), to = broadcast(high);
  int64_t stored = 0, i = 0;
  for (; i + kGroup <= records.stored; i += kGroup) {
    U a, b;
    pair_keys<T>(records.base, data, i, a, b);
    const M in_a = and_not(at_least(a, from), at_least(a, to)),
            in_b = and_not(at_least(b, from), at_least(b, to));
    compress(places + stored, in_a, lane_numbers<T>(uint32_t(i), 0));
    stored += compress(keys + stored, in_a, a);
    compress(places + stored, in_b, lane_numbers<T>(uint32_t(i), 1));
    stored += compress(keys + stored, in_b, b);
  }
  for (; i < records.stored; i++) {
    const uint32_t k = element_key<T>(records.base, data, i);
    keys[stored] = k;
    places[stored] = uint32_t(i);
    stored += k >= low && k < high;
  }
  return stored;
}

template <class T>
void bin(const void* base, const void* data, int shift, bool all, uint32_t prefix, int64_t* bins,
         int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const uint32_t k = element_key<T>(base, data, i);
    if (all || uint64_t(k) >> (shift + 16) == prefix) bins[(k >> shift) & 0xFFFFu]++;
  }
}

template <class T>
int64_t nth(const void* base, const void* data, uint32_t wanted, int64_t n, int64_t begin, int64_t end) {
  const U target = broadcast(wanted);
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {  // skip groups that hold too few equals
    U a, b;
    pair_keys<T>(base, data, i, a, b);
    const int found = __builtin_popcount(bits(equal(a, target)) | bits(equal(b, target)) << kLanes);
    if (found >= n) break;
    n -= found;
  }
  for (; i < end; i++)
    if (element_key<T>(base, data, i) == wanted && --n == 0) return i;
  return -1;
}

}  // namespace

#define PK_BY_DTYPE(call) (dtype == kF32 ? call<float> : dtype == kBF16 ? call<bf16> : call<f16>)

void count_band(int dtype, const void* base, Band* bands, int n, int64_t begin, int64_t end) {
  PK_BY_DTYPE(count)(base, bands, n, begin, end);
}
void gather_keys(int dtype, const void* base, const void* data, const int64_t* starts, int64_t groups,
                 uint32_t* keys) {
  PK_BY_DTYPE(gather)(base, data, starts, groups, keys);
}
int64_t band_of_records(int dtype, const Records& records, int model, uint32_t low, uint32_t high,
                        uint32_t* keys, uint32_t* places) {
  return PK_BY_DTYPE(in_band)(records, model, low, high, keys, places);
}
void histogram(int dtype, const void* base, const void* data, int shift, bool all, uint32_t prefix,
               int64_t* bins, int64_t begin, int64_t end) {
  PK_BY_DTYPE(bin)(base, data, shift, all, prefix, bins, begin, end);
}
int64_t nth_equal(int dtype, const void* base, const void* data, uint32_t key, int64_t n, int64_t begin,
                  int64_t end) {
  return PK_BY_DTYPE(nth)(base, data, key, n, begin, end);
}

}  // namespace pk::cpu::PK_ISA
