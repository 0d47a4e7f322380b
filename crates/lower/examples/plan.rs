//! Prints how a model is fused and lowered.
//!
//! `cargo run --release -p tilewright-lower --example plan -- model.onnx [--kernels] [--groups]`

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tilewright_base::{Error, Result};
use tilewright_lower::{CpuTarget, Options, lower_with};
use tilewright_passes::{PassContext, choose_layouts};
use tilewright_plan::{HostCall, Step};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or_else(|| Error::user("which model?"))?;
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let mut graph = tilewright_import::onnx::load(path.as_ref())?;
    let context = PassContext { vector_lanes: 16, panel_width: 32, ..PassContext::default() };
    tilewright_passes::run(&mut graph, &context)?;
    let layouts = choose_layouts(&graph, &context);
    let host = |g: &tilewright_graph::Graph, id: tilewright_graph::NodeId| HostCall {
        name: format!("{:?}", g.nodes[id].op).chars().take(40).collect(),
        run: Arc::new(|_, _| Err(Error::unsupported("this example runs nothing"))),
    };
    let start = Instant::now();
    let target = CpuTarget::avx512();
    let (plan, fusion) = lower_with(&graph, &target, &layouts, &host, &Options::default())?;
    println!("{} steps, {} kernels, {:.1?}", plan.steps.len(), plan.kernels.len(), start.elapsed());
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for step in &plan.steps {
        let key = match step {
            Step::Launch { kernel, .. } => plan.kernels[*kernel].kernel.name.clone(),
            Step::Library { call, .. } => format!("library {}", call.name()),
            Step::Host { op, .. } => format!("host {}", op.name),
        };
        *counts.entry(key).or_default() += 1;
    }
    for (name, count) in counts {
        println!("{count:5} {name}");
    }
    if has("--groups") {
        print!("{fusion}");
    }
    if has("--kernels") {
        for (_, k) in plan.kernels.iter() {
            println!("{}\n{:?}", k.kernel, k.schedule);
        }
    }
    Ok(())
}
