// Helpers of printed scalar functions. NVRTC and nvcc accept them; no header is needed.

// Rounds f64 to f32 so that a second rounding to fewer digits is as if it were the only one.
__device__ __forceinline__ float tw_round_to_odd(double x) {
  const float r = __double2float_rz(x);
  const bool exact = (double)r == x || x != x;
  return exact ? r : __uint_as_float(__float_as_uint(r) | 1u);
}

// Nearest f16, ties to even.
__device__ __forceinline__ float tw_round_f16(float x) {
  float r;
  asm("{ .reg .f16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(r) : "f"(x));
  return r;
}

// Nearest bf16, ties to even (PTX ISA, "cvt"; sm_80 on).
__device__ __forceinline__ float tw_round_bf16(float x) {
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return __uint_as_float((unsigned int)r << 16);
}

// Nearest number with `digits` significant bits, no exponent below 2^low; saturates at `largest`.
__device__ __forceinline__ float tw_round_f8(float x, int digits, int low, float largest) {
  const float magnitude = fabsf(x);
  int exponent = (int)(__float_as_uint(magnitude) >> 23) - 127;
  exponent = exponent < low ? low : exponent;
  // One unit in the last place, and rounding to its multiples.
  const float unit = __uint_as_float((unsigned int)(exponent - (digits - 1) + 127) << 23);
  const float r = rintf(magnitude / unit) * unit;
  return copysignf(r > largest ? largest : r, x);
}

__device__ __forceinline__ float tw_round_f8e4m3(float x) {
  return x != x ? x : tw_round_f8(x, 4, -6, 448.0f);
}

__device__ __forceinline__ float tw_round_f8e5m2(float x) {
  return x != x || isinf(x) ? x : tw_round_f8(x, 3, -14, 57344.0f);
}

__device__ __forceinline__ signed char tw_wrap_i4(int x) {
  return (signed char)((int)((unsigned int)x << 28) >> 28);
}

__device__ __forceinline__ unsigned char tw_wrap_u4(int x) {
  return (unsigned char)(x & 15);
}

// Truncates towards zero; outside (-bound, bound) the nearest end, for NaN zero.
template <typename T, typename F>
__device__ __forceinline__ T tw_saturate(F x, double bound, T low, T high) {
  const double v = (double)x;
  if (v != v) return (T)0;
  if (v >= bound) return high;
  if (v <= (low == (T)0 ? 0.0 : -bound)) return low;
  return (T)x;
}

template <typename T>
__device__ __forceinline__ T tw_div(T a, T b) {
  if (b == (T)0) return (T)0;
  if ((T)-1 < (T)0 && b == (T)-1) return (T)(0ull - (unsigned long long)a);
  return (T)(a / b);
}

template <typename T>
__device__ __forceinline__ T tw_rem(T a, T b) {
  if (b == (T)0 || ((T)-1 < (T)0 && b == (T)-1)) return (T)0;
  return (T)(a % b);
}

// Remainder with the sign of the divisor.
template <typename T>
__device__ __forceinline__ T tw_mod(T a, T b) {
  const T r = tw_rem(a, b);
  return r != (T)0 && (r < (T)0) != (b < (T)0) ? (T)(r + b) : r;
}

__device__ __forceinline__ float tw_mod(float a, float b) {
  const float r = fmodf(a, b);
  if (r == 0.0f) return copysignf(0.0f, b);
  return (r < 0.0f) != (b < 0.0f) ? r + b : r;
}

__device__ __forceinline__ double tw_mod(double a, double b) {
  const double r = fmod(a, b);
  if (r == 0.0) return copysign(0.0, b);
  return (r < 0.0) != (b < 0.0) ? r + b : r;
}

// Integer power, wrapping; negative exponents give the truncated result.
template <typename T>
__device__ __forceinline__ T tw_pow(T a, T b) {
  if (b < (T)0) {
    if (a == (T)1) return (T)1;
    if (a == (T)-1) return (b & (T)1) ? (T)-1 : (T)1;
    return (T)0;
  }
  unsigned long long base = (unsigned long long)a, exponent = (unsigned long long)b, result = 1;
  for (; exponent != 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return (T)result;
}

template <typename T>
__device__ __forceinline__ T tw_min(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
__device__ __forceinline__ T tw_max(T a, T b) {
  return a > b ? a : b;
}

// NaN when either is; -0 is below +0. PTX ISA, "min" and "max" with .NaN (sm_80 on).
__device__ __forceinline__ float tw_min(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ float tw_max(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

__device__ __forceinline__ double tw_min(double a, double b) {
  return a != a || b != b ? a + b : fmin(a, b);
}

__device__ __forceinline__ double tw_max(double a, double b) {
  return a != a || b != b ? a + b : fmax(a, b);
}

// 2^x where that is a normal number, 0 below: one instruction (PTX ISA, "ex2").
__device__ __forceinline__ float tw_exp2_flushed(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// A shift by the width or more gives 0; a negative amount is a huge one.
template <typename T>
__device__ __forceinline__ T tw_shl(T a, T b, int bits) {
  return (unsigned long long)b < (unsigned long long)bits ? (T)((unsigned long long)a << b) : (T)0;
}

// Arithmetic for signed types: a large amount leaves only the sign.
template <typename T>
__device__ __forceinline__ T tw_shr(T a, T b, int bits) {
  const bool inside = (unsigned long long)b < (unsigned long long)bits;
  if ((T)-1 < (T)0) return (T)(a >> (inside ? b : (T)(bits - 1)));
  return inside ? (T)(a >> b) : (T)0;
}

// 1 + erf(x), which is erfc(-x): erfc(a) = 2^(-a q(a)) for a >= 0, with q fitted on [0, 4.6] for the least absolute
// error of the result, 5.5e-8, to which ex2.approx adds 2^-22 at most. Beyond, erfc is less than that anyway.
// About half of the instructions of erff, and no branch.
__device__ __forceinline__ float tw_one_plus_erf(float x) {
  const float a = fabsf(x);
  float q = fmaf(4.535861444310285e-05f, a, -0.0004455077869351953f);
  q = fmaf(q, a, 0.0014894420746713877f);
  q = fmaf(q, a, 0.0007746290066279471f);
  q = fmaf(q, a, -0.02825368009507656f);
  q = fmaf(q, a, 0.1484816074371338f);
  q = fmaf(q, a, 0.9184163808822632f);
  q = fmaf(q, a, 1.6279085874557495f);
  float rest;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(rest) : "f"(-(a * q)));
  return x < 0.0f ? rest : 2.0f - rest;
}

// 1 / (1 + e^-x). The reciprocal is within 1 ulp (PTX ISA, "rcp.approx"), and has no branch for what is rare.
__device__ __forceinline__ float tw_sigmoid(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(1.0f + expf(-x)));
  return r;
}
// 1 + tanh(x), which is 2 / (1 + e^-2x): no branch, and no digits lost where tanh is near -1.
__device__ __forceinline__ float tw_one_plus_tanh(float x) { return 2.0f * tw_sigmoid(2.0f * x); }
// The same for results of 16 bits: e^-x is one instruction on a rounded product, so that its relative error is below
// 2^-22 + |x| 2^-24, and sigmoids below 2^-126 are 0 (PTX ISA, "ex2", "rcp").
__device__ __forceinline__ float tw_sigmoid_short(float x) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return r;
}
__device__ __forceinline__ float tw_one_plus_tanh_short(float x) { return 2.0f * tw_sigmoid_short(2.0f * x); }
__device__ __forceinline__ double tw_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
