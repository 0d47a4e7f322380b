// Dropout of a tensor, plus a residual.
//
// Element i stays where word i % 4 of Philox4x32-7 at counter i / 4 is at least `threshold`. The key is read from the
// device: PyTorch's generator has drawn it, so that a recorded launch draws a new one each time.
#include "tw/element.cuh"

using namespace tw;

struct Words { u32 at[4]; };

// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): seven rounds are the fewest that pass BigCrush.
TW_INLINE Words philox(u64 counter, u64 key) {
  u32 x = (u32)counter, y = (u32)(counter >> 32), z = 0, w = 0;
  u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const u64 p = (u64)0xD2511F53u * x, q = (u64)0xCD9E8D57u * z;
    x = (u32)(q >> 32) ^ y ^ k0, y = (u32)q, z = (u32)(p >> 32) ^ w ^ k1, w = (u32)p;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return Words{{x, y, z, w}};
}

constexpr int THREADS = 128;
// Packs of eight elements that a thread has under way.
constexpr int PACKS = 2;
// Blocks on a multiprocessor, which is what registers are given out for: loads of some hide the random numbers of others.
constexpr int BLOCKS = sizeof(Element) == 8 ? 8 : 10;

struct alignas(16) Pack { Element at[8]; };

// Packs of neighbouring threads lie beside each other, a thread's own are a block's width apart.
template <bool RESIDUAL>
TW_INLINE void packs(const Element* x, const Element* residual, Element* y, u64 key, u32 threshold, Wide scale, i64 first) {
  Pack a[PACKS], r[PACKS];
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    a[j] = *reinterpret_cast<const Pack*>(x + first + j * 8 * THREADS);
    if (RESIDUAL) r[j] = *reinterpret_cast<const Pack*>(residual + first + j * 8 * THREADS);
  }
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const i64 i = first + j * 8 * THREADS;
    Pack out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words words = philox((u64)i / 4 + half, key);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int at = half * 4 + c;
        Wide value = words.at[c] >= threshold ? (Wide)wide_of(a[j].at[at]) * scale : (Wide)0;
        if (RESIDUAL) value += (Wide)wide_of(r[j].at[at]);
        out.at[at] = Rounded<Element>::of(value);
      }
    }
    *reinterpret_cast<Pack*>(y + i) = out;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
dropout(const Element* x, const Element* residual, Element* y, const u64* key, u32 threshold, double scale, i64 n) {
  begin_behind_others();
  const i64 block = (i64)blockIdx.x * (PACKS * 8 * THREADS);
  const u64 k = *key;
  const Wide by = (Wide)scale;
  if (block + PACKS * 8 * THREADS <= n) {
    const i64 first = block + threadIdx.x * 8;
    if (residual == nullptr) {
      packs<false>(x, residual, y, k, threshold, by, first);
    } else {
      packs<true>(x, residual, y, k, threshold, by, first);
    }
    return;
  }
  // The last block: one element at a time.
  for (i64 i = block + threadIdx.x; i < n; i += THREADS) {
    const Words words = philox((u64)i / 4, k);
    const int c = (int)(i % 4);
    const u32 word = c == 0 ? words.at[0] : c == 1 ? words.at[1] : c == 2 ? words.at[2] : words.at[3];
    Wide value = word >= threshold ? (Wide)wide_of(x[i]) * by : (Wide)0;
    if (residual != nullptr) value += (Wide)wide_of(residual[i]);
    y[i] = Rounded<Element>::of(value);
  }
}
