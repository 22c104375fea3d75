// Low-rank adapter family: shrink (activations to rank space), expand (rank space to output) and
// their derivatives. Torch-free: one params struct and one launch declaration per device.
#pragma once

#include "core/philox.h"
#include "core/portable.h"
#include "core/posterior.h"

namespace bayes_kernels {

constexpr int kMaxFusedRank = 64;

// Flipped-sign noise and dropout of one call. Without noise `e` is null; without dropout the
// probability is 0; `key` may be null only where both are absent.
struct AdapterNoise {
  const int64_t* key;  // (seed, offset), on the op's device
  int64_t stream;
  RowIds rows;
  double dropout;
};

// What kernels make E = std(rho) . eps from, with the key and stream of the noise: one block of
// columns at a time on the CPU (few tokens only), in fragment order on a GPU. The numbers are those
// of scaled_normal, bit for bit.
struct AdapterDraw {
  const void* rho = nullptr;  // (r, n) or (r, 1), like a; null where `e` holds E, or without noise
  bool row_constant = false;  // rho is (r, 1)
  Std std = Std::kSquare;
  const float* eps = nullptr;  // (r, n) where the CPU knows it already; else it is drawn
};

// Tokens up to which the CPU kernels take an AdapterDraw: one task's worth, so that each normal is
// drawn once. Beyond, the draw is a small part of the work.
constexpr int64_t few_shrink_tokens(int64_t r) { return r <= 8 ? 64 : 512 / r; }
constexpr int64_t kFewBackwardTokens = 128;

// CUDA only: counters with which the blocks of expand_backward and shrink_backward find their last
// one. Kernels leave them at zero, so that the second op need not set them where the first has.
struct AdapterTickets {
  int* at = nullptr;  // null: in the workspace
  int64_t count = 0;
  bool zero = false;  // already
};
// Enough for both ops: a block of tokens and one of columns have one each, and where more than
// eight parts are added about the root of their number more, of at most 256 blocks in all.
constexpr int64_t adapter_tickets(int64_t tokens, int64_t columns) {
  return 8 * ((tokens + 31) / 32 + (columns + 127) / 128);
}

// h = x' a^T + ((x' . R_in) e^T) . R_out with x' = dropout(x)
struct ShrinkParams {
  DType dtype;       // of x
  const void* x;     // (tokens, n), unit column stride
  int64_t x_stride;  // elements between rows
  const void* a;     // (r, n) contiguous, fp32 (fp64 beside fp64 x)
  const void* e;     // (r, n) like a, or null
  AdapterNoise noise;
  void* h;          // (tokens, r) contiguous, fp32 (fp64)
  void* workspace;  // shrink_workspace bytes
  int64_t tokens, n;
  int r;
  AdapterDraw draw = {};  // in place of e
  int64_t of_tokens = 0;  // CPU: rows of the call that this is a part of
};

// dx = (dh a + ((dh . R_out) e) . R_in) . dropout', da = dh^T x', de = (dh . R_out)^T (x' . R_in);
// with a draw drho = de . eps . std'(rho) in place of de, but on a GPU where rho is (r, 1)
struct ShrinkBackwardParams {
  DType dtype;
  const void* dh;  // (tokens, r) contiguous, fp32 (fp64)
  const void* x;
  int64_t x_stride;
  const void* a;
  const void* e;
  AdapterNoise noise;
  void* dx;         // (tokens, n) contiguous, or null
  void* da;         // (r, n), or null
  void* de;         // (r, n), or null
  void* workspace;  // shrink_backward_workspace bytes
  int64_t tokens, n;
  int r;
  AdapterDraw draw = {};  // in place of e; rho (r, n) on the CPU
  AdapterTickets tickets = {};
};

// y = base + scaling * h b^T
struct ExpandParams {
  DType dtype;       // of base and y
  const void* h;     // (tokens, r) contiguous, fp32 (fp64)
  const void* b;     // (m, r) contiguous, fp32 (fp64)
  const void* base;  // (tokens, m), unit column stride, or null
  int64_t base_stride;
  void* y;          // (tokens, m) contiguous
  void* workspace;  // expand_workspace bytes
  double scaling;
  int64_t tokens, m;
  int r;
  bool behind = false;  // CUDA only: the kernel in front on the stream is shrink of the same call
};

// dh = scaling * dy b, db = scaling * dy^T h
struct ExpandBackwardParams {
  DType dtype;     // of dy
  const void* dy;  // (tokens, m), unit column stride
  int64_t dy_stride;
  const void* h;
  const void* b;
  void* dh;         // (tokens, r), or null
  void* db;         // (m, r), or null
  void* workspace;  // expand_backward_workspace bytes
  double scaling;
  int64_t tokens, m;
  int r;
  AdapterTickets tickets = {};
};

// CUDA only: whole adapters that share x, h b^T after h, in one launch. For few tokens.
constexpr int64_t kDecodeTokens = 16;
constexpr int kMaxDecodeItems = 8;

struct DecodeItem {
  const void *a, *b;  // as in shrink and expand, fp32
  const void* rho;    // (r, n) or (r, 1), of all items or of none
  bool row_constant;
  const void* base;  // or null
  int64_t base_stride;
  void* y;
  void* h;      // or null
  DType dtype;  // of base and y
  int64_t m, stream;
  int r;
  double scaling;
};

struct DecodeParams {
  DType dtype;
  const void* x;
  int64_t x_stride;
  AdapterNoise noise;  // each item has a stream of its own
  Std std;
  void* workspace;  // decode_workspace bytes
  int64_t tokens, n;
  int items;
  DecodeItem item[kMaxDecodeItems];
};

// Whether an adapter of this size can be one of them: a block's sums fit its shared memory.
bool decodes_cuda(int64_t tokens, int64_t n, int64_t r);
int64_t decode_workspace_cuda(const DecodeParams& p);
const char* decode_cuda(const DecodeParams& p, void* stream);

// CPU only: shrink of 1 to kMaxShrinkList adapters that share x, which is read from memory once
// where they have one rank; the numbers are those of shrink.
constexpr int64_t kMaxShrinkList = 8;
void shrink_list_cpu(const ShrinkParams* p, int64_t count);
void shrink_list_baseline(const ShrinkParams* p, int64_t count);
void shrink_list_avx2(const ShrinkParams* p, int64_t count);
void shrink_list_avx512(const ShrinkParams* p, int64_t count);

// Each returns null on success or the text of an error. Zero tokens are handled by the caller.
#define BK_DECLARE_ADAPTER(device)                                                   \
  int64_t shrink_workspace_##device(const ShrinkParams& p);                          \
  int64_t shrink_backward_workspace_##device(const ShrinkBackwardParams& p);         \
  int64_t expand_workspace_##device(const ExpandParams& p);                          \
  int64_t expand_backward_workspace_##device(const ExpandBackwardParams& p);         \
  const char* shrink_##device(const ShrinkParams& p, void* stream);                  \
  const char* shrink_backward_##device(const ShrinkBackwardParams& p, void* stream); \
  const char* expand_##device(const ExpandParams& p, void* stream);                  \
  const char* expand_backward_##device(const ExpandBackwardParams& p, void* stream)

BK_DECLARE_ADAPTER(cpu);
BK_DECLARE_ADAPTER(baseline);
BK_DECLARE_ADAPTER(avx2);
BK_DECLARE_ADAPTER(avx512);
BK_DECLARE_ADAPTER(cuda);

}  // namespace bayes_kernels
