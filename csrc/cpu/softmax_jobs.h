// What the driver of softmax hands to its kernels, and the constants of the regimes.
#pragma once
#include <cstdint>

#include "../math/dtype.h"

namespace pk::cpu {

enum SoftmaxKind : int { kSoftmax = 0, kLogSoftmax = 1, kLogSumExp = 2 };
enum MaskKind : int { kNoMask = -1, kBoolMask = 3 };  // else a DType: the mask is added

/// y over the middle of [outer, n, inner], of z = mask(softcap(x) / temperature).
struct Softmax {
  int kind;
  void* out;  // [outer, n, inner]; [outer, inner] for kLogSumExp; may be x where the dtypes are one
  const void* x;
  int out_dtype, dtype;
  int64_t outer, n, inner;
  float temperature;
  float softcap;  // 0: none
  const void* mask;
  int mask_kind;
  int64_t mask_stride[3];  // in elements
  const float* sink;       // null: none
  int64_t sink_stride[2];
  bool safe;  // rows of nothing but -inf give 0 (log: -inf) and not NaN

  bool plain() const { return temperature == 1 && softcap == 0 && mask_kind == kNoMask; }
};

/// Gradients of softmax and log_softmax over the middle of [outer, n, inner], times `scale`.
struct SoftmaxBackward {
  int kind;
  void* out;  // may be grad or y where the dtypes are one
  const void *grad, *y;
  int out_dtype, grad_dtype, dtype;
  int64_t outer, n, inner;
  float scale;
};

/// Sum of e^z over a stretch of a row: total * 2^(exponent - 64).
struct RowSum {
  double total;
  int exponent;
  bool raised;    // some z was finite and above -1e6
  bool bad;       // some z was 1e6 or more: the sum was given up
  float largest;  // of all z that are numbers
};

/// Largest of a stretch, NaN ignored, and whether there was one.
struct RowScan {
  float largest;
  bool nan;
};

/// All that the last pass over a row needs. See answer_of in softmax.h.
struct Answer {
  enum Fill : int { kCompute = 0, kNaNs = 1, kNothing = 2 } fill;
  float magic, low;        // of the exponentials
  float inverse, lowered;  // 1 / sum, and that times 2^-64
  float limit, floor;      // below: denormal results; results that are 0 in float16
  float high, rest;        // log: y = (z - shift - high) - rest
  float log_sum;
};

// Which form runs depends on the length of a row and on dtypes alone, and no bit of a result on the form:
// these constants cost or save time only.
constexpr int64_t kCachedFloats = 65536;   // a row and its result stay in half of the second-level cache
constexpr int64_t kCachedHalves = 131072;  // so do a 16-bit row and its exponentials as floats
constexpr int64_t kSplit = 65536;          // elements of a longer row that a thread takes at a time
constexpr int64_t kColumns = 16;           // columns of a reduction over another dimension that go together
constexpr int64_t kColumnTiles = 8;        // so many times sixteen, where they have few rows
constexpr int64_t kColumnRows = 4096;      // rows of them whose exponentials stay in the cache
constexpr int64_t kRowBatch = 32768;       // elements of short rows that a thread takes at a time
constexpr int64_t kSlack = 256;            // floats behind a scratch row that kernels may write

static_assert(kSplit % 4096 == 0, "sums are flushed every 4096 elements, counted from the start of the row");

}  // namespace pk::cpu
