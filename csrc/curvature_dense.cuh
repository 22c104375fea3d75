// Dense factors of the curvature family: partial sums, a block for each split of the rows, and
// their sum. Plain multiply-adds are enough: up to 128 columns the time is that of launches and of
// first loads.
#pragma once

#include "cuda_portable.h"
#include "curvature.h"

namespace bayes_kernels {
namespace {

// Of both halves of the family.
constexpr int kThreads = 256;
constexpr int kAhead = 4;              // 16-byte loads of a thread before the first is used
constexpr int kQuad = 4;               // a thread multiplies 4 columns with 4 columns
constexpr int kFew = 60, kMany = 500;  // items to a launch, by what arguments take

constexpr int kDenseTile = 64;         // rows in shared memory
constexpr int kCells = kQuad * kQuad;  // of the products that a thread sums
constexpr int kPairs = kThreads;       // quads times quads that a block takes at once

struct DenseItem {
  float* factor;
  const void* rows;
  const float* weights;  // may be null
  int32_t n, d;
  int32_t sum_block, add_block;  // first of this item in its launch
  int32_t dtype;
  int32_t wide;  // rows can be read 16 bytes at a time
  int64_t at;    // of this item's partial sums in the workspace, in floats
};

template <int kItems>
struct DenseList {
  DenseItem items[kItems];
  int32_t n_items;
  const double *beta, *alpha;
  float* workspace;
};
static_assert(sizeof(DenseList<kFew>) <= kArguments, "kernel arguments");
static_assert(sizeof(DenseList<kMany>) <= kLargeArguments, "kernel arguments");

// Rows in one partial sum: by the shape only, for fixed bits. Few rows keep more multiprocessors at
// work where columns are many; more than 256 would lose digits.
__device__ __host__ __forceinline__ int dense_split(int64_t n, int64_t d) {
  return d <= 32 || n > 16384 ? 256 : 128;
}
__device__ __host__ __forceinline__ int dense_splits(int64_t n, int64_t d) {
  return static_cast<int>(ceil_div(n, dense_split(n, d)));
}
// Pairs (row quad i, column quad j <= i), of which number p is i (i + 1) / 2 + j.
__device__ __host__ __forceinline__ int pairs_of(int64_t d) {
  const int quads = static_cast<int>(ceil_div(d, kQuad));
  return quads * (quads + 1) / 2;
}
// Blocks that share the pairs of one split.
__device__ __host__ __forceinline__ int rounds_of(int64_t d) {
  return (pairs_of(d) + kPairs - 1) / kPairs;
}

template <int kItems>
__device__ int item_of(const DenseList<kItems>& list, int block, bool adding) {
  int low = 0, high = list.n_items - 1;  // the last item that starts at or before the block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const int start = adding ? list.items[middle].add_block : list.items[middle].sum_block;
    if (start <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// tile[r][c] = root of the weight times rows[row + r][c], zero behind the columns and where the
// root is zero, which is not read.
template <class T>
__device__ __forceinline__ void load_tile(const DenseItem& item, int64_t row, const float* roots,
                                          int pitch, float* tile) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  const int d = item.d;
  const T* x = static_cast<const T*>(item.rows) + row * d;
  if (item.wide) {
    // kAhead loads before the first is used; a piece is found without a division for each.
    const int pieces = d / kWide, down = kThreads / pieces, along = kThreads % pieces;
    int at = threadIdx.x / pieces, piece = threadIdx.x % pieces;
    while (at < kDenseTile) {
      uint4 bits[kAhead];
      float root[kAhead];
      int to[kAhead];
      BK_UNROLL
      for (int l = 0; l < kAhead; ++l) {
        const bool inside = at < kDenseTile;
        root[l] = inside ? roots[at] : 0.0f;
        to[l] = inside ? at * pitch + piece * kWide : -1;
        bits[l] = make_uint4(0, 0, 0, 0);
        if (root[l] != 0) bits[l] = __ldg(reinterpret_cast<const uint4*>(x + at * d) + piece);
        at += down;
        piece += along;
        if (piece >= pieces) {
          piece -= pieces;
          ++at;
        }
      }
      BK_UNROLL
      for (int l = 0; l < kAhead; ++l) {
        if (to[l] < 0) continue;
        T values[kWide];
        memcpy(values, &bits[l], sizeof(bits[l]));
        BK_UNROLL
        for (int v = 0; v < kWide; v += 4)
          *reinterpret_cast<float4*>(tile + to[l] + v) = make_float4(
              root[l] * static_cast<float>(values[v]), root[l] * static_cast<float>(values[v + 1]),
              root[l] * static_cast<float>(values[v + 2]),
              root[l] * static_cast<float>(values[v + 3]));
      }
    }
    return;
  }
  for (int e = threadIdx.x; e < kDenseTile * pitch; e += kThreads) {
    const int at = e / pitch, column = e % pitch;
    const float root = roots[at];
    tile[e] = root != 0 && column < d ? root * static_cast<float>(x[at * d + column]) : 0.0f;
  }
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 3)
    dense_sum_kernel(const __grid_constant__ DenseList<kItems> list) {
  bk_wait_for_previous();
  BK_SHARED(float, shared, [kDenseTile * kMaxDense]);
  BK_SHARED(float, roots, [kDenseTile]);
  static_assert(kThreads * kCells <= kDenseTile * kMaxDense, "sums of the groups");
  const DenseItem& item = list.items[item_of(list, blockIdx.x, false)];
  const int pairs = pairs_of(item.d), rounds = rounds_of(item.d);
  const int split = (blockIdx.x - item.sum_block) / rounds;
  const int used = (pairs + rounds - 1) / rounds;  // pairs of this block
  const int groups = kThreads / used;              // which share the rows of a tile
  const int slot = threadIdx.x % used, group = threadIdx.x / used;
  const int first = (blockIdx.x - item.sum_block) % rounds * used;
  const int p = first + slot;
  const bool active = group < groups && p < pairs;
  int i = 0;
  while ((i + 1) * (i + 2) / 2 <= p) ++i;
  const int j = p - i * (i + 1) / 2;
  const int pitch = (item.d + kQuad - 1) / kQuad * kQuad;
  const int64_t begin = static_cast<int64_t>(split) * dense_split(item.n, item.d);
  const int64_t stop = begin + dense_split(item.n, item.d);
  const int64_t end = stop < item.n ? stop : item.n;
  float sum[kQuad][kQuad];
  BK_UNROLL
  for (int t = 0; t < kQuad; ++t) {
    BK_UNROLL
    for (int u = 0; u < kQuad; ++u) sum[t][u] = 0;
  }
  for (int64_t row = begin; row < end; row += kDenseTile) {
    __syncthreads();  // the tile before has been read
    if (threadIdx.x < kDenseTile) {
      const int64_t at = row + threadIdx.x;
      float root = at < end ? 1.0f : 0.0f;
      if (at < end && item.weights != nullptr) root = sqrtf(item.weights[at]);
      roots[threadIdx.x] = root;
    }
    __syncthreads();
    if (item.dtype == static_cast<int>(DType::kF32))
      load_tile<float>(item, row, roots, pitch, shared);
    if (item.dtype == static_cast<int>(DType::kBF16))
      load_tile<bf16>(item, row, roots, pitch, shared);
    if (item.dtype == static_cast<int>(DType::kF16))
      load_tile<f16>(item, row, roots, pitch, shared);
    __syncthreads();
    if (!active) continue;
    const int rows = end - row < kDenseTile ? static_cast<int>(end - row) : kDenseTile;
    for (int at = group; at < rows; at += groups) {
      const float4 a = *reinterpret_cast<const float4*>(shared + at * pitch + i * kQuad);
      const float4 b = *reinterpret_cast<const float4*>(shared + at * pitch + j * kQuad);
      const float x[kQuad] = {a.x, a.y, a.z, a.w}, y[kQuad] = {b.x, b.y, b.z, b.w};
      BK_UNROLL
      for (int t = 0; t < kQuad; ++t) {
        BK_UNROLL
        for (int u = 0; u < kQuad; ++u) sum[t][u] = fmaf(x[t], y[u], sum[t][u]);
      }
    }
  }
  __syncthreads();
  if (active) {
    BK_UNROLL
    for (int t = 0; t < kQuad; ++t)
      *reinterpret_cast<float4*>(shared + threadIdx.x * kCells + t * kQuad) =
          make_float4(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
  }
  __syncthreads();
  float* out = list.workspace + item.at + (static_cast<int64_t>(split) * pairs + first) * kCells;
  const int mine = pairs - first < used ? pairs - first : used;
  for (int e = threadIdx.x; e < mine * kCells; e += kThreads) {
    double total = 0;
    for (int g = 0; g < groups; ++g) total += shared[g * used * kCells + e];
    out[e] = static_cast<float>(total);
  }
}

// factor <- beta factor + alpha (sum of the partial sums): a thread for each element below the
// diagonal, which it writes on both sides.
template <int kItems>
__global__ void __launch_bounds__(kThreads)
    dense_add_kernel(const __grid_constant__ DenseList<kItems> list) {
  bk_wait_for_previous();
  const DenseItem& item = list.items[item_of(list, blockIdx.x, true)];
  const int cells = pairs_of(item.d) * kCells;
  const int e = (blockIdx.x - item.add_block) * kThreads + threadIdx.x;
  if (e >= cells) return;
  int i = 0;
  while ((i + 1) * (i + 2) / 2 <= e / kCells) ++i;
  const int row = i * kQuad + e / kQuad % kQuad;
  const int column = (e / kCells - i * (i + 1) / 2) * kQuad + e % kQuad;
  if (row >= item.d || column > row) return;
  const int splits = dense_splits(item.n, item.d);
  const float* partial = list.workspace + item.at + e;
  double total = 0;
  for (int s = 0; s < splits; ++s) total += partial[static_cast<int64_t>(s) * cells];
  total *= *list.alpha;
  const double beta = *list.beta;
  float* upper = item.factor + column * item.d + row;
  if (beta != 0) total += beta * *upper;
  *upper = static_cast<float>(total);
  if (column < row) item.factor[row * item.d + column] = static_cast<float>(total);
}

int64_t dense_floats(const KronItem& item) {
  return int64_t{dense_splits(item.n, item.d)} * pairs_of(item.d) * kCells;
}

}  // namespace
}  // namespace bayes_kernels
