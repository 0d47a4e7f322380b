//! Speed of one matrix product against the machine's peak: `cargo run --release -p tilewright-emit-llvm --example gemm`.
//! Arguments: M N K BM BN BK rows vectors unroll, all optional.

use std::time::Instant;
use tilewright_base::DType;
use tilewright_expr::Value;
use tilewright_jit::{Jit, Options, Source};
use tilewright_layout::{Dim, Layout};
use tilewright_tile::{Access, CpuKnobs, Kernel, KernelBuilder, Schedule, TileType};

type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64, *mut u8);

fn gemm(m: i64, n: i64, k: i64, panel: i64) -> Kernel {
    let mut b = KernelBuilder::new("gemm");
    let (bm, bn, bk) = (b.tile("BM"), b.tile("BN"), b.tile("BK"));
    let (m, n, k) = (Dim::new(m), Dim::new(n), Dim::new(k));
    let pn = b.grid("pn", n.ceil_div(&bn));
    let pm = b.grid("pm", m.ceil_div(&bm));
    let a = b.param("A", DType::F32, Layout::row_major(&[m.clone(), k.clone()]), Access::In);
    let w = b.param("B", DType::F32, Layout::panels(&[k.clone(), n.clone()], 1, panel), Access::In);
    let c = b.param("C", DType::F32, Layout::row_major(&[m.clone(), n.clone()]), Access::Out);
    let zero = b.full(Value::Float(0.0), TileType::new(DType::F32, vec![bm.clone(), bn.clone()]));
    let (i, carried) = b.begin_for("k", Dim::new(0), k.ceil_div(&bk), &[zero]);
    let ta = b.load(a, vec![&pm * &bm, &i * &bk], vec![bm.clone(), bk.clone()]);
    let tb = b.load(w, vec![&i * &bk, &pn * &bn], vec![bk.clone(), bn.clone()]);
    let d = b.mma(carried[0], ta, tb, Some(&k - &i * &bk));
    let out = b.end_for(&[d]);
    b.store(c, vec![&pm * &bm, &pn * &bn], out[0]);
    b.finish()
}

/// A loop of 24 independent multiply-adds on whole registers: the machine's peak.
fn peak_ir() -> String {
    let mut body = String::new();
    let (mut phis, mut fmas, mut sum) = (String::new(), String::new(), String::new());
    for i in 0..24 {
        phis +=
            &format!("  %a{i} = phi <16 x float> [ zeroinitializer, %start ], [ %b{i}, %go ]\n");
        fmas += &format!(
            "  %b{i} = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %a{i})\n"
        );
        sum += &format!("  store volatile <16 x float> %b{i}, ptr %s, align 64\n");
    }
    body += "declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)\n";
    body += "define void @peak(ptr %p, ptr %q, i64 %first, i64 %last, ptr %s) #0 {\nstart:\n";
    body += "  %x = load volatile <16 x float>, ptr %s, align 64\n  br label %go\ngo:\n";
    body += "  %i = phi i64 [ %first, %start ], [ %n, %go ]\n";
    body += &phis;
    body += &fmas;
    body += "  %n = add i64 %i, 1\n  %c = icmp slt i64 %n, %last\n";
    body += "  br i1 %c, label %go, label %end\nend:\n";
    body += &sum;
    body += "  ret void\n}\nattributes #0 = { \"prefer-vector-width\"=\"512\" \"min-legal-vector-width\"=\"512\" }\n";
    body
}

/// Nanoseconds that this thread has run on a processor: other programs do not count.
fn cpu_ns() -> f64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|s| s.split(' ').next().and_then(|n| n.parse().ok()))
        .unwrap_or(0.0)
}

/// 64-byte aligned floats.
fn floats(n: usize, f: impl Fn(usize) -> f32) -> (Vec<f32>, usize) {
    let mut v = vec![0f32; n + 16];
    let shift = v.as_ptr().align_offset(64);
    for i in 0..n {
        v[shift + i] = f(i);
    }
    (v, shift)
}

fn main() {
    let args: Vec<i64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let get = |i: usize, d: i64| args.get(i).copied().unwrap_or(d);
    let (m, n, k) = (get(0, 1024), get(1, 1024), get(2, 1024));
    let (bm, bn, bk) = (get(3, 128), get(4, 512), get(5, 1024));
    let mut knobs = CpuKnobs::avx512();
    knobs.mma_rows = get(6, 14) as u32;
    knobs.mma_vectors = get(7, 2) as u32;
    knobs.unroll_k = get(8, 2) as u32;
    let panel = i64::from(knobs.mma_vectors) * 16;
    let kernel = gemm(m, n, k, panel);
    let schedule = Schedule {
        tiles: [("BM".into(), bm), ("BN".into(), bn), ("BK".into(), bk)].into(),
        cpu: knobs,
    };
    let emitted = tilewright_emit_llvm::emit_kernel(&kernel, &schedule).unwrap();
    if std::env::var("DUMP").is_ok() {
        std::fs::write("gemm.ll", &emitted.llvm_ir).unwrap();
    }
    let passes = std::env::var("PASSES").unwrap_or(Options::default().passes);
    let jit = Jit::new(Options { passes, ..Options::default() }).unwrap();
    let source = Source { symbol: "gemm".into(), text: emitted.llvm_ir.clone() };
    let t = Instant::now();
    let build = jit.build(std::slice::from_ref(&source)).unwrap();
    println!("compiled in {:?}, {} bytes of text", t.elapsed(), emitted.llvm_ir.len());
    if std::env::var("DUMP").is_ok() {
        std::fs::write("gemm.s", jit.assembly(&source).unwrap()).unwrap();
    }
    // SAFETY: the kernel has this signature.
    let run: KernelFn = unsafe { std::mem::transmute(build.library.address(0)) };
    let (mu, nu, ku) = (m as usize, n as usize, k as usize);
    let value = |i: usize| ((i * 2654435761) % 1000) as f32 / 500.0 - 1.0;
    let (a, a0) = floats(mu * ku, value);
    let p = panel as usize;
    let np = nu.div_ceil(p) * p;
    let b_at = |r: usize, c: usize| value(r * nu + c + 77);
    let (mut b, b0) = floats(ku * np, |_| 0.0);
    for r in 0..ku {
        for c in 0..nu {
            b[b0 + (c / p) * p * ku + r * p + c % p] = b_at(r, c);
        }
    }
    let (c, c0) = floats(mu * nu, |_| f32::NAN);
    let blocks = (m + bm - 1) / bm * ((n + bn - 1) / bn);
    let ptrs = [a[a0..].as_ptr() as usize, b[b0..].as_ptr() as usize, c[c0..].as_ptr() as usize];
    let threads = 2;
    let mut scratch: Vec<Vec<u8>> =
        (0..threads).map(|_| vec![0; emitted.scratch_bytes + 64]).collect();
    let mut once = |reps: usize| {
        std::thread::scope(|s| {
            for (t, scratch) in scratch.iter_mut().enumerate() {
                s.spawn(move || {
                    let (lo, hi) = (blocks * t as i64 / threads, blocks * (t as i64 + 1) / threads);
                    let shift = scratch.as_ptr().align_offset(64);
                    for _ in 0..reps {
                        // SAFETY: the arrays have the sizes that the kernel was made for; threads
                        // write different blocks.
                        unsafe {
                            run(
                                ptrs.as_ptr().cast(),
                                std::ptr::null(),
                                lo,
                                hi,
                                scratch[shift..].as_mut_ptr(),
                            );
                        }
                    }
                });
            }
        });
    };
    once(1);
    let mut worst = 0f64;
    for (i, j) in [(0, 0), (mu - 1, nu - 1), (mu / 2, nu / 3), (mu / 3, nu - 1), (mu - 1, nu / 2)] {
        let want: f64 =
            (0..ku).map(|x| f64::from(a[a0 + i * ku + x]) * f64::from(b_at(x, j))).sum();
        worst = worst.max((want - f64::from(c[c0 + i * nu + j])).abs());
    }
    println!("largest error of five elements: {worst:e}");
    let flops = 2.0 * (m * n * k) as f64;
    let peak = jit.build(&[Source { symbol: "peak".into(), text: peak_ir() }]).unwrap();
    // SAFETY: written with this signature.
    let peak_run: KernelFn = unsafe { std::mem::transmute(peak.library.address(0)) };
    let peak_flops = 20_000.0 * 24.0 * 32.0;
    // One thread in processor time, product and peak in turns; then wall time on all threads.
    let mut ratios = Vec::new();
    let mut scratch1 = vec![0u8; emitted.scratch_bytes + 64];
    let shift = scratch1.as_ptr().align_offset(64);
    for _ in 0..9 {
        let t0 = cpu_ns();
        // SAFETY: reads and writes the first vector of scratch.
        unsafe {
            for _ in 0..2000 {
                peak_run(
                    ptrs.as_ptr().cast(),
                    std::ptr::null(),
                    0,
                    20_000,
                    scratch1[shift..].as_mut_ptr(),
                );
            }
        }
        let t1 = cpu_ns();
        let reps = (200e-3 * 1e11 / flops).ceil().max(1.0) as usize;
        // SAFETY: as above.
        unsafe {
            for _ in 0..reps {
                run(
                    ptrs.as_ptr().cast(),
                    std::ptr::null(),
                    0,
                    blocks,
                    scratch1[shift..].as_mut_ptr(),
                );
            }
        }
        let t2 = cpu_ns();
        let (p, g) = (2000.0 * peak_flops / (t1 - t0), reps as f64 * flops / (t2 - t1));
        ratios.push((g / p, g, p));
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (r, g, p) = ratios[ratios.len() / 2];
    println!("one thread: {g:.1} of {p:.1} GFLOP/s, {:.1}% (median)", r * 100.0);
    let mut best = f64::MAX;
    for _ in 0..12 {
        let t = Instant::now();
        once(10);
        best = best.min(t.elapsed().as_secs_f64() / 10.0);
    }
    println!(
        "{threads} threads: {:.1} GFLOP/s, best of 12 ({:.3} ms)",
        flops / best / 1e9,
        best * 1e3
    );
}
