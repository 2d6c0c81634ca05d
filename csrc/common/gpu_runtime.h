// What host code outside .cu files needs of the CUDA runtime, whose headers it does not include.
#pragma once

#include "common/gpu.h"

namespace ksam::gpu {

int current_device();
// Makes a device current; returns the one before.
int set_device(int device);
void return_to_device(int device) noexcept;

// Whether this build has machine code, or PTX, that runs on a device; if not, CUDA's error message.
bool has_code_for(int device);
const char* why_no_code(int device);

int multiprocessors();  // of the current device

// A counter in the current device's memory that is 0 before and after each kernel which counts with
// it (last_block in common/block.cuh). Kernels of one stream run one after the other, so they share
// the stream's counter. A stream that cannot have one uses `fallback`, 4 bytes of scratch that are
// set to 0 in the stream. That is so once all counters are taken; for cudaStreamPerThread, which is
// another stream in every thread; and while the stream is being captured, as graphs captured from
// it may replay at the same time. (Setting the bytes to 0 is one more node of the graph.)
unsigned* ticket(Stream stream, void* fallback);

}  // namespace ksam::gpu
