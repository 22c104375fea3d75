#include "../cuda_portable.h"
#include "../mma.h"
#include "simt_kernels.h"

namespace simt_test {
namespace {

constexpr unsigned all_lanes = 0xffffffffu;

// The reason of a failed launch stays with the caller's next check; these launches have no other
// reporting.
void check_launch() { (void)bk_last_error(); }

// ---- correct kernels, some with a switchable fault

template <GramFault fault>
__global__ void __launch_bounds__(256)
    gram_kernel(const float* __restrict__ rows, float* out, int n) {
  BK_SHARED(float, tile, [16][33]);
  const int i = static_cast<int>(threadIdx.y);
  const int j = static_cast<int>(threadIdx.x);
  const int thread = i * 16 + j;
  float sum = 0.0f;
  for (int begin = 0; begin < n; begin += 32) {
    for (int e = thread; e < 16 * 32; e += 256) {
      const int row = e / 32;
      const int column = begin + e % 32;
      if (fault == GramFault::short_fill && column >= n) continue;
      tile[row][e % 32] = column < n ? rows[row * n + column] : 0.0f;
    }
    if (fault != GramFault::no_barrier_before_use) __syncthreads();
    BK_UNROLL
    for (int k = 0; k < 32; ++k) sum = fmaf(tile[i][k], tile[j][k], sum);
    if (fault != GramFault::no_barrier_after_use) __syncthreads();
  }
  out[i * 16 + j] = sum;
}

__global__ void block_sum_kernel(const float* __restrict__ in, float* __restrict__ out) {
  BK_DYNAMIC_SHARED(float, partial);
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = __ldg(in + index);
  for (int lanes = 16; lanes > 0; lanes >>= 1) sum += __shfl_xor_sync(all_lanes, sum, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partial[w];
  out[index] = sum;
}

__global__ void warp_operations_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* own = out + 8 * lane;
  const int value = 10 * lane;
  own[0] = __shfl_sync(all_lanes, value, 31 - lane);
  own[1] = __shfl_xor_sync(all_lanes, value, 5);
  own[2] = __shfl_down_sync(all_lanes, value, 3, 8);
  own[3] = __shfl_up_sync(all_lanes, value, 3u, 8);
  own[4] = static_cast<int>(__ballot_sync(all_lanes, lane & 1));
  own[5] = __any_sync(all_lanes, lane == 7);
  own[6] = __all_sync(all_lanes, lane < 31);
  double wide = 0.5 * lane;
  wide = __shfl_sync(all_lanes, wide, 8);
  own[7] = static_cast<int>(wide * 4.0);
}

// One warp per 16 x 16 tile of c: two products of 16 x 8.
template <class Element, bool a_is_k_by_m, bool b_is_k_by_n>
__global__ void matmul_kernel(const Element* __restrict__ a, const Element* __restrict__ b,
                              float* __restrict__ c, int m, int n, int k) {
  BK_SHARED(Element, tile_a, [16][24]);  // rows of 48 bytes keep 16-byte alignment
  BK_SHARED(Element, tile_b, [16][24]);
  const int lane = static_cast<int>(threadIdx.x);
  const int row0 = static_cast<int>(blockIdx.y) * 16;
  const int column0 = static_cast<int>(blockIdx.x) * 16;
  float d[2][4] = {};
  for (int k0 = 0; k0 < k; k0 += 16) {
    for (int e = lane; e < 256; e += 32) {
      const int i = e / 16;
      const int j = e % 16;
      tile_a[i][j] = a_is_k_by_m ? a[(k0 + i) * m + row0 + j] : a[(row0 + i) * k + k0 + j];
      tile_b[i][j] = b_is_k_by_n ? b[(k0 + i) * n + column0 + j] : b[(column0 + i) * k + k0 + j];
    }
    __syncwarp();
    std::uint32_t fragment_a[4];
    if (a_is_k_by_m) {
      // Matrices in register order: (m, k) = (0, 0), (8, 0), (0, 8), (8, 8); stored with k as the
      // row.
      ldmatrix_x4_trans(fragment_a, &tile_a[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    } else {
      ldmatrix_x4(fragment_a, &tile_a[lane % 16][lane / 16 * 8]);
    }
    BK_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::uint32_t fragment_b[2];
      if (b_is_k_by_n) {
        ldmatrix_x2_trans(fragment_b, &tile_b[lane % 16][half * 8]);
      } else {
        ldmatrix_x2(fragment_b, &tile_b[half * 8 + lane % 8][lane / 8 % 2 * 8]);
      }
      mma_m16n8k16<Element>(d[half], fragment_a, fragment_b);
    }
    __syncwarp();
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane / 4 + 8 * (i / 2);
      const int column = column0 + half * 8 + 2 * (lane % 4) + i % 2;
      c[row * n + column] = d[half][i];
    }
  }
}

template <CopyFault fault>
__global__ void copy_async_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  BK_SHARED(float, buffer, [2][128]);
  const int thread = static_cast<int>(threadIdx.x);
  const int n_tiles = (n + 127) / 128;
  const auto fetch = [&](int tile) {
    const int begin = tile * 128 + 4 * thread;
    const int valid = max(0, min(4, n - begin));
    bk_cp_async_16(&buffer[tile % 2][4 * thread], in + (valid > 0 ? begin : 0), 4 * valid);
    if (fault != CopyFault::no_commit) bk_cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < n_tiles; ++tile) {
    if (tile + 1 < n_tiles) {
      fetch(tile + 1);
      if (fault == CopyFault::wait_too_few) {
        bk_cp_async_wait<2>();
      } else if (fault != CopyFault::no_wait) {
        bk_cp_async_wait<1>();
      }
    } else {
      bk_cp_async_wait<0>();
    }
    if (fault != CopyFault::no_barrier) __syncthreads();
    for (int e = thread; e < 128; e += 32) {
      if (tile * 128 + e < n) out[tile * 128 + e] = 2.0f * buffer[tile % 2][e];
    }
    __syncthreads();
  }
}

// ---- faulty kernels

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 40) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void divergent_shuffle_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) out[lane] = __shfl_xor_sync(all_lanes, lane, 1);
}

__global__ void shuffle_outside_mask_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
}

__global__ void shuffle_from_idle_lane_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) out[lane] = __shfl_sync(0x0000ffffu, lane, lane + 1);
}

__global__ void mixed_warp_operations_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(all_lanes, lane, 1);
  } else {
    out[lane] = static_cast<int>(__ballot_sync(all_lanes, 1));
  }
}

__global__ void global_store_kernel(int* out, int index) {
  if (threadIdx.x == 3) out[index] = 1;
}

__global__ void shared_store_kernel(int index, int* out) {
  BK_SHARED(int, values, [32]);
  BK_SHARED(int, others, [32]);
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = thread;
  others[thread] = thread;
  if (thread == 5) values[index] = 1;
  __syncthreads();
  out[thread] = values[31 - thread] + others[31 - thread];
}

__global__ void dynamic_shared_store_kernel(int index, int* out) {
  BK_DYNAMIC_SHARED(int, values);
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = thread;
  if (thread == 5) values[index] = 1;
  __syncthreads();
  out[thread] = values[31 - thread];
}

__global__ void uninitialised_shared_read_kernel(int* out) {
  BK_SHARED(int, values, [33]);
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = thread;
  __syncthreads();
  out[thread] = values[thread + 1];
}

__global__ void dynamic_shared_bytes_kernel(int last, float* out) {
  BK_DYNAMIC_SHARED(float, values);
  if (threadIdx.x == 0) {
    values[0] = 1.0f;
    values[last] = 2.0f;
    out[0] = values[0] + values[last];
  }
}

__global__ void misaligned_ldmatrix_kernel(float* out) {
  BK_SHARED(c10::BFloat16, tile, [16][17]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < 16 * 17; e += 32) tile[e / 17][e % 17] = c10::BFloat16(1.0f);
  __syncwarp();
  std::uint32_t fragment[4];
  ldmatrix_x4(fragment, &tile[lane % 16][lane / 16 * 8]);
  out[lane] = __uint_as_float(fragment[0]);
}

// ---- correct kernels that need care

__global__ void early_return_kernel(int* out, int n) {
  BK_SHARED(int, values, [64]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= n) return;
  values[thread] = thread;
  __syncthreads();
  out[thread] = values[n - 1 - thread];
}

// Each warp of two passes data within itself, four times, ordered by __syncwarp alone.
__global__ void warp_private_exchange_kernel(int* out) {
  BK_SHARED(int, values, [2][32]);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int value = lane;
  for (int step = 0; step < 4; ++step) {
    values[warp][lane] = value;
    __syncwarp();
    value = values[warp][(lane + 1) % 32] + warp;
    __syncwarp();
  }
  out[threadIdx.x] = value;
}

__global__ void block_counter_kernel(unsigned* counter, int* is_last) {
  BK_SHARED(unsigned, ticket, );
  if (threadIdx.x == 0) {
    __threadfence();
    ticket = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (ticket == gridDim.x - 1) is_last[threadIdx.x] = 1;
}

__global__ void last_block_sum_kernel(TicketFault fault, const float* in, float* partial,
                                      int* ticket, float* out) {
  BK_SHARED(int, found, );
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  partial[at] = in[at];
  if (fault != TicketFault::no_fence && fault != TicketFault::fence_too_late) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int last = static_cast<int>(gridDim.x) - (fault == TicketFault::one_too_early ? 2 : 1);
    found = atomicAdd(ticket, 1) == last;
    if (fault != TicketFault::no_fence_of_the_last) __threadfence();
  }
  __syncthreads();
  if (fault == TicketFault::fence_too_late) __threadfence();
  if (found == 0) return;
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block)
    sum += __ldcg(partial + block * blockDim.x + threadIdx.x);
  out[threadIdx.x] = sum;
}

__global__ void transpose_registers_kernel(const unsigned short* in, unsigned short* out) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  std::uint32_t word[4];
  for (int i = 0; i < 4; ++i) {
    const unsigned short* from = in + 64 * i + 8 * g + 2 * t;
    word[i] = from[0] | static_cast<std::uint32_t>(from[1]) << 16;
  }
  movmatrix_trans_x4(word);
  for (int i = 0; i < 4; ++i) {
    unsigned short* to = out + 64 * i + 8 * g + 2 * t;
    to[0] = static_cast<unsigned short>(word[i]);
    to[1] = static_cast<unsigned short>(word[i] >> 16);
  }
}

__global__ void grid_of_three_dimensions_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      static_cast<int>(block * 1000 + thread);
}

// out[i] = n - 1 - i plus the first value of its warp, for a block that may end within a warp.
__global__ void block_of_any_size_kernel(int* out) {
  BK_DYNAMIC_SHARED(int, values);
  const int n = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = thread;
  __syncthreads();
  const int value = values[n - 1 - thread];
  __syncwarp();
  out[thread] = value + __shfl_sync(all_lanes, value, 0);
}

__global__ void intrinsics_kernel(float* out, unsigned* bits) {
  bits[0] = __umulhi(0xD2511F53u, 0x9E3779B9u);
  bits[1] = static_cast<unsigned>(__popc(0xF0F00001u));
  bits[2] = __brev(0x00000006u);
  bits[3] = static_cast<unsigned>(__clz(0x00010000));
  bits[4] = static_cast<unsigned>(__ffs(0x00010000));
  bits[5] = __float_as_uint(1.0f);
  bits[6] = static_cast<unsigned>(__double_as_longlong(1.0) >> 32);
  bits[7] = static_cast<unsigned>(__popcll(0xFF00000000000001ull));
  bits[8] = static_cast<unsigned>(__umul64hi(0xD2511F53D2511F53ull, 0x9E3779B99E3779B9ull));
  out[0] = __uint_as_float(0x40490fdbu);
  out[1] = rsqrtf(4.0f);
  out[2] = max(1.0f, __int_as_float(0x7fc00000));
  float sine = 0.0f;
  float cosine = 0.0f;
  sincospif(0.25f, &sine, &cosine);
  out[3] = sine;
  out[4] = cosine;
  const float4 four = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
  out[5] = four.x + four.w;
  out[6] = static_cast<float>(min(3, -2) + max(4, 1));
  const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(bits + 4));
  out[7] = __uint_as_float(loaded.y);
}

}  // namespace

void gram(GramFault fault, const float* rows, float* out, int n) {
  const dim3 block(16, 16);
  switch (fault) {
    case GramFault::none:
      BK_LAUNCH(gram_kernel<GramFault::none>, 1, block, 0, nullptr, rows, out, n);
      break;
    case GramFault::no_barrier_before_use:
      BK_LAUNCH(gram_kernel<GramFault::no_barrier_before_use>, 1, block, 0, nullptr, rows, out, n);
      break;
    case GramFault::no_barrier_after_use:
      BK_LAUNCH(gram_kernel<GramFault::no_barrier_after_use>, 1, block, 0, nullptr, rows, out, n);
      break;
    case GramFault::short_fill:
      BK_LAUNCH(gram_kernel<GramFault::short_fill>, 1, block, 0, nullptr, rows, out, n);
      break;
  }
  check_launch();
}

void block_sum(const float* in, float* out, int n_blocks) {
  BK_LAUNCH(block_sum_kernel, static_cast<unsigned>(n_blocks), 256, 8 * sizeof(float), nullptr, in,
            out);
  check_launch();
}

void warp_operations(int* out) {
  BK_LAUNCH(warp_operations_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}

template <class Element>
void matmul(const Element* a, const Element* b, float* c, int m, int n, int k, bool b_is_k_by_n) {
  const dim3 grid(static_cast<unsigned>(n / 16), static_cast<unsigned>(m / 16));
  if (b_is_k_by_n) {
    BK_LAUNCH((matmul_kernel<Element, false, true>), grid, 32, 0, nullptr, a, b, c, m, n, k);
  } else {
    BK_LAUNCH((matmul_kernel<Element, false, false>), grid, 32, 0, nullptr, a, b, c, m, n, k);
  }
  check_launch();
}

template <class Element>
void matmul_transposed_a(const Element* a, const Element* b, float* c, int m, int n, int k) {
  const dim3 grid(static_cast<unsigned>(n / 16), static_cast<unsigned>(m / 16));
  BK_LAUNCH((matmul_kernel<Element, true, false>), grid, 32, 0, nullptr, a, b, c, m, n, k);
  check_launch();
}

template void matmul(const c10::BFloat16*, const c10::BFloat16*, float*, int, int, int, bool);
template void matmul(const c10::Half*, const c10::Half*, float*, int, int, int, bool);
template void matmul_transposed_a(const c10::BFloat16*, const c10::BFloat16*, float*, int, int,
                                  int);
template void matmul_transposed_a(const c10::Half*, const c10::Half*, float*, int, int, int);

void copy_async(CopyFault fault, const float* in, float* out, int n) {
  switch (fault) {
    case CopyFault::none:
      BK_LAUNCH(copy_async_kernel<CopyFault::none>, 1, 32, 0, nullptr, in, out, n);
      break;
    case CopyFault::no_wait:
      BK_LAUNCH(copy_async_kernel<CopyFault::no_wait>, 1, 32, 0, nullptr, in, out, n);
      break;
    case CopyFault::no_commit:
      BK_LAUNCH(copy_async_kernel<CopyFault::no_commit>, 1, 32, 0, nullptr, in, out, n);
      break;
    case CopyFault::wait_too_few:
      BK_LAUNCH(copy_async_kernel<CopyFault::wait_too_few>, 1, 32, 0, nullptr, in, out, n);
      break;
    case CopyFault::no_barrier:
      BK_LAUNCH(copy_async_kernel<CopyFault::no_barrier>, 1, 32, 0, nullptr, in, out, n);
      break;
  }
  check_launch();
}

void divergent_barrier(int* out) {
  BK_LAUNCH(divergent_barrier_kernel, 1, 64, 0, nullptr, out);
  check_launch();
}
void divergent_shuffle(int* out) {
  BK_LAUNCH(divergent_shuffle_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void shuffle_outside_mask(int* out) {
  BK_LAUNCH(shuffle_outside_mask_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void shuffle_from_idle_lane(int* out) {
  BK_LAUNCH(shuffle_from_idle_lane_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void mixed_warp_operations(int* out) {
  BK_LAUNCH(mixed_warp_operations_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void global_store(int* out, int index) {
  BK_LAUNCH(global_store_kernel, 1, 32, 0, nullptr, out, index);
  check_launch();
}
void shared_store(int index, int* out) {
  BK_LAUNCH(shared_store_kernel, 1, 32, 0, nullptr, index, out);
  check_launch();
}
void dynamic_shared_store(int index, int* out) {
  BK_LAUNCH(dynamic_shared_store_kernel, 1, 32, 32 * sizeof(int), nullptr, index, out);
  check_launch();
}
void uninitialised_shared_read(int* out) {
  BK_LAUNCH(uninitialised_shared_read_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void dynamic_shared_bytes(std::size_t bytes, bool opt_in, float* out) {
  if (opt_in) bk_set_max_dynamic_smem(dynamic_shared_bytes_kernel, bytes);
  const int last = static_cast<int>(bytes / sizeof(float)) - 1;
  BK_LAUNCH(dynamic_shared_bytes_kernel, 1, 32, bytes, nullptr, last, out);
  check_launch();
}
void misaligned_ldmatrix(float* out) {
  BK_LAUNCH(misaligned_ldmatrix_kernel, 1, 32, 0, nullptr, out);
  check_launch();
}
void early_return(int* out, int n) {
  BK_LAUNCH(early_return_kernel, 1, 64, 0, nullptr, out, n);
  check_launch();
}
void warp_private_exchange(int* out) {
  BK_LAUNCH(warp_private_exchange_kernel, 1, 64, 0, nullptr, out);
  check_launch();
}
void block_counter(unsigned* counter, int* is_last) {
  BK_LAUNCH(block_counter_kernel, 7, 32, 0, nullptr, counter, is_last);
  check_launch();
}
void last_block_sum(TicketFault fault, const float* in, float* partial, int* ticket, float* out) {
  BK_LAUNCH(last_block_sum_kernel, 5, 64, 0, nullptr, fault, in, partial, ticket, out);
  check_launch();
}
void transpose_registers(const unsigned short* in, unsigned short* out) {
  BK_LAUNCH(transpose_registers_kernel, 1, 32, 0, nullptr, in, out);
  check_launch();
}
void grid_of_three_dimensions(int* out) {
  BK_LAUNCH(grid_of_three_dimensions_kernel, dim3(2, 3, 4), dim3(4, 2, 5), 0, nullptr, out);
  check_launch();
}
void block_of_any_size(int* out, int n_threads) {
  const std::size_t bytes = static_cast<std::size_t>(n_threads) * sizeof(int);
  BK_LAUNCH(block_of_any_size_kernel, 1, static_cast<unsigned>(n_threads), bytes, nullptr, out);
  check_launch();
}
void intrinsics(float* out, unsigned* bits) {
  BK_LAUNCH(intrinsics_kernel, 1, 1, 0, nullptr, out, bits);
  check_launch();
}

}  // namespace simt_test
