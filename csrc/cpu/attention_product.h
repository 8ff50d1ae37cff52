// Small matrix products, C = A B or C += A B, with A read where it lies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/attention_rows.h"
#include "cpu/attention_vectors.h"
#include "cpu/avx512.h"

namespace sparse_heads::cpu {

// One running sum takes this many products: longer ones round worse.
constexpr int64_t kSumLength = 256;

// A is [rows, depth], row after row (kByColumns false) or column after column, `stride` apart. B and C are row-major.
template <class Scalar>
struct Factors {
  const Scalar* a;
  int64_t a_stride;
  const Scalar* b;
  int64_t b_stride;
  Scalar* c;
  int64_t c_stride;
  int64_t depth;
  bool accumulate;
};

template <class Scalar, bool kByColumns, int kRows, int kVectors>
SPARSE_HEADS_INLINE void multiply_tile(const Factors<Scalar>& factors) {
  constexpr int64_t kLanes = kVectorLanes<Scalar>;
  Vector<Scalar> sums[kRows][kVectors] = {};
  const Scalar* a = factors.a;
  const Scalar* b = factors.b;
  const int64_t stride = factors.a_stride;
  const int64_t b_stride = factors.b_stride;
  for (int64_t k = 0; k < factors.depth; ++k) {
    Vector<Scalar> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) load(row[v], b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Scalar scalar = kByColumns ? a[i] : a[i * stride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] += row[v] * scalar;
    }
    a += kByColumns ? stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Scalar* c = factors.c + i * factors.c_stride + v * kLanes;
      if (factors.accumulate) {
        Vector<Scalar> before;
        load(before, c);
        sums[i][v] += before;
      }
      store(c, sums[i][v]);
    }
  }
}

#if SPARSE_HEADS_HAVE_AVX512
// float32 on AVX-512.
struct Avx512 {
  using Scalar = float;
  using Rows = Avx512Rows;
  static constexpr int kTileRows = 13;

  template <bool kByColumns, int kRows, int kVectors>
  SPARSE_HEADS_AVX512 static void tile(const Factors<float>& factors) {
    multiply_tile<float, kByColumns, kRows, kVectors>(factors);
  }
};
static_assert(Avx512::kTileRows * 2 + 2 + 1 <= 32, "a tile fits the registers");
#endif

// float32 and float64 on any machine.
template <class Type>
struct Baseline {
  using Scalar = Type;
  using Rows = BaselineRows<Type>;
  static constexpr int kTileRows = 2;

  template <bool kByColumns, int kRows, int kVectors>
  static void tile(const Factors<Scalar>& factors) {
    multiply_tile<Scalar, kByColumns, kRows, kVectors>(factors);
  }
};

template <class Math, bool kByColumns, int kVectors, int... kIndex>
SPARSE_HEADS_INLINE auto tile_function(int64_t rows, std::integer_sequence<int, kIndex...>) {
  using Function = void (*)(const Factors<typename Math::Scalar>&);
  static constexpr Function functions[] = {&Math::template tile<kByColumns, kIndex + 1, kVectors>...};
  return functions[rows - 1];
}

// C [rows, columns]; columns are whole vectors.
template <class Math, bool kByColumns>
void multiply(Factors<typename Math::Scalar> factors, int64_t rows, int64_t columns) {
  using Scalar = typename Math::Scalar;
  constexpr int64_t kLanes = kVectorLanes<Scalar>;
  constexpr auto kRowCounts = std::make_integer_sequence<int, Math::kTileRows>();
  const int64_t tiles = (rows + Math::kTileRows - 1) / Math::kTileRows;
  Factors<Scalar> tile = factors;
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = std::min<int64_t>(2, (columns - column) / kLanes);
    tile.b = factors.b + column;
    // Tiles of nearly equal height: a short last one would leave the multipliers half idle.
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = rows * i / tiles;
      const int64_t height = rows * (i + 1) / tiles - first;
      tile.a = factors.a + first * (kByColumns ? 1 : factors.a_stride);
      tile.c = factors.c + first * factors.c_stride + column;
      (vectors == 2 ? tile_function<Math, kByColumns, 2>(height, kRowCounts)
                    : tile_function<Math, kByColumns, 1>(height, kRowCounts))(tile);
    }
    column += vectors * kLanes;
  }
}

}  // namespace sparse_heads::cpu
