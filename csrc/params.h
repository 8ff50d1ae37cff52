// What a projection kernel is asked to do, without torch: shared by the kernels and their launchers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sparse_heads {

// Where a token's input begins, in floats from the first token's, and which row of the outputs it gives.
struct Token {
  int64_t input;
  int64_t output;
};

// Neighbouring rows of one weight that are all kept; row r gives column r of `output`.
struct RowRun {
  const float* weight;
  int64_t weight_stride;
  const float* bias;  // null when the projection has none
  float* output;
  int64_t output_stride;
  int64_t rows;
};

// Neighbouring columns that are all kept, in the input and in the weight.
struct ColumnRun {
  int64_t input_column;
  int64_t weight_column;
  int64_t columns;
};

// Tokens that keep the same rows and columns:
// output[t][r] = bias[r] + sum over column runs and their columns c of input[t][c] * weight[r][c].
struct Job {
  std::vector<Token> tokens;
  std::vector<RowRun> row_runs;
  std::vector<ColumnRun> column_runs;

  int64_t rows() const {
    int64_t total = 0;
    for (const RowRun& run : row_runs) total += run.rows;
    return total;
  }

  int64_t columns() const {
    int64_t total = 0;
    for (const ColumnRun& run : column_runs) total += run.columns;
    return total;
  }
};

// Neighbouring columns of neighbouring tokens' outputs that no job writes and that must be zeros.
struct ZeroRun {
  float* output;
  int64_t output_stride;
  int64_t tokens;
  int64_t columns;
};

struct Projection {
  const float* input;
  std::vector<Job> jobs;
  std::vector<ZeroRun> zero_runs;

  // The part of the zeros that comes with items [begin, end) of `items`, so that one parallel loop does both.
  void write_zeros(int64_t begin, int64_t end, int64_t items) const {
    const int64_t runs = static_cast<int64_t>(zero_runs.size());
    for (int64_t i = runs * begin / items; i < runs * end / items; ++i) {
      const ZeroRun& run = zero_runs[i];
      for (int64_t t = 0; t < run.tokens; ++t) std::fill_n(run.output + t * run.output_stride, run.columns, 0.0f);
    }
  }
};

inline int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// A run of neighbouring kept heads: their number, the first one's index, and how many kept heads lie before it.
struct HeadRun {
  int64_t first_head;
  int64_t position;
  int64_t heads;
};

}  // namespace sparse_heads
