// Rotary position embedding by halves: pairs are (x[j], x[j + D/2]).
//
// A thread turns eight pairs of each of `TW_HEADS` neighbouring heads, which share what it reads of the tables. `x` may have its axes in
// any order but the last, which is innermost; `y` is row-major.
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

constexpr int THREADS = 128;
// Blocks that a multiprocessor should hold at least. Said, since the compiler otherwise saves a register too many and spills.
constexpr int BLOCKS = TW_ELEMENT == 3 ? 4 : TW_HEADS == 1 ? 8 : TW_ELEMENT == 0 ? 6 : 7;

// Eight neighbours in units of 16 bytes. What is KEPT is read again by other threads.
template <typename T> struct Eight {
  static constexpr int UNIT = 16 / (int)sizeof(T), UNITS = 8 / UNIT;
  RunWords<T, UNIT> units[UNITS];
  template <bool KEPT> TW_INLINE void load(const T* from) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) units[u] = load_words_if<T, UNIT, KEPT>(true, from + u * UNIT, T{});
  }
  TW_INLINE void store(T* to) const {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) store_run_if<T, UNIT>(true, to + u * UNIT, units[u]);
  }
  TW_INLINE Wide at(int k) const { return (Wide)widen_at(units[k / UNIT], k % UNIT); }
  // Elements k and k + 1.
  TW_INLINE void set(int k, Wide x, Wide y) {
    set_pair<T, UNIT>(units[k / UNIT], k % UNIT, (value<T>)x, (value<T>)y);
  }
};

// `packs` is the number of threads with work: B * H / TW_HEADS * S * half / 8. A table has the rows of one sample (`shared`) or of each.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
rotary(const Element* x, const Table* cosines, const Table* sines, Element* y, u32 packs, u32 heads, u32 length, u32 half, i64 along_batch,
       i64 along_heads, i64 along_length, u32 shared) {
  begin_behind_others();
  const u32 pack = blockIdx.x * THREADS + threadIdx.x;
  if (pack >= packs) return;
  const u32 across = half / 8, groups = heads / TW_HEADS;
  const u32 row = pack / across, j = (pack - row * across) * 8;
  const u32 plane = row / length, at = row - plane * length;
  const u32 batch = plane / groups, head = (plane - batch * groups) * TW_HEADS;
  const Element* from = x + batch * along_batch + head * along_heads + at * along_length + j;
  const i64 table = ((i64)(shared ? 0 : batch) * length + at) * (2 * half) + j;
  Eight<Element> a[TW_HEADS], b[TW_HEADS];
#pragma unroll
  for (int h = 0; h < TW_HEADS; ++h) {
    a[h].template load<false>(from + h * along_heads);
    b[h].template load<false>(from + h * along_heads + half);
  }
  Eight<Table> c0, c1, s0, s1;
  c0.template load<true>(cosines + table), c1.template load<true>(cosines + table + half);
  s0.template load<true>(sines + table), s1.template load<true>(sines + table + half);
#pragma unroll
  for (int h = 0; h < TW_HEADS; ++h) {
    Eight<Element> low, high;
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      Wide l[2], u[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const Wide p = a[h].at(k + m), q = b[h].at(k + m);
        const Wide v = p * c0.at(k + m), w = q * c1.at(k + m), s = s0.at(k + m), t = s1.at(k + m);
        l[m] = TW_BACK ? v + q * t : v - q * s;
        u[m] = TW_BACK ? w - p * s : w + p * t;
      }
      low.set(k, l[0], l[1]), high.set(k, u[0], u[1]);
    }
    Element* into = y + ((i64)(batch * heads + head + h) * length + at) * (2 * half) + j;
    low.store(into), high.store(into + half);
  }
}
