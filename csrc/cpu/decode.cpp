// The raw decode operator: checks, and the registration. Its schema is defined in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "cpu/attention_arguments.h"
#include "cpu/counters.h"
#include "cpu/decode_kernel.h"
#include "decode_params.h"

namespace sparse_heads::cpu {
namespace {

struct Inputs {
  const Tensor& query;
  const Tensor& key_cache;
  const Tensor& value_cache;
  const Tensor& cache_lengths;
  const OptionalTensor& head_mask;
  const OptionalTensor& kv_heads;
  const OptionalTensor& block_table;
  const OptionalTensor& gate;
  const OptionalTensor& sinks;
  int64_t left;
  double scale;
  double softcap;
};

// Caches are [B, H_kv, S_max, D], or with a block table [pages, H_kv, page size, D].
template <class Scalar>
Attention<Scalar> check_caches(const Inputs& inputs) {
  const Tensor& query = inputs.query;
  const Tensor& key = inputs.key_cache;
  const Tensor& value = inputs.value_cache;
  check_like({"query"}, query, query, 4);
  check_like({"key_cache"}, key, query, 4);
  check_like({"value_cache"}, value, query, 4);
  const Element element = element_of({"query"}, query);
  STD_TORCH_CHECK(element != Element::kBool, "query: wanted a floating dtype, got bool");
  Attention<Scalar> attention{};
  attention.requests = query.size(0);
  attention.heads = query.size(1);
  attention.queries = query.size(2);
  attention.head_dim = query.size(3);
  attention.kv_heads = key.size(1);
  attention.keys = key.size(2);
  attention.value_dim = value.size(3);
  check_at_least({"query"}, "number of positions", attention.queries, 1);
  check_equal({"key_cache"}, "columns", key.size(3), attention.head_dim);
  for (int64_t i = 0; i < 3; ++i) check_equal({"value_cache"}, "size", value.size(i), key.size(i));
  attention.query = array4(query, element);
  attention.key = array4(key, element);
  attention.value = array4(value, element);
  return attention;
}

// [requests], of int32 or int64.
std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t requests) {
  const ArgumentName name{"cache_lengths"};
  check_on_cpu(name, lengths);
  check_equal(name, "dimensions", lengths.dim(), 1);
  check_equal(name, "requests", lengths.size(0), requests);
  const bool wide = dtype_number(lengths) == aoti_torch_dtype_int64();
  STD_TORCH_CHECK(
      wide || dtype_number(lengths) == aoti_torch_dtype_int32(), name, ": wanted int32 or int64, got ",
      torch::headeronly::toString(lengths.scalar_type()));
  std::vector<int64_t> read(requests);
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t place = i * lengths.stride(0);
    read[i] = wide ? static_cast<const int64_t*>(lengths.const_data_ptr())[place]
                   : static_cast<const int32_t*>(lengths.const_data_ptr())[place];
  }
  return read;
}

// No row outside the caches may be read.
template <class Scalar>
void check_lengths_and_pages(const Decode<Scalar>& decode, int64_t pages) {
  const Attention<Scalar>& attention = decode.attention;
  for (int64_t request = 0; request < attention.requests; ++request) {
    const int64_t length = decode.lengths[request];
    STD_TORCH_CHECK(
        length >= attention.queries && length <= attention.keys, "cache_lengths: wanted lengths from ",
        attention.queries, " to ", attention.keys, ", got ", length, " for request ", request);
    if (!decode.block_table.data) continue;
    for (int64_t i = 0; i * decode.page_size < length; ++i) {
      const int64_t page = decode.block_table.at(request, i);
      STD_TORCH_CHECK(
          page >= 0 && page < pages, "block_table: wanted pages from 0 to ", pages - 1, ", got ", page, " for request ",
          request);
    }
  }
}

template <class Scalar>
Tensor run(const Inputs& inputs) {
  Decode<Scalar> decode{};
  Attention<Scalar>& attention = decode.attention;
  attention = check_caches<Scalar>(inputs);
  const int64_t requests = attention.requests;
  const int64_t heads = attention.heads;
  const int32_t query_dtype = dtype_number(inputs.query);
  const int32_t dtype = std::is_same_v<Scalar, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  attention.kv_head_of = check_kv_heads({"key_cache"}, inputs.kv_heads, heads, attention.kv_heads);
  if (inputs.head_mask) {
    attention.head_mask =
        array2<const bool>({"head_mask"}, *inputs.head_mask, requests, heads, aoti_torch_dtype_bool());
  }
  if (inputs.gate) attention.gate = array2<const Scalar>({"gate"}, *inputs.gate, requests, heads, dtype);
  if (inputs.sinks) attention.sinks = array2<const Scalar>({"sinks"}, *inputs.sinks, requests, heads, dtype);
  if (inputs.block_table) {
    const Tensor& table = *inputs.block_table;
    check_equal({"block_table"}, "dimensions", table.dim(), 2);
    decode.page_size = attention.keys;
    attention.keys = decode.page_size * table.size(1);
    decode.block_table = array2<const int32_t>(
        {"block_table"}, table, requests, table.size(1), aoti_torch_dtype_int32(), "pages of a request");
  } else {
    check_equal({"key_cache"}, "requests", inputs.key_cache.size(0), requests);
  }
  attention.left = inputs.left;
  set_numbers(attention, inputs.scale, inputs.softcap);
  const std::vector<int64_t> lengths = read_lengths(inputs.cache_lengths, requests);
  decode.lengths = lengths.data();
  check_lengths_and_pages(decode, inputs.key_cache.size(0));

  const int64_t queries = attention.queries;
  const int64_t columns = attention.value_dim;
  const Tensor output = empty_strided(
      {requests, heads, queries, columns}, {queries * heads * columns, columns, heads * columns, 1}, query_dtype);
  attention.output = array4(output, attention.query.element);
  items_ran[kAttention] += decode_attention(decode);
  return output;
}

Tensor attention_decode(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_lengths,
    const OptionalTensor& head_mask, const OptionalTensor& kv_heads, const OptionalTensor& block_table,
    const OptionalTensor& gate, const OptionalTensor& sinks, int64_t left, double scale, double softcap) {
  const Inputs inputs{query, key_cache, value_cache, cache_lengths, head_mask, kv_heads, block_table,
                      gate,  sinks,     left,        scale,         softcap};
  return dtype_number(query) == aoti_torch_dtype_float64() ? run<double>(inputs) : run<float>(inputs);
}

}  // namespace
}  // namespace sparse_heads::cpu

STABLE_TORCH_LIBRARY_IMPL(sparse_heads, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&sparse_heads::cpu::attention_decode));
}
