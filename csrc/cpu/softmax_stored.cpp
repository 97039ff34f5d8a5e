// softmax in float32 of rows that the last-level cache holds: one exponential an element, kept until the sum
// is known. Traffic: reads x once and writes out once past that cache; within it a row's exponentials are
// written and read once more.
//
// The exponent is raised lazily, as in softmax_split.cpp, but by whole blocks: the largest element of a block
// is found while the exponentials of the block before it are computed, as one waits for memory and the other
// for arithmetic; what comes after is fetched meanwhile.
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kLowest = -180;  // powers of two further down, all of w rounds to 0

/// w times 2^by, by < 0. What rounds to 0 becomes the least number that does, as denormals cost time; so does
/// a power of two that is one, hence in two steps.
void lower(float* w, int64_t n, int by) {
  by = by < kLowest ? kLowest : by;
  const Stripe least = Stripe::of(float(power_of_two(-kDeepest + kLift - 1 - by)));
  const Stripe half = Stripe::of(float(power_of_two(by / 2)));
  const Stripe rest = Stripe::of(float(power_of_two(by - by / 2)));
  each_stripe(w, n, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
    put_some<float>(w + i, larger(least, s) * half * rest, count);
  });
}

/// A sum over blocks, and the number above which one raises its exponent.
struct BlockSum {
  RowSum sum{0, 0, false, false, kMinusInfinity};
  float bound = -kLargest;

  /// Makes room for a block whose largest element is `most`; false where the row is to be given up.
  PK_MEMBER bool admit(float most) {
    sum.largest = with_sink(most, sum.largest);
    if (!(most > bound)) return true;
    sum.bad = !(most < kLargest);
    if (sum.bad) return false;
    const int exponent = nearest_exponent(most);
    // Nothing but -inf (and NaN, which stays) was summed before the first number.
    sum.total *= sum.raised ? power_of_two(sum.exponent - exponent) : 0;
    sum.exponent = exponent;
    sum.raised = true;
    bound = most + kHeadroom;
    return true;
  }
};

constexpr int64_t kBlockBytes = kBlock * int64_t(sizeof(float));

/// The exponentials of a whole block to `to`, and their sum, as `exponentials` gives it; in `following` the
/// largest element of the block behind it.
double store_block(const float* x, float* to, Reference at, float& following) {
  const Stripe magic = Stripe::of(at.magic), low = Stripe::of(at.low);
  F most = F::of(kMinusInfinity);
  const Stripe lanes = sum_of_block(x, kBlock, [&](const Stripe& s, int64_t i, int) PK_ALWAYS {
    fetch(reinterpret_cast<const char*>(x + i) + 2 * kBlockBytes, kStripe * int64_t(sizeof(float)));
    const Stripe w = lifted_exp<6>(s, magic, low);
    put_stripe<float>(to + i, w);
    for (const Pair& p : load_stripe(x + kBlock + i).p) most = larger(p.b, larger(p.a, most));
    return w;
  });
  following = largest_lane(most);
  return tree<float>(lanes);
}

}  // namespace

Regime softmax_regime() {
#if defined(PK_AVX512)
  return kOnAvx512;
#elif defined(PK_AVX2)
  return kOnAvx2;
#else
  return kOnOthers;
#endif
}

RowSum softmax_store(const Softmax& job, int64_t row, int64_t begin, int64_t end, float shift, float* w,
                     int* exponents) {
  const bool direct = job.plain() && shift == 0 && job.dtype == kF32;
  const float* x = static_cast<const float*>(job.x) + row * job.n;
  alignas(64) float z[kBlock + kSlack];
  BlockSum blocks;
  float most = 0;
  bool found = false;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    if (!direct) load_row(job, row, i, count, shift, z);
    const float* from = direct ? x + i : z;
    if (!blocks.admit(found ? most : largest(from, count))) break;
    exponents[i / kBlock] = blocks.sum.exponent;
    const Reference at = reference(blocks.sum.exponent);
    found = direct && end - i >= 2 * kBlock;
    blocks.sum.total += found
                            ? store_block(from, w + i, at, most)
                            : exponentials<float, 6, true>(from, w + i, count, at, direct ? kBlockBytes : 0);
  }
  return blocks.sum;
}

void softmax_scale(const Softmax& job, int64_t row, int64_t begin, int64_t end, float* w,
                   const int* exponents, const Answer& by) {
  float* out = static_cast<float*>(job.out) + row * job.n;
  if (by.fill != Answer::kCompute) return fill(out + begin, end - begin, filling(job, by.fill));
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    if (exponents[i / kBlock] < by.exponent) lower(w + i, count, exponents[i / kBlock] - by.exponent);
    scale_row<float>(w + i, out + i, count, by, job.stream);
  }
  if (job.stream) fence();
}

}  // namespace pk::cpu::PK_ISA
