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

namespace sparse_heads::cpu {

struct FewTraits {
  // Measured: above, queries as lanes are faster.
  static constexpr int64_t kMaxQueries = 8;
  // Queries that share one pass over keys and values.
  static constexpr int64_t kQueries = 4;
  static constexpr int64_t kValueVectors = 4;
};

struct FewRows {
  const char* data;  // of neighbouring columns
  int64_t stride;    // in elements
  int64_t rows;
  int64_t columns;
};

// scores [kQueries, kPieceKeys] = queries [kQueries, whole vectors of columns] . keys
template <class T, int kQueries>
SPARSE_HEADS_AVX512 void score_few(const FewRows& keys, const float* queries, float* scores) {
  constexpr int kKeys = kLanes / kQueries;
  const T* data = reinterpret_cast<const T*>(keys.data);
  const int64_t width = whole_vectors<float>(keys.columns);
  for (int64_t first = 0; first < keys.rows; first += kKeys) {
    // Short groups repeat the last key: its results are dropped.
    const T* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) rows[i] = data + std::min<int64_t>(first + i, keys.rows - 1) * keys.stride;
    __m512 sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < keys.columns; c += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const __m512 key = load16(rows[i] + c, keys.columns - c);
        _mm_prefetch(rows[i] + kKeys * keys.stride + c, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          sums[q * kKeys + i] = _mm512_fmadd_ps(key, _mm512_loadu_ps(queries + q * width + c), sums[q * kKeys + i]);
        }
      }
    }
    alignas(64) float results[kLanes];
    _mm512_store_ps(results, sum_each16(sums));
    for (int q = 0; q < kQueries; ++q) std::copy_n(results + q * kKeys, kKeys, scores + q * kPieceKeys + first);
  }
}

// outputs [kQueries, whole vectors of columns] += probabilities [kQueries, kPieceKeys] . values
template <class T, int kQueries>
SPARSE_HEADS_AVX512 void add_few(const FewRows& values, const float* probabilities, float* outputs) {
  constexpr int kVectors = FewTraits::kValueVectors;
  const int64_t width = whole_vectors<float>(values.columns);
  for (int64_t c = 0; c < values.columns; c += kVectors * kLanes) {
    const T* row = reinterpret_cast<const T*>(values.data) + c;
    const int64_t columns = values.columns - c;
    __m512 sums[kQueries][kVectors];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[q][v] = _mm512_setzero_ps();
    }
    for (int64_t key = 0; key < values.rows; ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= columns) break;
        const __m512 value = load16(row + v * kLanes, columns - v * kLanes);
        _mm_prefetch(row + 8 * values.stride + v * kLanes, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          const __m512 probability = _mm512_set1_ps(probabilities[q * kPieceKeys + key]);
          sums[q][v] = _mm512_fmadd_ps(probability, value, sums[q][v]);
        }
      }
      row += values.stride;
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= columns) break;
        float* output = outputs + q * width + c + v * kLanes;
        _mm512_storeu_ps(output, _mm512_add_ps(_mm512_loadu_ps(output), sums[q][v]));
      }
    }
  }
}

template <int kQueries>
struct FewFunctions {
  template <class T>
  struct Score {
    static void run(const FewRows* keys, const float* queries, float* scores) {
      score_few<T, kQueries>(*keys, queries, scores);
    }
  };
  template <class T>
  struct Add {
    static void run(const FewRows* values, const float* probabilities, float* outputs) {
      add_few<T, kQueries>(*values, probabilities, outputs);
    }
  };
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

// As `update_softmax`, for one query whose keys are the lanes; returns the factor by which earlier results shrink.
SPARSE_HEADS_INLINE float update_few_softmax(float* scores, int64_t keys, float& largest, float& sum) {
  alignas(64) float tops[kLanes], sums[kLanes], shrinking[kLanes];
  std::fill_n(tops, kLanes, largest);
  std::fill_n(sums, kLanes, 0.0f);
  Vector<float> top, total, x;
  load(top, tops);
  for (int64_t i = 0; i < keys; i += kLanes) {
    load(x, scores + i);
    top = x > top ? x : top;
  }
  store(tops, top);
  const float before = largest;
  largest = *std::max_element(tops, tops + kLanes);
  top = Vector<float>{} + largest;
  make_finite<float>(top);
  load(total, sums);
  for (int64_t i = 0; i < keys; i += kLanes) {
    load(x, scores + i);
    x -= top;
    exponentiate(x);
    total += x;
    store(scores + i, x);
  }
  x = before - top;
  exponentiate(x);
  store(shrinking, x);
  store(sums, total);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  sum = sum * shrinking[0] + sums[0];
  return shrinking[0];
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
    const FewRows keys{
        attention.key.at(block.request, block.kv_head, begin), attention.key.strides[2], end - begin,
        attention.head_dim};
    const FewRows values{
        attention.value.at(block.request, block.kv_head, begin), attention.value.strides[2], end - begin,
        attention.value_dim};
    with_floating_type<float, FewFunctions<kQueries>::template Score>(
        attention.key.element, &keys, static_cast<const float*>(queries), static_cast<float*>(scores));
    for (int q = 0; q < kQueries; ++q) {
      float* row = scores + q * kPieceKeys;
      finish_few_scores(attention, block, first_lane + q, begin, end - begin, row, memory);
      const float shrinking = update_few_softmax(row, end - begin, largest[q], sums[q]);
      for (int64_t c = 0; c < output_width; ++c) outputs[q * output_width + c] *= shrinking;
    }
    with_floating_type<float, FewFunctions<kQueries>::template Add>(
        attention.value.element, &values, static_cast<const float*>(scores), outputs);
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
