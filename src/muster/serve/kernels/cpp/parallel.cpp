// The threads behind `parallel.h`.
//
// A ticket says in one word which loop it is and how many of its parts nobody has taken yet. Whoever lowers it owns a
// part, and only then looks at what the loop is: a helper that wakes too late finds nothing left, and nobody has
// waited for it. The caller takes parts as well, and in the end waits for those that helpers own.
#include "parallel.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// A helper without work looks for so long before it sleeps: the next loop of a step mostly comes sooner.
constexpr auto AWAKE = std::chrono::microseconds(500);
// The caller looks so often before it lets others have its core: a helper that it waits for may need it.
constexpr int PATIENCE = 1000;

struct Pool {
  std::atomic_flag busy;
  std::atomic<uint32_t> loops{0};  // helpers sleep until it changes
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> helped{0};  // parts that helpers have done
  std::atomic<int64_t> wanted{0};              // helpers
  std::vector<pthread_t> helpers;
  int core = -1;  // the caller's, from which helpers stay away
  int64_t parts = 0;
  void (*run)(void*, int64_t) = nullptr;
  void* context = nullptr;

  static uint32_t left(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

  // Takes parts until none is left, and returns how many it did.
  int64_t work() {
    int64_t done = 0;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (left(seen)) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
      run(context, parts - left(seen));
      done++;
      seen = ticket.load(std::memory_order_acquire);
    }
    return done;
  }

  void help(int64_t number) {
    for (;;) {
      const uint32_t loop = loops.load(std::memory_order_acquire);
      if (number < wanted.load(std::memory_order_relaxed)) helped.fetch_add(work(), std::memory_order_release);
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      while (loops.load(std::memory_order_acquire) == loop)
        if (std::chrono::steady_clock::now() < until)
          for (int i = 0; i < 4; i++) _mm_pause();
        else
          loops.wait(loop, std::memory_order_acquire);
    }
  }

  void hire(size_t count) {
    try {
      while (helpers.size() < count) {
        std::thread one(&Pool::help, this, static_cast<int64_t>(helpers.size()));
        helpers.push_back(one.native_handle());
        one.detach();
        core = -1;
      }
    } catch (const std::system_error&) {  // no more threads for this process: fewer do
    }
  }

  // The system may wake a helper on the very core that the caller computes on, and leave it there for many steps
  // when every core has something to do.
  void keep_away() {
    const int now = sched_getcpu();
    if (now == core) return;
    core = now;
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof others, &others)) return;
    CPU_CLR(now, &others);
    for (const pthread_t one : helpers) pthread_setaffinity_np(one, sizeof others, &others);  // refused if empty
  }

  void loop(int64_t count, int64_t threads, void (*body)(void*, int64_t), void* of) {
    hire(threads - 1);
    keep_away();
    run = body, context = of, parts = count;
    helped.store(0, std::memory_order_relaxed);
    wanted.store(threads - 1, std::memory_order_relaxed);
    const uint64_t number = loops.load(std::memory_order_relaxed) + 1;
    ticket.store(number << 32 | static_cast<uint64_t>(count), std::memory_order_release);
    loops.store(static_cast<uint32_t>(number), std::memory_order_release);
    loops.notify_all();
    const int64_t own = work();
    for (int looked = 0; own + helped.load(std::memory_order_acquire) < count; looked++)
      looked < PATIENCE ? _mm_pause() : static_cast<void>(sched_yield());
  }
};

// Never destroyed, since helpers look at it until the process ends. A forked child has no helpers: it gets its own.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  return new Pool;
}();

}  // namespace

void parallel(int64_t count, int64_t threads, void (*run)(void* context, int64_t i), void* context) {
  Pool& shared = *pool;
  if (shared.busy.test_and_set(std::memory_order_acquire)) {
    for (int64_t i = 0; i < count; i++) run(context, i);
    return;
  }
  shared.loop(count, threads, run, context);
  shared.busy.clear(std::memory_order_release);
}
