// See decode_kernel.h.
#include "cpu/decode_kernel.h"

#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/decode_chunk.h"

namespace sparse_heads::cpu {
namespace {

// A chunk of a group; `left` counts the group's chunks that are still to run.
struct DecodeItem {
  const DecodeGroup* group;
  int64_t chunk;
  std::atomic<int64_t>* left;
};

template <class Math, class Scalar = typename Math::Scalar>
SPARSE_HEADS_INLINE void run_item(
    const Decode<Scalar>& decode, const DecodeItem& item, const Partials<Scalar>& partials) {
  run_chunk<Math>(decode, *item.group, item.chunk, partials);
  if (--*item.left == 0) merge_chunks<Math>(decode, *item.group, partials);
}

#if SPARSE_HEADS_HAVE_AVX512
SPARSE_HEADS_AVX512 void run_item_on_avx512(
    const Decode<float>& decode, const DecodeItem& item, const Partials<float>& partials) {
  run_item<Avx512>(decode, item, partials);
}

SPARSE_HEADS_AVX2 void run_item_on_avx2(
    const Decode<float>& decode, const DecodeItem& item, const Partials<float>& partials) {
  run_item<Avx2>(decode, item, partials);
}
#endif

template <class Scalar>
void run_item_anywhere(const Decode<Scalar>& decode, const DecodeItem& item, const Partials<Scalar>& partials) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Scalar, float>) {
    if (has_avx512()) return run_item_on_avx512(decode, item, partials);
    if (has_avx2()) return run_item_on_avx2(decode, item, partials);
  }
#endif
  run_item<Baseline<Scalar>>(decode, item, partials);
}

// The rows of heads that do not run.
template <class Scalar>
void write_zeros(const Attention<Scalar>& attention, int64_t request) {
  const int64_t size = attention.value_dim * element_size(attention.output.element);
  for (int64_t head = 0; head < attention.heads; ++head) {
    if (attention.runs(request, head)) continue;
    for (int64_t query = 0; query < attention.queries; ++query) {
      std::memset(attention.output.at(request, head, query), 0, size);
    }
  }
}

}  // namespace

template <class Scalar>
int64_t decode_attention(const Decode<Scalar>& decode) {
  const Attention<Scalar>& attention = decode.attention;
  const HeadGroups groups(attention);
  std::vector<DecodeGroup> cut;
  cut.reserve(groups.get().size());
  int64_t partial_count = 0;
  double products = 0;
  for (const HeadGroup& heads : groups.get()) {
    const int64_t length = decode.lengths[heads.request];
    const int64_t first_key = decode.first(heads.request, 0);
    const int64_t first_chunk = first_key / kChunkKeys;
    const int64_t chunks = (length - 1) / kChunkKeys + 1 - first_chunk;
    const int64_t queries = heads.count * attention.queries;
    cut.push_back({&heads, first_chunk, chunks, partial_count});
    partial_count += chunks * queries;
    products += static_cast<double>(queries * (length - first_key)) *
        static_cast<double>(attention.head_dim + attention.value_dim);
  }
  std::vector<std::atomic<int64_t>> left(cut.size());
  std::vector<DecodeItem> items;
  for (size_t i = 0; i < cut.size(); ++i) left[i] = cut[i].chunks;
  // Groups of a request take turns: in pages their rows are neighbours.
  for (size_t first = 0, last; first < cut.size(); first = last) {
    for (last = first; last < cut.size() && cut[last].heads->request == cut[first].heads->request;) ++last;
    for (int64_t chunk = 0; chunk < cut[first].chunks; ++chunk) {
      for (size_t i = first; i < last; ++i) items.push_back({&cut[i], chunk, &left[i]});
    }
  }
  Buffer<Scalar> memory;
  Partials<Scalar> partials{nullptr, attention.value_dim};
  partials.data = memory.get(partial_count * partials.stride());

  const bool all_run = groups.pairs() == attention.requests * attention.heads;
  const int64_t item_count = static_cast<int64_t>(items.size());
  run_items(item_count + (all_run ? 0 : attention.requests), products, [&](int64_t item) {
    if (item < item_count) {
      run_item_anywhere(decode, items[item], partials);
    } else {
      write_zeros(attention, item - item_count);
    }
  });
  return groups.pairs();
}

template int64_t decode_attention(const Decode<float>&);
template int64_t decode_attention(const Decode<double>&);

}  // namespace sparse_heads::cpu
