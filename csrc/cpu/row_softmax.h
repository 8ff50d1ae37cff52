// The softmax of one query, whose scores are neighbours.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention_vectors.h"

namespace sparse_heads::cpu {

// As `update_softmax`, for one query whose keys are neighbours, in room for whole vectors that holds -infinity behind
// the last key. Returns the factor by which earlier results shrink.
template <class Scalar>
SPARSE_HEADS_INLINE Scalar update_row_softmax(Scalar* scores, int64_t keys, Scalar& largest, Scalar& sum) {
  constexpr int64_t kWidth = kVectorLanes<Scalar>;
  alignas(64) Scalar lanes[kWidth];
  Vector<Scalar> x, total = {};
  Vector<Scalar> top = Vector<Scalar>{} + largest;
  for (int64_t i = 0; i < keys; i += kWidth) {
    load(x, scores + i);
    top = x > top ? x : top;
  }
  store(lanes, top);
  const Scalar before = largest;
  largest = *std::max_element(lanes, lanes + kWidth);
  top = Vector<Scalar>{} + (largest == -kInfinity<Scalar> ? Scalar(0) : largest);
  for (int64_t i = 0; i < keys; i += kWidth) {
    load(x, scores + i);
    x -= top;
    exponentiate(x);
    total += x;
    store(scores + i, x);
  }
  store(lanes, total);
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  x = before - top;
  exponentiate(x);
  sum = sum * x[0] + lanes[0];
  return x[0];
}

}  // namespace sparse_heads::cpu
