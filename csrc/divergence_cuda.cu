// Divergence family on the GPU: one launch for a whole list of tensors.
//
// The list travels by value in the kernel's arguments: no copy to the device, so a captured graph
// replays it. A block finds its tensor by a search in the running block counts. Arithmetic is fp64
// where it is cheap beside the bytes moved: 8 per weight for the value, 16 for the gradient.
#include <type_traits>

#include "cuda_portable.h"
#include "divergence.h"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // weights per block: a constant, so that sums have fixed bits
constexpr int kAhead = 4;         // weights of a thread that are loaded before the first is used
constexpr uint32_t kAllLanes = 0xffffffffu;

// One tensor as rows that share a rho; a tensor whose rho has its shape is a single row.
struct Item {
  void* mean;
  void* rho;
  void* dmean;
  void* drho;
  double prior_std;
  int64_t columns;  // weights in a row
  int32_t row_constant;
  int32_t chunks;       // blocks per row
  int64_t first_block;  // of this tensor in the launch
};

template <int kItems>
struct List {
  static constexpr int kCapacity = kItems;
  Item items[kItems];
  int32_t n_items;
  Std std;
  Direction direction;
  const void* weight;
  double* partial;  // one per block
};
constexpr int kFew = 60, kMany = 500;
static_assert(sizeof(List<kFew>) <= kArguments, "kernel arguments");
static_assert(sizeof(List<kMany>) <= kLargeArguments, "kernel arguments");

template <int kItems>
__device__ int item_of(const List<kItems>& list, int64_t block) {
  int low = 0, high = list.n_items - 1;  // the last item that starts at or before the block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.items[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// The sum over the block, in a fixed order; valid in thread 0.
__device__ double block_sum(double sum) {
  BK_SHARED(double, warp_sum, [kThreads / 32]);
  BK_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sum[w];
  return sum;
}

// from[i], from[i + kThreads], ... below `end`.
template <class T>
__device__ __forceinline__ void load_ahead(const T* from, int64_t i, int64_t end, T (&to)[kAhead]) {
  BK_UNROLL
  for (int u = 0; u < kAhead; ++u)
    to[u] = i + u * kThreads < end ? __ldcg(from + i + u * kThreads) : T(0);
}

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads)
    value_kernel(const __grid_constant__ List<kItems> list) {
  const Item& item = list.items[item_of(list, blockIdx.x)];
  const int64_t unit = blockIdx.x - item.first_block;
  const int64_t row = unit / item.chunks;
  const int64_t begin = (unit - row * item.chunks) * kChunk;
  const int64_t end = begin + kChunk < item.columns ? begin + kChunk : item.columns;
  const T* mean = static_cast<const T*>(item.mean) + row * item.columns;
  const T* rho = static_cast<const T*>(item.rho) + (item.row_constant != 0 ? row : 0);
  const double prior = item.prior_std;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kAhead * kThreads) {
    T m[kAhead], r[kAhead];
    load_ahead(mean, i, end, m);
    if (item.row_constant == 0) load_ahead(rho, i, end, r);
    BK_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      if (i + u * kThreads >= end) break;
      const double s = std_of<double>(list.std, item.row_constant != 0 ? rho[0] : r[u]);
      sum += gaussian_kl_term(list.direction, m[u], s, prior);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) list.partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* __restrict__ partial, int64_t count, double* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

// kStep: mean -= weight * dKL/dmean in place, and so for rho; else the gradients are written out.
// `old` is value[i], which is not read again.
template <class T, bool kStep>
__device__ __forceinline__ void apply(T* value, T* gradient, int64_t i, double old,
                                      double weighted) {
  if (kStep)
    value[i] = static_cast<T>(old - weighted);
  else
    gradient[i] = static_cast<T>(weighted);
}

// A block takes a chunk of weights, or, where rho is constant along rows, a whole row.
template <class T, bool kStep, int kItems>
__global__ void __launch_bounds__(kThreads, 4)
    gradient_kernel(const __grid_constant__ List<kItems> list) {
  const Item& item = list.items[item_of(list, blockIdx.x)];
  const int64_t unit = blockIdx.x - item.first_block;
  const double weight = static_cast<double>(*static_cast<const T*>(list.weight));
  const double prior = item.prior_std;
  T* mean = static_cast<T*>(item.mean);
  T* rho = static_cast<T*>(item.rho);
  T* dmean = static_cast<T*>(item.dmean);
  T* drho = static_cast<T*>(item.drho);
  if (item.row_constant == 0) {
    const int64_t begin = unit * kChunk;
    const int64_t end = begin + kChunk < item.columns ? begin + kChunk : item.columns;
    for (int64_t first = begin + threadIdx.x; first < end; first += kAhead * kThreads) {
      T means[kAhead], rhos[kAhead];
      load_ahead(mean, first, end, means);
      load_ahead(rho, first, end, rhos);
      BK_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int64_t i = first + u * kThreads;
        if (i >= end) break;
        const double m = means[u], r = rhos[u];
        const double s = std_of<double>(list.std, r);
        const double ds = gaussian_kl_dstd(list.direction, m, s, prior);
        apply<T, kStep>(mean, dmean, i, m, weight * gaussian_kl_dmean(list.direction, m, s, prior));
        apply<T, kStep>(rho, drho, i, r,
                        weight * (ds * std_derivative<double>(list.std, guarded(list.std, r))));
      }
    }
    return;
  }
  const double r = rho[unit];
  const double s = std_of<double>(list.std, r);
  double sum = 0;
  const int64_t end = (unit + 1) * item.columns;
  for (int64_t first = end - item.columns + threadIdx.x; first < end; first += kAhead * kThreads) {
    T means[kAhead];
    load_ahead(mean, first, end, means);
    BK_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int64_t i = first + u * kThreads;
      if (i >= end) break;
      const double m = means[u];
      sum += gaussian_kl_dstd(list.direction, m, s, prior);
      apply<T, kStep>(mean, dmean, i, m, weight * gaussian_kl_dmean(list.direction, m, s, prior));
    }
  }
  sum =
      block_sum(sum);  // its barrier also orders every thread's read of rho before the write below
  if (threadIdx.x == 0)
    apply<T, kStep>(rho, drho, unit, r,
                    weight * (sum * std_derivative<double>(list.std, guarded(list.std, r))));
}

// Blocks of an item: chunks of rows for the value, whole rows or chunks for the gradient.
int64_t blocks_of(const DivergenceItem& item, bool value) {
  if (item.count == 0) return 0;
  if (item.columns == 1) return ceil_div(item.count, kChunk);
  return item.count / item.columns * (value ? ceil_div(item.columns, kChunk) : 1);
}

// Calls use(list, blocks) for every group of at most kItems tensors.
template <int kItems, class Use>
const char* for_lists_of(const DivergenceParams& p, bool value, const Use& use) {
  double* partial = static_cast<double*>(p.workspace);
  for (int64_t i = 0; i < p.n_items;) {
    List<kItems> list{};
    list.std = p.std;
    list.direction = p.direction;
    list.weight = p.weight;
    list.partial = partial;
    int64_t blocks = 0;
    for (; i < p.n_items && list.n_items < kItems; ++i) {
      const DivergenceItem& item = p.items[i];
      if (item.count == 0) continue;
      const bool row_constant = item.columns != 1;
      const int64_t columns = row_constant ? item.columns : item.count;
      list.items[list.n_items++] = Item{item.mean,
                                        item.rho,
                                        item.dmean,
                                        item.drho,
                                        item.prior_std,
                                        columns,
                                        row_constant ? 1 : 0,
                                        static_cast<int32_t>(ceil_div(columns, kChunk)),
                                        blocks};
      blocks += blocks_of(item, value);
    }
    if (blocks == 0) continue;
    use(list, dim3(static_cast<unsigned>(blocks)));
    const char* error = bk_last_error();
    if (error != nullptr) return error;
    partial += blocks;
  }
  return nullptr;
}

template <class Use>
const char* for_lists(const DivergenceParams& p, bool value, const Use& use) {
  return p.n_items > kFew && bk_large_arguments() ? for_lists_of<kMany>(p, value, use)
                                                  : for_lists_of<kFew>(p, value, use);
}

template <bool kStep>
const char* launch_gradient(const DivergenceParams& p, void* stream) {
  return for_lists(p, false, [&](const auto& list, dim3 grid) {
    constexpr int kItems = std::decay_t<decltype(list)>::kCapacity;
    if (p.f64)
      BK_LAUNCH((gradient_kernel<double, kStep, kItems>), grid, kThreads, 0, stream, list);
    else
      BK_LAUNCH((gradient_kernel<float, kStep, kItems>), grid, kThreads, 0, stream, list);
  });
}

int64_t value_blocks(const DivergenceParams& p) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.n_items; ++i) blocks += blocks_of(p.items[i], true);
  return blocks;
}

}  // namespace

int64_t divergence_workspace_cuda(const DivergenceParams& p) {
  return p.out == nullptr ? 0 : value_blocks(p) * static_cast<int64_t>(sizeof(double));
}

const char* gaussian_kl_cuda(const DivergenceParams& p, void* stream) {
  const char* error = for_lists(p, true, [&](const auto& list, dim3 grid) {
    constexpr int kItems = std::decay_t<decltype(list)>::kCapacity;
    if (p.f64)
      BK_LAUNCH((value_kernel<double, kItems>), grid, kThreads, 0, stream, list);
    else
      BK_LAUNCH((value_kernel<float, kItems>), grid, kThreads, 0, stream, list);
  });
  if (error != nullptr) return error;
  BK_LAUNCH(total_kernel, 1, kThreads, 0, stream, static_cast<const double*>(p.workspace),
            value_blocks(p), static_cast<double*>(p.out));
  return bk_last_error();
}

const char* gaussian_kl_gradient_cuda(const DivergenceParams& p, void* stream) {
  return launch_gradient<false>(p, stream);
}

const char* gaussian_kl_step_cuda(const DivergenceParams& p, void* stream) {
  return launch_gradient<true>(p, stream);
}

}  // namespace bayes_kernels
