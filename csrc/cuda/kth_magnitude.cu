// The exact k-th largest |delta| of every model, and the flat index of the last one kept among its equals.
// Traffic: reads base and n tuned tensors once, (n + 1) * numel * sizeof(T), and a sample of them; writes and
// re-reads 8 bytes for the 1 to 4 % of elements that a sample leaves open. No host takes part.
//
// 1. sample: 16384 magnitudes per model bracket the wanted rank between two of them, five sigmas wide.
// 2. count: one pass counts keys above, at and between the brackets' ends, and stores those between. Ends
//    are only counted: in 16-bit types the heavily tied values end up there.
// 3. refine: the stored key of the rank that is left, digit by digit; the last block to finish picks it.
// 4. finish: the equal that is kept last, from counts of equals per tile. A bracket that missed (one in a
//    million) or overflowed is searched anew by one block, slowly.
#include "block.h"
#include "kernels.h"
#include "stage.h"
#include "tile.h"

namespace pk::cuda {
namespace {

constexpr int kSample = 16384, kSampleThreads = 1024;
constexpr int kGathered = 8;  // sampled elements that a thread has under way at a time
constexpr int kPart = 16384;  // stored keys that one block refines
constexpr double kSigmas = 5;
constexpr int64_t kKeepAllEquals = int64_t(1) << 62;
constexpr uint32_t kNoneKept = 0xFFFFFFFFu;

/// One model's search, on a cache line of its own: all blocks add to it.
struct __align__(128) Band {
  uint32_t low, high, prefix;
  unsigned tickets;
  Count above, at_high, at_low, stored;  // keys > high, == high, == low, and between the two
  int64_t rank;                          // among the stored keys that share the prefix
};

PK_HD int64_t capacity_of(int64_t numel) { return numel <= kSample ? 0 : numel / 16 + 4096; }

/// Where one model's search keeps its state in a job's scratch memory.
struct Search {
  Band* band;
  unsigned *bins, *ends, *inside;  // ends: equals of high and low (16 bits each) per tile
  uint32_t *keys, *owners;         // of the stored: key and tile
  int64_t capacity, tiles, rank;

  __device__ Search(const Head& head, const Model& model, int m) {
    tiles = tiles_of(head.numel);
    capacity = capacity_of(head.numel);
    rank = model.rank;
    band = reinterpret_cast<Band*>(head.scratch) + m;
    bins = reinterpret_cast<unsigned*>(head.scratch + head.n * int64_t(sizeof(Band))) + m * kBins;
    unsigned* rest = bins + (head.n - m) * kBins;
    ends = rest + m * tiles;
    inside = rest + (head.n + m) * tiles;
    keys = rest + 2 * head.n * tiles + m * capacity;
    owners = keys + head.n * capacity;
  }
};

enum Where { kNone, kHigh, kInside, kLow, kMissed };

/// Where the wanted key lies once all are counted; `rank` becomes that among its equals, or the stored.
__device__ Where decide(const Search& s, int64_t& rank) {
  const Band& band = *s.band;
  rank = s.rank;
  if (rank <= 0) return kNone;
  rank -= int64_t(band.above);
  if (rank <= 0) return kMissed;
  if (rank <= int64_t(band.at_high)) return kHigh;
  rank -= int64_t(band.at_high);
  if (rank <= int64_t(band.stored)) return int64_t(band.stored) > s.capacity ? kMissed : kInside;
  rank -= int64_t(band.stored);
  return rank <= int64_t(band.at_low) ? kLow : kMissed;
}

__device__ inline const Job& job_of(const Table& table, unsigned number) {
  return *reinterpret_cast<const Job*>(table.jobs ? table.jobs + number * table.stride
                                                  : reinterpret_cast<const char*>(&table.one));
}

template <class T>
__device__ float element(const void* data, int64_t i, int alignment) {
  const char* place = static_cast<const char*>(data) + i * int64_t(sizeof(T));
  T x;
  if (alignment == kBytes)
    memcpy(&x, place, sizeof(T));
  else
    x = *reinterpret_cast<const T*>(place);
  return widen(x);
}

template <class T>
__device__ uint32_t key_at(const Head& head, const Model& model, int64_t i) {
  const float base = head.base ? element<T>(head.base, i, head.in_alignment) : 0;
  return magnitude_key(element<T>(model.data, i, head.in_alignment) - base);
}

/// A place in the i-th of kSample equal parts of the tensor: neither a pattern along rows nor one along
/// columns is met again and again.
__device__ inline int64_t sampled(int64_t i, int64_t numel) {
  if (numel <= kSample) return i;
  uint32_t h = uint32_t(i) * 0x9E3779B9u;
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  h ^= h >> 16;
  const int64_t begin = i * numel / kSample, width = (i + 1) * numel / kSample - begin;
  return begin + int64_t((uint64_t(h) * uint64_t(width)) >> 32);
}

/// Keys of the sample, many loads under way at a time: nobody else hides their latency here.
template <class T>
__device__ void gather(uint32_t* keys, int count, const Head& head, const Model& model) {
  const void *base = head.base, *data = model.data;
  const int64_t numel = head.numel;
  const int alignment = head.in_alignment;
  for (int first = int(threadIdx.x); first < count; first += kSampleThreads * kGathered) {
    float x[kGathered], zero[kGathered];
#pragma unroll
    for (int g = 0; g < kGathered; g++) {
      const int i = first + g * kSampleThreads;
      const int64_t place = sampled(i < count ? i : first, numel);
      x[g] = element<T>(data, place, alignment);
      zero[g] = base ? element<T>(base, place, alignment) : 0;
    }
#pragma unroll
    for (int g = 0; g < kGathered; g++)
      if (first + g * kSampleThreads < count)
        keys[first + g * kSampleThreads] = magnitude_key(x[g] - zero[g]);
  }
}

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 1) sample(const __grid_constant__ Table table) {
  PK_DYNAMIC_SHARED(uint32_t, keys);
  const Job& job = job_of(table, blockIdx.y);
  const Head& head = job.head;
  const Model& model = job.models[blockIdx.x];
  const Search s(head, model, int(blockIdx.x));
  for (int b = int(threadIdx.x); b < kBins; b += kSampleThreads) s.bins[b] = 0;
  const int count = int(head.numel < kSample ? head.numel : kSample);
  gather<T>(keys, count, head, model);
  __syncthreads();
  const double density = double(model.rank) / double(head.numel), wanted = density * count;
  const double margin = head.numel <= kSample ? 0 : kSigmas * sqrt(wanted * (1 - density)) + kSigmas;
  int64_t high = int64_t(floor(wanted - margin)), low = int64_t(ceil(wanted + margin));
  if (head.numel <= kSample) high = low = model.rank;
  uint32_t high_key = kNoneKept, low_key = 0;
  const auto key = [&](int64_t i) { return keys[i]; };
  if (high >= 1) high_key = select_key(count, high, key);
  if (low <= count && model.rank > 0)
    low_key = head.numel <= kSample ? high_key : select_key(count, low, key);
  if (threadIdx.x == 0) *s.band = Band{low_key, high_key, 0, 0, 0, 0, 0, 0, 0};
}

/// What a thread holds of a tile of one tensor: 16 elements.
template <class T>
struct Held {
  using Layout = Contiguous<T>;
  static constexpr int kWidth = Layout::kWidth, kElements = kTile / kThreads;
  Raw<T, kWidth> raw[kElements / kWidth];

  __device__ static int place(int e) {
    return Layout::at(Layout::first(int(threadIdx.x) + e / kWidth * kThreads), e % kWidth);
  }
  __device__ void load_tile(const void* data, int64_t begin, int size, int alignment) {
    const char* tile = static_cast<const char*>(data) + begin * int64_t(sizeof(T));
#pragma unroll
    for (int e = 0; e < kElements; e += kWidth)
      raw[e / kWidth] = load<T, Layout>(tile, place(e), size, alignment);
  }
  __device__ float at(int e) const { return widen(raw[e / kWidth].x[e % kWidth]); }
};

/// Keys of one thread's elements against a band: counts of those above, at high, at low and between (16 bits
/// each); `between` gets a bit per element.
template <class T>
__device__ __forceinline__ Count classify(const Held<T>& x, const Held<T>& base, int size, const Band& band,
                                          uint32_t& between) {
  const uint32_t low = band.low, high = band.high;
  Count counts = 0;
  between = 0;
#pragma unroll
  for (int e = 0; e < Held<T>::kElements; e++) {
    const uint32_t key = magnitude_key(x.at(e) - base.at(e));
    const bool here = Held<T>::place(e) < size, open = here && key > low && key < high;
    counts += Count(here && key > high) + (Count(here && key == high) << 16) +
              (Count(here && key == low && low != high) << 32) + (Count(open) << 48);
    between |= uint32_t(open) << e;
  }
  return counts;
}

/// Adds a tile's counts to the band's; the place where its stored keys begin.
__device__ inline Count account(const Search& s, int64_t tile, Count total) {
  const Count above = total & 0xFFFF, at_high = total >> 16 & 0xFFFF, at_low = total >> 32 & 0xFFFF;
  if (above) atomicAdd(&s.band->above, above);
  if (at_high) atomicAdd(&s.band->at_high, at_high);
  if (at_low) atomicAdd(&s.band->at_low, at_low);
  s.ends[tile] = unsigned(at_high) | unsigned(at_low) << 16;
  s.inside[tile] = 0;
  return total >> 48 ? atomicAdd(&s.band->stored, total >> 48) : 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) count(const __grid_constant__ Table table) {
  __shared__ Job job;
  __shared__ Count reserved;
  const int64_t tile = stage(table, blockIdx.x, job), begin = tile * kTile;
  const Head& head = job.head;
  const int size = int(head.numel - begin < kTile ? head.numel - begin : kTile);
  Held<T> base{}, next;
  if (head.base) base.load_tile(head.base, begin, size, head.in_alignment);
  next.load_tile(job.models[0].data, begin, size, head.in_alignment);
#pragma unroll 1
  for (int m = 0; m < head.n; m++) {
    const Search s(head, job.models[m], m);
    const Held<T> x = next;
    // The next model's elements arrive while this one's are counted and stored.
    if (m + 1 < head.n) next.load_tile(job.models[m + 1].data, begin, size, head.in_alignment);
    uint32_t between;
    Count total;
    const int before = int(sum_before(classify(x, base, size, *s.band, between), total) >> 48);
    if (threadIdx.x == 0) reserved = account(s, tile, total);
    __syncthreads();
    int64_t to = int64_t(reserved) + before;
#pragma unroll
    for (int e = 0; e < Held<T>::kElements; e++) {
      if ((between >> e & 1u) == 0) continue;
      if (to < s.capacity) {
        s.keys[to] = magnitude_key(x.at(e) - base.at(e));
        s.owners[to] = uint32_t(tile);
      }
      to++;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) refine(const __grid_constant__ Table table, int digit) {
  __shared__ unsigned bins[kBins];
  __shared__ bool last;
  const Job& job = job_of(table, blockIdx.z);
  const Search s(job.head, job.models[blockIdx.y], int(blockIdx.y));
  int64_t rank;
  if (decide(s, rank) != kInside) return;
  const int64_t stored = int64_t(s.band->stored), begin = int64_t(blockIdx.x) * kPart;
  if (begin >= stored) return;
  const int64_t parts = (stored + kPart - 1) / kPart, end = begin + kPart < stored ? begin + kPart : stored;
  const uint32_t prefix = s.band->prefix;
  if (digit > 0) rank = s.band->rank;
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t key = i < end ? s.keys[i] : 0;
    const bool valid = i < end && (digit == 0 || key >> shift_of(digit - 1) == prefix);
    count_into(bins, valid, digit_of(key, digit));
  }
  __syncthreads();
  for (int b = int(threadIdx.x); b < kBins; b += kThreads)
    if (bins[b]) atomicAdd(s.bins + b, bins[b]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&s.band->tickets, 1u) == unsigned(parts - 1);
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) bins[b] = atomicExch(s.bins + b, 0u);
  __syncthreads();
  const uint32_t found = append_digit(prefix, find_bin(bins, rank), digit);
  if (threadIdx.x == 0) {
    s.band->prefix = found;
    s.band->rank = rank;
    s.band->tickets = 0;
  }
}

/// Counts the stored equals of the key that was found, per tile.
__global__ void __launch_bounds__(kThreads) tally(const __grid_constant__ Table table) {
  const Job& job = job_of(table, blockIdx.z);
  const Search s(job.head, job.models[blockIdx.y], int(blockIdx.y));
  int64_t rank;
  if (decide(s, rank) != kInside) return;
  const int64_t begin = int64_t(blockIdx.x) * kPart, stored = int64_t(s.band->stored);
  const int64_t end = begin + kPart < stored ? begin + kPart : stored;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    if (s.keys[i] == s.band->prefix) atomicAdd(s.inside + s.owners[i], 1u);
}

/// The number of the item that holds the `rank`-th, `rank` becoming that within it; `held(i)` for `count`
/// items. Every thread must call; -1 where there are not that many.
template <class Held>
__device__ int64_t find_holder(int64_t count, int64_t& rank, Held held) {
  __shared__ int64_t holder, left;
  if (threadIdx.x == 0) holder = -1, left = rank;
  const int64_t each = (count + blockDim.x - 1) / blockDim.x, begin = each * threadIdx.x;
  const int64_t end = begin + each < count ? begin + each : count;
  Count mine = 0, total;
  for (int64_t i = begin; i < end; i++) mine += held(i);
  Count before = sum_before(mine, total);
  if (int64_t(before) < rank && rank <= int64_t(before + mine)) {
    int64_t i = begin;
    for (Count more; int64_t(before + (more = held(i))) < rank; i++) before += more;
    holder = i;
    left = rank - int64_t(before);
  }
  __syncthreads();
  const int64_t found = holder;
  rank = found < 0 ? rank - int64_t(total) : left;
  __syncthreads();
  return found;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) finish(const __grid_constant__ Table table, bool keep_equals) {
  const Job& job = job_of(table, blockIdx.y);
  const Head& head = job.head;
  const Model& model = job.models[blockIdx.x];
  const Search s(head, model, int(blockIdx.x));
  int64_t rank, last = kKeepAllEquals;
  const Where where = decide(s, rank);
  uint32_t key = where == kHigh ? s.band->high : where == kLow ? s.band->low : s.band->prefix;
  if (where == kInside) rank = s.band->rank;
  if (where == kMissed) {
    rank = model.rank;
    key = select_key(head.numel, rank, [&](int64_t i) { return key_at<T>(head, model, i); });
  }
  if (where != kNone && !keep_equals) {
    int64_t tile = -1;
    const auto equal = [&](int64_t i) { return Count(key_at<T>(head, model, i) == key); };
    const auto in_tile = [&](int64_t t) {
      const int64_t begin = t * kTile, rest = head.numel - begin;
      return find_holder(rest < kTile ? rest : kTile, rank, [&](int64_t i) { return equal(begin + i); });
    };
    if (where != kMissed) {
      tile = find_holder(s.tiles, rank, [&](int64_t t) -> Count {
        return where == kInside ? s.inside[t] : where == kHigh ? s.ends[t] & 0xFFFF : s.ends[t] >> 16;
      });
      last = tile * kTile + in_tile(tile);
    } else {
      int64_t place = -1;
      while (place < 0) place = in_tile(++tile);
      last = tile * kTile + place;
    }
  }
  if (threadIdx.x == 0) {
    head.cut_key[blockIdx.x] = where == kNone ? kNoneKept : key;
    head.cut_last[blockIdx.x] = where == kNone ? -1 : last;
  }
}

template <class T>
void select(const Launch& l, bool keep_equals) {
  const unsigned n = unsigned(l.n), jobs = unsigned(l.jobs);
  const int64_t sampled_keys = l.largest < kSample ? l.largest : kSample;
  launch_clusters(sample<T>, dim3(n, jobs), kSampleThreads, size_t(sampled_keys) * 4, kSample * 4, 1,
                  l.stream, l.table);
  launch(count<T>, dim3(unsigned(l.tiles)), kThreads, 0, l.stream, l.table);
  const unsigned parts = unsigned((capacity_of(l.largest) + kPart - 1) / kPart);
  if (parts > 0) {
    for (int digit = 0; digit < kDigits; digit++)
      launch(refine, dim3(parts, n, jobs), kThreads, 0, l.stream, l.table, digit);
    if (!keep_equals) launch(tally, dim3(parts, n, jobs), kThreads, 0, l.stream, l.table);
  }
  launch(finish<T>, dim3(n, jobs), kThreads, 0, l.stream, l.table, keep_equals);
}

}  // namespace

int64_t kth_scratch(int64_t numel, int n) {
  return n * (int64_t(sizeof(Band)) + 4 * kBins + 8 * tiles_of(numel) + 8 * capacity_of(numel));
}

void kth_magnitude(const Launch& l, bool keep_equals) {
  if (l.dtype == kF32) return select<float>(l, keep_equals);
  if (l.dtype == kBF16) return select<bf16>(l, keep_equals);
  select<f16>(l, keep_equals);
}

}  // namespace pk::cuda
