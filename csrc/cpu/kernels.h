// The float32 kernels, which read kept weights in place. They need AVX-512 (see avx512.h).
#pragma once

#include "params.h"

namespace sparse_heads::cpu {

// Measured: above, tokens as vector lanes beat columns as vector lanes.
constexpr int kMaxDotTokens = 8;

inline bool dots_suit(const Projection& projection) { return projection.tokens <= kMaxDotTokens; }

// For projections that `dots_suit`.
void project_by_dots(const Projection& projection);

// Any number of tokens.
void project_by_panels(const Projection& projection);

}  // namespace sparse_heads::cpu
