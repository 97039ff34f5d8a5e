// A few kilobytes to the device without a copy: they travel as arguments of launches.
// Traffic: writes what it is given, once.
#include <algorithm>
#include <cstring>

#include "device.h"
#include "kernels.h"

namespace pk::cuda {
namespace {

struct Bytes {
  uint32_t words[960];  // kernel parameters end at 4 KiB
};

__global__ void __launch_bounds__(kThreads)
    write(uint32_t* to, const __grid_constant__ Bytes bytes, int words) {
  for (int i = int(threadIdx.x); i < words; i += kThreads) to[i] = bytes.words[i];
}

}  // namespace

void upload(char* to, const char* from, int64_t bytes, cudaStream_t stream) {
  for (int64_t done = 0; done < bytes; done += int64_t(sizeof(Bytes))) {
    Bytes part;
    const int64_t size = std::min(bytes - done, int64_t(sizeof(Bytes)));
    memcpy(&part, from + done, size_t(size));
    launch(write, dim3(1), kThreads, 0, stream, reinterpret_cast<uint32_t*>(to + done), part, int(size / 4));
  }
}

}  // namespace pk::cuda
