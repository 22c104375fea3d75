// Which rows a block of the adapter kernels works on: a run of the call's rows, or of one group's,
// which has factors of its own.
#pragma once

#include "cuda_portable.h"
#include "grouped.h"

namespace bayes_kernels {
namespace {

// Rows begin to end - 1, counted in the order of the groups; the group has `blocks` blocks of rows,
// from block0 on.
struct Slice {
  int64_t begin, end, group, block0;
  int blocks;  // 0: this block has nothing to do
  bool none;   // rows of no group, whose results are NaN
};

// Blocks of groups one behind the other, `rows` rows to a block; at least one for each group, which
// writes its gradients.
inline int64_t group_blocks(const Grouping& g, int64_t tokens, int64_t rows) {
  return g.start == nullptr ? g.groups * ceil_div(g.rows_per_group, rows)
                            : g.groups + 1 + ceil_div(tokens, rows);
}

// The slice of blockIdx.y. All threads of a warp call it.
template <bool kGrouped>
__device__ __forceinline__ Slice slice_of(const Grouping& g, int64_t tokens, int64_t rows) {
  const int64_t block = blockIdx.y;
  if constexpr (!kGrouped) {
    const int64_t begin = block * rows, end = begin + rows;
    return {begin, end < tokens ? end : tokens, 0, 0, static_cast<int>(gridDim.y), false};
  }
  if (g.start == nullptr) {
    const int64_t blocks = ceil_div(g.rows_per_group, rows), group = block / blocks;
    const int64_t first = group * g.rows_per_group, last = first + g.rows_per_group;
    int64_t begin = first + (block - group * blocks) * rows, end = begin + rows;
    if (end > last) end = last;
    if (end > tokens) end = tokens;
    return {begin, end, group, group * blocks, static_cast<int>(blocks), false};
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  int64_t before = 0;  // blocks of the groups so far
  for (int64_t group0 = 0; group0 <= g.groups; group0 += 32) {
    const int64_t group = group0 + lane;
    int begin = 0, end = 0, blocks = 0;
    if (group <= g.groups) {
      begin = __ldg(g.start + group);
      end = group < g.groups ? __ldg(g.start + group + 1) : static_cast<int>(tokens);
      blocks = static_cast<int>(ceil_div(end - begin, rows));
      if (group < g.groups && blocks == 0) blocks = 1;
    }
    int sum = blocks;
    BK_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned found = __ballot_sync(0xffffffffu, block < before + sum);
    if (found != 0) {
      const int at = __ffs(static_cast<int>(found)) - 1;
      const int first = __shfl_sync(0xffffffffu, begin, at);
      const int last = __shfl_sync(0xffffffffu, end, at);
      const int count = __shfl_sync(0xffffffffu, blocks, at);
      const int64_t block0 = before + __shfl_sync(0xffffffffu, sum, at) - count;
      const int64_t from = first + (block - block0) * rows;
      const bool none = group0 + at == g.groups;
      return {from, from + rows < last ? from + rows : last, none ? 0 : group0 + at, block0, count,
              none};
    }
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
  return {0, 0, 0, 0, 0, false};
}

// The call's row at a place in the order of the groups.
template <bool kGrouped>
struct RowOf {
  const int32_t* order;
  __device__ __forceinline__ int64_t operator()(int64_t row) const {
    return !kGrouped || order == nullptr ? row : static_cast<int64_t>(__ldg(order + row));
  }
};

}  // namespace
}  // namespace bayes_kernels
