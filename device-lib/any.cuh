// Runs of neighbouring elements that start anywhere: whole aligned units are moved, and shifted in registers.
//
// Convention: a run has N elements, 4, 8 or 16 bytes; `count` of them are there (none when it is not positive, all from
// N on). A unit is read when it holds at least one element that is there: so the units at the ends of a tensor are read
// whole, and no others.
#pragma once
#include "tw/base.cuh"

namespace tw {

template <int WORDS, bool KEPT> TW_INLINE void load_unit_if(bool inside, const char* p, u32* w) {
  if constexpr (WORDS == 4 && KEPT) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]) : "l"(p), "r"((int)inside));
  } else if constexpr (WORDS == 4) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q ld.global.L1::evict_first.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]) : "l"(p), "r"((int)inside));
  } else if constexpr (WORDS == 2) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %3, 0; @q ld.global.v2.b32 {%0, %1}, [%2]; }"
                 : "+r"(w[0]), "+r"(w[1]) : "l"(p), "r"((int)inside));
  } else {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q ld.global.b32 %0, [%1]; }"
                 : "+r"(w[0]) : "l"(p), "r"((int)inside));
  }
}

// Two units side by side, of which the run is a window that starts `shift` bytes in. SIZE: bytes of an element.
template <int WORDS, int SIZE> TW_INLINE void window(const u32 (&two)[2 * WORDS], u32 shift, u32 (&out)[WORDS]) {
  u32 x[WORDS + 3];
#pragma unroll
  for (int i = 0; i < WORDS + 3; ++i) x[i] = i < 2 * WORDS ? two[i] : 0u;
  if constexpr (WORDS >= 4) {
    const bool far = (shift & 8u) != 0;
#pragma unroll
    for (int i = 0; i < WORDS + 2; ++i) x[i] = far ? (i + 2 < 2 * WORDS ? two[i + 2] : 0u) : two[i];
  }
  if constexpr (WORDS >= 2) {
    const bool far = (shift & 4u) != 0;
#pragma unroll
    for (int i = 0; i < WORDS + 1; ++i) x[i] = far ? x[i + 1] : x[i];
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i) out[i] = SIZE >= 4 ? x[i] : __funnelshift_r(x[i], x[i + 1], (shift & 3u) * 8u);
}

// ALIGNED: the run starts at a multiple of its length.
template <typename T, int N, bool ALIGNED, bool KEPT> TW_INLINE RunWords<T, N> load_any(int count, const T* p, T fill) {
  constexpr int SIZE = (int)sizeof(T), BYTES = SIZE * N, WORDS = BYTES / 4;
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "no access of this width");
  const int bytes = (count < N ? count : N) * SIZE;
  RunWords<T, N> r;
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) r.words[i] = 0;
    load_unit_if<WORDS, KEPT>(bytes > 0, reinterpret_cast<const char*>(p), r.words);
  } else {
    const u32 shift = (u32)reinterpret_cast<u64>(p) & (u32)(BYTES - 1);
    const char* unit = reinterpret_cast<const char*>(p) - shift;
    u32 two[2 * WORDS];
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) two[i] = 0;
    load_unit_if<WORDS, KEPT>(bytes > 0, unit, two);
    load_unit_if<WORDS, KEPT>((int)shift + bytes > BYTES && bytes > 0, unit + BYTES, two + WORDS);
    u32 out[WORDS];
    window<WORDS, SIZE>(two, shift, out);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) r.words[i] = out[i];
  }
  if (count < N) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k >= count) r.run.at[k] = fill;
    }
  }
  return r;
}

// The elements of an aligned unit whose bytes lie in [from, to).
template <typename T, int N> TW_INLINE void store_part(char* unit, const u32* words, int from, int to) {
  constexpr int SIZE = (int)sizeof(T);
  RunWords<T, N> r;
#pragma unroll
  for (int i = 0; i < SIZE * N / 4; ++i) r.words[i] = words[i];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k * SIZE >= from && (k + 1) * SIZE <= to) reinterpret_cast<T*>(unit)[k] = r.run.at[k];
  }
}

// Writes runs that neighbouring threads hold of one line: thread g of GROUP (a power of two, within a warp) has run
// number g of every GROUP, and `before` is its run of the GROUP before. Each thread writes the unit that its run begins
// in, with the end of the run before it, which comes from its neighbour. `first` and `last`: of its groups of the line.
// JOINED: one group follows the other in the line, with none of another warp between. All threads of the warp take part.
template <typename T, int N, int GROUP, bool JOINED>
TW_INLINE void store_any(int count, T* p, const RunWords<T, N>& own, const RunWords<T, N>& before, bool first, bool last) {
  constexpr int SIZE = (int)sizeof(T), BYTES = SIZE * N, WORDS = BYTES / 4;
  const int g = lane() % GROUP;
  const u32 shift = (u32)reinterpret_cast<u64>(p) & (u32)(BYTES - 1);
  char* unit = reinterpret_cast<char*>(p) - shift;
  const int bytes = (count < N ? count : N) * SIZE;
  u32 two[2 * WORDS], whole[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const u32 sent = JOINED && !first && g == GROUP - 1 ? before.words[i] : own.words[i];
    two[i] = GROUP == 1 ? sent : __shfl_sync(~0u, sent, (g + GROUP - 1) % GROUP, GROUP);
    two[WORDS + i] = own.words[i];
  }
  const bool follows = g > 0 || (JOINED && !first);
  if (bytes <= 0) return;
  // The unit before the run's own, where it starts at a unit.
  if (shift == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) whole[i] = own.words[i];
  } else {
    window<WORDS, SIZE>(two, (u32)BYTES - shift, whole);
  }
  const int from = follows ? 0 : (int)shift, to = (int)shift + bytes < BYTES ? (int)shift + bytes : BYTES;
  if (from == 0 && to == BYTES) {
    Run<u32, WORDS> run;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) run.at[i] = whole[i];
    *reinterpret_cast<Run<u32, WORDS>*>(unit) = run;
  } else {
    store_part<T, N>(unit, whole, from, to);
  }
  // What is left of the run, when nobody has the next one.
  const bool alone = count <= N || (g == GROUP - 1 && (last || !JOINED));
  if (alone && (int)shift + bytes > BYTES) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) two[i] = own.words[i], two[WORDS + i] = 0;
    window<WORDS, SIZE>(two, (u32)BYTES - shift, whole);
    store_part<T, N>(unit + BYTES, whole, 0, (int)shift + bytes - BYTES);
  }
}

}  // namespace tw
