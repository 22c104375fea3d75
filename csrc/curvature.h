// Curvature family: growing sums of outer products, as rank-k factors or dense. Torch-free.
//
// Rank k. For each block of at most kBlockRows rows: H = [factor, rows^T]; the Gram matrix H^T H,
// of which partial sums are fp32 and their sum is fp64;
// its eigenvectors of the k largest eigenvalues (core/small_linalg.h); factor <- H V_k, in place.
// Where fp32 products may have left their range, which the trace tells, the Gram matrix is made
// again, in fp64.
//
// Dense (Kronecker factors), side at most kMaxDense: factor <- beta factor + alpha sum_i w_i x_i
// x_i^T. Tiles on one side of the diagonal are computed and mirrored; partial sums over at most 256
// rows are fp32, sums of those fp64. Rows of weight zero are not read.
#pragma once

#include "core/portable.h"
#include "core/small_linalg.h"

namespace bayes_kernels {

constexpr int kBlockRows = 32;
constexpr int kMaxFactorRank = kMaxSmall - kBlockRows;
constexpr double kLeastGramTrace = 1e-20, kMostGramTrace = 1e30;  // of fp32 products that are right

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

constexpr int kMaxDense = 128;

// Row-major and contiguous.
struct KronItem {
  void* factor;         // (d, d); its upper triangle is read
  const void* rows;     // (n, d)
  const void* weights;  // (n,) in the factor's dtype, or null
  int64_t d;
  int64_t n;
  DType dtype;  // of the rows; fp64 beside fp64 factors, and only there
};

struct KronParams {
  const KronItem* items;  // host memory; no two factors overlap
  int64_t n_items;
  bool f64;            // the factors' dtype; on the CPU only
  const double* beta;  // one number on the op's device; where it is zero, factors are not read
  const double* alpha;
  void* workspace;  // kron_workspace bytes
};

#define BK_DECLARE_CURVATURE(device)                                          \
  int64_t low_rank_workspace_##device(const LowRankParams& p);                \
  const char* low_rank_update_##device(const LowRankParams& p, void* stream); \
  int64_t kron_workspace_##device(const KronParams& p);                       \
  const char* kron_accumulate_##device(const KronParams& p, void* stream)

BK_DECLARE_CURVATURE(cpu);
BK_DECLARE_CURVATURE(baseline);
BK_DECLARE_CURVATURE(avx2);
BK_DECLARE_CURVATURE(avx512);
BK_DECLARE_CURVATURE(cuda);

}  // namespace bayes_kernels
