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

struct ColumnBlock {
  std::vector<ColumnRun> runs;
  int64_t columns = 0;
};

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
std::vector<ColumnBlock> split_columns(const Job& job) {
  const int64_t total = job.columns();
  const int64_t count = std::max<int64_t>(1, ceil_divide(total, PanelTraits::kBlockColumns));
  const int64_t limit = ceil_divide(ceil_divide(total, count), kLanes) * kLanes;
  std::vector<ColumnBlock> blocks(1);
  int64_t room = limit;
  for (ColumnRun run : job.column_runs) {
    while (run.columns > 0) {
      if (room == 0) {
        blocks.emplace_back();
        room = limit;
      }
      const int64_t taken = std::min({run.columns, room, PanelTraits::kSumColumns});
      blocks.back().runs.push_back({run.input_column, run.weight_column, taken});
      blocks.back().columns += taken;
      run = {run.input_column + taken, run.weight_column + taken, run.columns - taken};
      room -= taken;
    }
  }
  return blocks;
}

// Whole panels per block, as many blocks as a job's threads when there are tokens enough, else few: packing is
// repeated by each thread that works on a block.
int64_t block_tokens(int64_t tokens, int64_t panel_tokens, int64_t threads) {
  const int64_t panels = ceil_divide(tokens, panel_tokens);
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

// A job in tiles of rows, blocks of columns and blocks of tokens.
struct Plan {
  const Job* job;
  int vectors;
  std::vector<RowTile> tiles;
  std::vector<ColumnBlock> column_blocks;
  int64_t tokens_per_block;

  int64_t tokens() const { return static_cast<int64_t>(job->tokens.size()); }
  int64_t token_blocks() const { return ceil_divide(tokens(), tokens_per_block); }
};

Plan make_plan(const Job& job, int64_t threads) {
  const int64_t tokens = static_cast<int64_t>(job.tokens.size());
  const bool half_empty = ceil_divide(tokens, kLanes) % 2 == 1;
  const bool low = job.columns() < PanelTraits::kMinColumnsOfHighTile ||
      (half_empty && tokens < PanelTraits::kManyTokens);
  const int vectors = low ? 1 : 2;
  return {
      &job, vectors, split_rows(job.row_runs, PanelTraits::rows(vectors)), split_columns(job),
      block_tokens(tokens, vectors * kLanes, threads)};
}

// Some of a plan's tiles over one of its blocks of tokens, packed as panels of 32 tokens or 16.
template <int Vectors>
void multiply(const float* input, const Plan& plan, int64_t token_block, int64_t first_tile, int64_t end_tile) {
  constexpr int64_t kTokens = Vectors * kLanes;
  const int64_t first_token = token_block * plan.tokens_per_block;
  const Token* tokens = plan.job->tokens.data() + first_token;
  const int64_t count = std::min(plan.tokens_per_block, plan.tokens() - first_token);
  bool accumulate = false;
  for (const ColumnBlock& block : plan.column_blocks) {
    float* packed = scratch(ceil_divide(count, kTokens) * kTokens * std::max<int64_t>(1, block.columns));
    for (int64_t token = 0; token < count; token += kTokens) {
      pack_panel<Vectors>(input, tokens + token, count - token, block.runs, packed + token * block.columns);
    }
    for (int64_t i = first_tile; i < end_tile; ++i) {
      const RowTile& tile = plan.tiles[i];
      const RowTile& next = plan.tiles[std::min(i + 1, end_tile - 1)];
      const PanelFunction multiply_tile = panel_function<Vectors>(tile.rows);
      for (int64_t token = 0; token < count; token += kTokens) {
        // Only the last pass over a tile looks ahead: the passes before it find their own rows in the cache.
        const RowTile& upcoming = token + kTokens >= count ? next : tile;
        multiply_tile(
            block.runs,
            {packed + token * block.columns, tile.run, tile.first_row, upcoming.weights(), upcoming.run->weight_stride,
             upcoming.rows, tokens + token, count - token, accumulate});
      }
    }
    accumulate = true;
  }
}

// One block of a plan's tokens over all its tiles; `cost` counts multiplications, packing as the tile that it equals.
struct Segment {
  const Plan* plan;
  int64_t token_block;
  int64_t cost;
  int64_t cost_before;
};

class Schedule {
 public:
  Schedule(const float* input, const std::vector<Plan>& plans) : input_(input) {
    for (const Plan& plan : plans) {
      const int64_t columns = std::max<int64_t>(1, plan.job->columns());
      const int64_t cost = plan.tokens_per_block * (plan.job->rows() + PanelTraits::rows(plan.vectors)) * columns;
      for (int64_t block = 0; block < plan.token_blocks(); ++block) {
        segments_.push_back({&plan, block, cost, cost_});
        cost_ += cost;
      }
    }
  }

  int64_t cost() const { return cost_; }

  // Parts [begin, end) of `parts` equal ones: neighbouring tiles, so that a thread packs few blocks.
  void run(int64_t begin, int64_t end, int64_t parts) const {
    const Position stop = position(end, parts);
    for (Position at = position(begin, parts); at.segment <= stop.segment; at = {at.segment + 1, 0}) {
      if (at.segment == static_cast<int64_t>(segments_.size())) break;
      const Segment& segment = segments_[at.segment];
      const int64_t tiles = static_cast<int64_t>(segment.plan->tiles.size());
      const int64_t end_tile = at.segment == stop.segment ? stop.tile : tiles;
      if (at.tile >= end_tile) continue;
      if (segment.plan->vectors == 1) {
        multiply<1>(input_, *segment.plan, segment.token_block, at.tile, end_tile);
      } else {
        multiply<2>(input_, *segment.plan, segment.token_block, at.tile, end_tile);
      }
    }
  }

 private:
  struct Position {
    int64_t segment;
    int64_t tile;
  };

  Position position(int64_t part, int64_t parts) const {
    const int64_t cost = cost_ / parts * part + cost_ % parts * part / parts;
    const auto after = std::upper_bound(
        segments_.begin(), segments_.end(), cost,
        [](int64_t wanted, const Segment& segment) { return wanted < segment.cost_before; });
    const int64_t index = after - segments_.begin() - 1;
    const Segment& segment = segments_[index];
    const double share = static_cast<double>(cost - segment.cost_before) / static_cast<double>(segment.cost);
    return {index, static_cast<int64_t>(share * static_cast<double>(segment.plan->tiles.size()) + 0.5)};
  }

  const float* input_;
  std::vector<Segment> segments_;
  int64_t cost_ = 0;
};

}  // namespace

void project_by_panels(const Projection& projection) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t jobs = std::max<int64_t>(1, static_cast<int64_t>(projection.jobs.size()));
  std::vector<Plan> plans;
  plans.reserve(jobs);
  for (const Job& job : projection.jobs) {
    if (job.rows() > 0 && !job.tokens.empty()) plans.push_back(make_plan(job, ceil_divide(threads, jobs)));
  }
  if (plans.empty()) return projection.write_zeros(0, 1, 1);
  const Schedule schedule(projection.input, plans);
  const int64_t parts = std::clamp<int64_t>(schedule.cost() / PanelTraits::kProductsPerThread, 1, threads);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    projection.write_zeros(begin, end, parts);
    schedule.run(begin, end, parts);
  });
}

}  // namespace sparse_heads::cpu

#endif
