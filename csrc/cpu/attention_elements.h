// The types that tensors come in: what to call for each, and their conversion.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention_params.h"
#include "cpu/attention_vectors.h"
#include "cpu/avx512.h"

namespace sparse_heads::cpu {

// True = attend: as something to add to a score.
template <class Scalar, class T>
SPARSE_HEADS_INLINE Scalar to_scalar(T value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value ? Scalar(0) : -kInfinity<Scalar>;
  } else {
    return static_cast<Scalar>(value);
  }
}

// Calls Function<T>::run(arguments...) with the C++ type of `element`, a floating one; float64 comes with
// arithmetic in double only.
template <class Scalar, template <class> class Function, class... Arguments>
SPARSE_HEADS_INLINE void with_floating_type(Element element, Arguments... arguments) {
  switch (element) {
    case Element::kFloat32:
      return Function<float>::run(arguments...);
    case Element::kBFloat16:
      return Function<c10::BFloat16>::run(arguments...);
    case Element::kFloat16:
      return Function<c10::Half>::run(arguments...);
    case Element::kFloat64:
      if constexpr (std::is_same_v<Scalar, double>) return Function<double>::run(arguments...);
      break;
    case Element::kBool:
      break;
  }
  __builtin_unreachable();  // the operators refuse such tensors
}

template <class Scalar, template <class> class Function, class... Arguments>
SPARSE_HEADS_INLINE void with_type(Element element, Arguments... arguments) {
  if (element == Element::kBool) return Function<bool>::run(arguments...);
  with_floating_type<Scalar, Function>(element, arguments...);
}

#if SPARSE_HEADS_HAVE_AVX512
// The first `count` elements of a row, and zeros.
SPARSE_HEADS_AVX512_INLINE __m512 load16(const float* row, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), row);
}

SPARSE_HEADS_AVX512_INLINE __m256i load_halves(const void* row, int64_t count) {
  if (count >= kLanes) return _mm256_loadu_si256(static_cast<const __m256i*>(row));
  alignas(32) uint16_t copy[kLanes] = {};
  std::memcpy(copy, row, 2 * count);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(copy));
}

SPARSE_HEADS_AVX512_INLINE __m512 load16(const c10::BFloat16* row, int64_t count) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(row, count)), 16));
}

SPARSE_HEADS_AVX512_INLINE __m512 load16(const c10::Half* row, int64_t count) {
  return _mm512_cvtph_ps(load_halves(row, count));
}

SPARSE_HEADS_AVX512_INLINE __m512 load16(const bool* row, int64_t count) {
  alignas(16) uint8_t copy[kLanes] = {};
  std::memcpy(copy, row, std::min<int64_t>(count, kLanes));
  const __m512i allowed = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(copy)));
  return _mm512_mask_blend_ps(
      _mm512_test_epi32_mask(allowed, allowed), _mm512_set1_ps(-kInfinity<float>), _mm512_setzero_ps());
}

SPARSE_HEADS_AVX512_INLINE void store16(float* row, const __m512& values, int64_t count) {
  _mm512_mask_storeu_ps(row, first_lanes(count), values);
}

SPARSE_HEADS_AVX512_INLINE void store_halves(void* row, __m256i halves, int64_t count) {
  alignas(32) uint16_t copy[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(copy), halves);
  std::memcpy(row, copy, 2 * std::min<int64_t>(count, kLanes));
}

SPARSE_HEADS_AVX512_INLINE void store16(c10::BFloat16* row, const __m512& values, int64_t count) {
  // To the nearest, ties to even: carries run into the exponent as they should. NaN must stay NaN.
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  store_halves(row, _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)), count);
}

SPARSE_HEADS_AVX512_INLINE void store16(c10::Half* row, const __m512& values, int64_t count) {
  store_halves(row, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count);
}
#endif

}  // namespace sparse_heads::cpu
