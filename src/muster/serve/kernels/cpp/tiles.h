// AMX: products of whole tiles, 16 rows times 16 features over 64 bytes of inputs in one instruction, eight times what
// AVX-512 does in the same time. A tile of weights is sixteen units of `LAYOUT` as they lie, half a panel wide.
//
// Its sums of int8 are those of VNNI to the bit, but its sums of bf16 are added in another order: so bf16 is computed
// in one way or in the other, whatever the number of rows.
#pragma once
#include "panel.h"

constexpr int64_t TILE_ROWS = 16, TILE_UNITS = 16;

// Rows in tiles of equal height, each tile's units together: [tile of rows][16 units][row][unit].
struct TileRows {
  int64_t rows, height;

  explicit TileRows(int64_t rows) : rows(rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    height = (rows + tiles - 1) / tiles;
  }
  int64_t count() const { return (rows + height - 1) / height; }
  int64_t rows_in(int64_t first) const { return std::min(height, rows - first); }
  // As `RowBlocks` has them.
  template <class T>
  int64_t room(int64_t units) const {
    return count() * height * units;
  }
  template <class T>
  void place(int64_t row, const uint32_t* from, int64_t units, int64_t padded, uint32_t* to) const {
    to += row * padded;
    for (int64_t u = 0; u < padded; u += TILE_UNITS)
      for (int64_t r = 0; r < rows_in(row); r++)
        store_ints(to + (u / TILE_UNITS * height + r) * TILE_UNITS, load_ints(from + r * units + u, first(units - u)));
  }
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

// sums (1 or 2 tiles of rows, 32 features) = rows times a panel of weights: both bf16, or signed bytes times unsigned
// ones.
template <class T, bool TWO>
inline void multiply_tiles(const uint32_t* rows, int64_t height, const void* panel, int64_t units, void* sums,
                           const Ahead<_MM_HINT_T0>& ahead, int64_t step) {
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
    ahead(step + u / TILE_UNITS);
    _tile_loadd(6, w + u * PANEL * 4, PANEL * 4);
    _tile_loadd(7, w + u * PANEL * 4 + 64, PANEL * 4);
    _tile_loadd(4, a + u * height * 4, 64);
    if constexpr (TWO) _tile_loadd(5, b + u * height * 4, 64);
    if constexpr (std::is_same_v<T, bfloat16>) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
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

// finish(row, column, its 16 sums) for each row of `placed` times a panel, which `bytes` of `weights` were made into.
template <class T, class Finish>
inline void multiply_panel(const TileRows& tiles, const uint32_t* placed, const void* panel, int64_t units,
                           const void* weights, int64_t bytes, const Finish& finish) {
  alignas(64) uint32_t sums[2 * TILE_ROWS * PANEL];
  const Tiles held(tiles.height);
  const int64_t both = 2 * tiles.height, times = (tiles.rows + both - 1) / both;
  const int64_t steps = units / TILE_UNITS;
  const Ahead<_MM_HINT_T0> ahead(weights, bytes, times, steps);
  for (int64_t time = 0; time < times; time++) {
    const int64_t row = time * both, end = std::min(tiles.rows, row + both);
    if (row + tiles.height < tiles.rows)
      multiply_tiles<T, true>(placed + row * units, tiles.height, panel, units, sums, ahead, time * steps);
    else
      multiply_tiles<T, false>(placed + row * units, tiles.height, panel, units, sums, ahead, time * steps);
    for (int64_t r = row; r < end; r++)
      for (int64_t c = 0; c < PANEL; c += 16) {
        const Ints bits = load_ints(sums + (r - row) * PANEL + c);
        if constexpr (std::is_same_v<T, bfloat16>)
          finish(r, c, as_floats(bits));
        else
          finish(r, c, bits);
      }
  }
}
#else
inline bool have_tiles() { return false; }
#endif

// body(how rows are placed): in tiles from so many rows on, where there are tiles.
template <class Body>
inline void with_blocks(int64_t rows, int64_t for_tiles, const Body& body) {
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  if (rows >= for_tiles && have_tiles()) return body(TileRows(rows));
#endif
  body(RowBlocks(rows));
}
