// TIES with known cuts: trim by magnitude, elect, average.
// Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass.
#include "kernels.h"
#include "merge_tile.h"

namespace pk::cuda {

void ties_merge(const Launch& l, int combine) {
  if (combine == kSum) return launch_merge<KeepLarge, Sum>(l.dtype, l.tiles, l.table, l.stream);
  if (combine == kWeighted) return launch_merge<KeepLarge, Weighted>(l.dtype, l.tiles, l.table, l.stream);
  launch_merge<KeepLarge, Plain>(l.dtype, l.tiles, l.table, l.stream);
}

}  // namespace pk::cuda
