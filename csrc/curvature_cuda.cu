// Curvature family on the GPU: three launches for a whole list of factors and a block of new rows.
//
// 1. Partial Gram matrices of H = [factor, rows^T], a block for each kSplit rows of H.
// 2. A block for each factor adds them up in fp64; it, or up to 32 columns one warp of it, takes
// the eigenvectors.
// 3. factor <- H V_k, in place: a block holds its rows of H before it writes them.
// Dense factors take two: curvature_dense.cuh.
// The list travels by value in the kernels' arguments.
#include "cuda_portable.h"
#include "curvature_dense.cuh"

namespace bayes_kernels {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kSplit = 1024;  // rows of H in one partial Gram matrix: a constant, for fixed bits
constexpr int kStatic = 48 * 1024;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Item {
  float* factor;
  const float* rows;
  int32_t d, k, b;
  int32_t gram_block, apply_block;  // first of this item in its launch
  int32_t wide;                     // factor and rows can be read 16 bytes at a time
  int64_t at;  // doubles before its partial sums, coefficients and eigenproblem in the workspace
};

template <int kItems>
struct List {
  Item items[kItems];
  int32_t n_items;
  double* workspace;
};
static_assert(sizeof(List<kFew>) <= kArguments, "kernel arguments");
static_assert(sizeof(List<kMany>) <= kLargeArguments, "kernel arguments");

__device__ __host__ __forceinline__ int splits_of(int64_t d) {
  return static_cast<int>(ceil_div(d, kSplit));
}

template <int kItems>
__device__ int item_of(const List<kItems>& list, int block, bool gram) {
  int low = 0, high = list.n_items - 1;  // the last item that starts at or before the block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const int start = gram ? list.items[middle].gram_block : list.items[middle].apply_block;
    if (start <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <int kItems>
__device__ __forceinline__ double* coefficients_of(const List<kItems>& list, const Item& item) {
  const int c = item.k + item.b;
  return list.workspace + item.at + static_cast<int64_t>(splits_of(item.d)) * c * c;
}

// Rows of H that a block holds in shared memory: kAhead loads of each thread fill the tile.
__device__ __host__ __forceinline__ int tile_rows_of(int c) {
  return c <= 16 ? 256 : c <= 32 ? 128 : c <= 64 ? 64 : 32;
}
constexpr int kGramTile = (kMaxSmall + kQuad) * 33 > 64 * 65 ? (kMaxSmall + kQuad) * 33 : 64 * 65;

// The pieces of a tile that a thread brings, of four numbers each: all are loaded before the tile
// in front of it is multiplied, and stored behind it. A piece of the factor is four neighbours of
// its row-major rows, a piece of the new rows four neighbours of one of them.
struct Pieces {
  const Item& item;
  int rows, pitch, of_factor, count;  // of the tile
  int at[kAhead], column[kAhead];     // of the first of the four

  __device__ __forceinline__ Pieces(const Item& item_, int rows_)
      : item(item_),
        rows(rows_),
        pitch(rows_ + 1),
        of_factor(rows_ * item_.k / 4),
        count(of_factor + rows_ * item_.b / 4) {
    BK_UNROLL
    for (int l = 0; l < kAhead; ++l) {
      const int piece = threadIdx.x + l * kThreads, behind = piece - of_factor;
      if (behind < 0) {
        at[l] = 4 * piece / item.k;
        column[l] = 4 * piece - at[l] * item.k;
      } else {
        column[l] = behind / (rows / 4);  // of the new rows; rows is a power of two
        at[l] = 4 * (behind % (rows / 4));
      }
    }
  }
  __device__ __forceinline__ void load(int64_t row, int64_t end, float (&v)[kAhead][4]) const {
    const int left = static_cast<int>(end - row < rows ? end - row : rows);
    const auto each = [&](const auto& read) {
      BK_UNROLL
      for (int l = 0; l < kAhead; ++l) {
        const int piece = threadIdx.x + l * kThreads;
        v[l][0] = v[l][1] = v[l][2] = v[l][3] = 0.0f;
        if (piece < of_factor)
          read(item.factor + row * item.k + 4 * piece, left * item.k - 4 * piece, v[l]);
        else if (piece < count)
          read(item.rows + static_cast<int64_t>(column[l]) * item.d + row + at[l], left - at[l],
               v[l]);
      }
    };
    if (item.wide != 0) {  // then what is left is a multiple of four
      each([](const float* from, int there, float (&to)[4]) {
        if (there <= 0) return;
        const float4 f = __ldg(reinterpret_cast<const float4*>(from));
        to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
      });
    } else {
      each([](const float* from, int there, float (&to)[4]) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i)
          if (i < there) to[i] = __ldg(from + i);
      });
    }
  }
  // tile[column][row of H]
  __device__ __forceinline__ void store(const float (&v)[kAhead][4], float* tile) const {
    BK_UNROLL
    for (int l = 0; l < kAhead; ++l) {
      const int piece = threadIdx.x + l * kThreads;
      if (piece >= count) continue;
      const bool factor = piece < of_factor;
      int row = at[l], j = factor ? column[l] : item.k + column[l];
      BK_UNROLL
      for (int i = 0; i < 4; ++i) {
        tile[j * pitch + row] = v[l][i];
        if (!factor || ++j == item.k) {
          ++row;
          if (factor) j = 0;
        }
      }
    }
  }
};

template <int kItems>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ List<kItems> list) {
  bk_wait_for_previous();
  BK_SHARED(float, tile, [kGramTile]);
  BK_SHARED(float, partial, [kThreads * kQuad * kQuad]);
  const Item& item = list.items[item_of(list, blockIdx.x, true)];
  const int split = blockIdx.x - item.gram_block;
  const int c = item.k + item.b;
  const int quads = (c + kQuad - 1) / kQuad;
  const int pairs = quads * (quads + 1) / 2;
  const int used = pairs < kThreads ? pairs : kThreads;  // pairs at a time
  const int groups = kThreads / used;                    // which share the rows of a tile
  const int slot = threadIdx.x % used, group = threadIdx.x / used;
  const int64_t begin = static_cast<int64_t>(split) * kSplit;
  const int64_t end = begin + kSplit < item.d ? begin + kSplit : item.d;
  double* out = list.workspace + item.at + static_cast<int64_t>(split) * c * c;
  const int rows = tile_rows_of(c), pitch = rows + 1;
  const Pieces pieces(item, rows);
  for (int e = threadIdx.x; e < (quads * kQuad - c) * pitch; e += kThreads)
    tile[c * pitch + e] = 0.0f;  // columns that fill the last quad
  for (int first = 0; first < pairs; first += used) {
    // Pair number p is (row quad i, column quad j <= i).
    const int p = first + slot;
    const bool active = group < groups && p < pairs;
    int i = 0;
    while ((i + 1) * (i + 2) / 2 <= p) ++i;
    const int j = p - i * (i + 1) / 2;
    float sum[kQuad][kQuad];
    BK_UNROLL
    for (int t = 0; t < kQuad; ++t) {
      BK_UNROLL
      for (int u = 0; u < kQuad; ++u) sum[t][u] = 0;
    }
    float ahead[kAhead][4];
    pieces.load(begin, end, ahead);
    for (int64_t row = begin; row < end; row += rows) {
      __syncthreads();
      pieces.store(ahead, tile);
      __syncthreads();
      if (row + rows < end) pieces.load(row + rows, end, ahead);
      if (!active) continue;
      for (int at = group; at < rows; at += groups) {
        float x[kQuad], y[kQuad];
        BK_UNROLL
        for (int t = 0; t < kQuad; ++t) {
          x[t] = tile[(i * kQuad + t) * pitch + at];
          y[t] = tile[(j * kQuad + t) * pitch + at];
        }
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
      for (int t = 0; t < kQuad; ++t) {
        BK_UNROLL
        for (int u = 0; u < kQuad; ++u) partial[(threadIdx.x * kQuad + t) * kQuad + u] = sum[t][u];
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < used * kQuad * kQuad; e += kThreads) {
      const int q = first + e / (kQuad * kQuad);
      if (q >= pairs) continue;
      int qi = 0;
      while ((qi + 1) * (qi + 2) / 2 <= q) ++qi;
      const int a = qi * kQuad + e / kQuad % kQuad;
      const int b = (q - qi * (qi + 1) / 2) * kQuad + e % kQuad;
      double total = 0;
      for (int g = 0; g < groups; ++g) total += partial[g * used * kQuad * kQuad + e];
      if (a < c && b < c) {
        out[a * c + b] = total;
        out[b * c + a] = total;
      }
    }
  }
}

// A block of threads for core/small_linalg.h; a group is a warp.
struct Block {
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  static __device__ __forceinline__ int threads() { return kThreads; }
  static __device__ __forceinline__ int group() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int groups() { return kWarps; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int lanes() { return 32; }
  static __device__ __forceinline__ double sum(double v) {
    BK_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
    return v;
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// A warp for matrices of up to 32 rows: a group of lanes for each pair of rows, and no barrier of
// the block.
template <int kLanes>
struct Warp {
  static __device__ __forceinline__ int thread() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int threads() { return 32; }
  static __device__ __forceinline__ int group() { return threadIdx.x % 32 / kLanes; }
  static __device__ __forceinline__ int groups() { return 32 / kLanes; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
  static __device__ __forceinline__ int lanes() { return kLanes; }
  static __device__ __forceinline__ double sum(double v) {
    const uint32_t mask = ((1u << kLanes) - 1) << (group() * kLanes);
    BK_UNROLL
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(mask, v, lanes);
    return v;
  }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
};

template <int kItems>
__global__ void __launch_bounds__(kThreads, 3)
    eigen_kernel(const __grid_constant__ List<kItems> list, int shared_bytes) {
  bk_wait_for_previous();
  BK_DYNAMIC_SHARED(double, shared);
  BK_SHARED(double, values, [kMaxSmall]);
  BK_SHARED(double, flags, [16]);  // one for each group
  BK_SHARED(int, order, [kMaxSmall]);
  const Item& item = list.items[blockIdx.x];
  const int c = item.k + item.b;
  const int splits = splits_of(item.d);
  const double* partial = list.workspace + item.at;
  double* coefficients = coefficients_of(list, item);
  const int64_t bytes = int64_t{2} * c * c * static_cast<int64_t>(sizeof(double));
  double* w = bytes <= shared_bytes ? shared : coefficients + static_cast<int64_t>(c) * item.k;
  double* v = w + c * c;
  for (int e = threadIdx.x; e < c * c; e += kThreads) {
    double total = 0;
    for (int s = 0; s < splits; ++s) total += partial[static_cast<int64_t>(s) * c * c + e];
    w[e] = total;
  }
  if (threadIdx.x < kMaxSmall) order[threadIdx.x] = 0;  // what a NaN leaves
  __syncthreads();
  double trace = 0;
  for (int i = 0; i < c; ++i) trace += w[i * c + i];
  if (!(trace > kLeastGramTrace && trace < kMostGramTrace)) {  // seldom
    __syncthreads();
    const auto h = [&](int64_t row, int s) {
      return static_cast<double>(s < item.k
                                     ? item.factor[row * item.k + s]
                                     : item.rows[static_cast<int64_t>(s - item.k) * item.d + row]);
    };
    for (int e = threadIdx.x; e < c * c; e += kThreads) {
      const int i = e / c, j = e % c;
      double total = 0;
      for (int64_t row = 0; row < item.d; ++row)
        total += h(row, i < j ? j : i) * h(row, i < j ? i : j);
      w[e] = total;
    }
    __syncthreads();
  }
  if (c > 32)
    symmetric_eigen<Block>(w, v, values, flags, c, c);
  else if (threadIdx.x < 32 && c > 16)
    symmetric_eigen<Warp<2>>(w, v, values, flags, c, c);
  else if (threadIdx.x < 32)
    symmetric_eigen<Warp<4>>(w, v, values, flags, c, c);
  __syncthreads();
  if (threadIdx.x < static_cast<unsigned>(c)) {
    int rank = 0;
    const double mine = values[threadIdx.x];
    for (int j = 0; j < c; ++j)
      rank += values[j] > mine || (values[j] == mine && j < static_cast<int>(threadIdx.x));
    // Ranks are distinct, except beside a NaN, where every thread may have rank 0.
    if (rank > 0 || mine == mine) order[rank] = threadIdx.x;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < c * item.k; e += kThreads)
    coefficients[e] = v[order[e % item.k] * c + e / item.k];
}

// Numbers of shared memory of apply_kernel: coefficients, H, and the new rows of the factor.
BK_HD int weight_pitch(int k) { return (k + kQuad - 1) / kQuad * kQuad; }
BK_HD int apply_floats(int k, int c) {
  const int rows = tile_rows_of(c);
  return c * weight_pitch(k) + c * (rows + 1) + rows * k + kQuad;
}

template <int kItems>
__global__ void __launch_bounds__(kThreads, 3)
    apply_kernel(const __grid_constant__ List<kItems> list) {
  bk_wait_for_previous();
  BK_DYNAMIC_SHARED(float, shared);
  const Item& item = list.items[item_of(list, blockIdx.x, false)];
  const int k = item.k, c = item.k + item.b, rows = tile_rows_of(c), wide_k = weight_pitch(k);
  float* weights = shared;          // (c, wide_k)
  float* h = weights + c * wide_k;  // (c, rows + 1)
  float* out = h + c * (rows + 1);  // (rows, k), at a multiple of four numbers
  out += (kQuad - (out - shared) % kQuad) % kQuad;
  const int64_t row = static_cast<int64_t>(blockIdx.x - item.apply_block) * rows;
  const Pieces pieces(item, rows);
  float ahead[kAhead][4];
  pieces.load(row, item.d, ahead);
  const double* coefficients = coefficients_of(list, item);
  for (int s = threadIdx.x / 32; s < c; s += kWarps)
    for (int j = threadIdx.x % 32; j < wide_k; j += 32)
      weights[s * wide_k + j] = j < k ? static_cast<float>(coefficients[s * k + j]) : 0.0f;
  pieces.store(ahead, h);
  __syncthreads();
  const int at = threadIdx.x % rows;
  for (int j = threadIdx.x / rows * kQuad; j < k; j += kThreads / rows * kQuad) {
    float sum[kQuad] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int s = 0; s < c; ++s) {
      const float x = h[s * (rows + 1) + at];
      const float4 w = *reinterpret_cast<const float4*>(weights + s * wide_k + j);
      sum[0] = fmaf(x, w.x, sum[0]), sum[1] = fmaf(x, w.y, sum[1]);
      sum[2] = fmaf(x, w.z, sum[2]), sum[3] = fmaf(x, w.w, sum[3]);
    }
    BK_UNROLL
    for (int t = 0; t < kQuad; ++t)
      if (j + t < k) out[at * k + j + t] = sum[t];
  }
  __syncthreads();
  // In one piece: stores by row would touch each line k times.
  const int left = static_cast<int>(item.d - row < rows ? item.d - row : rows) * k;
  float* to = item.factor + row * k;
  if (item.wide != 0) {  // then what is left is a multiple of four
    for (int e = threadIdx.x; e < left / 4; e += kThreads)
      reinterpret_cast<float4*>(to)[e] = reinterpret_cast<const float4*>(out)[e];
  } else {
    for (int e = threadIdx.x; e < left; e += kThreads) to[e] = out[e];
  }
}

int64_t doubles_of(int64_t d, int64_t k, int64_t b) {
  const int64_t c = k + b;
  return splits_of(d) * c * c + c * k + 2 * c * c;
}

int64_t rows_of(const LowRankItem& item, int64_t done) {
  return item.n - done < kBlockRows ? item.n - done : kBlockRows;
}

int items_to_a_launch(int64_t items) { return items > kFew && bk_large_arguments() ? kMany : kFew; }

template <int kItems>
const char* kron_accumulate_lists(const KronParams& p, void* stream) {
  for (int64_t i = 0; i < p.n_items;) {
    DenseList<kItems> list{};
    list.beta = p.beta;
    list.alpha = p.alpha;
    list.workspace = static_cast<float*>(p.workspace);
    int sum_blocks = 0, add_blocks = 0;
    int64_t at = 0;
    for (; i < p.n_items && list.n_items < kItems; ++i) {
      const KronItem& given = p.items[i];
      const int64_t bytes = given.d * (given.dtype == DType::kF32 ? 4 : 2);
      DenseItem item{};
      item.factor = static_cast<float*>(given.factor);
      item.rows = given.rows;
      item.weights = static_cast<const float*>(given.weights);
      item.n = static_cast<int32_t>(given.n);
      item.d = static_cast<int32_t>(given.d);
      item.sum_block = sum_blocks;
      item.add_block = add_blocks;
      item.dtype = static_cast<int32_t>(given.dtype);
      item.wide = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(given.rows) % 16 == 0;
      item.at = at;
      list.items[list.n_items++] = item;
      sum_blocks += dense_splits(given.n, given.d) * rounds_of(given.d);
      add_blocks += static_cast<int>(ceil_div(pairs_of(given.d) * kCells, kThreads));
      at += dense_floats(given);
    }
    if (sum_blocks > 0)
      BK_LAUNCH((dense_sum_kernel<kItems>), dim3(static_cast<unsigned>(sum_blocks)), kThreads, 0,
                stream, list);
    BK_LAUNCH_BEHIND(sum_blocks > 0, (dense_add_kernel<kItems>),
                     dim3(static_cast<unsigned>(add_blocks)), kThreads, 0, stream, list);
    const char* error = bk_last_error();
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <int kItems>
const char* low_rank_update_lists(const LowRankParams& p, void* stream) {
  int64_t most = 0;
  for (int64_t i = 0; i < p.n_items; ++i) most = p.items[i].n > most ? p.items[i].n : most;
  bk_set_max_dynamic_smem(apply_kernel<kItems>, bk_max_shared_memory_per_block());
  for (int64_t done = 0; done < most; done += kBlockRows) {
    int64_t at = 0;
    for (int64_t i = 0; i < p.n_items;) {
      List<kItems> list{};
      list.workspace = static_cast<double*>(p.workspace);
      int gram_blocks = 0, apply_blocks = 0, eigen_bytes = 0, apply_bytes = 0;
      for (; i < p.n_items && list.n_items < kItems; ++i) {
        const LowRankItem& given = p.items[i];
        const int64_t b = rows_of(given, done);
        if (b <= 0) continue;
        Item item{};
        item.factor = static_cast<float*>(given.factor);
        item.rows = static_cast<const float*>(given.rows) + done * given.d;
        item.d = static_cast<int32_t>(given.d);
        item.k = static_cast<int32_t>(given.k);
        item.b = static_cast<int32_t>(b);
        item.wide = given.d % 4 == 0 && reinterpret_cast<uintptr_t>(given.factor) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(given.rows) % 16 == 0;
        item.gram_block = gram_blocks;
        item.apply_block = apply_blocks;
        item.at = at;
        list.items[list.n_items++] = item;
        gram_blocks += splits_of(given.d);
        apply_blocks +=
            static_cast<int>(ceil_div(given.d, tile_rows_of(static_cast<int>(given.k + b))));
        at += doubles_of(given.d, given.k, b);
        const int c = item.k + item.b;
        // Larger eigenproblems lie in the workspace.
        const int eigen = 2 * c * c * static_cast<int>(sizeof(double));
        if (eigen <= kStatic - 4096 && eigen > eigen_bytes) eigen_bytes = eigen;
        const int apply = apply_floats(item.k, c) * static_cast<int>(sizeof(float));
        if (apply > apply_bytes) apply_bytes = apply;
      }
      if (list.n_items == 0) continue;
      BK_LAUNCH((gram_kernel<kItems>), dim3(static_cast<unsigned>(gram_blocks)), kThreads, 0,
                stream, list);
      BK_LAUNCH_BEHIND(true, (eigen_kernel<kItems>), dim3(static_cast<unsigned>(list.n_items)),
                       kThreads, eigen_bytes, stream, list, eigen_bytes);
      BK_LAUNCH_BEHIND(true, (apply_kernel<kItems>), dim3(static_cast<unsigned>(apply_blocks)),
                       kThreads, apply_bytes, stream, list);
      const char* error = bk_last_error();
      if (error != nullptr) return error;
    }
  }
  return nullptr;
}

}  // namespace

int64_t kron_workspace_cuda(const KronParams& p) {
  int64_t most = 0;  // each list uses it anew
  const int items = items_to_a_launch(p.n_items);
  for (int64_t i = 0; i < p.n_items;) {
    int64_t total = 0;
    for (int64_t end = i + items; i < p.n_items && i < end; ++i) total += dense_floats(p.items[i]);
    most = total > most ? total : most;
  }
  return most * static_cast<int64_t>(sizeof(float));
}

int64_t low_rank_workspace_cuda(const LowRankParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.n_items; ++i)
    total += doubles_of(p.items[i].d, p.items[i].k, rows_of(p.items[i], 0));
  return total * static_cast<int64_t>(sizeof(double));
}

const char* low_rank_update_cuda(const LowRankParams& p, void* stream) {
  return items_to_a_launch(p.n_items) == kMany ? low_rank_update_lists<kMany>(p, stream)
                                               : low_rank_update_lists<kFew>(p, stream);
}

const char* kron_accumulate_cuda(const KronParams& p, void* stream) {
  return items_to_a_launch(p.n_items) == kMany ? kron_accumulate_lists<kMany>(p, stream)
                                               : kron_accumulate_lists<kFew>(p, stream);
}

}  // namespace bayes_kernels
