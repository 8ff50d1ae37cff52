// See statistics_kernel.h.
#include "cpu/statistics_kernel.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/statistics_rows.h"

namespace sparse_heads::cpu {
namespace {

// Parts that the queries of a head are cut into at most: their sums are added up in the end.
constexpr int64_t kParts = 8;

// Every `step`-th block of a group from `first` to before `last`: all that a part of a head has, or of the whole group.
// Blocks of a part are apart so that all parts have as many keys to see.
struct StatisticsUnit {
  const HeadGroup* group;
  int64_t first, last, step;
  int64_t part;
};

template <class Scalar>
std::vector<StatisticsUnit> cut_into_units(const Attention<Scalar>& attention, const HeadGroups& groups) {
  std::vector<StatisticsUnit> units;
  for (const HeadGroup& group : groups.get()) {
    const int64_t blocks = Blocks<Scalar>(attention, group).count();
    if (attention.queries < kVectorLanes<Scalar>) {
      units.push_back({&group, 0, blocks, 1, 0});
      continue;
    }
    const int64_t per_head = blocks / group.count;
    const int64_t parts = std::min(kParts, per_head);
    for (int64_t head = 0; head < group.count; ++head) {
      for (int64_t part = 0; part < parts; ++part) {
        units.push_back({&group, head * per_head + part, (head + 1) * per_head, parts, part});
      }
    }
  }
  return units;
}

template <class Scalar>
struct StatisticsBuffers {
  Buffer<Scalar> query[kUnitBlocks], masses[kUnitBlocks], scores, memory, key;
};

// Up to kUnitBlocks blocks that share copies of keys. `sums`: [requests, heads, kParts, columns].
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void measure_blocks(
    const Statistics<Scalar>& statistics, const StatisticsUnit& unit, int64_t first_block, double* sums) {
  thread_local StatisticsBuffers<Scalar> buffers;
  constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;
  const Attention<Scalar>& attention = statistics.attention;
  const Blocks<Scalar> blocks(attention, *unit.group);
  StatisticsState<Scalar> states[kUnitBlocks];
  int64_t count = 0;
  int64_t first_key = attention.keys;
  int64_t last_key = 0;
  for (int64_t i = 0; i < kUnitBlocks && first_block + i * unit.step < unit.last; ++i) {
    StatisticsState<Scalar>& state = states[count];
    state.block = blocks.get(first_block + i * unit.step);
    const Block<Scalar>& block = state.block;
    const bool needed = std::any_of(block.position, block.position + block.count, [&](int64_t position) {
      return counts(statistics.query_mask, block.request, position);
    });
    if (!needed) continue;
    state.query = buffers.query[count].get(attention.head_dim * kMaxLanes);
    state.masses = buffers.masses[count].get(statistics.groups * 2 * kMaxLanes);
    state.start(statistics.groups);
    pack_queries<Math>(attention.query, block, attention.head_dim, attention.scale, state.query);
    first_key = std::min(first_key, block.begin);
    last_key = std::max(last_key, block.end);
    ++count;
  }
  Scalar* scores = buffers.scores.get(kPieceKeys * kMaxLanes);
  Scalar* memory = attention.attn_mask.data ? buffers.memory.get(kPieceKeys * kMaxLanes) : nullptr;
  for (int64_t begin = first_key, end; begin < last_key; begin = end) {
    end = std::min((begin / kPieceKeys + 1) * kPieceKeys, last_key);
    const KeyRows<Scalar> keys = read_rows<Math>(
        attention.key, unit.group->request, unit.group->kv_head, begin, end, attention.head_dim, buffers.key);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block_begin = std::max(begin, states[i].block.begin);
      const int64_t block_end = std::min(end, states[i].block.end);
      if (block_begin >= block_end) continue;
      measure_piece<Math>(statistics, states[i], keys, block_begin, block_end, scores, memory);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const Block<Scalar>& block = states[i].block;
    double* rows[kMaxLanes];
    for (int64_t lane = 0; lane < block.count; ++lane) {
      const int64_t pair = block.request * attention.heads + block.head[lane];
      rows[lane] = sums + (pair * kParts + unit.part) * statistics.columns();
    }
    finish_statistics(statistics, states[i], rows);
  }
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_statistics_unit(
    const Statistics<Scalar>& statistics, const StatisticsUnit& unit, double* sums) {
  for (int64_t block = unit.first; block < unit.last; block += kUnitBlocks * unit.step) {
    measure_blocks<Math>(statistics, unit, block, sums);
  }
}

#if SPARSE_HEADS_HAVE_AVX512
SPARSE_HEADS_AVX512 void run_unit_on_avx512(
    const Statistics<float>& statistics, const StatisticsUnit& unit, double* sums) {
  run_statistics_unit<Avx512>(statistics, unit, sums);
}

SPARSE_HEADS_AVX2 void run_unit_on_avx2(
    const Statistics<float>& statistics, const StatisticsUnit& unit, double* sums) {
  run_statistics_unit<Avx2>(statistics, unit, sums);
}
#endif

template <class Scalar>
void run_unit(const Statistics<Scalar>& statistics, const StatisticsUnit& unit, double* sums) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Scalar, float>) {
    if (has_avx512()) return run_unit_on_avx512(statistics, unit, sums);
    if (has_avx2()) return run_unit_on_avx2(statistics, unit, sums);
  }
#endif
  run_statistics_unit<Baseline<Scalar>>(statistics, unit, sums);
}

}  // namespace

template <class Scalar>
void measure(const Statistics<Scalar>& statistics) {
  const Attention<Scalar>& attention = statistics.attention;
  const HeadGroups groups(attention);
  const std::vector<StatisticsUnit> units = cut_into_units(attention, groups);
  const int64_t pairs = attention.requests * attention.heads;
  const int64_t columns = statistics.columns();
  std::vector<double> sums(pairs * kParts * columns);
  const double products = static_cast<double>(groups.pairs() * attention.queries) *
      static_cast<double>(attention.keys * attention.head_dim);
  run_items(static_cast<int64_t>(units.size()), products, [&](int64_t item) {
    run_unit(statistics, units[item], sums.data());
  });
  for (int64_t row = 0; row < pairs * kParts; ++row) {
    double* total = statistics.sums + row / kParts * columns;
    for (int64_t column = 0; column < columns; ++column) total[column] += sums[row * columns + column];
  }
}

template void measure(const Statistics<float>&);
template void measure(const Statistics<double>&);

}  // namespace sparse_heads::cpu
