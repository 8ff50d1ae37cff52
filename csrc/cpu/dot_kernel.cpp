// Few tokens: dot products along the columns, weight rows read in place, once a few tokens. Bound by their bytes.
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
  // About 16 rows an item, in whole groups: as many as a cache holds while several passes read them.
  static constexpr int64_t kMinItemRows = 15;
  static constexpr int64_t item_rows(int tokens) { return kLanes / rows(tokens) * rows(tokens); }
};
static_assert(DotTraits::kMaxTokens <= kLanes, "a group holds at least one row");
static_assert(kLanes + DotTraits::kMaxTokens + 1 <= 32, "accumulators, inputs and one weight fit the registers");

// A few tokens times a few rows of one run: what stays in L1 while it is worked on.
struct DotItem {
  const Job* job;
  const Token* tokens;
  int64_t token_count;
  const RowRun* run;
  int64_t first_row;
  int64_t rows;
};

struct RowGroup {
  const RowRun* run;
  int64_t first;
  int64_t rows;

  const float* weights() const { return run->weight + first * run->weight_stride; }
};

// How far the rows of `next` lie from those of `group`, to prefetch them; 0 where one distance does not fit them all.
inline int64_t distance(const RowGroup& group, const RowGroup& next, int64_t rows) {
  const bool alike = next.rows == rows && next.run->weight_stride == group.run->weight_stride;
  return alike ? next.weights() - group.weights() : 0;
}

template <int Tokens>
SPARSE_HEADS_AVX512 void dot_group(
    const float* input, const DotItem& item, const RowGroup& group, const RowGroup& next) {
  constexpr int kRows = DotTraits::rows(Tokens);
  const RowRun& run = *group.run;
  const float* weights[kRows];
  // A short group repeats its last row: its results are dropped, and no row outside the run is read.
  for (int i = 0; i < kRows; ++i) {
    weights[i] = group.weights() + std::min<int64_t>(i, group.rows - 1) * run.weight_stride;
  }
  const int64_t upcoming = distance(group, next, kRows);
  const float* tokens[Tokens];
  for (int t = 0; t < Tokens; ++t) tokens[t] = input + item.tokens[t].input;

  __m512 sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = _mm512_setzero_ps();
  for (const ColumnRun& columns : item.job->column_runs) {
    const float* inputs[Tokens];
    for (int t = 0; t < Tokens; ++t) inputs[t] = tokens[t] + columns.input_column;
    const float* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = weights[i] + columns.weight_column;
    for (int64_t c = 0; c < columns.columns; c += kLanes) {
      const __mmask16 mask = first_lanes(columns.columns - c);
      __m512 lanes[Tokens];
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) lanes[t] = _mm512_maskz_loadu_ps(mask, inputs[t] + c);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const __m512 weight = _mm512_maskz_loadu_ps(mask, rows[i] + c);
        _mm_prefetch(rows[i] + c + upcoming, _MM_HINT_T1);
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t) {
          sums[t * kRows + i] = _mm512_fmadd_ps(weight, lanes[t], sums[t * kRows + i]);
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
    float* output = run.output + item.tokens[t].output * run.output_stride + group.first;
    _mm512_mask_storeu_ps(output, mask, _mm512_add_ps(token, bias));
  }
}

template <int Tokens>
void dot_item(const float* input, const DotItem& item, const DotItem& next) {
  constexpr int64_t kRows = DotTraits::rows(Tokens);
  const int64_t end = item.first_row + item.rows;
  RowGroup group{item.run, item.first_row, std::min(kRows, item.rows)};
  while (group.first < end) {
    const int64_t after = group.first + kRows;
    const RowGroup upcoming = after < end ? RowGroup{item.run, after, std::min(kRows, end - after)}
                                          : RowGroup{next.run, next.first_row, std::min(kRows, next.rows)};
    dot_group<Tokens>(input, item, group, upcoming);
    group = {item.run, after, upcoming.rows};
  }
}

using DotFunction = void (*)(const float*, const DotItem&, const DotItem&);

template <int... Index>
constexpr std::array<DotFunction, sizeof...(Index)> dot_functions(std::integer_sequence<int, Index...>) {
  return {&dot_item<Index + 1>...};
}

constexpr auto kDotFunctions = dot_functions(std::make_integer_sequence<int, DotTraits::kMaxTokens>());

// One chunk of a job's tokens over all the job's rows.
struct Pass {
  const Job* job;
  int64_t first_token;
  int64_t tokens;
  size_t run;
  int64_t row;

  bool done() const { return run == job->row_runs.size(); }

  DotItem next_item() {
    const RowRun& rows = job->row_runs[run];
    const int64_t count = std::min(DotTraits::item_rows(static_cast<int>(tokens)), rows.rows - row);
    const DotItem item{job, job->tokens.data() + first_token, tokens, &rows, row, count};
    row += count;
    if (row == rows.rows) {
      ++run;
      row = 0;
    }
    return item;
  }
};

// Rows first, so that all passes that read a row find it in a cache.
std::vector<DotItem> split(const Projection& projection) {
  std::vector<Pass> passes;
  int64_t rows = 0;
  for (const Job& job : projection.jobs) {
    if (job.row_runs.empty()) continue;
    const int64_t tokens = static_cast<int64_t>(job.tokens.size());
    const int64_t count = ceil_divide(tokens, DotTraits::kMaxTokens);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = tokens * i / count;
      passes.push_back({&job, first, tokens * (i + 1) / count - first, 0, 0});
      rows += job.rows();
    }
  }
  std::vector<DotItem> items;
  items.reserve(rows / DotTraits::kMinItemRows + passes.size());
  for (bool more = !passes.empty(); more;) {
    more = false;
    for (Pass& pass : passes) {
      if (!pass.done()) items.push_back(pass.next_item());
      more = more || !pass.done();
    }
  }
  return items;
}

}  // namespace

void project_by_dots(const Projection& projection) {
  const std::vector<DotItem> items = split(projection);
  const int64_t count = static_cast<int64_t>(items.size());
  if (count == 0) return projection.write_zeros(0, 1, 1);
  int64_t weights = 0;
  for (const DotItem& item : items) weights += item.rows * item.job->columns();
  const int64_t grain = std::max<int64_t>(1, DotTraits::kWeightsPerThread * count / std::max<int64_t>(1, weights));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    projection.write_zeros(begin, end, count);
    for (int64_t i = begin; i < end; ++i) {
      kDotFunctions[items[i].token_count - 1](projection.input, items[i], items[std::min(i + 1, end - 1)]);
    }
  });
}

}  // namespace sparse_heads::cpu

#endif
