// What the binding hands to the kernels of softmax, and the constants of their regimes.
#pragma once
#include "device.h"
#include "jobs.h"

namespace pk::cuda {

enum SoftmaxKind : int { kSoftmax = 0, kLogSoftmax = 1, kLogSumExp = 2 };
enum MaskKind : int { kNoMask = -1, kBoolMask = 3 };  // else a DType: the mask is added

/// y over the middle of [outer, n, inner], of z = mask(softcap(x) / temperature).
struct Softmax {
  int kind;
  void* out;  // [outer, n, inner]; [outer, inner] for kLogSumExp; may be x where the dtypes are one
  const void* x;
  int out_dtype, dtype;
  int64_t outer, n, inner;
  float temperature, reciprocal;  // 1 / temperature, or 0 where quotients are to be left to the division
  float softcap;                  // 0: none
  const void* mask;
  int mask_kind;
  int64_t mask_stride[3];  // in elements
  const float* sink;       // null: none
  int64_t sink_stride[2];
  bool safe;  // rows of nothing but -inf give 0 (log: -inf) and not NaN
  bool plain;
  bool aligned, mask_aligned, out_aligned;  // to elements
};

/// Gradients of softmax and log_softmax over the middle of [outer, n, inner], times `scale`.
struct SoftmaxBackward {
  int kind;
  void* out;  // may be grad or y where the dtypes are one
  const void *grad, *y;
  int out_dtype, grad_dtype, dtype;
  int64_t outer, n, inner;
  float scale;
  bool aligned, grad_aligned, out_aligned;
};

/// Where rows stay between the two readings, by the bytes of a row alone. Tests of the emulation make them
/// small.
struct Regimes {
  int64_t share = 96 << 10;     // bytes of a row that a block keeps: two blocks fit a multiprocessor
  int64_t most = 208 << 10;     // that one keeps at most, where eight blocks are not enough otherwise
  int64_t chunk = 32768;        // elements of a row that is read twice which a block takes, at least
  int64_t column_chunk = 4096;  // the same, of a column
  int64_t chunks = 1024;        // to which the chunks of a row are limited
};
constexpr int kLargestCluster = 8;  // more is not portable
constexpr int kMostThreads = 512, kFewThreads = 128;

/// One more stage than what a launch does: everything, or the sums of chunks, or what follows from them.
enum Stage : int { kWhole = 0, kSums = 1, kFinish = 2 };

/// How rows are dealt to blocks. A vector is 16 bytes of x (backward: of y).
struct Deal {
  int stage;
  int lanes;      // threads of a row, or of a block's part of it
  int cluster;    // blocks of a row that stays in shared memory
  int ring;       // batches of vectors that a thread has room for
  int64_t part;   // vectors of a block's part
  int64_t parts;  // of a row
  int64_t rows;
  void* scratch;  // a state per part
};

/// Bytes of device memory that a call needs; 0 where rows stay on chip.
int64_t softmax_scratch(const Softmax&, int device);
int64_t softmax_scratch(const SoftmaxBackward&, int device);
void softmax(const Softmax&, void* scratch, int device, cudaStream_t);
void softmax_backward(const SoftmaxBackward&, void* scratch, int device, cudaStream_t);

/// What the device lets a block have. Regimes depend on nothing else of it.
struct Limits {
  int64_t shared;
  bool clusters;
};
Limits limits_of(int device);

#ifdef PK_EMULATED
inline Regimes regimes;
inline Limits limits{232448, true};
#else
constexpr Regimes regimes;
#endif

}  // namespace pk::cuda
