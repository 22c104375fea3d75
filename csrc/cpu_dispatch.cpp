// Picks the instruction set of the CPU kernels at run time.
#include "cpu_isa.h"

#include <cstdlib>
#include <cstring>

#include "activations.h"
#include "adapter.h"
#include "curvature.h"
#include "divergence.h"
#include "grouped.h"
#include "noise.h"
#include "predict.h"
#include "tall.h"

namespace bayes_kernels {
namespace {

Isa detect() {
  Isa isa = Isa::kBaseline;
#if defined(BK_HAVE_X86_PATHS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    isa = Isa::kAvx2;
  if (isa == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isa = Isa::kAvx512;
#endif
  const char* wanted = std::getenv("BAYES_KERNELS_CPU");
  if (wanted != nullptr) {
    if (std::strcmp(wanted, "baseline") == 0) isa = Isa::kBaseline;
    if (std::strcmp(wanted, "avx2") == 0 && isa == Isa::kAvx512) isa = Isa::kAvx2;
  }
  return isa;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* cpu_path_name() {
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

#if defined(BK_HAVE_X86_PATHS)
#define BK_DISPATCH(function, ...)             \
  switch (cpu_isa()) {                         \
    case Isa::kAvx512:                         \
      return function##_avx512(__VA_ARGS__);   \
    case Isa::kAvx2:                           \
      return function##_avx2(__VA_ARGS__);     \
    default:                                   \
      return function##_baseline(__VA_ARGS__); \
  }
#else
#define BK_DISPATCH(function, ...) return function##_baseline(__VA_ARGS__);
#endif

void shrink_list_cpu(const ShrinkParams* p, int64_t count) { BK_DISPATCH(shrink_list, p, count); }

#define BK_LAUNCHER(function, Params) \
  const char* function##_cpu(const Params& p, void* stream) { BK_DISPATCH(function, p, stream) }
#define BK_SIZER(function, Params) \
  int64_t function##_cpu(const Params& p) { BK_DISPATCH(function, p) }

BK_SIZER(shrink_workspace, ShrinkParams)
BK_SIZER(shrink_backward_workspace, ShrinkBackwardParams)
BK_SIZER(expand_workspace, ExpandParams)
BK_SIZER(expand_backward_workspace, ExpandBackwardParams)
BK_LAUNCHER(shrink, ShrinkParams)
BK_LAUNCHER(shrink_backward, ShrinkBackwardParams)
BK_LAUNCHER(expand, ExpandParams)
BK_LAUNCHER(expand_backward, ExpandBackwardParams)

BK_LAUNCHER(group_rows, GroupRowsParams)
BK_SIZER(sampled_shrink_workspace, SampledShrinkParams)
BK_LAUNCHER(sampled_shrink, SampledShrinkParams)
BK_SIZER(grouped_shrink_workspace, Grouped<ShrinkParams>)
BK_SIZER(grouped_shrink_backward_workspace, Grouped<ShrinkBackwardParams>)
BK_SIZER(grouped_expand_workspace, Grouped<ExpandParams>)
BK_SIZER(grouped_expand_backward_workspace, Grouped<ExpandBackwardParams>)
BK_LAUNCHER(grouped_shrink, Grouped<ShrinkParams>)
BK_LAUNCHER(grouped_shrink_backward, Grouped<ShrinkBackwardParams>)
BK_LAUNCHER(grouped_expand, Grouped<ExpandParams>)
BK_LAUNCHER(grouped_expand_backward, Grouped<ExpandBackwardParams>)

BK_LAUNCHER(normal, NormalParams)
BK_LAUNCHER(sign_bits, SignParams)
BK_LAUNCHER(dropout_mask, DropoutParams)
BK_LAUNCHER(scaled_normal, ScaledNormalParams)
BK_LAUNCHER(scaled_normal_backward, ScaledNormalParams)
BK_LAUNCHER(gaussian_draws, DrawParams)
BK_LAUNCHER(gaussian_draws_backward, DrawParams)
BK_LAUNCHER(fold_in, FoldInParams)

BK_LAUNCHER(quantize_activations, QuantizeParams)
BK_LAUNCHER(dequantize_activations, DequantizeParams)

BK_SIZER(divergence_workspace, DivergenceParams)
BK_LAUNCHER(gaussian_kl, DivergenceParams)
BK_LAUNCHER(gaussian_kl_gradient, DivergenceParams)
BK_LAUNCHER(gaussian_kl_step, DivergenceParams)

BK_SIZER(predict_workspace, PredictParams)
BK_LAUNCHER(mc_predict, PredictParams)

BK_SIZER(tall_workspace, TallParams)
BK_LAUNCHER(tall, TallParams)

BK_SIZER(low_rank_workspace, LowRankParams)
BK_LAUNCHER(low_rank_update, LowRankParams)
BK_SIZER(kron_workspace, KronParams)
BK_LAUNCHER(kron_accumulate, KronParams)

}  // namespace bayes_kernels
