// Host emulator of the CUDA block model, for tests only.
//
// One fiber per CUDA thread, all on the calling host thread; the blocks of a launch run one after
// another, and a launch returns when its last block has finished. A fiber runs until it meets a
// barrier or a warp operation, so code between two such points is never interleaved; races show as
// a dependence on the order in which fibers run, which can be chosen.
//
// A fault throws std::runtime_error out of BK_LAUNCH with one line that names kernel, block and
// thread. Faults are:
//
// Launch: block or grid sizes and shared memory that CUDA would refuse; more than 48 KiB of it
// without opting in.
//
// Barriers: a block whose threads wait at different __syncthreads(). Threads that have returned do
// not count, as on sm_70 and later: a barrier opens once every thread still running is there.
//
// Warp operations: a call by a lane outside its mask; a mask lane that has returned or never
// arrives; two different operations under one mask; a shuffle from a lane outside the mask. Lanes
// beyond the end of a block that is no multiple of 32 are ignored in masks, but nothing may be read
// from them.
//
// Shared memory: a store beyond either end of an array or of the dynamic memory (found by guard
// bytes when the block ends, so the thread is not named); misaligned or non-shared addresses given
// to ldmatrix and cp.async; cp.async copies still in flight when their thread returns.
//
// A stack overflow of a fiber is a segmentation fault on its guard page.
//
// Shared memory is filled with the poison byte before every block. The data of a cp.async arrives
// only in bk_cp_async_wait; until then its destination holds the poison byte.
//
// What needs more than one run is in checks.h: race_check (dropped barriers) and
// check_uninitialized (reads of shared memory never written). Compiled with -fsanitize=address,
// wild global and shared accesses are found at the access. Compiled with -fsanitize=thread (compile
// step only, no libtsan) and linked with access_check.cpp, every single access to shared memory is
// checked for races, initialisation and bounds; linked with access_count.cpp instead, the bytes
// that each kernel moves to and from global memory are counted. Both find loads of what another
// block stored without the fences and the atomic operation that order them (block_order.h).
//
// Not emulated: timing, bank conflicts, register limits, memory-model weakness (stores are visible
// at once), clusters, TMA. A thread that spins on a value another thread or block shall write never
// ends.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- types and built-in variables

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define BK_SIM_VECTOR2(NAME, T)        \
  struct alignas(2 * sizeof(T)) NAME { \
    T x, y;                            \
  };                                   \
  inline NAME make_##NAME(T x, T y) { return NAME{x, y}; }
#define BK_SIM_VECTOR4(NAME, T) \
  struct alignas(16) NAME {     \
    T x, y, z, w;               \
  };                            \
  inline NAME make_##NAME(T x, T y, T z, T w) { return NAME{x, y, z, w}; }
BK_SIM_VECTOR2(float2, float)
BK_SIM_VECTOR2(double2, double)
BK_SIM_VECTOR2(int2, int)
BK_SIM_VECTOR2(uint2, unsigned)
BK_SIM_VECTOR4(float4, float)
BK_SIM_VECTOR4(int4, int)
BK_SIM_VECTOR4(uint4, unsigned)
#undef BK_SIM_VECTOR2
#undef BK_SIM_VECTOR4

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#pragma GCC visibility push(hidden)

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace simt {

// ---- settings

enum class Order : int { forward = 0, reverse = 1, random = 2 };

struct Settings {
  Order order;                // of the threads of a block between two barriers, and of the blocks
  std::uint64_t seed;         // of Order::random
  std::uint8_t poison;        // fills shared memory before every block
  unsigned max_shared_bytes;  // per block, after opting in; 232448 as compute capability 9.0
};

// Starts from the environment: BAYES_KERNELS_SIM_ORDER (forward, reverse, random),
// BAYES_KERNELS_SIM_SEED, BAYES_KERNELS_SIM_POISON (0 to 255). Not to be changed while a launch
// runs.
Settings& settings();

// ---- what the macros and intrinsics stand on

void* static_shared(const void* site, const char* name, std::size_t bytes);
void* dynamic_shared();
void set_max_dynamic_shared(const void* kernel, std::size_t bytes);

void block_barrier(const char* file, int line);

// Linear index of the running thread in its warp.
unsigned lane_id();

// Rendezvous of the lanes of `mask`. The last lane to arrive calls combine(mask, payloads), which
// reads and writes the payloads of the lanes in the mask (the others are undefined), and then all
// go on. `combine` identifies the operation.
using Combine = void (*)(std::uint32_t mask, void* const* payloads);
void warp_collective(const char* name, std::uint32_t mask, void* payload, Combine combine,
                     const char* file, int line);
// As above, and orders shared-memory accesses among the lanes (only __syncwarp does).
void warp_barrier(std::uint32_t mask, const char* file, int line);

void copy_async_16(void* destination, const void* source, int bytes_valid, const char* file,
                   int line);
void copy_async_commit();
void copy_async_wait(int groups_in_flight);

// Whether the next launch may begin before the one in front of it has ended; its threads then wait
// before they touch global memory. Blocks run after one another here all the same.
void next_launch_is_behind(bool behind);
void wait_for_previous();

// 128 bytes of global memory that nobody reads any more: they become garbage.
void discard_128(void* address, const char* file, int line);

// For the checks of access_check.cpp and access_count.cpp.
void thread_fence();
void atomic_operation();

enum class MmaInput { bf16, fp16 };
void mma_m16n8k16(MmaInput input, float* d, const std::uint32_t* a, const std::uint32_t* b,
                  const char* file, int line);
void load_matrix(int count, bool transposed, std::uint32_t* out, const void* row, const char* file,
                 int line);
void transpose_matrix(int count, std::uint32_t* registers, const char* file, int line);

// Throws std::runtime_error; from inside a kernel the text is led by kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void run_grid(const char* kernel_name, const void* kernel, dim3 grid, dim3 block,
              std::size_t dynamic_bytes, void (*body)(void* arguments), void* arguments);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t dynamic_bytes, void* /*stream*/, Arguments&&... arguments) {
  // Converted once, then copied per thread, as kernel parameters are.
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, std::tuple<std::decay_t<Parameters>...>(std::forward<Arguments>(arguments)...)};
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "number of kernel arguments");
  run_grid(
      name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_bytes,
      [](void* pointer) {
        Call& c = *static_cast<Call*>(pointer);
        std::apply(c.kernel, c.arguments);
      },
      &call);
}

// ---- shuffles and votes

struct Shuffle {
  std::uint64_t bits;
  unsigned source;
  std::uint64_t result;
};
void combine_shuffle(std::uint32_t mask, void* const* payloads, const char* name);

struct ShuffleIndexed {
  static constexpr const char* name = "__shfl_sync";
  static unsigned source(unsigned lane, unsigned argument, unsigned width) {
    return (lane & ~(width - 1)) | (argument & (width - 1));
  }
};
struct ShuffleXor {
  static constexpr const char* name = "__shfl_xor_sync";
  static unsigned source(unsigned lane, unsigned argument, unsigned width) {
    const unsigned from = lane ^ argument;
    return from > (lane | (width - 1)) ? lane : from;
  }
};
struct ShuffleDown {
  static constexpr const char* name = "__shfl_down_sync";
  static unsigned source(unsigned lane, unsigned argument, unsigned width) {
    return (lane & (width - 1)) + argument >= width ? lane : lane + argument;
  }
};
struct ShuffleUp {
  static constexpr const char* name = "__shfl_up_sync";
  static unsigned source(unsigned lane, unsigned argument, unsigned width) {
    return (lane & (width - 1)) < argument ? lane : lane - argument;
  }
};

template <class Kind, class T>
T shuffle(std::uint32_t mask, T value, unsigned argument, int width, const char* file, int line) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 4- and 8-byte arithmetic types");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s (%s:%d): width must be a power of two from 1 to 32, got %d", Kind::name, file, line,
         width);
  }
  Shuffle payload{0, Kind::source(lane_id(), argument, static_cast<unsigned>(width)), 0};
  std::memcpy(&payload.bits, &value, sizeof(T));
  warp_collective(
      Kind::name, mask, &payload,
      [](std::uint32_t m, void* const* p) { combine_shuffle(m, p, Kind::name); }, file, line);
  std::memcpy(&value, &payload.result, sizeof(T));
  return value;
}

std::uint32_t ballot(const char* name, std::uint32_t mask, bool predicate, const char* file,
                     int line);

}  // namespace simt

#pragma GCC visibility pop

#define BK_SIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(BK_SIM_SITE) { simt::block_barrier(file, line); }
inline void __syncwarp(std::uint32_t mask = 0xffffffffu, BK_SIM_SITE) {
  simt::warp_barrier(mask, file, line);
}

template <class T>
inline T __shfl_sync(std::uint32_t mask, T value, int source, int width = 32, BK_SIM_SITE) {
  return simt::shuffle<simt::ShuffleIndexed>(mask, value, static_cast<unsigned>(source), width,
                                             file, line);
}
template <class T>
inline T __shfl_xor_sync(std::uint32_t mask, T value, int lanes, int width = 32, BK_SIM_SITE) {
  return simt::shuffle<simt::ShuffleXor>(mask, value, static_cast<unsigned>(lanes), width, file,
                                         line);
}
template <class T>
inline T __shfl_down_sync(std::uint32_t mask, T value, unsigned delta, int width = 32,
                          BK_SIM_SITE) {
  return simt::shuffle<simt::ShuffleDown>(mask, value, delta, width, file, line);
}
template <class T>
inline T __shfl_up_sync(std::uint32_t mask, T value, unsigned delta, int width = 32, BK_SIM_SITE) {
  return simt::shuffle<simt::ShuffleUp>(mask, value, delta, width, file, line);
}

inline unsigned __ballot_sync(std::uint32_t mask, int predicate, BK_SIM_SITE) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, file, line);
}
inline int __any_sync(std::uint32_t mask, int predicate, BK_SIM_SITE) {
  return simt::ballot("__any_sync", mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(std::uint32_t mask, int predicate, BK_SIM_SITE) {
  return simt::ballot("__all_sync", mask, predicate == 0, file, line) == 0;
}

#undef BK_SIM_SITE

// ---- memory

template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}
template <class T>
inline void __stcg(T* pointer, T value) {
  *pointer = value;
}
inline void __threadfence() { simt::thread_fence(); }
inline void __threadfence_block() {}

namespace simt {
template <class T>
inline T fetch_add(T* pointer, T value) {
  atomic_operation();
  // Through the builtin, so that the access check sees an atomic and reports no race.
  return __atomic_fetch_add(pointer, value, __ATOMIC_RELAXED);
}
}  // namespace simt
inline int atomicAdd(int* pointer, int value) { return simt::fetch_add(pointer, value); }
inline unsigned atomicAdd(unsigned* pointer, unsigned value) {
  return simt::fetch_add(pointer, value);
}
inline unsigned long long atomicAdd(unsigned long long* pointer, unsigned long long value) {
  return simt::fetch_add(pointer, value);
}

// ---- arithmetic

#define BK_SIM_MIN_MAX(T)                          \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
BK_SIM_MIN_MAX(int)
BK_SIM_MIN_MAX(unsigned)
BK_SIM_MIN_MAX(long)
BK_SIM_MIN_MAX(unsigned long)
BK_SIM_MIN_MAX(long long)
BK_SIM_MIN_MAX(unsigned long long)
#undef BK_SIM_MIN_MAX
// Of one number and a NaN the number is returned, as on the GPU.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)  // from then on <math.h> has them
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline void __trap() { simt::fail("__trap()"); }
inline void sincospif(float x, float* sine, float* cosine) {
  // Exact range reduction first: x - 2 round(x / 2) lies in [-1, 1].
  const double angle = (x - 2.0 * std::nearbyint(0.5 * x)) * 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>((static_cast<Wide>(a) * b) >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}

#define BK_SIM_BIT_CAST(NAME, TO, FROM)                    \
  inline TO NAME(FROM value) {                             \
    static_assert(sizeof(TO) == sizeof(FROM), "bit cast"); \
    TO result;                                             \
    std::memcpy(&result, &value, sizeof(result));          \
    return result;                                         \
  }
BK_SIM_BIT_CAST(__float_as_uint, unsigned, float)
BK_SIM_BIT_CAST(__uint_as_float, float, unsigned)
BK_SIM_BIT_CAST(__float_as_int, int, float)
BK_SIM_BIT_CAST(__int_as_float, float, int)
BK_SIM_BIT_CAST(__double_as_longlong, long long, double)
BK_SIM_BIT_CAST(__longlong_as_double, double, long long)
#undef BK_SIM_BIT_CAST
