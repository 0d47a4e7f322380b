// Barriers: mbarriers, named hardware barriers, block and cluster, register budgets, dependent
// launches.
#pragma once
#include "tw/base.cuh"

namespace tw {

// A position in a ring of stages.
template <int STAGES> struct Ring {
  int slot = 0;
  u32 phase = 0;
  TW_INLINE void advance() {
    if (++slot == STAGES) { slot = 0; phase ^= 1; }
  }
  TW_INLINE void advance(int by) {
    slot += by;
    const int passes = slot / STAGES;
    slot -= passes * STAGES;
    phase ^= (u32)passes & 1u;
  }
  TW_INLINE int before() const { return slot == 0 ? STAGES - 1 : slot - 1; }
};

// PTX ISA, "bar.sync / barrier.sync" and "bar.arrive".
TW_INLINE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
TW_INLINE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900

// PTX ISA, "mbarrier.init", "mbarrier.arrive", "mbarrier.try_wait".
TW_INLINE void mbarrier_init(smem_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
TW_INLINE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TW_INLINE void mbarrier_arrive(smem_t bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// In another block of the cluster. The default scope of the release is the block: it orders what the copy engine and
// the tensor cores read, which complete before. `.release.cluster` compiles to a fence of the whole device
// (MEMBAR.ALL.GPU, about 1 us) and is only needed after plain stores to another block's memory.
TW_INLINE void mbarrier_arrive_at(smem_t bar, u32 cta) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(bar), "r"(cta) : "memory");
}
TW_INLINE void mbarrier_expect_bytes(smem_t bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
TW_INLINE void mbarrier_wait(smem_t bar, u32 parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni finished;\n"
      "bra.uni again;\n"
      "finished: }" ::"r"(bar), "r"(parity) : "memory");
}
// PTX ISA, "barrier.cluster".
TW_INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// In two steps; what was written before the first is not ordered by it, but for barriers made visible by their fence.
TW_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
TW_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
TW_INLINE u32 cluster_cta() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// PTX ISA, "membar / fence": orders plain accesses before those of the async proxy.
TW_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// PTX ISA, "setmaxnreg".
template <int REGISTERS> TW_INLINE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> TW_INLINE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// PTX ISA, "griddepcontrol".
TW_INLINE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
TW_INLINE void grid_release() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

#else
TW_INLINE void grid_wait() {}
TW_INLINE void grid_release() {}
#endif

}  // namespace tw
