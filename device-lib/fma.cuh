// Matrix products by plain multiply-adds: every sum is a chain of IEEE fused multiply-adds in the order of the
// depth.
//
// What bounds such a kernel is the issue slot: one instruction a cycle, whatever it does, and registers that lie in
// two banks: two operands that are read from one bank cost a second cycle. So lines of both tiles run across the
// depth (copies turn operands that lie along it), operands come in 128-bit loads, addresses change by constants, and
// the sums of a column are formed for two even, two odd rows and so on: the column's element stays in the reuse cache, the
// assembler finds sums and rows in different banks for more than nine of ten instructions, and sums do not go to one bank
// for so long that results of loads have to wait for it (docs/src/facts.md).
#pragma once
#include "tw/frag.cuh"

namespace tw {

TW_INLINE void smem_load4(float (&r)[4], smem_t at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(at) : "memory");
}

// One operand's elements of a thread: COUNT along its own axis, in blocks of BLOCK that repeat every
// THREADS * BLOCK. Lines of the buffer run along that axis; a load takes a block of one step of the depth.
template <int COUNT, int THREADS, int BLOCK, int SPAN, int LINES> struct OuterOperand {
  static constexpr int REPEAT = THREADS * BLOCK;
  smem_t tile;
  int first, depth;  // The thread's first element along the own axis; depth of step 0.
  // Where that element lies in each of the 8 lines after which the swizzle's pattern repeats: registers instead of an
  // instruction a load.
  u32 place[8];

  TW_INLINE OuterOperand(smem_t at, int own, int step0) : tile(at), first(own), depth(step0) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      // Step 0's address with the swizzle's bits flipped: tiles start at multiples of 1024 bytes.
      place[k] = smem_at<4, SPAN, LINES>(0, depth, first) ^ ((u32)(k * SPAN >> 3) & (u32)(SPAN - 16));
      asm("" : "+r"(place[k]));
    }
  }
  TW_INLINE smem_t address(int j, int k) const {
    if constexpr (REPEAT * 4 % SPAN == 0) {
      return tile + place[k % 8] + (k * SPAN + j / BLOCK * (REPEAT * 4 / SPAN) * (LINES * SPAN));
    } else {
      return smem_at<4, SPAN, LINES>(tile, depth + k, first + j / BLOCK * REPEAT + j % BLOCK);
    }
  }
  // The block of element j for step k.
  TW_INLINE void load_block(float (&r)[COUNT], int j, int k) const {
    if constexpr (BLOCK == 4) smem_load4(*reinterpret_cast<float(*)[4]>(&r[j]), address(j, k));
    else r[j] = smem_load<float>(address(j, k));
  }
  // All elements for step k.
  TW_INLINE void load(float (&r)[COUNT], int k) const {
#pragma unroll
    for (int j = 0; j < COUNT; j += BLOCK) load_block(r, j, k);
  }
};

// acc += A * B over the whole depth of two tiles. A is [ROWS, DEPTH] from (a_row, a_depth), B is
// [DEPTH, COLS] from (b_depth, b_col); *_DEEP: lines of the buffer run along the depth, which they must not. Rows
// are held for two steps, a block of columns is replaced after its last use. The assembler would move these loads
// down to where their values are used; it moves none across a synchronisation of the warp. The loop's body stays
// near a thousand multiply-adds: longer ones wait for their instructions.
template <int ROWS, int COLS, int DEPTH, int TM, int TN, int BM, int BN, int A_SPAN, int A_LINES, bool A_DEEP,
          int B_SPAN, int B_LINES, bool B_DEEP>
TW_INLINE void fma_tile(float* acc, smem_t a, int a_row, int a_depth, smem_t b, int b_depth, int b_col) {
  using S = OuterSpread<ROWS, COLS, TM, TN, BM, BN>;
  static_assert(DEPTH % 8 == 0 && !A_DEEP && !B_DEEP, "lines run across the depth, in groups of 8");
  constexpr int WANTED = S::TILE >= 128 ? 8 : S::TILE >= 64 ? 16 : 32, STEPS = DEPTH % WANTED == 0 ? WANTED : 8;
  OuterOperand<S::RM, TM, BM, A_SPAN, A_LINES> left(a, a_row + S::thread_m() * BM, a_depth);
  OuterOperand<S::CN, TN, BN, B_SPAN, B_LINES> right(b, b_col + S::thread_n() * BN, b_depth);
  float fa[2][S::RM], fb[S::CN];
  left.load(fa[0], 0);
  right.load(fb, 0);
#pragma unroll 1
  for (int done = 0; done < DEPTH; done += STEPS) {
    // The pattern of the swizzle repeats every 8 lines. Behind the last step lies nothing: it loads step 0 again.
    const u32 on = done + STEPS < DEPTH ? STEPS : 0;
    auto next_left = left;
    auto next_right = right;
    next_left.tile += on * A_SPAN;
    next_right.tile += on * B_SPAN;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      const auto& l = k + 1 < STEPS ? left : next_left;
      const auto& r = k + 1 < STEPS ? right : next_right;
      const int next = (k + 1) % STEPS;
      l.load(fa[(k + 1) & 1], next);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < S::CN; ++c) {
#pragma unroll
        for (int j = 0; j < S::RM; ++j) {
          // Back and forth, so that neighbours in time share an operand; of four rows two even ones, then two odd ones.
          const int i = c % 2 ? S::RM - 1 - j : j, row = S::RM % 4 == 0 ? (i & ~3) | (i & 1) * 2 | (i >> 1 & 1) : i;
          acc[row * S::CN + c] = __fmaf_rn(fa[k & 1][row], fb[c], acc[row * S::CN + c]);
        }
        if (c % BN == BN - 1) r.load_block(fb, c - (BN - 1), next);
      }
    }
    left = next_left;
    right = next_right;
  }
}

// The same number in a register of its own. Stores of several neighbours want them in neighbouring registers; sums
// that lie so all through the loop have the banks of their operands. (Blocks have no third dimension, which the
// assembler does not know.)
TW_INLINE float detached(float x) { return __uint_as_float(__float_as_uint(x) ^ threadIdx.z); }

}  // namespace tw
