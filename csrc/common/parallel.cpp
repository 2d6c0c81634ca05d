#include "common/parallel.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace ksam {
namespace {

// torch/csrc/stable/c/shim.h, torch >= 2.10; 0 is success.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction body,
                                     void* context);

TorchParallelFor torch_parallel_for = nullptr;

}  // namespace

void load_thread_pool() {
  // RTLD_NOLOAD: the copy that `import torch` loaded, whatever build of torch it is from.
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  void* symbol = library == nullptr ? nullptr : dlsym(library, "torch_parallel_for");
  if (symbol == nullptr) {
    const char* reason = dlerror();
    throw std::runtime_error(
        std::string("ksam_kernels._C needs torch >= 2.11, imported before it, for "
                    "torch_parallel_for in libtorch_cpu.so: ") +
        (reason == nullptr ? "not found" : reason));
  }
  torch_parallel_for = reinterpret_cast<TorchParallelFor>(symbol);
}

void parallel_for(int64_t n, int64_t grain, RangeFunction body, void* context) {
  if (n <= 0) return;
  if (n <= grain) {  // torch would run it here too, after a call through two libraries
    body(0, n, context);
    return;
  }
  if (torch_parallel_for(0, n, grain, body, context) != 0) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

}  // namespace ksam
