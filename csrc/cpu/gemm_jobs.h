// What the driver of matrix products hands to its kernels: plain data, no ownership.
#pragma once
#include <cstdint>

#include "../math/dtype.h"

namespace pk::cpu {

// Part of what a result is: a sum over k is one chain of fused multiply-adds per kGemmDepth terms, and the
// chains' results are added up in order. Neither lanes nor tiles nor threads change a bit.
constexpr int64_t kGemmDepth = 256;
constexpr int64_t kGemmWidth = 128;   // columns of a tile of sums; a tile of draws too, where columns are
constexpr int64_t kGemmRows = 512;    // rows of a tile of sums at most: its 256 KiB stay in the second cache
constexpr int64_t kGemmDots = 3;      // up to so many rows a product is a dot product per element
constexpr int64_t kGemmStripe = 32;   // of so many interleaved partial sums
constexpr int64_t kGemmStretch = 64;  // elements of a column that it takes before it turns to the next

/// Element (i, j) stands at i * row + j * col.
struct Matrix {
  const void* data;
  int dtype;
  int64_t row, col;
};

/// Which elements of a matrix of `width` columns stay: those whose 16-bit draw is below the threshold.
struct Dropout {
  uint32_t threshold, key0, key1;
  int64_t width;

  bool drops() const { return threshold < 65536; }
};

/// Memory that the next step of a product will read: `rows` stretches of `lines` cache lines, `step` bytes
/// apart, neither 0. It is asked for bit by bit while this step computes.
struct Ahead {
  const char* data;
  int64_t step, rows, lines;
};

/// Where sums go, rounded once: element (i, j) times scale[j] plus bias[j], to i * row + j * col.
struct GemmOut {
  void* data;
  int dtype;
  int64_t row, col;
  const void* bias;   // of `dtype`, or null
  const void* scale;  // float32 of any alignment, or null
};

}  // namespace pk::cpu
