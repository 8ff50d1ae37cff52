// What a block reads and writes: queries to lanes and back, and the rows of its key/value head.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/attention_blocks.h"
#include "cpu/attention_vectors.h"

namespace sparse_heads::cpu {

// Rows of one key/value head that a product can read: where they lie, or a copy of the rows from `first` on.
template <class Scalar>
struct KeyRows {
  const Scalar* data;
  int64_t stride;
  int64_t first;

  const Scalar* at(int64_t key) const { return data + (key - first) * stride; }
};

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE KeyRows<Scalar> read_rows(
    const Array4& array, int64_t request, int64_t head, int64_t begin, int64_t end, int64_t columns,
    Buffer<Scalar>& buffer) {
  const bool in_place = array.strides[3] == 1 && element_size(array.element) == sizeof(Scalar);
  if (in_place) return {reinterpret_cast<const Scalar*>(array.at(request, head, 0)), array.strides[2], 0};
  const int64_t stride = whole_vectors<Scalar>(columns);
  Scalar* copy = buffer.get((end - begin) * stride);
  for (int64_t key = begin; key < end; ++key) {
    const char* row = array.at(request, head, key);
    Math::Rows::load(array.element, row, array.strides[3], columns, 1, copy + (key - begin) * stride, stride);
  }
  return {copy, stride, begin};
}

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void pack_queries(
    const Array4& array, const Block<Scalar>& block, int64_t columns, Scalar factor, Scalar* out) {
  const char* rows[Block<Scalar>::kMaxLanes];
  for (int64_t lane = 0; lane < block.lanes(); ++lane) {
    rows[lane] = array.at(block.request, block.head[lane], block.position[lane]);
  }
  Math::Rows::pack(array.element, rows, array.strides[3], columns, factor, out, block.lanes());
}

// To rows of neighbouring elements.
template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void unpack_queries(
    const Scalar* in, const Block<Scalar>& block, int64_t columns, const Array4& array) {
  char* rows[Block<Scalar>::kMaxLanes];
  for (int64_t lane = 0; lane < block.count; ++lane) {
    rows[lane] = array.at(block.request, block.head[lane], block.position[lane]);
  }
  Math::Rows::unpack(in, block.lanes(), block.count, columns, array.element, rows);
}

// Multiplies in [columns, lanes] by one factor a lane.
template <class Scalar>
SPARSE_HEADS_INLINE void multiply_lanes(Scalar* in, int64_t columns, const Scalar* factors, int64_t lanes) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < lanes; i += kVectorLanes<Scalar>) {
      Vector<Scalar> x, factor;
      load(x, in + c * lanes + i);
      load(factor, factors + i);
      store(in + c * lanes + i, x * factor);
    }
  }
}

// Divides them by one divisor a lane.
template <class Scalar>
SPARSE_HEADS_INLINE void divide_lanes(Scalar* in, int64_t columns, const Scalar* divisors, int64_t lanes) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < lanes; i += kVectorLanes<Scalar>) {
      Vector<Scalar> x, divisor;
      load(x, in + c * lanes + i);
      load(divisor, divisors + i);
      store(in + c * lanes + i, x / divisor);
    }
  }
}

// Zeros in the lanes whose `sum` of exponentials is 0, which see no key: 0 times what they read may be NaN.
template <class Scalar>
SPARSE_HEADS_INLINE void clear_blind_lanes(Scalar* in, int64_t columns, const Scalar* sums, int64_t lanes) {
  if (std::find(sums, sums + lanes, Scalar(0)) == sums + lanes) return;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < lanes; i += kVectorLanes<Scalar>) {
      Vector<Scalar> x, sum;
      load(x, in + c * lanes + i);
      load(sum, sums + i);
      x = sum == 0 ? Vector<Scalar>{} : x;
      store(in + c * lanes + i, x);
    }
  }
}

// Each lane's number of an [B, H] array, or `none` where there is no array.
template <class Scalar>
SPARSE_HEADS_INLINE void read_per_lane(
    const Array2<const Scalar>& array, const Block<Scalar>& block, Scalar none, Scalar* out) {
  for (int64_t lane = 0; lane < block.lanes(); ++lane) {
    out[lane] = array.data ? array.at(block.request, block.head[lane]) : none;
  }
}

}  // namespace sparse_heads::cpu
