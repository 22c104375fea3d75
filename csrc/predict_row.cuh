// What the predict kernels share: where an example's numbers lie, its preparation, and the end of
// its sums.
#pragma once

#include "cuda_portable.h"
#include "lanes.cuh"
#include "predict.h"
#include "ticket.cuh"

namespace bayes_kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 8;
constexpr int64_t kFlush = 64;  // groups in an fp32 sum, before fp64
constexpr int kPartsAhead = 4;  // ranges loaded before the first is added
constexpr float kLowest = -3e38f;
// Exponents are of base 2, in logits, scales and noise: an exponential is one instruction.
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309417;

enum Mode : int32_t { kBounded, kFree, kInvalid };

// Of one example: its largest mean logit, the logarithm of the sum of exponentials beside it.
struct Row {
  float top, log_total;
  int32_t mode;
};

// Where things are in the workspace. Doubles first: they need the alignment.
struct Layout {
  double* sum;       // (rows, ranges, classes)
  double* mean;      // of the probabilities of a range's draws, where a standard error is asked for
  double* squares;   // the same: sums of their squared distances from it
  double* entropy;   // (rows, parts): sums over samples
  float* shift;      // (rows, ranges, classes): exponents of the sums in free mode
  int32_t* tickets;  // (rows)
  float* l;          // (rows, classes); this and the following with many classes only
  float* scale;      // (rows, classes)
  float* normaliser;  // (rows, groups, 4 signs): the logarithm of N
  Row* row;           // (rows)
  int64_t groups, ranges, range_groups, parts;
};

struct Arguments {
  PredictParams p;
  Layout at;
};

// Maximum or sum of `count` values over the block, in a fixed order; valid in every thread.
template <class T, int count, bool maximum>
__device__ __forceinline__ void block_reduce(T* value) {
  BK_SHARED(T, parts, [kMaxWarps][count]);
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
    BK_ROLLED
    for (int w = 1; w < warps; ++w)
      value[i] =
          maximum ? (parts[w][i] > value[i] ? parts[w][i] : value[i]) : value[i] + parts[w][i];
  }
  __syncthreads();  // the next call writes the same memory
}

// Sums of `count` values, a power of two up to 32, over the block, in a fixed order; valid in every
// thread.
template <int count>
__device__ __forceinline__ void block_sums(float (&value)[count]) {
  BK_SHARED(float, parts, [kMaxWarps][count]);
  constexpr int kShare = kWarp / count;  // lanes that have the same value
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  fold_lanes<count / 2, kWarp / 2>(value, lane);
  if (lane % kShare == 0) parts[threadIdx.x / kWarp][lane / kShare] = value[0];
  __syncthreads();
  float sum = 0.0f;
  for (int w = lane / count; w < warps; w += kShare) sum += parts[w][lane % count];
  BK_UNROLL
  for (int apart = count; apart < kWarp; apart *= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  BK_UNROLL
  for (int i = 0; i < count; ++i) value[i] = __shfl_sync(kAllLanes, sum, i);
  __syncthreads();  // the next call writes the same memory
}

// One warp: the factor of one covariance, a lane for each row. False where it is no covariance.
// lower: n (n + 1) numbers of shared memory.
__device__ bool factorise(const float* cov, int n, double* lower, float* out) {
  const int i = static_cast<int>(threadIdx.x), ld = n + 1;
  const double unit = rounding_unit(false);
  bool good = true;
  for (int j = 0; j < n && good; ++j) {
    const double diagonal = static_cast<double>(cov[j * n + j]);
    double pivot = diagonal;
    for (int k = 0; k < j; ++k) pivot -= lower[j * ld + k] * lower[j * ld + k];
    good = !pivot_is_bad(pivot, diagonal, unit);
    const bool zero = pivot_is_zero(pivot, diagonal, n, unit);
    double value = 0;
    if (good && !zero && i >= j && i < n) {
      value = static_cast<double>(cov[i * n + j]);
      for (int k = 0; k < j; ++k) value -= lower[i * ld + k] * lower[j * ld + k];
      value = i == j ? sqrt(pivot) : value / sqrt(pivot);
    }
    __syncwarp();
    if (i < n) lower[i * ld + j] = value;
    __syncwarp();
  }
  for (int k = 0; k < n && good && i < n; ++k)
    out[i * n + k] = k <= i ? static_cast<float>(lower[i * ld + k]) : 0.0f;
  return good;
}

// By a whole block: log-softmax of the mean, and the noise's scale, a number for each class or a
// factor. Every thread sees both on return.
__device__ __forceinline__ Row prepare_row(const PredictParams& p, int64_t row, float* l,
                                           float* scale, double* lower) {
  const int64_t n = p.classes;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const float* mean = static_cast<const float*>(p.mean) + row * n;
  Row out;
  out.top = -HUGE_VALF;
  for (int64_t c = thread; c < n; c += threads) out.top = mean[c] > out.top ? mean[c] : out.top;
  block_reduce<float, 1, true>(&out.top);
  double check[2] = {0, 0};  // sum of exponentials; number of improper entries
  for (int64_t c = thread; c < n; c += threads) {
    const float value = mean[c] - out.top;
    check[0] += static_cast<double>(expf(value));
    if (!(value == value)) check[1] += 1;
  }
  float reach = 0;
  if (!p.full) {
    const float* var = static_cast<const float*>(p.cov) + row * n;
    for (int64_t c = thread; c < n; c += threads) {
      const float value = var[c];
      if (!(value >= 0.0f && value < HUGE_VALF)) check[1] += 1;
      const float root = sqrtf(value);
      scale[c] = kLog2E * root;
      reach = root > reach ? root : reach;
    }
  } else if (thread < kWarp) {
    if (!factorise(static_cast<const float*>(p.cov) + row * n * n, static_cast<int>(n), lower,
                   scale)) {
      check[1] += 1;
    } else if (thread < n) {
      for (int k = 0; k <= thread; ++k) {
        reach += fabsf(scale[thread * n + k]);
        scale[thread * n + k] *= kLog2E;
      }
    }
  }
  block_reduce<double, 2, false>(check);
  block_reduce<float, 1, true>(&reach);
  out.log_total = static_cast<float>(log(check[0]));
  for (int64_t c = thread; c < n; c += threads) {
    const float value = mean[c] - out.top;
    l[c] = kLog2E * ((value < kAbsent ? kAbsent : value) - out.log_total);
  }
  const bool valid = out.top - out.top == 0.0f && check[1] == 0;
  out.mode = !valid ? kInvalid : reach <= static_cast<float>(kMaxScale) ? kBounded : kFree;
  __syncthreads();
  return out;
}

// A running sum of exponentials beside its largest exponent.
__device__ __forceinline__ void add_exponential(float value, float* shift, float* sum) {
  const float up = value - *shift;
  const float e = bk_exp2(-fabsf(up));
  *sum = up > 0.0f ? *sum * e + 1.0f : *sum + e;
  *shift = up > 0.0f ? value : *shift;
}

// By a whole block: adds the ranges of an example in their order and writes its results.
__device__ __forceinline__ void finish_row(const Arguments& a, int64_t row, const Row& of) {
  const PredictParams& p = a.p;
  const int64_t n = p.classes, ranges = a.at.ranges;
  const float* mean = static_cast<const float*>(p.mean) + row * n;
  float* log_probs = static_cast<float*>(p.log_probs) + row * n;
  float* error =
      p.standard_error == nullptr ? nullptr : static_cast<float*>(p.standard_error) + row * n;
  const double samples = static_cast<double>(p.samples);
  const int64_t draws = draws_of(p);
  const bool bounded = of.mode == kBounded;
  double entropy[2] = {0, 0};
  for (int64_t c = threadIdx.x; c < n; c += blockDim.x) {
    if (of.mode == kInvalid) {
      log_probs[c] = NAN;
      if (error != nullptr) error[c] = NAN;
      continue;
    }
    double total = 0;
    float shift = kLowest;
    for (int64_t first = 0; first < ranges; first += kPartsAhead) {
      double sum[kPartsAhead];
      float exponent[kPartsAhead];
      BK_UNROLL
      for (int u = 0; u < kPartsAhead; ++u) {
        const int64_t at = (row * ranges + first + u) * n + c;
        const bool there = first + u < ranges;
        sum[u] = there ? __ldcg(a.at.sum + at) : 0.0;
        exponent[u] = there && !bounded ? __ldcg(a.at.shift + at) : kLowest;
      }
      BK_UNROLL
      for (int u = 0; u < kPartsAhead; ++u) {
        const float up = exponent[u] - shift;
        const double e = static_cast<double>(bk_exp2(-fabsf(up)));
        total = up > 0.0f ? total * e + sum[u] : total + sum[u] * e;
        shift = up > 0.0f ? exponent[u] : shift;
      }
    }
    const double ratio = total / samples;
    const float l = mean[c] - of.top - of.log_total;
    const double before = bounded ? static_cast<double>(l) : kLn2 * static_cast<double>(shift);
    const float log_p =
        static_cast<float>(before + static_cast<double>(logf(static_cast<float>(ratio))));
    const double weight =
        bounded ? static_cast<double>(expf(l)) * ratio : static_cast<double>(expf(log_p));
    if (mean[c] != -HUGE_VALF) entropy[0] -= weight * static_cast<double>(log_p);
    log_probs[c] = mean[c] == -HUGE_VALF ? -HUGE_VALF : log_p;
    if (error == nullptr) continue;
    Moments moments{};
    for (int64_t range = 0; range < ranges; ++range) {
      const int64_t at = (row * ranges + range) * n + c;
      const int64_t begin = range * a.at.range_groups * kGroup;
      const int64_t end = begin + a.at.range_groups * kGroup;
      const double count = static_cast<double>((end < draws ? end : draws) - begin);
      moments = merged(moments, {count, __ldcg(a.at.mean + at), __ldcg(a.at.squares + at)});
    }
    error[c] = static_cast<float>(standard_error_of(moments));
  }
  if (of.mode != kInvalid)
    for (int64_t i = threadIdx.x; i < a.at.parts; i += blockDim.x)
      entropy[1] += __ldcg(a.at.entropy + row * a.at.parts + i);
  block_reduce<double, 2, false>(entropy);
  if (threadIdx.x != 0) return;
  const double nan = of.mode == kInvalid ? static_cast<double>(NAN) : 0.0;
  static_cast<float*>(p.entropy)[row] = static_cast<float>(entropy[0] + nan);
  static_cast<float*>(p.expected_entropy)[row] = static_cast<float>(entropy[1] / samples + nan);
}

}  // namespace
}  // namespace bayes_kernels
