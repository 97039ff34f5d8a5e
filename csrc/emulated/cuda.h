// The part of CUDA that csrc/cuda uses, on the host: every thread of a block is a fiber, blocks run one by
// one, barriers and warp exchanges wait for all who must take part. Slow, and faithful where kernels go
// wrong: indices, tails, barriers, reductions. Blocks and threads can run in reverse, so that a result that
// depends on their order shows; a barrier that not all reach is an error and no hang.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

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

/// Threads that wait for each other: a whole block, or a warp of it.
struct Barrier {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
  void release_if_full() {
    if (members > 0 && arrived == members) arrived = 0, generation++;
  }
};

struct Fiber {
  ucontext_t context;  // how it starts
  jmp_buf jump;        // where it goes on: unlike swapcontext, a jump makes no system call
  bool started = false;
  std::unique_ptr<char[]> stack;
  dim3 place;
  Barrier* waits = nullptr;
  uint64_t until = 0;  // the generation of `waits` that lets it go on
  unsigned exchanges = 0;
  bool done = false;
};

/// One block at a time.
class Block {
 public:
  void run(const std::function<void()>& body, int threads, bool reverse) {
    body_ = &body;
    prepare(threads);
    for (int left = threads; left > 0;) {
      int ran = 0;
      for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers_[size_t(reverse ? threads - 1 - i : i)];
        if (fiber.done || (fiber.waits && fiber.waits->generation < fiber.until)) continue;
        fiber.waits = nullptr;
        current_ = &fiber;
        threadIdx = fiber.place;
        resume(fiber);
        ran++;
        left -= fiber.done;
      }
      if (ran == 0) throw std::runtime_error("a barrier was not reached by all threads of its block or warp");
    }
  }
  void wait(Barrier& barrier) {
    Fiber& fiber = *current_;
    fiber.waits = &barrier;
    fiber.until = barrier.generation + 1;
    barrier.arrived++;
    barrier.release_if_full();
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler_, 1);
  }
  Barrier& everyone() { return everyone_; }
  /// Every lane of the warp gives a value; the values of all 32 come back.
  const uint64_t* exchange(uint64_t value) {
    const size_t warp = threadIdx.x / kWarp;
    // Two buffers in turn: a lane that is ahead by one exchange must not overwrite what others still read.
    uint64_t* slots = warps_[warp].slots[current_->exchanges++ % 2];
    slots[threadIdx.x % kWarp] = value;
    wait(warps_[warp].barrier);
    return slots;
  }
  std::vector<std::max_align_t> shared;

 private:
  struct Warp {
    Barrier barrier;
    uint64_t slots[2][kWarp];
  };

  void prepare(int threads) {
    if (threads % kWarp) throw std::runtime_error("blocks must be whole warps");
    fibers_.resize(size_t(threads));
    warps_.assign(size_t(threads / kWarp), Warp());
    for (Warp& warp : warps_) warp.barrier.members = kWarp;
    everyone_ = Barrier();
    everyone_.members = threads;
    for (int i = 0; i < threads; i++) {
      Fiber& fiber = fibers_[size_t(i)];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.place = dim3(unsigned(i), 0, 0);
      fiber.done = fiber.started = false;
      fiber.waits = nullptr;
      fiber.exchanges = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
  }
  static void enter();
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier everyone_;
  jmp_buf scheduler_;
  Fiber* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
};

inline Block block;
inline std::mutex one_launch;
inline bool reverse = false;

inline void Block::enter() {
  (*block.body_)();
  block.current_->done = true;
  block.everyone_.members--;  // as on the device: who has left is not waited for
  block.everyone_.release_if_full();
  _longjmp(block.scheduler_, 1);
}

inline void* dynamic_shared() { return block.shared.data(); }

}  // namespace pk::emulated

namespace pk::cuda {

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t,
            std::common_type_t<P>... arguments) {
  const std::lock_guard<std::mutex> lock(emulated::one_launch);
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulated::block.shared.resize(shared / sizeof(std::max_align_t) + 1);
  gridDim = grid;
  blockDim = dim3(unsigned(threads));
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t b = emulated::reverse ? blocks - 1 - i : i;
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    emulated::block.run(body, threads, emulated::reverse);
  }
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
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
