#include "cpu/attention_forward.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/attention_few.h"
#include "cpu/attention_kernels.h"

namespace sparse_heads::cpu {
namespace {

#if SPARSE_HEADS_HAVE_AVX512
SPARSE_HEADS_AVX512 void run_unit_on_avx512(const Attention<float>& attention, const ForwardUnit& unit) {
  if (few_suit(attention, *unit.group)) return run_few_group(attention, *unit.group);
  run_forward_unit<Avx512>(attention, unit);
}

SPARSE_HEADS_AVX2 void run_unit_on_avx2(const Attention<float>& attention, const ForwardUnit& unit) {
  run_forward_unit<Avx2>(attention, unit);
}
#endif

template <class Scalar>
void run_unit(const Attention<Scalar>& attention, const ForwardUnit& unit) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Scalar, float>) {
    if (has_avx512()) return run_unit_on_avx512(attention, unit);
    if (has_avx2()) return run_unit_on_avx2(attention, unit);
  }
#endif
  run_forward_unit<Baseline<Scalar>>(attention, unit);
}

// The rows of heads that do not run.
template <class Scalar>
void write_zeros(const Attention<Scalar>& attention, int64_t request) {
  const int64_t size = attention.value_dim * element_size(attention.output.element);
  for (int64_t query = 0; query < attention.queries; ++query) {
    for (int64_t head = 0; head < attention.heads; ++head) {
      if (!attention.runs(request, head)) std::memset(attention.output.at(request, head, query), 0, size);
    }
  }
}

}  // namespace

template <class Scalar>
int64_t attend(const Attention<Scalar>& attention) {
  const HeadGroups groups(attention);
  std::vector<ForwardUnit> units;
  for (const HeadGroup& group : groups.get()) {
    const int64_t blocks = Blocks<Scalar>(attention, group).count();
    for (int64_t first = 0; first < blocks; first += kUnitBlocks) {
      units.push_back({&group, first, std::min(kUnitBlocks, blocks - first)});
    }
  }
  if (attention.right >= 0) {
    // Later queries see more keys, and the longest units come first, so that the threads end together.
    std::stable_sort(units.begin(), units.end(), [&](const ForwardUnit& one, const ForwardUnit& other) {
      return Blocks<Scalar>(attention, *one.group).first_row(one.first_block) >
          Blocks<Scalar>(attention, *other.group).first_row(other.first_block);
    });
  }
  const bool all_run = groups.pairs() == attention.requests * attention.heads;
  const int64_t unit_count = static_cast<int64_t>(units.size());
  const double products = static_cast<double>(groups.pairs() * attention.queries) *
      static_cast<double>(attention.keys * (attention.head_dim + attention.value_dim));
  run_items(unit_count + (all_run ? 0 : attention.requests), products, [&](int64_t item) {
    if (item < unit_count) {
      run_unit(attention, units[item]);
    } else {
      write_zeros(attention, item - unit_count);
    }
  });
  return groups.pairs();
}

template int64_t attend(const Attention<float>&);
template int64_t attend(const Attention<double>&);

}  // namespace sparse_heads::cpu
