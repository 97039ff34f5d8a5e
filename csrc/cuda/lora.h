// What the binding hands to the kernels of LoRA's linear layers, and how their work is dealt to blocks.
#pragma once
#include "device.h"
#include "jobs.h"
#include "kernels.h"

namespace pk::cuda {

constexpr int kMostRank = 512;
constexpr int kFewAdapters = 32;  // so many travel with a launch
constexpr int kByWarp = 32;       // rows whose adapters a warp finds out by itself

/// A matrix of any strides. Steps in elements; kVectors: its rows lie side by side, each at 16 bytes.
struct Matrix {
  const char* data;
  int64_t row, col;
  int dtype;
  int alignment;
};

/// Dropout of a matrix with `cols` columns: of x, where shrink reads it, or of what expand writes.
enum Side : int { kNowhere = 0, kRead = 1, kWritten = 2 };
struct Dropout {
  int side;
  uint32_t threshold, key0, key1;
  int64_t cols;
};

/// Which rows take which adapter. Without an index all take the first.
struct Places {
  const int64_t* index;
  int64_t step;
  const int64_t* table;  // of lora_deal; null: every warp looks at the index itself
  int adapters;
};

/// low = x down^T, out = scale low up^T.
struct Adapter {
  Matrix down, up;  // [rank, k] and [n, rank]
  int rank;
  float scale;
};

/// Everything one adapter or each row's own adds to a layer: out = bias + scale (x down^T) up^T.
struct LoraRows {
  void* out;   // [m, n], contiguous; null: only `low` is wanted
  float* low;  // [m, low_step]: x down^T
  const void* bias;
  Matrix x;
  int64_t low_step, m, k, n;
  int out_dtype, out_alignment;  // of bias too
  int rank;                      // the largest
  bool native;                   // all adapters have x's dtype
  Dropout drop;
  Places places;
  const Adapter* many;  // in the device's memory; null: `few`
  Adapter few[kFewAdapters];
};

/// out [rank, n] = scale * the sum over an adapter's rows of low[row]^T a[row].
struct Sink {
  void* out;  // null: not wanted
  int64_t row, col;
  int dtype;
  int rank;
  float scale;
};
struct LoraReduce {
  Matrix a;  // [m, n]
  const float* low;
  int64_t low_step, m, n;
  int rank;   // the largest
  int parts;  // of low that count
  Dropout drop;
  Places places;
  const Sink* many;
  Sink few[kFewAdapters];
};
static_assert(sizeof(LoraRows) < 3800 && sizeof(LoraReduce) < 3800, "kernel parameters end at 4 KiB");

PK_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows of a tile, which has one adapter: as many as have room in shared memory.
PK_HD int tile_rows_of(int64_t m, int rank) {
  return m < 1024 && rank <= 256 ? 32 : rank <= 128 ? 64 : rank <= 256 ? 32 : 16;
}
/// Rows of a chunk, whose sum is one number per element of a gradient.
PK_HD int64_t chunk_rows_of(int64_t m) { return (m ? divide_up(m, 32 * 64) : 1) * 64; }

/// Whether every warp finds a tile's rows by itself: an index of so few rows needs no table.
PK_HD bool by_warp(int64_t m, int rank) { return m <= kByWarp && m <= tile_rows_of(m, rank); }

/// Rows in the order of their adapters, and the lists of tiles and of chunks of rows that share one: int64
/// words. Buckets are the adapters, then -1, then values that mean nothing.
struct DealtRows {
  int64_t m, buckets, rows[2], most[2];
  PK_HD DealtRows(int64_t m_, int adapters, int rank) : m(m_), buckets(adapters + 2) {
    rows[0] = tile_rows_of(m, rank);
    rows[1] = chunk_rows_of(m);
    for (int s = 0; s < 2; s++) most[s] = m / rows[s] + buckets < m ? m / rows[s] + buckets : m;
  }
  PK_HD int64_t counts() const { return m; }  // [buckets][32 warps]
  PK_HD int64_t before(int s) const { return counts() + 32 * buckets + s * (buckets + 1); }
  PK_HD int64_t list(int s) const { return before(2) + (s ? 3 * most[0] : 0); }  // bucket, first, count
  PK_HD int64_t words() const { return list(1) + 3 * most[1]; }
};

/// Sorts rows by adapter, stably, into `table`.
void lora_deal(int64_t* table, const int64_t* index, int64_t step, int64_t m, int adapters, int rank,
               cudaStream_t);
/// Bytes of device memory that a call needs.
int64_t lora_scratch(const LoraRows&, int device);
int64_t lora_scratch(const LoraReduce&, int device);
void lora_rows(const LoraRows&, void* scratch, int device, cudaStream_t);
void lora_reduce(const LoraReduce&, void* scratch, int device, cudaStream_t);

/// Tests of the emulation make these small.
struct LoraRegimes {
  int64_t block = 512;   // columns of x, and of the result, up to which a block takes them alone
  int64_t blocks = 128;  // that a launch should have at least
};
#ifdef PK_EMULATED
inline LoraRegimes lora_regimes;
#else
constexpr LoraRegimes lora_regimes;
#endif

}  // namespace pk::cuda
