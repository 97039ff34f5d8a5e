// <grad, delta> of every model: the gradient of a linear merge in all of its weights.
// Traffic: reads grad, base and n tensors once, (n + 2) * numel * sizeof(T); writes 8 * n bytes per 4096.
#include "block_sums.h"
#include "kernels.h"

namespace pk::cuda {
namespace {

__global__ void __launch_bounds__(kSumThreads) dots(const __grid_constant__ Table table, int dtype) {
  __shared__ Job job;
  const int64_t tile = stage(table, blockIdx.x, job), begin = tile * kTile;
  const Head& head = job.head;
  const int size = int(head.numel - begin < kTile ? head.numel - begin : kTile), bytes = dtype_size(dtype);
  const int lane = int(threadIdx.x % kTree);
  const char* grad = static_cast<const char*>(head.grad) + begin * dtype_size(head.grad_dtype);
  const char* zero = head.base ? static_cast<const char*>(head.base) + begin * bytes : nullptr;
  for (int m = int(threadIdx.x / kTree); m / 2 * 2 < head.n; m += kSumThreads / kTree) {
    // A warp serves two models; the second may not be there, but takes part in the exchange.
    const Model& model = job.models[m < head.n ? m : head.n - 1];
    const char* data = static_cast<const char*>(model.data) + begin * bytes;
    double sum = 0;
#pragma unroll 8
    for (int i = lane; i < size; i += kTree) {
      const float base = zero ? element_of(dtype, zero, i, head.in_alignment) : 0;
      const float delta = element_of(dtype, data, i, head.in_alignment) - base;
      sum += double(element_of(head.grad_dtype, grad, i, head.in_alignment)) * double(delta);
    }
    sum = tree(sum);
    if (lane == 0 && m < head.n) static_cast<double*>(head.out)[tile * head.n + m] = sum;
  }
}

}  // namespace

void dot_products(const Launch& l) {
  launch(dots, dim3(unsigned(l.tiles)), kSumThreads, 0, l.stream, l.table, l.dtype);
}

}  // namespace pk::cuda
