// Rows and columns held by plain threads (LineSpread): reductions, positions of extremes, scans, transposed loads,
// random numbers, additions to memory, and combinations over the blocks of a cluster.
//
// Convention: S is a LineSpread; x[i] is register i of a tile; every thread of the block takes part. Sums of one row
// are kept in four chains and combined in one order, so the same schedule gives the same bits.
#pragma once
#include "tw/frag.cuh"
#include "tw/copy.cuh"
#include "tw/sync.cuh"

namespace tw {

// COUNT values `x(k)` combined in four chains.
template <int COUNT, typename X, typename F> TW_INLINE auto in_chains(X x, F combine) {
  constexpr int CHAINS = COUNT < 4 ? COUNT : 4;
  decltype(x(0)) c[CHAINS];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) c[k % CHAINS] = k < CHAINS ? x(k) : combine(c[k % CHAINS], x(k));
  if constexpr (CHAINS == 4) return combine(combine(c[0], c[1]), combine(c[2], c[3]));
  else if constexpr (CHAINS == 3) return combine(combine(c[0], c[1]), c[2]);
  else if constexpr (CHAINS == 2) return combine(c[0], c[1]);
  else return c[0];
}

// What this thread holds of its row j, and of its column j.
template <typename S, typename V, int N, typename F> TW_INLINE V fold_row(const V (&x)[N], int j, F combine) {
  return in_chains<S::EACH>([&](int k) { return x[j * S::EACH + k]; }, combine);
}
template <typename S, typename V, int N, typename F> TW_INLINE V fold_column(const V (&x)[N], int j, F combine) {
  return in_chains<S::PER_ROW>([&](int k) { return x[k * S::EACH + j]; }, combine);
}

// The sum of a thread's products `a(k) * b(k)`, by multiply-adds.
template <int COUNT, typename A, typename B> TW_INLINE float fold_products(A a, B b) {
  constexpr int CHAINS = COUNT < 4 ? COUNT : 4;
  float c[CHAINS];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) c[k % CHAINS] = k < CHAINS ? a(k) * b(k) : fmaf(a(k), b(k), c[k % CHAINS]);
  return in_chains<CHAINS>([&](int k) { return c[k]; }, [](float x, float y) { return x + y; });
}

// `load_words_if` of a stream, with lines of the second-level cache that go last. PTX ISA, "ld", "createpolicy".
template <typename T, int N> TW_INLINE RunWords<T, N> load_last_if(bool inside, const T* p, T fill) {
  if constexpr (sizeof(T) * N == 16) {
    RunWords<T, N> r;
#pragma unroll
    for (int i = 0; i < N; ++i) r.run.at[i] = fill;
    asm volatile(
        "{ .reg .pred q; .reg .b64 last; setp.ne.b32 q, %5, 0; createpolicy.fractional.L2::evict_last.b64 last, 1.0; "
        "@q ld.global.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], last; }"
        : "+r"(r.words[0]), "+r"(r.words[1]), "+r"(r.words[2]), "+r"(r.words[3]) : "l"(p), "r"((int)inside));
    return r;
  } else {
    return load_words_if<T, N>(inside, p, fill);
  }
}

// Two neighbours of bf16, from the word that they are in memory: the compiler, which cannot see through it, keeps that word until
// here, not the two.
TW_INLINE void unpack_again(float x, float y, float& to_x, float& to_y) {
  u32 word = __float_as_uint(x) >> 16 | (__float_as_uint(y) & 0xffff0000u);
  asm volatile("" : "+r"(word));
  to_x = __uint_as_float(word << 16), to_y = __uint_as_float(word & 0xffff0000u);
}

// Combines a row's values over its LANES threads. Rows of several warps go through `scratch` (one element a warp);
// FIRST: nobody has used it before.
template <int LANES, bool FIRST, typename T, typename F> TW_INLINE T across_row(T x, T* scratch, F combine) {
  if constexpr (LANES <= 32) {
    return across_lanes<LANES>(x, combine);
  } else {
    constexpr int WARPS = LANES / 32;
    x = across_lanes<32>(x, combine);
    const int w = (int)(threadIdx.x / 32u);
    if constexpr (!FIRST) __syncthreads();
    if (lane() == 0) scratch[w] = x;
    __syncthreads();
    const T* row = scratch + w / WARPS * WARPS;
    return in_chains<WARPS>([&](int k) { return row[k]; }, combine);
  }
}

// Combines a column's values over the threads that hold it: those with the same place along the row.
template <int LANES, int THREADS, typename T, typename F> TW_INLINE T across_column(T x, T* scratch, F combine) {
  constexpr int GROUP = LANES < 32 ? 32 : LANES, GROUPS = THREADS / GROUP;
#pragma unroll
  for (int d = LANES; d < 32; d *= 2) x = combine(x, __shfl_xor_sync(~0u, x, d));
  if constexpr (GROUPS > 1) {
    const int me = (int)threadIdx.x;
    __syncthreads();
    scratch[me] = x;
    __syncthreads();
    x = in_chains<GROUPS>([&](int k) { return scratch[k * GROUP + me % GROUP]; }, combine);
  }
  return x;
}

// A value and where it stands; `at` below zero is none.
template <typename V> struct Placed { V value; int at; };

// Whether `a` is more extreme than `b`; NaN is most extreme.
template <bool MAX, typename V> TW_INLINE bool beats(V a, V b) {
  if constexpr (V(0.5) != V(0)) {
    if (a != a || b != b) return a != a && b == b;
  }
  return MAX ? a > b : a < b;
}
template <bool MAX, bool LAST, typename V> TW_INLINE Placed<V> further(Placed<V> a, Placed<V> b) {
  if (a.at < 0 || b.at < 0) return a.at < 0 ? b : a;
  const bool tie = !beats<MAX>(a.value, b.value) && !beats<MAX>(b.value, a.value);
  const bool first = tie ? (a.at > b.at) == LAST : beats<MAX>(a.value, b.value);
  return first ? a : b;
}

// Position of the extreme of row j among the first `limit` columns.
template <typename S, bool MAX, bool LAST, typename V, int N>
TW_INLINE i64 arg_row(const V (&x)[N], int j, int limit, Placed<V>* scratch) {
  Placed<V> best{V(), -1};
#pragma unroll
  for (int k = 0; k < S::EACH; ++k) {
    const int at = S::col(k);
    best = further<MAX, LAST>(best, Placed<V>{x[j * S::EACH + k], at < limit ? at : -1});
  }
  constexpr int LANES = S::LANES_A_ROW, INNER = LANES < 32 ? LANES : 32;
#pragma unroll
  for (int d = INNER / 2; d > 0; d /= 2) {
    const Placed<V> other{(V)__shfl_xor_sync(~0u, best.value, d), __shfl_xor_sync(~0u, best.at, d)};
    best = further<MAX, LAST>(best, other);
  }
  if constexpr (LANES > 32) {
    constexpr int WARPS = LANES / 32;
    const int w = (int)(threadIdx.x / 32u);
    __syncthreads();
    if (lane() == 0) scratch[w] = best;
    __syncthreads();
    best = scratch[w / WARPS * WARPS];
#pragma unroll
    for (int k = 1; k < WARPS; ++k) best = further<MAX, LAST>(best, scratch[w / WARPS * WARPS + k]);
  }
  return best.at < 0 ? 0 : best.at;
}

// Running combination along every row, run by run. `scratch`: one element a warp.
template <typename S, bool EXCLUSIVE, bool REVERSE, typename V, int N, typename F>
TW_INLINE void scan_rows(const V (&x)[N], V (&out)[N], V identity, V* scratch, F combine) {
  constexpr int LANES = S::LANES_A_ROW, INNER = LANES < 32 ? LANES : 32, WARPS = LANES / 32;
  constexpr int RUN = S::RUN, RUNS = S::EACH / RUN;
  const int here = lane() % INNER, w = (int)(threadIdx.x / 32u);
#pragma unroll
  for (int j = 0; j < S::PER_ROW; ++j) {
    V carry = identity;
#pragma unroll
    for (int q = 0; q < RUNS; ++q) {
      const int first = j * S::EACH + (REVERSE ? RUNS - 1 - q : q) * RUN;
      V total = identity;
#pragma unroll
      for (int k = 0; k < RUN; ++k) total = combine(total, x[first + (REVERSE ? RUN - 1 - k : k)]);
      // What the threads up to here have, and what those before have.
      V upto = total;
#pragma unroll
      for (int d = 1; d < INNER; d *= 2) {
        const V other = REVERSE ? __shfl_down_sync(~0u, upto, d, INNER) : __shfl_up_sync(~0u, upto, d, INNER);
        if (REVERSE ? here + d < INNER : here >= d) upto = combine(other, upto);
      }
      V before = REVERSE ? __shfl_down_sync(~0u, upto, 1, INNER) : __shfl_up_sync(~0u, upto, 1, INNER);
      if (here == (REVERSE ? INNER - 1 : 0)) before = identity;
      V all = __shfl_sync(~0u, upto, REVERSE ? 0 : INNER - 1, INNER);
      if constexpr (WARPS > 1) {
        __syncthreads();
        if (lane() == 0) scratch[w] = all;
        __syncthreads();
        V warps_before = identity;
        all = identity;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) {
          const int other = REVERSE ? WARPS - 1 - k : k;
          if (other == w % WARPS) warps_before = all;
          all = combine(all, scratch[w / WARPS * WARPS + other]);
        }
        before = combine(warps_before, before);
      }
      V running = combine(carry, before);
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
        const int i = first + (REVERSE ? RUN - 1 - k : k);
        const V next = combine(running, x[i]);
        out[i] = EXCLUSIVE ? running : next;
        running = next;
      }
      carry = combine(carry, all);
    }
  }
}

// Shelves: tiles in shared memory of which each thread has for itself what it would have in registers. Unit i / VECTOR
// of a slot lies beside those of the other threads, so that a warp's accesses meet no bank twice.
template <typename S, typename T, int VECTOR> TW_INLINE smem_t on_shelf(smem_t shelf, int slot, int i) {
  constexpr int UNITS = S::TILE / VECTOR, THREADS = S::LINES * S::LANES_A_ROW;
  return shelf + (u32)(((slot * UNITS + i / VECTOR) * THREADS + S::me()) * VECTOR * (int)sizeof(T));
}
template <typename T, int VECTOR> TW_INLINE void fetch_run(smem_t to, const T* from, bool inside, T fill) {
  constexpr int BYTES = VECTOR * (int)sizeof(T);
  if constexpr (BYTES >= 4) {
    if (inside) return copy_async<BYTES>(to, from, BYTES);
  } else {
    if (inside) fill = *from;
  }
  Run<T, VECTOR> run;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) run.at[k] = fill;
  smem_store_run<T, VECTOR>(to, run);
}
// The elements of a run that a line of `extent` elements has, of which the first would be element `at`, and `fill`.
template <typename T, int VECTOR> TW_INLINE void fetch_edge(smem_t to, const T* from, int at, int extent, T fill) {
  RunWords<T, VECTOR> run;
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) run.run.at[k] = fill;
  load_edge<T, VECTOR>(run, from, at, extent);
  smem_store_run<T, VECTOR>(to, run.run);
}
// Whole words come as words: a run of narrower elements would be taken apart and put together again.
template <typename T, int VECTOR> TW_INLINE RunWords<T, VECTOR> recall_run(smem_t at) {
  RunWords<T, VECTOR> r;
  constexpr int BYTES = VECTOR * (int)sizeof(T);
  if constexpr (BYTES == 16) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3]) : "r"(at) : "memory");
  } else if constexpr (BYTES == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "r"(at) : "memory");
  } else if constexpr (BYTES == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r.words[0]) : "r"(at) : "memory");
  } else {
    r.run = smem_load_run<T, VECTOR>(at);
  }
  return r;
}

// Transposed loads: runs of UNIT neighbouring rows (16 bytes of T) go to shared memory as they come, one line per
// column, and are read element by element. The units of a line are exchanged by the column's run of VECTOR columns,
// so that threads whose columns are VECTOR apart meet in different banks.
template <typename T, int ROWS, int VECTOR> TW_INLINE u32 turned_at(int row, int col) {
  constexpr int UNIT = 16 / (int)sizeof(T), UNITS = ROWS / UNIT, SWAPS = UNITS < 8 ? UNITS : 8;
  static_assert(ROWS % UNIT == 0 && (UNITS & (UNITS - 1)) == 0, "lines of a power of two of units");
  const u32 r = (u32)row, c = (u32)col, unit = (r / UNIT) ^ (c / VECTOR % SWAPS);
  return (c * ROWS + unit * UNIT + r % UNIT) * (u32)sizeof(T);
}

// A tile into `scratch`, a unit of UNIT rows at a time.
template <typename T, int ROWS, int COLS, int VECTOR, int THREADS> struct Turned {
  static constexpr int UNIT = 16 / (int)sizeof(T), TOTAL = ROWS * COLS / UNIT, EACH = (TOTAL + THREADS - 1) / THREADS;
  static TW_INLINE bool has(int u) { return TOTAL % THREADS == 0 || index(u) < (u32)TOTAL; }
  static TW_INLINE u32 index(int u) { return (u32)(u * THREADS) + threadIdx.x; }
  static TW_INLINE int row(int u) { return (int)(index(u) % (u32)(ROWS / UNIT)) * UNIT; }
  static TW_INLINE int col(int u) { return (int)(index(u) / (u32)(ROWS / UNIT)); }
  static TW_INLINE void put(unsigned char* scratch, const Run<T, UNIT> (&units)[EACH]) {
    __syncthreads();
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      if (has(u)) *reinterpret_cast<Run<T, UNIT>*>(scratch + turned_at<T, ROWS, VECTOR>(row(u), col(u))) = units[u];
    }
    __syncthreads();
  }
  // `place(row, col, inside)` is the address of an element whose RUN neighbours are rows.
  template <int RUN, typename P> static TW_INLINE void turn_in_runs(unsigned char* scratch, T fill, P place) {
    Run<T, UNIT> units[EACH];
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      bool first;
      const T* const from = place(row(u), col(u), first);
#pragma unroll
      for (int k = 0; k < UNIT; k += RUN) {
        bool inside;
        place(row(u) + k, col(u), inside);
        const Run<T, RUN> run = load_run_if<T, RUN>(inside && has(u), from + k, fill);
#pragma unroll
        for (int m = 0; m < RUN; ++m) units[u].at[k + m] = run.at[m];
      }
    }
    put(scratch, units);
  }
};
template <typename T, int ROWS, int VECTOR> TW_INLINE T turned(const unsigned char* scratch, int row, int col) {
  return *reinterpret_cast<const T*>(scratch + turned_at<T, ROWS, VECTOR>(row, col));
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
struct Words { u32 at[4]; };
TW_INLINE Words philox(u64 counter, u64 seed) {
  u32 a = (u32)counter, b = (u32)(counter >> 32), c = 0, d = 0, k = (u32)seed, l = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 x = (u64)0xD2511F53u * a, y = (u64)0xCD9E8D57u * c;
    a = (u32)(y >> 32) ^ b ^ k, b = (u32)y, c = (u32)(x >> 32) ^ d ^ l, d = (u32)x;
    k += 0x9E3779B9u, l += 0xBB67AE85u;
  }
  return Words{{a, b, c, d}};
}
// A number in [0, 1) of the top BITS bits of a word.
template <int BITS> TW_INLINE float uniform(u32 word) {
  return (float)(word >> (32 - BITS)) * __uint_as_float((u32)(127 - BITS) << 23);
}
template <int BITS> TW_INLINE float uniform_at(u64 counter, u64 seed) {
  const Words w = philox(counter / 4, seed);
  const u32 k = (u32)counter & 3u;
  return uniform<BITS>(k == 0 ? w.at[0] : k == 1 ? w.at[1] : k == 2 ? w.at[2] : w.at[3]);
}
TW_INLINE double uniform_double_at(u64 counter, u64 seed) {
  const Words w = philox(counter / 2, seed);
  const bool odd = (counter & 1) != 0;
  const u64 wide = (u64)(odd ? w.at[2] : w.at[0]) << 32 | (odd ? w.at[3] : w.at[1]);
  return (double)(wide >> 11) * 1.1102230246251565e-16;
}

// Indivisible additions. PTX ISA, "red".
TW_INLINE void add_to(float* p, float x) { atomicAdd(p, x); }
TW_INLINE void add_to(double* p, double x) { atomicAdd(p, x); }
TW_INLINE void add_to(int* p, int x) { atomicAdd(p, x); }
TW_INLINE void add_to(u32* p, u32 x) { atomicAdd(p, x); }
TW_INLINE void add_to(u64* p, u64 x) { atomicAdd(p, x); }
TW_INLINE void add_to(i64* p, i64 x) { atomicAdd(reinterpret_cast<u64*>(p), (u64)x); }
TW_INLINE void add_to(f16* p, float x) {
  const f16 v = narrow_to<f16>::from(x);
  asm volatile("red.global.add.noftz.f16 [%0], %1;" ::"l"(p), "h"(v.bits) : "memory");
}
#if __CUDA_ARCH__ >= 900
TW_INLINE void add_to(bf16* p, float x) {
  const bf16 v = narrow_to<bf16>::from(x);
  asm volatile("red.global.add.noftz.bf16 [%0], %1;" ::"l"(p), "h"(v.bits) : "memory");
}

// Combinations over the blocks of a cluster, in the order of their indices. Every block sends its values to all
// blocks of the cluster, and a barrier of each counts the bytes that come: no fence of the device is needed. PTX ISA,
// "st.async", "mapa". `exchange_begin` once per exchange by one thread before all blocks meet.
template <int COUNT, int BYTES> TW_INLINE void exchange_begin(u64* barrier) {
  mbarrier_init(smem_address(barrier), 1);
  mbarrier_expect_bytes(smem_address(barrier), COUNT * BYTES);
}
template <typename T> TW_INLINE void send_to_block(T* to, u64* barrier, u32 block, T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "values of 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "{ .reg .b32 at, bar; mapa.shared::cluster.u32 at, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], %3, [bar]; }" ::"r"(smem_address(to)),
        "r"(smem_address(barrier)), "r"(block), "r"(*reinterpret_cast<const u32*>(&x)) : "memory");
  } else {
    asm volatile(
        "{ .reg .b32 at, bar; mapa.shared::cluster.u32 at, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [at], %3, [bar]; }" ::"r"(smem_address(to)),
        "r"(smem_address(barrier)), "r"(block), "l"(*reinterpret_cast<const u64*>(&x)) : "memory");
  }
}
// `all`: BLOCKS times what the tile has of rows (BY_ROW) or columns. AGAIN: an exchange of a loop over items. It takes
// two such places in turns, and `phase` is the parity of the turn: who is two turns ahead has had the values that every
// thread here sends after it has read those of this turn.
template <typename S, bool BY_ROW, int COUNT, int BLOCKS, bool AGAIN = false, typename V, int N, typename F>
TW_INLINE void across_cluster(V (&x)[N], V* all, u64* barrier, F combine, u32 phase = 0) {
  const u32 me = cluster_cta();
  const int mine = BY_ROW ? S::me() % S::LANES_A_ROW : S::row0(), step = BY_ROW ? S::LANES_A_ROW : S::LINES;
  V* here = AGAIN ? all + phase * (u32)(COUNT * BLOCKS) : all;
  for (int b = mine; b < BLOCKS; b += step) {
#pragma unroll
    for (int j = 0; j < N; ++j) send_to_block(here + me * COUNT + (BY_ROW ? S::row_of(j) : S::col_of(j)), barrier, (u32)b, x[j]);
  }
  mbarrier_wait(smem_address(barrier), phase);
  if (AGAIN && threadIdx.x == 0) mbarrier_expect_bytes(smem_address(barrier), COUNT * BLOCKS * (int)sizeof(V));
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x[j] = in_chains<BLOCKS>([&](int b) { return here[b * COUNT + (BY_ROW ? S::row_of(j) : S::col_of(j))]; }, combine);
  }
}
#endif

}  // namespace tw
