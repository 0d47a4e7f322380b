// Dropout of a tensor, plus a residual.
//
// Element i stays where word i % 4 of Philox4x32-10 at counter i / 4 is at least `threshold`. The key is read from the
// device: PyTorch's generator has drawn it, so that a recorded launch draws a new one each time.
#include "tw/element.cuh"

using namespace tw;

struct Words { u32 at[4]; };

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
TW_INLINE Words philox(u64 counter, u64 key) {
  u32 x = (u32)counter, y = (u32)(counter >> 32), z = 0, w = 0;
  u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 p = (u64)0xD2511F53u * x, q = (u64)0xCD9E8D57u * z;
    x = (u32)(q >> 32) ^ y ^ k0, y = (u32)q, z = (u32)(p >> 32) ^ w ^ k1, w = (u32)p;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return Words{{x, y, z, w}};
}

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const Element* x, const Element* residual, Element* y, const u64* key, u32 threshold, double scale, i64 n) {
  const u64 k = *key;
  const i64 first = (i64)blockIdx.x * (THREADS * 8) + threadIdx.x * 4;
  Four<Element> a[2], r[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const i64 i = first + j * THREADS * 4;
    a[j] = load_four(x, i, n, true);
    if (residual != nullptr) r[j] = load_four(residual, i, n, true);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const i64 i = first + j * THREADS * 4;
    if (i >= n) return;
    const Words words = philox((u64)i / 4, k);
    Four<Element> out;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      Wide value = words.at[c] >= threshold ? (Wide)wide_of(a[j].at[c]) * (Wide)scale : (Wide)0;
      if (residual != nullptr) value += (Wide)wide_of(r[j].at[c]);
      out.at[c] = Rounded<Element>::of(value);
    }
    store_four(y, i, n, true, out);
  }
}

