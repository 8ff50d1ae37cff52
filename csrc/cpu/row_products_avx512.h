// The products of row_products.h with AVX-512.
#pragma once

#include "cpu/avx512.h"

#if SPARSE_HEADS_HAVE_AVX512

#include <algorithm>
#include <cstdint>

#include "cpu/attention_elements.h"
#include "cpu/attention_vectors.h"
#include "cpu/row_list.h"

namespace sparse_heads::cpu {

template <class T, int kQueries>
SPARSE_HEADS_AVX512 void score_rows_on_avx512(
    const RowList& keys, const float* queries, float* scores, int64_t scores_stride) {
  constexpr int kKeys = kLanes / kQueries;
  const int64_t width = whole_vectors<float>(keys.columns);
  for (int64_t first = 0; first < keys.count; first += kKeys) {
    __m512 sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      // Short groups repeat the last key: its results are dropped.
      const int64_t key = std::min<int64_t>(first + i, keys.count - 1);
      const T* row = reinterpret_cast<const T*>(keys.data[key]);
      prefetch_row<T>(keys.data[key + kRowsAhead], keys.columns);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sums[q * kKeys + i] = _mm512_setzero_ps();
      for (int64_t c = 0; c < keys.columns; c += kLanes) {
        const __m512 values = load16(row + c, keys.columns - c);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          sums[q * kKeys + i] = _mm512_fmadd_ps(values, _mm512_loadu_ps(queries + q * width + c), sums[q * kKeys + i]);
        }
      }
    }
    alignas(64) float results[kLanes];
    _mm512_store_ps(results, sum_each16(sums));
    for (int q = 0; q < kQueries; ++q) std::copy_n(results + q * kKeys, kKeys, scores + q * scores_stride + first);
  }
}

template <class T, int kQueries>
SPARSE_HEADS_AVX512 void add_rows_on_avx512(
    const RowList& values, const float* factors, int64_t factors_stride, float* outputs, int64_t outputs_stride) {
  constexpr int kVectors = 4;
  for (int64_t c = 0; c < values.columns; c += kVectors * kLanes) {
    const int64_t columns = std::min<int64_t>(values.columns - c, kVectors * kLanes);
    __m512 sums[kQueries][kVectors];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[q][v] = _mm512_setzero_ps();
    }
    for (int64_t key = 0; key < values.count; ++key) {
      const T* row = reinterpret_cast<const T*>(values.data[key]) + c;
      prefetch_row<T>(values.data[key + kRowsAhead] + c * sizeof(T), columns);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= columns) break;
        const __m512 value = load16(row + v * kLanes, columns - v * kLanes);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) {
          sums[q][v] = _mm512_fmadd_ps(_mm512_set1_ps(factors[q * factors_stride + key]), value, sums[q][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (v * kLanes >= columns) break;
        float* output = outputs + q * outputs_stride + c + v * kLanes;
        _mm512_storeu_ps(output, _mm512_add_ps(_mm512_loadu_ps(output), sums[q][v]));
      }
    }
  }
}

}  // namespace sparse_heads::cpu

#endif
