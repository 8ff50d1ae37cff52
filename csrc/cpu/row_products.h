// Products of a few queries with rows of keys or values.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/attention_elements.h"
#include "cpu/attention_product.h"
#include "cpu/attention_vectors.h"
#include "cpu/row_list.h"
#include "cpu/row_products_avx512.h"

namespace sparse_heads::cpu {

// As many numbers as a `Vector` in pieces that are registers on any machine: a `Vector` would lie in memory.
template <class Scalar>
struct Pieces {
  static constexpr int64_t kLanes = 16 / sizeof(Scalar);
  typedef Scalar Piece __attribute__((vector_size(16)));
  Piece piece[4];

  SPARSE_HEADS_INLINE static Piece load(const Scalar* source) {
    Piece loaded;
    std::memcpy(&loaded, source, sizeof(Piece));
    return loaded;
  }

  // Of the first `count` elements of a row, and zeros.
  template <class T>
  SPARSE_HEADS_INLINE void load_row(const T* row, int64_t count) {
    alignas(64) Scalar copy[4 * kLanes] = {};
    const Scalar* source = copy;
    if (count < 4 * kLanes) {
      for (int64_t i = 0; i < count; ++i) copy[i] = to_scalar<Scalar>(row[i]);
    } else if constexpr (std::is_same_v<Scalar, T>) {
      source = row;
    } else {
      for (int64_t i = 0; i < 4 * kLanes; ++i) copy[i] = to_scalar<Scalar>(row[i]);
    }
    for (int i = 0; i < 4; ++i) piece[i] = load(source + i * kLanes);
  }

  SPARSE_HEADS_INLINE Scalar sum() const {
    const Piece all = (piece[0] + piece[1]) + (piece[2] + piece[3]);
    Scalar total = all[0];
    for (int64_t i = 1; i < kLanes; ++i) total += all[i];
    return total;
  }
};

// scores [kQueries, scores_stride] = queries [kQueries, whole vectors of columns] . keys; scores need room for whole
// vectors of keys. A query's arithmetic is the same however many share the pass.
template <class Math, class T, int kQueries, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void score_rows(
    const RowList& keys, const Scalar* queries, Scalar* scores, int64_t scores_stride) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Math, Avx512>) {
    return score_rows_on_avx512<T, kQueries>(keys, queries, scores, scores_stride);
  }
#endif
  using Numbers = Pieces<Scalar>;
  const int64_t width = whole_vectors<Scalar>(keys.columns);
  for (int64_t key = 0; key < keys.count; ++key) {
    const T* row = reinterpret_cast<const T*>(keys.data[key]);
    prefetch_row<T>(keys.data[key + kRowsAhead], keys.columns);
    Numbers sums[kQueries] = {};
    for (int64_t c = 0; c < keys.columns; c += kVectorLanes<Scalar>) {
      Numbers values;
      values.load_row(row + c, keys.columns - c);
      for (int q = 0; q < kQueries; ++q) {
        const Scalar* query = queries + q * width + c;
        for (int i = 0; i < 4; ++i) sums[q].piece[i] += values.piece[i] * Numbers::load(query + i * Numbers::kLanes);
      }
    }
    for (int q = 0; q < kQueries; ++q) scores[q * scores_stride + key] = sums[q].sum();
  }
}

// outputs [kQueries, outputs_stride] += factors [kQueries, factors_stride] . values; outputs have room for whole
// vectors of columns.
template <class Math, class T, int kQueries, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void add_rows(
    const RowList& values, const Scalar* factors, int64_t factors_stride, Scalar* outputs, int64_t outputs_stride) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Math, Avx512>) {
    return add_rows_on_avx512<T, kQueries>(values, factors, factors_stride, outputs, outputs_stride);
  }
#endif
  using Numbers = Pieces<Scalar>;
  for (int64_t c = 0; c < values.columns; c += kVectorLanes<Scalar>) {
    Numbers sums[kQueries] = {};
    for (int64_t key = 0; key < values.count; ++key) {
      if (c == 0) prefetch_row<T>(values.data[key + kRowsAhead], values.columns);
      Numbers value;
      value.load_row(reinterpret_cast<const T*>(values.data[key]) + c, values.columns - c);
      for (int q = 0; q < kQueries; ++q) {
        const Scalar factor = factors[q * factors_stride + key];
        for (int i = 0; i < 4; ++i) sums[q].piece[i] += value.piece[i] * factor;
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      Scalar* output = outputs + q * outputs_stride + c;
      for (int i = 0; i < 4; ++i) {
        const auto sum = Numbers::load(output + i * Numbers::kLanes) + sums[q].piece[i];
        std::memcpy(output + i * Numbers::kLanes, &sum, sizeof(sum));
      }
    }
  }
}

// For `with_floating_type`, of the elements of the rows.
template <class Math, int kQueries, class Scalar = typename Math::Scalar>
struct RowFunctions {
  template <class T>
  struct Score {
    SPARSE_HEADS_INLINE static void run(
        const RowList* keys, const Scalar* queries, Scalar* scores, int64_t scores_stride) {
      score_rows<Math, T, kQueries>(*keys, queries, scores, scores_stride);
    }
  };
  template <class T>
  struct Add {
    SPARSE_HEADS_INLINE static void run(
        const RowList* values, const Scalar* factors, int64_t factors_stride, Scalar* outputs,
        int64_t outputs_stride) {
      add_rows<Math, T, kQueries>(*values, factors, factors_stride, outputs, outputs_stride);
    }
  };
};

}  // namespace sparse_heads::cpu
