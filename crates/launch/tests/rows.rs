//! Kernels without products on a device: every tile program that the graph compiler writes for a set of graphs, and
//! reductions of whole tensors, against the interpreter. Without a device each test says that it was skipped; with
//! `TILEWRIGHT_REQUIRE_GPU=1` it fails instead.

#[path = "../../kernels/tests/common/graph.rs"]
mod graph;
#[path = "../../kernels/tests/common/tile_bound.rs"]
mod tile_bound;

use graph::{buffers, programs, schedule, unequal};
use tilewright_base::DType;
use tilewright_cuda::{Gpu, Nvrtc};
use tilewright_device::{Arch, Program};
use tilewright_interp::Mode;
use tilewright_kernels::reduce::{Over, ReduceSpec};
use tilewright_launch::{Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::lower;

fn loader() -> Option<Loader> {
    let open = || Ok::<_, tilewright_base::Error>(Loader::new(Gpu::open(0)?, Nvrtc::open(None)?));
    match open() {
        Ok(loader) if loader.gpu().properties().major == 9 => Some(loader),
        Ok(_) => {
            println!("skipped: the device is not Hopper");
            None
        }
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            println!("skipped: no device");
            None
        }
    }
}

/// Runs a program on bytes and gives what the device made of them.
fn run(
    loader: &Loader,
    program: &Program,
    env: &Env,
    bytes: &[Vec<u8>],
) -> Result<Vec<Vec<u8>>, String> {
    let stream = loader.gpu().stream().map_err(|e| e.to_string())?;
    let kernel = loader.load(program).map_err(|e| format!("{e}\n{:#?}", e.notes()))?;
    let on_device = bytes
        .iter()
        .map(|b| stream.upload(b).map_err(|e| e.to_string()))
        .collect::<Result<Vec<_>, _>>()?;
    let operands: Vec<Operand> =
        on_device.iter().map(|b| Operand { address: b.address(), bytes: b.len() as u64 }).collect();
    let bound = kernel.bind(env, &operands).map_err(|e| e.to_string())?;
    // SAFETY: the buffers have what the layouts name, and live until the results have been read.
    unsafe { bound.launch(&stream).map_err(|e| e.to_string())? };
    on_device.iter().map(|b| b.to_vec(&stream).map_err(|e| e.to_string())).collect()
}

/// Whether a tensor of the program is a view that runs backwards.
fn backwards(case: &graph::Case) -> bool {
    let negative = |d: &tilewright_layout::Dim| d.eval(&case.env).is_some_and(|v| v < 0);
    case.kernel.params.iter().any(|(_, p)| p.layout.axes.iter().any(|a| negative(&a.stride)))
}

/// The first result that is further from float64 than arithmetic in the kernel's types may bring it. Programs with random
/// numbers have no bounds: they are compared with the interpreter in the same types.
fn differs(case: &graph::Case, before: &[Vec<u8>], got: &[Vec<u8>]) -> Option<String> {
    let graph::Case { kernel, planned, env, .. } = case;
    if let Some(bounds) = tile_bound::bounds(kernel, planned, env, before) {
        return tile_bound::beyond(kernel, got, &bounds);
    }
    let mut expected = before.to_vec();
    tilewright_interp::tile::run(kernel, planned, env, &mut expected, Mode::Exact)
        .unwrap_or_else(|e| panic!("{}: {e}", case.name));
    unequal(kernel, env, got, &expected, 0.0)
}

#[test]
fn programs_of_graphs_compute_the_same_on_the_device() {
    let Some(loader) = loader() else { return };
    // All of them, every n-th, or only those with views that run backwards.
    let only_backwards = std::env::var("TILEWRIGHT_BACKWARDS").is_ok_and(|v| v == "1");
    let every: usize =
        std::env::var("TILEWRIGHT_EVERY").map_or(1, |v| v.parse().expect("a number"));
    let all: Vec<_> = programs()
        .iter()
        .filter(|case| !only_backwards || backwards(case))
        .step_by(every)
        .filter_map(|case| {
            let schedule = schedule(case, Arch::Sm90a).ok()?;
            let program = lower(&case.kernel, &schedule).ok()?;
            Some((case, schedule, program))
        })
        .collect();
    let list: Vec<Program> = all.iter().map(|(_, _, p)| p.clone()).collect();
    loader.load_all(&list);
    let mut wrong = Vec::new();
    for (case, schedule, program) in &all {
        let before = buffers(&case.kernel, &case.env);
        let found = match run(&loader, program, &case.env, &before) {
            Ok(got) => differs(case, &before, &got),
            Err(error) => Some(error),
        };
        if let Some(how) = found {
            wrong
                .push(format!("{}: {how}\n{schedule}\n{}\n{:?}", case.name, case.kernel, case.env));
        }
    }
    println!("{} programs, {} wrong", all.len(), wrong.len());
    wrong.iter().take(8).for_each(|w| println!("{w}\n"));
    assert!(wrong.is_empty(), "{} programs are wrong", wrong.len());
    assert!(all.len() * every > if only_backwards { 0 } else { 100 }, "{} programs", all.len());
}

#[test]
fn whole_tensors_and_columns_are_reduced_and_the_same_every_time() {
    let Some(loader) = loader() else { return };
    let cases: [(Over, &[(&str, i64)]); 6] = [
        (Over::All, &[("N", 1)]),
        (Over::All, &[("N", 1_000_003)]),
        (Over::All, &[("N", 20_000_000)]),
        (Over::Rows, &[("M", 3), ("N", 7), ("ldx", 9)]),
        (Over::Rows, &[("M", 10_001), ("N", 264), ("ldx", 272)]),
        (Over::Rows, &[("M", 77), ("N", 70_000), ("ldx", 70_000)]),
    ];
    for (over, sizes) in cases {
        for dtype in [DType::F32, DType::BF16] {
            let mut env: Env = sizes.iter().map(|(name, v)| ((*name).into(), *v)).collect();
            let spec = ReduceSpec::sum(over, dtype);
            let plan = spec.plan(Arch::Sm90a, &|s| env.get(s).copied()).unwrap();
            env.insert("P".into(), plan.parts_count);
            env.insert("C".into(), plan.pieces);
            let [n, m, ldx] = ["N", "M", "ldx"].map(|s| env.get(s).copied().unwrap_or(1) as usize);
            let rows = if over == Over::All { 1 } else { m };
            let ldx = if over == Over::All { n } else { ldx };
            // Integers, so that sums are exact as long as they have few digits; what lies between rows would show.
            let value = |i: usize, j: usize| (((i * 31 + j * 17) % 23) as f64 - 11.0) / 4.0;
            let mut x = vec![0u8; rows * ldx * dtype.size()];
            let mut expected = vec![0.0; if over == Over::All { 1 } else { n }];
            for i in 0..rows {
                for j in 0..ldx {
                    let v = if j < n { value(i, j) } else { 1e6 };
                    tilewright_data::from_f64(dtype, &mut x, i * ldx + j, v);
                    if j < n {
                        expected[if over == Over::All { 0 } else { j }] += v;
                    }
                }
            }
            let parts = lower(&plan.parts.0, &plan.parts.1).unwrap();
            let finish = plan.finish.as_ref().map(|(k, s)| lower(k, s).unwrap());
            let width = if over == Over::All { 1 } else { n };
            let scratch = vec![0xFFu8; plan.parts_count as usize * width * 4];
            let mut first: Option<Vec<u8>> = None;
            for _ in 0..3 {
                let part = run(&loader, &parts, &env, &[x.clone(), scratch.clone()]).unwrap();
                // Where one part holds everything, it is the result.
                let got = match &finish {
                    Some(finish) => {
                        let result = vec![0xFFu8; width * 4];
                        run(&loader, finish, &env, &[part[1].clone(), result]).unwrap()
                    }
                    None => part,
                };
                for (j, want) in expected.iter().enumerate() {
                    let v = tilewright_data::read_f64(DType::F32, &got[1], j);
                    assert!(
                        (v - want).abs() <= 1e-5 * want.abs() + 1e-3,
                        "{spec:?} {sizes:?} {j}: {v}, not {want}"
                    );
                }
                let same = first.get_or_insert_with(|| got[1].clone()) == &got[1];
                assert!(same, "{spec:?} {sizes:?} differs from run to run");
            }
        }
    }
}
