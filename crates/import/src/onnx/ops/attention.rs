//! Attention and what belongs to it: rotary embedding, linear attention.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::FuncBuilder;
use tilewright_graph::{AttentionAttrs, Op, PadMode, ReduceKind, ValueId};
use tilewright_layout::Dim;

/// `[B, S, H*D]` as `[B, H, S, D]`.
fn heads(cx: &mut Cx, v: ValueId, count: i64) -> Result<ValueId> {
    let dims = cx.shape(v);
    let [b, s, hidden] = dims.as_slice() else {
        return Err(Error::user(format!("{} where three axes are needed", cx.ty(v))));
    };
    if count < 1 {
        return Err(Error::user(format!("{count} attention heads")));
    }
    let each = hidden.floor_div(&Dim::new(count));
    let v = cx.reshape(v, &[b.clone(), s.clone(), Dim::new(count), each])?;
    cx.permute(v, &[0, 2, 1, 3])
}

/// `[B, H, S, D]` as `[B, S, H*D]`.
fn packed(cx: &mut Cx, v: ValueId) -> Result<ValueId> {
    let dims = cx.shape(v);
    let [b, h, s, d] = dims.as_slice() else {
        return Err(Error::user(format!("{} where four axes are needed", cx.ty(v))));
    };
    let out = [b.clone(), s.clone(), h * d];
    let v = cx.permute(v, &[0, 2, 1, 3])?;
    cx.reshape(v, &out)
}

/// Each key/value head repeated for the query heads that share it.
pub(super) fn repeat_heads(cx: &mut Cx, v: ValueId, times: i64) -> Result<ValueId> {
    if times == 1 {
        return Ok(v);
    }
    let dims = cx.shape(v);
    let wide = cx.unsqueeze(v, &[2])?;
    let mut shape = cx.shape(wide);
    shape[2] = Dim::new(times);
    let wide = cx.expand(wide, &shape)?;
    let mut out = dims;
    out[1] = &out[1] * times;
    cx.reshape(wide, &out)
}

pub(crate) fn attention(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (mut q, mut k, mut v) = (n.x(0)?, n.x(1)?, n.x(2)?);
    cx.same_dtype(&[q, k, v])?;
    cx.float(q)?;
    let three = cx.rank(q) == 3;
    if three {
        let (hq, hk) = (n.int("q_num_heads", 0)?, n.int("kv_num_heads", 0)?);
        q = heads(cx, q, hq)?;
        k = heads(cx, k, hk)?;
        v = heads(cx, v, hk)?;
    }
    if [q, k, v].iter().any(|&t| cx.rank(t) != 4) {
        return Err(Error::user("attention takes tensors of three or four axes"));
    }
    let dtype = cx.dtype(q);
    let past = match (n.opt(4)?, n.opt(5)?) {
        (Some(pk), Some(pv)) => {
            let len = cx.shape(pk).get(2).cloned().unwrap_or_default();
            k = cx.concat(&[pk, k], 2)?;
            v = cx.concat(&[pv, v], 2)?;
            Some(len)
        }
        (None, None) => None,
        _ => return Err(Error::user("past_key and past_value come together")),
    };
    let (present_k, present_v) = (k, v);
    let (qd, kd) = (cx.shape(q), cx.shape(k));
    let scale = match n.float_opt("scale")? {
        Some(s) => s,
        None => {
            let d = cx.static_dim(&qd[3], "attention without a scale")?;
            1.0 / (d as f64).sqrt()
        }
    };
    let (hq, hk) = (cx.static_dim(&qd[1], "attention")?, cx.static_dim(&kd[1], "attention")?);
    if hk < 1 || hq % hk != 0 {
        return Err(Error::user(format!("{hq} query heads for {hk} key heads")));
    }
    let causal = n.flag("is_causal", false)?;
    let (left, right) = (n.int("left_window_size", -1)?, n.int("right_window_size", -1)?);
    let softcap = n.float("softcap", 0.0)?;
    let mask = n.opt(3)?;
    let lens = n.opt(6)?;
    let mode = n.int("qk_matmul_output_mode", 0)?;

    // What is added to the scores, in broadcast form over [B, H, S, T]; none when nothing is.
    let bias = bias(cx, &qd, &kd, mask, lens, past.as_ref(), (causal, left, right), dtype)?;
    let wants_scores = n.wants(3);
    let y;
    let mut scores_out = None;
    if !wants_scores && mask.is_none() && lens.is_none() && bias.is_none() {
        y = fused(cx, &[q, k, v], scale, softcap, dtype)?;
    } else {
        let wide = dtype.compute();
        let (qw, kw) = (cx.cast(q, wide)?, cx.cast(k, wide)?);
        let vw = cx.cast(v, wide)?;
        let kw = repeat_heads(cx, kw, hq / hk)?;
        let vw = repeat_heads(cx, vw, hq / hk)?;
        let raw = cx.contract("bhsd,bhtd->bhst", qw, kw)?;
        let raw = cx.map(&[raw], |p| p[0] * scale)?;
        let capped = match softcap > 0.0 {
            true => cx.map(&[raw], |p| (p[0] / softcap).tanh() * softcap)?,
            false => raw,
        };
        let biased = match bias {
            Some(b) => {
                let b = cx.cast(b, wide)?;
                cx.add(capped, b)?
            }
            None => capped,
        };
        let soft = cx.op(Op::Softmax { axis: 3, log: false }, &[biased])?;
        // A row without any key it may look at gives zero.
        let soft = match bias {
            Some(b) => {
                let b = cx.cast(b, wide)?;
                let last = cx.rank(b) - 1;
                let top = cx.reduce(ReduceKind::Max, b, &[last], true)?;
                cx.map(&[soft, top], |p| p[1].eq(f64::NEG_INFINITY).select(p[0].number(0.0), p[0]))?
            }
            None => soft,
        };
        let shown = match mode {
            0 => raw,
            1 => capped,
            2 => biased,
            3 => soft,
            other => return Err(Error::user(format!("qk_matmul_output_mode {other}"))),
        };
        // Older versions count: 1 after the mask, 2 after the cap.
        scores_out = Some(cx.cast(shown, dtype)?);
        let out = cx.contract("bhst,bhte->bhse", soft, vw)?;
        y = cx.cast(out, dtype)?;
    }
    let y = if three { packed(cx, y)? } else { y };
    let mut out = vec![Val::T(y), Val::T(present_k), Val::T(present_v)];
    if let Some(s) = scores_out {
        out.push(Val::T(s));
    }
    Ok(out)
}

/// Attention as one operator: the scale and the cap are its score function.
fn fused(cx: &mut Cx, qkv: &[ValueId], scale: f64, softcap: f64, dtype: DType) -> Result<ValueId> {
    use tilewright_expr::Op as E;
    let mut f = FuncBuilder::new();
    let s = f.param("s", dtype.compute());
    let c = f.constant(scale, dtype.compute());
    let mut r = f.op(E::Mul, &[s, c]);
    if softcap > 0.0 {
        let cap = f.constant(softcap, dtype.compute());
        let t = f.op(E::Div, &[r, cap]);
        let t = f.op(E::Tanh, &[t]);
        r = f.op(E::Mul, &[t, cap]);
    }
    cx.op(Op::Attention(AttentionAttrs { score: f.finish(r), causal: false, zeros: false }), qkv)
}

#[allow(clippy::too_many_arguments, reason = "one list of what decides the bias")]
fn bias(
    cx: &mut Cx,
    qd: &[Dim],
    kd: &[Dim],
    mask: Option<ValueId>,
    lens: Option<ValueId>,
    past: Option<&Dim>,
    (causal, left, right): (bool, i64, i64),
    dtype: DType,
) -> Result<Option<ValueId>> {
    let (s, t) = (&qd[2], &kd[2]);
    let mut sum: Option<ValueId> = None;
    if let Some(mut m) = mask {
        if !(1..=4).contains(&cx.rank(m)) {
            return Err(Error::user(format!("an attention mask {}", cx.ty(m))));
        }
        let short = cx.shape(m).last().cloned().unwrap_or_default();
        let wide = dtype.compute();
        m = if cx.dtype(m) == DType::Bool {
            cx.map(&[m], |p| {
                let zero = p[0].cast(wide).number(0.0);
                p[0].select(zero, f64::NEG_INFINITY)
            })?
        } else {
            cx.cast(m, wide)?
        };
        if short != *t && !short.is(1) {
            let rank = cx.rank(m);
            let lo = vec![Dim::new(0); rank];
            let mut hi = lo.clone();
            hi[rank - 1] = t - &short;
            let fill = tilewright_expr::Value::Float(f64::NEG_INFINITY);
            m = cx.op(Op::Pad { lo, hi, mode: PadMode::Constant(fill) }, &[m])?;
        }
        sum = Some(m);
    }
    let row = cx.iota(DType::I64, 4, 2, s)?;
    let column = cx.iota(DType::I64, 4, 3, t)?;
    // Position of the first query: after the past, or before the end of what is valid.
    let lens = match lens {
        Some(l) => {
            let l = cx.cast(l, DType::I64)?;
            Some(cx.along(l, 0, 4)?)
        }
        None => None,
    };
    let windows = causal || left >= 0 || right >= 0;
    let add = |cx: &mut Cx, sum: Option<ValueId>, allowed: ValueId| -> Result<Option<ValueId>> {
        let wide = dtype.compute();
        Ok(Some(match sum {
            Some(v) => cx.map(&[allowed, v], |p| p[0].select(p[1], f64::NEG_INFINITY))?,
            None => cx.map(&[allowed], |p| {
                let zero = p[0].cast(wide).number(0.0);
                p[0].select(zero, f64::NEG_INFINITY)
            })?,
        }))
    };
    if windows {
        let offset = match (lens, past) {
            (_, Some(len)) => cx.dim_scalar(len, DType::I64)?,
            (Some(l), None) => {
                let s = cx.dim_scalar(s, DType::I64)?;
                cx.sub(l, s)?
            }
            (None, None) => cx.scalar(DType::I64, 0.0),
        };
        let allowed = cx.map(&[row, column, offset], |p| {
            let ahead = p[1] - (p[0] + p[2]);
            let mut ok = ahead.eq(ahead);
            if causal {
                ok = ok.and(ahead.le(0.0));
            }
            if left >= 0 {
                ok = ok.and((-ahead).le(ahead.integer(left)));
            }
            if right >= 0 {
                ok = ok.and(ahead.le(ahead.integer(right)));
            }
            ok
        })?;
        sum = add(cx, sum, allowed)?;
    }
    if let Some(l) = lens {
        let allowed = cx.map(&[column, l], |p| p[0].lt(p[1]))?;
        sum = add(cx, sum, allowed)?;
    }
    Ok(sum)
}

pub(crate) fn rotary(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, cos, sin) = (n.x(0)?, n.x(1)?, n.x(2)?);
    cx.same_dtype(&[x, cos, sin])?;
    let dims = cx.shape(x);
    let three = dims.len() == 3;
    let v = if three { heads(cx, x, n.int("num_heads", 0)?)? } else { x };
    let shape = cx.shape(v);
    let [_, _, _, d] = shape.as_slice() else {
        return Err(Error::user(format!("rotary embedding of {}", cx.ty(x))));
    };
    let rotated = match n.int("rotary_embedding_dim", 0)? {
        0 => d.clone(),
        r => Dim::new(r),
    };
    let half = rotated.floor_div(&Dim::new(2));
    let mut caches = Vec::new();
    for cache in [cos, sin] {
        let c = match n.opt(3)? {
            Some(ids) => cx.op(Op::Gather(0), &[cache, ids])?,
            None => cache,
        };
        // [B, S, R/2] -> [B, 1, S, R/2]
        let c = cx.unsqueeze(c, &[1])?;
        caches.push(c);
    }
    let &[cos, sin] = caches.as_slice() else { return Err(Error::bug("two caches")) };
    let part = cx.slice(v, 3, Dim::new(0), rotated.clone())?;
    let interleaved = n.flag("interleaved", false)?;
    let (a, b) = if interleaved {
        let mut pairs = cx.shape(part);
        pairs[3] = half.clone();
        pairs.push(Dim::new(2));
        let p = cx.reshape(part, &pairs)?;
        (cx.pick(p, 4, 0)?, cx.pick(p, 4, 1)?)
    } else {
        let a = cx.slice(part, 3, Dim::new(0), half.clone())?;
        (a, cx.slice(part, 3, half.clone(), half.clone())?)
    };
    let real = cx.fmap(&[a, b, cos, sin], |p| p[0] * p[2] - p[1] * p[3])?;
    let imag = cx.fmap(&[a, b, cos, sin], |p| p[0] * p[3] + p[1] * p[2])?;
    let turned = if interleaved {
        let (r, i) = (cx.unsqueeze(real, &[4])?, cx.unsqueeze(imag, &[4])?);
        let both = cx.concat(&[r, i], 4)?;
        let mut flat = shape.clone();
        flat[3] = rotated.clone();
        cx.reshape(both, &flat)?
    } else {
        cx.concat(&[real, imag], 3)?
    };
    let out = if rotated == *d {
        turned
    } else {
        let rest = cx.slice(v, 3, rotated.clone(), d - &rotated)?;
        cx.concat(&[turned, rest], 3)?
    };
    one(if three { packed(cx, out)? } else { out })
}

/// The recurrence, unrolled over a static number of steps.
pub(crate) fn linear_attention(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (q, k, v) = (n.x(0)?, n.x(1)?, n.x(2)?);
    let dtype = cx.dtype(q);
    let (hq, hk) = (n.int("q_num_heads", 0)?, n.int("kv_num_heads", 0)?);
    if hk < 1 || hq < 1 || hq % hk != 0 {
        return Err(Error::user(format!("{hq} query heads for {hk} key heads")));
    }
    let rule = n.str("update_rule", "gated_delta")?;
    let (gated, delta) = match rule.as_str() {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return Err(Error::user(format!("update_rule `{other}`"))),
    };
    let f = DType::F32;
    let unpack = |cx: &mut Cx, v: ValueId, h: i64| -> Result<ValueId> {
        let v = heads(cx, v, h)?;
        cx.cast(v, f)
    };
    let (q4, k4, v4) = (unpack(cx, q, hq)?, unpack(cx, k, hk)?, unpack(cx, v, hk)?);
    let steps = cx.static_dim(&cx.shape(q4)[2], "LinearAttention over time")?;
    if steps > 512 {
        return Err(Error::unsupported(format!("LinearAttention over {steps} steps")));
    }
    let (dk, dv) = (cx.shape(k4)[3].clone(), cx.shape(v4)[3].clone());
    let batch = cx.shape(q4)[0].clone();
    let scale = match n.float("scale", 0.0)? {
        0.0 => 1.0 / (cx.static_dim(&dk, "LinearAttention")? as f64).sqrt(),
        s => s,
    };
    let decay = match n.opt(4)? {
        Some(g) if gated => Some(unpack(cx, g, hk)?),
        None if gated => return Err(Error::user("a gated update rule needs a decay")),
        _ => None,
    };
    let beta = match n.opt(5)? {
        Some(b) if delta => {
            let h = cx.shape(b).last().and_then(Dim::as_const).unwrap_or(hk);
            Some(unpack(cx, b, h)?)
        }
        None if delta => return Err(Error::user("a delta update rule needs a beta")),
        _ => None,
    };
    let (mut state, state_type) = match n.opt(3)? {
        Some(s) => (cx.cast(s, f)?, cx.dtype(s)),
        None => (cx.full(f, 0.0, &[batch, Dim::new(hk), dk, dv])?, dtype),
    };
    let mut outs = Vec::new();
    for i in 0..steps {
        let (qt, kt) = (cx.pick(q4, 2, i)?, cx.pick(k4, 2, i)?);
        let mut vt = cx.pick(v4, 2, i)?;
        if let Some(g) = decay {
            let g = cx.pick(g, 2, i)?;
            let g = cx.unsqueeze(g, &[3])?;
            state = cx.map(&[state, g], |p| p[0] * p[1].exp())?;
        }
        if let Some(b) = beta {
            let b = cx.pick(b, 2, i)?;
            let got = cx.contract("bhdm,bhd->bhm", state, kt)?;
            vt = cx.map(&[vt, got, b], |p| p[2] * (p[0] - p[1]))?;
        }
        let (kc, vr) = (cx.unsqueeze(kt, &[3])?, cx.unsqueeze(vt, &[2])?);
        state = cx.map(&[state, kc, vr], |p| p[0] + p[1] * p[2])?;
        let read = repeat_heads(cx, state, hq / hk)?;
        let o = cx.contract("bhd,bhdm->bhm", qt, read)?;
        let o = cx.map(&[o], |p| p[0] * scale)?;
        outs.push(cx.unsqueeze(o, &[2])?);
    }
    if outs.is_empty() {
        return Err(Error::unsupported("LinearAttention over no steps"));
    }
    let y = cx.concat(&outs, 2)?;
    let y = packed(cx, y)?;
    let (y, state) = (cx.cast(y, dtype)?, cx.cast(state, state_type)?);
    Ok(vec![Val::T(y), Val::T(state)])
}
