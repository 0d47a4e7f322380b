//! The gradient of attention after scheduling: the rules, the checker under all orders, values against the tile programs'
//! own interpreter, and those against the definition in f64.

use std::sync::Arc;
use tilewright_base::DType;
use tilewright_interp::Mode;
use tilewright_interp::device::{Options, check, orders, run};
use tilewright_kernels::attention::{
    BackwardPlace, BackwardProblem, Mask, MaskKind, Problem, Strides, backward_plan,
};
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_target::Gpu;
use tilewright_tile::Schedule;

/// A small problem, the schedules of its two programs, and a name.
struct Case {
    name: &'static str,
    problem: BackwardProblem,
    keys: GpuSchedule,
    queries: GpuSchedule,
}

fn tiles(consumers: i64, bq: i64, bt: i64) -> GpuSchedule {
    let mut s = GpuSchedule::hopper(&[("BQ", bq), ("BT", bt)]);
    s.consumers = consumers as u32;
    s.stages = 2;
    s.raster = 1;
    s.dependent = true;
    s
}

/// `[groups, heads each, queries, keys]`, depth 32, rows first.
fn problem(sizes: [i64; 4], causal: Option<i64>, dtype: DType) -> BackwardProblem {
    deep_problem(sizes, 32, causal, dtype)
}

/// The same of any depth.
fn deep_problem(
    [groups, each, rows, keys]: [i64; 4],
    depth: i64,
    causal: Option<i64>,
    dtype: DType,
) -> BackwardProblem {
    let heads = groups * each;
    let p = Problem::dense(2, heads, rows, depth, dtype);
    let q = Strides::rows_first(heads, rows, depth);
    let k = Strides::heads_first(groups, keys, depth);
    let p = Problem { kv_heads: groups, kv_len: keys, causal, q, o: q, k, v: k, ..p };
    BackwardProblem::alike(p)
}

fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |name, problem, keys, queries| out.push(Case { name, problem, keys, queries });
    let bf16 = DType::BF16;
    let one = (tiles(1, 32, 64), tiles(1, 64, 32));
    let two = (tiles(2, 32, 128), tiles(2, 128, 32));
    add("plain", problem([1, 1, 70, 100], None, bf16), one.0.clone(), one.1.clone());
    add("two", problem([2, 1, 100, 150], None, bf16), two.0.clone(), two.1.clone());
    add("shared", problem([1, 3, 70, 100], None, DType::F16), one.0.clone(), one.1.clone());
    add("causal", problem([1, 1, 150, 150], Some(0), bf16), one.0.clone(), one.1.clone());
    add("after a cache", problem([1, 2, 100, 197], Some(97), bf16), two.0.clone(), two.1.clone());
    add("unseen", problem([1, 2, 150, 90], Some(-60), bf16), one.0.clone(), one.1.clone());
    let masked = |kind, dtype, each: [i64; 3], causal| {
        let mut p = problem([1, 2, 70, 100], causal, bf16);
        let [batch, head, row] = each;
        p.forward.mask =
            Some(Mask { dtype, kind, strides: Strides { batch, head, row }, align: 4 });
        p
    };
    let (add_kind, keep) = (MaskKind::Add, MaskKind::Keep);
    let cases = [
        ("truth values of keys", masked(keep, DType::Bool, [101, 0, 0], None)),
        ("truth values", masked(keep, DType::Bool, [7000, 0, 100], Some(30))),
        ("added to keys of each head", masked(add_kind, DType::F32, [202, 101, 0], None)),
        ("added", masked(add_kind, bf16, [0, 7000, 100], None)),
    ];
    for (name, problem) in cases {
        add(name, problem, one.0.clone(), one.1.clone());
    }
    // Two programs for keys.
    let deep = |causal| deep_problem([1, 2, 40, 70], 160, causal, bf16);
    add("deep", deep(None), one.0.clone(), one.1.clone());
    add("deep, causal", deep(Some(30)), one.0.clone(), one.1.clone());
    add("from the start", problem([1, 1, 70, 100], Some(0), bf16), one.0, one.1);
    out
}

/// The definition, for small numbers of a fixed pattern: tensors in f64 by place.
struct Reference {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    u: Vec<f64>,
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn reference(p: &Problem) -> Reference {
    let n = |rows: i64, heads: i64| (p.batch * heads * rows * p.depth) as usize;
    let (nq, nk) = (n(p.q_len, p.heads), n(p.kv_len, p.kv_heads));
    let fill = |n: usize, seed: usize| -> Vec<f64> {
        (0..n).map(|i| (((i * 7 + seed * 5 + i / 11) % 13) as f64 - 6.0) / 4.0).collect()
    };
    let (q, k, v, u) = (fill(nq, 1), fill(nk, 2), fill(nk, 3), fill(nq, 4));
    let rows = (p.batch * p.heads * p.q_len) as usize;
    let mut r = Reference {
        o: vec![0.0; nq],
        lse: vec![f64::NEG_INFINITY; rows],
        dq: vec![0.0; nq],
        dk: vec![0.0; nk],
        dv: vec![0.0; nk],
        q,
        k,
        v,
        u,
    };
    let at =
        |s: &Strides, b: i64, h: i64, row: i64| (b * s.batch + h * s.head + row * s.row) as usize;
    let d = p.depth as usize;
    let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(a, b)| a * b).sum() };
    for b in 0..p.batch {
        for h in 0..p.heads {
            let g = h / (p.heads / p.kv_heads);
            for i in 0..p.q_len {
                let seen = p.causal.map_or(p.kv_len, |c| (i + c + 1).clamp(0, p.kv_len));
                let qi = at(&p.q, b, h, i);
                let kj = |j: i64| at(&p.k, b, g, j);
                let s: Vec<f64> = (0..seen)
                    .map(|j| p.scale * dot(&r.q[qi..qi + d], &r.k[kj(j)..kj(j) + d]))
                    .collect();
                if s.is_empty() {
                    continue;
                }
                let s: Vec<f64> = match &p.mask {
                    None => s,
                    Some(m) => {
                        let first = at(&m.strides, b, h, i);
                        let each = s.iter().enumerate();
                        each.map(|(j, s)| score(m, first + j, *s)).collect()
                    }
                };
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + s.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
                r.lse[((b * p.heads + h) * p.q_len + i) as usize] = lse;
                let w: Vec<f64> = s.iter().map(|x| (x - lse).exp()).collect();
                for (j, w) in w.iter().enumerate() {
                    for c in 0..d {
                        r.o[qi + c] += w * r.v[kj(j as i64) + c];
                    }
                }
                // The result is given, rounded.
                let given: Vec<f64> =
                    r.o[qi..qi + d].iter().map(|x| rounded(p.dtype, *x)).collect();
                let delta = dot(&given, &r.u[qi..qi + d]);
                for (j, w) in w.iter().enumerate() {
                    let kj = kj(j as i64);
                    let ds = w * (dot(&r.u[qi..qi + d], &r.v[kj..kj + d]) - delta) * p.scale;
                    for c in 0..d {
                        r.dv[kj + c] += w * r.u[qi + c];
                        r.dk[kj + c] += ds * r.q[qi + c];
                        r.dq[qi + c] += ds * r.k[kj + c];
                    }
                }
            }
        }
    }
    r
}

fn rounded(dtype: DType, x: f64) -> f64 {
    tilewright_data::read_f64(dtype, &bytes(dtype, &[x]), 0)
}

/// A score under an element of the mask.
fn score(mask: &Mask, i: usize, s: f64) -> f64 {
    match (mask.kind, (i * 7 + i / 13) % 5) {
        (_, 0) => f64::NEG_INFINITY,
        (MaskKind::Keep, _) => s,
        (MaskKind::Add, _) => s + ((i * 3 % 11) as f64 - 5.0) / 4.0,
    }
}

/// The mask's memory.
fn mask_bytes(p: &Problem) -> Vec<u8> {
    let Some(m) = &p.mask else { return Vec::new() };
    let last = (p.batch - 1) * m.strides.batch
        + (p.heads - 1) * m.strides.head
        + (p.q_len - 1) * m.strides.row;
    let mut out = vec![0u8; (last + p.kv_len) as usize * m.dtype.size()];
    for i in 0..(last + p.kv_len) as usize {
        let value = score(m, i, 0.0);
        match m.kind {
            MaskKind::Keep => {
                tilewright_data::from_i64(m.dtype, &mut out, i, i64::from(value == 0.0))
            }
            MaskKind::Add => tilewright_data::from_f64(m.dtype, &mut out, i, value),
        }
    }
    out
}

fn bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    let mut out = vec![0u8; values.len() * dtype.bits() as usize / 8];
    values.iter().enumerate().for_each(|(i, v)| tilewright_data::from_f64(dtype, &mut out, i, *v));
    out
}

fn plan(case: &Case) -> tilewright_kernels::attention::BackwardPlan {
    let mut plan = backward_plan(&case.problem, &Gpu::h200()).unwrap();
    for step in &mut plan.steps[1..] {
        let queries = step.kernel.name.ends_with("queries");
        step.schedule = if queries { case.queries.clone() } else { case.keys.clone() };
    }
    // Two heads at a time: both batches' at least.
    for step in &mut plan.steps[1..] {
        step.sizes.insert(Arc::from("hc"), 2);
    }
    plan
}

#[test]
fn scheduled_gradients_keep_the_rules() {
    for case in cases() {
        for step in plan(&case).steps {
            let name = format!("{}, {}", case.name, step.kernel.name);
            tilewright_tile::verify(&step.kernel).unwrap_or_else(|e| panic!("{name}: {e}"));
            let program =
                lower(&step.kernel, &step.schedule).unwrap_or_else(|e| panic!("{name}: {e}"));
            if let Err(e) = tilewright_device::verify(&program) {
                panic!("{name}: {e}\n{:#?}\n{program}", e.notes());
            }
            if let Err(e) = check(&program, std::slice::from_ref(&step.sizes), &[1, 3]) {
                panic!("{name}: {e}\n{:#?}\n{program}", e.notes());
            }
        }
    }
}

#[test]
fn scheduled_gradients_are_those_of_the_definition() {
    for case in cases() {
        let plan = plan(&case);
        let p = &case.problem.forward;
        let want = reference(p);
        let ld = plan.steps[0].sizes[&Arc::from("ld")];
        let numbers = vec![0u8; (p.batch * p.heads * ld * 4) as usize];
        let half = |n: usize| vec![0u8; n * 2];
        let mut all = std::collections::BTreeMap::from([
            ("Q", bytes(p.dtype, &want.q)),
            ("K", bytes(p.dtype, &want.k)),
            ("V", bytes(p.dtype, &want.v)),
            ("O", bytes(p.dtype, &want.o)),
            ("DO", bytes(p.dtype, &want.u)),
            ("Mask", mask_bytes(p)),
            ("Lse", bytes(DType::F32, &want.lse)),
            ("DQ", half(want.dq.len())),
            ("DK", half(want.dk.len())),
            ("DV", half(want.dv.len())),
            ("0", numbers.clone()),
            ("1", numbers),
        ]);
        let key = |place: &BackwardPlace| match place {
            BackwardPlace::Q => "Q",
            BackwardPlace::K => "K",
            BackwardPlace::V => "V",
            BackwardPlace::O => "O",
            BackwardPlace::DO => "DO",
            BackwardPlace::Lse => "Lse",
            BackwardPlace::Mask => "Mask",
            BackwardPlace::DQ => "DQ",
            BackwardPlace::DK => "DK",
            BackwardPlace::DV => "DV",
            BackwardPlace::Workspace { offset: 0, .. } => "0",
            BackwardPlace::Workspace { .. } => "1",
        };
        for step in &plan.steps {
            let program = lower(&step.kernel, &step.schedule).unwrap();
            let name = format!("{}, {}", case.name, step.kernel.name);
            let before: Vec<Vec<u8>> =
                step.operands.iter().map(|place| all[key(place)].clone()).collect();
            let mut expected = before.clone();
            let schedule = Schedule { tiles: step.schedule.tiles.clone(), ..Schedule::default() };
            tilewright_interp::tile::run(
                &step.kernel,
                &schedule,
                &step.sizes,
                &mut expected,
                Mode::F64,
            )
            .unwrap();
            let product = !step.kernel.name.ends_with("rows");
            for order in orders().into_iter().step_by(9).take(if product { 3 } else { 1 }) {
                let mut got = before.clone();
                let options = Options { clusters: 2, order, mode: Mode::F64, ..Options::default() };
                run(&program, &step.sizes, &mut got, &options)
                    .unwrap_or_else(|e| panic!("{name}: {e}\n{:#?}", e.notes()));
                for (i, (_, param)) in step.kernel.params.iter().enumerate() {
                    assert!(got[i] == expected[i], "{name}: other {} ({order})", param.name);
                }
            }
            for (place, bytes) in step.operands.iter().zip(expected) {
                all.insert(key(place), bytes);
            }
        }
        // Operands, results, weights and gradients of scores are rounded to the type: relative in the Euclidean norm.
        let allowed = if p.dtype == DType::BF16 { 8e-3 } else { 1e-3 };
        for (place, want) in [("DQ", &want.dq), ("DK", &want.dk), ("DV", &want.dv)] {
            let (mut error, mut norm) = (0.0, 0.0);
            for (i, want) in want.iter().enumerate() {
                let have = tilewright_data::read_f64(p.dtype, &all[place], i);
                error += (have - want).powi(2);
                norm += want.powi(2);
            }
            let error = (error / norm).sqrt();
            assert!(error < allowed, "{}: {place} is {error:.1e} off", case.name);
        }
    }
}
