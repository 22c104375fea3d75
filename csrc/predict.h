// Predict family: the mean softmax of Gaussian logits and its entropies, by Monte Carlo that is
// streamed in registers. Torch-free.
//
// With ref the log-sum-exp of the mean logits, l_c = mean_c - ref and x the noise of a sample,
// log p_c = l_c + x_c - log N, N = sum_c exp(l_c + x_c). Where noise is bounded (kMaxScale) the
// kernels average exp(x_c) / N, whose logarithm is added to l_c at the end: one exponential per
// class and sample, and no class underflows however small its l_c. Elsewhere every class keeps a
// running maximum of its log-probabilities.
#pragma once

#include <cmath>

#include "core/philox.h"
#include "core/portable.h"

namespace bayes_kernels {

struct PredictParams {
  const int64_t* key;
  int64_t stream;
  RowIds row_ids;  // rows_per_id is 1
  bool f64;        // CPU only
  bool full;       // cov is (rows, classes, classes); on a GPU at most kMaxFull classes
  bool antithetic;
  const void* mean;
  const void* cov;
  void* log_probs;         // (rows, classes)
  void* entropy;           // (rows)
  void* expected_entropy;  // (rows)
  void* standard_error;    // (rows, classes), or null
  int64_t rows, classes;
  int64_t samples;  // even, if antithetic
  void* workspace;
};

constexpr int kMaxFull = 32;  // classes up to which full covariances have a fast path
constexpr int kGroup = 4;     // samples that share a Philox block

// A normal of the noise contract is below sqrt(66 log 2) = 6.77. With every |x_c| <= 5 * 6.77 the
// quotient exp(x_c) / N lies within exp(+-67.7), which fp32 holds.
constexpr double kMaxScale = 5.0;

// fp32 l_c of a class that is absent (mean -inf) or padding: its weight is 0, and 0 * l_c is 0.
constexpr float kAbsent = -1e30f;

// Key of one example's normals: element (s / 4, c, s % 4) is sample s of class c.
BK_HD Key logit_key(const PredictParams& p, int64_t row) {
  const Key base = subkey(load_key(p.key), p.stream, kLogit);
  const int64_t id = sign_row(p.row_ids, row);
  return subkey(fold_in(base, static_cast<uint64_t>(id)), 0, kNormal);
}

// Independent draws: samples, or pairs of samples.
BK_HD int64_t draws_of(const PredictParams& p) { return p.antithetic ? p.samples / 2 : p.samples; }

// How a Cholesky pivot a_jj - sum_k l_jk^2 beside the diagonal entry a_jj is taken: within rounding
// of zero the direction has no variance, clearly below zero the matrix is no covariance.
BK_HD double rounding_unit(bool f64) {
  return f64 ? 2.220446049250313e-16 : 1.1920928955078125e-07;
}
BK_HD bool pivot_is_zero(double pivot, double diagonal, int64_t n, double unit) {
  return !(pivot > 4.0 * static_cast<double>(n) * unit * diagonal);
}
BK_HD bool pivot_is_bad(double pivot, double diagonal, double unit) {
  return !(pivot >= -sqrt(unit) * diagonal) || !(diagonal < HUGE_VAL);
}

// The probabilities of one class in `n` draws: their mean, and the sum of squared distances from
// it.
struct Moments {
  double n, mean, squares;
};

// From sums of d = p - center and of d^2; with a draw as center nothing cancels, wherever draws
// lie.
BK_HD Moments moments_about(double center, double n, double sum, double squares) {
  return {n, center + sum / n, squares - sum * sum / n};
}

// The moments of both sets of draws. Chan, Golub, LeVeque, "Algorithms for computing the sample
// variance", 1983.
BK_HD Moments merged(const Moments& a, const Moments& b) {
  if (b.n == 0.0) return a;
  if (a.n == 0.0) return b;
  const double n = a.n + b.n, apart = b.mean - a.mean;
  return {n, a.mean + apart * (b.n / n), a.squares + b.squares + apart * apart * (a.n * b.n / n)};
}

BK_HD double standard_error_of(const Moments& m) {
  if (!(m.n > 1.0)) return NAN;
  return sqrt((m.squares < 0.0 ? 0.0 : m.squares) / (m.n - 1.0) / m.n);  // a NaN stays one
}

#define BK_DECLARE_PREDICT(device)                            \
  int64_t predict_workspace_##device(const PredictParams& p); \
  const char* mc_predict_##device(const PredictParams& p, void* stream)

BK_DECLARE_PREDICT(cpu);
BK_DECLARE_PREDICT(baseline);
BK_DECLARE_PREDICT(avx2);
BK_DECLARE_PREDICT(avx512);
BK_DECLARE_PREDICT(cuda);

}  // namespace bayes_kernels
