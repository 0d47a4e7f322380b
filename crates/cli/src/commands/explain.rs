//! `tw explain`: what each kernel does, costs and reaches.

use crate::args::ExplainArgs;
use crate::output::Output;
use tilewright::Result;
#[cfg(feature = "cpu")]
use {
    crate::npy,
    tilewright::{explain, html},
    tilewright_base::Error,
};

pub(crate) fn run(args: &ExplainArgs, output: &Output) -> Result<()> {
    if super::on_gpu(&args.model)? {
        return super::gpu::explain(args, output);
    }
    on_cpu(args, output)
}

#[cfg(not(feature = "cpu"))]
use super::no_cpu as on_cpu;

#[cfg(feature = "cpu")]
fn on_cpu(args: &ExplainArgs, output: &Output) -> Result<()> {
    let (model, compiled) = super::compile(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let report = explain::explain(&compiled, &model.graph, &inputs, args.runs)?;
    let mut text = report.text(args.top);
    if args.groups {
        text += &format!("\n{}", compiled.fusion());
    } else {
        text += &format!("fusion: {}\n", compiled.fusion().summary());
    }
    if let Some(file) = &args.html {
        npy::write_whole(file, html::page(&report).as_bytes())?;
        text += &format!("\nwrote {}", file.display());
    }
    let value = serde_json::to_value(&report).map_err(|e| Error::bug(e.to_string()))?;
    output.result(&text, &value);
    Ok(())
}
