// Warp-wide tensor-core instructions behind small wrappers: PTX under nvcc, a host twin in the
// emulator. All 32 lanes of a warp call each function together.
//
// clang-format off
//
// mma_m16n8k16<Element>(d, a, b): D (16 x 8, fp32) += A (16 x 16) B (16 x 8), A and B both
// c10::BFloat16 or both c10::Half (also by name: mma_m16n8k16_bf16, mma_m16n8k16_fp16).
// With g = lane / 4 and t = lane % 4 a lane holds (the low half of a register is the smaller
// column of A, the smaller row of B):
//
//   A, 16 rows x 16 columns            B, 16 rows x 8 columns       D, 16 rows x 8 columns
//            columns     columns                        column g             columns
//            2t, 2t+1    2t+8, 2t+9     rows 2t,   2t+1   b[0]               2t, 2t+1
//   row g      a[0]        a[2]         rows 2t+8, 2t+9   b[1]      row g    d[0], d[1]
//   row g+8    a[1]        a[3]                                     row g+8  d[2], d[3]
//
// mma_m8n8k4_f64(d, a, b): D (8 x 8, fp64) += A (8 x 4) B (4 x 8). A lane holds A[g][t] in a, B[t][g]
// in b, and D[g][2t], D[g][2t+1] in d. At full rate on data-centre GPUs only.
//
// ldmatrix_xK(r, row), K = 2 or 4: loads K matrices of 8 x 8 16-bit elements from shared memory.
// Lane 8 i + j passes the address of row j of matrix i (16 bytes, 16-byte aligned; x2 uses the
// addresses of lanes 0 to 15 only). Register i of a lane receives elements (g, 2t) and (g, 2t+1) of
// matrix i; in the _trans forms (2t, g) and (2t+1, g). Hence, for a tile in shared memory stored as
//
//   A, 16 (m) x 16 (k)   ldmatrix_x4        &tile[lane % 16][lane / 16 * 8]
//   A, 16 (k) x 16 (m)   ldmatrix_x4_trans  &tile[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]
//   B,  8 (n) x 16 (k)   ldmatrix_x2        &tile[lane % 8][lane / 8 % 2 * 8]
//   B, 16 (k) x  8 (n)   ldmatrix_x2_trans  &tile[lane % 16][0]
//
// movmatrix_trans_x4(r): each of the four registers is an 8 x 8 matrix of 16-bit elements, of which
// a lane holds (g, 2t) and (g, 2t+1); afterwards it holds (2t, g) and (2t+1, g).
//
// clang-format on
//
// Sources: PTX ISA, "Matrix Fragments for mma.m16n8k16", "mma.m8n8k4" (.f64), "ldmatrix" and
// "movmatrix".
//
// The host twin accumulates in fp32 in order of k. Hardware sums a k-slice with its own internal
// rounding, so results agree bitwise only where every partial sum is exact.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cuda_portable.h"

#ifdef BAYES_KERNELS_SIM

inline void mma_m16n8k16_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2], const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  ::simt::mma_m16n8k16(::simt::MmaInput::bf16, d, a, b, file, line);
}
inline void mma_m16n8k16_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                              const std::uint32_t (&b)[2], const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  ::simt::mma_m16n8k16(::simt::MmaInput::fp16, d, a, b, file, line);
}

inline void mma_m8n8k4_f64(double (&d)[2], double a, double b, const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  struct Payload {
    double a, b;
    double* d;
  } payload{a, b, d};
  ::simt::warp_collective(
      "mma_m8n8k4_f64", 0xffffffffu, &payload,
      [](std::uint32_t, void* const* payloads) {
        auto lane = [&](int i) -> Payload& { return *static_cast<Payload*>(payloads[i]); };
        for (int i = 0; i < 32; ++i)
          for (int e = 0; e < 2; ++e)
            for (int k = 0; k < 4; ++k)
              lane(i).d[e] += lane(i / 4 * 4 + k).a * lane((i % 4 * 2 + e) * 4 + k).b;
      },
      file, line);
}

#define BK_DEFINE_LDMATRIX(NAME, COUNT, TRANSPOSED)                                    \
  inline void NAME(std::uint32_t (&r)[COUNT], const void* row,                         \
                   const char* file = __builtin_FILE(), int line = __builtin_LINE()) { \
    ::simt::load_matrix(COUNT, TRANSPOSED, r, row, file, line);                        \
  }
BK_DEFINE_LDMATRIX(ldmatrix_x2, 2, false)
BK_DEFINE_LDMATRIX(ldmatrix_x2_trans, 2, true)
BK_DEFINE_LDMATRIX(ldmatrix_x4, 4, false)
BK_DEFINE_LDMATRIX(ldmatrix_x4_trans, 4, true)
#undef BK_DEFINE_LDMATRIX

inline void movmatrix_trans_x4(std::uint32_t (&r)[4], const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  ::simt::transpose_matrix(4, r, file, line);
}

#else  // CUDA

#define BK_DEFINE_MMA(NAME, TYPE)                                                     \
  __device__ __forceinline__ void NAME(float (&d)[4], const std::uint32_t (&a)[4],    \
                                       const std::uint32_t (&b)[2]) {                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE               \
                 ".f32 "                                                              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"  \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
BK_DEFINE_MMA(mma_m16n8k16_bf16, "bf16")
BK_DEFINE_MMA(mma_m16n8k16_fp16, "f16")
#undef BK_DEFINE_MMA

__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

#define BK_DEFINE_LDMATRIX_X2(NAME, TRANS)                                             \
  __device__ __forceinline__ void NAME(std::uint32_t (&r)[2], const void* row) {       \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0, %1}, [%2];\n" \
                 : "=r"(r[0]), "=r"(r[1])                                              \
                 : "r"(bk_shared_address(row))                                         \
                 : "memory");                                                          \
  }
#define BK_DEFINE_LDMATRIX_X4(NAME, TRANS)                                                     \
  __device__ __forceinline__ void NAME(std::uint32_t (&r)[4], const void* row) {               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0, %1, %2, %3}, [%4];\n" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                              \
                 : "r"(bk_shared_address(row))                                                 \
                 : "memory");                                                                  \
  }
BK_DEFINE_LDMATRIX_X2(ldmatrix_x2, "")
BK_DEFINE_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
BK_DEFINE_LDMATRIX_X4(ldmatrix_x4, "")
BK_DEFINE_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
#undef BK_DEFINE_LDMATRIX_X2
#undef BK_DEFINE_LDMATRIX_X4

__device__ __forceinline__ void movmatrix_trans_x4(std::uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;\n" : "+r"(r[i]));
}

#endif

// By element type: mma_m16n8k16<c10::BFloat16> or mma_m16n8k16<c10::Half>.
template <class Element>
#ifndef BAYES_KERNELS_SIM
__device__ __forceinline__
#else
inline
#endif
    void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(
      std::is_same<Element, c10::BFloat16>::value || std::is_same<Element, c10::Half>::value,
      "Element must be c10::BFloat16 or c10::Half");
  if constexpr (std::is_same<Element, c10::BFloat16>::value) {
    mma_m16n8k16_bf16(d, a, b);
  } else {
    mma_m16n8k16_fp16(d, a, b);
  }
}
