// What the host sides of the adapter kernels share: how work is cut into blocks, and workspaces.
#pragma once

#include <type_traits>

#include "adapter.h"
#include "cuda_portable.h"

namespace bayes_kernels {
namespace {

constexpr const char* kNoDouble = "float64 is supported on the CPU only; use float32";

// Blocks of 128 threads that fill the largest GPU in mind, 132 multiprocessors: two each, as each
// block more reads its factors once more, and may be a partial sum more.
constexpr int64_t kGrid = 256;
// 16-bit activations with fewer tokens than this take the fp32 kernels, which read the factors as
// they are.
constexpr int64_t kMmaTokens = 32;

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

inline int64_t at_least_one(int64_t v) { return v < 1 ? 1 : v; }

inline int padded_rank(int r) { return r <= 8 ? 8 : r <= 16 ? 16 : r <= 32 ? 32 : 64; }

inline int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

inline int64_t round_up(int64_t v, int64_t quantum) { return ceil_div(v, quantum) * quantum; }

inline bool uses_mma(DType dtype, int64_t tokens) {
  return dtype != DType::kF32 && tokens >= kMmaTokens;
}

inline bool vector_access(const void* pointer, int64_t stride_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0 &&
         stride_bytes % bytes == 0;
}

inline float keep_scale(const AdapterNoise& noise) {
  return noise.dropout > 0.0 ? static_cast<float>(1.0 / (1.0 - noise.dropout)) : 1.0f;
}

inline AdapterNoise no_noise() { return AdapterNoise{nullptr, 0, RowIds{nullptr, 0, 1}, 0.0}; }

// Calls f(zero of the element type).
template <class F>
const char* with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(bf16{});
    case DType::kF16:
      return f(f16{});
    default:
      return kNoDouble;
  }
}

// Calls f(padded rank, whether there is noise), both as constants.
template <class F>
const char* with_rank(int r, bool flip, const F& f) {
  const auto with_flip = [&](auto rank) {
    return flip ? f(rank, std::true_type{}) : f(rank, std::false_type{});
  };
  switch (padded_rank(r)) {
    case 8:
      return with_flip(std::integral_constant<int, 8>{});
    case 16:
      return with_flip(std::integral_constant<int, 16>{});
    case 32:
      return with_flip(std::integral_constant<int, 32>{});
    default:
      return with_flip(std::integral_constant<int, 64>{});
  }
}

// Hands out 256-byte aligned parts of a workspace; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// Tokens of a block: kGrid blocks in all with those over the columns, a multiple of 32.
inline int64_t tokens_of_block(int64_t tokens, int64_t column_blocks) {
  return round_up(ceil_div(tokens, at_least_one(kGrid / at_least_one(column_blocks))), 32);
}

inline const float* fp32(const void* data) { return static_cast<const float*>(data); }

}  // namespace
}  // namespace bayes_kernels
