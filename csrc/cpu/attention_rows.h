// Moves rows of tensors to and from the kernels' scratch memory, changing their type on the way.
#pragma once

#include <cstdint>

#include "attention_params.h"
#include "cpu/avx512.h"

namespace sparse_heads::cpu {

// On any machine.
template <class Scalar>
struct BaselineRows {
  // Transposes one row a lane, of `columns` elements `stride` apart, into out [columns, lanes], times `factor`.
  static void pack(
      Element element, const char* const* rows, int64_t stride, int64_t columns, Scalar factor, Scalar* out,
      int64_t lanes);

  // The first `count` lanes of in [columns, lanes] to one row each, of neighbouring elements.
  static void unpack(
      const Scalar* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows);

  // One row, times `factor`, and zeros up to `padded`, which is whole vectors.
  static void load(
      Element element, const char* row, int64_t stride, int64_t columns, Scalar factor, Scalar* out, int64_t padded);

  // One row of neighbouring elements.
  static void store(const Scalar* in, int64_t columns, Element element, char* row);
};

extern template struct BaselineRows<float>;
extern template struct BaselineRows<double>;

#if SPARSE_HEADS_HAVE_AVX512
// The same with AVX-512 where elements are neighbours.
struct Avx512Rows {
  static void pack(
      Element element, const char* const* rows, int64_t stride, int64_t columns, float factor, float* out,
      int64_t lanes);
  static void unpack(
      const float* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows);
  static void load(
      Element element, const char* row, int64_t stride, int64_t columns, float factor, float* out, int64_t padded);
  static void store(const float* in, int64_t columns, Element element, char* row);
};
#endif

}  // namespace sparse_heads::cpu
