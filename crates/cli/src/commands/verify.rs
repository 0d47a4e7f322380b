//! `tw verify`: a compiled model against the float64 oracle.

use crate::args::VerifyArgs;
use crate::output::{Output, progress};
use serde_json::{Value, json};
use std::fmt::Write as _;
use tilewright::Result;
use tilewright::verify::{Deviation, Report};
use tilewright_base::Error;

pub(crate) fn run(args: &VerifyArgs, output: &Output) -> Result<()> {
    let report = match super::on_gpu(&args.model)? {
        true => super::gpu::verify(args)?,
        false => on_cpu(args)?,
    };
    let mut text = String::new();
    for d in &report.outputs {
        line(&mut text, "output", d);
    }
    let worst = report.kernels.iter().max_by(|a, b| a.ratio.total_cmp(&b.ratio));
    if args.kernels {
        report.kernels.iter().for_each(|d| line(&mut text, "kernel", d));
    } else if let Some(worst) = worst {
        let inside = report.kernels.iter().filter(|d| d.ratio <= 1.0).count();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{inside} of {} kernel results inside their budget; the worst:",
            report.kernels.len()
        );
        line(&mut text, "kernel", worst);
    }
    let list = |all: &[Deviation]| all.iter().map(value).collect::<Vec<_>>();
    let json = json!({
        "passed": report.passed(), "outputs": list(&report.outputs), "kernels": list(&report.kernels),
    });
    output.result(&text, &json);
    if report.passed() {
        return Ok(());
    }
    Err(Error::bug("the compiled model leaves the error budget").with_hint(
        "`tw verify --kernels` lists every kernel; --no-fusion tells whether fusion is at fault",
    ))
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(_: &VerifyArgs) -> Result<Report> {
    Err(super::without_cpu())
}

#[cfg(feature = "cpu")]
fn on_cpu(args: &VerifyArgs) -> Result<Report> {
    let (model, compiled) = super::compile(&args.model)?;
    let inputs = super::inputs(&model, &args.inputs)?;
    let _progress = running(&model.graph.name);
    tilewright::verify::verify(&compiled, &model.graph, &inputs)
}

/// Says that the oracle runs.
pub(crate) fn running(name: &str) -> impl Sized + use<> {
    progress(format!("running {name} in float64"))
}

fn line(text: &mut String, what: &str, d: &Deviation) {
    let verdict = if d.ratio <= 1.0 { "ok  " } else { "FAIL" };
    let _ = write!(
        text,
        "{verdict} {what} {}: largest error {:.2e}, {:.2} of the budget, {} elements",
        d.name, d.max_error, d.ratio, d.elements
    );
    if let Some((at, got, want)) = &d.first_bad {
        let _ = write!(text, "; first outside at {at:?}: {got} instead of {want}");
    }
    text.push('\n');
}

fn value(d: &Deviation) -> Value {
    json!({
        "name": d.name, "max_error": d.max_error, "budget": d.budget, "elements": d.elements,
        "ratio": if d.ratio.is_finite() { json!(d.ratio) } else { json!("infinite") },
    })
}
