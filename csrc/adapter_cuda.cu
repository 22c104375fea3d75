// Adapter family on the GPU: which kernels run, over which grid, with what workspace.
//
//   shrink           [pack F]  down  [sum of column splits]
//   shrink_backward  [pack dh] up (dx)  outer (da, de)  sum of token splits
//   expand           [pack h]  up
//   expand_backward  [pack b, h]  down (dh) [sum]  outer (db)  sum
//
// Packing belongs to the tensor-core kernels. Splits are functions of the shape alone, never of the
// device, and partial sums are added in order of the split: the same inputs give the same bits.
#include "adapter.h"

#include <type_traits>

#include "adapter_fma.cuh"
#include "adapter_mma.cuh"

namespace bayes_kernels {
namespace {

constexpr const char* kNoDouble = "float64 is supported on the CPU only; use float32";

// Blocks that fill the largest GPU in mind: 132 multiprocessors with four blocks of 128 threads.
constexpr int64_t kFullGrid = 512;
// 16-bit activations with fewer tokens than this take the fp32 kernels, which read the factors as
// they are.
constexpr int64_t kMmaTokens = 32;

constexpr int kSumThreads = 256;

struct SumArgs {
  const float* partial;  // (splits, rows, columns)
  int64_t rows, columns;
  int64_t splits;
  float scale;
  bool transpose;  // write (columns, rows)
  float* out;
};

__global__ void __launch_bounds__(kSumThreads) sum_kernel(SumArgs p) {
  const int64_t count = p.rows * p.columns;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= count) return;
  float sum = p.partial[index];
  for (int64_t split = 1; split < p.splits; ++split) sum += p.partial[split * count + index];
  const int64_t row = index / p.columns;
  p.out[p.transpose ? (index - row * p.columns) * p.rows + row : index] = p.scale * sum;
}

// ---- host-side helpers --------------------------------------------------------------------------

dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }

int padded_rank(int r) { return r <= 8 ? 8 : r <= 16 ? 16 : r <= 32 ? 32 : 64; }

int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

bool uses_mma(DType dtype, int64_t tokens) { return dtype != DType::kF32 && tokens >= kMmaTokens; }

bool vector_access(const void* pointer, int64_t stride_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0 &&
         stride_bytes % bytes == 0;
}

float keep_scale(const AdapterNoise& noise) {
  return noise.dropout > 0.0 ? static_cast<float>(1.0 / (1.0 - noise.dropout)) : 1.0f;
}

AdapterNoise no_noise() { return AdapterNoise{nullptr, 0, RowIds{nullptr, 0, 1}, 0.0}; }

// Calls f(zero of the element type).
template <class F>
const char* with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(bf16{});
    case DType::kF16:
      return f(f16{});
    default:
      return kNoDouble;
  }
}

// Calls f(padded rank, whether there is noise), both as constants.
template <class F>
const char* with_rank(int r, bool flip, const F& f) {
  const auto with_flip = [&](auto rank) {
    return flip ? f(rank, std::true_type{}) : f(rank, std::false_type{});
  };
  switch (padded_rank(r)) {
    case 8:
      return with_flip(std::integral_constant<int, 8>{});
    case 16:
      return with_flip(std::integral_constant<int, 16>{});
    case 32:
      return with_flip(std::integral_constant<int, 32>{});
    default:
      return with_flip(std::integral_constant<int, 64>{});
  }
}

// Hands out 256-byte aligned parts of a workspace; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// ---- pack ---------------------------------------------------------------------------------------

class PackList {
 public:
  PackList(const AdapterNoise& noise, int r) : r_(r) {
    args_.noise = noise;
    args_.r = r;
  }
  // Parts of the largest magnitude of an operand, or of two that share a scale; null where the type
  // of the activations needs none. Called before the operand is packed.
  const float* amax(Workspace& workspace, DType dtype, const float* data, const float* also,
                    int64_t count) {
    if (dtype != DType::kF16) return nullptr;
    if (const AmaxJob* known = amax_of(data)) return known->parts;
    amax_.job[amaxes_] = {data, also, count, workspace.take<float>(kAmaxParts)};
    return amax_.job[amaxes_++].parts;
  }
  // F (r, n) for down.
  const uint4* factor(Workspace& workspace, const float* source, int64_t rank_stride,
                      int64_t column_stride, int64_t columns) {
    const int bits = log2_of(padded_rank(r_) / 8);
    const int64_t count = 4 * ceil_div(columns, kSignsPerBlock) * 32 << bits;
    return add(workspace, PackJob{Fragment::kDown, source, rank_stride, column_stride, r_, columns,
                                  false, parts_of(source), nullptr, count, bits});
  }
  // h (tokens, r) for up or outer.
  const uint4* low(Workspace& workspace, Fragment kind, const float* source, int64_t tokens,
                   bool flip) {
    const int bits = log2_of((padded_rank(r_) + 15) / 16);
    const int64_t count = 2 * ceil_div(tokens, 32) * 32 << bits;
    return add(workspace, PackJob{kind, source, r_, 1, tokens, r_, flip, parts_of(source), nullptr,
                                  count, bits});
  }
  template <class T>
  const char* launch(void* stream) {
    if constexpr (sizeof(T) == 2) {
      if (amaxes_ > 0) {
        BK_LAUNCH(amax_kernel, grid_of(kAmaxParts, amaxes_), kAmaxThreads, 0, stream, amax_);
        if (const char* error = bk_last_error()) return error;
      }
      if (most_ == 0) return nullptr;
      BK_LAUNCH((pack_kernel<T>), grid_of(ceil_div(most_, kPackThreads), jobs_), kPackThreads, 0,
                stream, args_);
      return bk_last_error();
    } else {
      return nullptr;
    }
  }

 private:
  const uint4* add(Workspace& workspace, PackJob job) {
    job.out = workspace.take<uint4>(job.count);
    if (job.count > most_) most_ = job.count;
    args_.job[jobs_++] = job;
    return job.out;
  }
  const AmaxJob* amax_of(const float* data) const {
    for (int i = 0; i < amaxes_; ++i)
      if (amax_.job[i].data == data || amax_.job[i].also == data) return &amax_.job[i];
    return nullptr;
  }
  const float* parts_of(const float* data) const {
    const AmaxJob* known = amax_of(data);
    return known == nullptr ? nullptr : known->parts;
  }
  PackArgs args_{};
  AmaxArgs amax_{};
  int amaxes_ = 0;
  int r_;
  int jobs_ = 0;
  int64_t most_ = 0;
};

// ---- the three products, each as a plan that sizes and then launches ----------------------------

struct Rows {  // a matrix of activations
  const void* data;
  int64_t stride, tokens, columns;
};

struct Factor {  // F[k][j] at k * rank_stride + j * column_stride; e: the noise matrix or null
  const float* data;
  const float* e;
  int64_t rank_stride, column_stride;
};

// out (tokens, r) = scale * rows F^T
struct Down {
  DType dtype;
  Rows rows;
  Factor factor;
  AdapterNoise noise;
  float scale;
  int r;
  float* out;

  bool mma;
  int64_t splits, per_split;
  const uint4 *packed, *packed_e;
  const float* amax;
  float* partial;

  void plan(PackList& packs, Workspace& workspace) {
    mma = uses_mma(dtype, rows.tokens);
    if (mma) {
      amax = packs.amax(workspace, dtype, factor.data, factor.e, r * rows.columns);
      const int64_t blocks = ceil_div(rows.tokens, kDownTokens * (kMmaThreads / 32));
      const int64_t tiles = at_least_one(ceil_div(rows.columns, kSignsPerBlock));
      const int64_t wanted = at_least_one(kFullGrid / blocks);
      per_split = ceil_div(tiles, wanted < tiles ? wanted : tiles);
      splits = ceil_div(tiles, per_split);
      packed = packs.factor(workspace, factor.data, factor.rank_stride, factor.column_stride,
                            rows.columns);
      packed_e = factor.e == nullptr ? nullptr
                                     : packs.factor(workspace, factor.e, factor.rank_stride,
                                                    factor.column_stride, rows.columns);
    } else {
      splits = at_least_one(ceil_div(rows.columns, kDownFmaColumns));
    }
    partial = splits > 1 ? workspace.take<float>(splits * rows.tokens * r) : nullptr;
  }

  template <class T>
  const char* launch(void* stream) const {
    const bool flip = factor.e != nullptr;
    const float first_scale = splits > 1 ? 1.0f : scale;
    float* first_out = splits > 1 ? partial : out;
    const char* error = nullptr;
    if constexpr (sizeof(T) == 2) {
      if (mma)
        error = with_rank(r, flip, [&](auto rank, auto flips) {
          // clang-format off
          const DownArgs args{
              rows.data, rows.stride, rows.tokens, rows.columns, packed, packed_e, amax, noise,
              first_scale * keep_scale(noise), first_out, r, per_split,
              vector_access(rows.data, rows.stride * 2, 16)};
          // clang-format on
          BK_LAUNCH((down_mma_kernel<T, decltype(rank)::value, decltype(flips)::value>),
                    grid_of(ceil_div(rows.tokens, kDownTokens * (kMmaThreads / 32)), splits),
                    kMmaThreads, 0, stream, args);
          return bk_last_error();
        });
    }
    if (!mma) {
      const int64_t groups = ceil_div(r, kDownFmaRanks);
      const int64_t blocks = at_least_one(kFullGrid / (splits * groups));
      const int64_t tokens_per_block =
          ceil_div(ceil_div(rows.tokens, blocks), kFmaTokens) * kFmaTokens;
      // clang-format off
      const DownFmaArgs args{
          dtype, rows.data, rows.stride, rows.tokens, rows.columns, factor.data, factor.e,
          factor.rank_stride, factor.column_stride, noise, first_scale, keep_scale(noise),
          first_out, r, tokens_per_block,
          vector_access(rows.data, rows.stride * static_cast<int64_t>(sizeof(T)),
                        4 * static_cast<int>(sizeof(T)))};
      // clang-format on
      const dim3 grid = grid_of(splits, ceil_div(rows.tokens, tokens_per_block), groups);
      if (flip)
        BK_LAUNCH((down_fma_kernel<true>), grid, kFmaThreads, 0, stream, args);
      else
        BK_LAUNCH((down_fma_kernel<false>), grid, kFmaThreads, 0, stream, args);
      error = bk_last_error();
    }
    if (error != nullptr || splits == 1) return error;
    const SumArgs sum{partial, rows.tokens, r, splits, scale, false, out};
    BK_LAUNCH(sum_kernel, grid_of(ceil_div(rows.tokens * r, kSumThreads)), kSumThreads, 0, stream,
              sum);
    return bk_last_error();
  }
};

// out (tokens, columns) = base + scale * low F
struct Up {
  DType dtype;
  Rows base;  // data may be null; extents are those of out
  void* out;
  Factor factor;
  const float* low;
  AdapterNoise noise;
  float scale;
  int r;

  bool mma;
  const uint4 *packed, *packed_e;
  const float *amax_low, *amax;

  void plan(PackList& packs, Workspace& workspace) {
    mma = uses_mma(dtype, base.tokens);
    if (!mma) return;
    amax_low = packs.amax(workspace, dtype, low, nullptr, base.tokens * r);
    amax = packs.amax(workspace, dtype, factor.data, factor.e, r * base.columns);
    packed = packs.low(workspace, Fragment::kUp, low, base.tokens, false);
    packed_e =
        factor.e == nullptr ? nullptr : packs.low(workspace, Fragment::kUp, low, base.tokens, true);
  }

  int64_t tokens_per_block(int64_t column_blocks) const {
    const int64_t blocks = at_least_one(kFullGrid / column_blocks);
    return ceil_div(ceil_div(base.tokens, blocks), 32) * 32;
  }

  template <class T>
  const char* launch(void* stream) const {
    const bool flip = factor.e != nullptr;
    return with_rank(r, flip, [&](auto rank, auto flips) {
      constexpr int kRank = decltype(rank)::value;
      constexpr bool kFlip = decltype(flips)::value;
      if constexpr (sizeof(T) == 2) {
        if (mma) {
          const int64_t column_blocks = ceil_div(base.columns, kSlab * (kMmaThreads / 32));
          const int64_t tokens = tokens_per_block(column_blocks);
          const bool vector =
              vector_access(out, base.columns * 2, 16) &&
              (base.data == nullptr || vector_access(base.data, base.stride * 2, 16));
          // clang-format off
          const UpArgs args{
              base.data, base.stride, out, base.tokens, base.columns, factor.data, factor.e,
              factor.rank_stride, factor.column_stride, packed, packed_e, amax_low, amax, noise,
              scale * keep_scale(noise), r, tokens, vector};
          // clang-format on
          BK_LAUNCH((up_mma_kernel<T, (kRank + 15) / 16, kFlip>),
                    grid_of(column_blocks, ceil_div(base.tokens, tokens)), kMmaThreads, 0, stream,
                    args);
          return bk_last_error();
        }
      }
      const int64_t column_blocks = ceil_div(base.columns, fma_columns<kRank>() * kFmaThreads);
      const int64_t tokens = tokens_per_block(column_blocks);
      // clang-format off
      const UpFmaArgs args{
          dtype, base.data, base.stride, out, base.tokens, base.columns, factor.data, factor.e,
          factor.rank_stride, factor.column_stride, low, noise, scale * keep_scale(noise), r,
          tokens};
      // clang-format on
      BK_LAUNCH((up_fma_kernel<kRank, kFlip>),
                grid_of(column_blocks, ceil_div(base.tokens, tokens)), kFmaThreads, 0, stream,
                args);
      return bk_last_error();
    });
  }
};

// out (r, columns) = scale * low^T rows, or its transpose; out_e with signs on both
struct Outer {
  DType dtype;
  Rows rows;
  const float* low;
  AdapterNoise noise;
  float scale;
  int r;
  bool flip;       // whether the second product is computed
  bool transpose;  // out is (columns, r)
  float* out;      // may be null
  float* out_e;    // may be null

  bool mma;
  int64_t splits, tokens_per_block;
  const uint4 *packed, *packed_e;
  const float* amax_low;
  float *partial, *partial_e;

  void plan(PackList& packs, Workspace& workspace) {
    mma = uses_mma(dtype, rows.tokens);
    const int rank = padded_rank(r);
    const int columns_per_thread = rank <= 16 ? 4 : rank == 32 ? 2 : 1;
    const int64_t columns_per_block = mma ? kSlab : columns_per_thread * kFmaThreads;
    // Three blocks of the tensor-core kernel fit a multiprocessor.
    const int64_t full = mma ? kFullGrid * 3 / 4 : kFullGrid;
    const int64_t quantum = mma ? 128 : kFmaTokens;
    const int64_t wanted =
        at_least_one(full / at_least_one(ceil_div(rows.columns, columns_per_block)));
    tokens_per_block = ceil_div(ceil_div(rows.tokens, wanted), quantum) * quantum;
    splits = ceil_div(rows.tokens, tokens_per_block);
    if (mma) {
      amax_low = packs.amax(workspace, dtype, low, nullptr, rows.tokens * r);
      packed = packs.low(workspace, Fragment::kOuter, low, rows.tokens, false);
      packed_e = flip ? packs.low(workspace, Fragment::kOuter, low, rows.tokens, true) : nullptr;
    }
    partial = workspace.take<float>(splits * r * rows.columns);
    partial_e = flip ? workspace.take<float>(splits * r * rows.columns) : nullptr;
  }

  template <class T>
  const char* launch(void* stream) const {
    const char* error = with_rank(r, flip, [&](auto rank, auto flips) {
      constexpr int kRank = decltype(rank)::value;
      constexpr bool kFlip = decltype(flips)::value;
      if constexpr (sizeof(T) == 2) {
        if (mma) {
          constexpr int kSteps = kRank <= 16 ? 1 : 2;
          const int steps = (kRank + 15) / 16;
          // clang-format off
          const OuterArgs args{
              rows.data, rows.stride, rows.tokens, rows.columns, packed, packed_e, amax_low, steps,
              noise, partial, partial_e, r, tokens_per_block,
              vector_access(rows.data, rows.stride * 2, 16)};
          // clang-format on
          BK_LAUNCH((outer_mma_kernel<T, kSteps, kFlip>),
                    grid_of(ceil_div(rows.columns, kSlab), splits, steps / kSteps), kMmaThreads, 0,
                    stream, args);
          return bk_last_error();
        }
      }
      // clang-format off
      const OuterFmaArgs args{
          dtype, rows.data, rows.stride, rows.tokens, rows.columns, low, noise, partial, partial_e,
          r, tokens_per_block};
      // clang-format on
      BK_LAUNCH((outer_fma_kernel<kRank, kFlip>),
                grid_of(ceil_div(rows.columns, fma_columns<kRank>() * kFmaThreads), splits),
                kFmaThreads, 0, stream, args);
      return bk_last_error();
    });
    if (error == nullptr) error = total(partial, out, stream);
    if (error == nullptr) error = total(partial_e, out_e, stream);
    return error;
  }

 private:
  const char* total(const float* from, float* to, void* stream) const {
    if (to == nullptr) return nullptr;
    const SumArgs sum{from, r, rows.columns, splits, scale * keep_scale(noise), transpose, to};
    BK_LAUNCH(sum_kernel, grid_of(ceil_div(r * rows.columns, kSumThreads)), kSumThreads, 0, stream,
              sum);
    return bk_last_error();
  }
};

// ---- the four ops -------------------------------------------------------------------------------

struct ShrinkPlan {
  PackList packs;
  Down down{};
  int64_t bytes;

  explicit ShrinkPlan(const ShrinkParams& p) : packs(p.noise, p.r) {
    Workspace workspace(p.workspace);
    down.dtype = p.dtype;
    down.rows = Rows{p.x, p.x_stride, p.tokens, p.n};
    down.factor = Factor{static_cast<const float*>(p.a), static_cast<const float*>(p.e), p.n, 1};
    down.noise = p.noise;
    down.scale = 1.0f;
    down.r = p.r;
    down.out = static_cast<float*>(p.h);
    down.plan(packs, workspace);
    bytes = workspace.used();
  }
};

struct ShrinkBackwardPlan {
  PackList packs;
  Up up{};
  Outer outer{};
  bool has_up, has_outer;
  int64_t bytes;

  explicit ShrinkBackwardPlan(const ShrinkBackwardParams& p) : packs(p.noise, p.r) {
    Workspace workspace(p.workspace);
    const float* dh = static_cast<const float*>(p.dh);
    has_up = p.dx != nullptr;
    has_outer = p.da != nullptr || p.de != nullptr;
    if (has_up) {
      up.dtype = p.dtype;
      up.base = Rows{nullptr, 0, p.tokens, p.n};
      up.out = p.dx;
      up.factor = Factor{static_cast<const float*>(p.a), static_cast<const float*>(p.e), p.n, 1};
      up.low = dh;
      up.noise = p.noise;
      up.scale = 1.0f;
      up.r = p.r;
      up.plan(packs, workspace);
    }
    if (has_outer) {
      outer.dtype = p.dtype;
      outer.rows = Rows{p.x, p.x_stride, p.tokens, p.n};
      outer.low = dh;
      outer.noise = p.noise;
      outer.scale = 1.0f;
      outer.r = p.r;
      outer.flip = p.de != nullptr;
      outer.transpose = false;
      outer.out = static_cast<float*>(p.da);
      outer.out_e = static_cast<float*>(p.de);
      outer.plan(packs, workspace);
    }
    bytes = workspace.used();
  }
};

struct ExpandPlan {
  PackList packs;
  Up up{};
  int64_t bytes;

  explicit ExpandPlan(const ExpandParams& p) : packs(no_noise(), p.r) {
    Workspace workspace(p.workspace);
    up.dtype = p.dtype;
    up.base = Rows{p.base, p.base_stride, p.tokens, p.m};
    up.out = p.y;
    up.factor = Factor{static_cast<const float*>(p.b), nullptr, 1, p.r};
    up.low = static_cast<const float*>(p.h);
    up.noise = no_noise();
    up.scale = static_cast<float>(p.scaling);
    up.r = p.r;
    up.plan(packs, workspace);
    bytes = workspace.used();
  }
};

struct ExpandBackwardPlan {
  PackList packs;
  Down down{};
  Outer outer{};
  bool has_down, has_outer;
  int64_t bytes;

  explicit ExpandBackwardPlan(const ExpandBackwardParams& p) : packs(no_noise(), p.r) {
    Workspace workspace(p.workspace);
    const Rows rows{p.dy, p.dy_stride, p.tokens, p.m};
    has_down = p.dh != nullptr;
    has_outer = p.db != nullptr;
    if (has_down) {
      down.dtype = p.dtype;
      down.rows = rows;
      down.factor = Factor{static_cast<const float*>(p.b), nullptr, 1, p.r};
      down.noise = no_noise();
      down.scale = static_cast<float>(p.scaling);
      down.r = p.r;
      down.out = static_cast<float*>(p.dh);
      down.plan(packs, workspace);
    }
    if (has_outer) {
      outer.dtype = p.dtype;
      outer.rows = rows;
      outer.low = static_cast<const float*>(p.h);
      outer.noise = no_noise();
      outer.scale = static_cast<float>(p.scaling);
      outer.r = p.r;
      outer.flip = false;
      outer.transpose = true;
      outer.out = static_cast<float*>(p.db);
      outer.out_e = nullptr;
      outer.plan(packs, workspace);
    }
    bytes = workspace.used();
  }
};

}  // namespace

// Sizing runs the plan without a workspace, launching runs it again with one.
int64_t shrink_workspace_cuda(const ShrinkParams& p) {
  ShrinkParams sizing = p;
  sizing.workspace = nullptr;
  return ShrinkPlan(sizing).bytes;
}
int64_t shrink_backward_workspace_cuda(const ShrinkBackwardParams& p) {
  ShrinkBackwardParams sizing = p;
  sizing.workspace = nullptr;
  return ShrinkBackwardPlan(sizing).bytes;
}
int64_t expand_workspace_cuda(const ExpandParams& p) {
  ExpandParams sizing = p;
  sizing.workspace = nullptr;
  return ExpandPlan(sizing).bytes;
}
int64_t expand_backward_workspace_cuda(const ExpandBackwardParams& p) {
  ExpandBackwardParams sizing = p;
  sizing.workspace = nullptr;
  return ExpandBackwardPlan(sizing).bytes;
}

const char* shrink_cuda(const ShrinkParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    ShrinkPlan plan(p);
    const char* error = plan.packs.template launch<T>(stream);
    return error != nullptr ? error : plan.down.template launch<T>(stream);
  });
}

const char* shrink_backward_cuda(const ShrinkBackwardParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    ShrinkBackwardPlan plan(p);
    const char* error = plan.packs.template launch<T>(stream);
    if (error == nullptr && plan.has_up) error = plan.up.template launch<T>(stream);
    if (error == nullptr && plan.has_outer) error = plan.outer.template launch<T>(stream);
    return error;
  });
}

const char* expand_cuda(const ExpandParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    ExpandPlan plan(p);
    const char* error = plan.packs.template launch<T>(stream);
    return error != nullptr ? error : plan.up.template launch<T>(stream);
  });
}

const char* expand_backward_cuda(const ExpandBackwardParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    ExpandBackwardPlan plan(p);
    const char* error = plan.packs.template launch<T>(stream);
    if (error == nullptr && plan.has_down) error = plan.down.template launch<T>(stream);
    if (error == nullptr && plan.has_outer) error = plan.outer.template launch<T>(stream);
    return error;
  });
}

}  // namespace bayes_kernels
