// Host side of the noise family, shared by all devices: checks, allocation, launch.
#include "noise.h"

#include "scaled_normal.h"
#include "torch_stable.h"

namespace bayes_kernels {
namespace {

#if !defined(BAYES_KERNELS_SIM)
struct Cpu {
  static constexpr auto normal = normal_cpu;
  static constexpr auto sign_bits = sign_bits_cpu;
  static constexpr auto dropout_mask = dropout_mask_cpu;
  static constexpr auto scaled_normal = scaled_normal_cpu;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cpu;
  static constexpr auto fold_in = fold_in_cpu;
};
#endif
#if defined(BAYES_KERNELS_CUDA) || defined(BAYES_KERNELS_SIM)
struct Cuda {
  static constexpr auto normal = normal_cuda;
  static constexpr auto sign_bits = sign_bits_cuda;
  static constexpr auto dropout_mask = dropout_mask_cuda;
  static constexpr auto scaled_normal = scaled_normal_cuda;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cuda;
  static constexpr auto fold_in = fold_in_cuda;
};
#endif

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
  BK_CHECK(rows_per_id >= 1, op, ": rows_per_id must be at least 1, got ", rows_per_id);
  OptionalDeviceGuard guard(key);
  Tensor out = empty_like_shape(key, {rows, columns}, ScalarType::Char);
  SignParams p{};
  p.key = key_pointer(op, key, key);
  p.stream = stream;
  p.purpose = output ? kSignOut : kSignIn;
  p.rows = RowIds{nullptr, row0, rows_per_id};
  if (ids.has_value()) {
    BK_CHECK(ids->dim() == 1 && ids->size(0) == rows && ids->scalar_type() == ScalarType::Long &&
                 ids->is_contiguous(),
             op, ": ids must be a contiguous int64 tensor of ", rows, " elements");
    check_device(op, "ids", *ids, key);
    p.rows.ids = ids->const_data_ptr<int64_t>();
  }
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

}  // namespace
}  // namespace bayes_kernels

#define BK_REGISTER_NOISE(key, Device)                                                        \
  STABLE_TORCH_LIBRARY_IMPL(BK_LIBRARY, key, m) {                                             \
    m.impl("fold_in", TORCH_BOX(&bayes_kernels::fold_key<bayes_kernels::Device>));            \
    m.impl("normal", TORCH_BOX(&bayes_kernels::normal<bayes_kernels::Device>));               \
    m.impl("sign_bits", TORCH_BOX(&bayes_kernels::sign_bits<bayes_kernels::Device>));         \
    m.impl("dropout_mask", TORCH_BOX(&bayes_kernels::dropout_mask<bayes_kernels::Device>));   \
    m.impl("scaled_normal", TORCH_BOX(&bayes_kernels::scaled_normal<bayes_kernels::Device>)); \
    m.impl("scaled_normal_backward",                                                          \
           TORCH_BOX(&bayes_kernels::scaled_normal_backward<bayes_kernels::Device>));         \
  }

#if defined(BAYES_KERNELS_SIM)
BK_REGISTER_NOISE(CPU, Cuda)
#else
BK_REGISTER_NOISE(CPU, Cpu)
#if defined(BAYES_KERNELS_CUDA)
BK_REGISTER_NOISE(CUDA, Cuda)
#endif
#endif
