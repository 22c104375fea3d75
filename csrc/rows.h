// A tensor as kernels of adapters read it: rows a stride apart.
#pragma once

#include "torch_stable.h"

namespace bayes_kernels {

// The rows of (..., columns): their number, and t itself where each is contiguous and all are one
// stride apart, else a copy.
struct Rows {
  Tensor t;
  int64_t count, columns, stride;
};

inline Rows as_rows(const Tensor& t) {
  const int64_t columns = t.size(-1);
  int64_t count = 1, step = 0, next = 0;  // strides of the last row dimension and of the one before
  bool even = columns > 1 && t.stride(-1) == 1;
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    const int64_t size = t.size(i);
    if (size != 1) {
      if (count == 1) step = next = t.stride(i);
      even = even && t.stride(i) == next;
      next *= size;
    }
    count *= size;
  }
  if (even && count > 1) return {t, count, columns, step};
  return {row_major(t), count, columns, columns};
}

}  // namespace bayes_kernels
