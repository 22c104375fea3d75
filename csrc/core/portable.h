// Torch-free definitions shared by g++, nvcc and the emulator.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

// Functions marked BK_HD have internal linkage on purpose: the CPU kernels are compiled once per
// instruction set, and an inline function with external linkage could be resolved by the linker to
// a copy that the running machine cannot execute.
#if defined(__CUDACC__)
#define BK_HD static __host__ __device__ __forceinline__
#else
#define BK_HD static inline __attribute__((always_inline, unused))
#endif

// For functions of many lines that are called from several places: inlined by nvcc, as registers
// cannot be addressed, and called on the host, where inlining them made compiling tall_cpu.cpp 2.5
// times slower.
#if defined(__CUDACC__)
#define BK_HD_LARGE BK_HD
#else
#define BK_HD_LARGE static __attribute__((noinline, unused))
#endif

namespace bayes_kernels {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

// Element types of activations. Factors, variances and noise are fp32, except beside fp64
// activations (CPU only, for gradcheck and as truth), where they are fp64.
enum class DType : int { kF32, kBF16, kF16, kF64 };

template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

BK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace bayes_kernels
