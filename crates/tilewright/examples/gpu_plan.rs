//! What a model becomes on an H200, planned without one: each launch, its schedule and its estimated time.
//!
//! ```text
//! cargo run --release --example gpu_plan -- MODEL PRECISION [SYMBOL=N]...
//! ```
//!
//! With `TEXT=1` in the environment also the text of each kernel, with `FUSION=1` the graph after its passes and what the planner of groups considered.

use tilewright::gpu::GpuCompiler;
use tilewright::{Model, Result};
use tilewright_base::Error;
use tilewright_layout::Dim;
use tilewright_layout::Env;
use tilewright_plan::{Form, Step};
use tilewright_runtime_gpu::{BoundStep, Chooser, bind};
use tilewright_target::Gpu;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || Error::user("MODEL PRECISION [SYMBOL=N]...");
    let model = Model::open(args.next().ok_or_else(usage)?.as_ref())?;
    let mut compiler = GpuCompiler::new(Gpu::h200());
    compiler.precision = args.next().ok_or_else(usage)?.parse().map_err(Error::user)?;
    let mut sizes = Env::new();
    for arg in args {
        let (name, value) = arg.split_once('=').ok_or_else(usage)?;
        sizes.insert(name.into(), value.parse().map_err(|_| usage())?);
    }
    let planned = compiler.plan(model.graph)?;
    if std::env::var_os("FUSION").is_some() {
        print!("{}{}", planned.graph(), planned.fusion());
    }
    let plan = planned.plan();
    let bound = bind(plan, &sizes, &mut Chooser::new(Gpu::h200()))?;
    for (step, planned) in bound.steps.iter().zip(&plan.steps) {
        match step {
            BoundStep::Device { kernel, choice, sizes, .. } => {
                let way = &choice.ways[0];
                let (name, note, forms) = match (planned, kernel) {
                    (Step::Launch { note, .. }, Some(kernel)) => {
                        let planned = &plan.kernels[*kernel];
                        (planned.kernel.name.as_str(), note, planned.forms.as_slice())
                    }
                    (Step::Library { call, note, .. }, _) => (call.name(), note, [].as_slice()),
                    _ => continue,
                };
                println!(
                    "{:9.2} us  {name} {} [{}]",
                    way.estimate_us,
                    note.label,
                    note.nodes.join(" ")
                );
                for form in forms {
                    if let Form::Product(p) = form {
                        let at = |d: &Dim| d.eval(sizes).unwrap_or(-1);
                        let repeat: Vec<i64> = p.repeat.iter().map(|r| at(&r.extent)).collect();
                        let lines = [&p.a, &p.b, &p.c].map(|m| (at(&m.row), at(&m.col)));
                        let windows = p.windows.as_ref().map(|w| (w.taps, w.steps));
                        let (m, n, k) = (at(&p.m), at(&p.n), at(&p.k));
                        println!(
                            "              {m} x {n} x {k}, times {repeat:?}, strides {lines:?}, windows {windows:?}"
                        );
                    }
                }
                for launch in &way.launches {
                    let grid = launch.program.items.eval(&launch.sizes).unwrap_or(-1);
                    println!(
                        "              {} {} on {grid} items",
                        launch.schedule, launch.program.name
                    );
                    if std::env::var_os("TEXT").is_some() {
                        println!("{}", tilewright_emit_cuda::emit(&launch.program)?.text);
                    }
                }
            }
            other => println!("{other:?}"),
        }
    }
    Ok(())
}
