// What dropout keeps, as bits in shared memory: every call of Philox serves the eight elements it draws for.
#pragma once
#include "lanes.h"
#include "lora.h"

namespace pk::cuda {

constexpr int kDrawn = 128;  // elements that 16 calls draw for

/// Bytes of a row's bits for `length` columns, a multiple of kDrawn: two bits to a byte, and room for a start
/// anywhere.
PK_HD constexpr int drawn_bytes(int length) { return length / 2 + kDrawn / 2; }

/// Draws for `length` columns from `col` on, multiples of kDrawn, of rows[0 .. count); thread `thread` of
/// `threads` who must meet before anyone reads. Rows below 0 are nobody's.
__device__ inline void draw(uint8_t* kept, const int64_t* rows, int count, int64_t col, int length,
                            const Dropout& drop, int thread, int threads) {
  const int lanes = (length / kDrawn + (drop.cols % kDrawn != 0)) * 16;
  for (int i = thread; i < count * lanes; i += threads) {
    const int row = i / lanes, lane = i % lanes;
    if (rows[row] < 0) continue;
    const uint64_t counter = uint64_t(rows[row] * drop.cols + col) / kDrawn * 16 + uint64_t(lane);
    Word c0{uint32_t(counter)}, c1{counter >> 32}, c2{0}, c3{0};
    philox10(c0, c1, c2, c3, drop.key0, drop.key1);
    uint8_t* to = kept + row * drawn_bytes(length) + lane / 16 * (kDrawn / 2) + lane % 16;
    const Word words[4] = {c0, c1, c2, c3};
#pragma unroll
    for (int j = 0; j < 4; j++)
      to[16 * j] = uint8_t(((words[j].v & 0xFFFFu) < drop.threshold) |
                           ((uint32_t(words[j].v) >> 16) < drop.threshold) << 1);
  }
}

/// Bit i: whether column col + at + i of a row is kept, of the eight that begin there; `kept` is the row's.
__device__ inline unsigned eight_kept(const uint8_t* kept, int64_t row, int64_t col, int at,
                                      const Dropout& drop) {
  const int first = int((row * drop.cols + col) % kDrawn) + at;
  const uint8_t* from = kept + first / 2;
  const unsigned eight = from[0] | from[1] << 2 | from[2] << 4 | from[3] << 6;
  return first % 2 ? (eight >> 1 | unsigned(from[4]) << 7) & 0xFFu : eight;
}

}  // namespace pk::cuda
