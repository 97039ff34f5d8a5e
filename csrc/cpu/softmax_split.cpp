// softmax, log_softmax and logsumexp of long rows in two passes, without a search for the maximum.
// Traffic: reads x twice, writes out once (logsumexp: reads x once). Rows with a z past +-1e6 are read once
// or twice more, to find the maximum and shift by it.
//
// The sum's exponent is raised lazily: at the first number, then when a group of 128 exceeds it by e^16,
// which scales what is there by an exact power of two.
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

PK_IN void prefetch(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + kAhead + b);
}

template <class T, int degree>
struct LazySum {
  RowSum sum{0, 0, false, false, kMinusInfinity};
  float bound = -kLargest;  // a number above it raises the exponent
  Reference at = reference(0);

  /// One block, no longer than kBlock; false where the row is to be given up.
  PK_MEMBER bool add(const T* x, int64_t count) {
    Lanes<T> lanes;
    const int64_t full = count / kLazy * kLazy;
    for (int64_t i = 0; i < full; i += kLazy) {
      prefetch(x + i, kLazy * int64_t(sizeof(T)));
      if (!group(lanes, x + i, kLazy)) return false;
    }
    if (full < count && !group(lanes, x + full, count - full)) return false;
    sum.total += lanes.total();
    sum.largest = with_sink(largest_lane(seen), sum.largest);
    return true;
  }

 private:
  F seen = F::of(kMinusInfinity);

  PK_MEMBER bool group(Lanes<T>& lanes, const T* x, int64_t count) {
    Stripe all = Stripe::of(kMinusInfinity);
    each_stripe(x, count, [&](const Stripe& s, int64_t, int) PK_ALWAYS { all = larger(s, all); });
    const F most = largest_register(all);
    const M above = less(F::of(bound), most);
    if (__builtin_expect(any(above, above), 0) && !raise(lanes, largest_lane(most))) return false;
    const Stripe magic = Stripe::of(at.magic), low = Stripe::of(at.low);
    Stripe part = Stripe::of(0);
    each_stripe(x, count, [&](const Stripe& s, int64_t, int) PK_ALWAYS {
      Stripe power;
      const Stripe p = mantissa<degree>(larger(low, s), magic, power);
      part = fma(p, power, part);  // a product by a power of two is exact: the same as a sum of w
    });
    lanes.add(part);
    seen = larger(most, seen);
    return true;
  }

  PK_MEMBER bool raise(Lanes<T>& lanes, float most) {
    if (!(most < kLargest)) {
      sum.bad = true;
      return false;
    }
    const int exponent = nearest_exponent(most), by = sum.exponent - exponent;
    // Nothing but -inf (and NaN, which stays) was summed before the first number.
    const double scale = sum.raised ? power_of_two(by) : 0;
    sum.total *= scale;
    lanes.scale(sum.raised && by > -100 ? float(scale) : 0);
    sum.exponent = exponent;
    sum.raised = true;
    at = reference(exponent);
    bound = most + kHeadroom;
    return true;
  }
};

template <class T, int degree>
RowSum sum_of(const Softmax& job, int64_t row, int64_t begin, int64_t end) {
  LazySum<T, degree> sum;
  const T* x = static_cast<const T*>(job.x) + row * job.n;
  for (int64_t i = begin; i < end; i += kBlock)
    if (!sum.add(x + i, end - i < kBlock ? end - i : kBlock)) break;
  return sum.sum;
}

template <int degree>
RowSum sum_of_loaded(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift) {
  alignas(64) float z[kBlock + kSlack];
  LazySum<float, degree> sum;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    load_row(job, row, i, count, shift, z);
    if (!sum.add(z, count)) break;
  }
  return sum.sum;
}

template <int degree>
RowSum sum_any(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift) {
  if (!job.plain() || shift != 0) return sum_of_loaded<degree>(job, row, begin, end, shift);
  if (job.dtype == kF32) return sum_of<float, degree>(job, row, begin, end);
  if (job.dtype == kBF16) return sum_of<bf16, degree>(job, row, begin, end);
  return sum_of<f16, degree>(job, row, begin, end);
}

template <class T, class O>
PK_IN void write_block(const Softmax& job, const T* x, O* out, int64_t count, const Answer by, bool stream) {
  if (job.kind == kLogSoftmax) {
    const Stripe high = Stripe::of(by.high), rest = Stripe::of(by.rest);
    each_stripe(x, count, [&](const Stripe& s, int64_t i, int some) PK_ALWAYS {
      prefetch(x + i, kStripe * int64_t(sizeof(T)));
      put_some<T>(out + i, (s - high) - rest, some, stream);
    });
    return;
  }
  const Stripe magic = Stripe::of(by.magic), low = Stripe::of(by.low);
  each_stripe(x, count, [&](const Stripe& s, int64_t i, int some) PK_ALWAYS {
    prefetch(x + i, kStripe * int64_t(sizeof(T)));
    const Stripe w = lifted_exp<kDegree<O>>(s, magic, low);
    put_some<T>(out + i, finished<O>(w, by), some, stream);
  });
}

template <class O>
void write_of(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift, const Answer& by) {
  if (job.kind == kLogSumExp) return fill(static_cast<O*>(job.out) + row, 1, by.log_sum);
  O* out = static_cast<O*>(job.out) + row * job.n;
  if (by.fill != Answer::kCompute) return fill(out + begin, end - begin, filling(job, by.fill));
  const bool direct = job.plain() && shift == 0 && job.dtype == dtype_of<O>();
  const O* x = static_cast<const O*>(job.x) + row * job.n;
  if (direct) {
    write_block(job, x + begin, out + begin, end - begin, by, job.stream);
    if (job.stream) fence();
    return;
  }
  alignas(64) float z[kBlock + kSlack];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    load_row(job, row, i, count, shift, z);
    write_block(job, z, out + i, count, by, false);
  }
}

}  // namespace

RowSum softmax_sum(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift) {
  const bool coarse = job.kind == kSoftmax && job.out_dtype != kF32;
  return coarse ? sum_any<4>(job, row, begin, end, shift) : sum_any<6>(job, row, begin, end, shift);
}

RowScan softmax_scan(const Softmax& job, int64_t row, int64_t begin, int64_t end) {
  alignas(64) float z[kBlock + kSlack];
  RowScan found{kMinusInfinity, false};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    load_row(job, row, i, count, 0, z);
    found.largest = with_sink(largest(z, count), found.largest);
    found.nan |= has_nan(z, count);
  }
  return found;
}

Answer softmax_answer(const Softmax& job, int64_t row, const RowSum* sums, int64_t count, float shift) {
  int exponent = 0;
  bool raised = false;
  for (int64_t c = 0; c < count; c++)
    if (sums[c].raised && (!raised || sums[c].exponent > exponent)) {
      exponent = sums[c].exponent;
      raised = true;
    }
  const float sink = sink_of(job, row, 0) - shift;
  if (in_range(sink) && (!raised || nearest_exponent(sink) > exponent)) exponent = nearest_exponent(sink);
  double total = 0;
  float most = sink;
  for (int64_t c = 0; c < count; c++) {
    total += sums[c].total * (sums[c].raised ? power_of_two(sums[c].exponent - exponent) : 0);
    most = with_sink(sums[c].largest, most);
  }
  if (job.sink) total += lifted_sink(sink, 0, reference(exponent));
  return answer_of(job.kind, total, exponent, shift, most);
}

Answer softmax_infinite(const Softmax& job, float largest, bool nan) {
  return answer_at_infinity(job, largest, nan);
}

void softmax_write(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift,
                   const Answer& by) {
  if (job.out_dtype == kF32) return write_of<float>(job, row, begin, end, shift, by);
  if (job.out_dtype == kBF16) return write_of<bf16>(job, row, begin, end, shift, by);
  return write_of<f16>(job, row, begin, end, shift, by);
}

}  // namespace pk::cpu::PK_ISA
