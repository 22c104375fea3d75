// Host side of the adapter family, shared by all devices: checks, allocation, launch.
#include "adapter.h"

#include <algorithm>

#include "kept_draws.h"
#include "rows.h"
#include "scaled_normal.h"
#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr bool always_draws = false;  // in place of E: for few tokens only
  static constexpr auto shrink_workspace = shrink_workspace_cpu;
  static constexpr auto shrink_backward_workspace = shrink_backward_workspace_cpu;
  static constexpr auto expand_workspace = expand_workspace_cpu;
  static constexpr auto expand_backward_workspace = expand_backward_workspace_cpu;
  static constexpr auto shrink = shrink_cpu;
  static constexpr auto shrink_backward = shrink_backward_cpu;
  static constexpr auto expand = expand_cpu;
  static constexpr auto expand_backward = expand_backward_cpu;
  static constexpr auto scaled_normal = scaled_normal_cpu;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cpu;
};
struct Cuda {
  static constexpr bool always_draws = true;
  static constexpr auto shrink_workspace = shrink_workspace_cuda;
  static constexpr auto shrink_backward_workspace = shrink_backward_workspace_cuda;
  static constexpr auto expand_workspace = expand_workspace_cuda;
  static constexpr auto expand_backward_workspace = expand_backward_workspace_cuda;
  static constexpr auto shrink = shrink_cuda;
  static constexpr auto shrink_backward = shrink_backward_cuda;
  static constexpr auto expand = expand_cuda;
  static constexpr auto expand_backward = expand_backward_cuda;
  static constexpr auto scaled_normal = scaled_normal_cuda;
  static constexpr auto scaled_normal_backward = scaled_normal_backward_cuda;
};

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

int64_t row_count(const Tensor& t) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  return count;
}

Tensor factor(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  BK_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, got ", t.dim());
  BK_CHECK(t.scalar_type() == accumulate_type(like), op, ": ", name,
           " must be float32 (float64 beside float64 activations); convert it");
  check_device(op, name, t, like);
  return row_major(t);
}

int checked_rank(const char* op, int64_t r) {
  BK_CHECK(r >= 1 && r <= kMaxFusedRank, op, ": rank must be 1 to ", kMaxFusedRank, ", got ", r,
           "; use bayes_kernels.functional, which has a slower path for larger ranks");
  return static_cast<int>(r);
}

// The noise arguments of an op, in the order of its schema.
struct NoiseArguments {
  const std::optional<Tensor>& key;
  int64_t stream, row0, rows_per_id;
  const std::optional<Tensor>& ids;
  double dropout;
};

// The noise matrix of a call: E itself, or the draw that kernels make it from, or neither.
struct NoiseMatrix {
  std::optional<Tensor> e = {};
  std::optional<Tensor> rho = {};          // contiguous, of the draw
  std::shared_ptr<const float> kept = {};  // likewise, its normals where they are known
  AdapterDraw draw = {};
  bool exists() const { return e.has_value() || rho.has_value(); }
};

// E = std(rho) . eps; as a draw on a GPU, and where there are `few` tokens.
template <class Device>
NoiseMatrix noise_matrix(const char* op, const std::optional<Tensor>& rho, const Tensor& a,
                         const NoiseArguments& noise, const std::string& std, const Tensor& x,
                         bool few) {
  NoiseMatrix made;
  if (!rho.has_value()) return made;
  BK_CHECK(noise.key.has_value(), op, ": key is needed with rho; make it with random.key(seed)");
  check_device(op, "rho", *rho, x);
  if (!Device::always_draws && !few) {
    made.e = draw_scaled_normal(op, *rho, a.size(1), *noise.key, noise.stream, std,
                                Device::scaled_normal);
    return made;
  }
  made.rho = row_major(*rho);
  BK_CHECK(made.rho->scalar_type() == accumulate_type(x), op,
           ": rho must be float32 (float64 beside float64 activations); convert it");
  BK_CHECK(made.rho->dim() == 2 && made.rho->size(0) == a.size(0), op,
           ": rho must have the rows of a");
  const ScaledNormalParams p =
      scaled_normal_params(op, *made.rho, a.size(1), *noise.key, noise.stream, std);
  made.draw.rho = p.rho;
  made.draw.row_constant = p.row_constant;
  made.draw.std = p.std;
  return made;
}

// Sets e, the draw and the noise of the params of shrink or of its derivatives.
template <class Params>
void set_noise(const char* op, Params& p, NoiseMatrix& matrix, const NoiseArguments& noise,
               const Tensor& a, const Tensor& x) {
  if (matrix.e.has_value()) {
    matrix.e = factor(op, "e", *matrix.e, x);
    BK_CHECK(matrix.e->size(0) == a.size(0) && matrix.e->size(1) == a.size(1), op,
             ": e must have the shape of a");
    p.e = matrix.e->data_ptr();
  }
  p.draw = matrix.draw;
  BK_CHECK(noise.dropout >= 0.0 && noise.dropout < 1.0, op, ": dropout must be in [0, 1), got ",
           noise.dropout);
  const bool needs_key = matrix.exists() || noise.dropout > 0.0;
  BK_CHECK(!needs_key || noise.key.has_value(), op,
           ": key is needed with noise or dropout; make it with random.key(seed)");
  const RowIds rows = row_ids(op, noise.row0, noise.rows_per_id, noise.ids, p.tokens, x);
  p.noise = AdapterNoise{needs_key ? key_pointer(op, *noise.key, x) : nullptr, noise.stream, rows,
                         noise.dropout};
}

// h (tokens, r) of the rows of x (..., n).
template <class Device>
Tensor shrink_rows(const char* op, const Tensor& x, const Tensor& first, NoiseMatrix matrix,
                   const NoiseArguments& noise) {
  const Rows rows = as_rows(x);
  const Tensor a = factor(op, "a", first, x);
  ShrinkParams p{};
  p.dtype = dtype_of(op, x);
  p.tokens = rows.count;
  p.n = rows.columns;
  BK_CHECK(a.size(1) == p.n, op, ": a must have ", p.n, " columns, got ", a.size(1));
  p.r = checked_rank(op, a.size(0));
  p.x = rows.t.data_ptr();
  p.x_stride = rows.stride;
  p.a = a.data_ptr();
  set_noise(op, p, matrix, noise, a, x);
  Tensor h = empty_like_shape(x, {p.tokens, p.r}, accumulate_type(x));
  if (p.tokens == 0) return h;
  p.h = h.mutable_data_ptr();
  launch(op, x, p, Device::shrink_workspace, Device::shrink);
  return h;
}

template <class Device>
Tensor shrink(Tensor x, Tensor a, std::optional<Tensor> e, std::optional<Tensor> key,
              int64_t stream, int64_t row0, int64_t rows_per_id, std::optional<Tensor> ids,
              double dropout) {
  constexpr const char* op = "adapter_shrink";
  BK_CHECK(x.dim() == 2, op, ": x must have two dimensions, got ", x.dim());
  OptionalDeviceGuard guard(x);
  return shrink_rows<Device>(op, x, a, NoiseMatrix{e},
                             {key, stream, row0, rows_per_id, ids, dropout});
}

// dx like x (..., n), da, de, or drho in place of de where there is a draw (of rho (r, n) on a
// GPU).
template <class Device>
std::tuple<Tensor, Tensor, Tensor> shrink_backward_rows(const char* op, Tensor dh, const Tensor& x,
                                                        Tensor a, NoiseMatrix matrix,
                                                        const NoiseArguments& noise, bool need_dx,
                                                        bool need_da, bool need_de,
                                                        const AdapterTickets& tickets = {}) {
  const Rows rows = as_rows(x);
  a = factor(op, "a", a, x);
  dh = factor(op, "dh", dh, x);
  BK_CHECK(a.size(1) == rows.columns, op, ": a must have ", rows.columns, " columns, got ",
           a.size(1));
  BK_CHECK(dh.size(0) == rows.count && dh.size(1) == a.size(0), op, ": dh must have shape (",
           rows.count, ", ", a.size(0), ")");
  ShrinkBackwardParams p{};
  p.dtype = dtype_of(op, x);
  p.tokens = rows.count;
  p.n = rows.columns;
  p.r = checked_rank(op, a.size(0));
  p.dh = dh.data_ptr();
  p.x = rows.t.data_ptr();
  p.x_stride = rows.stride;
  p.a = a.data_ptr();
  p.tickets = tickets;
  set_noise(op, p, matrix, noise, a, x);
  need_de = need_de && matrix.exists();
  const ScalarType acc = accumulate_type(x);
  const std::vector<int64_t> none{0, 0};
  Tensor dx = empty_like_shape(x, need_dx ? shape_of(x) : none, x.scalar_type());
  Tensor da = empty_like_shape(x, {need_da ? p.r : 0, need_da ? p.n : 0}, acc);
  Tensor de = empty_like_shape(x, {need_de ? p.r : 0, need_de ? p.n : 0}, acc);
  if (p.tokens == 0) {
    torch::stable::zero_(da);
    torch::stable::zero_(de);
    return {dx, da, de};
  }
  p.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  p.da = need_da ? da.mutable_data_ptr() : nullptr;
  p.de = need_de ? de.mutable_data_ptr() : nullptr;
  if ((need_dx || need_da || need_de) && p.n > 0) {
    launch(op, x, p, Device::shrink_backward_workspace, Device::shrink_backward);
  }
  return {dx, da, de};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> shrink_backward(Tensor dh, Tensor x, Tensor a,
                                                   std::optional<Tensor> e,
                                                   std::optional<Tensor> key, int64_t stream,
                                                   int64_t row0, int64_t rows_per_id,
                                                   std::optional<Tensor> ids, double dropout,
                                                   bool need_dx, bool need_da, bool need_de) {
  BK_CHECK(x.dim() == 2 && dh.dim() == 2,
           "adapter_shrink_backward: x and dh must have two dimensions");
  OptionalDeviceGuard guard(x);
  return shrink_backward_rows<Device>("adapter_shrink_backward", dh, x, a, NoiseMatrix{e},
                                      {key, stream, row0, rows_per_id, ids, dropout}, need_dx,
                                      need_da, need_de);
}

// y of the rows of h; `shape` is its own, (..., m), and that of base.
template <class Device>
Tensor expand_rows(const char* op, const Tensor& given, const Tensor& second,
                   const std::optional<Tensor>& added, double scaling, ScalarType dtype,
                   const std::vector<int64_t>& shape) {
  const Tensor h = row_major(given);
  const Tensor b = row_major(second);
  BK_CHECK(b.dim() == 2 && b.size(1) == h.size(1), op, ": b must have ", h.size(1), " columns");
  BK_CHECK(b.scalar_type() == h.scalar_type(), op, ": h and b must have the same dtype");
  check_device(op, "b", b, h);
  ExpandParams p{};
  p.tokens = h.size(0);
  p.m = b.size(0);
  p.r = checked_rank(op, h.size(1));
  p.h = h.data_ptr();
  p.b = b.data_ptr();
  p.scaling = scaling;
  Tensor y = empty_like_shape(h, shape, dtype);
  p.dtype = dtype_of(op, y);
  BK_CHECK(accumulate_type(y) == h.scalar_type(), op,
           ": h and b must be float32 (float64 beside float64 outputs)");
  std::optional<Rows> base;
  if (added.has_value()) {
    bool fits = added->dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i)
      fits = added->size(static_cast<int64_t>(i)) == shape[i];
    BK_CHECK(fits, op, ": base must have the output's shape, ", p.tokens, " rows of ", p.m);
    BK_CHECK(added->scalar_type() == dtype, op, ": base must have the output's dtype");
    check_device(op, "base", *added, h);
    base = as_rows(*added);
    p.base = base->t.data_ptr();
    p.base_stride = base->stride;
  }
  if (p.tokens == 0 || p.m == 0) return y;
  p.y = y.mutable_data_ptr();
  launch(op, h, p, Device::expand_workspace, Device::expand);
  return y;
}

template <class Device>
Tensor expand(Tensor h, Tensor b, std::optional<Tensor> base, double scaling, ScalarType dtype) {
  constexpr const char* op = "adapter_expand";
  BK_CHECK(h.dim() == 2 && b.dim() == 2, op, ": h and b must have two dimensions");
  OptionalDeviceGuard guard(h);
  return expand_rows<Device>(op, h, b, base, scaling, dtype, {h.size(0), b.size(0)});
}

template <class Device>
std::tuple<Tensor, Tensor> expand_backward_rows(const char* op, const Tensor& dy, Tensor h,
                                                Tensor b, double scaling, bool need_dh,
                                                bool need_db, const AdapterTickets& tickets = {}) {
  const Rows rows = as_rows(dy);
  h = factor(op, "h", h, dy);
  b = factor(op, "b", b, dy);
  BK_CHECK(h.size(0) == rows.count && b.size(0) == rows.columns && h.size(1) == b.size(1), op,
           ": shapes of dy (tokens, m), h (tokens, r) and b (m, r) do not fit");
  ExpandBackwardParams p{};
  p.dtype = dtype_of(op, dy);
  p.tokens = rows.count;
  p.m = rows.columns;
  p.r = checked_rank(op, h.size(1));
  p.dy = rows.t.data_ptr();
  p.dy_stride = rows.stride;
  p.h = h.data_ptr();
  p.b = b.data_ptr();
  p.scaling = scaling;
  p.tickets = tickets;
  const ScalarType acc = accumulate_type(dy);
  Tensor dh = empty_like_shape(dy, {need_dh ? p.tokens : 0, need_dh ? p.r : 0}, acc);
  Tensor db = empty_like_shape(dy, {need_db ? p.m : 0, need_db ? p.r : 0}, acc);
  if (p.tokens == 0 || p.m == 0) {
    torch::stable::zero_(dh);
    torch::stable::zero_(db);
    return {dh, db};
  }
  p.dh = need_dh ? dh.mutable_data_ptr() : nullptr;
  p.db = need_db ? db.mutable_data_ptr() : nullptr;
  if (need_dh || need_db) {
    launch(op, dy, p, Device::expand_backward_workspace, Device::expand_backward);
  }
  return {dh, db};
}

template <class Device>
std::tuple<Tensor, Tensor> expand_backward(Tensor dy, Tensor h, Tensor b, double scaling,
                                           bool need_dh, bool need_db) {
  BK_CHECK(dy.dim() == 2, "adapter_expand_backward: dy must have two dimensions, got ", dy.dim());
  OptionalDeviceGuard guard(dy);
  return expand_backward_rows<Device>("adapter_expand_backward", dy, h, b, scaling, need_dh,
                                      need_db);
}

// The whole adapter in one call: the kernels of scaled_normal, shrink and expand in turn, or, on a
// GPU and for few tokens, of shrink and expand; with keep_draw the CPU keeps normals from call to
// call. Returns the output and h.
template <class Device>
std::tuple<Tensor, Tensor> whole(const char* op, const Tensor& x, const Tensor& a,
                                 const std::optional<Tensor>& rho, const Tensor& b,
                                 const std::optional<Tensor>& base, const NoiseArguments& noise,
                                 const std::string& std, double scaling, bool keep_draw) {
  BK_CHECK(x.dim() >= 1 && a.dim() == 2 && b.dim() == 2, op,
           ": x must have shape (..., n), a and b two dimensions");
  // Before the first launch: shrink would read what lies elsewhere.
  check_device(op, "b", b, x);
  if (base.has_value()) check_device(op, "base", *base, x);
  OptionalDeviceGuard guard(x);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = b.size(0);
  const int64_t tokens = row_count(x);
  const bool few = tokens > 0 && tokens <= few_shrink_tokens(checked_rank(op, a.size(0)));
  NoiseMatrix matrix = noise_matrix<Device>(op, rho, a, noise, std, x, few);
  if (!Device::always_draws && keep_draw && matrix.draw.rho != nullptr) {
    matrix.kept = kept_normals(noise.key->const_data_ptr<int64_t>(), noise.stream, a.numel());
    matrix.draw.eps = matrix.kept.get();
  }
  const Tensor h = shrink_rows<Device>(op, x, a, std::move(matrix), noise);
  const ScalarType dtype = base.has_value() ? base->scalar_type() : x.scalar_type();
  return {expand_rows<Device>(op, h, b, base, scaling, dtype, shape), h};
}

template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor a, std::optional<Tensor> rho, Tensor b,
                                   std::optional<Tensor> base, std::optional<Tensor> key,
                                   int64_t stream, int64_t row0, int64_t rows_per_id,
                                   std::optional<Tensor> ids, double dropout, std::string std,
                                   double scaling) {
  return whole<Device>("adapter_forward", x, a, rho, b, base,
                       {key, stream, row0, rows_per_id, ids, dropout}, std, scaling,
                       /*keep_draw=*/false);
}

// Stands for devices and layouts without kernels.
struct NoDevice {};

// As forward; nothing where the op does not take an argument.
template <class Device>
std::tuple<std::optional<Tensor>, std::optional<Tensor>> train(
    Tensor x, Tensor a, std::optional<Tensor> rho, Tensor b, std::optional<Tensor> base,
    std::optional<Tensor> key, int64_t stream, int64_t row0, int64_t rows_per_id,
    std::optional<Tensor> ids, double dropout, std::string std, double scaling) {
  if constexpr (!std::is_same_v<Device, NoDevice>) {
    try {
      return whole<Device>("adapter_train", x, a, rho, b, base,
                           {key, stream, row0, rows_per_id, ids, dropout}, std, scaling,
                           /*keep_draw=*/false);
    } catch (const ArgumentError&) {
    }
  }
  return {std::nullopt, std::nullopt};
}

// The output alone, for passes without gradients; nothing where the op does not take an argument.
template <class Device>
std::optional<Tensor> infer(Tensor x, Tensor a, std::optional<Tensor> rho, Tensor b,
                            std::optional<Tensor> base, std::optional<Tensor> key, int64_t stream,
                            int64_t row0, int64_t rows_per_id, std::optional<Tensor> ids,
                            double dropout, std::string std, double scaling) {
  if constexpr (!std::is_same_v<Device, NoDevice>) {
    try {
      return std::get<0>(whole<Device>("adapter_infer", x, a, rho, b, base,
                                       {key, stream, row0, rows_per_id, ids, dropout}, std, scaling,
                                       /*keep_draw=*/true));
    } catch (const ArgumentError&) {
    }
  }
  return std::nullopt;
}

// The derivatives of forward in one call: the kernels of expand_backward, scaled_normal,
// shrink_backward and scaled_normal_backward in turn; on a GPU and for few tokens shrink_backward
// does the work of the other two of the latter three, and draws the noise once.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor a,
                                                    std::optional<Tensor> rho, Tensor b, Tensor h,
                                                    std::optional<Tensor> key, int64_t stream,
                                                    int64_t row0, int64_t rows_per_id,
                                                    std::optional<Tensor> ids, double dropout,
                                                    std::string std, double scaling, bool need_dx,
                                                    bool need_da, bool need_drho, bool need_db) {
  constexpr const char* op = "adapter_backward";
  BK_CHECK(x.dim() >= 1 && dy.dim() == x.dim() && a.dim() == 2, op,
           ": x and dy must have shapes (..., n) and (..., m), a two dimensions");
  check_device(op, "dy", dy, x);
  OptionalDeviceGuard guard(x);
  const int64_t tokens = row_count(x);
  need_drho = need_drho && rho.has_value();
  const bool need_dh = need_dx || need_da || need_drho;
  // Both ops count with the same tickets, which are zeroed once.
  AdapterTickets tickets;
  std::optional<Tensor> counters;
  if (Device::always_draws && need_dh && b.dim() == 2 && b.size(0) > 0) {
    tickets.count = adapter_tickets(tokens, std::max(x.size(-1), b.size(0)));
    counters = empty_like_shape(x, {tickets.count}, ScalarType::Int);
    tickets.at = static_cast<int*>(counters->mutable_data_ptr());
  }
  auto [dh, db] = expand_backward_rows<Device>(op, dy, h, b, scaling, need_dh, need_db, tickets);
  tickets.zero = true;
  if (!need_dh) {
    const auto nothing = [&](ScalarType type) { return empty_like_shape(x, {0, 0}, type); };
    const ScalarType acc = accumulate_type(x);
    return {nothing(x.scalar_type()), nothing(acc), nothing(acc), db};
  }
  const NoiseArguments noise{key, stream, row0, rows_per_id, ids, dropout};
  const bool few = tokens > 0 && tokens <= kFewBackwardTokens && x.size(-1) > 0 &&
                   rho.has_value() && rho->dim() == 2 && rho->size(1) == a.size(1);
  const NoiseMatrix matrix = noise_matrix<Device>(op, rho, a, noise, std, x, few);
  auto [dx, da, de] = shrink_backward_rows<Device>(op, dh, x, a, matrix, noise, need_dx, need_da,
                                                   need_drho, tickets);
  if (need_drho && (matrix.e.has_value() || matrix.draw.row_constant))
    de = scaled_normal_gradient(op, de, *rho, *key, stream, std, Device::scaled_normal_backward);
  return {dx, da, de, db};
}

template <class Device>
void adapter_ops(Library& m) {
  m.impl("adapter_shrink", TORCH_BOX(&shrink<Device>));
  m.impl("adapter_shrink_backward", TORCH_BOX(&shrink_backward<Device>));
  m.impl("adapter_expand", TORCH_BOX(&expand<Device>));
  m.impl("adapter_forward", TORCH_BOX(&forward<Device>));
  m.impl("adapter_train", TORCH_BOX(&train<Device>));
  m.impl("adapter_infer", TORCH_BOX(&infer<Device>));
  m.impl("adapter_backward", TORCH_BOX(&backward<Device>));
  m.impl("adapter_expand_backward", TORCH_BOX(&expand_backward<Device>));
}
BK_REGISTER(adapter_ops)
STABLE_TORCH_LIBRARY_IMPL(BK_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("adapter_train", TORCH_BOX(&train<NoDevice>));
  m.impl("adapter_infer", TORCH_BOX(&infer<NoDevice>));
}

}  // namespace
}  // namespace bayes_kernels
