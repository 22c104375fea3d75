// The end of a sum over blocks without another launch: the last block to come adds what all have
// stored, in a fixed order. No float atomics, so the same bits whichever block is last.
#pragma once

#include "cuda_portable.h"

namespace bayes_kernels {
namespace {

// Whether this block is the last of `count` to come here. What the others stored before is seen
// from here on, by loads that pass over the first-level cache (__ldcg). The ticket is zero before
// the first comes, and again after the last: whoever clears it (bk_zero, or a kernel that runs
// before on the same stream) is part of a captured graph, and calls on several streams have tickets
// of their own.
__device__ __forceinline__ bool last_of(int* ticket, int count) {
  BK_SHARED(int, last, );
  if (count == 1) {
    __syncthreads();
    return true;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1) == count - 1 ? 1 : 0;
    if (last != 0) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

}  // namespace
}  // namespace bayes_kernels
