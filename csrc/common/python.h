// Reads Python's tensors and lists of tensors as views, without a copy or a new reference.
//
// In the bindings, `grads_` is a Python object, and `grads` what is read from it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "common/dlpack.h"
#include "common/gpu.h"
#include "common/tensor.h"

namespace ksam {

// Looks up torch's types, dtypes and DLPack capsule; throws where there is none.
void load_torch_types();

const dlpack::ExchangeApi& torch_api();

// Whether `object` is a plain tensor with memory of its own device: exactly torch.Tensor or
// torch.nn.Parameter (a subclass may mean anything by its data), dense, with storage and without
// torch's negative bit. Every function of this module declines any other object: it returns None or
// False and has written nothing.
bool read_tensor(pybind11::handle object, Tensor* out);
bool read_tensors(pybind11::handle list, std::vector<Tensor>* out);

// None reads as a tensor without data.
bool read_optional(pybind11::handle object, Tensor* out);

// Whether a tensor has torch's negative or conjugate bit: its numbers are then the negatives or the
// conjugates of those in memory. read_tensor, which reads long lists, asks for the first only where
// the layout makes it likely.
bool is_negative(pybind11::handle tensor);
bool is_conjugate(pybind11::handle tensor);

// Read a finite float or int, and an int of 64 bits; no bool, and nothing that merely converts to a
// number.
bool read_number(pybind11::handle object, double* out);
bool read_int(pybind11::handle object, int64_t* out);

// Memory to be written, from torch's allocator.
struct NewTensor {
  pybind11::object object;
  Tensor view;
};

// A contiguous tensor on the device of `like`, which is read as `t`: f32, f64, i64 or the dtype of
// `t`. The object is null where a mode of torch makes something other than a plain tensor.
NewTensor new_empty(pybind11::handle like, const Tensor& t, DType dtype,
                    const std::vector<int64_t>& sizes);

// As torch.empty_like: a dense tensor keeps the order of its dimensions in memory.
NewTensor empty_like(pybind11::handle tensor);

}  // namespace ksam
