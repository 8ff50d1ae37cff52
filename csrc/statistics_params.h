// What the statistics kernel is asked to do, without torch: shared by the kernels and their launchers.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace sparse_heads {

// Sums over the queries that count, of which each (request, head) pair has a row: kCount of them, the statistics, the
// probabilities of the previous, own and next position, and from kGroups on those of each group of keys.
enum StatisticsColumn : int64_t { kCount, kEntropy, kSparsity, kConfidence, kPrevious, kOwn, kNext, kGroups };

template <class Scalar>
struct Statistics {
  Attention<Scalar> attention;       // without values, gates, sinks and output
  Scalar hidden;                     // masked scores from here down count as -infinity
  Array2<const bool> query_mask;     // (request, query); null: all count that see more than one key
  Array2<const int64_t> key_groups;  // (request, key); keys outside [0, groups) are in no group
  int64_t groups;
  double* sums;  // [requests, heads, columns], zeros before

  int64_t columns() const { return kGroups + groups; }
};

}  // namespace sparse_heads
