// Norm, perturbation and restore.
#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

// Sixteen sums side by side, whatever the instruction set: four vectors of four doubles.
struct Sums {
  static constexpr int kVectors = 4, kCount = 16;
  using f64x4 = double __attribute__((vector_size(32)));
  f64x4 sum[kVectors] = {};

  double total() const {
    double all = 0;
    for (const f64x4& part : sum) all += (part[0] + part[1]) + (part[2] + part[3]);
    return all;
  }
};

KSAM_INLINE Sums::f64x4 load_doubles(const double* p) { return load_raw<Sums::f64x4>(p); }
KSAM_INLINE Sums::f64x4 load_doubles(const float* p) {
  using f32x4 = float __attribute__((vector_size(16)));
  return __builtin_convertvector(load_raw<f32x4>(p), Sums::f64x4);
}

// T g with T = |w| + eta, or g
KSAM_INLINE double weighted(double g, double w, bool adaptive, double eta) {
  return adaptive ? (magnitude(w) + eta) * g : g;
}

template <class A>
double block_squares(A* const (&operand)[2], int n, bool adaptive, double eta) {
  const A *g = operand[0], *w = adaptive ? operand[1] : operand[0];
  Sums lanes;
  int j = 0;
  for (; j + Sums::kCount <= n; j += Sums::kCount) {
    for (int i = 0; i < Sums::kVectors; ++i) {
      Sums::f64x4 x = load_doubles(g + j + 4 * i);
      if (adaptive) {
        const Sums::f64x4 v = load_doubles(w + j + 4 * i);
        x = ((v < 0 ? -v : v) + eta) * x;
      }
      lanes.sum[i] += x * x;
    }
  }
  double sum = lanes.total();
  for (; j < n; ++j) {
    const double x = weighted(g[j], w[j], adaptive, eta);
    sum += x * x;
  }
  return sum;
}

}  // namespace

// Squares of floats neither overflow nor vanish in double. Every chunk has a sum of its own, and
// these are added in order: the same bits for any number of threads. Bytes moved: 4 an element.
double sum_of_squares(const Rows<2>& rows, bool adaptive, double eta, double* partial) {
  constexpr Access kAccess[] = {kRead, kRead};
  for_each_chunk(rows, [&](const Row<2>& row, int64_t chunk, int64_t begin, int64_t end) {
    double sum = 0;
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      for_each_block<A>(row, kAccess, begin, end, [&](A* const(&operand)[2], int n) {
        sum += block_squares(operand, n, adaptive, eta);
      });
    });
    partial[chunk] = sum;
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < rows.first_chunk[rows.count]; ++chunk) total += partial[chunk];
  return total;
}

namespace {

// Copies elements [begin, end) of one operand to another, bit for bit.
void copy_bytes(const Operand& from, const Operand& to, int64_t begin, int64_t end,
                bool streaming) {
  const int size = from.itemsize;
  if (from.strides == nullptr && to.strides == nullptr) {
    copy_flat(from.data + begin * size, (end - begin) * size, streaming, to.data + begin * size);
    return;
  }
  alignas(64) char buffer[kBlock * 8];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const auto read = [&](char* element, int j) { std::memcpy(buffer + j * size, element, size); };
    const auto write = [&](char* element, int j) { std::memcpy(element, buffer + j * size, size); };
    for_each_strided(from, at, n, read);
    for_each_strided(to, at, n, write);
  }
}

// The operands of a perturbation are the weights, the gradient and the backup, which has been
// copied before.
template <class A>
struct Climb {
  static constexpr Access kAccess[] = {kReadWrite, kRead, kUntouched};
  A n, rho;

  template <class V>
  KSAM_INLINE void operator()(V (&x)[3]) const {
    x[0] = climbed(x[0], x[1], n, rho);
  }
};

template <class A>
struct AdaptiveClimb {
  static constexpr Access kAccess[] = {kReadWrite, kRead, kUntouched};
  A n, rho, eta;

  template <class V>
  KSAM_INLINE void operator()(V (&x)[3]) const {
    x[0] = climbed_adaptive(x[0], magnitude(x[0]), x[1], n, rho, eta);
  }
};

}  // namespace

// backup <- w, bit for bit; w <- w + rho * g / norm. Bytes moved: 16 an element (read w and g,
// write w and backup).
void perturb(const Rows<3>& rows, const PerturbArgs& args) {
  const double norm = *args.norm;
  const bool moves = moves_at(norm);
  for_each_chunk(rows, [&](const Row<3>& row, int64_t, int64_t begin, int64_t end) {
    const double rho = args.rho[row.index];
    copy_bytes(row.operand[0], row.operand[2], begin, end, rows.streaming);
    if (!moves || rho == 0) return;
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      const A n = static_cast<A>(divisor_of(norm));
      const A radius = static_cast<A>(rho), eta = static_cast<A>(args.eta);
      if (args.adaptive) {
        transform<A>(row, false, begin, end, AdaptiveClimb<A>{n, radius, eta});
      } else {
        transform<A>(row, false, begin, end, Climb<A>{n, radius});
      }
    });
  });
}

// w <- backup, bit for bit. Bytes moved: 8 an element.
void restore(const Rows<2>& rows) {
  for_each_chunk(rows, [&](const Row<2>& row, int64_t, int64_t begin, int64_t end) {
    copy_bytes(row.operand[1], row.operand[0], begin, end, rows.streaming);
  });
}

}  // namespace ksam::KSAM_ISA
