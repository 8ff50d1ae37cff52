// The forward of some blocks of one group: keys pass in pieces, and every block carries its softmax along.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_lanes.h"
#include "cpu/attention_product.h"
#include "cpu/attention_scores.h"

namespace sparse_heads::cpu {

// Keys that pass at once; a product sums over all of them.
constexpr int64_t kPieceKeys = kSumLength;
// Blocks that share the copies of keys and values, where these have to be copied.
constexpr int64_t kUnitBlocks = 4;

struct ForwardUnit {
  const HeadGroup* group;
  int64_t first_block;
  int64_t blocks;
};

template <class Scalar>
struct ForwardBuffers {
  Buffer<Scalar> query[kUnitBlocks], output[kUnitBlocks], scores, memory, key, value;
};

template <class Scalar>
struct ForwardState {
  Block<Scalar> block;
  Scalar* query;   // [head_dim, lanes], scaled
  Scalar* output;  // [value_dim, lanes], not yet divided by `sum`
  bool started;    // whether `output` holds something
  alignas(64) Scalar largest[Block<Scalar>::kMaxLanes];
  alignas(64) Scalar sum[Block<Scalar>::kMaxLanes];
};

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void attend_piece(
    const Attention<Scalar>& attention, ForwardState<Scalar>& state, const KeyRows<Scalar>& keys,
    const KeyRows<Scalar>& values, int64_t begin, int64_t end, Scalar* scores, Scalar* memory) {
  const int64_t lanes = state.block.lanes();
  const int64_t count = end - begin;
  const int64_t sum_length = attention.queries < kVectorLanes<Scalar> ? kShortSumLength : kSumLength;
  multiply<Math, false>(
      {keys.at(begin), keys.stride, state.query, lanes, scores, lanes, attention.head_dim, false, sum_length}, count,
      lanes);
  finish_scores<Math>(attention, state.block, begin, count, scores, static_cast<Scalar*>(nullptr), memory);
  alignas(64) Scalar shrinking[Block<Scalar>::kMaxLanes];
  update_softmax(scores, count, lanes, state.largest, state.sum, shrinking);
  if (state.started) multiply_lanes(state.output, attention.value_dim, shrinking, lanes);
  multiply<Math, true>(
      {values.at(begin), values.stride, scores, lanes, state.output, lanes, count, state.started},
      attention.value_dim, lanes);
  state.started = true;
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void finish_block(const Attention<Scalar>& attention, ForwardState<Scalar>& state) {
  constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;
  const int64_t lanes = state.block.lanes();
  alignas(64) Scalar divisors[kMaxLanes], gates[kMaxLanes];
  Scalar sinks[kMaxLanes], sink_shares[kMaxLanes];
  read_per_lane(attention.sinks, state.block, Scalar(0), sinks);
  find_divisors(state.largest, state.sum, attention.sinks.data ? sinks : nullptr, lanes, divisors, sink_shares);
  if (!state.started) std::fill_n(state.output, attention.value_dim * lanes, Scalar(0));
  divide_lanes(state.output, attention.value_dim, divisors, lanes);
  clear_blind_lanes(state.output, attention.value_dim, state.sum, lanes);
  if (attention.gate.data) {
    read_per_lane(attention.gate, state.block, Scalar(1), gates);
    multiply_lanes(state.output, attention.value_dim, gates, lanes);
  }
  unpack_queries<Math>(state.output, state.block, attention.value_dim, attention.output);
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_forward_unit(const Attention<Scalar>& attention, const ForwardUnit& unit) {
  thread_local ForwardBuffers<Scalar> buffers;
  constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;
  Scalar* scores = buffers.scores.get(kPieceKeys * kMaxLanes);
  Scalar* memory = attention.attn_mask.data ? buffers.memory.get(kPieceKeys * kMaxLanes) : nullptr;
  const Blocks<Scalar> blocks(attention, *unit.group);
  ForwardState<Scalar> states[kUnitBlocks];
  int64_t first = attention.keys;
  int64_t last = 0;
  for (int64_t i = 0; i < unit.blocks; ++i) {
    ForwardState<Scalar>& state = states[i];
    state.block = blocks.get(unit.first_block + i);
    state.query = buffers.query[i].get(attention.head_dim * kMaxLanes);
    state.output = buffers.output[i].get(attention.value_dim * kMaxLanes);
    state.started = false;
    std::fill_n(state.largest, kMaxLanes, -kInfinity<Scalar>);
    std::fill_n(state.sum, kMaxLanes, Scalar(0));
    pack_queries<Math>(attention.query, state.block, attention.head_dim, attention.scale, state.query);
    first = std::min(first, state.block.begin);
    last = std::max(last, state.block.end);
  }
  // Pieces end at the same keys whatever blocks the unit has: no request's rounding depends on another.
  for (int64_t begin = first, end; begin < last; begin = end) {
    end = std::min((begin / kPieceKeys + 1) * kPieceKeys, last);
    const int64_t request = unit.group->request;
    const int64_t kv_head = unit.group->kv_head;
    const KeyRows<Scalar> keys =
        read_rows<Math>(attention.key, request, kv_head, begin, end, attention.head_dim, buffers.key);
    const KeyRows<Scalar> values =
        read_rows<Math>(attention.value, request, kv_head, begin, end, attention.value_dim, buffers.value);
    for (int64_t i = 0; i < unit.blocks; ++i) {
      const int64_t block_begin = std::max(begin, states[i].block.begin);
      const int64_t block_end = std::min(end, states[i].block.end);
      if (block_begin >= block_end) continue;
      attend_piece<Math>(attention, states[i], keys, values, block_begin, block_end, scores, memory);
    }
  }
  for (int64_t i = 0; i < unit.blocks; ++i) finish_block<Math>(attention, states[i]);
}

}  // namespace sparse_heads::cpu
