// The part of CUDA that csrc/cuda uses, on the host: every thread of a block is a fiber, blocks run one by
// one (those of a cluster side by side), barriers and warp exchanges wait for all who must take part. Slow,
// and faithful where kernels go wrong: indices, tails, barriers, reductions. Blocks and threads can run in
// reverse, and warps ahead of each other, so that a result that depends on their order shows; a barrier that
// not all reach is an error and no hang.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define PK_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(pk::emulated::dynamic_shared())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pk::emulated {

constexpr size_t kStack = 128 * 1024;
constexpr int kWarp = 32;

/// Threads that wait for each other: a whole block, a warp of it, or the blocks of a cluster.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
  void release_if_full() {
    if (members > 0 && arrived == members) arrived = 0, generation++;
  }
};

/// What the threads of one block share. `__shared__` variables are one for all blocks: kernels that run in
/// clusters must keep to dynamic shared memory, which begins as NaN of every dtype and ends with a wall.
struct Room {
  static constexpr size_t kWall = 4096;
  static constexpr char kUnwritten = char(0xFF), kBrick = char(0xA5);
  Barrier everyone;
  dim3 place;
  size_t bytes = 0;
  std::vector<std::max_align_t> shared;

  void prepare(dim3 place_, int threads, size_t bytes_) {
    everyone = Barrier();
    everyone.members = threads;
    place = place_;
    bytes = bytes_;
    shared.resize((bytes + kWall) / sizeof(std::max_align_t) + 1);
    memset(memory(), kUnwritten, bytes);
    memset(memory() + bytes, kBrick, kWall);
  }
  char* memory() { return reinterpret_cast<char*>(shared.data()); }
  bool wall_stands() {
    const char* wall = memory() + bytes;
    return std::all_of(wall, wall + kWall, [](char brick) { return brick == kBrick; });
  }
};

/// Copies that a thread has begun; they happen as late as they may, when it waits for them.
class Copies {
 public:
  void clear() { groups_.assign(1, {}); }
  void add(void* to, const void* from, size_t bytes) { groups_.back().push_back({to, from, bytes}); }
  void commit() { groups_.emplace_back(); }
  void wait(size_t pending) {  // the last group is open
    while (groups_.size() > pending + 1) {
      for (const Copy& c : groups_.front()) memcpy(c.to, c.from, c.bytes);
      groups_.erase(groups_.begin());
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> groups_;
};

struct Fiber {
  ucontext_t context;  // how it starts
  jmp_buf jump;        // where it goes on: unlike swapcontext, a jump makes no system call
  bool started = false;
  std::unique_ptr<char[]> stack;
  dim3 place;
  size_t room = 0, warp = 0;
  Barrier* waits = nullptr;
  uint64_t until = 0;  // the generation of `waits` that lets it go on
  uint64_t cluster_until = 0;
  Copies copies;
  unsigned exchanges = 0;
  bool done = false;
};

/// One block at a time, or the blocks of one cluster.
class Block {
 public:
  void run(const std::function<void()>& body, const std::vector<dim3>& places, int threads, size_t shared,
           bool reverse, bool warps) {
    body_ = &body;
    const int all = threads * int(places.size()), together = warps ? kWarp : threads;
    prepare(places, threads, shared);
    for (int left = all; left > 0;) {
      int ran = 0;
      for (int first = 0; first < all; first += together)  // these run as far as they can before the next do
        for (int before = -1; before != ran;) {
          before = ran;
          for (int i = first; i < first + together; i++) {
            Fiber& fiber = fibers_[size_t(reverse ? all - 1 - i : i)];
            if (fiber.done || (fiber.waits && fiber.waits->generation < fiber.until)) continue;
            fiber.waits = nullptr;
            current_ = &fiber;
            threadIdx = fiber.place;
            blockIdx = rooms_[fiber.room].place;
            resume(fiber);
            ran++;
            left -= fiber.done;
          }
        }
      if (ran == 0) throw std::runtime_error("a barrier was not reached by all threads of its block or warp");
    }
    for (Room& room : rooms_)
      if (!room.wall_stands()) throw std::runtime_error("a block wrote behind its shared memory");
  }
  void wait(Barrier& barrier) { pause(barrier, arrive(barrier)); }
  Barrier& everyone() { return rooms_[current_->room].everyone; }
  void cluster_arrive() { current_->cluster_until = arrive(cluster_); }
  void cluster_wait() { pause(cluster_, current_->cluster_until); }
  Copies& copies() { return current_->copies; }
  size_t rank() const { return current_->room; }
  char* shared(size_t rank) { return rooms_[rank].memory(); }
  /// Every lane of the warp gives a value; the values of all 32 come back.
  const uint64_t* exchange(uint64_t value) {
    Warp& warp = warps_[current_->warp];
    // Two buffers in turn: a lane that is ahead by one exchange must not overwrite what others still read.
    uint64_t* slots = warp.slots[current_->exchanges++ % 2];
    slots[threadIdx.x % kWarp] = value;
    wait(warp.barrier);
    return slots;
  }

 private:
  struct Warp {
    Barrier barrier;
    uint64_t slots[2][kWarp];
  };

  uint64_t arrive(Barrier& barrier) {
    const uint64_t until = barrier.generation + 1;
    barrier.arrived++;
    barrier.release_if_full();
    return until;
  }
  void pause(Barrier& barrier, uint64_t until) {
    Fiber& fiber = *current_;
    fiber.waits = &barrier;
    fiber.until = until;
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler_, 1);
  }
  void prepare(const std::vector<dim3>& places, int threads, size_t shared) {
    if (threads % kWarp) throw std::runtime_error("blocks must be whole warps");
    const size_t all = size_t(threads) * places.size();
    if (fibers_.size() < all) fibers_.resize(all);
    rooms_.resize(places.size());
    for (size_t r = 0; r < places.size(); r++) rooms_[r].prepare(places[r], threads, shared);
    cluster_ = Barrier();
    cluster_.members = int(all);
    warps_.assign(all / kWarp, Warp());
    for (Warp& warp : warps_) warp.barrier.members = kWarp;
    for (size_t i = 0; i < all; i++) {
      Fiber& fiber = fibers_[i];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.place = dim3(unsigned(i) % unsigned(threads), 0, 0);
      fiber.room = i / size_t(threads);
      fiber.warp = i / kWarp;
      fiber.done = fiber.started = false;
      fiber.waits = nullptr;
      fiber.exchanges = 0;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
  }
  static void enter();
  /// As on the device: who has left is not waited for, and the memory of a block that has left is gone.
  void leave() {
    current_->done = true;
    Room& room = rooms_[current_->room];
    room.everyone.members--;
    room.everyone.release_if_full();
    cluster_.members--;
    cluster_.release_if_full();
    if (room.everyone.members == 0) memset(room.memory(), Room::kUnwritten, room.bytes);
  }
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  std::vector<Fiber> fibers_;
  std::vector<Room> rooms_;
  std::vector<Warp> warps_;
  Barrier cluster_;
  jmp_buf scheduler_;
  Fiber* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
};

inline Block block;
inline std::mutex one_launch;
inline bool reverse = false;
inline bool warps = false;  // a warp goes ahead of the others, not all threads of a block together

inline void Block::enter() {
  (*block.body_)();
  block.leave();
  _longjmp(block.scheduler_, 1);
}

inline void* dynamic_shared() { return block.shared(block.rank()); }

}  // namespace pk::emulated

namespace pk::cuda {

/// Blocks go to clusters of `cluster` neighbours, which run side by side.
template <class... P>
void launch_clusters(void (*kernel)(P...), dim3 grid, int threads, size_t shared, int64_t most, int cluster,
                     cudaStream_t, std::common_type_t<P>... arguments) {
  if (int64_t(shared) > most) throw std::runtime_error("more shared memory than a block may have");
  const std::lock_guard<std::mutex> lock(emulated::one_launch);
  const std::function<void()> body = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = dim3(unsigned(threads));
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / unsigned(cluster);
  std::vector<dim3> places;
  places.resize(size_t(cluster));
  for (uint64_t i = 0; i < clusters; i++) {
    const uint64_t first = (emulated::reverse ? clusters - 1 - i : i) * unsigned(cluster);
    for (size_t r = 0; r < places.size(); r++) {
      const uint64_t b = first + r;
      places[r] = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    }
    emulated::block.run(body, places, threads, shared, emulated::reverse, emulated::warps);
  }
}
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            std::common_type_t<P>... arguments) {
  launch_clusters(kernel, grid, threads, shared, int64_t(shared), 1, stream, arguments...);
}

/// There is one device.
struct OnDevice {
  explicit OnDevice(int) {}
};
inline cudaStream_t at_stream(uintptr_t) { return nullptr; }
inline const char* memory() { return "cpu"; }
inline std::optional<std::string> unavailable() { return std::nullopt; }

}  // namespace pk::cuda

inline void __syncthreads() { pk::emulated::block.wait(pk::emulated::block.everyone()); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* all = pk::emulated::block.exchange(predicate);
  unsigned bits = 0;
  for (int lane = 0; lane < pk::emulated::kWarp; lane++) bits |= unsigned(all[lane]) << lane;
  return bits;
}
template <class V>
V __shfl_sync(unsigned, V value, int lane) {
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(V));
  word = pk::emulated::block.exchange(word)[lane];
  memcpy(&value, &word, sizeof(V));
  return value;
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int distance) {
  return __shfl_sync(mask, value, int(threadIdx.x % 32) ^ distance);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, int distance) {
  const int lane = int(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}
template <class V>
V atomicAdd(V* place, V value) {
  const V before = *place;
  *place = V(before + value);
  return before;
}
template <class V>
V atomicExch(V* place, V value) {
  return std::exchange(*place, value);
}
template <class V>
V __ldcs(const V* place) {
  return *place;
}
template <class V>
void __stcs(V* place, V value) {
  *place = value;
}
inline void __syncwarp() { pk::emulated::block.exchange(0); }
inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t* all = pk::emulated::block.exchange(uint64_t(value));
  unsigned bits = 0;
  for (int lane = 0; lane < pk::emulated::kWarp; lane++)
    bits |= unsigned(all[lane] == uint64_t(value)) << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
