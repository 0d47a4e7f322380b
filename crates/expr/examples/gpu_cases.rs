//! Prints a Python file with every operation on every type as CUDA and Triton text, inputs and the
//! exact results. `gpu_cases.py` beside it runs them on a GPU and compares:
//!
//! ```text
//! cargo run -p tilewright-expr --example gpu_cases > cases.py && python3 gpu_cases.py cases.py
//! ```

use tilewright_base::DType;
use tilewright_expr::{Func, FuncBuilder, Node, Op, Value};

const EDGES: [f64; 30] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    2.0,
    -2.0,
    0.5,
    -0.5,
    3.0,
    7.0,
    -7.0,
    8.0,
    31.0,
    64.0,
    127.0,
    -128.0,
    255.0,
    1.5,
    2.5,
    0.1,
    1e-3,
    1e10,
    -1e10,
    1e30,
    3e38,
    1.2e-38,
    5e-8,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
];

fn value(v: f64, dtype: DType) -> Value {
    let mut b = FuncBuilder::new();
    let id = b.constant(v, dtype);
    match b.node(id) {
        Node::Const(v) => *v,
        _ => unreachable!("a constant"),
    }
}

fn show(v: Value) -> String {
    match v {
        Value::Float(v) if v.is_nan() => "NAN".into(),
        Value::Float(v) if v.is_infinite() => if v > 0.0 { "INF" } else { "-INF" }.into(),
        Value::Float(v) => format!("{v:?}"),
        Value::Int(v) => v.to_string(),
    }
}

fn case(name: &str, func: &Func) {
    let n = EDGES.len() * EDGES.len();
    let columns: Vec<Vec<Value>> = func
        .params()
        .iter()
        .enumerate()
        .map(|(p, param)| {
            (0..n)
                .map(|i| {
                    let pick = [i % EDGES.len(), i / EDGES.len(), (i * 7 + i / 30) % EDGES.len()];
                    value(EDGES[pick[p % 3]], param.dtype)
                })
                .collect()
        })
        .collect();
    let slices: Vec<&[Value]> = columns.iter().map(|c| &c[..]).collect();
    let mut want = vec![Value::Int(0); n];
    func.eval_many(&slices, &mut want);
    let list = |c: &[Value]| c.iter().map(|v| show(*v)).collect::<Vec<_>>().join(",");
    let types: Vec<String> =
        func.params().iter().map(|p| format!("{:?}", p.dtype.name())).collect();
    let inputs: Vec<String> = columns.iter().map(|c| format!("[{}]", list(c))).collect();
    println!(
        "CASES.append(dict(name={name:?}, result={:?}, types=[{}],",
        func.dtype().name(),
        types.join(",")
    );
    println!("  cuda={:?},", func.to_cuda("f"));
    match func.to_triton("f") {
        Ok(text) => println!("  triton={text:?},"),
        Err(_) => println!("  triton=None,"),
    }
    println!("  inputs=[{}], want=[{}]))", inputs.join(","), list(&want));
}

fn main() {
    println!(
        "NAN, INF = float('nan'), float('inf')\nCASES = []\nHELPERS = {:?}",
        tilewright_expr::CUDA_HELPERS
    );
    for (dtype, ..) in DType::TABLE {
        for op in Op::all().filter(|op| *op != Op::Cast && op.accepts(dtype.class())) {
            let mut b = FuncBuilder::new();
            let args: Vec<_> = (0..op.arity())
                .map(|i| b.param("x", if op == Op::Select && i == 0 { DType::Bool } else { dtype }))
                .collect();
            let y = b.op(op, &args);
            case(&format!("{} {dtype}", op.name()), &b.finish(y));
        }
        for (to, ..) in DType::TABLE.into_iter().filter(|row| row.0 != dtype) {
            case(&format!("cast {dtype} to {to}"), &Func::cast(dtype, to));
        }
    }
}
