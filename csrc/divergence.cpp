// Host side of the divergence family, shared by all devices: checks, allocation, launch.
#include "divergence.h"

#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr auto workspace = divergence_workspace_cpu;
  static constexpr auto value = gaussian_kl_cpu;
  static constexpr auto gradient = gaussian_kl_gradient_cpu;
  static constexpr auto step = gaussian_kl_step_cpu;
};
struct Cuda {
  static constexpr auto workspace = divergence_workspace_cuda;
  static constexpr auto value = gaussian_kl_cuda;
  static constexpr auto gradient = gaussian_kl_gradient_cuda;
  static constexpr auto step = gaussian_kl_step_cuda;
};

struct Lists {
  DivergenceParams params{};
  std::vector<DivergenceItem> items;
  Lists(const char* op, const std::vector<Tensor>& means, const std::vector<Tensor>& rhos,
        const std::vector<double>& prior_std, const std::string& std, const std::string& direction);
};

// In-place ops must write into the given storage: every tensor has to be contiguous as it is.
Lists::Lists(const char* op, const std::vector<Tensor>& means, const std::vector<Tensor>& rhos,
             const std::vector<double>& prior_std, const std::string& std,
             const std::string& direction) {
  BK_CHECK(!means.empty() && means.size() == rhos.size(), op,
           ": means and rhos must be lists of the same length, at least 1, got ", means.size(),
           " and ", rhos.size());
  BK_CHECK(prior_std.size() == 1 || prior_std.size() == means.size(), op,
           ": prior_std must hold one value, or one for each tensor");
  items.resize(means.size());
  for (size_t i = 0; i < means.size(); ++i) {
    const Tensor &mean = means[i], &rho = rhos[i];
    BK_CHECK(mean.is_contiguous() && rho.is_contiguous(), op, ": tensor ", i,
             " must be contiguous; call .contiguous()");
    BK_CHECK(
        (mean.scalar_type() == ScalarType::Float || mean.scalar_type() == ScalarType::Double) &&
            mean.scalar_type() == means[0].scalar_type() && rho.scalar_type() == mean.scalar_type(),
        op, ": tensor ", i, " must be float32 or float64 like the first; convert it");
    BK_CHECK(mean.is_cuda() == means[0].is_cuda() && rho.is_cuda() == mean.is_cuda() &&
                 mean.get_device_index() == means[0].get_device_index(),
             op, ": tensor ", i, " must be on the device of the first");
    const double prior = prior_std[prior_std.size() == 1 ? 0 : i];
    BK_CHECK(prior > 0.0, op, ": prior_std must be positive, got ", prior);
    const bool row_constant = rho.numel() != mean.numel();
    BK_CHECK(!row_constant || (mean.dim() == 2 && rho.dim() == 2 && rho.size(0) == mean.size(0) &&
                               rho.size(1) == 1),
             op, ": rho ", i, " must have the shape of its mean, or (r, 1)");
    BK_CHECK(!row_constant || mean.size(1) > 0, op, ": mean ", i,
             " must not be empty beside a rho of shape (r, 1)");
    items[i] = DivergenceItem{mean.data_ptr(),
                              rho.data_ptr(),
                              nullptr,
                              nullptr,
                              prior,
                              mean.numel(),
                              row_constant ? mean.size(1) : 1};
  }
  params.items = items.data();
  params.n_items = static_cast<int64_t>(items.size());
  params.f64 = means[0].scalar_type() == ScalarType::Double;
  params.std = std_of_name(op, std);
  params.direction = direction_of_name(op, direction);
}

void check_weight(const char* op, const Tensor& weight, const Tensor& like) {
  BK_CHECK(weight.numel() == 1 && weight.scalar_type() == like.scalar_type(), op,
           ": weight must be a one-element tensor with the dtype of the means");
  check_device(op, "weight", weight, like);
}

template <class Device>
Tensor gaussian_kl(std::vector<Tensor> means, std::vector<Tensor> rhos,
                   std::vector<double> prior_std, std::string std, std::string direction) {
  constexpr const char* op = "gaussian_kl";
  Lists lists(op, means, rhos, prior_std, std, direction);
  OptionalDeviceGuard guard(means[0]);
  Tensor out = empty_like_shape(means[0], {}, ScalarType::Double);
  lists.params.out = out.mutable_data_ptr();
  launch(op, means[0], lists.params, Device::workspace, Device::value);
  return out;
}

template <class Device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> gaussian_kl_backward(
    Tensor weight, std::vector<Tensor> means, std::vector<Tensor> rhos,
    std::vector<double> prior_std, std::string std, std::string direction) {
  constexpr const char* op = "gaussian_kl_backward";
  Lists lists(op, means, rhos, prior_std, std, direction);
  check_weight(op, weight, means[0]);
  OptionalDeviceGuard guard(means[0]);
  std::vector<Tensor> dmeans, drhos;
  for (size_t i = 0; i < means.size(); ++i) {
    dmeans.push_back(torch::stable::empty_like(means[i]));
    drhos.push_back(torch::stable::empty_like(rhos[i]));
    lists.items[i].dmean = dmeans[i].mutable_data_ptr();
    lists.items[i].drho = drhos[i].mutable_data_ptr();
  }
  lists.params.weight = weight.data_ptr();
  launch(op, means[0], lists.params, Device::workspace, Device::gradient);
  return {dmeans, drhos};
}

template <class Device>
void gaussian_kl_step_(std::vector<Tensor> means, std::vector<Tensor> rhos, Tensor weight,
                       std::vector<double> prior_std, std::string std, std::string direction) {
  constexpr const char* op = "gaussian_kl_step_";
  Lists lists(op, means, rhos, prior_std, std, direction);
  check_weight(op, weight, means[0]);
  std::vector<Tensor> written;
  for (const std::vector<Tensor>* list : {&means, &rhos})
    for (const Tensor& t : *list)
      if (t.numel() > 0) written.push_back(t);
  check_disjoint(op, written, {weight}, /*same_ok=*/false);
  OptionalDeviceGuard guard(means[0]);
  lists.params.weight = weight.data_ptr();
  launch(op, means[0], lists.params, Device::workspace, Device::step);
}

template <class Device>
void divergence_ops(Library& m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl<Device>));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward<Device>));
  m.impl("gaussian_kl_step_", TORCH_BOX(&gaussian_kl_step_<Device>));
}
BK_REGISTER(divergence_ops)

}  // namespace
}  // namespace bayes_kernels
