// Grouped adapters on the CPU: the adapter kernels, one group after the other on the group's rows.
// Rows that do not lie together are copied first, a group at a time, so that they are still in the
// caches when the kernel reads them. Compiled once per instruction set (cpu_isa.h).
#include "grouped.h"

#include <cstring>
#include <type_traits>

#include "cpu_isa.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

// Hands out pieces of the workspace, each on a cache line; with a null base it only adds up.
struct Arena {
  char* base;
  int64_t used = 0;
  void* take(int64_t bytes) {
    void* at = base == nullptr ? nullptr : base + used;
    used += ceil_div(bytes, 64) * 64;
    return at;
  }
};

int64_t size_of(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }
int64_t size_of_sums(DType dtype) { return dtype == DType::kF64 ? 8 : 4; }

// The rows of one group.
struct Slice {
  int64_t group, count;
  int64_t first;         // of the call's rows, where they lie together
  const int32_t* order;  // else the rows
  int64_t factor;        // place of its factors
  int64_t row(int64_t i) const { return order == nullptr ? first + i : order[i]; }
};

Slice slice_of(const Grouping& g, int64_t tokens, int64_t group) {
  if (g.start == nullptr) {
    const int64_t begin = group * g.rows_per_group, left = tokens - begin;
    return {group,
            left < 0                  ? 0
            : left < g.rows_per_group ? left
                                      : g.rows_per_group,
            begin, nullptr, group};
  }
  const int32_t* order = g.order + g.start[group];
  const int64_t count = g.start[group + 1] - g.start[group];
  bool together = true;  // rows of a group are in rising order
  if (count > 0) together = order[count - 1] - order[0] == count - 1;
  return {group, count, count > 0 ? order[0] : 0, together ? nullptr : order, group};
}

// Rows of `bytes` bytes, `pitch` apart: where a slice's begin, or a copy of them.
const void* gathered(const Slice& s, const void* data, int64_t pitch, int64_t bytes, Arena& arena) {
  if (data == nullptr) return nullptr;
  const char* from = static_cast<const char*>(data);
  if (s.order == nullptr) return from + s.first * pitch;
  char* copy = static_cast<char*>(arena.take(s.count * bytes));
  if (copy == nullptr) return data;  // sizes depend on what is wanted, not on where it is
  for (int64_t i = 0; i < s.count; ++i)
    std::memcpy(copy + i * bytes, from + s.order[i] * pitch, static_cast<size_t>(bytes));
  return copy;
}

// Where a slice's rows of contiguous results go: their place, or memory from which `scatter` moves
// them to it.
void* results(const Slice& s, void* data, int64_t bytes, Arena& arena) {
  if (data == nullptr) return nullptr;
  if (s.order == nullptr) return static_cast<char*>(data) + s.first * bytes;
  void* at = arena.take(s.count * bytes);
  return at == nullptr ? data : at;
}

void scatter(const Slice& s, const void* from, void* data, int64_t bytes) {
  if (data == nullptr || s.order == nullptr) return;
  for (int64_t i = 0; i < s.count; ++i)
    std::memcpy(static_cast<char*>(data) + s.order[i] * bytes,
                static_cast<const char*>(from) + i * bytes, static_cast<size_t>(bytes));
}

template <class T>
T* advance(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr : static_cast<T*>(static_cast<Byte*>(data) + bytes);
}

void zero(void* data, int64_t bytes) {
  if (data != nullptr) std::memset(data, 0, static_cast<size_t>(bytes));
}

RowIds slice_ids(const Slice& s, const RowIds& rows, Arena& arena) {
  if (s.order == nullptr)
    return {rows.ids == nullptr ? nullptr : rows.ids + s.first, rows.row0 + s.first, 1};
  int64_t* ids = static_cast<int64_t*>(arena.take(s.count * 8));
  for (int64_t i = 0; ids != nullptr && i < s.count; ++i) ids[i] = sign_row(rows, s.order[i]);
  return {ids, 0, 1};
}

// Each of these runs the kernel of one group, or, with an arena that only adds up, nothing.

const char* run(const Grouped<ShrinkParams>& all, const Slice& s, Arena& arena) {
  const int64_t item = size_of(all.dtype), acc = size_of_sums(all.dtype);
  const int64_t factor = s.factor * all.r * all.n * acc;
  if (s.count == 0) return nullptr;
  ShrinkParams p = all;
  p.tokens = s.count;
  p.of_tokens = all.tokens;
  p.a = advance(all.a, factor);
  p.e = advance(all.e, factor);
  p.x = gathered(s, all.x, all.x_stride * item, all.n * item, arena);
  if (s.order != nullptr) p.x_stride = all.n;
  p.h = results(s, all.h, all.r * acc, arena);
  if (p.e != nullptr) p.noise.rows = slice_ids(s, all.noise.rows, arena);
  p.workspace = arena.take(BK_CPU(shrink_workspace)(p));
  if (arena.base == nullptr) return nullptr;
  const char* error = BK_CPU(shrink)(p, nullptr);
  scatter(s, p.h, all.h, all.r * acc);
  return error;
}

const char* run(const Grouped<ShrinkBackwardParams>& all, const Slice& s, Arena& arena) {
  const int64_t item = size_of(all.dtype), acc = size_of_sums(all.dtype);
  const int64_t factor = s.factor * all.r * all.n * acc;
  ShrinkBackwardParams p = all;
  p.tokens = s.count;
  p.a = advance(all.a, factor);
  p.e = advance(all.e, factor);
  p.da = advance(all.da, factor);
  p.de = advance(all.de, factor);
  if (s.count == 0) {
    if (arena.base != nullptr) zero(p.da, all.r * all.n * acc), zero(p.de, all.r * all.n * acc);
    return nullptr;
  }
  p.dh = gathered(s, all.dh, all.r * acc, all.r * acc, arena);
  p.x = gathered(s, all.x, all.x_stride * item, all.n * item, arena);
  if (s.order != nullptr) p.x_stride = all.n;
  p.dx = results(s, all.dx, all.n * item, arena);
  if (p.e != nullptr) p.noise.rows = slice_ids(s, all.noise.rows, arena);
  p.workspace = arena.take(BK_CPU(shrink_backward_workspace)(p));
  if (arena.base == nullptr) return nullptr;
  const char* error = BK_CPU(shrink_backward)(p, nullptr);
  scatter(s, p.dx, all.dx, all.n * item);
  return error;
}

const char* run(const Grouped<ExpandParams>& all, const Slice& s, Arena& arena) {
  const int64_t item = size_of(all.dtype), acc = size_of_sums(all.dtype);
  if (s.count == 0) return nullptr;
  ExpandParams p = all;
  p.tokens = s.count;
  p.b = advance(all.b, s.factor * all.m * all.r * acc);
  p.h = gathered(s, all.h, all.r * acc, all.r * acc, arena);
  p.base = gathered(s, all.base, all.base_stride * item, all.m * item, arena);
  if (s.order != nullptr) p.base_stride = all.m;
  p.y = results(s, all.y, all.m * item, arena);
  p.workspace = arena.take(BK_CPU(expand_workspace)(p));
  if (arena.base == nullptr) return nullptr;
  const char* error = BK_CPU(expand)(p, nullptr);
  scatter(s, p.y, all.y, all.m * item);
  return error;
}

const char* run(const Grouped<ExpandBackwardParams>& all, const Slice& s, Arena& arena) {
  const int64_t item = size_of(all.dtype), acc = size_of_sums(all.dtype);
  const int64_t factor = s.factor * all.m * all.r * acc;
  ExpandBackwardParams p = all;
  p.tokens = s.count;
  p.b = advance(all.b, factor);
  p.db = advance(all.db, factor);
  if (s.count == 0) {
    if (arena.base != nullptr) zero(p.db, all.m * all.r * acc);
    return nullptr;
  }
  p.dy = gathered(s, all.dy, all.dy_stride * item, all.m * item, arena);
  if (s.order != nullptr) p.dy_stride = all.m;
  p.h = gathered(s, all.h, all.r * acc, all.r * acc, arena);
  p.dh = results(s, all.dh, all.r * acc, arena);
  p.workspace = arena.take(BK_CPU(expand_backward_workspace)(p));
  if (arena.base == nullptr) return nullptr;
  const char* error = BK_CPU(expand_backward)(p, nullptr);
  scatter(s, p.dh, all.dh, all.r * acc);
  return error;
}

// Groups of a few rows are worked on side by side; of many, one after the other, each by all
// threads.
constexpr int64_t kFewRows = 32;
template <class Params>
bool side_by_side(const Params& p) {
  return p.groups.groups > 1 && p.tokens <= kFewRows * p.groups.groups;
}

template <class Params>
int64_t bytes_of(const Params& p, int64_t group) {
  Params sized = p;
  sized.workspace = nullptr;
  Arena arena{nullptr};
  run(sized, slice_of(p.groups, p.tokens, group), arena);
  return arena.used;
}

template <class Params>
int64_t workspace_of(const Params& p) {
  int64_t sum = 0, most = 0;
  for (int64_t group = 0; group < p.groups.groups; ++group) {
    const int64_t bytes = bytes_of(p, group);
    sum += bytes;
    most = bytes > most ? bytes : most;
  }
  return 64 + (side_by_side(p) ? sum : most);  // never null
}

// Calls work(begin, end, each) for ranges of groups, side by side or for all in one; it calls
// each(params, slice) for each group in turn. The adapter kernels have no errors.
template <class Params, class Work>
void over_groups(const Params& p, char* base, const Work& work) {
  auto range = [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (int64_t group = 0; side_by_side(p) && group < begin; ++group) offset += bytes_of(p, group);
    work(begin, end, [&](const Params& own, const Slice& slice) {
      Arena arena{base + offset};
      run(own, slice, arena);
      if (side_by_side(p)) offset += arena.used;
    });
  };
  if (side_by_side(p))
    parallel_ranges(p.groups.groups, 4, range);
  else
    range(0, p.groups.groups);
}

template <class Params>
const char* run_all(const Params& p) {
  over_groups(p, static_cast<char*>(p.workspace),
              [&](int64_t begin, int64_t end, const auto& each) {
                for (int64_t group = begin; group < end; ++group)
                  each(p, slice_of(p.groups, p.tokens, group));
              });
  return nullptr;
}

// --- draws -------------------------------------------------------------------------------------

// A pair of draws at a time: all of them would be new memory, whose pages take longer to come than
// the draws to be made.
constexpr int64_t kDraws = 2;

int64_t bytes_of_draws(const SampledShrinkParams& p) {
  return kDraws * ceil_div(p.r * p.n * size_of_sums(p.dtype), 64) * 64;
}

int64_t sampled_workspace(const SampledShrinkParams& p) {
  const int64_t ranges = side_by_side(p) ? p.groups.groups : 1;
  return ranges * bytes_of_draws(p) + workspace_of<Grouped<ShrinkParams>>(p);
}

const char* run_sampled(const SampledShrinkParams& p) {
  const Grouped<ShrinkParams>& all = p;
  const int64_t ranges = side_by_side(all) ? p.groups.groups : 1, size = bytes_of_draws(p);
  char* draws = static_cast<char*>(p.workspace);
  over_groups(all, draws + ranges * size, [&](int64_t begin, int64_t end, const auto& each) {
    DrawParams law = p.law;
    law.out = draws + (ranges > 1 ? begin : 0) * size;
    for (int64_t first = begin; first < end; first += law.count) {
      law.draws = p.law.draws + first;
      law.count = end - first < kDraws ? end - first : kDraws;
      if (law.count == 2 &&
          draw_pair(law.draws[0], law.antithetic) != draw_pair(law.draws[1], law.antithetic))
        law.count = 1;
      BK_CPU(gaussian_draws)(law, nullptr);
      for (int64_t i = 0; i < law.count; ++i) {
        Grouped<ShrinkParams> own = all;
        own.a = law.out;
        Slice slice = slice_of(all.groups, all.tokens, first + i);
        slice.factor = i;
        each(own, slice);
      }
    }
  });
  return nullptr;
}

}  // namespace

const char* BK_CPU(group_rows)(const GroupRowsParams& p, void*) {
  for (int64_t g = 0; g <= p.groups; ++g) p.start[g] = 0;
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (p.ids[t] < 0 || p.ids[t] >= p.groups) return "groups must lie in [0, number of factors)";
    ++p.start[p.ids[t]];
  }
  int32_t sum = 0;  // start[g] is the next place of group g, and at the end that of group g + 1
  for (int64_t g = 0; g <= p.groups; ++g) {
    const int32_t count = p.start[g];
    p.start[g] = sum;
    sum += count;
  }
  for (int64_t t = 0; t < p.tokens; ++t) p.order[p.start[p.ids[t]]++] = static_cast<int32_t>(t);
  for (int64_t g = p.groups; g > 0; --g) p.start[g] = p.start[g - 1];
  p.start[0] = 0;
  return nullptr;
}

int64_t BK_CPU(sampled_shrink_workspace)(const SampledShrinkParams& p) {
  return sampled_workspace(p);
}
const char* BK_CPU(sampled_shrink)(const SampledShrinkParams& p, void*) { return run_sampled(p); }

#define BK_GROUPED(op, Params)                                                                   \
  int64_t BK_CPU(grouped_##op##_workspace)(const Grouped<Params>& p) { return workspace_of(p); } \
  const char* BK_CPU(grouped_##op)(const Grouped<Params>& p, void*) { return run_all(p); }
BK_GROUPED(shrink, ShrinkParams)
BK_GROUPED(shrink_backward, ShrinkBackwardParams)
BK_GROUPED(expand, ExpandParams)
BK_GROUPED(expand_backward, ExpandBackwardParams)

}  // namespace bayes_kernels
