// The forward of a group with few queries, as in decoding: dot products along the columns of keys and values, which are
// read once and in place. Lanes of queries would stay empty.
#pragma once

#include "cpu/avx512.h"

#if SPARSE_HEADS_HAVE_AVX512

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_elements.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_scores.h"
#include "cpu/row_products.h"
#include "cpu/row_softmax.h"

namespace sparse_heads::cpu {

struct FewTraits {
  // Measured: above, queries as lanes are faster.
  static constexpr int64_t kMaxQueries = 8;
};

inline bool few_suit(const Attention<float>& attention, const HeadGroup& group) {
  return attention.queries * group.count <= FewTraits::kMaxQueries && attention.key.strides[3] == 1 &&
      attention.value.strides[3] == 1;
}

// Masks of one query's scores of neighbouring keys, filled up with hidden ones.
SPARSE_HEADS_INLINE void finish_few_scores(
    const Attention<float>& attention, const Block<float>& block, int64_t lane, int64_t first_key, int64_t keys,
    float* scores, float* memory) {
  const int64_t width = whole_vectors<float>(keys);
  if (attention.softcap != 0) cap(attention.softcap, scores, static_cast<float*>(nullptr), width);
  const Array4& mask = attention.attn_mask;
  if (mask.data) {
    const char* row = mask.at(block.request, block.head[lane], block.position[lane]) +
        first_key * mask.strides[3] * element_size(mask.element);
    Avx512Rows::load(mask.element, row, mask.strides[3], keys, 1, memory, width);
    for (int64_t i = 0; i < width; i += kLanes) {
      Vector<float> values;
      load(values, memory + i);
      mask_vector<float>(mask.element == Element::kBool, values, scores + i);
    }
  }
  const int64_t begin = std::clamp<int64_t>(block.first_key[lane] - first_key, 0, keys);
  const int64_t end = std::clamp<int64_t>(block.last_key[lane] + 1 - first_key, begin, keys);
  std::fill(scores, scores + begin, -kInfinity<float>);
  std::fill(scores + end, scores + width, -kInfinity<float>);
}

template <int kQueries>
SPARSE_HEADS_INLINE void attend_few(const Attention<float>& attention, const Block<float>& block, int64_t first_lane) {
  thread_local Buffer<float> query_buffer, output_buffer;
  alignas(64) float scores[kQueries * kPieceKeys];
  alignas(64) float memory[kPieceKeys];
  const int64_t query_width = whole_vectors<float>(attention.head_dim);
  const int64_t output_width = whole_vectors<float>(attention.value_dim);
  float* queries = query_buffer.get(kQueries * query_width);
  float* outputs = output_buffer.get(kQueries * output_width);
  std::fill_n(outputs, kQueries * output_width, 0.0f);
  float largest[kQueries], sums[kQueries];
  std::fill_n(largest, kQueries, -kInfinity<float>);
  std::fill_n(sums, kQueries, 0.0f);
  const Array4& query = attention.query;
  for (int q = 0; q < kQueries; ++q) {
    const int64_t lane = first_lane + q;
    const char* row = query.at(block.request, block.head[lane], block.position[lane]);
    Avx512Rows::load(
        query.element, row, query.strides[3], attention.head_dim, attention.scale, queries + q * query_width,
        query_width);
  }
  for (int64_t begin = block.begin, end; begin < block.end; begin = end) {
    end = std::min((begin / kPieceKeys + 1) * kPieceKeys, block.end);
    const int64_t count = end - begin;
    const char* rows[2 * kPieceKeys + kRowsAhead];
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = attention.key.at(block.request, block.kv_head, begin + i);
      rows[count + i] = attention.value.at(block.request, block.kv_head, begin + i);
    }
    std::fill_n(rows + 2 * count, kRowsAhead, rows[2 * count - 1]);
    const RowList keys{rows, count, attention.head_dim};
    const RowList values{rows + count, count, attention.value_dim};
    with_floating_type<float, RowFunctions<Avx512, kQueries>::template Score>(
        attention.key.element, &keys, static_cast<const float*>(queries), static_cast<float*>(scores), kPieceKeys);
    for (int q = 0; q < kQueries; ++q) {
      float* row = scores + q * kPieceKeys;
      finish_few_scores(attention, block, first_lane + q, begin, count, row, memory);
      const float shrinking = update_row_softmax(row, count, largest[q], sums[q]);
      for (int64_t c = 0; c < output_width; ++c) outputs[q * output_width + c] *= shrinking;
    }
    with_floating_type<float, RowFunctions<Avx512, kQueries>::template Add>(
        attention.value.element, &values, static_cast<const float*>(scores), kPieceKeys, outputs, output_width);
  }
  for (int q = 0; q < kQueries && first_lane + q < block.count; ++q) {
    const int64_t lane = first_lane + q;
    const int64_t request = block.request;
    const int64_t head = block.head[lane];
    float divisor, sink_share;
    const float* sink = attention.sinks.data ? &attention.sinks.at(request, head) : nullptr;
    find_divisors(&largest[q], &sums[q], sink, 1, &divisor, &sink_share);
    const float gate = attention.gate.data ? attention.gate.at(request, head) : 1.0f;
    float* output = outputs + q * output_width;
    for (int64_t c = 0; c < output_width; ++c) output[c] = output[c] / divisor * gate;
    // Where no key is seen: 0 times a value that is not finite would be NaN.
    if (sums[q] == 0) std::fill_n(output, output_width, 0.0f);
    char* row = attention.output.at(request, head, block.position[lane]);
    Avx512Rows::store(output, attention.value_dim, attention.output.element, row);
  }
}

SPARSE_HEADS_INLINE void run_few_group(const Attention<float>& attention, const HeadGroup& group) {
  // A query's arithmetic is the same however many share its pass.
  const Block<float> block = Blocks<float>(attention, group).get(0);
  for (int64_t lane = 0; lane < block.count;) {
    const int64_t left = block.count - lane;
    if (left == 1) {
      attend_few<1>(attention, block, lane);
      lane += 1;
    } else if (left == 2) {
      attend_few<2>(attention, block, lane);
      lane += 2;
    } else {
      attend_few<4>(attention, block, lane);
      lane += 4;
    }
  }
}

}  // namespace sparse_heads::cpu

#endif
