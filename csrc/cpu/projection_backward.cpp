// The backward of the projections under masks with a row a request: torch's products over views of the kept heads.
// Requests of equal masks share products; what masked (request, head) pairs hold is not read.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/arguments.h"
#include "cpu/mask_blocks.h"
#include "params.h"

namespace sparse_heads::cpu {
namespace {

// Half-precision sums go on in float32, and are rounded once.
Tensor widen(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  return half ? torch::stable::to(tensor, ScalarType::Float) : tensor;
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  const ScalarType dtype = like.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  return torch::stable::new_zeros(like, sizes, half ? ScalarType::Float : dtype);
}

Tensor slice(Tensor tensor, int64_t dim, int64_t first, int64_t size) {
  return torch::stable::narrow(tensor, dim, first, size);
}

Tensor transpose(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// target += left @ right.
void add_product(const Tensor& target, const Tensor& left, const Tensor& right) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(target.get(), target.get(), left.get(), right.get(), 1.0, 1.0));
}

// target += the sum of the rows of `matrix`.
void add_rows(const Tensor& target, const Tensor& matrix) {
  Tensor ones = torch::stable::new_empty(matrix, {1, matrix.size(0)});
  torch::stable::fill_(ones, 1.0);
  add_product(torch::stable::unsqueeze(target, 0), ones, matrix);
}

// The tokens of some requests of tensors [B, T, columns]: views of neighbours, copies of others.
class RequestTokens {
 public:
  RequestTokens(const Tensor& batch, const std::vector<int64_t>& requests)
      : first_(requests.front()), count_(static_cast<int64_t>(requests.size())) {
    if (requests.back() - first_ + 1 == count_) return;
    index_ = torch::stable::new_empty(batch, {count_}, ScalarType::Long);
    std::copy(requests.begin(), requests.end(), static_cast<int64_t*>(index_->mutable_data_ptr()));
  }

  // [tokens, columns].
  Tensor read(const Tensor& batch) const {
    return matrix(index_ ? index_select(batch) : slice(batch, 0, first_, count_));
  }

  // A matrix [tokens, columns] of zeros that goes to these tokens of `batch`: a view where `read` gives one.
  Tensor accumulator(const Tensor& batch) const {
    if (!index_) return matrix(slice(batch, 0, first_, count_));
    return torch::stable::new_zeros(batch, {count_ * batch.size(1), batch.size(2)});
  }

  void store(const Tensor& accumulated, const Tensor& batch) const {
    if (!index_) return;
    const Tensor source = torch::stable::view(accumulated, {count_, batch.size(1), batch.size(2)});
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(batch), torch::stable::detail::from(int64_t{0}),
        torch::stable::detail::from(*index_), torch::stable::detail::from(source)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_copy_", "", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }

 private:
  static Tensor matrix(const Tensor& batch) {
    return torch::stable::reshape(batch, {batch.size(0) * batch.size(1), batch.size(2)});
  }

  Tensor index_select(const Tensor& batch) const {
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(batch), torch::stable::detail::from(int64_t{0}),
        torch::stable::detail::from(*index_)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  int64_t first_;
  int64_t count_;
  std::optional<Tensor> index_;
};

Tensor in_dtype_of(const Tensor& input, const Tensor& gradient) {
  return gradient.scalar_type() == input.scalar_type() ? gradient
                                                       : torch::stable::to(gradient, input.scalar_type());
}

// One weight and its gradients; its heads are columns `first_head` and on of the masks.
struct InWeight {
  Tensor weight;
  Tensor grad;
  std::optional<Tensor> grad_weight;
  std::optional<Tensor> grad_bias;
  int64_t first_head;
  int64_t heads;
};

Tensor in_projection_input_gradient(
    const Tensor& x, const std::vector<InWeight>& ins, const RequestMasks& masks, int64_t head_dim) {
  const Tensor gradient = zeros(x, {x.size(0), x.size(1), x.size(2)});
  for (const MaskBlock& block : masks.blocks_of_requests()) {
    if (block.heads.empty()) continue;
    const RequestTokens tokens(x, block.requests);
    const Tensor sums = tokens.accumulator(gradient);
    for (const InWeight& in : ins) {
      for (const HeadRun& run : runs_within(block.heads, in.first_head, in.heads)) {
        const int64_t first = run.first_head * head_dim;
        const int64_t rows = run.heads * head_dim;
        add_product(sums, widen(tokens.read(slice(in.grad, 2, first, rows))), widen(slice(in.weight, 0, first, rows)));
      }
    }
    tokens.store(sums, gradient);
  }
  return in_dtype_of(x, gradient);
}

void add_parameter_gradients(
    const Tensor& x, const std::vector<InWeight>& ins, const RequestMasks& masks, int64_t head_dim) {
  for (const MaskBlock& block : masks.cheaper_blocks(x.size(1), head_dim)) {
    if (block.heads.empty() || block.requests.empty()) continue;
    const RequestTokens tokens(x, block.requests);
    const Tensor inputs = widen(tokens.read(x));
    for (const InWeight& in : ins) {
      if (!in.grad_weight && !in.grad_bias) continue;
      for (const HeadRun& run : runs_within(block.heads, in.first_head, in.heads)) {
        const int64_t first = run.first_head * head_dim;
        const int64_t rows = run.heads * head_dim;
        const Tensor outputs = widen(tokens.read(slice(in.grad, 2, first, rows)));
        if (in.grad_weight) add_product(slice(*in.grad_weight, 0, first, rows), transpose(outputs), inputs);
        if (in.grad_bias) add_rows(slice(*in.grad_bias, 0, first, rows), outputs);
      }
    }
  }
}

// The gradients that are needed, of x, then of the weights, then of the biases.
std::vector<Tensor> in_projection_backward(
    const std::vector<Tensor>& grads, const Tensor& x, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& masks, int64_t head_dim, bool need_x, const std::vector<int64_t>& need_weights,
    const std::vector<int64_t>& need_biases) {
  check_equal({"grads"}, "length", grads.size(), weights.size());
  check_equal({"masks"}, "length", masks.size(), weights.size());
  check_equal({"need_weights"}, "length", need_weights.size(), weights.size());
  check_equal({"need_biases"}, "length", need_biases.size(), weights.size());
  const RequestMasks all_masks = join_masks(x.size(0), masks, weights, head_dim);
  std::vector<InWeight> ins;
  int64_t first_head = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].size(0);
    ins.push_back({weights[i], grads[i], std::nullopt, std::nullopt, first_head, rows / head_dim});
    if (need_weights[i]) ins.back().grad_weight = zeros(x, {rows, x.size(2)});
    if (need_biases[i]) ins.back().grad_bias = zeros(x, {rows});
    first_head += rows / head_dim;
  }

  std::vector<Tensor> needed;
  if (need_x) needed.push_back(in_projection_input_gradient(x, ins, all_masks, head_dim));
  bool need_parameters = false;
  for (const InWeight& in : ins) need_parameters = need_parameters || in.grad_weight || in.grad_bias;
  if (need_parameters) add_parameter_gradients(x, ins, all_masks, head_dim);
  for (const InWeight& in : ins) {
    if (in.grad_weight) needed.push_back(in_dtype_of(x, *in.grad_weight));
  }
  for (const InWeight& in : ins) {
    if (in.grad_bias) needed.push_back(in_dtype_of(x, *in.grad_bias));
  }
  return needed;
}

// The gradients that are needed, of heads, then of the weight. The bias's is the sum of `grad`, which no mask changes.
std::vector<Tensor> out_projection_backward(
    const Tensor& grad, const Tensor& heads, const Tensor& weight, const Tensor& mask, int64_t head_dim,
    bool need_heads, bool need_weight) {
  RequestMasks masks(heads.size(0), weight.size(1) / head_dim);
  masks.set({"mask"}, mask, 0, masks.heads());
  std::optional<Tensor> grad_heads;
  std::optional<Tensor> grad_weight;
  if (need_heads) grad_heads = zeros(heads, {heads.size(0), heads.size(1), heads.size(2)});
  if (need_weight) grad_weight = zeros(heads, {weight.size(0), weight.size(1)});

  for (const MaskBlock& block : masks.blocks_of_requests()) {
    if (block.heads.empty()) continue;
    const RequestTokens tokens(heads, block.requests);
    const Tensor outputs = widen(tokens.read(grad));
    std::optional<Tensor> grad_inputs;
    if (grad_heads) grad_inputs = tokens.accumulator(*grad_heads);
    for (const HeadRun& run : runs_within(block.heads, 0, masks.heads())) {
      const int64_t first = run.first_head * head_dim;
      const int64_t columns = run.heads * head_dim;
      if (grad_heads) {
        add_product(slice(*grad_inputs, 1, first, columns), outputs, widen(slice(weight, 1, first, columns)));
      }
      if (grad_weight) {
        const Tensor inputs = widen(tokens.read(slice(heads, 2, first, columns)));
        add_product(slice(*grad_weight, 1, first, columns), transpose(outputs), inputs);
      }
    }
    if (grad_heads) tokens.store(*grad_inputs, *grad_heads);
  }

  std::vector<Tensor> needed;
  if (grad_heads) needed.push_back(in_dtype_of(heads, *grad_heads));
  if (grad_weight) needed.push_back(in_dtype_of(heads, *grad_weight));
  return needed;
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("in_projection_per_request_backward", TORCH_BOX(&sparse_heads::cpu::in_projection_backward));
  m.impl("out_projection_per_request_backward", TORCH_BOX(&sparse_heads::cpu::out_projection_backward));
}
