// Tall family: Gram matrices, retractions to the Stiefel manifold and the landing field of a list
// of tall matrices (n, r), r at most 64. Torch-free.
//
// Every op is: Gram matrices of the rows of [x d] in fp64; a function of r x r matrices in fp64
// (tall_solve.h); y = x a + d b in a second pass over x and d.
#pragma once

#include "core/portable.h"

namespace bayes_kernels {

constexpr int kMaxTallRank = 64;

enum class TallOp : int {
  kGram,          // out = x^T x
  kRetract,       // x <- retraction of x + d (of x where d is null)
  kStiefelStep,   // x <- retraction of x - lr (d - x sym(x^T d))
  kLandingField,  // out = d (x^T x) - x (d^T x) + lam x (x^T x - I)
  kLandingStep,   // x <- x - lr times that
};
enum class Retraction : int { kPolar, kQr };

// Entries of info.
enum TallInfo : int32_t { kRetracted, kRefined, kShifted, kRankDeficient, kNotFinite };

// Row-major matrices of the op's dtype.
struct TallItem {
  void* x;
  const void* d;  // step, direction or gradient; may be null
  void* out;      // field (n, r), or Gram matrix (r, r)
  int64_t n;
  int64_t r;
};

struct TallParams {
  TallOp op;
  Retraction retraction;
  const TallItem* items;  // host memory
  int64_t n_items;
  bool f64;           // on the CPU only
  const double* lr;   // one number on the op's device; may be null
  const double* lam;  // likewise
  int32_t* info;      // one for each matrix; retractions only
  void* workspace;    // tall_workspace bytes
};

#define BK_DECLARE_TALL(device)                         \
  int64_t tall_workspace_##device(const TallParams& p); \
  const char* tall_##device(const TallParams& p, void* stream)

BK_DECLARE_TALL(cpu);
BK_DECLARE_TALL(baseline);
BK_DECLARE_TALL(avx2);
BK_DECLARE_TALL(avx512);
BK_DECLARE_TALL(cuda);

}  // namespace bayes_kernels
