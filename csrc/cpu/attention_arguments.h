// Reading the tensors of operators on attention: checks that need torch, and the kernels' view of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention_params.h"
#include "checks.h"
#include "cpu/arguments.h"

namespace sparse_heads::cpu {

using OptionalTensor = std::optional<Tensor>;

inline Element element_of(ArgumentName name, const Tensor& tensor) {
  const int32_t dtype = dtype_number(tensor);
  if (dtype == aoti_torch_dtype_float32()) return Element::kFloat32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Element::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return Element::kFloat16;
  if (dtype == aoti_torch_dtype_float64()) return Element::kFloat64;
  STD_TORCH_CHECK(
      dtype == aoti_torch_dtype_bool(), name, ": wanted bool, float16, bfloat16, float32 or float64, got ",
      torch::headeronly::toString(tensor.scalar_type()));
  return Element::kBool;
}

inline void check_on_cpu(ArgumentName name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": wanted a CPU tensor, got one on another device");
}

inline char* bytes(const Tensor& tensor) { return static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())); }

inline Array4 array4(const Tensor& tensor, Element element) {
  Array4 array{bytes(tensor), element, {}};
  for (int64_t i = 0; i < 4; ++i) array.strides[i] = tensor.stride(i);
  return array;
}

// Aligned at the last of four dimensions; those that are missing or broadcast get stride 0.
inline Array4 mask_array(const Tensor& mask, const std::array<int64_t, 4>& sizes) {
  const ArgumentName name{"attn_mask"};
  check_on_cpu(name, mask);
  const int64_t missing = 4 - mask.dim();
  STD_TORCH_CHECK(missing >= 0, name, ": wanted at most 4 dimensions, got ", mask.dim());
  Array4 array{bytes(mask), element_of(name, mask), {0, 0, 0, 0}};
  for (int64_t i = missing; i < 4; ++i) {
    const int64_t size = mask.size(i - missing);
    STD_TORCH_CHECK(
        size == 1 || size == sizes[i], name, ": wanted size 1 or ", sizes[i], " in dimension ", i, " of 4, got ", size);
    if (size != 1) array.strides[i] = mask.stride(i - missing);
  }
  return array;
}

template <class T>
constexpr const char* kDtypeName = std::is_same_v<T, const bool> ? "bool"
    : std::is_same_v<T, const int32_t>                           ? "int32"
    : std::is_same_v<T, const int64_t>                           ? "int64"
    : std::is_same_v<T, const double>                            ? "float64"
                                                                 : "float32";

// [columns] or [B, columns]; `what` the columns are.
template <class T>
Array2<T> array2(
    ArgumentName name, const Tensor& tensor, int64_t requests, int64_t columns, int32_t dtype,
    const char* what = "heads") {
  check_on_cpu(name, tensor);
  STD_TORCH_CHECK(
      dtype_number(tensor) == dtype, name, ": wanted ", kDtypeName<T>, ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 1 || tensor.dim() == 2, name, ": wanted 1 or 2 dimensions, got ", tensor.dim());
  check_equal(name, what, tensor.size(tensor.dim() - 1), columns);
  if (tensor.dim() == 2) check_equal(name, "requests", tensor.size(0), requests);
  T* data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data, {tensor.dim() == 2 ? tensor.stride(0) : 0, tensor.stride(tensor.dim() - 1)}};
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
      &handle));
  return Tensor(handle);
}

// The key/value head of every query head; null where heads of one group are neighbours.
inline const int64_t* check_kv_heads(
    ArgumentName keys_name, const OptionalTensor& kv_heads, int64_t heads, int64_t number) {
  if (!kv_heads) {
    STD_TORCH_CHECK(
        heads == number || (number > 0 && heads % number == 0), keys_name, ": wanted a number of heads that divides ",
        heads, ", got ", number);
    return nullptr;
  }
  const ArgumentName name{"kv_heads"};
  STD_TORCH_CHECK(
      dtype_number(*kv_heads) == aoti_torch_dtype_int64() && kv_heads->dim() == 1 && kv_heads->is_cpu() &&
          kv_heads->is_contiguous(),
      name, ": wanted a contiguous one-dimensional int64 tensor on the CPU");
  check_equal(name, "size", kv_heads->size(0), heads);
  const int64_t* kv_head_of = static_cast<const int64_t*>(kv_heads->const_data_ptr());
  for (int64_t head = 0; head < heads; ++head) {
    STD_TORCH_CHECK(
        kv_head_of[head] >= 0 && kv_head_of[head] < number, name, ": wanted indices from 0 to ", number - 1, ", got ",
        kv_head_of[head]);
  }
  return kv_head_of;
}

template <class Scalar>
void set_numbers(Attention<Scalar>& attention, double scale, double softcap) {
  attention.scale = static_cast<Scalar>(scale);
  attention.softcap = static_cast<Scalar>(softcap);
  STD_TORCH_CHECK(
      std::isfinite(attention.scale), "scale: wanted a number that is finite in ", kDtypeName<const Scalar>, ", got ",
      scale);
  STD_TORCH_CHECK(
      softcap == 0 || (attention.softcap > 0 && std::isfinite(attention.softcap)),
      "softcap: wanted 0, or a number that is finite and above 0 in ", kDtypeName<const Scalar>, ", got ", softcap);
}

// What makes the scores: all of `Attention` but values, gates, sinks and output.
template <class Scalar>
Attention<Scalar> check_scores(
    const Tensor& query, const Tensor& key, const OptionalTensor& head_mask, const OptionalTensor& kv_heads,
    const OptionalTensor& attn_mask, int64_t left, int64_t right, double scale, double softcap) {
  check_like({"query"}, query, query, 4);
  check_like({"key"}, key, query, 4);
  const Element element = element_of({"query"}, query);
  STD_TORCH_CHECK(element != Element::kBool, "query: wanted a floating dtype, got bool");

  Attention<Scalar> attention{};
  attention.requests = query.size(0);
  attention.heads = query.size(1);
  attention.queries = query.size(2);
  attention.head_dim = query.size(3);
  attention.kv_heads = key.size(1);
  attention.keys = key.size(2);
  check_equal({"key"}, "requests", key.size(0), attention.requests);
  check_equal({"key"}, "columns", key.size(3), attention.head_dim);
  attention.query = array4(query, element);
  attention.key = array4(key, element);

  const int64_t requests = attention.requests;
  const int64_t heads = attention.heads;
  if (head_mask) {
    attention.head_mask = array2<const bool>({"head_mask"}, *head_mask, requests, heads, aoti_torch_dtype_bool());
  }
  attention.kv_head_of = check_kv_heads({"key"}, kv_heads, heads, attention.kv_heads);
  if (attn_mask) {
    attention.attn_mask = mask_array(*attn_mask, {requests, heads, attention.queries, attention.keys});
    STD_TORCH_CHECK(
        attention.attn_mask.element != Element::kFloat64 || (std::is_same_v<Scalar, double>),
        "attn_mask: wanted bool, float16, bfloat16 or float32 beside a query that is not float64, got float64");
  }
  // No key is farther away, and sums with positions cannot overflow.
  const int64_t farthest = attention.keys + attention.queries;
  attention.left = std::min(left, farthest);
  attention.right = std::min(right, farthest);
  set_numbers(attention, scale, softcap);
  return attention;
}

}  // namespace sparse_heads::cpu
