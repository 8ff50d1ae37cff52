// The float32 kernels, which read kept weights in place. They need AVX-512 (see avx512.h).
#pragma once

#include "cpu/avx512.h"
#include "params.h"

namespace sparse_heads::cpu {

// Measured: above, tokens as vector lanes beat columns as vector lanes.
constexpr int kMaxDotTokens = 8;

// Whether dots run, which round otherwise than panels: for requests of `tokens` tokens, whatever others do.
inline bool dots_suit(int64_t tokens) { return tokens <= kMaxDotTokens; }

// Any number of tokens.
void project_by_dots(const Projection& projection);
void project_by_panels(const Projection& projection);

inline void project([[maybe_unused]] const Projection& projection, [[maybe_unused]] int64_t tokens) {
#if SPARSE_HEADS_HAVE_AVX512
  if (dots_suit(tokens)) {
    project_by_dots(projection);
  } else {
    project_by_panels(projection);
  }
#endif
}

}  // namespace sparse_heads::cpu
