//! `tw expr`: the expression compiler on its own.
//!
//! A stage to print is one arm of [`stage`].

use crate::args::{ExprArgs, ExprStage};
use crate::output::Output;
use clap::ValueEnum;
use serde_json::{Map, Value as Json, json};
use std::collections::BTreeMap;
use tilewright::expr::{ArrayFunc, Measured, assembly, llvm_ir, measure};
use tilewright_base::{Class, DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_expr::{
    CUDA_HELPERS, CompileOptions, Compiled, Func, Value, compile, list_tokens, parse_program,
};
use tilewright_target::Cpu;

pub(crate) fn run(args: &ExprArgs, output: &Output) -> Result<()> {
    let given = given(&args.values)?;
    let mut options = CompileOptions { default: dtype(&args.dtype)?, ..CompileOptions::default() };
    for (name, value) in &given {
        if let Some(dtype) = value.dtype {
            options.types.insert((*name).to_string(), dtype);
        }
    }
    let mut text = String::new();
    let mut json = Map::new();
    // What needs no types also shows a text that does not type-check.
    let early = |stage: &ExprStage| matches!(stage, ExprStage::Tokens);
    for stage in args.emit.iter().filter(|s| early(s)) {
        let tokens = list_tokens(&args.text, &options)?;
        add(&mut text, &mut json, args, *stage, &tokens, json!(tokens.lines().collect::<Vec<_>>()));
    }
    if args.emit.iter().all(early) && !args.emit.is_empty() && args.bench.is_none() {
        parse_program(&args.text, &options)?;
        output.result(&text, &Json::Object(json));
        return Ok(());
    }
    let compiled = compile(&args.text, &options)?;
    let func = if args.fast { compiled.func.simplify_fast() } else { compiled.func.simplify() };
    let cpu = tilewright::host_cpu(args.threads, None)?;
    for &stage in args.emit.iter().filter(|s| !early(s)) {
        let (printed, value) = self::stage(stage, &compiled, &func, args.fast, &cpu)?;
        add(&mut text, &mut json, args, stage, &printed, value);
    }
    if let Some(count) = args.bench {
        let m = measure(&compiled.func, &func, &cpu, count)?;
        bench_text(&m, &mut text);
        json.insert("bench".into(), bench_json(&m));
    } else if args.emit.is_empty() {
        let result = evaluate(&given, &func, &cpu)?;
        let values: Vec<String> = (0..result.len()).map(|i| number(&result, i)).collect();
        let one = result.shape().is_empty();
        text += &if one { values.concat() } else { format!("[{}]", values.join(", ")) };
        let list: Vec<Json> = (0..result.len()).map(|i| number_json(&result, i)).collect();
        json.insert("dtype".into(), json!(result.dtype().name()));
        json.insert("value".into(), if one { list[0].clone() } else { Json::Array(list) });
    }
    output.result(&text, &Json::Object(json));
    Ok(())
}

fn dtype(name: &str) -> Result<DType> {
    name.parse().map_err(|()| {
        let names: Vec<&str> = DType::TABLE.iter().map(|row| row.1).collect();
        Error::user(format!("`{name}` is not an element type"))
            .with_hint(format!("one of {}", names.join(", ")))
    })
}

/// Adds a stage to what is printed; several get a headline each.
fn add(
    text: &mut String,
    json: &mut Map<String, Json>,
    args: &ExprArgs,
    stage: ExprStage,
    printed: &str,
    value: Json,
) {
    let name = stage.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string());
    if args.emit.len() > 1 {
        *text += &format!("--- {name}\n");
    }
    *text += printed.trim_end();
    text.push('\n');
    json.insert(name, value);
}

/// A stage as text and as JSON.
fn stage(
    stage: ExprStage,
    compiled: &Compiled,
    func: &Func,
    fast: bool,
    cpu: &Cpu,
) -> Result<(String, Json)> {
    let text = match stage {
        ExprStage::Tokens => String::new(),
        ExprStage::Ast => compiled.tree(),
        ExprStage::Func => func.to_string(),
        ExprStage::Llvm => llvm_ir(func, cpu)?,
        ExprStage::Asm => assembly(func, cpu)?,
        ExprStage::Cuda => {
            let cuda = func.to_cuda("expr");
            if cuda.contains("tw_") { format!("{CUDA_HELPERS}\n{cuda}") } else { cuda }
        }
        ExprStage::Triton => format!(
            "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n\n@triton.jit\n{}",
            func.to_triton("expr")?
        ),
        ExprStage::Derivative => {
            let mut lines = Vec::new();
            let mut json = Map::new();
            // Of what is written, simplified afterwards: rules then see the whole.
            for (i, param) in compiled.func.params().iter().enumerate() {
                let d = compiled.func.derivative(i)?;
                let d = if fast { d.simplify_fast() } else { d.simplify() };
                lines.push(format!("d/d{} = {d}", param.name));
                json.insert(param.name.to_string(), json!(d.to_string()));
            }
            if lines.is_empty() {
                lines.push("the formula has no variables".to_string());
            }
            return Ok((lines.join("\n"), Json::Object(json)));
        }
    };
    let value = json!(text);
    Ok((text, value))
}

/// A value as typed: `x=4`, `x=1,2,3`, `x:i32=4`.
struct Given<'a> {
    dtype: Option<DType>,
    values: Vec<&'a str>,
    array: bool,
}

fn given(list: &[String]) -> Result<BTreeMap<&str, Given<'_>>> {
    let mut given = BTreeMap::new();
    for pair in list {
        let Some((name, values)) = pair.split_once('=') else {
            return Err(Error::user(format!("`{pair}` is not of the form NAME=VALUE"))
                .with_hint("for example x=4, x=1,2,3 for an array, x:i32=4 for another type"));
        };
        let (name, dtype) = match name.split_once(':') {
            Some((name, dtype)) => (name, Some(self::dtype(dtype.trim())?)),
            None => (name, None),
        };
        let array = values.contains(',');
        let values = values.split(',').map(str::trim).filter(|v| !v.is_empty()).collect();
        given.insert(name.trim(), Given { dtype, values, array });
    }
    Ok(given)
}

/// Runs the function through the JIT on the given values.
fn evaluate(given: &BTreeMap<&str, Given<'_>>, func: &Func, cpu: &Cpu) -> Result<Tensor> {
    let names: Vec<&str> = func.params().iter().map(|p| &*p.name).collect();
    for name in given.keys() {
        if !names.contains(name) {
            let hint = match names.is_empty() {
                true => "it has no variables".to_string(),
                false => format!("its variables are: {}", names.join(", ")),
            };
            return Err(
                Error::user(format!("the expression has no variable `{name}`")).with_hint(hint)
            );
        }
    }
    let missing: Vec<&str> = names.iter().copied().filter(|n| !given.contains_key(n)).collect();
    if !missing.is_empty() {
        let add: Vec<String> = missing.iter().map(|m| format!("{m}=1")).collect();
        return Err(Error::user(format!("no value for {}", missing.join(", ")))
            .with_hint(format!("add {}", add.join(" "))));
    }
    let lists: Vec<&Given<'_>> = names.iter().filter_map(|n| given.get(n)).collect();
    let array = lists.iter().any(|g| g.array);
    let mut count = 1;
    for (name, list) in names.iter().zip(&lists) {
        if list.array && list.values.len() != 1 {
            if count != 1 && count != list.values.len() {
                return Err(Error::user(format!(
                    "`{name}` has {} values, another variable {count}",
                    list.values.len()
                )));
            }
            count = list.values.len();
        }
    }
    let mut args = Vec::new();
    for (param, list) in func.params().iter().zip(&lists) {
        let mut tensor = Tensor::zeros(param.dtype, vec![count])?;
        let bytes = tensor.bytes_mut();
        for i in 0..count {
            let text = if list.values.len() == 1 {
                list.values[0]
            } else {
                list.values.get(i).copied().unwrap_or_default()
            };
            match parse(text, param.dtype, &param.name)? {
                Value::Float(v) => tilewright_data::from_f64(param.dtype, bytes, i, v),
                Value::Int(v) => tilewright_data::from_i64(param.dtype, bytes, i, v),
            }
        }
        args.push(tensor);
    }
    let narrow = |d: DType| d.bits() < 8;
    let result = if narrow(func.dtype()) || func.params().iter().any(|p| narrow(p.dtype)) {
        // Four-bit arrays have no compiled form yet: the exact evaluator.
        interpret(func, &args, count)?
    } else {
        ArrayFunc::new(func, cpu)?.run(&args, count)?
    };
    result.reshaped(if array { vec![count] } else { vec![] })
}

fn interpret(func: &Func, args: &[Tensor], count: usize) -> Result<Tensor> {
    let mut out = Tensor::zeros(func.dtype(), vec![count])?;
    for i in 0..count {
        let values: Vec<Value> = args
            .iter()
            .map(|a| match a.dtype().is_float() {
                true => Value::Float(a.get_f64(i)),
                false => Value::Int(a.get_i64(i)),
            })
            .collect();
        let dtype = func.dtype();
        match func.eval(&values) {
            Value::Float(v) => tilewright_data::from_f64(dtype, out.bytes_mut(), i, v),
            Value::Int(v) => tilewright_data::from_i64(dtype, out.bytes_mut(), i, v),
        }
    }
    Ok(out)
}

/// A number as typed; integers must fit their type.
fn parse(text: &str, dtype: DType, name: &str) -> Result<Value> {
    let wrong = |why: String| Err(Error::user(format!("{name}={text}: {why}")));
    if dtype.is_float() {
        return match text.parse() {
            Ok(v) => Ok(Value::Float(v)),
            Err(_) => wrong("not a number".into()),
        };
    }
    let value: i128 = match (text, text.parse()) {
        (_, Ok(v)) => v,
        ("true", _) => 1,
        ("false", _) => 0,
        _ => return wrong(format!("not a whole number, and `{name}` is {dtype}")),
    };
    let bits = dtype.bits();
    let (low, high) = match dtype.class() {
        Class::Bool => (0, 1),
        Class::Signed => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
        _ => (0, (1i128 << bits) - 1),
    };
    if value < low || value > high {
        return wrong(format!("{dtype} reaches from {low} to {high}"));
    }
    Ok(Value::Int(value as i64))
}

/// An element as its type prints.
fn number(tensor: &Tensor, i: usize) -> String {
    match tensor.dtype() {
        DType::F64 => tensor.get_f64(i).to_string(),
        d if d.is_float() => (tensor.get_f64(i) as f32).to_string(),
        DType::Bool => (tensor.get_i64(i) != 0).to_string(),
        DType::U64 => (tensor.get_i64(i) as u64).to_string(),
        _ => tensor.get_i64(i).to_string(),
    }
}

/// As [`number`]; what JSON lacks (infinities, NaN) is a string.
fn number_json(tensor: &Tensor, i: usize) -> Json {
    match tensor.dtype() {
        d if d.is_float() && !tensor.get_f64(i).is_finite() => json!(number(tensor, i)),
        d if d.is_float() => json!(tensor.get_f64(i)),
        DType::Bool => json!(tensor.get_i64(i) != 0),
        DType::U64 => json!(tensor.get_i64(i) as u64),
        _ => json!(tensor.get_i64(i)),
    }
}

fn bench_text(m: &Measured, text: &mut String) {
    let rate = |seconds: f64| m.elements as f64 / seconds.max(1e-12) * 1e-6;
    *text +=
        &format!("arrays of {} elements, {} operations per element\n", m.elements, m.operations);
    let mut line = |what: &str, seconds: f64, beside: String| {
        *text += &format!("{what:<36} {:>10.1} million elements/s{beside}\n", rate(seconds));
    };
    let times = |seconds: f64| match m.temporaries_s {
        Some(slow) => format!("   {:>5.1}x", slow / seconds.max(1e-12)),
        None => String::new(),
    };
    if let Some(seconds) = m.temporaries_s {
        line("one temporary array per operation", seconds, times(seconds));
    }
    line("compiled, 1 thread", m.one_thread_s, times(m.one_thread_s));
    line(&format!("compiled, {} threads", m.threads), m.all_threads_s, times(m.all_threads_s));
    if let Some(d) = m.max_difference {
        *text += &format!("largest relative difference between the two: {d:.1e}\n");
    }
    *text += &format!("largest relative error of the compiled: {:.1e}\n", m.max_error);
}

fn bench_json(m: &Measured) -> Json {
    let rate = |seconds: f64| m.elements as f64 / seconds.max(1e-12);
    json!({
        "elements": m.elements, "operations": m.operations, "threads": m.threads,
        "compiled_1_thread_elements_per_s": rate(m.one_thread_s),
        "compiled_elements_per_s": rate(m.all_threads_s),
        "temporaries_elements_per_s": m.temporaries_s.map(rate),
        "speedup_1_thread": m.temporaries_s.map(|s| s / m.one_thread_s.max(1e-12)),
        "max_relative_difference": m.max_difference, "max_relative_error": m.max_error,
    })
}
