// What measuring and testing matrix products needs on the device: inputs, a float64 reference, and looking
// at results. Plain code, one thread after another; nothing here is shared with the kernels under test but
// the element types of tw/base.cuh.
#include "tw/base.cuh"

using namespace tw;

struct Four { u32 x, y, z, w; };

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
__device__ Four philox(u64 counter, u64 seed) {
  Four c = {(u32)counter, (u32)(counter >> 32), 0u, 0u};
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = (u64)0xD2511F53u * c.x, p1 = (u64)0xCD9E8D57u * c.z;
    c = Four{(u32)(p1 >> 32) ^ c.y ^ k0, (u32)p1, (u32)(p0 >> 32) ^ c.w ^ k1, (u32)p0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Normal (0, 1) by Box and Muller; integers take their whole range.
template <typename T> struct Random {
  static __device__ T at(u64 index, u64 seed) {
    const Four r = philox(index >> 1, seed);
    const float u = ((float)(r.x >> 8) + 1.0f) * 0x1p-24f, v = (float)(r.y >> 8) * 0x1p-24f;
    const float radius = sqrtf(-2.0f * logf(u));
    return narrow_to<T>::from(radius * (index & 1 ? sinpif(2.0f * v) : cospif(2.0f * v)));
  }
};
template <> struct Random<signed char> {
  static __device__ signed char at(u64 index, u64 seed) { return (signed char)(philox(index, seed).x >> 24); }
};

#define WORK(i, n) for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x)

// Element (l, r, c) gets the value of its logical index, wherever it lies.
template <typename T>
__device__ void fill(T* to, i64 batch, i64 rows, i64 cols, i64 sl, i64 sr, i64 sc, u64 seed) {
  const i64 matrix = rows * cols;
  WORK(i, batch * matrix) {
    const i64 l = i / matrix, rest = i % matrix;
    // In the order of memory, so that neighbours write neighbours.
    const i64 r = sc == 1 ? rest / cols : rest % rows, c = sc == 1 ? rest % cols : rest / rows;
    to[l * sl + r * sr + c * sc] = Random<T>::at((u64)((l * rows + r) * cols + c), seed);
  }
}

// out[s, j] = sum over k of a[s's row, k] * b[k, j] in float64, for `samples` pairs (batch, row). Blocks of 256.
template <typename T>
__device__ void reference(const T* a, const T* b, const i64* samples, i64 n, i64 k, i64 sal, i64 sam, i64 sak, i64 sbl,
                          i64 sbk, i64 sbn, double* out) {
  __shared__ double sums[256];
  const i64 l = samples[2 * blockIdx.y], row = samples[2 * blockIdx.y + 1];
  const T* pa = a + l * sal + row * sam;
  const T* pb = b + l * sbl;
  // Neighbouring threads read neighbours of B.
  const bool along_n = sbn == 1;
  const int columns = along_n ? 32 : 8, lanes = 256 / columns;
  const int column = along_n ? threadIdx.x % 32 : threadIdx.x / 32, lane = along_n ? threadIdx.x / 32 : threadIdx.x % 32;
  const i64 j = (i64)blockIdx.x * columns + column;
  double sum = 0;
  if (j < n)
    for (i64 p = lane; p < k; p += lanes) sum += (double)widen(pa[p * sak]) * (double)widen(pb[p * sbk + j * sbn]);
  sums[lane * columns + column] = sum;
  __syncthreads();
  if (lane == 0 && j < n) {
    for (int other = 1; other < lanes; ++other) sum += sums[other * columns + column];
    out[(i64)blockIdx.y * n + j] = sum;
  }
}

// The same rows as tensor cores sum 8-bit floats: steps of 32 of the depth, in which products and the sum so far are
// cut, towards zero, 13 binary places below the leading digit of the largest. After every `apart` of the depth (0: never)
// the sum is put aside and a new one begins, as in kernels that promote their sums. Blocks of 256, a column a thread.
template <typename T>
__device__ void cut_sums(const T* a, const T* b, const i64* samples, i64 n, i64 k, i64 sal, i64 sam, i64 sak, i64 sbl,
                         i64 sbk, i64 sbn, i64 apart, double* out) {
  const i64 j = (i64)blockIdx.x * 256 + threadIdx.x;
  if (j >= n) return;
  const T* pa = a + samples[2 * blockIdx.y] * sal + samples[2 * blockIdx.y + 1] * sam;
  const T* pb = b + samples[2 * blockIdx.y] * sbl + j * sbn;
  double aside = 0, sum = 0;
  for (i64 step = 0; step < k; step += 32) {
    if (apart != 0 && step % apart == 0) {
      aside += sum;
      sum = 0;
    }
    const i64 end = step + 32 < k ? step + 32 : k;
    double largest = fabs(sum);
    for (i64 p = step; p < end; ++p)
      largest = fmax(largest, fabs((double)widen(pa[p * sak]) * (double)widen(pb[p * sbk])));
    if (largest == 0) continue;
    const double unit = scalbn(1.0, ilogb(largest) - 13);
    double total = trunc(sum / unit);
    for (i64 p = step; p < end; ++p)
      total += trunc((double)widen(pa[p * sak]) * (double)widen(pb[p * sbk]) / unit);
    sum = total * unit;
  }
  out[(i64)blockIdx.y * n + j] = aside + sum;
}

// Rows of a result, as float64.
template <typename T>
__device__ void gather(const T* c, const i64* samples, i64 n, i64 sl, i64 sr, i64 sc, double* out) {
  const T* p = c + samples[2 * blockIdx.y] * sl + samples[2 * blockIdx.y + 1] * sr;
  WORK(j, n) out[(i64)blockIdx.y * n + j] = (double)widen(p[j * sc]);
}

// found[0] += a digest of all elements and where they are; found[1] += how many have only ones for bits.
template <typename T>
__device__ void digest(const T* c, i64 batch, i64 rows, i64 cols, i64 sl, i64 sr, i64 sc, u64* found) {
  u64 sum = 0, untouched = 0;
  const i64 matrix = rows * cols;
  WORK(i, batch * matrix) {
    const i64 l = i / matrix, rest = i % matrix;
    const i64 r = sc == 1 ? rest / cols : rest % rows, col = sc == 1 ? rest % cols : rest / rows;
    const T bits = c[l * sl + r * sr + col * sc];
    untouched += bits == (T)~(T)0;
    u64 x = ((u64)bits + 1) * 0x9E3779B97F4A7C15ull ^ (u64)((l * rows + r) * cols + col) * 0xC2B2AE3D27D4EB4Full;
    x = (x ^ (x >> 31)) * 0xBF58476D1CE4E5B9ull;
    sum += x ^ (x >> 29);
  }
  atomicAdd(&found[0], sum);
  if (untouched != 0) atomicAdd(&found[1], untouched);
}

#define OPERAND(NAME, T)                                                                                                \
  extern "C" __global__ void fill_##NAME(T* to, i64 l, i64 r, i64 c, i64 sl, i64 sr, i64 sc, u64 seed) {                \
    fill(to, l, r, c, sl, sr, sc, seed);                                                                                \
  }                                                                                                                     \
  extern "C" __global__ void reference_##NAME(const T* a, const T* b, const i64* samples, i64 n, i64 k, i64 sal,        \
                                              i64 sam, i64 sak, i64 sbl, i64 sbk, i64 sbn, double* out) {               \
    reference(a, b, samples, n, k, sal, sam, sak, sbl, sbk, sbn, out);                                                  \
  }
#define CUT(NAME, T)                                                                                                    \
  extern "C" __global__ void cut_sums_##NAME(const T* a, const T* b, const i64* samples, i64 n, i64 k, i64 sal,         \
                                             i64 sam, i64 sak, i64 sbl, i64 sbk, i64 sbn, i64 apart, double* out) {     \
    cut_sums(a, b, samples, n, k, sal, sam, sak, sbl, sbk, sbn, apart, out);                                            \
  }
#define RESULT(NAME, T, BITS)                                                                                           \
  extern "C" __global__ void gather_##NAME(const T* c, const i64* samples, i64 n, i64 sl, i64 sr, i64 sc,               \
                                           double* out) {                                                               \
    gather(c, samples, n, sl, sr, sc, out);                                                                             \
  }                                                                                                                     \
  extern "C" __global__ void digest_##NAME(const BITS* c, i64 l, i64 r, i64 cols, i64 sl, i64 sr, i64 sc, u64* found) { \
    digest(c, l, r, cols, sl, sr, sc, found);                                                                           \
  }
OPERAND(bf16, bf16)
OPERAND(f16, f16)
OPERAND(f32, float)
OPERAND(i8, signed char)
OPERAND(f8e4m3, f8e4m3)
OPERAND(f8e5m2, f8e5m2)
CUT(f8e4m3, f8e4m3)
CUT(f8e5m2, f8e5m2)
RESULT(bf16, bf16, u16)
RESULT(f16, f16, u16)
RESULT(f32, float, u32)
RESULT(i32, int, u32)
RESULT(i8, signed char, u8)
RESULT(f8e4m3, f8e4m3, u8)
