// Four lanes by the compiler's vector extension: SSE2, NEON or anything else. Internal to the including file.
#pragma once

constexpr int kLanes = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint64_t Longs __attribute__((vector_size(16)));

struct M {
  Ints v;
};
struct F {
  Floats v;
  PK_MEMBER static F of(float x) { return {Floats{x, x, x, x}}; }
};
struct U {
  Words v;
};
struct W {
  Longs v;
};

PK_IN F operator+(F a, F b) { return {a.v + b.v}; }
PK_IN F operator-(F a, F b) { return {a.v - b.v}; }
PK_IN F operator*(F a, F b) { return {a.v * b.v}; }
PK_IN F operator/(F a, F b) { return {a.v / b.v}; }
PK_IN F operator-(F a) { return {-a.v}; }
PK_IN F broadcast(float x) { return F::of(x); }
PK_IN U broadcast(uint32_t x) { return {Words{x, x, x, x}}; }
PK_IN U load_words(const uint32_t* p) {
  U x;
  memcpy(&x.v, p, 16);
  return x;
}

PK_IN M operator|(M a, M b) { return {a.v | b.v}; }
PK_IN M operator&(M a, M b) { return {a.v & b.v}; }
PK_IN M and_not(M a, M b) { return {a.v & ~b.v}; }
PK_IN bool any(M a, M b) {
  const Longs x = Longs((a | b).v);
  return (x[0] | x[1]) != 0;
}
PK_IN uint32_t bits(M a) {
  const Ints x = a.v & Ints{1, 2, 4, 8};
  return uint32_t(x[0] | x[1] | x[2] | x[3]);
}

PK_IN U key(F x) { return {Words(x.v) & Words{kAbs, kAbs, kAbs, kAbs}}; }
PK_IN M at_least(U a, U b) { return {Ints(a.v >= b.v)}; }
PK_IN M equal(U a, U b) { return {Ints(a.v == b.v)}; }
PK_IN M positive_or_nan(F x) { return {~Ints(x.v <= Floats{})}; }
PK_IN M positive(F x) { return {Ints(x.v > Floats{})}; }
PK_IN M negative(F x) { return {Ints(x.v < Floats{})}; }
PK_IN M not_less(F a, F b) { return {~Ints(a.v < b.v)}; }
PK_IN M is_zero(F x) { return {Ints(x.v == Floats{})}; }
PK_IN M is_nan(F x) { return {Ints(x.v != x.v)}; }
PK_IN M either_nan(F a, F b) { return {Ints(a.v != a.v) | Ints(b.v != b.v)}; }
PK_IN F select(M m, F a, F b) { return {Floats((Ints(a.v) & m.v) | (Ints(b.v) & ~m.v))}; }
// x & mask adds +0 where the mask is clear: sums start at +0, so nothing else changes.
PK_IN F add_where(F sum, M m, F x) { return {sum.v + Floats(Ints(x.v) & m.v)}; }
PK_IN F multiply_where(M m, F a, F b) { return {Floats(Ints(a.v * b.v) & m.v)}; }
PK_IN void store(uint32_t* p, U x) { memcpy(p, &x.v, 16); }
PK_IN void store(float* p, F x) { memcpy(p, &x.v, 16); }

// For exponentials. A NaN in x survives larger.
PK_IN F load_floats(const float* p) {
  F x;
  memcpy(&x.v, p, 16);
  return x;
}
PK_IN F larger(F bound, F x) { return select({Ints(bound.v > x.v)}, bound, x); }
PK_IN M less(F a, F b) { return {Ints(a.v < b.v)}; }
PK_IN float largest_lane(F x) {
  const float a = x.v[0] > x.v[1] ? x.v[0] : x.v[1], b = x.v[2] > x.v[3] ? x.v[2] : x.v[3];
  return a > b ? a : b;
}
PK_IN F as_power(F r) { return {Floats(Words(r.v) << 23)}; }
PK_IN F less_exponents(F x, int by) {  // x * 2^-by, or the bits that stand for a denormal one
  return {Floats(Ints(x.v) - (by << 23))};
}
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
PK_IN F fma(F a, F b, F c) {
  for (int i = 0; i < kLanes; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
#else
// Products of floats are exact in double. Where the sum lies, as a double, just between two floats, rounding
// twice could differ from rounding once: such lanes ask the library. A function of its own: so many
// instructions in place of each would fill the caches, and the compiler's minutes.
__attribute__((noinline)) inline F fma(F a, F b, F c) {
  typedef double Doubles __attribute__((vector_size(32)));
  typedef int64_t Wide __attribute__((vector_size(32)));
  const Doubles sum = __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles) +
                      __builtin_convertvector(c.v, Doubles);
  const Wide between = (Wide(sum) & 0x1FFFFFFF) == 0x10000000;
  F x = {__builtin_convertvector(sum, Floats)};
  if (__builtin_expect((between[0] | between[1] | between[2] | between[3]) != 0, 0))
    for (int i = 0; i < kLanes; i++) x.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return x;
}
#endif

/// Number of set lanes, summed over calls. A lane wraps after 2^30 calls: callers total up long before.
struct Counter {
  Ints n = {};
  PK_MEMBER void add(M a, M b) { n -= a.v + b.v; }
  PK_MEMBER int64_t total() const { return int64_t(n[0]) + n[1] + n[2] + n[3]; }
};

/// Write the chosen lanes to p in order, with up to 4 words of slack behind them; returns how many.
PK_IN int compress(uint32_t* p, M m, U x) {
  int n = 0;
  for (int i = 0; i < kLanes; i++) {
    p[n] = x.v[i];
    n += m.v[i] != 0;
  }
  return n;
}

PK_IN F canonical(F x) { return select(is_nan(x), F{Floats(broadcast(kNaN).v)}, x); }

struct Pair {
  F a, b;
};

PK_IN Pair load(const bf16* p) {
  const U x = load_words(reinterpret_cast<const uint32_t*>(p));
  return {{Floats(x.v << 16)}, {Floats(x.v & Words{0xFFFF0000u, 0xFFFF0000u, 0xFFFF0000u, 0xFFFF0000u})}};
}
PK_IN Pair load(const f16* p) {
  f16 h[8];
  memcpy(h, p, 16);
  Pair x = {F::of(0), F::of(0)};
  for (int i = 0; i < 4; i++) {
    x.a.v[i] = to_float(h[i]);
    x.b.v[i] = to_float(h[i + 4]);
  }
  return x;
}
PK_IN Pair load(const float* p) {
  Pair x = {F::of(0), F::of(0)};
  memcpy(&x, p, 32);
  return x;
}

// The first `count` elements, which may be none or more than there are lanes, followed by `rest`.
template <class T>
PK_IN Pair load_first(const T* p, int count, T rest) {
  constexpr int most = 2 * kLanes;
  if (count >= most) return load(p);
  T some[most];
  for (T& x : some) x = rest;
  if (count > 0) memcpy(static_cast<void*>(some), p, size_t(count) * sizeof(T));
  return load(some);
}

PK_IN Pair interleave(Pair x) {  // even, odd -> in order
  const Floats a = x.a.v, b = x.b.v;
  return {{Floats{a[0], b[0], a[1], b[1]}}, {Floats{a[2], b[2], a[3], b[3]}}};
}
PK_IN Pair part(Pair x) {  // in order -> even, odd
  const Floats a = x.a.v, b = x.b.v;
  return {{Floats{a[0], a[2], b[0], b[2]}}, {Floats{a[1], a[3], b[1], b[3]}}};
}

PK_IN Words round_bf16(F x) {  // the rounded bits stand in the high half of each lane
  const Words u = Words(x.v);
  return u + 0x7FFFu + ((u >> 16) & 1u);
}
PK_IN void put(bf16* p, Pair x, bool) {  // takes even, odd
  const Words joined = (round_bf16(x.a) >> 16) | (round_bf16(x.b) & 0xFFFF0000u);
  memcpy(p, &joined, 16);
}
PK_IN void put(f16* p, Pair x, bool) {
  f16 h[8];
  for (int i = 0; i < 4; i++) {
    round_to(x.a.v[i], &h[i]);
    round_to(x.b.v[i], &h[i + 4]);
  }
  memcpy(p, h, 16);
}
PK_IN void put(float* p, Pair x, bool) { memcpy(p, &x, 32); }
// The first `count` elements of a pair, fewer than all.
template <class T>
PK_IN void put_first(T* p, Pair x, int count) {
  T all[2 * kLanes];
  put(all, x, false);
  memcpy(static_cast<void*>(p), all, size_t(count) * sizeof(T));
}
PK_IN void fence() {}

// 8 draws of 16 bits, two to a word: which are below the threshold (0..65536)?
struct Below {
  U threshold;
  PK_MEMBER explicit Below(uint32_t t) : threshold(broadcast(t)) {}
};
PK_IN void below_parted(Below t, U draws, M& a, M& b) {  // for even, odd lanes
  a.v = Ints((draws.v & 0xFFFFu) < t.threshold.v);
  b.v = Ints((draws.v >> 16) < t.threshold.v);
}
PK_IN void below_in_order(Below t, U draws, M& a, M& b) {
  M even, odd;
  below_parted(t, draws, even, odd);
  const Pair p = interleave({{Floats(even.v)}, {Floats(odd.v)}});
  a.v = Ints(p.a.v);
  b.v = Ints(p.b.v);
}

constexpr int kWide = 2;  // 64-bit lanes
PK_IN W mul_low(W a, uint32_t b) { return {(a.v & 0xFFFFFFFFull) * uint64_t(b)}; }
PK_IN W high(W a) { return {a.v >> 32}; }
PK_IN W xor3(W a, W b, uint32_t c) { return {a.v ^ b.v ^ uint64_t(c)}; }
PK_IN W broadcast_wide(uint32_t x) { return {Longs{x, x}}; }
PK_IN W count_by_two(uint32_t x) { return {Longs{x, x + 2ull}}; }
PK_IN void store_joined(uint32_t* p, W even, W odd) {  // low words of even and odd counters, interleaved
  const Longs joined = (even.v & 0xFFFFFFFFull) | odd.v << 32;
  memcpy(p, &joined, 16);
}
