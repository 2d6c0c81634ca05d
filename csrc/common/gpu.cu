// The CUDA runtime behind gpu_runtime.h, and what the runner of tests/simt has in its place.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "common/launch.cuh"

namespace ksam::gpu {

#if defined(KSAM_SIMT)

// Few, so that the tests' grids have blocks that take several turns.
int multiprocessors() { return 3; }
int current_device() { return 0; }
int set_device(int) { return 0; }
void return_to_device(int) noexcept {}
bool has_code_for(int) { return true; }
const char* why_no_code(int) { return ""; }

// Returns the counter and the fallback in turn, so that tests try both. Clears the counter where a
// fault has stopped a kernel, which left its count behind.
unsigned* ticket(Stream, void* fallback) {
  static unsigned counter = 0;
  static uint64_t calls = 0, faults = 0;
  if (faults != simt::faults()) counter = 0;
  faults = simt::faults();
  if (++calls % 2 == 0) return &counter;
  return static_cast<unsigned*>(std::memset(fallback, 0, sizeof(unsigned)));
}

#else

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device));
  return device;
}

int set_device(int device) {
  const int previous = current_device();
  if (previous != device) check(cudaSetDevice(device));
  return previous;
}

void return_to_device(int device) noexcept {
  int current = device;
  // Errors are dropped: a driver that refuses this failed the previous call too, which has said so.
  if (cudaGetDevice(&current) == cudaSuccess && current != device) cudaSetDevice(device);
}

namespace {

constexpr int kTickets = 1024;

// On every device; the runtime sets them to 0 when it loads the module there.
__device__ unsigned tickets[kTickets];

// The place in `tickets` of a stream's counter, its own for as long as the process runs; kTickets
// once all are taken.
int place_of(int device, Stream stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, Stream>, int> places;
  static std::map<int, int> taken;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = places.find({device, stream});
  if (found != places.end()) return found->second;
  int& next = taken[device];
  if (next == kTickets) return kTickets;
  places[{device, stream}] = next;
  return next++;
}

__global__ void any_kernel() {}

// Whether an error says that the device will never run this build's code. Others do not: the device
// is full for now or another process's, the stream is being captured; the launch will tell.
bool is_final(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return true;
    default:
      return false;
  }
}

// Does not throw, as it is called on machines without CUDA too: where the runtime has no usable
// driver (the GPU is another maker's, the driver older than the toolkit), there is no code.
cudaError_t find_code(int device) noexcept {
  int previous = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, any_kernel);
  // A driver of the toolkit's major version runs its code but, before 12.1, not launches with large
  // tables.
  int driver = 0;
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess && kParameterBytes > 4096 && driver < 12010) {
    error = cudaErrorInsufficientDriver;
  }
  if (error != cudaSuccess) cudaGetLastError();  // forget the error, which is returned
  return_to_device(previous);
  return error;
}

// Stored as the error's number plus one: 0 means that the device has to be asked, or asked again
// after an error that is not final.
cudaError_t code_error(int device) {
  const int known = once_per_device<int>(device, [](int which) {
    const cudaError_t error = find_code(which);
    return error == cudaSuccess || is_final(error) ? error + 1 : 0;
  });
  return known == 0 ? cudaSuccess : static_cast<cudaError_t>(known - 1);
}

}  // namespace

bool has_code_for(int device) { return code_error(device) == cudaSuccess; }
const char* why_no_code(int device) { return cudaGetErrorString(code_error(device)); }

int multiprocessors() {
  return once_per_device<int>(current_device(), [](int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  });
}

unsigned* ticket(Stream stream, void* fallback) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture));
  // cudaStreamPerThread is one handle for many streams.
  if (capture == cudaStreamCaptureStatusNone && stream != cudaStreamPerThread) {
    const int device = current_device();
    const int place = place_of(device, stream);
    if (place < kTickets) {
      return place + once_per_device<unsigned*>(device, [](int) {
               void* begin = nullptr;
               check(cudaGetSymbolAddress(&begin, tickets));
               return static_cast<unsigned*>(begin);
             });
    }
  }
  check(cudaMemsetAsync(fallback, 0, sizeof(unsigned), stream));
  return static_cast<unsigned*>(fallback);
}

#endif

}  // namespace ksam::gpu
