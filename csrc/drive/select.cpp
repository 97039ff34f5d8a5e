#include "select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "isa.h"
#include "process.h"

namespace pk {
namespace {

using cpu::Band;
using cpu::kChunk;
using cpu::kSampleGroup;

constexpr int64_t kSmall = 65536;        // up to here every key is a candidate
constexpr int64_t kBand = 8;             // models that share one counting pass
constexpr size_t kPerThread = 12 << 20;  // bytes of candidates
constexpr int64_t kSampled = 262144;     // elements of the sample, at most an eighth of all
constexpr double kSigmas = 4;
constexpr int kBins = 4096;

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }
int64_t chunk_end(int64_t chunk, int64_t numel) { return std::min(numel, (chunk + 1) * kChunk); }

/// Counts per bin of (key - min) >> shift, two tables so that equal neighbours do not wait for each other.
struct Bins {
  uint32_t min, max;
  int shift = 0;
  int64_t count[kBins];

  Bins(const uint32_t* keys, int64_t n) {
    min = max = keys[0];
    for (int64_t i = 1; i < n; i++) {
      min = std::min(min, keys[i]);
      max = std::max(max, keys[i]);
    }
    while ((max - min) >> shift >= kBins) shift++;
    uint32_t even[kBins] = {}, odd[kBins] = {};
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
      even[(keys[i] - min) >> shift]++;
      odd[(keys[i + 1] - min) >> shift]++;
    }
    if (i < n) even[(keys[i] - min) >> shift]++;
    for (int b = 0; b < kBins; b++) count[b] = int64_t(even[b]) + odd[b];
  }
  /// The bin of a rank; `above` becomes the number of keys in higher bins.
  int find(int64_t rank, int64_t& above) const {
    int b = kBins - 1;
    for (above = 0; above + count[b] <= rank; b--) above += count[b];
    return b;
  }
};

int64_t keys_between(const uint32_t* keys, int64_t n, uint32_t low, uint32_t high, uint32_t* out) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    out[kept] = keys[i];
    kept += keys[i] >= low && keys[i] <= high;
  }
  return kept;
}

/// Random place of a stratum's group: xorshift with a fixed seed, so every run samples the same elements.
std::vector<int64_t> sample_starts(int64_t numel, int64_t groups) {
  std::vector<int64_t> starts(static_cast<size_t>(groups));
  uint64_t x = 0x9E3779B97F4A7C15ull;
  for (int64_t g = 0; g < groups; g++) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    const int64_t from = numel / groups * g, room = numel / groups - kSampleGroup;
    starts[size_t(g)] = from + int64_t(x % uint64_t(room + 1));
  }
  return starts;
}

/// A coarse histogram of a sample: 64 bins per power of two, enough to cut out the few keys around a rank.
struct Sample {
  static constexpr int kShift = 17, kCoarse = 1 << (31 - kShift);
  const uint32_t* keys;
  int64_t count;
  std::vector<uint32_t> bins = std::vector<uint32_t>(2 * kCoarse);

  Sample(const uint32_t* k, int64_t n) : keys(k), count(n) {  // two tables: equal neighbours do not wait
    uint32_t *even = bins.data(), *odd = even + kCoarse;
    for (int64_t i = 0; i < n; i += 2) {
      even[k[i] >> kShift]++;
      odd[k[i + 1] >> kShift]++;
    }
    for (int b = 0; b < kCoarse; b++) even[b] += odd[b];
  }
  /// The bin of a rank from the largest; `above` becomes the number of keys in higher bins.
  int find(int64_t rank, int64_t& above) const {
    int b = kCoarse - 1;
    for (above = 0; b > 0 && above + bins[size_t(b)] <= rank; b--) above += bins[size_t(b)];
    return b;
  }
};

/// Groups correlate (scale varies along rows and heads), so the width follows the variance between
/// neighbours.
Bracket bracket_of(const uint32_t* keys, int64_t groups, double p, uint32_t* spare) {
  const int64_t count = groups * kSampleGroup;
  const Sample sample(keys, count);
  const double wanted = p * double(count);
  int64_t above, ignored;
  const uint32_t middle = uint32_t(sample.find(std::min(count - 1, int64_t(wanted)), ignored))
                          << Sample::kShift;
  double between = 0;
  int before = 0;
  for (int64_t g = 0; g < groups; g++) {
    int hits = 0;
    for (int i = 0; i < kSampleGroup; i++) hits += int32_t(keys[g * kSampleGroup + i]) >= int32_t(middle);
    if (g) between += double(hits - before) * (hits - before);
    before = hits;
  }
  const double variance = 0.5 * between / double(std::max<int64_t>(1, groups - 1)) * double(groups);
  const double sigma = std::sqrt(std::max(variance, double(count) * p * (1 - p)));
  const int64_t top = int64_t(std::floor(wanted - kSigmas * sigma - 1)) - 1;
  const int64_t bottom = int64_t(std::ceil(wanted + kSigmas * sigma + 1));
  const int top_bin = top < 0 ? Sample::kCoarse - 1 : sample.find(top, above);
  if (top < 0) above = 0;
  const int bottom_bin = bottom >= count ? 0 : sample.find(bottom, ignored);
  uint32_t *near = spare, *room = spare + count;
  const int64_t kept =
      keys_between(keys, count, uint32_t(bottom_bin) << Sample::kShift,
                   (uint32_t(top_bin) << Sample::kShift) + ((1u << Sample::kShift) - 1), near);
  Bracket b;
  b.high = top < 0 ? kAbs : nth_largest(near, kept, top - above, room);
  b.low = bottom >= count ? 0 : nth_largest(near, kept, bottom - above, room);
  int64_t inside = 0, equal = 0;
  for (int64_t i = 0; i < kept; i++) {
    inside += near[i] >= b.low && near[i] <= b.high;
    above += near[i] > b.high;
    equal += near[i] == b.high;
  }
  b.share = double(inside) / double(count);
  b.above = double(above) / double(count);
  b.sigma = sigma / double(count);
  return b;
}

/// What one counting pass over up to kBand models leaves behind.
struct Pass {
  std::vector<int64_t> above, at_least;  // per model
  std::vector<int64_t> equals;           // single: [model][chunk] keys equal to low
  struct Range {
    int slot;
    int64_t begin, end;
  };
  std::vector<Range> ranges;                 // band: [model][chunk] candidates
  std::vector<std::vector<uint32_t*>> keys;  // [slot][model]
  std::vector<Scratch> memory;
  bool full = false;
};

Pass count(const Inputs& in, const std::vector<Band>& bands, int threads) {
  const int n = int(bands.size());
  const int64_t chunks = chunks_of(in.numel);
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, chunks)));
  bool compacts = false;
  for (const Band& b : bands) compacts |= !b.single;
  const int64_t most = in.numel + cpu::kBlock + 64;
  const int64_t capacity = std::min<int64_t>(most, int64_t(kPerThread / 4) / n);
  Pass pass;
  pass.above.resize(size_t(n));
  pass.at_least.resize(size_t(n));
  pass.equals.resize(size_t(n * chunks));
  pass.ranges.resize(size_t(n * chunks));
  std::vector<std::vector<Band>> own(size_t(threads), bands);
  for (int s = 0; s < threads; s++) {
    pass.keys.emplace_back(size_t(n), nullptr);
    if (!compacts) continue;
    pass.memory.emplace_back(size_t(capacity) * 4 * size_t(n));
    for (int m = 0; m < n; m++) {
      own[size_t(s)][size_t(m)].keys = pass.keys.back()[size_t(m)] =
          reinterpret_cast<uint32_t*>(pass.memory.back().data()) + m * capacity;
      own[size_t(s)][size_t(m)].capacity = capacity;
    }
  }
  const cpu::Kernels& k = kernels();
  parallel_chunks(chunks, threads, [&](int64_t c, int slot) {
    Band local[kBand];
    std::vector<Band>& mine = own[size_t(slot)];
    for (int m = 0; m < n; m++) {
      local[m] = mine[size_t(m)];
      local[m].above = local[m].at_least = 0;
    }
    k.count_band(in.dtype, in.base, local, n, c * kChunk, chunk_end(c, in.numel));
    for (int m = 0; m < n; m++) {
      Band& total = mine[size_t(m)];
      pass.equals[size_t(m * chunks + c)] = local[m].at_least - local[m].above;
      pass.ranges[size_t(m * chunks + c)] = {slot, total.stored, local[m].stored};
      total.above += local[m].above;
      total.at_least += local[m].at_least;
      total.stored = local[m].stored;
    }
  });
  for (const auto& mine : own)
    for (int m = 0; m < n; m++) {
      pass.above[size_t(m)] += mine[size_t(m)].above;
      pass.at_least[size_t(m)] += mine[size_t(m)].at_least;
      pass.full |= !mine[size_t(m)].single && mine[size_t(m)].stored == mine[size_t(m)].capacity;
    }
  return pass;
}

/// Flat index of the last kept equal: `keep` of them in index order, counted per chunk.
int64_t locate(const Inputs& in, int model, uint32_t key, int64_t keep, const int64_t* equals) {
  const int64_t chunks = chunks_of(in.numel);
  for (int64_t c = 0; c < chunks; c++) {
    if (keep <= equals[c])
      return kernels().nth_equal(in.dtype, in.base, in.data[model], key, keep, c * kChunk,
                                 chunk_end(c, in.numel));
    keep -= equals[c];
  }
  return in.numel - 1;
}

/// Radix: two rounds of 16 bits. Always ends, needs no luck.
uint32_t by_radix(const Inputs& in, int model, int64_t k, int threads) {
  const Inputs one{in.dtype, in.base, in.data + model, 1, in.numel};
  uint32_t prefix = 0;
  for (int shift = 16; shift >= 0; shift -= 16) {
    std::vector<int64_t> bins(65536);
    histogram(one, shift, shift ? nullptr : &prefix, bins.data(), threads);
    uint32_t b = 65535;
    for (; bins[b] < k; b--) k -= bins[b];
    prefix = prefix << 16 | b;
  }
  return prefix;
}

/// The cut of a model whose key is known.
Cut with_key(const Inputs& in, int model, uint32_t key, int64_t k, int threads) {
  Band band{in.data[model], key, key + 1, true, true, 0, 0, nullptr, 0, 0};
  const Pass pass = count(in, {band}, threads);
  return {key, locate(in, model, key, k - pass.above[0], pass.equals.data())};
}

/// The cut of model i of a pass, or false where the bracket missed.
bool settle(const Inputs& in, const Pass& pass, const Band& band, int i, int model, int64_t k, Cut& cut) {
  const int64_t chunks = chunks_of(in.numel), above = pass.above[size_t(i)];
  if (above >= k || pass.at_least[size_t(i)] < k) return false;
  if (band.single) {
    cut = {band.low, locate(in, model, band.low, k - above, &pass.equals[size_t(i * chunks)])};
    return true;
  }
  const int64_t found = pass.at_least[size_t(i)] - above;
  Scratch memory(size_t(found) * 8);
  auto* all = reinterpret_cast<uint32_t*>(memory.data());
  int64_t at = 0;
  const Pass::Range* ranges = &pass.ranges[size_t(i * chunks)];
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t size = ranges[c].end - ranges[c].begin;
    memcpy(all + at, pass.keys[size_t(ranges[c].slot)][size_t(i)] + ranges[c].begin, size_t(size) * 4);
    at += size;
  }
  cut.key = nth_largest(all, found, k - above - 1, all + found);
  int64_t greater = above;
  std::vector<int64_t> equals(static_cast<size_t>(chunks));
  for (int64_t c = 0, j = 0; c < chunks; c++)
    for (const int64_t stop = j + ranges[c].end - ranges[c].begin; j < stop; j++) {
      greater += all[j] > cut.key;
      equals[size_t(c)] += all[j] == cut.key;
    }
  cut.last = locate(in, model, cut.key, k - greater, equals.data());
  return true;
}

}  // namespace

uint32_t nth_largest(const uint32_t* keys, int64_t count, int64_t rank, uint32_t* spare) {
  for (;;) {
    if (count < kBins) {
      if (keys != spare) memcpy(spare, keys, size_t(count) * 4);
      std::nth_element(spare, spare + rank, spare + count, std::greater<uint32_t>());
      return spare[rank];
    }
    const Bins bins(keys, count);
    int64_t above;
    const int b = bins.find(rank, above);
    const uint32_t low = bins.min + (uint32_t(b) << bins.shift);
    if (bins.shift == 0) return low;
    rank -= above;
    count = keys_between(keys, count, low, low + ((1u << bins.shift) - 1), spare);
    keys = spare;  // compacting in place is safe: it never writes ahead of what it reads
  }
}

std::vector<Bracket> brackets(const Inputs& in, const int64_t* k, int threads) {
  constexpr int64_t kParts = 4;  // of one model's sample, so that few models still keep all threads busy
  const int64_t groups =
      std::max<int64_t>(kParts, std::min(kSampled, in.numel / 8) / kSampleGroup / kParts * kParts);
  const int64_t count = groups * kSampleGroup;
  const std::vector<int64_t> starts = sample_starts(in.numel, groups);
  std::vector<Bracket> found(size_t(in.n), {0, kAbs, 1, 0, 0});
  const cpu::Kernels& kernel = kernels();
  for (int first = 0; first < in.n; first += int(kBand)) {
    const int n = std::min(int(kBand), in.n - first);
    Scratch memory(size_t(count) * 12 * size_t(n));  // per model: keys, and twice as much to work in
    auto* keys = reinterpret_cast<uint32_t*>(memory.data());
    parallel_chunks(n * kParts, threads, [&](int64_t part, int) {
      const int64_t m = part / kParts, from = part % kParts * (groups / kParts);
      kernel.gather_keys(in.dtype, in.base, in.data[first + m], starts.data() + from, groups / kParts,
                         keys + m * 3 * count + from * kSampleGroup);
    });
    parallel_chunks(n, threads, [&](int64_t m, int) {
      const int64_t wanted = k[first + m];
      if (wanted <= 0 || wanted >= in.numel) return;
      uint32_t* mine = keys + m * 3 * count;
      found[size_t(first + m)] = bracket_of(mine, groups, double(wanted) / double(in.numel), mine + count);
    });
  }
  return found;
}

std::vector<Cut> kth_magnitude(const Inputs& in, const int64_t* k, int threads) {
  std::vector<Cut> cuts(size_t(in.n), Cut{0, in.numel - 1});
  std::vector<int> open;
  for (int m = 0; m < in.n; m++) {
    if (k[m] <= 0) cuts[size_t(m)] = {kNoneKept, -1};
    if (k[m] > 0 && k[m] < in.numel) open.push_back(m);
  }
  if (open.empty()) return cuts;
  std::vector<Bracket> found;
  if (in.numel > kSmall)
    found = brackets(in, k, threads);
  else
    threads = 1;  // waking the pool costs more than the work
  for (size_t first = 0; first < open.size(); first += kBand) {
    const size_t n = std::min<size_t>(kBand, open.size() - first);
    std::vector<Band> bands;
    for (size_t i = 0; i < n; i++) {
      const int m = open[first + i];
      const Bracket b = found.empty() ? Bracket{0, kAbs, 1, 0, 0} : found[size_t(m)];
      bands.push_back({in.data[m], b.low, b.high + 1, b.low == b.high, true, 0, 0, nullptr, 0, 0});
    }
    const Pass pass = count(in, bands, threads);
    parallel_chunks(int64_t(n), pass.full ? 1 : threads, [&](int64_t i, int) {
      const int m = open[first + size_t(i)];
      Cut& cut = cuts[size_t(m)];
      if (pass.full || !settle(in, pass, bands[size_t(i)], int(i), m, k[m], cut)) cut = {kNoneKept, -2};
    });
    for (size_t i = 0; i < n; i++) {
      const int m = open[first + i];
      if (cuts[size_t(m)].last == -2)
        cuts[size_t(m)] = with_key(in, m, by_radix(in, m, k[m], threads), k[m], threads);
    }
  }
  return cuts;
}

void histogram(const Inputs& in, int shift, const uint32_t* prefix, int64_t* bins, int threads) {
  const cpu::Kernels& kernel = kernels();
  memset(bins, 0, size_t(in.n) * 65536 * sizeof(int64_t));
  for (int m = 0; m < in.n; m++) {
    std::vector<std::vector<int64_t>> own(size_t(threads), std::vector<int64_t>(65536));
    parallel_chunks(chunks_of(in.numel), threads, [&](int64_t c, int slot) {
      kernel.histogram(in.dtype, in.base, in.data[m], shift, prefix == nullptr, prefix ? prefix[m] : 0,
                       own[size_t(slot)].data(), c * kChunk, chunk_end(c, in.numel));
    });
    for (const auto& one : own)
      for (int b = 0; b < 65536; b++) bins[m * 65536 + b] += one[size_t(b)];
  }
}

}  // namespace pk
