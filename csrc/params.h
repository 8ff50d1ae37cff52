// What a projection kernel is asked to do, without torch: shared by the kernels and their launchers.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_heads {

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

// output[t][r] = bias[r] + sum over column runs and their columns c of input[t][c] * weight[r][c].
struct Projection {
  const float* input;
  int64_t input_stride;
  int64_t tokens;
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

// A run of neighbouring kept heads: their number, the first one's index, and how many kept heads lie before it.
struct HeadRun {
  int64_t first_head;
  int64_t position;
  int64_t heads;
};

}  // namespace sparse_heads
