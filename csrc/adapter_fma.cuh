// fp32 fused-multiply-add kernels of the adapter family: fp32 activations (TF32 would break the
// accuracy rule), and every dtype where tokens are so few that tensor-core tiles would be mostly
// padding. Factors are read as they are, in fp32. Global accesses are those of neighbouring lanes
// to neighbouring columns, whatever the alignment; only down_fma_kernel takes wider ones where it
// may.
//
// Names as in adapter_mma.cuh: down contracts columns, up contracts ranks, outer contracts tokens.
// The dtype of the activations is a run-time branch, the same for all threads, around the loads of
// four tokens. A thread that waited for each token would keep 2 KB of a block in flight, 8 KB of a
// multiprocessor, where some 20 KB cover the latency of memory.
#pragma once

#include "adapter_noise.cuh"

namespace bayes_kernels {
namespace {

constexpr int kFmaThreads = 128;
constexpr int kFmaTokens = 32;  // worked on between two barriers

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
  float scale, keep_scale;
  float* out;  // (splits, tokens, r): one split for each block of columns
  int r;
  int64_t tokens_per_block;  // a multiple of 32
  bool vector;               // rows of x may be read four elements at a time
};

constexpr int kDownFmaRanks = 8;
constexpr int kDownFmaColumns = kFmaThreads * 4;

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

// Four columns from element `at` on of tokens 0 to kFmaAhead - 1, of which `count` exist; `inside`
// of the columns do.
__device__ __forceinline__ void load_ahead(DType dtype, const void* data, int64_t at,
                                           int64_t stride, int count, int64_t inside, bool vector,
                                           float (&x)[kFmaAhead][4]) {
  BK_UNROLL
  for (int u = 0; u < kFmaAhead; ++u) x[u][0] = x[u][1] = x[u][2] = x[u][3] = 0.0f;
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data) + at;
    if (vector && inside >= 4) {
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u)
        if (u < count) load_4(from + u * stride, x[u]);
    } else {
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        BK_UNROLL
        for (int j = 0; j < 4; ++j)
          if (u < count && j < inside) x[u][j] = static_cast<float>(from[u * stride + j]);
      }
    }
  });
}

// A lane keeps four columns of eight ranks of the factor in registers and walks over tokens, so the
// factor is read once per block; a warp's 128 columns are one sign block. The eight sums of a token
// are added over the warp by halving: each exchange also halves the number of sums a lane looks
// after, 9 shuffles in all instead of 40.
template <bool kFlip>
__global__ void __launch_bounds__(kFmaThreads, 2)
    down_fma_kernel(const __grid_constant__ DownFmaArgs p) {
  constexpr int kWarps = kFmaThreads / 32;
  BK_SHARED(uint32_t, sign_words, [kWarps][kFmaTokens][4]);
  BK_SHARED(uint32_t, rank_signs, [kWarps][kFmaTokens]);
  BK_SHARED(float, partial, [kWarps][kFmaTokens][kDownFmaRanks]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column0 =
      static_cast<int64_t>(blockIdx.x) * kDownFmaColumns + warp * kSignsPerBlock;
  const int64_t column = column0 + 4 * lane;
  const int rank0 = static_cast<int>(blockIdx.z) * kDownFmaRanks;

  float factor[kDownFmaRanks][4], factor_e[kFlip ? kDownFmaRanks : 1][4];
  BK_UNROLL
  for (int k = 0; k < kDownFmaRanks; ++k) {
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool inside = rank0 + k < p.r && column + i < p.n;
      const int64_t at = (rank0 + k) * p.rank_stride + (column + i) * p.column_stride;
      factor[k][i] = inside ? __ldg(p.factor + at) : 0.0f;
      if constexpr (kFlip) factor_e[k][i] = inside ? __ldg(p.factor_e + at) : 0.0f;
    }
  }
  Key in_key{}, out_key{}, dropout_key{};
  if (kFlip) {
    in_key = noise_key(p.noise, kSignIn);
    out_key = noise_key(p.noise, kSignOut);
  }
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);

  const int64_t begin = blockIdx.y * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin; row0 < end; row0 += kFmaTokens) {
    const int count = static_cast<int>(end - row0 < kFmaTokens ? end - row0 : kFmaTokens);
    if (kFlip && lane < count) {
      const int64_t id = sign_row_of(p.noise.rows, row0 + lane);
      const PhiloxBlock b = sign_block(in_key, id, p.n, column0 / kSignsPerBlock);
      BK_UNROLL
      for (int w = 0; w < 4; ++w) sign_words[warp][lane][w] = b.word[w];
      const PhiloxBlock o = sign_block(out_key, id, p.r, 0);
      rank_signs[warp][lane] = (rank0 < 32 ? o.word[0] : o.word[1]) >> (rank0 % 32);
    }
    __syncwarp();
    for (int i0 = 0; i0 < count; i0 += kFmaAhead) {
      float ahead[kFmaAhead][4];
      load_ahead(p.dtype, p.x, (row0 + i0) * p.stride + column, p.stride, count - i0, p.n - column,
                 p.vector, ahead);
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        const int i = i0 + u;
        if (i >= count) break;
        float (&x)[4] = ahead[u];
        if (dropout) {
          const PhiloxBlock b = dropout_block(dropout_key, dropout_row(p.noise.rows, row0 + i), p.n,
                                              column / kDropoutPerBlock);
          const uint32_t keep = kept_bits(b, threshold) >> (4 * (lane % 2));
          BK_UNROLL
          for (int j = 0; j < 4; ++j) x[j] = (keep >> j & 1u) != 0 ? p.keep_scale * x[j] : 0.0f;
        }
        float sum[kDownFmaRanks];
        BK_UNROLL
        for (int k = 0; k < kDownFmaRanks; ++k) {
          sum[k] = 0;
          BK_UNROLL
          for (int j = 0; j < 4; ++j) sum[k] = fmaf(factor[k][j], x[j], sum[k]);
        }
        if constexpr (kFlip) {
          const uint32_t signs = sign_words[warp][i][lane / 8] >> (4 * (lane % 8));
          BK_UNROLL
          for (int j = 0; j < 4; ++j) x[j] = (signs >> j & 1u) != 0 ? -x[j] : x[j];
          BK_UNROLL
          for (int k = 0; k < kDownFmaRanks; ++k) {
            float noise = 0;
            BK_UNROLL
            for (int j = 0; j < 4; ++j) noise = fmaf(factor_e[k][j], x[j], noise);
            sum[k] += (rank_signs[warp][i] >> k & 1u) != 0 ? -noise : noise;
          }
        }
        BK_UNROLL
        for (int half = 4; half > 0; half /= 2) {
          // Lanes with this bit set go on with the upper half of the sums.
          const bool upper = (lane & 4 * half) != 0;
          BK_UNROLL
          for (int k = 0; k < half; ++k) {
            const float give = upper ? sum[k] : sum[k + half];
            const float keep = upper ? sum[k + half] : sum[k];
            sum[k] = keep + __shfl_xor_sync(kAllLanes, give, 4 * half);
          }
        }
        sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 2);
        sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 1);
        if (lane % 4 == 0)
          partial[warp][i][lane / 4] = sum[0];  // bits 4, 3, 2 of the lane are the rank's
      }
    }
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < count * kDownFmaRanks; at += kFmaThreads) {
      const int i = at / kDownFmaRanks, k = at % kDownFmaRanks;
      float sum = partial[0][i][k];
      BK_UNROLL
      for (int w = 1; w < kWarps; ++w) sum += partial[w][i][k];
      if (rank0 + k < p.r)
        p.out[(blockIdx.x * p.tokens + row0 + i) * p.r + rank0 + k] = p.scale * sum;
    }
    __syncthreads();
  }
}

// ---- up and outer -------------------------------------------------------------------------------

// Columns per thread: as many as keep factors or sums in registers, 64 a matrix.
template <int R>
constexpr int fma_columns() {
  return R <= 16 ? 4 : R == 32 ? 2 : 1;
}

// What 32 tokens need beside the activations, made once per block. Thread i owns columns i, 128 +
// i, ... of the block: each run of 128 is a sign block, each warp's 32 columns one word of it.
template <int R, bool kFlip>
struct TokenTile {
  static constexpr int kColumns = fma_columns<R>();
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

template <int R, bool kFlip>
__device__ void fill_tile(TokenTile<R, kFlip>& tile, const AdapterNoise& noise,
                          const TileKeys& keys, const float* low, int r, int64_t row0, int count,
                          int64_t block, int64_t columns) {
  using Tile = TokenTile<R, kFlip>;
  const int thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < count * R; at += kFmaThreads) {
    const int i = at / R, k = at % R;
    const float value = k < r ? __ldg(low + (row0 + i) * r + k) : 0.0f;
    tile.low[0][i][k] = value;
    if constexpr (kFlip) {
      const PhiloxBlock b = sign_block(keys.out, sign_row_of(noise.rows, row0 + i), r, 0);
      tile.low[1][i][k] = ((k < 32 ? b.word[0] : b.word[1]) >> (k % 32) & 1u) != 0 ? -value : value;
    }
  }
  if constexpr (kFlip) {
    for (int at = thread; at < count * Tile::kColumns; at += kFmaThreads) {
      const int i = at / Tile::kColumns, c = at % Tile::kColumns;
      const PhiloxBlock b = sign_block(keys.in, sign_row_of(noise.rows, row0 + i), columns,
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

// The columns of this thread, kSignsPerBlock apart from element `at` on, of tokens 0 to kFmaAhead -
// 1, of which `count` exist; `inside` elements are left of the row.
template <int kColumns>
__device__ __forceinline__ void load_columns_ahead(DType dtype, const void* data, int64_t at,
                                                   int64_t stride, int count, int64_t inside,
                                                   float (&x)[kFmaAhead][kColumns]) {
  BK_UNROLL
  for (int u = 0; u < kFmaAhead; ++u) {
    BK_UNROLL
    for (int c = 0; c < kColumns; ++c) x[u][c] = 0.0f;
  }
  with_element(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(data) + at;
    BK_UNROLL
    for (int u = 0; u < kFmaAhead; ++u) {
      BK_UNROLL
      for (int c = 0; c < kColumns; ++c)
        if (u < count && c * kSignsPerBlock < inside)
          x[u][c] = static_cast<float>(from[u * stride + c * kSignsPerBlock]);
    }
  });
}

struct UpFmaArgs {
  DType dtype;
  const void* base;
  int64_t base_stride;
  void* out;
  int64_t tokens, columns;
  const float* factor;
  const float* factor_e;
  int64_t rank_stride, column_stride;
  const float* low;  // (tokens, r)
  AdapterNoise noise;
  float scale;  // with 1 / (1 - p)
  int r;
  int64_t tokens_per_block;
};

template <int R, bool kFlip>
__global__ void __launch_bounds__(kFmaThreads, 2)
    up_fma_kernel(const __grid_constant__ UpFmaArgs p) {
  using Tile = TokenTile<R, kFlip>;
  constexpr int kColumns = Tile::kColumns;
  BK_SHARED(Tile, tile, );
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x;
  const int64_t column0 = block * kColumns * kSignsPerBlock + thread;
  float factor[kColumns][R], factor_e[kFlip ? kColumns : 1][R];
  BK_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = column0 + c * kSignsPerBlock;
    BK_UNROLL
    for (int k = 0; k < R; ++k) {
      const bool inside = k < p.r && column < p.columns;
      const int64_t at = k * p.rank_stride + column * p.column_stride;
      factor[c][k] = inside ? __ldg(p.factor + at) : 0.0f;
      if constexpr (kFlip) factor_e[c][k] = inside ? __ldg(p.factor_e + at) : 0.0f;
    }
  }
  const TileKeys keys = tile_keys(p.noise, kFlip);
  const bool dropout = p.noise.dropout > 0.0;
  const int64_t begin = blockIdx.y * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin; row0 < end; row0 += kFmaTokens) {
    const int count = static_cast<int>(end - row0 < kFmaTokens ? end - row0 : kFmaTokens);
    fill_tile<R, kFlip>(tile, p.noise, keys, p.low, p.r, row0, count, block, p.columns);
    __syncthreads();
    for (int i0 = 0; i0 < count; i0 += kFmaAhead) {
      float base[kFmaAhead][kColumns] = {};
      if (p.base != nullptr)
        load_columns_ahead<kColumns>(p.dtype, p.base, (row0 + i0) * p.base_stride + column0,
                                     p.base_stride, count - i0, p.columns - column0, base);
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        const int i = i0 + u;
        if (i >= count) break;
        const int64_t row = row0 + i;
        float y[kColumns], z[kColumns];
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) y[c] = z[c] = 0.0f;
        BK_UNROLL
        for (int k = 0; k < R; k += 4) {
          const float4 l = *reinterpret_cast<const float4*>(&tile.low[0][i][k]);
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c)
            y[c] = fmaf(factor[c][k + 3], l.w,
                        fmaf(factor[c][k + 2], l.z,
                             fmaf(factor[c][k + 1], l.y, fmaf(factor[c][k], l.x, y[c]))));
          if constexpr (kFlip) {
            const float4 e = *reinterpret_cast<const float4*>(&tile.low[1][i][k]);
            BK_UNROLL
            for (int c = 0; c < kColumns; ++c)
              z[c] = fmaf(factor_e[c][k + 3], e.w,
                          fmaf(factor_e[c][k + 2], e.z,
                               fmaf(factor_e[c][k + 1], e.y, fmaf(factor_e[c][k], e.x, z[c]))));
          }
        }
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int64_t column = column0 + c * kSignsPerBlock;
          if (column >= p.columns) continue;
          float value = y[c];
          if constexpr (kFlip)
            value += (tile.signs[i][c][thread / 32] >> (thread % 32) & 1u) != 0 ? -z[c] : z[c];
          if (dropout && (tile.keep[i][(c * kSignsPerBlock + thread) / 8] >> (thread % 8) & 1) == 0)
            value = 0.0f;
          value *= p.scale;
          value += base[u][c];
          store_1(p.dtype, p.out, row * p.columns + column, value);
        }
      }
    }
    __syncthreads();
  }
}

struct OuterFmaArgs {
  DType dtype;
  const void* x;
  int64_t stride, tokens, columns;
  const float* low;
  AdapterNoise noise;
  float* out;  // (splits, r, columns)
  float* out_e;
  int r;
  int64_t tokens_per_block;
};

template <int R, bool kFlip>
__global__ void __launch_bounds__(kFmaThreads, 2)
    outer_fma_kernel(const __grid_constant__ OuterFmaArgs p) {
  using Tile = TokenTile<R, kFlip>;
  constexpr int kColumns = Tile::kColumns;
  BK_SHARED(Tile, tile, );
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x;
  const int64_t column0 = block * kColumns * kSignsPerBlock + thread;
  const TileKeys keys = tile_keys(p.noise, kFlip);
  const bool dropout = p.noise.dropout > 0.0;
  float sum[kColumns][R] = {}, sum_e[kFlip ? kColumns : 1][R] = {};
  const int64_t begin = blockIdx.y * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin; row0 < end; row0 += kFmaTokens) {
    const int count = static_cast<int>(end - row0 < kFmaTokens ? end - row0 : kFmaTokens);
    fill_tile<R, kFlip>(tile, p.noise, keys, p.low, p.r, row0, count, block, p.columns);
    __syncthreads();
    for (int i0 = 0; i0 < count; i0 += kFmaAhead) {
      float ahead[kFmaAhead][kColumns];
      load_columns_ahead<kColumns>(p.dtype, p.x, (row0 + i0) * p.stride + column0, p.stride,
                                   count - i0, p.columns - column0, ahead);
      BK_UNROLL
      for (int u = 0; u < kFmaAhead; ++u) {
        const int i = i0 + u;
        if (i >= count) break;
        float (&x)[kColumns] = ahead[u];
        BK_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          if (dropout && (tile.keep[i][(c * kSignsPerBlock + thread) / 8] >> (thread % 8) & 1) == 0)
            x[c] = 0.0f;
        }
        BK_UNROLL
        for (int k = 0; k < R; k += 4) {
          const float4 l = *reinterpret_cast<const float4*>(&tile.low[0][i][k]);
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            sum[c][k] = fmaf(l.x, x[c], sum[c][k]);
            sum[c][k + 1] = fmaf(l.y, x[c], sum[c][k + 1]);
            sum[c][k + 2] = fmaf(l.z, x[c], sum[c][k + 2]);
            sum[c][k + 3] = fmaf(l.w, x[c], sum[c][k + 3]);
          }
        }
        if constexpr (kFlip) {
          BK_UNROLL
          for (int c = 0; c < kColumns; ++c)
            x[c] = (tile.signs[i][c][thread / 32] >> (thread % 32) & 1u) != 0 ? -x[c] : x[c];
          BK_UNROLL
          for (int k = 0; k < R; k += 4) {
            const float4 l = *reinterpret_cast<const float4*>(&tile.low[1][i][k]);
            BK_UNROLL
            for (int c = 0; c < kColumns; ++c) {
              sum_e[c][k] = fmaf(l.x, x[c], sum_e[c][k]);
              sum_e[c][k + 1] = fmaf(l.y, x[c], sum_e[c][k + 1]);
              sum_e[c][k + 2] = fmaf(l.z, x[c], sum_e[c][k + 2]);
              sum_e[c][k + 3] = fmaf(l.w, x[c], sum_e[c][k + 3]);
            }
          }
        }
      }
    }
    __syncthreads();
  }
  BK_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = column0 + c * kSignsPerBlock;
    if (column >= p.columns) continue;
    BK_UNROLL
    for (int k = 0; k < R; ++k) {
      if (k >= p.r) continue;
      const int64_t at = (static_cast<int64_t>(blockIdx.y) * p.r + k) * p.columns + column;
      p.out[at] = sum[c][k];
      if constexpr (kFlip) p.out_e[at] = sum_e[c][k];
    }
  }
}

}  // namespace
}  // namespace bayes_kernels
