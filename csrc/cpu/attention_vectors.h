// Vectors of 64 bytes in the compilers' own notation: one text for every machine. What is inlined into a function that
// is marked SPARSE_HEADS_AVX512 becomes AVX-512 instructions, elsewhere the compiler splits the vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define SPARSE_HEADS_INLINE __attribute__((always_inline)) inline

namespace sparse_heads::cpu {

template <class Scalar>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  using Integer = int32_t;
  typedef float Vector __attribute__((vector_size(64)));
  typedef int32_t Integers __attribute__((vector_size(64)));
};

template <>
struct VectorTypes<double> {
  using Integer = int64_t;
  typedef double Vector __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
};

template <class Scalar>
using Vector = typename VectorTypes<Scalar>::Vector;
template <class Scalar>
using Integers = typename VectorTypes<Scalar>::Integers;
template <class Scalar>
using Integer = typename VectorTypes<Scalar>::Integer;

template <class Scalar>
constexpr int64_t kVectorLanes = 64 / sizeof(Scalar);

// The next multiple of the lanes.
template <class Scalar>
constexpr int64_t whole_vectors(int64_t size) {
  return (size + kVectorLanes<Scalar> - 1) / kVectorLanes<Scalar> * kVectorLanes<Scalar>;
}

template <class Scalar>
constexpr Scalar kInfinity = std::numeric_limits<Scalar>::infinity();

// Vectors go by reference only: by value they would have another calling convention on every machine.
template <class V, class Scalar>
SPARSE_HEADS_INLINE void load(V& vector, const Scalar* source) {
  std::memcpy(&vector, source, sizeof(V));
}

template <class V, class Scalar>
SPARSE_HEADS_INLINE void store(Scalar* target, const V& vector) {
  std::memcpy(target, &vector, sizeof(V));
}

// Splits x = n ln 2 + r with |r| <= ln 2 / 2: gives 2^n and exp(r) - 1, this to 3e-9 (a minimax fit).
SPARSE_HEADS_INLINE void split_exponential(const Vector<float>& x, Vector<float>& power, Vector<float>& rest) {
  // Adding 1.5 * 2^23 rounds to the integer n, and leaves it in the low bits.
  const Vector<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vector<float> n = shifted - 12582912.0f;
  // ln 2 in two parts, the first of so few bits that n times it is exact.
  Vector<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector<float> series = r * 1.38143043e-3f + 8.36885255e-3f;
  series = series * r + 4.16684002e-2f;
  series = series * r + 1.66665196e-1f;
  series = series * r + 4.99999940e-1f;
  rest = series * (r * r) + r;
  power = (Vector<float>)(((Integers<float>)shifted + 127) << 23);
}

// Replaces x, at most 0 or NaN, by exp(x) to about one unit in the last place; results below 2^-126 become 0.
SPARSE_HEADS_INLINE void exponentiate(Vector<float>& x) {
  Vector<float> power, rest;
  split_exponential(x, power, rest);
  const Vector<float> result = (rest + 1.0f) * power;
  x = x < -87.0f ? Vector<float>{} : result;
}

SPARSE_HEADS_INLINE void exponentiate(Vector<double>& x) {
  for (int64_t i = 0; i < kVectorLanes<double>; ++i) x[i] = std::exp(x[i]);
}

// Replaces x by tanh(x) to about one unit in the last place.
SPARSE_HEADS_INLINE void tangent(Vector<float>& x) {
  // Below 0.55 an odd series (a minimax fit to 1e-9), above it (e - 1) / (e + 1) with e = exp(2 |x|).
  const Vector<float> square = x * x;
  Vector<float> series = square * -6.27418282e-3f + 2.10716352e-2f;
  series = series * square - 5.38522974e-2f;
  series = series * square + 1.33325860e-1f;
  series = series * square - 3.33333164e-1f;
  series = series * square * x + x;
  const Vector<float> magnitude = x < 0.0f ? -x : x;
  Vector<float> power, rest;
  split_exponential(magnitude > 10.0f ? Vector<float>{} + 20.0f : magnitude * 2.0f, power, rest);
  Vector<float> large = 1.0f - 2.0f / (rest * power + (power + 1.0f));
  large = x < 0.0f ? -large : large;
  x = magnitude < 0.55f ? series : large;
}

SPARSE_HEADS_INLINE void tangent(Vector<double>& x) {
  for (int64_t i = 0; i < kVectorLanes<double>; ++i) x[i] = std::tanh(x[i]);
}

}  // namespace sparse_heads::cpu
