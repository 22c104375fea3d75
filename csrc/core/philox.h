// The noise contract: every random number is a pure function of (key, stream, purpose, index).
//
// Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Keys, fold_in and normals are laid out like torch.func._random, so that torch is an oracle.
// The Python twin of this file is bayes_kernels/random.py; it documents the contract in one place.
#pragma once

#include <cmath>
#include <cstring>

#include "portable.h"

namespace bayes_kernels {

struct Key {
  uint64_t seed;
  uint64_t offset;
};

struct PhiloxBlock {
  uint32_t word[4];
};

// What a stream's numbers are used for. Each purpose has a key of its own: fold_in(key, 8 * stream
// + purpose).
enum Purpose : int {
  kNormal = 0,
  kSignIn = 1,
  kSignOut = 2,
  kDropout = 3,
  kLogit = 4,
  kDraw = 5,
  kRounding = 6
};
constexpr uint64_t kPurposes = 8;

constexpr int kSignsPerBlock = 128;
constexpr int kDropoutPerBlock = 8;  // 16 bits decide one element

BK_HD PhiloxBlock philox(Key key, uint64_t index) {
  const uint64_t counter = key.offset + index;
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

BK_HD Key fold_in(Key key, uint64_t data) {
  const PhiloxBlock b = philox(key, data);
  return Key{b.word[0] | static_cast<uint64_t>(b.word[1]) << 32,
             b.word[2] | static_cast<uint64_t>(b.word[3]) << 32};
}

BK_HD Key subkey(Key key, int64_t stream, Purpose purpose) {
  return fold_in(key, kPurposes * static_cast<uint64_t>(stream) + static_cast<uint64_t>(purpose));
}

BK_HD Key load_key(const int64_t* key) {
  return Key{static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])};
}

// In (0, 1], never 0, so that its logarithm is finite.
BK_HD float uniform(uint32_t word) {
  return static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
}

// log(u) for u in (0, 1]: branch-free, so that loops over it vectorise; within 2 ulp.
BK_HD float log_unit(float u) {
  uint32_t bits;
  memcpy(&bits, &u, 4);
  // Split u = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = bits - 0x3F3504F3u;
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const uint32_t mantissa = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
  float m;
  memcpy(&m, &mantissa, 4);
  const float f = m - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float ef = static_cast<float>(e);
  float y = f * z * p;
  y += ef * -2.12194440e-4f;
  y -= 0.5f * z;
  return (f + y) + ef * 0.693359375f;
}

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]; the reduction to an eighth of a turn is exact.
BK_HD void cos_sin_turn(float u, float* cosine, float* sine) {
  const int quarter = static_cast<int>(4.0f * u + 0.5f);
  const float t = (u - 0.25f * static_cast<float>(quarter)) * 6.28318530717958647692f;
  const float z = t * t;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swap = (quarter & 1) != 0;
  const float a = swap ? s : c;
  const float b = swap ? c : s;
  *cosine = ((quarter + 1) & 2) != 0 ? -a : a;
  *sine = (quarter & 2) != 0 ? -b : b;
}

// Of a number in [0, 45]; within an ulp.
BK_HD float unit_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // sqrtf takes eight instructions and a branch
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sqrtf(x);
#endif
}

// Box-Muller: two independent standard normals from two words.
BK_HD void normal_pair(uint32_t w0, uint32_t w1, float* n0, float* n1) {
  const float radius = unit_root(-2.0f * log_unit(uniform(w0)));
  float c, s;
  cos_sin_turn(uniform(w1), &c, &s);
  *n0 = radius * c;
  *n1 = radius * s;
}

// Normals 4 * block ... 4 * block + 3 of a subkey.
BK_HD void normal_block(Key sub, uint64_t block, float out[4]) {
  const PhiloxBlock b = philox(sub, block);
  normal_pair(b.word[0], b.word[1], &out[0], &out[1]);
  normal_pair(b.word[2], b.word[3], &out[2], &out[3]);
}

// The 128 signs of columns [128 * c, 128 * (c + 1)) of sign row `id`: column j is negative where
// bit j % 32 of word (j / 32) % 4 is set.
BK_HD PhiloxBlock sign_block(Key sub, int64_t id, int64_t columns, int64_t c) {
  return philox(
      sub, static_cast<uint64_t>(id) * static_cast<uint64_t>(ceil_div(columns, kSignsPerBlock)) +
               static_cast<uint64_t>(c));
}

// Dropout bits of columns [8 * c, 8 * (c + 1)) of token `row`: column j is kept where its 16 bits
// (low half of word (j % 8) / 2 for even j, high half for odd j) are >= the threshold.
BK_HD PhiloxBlock dropout_block(Key sub, int64_t row, int64_t columns, int64_t c) {
  return philox(
      sub, static_cast<uint64_t>(row) * static_cast<uint64_t>(ceil_div(columns, kDropoutPerBlock)) +
               static_cast<uint64_t>(c));
}

// The Philox block whose 16-bit halves, in order, decide how columns [8 * c, 8 * (c + 1)) of token
// `row` are rounded (core/microscale.h).
BK_HD uint64_t rounding_index(int64_t row, int64_t columns, int64_t c) {
  return static_cast<uint64_t>(row) * static_cast<uint64_t>(ceil_div(columns, 8)) +
         static_cast<uint64_t>(c);
}

BK_HD uint32_t dropout_threshold(double probability) {
  return static_cast<uint32_t>(probability * 65536.0 + 0.5);
}

// Numbered draws of a Gaussian tensor: the key of a draw's normals, given the subkey of purpose
// kDraw, and whether they are taken with the other sign. Antithetic draws come in pairs 2p, 2p + 1.
BK_HD int64_t draw_pair(int64_t draw, bool antithetic) { return antithetic ? draw >> 1 : draw; }
BK_HD bool draw_negative(int64_t draw, bool antithetic) { return antithetic && (draw & 1) != 0; }
BK_HD Key draw_key(Key sub, int64_t pair) { return fold_in(sub, static_cast<uint64_t>(pair)); }

// Which sign row a token uses: its own id where ids are given, else counted from row0, with
// `rows_per_id` successive tokens sharing one (1: token scope, tokens of an example: example
// scope).
struct RowIds {
  const int64_t* ids;  // may be null
  int64_t row0;
  int64_t rows_per_id;
};

BK_HD int64_t sign_row(const RowIds& rows, int64_t row) {
  return rows.ids != nullptr ? rows.ids[row] : rows.row0 + row / rows.rows_per_id;
}

// Dropout is drawn for each token: tokens are counted from that of sign row row0.
BK_HD int64_t dropout_row(const RowIds& rows, int64_t row) {
  return rows.row0 * rows.rows_per_id + row;
}

}  // namespace bayes_kernels
