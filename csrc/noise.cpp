// Host side of the noise family, shared by all devices: checks, allocation, launch.
#include "noise.h"

#include "scaled_normal.h"
#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr auto normal = normal_cpu;
  static constexpr auto sign_bits = sign_bits_cpu;
  static constexpr auto dropout_mask = dropout_mask_cpu;
  static constexpr auto scaled_normal = scaled_normal_cpu;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cpu;
  static constexpr auto gaussian_draws = gaussian_draws_cpu;
  static constexpr auto gaussian_draws_backward = gaussian_draws_backward_cpu;
  static constexpr auto fold_in = fold_in_cpu;
};
struct Cuda {
  static constexpr auto normal = normal_cuda;
  static constexpr auto sign_bits = sign_bits_cuda;
  static constexpr auto dropout_mask = dropout_mask_cuda;
  static constexpr auto scaled_normal = scaled_normal_cuda;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cuda;
  static constexpr auto gaussian_draws = gaussian_draws_cuda;
  static constexpr auto gaussian_draws_backward = gaussian_draws_backward_cuda;
  static constexpr auto fold_in = fold_in_cuda;
};

template <class Device>
Tensor fold_key(Tensor key, int64_t data) {
  constexpr const char* op = "fold_in";
  OptionalDeviceGuard guard(key);
  Tensor out = empty_like_shape(key, {2}, ScalarType::Long);
  FoldInParams p{key_pointer(op, key, key), data, out.mutable_data_ptr<int64_t>()};
  raise_if(op, Device::fold_in(p, current_stream(key)));
  return out;
}

template <class Device>
Tensor normal(Tensor key, int64_t stream, std::vector<int64_t> size) {
  constexpr const char* op = "normal";
  OptionalDeviceGuard guard(key);
  Tensor out = empty_like_shape(key, size, ScalarType::Float);
  NormalParams p{key_pointer(op, key, key), stream, out.mutable_data_ptr<float>(), out.numel()};
  if (p.count > 0) raise_if(op, Device::normal(p, current_stream(key)));
  return out;
}

template <class Device>
Tensor sign_bits(Tensor key, int64_t stream, bool output, int64_t rows, int64_t columns,
                 int64_t row0, int64_t rows_per_id, std::optional<Tensor> ids) {
  constexpr const char* op = "sign_bits";
  BK_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative");
  OptionalDeviceGuard guard(key);
  Tensor out = empty_like_shape(key, {rows, columns}, ScalarType::Char);
  SignParams p{};
  p.key = key_pointer(op, key, key);
  p.stream = stream;
  p.purpose = output ? kSignOut : kSignIn;
  p.rows = row_ids(op, row0, rows_per_id, ids, rows, key);
  p.out = out.mutable_data_ptr<int8_t>();
  p.count = rows;
  p.columns = columns;
  if (rows > 0 && columns > 0) raise_if(op, Device::sign_bits(p, current_stream(key)));
  return out;
}

template <class Device>
Tensor dropout_mask(Tensor key, int64_t stream, int64_t rows, int64_t columns, int64_t row0,
                    double probability) {
  constexpr const char* op = "dropout_mask";
  BK_CHECK(rows >= 0 && columns >= 0, op, ": rows and columns must not be negative");
  BK_CHECK(probability >= 0.0 && probability < 1.0, op, ": p must be in [0, 1), got ", probability);
  OptionalDeviceGuard guard(key);
  Tensor out = empty_like_shape(key, {rows, columns}, ScalarType::Bool);
  DropoutParams p{key_pointer(op, key, key),
                  stream,
                  row0,
                  probability,
                  static_cast<bool*>(out.mutable_data_ptr()),
                  rows,
                  columns};
  if (rows > 0 && columns > 0) raise_if(op, Device::dropout_mask(p, current_stream(key)));
  return out;
}

template <class Device>
Tensor scaled_normal(Tensor rho, int64_t n, Tensor key, int64_t stream, std::string std) {
  OptionalDeviceGuard guard(rho);
  return draw_scaled_normal("scaled_normal", rho, n, key, stream, std, Device::scaled_normal);
}

template <class Device>
Tensor scaled_normal_backward(Tensor de, Tensor rho, Tensor key, int64_t stream, std::string std) {
  constexpr const char* op = "scaled_normal_backward";
  BK_CHECK(de.dim() == 2 && de.size(0) == rho.size(0), op, ": de must have shape (r, n)");
  BK_CHECK(de.scalar_type() == rho.scalar_type(), op, ": de and rho must have the same dtype");
  check_device(op, "de", de, rho);
  OptionalDeviceGuard guard(rho);
  return scaled_normal_gradient(op, de, rho, key, stream, std, Device::scaled_normal_backward);
}

template <class Device>
Tensor gaussian_draws(Tensor mean, Tensor rho, Tensor draws, Tensor key, int64_t stream,
                      std::string std, bool antithetic) {
  constexpr const char* op = "gaussian_draws";
  BK_CHECK(mean.dim() == 2 && rho.dim() == 2 && mean.size(0) == rho.size(0), op,
           ": mean and rho must have shape (r, n) and (r, n) or (r, 1)");
  BK_CHECK(mean.scalar_type() == rho.scalar_type(), op, ": mean and rho must have the same dtype");
  check_device(op, "rho", rho, mean);
  OptionalDeviceGuard guard(mean);
  mean = row_major(mean);
  rho = row_major(rho);
  draws = row_major(draws);
  DrawParams p = draw_params(op, rho, mean.size(1), draws, key, stream, std, antithetic);
  p.mean = mean.data_ptr();
  Tensor out = empty_like_shape(mean, {p.count, p.r, p.n}, mean.scalar_type());
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  raise_if(op, Device::gaussian_draws(p, current_stream(mean)));
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> gaussian_draws_backward(Tensor grad, Tensor rho, Tensor draws,
                                                   Tensor key, int64_t stream, std::string std,
                                                   bool antithetic, bool need_mean, bool need_rho) {
  constexpr const char* op = "gaussian_draws_backward";
  BK_CHECK(grad.dim() == 3 && rho.dim() == 2 && draws.dim() == 1 && grad.size(0) == draws.size(0) &&
               grad.size(1) == rho.size(0),
           op, ": grad must have shape (D, r, n)");
  BK_CHECK(grad.scalar_type() == rho.scalar_type(), op, ": grad and rho must have the same dtype");
  check_device(op, "grad", grad, rho);
  OptionalDeviceGuard guard(rho);
  grad = row_major(grad);
  rho = row_major(rho);
  draws = row_major(draws);
  DrawParams p = draw_params(op, rho, grad.size(2), draws, key, stream, std, antithetic);
  p.grad = grad.data_ptr();
  Tensor dmean =
      empty_like_shape(rho, {need_mean ? p.r : 0, need_mean ? p.n : 0}, rho.scalar_type());
  Tensor drho =
      empty_like_shape(rho, {need_rho ? p.r : 0, need_rho ? rho.size(1) : 0}, rho.scalar_type());
  p.dmean = need_mean ? dmean.mutable_data_ptr() : nullptr;
  p.drho = need_rho ? drho.mutable_data_ptr() : nullptr;
  if (dmean.numel() + drho.numel() > 0)
    raise_if(op, Device::gaussian_draws_backward(p, current_stream(rho)));
  return {dmean, drho};
}

template <class Device>
void noise_ops(Library& m) {
  m.impl("fold_in", TORCH_BOX(&fold_key<Device>));
  m.impl("normal", TORCH_BOX(&normal<Device>));
  m.impl("sign_bits", TORCH_BOX(&sign_bits<Device>));
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask<Device>));
  m.impl("scaled_normal", TORCH_BOX(&scaled_normal<Device>));
  m.impl("scaled_normal_backward", TORCH_BOX(&scaled_normal_backward<Device>));
  m.impl("gaussian_draws", TORCH_BOX(&gaussian_draws<Device>));
  m.impl("gaussian_draws_backward", TORCH_BOX(&gaussian_draws_backward<Device>));
}
BK_REGISTER(noise_ops)

}  // namespace
}  // namespace bayes_kernels
