#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pk {
namespace cpu {
#ifdef PK_X86_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef PK_X86
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_baseline;
}  // namespace cpu

namespace {

std::vector<const cpu::Kernels*> available() {
  std::vector<const cpu::Kernels*> found;
#ifdef PK_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
#ifdef PK_X86_AVX512
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&cpu::kernels_avx512);
#endif
  if (avx2) found.push_back(&cpu::kernels_avx2);
#endif
  found.push_back(&cpu::kernels_baseline);
  return found;
}

const cpu::Kernels* find(const std::string& name) {
  std::string known;
  for (const cpu::Kernels* k : available()) {
    if (name == k->name) return k;
    known += known.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::invalid_argument("instruction set (PYKERNELS_ISA or use_isa): this machine has " + known +
                              ", got '" + name + "'");
}

std::atomic<const cpu::Kernels*>& current() {
  static std::atomic<const cpu::Kernels*> table{[] {
    const char* forced = std::getenv("PYKERNELS_ISA");
    return forced && *forced ? find(forced) : available().front();
  }()};
  return table;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : available()) names.emplace_back(k->name);
  return names;
}
const cpu::Kernels& kernels() { return *current().load(std::memory_order_relaxed); }
void use_isa(const std::string& name) { current().store(find(name)); }

}  // namespace pk
