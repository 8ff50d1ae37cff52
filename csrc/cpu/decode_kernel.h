// The decode kernel for arithmetic in float and in double.
#pragma once

#include <cstdint>

#include "decode_params.h"

namespace sparse_heads::cpu {

// Writes the whole output; returns the number of (request, head) pairs that ran.
template <class Scalar>
int64_t decode_attention(const Decode<Scalar>& decode);

}  // namespace sparse_heads::cpu
