// The r x r part of the tall family: from Gram matrices to the coefficients of y = x a + d b, by a
// team of threads (core/small_linalg.h), the same source for all devices.
#pragma once

#include <cmath>

#include "core/small_linalg.h"
#include "tall.h"

namespace bayes_kernels {

// Eigenvalues of the Gram matrix farther apart than this ask for a second one: its rounding errors,
// about 1e-16 of its norm, would show in the result. 1e7: condition number 3e3 of the tall matrix,
// error 1e-9.
constexpr double kRefineSpread = 1e7;
// Beyond this the smallest ones are rounding errors: condition number 1e7.
constexpr double kSingularSpread = 1e14;
// Bound below which the Newton-Schulz iteration is taken in place of eigenvalues: spread 19.
constexpr double kNewtonSchulzLimit = 0.9;
// Gram matrices after the first.
constexpr int kMaxRefinements = 3;

// Matrices of r * ld numbers that the solver needs, and numbers behind them.
constexpr int kSolveMatrices = 5;
constexpr int kSolveNumbers = 3 * kMaxTallRank;

enum class Factor : int { kResolved, kShifted, kNotFinite, kZero };

// factor: the matrix p for which t p is orthonormal if g = t^T t: g^(-1/2), or the inverse of the
// upper Cholesky factor. *spread: the condition number of g, or a bound or an estimate of it. Where
// g is singular to working precision, that of g plus a small multiple of I (of its diagonal), which
// has the same polar (Q) factor and a condition number that the next Gram matrix resolves:
// kShifted. g is used up; pivots of at most `least` count as zero. work: 4 matrices of r * ld;
// numbers: kSolveNumbers.
template <class Team>
BK_HD_LARGE Factor factor_gram(Retraction retraction, double* g, double* p, double* work,
                               double* numbers, int r, int ld, double least, double* spread) {
  double trace = 0, check = 0;
  for (int i = 0; i < r; ++i) {
    trace += g[i * ld + i];
    check += g[i * ld + i] * 0.0;
  }
  *spread = 1;
  if (check != 0.0 || !(trace <= 1.7e308)) return Factor::kNotFinite;
  if (!(trace > 1e-290)) return Factor::kZero;
  if (retraction == Retraction::kQr) {
    double* u = work;
    double* diagonal = numbers;
    const auto invert = [&] {
      invert_upper<Team>(u, p, r, ld);
      // Of u with unit columns: the eigenvalues of its Gram matrix add up to r, so that the sum of
      // their inverses less r - 1 is that of the smallest, to within 1. The largest is 1 to r.
      double squares = 0;
      for (int i = 0; i < r; ++i)
        for (int j = i + Team::lane(); j < r; j += Team::lanes())
          squares += diagonal[i] * p[i * ld + j] * p[i * ld + j];
      *spread = Team::sum(squares) - (r - 1);
      Team::sync();
    };
    if (cholesky<Team>(g, u, diagonal, r, ld, 1.0 / kSingularSpread, least)) {
      invert();
      // A pivot behind a small one can be larger than the limit and still nothing but the rounding
      // errors that the small one has amplified.
      if (*spread < kSingularSpread) return Factor::kResolved;
    }
    Team::sync();
    for (int i = 0; i < r; ++i)
      if (!(g[i * ld + i] > 0)) return Factor::kZero;
    Team::sync();
    for (int i = Team::thread(); i < r; i += Team::threads())
      g[i * ld + i] *= 1.0 + 10.0 * r / kSingularSpread;
    Team::sync();
    if (!cholesky<Team>(g, u, diagonal, r, ld, 0.0, 0.0)) return Factor::kZero;
    invert();
    return Factor::kShifted;
  }
  if (inverse_root_near_identity<Team>(g, p, work, r, ld, kNewtonSchulzLimit, spread))
    return Factor::kResolved;
  double *w = work, *v = work + r * ld;
  double *values = numbers, *weights = numbers + kMaxTallRank, *flags = numbers + 2 * kMaxTallRank;
  Team::sync();
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) w[i * ld + j] = g[i * ld + j];
  Team::sync();
  symmetric_eigen<Team>(w, v, values, flags, r, ld);
  double largest = values[0], smallest = values[0];
  for (int i = 1; i < r; ++i) {
    largest = values[i] > largest ? values[i] : largest;
    smallest = values[i] < smallest ? values[i] : smallest;
  }
  const bool resolved = smallest * kSingularSpread > largest;
  const double shift = resolved ? 0.0 : 10.0 * r / kSingularSpread * largest;
  *spread = (largest + shift) / (resolved ? smallest : shift);
  for (int i = Team::thread(); i < r; i += Team::threads()) {
    const double value = values[i] > 0 || resolved ? values[i] : 0.0;
    weights[i] = 1.0 / sqrt(value + shift);
  }
  Team::sync();
  compose<Team>(v, weights, p, r, ld);
  return resolved ? Factor::kResolved : Factor::kShifted;
}

// Where a retraction stands after a Gram matrix.
struct RetractState {
  int32_t info;
  int32_t more;   // the Gram matrix of t p is wanted
  double spread;  // of the first resolved Gram matrix
};

// After the first Gram matrix of t: p and what is to be done.
template <class Team>
BK_HD_LARGE RetractState first_factor(Retraction retraction, double* g, double* p, double* work,
                                      double* numbers, int r, int ld) {
  RetractState state{kRetracted, 0, 1.0};
  switch (factor_gram<Team>(retraction, g, p, work, numbers, r, ld, 0.0, &state.spread)) {
    case Factor::kNotFinite:
      state.info = kNotFinite;
      break;
    case Factor::kZero:
      state.info = kRankDeficient;
      break;
    case Factor::kShifted:
      state.info = kShifted;
      state.more = 1;
      break;
    default:
      state.more = state.spread > kRefineSpread ? 1 : 0;
      state.info = state.more != 0 ? kRefined : kRetracted;
  }
  return state;
}

// Of the Gram matrix g of a Stiefel step: squared size of what is added up over that of the sum.
BK_HD double cancellation(const double* g, const double* dd, double lr, int r, int ld) {
  double parts = 0, sum = 0;
  for (int i = 0; i < r; ++i) {
    parts += lr * lr * dd[i * ld + i];
    sum += g[i * ld + i];
  }
  return 1 + parts / fabs(sum);
}

// A Gram matrix that is the small difference of large ones has lost digits, which the spread of its
// eigenvalues does not show: a step 1e5 times the size of x left a defect of 5e-5.
BK_HD void refine_if_cancelled(double cancelled, RetractState* state) {
  if (state->info >= kRankDeficient || !(cancelled > kRefineSpread)) return;
  state->more = 1;
  if (state->info == kRetracted) state->info = kRefined;
}

// After the Gram matrix g of t p: p <- p times its factor. next: one matrix; work: 4, of which
// p may not be a part.
template <class Team>
BK_HD_LARGE void next_factor(Retraction retraction, double* g, double* p, double* next,
                             double* work, double* numbers, int r, int ld, RetractState* state) {
  double spread;
  // The columns of t p are at most of unit length: what is left of one may be rounding errors.
  const Factor factor =
      factor_gram<Team>(retraction, g, next, work, numbers, r, ld, 1.0 / kSingularSpread, &spread);
  state->more = 0;
  if (factor != Factor::kResolved) {
    state->info = kRankDeficient;  // singular still, with the shift of the first Gram matrix
    return;
  }
  state->more = spread > kRefineSpread ? 1 : 0;
  state->spread = spread > state->spread ? spread : state->spread;
  multiply<Team>(p, next, work, r, ld);
  Team::sync();
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) p[i * ld + j] = work[i * ld + j];
  Team::sync();
}

// t = x - lr (d - x sym(k)) = x a - lr d with a = I + lr sym(k), k = x^T d; its Gram matrix is
// g = a s a - lr (a k + (a k)^T) + lr^2 dd, as a is symmetric. s = x^T x, dd = d^T d. work: 2
// matrices. g may be s.
template <class Team>
BK_HD void stiefel_gram(const double* s, const double* k, const double* dd, double lr, double* a,
                        double* g, double* work, int r, int ld) {
  double* half = work;
  double* product = work + r * ld;
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads())
      a[i * ld + j] = (i == j ? 1.0 : 0.0) + lr * 0.5 * (k[i * ld + j] + k[j * ld + i]);
  Team::sync();
  multiply<Team>(s, a, half, r, ld);
  multiply<Team>(a, half, product, r, ld);  // a s a
  Team::sync();
  multiply<Team>(a, k, half, r, ld);
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads())
      g[i * ld + j] = 0.5 * (product[i * ld + j] + product[j * ld + i]) -
                      lr * (half[i * ld + j] + half[j * ld + i]) + lr * lr * dd[i * ld + j];
  Team::sync();
}

// Landing: y = x a + d b. Field: a = lam (s - I) - k^T, b = s; step: I - lr a, -lr b. k = x^T d.
template <class Team>
BK_HD void landing_coefficients(const double* s, const double* k, double lam, double lr, bool step,
                                double* a, double* b, int r, int ld) {
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) {
      const double one = i == j ? 1.0 : 0.0;
      const double field = lam * (s[i * ld + j] - one) - k[j * ld + i];
      a[i * ld + j] = step ? one - lr * field : field;
      b[i * ld + j] = step ? -lr * s[i * ld + j] : s[i * ld + j];
    }
  Team::sync();
}

}  // namespace bayes_kernels
