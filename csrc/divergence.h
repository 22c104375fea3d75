// Divergence family: closed-form Gaussian KL over a list of tensors, its gradient and its
// decoupled in-place step. Torch-free.
#pragma once

#include "core/portable.h"
#include "core/posterior.h"

namespace bayes_kernels {

// One (mean, rho) pair. rho has the shape of mean, or one value per row of `columns` means.
struct DivergenceItem {
  void* mean;
  void* rho;
  void* dmean;  // gradient op only; may be null
  void* drho;   // gradient op only; may be null
  double prior_std;
  int64_t count;    // elements of mean
  int64_t columns;  // elements of mean that share one rho (1: rho has mean's shape)
};

struct DivergenceParams {
  const DivergenceItem* items;  // host memory
  int64_t n_items;
  bool f64;
  Std std;
  Direction direction;
  const void* weight;  // step and gradient: 0-dim tensor on the op's device, fp32 (fp64)
  void* out;           // value: one fp64 number
  void* workspace;     // divergence_workspace bytes
};

#define BK_DECLARE_DIVERGENCE(device)                                                 \
  int64_t divergence_workspace_##device(const DivergenceParams& p);                   \
  const char* gaussian_kl_##device(const DivergenceParams& p, void* stream);          \
  const char* gaussian_kl_gradient_##device(const DivergenceParams& p, void* stream); \
  const char* gaussian_kl_step_##device(const DivergenceParams& p, void* stream)

BK_DECLARE_DIVERGENCE(cpu);
BK_DECLARE_DIVERGENCE(baseline);
BK_DECLARE_DIVERGENCE(avx2);
BK_DECLARE_DIVERGENCE(avx512);
BK_DECLARE_DIVERGENCE(cuda);

}  // namespace bayes_kernels
