// Low-rank adapters merged into weights.
// Traffic: reads the weight once, writes out once: 2 * rows * cols * sizeof(T). From the second-level cache,
// per block of 64 deep x 128 elements, (64 deep + 128) * rank * sizeof(factor). By data sheets one bf16 layer
// of 4096 x 4096 takes an H200 14.0 microseconds of memory (67 MB at 4.8 TB/s); in blocks of 8 tiles rank 16
// adds 0.5 GFLOP and 5 MB of cache, eight such adapters 4.3 GFLOP (7 microseconds at the rate of mma.sync)
// and 42 MB of cache (8 at 5.5 TB/s), all of which is to pass beside the memory. Not measured on a device.
#include "lora_launch.h"
#include "lora_tile.h"

namespace pk::cuda {
namespace {

template <class O, class T>
__device__ __forceinline__ void store_rows(const Layer& layer, const Spot& spot, const Sums& y) {
  char* to = static_cast<char*>(layer.out) + spot.start(layer) * int64_t(sizeof(O));
#pragma unroll
  for (int h = 0; h < 4; h++) {
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = at(y, h, k);
    store_as<O, Eight<T>>(to + 8 * h * layer.cols * int64_t(sizeof(O)), x, spot.across,
                          spot.down + 8 * h < spot.height ? spot.width : 0, layer.out_alignment);
  }
}

/// The weight, times its scale, is added last; then one rounding.
template <class T>
struct Merged {
  __device__ static void finish(const Layer& layer, const Spot& spot, const Weights<T>& weights, Sums& y) {
    const auto weight = [&](int h, int k) { return widen(weights[h].x[k]); };
    if (layer.scale) {
      add_scaled(layer.scale, layer.by_column, spot, weight, y);
    } else {
#pragma unroll
      for (int h = 0; h < 4; h++)
#pragma unroll
        for (int k = 0; k < 8; k++) at(y, h, k) = weight(h, k) + at(y, h, k);
    }
    if (layer.out_dtype == kF32)
      store_rows<float, T>(layer, spot, y);
    else if (layer.out_dtype == kBF16)
      store_rows<bf16, T>(layer, spot, y);
    else
      store_rows<f16, T>(layer, spot, y);
  }
};

template <class T>
__global__ void __launch_bounds__(kLoraThreads, 2) merge_adapters(const __grid_constant__ Layers table) {
  PK_DYNAMIC_SHARED(char, room);
  sweep<T, Merged<T>>(table, room);
}

}  // namespace

void merge_lora(const LoraLaunch& l, int device, char* table, cudaStream_t stream) {
  if (l.dtype == kF32) return launch_lora(merge_adapters<float>, l, device, table, stream);
  if (l.dtype == kBF16) return launch_lora(merge_adapters<bf16>, l, device, table, stream);
  return launch_lora(merge_adapters<f16>, l, device, table, stream);
}

}  // namespace pk::cuda
