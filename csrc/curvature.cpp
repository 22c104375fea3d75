// Host side of the curvature family, shared by all devices: checks, allocation, launch.
#include "curvature.h"

#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr bool f64 = true;
  static constexpr auto workspace = low_rank_workspace_cpu;
  static constexpr auto launch = low_rank_update_cpu;
  static constexpr auto kron_workspace = kron_workspace_cpu;
  static constexpr auto kron_launch = kron_accumulate_cpu;
};
struct Cuda {
  static constexpr bool f64 = false;
  static constexpr auto workspace = low_rank_workspace_cuda;
  static constexpr auto launch = low_rank_update_cuda;
  static constexpr auto kron_workspace = kron_workspace_cuda;
  static constexpr auto kron_launch = kron_accumulate_cuda;
};

template <class Device>
void low_rank_update_(std::vector<Tensor> factors, std::vector<Tensor> rows) {
  constexpr const char* op = "low_rank_update_";
  BK_CHECK(!factors.empty() && factors.size() == rows.size(), op,
           ": factors and rows must be lists of the same length, at least 1, got ", factors.size(),
           " and ", rows.size());
  const ScalarType type = factors[0].scalar_type();
  check_matrix_type(op, "factors", type, Device::f64);
  std::vector<LowRankItem> items;
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor &factor = factors[i], &x = rows[i];
    BK_CHECK(factor.dim() == 2 && factor.size(1) >= 1 && factor.size(1) <= kMaxFactorRank, op,
             ": factor ", i, " must have shape (d, k) with k from 1 to ", kMaxFactorRank);
    BK_CHECK(x.dim() == 2 && x.size(1) == factor.size(0), op, ": rows ", i,
             " must have shape (n, d = ", factor.size(0), ")");
    BK_CHECK(factor.size(0) < (int64_t{1} << 31) && x.size(0) < (int64_t{1} << 31), op, ": item ",
             i, " must have fewer than 2^31 rows");
    BK_CHECK(factor.is_contiguous() && x.is_contiguous() && factor.scalar_type() == type &&
                 x.scalar_type() == type,
             op, ": factor and rows ", i,
             " must be contiguous and have the dtype of the first factor");
    check_device(op, "each factor", factor, factors[0]);
    check_device(op, "each rows tensor", x, factors[0]);
    if (factor.size(0) == 0 || x.size(0) == 0) continue;
    items.push_back(
        LowRankItem{factor.data_ptr(), x.data_ptr(), factor.size(0), factor.size(1), x.size(0)});
  }
  check_disjoint(op, factors, rows, /*same_ok=*/false);
  LowRankParams params{items.data(), static_cast<int64_t>(items.size()), type == ScalarType::Double,
                       nullptr};
  if (items.empty()) return;
  OptionalDeviceGuard guard(factors[0]);
  launch(op, factors[0], params, Device::workspace, Device::launch);
}

template <class Device>
void kron_accumulate_(std::vector<Tensor> factors, std::vector<Tensor> rows,
                      std::vector<Tensor> masks, Tensor beta, Tensor alpha) {
  constexpr const char* op = "kron_accumulate_";
  BK_CHECK(!factors.empty() && factors.size() == rows.size() &&
               (masks.empty() || masks.size() == factors.size()),
           op, ": factors and rows must be lists of the same length, at least 1, and masks too or ",
           "empty, got ", factors.size(), ", ", rows.size(), " and ", masks.size());
  const ScalarType type = factors[0].scalar_type();
  check_matrix_type(op, "factors", type, Device::f64);
  std::vector<KronItem> items;
  std::vector<Tensor> read = rows;
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor &factor = factors[i], &x = rows[i];
    BK_CHECK(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) <= kMaxDense,
             op, ": factor ", i, " must have shape (d, d) with d at most ", kMaxDense);
    BK_CHECK(x.dim() == 2 && x.size(1) == factor.size(0) && x.size(0) < (int64_t{1} << 31), op,
             ": rows ", i, " must have shape (n, d = ", factor.size(0), ") with n below 2^31");
    const DType dtype = dtype_of(op, x);
    BK_CHECK(factor.scalar_type() == type && (dtype == DType::kF64) == (type == ScalarType::Double),
             op, ": factor ", i,
             " must have the dtype of the first, and rows be float64 beside float64 factors only");
    BK_CHECK(factor.is_contiguous() && x.is_contiguous(), op, ": factor and rows ", i,
             " must be contiguous");
    check_device(op, "each factor", factor, factors[0]);
    check_device(op, "each rows tensor", x, factors[0]);
    const void* weights = nullptr;
    if (!masks.empty() && masks[i].numel() > 0) {
      const Tensor& mask = masks[i];
      BK_CHECK(mask.dim() == 1 && mask.size(0) == x.size(0) && mask.scalar_type() == type &&
                   mask.is_contiguous(),
               op, ": mask ", i, " must be empty or have shape (", x.size(0),
               ",), contiguous, in the dtype of the factors");
      check_device(op, "each mask", mask, factors[0]);
      read.push_back(mask);
      weights = mask.data_ptr();
    }
    if (factor.size(0) == 0) continue;
    items.push_back(
        KronItem{factor.data_ptr(), x.data_ptr(), weights, factor.size(0), x.size(0), dtype});
  }
  check_disjoint(op, factors, read, /*same_ok=*/false);
  KronParams params{items.data(),
                    static_cast<int64_t>(items.size()),
                    type == ScalarType::Double,
                    number_pointer(op, "beta", beta, factors[0]),
                    number_pointer(op, "alpha", alpha, factors[0]),
                    nullptr};
  if (items.empty()) return;
  OptionalDeviceGuard guard(factors[0]);
  launch(op, factors[0], params, Device::kron_workspace, Device::kron_launch);
}

template <class Device>
void curvature_ops(Library& m) {
  m.impl("low_rank_update_", TORCH_BOX(&low_rank_update_<Device>));
  m.impl("kron_accumulate_", TORCH_BOX(&kron_accumulate_<Device>));
}
BK_REGISTER(curvature_ops)

}  // namespace
}  // namespace bayes_kernels
