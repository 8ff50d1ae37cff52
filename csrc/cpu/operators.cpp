// The raw CPU operators: checks, the choice of way, and the registration. Their schemas are defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/avx512.h"
#include "cpu/gather.h"
#include "cpu/kernels.h"
#include "params.h"

namespace sparse_heads::cpu {
namespace {

using torch::headeronly::ScalarType;

enum Operator { kInProjection, kOutProjection, kOperators };

// (request, head) items that this thread's calls ran, per operator: the proof that skipped heads are skipped.
thread_local int64_t items_ran[kOperators] = {};

int64_t requests(const Tensor& input) { return input.dim() >= 3 ? input.size(0) : 1; }

std::string indexed(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

void check_dtype(const std::string& name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type(), name, ": wanted the dtype of the input, ",
      torch::headeronly::toString(input.scalar_type()), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": wanted a CPU tensor, got one on another device");
}

std::vector<HeadRun> find_runs(const std::string& name, const Tensor& kept, int64_t heads) {
  STD_TORCH_CHECK(
      kept.scalar_type() == ScalarType::Long && kept.dim() == 1 && kept.is_cpu() && kept.is_contiguous(), name,
      ": wanted a contiguous one-dimensional int64 tensor on the CPU, got ", kept.dim(), " dimensions of ",
      torch::headeronly::toString(kept.scalar_type()));
  const int64_t count = kept.size(0);
  const int64_t* head = count > 0 ? kept.const_data_ptr<int64_t>() : nullptr;
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

int64_t count_tokens(const Tensor& input) {
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) tokens *= input.size(i);
  return tokens;
}

// The stride from token to token when one stride fits all leading dimensions and columns are neighbours.
std::optional<int64_t> token_stride(const Tensor& input) {
  const int64_t last = input.dim() - 1;
  const auto sizes = input.sizes();
  const auto strides = input.strides();
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

std::vector<int64_t> with_last(const Tensor& input, int64_t columns) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = columns;
  return sizes;
}

bool in_place_kernels_cover(const Tensor& input) {
  return input.scalar_type() == ScalarType::Float && has_avx512();
}

// Whether kernels can read the rows in place; an expanded or transposed weight is gathered first.
bool has_plain_rows(const Tensor& weight, const std::optional<Tensor>& bias) {
  return weight.stride(1) == 1 && (!bias || bias->stride(0) == 1);
}

#if SPARSE_HEADS_HAVE_AVX512
void project(const Projection& projection) {
  if (projection.tokens == 0 || projection.row_runs.empty()) return;
  if (projection.tokens <= kMaxDotTokens) {
    project_by_dots(projection);
  } else {
    project_by_panels(projection);
  }
}
#else
void project(const Projection&) {}
#endif

struct InWeight {
  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<HeadRun> runs;
  int64_t kept;
};

InWeight check_in_weight(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& kept, int64_t head_dim,
    size_t i) {
  const std::string name = indexed("weights", i);
  check_equal(name, "dimensions", weight.dim(), 2);
  check_dtype(name, weight, x);
  check_equal(name, "columns", weight.size(1), x.size(x.dim() - 1));
  check_whole_heads(name, "rows", weight.size(0), head_dim);
  if (bias) {
    check_dtype(indexed("biases", i), *bias, x);
    check_equal(indexed("biases", i), "dimensions", bias->dim(), 1);
    check_equal(indexed("biases", i), "size", bias->size(0), weight.size(0));
  }
  return {weight, bias, find_runs(indexed("kept", i), kept, weight.size(0) / head_dim), kept.size(0)};
}

// Replaces weight and bias by their kept rows alone.
void compact(InWeight& in, int64_t head_dim) {
  in.weight = gather_heads(in.weight, 0, in.runs, head_dim);
  if (in.bias) in.bias = gather_heads(*in.bias, 0, in.runs, head_dim);
  in.runs.clear();
  if (in.kept > 0) in.runs.push_back({0, 0, in.kept});
}

std::vector<Tensor> in_projection_forward(
    const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
    const std::vector<Tensor>& kept, int64_t head_dim) {
  check_at_least("x", "dimensions", x.dim(), 1);
  check_head_dim(head_dim);
  check_equal("biases", "length", biases.size(), weights.size());
  check_equal("kept", "length", kept.size(), weights.size());
  std::vector<InWeight> ins;
  for (size_t i = 0; i < weights.size(); ++i) {
    ins.push_back(check_in_weight(x, weights[i], biases[i], kept[i], head_dim, i));
  }

  std::vector<Tensor> outputs;
  if (in_place_kernels_cover(x)) {
    const Tensor input = token_stride(x) ? x : torch::stable::contiguous(x);
    Projection projection{input.const_data_ptr<float>(), *token_stride(input), count_tokens(input), {}, {}};
    const int64_t columns = input.size(input.dim() - 1);
    if (columns > 0) projection.column_runs.push_back({0, 0, columns});
    for (InWeight& in : ins) {
      if (!has_plain_rows(in.weight, in.bias)) {
        compact(in, head_dim);
        in.weight = torch::stable::contiguous(in.weight);
        if (in.bias) in.bias = torch::stable::contiguous(*in.bias);
      }
      const int64_t width = in.kept * head_dim;
      outputs.push_back(torch::stable::new_empty(input, with_last(input, width)));
      const int64_t stride = in.weight.stride(0);
      for (const HeadRun& run : in.runs) {
        const int64_t first = run.first_head * head_dim;
        projection.row_runs.push_back(
            {in.weight.const_data_ptr<float>() + first * stride, stride,
             in.bias ? in.bias->const_data_ptr<float>() + first : nullptr,
             outputs.back().mutable_data_ptr<float>() + run.position * head_dim, width, run.heads * head_dim});
      }
    }
    project(projection);
  } else {
    for (InWeight& in : ins) {
      compact(in, head_dim);
      outputs.push_back(linear(x, in.weight, in.bias));
    }
  }
  for (const InWeight& in : ins) items_ran[kInProjection] += requests(x) * in.kept;
  return outputs;
}

Tensor out_projection_forward(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& kept,
    int64_t head_dim) {
  check_at_least("heads", "dimensions", heads.dim(), 1);
  check_head_dim(head_dim);
  check_equal("weight", "dimensions", weight.dim(), 2);
  check_dtype("weight", weight, heads);
  check_whole_heads("weight", "columns", weight.size(1), head_dim);
  if (bias) {
    check_dtype("bias", *bias, heads);
    check_equal("bias", "dimensions", bias->dim(), 1);
    check_equal("bias", "size", bias->size(0), weight.size(0));
  }
  const std::vector<HeadRun> runs = find_runs("kept", kept, weight.size(1) / head_dim);
  const int64_t width = heads.size(heads.dim() - 1);
  const int64_t compact_width = kept.size(0) * head_dim;
  STD_TORCH_CHECK(
      width == compact_width || width == weight.size(1), "heads: wanted ", compact_width, " columns (kept heads) or ",
      weight.size(1), " (all heads), got ", width);
  const bool wide = width != compact_width;

  items_ran[kOutProjection] += requests(heads) * kept.size(0);
  if (!in_place_kernels_cover(heads)) {
    const Tensor input = wide ? gather_heads(heads, heads.dim() - 1, runs, head_dim) : heads;
    return linear(input, gather_heads(weight, 1, runs, head_dim), bias);
  }
  const Tensor input = token_stride(heads) ? heads : torch::stable::contiguous(heads);
  const bool gathered = weight.stride(1) != 1;
  const Tensor rows = gathered ? torch::stable::contiguous(gather_heads(weight, 1, runs, head_dim)) : weight;
  const std::optional<Tensor> plain_bias = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor output = torch::stable::new_empty(input, with_last(input, weight.size(0)));
  Projection projection{input.const_data_ptr<float>(), *token_stride(input), count_tokens(input), {}, {}};
  if (weight.size(0) > 0) {
    projection.row_runs.push_back(
        {rows.const_data_ptr<float>(), rows.stride(0), plain_bias ? plain_bias->const_data_ptr<float>() : nullptr,
         output.mutable_data_ptr<float>(), weight.size(0), weight.size(0)});
  }
  for (const HeadRun& run : runs) {
    const int64_t original = run.first_head * head_dim;
    const int64_t compact = run.position * head_dim;
    projection.column_runs.push_back({wide ? original : compact, gathered ? compact : original, run.heads * head_dim});
  }
  project(projection);
  return output;
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
