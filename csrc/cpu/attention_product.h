// Small matrix products, C = A B or C += A B, with A read where it lies.
#pragma once

#include <cstdint>

#include "cpu/attention_rows.h"
#include "cpu/attention_vectors.h"
#include "cpu/avx512.h"

namespace sparse_heads::cpu {

// One running sum takes this many terms at most: longer ones round worse.
constexpr int64_t kSumLength = 256;
// The same where a vendor's product of few rows would round less, and where it costs nothing.
constexpr int64_t kShortSumLength = 32;

// A is [rows, depth], row after row (kByColumns false) or column after column, `stride` apart. B and C are row-major.
template <class Scalar>
struct Factors {
  const Scalar* a;
  int64_t a_stride;
  const Scalar* b;
  int64_t b_stride;
  Scalar* c;
  int64_t c_stride;
  int64_t depth;
  bool accumulate;
  int64_t sum_length = kSumLength;
};

// What the kernels are written in: arithmetic in float on AVX-512 and AVX2, in float and in double on any machine.
#if SPARSE_HEADS_HAVE_AVX512
struct Avx512 {
  using Scalar = float;
  using Rows = Avx512Rows;
};

struct Avx2 {
  using Scalar = float;
  using Rows = BaselineRows<float>;
};
#endif

template <class Type>
struct Baseline {
  using Scalar = Type;
  using Rows = BaselineRows<Type>;
};

// C [rows, columns]; columns are whole vectors.
template <class Math, bool kByColumns>
void multiply(const Factors<typename Math::Scalar>& factors, int64_t rows, int64_t columns);

}  // namespace sparse_heads::cpu
