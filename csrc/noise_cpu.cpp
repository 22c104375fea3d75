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

const char* BK_CPU(fold_in)(const FoldInParams& p, void*) {
  const Key folded = fold_in(load_key(p.key), static_cast<uint64_t>(p.data));
  p.out[0] = static_cast<int64_t>(folded.seed);
  p.out[1] = static_cast<int64_t>(folded.offset);
  return nullptr;
}

}  // namespace bayes_kernels
