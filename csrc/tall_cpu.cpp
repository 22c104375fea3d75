// Tall family on the CPU; compiled once per instruction set (cpu_isa.h).
//
// Rows pass through a panel of kPanel rows that stays in the first-level cache: converted, the step
// added, columns padded. Gram matrices are summed in fp64. The second pass of fp32 matrices
// computes in fp32 where the coefficients are tame, in fp64 otherwise. A matrix is finished before
// the next is begun, so that the second pass finds it in the cache.
#include "tall.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "parallel.h"
#include "tall_solve.h"

namespace bayes_kernels {
namespace {

constexpr int kPanel = 48;  // rows; a multiple of the rows of every register tile
// Rows for each partial sum: fixed, so that sums are the same bits for any number of threads.
constexpr int64_t kChunk = 64 * kPanel;
constexpr int kMaxWidth = 2 * kMaxTallRank;  // columns of [x d]
// Spread (condition number squared) up to which the second pass may compute in fp32: 1e-7 times 8.
constexpr double kSinglePrecisionSpread = 64.0;
// Spread from which an fp64 matrix is retracted once more: the product x p errs by 1e-16 times the
// condition number.
constexpr double kPolishSpread = 100.0;
// The arithmetic on a panel is too long for the processor to read on by itself.
constexpr int64_t kAheadRows = kPanel;
constexpr int64_t kItemsInParallel = 8;  // lists as long as this are split between matrices

template <class A>
constexpr int kPad = kLanes<A> > 8 ? kLanes<A> : 8;
constexpr int round_to(int value, int unit) { return (value + unit - 1) / unit * unit; }
constexpr int kTileRows = kLanes<double> == 8 ? 8 : 4;

// How the rows of one matrix are read: w = x, or fl(x + d), beside d where parts == 2.
struct Rows {
  const TallItem* item;
  bool add;   // d is added
  int parts;  // 2: [x d]
  bool dd;    // d^T d is wanted
};

template <class T>
struct EightOf {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(8 * sizeof(T)), aligned(alignof(T)), may_alias));
};

// out = x + added, rounded to T, as numbers of A; added may be null. Eight at a time, since loops
// over a row of 16 would spend their time on their first and last turns.
template <bool add, class T, class A>
BK_HD void convert(const T* __restrict__ x, const T* __restrict__ added, int64_t count,
                   A* __restrict__ out) {
  typedef typename EightOf<T>::unaligned From;
  typedef typename EightOf<A>::unaligned To;
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    typename EightOf<T>::type v = *reinterpret_cast<const From*>(x + i);
    if (add) v += *reinterpret_cast<const From*>(added + i);
    // Or else g++ makes a loop over a row without conversion into a call of memcpy.
    if constexpr (8 * sizeof(T) <= kVectorBytes) v = in_register(v);
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (sizeof(T) < sizeof(A)) {  // written out: g++ 12 converts two lanes at a time
      store(out + i, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
      store(out + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
      continue;
    }
#endif
    *reinterpret_cast<To*>(out + i) = __builtin_convertvector(v, typename EightOf<A>::type);
  }
  for (int64_t i = whole; i < count; ++i)
    out[i] = static_cast<A>(add ? static_cast<T>(x[i] + added[i]) : x[i]);
}

// The same for rows of r numbers; in `out` they are `stride` apart and filled with zeros to
// `pitch`. `fixed`: r where it is known, which leaves no loop over the row.
template <int fixed, bool add, class T, class A>
void convert_rows(const T* x, const T* added, int rows, int r, int pitch, int stride, A* out) {
  const int length = fixed > 0 ? fixed : r;
  for (int i = 0; i < rows; ++i, x += length, added += add ? length : 0, out += stride) {
    convert<add>(x, added, length, out);
    if (fixed == 0)
      for (int j = length; j < pitch; ++j) out[j] = 0;
  }
}

template <class T, class A>
void convert_rows(const T* x, const T* added, int rows, int r, int pitch, int stride, A* out) {
  if (r == pitch && r == stride) {
    added != nullptr ? convert<true>(x, added, int64_t{rows} * r, out)
                     : convert<false>(x, added, int64_t{rows} * r, out);
  } else if (r == 16 && pitch == 16) {
    added != nullptr ? convert_rows<16, true>(x, added, rows, r, pitch, stride, out)
                     : convert_rows<16, false>(x, added, rows, r, pitch, stride, out);
  } else {
    added != nullptr ? convert_rows<0, true>(x, added, rows, r, pitch, stride, out)
                     : convert_rows<0, false>(x, added, rows, r, pitch, stride, out);
  }
}

// What to read into the cache meanwhile, one line of memory for each row of a panel.
struct Ahead {
  const char *x, *d;
  int64_t stride;  // bytes of a row
};

// Rows from `row` on. Behind the matrix it may be anything: nothing is read.
template <class T>
Ahead ahead_of(const Rows& from, int64_t row) {
  const int64_t stride = from.item->r * static_cast<int64_t>(sizeof(T));
  const char* x = static_cast<const char*>(from.item->x) + row * stride;
  const bool two = from.add || from.parts == 2;
  return {x, two ? static_cast<const char*>(from.item->d) + row * stride : x, stride};
}

// Row i of x, or x + d, to panel + i * stride, padded with zeros to `pitch` columns; row i of d
// `part` numbers behind it where there are two parts. Rows up to kPanel are zero.
template <class T, class A>
void fill_panel(const Rows& from, int64_t first, int rows, int pitch, int stride, int part,
                A* panel) {
  const int r = static_cast<int>(from.item->r);
  const T* x = static_cast<const T*>(from.item->x) + first * r;
  const T* d = from.item->d == nullptr ? nullptr : static_cast<const T*>(from.item->d) + first * r;
  convert_rows(x, from.add ? d : nullptr, rows, r, pitch, stride, panel);
  if (from.parts == 2)
    convert_rows(d, static_cast<const T*>(nullptr), rows, r, pitch, stride, panel + part);
  for (int i = rows; i < kPanel; ++i)
    for (int j = 0; j < pitch; ++j) {
      panel[i * stride + j] = 0;
      if (from.parts == 2) panel[i * stride + part + j] = 0;
    }
}

// g (width, width) += rows i0 to i0 + kTileRows of panel^T panel, `vectors` vectors from column j0.
// `ask`: for what lies ahead.
template <int vectors, bool ask>
void gram_tile(const double* panel, int width, int i0, int j0, double* g, Ahead ahead) {
  // Four sums would wait for themselves at each row: they are taken of odd and even rows.
  constexpr int kSets = kTileRows * vectors < 8 ? 2 : 1;
  Vec<double> acc[kSets][kTileRows][vectors] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b)
      acc[0][i][b] = load(g + (i0 + i) * width + j0 + b * kLanes<double>);
  for (int k = 0; k < kPanel; k += kSets) {
    if (ask) {
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {
        __builtin_prefetch(ahead.x);
        __builtin_prefetch(ahead.d);
        ahead.x += ahead.stride;
        ahead.d += ahead.stride;
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < kSets; ++s, panel += width) {
      Vec<double> v[vectors];
#pragma GCC unroll 2
      for (int b = 0; b < vectors; ++b) v[b] = in_register(load(panel + j0 + b * kLanes<double>));
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
        for (int b = 0; b < vectors; ++b) acc[s][i][b] += panel[i0 + i] * v[b];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) {
      if (kSets == 2) acc[0][i][b] += acc[kSets - 1][i][b];
      store(g + (i0 + i) * width + j0 + b * kLanes<double>, acc[0][i][b]);
    }
}

// The blocks of the first `rows` rows of g on and above the diagonal.
void gram_panel(const double* panel, int rows, int width, double* g, Ahead ahead) {
  int64_t line = 0;  // of each row
  auto tile = [&](auto vectors, int i, int j) {
    constexpr int kVectors = decltype(vectors)::value;
    if (line < ahead.stride)
      gram_tile<kVectors, true>(panel, width, i, j, g,
                                {ahead.x + line, ahead.d + line, ahead.stride});
    else
      gram_tile<kVectors, false>(panel, width, i, j, g, ahead);
    line += 64;
  };
  for (int i = 0; i < rows; i += kTileRows) {
    int j = i;
    for (; j + 2 * kLanes<double> <= width; j += 2 * kLanes<double>)
      tile(std::integral_constant<int, 2>{}, i, j);
    if (j < width) tile(std::integral_constant<int, 1>{}, i, j);
  }
}

// y = keep x + x a + d b for a row x d; coefficients (parts r, pitch), the rows of a, then of b.
template <class A>
struct Coefficients {
  A* values;
  A keep;
};

// Panels that coefficients are applied to have rows of this length whatever r is: with lengths
// known only at run time a tile of 12 rows takes 12 address registers, and the sums go to memory.
// 16 more than needed, so that the rows of narrow matrices lie in different sets of the cache.
constexpr int kApplyStride = kMaxTallRank + 16;
constexpr int kApplyPart = kPanel * kApplyStride;  // the panel of d lies behind that of x

// Columns from `column` on.
template <class A, int rows, int vectors>
void apply_tile(const A* panel, int parts, int pitch, int r, const Coefficients<A>& c, int column,
                A* out, int stride) {
  const A* coefficient = c.values + column;
  Vec<A> acc[rows][vectors];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) acc[i][b] = Vec<A>{};
  for (int part = 0; part < parts; ++part) {
    const A* x = panel + part * kApplyPart;
    for (int k = 0; k < r; ++k, coefficient += pitch) {
      Vec<A> v[vectors];
#pragma GCC unroll 2
      for (int b = 0; b < vectors; ++b) v[b] = in_register(load(coefficient + b * kLanes<A>));
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
        for (int b = 0; b < vectors; ++b) acc[i][b] += x[i * kApplyStride + k] * v[b];
    }
  }
  if (c.keep != 0) {
    panel += column;
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int b = 0; b < vectors; ++b) acc[i][b] += load(panel + i * kApplyStride + b * kLanes<A>);
  }
  out += column;
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int b = 0; b < vectors; ++b) store(out + i * stride + b * kLanes<A>, acc[i][b]);
}

// out (kPanel, pitch), rows `stride` apart = y of a panel.
template <class A>
void apply_panel(const A* panel, int parts, int pitch, int r, const Coefficients<A>& c, A* out,
                 int stride) {
  constexpr int kTwoRows = kLanes<double> == 8 ? 12 : 6;
  constexpr int kWidth = kLanes<A>;
  int column = 0;
  for (; column + 2 * kWidth <= pitch; column += 2 * kWidth)
    for (int row = 0; row < kPanel; row += kTwoRows)
      apply_tile<A, kTwoRows, 2>(panel + row * kApplyStride, parts, pitch, r, c, column,
                                 out + row * stride, stride);
  if (column < pitch)
    for (int row = 0; row < kPanel; row += 12)
      apply_tile<A, 12, 1>(panel + row * kApplyStride, parts, pitch, r, c, column,
                           out + row * stride, stride);
}

// Memory of one matrix at a time, for matrices (n, r) with n and r up to given sizes.
struct Scratch {
  double* memory = nullptr;
  double *partial, *gram;       // (chunks, width, width); (width, width)
  double *s, *k, *dd;           // parts of gram, r * ld each
  double *a, *p, *next, *work;  // work: kSolveMatrices
  double *first, *second;       // coefficients, parts r * pitch

  static int64_t doubles(int64_t chunks) {
    constexpr int64_t kSmall = kMaxTallRank * kMaxTallRank;
    return (chunks + 1) * kMaxWidth * kMaxWidth + (6 + kSolveMatrices) * kSmall +
           4 * kMaxTallRank * kMaxWidth + kSolveNumbers;
  }
  bool allocate(int64_t chunks) {
    const size_t bytes = static_cast<size_t>(doubles(chunks)) * sizeof(double);
    memory = static_cast<double*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (memory == nullptr) return false;
    constexpr int64_t kSmall = kMaxTallRank * kMaxTallRank;
    double* next_free = memory;
    auto take = [&](int64_t count) {
      double* start = next_free;
      next_free += count;
      return start;
    };
    s = take(kSmall);
    k = take(kSmall);
    dd = take(kSmall);
    a = take(kSmall);
    p = take(kSmall);
    next = take(kSmall);
    work = take(kSolveMatrices * kSmall);
    first = take(2 * kMaxTallRank * kMaxWidth);
    second = take(2 * kMaxTallRank * kMaxWidth);
    gram = take(kMaxWidth * kMaxWidth);
    partial = take(chunks * kMaxWidth * kMaxWidth);
    return true;
  }
  ~Scratch() { std::free(memory); }
};

// scratch.gram = Gram matrix of the rows [w d], or, with coefficients, of the rows y.
template <class T>
void gram_of(const Rows& from, const Coefficients<double>* c, const Scratch& scratch) {
  const int r = static_cast<int>(from.item->r), pitch = round_to(r, kPad<double>);
  const int width = (c == nullptr ? from.parts : 1) * pitch;
  const int gram_rows = from.dd ? width : pitch;
  const int64_t n = from.item->n, chunks = ceil_div(n, kChunk);
  auto body = [&](int64_t begin, int64_t end) {
    alignas(64) double panel[2 * kApplyPart];
    alignas(64) double product[kPanel * kMaxTallRank];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* g = scratch.partial + chunk * width * width;
      for (int i = 0; i < width * width; ++i) g[i] = 0;
      const int64_t stop = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
      for (int64_t row = chunk * kChunk; row < stop; row += kPanel) {
        const int rows = static_cast<int>(stop - row < kPanel ? stop - row : kPanel);
        if (c == nullptr) {
          fill_panel<T>(from, row, rows, pitch, width, pitch, panel);
          gram_panel(panel, gram_rows, width, g, ahead_of<T>(from, row + kAheadRows));
          continue;
        }
        fill_panel<T>(from, row, rows, pitch, kApplyStride, kApplyPart, panel);
        apply_panel<double>(panel, from.parts, pitch, r, *c, product, pitch);
        gram_panel(product, pitch, width, g, ahead_of<T>(from, row + kAheadRows));
      }
    }
  };
  parallel_ranges(chunks, 1, body);
  for (int i = 0; i < width * width; ++i) scratch.gram[i] = scratch.partial[i];
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int i = 0; i < width * width; ++i)
      scratch.gram[i] += scratch.partial[chunk * width * width + i];
}

// A block (r, r) of scratch.gram with rows ld apart; symmetric ones from their upper half.
void take_block(const Scratch& scratch, int width, int row0, int column0, int r, int ld,
                double* out) {
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j < r; ++j) {
      const int row = row0 + i, column = column0 + j;
      out[i * ld + j] =
          row <= column ? scratch.gram[row * width + column] : scratch.gram[column * width + row];
    }
    for (int j = r; j < ld; ++j) out[i * ld + j] = 0;
  }
}

// a and b (r, ld) as the coefficients of the panels of A; b may be null.
template <class A>
Coefficients<A> pack(const double* a, const double* b, int r, int ld, A* values) {
  const int pitch = round_to(r, kPad<A>);
  double far = 0;
  for (int i = 0; i < r; ++i) far = fabs(a[i * ld + i] - 1) > far ? fabs(a[i * ld + i] - 1) : far;
  // Close to the identity, what a changes is added to x: its rounding errors are as small as it is.
  const A keep = far < 0.5 ? 1 : 0;
  for (int part = 0; part < (b == nullptr ? 1 : 2); ++part)
    for (int i = 0; i < r; ++i) {
      const double* from = (part == 0 ? a : b) + i * ld;
      A* out = values + (part * r + i) * pitch;
      for (int j = 0; j < r; ++j)
        out[j] = static_cast<A>(from[j] - (part == 0 && i == j ? keep : A(0)));
      for (int j = r; j < pitch; ++j) out[j] = 0;
    }
  return {values, keep};
}

template <class T, class A>
void write_rows(const Rows& from, const Coefficients<A>& c, T* out) {
  const int r = static_cast<int>(from.item->r), pitch = round_to(r, kPad<A>);
  const int64_t n = from.item->n;
  auto body = [&](int64_t begin, int64_t end) {
    alignas(64) A panel[2 * kApplyPart];
    alignas(64) A product[kPanel * kMaxTallRank];
    const int64_t stop = end * kChunk < n ? end * kChunk : n;
    for (int64_t row = begin * kChunk; row < stop; row += kPanel) {
      const int rows = static_cast<int>(stop - row < kPanel ? stop - row : kPanel);
      fill_panel<T>(from, row, rows, pitch, kApplyStride, kApplyPart, panel);
      T* y = out + row * r;
      if constexpr (std::is_same<T, A>::value) {
        if (r == pitch && rows == kPanel) {
          apply_panel<A>(panel, from.parts, pitch, r, c, y, r);
          continue;
        }
      }
      apply_panel<A>(panel, from.parts, pitch, r, c, product, pitch);
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < r; ++j) y[i * r + j] = static_cast<T>(product[i * pitch + j]);
    }
  };
  parallel_ranges(ceil_div(n, kChunk), 1, body);
}

// out = x a + d b.
template <class T>
void combine(const Rows& from, const double* a, const double* b, bool single, T* out,
             const Scratch& scratch) {
  const int r = static_cast<int>(from.item->r), ld = round_to(r, 8);
  if constexpr (std::is_same<T, float>::value) {
    if (single) {
      float* values = reinterpret_cast<float*>(scratch.first);
      write_rows<T, float>(from, pack(a, b, r, ld, values), out);
      return;
    }
  }
  write_rows<T, double>(from, pack(a, b, r, ld, scratch.first), out);
}

// scaled = factor * m
void scale(const double* m, double factor, int r, int ld, double* scaled) {
  for (int i = 0; i < r * ld; ++i) scaled[i] = factor * m[i];
}

// x <- retraction of t = w (Stiefel step: of x a - lr d). Returns info.
template <class T>
int32_t retract(const TallParams& p, const TallItem& item, bool with_d, const Scratch& scratch,
                double* spread) {
  const bool step = with_d && p.op == TallOp::kStiefelStep;
  const int r = static_cast<int>(item.r), ld = round_to(r, 8);
  const Rows from{&item, with_d && !step && item.d != nullptr, step ? 2 : 1, step};
  const int width = from.parts * ld;
  double* numbers = scratch.second;
  double *g = scratch.s, *work = scratch.work;
  gram_of<T>(from, nullptr, scratch);
  take_block(scratch, width, 0, 0, r, ld, scratch.s);
  double cancelled = 1;  // squared size of what is added up over that of the sum
  const double lr = step ? *p.lr : 0.0;
  if (step) {
    take_block(scratch, width, 0, ld, r, ld, scratch.k);
    take_block(scratch, width, ld, ld, r, ld, scratch.dd);
    stiefel_gram<OneThread>(scratch.s, scratch.k, scratch.dd, lr, scratch.a, g, work, r, ld);
    cancelled = cancellation(g, scratch.dd, lr, r, ld);
  }
  RetractState state = first_factor<OneThread>(p.retraction, g, scratch.p, work, numbers, r, ld);
  refine_if_cancelled(cancelled, &state);
  const double *a = scratch.p, *b = nullptr;
  for (int again = 0;; ++again) {
    if (step && state.info < kRankDeficient) {
      multiply<OneThread>(scratch.a, scratch.p, scratch.k, r, ld);
      scale(scratch.p, -lr, r, ld, scratch.dd);
      a = scratch.k;
      b = scratch.dd;
    }
    if (state.more == 0 || again == kMaxRefinements) break;
    const Coefficients<double> c = pack(a, b, r, ld, scratch.first);
    gram_of<T>(from, &c, scratch);
    take_block(scratch, ld, 0, 0, r, ld, scratch.s);
    next_factor<OneThread>(p.retraction, scratch.s, scratch.p, scratch.next, work, numbers, r, ld,
                           &state);
  }
  *spread = state.spread;
  if (state.info >= kRankDeficient) return state.info;
  double most = 0;  // fp32 coefficients of matrices far from unit size would overflow
  for (int i = 0; i < r; ++i)
    for (int j = 0; j < r; ++j) most = std::max(most, std::fabs(scratch.p[i * ld + j]));
  const bool single =
      state.spread * cancelled <= kSinglePrecisionSpread && most > 1e-30 && most < 1e30;
  combine<T>(from, a, b, single, static_cast<T*>(item.x), scratch);
  return state.info;
}

template <class T>
void write_small(const double* m, int r, int ld, void* out) {
  T* to = static_cast<T*>(out);
  for (int i = 0; i < r; ++i)
    for (int j = 0; j < r; ++j) to[i * r + j] = static_cast<T>(m[i * ld + j]);
}

template <class T>
void one_matrix(const TallParams& p, int64_t index, const Scratch& scratch) {
  const TallItem& item = p.items[index];
  const int r = static_cast<int>(item.r), ld = round_to(r, 8);
  if (p.op == TallOp::kRetract || p.op == TallOp::kStiefelStep) {
    double spread = 1;
    int32_t info = retract<T>(p, item, true, scratch, &spread);
    if (sizeof(T) == sizeof(double) && info < kRankDeficient && spread > kPolishSpread) {
      retract<T>(p, item, false, scratch, &spread);
      info = info > kRefined ? info : kRefined;
    }
    p.info[index] = info;
    return;
  }
  const Rows from{&item, false, p.op == TallOp::kGram ? 1 : 2, false};
  const int width = from.parts * ld;
  gram_of<T>(from, nullptr, scratch);
  take_block(scratch, width, 0, 0, r, ld, scratch.s);
  if (p.op == TallOp::kGram) {
    write_small<T>(scratch.s, r, ld, item.out);
    return;
  }
  take_block(scratch, width, 0, ld, r, ld, scratch.k);
  const bool step = p.op == TallOp::kLandingStep;
  double *a = scratch.a, *b = scratch.p;
  landing_coefficients<OneThread>(scratch.s, scratch.k, *p.lam, step ? *p.lr : 0.0, step, a, b, r,
                                  ld);
  combine<T>(from, a, b, true, static_cast<T*>(step ? item.x : item.out), scratch);
}

template <class T>
bool run(const TallParams& p) {
  int64_t chunks = 1;
  for (int64_t i = 0; i < p.n_items; ++i) {
    const int64_t needed = ceil_div(p.items[i].n, kChunk);
    chunks = needed > chunks ? needed : chunks;
  }
  int failures = 0;
  auto body = [&](int64_t begin, int64_t end) {
    Scratch scratch;
    if (!scratch.allocate(chunks)) {
      __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = begin; i < end; ++i) one_matrix<T>(p, i, scratch);
  };
  // Few matrices: one after another, each split into chunks of rows. The results are the same bits.
  if (p.n_items < kItemsInParallel)
    body(0, p.n_items);
  else
    parallel_ranges(p.n_items, 1, body);
  return failures == 0;
}

}  // namespace

int64_t BK_CPU(tall_workspace)(const TallParams&) { return 0; }

const char* BK_CPU(tall)(const TallParams& p, void*) {
  const bool done = p.f64 ? run<double>(p) : run<float>(p);
  return done ? nullptr : "out of memory";
}

}  // namespace bayes_kernels
