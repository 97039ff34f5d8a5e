// Sums of squares of adapted weights, for the norms of DoRA.
// Traffic: reads the weight once, rows * cols * sizeof(T), and factors from the caches as merge_lora does;
// writes 8 bytes per 128 elements of a row, or 64 of a column. By data sheets 7.0 microseconds for a bf16
// layer of 4096 x 4096 on an H200. Not measured on a device.
#include "lora_launch.h"
#include "lora_tile.h"

namespace pk::cuda {
namespace {

/// A number of every lane, added up over lanes that differ in the bits of `from`, twice that, .. below `to`.
__device__ inline double over_lanes(double x, int from, int to) {
  for (int d = from; d < to; d *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
  return x;
}

template <class T>
struct Squared {
  /// Behind the last row and column weight and factors are 0.
  __device__ static double square(const Weights<T>& weights, const Sums& total, int h, int k) {
    const double y = double(widen(weights[h].x[k]) + at(total, h, k));
    return y * y;
  }
  __device__ static void finish(const Layer& layer, const Spot& spot, const Weights<T>& weights,
                                const Sums& total) {
    __shared__ double parts[4][kLoraColumns];
    const int i = thread_asked(), lane = i % 32, warp = i / 32;
    double* out = static_cast<double*>(layer.out);
    __syncthreads();  // the parts of the tile before have been read
    if (layer.by_column) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        double sum = 0;
#pragma unroll
        for (int h = 0; h < 4; h++) sum += square(weights, total, h, k);
        sum = over_lanes(sum, 4, 32);
        if (lane < 4) parts[warp / 4][spot.across + k] = sum;
      }
      __syncthreads();
      if (i < spot.width)
        out[spot.tile * layer.cols + int64_t(spot.strip) * kLoraColumns + i] = parts[0][i] + parts[1][i];
      return;
    }
#pragma unroll
    for (int h = 0; h < 4; h++) {
      double sum = 0;
#pragma unroll
      for (int k = 0; k < 8; k++) sum += square(weights, total, h, k);
      sum = over_lanes(sum, 1, 4);
      if (lane % 4 == 0) parts[warp % 4][warp / 4 * 32 + 8 * h + lane / 4] = sum;
    }
    __syncthreads();
    if (i < spot.height)
      out[spot.strip * layer.rows + int64_t(spot.tile) * kLoraRows + i] =
          (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]);
  }
};

template <class T>
__global__ void __launch_bounds__(kLoraThreads, 2) square_adapted(const __grid_constant__ Layers table) {
  PK_DYNAMIC_SHARED(char, room);
  sweep<T, Squared<T>>(table, room);
}

}  // namespace

void lora_squares(const LoraLaunch& l, int device, char* table, cudaStream_t stream) {
  if (l.dtype == kF32) return launch_lora(square_adapted<float>, l, device, table, stream);
  if (l.dtype == kBF16) return launch_lora(square_adapted<bf16>, l, device, table, stream);
  return launch_lora(square_adapted<f16>, l, device, table, stream);
}

}  // namespace pk::cuda
