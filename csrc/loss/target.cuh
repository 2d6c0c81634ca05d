// The target of cross-entropy on the device: target_cpu.h has the formula of its distribution q
// and says what `hot` and `spread` are.
#pragma once

#include <type_traits>

#include "loss/row.cuh"

namespace ksam::gpu {

// What the target has: classes, which have no spread; classes with smoothing; probabilities.
enum class Kind { classes, smoothed, probabilities };

constexpr int64_t kIgnored = -1;

inline Kind kind_of(const CrossEntropy& args) {
  if (is_floating(args.target.dtype)) return Kind::probabilities;
  return args.label_smoothing > 0 ? Kind::smoothed : Kind::classes;
}

// For logits of type T and probabilities of type Q, which is T or the arithmetic's type A.
template <class T, class Q, Kind kKind>
struct Target {
  using A = Opmath<T>;
  static constexpr bool kHasHot = kKind != Kind::probabilities;
  static constexpr bool kHasSpread = kKind != Kind::classes;
  static constexpr int N = kPerVector<T>;
  struct Nothing {};
  using Probabilities = std::conditional_t<kKind == Kind::probabilities, Packed<Q, N>, Nothing>;

  // Whether logits that are not aligned to vectors are loaded as aligned vectors and shifted. With
  // probabilities, which have an offset of their own, there are too few registers for that.
  static constexpr bool kMayShift = sizeof(T) <= 4 && kKind != Kind::probabilities;

  const void* data;  // [rows] int64 or int32, or [rows, classes] Q
  int64_t stride;    // between rows
  const A* weight;   // [classes], or null
  int64_t classes;
  int64_t ignore_index;
  A confidence;    // 1 - e
  A uniform;       // e / C
  bool is_narrow;  // int32

  explicit Target(const CrossEntropy& args)
      : data(args.target.data),
        stride(args.target.stride),
        weight(static_cast<const A*>(args.weight)),
        classes(args.logits.columns),
        ignore_index(args.ignore_index),
        confidence(static_cast<A>(1 - args.label_smoothing)),
        uniform(static_cast<A>(args.label_smoothing / static_cast<double>(args.logits.columns))),
        is_narrow(args.target.dtype == DType::i32) {}

  // A row's class as the target has it; 0 for probabilities, whose rows are never ignored.
  __device__ __forceinline__ int64_t read(int64_t row) const {
    if constexpr (!kHasHot) return 0;
    return is_narrow ? static_cast<const int32_t*>(data)[row * stride]
                     : static_cast<const int64_t*>(data)[row * stride];
  }

  // The class or kIgnored, from what read() gave.
  __device__ __forceinline__ int64_t class_of(int64_t y) const {
    if constexpr (!kHasHot) return 0;
    if (y == ignore_index) return kIgnored;
    KSAM_DEVICE_ASSERT(y >= 0 && y < classes && "target holds a class that is out of range");
    return y;
  }

  __device__ __forceinline__ A hot(int64_t y) const {
    if constexpr (!kHasHot) return 0;
    return weight == nullptr ? confidence : confidence * weight[y];
  }

  // spread_c of one class; t: its probability, if the target has them.
  __device__ __forceinline__ A spread_of(int64_t c, A t) const {
    const A q = kKind == Kind::probabilities ? ::fma(confidence, t, uniform) : uniform;
    return weight == nullptr ? q : q * weight[c];
  }

  __device__ __forceinline__ const Q* row(int64_t i) const {
    return static_cast<const Q*>(data) + i * stride;
  }

  // Loads what spread() needs of a piece besides the weights, as `loads` and `aligned` allow.
  __device__ __forceinline__ Probabilities load(const Q* row, const Piece& piece, Loads loads,
                                                bool aligned) const {
    if constexpr (kKind == Kind::probabilities) {
      const Q none = Rounded<Q>::from(0.0f);
      if (loads == Loads::aligned) return load_whole<N>(row + piece.first);
      if (loads == Loads::last && piece.end == 0) return filled<N>(none);
      return load_piece<N>(row, piece, aligned, none);
    } else {
      return {};
    }
  }

  // Loads the logits of a piece; offset: how far past a vector's boundary the pieces lie.
  __device__ __forceinline__ static Packed<T, N> load_logits(const T* row, const Piece& piece,
                                                             Loads loads, int offset, T fill) {
    if (loads == Loads::last && piece.end == 0) return filled<N>(fill);
    if (loads == Loads::aligned || loads == Loads::last) return load_whole<N>(row + piece.first);
    if constexpr (kMayShift) {
      if (loads == Loads::shifted) return load_shifted<N>(row + piece.first, offset);
    }
    return load_piece<N>(row, piece, offset == 0, fill);
  }

  // spread_c of the elements of a piece; 0 outside it.
  __device__ __forceinline__ Elements<A, N> spread(const Probabilities& t, const Piece& piece,
                                                   bool weight_aligned) const {
    Elements<A, N> q;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      A value = uniform;
      if constexpr (kKind == Kind::probabilities) value = ::fma(confidence, element(t, j), uniform);
      q.at[j] = piece.has(j) ? value : A(0);
    }
    if (weight == nullptr) return q;
    const auto w = load_piece<N>(weight, piece, weight_aligned, A(0));
#pragma unroll
    for (int j = 0; j < N; ++j) q.at[j] *= element(w, j);
    return q;
  }
};

template <class T, class Q, Kind kKind>
struct TargetType {
  using Logit = T;
  using Probability = Q;
  static constexpr Kind kind = kKind;
};

// body(TargetType<T, Q, kind>{}) with the types that the arguments' dtypes stand for.
template <class Body>
void on_target(const CrossEntropy& args, const Body& body) {
  on_floating(args.logits.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Opmath<T>;
    if (kind_of(args) == Kind::probabilities) {
      if constexpr (sizeof(T) != sizeof(A)) {
        if (args.target.dtype != args.logits.dtype) {
          return body(TargetType<T, A, Kind::probabilities>{});
        }
      }
      return body(TargetType<T, T, Kind::probabilities>{});
    }
    if (kind_of(args) == Kind::smoothed) return body(TargetType<T, T, Kind::smoothed>{});
    return body(TargetType<T, T, Kind::classes>{});
  });
}

}  // namespace ksam::gpu
