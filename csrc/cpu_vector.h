// Vectors of the instruction set that a kernel file is compiled for (cpu_isa.h), on GCC's vector
// extensions. Everything has internal linkage: a function compiled for one instruction set must
// never be picked by the linker for another.
#pragma once

#include "core/philox.h"
#include "core/portable.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bayes_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = VectorOf<A>::kLanes;

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsUnaligned
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));
typedef uint64_t LongBits __attribute__((vector_size(kVectorBytes)));

BK_HD Vec<float> load(const float* p) {
  return *reinterpret_cast<const VectorOf<float>::unaligned*>(p);
}
BK_HD Vec<double> load(const double* p) {
  return *reinterpret_cast<const VectorOf<double>::unaligned*>(p);
}
BK_HD Vec<float> load(const bf16* p) {
  const HalfBits bits = *reinterpret_cast<const HalfBitsUnaligned*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, WordBits) << 16);
}
BK_HD Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

BK_HD void store(float* p, Vec<float> v) { *reinterpret_cast<VectorOf<float>::unaligned*>(p) = v; }
BK_HD void store(double* p, Vec<double> v) {
  *reinterpret_cast<VectorOf<double>::unaligned*>(p) = v;
}
BK_HD void store(bf16* p, Vec<float> v) {
  // Round to nearest even; a NaN becomes the quiet one, as c10::BFloat16 does.
  const WordBits bits = reinterpret_cast<WordBits>(v);
  const WordBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const WordBits is_nan = reinterpret_cast<WordBits>(v != v);
  const WordBits out = (rounded & ~is_nan) | (is_nan & 0x7FC0u);
  *reinterpret_cast<HalfBitsUnaligned*>(p) = __builtin_convertvector(out, HalfBits);
}
BK_HD void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = static_cast<f16>(v[i]);
#endif
}

// Makes the compiler load v once, where it would rather repeat a memory operand in each use.
template <class V>
BK_HD V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// The first `count` elements; the lanes behind them are zero.
template <class T>
BK_HD Vec<acc_t<T>> load_part(const T* p, int64_t count) {
  Vec<acc_t<T>> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = static_cast<acc_t<T>>(p[i]);
  return v;
}
template <class T>
BK_HD void store_part(T* p, Vec<acc_t<T>> v, int64_t count) {
  T buffer[kLanes<acc_t<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// Negates the lanes of vector number `i` of a row whose sign bits start at `bits`, bit j for column
// j (the layout of a Philox block's words in little-endian memory).
#if defined(__AVX512F__)
BK_HD Vec<float> flip(Vec<float> v, const uint8_t* bits, int64_t i) {
  __mmask16 mask;
  memcpy(&mask, bits + 2 * i, 2);
  const __m512i w = reinterpret_cast<__m512i>(v);
  return reinterpret_cast<Vec<float>>(
      _mm512_mask_xor_epi32(w, mask, w, _mm512_set1_epi32(static_cast<int>(0x80000000u))));
}
BK_HD Vec<double> flip(Vec<double> v, const uint8_t* bits, int64_t i) {
  const __m512i w = reinterpret_cast<__m512i>(v);
  return reinterpret_cast<Vec<double>>(_mm512_mask_xor_epi64(
      w, bits[i], w, _mm512_set1_epi64(static_cast<long long>(0x8000000000000000ull))));
}
#else
template <class Bits, class V, int lanes>
BK_HD V flip_lanes(V v, const uint8_t* bits, int64_t i) {
  Bits lane, sign;
  for (int k = 0; k < lanes; ++k) {
    lane[k] = 1u << k;
    sign[k] = 1;
  }
  sign <<= 8 * sizeof(sign[0]) - 1;
  const uint32_t word = static_cast<uint32_t>(bits[i * lanes / 8]) >> (i * lanes % 8);
  const Bits selected = reinterpret_cast<Bits>(((Bits{} + word) & lane) == lane);
  return reinterpret_cast<V>(reinterpret_cast<Bits>(v) ^ (selected & sign));
}
BK_HD Vec<float> flip(Vec<float> v, const uint8_t* bits, int64_t i) {
  return flip_lanes<WordBits, Vec<float>, kLanes<float>>(v, bits, i);
}
BK_HD Vec<double> flip(Vec<double> v, const uint8_t* bits, int64_t i) {
  return flip_lanes<LongBits, Vec<double>, kLanes<double>>(v, bits, i);
}
#endif

// Folds two vectors into one. Before, each holds independent partial sums in blocks of 2 * half
// lanes; after, in blocks of half lanes, those of a and b alternating.
template <class A, int half>
BK_HD Vec<A> fold(Vec<A> a, Vec<A> b) {
  typedef decltype(a == b) Index;
  Index low, high;
  for (int i = 0; i < kLanes<A>; ++i) {
    const int block = i / (2 * half), inside = i % (2 * half);
    low[i] = block * 2 * half + (inside < half ? inside : inside - half + kLanes<A>);
    high[i] = low[i] + half;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// v[0], lane k: the sum of the lanes of v[k], for as many vectors as there are lanes. 2 half - 1
// folds in place of a horizontal sum for each vector; v is overwritten.
template <class A, int half = kLanes<A> / 2>
BK_HD Vec<A> lane_sums(Vec<A>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) v[i] = fold<A, half>(v[i], v[i + half]);
  if constexpr (half > 1) return lane_sums<A, half / 2>(v);
  return v[0];
}

// Vectors v[i] hold the elements of `size` interleaved sequences; after, v[k] holds sequence k.
template <class A, int size>
BK_HD void unzip(Vec<A>* v) {
  if constexpr (size > 1) {
    typedef decltype(v[0] == v[0]) Index;
    Index even, odd;
    for (int i = 0; i < kLanes<A>; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    Vec<A> e[size / 2], o[size / 2];
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) {
      e[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even);
      o[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    }
    unzip<A, size / 2>(e);
    unzip<A, size / 2>(o);
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) {
      v[2 * i] = e[i];
      v[2 * i + 1] = o[i];
    }
  }
}

// The inverse of unzip.
template <class A, int size>
BK_HD void zip(Vec<A>* v) {
  if constexpr (size > 1) {
    typedef decltype(v[0] == v[0]) Index;
    Index low, high;
    for (int i = 0; i < kLanes<A>; ++i) {
      low[i] = i / 2 + i % 2 * kLanes<A>;
      high[i] = low[i] + kLanes<A> / 2;
    }
    Vec<A> e[size / 2], o[size / 2];
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) {
      e[i] = v[2 * i];
      o[i] = v[2 * i + 1];
    }
    zip<A, size / 2>(e);
    zip<A, size / 2>(o);
#pragma GCC unroll 8
    for (int i = 0; i < size / 2; ++i) {
      v[2 * i] = __builtin_shuffle(e[i], o[i], low);
      v[2 * i + 1] = __builtin_shuffle(e[i], o[i], high);
    }
  }
}

// Products of the low 32 bits of each 64-bit lane.
BK_HD LongBits multiply_low(LongBits a, LongBits b) {
#if defined(__AVX512F__)
  return reinterpret_cast<LongBits>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<LongBits>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<LongBits>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Philox blocks of kPhiloxBatch indices at once. Block i is the 128-bit number of words
// (low[i], high[i]): its words 0 to 3 from the least significant bit up. One 64-bit lane works on
// one block: the 32-bit products come out where the next round needs them, and the upper halves of
// lanes that are only multiplied or shifted out again may hold anything.
constexpr int kPhiloxBatch = 4 * kLanes<uint64_t>;

BK_HD void philox_batch(Key key, const uint64_t* index, uint64_t* low, uint64_t* high) {
  constexpr int kVectors = kPhiloxBatch / kLanes<uint64_t>;
  LongBits c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = *reinterpret_cast<const VectorOf<uint64_t>::unaligned*>(index + v * kLanes<uint64_t>) +
            key.offset;
    c1[v] = c0[v] >> 32;
    c2[v] = c3[v] = LongBits{};
  }
  const LongBits m0 = LongBits{} + 0xD2511F53u, m1 = LongBits{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const LongBits s0 = LongBits{} + k0, s1 = LongBits{} + k1;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const LongBits p0 = multiply_low(c0[v], m0), p1 = multiply_low(c2[v], m1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ s0;
      c2[v] = (p0 >> 32) ^ c3[v] ^ s1;
      c1[v] = p1;
      c3[v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int v = 0; v < kVectors; ++v) {
    typedef VectorOf<uint64_t>::unaligned Out;
    *reinterpret_cast<Out*>(low + v * kLanes<uint64_t>) = (c0[v] & 0xFFFFFFFFu) | (c1[v] << 32);
    *reinterpret_cast<Out*>(high + v * kLanes<uint64_t>) = (c2[v] & 0xFFFFFFFFu) | (c3[v] << 32);
  }
}

// blocks[2 i], blocks[2 i + 1]: the Philox block of index[i]. Both arrays have room for a whole
// number of batches; what `index` holds behind `count` does not matter.
BK_HD void philox_blocks(Key key, const uint64_t* index, int64_t count, uint64_t* blocks) {
  for (int64_t first = 0; first < count; first += kPhiloxBatch) {
    uint64_t low[kPhiloxBatch], high[kPhiloxBatch];
    philox_batch(key, index + first, low, high);
    for (int i = 0; i < kPhiloxBatch; ++i) {
      blocks[2 * (first + i)] = low[i];
      blocks[2 * (first + i) + 1] = high[i];
    }
  }
}

}  // namespace
}  // namespace bayes_kernels
