// Attention of one token per sequence over a cache: a cluster of blocks shares some heads of queries that read the same keys, each
// block has a part of the positions, and they put their sums together in shared memory.
//
// All positions but the last were written by earlier steps: their keys and values are on the way to registers while the kernel
// before still runs. When it is done, only queries and the last position are missing.
//
// A position is read by TW_WIDTH / 8 neighbouring threads. Sums are put together in a fixed order: threads of a warp, warps, blocks.
//
// Numbers come as definitions: TW_POSITIONS in the cache, TW_HEADS, TW_KV_HEADS, TW_WIDTH of a head, TW_PARTS (blocks of a
// cluster), TW_TOGETHER heads of a block, its TW_THREADS, TW_HALF (the cache is float16, else bfloat16).

#define TW_INLINE __device__ __forceinline__

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

constexpr int THREADS = TW_THREADS, WARPS = THREADS / 32, SOME = TW_TOGETHER, SETS = TW_HEADS / SOME;
// Threads that share a position, positions of a block at a time, and how many of them a thread has under way.
constexpr int ALONG = TW_WIDTH / 8, GROUPS = THREADS / ALONG, DEEP = 3;
// Of a warp: sums, their maximum, what exponentials add up to.
constexpr int MERGED = TW_WIDTH + 2;
// Numbers that a block finishes.
constexpr int OWN = SOME * TW_WIDTH / TW_PARTS;
#define NOTHING __int_as_float((int)0xff800000)

#if TW_HALF
TW_INLINE float low(u32 pair) {
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(pair));
  return x;
}
TW_INLINE float high(u32 pair) { return low(pair >> 16); }
#else
TW_INLINE float low(u32 pair) { return __uint_as_float(pair << 16); }
TW_INLINE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif
TW_INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What a maximum is taken off: of nothing, all factors are zero.
TW_INLINE float base_of(float most) { return most == NOTHING ? 0.0f : most; }
TW_INLINE u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// PTX ISA, "mapa" and "st.async": to the same place in shared memory of another block of the cluster, whose barrier counts bytes.
TW_INLINE void give(u32 place, u32 barrier, int block, float value, float most, float weight) {
  asm volatile(
      "{.reg .b32 there, bar; mapa.shared::cluster.u32 there, %0, %2; mapa.shared::cluster.u32 bar, %1, %2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %5}, [bar];}" ::"r"(place),
      "r"(barrier), "r"(block), "f"(value), "f"(most), "f"(weight)
      : "memory");
}
// Waits are bounded, at minutes: a fault ends the launch and not the machine.
TW_INLINE void wait_for(u32 barrier) {
#pragma unroll 1
  for (u32 i = 0; i < 1u << 28; ++i) {
    u32 done;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
    if (done) return;
  }
  __trap();
}

// A token sees `window` positions, its own included; `scale` comes with log2 e.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_attend(const float* queries, const u16* keys, const u16* values, float* mixed, const int* live_at, i64 window, float scale) {
  __shared__ float warps[SOME][WARPS][MERGED];
  // Of every block: value, maximum and sum for the numbers that this block finishes; and what counts their bytes.
  __shared__ float4 parts[TW_PARTS][OWN];
  __shared__ __align__(8) unsigned long long all_parts;
  // PTX ISA, "griddepcontrol": the next kernel may start, and asks for its weights.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(&all_parts)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(&all_parts)), "n"(TW_PARTS * OWN * 16) : "memory");
  }
  // PTX ISA, "barrier.cluster": nobody writes to a block that has not begun.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  const int part = blockIdx.x % TW_PARTS, set = blockIdx.x / TW_PARTS % SETS, row = blockIdx.x / TW_PARTS / SETS;
  const int head = set * SOME, sub = threadIdx.x % ALONG, group = threadIdx.x / ALONG, warp = threadIdx.x / 32;
  const i64 cache = ((i64)row * TW_KV_HEADS + head / (TW_HEADS / TW_KV_HEADS)) * TW_POSITIONS * TW_WIDTH + sub * 8;
  const int position = *live_at, seen = position + 1, first = (int)max((i64)0, seen - window);
  const int length = (seen - first + TW_PARTS - 1) / TW_PARTS;
  const int begin = first + part * length, end = min(seen, begin + length);

  uint4 k[DEEP], v[DEEP];
  auto load = [&](int at, int from, int to) {
#pragma unroll
    for (int j = 0; j < DEEP; ++j) {
      const int p = at + group + j * GROUPS;
      if (from <= p && p < to) {
        k[j] = __ldcg((const uint4*)(keys + cache + (i64)p * TW_WIDTH));
        v[j] = __ldcg((const uint4*)(values + cache + (i64)p * TW_WIDTH));
      }
    }
  };
#pragma unroll
  for (int j = 0; j < DEEP; ++j) k[j] = v[j] = make_uint4(0, 0, 0, 0);
  load(begin, begin, min(end, position));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  load(begin, position, end);
  float q[SOME][8], sum[SOME][8] = {}, most[SOME], all[SOME] = {};
#pragma unroll
  for (int e = 0; e < SOME; ++e) {
    most[e] = NOTHING;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 x = __ldcg((const float4*)(queries + ((i64)row * TW_HEADS + head + e) * TW_WIDTH + sub * 8 + i));
      q[e][i] = x.x * scale, q[e][i + 1] = x.y * scale, q[e][i + 2] = x.z * scale, q[e][i + 3] = x.w * scale;
    }
  }
  // Every thread takes as many turns.
  for (int at = begin; at < end; at += DEEP * GROUPS) {
    if (at > begin) load(at, at, end);
#pragma unroll
    for (int e = 0; e < SOME; ++e) {
      float scores[DEEP], top = most[e];
#pragma unroll
      for (int j = 0; j < DEEP; ++j) {
        const u32 w[4] = {k[j].x, k[j].y, k[j].z, k[j].w};
        float even = 0, odd = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          even = fmaf(low(w[i]), q[e][2 * i], even);
          odd = fmaf(high(w[i]), q[e][2 * i + 1], odd);
        }
        scores[j] = even + odd;
      }
#pragma unroll
      for (int j = 0; j < DEEP; ++j) {
#pragma unroll
        for (int o = 1; o < ALONG; o *= 2) scores[j] += __shfl_xor_sync(~0u, scores[j], o);
      }
#pragma unroll
      for (int j = 0; j < DEEP; ++j) {
        if (at + group + j * GROUPS >= end) scores[j] = NOTHING;
        top = fmaxf(top, scores[j]);
      }
      const float base = base_of(top), factor = exp2_of(most[e] - base);
      most[e] = top;
      all[e] *= factor;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[e][i] *= factor;
#pragma unroll
      for (int j = 0; j < DEEP; ++j) {
        const u32 w[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        const float weight = exp2_of(scores[j] - base);
        all[e] += weight;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[e][2 * i] = fmaf(low(w[i]), weight, sum[e][2 * i]);
          sum[e][2 * i + 1] = fmaf(high(w[i]), weight, sum[e][2 * i + 1]);
        }
      }
    }
  }
  // The groups of a warp, and then the warps.
#pragma unroll
  for (int e = 0; e < SOME; ++e) {
    float top = most[e];
#pragma unroll
    for (int o = ALONG; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    const float factor = exp2_of(most[e] - base_of(top));
    all[e] *= factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[e][i] *= factor;
#pragma unroll
    for (int o = ALONG; o < 32; o *= 2) {
      all[e] += __shfl_xor_sync(~0u, all[e], o);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[e][i] += __shfl_xor_sync(~0u, sum[e][i], o);
    }
    float* mine = warps[e][warp];
    if (threadIdx.x % 32 < ALONG) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[sub * 8 + i] = sum[e][i];
      if (sub == 0) mine[TW_WIDTH] = top, mine[TW_WIDTH + 1] = all[e];
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int i = threadIdx.x; i < SOME * TW_WIDTH; i += THREADS) {
    const int e = i / TW_WIDTH, d = i % TW_WIDTH;
    float top = NOTHING, weight = 0, value = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, warps[e][w][TW_WIDTH]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float factor = exp2_of(warps[e][w][TW_WIDTH] - base_of(top));
      weight = fmaf(warps[e][w][TW_WIDTH + 1], factor, weight);
      value = fmaf(warps[e][w][d], factor, value);
    }
    give(shared(&parts[part][i % OWN]), shared(&all_parts), i / OWN, value, top, weight);
  }
  for (int i = threadIdx.x; i < OWN; i += THREADS) {
    wait_for(shared(&all_parts));
    float top = NOTHING, weight = 0, value = 0;
#pragma unroll
    for (int p = 0; p < TW_PARTS; ++p) top = fmaxf(top, parts[p][i].y);
#pragma unroll
    for (int p = 0; p < TW_PARTS; ++p) {
      const float4 x = parts[p][i];
      const float factor = exp2_of(x.y - base_of(top));
      weight = fmaf(x.z, factor, weight);
      value = fmaf(x.x, factor, value);
    }
    __stcg(mixed + ((i64)row * TW_HEADS + head) * TW_WIDTH + part * OWN + i, value / weight);
  }
}
