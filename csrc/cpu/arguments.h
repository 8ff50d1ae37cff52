// Reading the operators' tensors: checks that need torch, and the layouts that the kernels can walk.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "params.h"

namespace sparse_heads::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The shim's number of a dtype: comparing it costs far less than `scalar_type()`, which small calls would feel.
inline int32_t dtype_number(const Tensor& tensor) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

inline bool is_float32(const Tensor& tensor) { return dtype_number(tensor) == aoti_torch_dtype_float32(); }

inline void check_like(ArgumentName name, const Tensor& tensor, const Tensor& input, int64_t dimensions) {
  STD_TORCH_CHECK(
      dtype_number(tensor) == dtype_number(input), name, ": wanted the dtype of the input, ",
      torch::headeronly::toString(input.scalar_type()), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": wanted a CPU tensor, got one on another device");
  check_equal(name, "dimensions", tensor.dim(), dimensions);
}

inline std::vector<HeadRun> find_runs(ArgumentName name, const Tensor& kept, int64_t heads) {
  STD_TORCH_CHECK(
      dtype_number(kept) == aoti_torch_dtype_int64() && kept.dim() == 1 && kept.is_cpu() && kept.is_contiguous(), name,
      ": wanted a contiguous one-dimensional int64 tensor on the CPU, got ", kept.dim(), " dimensions of ",
      torch::headeronly::toString(kept.scalar_type()));
  const int64_t count = kept.size(0);
  const int64_t* head = static_cast<const int64_t*>(kept.const_data_ptr());
  check_kept(name, head, count, heads);
  std::vector<HeadRun> runs;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && head[i] == head[i - 1] + 1) {
      runs.back().heads += 1;
    } else {
      runs.push_back({head[i], i, 1});
    }
  }
  return runs;
}

inline int64_t count_tokens(const Tensor& input) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) tokens *= input.size(i);
  return tokens;
}

// Checks of the arguments that every in-projection has; `masks_name`: those that say which heads run, one a weight.
inline void check_in_projection(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const char* masks_name, const std::vector<Tensor>& masks, int64_t head_dim) {
  check_at_least({"x"}, "dimensions", x.dim(), 1);
  check_head_dim(head_dim);
  check_equal({"biases"}, "length", biases.size(), weights.size());
  check_equal({masks_name}, "length", masks.size(), weights.size());
  const int64_t columns = x.size(x.dim() - 1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    const ArgumentName weight_name{"weights", index};
    check_like(weight_name, weights[i], x, 2);
    check_equal(weight_name, "columns", weights[i].size(1), columns);
    check_whole_heads(weight_name, "rows", weights[i].size(0), head_dim);
    if (biases[i]) {
      check_like({"biases", index}, *biases[i], x, 1);
      check_equal({"biases", index}, "size", biases[i]->size(0), weights[i].size(0));
    }
  }
}

// Checks of the arguments that every output projection has.
inline void check_out_projection(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, int64_t head_dim) {
  check_at_least({"heads"}, "dimensions", heads.dim(), 1);
  check_head_dim(head_dim);
  check_like({"weight"}, weight, heads, 2);
  check_whole_heads({"weight"}, "columns", weight.size(1), head_dim);
  if (bias) {
    check_like({"bias"}, *bias, heads, 1);
    check_equal({"bias"}, "size", bias->size(0), weight.size(0));
  }
}

// The stride from token to token when one stride fits all leading dimensions and columns are neighbours.
inline std::optional<int64_t> token_stride(const Tensor& input) {
  const auto sizes = input.sizes();
  const auto strides = input.strides();
  const int64_t last = input.dim() - 1;
  if (strides[last] != 1 && sizes[last] > 1) return std::nullopt;
  int64_t stride = sizes[last];
  int64_t expected = -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (expected < 0) {
      stride = strides[i];
    } else if (strides[i] != expected) {
      return std::nullopt;
    }
    expected = strides[i] * sizes[i];
  }
  return stride;
}

// An uninitialised float32 tensor of the input's leading sizes, by the shim: the dispatcher costs thrice as much.
inline Tensor empty_output(const Tensor& input, int64_t columns) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = columns;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      input.dim(), sizes.data(), strides.data(), aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline const float* float_data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline float* mutable_float_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace sparse_heads::cpu
