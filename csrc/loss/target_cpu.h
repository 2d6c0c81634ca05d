// The target of cross-entropy: a distribution q over the classes of every row,
//
//     q_c = (1 - e) w_y [c = y] + e / C w_c         for a class y,
//     q_c = w_c ((1 - e) t_c + e / C)               for probabilities t,
//
// with smoothing e and weights w, 1 where there are none. The first summand of a class y is called
// `hot`, everything else `spread`. 1 - e is called `confidence`, and e / C, what every class gets,
// `uniform`.
#pragma once

#include "loss/rows_cpu.h"

namespace ksam::KSAM_ISA {

constexpr int64_t kIgnored = -1;
constexpr int64_t kOutOfRange = -2;

template <class A>
class Target {
 public:
  explicit Target(const CrossEntropy& args)
      : args_(args),
        weight_(static_cast<const A*>(args.weight)),
        soft_(is_floating(args.target.dtype)),
        confidence_(static_cast<A>(1 - args.label_smoothing)),
        uniform_(static_cast<A>(args.label_smoothing / static_cast<double>(args.logits.columns))) {}

  bool has_hot() const { return !soft_; }
  bool has_spread() const { return soft_ || args_.label_smoothing > 0; }

  // y <- the classes of sixteen rows: kIgnored for rows that do not count, kOutOfRange; 0 for
  // probabilities, of which no class is hot. False where one is out of range.
  KSAM_INLINE bool read_classes(const Sixteen& rows, int64_t* y) const {
    const int64_t ignored = args_.ignore_index, classes = args_.logits.columns;
    for (int64_t i = 0; i < kLanes; ++i) y[i] = soft_ ? kIgnored : ignored;
    if (soft_) {
      for (int64_t i = rows.lane; i < rows.lane + rows.count; ++i) y[i] = 0;
      return true;
    }
    if (args_.target.dtype == DType::i64) {
      copy_classes<int64_t>(rows, y);
    } else {
      copy_classes<int32_t>(rows, y);
    }
    using Classes = int64_t __attribute__((vector_size(kRegisterBytes)));
    constexpr int64_t kCount = kRegisterBytes / sizeof(int64_t);
    const Classes out_of_range = broadcast<Classes>(kOutOfRange);
    Classes bad{};
    for (int64_t i = 0; i < kLanes; i += kCount) {
      Classes c = load_raw<Classes>(y + i);
      const Classes in_range = (c >= 0) & (c < classes);
      const Classes valid = in_range ? c : out_of_range;
      c = c == ignored ? broadcast<Classes>(kIgnored) : valid;
      bad |= c == kOutOfRange;
      std::memcpy(y + i, &c, sizeof(c));
    }
    int64_t any_bad = 0;
    for (int64_t i = 0; i < kCount; ++i) any_bad |= bad[i];
    return any_bad == 0;
  }

  KSAM_INLINE A hot(int64_t y) const {
    if (soft_) return 0;
    return weight_ == nullptr ? confidence_ : confidence_ * weight_[y];
  }

  // hot of sixteen rows' classes; of rows that do not count, any number.
  template <class V>
  KSAM_INLINE V hot_lanes(const int64_t* y) const {
    if (soft_ || weight_ == nullptr) return all_lanes<V>(hot(0));
    A lanes[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      if (y[i] != kIgnored) lanes[i] = hot(y[i]);
    }
    return load_lanes<V>(lanes);
  }

  // spread_c of classes [begin, begin + n) of a row, in `buffer` or in place. A spread that all
  // rows and classes have in common is in the buffer already: fill_constant() has put it there.
  // (Without smoothing there is no spread, rather than 0 times a weight, which may be infinite.)
  KSAM_INLINE const A* spread(int64_t row, int64_t begin, int64_t n, A* buffer) const {
    if (soft_) {
      const A* t = staged(args_.target, row, begin, n, buffer);
      if (args_.label_smoothing == 0 && weight_ == nullptr) return t;
      for (int64_t i = 0; i < n; ++i) {
        const A q = confidence_ * t[i] + uniform_;
        buffer[i] = weight_ == nullptr ? q : weight_[begin + i] * q;
      }
    } else if (weight_ != nullptr && has_spread()) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = uniform_ * weight_[begin + i];
    }
    return buffer;
  }

  // buffer <- spread_c of class c in sixteen rows that lie in planes, as above. first:
  // first_plane() of the first row.
  KSAM_INLINE void spread_plane(const char* first, int64_t c, A* buffer) const {
    if (soft_) {
      on_floating(args_.target.dtype, [&](auto type) KSAM_INLINE_LAMBDA {
        using T = typename decltype(type)::type;
        const T* t = reinterpret_cast<const T*>(first) + c * args_.target.plane_stride;
        if constexpr (sizeof(Opmath<T>) == sizeof(A)) {
          store_lanes(buffer, load_lanes<Lanes<T>>(t));
        } else {
          for (int i = 0; i < kLanes; ++i) buffer[i] = static_cast<A>(load_one(t + i));
        }
      });
      if (args_.label_smoothing == 0 && weight_ == nullptr) return;
      for (int i = 0; i < kLanes; ++i) {
        const A q = confidence_ * buffer[i] + uniform_;
        buffer[i] = weight_ == nullptr ? q : weight_[c] * q;
      }
    } else if (weight_ != nullptr && has_spread()) {
      for (int i = 0; i < kLanes; ++i) buffer[i] = uniform_ * weight_[c];
    }
  }

  // Where a row's probabilities begin, if these lie in planes; null for classes.
  KSAM_INLINE const char* first_plane(int64_t row) const {
    const char* first = nullptr;
    if (!soft_) return first;
    on_floating(args_.target.dtype, [&](auto type) KSAM_INLINE_LAMBDA {
      using T = typename decltype(type)::type;
      first = reinterpret_cast<const char*>(plane_of<T>(args_.target, row));
    });
    return first;
  }

  // Fills the part of the buffer that spread() and spread_plane() may leave unchanged.
  void fill_constant(A* buffer) const {
    const int64_t classes = args_.logits.columns < kLanes ? kLanes : args_.logits.columns;
    for (int64_t i = 0; i < classes && i < kBlockCapacity; ++i) buffer[i] = uniform_;
  }

 private:
  // y <- the classes of the rows that count, as they are stored.
  template <class I>
  KSAM_INLINE void copy_classes(const Sixteen& rows, int64_t* y) const {
    const I* from = row_of<I>(args_.target, rows.first + rows.lane);
    const int64_t stride = args_.target.stride;
    if (rows.count == kLanes && stride == 1) {  // in vectors
      for (int64_t i = 0; i < kLanes; ++i) y[i] = from[i];
    } else {
      for (int64_t i = 0; i < rows.count; ++i) y[rows.lane + i] = from[i * stride];
    }
  }

  const CrossEntropy& args_;
  const A* weight_;
  bool soft_;
  A confidence_;
  A uniform_;
};

// *first_bad <- the smaller of it and row. Threads may call this at the same time.
KSAM_INLINE void note_bad(int64_t row, int64_t* first_bad) {
  int64_t first = __atomic_load_n(first_bad, __ATOMIC_RELAXED);
  while (row < first && !__atomic_compare_exchange_n(first_bad, &first, row, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
}

// 1 in the lanes of rows that count, 0 in the others.
template <class V>
KSAM_INLINE V counted_lanes(const int64_t* y) {
  typename LaneTraits<V>::element lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = y[i] != kIgnored;
  return load_lanes<V>(lanes);
}

// y <- the classes of sixteen rows; kIgnored for rows that do not count. False where a class is out
// of range; its row is then noted in first_bad.
template <class A>
KSAM_INLINE bool classes_of(const Target<A>& target, const Sixteen& rows, int64_t* first_bad,
                            int64_t* y) {
  if (target.read_classes(rows, y)) return true;
  int64_t bad = 0;
  while (y[bad] != kOutOfRange) ++bad;
  note_bad(rows.first + bad, first_bad);
  return false;
}

}  // namespace ksam::KSAM_ISA
