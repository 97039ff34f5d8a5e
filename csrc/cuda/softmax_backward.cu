// Gradients of softmax, y * (g - sum(g * y)), and of log_softmax, g - e^y * sum(g).
// Traffic: reads grad and y once and writes out once where a row of both, or a column, stays on chip; longer
// ones are read twice.
#include "softmax_columns.h"
#include "softmax_rows.h"

namespace pk::cuda {
namespace {

struct Dot {
  double total;
  __device__ static Dot none() { return {0}; }
  __device__ Dot of_lane(int d) const { return {__shfl_xor_sync(kAllLanes, total, d)}; }
  __device__ static Dot joined(const Dot& a, const Dot& b) { return {a.total + b.total}; }
};

struct Pairs {
  float y[kBatch], g[kBatch];

  __device__ __forceinline__ double sum(int kind) const {
    float w[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; j++) w[j] = kind == kSoftmax ? g[j] * y[j] : g[j];
    return double(tree_sum(w));
  }
  __device__ __forceinline__ void gradients(int kind, float sum, float scale) {
    // e^y * 2^26 and sum * 2^-26: normal floats for y of -104 or more and sums down to 2^-100.
    const Reference at = reference(38, 188);
#pragma unroll
    for (int j = 0; j < kBatch; j++) {
      if (kind == kSoftmax) {
        y[j] = y[j] * (g[j] - sum) * scale;
      } else {
        const float p = y[j] < -104 ? 0 : lifted_exp(y[j], at);  // below, e^y is 0 in float
        y[j] = (g[j] - p * (sum * 0x1p-26f)) * scale;
      }
    }
  }
};

/// Rows of y of type T, float or Half; grad may be of another.
template <class T>
struct Backward {
  using Job = SoftmaxBackward;
  using State = Dot;
  using Batch = Pairs;
  static constexpr int kWidth = kWide<T>, kVectors = kVectorsOf<T>, kBlocks = 1;
  /// y as it is, then grad as it is or as floats.
  PK_HD static int regions(const Job& job) { return job.grad_dtype == job.dtype ? 2 : 1 + kWidth / 4; }
  __device__ static __forceinline__ void fetch(const Job& job, int64_t row, int64_t v, char* to,
                                               int64_t step) {
    const int64_t i = v * kWidth, left = job.n - i, at = row * job.n + i;
    const int count = int(left < kWidth ? left : kWidth);
    const T zero{};
    pk::cuda::fetch<T>(to, job.y, at, count, job.aligned, zero);
    if (job.grad_dtype == job.dtype)
      pk::cuda::fetch<T>(to + step, job.grad, at, count, job.grad_aligned, zero);
    else
      fetch_floats<T>(to + step, step, job.grad_dtype, job.grad, at, count, job.grad_aligned);
  }
  __device__ static __forceinline__ void read(const Job& job, Batch& batch, int j, bool there,
                                              const char* from, int64_t step) {
    float *y = batch.y + j * kWidth, *g = batch.g + j * kWidth;
    if (!there) {
#pragma unroll
      for (int k = 0; k < kWidth; k++) y[k] = g[k] = 0;
      return;
    }
    widen_vector<T>(job.dtype, from, y);
    if (job.grad_dtype == job.dtype) return widen_vector<T>(job.dtype, from + step, g);
#pragma unroll
    for (int half = 0; half < kWidth / 4; half++)
      widen_vector<float>(kF32, from + (1 + half) * step, g + half * 4);
  }
  __device__ static __forceinline__ State sum(const Part<Backward>& part) {
    State s = State::none();
    part.walk(true, [&](int, Batch& batch) { s.total += batch.sum(part.job.kind); });
    return s;
  }
  __device__ static __forceinline__ void write(const Part<Backward>& part, State s, bool copying, bool) {
    const Job& job = part.job;
    part.walk(copying, [&](int b, Batch& batch) {
      batch.gradients(job.kind, float(s.total), job.scale);
#pragma unroll
      for (int j = 0; j < kVectors; j++)
        if (const int64_t v = part.vector(b, j); v < part.end) {
          const int64_t i = v * kWidth, left = job.n - i;
          put<kWidth>(job.out_dtype, job.out, part.row * job.n + i, batch.y + j * kWidth,
                      int(left < kWidth ? left : kWidth), job.out_aligned, false);
        }
    });
  }
};

struct BackwardColumns {
  using Job = SoftmaxBackward;
  using State = Dot;
  /// The dtype is asked for once: sixteen times cost registers.
  __device__ static __forceinline__ void load(const Column<Job>& at, int64_t i, int dtype, const void* data,
                                              bool aligned, float (&to)[kBatch]) {
    const auto all = [&](auto of) {
#pragma unroll
      for (int j = 0; j < kBatch; j++)
        to[j] = at.has(i, j) ? widen_as(dtype, element_at<decltype(of)>(data, at.flat(i, j), aligned)) : 0;
    };
    if (dtype == kF32)
      all(0.0f);
    else
      all(Half{});
  }
  __device__ static __forceinline__ void read(const Column<Job>& at, int64_t i, Pairs& batch) {
    const Job& job = at.job;
    load(at, i, job.dtype, job.y, job.aligned, batch.y);
    load(at, i, job.grad_dtype, job.grad, job.grad_aligned, batch.g);
  }
  __device__ static __forceinline__ State sum(const Column<Job>& at) {
    State s = State::none();
    for (int64_t i = at.begin; i < at.end; i += kColumnStep) {
      Pairs batch;
      read(at, i, batch);
      s.total += batch.sum(at.job.kind);
    }
    return s;
  }
  __device__ static __forceinline__ void write(const Column<Job>& at, State s, bool) {
    const Job& job = at.job;
    for (int64_t i = at.begin; i < at.end; i += kColumnStep) {
      Pairs batch;
      read(at, i, batch);
      batch.gradients(job.kind, float(s.total), job.scale);
#pragma unroll
      for (int j = 0; j < kBatch; j++)
        if (at.has(i, j)) put_one(job.out_dtype, job.out, at.flat(i, j), batch.y[j]);
    }
  }
};

}  // namespace

int64_t softmax_scratch(const SoftmaxBackward& job, int device) {
  if (job.inner > 1) return columns_scratch<Dot>(job.outer * job.inner, job.n);
  const Deal d =
      job.dtype == kF32 ? deal_rows<Backward<float>>(job, device) : deal_rows<Backward<Half>>(job, device);
  return d.parts > 1 ? d.rows * d.parts * int64_t(sizeof(Dot)) : 0;
}

void softmax_backward(const SoftmaxBackward& job, void* scratch, int device, cudaStream_t stream) {
  if (job.outer * job.inner * job.n == 0) return;
  if (job.inner > 1) return run_columns<BackwardColumns>(job, scratch, stream);
  if (job.dtype == kF32) return run_rows<Backward<float>>(job, scratch, device, stream);
  run_rows<Backward<Half>>(job, scratch, device, stream);
}

}  // namespace pk::cuda
