//! Tile programs that the graph compiler writes, with sizes and buffers: what tests of lowering to a GPU run.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeSet;
use std::sync::LazyLock;
use tilewright_base::DType;
use tilewright_device::Arch;
use tilewright_expr::Op as E;
use tilewright_graph::{Graph, GraphBuilder, NodeId, Op, ReduceKind, TensorType};
use tilewright_layout::{Dim, Env};
use tilewright_lower::{Choice, CpuTarget, Layouts, Options, lower_with};
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_plan::{HostCall, Step};
use tilewright_testkit as kit;
use tilewright_tile::{Access, Block, Kernel, Param, Schedule, Stmt, TileOp};

/// Random graphs.
const SEEDS: u64 = 120;

fn host(_: &Graph, _: NodeId) -> HostCall {
    HostCall { name: "host".into(), run: std::sync::Arc::new(|_, _| Ok(Vec::new())) }
}

fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        Stmt::For(f) => has_product(&f.body),
        Stmt::If(f) => has_product(&f.then) || has_product(&f.otherwise),
        _ => false,
    })
}

/// Graphs of one operator that random graphs have seldom or not: positions of extremes, scans of every kind,
/// random numbers, embeddings, transposes and reductions of sizes that fill whole tiles.
fn single_operators() -> Vec<Graph> {
    let mut out = Vec::new();
    let dims = |shape: &[i64]| shape.iter().map(|d| Dim::new(*d)).collect::<Vec<_>>();
    let mut add = |name: &str, f: &dyn Fn(&mut GraphBuilder)| {
        let mut b = GraphBuilder::new(name);
        f(&mut b);
        out.push(b.finish());
    };
    for (shape, axis) in
        [(&[5i64, 70][..], 1usize), (&[70, 9], 0), (&[3, 300], 1), (&[2, 5, 6], 1), (&[1, 5000], 1)]
    {
        for last in [false, true] {
            for kind in [ReduceKind::Max, ReduceKind::Min] {
                add("arg", &|b| {
                    let x = b.input("x", TensorType::new(DType::F32, dims(shape)));
                    let keep = false;
                    let y = b.op(Op::ArgReduce { kind, axis, keep, last }, &[x]).unwrap();
                    b.output("y", y);
                });
            }
        }
        for (kind, exclusive, reverse) in [
            (ReduceKind::Sum, false, false),
            (ReduceKind::Sum, true, true),
            (ReduceKind::Max, false, true),
            (ReduceKind::Prod, true, false),
        ] {
            for dtype in [DType::F32, DType::I32] {
                add("scan", &|b| {
                    let x = b.input("x", TensorType::new(dtype, dims(shape)));
                    let y = b.op(Op::Scan { kind, axis, exclusive, reverse }, &[x]).unwrap();
                    b.output("y", y);
                });
            }
        }
        for kind in [ReduceKind::Sum, ReduceKind::Max, ReduceKind::Min, ReduceKind::Prod] {
            for dtype in [DType::F32, DType::BF16, DType::I64, DType::U8] {
                add("reduce", &|b| {
                    let x = b.input("x", TensorType::new(dtype, dims(shape)));
                    let op = Op::Reduce { kind, axes: vec![axis], keep: false };
                    let y = b.op(op, &[x]).unwrap();
                    b.output("y", y);
                });
            }
        }
    }
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        add("random", &|b| {
            let ty = TensorType::new(dtype, dims(&[6, 50]));
            let x = b.input("x", ty.clone());
            let r = b.op(Op::Random { ty, seed: 0x1234_5678_9ABC }, &[]).unwrap();
            let y = b.binary(E::Mul, x, r).unwrap();
            b.output("y", y);
        });
        add("transpose", &|b| {
            let x = b.input("x", TensorType::new(dtype, dims(&[136, 264])));
            let p = b.permute(x, &[1, 0]).unwrap();
            let y = b.unary(E::Neg, p).unwrap();
            b.output("y", y);
        });
        add("heads", &|b| {
            let x = b.input("x", TensorType::new(dtype, dims(&[2, 33, 4, 16])));
            let p = b.permute(x, &[0, 2, 3, 1]).unwrap();
            let y = b.unary(E::Neg, p).unwrap();
            b.output("y", y);
        });
        for index in [DType::I64, DType::I32] {
            add("embedding", &|b| {
                let table = b.input("table", TensorType::new(dtype, dims(&[7, 96])));
                let ids = b.input("ids", TensorType::new(index, dims(&[3, 11])));
                let y = b.op(Op::Gather(0), &[table, ids]).unwrap();
                b.output("y", y);
            });
        }
    }
    out
}

/// A kernel of a plan, with sizes.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) kernel: Kernel,
    /// As the plan runs it.
    pub(crate) planned: Schedule,
    pub(crate) env: Env,
}

/// Kernels without products of the random graphs, each once; made when first asked for.
pub(crate) fn programs() -> &'static [Case] {
    static PROGRAMS: LazyLock<Vec<Case>> = LazyLock::new(make_programs);
    &PROGRAMS
}

fn make_programs() -> Vec<Case> {
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    for seed in 1..=SEEDS {
        let dtype = if seed % 5 == 0 { DType::BF16 } else { DType::F32 };
        let extent_max = if seed % 3 == 0 { 40 } else { 7 };
        let nodes = 4 + (seed % 20) as usize;
        let options = kit::generate::Options {
            nodes,
            dtype,
            extent_max,
            ..kit::generate::Options::default()
        };
        let graph = kit::generate::graph(seed, &options);
        let env = kit::data::random_env(&graph, &mut kit::data::Rng::new(seed));
        for fusion in [true, false] {
            let fusion = if fusion { Choice::Fastest } else { Choice::Apart };
            let options = Options { fusion, ..Options::default() };
            let (plan, _) =
                lower_with(&graph, &CpuTarget::avx2(), &Layouts::new(), &host, &options)
                    .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            for step in &plan.steps {
                let Step::Launch { kernel, sizes, .. } = step else { continue };
                let planned = plan.kernels[*kernel].schedule.clone();
                let kernel = &plan.kernels[*kernel].kernel;
                if has_product(&kernel.body) {
                    continue;
                }
                let values: Option<Env> = kernel
                    .symbols
                    .iter()
                    .zip(sizes)
                    .map(|(symbol, size)| Some((symbol.name.clone(), size.eval(&env)?)))
                    .collect();
                let Some(values) = values else { continue };
                let text = format!("{kernel} {values:?}");
                if seen.insert(text) {
                    let name = format!("{} {seed}, fusion {fusion:?}, {}", graph.name, kernel.name);
                    out.push(Case { name, kernel: (**kernel).clone(), planned, env: values });
                }
            }
        }
    }
    out
}

/// Elements from the start of the buffer to the last one that the layout names.
pub(crate) fn elements(param: &Param, env: &Env) -> usize {
    let value = |d: &tilewright_layout::Dim| d.eval(env).unwrap();
    let mut last = value(&param.layout.offset);
    for axis in &param.layout.axes {
        last += (value(&axis.extent) - 1).max(0) * value(&axis.stride).max(0);
    }
    last as usize + 1
}

/// Bytes for each parameter: numbers of both signs for what is read, a poison for the rest.
pub(crate) fn buffers(kernel: &Kernel, env: &Env) -> Vec<Vec<u8>> {
    let fill = |(p, param): (usize, &Param)| {
        let elements = elements(param, env);
        let mut bytes = vec![0u8; param.dtype.bytes_for(elements).unwrap()];
        for i in 0..elements {
            let mixed = (i * 2_654_435_761 + p * 97 + i / 7) % 1009;
            let read = param.access != Access::Out;
            match param.dtype {
                d if d.is_float() => {
                    let value = if read { mixed as f64 / 250.0 - 2.0 } else { -99.0 };
                    tilewright_data::from_f64(d, &mut bytes, i, value);
                }
                DType::Bool => {
                    tilewright_data::from_i64(DType::Bool, &mut bytes, i, mixed as i64 % 2)
                }
                d => {
                    let value = if read { mixed as i64 % 7 - 1 } else { 99 };
                    let value = if d.is_signed_int() { value } else { value.abs() };
                    tilewright_data::from_i64(d, &mut bytes, i, value);
                }
            }
        }
        bytes
    };
    kernel.params.iter().map(|(_, p)| p).enumerate().map(fill).collect()
}

/// The first difference between results: roundings may turn, and `slack` is added relatively.
pub(crate) fn unequal(
    kernel: &Kernel,
    env: &Env,
    got: &[Vec<u8>],
    expected: &[Vec<u8>],
    slack: f64,
) -> Option<String> {
    for (p, (_, param)) in kernel.params.iter().enumerate() {
        let step = match param.dtype {
            DType::F64 => 1e-12,
            DType::F32 => 2f64.powi(-23),
            DType::F16 => 2f64.powi(-10),
            _ => 2f64.powi(-7),
        };
        let elements = elements(param, env);
        for i in 0..elements {
            let (a, b) = match param.dtype.is_float() {
                true => (
                    tilewright_data::read_f64(param.dtype, &got[p], i),
                    tilewright_data::read_f64(param.dtype, &expected[p], i),
                ),
                false => (
                    tilewright_data::read_i64(param.dtype, &got[p], i) as f64,
                    tilewright_data::read_i64(param.dtype, &expected[p], i) as f64,
                ),
            };
            let near = a == b
                || (a.is_nan() && b.is_nan())
                || (a - b).abs() <= step * b.abs() + 1e-9 + slack * (1.0 + b.abs());
            if !near {
                return Some(format!("{} at {i} is {a}, not {b}", param.name));
            }
        }
    }
    None
}

/// A schedule from the sizes, or why there is none.
pub(crate) fn schedule(case: &Case, arch: Arch) -> Result<GpuSchedule, String> {
    let size = |s: &str| case.env.get(s).copied();
    GpuSchedule::lines_for(&case.kernel, arch, &size)
        .map_err(|e| e.to_string())
        .and_then(|s| s.ok_or_else(|| "a row longer than registers hold".to_owned()))
        .and_then(|s| lower(&case.kernel, &s).map_err(|e| e.to_string()).map(|_| s))
}
