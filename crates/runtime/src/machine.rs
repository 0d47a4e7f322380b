//! Measures the ceilings of this machine: what `tw machine` runs once.
//!
//! Each figure is the best of several short runs: a ceiling is what the machine can do, and every
//! disturbance only lowers what is seen.

use crate::memory::AlignedBuffer;
use crate::pool::Pool;
use std::hint::black_box;
use std::time::Instant;
use tilewright_base::Result;
use tilewright_target::{Ceilings, Cpu};

/// Bytes of the arrays in the memory tests, as a multiple of the last-level cache.
const BEYOND_CACHE: usize = 4;

/// Measures `cpu`'s ceilings with `pool`; takes about two seconds. Errors when memory is short.
pub fn measure(cpu: &Cpu, pool: &Pool) -> Result<Ceilings> {
    let one = Pool::new(1);
    let f32_1 = best(5, || fma_rate(cpu, &one));
    let f32_all = best(5, || fma_rate(cpu, pool));
    let has = |feature: &str| cpu.vector_bits == 512 && cpu.has(feature);
    let rate = |here: bool, chains: Chains, work: f64| match here {
        true => best(5, || chain_rate(pool, work, chains)),
        false => 0.0,
    };
    // Sixteen sums per instruction, of two or four products.
    let bf16 = rate(has("avx512bf16"), bf16_chains, 64.0);
    let int8 = rate(has("avx512vnni"), int8_chains, 128.0);
    let tiles =
        |feature: &str, op: fn(u64), work: f64| match cpu.has("amx-tile") && cpu.has(feature) {
            true if crate::permission::request_tiles() => best(5, || tile_rate(pool, work, op)),
            _ => 0.0,
        };
    // 16x16 sums per instruction, of 32 or 64 products.
    let amx_bf16 = tiles("amx-bf16", bf16_tiles, 16384.0);
    let amx_int8 = tiles("amx-int8", int8_tiles, 32768.0);
    let bytes = (cpu.l3_bytes * BEYOND_CACHE).clamp(64 << 20, 512 << 20);
    let mut from = AlignedBuffer::new(bytes, "the memory test")?;
    let mut to = AlignedBuffer::new(bytes, "the memory test")?;
    // Touch every page, so that no run pays for mapping it.
    from.bytes_mut().fill(1);
    to.bytes_mut().fill(2);
    let read = best(4, || read_rate(&from, bytes, 1, pool));
    let copy = best(4, || copy_rate(&from, &mut to, pool));
    let cached = cpu.l2_bytes / 2;
    let l2 = best(4, || read_rate(&from, cached, 64, &one));
    let l3 = best(4, || read_rate(&from, (cpu.l3_bytes / 2).min(bytes), 4, pool));
    Ok(Ceilings {
        measured: true,
        f32_flops_per_s_1_thread: f32_1,
        f32_flops_per_s: f32_all,
        memory_read_bytes_per_s: read,
        memory_copy_bytes_per_s: copy,
        l2_read_bytes_per_s: l2,
        l3_read_bytes_per_s: l3,
        launch_s: launch_seconds(pool),
        bf16_flops_per_s: bf16,
        int8_ops_per_s: int8,
        amx_bf16_flops_per_s: amx_bf16,
        amx_int8_ops_per_s: amx_int8,
        wake_s: wake_seconds(pool),
    })
}

fn best(rounds: usize, mut run: impl FnMut() -> f64) -> f64 {
    (0..rounds).map(|_| run()).fold(0.0, f64::max)
}

fn fma_rate(cpu: &Cpu, pool: &Pool) -> f64 {
    const ITERATIONS: u64 = 2_000_000;
    let start = Instant::now();
    pool.run(pool.threads() as i64 * 8, &|first, last, _| {
        for _ in first..last {
            black_box(fma_chains(cpu, ITERATIONS / 8));
        }
    });
    let lanes = cpu.f32_lanes() as f64;
    let work = ITERATIONS as f64 * CHAINS as f64 * lanes * 2.0 * pool.threads() as f64;
    work / start.elapsed().as_secs_f64()
}

/// Runs so many rounds of [`CHAINS`] instructions.
type Chains = fn(u64) -> f32;

/// Operations per second when an instruction does `work` of them.
fn chain_rate(pool: &Pool, work: f64, chains: Chains) -> f64 {
    const ITERATIONS: u64 = 2_000_000;
    let start = Instant::now();
    pool.run(pool.threads() as i64 * 8, &|first, last, _| {
        for _ in first..last {
            black_box(chains(ITERATIONS / 8));
        }
    });
    let all = ITERATIONS as f64 * CHAINS as f64 * work * pool.threads() as f64;
    all / start.elapsed().as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
fn bf16_chains(iterations: u64) -> f32 {
    if !std::arch::is_x86_feature_detected!("avx512bf16") {
        return 0.0;
    }
    // SAFETY: the feature that the function needs was just found present; it implies AVX-512F.
    unsafe { bf16_chains_avx512(iterations) }
}

#[cfg(target_arch = "x86_64")]
fn int8_chains(iterations: u64) -> f32 {
    if !std::arch::is_x86_feature_detected!("avx512vnni") {
        return 0.0;
    }
    // SAFETY: as above.
    unsafe { int8_chains_avx512(iterations) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_chains_avx512(iterations: u64) -> f32 {
    use std::arch::x86_64::*;
    let half = _mm512_set1_ps(black_box(0.5));
    let pairs = _mm512_cvtne2ps_pbh(half, half);
    let mut acc = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..iterations {
        for a in &mut acc {
            *a = _mm512_dpbf16_ps(*a, pairs, pairs);
        }
    }
    acc.iter().map(|a| _mm512_reduce_add_ps(*a)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn int8_chains_avx512(iterations: u64) -> f32 {
    use std::arch::x86_64::*;
    let bytes = _mm512_set1_epi8(black_box(3));
    let mut acc = [_mm512_set1_epi32(1); CHAINS];
    for _ in 0..iterations {
        for a in &mut acc {
            *a = _mm512_dpbusd_epi32(*a, bytes, bytes);
        }
    }
    acc.iter().map(|a| _mm512_reduce_add_epi32(*a) as f32).sum()
}

#[cfg(not(target_arch = "x86_64"))]
fn bf16_chains(_iterations: u64) -> f32 {
    0.0
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_chains(_iterations: u64) -> f32 {
    0.0
}

/// Independent multiply-adds in flight: more than latency times ports (4 x 2).
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
fn fma_chains(cpu: &Cpu, iterations: u64) -> f32 {
    if cpu.vector_bits == 512 && std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature that the function needs was just found present.
        unsafe { fma_chains_avx512(iterations) }
    } else if std::arch::is_x86_feature_detected!("fma") {
        // SAFETY: as above; FMA implies AVX.
        unsafe { fma_chains_avx2(iterations) }
    } else {
        0.0
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fma_chains(_cpu: &Cpu, _iterations: u64) -> f32 {
    0.0
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_chains_avx512(iterations: u64) -> f32 {
    use std::arch::x86_64::*;
    let (scale, step) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
    let mut acc = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..iterations {
        for a in &mut acc {
            *a = _mm512_fmadd_ps(*a, scale, step);
        }
    }
    acc.iter().map(|a| _mm512_reduce_add_ps(*a)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,fma")]
fn fma_chains_avx2(iterations: u64) -> f32 {
    use std::arch::x86_64::*;
    let (scale, step) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
    let mut acc = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..iterations {
        for a in &mut acc {
            *a = _mm256_fmadd_ps(*a, scale, step);
        }
    }
    acc.iter().map(|a| _mm256_cvtss_f32(*a)).sum()
}

/// Sums `repeats` times over the first `bytes` of an array; bytes per second.
fn read_rate(array: &AlignedBuffer, bytes: usize, repeats: usize, pool: &Pool) -> f64 {
    const BLOCK: usize = 64 << 10;
    let start = Instant::now();
    for _ in 0..repeats {
        pool.run(bytes.div_ceil(BLOCK) as i64, &|first, last, _| {
            let range = first as usize * BLOCK..(last as usize * BLOCK).min(bytes);
            let mut sums = [0u64; 32];
            for chunk in array.bytes()[range].chunks_exact(256) {
                for (sum, word) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
                    *sum ^= u64::from_le_bytes([
                        word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
                    ]);
                }
            }
            black_box(sums);
        });
    }
    (bytes * repeats) as f64 / start.elapsed().as_secs_f64()
}

fn copy_rate(from: &AlignedBuffer, to: &mut AlignedBuffer, pool: &Pool) -> f64 {
    struct Target(*mut u8);
    // SAFETY: blocks write disjoint ranges of the target, which outlives the parallel region.
    unsafe impl Sync for Target {}
    const BLOCK: usize = 256 << 10;
    let bytes = from.len().min(to.len());
    let target = Target(to.as_ptr());
    let target = &target;
    let start = Instant::now();
    pool.run((bytes / BLOCK) as i64, &|first, last, _| {
        let (at, len) = (first as usize * BLOCK, (last - first) as usize * BLOCK);
        // SAFETY: both ranges lie inside their buffers (`last * BLOCK <= bytes`), and no other
        // block touches this part of the target.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(at), target.0.add(at), len) };
    });
    2.0 * (bytes / BLOCK * BLOCK) as f64 / start.elapsed().as_secs_f64()
}

fn launch_seconds(pool: &Pool) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..200 {
        let start = Instant::now();
        pool.run(pool.threads() as i64, &|first, _, _| {
            black_box(first);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// As [`launch_seconds`] after a rest in which the workers fall asleep: the median of a few.
fn wake_seconds(pool: &Pool) -> f64 {
    let mut times: Vec<f64> = (0..21)
        .map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let start = Instant::now();
            pool.run(pool.threads() as i64, &|first, _, _| {
                black_box(first);
            });
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Tile instructions in a row, four at a time into four tiles.
const TILE_ROUNDS: u64 = 200_000;

/// Operations per second when an instruction on tiles does `work` of them.
fn tile_rate(pool: &Pool, work: f64, run: fn(u64)) -> f64 {
    let start = Instant::now();
    pool.run(pool.threads() as i64 * 8, &|first, last, _| {
        for _ in first..last {
            run(TILE_ROUNDS / 8);
        }
    });
    TILE_ROUNDS as f64 * 4.0 * work * pool.threads() as f64 / start.elapsed().as_secs_f64()
}

/// Eight whole tiles: palette 1, 64 bytes a row from byte 16 on, 16 rows from byte 48.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct TileConfig([u8; 64]);

#[cfg(target_arch = "x86_64")]
const WHOLE_TILES: TileConfig = {
    let mut config = [0u8; 64];
    config[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
        tile += 1;
    }
    TileConfig(config)
};

/// Rounds of four products of tiles that hold zeros.
macro_rules! tile_chains {
    ($name:ident, $op:literal) => {
        #[cfg(target_arch = "x86_64")]
        fn $name(rounds: u64) {
            let config = &WHOLE_TILES.0;
            // SAFETY: called only where the processor has the instructions and the system gave the process room for
            // tiles (`measure` asked for both). The configuration is 64 readable bytes; nothing else is read or
            // written but tiles, which the compiler does not use, and which are released at the end.
            unsafe {
                std::arch::asm!(
                    "ldtilecfg [{config}]",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "tilezero tmm4",
                    "tilezero tmm5",
                    "tilezero tmm6",
                    "tilezero tmm7",
                    "2:",
                    concat!($op, " tmm0, tmm4, tmm6"),
                    concat!($op, " tmm1, tmm4, tmm7"),
                    concat!($op, " tmm2, tmm5, tmm6"),
                    concat!($op, " tmm3, tmm5, tmm7"),
                    "dec {rounds}",
                    "jnz 2b",
                    "tilerelease",
                    config = in(reg) config.as_ptr(),
                    rounds = inout(reg) rounds.max(1) => _,
                    options(nostack, readonly),
                );
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        fn $name(_rounds: u64) {}
    };
}

tile_chains!(bf16_tiles, "tdpbf16ps");
tile_chains!(int8_tiles, "tdpbssd");
