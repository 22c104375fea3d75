// Adapter family on the GPU: which kernels run, over which grid, with what workspace.
//
//   whole adapters   decode                   of up to 16 tokens
//   shrink           [prepare: E, fragments]  down
//   expand                                    tile (up)
//   expand_backward  [prepare: tickets]       tile (down and outer)
//   shrink_backward  [prepare: E]             tile (up and outer)
//
// and for fp16 largest magnitudes before. The 32-bit kernels take the same places: down_fma (shrink
// and expand_backward) and tile_fma. Splits are functions of the shape alone, never of the device,
// and partial sums are added in order of the split: the same inputs give the same bits.
#include "adapter.h"

#include <type_traits>

#include "adapter_decode.cuh"
#include "adapter_fma.cuh"
#include "adapter_mma.cuh"
#include "adapter_plan.h"
#include "adapter_prepare.cuh"

namespace bayes_kernels {
namespace {

// Calls f(ranks of a block of down_fma_kernel), as a constant.
template <class F>
const char* with_down_ranks(int ranks, const F& f) {
  return ranks == 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 16>{});
}

// ---- what comes before the products -------------------------------------------------------------

// Largest magnitudes (fp16), then E and fragments and zero tickets.
class Before {
 public:
  // `behind`: the kernel in front on the stream is one of the same call.
  Before(DType dtype, int64_t tokens, int r, bool behind = false)
      : mma_(uses_mma(dtype, tokens)), behind_(behind), r_(r) {
    half_ = mma_ && dtype == DType::kF16;
  }
  bool mma() const { return mma_; }
  // Parts of the largest magnitude of an operand, and of the noise matrix beside it; null where the
  // type of the activations needs none.
  const float* amax(Workspace& workspace, const float* data, int64_t count,
                    const float* e = nullptr, const AdapterDraw& draw = {}) {
    if (!half_) return nullptr;
    const bool drawn = e == nullptr && draw.rho != nullptr;
    amax_.job[amaxes_] = {data,
                          count,
                          drawn ? static_cast<const float*>(draw.rho) : e,
                          drawn && draw.row_constant ? r_ : count,
                          drawn,
                          draw.std,
                          workspace.take<float>(kAmaxParts)};
    return amax_.job[amaxes_++].parts;
  }
  // The noise matrix for kernels that read fragments (and F beside it where `a` is given) or fp32.
  void noise(Workspace& workspace, const float* a, const float* e, const AdapterDraw& draw,
             const AdapterNoise& noise, int64_t n, const float* amax) {
    args_.rho = e == nullptr ? static_cast<const float*>(draw.rho) : nullptr;
    args_.row_constant = draw.row_constant;
    args_.std = draw.std;
    args_.noise = noise;
    args_.n = n;
    args_.r = r_;
    args_.amax = amax;
    if (mma_) {
      args_.group_bits = log2_of(padded_rank(r_) / 8);
      args_.count = 4 * ceil_div(n, kSignsPerBlock) * 32 << args_.group_bits;
      args_.a = a;
      args_.e = e;
      args_.packed = a == nullptr ? nullptr : workspace.take<uint4>(args_.count);
      args_.packed_e = workspace.take<uint4>(args_.count);
    } else {
      args_.count = ceil_div(r_ * n, 4);
      args_.drawn = workspace.take<float>(r_ * n);
    }
  }
  int* tickets(Workspace& workspace, int64_t count, const AdapterTickets& given) {
    args_.tickets = given.at == nullptr ? workspace.take<int>(count) : given.at;
    args_.n_tickets = given.at == nullptr ? count : given.zero ? 0 : given.count;
    return args_.tickets;
  }
  const PrepareArgs& args() const { return args_; }
  // Whether a kernel of the call is in front of the products.
  bool launches() const { return behind_ || amaxes_ > 0 || prepares(); }
  template <class T>
  const char* launch(void* stream) const {
    if (amaxes_ > 0) {
      BK_LAUNCH_BEHIND(behind_, amax_kernel, grid_of(kAmaxParts, amaxes_), kAmaxThreads, 0, stream,
                       amax_);
      if (const char* error = bk_last_error()) return error;
    }
    if (!prepares()) return nullptr;
    const dim3 grid = grid_of(at_least_one(ceil_div(args_.count, kPrepareThreads)));
    const bool behind = behind_ || amaxes_ > 0;
    if (mma_)
      BK_LAUNCH_BEHIND(behind, (prepare_kernel<T>), grid, kPrepareThreads, 0, stream, args_);
    else
      BK_LAUNCH_BEHIND(behind, (prepare_kernel<float>), grid, kPrepareThreads, 0, stream, args_);
    return bk_last_error();
  }

 private:
  bool prepares() const { return args_.count > 0 || args_.n_tickets > 0; }

  bool mma_, behind_, half_;
  int r_;
  PrepareArgs args_{};
  AmaxArgs amax_{};
  int amaxes_ = 0;
};

// ---- shrink -------------------------------------------------------------------------------------

// Blocks of down on tensor cores: warps with tokens of their own, the others of 8 share columns;
// and the tiles of 128 columns of a split.
struct DownShape {
  int warps;
  int64_t tiles;
};

// One split: tickets are zeroed by prepare, which is launched for the noise only.
DownShape plain_down(int64_t tokens, int64_t n, int rank) {
  int warps = rank <= 16 ? 2 : 4;
  while (warps > 1 && ceil_div(tokens, warps * kDownTokens) < kGrid / 4) warps /= 2;
  return {warps, at_least_one(ceil_div(n, kSignsPerBlock))};
}

// Of 32 to 256 tokens in a block those with the least cost: more of them read the fragments of both
// factors less often from the second-level cache, but leave more splits, whose sums are written,
// read, and added by a single block, at some 1/128 of the rate of that cache. Its blocks have 256
// threads.
DownShape noisy_down(int64_t tokens, int64_t n) {
  constexpr int64_t kAlone = 128;
  const int64_t tiles = at_least_one(ceil_div(n, kSignsPerBlock));
  DownShape best{};
  int64_t least = 0;
  // In units of four bytes for each rank.
  for (int warps = 1; warps <= kDownWarps; warps *= 2) {
    const int64_t blocks = at_least_one(ceil_div(tokens, warps * kDownTokens));
    const int64_t wanted = at_least_one(kGrid / 2 / blocks);
    const int64_t per_split = round_up(ceil_div(tiles, wanted), kDownWarps / warps);
    const int splits = static_cast<int>(ceil_div(tiles, per_split));
    const int64_t parts = splits == 1          ? 0
                          : splits <= kOneStep ? splits
                                               : parts_of_group(splits) + groups_of(splits);
    const int64_t numbers = blocks * tiles * kSignsPerBlock +  // two factors of 2 bytes
                            (splits > 1 ? 2 * splits * tokens : 0) +
                            kAlone * parts * warps * kDownTokens;
    if (warps == 1 || numbers < least) {
      best = {warps, per_split};
      least = numbers;
    }
  }
  return best;
}

struct ShrinkPlan {
  Before before;
  DownArgs mma{};
  DownFmaArgs fma{};
  dim3 grid;
  int r, ranks = 0;  // of a block of fma
  bool flip;
  int64_t bytes;

  explicit ShrinkPlan(const ShrinkParams& p) : before(p.dtype, p.tokens, p.r), r(p.r) {
    Workspace workspace(p.workspace);
    flip = p.e != nullptr || p.draw.rho != nullptr;
    RowSum sum{static_cast<float*>(p.h), nullptr, nullptr, 1.0f};
    if (before.mma()) {
      const float* amax = before.amax(workspace, fp32(p.a), p.r * p.n, fp32(p.e), p.draw);
      if (flip) before.noise(workspace, fp32(p.a), fp32(p.e), p.draw, p.noise, p.n, amax);
      const int rank = padded_rank(p.r);
      const DownShape shape = flip ? noisy_down(p.tokens, p.n) : plain_down(p.tokens, p.n, rank);
      const int64_t blocks = ceil_div(p.tokens, shape.warps * kDownTokens);
      const int64_t splits = at_least_one(ceil_div(p.n, shape.tiles * kSignsPerBlock));
      share(workspace, sum, splits, p.tokens * rank, blocks);
      sum.scale = keep_scale(p.noise);
      grid = grid_of(blocks, splits);
      // clang-format off
      mma = {p.x, p.x_stride, p.tokens, p.n, fp32(p.a), before.args().packed,
             before.args().packed_e, amax, p.noise, sum, p.r, shape.warps, shape.tiles,
             vector_access(p.x, p.x_stride * 2, 16), vector_access(p.a, p.n * 4, 16)};
      // clang-format on
    } else {
      const bool drawn = flip && p.e == nullptr;
      if (drawn) before.noise(workspace, nullptr, nullptr, p.draw, p.noise, p.n, nullptr);
      sum.one_step = p.tokens < kMmaTokens;
      ranks = down_fma_ranks(p.r, sum.one_step);
      const int warps = shrink_fma_warps(ranks, flip);
      const int64_t groups = ceil_div(p.r, ranks);
      // A block with one pass over columns loads its factors once; with more it loads them for each
      // 32 tokens. Splits need tickets.
      const int64_t passes = at_least_one(ceil_div(p.n, warps * kSignsPerBlock));
      const int64_t wanted = drawn ? at_least_one(kGrid / 2 / groups) : 1;
      const int64_t per_split = ceil_div(passes, wanted < passes ? wanted : passes);
      const int64_t splits = ceil_div(passes, per_split);
      const int64_t tokens = ceil_div(p.tokens * groups * splits, kGrid / 2);
      const int64_t per_block = round_up(tokens, tokens < kFmaTokens ? 2 * kFmaAhead : kFmaTokens);
      const int64_t blocks = ceil_div(p.tokens, per_block);
      share(workspace, sum, splits, groups * p.tokens * ranks, blocks * groups);
      grid = grid_of(splits, blocks, groups);
      const int item = p.dtype == DType::kF32 ? 4 : 2;
      // clang-format off
      fma = {p.dtype, p.x, p.x_stride, p.tokens, p.n, fp32(p.a),
             drawn ? before.args().drawn : fp32(p.e), p.n, 1, p.noise, keep_scale(p.noise), nullptr,
             sum, Gradients{}, p.r, per_block, per_split,
             vector_access(p.x, p.x_stride * item, 4 * item),
             vector_access(p.a, p.n * 4, 16) && (p.e == nullptr || vector_access(p.e, 16, 16))};
      // clang-format on
    }
    bytes = workspace.used();
  }

  template <class T>
  const char* launch(void* stream) const {
    if (const char* error = before.launch<T>(stream)) return error;
    if constexpr (sizeof(T) == 2) {
      if (before.mma())
        return with_rank(r, flip, [&](auto rank, auto flips) {
          BK_LAUNCH_BEHIND(before.launches(),
                           (down_mma_kernel<T, decltype(rank)::value, decltype(flips)::value>),
                           grid, kDownThreads, 0, stream, mma);
          return bk_last_error();
        });
    }
    return with_down_ranks(ranks, [&](auto constant) {
      constexpr int kRanks = decltype(constant)::value;
      constexpr int kNoisy = shrink_fma_warps(kRanks, true),
                    kPlain = shrink_fma_warps(kRanks, false);
      if (flip)
        BK_LAUNCH_BEHIND(before.launches(), (down_fma_kernel<true, false, kNoisy, kRanks>), grid,
                         32 * kNoisy, 0, stream, fma);
      else
        BK_LAUNCH_BEHIND(before.launches(), (down_fma_kernel<false, false, kPlain, kRanks>), grid,
                         32 * kPlain, 0, stream, fma);
      return bk_last_error();
    });
  }

 private:
  void share(Workspace& workspace, RowSum& sum, int64_t splits, int64_t count, int64_t tickets) {
    if (splits == 1) return;
    sum.partial = workspace.take<float>(splits * count);
    sum.tickets = before.tickets(
        workspace, tickets * (sum.one_step ? 1 : tickets_of(static_cast<int>(splits))), {});
  }
};

// ---- the others ---------------------------------------------------------------------------------

// Products over rows (tokens, columns): up writes `out`, down `dh`, outer the gradients.
struct TilePlan {
  struct Inputs {
    DType dtype;
    const void* x;
    int64_t stride, tokens, columns;
    const void* low;
    const void* factor;
    const void* e;
    int64_t rank_stride, column_stride;
    AdapterNoise noise;
    AdapterDraw draw;
    float scale;
    int r;
    AdapterTickets tickets;
    bool behind;
  };
  // The kernel of up (expand), of up and outer, or of down and outer; any of these may be unwanted.
  enum class Kernel { kUp, kUpOuter, kDownOuter };

  Before before;
  TileArgs mma{};
  DownFmaArgs down_fma{};
  TileFmaArgs fma{};
  dim3 grid;
  int r, shared_bytes = 0;
  bool flip, up, down, outer;
  int64_t bytes;

  TilePlan(Kernel kernel, const Inputs& i, void* at, void* out, void* dh, void* grad, void* grad_e,
           bool transposed)
      : before(i.dtype, i.tokens, i.r, i.behind), r(i.r) {
    Workspace workspace(at);
    up = out != nullptr;
    down = dh != nullptr;
    outer = grad != nullptr || grad_e != nullptr;
    const bool noisy = i.e != nullptr || i.draw.rho != nullptr;
    flip = noisy && (up || grad_e != nullptr);
    const int rank = padded_rank(i.r), matrices = flip ? 2 : 1;
    const float keep = keep_scale(i.noise), scale = i.scale * keep;
    const bool needs_e = noisy && up;
    RowSum sum{static_cast<float*>(dh), nullptr, nullptr, i.scale};
    Gradients gradients{static_cast<float*>(grad),
                        static_cast<float*>(grad_e),
                        transposed,
                        nullptr,
                        nullptr,
                        scale,
                        i.draw.row_constant ? nullptr : fp32(i.draw.rho),
                        i.draw.std};
    const float *amax = nullptr, *amax_low = nullptr;
    if (before.mma()) {
      if (up || outer) amax_low = before.amax(workspace, fp32(i.low), i.tokens * i.r);
      if (up || down)
        amax = before.amax(workspace, fp32(i.factor), i.r * i.columns, fp32(i.e), i.draw);
    }
    const bool drawn = needs_e && i.e == nullptr;
    if (drawn) before.noise(workspace, nullptr, nullptr, i.draw, i.noise, i.columns, amax);

    // Blocks of columns and of ranks; sums over blocks.
    const bool has_down = kernel == Kernel::kDownOuter, walks_ranks = !before.mma() && has_down;
    const int64_t width =
        before.mma()  ? kTileColumns
        : walks_ranks ? kOuterFmaWarps * kSignsPerBlock
                      : fma_columns(rank, kernel == Kernel::kUpOuter && rank <= 32) * kFmaThreads;
    const int64_t column_blocks = ceil_div(i.columns, width);
    const int64_t groups = walks_ranks ? ceil_div(i.r, down_fma_ranks(i.r, false))
                           : before.mma() && outer && rank > 32 ? rank / outer_ranks(rank)
                                                                : 1;
    const int64_t tokens = tokens_of_block(i.tokens, column_blocks * groups);
    const int64_t splits = ceil_div(i.tokens, tokens);
    const int part = walks_ranks ? down_fma_ranks(i.r, false) : rank;
    int64_t tickets = 0;
    if (down && column_blocks > 1) {
      sum.partial =
          workspace.take<float>((walks_ranks ? groups : 1) * column_blocks * i.tokens * part);
      tickets += (walks_ranks ? groups : 1) * splits * tickets_of(static_cast<int>(column_blocks));
    }
    const int64_t gradient_tickets = tickets;
    if (outer) {
      gradients.partial = workspace.take<float>((walks_ranks ? groups : 1) * splits * matrices *
                                                column_blocks * width * part);
      if (splits > 1) tickets += groups * column_blocks * tickets_of(static_cast<int>(splits));
    }
    if (tickets > 0 || i.tickets.at != nullptr) {
      sum.tickets = before.tickets(workspace, tickets, i.tickets);
      gradients.tickets = sum.tickets + gradient_tickets;
    }
    grid = before.mma() ? grid_of(groups, column_blocks, splits)
                        : grid_of(column_blocks, splits, groups);

    const float* e = drawn ? before.args().drawn : fp32(i.e);
    const bool vector_x = i.x == nullptr || vector_access(i.x, i.stride * 2, 16);
    if (before.mma()) {
      shared_bytes = tile_shared_bytes(rank, flip, has_down);
      // clang-format off
      mma = {i.x, i.stride, i.tokens, i.columns, out, fp32(i.low), fp32(i.factor), fp32(i.e),
             i.rank_stride, i.column_stride, drawn ? before.args().packed_e : nullptr, amax_low,
             amax, i.noise, scale, sum, gradients, i.r, tokens,
             vector_x && (out == nullptr || vector_access(out, i.columns * 2, 16)),
             i.r % 2 == 0 && vector_access(i.low, 8, 8)};
    } else if (walks_ranks) {
      const int item = i.dtype == DType::kF32 ? 4 : 2;
      down_fma = {i.dtype, i.x, i.stride, i.tokens, i.columns, fp32(i.factor), nullptr,
                  i.rank_stride, i.column_stride, i.noise, keep, fp32(i.low), sum, gradients, i.r,
                  tokens, 1, vector_access(i.x, i.stride * item, 4 * item), false};
    } else {
      fma = {i.dtype, i.x, i.stride, i.tokens, i.columns, out, fp32(i.factor), e, i.rank_stride,
             i.column_stride, fp32(i.low), i.noise, scale, gradients, i.r, tokens};
    }
    // clang-format on
    bytes = workspace.used();
  }

  template <class T, Kernel kKernel>
  const char* launch(void* stream) const {
    constexpr bool kUp = kKernel != Kernel::kDownOuter, kOuter = kKernel != Kernel::kUp;
    if (const char* error = before.launch<T>(stream)) return error;
    return with_rank(r, flip, [&](auto rank, auto flips) {
      [[maybe_unused]] constexpr int kRank = decltype(rank)::value;
      [[maybe_unused]] constexpr bool kFlip = decltype(flips)::value && kKernel == Kernel::kUpOuter;
      if constexpr (sizeof(T) == 2) {
        if (before.mma()) {
          const auto kernel = tile_mma_kernel<T, kRank, kFlip, !kUp, kUp, kOuter>;
          if (shared_bytes > 47 * 1024) bk_set_max_dynamic_smem(kernel, shared_bytes);
          BK_LAUNCH_BEHIND(before.launches(), (tile_mma_kernel<T, kRank, kFlip, !kUp, kUp, kOuter>),
                           grid, kTileThreads, shared_bytes, stream, mma);
          return bk_last_error();
        }
      }
      if constexpr (!kUp) {
        with_down_ranks(down_fma_ranks(r, false), [&](auto ranks) {
          BK_LAUNCH_BEHIND(before.launches(),
                           (down_fma_kernel<false, true, kOuterFmaWarps, decltype(ranks)::value>),
                           grid, 32 * kOuterFmaWarps, 0, stream, down_fma);
          return bk_last_error();
        });
      } else if constexpr (kRank <= 32 || !kOuter) {
        BK_LAUNCH_BEHIND(before.launches(), (tile_fma_kernel<kRank, kFlip, true, kOuter>), grid,
                         kFmaThreads, 0, stream, fma);
      } else {
        if (up) {
          TileFmaArgs args = fma;
          args.x = nullptr;
          BK_LAUNCH_BEHIND(before.launches(), (tile_fma_kernel<kRank, kFlip, true, false>), grid,
                           kFmaThreads, 0, stream, args);
          if (const char* error = bk_last_error()) return error;
        }
        if (outer)
          BK_LAUNCH_BEHIND(before.launches() || up, (tile_fma_kernel<kRank, kFlip, false, true>),
                           grid, kFmaThreads, 0, stream, fma);
      }
      return bk_last_error();
    });
  }
};

TilePlan plan(const ExpandParams& p) {
  // clang-format off
  const TilePlan::Inputs inputs{p.dtype, p.base, p.base_stride, p.tokens, p.m, p.h, p.b, nullptr, 1,
                                p.r, no_noise(), {}, static_cast<float>(p.scaling), p.r, {}, p.behind};
  // clang-format on
  return {TilePlan::Kernel::kUp, inputs, p.workspace, p.y, nullptr, nullptr, nullptr, false};
}

TilePlan plan(const ExpandBackwardParams& p) {
  // clang-format off
  const TilePlan::Inputs inputs{p.dtype, p.dy, p.dy_stride, p.tokens, p.m, p.h, p.b, nullptr, 1, p.r,
                                no_noise(), {}, static_cast<float>(p.scaling), p.r, p.tickets,
                                p.tickets.zero};
  // clang-format on
  return {TilePlan::Kernel::kDownOuter, inputs, p.workspace, nullptr, p.dh, p.db, nullptr, true};
}

TilePlan plan(const ShrinkBackwardParams& p) {
  // clang-format off
  const TilePlan::Inputs inputs{p.dtype, p.x, p.x_stride, p.tokens, p.n, p.dh, p.a, p.e, p.n, 1,
                                p.noise, p.draw, 1.0f, p.r, p.tickets, p.tickets.zero};
  // clang-format on
  return {TilePlan::Kernel::kUpOuter, inputs, p.workspace, p.dx, nullptr, p.da, p.de, false};
}

ShrinkPlan plan(const ShrinkParams& p) { return ShrinkPlan(p); }

// ---- whole adapters -----------------------------------------------------------------------------

// Numbers of splits and slices, by a block's bytes and normals: one launch takes 2.5 us, a
// ticket 1.7 more, 32 KB of a factor 0.7, and 2,700 normals as long.
constexpr int64_t kDecodeSplits = 32, kDecodeSlices = 16, kDecodeGrid = 256;
constexpr int64_t kWithoutTicket = 8192;  // numbers of a factor that every block may take
constexpr int64_t kSliceNumbers = 8192;
// Of the dynamic shared memory of a block: with what is static, within the 99 KiB that every
// supported GPU has.
constexpr std::size_t kDecodeBytes = 90 * 1024;

int64_t tokens_of_decode(int64_t tokens) { return tokens <= 1 ? 1 : tokens <= 4 ? 4 : 16; }

// How an item cuts its columns of x, and what a block then keeps in shared memory: its part of x,
// and sums.
struct DecodeSplits {
  int64_t of_split, splits;  // runs of 128 columns of a split, splits
  std::size_t shared_bytes;

  DecodeSplits(int64_t tokens, int64_t n, int r) {
    const int64_t padded = tokens_of_decode(tokens), chunks = ceil_div(n, kSignsPerBlock);
    const bool alone = chunks <= kDecodeChunks && r * n <= kWithoutTicket;
    const int64_t wanted = ceil_div(chunks, kDecodeSplits);
    of_split = alone ? chunks : wanted < kDecodeChunks ? wanted : kDecodeChunks;
    splits = ceil_div(chunks, of_split);
    const int64_t parts = splits > 1 ? ceil_div(chunks, kChunksOfGroup) : chunks;
    shared_bytes = sizeof(float) * static_cast<std::size_t>(padded * of_split * kSignsPerBlock +
                                                            parts * r * padded);
  }
};

struct DecodePlan {
  DecodeArgs args{};
  int blocks = 0, tickets = 0, rank = 0;
  std::size_t shared_bytes = 0;
  bool noise;
  int64_t bytes;

  explicit DecodePlan(const DecodeParams& p) : noise(p.items > 0 && p.item[0].rho != nullptr) {
    Workspace workspace(p.workspace);
    const int item = p.dtype == DType::kF32 ? 4 : 2;
    const int64_t padded = tokens_of_decode(p.tokens), chunks = ceil_div(p.n, kSignsPerBlock);
    args.jobs = p.items;
    args.dtype = p.dtype;
    args.x = p.x;
    args.x_stride = p.x_stride;
    args.n = p.n;
    args.tokens = static_cast<int>(p.tokens);
    args.noise = p.noise;
    args.keep_scale = keep_scale(p.noise);
    args.std = p.std;
    args.vector_x = vector_access(p.x, p.x_stride * item, 4 * item);
    for (int i = 0; i < p.items; ++i) {
      const DecodeItem& from = p.item[i];
      DecodeJob& to = args.job[i];
      const DecodeSplits cut(p.tokens, p.n, from.r);
      const int64_t of_split = cut.of_split, splits = cut.splits;
      const int64_t most = at_least_one(kDecodeGrid / splits);
      int64_t slices = ceil_div(from.m * from.r, kSliceNumbers);
      if (slices > most) slices = most;
      if (slices > kDecodeSlices) slices = kDecodeSlices;
      const int64_t columns = round_up(ceil_div(from.m, slices), 32);
      slices = ceil_div(from.m, columns);
      const int64_t values = from.r * padded;
      // clang-format off
      to = {fp32(from.a), fp32(from.rho), fp32(from.b), from.base, from.base_stride, from.y,
            static_cast<float*>(from.h),
            splits > 1 ? workspace.take<float>(slices * chunks * values) : nullptr, from.m,
            from.stream, columns, from.r, static_cast<int>(splits), static_cast<int>(of_split),
            blocks, tickets, static_cast<float>(from.scaling), from.dtype, from.row_constant,
            vector_access(from.a, p.n * 4, 16) &&
                (from.rho == nullptr || from.row_constant || vector_access(from.rho, 16, 16)),
            vector_access(from.b, from.r * 4, 16)};
      // clang-format on
      blocks += static_cast<int>(splits * slices);
      if (splits > 1) tickets += static_cast<int>(slices);
      if (from.r > rank) rank = from.r;
      if (cut.shared_bytes > shared_bytes) shared_bytes = cut.shared_bytes;
    }
    if (tickets > 0) args.tickets = workspace.take<int>(tickets);
    bytes = workspace.used();
  }

  template <int TB, int K, bool kNoise>
  const char* launch(void* stream) const {
    if (shared_bytes > 40 * 1024)
      bk_set_max_dynamic_smem(decode_kernel<TB, K, kNoise>, shared_bytes);
    BK_LAUNCH((decode_kernel<TB, K, kNoise>), grid_of(blocks), kDecodeThreads, shared_bytes, stream,
              args);
    return bk_last_error();
  }

  const char* launch(void* stream) {
    args.ticket_slot = tickets > 0 ? ticket_slot(stream) : 0;
    if (args.ticket_slot < 0) bk_zero(args.tickets, sizeof(int) * tickets, stream);
    const auto with_tokens = [&](auto ranks, auto drawn) {
      constexpr int K = decltype(ranks)::value;
      constexpr bool kNoise = decltype(drawn)::value;
      switch (tokens_of_decode(args.tokens)) {
        case 1:
          return launch<1, K, kNoise>(stream);
        case 4:
          return launch<4, K, kNoise>(stream);
        default:
          return launch<16, K, kNoise>(stream);
      }
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if (rank <= 8)
      return noise ? with_tokens(One{}, std::true_type{}) : with_tokens(One{}, std::false_type{});
    return noise ? with_tokens(Two{}, std::true_type{}) : with_tokens(Two{}, std::false_type{});
  }
};

static_assert(kMaxDecodeItems * kDecodeSlices <= kTicketsOfSlot, "tickets of a slot");
static_assert(sizeof(DecodeArgs) <= kArguments, "arguments of a kernel");

DecodePlan plan(const DecodeParams& p) { return DecodePlan(p); }

// Sizing runs the plan without a workspace, launching runs it again with one.
template <class Params>
int64_t workspace_of(Params p) {
  p.workspace = nullptr;
  return plan(p).bytes;
}

}  // namespace

int64_t shrink_workspace_cuda(const ShrinkParams& p) { return workspace_of(p); }
int64_t shrink_backward_workspace_cuda(const ShrinkBackwardParams& p) { return workspace_of(p); }
int64_t expand_workspace_cuda(const ExpandParams& p) { return workspace_of(p); }
int64_t expand_backward_workspace_cuda(const ExpandBackwardParams& p) { return workspace_of(p); }
int64_t decode_workspace_cuda(const DecodeParams& p) { return workspace_of(p); }
bool decodes_cuda(int64_t tokens, int64_t n, int64_t r) {
  return tokens > 0 && tokens <= kDecodeTokens && n > 0 && r <= kMaxFusedRank &&
         DecodeSplits(tokens, n, static_cast<int>(r)).shared_bytes <= kDecodeBytes;
}

const char* decode_cuda(const DecodeParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto) { return plan(p).launch(stream); });
}

const char* shrink_cuda(const ShrinkParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) { return plan(p).launch<decltype(zero)>(stream); });
}
const char* shrink_backward_cuda(const ShrinkBackwardParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    return plan(p).launch<decltype(zero), TilePlan::Kernel::kUpOuter>(stream);
  });
}
const char* expand_cuda(const ExpandParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    return plan(p).launch<decltype(zero), TilePlan::Kernel::kUp>(stream);
  });
}
const char* expand_backward_cuda(const ExpandBackwardParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    return plan(p).launch<decltype(zero), TilePlan::Kernel::kDownOuter>(stream);
  });
}

}  // namespace bayes_kernels
