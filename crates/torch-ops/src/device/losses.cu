// The sum or mean of the losses of rows, and what their gradients are multiplied by for it.
//
// A row counts where its target is not `ignored`; the loss of one that does not is 0. Up to a stretch of rows is one block's work. More are
// looked at in parts, a block each, whose counts (`counts`) and sums (`sums`) the next kernel adds up: `parts` is how many there are, or 0.
// Every sum has one order. `TW_ELEMENT` is the type of losses and factors.
#include "tw/element.cuh"

using namespace tw;

constexpr int THREADS = 1024;

// The sum over the block, in each thread.
template <typename T> TW_INLINE T over_block(T x) {
  __shared__ T of_warps[THREADS / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  __syncthreads();
  if (lane() == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[lane()];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

TW_INLINE i64 counted(const i64* targets, i64 begin, i64 end, i64 ignored) {
  i64 count = 0;
#pragma unroll 4
  for (i64 i = begin + threadIdx.x; i < end; i += THREADS) count += targets[i] != ignored;
  return over_block(count);
}

template <typename T, typename From> TW_INLINE T added(const From* from, i64 begin, i64 end) {
  T sum = 0;
#pragma unroll 4
  for (i64 i = begin + threadIdx.x; i < end; i += THREADS) sum += (T)from[i];
  return over_block(sum);
}

// How many rows count in each part.
extern "C" __global__ void __launch_bounds__(THREADS) count_parts(const i64* targets, i64 rows, i64 stretch, i64 ignored, i64* counts) {
  begin_behind_others();
  const i64 begin = (i64)blockIdx.x * stretch, end = begin + stretch < rows ? begin + stretch : rows;
  const i64 count = counted(targets, begin, end, ignored);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// What the gradient of each row is multiplied by: 1 for a sum, the reciprocal of the count for a mean. Where no row counts, none is multiplied.
extern "C" __global__ void __launch_bounds__(THREADS)
divide(const i64* targets, i64 rows, i64 stretch, i64 ignored, const i64* counts, i64 parts, int mean, Wide* factors) {
  begin_behind_others();
  Wide factor = 1;
  if (mean) {
    const i64 count = parts ? added<i64>(counts, 0, parts) : counted(targets, 0, rows, ignored);
    if (count > 0) factor = (Wide)1 / (Wide)count;
  }
  const i64 begin = (i64)blockIdx.x * stretch, end = begin + stretch < rows ? begin + stretch : rows;
  for (i64 i = begin + threadIdx.x; i < end; i += THREADS) factors[i] = factor;
}

// The sum of the losses of each part, and how many rows of it count.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_parts(const Wide* losses, const i64* targets, i64 rows, i64 stretch, i64 ignored, double* sums, i64* counts) {
  begin_behind_others();
  const i64 begin = (i64)blockIdx.x * stretch, end = begin + stretch < rows ? begin + stretch : rows;
  const double sum = added<double>(losses, begin, end);
  const i64 count = counted(targets, begin, end, ignored);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum, counts[blockIdx.x] = count;
}

// The sum of all losses, or their mean: no number where no row counts.
extern "C" __global__ void __launch_bounds__(THREADS)
total(const Wide* losses, const i64* targets, i64 rows, i64 ignored, const double* sums, const i64* counts, i64 parts, int mean, Wide* result) {
  begin_behind_others();
  double sum = parts ? added<double>(sums, 0, parts) : added<double>(losses, 0, rows);
  if (mean) sum /= (double)(parts ? added<i64>(counts, 0, parts) : counted(targets, 0, rows, ignored));
  if (threadIdx.x == 0) *result = (Wide)sum;
}
