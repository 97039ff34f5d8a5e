// Scratch memory for the threads of one call.
#pragma once
#include <algorithm>

#include "process.h"

namespace pk {

/// Floats for every thread, on pages of their own.
class Rooms {
 public:
  Rooms(int64_t threads, int64_t floats)
      : each_((floats + kPage - 1) / kPage * kPage),
        memory_(size_t(std::max<int64_t>(threads, 1) * each_) * sizeof(float)) {}
  float* of(int slot) const { return reinterpret_cast<float*>(memory_.data()) + slot * each_; }

 private:
  static constexpr int64_t kPage = 4096 / sizeof(float);
  int64_t each_;
  Scratch memory_;
};

}  // namespace pk
