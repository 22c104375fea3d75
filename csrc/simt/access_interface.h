// The functions of the ThreadSanitizer interface that -fsanitize=thread makes a kernel call before
// its loads and stores, for the one file of a program that defines
//
//     inline void instrumented(const void* address, std::size_t bytes, bool is_store,
//                              const void* site);
//
// in namespace simt before it includes this one. `site` is the place of the access in the code.
#pragma once

#include <cstddef>
#include <cstdint>

#define BK_TSAN extern "C" __attribute__((visibility("hidden")))
#define BK_TSAN_ACCESS(p, n, is_store) \
  simt::instrumented(p, n, is_store, __builtin_return_address(0))

#define BK_TSAN_SIZE(N)                                                           \
  BK_TSAN void __tsan_read##N(void* p) { BK_TSAN_ACCESS(p, N, false); }           \
  BK_TSAN void __tsan_write##N(void* p) { BK_TSAN_ACCESS(p, N, true); }           \
  BK_TSAN void __tsan_unaligned_read##N(void* p) { BK_TSAN_ACCESS(p, N, false); } \
  BK_TSAN void __tsan_unaligned_write##N(void* p) { BK_TSAN_ACCESS(p, N, true); } \
  BK_TSAN void __tsan_volatile_read##N(void* p) { BK_TSAN_ACCESS(p, N, false); }  \
  BK_TSAN void __tsan_volatile_write##N(void* p) { BK_TSAN_ACCESS(p, N, true); }
BK_TSAN_SIZE(1)
BK_TSAN_SIZE(2)
BK_TSAN_SIZE(4)
BK_TSAN_SIZE(8)
BK_TSAN_SIZE(16)

BK_TSAN void __tsan_read_range(void* p, std::size_t n) { BK_TSAN_ACCESS(p, n, false); }
BK_TSAN void __tsan_write_range(void* p, std::size_t n) { BK_TSAN_ACCESS(p, n, true); }
BK_TSAN void __tsan_vptr_read(void**) {}
BK_TSAN void __tsan_vptr_update(void**, void*) {}
BK_TSAN void __tsan_func_entry(void*) {}
BK_TSAN void __tsan_func_exit() {}
BK_TSAN void __tsan_init() {}

// The atomic operations a kernel can reach: atomicAdd, and the once-only start of function-local
// statics.
BK_TSAN std::uint32_t __tsan_atomic32_fetch_add(volatile std::uint32_t* p, std::uint32_t v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
BK_TSAN std::uint64_t __tsan_atomic64_fetch_add(volatile std::uint64_t* p, std::uint64_t v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
BK_TSAN std::uint8_t __tsan_atomic8_load(const volatile std::uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

#undef BK_TSAN_SIZE
#undef BK_TSAN_ACCESS
#undef BK_TSAN
