// The raw attention operators: checks, and the registration. Their schemas are defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>
#include <vector>

#include "attention_params.h"
#include "checks.h"
#include "cpu/arguments.h"
#include "cpu/attention_arguments.h"
#include "cpu/attention_kernels.h"
#include "cpu/counters.h"

namespace sparse_heads::cpu {
namespace {

struct Inputs {
  const Tensor& query;
  const Tensor& key;
  const Tensor& value;
  const OptionalTensor& head_mask;
  const OptionalTensor& kv_heads;
  const OptionalTensor& gate;
  const OptionalTensor& attn_mask;
  const OptionalTensor& sinks;
  int64_t left;
  int64_t right;
  double scale;
  double softcap;

  bool in_double() const { return dtype_number(query) == aoti_torch_dtype_float64(); }
};

template <class Scalar>
Attention<Scalar> check_inputs(const Inputs& inputs) {
  const auto& [query, key, value, head_mask, kv_heads, gate, attn_mask, sinks, left, right, scale, softcap] = inputs;
  Attention<Scalar> attention =
      check_scores<Scalar>(query, key, head_mask, kv_heads, attn_mask, left, right, scale, softcap);
  check_like({"value"}, value, query, 4);
  check_equal({"value"}, "requests", value.size(0), attention.requests);
  check_equal({"value"}, "heads", value.size(1), attention.kv_heads);
  check_equal({"value"}, "positions", value.size(2), attention.keys);
  attention.value_dim = value.size(3);
  attention.value = array4(value, attention.query.element);
  const int32_t dtype = inputs.in_double() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t requests = attention.requests;
  const int64_t heads = attention.heads;
  if (gate) attention.gate = array2<const Scalar>({"gate"}, *gate, requests, heads, dtype);
  if (sinks) attention.sinks = array2<const Scalar>({"sinks"}, *sinks, requests, heads, dtype);
  return attention;
}

// [B, H, L, C], laid out as [B, L, H, C], uninitialised.
Tensor empty_heads(int64_t requests, int64_t heads, int64_t length, int64_t columns, int32_t dtype) {
  return empty_strided(
      {requests, heads, length, columns}, {length * heads * columns, columns, heads * columns, 1}, dtype);
}

template <class Scalar>
Tensor forward(const Inputs& inputs) {
  Attention<Scalar> attention = check_inputs<Scalar>(inputs);
  const Tensor output = empty_heads(
      attention.requests, attention.heads, attention.queries, attention.value_dim, dtype_number(inputs.query));
  attention.output = array4(output, attention.query.element);
  items_ran[kAttention] += attend(attention);
  return output;
}

Tensor attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& head_mask,
    const OptionalTensor& kv_heads, const OptionalTensor& gate, const OptionalTensor& attn_mask,
    const OptionalTensor& sinks, int64_t left, int64_t right, double scale, double softcap) {
  const Inputs inputs{query, key,   value, head_mask, kv_heads, gate, attn_mask,
                      sinks, left, right, scale,     softcap};
  return inputs.in_double() ? forward<double>(inputs) : forward<float>(inputs);
}

template <class Scalar>
std::vector<Tensor> backward(const Inputs& inputs, const Tensor& grad, const std::vector<bool>& wanted) {
  const Attention<Scalar> attention = check_inputs<Scalar>(inputs);
  check_equal({"wanted"}, "length", static_cast<int64_t>(wanted.size()), 6);
  check_like({"grad"}, grad, inputs.query, 4);
  const int64_t sizes[] = {attention.requests, attention.heads, attention.queries, attention.value_dim};
  for (int64_t i = 0; i < 4; ++i) check_equal({"grad"}, "size", grad.size(i), sizes[i]);
  const Element element = attention.query.element;
  const int32_t dtype = dtype_number(inputs.query);
  const bool in_double = std::is_same_v<Scalar, double>;
  const int32_t wide = in_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();

  AttentionGradients<Scalar> gradients{};
  gradients.output = array4(grad, element);
  std::vector<Tensor> results;
  const auto add = [&](Tensor tensor) {
    torch::stable::zero_(tensor);
    results.push_back(tensor);
    return tensor;
  };
  const auto add_heads = [&](const Tensor& like) {
    return array4(add(empty_heads(like.size(0), like.size(1), like.size(2), like.size(3), dtype)), element);
  };
  const auto add_per_head = [&]() {
    const Tensor tensor =
        add(empty_strided({attention.requests, attention.heads}, {attention.heads, 1}, aoti_torch_dtype_float64()));
    return Array2<double>{static_cast<double*>(tensor.mutable_data_ptr()), {attention.heads, 1}};
  };
  if (wanted[0]) gradients.query = add_heads(inputs.query);
  if (wanted[1]) gradients.key = add_heads(inputs.key);
  if (wanted[2]) gradients.value = add_heads(inputs.value);
  if (wanted[3]) gradients.gate = add_per_head();
  if (wanted[4]) {
    const int64_t keys = attention.keys;
    const int64_t scores = attention.queries * keys;
    gradients.attn_mask = array4(
        add(empty_strided(
            {attention.requests, attention.heads, attention.queries, keys}, {attention.heads * scores, scores, keys, 1},
            wide)),
        in_double ? Element::kFloat64 : Element::kFloat32);
  }
  if (wanted[5]) gradients.sinks = add_per_head();
  attend_backward(attention, gradients);
  return results;
}

std::vector<Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& head_mask,
    const OptionalTensor& kv_heads, const OptionalTensor& gate, const OptionalTensor& attn_mask,
    const OptionalTensor& sinks, int64_t left, int64_t right, double scale, double softcap,
    const std::vector<bool>& wanted) {
  const Inputs inputs{query, key,   value, head_mask, kv_heads, gate, attn_mask,
                      sinks, left, right, scale,     softcap};
  return inputs.in_double() ? backward<double>(inputs, grad, wanted) : backward<float>(inputs, grad, wanted);
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&sparse_heads::cpu::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&sparse_heads::cpu::attention_backward));
}
