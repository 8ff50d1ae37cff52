// See attention_rows.h.
#include "cpu/attention_rows.h"

#include <algorithm>
#include <cstdint>

#include "cpu/attention_elements.h"

namespace sparse_heads::cpu {
namespace {

// Every move is a struct with the element type as its only parameter, for `with_type`.
template <class Scalar>
struct BaselineMoves {
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

  template <class T>
  struct Unpack {
    static void run(const Scalar* in, int64_t lanes, int64_t count, int64_t columns, char* const* rows) {
      for (int64_t lane = 0; lane < count; ++lane) {
        T* row = reinterpret_cast<T*>(rows[lane]);
        for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<T>(in[c * lanes + lane]);
      }
    }
  };

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
};

#if SPARSE_HEADS_HAVE_AVX512
struct Avx512Moves {
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
};
#endif

}  // namespace

template <class Scalar>
void BaselineRows<Scalar>::pack(
    Element element, const char* const* rows, int64_t stride, int64_t columns, Scalar factor, Scalar* out,
    int64_t lanes) {
  with_type<Scalar, BaselineMoves<Scalar>::template Pack>(element, rows, stride, columns, factor, out, lanes);
}

template <class Scalar>
void BaselineRows<Scalar>::unpack(
    const Scalar* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows) {
  with_floating_type<Scalar, BaselineMoves<Scalar>::template Unpack>(element, in, lanes, count, columns, rows);
}

template <class Scalar>
void BaselineRows<Scalar>::load(
    Element element, const char* row, int64_t stride, int64_t columns, Scalar factor, Scalar* out, int64_t padded) {
  with_type<Scalar, BaselineMoves<Scalar>::template Load>(element, row, stride, columns, factor, out, padded);
}

template <class Scalar>
void BaselineRows<Scalar>::store(const Scalar* in, int64_t columns, Element element, char* row) {
  with_floating_type<Scalar, BaselineMoves<Scalar>::template Store>(element, in, columns, row);
}

template struct BaselineRows<float>;
template struct BaselineRows<double>;

#if SPARSE_HEADS_HAVE_AVX512
void Avx512Rows::pack(
    Element element, const char* const* rows, int64_t stride, int64_t columns, float factor, float* out,
    int64_t lanes) {
  if (stride != 1) return BaselineRows<float>::pack(element, rows, stride, columns, factor, out, lanes);
  with_type<float, Avx512Moves::Pack>(element, rows, columns, factor, out, lanes);
}

void Avx512Rows::unpack(
    const float* in, int64_t lanes, int64_t count, int64_t columns, Element element, char* const* rows) {
  with_floating_type<float, Avx512Moves::Unpack>(element, in, lanes, count, columns, rows);
}

void Avx512Rows::load(
    Element element, const char* row, int64_t stride, int64_t columns, float factor, float* out, int64_t padded) {
  if (stride != 1) return BaselineRows<float>::load(element, row, stride, columns, factor, out, padded);
  with_type<float, Avx512Moves::Load>(element, row, columns, factor, out, padded);
}

void Avx512Rows::store(const float* in, int64_t columns, Element element, char* row) {
  with_floating_type<float, Avx512Moves::Store>(element, in, columns, row);
}
#endif

}  // namespace sparse_heads::cpu
