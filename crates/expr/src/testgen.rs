//! Random functions and values for property tests.
//!
//! A function is made from a list of steps, each of which builds one node from nodes before it;
//! the last node is the result. Leaving out a step leaves a valid function, so failures shrink.

use crate::ir::{ExprId, Func, FuncBuilder, Value};
use crate::op::Op;
use crate::op_table::OPS;
use proptest::collection::vec;
use proptest::prelude::*;
use tilewright_base::DType;

/// Numbers where functions and number formats change their behaviour.
pub(crate) const EDGES: [f64; 36] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0,
    -2.0,
    0.5,
    -0.5,
    3.0,
    7.0,
    -7.0,
    8.0,
    31.0,
    64.0,
    127.0,
    -128.0,
    255.0,
    1.5,
    2.5,
    -2.5,
    0.1,
    1e-3,
    1e10,
    -1e10,
    1e30,
    1e300,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    f64::MIN_POSITIVE,
    5e-324,
    1.2e-38,
    1e-45,
    3.4e38,
    9.3e18,
    -9.3e18,
];

/// A value of `dtype` for a number from anywhere: edges first, then arbitrary bits.
pub(crate) fn value(dtype: DType, bits: u64) -> Value {
    let selector = (bits >> 56) as usize;
    let mut b = FuncBuilder::new();
    let id = if dtype.is_float() {
        let v = match selector % 4 {
            0 | 1 => EDGES[bits as usize % EDGES.len()],
            2 => (bits as u32 as f64) / 4e8 - 5.0,
            _ if dtype == DType::F64 => f64::from_bits(bits),
            _ => f32::from_bits(bits as u32).into(),
        };
        b.constant(v, dtype)
    } else {
        let width = dtype.bits().min(63);
        let v = match selector % 4 {
            0 => bits as i64 % 5,
            1 => (1i64 << (width - 1)).wrapping_sub(bits as i64 % 2),
            2 => 1i64 << (bits % u64::from(width)),
            _ => bits as i64,
        };
        if dtype == DType::Bool { b.constant_int(v & 1, dtype) } else { b.constant_int(v, dtype) }
    };
    match b.node(id) {
        crate::ir::Node::Const(v) => *v,
        _ => Value::Int(0),
    }
}

type Step = (u16, u16, u16, u16, u64);

/// A random function on parameters of `types`.
pub(crate) fn build(types: &[DType], steps: &[Step]) -> Func {
    let mut b = FuncBuilder::new();
    let mut nodes: Vec<ExprId> =
        types.iter().enumerate().map(|(i, d)| b.param(["x", "y", "t0", "e"][i % 4], *d)).collect();
    for &(choice, p, q, r, bits) in steps {
        let dtype = types[usize::from(p) % types.len()];
        let id = if choice % 5 == 0 || nodes.is_empty() {
            let v = value(dtype, bits);
            b.value(v, dtype)
        } else {
            let op = OPS[usize::from(choice / 5) % OPS.len()].op;
            // Recent nodes are likelier, so that functions get deep.
            let pick = |n: u16, want: Option<DType>, b: &FuncBuilder| -> Option<ExprId> {
                let fits: Vec<ExprId> = nodes
                    .iter()
                    .rev()
                    .copied()
                    .filter(|id| want.is_none_or(|d| b.dtype_of(*id) == d))
                    .collect();
                (!fits.is_empty()).then(|| {
                    let n = usize::from(n);
                    fits[(if n % 2 == 0 { n / 2 % 3 } else { n / 2 }) % fits.len()]
                })
            };
            let Some(first) = pick(p, None, &b) else { continue };
            let first_type = b.dtype_of(first);
            if op == Op::Cast {
                b.cast(first, types[usize::from(q) % types.len()])
            } else {
                if !op.accepts(first_type.class()) {
                    continue;
                }
                let mut args = vec![first];
                if op == Op::Select {
                    let Some(c) = pick(r, Some(DType::Bool), &b) else { continue };
                    args.insert(0, c);
                }
                for n in [q, r] {
                    if args.len() < op.arity() {
                        let Some(a) = pick(n, Some(first_type), &b) else { continue };
                        args.push(a);
                    }
                }
                b.op(op, &args)
            }
        };
        nodes.push(id);
    }
    let result = *nodes.last().unwrap_or(&ExprId(0));
    b.finish(result)
}

/// `cases` cases; `TW_FUZZ_SCALE=50` makes them fifty times as many.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let scale = std::env::var("TW_FUZZ_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let failure_persistence = None;
    ProptestConfig { cases: cases * scale, failure_persistence, ..ProptestConfig::default() }
}

/// Every data type.
pub(crate) fn dtype() -> impl Strategy<Value = DType> {
    (0..DType::TABLE.len()).prop_map(|i| DType::TABLE[i].0)
}

/// Random functions of up to `max_steps` nodes on parameters of one to three random types.
pub(crate) fn func(max_steps: usize) -> impl Strategy<Value = Func> {
    let step = any::<Step>();
    (vec(dtype(), 1..4), vec(step, 0..max_steps)).prop_map(|(types, steps)| build(&types, &steps))
}
