// csrc/cuda/mma.h by itself, for its test.
#include "../cuda/mma.h"

namespace pk::emulated {
namespace {

/// Traffic: none that counts; one warp, one product.
__global__ void one_product(float* sum, const uint16_t* left, const uint16_t* right, int dtype) {
  const int lane = int(threadIdx.x), row = lane / 4, column = lane % 4 * 2;
  alignas(16) static uint16_t staged[16][16], turned[16][8];
  for (int i = lane; i < 256; i += 32) staged[i / 16][i % 16] = left[i];
  for (int i = lane; i < 128; i += 32) turned[i / 8][i % 8] = right[i];
  __syncthreads();
  uint32_t a[4], b[4];
  cuda::load_matrices(a, &staged[lane % 16][lane / 16 * 8]);
  cuda::load_turned(b, &turned[lane % 16][0]);
  float* at[4] = {sum + row * 8 + column, sum + row * 8 + column + 1, sum + row * 8 + 64 + column,
                  sum + row * 8 + 64 + column + 1};
  float c[4] = {*at[0], *at[1], *at[2], *at[3]};
  if (dtype == kBF16)
    cuda::multiply_bf16(c, a, {b[0], b[1]});
  else
    cuda::multiply_f16(c, a, {b[0], b[1]});
  for (int i = 0; i < 4; i++) *at[i] = c[i];
}

}  // namespace

void multiply_one(float* sum, const uint16_t* left, const uint16_t* right, int dtype) {
  cuda::launch(one_product, dim3(1), 32, 0, nullptr, sum, left, right, dtype);
}

void split_all(const float* x, uint16_t* parts, int64_t numel) {
  for (int64_t i = 0; i < numel; i++) {
    bf16 part[cuda::kMostParts];
    cuda::split(x[i], part);
    for (int p = 0; p < cuda::kMostParts; p++) parts[i * cuda::kMostParts + p] = part[p].bits;
  }
}

}  // namespace pk::emulated
