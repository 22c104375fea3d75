// Torch-free access to torch's intra-op threads, for kernel files that are compiled once per
// instruction set.
#pragma once

#include <cstdint>

namespace bayes_kernels {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) over disjoint ranges that cover [0, end); at least `grain`
// items to a range. The function must not throw.
void run_parallel(int64_t end, int64_t grain, RangeFunction function, void* context);

template <class F>
static inline void parallel_ranges(int64_t end, int64_t grain, F& body) {
  run_parallel(
      end, grain, [](void* context, int64_t b, int64_t e) { (*static_cast<F*>(context))(b, e); },
      &body);
}

}  // namespace bayes_kernels
