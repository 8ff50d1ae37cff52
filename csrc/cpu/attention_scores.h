// Scores of one block, [keys, lanes] row-major: masks and softmax, every lane for itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_product.h"
#include "cpu/attention_vectors.h"

namespace sparse_heads::cpu {

// Sums over keys add up this many terms plainly, and the results with care: all probabilities share their errors.
constexpr int64_t kPlainSumLength = 8;

// Adds `part` to `total`; `lost` carries what rounding took from earlier additions (Kahan's summation).
template <class Scalar>
SPARSE_HEADS_INLINE void add_with_care(Vector<Scalar>& total, Vector<Scalar>& lost, const Vector<Scalar>& part) {
  const Vector<Scalar> wanted = part - lost;
  const Vector<Scalar> sum = total + wanted;
  lost = (sum - total) - wanted;
  total = sum;
}

// scores = softcap * tanh(scores / softcap), and the derivatives into `slopes` unless it is null.
template <class Scalar>
SPARSE_HEADS_INLINE void cap(Scalar softcap, Scalar* scores, Scalar* slopes, int64_t size) {
  for (int64_t i = 0; i < size; i += kVectorLanes<Scalar>) {
    Vector<Scalar> x;
    load(x, scores + i);
    x = x / softcap;
    tangent(x);
    if (slopes) store(slopes + i, 1 - x * x);
    store(scores + i, x * softcap);
  }
}

// A bool mask replaces what it hides, NaN too; it comes as 0 and -infinity. Other masks are added.
template <class Scalar>
SPARSE_HEADS_INLINE void mask_vector(bool is_bool, const Vector<Scalar>& mask, Scalar* score) {
  Vector<Scalar> x;
  load(x, score);
  if (is_bool) {
    x = mask < 0 ? mask : x;
  } else {
    x += mask;
  }
  store(score, x);
}

// `memory`: room for as many numbers as `scores` has.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void apply_attn_mask(
    const Attention<Scalar>& attention, const Block<Scalar>& block, int64_t first_key, int64_t keys, Scalar* scores,
    Scalar* memory) {
  const Array4& mask = attention.attn_mask;
  const bool is_bool = mask.element == Element::kBool;
  const int64_t offset = first_key * mask.strides[3] * element_size(mask.element);
  const int64_t lanes = block.lanes();
  const char* rows[Block<Scalar>::kMaxLanes];
  bool alike = true;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    rows[lane] = mask.at(block.request, block.head[lane], block.position[lane]) + offset;
    alike = alike && rows[lane] == rows[0];
  }
  if (alike) {
    Math::Rows::load(mask.element, rows[0], mask.strides[3], keys, 1, memory, whole_vectors<Scalar>(keys));
  } else {
    Math::Rows::pack(mask.element, rows, mask.strides[3], keys, 1, memory, lanes);
  }
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t i = key * lanes; i < (key + 1) * lanes; i += kVectorLanes<Scalar>) {
      Vector<Scalar> values;
      if (alike) {
        values = Vector<Scalar>{} + memory[key];
      } else {
        load(values, memory + i);
      }
      mask_vector<Scalar>(is_bool, values, scores + i);
    }
  }
}

// Hides the keys outside each query's span.
template <class Scalar>
SPARSE_HEADS_INLINE void apply_span(const Block<Scalar>& block, int64_t first_key, int64_t keys, Scalar* scores) {
  if (first_key >= block.common_begin && first_key + keys <= block.common_end) return;
  for (int64_t lane = 0; lane < block.lanes(); lane += kVectorLanes<Scalar>) {
    Integers<Scalar> first, last;
    load(first, block.first_key + lane);
    load(last, block.last_key + lane);
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t key = first_key + i;
      if (key >= block.common_begin && key < block.common_end) continue;
      const Integers<Scalar> own = Integers<Scalar>{} + static_cast<Integer<Scalar>>(key);
      Scalar* score = scores + i * block.lanes() + lane;
      Vector<Scalar> x;
      load(x, score);
      x = own < first ? Vector<Scalar>{} - kInfinity<Scalar> : x;
      x = own > last ? Vector<Scalar>{} - kInfinity<Scalar> : x;
      store(score, x);
    }
  }
}

// Everything between the product and the softmax.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void finish_scores(
    const Attention<Scalar>& attention, const Block<Scalar>& block, int64_t first_key, int64_t keys, Scalar* scores,
    Scalar* slopes, Scalar* memory) {
  if (attention.softcap != 0) cap(attention.softcap, scores, slopes, keys * block.lanes());
  if (attention.attn_mask.data) apply_attn_mask<Math>(attention, block, first_key, keys, scores, memory);
  apply_span(block, first_key, keys, scores);
}

// What is subtracted before exponentiating: without a visible key the largest score is -infinity, whose difference
// with itself is NaN.
template <class Scalar>
SPARSE_HEADS_INLINE void make_finite(Vector<Scalar>& largest) {
  largest = largest == -kInfinity<Scalar> ? Vector<Scalar>{} : largest;
}

// Replaces scores by exp(score - largest), where `largest` counts the keys seen before too; updates `largest` and
// `sum`, and gives the factor by which earlier results shrink.
template <class Scalar>
SPARSE_HEADS_INLINE void update_softmax(
    Scalar* scores, int64_t keys, int64_t lanes, Scalar* largest, Scalar* sum, Scalar* shrinking) {
  for (int64_t lane = 0; lane < lanes; lane += kVectorLanes<Scalar>) {
    Vector<Scalar> before, total, x;
    load(before, largest + lane);
    Vector<Scalar> top = before;
    for (int64_t key = 0; key < keys; ++key) {
      load(x, scores + key * lanes + lane);
      top = x > top ? x : top;
    }
    store(largest + lane, top);
    make_finite<Scalar>(top);
    x = before - top;
    exponentiate(x);
    store(shrinking + lane, x);
    load(total, sum + lane);
    total *= x;
    Vector<Scalar> lost = {};
    for (int64_t begin = 0; begin < keys; begin += kPlainSumLength) {
      Vector<Scalar> part = {};
      for (int64_t key = begin; key < std::min(begin + kPlainSumLength, keys); ++key) {
        load(x, scores + key * lanes + lane);
        x -= top;
        exponentiate(x);
        part += x;
        store(scores + key * lanes + lane, x);
      }
      add_with_care<Scalar>(total, lost, part);
    }
    store(sum + lane, total);
  }
}

// The numbers by which exp(score - largest) are divided to be probabilities: infinity for a query that sees no key.
// `sinks` may be null; else `sink_shares` gets the sinks' own probabilities.
template <class Scalar>
SPARSE_HEADS_INLINE void find_divisors(
    const Scalar* largest, const Scalar* sum, const Scalar* sinks, int64_t lanes, Scalar* divisors,
    Scalar* sink_shares) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const bool sees_a_key = sum[lane] != 0;
    divisors[lane] = sees_a_key ? sum[lane] : kInfinity<Scalar>;
    if (!sinks) continue;
    sink_shares[lane] = 0;
    if (sees_a_key) {
      divisors[lane] += std::exp(sinks[lane] - largest[lane]);
      sink_shares[lane] = 1 / (1 + sum[lane] * std::exp(largest[lane] - sinks[lane]));
    }
  }
}

}  // namespace sparse_heads::cpu
