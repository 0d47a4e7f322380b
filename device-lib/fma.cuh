// Matrix products by plain multiply-adds: every sum is a chain of IEEE fused multiply-adds in the order of the
// depth.
//
// What bounds such a kernel is the issue slot: one instruction a cycle, whatever it does. So operands come in
// 128-bit loads, and addresses change by constants.
#pragma once
#include "tw/frag.cuh"

namespace tw {

TW_INLINE void smem_load4(float (&r)[4], smem_t at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(at) : "memory");
}

// One operand's elements of a thread: COUNT along its own axis, in blocks of BLOCK that repeat every
// THREADS * BLOCK. DEEP: lines of the buffer run along the depth, and a load takes 4 steps of one line;
// otherwise a load takes a block of one step.
template <int COUNT, int THREADS, int BLOCK, int SPAN, int LINES, bool DEEP> struct OuterOperand {
  static constexpr int REPEAT = THREADS * BLOCK;
  smem_t tile;
  int first, depth;  // The thread's first element along the own axis; depth of step 0.

  TW_INLINE smem_t address(int j, int k) const {
    const int own = first + j / BLOCK * REPEAT + j % BLOCK;
    if constexpr (DEEP) {
      if constexpr (REPEAT % 8 == 0) {
        // The pattern of the swizzle repeats every 8 lines.
        return smem_at<4, SPAN, LINES>(tile, first + j % BLOCK, depth + k) + j / BLOCK * (REPEAT * SPAN);
      } else {
        return smem_at<4, SPAN, LINES>(tile, own, depth + k);
      }
    } else if constexpr (REPEAT * 4 % SPAN == 0) {
      // Step 0's address with the swizzle's bits flipped: tiles start at multiples of 1024 bytes.
      const u32 flip = (u32)(k * SPAN >> 3) & (u32)(SPAN - 16);
      const smem_t step0 = smem_at<4, SPAN, LINES>(tile, depth, first + j % BLOCK);
      return (step0 ^ flip) + k * SPAN + j / BLOCK * (REPEAT * 4 / SPAN) * (LINES * SPAN);
    } else {
      return smem_at<4, SPAN, LINES>(tile, depth + k, own);
    }
  }
  // Element j for steps k..k+3.
  TW_INLINE void load_deep(float (&r)[4], int j, int k) const { smem_load4(r, address(j, k)); }
  // All elements for step k.
  TW_INLINE void load(float (&r)[COUNT], int k) const {
    if constexpr (BLOCK == 4) {
#pragma unroll
      for (int j = 0; j < COUNT; j += 4) smem_load4(*reinterpret_cast<float(*)[4]>(&r[j]), address(j, k));
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) r[j] = smem_load<float>(address(j, k));
    }
  }
};

// acc += A * B over the whole depth of two tiles. A is [ROWS, DEPTH] from (a_row, a_depth), B is
// [DEPTH, COLS] from (b_depth, b_col); *_DEEP: lines of the buffer run along the depth. What the next step
// needs is loaded while the current one is multiplied; of lines along the depth each element is replaced
// after its last use.
template <int ROWS, int COLS, int DEPTH, int TM, int TN, int BM, int BN, int A_SPAN, int A_LINES, bool A_DEEP,
          int B_SPAN, int B_LINES, bool B_DEEP>
TW_INLINE void fma_tile(float* acc, smem_t a, int a_row, int a_depth, smem_t b, int b_depth, int b_col) {
  using S = OuterSpread<ROWS, COLS, TM, TN, BM, BN>;
  static_assert(DEPTH % 8 == 0, "whole groups of steps");
  const OuterOperand<S::RM, TM, BM, A_SPAN, A_LINES, A_DEEP> left{a, a_row + S::thread_m() * BM, a_depth};
  const OuterOperand<S::CN, TN, BN, B_SPAN, B_LINES, B_DEEP> right{b, b_col + S::thread_n() * BN, b_depth};
  float fa[A_DEEP ? 1 : 2][S::RM], fb[B_DEEP ? 1 : 2][S::CN];
  float da[A_DEEP ? S::RM : 1][4], db[B_DEEP ? S::CN : 1][4];
  if constexpr (A_DEEP) {
#pragma unroll
    for (int r = 0; r < S::RM; ++r) left.load_deep(da[r], r, 0);
  } else {
    left.load(fa[0], 0);
  }
  if constexpr (B_DEEP) {
#pragma unroll
    for (int c = 0; c < S::CN; ++c) right.load_deep(db[c], c, 0);
  } else {
    right.load(fb[0], 0);
  }
#pragma unroll
  for (int k = 0; k < DEPTH; ++k) {
    const bool more = k + 1 < DEPTH, group = k % 4 == 3;
    if constexpr (!A_DEEP) if (more) left.load(fa[(k + 1) & 1], k + 1);
    if constexpr (!B_DEEP) if (more) right.load(fb[(k + 1) & 1], k + 1);
#pragma unroll
    for (int r = 0; r < S::RM; ++r) {
      const float x = A_DEEP ? da[A_DEEP ? r : 0][k % 4] : fa[A_DEEP ? 0 : k & 1][r];
#pragma unroll
      for (int j = 0; j < S::CN; ++j) {
        const int c = r % 2 ? S::CN - 1 - j : j;
        const float y = B_DEEP ? db[B_DEEP ? c : 0][k % 4] : fb[B_DEEP ? 0 : k & 1][c];
        acc[r * S::CN + c] = __fmaf_rn(x, y, acc[r * S::CN + c]);
        if constexpr (B_DEEP) if (more && group && r == S::RM - 1) right.load_deep(db[c], c, k + 1);
      }
      if constexpr (A_DEEP) if (more && group) left.load_deep(da[r], r, k + 1);
    }
  }
}

}  // namespace tw
