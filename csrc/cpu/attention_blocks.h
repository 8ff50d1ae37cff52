// How the work is cut: a group is a (request, key/value head) with its query heads that run, a block is up to two
// vectors of a group's queries, one a lane. Both depend on the request's own mask and on shapes only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "attention_params.h"
#include "cpu/attention_vectors.h"

namespace sparse_heads::cpu {

struct HeadGroup {
  int64_t request;
  int64_t kv_head;
  const int64_t* heads;
  int64_t count;
};

// All groups of a call; key/value heads without a query head that runs are left out.
class HeadGroups {
 public:
  template <class Scalar>
  explicit HeadGroups(const Attention<Scalar>& attention) {
    std::vector<int64_t> ordered(attention.heads);
    std::iota(ordered.begin(), ordered.end(), 0);
    std::stable_sort(ordered.begin(), ordered.end(), [&](int64_t one, int64_t other) {
      return attention.kv_head(one) < attention.kv_head(other);
    });
    running_.reserve(attention.requests * attention.heads);
    for (int64_t request = 0; request < attention.requests; ++request) {
      for (const int64_t head : ordered) {
        if (!attention.runs(request, head)) continue;
        const int64_t kv_head = attention.kv_head(head);
        if (groups_.empty() || groups_.back().request != request || groups_.back().kv_head != kv_head) {
          groups_.push_back({request, kv_head, running_.data() + running_.size(), 0});
        }
        running_.push_back(head);
        groups_.back().count += 1;
      }
    }
  }
  HeadGroups(const HeadGroups&) = delete;

  const std::vector<HeadGroup>& get() const { return groups_; }
  int64_t pairs() const { return static_cast<int64_t>(running_.size()); }

 private:
  std::vector<int64_t> running_;
  std::vector<HeadGroup> groups_;
};

template <class Scalar>
struct Block {
  static constexpr int64_t kMaxLanes = 2 * kVectorLanes<Scalar>;

  int64_t request, kv_head;
  int64_t vectors;
  int64_t count;  // queries; lanes beyond repeat the last one, and their results are dropped
  int64_t head[kMaxLanes], position[kMaxLanes];
  // What each query sees is first_key to last_key, none where they cross.
  Integer<Scalar> first_key[kMaxLanes], last_key[kMaxLanes];
  int64_t begin, end;                // the keys that some query sees
  int64_t common_begin, common_end;  // the keys that all queries see

  int64_t lanes() const { return vectors * kVectorLanes<Scalar>; }
};

// Blocks of a group. Below one vector of queries the heads of a group share blocks, else every block has one head.
template <class Scalar>
class Blocks {
 public:
  Blocks(const Attention<Scalar>& attention, const HeadGroup& group)
      : attention_(attention),
        group_(group),
        shared_(attention.queries < kVectorLanes<Scalar>),
        rows_(shared_ ? attention.queries * group.count : attention.queries),
        blocks_per_head_((rows_ + kMaxLanes - 1) / kMaxLanes) {}

  int64_t count() const {
    return shared_ ? blocks_per_head_ : blocks_per_head_ * group_.count;
  }

  // Of the first query of a block.
  int64_t first_row(int64_t index) const { return index % blocks_per_head_ * kMaxLanes; }

  Block<Scalar> get(int64_t index) const {
    const int64_t first = first_row(index);
    const int64_t head = index / blocks_per_head_;
    Block<Scalar> block;
    block.request = group_.request;
    block.kv_head = group_.kv_head;
    block.count = std::min(kMaxLanes, rows_ - first);
    block.vectors = block.count > kVectorLanes<Scalar> ? 2 : 1;
    block.begin = block.common_end = attention_.keys;
    block.end = block.common_begin = 0;
    for (int64_t lane = 0; lane < block.lanes(); ++lane) {
      const int64_t row = first + std::min(lane, block.count - 1);
      const int64_t position = shared_ ? row % attention_.queries : row;
      block.head[lane] = group_.heads[shared_ ? row / attention_.queries : head];
      block.position[lane] = position;
      const int64_t own = attention_.keys - attention_.queries + position;
      const int64_t first_key = attention_.left < 0 ? 0 : std::max<int64_t>(0, own - attention_.left);
      const int64_t last_key =
          attention_.right < 0 ? attention_.keys - 1 : std::min(attention_.keys - 1, own + attention_.right);
      block.first_key[lane] = static_cast<Integer<Scalar>>(first_key);
      block.last_key[lane] = static_cast<Integer<Scalar>>(last_key);
      if (first_key <= last_key) {
        block.begin = std::min(block.begin, first_key);
        block.end = std::max(block.end, last_key + 1);
      }
      block.common_begin = std::max(block.common_begin, first_key);
      block.common_end = std::min(block.common_end, last_key + 1);
    }
    return block;
  }

 private:
  static constexpr int64_t kMaxLanes = Block<Scalar>::kMaxLanes;

  const Attention<Scalar>& attention_;
  const HeadGroup& group_;
  const bool shared_;
  const int64_t rows_;
  const int64_t blocks_per_head_;
};

// Runs every item once, on as many threads as `products` (multiplications in all) are worth. Which thread runs an item
// is left to chance: items differ in length. Every thread ends with `finish`.
template <class Function, class Finish>
void run_items(int64_t items, double products, const Function& run, const Finish& finish) {
  constexpr double kProductsPerThread = 128 * 1024;
  const int64_t worth = std::max<int64_t>(1, static_cast<int64_t>(std::min(1e6, products / kProductsPerThread)));
  const int64_t threads = std::min({worth, items, static_cast<int64_t>(torch::stable::get_num_threads())});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item = next++; item < items; item = next++) run(item);
      finish();
    }
  });
}

template <class Function>
void run_items(int64_t items, double products, const Function& run) {
  run_items(items, products, run, [] {});
}

// Memory that a thread keeps between calls.
template <class Scalar>
class Buffer {
 public:
  Scalar* get(int64_t size) {
    const size_t lines = (size * sizeof(Scalar) + sizeof(Line) - 1) / sizeof(Line);
    if (memory_.size() < lines) memory_.resize(lines);
    return reinterpret_cast<Scalar*>(memory_.data());
  }

  size_t bytes() const { return memory_.size() * sizeof(Line); }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> memory_;
};

}  // namespace sparse_heads::cpu
