// DARE: drop at random, then add up or elect and average.
// Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass; a
// call of Philox serves eight elements of one model, all of its bits are used.
#include "kernels.h"
#include "merge_tile.h"

namespace pk::cuda {

void dare_merge(const Launch& l, int combine) {
  if (combine == kSum) return launch_merge<KeepRandom, Sum>(l.dtype, l.tiles, l.table, l.stream);
  if (combine == kWeighted) return launch_merge<KeepRandom, Weighted>(l.dtype, l.tiles, l.table, l.stream);
  launch_merge<KeepRandom, Plain>(l.dtype, l.tiles, l.table, l.stream);
}

}  // namespace pk::cuda
