// What the attention kernels are asked to do, without torch: shared by the kernels and their launchers.
#pragma once

#include <cstdint>

namespace sparse_heads {

enum class Element { kFloat32, kFloat64, kBFloat16, kFloat16, kBool };

inline int64_t element_size(Element element) {
  switch (element) {
    case Element::kFloat64:
      return 8;
    case Element::kFloat32:
      return 4;
    case Element::kBool:
      return 1;
    default:
      return 2;
  }
}

// A tensor of four dimensions (request, head, position, column), strides in elements; null when there is none.
struct Array4 {
  char* data = nullptr;
  Element element = Element::kFloat32;
  int64_t strides[4] = {0, 0, 0, 0};

  char* at(int64_t request, int64_t head, int64_t position) const {
    return data + (request * strides[0] + head * strides[1] + position * strides[2]) * element_size(element);
  }
};

// A tensor of two dimensions, (request, head) where nothing else is said, strides in elements; null when there is none.
template <class T>
struct Array2 {
  T* data = nullptr;
  int64_t strides[2] = {0, 0};

  T& at(int64_t request, int64_t column) const { return data[request * strides[0] + column * strides[1]]; }
};

// output = gate * softmax(mask(softcap(scale * query . key))) . value for the (request, head) pairs that are on.
// Scalar, the type of all arithmetic, is double for float64 inputs and float for others.
template <class Scalar>
struct Attention {
  int64_t requests, heads, kv_heads, queries, keys, head_dim, value_dim;
  Array4 query, key, value;
  Array2<const bool> head_mask;      // null: all heads run
  const int64_t* kv_head_of;         // [heads], or null: heads of one group are neighbours
  Array2<const Scalar> gate, sinks;  // null: 1, and none
  Array4 attn_mask;                  // bool or floating; broadcast dimensions have stride 0
  int64_t left, right;               // keys visible before and after a query's own position, -1 = unlimited
  Scalar scale, softcap;             // softcap 0 = none
  Array4 output;                     // of the forward

  bool runs(int64_t request, int64_t head) const { return !head_mask.data || head_mask.at(request, head); }

  int64_t kv_head(int64_t head) const { return kv_head_of ? kv_head_of[head] : head / (heads / kv_heads); }
};

// Null where a gradient is not wanted; all must be zeros before, and nothing is written for masked heads.
template <class Scalar>
struct AttentionGradients {
  Array4 output;               // given
  Array4 query, key, value;    // wanted, with neighbouring columns
  Array4 attn_mask;            // [B, H, T, S] of Scalar
  Array2<double> gate, sinks;  // [B, H], sums over queries
};

}  // namespace sparse_heads
