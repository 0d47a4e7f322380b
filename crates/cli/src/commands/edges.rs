//! `tw edges`: small graphs at the edges of what is asked of a GPU, against float64; with `--large` tensors of more than
//! 2^31 elements.

use crate::args::EdgesArgs;
use crate::output::{Output, progress};
use serde_json::json;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;
use tilewright::edges::{Edge, Expect, PERIOD, all, large};
use tilewright::gpu::{GpuCompiler, GpuDevice, GpuModel, ordinal};
use tilewright::{Choice, Kind, Precision, Result, Tensor};
use tilewright_base::Error;
use tilewright_graph::Graph;
use tilewright_interp::{Mode, run as interpret};

/// Rows and columns of the large graph: 2^31 elements and one row.
const LARGE: (i64, i64) = (65537, 32768);

pub(crate) fn run(args: &EdgesArgs, output: &Output) -> Result<()> {
    let folder = args.cache.cache.clone().or_else(tilewright::cache_dir);
    if args.device == "cpu" {
        return Err(Error::user("`tw edges` runs on a GPU").with_hint("--device cuda"));
    }
    let device = GpuDevice::open(ordinal(&args.device)?, folder.as_deref())?;
    let precisions = args.precisions.iter().map(|p| p.parse().map_err(Error::user));
    let precisions = precisions.collect::<Result<Vec<Precision>>>()?;
    let mut edges = all()?;
    edges.retain(|e| e.name.contains(&args.only));
    let (mut text, mut list, mut wrong) = (String::new(), Vec::new(), 0);
    for precision in precisions {
        let mut loaded: Option<(Arc<Graph>, GpuModel)> = None;
        let begin = Instant::now();
        let (mut right, mut refused) = (0, 0);
        for edge in &edges {
            let _progress = progress(edge.name.clone());
            if !loaded.as_ref().is_some_and(|l| Arc::ptr_eq(&l.0, &edge.graph)) {
                let mut compiler = GpuCompiler::new(device.machine().clone());
                compiler.precision = precision;
                let model = device.load(compiler.plan((*edge.graph).clone())?)?;
                loaded = Some((edge.graph.clone(), model));
            }
            let Some((_, model)) = &loaded else { continue };
            let found = check(model, edge);
            let problem = found.as_ref().err();
            match (&found, &edge.expect) {
                (Err(_), _) => wrong += 1,
                (Ok(()), Expect::Right) => right += 1,
                (Ok(()), Expect::Refused(_) | Expect::TooLarge(_)) => refused += 1,
            }
            if let Some(problem) = problem {
                // Writing to a string cannot fail.
                let _ = writeln!(text, "WRONG {precision} {}: {problem}", edge.name);
            }
            list.push(
                json!({"name": edge.name, "precision": precision.to_string(), "problem": problem}),
            );
        }
        let seconds = begin.elapsed().as_secs_f64();
        let _ = writeln!(
            text,
            "{precision}: {right} right on the device, {refused} refused in words, of {} in {seconds:.1} s",
            edges.len()
        );
    }
    if args.large {
        let begin = Instant::now();
        let problem = check_large(&device).err().map(|e| e.to_string());
        wrong += usize::from(problem.is_some());
        let (rows, cols) = LARGE;
        let _ = writeln!(
            text,
            "{rows} x {cols} elements, maps, softmax, sums, rows picked: {} in {:.1} s",
            problem.as_deref().unwrap_or("right"),
            begin.elapsed().as_secs_f64()
        );
        list.push(json!({"name": "large", "precision": "f32", "problem": problem}));
    }
    output.result(&text, &json!({ "edges": list, "wrong": wrong }));
    if wrong == 0 { Ok(()) } else { Err(Error::bug(format!("{wrong} edges are wrong"))) }
}

/// Whether a run gives what it must, twice: a second run finds its sizes bound.
fn check(model: &GpuModel, edge: &Edge) -> std::result::Result<(), String> {
    let mut session = model.session().map_err(|e| e.to_string())?;
    for _ in 0..2 {
        match (session.run(&edge.inputs), &edge.expect) {
            (Ok(outputs), Expect::Right) => right(model, edge, &outputs)?,
            (Err(e), Expect::Refused(words)) => {
                if e.kind() != Kind::User || !e.to_string().contains(words) {
                    return Err(format!("says: {e}"));
                }
            }
            (Err(e), Expect::TooLarge(words)) => {
                if e.kind() != Kind::Unsupported || !e.to_string().contains(words) {
                    return Err(format!("says: {e}"));
                }
            }
            (Ok(_), Expect::Refused(words) | Expect::TooLarge(words)) => {
                return Err(format!("is not refused: {words}"));
            }
            (Err(e), Expect::Right) => return Err(format!("{e} {:?}", e.notes())),
        }
    }
    if let Expect::Right = edge.expect {
        let report = session.report(&edge.inputs).map_err(|e| e.to_string())?;
        if let Some((step, reason)) = report.host_steps.first() {
            return Err(format!("step {step} runs on the host: {reason}"));
        }
        if !report.warnings.is_empty() {
            return Err(report.warnings.join("; "));
        }
    }
    Ok(())
}

fn right(model: &GpuModel, edge: &Edge, outputs: &[Tensor]) -> std::result::Result<(), String> {
    let report = model.planned().verify_outputs(&edge.graph, &edge.inputs, outputs);
    let report = report.map_err(|e| e.to_string())?;
    match report.outputs.iter().find(|d| d.ratio > 1.0) {
        Some(d) => Err(format!(
            "`{}`: error {:.2e}, the budget is {:.2e}, {:?}",
            d.name, d.max_error, d.budget, d.first_bad
        )),
        None => Ok(()),
    }
}

/// The large graph, one kernel per operator, against a small one with the same rows.
fn check_large(device: &GpuDevice) -> Result<()> {
    let (rows, cols) = LARGE;
    let mut compiler = GpuCompiler::new(device.machine().clone());
    compiler.fusion = Choice::Apart;
    let model = device.load(compiler.plan(large(rows, cols)?)?)?;
    let picked = [rows - 1, 0, rows / 2, rows - 2];
    let mut session = model.session()?;
    let ids = [Tensor::from_slice(&[picked.len()], &picked)?];
    let outputs = session.run(&ids)?;
    let report = session.report(&ids)?;
    if let Some((step, reason)) = report.host_steps.first() {
        return Err(Error::bug(format!("step {step} runs on the host: {reason}")));
    }
    let few = large(PERIOD, cols)?;
    let wanted: Vec<i64> = picked.iter().map(|r| r % PERIOD).collect();
    let wanted = interpret(&few, &[Tensor::from_slice(&[picked.len()], &wanted)?], Mode::F64)?;
    let width = usize::try_from(cols).unwrap_or(0);
    let close = |got: f64, want: f64| (got - want).abs() <= 4e-6 * want.abs();
    let wrong = |what: &str, at: usize, got: f64, want: f64| {
        Error::bug(format!("{what} {at} is {got}, and must be {want}"))
    };
    for row in 0..outputs[0].len() {
        let (got, want) = (
            outputs[0].get_f64(row),
            wanted[0].get_f64(row % usize::try_from(PERIOD).unwrap_or(1)),
        );
        if !close(got, want) {
            return Err(wrong("the largest of row", row, got, want));
        }
    }
    for at in 0..picked.len() * width {
        let (got, want) = (outputs[1].get_f64(at), wanted[1].get_f64(at));
        if !close(got, want) {
            return Err(wrong("picked element", at, got, want));
        }
    }
    // Every row's softmax has the sum 1.
    let (got, want) = (outputs[2].get_f64(0), rows as f64);
    if (got - want).abs() > 1e-5 * want {
        return Err(wrong("the sum of all", 0, got, want));
    }
    Ok(())
}
