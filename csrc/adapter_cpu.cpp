// Adapter family on the CPU; compiled once per instruction set (cpu_isa.h).
//
// Three register-blocked products over a tile of tokens and a block of columns do all the work:
//   project  acc[t][k] += x[t, :] . panel[k, :]        shrink, dh of expand_backward
//   combine  out[t, :]  = sum_k coef[t][k] panel[k, :]  expand, dx of shrink_backward
//   update   grad[k, :] += sum_t coef[t][k] x[t, :]     da, de, db
// Signs are bits of Philox blocks that live for one tile; they are applied to a vector of x where
// it is loaded. For few tokens the noise matrix lives for one block of columns as well. Work is cut
// into (tokens, columns) tasks by a rule that knows the shape only, and partial results are added
// in task order: the same bits for any number of threads.
#include "adapter.h"

#include <optional>
#include <type_traits>

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "noise.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

constexpr int64_t kTileTokens = 32;
constexpr int64_t kMaxProjectVectors = 1024;  // accumulators of one tile of `project`

template <class A>
constexpr int64_t kBlock = 2048 / static_cast<int64_t>(sizeof(A));  // columns: 2 KiB of each row
template <class A>
constexpr int64_t kPitch = kBlock<A> + 64 / static_cast<int64_t>(sizeof(A));  // of copied tiles:
// rows must not all start in the same cache set

// Register blocks: tokens x rows for project, tokens x vectors for combine, rows x vectors for
// update.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 8, kProjectTokens = 2, kCombineTokens = 4, kCombineVectors = 4;
#else
constexpr int kRegisterRows = 4, kProjectTokens = 2, kCombineTokens = 2, kCombineVectors = 4;
#endif
constexpr int kUpdateVectors = 2;

template <int value_>
struct Int {
  static constexpr int value = value_;
};

// f(Int<size>, first) over [0, count) in pieces of `size`, then of 1 / divisor of it, and so on.
template <int size, int divisor = 2, class F>
BK_HD void in_pieces(int64_t count, const F& f, int64_t first = 0) {
  for (; first + size <= count; first += size) f(Int<size>{}, first);
  if constexpr (size > 1) in_pieces<size / divisor, divisor>(count, f, first);
}

BK_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
BK_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- the three products ------------------------------------------------------------------------

template <class A>
struct Rows {  // a matrix in memory
  A* data;
  int64_t pitch;
  A* at(int64_t row, int64_t column = 0) const { return data + row * pitch + column; }
  __attribute__((always_inline)) auto vector(int64_t row, int64_t column) const {
    return load(at(row, column));
  }
  Rows from(int64_t row) const { return {at(row), pitch}; }
};

// Signs of the tokens of one tile over one block of columns.
struct SignTile {
  const uint8_t* bits;
  int64_t pitch;  // bytes
  const uint8_t* at(int64_t token) const { return bits + token * pitch; }
};

// The activations that will be read next: asked for while a tile that is in cache is worked on, so
// that memory and arithmetic overlap.
struct Ahead {
  const char* data;
  int64_t pitch, step;  // bytes between rows, and of one vector of elements

  template <class T>
  static Ahead of(const T* x, int64_t stride) {
    return {reinterpret_cast<const char*>(x), stride * static_cast<int64_t>(sizeof(T)),
            kLanes<acc_t<T>> * static_cast<int64_t>(sizeof(T))};
  }
  Ahead from(int64_t row, int64_t vector) const {
    return {data + row * pitch + vector * step, pitch, step};
  }
  __attribute__((always_inline)) void fetch(int64_t row, int64_t vector) const {
    __builtin_prefetch(data + row * pitch + vector * step, 0, 2);
  }
};

// E = rho^2 . eps where it is used, from normals that are known: for one or two tokens a tile of it
// would be written and read as often as it is used.
struct SquaredDraw {
  Rows<const float> rho, eps;
  __attribute__((always_inline)) Vec<float> vector(int64_t row, int64_t column) const {
    const Vec<float> root = load(rho.at(row, column));
    return root * root * load(eps.at(row, column));
  }
  SquaredDraw from(int64_t row) const {
    return {{rho.at(row), rho.pitch}, {eps.at(row), eps.pitch}};
  }
};

template <class A, bool flipped, bool fetches, int tokens, int rows, class Panel>
BK_HD void project_block(Rows<const A> x, SignTile signs, Panel panel, Ahead ahead, int64_t vectors,
                         Vec<A>* acc, int64_t acc_pitch) {
  Vec<A> sum[tokens][rows];
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
    for (int k = 0; k < rows; ++k) sum[t][k] = acc[t * acc_pitch + k];
  for (int64_t v = 0; v < vectors; ++v) {
    Vec<A> xv[tokens];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      xv[t] = load(x.at(t, v * kLanes<A>));
      if (flipped) xv[t] = flip(xv[t], signs.at(t), v);
      if (fetches) ahead.fetch(t, v);
    }
#pragma GCC unroll 8
    for (int k = 0; k < rows; ++k) {
      const Vec<A> pv = in_register(panel.vector(k, v * kLanes<A>));
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) sum[t][k] += xv[t] * pv;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t)
#pragma GCC unroll 8
    for (int k = 0; k < rows; ++k) acc[t * acc_pitch + k] = sum[t][k];
}

// acc[t * acc_pitch + k] += x[t, :] . panel[k, :], lane by lane; the panel is Rows or a
// SquaredDraw. The first rows of the panel ask for what comes next, where `fetches`.
template <class A, bool flipped, bool fetches = flipped, class Panel>
void project(Rows<const A> x, SignTile signs, Panel panel, Ahead ahead, int64_t tokens, int r,
             int64_t vectors, Vec<A>* acc, int64_t acc_pitch) {
  in_pieces<kRegisterRows>(r, [&](auto rows, int64_t k) {
    in_pieces<kProjectTokens>(tokens, [&](auto count, int64_t t) {
      const auto block = [&](auto fetch) {
        project_block<A, flipped, decltype(fetch)::value, decltype(count)::value,
                      decltype(rows)::value>({x.at(t), x.pitch}, {signs.at(t), signs.pitch},
                                             panel.from(k), ahead.from(t, 0), vectors,
                                             acc + t * acc_pitch + k, acc_pitch);
      };
      if (fetches && k == 0)
        block(std::bool_constant<fetches>{});
      else
        block(std::false_type{});
    });
  });
}

// sum[t][v] += sum_k coef[t][k] panel[k, v]
template <class A, int tokens, int vectors>
BK_HD void combine(const A* coef, int64_t coef_pitch, Rows<const A> panel, int r,
                   Vec<A> (&sum)[tokens][vectors]) {
  for (int k = 0; k < r; ++k) {
    Vec<A> pv[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) pv[v] = in_register(load(panel.at(k, v * kLanes<A>)));
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      const A c = coef[t * coef_pitch + k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[t][v] += c * pv[v];
    }
  }
}

template <class A, bool flipped, int rows, int vectors>
BK_HD void update_block(const A* coef, int64_t coef_pitch, Rows<const A> x, SignTile signs,
                        Ahead ahead, int64_t first, int64_t tokens, Rows<A> grad) {
  Vec<A> sum[rows][vectors];
#pragma GCC unroll 8
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[k][v] = load(grad.at(k, v * kLanes<A>));
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<A> xv[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      xv[v] = load(x.at(t, v * kLanes<A>));
      if (flipped) xv[v] = flip(xv[v], signs.at(t), first + v);
      ahead.fetch(t, first + v);
    }
#pragma GCC unroll 8
    for (int k = 0; k < rows; ++k) {
      const A c = coef[t * coef_pitch + k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[k][v] += c * xv[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < rows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(grad.at(k, v * kLanes<A>), sum[k][v]);
}

// grad[k, :] += sum_t coef[t][k] x[t, :]
template <class A, bool flipped>
void update(const A* coef, int64_t coef_pitch, Rows<const A> x, SignTile signs, Ahead ahead,
            int64_t tokens, int r, int64_t vectors, Rows<A> grad) {
  in_pieces<kRegisterRows>(r, [&](auto rows, int64_t k) {
    in_pieces<kUpdateVectors>(vectors, [&](auto count, int64_t v) {
      update_block<A, flipped, decltype(rows)::value, decltype(count)::value>(
          coef + k, coef_pitch, {x.at(0, v * kLanes<A>), x.pitch}, signs, ahead, v, tokens,
          {grad.at(k, v * kLanes<A>), grad.pitch});
    });
  });
}

// sums[i] = sum of the lanes of acc[i]; both have room for a whole number of vectors.
template <class A>
void reduce_lanes(Vec<A>* acc, int64_t count, A* sums) {
  for (int64_t i = count; i < round_up(count, kLanes<A>); ++i) acc[i] = Vec<A>{};
  for (int64_t i = 0; i < count; i += kLanes<A>) store(sums + i, lane_sums<A>(acc + i));
}

// --- tiles -------------------------------------------------------------------------------------

struct Keys {
  Key normal{}, in{}, out{}, dropout{};
  explicit Keys(const AdapterNoise& noise) {
    if (noise.key == nullptr) return;
    const Key key = load_key(noise.key);
    normal = subkey(key, noise.stream, kNormal);
    in = subkey(key, noise.stream, kSignIn);
    out = subkey(key, noise.stream, kSignOut);
    dropout = subkey(key, noise.stream, kDropout);
  }
};

// Philox blocks of one tile: `per_row` blocks of each token, from block `first` of its row on.
template <int64_t max_per_row>
struct BlockTile {
  uint64_t blocks[2 * kTileTokens * max_per_row + 2 * kPhiloxBatch];
  int64_t per_row;

  // row_index(t): the counter at which the row of token t starts
  template <class RowIndex>
  void fill(Key key, int64_t tokens, int64_t first, int64_t count, const RowIndex& row_index) {
    uint64_t index[kTileTokens * max_per_row + kPhiloxBatch];
    per_row = count;
    for (int64_t t = 0; t < tokens; ++t) {
      const uint64_t start = row_index(t) + static_cast<uint64_t>(first);
      for (int64_t c = 0; c < count; ++c) index[t * count + c] = start + static_cast<uint64_t>(c);
    }
    for (int64_t i = tokens * count; i % kPhiloxBatch != 0; ++i) index[i] = 0;
    philox_blocks(key, index, tokens * count, blocks);
  }
  const uint8_t* at(int64_t token) const {
    return reinterpret_cast<const uint8_t*>(blocks + 2 * token * per_row);
  }
  SignTile signs() const { return {at(0), 16 * per_row}; }
};

template <class A>
using InSigns = BlockTile<kBlock<A> / kSignsPerBlock>;

template <class A>
void in_signs(const AdapterNoise& noise, Key key, int64_t row, int64_t tokens, int64_t n,
              int64_t column, int64_t width, InSigns<A>* tile) {
  const uint64_t stride = static_cast<uint64_t>(ceil_div(n, kSignsPerBlock));
  tile->fill(key, tokens, column / kSignsPerBlock, ceil_div(width, kSignsPerBlock), [&](int64_t t) {
    return static_cast<uint64_t>(sign_row(noise.rows, row + t)) * stride;
  });
}

// +1 and -1 of the rank side, (tokens, r).
template <class A>
void out_signs(const AdapterNoise& noise, Key key, int64_t row, int64_t tokens, int r, A* sign) {
  BlockTile<1> tile;
  tile.fill(key, tokens, 0, 1,
            [&](int64_t t) { return static_cast<uint64_t>(sign_row(noise.rows, row + t)); });
  for (int64_t t = 0; t < tokens; ++t)
    for (int k = 0; k < r; ++k)
      sign[t * r + k] = (tile.blocks[2 * t + k / 64 % 2] >> (k % 64) & 1u) != 0 ? A(-1) : A(1);
}

// Factors of dropout, 0 or 1 / (1 - p), (tokens, kPitch); 0 behind the last column.
template <class A>
struct KeepTile {
  A keep[kTileTokens * kPitch<A>];

  void fill(const AdapterNoise& noise, Key key, int64_t row, int64_t tokens, int64_t n,
            int64_t column, int64_t width) {
    constexpr int64_t kBlocks = kBlock<A> / kDropoutPerBlock + kPhiloxBatch;
    uint64_t index[kBlocks], blocks[2 * kBlocks];
    const uint32_t threshold = dropout_threshold(noise.dropout);
    const A scale = static_cast<A>(1.0 / (1.0 - noise.dropout));
    const uint64_t stride = static_cast<uint64_t>(ceil_div(n, kDropoutPerBlock));
    const int64_t count = ceil_div(width, kDropoutPerBlock);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint64_t start = static_cast<uint64_t>(dropout_row(noise.rows, row + t)) * stride +
                             static_cast<uint64_t>(column / kDropoutPerBlock);
      for (int64_t c = 0; c < round_up(count, kPhiloxBatch); ++c)
        index[c] = start + static_cast<uint64_t>(c);
      philox_blocks(key, index, count, blocks);
      A* out = keep + t * kPitch<A>;
      for (int64_t j = 0; j < width; ++j) {
        uint16_t bits;
        memcpy(&bits, reinterpret_cast<const char*>(blocks) + 2 * j, 2);
        out[j] = bits >= threshold ? scale : A(0);
      }
      for (int64_t j = width; j < round_up(width, kLanes<A>); ++j) out[j] = A(0);
    }
  }
};

// E = std(rho) . eps for one block of columns of all rows, zeros behind the last column.
template <class A>
struct DrawTile {
  static constexpr int64_t kMost = 8192;  // elements: threads may have small stacks
  static constexpr int64_t kPad = kPitch<A> - kBlock<A>;
  static constexpr int64_t kSize = kMost + kMaxFusedRank * kPad;
  alignas(64) A e[kSize];
  alignas(64) float drawn[kSize];
  const float* eps;
  int64_t pitch, eps_pitch;

  // Columns of a block: whole blocks of signs.
  static int64_t block(int64_t r) {
    return smaller(kBlock<A>, kMost / r / kSignsPerBlock * kSignsPerBlock);
  }

  void fill(const AdapterDraw& draw, Key key, int r, int64_t n, int64_t column, int64_t width) {
    pitch = block(r) + kPad;
    eps = draw.eps != nullptr ? draw.eps + column : drawn;
    eps_pitch = draw.eps != nullptr ? n : pitch;
    for (int64_t k = 0; k < r; ++k) {
      if (draw.eps == nullptr) BK_CPU(normals)(key, k * n + column, width, drawn + k * pitch);
      const float* z = eps + k * eps_pitch;
      const A* rho = rho_at(draw, k, n, column);
      A* out = e + k * pitch;
      if (draw.row_constant) {
        const A std = std_of<A>(draw.std, *rho);
        for (int64_t j = 0; j < width; ++j) out[j] = std * static_cast<A>(z[j]);
      } else if (draw.std == Std::kSquare) {
        for (int64_t j = 0; j < width; ++j) out[j] = rho[j] * rho[j] * static_cast<A>(z[j]);
      } else {
        for (int64_t j = 0; j < width; ++j)
          out[j] = std_of<A>(draw.std, rho[j]) * static_cast<A>(z[j]);
      }
      for (int64_t j = width; j < round_up(width, kLanes<A>); ++j) out[j] = A(0);
    }
  }

  // drho = gradient of E . eps . std'(rho), in rows of `out`; rho is (r, n)
  void write_drho(const AdapterDraw& draw, const A* gradient, int r, int64_t n, int64_t column,
                  int64_t width, Rows<A> out) const {
    for (int64_t k = 0; k < r; ++k) {
      const float* z = eps + k * eps_pitch;
      const A* rho = rho_at(draw, k, n, column);
      const A* from = gradient + k * pitch;
      A* to = out.at(k);
      if (draw.std == Std::kSquare) {
        for (int64_t j = 0; j < width; ++j)
          to[j] = from[j] * static_cast<A>(z[j]) * (A(2) * rho[j]);
      } else {
        for (int64_t j = 0; j < width; ++j)
          to[j] = from[j] * static_cast<A>(z[j]) * std_derivative<A>(draw.std, rho[j]);
      }
    }
  }

  static const A* rho_at(const AdapterDraw& draw, int64_t k, int64_t n, int64_t column) {
    return static_cast<const A*>(draw.rho) + (draw.row_constant ? k : k * n + column);
  }
};

// The tile in the accumulate type, times `keep` where given: x itself where that is possible, else
// a copy, whose rows are filled up with zeros to a whole number of vectors.
template <class T>
Rows<const acc_t<T>> read_tile(const T* x, int64_t stride, int64_t tokens, int64_t width,
                               const acc_t<T>* keep, bool in_place, acc_t<T>* copy) {
  using A = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(A))
    if (in_place && keep == nullptr && width % kLanes<A> == 0) return {x, stride};
  for (int64_t t = 0; t < tokens; ++t) {
    const T* from = x + t * stride;
    A* to = copy + t * kPitch<A>;
    for (int64_t j = 0; j < width; j += kLanes<A>) {
      Vec<A> v = j + kLanes<A> <= width ? load(from + j) : load_part(from + j, width - j);
      if (keep != nullptr) v *= load(keep + t * kPitch<A> + j);
      store(to + j, v);
    }
  }
  return {copy, kPitch<A>};
}

// --- tasks -------------------------------------------------------------------------------------

// Cuts (tokens, columns) into chunks x segments. A function of the shape only.
struct Grid {
  int64_t chunk, chunks;      // tokens of one task; number of them
  int64_t segment, segments;  // columns
  int64_t tasks() const { return chunks * segments; }
  bool operator==(const Grid& other) const {
    return chunk == other.chunk && chunks == other.chunks && segment == other.segment &&
           segments == other.segments;
  }
};

constexpr int64_t kFewTokens = 2;  // expand does without a transposed copy of b up to here
constexpr int64_t kFewTasks = 16;
constexpr int64_t kMinSegment = 1024;

// chunk: tokens of a task, where there are tokens enough. Columns are cut only where tokens alone
// would not occupy many threads.
Grid grid_of(int64_t tokens, int64_t columns, int64_t chunk) {
  Grid g;
  g.chunk = chunk;
  g.chunks = ceil_div(tokens, chunk);
  const int64_t wanted = ceil_div(kFewTasks, g.chunks);
  const int64_t most = columns / kMinSegment > 1 ? columns / kMinSegment : 1;
  g.segment = round_up(ceil_div(columns, smaller(wanted, most)), 512);
  if (g.segment == 0) g.segment = 512;
  g.segments = columns > 0 ? ceil_div(columns, g.segment) : 1;
  return g;
}

// body(chunk, segment) for all tasks; small work stays on the calling thread.
template <class F>
void run_tasks(const Grid& g, int64_t work_per_element, const F& body) {
  constexpr int64_t kWorthAThread = 1 << 19;  // multiply-adds
  const int64_t work = g.chunk * g.segment * work_per_element;
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / g.segments, i % g.segments);
  };
  parallel_ranges(g.tasks(), work > 0 ? ceil_div(kWorthAThread, work) : g.tasks(), range);
}

// Hands out pieces of the workspace, each on a cache line; with a null base it only adds up.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class A>
  A* take(int64_t count) {
    A* p = base == nullptr ? nullptr : reinterpret_cast<A*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
    return p;
  }
};

// Rows of a factor, filled up with zeros where their length is no whole number of vectors.
template <class A>
Rows<const A> padded(const A* factor, int64_t r, int64_t n, A* copy) {
  if (copy == nullptr) return {factor, n};
  const int64_t pitch = round_up(n, kLanes<A>);
  for (int64_t k = 0; k < r; ++k) {
    for (int64_t j = 0; j < n; ++j) copy[k * pitch + j] = factor[k * n + j];
    for (int64_t j = n; j < pitch; ++j) copy[k * pitch + j] = A(0);
  }
  return {copy, pitch};
}

// Calls f(Int<size>, first) for the pieces of rows of r elements that unzip and zip can work on:
// the whole row where r is a power of two below the number of lanes, pieces of one vector where r
// is a multiple of it. For other ranks there are none.
template <class A, class F>
bool in_row_pieces(int r, const F& f) {
  bool found = false;
  in_pieces<kLanes<A>>(r, [&](auto size, int64_t first) {
    constexpr int kSize = decltype(size)::value;
    if (kSize == r || (kSize == kLanes<A> && r % kSize == 0)) {
      f(size, first);
      found = true;
    }
  });
  return found;
}

// b (m, r) as (r, m) in rows of `pitch`, zeros behind the last column.
template <class A>
void transpose(const A* b, int64_t m, int r, int64_t pitch, A* out) {
  constexpr int kWidth = kLanes<A>;
  const int64_t whole = m / kWidth * kWidth;
  const bool fast = in_row_pieces<A>(r, [&](auto size, int64_t first) {
    constexpr int kSize = decltype(size)::value;
    for (int64_t j = 0; j < whole; j += kWidth) {
      Vec<A> v[kSize];
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i)
        v[i] = load(kSize == kWidth ? b + (j + i) * r + first : b + j * r + i * kWidth);
      unzip<A, kSize>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) store(out + (first + i) * pitch + j, v[i]);
    }
  });
  for (int k = 0; k < r; ++k)
    for (int64_t j = fast ? whole : 0; j < pitch; ++j)
      out[k * pitch + j] = j < m ? b[j * r + k] : A(0);
}

// sum_k h[k] b[j, k] for the rows j, j + 1, ... of one vector of results: products of whole vectors
// of b, whose sums fall into place. For a single token this is cheaper than a transposed copy of b.
template <class A, int size>
BK_HD Vec<A> rows_times(const A* b, const Vec<A>* h, int r) {
  constexpr int kWidth = kLanes<A>;
  Vec<A> v[size];
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) v[i] = load(size == kWidth ? b + i * r : b + i * kWidth) * h[0];
  if (size == kWidth)
    for (int first = kWidth; first < r; first += kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) v[i] += load(b + i * r + first) * h[first / kWidth];
    }
  if constexpr (size == 1) return v[0];
  Vec<A> sums = v[0];
  if constexpr (size > 1) sums = lane_sums<A, size / 2>(v);
  if (size == kWidth) return sums;
  // Vector i holds kWidth / size rows, and row p of it ended in lane p * size + i.
  typedef decltype(sums == sums) Index;
  Index order;
  for (int i = 0; i < kWidth; ++i) order[i] = i % (kWidth / size) * size + i / (kWidth / size);
  return __builtin_shuffle(sums, order);
}

// db (m, r) = scaling * grad^T for `width` columns of grad (r, pitch).
template <class A>
void transpose_back(const A* grad, int64_t pitch, int64_t width, int r, A scaling, A* db) {
  constexpr int kWidth = kLanes<A>;
  const int64_t whole = width / kWidth * kWidth;
  const bool fast = in_row_pieces<A>(r, [&](auto size, int64_t first) {
    constexpr int kSize = decltype(size)::value;
    for (int64_t j = 0; j < whole; j += kWidth) {
      Vec<A> v[kSize];
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) v[i] = scaling * load(grad + (first + i) * pitch + j);
      zip<A, kSize>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i)
        store(kSize == kWidth ? db + (j + i) * r + first : db + j * r + i * kWidth, v[i]);
    }
  });
  for (int64_t j = fast ? whole : 0; j < width; ++j)
    for (int k = 0; k < r; ++k) db[j * r + k] = scaling * grad[k * pitch + j];
}

// out[i] = parts[i] + parts[i + stride] + ...: in this order, whatever the number of threads.
template <class A>
void add_parts(const A* parts, int64_t count, int64_t stride, int64_t width, A* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = parts[i];
  for (int64_t c = 1; c < count; ++c)
    for (int64_t i = 0; i < width; ++i) out[i] += parts[c * stride + i];
}

// --- shrink ------------------------------------------------------------------------------------

template <class T>
struct Shrink {
  using A = acc_t<T>;
  const ShrinkParams& p;
  bool noisy;
  int rows;  // of the panels: r, or 2 r with noise
  Grid grid;
  Arena arena;
  A *a_copy, *e_copy, *parts;

  explicit Shrink(const ShrinkParams& params)
      : p(params), arena{static_cast<char*>(params.workspace)} {
    noisy = p.e != nullptr || p.draw.rho != nullptr;
    rows = noisy ? 2 * p.r : p.r;
    grid = grid_of(p.tokens, p.n, smaller(kTileTokens, kMaxProjectVectors / rows));
    if (p.draw.rho != nullptr) {  // one chunk: each normal is drawn once; the sums are the same
      grid.chunk = smaller(2 * kTileTokens, kMaxProjectVectors / rows);
      grid.chunks = ceil_div(p.tokens, grid.chunk);
    }
    const bool pad = p.n % kLanes<A> != 0;
    const int64_t size = p.r * round_up(p.n, kLanes<A>);
    a_copy = pad ? arena.template take<A>(size) : nullptr;
    e_copy = pad && p.e != nullptr ? arena.template take<A>(size) : nullptr;
    parts = grid.segments > 1 ? arena.template take<A>(grid.segments * p.tokens * p.r) : nullptr;
  }

  // What the tasks of a call share.
  struct Shared {
    Keys keys;
    Rows<const A> a, e;
  };
  Shared begin() const {
    return {Keys(p.noise), padded(static_cast<const A*>(p.a), p.r, p.n, a_copy),
            padded(static_cast<const A*>(p.e), p.r, p.n, e_copy)};
  }
  void run_task(const Shared& s, int64_t chunk, int64_t segment) const {
    const int64_t row = chunk * grid.chunk;
    A* out = grid.segments > 1 ? parts + segment * p.tokens * p.r : static_cast<A*>(p.h);
    if (p.noise.dropout > 0.0)
      task<true>(s.keys, s.a, s.e, row, segment * grid.segment, out);
    else
      task<false>(s.keys, s.a, s.e, row, segment * grid.segment, out);
  }
  void end() const {
    const int64_t size = p.tokens * p.r;
    if (grid.segments > 1) add_parts(parts, grid.segments, size, size, static_cast<A*>(p.h));
  }

  void run() const {
    const Shared shared = begin();
    run_tasks(grid, rows,
              [&](int64_t chunk, int64_t segment) { run_task(shared, chunk, segment); });
    end();
  }

  // Several adapters of one x: a task does all of them, while its part of x is in the cache.
  // Those whose tasks are cut in another way come before, one by one.
  static void run_list(const ShrinkParams* p, int64_t count) {
    std::optional<Shrink> op[kMaxShrinkList];
    std::optional<Shared> shared[kMaxShrinkList];
    int work = 0;
    int64_t together = 0;
    for (int64_t i = 0; i < count; ++i) {
      op[together].emplace(p[i]);
      if (!(op[together]->grid == op[0]->grid)) {
        op[together]->run();
        continue;
      }
      shared[together].emplace(op[together]->begin());
      work += op[together++]->rows;
    }
    run_tasks(op[0]->grid, work, [&](int64_t chunk, int64_t segment) {
      for (int64_t i = 0; i < together; ++i) op[i]->run_task(*shared[i], chunk, segment);
    });
    for (int64_t i = 0; i < together; ++i) op[i]->end();
  }

  template <bool drop>
  void task(const Keys& keys, Rows<const A> a, Rows<const A> e, int64_t row, int64_t column,
            A* out) const {
    const int64_t tokens = smaller(grid.chunk, p.tokens - row);
    const int64_t stop = smaller(column + grid.segment, p.n);
    Vec<A> acc[kMaxProjectVectors + kLanes<A>];
    for (int64_t i = 0; i < tokens * rows; ++i) acc[i] = Vec<A>{};
    const int64_t block = p.draw.rho != nullptr ? DrawTile<A>::block(p.r) : kBlock<A>;
    for (int64_t at = column; at < stop; at += block) {
      const int64_t width = smaller(block, stop - at);
      Rows<const A> panel{p.e != nullptr ? e.at(0, at) : nullptr, e.pitch};
      DrawTile<A> drawn;
      if (p.draw.rho != nullptr && !draws_in_place(tokens, width)) {
        drawn.fill(p.draw, keys.normal, p.r, p.n, at, width);
        panel = {drawn.e, drawn.pitch};
      }
      for (int64_t t = 0; t < tokens; t += kTileTokens) {
        const T* x = static_cast<const T*>(p.x) + (row + t) * p.x_stride;
        const int64_t count = smaller(kTileTokens, tokens - t);
        const T* next = x + count * p.x_stride + (t + count < tokens ? at : column);
        if (t + count == tokens && at + block < stop) next = x - t * p.x_stride + at + block;
        tile<drop>(keys, {a.at(0, at), a.pitch}, panel, row + t, count, at, width,
                   Ahead::of(next, p.x_stride), acc + t * rows);
      }
    }
    A sums[kMaxProjectVectors + kLanes<A>];
    reduce_lanes<A>(acc, tokens * rows, sums);
    if (!noisy) {
      for (int64_t i = 0; i < tokens * p.r; ++i) out[row * p.r + i] = sums[i];
      return;
    }
    for (int64_t first = 0; first < tokens; first += kTileTokens) {
      const int64_t count = smaller(kTileTokens, tokens - first);
      A sign[kTileTokens * kMaxFusedRank];
      out_signs<A>(p.noise, keys.out, row + first, count, p.r, sign);
      for (int64_t i = 0; i < count; ++i) {
        const A* from = sums + (first + i) * rows;
        for (int k = 0; k < p.r; ++k)
          out[(row + first + i) * p.r + k] = from[k] + from[p.r + k] * sign[i * p.r + k];
      }
    }
  }

  // acc += the two products of one tile of tokens and one block of columns.
  template <bool drop>
  void tile(const Keys& keys, Rows<const A> a, Rows<const A> e, int64_t row, int64_t tokens,
            int64_t column, int64_t width, Ahead ahead, Vec<A>* acc) const {
    const int64_t vectors = ceil_div(width, kLanes<A>);
    alignas(64) A copy[kTileTokens * kPitch<A>];
    const A* keep = nullptr;
    KeepTile<A> dropped;
    if constexpr (drop) {
      dropped.fill(p.noise, keys.dropout, row, tokens, p.n, column, width);
      keep = dropped.keep;
    }
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride + column;
    const Rows<const A> read = read_tile<T>(x, p.x_stride, tokens, width, keep, true, copy);
    if (!noisy && streams()) {
      project<A, false, true>(read, {}, a, ahead, tokens, p.r, vectors, acc, rows);
      return;
    }
    project<A, false>(read, {}, a, {}, tokens, p.r, vectors, acc, rows);
    if (!noisy) return;
    InSigns<A> signs;
    in_signs<A>(p.noise, keys.in, row, tokens, p.n, column, width, &signs);
    if constexpr (std::is_same_v<A, float>)
      if (p.draw.rho != nullptr && e.data == nullptr) {
        const SquaredDraw draw{{static_cast<const float*>(p.draw.rho) + column, p.n},
                               {p.draw.eps + column, p.n}};
        project<A, true>(read, signs.signs(), draw, ahead, tokens, p.r, vectors, acc + p.r, rows);
        return;
      }
    project<A, true>(read, signs.signs(), e, ahead, tokens, p.r, vectors, acc + p.r, rows);
  }

  // Whether x is more than the nearer caches hold: then one product alone would wait for memory.
  bool streams() const {
    constexpr int64_t kStreams = 4 << 20;  // bytes
    const int64_t rows_of_call = p.of_tokens > p.tokens ? p.of_tokens : p.tokens;
    return rows_of_call * p.n * static_cast<int64_t>(sizeof(T)) >= kStreams;
  }

  // Whether E is made where it is used; the bits are those of the tile.
  bool draws_in_place(int64_t tokens, int64_t width) const {
    return std::is_same_v<A, float> && tokens <= kProjectTokens && width % kLanes<A> == 0 &&
           p.draw.eps != nullptr && p.draw.std == Std::kSquare && !p.draw.row_constant;
  }
};

template <class T>
struct ShrinkBackward {
  using A = acc_t<T>;
  const ShrinkBackwardParams& p;
  int64_t pitch;
  bool drawn, noisy;
  Grid grid;
  Arena arena;
  A *a_copy, *e_copy, *da_parts, *de_parts;

  explicit ShrinkBackward(const ShrinkBackwardParams& params)
      : p(params), arena{static_cast<char*>(params.workspace)} {
    pitch = round_up(p.n, kLanes<A>);
    drawn = p.draw.rho != nullptr;
    noisy = drawn || p.e != nullptr;
    grid = grid_of(p.tokens, p.n, p.n >= 2048 ? 8 * kTileTokens : 4 * kTileTokens);
    const bool pad = pitch != p.n, parts = pad || grid.chunks > 1;
    const int64_t size = p.r * pitch;
    a_copy = pad ? arena.template take<A>(size) : nullptr;
    e_copy = pad && p.e != nullptr ? arena.template take<A>(size) : nullptr;
    da_parts = parts && p.da != nullptr ? arena.template take<A>(grid.chunks * size) : nullptr;
    de_parts = parts && p.de != nullptr ? arena.template take<A>(grid.chunks * size) : nullptr;
  }

  void run() {
    const Keys keys(p.noise);
    const Rows<const A> a = padded(static_cast<const A*>(p.a), p.r, p.n, a_copy);
    const Rows<const A> e = padded(static_cast<const A*>(p.e), p.r, p.n, e_copy);
    run_tasks(grid, 4 * p.r, [&](int64_t chunk, int64_t segment) {
      const int64_t part = chunk * p.r * pitch;
      const Rows<A> da{da_parts != nullptr ? da_parts + part : static_cast<A*>(p.da), pitch};
      const Rows<A> de{de_parts != nullptr ? de_parts + part : static_cast<A*>(p.de), pitch};
      if (p.noise.dropout > 0.0)
        task<true>(keys, a, e, da, de, chunk * grid.chunk, segment * grid.segment);
      else
        task<false>(keys, a, e, da, de, chunk * grid.chunk, segment * grid.segment);
    });
    sum_parts(da_parts, static_cast<A*>(p.da));
    sum_parts(de_parts, static_cast<A*>(p.de));
  }

  void sum_parts(const A* parts, A* out) {
    if (parts == nullptr) return;
    auto range = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        add_parts(parts + k * pitch, grid.chunks, p.r * pitch, p.n, out + k * p.n);
    };
    parallel_ranges(p.r, ceil_div(1 << 18, grid.chunks * pitch), range);
  }

  template <bool drop>
  void task(const Keys& keys, Rows<const A> a, Rows<const A> e, Rows<A> da, Rows<A> de,
            int64_t first_row, int64_t column) {
    const int64_t end_row = smaller(first_row + grid.chunk, p.tokens);
    const int64_t stop = smaller(column + grid.segment, p.n);
    const int64_t block = drawn ? DrawTile<A>::block(p.r) : kBlock<A>;
    for (int64_t at = column; at < stop; at += block) {
      const int64_t width = smaller(block, stop - at);
      const int64_t vectors = ceil_div(width, kLanes<A>);
      const Rows<const A> ap{a.at(0, at), a.pitch};
      Rows<const A> ep{p.e != nullptr ? e.at(0, at) : nullptr, e.pitch};
      Rows<A> de_block{de.data != nullptr ? de.at(0, at) : nullptr, de.pitch};
      const Rows<A> drho = de_block;
      DrawTile<A> draw;
      alignas(64) A draw_gradient[DrawTile<A>::kSize];
      if (drawn && (p.dx != nullptr || de.data != nullptr)) {
        draw.fill(p.draw, keys.normal, p.r, p.n, at, width);
        ep = {draw.e, draw.pitch};
        if (de.data != nullptr) de_block = {draw_gradient, draw.pitch};
      }
      for (int k = 0; k < p.r; ++k)
        for (int64_t j = 0; j < vectors * kLanes<A>; ++j) {
          if (da.data != nullptr) *da.at(k, at + j) = A(0);
          if (de.data != nullptr) *de_block.at(k, j) = A(0);
        }
      for (int64_t row = first_row; row < end_row; row += kTileTokens) {
        const int64_t tokens = smaller(kTileTokens, end_row - row);
        const A* g = static_cast<const A*>(p.dh) + row * p.r;
        alignas(64) A copy[kTileTokens * kPitch<A>];
        const A* keep = nullptr;
        KeepTile<A> dropped;
        if constexpr (drop) {
          dropped.fill(p.noise, keys.dropout, row, tokens, p.n, at, width);
          keep = dropped.keep;
        }
        A flipped_g[kTileTokens * kMaxFusedRank];
        InSigns<A> signs;
        if (noisy) {
          in_signs<A>(p.noise, keys.in, row, tokens, p.n, at, width, &signs);
          out_signs<A>(p.noise, keys.out, row, tokens, p.r, flipped_g);
          for (int64_t i = 0; i < tokens * p.r; ++i) flipped_g[i] *= g[i];
        }
        if (da.data != nullptr || de.data != nullptr) {
          const T* x = static_cast<const T*>(p.x) + row * p.x_stride + at;
          const Rows<const A> tile = read_tile<T>(x, p.x_stride, tokens, width, keep, false, copy);
          const T* next = row + kTileTokens < end_row ? x + kTileTokens * p.x_stride
                                                      : x - (row - first_row) * p.x_stride + block;
          const Ahead ahead = Ahead::of(next, p.x_stride);
          if (da.data != nullptr)
            update<A, false>(g, p.r, tile, {}, ahead, tokens, p.r, vectors,
                             {da.at(0, at), da.pitch});
          if (de.data != nullptr)
            update<A, true>(flipped_g, p.r, tile, signs.signs(), ahead, tokens, p.r, vectors,
                            de_block);
        }
        if (p.dx != nullptr)
          write_dx(g, flipped_g, ap, ep, signs.signs(), keep, tokens, width,
                   static_cast<T*>(p.dx) + row * p.n + at);
      }
      if (drawn && de.data != nullptr)
        draw.write_drho(p.draw, draw_gradient, p.r, p.n, at, width, drho);
    }
  }

  void write_dx(const A* g, const A* flipped_g, Rows<const A> a, Rows<const A> e, SignTile signs,
                const A* keep, int64_t tokens, int64_t width, T* dx) {
    in_pieces<kCombineTokens, kCombineTokens>(tokens, [&](auto token_count, int64_t t) {
      in_pieces<kCombineVectors, kCombineVectors>(
          ceil_div(width, kLanes<A>), [&](auto vector_count, int64_t v) {
            constexpr int kTokens = decltype(token_count)::value,
                          kVectors = decltype(vector_count)::value;
            Vec<A> sum[kTokens][kVectors] = {};
            const int64_t column = v * kLanes<A>;
            if (noisy) {
              combine<A, kTokens, kVectors>(flipped_g + t * p.r, p.r, {e.at(0, column), e.pitch},
                                            p.r, sum);
#pragma GCC unroll 8
              for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 8
                for (int w = 0; w < kVectors; ++w)
                  sum[i][w] = flip(sum[i][w], signs.at(t + i), v + w);
            }
            combine<A, kTokens, kVectors>(g + t * p.r, p.r, {a.at(0, column), a.pitch}, p.r, sum);
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 8
              for (int w = 0; w < kVectors; ++w) {
                const int64_t j = column + w * kLanes<A>;
                if (keep != nullptr) sum[i][w] *= load(keep + (t + i) * kPitch<A> + j);
                T* out = dx + (t + i) * p.n + j;
                if (j + kLanes<A> <= width)
                  store(out, sum[i][w]);
                else
                  store_part(out, sum[i][w], width - j);
              }
          });
    });
  }
};

// --- expand ------------------------------------------------------------------------------------

template <class T>
struct Expand {
  using A = acc_t<T>;
  const ExpandParams& p;
  int64_t pitch;
  Grid grid;
  Arena arena;
  A* panel;
  bool packed;

  explicit Expand(const ExpandParams& params)
      : p(params), arena{static_cast<char*>(params.workspace)} {
    pitch = round_up(p.m, kLanes<A>);
    grid = grid_of(p.tokens, p.m, kTileTokens);
    const bool few = p.tokens <= kFewTokens && in_row_pieces<A>(p.r, [](auto, int64_t) {});
    panel = few ? nullptr : arena.template take<A>(p.r * pitch);
    packed = !few;
  }

  // One token without a transposed copy of b.
  void few_tokens(int64_t row) {
    constexpr int kWidth = kLanes<A>;
    A repeated[kMaxFusedRank + kWidth];
    const int64_t length = p.r < kWidth ? kWidth : p.r;
    for (int64_t k = 0; k < length; ++k)
      repeated[k] = static_cast<A>(p.scaling) * static_cast<const A*>(p.h)[row * p.r + k % p.r];
    Vec<A> h[kMaxFusedRank / kWidth + 1];
    for (int64_t k = 0; k < length; k += kWidth) h[k / kWidth] = load(repeated + k);
    const A* b = static_cast<const A*>(p.b);
    const int64_t whole = p.m / kWidth * kWidth;
    in_row_pieces<A>(p.r, [&](auto size, int64_t first) {
      if (first != 0) return;  // further pieces of the row are added by rows_times
      for (int64_t j = 0; j < whole; j += kWidth)
        write(row, j, p.m, rows_times<A, decltype(size)::value>(b + j * p.r, h, p.r));
    });
    if (whole == p.m) return;
    A left[kWidth] = {};
    for (int64_t j = whole; j < p.m; ++j)
      for (int k = 0; k < p.r; ++k) left[j - whole] += repeated[k] * b[j * p.r + k];
    write(row, whole, p.m, load(left));
  }

  void run() {
    if (!packed) {
      for (int64_t row = 0; row < p.tokens; ++row) few_tokens(row);
      return;
    }
    transpose(static_cast<const A*>(p.b), p.m, p.r, pitch, panel);
    run_tasks(grid, p.r, [&](int64_t chunk, int64_t segment) {
      task(chunk * grid.chunk, segment * grid.segment);
    });
  }

  void task(int64_t row, int64_t column) {
    const int64_t tokens = smaller(grid.chunk, p.tokens - row);
    const int64_t stop = smaller(column + grid.segment, p.m);
    A h[kTileTokens * kMaxFusedRank];
    for (int64_t i = 0; i < tokens * p.r; ++i)
      h[i] = static_cast<A>(p.scaling) * static_cast<const A*>(p.h)[row * p.r + i];
    for (int64_t at = column; at < stop; at += kBlock<A>) {
      const int64_t width = smaller(kBlock<A>, stop - at);
      in_pieces<kCombineTokens, kCombineTokens>(tokens, [&](auto token_count, int64_t t) {
        in_pieces<kCombineVectors, kCombineVectors>(
            ceil_div(width, kLanes<A>), [&](auto vector_count, int64_t v) {
              constexpr int kTokens = decltype(token_count)::value,
                            kVectors = decltype(vector_count)::value;
              Vec<A> sum[kTokens][kVectors] = {};
              const int64_t from = at + v * kLanes<A>;
              combine<A, kTokens, kVectors>(h + t * p.r, p.r, {panel + from, pitch}, p.r, sum);
#pragma GCC unroll 8
              for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 8
                for (int w = 0; w < kVectors; ++w)
                  write(row + t + i, from + w * kLanes<A>, stop, sum[i][w]);
            });
      });
    }
  }

  __attribute__((always_inline)) void write(int64_t row, int64_t column, int64_t stop, Vec<A> v) {
    const T* base =
        p.base != nullptr ? static_cast<const T*>(p.base) + row * p.base_stride + column : nullptr;
    T* y = static_cast<T*>(p.y) + row * p.m + column;
    const int64_t left = stop - column;
    if (left >= kLanes<A>) {
      if (base != nullptr) v += load(base);
      store(y, v);
    } else {
      if (base != nullptr) v += load_part(base, left);
      store_part(y, v, left);
    }
  }
};

template <class T>
struct ExpandBackward {
  using A = acc_t<T>;
  const ExpandBackwardParams& p;
  int64_t pitch;
  Grid grid;
  Arena arena;
  A *panel, *dh_parts, *db_parts;

  explicit ExpandBackward(const ExpandBackwardParams& params)
      : p(params), arena{static_cast<char*>(params.workspace)} {
    pitch = round_up(p.m, kLanes<A>);
    grid = grid_of(p.tokens, p.m, p.m >= 2048 ? 8 * kTileTokens : 4 * kTileTokens);
    panel = p.dh != nullptr ? arena.template take<A>(p.r * pitch) : nullptr;
    dh_parts = p.dh != nullptr && grid.segments > 1
                   ? arena.template take<A>(grid.segments * p.tokens * p.r)
                   : nullptr;
    db_parts = p.db != nullptr ? arena.template take<A>(grid.chunks * p.r * pitch) : nullptr;
  }

  void run() {
    const A scaling = static_cast<A>(p.scaling);
    A* dh = static_cast<A*>(p.dh);
    if (dh != nullptr) transpose(static_cast<const A*>(p.b), p.m, p.r, pitch, panel);
    run_tasks(grid, 2 * p.r, [&](int64_t chunk, int64_t segment) {
      task(chunk, segment, dh_parts != nullptr ? dh_parts + segment * p.tokens * p.r : dh);
    });
    if (dh != nullptr) {
      const int64_t size = p.tokens * p.r;
      if (dh_parts != nullptr) add_parts(dh_parts, grid.segments, size, size, dh);
      for (int64_t i = 0; i < size; ++i) dh[i] *= scaling;
    }
    if (p.db != nullptr) {
      auto range = [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t j = block * kBlock<A>, width = smaller(kBlock<A>, p.m - j);
          A sum[kMaxFusedRank * kBlock<A>];
          for (int k = 0; k < p.r; ++k)
            add_parts(db_parts + k * pitch + j, grid.chunks, p.r * pitch, width, sum + k * width);
          transpose_back(sum, width, width, p.r, scaling, static_cast<A*>(p.db) + j * p.r);
        }
      };
      parallel_ranges(ceil_div(p.m, kBlock<A>), ceil_div(1 << 18, grid.chunks * p.r * kBlock<A>),
                      range);
    }
  }

  void task(int64_t chunk, int64_t segment, A* dh) {
    const int64_t end_row = smaller((chunk + 1) * grid.chunk, p.tokens);
    const int64_t column = segment * grid.segment, stop = smaller(column + grid.segment, p.m);
    const int64_t tile_tokens = smaller(kTileTokens, kMaxProjectVectors / p.r);
    const Rows<A> db{db_parts != nullptr ? db_parts + chunk * p.r * pitch : nullptr, pitch};
    if (db.data != nullptr)
      for (int k = 0; k < p.r; ++k)
        for (int64_t j = column; j < round_up(stop, kLanes<A>); ++j) *db.at(k, j) = A(0);
    for (int64_t row = chunk * grid.chunk; row < end_row; row += tile_tokens) {
      const int64_t tokens = smaller(tile_tokens, end_row - row);
      Vec<A> acc[kMaxProjectVectors + kLanes<A>];
      for (int64_t i = 0; i < tokens * p.r; ++i) acc[i] = Vec<A>{};
      for (int64_t at = column; at < stop; at += kBlock<A>) {
        const int64_t width = smaller(kBlock<A>, stop - at);
        const int64_t vectors = ceil_div(width, kLanes<A>);
        alignas(64) A copy[kTileTokens * kPitch<A>];
        const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride + at;
        const Rows<const A> tile =
            read_tile<T>(dy, p.dy_stride, tokens, width, nullptr, db.data == nullptr, copy);
        if (dh != nullptr)
          project<A, false>(tile, {}, Rows<const A>{panel + at, pitch}, {}, tokens, p.r, vectors,
                            acc, p.r);
        const T* next =
            at + kBlock<A> < stop ? dy + kBlock<A> : dy + tokens * p.dy_stride - (at - column);
        if (db.data != nullptr)
          update<A, false>(static_cast<const A*>(p.h) + row * p.r, p.r, tile, {},
                           Ahead::of(next, p.dy_stride), tokens, p.r, vectors,
                           {db.at(0, at), db.pitch});
      }
      if (dh == nullptr) continue;
      A sums[kMaxProjectVectors + kLanes<A>];
      reduce_lanes<A>(acc, tokens * p.r, sums);
      for (int64_t i = 0; i < tokens * p.r; ++i) dh[row * p.r + i] = sums[i];
    }
  }
};

template <template <class> class Op, class Params, class F>
auto with_op(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kBF16: {
      Op<bf16> op(p);
      return f(op);
    }
    case DType::kF16: {
      Op<f16> op(p);
      return f(op);
    }
    case DType::kF64: {
      Op<double> op(p);
      return f(op);
    }
    default: {
      Op<float> op(p);
      return f(op);
    }
  }
}

template <template <class> class Op, class Params>
int64_t workspace_of(const Params& p) {
  Params measured = p;
  measured.workspace = nullptr;
  return with_op<Op>(measured, [](auto& op) { return op.arena.used; });
}

template <template <class> class Op, class Params>
const char* launch(const Params& p) {
  with_op<Op>(p, [](auto& op) { op.run(); });
  return nullptr;
}

}  // namespace

int64_t BK_CPU(shrink_workspace)(const ShrinkParams& p) { return workspace_of<Shrink>(p); }
int64_t BK_CPU(shrink_backward_workspace)(const ShrinkBackwardParams& p) {
  return workspace_of<ShrinkBackward>(p);
}
int64_t BK_CPU(expand_workspace)(const ExpandParams& p) { return workspace_of<Expand>(p); }
int64_t BK_CPU(expand_backward_workspace)(const ExpandBackwardParams& p) {
  return workspace_of<ExpandBackward>(p);
}

const char* BK_CPU(shrink)(const ShrinkParams& p, void*) { return launch<Shrink>(p); }
void BK_CPU(shrink_list)(const ShrinkParams* p, int64_t count) {
  with_op<Shrink>(*p, [&](const auto& op) { std::decay_t<decltype(op)>::run_list(p, count); });
}
const char* BK_CPU(shrink_backward)(const ShrinkBackwardParams& p, void*) {
  return launch<ShrinkBackward>(p);
}
const char* BK_CPU(expand)(const ExpandParams& p, void*) { return launch<Expand>(p); }
const char* BK_CPU(expand_backward)(const ExpandBackwardParams& p, void*) {
  return launch<ExpandBackward>(p);
}

}  // namespace bayes_kernels
