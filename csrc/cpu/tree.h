// The fixed tree of a block's sums: sixteen interleaved lanes, then neighbours.
#pragma once

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kTree = 16;

/// Adds neighbouring lanes until one is left.
double tree(double* lane) {
  for (int width = kTree / 2; width > 0; width /= 2)
    for (int l = 0; l < width; l++) lane[l] = lane[2 * l] + lane[2 * l + 1];
  return lane[0];
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
