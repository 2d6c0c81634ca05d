// Norm, perturbation and restore.
//
// The contract is exact, bit for bit: setup.py compiles this folder with -fmad=false, so that no
// product is contracted with a sum. Division and square root are IEEE's, nvcc's default.
#include "perturb/elements.cuh"
#include "perturb/update.h"

namespace ksam::gpu {
namespace {

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// --- Norm ---------------------------------------------------------------------------------------

// Blocks that each multiprocessor runs at once. If there are more chunks, blocks take several each.
constexpr int kNormBlocks = gpu_or_simt(5, 2);

struct NormArgs {
  double eta;
  double* partial;  // one sum per block of all launches
  int64_t first;    // where the sums of this launch begin
  int64_t total;    // how many the last block of the last launch adds up; 0 in other launches
  unsigned* ticket;
  double* wide;  // [1]
  float* norm;   // [1]
};

// Sum of (T g)^2 with T = |w| + eta, or 1. Squares of floats neither overflow nor vanish in double.
template <bool kAdaptive>
struct Norm {
  static constexpr int kOperands = kAdaptive ? 2 : 1;  // (grads, params)
  static constexpr unsigned kReads = kAdaptive ? 3 : 1, kWrites = 0;
  static constexpr bool kCopies = false;
  static constexpr int kVectors = 4;
  using Value = NoValue;

  double eta, sum;

  template <class A>
  __device__ __forceinline__ void operator()(const A (&x)[kOperands]) {
    double g = x[0];
    if constexpr (kAdaptive) g = (magnitude(static_cast<double>(x[1])) + eta) * g;
    sum = fma(g, g, sum);
  }
};

// Stores the block's sum; the last block of the last launch adds up the sums of all blocks, first
// in each thread, then over the block. The order depends on the rows and their alignment alone, so
// that the norm has the same bits from run to run.
__device__ void finish_norm(const NormArgs& args, double own) {
  own = block_sum<kThreads>(own);
  if (threadIdx.x == 0) args.partial[args.first + blockIdx.x] = own;
  if (args.total == 0 || !last_block(args.ticket, gridDim.x)) return;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < args.total; i += kThreads) sum += __ldcg(&args.partial[i]);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x != 0) return;
  *args.wide = sqrt(sum);
  *args.norm = static_cast<float>(sqrt(sum));
}

template <class T, bool kAdaptive>
__global__ void __launch_bounds__(kThreads)
    flat_norm_kernel(KSAM_PARAMETER(FlatTableOf<Norm<kAdaptive>>) table,
                     KSAM_PARAMETER(NormArgs) args) {
  Norm<kAdaptive> element{args.eta, 0};
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    walk_chunk<T, Norm<kAdaptive>>(table, chunk_of(table, c), element);
  }
  finish_norm(args, element.sum);
}

template <bool kAdaptive>
__global__ void __launch_bounds__(kThreads)
    strided_norm_kernel(KSAM_PARAMETER(StridedTableOf<Norm<kAdaptive>>) table,
                        KSAM_PARAMETER(NormArgs) args) {
  Norm<kAdaptive> element{args.eta, 0};
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    walk_strided<double, Norm<kAdaptive>>(table, chunk_of(table, c), element);
  }
  finish_norm(args, element.sum);
}

int64_t all_chunks(const Rows<2>& rows) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < rows.count; ++r) chunks += chunks_of(rows.row[r].numel);
  return chunks;
}

// Makes the launches of a norm over `chunks` chunks in all; the sums of one launch follow those of
// the launch before it.
class NormLaunches {
 public:
  NormLaunches(const NormArgs& args, int64_t chunks, Stream stream)
      : args_(args), chunks_left_(chunks), stream_(stream) {}

  template <class Kernel, class Table>
  void operator()(Kernel kernel, const Table& table) {
    if (table.chunks == 0) return;
    const int slots = kNormBlocks * multiprocessors();
    const int turns = (table.chunks + slots - 1) / slots;
    const int blocks = (table.chunks + turns - 1) / turns;
    chunks_left_ -= table.chunks;
    args_.total = chunks_left_ == 0 ? args_.first + blocks : 0;
    launch(kernel, static_cast<unsigned>(blocks), kThreads, stream_, table, args_);
    args_.first += blocks;
  }

 private:
  NormArgs args_;
  int64_t chunks_left_;
  Stream stream_;
};

template <bool kAdaptive>
void launch_norm(const Rows<2>& rows, NormLaunches launches) {
  for_each_launch<Norm<kAdaptive>::kOperands, NoValue>(
      rows, [](const Row<2>&) { return NoValue{}; },
      [&](DType dtype, const auto& table) {
        on_floating(dtype, [&](auto type) {
          launches(flat_norm_kernel<typename decltype(type)::type, kAdaptive>, table);
        });
      },
      [&](const auto& table) { launches(strided_norm_kernel<kAdaptive>, table); });
}

// One block without chunks: its sum is 0, and so is the norm.
void launch_norm_of_nothing(NormArgs args, Stream stream) {
  FlatTableOf<Norm<false>> table;
  args.total = 1;
  launch(flat_norm_kernel<float, false>, 1, kThreads, stream, table, args);
}

// --- Perturb and restore ------------------------------------------------------------------------

struct ClimbArgs {
  const double* norm;  // [1]
  double eta;
  bool adaptive;
};

// backup <- w, bit for bit; w <- w + rho * g / norm. The operands are (params, grads, backup).
struct Climb {
  static constexpr int kOperands = 3;
  static constexpr unsigned kReads = 0b011, kWrites = 0b001;
  static constexpr int kFrom = 0, kTo = 2;
  static constexpr bool kCopies = true;
  static constexpr int kVectors = 4;
  using Value = double;  // rho
  using Args = ClimbArgs;

  static __device__ bool acts(const Args& args, double rho) {
    return rho != 0 && moves_at(*args.norm);
  }

  template <class A>
  struct Element {
    A n, rho, eta;
    bool adaptive;

    __device__ __forceinline__ void operator()(A (&x)[3]) const {
      x[0] = adaptive ? climbed_adaptive(x[0], magnitude(x[0]), x[1], n, rho, eta)
                      : climbed(x[0], x[1], n, rho);
    }
  };

  template <class A>
  static __device__ Element<A> element(const Args& args, double rho) {
    return {static_cast<A>(divisor_of(*args.norm)), static_cast<A>(rho), static_cast<A>(args.eta),
            args.adaptive};
  }

  template <class Table>
  static __device__ void finish(const Args&, const Table&) {}
};

// w <- backup. The operands are (params, backup).
struct Restore {
  static constexpr int kOperands = 2;
  static constexpr int kFrom = 1, kTo = 0;
  using Value = NoValue;
};

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(KSAM_PARAMETER(FlatTableOf<Restore>) table) {
  NoElement none;
  walk_chunk<Bits, CopiesOf<Restore>>(table, chunk_of_block(table), none);
}

__global__ void __launch_bounds__(kThreads)
    restore_strided_kernel(KSAM_PARAMETER(StridedTableOf<Restore>) table) {
  NoElement none;
  walk_strided<float, CopiesOf<Restore>>(table, chunk_of_block(table), none);
}

void launch_restore(int itemsize, const FlatTableOf<Restore>& table, Stream stream) {
  const auto kernel = itemsize == 8   ? restore_kernel<uint64_t>
                      : itemsize == 4 ? restore_kernel<uint32_t>
                                      : restore_kernel<uint16_t>;
  launch(kernel, blocks_of(table), kThreads, stream, table);
}

// The beginning of a norm's scratch; the partial sums follow.
struct NormScratch {
  double wide;
  unsigned ticket;
};

}  // namespace

int64_t norm_scratch_bytes(const Rows<2>& rows) {
  return sizeof(NormScratch) + sizeof(double) * (all_chunks(rows) + 1);
}

// Bytes moved: 4 an element, adaptive 8. Launches: 1 for each dtype, if no row is strided or of two
// dtypes and the rows fit a table.
void grad_norm(const Rows<2>& rows, bool adaptive, double eta, void* scratch, float* norm,
               Stream stream) {
  auto* head = static_cast<NormScratch*>(scratch);
  NormArgs args{};
  args.eta = eta;
  args.partial = reinterpret_cast<double*>(head + 1);
  args.ticket = ticket(stream, &head->ticket);
  args.wide = &head->wide;
  args.norm = norm;
  const int64_t chunks = all_chunks(rows);
  if (chunks == 0) return launch_norm_of_nothing(args, stream);
  const NormLaunches launches(args, chunks, stream);
  adaptive ? launch_norm<true>(rows, launches) : launch_norm<false>(rows, launches);
}

// Bytes moved: 16 an element (read w and g, write w and backup). Launches: as the norm's. If
// memory runs out, nothing has been written; a launch that fails later is not undone.
void perturb(const Rows<3>& rows, const PerturbArgs& args, Stream stream) {
  const ClimbArgs climb{args.norm, args.eta, args.adaptive};
  apply_to_rows<Climb>(rows, climb, [&](const Row<3>& row) { return args.rho[row.index]; }, stream);
}

// Bytes moved: 8 an element. Launches: as the norm's.
void restore(const Rows<2>& rows, Stream stream) {
  for_each_launch<2, NoValue>(
      rows, [](const Row<2>&) { return NoValue{}; },
      [&](DType dtype, const auto& table) { launch_restore(size_of(dtype), table, stream); },
      [&](const auto& table) {
        launch(restore_strided_kernel, blocks_of(table), kThreads, stream, table);
      });
}

}  // namespace ksam::gpu
