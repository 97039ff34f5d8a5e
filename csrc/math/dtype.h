// Element types: codes, sizes and exact scalar conversions. Host and device.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PK_HD __host__ __device__ inline
#else
#define PK_HD inline
#endif

namespace pk {

enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr uint32_t kAbs = 0x7FFFFFFFu;       // key of a float: its bits without the sign
constexpr uint32_t kInfinity = 0x7F800000u;  // keys above this are NaN
constexpr uint32_t kNaN = 0x7FC00000u;       // the canonical NaN

namespace {  // internal linkage: these are compiled once per instruction set, and none may be shared

PK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
PK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

PK_HD float to_float(float x) { return x; }
PK_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
PK_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return bits_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
  return bits_float(sign | float_bits(float(rest) * 0x1p-24f));  // zero and denormals: exact
}

/// Round to nearest even without hardware support; used by lanes that have none.
PK_HD void round_to(float x, f16* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, key = u & kAbs;
  uint32_t half;
  if (key > kInfinity) {
    out->bits = 0x7E00u;
    return;
  }
  if (key >= 0x477FF000u) {
    half = 0x7C00u;  // at or past the midpoint above the largest half
  } else if (key >= 0x38800000u) {
    half = (key - 0x38000000u + 0xFFFu + ((key >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 puts the last bit of a half denormal at the last bit of the float: hardware rounds once, to
    // even.
    half = float_bits(bits_float(key) + 0.5f) - 0x3F000000u;
  }
  out->bits = uint16_t(sign | half);
}

PK_HD void round_to(float x, bf16* out) {
  const uint32_t u = float_bits(x);
  out->bits =
      (u & kAbs) > kInfinity ? uint16_t(kNaN >> 16) : uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return kF32;
}
template <>
constexpr DType dtype_of<bf16>() {
  return kBF16;
}
template <>
constexpr DType dtype_of<f16>() {
  return kF16;
}

PK_HD constexpr int dtype_size(int code) { return code == kF32 ? 4 : 2; }

}  // namespace pk
