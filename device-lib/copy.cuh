// Plain copies into shared memory, asynchronous where the alignment allows (PTX ISA, "cp.async").
#pragma once
#include "tw/frag.cuh"

namespace tw {

TW_INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> TW_INLINE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// BYTES (4, 8 or 16) from global to shared memory, the rest of them zero when `valid` is smaller.
template <int BYTES> TW_INLINE void copy_async(smem_t to, const void* from, int valid) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(valid)
                 : "memory");
  }
}

// VECTOR elements of which the first `count` are inside, and zeros for the others.
template <typename T, int VECTOR> TW_INLINE void copy_run_part(smem_t to, const T* from, int count) {
  constexpr int BYTES = VECTOR * (int)sizeof(T);
  if constexpr (BYTES >= 4) {
    copy_async<BYTES>(to, from, (count < VECTOR ? count : VECTOR) * (int)sizeof(T));
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) smem_store<T>(to + k * (int)sizeof(T), k < count ? from[k] : T{});
  }
}

// VECTOR elements, or zeros when not `inside`.
template <typename T, int VECTOR> TW_INLINE void copy_run(smem_t to, const T* from, bool inside) {
  constexpr int BYTES = VECTOR * (int)sizeof(T);
  if constexpr (BYTES >= 4) {
    copy_async<BYTES>(to, from, inside ? BYTES : 0);
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) smem_store<T>(to + k * (int)sizeof(T), inside ? from[k] : T{});
  }
}

// A box of LINES x ALONG elements into a tile of BUFFER_LINES lines, by THREADS threads with VECTOR elements an
// access; zero outside the tensor. (line, along) is the box's first coordinate in the tensor, (line0, along0) in
// the tile. Neighbours along the contiguous axis are `along_stride` apart (1 when VECTOR is more than 1). Lines may end
// within an access where ENDS.
template <typename T, int VECTOR, int THREADS, int LINES, int ALONG, int SPAN, int BUFFER_LINES, bool ENDS = false>
TW_INLINE void copy_tile(smem_t tile, int line0, int along0, const T* from, int line, int along, int lines,
                         int alongs, i64 line_stride, i64 along_stride) {
  constexpr int RUNS = ALONG / VECTOR, TOTAL = LINES * RUNS;
  const int me = (int)threadIdx.x % THREADS;
  // Runs of a line within a panel, lines that all threads take at once, and panels that they take beside each other.
  constexpr int WIDTH = SPAN / (int)sizeof(T), ACROSS = WIDTH / VECTOR, PANELS = ALONG / WIDTH;
  constexpr int STEP = ACROSS > 0 && THREADS / ACROSS < LINES ? THREADS / ACROSS : LINES;
  constexpr int ABREAST = ACROSS > 0 ? THREADS / (ACROSS * STEP) : 0;
  constexpr bool WHOLE = VECTOR == 1 && ALONG % WIDTH == 0 && WIDTH % VECTOR == 0 && THREADS == ACROSS * STEP * ABREAST &&
                         LINES % STEP == 0 && PANELS % (ABREAST > 0 ? ABREAST : 1) == 0 && (STEP % 8 == 0 || 8 % STEP == 0);
  if constexpr (WHOLE) {
    // Nothing lies outside: a thread keeps to its place in the panels, whose addresses are constants apart.
    if (line >= 0 && along >= 0 && line + LINES <= lines && along + ALONG <= alongs && line0 % 8 == 0 && along0 % WIDTH == 0) {
      const int l = me / ACROSS % STEP, a = me % ACROSS * VECTOR + me / (ACROSS * STEP) * WIDTH;
      const i64 apart = VECTOR > 1 ? 1 : along_stride, next = STEP * line_stride;
      const T* p = from + (i64)(line + l) * line_stride + (i64)(along + a) * apart;
      const smem_t to = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a);
#pragma unroll
      for (int j = 0; j < LINES / STEP; ++j) {
        // The pattern of the swizzle repeats every 8 lines.
        const smem_t at = (to ^ (u32)((j * STEP * SPAN >> 3) & (SPAN - 16))) + j * STEP * SPAN;
#pragma unroll
        for (int i = 0; i < PANELS / ABREAST; ++i)
          copy_run<T, VECTOR>(at + i * ABREAST * (BUFFER_LINES * SPAN), p + i * ABREAST * WIDTH * apart, true);
        p += next;
      }
      return;
    }
  }
  if constexpr (VECTOR > 1 && THREADS % RUNS == 0 && TOTAL % THREADS == 0) {
    // Nothing lies outside: a thread keeps to its place along the lines.
    if (line >= 0 && along >= 0 && line + LINES <= lines && along + ALONG <= alongs) {
      constexpr int STEP = THREADS / RUNS;
      const int l = me / RUNS, a = me % RUNS * VECTOR;
      const T* p = from + (i64)(line + l) * line_stride + (i64)(along + a) * 1;
      const i64 next = STEP * line_stride;
      const smem_t to = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a);
#pragma unroll
      for (int j = 0; j < TOTAL / THREADS; ++j) {
        // The pattern of the swizzle repeats every 8 lines.
        const smem_t at = STEP % 8 == 0 ? to + j * STEP * SPAN
                                        : smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l + j * STEP, along0 + a);
        copy_run<T, VECTOR>(at, p, true);
        p += next;
      }
      return;
    }
  }
#pragma unroll 2
  for (int i = me; i < TOTAL; i += THREADS) {
    const int l = i / RUNS, a = i % RUNS * VECTOR;
    const bool inside = (u32)(line + l) < (u32)lines && (u32)(along + a) < (u32)alongs;
    const T* p = from + (inside ? (i64)(line + l) * line_stride + (i64)(along + a) * along_stride : 0);
    const smem_t at = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a);
    if constexpr (ENDS) {
      copy_run_part<T, VECTOR>(at, p, inside ? alongs - (along + a) : 0);
    } else {
      copy_run<T, VECTOR>(at, p, inside);
    }
  }
}

// The same for a tensor whose contiguous axis runs across the tile's lines: neighbouring threads read 8 neighbours
// in memory and write them to 8 lines, 4 such groups a warp, whose elements the swizzle of 128 bytes spreads over all
// banks.
template <typename T, int THREADS, int LINES, int ALONG, int SPAN, int BUFFER_LINES>
TW_INLINE void copy_tile_turned(smem_t tile, int line0, int along0, const T* from, int line, int along, int lines,
                                int alongs, i64 along_stride) {
  static_assert(LINES % 8 == 0 && ALONG % 4 == 0 && THREADS % 32 == 0, "whole groups of 8 lines x 4");
  constexpr int GROUPS = LINES / 8, WARPS = THREADS / 32;
  // Warps side by side along the lines, and groups of 8 lines that each of them has.
  constexpr int ABREAST = WARPS < GROUPS ? WARPS : GROUPS, EACH = GROUPS / ABREAST, STEP = WARPS / ABREAST * 4;
  const int w = (int)threadIdx.x % THREADS / 32, l8 = lane() % 8, a4 = lane() / 8;
  // Panels of 32 elements along the lines: groups of 4 in one, of which a warp takes EVERY.. apart.
  constexpr int PANEL = SPAN / (int)sizeof(T), QUADS = PANEL / 4, SIDE = WARPS < QUADS ? WARPS : QUADS;
  constexpr int DEEP = WARPS / SIDE;
  if constexpr (PANEL % 4 == 0 && ALONG % PANEL == 0 && QUADS % SIDE == 0 && WARPS % SIDE == 0 && GROUPS % DEEP == 0) {
    if (line >= 0 && along >= 0 && line + LINES <= lines && along + ALONG <= alongs && line0 % 8 == 0 && along0 % PANEL == 0) {
      const int l = w / SIDE * 8 + l8, a = w % SIDE * 4 + a4;
      const T* p = from + (line + l) + (i64)(along + a) * along_stride;
      const smem_t to = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a);
      const i64 next = SIDE * 4 * along_stride;
#pragma unroll
      for (int j = 0; j < ALONG / (SIDE * 4); ++j) {
        const smem_t at = (to ^ (u32)(j * SIDE * 4 % PANEL * (int)sizeof(T))) + j * SIDE * 4 / PANEL * (BUFFER_LINES * SPAN);
#pragma unroll
        for (int g = 0; g < GROUPS / DEEP; ++g) copy_run<T, 1>(at + g * DEEP * 8 * SPAN, p + g * DEEP * 8, true);
        p += next;
      }
      return;
    }
  }
  if constexpr (GROUPS % ABREAST == 0 && WARPS % ABREAST == 0 && ALONG % STEP == 0) {
    // A thread keeps to its lines.
    const int l = w % ABREAST * 8 + l8, a = w / ABREAST * 4 + a4;
    const T* p = from + (line + l) + (i64)(along + a) * along_stride;
    const i64 next = STEP * along_stride;
    if (line >= 0 && along >= 0 && line + LINES <= lines && along + ALONG <= alongs) {
#pragma unroll
      for (int j = 0; j < ALONG / STEP; ++j) {
#pragma unroll
        for (int g = 0; g < EACH; ++g) {
          const smem_t at = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l + g * ABREAST * 8, along0 + a + j * STEP);
          copy_run<T, 1>(at, p + g * ABREAST * 8, true);
        }
        p += next;
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < ALONG / STEP; ++j) {
        const bool along_inside = (u32)(along + a + j * STEP) < (u32)alongs;
#pragma unroll 1
        for (int g = 0; g < EACH; ++g) {
          const bool inside = along_inside && (u32)(line + l + g * ABREAST * 8) < (u32)lines;
          const smem_t at = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l + g * ABREAST * 8, along0 + a + j * STEP);
          copy_run<T, 1>(at, inside ? p + g * ABREAST * 8 : from, inside);
        }
        p += next;
      }
    }
  } else {
    constexpr int UNITS = GROUPS * (ALONG / 4);
#pragma unroll 1
    for (int u = w; u < UNITS; u += WARPS) {
      const int l = u % GROUPS * 8 + l8, a = u / GROUPS * 4 + a4;
      const bool inside = (u32)(line + l) < (u32)lines && (u32)(along + a) < (u32)alongs;
      const T* p = from + (inside ? (line + l) + (i64)(along + a) * along_stride : 0);
      copy_run<T, 1>(smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a), p, inside);
    }
  }
}

}  // namespace tw
