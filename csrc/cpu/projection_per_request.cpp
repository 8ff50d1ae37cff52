// The projections under masks with a row a request. Their schemas are defined in Python.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/arguments.h"
#include "cpu/counters.h"
#include "cpu/gather.h"
#include "cpu/kernels.h"
#include "cpu/mask_blocks.h"
#include "params.h"

namespace sparse_heads::cpu {
namespace {

using Biases = std::vector<std::optional<Tensor>>;

// Whether kernels can walk it where it lies.
bool has_plain_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1;
}

bool kernels_cover(const Tensor& input, const std::vector<Tensor>& weights, const Biases& biases) {
  if (!has_avx512() || !is_float32(input) || !has_plain_rows(input)) return false;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!has_plain_rows(weights[i]) || (biases[i] && !has_plain_rows(*biases[i]))) return false;
  }
  return true;
}

std::vector<Token> tokens_of(const Tensor& input, const std::vector<int64_t>& requests) {
  const int64_t tokens = input.size(1);
  const int64_t request_stride = input.stride(0);
  const int64_t token_stride = input.stride(1);
  std::vector<Token> list;
  list.reserve(requests.size() * tokens);
  for (const int64_t request : requests) {
    for (int64_t t = 0; t < tokens; ++t) {
      list.push_back({request * request_stride + t * token_stride, request * tokens + t});
    }
  }
  return list;
}

// One of several weights that read the same input; its heads are columns `first_head` and on of the masks.
struct InWeight {
  Tensor weight;
  std::optional<Tensor> bias;
  int64_t first_head;
  int64_t heads;
  Tensor output;
};

void add_zero_runs(Projection& projection, const RequestMasks& masks, const InWeight& in, int64_t head_dim) {
  const int64_t tokens = in.output.size(1);
  const int64_t width = in.heads * head_dim;
  for (int64_t request = 0; request < masks.requests(); ++request) {
    float* output = mutable_float_data(in.output) + request * tokens * width;
    for (int64_t head = 0; head < in.heads;) {
      int64_t end = head;
      while (end < in.heads && !masks.runs(request, in.first_head + end)) ++end;
      if (end > head) projection.zero_runs.push_back({output + head * head_dim, width, tokens, (end - head) * head_dim});
      head = end + 1;
    }
  }
}

void in_projection_in_place(const Tensor& x, std::vector<InWeight>& ins, const RequestMasks& masks, int64_t head_dim) {
  Projection projection{float_data(x), {}, {}};
  for (const InWeight& in : ins) add_zero_runs(projection, masks, in, head_dim);
  const int64_t columns = x.size(2);
  // Either cut gives the same bits: an element's order of summation depends on the columns alone.
  for (const MaskBlock& block : masks.cheaper_blocks(x.size(1), head_dim)) {
    if (block.heads.empty() || block.requests.empty()) continue;
    Job job{tokens_of(x, block.requests), {}, {}};
    if (columns > 0) job.column_runs.push_back({0, 0, columns});
    for (const InWeight& in : ins) {
      const int64_t stride = in.weight.stride(0);
      for (const HeadRun& run : runs_within(block.heads, in.first_head, in.heads)) {
        const int64_t first = run.first_head * head_dim;
        job.row_runs.push_back(
            {float_data(in.weight) + first * stride, stride, in.bias ? float_data(*in.bias) + first : nullptr,
             mutable_float_data(in.output) + first, in.heads * head_dim, run.heads * head_dim});
      }
    }
    projection.jobs.push_back(std::move(job));
  }
  project(projection, x.size(1));
}

// The vendor's product may round otherwise for other numbers of rows, so each request has one of its own.
void in_projection_by_gathering(
    const Tensor& x, const std::vector<InWeight>& ins, const RequestMasks& masks, int64_t head_dim) {
  for (const MaskBlock& block : masks.blocks_of_requests()) {
    for (const InWeight& in : ins) {
      const std::vector<HeadRun> runs = runs_within(block.heads, in.first_head, in.heads);
      if (runs.empty()) continue;
      const Tensor rows = gather_heads(in.weight, 0, runs, head_dim);
      std::optional<Tensor> bias;
      if (in.bias) bias = gather_heads(*in.bias, 0, runs, head_dim);
      for (const int64_t request : block.requests) {
        scatter_heads(
            linear(request_of(x, request), rows, bias), request_of(in.output, request), 2, runs, head_dim);
      }
    }
  }
}

std::vector<Tensor> in_projection_forward(
    const Tensor& x, const std::vector<Tensor>& weights, const Biases& biases, const std::vector<Tensor>& masks,
    int64_t head_dim) {
  check_equal({"x"}, "dimensions", x.dim(), 3);
  check_in_projection(x, weights, biases, "masks", masks, head_dim);
  const RequestMasks all_masks = join_masks(x.size(0), masks, weights, head_dim);
  items_ran[kInProjection] += all_masks.items();
  const bool in_place = kernels_cover(x, weights, biases);
  std::vector<InWeight> ins;
  std::vector<Tensor> outputs;
  int64_t first_head = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].size(0);
    outputs.push_back(
        in_place ? empty_output(x, rows) : torch::stable::new_zeros(x, {x.size(0), x.size(1), rows}));
    ins.push_back({weights[i], biases[i], first_head, rows / head_dim, outputs.back()});
    first_head += rows / head_dim;
  }
  if (in_place) {
    in_projection_in_place(x, ins, all_masks, head_dim);
  } else {
    in_projection_by_gathering(x, ins, all_masks, head_dim);
  }
  return outputs;
}

Tensor out_projection_in_place(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const RequestMasks& masks,
    int64_t head_dim) {
  const int64_t width = weight.size(0);
  const Tensor output = empty_output(heads, width);
  Projection projection{float_data(heads), {}, {}};
  for (const MaskBlock& block : masks.blocks_of_requests()) {
    Job job{tokens_of(heads, block.requests), {}, {}};
    job.row_runs.push_back(
        {float_data(weight), weight.stride(0), bias ? float_data(*bias) : nullptr, mutable_float_data(output), width,
         width});
    for (const HeadRun& run : runs_within(block.heads, 0, masks.heads())) {
      const int64_t first = run.first_head * head_dim;
      job.column_runs.push_back({first, first, run.heads * head_dim});
    }
    projection.jobs.push_back(std::move(job));
  }
  project(projection, heads.size(1));
  return output;
}

Tensor out_projection_by_gathering(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const RequestMasks& masks,
    int64_t head_dim) {
  const Tensor output = torch::stable::new_empty(heads, {heads.size(0), heads.size(1), weight.size(0)});
  for (const MaskBlock& block : masks.blocks_of_requests()) {
    const std::vector<HeadRun> runs = runs_within(block.heads, 0, masks.heads());
    const Tensor columns = gather_heads(weight, 1, runs, head_dim);
    for (const int64_t request : block.requests) {
      const Tensor input = gather_heads(request_of(heads, request), 2, runs, head_dim);
      Tensor target = request_of(output, request);
      torch::stable::copy_(target, linear(input, columns, bias));
    }
  }
  return output;
}

Tensor out_projection_forward(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& mask,
    int64_t head_dim) {
  check_equal({"heads"}, "dimensions", heads.dim(), 3);
  check_out_projection(heads, weight, bias, head_dim);
  check_equal({"heads"}, "columns", heads.size(2), weight.size(1));
  RequestMasks masks(heads.size(0), weight.size(1) / head_dim);
  masks.set({"mask"}, mask, 0, masks.heads());
  items_ran[kOutProjection] += masks.items();
  return kernels_cover(heads, {weight}, {bias}) ? out_projection_in_place(heads, weight, bias, masks, head_dim)
                                                : out_projection_by_gathering(heads, weight, bias, masks, head_dim);
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("in_projection_per_request_forward", TORCH_BOX(&sparse_heads::cpu::in_projection_forward));
  m.impl("out_projection_per_request_forward", TORCH_BOX(&sparse_heads::cpu::out_projection_forward));
}
