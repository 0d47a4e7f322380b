//! `tw inspect`: a model at any stage of compilation.

use super::compiler;
use crate::args::{InspectArgs, InspectWhat, NO_MODEL};
use crate::output::Output;
use serde_json::json;
use std::fmt::Write as _;
use tilewright::{Result, Stage};
use tilewright_base::Error;
use tilewright_jit::{Jit, Options, Source};
use tilewright_passes::PIPELINE;

/// Stages that are no graph passes.
const OTHERS: [(&str, &str); 6] = [
    ("import", "the graph as the file says it"),
    ("fusion", "which operators become one kernel, and why"),
    ("tile", "the tile program of each kernel"),
    ("plan", "kernels in order over buffers"),
    ("llvm", "LLVM IR of each kernel"),
    ("asm", "machine code of each kernel"),
];

pub(crate) fn run(args: &InspectArgs, output: &Output) -> Result<()> {
    if let Some(InspectWhat::Gemm(args)) = &args.what {
        return super::gemm::inspect(args, output);
    }
    if args.stages {
        return list(output);
    }
    let wanted = args.stage.as_deref();
    let known = |name: &str| {
        OTHERS.iter().any(|(n, _)| *n == name)
            || PIPELINE.iter().flat_map(|g| g.passes).any(|p| p.name == name)
    };
    if let Some(name) = wanted.filter(|n| !known(n)) {
        return Err(Error::user(format!("there is no stage `{name}`"))
            .with_hint("`tw inspect MODEL --stages` lists them"));
    }
    if args.emit.is_some() {
        return super::emit::run(args, output);
    }
    if args.model.model.as_os_str() == NO_MODEL {
        return Err(Error::user("no model was given").with_hint("tw inspect MODEL --stage NAME"));
    }
    let compiler = compiler(&args.model)?;
    let model = super::open(&args.model)?;
    let chosen = |name: &str| args.kernel.as_deref().is_none_or(|k| name.contains(k));
    let mut text = String::new();
    let mut sources: Vec<Source> = Vec::new();
    // A pass of a repeated group runs several times: the last state counts.
    let mut graph_text = String::new();
    let mut names = Vec::new();
    let compiled = compiler.compile_observed(model.graph.clone(), &mut |stage| match stage {
        Stage::Graph(name, graph) if Some(name) == wanted => graph_text = graph.to_string(),
        Stage::Fusion(fusion) if wanted == Some("fusion") => text += &fusion.to_string(),
        Stage::Plan(plan) if matches!(wanted, Some("llvm" | "asm")) => {
            names.extend(plan.kernels.iter().map(|(_, k)| k.kernel.name.clone()));
        }
        Stage::Plan(plan) if wanted == Some("tile") => {
            names.extend(plan.kernels.iter().map(|(_, k)| k.kernel.name.clone()));
            for (id, planned) in plan.kernels.iter().filter(|(_, k)| chosen(&k.kernel.name)) {
                // Writing to a string cannot fail.
                let tiles: Vec<String> =
                    planned.schedule.tiles.iter().map(|(n, v)| format!("{n}={v}")).collect();
                let _ = writeln!(text, "# {id}: {}\n{}", tiles.join(" "), planned.kernel);
            }
        }
        Stage::Plan(plan) if wanted == Some("plan") => text += &format!("{plan:#?}"),
        Stage::Llvm(name, ir) if chosen(name) => match wanted {
            Some("llvm") => {
                let _ = writeln!(text, "{ir}");
            }
            Some("asm") => sources.push(Source { symbol: name.to_string(), text: ir.to_string() }),
            _ => {}
        },
        _ => {}
    })?;
    if !names.is_empty() && !names.iter().any(|name| chosen(name)) {
        return Err(no_kernel(args, &names));
    }
    text += &graph_text;
    if !sources.is_empty() {
        let jit = Jit::new(Options::default())?;
        for source in &sources {
            text += &jit.assembly(source)?;
        }
    }
    let mut times = Vec::new();
    for stage in compiled.stages() {
        times.push(json!({"stage": stage.name, "seconds": stage.time.as_secs_f64()}));
        if args.time {
            let _ = writeln!(text, "{:>10.3} ms  {}", stage.time.as_secs_f64() * 1e3, stage.name);
        }
    }
    if wanted.is_none() && !args.time {
        text += &model.graph.to_string();
    }
    output.result(&text, &json!({"text": text, "stages": times}));
    Ok(())
}

/// `--kernel` means none of these.
pub(super) fn no_kernel(args: &InspectArgs, names: &[String]) -> Error {
    let mut names = names.to_vec();
    names.sort_unstable();
    names.dedup();
    let part = args.kernel.as_deref().unwrap_or_default();
    Error::user(format!("no kernel has `{part}` in its name"))
        .with_hint(format!("the kernels are: {}", names.join(", ")))
}

fn list(output: &Output) -> Result<()> {
    let mut text = String::new();
    let mut rows: Vec<(&str, &str)> = vec![OTHERS[0]];
    rows.extend(PIPELINE.iter().flat_map(|g| g.passes).map(|p| (p.name, p.why)));
    rows.extend(&OTHERS[1..]);
    for (name, why) in &rows {
        let _ = writeln!(text, "{name:<22} {why}");
    }
    let json: Vec<_> = rows.iter().map(|(name, why)| json!({"stage": name, "why": why})).collect();
    output.result(&text, &json!(json));
    Ok(())
}
