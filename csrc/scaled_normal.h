// Host side of E = std(rho) . eps and of draws, which ops of the families noise, adapter and
// grouped share.
#pragma once

#include "noise.h"
#include "torch_stable.h"

namespace bayes_kernels {

inline ScaledNormalParams scaled_normal_params(const char* op, const Tensor& rho, int64_t n,
                                               const Tensor& key, int64_t stream,
                                               const std::string& std) {
  BK_CHECK(rho.dim() == 2 && (rho.size(1) == n || rho.size(1) == 1), op,
           ": rho must have shape (r, ", n, ") or (r, 1)");
  BK_CHECK(rho.scalar_type() == ScalarType::Float || rho.scalar_type() == ScalarType::Double, op,
           ": rho must be float32 or float64; convert it");
  ScaledNormalParams p{};
  p.key = key_pointer(op, key, rho);
  p.stream = stream;
  p.std = std_of_name(op, std);
  p.f64 = rho.scalar_type() == ScalarType::Double;
  p.row_constant = rho.size(1) == 1 && n != 1;
  p.rho = rho.data_ptr();
  p.r = rho.size(0);
  p.n = n;
  return p;
}

// (r, n) in the dtype of rho, by a device's launch function.
template <class Launch>
Tensor draw_scaled_normal(const char* op, const Tensor& given, int64_t n, const Tensor& key,
                          int64_t stream, const std::string& std, Launch launch) {
  const Tensor rho = row_major(given);
  ScaledNormalParams p = scaled_normal_params(op, rho, n, key, stream, std);
  Tensor out = empty_like_shape(rho, {p.r, n}, rho.scalar_type());
  p.out = out.mutable_data_ptr();
  if (p.r > 0 && n > 0) raise_if(op, launch(p, current_stream(rho)));
  return out;
}

// drho in the shape and dtype of rho, likewise.
template <class Launch>
Tensor scaled_normal_gradient(const char* op, const Tensor& grad, const Tensor& given,
                              const Tensor& key, int64_t stream, const std::string& std,
                              Launch launch) {
  const Tensor rho = row_major(given), de = row_major(grad);
  ScaledNormalParams p = scaled_normal_params(op, rho, de.size(1), key, stream, std);
  p.de = de.data_ptr();
  Tensor out = empty_like_shape(rho, {rho.size(0), rho.size(1)}, rho.scalar_type());
  p.out = out.mutable_data_ptr();
  if (p.r > 0) raise_if(op, launch(p, current_stream(rho)));
  return out;
}

// What draws and their derivatives take: rho and the numbers of the draws, both contiguous.
inline DrawParams draw_params(const char* op, const Tensor& rho, int64_t n, const Tensor& draws,
                              const Tensor& key, int64_t stream, const std::string& std,
                              bool antithetic) {
  BK_CHECK(draws.dim() == 1 && draws.scalar_type() == ScalarType::Long, op,
           ": draws must be an int64 tensor of one dimension");
  check_device(op, "draws", draws, rho);
  const ScaledNormalParams law = scaled_normal_params(op, rho, n, key, stream, std);
  DrawParams p{};
  p.key = law.key;
  p.stream = stream;
  p.draws = draws.const_data_ptr<int64_t>();
  p.count = draws.size(0);
  p.antithetic = antithetic;
  p.std = law.std;
  p.f64 = law.f64;
  p.row_constant = law.row_constant;
  p.rho = law.rho;
  p.r = law.r;
  p.n = n;
  return p;
}

}  // namespace bayes_kernels
