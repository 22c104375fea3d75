// Predict family on the CPU; compiled once per instruction set (cpu_isa.h).
//
// Few classes: the lanes of a vector are samples, so that a softmax has no sum across lanes. Many
// classes: the lanes are classes; the exponentials of one Philox block of samples (4, or 8 with
// their mirror images) stay in the cache until their normalisers are known. fp64, and full
// covariances of more than kMaxFull classes, take plain loops.
#include "predict.h"

#include <cmath>
#include <limits>

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

constexpr int64_t kNarrow = 64;  // classes up to which lanes are samples
constexpr int64_t kMaxRanges = 16;
constexpr int64_t kNarrowRange =
    256;  // groups of 4 draws in a task, at least, where there are more
constexpr int64_t kWideRange = 16;
constexpr int64_t kFlush = 16;            // vectors of draws in an fp32 sum, before fp64
constexpr int64_t kWideChunk = 1024;      // classes in an fp32 sum
constexpr int64_t kWaveBytes = 16 << 20;  // workspace of the tasks that run at the same time
constexpr float kLowest = -3e38f;         // below every log-probability
constexpr int64_t kPad = 16;              // classes are padded to whole vectors of any path

typedef int32_t IntBits __attribute__((vector_size(kVectorBytes)));

// --- vector mathematics ------------------------------------------------------------------------

BK_HD Vec<float> broadcast(float value) { return Vec<float>{} + value; }
BK_HD WordBits bits_of(Vec<float> v) { return reinterpret_cast<WordBits>(v); }
BK_HD Vec<float> float_of(WordBits v) { return reinterpret_cast<Vec<float>>(v); }

BK_HD Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xFFFF, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// log_unit of philox.h; right for every positive normal number.
BK_HD Vec<float> log_of(Vec<float> u) {
  const WordBits shifted = bits_of(u) - 0x3F3504F3u;
  const Vec<float> ef =
      __builtin_convertvector(reinterpret_cast<IntBits>(shifted) >> 23, Vec<float>);
  const Vec<float> f = float_of((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const Vec<float> z = f * f;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Vec<float> y = f * z * p;
  y += ef * -2.12194440e-4f;
  y -= 0.5f * z;
  return (f + y) + ef * 0.693359375f;
}

// exp(x) for |x| < 80: 2 ulp. Reduction by multiples of log 2 and Cephes' polynomial.
BK_HD Vec<float> exp_bounded(Vec<float> x) {
  const Vec<float> n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounds
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntBits exponent = __builtin_convertvector(n, IntBits) << 23;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IntBits>(p) + exponent);
}

// exp(x) for x <= 0; 0 where that is below the normal numbers.
BK_HD Vec<float> exp_negative(Vec<float> x) {
  const Vec<float> floor = broadcast(-87.0f);
  const auto small = x < floor;
  const WordBits kept =
      bits_of(exp_bounded(small ? floor : x)) & ~reinterpret_cast<WordBits>(small);
  return float_of(kept);
}

BK_HD Vec<float> largest(Vec<float> a, Vec<float> b) { return a > b ? a : b; }

BK_HD double sum_lanes(Vec<float> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// --- noise -------------------------------------------------------------------------------------

BK_HD void normal_vectors(WordBits w0, WordBits w1, Vec<float>* n0, Vec<float>* n1) {
  const auto unit = [](WordBits w) {
    return __builtin_convertvector(w, Vec<float>) * 2.3283064365386963e-10f +
           1.1641532182693481e-10f;
  };
  const Vec<float> radius = square_root(-2.0f * log_of(unit(w0)));
  // cos_sin_turn of philox.h.
  const Vec<float> u = unit(w1);
  const IntBits quarter = __builtin_convertvector(4.0f * u + 0.5f, IntBits);
  const Vec<float> t =
      (u - 0.25f * __builtin_convertvector(quarter, Vec<float>)) * 6.28318530717958647692f;
  const Vec<float> z = t * t;
  const Vec<float> s =
      ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * t + t;
  const Vec<float> c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const auto swap = (quarter & 1) != 0;
  const Vec<float> a = swap ? s : c, b = swap ? c : s;
  const WordBits a_sign = reinterpret_cast<WordBits>((quarter + 1) & 2) << 30;
  const WordBits b_sign = reinterpret_cast<WordBits>(quarter & 2) << 30;
  *n0 = radius * float_of(bits_of(a) ^ a_sign);
  *n1 = radius * float_of(bits_of(b) ^ b_sign);
}

// Philox blocks of `count` vectors of indices: index[2 v] holds those of the even lanes, index[2 v
// + 1] those of the odd ones. out[4 v + k]: normal k of every block of vector v.
template <int count>
BK_HD void normal_groups(Key key, const LongBits* index, Vec<float>* out) {
  LongBits c0[2 * count], c1[2 * count], c2[2 * count], c3[2 * count];
#pragma GCC unroll 4
  for (int v = 0; v < 2 * count; ++v) {
    c0[v] = index[v] + key.offset;
    c1[v] = c0[v] >> 32;
    c2[v] = c3[v] = LongBits{};
  }
  const LongBits m0 = LongBits{} + 0xD2511F53u, m1 = LongBits{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const LongBits s0 = LongBits{} + k0, s1 = LongBits{} + k1;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * count; ++v) {
      const LongBits p0 = multiply_low(c0[v], m0), p1 = multiply_low(c2[v], m1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ s0;
      c2[v] = (p0 >> 32) ^ c3[v] ^ s1;
      c1[v] = p1;
      c3[v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const auto merge = [](LongBits even, LongBits odd) {
    return reinterpret_cast<WordBits>((even & 0xFFFFFFFFu) | (odd << 32));
  };
#pragma GCC unroll 2
  for (int v = 0; v < count; ++v) {
    normal_vectors(merge(c0[2 * v], c0[2 * v + 1]), merge(c1[2 * v], c1[2 * v + 1]), &out[4 * v],
                   &out[4 * v + 1]);
    normal_vectors(merge(c2[2 * v], c2[2 * v + 1]), merge(c3[2 * v], c3[2 * v + 1]),
                   &out[4 * v + 2], &out[4 * v + 3]);
  }
}

// 0, 2, 4, ... times `stride`.
BK_HD LongBits even_steps(int64_t stride) {
  LongBits v;
  for (int i = 0; i < kLanes<uint64_t>; ++i) v[i] = static_cast<uint64_t>(2 * i * stride);
  return v;
}

// --- one example -------------------------------------------------------------------------------

enum class Mode { kBounded, kFree, kInvalid };

// Groups of draws [begin, end) of one example, and where their sums go.
template <class T>
struct Task {
  const PredictParams* p;
  int64_t row, begin, end;
  int64_t padded;   // classes
  double* sum;      // (padded) sums of exp(x) / N, or of exp(log p - shift)
  double* apart;    // (padded) sums of p - center over draws; null where not asked for
  double* squares;  // (padded) sums of (p - center)^2, likewise
  double* entropy;  // one number: sum over samples
  double* lower;    // (classes, classes) what factorise works in
  T* center;        // (padded) p of the task's first draw; of a bounded one p / weight
  T* shift;         // (padded), free mode only
  T* l;             // (padded) log-softmax of the mean
  T* weight;        // (padded) its exponential
  T* scale;         // (padded) standard deviations, or the (classes, classes) Cholesky factor
  T* tile;          // (4 or 8, padded)
};

int64_t groups_of(const PredictParams& p) { return ceil_div(draws_of(p), kGroup); }
bool plain_loops(const PredictParams& p) { return p.f64 || (p.full && p.classes > kMaxFull); }
int64_t ranges_of(const PredictParams& p) {
  if (p.full && p.classes > kMaxFull) return 1;  // each would factorise the covariance anew
  const int64_t ranges = ceil_div(groups_of(p), p.classes <= kNarrow ? kNarrowRange : kWideRange);
  return ranges < kMaxRanges ? ranges : kMaxRanges;
}
int64_t padded_of(const PredictParams& p) { return ceil_div(p.classes, kPad) * kPad; }
int64_t signs_of(const PredictParams& p) { return p.antithetic ? 2 : 1; }
int64_t scales_of(const PredictParams& p) { return p.full ? p.classes * p.classes : padded_of(p); }

int64_t task_bytes(const PredictParams& p) {
  const int64_t padded = padded_of(p);
  const bool error = p.standard_error != nullptr;
  const int64_t doubles = (error ? 3 : 1) * padded + 8 + (p.full ? p.classes * p.classes : 0);
  const int64_t values = (error ? 4 : 3) * padded + scales_of(p) + kGroup * signs_of(p) * padded;
  const int64_t bytes = 8 * doubles + (p.f64 ? 8 : 4) * values;
  return ceil_div(bytes, 64) * 64;
}

int64_t wave_rows(const PredictParams& p) {
  const int64_t rows = kWaveBytes / (task_bytes(p) * ranges_of(p));
  return rows < 1 ? 1 : rows < p.rows ? rows : p.rows;
}

template <class T>
Task<T> make_task(const PredictParams& p, int64_t slot, int64_t row, int64_t range) {
  Task<T> t{};
  char* base = static_cast<char*>(p.workspace) + slot * task_bytes(p);
  t.p = &p;
  t.row = row;
  const int64_t length = ceil_div(ceil_div(groups_of(p), ranges_of(p)), kPad) * kPad;
  t.begin = range * length < groups_of(p) ? range * length : groups_of(p);
  t.end = t.begin + length < groups_of(p) ? t.begin + length : groups_of(p);
  t.padded = padded_of(p);
  t.entropy = reinterpret_cast<double*>(base);
  t.sum = t.entropy + 8;
  double* end = t.sum + t.padded;
  if (p.standard_error != nullptr) {
    t.apart = end;
    t.squares = end + t.padded;
    end += 2 * t.padded;
  }
  t.lower = end;
  if (p.full) end += p.classes * p.classes;
  t.l = reinterpret_cast<T*>(end);
  t.weight = t.l + t.padded;
  t.shift = t.weight + t.padded;
  t.scale = t.shift + t.padded;
  t.tile = t.scale + scales_of(p);
  t.center = t.tile + kGroup * signs_of(p) * t.padded;  // behind the rest, where there is room
  return t;
}

// Lower Cholesky factor of a semi-definite matrix, column by column in fp64; reference.
// semidefinite_cholesky is its definition. False where the matrix is no covariance.
template <class T>
bool factorise(const T* cov, int64_t n, bool f64, double* lower, T* out) {
  for (int64_t i = 0; i < n * n; ++i) lower[i] = 0;
  const double unit = rounding_unit(f64);
  for (int64_t j = 0; j < n; ++j) {
    const double diagonal = cov[j * n + j];
    double pivot = diagonal;
    for (int64_t k = 0; k < j; ++k) pivot -= lower[j * n + k] * lower[j * n + k];
    if (pivot_is_bad(pivot, diagonal, unit)) return false;
    if (pivot_is_zero(pivot, diagonal, n, unit)) continue;
    lower[j * n + j] = sqrt(pivot);
    for (int64_t i = j + 1; i < n; ++i) {
      double value = cov[i * n + j];
      for (int64_t k = 0; k < j; ++k) value -= lower[i * n + k] * lower[j * n + k];
      lower[i * n + j] = value / lower[j * n + j];
    }
  }
  for (int64_t i = 0; i < n * n; ++i) out[i] = static_cast<T>(lower[i]);
  return true;
}

BK_HD float log_of(float v) { return log_unit(v); }
BK_HD double log_of(double v) { return log(v); }

BK_HD void exponentials(const float* x, float* out, int64_t padded) {
  for (int64_t c = 0; c < padded; c += kLanes<float>) store(out + c, exp_negative(load(x + c)));
}
BK_HD void exponentials(const double* x, double* out, int64_t padded) {
  for (int64_t c = 0; c < padded; ++c) out[c] = exp(x[c]);
}

// l_c of a class that is absent (mean -inf) or padding: its weight is 0, and 0 * l_c is 0.
template <class T>
T absent() {
  return sizeof(T) == sizeof(float) ? static_cast<T>(kAbsent) : static_cast<T>(-1e290);
}

// Fills l, weight and scale.
template <class T>
Mode prepare(const Task<T>& t) {
  const PredictParams& p = *t.p;
  const int64_t n = p.classes;
  const T* mean = static_cast<const T*>(p.mean) + t.row * n;
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t c = 0; c < n; ++c) top = mean[c] > top ? mean[c] : top;
  bool valid = top - top == 0;  // finite
  for (int64_t c = 0; c < n; ++c) {
    const T value = mean[c] - top;
    t.l[c] = value < absent<T>() ? absent<T>() : value;  // a NaN stays one
  }
  for (int64_t c = n; c < t.padded; ++c) t.l[c] = absent<T>();
  exponentials(t.l, t.weight, t.padded);
  double total = 0;
  for (int64_t c = 0; c < n; ++c) {
    total += static_cast<double>(t.weight[c]);
    valid = valid && t.l[c] == t.l[c];
  }
  const T log_total = static_cast<T>(log(total));
  for (int64_t c = 0; c < n; ++c) t.l[c] -= log_total;
  exponentials(t.l, t.weight, t.padded);
  double bound = 0;
  if (p.full) {
    const T* cov = static_cast<const T*>(p.cov) + t.row * n * n;
    if (!factorise(cov, n, p.f64, t.lower, t.scale)) return Mode::kInvalid;
    for (int64_t c = 0; c < n; ++c) {
      double reach = 0;
      for (int64_t k = 0; k <= c; ++k) reach += fabs(static_cast<double>(t.scale[c * n + k]));
      bound = reach > bound ? reach : bound;
    }
  } else {
    const T* var = static_cast<const T*>(p.cov) + t.row * n;
    T most = 0;
    bool proper = true;
    for (int64_t c = 0; c < n; ++c) {
      proper = proper && var[c] >= 0;
      most = var[c] > most ? var[c] : most;
    }
    valid = valid && proper && most - most == 0;
    for (int64_t c = 0; c < n; ++c) t.scale[c] = std::sqrt(var[c]);
    for (int64_t c = n; c < t.padded; ++c) t.scale[c] = 0;
    bound = std::sqrt(static_cast<double>(most));
  }
  if (!valid) return Mode::kInvalid;
  return bound <= kMaxScale && !plain_loops(p) ? Mode::kBounded : Mode::kFree;
}

// --- samples -----------------------------------------------------------------------------------

// Sums of the distance of probabilities from the center, and of its square, start at zero.
template <class T>
void clear_moments(const Task<T>& t, int64_t count) {
  if (t.squares == nullptr) return;
  for (int64_t c = 0; c < count; ++c) t.apart[c] = t.squares[c] = 0;
}

// One group of draws at a time, log-probabilities with a running maximum.
template <class T>
void sample_scalar(const Task<T>& t, Key key) {
  const PredictParams& p = *t.p;
  const int64_t n = p.classes, draws = draws_of(p);
  const int signs = p.antithetic ? 2 : 1;
  for (int64_t c = 0; c < n; ++c) {
    t.sum[c] = 0;
    t.shift[c] = -std::numeric_limits<T>::infinity();
  }
  clear_moments(t, n);
  double entropy = 0;
  for (int64_t group = t.begin; group < t.end; ++group) {
    for (int64_t c = 0; c < n; ++c) {
      float eps[4];
      normal_block(key, static_cast<uint64_t>(group * n + c), eps);
      for (int k = 0; k < kGroup; ++k) t.tile[k * t.padded + c] = static_cast<T>(eps[k]);
    }
    for (int64_t c = p.full ? n - 1 : -1; c >= 0; --c) {  // row c needs normals 0 to c only
      T x[kGroup] = {};
      for (int64_t j = 0; j <= c; ++j)
        for (int k = 0; k < kGroup; ++k) x[k] += t.scale[c * n + j] * t.tile[k * t.padded + j];
      for (int k = 0; k < kGroup; ++k) t.tile[k * t.padded + c] = x[k];
    }
    for (int k = 0; k < kGroup && group * kGroup + k < draws; ++k) {
      T* z = t.tile + k * t.padded;
      for (int64_t c = 0; c < n; ++c) {
        if (!p.full) z[c] *= t.scale[c];
      }
      T* mirror = t.tile + (kGroup + k) * t.padded;
      for (int64_t c = 0; c < n && signs == 2; ++c) mirror[c] = t.l[c] - z[c];
      for (int64_t c = 0; c < n; ++c) z[c] += t.l[c];
      for (int sign = 0; sign < signs; ++sign) {
        T* row = sign == 0 ? z : mirror;
        T top = row[0];
        for (int64_t c = 1; c < n; ++c) top = row[c] > top ? row[c] : top;
        double normaliser = 0, weighted = 0;
        for (int64_t c = 0; c < n; ++c) {
          const T value = row[c] - top;
          const double e = static_cast<double>(std::exp(value));
          normaliser += e;
          weighted += e * static_cast<double>(value);
        }
        entropy += log(normaliser) - weighted / normaliser;
        const T log_normaliser = top + static_cast<T>(log(normaliser));
        for (int64_t c = 0; c < n; ++c) {
          const T log_p = row[c] - log_normaliser;
          row[c] = log_p;
          const T up = log_p - t.shift[c];
          const double e = static_cast<double>(std::exp(-std::fabs(up)));
          if (up > 0) {
            t.sum[c] = t.sum[c] * e + 1.0;
            t.shift[c] = log_p;
          } else {
            t.sum[c] += e;
          }
        }
      }
      for (int64_t c = 0; c < n && t.squares != nullptr; ++c) {
        double probability = static_cast<double>(std::exp(z[c]));
        if (signs == 2)
          probability = 0.5 * (probability + static_cast<double>(std::exp(mirror[c])));
        if (group == t.begin && k == 0) t.center[c] = static_cast<T>(probability);
        const double d = probability - static_cast<double>(t.center[c]);
        t.apart[c] += d;
        t.squares[c] += d * d;
      }
    }
  }
  *t.entropy = entropy;
}

// fp32, few classes: lanes are groups of draws.
template <bool bounded, bool full, int signs>
void sample_narrow(const Task<float>& t, Key key) {
  constexpr int lanes = kLanes<float>, rows = kGroup * signs;
  const PredictParams& p = *t.p;
  const int64_t n = p.classes, draws = draws_of(p);
  Vec<float> tile[kNarrow * rows], sum[kNarrow], shift[bounded ? 1 : kNarrow];
  Vec<float> apart[kNarrow], squares[kNarrow];
  for (int64_t c = 0; c < n; ++c) {
    t.sum[c] = 0;
    t.shift[c] = kLowest;
  }
  clear_moments(t, n);
  const LongBits even = even_steps(n);
  double entropy = 0;
  for (int64_t block = t.begin; block < t.end; block += kFlush * lanes) {
    for (int64_t c = 0; c < n; ++c) {
      sum[c] = apart[c] = squares[c] = Vec<float>{};
      if (!bounded) shift[c] = broadcast(kLowest);
    }
    Vec<float> block_entropy = {};
    const int64_t stop = block + kFlush * lanes < t.end ? block + kFlush * lanes : t.end;
    for (int64_t first = block; first < stop; first += lanes) {
      LongBits index[2];
      index[0] = even + static_cast<uint64_t>(first * n);
      index[1] = index[0] + static_cast<uint64_t>(n);
      Vec<float> normaliser[rows] = {}, weighted[rows] = {}, top[rows];
      for (int k = 0; k < rows; ++k) top[k] = broadcast(kLowest);
      const auto use = [&](int64_t c, const Vec<float>* x) {
        const float l = t.l[c], weight = t.weight[c];
#pragma GCC unroll 8
        for (int k = 0; k < rows; ++k) {
          const Vec<float> noise = k < kGroup ? x[k] : -x[k - kGroup];
          if constexpr (!bounded) {
            tile[c * rows + k] = l + noise;
            top[k] = largest(top[k], l + noise);
            continue;
          }
          const Vec<float> e = exp_bounded(noise);
          tile[c * rows + k] = e;
          normaliser[k] += weight * e;
          weighted[k] += weight * e * (l + noise);
        }
      };
      for (int64_t c = 0; c < n; ++c) {
        Vec<float> x[kGroup];
        normal_groups<1>(key, index, x);
        index[0] += 1;
        index[1] += 1;
        if constexpr (full) {
          for (int k = 0; k < kGroup; ++k) tile[c * rows + k] = x[k];
        } else {
          for (int k = 0; k < kGroup; ++k) x[k] *= t.scale[c];
          use(c, x);
        }
      }
      // Row c of the factor needs normals 0 to c only: from the last class up, in place.
      for (int64_t c = full ? n - 1 : -1; c >= 0; --c) {
        Vec<float> x[kGroup] = {};
        for (int64_t j = 0; j <= c; ++j)
          for (int k = 0; k < kGroup; ++k) x[k] += t.scale[c * n + j] * tile[j * rows + k];
        use(c, x);
      }
      Vec<float> active[kGroup] = {};  // 1 for draws that exist
      for (int lane = 0; lane < lanes; ++lane)
        for (int k = 0; k < kGroup; ++k)
          active[k][lane] =
              first + lane < t.end && (first + lane) * kGroup + k < draws ? 1.0f : 0.0f;
      if constexpr (!bounded) {
        for (int64_t c = 0; c < n; ++c) {
#pragma GCC unroll 8
          for (int k = 0; k < rows; ++k) {
            const Vec<float> z = tile[c * rows + k] - top[k], e = exp_negative(z);
            normaliser[k] += e;
            weighted[k] += e * z;
          }
        }
        for (int k = 0; k < rows; ++k) {
          const Vec<float> log_sum = log_of(normaliser[k]);
          block_entropy += active[k % kGroup] * (log_sum - weighted[k] / normaliser[k]);
          top[k] += log_sum;
        }
        for (int64_t c = 0; c < n; ++c) {
          Vec<float> probability[rows], most = shift[c];
          for (int k = 0; k < rows; ++k) {
            // A draw that does not exist has probability zero.
            const Vec<float> log_p = tile[c * rows + k] - top[k];
            tile[c * rows + k] = active[k % kGroup] != 0.0f ? log_p : broadcast(kLowest);
            most = largest(most, tile[c * rows + k]);
          }
          Vec<float> total = sum[c] * exp_negative(shift[c] - most);
          for (int k = 0; k < rows; ++k) total += exp_negative(tile[c * rows + k] - most);
          sum[c] = total;
          shift[c] = most;
          if (t.squares == nullptr) continue;
          for (int k = 0; k < rows; ++k) probability[k] = exp_negative(tile[c * rows + k]);
          for (int k = 0; k < kGroup; ++k) {
            Vec<float> d = probability[k];
            if (signs == 2) d = 0.5f * (d + probability[k + rows - kGroup]);
            if (first == t.begin && k == 0) t.center[c] = d[0];
            d -= t.center[c] * active[k];
            apart[c] += d;
            squares[c] += d * d;
          }
        }
        continue;
      }
      Vec<float> inverse[rows];
      for (int k = 0; k < rows; ++k) {
        const Vec<float> one = 1.0f / normaliser[k];
        block_entropy += active[k % kGroup] * (log_of(normaliser[k]) - weighted[k] * one);
        inverse[k] = active[k % kGroup] * one;
      }
      for (int64_t c = 0; c < n; ++c) {
        const Vec<float>* e = tile + c * rows;
        Vec<float> total = e[0] * inverse[0];
#pragma GCC unroll 8
        for (int k = 1; k < rows; ++k) total += e[k] * inverse[k];
        sum[c] += total;
      }
      if (t.squares == nullptr) continue;
      for (int64_t c = 0; c < n; ++c) {
        const Vec<float>* e = tile + c * rows;
        for (int k = 0; k < kGroup; ++k) {
          Vec<float> ratio = e[k] * inverse[k];
          if (signs == 2)
            ratio = 0.5f * (ratio + e[k + rows - kGroup] * inverse[k + rows - kGroup]);
          if (first == t.begin && k == 0) t.center[c] = ratio[0];
          const Vec<float> d = t.weight[c] * (ratio - t.center[c] * active[k]);
          apart[c] += d;
          squares[c] += d * d;
        }
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      if constexpr (bounded) {
        t.sum[c] += sum_lanes(sum[c]);
      } else {
        float most = t.shift[c];
        for (int i = 0; i < lanes; ++i) most = shift[c][i] > most ? shift[c][i] : most;
        t.sum[c] = t.sum[c] * static_cast<double>(std::exp(t.shift[c] - most)) +
                   sum_lanes(sum[c] * exp_negative(shift[c] - most));
        t.shift[c] = most;
      }
      if (t.squares == nullptr) continue;
      t.apart[c] += sum_lanes(apart[c]);
      t.squares[c] += sum_lanes(squares[c]);
    }
    entropy += sum_lanes(block_entropy);
  }
  *t.entropy = entropy;
}

// fp32, many classes: lanes are classes.
template <bool bounded, int signs>
void sample_wide(const Task<float>& t, Key key) {
  constexpr int lanes = kLanes<float>, rows = kGroup * signs, step = 2 * lanes;
  const PredictParams& p = *t.p;
  const int64_t n = p.classes, draws = draws_of(p), padded = t.padded;
  for (int64_t c = 0; c < padded; ++c) {
    t.sum[c] = 0;
    t.shift[c] = kLowest;
  }
  clear_moments(t, padded);
  const LongBits even = even_steps(1);
  double entropy = 0;
  for (int64_t group = t.begin; group < t.end; ++group) {
    double normaliser[rows] = {}, weighted[rows] = {};
    Vec<float> top[rows];
    for (int k = 0; k < rows; ++k) top[k] = broadcast(kLowest);
    for (int64_t chunk = 0; chunk < padded; chunk += kWideChunk) {
      const int64_t stop = chunk + kWideChunk < padded ? chunk + kWideChunk : padded;
      Vec<float> chunk_normaliser[rows] = {}, chunk_weighted[rows] = {};
      const auto use = [&](int64_t c, const Vec<float>* eps) {
        const Vec<float> l = load(t.l + c), weight = load(t.weight + c), scale = load(t.scale + c);
#pragma GCC unroll 8
        for (int k = 0; k < rows; ++k) {
          const Vec<float> noise = (k < kGroup ? eps[k] : -eps[k - kGroup]) * scale;
          if constexpr (!bounded) {
            store(t.tile + k * padded + c, l + noise);
            top[k] = largest(top[k], l + noise);
            continue;
          }
          const Vec<float> e = exp_bounded(noise);
          store(t.tile + k * padded + c, e);
          chunk_normaliser[k] += weight * e;
          chunk_weighted[k] += weight * e * (l + noise);
        }
      };
      LongBits index[4];
      index[0] = even + static_cast<uint64_t>(group * n + chunk);
      index[1] = index[0] + 1;
      index[2] = index[0] + static_cast<uint64_t>(lanes);
      index[3] = index[1] + static_cast<uint64_t>(lanes);
      Vec<float> eps[2 * kGroup];
      int64_t c = chunk;
      for (; c + step <= stop; c += step) {
        normal_groups<2>(key, index, eps);
        for (LongBits& i : index) i += static_cast<uint64_t>(step);
        use(c, eps);
        use(c + lanes, eps + kGroup);
      }
      if (c < stop) {
        normal_groups<1>(key, index, eps);
        use(c, eps);
      }
      for (int k = 0; k < rows; ++k) {
        normaliser[k] += sum_lanes(chunk_normaliser[k]);
        weighted[k] += sum_lanes(chunk_weighted[k]);
      }
    }
    float inverse[rows], active[kGroup];
    for (int k = 0; k < kGroup; ++k) active[k] = group * kGroup + k < draws ? 1.0f : 0.0f;
    if constexpr (!bounded) {
      for (int k = 0; k < rows; ++k) {
        float* z = t.tile + k * padded;
        if (active[k % kGroup] == 0.0f) {  // a draw that does not exist has probability zero
          for (int64_t c = 0; c < padded; ++c) z[c] = kLowest;
          continue;
        }
        float most = kLowest;
        for (int i = 0; i < lanes; ++i) most = top[k][i] > most ? top[k][i] : most;
        double total = 0, entropy_total = 0;
        for (int64_t chunk = 0; chunk < padded; chunk += kWideChunk) {
          const int64_t stop = chunk + kWideChunk < padded ? chunk + kWideChunk : padded;
          Vec<float> chunk_total = {}, chunk_weighted = {};
          for (int64_t c = chunk; c < stop; c += lanes) {
            const Vec<float> down = load(z + c) - most, e = exp_negative(down);
            chunk_total += e;
            chunk_weighted += e * down;
          }
          total += sum_lanes(chunk_total);
          entropy_total += sum_lanes(chunk_weighted);
        }
        entropy += log(total) - entropy_total / total;
        const float log_normaliser = most + static_cast<float>(log(total));
        for (int64_t c = 0; c < padded; ++c) z[c] -= log_normaliser;
      }
      for (int64_t c = 0; c < padded; c += lanes) {
        Vec<float> most = load(t.shift + c);
        for (int k = 0; k < rows; ++k) most = largest(most, load(t.tile + k * padded + c));
        const Vec<float> before = exp_negative(load(t.shift + c) - most);
        Vec<float> total = {};
        for (int k = 0; k < rows; ++k) total += exp_negative(load(t.tile + k * padded + c) - most);
        store(t.shift + c, most);
        for (int i = 0; i < lanes; ++i)
          t.sum[c + i] =
              t.sum[c + i] * static_cast<double>(before[i]) + static_cast<double>(total[i]);
        if (t.squares == nullptr) continue;
        Vec<float> distance = {}, square = {};
        for (int k = 0; k < kGroup; ++k) {
          Vec<float> d = exp_negative(load(t.tile + k * padded + c));
          if (signs == 2)
            d = 0.5f * (d + exp_negative(load(t.tile + (k + rows - kGroup) * padded + c)));
          if (group == t.begin && k == 0) store(t.center + c, d);
          d -= load(t.center + c) * active[k];
          distance += d;
          square += d * d;
        }
        for (int i = 0; i < lanes; ++i) {
          t.apart[c + i] += static_cast<double>(distance[i]);
          t.squares[c + i] += static_cast<double>(square[i]);
        }
      }
      continue;
    }
    for (int k = 0; k < rows; ++k) {
      const bool exists = active[k % kGroup] != 0.0f;
      if (exists) entropy += log(normaliser[k]) - weighted[k] / normaliser[k];
      inverse[k] = exists ? static_cast<float>(1.0 / normaliser[k]) : 0.0f;
    }
    const float* __restrict tile = t.tile;
    double* __restrict sum = t.sum;
    for (int64_t c = 0; c < padded; ++c) {
      float total = 0;
#pragma GCC unroll 8
      for (int k = 0; k < rows; ++k) total += tile[k * padded + c] * inverse[k];
      sum[c] += static_cast<double>(total);
    }
    if (t.squares == nullptr) continue;
    double* __restrict apart = t.apart, * __restrict squares = t.squares;
    float* __restrict center = t.center;
    const auto ratio_of = [&](int k, int64_t c) {
      const float ratio = tile[k * padded + c] * inverse[k];
      if (signs == 1) return ratio;
      return 0.5f * (ratio + tile[(k + rows - kGroup) * padded + c] * inverse[k + rows - kGroup]);
    };
    if (group == t.begin)
      for (int64_t c = 0; c < padded; ++c) center[c] = ratio_of(0, c);
    for (int64_t c = 0; c < padded; ++c) {
      float distance = 0, square = 0;
#pragma GCC unroll 4
      for (int k = 0; k < kGroup; ++k) {
        const float d = t.weight[c] * (ratio_of(k, c) - center[c] * active[k]);
        distance += d;
        square += d * d;
      }
      apart[c] += static_cast<double>(distance);
      squares[c] += static_cast<double>(square);
    }
  }
  *t.entropy = entropy;
}

void sample(const Task<double>& t, Key key, Mode) { sample_scalar(t, key); }

template <bool bounded>
void sample_as(const Task<float>& t, Key key) {
  const bool pairs = t.p->antithetic;
  if (t.p->classes > kNarrow)
    pairs ? sample_wide<bounded, 2>(t, key) : sample_wide<bounded, 1>(t, key);
  else if (t.p->full)
    pairs ? sample_narrow<bounded, true, 2>(t, key) : sample_narrow<bounded, true, 1>(t, key);
  else
    pairs ? sample_narrow<bounded, false, 2>(t, key) : sample_narrow<bounded, false, 1>(t, key);
}

void sample(const Task<float>& t, Key key, Mode mode) {
  if (plain_loops(*t.p)) return sample_scalar(t, key);
  mode == Mode::kBounded ? sample_as<true>(t, key) : sample_as<false>(t, key);
}

// --- results -----------------------------------------------------------------------------------

// Adds the sums of an example's tasks (in the slots from t's on) and writes its results.
template <class T>
void finish(const Task<T>& t, int64_t slot, Mode mode) {
  const PredictParams& p = *t.p;
  const int64_t n = p.classes, at = t.row * n;
  const T* mean = static_cast<const T*>(p.mean) + at;
  T* log_probs = static_cast<T*>(p.log_probs) + at;
  T* error = p.standard_error == nullptr ? nullptr : static_cast<T*>(p.standard_error) + at;
  T* entropy = static_cast<T*>(p.entropy) + t.row;
  T* expected = static_cast<T*>(p.expected_entropy) + t.row;
  if (mode == Mode::kInvalid) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (int64_t c = 0; c < n; ++c) log_probs[c] = nan;
    for (int64_t c = 0; c < n && error != nullptr; ++c) error[c] = nan;
    *entropy = *expected = nan;
    return;
  }
  Task<T> tasks[kMaxRanges] = {t};
  const int64_t ranges = ranges_of(p);
  for (int64_t range = 1; range < ranges; ++range) {
    const Task<T>& other = tasks[range] = make_task<T>(p, slot + range, t.row, range);
    for (int64_t c = 0; c < n; ++c) {
      if (mode == Mode::kBounded) {
        t.sum[c] += other.sum[c];
      } else if (other.shift[c] > t.shift[c]) {
        t.sum[c] =
            t.sum[c] * static_cast<double>(std::exp(t.shift[c] - other.shift[c])) + other.sum[c];
        t.shift[c] = other.shift[c];
      } else if (other.sum[c] > 0) {
        t.sum[c] += other.sum[c] * static_cast<double>(std::exp(other.shift[c] - t.shift[c]));
      }
    }
    *t.entropy += *other.entropy;
  }
  const double samples = static_cast<double>(p.samples);
  const int64_t draws = draws_of(p);
  *expected = static_cast<T>(*t.entropy / samples);
  double total = 0;
  constexpr int64_t chunk = 256;
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t count = first + chunk < n ? chunk : n - first;
    T ratio[chunk], probability[chunk];
    const T* l = (mode == Mode::kBounded ? t.l : t.shift) + first;
    for (int64_t c = 0; c < count; ++c) ratio[c] = static_cast<T>(t.sum[first + c] / samples);
    for (int64_t c = 0; c < count; ++c) log_probs[first + c] = l[c] + log_of(ratio[c]);
    if (mode == Mode::kBounded) {
      for (int64_t c = 0; c < count; ++c) probability[c] = t.weight[first + c] * ratio[c];
    } else {
      for (int64_t c = 0; c < count; ++c) probability[c] = std::exp(log_probs[first + c]);
    }
    T part = 0;
    for (int64_t c = 0; c < count; ++c) part -= probability[c] * log_probs[first + c];
    total += static_cast<double>(part);
    for (int64_t c = 0; c < count && error != nullptr; ++c) {
      const double unit = mode == Mode::kBounded ? static_cast<double>(t.weight[first + c]) : 1.0;
      Moments all{};
      for (int64_t range = 0; range < ranges; ++range) {
        const Task<T>& part = tasks[range];
        const int64_t last = part.end * kGroup < draws ? part.end * kGroup : draws;
        const int64_t count = last - part.begin * kGroup;
        if (count <= 0) continue;
        all = merged(all, moments_about(unit * static_cast<double>(part.center[first + c]),
                                        static_cast<double>(count), part.apart[first + c],
                                        part.squares[first + c]));
      }
      error[first + c] = static_cast<T>(standard_error_of(all));
    }
    for (int64_t c = 0; c < count; ++c)
      if (mean[first + c] == -std::numeric_limits<T>::infinity())
        log_probs[first + c] = -std::numeric_limits<T>::infinity();
  }
  *entropy = static_cast<T>(total);
}

template <class T>
void predict(const PredictParams& p) {
  const int64_t ranges = ranges_of(p), wave = wave_rows(p);
  for (int64_t first = 0; first < p.rows; first += wave) {
    const int64_t rows = first + wave < p.rows ? wave : p.rows - first;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const Task<T> t = make_task<T>(p, slot, first + slot / ranges, slot % ranges);
        const Mode mode = prepare(t);
        if (mode != Mode::kInvalid) sample(t, logit_key(p, t.row), mode);
        if (ranges == 1) finish(t, slot, mode);
      }
    };
    const int64_t work = ceil_div(groups_of(p), ranges) * kGroup * p.classes;
    parallel_ranges(rows * ranges, 1 + 8192 / (work + 1), body);
    if (ranges == 1) continue;
    auto add = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Task<T> t = make_task<T>(p, row * ranges, first + row, 0);
        finish(t, row * ranges, prepare(t));
      }
    };
    parallel_ranges(rows, 1 + 4096 / p.classes, add);
  }
}

}  // namespace

int64_t BK_CPU(predict_workspace)(const PredictParams& p) {
  return wave_rows(p) * ranges_of(p) * task_bytes(p);
}

const char* BK_CPU(mc_predict)(const PredictParams& p, void*) {
  if (p.f64)
    predict<double>(p);
  else
    predict<float>(p);
  return nullptr;
}

}  // namespace bayes_kernels
