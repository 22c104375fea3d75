// The one header through which a .cu file of this project reaches CUDA.
//
// The same source is built twice: by nvcc for the GPU, and, with BAYES_KERNELS_SIM defined, by a
// plain C++17 compiler (g++ -x c++ -std=c++17) against the host emulator in csrc/simt, for tests
// without a GPU. Kernel code stays inside the list below; whatever is inline PTX on the GPU is
// behind a wrapper here or in mma.h that has a host twin.
//
// clang-format off
//
//   Host side
//     BK_LAUNCH(kernel, grid, block, dynamic_smem_bytes, stream, args...)
//                                  launch; parenthesise a kernel with commas: (kernel<float, 16>)
//     BK_LAUNCH_BEHIND(behind, kernel, ...)
//                                  the same; where `behind`, the kernel of this call that is in front
//                                  of it on the stream need not have ended when its blocks start
//                                  (programmatic dependent launch, where the GPU has it). Each of its
//                                  threads calls bk_wait_for_previous() before it touches global
//                                  memory, and so does each kernel in front of it in the chain.
//     bk_last_error()              const char* with the reason, or nullptr; call it after a launch
//     bk_set_max_dynamic_smem(kernel, bytes)
//                                  needed before a launch with more than 48 KiB; never lowers what
//                                  another thread has asked for
//     bk_max_shared_memory_per_block()   opt-in limit of the current device, in bytes
//     bk_large_arguments()               whether kernels may take kLargeArguments bytes of arguments
//     bk_zero(pointer, bytes, stream)    clears memory on the stream; a graph captures it
//   Shared memory (plain `__shared__` is not available in the emulator, on purpose)
//     BK_SHARED(T, name, [d0][d1]...)  static array; empty third argument: one T; 16-byte aligned
//     BK_DYNAMIC_SHARED(T, name)       T* const name: the dynamic shared memory, 16-byte aligned
//   Variables    threadIdx blockIdx blockDim gridDim (1 to 3 dimensions) warpSize
//   Qualifiers   __global__ __device__ __host__ __constant__ __forceinline__ __launch_bounds__
//                __grid_constant__ __align__ __restrict__; BK_UNROLL or BK_ROLLED before a loop
//   Block, warp  __syncthreads __syncwarp
//                __shfl_sync __shfl_xor_sync __shfl_down_sync __shfl_up_sync: 4- and 8-byte
//                arithmetic types, width 1 to 32
//                __ballot_sync __any_sync __all_sync
//                No __activemask: masks are written down.
//   Chain        bk_wait_for_previous(): see BK_LAUNCH_BEHIND; it also lets the kernel behind start
//   Memory       __ldg __ldcs __ldcg __stcs __stcg __threadfence __threadfence_block
//                atomicAdd on int, unsigned, unsigned long long (no float atomics)
//                float2 float4 double2 int2 int4 uint2 uint4 and make_*, for vector accesses
//                bk_cp_async_16(dst_smem, src, bytes_valid = 16): 16 bytes, of which those from
//                bytes_valid (0 to 16) on become zero; bk_cp_async_commit(); bk_cp_async_wait<N>()
//                bk_discard_128(pointer): 128 aligned bytes are garbage from here on, and L2 need not
//                write them to memory
//   Arithmetic   bk_exp2(float): one instruction, 2 ulp, denormal results are 0
//                fmaf fma __fmaf_rn rsqrtf rsqrt __expf __logf __fdividef sincospif and C math
//                min max of two equal types
//                __umulhi __umul64hi __popc __popcll __brev __clz __ffs __trap
//   Bit casts    __float_as_uint __uint_as_float __float_as_int __int_as_float
//                __double_as_longlong __longlong_as_double
//   Tensor cores mma_m16n8k16 mma_m8n8k4_f64 movmatrix_trans_x4
//                ldmatrix_x2 ldmatrix_x4 ldmatrix_x2_trans ldmatrix_x4_trans: mma.h
//
// clang-format on
//
// Half types are c10::BFloat16 and c10::Half (torch/headeronly), the same in both builds.
//
// What the emulator rejects is listed at the top of simt/simt.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// Bytes of kernel arguments: what every driver accepts, and what drivers from CUDA 12.1 on do for
// kernels that were compiled by 12.1 or later. Lists of matrices travel in them.
constexpr std::size_t kArguments = 4000, kLargeArguments = 32764;

#ifdef BAYES_KERNELS_SIM

#include "simt/simt.h"

#define BK_SHARED(T, name, ...)                                       \
  typedef T name##_bk_shared_type __VA_ARGS__;                        \
  static const char name##_bk_shared_site = 0;                        \
  name##_bk_shared_type& name = *static_cast<name##_bk_shared_type*>( \
      ::simt::static_shared(&name##_bk_shared_site, #name, sizeof(name##_bk_shared_type)))

#define BK_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())

#define BK_LAUNCH(kernel, grid, ...) ::simt::launch(#kernel, kernel, grid, __VA_ARGS__)

#define BK_LAUNCH_BEHIND(behind, kernel, grid, ...) \
  (::simt::next_launch_is_behind(behind), ::simt::launch(#kernel, kernel, grid, __VA_ARGS__))

#define BK_UNROLL
#define BK_ROLLED

// A faulty launch throws std::runtime_error from BK_LAUNCH, so nothing is ever left to report.
inline const char* bk_last_error() { return nullptr; }

template <class... Parameters>
inline void bk_set_max_dynamic_smem(void (*kernel)(Parameters...), std::size_t bytes) {
  ::simt::set_max_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline int bk_max_shared_memory_per_block() {
  return static_cast<int>(::simt::settings().max_shared_bytes);
}
inline bool bk_large_arguments() { return true; }
inline void bk_zero(void* pointer, std::size_t bytes, void*) { std::memset(pointer, 0, bytes); }

inline float bk_exp2(float x) { return std::exp2(x); }

inline void bk_cp_async_16(void* dst_smem, const void* src, int bytes_valid = 16,
                           const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::simt::copy_async_16(dst_smem, src, bytes_valid, file, line);
}
inline void bk_cp_async_commit() { ::simt::copy_async_commit(); }
template <int N>
inline void bk_cp_async_wait() {
  static_assert(N >= 0, "the number of groups that may stay in flight");
  ::simt::copy_async_wait(N);
}

inline void bk_wait_for_previous() { ::simt::wait_for_previous(); }

inline void bk_discard_128(void* pointer, const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  ::simt::discard_128(pointer, file, line);
}

#else  // CUDA

#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#define BK_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__

#define BK_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char bk_dynamic_shared_bytes[]; \
  T* const name = reinterpret_cast<T*>(bk_dynamic_shared_bytes)

#define BK_LAUNCH(kernel, grid, ...) ::bk_launch(kernel, grid, __VA_ARGS__)
#define BK_LAUNCH_BEHIND(behind, kernel, grid, ...) \
  ::bk_launch_behind(behind, kernel, grid, __VA_ARGS__)

#define BK_UNROLL _Pragma("unroll")
#define BK_ROLLED _Pragma("unroll 1")

template <class... Parameters, class... Arguments>
inline void bk_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      std::size_t dynamic_smem_bytes, void* stream, Arguments&&... arguments) {
  // clang-format off
  kernel<<<grid, block, dynamic_smem_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  // clang-format on
}

// Whether blocks of a kernel may start before the kernel in front has ended: the GPU and the driver
// have it (in captured graphs from 12.3 on), and the code that runs, which need not be compiled for
// this GPU, has the instruction that waits. All kernels of a library are compiled alike.
inline bool bk_overlaps(const void* kernel) {
#if CUDART_VERSION >= 12030
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int driver = 0, major = 0;
    cudaFuncAttributes code{};
    const bool yes =
        cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        major >= 9 && cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
    answer = yes ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
#else
  static_cast<void>(kernel);
  return false;
#endif
}

template <class... Parameters, class... Arguments>
inline void bk_launch_behind(bool behind, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             std::size_t dynamic_smem_bytes, void* stream,
                             Arguments&&... arguments) {
#if CUDART_VERSION >= 12030
  if (behind && bk_overlaps(reinterpret_cast<const void*>(kernel))) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_smem_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    return;
  }
#endif
  bk_launch(kernel, grid, block, dynamic_smem_bytes, stream, std::forward<Arguments>(arguments)...);
}

inline const char* bk_last_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  if (error == cudaErrorNoKernelImageForDevice) {
    return "no kernel image for this GPU in the compiled library; rebuild with "
           "CMAKE_CUDA_ARCHITECTURES covering the GPU's compute capability";
  }
  return cudaGetErrorString(error);
}

// A failure stays pending in the runtime and is reported by the next bk_last_error(). The limit
// belongs to the kernel: another thread may be about to launch it with more bytes.
inline void bk_raise_max_dynamic_smem(const void* kernel, int bytes) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes now{};
  if (cudaFuncGetAttributes(&now, kernel) == cudaSuccess && now.maxDynamicSharedSizeBytes < bytes)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
template <class... Parameters>
inline void bk_set_max_dynamic_smem(void (*kernel)(Parameters...), std::size_t bytes) {
  bk_raise_max_dynamic_smem(reinterpret_cast<const void*>(kernel), static_cast<int>(bytes));
}

inline int bk_max_shared_memory_per_block() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// A failure is reported by the next bk_last_error(), as that of a launch is.
inline void bk_zero(void* pointer, std::size_t bytes, void* stream) {
  cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream));
}

inline bool bk_large_arguments() {
#if CUDART_VERSION >= 12010
  static const bool large = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return large;
#else
  return false;
#endif
}

__device__ __forceinline__ float bk_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The shared-memory window's address of a generic pointer, as PTX wants it.
__device__ __forceinline__ unsigned bk_shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void bk_cp_async_16(void* dst_smem, const void* src,
                                               int bytes_valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(bk_shared_address(dst_smem)),
               "l"(__cvta_generic_to_global(src)), "r"(bytes_valid)
               : "memory");
}
__device__ __forceinline__ void bk_cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// All kernels of a chain call it first, so that the last one to start has none in front that runs.
__device__ __forceinline__ void bk_wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void bk_discard_128(void* pointer) {
  asm volatile("discard.global.L2 [%0], 128;\n" ::"l"(__cvta_generic_to_global(pointer))
               : "memory");
}
template <int N>
__device__ __forceinline__ void bk_cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

#endif
