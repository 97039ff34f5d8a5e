#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "isa.h"
#include "parallel.h"
#include "select.h"

namespace pk {
namespace {

using cpu::kSampleGroup;

constexpr int kTogether = 8;          // models sampled at a time
constexpr int64_t kSampled = 262144;  // elements of the sample, at most an eighth of all
constexpr double kSigmas = 4;
constexpr double kHeavy = 1.5;  // times the share that a bracket of continuous keys holds
constexpr int kBins = 4096;

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

/// Standard deviation of the number of sampled keys above a quantile. Groups correlate (scale varies along
/// rows and heads), so it follows the variance between neighbouring groups.
double deviation(const uint32_t* keys, int64_t groups, double p, uint32_t quantile) {
  const double count = double(groups * kSampleGroup);
  double between = 0;
  int before = 0;
  for (int64_t g = 0; g < groups; g++) {
    int hits = 0;
    for (int i = 0; i < kSampleGroup; i++) hits += int32_t(keys[g * kSampleGroup + i]) >= int32_t(quantile);
    if (g) between += double(hits - before) * (hits - before);
    before = hits;
  }
  const double variance = 0.5 * between / double(std::max<int64_t>(1, groups - 1)) * double(groups);
  return std::sqrt(std::max(variance, count * p * (1 - p)));
}

/// The sampled keys around a rank, and brackets among them.
class Around {
 public:
  Around(const Sample& sample, double wanted, double sigma, uint32_t* spare)
      : count_(sample.count), wanted_(wanted), sigma_(sigma), near_(spare), room_(spare + sample.count) {
    const int64_t top = rank_above(kSigmas), bottom = rank_below(kSigmas);
    int64_t ignored;
    const int top_bin = top < 0 ? Sample::kCoarse - 1 : sample.find(top, above_);
    const int bottom_bin = bottom >= count_ ? 0 : sample.find(bottom, ignored);
    kept_ = keys_between(sample.keys, count_, uint32_t(bottom_bin) << Sample::kShift,
                         (uint32_t(top_bin) << Sample::kShift) + ((1u << Sample::kShift) - 1), near_);
  }

  /// The keys between the ranks that lie so many deviations above and below the wanted one (at most kSigmas).
  Bracket bracket(double up, double down) const {
    const int64_t top = rank_above(up), bottom = rank_below(down);
    Bracket b;
    b.high = top < 0 ? kAbs : nth_largest(near_, kept_, top - above_, room_);
    b.low = bottom >= count_ ? 0 : nth_largest(near_, kept_, bottom - above_, room_);
    int64_t inside = 0, greater = above_;
    for (int64_t i = 0; i < kept_; i++) {
      inside += near_[i] >= b.low && near_[i] <= b.high;
      greater += near_[i] > b.high;
    }
    b.share = double(inside) / double(count_);
    b.sigma = sigma_ / double(count_);
    b.above = double(greater) / double(count_);
    return b;
  }

 private:
  int64_t rank_above(double sigmas) const { return int64_t(std::floor(wanted_ - sigmas * sigma_ - 1)) - 1; }
  int64_t rank_below(double sigmas) const { return int64_t(std::ceil(wanted_ + sigmas * sigma_ + 1)); }

  int64_t count_;
  double wanted_, sigma_;
  uint32_t *near_, *room_;
  int64_t kept_ = 0, above_ = 0;  // keys in near_, sampled keys greater than all of them
};

/// Where a bracket holds far more keys than its width explains, heavy ties stand in it or at its edge: a
/// narrower one that is a single value, or that leaves them out on one side, is worth the small risk.
Brackets brackets_of(const uint32_t* keys, int64_t groups, double p, uint32_t* spare) {
  const Sample sample(keys, groups * kSampleGroup);
  const double wanted = p * double(sample.count);
  int64_t ignored;
  const int middle = sample.find(std::min(sample.count - 1, int64_t(wanted)), ignored);
  const Around around(sample, wanted, deviation(keys, groups, p, uint32_t(middle) << Sample::kShift), spare);
  Brackets b;
  b.safe = b.bold = around.bracket(kSigmas, kSigmas);
  const auto light = [&](const Bracket& x, double width) { return x.share <= kHeavy * width * x.sigma; };
  if (b.safe.single() || light(b.safe, 2 * kSigmas)) return b;
  constexpr double kBold[][2] = {{4, 2}, {2, 4}, {2, 2}, {4, 1}, {1, 4}, {1, 1}};
  for (const auto& [up, down] : kBold) {
    const Bracket x = around.bracket(up, down);
    if (x.single() || (up + down >= 4 && light(x, up + down))) {
      b.bold = x;
      break;
    }
  }
  return b;
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

std::vector<Brackets> brackets(const Inputs& in, const int64_t* k, int threads) {
  constexpr int64_t kParts = 4;  // of one model's sample, so that few models still keep all threads busy
  const int64_t groups =
      std::max<int64_t>(kParts, std::min(kSampled, in.numel / 8) / kSampleGroup / kParts * kParts);
  const int64_t count = groups * kSampleGroup;
  const std::vector<int64_t> starts = sample_starts(in.numel, groups);
  const Bracket everything{0, kAbs, 1, 0, 0};
  std::vector<Brackets> found(size_t(in.n), {everything, everything});
  const cpu::Kernels& kernel = kernels();
  for (int first = 0; first < in.n; first += kTogether) {
    const int n = std::min(kTogether, in.n - first);
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
      found[size_t(first + m)] = brackets_of(mine, groups, double(wanted) / double(in.numel), mine + count);
    });
  }
  return found;
}

}  // namespace pk
