// Rotary position embedding by halves: pairs are (x[j], x[j + D/2]).
//
// A thread turns eight pairs. `x` may have its axes in any order but the last, which is innermost; `y` is row-major.
// `TW_ELEMENT`: the type of x and y; `TW_TABLE`: that of the tables (0 float, 1 bfloat16, 2 half, 3 double). `TW_BACK`: 1 turns back.
#include "tw/element.cuh"

using namespace tw;

#if TW_TABLE == 0
using Table = float;
#elif TW_TABLE == 1
using Table = bf16;
#elif TW_TABLE == 2
using Table = f16;
#else
using Table = double;
#endif

constexpr int THREADS = 256;
// Blocks that a multiprocessor should hold at least. Said, since the compiler otherwise saves a register too many and spills.
constexpr int BLOCKS = TW_ELEMENT == 3 ? 2 : 4;

template <typename T> struct alignas(16) Eight { T at[8]; };

template <typename T> TW_INLINE Eight<T> eight(const T* from) { return *reinterpret_cast<const Eight<T>*>(from); }

// `packs` is the number of threads with work: B * H * S * half / 8. A table has the rows of one sample (`shared`) or of each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
rotary(const Element* x, const Table* cosines, const Table* sines, Element* y, u32 packs, u32 heads, u32 length, u32 half, i64 along_batch,
       i64 along_heads, i64 along_length, u32 shared) {
  const u32 pack = blockIdx.x * THREADS + threadIdx.x;
  if (pack >= packs) return;
  const u32 across = half / 8;
  const u32 row = pack / across, j = (pack - row * across) * 8;
  const u32 plane = row / length, at = row - plane * length;
  const u32 batch = plane / heads, head = plane - batch * heads;
  const Element* from = x + batch * along_batch + head * along_heads + at * along_length + j;
  const i64 table = ((i64)(shared ? 0 : batch) * length + at) * (2 * half) + j;
  const Eight<Element> a = eight(from), b = eight(from + half);
  const Eight<Table> c0 = eight(cosines + table), c1 = eight(cosines + table + half);
  const Eight<Table> s0 = eight(sines + table), s1 = eight(sines + table + half);
  Eight<Element> low, high;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const Wide p = (Wide)wide_of(a.at[k]), q = (Wide)wide_of(b.at[k]);
    const Wide u = p * (Wide)wide_of(c0.at[k]), v = q * (Wide)wide_of(c1.at[k]);
    const Wide s = (Wide)wide_of(s0.at[k]), t = (Wide)wide_of(s1.at[k]);
    low.at[k] = Rounded<Element>::of(TW_BACK ? u + q * t : u - q * s);
    high.at[k] = Rounded<Element>::of(TW_BACK ? v - p * s : v + p * t);
  }
  Element* into = y + (i64)row * (2 * half) + j;
  *reinterpret_cast<Eight<Element>*>(into) = low;
  *reinterpret_cast<Eight<Element>*>(into + half) = high;
}
