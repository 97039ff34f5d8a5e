// The core of every softmax kernel: lifted exponentials, sums over 32 virtual lanes, the last rounding.
//
// A number e^z stands as w = p * 2^(n - E + 64), E the row's one exponent. Element i adds its w to lane i %
// 32 in float; every 4096 elements the lanes are added up in double by a fixed tree. Another E scales all of
// that by an exact power of two, so the bits of a result depend on the row alone: not on the form, the
// instruction set, the threads or the place in a batch.
#pragma once
#include "../math/exp.h"
#include "lanes.h"
#include "softmax_jobs.h"

#define PK_ALWAYS __attribute__((always_inline))

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kStripe = 32;  // elements, one per virtual lane
constexpr int kPairs = kStripe / kGroup;
constexpr int kLazy = 4 * kStripe;  // elements whose terms are added up before the lanes see them
constexpr int kFew = 4;             // such sums that are added up again: a sum of few terms rounds less
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kHeadroom = 16;  // the exponent of a sum is raised by numbers that exceed it by e^16

struct Stripe {
  Pair p[kPairs];
};

template <class T>
PK_IN Stripe load_stripe(const T* x) {
  Stripe s;
  for (int k = 0; k < kPairs; k++) s.p[k] = load(x + k * kGroup);
  return s;
}
PK_IN Stripe zero_stripe() {
  Stripe s;
  for (int k = 0; k < kPairs; k++) s.p[k] = zero_pair();
  return s;
}
template <class Function>
PK_IN Stripe each(const Stripe& s, Function f) {
  Stripe r;
  for (int k = 0; k < kPairs; k++) r.p[k] = {f(s.p[k].a), f(s.p[k].b)};
  return r;
}

PK_IN Stripe plus(const Stripe& s, const Stripe& t) {
  Stripe r;
  for (int k = 0; k < kPairs; k++) r.p[k] = {s.p[k].a + t.p[k].a, s.p[k].b + t.p[k].b};
  return r;
}

/// Round a stripe as T's load orders it and write it as elements of O; a NaN of a 16-bit output must be
/// canonical. `stream`: past the cache, where `out` is a multiple of 64.
template <class T, class O>
PK_IN void put_stripe(O* out, const Stripe& s, bool stream = false) {
  for (int k = 0; k < kPairs; k++) {
    Pair y = s.p[k];
    if (kParted<T> && !kParted<O>) y = interleave(y);
    if (kParted<O> && !kParted<T>) y = part(y);
    put(out + k * kGroup, y, stream);
  }
}

/// The same for the first `count` elements of a stripe.
template <class T, class O>
PK_IN void put_some(O* out, const Stripe& s, int count, bool stream = false) {
  if (count == kStripe) return put_stripe<T>(out, s, stream);
  alignas(64) O last[kStripe];
  put_stripe<T>(last, s);
  memcpy(static_cast<void*>(out), last, size_t(count) * sizeof(O));
}

/// Exponentials on the way to an output of type O: 16 bits need fewer terms.
template <class O>
constexpr int kDegree = sizeof(O) == 4 ? 6 : 4;

template <int degree>
PK_IN F lifted_exp(F z, F magic, F low) {
  F power;
  const F p = mantissa<degree>(larger(low, z), magic, power);
  return p * power;
}

/// The sum of the virtual lanes, in the order that T's load gives them.
template <class T>
PK_IN double tree(const Stripe& s) {
  alignas(64) float lane[kStripe];
  for (int k = 0; k < kPairs; k++) put(lane + k * kGroup, kParted<T> ? interleave(s.p[k]) : s.p[k], false);
  alignas(64) double sum[kStripe / 2];
  for (int l = 0; l < 16; l++) sum[l] = double(lane[l]) + double(lane[l + 16]);
  for (int l = 0; l < 8; l++) sum[l] += sum[l + 8];
  for (int l = 0; l < 4; l++) sum[l] += sum[l + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/// The virtual lanes of one block.
template <class T>
struct Lanes {
  Stripe s = zero_stripe(), few = zero_stripe();
  int parts = 0;

  /// `part` holds the sums of kLazy elements; four parts are added up before the rest sees them.
  PK_MEMBER void add(const Stripe& part) {
    few = plus(few, part);
    if (++parts == kFew) fold();
  }
  PK_MEMBER void fold() {
    s = plus(s, few);
    few = zero_stripe();
    parts = 0;
  }
  PK_MEMBER void scale(float by) {
    s = each(s, [=](F x) PK_ALWAYS { return x * F::of(by); });
    few = each(few, [=](F x) PK_ALWAYS { return x * F::of(by); });
  }
  PK_MEMBER Stripe all() {
    fold();
    return s;
  }
  PK_MEMBER double total() { return tree<T>(all()); }
};

/// The last `count` elements of a row (< kStripe), followed by -inf.
template <class T>
struct Tail {
  alignas(64) T x[kStripe];

  PK_MEMBER Tail(const T* from, int64_t count) {
    T nothing;
    nothing.bits = sizeof(T) == 2 && kParted<T> ? 0xFF80u : 0xFC00u;
    for (T& e : x) e = nothing;
    memcpy(static_cast<void*>(x), from, size_t(count) * sizeof(T));
  }
};
template <>
struct Tail<float> {
  alignas(64) float x[kStripe];

  PK_MEMBER Tail(const float* from, int64_t count) {
    for (float& e : x) e = kMinusInfinity;
    memcpy(x, from, size_t(count) * sizeof(float));
  }
};

/// Calls body(stripe of x, its first index, its length) over elements [0, n); the last stripe may be short.
template <class T, class Body>
PK_IN void each_stripe(const T* x, int64_t n, Body&& body) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe) body(load_stripe(x + i), i, kStripe);
  if (full < n) {
    const Tail<T> tail(x + full, n - full);
    body(load_stripe(tail.x), full, int(n - full));
  }
}

/// The sum of term(stripe, first index, length) over at most kLazy elements.
template <class T, class Term>
PK_IN Stripe sum_of_few(const T* x, int64_t n, Term&& term) {
  Stripe part = zero_stripe();
  each_stripe(x, n,
              [&](const Stripe& s, int64_t i, int count) PK_ALWAYS { part = plus(part, term(s, i, count)); });
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
    for (int k = kStripe; k < kLazy; k += kStripe)
      part = plus(part, term(load_stripe(x + i + k), i + k, kStripe));
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
  Stripe m = each(zero_stripe(), [](F) PK_ALWAYS { return F::of(kMinusInfinity); });
  each_stripe(x, n, [&](const Stripe& s, int64_t, int) PK_ALWAYS {
    for (int k = 0; k < kPairs; k++) m.p[k] = {larger(s.p[k].a, m.p[k].a), larger(s.p[k].b, m.p[k].b)};
  });
  F all = larger(m.p[0].a, m.p[0].b);
  for (int k = 1; k < kPairs; k++) all = larger(all, larger(m.p[k].a, m.p[k].b));
  return largest_lane(all);
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
/// `ahead` bytes behind each element is fetched.
template <class T, int degree, bool keep>
PK_IN Stripe exponentials_of_block(const T* x, float* to, int64_t n, Reference at, int64_t ahead) {
  const F magic = F::of(at.magic), low = F::of(at.low);
  return sum_of_block(x, n, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
    fetch(reinterpret_cast<const char*>(x + i) + ahead, kStripe * int64_t(sizeof(T)));
    const Stripe w = each(s, [=](F z) PK_ALWAYS { return lifted_exp<degree>(z, magic, low); });
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

/// w * inverse * 2^-64, rounded once to float where that is denormal too. There it is rounded as an integer,
/// since arithmetic on denormals costs many times as much.
PK_IN F carefully_scaled(F w, F inverse) {
  const F y = w * inverse;
  const M tiny = less(y, F::of(0x1p-62f));
  const F bits = bits_of_nearest(select(tiny, y, F::of(0)) * F::of(0x1p85f));
  return select(tiny, bits, select(tiny, F::of(1), y) * F::of(0x1p-64f));
}

/// A float16 rounds all that is denormal in float to 0.
template <class O>
constexpr bool kFlushes = sizeof(O) == 2 && !kParted<O>;

/// y from w.
template <class O>
PK_IN Stripe finished(const Stripe& w, const Answer& by) {
  const F lowered = F::of(by.lowered);
  if (kFlushes<O>) return each(w, [&](F x) PK_ALWAYS { return larger(F::of(by.floor), x) * lowered; });
  F least = smaller(w.p[0].a, w.p[0].b);
  for (int k = 1; k < kPairs; k++) least = smaller(least, smaller(w.p[k].a, w.p[k].b));
  const M some = less(least, F::of(by.limit));
  if (__builtin_expect(any(some, some), 0))
    return each(w, [&](F x) PK_ALWAYS { return carefully_scaled(x, F::of(by.inverse)); });
  return each(w, [&](F x) PK_ALWAYS { return x * lowered; });
}

/// y = w / sum over a row whose w stand at `from`, in the order of T's load.
template <class T, class O>
PK_IN void scale_row(const float* from, O* out, int64_t n, const Answer& by, bool stream) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe)
    put_stripe<T>(out + i, finished<O>(load_stripe(from + i), by), stream);
  if (full == n) return;
  const Stripe last =
      sizeof(T) == 4 ? load_stripe(Tail<float>(from + full, n - full).x) : load_stripe(from + full);
  put_some<T>(out + full, finished<O>(last, by), int(n - full));
}

/// Writes the same number n times.
template <class O>
PK_IN void fill(O* out, int64_t n, float x) {
  const Stripe s = each(zero_stripe(), [=](F) PK_ALWAYS { return F::of(x); });
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
