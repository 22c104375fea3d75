// Noise family: the numbers that the fused ops use, and the scaled noise matrix E = std(rho) . eps.
// Torch-free.
#pragma once

#include "core/philox.h"
#include "core/portable.h"
#include "core/posterior.h"

namespace bayes_kernels {

struct NormalParams {
  const int64_t* key;
  int64_t stream;
  float* out;
  int64_t count;
};

struct SignParams {
  const int64_t* key;
  int64_t stream;
  int purpose;  // kSignIn or kSignOut
  RowIds rows;
  int8_t* out;  // (count, columns), +1 or -1
  int64_t count, columns;
};

struct DropoutParams {
  const int64_t* key;
  int64_t stream;
  int64_t row0;
  double probability;
  bool* out;  // (rows, columns), true where kept
  int64_t rows, columns;
};

// e = std(rho) . eps, or drho = reduce(de . eps) . std'(rho)
struct ScaledNormalParams {
  const int64_t* key;
  int64_t stream;
  Std std;
  bool f64;
  bool row_constant;  // rho is (r, 1)
  const void* rho;
  const void* de;  // backward only
  void* out;       // (r, n), or shape of rho in backward
  int64_t r, n;
};

// out[i] = mean + s std(rho) . eps of draw draws[i]; or dmean = sum_i grad[i], drho = std'(rho) .
// sum_i s grad[i] . eps, in order of i
struct DrawParams {
  const int64_t* key;
  int64_t stream;
  const int64_t* draws;
  int64_t count;
  bool antithetic;
  Std std;
  bool f64;
  bool row_constant;  // rho is (r, 1)
  const void* mean;   // (r, n), forward only
  const void* rho;
  const void* grad;  // (count, r, n), backward only
  void* out;         // (count, r, n)
  void* dmean;       // backward: (r, n), or null
  void* drho;        // backward: shape of rho, or null
  int64_t r, n;
};

struct FoldInParams {
  const int64_t* key;
  int64_t data;
  int64_t* out;
};

#define BK_DECLARE_NOISE(device)                                                          \
  const char* normal_##device(const NormalParams& p, void* stream);                       \
  const char* sign_bits_##device(const SignParams& p, void* stream);                      \
  const char* dropout_mask_##device(const DropoutParams& p, void* stream);                \
  const char* scaled_normal_##device(const ScaledNormalParams& p, void* stream);          \
  const char* scaled_normal_backward_##device(const ScaledNormalParams& p, void* stream); \
  const char* gaussian_draws_##device(const DrawParams& p, void* stream);                 \
  const char* gaussian_draws_backward_##device(const DrawParams& p, void* stream);        \
  const char* fold_in_##device(const FoldInParams& p, void* stream)

BK_DECLARE_NOISE(cpu);
BK_DECLARE_NOISE(baseline);
BK_DECLARE_NOISE(avx2);
BK_DECLARE_NOISE(avx512);
BK_DECLARE_NOISE(cuda);

// out[i] = normal first + i of a subkey, on the calling thread: for other CPU kernels that are
// compiled for the same instruction set.
void normals_baseline(Key sub, int64_t first, int64_t count, float* out);
void normals_avx2(Key sub, int64_t first, int64_t count, float* out);
void normals_avx512(Key sub, int64_t first, int64_t count, float* out);

}  // namespace bayes_kernels
