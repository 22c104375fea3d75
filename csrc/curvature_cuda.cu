// Curvature family on the GPU: three launches for a whole list of factors and a block of new rows.
//
// 1. Partial Gram matrices of H = [factor, rows^T], a block for each kSplit rows of H.
// 2. A block for each factor adds them up in fp64 and takes the eigenvectors.
// 3. factor <- H V_k, in place: a block holds its rows of H before it writes them.
// Dense factors take two: partial sums, a block for each split of the rows; and their sum. Plain
// multiply-adds are enough: up to 128 columns the time is that of launches and of first loads.
// The list travels by value in the kernels' arguments.
#include "cuda_portable.h"
#include "curvature.h"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSplit = 1024;  // rows of H in one partial Gram matrix: a constant, for fixed bits
constexpr int kTile = 32;     // rows of H in shared memory, of the second pass
constexpr int kAhead = 4;     // 16-byte loads of a thread before the first is used
constexpr int kQuad = 4;      // a thread multiplies 4 columns with 4 columns
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

constexpr int kFew = 60, kMany = 500;  // items to a launch, by what arguments take

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

// Rows of H that gram_kernel holds in shared memory: kAhead loads of each thread fill the tile.
__device__ __forceinline__ int gram_rows_of(int c) {
  return c <= 16 ? 256 : c <= 32 ? 128 : c <= 64 ? 64 : 32;
}
constexpr int kGramTile = (kMaxSmall + kQuad) * 33 > 64 * 65 ? (kMaxSmall + kQuad) * 33 : 64 * 65;

// The pieces of a tile that a thread brings, of four numbers each: all are loaded before the tile
// in front of it is multiplied, and stored behind it. A piece of the factor is four neighbours of
// its row-major rows, a piece of the new rows four neighbours of one of them.
struct GramPieces {
  const Item& item;
  int rows, pitch, of_factor, count;  // of the tile
  int at[kAhead], column[kAhead];     // of the first of the four

  __device__ __forceinline__ GramPieces(const Item& item_, int rows_)
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
  const int rows = gram_rows_of(c), pitch = rows + 1;
  const GramPieces pieces(item, rows);
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

template <int kItems>
__global__ void __launch_bounds__(kThreads)
    eigen_kernel(const __grid_constant__ List<kItems> list, int shared_bytes) {
  BK_DYNAMIC_SHARED(double, shared);
  BK_SHARED(double, values, [kMaxSmall]);
  BK_SHARED(double, flags, [kWarps]);
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
  symmetric_eigen<Block>(w, v, values, flags, c, c);
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

template <int kItems>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ List<kItems> list) {
  BK_DYNAMIC_SHARED(float, shared);
  const Item& item = list.items[item_of(list, blockIdx.x, false)];
  const int k = item.k, c = item.k + item.b;
  float* weights = shared;    // (c, k)
  float* h = shared + c * k;  // (c, kTile + 1)
  const double* coefficients = coefficients_of(list, item);
  for (int e = threadIdx.x; e < c * k; e += kThreads)
    weights[e] = static_cast<float>(coefficients[e]);
  const int64_t row = static_cast<int64_t>(blockIdx.x - item.apply_block) * kTile;
  for (int e = threadIdx.x; e < kTile * k; e += kThreads) {
    const int at = e / k;
    h[e % k * (kTile + 1) + at] = row + at < item.d ? item.factor[(row + at) * k + e % k] : 0.0f;
  }
  for (int e = threadIdx.x; e < kTile * item.b; e += kThreads) {
    const int at = e % kTile, s = e / kTile;
    h[(k + s) * (kTile + 1) + at] =
        row + at < item.d ? item.rows[static_cast<int64_t>(s) * item.d + row + at] : 0.0f;
  }
  __syncthreads();
  const int at = threadIdx.x % kTile;
  if (row + at >= item.d) return;
  for (int j = threadIdx.x / kTile; j < k; j += kThreads / kTile) {
    float sum = 0;
    for (int s = 0; s < c; ++s) sum = fmaf(h[s * (kTile + 1) + at], weights[s * k + j], sum);
    item.factor[(row + at) * k + j] = sum;
  }
}

int64_t doubles_of(int64_t d, int64_t k, int64_t b) {
  const int64_t c = k + b;
  return splits_of(d) * c * c + c * k + 2 * c * c;
}

int64_t rows_of(const LowRankItem& item, int64_t done) {
  return item.n - done < kBlockRows ? item.n - done : kBlockRows;
}

// --- dense factors

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
    BK_LAUNCH((dense_add_kernel<kItems>), dim3(static_cast<unsigned>(add_blocks)), kThreads, 0,
              stream, list);
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
        apply_blocks += static_cast<int>(ceil_div(given.d, kTile));
        at += doubles_of(given.d, given.k, b);
        const int c = item.k + item.b;
        // Larger eigenproblems lie in the workspace.
        const int eigen = 2 * c * c * static_cast<int>(sizeof(double));
        if (eigen <= kStatic - 4096 && eigen > eigen_bytes) eigen_bytes = eigen;
        const int apply = (c * item.k + c * (kTile + 1)) * static_cast<int>(sizeof(float));
        if (apply > apply_bytes) apply_bytes = apply;
      }
      if (list.n_items == 0) continue;
      BK_LAUNCH((gram_kernel<kItems>), dim3(static_cast<unsigned>(gram_blocks)), kThreads, 0,
                stream, list);
      BK_LAUNCH((eigen_kernel<kItems>), dim3(static_cast<unsigned>(list.n_items)), kThreads,
                eigen_bytes, stream, list, eigen_bytes);
      BK_LAUNCH((apply_kernel<kItems>), dim3(static_cast<unsigned>(apply_blocks)), kThreads,
                apply_bytes, stream, list);
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
