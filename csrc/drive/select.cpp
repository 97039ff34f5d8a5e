#include "select.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "isa.h"
#include "parallel.h"

namespace pk {
namespace {

using cpu::Band;
using cpu::kChunk;

constexpr int64_t kSmall = 65536;        // up to here every key is a candidate
constexpr int64_t kBand = 8;             // models that share one counting pass
constexpr size_t kPerThread = 12 << 20;  // bytes of candidates

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }
int64_t chunk_end(int64_t chunk, int64_t numel) { return std::min(numel, (chunk + 1) * kChunk); }

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

/// One counting pass over some models with their brackets; those that it settles leave `open`.
void settle_all(const Inputs& in, const int64_t* k, const std::vector<Bracket>& brackets,
                std::vector<int>& open, std::vector<Cut>& cuts, int threads) {
  std::vector<int> missed;
  for (size_t first = 0; first < open.size(); first += kBand) {
    const size_t n = std::min<size_t>(kBand, open.size() - first);
    std::vector<Band> bands;
    for (size_t i = 0; i < n; i++) {
      const Bracket& b = brackets[size_t(open[first + i])];
      bands.push_back({in.data[open[first + i]], b.low, b.high + 1, b.single(), true, 0, 0, nullptr, 0, 0});
    }
    const Pass pass = count(in, bands, threads);
    std::vector<char> good(n);
    parallel_chunks(int64_t(n), threads, [&](int64_t i, int) {
      const int m = open[first + size_t(i)];
      good[size_t(i)] = !pass.full && settle(in, pass, bands[size_t(i)], int(i), m, k[m], cuts[size_t(m)]);
    });
    for (size_t i = 0; i < n; i++)
      if (!good[i]) missed.push_back(open[first + i]);
  }
  open = missed;
}

}  // namespace

std::vector<Cut> kth_magnitude(const Inputs& in, const int64_t* k, int threads) {
  std::vector<Cut> cuts(size_t(in.n), Cut{0, in.numel - 1});
  std::vector<int> open;
  for (int m = 0; m < in.n; m++) {
    if (k[m] <= 0) cuts[size_t(m)] = {kNoneKept, -1};
    if (k[m] > 0 && k[m] < in.numel) open.push_back(m);
  }
  if (open.empty()) return cuts;
  std::vector<Bracket> bold(size_t(in.n), {0, kAbs, 1, 0, 0}), safe;
  if (in.numel > kSmall) {
    safe = bold;
    const std::vector<Brackets> found = brackets(in, k, threads);
    for (size_t m = 0; m < found.size(); m++) bold[m] = found[m].bold, safe[m] = found[m].safe;
  } else {
    threads = 1;  // waking the pool costs more than the work
  }
  settle_all(in, k, bold, open, cuts, threads);
  const auto same = [&](int m) {
    return safe.empty() ||
           (safe[size_t(m)].low == bold[size_t(m)].low && safe[size_t(m)].high == bold[size_t(m)].high);
  };
  std::vector<int> missed(open);  // the safe bracket of those that dared more
  missed.erase(std::remove_if(missed.begin(), missed.end(), same), missed.end());
  open.erase(std::remove_if(open.begin(), open.end(), std::not_fn(same)), open.end());
  settle_all(in, k, safe, missed, cuts, threads);
  open.insert(open.end(), missed.begin(), missed.end());
  for (const int m : open) cuts[size_t(m)] = with_key(in, m, by_radix(in, m, k[m], threads), k[m], threads);
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
