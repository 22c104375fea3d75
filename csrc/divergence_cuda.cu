// Divergence family on the GPU: one launch for a whole list of tensors.
//
// The list travels by value in the kernel's arguments: no copy to the device, so a captured graph
// replays it. A block finds its tensor by a search in the running block counts. Arithmetic is fp64,
// of which no more is done than the bytes leave time for: one logarithm of the product of four
// deviations, no division by the prior.
//
// A thread has V neighbouring weights of 16 bytes, kAhead times. Tensors that are not aligned are
// read one by one by the same threads, so that sums have the same bits wherever a tensor lies.
#include <type_traits>

#include "cuda_portable.h"
#include "divergence.h"
#include "ticket.cuh"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // weights per block: a constant, so that sums have fixed bits
constexpr int kAhead = 2;         // of 16 bytes, loaded before the first is used
constexpr int kPartsAhead = 8;    // partial sums
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr double kMinStd = BK_MIN_RHO * BK_MIN_RHO;

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type = float4;
};
template <>
struct Vector<double> {
  using type = double2;
};
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// One tensor as rows that share a rho; a tensor whose rho has its shape is a single row.
struct Place {
  void* mean;
  void* rho;
  double prior_std;
  int64_t columns;      // weights in a row
  int32_t first_block;  // of this tensor in the launch
  int16_t row_constant;
  int16_t wide;  // rows begin at 16-byte boundaries
};
template <bool kGradients>
struct Item : Place {};
template <>
struct Item<true> : Place {
  void* dmean;
  void* drho;
};

template <bool kGradients, int kCount>
struct List {
  static constexpr int kItems = kCount;
  Item<kGradients> items[kItems];
  int32_t n_items;
  Std std;
  Direction direction;
  int32_t before;   // blocks of the launches before this
  int32_t blocks;   // of all launches
  int32_t* ticket;  // of all blocks
  double* partial;  // one per block
  double* out;
  const void* weight;
};
constexpr int kFew = 70, kMany = 580;
static_assert(sizeof(List<true, kFew>) <= kArguments, "kernel arguments");
static_assert(sizeof(List<true, kMany>) <= kLargeArguments, "kernel arguments");

template <bool kGradients, int kItems>
__device__ int item_of(const List<kGradients, kItems>& list, int block) {
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
  __syncthreads();  // the next sum writes the same memory
  return sum;
}

// Numbers i to i + V - 1 of each kAhead-th part of the row, below `end`; zero behind it.
template <class T, int V>
__device__ __forceinline__ void load_ahead(const T* from, int64_t i, int64_t end, bool wide,
                                           T (&to)[kAhead][V]) {
  if (wide && i + (kAhead - 1) * V * kThreads + V <= end) {
    BK_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const typename Vector<T>::type v =
          __ldcg(reinterpret_cast<const typename Vector<T>::type*>(from + i + u * V * kThreads));
      to[u][0] = v.x, to[u][1] = v.y;
      if constexpr (V == 4) to[u][2] = v.z, to[u][3] = v.w;
    }
    return;
  }
  BK_UNROLL
  for (int u = 0; u < kAhead; ++u) BK_UNROLL
  for (int e = 0; e < V; ++e) {
    const int64_t at = i + u * V * kThreads + e;
    to[u][e] = at < end ? from[at] : T(0);
  }
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, int64_t i, int64_t end, bool wide,
                                      const double (&values)[V]) {
  if (wide && i + V <= end) {
    typename Vector<T>::type v;
    v.x = static_cast<T>(values[0]), v.y = static_cast<T>(values[1]);
    if constexpr (V == 4) v.z = static_cast<T>(values[2]), v.w = static_cast<T>(values[3]);
    *reinterpret_cast<typename Vector<T>::type*>(to + i) = v;
    return;
  }
  BK_UNROLL
  for (int e = 0; e < V; ++e)
    if (i + e < end) to[i + e] = static_cast<T>(values[e]);
}

// Deviations, at least kMinStd, which the divergence takes smaller ones for.
template <class T, int V>
__device__ __forceinline__ void stds_of(Std kind, const T (&rho)[V], double (&s)[V]) {
  BK_UNROLL
  for (int e = 0; e < V; ++e) s[e] = static_cast<double>(rho[e]);
  if (kind == Std::kSquare) {
    BK_UNROLL
    for (int e = 0; e < V; ++e) s[e] = std_of<double>(Std::kSquare, s[e]);
  } else if (kind == Std::kSoftplus) {
    BK_UNROLL
    for (int e = 0; e < V; ++e) s[e] = std_of<double>(Std::kSoftplus, s[e]);
  }
  BK_UNROLL
  for (int e = 0; e < V; ++e) s[e] = s[e] > kMinStd ? s[e] : kMinStd;
}

// A block's part of the sum; the last block adds up all of them.
template <int kItems>
__device__ __forceinline__ void finish(const List<false, kItems>& list, double sum) {
  sum = block_sum(sum);
  if (threadIdx.x == 0) list.partial[list.before + static_cast<int>(blockIdx.x)] = sum;
  if (!last_of(list.ticket, list.blocks)) return;
  sum = 0;
  for (int first = threadIdx.x; first < list.blocks; first += kPartsAhead * kThreads) {
    double part[kPartsAhead];
    BK_UNROLL
    for (int u = 0; u < kPartsAhead; ++u)
      part[u] =
          first + u * kThreads < list.blocks ? __ldcg(list.partial + first + u * kThreads) : 0;
    BK_UNROLL
    for (int u = 0; u < kPartsAhead; ++u) sum += part[u];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *list.out = sum;
}

template <class T, int kItems>
__global__ void __launch_bounds__(kThreads, 4)
    value_kernel(const __grid_constant__ List<false, kItems> list) {
  constexpr int V = kWidth<T>;
  const Place& item = list.items[item_of(list, static_cast<int>(blockIdx.x))];
  const int64_t unit = static_cast<int>(blockIdx.x) - item.first_block;
  const int64_t chunks = ceil_div(item.columns, kChunk), row = unit / chunks;
  const int64_t begin = (unit - row * chunks) * kChunk;
  const int64_t end = begin + kChunk < item.columns ? begin + kChunk : item.columns;
  const bool wide = item.wide != 0, elbo = list.direction == Direction::kElbo;
  const T* mean = static_cast<const T*>(item.mean) + row * item.columns;
  const T* rho = static_cast<const T*>(item.rho) + (item.row_constant != 0 ? row : 0);
  const double prior = item.prior_std, square = prior * prior, sign = elbo ? 1.0 : -1.0;
  double sum = 0;
  if (item.row_constant != 0) {
    double squares = 0;
    for (int64_t i = begin + V * threadIdx.x; i < end; i += kAhead * V * kThreads) {
      T m[kAhead][V];
      load_ahead(mean, i, end, wide, m);
      BK_UNROLL
      for (int u = 0; u < kAhead; ++u) BK_UNROLL
      for (int e = 0; e < V; ++e) {
        const double value = static_cast<double>(m[u][e]);
        squares = fma(value, value, squares);
      }
    }
    const T one[1] = {rho[0]};
    double s[1];
    stds_of(list.std, one, s);
    const double scale = 0.5 / (elbo ? square : s[0] * s[0]);
    sum = scale * squares;
    if (threadIdx.x == 0)  // what does not depend on the mean
      sum += static_cast<double>(end - begin) *
             (sign * log(prior / s[0]) - 0.5 + scale * (elbo ? s[0] * s[0] : square));
  } else {
    double log_prior = 0, scale = 0;
    for (int64_t i = begin + V * threadIdx.x; i < end; i += kAhead * V * kThreads) {
      T m[kAhead][V], r[kAhead][V];
      load_ahead(mean, i, end, wide, m);
      load_ahead(rho, i, end, wide, r);
      if (scale == 0) {  // behind the first loads, which take longer
        log_prior = log(prior);
        scale = 0.5 / (elbo ? square : 1.0);
      }
      BK_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int64_t left = end - (i + u * V * kThreads);
        const int n = left >= V ? V : left > 0 ? static_cast<int>(left) : 0;
        double s[V];
        stds_of(list.std, r[u], s);
        if constexpr (sizeof(T) == sizeof(double)) {
          BK_UNROLL
          for (int e = 0; e < V; ++e)
            if (e < n) sum += gaussian_kl_term(list.direction, m[u][e], s[e], prior);
        } else {
          // Four deviations of fp32 numbers are (1e-8)^4 to (1e77)^4, within fp64.
          double product = 1, squares = 0;
          BK_UNROLL
          for (int e = 0; e < V; ++e) {
            const double value = static_cast<double>(m[u][e]);
            const double q =
                elbo ? fma(s[e], s[e], value * value) : fma(value, value, square) / (s[e] * s[e]);
            if (e < n) {
              product *= s[e];
              squares += q;
            }
          }
          const double count = static_cast<double>(n);
          sum += fma(scale, squares, sign * (count * log_prior - log(product)) - 0.5 * count);
        }
      }
    }
  }
  finish(list, sum);
}

// kStep: mean -= weight * dKL/dmean in place, and so for rho; else the gradients are written out.
template <bool kStep>
__device__ __forceinline__ double applied(double old, double weighted) {
  return kStep ? old - weighted : weighted;
}

// A block takes a chunk of weights, or, where rho is constant along rows, a whole row.
template <class T, bool kStep, int kItems>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(const __grid_constant__ List<!kStep, kItems> list) {
  constexpr int V = kWidth<T>;
  const auto& item = list.items[item_of(list, static_cast<int>(blockIdx.x))];
  const int64_t unit = static_cast<int>(blockIdx.x) - item.first_block;
  const bool wide = item.wide != 0, elbo = list.direction == Direction::kElbo;
  const double weight = static_cast<double>(*static_cast<const T*>(list.weight));
  const double square = item.prior_std * item.prior_std, precision = 1.0 / square;
  T *mean = static_cast<T*>(item.mean), *rho = static_cast<T*>(item.rho);
  T *mean_out = mean, *rho_out = rho;
  if constexpr (!kStep) {
    mean_out = static_cast<T*>(item.dmean);
    rho_out = static_cast<T*>(item.drho);
  }
  if (item.row_constant == 0) {
    const int64_t begin = unit * kChunk;
    const int64_t end = begin + kChunk < item.columns ? begin + kChunk : item.columns;
    for (int64_t first = begin + V * threadIdx.x; first < end; first += kAhead * V * kThreads) {
      T means[kAhead][V], rhos[kAhead][V];
      load_ahead(mean, first, end, wide, means);
      load_ahead(rho, first, end, wide, rhos);
      BK_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        double s[V], dmean[V], drho[V];
        stds_of(list.std, rhos[u], s);
        BK_UNROLL
        for (int e = 0; e < V; ++e) {
          const double m = static_cast<double>(means[u][e]), inverse = 1.0 / s[e];
          const double of_mean = elbo ? precision : inverse * inverse;
          const double of_std = elbo ? fma(s[e], precision, -inverse)
                                     : inverse - fma(m, m, square) * of_mean * inverse;
          dmean[e] = applied<kStep>(m, weight * (m * of_mean));
          drho[e] = weight * of_std;
        }
        BK_UNROLL
        for (int e = 0; e < V; ++e) s[e] = static_cast<double>(rhos[u][e]);
        if (list.std == Std::kSquare) {
          BK_UNROLL
          for (int e = 0; e < V; ++e)
            drho[e] *= std_derivative<double>(Std::kSquare, guarded(Std::kSquare, s[e]));
        } else if (list.std == Std::kSoftplus) {
          BK_UNROLL
          for (int e = 0; e < V; ++e) drho[e] *= std_derivative<double>(Std::kSoftplus, s[e]);
        }
        BK_UNROLL
        for (int e = 0; e < V; ++e) drho[e] = applied<kStep>(s[e], drho[e]);
        store(mean_out, first + u * V * kThreads, end, wide, dmean);
        store(rho_out, first + u * V * kThreads, end, wide, drho);
      }
    }
    return;
  }
  const double r = static_cast<double>(rho[unit]);
  const T one[1] = {rho[unit]};
  double s[1];
  stds_of(list.std, one, s);
  const double inverse = 1.0 / s[0], of_mean = elbo ? precision : inverse * inverse;
  const int64_t begin = unit * item.columns, end = begin + item.columns;
  double squares = 0;
  for (int64_t first = begin + V * threadIdx.x; first < end; first += kAhead * V * kThreads) {
    T means[kAhead][V];
    load_ahead(mean, first, end, wide, means);
    BK_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      double dmean[V];
      BK_UNROLL
      for (int e = 0; e < V; ++e) {
        const double m = static_cast<double>(means[u][e]);
        squares = fma(m, m, squares);
        dmean[e] = applied<kStep>(m, weight * (m * of_mean));
      }
      store(mean_out, first + u * V * kThreads, end, wide, dmean);
    }
  }
  // The barriers also order every thread's read of rho before the write below.
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  const double count = static_cast<double>(item.columns);
  const double of_std = elbo ? count * fma(s[0], precision, -inverse)
                             : count * inverse - fma(count, square, squares) * of_mean * inverse;
  rho_out[unit] = static_cast<T>(applied<kStep>(
      r, weight * (of_std * std_derivative<double>(list.std, guarded(list.std, r)))));
}

// Blocks of an item: chunks of rows for the value, whole rows or chunks for the gradient.
int64_t blocks_of(const DivergenceItem& item, bool value) {
  if (item.count == 0) return 0;
  if (item.columns == 1) return ceil_div(item.count, kChunk);
  return item.count / item.columns * (value ? ceil_div(item.columns, kChunk) : 1);
}

int64_t value_blocks(const DivergenceParams& p) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < p.n_items; ++i) blocks += blocks_of(p.items[i], true);
  return blocks;
}

// Calls use(list, blocks) for every group of tensors that a launch takes.
template <bool kGradients, int kItems, class Use>
const char* for_lists_of(const DivergenceParams& p, const Use& use) {
  const bool value = p.out != nullptr;
  const int64_t unit = p.f64 ? 2 : 4;
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  int64_t before = 0;
  for (int64_t i = 0; i < p.n_items;) {
    List<kGradients, kItems> list{};
    list.std = p.std;
    list.direction = p.direction;
    list.before = static_cast<int32_t>(before);
    list.weight = p.weight;
    if (value) {
      list.blocks = static_cast<int32_t>(value_blocks(p));
      list.partial = static_cast<double*>(p.workspace);
      list.ticket = reinterpret_cast<int32_t*>(list.partial + list.blocks);
      list.out = static_cast<double*>(p.out);
    }
    int64_t blocks = 0;
    for (; i < p.n_items && list.n_items < kItems; ++i) {
      const DivergenceItem& given = p.items[i];
      if (given.count == 0) continue;
      Item<kGradients>& item = list.items[list.n_items++];
      item.mean = given.mean;
      item.rho = given.rho;
      item.prior_std = given.prior_std;
      item.row_constant = given.columns != 1;
      item.columns = item.row_constant != 0 ? given.columns : given.count;
      item.first_block = static_cast<int32_t>(blocks);
      bool wide = aligned(given.mean);
      if (item.row_constant != 0)
        wide = wide && given.columns % unit == 0;
      else
        wide = wide && aligned(given.rho);
      if constexpr (kGradients) {
        item.dmean = given.dmean;
        item.drho = given.drho;
        wide = wide && aligned(given.dmean) && (item.row_constant != 0 || aligned(given.drho));
      }
      item.wide = wide ? 1 : 0;
      blocks += blocks_of(given, value);
    }
    if (blocks == 0) continue;
    use(list, dim3(static_cast<unsigned>(blocks)));
    const char* error = bk_last_error();
    if (error != nullptr) return error;
    before += blocks;
  }
  return nullptr;
}

template <bool kGradients, class Use>
const char* for_lists(const DivergenceParams& p, const Use& use) {
  return p.n_items > kFew && bk_large_arguments() ? for_lists_of<kGradients, kMany>(p, use)
                                                  : for_lists_of<kGradients, kFew>(p, use);
}

template <bool kStep>
const char* launch_gradient(const DivergenceParams& p, void* stream) {
  return for_lists<!kStep>(p, [&](const auto& list, dim3 grid) {
    constexpr int kItems = std::decay_t<decltype(list)>::kItems;
    if (p.f64)
      BK_LAUNCH((gradient_kernel<double, kStep, kItems>), grid, kThreads, 0, stream, list);
    else
      BK_LAUNCH((gradient_kernel<float, kStep, kItems>), grid, kThreads, 0, stream, list);
  });
}

}  // namespace

int64_t divergence_workspace_cuda(const DivergenceParams& p) {
  return p.out == nullptr ? 0 : (value_blocks(p) + 1) * static_cast<int64_t>(sizeof(double));
}

const char* gaussian_kl_cuda(const DivergenceParams& p, void* stream) {
  const int64_t blocks = value_blocks(p);
  if (blocks == 0) bk_zero(p.out, sizeof(double), stream);
  if (blocks > 1)  // the ticket
    bk_zero(static_cast<double*>(p.workspace) + blocks, sizeof(double), stream);
  return for_lists<false>(p, [&](const auto& list, dim3 grid) {
    constexpr int kItems = std::decay_t<decltype(list)>::kItems;
    if (p.f64)
      BK_LAUNCH((value_kernel<double, kItems>), grid, kThreads, 0, stream, list);
    else
      BK_LAUNCH((value_kernel<float, kItems>), grid, kThreads, 0, stream, list);
  });
}

const char* gaussian_kl_gradient_cuda(const DivergenceParams& p, void* stream) {
  return launch_gradient<false>(p, stream);
}

const char* gaussian_kl_step_cuda(const DivergenceParams& p, void* stream) {
  return launch_gradient<true>(p, stream);
}

}  // namespace bayes_kernels
