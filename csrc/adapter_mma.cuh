// Tensor-core kernels of the adapter family for 16-bit activations: x goes from global memory
// straight into the registers of mma.m16n8k16, without shared memory or barriers.
//
// That works because the order of the contracted index is free as long as both operands agree, and
// so is the assignment of tokens and columns to the rows and columns of a fragment. Both are chosen
// such that a lane always holds eight neighbouring elements of a row, 16 bytes: one load, one byte
// of a sign word, one dropout block. The small operands are put into fragment order by pack_kernel,
// 16 bytes to a lane, and are read through L1, where all warps of a multiprocessor share them.
//
//   down    h (tokens, r)  = x (tokens, n) F^T,  F (r, n): contracts columns        shrink, dh
//   up      y (tokens, m)  = h (tokens, r) F,    F (r, m): contracts ranks          expand, dx
//   outer   G (r, n)       = h^T (r, tokens) x (tokens, n): contracts tokens        da, de, db
//
// With noise (kFlip) each has a second product whose large operand carries the input signs and
// whose small one carries the rank signs.
#pragma once

#include "adapter_noise.cuh"
#include "mma.h"

namespace bayes_kernels {
namespace {

// ---- small operands in fragment order -----------------------------------------------------------

// What the 16 bytes of a lane hold, with g = lane / 4, t = lane % 4, word w = 0..3, and where they
// are, with Q = R / 8, K = R / 16:
//   kDown   F[8 q + g][32 c + 8 t + 0..7]                           at (c Q + q) 32 + lane
//   kUp     h[16 i + g + 8 (w / 2)][16 k + 2 t + 8 (w % 2) + 0..1]  at (i K + k) 32 + lane
//   kOuter  h[16 i + 2 t + 8 (w / 2) + 0..1][16 k + g + 8 (w % 2)]  at (i K + k) 32 + lane
enum class Fragment : int { kDown, kUp, kOuter };

struct PackJob {
  Fragment kind;
  const float* source;
  int64_t major_stride;  // of the rank (kDown) or the token (kUp, kOuter)
  int64_t minor_stride;  // of the column (kDown) or the rank
  int64_t major, minor;  // extents; elements outside are zero
  bool flip;             // times the rank signs of the token
  const float* amax;     // of the operand: operand_scale
  uint4* out;
  int64_t count;   // 16-byte fragments
  int group_bits;  // log2 of Q or K
};

constexpr int kMaxPackJobs = 4;

struct PackArgs {
  PackJob job[kMaxPackJobs];
  AdapterNoise noise;
  int r;
};

constexpr int kPackThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PackArgs p) {
  const PackJob& job = p.job[blockIdx.y];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= job.count) return;  // whole warps: count is a multiple of 32
  const int lane = static_cast<int>(index % 32), g = lane / 4, t = lane % 4;
  const int64_t tile = index / 32 >> job.group_bits;
  const int group = static_cast<int>(index / 32 - (tile << job.group_bits));
  // The signs of 16 tokens for the 16 ranks of this fragment: a lane draws those of one token, and
  // shuffles hand them round. Rank k < 64: words 0 and 1 of the token's block.
  uint32_t drawn = 0;
  if (job.flip) {
    const int64_t own = 16 * tile + lane % 16;
    const int64_t token = own < job.major ? own : job.major - 1;
    const PhiloxBlock b =
        sign_block(noise_key(p.noise, kSignOut), sign_row_of(p.noise.rows, token), p.r, 0);
    drawn = (group < 2 ? b.word[0] : b.word[1]) >> (16 * (group % 2));
  }
  const float scale = operand_scale<T>(job.amax);
  // Element (major, minor); the sign is bit `bit` of `signs`.
  const auto element = [&](int64_t major, int64_t minor, uint32_t signs, int bit) {
    if (major >= job.major || minor >= job.minor) return 0.0f;
    const float v = scale * job.source[major * job.major_stride + minor * job.minor_stride];
    return (signs >> bit & 1u) != 0 ? -v : v;
  };
  uint32_t word[4];
  BK_UNROLL
  for (int w = 0; w < 4; ++w) {
    float value[2];
    if (job.kind == Fragment::kDown) {
      BK_UNROLL
      for (int i = 0; i < 2; ++i)
        value[i] = element(8 * group + g, 32 * tile + 8 * t + 2 * w + i, 0, 0);
    } else if (job.kind == Fragment::kUp) {
      const int token = g + 8 * (w / 2), k = 2 * t + 8 * (w % 2);
      const uint32_t signs = __shfl_sync(kAllLanes, drawn, token);
      BK_UNROLL
      for (int i = 0; i < 2; ++i)
        value[i] = element(16 * tile + token, 16 * group + k + i, signs, k + i);
    } else {
      const int token = 2 * t + 8 * (w / 2), k = g + 8 * (w % 2);
      BK_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t signs = __shfl_sync(kAllLanes, drawn, token + i);
        value[i] = element(16 * tile + token + i, 16 * group + k, signs, k);
      }
    }
    word[w] = pack_2<T>(value[0], value[1]);
  }
  job.out[index] = make_uint4(word[0], word[1], word[2], word[3]);
}

struct AmaxJob {
  const float* data;
  const float* also;  // a second array that shares the scale, or null
  int64_t count;      // of each
  float* parts;       // (kAmaxParts)
};

struct AmaxArgs {
  AmaxJob job[kMaxPackJobs];
};

constexpr int kAmaxThreads = 256;

// Grid (kAmaxParts, operands): the largest magnitude of each part of an operand.
__global__ void __launch_bounds__(kAmaxThreads) amax_kernel(const __grid_constant__ AmaxArgs p) {
  BK_SHARED(float, warps, [kAmaxThreads / 32]);
  const AmaxJob& job = p.job[blockIdx.y];
  float most = 0.0f;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAmaxThreads + threadIdx.x; i < job.count;
       i += kAmaxParts * kAmaxThreads) {
    most = fmaxf(most, fabsf(__ldg(job.data + i)));
    if (job.also != nullptr) most = fmaxf(most, fabsf(__ldg(job.also + i)));
  }
  BK_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kAmaxThreads / 32; ++w) most = fmaxf(most, warps[w]);
  job.parts[blockIdx.x] = most;
}

// ---- down ---------------------------------------------------------------------------------------

struct DownArgs {
  const void* x;
  int64_t stride, tokens, n;
  const uint4* factor;    // kDown fragments
  const uint4* factor_e;  // of the noise matrix
  const float* amax;      // of both factors
  AdapterNoise noise;
  float scale;
  float* out;  // (splits, tokens, r)
  int r;
  int64_t tiles_per_split;  // of 128 columns
  bool vector;
};

constexpr int kMmaThreads = 128;
constexpr int kDownTokens = 32;  // per warp

// One warp: 32 tokens over the columns of one split, a sign block (128 columns) at a time: 16 loads
// of 16 bytes are in flight per lane (8 where r > 16, 4 where r > 32), 4 registers each;
// accumulators take R registers, 2 R with noise. 32 tokens x 1 sign block are 32 Philox blocks: one
// per lane, handed round by shuffles.
template <class T, int R, bool kFlip>
__global__ void __launch_bounds__(kMmaThreads, R == 8 && !kFlip    ? 4
                                               : R <= 16 || !kFlip ? 3
                                                                   : 2)
    down_mma_kernel(const __grid_constant__ DownArgs p) {
  constexpr int kGroups = R / 8;
  constexpr int kPart = R <= 16 ? 4 : R == 32 ? 2 : 1;  // 32-column chunks loaded together
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kMmaThreads / 32) + threadIdx.x / 32;
  const int64_t row0 = warp * kDownTokens;
  if (row0 >= p.tokens) return;
  // Fragment rows g and g + 8 of two 16-token tiles; beyond the last token it is read again.
  const T* row[4];
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t token = row0 + 8 * i + g < p.tokens ? row0 + 8 * i + g : p.tokens - 1;
    row[i] = static_cast<const T*>(p.x) + token * p.stride;
  }
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

  float h[2][kGroups][4] = {};
  float u[kFlip ? 2 : 1][kGroups][4] = {};
  const int64_t tiles = ceil_div(p.n, kSignsPerBlock);
  const int64_t first = blockIdx.y * p.tiles_per_split;
  const int64_t last = first + p.tiles_per_split < tiles ? first + p.tiles_per_split : tiles;
  for (int64_t tile = first; tile < last; ++tile) {
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
        const auto multiply = [&](float (&d)[2][kGroups][4], const uint4* factor) {
          BK_UNROLL
          for (int q = 0; q < kGroups; ++q) {
            const uint4 f = __ldg(factor + fragment + 32 * q);
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
        multiply(h, p.factor);
        if constexpr (kFlip) {
          BK_UNROLL
          for (int i = 0; i < 4; ++i) {
            // 32 columns are one sign word, the lane's eight one byte of it.
            const uint32_t word = __shfl_sync(kAllLanes, signs.word[part + c], i, 4);
            v[i][c] = flipped(v[i][c], word >> (8 * t) & 0xFFu);
          }
          multiply(u, p.factor_e);
        }
      }
    }
  }

  PhiloxBlock signs{};
  if (kFlip) signs = sign_block(noise_key(p.noise, kSignOut), id, p.r, 0);
  float* out = p.out + blockIdx.y * p.tokens * p.r;
  const float scale = p.scale / operand_scale<T>(p.amax);
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word0 = kFlip ? __shfl_sync(kAllLanes, signs.word[0], i, 4) : 0;
    const uint32_t word1 = kFlip ? __shfl_sync(kAllLanes, signs.word[1], i, 4) : 0;
    const int64_t token = row0 + 8 * i + g;
    BK_UNROLL
    for (int q = 0; q < kGroups; ++q) {
      BK_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int k = 8 * q + 2 * t + j;
        float sum = h[i / 2][q][2 * (i % 2) + j];
        if constexpr (kFlip) {
          const float noise = u[i / 2][q][2 * (i % 2) + j];
          sum += ((k < 32 ? word0 : word1) >> (k % 32) & 1u) != 0 ? -noise : noise;
        }
        if (token < p.tokens && k < p.r) out[token * p.r + k] = scale * sum;
      }
    }
  }
}

// Eight columns of tokens first, first + 1, first + 8 and first + 9, and of those 16 further on for
// each half; tokens from `tokens` on are left as they are. The branch lies around all loads, so
// that they are issued together.
template <class T, int kHalves>
__device__ __forceinline__ void load_pairs(const T* rows, int64_t stride, int64_t first,
                                           int64_t tokens, int64_t column, int64_t columns,
                                           bool vector, Eight (&v)[kHalves][4]) {
  const bool whole = vector && column + 8 <= columns;
  const auto each = [&](const auto& load) {
    BK_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      BK_UNROLL
      for (int s = 0; s < 4; ++s) {
        const int64_t token = first + 16 * half + s % 2 + 8 * (s / 2);
        if (token < tokens) v[half][s] = load(rows + token * stride);
      }
    }
  };
  if (whole) {
    each([&](const T* row) {
      const uint4 q = load_once(reinterpret_cast<const uint4*>(row + column));
      return Eight{{q.x, q.y, q.z, q.w}};
    });
  } else {
    each([&](const T* row) { return load_8(row, column, columns, false); });
  }
}

// ---- up -----------------------------------------------------------------------------------------

struct UpArgs {
  const void* base;  // (tokens, columns) or null
  int64_t base_stride;
  void* out;  // (tokens, columns) contiguous
  int64_t tokens, columns;
  const float* factor;  // F[k][j] at k * rank_stride + j * column_stride
  const float* factor_e;
  int64_t rank_stride, column_stride;
  const uint4* low;  // kUp fragments
  const uint4* low_e;
  const float* amax_low;  // of low, of both factors
  const float* amax;
  AdapterNoise noise;
  float scale;
  int r;
  int64_t tokens_per_block;  // a multiple of 32
  bool vector;
};

constexpr int kSlab = 64;  // columns of a warp: eight lanes with eight each

// One word of sign block `signs` (drawn by the lane of that token) for this lane's eight columns of
// a 64-column slab, shifted such that they are the lowest byte. Words are chosen before and after
// the shuffle, because a lane may only offer one register.
__device__ __forceinline__ uint32_t slab_signs(uint32_t first, uint32_t second, int from, int g) {
  const uint32_t a = __shfl_sync(kAllLanes, first, from);
  const uint32_t b = __shfl_sync(kAllLanes, second, from);
  return ((g < 4 ? a : b) >> (8 * (g % 4))) & 0xFFu;
}

// One warp: 64 columns, whose factor stays in registers (16 kSteps a matrix, kSteps = R / 16), over
// the tokens of the block, 16 at a time. Computed transposed, columns as the rows of a fragment:
// tile j holds columns 8 g + 2 j and 8 g + 2 j + 1 in fragment rows g and g + 8, tokens in fragment
// columns. A lane ends up with eight neighbouring columns of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t
// + 9.
template <class T, int kSteps, bool kFlip>
__global__ void __launch_bounds__(kMmaThreads, kSteps == 1 ? 4 : 2)
    up_mma_kernel(const __grid_constant__ UpArgs p) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kMmaThreads / 32) + threadIdx.x / 32;
  const int64_t column0 = warp * kSlab, column = column0 + 8 * g;
  if (column0 >= p.columns) return;

  const float factor_scale = operand_scale<T>(p.amax);
  const float scale = p.scale / (operand_scale<T>(p.amax_low) * factor_scale);
  uint32_t factor[4][kSteps][4], factor_e[kFlip ? 4 : 1][kSteps][4];
  const auto load_factor = [&](const float* source, int j, int step, uint32_t (&out)[4]) {
    BK_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int64_t at = column + 2 * j + w % 2;
      const int k = 16 * step + 2 * t + 8 * (w / 2);
      const float* f = source + at * p.column_stride + k * p.rank_stride;
      const bool inside = at < p.columns;
      out[w] = pack_2<T>(inside && k < p.r ? factor_scale * __ldg(f) : 0.0f,
                         inside && k + 1 < p.r ? factor_scale * __ldg(f + p.rank_stride) : 0.0f);
    }
  };
  BK_UNROLL
  for (int j = 0; j < 4; ++j) {
    BK_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      load_factor(p.factor, j, step, factor[j][step]);
      if constexpr (kFlip) load_factor(p.factor_e, j, step, factor_e[j][step]);
    }
  }
  Key in_key{}, dropout_key{};
  if (kFlip) in_key = noise_key(p.noise, kSignIn);
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);

  const int64_t begin = blockIdx.y * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin; row0 < end; row0 += 32) {
    uint32_t first = 0, second = 0;  // sign words of token row0 + lane for the slab's two halves
    if (kFlip) {
      const int64_t own = row0 + lane < p.tokens ? row0 + lane : p.tokens - 1;
      const PhiloxBlock b =
          sign_block(in_key, sign_row_of(p.noise.rows, own), p.columns, column0 / kSignsPerBlock);
      const bool odd = column0 / kSlab % 2 != 0;
      first = odd ? b.word[2] : b.word[0];
      second = odd ? b.word[3] : b.word[1];
    }
    for (int half = 0; half < 2 && row0 + 16 * half < end; ++half) {
      const int64_t tile0 = row0 + 16 * half;
      const int64_t fragment = tile0 / 16 * kSteps * 32 + lane;
      Eight loaded[1][4] = {};
      Eight(&v)[4] = loaded[0];
      if (!kFlip && p.base != nullptr) {  // expand has a base, dx has noise
        load_pairs(static_cast<const T*>(p.base), p.base_stride, tile0 + 2 * t, p.tokens, column,
                   p.columns, p.vector, loaded);
      }
      uint32_t signs[kFlip ? 4 : 1] = {}, keep[4];
      BK_UNROLL
      for (int s = 0; s < 4; ++s) {
        const int from = 16 * half + 2 * t + s % 2 + 8 * (s / 2);
        if constexpr (kFlip) signs[s] = slab_signs(first, second, from, g);
        keep[s] = 0xFFu;
        if (dropout) {
          const PhiloxBlock b = dropout_block(dropout_key, dropout_row(p.noise.rows, row0 + from),
                                              p.columns, column / kDropoutPerBlock);
          keep[s] = kept_bits(b, threshold);
        }
      }
      BK_UNROLL
      for (int j = 0; j < 4; ++j) {
        // d[i]: tokens 8 i + 2 t, 8 i + 2 t + 1 of column 2 j, then of column 2 j + 1.
        float d[2][4] = {}, z[2][4] = {};
        BK_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          const uint4 l = __ldg(p.low + fragment + 32 * step);
          const uint32_t b0[2] = {l.x, l.y}, b1[2] = {l.z, l.w};
          mma_m16n8k16<T>(d[0], factor[j][step], b0);
          mma_m16n8k16<T>(d[1], factor[j][step], b1);
          if constexpr (kFlip) {
            const uint4 e = __ldg(p.low_e + fragment + 32 * step);
            const uint32_t e0[2] = {e.x, e.y}, e1[2] = {e.z, e.w};
            mma_m16n8k16<T>(z[0], factor_e[j][step], e0);
            mma_m16n8k16<T>(z[1], factor_e[j][step], e1);
          }
        }
        BK_UNROLL
        for (int s = 0; s < 4; ++s) {
          float value[2];
          BK_UNROLL
          for (int c = 0; c < 2; ++c) {
            value[c] = d[s / 2][2 * c + s % 2];
            if constexpr (kFlip) {
              const float noise = z[s / 2][2 * c + s % 2];
              value[c] += (signs[s] >> (2 * j + c) & 1u) != 0 ? -noise : noise;
            }
            if ((keep[s] >> (2 * j + c) & 1u) == 0) value[c] = 0.0f;
            value[c] *= scale;
            if (!kFlip) value[c] += unpack<T>(v[s].word[j], c);
          }
          v[s].word[j] = pack_2<T>(value[0], value[1]);
        }
      }
      BK_UNROLL
      for (int s = 0; s < 4; ++s) {
        const int64_t token = tile0 + 2 * t + s % 2 + 8 * (s / 2);
        if (token < p.tokens)
          store_8(static_cast<T*>(p.out) + token * p.columns, column, p.columns, p.vector, v[s]);
      }
    }
  }
}

// ---- outer --------------------------------------------------------------------------------------

struct OuterArgs {
  const void* x;
  int64_t stride, tokens, columns;
  const uint4* low;  // kOuter fragments
  const uint4* low_e;
  const float* amax_low;
  int steps;  // 16-rank fragments to a token tile
  AdapterNoise noise;
  float* out;    // (splits, r, columns)
  float* out_e;  // likewise
  int r;
  int64_t tokens_per_block;  // a multiple of 128
  bool vector;
};

// One block: 64 columns; a warp takes every fourth run of 32 tokens; sums stay in registers (32 for
// 16 ranks, 64 with noise). At the end the four warps add theirs up through shared memory, in a
// fixed order, which keeps partials, 4 R (8 R) bytes a column, small beside the 2 *
// tokens_per_block bytes read. kSteps: 16-rank tiles of the block, at most two; blockIdx.z counts
// further ones and reads x again.
template <class T, int kSteps, bool kFlip>
__global__ void __launch_bounds__(kMmaThreads, kSteps == 1 ? 3 : 2)
    outer_mma_kernel(const __grid_constant__ OuterArgs p) {
  constexpr int kSums = kSteps * 8 * 4 * (kFlip ? 2 : 1);
  BK_SHARED(float, exchange, [kSums][32]);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kSlab, column = column0 + 8 * g;
  const int step0 = static_cast<int>(blockIdx.z) * kSteps;
  Key in_key{}, dropout_key{};
  if (kFlip) in_key = noise_key(p.noise, kSignIn);
  const bool dropout = p.noise.dropout > 0.0;
  if (dropout) dropout_key = noise_key(p.noise, kDropout);
  const uint32_t threshold = dropout_threshold(p.noise.dropout);

  // Tile j: column 8 i + j of the slab in fragment column i.
  float sum[kFlip ? 2 : 1][kSteps][8][4] = {};
  const int64_t begin = blockIdx.y * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  for (int64_t row0 = begin + 32 * warp; row0 < end; row0 += 128) {
    Eight v[2][4] = {};
    load_pairs(static_cast<const T*>(p.x), p.stride, row0 + 2 * t, p.tokens, column, p.columns,
               p.vector, v);
    uint32_t first = 0, second = 0;
    if (kFlip) {
      const int64_t own = row0 + lane < p.tokens ? row0 + lane : p.tokens - 1;
      const PhiloxBlock b =
          sign_block(in_key, sign_row_of(p.noise.rows, own), p.columns, column0 / kSignsPerBlock);
      const bool odd = column0 / kSlab % 2 != 0;
      first = odd ? b.word[2] : b.word[0];
      second = odd ? b.word[3] : b.word[1];
    }
    BK_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (dropout) {
        BK_UNROLL
        for (int s = 0; s < 4; ++s) {
          const int64_t token = row0 + 16 * half + 2 * t + s % 2 + 8 * (s / 2);
          v[half][s] = dropped(
              v[half][s], kept_bits(dropout_block(dropout_key, dropout_row(p.noise.rows, token),
                                                  p.columns, column / kDropoutPerBlock),
                                    threshold));
        }
      }
      const int64_t fragment = ((row0 / 16 + half) * p.steps + step0) * 32 + lane;
      const auto multiply = [&](float (&d)[kSteps][8][4], const uint4* low) {
        uint32_t a[kSteps][4];
        BK_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          const uint4 l = __ldg(low + fragment + 32 * step);
          a[step][0] = l.x;
          a[step][1] = l.y;
          a[step][2] = l.z;
          a[step][3] = l.w;
        }
        BK_UNROLL
        for (int j = 0; j < 8; ++j) {
          // Pairs of tokens of one column, from pairs of columns of one token.
          const auto pair = [&](int s) {
            const uint32_t even = v[half][s].word[j / 2], odd = v[half][s + 1].word[j / 2];
            return j % 2 == 0 ? (even & 0xFFFFu) | odd << 16 : even >> 16 | (odd & 0xFFFF0000u);
          };
          const uint32_t b[2] = {pair(0), pair(2)};
          BK_UNROLL
          for (int step = 0; step < kSteps; ++step) mma_m16n8k16<T>(d[step][j], a[step], b);
        }
      };
      multiply(sum[0], p.low);
      if constexpr (kFlip) {
        BK_UNROLL
        for (int s = 0; s < 4; ++s) {
          const int from = 16 * half + 2 * t + s % 2 + 8 * (s / 2);
          v[half][s] = flipped(v[half][s], slab_signs(first, second, from, g));
        }
        multiply(sum[1], p.low_e);
      }
    }
  }

  for (int other = 1; other < 4; ++other) {
    BK_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const float value = sum[i / (kSteps * 32)][i / 32 % kSteps][i / 4 % 8][i % 4];
      if (warp == other) exchange[i][lane] = value;
    }
    __syncthreads();
    if (warp == 0) {
      BK_UNROLL
      for (int i = 0; i < kSums; ++i)
        sum[i / (kSteps * 32)][i / 32 % kSteps][i / 4 % 8][i % 4] += exchange[i][lane];
    }
    __syncthreads();
  }
  if (warp != 0) return;
  const float inverse = 1.0f / operand_scale<T>(p.amax_low);
  const int64_t split = static_cast<int64_t>(blockIdx.y) * p.r;
  BK_UNROLL
  for (int matrix = 0; matrix < (kFlip ? 2 : 1); ++matrix) {
    float* out = matrix == 0 ? p.out : p.out_e;
    BK_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      BK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = 16 * (step0 + step) + g + 8 * (i / 2);
        const int64_t at = column0 + 8 * (2 * t + i % 2);  // then eight columns on
        if (k >= p.r) continue;
        BK_UNROLL
        for (int j = 0; j < 8; ++j)
          if (at + j < p.columns)
            out[(split + k) * p.columns + at + j] = inverse * sum[matrix][step][j][i];
      }
    }
  }
}

}  // namespace
}  // namespace bayes_kernels
