// `mma.sync` over tiles in shared memory (PTX ISA, "Matrix multiply-accumulate operation using mma
// instruction"), operands through `ldmatrix`.
//
// Every shape used here is m16n8 with a depth of 32 bytes, so that operand fragments are the same for all
// element types when seen as bytes: A is 2 x 2, B is 2 x 1 matrices of 8 lines of 16 bytes. `ldmatrix` reads
// them from lines along the depth; for 16-bit elements `.trans` reads lines along the other axis. Other
// types in such an order are gathered element by element.
#pragma once
#include "tw/frag.cuh"

namespace tw {

// PTX ISA, "ldmatrix": four 8x8 matrices of 16-bit elements, the line of each given by 8 lanes.
TW_INLINE void ldmatrix(u32 (&r)[4], smem_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
TW_INLINE void ldmatrix_transposed(u32 (&r)[4], smem_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

#define TW_MMA(TYPE, ACC, BIND, INSTRUCTION)                                                          \
  TW_INLINE void mma_sync(TYPE, ACC* d, const u32 (&a)[4], u32 b0, u32 b1) {                          \
    asm volatile("mma.sync.aligned." INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "    \
                 "{%0, %1, %2, %3};"                                                                  \
                 : BIND(d[0]), BIND(d[1]), BIND(d[2]), BIND(d[3])                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                     \
  }
TW_MMA(bf16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
TW_MMA(f16, float, "+f", "m16n8k16.row.col.f32.f16.f16.f32")
TW_MMA(float, float, "+f", "m16n8k8.row.col.f32.tf32.tf32.f32")
TW_MMA(signed char, int, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
TW_MMA(u8, int, "+r", "m16n8k32.row.col.s32.u8.u8.s32")
#if __CUDA_ARCH__ >= 890
TW_MMA(f8e4m3, float, "+f", "m16n8k32.row.col.f32.e4m3.e4m3.f32")
TW_MMA(f8e5m2, float, "+f", "m16n8k32.row.col.f32.e5m2.e5m2.f32")
#endif
#undef TW_MMA

// What the tensor cores take for the 4 bytes of a fragment: f32 is rounded to TF32 (nearest, ties away), of which they
// drop the last 13 bits themselves. A NaN of ones would become a number.
template <typename T> TW_INLINE u32 operand_bits(u32 r) {
  if constexpr (sizeof(T) == 4) r = isnan(__uint_as_float(r)) ? r : r + 0x1000u;
  return r;
}

// x = high + low up to the last of 22 digits: TF32 numbers whose products are exact. (The tensor cores read no more
// than 11 digits of `low`.)
TW_INLINE void split_tf32(u32 x, u32& high, u32& low) {
  // Where `high` is not what it should be, of NaN and the largest numbers, `low` is NaN.
  high = (x + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// Four matrices of 8 lines x 16 bytes: matrix q starts at line `line + 8 * (q in LINE_BITS)` and depth
// `depth + one matrix * (q in DEPTH_BITS)`. DEEP: lines in shared memory run along the depth. WHOLE: f32 is not rounded.
template <typename T, int SPAN, int LINES, bool DEEP, int LINE_BIT, int DEPTH_BIT, bool WHOLE = false>
TW_INLINE void mma_operand(u32 (&r)[4], smem_t tile, int line, int depth) {
  constexpr int EACH = 16 / (int)sizeof(T);
  if constexpr (DEEP) {
    const int q = lane() / 8;
    ldmatrix(r, smem_at<sizeof(T), SPAN, LINES>(tile, line + (q >> LINE_BIT & 1) * 8 + lane() % 8,
                                                depth + (q >> DEPTH_BIT & 1) * EACH));
  } else if constexpr (sizeof(T) == 2) {
    const int q = lane() / 8;
    ldmatrix_transposed(r, smem_at<2, SPAN, LINES>(tile, depth + (q >> DEPTH_BIT & 1) * 8 + lane() % 8,
                                                   line + (q >> LINE_BIT & 1) * 8));
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int l = line + (q >> LINE_BIT & 1) * 8 + lane() / 4;
      const int d = depth + (q >> DEPTH_BIT & 1) * EACH + lane() % 4 * (4 / (int)sizeof(T));
      if constexpr (sizeof(T) == 4) {
        r[q] = smem_load<u32>(smem_at<4, SPAN, LINES>(tile, d, l));
      } else {
        r[q] = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) r[q] |= (u32)smem_load<u8>(smem_at<1, SPAN, LINES>(tile, d + k, l)) << (8 * k);
      }
    }
  }
  if constexpr (!WHOLE) {
#pragma unroll
    for (int q = 0; q < 4; ++q) r[q] = operand_bits<T>(r[q]);
  }
}

// acc += A * B over the whole depth of two tiles. A is [ROWS, DEPTH] from (a_row, a_depth), B is
// [DEPTH, COLS] from (b_depth, b_col). *_DEEP: lines of the buffer run along the depth. The fragments of the
// next step are loaded while the current one is multiplied.
template <typename T, typename ACC, int ROWS, int COLS, int DEPTH, int WM, int WN, int A_SPAN, int A_LINES,
          bool A_DEEP, int B_SPAN, int B_LINES, bool B_DEEP>
TW_INLINE void mma_tile(ACC* acc, smem_t a, int a_row, int a_depth, smem_t b, int b_depth, int b_col) {
  using S = MmaSpread<ROWS, COLS, WM, WN>;
  constexpr int K = 32 / (int)sizeof(T), STEPS = DEPTH / K;
  static_assert(DEPTH % K == 0 && ROWS % (16 * WM) == 0 && COLS % (16 * WN) == 0, "whole instructions");
  u32 fa[2][S::MT][4], fb[2][S::NT / 2][4];
  const auto load = [&](int step) {
#pragma unroll
    for (int t = 0; t < S::MT; ++t)
      mma_operand<T, A_SPAN, A_LINES, A_DEEP, 0, 1>(fa[step & 1][t], a, a_row + S::block_row(t), a_depth + step * K);
#pragma unroll
    for (int t = 0; t < S::NT / 2; ++t)
      mma_operand<T, B_SPAN, B_LINES, B_DEEP, 1, 0>(fb[step & 1][t], b, b_col + S::block_col(2 * t),
                                                    b_depth + step * K);
  };
  load(0);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (step + 1 < STEPS) load(step + 1);
#pragma unroll
    for (int m = 0; m < S::MT; ++m) {
#pragma unroll
      for (int j = 0; j < S::NT; ++j) {
        // Back and forth, so that neighbours in time share an operand.
        const int n = m % 2 ? S::NT - 1 - j : j;
        const u32 (&f)[4] = fb[step & 1][n / 2];
        mma_sync(T{}, acc + (m * S::NT + n) * 4, fa[step & 1][m], f[n % 2 * 2], f[n % 2 * 2 + 1]);
      }
    }
  }
}

// Which operand a thread holds when the left one is made of accumulators. Rows agree; of 16 bits, two neighbouring
// blocks of 8 columns are one instruction's depth as they are. Of f32, the two columns of a thread take the places of
// depths t and t + 4 (t: the lane's number in its group of four), and those of B are read to match: the order of the
// depth is free.
template <typename T, int SPAN, int LINES, bool DEEP>
TW_INLINE void mma_right_f32(u32 (&r)[2], smem_t tile, int col, int depth) {
  const int c = col + lane() / 4, d = depth + lane() % 4 * 2;
  if constexpr (DEEP) {
    const Run<float, 2> two = smem_load_run<float, 2>(smem_at<4, SPAN, LINES>(tile, c, d));
    r[0] = __float_as_uint(two.at[0]), r[1] = __float_as_uint(two.at[1]);
  } else {
    // Even lines of the four groups, then odd ones: the swizzle spreads them over all banks.
    r[0] = smem_load<u32>(smem_at<4, SPAN, LINES>(tile, d, c));
    r[1] = smem_load<u32>(smem_at<4, SPAN, LINES>(tile, d + 1, c));
  }
}

// acc += A * B over the whole depth, where A is a fragment of ROWS x DEPTH in the same warps' registers.
template <typename T, typename ACC, int ROWS, int COLS, int DEPTH, int WM, int WN, int B_SPAN, int B_LINES, bool B_DEEP>
TW_INLINE void mma_tile_left(ACC* acc, const value<T>* left, smem_t b, int b_depth, int b_col) {
  using S = MmaSpread<ROWS, COLS, WM, WN>;
  using L = MmaSpread<ROWS, DEPTH, WM, WN>;
  constexpr int K = 32 / (int)sizeof(T), STEPS = DEPTH / K;
  static_assert(WN == 1 && sizeof(T) >= 2 && DEPTH % 16 == 0, "whole instructions of warps along rows");
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    u32 fa[S::MT][4];
#pragma unroll
    for (int m = 0; m < S::MT; ++m) {
      if constexpr (sizeof(T) == 4) {
        const float* at = left + (m * L::NT + step) * 4;
        fa[m][0] = operand_bits<T>(__float_as_uint(at[0])), fa[m][1] = operand_bits<T>(__float_as_uint(at[2]));
        fa[m][2] = operand_bits<T>(__float_as_uint(at[1])), fa[m][3] = operand_bits<T>(__float_as_uint(at[3]));
      } else {
        const value<T>* at = left + (m * L::NT + step * 2) * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) fa[m][i] = pack_pair<T>(at[i * 2], at[i * 2 + 1]);
      }
    }
#pragma unroll
    for (int t = 0; t < S::NT / 2; ++t) {
      u32 fb[2][2];
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_right_f32<T, B_SPAN, B_LINES, B_DEEP>(fb[i], b, b_col + S::block_col(2 * t + i), b_depth + step * K);
          fb[i][0] = operand_bits<T>(fb[i][0]), fb[i][1] = operand_bits<T>(fb[i][1]);
        }
      } else {
        u32 four[4];
        mma_operand<T, B_SPAN, B_LINES, B_DEEP, 1, 0>(four, b, b_col + S::block_col(2 * t), b_depth + step * K);
        fb[0][0] = four[0], fb[0][1] = four[1], fb[1][0] = four[2], fb[1][1] = four[3];
      }
#pragma unroll
      for (int m = 0; m < S::MT; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_sync(T{}, acc + (m * S::NT + t * 2 + i) * 4, fa[m], fb[i][0], fb[i][1]);
      }
    }
  }
}

// The products of one step of the depth in two parts each: small terms first, and as many sums between two of one sum as
// there are, so that none waits for the one before. `right(b, n)` reads block n of 8 columns.
template <int MT, int NT, typename F>
TW_INLINE void mma_split_step(float* acc, const u32 (&high)[MT][4], const u32 (&low)[MT][4], F right) {
  constexpr int EACH = NT % 4 == 0 && MT == 1 ? 4 : 2;
#pragma unroll
  for (int n0 = 0; n0 < NT; n0 += EACH) {
    u32 bh[EACH][2], bl[EACH][2];
#pragma unroll
    for (int t = 0; t < EACH; t += 2) {
      u32 whole[2][2];
      right(whole, n0 + t);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(whole[i / 2][i % 2], bh[t + i / 2][i % 2], bl[t + i / 2][i % 2]);
    }
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < EACH; ++n) {
          float* sum = acc + (m * NT + n0 + n) * 4;
          if (part == 0) mma_sync(0.0f, sum, low[m], bh[n][0], bh[n][1]);
          else if (part == 1) mma_sync(0.0f, sum, high[m], bl[n][0], bl[n][1]);
          else mma_sync(0.0f, sum, high[m], bh[n][0], bh[n][1]);
        }
      }
    }
  }
}

// mma_tile for f32 operands in two parts each.
template <int ROWS, int COLS, int DEPTH, int WM, int WN, int A_SPAN, int A_LINES, bool A_DEEP, int B_SPAN, int B_LINES,
          bool B_DEEP>
TW_INLINE void mma_tile_split(float* acc, smem_t a, int a_row, int a_depth, smem_t b, int b_depth, int b_col) {
  using S = MmaSpread<ROWS, COLS, WM, WN>;
  static_assert(DEPTH % 8 == 0 && ROWS % (16 * WM) == 0 && COLS % (16 * WN) == 0, "whole instructions");
#pragma unroll
  for (int step = 0; step < DEPTH / 8; ++step) {
    u32 high[S::MT][4], low[S::MT][4];
#pragma unroll
    for (int t = 0; t < S::MT; ++t) {
      u32 whole[4];
      mma_operand<float, A_SPAN, A_LINES, A_DEEP, 0, 1, true>(whole, a, a_row + S::block_row(t), a_depth + step * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(whole[i], high[t][i], low[t][i]);
    }
    mma_split_step<S::MT, S::NT>(acc, high, low, [&](u32 (&r)[2][2], int n) {
      u32 four[4];
      mma_operand<float, B_SPAN, B_LINES, B_DEEP, 1, 0, true>(four, b, b_col + S::block_col(n), b_depth + step * 8);
      r[0][0] = four[0], r[0][1] = four[1], r[1][0] = four[2], r[1][1] = four[3];
    });
  }
}

// mma_tile_left for f32 operands in two parts each.
template <int ROWS, int COLS, int DEPTH, int WM, int WN, int B_SPAN, int B_LINES, bool B_DEEP>
TW_INLINE void mma_tile_left_split(float* acc, const float* left, smem_t b, int b_depth, int b_col) {
  using S = MmaSpread<ROWS, COLS, WM, WN>;
  using L = MmaSpread<ROWS, DEPTH, WM, WN>;
  static_assert(WN == 1 && DEPTH % 16 == 0, "whole instructions of warps along rows");
#pragma unroll
  for (int step = 0; step < DEPTH / 8; ++step) {
    u32 high[S::MT][4], low[S::MT][4];
#pragma unroll
    for (int m = 0; m < S::MT; ++m) {
      const float* at = left + (m * L::NT + step) * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(__float_as_uint(at[i % 2 * 2 + i / 2]), high[m][i], low[m][i]);
    }
    mma_split_step<S::MT, S::NT>(acc, high, low, [&](u32 (&r)[2][2], int n) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        mma_right_f32<float, B_SPAN, B_LINES, B_DEEP>(r[i], b, b_col + S::block_col(n + i), b_depth + step * 8);
    });
  }
}

}  // namespace tw
