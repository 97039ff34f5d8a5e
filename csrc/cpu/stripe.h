// Thirty-two elements, one per virtual lane, and arithmetic on all of them: an instruction for each register
// before the next, as a chain of dependent ones leaves a processor little else to do meanwhile.
#pragma once
#include "lanes.h"

#define PK_ALWAYS __attribute__((always_inline))

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kStripe = 32;
constexpr int kPairs = kStripe / kGroup;

struct Stripe {
  Pair p[kPairs];
  PK_MEMBER static Stripe of(float x) {
    Stripe s;
    for (Pair& pair : s.p) pair = {F::of(x), F::of(x)};
    return s;
  }
};

template <class T>
PK_IN Stripe load_stripe(const T* x) {
  Stripe s;
  for (int k = 0; k < kPairs; k++) s.p[k] = load(x + k * kGroup);
  return s;
}

/// The first `count` elements, at least one, followed by `rest`; reads nothing behind them.
template <class T>
PK_IN Stripe load_some(const T* x, int count, T rest) {
  Stripe s;
  for (int k = 0; k < kPairs; k++) s.p[k] = load_first(x + k * kGroup, count - k * kGroup, rest);
  return s;
}

template <class Function, class... More>
PK_IN Stripe each(Function f, const Stripe& s, const More&... more) {
  Stripe r;
  for (int k = 0; k < kPairs; k++) r.p[k] = {f(s.p[k].a, more.p[k].a...), f(s.p[k].b, more.p[k].b...)};
  return r;
}

PK_IN Stripe operator+(const Stripe& s, const Stripe& t) {
  return each([](F x, F y) PK_ALWAYS { return x + y; }, s, t);
}
PK_IN Stripe operator-(const Stripe& s, const Stripe& t) {
  return each([](F x, F y) PK_ALWAYS { return x - y; }, s, t);
}
PK_IN Stripe operator*(const Stripe& s, const Stripe& t) {
  return each([](F x, F y) PK_ALWAYS { return x * y; }, s, t);
}
PK_IN Stripe fma(const Stripe& s, const Stripe& t, const Stripe& u) {
  return each([](F x, F y, F z) PK_ALWAYS { return fma(x, y, z); }, s, t, u);
}
PK_IN Stripe larger(const Stripe& bound, const Stripe& s) {  // a NaN in s survives
  return each([](F x, F y) PK_ALWAYS { return larger(x, y); }, bound, s);
}
PK_IN Stripe as_power(const Stripe& s) {
  return each([](F x) PK_ALWAYS { return as_power(x); }, s);
}
PK_IN Stripe less_exponents(const Stripe& s, int by) {
  return each([=](F x) PK_ALWAYS { return less_exponents(x, by); }, s);
}
PK_IN F largest_register(const Stripe& s) {
  F all = larger(s.p[0].a, s.p[0].b);
  for (int k = 1; k < kPairs; k++) all = larger(all, larger(s.p[k].a, s.p[k].b));
  return all;
}

/// A pair as T's load orders it, in the order that O's put takes.
template <class T, class O>
PK_IN Pair ordered(const Pair& x) {
  if (kParted<T> && !kParted<O>) return interleave(x);
  return kParted<O> && !kParted<T> ? part(x) : x;
}

/// Round a stripe as T's load orders it and write it as elements of O; a NaN of a 16-bit output must be
/// canonical. `stream`: past the cache, where `out` is a multiple of 64.
template <class T, class O>
PK_IN void put_stripe(O* out, const Stripe& s, bool stream = false) {
  for (int k = 0; k < kPairs; k++) put(out + k * kGroup, ordered<T, O>(s.p[k]), stream);
}

/// The same for the first `count` elements of a stripe.
template <class T, class O>
PK_IN void put_some(O* out, const Stripe& s, int count, bool stream = false) {
  if (count == kStripe) return put_stripe<T>(out, s, stream);
  for (int k = 0; k < kPairs; k++) {
    const int at = k * kGroup, left = count - at;
    if (left < kGroup) return put_first(out + at, ordered<T, O>(s.p[k]), left);
    put(out + at, ordered<T, O>(s.p[k]), false);
  }
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
