// What bindings hand to the kernels on adapted weights: layers and their adapters as plain data.
#pragma once
#include <vector>

#include "device.h"
#include "jobs.h"
#include "parts.h"

namespace pk::cuda {

constexpr int kLoraThreads = 256;
constexpr int kLoraRows = 64, kLoraColumns = 128;  // of a weight, that a block takes at a time
constexpr int kOctet = 8;                          // ranks that lie side by side in shared memory
constexpr int kLeftSlot = kLoraRows * kStep * 2, kRightSlot = kLoraColumns * kStep * 2;
constexpr int kSlotBytes = kLeftSlot + kRightSlot;
constexpr int kMostSlots = 36;  // what 227 KiB hold
constexpr int kPairSlots = 16;  // what two blocks of a multiprocessor hold, each
constexpr int kFewGroups = 48;  // that travel with the launch
constexpr int kMostTilesDeep = 16;

/// An adapter's part in a layer: weight [rows, cols] += scale * left [rows, rank] @ right [rank, cols].
struct Factor {
  const void *left, *right;
  const float* scale_at;                                 // per row or column (Layer.by_column); null: `scale`
  int64_t left_step, left_rank, right_step, right_rank;  // elements to the next row or column, and rank
  int rank, left_dtype, right_dtype;
  float scale;
};

/// Up to 16 ranks of a factor, and where in shared memory the parts of their numbers go.
struct Group {
  const void *left, *right;  // of the first rank
  const float* scale_at;
  int64_t left_step, left_rank, right_step, right_rank;
  float scale;
  uint8_t ranks, left_dtype, right_dtype, left_parts, right_parts;
  uint8_t slot;
  uint8_t chunk;   // groups that lie in shared memory together, from this one on; its slot is 0
  uint8_t halves;  // both factors are float16, and multiplied as such
};

/// A weight: out = scale * weight + all factors.
struct Layer {
  void* out;  // or float64 sums of squares, see lora_squares
  const void* weight;
  const float* scale;  // per row, or column; null: 1
  int64_t rows, cols;
  int64_t first_block;  // of the launch's blocks, the first of this layer
  int64_t strips;       // blocks side by side
  int deep;             // tiles that a block takes, one below the other
  int groups, first_group;
  int in_chunks;  // not all groups lie in shared memory together
  int by_column;
  int out_dtype;
  int in_alignment, out_alignment;
};

/// The layers of a launch. One with few groups travels with the launch; else all lie in device memory.
struct Layers {
  const Layer* layers;  // null: `one`
  const Group* groups;
  int count, slots;
  Layer one;
  Group few[kFewGroups];
};
static_assert(sizeof(Layers) <= 4000, "kernel parameters end at 4 KiB");
static_assert(sizeof(Group) % 8 == 0 && sizeof(Layer) % 8 == 0, "copied by words");

/// Layers of one dtype and the factors of each, on the host.
struct LoraLaunch {
  int dtype;
  std::vector<Layer> layers;
  std::vector<std::vector<Factor>> factors;
};

/// Bytes of device memory that a launch wants for its table; 0 where it travels with the launch.
int64_t lora_table_bytes(const LoraLaunch&);
/// Fills layer.out of every layer.
void merge_lora(const LoraLaunch&, int device, char* table, cudaStream_t stream);
/// layer.out: float64 [strips of 128 columns][rows]; with by_column [tiles of 64 rows][cols].
void lora_squares(const LoraLaunch&, int device, char* table, cudaStream_t stream);

/// What a device has: bytes of shared memory for a block, and multiprocessors. The tests of the emulation
/// set it.
struct LoraRoom {
  int64_t shared;
  int processors;
};
#ifdef PK_EMULATED
inline LoraRoom lora_room{227 << 10, 1};
#endif

}  // namespace pk::cuda
