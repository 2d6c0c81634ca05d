#include "perturb/blocks_cpu.h"
#include "perturb/update.h"

namespace ksam::KSAM_ISA {
namespace {

template <class V, class A>
KSAM_INLINE V weighted(V g, V magnitude, bool adaptive, A eta) {
  return adaptive ? (magnitude + eta) * g : g;
}

template <class A>
double block_squares(A* const (&operand)[2], int n, bool adaptive, double eta) {
  const A *g = operand[0], *w = adaptive ? operand[1] : operand[0];
  f64x16 lanes{};
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const f64x16 magnitudes = magnitude(__builtin_convertvector(load(w + j), f64x16));
    const f64x16 x =
        weighted(__builtin_convertvector(load(g + j), f64x16), magnitudes, adaptive, eta);
    lanes += x * x;
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  for (; j < n; ++j) {
    const double x = weighted(double{g[j]}, magnitude(double{w[j]}), adaptive, eta);
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

void copy_flat(const char* from, int64_t bytes, bool streaming, char* to) {
  int64_t at = 0;
  if (streaming && is_line_aligned(to)) {
    for (; at + 64 <= bytes; at += 64) {
      store_stream(reinterpret_cast<float*>(to + at), load_raw<f32x16>(from + at));
    }
  }
  std::memcpy(to + at, from + at, bytes - at);
}

// The bytes of elements [begin, end) of one operand into another.
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

}  // namespace

// backup <- w, bit for bit; w <- w + rho * g / norm. Bytes moved: 16 an element (read w and g,
// write w and backup).
void perturb(const Rows<3>& rows, const PerturbArgs& args) {
  constexpr Access kAccess[] = {kReadWrite, kRead, kUntouched};
  for_each_chunk(rows, [&](const Row<3>& row, int64_t, int64_t begin, int64_t end) {
    const double rho = args.rho[row.index];
    copy_bytes(row.operand[0], row.operand[2], begin, end, rows.streaming);
    if (!args.moves || rho == 0) return;
    on_arithmetic(row, [&](auto type) {
      using A = typename decltype(type)::type;
      constexpr double kTiny = 0x1p-126;  // the smallest normal float
      const A n = static_cast<A>(args.norm < kTiny ? kTiny : args.norm);
      const A radius = static_cast<A>(rho), eta = static_cast<A>(args.eta);
      for_each_block<A>(row, kAccess, begin, end, [&](A* const(&p)[3], int count) {
        for_each_vector<A>(count, false, [&](auto load, auto store, auto) {
          const auto w = load(p[0]), g = load(p[1]);
          store(p[0], args.adaptive ? climb_adaptive(w, magnitude(w), g, n, radius, eta)
                                    : climb(w, g, n, radius));
        });
      });
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
