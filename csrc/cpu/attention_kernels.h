// The attention kernels for arithmetic in float and in double.
#pragma once

#include "attention_params.h"

namespace sparse_heads::cpu {

// Writes the whole output; returns the number of (request, head) pairs that ran.
template <class Scalar>
int64_t attend(const Attention<Scalar>& attention);

// Adds up the wanted gradients where pairs run; all must be zeros before.
template <class Scalar>
void attend_backward(const Attention<Scalar>& attention, const AttentionGradients<Scalar>& gradients);

}  // namespace sparse_heads::cpu
