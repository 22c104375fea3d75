// Up to 32 classes: a warp takes a range of one example's draws; each lane has draws of its own,
// and the logits of the 4 (8 with mirror images) samples of a Philox block wait in shared memory
// for their normaliser. A block has up to 8 ranges, which are all of a thousand draws: it prepares
// the example and ends its sums as well.
#pragma once

#include "predict_row.cuh"

namespace bayes_kernels {
namespace {

constexpr int kSmall = 32;  // classes up to which a lane holds whole samples
constexpr int64_t kSmallRanges = 128;
constexpr int64_t kSmallBytes = 40 << 10;  // of shared memory for several warps

// Shared memory of a warp: every lane has a column of its own in each array.
BK_HD int64_t small_warp_bytes(const PredictParams& p) {
  const int64_t arrays = kGroup * (p.antithetic ? 2 : 1) + (p.standard_error != nullptr ? 4 : 2);
  return p.classes * arrays * kWarp * static_cast<int64_t>(sizeof(float));
}
BK_HD int64_t small_warps(const PredictParams& p, int64_t ranges) {
  int64_t warps = kSmallBytes / small_warp_bytes(p);
  warps = warps < 1 ? 1 : warps > kMaxWarps ? kMaxWarps : warps;
  return warps < ranges ? warps : ranges;
}

template <int signs>
__device__ __forceinline__ void sample_range(const Arguments& a, int mode, int64_t row,
                                             int64_t range, const float* l, const float* weight,
                                             const float* scale, float* shared) {
  constexpr int rows = kGroup * signs;
  const PredictParams& p = a.p;
  const int n = static_cast<int>(p.classes), lane = static_cast<int>(threadIdx.x) % kWarp;
  const Key key = logit_key(p, row);
  const bool squared = p.standard_error != nullptr;
  float* tile = shared + lane;                    // class c, sample k: (c rows + k) kWarp
  float* sum = shared + n * rows * kWarp + lane;  // class c: c kWarp
  float* shift = sum + n * kWarp;
  float* mean = shift + n * kWarp;  // these two where `squared`; in units of the weight if bounded
  float* squares = mean + n * kWarp;
  for (int c = 0; c < n; ++c) {
    sum[c * kWarp] = 0.0f;
    shift[c * kWarp] = kLowest;
    if (squared) mean[c * kWarp] = squares[c * kWarp] = 0.0f;
  }
  int count = 0;  // draws of this lane
  // Takes p = unit x of one more draw of a class. Welford, "Note on a method for calculating
  // corrected sums of squares and products", 1962.
  const auto add_draw = [&](int c, float unit, float x, int number) {
    const float before = x - mean[c * kWarp];
    mean[c * kWarp] += before / static_cast<float>(number);
    const float after = x - mean[c * kWarp];
    squares[c * kWarp] = fmaf(unit * before, unit * after, squares[c * kWarp]);
  };
  const int64_t draws = draws_of(p), begin = range * a.at.range_groups;
  const int64_t end =
      begin + a.at.range_groups < a.at.groups ? begin + a.at.range_groups : a.at.groups;
  double entropy = 0;
  for (int64_t group = begin + lane; group < end; group += kWarp) {
    for (int c = 0; c < n; ++c) {
      float eps[4];
      normal_block(key, static_cast<uint64_t>(group * n + c), eps);
      const float factor = p.full ? 1.0f : scale[c];
      BK_UNROLL
      for (int k = 0; k < kGroup; ++k) tile[(c * rows + k) * kWarp] = eps[k] * factor;
    }
    for (int c = p.full ? n - 1 : -1; c >= 0; --c) {  // in place: row c needs normals 0 to c only
      float x[kGroup] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int j = 0; j <= c; ++j) {
        const float factor = scale[c * n + j];
        BK_UNROLL
        for (int k = 0; k < kGroup; ++k) x[k] = fmaf(factor, tile[(j * rows + k) * kWarp], x[k]);
      }
      BK_UNROLL
      for (int k = 0; k < kGroup; ++k) tile[(c * rows + k) * kWarp] = x[k];
    }
    const int left =
        draws - group * kGroup < kGroup ? static_cast<int>(draws - group * kGroup) : kGroup;
    float normaliser[rows], weighted[rows], top[rows];
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      normaliser[k] = weighted[k] = 0.0f;
      top[k] = kLowest;
    }
    if (mode == kBounded) {
      for (int c = 0; c < n; ++c) {
        const float w = weight[c], log_w = l[c];
        BK_UNROLL
        for (int k = rows - 1; k >= 0; --k) {  // mirror images first: they need the noise
          const float drawn = tile[(c * rows + k % kGroup) * kWarp];
          const float noise = k < kGroup ? drawn : -drawn;
          const float e = bk_exp2(noise);
          tile[(c * rows + k) * kWarp] = e;
          normaliser[k] = fmaf(w, e, normaliser[k]);
          weighted[k] = fmaf(w * e, log_w + noise, weighted[k]);
        }
      }
      BK_UNROLL
      for (int k = 0; k < rows; ++k) {
        const bool exists = k % kGroup < left;
        const float inverse = 1.0f / normaliser[k];
        if (exists)
          entropy += static_cast<double>(logf(normaliser[k])) -
                     kLn2 * static_cast<double>(weighted[k] * inverse);
        normaliser[k] = exists ? inverse : 0.0f;
      }
      for (int c = 0; c < n; ++c) {
        const float w = weight[c];
        float total = 0.0f;
        BK_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          float ratio = tile[(c * rows + k) * kWarp] * normaliser[k];
          if (signs == 2)
            ratio += tile[(c * rows + k + rows - kGroup) * kWarp] * normaliser[k + rows - kGroup];
          total += ratio;
          if (squared && k < left) add_draw(c, w, ratio / signs, count + k + 1);
        }
        sum[c * kWarp] += total;
      }
      count += left;
      continue;
    }
    for (int c = 0; c < n; ++c) {
      BK_UNROLL
      for (int k = rows - 1; k >= 0; --k) {  // mirror images first: they need the noise
        const float noise = tile[(c * rows + k % kGroup) * kWarp];
        const float z = k < kGroup ? l[c] + noise : l[c] - noise;
        tile[(c * rows + k) * kWarp] = z;
        top[k] = z > top[k] ? z : top[k];
      }
    }
    for (int c = 0; c < n; ++c) {
      BK_UNROLL
      for (int k = 0; k < rows; ++k) {
        const float z = tile[(c * rows + k) * kWarp] - top[k];
        const float e = bk_exp2(z);
        normaliser[k] += e;
        weighted[k] = fmaf(e, z, weighted[k]);
      }
    }
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      const float log_sum = log2f(normaliser[k]);
      if (k % kGroup < left)
        entropy += kLn2 * static_cast<double>(log_sum - weighted[k] / normaliser[k]);
      normaliser[k] = top[k] + log_sum;
    }
    for (int c = 0; c < n; ++c) {
      for (int k = 0; k < left; ++k) {
        float probability = 0.0f;
        for (int sign = 0; sign < signs; ++sign) {
          const int at = k + sign * kGroup;
          float log_normaliser = normaliser[0];
          BK_UNROLL
          for (int i = 1; i < rows; ++i) log_normaliser = i == at ? normaliser[i] : log_normaliser;
          const float log_p = tile[(c * rows + at) * kWarp] - log_normaliser;
          add_exponential(log_p, shift + c * kWarp, sum + c * kWarp);
          probability += bk_exp2(log_p);
        }
        if (squared) add_draw(c, 1.0f, probability / signs, count + k + 1);
      }
    }
    count += left;
  }
  const int64_t out = (row * a.at.ranges + range) * n;
  for (int c = 0; c < n; ++c) {
    float most = shift[c * kWarp];
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, most, lanes);
      most = other > most ? other : most;
    }
    double total = static_cast<double>(sum[c * kWarp]);
    if (mode == kFree) total *= static_cast<double>(bk_exp2(shift[c * kWarp] - most));
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      total += __shfl_xor_sync(kAllLanes, total, lanes);
    if (lane == 0) {
      a.at.sum[out + c] = total;
      if (mode == kFree) a.at.shift[out + c] = most;
    }
    if (!squared) continue;
    Moments all{static_cast<double>(count), static_cast<double>(mean[c * kWarp]),
                static_cast<double>(squares[c * kWarp])};
    if (mode == kBounded) all.mean *= static_cast<double>(weight[c]);
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const Moments other{__shfl_xor_sync(kAllLanes, all.n, lanes),
                          __shfl_xor_sync(kAllLanes, all.mean, lanes),
                          __shfl_xor_sync(kAllLanes, all.squares, lanes)};
      all = merged(all, other);
    }
    if (lane != 0) continue;
    a.at.mean[out + c] = all.mean;
    a.at.squares[out + c] = all.squares;
  }
  BK_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    entropy += __shfl_xor_sync(kAllLanes, entropy, lanes);
  if (lane == 0) a.at.entropy[row * a.at.ranges + range] = entropy;
}

// A block for up to kMaxWarps ranges of an example; the last one of the example ends it.
template <int signs>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) small_kernel(Arguments a) {
  BK_DYNAMIC_SHARED(float, shared);
  BK_SHARED(float, l, [kSmall]);
  BK_SHARED(float, weight, [kSmall]);
  BK_SHARED(float, scale, [kSmall * kSmall]);
  const PredictParams& p = a.p;
  const int64_t warps = static_cast<int>(blockDim.x) / kWarp, warp = threadIdx.x / kWarp;
  const int64_t blocks = ceil_div(a.at.ranges, warps), row = blockIdx.x / blocks;
  const int64_t range = (blockIdx.x - row * blocks) * warps + warp;
  const Row of = prepare_row(p, row, l, scale, reinterpret_cast<double*>(shared));
  if (threadIdx.x < p.classes) weight[threadIdx.x] = bk_exp2(l[threadIdx.x]);
  __syncthreads();
  if (of.mode != kInvalid && range < a.at.ranges)
    sample_range<signs>(a, of.mode, row, range, l, weight, scale,
                        shared + warp * small_warp_bytes(p) / static_cast<int>(sizeof(float)));
  if (last_of(a.at.tickets + row, static_cast<int>(blocks))) finish_row(a, row, of);
}

}  // namespace
}  // namespace bayes_kernels
