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

// More parts than this are added in two steps, by as many blocks at a time as there are groups: one
// block would take longer for all of them than the products that made them.
constexpr int kOneStep = 8;

// Parts that a block adds in the first step: all of them, or about the root of their number.
BK_HD constexpr int parts_of_group(int parts) {
  if (parts <= kOneStep) return parts;
  int group = 3;
  while (group * group < parts) ++group;
  return group;
}
BK_HD constexpr int groups_of(int parts) {
  return (parts + parts_of_group(parts) - 1) / parts_of_group(parts);
}
// Tickets of a sum: of the groups, and of each one's parts.
BK_HD constexpr int tickets_of(int parts) { return parts <= kOneStep ? 1 : 1 + groups_of(parts); }

// The parts that a step adds: `count` of them from part `first` on, `stride` apart. Their sum is
// the result, or takes the place of the first.
struct Step {
  int first, count, stride;
  bool last;
};

// Called by each block of sum number `sum_of` once it has stored part number `part`; the last one
// to come of those a step needs calls add(step). In one step there is a ticket for each sum.
template <class Add>
__device__ __forceinline__ void add_parts(int* tickets, int64_t sum_of, int part, int parts,
                                          bool two_steps, const Add& add) {
  const int group = two_steps ? parts_of_group(parts) : parts;
  const int groups = two_steps ? groups_of(parts) : 1;
  tickets += sum_of * (two_steps ? tickets_of(parts) : 1);
  if (groups > 1) {
    const int mine = part / group, first = mine * group;
    const int count = parts - first < group ? parts - first : group;
    if (!last_of(tickets + 1 + mine, count)) return;
    if (count > 1) add(Step{first, count, 1, false});
  }
  if (last_of(tickets, groups > 1 ? groups : parts))
    add(Step{0, groups > 1 ? groups : parts, groups > 1 ? group : 1, true});
}

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
  int* tickets;    // tickets_of(splits) of each block of tokens
  float scale;
  bool one_step = false;  // also where there are many parts
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
__device__ void sum_rows(const RowSum& p, const Step& step, int64_t tokens, int r, int64_t begin,
                         int64_t end, int k0, const Row& row_of = {}) {
  constexpr int kQuads = K / 4;
  const int64_t count = (end - begin) * kQuads;
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
    const int64_t token = begin + at / kQuads;
    const int k = k0 + 4 * static_cast<int>(at % kQuads);
    float* from = p.partial + (step.first * tokens + token) * R + k;
    float sum[4] = {};
    for (int first = 0; first < step.count; first += kSumAhead) {
      float4 v[kSumAhead] = {};
      BK_UNROLL
      for (int i = 0; i < kSumAhead; ++i)
        if (first + i < step.count)
          v[i] = __ldcg(
              reinterpret_cast<const float4*>(from + (first + i) * step.stride * tokens * R));
      BK_UNROLL
      for (int i = 0; i < kSumAhead; ++i)
        if (first + i < step.count) add_to(sum, v[i]);
    }
    if (!step.last) {
      *reinterpret_cast<float4*>(from) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      continue;
    }
    BK_UNROLL
    for (int i = 0; i < 4; ++i)
      if (k + i < r) p.out[row_of(token) * r + k + i] = p.scale * sum[i];
  }
  if constexpr (K == R) {
    __syncthreads();
    for (int i = step.last ? 0 : 1; i < step.count; ++i)
      discard<kThreads>(p.partial + ((step.first + i * step.stride) * tokens + begin) * R + k0,
                        (end - begin) * R);
  }
}

// da and de, or da and drho, or db. Partial sums are (splits, matrices, padded columns, R).
struct Gradients {
  float* out;    // (r, columns), or (columns, r) where transposed; may be null
  float* out_e;  // likewise
  bool transposed;
  float* partial;
  int* tickets;  // tickets_of(splits) of each block of columns, for each block of ranks
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
__device__ void sum_gradients(const Gradients& p, const AdapterNoise& noise, const Step& step,
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
      float* from = p.partial + ((step.first * kMatrices + matrix) * padded + column) * R + k;
      float sum[4][4] = {};  // [column][rank]
      for (int first = 0; first < step.count; first += kAhead) {
        float4 v[kAhead][4] = {};
        BK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          BK_UNROLL
          for (int c = 0; c < 4; ++c)
            if (first + i < step.count)
              v[i][c] = __ldcg(reinterpret_cast<const float4*>(
                  from + ((first + i) * step.stride * kMatrices * padded + c) * R));
        }
        BK_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          BK_UNROLL
          for (int c = 0; c < 4; ++c)
            if (first + i < step.count) add_to(sum[c], v[i][c]);
        }
      }
      if (!step.last) {
        BK_UNROLL
        for (int c = 0; c < 4; ++c)
          *reinterpret_cast<float4*>(from + c * R) =
              make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
        continue;
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
    for (int i = step.last ? 0 : kMatrices; i < step.count * kMatrices; ++i) {
      const int64_t part = (step.first + i / kMatrices * step.stride) * kMatrices + i % kMatrices;
      discard<kThreads>(p.partial + (part * padded + column0) * R + k0, kWidth * R);
    }
  }
}

}  // namespace
}  // namespace bayes_kernels
