//! Subgraph operators: branches are inlined, loops unrolled where the number of turns is known.

use super::super::model::{Opsets, Scopes, Walk};
use super::super::node::{N, Val, axis};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::FuncBuilder;
use tilewright_graph::{Op, ValueId};

/// More turns than this are not unrolled.
const TURN_LIMIT: i64 = 1024;

pub(crate) fn if_(
    walk: &mut Walk<'_>,
    n: &N<'_>,
    opsets: &Opsets,
    scopes: &mut Scopes,
) -> Result<Vec<Val>> {
    let cond = n.x(0)?;
    let known = walk.cx.try_ints(cond).and_then(|v| v.first().and_then(|d| d.as_const()));
    if let Some(value) = known {
        let branch = n.graph(if value != 0 { "then_branch" } else { "else_branch" })?;
        return walk.subgraph(branch, &[], opsets, scopes);
    }
    // Both branches are pure: compute both and select, when their results have the same types.
    let yes = walk.subgraph(n.graph("then_branch")?, &[], opsets, scopes)?;
    let no = walk.subgraph(n.graph("else_branch")?, &[], opsets, scopes)?;
    let same = yes.len() == no.len()
        && yes.iter().zip(&no).all(|(a, b)| match (a, b) {
            (Val::T(a), Val::T(b)) => walk.cx.ty(*a) == walk.cx.ty(*b),
            _ => false,
        });
    if !same {
        return Err(needs(walk, cond, "the condition of an If with branches of different types"));
    }
    let cond = walk.cx.reshape(cond, &[])?;
    yes.iter()
        .zip(&no)
        .map(|(a, b)| match (a, b) {
            (Val::T(a), Val::T(b)) => {
                walk.cx.map(&[cond, *a, *b], |p| p[0].select(p[1], p[2])).map(Val::T)
            }
            _ => Err(Error::bug("checked above")),
        })
        .collect()
}

fn needs(walk: &mut Walk<'_>, v: ValueId, what: &str) -> Error {
    match walk.cx.tensor(v, what) {
        Err(e) => e,
        Ok(_) => Error::unsupported(what.to_string()),
    }
}

pub(crate) fn loop_(
    walk: &mut Walk<'_>,
    n: &N<'_>,
    opsets: &Opsets,
    scopes: &mut Scopes,
) -> Result<Vec<Val>> {
    let body = n.graph("body")?;
    let most = match n.opt(0)? {
        Some(v) => walk.cx.const_int(v, "the trip count of a Loop")?,
        None => i64::MAX,
    };
    let mut going = match n.opt(1)? {
        Some(v) => walk.cx.const_int(v, "the condition of a Loop")? != 0,
        None => true,
    };
    let mut carried: Vec<Val> =
        n.ins.iter().skip(2).map(|v| v.clone().unwrap_or(Val::Absent)).collect();
    let scans = body.output.len().saturating_sub(1 + carried.len());
    if body.output.len() < 1 + carried.len() {
        return Err(Error::user("the body of a Loop has too few outputs"));
    }
    let mut collected: Vec<Vec<ValueId>> = vec![Vec::new(); scans];
    let mut turn = 0;
    while going && turn < most {
        if turn >= TURN_LIMIT {
            return Err(Error::unsupported(format!("a Loop of more than {TURN_LIMIT} turns")));
        }
        let counter = tilewright_data::Tensor::from_i64s(DType::I64, &[], &[turn])?;
        let flag = tilewright_data::Tensor::from_i64s(DType::Bool, &[], &[1])?;
        let mut args = vec![Val::T(walk.cx.constant(counter)), Val::T(walk.cx.constant(flag))];
        args.extend(carried.iter().cloned());
        let mut out = walk.subgraph(body, &args, opsets, scopes)?;
        let rest = out.split_off(1);
        let Some(Val::T(cond)) = out.pop() else {
            return Err(Error::unsupported("a Loop whose condition is not known"));
        };
        going = walk.cx.const_int(cond, "the condition of a Loop")? != 0;
        let mut rest = rest.into_iter();
        carried = rest.by_ref().take(carried.len()).collect();
        for (list, val) in collected.iter_mut().zip(rest) {
            match val {
                Val::T(v) => list.push(v),
                _ => return Err(Error::unsupported("a Loop that collects sequences")),
            }
        }
        turn += 1;
    }
    let mut results = carried;
    for list in collected {
        results.push(Val::T(stack(walk, &list, 0)?));
    }
    Ok(results)
}

/// Joins values along a new axis.
fn stack(walk: &mut Walk<'_>, list: &[ValueId], at: usize) -> Result<ValueId> {
    if list.is_empty() {
        return Err(Error::unsupported("a loop that collects nothing"));
    }
    let mut thin = Vec::new();
    for &v in list {
        thin.push(walk.cx.unsqueeze(v, &[at])?);
    }
    walk.cx.concat(&thin, at)
}

pub(crate) fn scan(
    walk: &mut Walk<'_>,
    n: &N<'_>,
    opsets: &Opsets,
    scopes: &mut Scopes,
) -> Result<Vec<Val>> {
    if n.opset < 9 {
        return Err(Error::unsupported("Scan of operator set 8"));
    }
    let body = n.graph("body")?;
    let inputs = n.all()?;
    let scanned = usize::try_from(n.int("num_scan_inputs", 0)?).unwrap_or(0);
    let Some(states) = inputs.len().checked_sub(scanned).filter(|_| scanned > 0) else {
        return Err(Error::user("Scan over nothing"));
    };
    let outs = body.output.len().checked_sub(states);
    let Some(outs) = outs else {
        return Err(Error::user("the body of a Scan has too few outputs"));
    };
    let list = |name: &str, len: usize| -> Result<Vec<i64>> {
        let list = n.ints(name)?.unwrap_or_else(|| vec![0; len]);
        if list.len() == len { Ok(list) } else { Err(Error::user(format!("{name} {list:?}"))) }
    };
    let (in_axes, out_axes) = (list("scan_input_axes", scanned)?, list("scan_output_axes", outs)?);
    let (in_back, out_back) =
        (list("scan_input_directions", scanned)?, list("scan_output_directions", outs)?);
    let mut axes = Vec::new();
    for (&v, &a) in inputs[states..].iter().zip(&in_axes) {
        axes.push(axis(a, walk.cx.rank(v))?);
    }
    let len = walk.cx.shape(inputs[states])[axes[0]].clone();
    let len = walk.cx.static_dim(&len, "Scan")?;
    if len > TURN_LIMIT {
        return Err(Error::unsupported(format!("a Scan of more than {TURN_LIMIT} turns")));
    }
    let mut carried: Vec<Val> = inputs[..states].iter().map(|&v| Val::T(v)).collect();
    let mut collected: Vec<Vec<ValueId>> = vec![Vec::new(); outs];
    for turn in 0..len {
        let mut args = carried.clone();
        for ((&v, &a), &back) in inputs[states..].iter().zip(&axes).zip(&in_back) {
            let at = if back == 1 { len - 1 - turn } else { turn };
            args.push(Val::T(walk.cx.pick(v, a, at)?));
        }
        let mut out = walk.subgraph(body, &args, opsets, scopes)?;
        let rest = out.split_off(states);
        carried = out;
        for (list, val) in collected.iter_mut().zip(rest) {
            match val {
                Val::T(v) => list.push(v),
                _ => return Err(Error::unsupported("a Scan that collects sequences")),
            }
        }
    }
    let mut results = carried;
    for ((mut list, a), back) in collected.into_iter().zip(out_axes).zip(out_back) {
        if back == 1 {
            list.reverse();
        }
        let rank = list.first().map_or(0, |v| walk.cx.rank(*v)) + 1;
        let at = axis(a, rank)?;
        results.push(Val::T(stack(walk, &list, at)?));
    }
    Ok(results)
}

/// Attention with subgraphs that change scores and probabilities.
pub(crate) fn flex_attention(
    walk: &mut Walk<'_>,
    n: &N<'_>,
    opsets: &Opsets,
    scopes: &mut Scopes,
) -> Result<Vec<Val>> {
    let (q, k, v) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let cx = &mut walk.cx;
    cx.same_dtype(&[q, k, v])?;
    cx.float(q)?;
    if [q, k, v].iter().any(|&t| cx.rank(t) != 4) {
        return Err(Error::user("FlexAttention takes tensors of four axes"));
    }
    let (qd, kd) = (cx.shape(q), cx.shape(k));
    let (hq, hk) = (cx.static_dim(&qd[1], "attention")?, cx.static_dim(&kd[1], "attention")?);
    if hk < 1 || hq % hk != 0 {
        return Err(Error::user(format!("{hq} query heads for {hk} key heads")));
    }
    let scale = match n.float_opt("scale")? {
        Some(s) => s,
        None => 1.0 / (cx.static_dim(&qd[3], "attention")? as f64).sqrt(),
    };
    let dtype = cx.dtype(q);
    let wide = n.dtype("softmax_precision")?.unwrap_or(dtype.compute());
    if !n.has("score_mod") && !n.has("prob_mod") && wide == dtype {
        let mut f = FuncBuilder::new();
        let s = f.param("s", dtype.compute());
        let c = f.constant(scale, dtype.compute());
        let r = f.op(tilewright_expr::Op::Mul, &[s, c]);
        let attrs =
            tilewright_graph::AttentionAttrs { score: f.finish(r), causal: false, zeros: false };
        return Ok(vec![Val::T(cx.op(Op::Attention(attrs), &[q, k, v])?)]);
    }
    let compute = dtype.compute();
    let (qw, kw) = (cx.cast(q, compute)?, cx.cast(k, compute)?);
    let kw = super::attention::repeat_heads(cx, kw, hq / hk)?;
    let v = super::attention::repeat_heads(cx, v, hq / hk)?;
    let raw = cx.contract("bhsd,bhtd->bhst", qw, kw)?;
    let raw = cx.map(&[raw], |p| p[0] * scale)?;
    let mut scores = cx.cast(raw, wide)?;
    let modify = |walk: &mut Walk<'_>, scopes: &mut Scopes, name: &str, v: ValueId| {
        if !n.has(name) {
            return Ok(v);
        }
        match walk.subgraph(n.graph(name)?, &[Val::T(v)], opsets, scopes)?.as_slice() {
            [Val::T(v)] => Ok(*v),
            _ => Err(Error::unsupported(format!("a {name} that does not give one tensor"))),
        }
    };
    scores = modify(walk, scopes, "score_mod", scores)?;
    let probs = walk.cx.op(Op::Softmax { axis: 3, log: false }, &[scores])?;
    let probs = modify(walk, scopes, "prob_mod", probs)?;
    let cx = &mut walk.cx;
    let vw = cx.cast(v, wide)?;
    let out = cx.contract("bhst,bhte->bhse", probs, vw)?;
    Ok(vec![Val::T(cx.cast(out, dtype)?)])
}

pub(crate) fn sequence_map(
    walk: &mut Walk<'_>,
    n: &N<'_>,
    opsets: &Opsets,
    scopes: &mut Scopes,
) -> Result<Vec<Val>> {
    let body = n.graph("body")?;
    let len = n.seq(0)?.len();
    let mut lists: Vec<Vec<ValueId>> = vec![Vec::new(); body.output.len()];
    for i in 0..len {
        let mut args = Vec::new();
        for input in &n.ins {
            args.push(match input {
                Some(Val::Seq(items)) => Val::T(
                    *items.get(i).ok_or_else(|| Error::user("sequences of different lengths"))?,
                ),
                Some(other) => other.clone(),
                None => Val::Absent,
            });
        }
        for (list, val) in lists.iter_mut().zip(walk.subgraph(body, &args, opsets, scopes)?) {
            match val {
                Val::T(v) => list.push(v),
                _ => return Err(Error::unsupported("a sequence of sequences")),
            }
        }
    }
    Ok(lists.into_iter().map(Val::Seq).collect())
}
