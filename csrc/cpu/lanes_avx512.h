// Sixteen lanes: AVX-512 F, BW, DQ, VL. Functions here are internal to the file that includes them (see
// lanes.h).
#pragma once

constexpr int kLanes = 16;

struct M {
  __mmask16 v;
};
struct F {
  __m512 v;
  PK_MEMBER static F of(float x) { return {_mm512_set1_ps(x)}; }
};
struct U {
  __m512i v;
};
struct W {
  __m512i v;
};

PK_IN F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
PK_IN F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
PK_IN F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
PK_IN F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
PK_IN F operator-(F a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
PK_IN F broadcast(float x) { return F::of(x); }
PK_IN U broadcast(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
PK_IN U load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }

PK_IN M operator|(M a, M b) { return {__mmask16(a.v | b.v)}; }
PK_IN M operator&(M a, M b) { return {__mmask16(a.v & b.v)}; }
PK_IN M and_not(M a, M b) { return {__mmask16(a.v & ~b.v)}; }
PK_IN bool any(M a, M b) { return (a.v | b.v) != 0; }
PK_IN uint32_t bits(M a) { return a.v; }

PK_IN U key(F x) { return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(int(kAbs)))}; }
PK_IN M at_least(U a, U b) { return {_mm512_cmpge_epu32_mask(a.v, b.v)}; }
PK_IN M equal(U a, U b) { return {_mm512_cmpeq_epu32_mask(a.v, b.v)}; }
PK_IN M positive_or_nan(F x) { return {_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ)}; }
PK_IN M positive(F x) { return {_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ)}; }
PK_IN M negative(F x) { return {_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ)}; }
PK_IN M not_less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
PK_IN M is_zero(F x) { return {_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_EQ_OQ)}; }
PK_IN M is_nan(F x) { return {_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q)}; }
PK_IN M either_nan(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q)}; }
PK_IN F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
PK_IN F add_where(F sum, M m, F x) { return {_mm512_mask_add_ps(sum.v, m.v, sum.v, x.v)}; }
PK_IN F multiply_where(M m, F a, F b) { return {_mm512_maskz_mul_ps(m.v, a.v, b.v)}; }
PK_IN void store(uint32_t* p, U x) { _mm512_storeu_si512(p, x.v); }
PK_IN void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }

// For exponentials. A NaN in x survives larger.
PK_IN F load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
PK_IN F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PK_IN F larger(F bound, F x) { return {_mm512_max_ps(bound.v, x.v)}; }
PK_IN M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PK_IN float largest_lane(F x) { return _mm512_reduce_max_ps(x.v); }
PK_IN F as_power(F r) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(r.v), 23))}; }
PK_IN F less_exponents(F x, int by) {  // x * 2^-by, or the bits that stand for a denormal one
  return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(by << 23)))};
}

/// Number of set lanes, summed over calls.
struct Counter {
  uint64_t n = 0;
  PK_MEMBER void add(M a, M b) { n += unsigned(__builtin_popcount(uint32_t(a.v) | uint32_t(b.v) << 16)); }
  PK_MEMBER int64_t total() const { return int64_t(n); }
};

/// Write the chosen lanes to p in order, with up to 16 words of slack behind them; returns how many.
PK_IN int compress(uint32_t* p, M m, U x) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.v, x.v));
  return __builtin_popcount(m.v);
}

PK_IN F canonical(F x) {
  return {_mm512_mask_blend_ps(is_nan(x).v, x.v, _mm512_castsi512_ps(_mm512_set1_epi32(int(kNaN))))};
}

struct Pair {
  F a, b;
};

// bfloat16 comes apart into even and odd elements: two instructions for 32 elements.
PK_IN Pair load(const bf16* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000u))))}};
}
PK_IN Pair load(const f16* p) {
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))},
          {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)))}};
}
PK_IN Pair load(const float* p) { return {{_mm512_loadu_ps(p)}, {_mm512_loadu_ps(p + 16)}}; }

// The first `count` elements, which may be none or all, followed by `rest`. No memory behind them is touched.
PK_IN __mmask32 first(int count) { return _bzhi_u32(~0u, unsigned(count)); }
PK_IN Pair load_first(const bf16* p, int count, bf16 rest) {
  const __m512i x = _mm512_mask_loadu_epi16(_mm512_set1_epi16(short(rest.bits)), first(count), p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000u))))}};
}
PK_IN Pair load_first(const f16* p, int count, f16 rest) {
  const __m512i x = _mm512_mask_loadu_epi16(_mm512_set1_epi16(short(rest.bits)), first(count), p);
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(x))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))}};
}
PK_IN Pair load_first(const float* p, int count, float rest) {
  const __mmask32 some = first(count);
  const __m512 r = _mm512_set1_ps(rest);
  return {{_mm512_mask_loadu_ps(r, __mmask16(some), p)},
          {_mm512_mask_loadu_ps(r, __mmask16(some >> 16), p + 16)}};
}

PK_IN Pair interleave(Pair x) {  // even, odd -> in order
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {{_mm512_permutex2var_ps(x.a.v, low, x.b.v)}, {_mm512_permutex2var_ps(x.a.v, high, x.b.v)}};
}
PK_IN Pair part(Pair x) {  // in order -> even, odd
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {{_mm512_permutex2var_ps(x.a.v, even, x.b.v)}, {_mm512_permutex2var_ps(x.a.v, odd, x.b.v)}};
}

PK_IN __m512i round_bf16(F x) {  // the rounded bits stand in the high half of each lane
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
}
PK_IN void write(void* p, __m512i x, bool stream) {
  if (stream)
    _mm512_stream_si512(static_cast<__m512i*>(p), x);
  else
    _mm512_storeu_si512(p, x);
}
PK_IN __m512i narrowed(bf16, Pair x) {  // takes even, odd
  const __m512i even = _mm512_srli_epi32(round_bf16(x.a), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, even, round_bf16(x.b));
}
PK_IN __m512i narrowed(f16, Pair x) {
  const __m256i a = _mm512_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i b = _mm512_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
template <class T>
PK_IN void put(T* p, Pair x, bool stream) {
  write(p, narrowed(T{}, x), stream);
}
PK_IN void put(float* p, Pair x, bool stream) {
  write(p, _mm512_castps_si512(x.a.v), stream);
  write(p + 16, _mm512_castps_si512(x.b.v), stream);
}
// The first `count` elements of a pair, fewer than all.
template <class T>
PK_IN void put_first(T* p, Pair x, int count) {
  _mm512_mask_storeu_epi16(p, first(count), narrowed(T{}, x));
}
PK_IN void put_first(float* p, Pair x, int count) {
  _mm512_mask_storeu_ps(p, __mmask16(first(count)), x.a.v);
  _mm512_mask_storeu_ps(p + 16, __mmask16(first(count) >> 16), x.b.v);
}
PK_IN void fence() { _mm_sfence(); }

// 32 draws of 16 bits in element order: which are below the threshold (0..65536)?
struct Below {
  __m512i limit;
  __mmask32 possible;
  PK_MEMBER explicit Below(uint32_t threshold)
      : limit(_mm512_set1_epi16(short(threshold - 1))), possible(threshold ? ~0u : 0u) {}
  PK_MEMBER __mmask32 of(U draws) const { return _mm512_mask_cmple_epu16_mask(possible, draws.v, limit); }
};
PK_IN void below_parted(Below t, U draws, M& a, M& b) {  // for even, odd lanes
  const uint32_t m = t.of(draws);
  a.v = __mmask16(_pext_u32(m, 0x55555555u));
  b.v = __mmask16(_pext_u32(m, 0xAAAAAAAAu));
}
PK_IN void below_in_order(Below t, U draws, M& a, M& b) {
  const uint32_t m = t.of(draws);
  a.v = __mmask16(m);
  b.v = __mmask16(m >> 16);
}

constexpr int kWide = 8;  // 64-bit lanes
PK_IN W mul_low(W a, uint32_t b) { return {_mm512_mul_epu32(a.v, _mm512_set1_epi64(b))}; }
PK_IN W high(W a) { return {_mm512_srli_epi64(a.v, 32)}; }
PK_IN W xor3(W a, W b, uint32_t c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, _mm512_set1_epi64(c), 0x96)};
}
PK_IN W broadcast_wide(uint32_t x) { return {_mm512_set1_epi64(x)}; }
PK_IN W count_by_two(uint32_t x) {
  return {_mm512_add_epi64(_mm512_set1_epi64(x), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14))};
}
PK_IN void store_joined(uint32_t* p, W even, W odd) {  // low words of even and odd counters, interleaved
  _mm512_store_si512(p, _mm512_mask_shuffle_epi32(even.v, 0xAAAA, odd.v, _MM_PERM_ENUM(0xA0)));
}
