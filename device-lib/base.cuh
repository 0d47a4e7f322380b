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

// Cache operator of 16-byte loads of streams: none, or ".L1::no_allocate" where nothing as large is stored. PTX ISA, "ld".
#ifndef TW_LOAD_CACHE
#define TW_LOAD_CACHE ""
#endif
// As what threads are numbered in lines: with a sign or without.
#ifndef TW_THREAD
#define TW_THREAD int
#endif

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

template <typename T, int N> TW_INLINE Run<T, N> load_run(const T* p) { return *reinterpret_cast<const Run<T, N>*>(p); }
template <typename T, int N> TW_INLINE void store_run(T* p, const Run<T, N>& v) { *reinterpret_cast<Run<T, N>*>(p) = v; }

template <typename T> struct is_bf16 { static constexpr bool yes = false; };
template <> struct is_bf16<bf16> { static constexpr bool yes = true; };
template <typename T> struct is_f16 { static constexpr bool yes = false; };
template <> struct is_f16<f16> { static constexpr bool yes = true; };
template <typename T> struct is_f8 { static constexpr bool yes = false; };
template <> struct is_f8<f8e4m3> { static constexpr bool yes = true; };
template <> struct is_f8<f8e5m2> { static constexpr bool yes = true; };
template <typename T> struct is_integer_byte { static constexpr bool yes = false; };
template <> struct is_integer_byte<signed char> { static constexpr bool yes = true; };
template <> struct is_integer_byte<u8> { static constexpr bool yes = true; };

// A run as 32-bit words; `words` of fewer than 4 bytes hold it in their low part.
template <typename T, int N> union RunWords {
  static constexpr int WORDS = (sizeof(T) * N + 3) / 4;
  Run<T, N> run;
  u32 words[WORDS];
  TW_INLINE RunWords() {}
};

// Elements k and k + 1 of a run, converted by one instruction where there is one, and kept as one word then.
template <typename T, int N> TW_INLINE void set_pair(RunWords<T, N>& r, int k, value<T> x, value<T> y) {
  if constexpr (is_bf16<T>::yes) {
    r.words[k / 2] = pack_bf16(x, y);
  } else if constexpr (is_f16<T>::yes) {
    r.words[k / 2] = pack_f16(x, y);
  } else {
    const Pair<T> p = narrow_pair<T>(x, y);
    r.run.at[k] = p.x, r.run.at[k + 1] = p.y;
  }
}

// A run where `inside` holds, else `fill`: one predicated access, so that a thread may start many before it waits.
// Streams may pass by the first-level cache (TW_LOAD_CACHE), unless they are KEPT for other rows. PTX ISA, "ld".
template <typename T, int N, bool KEPT = false> TW_INLINE RunWords<T, N> load_words_if(bool inside, const T* p, T fill) {
  RunWords<T, N> r;
#pragma unroll
  for (int i = 0; i < N; ++i) r.run.at[i] = fill;
  constexpr int BYTES = (int)sizeof(T) * N;
  static_assert(BYTES == 1 || BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "no access of this width");
  if constexpr (BYTES == 16 && KEPT) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(r.words[0]), "+r"(r.words[1]), "+r"(r.words[2]), "+r"(r.words[3]) : "l"(p), "r"((int)inside));
  } else if constexpr (BYTES == 16) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q ld.global" TW_LOAD_CACHE ".v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(r.words[0]), "+r"(r.words[1]), "+r"(r.words[2]), "+r"(r.words[3]) : "l"(p), "r"((int)inside));
  } else if constexpr (BYTES == 8) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %3, 0; @q ld.global.v2.b32 {%0, %1}, [%2]; }"
                 : "+r"(r.words[0]), "+r"(r.words[1]) : "l"(p), "r"((int)inside));
  } else if constexpr (BYTES == 4) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q ld.global.b32 %0, [%1]; }"
                 : "+r"(r.words[0]) : "l"(p), "r"((int)inside));
  } else if constexpr (BYTES == 2) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q ld.global.u16 %0, [%1]; }"
                 : "+r"(r.words[0]) : "l"(p), "r"((int)inside));
  } else {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; @q ld.global.u8 %0, [%1]; }"
                 : "+r"(r.words[0]) : "l"(p), "r"((int)inside));
  }
  return r;
}
template <typename T, int N> TW_INLINE Run<T, N> load_run_if(bool inside, const T* p, T fill) {
  return load_words_if<T, N>(inside, p, fill).run;
}

// Two neighbouring 8-bit floats as a pair of f16, exactly. PTX ISA, "cvt".
#if __CUDA_ARCH__ >= 890
template <typename T> TW_INLINE u32 widen_pair(u16 pair);
template <> TW_INLINE u32 widen_pair<f8e4m3>(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
template <> TW_INLINE u32 widen_pair<f8e5m2>(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
#endif

// Element k of a run as registers hold it. Elements of one or two bytes are taken from their word, 8-bit floats in
// pairs: one conversion serves both neighbours.
template <typename T, int N> TW_INLINE value<T> widen_at(const RunWords<T, N>& r, int k) {
  if constexpr (N % 2 == 0 && is_bf16<T>::yes) {
    const u32 word = r.words[k / 2];
    return __uint_as_float(k % 2 != 0 ? word & 0xffff0000u : word << 16);
  } else if constexpr (N % 4 == 0 && is_integer_byte<T>::yes) {
    return (T)(r.words[k / 4] >> (k % 4 * 8));
#if __CUDA_ARCH__ >= 890
  } else if constexpr (N % 4 == 0 && is_f8<T>::yes) {
    const u32 pair = widen_pair<T>((u16)(r.words[k / 4] >> (k % 4 / 2 * 16)));
    return widen(f16{(u16)(k % 2 != 0 ? pair >> 16 : pair)});
#endif
  } else {
    return widen(r.run.at[k]);
  }
}

// Writes a run where `inside` holds. PTX ISA, "st".
template <typename T, int N> TW_INLINE void store_run_if(bool inside, T* p, const RunWords<T, N>& r) {
  constexpr int BYTES = (int)sizeof(T) * N;
  static_assert(BYTES == 1 || BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "no access of this width");
  if constexpr (BYTES == 16) {
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0; @q st.global.v4.b32 [%4], {%0, %1, %2, %3}; }" ::"r"(r.words[0]),
                 "r"(r.words[1]), "r"(r.words[2]), "r"(r.words[3]), "l"(p), "r"((int)inside) : "memory");
  } else if (inside) {
    *reinterpret_cast<Run<T, N>*>(p) = r.run;
  }
}

// The elements of a run that a line of `extent` elements has, of which the first would be element `at`; others keep what
// they are.
template <typename T, int N> TW_INLINE void load_edge(RunWords<T, N>& r, const T* p, int at, int extent) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (at + k >= 0 && at + k < extent) r.run.at[k] = p[k];
  }
}
// A run that begins anywhere in a line of `extent` elements: the two aligned runs that it lies in, of which each is read
// where the line has all of it. The line begins at a multiple of a run.
template <typename T, int N> struct TwoRuns {
  RunWords<T, N> low, high;
  int first, shift;
  TW_INLINE TwoRuns() {}
};
template <typename T, int N, bool KEPT> TW_INLINE TwoRuns<T, N> load_two_runs(const T* line, int at, int extent, T fill) {
  TwoRuns<T, N> r;
  r.shift = at & (N - 1), r.first = at - r.shift;
  const int next = r.first + N;
  r.low = load_words_if<T, N, KEPT>(r.first >= 0 && next <= extent, line + r.first, fill);
  r.high = load_words_if<T, N, KEPT>(r.shift != 0 && next >= 0 && next + N <= extent, line + next, fill);
  return r;
}
// What the line has of a run that it ends within.
template <typename T, int N> TW_INLINE void load_two_edges(TwoRuns<T, N>& r, const T* line, int extent) {
  const int next = r.first + N;
  if (r.first >= 0 && r.first < extent && next > extent) load_edge<T, N>(r.low, line + r.first, r.first, extent);
  if (r.shift != 0 && next >= 0 && next < extent && next + N > extent) load_edge<T, N>(r.high, line + next, next, extent);
}
// The run itself: by two words, by one, by half of one, where the shift has that power of two.
template <typename T, int N> TW_INLINE RunWords<T, N> between(const TwoRuns<T, N>& two) {
  static_assert(sizeof(T) * N == 16 && (sizeof(T) == 2 || sizeof(T) == 4), "runs of 16 bytes");
  constexpr int A_WORD = 4 / (int)sizeof(T);
  u32 w[8];
#pragma unroll
  for (int k = 0; k < 4; ++k) w[k] = two.low.words[k], w[4 + k] = two.high.words[k];
  const bool by_two = (two.shift & 2 * A_WORD) != 0, by_one = (two.shift & A_WORD) != 0;
#pragma unroll
  for (int k = 0; k < 6; ++k) w[k] = by_two ? w[k + 2] : w[k];
#pragma unroll
  for (int k = 0; k < 5; ++k) w[k] = by_one ? w[k + 1] : w[k];
  RunWords<T, N> r;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (A_WORD == 2) r.words[k] = __funnelshift_r(w[k], w[k + 1], (two.shift & 1) * 16);
    else r.words[k] = w[k];
  }
  return r;
}
template <typename T, int N> TW_INLINE void store_edge(T* p, int at, int extent, const RunWords<T, N>& r) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (at + k >= 0 && at + k < extent) p[k] = r.run.at[k];
  }
}

}  // namespace tw
