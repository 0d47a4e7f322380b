// The largest or smallest elements of rows, in one pass: candidates go to shared memory, and a bound that rises as they
// come keeps all others out.
//
// Convention: LANES threads have a row: a warp, or the whole block. An element is known by a key of 64 bits, whose upper
// half orders values (more is earlier in the order that is asked for) and whose lower half is the complement of its
// column, so that no two are equal and of equal values the first comes first. NaN is the largest of numbers.
//
//   first chunk:  the COUNT-th largest of the maxima of groups of elements is a lower bound for what is wanted
//   every chunk:  elements that reach the bound become candidates; when there are many, the best stay and the bound rises
//   at the end:   the candidates' ranks are their places in the result
#pragma once
#include "tw/base.cuh"

namespace tw {

// Upper half of the key.
template <bool LARGEST> TW_INLINE u32 order_of(float x) {
  if (x != x) return LARGEST ? ~0u : 0u;
  // Both zeros are one.
  const u32 bits = __float_as_uint(x + 0.0f);
  const u32 up = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
  return LARGEST ? up : ~up;
}
// The one of two values that comes earlier in the order.
template <bool LARGEST> TW_INLINE float earlier(float a, float b) {
  float r;
  if constexpr (LARGEST) asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  else asm("min.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

template <typename T, bool LARGEST, int COUNT, int LANES, int THREADS, int VECTOR> struct TopK {
  static_assert(LANES == 32 || LANES == THREADS, "a row belongs to a warp or to the block");
  static constexpr int ROWS = THREADS / LANES;
  // Runs that a thread has of a chunk, elements of a round of one run a thread, and groups for the first bound.
  static constexpr int RUNS = VECTOR >= 4 ? 4 : 8, ROUND = LANES * VECTOR;
  static constexpr int wide(int x) { int p = 32; while (p < x) p *= 2; return p; }
  static constexpr int GROUPS = wide(2 * COUNT) < LANES * RUNS ? wide(2 * COUNT) : LANES * RUNS;
  // What is offered at once where many elements pass, in so many parts of a round.
  static constexpr int STEP = ROUND < 1024 ? ROUND : 1024, PARTS = ROUND / STEP;
  // Candidates that there is room for; more than MANY are sorted, fewer are counted.
  static constexpr int ROOM = wide(STEP + COUNT) < 512 ? 512 : wide(STEP + COUNT), MANY = 256;
  static_assert(GROUPS <= ROOM && COUNT <= ROOM, "room for groups and results");
  struct Shared { u64 at[ROWS][ROOM]; u64 best[ROWS][COUNT]; u64 bound[ROWS]; int count[ROWS]; };

  // The row of the block that this thread works on.
  static TW_INLINE int row_of() { return LANES == THREADS ? 0 : (int)threadIdx.x / LANES; }
  static TW_INLINE int me() { return (int)threadIdx.x % LANES; }
  static TW_INLINE void meet() {
    if constexpr (LANES == 32) __syncwarp();
    else __syncthreads();
  }
  static TW_INLINE u64 key(float x, int col) { return (u64)order_of<LARGEST>(x) << 32 | (u32)~col; }

  // The best of the `count` candidates go to `best`, in their order.
  static TW_INLINE void choose(u64* at, u64* best, int count) {
    for (int i = me(); i < COUNT; i += LANES) best[i] = 0;
    meet();
    if (count <= MANY) {
      for (int i = me(); i < count; i += LANES) {
        const u64 mine = at[i];
        int rank = 0;
        for (int j = 0; j < count; ++j) rank += at[j] > mine;
        if (rank < COUNT) best[rank] = mine;
      }
    } else {
      int size = MANY;
      while (size < count) size *= 2;
      for (int i = count + me(); i < size; i += LANES) at[i] = 0;
      meet();
      // Batcher's bitonic sort, the largest first.
      for (int k = 2; k <= size; k *= 2) {
        for (int j = k / 2; j > 0; j /= 2) {
          for (int p = me(); p < size / 2; p += LANES) {
            const int a = p / j * 2 * j + p % j, b = a + j;
            const u64 x = at[a], y = at[b];
            if ((x < y) == ((a & k) == 0)) at[a] = y, at[b] = x;
          }
          meet();
        }
      }
      for (int i = me(); i < COUNT; i += LANES) best[i] = at[i];
    }
    meet();
  }
  // The best stay, and what is not ahead of the last of them stays out from now on.
  static TW_INLINE u64 keep_best(Shared& s, int row, u64 bound) {
    u64* at = s.at[row];
    const int count = s.count[row];
    choose(at, s.best[row], count);
    for (int i = me(); i < COUNT; i += LANES) at[i] = s.best[row][i];
    const u64 last = s.best[row][COUNT - 1];
    if (me() == 0) s.count[row] = count < COUNT ? count : COUNT;
    meet();
    return count < COUNT ? bound : (last >> 32) + 1;
  }
  static TW_INLINE void offer(Shared& s, int row, u64 bound, const float (&x)[RUNS][VECTOR], const float (&most)[RUNS],
                              int r, int col, int n) {
    if (col < n && order_of<LARGEST>(most[r]) >= bound) {
      u32 passes = 0;
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) passes |= (col + k < n && order_of<LARGEST>(x[r][k]) >= bound ? 1u : 0u) << k;
      int slot = atomicAdd(&s.count[row], __popc(passes));
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        if ((passes >> k & 1u) != 0 && slot < ROOM) s.at[row][slot] = key(x[r][k], col + k);
        slot += passes >> k & 1u;
      }
    }
  }

  // The row of `n` elements at `x`, whose elements `load(col)` reads VECTOR at a time where any of them is there.
  // `inside`: this thread's row exists, and has at least COUNT elements. `get(col)` is one of them, and `put(i, col, value)`
  // takes result `i`.
  template <typename L, typename G, typename P>
  static TW_INLINE void row(Shared& s, bool inside, int n, L load, G get, P put) {
    const int row = row_of();
    if (!inside) n = 0;
    if (me() == 0) s.count[row] = 0, s.bound[row] = 0;
    u64 bound = 0;
    meet();
    for (int first = 0; first < n; first += ROUND * RUNS) {
      float x[RUNS][VECTOR], most[RUNS];
#pragma unroll
      for (int r = 0; r < RUNS; ++r) load(first + r * ROUND + me() * VECTOR, x[r]);
#pragma unroll
      for (int r = 0; r < RUNS; ++r) {
        most[r] = x[r][0];
        const int col = first + r * ROUND + me() * VECTOR;
#pragma unroll
        for (int k = 1; k < VECTOR; ++k) {
          if (col + k < n) most[r] = earlier<LARGEST>(most[r], x[r][k]);
        }
      }
      if (first == 0) {
        // Groups of runs with one place in all rounds, of one or several neighbours.
        constexpr int EACH = GROUPS > LANES ? GROUPS / LANES : 1, SIDE = GROUPS > LANES ? 1 : LANES / GROUPS;
        u32 top[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) top[e] = 0;
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
          const u32 here = r * ROUND + me() * VECTOR < n ? order_of<LARGEST>(most[r]) : 0u;
          top[r % EACH] = top[r % EACH] > here ? top[r % EACH] : here;
        }
#pragma unroll
        for (int d = 1; d < SIDE; d *= 2) {
          const u32 other = __shfl_xor_sync(~0u, top[0], d);
          top[0] = top[0] > other ? top[0] : other;
        }
        if (me() % SIDE == 0) {
#pragma unroll
          for (int e = 0; e < EACH; ++e) s.at[row][e * LANES + me() / SIDE] = (u64)top[e] << 32 | (u32)(e * LANES + me() / SIDE);
        }
        meet();
        for (int i = me(); i < GROUPS; i += LANES) {
          const u64 mine = s.at[row][i];
          int rank = 0;
#pragma unroll 8
          for (int j = 0; j < GROUPS; ++j) rank += s.at[row][j] > mine;
          if (rank == COUNT - 1) s.bound[row] = mine >> 32;
        }
        meet();
        if constexpr (GROUPS >= COUNT) bound = s.bound[row];
      }
      const int before = s.count[row];
      meet();
#pragma unroll
      for (int r = 0; r < RUNS; ++r) offer(s, row, bound, x, most, r, first + r * ROUND + me() * VECTOR, n);
      meet();
      if (s.count[row] > ROOM) {
        // Too many at once, as of equal elements: again, part by part.
        meet();
        if (me() == 0) s.count[row] = before;
        meet();
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
#pragma unroll 1
          for (int part = 0; part < PARTS; ++part) {
            if (s.count[row] > ROOM - STEP) bound = keep_best(s, row, bound);
            meet();
            if (me() / (LANES / PARTS) == part) offer(s, row, bound, x, most, r, first + r * ROUND + me() * VECTOR, n);
            meet();
          }
        }
      }
      if (first + ROUND * RUNS < n && s.count[row] > (COUNT < 64 ? 128 : 2 * COUNT)) bound = keep_best(s, row, bound);
      meet();
    }
    choose(s.at[row], s.best[row], s.count[row]);
    // All are read before any is written: results may lie over their rows.
    constexpr int EACH = (COUNT + LANES - 1) / LANES;
    T found[EACH];
    int place[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int i = e * LANES + me();
      if (inside && i < COUNT) place[e] = (int)~(u32)s.best[row][i], found[e] = get(place[e]);
    }
    meet();
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int i = e * LANES + me();
      if (inside && i < COUNT) put(i, place[e], found[e]);
    }
  }
};

}  // namespace tw
