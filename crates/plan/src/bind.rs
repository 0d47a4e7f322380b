//! Sizes of a plan from the inputs of a run.

use crate::{Plan, Reshaped};
use tilewright_base::{Error, Result};
use tilewright_data::Tensor;
use tilewright_layout::{Dim, Env, numel};

/// Finds the symbols' values from the inputs' shapes, and checks every input and what the model does to shapes.
pub fn bind_symbols(plan: &Plan, inputs: &[Tensor]) -> Result<Env> {
    if inputs.len() != plan.inputs.len() {
        let names: Vec<&str> = plan.inputs.iter().map(|(n, ..)| n.as_str()).collect();
        return Err(Error::user(format!(
            "{} inputs are given, the model takes {}",
            inputs.len(),
            names.len()
        ))
        .with_hint(format!("its inputs are: {}", names.join(", "))));
    }
    let mut env = Env::new();
    let text = |dims: &[Dim]| {
        let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
        format!("[{}]", dims.join(","))
    };
    for ((name, dtype, shape), tensor) in plan.inputs.iter().zip(inputs) {
        if tensor.dtype() != *dtype {
            return Err(Error::user(format!(
                "input `{name}` is {}, the model takes {dtype}",
                tensor.dtype()
            )));
        }
        if tensor.shape().len() != shape.len() {
            return Err(Error::user(format!(
                "input `{name}` has shape {:?}, the model takes {}",
                tensor.shape(),
                text(shape)
            )));
        }
        for (dim, &extent) in shape.iter().zip(tensor.shape()) {
            if let Some(symbol) = dim.as_symbol()
                && !env.contains_key(symbol)
            {
                env.insert(symbol.clone(), extent as i64);
            }
        }
    }
    // Sizes such as `N + 3`, where no input has a plain `N`.
    for ((_, _, shape), tensor) in plan.inputs.iter().zip(inputs) {
        for (dim, &extent) in shape.iter().zip(tensor.shape()) {
            if let Some((name, value)) = dim.solve(extent as i64, &env) {
                env.insert(name, value);
            }
        }
    }
    for symbol in &plan.symbols {
        if let Some(&value) = env.get(&symbol.name)
            && (value < symbol.range.min || value > symbol.range.max)
        {
            return Err(Error::user(format!(
                "size {} = {value} is outside the model's range {}..={}",
                symbol.name, symbol.range.min, symbol.range.max
            )));
        }
    }
    for ((name, _, shape), tensor) in plan.inputs.iter().zip(inputs) {
        for (dim, &extent) in shape.iter().zip(tensor.shape()) {
            if dim.eval(&env) != Some(extent as i64) {
                let error = Error::user(format!(
                    "input `{name}` has shape {:?}, the model takes {}",
                    tensor.shape(),
                    text(shape)
                ));
                return Err(match (dim.as_const(), dim.eval(&env)) {
                    (None, Some(value)) => error.with_hint(format!("`{dim}` is {value} here")),
                    _ => error,
                });
            }
        }
    }
    for Reshaped { node, from, to } in &plan.reshapes {
        let count = |shape: &[Dim]| numel(shape).eval(&env);
        if let (Some(have), Some(want)) = (count(from), count(to))
            && have != want
        {
            let sizes = |shape: &[Dim]| {
                shape.iter().filter_map(|d| d.eval(&env)).map(Dim::new).collect::<Vec<_>>()
            };
            return Err(Error::user(format!(
                "node `{node}`: {} has {have} elements, {} has {want}",
                text(&sizes(from)),
                text(&sizes(to))
            ))
            .with_hint(format!(
                "the model takes {} as {} there",
                text(from),
                text(to)
            )));
        }
    }
    Ok(env)
}

/// Whether some size of the plan is only found while it runs.
pub fn has_unbacked(plan: &Plan, env: &Env) -> bool {
    plan.symbols.iter().any(|s| !env.contains_key(&s.name))
}

/// Binds symbols that a host operator's result shape reveals.
pub fn bind_shape(env: &mut Env, dims: &[Dim], shape: &[usize]) -> Result<()> {
    for (dim, &extent) in dims.iter().zip(shape) {
        if let Some(symbol) = dim.as_symbol() {
            env.entry(symbol.clone()).or_insert(extent as i64);
        }
        if dim.eval(env) != Some(extent as i64) {
            return Err(Error::bug(format!(
                "a host result has extent {extent} where `{dim}` was planned"
            )));
        }
    }
    Ok(())
}

/// Values of sizes.
///
/// # Errors
/// The user's when one is not known.
pub fn eval_all(dims: &[Dim], env: &Env) -> Result<Vec<i64>> {
    dims.iter()
        .map(|d| {
            d.eval(env).ok_or_else(|| Error::user(format!("size `{d}` is not known or too large")))
        })
        .collect()
}

/// A shape for these sizes.
///
/// # Errors
/// The user's when an extent is not known or below zero.
pub fn concrete(dims: &[Dim], env: &Env) -> Result<Vec<usize>> {
    dims.iter()
        .map(|d| {
            d.eval(env)
                .and_then(|v| usize::try_from(v).ok())
                .ok_or_else(|| Error::user(format!("size `{d}` is negative, unknown or too large")))
        })
        .collect()
}
