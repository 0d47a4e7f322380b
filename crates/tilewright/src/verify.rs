//! Compares a compiled model with the float64 oracle, per output and per kernel.
//!
//! The budget of a value is what a plain evaluation in the model's own types loses against float64,
//! with a little room: `4 * |exact - f64|` (largest over the value) plus 8 units in the last place
//! of the value's largest magnitude. PyTorch's compiler judges the same way (its accuracy gate
//! compares with a float64 run and takes eager's own error as the measure). Values without floats
//! must be equal. Under another `--precision` than f32 the module `precision` says what
//! the types in use are.

#[cfg(feature = "cpu")]
use crate::compile::Compiled;
use crate::precision::Rounded;
use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::{Graph, ValueId};
use tilewright_interp::{Mode, Options, run_with};
use tilewright_plan::Plan;
use tilewright_target::Precision;

/// How far a value is from the oracle.
#[derive(Clone, Debug)]
pub struct Deviation {
    /// The output's name, or the kernel's label.
    pub name: String,
    /// Largest absolute difference to the oracle.
    pub max_error: f64,
    /// What the numerics contract allows.
    pub budget: f64,
    /// `max_error / budget`; infinite when something is not a number in one of the two only.
    pub ratio: f64,
    /// Elements compared.
    pub elements: usize,
    /// First element outside the budget: coordinate, value, oracle's value.
    pub first_bad: Option<(Vec<usize>, f64, f64)>,
}

/// What [`verify`] found.
#[derive(Clone, Debug)]
pub struct Report {
    /// One per model output.
    pub outputs: Vec<Deviation>,
    /// One per step of the plan whose result the graph knows.
    pub kernels: Vec<Deviation>,
}

impl Report {
    /// Whether every output is inside its budget.
    pub fn passed(&self) -> bool {
        self.outputs.iter().all(|d| d.ratio <= 1.0)
    }
}

/// Room factor on the reference's own error.
const ROOM: f64 = 4.0;

/// Runs the compiled model and the oracle on the same inputs.
#[cfg(feature = "cpu")]
pub fn verify(compiled: &Compiled, original: &Graph, inputs: &[Tensor]) -> Result<Report> {
    let mut observed = Observed::new();
    let plan = compiled.plan().clone();
    let mut session = compiled.session()?;
    let outputs = session.run_observed(inputs, &mut |step, buffer, tensor| {
        if let Some(value) = plan.buffers[buffer].value {
            observed.insert(ValueId(value), (step, tensor));
        }
    })?;
    // Observed steps run one after the other for all images.
    let outputs = match plan.image_runs.is_empty() {
        true => outputs,
        false => session.run(inputs)?,
    };
    let ran = Ran { plan: &plan, outputs: &outputs, observed: &observed };
    compare(original, compiled.graph(), compiled.precision(), inputs, &ran)
}

/// Values of a run with the step that made each.
pub(crate) type Observed = BTreeMap<ValueId, (usize, Tensor)>;

/// What a run gave.
pub(crate) struct Ran<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) outputs: &'a [Tensor],
    pub(crate) observed: &'a Observed,
}

/// Compares a run with the oracle: outputs with the graph as imported, so that passes are verified along
/// with everything else; kernels with the graph after the passes, whose values the plan's buffers hold.
pub(crate) fn compare(
    original: &Graph,
    graph: &Graph,
    precision: Precision,
    inputs: &[Tensor],
    ran: &Ran<'_>,
) -> Result<Report> {
    let rounded = Rounded::of(precision, graph, ran.plan);
    let share = |v: ValueId| rounded.as_ref().map_or(0.0, |r| r.share(v));
    let wide = run_with(original, inputs, &Options::new(Mode::F64))?;
    // What a plain evaluation in the types that are used gives.
    let plain = rounded.as_ref().map_or(original, |r| &r.graph);
    let exact = run_with(plain, inputs, &Options::new(Mode::Exact))?;
    let mut report = Report { outputs: Vec::new(), kernels: Vec::new() };
    for (i, (name, _)) in original.outputs.iter().enumerate() {
        report.outputs.push(deviation(
            name.clone(),
            &ran.outputs[i],
            &wide.outputs[i],
            &exact.outputs[i],
            share(graph.outputs[i].1),
        )?);
    }
    drop((wide, exact));
    if ran.observed.is_empty() {
        return Ok(report);
    }
    let trace = |graph: &Graph, mode| {
        Ok::<_, Error>(
            run_with(graph, inputs, &Options { trace: true, ..Options::new(mode) })?.trace,
        )
    };
    let (wide, exact) = (
        trace(graph, Mode::F64)?,
        trace(rounded.as_ref().map_or(graph, |r| &r.graph), Mode::Exact)?,
    );
    let mut order: Vec<(usize, ValueId)> =
        ran.observed.iter().map(|(v, (step, _))| (*step, *v)).collect();
    order.sort_unstable();
    for (step, value) in order {
        let stands = rounded.as_ref().map_or(value, |r| r.value(value));
        let (Some(wide), Some(exact)) = (wide.get(&value), exact.get(&stands)) else { continue };
        let label = ran.plan.steps[step].note().label.clone();
        let mut got = ran.observed[&value].1.clone();
        if got.dtype() != graph.dtype(value) && got.dtype().is_float() {
            // Stored in fewer bits than the model says: what that costs is in the share.
            got = got.rounded(graph.dtype(value))?;
        }
        let share = share(value);
        report.kernels.push(deviation(format!("{step}: {label}"), &got, wide, exact, share)?);
    }
    Ok(report)
}

/// `share` is what narrow operands may cost, relative to the largest magnitude.
pub(crate) fn deviation(
    name: String,
    got: &Tensor,
    wide: &Tensor,
    exact: &Tensor,
    share: f64,
) -> Result<Deviation> {
    if got.shape() != wide.shape() {
        return Err(Error::bug(format!(
            "`{name}` has shape {:?}, the oracle's is {:?}",
            got.shape(),
            wide.shape()
        )));
    }
    let count = got.len();
    if !got.dtype().is_float() {
        let bad = (0..count).find(|&i| got.get_i64(i) != wide.get_i64(i));
        let differ = (0..count).filter(|&i| got.get_i64(i) != wide.get_i64(i)).count();
        return Ok(Deviation {
            name,
            max_error: differ as f64,
            budget: 0.0,
            ratio: if differ == 0 { 0.0 } else { f64::INFINITY },
            elements: count,
            first_bad: bad.map(|i| (coordinate(i, got.shape()), got.get_f64(i), wide.get_f64(i))),
        });
    }
    let (mut reference, mut largest) = (0.0f64, 0.0f64);
    for i in 0..count {
        let (w, e) = (wide.get_f64(i), exact.get_f64(i));
        if w.is_finite() && e.is_finite() {
            reference = reference.max((w - e).abs());
            largest = largest.max(w.abs());
        }
    }
    let own = ROOM * reference + 8.0 * epsilon(got.dtype()) * largest + f64::MIN_POSITIVE;
    let budget = own + share * largest;
    let (mut max_error, mut broken, mut first_bad) = (0.0f64, false, None);
    for i in 0..count {
        let (g, w) = (got.get_f64(i), wide.get_f64(i));
        // Infinities and NaN must agree in kind, unless the model's own type overflows too.
        let e = exact.get_f64(i);
        let bad = if g.is_finite() && w.is_finite() {
            max_error = max_error.max((g - w).abs());
            (g - w).abs() > budget
        } else {
            let alike = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
            let bad = !(alike(g, w) || alike(g, e));
            broken |= bad;
            bad
        };
        if bad && first_bad.is_none() {
            first_bad = Some((coordinate(i, got.shape()), g, w));
        }
    }
    let ratio = if broken { f64::INFINITY } else { max_error / budget };
    Ok(Deviation { name, max_error, budget, ratio, elements: count, first_bad })
}

/// Distance from 1 to the next number.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        DType::F8E4M3 => 2f64.powi(-3),
        DType::F8E5M2 => 2f64.powi(-2),
        _ => f64::from(f32::EPSILON),
    }
}

fn coordinate(i: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = i;
    let mut at = vec![0; shape.len()];
    for (x, &d) in at.iter_mut().zip(shape).rev() {
        *x = rest % d;
        rest /= d;
    }
    at
}
