// Activations family on the GPU: both ops are streams, bound by memory. A thread works on 8
// columns, which are one Philox block; four threads beside each other have a scale block.
#include "activations.h"
#include "cuda_portable.h"

namespace bayes_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kItems =
    4;  // groups of 8 columns of a thread: loads in flight, and one subkey for all
constexpr int kColumns = kRoundingPerBlock;
constexpr int kThreadsPerScale = kScaleBlock / kColumns;
constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
struct alignas(16) Sixteen {
  T value[16 / sizeof(T)];
};
struct alignas(8) Codes {
  int8_t value[kColumns];
};

// 8 columns at p as T; `count` of them exist, the rest are zero.
template <class T>
__device__ __forceinline__ void load_columns(const T* p, int count, bool vector, T out[kColumns]) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T));
  if (vector && count == kColumns) {
    BK_UNROLL
    for (int i = 0; i < kColumns / kEach; ++i) {
      const Sixteen<T> part = *reinterpret_cast<const Sixteen<T>*>(p + i * kEach);
      BK_UNROLL
      for (int k = 0; k < kEach; ++k) out[i * kEach + k] = part.value[k];
    }
    return;
  }
  BK_UNROLL
  for (int k = 0; k < kColumns; ++k) out[k] = k < count ? p[k] : static_cast<T>(0.0f);
}

// Where item `i` of a thread is: its row, and its group of 8 columns in the row. Rows have whole
// scale blocks of groups, so that the four threads of one have the same row.
struct Place {
  int64_t row, group;
  int count;  // columns that exist, 0 behind the last row

  __device__ __forceinline__ Place(int item, int64_t rows, int64_t n) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kItems + item) * kThreads + threadIdx.x;
    const int64_t groups = ceil_div(n, kScaleBlock) * kThreadsPerScale;
    // A division of 64-bit numbers takes some hundred instructions.
    const bool small = at <= 0x7FFFFFFF && groups <= 0x7FFFFFFF;
    row = small ? static_cast<uint32_t>(at) / static_cast<uint32_t>(groups) : at / groups;
    group = at - row * groups;
    const int64_t left = row < rows ? n - group * kColumns : 0;
    count = left < 0 ? 0 : left < kColumns ? static_cast<int>(left) : kColumns;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeParams p, bool vector) {
  T x[kItems][kColumns];
  BK_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const Place place(i, p.rows, p.n);
    const int64_t first = place.count > 0 ? place.row * p.n + place.group * kColumns : 0;
    load_columns(static_cast<const T*>(p.x) + first, place.count, vector, x[i]);
  }
  const Key sub = subkey(load_key(p.key), p.stream, kRounding);
  BK_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const Place place(i, p.rows, p.n);
    uint32_t largest = 0;
    BK_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      const uint32_t own = magnitude_bits(static_cast<float>(x[i][k]));
      largest = own > largest ? own : largest;
    }
    BK_UNROLL
    for (int lane = 1; lane < kThreadsPerScale; lane *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, largest, lane);
      largest = other > largest ? other : largest;
    }
    if (place.count == 0) continue;
    const int scale = block_scale<T>(largest);
    const PhiloxBlock draw = philox(sub, rounding_index(p.row0 + place.row, p.n, place.group));
    const bool finite = scale != kScaleNotFinite;
    const float inverse = finite ? scale_inverse(scale) : 0.0f;
    Codes codes;
    BK_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      const uint32_t bits = draw.word[k / 2] >> (16 * (k % 2)) & 0xFFFFu;
      const float v = finite ? static_cast<float>(x[i][k]) : 0.0f;
      codes.value[k] = static_cast<int8_t>(rounded_code(v, inverse, bits));
    }
    int8_t* out = p.codes + place.row * p.n + place.group * kColumns;
    if (vector && place.count == kColumns) {
      *reinterpret_cast<Codes*>(out) = codes;
    } else {
      BK_UNROLL
      for (int k = 0; k < kColumns; ++k)
        if (k < place.count) out[k] = codes.value[k];
    }
    if (place.group % kThreadsPerScale == 0)
      p.scales[place.row * ceil_div(p.n, kScaleBlock) + place.group / kThreadsPerScale] =
          static_cast<uint8_t>(scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p, bool vector) {
  Codes codes[kItems];
  int scales[kItems];
  BK_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const Place place(i, p.rows, p.n);
    if (place.count == 0) continue;
    const int8_t* from = p.codes + place.row * p.n + place.group * kColumns;
    if (vector && place.count == kColumns) {
      codes[i] = *reinterpret_cast<const Codes*>(from);
    } else {
      BK_UNROLL
      for (int k = 0; k < kColumns; ++k) codes[i].value[k] = k < place.count ? from[k] : int8_t{0};
    }
    scales[i] = p.scales[place.row * ceil_div(p.n, kScaleBlock) + place.group / kThreadsPerScale];
  }
  BK_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const Place place(i, p.rows, p.n);
    if (place.count == 0) continue;
    const float step = scales[i] == kScaleNotFinite ? NAN : scale_step(scales[i]);
    constexpr int kEach = 16 / static_cast<int>(sizeof(T));
    T* out = static_cast<T*>(p.x) + place.row * p.n + place.group * kColumns;
    BK_UNROLL
    for (int part = 0; part < kColumns / kEach; ++part) {
      Sixteen<T> values;
      BK_UNROLL
      for (int k = 0; k < kEach; ++k)
        values.value[k] = code_value<T>(codes[i].value[part * kEach + k], step);
      if (vector && place.count == kColumns) {
        *reinterpret_cast<Sixteen<T>*>(out + part * kEach) = values;
      } else {
        BK_UNROLL
        for (int k = 0; k < kEach; ++k)
          if (part * kEach + k < place.count) out[part * kEach + k] = values.value[k];
      }
    }
  }
}

bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <class Params>
dim3 grid_of(const Params& p) {
  const int64_t groups = ceil_div(p.n, kScaleBlock) * kThreadsPerScale;
  return dim3(static_cast<unsigned>(ceil_div(p.rows * groups, int64_t{kThreads} * kItems)));
}

template <class Params>
bool whole(const Params& p) {
  return p.n % kColumns == 0 && aligned(p.x, 16) && aligned(p.codes, 8);
}

}  // namespace

const char* quantize_activations_cuda(const QuantizeParams& p, void* stream) {
  if (p.dtype == DType::kF32)
    BK_LAUNCH((quantize_kernel<float>), grid_of(p), kThreads, 0, stream, p, whole(p));
  else if (p.dtype == DType::kBF16)
    BK_LAUNCH((quantize_kernel<bf16>), grid_of(p), kThreads, 0, stream, p, whole(p));
  else
    BK_LAUNCH((quantize_kernel<f16>), grid_of(p), kThreads, 0, stream, p, whole(p));
  return bk_last_error();
}

const char* dequantize_activations_cuda(const DequantizeParams& p, void* stream) {
  if (p.dtype == DType::kF32)
    BK_LAUNCH((dequantize_kernel<float>), grid_of(p), kThreads, 0, stream, p, whole(p));
  else if (p.dtype == DType::kBF16)
    BK_LAUNCH((dequantize_kernel<bf16>), grid_of(p), kThreads, 0, stream, p, whole(p));
  else
    BK_LAUNCH((dequantize_kernel<f16>), grid_of(p), kThreads, 0, stream, p, whole(p));
  return bk_last_error();
}

}  // namespace bayes_kernels
