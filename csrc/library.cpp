// What every family shares on the host: threads, the current CUDA stream, build information.
#include "cpu_isa.h"
#include "parallel.h"
#include "torch_stable.h"

#include <dlfcn.h>

namespace bayes_kernels {

void run_parallel(int64_t end, int64_t grain, RangeFunction function, void* context) {
  parallel_for(end, grain, [&](int64_t b, int64_t e) { function(context, b, e); });
}

void* current_stream(const Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  // The symbol lives in libtorch_cuda, which CPU-only builds of torch lack: it is looked up at run
  // time so that one library loads with both.
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = []() -> Function {
    void* handle = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return handle == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(handle, "aoti_torch_get_current_cuda_stream"));
  }();
  BK_CHECK(function != nullptr, "this build of torch has no CUDA; install a CUDA build of torch");
  void* stream = nullptr;
  BK_CHECK(function(t.get_device_index(), &stream) == 0, "could not get the current CUDA stream");
  return stream;
}

#ifndef BK_CUDA_ARCHITECTURES
#define BK_CUDA_ARCHITECTURES ""
#endif
#ifndef BK_CUDA_VERSION
#define BK_CUDA_VERSION ""
#endif

#define BK_QUOTED_(x) #x
#define BK_QUOTED(x) BK_QUOTED_(x)
#if defined(__clang__)
#define BK_COMPILER "clang " BK_QUOTED(__clang_major__) "." BK_QUOTED(__clang_minor__)
#else
#define BK_COMPILER "gcc " BK_QUOTED(__GNUC__) "." BK_QUOTED(__GNUC_MINOR__)
#endif

// One array that stays whole in the file: bayes_kernels/library_file.py reads it there, without
// loading the library. Nothing else says what was compiled.
[[gnu::used]] static const char compiled[] =
    "{\"version\": \"" BK_VERSION "\", \"torch_target\": \"2.11\", \"compiler\": \"" BK_COMPILER
    "\", \"cuda\": \"" BK_CUDA_VERSION "\", \"cuda_architectures\": \"" BK_CUDA_ARCHITECTURES "\"}";

// The same object, and what only the machine knows.
static std::string build_info() {
  const std::string fields(compiled, sizeof(compiled) - 2);  // without the brace and the final zero
  return fields + ", \"cpu_path\": \"" + cpu_path_name() + "\"}";
}

}  // namespace bayes_kernels

STABLE_TORCH_LIBRARY_IMPL(BK_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&bayes_kernels::build_info));
}
