// 8-bit activations with a scale for each 32 columns, as MXINT8 of the OCP Microscaling Formats
// specification 1.0: value = code . 2^(scale - 133), code an int8 in [-127, 127], scale a byte (the
// biased exponent; 255: the block has a number that is not finite or beyond 127 * 2^121, and all
// its values are NaN).
//
// Scales are powers of two, so that all of this is exact in every type of activation, and rounding
// up with the probability of the remainder leaves the mean of a value what it was.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "portable.h"

namespace bayes_kernels {

constexpr int kScaleBlock = 32;
constexpr int kRoundingPerBlock = 8;  // 16 bits of a Philox block decide one element
constexpr int kScaleNotFinite = 255;

// The largest code is 127, so that the block's largest number, in units of 2^(scale - 127), may be
// 127 / 64 at most.
BK_HD int scale_of_bits(uint32_t largest) {
  return static_cast<int>(largest >> 23) + ((largest & 0x007FFFFFu) > 0x007E0000u ? 1 : 0);
}
BK_HD int scale_of_bits(uint64_t largest) {
  const int biased = static_cast<int>(largest >> 52) - 1023 + 127;
  return biased + ((largest & 0x000FFFFFFFFFFFFFull) > 0x000FC00000000000ull ? 1 : 0);
}

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
  static constexpr uint64_t kMagnitude = 0x7FFFFFFFFFFFFFFFull;
};

// Bits of |v|: they order numbers by size, and those of NaN and infinity are the largest.
template <class A>
BK_HD typename BitsOf<A>::type magnitude_bits(A v) {
  typename BitsOf<A>::type bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits & BitsOf<A>::kMagnitude;
}

// Scale of a block of numbers of type T whose largest magnitude has these bits. The smallest one
// keeps values normal in fp32 and, of fp16, multiples of its smallest number, 2^-24.
template <class T, class Bits>
BK_HD int block_scale(Bits largest) {
  constexpr int least = std::is_same<T, f16>::value ? 109 : 7;
  const int scale = scale_of_bits(largest);
  return scale >= kScaleNotFinite ? kScaleNotFinite : scale < least ? least : scale;
}

// 2^(scale - 133) and its inverse, for finite scales.
BK_HD float power_of_two(int biased) {
  const uint32_t bits = static_cast<uint32_t>(biased) << 23;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
BK_HD float scale_step(int scale) { return power_of_two(scale - 6); }
BK_HD float scale_inverse(int scale) { return power_of_two(260 - scale); }

// The value of a code. Of fp16 it may be the power of two behind the largest number, in whose place
// that stands.
template <class T, class A>
BK_HD T code_value(int code, A step) {
  const A value = static_cast<A>(code) * step;
  if (std::is_same<T, f16>::value) {
    const A most = static_cast<A>(65504);
    return static_cast<T>(value > most ? most : value < -most ? -most : value);
  }
  return static_cast<T>(value);
}

// v rounded to one of its two neighbours among the codes: the upper one where the 16 bits, as a
// number in [0, 1), are below the remainder (rounded to 2^-16).
template <class A>
BK_HD int rounded_code(A v, A inverse, uint32_t bits) {
  const A q = v * inverse;
  int code = static_cast<int>(q);
  code -= static_cast<A>(code) > q ? 1 : 0;
  const A remainder = q - static_cast<A>(code);
  return code + (static_cast<A>(bits) + A(0.5) < remainder * A(65536) ? 1 : 0);
}

}  // namespace bayes_kernels
