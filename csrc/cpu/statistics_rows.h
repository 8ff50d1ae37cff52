// Statistics of one block of queries, every lane for itself: keys pass in pieces, and the sums are carried along.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/attention_blocks.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_lanes.h"
#include "cpu/attention_product.h"
#include "cpu/attention_scores.h"
#include "statistics_params.h"

namespace sparse_heads::cpu {

// Positions whose probability is asked for: the previous, the own and the next.
constexpr int kNearPositions = 3;

// With e = exp(score - largest) for the keys seen so far, per lane. Probabilities are e / sum, so that the largest is
// 1 / sum, the norm sqrt(squares) / sum, and the entropy log(sum) - weighted / sum.
template <class Scalar>
struct StatisticsState {
  static constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;

  Block<Scalar> block;
  Scalar* query;   // [head_dim, lanes], scaled
  Scalar* masses;  // [groups, 2, lanes]: sums of e, and what rounding took from them
  alignas(64) Scalar largest[kMaxLanes];
  alignas(64) Scalar sum[kMaxLanes];       // of e
  alignas(64) Scalar squares[kMaxLanes];   // of e * e
  alignas(64) Scalar weighted[kMaxLanes];  // of e * (score - largest)
  alignas(64) Integer<Scalar> visible[kMaxLanes];
  alignas(64) Scalar near[kNearPositions][kMaxLanes];  // scores, in the end e

  void start(int64_t groups) {
    std::fill_n(largest, kMaxLanes, -kInfinity<Scalar>);
    std::fill_n(sum, kMaxLanes, Scalar(0));
    std::fill_n(squares, kMaxLanes, Scalar(0));
    std::fill_n(weighted, kMaxLanes, Scalar(0));
    std::fill_n(visible, kMaxLanes, Integer<Scalar>(0));
    for (Scalar* scores : near) std::fill_n(scores, kMaxLanes, -kInfinity<Scalar>);
    std::fill_n(masses, groups * 2 * kMaxLanes, Scalar(0));
  }
};

template <class Scalar>
SPARSE_HEADS_INLINE void hide_from(Scalar hidden, Scalar* scores, int64_t size) {
  for (int64_t i = 0; i < size; i += kVectorLanes<Scalar>) {
    Vector<Scalar> x;
    load(x, scores + i);
    x = x <= hidden ? Vector<Scalar>{} - kInfinity<Scalar> : x;
    store(scores + i, x);
  }
}

template <class Scalar>
SPARSE_HEADS_INLINE void keep_near_scores(
    const Attention<Scalar>& attention, int64_t first_key, int64_t keys, const Scalar* scores,
    StatisticsState<Scalar>& state) {
  const int64_t lanes = state.block.lanes();
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t previous = attention.keys - attention.queries + state.block.position[lane] - 1 - first_key;
    for (int64_t i = 0; i < kNearPositions; ++i) {
      const int64_t key = previous + i;
      if (key >= 0 && key < keys) state.near[i][lane] = scores[key * lanes + lane];
    }
  }
}

// Takes in the scores of more keys; they become e, and `shrinking` gets the factor by which earlier ones shrink.
template <class Scalar>
SPARSE_HEADS_INLINE void update_sums(Scalar* scores, int64_t keys, StatisticsState<Scalar>& state, Scalar* shrinking) {
  const int64_t lanes = state.block.lanes();
  for (int64_t lane = 0; lane < lanes; lane += kVectorLanes<Scalar>) {
    Vector<Scalar> before, sum, squares, weighted, x, e;
    Integers<Scalar> visible;
    load(before, state.largest + lane);
    load(visible, state.visible + lane);
    Vector<Scalar> top = before;
    for (int64_t key = 0; key < keys; ++key) {
      load(x, scores + key * lanes + lane);
      top = x > top ? x : top;
      visible -= x != -kInfinity<Scalar>;
    }
    store(state.largest + lane, top);
    store(state.visible + lane, visible);
    make_finite<Scalar>(top);
    before = before == -kInfinity<Scalar> ? top : before;
    const Vector<Scalar> lift = before - top;
    Vector<Scalar> shrink = lift;
    exponentiate(shrink);
    store(shrinking + lane, shrink);
    load(sum, state.sum + lane);
    load(squares, state.squares + lane);
    load(weighted, state.weighted + lane);
    weighted = (weighted + sum * lift) * shrink;
    squares *= shrink * shrink;
    sum *= shrink;
    Vector<Scalar> lost = {}, lost_squares = {}, lost_weighted = {};
    for (int64_t begin = 0; begin < keys; begin += kPlainSumLength) {
      Vector<Scalar> part = {}, part_squares = {}, part_weighted = {};
      for (int64_t key = begin; key < std::min(begin + kPlainSumLength, keys); ++key) {
        load(x, scores + key * lanes + lane);
        x -= top;
        e = x;
        exponentiate(e);
        part += e;
        part_squares += e * e;
        // 0 times -infinity would be NaN.
        x = x == -kInfinity<Scalar> ? Vector<Scalar>{} : x;
        part_weighted += e * x;
        store(scores + key * lanes + lane, e);
      }
      add_with_care<Scalar>(sum, lost, part);
      add_with_care<Scalar>(squares, lost_squares, part_squares);
      add_with_care<Scalar>(weighted, lost_weighted, part_weighted);
    }
    store(state.sum + lane, sum);
    store(state.squares + lane, squares);
    store(state.weighted + lane, weighted);
  }
}

template <class Scalar>
SPARSE_HEADS_INLINE void update_masses(
    const Statistics<Scalar>& statistics, int64_t first_key, int64_t keys, const Scalar* e, const Scalar* shrinking,
    StatisticsState<Scalar>& state) {
  const int64_t lanes = state.block.lanes();
  if (std::any_of(shrinking, shrinking + lanes, [](Scalar factor) { return factor != 1; })) {
    multiply_lanes(state.masses, 2 * statistics.groups, shrinking, lanes);
  }
  for (int64_t key = 0; key < keys; ++key) {
    const int64_t group = statistics.key_groups.at(state.block.request, first_key + key);
    if (group < 0 || group >= statistics.groups) continue;
    Scalar* mass = state.masses + group * 2 * lanes;
    for (int64_t lane = 0; lane < lanes; lane += kVectorLanes<Scalar>) {
      Vector<Scalar> total, lost, part;
      load(total, mass + lane);
      load(lost, mass + lanes + lane);
      load(part, e + key * lanes + lane);
      add_with_care<Scalar>(total, lost, part);
      store(mass + lane, total);
      store(mass + lanes + lane, lost);
    }
  }
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void measure_piece(
    const Statistics<Scalar>& statistics, StatisticsState<Scalar>& state, const KeyRows<Scalar>& keys, int64_t begin,
    int64_t end, Scalar* scores, Scalar* memory) {
  const Attention<Scalar>& attention = statistics.attention;
  const int64_t lanes = state.block.lanes();
  const int64_t count = end - begin;
  multiply<Math, false>(
      {keys.at(begin), keys.stride, state.query, lanes, scores, lanes, attention.head_dim, false}, count, lanes);
  finish_scores<Math>(attention, state.block, begin, count, scores, static_cast<Scalar*>(nullptr), memory);
  if (statistics.hidden > -kInfinity<Scalar>) hide_from(statistics.hidden, scores, count * lanes);
  keep_near_scores(attention, begin, count, scores, state);
  alignas(64) Scalar shrinking[Block<Scalar>::kMaxLanes];
  update_sums(scores, count, state, shrinking);
  if (statistics.groups > 0) update_masses(statistics, begin, count, scores, shrinking, state);
}

inline bool counts(const Array2<const bool>& query_mask, int64_t request, int64_t position) {
  return !query_mask.data || query_mask.at(request, position);
}

// Adds the statistics of each query that counts to its own one of `sums`.
template <class Scalar>
SPARSE_HEADS_INLINE void finish_statistics(
    const Statistics<Scalar>& statistics, StatisticsState<Scalar>& state, double* const* sums) {
  const int64_t lanes = state.block.lanes();
  for (int i = 0; i < kNearPositions; ++i) {
    for (int64_t lane = 0; lane < lanes; lane += kVectorLanes<Scalar>) {
      Vector<Scalar> top, x;
      load(top, state.largest + lane);
      make_finite<Scalar>(top);
      load(x, state.near[i] + lane);
      x -= top;
      exponentiate(x);
      store(state.near[i] + lane, x);
    }
  }
  for (int64_t lane = 0; lane < state.block.count; ++lane) {
    const bool asked = counts(statistics.query_mask, state.block.request, state.block.position[lane]);
    if (!asked || state.visible[lane] < 2) continue;
    double* row = sums[lane];
    const double visible = state.visible[lane];
    const double root = std::sqrt(visible);
    const double sum = state.sum[lane];
    row[kCount] += 1;
    row[kEntropy] += (std::log(sum) - state.weighted[lane] / sum) / std::log(visible);
    row[kSparsity] += (root - sum / std::sqrt(static_cast<double>(state.squares[lane]))) / (root - 1);
    row[kConfidence] += 1 / sum;
    for (int i = 0; i < kNearPositions; ++i) row[kPrevious + i] += state.near[i][lane] / sum;
    for (int64_t group = 0; group < statistics.groups; ++group) {
      row[kGroups + group] += state.masses[group * 2 * lanes + lane] / sum;
    }
  }
}

}  // namespace sparse_heads::cpu
