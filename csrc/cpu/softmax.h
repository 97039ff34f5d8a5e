// The core of every softmax kernel: lifted exponentials, sums over 32 virtual lanes, the last rounding.
//
// A number e^z stands as w = p * 2^(n - E + 64), E the row's one exponent. Element i adds its w to lane i %
// 32 in float; every 4096 elements the lanes are added up in double by a fixed tree. Another E scales all of
// that by an exact power of two, so the bits of a result depend on the row alone: not on the form, the
// instruction set, the threads or the place in a batch.
#pragma once
#include "../math/exp.h"
#include "softmax_jobs.h"
#include "stripe.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kLazy = 4 * kStripe;  // elements whose terms are added up before the lanes see them
constexpr int kFew = 4;             // such sums that are added up again: a sum of few terms rounds less
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kHeadroom = 16;  // the exponent of a sum is raised by numbers that exceed it by e^16

/// Exponentials on the way to an output of type O: 16 bits need fewer terms.
template <class O>
constexpr int kDegree = sizeof(O) == 4 ? 6 : 4;

template <int degree, class V>
PK_IN V lifted_exp(const V& z, const V& magic, const V& low) {
  V power;
  const V p = mantissa<degree>(larger(low, z), magic, power);
  return p * power;
}

/// The sum of the virtual lanes, in the order that T's load gives them.
template <class T>
PK_IN double tree(const Stripe& s) {
  Stripe in_order = s;
  for (int k = 0; k < kPairs && kParted<T>; k++) in_order.p[k] = interleave(s.p[k]);
  const float* lane = reinterpret_cast<const float*>(kParted<T> ? &in_order : &s);
  typedef float Floats4 __attribute__((vector_size(16)));  // a compiler would take the lanes one by one
  typedef double Doubles4 __attribute__((vector_size(32)));
  Doubles4 sum[4];
  for (int k = 0; k < 4; k++) {
    Floats4 low, high;
    memcpy(&low, lane + 4 * k, sizeof low);
    memcpy(&high, lane + 4 * k + kStripe / 2, sizeof high);
    sum[k] = __builtin_convertvector(low, Doubles4) + __builtin_convertvector(high, Doubles4);
  }
  const Doubles4 all = (sum[0] + sum[2]) + (sum[1] + sum[3]);
  return (all[0] + all[2]) + (all[1] + all[3]);
}

/// The virtual lanes of one block.
template <class T>
struct Lanes {
  Stripe s = Stripe::of(0), few = Stripe::of(0);
  int parts = 0;

  /// `part` holds the sums of kLazy elements; four parts are added up before the rest sees them.
  PK_MEMBER void add(const Stripe& part) {
    few = few + part;
    if (++parts == kFew) fold();
  }
  PK_MEMBER void fold() {
    s = s + few;
    few = Stripe::of(0);
    parts = 0;
  }
  PK_MEMBER void scale(float by) {
    s = s * Stripe::of(by);
    few = few * Stripe::of(by);
  }
  PK_MEMBER Stripe all() {
    fold();
    return s;
  }
  PK_MEMBER double total() { return tree<T>(all()); }
};

/// What follows a row: -inf, which no maximum and no sum sees.
template <class T>
PK_IN T nothing() {
  if constexpr (sizeof(T) == 4)
    return kMinusInfinity;
  else
    return {kParted<T> ? uint16_t(0xFF80) : uint16_t(0xFC00)};
}

/// Calls body(stripe of x, its first index, its length) over elements [0, n); the last stripe may be short.
template <class T, class Body>
PK_IN void each_stripe(const T* x, int64_t n, Body&& body) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe) body(load_stripe(x + i), i, kStripe);
  if (full < n) body(load_some(x + full, int(n - full), nothing<T>()), full, int(n - full));
}

/// The sum of term(stripe, first index, length) over at most kLazy elements.
template <class T, class Term>
PK_IN Stripe sum_of_few(const T* x, int64_t n, Term&& term) {
  Stripe part = Stripe::of(0);
  each_stripe(x, n,
              [&](const Stripe& s, int64_t i, int count) PK_ALWAYS { part = part + term(s, i, count); });
  return part;
}

/// The virtual lanes of a block's terms, four stripes at a time: sums of few terms round less.
template <class T, class Term>
PK_IN Stripe sum_of_block(const T* x, int64_t n, Term&& term) {
  if (n <= kLazy) return sum_of_few(x, n, term);
  Lanes<T> lanes;
  const int64_t full = n / kLazy * kLazy;
  for (int64_t i = 0; i < full; i += kLazy) {
    Stripe part = term(load_stripe(x + i), i, kStripe);
    for (int k = kStripe; k < kLazy; k += kStripe) part = part + term(load_stripe(x + i + k), i + k, kStripe);
    lanes.add(part);
  }
  if (full < n)
    lanes.add(sum_of_few(x + full, n - full, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
      return term(s, full + i, count);
    }));
  return lanes.all();
}

/// Largest element, NaN ignored; -inf for none.
template <class T>
PK_IN float largest(const T* x, int64_t n) {
  Stripe m = Stripe::of(kMinusInfinity);
  each_stripe(x, n, [&](const Stripe& s, int64_t, int) PK_ALWAYS { m = larger(s, m); });
  return largest_lane(largest_register(m));
}

template <class T>
PK_IN bool has_nan(const T* x, int64_t n) {
  M found = is_nan(F::of(0));
  each_stripe(x, n, [&](const Stripe& s, int64_t, int) PK_ALWAYS {
    for (int k = 0; k < kPairs; k++) found = found | is_nan(s.p[k].a) | is_nan(s.p[k].b);
  });
  return any(found, found);
}

/// Asks for memory at `p`, which will be read: for the second-level cache, as the first is in use.
PK_IN void fetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b, 0, 2);
}

/// The pass over a block whose exponent is known: its w to `to`, in the order of T's load, and their lanes
/// back. Floats are written as many as there are; what stands for 16 bits fills whole stripes. What lies
/// `ahead` bytes behind each element is fetched, unless that is 0.
template <class T, int degree, bool keep>
PK_IN Stripe exponentials_of_block(const T* x, float* to, int64_t n, Reference at, int64_t ahead) {
  const Stripe magic = Stripe::of(at.magic), low = Stripe::of(at.low);
  return sum_of_block(x, n, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
    if (ahead) fetch(reinterpret_cast<const char*>(x + i) + ahead, kStripe * int64_t(sizeof(T)));
    const Stripe w = lifted_exp<degree>(s, magic, low);
    if (keep) put_some<float>(to + i, w, sizeof(T) == 4 ? count : kStripe);
    return w;
  });
}

/// The same for a row, and its sum back.
template <class T, int degree, bool keep>
PK_IN double exponentials(const T* x, float* to, int64_t n, Reference at, int64_t ahead) {
  double total = 0, before = 0;  // a split row adds up in the same order
  for (int64_t block = 0; block < n; block += kBlock) {
    if (block % kSplit == 0) {
      before += total;
      total = 0;
    }
    const int64_t count = n - block < kBlock ? n - block : kBlock;
    total += tree<T>(
        exponentials_of_block<T, degree, keep>(x + block, keep ? to + block : nullptr, count, at, ahead));
  }
  return before + total;
}

/// y * 2^-64 for y >= 0, rounded once where that is denormal, without arithmetic on denormals, which costs
/// many times as much. There the mean of y and 2^-62 is larger than y, and the last place of it is the least
/// denormal; less 64 exponents, the bits of the larger one are the result.
template <class V>
PK_IN V unlifted(const V& y) {
  return less_exponents(larger(y, fma(y, V::of(0.5f), V::of(0x1p-63f))), kLift);
}

/// A float16 rounds all that is denormal in float to 0.
template <class O>
constexpr bool kFlushes = sizeof(O) == 2 && !kParted<O>;

/// y from w.
template <class O>
PK_IN Stripe finished(const Stripe& w, const Answer& by) {
  if (kFlushes<O>) return larger(Stripe::of(by.floor), w) * Stripe::of(by.lowered);
  return unlifted(w * Stripe::of(by.inverse));
}

/// y = w / sum over a row whose w stand at `from`, in the order of T's load.
template <class T, class O>
PK_IN void scale_row(const float* from, O* out, int64_t n, const Answer by, bool stream) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe)
    put_stripe<T>(out + i, finished<O>(load_stripe(from + i), by), stream);
  if (full == n) return;
  const Stripe last =
      sizeof(T) == 4 ? load_some(from + full, int(n - full), kMinusInfinity) : load_stripe(from + full);
  put_some<T>(out + full, finished<O>(last, by), int(n - full));
}

/// Writes the same number n times.
template <class O>
PK_IN void fill(O* out, int64_t n, float x) {
  const Stripe s = Stripe::of(x);
  for (int64_t i = 0; i < n; i += kStripe)
    put_some<float, O>(out + i, s, n - i < kStripe ? int(n - i) : kStripe);
}

/// e^(sink - shift) in the units of a row's total.
PK_IN double lifted_sink(float sink, float shift, Reference at) {
  alignas(64) float lane[kLanes];
  store(lane, lifted_exp<6>(F::of(sink - shift), F::of(at.magic), F::of(at.low)));
  return double(lane[0]);
}

/// The part of an answer that a row needs whose w are known; `total` is a number.
PK_IN Answer scales_of(double total) {
  const double sum = total * 0x1p-64;
  Answer a{};
  a.inverse = float(1 / sum);
  a.lowered = a.inverse * 0x1p-64f;
  a.limit = 0x1.03p-62f * float(sum);
  a.floor = 0x1p24f * float(sum);
  return a;
}

PK_IN double power_of_two(int e) {  // 0 where the true power is far below all that counts
  const uint64_t bits = e < -1000 ? 0 : uint64_t(e + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

/// What follows from a row's sum (total * 2^(exponent - 64), of z - shift) for its last pass; `most` is the
/// row's largest z - shift. The logarithm is taken of the sum in units of that element's own term, so that
/// what the exponentials are off by cancels where one element is all that counts: there y is exactly 0.
inline Answer answer_of(int kind, double total, int exponent, float shift, float most) {
  Answer a{};
  if (total != total) {
    a.fill = Answer::kNaNs;
    a.log_sum = bits_float(kNaN);
    return a;
  }
  a = scales_of(total);
  const int lead = int(float_bits(a.inverse) >> 23) - 127;
  const Reference at = reference(exponent, float(kDeepest + lead));
  a.magic = at.magic;
  a.low = at.low;
  a.exponent = exponent;
  if (kind == kSoftmax) return a;
  const double log_sum = double(most) + __builtin_log(total / lifted_sink(most, 0, reference(exponent)));
  a.high = float(log_sum);
  a.rest = float(log_sum - double(a.high));
  a.log_sum = float(double(shift) + log_sum);
  return a;
}

/// The answer of a row whose largest z (or sink) is infinite.
inline Answer answer_at_infinity(const Softmax& job, float largest, bool nan) {
  Answer a{};
  const bool zero = largest < 0 && job.safe && !nan;
  a.fill = zero ? Answer::kNothing : Answer::kNaNs;
  a.log_sum = nan ? bits_float(kNaN) : largest;
  return a;
}

/// The larger of a row's largest z and its sink, if that is a number.
PK_IN float with_sink(float largest, float sink) { return sink > largest ? sink : largest; }
PK_IN float sink_of(const Softmax& job, int64_t outer, int64_t inner) {
  return job.sink ? job.sink[outer * job.sink_stride[0] + inner * job.sink_stride[1]] : kMinusInfinity;
}
PK_IN bool in_range(float largest) { return largest > -kLargest && largest < kLargest; }

/// The constant that fills rows with no value of their own.
PK_IN float filling(const Softmax& job, Answer::Fill fill) {
  return fill == Answer::kNaNs ? bits_float(kNaN) : job.kind == kSoftmax ? 0 : kMinusInfinity;
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
