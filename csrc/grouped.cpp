// Host side of the grouped adapters, shared by all devices: checks, allocation, launch.
#include "grouped.h"

#include "rows.h"
#include "scaled_normal.h"
#include "torch_stable.h"

namespace bayes_kernels {
namespace {

struct Cpu {
  static constexpr auto group_rows = group_rows_cpu;
  static constexpr auto sampled_shrink_workspace = sampled_shrink_workspace_cpu;
  static constexpr auto sampled_shrink = sampled_shrink_cpu;
  static constexpr auto shrink_workspace = grouped_shrink_workspace_cpu;
  static constexpr auto shrink_backward_workspace = grouped_shrink_backward_workspace_cpu;
  static constexpr auto grouped_expand_workspace = grouped_expand_workspace_cpu;
  static constexpr auto grouped_expand_backward_workspace = grouped_expand_backward_workspace_cpu;
  static constexpr auto expand_workspace = expand_workspace_cpu;
  static constexpr auto expand_backward_workspace = expand_backward_workspace_cpu;
  static constexpr auto shrink = grouped_shrink_cpu;
  static constexpr auto shrink_backward = grouped_shrink_backward_cpu;
  static constexpr auto grouped_expand = grouped_expand_cpu;
  static constexpr auto grouped_expand_backward = grouped_expand_backward_cpu;
  static constexpr auto expand = expand_cpu;
  static constexpr auto expand_backward = expand_backward_cpu;
};
struct Cuda {
  static constexpr auto group_rows = group_rows_cuda;
  static constexpr auto sampled_shrink_workspace = sampled_shrink_workspace_cuda;
  static constexpr auto sampled_shrink = sampled_shrink_cuda;
  static constexpr auto shrink_workspace = grouped_shrink_workspace_cuda;
  static constexpr auto shrink_backward_workspace = grouped_shrink_backward_workspace_cuda;
  static constexpr auto grouped_expand_workspace = grouped_expand_workspace_cuda;
  static constexpr auto grouped_expand_backward_workspace = grouped_expand_backward_workspace_cuda;
  static constexpr auto expand_workspace = expand_workspace_cuda;
  static constexpr auto expand_backward_workspace = expand_backward_workspace_cuda;
  static constexpr auto shrink = grouped_shrink_cuda;
  static constexpr auto shrink_backward = grouped_shrink_backward_cuda;
  static constexpr auto grouped_expand = grouped_expand_cuda;
  static constexpr auto grouped_expand_backward = grouped_expand_backward_cuda;
  static constexpr auto expand = expand_cuda;
  static constexpr auto expand_backward = expand_backward_cuda;
};

// Begins of groups (groups + 1), then rows in their order (tokens).
template <class Device>
Tensor group_rows(Tensor ids, int64_t groups) {
  constexpr const char* op = "group_rows";
  BK_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, op,
           ": ids must be an int64 tensor of one dimension");
  const int64_t tokens = ids.size(0), most = int64_t{1} << 31;
  BK_CHECK(groups >= 1 && groups < most && tokens < most, op,
           ": groups must be at least 1, and rows and groups fewer than 2^31");
  OptionalDeviceGuard guard(ids);
  ids = row_major(ids);
  Tensor plan = empty_like_shape(ids, {groups + 1 + tokens}, ScalarType::Int);
  int32_t* start = static_cast<int32_t*>(plan.mutable_data_ptr());
  GroupRowsParams p{ids.const_data_ptr<int64_t>(), start, start + groups + 1, tokens, groups};
  raise_if(op, Device::group_rows(p, current_stream(ids)));
  return plan;
}

// The arguments that say which rows belong together and which noise they have.
struct GroupArguments {
  const std::optional<Tensor>& plan;
  int64_t rows_per_group;
  const std::optional<Tensor>& key;
  int64_t stream, row0;
  const std::optional<Tensor>& ids;
};

Tensor factor(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  BK_CHECK(t.scalar_type() == accumulate_type(like), op, ": ", name,
           " must be float32 (float64 beside float64 activations); convert it");
  check_device(op, name, t, like);
  return row_major(t);
}

Grouping grouping(const char* op, const GroupArguments& g, int64_t groups, int64_t tokens,
                  const Tensor& like) {
  Grouping found{nullptr, nullptr, groups, std::min(g.rows_per_group, tokens)};
  if (g.plan.has_value()) {
    BK_CHECK(g.plan->dim() == 1 && g.plan->size(0) == groups + 1 + tokens &&
                 g.plan->scalar_type() == ScalarType::Int && g.plan->is_contiguous(),
             op, ": plan must be that of group_rows for ", tokens, " rows and ", groups, " groups");
    check_device(op, "plan", *g.plan, like);
    found.start = static_cast<const int32_t*>(g.plan->data_ptr());
    found.order = found.start + groups + 1;
  } else {
    BK_CHECK(g.rows_per_group >= 1 && (tokens - 1) / g.rows_per_group < groups, op,
             ": rows_per_group must be at least 1 and cover ", tokens, " rows with ", groups,
             " groups, got ", g.rows_per_group);
  }
  return found;
}

// What shrink and its derivatives take beside their own tensors; `a` and `e` stay alive by the
// caller.
template <class Params>
void set_first(const char* op, Params& p, const Rows& x, const Tensor& a,
               const std::optional<Tensor>& e, const GroupArguments& g) {
  p.dtype = dtype_of(op, x.t);
  p.tokens = x.count;
  p.n = x.columns;
  p.x = x.t.data_ptr();
  p.x_stride = x.stride;
  p.r = static_cast<int>(a.size(1));
  p.a = a.data_ptr();
  p.groups = grouping(op, g, a.size(0), x.count, x.t);
  p.noise = AdapterNoise{nullptr, 0, RowIds{nullptr, 0, 1}, 0.0};
  if (!e.has_value()) return;
  BK_CHECK(g.key.has_value(), op, ": key is needed with e; make it with random.key(seed)");
  p.e = e->data_ptr();
  p.noise = AdapterNoise{key_pointer(op, *g.key, x.t), g.stream,
                         row_ids(op, g.row0, 1, g.ids, x.count, x.t), 0.0};
}

void check_factors(const char* op, const Tensor& x, const Tensor& a, const std::optional<Tensor>& e,
                   const Tensor& b) {
  BK_CHECK(x.dim() == 2 && a.dim() == 3 && a.size(0) >= 1 && a.size(2) == x.size(1), op,
           ": x must have shape (tokens, n) and a (groups, r, n)");
  BK_CHECK(a.size(1) >= 1 && a.size(1) <= kMaxFusedRank, op, ": rank must be 1 to ", kMaxFusedRank,
           ", got ", a.size(1));
  BK_CHECK(!e.has_value() || (e->dim() == 3 && e->size(0) == a.size(0) && e->size(1) == a.size(1) &&
                              e->size(2) == a.size(2)),
           op, ": e must have the shape of a");
  BK_CHECK((b.dim() == 2 || (b.dim() == 3 && b.size(0) == a.size(0))) && b.size(-1) == a.size(1),
           op, ": b must have shape (m, r) or (groups, m, r)");
}

// y of the rows of h, which is (tokens, r); `groups` counts where b is (groups, m, r).
template <class Device>
Tensor expand_rows(const char* op, const Tensor& h, const Tensor& b,
                   const std::optional<Tensor>& base, const Grouping& groups, double scaling,
                   ScalarType type) {
  const int64_t tokens = h.size(0), m = b.size(-2);
  const ScalarType dtype = base.has_value() ? base->scalar_type() : type;
  Tensor y = empty_like_shape(h, {tokens, m}, dtype);
  if (tokens == 0 || m == 0) return y;
  Grouped<ExpandParams> p{};
  std::optional<Rows> base_rows;
  if (base.has_value()) {
    base_rows = as_rows(*base);
    p.base = base_rows->t.data_ptr();
    p.base_stride = base_rows->stride;
  }
  p.dtype = dtype_of(op, y);
  p.tokens = tokens;
  p.m = m;
  p.r = static_cast<int>(h.size(1));
  p.h = h.data_ptr();
  p.b = b.data_ptr();
  p.scaling = scaling;
  p.y = y.mutable_data_ptr();
  p.groups = groups;
  if (b.dim() == 3)
    launch(op, h, p, Device::grouped_expand_workspace, Device::grouped_expand);
  else
    launch(op, h, static_cast<ExpandParams&>(p), Device::expand_workspace, Device::expand);
  return y;
}

void check_base(const char* op, const std::optional<Tensor>& base, const Tensor& x, int64_t m) {
  if (!base.has_value()) return;
  BK_CHECK(base->dim() == 2 && base->size(0) == x.size(0) && base->size(1) == m, op,
           ": base must have the output's shape, ", x.size(0), " rows of ", m);
  BK_CHECK(accumulate_type(*base) == accumulate_type(x), op,
           ": base must have a dtype that fits x");
  check_device(op, "base", *base, x);
}

template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor a, std::optional<Tensor> e, Tensor b,
                                   std::optional<Tensor> base, std::optional<Tensor> plan,
                                   int64_t rows_per_group, std::optional<Tensor> key,
                                   int64_t stream, int64_t row0, std::optional<Tensor> ids,
                                   double scaling) {
  constexpr const char* op = "grouped_forward";
  check_factors(op, x, a, e, b);
  check_base(op, base, x, b.size(-2));
  OptionalDeviceGuard guard(x);
  a = factor(op, "a", a, x);
  b = factor(op, "b", b, x);
  if (e.has_value()) e = factor(op, "e", *e, x);
  const Rows rows = as_rows(x);
  Grouped<ShrinkParams> p{};
  set_first(op, p, rows, a, e, {plan, rows_per_group, key, stream, row0, ids});
  Tensor h = empty_like_shape(x, {rows.count, p.r}, accumulate_type(x));
  if (rows.count > 0) {
    p.h = h.mutable_data_ptr();
    launch(op, x, p, Device::shrink_workspace, Device::shrink);
  }
  return {expand_rows<Device>(op, h, b, base, p.groups, scaling, x.scalar_type()), h};
}

template <class Device>
std::tuple<Tensor, Tensor> sampled_forward(Tensor x, Tensor mean, Tensor rho, Tensor b,
                                           std::optional<Tensor> base, Tensor draws,
                                           std::optional<Tensor> plan, int64_t rows_per_group,
                                           Tensor key, int64_t stream, std::string std,
                                           bool antithetic, double scaling) {
  constexpr const char* op = "sampled_forward";
  BK_CHECK(x.dim() == 2 && mean.dim() == 2 && rho.dim() == 2 && b.dim() == 2 &&
               mean.size(1) == x.size(1) && rho.size(0) == mean.size(0) &&
               b.size(1) == mean.size(0),
           op, ": x must have shape (tokens, n), mean (r, n), rho (r, n) or (r, 1), b (m, r)");
  BK_CHECK(mean.size(0) >= 1 && mean.size(0) <= kMaxFusedRank, op, ": rank must be 1 to ",
           kMaxFusedRank, ", got ", mean.size(0));
  check_base(op, base, x, b.size(0));
  OptionalDeviceGuard guard(x);
  mean = factor(op, "mean", mean, x);
  rho = factor(op, "rho", rho, x);
  b = factor(op, "b", b, x);
  draws = row_major(draws);
  const Rows rows = as_rows(x);
  SampledShrinkParams p{};
  p.law = draw_params(op, rho, x.size(1), draws, key, stream, std, antithetic);
  p.law.mean = mean.data_ptr();
  p.dtype = dtype_of(op, x);
  p.tokens = rows.count;
  p.n = rows.columns;
  p.x = rows.t.data_ptr();
  p.x_stride = rows.stride;
  p.r = static_cast<int>(mean.size(0));
  p.noise = AdapterNoise{nullptr, 0, RowIds{nullptr, 0, 1}, 0.0};
  const std::optional<Tensor> none;
  p.groups = grouping(op, {plan, rows_per_group, none, 0, 0, none}, draws.size(0), rows.count, x);
  Tensor h = empty_like_shape(x, {rows.count, p.r}, accumulate_type(x));
  if (rows.count > 0) {
    p.h = h.mutable_data_ptr();
    launch(op, x, p, Device::sampled_shrink_workspace, Device::sampled_shrink);
  }
  return {expand_rows<Device>(op, h, b, base, p.groups, scaling, x.scalar_type()), h};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dy, Tensor x, Tensor a, std::optional<Tensor> e, Tensor b, Tensor h,
    std::optional<Tensor> plan, int64_t rows_per_group, std::optional<Tensor> key, int64_t stream,
    int64_t row0, std::optional<Tensor> ids, double scaling, bool need_dx, bool need_da,
    bool need_de, bool need_db) {
  constexpr const char* op = "grouped_backward";
  check_factors(op, x, a, e, b);
  const int64_t tokens = x.size(0), m = b.size(-2), r = a.size(1);
  BK_CHECK(dy.dim() == 2 && dy.size(0) == tokens && dy.size(1) == m && h.dim() == 2 &&
               h.size(0) == tokens && h.size(1) == r,
           op, ": dy must have shape (", tokens, ", ", m, ") and h (", tokens, ", ", r, ")");
  BK_CHECK(accumulate_type(dy) == accumulate_type(x), op, ": dy must have a dtype that fits x");
  check_device(op, "dy", dy, x);
  OptionalDeviceGuard guard(x);
  a = factor(op, "a", a, x);
  b = factor(op, "b", b, x);
  h = factor(op, "h", h, x);
  if (e.has_value()) e = factor(op, "e", *e, x);
  need_de = need_de && e.has_value();
  const bool need_dh = need_dx || need_da || need_de;
  const GroupArguments g{plan, rows_per_group, key, stream, row0, ids};
  const Rows rows = as_rows(x), dy_rows = as_rows(dy);
  Grouped<ShrinkBackwardParams> s{};
  set_first(op, s, rows, a, e, g);
  const ScalarType acc = accumulate_type(x);
  const auto made = [&](bool needed, const Tensor& like, ScalarType type) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < like.dim(); ++i) shape.push_back(needed ? like.size(i) : 0);
    return empty_like_shape(x, shape, type);
  };
  Tensor dx = made(need_dx, x, x.scalar_type()), da = made(need_da, a, acc),
         de = made(need_de, a, acc), db = made(need_db, b, acc), dh = made(need_dh, h, acc);
  if (tokens == 0 || m == 0) {
    for (Tensor* t : {&dx, &da, &de, &db}) torch::stable::zero_(*t);
    return {dx, da, de, db};
  }
  if (need_dh || need_db) {
    Grouped<ExpandBackwardParams> p{};
    p.dtype = dtype_of(op, dy);
    p.tokens = tokens;
    p.m = m;
    p.r = s.r;
    p.dy = dy_rows.t.data_ptr();
    p.dy_stride = dy_rows.stride;
    p.h = h.data_ptr();
    p.b = b.data_ptr();
    p.scaling = scaling;
    p.dh = need_dh ? dh.mutable_data_ptr() : nullptr;
    p.db = need_db ? db.mutable_data_ptr() : nullptr;
    p.groups = s.groups;
    if (b.dim() == 3)
      launch(op, x, p, Device::grouped_expand_backward_workspace, Device::grouped_expand_backward);
    else
      launch(op, x, static_cast<ExpandBackwardParams&>(p), Device::expand_backward_workspace,
             Device::expand_backward);
  }
  if (need_dh && s.n > 0) {
    s.dh = dh.data_ptr();
    s.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
    s.da = need_da ? da.mutable_data_ptr() : nullptr;
    s.de = need_de ? de.mutable_data_ptr() : nullptr;
    launch(op, x, s, Device::shrink_backward_workspace, Device::shrink_backward);
  }
  return {dx, da, de, db};
}

template <class Device>
void grouped_ops(Library& m) {
  m.impl("group_rows", TORCH_BOX(&group_rows<Device>));
  m.impl("grouped_forward", TORCH_BOX(&forward<Device>));
  m.impl("sampled_forward", TORCH_BOX(&sampled_forward<Device>));
  m.impl("grouped_backward", TORCH_BOX(&backward<Device>));
}
BK_REGISTER(grouped_ops)

}  // namespace
}  // namespace bayes_kernels
