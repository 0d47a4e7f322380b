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

constexpr int THREADS = 256;
// Packs of eight elements that a thread has under way.
constexpr int PACKS = 2;

struct alignas(16) Pack { Element at[8]; };

TW_INLINE Pack load_pack(const Element* from, i64 i, i64 n) {
  if (i + 8 <= n) return *reinterpret_cast<const Pack*>(from + i);
  Pack r = {};
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (i + k < n) r.at[k] = from[i + k];
  return r;
}

extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const Element* x, const Element* residual, Element* y, const u64* key, u32 threshold, double scale, i64 n) {
  const i64 first = (i64)blockIdx.x * (PACKS * 8 * THREADS) + threadIdx.x * 8;
  Pack a[PACKS], r[PACKS];
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const i64 i = first + j * 8 * THREADS;
    a[j] = load_pack(x, i, n);
    if (residual != nullptr) r[j] = load_pack(residual, i, n);
  }
  const u64 k = *key;
  const Wide by = (Wide)scale;
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const i64 i = first + j * 8 * THREADS;
    if (i >= n) return;
    Pack out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words words = philox((u64)i / 4 + half, k);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int at = half * 4 + c;
        Wide value = words.at[c] >= threshold ? (Wide)wide_of(a[j].at[at]) * by : (Wide)0;
        if (residual != nullptr) value += (Wide)wide_of(r[j].at[at]);
        out.at[at] = Rounded<Element>::of(value);
      }
    }
    if (i + 8 <= n) {
      *reinterpret_cast<Pack*>(y + i) = out;
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (i + c < n) y[i + c] = out.at[c];
    }
  }
}
