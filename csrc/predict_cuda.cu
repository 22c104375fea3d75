// Predict family on the GPU.
//
// Up to 2048 classes: one launch, whose blocks prepare an example, take a range of its draws and,
// the last of them, end its sums: predict_small.cuh and predict_large.cuh. More classes: four.
// Ranges depend on the shape only, and sums are added in their order.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "predict_large.cuh"
#include "predict_small.cuh"

namespace bayes_kernels {
namespace {

// Rows go in chunks whose workspace is at most this: 8,192 rows of 128,256 classes would take 25 GB
// and more. The emulator's is small, so that its tests cut rows too.
#ifdef BAYES_KERNELS_SIM
constexpr int64_t kWorkspaceBytes = 16 << 10;
#else
constexpr int64_t kWorkspaceBytes = 256 << 20;
#endif

Layout layout_of(const PredictParams& p, int64_t* bytes) {
  Layout out{};
  const bool small = p.classes <= kSmall, many = p.classes > kHeld;
  const int64_t sums = p.rows * p.classes;
  out.groups = ceil_div(draws_of(p), kGroup);
  const int64_t least = small ? kWarp : many ? kLargeRange : kHeldRange;
  const int64_t most = small ? kSmallRanges : many ? kLargeRanges : kHeldRanges;
  out.range_groups = ceil_div(out.groups, std::min(ceil_div(out.groups, least), most));
  if (small) out.range_groups = ceil_div(out.range_groups, kWarp) * kWarp;
  out.ranges = ceil_div(out.groups, out.range_groups);
  out.parts = many ? out.groups : out.ranges;
  char* base = static_cast<char*>(p.workspace);
  int64_t used = 0;
  const auto take = [&](int64_t count, int64_t size) {
    char* at = base == nullptr ? nullptr : base + used;
    used += ceil_div(count * size, 16) * 16;
    return at;
  };
  out.sum = reinterpret_cast<double*>(take(sums * out.ranges, 8));
  const int64_t moments = p.standard_error != nullptr ? sums * out.ranges : 0;
  out.mean = reinterpret_cast<double*>(take(moments, 8));
  out.squares = reinterpret_cast<double*>(take(moments, 8));
  out.entropy = reinterpret_cast<double*>(take(p.rows * out.parts, 8));
  out.shift = reinterpret_cast<float*>(take(sums * out.ranges, 4));
  out.tickets = reinterpret_cast<int32_t*>(take(many ? 0 : p.rows, 4));
  out.l = reinterpret_cast<float*>(take(many ? sums : 0, 4));
  out.scale = reinterpret_cast<float*>(take(many ? sums : 0, 4));
  out.normaliser = reinterpret_cast<float*>(
      take(many ? p.rows * out.groups * kGroup * (p.antithetic ? 2 : 1) : 0, 4));
  out.row = reinterpret_cast<Row*>(take(many ? p.rows : 0, sizeof(Row)));
  *bytes = used;
  return out;
}

// Blocks of one row in the widest launch.
int64_t blocks_of(const PredictParams& p, const Layout& at) {
  if (p.classes <= kSmall) return ceil_div(at.ranges, small_warps(p, at.ranges));
  if (p.classes <= kHeld) return at.ranges;
  return std::max(at.groups, at.ranges * ceil_div(p.classes, kClassThreads));
}

template <int signs>
void launch_row_blocks(const Arguments& a, void* stream) {
  const PredictParams& p = a.p;
  const int64_t blocks = blocks_of(p, a.at);
  if (blocks > 1) bk_zero(a.at.tickets, static_cast<std::size_t>(p.rows) * sizeof(int32_t), stream);
  const dim3 grid(static_cast<unsigned>(p.rows * blocks));
  const auto launch = [&](auto kernel, int64_t threads, int64_t bytes) {
    if (bytes > kSmallBytes) bk_set_max_dynamic_smem(kernel, static_cast<std::size_t>(bytes));
    BK_LAUNCH(kernel, grid, static_cast<unsigned>(threads), static_cast<std::size_t>(bytes), stream,
              a);
  };
  if (p.classes <= kSmall) {
    const int64_t warps = small_warps(p, a.at.ranges);
    launch(small_kernel<signs>, warps * kWarp, warps * small_warp_bytes(p));
  } else {
    launch(held_kernel<signs>, held_threads(p), held_bytes(p));
  }
}

template <int signs>
void launch_samples(const Arguments& a, void* stream) {
  const PredictParams& p = a.p;
  BK_LAUNCH_BEHIND(true, normaliser_kernel<signs>,
                   dim3(static_cast<unsigned>(p.rows * a.at.groups)), kMaxWarps * kWarp, 0, stream,
                   a);
  const int64_t tiles = ceil_div(p.classes, kClassThreads);
  BK_LAUNCH_BEHIND(true, average_kernel<signs>,
                   dim3(static_cast<unsigned>(p.rows * a.at.ranges * tiles)), kClassThreads, 0,
                   stream, a);
}

// `count` rows from row `first` on, as a call of their own: the same keys, hence the same bits.
PredictParams rows_of(const PredictParams& p, int64_t first, int64_t count) {
  PredictParams q = p;
  const auto from = [&](auto pointer, int64_t width) {
    using T = std::conditional_t<std::is_const<std::remove_pointer_t<decltype(pointer)>>::value,
                                 const float, float>;
    return pointer == nullptr ? nullptr : static_cast<T*>(pointer) + first * width;
  };
  q.mean = from(p.mean, p.classes);
  q.cov = from(p.cov, p.full ? p.classes * p.classes : p.classes);
  q.log_probs = from(p.log_probs, p.classes);
  q.standard_error = from(p.standard_error, p.classes);
  q.entropy = from(p.entropy, 1);
  q.expected_entropy = from(p.expected_entropy, 1);
  if (p.row_ids.ids != nullptr)
    q.row_ids.ids = p.row_ids.ids + first;
  else
    q.row_ids.row0 = p.row_ids.row0 + first;
  q.rows = count;
  return q;
}

// Rows that a chunk has: by the shape only. None where one row is more than a grid can take.
int64_t chunk_of(const PredictParams& p) {
  int64_t bytes = 0;
  const PredictParams first = rows_of(p, 0, 1);
  const int64_t blocks = blocks_of(first, layout_of(first, &bytes));
  const int64_t grid = std::numeric_limits<int32_t>::max() / blocks;
  const int64_t memory = kWorkspaceBytes / bytes < 1 ? 1 : kWorkspaceBytes / bytes;
  return std::min({p.rows, grid, memory});
}

const char* predict_rows(const PredictParams& p, void* stream) {
  int64_t bytes = 0;
  const Arguments a{p, layout_of(p, &bytes)};
  if (p.classes <= kHeld) {
    if (p.antithetic)
      launch_row_blocks<2>(a, stream);
    else
      launch_row_blocks<1>(a, stream);
    return bk_last_error();
  }
  const dim3 rows(static_cast<unsigned>(p.rows));
  BK_LAUNCH(prepare_kernel, rows, kRowThreads, 0, stream, a);
  if (p.antithetic)
    launch_samples<2>(a, stream);
  else
    launch_samples<1>(a, stream);
  BK_LAUNCH_BEHIND(true, finish_kernel, rows, kRowThreads, 0, stream, a);
  return bk_last_error();
}

}  // namespace

int64_t predict_workspace_cuda(const PredictParams& p) {
  int64_t bytes = 0;
  layout_of(rows_of(p, 0, chunk_of(p)), &bytes);
  return bytes;
}

const char* mc_predict_cuda(const PredictParams& p, void* stream) {
  const int64_t chunk = chunk_of(p);
  if (chunk == 0) return "more classes or samples than one launch can take; use fewer";
  for (int64_t first = 0; first < p.rows; first += chunk) {
    const char* error =
        predict_rows(rows_of(p, first, p.rows - first < chunk ? p.rows - first : chunk), stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace bayes_kernels
