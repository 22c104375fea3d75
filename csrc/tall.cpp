// Host side of the tall family, shared by all devices: checks, allocation, launch.
#include "tall.h"

#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr bool f64 = true;
  static constexpr auto workspace = tall_workspace_cpu;
  static constexpr auto launch = tall_cpu;
};
struct Cuda {
  static constexpr bool f64 = false;
  static constexpr auto workspace = tall_workspace_cuda;
  static constexpr auto launch = tall_cuda;
};

struct List {
  TallParams params{};
  std::vector<TallItem> items;
  List(const char* op, const std::vector<Tensor>& xs, const std::vector<Tensor>& ds, bool f64,
       bool in_place);
};

// `ds` is empty, or holds one matrix for each of `xs`.
List::List(const char* op, const std::vector<Tensor>& xs, const std::vector<Tensor>& ds, bool f64,
           bool in_place) {
  BK_CHECK(!xs.empty(), op, ": the list must hold at least one matrix");
  BK_CHECK(ds.empty() || ds.size() == xs.size(), op, ": lists must have the same length, got ",
           xs.size(), " and ", ds.size());
  const ScalarType type = xs[0].scalar_type();
  check_matrix_type(op, "matrices", type, f64);
  for (size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    BK_CHECK(x.dim() == 2 && x.size(1) >= 1 && x.size(0) >= x.size(1), op, ": matrix ", i,
             " must be tall, (n, r) with n >= r >= 1; pass the transpose of a wide one");
    BK_CHECK(x.size(1) <= kMaxTallRank, op, ": matrix ", i, " must have at most ", kMaxTallRank,
             " columns, got ", x.size(1));
    BK_CHECK(x.size(0) < (int64_t{1} << 31), op, ": matrix ", i, " must have fewer than 2^31 rows");
    BK_CHECK(x.is_contiguous() && x.scalar_type() == type, op, ": matrix ", i,
             " must be contiguous and have the dtype of the first");
    check_device(op, "each matrix", x, xs[0]);
    TallItem item{x.data_ptr(), nullptr, nullptr, x.size(0), x.size(1)};
    if (!ds.empty()) {
      const Tensor& d = ds[i];
      BK_CHECK(d.dim() == 2 && d.size(0) == x.size(0) && d.size(1) == x.size(1) &&
                   d.is_contiguous() && d.scalar_type() == type,
               op, ": tensor ", i,
               " beside the matrices must be contiguous, with the shape and dtype of its matrix");
      check_device(op, "each tensor", d, xs[0]);
      item.d = d.data_ptr();
    }
    items.push_back(item);
  }
  if (in_place) check_disjoint(op, xs, ds, /*same_ok=*/true);
  params.items = items.data();
  params.n_items = static_cast<int64_t>(items.size());
  params.f64 = type == ScalarType::Double;
}

Retraction retraction_of_name(const char* op, const std::string& name) {
  if (name == "polar") return Retraction::kPolar;
  if (name == "qr") return Retraction::kQr;
  throw ArgumentError(message(op, ": retraction must be 'polar' or 'qr', got '", name, "'"));
}

template <class Device>
std::vector<Tensor> tall_gram(std::vector<Tensor> xs) {
  constexpr const char* op = "tall_gram";
  List list(op, xs, {}, Device::f64, false);
  OptionalDeviceGuard guard(xs[0]);
  std::vector<Tensor> out;
  for (size_t i = 0; i < xs.size(); ++i) {
    out.push_back(empty_like_shape(xs[i], {xs[i].size(1), xs[i].size(1)}, xs[i].scalar_type()));
    list.items[i].out = out[i].mutable_data_ptr();
  }
  list.params.op = TallOp::kGram;
  launch(op, xs[0], list.params, Device::workspace, Device::launch);
  return out;
}

template <class Device>
Tensor tall_retract_(std::vector<Tensor> xs, std::vector<Tensor> steps, std::string retraction) {
  constexpr const char* op = "tall_retract_";
  List list(op, xs, steps, Device::f64, true);
  list.params.retraction = retraction_of_name(op, retraction);
  OptionalDeviceGuard guard(xs[0]);
  Tensor info = empty_like_shape(xs[0], {list.params.n_items}, ScalarType::Int);
  list.params.info = info.mutable_data_ptr<int32_t>();
  list.params.op = TallOp::kRetract;
  launch(op, xs[0], list.params, Device::workspace, Device::launch);
  return info;
}

template <class Device>
Tensor tall_stiefel_step_(std::vector<Tensor> xs, std::vector<Tensor> directions, Tensor lr,
                          std::string retraction) {
  constexpr const char* op = "tall_stiefel_step_";
  List list(op, xs, directions, Device::f64, true);
  BK_CHECK(directions.size() == xs.size(), op, ": directions must hold one matrix for each of xs");
  list.params.retraction = retraction_of_name(op, retraction);
  list.params.lr = number_pointer(op, "lr", lr, xs[0]);
  OptionalDeviceGuard guard(xs[0]);
  Tensor info = empty_like_shape(xs[0], {list.params.n_items}, ScalarType::Int);
  list.params.info = info.mutable_data_ptr<int32_t>();
  list.params.op = TallOp::kStiefelStep;
  launch(op, xs[0], list.params, Device::workspace, Device::launch);
  return info;
}

template <class Device>
std::vector<Tensor> tall_landing_field(std::vector<Tensor> xs, std::vector<Tensor> grads,
                                       Tensor lam) {
  constexpr const char* op = "tall_landing_field";
  List list(op, xs, grads, Device::f64, false);
  BK_CHECK(grads.size() == xs.size(), op, ": grads must hold one matrix for each of xs");
  list.params.lam = number_pointer(op, "lam", lam, xs[0]);
  OptionalDeviceGuard guard(xs[0]);
  std::vector<Tensor> out;
  for (size_t i = 0; i < xs.size(); ++i) {
    out.push_back(empty_like_shape(xs[i], {xs[i].size(0), xs[i].size(1)}, xs[i].scalar_type()));
    list.items[i].out = out[i].mutable_data_ptr();
  }
  list.params.op = TallOp::kLandingField;
  launch(op, xs[0], list.params, Device::workspace, Device::launch);
  return out;
}

template <class Device>
void tall_landing_step_(std::vector<Tensor> xs, std::vector<Tensor> grads, Tensor lr, Tensor lam) {
  constexpr const char* op = "tall_landing_step_";
  List list(op, xs, grads, Device::f64, true);
  BK_CHECK(grads.size() == xs.size(), op, ": grads must hold one matrix for each of xs");
  list.params.lr = number_pointer(op, "lr", lr, xs[0]);
  list.params.lam = number_pointer(op, "lam", lam, xs[0]);
  OptionalDeviceGuard guard(xs[0]);
  list.params.op = TallOp::kLandingStep;
  launch(op, xs[0], list.params, Device::workspace, Device::launch);
}

template <class Device>
void tall_ops(Library& m) {
  m.impl("tall_gram", TORCH_BOX(&tall_gram<Device>));
  m.impl("tall_retract_", TORCH_BOX(&tall_retract_<Device>));
  m.impl("tall_stiefel_step_", TORCH_BOX(&tall_stiefel_step_<Device>));
  m.impl("tall_landing_field", TORCH_BOX(&tall_landing_field<Device>));
  m.impl("tall_landing_step_", TORCH_BOX(&tall_landing_step_<Device>));
}
BK_REGISTER(tall_ops)

}  // namespace
}  // namespace bayes_kernels
