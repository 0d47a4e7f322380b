//! Convolution, its transpose, and pooling.

use super::super::cx::Cx;
use super::super::node::{N, Val, one};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::Value as Number;
use tilewright_graph::{ConvAttrs, Op, PadMode, ReduceKind, ValueId, WindowAttrs, WindowKind};
use tilewright_layout::Dim;

/// Strides, dilations and pads of a sliding window, from the attributes.
pub(crate) struct Geometry {
    pub(crate) kernel: Vec<i64>,
    pub(crate) strides: Vec<i64>,
    pub(crate) dilations: Vec<i64>,
    pub(crate) lo: Vec<i64>,
    pub(crate) hi: Vec<i64>,
    /// Additional room behind so that ceil mode's last window fits; never counted as padding.
    pub(crate) ceil: Vec<i64>,
}

const LIMIT: i64 = 1 << 31;

/// Attributes of a window over data with these spatial extents.
pub(crate) fn geometry(n: &N<'_>, extents: &[Dim], kernel: Vec<i64>) -> Result<Geometry> {
    let rank = extents.len();
    let list = |name: &str, default: i64, len: usize| -> Result<Vec<i64>> {
        let list = n.ints(name)?.unwrap_or_else(|| vec![default; len]);
        if list.len() != len || list.iter().any(|v| v.abs() > LIMIT) {
            return Err(Error::user(format!("{name} {list:?} for {rank} spatial axes")));
        }
        Ok(list)
    };
    let strides = list("strides", 1, rank)?;
    let dilations = list("dilations", 1, rank)?;
    let pads = list("pads", 0, 2 * rank)?;
    if kernel.len() != rank || strides.iter().chain(&dilations).any(|&v| v < 1) {
        return Err(Error::user(format!(
            "kernel {kernel:?}, strides {strides:?}, dilations {dilations:?}"
        )));
    }
    if kernel.iter().any(|&k| !(1..=LIMIT).contains(&k)) {
        return Err(Error::user(format!("kernel {kernel:?}")));
    }
    let (mut lo, mut hi) = (pads[..rank].to_vec(), pads[rank..].to_vec());
    match n.str("auto_pad", "NOTSET")?.as_str() {
        "NOTSET" | "" => {}
        "VALID" => {
            lo.fill(0);
            hi.fill(0);
        }
        mode @ ("SAME_UPPER" | "SAME_LOWER") => {
            for i in 0..rank {
                let reach = (kernel[i] - 1) * dilations[i] + 1;
                let total = match extents[i].as_const() {
                    Some(e) => {
                        let out = (e + strides[i] - 1) / strides[i];
                        ((out - 1) * strides[i] + reach - e).max(0)
                    }
                    // With stride 1 the amount does not depend on the extent.
                    None if strides[i] == 1 => reach - 1,
                    None => {
                        return Err(Error::unsupported(format!(
                            "auto_pad {mode} with stride {} over symbolic extent {}",
                            strides[i], extents[i]
                        )));
                    }
                };
                lo[i] = if mode == "SAME_UPPER" { total / 2 } else { total - total / 2 };
                hi[i] = total - lo[i];
            }
        }
        other => return Err(Error::user(format!("auto_pad `{other}`"))),
    }
    let mut ceil = vec![0; rank];
    if n.flag("ceil_mode", false)? {
        for i in 0..rank {
            let reach = (kernel[i] - 1) * dilations[i] + 1;
            ceil[i] = match extents[i].as_const() {
                Some(e) => {
                    let room = e + lo[i] + hi[i] - reach;
                    let mut out = (room + strides[i] - 1).div_euclid(strides[i]) + 1;
                    // The last window must start inside the data or the padding in front.
                    if (out - 1) * strides[i] >= e + lo[i] {
                        out -= 1;
                    }
                    ((out - 1) * strides[i] - room).max(0)
                }
                None if hi[i] == 0 && strides[i] <= reach => strides[i] - 1,
                None => {
                    return Err(Error::unsupported(format!(
                        "ceil_mode over symbolic extent {}",
                        extents[i]
                    )));
                }
            };
        }
    }
    Ok(Geometry { kernel, strides, dilations, lo, hi, ceil })
}

/// Zeros (or crops, where negative) around the spatial axes.
fn pad_spatial(cx: &mut Cx, x: ValueId, lo: &[i64], hi: &[i64]) -> Result<ValueId> {
    if lo.iter().chain(hi).all(|&p| p == 0) {
        return Ok(x);
    }
    let zero = if cx.dtype(x).is_float() { Number::Float(0.0) } else { Number::Int(0) };
    let widen =
        |list: &[i64]| -> Vec<Dim> { [0, 0].iter().chain(list).map(|&p| Dim::new(p)).collect() };
    cx.op(Op::Pad { lo: widen(lo), hi: widen(hi), mode: PadMode::Constant(zero) }, &[x])
}

/// The convolution of a node's geometry, without bias.
pub(crate) fn convolve(cx: &mut Cx, n: &N<'_>, x: ValueId, w: ValueId) -> Result<ValueId> {
    let (dims, weights) = (cx.shape(x), cx.shape(w));
    if dims.len() < 3 || weights.len() != dims.len() {
        return Err(Error::user(format!("convolution of {} with {}", cx.ty(x), cx.ty(w))));
    }
    let mut kernel = Vec::new();
    for d in &weights[2..] {
        kernel.push(cx.static_dim(d, "convolution weights")?);
    }
    if let Some(declared) = n.ints("kernel_shape")?
        && declared != kernel
    {
        return Err(Error::user(format!("kernel_shape {declared:?} for weights {}", cx.ty(w))));
    }
    let g = geometry(n, &dims[2..], kernel)?;
    let groups = n.int("group", 1)?;
    cx.same_dtype(&[x, w])?;
    let (mut x, mut lo, mut hi) = (x, g.lo, g.hi);
    if lo.iter().chain(&hi).any(|&p| p < 0) {
        x = pad_spatial(cx, x, &lo, &hi)?;
        lo.fill(0);
        hi.fill(0);
    }
    let attrs =
        ConvAttrs { strides: g.strides, pads_lo: lo, pads_hi: hi, dilations: g.dilations, groups };
    cx.op(Op::Conv(attrs), &[x, w])
}

fn with_bias(cx: &mut Cx, v: ValueId, bias: Option<ValueId>) -> Result<ValueId> {
    let Some(bias) = bias else { return Ok(v) };
    let bias = cx.along(bias, 1, cx.rank(v))?;
    cx.add(v, bias)
}

pub(crate) fn conv(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let v = convolve(cx, n, n.x(0)?, n.x(1)?)?;
    one(with_bias(cx, v, n.opt(2)?)?)
}

pub(crate) fn causal_conv(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, w) = (n.x(0)?, n.x(1)?);
    let (dims, weights) = (cx.shape(x), cx.shape(w));
    let ([batch, channels, _], [_, _, k]) = (dims.as_slice(), weights.as_slice()) else {
        return Err(Error::user("CausalConvWithState takes tensors of three axes"));
    };
    let groups = cx.static_dim(channels, "CausalConvWithState")?;
    let keep = k - 1;
    let past = match n.opt(3)? {
        Some(v) => v,
        None => cx.full(cx.dtype(x), 0.0, &[batch.clone(), channels.clone(), keep.clone()])?,
    };
    let padded = if keep.is(0) { x } else { cx.concat(&[past, x], 2)? };
    let attrs = ConvAttrs {
        strides: vec![1],
        pads_lo: vec![0],
        pads_hi: vec![0],
        dilations: vec![1],
        groups,
    };
    cx.same_dtype(&[padded, w])?;
    let v = cx.op(Op::Conv(attrs), &[padded, w])?;
    let mut v = with_bias(cx, v, n.opt(2)?)?;
    if matches!(n.str("activation", "none")?.as_str(), "silu" | "swish") {
        v = cx.fmap(&[v], |p| p[0] * p[0].sigmoid())?;
    }
    let total = cx.shape(padded)[2].clone();
    let state = cx.slice(padded, 2, &total - &keep, keep)?;
    Ok(vec![Val::T(v), Val::T(state)])
}

pub(crate) fn conv_transpose(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, w) = (n.x(0)?, n.x(1)?);
    let (dims, weights) = (cx.shape(x), cx.shape(w));
    if dims.len() < 3 || weights.len() != dims.len() {
        return Err(Error::user(format!("ConvTranspose of {} with {}", cx.ty(x), cx.ty(w))));
    }
    cx.same_dtype(&[x, w])?;
    let rank = dims.len() - 2;
    let list = |name: &str, default: i64, len: usize| -> Result<Vec<i64>> {
        let list = n.ints(name)?.unwrap_or_else(|| vec![default; len]);
        if list.len() != len || list.iter().any(|v| v.abs() > LIMIT) {
            return Err(Error::user(format!("{name} {list:?} for {rank} spatial axes")));
        }
        Ok(list)
    };
    let mut kernel = Vec::new();
    for d in &weights[2..] {
        kernel.push(cx.static_dim(d, "ConvTranspose weights")?);
    }
    let strides = list("strides", 1, rank)?;
    let dilations = list("dilations", 1, rank)?;
    let pads = list("pads", 0, 2 * rank)?;
    let extra = list("output_padding", 0, rank)?;
    if strides.iter().chain(&dilations).any(|&v| v < 1) {
        return Err(Error::user(format!("strides {strides:?}, dilations {dilations:?}")));
    }
    let groups = n.int("group", 1)?;
    let (mut lo, mut hi) = (pads[..rank].to_vec(), pads[rank..].to_vec());
    let auto = n.str("auto_pad", "NOTSET")?;
    let wanted = n.ints("output_shape")?;
    if wanted.is_some() || auto.starts_with("SAME") {
        for i in 0..rank {
            let reach = (kernel[i] - 1) * dilations[i] + 1;
            let extent = cx.static_dim(&dims[i + 2], "ConvTranspose to a given shape")?;
            let size = match &wanted {
                Some(list) => list
                    .get((list.len() + i).wrapping_sub(rank))
                    .copied()
                    .ok_or_else(|| Error::user("output_shape has too few entries"))?,
                None => extent * strides[i],
            };
            let total = strides[i] * (extent - 1) + extra[i] + reach - size;
            let half = total.div_euclid(2);
            (lo[i], hi[i]) =
                if auto == "SAME_UPPER" { (half, total - half) } else { (total - half, half) };
            if total < 0 {
                (lo[i], hi[i]) = (0, total);
            }
        }
    } else if auto == "VALID" {
        lo.fill(0);
        hi.fill(0);
    }
    // Stride as zeros between the elements: [H] -> [H, 1] -> [H, s] -> [H*s], minus the last zeros.
    let mut v = x;
    if strides.iter().any(|&s| s > 1) {
        let (mut thin, mut out) = (dims[..2].to_vec(), dims[..2].to_vec());
        let mut grow = vec![Dim::new(0); 2];
        let mut crop = Vec::new();
        for (d, &s) in dims[2..].iter().zip(&strides) {
            thin.extend([d.clone(), Dim::new(1)]);
            grow.extend([Dim::new(0), Dim::new(s - 1)]);
            out.push(d * s);
            crop.push(1 - s);
        }
        let zero = if cx.dtype(x).is_float() { Number::Float(0.0) } else { Number::Int(0) };
        v = cx.reshape(v, &thin)?;
        let none = vec![Dim::new(0); thin.len()];
        v = cx.op(Op::Pad { lo: none, hi: grow, mode: PadMode::Constant(zero) }, &[v])?;
        v = cx.reshape(v, &out)?;
        v = pad_spatial(cx, v, &vec![0; rank], &crop)?;
    }
    // Weights [C, M/g, k...] -> [M, C/g, k...], flipped.
    let mut f = w;
    for (i, &taps) in kernel.iter().enumerate() {
        if taps > 1 {
            f = cx.reverse(f, i + 2)?;
        }
    }
    let per_group = weights[0].floor_div(&Dim::new(groups.max(1)));
    let mut split = vec![Dim::new(groups), per_group.clone()];
    split.extend_from_slice(&weights[1..]);
    let f = cx.reshape(f, &split)?;
    let mut perm: Vec<usize> = (0..split.len()).collect();
    perm.swap(1, 2);
    let f = cx.permute(f, &perm)?;
    let mut merged = vec![&weights[1] * groups, per_group];
    merged.extend_from_slice(&weights[2..]);
    let f = cx.reshape(f, &merged)?;
    let reach: Vec<i64> = (0..rank).map(|i| dilations[i] * (kernel[i] - 1)).collect();
    let lo: Vec<i64> = (0..rank).map(|i| reach[i] - lo[i]).collect();
    let hi: Vec<i64> = (0..rank).map(|i| reach[i] - hi[i] + extra[i]).collect();
    let v = pad_spatial(cx, v, &lo, &hi)?;
    let attrs = ConvAttrs {
        strides: vec![1; rank],
        pads_lo: vec![0; rank],
        pads_hi: vec![0; rank],
        dilations,
        groups,
    };
    let v = cx.op(Op::Conv(attrs), &[v, f])?;
    one(with_bias(cx, v, n.opt(2)?)?)
}

fn window(
    cx: &mut Cx,
    x: ValueId,
    kind: WindowKind,
    g: &Geometry,
    lo: &[i64],
    hi: &[i64],
) -> Result<ValueId> {
    let attrs = WindowAttrs {
        kind,
        kernel: g.kernel.clone(),
        strides: g.strides.clone(),
        pads_lo: lo.to_vec(),
        pads_hi: hi.iter().zip(&g.ceil).map(|(h, c)| h + c).collect(),
        dilations: g.dilations.clone(),
    };
    cx.op(Op::Window(attrs), &[x])
}

fn pool_geometry(cx: &Cx, n: &N<'_>, x: ValueId) -> Result<Geometry> {
    let dims = cx.shape(x);
    let kernel = n.ints("kernel_shape")?.unwrap_or_default();
    if dims.len() < 3 || kernel.is_empty() {
        return Err(Error::user(format!("pooling with kernel {kernel:?} over {}", cx.ty(x))));
    }
    geometry(n, &dims[2..], kernel)
}

pub(crate) fn max_pool(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let g = pool_geometry(cx, n, x)?;
    let y = window(cx, x, WindowKind::Max, &g, &g.lo, &g.hi)?;
    if !n.wants(1) {
        return one(y);
    }
    let index = max_positions(cx, n, x, y, &g)?;
    Ok(vec![Val::T(y), Val::T(index)])
}

/// Where in the data each maximum of a pooling lies: the smallest flat position whose element
/// equals the maximum, found by comparing tap by tap.
fn max_positions(cx: &mut Cx, n: &N<'_>, x: ValueId, y: ValueId, g: &Geometry) -> Result<ValueId> {
    let dims = cx.static_shape(x, "MaxPool with indices")?;
    let out = cx.static_shape(y, "MaxPool with indices")?;
    let rank = g.kernel.len();
    let columns = n.int("storage_order", 0)? == 1;
    let taps: i64 = g.kernel.iter().product();
    if taps > 4096 {
        return Err(Error::unsupported("MaxPool with indices over a large window"));
    }
    let plane: i64 = dims[2..].iter().map(|&d| d as i64).product();
    let mut best: Option<ValueId> = None;
    let far = i64::MAX;
    for tap in (0..taps).rev() {
        // Coordinates of this tap over the output positions, outside positions masked.
        let mut rest = tap;
        let mut at = vec![0i64; rank];
        for i in (0..rank).rev() {
            at[i] = rest % g.kernel[i];
            rest /= g.kernel[i];
        }
        let count: usize = out[2..].iter().product();
        let mut coordinates = Vec::with_capacity(count);
        for flat in 0..count {
            let mut rest = flat;
            let mut point = vec![0i64; rank];
            for i in (0..rank).rev() {
                let o = (rest % out[i + 2]) as i64;
                rest /= out[i + 2];
                point[i] = o * g.strides[i] + at[i] * g.dilations[i] - g.lo[i];
            }
            let inside = point.iter().zip(&dims[2..]).all(|(&p, &d)| (0..d as i64).contains(&p));
            let row = point.iter().zip(&dims[2..]).fold(0, |acc, (&p, &d)| acc * d as i64 + p);
            coordinates.push(if inside { (row, point) } else { (-1, point) });
        }
        let gathered: Vec<i64> = coordinates.iter().map(|c| c.0.max(0)).collect();
        let stored: Vec<i64> = coordinates
            .iter()
            .map(|(row, point)| {
                if *row < 0 || !columns {
                    return *row;
                }
                point.iter().zip(&dims[2..]).rev().fold(0, |acc, (&p, &d)| acc * d as i64 + p)
            })
            .collect();
        let flat = cx.reshape(x, &[Dim::from(dims[0]), Dim::from(dims[1]), Dim::new(plane)])?;
        let positions = cx.int_vec(&gathered)?;
        let values = cx.op(Op::Gather(2), &[flat, positions])?;
        let shape: Vec<Dim> = out.iter().map(|&d| Dim::from(d)).collect();
        let values = cx.reshape(values, &shape)?;
        let stored = cx.int_vec(&stored)?;
        let mut thin = vec![Dim::new(1), Dim::new(1)];
        thin.extend_from_slice(&shape[2..]);
        let stored = cx.reshape(stored, &thin)?;
        let previous = match best {
            Some(v) => v,
            None => cx.constant(tilewright_data::Tensor::from_i64s(DType::I64, &[], &[far])?),
        };
        best = Some(cx.map(&[values, y, stored, previous], |p| {
            p[0].eq(p[1]).and(p[2].ge(0.0)).select(p[2], p[3])
        })?);
    }
    let Some(best) = best else { return Err(Error::user("MaxPool over an empty window")) };
    // Each (sample, channel) plane starts at its own offset.
    let planes = cx.iota(DType::I64, 1, 0, &Dim::from(dims[0] * dims[1]))?;
    let mut lead = vec![Dim::from(dims[0]), Dim::from(dims[1])];
    lead.resize(dims.len(), Dim::new(1));
    let planes = cx.reshape(planes, &lead)?;
    cx.map(&[best, planes], |p| p[0] + p[1] * p[1].integer(plane))
}

pub(crate) fn average_pool(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let g = pool_geometry(cx, n, x)?;
    if !n.flag("count_include_pad", false)? {
        return one(window(cx, x, WindowKind::Mean, &g, &g.lo, &g.hi)?);
    }
    if g.ceil.iter().all(|&c| c == 0) {
        return one(window(cx, x, WindowKind::MeanWithPad, &g, &g.lo, &g.hi)?);
    }
    // Declared padding counts, the room that ceil mode adds does not: pad first.
    let padded = pad_spatial(cx, x, &g.lo, &g.hi)?;
    let none = vec![0; g.lo.len()];
    one(window(cx, padded, WindowKind::Mean, &g, &none, &none)?)
}

pub(crate) fn lp_pool(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let p_norm = n.int("p", 2)? as f64;
    let g = pool_geometry(cx, n, x)?;
    let v = cx.fmap(&[x], |p| p[0].abs().pow(p_norm))?;
    let v = window(cx, v, WindowKind::Sum, &g, &g.lo, &g.hi)?;
    one(cx.fmap(&[v], |p| p[0].pow(1.0 / p_norm))?)
}

/// Pooling over everything: a reduction over the spatial axes.
pub(crate) fn global_pool(cx: &mut Cx, n: &N<'_>, kind: ReduceKind) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let spatial: Vec<usize> = (2..cx.rank(x)).collect();
    match kind {
        ReduceKind::Max => one(cx.reduce(ReduceKind::Max, x, &spatial, true)?),
        _ => {
            let dtype = cx.dtype(x);
            let wide = cx.cast(x, dtype.compute())?;
            let v = cx.mean(wide, &spatial, true)?;
            one(cx.cast(v, dtype)?)
        }
    }
}

pub(crate) fn global_lp_pool(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let spatial: Vec<usize> = (2..cx.rank(x)).collect();
    let p_norm = n.int("p", 2)? as f64;
    let v = cx.fmap(&[x], |p| p[0].abs().pow(p_norm))?;
    let v = cx.reduce(ReduceKind::Sum, v, &spatial, true)?;
    one(cx.fmap(&[v], |p| p[0].pow(1.0 / p_norm))?)
}

/// Columns back to an image, overlapping ones summed.
pub(crate) fn col2im(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let image = cx.const_ints(n.x(1)?, "image_shape")?;
    let block = cx.const_ints(n.x(2)?, "block_shape")?;
    let rank = image.len();
    let extents: Vec<Dim> = image.iter().map(|&d| Dim::new(d)).collect();
    let g = geometry(n, &extents, block.clone())?;
    let dims = cx.shape(x);
    let [batch, columns, places] = dims.as_slice() else {
        return Err(Error::user("Col2Im takes a tensor of three axes"));
    };
    let taps: i64 = block.iter().product();
    let channels = columns.floor_div(&Dim::new(taps));
    let counts: Vec<i64> = (0..rank)
        .map(|i| {
            let reach = (block[i] - 1) * g.dilations[i] + 1;
            (image[i] + g.lo[i] + g.hi[i] - reach).div_euclid(g.strides[i]) + 1
        })
        .collect();
    let total: i64 = counts.iter().product();
    if places.as_const() != Some(total) || total * taps > 1 << 24 {
        return Err(Error::user(format!("Col2Im of {} to {image:?}", cx.ty(x))));
    }
    // Flat image position of each (tap, place); what falls into the padding goes to a spare slot.
    let plane: i64 = image.iter().product();
    let mut to = Vec::with_capacity((total * taps) as usize);
    for tap in 0..taps {
        for place in 0..total {
            let (mut t, mut p, mut at, mut stride, mut inside) = (tap, place, 0, 1, true);
            for i in (0..rank).rev() {
                let y = (p % counts[i]) * g.strides[i] + (t % block[i]) * g.dilations[i] - g.lo[i];
                p /= counts[i];
                t /= block[i];
                inside &= (0..image[i]).contains(&y);
                at += y * stride;
                stride *= image[i];
            }
            to.push(if inside { at } else { plane });
        }
    }
    let flat = [batch.clone(), channels.clone(), Dim::new(total * taps)];
    let v = cx.reshape(x, &flat)?;
    let index = cx.int_vec(&to)?;
    let index = cx.along(index, 2, 3)?;
    let index = cx.expand(index, &flat)?;
    let zeros =
        cx.full(cx.dtype(x), 0.0, &[batch.clone(), channels.clone(), Dim::new(plane + 1)])?;
    let add = Op::ScatterElements { axis: 2, kind: tilewright_graph::ScatterKind::Add };
    let v = cx.op(add, &[zeros, index, v])?;
    let v = cx.slice(v, 2, Dim::new(0), Dim::new(plane))?;
    let mut out = vec![batch.clone(), channels];
    out.extend(extents);
    one(cx.reshape(v, &out)?)
}
