// Tensor-core kernels of the adapter family for 16-bit activations: activations go from global
// memory straight into the registers of mma.m16n8k16, each once for all products that need them.
//
// That works because the order of the contracted index is free as long as both operands agree, and
// so is the assignment of tokens and columns to the rows and columns of a fragment. Both are chosen
// such that a lane (g = lane / 4, t = lane % 4) always holds the eight neighbouring columns 8 t to
// 8 t + 7 of a run of 32, of tokens g, 8 + g, ...: one load of 16 bytes, one byte of a sign word,
// one dropout block. What other fragments need is transposed in registers (movmatrix).
//
//   down    h (tokens, r)  = x (tokens, n) F^T,  F (r, n): contracts columns        shrink, dh
//   up      y (tokens, m)  = h (tokens, r) F,    F (r, m): contracts ranks          expand, dx
//   outer   G (r, n)       = h^T (r, tokens) x (tokens, n): contracts tokens        da, de, db
//
// With noise (kFlip) each has a second product whose large operand carries the input signs and
// whose small one carries the rank signs.
//
//   down_mma_kernel   shrink: walks over columns, sums of tokens in registers
//   tile_mma_kernel   the others: walks over tokens; expand is up, expand_backward down and outer,
//                     shrink_backward up and outer
#pragma once

#include "adapter_sums.cuh"
#include "mma.h"

namespace bayes_kernels {
namespace {

// ---- shrink -------------------------------------------------------------------------------------

struct DownArgs {
  const void* x;
  int64_t stride, tokens, n;
  const float* factor;  // F (r, n); read as it is without noise
  const uint4* packed;  // with noise F and the noise matrix in fragment order: prepare_kernel
  const uint4* packed_e;
  const float* amax;  // of both factors
  AdapterNoise noise;
  RowSum sum;  // scale with 1 / (1 - p)
  int r;
  int token_warps;          // 1, 2, 4 or 8 warps of 32 tokens each; the others share the columns
  int64_t tiles_per_split;  // of 128 columns
  bool vector, vector_factor;
};

constexpr int kDownTokens = 32;  // per warp
constexpr int kDownThreads = 256, kDownWarps = kDownThreads / 32;

// One warp: 32 tokens, a sign block (128 columns) at a time: 16 loads of 16 bytes are in flight per
// lane (8 where r > 16, 4 where r > 32), 4 registers each; sums take R registers, 2 R with noise.
// 32 tokens x 1 sign block are 32 Philox blocks: one per lane, handed round by shuffles. The warps
// that share tokens add their sums by halves through shared memory.
template <class T, int R, bool kFlip>
__global__ void __launch_bounds__(kDownThreads)
    down_mma_kernel(const __grid_constant__ DownArgs p) {
  constexpr int kGroups = R / 8;
  constexpr int kPart = R <= 16 ? 4 : R == 32 ? 2 : 1;  // 32-column chunks loaded together
  BK_SHARED(float, exchange, [kDownWarps / 2][R][32]);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warp_row = warp % p.token_warps, warp_column = warp / p.token_warps;
  const int column_warps = kDownWarps / p.token_warps;
  const int64_t block0 = static_cast<int64_t>(blockIdx.x) * p.token_warps * kDownTokens;
  const int64_t row0 = block0 + warp_row * kDownTokens;
  // Fragment rows g and g + 8 of two 16-token tiles; beyond the last token it is read again.
  const T* row[4];
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t token = row0 + 8 * i + g < p.tokens ? row0 + 8 * i + g : p.tokens - 1;
    row[i] = static_cast<const T*>(p.x) + token * p.stride;
  }
  bk_wait_for_previous();
  // The token whose signs this lane draws.
  const int64_t own = row0 + 8 * t + g < p.tokens ? row0 + 8 * t + g : p.tokens - 1;
  Key in_key{}, dropout_key{};
  int64_t id = 0;
  if (kFlip) {
    in_key = noise_key(p.noise, kSignIn);
    id = sign_row_of(p.noise.rows, own);
  }
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);
  const float factor_scale = operand_scale<T>(p.amax);

  float h[2][kGroups][4] = {};
  float u[kFlip ? 2 : 1][kGroups][4] = {};
  const int64_t tiles = ceil_div(p.n, kSignsPerBlock);
  const int64_t first = blockIdx.y * p.tiles_per_split;
  int64_t last = first + p.tiles_per_split < tiles ? first + p.tiles_per_split : tiles;
  if (row0 >= p.tokens) last = first;
  for (int64_t tile = first + warp_column; tile < last; tile += column_warps) {
    const int64_t column = tile * kSignsPerBlock + 8 * t;
    const bool full = p.vector && (tile + 1) * kSignsPerBlock <= p.n;
    PhiloxBlock signs{};
    BK_UNROLL
    for (int part = 0; part < 4; part += kPart) {
      Eight v[4][kPart];
      if (full) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
          BK_UNROLL
          for (int c = 0; c < kPart; ++c) {
            const uint4 q =
                load_once(reinterpret_cast<const uint4*>(row[i] + column + 32 * (part + c)));
            v[i][c] = Eight{{q.x, q.y, q.z, q.w}};
          }
        }
      } else {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
          BK_UNROLL
          for (int c = 0; c < kPart; ++c)
            v[i][c] = load_8(row[i], column + 32 * (part + c), p.n, p.vector);
        }
      }
      if (kFlip && part == 0) signs = sign_block(in_key, id, p.n, tile);  // while the loads fly
      if (dropout) {
        // Drawn in a loop that stays one, as unrolled Philox rounds would fill the instruction
        // cache; applied with known indices, without which v would live in local memory.
        uint32_t kept[4] = {};
        BK_ROLLED
        for (int i = 0; i < 4; ++i) {
          uint32_t bits = 0;
          BK_UNROLL
          for (int c = 0; c < kPart; ++c) {
            const PhiloxBlock b =
                dropout_block(dropout_key, dropout_row(p.noise.rows, row0 + 8 * i + g), p.n,
                              (column + 32 * (part + c)) / kDropoutPerBlock);
            bits |= kept_bits(b, threshold) << (8 * c);
          }
          kept[0] = kept[1];
          kept[1] = kept[2];
          kept[2] = kept[3];
          kept[3] = bits;
        }
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
          BK_UNROLL
          for (int c = 0; c < kPart; ++c) v[i][c] = dropped(v[i][c], kept[i] >> (8 * c) & 0xFFu);
        }
      }
      BK_UNROLL
      for (int c = 0; c < kPart; ++c) {
        const int64_t fragment = (tile * 4 + part + c) * kGroups * 32 + lane;
        // Eight columns of rank 8 q + g as fp32, where the factor is read as it is.
        const auto plain = [&](int q) {
          const int64_t at = column + 32 * (part + c);
          const int k = 8 * q + g;
          const float* f = p.factor + k * p.n + at;
          float value[8] = {};
          if (k < p.r && p.vector_factor && at + 8 <= p.n) {
            const float4 lo = __ldg(reinterpret_cast<const float4*>(f));
            const float4 hi = __ldg(reinterpret_cast<const float4*>(f) + 1);
            value[0] = lo.x, value[1] = lo.y, value[2] = lo.z, value[3] = lo.w;
            value[4] = hi.x, value[5] = hi.y, value[6] = hi.z, value[7] = hi.w;
          } else {
            BK_UNROLL
            for (int i = 0; i < 8; ++i)
              if (k < p.r && at + i < p.n) value[i] = __ldg(f + i);
          }
          return make_uint4(pack_2<T>(factor_scale * value[0], factor_scale * value[1]),
                            pack_2<T>(factor_scale * value[2], factor_scale * value[3]),
                            pack_2<T>(factor_scale * value[4], factor_scale * value[5]),
                            pack_2<T>(factor_scale * value[6], factor_scale * value[7]));
        };
        const auto multiply = [&](float (&d)[2][kGroups][4], const uint4* factor) {
          BK_UNROLL
          for (int q = 0; q < kGroups; ++q) {
            const uint4 f = kFlip ? __ldg(factor + fragment + 32 * q) : plain(q);
            BK_UNROLL
            for (int i = 0; i < 2; ++i) {
              const Eight &low = v[2 * i][c], &high = v[2 * i + 1][c];
              const uint32_t a0[4] = {low.word[0], high.word[0], low.word[1], high.word[1]};
              const uint32_t b0[2] = {f.x, f.y};
              mma_m16n8k16<T>(d[i][q], a0, b0);
              const uint32_t a1[4] = {low.word[2], high.word[2], low.word[3], high.word[3]};
              const uint32_t b1[2] = {f.z, f.w};
              mma_m16n8k16<T>(d[i][q], a1, b1);
            }
          }
        };
        multiply(h, p.packed);
        if constexpr (kFlip) {
          BK_UNROLL
          for (int i = 0; i < 4; ++i) {
            // 32 columns are one sign word, the lane's eight one byte of it.
            const uint32_t word = __shfl_sync(kAllLanes, signs.word[part + c], i, 4);
            v[i][c] = flipped(v[i][c], word >> (8 * t) & 0xFFu);
          }
          multiply(u, p.packed_e);
        }
      }
    }
  }

  if constexpr (kFlip) {
    const PhiloxBlock signs = sign_block(noise_key(p.noise, kSignOut), id, p.r, 0);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t word0 = __shfl_sync(kAllLanes, signs.word[0], i, 4);
      const uint32_t word1 = __shfl_sync(kAllLanes, signs.word[1], i, 4);
      BK_UNROLL
      for (int q = 0; q < kGroups; ++q) {
        BK_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int k = 8 * q + 2 * t + j;
          const float noise = u[i / 2][q][2 * (i % 2) + j];
          h[i / 2][q][2 * (i % 2) + j] +=
              ((k < 32 ? word0 : word1) >> (k % 32) & 1u) != 0 ? -noise : noise;
        }
      }
    }
  }
  for (int half = column_warps / 2; half > 0; half /= 2) {
    // The upper half of the warps that share tokens gives its sums to the lower half.
    const bool gives = warp_column >= half && warp_column < 2 * half, takes = warp_column < half;
    const int slot = (gives ? warp - half * p.token_warps : warp) % (kDownWarps / 2);
    BK_UNROLL
    for (int i = 0; i < R; ++i)
      if (gives) exchange[slot][i][lane] = h[i / (4 * kGroups)][i / 4 % kGroups][i % 4];
    __syncthreads();
    BK_UNROLL
    for (int i = 0; i < R; ++i)
      if (takes) h[i / (4 * kGroups)][i / 4 % kGroups][i % 4] += exchange[slot][i][lane];
    __syncthreads();
  }
  RowSum sum = p.sum;
  sum.scale /= factor_scale;
  if (warp_column == 0) {
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      BK_UNROLL
      for (int q = 0; q < kGroups; ++q)
        store_part<R>(sum, blockIdx.y, p.tokens, p.r, row0 + 8 * i + g, 8 * q + 2 * t,
                      h[i / 2][q][2 * (i % 2)], h[i / 2][q][2 * (i % 2) + 1]);
    }
  }
  const int splits = static_cast<int>(gridDim.y);
  if (splits == 1) return;
  const int64_t end = block0 + p.token_warps * kDownTokens;
  add_parts(sum.tickets, blockIdx.x, static_cast<int>(blockIdx.y), splits, true,
            [&](const Step& step) {
              sum_rows<R, R, kDownThreads>(sum, step, p.tokens, p.r, block0,
                                           end < p.tokens ? end : p.tokens, 0);
            });
}

// ---- the other products -------------------------------------------------------------------------

struct TileArgs {
  const void* x;  // x, dy, or base, which may be null
  int64_t stride, tokens, columns;
  void* out;            // up: (tokens, columns) contiguous, or null
  const float* low;     // up and outer: (tokens, r), h or dh
  const float* factor;  // F[k][j] at k * rank_stride + j * column_stride
  const float* factor_e;
  int64_t rank_stride, column_stride;
  const uint4* packed_e;  // in place of factor_e: prepare_kernel
  const float* amax_low;  // of low, of both factors
  const float* amax;
  AdapterNoise noise;
  float scale;          // of up, with 1 / (1 - p)
  RowSum down;          // dh; out may be null
  Gradients gradients;  // scale with 1 / (1 - p)
  int r;
  int64_t tokens_per_block;  // a multiple of 32
  bool vector, vector_low;
};

constexpr int kTileThreads = 128, kTileWarps = kTileThreads / 32;
constexpr int kSlab = 64;  // columns of a warp
constexpr int kTileColumns = kTileWarps * kSlab;

// Ranks of a gradient that a block sums: more would take all registers, so that blockIdx.x counts
// further ones and reads x again, from the second-level cache, as neighbours run side by side.
BK_HD constexpr int outer_ranks(int rank) { return rank < 32 ? rank : 32; }

constexpr int tile_shared_bytes(int rank, bool flip, bool down) {
  return (flip ? 2 : 1) * kTileColumns * rank * 2 + (down ? 2 * kTileWarps * 32 * rank * 4 : 0);
}

// One warp: 64 columns, whose factor lies in shared memory, over the tokens of the block, 32 at a
// time. Sums of outer stay in registers; dh is added over the warps, and so over 256 columns, for
// each 32 tokens.
template <class T, int R, bool kFlip, bool kDown, bool kUp, bool kOuter>
__global__ void __launch_bounds__(kTileThreads, R <= 16 && !kFlip ? 3 : 2)
    tile_mma_kernel(const __grid_constant__ TileArgs p) {
  constexpr int kGroups = R / 8, kOuterGroups = outer_ranks(R) / 8, kSteps = (R + 15) / 16;
  constexpr int kMatrices = kFlip ? 2 : 1;
  constexpr bool kBase = kUp && !kOuter;  // expand
  BK_DYNAMIC_SHARED(uint4, shared);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kTileColumns + warp * kSlab;
  const bool inside = column0 < p.columns;  // the other warps only take part in barriers
  const int rank0 = static_cast<int>(blockIdx.x) * outer_ranks(R);
  const bool has_down = kDown && blockIdx.x == 0 && p.down.out != nullptr;
  const bool has_up = kUp && blockIdx.x == 0 && p.out != nullptr;
  const bool has_outer = kOuter && p.gradients.partial != nullptr;
  bk_wait_for_previous();
  const float factor_scale = operand_scale<T>(p.amax), low_scale = operand_scale<T>(p.amax_low);

  // This warp's fragments of F: of down uint4 [chunk][group][lane] as in prepare_kernel; of up
  // words [matrix][chunk][w][group][lane], the ranks 8 q + 2 t, + 1 of column 8 (g / 2) + 2 w + g %
  // 2.
  constexpr int kFragments = 2 * kGroups * 32;
  uint4* own_factor = shared + warp * kMatrices * kFragments;
  uint32_t* own_words = reinterpret_cast<uint32_t*>(own_factor);
  const auto word_at = [&](int matrix, int c, int w, int q) -> uint32_t& {
    return own_words[(((matrix * 2 + c) * 4 + w) * kGroups + q) * 32 + lane];
  };
  // Read anew each time: kept for both halves of the tokens, all words would be in registers.
  const auto read_word = [&](int matrix, int c, int w, int q) -> uint32_t {
    return *static_cast<const volatile uint32_t*>(&word_at(matrix, c, w, q));
  };
  const auto element = [&](const float* source, int k, int64_t column) {
    if (k >= p.r || column >= p.columns) return 0.0f;
    return factor_scale * __ldg(source + k * p.rank_stride + column * p.column_stride);
  };
  if (inside && (has_down || has_up)) {
    BK_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int64_t chunk = column0 + 32 * c;
      BK_ROLLED
      for (int q = 0; q < kGroups; ++q) {
        if constexpr (kDown) {
          uint32_t word[4];
          BK_UNROLL
          for (int w = 0; w < 4; ++w) {
            const int64_t column = chunk + 8 * t + 2 * w;
            word[w] = pack_2<T>(element(p.factor, 8 * q + g, column),
                                element(p.factor, 8 * q + g, column + 1));
          }
          own_factor[(c * kGroups + q) * 32 + lane] =
              make_uint4(word[0], word[1], word[2], word[3]);
        } else {
          const auto fill = [&](int matrix, const float* source) {
            BK_UNROLL
            for (int w = 0; w < 4; ++w) {
              const int64_t column = chunk + 8 * (g / 2) + 2 * w + g % 2;
              const int k = 8 * q + 2 * t;
              word_at(matrix, c, w, q) =
                  pack_2<T>(element(source, k, column), element(source, k + 1, column));
            }
          };
          fill(0, p.factor);
          if constexpr (kFlip) {
            if (p.packed_e == nullptr) {
              fill(1, p.factor_e);
            } else {
              const uint4 f = __ldg(p.packed_e + (chunk / 32 * kGroups + q) * 32 + lane);
              uint32_t word[4] = {f.x, f.y, f.z, f.w};
              movmatrix_trans_x4(word);
              BK_UNROLL
              for (int w = 0; w < 4; ++w) word_at(1, c, w, q) = word[w];
            }
          }
        }
      }
    }
  }
  __syncwarp();

  Key in_key{}, out_key{}, dropout_key{};
  if (kFlip) {
    in_key = noise_key(p.noise, kSignIn);
    out_key = noise_key(p.noise, kSignOut);
  }
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);
  const bool whole = p.vector && column0 + kSlab <= p.columns;
  const int64_t column = column0 + 8 * t;

  // [matrix][chunk][pair of words][group]: columns as the rows of a fragment, ranks as its columns.
  float sum[kOuter ? kMatrices : 1][2][2][kOuterGroups][4] = {};
  const int64_t begin = blockIdx.z * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin; row0 < end; row0 += 32) {
    if (inside) {
      Eight v[2][4] = {};
      if (p.x != nullptr) {
        const T* rows = static_cast<const T*>(p.x) + (row0 + g) * p.stride + column;
        const auto each = [&](const auto& load) {
          BK_UNROLL
          for (int i = 0; i < 4; ++i) {
            BK_UNROLL
            for (int c = 0; c < 2; ++c)
              if (row0 + 8 * i + g < p.tokens) v[c][i] = load(rows + 8 * i * p.stride, 32 * c);
          }
        };
        if (whole) {
          each([&](const T* from, int at) {
            const uint4 q = load_once(reinterpret_cast<const uint4*>(from + at));
            return Eight{{q.x, q.y, q.z, q.w}};
          });
        } else {
          each([&](const T* from, int at) {
            return load_8(from - column, column + at, p.columns, p.vector);
          });
        }
      }

      // The signs of token row0 + 8 t + g, drawn while the loads fly.
      uint32_t in_words[2] = {}, out_words[2] = {};
      if constexpr (kFlip) {
        const int64_t own = row0 + 8 * t + g < p.tokens ? row0 + 8 * t + g : p.tokens - 1;
        const int64_t id = sign_row_of(p.noise.rows, own);
        const PhiloxBlock in = sign_block(in_key, id, p.columns, column0 / kSignsPerBlock);
        const bool odd = column0 / kSlab % 2 != 0;
        in_words[0] = odd ? in.word[2] : in.word[0];
        in_words[1] = odd ? in.word[3] : in.word[1];
        const PhiloxBlock out = sign_block(out_key, id, p.r, 0);
        out_words[0] = out.word[0];
        out_words[1] = out.word[1];
      }
      // Words of `low`: tokens 8 i + g, ranks first + 8 q + 2 t, + 1.
      const auto load_low = [&](int first, auto& low) {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int64_t token = row0 + 8 * i + g;
          BK_UNROLL
          for (int q = 0; q < static_cast<int>(sizeof(low[0]) / sizeof(low[0][0])); ++q) {
            const int k = first + 8 * q + 2 * t;
            const float* from = p.low + token * p.r + k;
            float2 value = make_float2(0.0f, 0.0f);
            if (token < p.tokens && p.vector_low) {
              if (k < p.r) value = __ldg(reinterpret_cast<const float2*>(from));
            } else if (token < p.tokens) {
              if (k < p.r) value.x = __ldg(from);
              if (k + 1 < p.r) value.y = __ldg(from + 1);
            }
            low[i][q] = pack_2<T>(low_scale * value.x, low_scale * value.y);
          }
        }
      };
      // The same with the rank signs of rows from..from + 3 or + 1 of `low`.
      const auto flip_low = [&](int first, const auto& low, int from, auto& flipped_low) {
        BK_UNROLL
        for (int i = 0; i < static_cast<int>(sizeof(flipped_low) / sizeof(flipped_low[0])); ++i) {
          const uint32_t near = __shfl_sync(kAllLanes, out_words[0], from + i, 4);
          const uint32_t far = R > 32 ? __shfl_sync(kAllLanes, out_words[1], from + i, 4) : 0u;
          BK_UNROLL
          for (int q = 0; q < static_cast<int>(sizeof(low[0]) / sizeof(low[0][0])); ++q) {
            const uint32_t bits = (first + 8 * q < 32 ? near : far) >> (8 * (q % 4) + 2 * t);
            flipped_low[i][q] = low[from + i][q] ^ ((bits & 1u) << 15 | (bits & 2u) << 30);
          }
        }
      };
      uint32_t signs[kFlip ? 2 : 1][4] = {};  // of this lane's eight columns
      if constexpr (kFlip) {
        BK_UNROLL
        for (int c = 0; c < 2; ++c) {
          BK_UNROLL
          for (int i = 0; i < 4; ++i)
            signs[c][i] = __shfl_sync(kAllLanes, in_words[c], i, 4) >> (8 * t) & 0xFFu;
        }
      }
      uint32_t kept[4] = {0xFFFFu, 0xFFFFu, 0xFFFFu, 0xFFFFu};  // eight bits for each chunk
      if (dropout) {
        BK_ROLLED
        for (int i = 0; i < 4; ++i) {  // as in down_mma_kernel
          uint32_t bits = 0;
          BK_UNROLL
          for (int c = 0; c < 2; ++c) {
            const PhiloxBlock b =
                dropout_block(dropout_key, dropout_row(p.noise.rows, row0 + 8 * i + g), p.columns,
                              (column + 32 * c) / kDropoutPerBlock);
            bits |= kept_bits(b, threshold) << (8 * c);
          }
          kept[0] = kept[1];
          kept[1] = kept[2];
          kept[2] = kept[3];
          kept[3] = bits;
        }
      }

      uint32_t all_low[kUp ? 4 : 1][kGroups] = {};
      if constexpr (kUp) {
        load_low(0, all_low);
        if (has_up) {
          const float scale = p.scale / (low_scale * factor_scale);
          using Row = uint32_t[kGroups];
          const auto multiply = [&](float (&d)[4], const Row& near, const Row& far, int matrix,
                                    int c, int w) {
            BK_UNROLL
            for (int step = 0; step < kSteps; ++step) {
              constexpr bool kPadded = kGroups % 2 != 0;  // eight of sixteen ranks
              const int q = 2 * step, next = kPadded ? q : q + 1;
              const uint32_t zero = kPadded ? 0u : ~0u;
              const uint32_t a[4] = {near[q], far[q], near[next] & zero, far[next] & zero};
              const uint32_t b[2] = {read_word(matrix, c, w, q),
                                     read_word(matrix, c, w, next) & zero};
              mma_m16n8k16<T>(d, a, b);
            }
          };
          BK_UNROLL
          for (int half = 0; half < 2; ++half) {
            uint32_t low_e[2][kGroups] = {};
            if constexpr (kFlip) flip_low(0, all_low, 2 * half, low_e);
            BK_UNROLL
            for (int c = 0; c < 2; ++c) {
              Eight y[2];
              BK_UNROLL
              for (int w = 0; w < 4; ++w) {
                // Tokens 16 half + g and 8 further on, columns 8 t + 2 w and + 1.
                float d[4] = {}, z[4] = {};
                multiply(d, all_low[2 * half], all_low[2 * half + 1], 0, c, w);
                if constexpr (kFlip) multiply(z, low_e[0], low_e[1], 1, c, w);
                BK_UNROLL
                for (int h = 0; h < 2; ++h) {
                  const int i = 2 * half + h;
                  float value[2];
                  BK_UNROLL
                  for (int j = 0; j < 2; ++j) {
                    value[j] = d[2 * h + j];
                    if constexpr (kFlip)
                      value[j] +=
                          (signs[c][i] >> (2 * w + j) & 1u) != 0 ? -z[2 * h + j] : z[2 * h + j];
                    if ((kept[i] >> (8 * c + 2 * w + j) & 1u) == 0) value[j] = 0.0f;
                    value[j] *= scale;
                    if (kBase) value[j] += unpack<T>(v[c][i].word[w], j);
                  }
                  y[h].word[w] = pack_2<T>(value[0], value[1]);
                }
              }
              BK_UNROLL
              for (int h = 0; h < 2; ++h) {
                const int64_t token = row0 + 8 * (2 * half + h) + g;
                if (token < p.tokens)
                  store_8(static_cast<T*>(p.out) + token * p.columns, column + 32 * c, p.columns,
                          p.vector, y[h]);
              }
            }
          }
        }
      }

      if constexpr (kDown) {
        if (has_down) {
          float h[2][kGroups][4] = {};
          BK_UNROLL
          for (int c = 0; c < 2; ++c) {
            BK_UNROLL
            for (int q = 0; q < kGroups; ++q) {
              const uint4 f = own_factor[(c * kGroups + q) * 32 + lane];
              BK_UNROLL
              for (int i = 0; i < 2; ++i) {
                const Eight &near = v[c][2 * i], &far = v[c][2 * i + 1];
                const uint32_t a0[4] = {near.word[0], far.word[0], near.word[1], far.word[1]};
                const uint32_t b0[2] = {f.x, f.y};
                mma_m16n8k16<T>(h[i][q], a0, b0);
                const uint32_t a1[4] = {near.word[2], far.word[2], near.word[3], far.word[3]};
                const uint32_t b1[2] = {f.z, f.w};
                mma_m16n8k16<T>(h[i][q], a1, b1);
              }
            }
          }
          float* exchange = reinterpret_cast<float*>(shared + kTileWarps * kMatrices * kFragments) +
                            ((row0 / 32 % 2) * kTileWarps + warp) * R * 32;
          BK_UNROLL
          for (int i = 0; i < R; ++i)
            exchange[i * 32 + lane] = h[i / (4 * kGroups)][i / 4 % kGroups][i % 4];
        }
      }

      if constexpr (kOuter) {
        if (has_outer) {
          uint32_t low[4][kOuterGroups], turned[kOuterGroups][4];
          if constexpr (kUp && kGroups == kOuterGroups) {
            BK_UNROLL
            for (int i = 0; i < 4 * kGroups; ++i) low[i % 4][i / 4] = all_low[i % 4][i / 4];
          } else {
            load_low(rank0, low);
          }
          const auto turn = [&] {
            BK_UNROLL
            for (int q = 0; q < kOuterGroups; ++q) {
              BK_UNROLL
              for (int i = 0; i < 4; ++i) turned[q][i] = low[i][q];
              movmatrix_trans_x4(turned[q]);
            }
          };
          const auto multiply = [&](float (&d)[2][2][kOuterGroups][4]) {
            BK_UNROLL
            for (int c = 0; c < 2; ++c) {
              BK_UNROLL
              for (int half = 0; half < 2; ++half) {
                Eight near = v[c][2 * half], far = v[c][2 * half + 1];
                movmatrix_trans_x4(near.word);
                movmatrix_trans_x4(far.word);
                BK_UNROLL
                for (int w = 0; w < 2; ++w) {
                  const uint32_t a[4] = {near.word[2 * w], near.word[2 * w + 1], far.word[2 * w],
                                         far.word[2 * w + 1]};
                  BK_UNROLL
                  for (int q = 0; q < kOuterGroups; ++q) {
                    const uint32_t b[2] = {turned[q][2 * half], turned[q][2 * half + 1]};
                    mma_m16n8k16<T>(d[c][w][q], a, b);
                  }
                }
              }
            }
          };
          if (dropout) {
            BK_UNROLL
            for (int c = 0; c < 2; ++c) {
              BK_UNROLL
              for (int i = 0; i < 4; ++i) v[c][i] = dropped(v[c][i], kept[i] >> (8 * c) & 0xFFu);
            }
          }
          turn();
          multiply(sum[0]);
          if constexpr (kFlip) {
            BK_UNROLL
            for (int c = 0; c < 2; ++c) {
              BK_UNROLL
              for (int i = 0; i < 4; ++i) v[c][i] = flipped(v[c][i], signs[c][i]);
            }
            flip_low(rank0, low, 0, low);
            turn();
            multiply(sum[1]);
          }
        }
      }
    }

    if constexpr (kDown) {
      if (has_down) {
        // A buffer is written again after the next barrier, which all pass once they have read it.
        const float* exchange =
            reinterpret_cast<const float*>(shared + kTileWarps * kMatrices * kFragments) +
            (row0 / 32 % 2) * kTileWarps * R * 32;
        const int64_t left = ceil_div(p.columns - blockIdx.y * kTileColumns, kSlab);
        const int warps = static_cast<int>(left < kTileWarps ? left : kTileWarps);
        __syncthreads();
        for (int pair = warp; pair < R / 2; pair += kTileWarps) {
          float part[2] = {};
          for (int w = 0; w < warps; ++w) {
            BK_UNROLL
            for (int j = 0; j < 2; ++j) part[j] += exchange[(w * R + 2 * pair + j) * 32 + lane];
          }
          RowSum down = p.down;
          down.scale /= factor_scale;
          store_part<R>(down, blockIdx.y, p.tokens, p.r,
                        row0 + 16 * (pair / (2 * kGroups)) + 8 * (pair % 2) + g,
                        8 * (pair / 2 % kGroups) + 2 * t, part[0], part[1]);
        }
      }
    }
  }

  if constexpr (kDown) {
    if (has_down && gridDim.y > 1) {
      const int parts = static_cast<int>(gridDim.y);
      RowSum down = p.down;
      down.scale /= factor_scale;
      add_parts(down.tickets, blockIdx.z, static_cast<int>(blockIdx.y), parts, true,
                [&](const Step& step) {
                  sum_rows<R, R, kTileThreads>(down, step, p.tokens, p.r, begin, end, 0);
                });
    }
  }
  if constexpr (kOuter) {
    if (!has_outer) return;
    const int64_t padded = static_cast<int64_t>(gridDim.y) * kTileColumns;
    if (inside) {
      BK_UNROLL
      for (int i = 0; i < kMatrices * 2 * 2 * kOuterGroups * 2; ++i) {
        const int h = i % 2, q = i / 2 % kOuterGroups, w = i / (2 * kOuterGroups) % 2,
                  c = i / (4 * kOuterGroups) % 2, matrix = i / (8 * kOuterGroups);
        const float (&d)[4] = sum[matrix][c][w][q];
        const int64_t at = column0 + 32 * c + 8 * (g / 2) + 2 * (2 * w + h) + g % 2;
        *reinterpret_cast<float2*>(p.gradients.partial +
                                   ((blockIdx.z * kMatrices + matrix) * padded + at) * R + rank0 +
                                   8 * q + 2 * t) = make_float2(d[2 * h], d[2 * h + 1]);
      }
    }
    const int splits = static_cast<int>(gridDim.z);
    const int64_t sum_of = blockIdx.x * gridDim.y + blockIdx.y;
    add_parts(p.gradients.tickets, sum_of, static_cast<int>(blockIdx.z), splits, true,
              [&](const Step& step) {
                sum_gradients<R, outer_ranks(R), kMatrices, kTileColumns, kTileThreads>(
                    p.gradients, p.noise, step, padded, p.columns, p.r,
                    static_cast<int64_t>(blockIdx.y) * kTileColumns, rank0,
                    p.gradients.scale / low_scale);
              });
  }
}

}  // namespace
}  // namespace bayes_kernels
