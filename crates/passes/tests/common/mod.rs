//! Helpers for tests of rewrites: build a graph, run it before and after, compare.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::{Graph, GraphBuilder, TensorType, ValueId, verify};
use tilewright_interp::{Mode, run};
use tilewright_layout::{Dim, Env};
use tilewright_passes::{Histogram, PassContext, find_pass};

/// A small deterministic generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// True once in `n` draws on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// In [-2, 2).
    pub fn float(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
    }

    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        let values: Vec<f64> = (0..n)
            .map(|_| match dtype {
                DType::Bool => (self.next() & 1) as f64,
                d if d.is_float() => self.float(),
                _ => (self.next() % 7) as f64,
            })
            .collect();
        Tensor::from_f64s(dtype, shape, &values).unwrap()
    }
}

pub fn f32s(shape: &[i64]) -> TensorType {
    TensorType::new(DType::F32, shape.iter().map(|&d| Dim::new(d)).collect::<Vec<_>>())
}

pub fn input(b: &mut GraphBuilder, name: &str, shape: &[i64]) -> ValueId {
    b.input(name, f32s(shape))
}

pub fn weight(b: &mut GraphBuilder, rng: &mut Rng, shape: &[usize]) -> ValueId {
    let t = rng.tensor(DType::F32, shape);
    b.constant("w", t)
}

pub fn text(b: &mut GraphBuilder, func: &str, inputs: &[ValueId]) -> ValueId {
    b.map_text(func, inputs).unwrap()
}

/// Random inputs; symbols take their values from `env`.
pub fn inputs(graph: &Graph, rng: &mut Rng, env: &Env) -> Vec<Tensor> {
    graph
        .inputs
        .iter()
        .map(|&v| {
            let ty = graph.ty(v);
            let shape: Vec<usize> = ty
                .shape
                .iter()
                .map(|d| d.eval(env).expect("a value for each symbol") as usize)
                .collect();
            rng.tensor(ty.dtype, &shape)
        })
        .collect()
}

/// Largest difference relative to the larger magnitude (at least 1). NaN agrees with NaN.
pub fn difference(a: &[Tensor], b: &[Tensor]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0.0f64;
    for (x, y) in a.iter().zip(b) {
        assert_eq!((x.dtype(), x.shape()), (y.dtype(), y.shape()));
        for (p, q) in x.to_f64s().into_iter().zip(y.to_f64s()) {
            if p == q || (p.is_nan() && q.is_nan()) {
                continue;
            }
            let d = (p - q).abs() / p.abs().max(q.abs()).max(1.0);
            worst = if d.is_nan() { f64::INFINITY } else { worst.max(d) };
        }
    }
    worst
}

/// Both graphs give the same on random inputs; in float64 to the last digits.
pub fn same_on(before: &Graph, after: &Graph, env: &Env) {
    same_within(before, after, env, 1e-12);
}

/// As [`same_on`]. Where constants were computed and rounded to `f32`, differences up to a few
/// times 2^-24 are the definition and not an error.
pub const ROUNDED_CONSTANTS: f64 = 1e-6;

/// Both graphs give nearly the same on random inputs.
pub fn same_within(before: &Graph, after: &Graph, env: &Env, tolerance: f64) {
    for seed in 0..3 {
        let given = inputs(before, &mut Rng(seed), env);
        let a = run(before, &given, Mode::F64).unwrap();
        let b = run(after, &given, Mode::F64).unwrap();
        let d = difference(&a, &b);
        assert!(
            d <= tolerance,
            "differ by {d}: before {}, after {}",
            Histogram::of(before),
            Histogram::of(after)
        );
    }
}

/// Runs named passes (each once, in order), verifies, compares, and returns the result.
pub fn apply(graph: &Graph, passes: &[&str]) -> Graph {
    apply_with(graph, passes, &Env::new())
}

pub fn apply_with(graph: &Graph, passes: &[&str], env: &Env) -> Graph {
    let after = rewritten(graph, passes);
    same_on(graph, &after, env);
    after
}

/// Runs named passes and verifies.
pub fn rewritten(graph: &Graph, passes: &[&str]) -> Graph {
    let mut after = graph.clone();
    for name in passes {
        let pass = find_pass(name).unwrap_or_else(|| panic!("no pass {name}"));
        (pass.run)(&mut after, &PassContext::default()).unwrap();
        verify(&after).unwrap();
    }
    after
}

/// The whole pipeline, compared with the original.
pub fn pipeline(graph: &Graph, env: &Env) -> Graph {
    let mut after = graph.clone();
    let report = tilewright_passes::run(&mut after, &PassContext::default()).unwrap();
    assert!(report.unstable.is_empty(), "unstable: {:?}", report.unstable);
    same_within(graph, &after, env, ROUNDED_CONSTANTS);
    after
}

pub fn histogram(graph: &Graph) -> String {
    Histogram::of(graph).to_string()
}
