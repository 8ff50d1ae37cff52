// AVX-512 building blocks. The library is compiled for the baseline machine: only functions marked
// SPARSE_HEADS_AVX512 use these instructions, and only after `has_avx512()`.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSE_HEADS_HAVE_AVX512 1

#include <immintrin.h>

#include <cstdint>

#define SPARSE_HEADS_AVX512 __attribute__((target("avx512f")))
#define SPARSE_HEADS_AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline

// Where plain code gains from AVX2, in the same way after `has_avx2()`.
#define SPARSE_HEADS_AVX2 __attribute__((target("avx2,fma")))

namespace sparse_heads::cpu {

constexpr int kLanes = 16;

inline bool has_avx512() {
  static const bool supported = __builtin_cpu_supports("avx512f");
  return supported;
}

inline bool has_avx2() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
}

// The first `count` lanes; all of them from kLanes on, none below 1.
SPARSE_HEADS_AVX512_INLINE __mmask16 first_lanes(int64_t count) {
  if (count >= kLanes) return 0xffff;
  return count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Transposes a 16 x 16 tile in place: lane j of rows[i] goes to lane i of rows[j].
SPARSE_HEADS_AVX512_INLINE void transpose16(__m512 (&rows)[kLanes]) {
  __m512 swapped[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    swapped[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    swapped[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(swapped[i + j]);
      const __m512d high = _mm512_castps_pd(swapped[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // Each 128-bit lane now holds a transposed 4 x 4 tile: what is left is a transpose of those lanes.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    swapped[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    swapped[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    swapped[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    swapped[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(swapped[i], swapped[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(swapped[i], swapped[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(swapped[i + 4], swapped[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(swapped[i + 4], swapped[i + 12], 0xdd);
  }
}

// Lane i of the result is the sum of all lanes of rows[i].
SPARSE_HEADS_AVX512_INLINE __m512 sum_each16(const __m512 (&rows)[kLanes]) {
  __m512 pairs[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(
        _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  }
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]);
    const __m512d high = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  __m512 eights[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eights[i] = _mm512_add_ps(
        _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
        _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(
      _mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

}  // namespace sparse_heads::cpu

#else
#define SPARSE_HEADS_HAVE_AVX512 0

namespace sparse_heads::cpu {

inline bool has_avx512() { return false; }

}  // namespace sparse_heads::cpu
#endif
