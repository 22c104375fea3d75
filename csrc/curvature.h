// Curvature family: rank-k factors of growing sums of outer products. Torch-free.
//
// For each block of at most kBlockRows rows: H = [factor, rows^T]; the Gram matrix H^T H,
// of which partial sums are fp32 and their sum is fp64;
// its eigenvectors of the k largest eigenvalues (core/small_linalg.h); factor <- H V_k, in place.
#pragma once

#include "core/portable.h"
#include "core/small_linalg.h"

namespace bayes_kernels {

constexpr int kBlockRows = 32;
constexpr int kMaxFactorRank = kMaxSmall - kBlockRows;

// Row-major and contiguous, in the op's dtype.
struct LowRankItem {
  void* factor;      // (d, k)
  const void* rows;  // (n, d)
  int64_t d;
  int64_t k;
  int64_t n;
};

struct LowRankParams {
  const LowRankItem* items;  // host memory; no two factors overlap
  int64_t n_items;
  bool f64;         // on the CPU only
  void* workspace;  // low_rank_workspace bytes
};

#define BK_DECLARE_CURVATURE(device)                           \
  int64_t low_rank_workspace_##device(const LowRankParams& p); \
  const char* low_rank_update_##device(const LowRankParams& p, void* stream)

BK_DECLARE_CURVATURE(cpu);
BK_DECLARE_CURVATURE(baseline);
BK_DECLARE_CURVATURE(avx2);
BK_DECLARE_CURVATURE(avx512);
BK_DECLARE_CURVATURE(cuda);

}  // namespace bayes_kernels
