// (request, head) items that this thread's calls ran, per operator: the proof that skipped heads are skipped.
#pragma once

#include <cstdint>

namespace sparse_heads::cpu {

enum Operator { kInProjection, kOutProjection, kAttention, kOperators };

inline thread_local int64_t items_ran[kOperators] = {};

}  // namespace sparse_heads::cpu
