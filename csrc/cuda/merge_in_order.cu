// Adapters merged with the bits of csrc/cpu/merge_lora.cpp, for files that must not depend on the device:
// float32 by fused multiply-adds in the order of the ranks, no tensor cores.
// Traffic of merge_in_order: reads the weight once, writes out once, 2 * rows * cols * sizeof(T); a tile of
// 64 x 128 reads 4 * 192 * rank bytes of left and right from the L2. By data sheets a bf16 layer of 4096 x
// 4096 takes an H200 14 microseconds of memory and, at 33 T fused operations a second, 8 of arithmetic at
// rank 16 or 32 at rank 64, where its bytes take PCIe 5 some 600 to arrive. Traffic of squares_in_order:
// reads the weight once. Not measured on a device.
#include "block_sums.h"
#include "merge_in_order.h"

namespace pk::cuda {
namespace {

constexpr int kOrderRows = 64, kOrderColumns = 128;    // of a tile
constexpr int kDeep = 4, kWide = 8;                    // rows and columns of a thread, sixteen apart
constexpr int64_t kAtOnce = 64;                        // ranks up to which the chain of a sum is not cut
constexpr int kRanks = 32;                             // ranks of a run, and in shared memory
constexpr int kBlockColumns = 4096, kColumnRows = 48;  // of one sum of squares along rows, and along columns
// Blocks of a multiprocessor, as registers allow without a spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kTogether = 1;
#else
constexpr int kTogether = 2;
#endif
static_assert(kThreads == 16 * kTree && kOrderRows == 16 * kDeep && kOrderColumns == kTree * kWide,
              "a thread has row threadIdx / 16 and column threadIdx % 16, and those 16 on");

using Chains = float[kDeep][kWide];

struct Ranks {
  float left[kOrderRows][kRanks], right[kRanks][kOrderColumns];
};
static_assert(sizeof(Ranks) >= kColumnRows * kOrderColumns * sizeof(float), "an adapted tile lies there too");

/// `count` ranks from `first` on of both factors, 0 behind the last row and column; all threads must call.
__device__ inline void stage_ranks(Ranks& stage, const OrderedMerge& job, int64_t row, int64_t col,
                                   int64_t first, int count) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < kOrderRows * kRanks; i += kThreads) {
    const int r = i / kRanks, k = i % kRanks;
    const bool there = row + r < job.rows && k < count;
    stage.left[r][k] = there ? job.left[(row + r) * job.rank + first + k] : 0.0f;
  }
  for (int i = int(threadIdx.x); i < kRanks * kOrderColumns; i += kThreads) {
    const int k = i / kOrderColumns, c = i % kOrderColumns;
    const bool there = col + c < job.cols && k < count;
    stage.right[k][c] = there ? job.right[(first + k) * job.cols + col + c] : 0.0f;
  }
  __syncthreads();
}

/// sum goes on by `count` ranks.
__device__ __forceinline__ void multiply_ranks(const Ranks& stage, int count, Chains& sum) {
  const int row = int(threadIdx.x) / kTree, lane = int(threadIdx.x) % kTree;
#pragma unroll 2
  for (int k = 0; k < count; k++) {
    float b[kWide];
#pragma unroll
    for (int j = 0; j < kWide; j++) b[j] = stage.right[k][lane + kTree * j];
#pragma unroll
    for (int h = 0; h < kDeep; h++) {
      const float a = stage.left[row + 16 * h][k];
#pragma unroll
      for (int j = 0; j < kWide; j++) sum[h][j] = fmaf(a, b[j], sum[h][j]);
    }
  }
}

/// left @ right of a tile: one chain of ranks, or beyond kAtOnce runs of kRanks, added in their order.
__device__ inline void multiply_tile(Ranks& stage, const OrderedMerge& job, int64_t row, int64_t col,
                                     Chains& total) {
  Chains run = {};
  for (int64_t first = 0; first < job.rank; first += kRanks) {
    const int count = job.rank - first < kRanks ? int(job.rank - first) : kRanks;
    stage_ranks(stage, job, row, col, first, count);
    multiply_ranks(stage, count, run);
    if (job.rank <= kAtOnce) continue;
#pragma unroll
    for (int h = 0; h < kDeep; h++)
#pragma unroll
      for (int j = 0; j < kWide; j++) {
        total[h][j] = first ? total[h][j] + run[h][j] : run[h][j];
        run[h][j] = 0;
      }
  }
  if (job.rank > kAtOnce) return;
#pragma unroll
  for (int h = 0; h < kDeep; h++)
#pragma unroll
    for (int j = 0; j < kWide; j++) total[h][j] = run[h][j];
}

/// Element `i` of a weight of any dtype, at any alignment.
__device__ __forceinline__ float weight_at(const OrderedMerge& job, int64_t i) {
  const char* at = static_cast<const char*>(job.weight) + i * dtype_size(job.dtype);
  return element_of(job.dtype, at, 0, job.in_alignment);
}

template <class O>
__device__ __forceinline__ void put(const OrderedMerge& job, int64_t i, float y) {
  O x;
  narrow(y, &x);
  char* to = static_cast<char*>(job.out) + i * int64_t(sizeof(O));
  if (job.out_alignment == kBytes)
    memcpy(to, &x, sizeof(O));
  else
    *reinterpret_cast<O*>(to) = x;
}

__device__ __forceinline__ void put_as(const OrderedMerge& job, int64_t i, float y) {
  if (job.out_dtype == kF32)
    put<float>(job, i, y);
  else if (job.out_dtype == kBF16)
    put<bf16>(job, i, y);
  else
    put<f16>(job, i, y);
}

/// A tile of the weight; neighbours along its rows run together.
__global__ void __launch_bounds__(kThreads, kTogether) merge_tile(const __grid_constant__ OrderedMerge job) {
  __shared__ Ranks stage;
  const int64_t across = (job.cols + kOrderColumns - 1) / kOrderColumns;
  const int64_t row = blockIdx.x / across * kOrderRows, col = blockIdx.x % across * kOrderColumns;
  Chains sum;
  multiply_tile(stage, job, row, col, sum);
  const int64_t mine = row + threadIdx.x / kTree, left = col + threadIdx.x % kTree;
#pragma unroll
  for (int h = 0; h < kDeep; h++)
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      const int64_t r = mine + 16 * h, c = left + kTree * j;
      if (r >= job.rows || c >= job.cols) continue;
      const float w = weight_at(job, r * job.cols + c);
      const float y = job.scale ? fmaf(job.scale[job.by_column ? c : r], w, sum[h][j]) : w + sum[h][j];
      put_as(job, r * job.cols + c, y);
    }
}

/// Squares of 64 rows over a block of 4096 columns, every row in sixteen lanes, which are threads.
__global__ void __launch_bounds__(kThreads, kTogether) square_rows(const __grid_constant__ OrderedMerge job) {
  __shared__ Ranks stage;
  const int64_t blocks = (job.cols + kBlockColumns - 1) / kBlockColumns;
  const int64_t row = blockIdx.x / blocks * kOrderRows, block = blockIdx.x % blocks;
  const int64_t mine = row + threadIdx.x / kTree, begin = block * kBlockColumns;
  double lanes[kDeep] = {};
  for (int64_t col = begin; col < begin + kBlockColumns && col < job.cols; col += kOrderColumns) {
    Chains sum;
    multiply_tile(stage, job, row, col, sum);
#pragma unroll
    for (int h = 0; h < kDeep; h++)
#pragma unroll
      for (int j = 0; j < kWide; j++) {
        const int64_t r = mine + 16 * h, c = col + threadIdx.x % kTree + kTree * j;
        if (r >= job.rows || c >= job.cols) continue;
        const double y = double(weight_at(job, r * job.cols + c) + sum[h][j]);
        lanes[h] += y * y;
      }
  }
#pragma unroll
  for (int h = 0; h < kDeep; h++) {
    const double total = tree(lanes[h]);
    if (threadIdx.x % kTree == 0 && mine + 16 * h < job.rows)
      static_cast<double*>(job.out)[block * job.rows + mine + 16 * h] = total;
  }
}

/// Squares of 48 rows, column by column; the shared memory of factors then holds the adapted tile.
__global__ void __launch_bounds__(kThreads, kTogether)
    square_columns(const __grid_constant__ OrderedMerge job) {
  __shared__ Ranks stage;
  const int64_t across = (job.cols + kOrderColumns - 1) / kOrderColumns, part = blockIdx.x / across;
  const int64_t row = part * kColumnRows, col = blockIdx.x % across * kOrderColumns;
  const int mine = int(threadIdx.x) / kTree, lane = int(threadIdx.x) % kTree;
  Chains sum;
  multiply_tile(stage, job, row, col, sum);
  float* adapted = reinterpret_cast<float*>(&stage);
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kColumnRows / 16; h++)
#pragma unroll
    for (int j = 0; j < kWide; j++) {
      const int64_t r = row + mine + 16 * h, c = col + lane + kTree * j;
      if (r < job.rows && c < job.cols)
        adapted[(mine + 16 * h) * kOrderColumns + lane + kTree * j] =
            weight_at(job, r * job.cols + c) + sum[h][j];
    }
  __syncthreads();
  const int64_t c = col + threadIdx.x;
  if (threadIdx.x >= kOrderColumns || c >= job.cols) return;
  double total = 0;
  for (int r = 0; r < kColumnRows && row + r < job.rows; r++) {
    const double y = double(adapted[r * kOrderColumns + int(threadIdx.x)]);
    total += y * y;
  }
  static_cast<double*>(job.out)[part * job.cols + c] = total;
}

/// One block for every tile, at most 2^31 - 1: weights of 2^44 elements.
dim3 grid_of(const OrderedMerge& job, int rows, int columns) {
  const auto over = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  return dim3(unsigned(over(job.rows, rows) * over(job.cols, columns)));
}

}  // namespace

void merge_in_order(const OrderedMerge& job, cudaStream_t stream) {
  if (job.rows * job.cols == 0) return;
  launch(merge_tile, grid_of(job, kOrderRows, kOrderColumns), kThreads, 0, stream, job);
}

void squares_in_order(const OrderedMerge& job, cudaStream_t stream) {
  if (job.rows * job.cols == 0) return;
  if (job.by_column)
    launch(square_columns, grid_of(job, kColumnRows, kOrderColumns), kThreads, 0, stream, job);
  else
    launch(square_rows, grid_of(job, kOrderRows, kBlockColumns), kThreads, 0, stream, job);
}

}  // namespace pk::cuda
