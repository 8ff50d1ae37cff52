// The operators of shared masks: the choice of way, and the registration. Their schemas are defined in Python.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/arguments.h"
#include "cpu/counters.h"
#include "cpu/gather.h"
#include "cpu/kernels.h"
#include "params.h"

namespace sparse_heads::cpu {
namespace {

int64_t requests(const Tensor& input) { return input.dim() >= 3 ? input.size(0) : 1; }

bool in_place_kernels_cover(const Tensor& input) { return has_avx512() && is_float32(input); }

// All tokens of `input`, `stride` apart, with rows and columns still to come.
Projection shared_projection(const Tensor& input, int64_t stride) {
  Projection projection{float_data(input), {}, {}};
  projection.jobs.resize(1);
  std::vector<Token>& tokens = projection.jobs[0].tokens;
  tokens.resize(count_tokens(input));
  for (size_t t = 0; t < tokens.size(); ++t) tokens[t] = {static_cast<int64_t>(t) * stride, static_cast<int64_t>(t)};
  return projection;
}

struct InWeight {
  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<HeadRun> runs;
  int64_t kept;

  // Whether kernels can walk it where it lies.
  bool has_plain_rows() const { return weight.stride(1) == 1 && (!bias || bias->stride(0) == 1); }

  // Replaces weight and bias by their kept rows alone.
  void compact(int64_t head_dim) {
    weight = gather_heads(weight, 0, runs, head_dim);
    if (bias) bias = gather_heads(*bias, 0, runs, head_dim);
    runs.clear();
    if (kept > 0) runs.push_back({0, 0, kept});
  }
};

std::vector<Tensor> in_projection_in_place(const Tensor& x, std::vector<InWeight>& ins, int64_t head_dim) {
  const std::optional<int64_t> stride = token_stride(x);
  const Tensor input = stride ? x : torch::stable::contiguous(x);
  const int64_t columns = input.size(input.dim() - 1);
  Projection projection = shared_projection(input, stride.value_or(columns));
  Job& job = projection.jobs[0];
  if (columns > 0) job.column_runs.push_back({0, 0, columns});
  std::vector<Tensor> outputs;
  outputs.reserve(ins.size());
  for (InWeight& in : ins) {
    if (!in.has_plain_rows()) {
      in.compact(head_dim);
      in.weight = torch::stable::contiguous(in.weight);
      if (in.bias) in.bias = torch::stable::contiguous(*in.bias);
    }
    const int64_t width = in.kept * head_dim;
    outputs.push_back(empty_output(input, width));
    const float* weight = float_data(in.weight);
    const int64_t weight_stride = in.weight.stride(0);
    const float* bias = in.bias ? float_data(*in.bias) : nullptr;
    float* output = mutable_float_data(outputs.back());
    for (const HeadRun& run : in.runs) {
      const int64_t first = run.first_head * head_dim;
      job.row_runs.push_back(
          {weight + first * weight_stride, weight_stride, bias ? bias + first : nullptr,
           output + run.position * head_dim, width, run.heads * head_dim});
    }
  }
  project(projection, static_cast<int64_t>(job.tokens.size()));
  return outputs;
}

std::vector<Tensor> in_projection_forward(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const std::vector<Tensor>& kept, int64_t head_dim) {
  check_in_projection(x, weights, biases, "kept", kept, head_dim);
  std::vector<InWeight> ins;
  ins.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const ArgumentName name{"kept", static_cast<int64_t>(i)};
    std::vector<HeadRun> runs = find_runs(name, kept[i], weights[i].size(0) / head_dim);
    ins.push_back({weights[i], biases[i], std::move(runs), kept[i].size(0)});
  }
  for (const InWeight& in : ins) items_ran[kInProjection] += requests(x) * in.kept;
  if (in_place_kernels_cover(x)) return in_projection_in_place(x, ins, head_dim);

  std::vector<Tensor> outputs;
  for (InWeight& in : ins) {
    in.compact(head_dim);
    outputs.push_back(linear(x, in.weight, in.bias));
  }
  return outputs;
}

Tensor out_projection_in_place(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const std::vector<HeadRun>& runs,
    bool wide, int64_t head_dim) {
  const std::optional<int64_t> stride = token_stride(heads);
  const Tensor input = stride ? heads : torch::stable::contiguous(heads);
  const bool gathered = weight.stride(1) != 1;
  const Tensor rows = gathered ? torch::stable::contiguous(gather_heads(weight, 1, runs, head_dim)) : weight;
  const bool plain_bias = !bias || bias->stride(0) == 1;
  const std::optional<Tensor> offsets = plain_bias ? bias : std::optional(torch::stable::contiguous(*bias));
  const int64_t width = weight.size(0);
  const Tensor output = empty_output(input, width);
  Projection projection = shared_projection(input, stride.value_or(input.size(input.dim() - 1)));
  Job& job = projection.jobs[0];
  job.row_runs.push_back(
      {float_data(rows), rows.stride(0), offsets ? float_data(*offsets) : nullptr, mutable_float_data(output), width,
       width});
  for (const HeadRun& run : runs) {
    const int64_t original = run.first_head * head_dim;
    const int64_t compact = run.position * head_dim;
    job.column_runs.push_back({wide ? original : compact, gathered ? compact : original, run.heads * head_dim});
  }
  project(projection, static_cast<int64_t>(job.tokens.size()));
  return output;
}

Tensor out_projection_forward(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& kept,
    int64_t head_dim) {
  check_out_projection(heads, weight, bias, head_dim);
  const int64_t all_columns = weight.size(1);
  const std::vector<HeadRun> runs = find_runs({"kept"}, kept, all_columns / head_dim);
  const int64_t columns = heads.size(heads.dim() - 1);
  const int64_t kept_columns = kept.size(0) * head_dim;
  STD_TORCH_CHECK(
      columns == kept_columns || columns == all_columns, "heads: wanted ", kept_columns, " columns (kept heads) or ",
      all_columns, " (all heads), got ", columns);
  const bool wide = columns != kept_columns;

  items_ran[kOutProjection] += requests(heads) * kept.size(0);
  if (in_place_kernels_cover(heads)) return out_projection_in_place(heads, weight, bias, runs, wide, head_dim);
  const Tensor input = wide ? gather_heads(heads, heads.dim() - 1, runs, head_dim) : heads;
  return linear(input, gather_heads(weight, 1, runs, head_dim), bias);
}

std::vector<int64_t> items_run(bool reset) {
  std::vector<int64_t> items(items_ran, items_ran + kOperators);
  if (reset) std::fill_n(items_ran, static_cast<int>(kOperators), 0);
  return items;
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("in_projection_forward", TORCH_BOX(&sparse_heads::cpu::in_projection_forward));
  m.impl("out_projection_forward", TORCH_BOX(&sparse_heads::cpu::out_projection_forward));
}

// Takes no tensor, so no device leads to it.
STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CompositeExplicitAutograd, m) {
  m.impl("items_run", TORCH_BOX(&sparse_heads::cpu::items_run));
}
