// The register tile of the panel way: up to 13 weight rows times 32 tokens, or 16 times 16, summed over all columns.
#pragma once

#include "cpu/avx512.h"

#if SPARSE_HEADS_HAVE_AVX512

#include <cstdint>
#include <utility>
#include <vector>

#include "params.h"

namespace sparse_heads::cpu {

struct PanelTraits {
  static constexpr int kMaxVectors = 2;
  static constexpr int64_t kMaxTokens = kMaxVectors * kLanes;
  // The higher tile fills the registers; the square one is stored in whole vectors, and wastes less on few tokens.
  static constexpr int rows(int vectors) { return vectors == 1 ? 16 : 13; }
  // Below, storing weighs more than summing, and the square tile wins at any number of tokens.
  static constexpr int64_t kMinColumnsOfHighTile = 128;
  // 2048 bytes: 16 rows share two sets of an eight-way L1 whose ways are one page.
  static constexpr int64_t kConflictingStride = 512;
  // From here on, half a panel of 32 left empty is too little to matter.
  static constexpr int64_t kManyTokens = 256;
  // Packed inputs of one block stay in a 1 MB L2 beside the weight rows that pass through.
  static constexpr int64_t kBlockTokens = 128;
  static constexpr int64_t kBlockColumns = 768;
  // One running sum takes this many columns (up to twice as many over short runs): longer ones round worse.
  static constexpr int64_t kSumColumns = 256;
  // A thread is woken only for this many multiplications.
  static constexpr int64_t kProductsPerThread = 128 * 1024;
};
static_assert(PanelTraits::rows(2) * 2 + 2 + 1 <= 32 && PanelTraits::rows(1) + 1 + 1 <= 32, "tiles fit the registers");
static_assert(PanelTraits::rows(1) <= kLanes && PanelTraits::rows(2) <= kLanes, "a token's results fit one vector");
static_assert(PanelTraits::kBlockTokens % PanelTraits::kMaxTokens == 0, "a block is whole panels");
static_assert(PanelTraits::kBlockTokens * PanelTraits::kBlockColumns * 4 <= 512 * 1024, "a block fits half of L2");

struct PanelTile {
  const float* packed;    // [columns][vectors][16], the columns of `column_runs` one after another
  const RowRun* run;
  int64_t first_row;
  const float* upcoming;  // weights of the tile that comes next, to prefetch
  int64_t upcoming_stride;
  int64_t upcoming_rows;
  const Token* tokens;
  int64_t token_count;    // at most 16 * vectors
  bool accumulate;        // add to what is stored: this is not the first block of columns
};

template <int Rows, int Vectors>
SPARSE_HEADS_AVX512 void multiply_panel(const std::vector<ColumnRun>& column_runs, const PanelTile& tile) {
  const RowRun& run = *tile.run;
  const int64_t stride = run.weight_stride;
  const float* weights = run.weight + tile.first_row * stride;
  const float* packed = tile.packed;

  __m512 sums[Rows][Vectors];
  alignas(64) float earlier[Rows][Vectors][kLanes];  // finished running sums
  // Rows a power of two apart push each other out of L1 before a line is used up: those are copied line by line.
  const bool conflicting = stride % PanelTraits::kConflictingStride == 0;
  alignas(64) float block[Rows][kLanes];
  bool has_earlier = false;
  int64_t summed = 0;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_setzero_ps();
  }
  for (const ColumnRun& columns : column_runs) {
    if (summed >= PanelTraits::kSumColumns) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          if (has_earlier) sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_load_ps(earlier[i][v]));
          _mm512_store_ps(earlier[i][v], sums[i][v]);
          sums[i][v] = _mm512_setzero_ps();
        }
      }
      has_earlier = true;
      summed = 0;
    }
    summed += columns.columns;
    const float* row = weights + columns.weight_column;
    const float* upcoming = tile.upcoming + columns.weight_column;
    for (int64_t line = 0; line < columns.columns; line += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const int64_t next = i < tile.upcoming_rows ? i : tile.upcoming_rows - 1;
        _mm_prefetch(upcoming + line + next * tile.upcoming_stride, _MM_HINT_T1);
      }
      const int64_t width = columns.columns - line < kLanes ? columns.columns - line : kLanes;
      const __mmask16 mask = first_lanes(width);
      const float* source = row + line;
      int64_t source_stride = stride;
      if (conflicting) {
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) _mm512_store_ps(block[i], _mm512_maskz_loadu_ps(mask, source + i * stride));
        source = block[0];
        source_stride = kLanes;
      }
      const float* lower = source + Rows / 2 * source_stride;
      for (int64_t c = 0; c < width; ++c) {
        __m512 inputs[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) inputs[v] = _mm512_load_ps(packed + v * kLanes);
        packed += Vectors * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < Rows; ++i) {
          const __m512 weight = _mm512_set1_ps(i < Rows / 2 ? source[i * source_stride + c] : lower[(i - Rows / 2) * source_stride + c]);
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_fmadd_ps(weight, inputs[v], sums[i][v]);
        }
      }
    }
  }

  if (has_earlier) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_add_ps(sums[i][v], _mm512_load_ps(earlier[i][v]));
    }
  }
  const __mmask16 mask = first_lanes(Rows);
  const bool with_bias = run.bias && !tile.accumulate;
  const __m512 bias = with_bias ? _mm512_maskz_loadu_ps(mask, run.bias + tile.first_row) : _mm512_setzero_ps();
  float* output = run.output + tile.first_row;
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    __m512 results[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) results[i] = i < Rows ? sums[i < Rows ? i : 0][v] : _mm512_setzero_ps();
    transpose16(results);
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) {
      if (v * kLanes + t >= tile.token_count) break;
      float* token = output + tile.tokens[v * kLanes + t].output * run.output_stride;
      const __m512 before = tile.accumulate ? _mm512_maskz_loadu_ps(mask, token) : bias;
      _mm512_mask_storeu_ps(token, mask, _mm512_add_ps(results[t], before));
    }
  }
}

// Packs the inputs of `count` tokens (at most 16 * vectors; missing ones read as zero) into [columns][vectors][16].
template <int Vectors>
SPARSE_HEADS_AVX512 void pack_panel(
    const float* input, const Token* tokens, int64_t count, const std::vector<ColumnRun>& column_runs, float* packed) {
  for (const ColumnRun& columns : column_runs) {
    for (int64_t c = 0; c < columns.columns; c += kLanes) {
      const int64_t width = columns.columns - c < kLanes ? columns.columns - c : kLanes;
      const __mmask16 mask = first_lanes(width);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        __m512 tile[kLanes];
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) {
          const int64_t token = v * kLanes + t;
          tile[t] = token < count
              ? _mm512_maskz_loadu_ps(mask, input + tokens[token].input + columns.input_column + c)
              : _mm512_setzero_ps();
        }
        transpose16(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (i >= width) break;
          _mm512_store_ps(packed + (i * Vectors + v) * kLanes, tile[i]);
        }
      }
      packed += width * Vectors * kLanes;
    }
  }
}

using PanelFunction = void (*)(const std::vector<ColumnRun>&, const PanelTile&);

template <int Vectors, int... Index>
PanelFunction panel_function(int64_t rows, std::integer_sequence<int, Index...>) {
  static constexpr PanelFunction functions[] = {&multiply_panel<Index + 1, Vectors>...};
  return functions[rows - 1];
}

template <int Vectors>
PanelFunction panel_function(int64_t rows) {
  return panel_function<Vectors>(rows, std::make_integer_sequence<int, PanelTraits::rows(Vectors)>());
}

}  // namespace sparse_heads::cpu

#endif
