// Eight lanes: AVX2, FMA, F16C, BMI2. Functions here are internal to the file that includes them (see
// lanes.h).
#pragma once

constexpr int kLanes = 8;

struct M {
  __m256i v;
};
struct F {
  __m256 v;
  PK_MEMBER static F of(float x) { return {_mm256_set1_ps(x)}; }
};
struct U {
  __m256i v;
};
struct W {
  __m256i v;
};

PK_IN F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
PK_IN F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
PK_IN F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
PK_IN F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
PK_IN F operator-(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
PK_IN F broadcast(float x) { return F::of(x); }
PK_IN U broadcast(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
PK_IN U load_words(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }

PK_IN M operator|(M a, M b) { return {_mm256_or_si256(a.v, b.v)}; }
PK_IN M operator&(M a, M b) { return {_mm256_and_si256(a.v, b.v)}; }
PK_IN M and_not(M a, M b) { return {_mm256_andnot_si256(b.v, a.v)}; }
PK_IN bool any(M a, M b) { return !_mm256_testz_si256((a | b).v, (a | b).v); }
PK_IN uint32_t bits(M a) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(a.v))); }

PK_IN U key(F x) { return {_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(int(kAbs)))}; }
PK_IN M at_least(U a, U b) { return {_mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v)}; }
PK_IN M equal(U a, U b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
PK_IN M as_mask(__m256 x) { return {_mm256_castps_si256(x)}; }
PK_IN M positive_or_nan(F x) { return as_mask(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
PK_IN M positive(F x) { return as_mask(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ)); }
PK_IN M negative(F x) { return as_mask(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ)); }
PK_IN M not_less(F a, F b) { return as_mask(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)); }
PK_IN M is_zero(F x) { return as_mask(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_EQ_OQ)); }
PK_IN M is_nan(F x) { return as_mask(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)); }
PK_IN M either_nan(F a, F b) { return as_mask(_mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q)); }
PK_IN F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m.v))}; }
// x & mask adds +0 where the mask is clear: sums start at +0, so nothing else changes.
PK_IN F add_where(F sum, M m, F x) {
  return {_mm256_add_ps(sum.v, _mm256_and_ps(x.v, _mm256_castsi256_ps(m.v)))};
}
PK_IN F multiply_where(M m, F a, F b) {
  return {_mm256_and_ps(_mm256_mul_ps(a.v, b.v), _mm256_castsi256_ps(m.v))};
}
PK_IN void store(uint32_t* p, U x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
PK_IN void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }

// For exponentials. A NaN in x survives larger.
PK_IN F load_floats(const float* p) { return {_mm256_loadu_ps(p)}; }
PK_IN F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PK_IN F larger(F bound, F x) { return {_mm256_max_ps(bound.v, x.v)}; }
PK_IN M less(F a, F b) { return as_mask(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)); }
PK_IN float largest_lane(F x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
PK_IN F as_power(F r) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r.v), 23))}; }
PK_IN F less_exponents(F x, int by) {  // x * 2^-by, or the bits that stand for a denormal one
  return {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(by << 23)))};
}

/// Number of set lanes, summed over calls.
struct Counter {
  uint64_t n = 0;
  PK_MEMBER void add(M a, M b) { n += unsigned(__builtin_popcount(bits(a) | bits(b) << 8)); }
  PK_MEMBER int64_t total() const { return int64_t(n); }
};

/// Write the chosen lanes to p in order, with up to 8 words of slack behind them; returns how many.
PK_IN int compress(uint32_t* p, M m, U x) {
  const uint64_t lanes = _pdep_u64(bits(m), 0x0101010101010101ull) * 0xFFu;
  const uint64_t order = _pext_u64(0x0706050403020100ull, lanes);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(order)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(x.v, index));
  return __builtin_popcount(bits(m));
}

PK_IN F canonical(F x) { return select(is_nan(x), F{_mm256_castsi256_ps(_mm256_set1_epi32(int(kNaN)))}, x); }

struct Pair {
  F a, b;
};

PK_IN Pair widened(bf16, __m256i x) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xFFFF0000u))))}};
}
PK_IN Pair widened(f16, __m256i x) {
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(x))}, {_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))}};
}
PK_IN Pair load(const bf16* p) {
  return widened(bf16{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PK_IN Pair load(const f16* p) {
  return {{_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))},
          {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))}};
}
PK_IN Pair load(const float* p) { return {{_mm256_loadu_ps(p)}, {_mm256_loadu_ps(p + 8)}}; }

// The first `count` elements, which may be none or more than there are lanes, followed by `rest`. No memory
// behind them is touched, nor is a store waited for, as a load from a copy would that stores made in pieces.
PK_IN __m256i first_words(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PK_IN F load_words_or(const float* p, int count, float rest) {
  const __m256i some = first_words(count);
  const __m256 x = _mm256_maskload_ps(p, some);
  return {_mm256_blendv_ps(_mm256_set1_ps(rest), x, _mm256_castsi256_ps(some))};
}
PK_IN Pair load_first(const float* p, int count, float rest) {
  return {load_words_or(p, count, rest), load_words_or(p + 8, count - 8, rest)};
}
template <class T>
PK_IN Pair load_first(const T* p, int count, T rest) {
  const __m256i place = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int even = count & ~1;
  const __m256i twos = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_words(even / 2));
  const __m256i some = _mm256_cmpgt_epi16(_mm256_set1_epi16(short(even)), place);
  __m256i x = _mm256_blendv_epi8(_mm256_set1_epi16(short(rest.bits)), twos, some);
  if (count > 0 && even < count) {
    const __m256i last = _mm256_cmpeq_epi16(_mm256_set1_epi16(short(even)), place);
    short end;
    memcpy(&end, static_cast<const void*>(p + even), 2);
    x = _mm256_blendv_epi8(x, _mm256_set1_epi16(end), last);
  }
  return widened(T{}, x);
}

PK_IN Pair interleave(Pair x) {  // even, odd -> in order
  const __m256 low = _mm256_unpacklo_ps(x.a.v, x.b.v), high = _mm256_unpackhi_ps(x.a.v, x.b.v);
  return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
}
PK_IN Pair part(Pair x) {  // in order -> even, odd
  const __m256 even = _mm256_shuffle_ps(x.a.v, x.b.v, 0x88), odd = _mm256_shuffle_ps(x.a.v, x.b.v, 0xDD);
  return {{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xD8))},
          {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xD8))}};
}

PK_IN __m256i round_bf16(F x) {  // the rounded bits stand in the high half of each lane
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
}
PK_IN void write(void* p, __m256i x, bool stream) {
  if (stream)
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
  else
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
PK_IN __m256i narrowed(bf16, Pair x) {  // takes even, odd
  const __m256i even = _mm256_srli_epi32(round_bf16(x.a), 16);
  return _mm256_blend_epi16(even, round_bf16(x.b), 0xAA);
}
/// Pairs narrowed to bfloat16 in half as many steps. Half a unit is added and the rest cut off, which is
/// wrong where a number lay midway between two, or was NaN: `failed` says so of all that were narrowed (and,
/// in rare cases, of very large ones).
struct Hasty {
  __m256i least = _mm256_set1_epi32(-1);
  F any_nan = F::of(0);
  PK_MEMBER __m256i narrow(Pair x) {
    any_nan = fma(x.a, x.b, any_nan);
    const __m256i half = _mm256_set1_epi32(0x8000);
    const __m256i even = _mm256_add_epi32(_mm256_castps_si256(x.a.v), half);
    const __m256i odd = _mm256_add_epi32(_mm256_castps_si256(x.b.v), half);
    least = _mm256_min_epu16(_mm256_min_epu16(least, even), odd);
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
  }
  PK_MEMBER bool failed() const {
    const __m256i midway = _mm256_slli_epi32(_mm256_cmpeq_epi16(least, _mm256_setzero_si256()), 16);
    const M wrong = is_nan(any_nan) | M{midway};
    return bits(wrong) != 0;
  }
};
PK_IN __m256i narrowed(f16, Pair x) {
  const __m128i a = _mm256_cvtps_ph(x.a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i b = _mm256_cvtps_ph(x.b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}
template <class T>
PK_IN void put(T* p, Pair x, bool stream) {
  write(p, narrowed(T{}, x), stream);
}
PK_IN void put(float* p, Pair x, bool stream) {
  write(p, _mm256_castps_si256(x.a.v), stream);
  write(p + 8, _mm256_castps_si256(x.b.v), stream);
}

// The first `bytes` of a register, fewer than all. In pieces, of which every row of a tensor has the same: a
// masked store takes as long as a dozen of them.
PK_IN void write_first(void* p, __m256i x, int bytes) {
  char* to = static_cast<char*>(p);
  __m128i part = _mm256_castsi256_si128(x);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), part);
    part = _mm256_extracti128_si256(x, 1);
    to += 16;
  }
  if (bytes & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), part);
    part = _mm_srli_si128(part, 8);
    to += 8;
  }
  int word = _mm_cvtsi128_si32(part);
  if (bytes & 4) {
    memcpy(to, &word, 4);
    word = _mm_extract_epi32(part, 1);
    to += 4;
  }
  if (bytes & 2) memcpy(to, &word, 2);
}
// The first `count` elements of a pair, fewer than all.
template <class T>
PK_IN void put_first(T* p, Pair x, int count) {
  write_first(p, narrowed(T{}, x), 2 * count);
}
PK_IN void put_first(float* p, Pair x, int count) {
  if (count < 8) return write_first(p, _mm256_castps_si256(x.a.v), 4 * count);
  write(p, _mm256_castps_si256(x.a.v), false);
  write_first(p + 8, _mm256_castps_si256(x.b.v), 4 * count - 32);
}
PK_IN void fence() { _mm_sfence(); }

// 16 draws of 16 bits, two to a word: which are below the threshold (0..65536)?
struct Below {
  __m256i limit;
  PK_MEMBER explicit Below(uint32_t threshold) : limit(_mm256_set1_epi32(int(threshold))) {}
};
PK_IN void below_parted(Below t, U draws, M& a,
                        M& b) {  // for even, odd lanes; both sides fit a signed compare
  a.v = _mm256_cmpgt_epi32(t.limit, _mm256_and_si256(draws.v, _mm256_set1_epi32(0xFFFF)));
  b.v = _mm256_cmpgt_epi32(t.limit, _mm256_srli_epi32(draws.v, 16));
}
PK_IN void below_in_order(Below t, U draws, M& a, M& b) {
  M even, odd;
  below_parted(t, draws, even, odd);
  const Pair p = interleave({{_mm256_castsi256_ps(even.v)}, {_mm256_castsi256_ps(odd.v)}});
  a = as_mask(p.a.v);
  b = as_mask(p.b.v);
}

constexpr int kWide = 4;  // 64-bit lanes
PK_IN W mul_low(W a, uint32_t b) { return {_mm256_mul_epu32(a.v, _mm256_set1_epi64x(b))}; }
PK_IN W high(W a) { return {_mm256_srli_epi64(a.v, 32)}; }
PK_IN W xor3(W a, W b, uint32_t c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), _mm256_set1_epi64x(c))};
}
PK_IN W broadcast_wide(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
PK_IN W count_by_two(uint32_t x) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 2, 4, 6))};
}
PK_IN void store_joined(uint32_t* p, W even, W odd) {  // low words of even and odd counters, interleaved
  const __m256i joined = _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), joined);
}
