// Host side of the activations family, shared by all devices: checks, allocation, launch.
#include "activations.h"

#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr auto quantize = quantize_activations_cpu;
  static constexpr auto dequantize = dequantize_activations_cpu;
  static constexpr bool f64 = true;
};
struct Cuda {
  static constexpr auto quantize = quantize_activations_cuda;
  static constexpr auto dequantize = dequantize_activations_cuda;
  static constexpr bool f64 = false;
};

template <class Device>
DType activation_type(const char* op, const Tensor& t) {
  const DType type = dtype_of(op, t);
  BK_CHECK(Device::f64 || type != DType::kF64, op,
           ": x must be float32, bfloat16 or float16 on a GPU; convert it");
  return type;
}

// Rows and columns of a tensor (..., n).
std::pair<int64_t, int64_t> rows_of(const char* op, const char* name, const Tensor& t) {
  BK_CHECK(t.dim() >= 1, op, ": ", name, " must have shape (..., n), got a number");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return {rows, t.size(t.dim() - 1)};
}

template <class Device>
std::tuple<Tensor, Tensor> quantize_activations(Tensor x, Tensor key, int64_t stream,
                                                int64_t row0) {
  constexpr const char* op = "quantize_activations";
  QuantizeParams p{};
  p.dtype = activation_type<Device>(op, x);
  std::tie(p.rows, p.n) = rows_of(op, "x", x);
  OptionalDeviceGuard guard(x);
  p.key = key_pointer(op, key, x);
  p.stream = stream;
  p.row0 = row0;
  x = row_major(x);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  Tensor codes = empty_like_shape(x, sizes, ScalarType::Char);
  Tensor scales = empty_like_shape(x, {p.rows, ceil_div(p.n, kScaleBlock)}, ScalarType::Byte);
  if (codes.numel() == 0) return {codes, scales};
  p.x = x.data_ptr();
  p.codes = codes.mutable_data_ptr<int8_t>();
  p.scales = scales.mutable_data_ptr<uint8_t>();
  raise_if(op, Device::quantize(p, current_stream(x)));
  return {codes, scales};
}

template <class Device>
Tensor dequantize_activations(Tensor codes, Tensor scales, ScalarType dtype) {
  constexpr const char* op = "dequantize_activations";
  BK_CHECK(codes.scalar_type() == ScalarType::Char && scales.scalar_type() == ScalarType::Byte, op,
           ": codes must be int8 and scales uint8; take both from quantize_activations");
  DequantizeParams p{};
  std::tie(p.rows, p.n) = rows_of(op, "codes", codes);
  BK_CHECK(
      scales.dim() == 2 && scales.size(0) == p.rows && scales.size(1) == ceil_div(p.n, kScaleBlock),
      op, ": scales must have shape (rows, ceil(n / 32)) = (", p.rows, ", ",
      ceil_div(p.n, kScaleBlock), "); take them from the call that made the codes");
  check_device(op, "scales", scales, codes);
  OptionalDeviceGuard guard(codes);
  codes = row_major(codes);
  scales = row_major(scales);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < codes.dim(); ++i) sizes.push_back(codes.size(i));
  Tensor x = empty_like_shape(codes, sizes, dtype);
  p.dtype = activation_type<Device>(op, x);
  if (x.numel() == 0) return x;
  p.codes = codes.const_data_ptr<int8_t>();
  p.scales = scales.const_data_ptr<uint8_t>();
  p.x = x.mutable_data_ptr();
  raise_if(op, Device::dequantize(p, current_stream(codes)));
  return x;
}

template <class Device>
void activation_ops(Library& m) {
  m.impl("quantize_activations", TORCH_BOX(&quantize_activations<Device>));
  m.impl("dequantize_activations", TORCH_BOX(&dequantize_activations<Device>));
}
BK_REGISTER(activation_ops)

}  // namespace
}  // namespace bayes_kernels
