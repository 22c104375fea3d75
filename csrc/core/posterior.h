// Parameterisations of a standard deviation and the closed-form Gaussian divergence.
#pragma once

#include <cmath>

#include "portable.h"

namespace bayes_kernels {

// Omega = rho^2 (BLoB), log(1 + e^rho), or rho itself.
enum class Std : int { kSquare, kSoftplus, kDirect };
// kElbo: KL(q || p), the term of the evidence lower bound; kCode: KL(p || q), as ScalaBL's
// published code computes it.
enum class Direction : int { kElbo, kCode };

// |rho| below this is treated as this in derivatives of log(rho^2), which would overflow at 0.
#define BK_MIN_RHO 1e-4

template <class T>
BK_HD T std_of(Std kind, T rho) {
  if (kind == Std::kSquare) return rho * rho;
  if (kind == Std::kSoftplus) return rho > T(20) ? rho : log1p(exp(rho));
  return rho;
}

template <class T>
BK_HD T std_derivative(Std kind, T rho) {
  if (kind == Std::kSquare) return T(2) * rho;
  if (kind == Std::kSoftplus) return T(1) / (T(1) + exp(-rho));
  return T(1);
}

// rho for which a derivative is taken: with std = rho^2, d log(std)/drho = 2 / rho overflows at 0.
BK_HD double guarded(Std kind, double rho) {
  if (kind != Std::kSquare || fabs(rho) >= BK_MIN_RHO) return rho;
  return rho < 0.0 ? -BK_MIN_RHO : BK_MIN_RHO;
}

// KL between N(mean, std^2) and N(0, prior^2) for one weight.
BK_HD double gaussian_kl_term(Direction direction, double mean, double std, double prior) {
  const double s = std > BK_MIN_RHO * BK_MIN_RHO ? std : BK_MIN_RHO * BK_MIN_RHO;
  if (direction == Direction::kElbo)
    return log(prior / s) + (s * s + mean * mean) / (2.0 * prior * prior) - 0.5;
  return log(s / prior) + (prior * prior + mean * mean) / (2.0 * s * s) - 0.5;
}

BK_HD double gaussian_kl_dmean(Direction direction, double mean, double std, double prior) {
  const double s = std > BK_MIN_RHO * BK_MIN_RHO ? std : BK_MIN_RHO * BK_MIN_RHO;
  return direction == Direction::kElbo ? mean / (prior * prior) : mean / (s * s);
}

BK_HD double gaussian_kl_dstd(Direction direction, double mean, double std, double prior) {
  const double s = std > BK_MIN_RHO * BK_MIN_RHO ? std : BK_MIN_RHO * BK_MIN_RHO;
  if (direction == Direction::kElbo) return -1.0 / s + s / (prior * prior);
  return 1.0 / s - (prior * prior + mean * mean) / (s * s * s);
}

}  // namespace bayes_kernels
