// Compact copies of the kept heads, for dtypes, layouts and machines that the in-place kernels do not cover.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "params.h"

namespace sparse_heads::cpu {

using torch::stable::Tensor;

// The kept heads' slices of `tensor` along `dim`, side by side. A view when they are neighbours; only they are read.
inline Tensor gather_heads(Tensor tensor, int64_t dim, const std::vector<HeadRun>& runs, int64_t head_dim) {
  if (runs.size() == 1) {
    return torch::stable::narrow(tensor, dim, runs[0].first_head * head_dim, runs[0].heads * head_dim);
  }
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes[dim] = runs.empty() ? 0 : (runs.back().position + runs.back().heads) * head_dim;
  Tensor gathered = torch::stable::new_empty(tensor, sizes);
  for (const HeadRun& run : runs) {
    const int64_t size = run.heads * head_dim;
    Tensor target = torch::stable::narrow(gathered, dim, run.position * head_dim, size);
    torch::stable::copy_(target, torch::stable::narrow(tensor, dim, run.first_head * head_dim, size));
  }
  return gathered;
}

// The inverse of `gather_heads`: writes the kept heads' slices to their places along `dim` of `target`.
inline void scatter_heads(
    const Tensor& gathered, Tensor target, int64_t dim, const std::vector<HeadRun>& runs, int64_t head_dim) {
  for (const HeadRun& run : runs) {
    const int64_t size = run.heads * head_dim;
    Tensor place = torch::stable::narrow(target, dim, run.first_head * head_dim, size);
    Tensor slice = gathered;
    torch::stable::copy_(place, torch::stable::narrow(slice, dim, run.position * head_dim, size));
  }
}

// One request's part of a batch, [1, ...].
inline Tensor request_of(Tensor batch, int64_t request) { return torch::stable::narrow(batch, 0, request, 1); }

// torch's own linear, which the stable operators do not list.
inline Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(input), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sparse_heads::cpu
