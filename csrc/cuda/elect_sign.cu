// The elected sign of every element.
// Traffic: reads n deltas once, writes one byte an element: n * numel * sizeof(T) + numel. One pass.
#include "block_sums.h"
#include "kernels.h"

namespace pk::cuda {
namespace {

/// A NaN casts no vote here: there is no merged value that could carry it.
__global__ void __launch_bounds__(kThreads)
    elect(const __grid_constant__ Table table, int dtype, bool plain) {
  __shared__ Job job;
  const int64_t begin = stage(table, blockIdx.x, job) * kTile;
  const Head& head = job.head;
  const int size = int(head.numel - begin < kTile ? head.numel - begin : kTile);
  for (int i = int(threadIdx.x); i < size; i += kThreads) {
    float pos = 0, neg = 0;
    for (int m = 0; m < head.n; m++) {
      const Model& model = job.models[m];
      if (!takes_part(model)) continue;
      const char* data = static_cast<const char*>(model.data) + begin * dtype_size(dtype);
      const float vote = element_of(dtype, data, i, head.in_alignment) * (plain ? 1.0f : model.weight);
      pos = add_where(pos, vote > 0, vote);
      neg = add_where(neg, negative(vote), vote);
    }
    static_cast<int8_t*>(head.out)[begin + i] = not_less(pos, -neg) ? 1 : -1;
  }
}

}  // namespace

void elect_sign(const Launch& l, int combine) {
  launch(elect, dim3(unsigned(l.tiles)), kThreads, 0, l.stream, l.table, l.dtype, combine == kPlain);
}

}  // namespace pk::cuda
