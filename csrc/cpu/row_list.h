// Rows of keys or values that a product reads in place, wherever each of them lies.
#pragma once

#include <cstdint>

#include "cpu/attention_vectors.h"

namespace sparse_heads::cpu {

// Rows ahead of the one in use that are called into the cache.
constexpr int64_t kRowsAhead = 48;

// Rows of `columns` neighbouring elements; kRowsAhead pointers more follow those to `count` rows, for prefetching only.
struct RowList {
  const char* const* data;
  int64_t count;
  int64_t columns;
};

// Into the second level, which has room for more rows on their way than the first.
template <class T>
SPARSE_HEADS_INLINE void prefetch_row(const char* row, int64_t columns) {
  const int64_t size = columns * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

}  // namespace sparse_heads::cpu
