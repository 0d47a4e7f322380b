// Tensor cores of Hopper: `wgmma` (PTX ISA, "Asynchronous warpgroup level matrix instructions").
//
// TW_WGMMA(R, SHAPE, ...) is one instruction with R accumulator registers per thread. The operand lists for
// each R are a table below: TW_OUT_R binds the accumulators, TW_LIST_R prints them as %0..%(R-1), and
// TW_NEXT_R names the placeholders that follow.
#pragma once
#include "tw/base.cuh"

namespace tw {

#if __CUDA_ARCH__ >= 900

// Descriptor of a tile in shared memory (PTX ISA, "Matrix descriptor"): addresses and strides in units of
// 16 bytes. `leading` is the distance between panels (or ignored), `stride` between groups of 8 lines.
template <int SPAN_BYTES> TW_INLINE u64 wgmma_descriptor(smem_t address, u32 leading, u32 stride) {
  constexpr u64 mode = SPAN_BYTES == 128 ? 1 : SPAN_BYTES == 64 ? 2 : SPAN_BYTES == 32 ? 3 : 0;
  return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | mode << 62;
}

TW_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TW_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> TW_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Tells the compiler that these registers change at a wait: accumulators are written asynchronously.
template <int N> TW_INLINE void wgmma_touch(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> TW_INLINE void wgmma_touch(u32 (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
template <int N> TW_INLINE void wgmma_touch(int (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// TW_LIST_R: placeholders of R accumulators; TW_OUT_R(c, d): their bindings with constraint c.
#define TW_LIST_4 "%0, %1, %2, %3"
#define TW_OUT_4(c, d) c(d[0]), c(d[1]), c(d[2]), c(d[3])
#define TW_LIST_8 TW_LIST_4 ", %4, %5, %6, %7"
#define TW_OUT_8(c, d) TW_OUT_4(c, d), c(d[4]), c(d[5]), c(d[6]), c(d[7])
#define TW_LIST_12 TW_LIST_8 ", %8, %9, %10, %11"
#define TW_OUT_12(c, d) TW_OUT_8(c, d), c(d[8]), c(d[9]), c(d[10]), c(d[11])
#define TW_LIST_16 TW_LIST_12 ", %12, %13, %14, %15"
#define TW_OUT_16(c, d) TW_OUT_12(c, d), c(d[12]), c(d[13]), c(d[14]), c(d[15])
#define TW_LIST_20 TW_LIST_16 ", %16, %17, %18, %19"
#define TW_OUT_20(c, d) TW_OUT_16(c, d), c(d[16]), c(d[17]), c(d[18]), c(d[19])
#define TW_LIST_24 TW_LIST_20 ", %20, %21, %22, %23"
#define TW_OUT_24(c, d) TW_OUT_20(c, d), c(d[20]), c(d[21]), c(d[22]), c(d[23])
#define TW_LIST_28 TW_LIST_24 ", %24, %25, %26, %27"
#define TW_OUT_28(c, d) TW_OUT_24(c, d), c(d[24]), c(d[25]), c(d[26]), c(d[27])
#define TW_LIST_32 TW_LIST_28 ", %28, %29, %30, %31"
#define TW_OUT_32(c, d) TW_OUT_28(c, d), c(d[28]), c(d[29]), c(d[30]), c(d[31])
#define TW_LIST_36 TW_LIST_32 ", %32, %33, %34, %35"
#define TW_OUT_36(c, d) TW_OUT_32(c, d), c(d[32]), c(d[33]), c(d[34]), c(d[35])
#define TW_LIST_40 TW_LIST_36 ", %36, %37, %38, %39"
#define TW_OUT_40(c, d) TW_OUT_36(c, d), c(d[36]), c(d[37]), c(d[38]), c(d[39])
#define TW_LIST_44 TW_LIST_40 ", %40, %41, %42, %43"
#define TW_OUT_44(c, d) TW_OUT_40(c, d), c(d[40]), c(d[41]), c(d[42]), c(d[43])
#define TW_LIST_48 TW_LIST_44 ", %44, %45, %46, %47"
#define TW_OUT_48(c, d) TW_OUT_44(c, d), c(d[44]), c(d[45]), c(d[46]), c(d[47])
#define TW_LIST_52 TW_LIST_48 ", %48, %49, %50, %51"
#define TW_OUT_52(c, d) TW_OUT_48(c, d), c(d[48]), c(d[49]), c(d[50]), c(d[51])
#define TW_LIST_56 TW_LIST_52 ", %52, %53, %54, %55"
#define TW_OUT_56(c, d) TW_OUT_52(c, d), c(d[52]), c(d[53]), c(d[54]), c(d[55])
#define TW_LIST_60 TW_LIST_56 ", %56, %57, %58, %59"
#define TW_OUT_60(c, d) TW_OUT_56(c, d), c(d[56]), c(d[57]), c(d[58]), c(d[59])
#define TW_LIST_64 TW_LIST_60 ", %60, %61, %62, %63"
#define TW_OUT_64(c, d) TW_OUT_60(c, d), c(d[60]), c(d[61]), c(d[62]), c(d[63])
#define TW_LIST_68 TW_LIST_64 ", %64, %65, %66, %67"
#define TW_OUT_68(c, d) TW_OUT_64(c, d), c(d[64]), c(d[65]), c(d[66]), c(d[67])
#define TW_LIST_72 TW_LIST_68 ", %68, %69, %70, %71"
#define TW_OUT_72(c, d) TW_OUT_68(c, d), c(d[68]), c(d[69]), c(d[70]), c(d[71])
#define TW_LIST_76 TW_LIST_72 ", %72, %73, %74, %75"
#define TW_OUT_76(c, d) TW_OUT_72(c, d), c(d[72]), c(d[73]), c(d[74]), c(d[75])
#define TW_LIST_80 TW_LIST_76 ", %76, %77, %78, %79"
#define TW_OUT_80(c, d) TW_OUT_76(c, d), c(d[76]), c(d[77]), c(d[78]), c(d[79])
#define TW_LIST_84 TW_LIST_80 ", %80, %81, %82, %83"
#define TW_OUT_84(c, d) TW_OUT_80(c, d), c(d[80]), c(d[81]), c(d[82]), c(d[83])
#define TW_LIST_88 TW_LIST_84 ", %84, %85, %86, %87"
#define TW_OUT_88(c, d) TW_OUT_84(c, d), c(d[84]), c(d[85]), c(d[86]), c(d[87])
#define TW_LIST_92 TW_LIST_88 ", %88, %89, %90, %91"
#define TW_OUT_92(c, d) TW_OUT_88(c, d), c(d[88]), c(d[89]), c(d[90]), c(d[91])
#define TW_LIST_96 TW_LIST_92 ", %92, %93, %94, %95"
#define TW_OUT_96(c, d) TW_OUT_92(c, d), c(d[92]), c(d[93]), c(d[94]), c(d[95])
#define TW_LIST_100 TW_LIST_96 ", %96, %97, %98, %99"
#define TW_OUT_100(c, d) TW_OUT_96(c, d), c(d[96]), c(d[97]), c(d[98]), c(d[99])
#define TW_LIST_104 TW_LIST_100 ", %100, %101, %102, %103"
#define TW_OUT_104(c, d) TW_OUT_100(c, d), c(d[100]), c(d[101]), c(d[102]), c(d[103])
#define TW_LIST_108 TW_LIST_104 ", %104, %105, %106, %107"
#define TW_OUT_108(c, d) TW_OUT_104(c, d), c(d[104]), c(d[105]), c(d[106]), c(d[107])
#define TW_LIST_112 TW_LIST_108 ", %108, %109, %110, %111"
#define TW_OUT_112(c, d) TW_OUT_108(c, d), c(d[108]), c(d[109]), c(d[110]), c(d[111])
#define TW_LIST_116 TW_LIST_112 ", %112, %113, %114, %115"
#define TW_OUT_116(c, d) TW_OUT_112(c, d), c(d[112]), c(d[113]), c(d[114]), c(d[115])
#define TW_LIST_120 TW_LIST_116 ", %116, %117, %118, %119"
#define TW_OUT_120(c, d) TW_OUT_116(c, d), c(d[116]), c(d[117]), c(d[118]), c(d[119])
#define TW_LIST_124 TW_LIST_120 ", %120, %121, %122, %123"
#define TW_OUT_124(c, d) TW_OUT_120(c, d), c(d[120]), c(d[121]), c(d[122]), c(d[123])
#define TW_LIST_128 TW_LIST_124 ", %124, %125, %126, %127"
#define TW_OUT_128(c, d) TW_OUT_124(c, d), c(d[124]), c(d[125]), c(d[126]), c(d[127])

#define TW_F(x) "+f"(x)
#define TW_I(x) "+r"(x)

// Placeholders after R accumulators: descriptors (or four A registers and one descriptor), then the flag.
#define TW_SS_4 "%4, %5, p"
#define TW_SSP_4 "%6"
#define TW_RS_4 "{%4, %5, %6, %7}, %8, p"
#define TW_RSP_4 "%9"
#define TW_SS_8 "%8, %9, p"
#define TW_SSP_8 "%10"
#define TW_RS_8 "{%8, %9, %10, %11}, %12, p"
#define TW_RSP_8 "%13"
#define TW_SS_12 "%12, %13, p"
#define TW_SSP_12 "%14"
#define TW_RS_12 "{%12, %13, %14, %15}, %16, p"
#define TW_RSP_12 "%17"
#define TW_SS_16 "%16, %17, p"
#define TW_SSP_16 "%18"
#define TW_RS_16 "{%16, %17, %18, %19}, %20, p"
#define TW_RSP_16 "%21"
#define TW_SS_20 "%20, %21, p"
#define TW_SSP_20 "%22"
#define TW_RS_20 "{%20, %21, %22, %23}, %24, p"
#define TW_RSP_20 "%25"
#define TW_SS_24 "%24, %25, p"
#define TW_SSP_24 "%26"
#define TW_RS_24 "{%24, %25, %26, %27}, %28, p"
#define TW_RSP_24 "%29"
#define TW_SS_28 "%28, %29, p"
#define TW_SSP_28 "%30"
#define TW_RS_28 "{%28, %29, %30, %31}, %32, p"
#define TW_RSP_28 "%33"
#define TW_SS_32 "%32, %33, p"
#define TW_SSP_32 "%34"
#define TW_RS_32 "{%32, %33, %34, %35}, %36, p"
#define TW_RSP_32 "%37"
#define TW_SS_36 "%36, %37, p"
#define TW_SSP_36 "%38"
#define TW_RS_36 "{%36, %37, %38, %39}, %40, p"
#define TW_RSP_36 "%41"
#define TW_SS_40 "%40, %41, p"
#define TW_SSP_40 "%42"
#define TW_RS_40 "{%40, %41, %42, %43}, %44, p"
#define TW_RSP_40 "%45"
#define TW_SS_44 "%44, %45, p"
#define TW_SSP_44 "%46"
#define TW_RS_44 "{%44, %45, %46, %47}, %48, p"
#define TW_RSP_44 "%49"
#define TW_SS_48 "%48, %49, p"
#define TW_SSP_48 "%50"
#define TW_RS_48 "{%48, %49, %50, %51}, %52, p"
#define TW_RSP_48 "%53"
#define TW_SS_52 "%52, %53, p"
#define TW_SSP_52 "%54"
#define TW_RS_52 "{%52, %53, %54, %55}, %56, p"
#define TW_RSP_52 "%57"
#define TW_SS_56 "%56, %57, p"
#define TW_SSP_56 "%58"
#define TW_RS_56 "{%56, %57, %58, %59}, %60, p"
#define TW_RSP_56 "%61"
#define TW_SS_60 "%60, %61, p"
#define TW_SSP_60 "%62"
#define TW_RS_60 "{%60, %61, %62, %63}, %64, p"
#define TW_RSP_60 "%65"
#define TW_SS_64 "%64, %65, p"
#define TW_SSP_64 "%66"
#define TW_RS_64 "{%64, %65, %66, %67}, %68, p"
#define TW_RSP_64 "%69"
#define TW_SS_68 "%68, %69, p"
#define TW_SSP_68 "%70"
#define TW_RS_68 "{%68, %69, %70, %71}, %72, p"
#define TW_RSP_68 "%73"
#define TW_SS_72 "%72, %73, p"
#define TW_SSP_72 "%74"
#define TW_RS_72 "{%72, %73, %74, %75}, %76, p"
#define TW_RSP_72 "%77"
#define TW_SS_76 "%76, %77, p"
#define TW_SSP_76 "%78"
#define TW_RS_76 "{%76, %77, %78, %79}, %80, p"
#define TW_RSP_76 "%81"
#define TW_SS_80 "%80, %81, p"
#define TW_SSP_80 "%82"
#define TW_RS_80 "{%80, %81, %82, %83}, %84, p"
#define TW_RSP_80 "%85"
#define TW_SS_84 "%84, %85, p"
#define TW_SSP_84 "%86"
#define TW_RS_84 "{%84, %85, %86, %87}, %88, p"
#define TW_RSP_84 "%89"
#define TW_SS_88 "%88, %89, p"
#define TW_SSP_88 "%90"
#define TW_RS_88 "{%88, %89, %90, %91}, %92, p"
#define TW_RSP_88 "%93"
#define TW_SS_92 "%92, %93, p"
#define TW_SSP_92 "%94"
#define TW_RS_92 "{%92, %93, %94, %95}, %96, p"
#define TW_RSP_92 "%97"
#define TW_SS_96 "%96, %97, p"
#define TW_SSP_96 "%98"
#define TW_RS_96 "{%96, %97, %98, %99}, %100, p"
#define TW_RSP_96 "%101"
#define TW_SS_100 "%100, %101, p"
#define TW_SSP_100 "%102"
#define TW_RS_100 "{%100, %101, %102, %103}, %104, p"
#define TW_RSP_100 "%105"
#define TW_SS_104 "%104, %105, p"
#define TW_SSP_104 "%106"
#define TW_RS_104 "{%104, %105, %106, %107}, %108, p"
#define TW_RSP_104 "%109"
#define TW_SS_108 "%108, %109, p"
#define TW_SSP_108 "%110"
#define TW_RS_108 "{%108, %109, %110, %111}, %112, p"
#define TW_RSP_108 "%113"
#define TW_SS_112 "%112, %113, p"
#define TW_SSP_112 "%114"
#define TW_RS_112 "{%112, %113, %114, %115}, %116, p"
#define TW_RSP_112 "%117"
#define TW_SS_116 "%116, %117, p"
#define TW_SSP_116 "%118"
#define TW_RS_116 "{%116, %117, %118, %119}, %120, p"
#define TW_RSP_116 "%121"
#define TW_SS_120 "%120, %121, p"
#define TW_SSP_120 "%122"
#define TW_RS_120 "{%120, %121, %122, %123}, %124, p"
#define TW_RSP_120 "%125"
#define TW_SS_124 "%124, %125, p"
#define TW_SSP_124 "%126"
#define TW_RS_124 "{%124, %125, %126, %127}, %128, p"
#define TW_RSP_124 "%129"
#define TW_SS_128 "%128, %129, p"
#define TW_SSP_128 "%130"
#define TW_RS_128 "{%128, %129, %130, %131}, %132, p"
#define TW_RSP_128 "%133"

// One instruction, both operands in shared memory. TYPES: `.f32.bf16.bf16`; SUFFIX: what follows the flag.
#define TW_WGMMA_SS(NAME, R, SHAPE, TYPES, T, BIND, SUFFIX)                                                 \
  TW_INLINE void NAME(T (&d)[R], u64 a, u64 b, int keep) {                                                  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " TW_SSP_##R ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned." SHAPE TYPES " {" TW_LIST_##R "}, " TW_SS_##R SUFFIX "; }"   \
                 : TW_OUT_##R(BIND, d) : "l"(a), "l"(b), "r"(keep));                                         \
  }
// The same with A in registers.
#define TW_WGMMA_RS(NAME, R, SHAPE, TYPES, T, BIND, SUFFIX)                                                 \
  TW_INLINE void NAME(T (&d)[R], const u32 (&a)[4], u64 b, int keep) {                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " TW_RSP_##R ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned." SHAPE TYPES " {" TW_LIST_##R "}, " TW_RS_##R SUFFIX "; }"   \
                 : TW_OUT_##R(BIND, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));      \
  }

#endif

}  // namespace tw
