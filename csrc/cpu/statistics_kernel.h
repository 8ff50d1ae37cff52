// The statistics kernel for arithmetic in float and in double.
#pragma once

#include "statistics_params.h"

namespace sparse_heads::cpu {

// Adds up the rows of the pairs that run.
template <class Scalar>
void measure(const Statistics<Scalar>& statistics);

}  // namespace sparse_heads::cpu
