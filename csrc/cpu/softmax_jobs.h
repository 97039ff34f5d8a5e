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
  bool safe;    // rows of nothing but -inf give 0 (log: -inf) and not NaN
  bool stream;  // results go past the cache: every row of `out` starts at a multiple of 64

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
  bool stream;  // as above
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
  int exponent;            // of the sum
  float magic, low;        // of the exponentials
  float inverse, lowered;  // 1 / sum, and that times 2^-64
  float limit, floor;      // below: denormal results; results that are 0 in float16
  float high, rest;        // log: y = (z - shift - high) - rest
  float log_sum;
};

/// Where one form gives way to another, which an instruction set says for itself.
struct Regime {
  int64_t stored;    // elements of a softmax row in float32 whose exponentials are stored, not computed twice
  int64_t streamed;  // float32 results of one call from which on they go past the cache
};

// Which form runs depends on the length of a row, on dtypes and the instruction set alone, and no bit of a
// result on the form: these constants cost or save time only. bench/softmax_constants.py measures those that
// no table has its size from; bench/results/softmax/constants-*.json are its results, of AVX2 so far.
constexpr Regime kOnAvx512 = {65536, INT64_MAX};  // a second exponential costs no more than storing the first
constexpr Regime kOnAvx2 = {1 << 20, 1 << 22};    // it does, while a third-level cache keeps what is stored
constexpr Regime kOnOthers = {1 << 20, INT64_MAX};  // no instruction goes past the cache
constexpr int64_t kCachedFloats = 4096;    // a row of log_softmax or logsumexp that the first cache holds
constexpr int64_t kLoadedFloats = 65536;   // one that options make: longer ones are made twice
constexpr int64_t kCachedHalves = 131072;  // a 16-bit row and its exponentials as floats
constexpr int kTogether = 8;               // short rows that go together, pass by pass
constexpr int64_t kTogetherFloats = 4096;  // at most so many elements of them, which the first cache holds
constexpr int64_t kSplit = 65536;          // elements of a longer row that a thread takes at a time
constexpr int64_t kColumns = 16;           // columns of a reduction over another dimension that go together
constexpr int64_t kColumnTiles = 8;        // at most so many times sixteen: a row of them is worth its miss
constexpr int64_t kColumnRows = 4096;      // rows whose exponentials wait in scratch
constexpr int64_t kColumnFloats = 262144;  // of that scratch: past the second-level cache, as short stretches
                                           // of strided rows cost more than the third
constexpr int64_t kStreamed = 1 << 23;     // floats of a row whose result no cache would keep: past it
constexpr int64_t kAhead = 4096;           // bytes that long rows are fetched ahead
constexpr int64_t kNear = 131072;          // bytes of rows that the second cache holds: they need no fetching
constexpr int64_t kRowBatch = 8192;        // elements of short rows that a thread takes at a time
constexpr int64_t kSlack = 256;            // floats behind a scratch row that kernels may write

static_assert(kSplit % 4096 == 0, "sums are flushed every 4096 elements, counted from the start of the row");

}  // namespace pk::cpu
