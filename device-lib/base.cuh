// Types and small helpers. NVRTC and nvcc accept these files; no other header is needed.
//
// Convention: everything is in namespace tw; wrappers of one instruction carry its PTX name and cite
// the section of the PTX ISA that defines it. Shared memory is addressed by 32-bit shared-window
// addresses (`smem_t`), global memory by pointers.
#pragma once

namespace tw {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using smem_t = u32;

#define TW_INLINE __device__ __forceinline__

// Element types as they lie in memory. Arithmetic happens in float.
struct alignas(2) bf16 { u16 bits; };
struct alignas(2) f16 { u16 bits; };
struct f8e4m3 { u8 bits; };
struct f8e5m2 { u8 bits; };

// What the driver fills in (cuTensorMapEncodeTiled); opaque here.
struct alignas(64) TensorMap { u64 opaque[16]; };

TW_INLINE smem_t smem_address(const void* p) { return (smem_t)__cvta_generic_to_shared(p); }

TW_INLINE int lane() { return (int)(threadIdx.x & 31u); }
TW_INLINE int warp() { return __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0); }

// True in one thread of the (converged) warp; always the same one. PTX ISA, "elect.sync".
TW_INLINE bool elect_one() {
#if __CUDA_ARCH__ >= 900
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
#else
  return lane() == 0;
#endif
}

// Integer division rounding down, for a positive divisor.
TW_INLINE int floor_div(int a, int b) { const int q = a / b; return a % b < 0 ? q - 1 : q; }
TW_INLINE int floor_mod(int a, int b) { const int r = a % b; return r < 0 ? r + b : r; }
TW_INLINE i64 floor_div(i64 a, i64 b) { const i64 q = a / b; return a % b < 0 ? q - 1 : q; }
TW_INLINE i64 floor_mod(i64 a, i64 b) { const i64 r = a % b; return r < 0 ? r + b : r; }

// Conversions. PTX ISA, "cvt"; packed forms take the upper half first.
TW_INLINE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
TW_INLINE u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#if __CUDA_ARCH__ >= 890
TW_INLINE u16 pack_f8e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
TW_INLINE u16 pack_f8e5m2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
#endif

// `value<T>`: how an element of T is held in a register; `load`, `store`: one element.
template <typename T> struct held { using type = T; };
template <> struct held<bf16> { using type = float; };
template <> struct held<f16> { using type = float; };
template <> struct held<f8e4m3> { using type = float; };
template <> struct held<f8e5m2> { using type = float; };
template <typename T> using value = typename held<T>::type;

template <typename T> TW_INLINE T widen(T x) { return x; }
TW_INLINE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
TW_INLINE float widen(f16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
#if __CUDA_ARCH__ >= 890
TW_INLINE float widen(f8e4m3 x) {
  u32 pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((u16)x.bits));
  return widen(f16{(u16)pair});
}
TW_INLINE float widen(f8e5m2 x) {
  u32 pair;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(pair) : "h"((u16)x.bits));
  return widen(f16{(u16)pair});
}
#endif

template <typename T> struct narrow_to { static TW_INLINE T from(T x) { return x; } };
template <> struct narrow_to<bf16> {
  static TW_INLINE bf16 from(float x) { return bf16{(u16)pack_bf16(x, 0.0f)}; }
};
template <> struct narrow_to<f16> {
  static TW_INLINE f16 from(float x) { return f16{(u16)pack_f16(x, 0.0f)}; }
};
#if __CUDA_ARCH__ >= 890
template <> struct narrow_to<f8e4m3> {
  static TW_INLINE f8e4m3 from(float x) { return f8e4m3{(u8)pack_f8e4m3(x, 0.0f)}; }
};
template <> struct narrow_to<f8e5m2> {
  static TW_INLINE f8e5m2 from(float x) { return f8e5m2{(u8)pack_f8e5m2(x, 0.0f)}; }
};
#endif

// Two neighbouring elements as they lie in memory.
template <typename T> struct alignas(2 * sizeof(T)) Pair { T x, y; };
template <typename T> TW_INLINE Pair<T> narrow_pair(value<T> x, value<T> y) {
  return Pair<T>{narrow_to<T>::from(x), narrow_to<T>::from(y)};
}
template <> TW_INLINE Pair<bf16> narrow_pair<bf16>(float x, float y) {
  const u32 r = pack_bf16(x, y);
  return Pair<bf16>{bf16{(u16)r}, bf16{(u16)(r >> 16)}};
}
template <> TW_INLINE Pair<f16> narrow_pair<f16>(float x, float y) {
  const u32 r = pack_f16(x, y);
  return Pair<f16>{f16{(u16)r}, f16{(u16)(r >> 16)}};
}
#if __CUDA_ARCH__ >= 890
template <> TW_INLINE Pair<f8e4m3> narrow_pair<f8e4m3>(float x, float y) {
  const u16 r = pack_f8e4m3(x, y);
  return Pair<f8e4m3>{f8e4m3{(u8)r}, f8e4m3{(u8)(r >> 8)}};
}
template <> TW_INLINE Pair<f8e5m2> narrow_pair<f8e5m2>(float x, float y) {
  const u16 r = pack_f8e5m2(x, y);
  return Pair<f8e5m2>{f8e5m2{(u8)r}, f8e5m2{(u8)(r >> 8)}};
}
#endif

// A run of N neighbouring elements, moved by one access.
template <typename T, int N> struct alignas(sizeof(T) * N) Run { T at[N]; };

// Read once, written once: keep neither in the caches. PTX ISA, "Cache operators".
template <typename T, int N> TW_INLINE Run<T, N> load_run(const T* p) { return *reinterpret_cast<const Run<T, N>*>(p); }
template <typename T, int N> TW_INLINE void store_run(T* p, const Run<T, N>& v) { *reinterpret_cast<Run<T, N>*>(p) = v; }

}  // namespace tw
