// Activations family on the CPU; compiled once per instruction set (cpu_isa.h).
#include "activations.h"

#include "cpu_isa.h"
#include "cpu_vector.h"
#include "parallel.h"

namespace bayes_kernels {
namespace {

constexpr int64_t kBlocks = 8;                          // scale blocks worked on together
constexpr int64_t kChunk = kBlocks * kScaleBlock;       // columns
constexpr int64_t kDraws = kChunk / kRoundingPerBlock;  // Philox blocks of a chunk
constexpr int64_t kGrain = 65536;                       // elements per parallel task, at least
static_assert(kDraws % kPhiloxBatch == 0, "philox_blocks writes whole batches");

// One block of `count` columns. A constant count is unrolled and becomes vectors.
template <class T>
BK_HD uint8_t quantize_block(const T* x, const uint16_t* bits, int count, int8_t* codes) {
  using A = acc_t<T>;
  A v[kScaleBlock];
  typename BitsOf<A>::type largest = 0;
  for (int k = 0; k < count; ++k) {
    v[k] = static_cast<A>(x[k]);
    const auto own = magnitude_bits(v[k]);
    largest = own > largest ? own : largest;
  }
  const int scale = block_scale<T>(largest);
  if (scale == kScaleNotFinite) {
    memset(codes, 0, static_cast<size_t>(count));
    return static_cast<uint8_t>(scale);
  }
  const A inverse = static_cast<A>(scale_inverse(scale));
  for (int k = 0; k < count; ++k)
    codes[k] = static_cast<int8_t>(rounded_code<A>(v[k], inverse, bits[k]));
  return static_cast<uint8_t>(scale);
}

template <class T>
void quantize(const QuantizeParams& p) {
  const Key sub = subkey(load_key(p.key), p.stream, kRounding);
  const int64_t scales = ceil_div(p.n, kScaleBlock);
  auto body = [&](int64_t begin, int64_t end) {
    uint64_t index[kDraws], blocks[2 * kDraws];
    uint16_t bits[kChunk];
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.n;
      int8_t* codes = p.codes + row * p.n;
      for (int64_t first = 0; first < p.n; first += kChunk) {
        const uint64_t draw = rounding_index(p.row0 + row, p.n, first / kRoundingPerBlock);
        for (int64_t i = 0; i < kDraws; ++i) index[i] = draw + static_cast<uint64_t>(i);
        philox_blocks(sub, index, kDraws, blocks);
        memcpy(bits, blocks, sizeof(bits));
        const int64_t left = p.n - first < kChunk ? p.n - first : kChunk;
        for (int64_t at = 0; at < left; at += kScaleBlock) {
          uint8_t* scale = p.scales + row * scales + (first + at) / kScaleBlock;
          *scale = left - at >= kScaleBlock
                       ? quantize_block(x + first + at, bits + at, kScaleBlock, codes + first + at)
                       : quantize_block(x + first + at, bits + at, static_cast<int>(left - at),
                                        codes + first + at);
        }
      }
    }
  };
  parallel_ranges(p.rows, ceil_div(kGrain, p.n), body);
}

template <class T>
BK_HD void dequantize_block(const int8_t* codes, int scale, int count, T* x) {
  using A = acc_t<T>;
  const A step = static_cast<A>(scale == kScaleNotFinite ? NAN : scale_step(scale));
  for (int k = 0; k < count; ++k) x[k] = code_value<T>(codes[k], step);
}

template <class T>
void dequantize(const DequantizeParams& p) {
  const int64_t scales = ceil_div(p.n, kScaleBlock);
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* codes = p.codes + row * p.n;
      T* x = static_cast<T*>(p.x) + row * p.n;
      for (int64_t at = 0; at < p.n; at += kScaleBlock) {
        const int scale = p.scales[row * scales + at / kScaleBlock];
        if (p.n - at >= kScaleBlock)
          dequantize_block(codes + at, scale, kScaleBlock, x + at);
        else
          dequantize_block(codes + at, scale, static_cast<int>(p.n - at), x + at);
      }
    }
  };
  parallel_ranges(p.rows, ceil_div(kGrain, p.n), body);
}

}  // namespace

const char* BK_CPU(quantize_activations)(const QuantizeParams& p, void*) {
  switch (p.dtype) {
    case DType::kF32:
      quantize<float>(p);
      break;
    case DType::kBF16:
      quantize<bf16>(p);
      break;
    case DType::kF16:
      quantize<f16>(p);
      break;
    case DType::kF64:
      quantize<double>(p);
  }
  return nullptr;
}

const char* BK_CPU(dequantize_activations)(const DequantizeParams& p, void*) {
  switch (p.dtype) {
    case DType::kF32:
      dequantize<float>(p);
      break;
    case DType::kBF16:
      dequantize<bf16>(p);
      break;
    case DType::kF16:
      dequantize<f16>(p);
      break;
    case DType::kF64:
      dequantize<double>(p);
  }
  return nullptr;
}

}  // namespace bayes_kernels
