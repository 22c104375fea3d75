// What the adapter kernels share on the device: noise of a token, 8-element loads and stores.
#pragma once

#include <type_traits>

#include "adapter.h"
#include "cuda_portable.h"
#include "lanes.cuh"

#ifndef BAYES_KERNELS_EVICT_FIRST
#define BAYES_KERNELS_EVICT_FIRST 1
#endif

namespace bayes_kernels {
namespace {

// Activations are read and written once by a kernel, but often again by the next one: q, k and v
// share x, and what an adapter writes is the next layer's input. Evict-first keeps the small
// operands in the caches; without it neighbours may find 16 MB (2,048 tokens of 4,096) in a 50 MB
// L2. Which is faster only a GPU can tell: build with BAYES_KERNELS_EVICT_FIRST=OFF for the other.
template <class V>
__device__ __forceinline__ V load_once(const V* at) {
#if BAYES_KERNELS_EVICT_FIRST
  return __ldcs(at);
#else
  return __ldg(at);
#endif
}
template <class V>
__device__ __forceinline__ void store_once(V* at, V value) {
#if BAYES_KERNELS_EVICT_FIRST
  __stcs(at, value);
#else
  *at = value;
#endif
}

// Noise as kernels take it: subkeys cost a Philox block each, so only those in use are derived.
__device__ __forceinline__ Key noise_key(const AdapterNoise& noise, Purpose purpose) {
  return subkey(load_key(noise.key), noise.stream, purpose);
}

// sign_row without its 64-bit division where every token has a row of its own.
__device__ __forceinline__ int64_t sign_row_of(const RowIds& rows, int64_t row) {
  if (rows.ids != nullptr) return __ldg(rows.ids + row);
  return rows.rows_per_id == 1 ? rows.row0 + row : rows.row0 + row / rows.rows_per_id;
}

// Bit i set: element i of the dropout block is kept.
__device__ __forceinline__ uint32_t kept_bits(const PhiloxBlock& b, uint32_t threshold) {
  uint32_t bits = 0;
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((b.word[i] & 0xFFFFu) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>((b.word[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

// fp16 holds 6e-8 to 65504: h, dh, A and E = std(rho) . eps leave that range in ordinary training.
// So the tensor-core kernels take them times a power of two, one for each operand, that brings the
// largest magnitude to 2^14 to 2^15, and divide sums by it. amax_kernel finds the magnitudes in
// kAmaxParts parts. Elsewhere `parts` is null, and all of this is gone for bf16.
constexpr int kAmaxParts = 64;

template <class T>
__device__ __forceinline__ float operand_scale(const float* parts) {
  if constexpr (!std::is_same<T, f16>::value) return 1.0f;
  if (parts == nullptr) return 1.0f;
  const int lane = static_cast<int>(threadIdx.x % 32);
  float most = fmaxf(__ldg(parts + lane), __ldg(parts + 32 + lane));
  BK_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
  const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;  // of zero: -127
  if (exponent <= -127 || exponent >= 128) return 1.0f;  // all zero or subnormal; infinite
  const int up = 14 - exponent;  // bounded, so that a product of two inverse scales is finite
  return __uint_as_float(static_cast<uint32_t>((up < -60 ? -60 : up > 60 ? 60 : up) + 127) << 23);
}

// Eight 16-bit elements in four registers; the lower half of a register is the earlier element.
struct Eight {
  uint32_t word[4];
};

// Bits 2i and 2i+1 of `byte` moved to bits 15 and 31 of word i: the sign bits of elements 2i, 2i+1.
// A product with two powers of two is two shifts and an or, since an eight-bit factor cannot carry.
__device__ __forceinline__ Eight flipped(const Eight& v, uint32_t byte) {
  constexpr uint32_t kSigns = 0x80008000u;
  return Eight{
      {v.word[0] ^ ((byte * 0x40008000u) & kSigns), v.word[1] ^ ((byte * 0x10002000u) & kSigns),
       v.word[2] ^ ((byte * 0x04000800u) & kSigns), v.word[3] ^ ((byte * 0x01000200u) & kSigns)}};
}

// Zero where the dropout block says so; the factor 1 / (1 - p) is applied to sums, in fp32.
__device__ __forceinline__ Eight dropped(const Eight& v, uint32_t keep) {
  Eight out;
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = (keep >> (2 * i) & 1u) != 0 ? 0xFFFFu : 0u;
    const uint32_t high = (keep >> (2 * i + 1) & 1u) != 0 ? 0xFFFF0000u : 0u;
    out.word[i] = v.word[i] & (low | high);
  }
  return out;
}

// `vector`: eight elements may be read at once (16-byte alignment, all inside the row).
template <class T>
__device__ __forceinline__ Eight load_8(const T* row, int64_t column, int64_t columns,
                                        bool vector) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  if (vector && column + 8 <= columns) {
    const uint4 v = load_once(reinterpret_cast<const uint4*>(row + column));
    return Eight{{v.x, v.y, v.z, v.w}};
  }
  Eight out{};
  BK_UNROLL
  for (int i = 0; i < 8; ++i)
    if (column + i < columns)
      out.word[i / 2] |= static_cast<uint32_t>(row[column + i].x) << (16 * (i % 2));
  return out;
}

template <class T>
__device__ __forceinline__ void store_8(T* row, int64_t column, int64_t columns, bool vector,
                                        const Eight& v) {
  if (vector && column + 8 <= columns) {
    store_once(reinterpret_cast<uint4*>(row + column),
               make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
    return;
  }
  BK_UNROLL
  for (int i = 0; i < 8; ++i)
    if (column + i < columns)
      row[column + i].x = static_cast<uint16_t>(v.word[i / 2] >> (16 * (i % 2)));
}

template <class T>
__device__ __forceinline__ uint32_t pack_2(float low, float high) {
  return static_cast<uint32_t>(T(low).x) | static_cast<uint32_t>(T(high).x) << 16;
}

template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int half) {
  T v;
  v.x = static_cast<uint16_t>(word >> (16 * half));
  return static_cast<float>(v);
}

}  // namespace
}  // namespace bayes_kernels
