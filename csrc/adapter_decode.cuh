// Whole adapters for few tokens, in one launch: several that share x (q, k and v), each over
// splits x slices blocks.
//
// A split takes some columns of x for all ranks and tokens, and draws its part of E: a warp has 128
// columns of one rank or two, so that a thread draws one or two blocks of four normals while it
// waits for the factors. A slice is a part of the output's columns: each slice has splits of its
// own, whose last block, found by a ticket, adds up h and expands it. So what a block writes is
// read by the blocks of its slice alone, and h never goes to memory unless it is asked for.
//
// Sums have the order of the kernels for more tokens (adapter_fma.cuh), whatever the number of
// splits, slices and adapters: columns of 128 by halving over the lanes, 16 of these one after
// another, and then the sums of 16.
#pragma once

#include "adapter_fma.cuh"
#include "own_tickets.cuh"

namespace bayes_kernels {
namespace {

constexpr int kDecodeThreads = 256, kDecodeWarps = kDecodeThreads / 32;
constexpr int kDecodeChunks = 4;    // runs of 128 columns that a block has at most
constexpr int kChunksOfGroup = 16;  // whose sums are added one after another

struct DecodeJob {
  const float *a, *rho, *b;
  const void* base;  // or null
  int64_t base_stride;
  void* y;
  float* h;        // (tokens, r), or null
  float* partial;  // (slices, chunks, r, TB)
  int64_t m, stream;
  int64_t columns;  // of a slice
  int r, splits, chunks_per_split, first_block, first_ticket;
  float scaling;
  DType dtype;  // of base and y
  bool row_constant, vector_a, vector_b;
};

struct DecodeArgs {
  DecodeJob job[kMaxDecodeItems];
  int jobs;
  DType dtype;
  const void* x;
  int64_t x_stride, n;
  int tokens;
  AdapterNoise noise;  // without its stream
  float keep_scale;
  Std std;
  int ticket_slot;
  int* tickets;  // where there is no slot
  bool vector_x;
};

// The factors of one warp: four columns a lane of K ranks.
template <int K, bool kNoise>
struct DecodeFactors {
  float a[K][4], e[kNoise ? K : 1][4];

  __device__ __forceinline__ void load(const DecodeArgs& p, const DecodeJob& job, Key normals,
                                       int k0, int64_t column) {
    const auto row = [&](const float* from, float (&out)[4]) {
      if (job.vector_a && column + 4 <= p.n) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(from));
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
      } else {
        BK_UNROLL
        for (int i = 0; i < 4; ++i) out[i] = column + i < p.n ? __ldg(from + i) : 0.0f;
      }
    };
    BK_UNROLL
    for (int i = 0; i < K; ++i) {
      BK_UNROLL
      for (int j = 0; j < 4; ++j) a[i][j] = e[kNoise ? i : 0][j] = 0.0f;
      if (k0 + i >= job.r || column >= p.n) continue;
      row(job.a + (k0 + i) * p.n + column, a[i]);
      if constexpr (kNoise) {
        if (job.row_constant)
          e[i][0] = e[i][1] = e[i][2] = e[i][3] = __ldg(job.rho + k0 + i);
        else
          row(job.rho + (k0 + i) * p.n + column, e[i]);
      }
    }
    if constexpr (kNoise) {
      BK_UNROLL
      for (int i = 0; i < K; ++i) {
        if (k0 + i >= job.r || column >= p.n) continue;
        float eps[4];
        four_normals(normals, (k0 + i) * p.n + column, eps);
        BK_UNROLL
        for (int j = 0; j < 4; ++j)
          e[i][j] = column + j < p.n ? std_of<float>(p.std, e[i][j]) * eps[j] : 0.0f;
      }
    }
  }
};

// TB: tokens rounded up, K: ranks of a warp at a time.
template <int TB, int K, bool kNoise>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_kernel(const __grid_constant__ DecodeArgs p) {
  constexpr int kStages = TB == 16 ? 2 : 1;  // of four tokens by four columns of x, a thread
  BK_DYNAMIC_SHARED(float, x_tile);          // (TB, columns of the block), and then sums
  BK_SHARED(uint32_t, signs, [kNoise ? TB : 1][kDecodeChunks][4]);
  BK_SHARED(uint32_t, rank_signs, [kNoise ? TB : 1][2]);
  BK_SHARED(float, low, [kMaxFusedRank * TB]);  // h, (r, TB)
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int block = static_cast<int>(blockIdx.x);
  int at = 0;
  while (at + 1 < p.jobs && block >= p.job[at + 1].first_block) ++at;
  const DecodeJob& job = p.job[at];
  const int split = (block - job.first_block) % job.splits;
  const int slice = (block - job.first_block) / job.splits;
  const int all = static_cast<int>(ceil_div(p.n, kSignsPerBlock));
  const int chunk0 = split * job.chunks_per_split;
  const int chunks = all - chunk0 < job.chunks_per_split ? all - chunk0 : job.chunks_per_split;
  const int64_t column0 = static_cast<int64_t>(chunk0) * kSignsPerBlock;
  const int pitch = job.chunks_per_split * kSignsPerBlock;
  float* const sums = x_tile + TB * pitch;  // (chunks or groups of them, r, TB)
  const int values = job.r * TB;
  AdapterNoise noise = p.noise;
  noise.stream = job.stream;

  // x on its way, then the factors on theirs, then normals while both come.
  float x[kStages][kFmaAhead][4];
  const int quads = chunks * (kSignsPerBlock / 4);
  BK_UNROLL
  for (int s = 0; s < kStages; ++s) {
    const int i = thread + s * kDecodeThreads, t = i / quads * kFmaAhead;
    const int64_t column = column0 + 4 * (i % quads);
    if (t < p.tokens)
      load_ahead(
          p.dtype, p.x, column, [&](int u) { return (t + u) * p.x_stride; }, p.tokens - t,
          p.n - column, p.vector_x, x[s]);
  }
  Key normals{};
  if constexpr (kNoise) normals = noise_key(noise, kNormal);
  const int units = chunks * static_cast<int>(ceil_div(job.r, K));
  DecodeFactors<K, kNoise> factors;
  const auto load = [&](int unit) {
    factors.load(p, job, normals, unit / chunks * K,
                 column0 + unit % chunks * kSignsPerBlock + 4 * lane);
  };
  if (warp < units) load(warp);
  if constexpr (kNoise) {
    for (int i = thread; i < p.tokens * chunks; i += kDecodeThreads) {
      const int t = i / chunks, c = i % chunks;
      const PhiloxBlock b =
          sign_block(noise_key(noise, kSignIn), sign_row_of(noise.rows, t), p.n, chunk0 + c);
      BK_UNROLL
      for (int w = 0; w < 4; ++w) signs[t][c][w] = b.word[w];
    }
    const int t = kDecodeThreads - 1 - thread;  // other warps
    if (t < p.tokens) {
      const PhiloxBlock b =
          sign_block(noise_key(noise, kSignOut), sign_row_of(noise.rows, t), job.r, 0);
      rank_signs[t][0] = b.word[0];
      rank_signs[t][1] = b.word[1];
    }
  }
  const bool dropout = noise.dropout > 0.0;
  Key dropout_key{};
  if (dropout) dropout_key = noise_key(noise, kDropout);
  BK_UNROLL
  for (int s = 0; s < kStages; ++s) {
    const int i = thread + s * kDecodeThreads, t0 = i / quads * kFmaAhead, quad = i % quads;
    BK_UNROLL
    for (int u = 0; u < kFmaAhead; ++u) {
      if (t0 + u >= p.tokens) break;
      if (dropout) {
        const PhiloxBlock b = dropout_block(dropout_key, dropout_row(noise.rows, t0 + u), p.n,
                                            (column0 + 4 * quad) / kDropoutPerBlock);
        const uint32_t keep = kept_bits(b, dropout_threshold(noise.dropout)) >> (4 * (quad % 2));
        BK_UNROLL
        for (int j = 0; j < 4; ++j)
          x[s][u][j] = (keep >> j & 1u) != 0 ? p.keep_scale * x[s][u][j] : 0.0f;
      }
      *reinterpret_cast<float4*>(x_tile + (t0 + u) * pitch + 4 * quad) =
          make_float4(x[s][u][0], x[s][u][1], x[s][u][2], x[s][u][3]);
    }
  }
  __syncthreads();

  for (int unit = warp; unit < units; unit += kDecodeWarps) {
    const int c = unit % chunks, k0 = unit / chunks * K;
    float sum[K * TB];
    BK_UNROLL
    for (int t = 0; t < TB; ++t) {
      float v[4] = {};
      uint32_t negative = 0;
      if (t < p.tokens) {
        const float4 four =
            *reinterpret_cast<const float4*>(x_tile + t * pitch + c * kSignsPerBlock + 4 * lane);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
        if constexpr (kNoise) negative = signs[t][c][lane / 8] >> (4 * (lane % 8));
      }
      BK_UNROLL
      for (int i = 0; i < K; ++i) {
        float& to = sum[i * TB + t];
        to = 0.0f;
        BK_UNROLL
        for (int j = 0; j < 4; ++j) to = fmaf(factors.a[i][j], v[j], to);
      }
      if constexpr (kNoise) {
        BK_UNROLL
        for (int j = 0; j < 4; ++j) v[j] = (negative >> j & 1u) != 0 ? -v[j] : v[j];
        BK_UNROLL
        for (int i = 0; i < K; ++i) {
          float drawn = 0.0f;
          BK_UNROLL
          for (int j = 0; j < 4; ++j) drawn = fmaf(factors.e[i][j], v[j], drawn);
          const int k = k0 + i;
          const bool minus = t < p.tokens && (rank_signs[t][k / 32] >> (k % 32) & 1u) != 0;
          sum[i * TB + t] += minus ? -drawn : drawn;
        }
      }
    }
    if (unit + kDecodeWarps < units) load(unit + kDecodeWarps);
    fold_lanes<K * TB / 2, 16>(sum, lane);
    constexpr int kShare = 32 / (K * TB);  // lanes that have the same sum
    const int i = lane / kShare / TB, t = lane / kShare % TB;
    if (lane % kShare == 0 && k0 + i < job.r) {
      const int to = (k0 + i) * TB + t;
      if (job.splits == 1)
        sums[c * values + to] = sum[0];
      else
        job.partial[(static_cast<int64_t>(slice) * all + chunk0 + c) * values + to] = sum[0];
    }
  }

  int parts = chunks;
  if (job.splits > 1) {
    const int ticket = job.first_ticket + slice;
    if (!last_of(p.ticket_slot < 0 ? p.tickets + ticket : &own_tickets[p.ticket_slot][ticket],
                 job.splits))
      return;
    parts = static_cast<int>(ceil_div(all, kChunksOfGroup));
    for (int i = thread; i < parts * values; i += kDecodeThreads) {
      const int first = i / values * kChunksOfGroup;
      const float* from =
          job.partial + (static_cast<int64_t>(slice) * all + first) * values + i % values;
      float v[kChunksOfGroup] = {}, sum = 0.0f;
      BK_UNROLL
      for (int c = 0; c < kChunksOfGroup; ++c)
        if (first + c < all) v[c] = __ldcg(from + c * values);
      BK_UNROLL
      for (int c = 0; c < kChunksOfGroup; ++c)
        if (first + c < all) sum += v[c];
      sums[i] = sum;
    }
  }
  __syncthreads();
  for (int i = thread; i < static_cast<int>(ceil_div(values, 8 * TB)) * 8 * TB;
       i += kDecodeThreads) {
    float sum = 0.0f;
    for (int part = 0; i < values && part < parts; ++part) sum += sums[part * values + i];
    low[i] = sum;
    if (job.h != nullptr && slice == 0 && i < values && i % TB < p.tokens)
      job.h[i % TB * job.r + i / TB] = sum;
  }
  __syncthreads();

  constexpr int kColumns = TB == 16 ? 2 : 4;  // of a thread, at a time
  const int64_t end = (slice + 1) * job.columns < job.m ? (slice + 1) * job.columns : job.m;
  for (int64_t first = slice * job.columns + thread; first < end;
       first += kColumns * kDecodeThreads) {
    float add[kColumns][TB] = {}, sum[kColumns][TB] = {};
    if (job.base != nullptr) {
      with_element(job.dtype, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(job.base) + first;
        BK_UNROLL
        for (int u = 0; u < kColumns; ++u) {
          BK_UNROLL
          for (int t = 0; t < TB; ++t)
            if (t < p.tokens && first + u * kDecodeThreads < end)
              add[u][t] = static_cast<float>(from[t * job.base_stride + u * kDecodeThreads]);
        }
      });
    }
    for (int k0 = 0; k0 < job.r; k0 += 8) {
      float b[kColumns][8] = {};
      BK_UNROLL
      for (int u = 0; u < kColumns; ++u) {
        const int64_t column = first + u * kDecodeThreads;
        if (column >= end) continue;
        const float* from = job.b + column * job.r + k0;
        if (job.vector_b) {
          BK_UNROLL
          for (int half = 0; half < 8; half += 4) {
            if (k0 + half >= job.r) continue;
            const float4 v = __ldg(reinterpret_cast<const float4*>(from + half));
            b[u][half] = v.x, b[u][half + 1] = v.y, b[u][half + 2] = v.z, b[u][half + 3] = v.w;
          }
        } else {
          BK_UNROLL
          for (int k = 0; k < 8; ++k)
            if (k0 + k < job.r) b[u][k] = __ldg(from + k);
        }
      }
      BK_UNROLL
      for (int k = 0; k < 8; ++k) {
        BK_UNROLL
        for (int t = 0; t < TB; ++t) {
          const float l = low[(k0 + k) * TB + t];
          BK_UNROLL
          for (int u = 0; u < kColumns; ++u) sum[u][t] = fmaf(b[u][k], l, sum[u][t]);
        }
      }
    }
    BK_UNROLL
    for (int u = 0; u < kColumns; ++u) {
      const int64_t column = first + u * kDecodeThreads;
      BK_UNROLL
      for (int t = 0; t < TB; ++t) {
        if (t >= p.tokens || column >= end) continue;
        float value = sum[u][t] * job.scaling;
        value += add[u][t];
        store_1(job.dtype, job.y, t * job.m + column, value);
      }
    }
  }
}

}  // namespace
}  // namespace bayes_kernels
