#include "process.h"

#include <pthread.h>
#include <sys/mman.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace pk {
namespace {

constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kRetained = size_t(64) << 20;

struct Job {
  void (*body)(void*, int);
  void* argument;
  int slots;                 // how many may run
  int taken;                 // how many have started
  int running;               // how many of those, other than the caller, have not ended
  std::exception_ptr error;  // the first that a body threw
};

struct Block {
  void* data;
  size_t bytes;
};

struct Process {
  std::mutex mutex;
  std::condition_variable wake, ended;
  std::vector<Job*> jobs;
  int workers = 0;
  std::vector<Block> blocks;
  size_t retained = 0;
};

Process* process = nullptr;  // replaced, never destroyed: pool threads may outlive static destructors

// A forked child has one thread: the parent's pool and locks mean nothing there.
void renew() { process = new Process; }

Process& here() {
  static std::once_flag once;
  std::call_once(once, [] {
    renew();
    pthread_atfork(nullptr, nullptr, renew);
  });
  return *process;
}

void run(Process* p, Job* job, int slot) {
  try {
    const PlainFloats plain;
    job->body(job->argument, slot);
  } catch (...) {
    std::lock_guard<std::mutex> lock(p->mutex);
    if (!job->error) job->error = std::current_exception();
  }
}

void work(Process* p) {
  std::unique_lock<std::mutex> lock(p->mutex);
  for (;;) {
    Job* job = nullptr;
    for (Job* j : p->jobs)
      if (j->taken < j->slots) job = j;
    if (!job) {
      p->wake.wait(lock);
      continue;
    }
    const int slot = job->taken++;
    job->running++;
    lock.unlock();
    run(p, job, slot);
    lock.lock();
    if (--job->running == 0) p->ended.notify_all();
  }
}

}  // namespace

void pool(int threads, void (*body)(void*, int), void* argument) {
  Process& p = here();
  Job job{body, argument, threads, 1, 0, nullptr};
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.jobs.push_back(&job);
    try {
      for (; p.workers < threads - 1; p.workers++) std::thread(work, &p).detach();
    } catch (const std::system_error&) {
      // The system has no more threads to give: those there are, and the caller, share the work.
    }
  }
  p.wake.notify_all();
  run(&p, &job, 0);
  std::unique_lock<std::mutex> lock(p.mutex);
  for (size_t i = 0; i < p.jobs.size(); i++)
    if (p.jobs[i] == &job) p.jobs.erase(p.jobs.begin() + long(i));
  p.ended.wait(lock, [&] { return job.running == 0; });
  if (job.error) std::rethrow_exception(job.error);
}

#ifdef __SSE__
PlainFloats::PlainFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
PlainFloats::~PlainFloats() { _mm_setcsr(saved_); }
#else
PlainFloats::PlainFloats() {
  fegetenv(&saved_);
  fesetenv(FE_DFL_ENV);
}
PlainFloats::~PlainFloats() { fesetenv(&saved_); }
#endif

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_((bytes + kHuge - 1) / kHuge * kHuge) {
  Process& p = here();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    for (size_t i = 0; i < p.blocks.size(); i++)
      if (p.blocks[i].bytes >= bytes_ && p.blocks[i].bytes <= 4 * bytes_) {
        data_ = p.blocks[i].data;
        bytes_ = p.blocks[i].bytes;
        p.retained -= bytes_;
        p.blocks.erase(p.blocks.begin() + long(i));
        return;
      }
  }
  // Anonymous memory comes at page granularity: take one huge page more and give the odd ends back.
  char* raw = static_cast<char*>(
      mmap(nullptr, bytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const size_t skip = (kHuge - reinterpret_cast<uintptr_t>(raw) % kHuge) % kHuge;
  if (skip) munmap(raw, skip);
  munmap(raw + skip + bytes_, kHuge - skip);
  data_ = raw + skip;
  advise_huge(data_, bytes_);
}

Scratch::~Scratch() {
  if (!data_) return;
  Process& p = here();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    if (p.retained + bytes_ <= kRetained) {
      p.blocks.push_back({data_, bytes_});
      p.retained += bytes_;
      return;
    }
  }
  munmap(data_, bytes_);
}

void advise_huge(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + 4095) / 4096 * 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / 4096 * 4096;
  if (end > start + kHuge) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pk
