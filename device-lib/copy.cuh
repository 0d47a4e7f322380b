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

// A box of LINES x ALONG elements into a tile of BUFFER_LINES lines, by THREADS threads with VECTOR elements an
// access; zero outside the tensor. (line, along) is the box's first coordinate in the tensor, (line0, along0) in
// the tile. Neighbours along the contiguous axis are `along_stride` apart (1 when VECTOR is more than 1).
template <typename T, int VECTOR, int THREADS, int LINES, int ALONG, int SPAN, int BUFFER_LINES>
TW_INLINE void copy_tile(smem_t tile, int line0, int along0, const T* from, int line, int along, int lines,
                         int alongs, i64 line_stride, i64 along_stride) {
  constexpr int BYTES = VECTOR * (int)sizeof(T), RUNS = ALONG / VECTOR;
#pragma unroll 4
  for (int i = (int)threadIdx.x % THREADS; i < LINES * RUNS; i += THREADS) {
    const int l = i / RUNS, a = i % RUNS * VECTOR;
    const bool inside = line + l < lines && along + a < alongs;
    const T* p = from + (inside ? (i64)(line + l) * line_stride + (i64)(along + a) * along_stride : 0);
    const smem_t to = smem_at<sizeof(T), SPAN, BUFFER_LINES>(tile, line0 + l, along0 + a);
    if constexpr (BYTES >= 4) {
      copy_async<BYTES>(to, p, inside ? BYTES : 0);
    } else {
      smem_store<T>(to, inside ? *p : T{});
    }
  }
}

}  // namespace tw
