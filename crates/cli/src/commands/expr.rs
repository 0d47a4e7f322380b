//! `tw expr`: the expression compiler on its own.

use crate::args::{ExprArgs, ExprStage};
use crate::output::Output;
use serde_json::{Map, Value, json};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{CompileOptions, Source, compile, tokens};

pub(crate) fn run(args: &ExprArgs, output: &Output) -> Result<()> {
    let dtype: DType = args.dtype.parse().map_err(|()| {
        let names: Vec<&str> = DType::TABLE.iter().map(|row| row.1).collect();
        Error::user(format!("`{}` is not an element type", args.dtype))
            .with_hint(format!("one of {}", names.join(", ")))
    })?;
    let options = CompileOptions { default: dtype, ..CompileOptions::default() };
    let mut text = String::new();
    let mut json = Map::new();
    if args.emit.contains(&ExprStage::Tokens) {
        let (tokens, errors) = tokens(&Source::new(&options.name, &args.text));
        let lines: Vec<String> = tokens
            .iter()
            .map(|t| format!("{:>3}..{:<3} {:?}", t.span.start, t.span.end, t.kind))
            .collect();
        text += &format!("{}\n", lines.join("\n"));
        json.insert("tokens".into(), json!(lines));
        if let Some(error) = errors.into_iter().next() {
            return Err(error);
        }
    }
    let compiled = compile(&args.text, &options)?;
    if args.emit.contains(&ExprStage::Ast) {
        text += &format!("{}\n", compiled.tree());
        json.insert("ast".into(), json!(compiled.tree()));
    }
    if args.emit.contains(&ExprStage::Func) {
        text += &format!("{}\n", compiled.func);
        json.insert("func".into(), json!(compiled.func.to_string()));
    }
    if args.emit.is_empty() {
        let values = arguments(args, &compiled.func)?;
        let value = compiled.func.eval_f64(&values);
        text += &format!("{value}\n");
        json.insert("value".into(), json!(value));
    }
    output.result(&text, &Value::Object(json));
    Ok(())
}

/// The values of the function's parameters, in order.
fn arguments(args: &ExprArgs, func: &tilewright_expr::Func) -> Result<Vec<f64>> {
    let mut given: Vec<(&str, f64)> = Vec::new();
    for pair in &args.values {
        let parsed =
            pair.split_once('=').and_then(|(name, v)| Some((name.trim(), v.trim().parse().ok()?)));
        let parsed = parsed.ok_or_else(|| {
            Error::user(format!("`{pair}` is not of the form NAME=VALUE"))
                .with_hint("for example x=4")
        })?;
        given.push(parsed);
    }
    let names: Vec<&str> = func.params().iter().map(|p| &*p.name).collect();
    for (name, _) in &given {
        if !names.contains(name) {
            return Err(Error::user(format!("the expression has no variable `{name}`"))
                .with_hint(format!("its variables are: {}", names.join(", "))));
        }
    }
    let missing: Vec<&str> =
        names.iter().copied().filter(|n| !given.iter().any(|(g, _)| g == n)).collect();
    if !missing.is_empty() {
        return Err(Error::user(format!("no value for {}", missing.join(", "))).with_hint(
            format!(
                "add {}",
                missing.iter().map(|m| format!("{m}=1")).collect::<Vec<_>>().join(" ")
            ),
        ));
    }
    let value = |n: &str| given.iter().rev().find(|(g, _)| *g == n).map_or(f64::NAN, |(_, v)| *v);
    Ok(names.into_iter().map(value).collect())
}
