// AMX: products of whole tiles, 16 rows times 16 features over 64 bytes of inputs in one instruction, eight times what
// AVX-512 does in the same time. A tile of weights is sixteen units of `LAYOUT` as they lie, half a panel wide.
//
// Its sums of int8 are those of VNNI to the bit, but its sums of bf16 are added in another order: so bf16 is computed
// in one way or in the other, whatever the number of rows.
#pragma once
#include "vector.h"

constexpr int64_t TILE_ROWS = 16, TILE_UNITS = 16;

// Rows in tiles of equal height, each tile's units together: [tile of rows][16 units][row][unit].
struct TileRows {
  int64_t rows, height;

  explicit TileRows(int64_t rows) : rows(rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    height = (rows + tiles - 1) / tiles;
  }
  int64_t tiles() const { return (rows + height - 1) / height; }
  int64_t numbers(int64_t units) const { return tiles() * height * units; }
  // Of a row's units: where the first is, where another is from there, and how far apart neighbours are.
  int64_t start(int64_t row, int64_t units) const { return row / height * height * units + row % height * TILE_UNITS; }
  int64_t offset(int64_t, int64_t unit) const { return unit / TILE_UNITS * height * TILE_UNITS + unit % TILE_UNITS; }
  int64_t step(int64_t) const { return 1; }
};

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Whether the system lets this process have tiles: it must be asked once, since they make its threads' state larger.
inline bool have_tiles() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// While it lives, this thread has tiles: 0 to 3 for sums, 4 and 5 for rows, 6 and 7 for weights. Other libraries want
// them in other shapes, so nobody keeps them.
class Tiles {
 public:
  explicit Tiles(int64_t height) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = i < 6 ? static_cast<uint8_t>(height) : TILE_UNITS;
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Weights that memory is told of ahead of their time: loads of tiles alone would have it wait. Two tiles of rows at a time
// are multiplied with a panel, and in each of these times an equal part of the next panel is asked for, so that memory
// works all the time; where that is one time, what is so many bytes further on.
class Ahead {
 public:
  static constexpr int64_t BYTES = 8192;
  Ahead(const void* panel, int64_t units, int64_t times)
      : from_(static_cast<const char*>(panel) + (times > 1 ? units * UNIT_BYTES : BYTES)), units_(units), times_(times) {}
  // For 16 units of the panel, in one of the times.
  void operator()(int64_t time, int64_t unit) const {
    const char* at = from_ + (time * units_ + unit) * UNIT_BYTES / times_;
    for (int64_t byte = 0; byte < TILE_UNITS * UNIT_BYTES / times_; byte += 64)
      times_ > 1 ? _mm_prefetch(at + byte, _MM_HINT_T1) : _mm_prefetch(at + byte, _MM_HINT_T0);
  }

 private:
  static constexpr int64_t UNIT_BYTES = PANEL * 4;
  const char* from_;
  int64_t units_, times_;
};

// sums (1 or 2 tiles of rows, 32 features) = rows times a panel of weights, which are W: bfloat16, as the rows are, or
// signed or unsigned bytes, with signed ones in rows.
template <class W, bool TWO>
inline void multiply_tiles(const uint32_t* rows, int64_t height, const void* panel, int64_t units, void* sums,
                           const Ahead& ahead, int64_t time) {
  const auto* w = static_cast<const uint8_t*>(panel);
  const auto *a = reinterpret_cast<const uint8_t*>(rows), *b = a + height * units * 4;
  asm volatile("" : : : "memory");  // the loads below say nothing of what they read
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t u = 0; u < units; u += TILE_UNITS) {
    ahead(time, u);
    _tile_loadd(6, w + u * PANEL * 4, PANEL * 4);
    _tile_loadd(7, w + u * PANEL * 4 + 64, PANEL * 4);
    _tile_loadd(4, a + u * height * 4, 64);
    if constexpr (TWO) _tile_loadd(5, b + u * height * 4, 64);
    if constexpr (std::is_same_v<W, bfloat16>) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else if constexpr (std::is_same_v<W, int8_t>) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (TWO) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if constexpr (TWO) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
  }
  auto* to = static_cast<uint8_t*>(sums);
  _tile_stored(0, to, PANEL * 4);
  _tile_stored(1, to + 64, PANEL * 4);
  if constexpr (TWO) {
    _tile_stored(2, to + height * PANEL * 4, PANEL * 4);
    _tile_stored(3, to + height * PANEL * 4 + 64, PANEL * 4);
  }
  asm volatile("" : : : "memory");
}

// finish(row, sums of its 32 features) for each row of `placed` times a panel.
template <class W, class Finish>
inline void multiply_panel(const TileRows& tiles, const uint32_t* placed, const void* panel, int64_t units,
                           const Finish& finish) {
  alignas(64) std::conditional_t<std::is_same_v<W, bfloat16>, float, int32_t> sums[2 * TILE_ROWS * PANEL];
  const Tiles held(tiles.height);
  const int64_t both = 2 * tiles.height, times = (tiles.rows + both - 1) / both;
  const Ahead ahead(panel, units, times);
  for (int64_t time = 0; time < times; time++) {
    const int64_t row = time * both, end = std::min(tiles.rows, row + both);
    if (row + tiles.height < tiles.rows)
      multiply_tiles<W, true>(placed + row * units, tiles.height, panel, units, sums, ahead, time);
    else
      multiply_tiles<W, false>(placed + row * units, tiles.height, panel, units, sums, ahead, time);
    for (int64_t r = row; r < end; r++) finish(r, sums + (r - row) * PANEL);
  }
}
#else
inline bool have_tiles() { return false; }
#endif
