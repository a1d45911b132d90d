// bf16 as a type, and which of sixteen lanes are meant.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

struct bfloat16 {
  uint16_t bits;
};

// Numbers in the 32 bits of a lane.
template <class T>
constexpr int64_t in_unit = 4 / sizeof(T);

using Lanes = uint16_t;  // a bit each

inline Lanes first(int64_t count) {  // of sixteen lanes
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<Lanes>((1u << count) - 1);
}
