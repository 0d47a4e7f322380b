// One step of AdamW or Lion over many tensors in one launch, and the norm of many gradients.
//
// A launch gets its tensors as a table in its parameters, so nothing is copied to the device and a recorded launch stays
// valid for as long as the tensors stay where they are. A block does one chunk of one tensor. What the host packs
// (crates/torch-ops/src/tables.rs) is `Table`; `TW_TABLE_BYTES` is its size there.
//
// `TW_COUNT`: tensors in a table. `TW_MASTER`: 1 where weights have a wide copy, which is what is updated. `TW_ELEMENT`: the
// type of weights and gradients; moments and the copy are `Wide`.
#include "tw/element.cuh"

using namespace tw;

struct Entry {
  Element* weights;
  const Element* gradients;
  Wide* first_moments;
  Wide* second_moments;
  Wide* masters;
  Wide* maxima;     // of the second moments
  i64 elements;
  u32 first_block;  // of this launch
  u32 vector;       // all of them start at a multiple of 16 bytes
};

struct Table {
  const float* step;     // how many steps this one makes
  const void* rate;      // Wide or float, if the rate is on the device
  const float* factor;   // of all gradients, if there is one
  const float* found;    // not 0: gradients are not finite, and nothing is done
  double rate_value, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps, decay;  // rest = 1 - beta
  u32 rate_is_double, maximize, chunk, count;
  Entry entries[TW_COUNT];
};
static_assert(sizeof(Table) == TW_TABLE_BYTES, "the host packs another table");

constexpr int THREADS = 256;
// Elements of a block's step: 4 KiB of each tensor of floats. Blocks then work side by side in memory, and the last ones end together.
constexpr int PIECE = 4 * THREADS;
// Blocks on a multiprocessor, which is what registers are given out for.
constexpr int BLOCKS = sizeof(Wide) == 8 ? 3 : TW_MASTER ? 5 : 6, BLOCKS_WITH_MAXIMA = sizeof(Wide) == 8 ? 3 : 5;

TW_INLINE const Entry& entry_of_block(const Table& t) {
  u32 low = 0, high = t.count;
  while (high - low > 1) {
    const u32 middle = (low + high) / 2;
    if (t.entries[middle].first_block <= blockIdx.x) low = middle; else high = middle;
  }
  return t.entries[low];
}

TW_INLINE double rate_of(const Table& t) {
  if (t.rate == nullptr) return t.rate_value;
  return t.rate_is_double ? *static_cast<const double*>(t.rate) : (double)*static_cast<const float*>(t.rate);
}

// 1 - beta^step without cancellation.
TW_INLINE float correction(float step, double log_beta) { return -expm1f(step * (float)log_beta); }
TW_INLINE double correction(double step, double log_beta) { return -expm1(step * log_beta); }

TW_INLINE float root(float x) { return sqrtf(x); }
TW_INLINE double root(double x) { return sqrt(x); }

// `MAXIMA`: the step divides by the root of the largest second moment so far.
template <bool MAXIMA> struct AdamW {
  static constexpr bool second = true, maxima = MAXIMA;
  Wide beta1, beta2, rest1, rest2, eps, keep, size, root_scale;
  TW_INLINE AdamW(const Table& t) {
    const Wide rate = (Wide)rate_of(t), step = (Wide)*t.step;
    beta1 = (Wide)t.beta1, beta2 = (Wide)t.beta2, rest1 = (Wide)t.rest1, rest2 = (Wide)t.rest2, eps = (Wide)t.eps;
    keep = (Wide)1 - rate * (Wide)t.decay;
    size = rate / correction(step, t.log_beta1);
    root_scale = (Wide)1 / root(correction(step, t.log_beta2));
  }
  TW_INLINE Wide operator()(Wide w, Wide g, Wide& m, Wide& v, Wide& most) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * (g * g);
    // What is not a number stays, as in PyTorch.
    if (MAXIMA) most = v > most || v != v ? v : most;
    return w * keep - size * (m / (root(MAXIMA ? most : v) * root_scale + eps));
  }
};

struct Lion {
  static constexpr bool second = false, maxima = false;
  Wide beta1, beta2, rest1, rest2, keep, rate;
  TW_INLINE Lion(const Table& t) {
    rate = (Wide)rate_of(t);
    beta1 = (Wide)t.beta1, beta2 = (Wide)t.beta2, rest1 = (Wide)t.rest1, rest2 = (Wide)t.rest2;
    keep = (Wide)1 - rate * (Wide)t.decay;
  }
  TW_INLINE Wide operator()(Wide w, Wide g, Wide& m, Wide&, Wide&) const {
    const Wide c = beta1 * m + rest1 * g;
    m = beta2 * m + rest2 * g;
    const Wide sign = c > 0 ? (Wide)1 : c < 0 ? (Wide)-1 : c;
    return w * keep - rate * sign;
  }
};

// A chunk is one piece.
template <typename Rule> TW_INLINE void step(const Table& t) {
  if (t.found != nullptr && *t.found != 0.0f) return;
  const Entry& e = entry_of_block(t);
  const bool vector = e.vector != 0;
  const i64 n = e.elements, i = (i64)(blockIdx.x - e.first_block) * PIECE + (int)threadIdx.x * 4;
  if (i >= n) return;
  Four<Element> w = {};
  Four<Wide> v = {}, q = {}, x = {};
  const Four<Element> g = load_four(e.gradients, i, n, vector);
  Four<Wide> m = load_four(e.first_moments, i, n, vector);
  if (Rule::second) v = load_four(e.second_moments, i, n, vector);
  if (Rule::maxima) x = load_four(e.maxima, i, n, vector);
  if (TW_MASTER) q = load_four(e.masters, i, n, vector);
  else w = load_four(e.weights, i, n, vector);
  // While these are under way.
  Wide factor = t.factor == nullptr ? (Wide)1 : (Wide)*t.factor;
  if (t.maximize) factor = -factor;
  const Rule rule(t);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const Wide old = TW_MASTER ? q.at[k] : (Wide)wide_of(w.at[k]);
    const Wide next = rule(old, (Wide)wide_of(g.at[k]) * factor, m.at[k], v.at[k], x.at[k]);
    q.at[k] = next;
    w.at[k] = Rounded<Element>::of(next);
  }
  store_four(e.weights, i, n, vector, w);
  store_four(e.first_moments, i, n, vector, m);
  if (Rule::second) store_four(e.second_moments, i, n, vector, v);
  if (Rule::maxima) store_four(e.maxima, i, n, vector, x);
  if (TW_MASTER) store_four(e.masters, i, n, vector, q);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) adamw(const __grid_constant__ Table t) {
  begin_behind_others();
  step<AdamW<false>>(t);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_WITH_MAXIMA) amsgrad(const __grid_constant__ Table t) {
  begin_behind_others();
  step<AdamW<true>>(t);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) lion(const __grid_constant__ Table t) {
  begin_behind_others();
  step<Lion>(t);
}

// The sum of a block's numbers, in one order, in thread 0.
template <typename T> TW_INLINE T block_sum(T x) {
  __shared__ T parts[32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(~0u, x, distance);
  if (lane() == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  T all = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < (int)blockDim.x / 32; ++w) all += parts[w];
  return all;
}

// The sum of squares of each chunk of the gradients.
extern "C" __global__ void __launch_bounds__(THREADS) squares(const __grid_constant__ Table t, Wide* parts) {
  begin_behind_others();
  const Entry& e = entry_of_block(t);
  const i64 begin = (i64)(blockIdx.x - e.first_block) * t.chunk;
  const i64 end = begin + t.chunk < e.elements ? begin + t.chunk : e.elements;
  const bool vector = e.vector != 0;
  Wide sum = 0;
  for (i64 piece = begin; piece < end; piece += 2 * PIECE) {
    Four<Element> g[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) g[j] = load_four(e.gradients, piece + j * PIECE + (int)threadIdx.x * 4, end, vector);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Wide x = (Wide)wide_of(g[j].at[k]);
        sum += x * x;
      }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The norm of all, and the factor that makes it `most` at most: NaN where it is NaN. One block.
extern "C" __global__ void __launch_bounds__(1024) whole_norm(const Wide* parts, i64 count, double most, float* norm, float* factor) {
  begin_behind_others();
  double sum = 0;
  for (i64 i = threadIdx.x; i < count; i += blockDim.x) sum += (double)parts[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const double all = sqrt(sum), by = most / (all + 1e-6);
    *norm = (float)all;
    *factor = (float)(by > 1 ? 1 : by);
  }
}
