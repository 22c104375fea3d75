// What an adapter op launches before its products: E = std(rho) . eps and the factors in fragment
// order, tickets at zero, and for fp16 the largest magnitudes.
#pragma once

#include "adapter_noise.cuh"

namespace bayes_kernels {
namespace {

// ---- largest magnitudes -------------------------------------------------------------------------

struct AmaxJob {
  const float* data;
  int64_t count;
  const float* also;  // a second array that shares the scale, or null
  int64_t also_count;
  bool drawn;  // it is rho of a draw: std(rho) . eps counts
  Std std;
  float* parts;  // (kAmaxParts)
};

constexpr int kMaxAmaxJobs = 2;

struct AmaxArgs {
  AmaxJob job[kMaxAmaxJobs];
};

constexpr int kAmaxThreads = 256;

// No normal of the noise contract is larger: sqrt(-2 log(2^-33)) = 6.764.
constexpr float kLargestNormal = 6.77f;

// Grid (kAmaxParts, operands): the largest magnitude of each part of an operand.
__global__ void __launch_bounds__(kAmaxThreads) amax_kernel(const __grid_constant__ AmaxArgs p) {
  bk_wait_for_previous();
  BK_SHARED(float, warps, [kAmaxThreads / 32]);
  const AmaxJob& job = p.job[blockIdx.y];
  float most = 0.0f;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kAmaxThreads + threadIdx.x;
  for (int64_t i = first; i < job.count; i += kAmaxParts * kAmaxThreads)
    most = fmaxf(most, fabsf(__ldg(job.data + i)));
  if (job.also != nullptr) {
    for (int64_t i = first; i < job.also_count; i += kAmaxParts * kAmaxThreads) {
      const float v = __ldg(job.also + i);
      most = fmaxf(most, fabsf(job.drawn ? kLargestNormal * std_of<float>(job.std, v) : v));
    }
  }
  BK_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kAmaxThreads / 32; ++w) most = fmaxf(most, warps[w]);
  job.parts[blockIdx.x] = most;
}

// ---- prepare ------------------------------------------------------------------------------------

// F (r, n) in fragment order: with g = lane / 4, t = lane % 4 a lane has the 16 bytes
//   F[8 q + g][32 c + 8 t + 0..7]   at (c R / 8 + q) 32 + lane
// of whole tiles of 128 columns; elements outside are zero.
struct PrepareArgs {
  const float* a;    // (r, n), to be packed, or null
  const float* e;    // (r, n) likewise
  const float* rho;  // (r, n) or (r, 1): E is drawn, in place of e; or null
  bool row_constant;
  Std std;
  AdapterNoise noise;
  int64_t n;
  int r;
  int group_bits;     // log2(R / 8)
  const float* amax;  // of both
  int64_t count;      // threads with work: fragments, or blocks of four normals
  uint4* packed;
  uint4* packed_e;
  float* drawn;  // E (r, n) in fp32, for the kernels that read factors as they are
  int* tickets;
  int64_t n_tickets;
};

constexpr int kPrepareThreads = 128;

// rho of element (k, column).
__device__ __forceinline__ float rho_at(const PrepareArgs& p, int64_t k, int64_t column) {
  return __ldg(p.rho + (p.row_constant ? k : k * p.n + column));
}

// Twelve normals from the block that holds normal `first` on, moved such that it is the first.
__device__ __forceinline__ void eight_normals(Key sub, int64_t first, float (&v)[12]) {
  const int skip = static_cast<int>(first % 4);
  BK_UNROLL
  for (int b = 0; b < 3; ++b) {
    float block[4] = {};
    if (b < 2 || skip != 0) normal_block(sub, static_cast<uint64_t>(first / 4 + b), block);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) v[4 * b + i] = block[i];
  }
  if ((skip & 1) != 0) {
    BK_UNROLL
    for (int i = 0; i < 11; ++i) v[i] = v[i + 1];
  }
  if ((skip & 2) != 0) {
    BK_UNROLL
    for (int i = 0; i < 10; ++i) v[i] = v[i + 2];
  }
}

// T: type of the fragments, or float where E is drawn as it is.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ PrepareArgs p) {
  bk_wait_for_previous();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
  for (int64_t i = index; i < p.n_tickets; i += static_cast<int64_t>(gridDim.x) * kPrepareThreads)
    p.tickets[i] = 0;
  if (index >= p.count) return;  // whole warps where there are fragments
  Key sub{};
  if (p.rho != nullptr) sub = noise_key(p.noise, kNormal);
  if constexpr (sizeof(T) == 4) {
    float eps[4];
    normal_block(sub, static_cast<uint64_t>(index), eps);
    int64_t k = 4 * index / p.n, column = 4 * index - k * p.n;
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (k >= p.r) return;
      p.drawn[4 * index + i] = std_of<float>(p.std, rho_at(p, k, column)) * eps[i];
      if (++column == p.n) {
        column = 0;
        ++k;
      }
    }
  } else {
    const int lane = static_cast<int>(index % 32), g = lane / 4, t = lane % 4;
    const int64_t chunk = index / 32 >> p.group_bits;
    const int64_t k = 8 * (index / 32 - (chunk << p.group_bits)) + g;
    const int64_t column = 32 * chunk + 8 * t;
    const float scale = operand_scale<T>(p.amax);
    const auto store = [&](uint4* out, const auto& element) {
      uint32_t word[4];
      BK_UNROLL
      for (int w = 0; w < 4; ++w) {
        float value[2] = {};
        BK_UNROLL
        for (int i = 0; i < 2; ++i)
          if (k < p.r && column + 2 * w + i < p.n) value[i] = scale * element(2 * w + i);
        word[w] = pack_2<T>(value[0], value[1]);
      }
      out[index] = make_uint4(word[0], word[1], word[2], word[3]);
    };
    const int64_t at = k * p.n + column;
    if (p.a != nullptr) store(p.packed, [&](int i) { return __ldg(p.a + at + i); });
    if (p.e != nullptr) store(p.packed_e, [&](int i) { return __ldg(p.e + at + i); });
    if (p.rho == nullptr) return;
    float eps[12] = {};
    if (k < p.r && column < p.n) eight_normals(sub, at, eps);
    store(p.packed_e,
          [&](int i) { return std_of<float>(p.std, rho_at(p, k, column + i)) * eps[i]; });
  }
}

}  // namespace
}  // namespace bayes_kernels
