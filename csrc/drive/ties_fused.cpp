// TIES in one pass: merge with speculated cuts, put on record what they leave open, resolve, patch.
//
// A sample brackets every model's k-th key. Keys at or above `high` are certainly kept, keys below `low`
// certainly dropped; an element with any key in between is recorded with its values. After the pass the
// counts are exact: they prove the bracket right, or the whole falls back to two passes. Where the bracket is
// one heavily tied value, nothing is recorded: the rule "index" guesses, chunk by chunk, whether equals are
// still kept, and chunks where the guess was wrong are merged again.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "isa.h"
#include "job.h"
#include "parallel.h"

namespace pk {
namespace {

using cpu::Band;
using cpu::kChunk;
using cpu::kTile;
using cpu::Records;

constexpr double kMostOpen = 0.04;       // of the elements on record; beyond it two passes are faster
constexpr size_t kPerThread = 16 << 20;  // bytes of records
constexpr int64_t kSmall = 65536;

/// What one thread writes: its records, in index order.
struct Slot {
  Scratch memory;
  Records records;

  Slot(size_t bytes, const Inputs& in) : memory(bytes) {
    const int64_t size = dtype_size(in.dtype);
    const int64_t tensors = in.n + (in.base != nullptr);
    records.capacity = int64_t(bytes) / (8 + size * tensors) - 64;
    records.stored = 0;
    records.overflow = false;
    char* at = memory.data();
    records.index = reinterpret_cast<int64_t*>(at);
    at += 8 * records.capacity;
    records.base = in.base ? at : nullptr;
    if (in.base) at += size * records.capacity;
    for (int m = 0; m < in.n; m++, at += size * records.capacity) records.tuned[m] = at;
  }
};

/// Running guess whether the equals of one model are still among the first `k - above`. Only speed depends on
/// it: the rate of the chunks seen so far is the better one, unless the sample says that they are not
/// typical.
class Expected {
 public:
  Expected() = default;
  Expected(int64_t k, const Bracket& b, double numel)
      : k_(double(k)), numel_(numel), above_(b.above * numel), sigma_(b.sigma * numel) {}

  void seen(int64_t elements, const Band& band) {
    elements_.fetch_add(elements, std::memory_order_relaxed);
    greater_.fetch_add(band.above, std::memory_order_relaxed);
    equal_.fetch_add(band.at_least - band.above, std::memory_order_relaxed);
  }
  bool keeps() const {
    const double part = double(elements_.load(std::memory_order_relaxed)) / numel_;
    const double rate = part > 0 ? double(greater_.load(std::memory_order_relaxed)) / part : above_;
    const double total = std::abs(rate - above_) < 3 * sigma_ ? rate : above_;
    return double(equal_.load(std::memory_order_relaxed)) < k_ - total;
  }

 private:
  double k_ = 0, numel_ = 1, above_ = 0, sigma_ = 0;
  std::atomic<int64_t> elements_{0}, greater_{0}, equal_{0};
};

class Fused {
 public:
  Fused(const Task& task, const int64_t* k, bool keep_equals)
      : task_(task), in_(task.in), k_(k), keep_equals_(keep_equals), job_(task), cuts_(size_t(task.in.n)) {}

  bool run() {
    if (!speculate()) return false;
    stream();
    if (!resolve()) return false;
    patch();
    repeat();
    return true;
  }

 private:
  /// Brackets and guesses; false where too much would stay open.
  bool speculate() {
    const std::vector<Brackets> found = brackets(in_, k_, task_.threads);
    double open = 0;
    for (int m = 0; m < in_.n; m++) {
      Band band{in_.data[m], 0, 0, false, true, 0, 0, nullptr, 0, 0};
      if (k_[m] <= 0) {
        band.low = band.high = kInfinity + 1;  // nothing but NaN is kept
      } else if (k_[m] < in_.numel) {
        const Bracket& b = found[size_t(m)].bold;
        if (b.high > kInfinity) return false;
        band.low = b.low;
        band.high = b.high + 1;
        band.single = b.single();
        if (!band.single) open += b.share;
        expected_.push_back(std::make_unique<Expected>(k_[m], b, double(in_.numel)));
      }
      bands_.push_back(band);
      if (expected_.size() < bands_.size()) expected_.push_back(std::make_unique<Expected>());
    }
    return open <= kMostOpen;
  }

  void stream() {
    const int64_t chunks = job_.chunks();
    const int threads = int(std::min<int64_t>(task_.threads, chunks));
    for (int s = 0; s < threads; s++) slots_.emplace_back(kPerThread, in_);
    equals_.resize(size_t(in_.n * chunks));
    kept_.resize(size_t(in_.n * chunks));
    std::vector<std::vector<int64_t>> above(size_t(threads), std::vector<int64_t>(size_t(in_.n)));
    parallel_chunks(chunks, threads, [&](int64_t c, int slot) {
      Band local[cpu::kMaxModels];
      for (int m = 0; m < in_.n; m++) {
        local[m] = bands_[size_t(m)];
        local[m].keep_low = keep_equals_ || expected_[size_t(m)]->keeps();
        kept_[size_t(m * chunks + c)] = local[m].keep_low;
      }
      chunk(job_.begin(c), job_.end(c), local, slots_[size_t(slot)].records);
      for (int m = 0; m < in_.n; m++) {
        above[size_t(slot)][size_t(m)] += local[m].above;
        equals_[size_t(m * chunks + c)] = local[m].at_least - local[m].above;
        expected_[size_t(m)]->seen(job_.end(c) - job_.begin(c), local[m]);
      }
    });
    above_.resize(size_t(in_.n));
    for (const auto& own : above)
      for (size_t m = 0; m < own.size(); m++) above_[m] += own[m];
  }

  /// Whole tiles by the fused kernel; the tensor's last few elements are counted and all put on record.
  void chunk(int64_t begin, int64_t end, Band* bands, Records& records) {
    const int64_t full = begin + (end - begin) / kTile * kTile;
    kernels().ties_fused(job_.merge, task_.combine, bands, &records, begin, full);
    if (full == end) return;
    if (records.stored + (end - full) > records.capacity) {
      records.overflow = true;
      return;
    }
    for (int m = 0; m < in_.n; m++) {
      Band counted = bands[m];
      counted.single = true;
      kernels().count_band(in_.dtype, in_.base, &counted, 1, full, end);
      bands[m].above = counted.above;
      bands[m].at_least = counted.at_least;
    }
    const size_t size = size_t(dtype_size(in_.dtype));
    const auto copy = [&](void* to, const void* from) {
      memcpy(static_cast<char*>(to) + size_t(records.stored) * size,
             static_cast<const char*>(from) + size_t(full) * size, size_t(end - full) * size);
    };
    if (in_.base) copy(records.base, in_.base);
    for (int m = 0; m < in_.n; m++) copy(records.tuned[m], in_.data[m]);
    for (int64_t i = full; i < end; i++) records.index[records.stored++] = i;
  }

  /// True cuts from exact counts; false where a bracket missed or the records ran over.
  bool resolve() {
    for (const Slot& s : slots_)
      if (s.records.overflow) return false;
    std::vector<char> good(size_t(in_.n));
    parallel_chunks(in_.n, task_.threads, [&](int64_t m, int) { good[size_t(m)] = resolve_one(int(m)); });
    return std::all_of(good.begin(), good.end(), [](char g) { return g != 0; });
  }

  bool resolve_one(int m) {
    Cut& cut = cuts_[size_t(m)];
    const int64_t k = k_[m], above = above_[size_t(m)];
    cut = {0, in_.numel};
    if (k <= 0) cut = {kNoneKept, -1};
    if (k <= 0 || k >= in_.numel) return true;
    if (above >= k) return false;
    return bands_[size_t(m)].single ? resolve_single(m, k - above, cut) : resolve_band(m, k - above, cut);
  }

  bool resolve_single(int m, int64_t keep, Cut& cut) const {
    const int64_t chunks = job_.chunks();
    const int64_t* equals = &equals_[size_t(m * chunks)];
    cut = {bands_[size_t(m)].low, in_.numel};
    int64_t c = 0, before = 0;
    for (; c < chunks && before + equals[c] < keep; c++) before += equals[c];
    if (c == chunks) return false;  // fewer than k keys in all: the value lies lower
    if (!keep_equals_)
      cut.last = kernels().nth_equal(in_.dtype, in_.base, in_.data[m], cut.key, keep - before, job_.begin(c),
                                     job_.end(c));
    return true;
  }

  bool resolve_band(int m, int64_t keep, Cut& cut) const {
    int64_t most = 0, found = 0;
    for (const Slot& s : slots_) most += s.records.stored;
    most += 64;  // compressed stores write whole vectors
    Scratch memory(size_t(most) * 12);
    auto* keys = reinterpret_cast<uint32_t*>(memory.data());
    uint32_t *places = keys + most, *spare = places + most;
    std::vector<int64_t> ends;
    const Band& band = bands_[size_t(m)];
    for (const Slot& s : slots_) {
      found += kernels().band_of_records(in_.dtype, s.records, m, band.low, band.high, keys + found,
                                         places + found);
      ends.push_back(found);
    }
    if (found < keep) return false;
    cut = {nth_largest(keys, found, keep - 1, spare), in_.numel};
    if (keep_equals_) return true;
    std::vector<int64_t> equals;
    int64_t greater = 0;
    for (size_t s = 0, i = 0; s < slots_.size(); s++)
      for (; i < size_t(ends[s]); i++) {
        greater += keys[i] > cut.key;
        if (keys[i] == cut.key) equals.push_back(slots_[s].records.index[places[i]]);
      }
    const auto wanted = equals.begin() + (keep - greater - 1);
    std::nth_element(equals.begin(), wanted, equals.end());
    cut.last = *wanted;
    return true;
  }

  /// Merges the records with the true cuts, as small tensors, and puts the results in their places.
  void patch() {
    const int64_t size = dtype_size(task_.out_dtype);
    parallel_chunks(int64_t(slots_.size()), task_.threads, [&](int64_t s, int) {
      const Records& records = slots_[size_t(s)].records;
      Scratch memory(size_t(records.stored * size) + 64);
      cpu::Model models[cpu::kMaxModels];
      std::vector<Cut> cuts = cuts_;
      cpu::Merge merge = job_.merge;
      merge.out = memory.data();
      merge.base = records.base;
      merge.models = models;
      merge.stream = false;
      merge.offset = 0;
      for (int m = 0; m < in_.n; m++) {
        models[m] = job_.models[m];
        models[m].data = records.tuned[m];
        Cut& cut = cuts[size_t(m)];  // in places of this list instead of elements of the tensor
        cut.last =
            std::upper_bound(records.index, records.index + records.stored, cut.last) - records.index - 1;
      }
      merge_with_cuts(merge, task_.combine, cuts.data(), 0, records.stored);
      if (size == 4)
        scatter<4>(static_cast<char*>(task_.out), memory.data(), records);
      else
        scatter<2>(static_cast<char*>(task_.out), memory.data(), records);
    });
  }

  /// The output may stand at any byte.
  template <int size>
  static void scatter(char* out, const char* values, const Records& records) {
    for (int64_t r = 0; r < records.stored; r++)
      memcpy(out + records.index[r] * size, values + r * size, size);
  }

  /// Chunks where a guess among equals was wrong, and those a cut runs through. Equals of value zero change
  /// nothing.
  void repeat() {
    const int64_t chunks = job_.chunks();
    std::vector<int64_t> wrong;
    for (int64_t c = 0; c < chunks; c++) {
      bool differs = false;
      for (int m = 0; m < in_.n; m++) {
        const Band& band = bands_[size_t(m)];
        if (!band.single || keep_equals_ || band.low == 0) continue;
        const int64_t edge = cuts_[size_t(m)].last + 1;
        const bool all = edge >= job_.end(c), none = edge <= job_.begin(c);
        differs |= kept_[size_t(m * chunks + c)] ? !all : !none;
      }
      if (differs) wrong.push_back(c);
    }
    parallel_chunks(int64_t(wrong.size()), task_.threads, [&](int64_t i, int) {
      const int64_t c = wrong[size_t(i)];
      merge_with_cuts(job_.merge, task_.combine, cuts_.data(), job_.begin(c), job_.end(c));
    });
  }

  const Task& task_;
  const Inputs& in_;
  const int64_t* k_;
  const bool keep_equals_;
  const Job job_;
  std::vector<Band> bands_;
  std::vector<std::unique_ptr<Expected>> expected_;  // per model
  std::vector<Slot> slots_;
  std::vector<int64_t> equals_, above_;  // [model][chunk], [model]
  std::vector<char> kept_;               // [model][chunk]: were equals kept?
  std::vector<Cut> cuts_;
};

}  // namespace

void ties_fused(const Task& task, const int64_t* k, bool keep_equals) {
  if (task.in.numel > kSmall && Fused(task, k, keep_equals).run()) return;
  std::vector<Cut> cuts = kth_magnitude(task.in, k, task.threads);
  if (keep_equals)
    for (Cut& cut : cuts)
      if (cut.last >= 0) cut.last = task.in.numel;
  ties_merge(task, cuts);
}

}  // namespace pk
