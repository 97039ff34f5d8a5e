// Counts of one 16-bit digit of |delta|: a selection over chunks that are not all there at once.
// Traffic: reads base and n tensors once, (n + 1) * numel * sizeof(T); bins are added to in the L2 cache.
#include "block.h"
#include "block_sums.h"
#include "kernels.h"

namespace pk::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    histogram(const __grid_constant__ Table table, int dtype, int shift, bool all) {
  __shared__ Job job;
  const int64_t begin = stage(table, blockIdx.x, job) * kTile;
  const Head& head = job.head;
  const int size = int(head.numel - begin < kTile ? head.numel - begin : kTile), bytes = dtype_size(dtype);
  const char* zero = head.base ? static_cast<const char*>(head.base) + begin * bytes : nullptr;
  for (int m = 0; m < head.n; m++) {
    const char* data = static_cast<const char*>(job.models[m].data) + begin * bytes;
    for (int i = int(threadIdx.x); i < kTile; i += kThreads) {
      uint32_t key = 0;
      if (i < size) {
        const float base = zero ? element_of(dtype, zero, i, head.in_alignment) : 0;
        key = magnitude_key(element_of(dtype, data, i, head.in_alignment) - base);
      }
      const bool valid = i < size && (all || uint64_t(key) >> (shift + 16) == job.models[m].key);
      count_into(static_cast<Count*>(head.out) + m * 65536, valid, key >> shift & 0xFFFFu);
    }
  }
}

}  // namespace

void magnitude_histogram(const Launch& l, int shift, bool all) {
  launch(histogram, dim3(unsigned(l.tiles)), kThreads, 0, l.stream, l.table, l.dtype, shift, all);
}

}  // namespace pk::cuda
