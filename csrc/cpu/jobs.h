// What the drivers hand to the kernels: plain data, no ownership. And the table of kernels per instruction
// set.
#pragma once
#include <cstdint>

#include "../math/dtype.h"
#include "gemm_jobs.h"
#include "lora_jobs.h"
#include "softmax_jobs.h"

namespace pk::cpu {

constexpr int kMaxModels = 64;
constexpr int kTile = 128;         // elements whose 16-bit draws come from 16 Philox calls of four words
constexpr int64_t kBlock = 4096;   // elements of a block that stays in the first-level cache
constexpr int64_t kChunk = 65536;  // elements that a thread takes at a time

/// One model's part in a merge.
struct Model {
  const void* data;
  float weight, vote, share;
  uint32_t key;        // kept iff the delta's key is at least this (magnitude kernels)
  uint32_t threshold;  // kept iff the 16-bit draw is below this (random kernels)
  uint32_t index;      // the model's number in the counter of its draws
};

/// out = base + lambda * combine(models); base may be null (0).
struct Merge {
  void* out;
  const void* base;
  const Model* models;
  int n;
  int dtype, out_dtype;
  float lambda;
  bool stream;          // non-temporal stores
  int64_t offset;       // flat index of element 0 in its tensor, a multiple of 128 for random kernels
  uint32_t key0, key1;  // of the draws
};

/// One model's search for its k-th magnitude: keys in [low, high) are written to `keys`, those >= high
/// counted.
struct Band {
  const void* data;
  uint32_t low, high;
  bool single;              // high == low + 1: nothing is written, the equals are counted
  bool keep_low;            // fused merges, single only: keys equal to low are kept in this chunk
  int64_t above, at_least;  // out: how many keys are >= high, >= low
  uint32_t* keys;
  int64_t stored, capacity;
};

/// Elements of a fused merge whose fate the band leaves open, as small tensors of their own.
struct Records {
  int64_t* index;
  void* base;
  void* tuned[kMaxModels];
  int64_t stored, capacity;
  bool overflow;
};

enum Combine : int { kSum = 0, kWeighted = 1, kPlain = 2 };

/// Kernels run on elements [begin, end) of the job; all indices are 64-bit.
struct Kernels {
  const char* name;
  void (*linear_merge)(const Merge&, int64_t begin, int64_t end);
  void (*ties_merge)(const Merge&, int combine, int64_t begin, int64_t end);
  void (*ties_fused)(const Merge&, int combine, Band*, Records*, int64_t begin, int64_t end);
  void (*dare_merge)(const Merge&, int combine, int64_t begin, int64_t end);
  void (*l1_norms)(const Merge&, double* sums, int64_t begin, int64_t end);
  void (*dot_products)(const Merge&, int grad_dtype, const void* grad, double* sums, int64_t begin,
                       int64_t end);
  void (*count_band)(int dtype, const void* base, Band*, int n, int64_t begin, int64_t end);
  void (*gather_keys)(int dtype, const void* base, const void* data, const int64_t* starts, int64_t groups,
                      uint32_t* keys);
  int64_t (*band_of_records)(int dtype, const Records&, int model, uint32_t low, uint32_t high,
                             uint32_t* keys, uint32_t* places);
  void (*histogram)(int dtype, const void* base, const void* data, int shift, bool all, uint32_t prefix,
                    int64_t* bins, int64_t begin, int64_t end);
  int64_t (*nth_equal)(int dtype, const void* base, const void* data, uint32_t key, int64_t n, int64_t begin,
                       int64_t end);
  void (*elect_sign)(int8_t* out, const Merge&, int combine, int64_t begin, int64_t end);
  int64_t (*count_nonfinite)(int dtype, const void* data, int64_t begin, int64_t end);
  void (*ideal)(void* out, const void* const* inputs, int n, int64_t begin, int64_t end);
  /// scratch: kLoraRows (kSquareRows) rows of all ranks
  void (*merge_lora)(const MergeLora&, int64_t begin, int64_t end, float* scratch);
  void (*lora_squares)(const MergeLora&, bool by_column, double* sums, int64_t begin, int64_t end,
                       float* scratch);
  void (*pack_panels)(const MergeLora&, float* panels, int64_t begin, int64_t end);
  int (*panel_width)();
  Regime (*softmax_regime)();
  /// scratch: the more of n and kTogetherFloats, and kSlack floats
  void (*softmax_rows)(const Softmax&, int64_t begin, int64_t end, float* scratch);
  RowSum (*softmax_store)(const Softmax&, int64_t row, int64_t begin, int64_t end, float shift, float* w,
                          int* exponents);
  void (*softmax_scale)(const Softmax&, int64_t row, int64_t begin, int64_t end, float* w,
                        const int* exponents, const Answer&);
  void (*softmax_columns)(const Softmax&, int64_t outer, int64_t first, int tiles, float* scratch);
  void (*softmax_narrow)(const Softmax&, int64_t outer, float* scratch);
  RowSum (*softmax_sum)(const Softmax&, int64_t row, int64_t begin, int64_t end, float shift);
  RowScan (*softmax_scan)(const Softmax&, int64_t row, int64_t begin, int64_t end);
  Answer (*softmax_answer)(const Softmax&, int64_t row, const RowSum* sums, int64_t count, float shift);
  Answer (*softmax_infinite)(const Softmax&, float largest, bool nan);
  void (*softmax_write)(const Softmax&, int64_t row, int64_t begin, int64_t end, float shift, const Answer&);
  double (*softmax_backward_sum)(const SoftmaxBackward&, int64_t row, int64_t begin, int64_t end);
  void (*softmax_backward_write)(const SoftmaxBackward&, int64_t row, int64_t begin, int64_t end, float sum);
  void (*softmax_backward_rows)(const SoftmaxBackward&, int64_t begin, int64_t end);
  void (*softmax_backward_columns)(const SoftmaxBackward&, int64_t outer, int64_t first, float* scratch);
  // Products of matrices. `rows` (null: as they are) says where row i stands; a tile of sums `c` has rows of
  // kGemmWidth, the left operand rows of kGemmDepth, the right one panels of (k1 - k0) x the panel's width.
  void (*gemm_widen)(const Matrix&, const int64_t* rows, int64_t i0, int64_t i1, int64_t k0, int64_t k1,
                     const Dropout*, int64_t stride, bool parted, float* to);
  void (*gemm_pack)(const Matrix&, const int64_t* rows, int64_t k0, int64_t k1, int64_t n0, int64_t n1,
                    float scale, const Dropout*, float* to);
  void (*gemm_multiply)(const float* a, int64_t rows, const float* b, int64_t width, int64_t depth, float* c,
                        bool add, const Ahead* ahead, int64_t count);
  void (*gemm_dots)(const Matrix& b, int64_t n0, int64_t n1, const float* x, int64_t rows, int64_t stride,
                    int64_t depth, float* c);
  bool (*gemm_expand)(const Matrix& high, int64_t rank, int64_t n0, int64_t n1, float scale, const float* low,
                      float* sums);  // of one row; false, and nothing done, where it has no kernel
  void (*gemm_add_kept)(float* c, const float* t, const int64_t* rows, int64_t i0, int64_t i1, int64_t n0,
                        int64_t n1, const Dropout&);
  void (*gemm_finish)(const float* c, const GemmOut&, const int64_t* rows, int64_t i0, int64_t i1, int64_t n0,
                      int64_t n1);
};

constexpr int kSampleGroup = 32;  // consecutive elements that gather_keys takes per start

}  // namespace pk::cpu
