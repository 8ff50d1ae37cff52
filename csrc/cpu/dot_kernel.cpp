// Few tokens: dot products along the columns, weight rows read once and in place. Bound by the weights' bytes.
#include "cpu/avx512.h"
#include "cpu/kernels.h"

#if SPARSE_HEADS_HAVE_AVX512

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace sparse_heads::cpu {
namespace {

struct DotTraits {
  static constexpr int kMaxTokens = kMaxDotTokens;
  // A thread is woken only for this many weights: below, waking costs more than it saves.
  static constexpr int64_t kWeightsPerThread = 48 * 1024;

  // One accumulator per (token, row): 16 of them are summed at once into one vector of results.
  static constexpr int rows(int tokens) { return kLanes / tokens; }
};
static_assert(DotTraits::kMaxTokens <= kLanes, "a group holds at least one row");
static_assert(kLanes + DotTraits::kMaxTokens + 1 <= 32, "accumulators, inputs and one weight fit the registers");

struct RowGroup {
  const RowRun* run;
  int64_t first;
  int64_t rows;
};

template <int Tokens>
SPARSE_HEADS_AVX512 void dot_group(const Projection& projection, const RowGroup& group, const RowGroup& next) {
  constexpr int kRows = DotTraits::rows(Tokens);
  const RowRun& run = *group.run;
  const float* weights[kRows];
  const float* upcoming[kRows];
  // A short group repeats its last row: its results are dropped, and no row outside the run is read.
  for (int i = 0; i < kRows; ++i) {
    weights[i] = run.weight + (group.first + std::min<int64_t>(i, group.rows - 1)) * run.weight_stride;
    upcoming[i] = next.run->weight + (next.first + std::min<int64_t>(i, next.rows - 1)) * next.run->weight_stride;
  }

  __m512 sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = _mm512_setzero_ps();
  for (const ColumnRun& columns : projection.column_runs) {
    const float* input = projection.input + columns.input_column;
    for (int64_t c = 0; c < columns.columns; c += kLanes) {
      const __mmask16 mask = first_lanes(columns.columns - c);
      __m512 inputs[Tokens];
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        inputs[t] = _mm512_maskz_loadu_ps(mask, input + t * projection.input_stride + c);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const int64_t column = columns.weight_column + c;
        const __m512 weight = _mm512_maskz_loadu_ps(mask, weights[i] + column);
        _mm_prefetch(upcoming[i] + column, _MM_HINT_T1);
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t) {
          sums[t * kRows + i] = _mm512_fmadd_ps(weight, inputs[t], sums[t * kRows + i]);
        }
      }
    }
  }

  alignas(64) float results[kLanes];
  _mm512_store_ps(results, sum_each16(sums));
  const __mmask16 mask = first_lanes(group.rows);
  const __m512 bias = run.bias ? _mm512_maskz_loadu_ps(mask, run.bias + group.first) : _mm512_setzero_ps();
  for (int t = 0; t < Tokens; ++t) {
    const __m512 token = _mm512_maskz_loadu_ps(mask, results + t * kRows);
    _mm512_mask_storeu_ps(run.output + t * run.output_stride + group.first, mask, _mm512_add_ps(token, bias));
  }
}

using DotFunction = void (*)(const Projection&, const RowGroup&, const RowGroup&);

template <int... Index>
constexpr std::array<DotFunction, sizeof...(Index)> dot_functions(std::integer_sequence<int, Index...>) {
  return {&dot_group<Index + 1>...};
}

constexpr auto kDotFunctions = dot_functions(std::make_integer_sequence<int, DotTraits::kMaxTokens>());

}  // namespace

void project_by_dots(const Projection& projection) {
  const int64_t group_rows = DotTraits::rows(static_cast<int>(projection.tokens));
  std::vector<RowGroup> groups;
  groups.reserve(projection.rows() / group_rows + projection.row_runs.size());
  for (const RowRun& run : projection.row_runs) {
    for (int64_t first = 0; first < run.rows; first += group_rows) {
      groups.push_back({&run, first, std::min(group_rows, run.rows - first)});
    }
  }
  const DotFunction dot = kDotFunctions[projection.tokens - 1];
  const int64_t weights_per_group = std::max<int64_t>(1, group_rows * projection.columns());
  const int64_t grain = std::max<int64_t>(1, DotTraits::kWeightsPerThread / weights_per_group);
  torch::stable::parallel_for(0, static_cast<int64_t>(groups.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dot(projection, groups[i], groups[std::min(i + 1, end - 1)]);
  });
}

}  // namespace sparse_heads::cpu

#endif
