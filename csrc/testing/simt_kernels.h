// Launches of the kernels in simt_kernels.cu, whose correct and faulty forms the emulator's tests
// run.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>

namespace simt_test {

// gram (16 x 16) = rows (16 x n) times its transpose, through shared-memory tiles.
enum class GramFault { none, no_barrier_before_use, no_barrier_after_use, short_fill };
void gram(GramFault fault, const float* rows, float* gram, int n);

// out[block * 256 + thread] = sum of in over the block, by shuffles and dynamic shared memory.
void block_sum(const float* in, float* out, int n_blocks);

// For each lane of one warp: four shuffles of its value 10 * lane (indexed, xor, down, up; width
// 8), then the ballot of odd lanes, any and all.
void warp_operations(int* out);

// c (m x n, fp32) = a (m x k, row-major) b, where b is stored (n x k) row-major or, if transposed,
// (k x n). m a multiple of 16, n of 16, k of 16.
template <class Element>
void matmul(const Element* a, const Element* b, float* c, int m, int n, int k, bool b_is_k_by_n);

// a stored (k x m) row-major, read through ldmatrix_x4_trans; b stored (n x k).
template <class Element>
void matmul_transposed_a(const Element* a, const Element* b, float* c, int m, int n, int k);

// out = 2 * in, staged through shared memory by cp.async with two buffers; n need not be a multiple
// of 4.
enum class CopyFault { none, no_wait, no_commit, wait_too_few, no_barrier };
void copy_async(CopyFault fault, const float* in, float* out, int n);

// Kernels with one planted fault each.
void divergent_barrier(int* out);
void divergent_shuffle(int* out);
void shuffle_outside_mask(int* out);
void shuffle_from_idle_lane(int* out);
void mixed_warp_operations(int* out);
void global_store(int* out, int index);
void shared_store(int index, int* out);
void dynamic_shared_store(int index, int* out);
void uninitialised_shared_read(int* out);
void dynamic_shared_bytes(std::size_t bytes, bool opt_in, float* out);
void misaligned_ldmatrix(float* out);

// Correct uses that a coarse check would refuse.
void early_return(int* out, int n);
void warp_private_exchange(int* out);
void block_counter(unsigned* counter, int* is_last);

// out[i] = sum of in[b][i] over 5 blocks b, added by the last of them.
enum class TicketFault { none, no_fence, fence_too_late, no_fence_of_the_last, one_too_early };
void last_block_sum(TicketFault fault, const float* in, float* partial, int* ticket, float* out);

// out[register][row][column] = in[register][column][row], 8 x 8 each.
void transpose_registers(const unsigned short* in, unsigned short* out);
void grid_of_three_dimensions(int* out);
void block_of_any_size(int* out, int n_threads);
void intrinsics(float* out, unsigned* bits);

}  // namespace simt_test
