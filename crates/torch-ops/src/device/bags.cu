// Sums, means and maxima of bags of rows of a table, and the gradients of the table and of the weights of the rows.
//
// Bag b has the positions offsets[b] to offsets[b + 1] - 1 of `indices` (the last one up to `positions`). A row that is `padding` does
// not count; one outside of the table makes its bag NaN, since kernels raise no errors. `MODE`: 0 sum, 1 mean, 2 max.
// Every sum has one order. `TW_MODE` and `TW_ELEMENT` are given; with `TW_SHORT`, whole numbers have 32 bits.
#include "tw/element.cuh"

using namespace tw;

#ifdef TW_SHORT
using Index = int;
#else
using Index = i64;
#endif

constexpr int WARPS = 8;

// A warp does a bag. `count[b]` is how many rows counted; `place[b, d]` is where a maximum came from (or -1). All three lists may be left out.
// Bags follow each other, whatever the offsets are, so each position from the first offset on is in one; those before are said to be in the first.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
forward(const Element* table, const Index* indices, const Index* offsets, const Element* weights, Element* y, Index* bag_of, Index* count,
        Index* place, i64 rows, i64 columns, i64 positions, i64 bags, i64 padding) {
  begin_behind_others();
  const i64 bag = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (bag >= bags) return;
  i64 begin = offsets[bag], end = bag + 1 < bags ? offsets[bag + 1] : positions;
  // Wrong offsets touch nothing that is not there.
  begin = begin < 0 ? 0 : begin, end = end > positions ? positions : end;
  i64 counted = 0;
  if (bag == 0 && bag_of != nullptr)
    for (i64 p = lane(); p < begin && p < positions; p += 32) bag_of[p] = 0;
  for (i64 p = begin + lane(); p < end; p += 32) {
    if (bag_of != nullptr) bag_of[p] = (Index)bag;
    counted += indices[p] != padding;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) counted += __shfl_xor_sync(~0u, counted, distance);
  if (lane() == 0 && count != nullptr) count[bag] = (Index)counted;
  const bool vector = columns % 4 == 0;
  for (i64 d = lane() * 4; d < columns; d += 128) {
    Wide sum[4] = {0, 0, 0, 0};
    i64 from[4] = {-1, -1, -1, -1};
    for (i64 p = begin; p < end; ++p) {
      const i64 row = indices[p];
      if (row == padding) continue;
      if (row < 0 || row >= rows) {
        for (int k = 0; k < 4; ++k) sum[k] = (Wide)__int_as_float(0x7fffffff), from[k] = -1;
        break;
      }
      const Four<Element> x = load_four(table + row * columns, d, columns, vector);
      const Wide weight = weights == nullptr ? (Wide)1 : (Wide)wide_of(weights[p]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Wide value = (Wide)wide_of(x.at[k]);
        if (TW_MODE != 2) {
          sum[k] += value * weight;
        } else if (from[k] < 0 || value > sum[k] || value != value) {
          sum[k] = value, from[k] = p;
        }
      }
    }
    Four<Element> out;
    const Wide scale = TW_MODE == 1 && counted > 0 ? (Wide)1 / (Wide)counted : (Wide)1;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out.at[k] = Rounded<Element>::of(sum[k] * scale);
      if (TW_MODE == 2 && place != nullptr && d + k < columns) place[bag * columns + d + k] = (Index)from[k];
    }
    store_four(y + bag * columns, d, columns, vector, out);
  }
}

// The gradient of the table, which is zero before. `sorted` are the indices in order and `position` where they were. The warp at
// the start of a run of one row sums the run.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
table_gradient(const Element* dy, const Index* sorted, const Index* position, const Element* weights, const Index* bag_of, const Index* count,
               const Index* place, Element* gradient, i64 rows, i64 columns, i64 positions, i64 padding) {
  begin_behind_others();
  const i64 start = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (start >= positions) return;
  const i64 row = sorted[start];
  if (row == padding || row < 0 || row >= rows || (start > 0 && sorted[start - 1] == row)) return;
  const bool vector = columns % 4 == 0;
  for (i64 d = lane() * 4; d < columns; d += 128) {
    Wide sum[4] = {0, 0, 0, 0};
    for (i64 q = start; q < positions && sorted[q] == row; ++q) {
      const i64 p = position[q], bag = bag_of[p];
      Wide by = weights == nullptr ? (Wide)1 : (Wide)wide_of(weights[p]);
      if (TW_MODE == 1) by /= (Wide)count[bag];
      const Four<Element> g = load_four(dy + bag * columns, d, columns, vector);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (TW_MODE != 2 || (d + k < columns && place[bag * columns + d + k] == p)) sum[k] += (Wide)wide_of(g.at[k]) * by;
    }
    Four<Element> out;
#pragma unroll
    for (int k = 0; k < 4; ++k) out.at[k] = Rounded<Element>::of(sum[k]);
    store_four(gradient + row * columns, d, columns, vector, out);
  }
}

// The gradient of the weights of rows (sums only): a warp does a position.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
weight_gradient(const Element* dy, const Element* table, const Index* indices, const Index* bag_of, Element* gradient, i64 rows, i64 columns,
                i64 positions, i64 padding) {
  begin_behind_others();
  const i64 p = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (p >= positions) return;
  const i64 row = indices[p];
  Wide sum = 0;
  if (row != padding && row >= 0 && row < rows)
    for (i64 d = lane(); d < columns; d += 32)
      sum += (Wide)wide_of(table[row * columns + d]) * (Wide)wide_of(dy[bag_of[p] * columns + d]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
  if (lane() == 0) gradient[p] = Rounded<Element>::of(sum);
}
