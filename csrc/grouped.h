// Grouped adapters: the products of the adapter family where rows have factors by their group,
// which is a draw of one posterior or an expert. Torch-free.
#pragma once

#include "adapter.h"
#include "noise.h"

namespace bayes_kernels {

// The group of each row. Counted: row t has group t / rows_per_group. Else group_rows has sorted
// the rows: `order` has those of group 0, of group 1, ..., and last, on a GPU, those of no group,
// whose results are NaN; group g's begin at start[g].
struct Grouping {
  const int32_t* start = nullptr;  // (groups + 1); null where they are counted
  const int32_t* order = nullptr;  // (tokens)
  int64_t groups = 0;
  int64_t rows_per_group = 0;
};

struct GroupRowsParams {
  const int64_t* ids;  // (tokens)
  int32_t* start;
  int32_t* order;
  int64_t tokens, groups;
};

// Params of shrink, expand and their derivatives with factors and their gradients (groups, ...),
// one behind the other. A draw is never used, tickets neither, and dropout is 0; rows_per_id is 1.
template <class Params>
struct Grouped : Params {
  Grouping groups;
};

// shrink whose factor a (groups, r, n) are draws, which the op makes itself: of group g draw
// law.draws[g]. `a`, `e` and law.out are not used.
struct SampledShrinkParams : Grouped<ShrinkParams> {
  DrawParams law;
};

#define BK_DECLARE_GROUPED(device)                                                            \
  const char* group_rows_##device(const GroupRowsParams& p, void* stream);                    \
  int64_t sampled_shrink_workspace_##device(const SampledShrinkParams& p);                    \
  const char* sampled_shrink_##device(const SampledShrinkParams& p, void* stream);            \
  int64_t grouped_shrink_workspace_##device(const Grouped<ShrinkParams>& p);                  \
  int64_t grouped_shrink_backward_workspace_##device(const Grouped<ShrinkBackwardParams>& p); \
  int64_t grouped_expand_workspace_##device(const Grouped<ExpandParams>& p);                  \
  int64_t grouped_expand_backward_workspace_##device(const Grouped<ExpandBackwardParams>& p); \
  const char* grouped_shrink_##device(const Grouped<ShrinkParams>& p, void* stream);          \
  const char* grouped_shrink_backward_##device(const Grouped<ShrinkBackwardParams>& p,        \
                                               void* stream);                                 \
  const char* grouped_expand_##device(const Grouped<ExpandParams>& p, void* stream);          \
  const char* grouped_expand_backward_##device(const Grouped<ExpandBackwardParams>& p, void* stream)

BK_DECLARE_GROUPED(cpu);
BK_DECLARE_GROUPED(baseline);
BK_DECLARE_GROUPED(avx2);
BK_DECLARE_GROUPED(avx512);
BK_DECLARE_GROUPED(cuda);

}  // namespace bayes_kernels
