// Many tokens: inputs packed once per block, weight rows read in place, each output written once per column block.
#include "cpu/panel_kernel.h"

#if SPARSE_HEADS_HAVE_AVX512

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace sparse_heads::cpu {
namespace {

struct RowTile {
  const RowRun* run;
  int64_t first_row;
  int64_t rows;

  const float* weights() const { return run->weight + first_row * run->weight_stride; }
};

int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Each run is split into tiles of nearly equal height: a short last tile would leave the FMA units half idle.
std::vector<RowTile> split_rows(const std::vector<RowRun>& runs, int64_t most) {
  std::vector<RowTile> tiles;
  for (const RowRun& run : runs) {
    const int64_t count = ceil_divide(run.rows, most);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = run.rows * i / count;
      tiles.push_back({&run, first, run.rows * (i + 1) / count - first});
    }
  }
  return tiles;
}

// Blocks of at most kBlockColumns columns, as even as runs of whole vectors allow; at least one, so bias is written.
std::vector<std::vector<ColumnRun>> split_columns(const Projection& projection) {
  const int64_t total = projection.columns();
  const int64_t count = std::max<int64_t>(1, ceil_divide(total, PanelTraits::kBlockColumns));
  const int64_t limit = ceil_divide(ceil_divide(total, count), kLanes) * kLanes;
  std::vector<std::vector<ColumnRun>> blocks(1);
  int64_t room = limit;
  for (ColumnRun run : projection.column_runs) {
    while (run.columns > 0) {
      if (room == 0) {
        blocks.emplace_back();
        room = limit;
      }
      const int64_t taken = std::min({run.columns, room, PanelTraits::kSumColumns});
      blocks.back().push_back({run.input_column, run.weight_column, taken});
      run = {run.input_column + taken, run.weight_column + taken, run.columns - taken};
      room -= taken;
    }
  }
  return blocks;
}

// Whole panels per block, as many blocks as threads when there are tokens enough, else few: packing is repeated
// by each thread that works on a block.
int64_t block_tokens(int64_t tokens, int64_t panel_tokens) {
  const int64_t panels = ceil_divide(tokens, panel_tokens);
  const int64_t threads = torch::stable::get_num_threads();
  int64_t blocks = ceil_divide(tokens, PanelTraits::kBlockTokens);
  blocks = std::min(panels, ceil_divide(blocks, threads) * threads);
  return ceil_divide(panels, blocks) * panel_tokens;
}

// Memory for packed inputs, kept by each thread between calls: it is small and wanted at every call.
float* scratch(int64_t size) {
  struct alignas(64) Line {
    float lanes[kLanes];
  };
  thread_local std::vector<Line> memory;
  const size_t lines = ceil_divide(size, kLanes);
  if (memory.size() < lines) memory.resize(lines);
  return reinterpret_cast<float*>(memory.data());
}

// One block of tokens, packed as panels of 32 tokens or 16.
template <int Vectors>
class PackedBlock {
 public:
  PackedBlock(const Projection& projection, const std::vector<ColumnRun>& column_runs, int64_t columns)
      : projection_(projection), column_runs_(column_runs), columns_(columns) {}

  void pack(int64_t first_token, int64_t tokens) {
    first_token_ = first_token;
    tokens_ = tokens;
    packed_ = scratch(ceil_divide(tokens, kTokens) * kTokens * std::max<int64_t>(1, columns_));
    for (int64_t token = 0; token < tokens; token += kTokens) {
      const float* input = projection_.input + (first_token + token) * projection_.input_stride;
      pack_panel<Vectors>(input, projection_.input_stride, tokens - token, column_runs_, packed_ + token * columns_);
    }
  }

  void multiply(const RowTile& tile, const RowTile& next, bool accumulate) const {
    const PanelFunction multiply_tile = panel_function<Vectors>(tile.rows);
    for (int64_t token = 0; token < tokens_; token += kTokens) {
      // Only the last pass over a tile looks ahead: the passes before it find their own rows in the cache.
      const RowTile& upcoming = token + kTokens >= tokens_ ? next : tile;
      multiply_tile(
          column_runs_,
          {packed_ + token * columns_, tile.run, tile.first_row, upcoming.weights(), upcoming.run->weight_stride,
           upcoming.rows, first_token_ + token, tokens_ - token, accumulate});
    }
  }

 private:
  static constexpr int64_t kTokens = Vectors * kLanes;

  const Projection& projection_;
  const std::vector<ColumnRun>& column_runs_;
  const int64_t columns_;
  float* packed_ = nullptr;
  int64_t first_token_ = 0;
  int64_t tokens_ = 0;
};

template <int Vectors>
void project_by_panels_of(const Projection& projection) {
  const std::vector<RowTile> tiles = split_rows(projection.row_runs, PanelTraits::rows(Vectors));
  const int64_t tile_count = static_cast<int64_t>(tiles.size());
  const int64_t tokens_per_block = block_tokens(projection.tokens, Vectors * kLanes);
  const int64_t blocks = ceil_divide(projection.tokens, tokens_per_block);
  bool accumulate = false;
  for (const std::vector<ColumnRun>& column_runs : split_columns(projection)) {
    int64_t columns = 0;
    for (const ColumnRun& run : column_runs) columns += run.columns;
    const int64_t products = std::max<int64_t>(1, tokens_per_block * PanelTraits::rows(Vectors) * columns);
    const int64_t grain = std::max<int64_t>(1, PanelTraits::kProductsPerThread / products);
    // Items are (block, tile), tiles fastest: every thread gets the same share, and packs only the blocks it meets.
    torch::stable::parallel_for(0, blocks * tile_count, grain, [&](int64_t begin, int64_t end) {
      PackedBlock<Vectors> block(projection, column_runs, columns);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first_token = item / tile_count * tokens_per_block;
        if (item == begin || item % tile_count == 0) {
          block.pack(first_token, std::min(tokens_per_block, projection.tokens - first_token));
        }
        block.multiply(tiles[item % tile_count], tiles[std::min(item + 1, end - 1) % tile_count], accumulate);
      }
    });
    accumulate = true;
  }
}

}  // namespace

void project_by_panels(const Projection& projection) {
  const bool half_empty = ceil_divide(projection.tokens, kLanes) % 2 == 1;
  if (projection.columns() < PanelTraits::kMinColumnsOfHighTile ||
      (half_empty && projection.tokens < PanelTraits::kManyTokens)) {
    project_by_panels_of<1>(projection);
  } else {
    project_by_panels_of<2>(projection);
  }
}

}  // namespace sparse_heads::cpu

#endif
