// One chunk of the cache for all queries of a group, and the merging of a group's chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_elements.h"
#include "cpu/attention_product.h"
#include "cpu/attention_scores.h"
#include "cpu/row_products.h"
#include "cpu/row_softmax.h"
#include "decode_params.h"

namespace sparse_heads::cpu {

// Positions that are computed together. Chunks end at the same positions in every request, so that a request's rounding
// depends on nothing but itself.
constexpr int64_t kChunkKeys = 512;
// Places of a whole chunk that are read in turn: measured, memory gives a core more when several pages are on their
// way.
constexpr int64_t kStreams = 8;
// Rows that one running sum takes at most: longer sums round worse.
constexpr int64_t kSumRows = 64;
// Queries that pass over a chunk together, so that their scores stay in the processor's cache.
constexpr int64_t kChunkQueries = 32;

// The chunks of a group, and its part of `Partials`.
struct DecodeGroup {
  const HeadGroup* heads;
  int64_t first_chunk;
  int64_t chunks;
  int64_t first_partial;
};

// What a chunk adds up to for one query: its largest score, the sum of exp(score - largest), and that of the same times
// the values; [partials, stride], the first two numbers in a vector of their own.
template <class Scalar>
struct Partials {
  Scalar* data;
  int64_t value_dim;

  int64_t width() const { return whole_vectors<Scalar>(value_dim); }
  int64_t stride() const { return kVectorLanes<Scalar> + width(); }
  Scalar& largest(int64_t partial) const { return data[partial * stride()]; }
  Scalar& sum(int64_t partial) const { return data[partial * stride() + 1]; }
  Scalar* values(int64_t partial) const { return data + partial * stride() + kVectorLanes<Scalar>; }
};

template <class Scalar>
struct ChunkBuffers {
  Buffer<Scalar> keys, values, queries, scores;
};

// Pointers to the rows of `count` positions, every `step`-th of `rows`.
template <class Scalar>
SPARSE_HEADS_INLINE void list_positions(
    const Decode<Scalar>& decode, const HeadGroup& heads, const Array4& cache, int64_t position, int64_t count,
    const char** rows, int64_t step) {
  const int64_t size = cache.strides[2] * element_size(cache.element);
  while (count > 0) {
    const int64_t run =
        decode.block_table.data ? std::min(count, decode.page_size - position % decode.page_size) : count;
    const char* row = decode.row(cache, heads.request, heads.kv_head, position);
    for (int64_t i = 0; i < run; ++i) rows[i * step] = row + i * size;
    rows += run * step;
    position += run;
    count -= run;
  }
}

// Pointers to the rows from `begin` to `end`, in turn from every stream or one after the other; they are copied where
// their elements are no neighbours. Returns the type of the elements that they point to.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE Element list_rows(
    const Decode<Scalar>& decode, const HeadGroup& heads, const Array4& cache, int64_t columns, int64_t begin,
    int64_t end, bool in_streams, Buffer<Scalar>& buffer, const char** rows) {
  const int64_t streams = in_streams ? kStreams : 1;
  const int64_t stream_keys = (end - begin) / streams;
  for (int64_t stream = 0; stream < streams; ++stream) {
    list_positions(decode, heads, cache, begin + stream * stream_keys, stream_keys, rows + stream, streams);
  }
  if (cache.strides[3] == 1 || columns <= 1) return cache.element;
  const int64_t stride = whole_vectors<Scalar>(columns);
  Scalar* copy = buffer.get((end - begin) * stride);
  for (int64_t i = 0; i < end - begin; ++i, copy += stride) {
    Math::Rows::load(cache.element, rows[i], cache.strides[3], columns, 1, copy, stride);
    rows[i] = reinterpret_cast<const char*>(copy);
  }
  return std::is_same_v<Scalar, double> ? Element::kFloat64 : Element::kFloat32;
}

// Runs function(query, number) over `count` queries, four, two or one at a time.
template <class Function>
SPARSE_HEADS_INLINE void for_queries(int64_t count, const Function& function) {
  int64_t query = 0;
  for (; query + 4 <= count; query += 4) function(query, std::integral_constant<int, 4>{});
  if (query + 2 <= count) {
    function(query, std::integral_constant<int, 2>{});
    query += 2;
  }
  if (query < count) function(query, std::integral_constant<int, 1>{});
}

// Caps the scores of one query and hides the keys that it does not see, those up to a whole vector too.
template <class Scalar>
SPARSE_HEADS_INLINE void finish_row_scores(
    Scalar softcap, int64_t first_seen, int64_t last_seen, int64_t begin, int64_t end, Scalar* scores) {
  const int64_t width = whole_vectors<Scalar>(end - begin);
  if (softcap != 0) cap(softcap, scores, static_cast<Scalar*>(nullptr), width);
  std::fill(scores, scores + std::clamp<int64_t>(first_seen - begin, 0, width), -kInfinity<Scalar>);
  std::fill(scores + std::clamp<int64_t>(last_seen + 1 - begin, 0, end - begin), scores + width, -kInfinity<Scalar>);
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_chunk(
    const Decode<Scalar>& decode, const DecodeGroup& group, int64_t chunk, const Partials<Scalar>& partials) {
  thread_local ChunkBuffers<Scalar> buffers;
  const Attention<Scalar>& attention = decode.attention;
  const HeadGroup& heads = *group.heads;
  const int64_t first = (group.first_chunk + chunk) * kChunkKeys;
  const int64_t begin = std::max(first, decode.first(heads.request, 0));
  const int64_t end = std::min(first + kChunkKeys, decode.lengths[heads.request]);
  const int64_t count = end - begin;
  const bool all_see_all = decode.first(heads.request, attention.queries - 1) <= begin &&
      decode.own(heads.request, 0) >= end - 1;
  const bool in_streams = count == kChunkKeys && all_see_all;

  // Values follow keys, so that the last keys call the first values into the cache.
  const char* rows[2 * kChunkKeys + kRowsAhead];
  const Element key_element =
      list_rows<Math>(decode, heads, attention.key, attention.head_dim, begin, end, in_streams, buffers.keys, rows);
  const Element value_element = list_rows<Math>(
      decode, heads, attention.value, attention.value_dim, begin, end, in_streams, buffers.values, rows + count);
  std::fill_n(rows + 2 * count, kRowsAhead, rows[2 * count - 1]);
  const RowList keys{rows, count, attention.head_dim};

  const int64_t query_width = whole_vectors<Scalar>(attention.head_dim);
  Scalar* queries = buffers.queries.get(kChunkQueries * query_width);
  Scalar* scores = buffers.scores.get(kChunkQueries * kChunkKeys);
  const int64_t all = heads.count * attention.queries;
  for (int64_t first_query = 0; first_query < all; first_query += kChunkQueries) {
    const int64_t together = std::min(kChunkQueries, all - first_query);
    for (int64_t i = 0; i < together; ++i) {
      const int64_t head = heads.heads[(first_query + i) / attention.queries];
      const char* row = attention.query.at(heads.request, head, (first_query + i) % attention.queries);
      Math::Rows::load(
          attention.query.element, row, attention.query.strides[3], attention.head_dim, attention.scale,
          queries + i * query_width, query_width);
    }
    for_queries(together, [&](int64_t query, auto number) __attribute__((always_inline)) {
      with_floating_type<Scalar, RowFunctions<Math, number()>::template Score>(
          key_element, &keys, static_cast<const Scalar*>(queries + query * query_width), scores + query * kChunkKeys,
          kChunkKeys);
    });
    const int64_t first_partial = group.first_partial + chunk * all + first_query;
    for (int64_t i = 0; i < together; ++i) {
      const int64_t query = (first_query + i) % attention.queries;
      Scalar* row = scores + i * kChunkKeys;
      finish_row_scores(
          attention.softcap, decode.first(heads.request, query), decode.own(heads.request, query), begin, end, row);
      Scalar& largest = partials.largest(first_partial + i) = -kInfinity<Scalar>;
      Scalar& sum = partials.sum(first_partial + i) = 0;
      update_row_softmax(row, count, largest, sum);
      std::fill_n(partials.values(first_partial + i), partials.width(), Scalar(0));
    }
    for (int64_t i = 0; i < count; i += kSumRows) {
      const RowList values{rows + count + i, std::min(kSumRows, count - i), attention.value_dim};
      for_queries(together, [&](int64_t query, auto number) __attribute__((always_inline)) {
        with_floating_type<Scalar, RowFunctions<Math, number()>::template Add>(
            value_element, &values, static_cast<const Scalar*>(scores + query * kChunkKeys + i), kChunkKeys,
            partials.values(first_partial + query), partials.stride());
      });
    }
  }
}

// In the order of the chunks, whoever has run them.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void merge_chunks(
    const Decode<Scalar>& decode, const DecodeGroup& group, const Partials<Scalar>& partials) {
  const Attention<Scalar>& attention = decode.attention;
  const int64_t request = group.heads->request;
  const int64_t all = group.heads->count * attention.queries;
  for (int64_t query = 0; query < all; ++query) {
    const int64_t first = group.first_partial + query;
    const int64_t head = group.heads->heads[query / attention.queries];
    Scalar largest = -kInfinity<Scalar>;
    for (int64_t chunk = 0; chunk < group.chunks; ++chunk) {
      largest = std::max(largest, partials.largest(first + chunk * all));
    }
    // The first chunk's memory takes the result.
    Scalar* output = partials.values(first);
    Scalar sum = 0;
    for (int64_t chunk = 0; chunk < group.chunks; ++chunk) {
      const int64_t partial = first + chunk * all;
      // Without a key that is seen, what it holds may be NaN.
      const bool sees_a_key = partials.sum(partial) != 0;
      const Scalar weight = sees_a_key ? std::exp(partials.largest(partial) - largest) : 0;
      const Scalar* values = partials.values(partial);
      for (int64_t c = 0; c < partials.width(); ++c) {
        const Scalar part = sees_a_key ? values[c] * weight : 0;
        output[c] = chunk == 0 ? part : output[c] + part;
      }
      sum += partials.sum(partial) * weight;
    }
    Scalar divisor, sink_share;
    const Scalar* sink = attention.sinks.data ? &attention.sinks.at(request, head) : nullptr;
    find_divisors(&largest, &sum, sink, 1, &divisor, &sink_share);
    const Scalar gate = attention.gate.data ? attention.gate.at(request, head) : 1;
    for (int64_t c = 0; c < partials.width(); ++c) output[c] = output[c] / divisor * gate;
    char* row = attention.output.at(request, head, query % attention.queries);
    Math::Rows::store(output, attention.value_dim, attention.output.element, row);
  }
}

}  // namespace sparse_heads::cpu
