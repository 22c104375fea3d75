// Predict family on the GPU.
//
// Up to 32 classes: a warp takes a range of one example's draws; each lane has draws of its own,
// and the logits of the 4 (8 with mirror images) samples of a Philox block wait in shared memory
// for their normaliser. More classes: one launch for the normaliser of every sample, one that draws
// the same noise again and averages, a thread for each class. Ranges depend on the shape only, and
// sums are added in their order.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda_portable.h"
#include "predict.h"

namespace bayes_kernels {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kRowThreads = 128;  // prepare and finish
constexpr int kNormaliserThreads = 256;
constexpr int kClassThreads = 64;      // classes of a block that averages
constexpr int64_t kSmall = 32;         // classes up to which a lane holds whole samples
constexpr int64_t kSmallRanges = 128;  // ranges of an example's draws, at most
constexpr int64_t kLargeRanges = 16;
constexpr int64_t kLargeRange = 64;  // groups of 4 draws in a range, at least
constexpr int64_t kFlush = 64;       // groups in an fp32 sum, before fp64
constexpr float kLowest = -3e38f;
// Rows go in chunks whose workspace is at most this: 8,192 rows of 128,256 classes would take 25 GB
// and more. The emulator's is small, so that its tests cut rows too.
#ifdef BAYES_KERNELS_SIM
constexpr int64_t kWorkspaceBytes = 16 << 10;
#else
constexpr int64_t kWorkspaceBytes = 256 << 20;
#endif

enum Mode : int32_t { kBounded, kFree, kInvalid };

// Where things are in the workspace. Doubles first: they need the alignment.
struct Layout {
  double* sum;      // (rows, ranges, classes)
  double* mean;     // of the probabilities of a range's draws, where a standard error is asked for
  double* squares;  // the same: sums of their squared distances from it
  double* entropy;  // (rows, parts): sums over samples
  float* shift;     // (rows, ranges, classes)
  float* l;         // (rows, classes)
  float* weight;    // (rows, classes)
  float* scale;     // (rows, classes), or (rows, classes, classes)
  float* normaliser;  // (rows, groups, 4 signs): 1 / N, or log N in free mode; many classes only
  int32_t* mode;      // (rows)
  int64_t groups, ranges, range_groups, parts;
};

Layout layout_of(const PredictParams& p, int64_t* bytes) {
  Layout out{};
  const bool small = p.classes <= kSmall;
  const int64_t sums = p.rows * p.classes;
  out.groups = ceil_div(draws_of(p), kGroup);
  const int64_t ranges = ceil_div(out.groups, small ? kWarp : kLargeRange);
  const int64_t most = small ? kSmallRanges : kLargeRanges;
  out.range_groups = ceil_div(out.groups, ranges < most ? ranges : most);
  if (small) out.range_groups = ceil_div(out.range_groups, kWarp) * kWarp;
  out.ranges = ceil_div(out.groups, out.range_groups);
  out.parts = small ? out.ranges : out.groups;
  char* base = static_cast<char*>(p.workspace);
  int64_t used = 0;
  const auto take = [&](int64_t count, int64_t size) {
    char* at = base == nullptr ? nullptr : base + used;
    used += ceil_div(count * size, 16) * 16;
    return at;
  };
  out.sum = reinterpret_cast<double*>(take(sums * out.ranges, 8));
  const int64_t moments = p.standard_error != nullptr ? sums * out.ranges : 0;
  out.mean = reinterpret_cast<double*>(take(moments, 8));
  out.squares = reinterpret_cast<double*>(take(moments, 8));
  out.entropy = reinterpret_cast<double*>(take(p.rows * out.parts, 8));
  out.shift = reinterpret_cast<float*>(take(sums * out.ranges, 4));
  out.l = reinterpret_cast<float*>(take(sums, 4));
  out.weight = reinterpret_cast<float*>(take(sums, 4));
  out.scale = reinterpret_cast<float*>(take(p.full ? sums * p.classes : sums, 4));
  out.normaliser = reinterpret_cast<float*>(
      take(small ? 0 : p.rows * out.groups * kGroup * (p.antithetic ? 2 : 1), 4));
  out.mode = reinterpret_cast<int32_t*>(take(p.rows, 4));
  *bytes = used;
  return out;
}

struct Arguments {
  PredictParams p;
  Layout at;
};

// Sum or maximum of `count` values over the block, in a fixed order; valid in every thread.
template <class T, int count, bool maximum>
__device__ __forceinline__ void block_reduce(T* value) {
  BK_SHARED(T, parts, [kNormaliserThreads / kWarp][count]);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  BK_UNROLL
  for (int i = 0; i < count; ++i) {
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, value[i], lanes);
      value[i] = maximum ? (other > value[i] ? other : value[i]) : value[i] + other;
    }
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp][i] = value[i];
  }
  __syncthreads();
  BK_UNROLL
  for (int i = 0; i < count; ++i) {
    value[i] = parts[0][i];
    for (int w = 1; w < warps; ++w)
      value[i] =
          maximum ? (parts[w][i] > value[i] ? parts[w][i] : value[i]) : value[i] + parts[w][i];
  }
  __syncthreads();  // the next call writes the same memory
}

// One warp: the factor of one covariance, a lane for each row. False where it is no covariance.
__device__ bool factorise(const float* cov, int n, float* out) {
  BK_SHARED(double, lower, [kMaxFull][kMaxFull + 1]);
  const int i = static_cast<int>(threadIdx.x);
  const double unit = rounding_unit(false);
  bool good = true;
  for (int j = 0; j < n && good; ++j) {
    const double diagonal = static_cast<double>(cov[j * n + j]);
    double pivot = diagonal;
    for (int k = 0; k < j; ++k) pivot -= lower[j][k] * lower[j][k];
    good = !pivot_is_bad(pivot, diagonal, unit);
    const bool zero = pivot_is_zero(pivot, diagonal, n, unit);
    double value = 0;
    if (good && !zero && i >= j && i < n) {
      value = static_cast<double>(cov[i * n + j]);
      for (int k = 0; k < j; ++k) value -= lower[i][k] * lower[j][k];
      value = i == j ? sqrt(pivot) : value / sqrt(pivot);
    }
    __syncwarp();
    if (i < n) lower[i][j] = value;
    __syncwarp();
  }
  for (int k = 0; k < n && good && i < n; ++k)
    out[i * n + k] = k <= i ? static_cast<float>(lower[i][k]) : 0.0f;
  return good;
}

// One block for each example: log-softmax of the mean, its exponential, and the noise's scale.
__global__ void __launch_bounds__(kRowThreads) prepare_kernel(Arguments a) {
  const PredictParams& p = a.p;
  const int64_t row = blockIdx.x, n = p.classes;
  const float* mean = static_cast<const float*>(p.mean) + row * n;
  float* l = a.at.l + row * n;
  float top = -HUGE_VALF;
  for (int64_t c = threadIdx.x; c < n; c += kRowThreads) top = mean[c] > top ? mean[c] : top;
  block_reduce<float, 1, true>(&top);
  double check[2] = {0, 0};  // sum of exponentials; number of improper entries
  for (int64_t c = threadIdx.x; c < n; c += kRowThreads) {
    const float value = mean[c] - top;
    check[0] += static_cast<double>(expf(value));
    if (!(value == value)) check[1] += 1;
  }
  float reach = 0;
  if (!p.full) {
    const float* var = static_cast<const float*>(p.cov) + row * n;
    for (int64_t c = threadIdx.x; c < n; c += kRowThreads) {
      const float value = var[c];
      if (!(value >= 0.0f && value < HUGE_VALF)) check[1] += 1;
      const float scale = sqrtf(value);
      a.at.scale[row * n + c] = scale;
      reach = scale > reach ? scale : reach;
    }
  } else if (threadIdx.x < kWarp) {
    const float* cov = static_cast<const float*>(p.cov) + row * n * n;
    float* factor = a.at.scale + row * n * n;
    if (!factorise(cov, static_cast<int>(n), factor)) {
      check[1] += 1;
    } else if (threadIdx.x < n) {
      for (int k = 0; k <= static_cast<int>(threadIdx.x); ++k)
        reach += fabsf(factor[threadIdx.x * n + k]);
    }
  }
  block_reduce<double, 2, false>(check);
  block_reduce<float, 1, true>(&reach);
  const float log_total = static_cast<float>(log(check[0]));
  for (int64_t c = threadIdx.x; c < n; c += kRowThreads) {
    const float value = mean[c] - top;
    l[c] = (value < kAbsent ? kAbsent : value) - log_total;
    a.at.weight[row * n + c] = expf(l[c]);
  }
  if (threadIdx.x == 0) {
    const bool valid = top - top == 0.0f && check[1] == 0;
    a.at.mode[row] = !valid ? kInvalid : reach <= static_cast<float>(kMaxScale) ? kBounded : kFree;
  }
}

// A running sum of exponentials beside its largest exponent.
__device__ __forceinline__ void add_exponential(float value, float* shift, float* sum) {
  const float up = value - *shift;
  const float e = expf(-fabsf(up));
  *sum = up > 0.0f ? *sum * e + 1.0f : *sum + e;
  *shift = up > 0.0f ? value : *shift;
}

// One warp for each range of an example's draws; C <= kSmall.
template <int signs>
__global__ void __launch_bounds__(kWarp) small_kernel(Arguments a) {
  constexpr int rows = kGroup * signs;
  BK_DYNAMIC_SHARED(float, shared);
  const PredictParams& p = a.p;
  const int n = static_cast<int>(p.classes), lane = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / a.at.ranges, range = blockIdx.x - row * a.at.ranges;
  const int mode = a.at.mode[row];
  if (mode == kInvalid) return;
  const Key key = logit_key(p, row);
  const float* l = a.at.l + row * n;
  const float* weight = a.at.weight + row * n;
  const float* scale = a.at.scale + row * n * (p.full ? n : 1);
  const bool squared = p.standard_error != nullptr;
  // Every lane has a column of its own in each array: no barrier, no bank conflict.
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
          const float e = expf(noise);
          tile[(c * rows + k) * kWarp] = e;
          normaliser[k] = fmaf(w, e, normaliser[k]);
          weighted[k] = fmaf(w * e, log_w + noise, weighted[k]);
        }
      }
      BK_UNROLL
      for (int k = 0; k < rows; ++k) {
        const bool exists = k % kGroup < left;
        if (exists)
          entropy += static_cast<double>(logf(normaliser[k]) - weighted[k] / normaliser[k]);
        normaliser[k] = exists ? 1.0f / normaliser[k] : 0.0f;
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
        const float e = expf(z);
        normaliser[k] += e;
        weighted[k] = fmaf(e, z, weighted[k]);
      }
    }
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      const float log_sum = logf(normaliser[k]);
      if (k % kGroup < left) entropy += static_cast<double>(log_sum - weighted[k] / normaliser[k]);
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
          probability += expf(log_p);
        }
        if (squared) add_draw(c, 1.0f, probability / signs, count + k + 1);
      }
    }
    count += left;
  }
  const int64_t out = blockIdx.x * static_cast<int64_t>(n);
  for (int c = 0; c < n; ++c) {
    float most = shift[c * kWarp];
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, most, lanes);
      most = other > most ? other : most;
    }
    double total = static_cast<double>(sum[c * kWarp]);
    if (mode == kFree) total *= static_cast<double>(expf(shift[c * kWarp] - most));
    BK_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      total += __shfl_xor_sync(kAllLanes, total, lanes);
    if (lane == 0) {
      a.at.sum[out + c] = total;
      a.at.shift[out + c] = most;
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
  if (lane == 0) a.at.entropy[blockIdx.x] = entropy;
}

// One block for each group of draws of an example: the normalisers of its samples.
template <int signs>
__global__ void __launch_bounds__(kNormaliserThreads, 3) normaliser_kernel(Arguments a) {
  constexpr int rows = kGroup * signs;
  const PredictParams& p = a.p;
  const int64_t n = p.classes, row = blockIdx.x / a.at.groups;
  const int64_t group = blockIdx.x - row * a.at.groups;
  const int mode = a.at.mode[row];
  if (mode == kInvalid) return;
  const Key key = logit_key(p, row);
  const float* l = a.at.l + row * n;
  const float* weight = a.at.weight + row * n;
  const float* scale = a.at.scale + row * n;
  float top[rows], sums[2 * rows];  // normalisers, then sums weighted by log-probability
  BK_UNROLL
  for (int k = 0; k < rows; ++k) {
    top[k] = kLowest;
    sums[k] = sums[rows + k] = 0.0f;
  }
  for (int64_t c = threadIdx.x; c < n; c += kNormaliserThreads) {
    float eps[4];
    normal_block(key, static_cast<uint64_t>(group * n + c), eps);
    const float factor = scale[c], w = weight[c], log_w = l[c];
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      const float noise = factor * (k < kGroup ? eps[k % kGroup] : -eps[k % kGroup]);
      if (mode == kBounded) {
        const float e = w * expf(noise);
        sums[k] += e;
        sums[rows + k] = fmaf(e, log_w + noise, sums[rows + k]);
      } else {
        const float z = log_w + noise, up = z - top[k];
        const float e = expf(-fabsf(up));
        if (up > 0.0f) {  // z is the new reference of both sums
          sums[rows + k] = (sums[rows + k] - sums[k] * up) * e;
          sums[k] = sums[k] * e + 1.0f;
          top[k] = z;
        } else {
          sums[rows + k] = fmaf(e, up, sums[rows + k]);
          sums[k] += e;
        }
      }
    }
  }
  float most[rows];
  BK_UNROLL
  for (int k = 0; k < rows; ++k) most[k] = top[k];
  if (mode == kFree) {
    block_reduce<float, rows, true>(most);
    BK_UNROLL
    for (int k = 0; k < rows; ++k) {
      const float down = top[k] - most[k], e = expf(down);
      sums[rows + k] = (sums[rows + k] + sums[k] * down) * e;
      sums[k] *= e;
    }
  }
  block_reduce<float, 2 * rows, false>(sums);
  if (threadIdx.x != 0) return;
  const int64_t draws = draws_of(p);
  double entropy = 0;
  BK_UNROLL
  for (int k = 0; k < rows; ++k) {
    const bool exists = group * kGroup + k % kGroup < draws;
    const float log_sum = logf(sums[k]);
    if (exists) entropy += static_cast<double>(log_sum - sums[rows + k] / sums[k]);
    const float value = mode == kBounded ? 1.0f / sums[k] : most[k] + log_sum;
    a.at.normaliser[blockIdx.x * static_cast<int64_t>(rows) + k] = exists ? value : 0.0f;
  }
  a.at.entropy[blockIdx.x] = entropy;
}

// One thread for each class of an example and range of draws: sums over samples.
template <int signs>
__global__ void __launch_bounds__(kClassThreads) average_kernel(Arguments a) {
  constexpr int rows = kGroup * signs;
  const PredictParams& p = a.p;
  const int64_t n = p.classes, tiles = ceil_div(n, kClassThreads);
  const int64_t unit = blockIdx.x / tiles;  // row * ranges + range
  const int64_t c = (blockIdx.x - unit * tiles) * kClassThreads + threadIdx.x;
  const int64_t row = unit / a.at.ranges, range = unit - row * a.at.ranges;
  const int mode = a.at.mode[row];
  if (mode == kInvalid || c >= n) return;
  const Key key = logit_key(p, row);
  const float l = a.at.l[row * n + c], scale = a.at.scale[row * n + c];
  const float weight = mode == kBounded ? a.at.weight[row * n + c] : 1.0f;  // p over what is summed
  const int64_t draws = draws_of(p), begin = range * a.at.range_groups;
  const int64_t end =
      begin + a.at.range_groups < a.at.groups ? begin + a.at.range_groups : a.at.groups;
  double total = 0, total_apart = 0, total_squares = 0;
  float sum = 0.0f, shift = kLowest;
  float center = 0.0f, apart = 0.0f, squares = 0.0f;  // of the first draw; sums about it
  for (int64_t group = begin; group < end; ++group) {
    float eps[4];
    normal_block(key, static_cast<uint64_t>(group * n + c), eps);
    const float* normaliser = a.at.normaliser + (row * a.at.groups + group) * rows;
    BK_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      if (group * kGroup + k >= draws) break;
      float d = 0.0f;
      BK_UNROLL
      for (int sign = 0; sign < signs; ++sign) {
        const float noise = scale * (sign == 0 ? eps[k] : -eps[k]);
        const float value = normaliser[k + sign * kGroup];
        if (mode == kBounded) {
          const float ratio = expf(noise) * value;
          sum += ratio;
          d += ratio;
        } else {
          const float log_p = l + noise - value;
          add_exponential(log_p, &shift, &sum);
          d += expf(log_p);
        }
      }
      d /= signs;
      if (group == begin && k == 0) center = d;
      d = weight * (d - center);
      apart += d;
      squares = fmaf(d, d, squares);
    }
    if ((group - begin + 1) % kFlush == 0) {
      total_apart += static_cast<double>(apart);
      total_squares += static_cast<double>(squares);
      apart = squares = 0.0f;
      if (mode == kBounded) {
        total += static_cast<double>(sum);
        sum = 0.0f;
      }
    }
  }
  const int64_t out = unit * n + c;
  a.at.sum[out] = total + static_cast<double>(sum);
  a.at.shift[out] = shift;
  if (p.standard_error == nullptr) return;
  const int64_t last = end * kGroup < draws ? end * kGroup : draws;
  const Moments all = moments_about(static_cast<double>(weight) * static_cast<double>(center),
                                    static_cast<double>(last - begin * kGroup),
                                    total_apart + static_cast<double>(apart),
                                    total_squares + static_cast<double>(squares));
  a.at.mean[out] = all.mean;
  a.at.squares[out] = all.squares;
}

// One block for each example: adds the ranges and writes the results.
__global__ void __launch_bounds__(kRowThreads) finish_kernel(Arguments a) {
  const PredictParams& p = a.p;
  const int64_t row = blockIdx.x, n = p.classes;
  const int mode = a.at.mode[row];
  const float* mean = static_cast<const float*>(p.mean) + row * n;
  float* log_probs = static_cast<float*>(p.log_probs) + row * n;
  float* error =
      p.standard_error == nullptr ? nullptr : static_cast<float*>(p.standard_error) + row * n;
  const double samples = static_cast<double>(p.samples);
  const int64_t draws = draws_of(p);
  double entropy[2] = {0, 0};
  for (int64_t c = threadIdx.x; c < n; c += blockDim.x) {
    if (mode == kInvalid) {
      log_probs[c] = NAN;
      if (error != nullptr) error[c] = NAN;
      continue;
    }
    double total = 0;
    Moments moments{};
    float shift = mode == kBounded ? a.at.l[row * n + c] : kLowest;
    for (int64_t range = 0; range < a.at.ranges; ++range) {
      const int64_t at = (row * a.at.ranges + range) * n + c;
      if (mode == kBounded) {
        total += a.at.sum[at];
      } else {
        const float up = a.at.shift[at] - shift;
        const double e = static_cast<double>(expf(-fabsf(up)));
        total = up > 0.0f ? total * e + a.at.sum[at] : total + a.at.sum[at] * e;
        shift = up > 0.0f ? a.at.shift[at] : shift;
      }
      if (error == nullptr) continue;
      const int64_t begin = range * a.at.range_groups * kGroup;
      const int64_t end = begin + a.at.range_groups * kGroup;
      const double count = static_cast<double>((end < draws ? end : draws) - begin);
      moments = merged(moments, {count, a.at.mean[at], a.at.squares[at]});
    }
    const double ratio = total / samples;
    const float log_p = shift + logf(static_cast<float>(ratio));
    const float weight = a.at.weight[row * n + c];
    const double probability =
        mode == kBounded ? static_cast<double>(weight) * ratio : static_cast<double>(expf(log_p));
    entropy[0] -= probability * static_cast<double>(log_p);
    log_probs[c] = mean[c] == -HUGE_VALF ? -HUGE_VALF : log_p;
    if (error != nullptr) error[c] = static_cast<float>(standard_error_of(moments));
  }
  if (mode != kInvalid)
    for (int64_t i = threadIdx.x; i < a.at.parts; i += blockDim.x)
      entropy[1] += a.at.entropy[row * a.at.parts + i];
  block_reduce<double, 2, false>(entropy);
  if (threadIdx.x != 0) return;
  const double nan = mode == kInvalid ? static_cast<double>(NAN) : 0.0;
  static_cast<float*>(p.entropy)[row] = static_cast<float>(entropy[0] + nan);
  static_cast<float*>(p.expected_entropy)[row] = static_cast<float>(entropy[1] / samples + nan);
}

template <int signs>
void launch_samples(const Arguments& a, void* stream) {
  const PredictParams& p = a.p;
  if (p.classes <= kSmall) {
    const std::size_t bytes =
        static_cast<std::size_t>(p.classes *
                                 (kGroup * signs + (p.standard_error != nullptr ? 4 : 2)) * kWarp) *
        sizeof(float);
    BK_LAUNCH(small_kernel<signs>, dim3(static_cast<unsigned>(p.rows * a.at.ranges)), kWarp, bytes,
              stream, a);
    return;
  }
  BK_LAUNCH(normaliser_kernel<signs>, dim3(static_cast<unsigned>(p.rows * a.at.groups)),
            kNormaliserThreads, 0, stream, a);
  const int64_t tiles = ceil_div(p.classes, kClassThreads);
  BK_LAUNCH(average_kernel<signs>, dim3(static_cast<unsigned>(p.rows * a.at.ranges * tiles)),
            kClassThreads, 0, stream, a);
}

// `count` rows from row `first` on, as a call of their own: the same keys, hence the same bits.
PredictParams rows_of(const PredictParams& p, int64_t first, int64_t count) {
  PredictParams q = p;
  const auto from = [&](auto pointer, int64_t width) {
    using T = std::conditional_t<std::is_const<std::remove_pointer_t<decltype(pointer)>>::value,
                                 const float, float>;
    return pointer == nullptr ? nullptr : static_cast<T*>(pointer) + first * width;
  };
  q.mean = from(p.mean, p.classes);
  q.cov = from(p.cov, p.full ? p.classes * p.classes : p.classes);
  q.log_probs = from(p.log_probs, p.classes);
  q.standard_error = from(p.standard_error, p.classes);
  q.entropy = from(p.entropy, 1);
  q.expected_entropy = from(p.expected_entropy, 1);
  if (p.row_ids.ids != nullptr)
    q.row_ids.ids = p.row_ids.ids + first;
  else
    q.row_ids.row0 = p.row_ids.row0 + first;
  q.rows = count;
  return q;
}

// Rows that a chunk has: by the shape only. None where one row is more than a grid can take.
int64_t chunk_of(const PredictParams& p) {
  int64_t bytes = 0;
  const Layout one = layout_of(rows_of(p, 0, 1), &bytes);
  const int64_t tiles = p.classes <= kSmall ? 1 : ceil_div(p.classes, kClassThreads);
  const int64_t blocks = one.ranges * tiles > one.groups ? one.ranges * tiles : one.groups;
  const int64_t grid = std::numeric_limits<int32_t>::max() / blocks;
  const int64_t memory = kWorkspaceBytes / bytes < 1 ? 1 : kWorkspaceBytes / bytes;
  return std::min({p.rows, grid, memory});
}

const char* predict_rows(const PredictParams& p, void* stream) {
  int64_t bytes = 0;
  const Arguments a{p, layout_of(p, &bytes)};
  const dim3 rows(static_cast<unsigned>(p.rows));
  BK_LAUNCH(prepare_kernel, rows, kRowThreads, 0, stream, a);
  if (p.antithetic)
    launch_samples<2>(a, stream);
  else
    launch_samples<1>(a, stream);
  BK_LAUNCH(finish_kernel, rows, p.classes <= kSmall ? kWarp : kRowThreads, 0, stream, a);
  return bk_last_error();
}

}  // namespace

int64_t predict_workspace_cuda(const PredictParams& p) {
  int64_t bytes = 0;
  layout_of(rows_of(p, 0, chunk_of(p)), &bytes);
  return bytes;
}

const char* mc_predict_cuda(const PredictParams& p, void* stream) {
  const int64_t chunk = chunk_of(p);
  if (chunk == 0) return "more classes or samples than one launch can take; use fewer";
  for (int64_t first = 0; first < p.rows; first += chunk) {
    const char* error =
        predict_rows(rows_of(p, first, p.rows - first < chunk ? p.rows - first : chunk), stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace bayes_kernels
