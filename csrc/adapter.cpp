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
  static constexpr bool has_decode = false;  // whole adapters in one launch, where decodes() allows
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
  static constexpr bool has_decode = true;
  static constexpr auto decodes = decodes_cuda;
  static constexpr auto decode_workspace = decode_workspace_cuda;
  static constexpr auto decode = decode_cuda;
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

// The params of shrink without h, and what they point to.
struct ShrinkCall {
  Rows rows;
  Tensor a;
  NoiseMatrix matrix;
  ShrinkParams p = {};
};

// Of the rows of x (..., n).
ShrinkCall shrink_call(const char* op, const Tensor& x, const Tensor& first, NoiseMatrix matrix,
                       const NoiseArguments& noise) {
  ShrinkCall call{as_rows(x), factor(op, "a", first, x), std::move(matrix)};
  ShrinkParams& p = call.p;
  p.dtype = dtype_of(op, x);
  p.tokens = call.rows.count;
  p.n = call.rows.columns;
  BK_CHECK(call.a.size(1) == p.n, op, ": a must have ", p.n, " columns, got ", call.a.size(1));
  p.r = checked_rank(op, call.a.size(0));
  p.x = call.rows.t.data_ptr();
  p.x_stride = call.rows.stride;
  p.a = call.a.data_ptr();
  set_noise(op, p, call.matrix, noise, call.a, x);
  return call;
}

// h (tokens, r) of the rows of x (..., n).
template <class Device>
Tensor shrink_rows(const char* op, const Tensor& x, const Tensor& a, NoiseMatrix matrix,
                   const NoiseArguments& noise) {
  ShrinkCall call = shrink_call(op, x, a, std::move(matrix), noise);
  Tensor h = empty_like_shape(x, {call.p.tokens, call.p.r}, accumulate_type(x));
  if (call.p.tokens == 0) return h;
  call.p.h = h.mutable_data_ptr();
  launch(op, x, call.p, Device::shrink_workspace, Device::shrink);
  return h;
}

// Several calls that share x: on the CPU in one pass.
template <class Device>
void shrink_together(const char* op, const Tensor& x, std::vector<ShrinkCall>& calls) {
  if (Device::always_draws || calls.size() == 1) {
    for (ShrinkCall& call : calls) launch(op, x, call.p, Device::shrink_workspace, Device::shrink);
    return;
  }
  std::vector<ShrinkParams> list;
  std::vector<Tensor> workspaces;
  for (ShrinkCall& call : calls) {
    workspaces.push_back(empty_like_shape(x, {Device::shrink_workspace(call.p)}, ScalarType::Byte));
    call.p.workspace = workspaces.back().mutable_data_ptr();
    list.push_back(call.p);
  }
  shrink_list_cpu(list.data(), static_cast<int64_t>(list.size()));
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

// The params of expand without h, and what they point to.
struct ExpandCall {
  Tensor b, y;
  std::optional<Rows> base;
  ExpandParams p = {};
};

// Of h (tokens, r) in the accumulate type of `like`; `shape` is that of y (..., m) and of base.
ExpandCall expand_call(const char* op, const Tensor& like, int64_t tokens, int64_t r,
                       const Tensor& second, const std::optional<Tensor>& added, double scaling,
                       ScalarType dtype, const std::vector<int64_t>& shape) {
  ExpandCall call{row_major(second), empty_like_shape(like, shape, dtype), {}};
  const Tensor& b = call.b;
  BK_CHECK(b.dim() == 2 && b.size(1) == r, op, ": b must have ", r, " columns");
  BK_CHECK(b.scalar_type() == accumulate_type(like), op, ": h and b must have the same dtype");
  check_device(op, "b", b, like);
  ExpandParams& p = call.p;
  p.tokens = tokens;
  p.m = b.size(0);
  p.r = checked_rank(op, r);
  p.b = b.data_ptr();
  p.scaling = scaling;
  p.dtype = dtype_of(op, call.y);
  BK_CHECK(accumulate_type(call.y) == accumulate_type(like), op,
           ": h and b must be float32 (float64 beside float64 outputs)");
  if (added.has_value()) {
    bool fits = added->dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i)
      fits = added->size(static_cast<int64_t>(i)) == shape[i];
    BK_CHECK(fits, op, ": base must have the output's shape, ", p.tokens, " rows of ", p.m);
    BK_CHECK(added->scalar_type() == dtype, op, ": base must have the output's dtype");
    check_device(op, "base", *added, like);
    call.base = as_rows(*added);
    p.base = call.base->t.data_ptr();
    p.base_stride = call.base->stride;
  }
  p.y = call.y.mutable_data_ptr();
  return call;
}

template <class Device>
Tensor expand_rows(const char* op, const Tensor& given, const Tensor& b,
                   const std::optional<Tensor>& base, double scaling, ScalarType dtype,
                   const std::vector<int64_t>& shape, bool behind = false) {
  const Tensor h = row_major(given);
  ExpandCall call = expand_call(op, h, h.size(0), h.size(1), b, base, scaling, dtype, shape);
  call.p.behind = behind;
  if (call.p.tokens == 0 || call.p.m == 0) return call.y;
  call.p.h = h.data_ptr();
  launch(op, h, call.p, Device::expand_workspace, Device::expand);
  return call.y;
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

// One of the adapters of a call.
struct Adapter {
  Tensor a;
  std::optional<Tensor> rho;
  Tensor b;
  std::optional<Tensor> base;
  int64_t stream;
  double scaling;
};

// Outputs, and h of each where it was asked for.
using Outputs = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

// Whole adapters that share x, in one launch for each kMaxDecodeItems of them.
template <class Device>
Outputs decode(const char* op, const Tensor& x, int64_t tokens,
               const std::vector<Adapter>& adapters, const NoiseArguments& noise,
               const std::string& std, const std::vector<std::vector<int64_t>>& shapes,
               bool need_h) {
  Outputs out;
  auto& [ys, hs] = out;
  for (size_t first = 0; first < adapters.size(); first += kMaxDecodeItems) {
    std::vector<ShrinkCall> shrinks;  // alive until the launch
    std::vector<ExpandCall> expands;
    DecodeParams p{};
    for (size_t i = first; i < adapters.size() && p.items < kMaxDecodeItems; ++i) {
      const Adapter& one = adapters[i];
      NoiseArguments own = noise;
      own.stream = one.stream;
      shrinks.push_back(shrink_call(
          op, x, one.a, noise_matrix<Device>(op, one.rho, one.a, own, std, x, /*few=*/true), own));
      const ShrinkParams& s = shrinks.back().p;
      const ScalarType dtype = one.base.has_value() ? one.base->scalar_type() : x.scalar_type();
      expands.push_back(
          expand_call(op, x, tokens, s.r, one.b, one.base, one.scaling, dtype, shapes[i]));
      const ExpandParams& e = expands.back().p;
      ys.push_back(expands.back().y);
      if (need_h) hs.push_back(empty_like_shape(x, {tokens, s.r}, ScalarType::Float));
      p.dtype = s.dtype;
      p.x = s.x;
      p.x_stride = s.x_stride;
      p.noise = s.noise;
      p.std = s.draw.std;
      p.tokens = tokens;
      p.n = s.n;
      p.item[p.items++] = {
          s.a,        e.b,           s.draw.rho, s.draw.row_constant,
          e.base,     e.base_stride, e.y,        need_h ? hs.back().mutable_data_ptr() : nullptr,
          e.dtype,    e.m,           one.stream, s.r,
          one.scaling};
    }
    launch(op, x, p, Device::decode_workspace, Device::decode);
  }
  return out;
}

// Whole adapters in one call: one launch on a GPU for few tokens; elsewhere the kernels of
// scaled_normal, shrink and expand in turn, or, on a GPU and for few tokens, of shrink and expand.
// With keep_draw the CPU keeps normals from call to call.
template <class Device>
Outputs whole(const char* op, const Tensor& x, const std::vector<Adapter>& adapters,
              const NoiseArguments& noise, const std::string& std, bool keep_draw, bool need_h) {
  BK_CHECK(x.dim() >= 1, op, ": x must have shape (..., n)");
  const int64_t tokens = row_count(x);
  bool decodes = Device::has_decode;
  std::vector<std::vector<int64_t>> shapes(adapters.size(), shape_of(x));
  for (size_t i = 0; i < adapters.size(); ++i) {
    const Adapter& one = adapters[i];
    BK_CHECK(one.a.dim() == 2 && one.b.dim() == 2, op, ": a and b must have two dimensions");
    // Before the first launch: shrink would read what lies elsewhere.
    check_device(op, "b", one.b, x);
    if (one.base.has_value()) check_device(op, "base", *one.base, x);
    shapes[i].back() = one.b.size(0);
    if constexpr (Device::has_decode)
      decodes = decodes && one.b.size(0) > 0 && Device::decodes(tokens, x.size(-1), one.a.size(0));
  }
  OptionalDeviceGuard guard(x);
  if constexpr (Device::has_decode) {
    if (decodes) return decode<Device>(op, x, tokens, adapters, noise, std, shapes, need_h);
  }
  const auto output = [&](size_t i, const Tensor& h) {
    const Adapter& one = adapters[i];
    const ScalarType dtype = one.base.has_value() ? one.base->scalar_type() : x.scalar_type();
    return expand_rows<Device>(op, h, one.b, one.base, one.scaling, dtype, shapes[i],
                               /*behind=*/true);
  };
  const auto shrink = [&](size_t i) {
    const Adapter& one = adapters[i];
    NoiseArguments own = noise;
    own.stream = one.stream;
    const bool few = tokens > 0 && tokens <= few_shrink_tokens(checked_rank(op, one.a.size(0)));
    NoiseMatrix matrix = noise_matrix<Device>(op, one.rho, one.a, own, std, x, few);
    if (!Device::always_draws && keep_draw && matrix.draw.rho != nullptr) {
      matrix.kept =
          kept_normals(own.key->template const_data_ptr<int64_t>(), own.stream, one.a.numel());
      matrix.draw.eps = matrix.kept.get();
    }
    return shrink_call(op, x, one.a, std::move(matrix), own);
  };
  Outputs out;
  auto& [ys, hs] = out;
  for (size_t first = 0; first < adapters.size(); first += kMaxShrinkList) {
    const size_t end = std::min(adapters.size(), first + kMaxShrinkList);
    std::vector<ShrinkCall> calls;
    std::vector<Tensor> made;
    for (size_t i = first; i < end; ++i) {
      calls.push_back(shrink(i));
      made.push_back(empty_like_shape(x, {tokens, calls.back().p.r}, accumulate_type(x)));
      calls.back().p.h = made.back().mutable_data_ptr();
    }
    if (tokens > 0) shrink_together<Device>(op, x, calls);
    for (size_t i = first; i < end; ++i) {
      ys.push_back(output(i, made[i - first]));
      if (need_h) hs.push_back(made[i - first]);
    }
  }
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor a, std::optional<Tensor> rho, Tensor b,
                                   std::optional<Tensor> base, std::optional<Tensor> key,
                                   int64_t stream, int64_t row0, int64_t rows_per_id,
                                   std::optional<Tensor> ids, double dropout, std::string std,
                                   double scaling) {
  const auto [ys, hs] = whole<Device>("adapter_forward", x, {{a, rho, b, base, stream, scaling}},
                                      {key, stream, row0, rows_per_id, ids, dropout}, std,
                                      /*keep_draw=*/false, /*need_h=*/true);
  return {ys[0], hs[0]};
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
      const auto [ys, hs] = whole<Device>("adapter_train", x, {{a, rho, b, base, stream, scaling}},
                                          {key, stream, row0, rows_per_id, ids, dropout}, std,
                                          /*keep_draw=*/false, /*need_h=*/true);
      return {ys[0], hs[0]};
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
      return std::get<0>(whole<Device>("adapter_infer", x, {{a, rho, b, base, stream, scaling}},
                                       {key, stream, row0, rows_per_id, ids, dropout}, std,
                                       /*keep_draw=*/true, /*need_h=*/false))[0];
    } catch (const ArgumentError&) {
    }
  }
  return std::nullopt;
}

// Adapters that share x: outputs, and with `train` h of each; nothing where the op does not take an
// argument. rho, base: empty, or one for each adapter.
template <class Device>
Outputs group(Tensor x, std::vector<Tensor> a, std::vector<Tensor> rho, std::vector<Tensor> b,
              std::vector<Tensor> base, std::optional<Tensor> key, std::vector<int64_t> streams,
              int64_t row0, int64_t rows_per_id, std::optional<Tensor> ids, double dropout,
              std::string std, std::vector<double> scaling, bool train) {
  constexpr const char* op = "adapter_group";
  if constexpr (!std::is_same_v<Device, NoDevice>) {
    try {
      const auto fits = [&](size_t size) { return size == 0 || size == a.size(); };
      BK_CHECK(b.size() == a.size() && streams.size() == a.size() && scaling.size() == a.size() &&
                   fits(rho.size()) && fits(base.size()),
               op, ": lists must have one entry for each adapter");
      std::vector<Adapter> adapters;
      for (size_t i = 0; i < a.size(); ++i)
        adapters.push_back({a[i], rho.empty() ? std::nullopt : std::optional<Tensor>(rho[i]), b[i],
                            base.empty() ? std::nullopt : std::optional<Tensor>(base[i]),
                            streams[i], scaling[i]});
      const int64_t first = streams.empty() ? 0 : streams[0];
      return whole<Device>(op, x, adapters, {key, first, row0, rows_per_id, ids, dropout}, std,
                           /*keep_draw=*/!train, /*need_h=*/train);
    } catch (const ArgumentError&) {
    }
  }
  return {};
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
  m.impl("adapter_group", TORCH_BOX(&group<Device>));
  m.impl("adapter_backward", TORCH_BOX(&backward<Device>));
  m.impl("adapter_expand_backward", TORCH_BOX(&expand_backward<Device>));
}
BK_REGISTER(adapter_ops)
STABLE_TORCH_LIBRARY_IMPL(BK_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("adapter_train", TORCH_BOX(&train<NoDevice>));
  m.impl("adapter_infer", TORCH_BOX(&infer<NoDevice>));
  m.impl("adapter_group", TORCH_BOX(&group<NoDevice>));
}

}  // namespace
}  // namespace bayes_kernels
