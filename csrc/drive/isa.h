// The instruction sets that were compiled in, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "../cpu/jobs.h"

namespace pk {

/// Names that this machine can run, best first.
std::vector<std::string> isas();
/// The table in use: PYKERNELS_ISA where set, else the best.
const cpu::Kernels& kernels();
/// Uses another table; throws std::invalid_argument, naming what there is, for one that this machine lacks.
void use_isa(const std::string& name);

}  // namespace pk
