// The streaming merge that linear, TIES with known cuts and DARE share: keep policy x combine policy, one
// block to a tile of 4096 elements. The same sums in the same order as csrc/cpu/merge_loop.h.
#pragma once
#include "stage.h"
#include "tile.h"

namespace pk::cuda {

// Models whose loads are under way at a time: more would cost a block its registers.
constexpr int kTogether = 2;

template <class T>
struct KeepAll {
  using Layout = Contiguous<T>;
  using Edge = KeepAll;
  __device__ static bool enter(Job&, int64_t, int) { return false; }
  __device__ void start(const Job&, int64_t, int) {}
  __device__ void model(const Model&) {}
  __device__ bool keeps(const Model&, int, int, float) const { return true; }
};

/// By magnitude, in a tile through which the index of a last kept equal passes.
template <class T>
struct KeepLargeAtEdge {
  using Layout = Contiguous<T>;
  __device__ void start(const Job&, int64_t, int) {}
  __device__ void model(const Model&) {}
  __device__ bool keeps(const Model& model, int, int i, float delta) const {
    return magnitude_key(delta) >= (i <= model.last ? model.key : model.threshold);
  }
};

/// By magnitude. A cut never exceeds the first NaN key, so a NaN is always kept and makes the result NaN.
template <class T>
struct KeepLarge {
  using Layout = Contiguous<T>;
  using Edge = KeepLargeAtEdge<T>;
  /// Turns the cuts into this tile's: `key` up to the local index `last`, `threshold` behind it. Returns
  /// whether any model changes from one to the other inside the tile; if none does, `key` is all that counts.
  __device__ static bool enter(Job& job, int64_t begin, int count) {
    if (int(threadIdx.x) < job.head.n) {
      Model& model = job.models[threadIdx.x];
      const int64_t last = model.last - job.head.offset - begin;
      model.threshold = model.key < kInfinity ? model.key + 1 : kInfinity + 1;
      if (last < 0) model.key = model.threshold;
      if (model.key > kInfinity) model.key = kInfinity + 1;
      model.last = last < 0 || last >= count ? kTile : last;
    }
    __syncthreads();
    bool edge = false;
    for (int m = 0; m < job.head.n; m++) edge |= job.models[m].last < kTile;
    return edge;
  }
  __device__ void start(const Job&, int64_t, int) {}
  __device__ void model(const Model&) {}
  __device__ bool keeps(const Model& model, int, int, float delta) const {
    return magnitude_key(delta) >= model.key;
  }
};

/// At random, by 16-bit draws. A NaN is kept whatever its draw.
template <class T>
struct KeepRandom {
  using Layout = Paired<T>;
  using Edge = KeepRandom;
  uint64_t counter;
  uint32_t key0, key1, words[4];

  __device__ static bool enter(Job&, int64_t, int) { return false; }
  __device__ void start(const Job& job, int64_t begin, int first) {
    counter = uint64_t(job.head.offset + begin + (first & ~127)) / 128 * 16 + uint64_t(first % 32 / 2);
    key0 = job.head.key0;
    key1 = job.head.key1;
  }
  __device__ void model(const Model& model) {
    Word c0{uint32_t(counter)}, c1{counter >> 32}, c2{model.index}, c3{0};
    philox10(c0, c1, c2, c3, key0, key1);
    words[0] = uint32_t(c0.v);
    words[1] = uint32_t(c1.v);
    words[2] = uint32_t(c2.v);
    words[3] = uint32_t(c3.v);
  }
  __device__ bool keeps(const Model& model, int k, int, float delta) const {
    return ((words[k / 2] >> (k % 2 * 16)) & 0xFFFFu) < model.threshold || is_nan(delta);
  }
};

// kBlocks: how many blocks a multiprocessor is to hold, as far as no register is spilled.
struct Sum {
  static constexpr int kBlocks = 3;
  float sum = 0;
  __device__ void add(bool kept, float delta, const Model& model) {
    sum = add_where(sum, kept, delta * model.weight);
  }
  __device__ float value() const { return sum; }
};
struct Weighted {
  static constexpr int kBlocks = 3;
  Elect<float> elect;
  __device__ void add(bool kept, float delta, const Model& model) {
    elect.add(kept ? delta * model.weight : 0.0f, model.share);
  }
  __device__ float value() const { return elect.mean(); }
};
struct Plain {
  static constexpr int kBlocks = 2;
  ElectPlain<float> elect;
  __device__ void add(bool kept, float delta, const Model& model) {
    elect.add(kept ? delta * model.vote : 0.0f, delta * model.weight, model.share);
  }
  __device__ float value() const { return elect.mean(); }
};

template <class T>
__device__ inline const char* at(const void* data, int64_t element) {
  return static_cast<const char*>(data) + element * int64_t(sizeof(T));
}

/// The models' parts in the elements of one thread, then one rounding and the store.
template <class T, class Keep, class Combine>
__device__ __forceinline__ void merge_elements(const Job& job, int64_t begin, int first, int count) {
  using Layout = typename Keep::Layout;
  constexpr int kWidth = Layout::kWidth;
  const Head& head = job.head;
  const int n = head.n;
  Keep keep;
  keep.start(job, begin, first);
  Combine combined[kWidth];
  Raw<T, kWidth> raw_base{};
  if (head.base) raw_base = load<T, Layout>(at<T>(head.base, begin), first, count, head.in_alignment);
#pragma unroll 1
  for (int m = 0; m < n; m += kTogether) {
    Raw<T, kWidth> raw[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; t++)
      if (m + t < n)
        raw[t] = load<T, Layout>(at<T>(job.models[m + t].data, begin), first, count, head.in_alignment);
#pragma unroll
    for (int t = 0; t < kTogether; t++) {
      if (m + t >= n || !takes_part(job.models[m + t])) continue;
      const Model& model = job.models[m + t];
      keep.model(model);
#pragma unroll
      for (int k = 0; k < kWidth; k++) {
        const float delta = widen(raw[t].x[k]) - widen(raw_base.x[k]);
        combined[k].add(keep.keeps(model, k, Layout::at(first, k), delta), delta, model);
      }
    }
  }
  float merged[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; k++) merged[k] = widen(raw_base.x[k]) + head.lambda * combined[k].value();
  store<Layout>(static_cast<char*>(head.out) + begin * dtype_size(head.out_dtype), merged, first, count,
                head);
}

/// Eight floats of every tensor leave room for two blocks at the most.
template <class T, class Layout, class Combine>
constexpr int kBlocksOf = sizeof(T) * Layout::kWidth > 16 && Combine::kBlocks > 2 ? 2 : Combine::kBlocks;

template <class T, template <class> class Keep, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksOf<T, typename Keep<T>::Layout, Combine>)
    merge(const __grid_constant__ Table table) {
  using Layout = typename Keep<T>::Layout;
  __shared__ Job job;
  const int64_t begin = stage(table, blockIdx.x, job) * kTile;
  const int count = int(job.head.numel - begin < kTile ? job.head.numel - begin : kTile);
  const bool edge = Keep<T>::enter(job, begin, count);
#pragma unroll 1
  for (int slot = int(threadIdx.x); Layout::first(slot) < count; slot += kThreads) {
    if (edge)
      merge_elements<T, typename Keep<T>::Edge, Combine>(job, begin, Layout::first(slot), count);
    else
      merge_elements<T, Keep<T>, Combine>(job, begin, Layout::first(slot), count);
  }
}

/// One launch for all tiles of a table.
template <template <class> class Keep, class Combine>
void launch_merge(int dtype, int64_t tiles, const Table& table, cudaStream_t stream) {
  const dim3 grid = static_cast<unsigned>(tiles);
  if (dtype == kF32) return launch(merge<float, Keep, Combine>, grid, kThreads, 0, stream, table);
  if (dtype == kBF16) return launch(merge<bf16, Keep, Combine>, grid, kThreads, 0, stream, table);
  return launch(merge<f16, Keep, Combine>, grid, kThreads, 0, stream, table);
}

}  // namespace pk::cuda
