//! Largest errors of the elementary functions, against the C library in double precision.
//! The bounds are the table in the crate `emit-llvm`, file `math.rs`.
//!
//! In single precision some millions of arguments are tried, most of them where the functions bend. `TILEWRIGHT_ULP_STEP=1`
//! tries every one of the 2^32 (minutes per function), `=97` every 97th; `TILEWRIGHT_ULP_ONLY=tanh` one function.

mod common;

use std::collections::BTreeMap;
use tilewright_base::DType;
use tilewright_emit_llvm::emit_func_array;
use tilewright_expr::{Func, Op};
use tilewright_jit::Source;

type ArrayFn = unsafe extern "C" fn(*const *const u8, *mut u8, i64);

fn widths() -> Vec<u32> {
    if std::is_x86_feature_detected!("avx512dq") { vec![512, 256] } else { vec![256] }
}

fn run<T: Copy + Default, const N: usize>(func: &Func, bits: u32, args: [&[T]; N]) -> Vec<T> {
    let emitted = emit_func_array(func, "f", bits).unwrap();
    let jit = common::jit();
    let source = Source { symbol: "f".into(), text: emitted.llvm_ir };
    let build =
        jit.build(std::slice::from_ref(&source)).unwrap_or_else(|e| panic!("{e}\n{}", source.text));
    // SAFETY: the function was written with this signature, and the arrays have `n` elements.
    unsafe {
        let call: ArrayFn = std::mem::transmute(build.library.address(0));
        let mut out = vec![T::default(); args[0].len()];
        let ptrs: Vec<*const u8> = args.iter().map(|a| a.as_ptr().cast()).collect();
        call(ptrs.as_ptr(), out.as_mut_ptr().cast(), out.len() as i64);
        out
    }
}

/// Distance in units of the last place of the exact result's type.
fn ulp32(got: f32, want: f64) -> f64 {
    let rounded = want as f32;
    if got.is_nan() || rounded.is_nan() {
        return if got.is_nan() == rounded.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if got == rounded {
        return 0.0;
    }
    if got.is_infinite() || rounded.is_infinite() {
        return f64::INFINITY;
    }
    let exp = (rounded.abs().to_bits() >> 23).max(1) as i32 - 127 - 23;
    (f64::from(got) - want).abs() / 2f64.powi(exp)
}

fn ulp64(got: f64, want: f64) -> f64 {
    if got.is_nan() || want.is_nan() {
        return if got.is_nan() == want.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if got == want {
        return 0.0;
    }
    if got.is_infinite() || want.is_infinite() {
        return f64::INFINITY;
    }
    let exp = (want.abs().to_bits() >> 52).max(1) as i32 - 1023 - 52;
    (got - want).abs() / 2f64.powi(exp.max(-1022)) / 2f64.powi((exp + 1022).min(0))
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// Operation, reference, bound for f32, bound for f64, largest |argument| for f32 and f64.
#[allow(clippy::type_complexity, reason = "a table")]
fn table() -> Vec<(Op, fn(f64) -> f64, f64, f64, f64, f64)> {
    const ALL: f64 = f64::INFINITY;
    vec![
        (Op::Exp, f64::exp, 1.0, 2.0, ALL, ALL),
        (Op::Exp2, f64::exp2, 1.0, 2.0, ALL, ALL),
        (Op::Expm1, f64::exp_m1, 2.5, 4.0, ALL, ALL),
        (Op::Sigmoid, sigmoid, 2.0, 3.0, ALL, ALL),
        (Op::Tanh, f64::tanh, 2.0, 4.0, ALL, ALL),
        (Op::Log, f64::ln, 1.5, 1.5, ALL, ALL),
        (Op::Log2, f64::log2, 1.0, 3.0, ALL, ALL),
        (Op::Log1p, f64::ln_1p, 1.0, 3.0, ALL, ALL),
        (Op::Erf, libm::erf, 1.5, 2.0, ALL, ALL),
        (Op::Sin, f64::sin, 1.0, 2.5, 1.1e12, 1e9),
        (Op::Cos, f64::cos, 1.0, 2.5, 1.1e12, 1e9),
        (Op::Tan, f64::tan, 1.0, 3.0, 1.1e12, 1e9),
        (Op::Asin, f64::asin, 1.0, 3.0, ALL, ALL),
        (Op::Acos, f64::acos, 1.0, 3.0, ALL, ALL),
        (Op::Atan, f64::atan, 1.0, 3.0, ALL, ALL),
        (Op::Sinh, f64::sinh, 1.0, 4.0, ALL, ALL),
        (Op::Cosh, f64::cosh, 1.0, 4.0, ALL, ALL),
        (Op::Asinh, libm::asinh, 1.0, 4.0, ALL, ALL),
        (Op::Acosh, |x| if x < 1.0 { f64::NAN } else { libm::acosh(x) }, 1.0, 4.0, ALL, ALL),
        (Op::Atanh, libm::atanh, 1.0, 4.0, ALL, ALL),
    ]
}

/// Arguments that are tried at once.
const CHUNK: usize = 1 << 21;

/// Bit patterns of arguments: every `step`th of all, or, when nobody says how many, fewer far from one and more around it.
fn patterns() -> Box<dyn Iterator<Item = u32>> {
    let step = std::env::var("TILEWRIGHT_ULP_STEP").ok().and_then(|v| v.parse::<usize>().ok());
    if let Some(step) = step {
        return Box::new((0..=u32::MAX).step_by(step.max(1)));
    }
    let bends = 0.015_625f32.to_bits()..32f32.to_bits();
    let both = move |sign: u32| bends.clone().step_by(193).map(move |bits| bits | sign);
    Box::new((0..=u32::MAX).step_by(4001).chain(both(0)).chain(both(1 << 31)))
}

#[test]
fn single_precision_stays_within_its_bounds() {
    let only = std::env::var("TILEWRIGHT_ULP_ONLY").ok();
    let mut worst = BTreeMap::new();
    let mut arguments = patterns().map(f32::from_bits).chain([
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        88.7,
        88.8,
        -87.4,
        -103.9,
    ]);
    loop {
        let xs: Vec<f32> = arguments.by_ref().take(CHUNK).collect();
        if xs.is_empty() {
            break;
        }
        for (op, reference, _, _, limit, _) in table() {
            if only.as_deref().is_some_and(|only| only != op.name()) {
                continue;
            }
            let wanted = |x: &f32| x.is_nan() || f64::from(x.abs()) <= limit;
            let xs: Vec<f32> = xs.iter().copied().filter(wanted).collect();
            let exact: Vec<f64> = xs.iter().map(|x| reference(f64::from(*x))).collect();
            for bits in widths() {
                let ys = run(&Func::unary(op, DType::F32), bits, [&xs]);
                let entry = worst.entry((op.name(), bits)).or_insert((0f64, 0f32));
                for ((x, y), want) in xs.iter().zip(&ys).zip(&exact) {
                    let e = ulp32(*y, *want);
                    if e > entry.0 {
                        *entry = (e, *x);
                    }
                }
            }
        }
    }
    let bounds: BTreeMap<&str, f64> = table().iter().map(|row| (row.0.name(), row.2)).collect();
    let mut failures = Vec::new();
    for ((name, bits), (worst, at)) in worst {
        println!("{name:8} f32 {bits}: {worst:.3} ulp at {at:e}");
        if worst > bounds[name] {
            failures.push(format!("{name} {bits}: {worst} at {at:e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn double_precision_stays_within_its_bounds() {
    let step = 0x0000_7123_4567_89abu64;
    let mut xs: Vec<f64> = (0..u64::MAX / step).map(|i| f64::from_bits(i * step)).collect();
    // Where the functions bend.
    xs.extend((0..200_000).map(|i| (f64::from(i) - 1e5) / 1e4 * 1.000_000_123));
    xs.extend((0..200_000).map(|i| (f64::from(i) - 1e5) / 1e2 * 1.000_000_123));
    xs.extend([0.0, -0.0, 1.0, -1.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 709.9, -745.0]);
    let mut failures = Vec::new();
    for (op, reference, _, bound, _, limit) in table() {
        for bits in widths() {
            let xs: Vec<f64> =
                xs.iter().copied().filter(|x| x.is_nan() || x.abs() <= limit).collect();
            let ys = run(&Func::unary(op, DType::F64), bits, [&xs]);
            let (mut worst, mut at) = (0f64, 0f64);
            for (x, y) in xs.iter().zip(&ys) {
                let e = ulp64(*y, reference(*x));
                if e > worst {
                    (worst, at) = (e, *x);
                }
            }
            println!("{:8} f64 {bits}: {worst:.2} ulp at {at:e}", op.name());
            if worst > bound {
                failures.push(format!("{} {bits}: {worst} at {at:e}", op.name()));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn functions_of_two_arguments() {
    let some = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        2.0,
        -2.0,
        3.0,
        -3.0,
        7.25,
        1e-3,
        1e10,
        1e-30,
        -1e30,
        100.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for x in some {
        for y in some {
            a.push(x);
            b.push(y);
        }
    }
    for i in 0..20_000 {
        a.push((f64::from(i) * 0.618).fract() * 40.0 - 8.0);
        b.push((f64::from(i) * 0.414).fract() * 30.0 - 15.0);
    }
    let pymod = |x: f64, y: f64| {
        let r = x % y;
        if r != 0.0 && (r < 0.0) != (y < 0.0) { r + y } else { r }
    };
    #[allow(clippy::type_complexity, reason = "a table")]
    let ops: [(Op, &dyn Fn(f64, f64) -> f64, f64, f64); 4] = [
        (Op::Pow, &f64::powf, 1.0, 1100.0),
        (Op::Atan2, &f64::atan2, 1.0, 3.0),
        (Op::Rem, &|x, y| x % y, 0.5, 0.0),
        (Op::Mod, &pymod, 0.5, 0.0),
    ];
    let (a32, b32): (Vec<f32>, Vec<f32>) =
        (a.iter().map(|x| *x as f32).collect(), b.iter().map(|x| *x as f32).collect());
    let mut failures = Vec::new();
    for (op, reference, bound32, bound64) in ops {
        for bits in widths() {
            let mut worst = (0f64, 0f64, 0f64);
            for ((x, y), got) in
                a.iter().zip(&b).zip(run(&Func::binary(op, DType::F64), bits, [&a, &b]))
            {
                let e = ulp64(got, reference(*x, *y));
                if e > worst.0 {
                    worst = (e, *x, *y);
                }
            }
            let mut worst32 = (0f64, 0f32, 0f32);
            for ((x, y), got) in
                a32.iter().zip(&b32).zip(run(&Func::binary(op, DType::F32), bits, [&a32, &b32]))
            {
                let e = ulp32(got, reference(f64::from(*x), f64::from(*y)));
                if e > worst32.0 {
                    worst32 = (e, *x, *y);
                }
            }
            println!("{:8} {bits}: f32 {worst32:?}, f64 {worst:?}", op.name());
            if worst.0 > bound64 || worst32.0 > bound32 {
                failures.push(format!("{} {bits}: f64 {worst:?} f32 {worst32:?}", op.name()));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
