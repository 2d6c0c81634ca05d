// Python's tensors and lists of tensors as views, without a copy or a new reference.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "common/dlpack.h"
#include "common/gpu.h"
#include "common/tensor.h"

namespace ksam {

// Learns torch.Tensor, torch.nn.Parameter and their DLPack capsule; throws where there is none.
void load_torch_types();

const dlpack::ExchangeApi& torch_api();

// Whether `object` is a plain tensor with memory of its own device: exactly torch.Tensor or
// torch.nn.Parameter (a subclass may mean anything by its data), dense, with storage and without
// torch's negative bit. What is not is declined by every function of this module, which then
// returns False and has written nothing.
bool read_tensor(pybind11::handle object, Tensor* out);
bool read_tensors(pybind11::handle list, std::vector<Tensor>* out);

// None reads as a tensor without data.
bool read_optional(pybind11::handle object, Tensor* out);

}  // namespace ksam
