// Noise family on the GPU. Integers are those of the CPU; normals differ by contraction into fused
// multiply-adds only (a few ulp). Each thread derives the subkey itself: one more Philox block,
// which is cheaper than a barrier.
#include "cuda_portable.h"
#include "noise.h"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

dim3 blocks_for(int64_t threads) {
  return dim3(static_cast<unsigned>(ceil_div(threads, kThreads)));
}

bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// One thread: one Philox block, four normals.
__global__ void __launch_bounds__(kThreads) normal_kernel(NormalParams p, bool vector) {
  const int64_t block = global_thread();
  const int64_t first = 4 * block;
  if (first >= p.count) return;
  float eps[4];
  normal_block(subkey(load_key(p.key), p.stream, kNormal), static_cast<uint64_t>(block), eps);
  if (vector && first + 4 <= p.count) {
    *reinterpret_cast<float4*>(p.out + first) = make_float4(eps[0], eps[1], eps[2], eps[3]);
    return;
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i)
    if (first + i < p.count) p.out[first + i] = eps[i];
}

// One thread: one word of a sign block, 32 columns.
__global__ void __launch_bounds__(kThreads) sign_bits_kernel(SignParams p) {
  const int64_t words = ceil_div(p.columns, 32);
  const int64_t row = global_thread() / words;
  if (row >= p.count) return;
  const int64_t first = (global_thread() - row * words) * 32;
  const Key sub = subkey(load_key(p.key), p.stream, static_cast<Purpose>(p.purpose));
  const PhiloxBlock b = sign_block(sub, sign_row(p.rows, row), p.columns, first / kSignsPerBlock);
  const int which = static_cast<int>(first / 32 % 4);
  const uint32_t bits = which == 0   ? b.word[0]
                        : which == 1 ? b.word[1]
                        : which == 2 ? b.word[2]
                                     : b.word[3];
  for (int i = 0; i < 32 && first + i < p.columns; ++i)
    p.out[row * p.columns + first + i] = static_cast<int8_t>((bits >> i & 1u) != 0 ? -1 : 1);
}

// One thread: one Philox block, eight elements.
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(DropoutParams p) {
  const int64_t blocks = ceil_div(p.columns, kDropoutPerBlock);
  const int64_t row = global_thread() / blocks;
  if (row >= p.rows) return;
  const int64_t c = global_thread() - row * blocks;
  const PhiloxBlock b =
      dropout_block(subkey(load_key(p.key), p.stream, kDropout), p.row0 + row, p.columns, c);
  const uint32_t threshold = dropout_threshold(p.probability);
  BK_UNROLL
  for (int k = 0; k < kDropoutPerBlock; ++k) {
    const int64_t j = c * kDropoutPerBlock + k;
    if (j < p.columns)
      p.out[row * p.columns + j] = (b.word[k / 2] >> (16 * (k % 2)) & 0xFFFFu) >= threshold;
  }
}

// Neighbours that are moved at once: 16 bytes of fp32, twice 16 of fp64.
template <class T>
struct alignas(16) Four {
  T value[4];
};

template <class T, bool kBackward>
__device__ __forceinline__ T scaled(Std std, T rho, T de, float eps) {
  return kBackward ? de * static_cast<T>(eps) * std_derivative<T>(std, rho)
                   : std_of<T>(std, rho) * static_cast<T>(eps);
}

// One thread: one Philox block, four elements of e (forward) or of drho (rho of e's shape).
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    scaled_normal_kernel(ScaledNormalParams p, bool vector) {
  const int64_t count = p.r * p.n;
  const int64_t first = 4 * global_thread();
  if (first >= count) return;
  const T* rho = static_cast<const T*>(p.rho);
  const T* de = static_cast<const T*>(p.de);
  T* out = static_cast<T*>(p.out);
  float eps[4];
  normal_block(subkey(load_key(p.key), p.stream, kNormal), static_cast<uint64_t>(global_thread()),
               eps);
  if (vector && first + 4 <= count) {
    const Four<T> value = *reinterpret_cast<const Four<T>*>(rho + first);
    Four<T> gradient{}, result;
    if (kBackward) gradient = *reinterpret_cast<const Four<T>*>(de + first);
    BK_UNROLL
    for (int i = 0; i < 4; ++i)
      result.value[i] = scaled<T, kBackward>(p.std, value.value[i], gradient.value[i], eps[i]);
    *reinterpret_cast<Four<T>*>(out + first) = result;
    return;
  }
  int64_t row = 0, column = 0;  // one division per thread, where rho is constant along rows
  if (p.row_constant) {
    row = first / p.n;
    column = first - row * p.n;
  }
  BK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t at = first + i;
    if (at >= count) return;
    const T value = rho[p.row_constant ? row : at];
    out[at] = scaled<T, kBackward>(p.std, value, kBackward ? de[at] : T(0), eps[i]);
    if (++column == p.n) {
      column = 0;
      ++row;
    }
  }
}

// The sum of `value` over the block, on thread 0.
__device__ double block_sum(double value) {
  BK_SHARED(double, warp_sum, [kThreads / 32]);
  BK_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kThreads / 32; ++w) value += warp_sum[w];
  return value;
}

// drho of a rho that is constant along rows: one block per row, sums in fp64 in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scaled_normal_row_backward_kernel(ScaledNormalParams p) {
  const int64_t row = blockIdx.x;
  const T* de = static_cast<const T*>(p.de);
  const Key sub = subkey(load_key(p.key), p.stream, kNormal);
  const int64_t begin = row * p.n, end = begin + p.n;
  double sum = 0;
  // A row may begin and end inside a Philox block.
  for (int64_t block = begin / 4 + threadIdx.x; 4 * block < end; block += kThreads) {
    float eps[4];
    normal_block(sub, static_cast<uint64_t>(block), eps);
    BK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t at = 4 * block + i;
      if (at >= begin && at < end) sum += static_cast<double>(de[at]) * static_cast<double>(eps[i]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const T value = static_cast<const T*>(p.rho)[row];
  static_cast<T*>(p.out)[row] = static_cast<T>(sum) * std_derivative<T>(p.std, value);
}

// One thread: one Philox block, four elements, of draws 2 y and 2 y + 1, which may be a pair.
template <class T>
__global__ void __launch_bounds__(kThreads) draws_kernel(DrawParams p, bool vector) {
  const int64_t size = p.r * p.n, first = 4 * global_thread();
  if (first >= size) return;
  const Key sub = subkey(load_key(p.key), p.stream, kDraw);
  const T* rho = static_cast<const T*>(p.rho);
  Four<T> mean{}, std{};
  const bool whole = vector && first + 4 <= size;
  if (whole) mean = *reinterpret_cast<const Four<T>*>(static_cast<const T*>(p.mean) + first);
  BK_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (first + j >= size) break;
    if (!whole) mean.value[j] = static_cast<const T*>(p.mean)[first + j];
    std.value[j] = std_of<T>(p.std, rho[p.row_constant ? (first + j) / p.n : first + j]);
  }
  for (int64_t i0 = 2 * static_cast<int64_t>(blockIdx.y); i0 < p.count; i0 += 2 * gridDim.y) {
    float eps[4];
    BK_UNROLL
    for (int d = 0; d < 2; ++d) {
      const int64_t i = i0 + d;
      if (i >= p.count) break;
      const int64_t pair = draw_pair(p.draws[i], p.antithetic);
      if (d == 0 || pair != draw_pair(p.draws[i0], p.antithetic))
        normal_block(draw_key(sub, pair), static_cast<uint64_t>(global_thread()), eps);
      const T sign = draw_negative(p.draws[i], p.antithetic) ? T(-1) : T(1);
      Four<T> value;
      BK_UNROLL
      for (int j = 0; j < 4; ++j)
        value.value[j] = mean.value[j] + sign * std.value[j] * static_cast<T>(eps[j]);
      T* out = static_cast<T*>(p.out) + i * size + first;
      if (whole) {
        *reinterpret_cast<Four<T>*>(out) = value;
      } else {
        BK_UNROLL
        for (int j = 0; j < 4; ++j)
          if (first + j < size) out[j] = value.value[j];
      }
    }
  }
}

// Of element `at` of dmean, and of what stands before std'(rho) in drho: sums over the draws.
template <class T>
__device__ __forceinline__ void draw_gradients(const DrawParams& p, Key sub, int64_t block,
                                               int64_t begin, int64_t end, T (&sum)[4]) {
  Four<T> mean{};
  float eps[4] = {};
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t pair = draw_pair(p.draws[i], p.antithetic);
    if (p.drho != nullptr && (i == 0 || pair != draw_pair(p.draws[i - 1], p.antithetic)))
      normal_block(draw_key(sub, pair), static_cast<uint64_t>(block), eps);
    const T sign = draw_negative(p.draws[i], p.antithetic) ? T(-1) : T(1);
    BK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t at = 4 * block + j;
      if (at < begin || at >= end) continue;
      const T grad = static_cast<const T*>(p.grad)[i * p.r * p.n + at];
      mean.value[j] += grad;
      sum[j] += sign * grad * static_cast<T>(eps[j]);
    }
  }
  if (p.dmean == nullptr) return;
  BK_UNROLL
  for (int j = 0; j < 4; ++j)
    if (4 * block + j >= begin && 4 * block + j < end)
      static_cast<T*>(p.dmean)[4 * block + j] = mean.value[j];
}

template <class T>
__global__ void __launch_bounds__(kThreads) draws_backward_kernel(DrawParams p) {
  const int64_t size = p.r * p.n, first = 4 * global_thread();
  if (first >= size) return;
  T sum[4] = {};
  draw_gradients<T>(p, subkey(load_key(p.key), p.stream, kDraw), global_thread(), 0, size, sum);
  if (p.drho == nullptr) return;
  BK_UNROLL
  for (int j = 0; j < 4; ++j)
    if (first + j < size)
      static_cast<T*>(p.drho)[first + j] =
          sum[j] * std_derivative<T>(p.std, static_cast<const T*>(p.rho)[first + j]);
}

// Of a rho that is constant along rows: one block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) draws_row_backward_kernel(DrawParams p) {
  const int64_t row = blockIdx.x, begin = row * p.n, end = begin + p.n;
  const Key sub = subkey(load_key(p.key), p.stream, kDraw);
  double total = 0;
  for (int64_t block = begin / 4 + threadIdx.x; 4 * block < end; block += kThreads) {
    T sum[4] = {};
    draw_gradients<T>(p, sub, block, begin, end, sum);
    BK_UNROLL
    for (int j = 0; j < 4; ++j) total += static_cast<double>(sum[j]);
  }
  total = block_sum(total);
  if (threadIdx.x == 0 && p.drho != nullptr)
    static_cast<T*>(p.drho)[row] =
        static_cast<T>(total) * std_derivative<T>(p.std, static_cast<const T*>(p.rho)[row]);
}

__global__ void fold_in_kernel(FoldInParams p) {
  const Key folded = fold_in(load_key(p.key), static_cast<uint64_t>(p.data));
  p.out[0] = static_cast<int64_t>(folded.seed);
  p.out[1] = static_cast<int64_t>(folded.offset);
}

}  // namespace

const char* normal_cuda(const NormalParams& p, void* stream) {
  BK_LAUNCH(normal_kernel, blocks_for(ceil_div(p.count, 4)), kThreads, 0, stream, p,
            aligned(p.out, 16));
  return bk_last_error();
}

const char* sign_bits_cuda(const SignParams& p, void* stream) {
  BK_LAUNCH(sign_bits_kernel, blocks_for(p.count * ceil_div(p.columns, 32)), kThreads, 0, stream,
            p);
  return bk_last_error();
}

const char* dropout_mask_cuda(const DropoutParams& p, void* stream) {
  BK_LAUNCH(dropout_mask_kernel, blocks_for(p.rows * ceil_div(p.columns, kDropoutPerBlock)),
            kThreads, 0, stream, p);
  return bk_last_error();
}

const char* scaled_normal_cuda(const ScaledNormalParams& p, void* stream) {
  const dim3 grid = blocks_for(ceil_div(p.r * p.n, 4));
  const bool vector = !p.row_constant && aligned(p.rho, 16) && aligned(p.out, 16);
  if (p.f64)
    BK_LAUNCH((scaled_normal_kernel<double, false>), grid, kThreads, 0, stream, p, vector);
  else
    BK_LAUNCH((scaled_normal_kernel<float, false>), grid, kThreads, 0, stream, p, vector);
  return bk_last_error();
}

const char* scaled_normal_backward_cuda(const ScaledNormalParams& p, void* stream) {
  if (p.row_constant) {
    const dim3 grid(static_cast<unsigned>(p.r));
    if (p.f64)
      BK_LAUNCH((scaled_normal_row_backward_kernel<double>), grid, kThreads, 0, stream, p);
    else
      BK_LAUNCH((scaled_normal_row_backward_kernel<float>), grid, kThreads, 0, stream, p);
    return bk_last_error();
  }
  if (p.r * p.n == 0) return nullptr;
  const dim3 grid = blocks_for(ceil_div(p.r * p.n, 4));
  const bool vector = aligned(p.rho, 16) && aligned(p.de, 16) && aligned(p.out, 16);
  if (p.f64)
    BK_LAUNCH((scaled_normal_kernel<double, true>), grid, kThreads, 0, stream, p, vector);
  else
    BK_LAUNCH((scaled_normal_kernel<float, true>), grid, kThreads, 0, stream, p, vector);
  return bk_last_error();
}

const char* gaussian_draws_cuda(const DrawParams& p, void* stream) {
  if (p.r * p.n * p.count == 0) return nullptr;
  dim3 grid = blocks_for(ceil_div(p.r * p.n, 4));
  const int64_t rounds = ceil_div(p.count, 2);
  grid.y = static_cast<unsigned>(rounds < 65535 ? rounds : 65535);
  const bool vector = p.r * p.n % 4 == 0 && aligned(p.mean, 16) && aligned(p.out, 16);
  if (p.f64)
    BK_LAUNCH((draws_kernel<double>), grid, kThreads, 0, stream, p, vector);
  else
    BK_LAUNCH((draws_kernel<float>), grid, kThreads, 0, stream, p, vector);
  return bk_last_error();
}

const char* gaussian_draws_backward_cuda(const DrawParams& p, void* stream) {
  if (p.row_constant) {
    const dim3 grid(static_cast<unsigned>(p.r));
    if (p.f64)
      BK_LAUNCH((draws_row_backward_kernel<double>), grid, kThreads, 0, stream, p);
    else
      BK_LAUNCH((draws_row_backward_kernel<float>), grid, kThreads, 0, stream, p);
    return bk_last_error();
  }
  const dim3 grid = blocks_for(ceil_div(p.r * p.n, 4));
  if (p.f64)
    BK_LAUNCH((draws_backward_kernel<double>), grid, kThreads, 0, stream, p);
  else
    BK_LAUNCH((draws_backward_kernel<float>), grid, kThreads, 0, stream, p);
  return bk_last_error();
}

const char* fold_in_cuda(const FoldInParams& p, void* stream) {
  BK_LAUNCH(fold_in_kernel, 1, 1, 0, stream, p);
  return bk_last_error();
}

}  // namespace bayes_kernels
