// Curvature family on the CPU; compiled once per instruction set (cpu_isa.h).
//
// A factor's rows are short (k numbers) and contiguous, the new rows are long. Nothing is
// transposed: products with the factor run over vectors of its rows, products of new rows over
// vectors of their length. One thread takes whole factors, so that sums have the same order for any
// thread count. Dense factors: see the second half.
#include "curvature.h"

#include <type_traits>

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

// Rows of the factor in one partial sum of the working precision; partial sums are added in fp64.
constexpr int64_t kChunk = 256;
// Accumulators: what fits the registers, and hides the latency of a multiply-add.
constexpr int kGroup = kVectorBytes == 64 ? 16 : 8;

constexpr int kPadded = kMaxSmall;  // row length of the small matrices; a multiple of 8

// Traces of Gram matrices between which no product has left the range of T, nor lost digits that
// show.
template <class T>
constexpr double kLeastTrace = sizeof(T) == 4 ? kLeastGramTrace : 1e-250;
template <class T>
constexpr double kMostTrace = sizeof(T) == 4 ? kMostGramTrace : 1e250;

template <class T>
struct Block {
  T* factor;
  const T* rows;
  int64_t d;
  int k, b, c;  // c = k + b

  // Vector v of row i of the factor. Lanes behind column k hold anything.
  Vec<T> vector(int64_t i, int v) const {
    const int64_t at = i * k + v * kLanes<T>;
    const int64_t left = d * k - at;
    return left >= kLanes<T> ? load(factor + at) : load_part(factor + at, left);
  }
};

// gram[first + s][j] += sum over rows i in [begin, end) of H[i][first + s] factor[i][j] for s <
// count and the j of vector v; the columns first, ... are the factor's, or new rows.
template <class T, int count>
void products_with_factor(const Block<T>& block, int first, int v, int64_t begin, int64_t end,
                          double* gram) {
  constexpr int kSteps = count <= kGroup / 2 ? 2 : 1;
  Vec<T> sum[kSteps][count];
  for (int t = 0; t < kSteps; ++t)
    for (int s = 0; s < count; ++s) sum[t][s] = Vec<T>{};
  const bool own = first < block.k;
  const T* from[count];
  for (int s = 0; s < count; ++s)
    from[s] = own ? block.factor + first + s : block.rows + (first - block.k + s) * block.d;
  // Rows whose vector ends within the factor.
  const int64_t last = block.d * block.k - (v + 1) * kLanes<T>;
  const int64_t inside = last < 0 ? 0 : last / block.k + 1;
  int64_t whole = end < inside ? end : inside;
  whole = whole > begin ? begin + (whole - begin) / kSteps * kSteps : begin;
  const T* at = block.factor + begin * block.k;
  const int offset = v * kLanes<T>;
  if (own) {
    for (int64_t i = begin; i < whole; i += kSteps)
      for (int t = 0; t < kSteps; ++t, at += block.k) {
        const Vec<T> row = in_register(load(at + offset));
        for (int s = 0; s < count; ++s) sum[t][s] += at[first + s] * row;
      }
  } else {
    for (int64_t i = begin; i < whole; i += kSteps)
      for (int t = 0; t < kSteps; ++t, at += block.k) {
        const Vec<T> row = in_register(load(at + offset));
        for (int s = 0; s < count; ++s) sum[t][s] += from[s][i + t] * row;
      }
  }
  for (int64_t i = whole; i < end; ++i) {
    const Vec<T> row = block.vector(i, v);
    for (int s = 0; s < count; ++s) sum[0][s] += from[s][own ? i * block.k : i] * row;
  }
  for (int s = 0; s < count; ++s) {
    if (kSteps == 2) sum[0][s] += sum[kSteps - 1][s];
    for (int l = 0; l < kLanes<T> && v * kLanes<T> + l < block.k; ++l)
      gram[(first + s) * kPadded + v * kLanes<T> + l] += static_cast<double>(sum[0][s][l]);
  }
}

// The same for `columns` columns of H, in groups of nearly equal size.
template <class T>
void products_with_factor(const Block<T>& block, int first, int columns, int64_t begin, int64_t end,
                          double* gram) {
  const int vectors = static_cast<int>(ceil_div(block.k, kLanes<T>));
  const int groups = static_cast<int>(ceil_div(columns, kGroup));
  for (int v = 0; v < vectors; ++v) {
    for (int g = 0; g < groups; ++g) {
      const int from = first + columns * g / groups;
      switch (first + columns * (g + 1) / groups - from) {
#define BK_COUNT(count)                                               \
  case count:                                                         \
    products_with_factor<T, count>(block, from, v, begin, end, gram); \
    break;
        BK_COUNT(1)
        BK_COUNT(2)
        BK_COUNT(3)
        BK_COUNT(4)
        BK_COUNT(5)
        BK_COUNT(6)
        BK_COUNT(7)
        BK_COUNT(8)
        BK_COUNT(9)
        BK_COUNT(10)
        BK_COUNT(11)
        BK_COUNT(12)
        BK_COUNT(13)
        BK_COUNT(14)
        BK_COUNT(15)
        BK_COUNT(16)
#undef BK_COUNT
      }
    }
  }
}

template <class T>
T lane_sum(Vec<T> v) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += v[l];
  return total;
}

// gram[k + p][k + q] += sum over i in [begin, end) of rows[p][i] rows[q][i], q <= p
template <class T>
void products_of_rows(const Block<T>& block, int64_t begin, int64_t end, double* gram) {
  constexpr int kTile = kVectorBytes == 64 ? 4 : 3;  // sums that fit the registers
  const int64_t whole = begin + (end - begin) / kLanes<T> * kLanes<T>;
  for (int p0 = 0; p0 < block.b; p0 += kTile) {
    for (int q0 = 0; q0 <= p0; q0 += kTile) {
      const T *left[kTile], *right[kTile];
      Vec<T> sum[kTile][kTile];
      for (int t = 0; t < kTile; ++t) {
        const int p = p0 + t < block.b ? p0 + t : block.b - 1;
        const int q = q0 + t < block.b ? q0 + t : block.b - 1;
        left[t] = block.rows + p * block.d;
        right[t] = block.rows + q * block.d;
        for (int u = 0; u < kTile; ++u) sum[t][u] = Vec<T>{};
      }
      auto add = [&](auto&& at) {
        Vec<T> y[kTile];
        for (int u = 0; u < kTile; ++u) y[u] = at(right[u]);
        for (int t = 0; t < kTile; ++t) {
          const Vec<T> x = in_register(at(left[t]));
          for (int u = 0; u < kTile; ++u) sum[t][u] += x * y[u];
        }
      };
      for (int64_t i = begin; i < whole; i += kLanes<T>)
        add([&](const T* row) { return load(row + i); });
      if (whole < end) add([&](const T* row) { return load_part(row + whole, end - whole); });
      for (int t = 0; t < kTile && p0 + t < block.b; ++t)
        for (int u = 0; u < kTile && q0 + u <= p0 + t; ++u)
          gram[(block.k + p0 + t) * kPadded + block.k + q0 + u] +=
              static_cast<double>(lane_sum<T>(sum[t][u]));
    }
  }
}

constexpr int kRows = 8;  // of the factor, computed at once

// Where rows of the factor are no longer than a vector: new rows as long as there are kRows of them
// and a vector behind them; returns the first row that is left.
template <class T>
int64_t apply_narrow(const Block<T>& block, const T* coefficients) {
  const int k = block.k, b = block.b;
  const int64_t size = block.d * k;
  int64_t first = 0;
  for (; (first + kRows) * k + kLanes<T> <= size; first += kRows) {
    T* at = block.factor + first * k;
    Vec<T> sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = Vec<T>{};
    const T* weights = coefficients;
    for (int s = 0; s < k; ++s, weights += kPadded) {
      const Vec<T> weight = in_register(load(weights));
      for (int i = 0; i < kRows; ++i) sum[i] += at[i * k + s] * weight;
    }
    const T* row = block.rows + first;
    for (int s = 0; s < b; ++s, weights += kPadded, row += block.d) {
      const Vec<T> weight = in_register(load(weights));
      for (int i = 0; i < kRows; ++i) sum[i] += row[i] * weight;
    }
    // A vector overwrites the start of the rows behind it: the next is stored after it, and what
    // follows the last is put back.
    const Vec<T> behind = in_register(load(at + kRows * k));
    for (int i = 0; i < kRows; ++i) store(at + i * k, sum[i]);
    store(at + kRows * k, behind);
  }
  return first;
}

// factor <- H coefficients, coefficients (c, kPadded) with zeros behind column k
template <class T>
void apply(const Block<T>& block, const T* coefficients) {
  const int vectors = static_cast<int>(ceil_div(block.k, kLanes<T>));
  T out[kRows][kPadded];
  int64_t first = vectors == 1 ? apply_narrow(block, coefficients) : 0;
  for (; first < block.d; first += kRows) {
    const int count = static_cast<int>(block.d - first < kRows ? block.d - first : kRows);
    T* at[kRows];  // behind the last row: the last once more, not stored
    int64_t row[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = first + (i < count ? i : count - 1);
      at[i] = block.factor + row[i] * block.k;
    }
    for (int v = 0; v < vectors; ++v) {
      const T* weights = coefficients + v * kLanes<T>;
      Vec<T> sum[kRows];
      for (int i = 0; i < kRows; ++i) sum[i] = Vec<T>{};
      for (int s = 0; s < block.k; ++s, weights += kPadded) {
        const Vec<T> weight = in_register(load(weights));
        for (int i = 0; i < kRows; ++i) sum[i] += at[i][s] * weight;
      }
      const T* rows = block.rows;
      for (int s = 0; s < block.b; ++s, weights += kPadded, rows += block.d) {
        const Vec<T> weight = in_register(load(weights));
        for (int i = 0; i < kRows; ++i) sum[i] += rows[row[i]] * weight;
      }
      for (int i = 0; i < kRows; ++i) store(out[i] + v * kLanes<T>, sum[i]);
    }
    // All products of these rows are taken.
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < block.k; ++j) at[i][j] = out[i][j];
  }
}

// The Gram matrix once more, where products of two numbers of H leave the range of T: of H over its
// largest entry, in fp64.
template <class T>
void scaled_gram(const Block<T>& block, double* gram) {
  double h[kPadded], most = 0;
  auto take = [&](int64_t i, double scale) {
    for (int s = 0; s < block.c; ++s)
      h[s] = scale * static_cast<double>(s < block.k ? block.factor[i * block.k + s]
                                                     : block.rows[(s - block.k) * block.d + i]);
  };
  for (int64_t i = 0; i < block.d; ++i) {
    take(i, 1);
    for (int s = 0; s < block.c; ++s) most = fabs(h[s]) > most ? fabs(h[s]) : most;
  }
  for (int i = 0; i < block.c; ++i)
    for (int j = 0; j < block.c; ++j) gram[i * kPadded + j] = 0;
  for (int64_t i = 0; i < block.d; ++i) {
    take(i, 1 / (most > 1e-300 ? most : 1e-300));
    for (int p = 0; p < block.c; ++p)
      for (int q = 0; q <= p; ++q) gram[p * kPadded + q] += h[p] * h[q];
  }
}

// Eigenvalues and orthonormal eigenvectors, the rows of r, of a symmetric positive semidefinite
// matrix a (n, kPadded) of trace 1, or zero, in no order: Householder's reduction to a tridiagonal
// matrix and implicit QL steps on it, every inner loop along a row. One thread has no use for the
// parallel order of symmetric_eigen's rotations, which are more work. a and work are used up. Golub
// and Van Loan, Matrix Computations, sections 8.3.1 and 8.3.3.
void tridiagonal_eigen(double* a, double* r, double* work, double* values, int n) {
  constexpr double kUlp = 1.1102230246251565e-16;
  // Lengths of vectors that count as zero: the columns behind those that span a matrix of low rank
  // shrink by 1e-16 each, until their squares have no digits left.
  constexpr double kNoLength = 1e-100;
  double beta[kPadded], side[kPadded], w[kPadded];
  double norm = 0;
  for (int j = 0; j + 2 < n; ++j) {
    double* v = a + j * kPadded;  // row j, whose part behind the diagonal becomes the reflector
    double squares = 0;
    for (int i = j + 2; i < n; ++i) squares += v[i] * v[i];
    beta[j] = 0;
    side[j] = v[j + 1];
    if (squares <= kNoLength * kNoLength) continue;
    const double length = sqrt(v[j + 1] * v[j + 1] + squares);
    side[j] = v[j + 1] > 0 ? -length : length;
    v[j + 1] -= side[j];
    beta[j] = 2 / (v[j + 1] * v[j + 1] + squares);
    for (int i = j + 1; i < n; ++i) w[i] = 0;
    for (int i = j + 1; i < n; ++i) {
      const double* row = a + i * kPadded;
      const double scale = beta[j] * v[i];
      for (int l = j + 1; l < n; ++l) w[l] += scale * row[l];
    }
    double product = 0;
    for (int i = j + 1; i < n; ++i) product += w[i] * v[i];
    product *= beta[j] / 2;
    for (int i = j + 1; i < n; ++i) w[i] -= product * v[i];
    for (int i = j + 1; i < n; ++i) {
      double* row = a + i * kPadded;
      const double left = v[i], right = w[i];
      for (int l = j + 1; l < n; ++l) row[l] -= left * w[l] + right * v[l];
    }
  }
  if (n >= 2) side[n - 2] = a[(n - 2) * kPadded + n - 1];
  side[n - 1] = 0;
  for (int i = 0; i < n; ++i) {
    values[i] = a[i * kPadded + i];
    norm += fabs(values[i]) + fabs(side[i]);
  }
  // The product of the reflectors, from the last on, which touches the trailing part only.
  double* q = work;
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < n; ++l) q[i * kPadded + l] = i == l;
  for (int j = n - 3; j >= 0; --j) {
    if (beta[j] == 0) continue;
    const double* v = a + j * kPadded;
    for (int l = j + 1; l < n; ++l) w[l] = 0;
    for (int i = j + 1; i < n; ++i)
      for (int l = j + 1; l < n; ++l) w[l] += v[i] * q[i * kPadded + l];
    for (int i = j + 1; i < n; ++i) {
      const double scale = beta[j] * v[i];
      for (int l = j + 1; l < n; ++l) q[i * kPadded + l] -= scale * w[l];
    }
  }
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < n; ++l) r[i * kPadded + l] = q[l * kPadded + i];
  for (int low = 0; low < n; ++low) {
    for (int iteration = 0; iteration < 60; ++iteration) {  // two or three are usual; a NaN ends it
      int high = low;  // the matrix falls apart behind row `high`
      while (high + 1 < n) {
        const double near = fabs(values[high]) + fabs(values[high + 1]);
        if (fabs(side[high]) <= kUlp * near || fabs(side[high]) <= 1e-2 * kUlp * norm) break;
        ++high;
      }
      if (high == low) break;
      const double half = (values[low + 1] - values[low]) / (2 * side[low]);
      const double root = sqrt(half * half + 1);
      const double shift = values[low] - side[low] / (half + (half < 0 ? -root : root));
      double x = values[high] - shift;  // the pair that the next rotation makes (length, 0)
      double sine = 1, cosine = 1, moved = 0;
      bool split = false;
      for (int i = high - 1; i >= low; --i) {
        const double z = sine * side[i], y = cosine * side[i];
        const double length = sqrt(x * x + z * z);
        side[i + 1] = length;
        if (length <= kNoLength) {
          values[i + 1] -= moved;
          split = true;
          break;
        }
        sine = z / length;
        cosine = x / length;
        const double base = values[i + 1] - moved;
        const double turn = (values[i] - base) * sine + 2 * cosine * y;
        moved = sine * turn;
        values[i + 1] = base + moved;
        x = cosine * turn - y;
        double* __restrict__ upper = r + i * kPadded;
        double* __restrict__ lower = r + (i + 1) * kPadded;
        for (int l = 0; l < n; ++l) {
          const double e = upper[l], f = lower[l];
          lower[l] = sine * e + cosine * f;
          upper[l] = cosine * e - sine * f;
        }
      }
      side[high] = 0;
      if (split) continue;
      values[low] -= moved;
      side[low] = x;
    }
  }
}

double trace_of(const double* gram, int n) {
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += gram[i * kPadded + i];
  return trace;
}

template <class T>
void update(const LowRankItem& item) {
  alignas(64) double gram[kPadded * kPadded];
  alignas(64) double vectors[kPadded * kPadded], work[kPadded * kPadded];
  alignas(64) T coefficients[kPadded * kPadded];
  double values[kPadded];
  for (int64_t done = 0; done < item.n; done += kBlockRows) {
    Block<T> block{};
    block.factor = static_cast<T*>(item.factor);
    block.rows = static_cast<const T*>(item.rows) + done * item.d;
    block.d = item.d;
    block.k = static_cast<int>(item.k);
    block.b = static_cast<int>(item.n - done < kBlockRows ? item.n - done : kBlockRows);
    block.c = block.k + block.b;
    for (int i = 0; i < block.c; ++i)
      for (int j = 0; j < block.c; ++j) gram[i * kPadded + j] = 0;
    for (int64_t i = 0; i < block.d; i += kChunk) {
      const int64_t end = i + kChunk < block.d ? i + kChunk : block.d;
      products_with_factor(block, 0, block.k, i, end, gram);
      products_with_factor(block, block.k, block.b, i, end, gram);
      products_of_rows(block, i, end, gram);
    }
    // The lower triangle is there. The trace becomes 1, far from the ends of the range.
    double trace = trace_of(gram, block.c);
    if (!(trace > kLeastTrace<T> && trace < kMostTrace<T>)) {
      scaled_gram(block, gram);
      trace = trace_of(gram, block.c);
    }
    const double scale = trace > 0 ? 1 / trace : 1;
    for (int i = 0; i < block.c; ++i)
      for (int j = 0; j <= i; ++j)
        gram[j * kPadded + i] = gram[i * kPadded + j] = gram[i * kPadded + j] * scale;
    tridiagonal_eigen(gram, vectors, work, values, block.c);
    for (int s = 0; s < block.c; ++s)
      for (int j = 0; j < kPadded; ++j) coefficients[s * kPadded + j] = 0;
    for (int i = 0; i < block.c; ++i) {
      int rank = 0;  // a NaN gives rank 0, and NaN in the factor
      for (int j = 0; j < block.c; ++j)
        rank += values[j] > values[i] || (values[j] == values[i] && j < i);
      if (rank >= block.k) continue;
      for (int s = 0; s < block.c; ++s)
        coefficients[s * kPadded + rank] = static_cast<T>(vectors[i * kPadded + s]);
    }
    apply(block, coefficients);
  }
}

// --- dense factors
//
// A panel of rows, converted and weighted, lies in the first-level cache while all tiles of the
// upper triangle take it; its fp32 sums are added to fp64 ones. Rows of a panel follow one another
// without padding: lanes behind column d, and behind row d of a tile, hold products of other
// numbers, which nobody reads.

constexpr int64_t kSegment = 2048;             // rows of one task: a constant, for fixed bits
constexpr int kPanelRows = 64;                 // at most: the terms of a sum in fp32
constexpr int kPanelNumbers = 48 * kMaxDense;  // 24 KB in fp32; the narrower, the more rows
constexpr int kTileRows = 8;
constexpr int kSlack = 16 + kTileRows;  // what may be read behind the last row of a panel
// Multiply-adds that are worth a thread.
constexpr int64_t kThreadWork = 1 << 18;

constexpr int64_t round_to(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A sum of products of one item: (round_to(d, kTileRows), width_of(d)) doubles.
template <class A>
int64_t width_of(int64_t d) {
  return round_to(d, kLanes<A> > kTileRows ? kLanes<A> : kTileRows);
}
template <class A>
int64_t sum_size(int64_t d) {
  return round_to(d, kTileRows) * width_of<A>(d);
}
int64_t segments_of(const KronItem& item) { return ceil_div(item.n, kSegment); }

// out = scale x, up to a vector too many; `readable` numbers may be read.
template <class T, class A>
void scaled_copy(const T* x, int64_t count, int64_t readable, A scale, A* out) {
  int64_t i = 0;
  for (; i < count && i + kLanes<A> <= readable; i += kLanes<A>)
    store(out + i, scale * load(x + i));
  if (i < count) store(out + i, scale * load_part(x + i, readable - i));
}

// The next rows of non-zero weight, at most `most`, as numbers of A; `row` moves behind them.
template <class T, class A>
const A* take_panel(const KronItem& item, int most, int64_t end, int64_t* row, A* buffer,
                    int* count) {
  const T* x = static_cast<const T*>(item.rows) + *row * item.d;
  const A* weights = static_cast<const A*>(item.weights);
  int64_t readable = (item.n - *row) * item.d;
  if (weights == nullptr) {
    *count = static_cast<int>(end - *row < most ? end - *row : most);
    *row += *count;
    const int64_t numbers = *count * item.d;
    if constexpr (std::is_same<T, A>::value) {
      if (numbers + kSlack <= readable) return x;
    }
    scaled_copy(x, numbers, readable, A(1), buffer);
  } else {
    *count = 0;
    for (int64_t run = 1; *row < end && *count < most; *row += run) {
      const A weight = weights[*row];
      run = 1;  // rows of one weight
      while (*row + run < end && *count + run < most && weights[*row + run] == weight) ++run;
      if (weight != 0) {
        scaled_copy(x, run * item.d, readable, static_cast<A>(sqrt(weight)),
                    buffer + *count * item.d);
        *count += static_cast<int>(run);
      }
      x += run * item.d;
      readable -= run * item.d;
    }
  }
  for (int i = 0; i < kSlack; ++i) buffer[*count * item.d + i] = 0;
  return buffer;
}

BK_HD void add_to(double* sum, Vec<double> v) { store(sum, load(sum) + v); }
BK_HD void add_to(double* sum, Vec<float> v) {
  // Written out, since g++ 12 converts two lanes at a time.
#if defined(__AVX512F__)
  add_to(sum, _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, v, 0)));
  add_to(sum + kLanes<double>,
         _mm512_maskz_cvtps_pd(0xFF, _mm512_maskz_extractf32x8_ps(0xFF, v, 1)));
#elif defined(__AVX2__)
  add_to(sum, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  add_to(sum + kLanes<double>, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  for (int l = 0; l < kLanes<float>; ++l) sum[l] += static_cast<double>(v[l]);
#endif
}

// sum (rows, vectors) += those columns of panel^T panel: rows from i, columns from j on.
template <class A, int rows, int vectors>
void outer_tile(const A* panel, int count, int64_t d, int64_t i, int64_t j, double* sum,
                int64_t width) {
  Vec<A> acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) acc[r][b] = Vec<A>{};
  const A* left = panel + i;
  const A* right = panel + j;
  for (int k = 0; k < count; ++k, left += d, right += d) {
    Vec<A> v[vectors];
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) v[b] = in_register(load(right + b * kLanes<A>));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int b = 0; b < vectors; ++b) acc[r][b] += left[r] * v[b];
  }
  sum += i * width + j;
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) add_to(sum + r * width + b * kLanes<A>, acc[r][b]);
}

// sum += panel^T panel, tiles on and above the diagonal.
template <class A>
void outer_products(const A* panel, int count, int64_t d, double* sum) {
  // Two vectors and as many rows as registers hold.
  constexpr int kPairRows = kVectorBytes == 64 ? kTileRows : kTileRows / 2;
  const int64_t width = width_of<A>(d);
  for (int64_t i = 0; i < d; i += kTileRows) {
    int64_t j = i / kLanes<A> * kLanes<A>;
    for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>)
      for (int r = 0; r < kTileRows; r += kPairRows)
        outer_tile<A, kPairRows, 2>(panel, count, d, i + r, j, sum, width);
    if (j < width) outer_tile<A, kTileRows, 1>(panel, count, d, i, j, sum, width);
  }
}

template <class T, class A>
void sum_segment(const KronItem& item, int64_t begin, int64_t end, double* sum) {
  alignas(64) A buffer[kPanelNumbers + kSlack];
  const Vec<double> zero = in_register(Vec<double>{});
  for (int64_t i = 0; i < sum_size<A>(item.d); i += kLanes<double>) store(sum + i, zero);
  const int64_t fitting = kPanelNumbers / item.d;
  const int most = static_cast<int>(fitting < kPanelRows ? fitting : kPanelRows);
  for (int64_t row = begin; row < end;) {
    int count = 0;
    const A* panel = take_panel<T, A>(item, most, end, &row, buffer, &count);
    if (count > 0) outer_products(panel, count, item.d, sum);
  }
}

template <class A>
void sum_segment(const KronItem& item, int64_t begin, int64_t end, double* sum) {
  if constexpr (std::is_same<A, double>::value) {
    sum_segment<double, double>(item, begin, end, sum);
  } else {
    if (item.dtype == DType::kF32) sum_segment<float, float>(item, begin, end, sum);
    if (item.dtype == DType::kBF16) sum_segment<bf16, float>(item, begin, end, sum);
    if (item.dtype == DType::kF16) sum_segment<f16, float>(item, begin, end, sum);
  }
}

// factor <- beta factor + alpha (sum of its segments, which lie one behind another)
template <class A>
void add_segments(const KronItem& item, double beta, double alpha, double* sums) {
  const int64_t d = item.d, width = width_of<A>(d), size = sum_size<A>(d);
  A* factor = static_cast<A*>(item.factor);
  for (int64_t segment = 1; segment < segments_of(item); ++segment)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[segment * size + i];
  for (int64_t i = 0; i < d; ++i) {
    A* row = factor + i * d;
    const double* sum = sums + i * width;
    if (item.n == 0)
      for (int64_t j = i; j < d; ++j)
        row[j] = beta == 0 ? A(0) : static_cast<A>(beta * static_cast<double>(row[j]));
    else if (beta == 0)
      for (int64_t j = i; j < d; ++j) row[j] = static_cast<A>(alpha * sum[j]);
    else
      for (int64_t j = i; j < d; ++j)
        row[j] = static_cast<A>(beta * static_cast<double>(row[j]) + alpha * sum[j]);
    for (int64_t j = 0; j < i; ++j) row[j] = factor[j * d + i];
  }
}

template <class A>
int64_t workspace_of(const KronParams& p) {
  int64_t total = 0;
  for (int64_t i = 0; i < p.n_items; ++i)
    total += segments_of(p.items[i]) * sum_size<A>(p.items[i].d);
  return total * static_cast<int64_t>(sizeof(double));
}

// Calls visit(item, segment, start of the item's sums) for tasks [begin, end), in order; a task is
// a segment of rows, or, where `whole`, an item.
template <class A, class Visit>
void for_tasks(const KronParams& p, bool whole, int64_t begin, int64_t end, const Visit& visit) {
  double* sums = static_cast<double*>(p.workspace);
  int64_t first = 0;  // task of the item
  for (int64_t i = 0; i < p.n_items && first < end; ++i) {
    const KronItem& item = p.items[i];
    const int64_t tasks = whole ? 1 : segments_of(item);
    for (int64_t s = begin > first ? begin - first : 0; s < tasks && first + s < end; ++s)
      visit(item, s, sums);
    first += tasks;
    sums += segments_of(item) * sum_size<A>(item.d);
  }
}

template <class A>
void run_kron(const KronParams& p) {
  int64_t tasks = 0, work = 0;
  for (int64_t i = 0; i < p.n_items; ++i) {
    tasks += segments_of(p.items[i]);
    work += p.items[i].n * p.items[i].d * p.items[i].d;
  }
  auto multiply = [&](int64_t begin, int64_t end) {
    for_tasks<A>(p, false, begin, end, [](const KronItem& item, int64_t segment, double* sums) {
      const int64_t first = segment * kSegment;
      const int64_t last = first + kSegment < item.n ? first + kSegment : item.n;
      sum_segment<A>(item, first, last, sums + segment * sum_size<A>(item.d));
    });
  };
  auto add = [&](int64_t begin, int64_t end) {
    for_tasks<A>(p, true, begin, end, [&](const KronItem& item, int64_t, double* sums) {
      add_segments<A>(item, *p.beta, *p.alpha, sums);
    });
  };
  const int64_t grain = 1 + tasks * kThreadWork / (work + 1);
  parallel_ranges(tasks, grain, multiply);
  parallel_ranges(p.n_items, 1 + p.n_items * kThreadWork / (work + 1), add);
}

}  // namespace

int64_t BK_CPU(kron_workspace)(const KronParams& p) {
  return p.f64 ? workspace_of<double>(p) : workspace_of<float>(p);
}

const char* BK_CPU(kron_accumulate)(const KronParams& p, void*) {
  if (p.f64)
    run_kron<double>(p);
  else
    run_kron<float>(p);
  return nullptr;
}

int64_t BK_CPU(low_rank_workspace)(const LowRankParams&) { return 0; }

const char* BK_CPU(low_rank_update)(const LowRankParams& p, void*) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.f64)
        update<double>(p.items[i]);
      else
        update<float>(p.items[i]);
    }
  };
  parallel_ranges(p.n_items, 1, body);
  return nullptr;
}

}  // namespace bayes_kernels
