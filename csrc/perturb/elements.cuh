// Applies a formula to the elements of a block's chunk.
//
// A formula is a struct of
//   kOperands, kReads, kWrites   how many operands it has; bit masks of those it reads and writes
//   kFrom, kTo                   operand kFrom is copied to kTo, bit for bit, in rows not acted on
//   kCopies                      whether kFrom is copied in rows acted on, too
//   kVectors                     how many vectors of each operand a thread has in flight
//   Value, Args                  what it needs to know of each row, and of the call
//   acts(args, value)            whether it does more to a row than copy; the same in all threads
//   Element<A>, element<A>(...)  what is done to the values x[kOperands] of an element, in A
//   finish(args, table)          what is left to do once a block is through
#pragma once

#include <type_traits>

#include "perturb/table.cuh"

namespace ksam::gpu {

template <class Formula>
using FlatTableOf = FlatTable<Formula::kOperands, typename Formula::Value>;
template <class Formula>
using StridedTableOf = StridedTable<Formula::kOperands, typename Formula::Value>;
template <class Formula>
using ArgsOf = typename Formula::Args;

// What a formula does to rows on which it does not act: it copies.
template <class Formula>
struct CopiesOf {
  static constexpr int kOperands = Formula::kOperands;
  static constexpr unsigned kReads = 1u << Formula::kFrom, kWrites = 0;
  static constexpr int kFrom = Formula::kFrom, kTo = Formula::kTo;
  static constexpr bool kCopies = true;
  static constexpr int kVectors = 4;
};

struct NoElement {};

template <class Formula>
__device__ __forceinline__ constexpr bool reads(int i) {
  return (Formula::kReads >> i & 1) != 0;
}
template <class Formula>
__device__ __forceinline__ constexpr bool writes(int i) {
  return (Formula::kWrites >> i & 1) != 0;
}

// What the formula does to an element of the row. One thread works it out for its block: the powers
// of Adam cost as much as hundreds of elements.
template <class A, class Formula>
__device__ __forceinline__ typename Formula::template Element<A> element_of(
    const typename Formula::Args& args, const typename Formula::Value& value) {
  __shared__ typename Formula::template Element<A> element;
  if (threadIdx.x == 0) element = Formula::template element<A>(args, value);
  __syncthreads();
  return element;
}

// --- Flat rows ----------------------------------------------------------------------------------

// Applies the formula to the j-th elements of the vectors.
template <class Formula, class T, int kWidth, class Element>
__device__ __forceinline__ void apply(Vector<T, kWidth> (&v)[Formula::kOperands], int j,
                                      Element& element) {
  using A = Opmath<T>;
  A x[Formula::kOperands];
#pragma unroll
  for (int i = 0; i < Formula::kOperands; ++i) {
    if (reads<Formula>(i)) x[i] = to<A>(v[i].at[j]);
  }
  element(x);
#pragma unroll
  for (int i = 0; i < Formula::kOperands; ++i) {
    if (writes<Formula>(i)) v[i].at[j] = Rounded<T>::from(x[i]);
  }
}

// Applies the formula to one vector of every operand and stores the results; `v` holds those
// vectors that are read.
template <class Formula, class T, int kWidth, class Element>
__device__ __forceinline__ void finish_vectors(Vector<T, kWidth> (&v)[Formula::kOperands],
                                               T* const (&data)[Formula::kOperands], int at,
                                               Element& element) {
  if constexpr (Formula::kCopies) store_vector(data[Formula::kTo] + at, v[Formula::kFrom]);
  if constexpr (!std::is_same_v<Element, NoElement>) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) apply<Formula>(v, j, element);
  }
#pragma unroll
  for (int i = 0; i < Formula::kOperands; ++i) {
    if (writes<Formula>(i)) store_vector(data[i] + at, v[i]);
  }
}

// Elements [begin, end) of a chunk, kWidth of them with each load and store.
template <int kWidth, class Formula, class T, class Element>
__device__ __forceinline__ void walk(T* const (&data)[Formula::kOperands], int begin, int end,
                                     Element& element) {
  constexpr int kStep = kThreads * kWidth;
  for (int first = begin + static_cast<int>(threadIdx.x) * kWidth; first < end;
       first += Formula::kVectors * kStep) {
    Vector<T, kWidth> v[Formula::kVectors][Formula::kOperands];
#pragma unroll
    for (int u = 0; u < Formula::kVectors; ++u) {
#pragma unroll
      for (int i = 0; i < Formula::kOperands; ++i) {
        const int at = first + u * kStep;
        if (reads<Formula>(i) && at < end) v[u][i] = load_vector<T, kWidth>(data[i] + at);
      }
    }
#pragma unroll
    for (int u = 0; u < Formula::kVectors; ++u) {
      const int at = first + u * kStep;
      if (at < end) finish_vectors<Formula>(v[u], data, at, element);
    }
  }
}

// A chunk: in vectors where all operands are aligned to them, the rest element by element. The
// results are the same bits either way.
template <class T, class Formula, class Table, class Element>
__device__ __forceinline__ void walk_chunk(const Table& table, const Chunk& chunk,
                                           Element& element) {
  T* data[Formula::kOperands];
  uintptr_t addresses = 0;
#pragma unroll
  for (int i = 0; i < Formula::kOperands; ++i) {
    data[i] = reinterpret_cast<T*>(table.data[i][chunk.row]) + chunk.begin;
    addresses |= reinterpret_cast<uintptr_t>(data[i]);
  }
  constexpr int kWidth = kPerVector<T>;
  const int whole = addresses % kVectorBytes == 0 ? chunk.count / kWidth * kWidth : 0;
  walk<kWidth, Formula>(data, 0, whole, element);
  walk<1, Formula>(data, whole, chunk.count, element);
}

// --- Rows of any dtypes and layouts -------------------------------------------------------------

template <class A>
__device__ __forceinline__ A load_as(const char* p, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return to<A>(*reinterpret_cast<const float*>(p));
    case DType::f64:
      return to<A>(*reinterpret_cast<const double*>(p));
    case DType::bf16:
      return to<A>(*reinterpret_cast<const bf16*>(p));
    default:
      return to<A>(*reinterpret_cast<const f16*>(p));
  }
}

template <class A>
__device__ __forceinline__ void store_as(char* p, DType dtype, A x) {
  switch (dtype) {
    case DType::f32:
      *reinterpret_cast<float*>(p) = Rounded<float>::from(x);
      break;
    case DType::f64:
      *reinterpret_cast<double*>(p) = Rounded<double>::from(x);
      break;
    case DType::bf16:
      *reinterpret_cast<bf16*>(p) = Rounded<bf16>::from(x);
      break;
    default:
      *reinterpret_cast<f16*>(p) = Rounded<f16>::from(x);
  }
}

__device__ __forceinline__ void copy_element(const char* from, char* to, DType dtype) {
  if (dtype == DType::f64) {
    *reinterpret_cast<uint64_t*>(to) = *reinterpret_cast<const uint64_t*>(from);
  } else if (dtype == DType::f32) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  }
}

// at[N] <- the addresses of element `index` of every operand.
template <int N, class Value>
__device__ __forceinline__ void locate(const StridedRow<N, Value>& row, int64_t index,
                                       char* (&at)[N]) {
  int64_t offset[N] = {};
  for (int d = 0; d < row.layout.ndim; ++d) {
    const bool outermost = d == row.layout.ndim - 1;  // needs no division
    const int64_t rest = outermost ? 0 : index / row.layout.shape[d];
    const int64_t place = index - rest * row.layout.shape[d];
    index = rest;
#pragma unroll
    for (int i = 0; i < N; ++i) offset[i] += place * row.layout.strides[i][d];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) at[i] = row.data[i] + offset[i] * size_of(row.dtype[i]);
}

// A chunk, element by element, with arithmetic in A.
template <class A, class Formula, class Table, class Element>
__device__ __forceinline__ void walk_strided(const Table& table, const Chunk& chunk,
                                             Element& element) {
  const auto& row = table.row[chunk.row];
  for (int j = threadIdx.x; j < chunk.count; j += kThreads) {
    char* at[Formula::kOperands];
    locate(row, chunk.begin + j, at);
    if constexpr (Formula::kCopies) {
      copy_element(at[Formula::kFrom], at[Formula::kTo], row.dtype[Formula::kFrom]);
    }
    if constexpr (!std::is_same_v<Element, NoElement>) {
      A x[Formula::kOperands];
#pragma unroll
      for (int i = 0; i < Formula::kOperands; ++i) {
        if (reads<Formula>(i)) x[i] = load_as<A>(at[i], row.dtype[i]);
      }
      element(x);
#pragma unroll
      for (int i = 0; i < Formula::kOperands; ++i) {
        if (writes<Formula>(i)) store_as(at[i], row.dtype[i], x[i]);
      }
    }
  }
}

// --- Kernels ------------------------------------------------------------------------------------

// Rows of T whose operands have their elements in one order in memory, whichever it is.
template <class T, class Formula>
__global__ void __launch_bounds__(kThreads)
    flat_kernel(KSAM_PARAMETER(FlatTableOf<Formula>) table, KSAM_PARAMETER(ArgsOf<Formula>) args) {
  const Chunk chunk = chunk_of_block(table);
  const auto value = table.value_of(chunk.row);
  if (Formula::acts(args, value)) {
    auto element = element_of<Opmath<T>, Formula>(args, value);
    walk_chunk<T, Formula>(table, chunk, element);
    Formula::finish(args, table);
  } else {
    NoElement none;
    walk_chunk<T, CopiesOf<Formula>>(table, chunk, none);
  }
}

template <class Formula>
__global__ void __launch_bounds__(kThreads)
    strided_kernel(KSAM_PARAMETER(StridedTableOf<Formula>) table,
                   KSAM_PARAMETER(ArgsOf<Formula>) args) {
  const Chunk chunk = chunk_of_block(table);
  const auto value = table.value_of(chunk.row);
  if (!Formula::acts(args, value)) {
    NoElement none;
    walk_strided<float, CopiesOf<Formula>>(table, chunk, none);
    return;
  }
  if (table.row[chunk.row].wide) {
    auto element = element_of<double, Formula>(args, value);
    walk_strided<double, Formula>(table, chunk, element);
  } else {
    auto element = element_of<float, Formula>(args, value);
    walk_strided<float, Formula>(table, chunk, element);
  }
  Formula::finish(args, table);
}

// Launches the formula over all rows. Its kernels are loaded before the first launch, as nothing
// could undo a call that fails halfway: if memory for them runs out, nothing has been written yet.
template <class Formula, int M, class ValueOf>
void apply_to_rows(const Rows<M>& rows, const ArgsOf<Formula>& args, const ValueOf& value_of,
                   Stream stream) {
  static_assert(sizeof(ArgsOf<Formula>) + kTableBytes <= kParameterBytes, "too many parameters");
  once_per_device<bool>(current_device(), [](int) {
    load(flat_kernel<float, Formula>, flat_kernel<double, Formula>, flat_kernel<bf16, Formula>,
         flat_kernel<f16, Formula>, strided_kernel<Formula>);
    return true;
  });
  for_each_launch<Formula::kOperands, typename Formula::Value>(
      rows, value_of,
      [&](DType dtype, const auto& table) {
        on_floating(dtype, [&](auto type) {
          using T = typename decltype(type)::type;
          launch(flat_kernel<T, Formula>, blocks_of(table), kThreads, stream, table, args);
        });
      },
      [&](const auto& table) {
        launch(strided_kernel<Formula>, blocks_of(table), kThreads, stream, table, args);
      });
}

}  // namespace ksam::gpu
