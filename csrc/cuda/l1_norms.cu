// Sums of |delta| and of the kept |delta|, for the L1 rescale of DARE.
// Traffic: reads base and n tensors once, (n + 1) * numel * sizeof(T); writes 16 * n bytes per 4096 elements.
#include "block_sums.h"
#include "kernels.h"

namespace pk::cuda {
namespace {

/// Elements `lane` + 16 j of a tile of 128: their draws are halves of two lanes of Philox.
struct Draws {
  uint32_t words[2][4];
  __device__ Draws(const Head& head, const Model& model, int64_t element, int lane) {
    const uint64_t counter = uint64_t(head.offset + element) / 128 * 16 + uint64_t(lane / 2);
    for (int half = 0; half < 2; half++) {
      Word c0{uint32_t(counter + uint64_t(8 * half))}, c1{counter >> 32}, c2{model.index}, c3{0};
      philox10(c0, c1, c2, c3, head.key0, head.key1);
      words[half][0] = uint32_t(c0.v);
      words[half][1] = uint32_t(c1.v);
      words[half][2] = uint32_t(c2.v);
      words[half][3] = uint32_t(c3.v);
    }
  }
  __device__ uint32_t at(int j, int lane) const { return words[j % 2][j / 2] >> (lane % 2 * 16) & 0xFFFFu; }
};

__global__ void __launch_bounds__(kSumThreads) norms(const __grid_constant__ Table table, int dtype) {
  __shared__ Job job;
  const int64_t tile = stage(table, blockIdx.x, job), begin = tile * kTile;
  const Head& head = job.head;
  const int size = int(head.numel - begin < kTile ? head.numel - begin : kTile), bytes = dtype_size(dtype);
  const int lane = int(threadIdx.x % kTree);
  for (int m = int(threadIdx.x / kTree); m / 2 * 2 < head.n; m += kSumThreads / kTree) {
    // A warp serves two models; the second may not be there, but takes part in the exchange.
    const Model& model = job.models[m < head.n ? m : head.n - 1];
    const char* data = static_cast<const char*>(model.data) + begin * bytes;
    const char* zero = head.base ? static_cast<const char*>(head.base) + begin * bytes : nullptr;
    double all = 0, kept = 0;
    for (int first = 0; first < size; first += 128) {
      const Draws draws(head, model, begin + first, lane);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int i = first + 16 * j + lane;
        if (i >= size) continue;
        const float base = zero ? element_of(dtype, zero, i, head.in_alignment) : 0;
        const float delta = element_of(dtype, data, i, head.in_alignment) - base;
        const double magnitude = double(delta < 0 ? -delta : delta);
        all += magnitude;
        if (draws.at(j, lane) < model.threshold || is_nan(delta)) kept += magnitude;
      }
    }
    all = tree(all);
    kept = tree(kept);
    double* out = static_cast<double*>(head.out) + (tile * head.n + m) * 2;
    if (lane == 0 && m < head.n) out[0] = all, out[1] = kept;
  }
}

}  // namespace

void l1_norms(const Launch& l) {
  launch(norms, dim3(unsigned(l.tiles)), kSumThreads, 0, l.stream, l.table, l.dtype);
}

}  // namespace pk::cuda
