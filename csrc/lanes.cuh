// Sums over the lanes of a warp.
#pragma once

#include "cuda_portable.h"

namespace bayes_kernels {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

// With each step a lane keeps half of the values: value[0] of lane i is the sum of number
// i / (32 / count) at the end, by about count shuffles in place of 5 count. The sum of a number has
// the same order for every count.
template <int half, int lanes, int count>
__device__ __forceinline__ void fold_lanes(float (&value)[count], int lane) {
  if constexpr (half > 0) {
    const bool upper = (lane & lanes) != 0;
    BK_UNROLL
    for (int i = 0; i < half; ++i) {
      const float given = upper ? value[i] : value[i + half];
      const float kept = upper ? value[i + half] : value[i];
      value[i] = kept + __shfl_xor_sync(kAllLanes, given, lanes);
    }
    fold_lanes<half / 2, lanes / 2>(value, lane);
  } else if constexpr (lanes > 0) {
    value[0] += __shfl_xor_sync(kAllLanes, value[0], lanes);
    fold_lanes<0, lanes / 2>(value, lane);
  }
}

}  // namespace
}  // namespace bayes_kernels
