// Whether a batch stays within its cache and its vocabulary: what the other kernels would otherwise write past.
#include <cstdint>

// 0 where all is well, or the number of the rule that is broken (as in `native.py`).
extern "C" int64_t muster_check_batch(const int64_t* tokens, const int64_t* slots, const int64_t* starts,
                                      const int64_t* lengths, const int64_t* table, const int64_t* wanted, int64_t rows,
                                      int64_t sequences, int64_t table_width, int64_t wanted_rows, int64_t vocabulary,
                                      int64_t blocks, int64_t block_tokens) {
  for (int64_t i = 0; i < rows; i++) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) return 1;
    if (slots[i] < 0 || slots[i] >= blocks * block_tokens) return 2;
  }
  if (starts[0] != 0 || starts[sequences] != rows) return 3;
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t count = starts[s + 1] - starts[s];
    if (count < 0) return 3;
    if (lengths[s] < count || lengths[s] > table_width * block_tokens) return 4;
    for (int64_t p = 0; p * block_tokens < lengths[s]; p++)
      if (table[s * table_width + p] < 0 || table[s * table_width + p] >= blocks) return 5;
  }
  for (int64_t i = 0; i < wanted_rows; i++)
    if (wanted[i] < 0 || wanted[i] >= rows) return 6;
  return 0;
}
