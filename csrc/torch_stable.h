// The only file that includes torch/csrc/stable/*: aliases, checks and the CUDA stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/philox.h"
#include "core/portable.h"
#include "core/posterior.h"

// torch 2.11 knows this check by its older name only.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Emulator builds register the same schemas under a second name, with CUDA kernels that run on the
// host and take CPU tensors.
#if defined(BAYES_KERNELS_SIM)
#define BK_LIBRARY bayes_kernels_sim
#else
#define BK_LIBRARY bayes_kernels
#endif

// A family's ops: `family<Device>(m)` calls m.impl for each, and Device is its struct Cpu or Cuda.
#if defined(BAYES_KERNELS_SIM)
#define BK_REGISTER(family) BK_REGISTER_DEVICE(family, CPU, Cuda)
#elif defined(BAYES_KERNELS_CUDA)
#define BK_REGISTER(family)            \
  BK_REGISTER_DEVICE(family, CPU, Cpu) \
  BK_REGISTER_DEVICE(family, CUDA, Cuda)
#else
#define BK_REGISTER(family) BK_REGISTER_DEVICE(family, CPU, Cpu)
#endif
#define BK_REGISTER_DEVICE(family, key, Device) \
  STABLE_TORCH_LIBRARY_IMPL(BK_LIBRARY, key, m) { family<Device>(m); }

// Shape and type errors are raised by Python before an op is called (functional/); these checks
// protect direct calls of torch.ops. `op: argument must be ..., got ...`.
#define BK_CHECK(condition, ...)                                                                   \
  do {                                                                                             \
    if (!(condition)) throw ::bayes_kernels::ArgumentError(::bayes_kernels::message(__VA_ARGS__)); \
  } while (0)

namespace bayes_kernels {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using Library = torch::stable::detail::StableLibrary;

// An argument that an op does not take, as opposed to a failure of the machine.
struct ArgumentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
std::string message(const Args&... args) {
  std::ostringstream stream;
  stream << "bayes_kernels::";
  (stream << ... << args);
  return stream.str();
}

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::Double:
      return DType::kF64;
    default:
      throw ArgumentError(
          message(op, ": dtype must be float32, bfloat16, float16 or float64; convert the tensor"));
  }
}

// fp32, or fp64 beside fp64 activations.
inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The words are those of torch's allocators, by which callers know that a smaller batch may fit.
[[noreturn]] inline void raise_no_memory(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "bayes_kernels: "
       << (like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory:")
       << " a tensor must fit into memory, got shape (";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  text << "); use fewer rows at a time";
  throw std::runtime_error(text.str());
}

// A contiguous tensor on the device of `like`. Past the dispatcher, which costs more than a small
// kernel.
inline Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& sizes,
                               ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  const AOTITorchError code =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device, like.get_device_index(), &made);
  if (code != AOTI_TORCH_SUCCESS) raise_no_memory(like, sizes);
  return Tensor(made);
}

// t itself where it is contiguous; asking costs less than a call of the op.
inline Tensor row_major(const Tensor& t) {
  if (t.is_contiguous()) return t;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  Tensor made = empty_like_shape(t, sizes, t.scalar_type());
  return torch::stable::copy_(made, t);
}

inline Std std_of_name(const char* op, const std::string& name) {
  if (name == "square") return Std::kSquare;
  if (name == "softplus") return Std::kSoftplus;
  if (name == "direct") return Std::kDirect;
  throw ArgumentError(
      message(op, ": std must be 'square', 'softplus' or 'direct', got '", name, "'"));
}

inline Direction direction_of_name(const char* op, const std::string& name) {
  if (name == "elbo") return Direction::kElbo;
  if (name == "code") return Direction::kCode;
  throw ArgumentError(message(op, ": direction must be 'elbo' or 'code', got '", name, "'"));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  BK_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op,
           ": ", name, " must be on the device of the other tensors; move it");
}

inline const int64_t* key_pointer(const char* op, const Tensor& key, const Tensor& like) {
  check_device(op, "key", key, like);
  BK_CHECK(
      key.dim() == 1 && key.numel() == 2 && key.scalar_type() == ScalarType::Long &&
          key.is_contiguous(),
      op, ": key must be a contiguous int64 tensor of two elements; make it with random.key(seed)");
  return key.const_data_ptr<int64_t>();
}

// fp32, or fp64 where the device's kernels take it.
inline void check_matrix_type(const char* op, const char* name, ScalarType type, bool f64) {
  BK_CHECK(type == ScalarType::Float || (f64 && type == ScalarType::Double), op, ": ", name,
           " must be float32", f64 ? " or float64" : " on a GPU", "; convert them");
}

// Where a one-element tensor on the device of the others keeps its number.
inline const double* number_pointer(const char* op, const char* name, const Tensor& number,
                                    const Tensor& like) {
  BK_CHECK(number.numel() == 1 && number.scalar_type() == ScalarType::Double, op, ": ", name,
           " must be a float64 tensor of one element");
  check_device(op, name, number, like);
  return number.const_data_ptr<double>();
}

// The rows' numbers: `ids`, one for each of `rows` rows, or counted ones.
inline RowIds row_ids(const char* op, int64_t row0, int64_t rows_per_id,
                      const std::optional<Tensor>& ids, int64_t rows, const Tensor& like) {
  BK_CHECK(rows_per_id >= 1, op, ": rows_per_id must be at least 1, got ", rows_per_id);
  if (!ids.has_value()) return RowIds{nullptr, row0, rows_per_id};
  BK_CHECK(ids->dim() == 1 && ids->size(0) == rows && ids->scalar_type() == ScalarType::Long &&
               ids->is_contiguous(),
           op, ": ids must be a contiguous int64 tensor of ", rows, " elements");
  check_device(op, "ids", *ids, like);
  return RowIds{ids->const_data_ptr<int64_t>(), row0, rows_per_id};
}

// The current stream of the device, or null on the host (and in the emulator).
void* current_stream(const Tensor& t);

// Launch functions return null or the text of an error.
inline void raise_if(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(message(op, ": ", error));
}

// Runs a launch function on the device of `like`, with a workspace of size(p) bytes in p.workspace.
template <class Params, class Size, class Launch>
void launch(const char* op, const Tensor& like, Params& p, Size size, Launch function) {
  const int64_t bytes = size(p);
  Tensor workspace = empty_like_shape(like, {bytes}, ScalarType::Byte);
  p.workspace = bytes == 0 ? nullptr : workspace.mutable_data_ptr();
  raise_if(op, function(p, current_stream(like)));
}

// Runs body(begin, end) over chunks of [0, end) on torch's intra-op threads.
template <class F>
void parallel_for(int64_t end, int64_t grain, const F& body) {
  if (end <= grain || end <= 1) {
    if (end > 0) body(int64_t{0}, end);
    return;
  }
  torch::stable::parallel_for(0, end, grain, body);
}

using ByteRange = std::pair<const char*, const char*>;

// Of contiguous floating-point tensors.
inline std::vector<ByteRange> byte_ranges(const std::vector<Tensor>& tensors) {
  std::vector<ByteRange> ranges;
  for (const Tensor& t : tensors) {
    const ScalarType type = t.scalar_type();
    const int64_t size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    const char* start = static_cast<const char*>(t.data_ptr());
    ranges.emplace_back(start, start + t.numel() * size);
  }
  return ranges;
}

// No two of `changed` may overlap, as two blocks would write them at once, and none of `given` may
// overlap one of them, except, where `same_ok`, its own one, exactly.
inline void check_disjoint(const char* op, const std::vector<Tensor>& changed,
                           const std::vector<Tensor>& given, bool same_ok) {
  const std::vector<ByteRange> written = byte_ranges(changed), read = byte_ranges(given);
  std::vector<ByteRange> sorted = written;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    BK_CHECK(sorted[i].first >= sorted[i - 1].second, op,
             ": tensors that are changed must not overlap in memory; pass each of them once");
  for (size_t i = 0; i < read.size(); ++i) {
    if (same_ok && read[i] == written[i]) continue;
    auto w =
        std::upper_bound(sorted.begin(), sorted.end(), read[i],
                         [](const ByteRange& a, const ByteRange& b) { return a.first < b.second; });
    BK_CHECK(w == sorted.end() || w->first >= read[i].second, op,
             ": an input must not overlap a matrix that is changed; clone it");
  }
}

// Device guard that does nothing for CPU tensors.
class OptionalDeviceGuard {
 public:
  explicit OptionalDeviceGuard(const Tensor& t) {
    if (t.is_cuda()) {
      guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(t.get_device_index());
    }
  }

 private:
  // On the heap: with std::optional GCC 12 warns of uninitialised members.
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace bayes_kernels
