// What only a device can do: copies to shared memory that run on their own (sm_80), clusters of blocks that
// read each other's shared memory (sm_90), asking for memory ahead, and its exponential; and what stands for
// them in the emulation.
#pragma once
#include "device.h"

namespace pk::cuda {

#ifndef PK_EMULATED

/// 16 bytes, both ends aligned. What a thread copied, it may read after `wait_copies`; others after a
/// barrier.
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
/// The same of four bytes.
__device__ __forceinline__ void copy_4(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}
/// Ends a group of copies; it may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until all but the last `groups` groups of this thread have arrived.
template <int groups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/// Has the 32 bytes around an address brought to the second-level cache.
__device__ __forceinline__ void ask_for(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

/// threadIdx.x, asked anew: what is computed from it holds no register from one use to the next.
__device__ __forceinline__ int thread_asked() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// 2^x within 2^-22, relatively; 0 below 2^-126.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// What was written to shared memory before, all blocks of the cluster see after `cluster_wait`.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
/// Arrives without a word on memory, as one who has used all that he read of others and hands nothing over:
/// after `cluster_wait` all blocks may leave. A release would wait for everything that was written so far.
__device__ __forceinline__ void cluster_leave() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
/// The same variable in the shared memory of another block of the cluster, by its rank: with clusters along
/// x, blockIdx.x modulo their size.
template <class P>
__device__ __forceinline__ const P* of_block(const P* mine, int rank) {
  const P* theirs;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return theirs;
}
#else  // never reached: nothing is launched in clusters there
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_leave() {}
template <class P>
__device__ __forceinline__ const P* of_block(const P* mine, int) {
  return mine;
}
#endif

#else

inline void copy_16(void* shared, const void* global) { emulated::block.copies().add(shared, global, 16); }
inline void copy_4(void* shared, const void* global) { emulated::block.copies().add(shared, global, 4); }
inline void commit_copies() { emulated::block.copies().commit(); }
template <int groups>
void wait_copies() {
  emulated::block.copies().wait(groups);
}
inline void ask_for(const void* address) { (void)*static_cast<const volatile char*>(address); }
inline int thread_asked() { return int(threadIdx.x); }
inline float power_of_2(float x) { return std::exp2(x); }
inline void cluster_arrive() { emulated::block.cluster_arrive(); }
inline void cluster_wait() { emulated::block.cluster_wait(); }
inline void cluster_leave() { emulated::block.cluster_arrive(); }
template <class P>
const P* of_block(const P* mine, int rank) {
  const char* own = emulated::block.shared(emulated::block.rank());
  const auto offset = reinterpret_cast<const char*>(mine) - own;
  return reinterpret_cast<const P*>(emulated::block.shared(size_t(rank)) + offset);
}

#endif

}  // namespace pk::cuda
