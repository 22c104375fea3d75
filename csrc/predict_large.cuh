// More than 32 classes, with a thread for each class and the samples of a Philox block in
// registers.
//
// Up to kHeld classes a block takes a range of an example's draws and holds their noise in shared
// memory, from the sum over classes to the average over samples: it is drawn once, and the last
// block of an example ends it. Beyond, one launch makes the normaliser of every sample, and one
// draws the same noise again and averages.
#pragma once

#include "predict_row.cuh"

namespace bayes_kernels {
namespace {

constexpr int kRowThreads = 256;   // that prepare and finish many classes
constexpr int kClassThreads = 64;  // classes of a block that averages
constexpr int64_t kHeld = 2048;
constexpr int64_t kHeldRanges = 16, kHeldRange = 4;  // ranges at most; groups in one, at least
constexpr int64_t kLargeRanges = 16, kLargeRange = 64;

// Numbers of shared memory for each class: four of noise, l, scale, sum, exponent; three of
// moments.
BK_HD int64_t held_bytes(const PredictParams& p) {
  const int64_t numbers = kGroup + 4 + (p.standard_error != nullptr ? 3 : 0);
  return p.classes * numbers * static_cast<int64_t>(sizeof(float));
}
// Two classes to a thread, or more.
BK_HD int64_t held_threads(const PredictParams& p) {
  const int64_t threads = ceil_div(p.classes, 2 * kWarp) * kWarp;
  return threads < kMaxWarps * kWarp ? threads : kMaxWarps * kWarp;
}

// One class in one range of draws: sums over samples, fp32 for kFlush groups and then fp64.
struct ClassSums {
  float sum = 0.0f, shift = kLowest;
  float center = 0.0f, apart = 0.0f, squares = 0.0f;  // of the first draw; sums about it

  // The samples of one Philox block. noise and log_normaliser are exponents of base 2, the latter
  // +inf for a sample that does not exist.
  template <int signs>
  __device__ __forceinline__ void add(int mode, float l, const float (&noise)[kGroup],
                                      const float (&log_normaliser)[kGroup * signs], int left,
                                      bool first, bool squared, float weight) {
    if (mode == kBounded && !squared) {
      BK_UNROLL
      for (int k = 0; k < kGroup * signs; ++k)
        sum += bk_exp2((k < kGroup ? noise[k % kGroup] : -noise[k % kGroup]) - log_normaliser[k]);
      return;
    }
    BK_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      if (k >= left) break;
      float d = 0.0f;
      BK_UNROLL
      for (int sign = 0; sign < signs; ++sign) {
        const float x = (sign == 0 ? noise[k] : -noise[k]) - log_normaliser[k + sign * kGroup];
        if (mode == kBounded) {
          const float ratio = bk_exp2(x);
          sum += ratio;
          d += ratio;
        } else {
          add_exponential(l + x, &shift, &sum);
          d += bk_exp2(l + x);
        }
      }
      if (!squared) continue;
      d /= signs;
      if (first && k == 0) center = d;
      d = weight * (d - center);
      apart += d;
      squares = fmaf(d, d, squares);
    }
  }
  // Moves the sums to those in fp64; in free mode the sum stays with its exponent.
  __device__ __forceinline__ void flush(int mode, double* total, double* total_apart,
                                        double* total_squares) {
    *total_apart += static_cast<double>(apart);
    *total_squares += static_cast<double>(squares);
    apart = squares = 0.0f;
    if (mode != kBounded) return;
    *total += static_cast<double>(sum);
    sum = 0.0f;
  }
  __device__ __forceinline__ void store(const Arguments& a, int mode, int64_t out, int64_t count,
                                        float weight, double total, double total_apart,
                                        double total_squares) const {
    a.at.sum[out] = total + static_cast<double>(sum);
    if (mode == kFree) a.at.shift[out] = shift;
    if (a.p.standard_error == nullptr) return;
    const Moments all = moments_about(
        static_cast<double>(weight) * static_cast<double>(center), static_cast<double>(count),
        total_apart + static_cast<double>(apart), total_squares + static_cast<double>(squares));
    a.at.mean[out] = all.mean;
    a.at.squares[out] = all.squares;
  }
};

// From sums of 2^(z - top) and of (z - top) 2^(z - top): logarithms of the normalisers, and the sum
// of the entropies of the samples that exist.
template <int signs>
__device__ __forceinline__ double normalise(const float (&sums)[2 * kGroup * signs], int left,
                                            float (&top)[kGroup * signs]) {
  constexpr int rows = kGroup * signs;
  double entropy = 0;
  BK_UNROLL
  for (int k = 0; k < rows; ++k) {
    const bool exists = k % kGroup < left;
    const float log_sum = log2f(sums[k]);
    if (exists) entropy += kLn2 * static_cast<double>(log_sum - sums[rows + k] / sums[k]);
    top[k] = exists ? top[k] + log_sum : HUGE_VALF;
  }
  return entropy;
}

__device__ __forceinline__ int left_of(int64_t draws, int64_t group) {
  const int64_t left = draws - group * kGroup;
  return left < kGroup ? static_cast<int>(left) : kGroup;
}

// A block for one range of an example's draws.
template <int signs>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) held_kernel(Arguments a) {
  constexpr int rows = kGroup * signs;
  BK_DYNAMIC_SHARED(float, shared);
  const PredictParams& p = a.p;
  const int n = static_cast<int>(p.classes), threads = static_cast<int>(blockDim.x);
  const int64_t row = blockIdx.x / a.at.ranges, range = blockIdx.x - row * a.at.ranges;
  const bool squared = p.standard_error != nullptr;
  float4* noise = reinterpret_cast<float4*>(shared);
  float *l = shared + 4 * n, *scale = l + n, *sum = scale + n, *shift = sum + n;
  float *center = shift + n, *apart = center + n, *squares = apart + n;  // where `squared`
  const Row of = prepare_row(p, row, l, scale, nullptr);
  if (of.mode != kInvalid) {
    const Key key = logit_key(p, row);
    const int64_t draws = draws_of(p), begin = range * a.at.range_groups;
    const int64_t end =
        begin + a.at.range_groups < a.at.groups ? begin + a.at.range_groups : a.at.groups;
    const int64_t out = static_cast<int64_t>(blockIdx.x) * n;
    double entropy = 0;
    for (int64_t group = begin; group < end; ++group) {
      float top[rows];
      BK_UNROLL
      for (int k = 0; k < rows; ++k) top[k] = of.mode == kFree ? kLowest : 0.0f;
      for (int c = static_cast<int>(threadIdx.x); c < n; c += threads) {
        float eps[4];
        normal_block(key, static_cast<uint64_t>(group * n + c), eps);
        const float factor = scale[c];
        BK_UNROLL
        for (int k = 0; k < kGroup; ++k) eps[k] *= factor;
        noise[c] = make_float4(eps[0], eps[1], eps[2], eps[3]);
        if (of.mode != kFree) continue;
        BK_UNROLL
        for (int k = 0; k < rows; ++k) {
          const float z = l[c] + (k < kGroup ? eps[k % kGroup] : -eps[k % kGroup]);
          top[k] = z > top[k] ? z : top[k];
        }
      }
      if (of.mode == kFree) block_reduce<float, rows, true>(top);
      float sums[2 * rows];  // of 2^(z - top), then weighted by z - top
      BK_UNROLL
      for (int k = 0; k < 2 * rows; ++k) sums[k] = 0.0f;
      for (int c = static_cast<int>(threadIdx.x); c < n; c += threads) {
        const float4 x = noise[c];
        const float eps[kGroup] = {x.x, x.y, x.z, x.w}, log_w = l[c];
        BK_UNROLL
        for (int k = 0; k < rows; ++k) {
          const float z = log_w + (k < kGroup ? eps[k % kGroup] : -eps[k % kGroup]) - top[k];
          const float e = bk_exp2(z);
          sums[k] += e;
          sums[rows + k] = fmaf(e, z, sums[rows + k]);
        }
      }
      block_sums(sums);
      const int left = left_of(draws, group);
      entropy += normalise<signs>(sums, left, top);
      const bool first = group == begin;
      const bool last = (group - begin + 1) % kFlush == 0 || group + 1 == end;
      for (int c = static_cast<int>(threadIdx.x); c < n; c += threads) {
        const float4 x = noise[c];
        const float eps[kGroup] = {x.x, x.y, x.z, x.w};
        ClassSums mine;
        if (!first) {
          mine.sum = sum[c];
          if (of.mode == kFree) mine.shift = shift[c];
          if (squared) mine.center = center[c], mine.apart = apart[c], mine.squares = squares[c];
        }
        const float weight = of.mode == kBounded && squared ? bk_exp2(l[c]) : 1.0f;
        mine.add<signs>(of.mode, l[c], eps, top, left, first, squared, weight);
        if (last) {  // what was flushed before lies in the workspace, where this thread put it
          double total = 0, total_apart = 0, total_squares = 0;
          if (group - begin >= kFlush) {
            total = of.mode == kBounded ? a.at.sum[out + c] : 0.0;
            if (squared) total_apart = a.at.mean[out + c], total_squares = a.at.squares[out + c];
          }
          if (group + 1 == end) {
            const int64_t stop = end * kGroup < draws ? end * kGroup : draws;
            mine.store(a, of.mode, out + c, stop - begin * kGroup, weight, total, total_apart,
                       total_squares);
            continue;
          }
          mine.flush(of.mode, &total, &total_apart, &total_squares);
          if (of.mode == kBounded) a.at.sum[out + c] = total;
          if (squared) a.at.mean[out + c] = total_apart, a.at.squares[out + c] = total_squares;
        }
        sum[c] = mine.sum;
        if (of.mode == kFree) shift[c] = mine.shift;
        if (squared) center[c] = mine.center, apart[c] = mine.apart, squares[c] = mine.squares;
      }
    }
    if (threadIdx.x == 0) a.at.entropy[blockIdx.x] = entropy;
  }
  if (last_of(a.at.tickets + row, static_cast<int>(a.at.ranges))) finish_row(a, row, of);
}

__global__ void __launch_bounds__(kRowThreads) prepare_kernel(Arguments a) {
  bk_wait_for_previous();
  const int64_t row = blockIdx.x, n = a.p.classes;
  const Row of = prepare_row(a.p, row, a.at.l + row * n, a.at.scale + row * n, nullptr);
  if (threadIdx.x == 0) a.at.row[row] = of;
}

// One block for each group of draws of an example: the normalisers of its samples.
template <int signs>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 3) normaliser_kernel(Arguments a) {
  bk_wait_for_previous();
  constexpr int rows = kGroup * signs;
  const PredictParams& p = a.p;
  const int64_t n = p.classes, row = blockIdx.x / a.at.groups;
  const int64_t group = blockIdx.x - row * a.at.groups;
  const int mode = a.at.row[row].mode;
  if (mode == kInvalid) return;
  const Key key = logit_key(p, row);
  const float *l = a.at.l + row * n, *scale = a.at.scale + row * n;
  float top[rows], sums[2 * rows];
  BK_UNROLL
  for (int k = 0; k < rows; ++k) {
    top[k] = mode == kFree ? kLowest : 0.0f;
    sums[k] = sums[rows + k] = 0.0f;
  }
  const auto each = [&](const auto& use) {
    for (int64_t c = threadIdx.x; c < n; c += kMaxWarps * kWarp) {
      const float factor = scale[c], log_w = l[c];
      float eps[4];
      normal_block(key, static_cast<uint64_t>(group * n + c), eps);
      BK_UNROLL
      for (int k = 0; k < rows; ++k)
        use(k, fmaf(factor, k < kGroup ? eps[k % kGroup] : -eps[k % kGroup], log_w));
    }
  };
  if (mode == kBounded) {
    each([&](int k, float z) {
      const float e = bk_exp2(z);
      sums[k] += e;
      sums[rows + k] = fmaf(e, z, sums[rows + k]);
    });
  } else {
    each([&](int k, float z) {
      const float up = z - top[k], e = bk_exp2(-fabsf(up));
      if (up > 0.0f) {  // z is the new reference of both sums
        sums[rows + k] = (sums[rows + k] - sums[k] * up) * e;
        sums[k] = sums[k] * e + 1.0f;
        top[k] = z;
      } else {
        sums[rows + k] = fmaf(e, up, sums[rows + k]);
        sums[k] += e;
      }
    });
    float most[rows];
    BK_UNROLL
    for (int k = 0; k < rows; ++k) most[k] = top[k];
    block_reduce<float, rows, true>(most);
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      const float down = top[k] - most[k], e = bk_exp2(down);
      sums[rows + k] = (sums[rows + k] + sums[k] * down) * e;
      sums[k] *= e;
      top[k] = most[k];
    }
  }
  block_sums(sums);
  const double entropy = normalise<signs>(sums, left_of(draws_of(p), group), top);
  if (threadIdx.x != 0) return;
  BK_UNROLL
  for (int k = 0; k < rows; ++k)
    a.at.normaliser[blockIdx.x * static_cast<int64_t>(rows) + k] = top[k];
  a.at.entropy[blockIdx.x] = entropy;
}

// One thread for each class of an example and range of draws: sums over samples.
template <int signs>
__global__ void __launch_bounds__(kClassThreads) average_kernel(Arguments a) {
  bk_wait_for_previous();
  constexpr int rows = kGroup * signs;
  const PredictParams& p = a.p;
  const int64_t n = p.classes, tiles = ceil_div(n, kClassThreads);
  const int64_t unit = blockIdx.x / tiles;  // row * ranges + range
  const int64_t c = (blockIdx.x - unit * tiles) * kClassThreads + threadIdx.x;
  const int64_t row = unit / a.at.ranges, range = unit - row * a.at.ranges;
  const int mode = a.at.row[row].mode;
  if (mode == kInvalid || c >= n) return;
  const Key key = logit_key(p, row);
  const float l = a.at.l[row * n + c], scale = a.at.scale[row * n + c];
  const float weight = mode == kBounded ? bk_exp2(l) : 1.0f;  // p over what is summed
  const bool squared = p.standard_error != nullptr;
  const int64_t draws = draws_of(p), begin = range * a.at.range_groups;
  const int64_t end =
      begin + a.at.range_groups < a.at.groups ? begin + a.at.range_groups : a.at.groups;
  double total = 0, total_apart = 0, total_squares = 0;
  ClassSums mine;
  for (int64_t group = begin; group < end; ++group) {
    float eps[kGroup], log_normaliser[rows];
    const float* from = a.at.normaliser + (row * a.at.groups + group) * rows;
    BK_UNROLL
    for (int k = 0; k < rows; ++k) log_normaliser[k] = from[k];
    normal_block(key, static_cast<uint64_t>(group * n + c), eps);
    BK_UNROLL
    for (int k = 0; k < kGroup; ++k) eps[k] *= scale;
    mine.add<signs>(mode, l, eps, log_normaliser, left_of(draws, group), group == begin, squared,
                    weight);
    if ((group - begin + 1) % kFlush == 0) mine.flush(mode, &total, &total_apart, &total_squares);
  }
  const int64_t last = end * kGroup < draws ? end * kGroup : draws;
  mine.store(a, mode, unit * n + c, last - begin * kGroup, weight, total, total_apart,
             total_squares);
}

__global__ void __launch_bounds__(kRowThreads) finish_kernel(Arguments a) {
  bk_wait_for_previous();
  finish_row(a, blockIdx.x, a.at.row[blockIdx.x]);
}

}  // namespace
}  // namespace bayes_kernels
