//! Scalar functions over the elements of values, in parallel chunks.
//!
//! What the operations mean is said in the crate `expr`; this file only brings the elements there.

use crate::graph::Mode;
use crate::value::Buf;
use rayon::prelude::*;
use tilewright_expr::{Func, Value};

/// Elements per task.
const CHUNK: usize = 4096;

/// `func` over `n` elements; every argument has `n` elements of its parameter's type.
pub(crate) fn eval_func(func: &Func, args: &[&Buf], n: usize, mode: Mode) -> Buf {
    let floats: Option<Vec<&[f64]>> = args
        .iter()
        .map(|buf| match buf {
            Buf::F(v) => Some(v.as_slice()),
            Buf::I(_) => None,
        })
        .collect();
    if let (Some(floats), Mode::F64, true) = (floats, mode, func.dtype().is_float()) {
        let mut out = vec![0.0; n];
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(c, out)| {
            let range = c * CHUNK..c * CHUNK + out.len();
            let args: Vec<&[f64]> = floats.iter().map(|v| &v[range.clone()]).collect();
            func.eval_f64_many(&args, out);
        });
        return Buf::F(out);
    }
    let mut out = vec![Value::Int(0); n];
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(c, out)| {
        let range = c * CHUNK..c * CHUNK + out.len();
        let args: Vec<Vec<Value>> = args
            .iter()
            .map(|buf| match buf {
                Buf::F(v) => v[range.clone()].iter().map(|&x| Value::Float(x)).collect(),
                Buf::I(v) => v[range.clone()].iter().map(|&x| Value::Int(x)).collect(),
            })
            .collect();
        let args: Vec<&[Value]> = args.iter().map(Vec::as_slice).collect();
        match mode {
            Mode::Exact => func.eval_many(&args, out),
            Mode::F64 => func.eval_oracle_many(&args, out),
        }
    });
    // The kind of every element follows from the function's type.
    if func.dtype().is_float() {
        Buf::F(out.iter().map(|v| if let Value::Float(x) = v { *x } else { 0.0 }).collect())
    } else {
        Buf::I(out.iter().map(|v| if let Value::Int(x) = v { *x } else { 0 }).collect())
    }
}
