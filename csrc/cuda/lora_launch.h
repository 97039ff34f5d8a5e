// How adapted weights are dealt to blocks: on the host, before a launch.
#pragma once
#include "merge_lora.h"

namespace pk::cuda {

/// A launch as the kernels take it.
struct LoraDeal {
  std::vector<Layer> layers;
  std::vector<Group> groups;
  int slots;       // of shared memory
  int64_t blocks;  // of all layers
};

LoraDeal deal_layers(const LoraLaunch&, const LoraRoom&);
/// The table of a deal; `memory` takes what does not travel with the launch.
Layers table_of(const LoraDeal&, char* memory, cudaStream_t stream);
LoraRoom lora_room_of(int device);
/// Of shared memory, for every block.
int most_slots(const LoraRoom&);

inline void launch_lora(void (*kernel)(Layers), const LoraLaunch& l, int device, char* memory,
                        cudaStream_t stream) {
  const LoraRoom room = lora_room_of(device);
  const LoraDeal deal = deal_layers(l, room);
  const Layers table = table_of(deal, memory, stream);
  launch_clusters(kernel, dim3(unsigned(deal.blocks)), kLoraThreads, size_t(deal.slots) * kSlotBytes,
                  int64_t(most_slots(room)) * kSlotBytes, 1, stream, table);
}

}  // namespace pk::cuda
