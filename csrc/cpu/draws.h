// The 16-bit draws of one tile of 128 elements: 16 Philox calls, two draws to a word.
#pragma once
#include "lanes.h"

namespace pk::cpu::PK_ISA {
namespace {

/// Word i is for elements 2i (low half) and 2i + 1 of the tile that starts at element 8 * `counter`.
PK_IN void draw_tile(uint64_t counter, uint32_t index, uint32_t key0, uint32_t key1, uint32_t* words) {
  for (int q = 0; q < 8 / kWide; q++) {
    const uint32_t first = uint32_t(counter) + uint32_t(2 * kWide * q);
    W e0 = count_by_two(first), e1 = broadcast_wide(uint32_t(counter >> 32));
    W e2 = broadcast_wide(index), e3 = broadcast_wide(0);
    W o0 = count_by_two(first + 1), o1 = e1, o2 = e2, o3 = e3;
    philox10(e0, e1, e2, e3, key0, key1);
    philox10(o0, o1, o2, o3, key0, key1);
    uint32_t* to = words + 2 * kWide * q;
    store_joined(to, e0, o0);
    store_joined(to + 16, e1, o1);
    store_joined(to + 32, e2, o2);
    store_joined(to + 48, e3, o3);
  }
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
