//! Recurrent layers, unrolled over a static number of steps.

use super::super::cx::Cx;
use super::super::node::{N, Val};
use super::super::scalar::Scalar;
use tilewright_base::{DType, Error, Result};
use tilewright_graph::ValueId;
use tilewright_layout::Dim;

/// Longer sequences are not unrolled.
const STEP_LIMIT: i64 = 512;

/// Which cell.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cell {
    Rnn,
    Gru,
    Lstm,
}

impl Cell {
    fn gates(self) -> i64 {
        match self {
            Cell::Rnn => 1,
            Cell::Gru => 3,
            Cell::Lstm => 4,
        }
    }

    fn activations(self) -> &'static [&'static str] {
        match self {
            Cell::Rnn => &["Tanh"],
            Cell::Gru => &["Sigmoid", "Tanh"],
            Cell::Lstm => &["Sigmoid", "Tanh", "Tanh"],
        }
    }
}

/// An activation with its two parameters.
#[derive(Clone)]
struct Act(String, Option<f64>, Option<f64>);

impl Act {
    fn apply<'a>(&self, x: Scalar<'a>) -> Scalar<'a> {
        let a = |default: f64| self.1.unwrap_or(default);
        let b = |default: f64| self.2.unwrap_or(default);
        match self.0.as_str() {
            "sigmoid" => x.sigmoid(),
            "relu" => x.max(0.0),
            "affine" => x * a(1.0) + b(0.0),
            "leakyrelu" => x.lt(0.0).select(x * a(0.01), x),
            "thresholdedrelu" => x.gt(a(1.0)).select(x, 0.0),
            "scaledtanh" => (x * b(1.0)).tanh() * a(1.0),
            "hardsigmoid" => (x * a(0.2) + b(0.5)).clamp(0.0, 1.0),
            "elu" => x.lt(0.0).select(x.expm1() * a(1.0), x),
            "softsign" => x / (x.abs() + 1.0),
            "softplus" => x.max(0.0) + (-x.abs()).exp().log1p(),
            _ => x.tanh(),
        }
    }
}

const KNOWN: [&str; 11] = [
    "sigmoid",
    "tanh",
    "relu",
    "affine",
    "leakyrelu",
    "thresholdedrelu",
    "scaledtanh",
    "hardsigmoid",
    "elu",
    "softsign",
    "softplus",
];

/// Weights and states of one direction.
struct Direction {
    w: ValueId,
    r: ValueId,
    /// Input and recurrent bias, `[gates * hidden]` each.
    bias: Option<(ValueId, ValueId)>,
    peephole: Option<ValueId>,
    h: ValueId,
    c: ValueId,
    acts: Vec<Act>,
    reverse: bool,
}

pub(crate) fn recurrent(cx: &mut Cx, n: &N<'_>, cell: Cell) -> Result<Vec<Val>> {
    let (mut x, w, r) = (n.x(0)?, n.x(1)?, n.x(2)?);
    cx.same_dtype(&[x, w, r])?;
    cx.float(x)?;
    let batch_first = n.flag("layout", false)?;
    if cx.rank(x) != 3 || cx.rank(w) != 3 || cx.rank(r) != 3 {
        return Err(Error::user("a recurrent layer takes tensors of three axes"));
    }
    if batch_first {
        x = cx.permute(x, &[1, 0, 2])?;
    }
    let dims = cx.shape(x);
    let steps = cx.static_dim(&dims[0], "a recurrent layer over time")?;
    if !(1..=STEP_LIMIT).contains(&steps) {
        return Err(Error::unsupported(format!("a recurrent layer over {steps} steps")));
    }
    let (batch, hidden) = (dims[1].clone(), cx.shape(r)[2].clone());
    let count = match n.str("direction", "forward")?.as_str() {
        "forward" | "reverse" => 1,
        "bidirectional" => 2,
        other => return Err(Error::user(format!("direction `{other}`"))),
    };
    let reversed = n.str("direction", "forward")? == "reverse";
    let dtype = cx.dtype(x);
    let names = n.strs("activations")?.unwrap_or_default();
    let (alphas, betas) = (
        n.floats("activation_alpha")?.unwrap_or_default(),
        n.floats("activation_beta")?.unwrap_or_default(),
    );
    let clip = n.float_opt("clip")?;
    let each = cell.activations().len();
    let peepholes = if cell == Cell::Lstm { n.opt(7)? } else { None };
    let lens = match n.opt(4)? {
        Some(v) => Some(cx.cast(v, DType::I64)?),
        None => None,
    };
    let mut ys = Vec::new();
    let (mut hs, mut cs) = (Vec::new(), Vec::new());
    for d in 0..count {
        let mut acts = Vec::new();
        for i in 0..each {
            let at = d as usize * each + i;
            let name = names.get(at).map_or(cell.activations()[i], String::as_str).to_lowercase();
            if !KNOWN.contains(&name.as_str()) {
                return Err(Error::unsupported(format!("activation `{name}`")));
            }
            acts.push(Act(name, alphas.get(at).copied(), betas.get(at).copied()));
        }
        let gates = cell.gates();
        let bias = match n.opt(3)? {
            Some(b) => {
                let b = cx.pick(b, 0, d)?;
                let len = &hidden * gates;
                let first = cx.slice(b, 0, Dim::new(0), len.clone())?;
                Some((first, cx.slice(b, 0, len.clone(), len)?))
            }
            None => None,
        };
        let initial = |cx: &mut Cx, i: usize| -> Result<ValueId> {
            match n.opt(i)? {
                // Batch first: [B, D, H], otherwise [D, B, H].
                Some(v) => cx.pick(v, usize::from(batch_first), d),
                None => cx.full(dtype, 0.0, &[batch.clone(), hidden.clone()]),
            }
        };
        let h = initial(cx, 5)?;
        let c = if cell == Cell::Lstm { initial(cx, 6)? } else { h };
        let direction = Direction {
            w: cx.pick(w, 0, d)?,
            r: cx.pick(r, 0, d)?,
            bias,
            peephole: match peepholes {
                Some(p) => Some(cx.pick(p, 0, d)?),
                None => None,
            },
            h,
            c,
            acts,
            reverse: reversed || d == 1,
        };
        let (y, h, c) = run(cx, n, cell, x, steps, lens, clip, &hidden, direction)?;
        ys.push(cx.unsqueeze(y, &[1])?);
        hs.push(cx.unsqueeze(h, &[0])?);
        cs.push(cx.unsqueeze(c, &[0])?);
    }
    let mut y = cx.concat(&ys, 1)?;
    let mut h = cx.concat(&hs, 0)?;
    let mut c = cx.concat(&cs, 0)?;
    if batch_first {
        y = cx.permute(y, &[2, 0, 1, 3])?;
        h = cx.permute(h, &[1, 0, 2])?;
        c = cx.permute(c, &[1, 0, 2])?;
    }
    Ok(vec![Val::T(y), Val::T(h), Val::T(c)])
}

#[allow(clippy::too_many_arguments, reason = "one call site; a struct would only rename them")]
fn run(
    cx: &mut Cx,
    n: &N<'_>,
    cell: Cell,
    x: ValueId,
    steps: i64,
    lens: Option<ValueId>,
    clip: Option<f64>,
    hidden: &Dim,
    d: Direction,
) -> Result<(ValueId, ValueId, ValueId)> {
    // All input products at once: [T, B, I] x [G*H, I] -> [T, B, G*H].
    let mut xs = cx.contract("tbi,gi->tbg", x, d.w)?;
    let reset_after = cell == Cell::Gru && n.flag("linear_before_reset", false)?;
    if let Some((wb, rb)) = d.bias {
        // With `linear_before_reset` the recurrent bias of the candidate belongs inside the reset.
        let b = if reset_after { wb } else { cx.add(wb, rb)? };
        xs = cx.add(xs, b)?;
    }
    let gate = |cx: &mut Cx, v: ValueId, i: i64| -> Result<ValueId> {
        let axis = cx
            .rank(v)
            .checked_sub(1)
            .ok_or_else(|| Error::user("a scalar where gates are needed"))?;
        cx.slice(v, axis, hidden * i, hidden.clone())
    };
    let (mut h, mut c) = (d.h, d.c);
    let mut ys: Vec<ValueId> = Vec::new();
    let order: Vec<i64> = if d.reverse { (0..steps).rev().collect() } else { (0..steps).collect() };
    for t in order {
        let xt = cx.pick(xs, 0, t)?;
        let (old_h, old_c) = (h, c);
        let acts = &d.acts;
        macro_rules! clipped {
            ($x:expr) => {
                match clip {
                    Some(l) => $x.clamp(-l, l),
                    None => $x,
                }
            };
        }
        match cell {
            Cell::Rnn => {
                let hr = cx.contract("bh,gh->bg", h, d.r)?;
                h = cx.fmap(&[xt, hr], |p| acts[0].apply(clipped!(p[0] + p[1])))?;
            }
            Cell::Gru => {
                let r_zr = cx.slice(d.r, 0, Dim::new(0), hidden * 2)?;
                let r_h = cx.slice(d.r, 0, hidden * 2, hidden.clone())?;
                let mut hr = cx.contract("bh,gh->bg", h, r_zr)?;
                if let (true, Some((_, rb))) = (reset_after, d.bias) {
                    let rb = cx.slice(rb, 0, Dim::new(0), hidden * 2)?;
                    hr = cx.add(hr, rb)?;
                }
                let (xz, xr, xh) = (gate(cx, xt, 0)?, gate(cx, xt, 1)?, gate(cx, xt, 2)?);
                let (hz, hrr) = (gate(cx, hr, 0)?, gate(cx, hr, 1)?);
                let z = cx.fmap(&[xz, hz], |p| acts[0].apply(clipped!(p[0] + p[1])))?;
                let r = cx.fmap(&[xr, hrr], |p| acts[0].apply(clipped!(p[0] + p[1])))?;
                let candidate = if reset_after {
                    let mut inner = cx.contract("bh,gh->bg", h, r_h)?;
                    if let Some((_, rb)) = d.bias {
                        let rb = cx.slice(rb, 0, hidden * 2, hidden.clone())?;
                        inner = cx.add(inner, rb)?;
                    }
                    cx.mul(r, inner)?
                } else {
                    let rh = cx.mul(r, h)?;
                    cx.contract("bh,gh->bg", rh, r_h)?
                };
                h = cx.fmap(&[xh, candidate, z, h], |p| {
                    let new = acts[1].apply(clipped!(p[0] + p[1]));
                    (p[2].number(1.0) - p[2]) * new + p[2] * p[3]
                })?;
            }
            Cell::Lstm => {
                // Gates in the order input, output, forget, cell.
                let hr = cx.contract("bh,gh->bg", h, d.r)?;
                let g = cx.add(xt, hr)?;
                let (gi, go) = (gate(cx, g, 0)?, gate(cx, g, 1)?);
                let (gf, gc) = (gate(cx, g, 2)?, gate(cx, g, 3)?);
                let peep = |cx: &mut Cx, v: ValueId, c: ValueId, i: i64| match d.peephole {
                    Some(p) => {
                        let p = gate(cx, p, i)?;
                        cx.fmap(&[v, c, p], |p| p[0] + p[1] * p[2])
                    }
                    None => Ok(v),
                };
                let gi = peep(cx, gi, c, 0)?;
                let gf = peep(cx, gf, c, 2)?;
                let coupled = n.flag("input_forget", false)?;
                c = cx.fmap(&[gi, gf, gc, c], |p| {
                    let i = acts[0].apply(clipped!(p[0]));
                    let f = match coupled {
                        true => i.number(1.0) - i,
                        false => acts[0].apply(clipped!(p[1])),
                    };
                    f * p[3] + i * acts[1].apply(clipped!(p[2]))
                })?;
                let go = peep(cx, go, c, 1)?;
                h = cx.fmap(&[go, c], |p| acts[0].apply(clipped!(p[0])) * acts[2].apply(p[1]))?;
            }
        }
        let mut shown = h;
        if let Some(lens) = lens {
            // Beyond its length a sample keeps its state and shows zero.
            let lens = cx.unsqueeze(lens, &[1])?;
            let live = cx.map(&[lens], |p| p[0].gt(p[0].integer(t)))?;
            h = cx.map(&[live, h, old_h], |p| p[0].select(p[1], p[2]))?;
            c = cx.map(&[live, c, old_c], |p| p[0].select(p[1], p[2]))?;
            shown = cx.map(&[live, shown], |p| p[0].select(p[1], 0.0))?;
        }
        ys.push(cx.unsqueeze(shown, &[0])?);
    }
    if d.reverse {
        ys.reverse();
    }
    Ok((cx.concat(&ys, 0)?, h, c))
}
