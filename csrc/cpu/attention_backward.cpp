#include "cpu/attention_backward.h"

#include "cpu/attention_kernels.h"

namespace sparse_heads::cpu {
namespace {

#if SPARSE_HEADS_HAVE_AVX512
SPARSE_HEADS_AVX512 void run_group_on_avx512(
    const Attention<float>& attention, const AttentionGradients<float>& gradients, const HeadGroup& group) {
  run_backward_group<Avx512>(attention, gradients, group);
}

SPARSE_HEADS_AVX2 void run_group_on_avx2(
    const Attention<float>& attention, const AttentionGradients<float>& gradients, const HeadGroup& group) {
  run_backward_group<Avx2>(attention, gradients, group);
}
#endif

template <class Scalar>
void run_group(
    const Attention<Scalar>& attention, const AttentionGradients<Scalar>& gradients, const HeadGroup& group) {
#if SPARSE_HEADS_HAVE_AVX512
  if constexpr (std::is_same_v<Scalar, float>) {
    if (has_avx512()) return run_group_on_avx512(attention, gradients, group);
    if (has_avx2()) return run_group_on_avx2(attention, gradients, group);
  }
#endif
  run_backward_group<Baseline<Scalar>>(attention, gradients, group);
}

}  // namespace

template <class Scalar>
void attend_backward(const Attention<Scalar>& attention, const AttentionGradients<Scalar>& gradients) {
  const HeadGroups groups(attention);
  const double products = 2.5 * static_cast<double>(groups.pairs() * attention.queries) *
      static_cast<double>(attention.keys * (attention.head_dim + attention.value_dim));
  run_items(
      static_cast<int64_t>(groups.get().size()), products,
      [&](int64_t item) { run_group(attention, gradients, groups.get()[item]); },
      [] { BackwardBuffers<Scalar>::of_this_thread().trim(); });
}

template void attend_backward(const Attention<float>&, const AttentionGradients<float>&);
template void attend_backward(const Attention<double>&, const AttentionGradients<double>&);

}  // namespace sparse_heads::cpu
