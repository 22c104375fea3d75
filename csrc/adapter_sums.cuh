// Partial sums of the adapter kernels. A block stores its own, and the last block of a group, found
// by an integer ticket, adds all of the group in order of their splits: no launch more, no float
// atomics, and the same bits whichever block comes last.
#pragma once

#include "adapter_groups.cuh"
#include "adapter_noise.cuh"
#include "ticket.cuh"

namespace bayes_kernels {
namespace {

constexpr int kSumAhead = 8;  // partial sums loaded before the first is added

__device__ __forceinline__ void add_to(float (&sum)[4], const float4& v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}

// Says of partial sums, once the block has read them, that nobody needs them: dirty lines would
// otherwise go to memory one day. Only lines that lie within `count` numbers; by the whole block,
// after a barrier.
template <int kThreads>
__device__ void discard(float* from, int64_t count) {
  constexpr uintptr_t kLine = 128;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(from) + kLine - 1) / kLine * kLine;
  const uintptr_t end = reinterpret_cast<uintptr_t>(from + count) / kLine * kLine;
  for (uintptr_t at = begin + threadIdx.x * kLine; at < end; at += kThreads * kLine)
    bk_discard_128(reinterpret_cast<void*>(at));
}

// h or dh: rows of (tokens, r). Partial sums are (splits, tokens, R).
struct RowSum {
  float* out;
  float* partial;  // null with one split
  int* tickets;    // of each block of tokens
  float scale;
};

// Stores two neighbouring ranks of a token: the result where there is one split, else its part.
template <int R, class Row = RowOf<false>>
__device__ __forceinline__ void store_part(const RowSum& p, int64_t split, int64_t tokens, int r,
                                           int64_t token, int k, float first, float second,
                                           const Row& row_of = {}) {
  if (token >= tokens) return;
  if (p.partial != nullptr) {
    *reinterpret_cast<float2*>(p.partial + (split * tokens + token) * R + k) =
        make_float2(first, second);
    return;
  }
  const int64_t row = row_of(token);
  if (k < r) p.out[row * r + k] = p.scale * first;
  if (k + 1 < r) p.out[row * r + k + 1] = p.scale * second;
}

// Ranks k0 to k0 + K - 1 of tokens begin to end - 1.
template <int R, int K, int kThreads, class Row = RowOf<false>>
__device__ void sum_rows(const RowSum& p, int splits, int64_t tokens, int r, int64_t begin,
                         int64_t end, int k0, const Row& row_of = {}) {
  constexpr int kQuads = K / 4;
  const int64_t count = (end - begin) * kQuads;
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
    const int64_t token = begin + at / kQuads;
    const int k = k0 + 4 * static_cast<int>(at % kQuads);
    const float* from = p.partial + token * R + k;
    float sum[4] = {};
    for (int first = 0; first < splits; first += kSumAhead) {
      float4 v[kSumAhead] = {};
      BK_UNROLL
      for (int i = 0; i < kSumAhead; ++i)
        if (first + i < splits)
          v[i] = __ldcg(reinterpret_cast<const float4*>(from + (first + i) * tokens * R));
      BK_UNROLL
      for (int i = 0; i < kSumAhead; ++i)
        if (first + i < splits) add_to(sum, v[i]);
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i)
      if (k + i < r) p.out[row_of(token) * r + k + i] = p.scale * sum[i];
  }
  if constexpr (K == R) {
    __syncthreads();
    for (int split = 0; split < splits; ++split)
      discard<kThreads>(p.partial + (split * tokens + begin) * R + k0, (end - begin) * R);
  }
}

// da and de, or da and drho, or db. Partial sums are (splits, matrices, padded columns, R).
struct Gradients {
  float* out;    // (r, columns), or (columns, r) where transposed; may be null
  float* out_e;  // likewise
  bool transposed;
  float* partial;
  int* tickets;  // of each block of columns, for each block of ranks
  float scale;
  const float* rho;  // (r, columns): out_e is de . eps . std'(rho); else null
  Std std;
};

// Normals first to first + 3 of a subkey.
__device__ __forceinline__ void four_normals(Key sub, int64_t first, float (&eps)[4]) {
  float v[8] = {};
  const int skip = static_cast<int>(first % 4);
  float block[4];
  normal_block(sub, static_cast<uint64_t>(first / 4), block);
  BK_UNROLL
  for (int i = 0; i < 4; ++i) v[i] = block[i];
  if (skip != 0) {
    normal_block(sub, static_cast<uint64_t>(first / 4 + 1), block);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) v[4 + i] = block[i];
  }
  if ((skip & 1) != 0) {
    BK_UNROLL
    for (int i = 0; i < 7; ++i) v[i] = v[i + 1];
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i) eps[i] = (skip & 2) != 0 ? v[i + 2] : v[i];
}

// Four neighbours, of which `count` exist.
__device__ __forceinline__ void store_4(float* to, int64_t count, float a, float b, float c,
                                        float d) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
    return;
  }
  to[0] = a;
  if (count > 1) to[1] = b;
  if (count > 2) to[2] = c;
  if (count > 3) to[3] = d;
}

// Ranks k0 to k0 + K - 1 of columns column0 to column0 + kWidth - 1. A thread adds four columns of
// four ranks at a time.
template <int R, int K, int kMatrices, int kWidth, int kThreads>
__device__ void sum_gradients(const Gradients& p, const AdapterNoise& noise, int splits,
                              int64_t padded, int64_t columns, int r, int64_t column0, int k0,
                              float scale) {
  constexpr int kQuads = K / 4, kAhead = kSumAhead / 2;
  Key sub{};
  if (kMatrices == 2 && p.rho != nullptr) sub = noise_key(noise, kNormal);
  BK_ROLLED
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    float* out = matrix == 0 ? p.out : p.out_e;
    if (out == nullptr) continue;
    for (int at = static_cast<int>(threadIdx.x); at < kWidth / 4 * kQuads; at += kThreads) {
      const int64_t column = column0 + 4 * (at / kQuads);
      const int k = k0 + 4 * (at % kQuads);
      if (column >= columns || k >= r) continue;
      const float* from = p.partial + (matrix * padded + column) * R + k;
      float sum[4][4] = {};  // [column][rank]
      for (int first = 0; first < splits; first += kAhead) {
        float4 v[kAhead][4] = {};
        BK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          BK_UNROLL
          for (int c = 0; c < 4; ++c)
            if (first + i < splits)
              v[i][c] = __ldcg(reinterpret_cast<const float4*>(
                  from + ((first + i) * kMatrices * padded + c) * R));
        }
        BK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          BK_UNROLL
          for (int c = 0; c < 4; ++c)
            if (first + i < splits) add_to(sum[c], v[i][c]);
        }
      }
      BK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (k + i >= r) continue;
        const int64_t index = (k + i) * columns + column;
        float eps[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (kMatrices == 2 && matrix == 1 && p.rho != nullptr) four_normals(sub, index, eps);
        BK_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (column + c >= columns) continue;
          sum[c][i] *= scale;
          if (kMatrices == 2 && matrix == 1 && p.rho != nullptr)
            sum[c][i] *= eps[c] * std_derivative<float>(p.std, __ldg(p.rho + index + c));
        }
      }
      BK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (p.transposed) {
          if (column + i < columns)
            store_4(out + (column + i) * r + k, r - k, sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        } else if (k + i < r) {
          store_4(out + (k + i) * columns + column, columns - column, sum[0][i], sum[1][i],
                  sum[2][i], sum[3][i]);
        }
      }
    }
  }
  if constexpr (K == R) {
    __syncthreads();
    for (int part = 0; part < splits * kMatrices; ++part)
      discard<kThreads>(p.partial + (part * padded + column0) * R + k0, kWidth * R);
  }
}

}  // namespace
}  // namespace bayes_kernels
