// Adapter family on the CPU; compiled once per instruction set (cpu_isa.h).
#include "adapter.h"

#include "cpu_isa.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

constexpr int64_t kTile = kSignsPerBlock;  // columns worked on together: one sign block

// Inputs of one token over one column tile: x' (after dropout) and x' . R_in.
template <class T>
struct Tile {
  acc_t<T> plain[kTile];
  acc_t<T> flipped[kTile];
  acc_t<T> sign[kTile];
  acc_t<T> keep[kTile];
};

template <class T>
void load_tile(const AdapterNoise& noise, Key sign_key, Key dropout_key, bool flip, const T* x,
               int64_t row, int64_t n, int64_t c, int64_t width, Tile<T>* tile) {
  using A = acc_t<T>;
  for (int64_t j = 0; j < width; ++j) tile->plain[j] = static_cast<A>(x[c * kTile + j]);
  if (noise.dropout > 0.0) {
    const uint32_t threshold = dropout_threshold(noise.dropout);
    const A scale = static_cast<A>(1.0 / (1.0 - noise.dropout));
    for (int64_t j = 0; j < width; j += kDropoutPerBlock) {
      const PhiloxBlock b =
          dropout_block(dropout_key, dropout_row(noise.rows, row), n, (c * kTile + j) / kDropoutPerBlock);
      for (int64_t k = 0; k < kDropoutPerBlock && j + k < width; ++k) {
        const uint32_t bits = b.word[k / 2] >> (16 * (k % 2)) & 0xFFFFu;
        tile->keep[j + k] = bits >= threshold ? scale : A(0);
        tile->plain[j + k] *= tile->keep[j + k];
      }
    }
  }
  if (flip) {
    const PhiloxBlock b = sign_block(sign_key, sign_row(noise.rows, row), n, c);
    for (int64_t j = 0; j < width; ++j) {
      tile->sign[j] = (b.word[j / 32] >> (j % 32) & 1u) != 0 ? A(-1) : A(1);
      tile->flipped[j] = tile->plain[j] * tile->sign[j];
    }
  }
}

struct Keys {
  Key in{}, out{}, dropout{};
  explicit Keys(const AdapterNoise& noise) {
    if (noise.key == nullptr) return;
    const Key key = load_key(noise.key);
    in = subkey(key, noise.stream, kSignIn);
    out = subkey(key, noise.stream, kSignOut);
    dropout = subkey(key, noise.stream, kDropout);
  }
};

template <class T>
void out_signs(const AdapterNoise& noise, Key key, int64_t row, int r, T* sign) {
  const PhiloxBlock b = sign_block(key, sign_row(noise.rows, row), r, 0);
  for (int k = 0; k < r; ++k) sign[k] = (b.word[k / 32] >> (k % 32) & 1u) != 0 ? T(-1) : T(1);
}

template <class T>
void shrink(const ShrinkParams& p) {
  using A = acc_t<T>;
  const Keys keys(p.noise);
  const A* a = static_cast<const A*>(p.a);
  const A* e = static_cast<const A*>(p.e);
  auto body = [&](int64_t begin, int64_t end) {
    Tile<T> tile;
    for (int64_t row = begin; row < end; ++row) {
      A h[kMaxFusedRank] = {}, u[kMaxFusedRank] = {}, sign[kMaxFusedRank];
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      for (int64_t c = 0; c * kTile < p.n; ++c) {
        const int64_t width = p.n - c * kTile < kTile ? p.n - c * kTile : kTile;
        load_tile<T>(p.noise, keys.in, keys.dropout, e != nullptr, x, row, p.n, c, width, &tile);
        for (int k = 0; k < p.r; ++k) {
          const A* ak = a + k * p.n + c * kTile;
          for (int64_t j = 0; j < width; ++j) h[k] += tile.plain[j] * ak[j];
          if (e == nullptr) continue;
          const A* ek = e + k * p.n + c * kTile;
          for (int64_t j = 0; j < width; ++j) u[k] += tile.flipped[j] * ek[j];
        }
      }
      if (e != nullptr) out_signs(p.noise, keys.out, row, p.r, sign);
      A* out = static_cast<A*>(p.h) + row * p.r;
      for (int k = 0; k < p.r; ++k) out[k] = e != nullptr ? h[k] + u[k] * sign[k] : h[k];
    }
  };
  parallel_ranges(p.tokens, 8, body);
}

template <class T>
void shrink_backward(const ShrinkBackwardParams& p) {
  using A = acc_t<T>;
  const Keys keys(p.noise);
  const A* a = static_cast<const A*>(p.a);
  const A* e = static_cast<const A*>(p.e);
  const A* dh = static_cast<const A*>(p.dh);
  A* da = static_cast<A*>(p.da);
  A* de = static_cast<A*>(p.de);
  // A task owns a column tile and walks over all tokens: the sums over tokens have a fixed order.
  auto body = [&](int64_t begin, int64_t end) {
    Tile<T> tile;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t width = p.n - c * kTile < kTile ? p.n - c * kTile : kTile;
      for (int k = 0; k < p.r; ++k)
        for (int64_t j = 0; j < width; ++j) {
          if (da != nullptr) da[k * p.n + c * kTile + j] = A(0);
          if (de != nullptr) de[k * p.n + c * kTile + j] = A(0);
        }
      for (int64_t row = 0; row < p.tokens; ++row) {
        const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
        load_tile<T>(p.noise, keys.in, keys.dropout, e != nullptr, x, row, p.n, c, width, &tile);
        A sign[kMaxFusedRank], dx[kTile] = {}, dz[kTile] = {};
        if (e != nullptr) out_signs(p.noise, keys.out, row, p.r, sign);
        for (int k = 0; k < p.r; ++k) {
          const A g = dh[row * p.r + k];
          const int64_t at = k * p.n + c * kTile;
          if (p.dx != nullptr)
            for (int64_t j = 0; j < width; ++j) dx[j] += g * a[at + j];
          if (da != nullptr)
            for (int64_t j = 0; j < width; ++j) da[at + j] += g * tile.plain[j];
          if (e == nullptr) continue;
          const A gs = g * sign[k];
          if (p.dx != nullptr)
            for (int64_t j = 0; j < width; ++j) dz[j] += gs * e[at + j];
          if (de != nullptr)
            for (int64_t j = 0; j < width; ++j) de[at + j] += gs * tile.flipped[j];
        }
        if (p.dx == nullptr) continue;
        T* out = static_cast<T*>(p.dx) + row * p.n + c * kTile;
        for (int64_t j = 0; j < width; ++j) {
          A v = e != nullptr ? dx[j] + dz[j] * tile.sign[j] : dx[j];
          if (p.noise.dropout > 0.0) v *= tile.keep[j];
          out[j] = static_cast<T>(v);
        }
      }
    }
  };
  parallel_ranges(ceil_div(p.n, kTile), 1, body);
}

template <class T>
void expand(const ExpandParams& p) {
  using A = acc_t<T>;
  const A* b = static_cast<const A*>(p.b);
  const A scaling = static_cast<A>(p.scaling);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const A* h = static_cast<const A*>(p.h) + row * p.r;
      const T* base = static_cast<const T*>(p.base) + (p.base != nullptr ? row * p.base_stride : 0);
      T* y = static_cast<T*>(p.y) + row * p.m;
      for (int64_t j = 0; j < p.m; ++j) {
        A sum = 0;
        for (int k = 0; k < p.r; ++k) sum += h[k] * b[j * p.r + k];
        sum *= scaling;
        y[j] = static_cast<T>(p.base != nullptr ? static_cast<A>(base[j]) + sum : sum);
      }
    }
  };
  parallel_ranges(p.tokens, 8, body);
}

template <class T>
void expand_backward(const ExpandBackwardParams& p) {
  using A = acc_t<T>;
  const A* b = static_cast<const A*>(p.b);
  const A* h = static_cast<const A*>(p.h);
  const A scaling = static_cast<A>(p.scaling);
  if (p.dh != nullptr) {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
        A sum[kMaxFusedRank] = {};
        for (int64_t j = 0; j < p.m; ++j)
          for (int k = 0; k < p.r; ++k) sum[k] += static_cast<A>(dy[j]) * b[j * p.r + k];
        for (int k = 0; k < p.r; ++k) static_cast<A*>(p.dh)[row * p.r + k] = scaling * sum[k];
      }
    };
    parallel_ranges(p.tokens, 8, body);
  }
  if (p.db != nullptr) {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        A sum[kMaxFusedRank] = {};
        for (int64_t row = 0; row < p.tokens; ++row) {
          const A g = static_cast<A>(static_cast<const T*>(p.dy)[row * p.dy_stride + j]);
          for (int k = 0; k < p.r; ++k) sum[k] += g * h[row * p.r + k];
        }
        for (int k = 0; k < p.r; ++k) static_cast<A*>(p.db)[j * p.r + k] = scaling * sum[k];
      }
    };
    parallel_ranges(p.m, 64, body);
  }
}

template <class Params, class F>
const char* dispatch(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kF32:
      f(float{});
      return nullptr;
    case DType::kBF16:
      f(bf16{});
      return nullptr;
    case DType::kF16:
      f(f16{});
      return nullptr;
    case DType::kF64:
      f(double{});
      return nullptr;
  }
  return "unknown dtype";
}

}  // namespace

int64_t BK_CPU(shrink_workspace)(const ShrinkParams&) { return 0; }
int64_t BK_CPU(shrink_backward_workspace)(const ShrinkBackwardParams&) { return 0; }
int64_t BK_CPU(expand_workspace)(const ExpandParams&) { return 0; }
int64_t BK_CPU(expand_backward_workspace)(const ExpandBackwardParams&) { return 0; }

const char* BK_CPU(shrink)(const ShrinkParams& p, void*) {
  return dispatch(p, [&](auto zero) { shrink<decltype(zero)>(p); });
}
const char* BK_CPU(shrink_backward)(const ShrinkBackwardParams& p, void*) {
  return dispatch(p, [&](auto zero) { shrink_backward<decltype(zero)>(p); });
}
const char* BK_CPU(expand)(const ExpandParams& p, void*) {
  return dispatch(p, [&](auto zero) { expand<decltype(zero)>(p); });
}
const char* BK_CPU(expand_backward)(const ExpandBackwardParams& p, void*) {
  return dispatch(p, [&](auto zero) { expand_backward<decltype(zero)>(p); });
}

}  // namespace bayes_kernels
