// Loops over several cores. What a decoding step does at a time takes tens of microseconds, and the server and its
// clients want the same cores: so nothing here waits for a thread that has not begun to work.
#pragma once
#include <algorithm>
#include <cstdint>

// Calls run(context, i) for every i < count on up to `threads` threads, the caller among them, and returns when all
// are done. Whoever is free takes the next i. Alone where another caller's loop is under way.
void parallel(int64_t count, int64_t threads, void (*run)(void* context, int64_t i), void* context);

// body(i) for every i < count, `run` of them in a row by one thread. Which thread it is must not matter to results.
template <class Body>
void parallel_for(int64_t count, int64_t run, int64_t threads, const Body& body) {
  auto part = [&](int64_t p) {
    const int64_t end = std::min(count, (p + 1) * run);
    for (int64_t i = p * run; i < end; i++) body(i);
  };
  const int64_t parts = (count + run - 1) / run;
  if (threads <= 1 || parts <= 1) {
    for (int64_t p = 0; p < parts; p++) part(p);
    return;
  }
  auto call = [](void* context, int64_t p) { (*static_cast<decltype(part)*>(context))(p); };
  parallel(parts, threads, call, &part);
}
