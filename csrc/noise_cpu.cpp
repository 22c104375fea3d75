// Noise family on the CPU; compiled once per instruction set (cpu_isa.h).
#include "noise.h"

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

constexpr int kBatch = 2 * kPhiloxBatch;  // Philox blocks worked on together
constexpr int64_t kGrain = 2048;          // Philox blocks per parallel task, at least

// Normals 4 * first ... of a subkey, kBatch blocks at once, into out[4 * kBatch]. Not inlined: one
// copy of the machine code gives every user the same bits.
__attribute__((noinline)) void normal_batch(Key sub, uint64_t first, float* out) {
  uint64_t index[kBatch];
  uint64_t blocks[2 * kBatch];
  for (int i = 0; i < kBatch; ++i) index[i] = first + static_cast<uint64_t>(i);
  philox_blocks(sub, index, kBatch, blocks);
  for (int i = 0; i < 2 * kBatch; ++i)
    normal_pair(static_cast<uint32_t>(blocks[i]), static_cast<uint32_t>(blocks[i] >> 32),
                &out[2 * i], &out[2 * i + 1]);
}

// Calls use(first_element, count, normals) over [0, count) in batches.
template <class Use>
void for_normals(Key sub, int64_t count, const Use& use) {
  const int64_t batches = ceil_div(count, 4 * kBatch);
  auto body = [&](int64_t begin, int64_t end) {
    float buffer[4 * kBatch];
    for (int64_t batch = begin; batch < end; ++batch) {
      const int64_t first = batch * 4 * kBatch;
      normal_batch(sub, static_cast<uint64_t>(batch) * kBatch, buffer);
      const int64_t left = count - first;
      use(first, left < 4 * kBatch ? left : int64_t{4 * kBatch}, buffer);
    }
  };
  parallel_ranges(batches, kGrain / kBatch, body);
}

template <class T>
void scaled(const ScaledNormalParams& p) {
  const T* rho = static_cast<const T*>(p.rho);
  T* out = static_cast<T*>(p.out);
  for_normals(subkey(load_key(p.key), p.stream, kNormal), p.r * p.n,
              [&](int64_t first, int64_t count, const float* eps) {
                if (p.row_constant) {
                  for (int64_t i = 0; i < count; ++i)
                    out[first + i] =
                        std_of<T>(p.std, rho[(first + i) / p.n]) * static_cast<T>(eps[i]);
                } else if (p.std == Std::kSquare) {
                  for (int64_t i = 0; i < count; ++i)
                    out[first + i] = rho[first + i] * rho[first + i] * static_cast<T>(eps[i]);
                } else {
                  for (int64_t i = 0; i < count; ++i)
                    out[first + i] = std_of<T>(p.std, rho[first + i]) * static_cast<T>(eps[i]);
                }
              });
}

template <class T>
void scaled_backward(const ScaledNormalParams& p) {
  const T* rho = static_cast<const T*>(p.rho);
  const T* de = static_cast<const T*>(p.de);
  T* out = static_cast<T*>(p.out);
  const Key sub = subkey(load_key(p.key), p.stream, kNormal);
  if (!p.row_constant) {
    for_normals(sub, p.r * p.n, [&](int64_t first, int64_t count, const float* eps) {
      for (int64_t i = 0; i < count; ++i)
        out[first + i] =
            de[first + i] * static_cast<T>(eps[i]) * std_derivative<T>(p.std, rho[first + i]);
    });
    return;
  }
  // One value per row: a fixed-order sum in fp64, whatever the number of threads.
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double sum = 0;
      float eps[4];
      for (int64_t j = 0; j < p.n; ++j) {
        const int64_t element = row * p.n + j;
        if (j == 0 || element % 4 == 0) normal_block(sub, static_cast<uint64_t>(element / 4), eps);
        sum += static_cast<double>(de[element]) * static_cast<double>(eps[element % 4]);
      }
      out[row] = static_cast<T>(sum) * std_derivative<T>(p.std, rho[row]);
    }
  };
  parallel_ranges(p.r, 1, body);
}

// --- draws -------------------------------------------------------------------------------------

constexpr int64_t kDrawBlock = 1024;  // elements: their normals stay in the first-level cache

// Normals first, first + 1, ... of draw i into eps, unless the draw before has left them there.
void draw_normals(const DrawParams& p, Key sub, int64_t i, int64_t first, int64_t count,
                  float* eps) {
  const int64_t pair = draw_pair(p.draws[i], p.antithetic);
  if (i > 0 && pair == draw_pair(p.draws[i - 1], p.antithetic)) return;
  BK_CPU(normals)(draw_key(sub, pair), first, count, eps);
}

template <class T>
void draws(const DrawParams& p) {
  const Key sub = subkey(load_key(p.key), p.stream, kDraw);
  const int64_t size = p.r * p.n;
  auto body = [&](int64_t begin, int64_t end) {
    float eps[kDrawBlock];
    T std[kDrawBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kDrawBlock;
      const int64_t count = size - first < kDrawBlock ? size - first : kDrawBlock;
      const T* mean = static_cast<const T*>(p.mean) + first;
      const T* rho = static_cast<const T*>(p.rho);
      if (p.row_constant) {
        for (int64_t j = 0; j < count; ++j) std[j] = std_of<T>(p.std, rho[(first + j) / p.n]);
      } else if (p.std == Std::kSquare) {
        for (int64_t j = 0; j < count; ++j) std[j] = rho[first + j] * rho[first + j];
      } else {
        for (int64_t j = 0; j < count; ++j) std[j] = std_of<T>(p.std, rho[first + j]);
      }
      for (int64_t i = 0; i < p.count; ++i) {
        draw_normals(p, sub, i, first, count, eps);
        T* out = static_cast<T*>(p.out) + i * size + first;
        if (draw_negative(p.draws[i], p.antithetic)) {
          for (int64_t j = 0; j < count; ++j) out[j] = mean[j] - std[j] * static_cast<T>(eps[j]);
        } else {
          for (int64_t j = 0; j < count; ++j) out[j] = mean[j] + std[j] * static_cast<T>(eps[j]);
        }
      }
    }
  };
  parallel_ranges(ceil_div(size, kDrawBlock), ceil_div(4, p.count), body);
}

// dmean of elements first, first + 1, ..., and into sum what stands before std'(rho) in drho.
template <class T>
void draws_backward_block(const DrawParams& p, Key sub, int64_t first, int64_t count, T* sum) {
  float eps[kDrawBlock];
  T mean[kDrawBlock];
  for (int64_t j = 0; j < count; ++j) mean[j] = sum[j] = T(0);
  for (int64_t i = 0; i < p.count; ++i) {
    const T* grad = static_cast<const T*>(p.grad) + i * p.r * p.n + first;
    if (p.drho != nullptr) {
      draw_normals(p, sub, i, first, count, eps);
      const T sign = draw_negative(p.draws[i], p.antithetic) ? T(-1) : T(1);
      for (int64_t j = 0; j < count; ++j) sum[j] += sign * grad[j] * static_cast<T>(eps[j]);
    }
    for (int64_t j = 0; j < count; ++j) mean[j] += grad[j];
  }
  if (p.dmean != nullptr) memcpy(static_cast<T*>(p.dmean) + first, mean, count * sizeof(T));
}

template <class T>
void draws_backward(const DrawParams& p) {
  const Key sub = subkey(load_key(p.key), p.stream, kDraw);
  const T* rho = static_cast<const T*>(p.rho);
  T* drho = static_cast<T*>(p.drho);
  // One value of drho for each row: a fixed-order sum in fp64, whatever the number of threads.
  const bool rows = p.row_constant;
  const int64_t width = rows ? p.n : p.r * p.n, blocks = ceil_div(width, kDrawBlock);
  auto body = [&](int64_t begin, int64_t end) {
    T sum[kDrawBlock];
    for (int64_t task = begin; task < end; ++task) {
      double total = 0;
      for (int64_t block = rows ? 0 : task; block < (rows ? blocks : task + 1); ++block) {
        const int64_t at = block * kDrawBlock, first = rows ? task * p.n + at : at;
        const int64_t count = width - at < kDrawBlock ? width - at : kDrawBlock;
        draws_backward_block<T>(p, sub, first, count, sum);
        if (drho == nullptr) continue;
        for (int64_t j = 0; j < count; ++j) {
          if (rows)
            total += static_cast<double>(sum[j]);
          else
            drho[first + j] = sum[j] * std_derivative<T>(p.std, rho[first + j]);
        }
      }
      if (rows && drho != nullptr)
        drho[task] = static_cast<T>(total) * std_derivative<T>(p.std, rho[task]);
    }
  };
  parallel_ranges(rows ? p.r : blocks, 1, body);
}

}  // namespace

void BK_CPU(normals)(Key sub, int64_t first, int64_t count, float* out) {
  constexpr int64_t kNormals = 4 * kBatch;
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done, skip = at % 4, left = count - done;
    if (skip == 0 && left >= kNormals) {
      normal_batch(sub, static_cast<uint64_t>(at / 4), out + done);
      done += kNormals;
      continue;
    }
    float buffer[kNormals];
    normal_batch(sub, static_cast<uint64_t>(at / 4), buffer);
    const int64_t taken = left < kNormals - skip ? left : kNormals - skip;
    memcpy(out + done, buffer + skip, static_cast<size_t>(taken) * sizeof(float));
    done += taken;
  }
}

const char* BK_CPU(normal)(const NormalParams& p, void*) {
  for_normals(subkey(load_key(p.key), p.stream, kNormal), p.count,
              [&](int64_t first, int64_t count, const float* eps) {
                for (int64_t i = 0; i < count; ++i) p.out[first + i] = eps[i];
              });
  return nullptr;
}

const char* BK_CPU(sign_bits)(const SignParams& p, void*) {
  const Key sub = subkey(load_key(p.key), p.stream, static_cast<Purpose>(p.purpose));
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t id = sign_row(p.rows, row);
      for (int64_t j = 0; j < p.columns; ++j) {
        const PhiloxBlock b = sign_block(sub, id, p.columns, j / kSignsPerBlock);
        for (const int64_t stop = j + kSignsPerBlock; j < stop && j < p.columns; ++j) {
          const uint32_t bit = b.word[(j / 32) % 4] >> (j % 32) & 1u;
          p.out[row * p.columns + j] = static_cast<int8_t>(bit != 0 ? -1 : 1);
        }
        --j;
      }
    }
  };
  parallel_ranges(p.count, 64, body);
  return nullptr;
}

const char* BK_CPU(dropout_mask)(const DropoutParams& p, void*) {
  const Key sub = subkey(load_key(p.key), p.stream, kDropout);
  const uint32_t threshold = dropout_threshold(p.probability);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t c = 0; c * kDropoutPerBlock < p.columns; ++c) {
        const PhiloxBlock b = dropout_block(sub, p.row0 + row, p.columns, c);
        for (int k = 0; k < kDropoutPerBlock && c * kDropoutPerBlock + k < p.columns; ++k) {
          const uint32_t bits = b.word[k / 2] >> (16 * (k % 2)) & 0xFFFFu;
          p.out[row * p.columns + c * kDropoutPerBlock + k] = bits >= threshold;
        }
      }
    }
  };
  parallel_ranges(p.rows, 64, body);
  return nullptr;
}

const char* BK_CPU(scaled_normal)(const ScaledNormalParams& p, void*) {
  if (p.f64)
    scaled<double>(p);
  else
    scaled<float>(p);
  return nullptr;
}

const char* BK_CPU(scaled_normal_backward)(const ScaledNormalParams& p, void*) {
  if (p.f64)
    scaled_backward<double>(p);
  else
    scaled_backward<float>(p);
  return nullptr;
}

const char* BK_CPU(gaussian_draws)(const DrawParams& p, void*) {
  if (p.f64)
    draws<double>(p);
  else
    draws<float>(p);
  return nullptr;
}

const char* BK_CPU(gaussian_draws_backward)(const DrawParams& p, void*) {
  if (p.f64)
    draws_backward<double>(p);
  else
    draws_backward<float>(p);
  return nullptr;
}

const char* BK_CPU(fold_in)(const FoldInParams& p, void*) {
  const Key folded = fold_in(load_key(p.key), static_cast<uint64_t>(p.data));
  p.out[0] = static_cast<int64_t>(folded.seed);
  p.out[1] = static_cast<int64_t>(folded.offset);
  return nullptr;
}

}  // namespace bayes_kernels
