// fp64 linear algebra of small matrices (1 to 128 rows), worked on by a team: one thread on the
// host, a block of threads on the GPU. The same source for g++, nvcc and the emulator.
//
// A team is a class with static functions
//   thread() threads()               index in the team, and its size
//   group() groups() lane() lanes()  threads of a group can add up numbers among themselves
//   sum(v)                           of the group's lanes in a fixed order, the same bits in each
//   sync()                           barrier of the team, which orders its memory accesses
// Every thread calls each function below, with the same arguments, and gets the same result. A
// function leaves its outputs visible to the whole team. Numbers that decide a branch are computed
// by each group anew in the same order, so that all threads take it. Matrices are row-major with
// rows `ld` apart, ld >= r; what lies behind column r is neither read into a result nor preserved.
#pragma once

#include <cmath>

#include "portable.h"

namespace bayes_kernels {

constexpr int kMaxSmall = 128;

struct OneThread {
  BK_HD int thread() { return 0; }
  BK_HD int threads() { return 1; }
  BK_HD int group() { return 0; }
  BK_HD int groups() { return 1; }
  BK_HD int lane() { return 0; }
  BK_HD int lanes() { return 1; }
  BK_HD double sum(double v) { return v; }
  BK_HD void sync() {}
};

#if !defined(__CUDACC__) && !defined(BAYES_KERNELS_SIM)
#define BK_SMALL_VECTORS 1
#endif

#if defined(BK_SMALL_VECTORS)
// Eight doubles; g++ cuts them to the registers of the instruction set.
typedef double Double8 __attribute__((vector_size(64)));
typedef double Double8Unaligned __attribute__((vector_size(64), aligned(8), may_alias));
// By reference: passing such a vector by value is another ABI in each instruction set.
BK_HD const Double8Unaligned& eight(const double* p) {
  return *reinterpret_cast<const Double8Unaligned*>(p);
}
BK_HD Double8Unaligned& eight(double* p) { return *reinterpret_cast<Double8Unaligned*>(p); }
#endif

// The three scalar products of the vectors p and q, in each lane of the group.
template <class Team>
BK_HD void pair_products(const double* p, const double* q, int n, double* pp, double* qq,
                         double* pq) {
  double a = 0, b = 0, c = 0;
#if defined(BK_SMALL_VECTORS)
  const int whole = n / 8 * 8;
  Double8 va = {}, vb = {}, vc = {};
  for (int k = 0; k < whole; k += 8) {
    const Double8 x = eight(p + k), y = eight(q + k);
    va += x * x;
    vb += y * y;
    vc += x * y;
  }
  for (int i = 0; i < 8; ++i) {
    a += va[i];
    b += vb[i];
    c += vc[i];
  }
#else
  const int whole = 0;
#endif
  for (int k = whole + Team::lane(); k < n; k += Team::lanes()) {
    a += p[k] * p[k];
    b += q[k] * q[k];
    c += p[k] * q[k];
  }
  *pp = Team::sum(a);
  *qq = Team::sum(b);
  *pq = Team::sum(c);
}

// (sum of squares of a - shift I, trace of a)
template <class Team>
BK_HD_LARGE void square_sum(const double* a, int r, int ld, double shift, double* squares,
                            double* trace) {
  double s = 0, t = 0;
#if defined(BK_SMALL_VECTORS)
  // Eight sums, since one would wait for itself at each term.
  const int whole = r / 8 * 8;
  Double8 part = {};
  double beside[8] = {};  // of the blocks on the diagonal
  for (int i = 0; i < r; ++i)
    for (int j = 0; j < whole; j += 8) {
      const double* block = a + i * ld + j;
      if (i - j < 0 || i - j > 7) {
        part += eight(block) * eight(block);
        continue;
      }
      for (int l = 0; l < 8; ++l) {
        const double v = block[l] - (i == j + l ? shift : 0.0);
        beside[l] += v * v;
      }
    }
  for (int l = 0; l < 8; ++l) s += part[l] + beside[l];
#else
  const int whole = 0;
#endif
  for (int i = 0; i < r; ++i) {
    for (int j = whole + Team::lane(); j < r; j += Team::lanes()) {
      const double v = a[i * ld + j] - (i == j ? shift : 0.0);
      s += v * v;
    }
    if (Team::lane() == 0) t += a[i * ld + i];
  }
  *squares = Team::sum(s);
  *trace = Team::sum(t);
}

#if defined(BK_SMALL_VECTORS)
#if defined(__AVX512F__)
constexpr int kSmallLanes = 8;
#elif defined(__AVX2__)
constexpr int kSmallLanes = 4;
#else
constexpr int kSmallLanes = 2;
#endif

// Four rows of a b, `vectors` registers of columns each, from the rows of a; `count` are stored.
// The sums stay in registers on every instruction set, which eight Double8 do on AVX-512 only.
template <int vectors>
BK_HD void multiply_tile(const double* const (&row)[4], const double* b, int r, int ld, int count,
                         double* c) {
  typedef double Vector __attribute__((vector_size(8 * kSmallLanes)));
  typedef double Unaligned __attribute__((vector_size(8 * kSmallLanes), aligned(8), may_alias));
  Vector sum[4][vectors] = {};
  for (int k = 0; k < r; ++k, b += ld) {
    Vector v[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j)
      v[j] = *reinterpret_cast<const Unaligned*>(b + j * kSmallLanes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sum[i][j] += row[i][k] * v[j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j)
      if (i < count) *reinterpret_cast<Unaligned*>(c + i * ld + j * kSmallLanes) = sum[i][j];
}
#endif

// c = a b; c is neither a nor b. On the host ld is a multiple of 8, and rows are filled to ld.
template <class Team>
BK_HD_LARGE void multiply(const double* a, const double* b, double* c, int r, int ld) {
#if defined(BK_SMALL_VECTORS)
  for (int i = 0; i < r; i += 4) {
    const double* row[4];  // behind the last row: the last once more, not stored
    for (int k = 0; k < 4; ++k) row[k] = a + (i + k < r ? i + k : r - 1) * ld;
    const int count = r - i < 4 ? r - i : 4;
    int j = 0;
    for (; j + kSmallLanes < r; j += 2 * kSmallLanes)
      multiply_tile<2>(row, b + j, r, ld, count, c + i * ld + j);
    if (j < r) multiply_tile<1>(row, b + j, r, ld, count, c + i * ld + j);
  }
#else
  for (int e = Team::thread(); e < r * r; e += Team::threads()) {
    const int i = e / r, j = e % r;
    double s = 0;
    for (int k = 0; k < r; ++k) s = fma(a[i * ld + k], b[k * ld + j], s);
    c[i * ld + j] = s;
  }
  Team::sync();
#endif
}

// Newton-Schulz iteration for the inverse square root of a symmetric positive definite matrix s
// whose eigenvalues lie close together: they must be within a factor (1 + rho) / (1 - rho), with
// rho < limit, of each other as far as the bound rho = ||e^2||_F^(1/2), e = s r / trace(s) - I, can
// tell. True and root = s^(-1/2), *spread = that factor; false, and root is undefined, where not.
// work: 3 matrices of r * ld; none of them may be s. Higham, Functions of Matrices, chapter 6.
template <class Team>
BK_HD_LARGE bool inverse_root_near_identity(const double* s, double* root, double* work, int r,
                                            int ld, double limit, double* spread) {
  double squares, trace;
  square_sum<Team>(s, r, ld, 0.0, &squares, &trace);
  if (!(trace > 0)) return false;
  const double scale = r / trace;
  double *y = work, *t = work + r * ld, *z = work + 2 * r * ld;
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads())
      y[i * ld + j] = s[i * ld + j] * scale - (i == j ? 1.0 : 0.0);
  Team::sync();
  multiply<Team>(y, y, t, r, ld);
  square_sum<Team>(t, r, ld, 0.0, &squares, &trace);
  const double rho = sqrt(sqrt(squares));
  if (!(rho < limit)) return false;
  *spread = (1.0 + rho) / (1.0 - rho);
  Team::sync();
  // y z = s scale at every step, z -> (s scale)^(-1/2), y -> (s scale)^(1/2).
  double* m = root;
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) {
      const double one = i == j ? 1.0 : 0.0, e = y[i * ld + j];
      z[i * ld + j] = one - 0.5 * e;  // (3 I - y) / 2, the first step from z = I
      y[i * ld + j] = e + one;
    }
  Team::sync();
  multiply<Team>(y, z, t, r, ld);
  double* swap = y;
  y = t;
  t = swap;
  for (int step = 0; step < 60; ++step) {
    multiply<Team>(z, y, m, r, ld);
    square_sum<Team>(m, r, ld, 1.0, &squares, &trace);
    Team::sync();
    for (int i = 0; i < r; ++i)
      for (int j = Team::thread(); j < r; j += Team::threads())
        m[i * ld + j] = (i == j ? 1.5 : 0.0) - 0.5 * m[i * ld + j];
    Team::sync();
    multiply<Team>(m, z, t, r, ld);
    if (squares < 1e-15) {  // the error that is left is three quarters of this: below rounding
      double* free = z;
      z = t;
      t = free;
      break;
    }
    multiply<Team>(y, m, z, r, ld);
    double* free = y;
    y = z;
    z = t;
    t = free;
  }
  Team::sync();
  const double factor = sqrt(scale);
  // Symmetric up to rounding: the mean with the transpose is taken.
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads())
      root[i * ld + j] = 0.5 * factor * (z[i * ld + j] + z[j * ld + i]);
  Team::sync();
  return true;
}

// Cholesky factor s = u^T u, u upper triangular with positive diagonal; s and u may be the same. A
// pivot of at most max(tolerance * s[j][j], least) counts as zero: then false, and u is undefined.
template <class Team>
BK_HD_LARGE bool cholesky(const double* s, double* u, double* diagonal, int r, int ld,
                          double tolerance, double least) {
  for (int i = Team::thread(); i < r; i += Team::threads()) diagonal[i] = s[i * ld + i];
  if (u != s)
    for (int i = 0; i < r; ++i)
      for (int j = Team::thread(); j < r; j += Team::threads()) u[i * ld + j] = s[i * ld + j];
  Team::sync();
  for (int k = 0; k < r; ++k) {
    const double pivot = u[k * ld + k];
    if (!(pivot > tolerance * diagonal[k] && pivot > least)) return false;
    const double inverse = 1.0 / sqrt(pivot);
    Team::sync();  // the pivot is read before it is overwritten
    for (int j = Team::thread(); j < r; j += Team::threads())
      u[k * ld + j] = j < k ? 0.0 : u[k * ld + j] * inverse;
    Team::sync();
    for (int i = k + 1 + Team::group(); i < r; i += Team::groups()) {
      const double factor = u[k * ld + i];
      for (int j = i + Team::lane(); j < r; j += Team::lanes())
        u[i * ld + j] -= factor * u[k * ld + j];
    }
    Team::sync();
  }
  return true;
}

// x = u^(-1) for an upper triangular u; x is not u.
template <class Team>
BK_HD_LARGE void invert_upper(const double* u, double* x, int r, int ld) {
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) x[i * ld + j] = i == j ? 1.0 : 0.0;
  Team::sync();
  for (int k = r - 1; k >= 0; --k) {
    const double inverse = 1.0 / u[k * ld + k];
    for (int j = k + Team::thread(); j < r; j += Team::threads()) x[k * ld + j] *= inverse;
    Team::sync();
    for (int i = Team::group(); i < k; i += Team::groups()) {
      const double factor = u[i * ld + k];
      for (int j = k + Team::lane(); j < r; j += Team::lanes())
        x[i * ld + j] -= factor * x[k * ld + j];
    }
    Team::sync();
  }
}

BK_HD double reciprocal_root(double x) {
#if defined(__CUDACC__)
  return rsqrt(x);
#else
  return 1.0 / sqrt(x);
#endif
}

// Cosine and sine of the smaller rotation that makes two vectors orthogonal, from their products.
BK_HD void rotation(double pp, double qq, double pq, double* c, double* s) {
#if defined(BK_SMALL_VECTORS)
  const double zeta = (qq - pp) / (2.0 * pq);
  const double t = (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
  *c = 1.0 / sqrt(1.0 + t * t);
  *s = *c * t;
#else
  // On a GPU a thread waits for each quotient and each root in turn: two inverse roots in place of
  // three quotients and two roots. cos(2 t) = |d| r, sin(2 t) = pq r.
  const double d = 0.5 * (qq - pp), r = reciprocal_root(fma(d, d, pq * pq));
  const double square = fma(0.5 * fabs(d), r, 0.5), inverse = reciprocal_root(square);
  *c = square * inverse;
  *s = (d < 0 ? -0.5 : 0.5) * pq * r * inverse;
#endif
}

// Eigenvalues and eigenvectors of a symmetric positive semidefinite matrix by one-sided Jacobi
// rotations in a round-robin order: all pairs of a round are disjoint, and rotated at once by one
// group each. In: w = the matrix. Out: row i of v an eigenvector, values[i] its eigenvalue, in no
// order; w is used up. flags: groups() numbers. Returns the number of sweeps. Small eigenvalues
// keep an absolute error of a few ulp of the largest; a trace of at most 1e-300 counts as zero.
// Hestenes 1958; Brent and Luk 1985.
template <class Team>
BK_HD_LARGE int symmetric_eigen(double* w, double* v, double* values, double* flags, int r,
                                int ld) {
  constexpr int kSweeps = 40;
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) v[i * ld + j] = i == j ? 1.0 : 0.0;
  double squares, trace;
  square_sum<Team>(w, r, ld, 0.0, &squares, &trace);
  Team::sync();
  // Of trace 1, or fourth powers of the entries would leave the range.
  const double scale = trace > 1e-300 ? 1.0 / trace : 1.0;
  for (int i = 0; i < r; ++i)
    for (int j = Team::thread(); j < r; j += Team::threads()) w[i * ld + j] *= scale;
  Team::sync();
  square_sum<Team>(w, r, ld, 0.0, &squares, &trace);
  const double nothing = 1e-40 * squares;  // squared length of a vector that is rounding noise
  const double tolerance = 1e-15 * r;
  Team::sync();
  const int even = r + r % 2;
  int sweep = 0;
  while (sweep < kSweeps) {
    double rotations = 0;
    for (int round = 0; round < even - 1; ++round) {
      for (int pair = Team::group(); pair < even / 2; pair += Team::groups()) {
        const int p = pair == 0 ? even - 1 : (round + pair) % (even - 1);
        const int q = pair == 0 ? round : (round - pair + even - 1) % (even - 1);
        if (p >= r || q >= r) continue;
        double *wp = w + p * ld, *wq = w + q * ld, *vp = v + p * ld, *vq = v + q * ld;
        double pp, qq, pq;
        pair_products<Team>(wp, wq, r, &pp, &qq, &pq);
        if (pp <= nothing || qq <= nothing || pq * pq <= tolerance * tolerance * pp * qq) continue;
        rotations += 1;
        double c, s;
        rotation(pp, qq, pq, &c, &s);
        for (int k = Team::lane(); k < r; k += Team::lanes()) {
          const double a = wp[k], b = wq[k], e = vp[k], f = vq[k];
          wp[k] = c * a - s * b;
          wq[k] = s * a + c * b;
          vp[k] = c * e - s * f;
          vq[k] = s * e + c * f;
        }
      }
      Team::sync();
    }
    ++sweep;
    if (Team::lane() == 0) flags[Team::group()] = rotations;
    Team::sync();
    rotations = 0;
    for (int g = 0; g < Team::groups(); ++g) rotations += flags[g];
    Team::sync();
    if (rotations == 0) break;
  }
  // w row i = the matrix times v row i; both lengths have drifted by the roundings of c and s.
  for (int i = Team::group(); i < r; i += Team::groups()) {
    double ww, vv, wv;
    pair_products<Team>(w + i * ld, v + i * ld, r, &ww, &vv, &wv);
    if (Team::lane() == 0) values[i] = wv / vv / scale;
    const double length = 1.0 / sqrt(vv);
    for (int k = Team::lane(); k < r; k += Team::lanes()) v[i * ld + k] *= length;
  }
  Team::sync();
  return sweep;
}

// out = v^T diag(weights) v for the eigenvectors in the rows of v; out is not v.
template <class Team>
BK_HD_LARGE void compose(const double* v, const double* weights, double* out, int r, int ld) {
  for (int i = Team::group(); i < r; i += Team::groups()) {
    for (int j = Team::lane(); j < r; j += Team::lanes()) out[i * ld + j] = 0;
    for (int k = 0; k < r; ++k) {
      const double factor = weights[k] * v[k * ld + i];
      for (int j = Team::lane(); j < r; j += Team::lanes())
        out[i * ld + j] += factor * v[k * ld + j];
    }
  }
  Team::sync();
}

}  // namespace bayes_kernels
