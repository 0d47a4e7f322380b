// The copy engine: boxes between global and shared memory (PTX ISA, "cp.async.bulk.tensor").
// Coordinates come innermost first, as in the tensor map.
#pragma once
#include "tw/base.cuh"

namespace tw {

#if __CUDA_ARCH__ >= 900

// L2 policies, as createpolicy.fractional would make them.
constexpr u64 EVICT_NORMAL = 0x1000000000000000ull;
constexpr u64 EVICT_FIRST = 0x12f0000000000000ull;
constexpr u64 EVICT_LAST = 0x14f0000000000000ull;

TW_INLINE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#define TW_TMA_LOAD(N, COORDS, ...)                                                                       \
  TW_INLINE void tma_load(smem_t to, const TensorMap& map, smem_t bar, u64 policy, TW_INTS_##N) {          \
    asm volatile("cp.async.bulk.tensor." #N "d.shared::cluster.global.mbarrier::complete_tx::bytes"        \
                 ".L2::cache_hint [%0], [%1, {" COORDS "}], [%2], %3;" ::"r"(to), "l"(&map), "r"(bar),     \
                 "l"(policy), __VA_ARGS__ : "memory");                                                     \
  }                                                                                                        \
  TW_INLINE void tma_load_multicast(smem_t to, const TensorMap& map, smem_t bar, u64 policy, u16 ctas,     \
                                    TW_INTS_##N) {                                                         \
    asm volatile("cp.async.bulk.tensor." #N "d.shared::cluster.global.mbarrier::complete_tx::bytes"        \
                 ".multicast::cluster.L2::cache_hint [%0], [%1, {" COORDS "}], [%2], " TW_TMA_MASK_##N      \
                 ", %3;" ::"r"(to), "l"(&map), "r"(bar), "l"(policy), __VA_ARGS__, "h"(ctas) : "memory");  \
  }
#define TW_INTS_1 int c0
#define TW_INTS_2 int c0, int c1
#define TW_INTS_3 int c0, int c1, int c2
#define TW_INTS_4 int c0, int c1, int c2, int c3
#define TW_INTS_5 int c0, int c1, int c2, int c3, int c4
#define TW_TMA_MASK_1 "%5"
#define TW_TMA_MASK_2 "%6"
#define TW_TMA_MASK_3 "%7"
#define TW_TMA_MASK_4 "%8"
#define TW_TMA_MASK_5 "%9"
TW_TMA_LOAD(1, "%4", "r"(c0))
TW_TMA_LOAD(2, "%4, %5", "r"(c0), "r"(c1))
TW_TMA_LOAD(3, "%4, %5, %6", "r"(c0), "r"(c1), "r"(c2))
TW_TMA_LOAD(4, "%4, %5, %6, %7", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
TW_TMA_LOAD(5, "%4, %5, %6, %7, %8", "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4))

// Positions of a window over images (PTX ISA, "im2col mode"): channel, column, row and image of the first window's first
// pixel; the tap's distance from it, to the right and down.
TW_INLINE void tma_load_windows(smem_t to, const TensorMap& map, smem_t bar, u64 policy, int c, int x, int y, int n, int right,
                                int down) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %3;" ::"r"(to), "l"(&map), "r"(bar), "l"(policy),
               "r"(c), "r"(x), "r"(y), "r"(n), "h"((u16)right), "h"((u16)down) : "memory");
}
TW_INLINE void tma_load_windows_multicast(smem_t to, const TensorMap& map, smem_t bar, u64 policy, u16 ctas, int c, int x, int y,
                                          int n, int right, int down) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
               ".multicast::cluster.L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %10, %3;" ::"r"(to), "l"(&map),
               "r"(bar), "l"(policy), "r"(c), "r"(x), "r"(y), "r"(n), "h"((u16)right), "h"((u16)down), "h"(ctas) : "memory");
}

#define TW_TMA_STORE(N, COORDS, ...)                                                                      \
  TW_INLINE void tma_store(const TensorMap& map, smem_t from, TW_INTS_##N) {                               \
    asm volatile("cp.async.bulk.tensor." #N "d.global.shared::cta.bulk_group [%0, {" COORDS "}], [%1];"    \
                 ::"l"(&map), "r"(from), __VA_ARGS__ : "memory");                                          \
  }                                                                                                        \
  TW_INLINE void tma_store_add(const TensorMap& map, smem_t from, TW_INTS_##N) {                           \
    asm volatile("cp.reduce.async.bulk.tensor." #N "d.global.shared::cta.add.bulk_group [%0, {" COORDS     \
                 "}], [%1];" ::"l"(&map), "r"(from), __VA_ARGS__ : "memory");                              \
  }
TW_TMA_STORE(1, "%2", "r"(c0))
TW_TMA_STORE(2, "%2, %3", "r"(c0), "r"(c1))
TW_TMA_STORE(3, "%2, %3, %4", "r"(c0), "r"(c1), "r"(c2))
TW_TMA_STORE(4, "%2, %3, %4, %5", "r"(c0), "r"(c1), "r"(c2), "r"(c3))
TW_TMA_STORE(5, "%2, %3, %4, %5, %6", "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4))

// PTX ISA, "cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
TW_INLINE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING> TW_INLINE void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING> TW_INLINE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

#endif

}  // namespace tw
