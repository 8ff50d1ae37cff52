// Masks with a row a request, cut into blocks whose requests all run the same heads: the work that can be shared.
#pragma once

#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/arguments.h"

namespace sparse_heads::cpu {

// Every one of these requests runs every one of these heads; both ascending.
struct MaskBlock {
  std::vector<int64_t> requests;
  std::vector<int64_t> heads;
};

// The masks of several weights side by side, and the same transposed: a row of bytes a request, and a row a head.
class RequestMasks {
 public:
  RequestMasks(int64_t requests, int64_t heads)
      : requests_(requests), heads_(heads), by_request_(requests * heads), by_head_(requests * heads) {}

  // Fills the columns from `first_head` on with a bool [requests, heads] tensor.
  void set(ArgumentName name, const Tensor& mask, int64_t first_head, int64_t heads) {
    STD_TORCH_CHECK(
        dtype_number(mask) == aoti_torch_dtype_bool() && mask.is_cpu() && mask.dim() == 2, name,
        ": wanted a bool tensor of two dimensions on the CPU, got ", mask.dim(), " dimensions of ",
        torch::headeronly::toString(mask.scalar_type()));
    check_equal(name, "rows, one a request,", mask.size(0), requests_);
    check_equal(name, "columns, one a head,", mask.size(1), heads);
    const char* values = static_cast<const char*>(mask.const_data_ptr());
    const int64_t request_stride = mask.stride(0);
    const int64_t head_stride = mask.stride(1);
    for (int64_t request = 0; request < requests_; ++request) {
      for (int64_t head = 0; head < heads; ++head) {
        const char runs = values[request * request_stride + head * head_stride] != 0;
        by_request_[request * heads_ + first_head + head] = runs;
        by_head_[(first_head + head) * requests_ + request] = runs;
        items_ += runs;
      }
    }
  }

  int64_t requests() const { return requests_; }
  int64_t heads() const { return heads_; }
  int64_t items() const { return items_; }
  bool runs(int64_t request, int64_t head) const { return by_request_[request * heads_ + head]; }

  // Requests of equal masks with all their heads, those without heads too.
  std::vector<MaskBlock> blocks_of_requests() const {
    std::vector<MaskBlock> blocks;
    for (std::vector<int64_t>& requests : equal_rows(by_request_, requests_, heads_)) {
      std::vector<int64_t> heads = set_columns(by_request_, requests[0], heads_);
      blocks.push_back({std::move(requests), std::move(heads)});
    }
    return blocks;
  }

  // Heads that the same requests run, with all these requests, those without requests too.
  std::vector<MaskBlock> blocks_of_heads() const {
    std::vector<MaskBlock> blocks;
    for (std::vector<int64_t>& heads : equal_rows(by_head_, heads_, requests_)) {
      std::vector<int64_t> requests = set_columns(by_head_, heads[0], requests_);
      blocks.push_back({std::move(requests), std::move(heads)});
    }
    return blocks;
  }

  // The one of both cuts that costs less as products of all tokens of a block with all its heads' rows.
  std::vector<MaskBlock> cheaper_blocks(int64_t tokens, int64_t head_dim) const {
    std::vector<MaskBlock> of_requests = blocks_of_requests();
    std::vector<MaskBlock> of_heads = blocks_of_heads();
    return cost(of_heads, tokens, head_dim) < cost(of_requests, tokens, head_dim) ? of_heads : of_requests;
  }

 private:
  // In rows: of whole panels of tokens, and of packing, which takes as long as a tile of rows.
  static int64_t cost(const std::vector<MaskBlock>& blocks, int64_t tokens, int64_t head_dim) {
    constexpr int64_t kPanelTokens = 16;
    constexpr int64_t kPackingRows = 16;
    int64_t rows = 0;
    for (const MaskBlock& block : blocks) {
      const int64_t panels = ceil_divide(static_cast<int64_t>(block.requests.size()) * tokens, kPanelTokens);
      rows += panels * (static_cast<int64_t>(block.heads.size()) * head_dim + kPackingRows);
    }
    return rows;
  }

  static std::vector<std::vector<int64_t>> equal_rows(const std::vector<char>& matrix, int64_t rows, int64_t columns) {
    std::vector<std::vector<int64_t>> classes;
    std::unordered_map<std::string_view, size_t> known;
    for (int64_t row = 0; row < rows; ++row) {
      const std::string_view values(matrix.data() + row * columns, columns);
      const auto found = known.try_emplace(values, classes.size());
      if (found.second) classes.emplace_back();
      classes[found.first->second].push_back(row);
    }
    return classes;
  }

  static std::vector<int64_t> set_columns(const std::vector<char>& matrix, int64_t row, int64_t columns) {
    std::vector<int64_t> set;
    for (int64_t column = 0; column < columns; ++column) {
      if (matrix[row * columns + column]) set.push_back(column);
    }
    return set;
  }

  int64_t requests_;
  int64_t heads_;
  int64_t items_ = 0;
  std::vector<char> by_request_;
  std::vector<char> by_head_;
};

// The masks of all weights `[heads * head_dim, columns]`, in their order.
inline RequestMasks join_masks(
    int64_t requests, const std::vector<Tensor>& masks, const std::vector<Tensor>& weights, int64_t head_dim) {
  int64_t heads = 0;
  for (const Tensor& weight : weights) heads += weight.size(0) / head_dim;
  RequestMasks joined(requests, heads);
  int64_t first_head = 0;
  for (size_t i = 0; i < masks.size(); ++i) {
    const int64_t count = weights[i].size(0) / head_dim;
    joined.set({"masks", static_cast<int64_t>(i)}, masks[i], first_head, count);
    first_head += count;
  }
  return joined;
}

// The runs of neighbours among those of `heads` (ascending) that lie in [first, first + count), counted from `first`.
inline std::vector<HeadRun> runs_within(const std::vector<int64_t>& heads, int64_t first, int64_t count) {
  std::vector<HeadRun> runs;
  int64_t position = 0;
  for (const int64_t head : heads) {
    if (head < first || head >= first + count) continue;
    const int64_t own = head - first;
    if (!runs.empty() && own == runs.back().first_head + runs.back().heads) {
      runs.back().heads += 1;
    } else {
      runs.push_back({own, position, 1});
    }
    ++position;
  }
  return runs;
}

}  // namespace sparse_heads::cpu
