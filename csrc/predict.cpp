// Host side of the predict family, shared by all devices: checks, allocation, launch.
#include "predict.h"

#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr int64_t most_full = int64_t{1} << 31;
  static constexpr auto workspace = predict_workspace_cpu;
  static constexpr auto predict = mc_predict_cpu;
};
struct Cuda {
  static constexpr int64_t most_full = kMaxFull;
  static constexpr auto workspace = predict_workspace_cuda;
  static constexpr auto predict = mc_predict_cuda;
};

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> mc_predict(Tensor mean, Tensor cov, Tensor key,
                                                      int64_t stream, int64_t row0,
                                                      std::optional<Tensor> ids, int64_t n_samples,
                                                      bool antithetic, bool standard_error) {
  constexpr const char* op = "mc_predict";
  const ScalarType type = mean.scalar_type();
  BK_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
           ": mean must be float32 or float64; convert it");
#if defined(BAYES_KERNELS_SIM)
  BK_CHECK(type == ScalarType::Float, op, ": mean must be float32 on a GPU; convert it");
#else
  BK_CHECK(type == ScalarType::Float || !mean.is_cuda(), op,
           ": mean must be float32 on a GPU; convert it");
#endif
  BK_CHECK(mean.dim() == 2 && mean.size(1) >= 1, op,
           ": mean must have shape (B, C) with at least one class");
  const int64_t rows = mean.size(0), classes = mean.size(1);
  const bool full = cov.dim() == 3;
  BK_CHECK(cov.scalar_type() == type && (cov.dim() == 2 || full) && cov.size(0) == rows &&
               cov.size(1) == classes && (!full || cov.size(2) == classes),
           op, ": cov must have the dtype of mean and shape (B, C) or (B, C, C)");
  BK_CHECK(!full || classes <= Device::most_full, op, ": a full covariance must have at most ",
           Device::most_full, " classes, got ", classes,
           "; use variances, or reference.mc_predict");
  BK_CHECK(n_samples >= (antithetic ? 2 : 1) && (!antithetic || n_samples % 2 == 0), op,
           ": n_samples must be at least 1, and even with antithetic, got ", n_samples);
  check_device(op, "cov", cov, mean);
  OptionalDeviceGuard guard(mean);
  mean = row_major(mean);
  cov = row_major(cov);
  PredictParams p{};
  p.key = key_pointer(op, key, mean);
  p.stream = stream;
  p.row_ids = row_ids(op, row0, 1, ids, rows, mean);
  p.f64 = type == ScalarType::Double;
  p.full = full;
  p.antithetic = antithetic;
  p.mean = mean.data_ptr();
  p.cov = cov.data_ptr();
  p.rows = rows;
  p.classes = classes;
  p.samples = n_samples;
  Tensor log_probs = empty_like_shape(mean, {rows, classes}, type);
  Tensor entropy = empty_like_shape(mean, {rows}, type);
  Tensor expected_entropy = empty_like_shape(mean, {rows}, type);
  Tensor error = standard_error ? empty_like_shape(mean, {rows, classes}, type)
                                : empty_like_shape(mean, {0, 0}, type);
  p.log_probs = log_probs.mutable_data_ptr();
  p.entropy = entropy.mutable_data_ptr();
  p.expected_entropy = expected_entropy.mutable_data_ptr();
  p.standard_error = standard_error ? error.mutable_data_ptr() : nullptr;
  if (rows > 0) {
    launch(op, mean, p, Device::workspace, Device::predict);
  }
  return {log_probs, entropy, expected_entropy, error};
}

template <class Device>
void predict_ops(Library& m) {
  m.impl("mc_predict", TORCH_BOX(&mc_predict<Device>));
}
BK_REGISTER(predict_ops)

}  // namespace
}  // namespace bayes_kernels
