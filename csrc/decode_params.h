// What the decode kernel is asked to do, without torch: shared by the kernels and their launchers.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace sparse_heads {

// Attention of every request's last `queries` positions to its cache, each to its own position and those before.
//
// In `attention`, `keys` are the positions that a request has room for; keys and values are (request, head, position,
// column), or with pages (page, head, position in the page, column); right is 0, and there is no attn_mask.
template <class Scalar>
struct Decode {
  Attention<Scalar> attention;
  const int64_t* lengths;             // [requests], from attention.queries to attention.keys
  Array2<const int32_t> block_table;  // [requests, pages of a request]; null: no pages
  int64_t page_size;

  const char* row(const Array4& cache, int64_t request, int64_t kv_head, int64_t position) const {
    if (!block_table.data) return cache.at(request, kv_head, position);
    return cache.at(block_table.at(request, position / page_size), kv_head, position % page_size);
  }

  // The position of a query.
  int64_t own(int64_t request, int64_t query) const { return lengths[request] - attention.queries + query; }

  // The first position that a query sees.
  int64_t first(int64_t request, int64_t query) const {
    const int64_t position = own(request, query);
    return attention.left < 0 || attention.left > position ? 0 : position - attention.left;
  }
};

}  // namespace sparse_heads
