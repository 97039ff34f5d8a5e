// Weighted sums, with or without a base.
// Traffic: reads base (if any) and n tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass.
#include "merge_loop.h"

namespace pk::cpu::PK_ISA {

void linear_merge(const Merge& job, int64_t begin, int64_t end) { merge_any<KeepAll, Sum>(job, begin, end); }

}  // namespace pk::cpu::PK_ISA
