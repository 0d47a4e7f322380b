// Tiles in registers and their way to shared and global memory.
//
// A fragment is an array of registers per thread; a spread says which element each register holds. Each
// spread has `row(i)` and `col(i)` for the tile's registers, and `per_row(i)`, `per_col(i)`: which register of
// a row or column vector goes with register i of the tile.
#pragma once
#include "tw/base.cuh"

namespace tw {

// Byte offset in a swizzled panel: units of 16 bytes are permuted within a span by the line's number
// (PTX ISA, "Swizzling modes"). Panels start at multiples of 1024 bytes.
template <int SPAN> TW_INLINE u32 swizzle(u32 offset) { return offset ^ ((offset >> 3) & (u32)(SPAN - 16)); }

// Address of an element: `line` counts along the strided axis, `along` along the contiguous one.
template <int ELEMENT, int SPAN, int LINES> TW_INLINE smem_t smem_at(smem_t tile, int line, int along) {
  const u32 byte = (u32)(along * ELEMENT);
  return tile + (byte / SPAN) * (u32)(LINES * SPAN) + swizzle<SPAN>((u32)line * SPAN + byte % SPAN);
}

// Accumulators of wgmma (PTX ISA, "Register fragments for wgmma.mma_async"): warp w of the warpgroup holds
// rows 16w..16w+15 of every block of 64.
template <int ROWS, int COLS> struct WgmmaSpread {
  static constexpr int BLOCKS = ROWS / 64, BLOCK = COLS / 2;
  static constexpr int TILE = BLOCKS * BLOCK, PER_ROW = BLOCKS * 2, PER_COL = COLS / 4;
  static TW_INLINE int row0() { return (int)((threadIdx.x >> 5) & 3u) * 16 + lane() / 4; }
  static TW_INLINE int col0() { return lane() % 4 * 2; }
  static TW_INLINE int row(int i) { return i / BLOCK * 64 + row0() + i % 4 / 2 * 8; }
  static TW_INLINE int col(int i) { return i % BLOCK / 4 * 8 + col0() + i % 2; }
  static TW_INLINE constexpr int per_row(int i) { return i / BLOCK * 2 + i % 4 / 2; }
  static TW_INLINE constexpr int per_col(int i) { return i % BLOCK / 4 * 2 + i % 2; }
  static TW_INLINE int row_of(int j) { return j / 2 * 64 + row0() + j % 2 * 8; }
  static TW_INLINE int col_of(int j) { return j / 2 * 8 + col0() + j % 2; }
};

// Accumulators of mma.sync.m16n8 over WM x WN warps (PTX ISA, "Matrix fragments for mma.m16n8k16"). Warps
// take turns along both axes in slabs of 16, so that any range of 16 WN columns is spread over all of them.
template <int ROWS, int COLS, int WM, int WN> struct MmaSpread {
  static constexpr int MT = ROWS / WM / 16, NT = COLS / WN / 8;
  static constexpr int TILE = MT * NT * 4, PER_ROW = MT * 2, PER_COL = NT * 2;
  static TW_INLINE int warp_m() { return (int)(threadIdx.x >> 5) % (WM * WN) / WN; }
  static TW_INLINE int warp_n() { return (int)(threadIdx.x >> 5) % WN; }
  // First row of block t of 16 rows, first column of block t of 8 columns.
  static TW_INLINE int block_row(int t) { return (t * WM + warp_m()) * 16; }
  static TW_INLINE int block_col(int t) { return (t / 2 * WN + warp_n()) * 16 + t % 2 * 8; }
  static TW_INLINE int row(int i) { return block_row(i / (NT * 4)) + lane() / 4 + i % 4 / 2 * 8; }
  static TW_INLINE int col(int i) { return block_col(i / 4 % NT) + lane() % 4 * 2 + i % 2; }
  static TW_INLINE constexpr int per_row(int i) { return i / (NT * 4) * 2 + i % 4 / 2; }
  static TW_INLINE constexpr int per_col(int i) { return i / 4 % NT * 2 + i % 2; }
  static TW_INLINE int row_of(int j) { return block_row(j / 2) + lane() / 4 + j % 2 * 8; }
  static TW_INLINE int col_of(int j) { return block_col(j / 2) + lane() % 4 * 2 + j % 2; }
};

// Outer products over TM x TN threads, each with blocks of BM x BN that repeat every TM BM rows and TN BN
// columns. A warp is 8 x 4 of these threads; its lanes are numbered so that neither two neighbours nor two that are two
// apart read the same part of an operand. If they did, 128-bit loads would take half the passes, but their results would
// come at once, in the way of those of the multiply-adds.
template <int ROWS, int COLS, int TM, int TN, int BM, int BN> struct OuterSpread {
  static_assert(TM % 8 == 0 && TN % 4 == 0, "warps of 8 x 4 threads");
  static constexpr int RM = ROWS / TM, CN = COLS / TN;
  static constexpr int TILE = RM * CN, PER_ROW = RM, PER_COL = CN;
  static TW_INLINE int warp_of() { return (int)(threadIdx.x >> 5) % (TM * TN / 32); }
  static TW_INLINE int thread_m() {
    return warp_of() / (TN / 4) * 8 + ((lane() ^ lane() >> 2) & 1) + ((lane() ^ lane() >> 2) & 2) + (lane() >> 4) * 4;
  }
  static TW_INLINE int thread_n() { return warp_of() % (TN / 4) * 4 + (lane() & 3); }
  static TW_INLINE int row_of(int j) { return j / BM * (TM * BM) + thread_m() * BM + j % BM; }
  static TW_INLINE int col_of(int j) { return j / BN * (TN * BN) + thread_n() * BN + j % BN; }
  static TW_INLINE constexpr int per_row(int i) { return i / CN; }
  static TW_INLINE constexpr int per_col(int i) { return i % CN; }
  static TW_INLINE int row(int i) { return row_of(per_row(i)); }
  static TW_INLINE int col(int i) { return col_of(per_col(i)); }
};

// Plain threads: LANES neighbours share a row in vectors of VECTOR columns.
template <int ROWS, int COLS, int LANES, int VECTOR, int THREADS> struct LineSpread {
  static constexpr int LINES = THREADS / LANES, EACH = COLS / LANES, LANES_A_ROW = LANES, RUN = VECTOR;
  static constexpr int TILE = ROWS / LINES * EACH, PER_ROW = ROWS / LINES, PER_COL = EACH;
  static TW_INLINE int me() { return (int)((TW_THREAD)threadIdx.x % (TW_THREAD)THREADS); }
  // Where register 0 is, and how far register i is from it: a constant, so that addresses are one base and offsets.
  static TW_INLINE int row0() { return me() / LANES; }
  static TW_INLINE int col0() { return me() % LANES * VECTOR; }
  static TW_INLINE constexpr int row_step(int i) { return i / EACH * LINES; }
  static TW_INLINE constexpr int col_step(int i) { return i % EACH / VECTOR * (LANES * VECTOR) + i % VECTOR; }
  static TW_INLINE int row(int i) { return row_step(i) + row0(); }
  static TW_INLINE int col(int i) { return col_step(i) + col0(); }
  static TW_INLINE constexpr int per_row(int i) { return i / EACH; }
  static TW_INLINE constexpr int per_col(int i) { return i % EACH; }
  static TW_INLINE int row_of(int j) { return j * LINES + row0(); }
  static TW_INLINE int col_of(int j) { return col(j); }
};

// PTX ISA, "stmatrix": four 8x8 matrices of 16-bit elements from one warp.
#if __CUDA_ARCH__ >= 900
TW_INLINE void stmatrix(smem_t at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b),
               "r"(c), "r"(d) : "memory");
}
TW_INLINE void stmatrix_transposed(smem_t at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a),
               "r"(b), "r"(c), "r"(d) : "memory");
}
#endif

template <typename T> TW_INLINE u32 pack_pair(float x, float y);
template <> TW_INLINE u32 pack_pair<bf16>(float x, float y) { return pack_bf16(x, y); }
template <> TW_INLINE u32 pack_pair<f16>(float x, float y) { return pack_f16(x, y); }

// Accumulators to a tile in shared memory, converted to T. `line0`, `along0`: where the fragment's first
// element goes; ALONG_COLS: the buffer's contiguous axis is columns. `f(i)` gives register i.
template <typename T, int ROWS, int COLS, int SPAN, int LINES, bool ALONG_COLS, typename F>
TW_INLINE void wgmma_to_smem(smem_t tile, int row0, int col0, F f) {
  using S = WgmmaSpread<ROWS, COLS>;
  const int w = (int)((threadIdx.x >> 5) & 3u) * 16;
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 2 && COLS % 16 == 0) {
#pragma unroll
    for (int b = 0; b < S::BLOCKS; ++b) {
#pragma unroll
      for (int j = 0; j < COLS / 16; ++j) {
        const int i = b * S::BLOCK + j * 8;
        const u32 p0 = pack_pair<T>(f(i), f(i + 1)), p1 = pack_pair<T>(f(i + 2), f(i + 3));
        const u32 p2 = pack_pair<T>(f(i + 4), f(i + 5)), p3 = pack_pair<T>(f(i + 6), f(i + 7));
        if constexpr (ALONG_COLS) {
          const int line = row0 + b * 64 + w + lane() % 16, along = col0 + j * 16 + lane() / 16 * 8;
          stmatrix(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1, p2, p3);
        } else {
          // Each stored 8-element run is one column: matrices are (cols 0-7: rows 0-7, rows 8-15), then cols 8-15.
          const int line = col0 + j * 16 + lane() / 16 * 8 + lane() % 8;
          const int along = row0 + b * 64 + w + lane() / 8 % 2 * 8;
          stmatrix_transposed(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1, p2, p3);
        }
      }
    }
  } else
#endif
#pragma unroll
  for (int i = 0; i < S::TILE; i += 2) {
    const int r = row0 + S::row(i), c = col0 + S::col(i);
    if constexpr (ALONG_COLS) {
      const Pair<T> v = narrow_pair<T>(f(i), f(i + 1));
      const smem_t at = smem_at<sizeof(T), SPAN, LINES>(tile, r, c);
      if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(*(const u32*)&v.x), "r"(*(const u32*)&v.y)
                     : "memory");
      } else if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*(const u32*)&v) : "memory");
      } else {
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(*(const u16*)&v) : "memory");
      }
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const T v = narrow_to<T>::from(f(i + k));
        const smem_t at = smem_at<sizeof(T), SPAN, LINES>(tile, c + k, r);
        if constexpr (sizeof(T) == 4) {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*(const u32*)&v) : "memory");
        } else if constexpr (sizeof(T) == 2) {
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(*(const u16*)&v) : "memory");
        } else {
          asm volatile("st.shared.b8 [%0], %1;" ::"r"(at), "r"((u32) * (const u8*)&v) : "memory");
        }
      }
    }
  }
}

#if __CUDA_ARCH__ >= 900
TW_INLINE void stmatrix2(smem_t at, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
TW_INLINE void stmatrix2_transposed(smem_t at, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}

// The same for types of 16 bits and widths that end with 8 columns behind whole 16.
template <typename T, int ROWS, int COLS, int SPAN, int LINES, bool ALONG_COLS, typename F>
TW_INLINE void wgmma_to_smem_eights(smem_t tile, int row0, int col0, F f) {
  using S = WgmmaSpread<ROWS, COLS>;
  static_assert(sizeof(T) == 2 && COLS % 16 == 8, "16-bit elements, an odd number of eights");
  constexpr int WHOLE = COLS / 16;
  const int w = (int)((threadIdx.x >> 5) & 3u) * 16;
#pragma unroll
  for (int b = 0; b < S::BLOCKS; ++b) {
#pragma unroll
    for (int j = 0; j <= WHOLE; ++j) {
      const int i = b * S::BLOCK + j * 8;
      const u32 p0 = pack_pair<T>(f(i), f(i + 1)), p1 = pack_pair<T>(f(i + 2), f(i + 3));
      if (j < WHOLE) {
        const u32 p2 = pack_pair<T>(f(i + 4), f(i + 5)), p3 = pack_pair<T>(f(i + 6), f(i + 7));
        if constexpr (ALONG_COLS) {
          const int line = row0 + b * 64 + w + lane() % 16, along = col0 + j * 16 + lane() / 16 * 8;
          stmatrix(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1, p2, p3);
        } else {
          const int line = col0 + j * 16 + lane() / 16 * 8 + lane() % 8;
          const int along = row0 + b * 64 + w + lane() / 8 % 2 * 8;
          stmatrix_transposed(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1, p2, p3);
        }
      } else if constexpr (ALONG_COLS) {
        // Lanes 0 to 15 name the rows of two matrices; the others' addresses are not read.
        const int line = row0 + b * 64 + w + lane() % 16, along = col0 + j * 16;
        stmatrix2(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1);
      } else {
        const int line = col0 + j * 16 + lane() % 8, along = row0 + b * 64 + w + lane() / 8 % 2 * 8;
        stmatrix2_transposed(smem_at<2, SPAN, LINES>(tile, line, along), p0, p1);
      }
    }
  }
}
#endif

template <typename T> TW_INLINE T smem_load(smem_t at) {
  T v;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(*(u32*)&v) : "r"(at) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(*(u16*)&v) : "r"(at) : "memory");
  } else {
    u32 r;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(r) : "r"(at) : "memory");
    *(u8*)&v = (u8)r;
  }
  return v;
}

// One plain element into shared memory.
template <typename T> TW_INLINE void smem_store(smem_t at, T v) {
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(*(const u32*)&v) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(*(const u16*)&v) : "memory");
  } else {
    asm volatile("st.shared.b8 [%0], %1;" ::"r"(at), "r"((u32) * (const u8*)&v) : "memory");
  }
}

// N neighbouring elements by one access; they lie within 16 bytes of a line and are aligned.
template <typename T, int N> TW_INLINE void smem_store_run(smem_t at, const Run<T, N>& v) {
  const u32* w = reinterpret_cast<const u32*>(&v);
  if constexpr (sizeof(v) == 16) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  } else if constexpr (sizeof(v) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(w[0]), "r"(w[1]) : "memory");
  } else if constexpr (sizeof(v) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(w[0]) : "memory");
  } else if constexpr (sizeof(v) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(*reinterpret_cast<const u16*>(&v)) : "memory");
  } else {
    asm volatile("st.shared.b8 [%0], %1;" ::"r"(at), "r"((u32) * reinterpret_cast<const u8*>(&v)) : "memory");
  }
}
template <typename T, int N> TW_INLINE Run<T, N> smem_load_run(smem_t at) {
  Run<T, N> v;
  u32* w = reinterpret_cast<u32*>(&v);
  if constexpr (sizeof(v) == 16) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(at) : "memory");
  } else if constexpr (sizeof(v) == 8) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
  } else {
    static_assert(N == 1 || sizeof(v) == 4, "runs of 4, 8 or 16 bytes");
    if constexpr (N == 1) v.at[0] = smem_load<T>(at);
    else asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
  }
  return v;
}

// Combines over the LANES neighbouring threads (a power of two, within a warp) that share a row.
template <int LANES, typename T, typename F> TW_INLINE T across_lanes(T x, F combine) {
#pragma unroll
  for (int d = LANES / 2; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// Combines over the four threads of a warp that share the rows of an OuterSpread.
template <typename T, typename F> TW_INLINE T across_outer(T x, F combine) {
  x = combine(x, __shfl_xor_sync(~0u, x, 10));
  return combine(x, __shfl_xor_sync(~0u, x, 5));
}

}  // namespace tw
