// Every kernel once or more, for the sanitizers. A program of its own: MemorySanitizer, which
// checks that what a kernel reads and every output have been written, knows nothing of Python and
// torch, and the others build it in a fraction of the time. It calls what <room>_python.cpp calls.
#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#endif

#include <cmath>
#include <cstdio>
#include <vector>

#include "compact/compact.h"
#include "loss/loss.h"
#include "perturb/perturb.h"
#include "topk/topk.h"

namespace ksam {
namespace {

// Memory as it comes from an allocator: not written.
template <class T>
class Fresh {
 public:
  explicit Fresh(int64_t count) : count_(count), data_(new T[count > 0 ? count : 1]) {}
  ~Fresh() { delete[] data_; }
  T* data() const { return data_; }
  char* bytes() const { return reinterpret_cast<char*>(data_); }
  void check() const {
#if __has_feature(memory_sanitizer)
    __msan_check_mem_is_initialized(data_, count_ * sizeof(T));
#endif
  }

 private:
  int64_t count_;
  T* data_;
};

std::vector<float> numbers(int64_t count) {
  std::vector<float> values(count);
  unsigned state = 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1;
  }
  return values;
}

Tensor vector_of(void* data, DType dtype, int itemsize, const int64_t* size) {
  static const int64_t stride = 1;
  Tensor t;
  t.data = static_cast<char*>(data);
  t.shape = size;
  t.strides = &stride;
  t.numel = *size;
  t.ndim = 1;
  t.itemsize = itemsize;
  t.dtype = dtype;
  return t;
}

char* bytes_of(std::vector<float>& values) { return reinterpret_cast<char*>(values.data()); }

void topk() {
  for (const int64_t n : {1, 33, 1000, 5000}) {
    std::vector<float> losses = numbers(n);
    const int64_t k = (n + 2) / 3;
    Fresh<char> scratch(gpu::topk_scratch_bytes(n));
    Fresh<int64_t> out(k);
    gpu::topk_indices(vector_of(losses.data(), DType::f32, 4, &n), k, scratch.data(), out.data(),
                      nullptr);
    out.check();
  }
}

void compact() {
  const int64_t batch = 9, k = 4;
  std::vector<int64_t> indices{0, 3, 4, 8};
  for (const int64_t row_bytes : {1, 8, 20, 48, 5000}) {
    const int64_t stride =
        row_bytes == 48 ? 52 : row_bytes;  // whole vectors, but not at their boundaries
    std::vector<float> source = numbers((batch * stride + 3) / 4);
    Fresh<char> out(k * row_bytes);
    const Leaf leaf{bytes_of(source), stride, out.data(), row_bytes};
    gpu::gather_rows(&leaf, 1, vector_of(indices.data(), DType::i64, 8, &k), batch, nullptr);
    out.check();
  }
}

// Lays as many rows in planes instead, all in one group.
void lay_in_planes(Matrix* m) {
  m->group = m->rows;
  m->plane_stride = m->rows;
}

void cross_entropy(int64_t rows, int64_t classes, double label_smoothing, bool planes = false) {
  std::vector<float> logits = numbers(rows * classes), weight = numbers(classes);
  std::vector<float> upstream = numbers(rows);
  std::vector<int64_t> target(rows);
  for (int64_t r = 0; r < rows; ++r) target[r] = r % 5 == 4 ? -100 : r % classes;
  Fresh<float> losses(rows), stats(3 * rows), gradient(rows * classes);
  const int64_t k = (rows + 2) / 3;
  Fresh<int64_t> indices(k);
  CrossEntropy args{};
  args.logits = {bytes_of(logits), rows, classes, classes, DType::f32};
  args.target = {reinterpret_cast<char*>(target.data()), rows, 1, 1, DType::i64};
  args.weight = label_smoothing > 0 ? weight.data() : nullptr;
  args.ignore_index = -100;
  args.label_smoothing = label_smoothing;
  args.losses = losses.data();
  args.stats = stats.data();
  if (planes) lay_in_planes(&args.logits);
  Fresh<char> scratch(gpu::select_cross_entropy_scratch_bytes(args));
  gpu::select_cross_entropy(args, k, scratch.data(), indices.data(), nullptr);
  losses.check();
  stats.check();
  indices.check();
  CrossEntropyGradient backward{args,
                                {bytes_of(upstream), rows, 1, 1, DType::f32},
                                {gradient.bytes(), rows, classes, classes, DType::f32}};
  if (planes) lay_in_planes(&backward.out);
  gpu::cross_entropy_backward(backward, nullptr);
  gradient.check();
}

void elementwise(int64_t samples, int64_t n) {
  std::vector<float> input = numbers(samples * n), target = numbers(samples * n);
  std::vector<float> upstream = numbers(samples);
  Fresh<float> losses(samples), gradient(samples * n);
  Elementwise args{};
  args.input = {bytes_of(input), samples, n, n, DType::f32};
  args.target = {bytes_of(target), samples, n, n, DType::f32};
  args.losses = losses.data();
  const ElementwiseGradient backward{
      args, {bytes_of(upstream), samples, 1, 1, DType::f32}, gradient.bytes()};
  Fresh<char> scratch(gpu::elementwise_scratch_bytes(args));
  gpu::binary_cross_entropy(args, scratch.data(), nullptr);
  losses.check();
  gpu::binary_cross_entropy_backward(backward, nullptr);
  gradient.check();
  gpu::mse(args, scratch.data(), nullptr);
  losses.check();
  gpu::mse_backward(backward, nullptr);
  gradient.check();
}

// Rows of N flat operands each.
template <int N>
std::vector<Row<N>> rows_of(const std::vector<int64_t>& sizes, float* const (&operand)[N]) {
  std::vector<Row<N>> rows;
  int64_t at = 0;
  for (const int64_t size : sizes) {
    Row<N> row;
    for (int i = 0; i < N; ++i) {
      row.operand[i].data = reinterpret_cast<char*>(operand[i] + at);
      row.operand[i].itemsize = 4;
    }
    row.numel = size;
    row.index = static_cast<int64_t>(rows.size());
    rows.push_back(row);
    at += size;
  }
  return rows;
}

template <int N>
Rows<N> view(const std::vector<Row<N>>& rows, int64_t numel) {
  return {rows.data(), nullptr, static_cast<int64_t>(rows.size()), numel, false};
}

void perturb() {
  const std::vector<int64_t> sizes{1, 7, 5000, 64, 0, 33};
  int64_t n = 0;
  for (const int64_t size : sizes) n += size;
  std::vector<float> w = numbers(n), g = numbers(n), m = numbers(n), v(n, 1.0f);
  std::vector<double> rho(sizes.size(), 0.05);
  std::vector<float> steps(sizes.size(), 0.0f);
  std::vector<float*> step;
  for (float& s : steps) step.push_back(&s);
  Fresh<float> backup(n), norm(1);
  const auto grads = rows_of<2>(sizes, {g.data(), w.data()});
  Fresh<char> scratch(gpu::norm_scratch_bytes(view(grads, n)));
  gpu::grad_norm(view(grads, n), true, 0.01, scratch.data(), norm.data(), nullptr);
  norm.check();
  const auto climbed = rows_of<3>(sizes, {w.data(), g.data(), backup.data()});
  const PerturbArgs climb{reinterpret_cast<double*>(scratch.data()), rho.data(), 0.01, true};
  gpu::perturb(view(climbed, n), climb, nullptr);
  backup.check();
  const auto restored = rows_of<2>(sizes, {w.data(), backup.data()});
  gpu::restore(view(restored, n), nullptr);
  // Nothing reads buffers of a first step, nor weights that are about to be written.
  Fresh<float> updated(n), buffers(n);
  const auto sgd = rows_of<4>(sizes, {updated.data(), backup.data(), g.data(), m.data()});
  const SgdArgs sgd_args{{0.1}, 0.9, 0.0, 1e-4, false, false, {}};
  gpu::restore_sgd(view(sgd, n), sgd_args, step.data(), scratch.data(), nullptr);
  updated.check();
  const auto adam =
      rows_of<5>(sizes, {updated.data(), backup.data(), g.data(), m.data(), v.data()});
  const float rate = 1e-3f;
  const AdamArgs adam_args{{0, &rate}, 0.9, 0.999, 1e-8, 0.01, false, true, {}};
  gpu::restore_adam(view(adam, n), adam_args, step.data(), scratch.data(), nullptr);
  updated.check();
}

}  // namespace
}  // namespace ksam

int main() {
  ksam::topk();
  ksam::compact();
  for (const int64_t classes : {1, 10, 1000, 5001}) {
    for (const double smoothing : {0.0, 0.1}) {
      ksam::cross_entropy(13, classes, smoothing);
      ksam::cross_entropy(150, classes < 1000 ? classes : 50, smoothing, true);
    }
  }
  ksam::cross_entropy(2, 40000, 0.0);  // a row over several blocks
  for (const int64_t n : {1, 10, 4097}) ksam::elementwise(5, n);
  ksam::elementwise(13, 600);  // several rows of a block, one after the other
  ksam::perturb();
  std::puts("every kernel ran");
  return 0;
}
