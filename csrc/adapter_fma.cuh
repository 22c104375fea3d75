// fp32 fused-multiply-add kernels of the adapter family: fp32 activations (TF32 would break the
// accuracy rule), and every dtype where tokens are so few that tensor-core tiles would be mostly
// padding. Factors are read as they are, in fp32. Global accesses are those of neighbouring lanes
// to neighbouring columns, whatever the alignment; only down_fma_kernel takes wider ones where it
// may.
//
// Names as in adapter_mma.cuh: down contracts columns, up contracts ranks, outer contracts tokens.
// down_fma_kernel is shrink and, with outer, expand_backward; tile_fma_kernel is expand (up) and
// shrink_backward (up and outer; one after the other above rank 32, whose sums and factors do not
// fit the registers together).
// The dtype of the activations is a run-time branch, the same for all threads, around the loads of
// four tokens. A thread that waited for each token would keep 2 KB of a block in flight, 8 KB of a
// multiprocessor, where some 20 KB cover the latency of memory.
#pragma once

#include "adapter_sums.cuh"

namespace bayes_kernels {
namespace {

constexpr int kFmaThreads = 128;
constexpr int kFmaTokens = 32;          // worked on between two barriers
constexpr uint32_t kNan = 0x7fc00000u;  // of rows that have no group

// ---- down ---------------------------------------------------------------------------------------

// Calls f(zero of the element type). Around a batch of loads, so that they are issued together.
template <class F>
__device__ __forceinline__ void with_element(DType dtype, const F& f) {
  if (dtype == DType::kF32)
    f(float{});
  else if (dtype == DType::kBF16)
    f(bf16{});
  else
    f(f16{});
}

constexpr int kFmaAhead = 4;  // tokens loaded before the first is used; divides kFmaTokens

__device__ __forceinline__ void store_1(DType dtype, void* data, int64_t at, float value) {
  if (dtype == DType::kF32)
    static_cast<float*>(data)[at] = value;
  else if (dtype == DType::kBF16)
    static_cast<bf16*>(data)[at] = static_cast<bf16>(value);
  else
    static_cast<f16*>(data)[at] = static_cast<f16>(value);
}

struct DownFmaArgs {
  DType dtype;
  const void* x;
  int64_t stride, tokens, n;
  const float* factor;  // F[k][j] at k * rank_stride + j * column_stride
  const float* factor_e;
  int64_t rank_stride, column_stride;
  AdapterNoise noise;
  float keep_scale;
  const float* low;     // outer: (tokens, r)
  RowSum sum;           // h or dh; out may be null
  Gradients gradients;  // of outer
  int r;
  int64_t tokens_per_block;
  int64_t passes_per_split;    // of the columns of a block; one with outer
  bool vector, vector_factor;  // rows of x, of the factors may be read four elements at a time
  Grouping groups = {};
  int64_t group_stride = 0;  // of factors and gradients
};

// Ranks of a block; more of them read x again. Few tokens keep the order of sums of
// adapter_decode.cuh.
constexpr int kDownFmaRanks = 8;
BK_HD constexpr int down_fma_ranks(int r, bool few) { return r <= 8 || few ? kDownFmaRanks : 16; }
// Of shrink: 128 registers for a thread, 255 for one that keeps sixteen ranks of two factors.
constexpr int kShrinkFmaWarps = 16;
BK_HD constexpr int shrink_fma_warps(int ranks, bool flip) {
  return flip && ranks == 16 ? 8 : kShrinkFmaWarps;
}
constexpr int kOuterFmaWarps = 4;

// Four neighbouring elements, aligned to 16 (fp32) or 8 bytes.
template <class T>
__device__ __forceinline__ void load_4(const T* data, float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 v = load_once(reinterpret_cast<const float4*>(data));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = load_once(reinterpret_cast<const uint2*>(data));
    const uint32_t word[2] = {v.x, v.y};
    BK_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = unpack<T>(word[i / 2], i % 2);
  }
}

// Four columns from `column` on of tokens 0 to kFmaAhead - 1, which begin at row(0), ... and of
// which `count` exist; `inside` of the columns do.
template <class Row>
__device__ __forceinline__ void load_ahead(DType dtype, const void* data, int64_t column,
                                           const Row& row, int count, int64_t inside, bool vector,
                                           float (&x)[kFmaAhead][4]) {
  BK_UNROLL
  for (int u = 0; u < kFmaAhead; ++u) x[u][0] = x[u][1] = x[u][2] = x[u][3] = 0.0f;
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data) + column;
    if (vector && inside >= 4) {
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u)
        if (u < count) load_4(from + row(u), x[u]);
    } else {
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        BK_UNROLL
        for (int j = 0; j < 4; ++j)
          if (u < count && j < inside) x[u][j] = static_cast<float>(from[row(u) + j]);
      }
    }
  });
}

// A lane keeps four columns of eight or sixteen ranks of the factor in registers and walks over
// tokens; a warp's 128 columns are one sign block. The sums of a token are added over the warp by
// halving: each exchange also halves the number of sums a lane looks after, 9 or 16 shuffles in all
// instead of 40 or 80. A block goes over the columns of its split in passes; with outer there is
// one, and the gradients of a lane's columns stay in registers. blockIdx.z counts runs of ranks.
template <bool kFlip, bool kOuter, int kWarps, int kRanks, bool kGrouped = false>
__global__ void __launch_bounds__(32 * kWarps, kWarps > 4    ? 1
                                               : kRanks == 8 ? 3
                                                             : 2)
    down_fma_kernel(const __grid_constant__ DownFmaArgs p) {
  constexpr int kThreads = 32 * kWarps, kColumns = kWarps * kSignsPerBlock;
  constexpr int kShare = 32 / kRanks;  // lanes that share a sum at the end
  BK_SHARED(uint32_t, sign_words, [kWarps][kFmaTokens][4]);
  BK_SHARED(uint32_t, rank_signs, [kWarps][kFmaTokens]);
  BK_SHARED(float, partial, [kWarps][kFmaTokens][kRanks]);
  BK_SHARED(float, low, [kFmaTokens][kRanks]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int rank0 = static_cast<int>(blockIdx.z) * kRanks;
  const int64_t passes = ceil_div(p.n, kColumns), first_pass = blockIdx.x * p.passes_per_split;
  const int64_t end_pass =
      first_pass + p.passes_per_split < passes ? first_pass + p.passes_per_split : passes;
  const Slice slice = slice_of<kGrouped>(p.groups, p.tokens, p.tokens_per_block);
  if (kGrouped && slice.blocks == 0) return;
  const RowOf<kGrouped> row_of{p.groups.order};
  const bool has_down = p.sum.out != nullptr;
  const bool has_outer = kOuter && p.gradients.partial != nullptr && !(kGrouped && slice.none);

  bk_wait_for_previous();
  float factor[kRanks][4] = {}, factor_e[kFlip ? kRanks : 1][4] = {};
  const auto load_factor = [&](int64_t column) {
    const auto load = [&](const float* source, float (&out)[kRanks][4]) {
      BK_UNROLL
      for (int k = 0; k < kRanks; ++k) {
        const bool inside = rank0 + k < p.r;
        const float* from = source + (rank0 + k) * p.rank_stride + column * p.column_stride;
        if (kGrouped) from += slice.group * p.group_stride;
        if (p.vector_factor && column + 4 <= p.n) {
          const float4 v = inside ? __ldg(reinterpret_cast<const float4*>(from))
                                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          out[k][0] = v.x, out[k][1] = v.y, out[k][2] = v.z, out[k][3] = v.w;
        } else {
          BK_UNROLL
          for (int i = 0; i < 4; ++i)
            out[k][i] = inside && column + i < p.n ? __ldg(from + i * p.column_stride) : 0.0f;
        }
      }
    };
    load(p.factor, factor);
    if constexpr (kFlip) load(p.factor_e, factor_e);
  };
  const bool one_pass = end_pass - first_pass <= 1;
  if (one_pass && has_down) load_factor(first_pass * kColumns + 4 * thread);
  Key in_key{}, out_key{}, dropout_key{};
  if (kFlip) {
    in_key = noise_key(p.noise, kSignIn);
    out_key = noise_key(p.noise, kSignOut);
  }
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);
  float outer[kOuter ? 4 : 1][kRanks] = {};  // of each column

  // Parts of this block's eight ranks.
  const int parts = static_cast<int>(gridDim.x);
  RowSum sums = p.sum;
  if (kGrouped && slice.none) sums.scale = __uint_as_float(kNan);
  if (sums.partial != nullptr) sums.partial += blockIdx.z * parts * p.tokens * kRanks - rank0;

  const int64_t begin = slice.begin, end = slice.end;
  for (int64_t row0 = begin; row0 < end; row0 += kFmaTokens) {
    const int count = static_cast<int>(end - row0 < kFmaTokens ? end - row0 : kFmaTokens);
    if (has_outer) {
      for (int at = thread; at < count * kRanks; at += kThreads) {
        const int i = at / kRanks, k = at % kRanks;
        low[i][k] = rank0 + k < p.r ? __ldg(p.low + row_of(row0 + i) * p.r + rank0 + k) : 0.0f;
      }
      __syncthreads();
    }
    if (kFlip && lane < count) {
      const int64_t id = sign_row_of(p.noise.rows, row_of(row0 + lane));
      const PhiloxBlock o = sign_block(out_key, id, p.r, 0);
      rank_signs[warp][lane] = (rank0 < 32 ? o.word[0] : o.word[1]) >> (rank0 % 32);
    }
    for (int64_t pass = first_pass; pass < end_pass; ++pass) {
      const int64_t column0 = pass * kColumns + warp * kSignsPerBlock, column = column0 + 4 * lane;
      if (!one_pass) load_factor(column);
      if (kFlip && lane < count) {
        const int64_t id = sign_row_of(p.noise.rows, row_of(row0 + lane));
        const PhiloxBlock b = sign_block(in_key, id, p.n, column0 / kSignsPerBlock);
        BK_UNROLL
        for (int w = 0; w < 4; ++w) sign_words[warp][lane][w] = b.word[w];
      }
      __syncwarp();
      for (int i0 = 0; i0 < count; i0 += kFmaAhead) {
        float ahead[kFmaAhead][4];
        load_ahead(
            p.dtype, p.x, column, [&](int u) { return row_of(row0 + i0 + u) * p.stride; },
            count - i0, p.n - column, p.vector, ahead);
        BK_UNROLL
        for (int u = 0; u < kFmaAhead; ++u) {
          const int i = i0 + u;
          if (i >= count) continue;
          float (&x)[4] = ahead[u];
          if (dropout) {
            const PhiloxBlock b = dropout_block(dropout_key, dropout_row(p.noise.rows, row0 + i),
                                                p.n, column / kDropoutPerBlock);
            const uint32_t keep = kept_bits(b, threshold) >> (4 * (lane % 2));
            BK_UNROLL
            for (int j = 0; j < 4; ++j) x[j] = (keep >> j & 1u) != 0 ? p.keep_scale * x[j] : 0.0f;
          }
          if (kOuter && has_outer) {
            BK_UNROLL
            for (int k = 0; k < kRanks; k += 4) {
              const float4 l = *reinterpret_cast<const float4*>(&low[i][k]);
              BK_UNROLL
              for (int j = 0; j < 4; ++j) {
                float (&to)[kRanks] = outer[kOuter ? j : 0];
                to[k] = fmaf(l.x, x[j], to[k]);
                to[k + 1] = fmaf(l.y, x[j], to[k + 1]);
                to[k + 2] = fmaf(l.z, x[j], to[k + 2]);
                to[k + 3] = fmaf(l.w, x[j], to[k + 3]);
              }
            }
          }
          if (!has_down) continue;
          float sum[kRanks];
          BK_UNROLL
          for (int k = 0; k < kRanks; ++k) {
            sum[k] = 0;
            BK_UNROLL
            for (int j = 0; j < 4; ++j) sum[k] = fmaf(factor[k][j], x[j], sum[k]);
          }
          if constexpr (kFlip) {
            const uint32_t signs = sign_words[warp][i][lane / 8] >> (4 * (lane % 8));
            BK_UNROLL
            for (int j = 0; j < 4; ++j) x[j] = (signs >> j & 1u) != 0 ? -x[j] : x[j];
            BK_UNROLL
            for (int k = 0; k < kRanks; ++k) {
              float noise = 0;
              BK_UNROLL
              for (int j = 0; j < 4; ++j) noise = fmaf(factor_e[k][j], x[j], noise);
              sum[k] += (rank_signs[warp][i] >> k & 1u) != 0 ? -noise : noise;
            }
          }
          BK_UNROLL
          for (int half = kRanks / 2; half > 0; half /= 2) {
            // Lanes with this bit set go on with the upper half of the sums.
            const bool upper = (lane & kShare * half) != 0;
            BK_UNROLL
            for (int k = 0; k < half; ++k) {
              const float give = upper ? sum[k] : sum[k + half];
              const float keep = upper ? sum[k + half] : sum[k];
              sum[k] = keep + __shfl_xor_sync(kAllLanes, give, kShare * half);
            }
          }
          BK_UNROLL
          for (int lanes = kShare / 2; lanes > 0; lanes /= 2)
            sum[0] += __shfl_xor_sync(kAllLanes, sum[0], lanes);
          if (lane % kShare == 0) {  // the upper bits of the lane are the rank's
            float& to = partial[warp][i][lane / kShare];
            to = pass == first_pass ? sum[0] : to + sum[0];
          }
        }
      }
      __syncwarp();
    }
    __syncthreads();
    for (int at = thread; has_down && at < count * kRanks / 2; at += kThreads) {
      const int i = at / (kRanks / 2), k = 2 * (at % (kRanks / 2));
      float sum[2] = {};
      for (int w = 0; w < kWarps && first_pass < end_pass; ++w) {
        BK_UNROLL
        for (int j = 0; j < 2; ++j) sum[j] += partial[w][i][k + j];
      }
      store_part<kRanks>(sums, blockIdx.x, p.tokens, p.r, row0 + i, rank0 + k, sum[0], sum[1],
                         row_of);
    }
    __syncthreads();
  }

  if (has_down && parts > 1) {
    const int64_t sum_of = blockIdx.z * gridDim.y + blockIdx.y;
    add_parts(sums.tickets, sum_of, static_cast<int>(blockIdx.x), parts,
              !kGrouped && !sums.one_step, [&](const Step& step) {
                sum_rows<kRanks, kRanks, kThreads>(sums, step, p.tokens, p.r, begin, end, rank0,
                                                   row_of);
              });
  }
  if constexpr (kOuter) {
    if (!has_outer) return;
    const int splits = static_cast<int>(gridDim.y);
    const int64_t padded = static_cast<int64_t>(parts) * kColumns, column0 = blockIdx.x * kColumns;
    Gradients gradients = p.gradients;
    int64_t sum_of = blockIdx.z * parts + blockIdx.x;
    gradients.partial += blockIdx.z * splits * padded * kRanks - rank0;
    BK_UNROLL
    for (int j = 0; j < 4; ++j) {
      float* to =
          gradients.partial + (blockIdx.y * padded + column0 + 4 * thread + j) * kRanks + rank0;
      BK_UNROLL
      for (int k = 0; k < kRanks; k += 4)
        *reinterpret_cast<float4*>(to + k) =
            make_float4(outer[j][k], outer[j][k + 1], outer[j][k + 2], outer[j][k + 3]);
    }
    if (kGrouped) {
      sum_of = sum_of * p.groups.groups + slice.group;
      gradients.partial += slice.block0 * padded * kRanks;
      gradients.out += slice.group * p.group_stride;
    }
    add_parts(gradients.tickets, sum_of, static_cast<int>(blockIdx.y - slice.block0), slice.blocks,
              !kGrouped, [&](const Step& step) {
                sum_gradients<kRanks, kRanks, 1, kColumns, kThreads>(
                    gradients, p.noise, step, padded, p.n, p.r, column0, rank0, gradients.scale);
              });
  }
}

// ---- up and outer -------------------------------------------------------------------------------

// Columns per thread: as many as keep factors and sums in registers, 64 a matrix.
BK_HD constexpr int fma_columns(int rank, bool both) {
  const int most = both ? 32 : 64;
  return rank >= most ? 1 : most / rank < 4 ? most / rank : 4;
}

// What 32 tokens need beside the activations, made once per block. Thread i owns columns i, 128 +
// i, ... of the block: each run of 128 is a sign block, each warp's 32 columns one word of it.
template <int R, bool kFlip, int kColumnsOfThread>
struct TokenTile {
  static constexpr int kColumns = kColumnsOfThread;
  static constexpr int kDropoutBlocks = kColumns * kSignsPerBlock / kDropoutPerBlock;
  float low[kFlip ? 2 : 1][kFmaTokens][R];  // h or dh, and the same with rank signs
  uint32_t signs[kFlip ? kFmaTokens : 1][kColumns][4];
  uint8_t keep[kFmaTokens][kDropoutBlocks];
};

struct TileKeys {
  Key in, out, dropout;
};

__device__ __forceinline__ TileKeys tile_keys(const AdapterNoise& noise, bool flip) {
  TileKeys keys{};
  if (flip) {
    keys.in = noise_key(noise, kSignIn);
    keys.out = noise_key(noise, kSignOut);
  }
  if (noise.dropout > 0.0) keys.dropout = noise_key(noise, kDropout);
  return keys;
}

template <int R, bool kFlip, int kColumns, class Row>
__device__ void fill_tile(TokenTile<R, kFlip, kColumns>& tile, const AdapterNoise& noise,
                          const TileKeys& keys, const float* low, int r, int64_t row0, int count,
                          int64_t block, int64_t columns, const Row& row_of) {
  using Tile = TokenTile<R, kFlip, kColumns>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < count * R; at += kFmaThreads) {
    const int i = at / R, k = at % R;
    const float value = k < r ? __ldg(low + row_of(row0 + i) * r + k) : 0.0f;
    tile.low[0][i][k] = value;
    if constexpr (kFlip) {
      const PhiloxBlock b = sign_block(keys.out, sign_row_of(noise.rows, row_of(row0 + i)), r, 0);
      tile.low[1][i][k] = ((k < 32 ? b.word[0] : b.word[1]) >> (k % 32) & 1u) != 0 ? -value : value;
    }
  }
  if constexpr (kFlip) {
    for (int at = thread; at < count * Tile::kColumns; at += kFmaThreads) {
      const int i = at / Tile::kColumns, c = at % Tile::kColumns;
      const PhiloxBlock b = sign_block(keys.in, sign_row_of(noise.rows, row_of(row0 + i)), columns,
                                       block * Tile::kColumns + c);
      BK_UNROLL
      for (int w = 0; w < 4; ++w) tile.signs[i][c][w] = b.word[w];
    }
  }
  if (noise.dropout > 0.0) {
    const uint32_t threshold = dropout_threshold(noise.dropout);
    for (int at = thread; at < count * Tile::kDropoutBlocks; at += kFmaThreads) {
      const int i = at / Tile::kDropoutBlocks, c = at % Tile::kDropoutBlocks;
      const PhiloxBlock b = dropout_block(keys.dropout, dropout_row(noise.rows, row0 + i), columns,
                                          block * Tile::kDropoutBlocks + c);
      tile.keep[i][c] = static_cast<uint8_t>(kept_bits(b, threshold));
    }
  }
}

// The columns of this thread, kSignsPerBlock apart from `column` on, of tokens 0 to kFmaAhead - 1,
// which begin at row(0), ... and of which `count` exist; `inside` elements are left of the row.
template <int kColumns, class Row>
__device__ __forceinline__ void load_columns_ahead(DType dtype, const void* data, int64_t column,
                                                   const Row& row, int count, int64_t inside,
                                                   float (&x)[kFmaAhead][kColumns]) {
  BK_UNROLL
  for (int u = 0; u < kFmaAhead; ++u) {
    BK_UNROLL
    for (int c = 0; c < kColumns; ++c) x[u][c] = 0.0f;
  }
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data) + column;
    BK_UNROLL
    for (int u = 0; u < kFmaAhead; ++u) {
      BK_UNROLL
      for (int c = 0; c < kColumns; ++c)
        if (u < count && c * kSignsPerBlock < inside)
          x[u][c] = static_cast<float>(from[row(u) + c * kSignsPerBlock]);
    }
  });
}

struct TileFmaArgs {
  DType dtype;
  const void* x;  // x, or base, which may be null
  int64_t stride, tokens, columns;
  void* out;  // up: contiguous, or null
  const float* factor;
  const float* factor_e;
  int64_t rank_stride, column_stride;
  const float* low;  // (tokens, r)
  AdapterNoise noise;
  float scale;          // of up, with 1 / (1 - p)
  Gradients gradients;  // of outer, scale with 1 / (1 - p)
  int r;
  int64_t tokens_per_block;
  Grouping groups = {};
  int64_t group_stride = 0;  // of factors and gradients
};

template <int R, bool kFlip, bool kUp, bool kOuter, bool kGrouped = false>
__global__ void __launch_bounds__(kFmaThreads, 2)
    tile_fma_kernel(const __grid_constant__ TileFmaArgs p) {
  constexpr int kColumns = fma_columns(R, kUp && kOuter), kMatrices = kFlip ? 2 : 1;
  using Tile = TokenTile<R, kFlip, kColumns>;
  BK_SHARED(Tile, tile, );
  bk_wait_for_previous();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x;
  const int64_t column0 = block * kColumns * kSignsPerBlock + thread;
  const Slice slice = slice_of<kGrouped>(p.groups, p.tokens, p.tokens_per_block);
  if (kGrouped && slice.blocks == 0) return;
  const RowOf<kGrouped> row_of{p.groups.order};
  const bool has_up = kUp && p.out != nullptr;
  const bool has_outer = kOuter && p.gradients.partial != nullptr && !(kGrouped && slice.none);
  const float scale = kGrouped && slice.none ? __uint_as_float(kNan) : p.scale;
  float factor[kUp ? kColumns : 1][R] = {}, factor_e[kUp && kFlip ? kColumns : 1][R] = {};
  if (kUp && has_up) {
    BK_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = column0 + c * kSignsPerBlock;
      BK_UNROLL
      for (int k = 0; k < R; ++k) {
        const bool inside = k < p.r && column < p.columns;
        int64_t at = k * p.rank_stride + column * p.column_stride;
        if (kGrouped) at += slice.group * p.group_stride;
        factor[kUp ? c : 0][k] = inside ? __ldg(p.factor + at) : 0.0f;
        if constexpr (kUp && kFlip) factor_e[c][k] = inside ? __ldg(p.factor_e + at) : 0.0f;
      }
    }
  }
  const TileKeys keys = tile_keys(p.noise, kFlip);
  const bool dropout = p.noise.dropout > 0.0;
  float sum[kOuter ? kMatrices : 1][kColumns][R] = {};
  const int64_t begin = slice.begin, end = slice.end;
  for (int64_t row0 = begin; row0 < end; row0 += kFmaTokens) {
    const int count = static_cast<int>(end - row0 < kFmaTokens ? end - row0 : kFmaTokens);
    fill_tile<R, kFlip, kColumns>(tile, p.noise, keys, p.low, p.r, row0, count, block, p.columns,
                                  row_of);
    __syncthreads();
    for (int i0 = 0; i0 < count; i0 += kFmaAhead) {
      float ahead[kFmaAhead][kColumns] = {};
      if (p.x != nullptr)
        load_columns_ahead<kColumns>(
            p.dtype, p.x, column0, [&](int u) { return row_of(row0 + i0 + u) * p.stride; },
            count - i0, p.columns - column0, ahead);
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        const int i = i0 + u;
        if (i >= count) break;
        float (&x)[kColumns] = ahead[u];
        const auto kept = [&](int c) {
          return !dropout ||
                 (tile.keep[i][(c * kSignsPerBlock + thread) / 8] >> (thread % 8) & 1) != 0;
        };
        const auto negative = [&](int c) {
          return (tile.signs[i][c][thread / 32] >> (thread % 32) & 1u) != 0;
        };
        if (kUp && has_up) {
          const auto product = [&](const float (&f)[kUp ? kColumns : 1][R], int matrix, int c) {
            float y = 0;
            BK_UNROLL
            for (int k = 0; k < R; k += 4) {
              const float4 l = *reinterpret_cast<const float4*>(&tile.low[matrix][i][k]);
              const int at = kUp ? c : 0;
              y = fmaf(f[at][k + 3], l.w,
                       fmaf(f[at][k + 2], l.z, fmaf(f[at][k + 1], l.y, fmaf(f[at][k], l.x, y))));
            }
            return y;
          };
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            const int64_t column = column0 + c * kSignsPerBlock;
            if (column >= p.columns) continue;
            float value = product(factor, 0, c);
            if constexpr (kUp && kFlip) {
              const float z = product(factor_e, 1, c);
              value += negative(c) ? -z : z;
            }
            if (!kept(c)) value = 0.0f;
            value *= scale;
            if (!kOuter) value += x[c];
            store_1(p.dtype, p.out, row_of(row0 + i) * p.columns + column, value);
          }
        }
        if constexpr (kOuter) {
          const auto add = [&](float (&to)[kColumns][R], int matrix) {
            BK_UNROLL
            for (int k = 0; k < R; k += 4) {
              const float4 l = *reinterpret_cast<const float4*>(&tile.low[matrix][i][k]);
              BK_UNROLL
              for (int c = 0; c < kColumns; ++c) {
                to[c][k] = fmaf(l.x, x[c], to[c][k]);
                to[c][k + 1] = fmaf(l.y, x[c], to[c][k + 1]);
                to[c][k + 2] = fmaf(l.z, x[c], to[c][k + 2]);
                to[c][k + 3] = fmaf(l.w, x[c], to[c][k + 3]);
              }
            }
          };
          if (!has_outer) continue;
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c)
            if (!kept(c)) x[c] = 0.0f;
          add(sum[0], 0);
          if constexpr (kFlip) {
            BK_UNROLL
            for (int c = 0; c < kColumns; ++c) x[c] = negative(c) ? -x[c] : x[c];
            add(sum[1], 1);
          }
        }
      }
    }
    __syncthreads();
  }
  if constexpr (kOuter) {
    if (!has_outer) return;
    constexpr int kWidth = kColumns * kFmaThreads;
    const int64_t padded = static_cast<int64_t>(gridDim.x) * kWidth;
    BK_UNROLL
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      BK_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        float* to = p.gradients.partial +
                    ((blockIdx.y * kMatrices + matrix) * padded + column0 + c * kSignsPerBlock) * R;
        BK_UNROLL
        for (int k = 0; k < R; k += 4)
          *reinterpret_cast<float4*>(to + k) =
              make_float4(sum[matrix][c][k], sum[matrix][c][k + 1], sum[matrix][c][k + 2],
                          sum[matrix][c][k + 3]);
      }
    }
    Gradients gradients = p.gradients;
    int64_t sum_of = block;
    if (kGrouped) {
      sum_of = sum_of * p.groups.groups + slice.group;
      gradients.partial += slice.block0 * kMatrices * padded * R;
      if (gradients.out != nullptr) gradients.out += slice.group * p.group_stride;
      if (gradients.out_e != nullptr) gradients.out_e += slice.group * p.group_stride;
    }
    add_parts(gradients.tickets, sum_of, static_cast<int>(blockIdx.y - slice.block0), slice.blocks,
              !kGrouped, [&](const Step& step) {
                sum_gradients<R, R, kMatrices, kWidth, kFmaThreads>(
                    gradients, p.noise, step, padded, p.columns, p.r, block * kWidth, 0,
                    gradients.scale);
              });
  }
}

}  // namespace
}  // namespace bayes_kernels
