// The backward of one group, on one thread: its blocks one after another, so that every sum has a fixed order. The
// probabilities are computed again from the inputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_lanes.h"
#include "cpu/attention_product.h"
#include "cpu/attention_scores.h"

namespace sparse_heads::cpu {

// What a thread's buffers may hold between calls; theirs grow with the keys.
constexpr size_t kKeptBytes = 16 << 20;

template <class Scalar>
struct BackwardBuffers {
  Buffer<Scalar> keys, values, key_sums, value_sums;
  Buffer<Scalar> query, query_rows, output, output_rows, query_gradient;
  Buffer<Scalar> probabilities, gradients, slopes, memory;

  void trim() {
    size_t bytes = 0;
    for (const Buffer<Scalar>* buffer :
         {&keys, &values, &key_sums, &value_sums, &query, &query_rows, &output, &output_rows, &query_gradient,
          &probabilities, &gradients, &slopes, &memory}) {
      bytes += buffer->bytes();
    }
    if (bytes > kKeptBytes) *this = {};
  }

  static BackwardBuffers& of_this_thread() {
    thread_local BackwardBuffers buffers;
    return buffers;
  }
};

// What the blocks of a group share.
template <class Scalar>
struct BackwardGroup {
  const Attention<Scalar>& attention;
  const AttentionGradients<Scalar>& wanted;
  BackwardBuffers<Scalar>& buffers;
  KeyRows<Scalar> keys, values;
  int64_t head_stride, value_stride;  // columns, filled up to whole vectors
  Scalar* key_sums;                   // [keys, head_stride], null when not wanted
  Scalar* value_sums;                 // [keys, value_stride], null when not wanted
};

// Rows [count, stride] of a block's queries, filled up with zeros; row i times factors[i], and zeros where the query's
// sum of exponentials is 0, as it sees no key.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void load_queries(
    const Array4& array, const Block<Scalar>& block, int64_t columns, const Scalar* factors, const Scalar* exp_sums,
    Scalar* out, int64_t stride) {
  for (int64_t i = 0; i < block.count; ++i) {
    if (exp_sums[i] == 0) {
      std::fill_n(out + i * stride, stride, Scalar(0));
      continue;
    }
    const char* row = array.at(block.request, block.head[i], block.position[i]);
    Math::Rows::load(array.element, row, array.strides[3], columns, factors[i], out + i * stride, stride);
  }
}

// C [keys, lanes] = the rows of one key/value head times B [columns, lanes].
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void multiply_keys(
    const KeyRows<Scalar>& rows, const Block<Scalar>& block, int64_t columns, const Scalar* b, Scalar* c) {
  const int64_t lanes = block.lanes();
  multiply<Math, false>(
      {rows.at(block.begin), rows.stride, b, lanes, c, lanes, columns, false, kShortSumLength},
      block.end - block.begin, lanes);
}

// Replaces scores by probabilities; `exp_sums` gets their divisors without the sinks, `sink_shares` what the sinks
// take of them.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void softmax(
    const Attention<Scalar>& attention, const Block<Scalar>& block, Scalar* scores, Scalar* exp_sums,
    Scalar* sink_shares) {
  const int64_t lanes = block.lanes();
  const int64_t keys = block.end - block.begin;
  constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;
  alignas(64) Scalar largest[kMaxLanes], divisors[kMaxLanes];
  Scalar sinks[kMaxLanes];
  std::fill_n(largest, lanes, -kInfinity<Scalar>);
  std::fill_n(exp_sums, lanes, Scalar(0));
  update_softmax(scores, keys, lanes, largest, exp_sums, divisors);
  read_per_lane(attention.sinks, block, Scalar(0), sinks);
  find_divisors(largest, exp_sums, attention.sinks.data ? sinks : nullptr, lanes, divisors, sink_shares);
  divide_lanes(scores, keys, divisors, lanes);
}

// `gradients`, those of the ungated probabilities, become those of the scores, softmax and gate undone; `means` gets
// their means under the probabilities, which are the gates' gradients, one a query.
template <class Scalar>
SPARSE_HEADS_INLINE void undo_softmax(
    const Scalar* probabilities, int64_t keys, int64_t lanes, const Scalar* gates, Scalar* gradients, Scalar* means) {
  for (int64_t first = 0; first < lanes; first += kVectorLanes<Scalar>) {
    Vector<Scalar> gate, p, x;
    Vector<Scalar> mean = {};
    load(gate, gates + first);
    Vector<Scalar> lost = {};
    for (int64_t begin = 0; begin < keys; begin += kPlainSumLength) {
      Vector<Scalar> part = {};
      for (int64_t key = begin; key < std::min(begin + kPlainSumLength, keys); ++key) {
        load(p, probabilities + key * lanes + first);
        load(x, gradients + key * lanes + first);
        part += p * x;
      }
      add_with_care<Scalar>(mean, lost, part);
    }
    store(means + first, mean);
    for (int64_t key = 0; key < keys; ++key) {
      load(p, probabilities + key * lanes + first);
      load(x, gradients + key * lanes + first);
      store(gradients + key * lanes + first, gate * p * (x - mean));
    }
  }
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void write_mask_gradient(
    const Array4& array, const Block<Scalar>& block, const Scalar* gradients) {
  char* rows[Block<Scalar>::kMaxLanes];
  for (int64_t lane = 0; lane < block.count; ++lane) {
    rows[lane] = array.at(block.request, block.head[lane], block.position[lane]) + block.begin * sizeof(Scalar);
  }
  Math::Rows::unpack(gradients, block.lanes(), block.count, block.end - block.begin, array.element, rows);
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_backward_block(const BackwardGroup<Scalar>& group, const Block<Scalar>& block) {
  const int64_t lanes = block.lanes();
  const Attention<Scalar>& attention = group.attention;
  const AttentionGradients<Scalar>& wanted = group.wanted;
  BackwardBuffers<Scalar>& buffers = group.buffers;
  const int64_t keys = block.end - block.begin;
  const int64_t head_dim = attention.head_dim;
  const int64_t value_dim = attention.value_dim;
  Scalar* query = buffers.query.get(head_dim * lanes);
  Scalar* output = buffers.output.get(value_dim * lanes);
  Scalar* probabilities = buffers.probabilities.get(keys * lanes);
  Scalar* gradients = buffers.gradients.get(keys * lanes);
  Scalar* slopes = attention.softcap != 0 ? buffers.slopes.get(keys * lanes) : nullptr;
  Scalar* memory = attention.attn_mask.data ? buffers.memory.get(whole_vectors<Scalar>(keys * lanes)) : nullptr;
  constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;
  alignas(64) Scalar gates[kMaxLanes], scales[kMaxLanes], means[kMaxLanes], exp_sums[kMaxLanes];
  Scalar sink_shares[kMaxLanes];
  read_per_lane(attention.gate, block, Scalar(1), gates);
  std::fill_n(scales, lanes, attention.scale);

  pack_queries<Math>(attention.query, block, head_dim, attention.scale, query);
  multiply_keys<Math>(group.keys, block, head_dim, query, probabilities);
  finish_scores<Math>(attention, block, block.begin, keys, probabilities, slopes, memory);
  softmax<Math>(attention, block, probabilities, exp_sums, sink_shares);
  if (group.value_sums) {
    // d value [keys, value_dim] += P [keys, queries] (gate dO) [queries, value_dim]
    Scalar* rows = buffers.output_rows.get(lanes * group.value_stride);
    load_queries<Math>(wanted.output, block, value_dim, gates, exp_sums, rows, group.value_stride);
    Scalar* sums = group.value_sums + block.begin * group.value_stride;
    multiply<Math, false>(
        {probabilities, lanes, rows, group.value_stride, sums, group.value_stride, block.count, true}, keys,
        group.value_stride);
  }

  pack_queries<Math>(wanted.output, block, value_dim, Scalar(1), output);
  multiply_keys<Math>(group.values, block, value_dim, output, gradients);
  clear_blind_lanes(gradients, keys, exp_sums, lanes);
  if (slopes) clear_blind_lanes(slopes, keys, exp_sums, lanes);
  undo_softmax(probabilities, keys, lanes, gates, gradients, means);
  for (int64_t i = 0; i < block.count; ++i) {
    if (wanted.gate.data) wanted.gate.at(block.request, block.head[i]) += means[i];
    if (wanted.sinks.data) wanted.sinks.at(block.request, block.head[i]) -= gates[i] * sink_shares[i] * means[i];
  }
  if (wanted.attn_mask.data) write_mask_gradient<Math>(wanted.attn_mask, block, gradients);
  for (int64_t i = 0; slopes && i < keys * lanes; i += kVectorLanes<Scalar>) {
    Vector<Scalar> x, slope;
    load(x, gradients + i);
    load(slope, slopes + i);
    store(gradients + i, x * slope);
  }
  if (wanted.query.data) {
    // d query [head_dim, queries] = scale K^T [head_dim, keys] dS [keys, queries]
    Scalar* sums = buffers.query_gradient.get(head_dim * lanes);
    const int64_t sum_length = attention.queries < kVectorLanes<Scalar> ? kShortSumLength : kSumLength;
    multiply<Math, true>(
        {group.keys.at(block.begin), group.keys.stride, gradients, lanes, sums, lanes, keys, false, sum_length},
        head_dim, lanes);
    multiply_lanes(sums, head_dim, scales, lanes);
    clear_blind_lanes(sums, head_dim, exp_sums, lanes);
    unpack_queries<Math>(sums, block, head_dim, wanted.query);
  }
  if (group.key_sums) {
    // d key [keys, head_dim] += dS [keys, queries] (scale Q) [queries, head_dim]
    Scalar* rows = buffers.query_rows.get(lanes * group.head_stride);
    load_queries<Math>(attention.query, block, head_dim, scales, exp_sums, rows, group.head_stride);
    Scalar* sums = group.key_sums + block.begin * group.head_stride;
    multiply<Math, false>(
        {gradients, lanes, rows, group.head_stride, sums, group.head_stride, block.count, true}, keys,
        group.head_stride);
  }
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void store_keys(
    const Scalar* sums, int64_t stride, int64_t keys, int64_t columns, const HeadGroup& group, const Array4& array) {
  for (int64_t key = 0; key < keys; ++key) {
    Math::Rows::store(sums + key * stride, columns, array.element, array.at(group.request, group.kv_head, key));
  }
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_backward_group(
    const Attention<Scalar>& attention, const AttentionGradients<Scalar>& wanted, const HeadGroup& heads) {
  BackwardBuffers<Scalar>& buffers = BackwardBuffers<Scalar>::of_this_thread();
  const int64_t keys = attention.keys;
  const int64_t head_stride = whole_vectors<Scalar>(attention.head_dim);
  const int64_t value_stride = whole_vectors<Scalar>(attention.value_dim);
  Scalar* key_sums = wanted.key.data ? buffers.key_sums.get(keys * head_stride) : nullptr;
  Scalar* value_sums = wanted.value.data ? buffers.value_sums.get(keys * value_stride) : nullptr;
  if (key_sums) std::fill_n(key_sums, keys * head_stride, Scalar(0));
  if (value_sums) std::fill_n(value_sums, keys * value_stride, Scalar(0));
  const BackwardGroup<Scalar> group{
      attention,
      wanted,
      buffers,
      read_rows<Math>(attention.key, heads.request, heads.kv_head, 0, keys, attention.head_dim, buffers.keys),
      read_rows<Math>(attention.value, heads.request, heads.kv_head, 0, keys, attention.value_dim, buffers.values),
      head_stride,
      value_stride,
      key_sums,
      value_sums};
  const Blocks<Scalar> blocks(attention, heads);
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const Block<Scalar> block = blocks.get(i);
    if (block.begin >= block.end) continue;  // its gradients are the zeros that are there
    run_backward_block<Math>(group, block);
  }
  if (key_sums) store_keys<Math>(key_sums, head_stride, keys, attention.head_dim, heads, wanted.key);
  if (value_sums) store_keys<Math>(value_sums, value_stride, keys, attention.value_dim, heads, wanted.value);
}

}  // namespace sparse_heads::cpu
