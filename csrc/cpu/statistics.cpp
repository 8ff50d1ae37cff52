// The raw statistics operator: checks, and the registration. Its schema is defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/attention_arguments.h"
#include "cpu/statistics_kernel.h"
#include "statistics_params.h"

namespace sparse_heads::cpu {
namespace {

template <class Scalar>
Tensor run(
    Attention<Scalar> attention, const OptionalTensor& query_mask, const OptionalTensor& key_groups, int64_t groups,
    double hidden) {
  const int64_t requests = attention.requests;
  Statistics<Scalar> statistics{};
  statistics.attention = attention;
  statistics.hidden = static_cast<Scalar>(hidden);
  if (query_mask) {
    statistics.query_mask = array2<const bool>(
        {"query_mask"}, *query_mask, requests, attention.queries, aoti_torch_dtype_bool(), "queries");
  }
  if (key_groups) {
    statistics.key_groups = array2<const int64_t>(
        {"key_groups"}, *key_groups, requests, attention.keys, aoti_torch_dtype_int64(), "positions");
    check_at_least({"num_groups"}, "number", groups, 0);
  } else {
    check_equal({"num_groups"}, "number", groups, 0);
  }
  statistics.groups = groups;
  const int64_t columns = statistics.columns();
  const int64_t heads = attention.heads;
  Tensor sums = empty_strided({requests, heads, columns}, {heads * columns, columns, 1}, aoti_torch_dtype_float64());
  torch::stable::zero_(sums);
  statistics.sums = static_cast<double*>(sums.mutable_data_ptr());
  measure(statistics);
  return sums;
}

Tensor attention_statistics(
    const Tensor& query, const Tensor& key, const OptionalTensor& head_mask, const OptionalTensor& attn_mask,
    const OptionalTensor& query_mask, const OptionalTensor& key_groups, int64_t num_groups, int64_t left, int64_t right,
    double hidden, double scale, double softcap) {
  const auto run_in = [&](auto scalar) {
    using Scalar = decltype(scalar);
    return run(
        check_scores<Scalar>(query, key, head_mask, {}, attn_mask, left, right, scale, softcap), query_mask, key_groups,
        num_groups, hidden);
  };
  return dtype_number(query) == aoti_torch_dtype_float64() ? run_in(double{}) : run_in(float{});
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("attention_statistics", TORCH_BOX(&sparse_heads::cpu::attention_statistics));
}
