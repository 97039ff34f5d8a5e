// Weighted sums, with or without a base.
// Traffic: reads base (if any) and n tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass.
#include "kernels.h"
#include "merge_tile.h"

namespace pk::cuda {

void linear_merge(const Launch& l) { launch_merge<KeepAll, Sum>(l.dtype, l.tiles, l.table, l.stream); }

}  // namespace pk::cuda
