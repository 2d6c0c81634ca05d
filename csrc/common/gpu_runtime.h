// The CUDA runtime as far as host code outside .cu files needs it.
#pragma once

#include "common/gpu.h"

namespace ksam::gpu {

int current_device();
// Makes a device current; returns the one before.
int set_device(int device);
void return_to_device(int device) noexcept;

// Whether this build has machine code, or PTX, that runs on a device; what CUDA says where not.
bool has_code_for(int device);
const char* why_no_code(int device);

int multiprocessors();  // of the current device

// A counter on the current device for kernels of one stream, 0 before and after each of them
// (last_block in common/block.cuh). While the stream is captured, where all counters are taken, and
// of the stream that each thread has, it is `fallback`, 4 bytes of scratch that are set to 0 in the
// stream, one more node of a graph: graphs captured from one stream may replay at the same time.
unsigned* ticket(Stream stream, void* fallback);

}  // namespace ksam::gpu
