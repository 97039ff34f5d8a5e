#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "lora_launch.h"

namespace pk::cuda {
namespace {

constexpr int64_t kReserved = 8 << 10;  // shared memory that kernels declare themselves
constexpr int kBlocksTogether = 2;      // on a multiprocessor, if their shared memory allows it

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// A factor 16 ranks at a time.
void append_groups(const Factor& f, std::vector<Group>& groups) {
  const bool halves = f.left_dtype == kF16 && f.right_dtype == kF16;
  for (int rank = 0; rank < f.rank; rank += kStep) {
    Group g{};
    g.left = static_cast<const char*>(f.left) + rank * f.left_rank * dtype_size(f.left_dtype);
    g.right = static_cast<const char*>(f.right) + rank * f.right_rank * dtype_size(f.right_dtype);
    g.scale_at = f.scale_at;
    g.scale = f.scale;
    g.left_step = f.left_step, g.left_rank = f.left_rank;
    g.right_step = f.right_step, g.right_rank = f.right_rank;
    g.ranks = uint8_t(std::min(f.rank - rank, kStep));
    g.left_dtype = uint8_t(f.left_dtype), g.right_dtype = uint8_t(f.right_dtype);
    g.left_parts = uint8_t(halves ? 1 : parts_of(f.left_dtype));
    g.right_parts = uint8_t(halves ? 1 : parts_of(f.right_dtype));
    g.halves = halves;
    groups.push_back(g);
  }
}

int parts_of_group(const Group& g) { return std::max(g.left_parts, g.right_parts); }

int64_t slots_of(const std::vector<Group>& groups) {
  int64_t slots = 0;
  for (const Group& g : groups) slots += parts_of_group(g);
  return slots;
}

/// Gives every group its slots, a new chunk where none are left. Returns whether there is more than one.
bool place_groups(std::vector<Group>& groups, int slots) {
  size_t first = 0;
  int used = 0;
  for (size_t i = 0; i < groups.size(); i++) {
    if (used + parts_of_group(groups[i]) > slots) first = i, used = 0;
    groups[i].slot = uint8_t(used);
    groups[first].chunk = uint8_t(i + 1 - first);
    used += parts_of_group(groups[i]);
  }
  return first > 0;
}

int64_t tiles_deep(const Layer& layer) { return over(layer.rows, kLoraRows); }

/// Tiles of a block: few rounds of blocks of one size, the last of them full.
int deep_of(int64_t tiles, int64_t places) {
  const int64_t rounds = over(tiles, places * kMostTilesDeep);
  return int(std::clamp<int64_t>(over(tiles, places * rounds), 1, kMostTilesDeep));
}

}  // namespace

int most_slots(const LoraRoom& room) {
  return int(std::min<int64_t>(kMostSlots, (room.shared - kReserved) / kSlotBytes));
}

LoraDeal deal_layers(const LoraLaunch& l, const LoraRoom& room) {
  LoraDeal deal{l.layers, {}, 0, 0};
  const int most = most_slots(room);
  std::vector<std::vector<Group>> groups(l.layers.size());
  int64_t widest = kMostParts, tiles = 0;
  for (size_t i = 0; i < groups.size(); i++) {
    for (const Factor& f : l.factors[i]) append_groups(f, groups[i]);
    widest = std::max(widest, slots_of(groups[i]));
    deal.layers[i].strips = over(l.layers[i].cols, kLoraColumns);
    tiles += deal.layers[i].strips * tiles_deep(l.layers[i]);
  }
  deal.slots = widest <= most ? int(widest) : std::min(most, kPairSlots);
  const int deep =
      deep_of(tiles, int64_t(room.processors) * (deal.slots <= kPairSlots ? kBlocksTogether : 1));
  for (size_t i = 0; i < groups.size(); i++) {
    Layer& layer = deal.layers[i];
    layer.deep = deep;
    layer.first_block = deal.blocks;
    layer.first_group = int(deal.groups.size());
    layer.groups = int(groups[i].size());
    layer.in_chunks = place_groups(groups[i], deal.slots);
    deal.groups.insert(deal.groups.end(), groups[i].begin(), groups[i].end());
    deal.blocks += layer.strips * over(tiles_deep(layer), deep);
  }
  return deal;
}

int64_t lora_table_bytes(const LoraLaunch& l) {
  int64_t groups = 0;
  for (const auto& factors : l.factors)
    for (const Factor& f : factors) groups += over(f.rank, kStep);
  if (l.layers.size() == 1 && groups <= kFewGroups) return 0;
  return int64_t(l.layers.size() * sizeof(Layer)) + groups * int64_t(sizeof(Group));
}

Layers table_of(const LoraDeal& deal, char* memory, cudaStream_t stream) {
  Layers table{};
  table.count = int(deal.layers.size());
  table.slots = deal.slots;
  const size_t layers = deal.layers.size() * sizeof(Layer), groups = deal.groups.size() * sizeof(Group);
  if (table.count == 1 && deal.groups.size() <= kFewGroups) {
    table.one = deal.layers[0];
    std::copy(deal.groups.begin(), deal.groups.end(), table.few);
    return table;
  }
  std::vector<char> bytes(layers + groups);
  memcpy(bytes.data(), deal.layers.data(), layers);
  if (groups) memcpy(bytes.data() + layers, deal.groups.data(), groups);
  upload(memory, bytes.data(), int64_t(bytes.size()), stream);
  table.layers = reinterpret_cast<const Layer*>(memory);
  table.groups = reinterpret_cast<const Group*>(memory + layers);
  return table;
}

#ifdef PK_EMULATED
LoraRoom lora_room_of(int) { return lora_room; }
#else
LoraRoom lora_room_of(int device) {
  int shared = 0, processors = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return {shared, processors};
}
#endif

}  // namespace pk::cuda
