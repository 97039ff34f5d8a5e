#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <utility>

namespace pk {
namespace {

std::atomic<bool> forked{false};  // a child has the runtime's tables and none of its threads
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Function>
Function* found(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

/// What a compiled `#pragma omp parallel` calls, of whichever runtime the process has: linking one would
/// bring a second, with threads of its own.
struct OpenMp {
  void (*const parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*const inside)();
  int (*const most)();

  OpenMp()
      : parallel(found<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel")),
        inside(found<int()>("omp_in_parallel")),
        most(found<int()>("omp_get_max_threads")) {}
  /// Whether its team serves: all of it takes part, so it must not be much larger than the loop.
  bool has(int threads) const {
    if (!parallel || !inside || !most || forked || inside()) return false;
    const int size = most();
    return threads <= size && size <= 2 * threads;
  }
};

std::atomic<bool> taken{false};
thread_local bool own = false;

struct Job {
  void (*body)(void*, int);
  void* argument;
  int threads;
  std::atomic<int> started;
  std::atomic<bool> failed;
  std::exception_ptr error;  // the first that a body threw
};

void run(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const int slot = job.started.fetch_add(1);
  if (slot >= job.threads) return;
  try {
    const PlainFloats plain;
    job.body(job.argument, slot);
  } catch (...) {
    if (!job.failed.exchange(true)) job.error = std::current_exception();
  }
}

}  // namespace

void parallel(int threads, void (*body)(void*, int), void* argument) {
  static const OpenMp runtime;
  if (own || !runtime.has(threads) || taken.exchange(true)) return pool(threads, body, argument);
  Job job{body, argument, threads, {0}, {false}, nullptr};
  runtime.parallel(run, &job, 0, 0);  // 0 is torch's number: another would end threads and start new ones
  taken = false;
  if (job.error) std::rethrow_exception(job.error);
}

bool own_threads(bool from_now_on) { return std::exchange(own, from_now_on); }

void forget_team() { forked = true; }

}  // namespace pk
