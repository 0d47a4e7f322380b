// A step of a decoder up to its logits, in one launch: weights stream through shared memory without a pause while the blocks
// meet between the parts of a layer.
//
//   embed | per layer: qkv | attention | o | gate_up | down | head          (| : all blocks meet)
//
// One warp asks for weights, by the copy engine: a slot is 16 lines of a matrix by 2048 columns. What comes next depends on sizes
// alone, so a slot is filled anew as soon as it was read, in the order of all products of the step: while blocks wait for each
// other, or attend, the weights of what follows arrive. Lines go around the blocks across products, so that every block has the
// same share in the end. Eight warps multiply, each 256 columns of a slot: its lines are the rows of `mma.m16n8k16`, sequences are
// the columns. Two more warps do in turns what comes behind the sums of 16 lines.
//
// Vectors are f32 rounded to two bfloat16 each (17 bits), and multiplied one after the other. Sums of the warps are added in the
// order of the warps, parts of attention and of the depth in their order: results do not depend on who was first.
//
// Numbers of the model come as definitions: TW_ROWS sequences, TW_POSITIONS in the cache, TW_HIDDEN, TW_INNER, TW_LAYERS,
// TW_HEADS, TW_KV_HEADS, TW_WIDTH of a head, TW_VOCABULARY, TW_PARTS of attention, TW_TOGETHER heads of a block there, TW_EPS, TW_SCALE (with log2 e),
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

constexpr int WARPS = 8, THREADS = WARPS * 32, SLOTS = 3, COLS = 256, WIDE = WARPS * COLS;
// Lines of a slot lie in pairs, so that the eight threads of an access find all banks.
constexpr int PAIR = 4 * WIDE + 64, SECOND = 2 * WIDE + 64, SLOT = 8 * PAIR;
// Columns of a product of tensor cores: sequences, eight by eight.
constexpr int TILES = (TW_ROWS + 7) / 8;
constexpr int UNITS = TW_HIDDEN / 16, PRODUCTS = 4 * TW_LAYERS + 1;
// Threads that share a position of the cache, and positions of a block at a time.
constexpr int ALONG = TW_WIDTH / 8, GROUPS = THREADS / ALONG, MERGED = TW_WIDTH + 2;
constexpr int SUMS = 2 * THREADS * 4 * TILES, MERGE = TW_TOGETHER * WARPS * MERGED;
constexpr int SCRATCH = SUMS > MERGE ? SUMS : MERGE;
// All warps: those that multiply, two that finish, one that fetches, one that does nothing (registers go by four warps).
constexpr int ALL = THREADS + 128;
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
  // Zeros at first: one a head, one a group of lines, one a meeting (128 bytes apart), and behind these the number of launches.
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

// Meetings of some warps of a block: those that multiply, sums that are there, room for sums.
TW_INLINE void together() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
template <int FIRST> TW_INLINE void wait_at(int which) {
  asm volatile("bar.sync %0, %1;" ::"r"(FIRST + which), "n"(THREADS + 32) : "memory");
}
template <int FIRST> TW_INLINE void arrive_at(int which) {
  asm volatile("bar.arrive %0, %1;" ::"r"(FIRST + which), "n"(THREADS + 32) : "memory");
}
constexpr int FULL = 2, ROOM = 4;

// The slots of a block in the order in which it reads them.
struct Walk {
  const Product* products;
  int product, unit, piece, end, units;

  TW_INLINE void settle() {
    while (unit >= units) {
      if (++product >= PRODUCTS) return;
      const Product& p = products[product];
      units = p.units;
      unit = (int)blockIdx.x - p.first;
      if (unit < 0) unit += TW_BLOCKS;
    }
    const Product& p = products[product];
    piece = p.begin(unit), end = piece + p.pieces();
  }
  TW_INLINE bool more() const { return product < PRODUCTS; }
  TW_INLINE void next() {
    piece += WARPS;
    if (piece < end) return;
    unit += TW_BLOCKS;
    settle();
  }
};

// The warp that fetches: sixteen threads ask for a line each.
TW_INLINE void fetch_all(const Product* products, u32 ring, u32 full, u32 room, int lane) {
  Walk walk = {products, -1, 0, 0, 0, 0};
  walk.settle();
  u32 slot = 0, parity = 1;
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  for (; walk.more(); walk.next()) {
    const Product& p = products[walk.product];
    const int group = p.group(walk.unit), line = group / p.per * p.jump + group % p.per * 8 + (lane & 7);
    const u32 bytes = min(walk.end - walk.piece, WARPS) * COLS * 2;
    const u16* from = (lane < 8 ? p.w0 : p.w1) + (i64)line * p.depth + walk.piece * COLS;
    wait_for(room + 8 * slot, parity);
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * slot), "r"(16 * bytes) : "memory");
    __syncwarp();
    if (lane < 16)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
              ring + slot * SLOT + lane / 2 * PAIR + lane % 2 * SECOND),
          "l"(from), "r"(bytes), "r"(full + 8 * slot), "l"(policy)
          : "memory");
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
}

// A block has come to a meeting, or one of its two warps that finish has: what they have written is seen by all who wait for it.
TW_INLINE void arrive(const Step& s, int meeting, u32 weight) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(s.met + 32 * meeting), "r"(weight) : "memory");
}
// All blocks have come, in this launch.
TW_INLINE void await(const Step& s, int meeting, u32 target) {
  const u32* met = s.met + 32 * meeting;
  u32 i = 0, count;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(met) : "memory");
  } while ((int)(count - target) < 0 && ++i < PATIENCE);
  if (i == PATIENCE) __trap();
}

// Heads of queries that share keys, cut into parts of the cache; whoever is last with them combines their parts.
TW_INLINE void attend(const Step& s, const Layer& layer, float* scratch, u32* last, int position) {
  constexpr int SOME = TW_TOGETHER, SETS = TW_HEADS / SOME, DEEP = SOME > 1 ? 2 : 4;
  const int sub = threadIdx.x % ALONG, group = threadIdx.x / ALONG, warp = threadIdx.x / 32;
  const int seen = position + 1, first = (int)max((i64)0, seen - layer.window);
  const int length = (seen - first + TW_PARTS - 1) / TW_PARTS;
  for (int item = blockIdx.x; item < TW_ROWS * SETS * TW_PARTS; item += TW_BLOCKS) {
    const int part = item % TW_PARTS, set = item / TW_PARTS, row = set / SETS, head = set % SETS * SOME;
    const int begin = first + part * length, end = min(seen, begin + length), whole = row * TW_HEADS + head;
    const i64 cache = ((i64)row * TW_KV_HEADS + head / (TW_HEADS / TW_KV_HEADS)) * TW_POSITIONS * TW_WIDTH + sub * 8;
    float q[SOME][8], sum[SOME][8] = {}, most[SOME], all[SOME] = {};
#pragma unroll
    for (int e = 0; e < SOME; ++e) {
      most[e] = NOTHING;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 v = __ldcg((const float4*)(s.q + (whole + e) * TW_WIDTH + sub * 8 + i));
        q[e][i] = v.x * TW_SCALE, q[e][i + 1] = v.y * TW_SCALE, q[e][i + 2] = v.z * TW_SCALE, q[e][i + 3] = v.w * TW_SCALE;
      }
    }
    // Every thread takes as many turns.
    for (int at = begin; at < end; at += DEEP * GROUPS) {
      uint4 k[DEEP], v[DEEP];
#pragma unroll
      for (int j = 0; j < DEEP; ++j) {
        const int p = at + group + j * GROUPS;
        const i64 from = cache + (i64)p * TW_WIDTH;
        k[j] = p < end ? __ldcg((const uint4*)(layer.keys + from)) : make_uint4(0, 0, 0, 0);
        v[j] = p < end ? __ldcg((const uint4*)(layer.values + from)) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int e = 0; e < SOME; ++e) {
        float scores[DEEP], top = most[e];
#pragma unroll
        for (int j = 0; j < DEEP; ++j) {
          const u32 w[4] = {k[j].x, k[j].y, k[j].z, k[j].w};
          float score = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            score = fmaf(low(w[i]), q[e][2 * i], score);
            score = fmaf(high(w[i]), q[e][2 * i + 1], score);
          }
#pragma unroll
          for (int o = 1; o < ALONG; o *= 2) score += __shfl_xor_sync(~0u, score, o);
          scores[j] = at + group + j * GROUPS < end ? score : NOTHING;
          top = fmaxf(top, scores[j]);
        }
        // Of a group that has seen nothing yet all factors are zero.
        const float base = top == NOTHING ? 0.0f : top, factor = exp2_of(most[e] - base);
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
      const float factor = exp2_of(most[e] - (top == NOTHING ? 0.0f : top));
      all[e] *= factor;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[e][i] *= factor;
#pragma unroll
      for (int o = ALONG; o < 32; o *= 2) {
        all[e] += __shfl_xor_sync(~0u, all[e], o);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[e][i] += __shfl_xor_sync(~0u, sum[e][i], o);
      }
      float* mine = scratch + (e * WARPS + warp) * MERGED;
      if (threadIdx.x % 32 < ALONG) {
#pragma unroll
        for (int i = 0; i < 8; ++i) mine[sub * 8 + i] = sum[e][i];
        if (sub == 0) mine[TW_WIDTH] = top, mine[TW_WIDTH + 1] = all[e];
      }
    }
    together();
    for (int i = threadIdx.x; i < SOME * TW_WIDTH; i += THREADS) {
      const int e = i / TW_WIDTH, d = i % TW_WIDTH;
      const float* from = scratch + e * WARPS * MERGED;
      float top = NOTHING, weight = 0, value = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, from[w * MERGED + TW_WIDTH]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float factor = exp2_of(from[w * MERGED + TW_WIDTH] - (top == NOTHING ? 0.0f : top));
        weight = fmaf(from[w * MERGED + TW_WIDTH + 1], factor, weight);
        value = fmaf(from[w * MERGED + d], factor, value);
      }
#if TW_PARTS > 1
      const i64 at = (i64)(whole + e) * TW_PARTS + part;
      __stcg(s.parts + at * TW_WIDTH + d, value);
      if (d == 0) __stcg(s.maxima + at, top), __stcg(s.sums + at, weight);
#else
      split(value / weight, s.mixed_hi + whole * TW_WIDTH + i, s.mixed_lo + whole * TW_WIDTH + i);
#endif
    }
#if TW_PARTS > 1
    __threadfence();
    together();
    if (threadIdx.x == 0) {
      const u32 before = atomicAdd(s.arrived + set, 1);
      *last = before == TW_PARTS - 1;
      if (before == TW_PARTS - 1) s.arrived[set] = 0;
    }
    together();
    if (*last) {
      __threadfence();
      for (int i = threadIdx.x; i < SOME * TW_WIDTH; i += THREADS) {
        const int d = i % TW_WIDTH;
        const i64 at = (i64)(whole + i / TW_WIDTH) * TW_PARTS;
        float maxima[TW_PARTS], top = NOTHING, weight = 0, value = 0;
#pragma unroll
        for (int p = 0; p < TW_PARTS; ++p) {
          maxima[p] = __ldcg(s.maxima + at + p);
          top = fmaxf(top, maxima[p]);
        }
#pragma unroll
        for (int p = 0; p < TW_PARTS; ++p) {
          const float factor = exp2_of(maxima[p] - top);
          weight = fmaf(__ldcg(s.sums + at + p), factor, weight);
          value = fmaf(__ldcg(s.parts + (at + p) * TW_WIDTH + d), factor, value);
        }
        split(value / weight, s.mixed_hi + whole * TW_WIDTH + i, s.mixed_lo + whole * TW_WIDTH + i);
      }
    }
#endif
    together();
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

// What the end of a unit reads, asked for before its sums are there.
struct Ahead {
  float x[TILES][2][2], a, b, c, d;
  TW_INLINE void load(const Step& s, const Product& p, const Layer& layer, int group, int position, int g, int t) {
    if (p.kind == QKV) {
      const int head = group / p.per, i = group % p.per * 8 + g;
      const bool turns = head < TW_HEADS + TW_KV_HEADS;
      const u16* bias = layer.bias + head * TW_WIDTH + i;
      a = turns ? s.cosines[(i64)position * (TW_WIDTH / 2) + i] : 1.0f;
      b = turns ? s.sines[(i64)position * (TW_WIDTH / 2) + i] : 0.0f;
      c = layer.bias ? wide(bias[0]) : 0.0f;
      d = layer.bias ? wide(bias[TW_WIDTH / 2]) : 0.0f;
    } else if (p.kind == OUT || p.kind == DOWN) {
      const Gain* gain = (p.kind == OUT ? layer.post : layer.next) + 16 * group + g;
      a = wide(gain[0]), b = wide(gain[8]);
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int n = 8 * i + 2 * t + j;
          const float* from = s.x + (i64)n * TW_HIDDEN + 16 * group + g;
          x[i][j][0] = n < TW_ROWS ? __ldcg(from) : 0.0f;
          x[i][j][1] = n < TW_ROWS ? __ldcg(from + 8) : 0.0f;
        }
    }
  }
};

// The end of a unit: `y` are the sums of its lines `g` and `g + 8` for sequences `2 t` and `2 t + 1` of tile `i`.
TW_INLINE void finish(const Step& s, const Product& p, const Layer& layer, int group, int i, const float (&y)[4], const Ahead& ahead,
                      const float* roots, int position, int g, int t) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int n = 8 * i + 2 * t + j;
    const bool there = n < TW_ROWS;
    float a = y[j], b = y[2 + j];
    if (p.kind == OUT || p.kind == DOWN) {
      // The residual, and what the next product reads: times the gain of its norm, the root of which comes at its end.
      float squares = 0;
      if (there) {
        const i64 at = (i64)n * TW_HIDDEN + 16 * group + g;
        a += ahead.x[i][j][0], b += ahead.x[i][j][1];
        __stcg(s.x + at, a), __stcg(s.x + at + 8, b);
        split(a * ahead.a, s.hi + at, s.lo + at);
        split(b * ahead.b, s.hi + at + 8, s.lo + at + 8);
        squares = a * a + b * b;
      }
#pragma unroll
      for (int o = 4; o < 32; o *= 2) squares += __shfl_xor_sync(~0u, squares, o);
      if (there && g == 0) __stcg(s.squares + n * UNITS + group, squares);
      continue;
    }
    if (!there) continue;
    a *= roots[n], b *= roots[n];
    if (p.kind == QKV) {
      const int head = group / p.per, at = group % p.per * 8 + g;
      a += ahead.c, b += ahead.d;
      const float turned = a * ahead.a - b * ahead.b;
      b = b * ahead.a + a * ahead.b, a = turned;
      if (head < TW_HEADS) {
        float* q = s.q + (n * TW_HEADS + head) * TW_WIDTH + at;
        __stcg(q, a), __stcg(q + TW_WIDTH / 2, b);
      } else {
        const int h = (head - TW_HEADS) % TW_KV_HEADS;
        u16* to = (head < TW_HEADS + TW_KV_HEADS ? layer.keys : layer.values) +
                  (((i64)n * TW_KV_HEADS + h) * TW_POSITIONS + position) * TW_WIDTH + at;
        __stcg(to, narrow(a)), __stcg(to + TW_WIDTH / 2, narrow(b));
      }
    } else if (p.kind == GATE_UP) {
      const i64 to = (i64)n * TW_INNER + 8 * group + g;
      split(a / (1.0f + __expf(-a)) * b, s.inner_hi + to, s.inner_lo + to);
    } else {
      float* to = s.logits + (i64)n * TW_VOCABULARY + 16 * group + g;
      to[0] = a, to[8] = b;
    }
  }
}

// The warps that finish, one of two: every second unit of the block is its.
TW_INLINE void finish_all(const Step& s, const Product* products, const Layer* layers, const float4* sums, float* roots, int which,
                          int lane, int position, u32 target) {
  const int g = lane / 4, t = lane % 4;
  sums += which * TILES * THREADS;
  arrive_at<ROOM>(which);
  int meeting = 0, turn = 0;
  for (int product = 0; product < PRODUCTS; ++product) {
    const Product p = products[product];
    const Layer layer = layers[p.layer];
    if (lane == 0) await(s, meeting, target);
    __syncwarp();
    if (p.kind != OUT && p.kind != DOWN) {
      for (int n = 0; n < TW_ROWS; ++n) {
        float v = 0;
        for (int i = lane; i < UNITS; i += 32) v += __ldcg(s.squares + n * UNITS + i);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) v += __shfl_xor_sync(~0u, v, o);
        if (lane == 0) roots[n] = rsqrtf(v / TW_HIDDEN + TW_EPS);
      }
      __syncwarp();
    }
    int unit = (int)blockIdx.x - p.first;
    if (unit < 0) unit += TW_BLOCKS;
    for (; unit < p.units; unit += TW_BLOCKS, ++turn) {
      if ((turn & 1) != which) continue;
      const int group = p.group(unit);
      Ahead ahead;
      ahead.load(s, p, layer, group, position, g, t);
      wait_at<FULL>(which);
      float y[TILES][4] = {};
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float4 v = sums[i * THREADS + w * 32 + lane];
          y[i][0] += v.x, y[i][1] += v.y, y[i][2] += v.z, y[i][3] += v.w;
        }
      arrive_at<ROOM>(which);
#if TW_SPLIT
      if (p.parts > 1) {
        // Whoever is last with a group adds up its parts, in their order.
#pragma unroll
        for (int i = 0; i < TILES; ++i)
          __stcg(s.partial + (unit * TILES + i) * 32 + lane, make_float4(y[i][0], y[i][1], y[i][2], y[i][3]));
        __threadfence();
        __syncwarp();
        u32 there = 0;
        if (lane == 0) there = atomicAdd(s.counted + group, 1);
        if (__shfl_sync(~0u, there, 0) + 1 != p.parts) continue;
        if (lane == 0) s.counted[group] = 0;
        __threadfence();
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          y[i][0] = y[i][1] = y[i][2] = y[i][3] = 0;
          for (int part = 0; part < p.parts; ++part) {
            const float4 v = __ldcg(s.partial + ((group * p.parts + part) * TILES + i) * 32 + lane);
            y[i][0] += v.x, y[i][1] += v.y, y[i][2] += v.z, y[i][3] += v.w;
          }
        }
      }
#endif
#pragma unroll
      for (int i = 0; i < TILES; ++i) finish(s, p, layer, group, i, y[i], ahead, roots, position, g, t);
    }
    if (p.kind == HEAD) return;
    ++meeting;
    __syncwarp();
    if (lane == 0) arrive(s, meeting, 1);
    if (p.kind == QKV) ++meeting;
  }
}

extern "C" __global__ void __launch_bounds__(ALL, 1) decode_streamed(const __grid_constant__ Step s) {
  extern __shared__ __align__(128) unsigned char smem[];
  float* scratch = (float*)(smem + SLOTS * SLOT);
  Product* products = (Product*)(scratch + SCRATCH);
  Layer* layers = (Layer*)(products + PRODUCTS);
  u64* full = (u64*)(layers + TW_LAYERS);
  u64* room = full + SLOTS;
  float* roots = (float*)(room + SLOTS);
  u32* last = (u32*)(roots + 2 * 8 * TILES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Launches before this one; the first of its meetings is not complete before all have read it.
  u32* launches = s.met + 32 * (5 * TW_LAYERS + 1);
  const u32 target = (__ldcg(launches) + 1) * 2 * TW_BLOCKS;
  for (int i = threadIdx.x; i < PRODUCTS * 3; i += ALL) ((uint4*)products)[i] = ((const uint4*)s.products)[i];
  for (int i = threadIdx.x; i < TW_LAYERS * 3; i += ALL) ((uint4*)layers)[i] = ((const uint4*)s.layers)[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(full + i)) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(room + i)), "n"(WARPS) : "memory");
    }
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp < WARPS + 2)
      finish_all(s, products, layers, (const float4*)scratch, roots + (warp - WARPS) * 8 * TILES, warp - WARPS, lane, *s.at, target);
    else if (warp == WARPS + 2)
      fetch_all(products, shared(smem), shared(full), shared(room), lane);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
  const int position = *s.at;
  embed(s, warp, lane);
  together();
  if (threadIdx.x == 0) arrive(s, 0, 2);
  u32 slot = 0, parity = 0;
  int meeting = 0, turn = 0;
  for (int product = 0; product < PRODUCTS; ++product) {
    const Product p = products[product];
    if (threadIdx.x == 0) await(s, meeting, target);
    together();
    const u16* xh = p.kind == OUT ? s.mixed_hi : p.kind == DOWN ? s.inner_hi : s.hi;
    const u16* xl = p.kind == OUT ? s.mixed_lo : p.kind == DOWN ? s.inner_lo : s.lo;
    uint4 vh[TILES][8], vl[TILES][8];
    int have = -1, unit = (int)blockIdx.x - p.first;
    if (unit < 0) unit += TW_BLOCKS;
    // The part of the vectors that goes with a piece of the depth.
    auto load = [&](int piece) {
      if (piece == have) return;
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
    };
    if (unit < p.units && p.pieces() > warp) load(p.begin(unit) + warp);
    for (; unit < p.units; unit += TW_BLOCKS) {
      // Sums that wait for each other as little as there are registers for.
      constexpr int CHAINS = TILES == 1 ? 2 : 1;
      float ch[CHAINS][TILES][4] = {}, cl[CHAINS][TILES][4] = {};
      const int end = p.begin(unit) + p.pieces();
      for (int piece = p.begin(unit) + warp; piece - warp < end; piece += WARPS) {
        wait_for(shared(full + slot), parity);
        if (piece < end) {
          const unsigned char* from = smem + slot * SLOT + g / 2 * PAIR + g % 2 * SECOND + warp * (2 * COLS) + t * 16;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            // Eight neighbours of a line: which of them counts as which column is the same for lines and vectors.
            const uint4 w = *(const uint4*)(from + c * 64), v = *(const uint4*)(from + 4 * PAIR + c * 64);
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
              multiply(ch[0][i], w.x, v.x, w.y, v.y, vh[i][c].x, vh[i][c].y);
              multiply(cl[0][i], w.x, v.x, w.y, v.y, vl[i][c].x, vl[i][c].y);
              multiply(ch[CHAINS - 1][i], w.z, v.z, w.w, v.w, vh[i][c].z, vh[i][c].w);
              multiply(cl[CHAINS - 1][i], w.z, v.z, w.w, v.w, vl[i][c].z, vl[i][c].w);
            }
          }
        }
        __syncwarp();
        if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(room + slot)) : "memory");
        if (++slot == SLOTS) slot = 0, parity ^= 1;
        // What comes next is on its way while others are waited for.
        if (piece + WARPS < end)
          load(piece + WARPS);
        else if (piece - warp + WARPS >= end && unit + TW_BLOCKS < p.units && p.pieces() > warp)
          load(p.begin(unit + TW_BLOCKS) + warp);
      }
      const int which = turn++ & 1;
      wait_at<ROOM>(which);
      float4* sums = (float4*)scratch + which * TILES * THREADS;
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          y[j] = ch[0][i][j] + cl[0][i][j];
          if (CHAINS > 1) y[j] += ch[CHAINS - 1][i][j] + cl[CHAINS - 1][i][j];
        }
        sums[i * THREADS + threadIdx.x] = make_float4(y[0], y[1], y[2], y[3]);
      }
      arrive_at<FULL>(which);
    }
    if (p.kind == HEAD) break;
    ++meeting;
    if (p.kind == QKV) {
      if (threadIdx.x == 0) await(s, meeting, target);
      together();
      attend(s, layers[p.layer], scratch, last, position);
      together();
      ++meeting;
      if (threadIdx.x == 0) arrive(s, meeting, 2);
    }
  }
  // All have read it long ago.
  if (blockIdx.x == 0 && threadIdx.x == 0) *launches += 1;
}
