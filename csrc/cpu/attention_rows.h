// Moves rows of tensors to and from the kernels' scratch memory, changing their type on the way.
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

// Calls Function<T>::run(arguments...) with the C++ type of `element`; float64 goes with arithmetic in double only.
template <class Scalar, template <class> class Function, class... Arguments>
SPARSE_HEADS_INLINE void with_floating_type(Element element, Arguments... arguments) {
  switch (element) {
    case Element::kFloat32:
      return Function<float>::run(arguments...);
    case Element::kBFloat16:
      return Function<c10::BFloat16>::run(arguments...);
    case Element::kFloat16:
      return Function<c10::Half>::run(arguments...);
    default:
      if constexpr (std::is_same_v<Scalar, double>) Function<double>::run(arguments...);
  }
}

template <class Scalar, template <class> class Function, class... Arguments>
SPARSE_HEADS_INLINE void with_type(Element element, Arguments... arguments) {
  if (element == Element::kBool) return Function<bool>::run(arguments...);
  with_floating_type<Scalar, Function>(element, arguments...);
}

// The four moves, on any machine. `rows` are pointers to the rows' first elements, one a lane.
template <class Scalar>
struct BaselineRows {
  // Transposes rows of `columns` elements, `stride` apart, into out [columns, lanes], times `factor`.
  template <class T>
  struct Pack {
    static void run(
        const char* const* rows, int64_t stride, int64_t columns, Scalar factor, Scalar* out, int64_t lanes) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* row = reinterpret_cast<const T*>(rows[lane]);
        for (int64_t c = 0; c < columns; ++c) out[c * lanes + lane] = factor * to_scalar<Scalar>(row[c * stride]);
      }
    }
  };

  // The first `count` lanes of in [columns, lanes] to rows of neighbouring elements.
  template <class T>
  struct Unpack {
    static void run(const Scalar* in, int64_t lanes, int64_t count, int64_t columns, char* const* rows) {
      for (int64_t lane = 0; lane < count; ++lane) {
        T* row = reinterpret_cast<T*>(rows[lane]);
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(in[c * lanes + lane]);
      }
    }
  };

  // One row of `columns` elements, `stride` apart, times `factor`, and zeros up to `padded`, which is whole vectors.
  template <class T>
  struct Load {
    static void run(const char* row, int64_t stride, int64_t columns, Scalar factor, Scalar* out, int64_t padded) {
      const T* source = reinterpret_cast<const T*>(row);
      for (int64_t c = 0; c < columns; ++c) out[c] = factor * to_scalar<Scalar>(source[c * stride]);
      std::fill(out + columns, out + padded, Scalar(0));
    }
  };

  template <class T>
  struct Store {
    static void run(const Scalar* in, int64_t columns, char* row) {
      T* target = reinterpret_cast<T*>(row);
      for (int64_t c = 0; c < columns; ++c) target[c] = static_cast<T>(in[c]);
    }
  };

  static void pack(
      Element element, const char* const* rows, int64_t stride, int64_t columns, Scalar factor, Scalar* out,
      int64_t lanes) {
    with_type<Scalar, Pack>(element, rows, stride, columns, factor, out, lanes);
  }
  static void unpack(
      const Scalar* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows) {
    with_floating_type<Scalar, Unpack>(element, in, lanes, count, columns, rows);
  }
  static void load(
      Element element, const char* row, int64_t stride, int64_t columns, Scalar factor, Scalar* out, int64_t padded) {
    with_type<Scalar, Load>(element, row, stride, columns, factor, out, padded);
  }
  static void store(const Scalar* in, int64_t columns, Element element, char* row) {
    with_floating_type<Scalar, Store>(element, in, columns, row);
  }
};

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

// The four moves with AVX-512, for rows of neighbouring elements.
struct Avx512Rows {
  template <class T>
  struct Pack {
    SPARSE_HEADS_AVX512 static void run(
        const char* const* rows, int64_t columns, float factor, float* out, int64_t lanes) {
      const __m512 factors = _mm512_set1_ps(factor);
      for (int64_t first = 0; first < lanes; first += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
          const int64_t width = std::min<int64_t>(columns - c, kLanes);
          __m512 tile[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            tile[i] = load16(reinterpret_cast<const T*>(rows[first + i]) + c, width);
          }
          transpose16(tile);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            if (i >= width) break;
            _mm512_storeu_ps(out + (c + i) * lanes + first, _mm512_mul_ps(tile[i], factors));
          }
        }
      }
    }
  };

  template <class T>
  struct Unpack {
    SPARSE_HEADS_AVX512 static void run(
        const float* in, int64_t lanes, int64_t count, int64_t columns, char* const* rows) {
      for (int64_t first = 0; first < count; first += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
          const int64_t width = std::min<int64_t>(columns - c, kLanes);
          __m512 tile[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            tile[i] = i < width ? _mm512_loadu_ps(in + (c + i) * lanes + first) : _mm512_setzero_ps();
          }
          transpose16(tile);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            if (first + i >= count) break;
            store16(reinterpret_cast<T*>(rows[first + i]) + c, tile[i], width);
          }
        }
      }
    }
  };

  template <class T>
  struct Load {
    SPARSE_HEADS_AVX512 static void run(
        const char* row, int64_t columns, float factor, float* out, int64_t padded) {
      const __m512 factors = _mm512_set1_ps(factor);
      for (int64_t c = 0; c < padded; c += kLanes) {
        const __m512 values = load16(reinterpret_cast<const T*>(row) + c, columns - c);
        _mm512_storeu_ps(out + c, _mm512_mul_ps(values, factors));
      }
    }
  };

  template <class T>
  struct Store {
    SPARSE_HEADS_AVX512 static void run(const float* in, int64_t columns, char* row) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        store16(reinterpret_cast<T*>(row) + c, _mm512_maskz_loadu_ps(first_lanes(columns - c), in + c), columns - c);
      }
    }
  };

  static void pack(
      Element element, const char* const* rows, int64_t stride, int64_t columns, float factor, float* out,
      int64_t lanes) {
    if (stride != 1) return BaselineRows<float>::pack(element, rows, stride, columns, factor, out, lanes);
    with_type<float, Pack>(element, rows, columns, factor, out, lanes);
  }
  static void unpack(
      const float* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows) {
    with_floating_type<float, Unpack>(element, in, lanes, count, columns, rows);
  }
  static void load(
      Element element, const char* row, int64_t stride, int64_t columns, float factor, float* out, int64_t padded) {
    if (stride != 1) return BaselineRows<float>::load(element, row, stride, columns, factor, out, padded);
    with_type<float, Load>(element, row, columns, factor, out, padded);
  }
  static void store(const float* in, int64_t columns, Element element, char* row) {
    with_floating_type<float, Store>(element, in, columns, row);
  }
};
#endif

}  // namespace sparse_heads::cpu
