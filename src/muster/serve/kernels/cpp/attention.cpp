// Causal attention of new tokens over keys and values that lie in pages, online softmax in fp32 (FlashAttention, Dao
// et al. 2022). One path for single tokens and for prompts' chunks: a tile is some new tokens of a sequence with all
// query heads of one kv head, as rows; it walks over the sequence's keys, 64 at a time. Both products are those of
// `product.h`, or of `tiles.h`, after a block of keys has been turned so that keys lie across lanes.
//
// Blocks begin at multiples of 64 of a sequence's positions and a masked key adds an exact zero, so a token's result
// is the same bits whatever tile, chunk or batch it is computed in.
//
// T is what is computed in, S what the pages hold: the same, or int8 rows (`pages.h`). Whole numbers up to 127 are
// exact in either T; a key's scale goes into its scores, a value's into the weights that it is multiplied with.
#include <cmath>
#include <limits>
#include <optional>

#include "operations.h"
#include "pages.h"
#include "parallel.h"
#include "product.h"
#include "tiles.h"

namespace {

constexpr int64_t KEYS = 64;
constexpr int64_t MOST_ROWS = 32;
constexpr float NOTHING = -1e30f;  // finite: the difference of two infinities is no number

struct Shape {
  int64_t heads, kv_heads, dim, block_tokens, table_width, window;
  int64_t group() const { return heads / kv_heads; }
  int64_t row_numbers() const { return (heads + 2 * kv_heads) * dim; }
};

struct Tile {
  int64_t token, tokens, position, kv_head;  // `token`: row of the batch; `position`: in the sequence
  const int64_t* blocks;                     // the sequence's part of the table

  int64_t end() const { return position + tokens; }
  // The block of keys that it begins with.
  int64_t begin(int64_t window) const { return window ? std::max<int64_t>(0, position - window + 1) / KEYS * KEYS : 0; }
};

// Where the keys and values of 64 positions lie.
template <class S>
struct Rows {
  const S *keys[KEYS], *values[KEYS];
};

// Finds the rows of positions `from` on. What lies behind `end` is `nothing`, since what a page holds there may be no
// number.
template <class S>
void find_rows(Rows<S>& rows, int64_t from, const Tile& tile, const Shape& shape, const S* keys, const S* values,
               const S* nothing) {
  const int64_t row = row_numbers<S>(shape.dim);
  const int64_t end = tile.end();
  int64_t k = 0;
  while (k < KEYS && from + k < end) {
    const int64_t page = (from + k) / shape.block_tokens, offset = (from + k) % shape.block_tokens;
    const int64_t count = std::min({shape.block_tokens - offset, KEYS - k, end - from - k});
    const int64_t at =
        ((tile.blocks[page] * shape.kv_heads + tile.kv_head) * shape.block_tokens + offset) * row;
    for (int64_t i = 0; i < count; i++, k++) {
      rows.keys[k] = keys + at + i * row;
      rows.values[k] = values + at + i * row;
    }
  }
  for (; k < KEYS; k++) rows.keys[k] = rows.values[k] = nothing;
}

// Has memory bring a row that the next block will need. Done row by row while this block is worked on: all at once,
// they would wait for each other.
template <class S>
void fetch(const S* row, int64_t dim) {
  for (int64_t line = 0; line < row_numbers<S>(dim) * static_cast<int64_t>(sizeof(S)); line += 64)
    _mm_prefetch(reinterpret_cast<const char*>(row) + line, _MM_HINT_T0);
}

// `count` of 64 rows of keys to [unit of D][64], units filled with zeros to a multiple of 16.
template <class T, class S>
void turn_keys(const S* const* rows, const S* const* next, uint32_t* turned, int64_t dim, int64_t count) {
  const int64_t units = dim / in_unit<T>;
  for (int64_t k = 0; k < KEYS; k += 16) {
    for (int i = 0; i < 16; i++) fetch(next[k + i], dim);
    if (k >= count) continue;
    for (int64_t u = 0; u < units; u += 16) {
      Ints block[16];
      for (int i = 0; i < 16; i++) block[i] = load_units<T>(rows[k + i], u, units - u);
      transpose(block);
      for (int64_t i = 0; i < 16; i++) store_ints(turned + (u + i) * KEYS + k, block[i]);
    }
  }
}

// `count` of 64 rows of values to [unit of keys][padded]: for bf16, neighbouring keys' values side by side.
template <class T, class S>
void pair_values(const S* const* rows, const S* const* next, uint32_t* paired, int64_t dim, int64_t padded,
                 int64_t count) {
  for (int64_t k = 0; k < KEYS; k += in_unit<T>) {
    for (int64_t i = 0; i < in_unit<T>; i++) fetch(next[k + i], dim);
    if (k >= count) continue;
    for (int64_t d = 0; d < padded; d += 16) {
      const Lanes lanes = first(dim - d);
      Ints unit = load_bits<T>(rows[k] + d, lanes);
      if constexpr (in_unit<T> == 2)
        unit = bit_or(unit, shift_left<16>(load_bits<T>(rows[k + 1] + d, lanes)));
      store_ints(paired + k / in_unit<T> * padded + d, unit);
    }
  }
}

template <class T>
bool in_tiles() {
  return std::is_same_v<T, bfloat16> && have_tiles();
}

#ifdef __AMX_BF16__
// The same as `multiply` of bf16. Rows up to whole tiles are read and written.
void multiply_in_tiles(const uint32_t* a, int64_t a_step, const uint32_t* b, int64_t units, float* c,
                       const TileRows& tiles, int64_t columns, int64_t step, bool add) {
  asm volatile("" : : : "memory");  // loads of tiles say nothing of what they read
  for (int64_t row = 0; row < tiles.rows; row += tiles.height)
    for (int64_t column = 0; column < columns; column += 32) {
      float *to = c + row * step + column, *beside = column + 16 < columns ? to + 16 : nullptr;
      _tile_zero(0);
      _tile_zero(1);
      if (add) _tile_loadd(0, to, step * 4);
      if (add && beside) _tile_loadd(1, beside, step * 4);
      for (int64_t u = 0; u < units; u += TILE_UNITS) {
        const uint32_t* from = b + u * step + column;
        _tile_loadd(4, a + row * a_step + u, a_step * 4);
        _tile_loadd(6, from, step * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (beside) {
          _tile_loadd(7, from + 16, step * 4);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
      _tile_stored(0, to, step * 4);
      if (beside) _tile_stored(1, beside, step * 4);
    }
  asm volatile("" : : : "memory");
}
#endif

// c (rows, columns) = or += a (rows, units) times b (units, columns); units and columns are multiples of 16, rows of b
// and c `step` apart.
template <class T>
void multiply(const uint32_t* a, int64_t a_step, const uint32_t* b, int64_t units, float* c, const TileRows& tiles,
              int64_t columns, int64_t step, bool add) {
#ifdef __AMX_BF16__
  if (in_tiles<T>()) return multiply_in_tiles(a, a_step, b, units, c, tiles, columns, step, add);
#endif
  const int64_t rows = tiles.rows;
  for (int64_t row = 0; row < rows; row += ATTENTION_ROWS)
    with_count<ATTENTION_ROWS>(rows - row, [&]<int ROWS>() {
      constexpr int WIDEST = attention_width(ROWS);
      for (int64_t column = 0; column < columns; column += 16 * WIDEST)
        with_count<WIDEST>((columns - column) / 16, [&]<int VECTORS>() {
          float* at = c + row * step + column;
          Floats sums[ROWS][VECTORS];
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++)
              sums[r][v] = add ? load(at + r * step + 16 * v) : broadcast(0.f);
          product<T, ROWS, VECTORS>(a + row * a_step, a_step, 1, Stored<T>{b + column, step}, units, sums);
#pragma GCC unroll 16
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) store(at + r * step + 16 * v, sums[r][v]);
        });
    });
}

// Scores of one row to weights in place (as a first factor), for keys from `from` on, of which those in [oldest, newest]
// are seen. Returns what the sums so far are to be multiplied with. `scales` are those of 64 keys, then of their values,
// if any.
template <class T>
float soften(float* scores, float scale, const float* scales, int64_t from, int64_t oldest, int64_t newest, float& most,
             float& total) {
  Floats score[KEYS / 16];
  Lanes seen[KEYS / 16];
  Floats top = broadcast(most);
  for (int v = 0; v < KEYS / 16; v++) {
    const int64_t key = from + 16 * v;
    seen[v] = first(newest + 1 - key) & ~first(oldest - key);
    score[v] = load(scores + 16 * v) * broadcast(scale);
    if (scales) score[v] = score[v] * load(scales + 16 * v);
    top = max(seen[v], top, score[v]);
  }
  const float now = max_of(top);
  Floats sum = broadcast(0.f);
  for (int v = 0; v < KEYS / 16; v++) {
    score[v] = keep(seen[v], exponential(score[v] - broadcast(now)));
    sum = sum + score[v];
    if (scales) score[v] = keep(seen[v], score[v] * load(scales + KEYS + 16 * v));
  }
  using Factor = std::conditional_t<PARTS<T> == 2, float, T>;  // a bf16's part is a float
  for (int v = 0; v < KEYS / 16; v++) store(reinterpret_cast<Factor*>(scores) + 16 * v, score[v]);
  const float shrink = now == most ? 1.f : first_of(exponential(broadcast(most - now)));
  total = total * shrink + sum_of(sum);
  most = now;
  return shrink;
}

template <class T, class S>
void attend_tile(const Tile& tile, const Shape& shape, const T* qkv, const S* keys, const S* values, T* out) {
  const int64_t group = shape.group(), dim = shape.dim, rows = tile.tokens * group;
  const int64_t units = (dim / in_unit<T> + 15) / 16 * 16, padded = (dim + 15) / 16 * 16;
  const TileRows tiles(rows);
  const int64_t room = tiles.count() * tiles.height, query = units * PARTS<T>;
  static thread_local std::vector<uint32_t> kept_queries, kept_keys, kept_values;
  static thread_local std::vector<float> kept_scores, kept_sums;
  static thread_local std::vector<S> nothing;
  uint32_t *turned = scratch(kept_keys, units * KEYS), *paired = scratch(kept_values, KEYS * padded);
  float *scores = scratch(kept_scores, room * KEYS), *sums = scratch(kept_sums, room * padded);
  uint32_t* queries = scratch(kept_queries, room * query);
  nothing.resize(row_numbers<S>(dim));  // zeros
  std::vector<float> most(rows, NOTHING), total(rows, 0.f);
  std::fill(sums, sums + rows * padded, 0.f);
  if (units * in_unit<T> != dim) std::fill(queries, queries + rows * query, 0);
  for (int64_t r = 0; r < rows; r++)
    take_apart<T>(reinterpret_cast<const uint32_t*>(qkv + (tile.token + r / group) * shape.row_numbers() +
                                                    (tile.kv_head * group + r % group) * dim),
                  queries + r * query, dim / in_unit<T>, 1);
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  const int64_t begin = tile.begin(shape.window);
  Rows<S> rows_now, rows_next;
  alignas(64) float kept_scales[2 * KEYS];
  const float* scales = std::is_same_v<S, int8_t> ? kept_scales : nullptr;
  find_rows(rows_next, begin, tile, shape, keys, values, nothing.data());
#ifdef __AMX_BF16__
  std::optional<Tiles> held;
  if (in_tiles<T>()) held.emplace(tiles.height);
#endif
  for (int64_t from = begin; from < tile.end(); from += KEYS) {
    constexpr int64_t WHOLE = 16 * in_unit<T>;
    const int64_t count = std::min(KEYS, (tile.end() - from + WHOLE - 1) / WHOLE * WHOLE);
    rows_now = rows_next;
    find_rows(rows_next, from + KEYS, tile, shape, keys, values, nothing.data());
    for (int64_t k = 0; scales && k < KEYS; k++) {
      kept_scales[k] = scale_of(rows_now.keys[k], dim);
      kept_scales[KEYS + k] = scale_of(rows_now.values[k], dim);
    }
    turn_keys<T>(rows_now.keys, rows_next.keys, turned, dim, count);
    multiply<T>(queries, query, turned, units, scores, tiles, count, KEYS, false);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t newest = tile.position + r / group, oldest = shape.window ? newest - shape.window + 1 : 0;
      const float shrink = soften<T>(scores + r * KEYS, scale, scales, from, oldest, newest, most[r], total[r]);
      if (shrink != 1.f)
        for (int64_t d = 0; d < padded; d += 16)
          store(sums + r * padded + d, load(sums + r * padded + d) * broadcast(shrink));
    }
    pair_values<T>(rows_now.values, rows_next.values, paired, dim, padded, count);
    multiply<T>(reinterpret_cast<const uint32_t*>(scores), KEYS, paired, count / in_unit<T>, sums, tiles, padded,
                padded, true);
  }
  for (int64_t r = 0; r < rows; r++) {
    T* to = out + (tile.token + r / group) * shape.heads * dim + (tile.kv_head * group + r % group) * dim;
    const Floats inverse = broadcast(1.f / total[r]);
    for (int64_t d = 0; d < dim; d += 16)
      store(to + d, load(sums + r * padded + d) * inverse, first(dim - d));
  }
}

std::vector<Tile> tiles_of(const Shape& shape, const int64_t* starts, const int64_t* lengths, const int64_t* table,
                           int64_t sequences) {
  const int64_t most = std::max<int64_t>(1, MOST_ROWS / shape.group());
  std::vector<Tile> tiles;
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = starts[s + 1] - starts[s], old = lengths[s] - count;
    for (int64_t t = 0; t < count; t += most)
      for (int64_t h = 0; h < shape.kv_heads; h++)
        tiles.push_back({starts[s] + t, std::min(most, count - t), old + t, h, table + s * shape.table_width});
  }
  return tiles;
}

template <class T, class S>
void attend(const T* qkv, const int64_t* starts, const int64_t* lengths, const int64_t* table, const S* keys,
            const S* values, T* out, int64_t sequences, const Shape& shape, int64_t threads) {
  const std::vector<Tile> tiles = tiles_of(shape, starts, lengths, table, sequences);
  parallel_for(tiles.size(), 1, threads, [&](int64_t i) { attend_tile(tiles[i], shape, qkv, keys, values, out); });
}

}  // namespace

extern "C" void muster_attend(const void* qkv, const int64_t* starts, const int64_t* lengths, const int64_t* table,
                              const void* keys, const void* values, void* out, int64_t sequences, int64_t heads,
                              int64_t kv_heads, int64_t dim, int64_t block_tokens, int64_t table_width, int64_t window,
                              int64_t threads, int64_t narrow, int64_t quantized) {
  const Shape shape{heads, kv_heads, dim, block_tokens, table_width, window};
  with_types(narrow, quantized, [&]<class T, class S>() {
    attend(static_cast<const T*>(qkv), starts, lengths, table, static_cast<const S*>(keys),
           static_cast<const S*>(values), static_cast<T*>(out), sequences, shape, threads);
  });
}
