// A step of a decoder up to its logits, in one launch: weights stream through shared memory without a pause while the blocks
// meet between the parts of a layer.
//
//   embed | per layer: qkv | attention | o | gate_up | down | head          (| : all blocks meet)
//
// Each warp has a ring of slots of its own, 16 lines of a matrix by 256 columns each, filled by the copy engine. What it reads
// next depends on sizes alone, so a slot is filled anew as soon as it was read, in the order of all products of the step: while
// blocks wait for each other, or attend, the weights of what follows arrive. Lines go around the blocks across products, so
// that every block has the same share in the end.
//
// A warp has every eighth 256 columns of the depth, and 16 lines at a time: they are the rows of `mma.m16n8k16`, sequences
// are its columns. Vectors are f32 rounded to two bfloat16 each (17 bits), and multiplied one after the other. Sums of the
// warps are added in the order of the warps, parts of attention in their order: results do not depend on who was first.
//
// Numbers of the model come as definitions: TW_ROWS sequences, TW_POSITIONS in the cache, TW_HIDDEN, TW_INNER, TW_LAYERS,
// TW_HEADS, TW_KV_HEADS, TW_WIDTH of a head, TW_VOCABULARY, TW_PARTS of attention, TW_EPS, TW_SCALE (with log2 e),
// TW_GAIN_F32 (gains of norms are f32, else bfloat16), TW_SPLIT (products may be cut along the depth, so that a block reads few
// of many vectors). TW_BLOCKS: of the launch, all of which run at once.

#define TW_INLINE __device__ __forceinline__

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
#if TW_GAIN_F32
using Gain = float;
#else
using Gain = u16;
#endif

constexpr int WARPS = 8, THREADS = WARPS * 32, SLOTS = 3, COLS = 256;
// Lines of a slot lie in pairs, so that the eight threads of an access find all banks.
constexpr int PAIR = 4 * COLS + 64, SECOND = 2 * COLS + 64, SLOT = 8 * PAIR;
// Columns of a product of tensor cores: sequences, eight by eight.
constexpr int TILES = (TW_ROWS + 7) / 8;
constexpr int UNITS = TW_HIDDEN / 16, PRODUCTS = 4 * TW_LAYERS + 1;
// Threads that share a position of the cache, and positions of a block at a time.
constexpr int ALONG = TW_WIDTH / 8, GROUPS = THREADS / ALONG, MERGED = TW_WIDTH + 2;
constexpr int SUMS = 2 * THREADS * 4 * TILES, MERGE = GROUPS * MERGED;
constexpr int SCRATCH = SUMS > MERGE ? SUMS : MERGE;
#define NOTHING __int_as_float((int)0xff800000)

// What products do at their ends.
enum Kind { QKV, OUT, GATE_UP, DOWN, HEAD };

// A product: lines `group / per * jump + group % per * 8` and the seven behind them, of two planes. A unit is a group in one of `parts`
// of the depth, parts innermost: a block mostly keeps to one of them. The first unit is of block `first`.
struct Product {
  const u16 *w0, *w1;
  int depth, units, per, jump, first, kind, layer, parts;
  TW_INLINE int group(int unit) const { return TW_SPLIT ? unit / parts : unit; }
  // Where the pieces of a unit begin, and how many there are.
  TW_INLINE int begin(int unit) const { return TW_SPLIT ? unit % parts * pieces() : 0; }
  TW_INLINE int pieces() const { return TW_SPLIT ? depth / parts / COLS : depth / COLS; }
};
struct Layer {
  u16 *keys, *values;
  const Gain *post, *next;
  // Of queries, keys and values, or none; positions that a token sees, its own included.
  const u16* bias;
  i64 window;
};
struct Step {
  const Product* products;
  const Layer* layers;
  const u16* table;
  const Gain* gain;
  const float *cosines, *sines;
  const int *at, *tokens;
  float* x;
  u16 *hi, *lo, *inner_hi, *inner_lo, *mixed_hi, *mixed_lo;
  float *q, *parts, *maxima, *sums, *squares, *logits;
  // Sums of parts of the depth, 16 bytes of each thread of a warp a unit and eight sequences.
  float4* partial;
  // Zeros between launches: one a head, one a group of lines, and one a meeting (128 bytes apart).
  u32 *arrived, *counted, *met;
};

TW_INLINE u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
TW_INLINE float wide(u16 x) { return __uint_as_float((u32)x << 16); }
TW_INLINE float wide(float x) { return x; }
TW_INLINE float low(u32 pair) { return __uint_as_float(pair << 16); }
TW_INLINE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
TW_INLINE u16 narrow(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
TW_INLINE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A number as the sum of two of 8 bits each.
TW_INLINE void split(float x, u16* hi, u16* lo) {
  const u16 h = narrow(x);
  __stcg(hi, h);
  __stcg(lo, narrow(x - wide(h)));
}
TW_INLINE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Waits are bounded, at minutes: a fault ends the launch and not the machine.
constexpr u32 PATIENCE = 1u << 28;
TW_INLINE void wait_for(u32 barrier, u32 parity) {
  for (u32 i = 0; i < PATIENCE; ++i) {
    u32 done;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
  }
  __trap();
}

// The slots of a warp in the order in which it reads them; `source` is the line of this thread.
struct Walk {
  const Product* products;
  const u16* source;
  int product, unit, piece, end, depth, units;

  TW_INLINE void line(int warp, int lane) {
    const Product& p = products[product];
    const int group = p.group(unit), first = group / p.per * p.jump + group % p.per * 8;
    piece = p.begin(unit) + warp, end = p.begin(unit) + p.pieces();
    source = (lane < 8 ? p.w0 : p.w1) + (i64)(first + (lane & 7)) * depth;
  }
  // The first unit from here on of which this warp has a piece.
  TW_INLINE void settle(int warp, int lane) {
    while (unit >= units) {
      if (++product >= PRODUCTS) return;
      const Product& p = products[product];
      depth = p.depth, units = p.pieces() > warp ? p.units : 0;
      unit = (int)blockIdx.x - p.first;
      if (unit < 0) unit += TW_BLOCKS;
    }
    line(warp, lane);
  }
  TW_INLINE void next(int warp, int lane) {
    piece += WARPS;
    if (piece < end) return;
    unit += TW_BLOCKS;
    settle(warp, lane);
  }
  // Sixteen threads ask for a line each.
  TW_INLINE void fetch(u32 to, u32 barrier, int warp, int lane) {
    if (product >= PRODUCTS) return;
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(16 * COLS * 2) : "memory");
    __syncwarp();
    if (lane < 16)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       to + lane / 2 * PAIR + lane % 2 * SECOND),
                   "l"(source + piece * COLS), "n"(COLS * 2), "r"(barrier)
                   : "memory");
    next(warp, lane);
  }
};

// All blocks have come so far, and see what the others have written.
TW_INLINE void meet(const Step& s, int meeting) {
  __syncthreads();
  if (threadIdx.x == 0) {
    u32* met = s.met + 32 * meeting;
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(met) : "memory");
    u32 i = 0, count = 0;
    for (; i < PATIENCE && count < TW_BLOCKS; ++i)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(met) : "memory");
    if (i == PATIENCE) __trap();
    // Nobody waits for the one before any more.
    if (blockIdx.x == 0 && meeting > 0) s.met[32 * (meeting - 1)] = 0;
  }
  __syncthreads();
}

// Heads of queries, cut into parts of the cache; whoever is last with a head combines its parts.
TW_INLINE void attend(const Step& s, const Layer& layer, float* scratch, u32* last, int position) {
  const int sub = threadIdx.x % ALONG, group = threadIdx.x / ALONG, d = threadIdx.x;
  const int seen = position + 1, first = (int)max((i64)0, seen - layer.window);
  const int length = (seen - first + TW_PARTS - 1) / TW_PARTS;
  for (int item = blockIdx.x; item < TW_ROWS * TW_HEADS * TW_PARTS; item += TW_BLOCKS) {
    const int part = item % TW_PARTS, whole = item / TW_PARTS, head = whole % TW_HEADS, row = whole / TW_HEADS;
    const int begin = first + part * length, end = min(seen, begin + length);
    const i64 cache = ((i64)row * TW_KV_HEADS + head / (TW_HEADS / TW_KV_HEADS)) * TW_POSITIONS * TW_WIDTH + sub * 8;
    float q[8], sum[8], most = NOTHING, all = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 v = __ldcg((const float4*)(s.q + whole * TW_WIDTH + sub * 8 + i));
      q[i] = v.x * TW_SCALE, q[i + 1] = v.y * TW_SCALE, q[i + 2] = v.z * TW_SCALE, q[i + 3] = v.w * TW_SCALE;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0;
    // Every thread takes as many turns.
    for (int at = begin; at < end; at += 4 * GROUPS) {
      uint4 k[4], v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int p = at + group + j * GROUPS;
        const i64 from = cache + (i64)p * TW_WIDTH;
        k[j] = p < end ? __ldcg((const uint4*)(layer.keys + from)) : make_uint4(0, 0, 0, 0);
        v[j] = p < end ? __ldcg((const uint4*)(layer.values + from)) : make_uint4(0, 0, 0, 0);
      }
      float scores[4], top = most;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 w[4] = {k[j].x, k[j].y, k[j].z, k[j].w};
        float score = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score = fmaf(low(w[i]), q[2 * i], score);
          score = fmaf(high(w[i]), q[2 * i + 1], score);
        }
#pragma unroll
        for (int o = 1; o < ALONG; o *= 2) score += __shfl_xor_sync(~0u, score, o);
        scores[j] = at + group + j * GROUPS < end ? score : NOTHING;
        top = fmaxf(top, scores[j]);
      }
      if (top == NOTHING) continue;
      const float factor = exp2_of(most - top);
      most = top;
      all *= factor;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 w[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
        const float e = exp2_of(scores[j] - most);
        all += e;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[2 * i] = fmaf(low(w[i]), e, sum[2 * i]);
          sum[2 * i + 1] = fmaf(high(w[i]), e, sum[2 * i + 1]);
        }
      }
    }
    float* mine = scratch + group * MERGED;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine[sub * 8 + i] = sum[i];
    if (sub == 0) mine[TW_WIDTH] = most, mine[TW_WIDTH + 1] = all;
    __syncthreads();
    float top = NOTHING, weight = 0, value = 0;
    if (d < TW_WIDTH) {
#pragma unroll 8
      for (int g = 0; g < GROUPS; ++g) top = fmaxf(top, scratch[g * MERGED + TW_WIDTH]);
#pragma unroll 8
      for (int g = 0; g < GROUPS; ++g) {
        const float here = scratch[g * MERGED + TW_WIDTH];
        const float factor = here == NOTHING ? 0.0f : exp2_of(here - top);
        weight = fmaf(scratch[g * MERGED + TW_WIDTH + 1], factor, weight);
        value = fmaf(scratch[g * MERGED + d], factor, value);
      }
    }
#if TW_PARTS > 1
    if (d < TW_WIDTH) {
      __stcg(s.parts + (i64)item * TW_WIDTH + d, value);
      if (d == 0) __stcg(s.maxima + item, top), __stcg(s.sums + item, weight);
    }
    __threadfence();
    __syncthreads();
    if (d == 0) {
      const u32 before = atomicAdd(s.arrived + whole, 1);
      *last = before == TW_PARTS - 1;
      if (before == TW_PARTS - 1) s.arrived[whole] = 0;
    }
    __syncthreads();
    if (*last == 0) continue;
    __threadfence();
    if (d < TW_WIDTH) {
      float maxima[TW_PARTS];
      top = NOTHING, weight = value = 0;
#pragma unroll
      for (int i = 0; i < TW_PARTS; ++i) {
        maxima[i] = __ldcg(s.maxima + whole * TW_PARTS + i);
        top = fmaxf(top, maxima[i]);
      }
#pragma unroll
      for (int i = 0; i < TW_PARTS; ++i) {
        const float factor = maxima[i] == NOTHING ? 0.0f : exp2_of(maxima[i] - top);
        weight = fmaf(__ldcg(s.sums + whole * TW_PARTS + i), factor, weight);
        value = fmaf(__ldcg(s.parts + (i64)(whole * TW_PARTS + i) * TW_WIDTH + d), factor, value);
      }
    }
#endif
    if (d < TW_WIDTH) split(value / weight, s.mixed_hi + whole * TW_WIDTH + d, s.mixed_lo + whole * TW_WIDTH + d);
    __syncthreads();
  }
}

// Rows of the table, and what the first product reads of them.
TW_INLINE void embed(const Step& s, int warp, int lane) {
  for (int item = blockIdx.x * WARPS + warp; item < TW_ROWS * UNITS; item += TW_BLOCKS * WARPS) {
    const int row = item / UNITS, unit = item % UNITS, at = 16 * unit + (lane & 15);
    float v = wide(s.table[(i64)s.tokens[row] * TW_HIDDEN + at]);
    if (lane < 16) {
      __stcg(s.x + row * TW_HIDDEN + at, v);
      split(v * wide(s.gain[at]), s.hi + row * TW_HIDDEN + at, s.lo + row * TW_HIDDEN + at);
    }
    v *= v;
#pragma unroll
    for (int o = 1; o < 16; o *= 2) v += __shfl_xor_sync(~0u, v, o);
    if (lane == 0) __stcg(s.squares + row * UNITS + unit, v);
  }
}

// The end of a unit: `y` are the sums of its lines `g` and `g + 8` for sequences `n` and `n + 1`.
TW_INLINE void finish(const Step& s, const Product& p, const Layer& layer, int unit, int n0, const float (&y)[4], const float* roots,
                      int position) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int n = n0 + j;
    const bool there = n < TW_ROWS;
    float a = y[j], b = y[2 + j];
    if (p.kind == OUT || p.kind == DOWN) {
      // The residual, and what the next product reads: times the gain of its norm, the root of which comes at its end.
      float squares = 0;
      if (there) {
        const i64 at = (i64)n * TW_HIDDEN + 16 * unit + g;
        const Gain* gain = (p.kind == OUT ? layer.post : layer.next) + 16 * unit + g;
        a += __ldcg(s.x + at), b += __ldcg(s.x + at + 8);
        __stcg(s.x + at, a), __stcg(s.x + at + 8, b);
        split(a * wide(gain[0]), s.hi + at, s.lo + at);
        split(b * wide(gain[8]), s.hi + at + 8, s.lo + at + 8);
        squares = a * a + b * b;
      }
#pragma unroll
      for (int o = 4; o < 32; o *= 2) squares += __shfl_xor_sync(~0u, squares, o);
      if (there && g == 0) __stcg(s.squares + n * UNITS + unit, squares);
      continue;
    }
    if (!there) continue;
    a *= roots[n], b *= roots[n];
    if (p.kind == QKV) {
      const int head = unit / p.per, i = unit % p.per * 8 + g;
      if (layer.bias) {
        const u16* bias = layer.bias + head * TW_WIDTH + i;
        a += wide(bias[0]), b += wide(bias[TW_WIDTH / 2]);
      }
      if (head < TW_HEADS + TW_KV_HEADS) {
        const float c = s.cosines[(i64)position * (TW_WIDTH / 2) + i], si = s.sines[(i64)position * (TW_WIDTH / 2) + i];
        const float turned = a * c - b * si;
        b = b * c + a * si, a = turned;
      }
      if (head < TW_HEADS) {
        float* q = s.q + (n * TW_HEADS + head) * TW_WIDTH + i;
        __stcg(q, a), __stcg(q + TW_WIDTH / 2, b);
      } else {
        const int h = (head - TW_HEADS) % TW_KV_HEADS;
        u16* to = (head < TW_HEADS + TW_KV_HEADS ? layer.keys : layer.values) +
                  (((i64)n * TW_KV_HEADS + h) * TW_POSITIONS + position) * TW_WIDTH + i;
        __stcg(to, narrow(a)), __stcg(to + TW_WIDTH / 2, narrow(b));
      }
    } else if (p.kind == GATE_UP) {
      const i64 to = (i64)n * TW_INNER + 8 * unit + g;
      split(a / (1.0f + __expf(-a)) * b, s.inner_hi + to, s.inner_lo + to);
    } else {
      float* to = s.logits + (i64)n * TW_VOCABULARY + 16 * unit + g;
      to[0] = a, to[8] = b;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_streamed(const __grid_constant__ Step s) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* scratch = (float*)(smem + WARPS * SLOTS * SLOT);
  u64* full = (u64*)(scratch + SCRATCH);
  float* roots = (float*)(full + WARPS * SLOTS);
  u32* last = (u32*)(roots + 8 * TILES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < WARPS * SLOTS; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + i)) : "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    // That of the last meeting of the launch before.
    if (blockIdx.x == 0) s.met[32 * 5 * TW_LAYERS] = 0;
  }
  __syncthreads();
  const u32 ring = shared(smem) + warp * SLOTS * SLOT, barriers = shared(full + warp * SLOTS);
  Walk walk = {s.products, nullptr, -1, 0, 0, 0, 0, 0};
  walk.settle(warp, lane);
  for (int i = 0; i < SLOTS; ++i) walk.fetch(ring + i * SLOT, barriers + 8 * i, warp, lane);
  u32 slot = 0, parity = 0;
  int meeting = 0, turn = 0;
  const int position = *s.at;
  embed(s, warp, lane);
  meet(s, meeting++);
  for (int product = 0; product < PRODUCTS; ++product) {
    const Product p = s.products[product];
    const Layer layer = s.layers[p.layer];
    const u16* xh = p.kind == OUT ? s.mixed_hi : p.kind == DOWN ? s.inner_hi : s.hi;
    const u16* xl = p.kind == OUT ? s.mixed_lo : p.kind == DOWN ? s.inner_lo : s.lo;
    if (p.kind != OUT && p.kind != DOWN)
      // Read at the end of a unit, behind its meeting of the block.
      for (int n = warp; n < TW_ROWS; n += WARPS) {
        float v = 0;
        for (int i = lane; i < UNITS; i += 32) v += __ldcg(s.squares + n * UNITS + i);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) v += __shfl_xor_sync(~0u, v, o);
        if (lane == 0) roots[n] = rsqrtf(v / TW_HIDDEN + TW_EPS);
      }
    uint4 vh[TILES][8], vl[TILES][8];
    int have = -1, begin = (int)blockIdx.x - p.first;
    if (begin < 0) begin += TW_BLOCKS;
    const int before = turn;
    for (int unit = begin; unit < p.units; unit += TW_BLOCKS) {
      float ch[TILES][4] = {}, cl[TILES][4] = {};
      const int end = p.begin(unit) + p.pieces();
      for (int piece = p.begin(unit) + warp; piece < end; piece += WARPS) {
        if (piece != have) {
          have = piece;
#pragma unroll
          for (int i = 0; i < TILES; ++i) {
            const i64 at = (i64)(8 * i + g) * p.depth + piece * COLS + t * 8;
            const bool there = 8 * i + g < TW_ROWS;
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              vh[i][c] = there ? __ldcg((const uint4*)(xh + at + c * 32)) : make_uint4(0, 0, 0, 0);
              vl[i][c] = there ? __ldcg((const uint4*)(xl + at + c * 32)) : make_uint4(0, 0, 0, 0);
            }
          }
        }
        wait_for(barriers + 8 * slot, parity);
        const unsigned char* from = smem + (warp * SLOTS + slot) * SLOT + g / 2 * PAIR + g % 2 * SECOND + t * 16;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          // Eight neighbours of a line: which of them counts as which column is the same for lines and vectors.
          const uint4 w = *(const uint4*)(from + c * 64), v = *(const uint4*)(from + 4 * PAIR + c * 64);
#pragma unroll
          for (int i = 0; i < TILES; ++i) {
            multiply(ch[i], w.x, v.x, w.y, v.y, vh[i][c].x, vh[i][c].y);
            multiply(cl[i], w.x, v.x, w.y, v.y, vl[i][c].x, vl[i][c].y);
            multiply(ch[i], w.z, v.z, w.w, v.w, vh[i][c].z, vh[i][c].w);
            multiply(cl[i], w.z, v.z, w.w, v.w, vl[i][c].z, vl[i][c].w);
          }
        }
        __syncwarp();
        walk.fetch(ring + slot * SLOT, barriers + 8 * slot, warp, lane);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
      float4* sums = (float4*)scratch + (turn & 1) * TILES * THREADS;
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        sums[i * THREADS + threadIdx.x] =
            make_float4(ch[i][0] + cl[i][0], ch[i][1] + cl[i][1], ch[i][2] + cl[i][2], ch[i][3] + cl[i][3]);
      __syncthreads();
      // Warps take turns with the ends; the next unit has the other half of the scratch memory.
      const bool mine = warp == turn++ % WARPS;
      if (!mine) continue;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        float y[4] = {};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float4 v = sums[i * THREADS + w * 32 + lane];
          y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
        }
        if (TW_SPLIT && p.parts > 1)
          __stcg(s.partial + (unit * TILES + i) * 32 + lane, make_float4(y[0], y[1], y[2], y[3]));
        else
          finish(s, p, layer, p.group(unit), 8 * i + 2 * t, y, roots, position);
      }
    }
#if TW_SPLIT
    // Whoever is last with a group adds up its parts, in their order.
    if (p.parts > 1) {
      __threadfence();
      __syncwarp();
      for (int u = begin, k = before; u < p.units; u += TW_BLOCKS, ++k) {
        if (warp != k % WARPS) continue;
        const int group = p.group(u);
        u32 there = 0;
        if (lane == 0) there = atomicAdd(s.counted + group, 1);
        if (__shfl_sync(~0u, there, 0) + 1 != p.parts) continue;
        if (lane == 0) s.counted[group] = 0;
        __threadfence();
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          float y[4] = {};
          for (int part = 0; part < p.parts; ++part) {
            const float4 v = __ldcg(s.partial + ((group * p.parts + part) * TILES + i) * 32 + lane);
            y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
          }
          finish(s, p, layer, group, 8 * i + 2 * t, y, roots, position);
        }
      }
    }
#endif
    if (p.kind == HEAD) break;
    meet(s, meeting++);
    if (p.kind == QKV) {
      attend(s, layer, scratch, last, position);
      meet(s, meeting++);
    }
  }
}
