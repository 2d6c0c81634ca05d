// The loss of a row, made of what one pass over its logits adds up. Shared by host and device.
#pragma once

#include <math.h>

#include "common/host_device.h"

namespace ksam {

KSAM_FORMULA float logarithm(float x) { return ::logf(x); }
KSAM_FORMULA double logarithm(double x) { return ::log(x); }
KSAM_FORMULA float exponential(float x) { return ::expf(x); }
KSAM_FORMULA double exponential(double x) { return ::exp(x); }

// Here z_c = x_c - max, and the row's target is q_c = hot [c = y] + spread_c (target_cpu.h).
template <class A>
struct RowSums {
  A max = -HUGE_VALF;  // of x_c; -inf if there is none yet
  A exp = 0;           // sum exp z_c
  A mass = 0;          // sum spread_c
  A dot = 0;           // sum spread_c z_c
};

// The number that is subtracted from x_c to give z_c. Where all x_c so far are -inf it is 0, so
// that their z_c are -inf, not NaN.
template <class A>
KSAM_FORMULA A origin(A max) {
  return max == -HUGE_VALF ? A(0) : max;
}

// Rescales the sums from the maximum so far to a larger one, which may be infinitely larger. No
// terms of dot cancel, as all z_c <= 0.
template <class A>
KSAM_FORMULA void raise_maximum(RowSums<A>* row, A max) {
  if (row->exp != 0) row->exp *= exponential(row->max - max);  // not for the first maximum
  if (row->mass != 0) row->dot += row->mass * (origin(row->max) - origin(max));
  row->max = max;
}

// Adds the sums of another part of the row; the same bits in either order.
template <class A>
KSAM_FORMULA void merge(RowSums<A>* row, RowSums<A> other) {
  if (other.max > row->max) raise_maximum(row, other.max);
  if (row->max > other.max) raise_maximum(&other, row->max);
  row->exp += other.exp;
  row->mass += other.mass;
  row->dot += other.dot;
}

template <class A>
struct RowStats {
  A max, log_s, mass;
};

template <class A>
KSAM_FORMULA RowStats<A> stats_of(const RowSums<A>& row, A hot) {
  return {row.max, row.max == -HUGE_VALF ? A(NAN) : logarithm(row.exp), hot + row.mass};
}

// sum_c q_c (log s - z_c), where z_y is z_c of the class y; 0 for targets without a class.
template <class A>
KSAM_FORMULA A loss_of(const RowSums<A>& row, A log_s, A hot, A z_y) {
  return hot * (log_s - z_y) + (row.mass * log_s - row.dot);
}

}  // namespace ksam
