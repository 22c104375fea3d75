// Grouped adapters on the GPU: the fp32 kernels of the adapter family, whose blocks of rows belong
// to one group each (adapter_groups.cuh), and the sort that finds the rows of a group.
//
// The host knows no group's size and never waits for one: a grid has blocks for the worst case, and
// those that are too many return at once.
#include "grouped.h"

#include "adapter_fma.cuh"
#include "adapter_plan.h"

namespace bayes_kernels {
namespace {

// ---- sort ---------------------------------------------------------------------------------------

constexpr int kSortThreads = 256;

// Rows of no group count as those of one more.
__device__ __forceinline__ int64_t group_of(const GroupRowsParams& p, int64_t row) {
  const int64_t id = __ldg(p.ids + row);
  return id < 0 || id >= p.groups ? p.groups : id;
}

// The sum of `value` over the block and, in `before`, over the threads before this one.
__device__ __forceinline__ int block_scan(int value, int* before) {
  BK_SHARED(int, warp_sum, [kSortThreads / 32]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int sum = value;
  BK_UNROLL
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  int total = 0, first = 0;
  for (int w = 0; w < kSortThreads / 32; ++w) {
    if (w == warp) first = total;
    total += warp_sum[w];
  }
  *before = first + sum - value;
  return total;
}

// One block for each group, and one for the rows of none: counts the rows of the groups before,
// then writes its own in rising order. Each block reads all ids, from L2: fewer bytes than one row
// of x a group, and no second launch.
__global__ void __launch_bounds__(kSortThreads) group_rows_kernel(GroupRowsParams p) {
  const int64_t group = blockIdx.x;
  int fewer = 0, before = 0;
  for (int64_t row = threadIdx.x; row < p.tokens; row += kSortThreads)
    fewer += group_of(p, row) < group ? 1 : 0;
  int64_t place = block_scan(fewer, &before);
  if (threadIdx.x == 0) p.start[group] = static_cast<int32_t>(place);
  for (int64_t row0 = 0; row0 < p.tokens; row0 += kSortThreads) {
    const int64_t row = row0 + threadIdx.x;
    const int own = row < p.tokens && group_of(p, row) == group ? 1 : 0;
    const int count = block_scan(own, &before);
    if (own != 0) p.order[place + before] = static_cast<int32_t>(row);
    place += count;
  }
}

// ---- products -----------------------------------------------------------------------------------

constexpr const char* kTooManyGroups =
    "too many groups for a GPU, which takes 32000 and more where they have few rows; split the "
    "call";
constexpr unsigned kMostBlocks = 65535;  // of a grid in y, and a group has one at least

// Rows of a block: as many as fill the GPU, and no more than two groups of middling size have.
int64_t rows_of_block(int64_t wanted, int64_t tokens, int64_t groups, int64_t quantum) {
  const int64_t group = round_up(ceil_div(tokens, groups), quantum);
  const int64_t rows = round_up(at_least_one(wanted), quantum);
  return rows < group ? rows : group;
}

// down_fma_kernel: shrink, and down and outer of expand_backward.
struct DownPlan {
  DownFmaArgs args{};
  dim3 grid;
  int64_t bytes, tickets = 0;

  explicit DownPlan(const Grouped<ShrinkParams>& p) {
    Workspace workspace(p.workspace);
    const int item = p.dtype == DType::kF32 ? 4 : 2;
    const int64_t ranks = ceil_div(p.r, kDownFmaRanks);
    const int64_t tokens = ceil_div(p.tokens * ranks, kGrid / 2);
    const int64_t rows = rows_of_block(tokens, p.tokens, p.groups.groups,
                                       tokens < kFmaTokens ? 2 * kFmaAhead : kFmaTokens);
    const int64_t blocks = group_blocks(p.groups, p.tokens, rows);
    const int64_t passes = at_least_one(ceil_div(p.n, kShrinkFmaWarps * kSignsPerBlock));
    const int64_t wanted = at_least_one(kGrid / 2 / (blocks * ranks));
    const int64_t per_split = ceil_div(passes, wanted < passes ? wanted : passes);
    const int64_t splits = ceil_div(passes, per_split);
    RowSum sum{static_cast<float*>(p.h), nullptr, nullptr, 1.0f};
    if (splits > 1) {
      sum.partial = workspace.take<float>(splits * ranks * p.tokens * kDownFmaRanks);
      tickets = blocks * ranks;
      sum.tickets = workspace.take<int>(tickets);
    }
    grid = grid_of(splits, blocks, ranks);
    // clang-format off
    args = {p.dtype, p.x, p.x_stride, p.tokens, p.n, fp32(p.a), fp32(p.e), p.n, 1, p.noise, 1.0f,
            nullptr, sum, Gradients{}, p.r, rows, per_split,
            vector_access(p.x, p.x_stride * item, 4 * item),
            vector_access(p.a, p.n * 4, 16) && (p.e == nullptr || vector_access(p.e, 16, 16)),
            p.groups, p.r * p.n};
    // clang-format on
    bytes = workspace.used();
  }

  explicit DownPlan(const Grouped<ExpandBackwardParams>& p) {
    Workspace workspace(p.workspace);
    const int item = p.dtype == DType::kF32 ? 4 : 2;
    const float scale = static_cast<float>(p.scaling);
    const int64_t width = kOuterFmaWarps * kSignsPerBlock, column_blocks = ceil_div(p.m, width);
    const int64_t ranks = ceil_div(p.r, kDownFmaRanks);
    const int64_t rows = rows_of_block(tokens_of_block(p.tokens, column_blocks * ranks), p.tokens,
                                       p.groups.groups, kFmaTokens);
    const int64_t blocks = group_blocks(p.groups, p.tokens, rows);
    RowSum sum{static_cast<float*>(p.dh), nullptr, nullptr, scale};
    Gradients gradients{};
    gradients.out = static_cast<float*>(p.db);
    gradients.transposed = true;
    gradients.scale = scale;
    if (p.dh != nullptr && column_blocks > 1) {
      sum.partial = workspace.take<float>(ranks * column_blocks * p.tokens * kDownFmaRanks);
      tickets = ranks * blocks;
    }
    const int64_t of_sums = tickets;
    if (p.db != nullptr) {
      gradients.partial =
          workspace.take<float>(ranks * blocks * column_blocks * width * kDownFmaRanks);
      tickets += ranks * column_blocks * p.groups.groups;
    }
    sum.tickets = workspace.take<int>(tickets);
    gradients.tickets = sum.tickets + of_sums;
    grid = grid_of(column_blocks, blocks, ranks);
    // clang-format off
    args = {p.dtype, p.dy, p.dy_stride, p.tokens, p.m, fp32(p.b), nullptr, 1, p.r, no_noise(), 1.0f,
            fp32(p.h), sum, gradients, p.r, rows, 1,
            vector_access(p.dy, p.dy_stride * item, 4 * item), false, p.groups, p.m * p.r};
    // clang-format on
    bytes = workspace.used();
  }

  template <bool kOuter>
  const char* launch(void* stream) const {
    constexpr int kWarps = kOuter ? kOuterFmaWarps : kShrinkFmaWarps;
    if (grid.y > kMostBlocks) return kTooManyGroups;
    int* at = args.sum.tickets;
    if (tickets > 0) bk_zero(at, static_cast<std::size_t>(tickets) * sizeof(int), stream);
    if constexpr (kOuter) {
      BK_LAUNCH((down_fma_kernel<false, true, kWarps, kDownFmaRanks, true>), grid, 32 * kWarps, 0,
                stream, args);
    } else if (args.factor_e != nullptr) {
      BK_LAUNCH((down_fma_kernel<true, false, kWarps, kDownFmaRanks, true>), grid, 32 * kWarps, 0,
                stream, args);
    } else {
      BK_LAUNCH((down_fma_kernel<false, false, kWarps, kDownFmaRanks, true>), grid, 32 * kWarps, 0,
                stream, args);
    }
    return bk_last_error();
  }
};

// tile_fma_kernel: expand, and up and outer of shrink_backward.
struct TilePlan {
  TileFmaArgs args{};
  dim3 grid;
  bool flip = false, up, outer = false;
  int64_t bytes, tickets = 0;

  explicit TilePlan(const Grouped<ExpandParams>& p) : up(true) {
    const int64_t column_blocks = blocks_of_columns(p.m, p.r, false);
    const int64_t rows = rows_of_block(tokens_of_block(p.tokens, column_blocks), p.tokens,
                                       p.groups.groups, kFmaTokens);
    grid = grid_of(column_blocks, group_blocks(p.groups, p.tokens, rows));
    // clang-format off
    args = {p.dtype, p.base, p.base_stride, p.tokens, p.m, p.y, fp32(p.b), nullptr, 1, p.r,
            fp32(p.h), no_noise(), static_cast<float>(p.scaling), Gradients{}, p.r, rows, p.groups,
            p.m * p.r};
    // clang-format on
    bytes = 0;
  }

  explicit TilePlan(const Grouped<ShrinkBackwardParams>& p) : up(p.dx != nullptr) {
    Workspace workspace(p.workspace);
    outer = p.da != nullptr || p.de != nullptr;
    flip = p.e != nullptr && (up || p.de != nullptr);
    const int rank = padded_rank(p.r);
    const int64_t column_blocks = blocks_of_columns(p.n, p.r, rank <= 32);
    const int64_t width = fma_columns(rank, rank <= 32) * kFmaThreads;
    const int64_t rows = rows_of_block(tokens_of_block(p.tokens, column_blocks), p.tokens,
                                       p.groups.groups, kFmaTokens);
    const int64_t blocks = group_blocks(p.groups, p.tokens, rows);
    Gradients gradients{};
    gradients.out = static_cast<float*>(p.da);
    gradients.out_e = static_cast<float*>(p.de);
    gradients.scale = 1.0f;
    if (outer) {
      gradients.partial =
          workspace.take<float>(blocks * (flip ? 2 : 1) * column_blocks * width * rank);
      tickets = column_blocks * p.groups.groups;
      gradients.tickets = workspace.take<int>(tickets);
    }
    grid = grid_of(column_blocks, blocks);
    // clang-format off
    args = {p.dtype, p.x, p.x_stride, p.tokens, p.n, p.dx, fp32(p.a), fp32(p.e), p.n, 1, fp32(p.dh),
            p.noise, 1.0f, gradients, p.r, rows, p.groups, p.r * p.n};
    // clang-format on
    bytes = workspace.used();
  }

  template <bool kOuter>
  const char* launch(void* stream) const {
    if (grid.y > kMostBlocks) return kTooManyGroups;
    int* at = args.gradients.tickets;
    if (tickets > 0) bk_zero(at, static_cast<std::size_t>(tickets) * sizeof(int), stream);
    return with_rank(args.r, flip, [&](auto rank, auto flips) {
      constexpr int kRank = decltype(rank)::value;
      constexpr bool kFlip = kOuter && decltype(flips)::value;
      if constexpr (kRank <= 32 || !kOuter) {
        BK_LAUNCH((tile_fma_kernel<kRank, kFlip, true, kOuter, true>), grid, kFmaThreads, 0, stream,
                  args);
      } else {
        if (up) {
          TileFmaArgs without = args;
          without.x = nullptr;
          BK_LAUNCH((tile_fma_kernel<kRank, kFlip, true, false, true>), grid, kFmaThreads, 0,
                    stream, without);
          if (const char* error = bk_last_error()) return error;
        }
        if (outer)
          BK_LAUNCH((tile_fma_kernel<kRank, kFlip, false, true, true>), grid, kFmaThreads, 0,
                    stream, args);
      }
      return bk_last_error();
    });
  }

 private:
  static int64_t blocks_of_columns(int64_t columns, int r, bool both) {
    return ceil_div(columns, fma_columns(padded_rank(r), both) * kFmaThreads);
  }
};

// Of all draws, which a GPU makes at once.
int64_t bytes_of_draws(const SampledShrinkParams& p) {
  return round_up(p.groups.groups * p.r * p.n * static_cast<int64_t>(sizeof(float)), 256);
}

template <class Plan, class Params>
int64_t workspace_of(Params p) {
  p.workspace = nullptr;
  return Plan(p).bytes;
}

}  // namespace

const char* group_rows_cuda(const GroupRowsParams& p, void* stream) {
  BK_LAUNCH(group_rows_kernel, grid_of(p.groups + 1), kSortThreads, 0, stream, p);
  return bk_last_error();
}

int64_t sampled_shrink_workspace_cuda(const SampledShrinkParams& p) {
  return bytes_of_draws(p) + workspace_of<DownPlan>(static_cast<const Grouped<ShrinkParams>&>(p));
}
const char* sampled_shrink_cuda(const SampledShrinkParams& p, void* stream) {
  if (p.dtype == DType::kF64) return kNoDouble;  // draws would be twice as large as their room
  DrawParams law = p.law;
  law.out = p.workspace;
  if (const char* error = gaussian_draws_cuda(law, stream)) return error;
  Grouped<ShrinkParams> drawn = p;
  drawn.a = law.out;
  drawn.workspace = static_cast<char*>(p.workspace) + bytes_of_draws(p);
  return grouped_shrink_cuda(drawn, stream);
}

int64_t grouped_shrink_workspace_cuda(const Grouped<ShrinkParams>& p) {
  return workspace_of<DownPlan>(p);
}
int64_t grouped_shrink_backward_workspace_cuda(const Grouped<ShrinkBackwardParams>& p) {
  return workspace_of<TilePlan>(p);
}
int64_t grouped_expand_workspace_cuda(const Grouped<ExpandParams>& p) {
  return workspace_of<TilePlan>(p);
}
int64_t grouped_expand_backward_workspace_cuda(const Grouped<ExpandBackwardParams>& p) {
  return workspace_of<DownPlan>(p);
}

const char* grouped_shrink_cuda(const Grouped<ShrinkParams>& p, void* stream) {
  return p.dtype == DType::kF64 ? kNoDouble : DownPlan(p).launch<false>(stream);
}
const char* grouped_shrink_backward_cuda(const Grouped<ShrinkBackwardParams>& p, void* stream) {
  return p.dtype == DType::kF64 ? kNoDouble : TilePlan(p).launch<true>(stream);
}
const char* grouped_expand_cuda(const Grouped<ExpandParams>& p, void* stream) {
  return p.dtype == DType::kF64 ? kNoDouble : TilePlan(p).launch<false>(stream);
}
const char* grouped_expand_backward_cuda(const Grouped<ExpandBackwardParams>& p, void* stream) {
  return p.dtype == DType::kF64 ? kNoDouble : DownPlan(p).launch<true>(stream);
}

}  // namespace bayes_kernels
