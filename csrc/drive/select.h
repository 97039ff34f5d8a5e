// Exact k-th magnitudes: sample, bracket, count and compact, select, check; radix where the check fails.
#pragma once
#include <cstdint>
#include <vector>

#include "../cpu/jobs.h"

namespace pk {

/// base (may be null) and n tensors of one dtype.
struct Inputs {
  int dtype;
  const void* base;
  const void* const* data;
  int n;
  int64_t numel;
};

/// Kept iff key > this key, or key == this key and flat index <= last.
struct Cut {
  uint32_t key;
  int64_t last;
};

constexpr uint32_t kNoneKept = 0xFFFFFFFFu;

/// [low, high]: almost surely holds the k-th largest key.
struct Bracket {
  uint32_t low, high;
  double share;  // of the sample in [low, high]
  double sigma;  // how far a share of the sample may be off
  double above;  // of the sample above high

  bool single() const { return low == high; }
};

/// A safe bracket, and a bold one: where heavy ties put few values into the safe one, the value that is
/// nearly surely the k-th. Counting shows whether it was.
struct Brackets {
  Bracket safe, bold;
};

/// The key of the given rank, 0 for the largest. Reorders nothing; `spare` holds count words.
uint32_t nth_largest(const uint32_t* keys, int64_t count, int64_t rank, uint32_t* spare);

/// One bracket per model with 0 < k < numel, from a sample whose places depend on numel alone.
std::vector<Brackets> brackets(const Inputs& in, const int64_t* k, int threads);

/// The exact cut of every model.
std::vector<Cut> kth_magnitude(const Inputs& in, const int64_t* k, int threads);

/// Bins [n][65536] of (key >> shift) & 0xFFFF over the keys whose higher bits equal the model's prefix.
void histogram(const Inputs& in, int shift, const uint32_t* prefix, int64_t* bins, int threads);

}  // namespace pk
