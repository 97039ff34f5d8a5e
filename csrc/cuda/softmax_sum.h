// A thread's, block's or row's sum of e^z, and what follows from it: the mathematics of csrc/cpu/softmax.h,
// one float at a time.
//
// A sum is total * 2^(exponent - 64) * e^shift, in double over batches of 16 floats. The exponent is raised
// lazily, by exact powers of two; only z of 1e6 or more in size are shifted by their maximum before, which is
// exact where it matters, since such numbers are multiples of 1/16.
#pragma once
#include "../math/exp.h"
#include "block.h"
#include "cluster.h"
#include "lanes.h"
#include "softmax.h"

namespace pk::cuda {
namespace {  // as in csrc/math/exp.h

/// The lane type of csrc/math/exp.h.
struct One {
  float x;
  __device__ static One of(float v) { return {v}; }
};
__device__ __forceinline__ One operator-(One a, One b) { return {a.x - b.x}; }
__device__ __forceinline__ One fma(One a, One b, One c) { return {__builtin_fmaf(a.x, b.x, c.x)}; }
__device__ __forceinline__ One as_power(One r) { return {bits_float(float_bits(r.x) << 23)}; }

__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}  // a number, if there is one

/// e^z in units of 2^(E - 64).
__device__ __forceinline__ float lifted_exp(float z, Reference at) {
  One power;
  const float kept = z < at.low ? at.low : z;  // a NaN stays
  const One p = mantissa<6>(One{kept}, One{at.magic}, power);
  return p.x * power.x;
}

/// The same by the device's own exponential, whose 2^-22 are enough for results of 16 bits; `lift`: 64 - E.
__device__ __forceinline__ float coarse_exp(float z, float lift) {
  return power_of_2(__builtin_fmaf(z, kLog2E, lift));
}

constexpr int kBatch = 16;
constexpr float kHeadroom = 16;
constexpr float kMinusInfinity = -__builtin_inff();

__device__ __forceinline__ float tree_sum(const float (&w)[kBatch]) {
  float s[kBatch / 2];
#pragma unroll
  for (int j = 0; j < kBatch / 2; j++) s[j] = w[2 * j] + w[2 * j + 1];
#pragma unroll
  for (int width = kBatch / 4; width > 0; width /= 2)
#pragma unroll
    for (int j = 0; j < kBatch / 4; j++)
      if (j < width) s[j] = s[2 * j] + s[2 * j + 1];
  return s[0];
}

__device__ inline double power_of_two(int e) {  // 0 where the true power is far below all that counts
  const uint64_t bits = e < -1000 ? 0 : uint64_t(e + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
__device__ inline bool in_range(float z) { return z > -kLargest && z < kLargest; }

struct RowSum {
  double total;
  float shift;
  int exponent;
  float largest;  // of all z that are numbers; -inf: the sum is 0 or NaN

  __device__ static RowSum none() { return {0, 0, 0, kMinusInfinity}; }
  __device__ RowSum of_lane(int d) const {
    return {__shfl_xor_sync(kAllLanes, total, d), __shfl_xor_sync(kAllLanes, shift, d),
            __shfl_xor_sync(kAllLanes, exponent, d), __shfl_xor_sync(kAllLanes, largest, d)};
  }
  __device__ bool empty() const { return largest == kMinusInfinity; }
  /// What a sum is to be multiplied by to be in the units of another, which is no smaller.
  __device__ double scale_to(float other_shift, int other_exponent) const {
    if (empty()) return 0;  // a NaN stays
    if (shift == other_shift) return power_of_two(exponent - other_exponent);
    return ::exp((double(shift) - double(other_shift)) + double(exponent - other_exponent) * kLn2);
  }
  /// Commutative to the bit, so that a butterfly gives all threads the same.
  __device__ static RowSum joined(const RowSum& a, const RowSum& b) {
    const double rank_a = double(a.shift) + a.exponent * kLn2, rank_b = double(b.shift) + b.exponent * kLn2;
    const bool first =
        b.empty() || (!a.empty() && (rank_a > rank_b || (rank_a == rank_b && a.shift > b.shift)));
    const float shift = first ? a.shift : b.shift;
    const int exponent = first ? a.exponent : b.exponent;
    return {a.total * a.scale_to(shift, exponent) + b.total * b.scale_to(shift, exponent), shift, exponent,
            larger(a.largest, b.largest)};
  }
  /// `coarse`: as the row's own terms are made, whose common error cancels.
  __device__ static RowSum of_sink(float sink, bool coarse) {
    RowSum s = none();
    if (sink != sink) s.total = double(sink);
    if (!(sink > kMinusInfinity)) return s;
    s.largest = sink;
    s.total = 0x1p64;
    if (!in_range(sink)) {
      s.shift = sink;
      if (sink - sink != 0) s.shift = 0;
      return s;
    }
    s.exponent = nearest_exponent(sink);
    s.total = double(coarse ? coarse_exp(sink, float(kLift - s.exponent))
                            : lifted_exp(sink, reference(s.exponent)));
    return s;
  }
  static constexpr double kLn2 = 0.6931471805599453;
};

/// Adds up the batches of one thread, by coarse exponentials or exact ones.
class Adder {
 public:
  __device__ explicit Adder(bool coarse) : coarse_(coarse), at_(reference(0)) {}
  __device__ __forceinline__ void add(const float (&z)[kBatch]) {
    float most = z[0];
#pragma unroll
    for (int j = 1; j < kBatch; j++) most = larger(z[j], most);
    if (most > bound_ && !raise(most, z)) return;
    float w[kBatch];
    if (coarse_) {
      const float lift = float(kLift - sum_.exponent);
#pragma unroll
      for (int j = 0; j < kBatch; j++) w[j] = coarse_exp(z[j] - sum_.shift, lift);
    } else {
#pragma unroll
      for (int j = 0; j < kBatch; j++) w[j] = lifted_exp(z[j] - sum_.shift, at_);
    }
    sum_.total += double(tree_sum(w));
    sum_.largest = larger(most, sum_.largest);
  }
  __device__ RowSum sum() const {
    RowSum s = sum_;
    if (s.empty()) s.total *= 0;  // what stood for nothing; a NaN stays
    return s;
  }

 private:
  RowSum sum_ = RowSum::none();
  float bound_ = kMinusInfinity;  // a number above it raises the exponent
  bool coarse_;
  Reference at_;

  /// False for a batch with +inf, which no sum can take: only a NaN in it counts.
  __device__ __forceinline__ bool raise(float most, const float (&z)[kBatch]) {
    if (most > 3.4028235e38f) {
#pragma unroll
      for (int j = 0; j < kBatch; j++)
        if (z[j] != z[j]) sum_.total = double(z[j]);
      sum_.largest = most;
      return false;
    }
    const bool near = in_range(most);
    const float shift = near ? 0 : most;
    const int exponent = near ? nearest_exponent(most) : 0;
    // What came before the first raise counts for nothing, be it all -inf or beside a +inf; a NaN stays.
    sum_.total *= bound_ == kMinusInfinity ? 0 : sum_.scale_to(shift, exponent);
    sum_.shift = shift;
    sum_.exponent = exponent;
    sum_.largest = larger(most, sum_.largest);
    at_ = reference(exponent);
    bound_ = most + kHeadroom;
    return true;
  }
};

/// All that the last pass over a row needs.
struct Answer {
  enum Fill : int { kCompute = 0, kNaNs = 1, kNothing = 2 } fill;
  float shift;
  Reference at;
  float lift;        // of the coarse exponentials
  float lowered;     // 1 / sum, times 2^-64
  float high, rest;  // log: y = (z - shift - high) - rest
  float log_sum;

  __device__ float filling(int kind) const {
    return fill == kNaNs ? bits_float(kNaN) : kind == kSoftmax ? 0 : kMinusInfinity;
  }
};

__device__ inline Answer answer_of(const Softmax& job, const RowSum& s) {
  Answer a{};
  const bool nan = s.total != s.total;
  a.shift = s.shift;
  a.fill = nan ? Answer::kNaNs : Answer::kCompute;
  a.log_sum = nan ? bits_float(kNaN) : s.largest;
  if (s.largest - s.largest != 0) a.fill = s.empty() && job.safe && !nan ? Answer::kNothing : Answer::kNaNs;
  if (a.fill != Answer::kCompute) return a;
  const float inverse = float(1 / (s.total * 0x1p-64));
  const int lead = int(float_bits(inverse) >> 23) - 127;
  a.at = reference(s.exponent, float(kDeepest + lead));
  a.lift = float(kLift - s.exponent);
  a.lowered = inverse * 0x1p-64f;
  if (job.kind == kSoftmax) return a;
  // In units of the largest element's own term, so that what the exponentials are off by cancels where that
  // element is all that counts: there y is exactly 0.
  const float most = s.largest - s.shift;
  const double log_sum = double(most) + ::log(s.total / double(lifted_exp(most, reference(s.exponent))));
  a.high = float(log_sum);
  a.rest = float(log_sum - double(a.high));
  a.log_sum = float(double(s.shift) + log_sum);
  return a;
}

__device__ __forceinline__ void answers(const Softmax& job, const Answer& by, bool coarse,
                                        float (&z)[kBatch]) {
#pragma unroll
  for (int j = 0; j < kBatch; j++) z[j] -= by.shift;
  if (by.fill != Answer::kCompute) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) z[j] = by.filling(job.kind);
  } else if (job.kind == kLogSoftmax) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) z[j] = (z[j] - by.high) - by.rest;
  } else if (coarse) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) z[j] = coarse_exp(z[j], by.lift) * by.lowered;
  } else {
#pragma unroll
    for (int j = 0; j < kBatch; j++) z[j] = lifted_exp(z[j], by.at) * by.lowered;
  }
}

}  // namespace
}  // namespace pk::cuda
