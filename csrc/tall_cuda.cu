// Tall family on the GPU: Gram matrices, one small solve for each matrix, a second pass.
//
// The list travels by value in the arguments of the Gram kernel, which leaves it in the workspace
// for the kernels behind it: no copy from the host, so a captured graph replays it, and the solve
// and the second pass are one launch for the whole list. Products are fp64 on tensor cores
// (mma.m8n8k4): fp32 numbers go from global memory straight into fragments, without shared memory,
// since the summed index may be permuted freely. Sums are split by the shape only and added in a
// fixed order.
#include <algorithm>
#include <vector>

#include "cuda_portable.h"
#include "mma.h"
#include "tall.h"
#include "tall_solve.h"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kSplitRows = 512;  // rows of a block, at least: 32 KB at rank 16
constexpr int kMaxSplits = 64;
constexpr int kGroup = 32;       // columns of a Gram job's operand, at most
constexpr int kRefineRows = 32;  // rows at a time in the refinement, at most
constexpr int kSolveBuffers = 6;

struct Item {
  float* x;
  const float* d;
  float* out;
  double* region;  // partial sums, then small matrices: Region
  int32_t n;
  int32_t r;
  int32_t index;   // in the caller's list
  int32_t vector;  // all pointers and r allow vector accesses
};
static_assert(sizeof(Item) == 48, "room for 60 or 500 in the arguments");

template <int kItems>
struct List {
  Item items[kItems];
  Item* all;      // in the workspace
  int32_t first;  // position of items[0] there
  TallOp op;
};
constexpr int kFew = 60, kMany = 500;
static_assert(sizeof(List<kFew>) <= kArguments, "kernel arguments");
static_assert(sizeof(List<kMany>) <= kLargeArguments, "kernel arguments");

BK_HD int rows_of(int64_t n) {
  const int64_t even = ceil_div(ceil_div(n, kMaxSplits), 4 * kWarps) * 4 * kWarps;
  return static_cast<int>(even > kSplitRows ? even : kSplitRows);
}
BK_HD int splits_of(int64_t n) { return static_cast<int>(ceil_div(n, rows_of(n))); }

// Gram matrices that an op needs: x^T x; x^T d; d^T d.
BK_HD int kinds_of(TallOp op) {
  if (op == TallOp::kGram || op == TallOp::kRetract) return 1;
  return op == TallOp::kStiefelStep ? 3 : 2;
}

BK_HD int pitch_of(int r) { return r | 1; }  // odd: columns lie in different banks

// Numbers of an item's region: partial sums (splits, kinds, r, r); matrices of r * pitch: p, a (of
// the step), and the coefficients of the second pass; and, where shared memory is too small, what
// the solve works in.
struct Region {
  int64_t p, a, first, second, work, end;
};
BK_HD Region region_of(TallOp op, int64_t n, int r, bool work_in_global) {
  const int64_t matrix = int64_t{r} * pitch_of(r);
  Region g;
  g.p = int64_t{splits_of(n)} * kinds_of(op) * r * r;
  g.a = g.p + matrix;
  g.first = g.a + matrix;
  g.second = g.first + matrix;
  g.work = g.second + matrix;
  g.end = g.work + (work_in_global ? kSolveBuffers * matrix + kSolveNumbers : 0);
  g.end += g.end % 2;  // 16-byte aligned
  return g;
}
BK_HD int64_t solve_bytes(int r) {
  return (int64_t{kSolveBuffers} * r * pitch_of(r) + kSolveNumbers) *
         static_cast<int64_t>(sizeof(double));
}

// A block as a team: its warps are the groups.
struct BlockTeam {
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int threads() { return kThreads; }
  static __device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int groups() { return kWarps; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int lanes() { return 32; }
  static __device__ __forceinline__ double sum(double v) {
    BK_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kAllLanes, v, lanes);
    return v;
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// `count` adjacent numbers of rows `row`, row + step, ... below `end`; zero where masked. vector:
// one access of 4 * count bytes. The branch lies around all loads, so that they are issued
// together.
template <int count, int kRows>
__device__ __forceinline__ void load_rows(const float* matrix, uint32_t row, int step, uint32_t end,
                                          int column, int r, bool vector,
                                          float (&v)[kRows][count]) {
  const float* at = matrix + static_cast<int64_t>(row) * r + column;
  const uint32_t left = column < r && row < end ? end - row : 0;
  BK_UNROLL
  for (int u = 0; u < kRows; ++u) BK_UNROLL
  for (int e = 0; e < count; ++e) v[u][e] = 0;
  if constexpr (count > 1) {
    if (vector) {
      BK_UNROLL
      for (int u = 0; u < kRows; ++u, at += step * r) {
        if (static_cast<uint32_t>(u * step) >= left) continue;
        if constexpr (count == 4) {
          const float4 f = __ldcg(reinterpret_cast<const float4*>(at));
          v[u][0] = f.x, v[u][1] = f.y, v[u][2] = f.z, v[u][3] = f.w;
        } else {
          const float2 f = __ldcg(reinterpret_cast<const float2*>(at));
          v[u][0] = f.x, v[u][1] = f.y;
        }
      }
      return;
    }
  }
  BK_UNROLL
  for (int u = 0; u < kRows; ++u, at += step * r) BK_UNROLL
  for (int e = 0; e < count; ++e)
    if (column + e < r && static_cast<uint32_t>(u * step) < left) v[u][e] = __ldcg(at + e);
}

// x and d as the ops see them: rows of x, of x + d, or of d.
struct Source {
  const float* matrix;
  const float* added;  // or null
};

// load_rows of x + d: all loads before the first sum.
template <int count, int kRows>
__device__ __forceinline__ void load_source(const Source& s, uint32_t row, int step, uint32_t end,
                                            int column, int r, bool vector,
                                            float (&v)[kRows][count]) {
  load_rows(s.matrix, row, step, end, column, r, vector, v);
  if (s.added == nullptr) return;
  float w[kRows][count];
  load_rows(s.added, row, step, end, column, r, vector, w);
  BK_UNROLL
  for (int u = 0; u < kRows; ++u) BK_UNROLL
  for (int e = 0; e < count; ++e) v[u][e] += w[u][e];
}

__device__ __forceinline__ Source source_of(TallOp op, const Item& item, bool d) {
  if (d) return {item.d, nullptr};
  return {item.x, op == TallOp::kRetract ? item.d : nullptr};
}

// Jobs of a Gram block: pairs of column groups. Those of x^T x and d^T d lie on or above the
// diagonal.
BK_HD int jobs_of(TallOp op, int groups) {
  const int half = groups * (groups + 1) / 2;
  return half + (kinds_of(op) > 1 ? groups * groups : 0) + (kinds_of(op) > 2 ? half : 0);
}

// Grid (matrices, splits, jobs). A lane holds row `lane % 4` of 4 rows and B adjacent columns, so
// that block I of the 8-column blocks is made of columns B (lane / 4) + I.
template <int B, int groups, int kItems>
__global__ void __launch_bounds__(kThreads, B == 1   ? 4
                                            : B == 2 ? 2
                                                     : 1)
    gram_kernel(const __grid_constant__ List<kItems> list) {
  bk_wait_for_previous();
  constexpr int kUnroll = B == 4 ? 4 : 8;
  const Item& item = list.items[blockIdx.x];
  if (blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0)
    list.all[list.first + static_cast<int>(blockIdx.x)] = item;
  const int rows = rows_of(item.n), r = item.r;
  if (static_cast<int>(blockIdx.y) >= splits_of(item.n)) return;
  // The job: kind and column groups.
  constexpr int kHalf = groups * (groups + 1) / 2;
  int kind = 0, job = static_cast<int>(blockIdx.z), ga = 0, gb = 0;
  if (job >= kHalf && job < kHalf + groups * groups) {
    kind = 1;
    ga = (job - kHalf) / groups;
    gb = (job - kHalf) % groups;
  } else {
    if (job >= kHalf) {
      kind = 2;
      job -= kHalf + groups * groups;
    }
    ga = job == 2 ? 1 : 0;  // (0, 0), (0, 1), (1, 1)
    gb = job == 0 ? 0 : 1;
  }
  const bool same = kind != 1 && ga == gb;
  const Source a = source_of(list.op, item, kind == 2);
  const Source b = source_of(list.op, item, kind != 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int ca = ga * kGroup + B * (lane / 4), cb = gb * kGroup + B * (lane / 4);
  const uint32_t n = static_cast<uint32_t>(item.n),
                 begin = static_cast<uint32_t>(rows) * blockIdx.y;
  const uint32_t end = begin + rows < n ? begin + rows : n;
  const bool vector = item.vector != 0;
  double acc[B][B][2];
  BK_UNROLL
  for (int i = 0; i < B; ++i) BK_UNROLL
  for (int j = 0; j < B; ++j) acc[i][j][0] = acc[i][j][1] = 0;
  for (uint32_t row = begin + 4 * warp; row < end; row += 4 * kWarps * kUnroll) {
    float va[kUnroll][B], vb[kUnroll][B];
    load_source(a, row + lane % 4, 4 * kWarps, end, ca, r, vector, va);
    if (!same) load_source(b, row + lane % 4, 4 * kWarps, end, cb, r, vector, vb);
    BK_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      BK_UNROLL
      for (int i = 0; i < B; ++i) BK_UNROLL
      for (int j = 0; j < B; ++j)
        if (!same || i <= j)
          mma_m8n8k4_f64(acc[i][j], static_cast<double>(va[u][i]),
                         static_cast<double>(same ? va[u][j] : vb[u][j]));
    }
  }
  // The warps' sums, one warp after another.
  BK_SHARED(double, sums, [B * B * 64]);
  for (int w = 0; w < kWarps; ++w) {
    if (warp == w) {
      BK_UNROLL
      for (int i = 0; i < B; ++i) BK_UNROLL
      for (int j = 0; j < B; ++j) BK_UNROLL
      for (int e = 0; e < 2; ++e) {
        double* sum = sums + (i * B + j) * 64 + 2 * lane + e;
        *sum = w == 0 ? acc[i][j][e] : *sum + acc[i][j][e];
      }
    }
    __syncthreads();
  }
  double* out =
      item.region + (int64_t{static_cast<int>(blockIdx.y)} * kinds_of(list.op) + kind) * r * r;
  for (int e = static_cast<int>(threadIdx.x); e < B * B * 64; e += kThreads) {
    const int i = e / 64 / B, j = e / 64 % B;
    const int row = ga * kGroup + B * (e % 64 / 8) + i, column = gb * kGroup + B * (e % 8) + j;
    // The solve reads the upper half of x^T x and d^T d.
    const bool mirror = same && i > j;
    if (row < r && column < r && !mirror) out[row * r + column] = sums[e];
    if constexpr (B > 1) {
      if (row < r && column < r && same && i < j) out[column * r + row] = sums[e];
    }
  }
}

// The sum of the partial Gram matrices of one kind, in order; symmetric ones from their upper half.
__device__ void add_partials(const Item& item, TallOp op, int kind, bool symmetric, double* out,
                             int ld) {
  const int r = item.r, splits = splits_of(item.n), kinds = kinds_of(op);
  for (int e = BlockTeam::thread(); e < r * r; e += kThreads) {
    const int i = e / r, j = e % r;
    const int from = symmetric && i > j ? j * r + i : e;
    double sum = 0;
    for (int split = 0; split < splits; ++split)
      sum += item.region[(int64_t{split} * kinds + kind) * r * r + from];
    out[i * ld + j] = sum;
  }
  BlockTeam::sync();
}

struct SolveArguments {
  const Item* items;
  TallOp op;
  Retraction retraction;
  int32_t shared_rank;  // up to which shared memory holds the work
  const double* lr;
  const double* lam;
  int32_t* info;
};

// Coefficients of t p, from p and, for a step, a: (p), or (a p, -lr p).
__device__ void retraction_coefficients(const SolveArguments& s, const Region& g, double* region,
                                        int r, int ld) {
  const double* p = region + g.p;
  double *first = region + g.first, *second = region + g.second;
  if (s.op == TallOp::kRetract) {
    for (int e = BlockTeam::thread(); e < r * ld; e += kThreads)
      if (e % ld < r) first[e] = p[e];
  } else {
    const double lr = *s.lr;
    multiply<BlockTeam>(region + g.a, p, first, r, ld);
    for (int e = BlockTeam::thread(); e < r * ld; e += kThreads)
      if (e % ld < r) second[e] = -lr * p[e];
  }
  BlockTeam::sync();
}

__device__ void copy_matrix(const double* from, double* to, int r, int ld) {
  for (int e = BlockTeam::thread(); e < r * ld; e += kThreads)
    if (e % ld < r) to[e] = from[e];
  BlockTeam::sync();
}

__device__ void write_gram(const double* from, float* out, int r, int ld) {
  for (int e = BlockTeam::thread(); e < r * r; e += kThreads)
    out[e] = static_cast<float>(from[e / r * ld + e % r]);
}

// Where the condition number asks for another Gram matrix: that of t p, whose rows are made on the
// fly. Seldom needed, and by few matrices of a list; sums stay in the buffers, not in registers.
__device__ __forceinline__ void refine(const SolveArguments& s, const Item& item, const Region& g,
                                       double* buffers, RetractState* state) {
  const int r = item.r, ld = pitch_of(r), matrix = r * ld;
  double* numbers = buffers + kSolveBuffers * matrix;
  double *gram = buffers, *tile = buffers + matrix;  // rows of t p, in the other buffers
  const int most = (kSolveBuffers - 1) * ld, rows = most < kRefineRows ? most : kRefineRows;
  const double *first = item.region + g.first, *second = item.region + g.second;
  const Source a = source_of(s.op, item, false);
  const bool pair = s.op == TallOp::kStiefelStep;
  for (int again = 0; again < kMaxRefinements && state->more != 0; ++again) {
    for (int e = BlockTeam::thread(); e < matrix; e += kThreads) gram[e] = 0;
    for (int64_t row0 = 0; row0 < item.n; row0 += rows) {
      BlockTeam::sync();  // the tile before has been read
      for (int e = BlockTeam::thread(); e < rows * r; e += kThreads) {
        const int64_t row = row0 + e / r;
        const int j = e % r;
        double y = 0;
        if (row < item.n)
          for (int k = 0; k < r; ++k) {
            float w = a.matrix[row * r + k];
            if (a.added != nullptr) w += a.added[row * r + k];
            y = fma(static_cast<double>(w), first[k * ld + j], y);
            if (pair) y = fma(static_cast<double>(item.d[row * r + k]), second[k * ld + j], y);
          }
        tile[e] = y;
      }
      BlockTeam::sync();
      for (int e = BlockTeam::thread(); e < r * r; e += kThreads) {
        const int i = e / r, j = e % r;
        double sum = gram[i * ld + j];
        for (int k = 0; k < rows; ++k) sum = fma(tile[k * r + i], tile[k * r + j], sum);
        gram[i * ld + j] = sum;
      }
    }
    BlockTeam::sync();
    next_factor<BlockTeam>(s.retraction, gram, item.region + g.p, buffers + matrix,
                           buffers + 2 * matrix, numbers, r, ld, state);
    if (state->info < kRankDeficient) retraction_coefficients(s, g, item.region, r, ld);
  }
}

// One block for each matrix.
// Four blocks on a multiprocessor up to rank 32: 448 matrices are one wave of an H200.
__global__ void __launch_bounds__(kThreads, 4) solve_kernel(SolveArguments s) {
  bk_wait_for_previous();
  BK_DYNAMIC_SHARED(double, shared);
  const Item item = s.items[blockIdx.x];
  const int r = item.r, ld = pitch_of(r), matrix = r * ld;
  const bool in_global = r > s.shared_rank;
  const Region g = region_of(s.op, item.n, r, in_global);
  double* region = item.region;
  double* buffers = in_global ? region + g.work : shared;
  double* numbers = buffers + kSolveBuffers * matrix;
  double *gram = buffers, *free = buffers + matrix;
  add_partials(item, s.op, 0, true, gram, ld);
  if (s.op == TallOp::kGram) {
    write_gram(gram, item.out, r, ld);
    return;
  }
  if (s.op == TallOp::kLandingField || s.op == TallOp::kLandingStep) {
    const bool step = s.op == TallOp::kLandingStep;
    add_partials(item, s.op, 1, false, free, ld);
    landing_coefficients<BlockTeam>(gram, free, *s.lam, step ? *s.lr : 0.0, step, region + g.first,
                                    region + g.second, r, ld);
    return;
  }
  double cancelled = 1;
  if (s.op == TallOp::kStiefelStep) {
    double *k = free, *dd = free + matrix, *work = free + 2 * matrix;
    add_partials(item, s.op, 1, false, k, ld);
    add_partials(item, s.op, 2, true, dd, ld);
    stiefel_gram<BlockTeam>(gram, k, dd, *s.lr, region + g.a, gram, work, r, ld);
    cancelled = cancellation(gram, dd, *s.lr, r, ld);
    BlockTeam::sync();  // dd is room to work in for what follows
  }
  double* p = free;
  RetractState state =
      first_factor<BlockTeam>(s.retraction, gram, p, free + matrix, numbers, r, ld);
  refine_if_cancelled(cancelled, &state);
  if (state.info < kRankDeficient) {
    copy_matrix(p, region + g.p, r, ld);
    retraction_coefficients(s, g, region, r, ld);
  }
  if (state.more != 0) refine(s, item, g, buffers, &state);
  if (BlockTeam::thread() == 0) s.info[item.index] = state.info;
}

// y = x a + d b. Grid (matrices, blocks of rows). A lane owns V adjacent columns, 4 V apart, of row
// lane / 4 of 8: it loads and stores them, and they are its elements of both fragments.
template <int W>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Item* items, TallOp op, const int32_t* info, int32_t shared_rank) {
  bk_wait_for_previous();
  constexpr int V = W >= 16 ? 4 : 2, S = W / (4 * V);
  constexpr int kSteps = W / 4, kBlocks = W / 8;  // of the product: summed index, columns
  constexpr int kTiles = W <= 16 ? 4 : 2;         // of 8 rows, for each read of a coefficient
  BK_DYNAMIC_SHARED(double, coefficients);
  const Item item = items[blockIdx.x];
  const int r = item.r, ld = pitch_of(r), rows = rows_of(item.n);
  const int64_t begin = int64_t{rows} * blockIdx.y;
  if (begin >= item.n) return;
  if (info != nullptr && info[item.index] >= kRankDeficient) return;
  const bool pair = op != TallOp::kRetract;
  const Region g = region_of(op, item.n, r, r > shared_rank);
  for (int e = static_cast<int>(threadIdx.x); e < (pair ? 2 : 1) * kSteps * kBlocks * 32;
       e += kThreads) {
    const int lane = e % 32, block = e / 32 % kBlocks, step = e / 32 / kBlocks % kSteps;
    const int row = 4 * V * (step / V) + V * (lane % 4) + step % V, n = lane / 4;
    const int column = 4 * V * (block / (V / 2)) + V * (n / 2) + 2 * (block % (V / 2)) + n % 2;
    const double* from = item.region + (e < kSteps * kBlocks * 32 ? g.first : g.second);
    coefficients[e] = row < r && column < r ? from[row * ld + column] : 0.0;
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t end = begin + rows < item.n ? begin + rows : item.n;
  const bool vector = item.vector != 0;
  float* out = op == TallOp::kLandingField ? item.out : item.x;
  for (int64_t row = begin + 8 * kTiles * warp; row < end; row += 8 * kTiles * kWarps) {
    const uint32_t first = static_cast<uint32_t>(row) + lane / 4;
    double acc[kTiles][kBlocks][2];
    BK_UNROLL
    for (int t = 0; t < kTiles; ++t) BK_UNROLL
    for (int j = 0; j < kBlocks; ++j) acc[t][j][0] = acc[t][j][1] = 0;
    for (int part = 0; part < (pair ? 2 : 1); ++part) {
      const Source source = source_of(op, item, part == 1);
      float v[S][kTiles][V];
      BK_UNROLL
      for (int q = 0; q < S; ++q)
        load_rows(source.matrix, first, 8, end, 4 * V * q + V * (lane % 4), r, vector, v[q]);
      if (source.added != nullptr) {
        float w[S][kTiles][V];
        BK_UNROLL
        for (int q = 0; q < S; ++q)
          load_rows(source.added, first, 8, end, 4 * V * q + V * (lane % 4), r, vector, w[q]);
        BK_UNROLL
        for (int q = 0; q < S; ++q) BK_UNROLL
        for (int t = 0; t < kTiles; ++t) BK_UNROLL
        for (int e = 0; e < V; ++e) v[q][t][e] += w[q][t][e];
      }
      const double* c = coefficients + part * kSteps * kBlocks * 32 + lane;
      BK_UNROLL
      for (int step = 0; step < kSteps; ++step) BK_UNROLL
      for (int j = 0; j < kBlocks; ++j) {
        const double coefficient = c[(step * kBlocks + j) * 32];
        BK_UNROLL
        for (int t = 0; t < kTiles; ++t)
          mma_m8n8k4_f64(acc[t][j], static_cast<double>(v[step / V][t][step % V]), coefficient);
      }
    }
    BK_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int64_t mine = row + 8 * t + lane / 4;
      if (mine >= end) continue;
      BK_UNROLL
      for (int q = 0; q < S; ++q) {
        const int column = 4 * V * q + V * (lane % 4);
        float* to = out + mine * r + column;
        float y[V];
        BK_UNROLL
        for (int e = 0; e < V; ++e) y[e] = static_cast<float>(acc[t][q * (V / 2) + e / 2][e % 2]);
        if (vector && column < r) {
          if constexpr (V == 4)
            *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
          else
            *reinterpret_cast<float2*>(to) = make_float2(y[0], y[1]);
        } else {
          BK_UNROLL
          for (int e = 0; e < V; ++e)
            if (column + e < r) to[e] = y[e];
        }
      }
    }
  }
}

constexpr int kClasses = 4;  // by width: 8, 16, 32, 64
struct Class {
  int64_t first, count;
  int splits;
};
int class_of(int64_t r) { return r <= 8 ? 0 : r <= 16 ? 1 : r <= 32 ? 2 : 3; }

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

int shared_rank_of() {
  int r = kMaxTallRank;
  while (r > 32 && solve_bytes(r) + 18 * 1024 > bk_max_shared_memory_per_block()) --r;
  return r;
}

template <int kItems>
const char* launch_gram(int width_class, const List<kItems>& list, dim3 grid, void* stream) {
  switch (width_class) {
    case 0:
      BK_LAUNCH((gram_kernel<1, 1, kItems>), grid, kThreads, 0, stream, list);
      break;
    case 1:
      BK_LAUNCH((gram_kernel<2, 1, kItems>), grid, kThreads, 0, stream, list);
      break;
    case 2:
      BK_LAUNCH((gram_kernel<4, 1, kItems>), grid, kThreads, 0, stream, list);
      break;
    default:
      BK_LAUNCH((gram_kernel<4, 2, kItems>), grid, kThreads, 0, stream, list);
  }
  return bk_last_error();
}

// The Gram matrices of all items, which lie in order of their classes.
template <int kItems>
const char* launch_grams(const std::vector<Item>& items, const Class (&classes)[kClasses],
                         Item* all, TallOp op, void* stream) {
  for (int c = 0; c < kClasses; ++c) {
    const int64_t last = classes[c].first + classes[c].count;
    for (int64_t first = classes[c].first; first < last; first += kItems) {
      const int64_t count = last - first < kItems ? last - first : kItems;
      List<kItems> list{};
      list.all = all;
      list.first = static_cast<int32_t>(first);
      list.op = op;
      int splits = 0;
      for (int64_t i = 0; i < count; ++i) {
        list.items[i] = items[static_cast<size_t>(first + i)];
        splits = std::max(splits, splits_of(list.items[i].n));
      }
      const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(splits),
                      static_cast<unsigned>(jobs_of(op, c == 3 ? 2 : 1)));
      const char* error = launch_gram(c, list, grid, stream);
      if (error != nullptr) return error;
    }
  }
  return nullptr;
}

template <int W>
const char* launch_combine(const Item* items, dim3 grid, const TallParams& p, int shared_rank,
                           void* stream) {
  const int parts = p.op == TallOp::kRetract ? 1 : 2;
  const size_t bytes = static_cast<size_t>(parts) * W * W * sizeof(double);
  if (bytes > 48 * 1024) bk_set_max_dynamic_smem(combine_kernel<W>, bytes);
  const int32_t* info = p.info;
  BK_LAUNCH_BEHIND(true, (combine_kernel<W>), grid, kThreads, bytes, stream, items, p.op, info,
                   static_cast<int32_t>(shared_rank));
  return bk_last_error();
}

}  // namespace

int64_t tall_workspace_cuda(const TallParams& p) {
  const int shared_rank = shared_rank_of();
  int64_t numbers = 0;
  for (int64_t i = 0; i < p.n_items; ++i) {
    const int r = static_cast<int>(p.items[i].r);
    numbers += region_of(p.op, p.items[i].n, r, r > shared_rank).end;
  }
  return p.n_items * static_cast<int64_t>(sizeof(Item)) +
         numbers * static_cast<int64_t>(sizeof(double));
}

const char* tall_cuda(const TallParams& p, void* stream) {
  const int shared_rank = shared_rank_of();
  Item* all = static_cast<Item*>(p.workspace);
  double* region = reinterpret_cast<double*>(all + p.n_items);
  Class classes[kClasses] = {};
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(p.n_items));
  int64_t solve = 0, most = 0;
  for (int c = 0; c < kClasses; ++c) {
    classes[c].first = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < p.n_items; ++i) {
      const TallItem& item = p.items[i];
      if (class_of(item.r) != c) continue;
      const int r = static_cast<int>(item.r), unit = c == 0 ? 2 : 4;
      const bool vector = r % unit == 0 && aligned(item.x, 4 * unit) && aligned(item.d, 4 * unit) &&
                          aligned(item.out, 4 * unit);
      items.push_back(Item{static_cast<float*>(item.x), static_cast<const float*>(item.d),
                           static_cast<float*>(item.out), region, static_cast<int32_t>(item.n),
                           static_cast<int32_t>(r), static_cast<int32_t>(i), vector ? 1 : 0});
      region += region_of(p.op, item.n, r, r > shared_rank).end;
      classes[c].splits = std::max(classes[c].splits, splits_of(item.n));
      if (r <= shared_rank) solve = std::max(solve, solve_bytes(r));
    }
    classes[c].count = static_cast<int64_t>(items.size()) - classes[c].first;
    most = std::max(most, classes[c].count);
  }
  const char* error = most > kFew && bk_large_arguments()
                          ? launch_grams<kMany>(items, classes, all, p.op, stream)
                          : launch_grams<kFew>(items, classes, all, p.op, stream);
  if (error != nullptr) return error;
  const SolveArguments arguments{all,  p.op,  p.retraction, static_cast<int32_t>(shared_rank),
                                 p.lr, p.lam, p.info};
  const dim3 grid(static_cast<unsigned>(p.n_items));
  const size_t bytes = static_cast<size_t>(solve);
  if (bytes > 48 * 1024) bk_set_max_dynamic_smem(solve_kernel, bytes);
  BK_LAUNCH_BEHIND(true, solve_kernel, grid, kThreads, bytes, stream, arguments);
  error = bk_last_error();
  if (error != nullptr || p.op == TallOp::kGram) return error;
  for (int c = 0; c < kClasses; ++c) {
    if (classes[c].count == 0) continue;
    const Item* items = all + classes[c].first;
    const dim3 blocks(static_cast<unsigned>(classes[c].count),
                      static_cast<unsigned>(classes[c].splits));
    switch (c) {
      case 0:
        error = launch_combine<8>(items, blocks, p, shared_rank, stream);
        break;
      case 1:
        error = launch_combine<16>(items, blocks, p, shared_rank, stream);
        break;
      case 2:
        error = launch_combine<32>(items, blocks, p, shared_rank, stream);
        break;
      default:
        error = launch_combine<64>(items, blocks, p, shared_rank, stream);
    }
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace bayes_kernels
