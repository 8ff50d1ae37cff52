// See attention_product.h.
#include "cpu/attention_product.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/attention_vectors.h"
#include "cpu/avx512.h"

namespace sparse_heads::cpu {
namespace {

// A tile of C with `kBytes` long vectors side by side.
template <class Scalar, int kBytes, bool kByColumns, int kRows, int kVectors>
SPARSE_HEADS_INLINE void multiply_tile(const Factors<Scalar>& factors) {
  typedef Scalar Part __attribute__((vector_size(kBytes)));
  constexpr int64_t kLanes = kBytes / sizeof(Scalar);
  Part sums[kRows][kVectors] = {};
  const Scalar* a = factors.a;
  const Scalar* b = factors.b;
  const int64_t stride = factors.a_stride;
  const int64_t b_stride = factors.b_stride;
  for (int64_t k = 0; k < factors.depth; ++k) {
    Part row[kVectors];
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
        Part before;
        load(before, c);
        sums[i][v] += before;
      }
      store(c, sums[i][v]);
    }
  }
}

template <class Math>
struct Tiles;

#if SPARSE_HEADS_HAVE_AVX512
template <>
struct Tiles<Avx512> {
  static constexpr int kBytes = 64;
  static constexpr int kRows = 13;

  template <bool kByColumns, int kHeight, int kVectors>
  SPARSE_HEADS_AVX512 static void multiply(const Factors<float>& factors) {
    multiply_tile<float, kBytes, kByColumns, kHeight, kVectors>(factors);
  }
};
static_assert(Tiles<Avx512>::kRows * 2 + 2 + 1 <= 32, "a tile fits the registers");

template <>
struct Tiles<Avx2> {
  static constexpr int kBytes = 32;
  static constexpr int kRows = 6;

  template <bool kByColumns, int kHeight, int kVectors>
  SPARSE_HEADS_AVX2 static void multiply(const Factors<float>& factors) {
    multiply_tile<float, kBytes, kByColumns, kHeight, kVectors>(factors);
  }
};
static_assert(Tiles<Avx2>::kRows * 2 + 2 + 1 <= 16, "a tile fits the registers");
#endif

template <class Scalar>
struct Tiles<Baseline<Scalar>> {
  static constexpr int kBytes = 16;
  static constexpr int kRows = 4;

  template <bool kByColumns, int kHeight, int kVectors>
  static void multiply(const Factors<Scalar>& factors) {
    multiply_tile<Scalar, kBytes, kByColumns, kHeight, kVectors>(factors);
  }
};

template <class Math, bool kByColumns, int kVectors, int... kIndex>
SPARSE_HEADS_INLINE auto tile_function(int64_t rows, std::integer_sequence<int, kIndex...>) {
  using Function = void (*)(const Factors<typename Math::Scalar>&);
  static constexpr Function functions[] = {&Tiles<Math>::template multiply<kByColumns, kIndex + 1, kVectors>...};
  return functions[rows - 1];
}

}  // namespace

template <class Math, bool kByColumns>
void multiply(const Factors<typename Math::Scalar>& factors, int64_t rows, int64_t columns) {
  using Scalar = typename Math::Scalar;
  constexpr int64_t kLanes = Tiles<Math>::kBytes / sizeof(Scalar);
  constexpr int64_t kTileRows = Tiles<Math>::kRows;
  constexpr auto kHeights = std::make_integer_sequence<int, Tiles<Math>::kRows>();
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  Factors<Scalar> tile = factors;
  for (int64_t done = 0; done == 0 || done < factors.depth; done += factors.sum_length) {
    tile.depth = std::min(factors.sum_length, factors.depth - done);
    tile.accumulate = factors.accumulate || done > 0;
    for (int64_t column = 0; column < columns;) {
      const int64_t vectors = std::min<int64_t>(2, (columns - column) / kLanes);
      tile.b = factors.b + done * factors.b_stride + column;
      // Tiles of nearly equal height: a short last one would leave the multipliers half idle.
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = rows * i / tiles;
        const int64_t height = rows * (i + 1) / tiles - first;
        tile.a = factors.a + (kByColumns ? done * factors.a_stride + first : first * factors.a_stride + done);
        tile.c = factors.c + first * factors.c_stride + column;
        (vectors == 2 ? tile_function<Math, kByColumns, 2>(height, kHeights)
                      : tile_function<Math, kByColumns, 1>(height, kHeights))(tile);
      }
      column += vectors * kLanes;
    }
  }
}

#if SPARSE_HEADS_HAVE_AVX512
template void multiply<Avx512, false>(const Factors<float>&, int64_t, int64_t);
template void multiply<Avx512, true>(const Factors<float>&, int64_t, int64_t);
template void multiply<Avx2, false>(const Factors<float>&, int64_t, int64_t);
template void multiply<Avx2, true>(const Factors<float>&, int64_t, int64_t);
#endif
template void multiply<Baseline<float>, false>(const Factors<float>&, int64_t, int64_t);
template void multiply<Baseline<float>, true>(const Factors<float>&, int64_t, int64_t);
template void multiply<Baseline<double>, false>(const Factors<double>&, int64_t, int64_t);
template void multiply<Baseline<double>, true>(const Factors<double>&, int64_t, int64_t);

}  // namespace sparse_heads::cpu
