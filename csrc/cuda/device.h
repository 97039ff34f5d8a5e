// CUDA's own words, or their meaning on the host (csrc/emulated) where no nvcc compiles this.
#pragma once
#ifndef PK_EMULATED
#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define PK_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

namespace pk::cuda {

/// Throws what went wrong in the last call, in the driver's words.
inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // what was reported must not be reported again
  throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
}

/// Starts a kernel on the caller's stream. `shared`: bytes of dynamic shared memory, of which one kernel has
/// to ask for the same at every call where it is more than 32 KiB (see launch_clusters).
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            std::common_type_t<P>... arguments) {
  void* pointers[] = {static_cast<void*>(&arguments)...};
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared > 32 * 1024)  // with what a kernel declares itself, past the 48 KiB that need no asking
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  check(cudaLaunchKernel(address, grid, dim3(unsigned(threads)), pointers, shared, stream));
}

/// The same for clusters of `cluster` neighbouring blocks, which need sm_90, and for kernels that share as
/// much memory as a block may have, `most`: asked for is always that, so that what is launched by another
/// thread or replayed from a graph with more than this call needs stays allowed. Both can be captured in a
/// graph.
template <class... P>
void launch_clusters(void (*kernel)(P...), dim3 grid, int threads, size_t shared, int64_t most, int cluster,
                     cudaStream_t stream, std::common_type_t<P>... arguments) {
  void* pointers[] = {static_cast<void*>(&arguments)...};
  const void* address = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)));
  check(cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelExC(&config, address, pointers));
}

/// Makes a device the current one, and puts the caller's back.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    moved_ = device != before_;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

inline cudaStream_t at_stream(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

/// The type of device whose memory kernels address.
inline const char* memory() { return "cuda"; }

/// Why nothing can run here.
inline std::optional<std::string> unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(error);
  if (count == 0) return "no CUDA device";
  for (int device = 0, major = 0; device < count; device++) {
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 8)
      return "device " + std::to_string(device) + " is older than sm_80, for which kernels are compiled";
  }
  return std::nullopt;
}

}  // namespace pk::cuda
#else
#include "../emulated/cuda.h"
#endif
