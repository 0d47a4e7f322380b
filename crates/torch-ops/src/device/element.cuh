// The element type of a kernel of the operator pack, and moving four elements at a time.
//
// `TW_ELEMENT` says how elements lie in memory: 0 float, 1 bfloat16, 2 half, 3 double. Arithmetic is in `Wide`: double for
// double, float for the rest.
#pragma once
#include "tw/base.cuh"

#ifndef TW_ELEMENT
#error "TW_ELEMENT is not set"
#endif

namespace tw {

#if TW_ELEMENT == 0
using Element = float;
using Wide = float;
#elif TW_ELEMENT == 1
using Element = bf16;
using Wide = float;
#elif TW_ELEMENT == 2
using Element = f16;
using Wide = float;
#else
using Element = double;
using Wide = double;
#endif

TW_INLINE float wide_of(float x) { return x; }
TW_INLINE double wide_of(double x) { return x; }
TW_INLINE float wide_of(bf16 x) { return widen(x); }
TW_INLINE float wide_of(f16 x) { return widen(x); }

template <typename T> struct Rounded {
  static TW_INLINE T of(Wide x) { return narrow_to<T>::from((float)x); }
};
template <> struct Rounded<float> {
  static TW_INLINE float of(Wide x) { return (float)x; }
};
template <> struct Rounded<double> {
  static TW_INLINE double of(Wide x) { return (double)x; }
};

// What every kernel begins with: the next one may start as the blocks of this one run out, and this one waits for the end of the
// one before, which it may have started beside (PTX ISA, "griddepcontrol").
TW_INLINE void begin_behind_others() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Four neighbours, at a multiple of their size.
template <typename T> struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Four { T at[4]; };

// Elements i to i + 3 of an array of `n`; `vector` says that it starts at a multiple of 16 bytes and i is one of four.
template <typename T> TW_INLINE Four<T> load_four(const T* from, i64 i, i64 n, bool vector) {
  if (vector && i + 4 <= n) return *reinterpret_cast<const Four<T>*>(from + i);
  Four<T> r = {};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (i + k < n) r.at[k] = from[i + k];
  return r;
}

template <typename T> TW_INLINE void store_four(T* to, i64 i, i64 n, bool vector, const Four<T>& r) {
  if (vector && i + 4 <= n) {
    *reinterpret_cast<Four<T>*>(to + i) = r;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (i + k < n) to[i + k] = r.at[k];
}

}  // namespace tw
