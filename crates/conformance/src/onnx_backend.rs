//! The ONNX backend node tests: one tiny model per case, with inputs and expected outputs.
//!
//! `tests/onnx_backend/dump.py` writes the cases as files; [`run_case`] imports a case, runs it and
//! compares. Where a model computes shapes from inputs, as many cases do, the values of these
//! inputs are bound at import, as an application with fixed shapes would.

use std::path::{Path, PathBuf};
use tilewright_base::{Error, Kind, Result};
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_import::onnx::{self, ImportOptions, Imported};

/// What executes a graph on inputs in the graph's order.
pub type Runner<'a> = dyn Fn(&Graph, &[Tensor]) -> Result<Vec<Tensor>> + Sync + 'a;

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All outputs agree.
    Pass,
    /// Beyond what we do; why.
    Unsupported(String),
    /// Wrong, or broken; how.
    Fail(String),
}

/// The cases in a folder, sorted by name.
pub fn cases(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .map_err(|e| Error::user(format!("cannot read {}: {e}", folder.display())))?;
    let mut list: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.join("model.onnx").is_file())
        .collect();
    list.sort();
    Ok(list)
}

/// Runs one case.
pub fn run_case(folder: &Path, runner: &Runner<'_>) -> Verdict {
    let attempt = || -> Result<()> {
        let data = folder.join("test_data_set_0");
        let (rtol, atol) = tolerance(folder);
        let names = input_names(&folder.join("model.onnx"))?;
        let mut options = ImportOptions::default();
        let graph = loop {
            match onnx::import(&folder.join("model.onnx"), &options)? {
                Imported::Graph(graph) => break graph,
                Imported::Needs(needed) => {
                    let before = options.specialise.len();
                    for name in needed {
                        let Some(i) = names.iter().position(|n| *n == name) else {
                            return Err(Error::bug(format!("`{name}` is not an input")));
                        };
                        let tensor = tensor(&data.join(format!("input_{i}.pb")))?;
                        options.specialise.insert(name, tensor);
                    }
                    if options.specialise.len() == before {
                        return Err(Error::bug("asked twice for the same input"));
                    }
                }
            }
        };
        tilewright_graph::verify(&graph)?;
        let mut inputs = Vec::new();
        for &v in &graph.inputs {
            let name = &graph.values[v].name;
            let Some(i) = names.iter().position(|n| n == name) else {
                return Err(Error::bug(format!("`{name}` is not an input")));
            };
            inputs.push(tensor(&data.join(format!("input_{i}.pb")))?);
        }
        let outputs = runner(&graph, &inputs)?;
        for (i, got) in outputs.iter().enumerate() {
            let want = tensor(&data.join(format!("output_{i}.pb")))?;
            compare(got, &want, rtol, atol).map_err(|e| e.with_context(format!("output {i}")))?;
        }
        Ok(())
    };
    match attempt() {
        Ok(()) => Verdict::Pass,
        Err(e) if e.kind() == Kind::Unsupported => Verdict::Unsupported(describe(&e)),
        Err(e) => Verdict::Fail(describe(&e)),
    }
}

fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    for note in error.notes() {
        text += &format!("; {note}");
    }
    text
}

fn tolerance(folder: &Path) -> (f64, f64) {
    let text = std::fs::read_to_string(folder.join("tolerance.txt")).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|t| t.parse().ok());
    (numbers.next().unwrap_or(1e-3), numbers.next().unwrap_or(1e-7))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::user(format!("cannot read {}: {e}", path.display())))
}

fn tensor(path: &Path) -> Result<Tensor> {
    onnx::read_tensor(&read(path)?)
}

fn input_names(model: &Path) -> Result<Vec<String>> {
    onnx::input_names(&read(model)?)
}

/// The official comparison: same type and shape, integers equal, floats within
/// `atol + rtol * |expected|`, NaN equal to NaN.
pub fn compare(got: &Tensor, want: &Tensor, rtol: f64, atol: f64) -> Result<()> {
    if got.dtype() != want.dtype() || got.shape() != want.shape() {
        return Err(Error::user(format!(
            "{}{:?} where {}{:?} is expected",
            got.dtype(),
            got.shape(),
            want.dtype(),
            want.shape()
        )));
    }
    let mut wrong = 0;
    let mut first = None;
    for i in 0..want.len() {
        let same = if want.dtype().is_float() {
            let (a, b) = (got.get_f64(i), want.get_f64(i));
            a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= atol + rtol * b.abs()
        } else {
            got.get_i64(i) == want.get_i64(i)
        };
        if !same {
            wrong += 1;
            first.get_or_insert(i);
        }
    }
    match first {
        None => Ok(()),
        Some(i) => Err(Error::user(format!(
            "{wrong} of {} elements differ, first at {i}: {} where {} is expected",
            want.len(),
            got.get_f64(i),
            want.get_f64(i)
        ))),
    }
}
