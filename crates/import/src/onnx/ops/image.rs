//! Resampling: Resize, GridSample, AffineGrid, RoiAlign.

use super::super::cx::Cx;
use super::super::node::{N, Val, axes, one};
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_graph::{Op, ReduceKind, ValueId};
use tilewright_layout::Dim;

/// How one axis is resampled: for each output position, which inputs with which weights, and
/// whether the position lies outside (`tf_crop_and_resize`).
struct Taps {
    rows: Vec<Vec<(usize, f64)>>,
    outside: Vec<bool>,
}

/// The attributes that decide the taps.
struct Resample {
    mode: String,
    nearest: String,
    coordinates: String,
    cubic_a: f64,
    antialias: bool,
    exclude_outside: bool,
}

impl Resample {
    fn weights(&self, ratio: f64, scale: f64) -> Result<Vec<f64>> {
        let a = self.cubic_a;
        let shrink = scale.min(1.0);
        let normal = |v: Vec<f64>| {
            let sum: f64 = v.iter().sum();
            v.into_iter().map(|w| w / sum).collect()
        };
        let cubic = |x: f64| {
            let x = x.abs();
            if x <= 1.0 {
                ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
            } else if x < 2.0 {
                ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
            } else {
                0.0
            }
        };
        Ok(match self.mode.as_str() {
            "nearest" => {
                let right = match self.nearest.as_str() {
                    _ if ratio == 1.0 => true,
                    "round_prefer_floor" => ratio > 0.5,
                    "round_prefer_ceil" => ratio >= 0.5,
                    "floor" => false,
                    "ceil" => true,
                    other => return Err(Error::user(format!("nearest_mode `{other}`"))),
                };
                vec![f64::from(u8::from(!right)), f64::from(u8::from(right))]
            }
            "linear" if self.antialias => {
                let start = (-1.0 / shrink).floor() as i64 + 1;
                let count = 2 - 2 * start;
                let tap =
                    |i: i64| (1.0 - ((start + i) as f64 - ratio).abs() * shrink).clamp(0.0, 1.0);
                normal((0..count).map(tap).collect())
            }
            "linear" => vec![1.0 - ratio, ratio],
            "cubic" if self.antialias => {
                let start = (-2.0 / shrink).floor() as i64 + 1;
                normal((start..2 - start).map(|i| cubic(shrink * (i as f64 - ratio))).collect())
            }
            "cubic" => {
                vec![cubic(ratio + 1.0), cubic(ratio), cubic(1.0 - ratio), cubic(2.0 - ratio)]
            }
            other => return Err(Error::user(format!("Resize mode `{other}`"))),
        })
    }

    fn taps(
        &self,
        input: usize,
        output: usize,
        scale: f64,
        roi: Option<(f64, f64)>,
    ) -> Result<Taps> {
        let (n, exact) = (input as f64, scale * input as f64);
        let mut taps = Taps { rows: Vec::new(), outside: Vec::new() };
        for i in 0..output {
            let x = i as f64;
            let mut outside = false;
            let at = match self.coordinates.as_str() {
                "align_corners" if exact == 1.0 => 0.0,
                "align_corners" => x * (n - 1.0) / (exact - 1.0),
                "asymmetric" => x / scale,
                "half_pixel" => (x + 0.5) / scale - 0.5,
                "pytorch_half_pixel" if exact == 1.0 => -0.5,
                "pytorch_half_pixel" => (x + 0.5) / scale - 0.5,
                "half_pixel_symmetric" => {
                    n / 2.0 * (1.0 - output as f64 / exact) + (x + 0.5) / scale - 0.5
                }
                "tf_crop_and_resize" => {
                    let Some((lo, hi)) = roi else {
                        return Err(Error::user("tf_crop_and_resize without roi"));
                    };
                    let at = match exact == 1.0 {
                        true => (hi - lo) * (n - 1.0) / 2.0,
                        false => x * (hi - lo) * (n - 1.0) / (exact - 1.0),
                    } + lo * (n - 1.0);
                    outside = at < 0.0 || at > n - 1.0;
                    at
                }
                other => {
                    return Err(Error::user(format!("coordinate_transformation_mode `{other}`")));
                }
            };
            // The position lies in (left, left + 1]: an exact hit is the right neighbour.
            let left = at.ceil() - 1.0;
            let mut weights = self.weights(at - left, scale)?;
            let first = left as i64 + 1 - weights.len() as i64 / 2;
            let inside = |j: usize| (0..input as i64).contains(&(first + j as i64));
            if self.exclude_outside {
                for (j, w) in weights.iter_mut().enumerate() {
                    if !inside(j) {
                        *w = 0.0;
                    }
                }
                let sum: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= sum);
            }
            let row = weights
                .iter()
                .enumerate()
                .map(|(j, &w)| ((first + j as i64).clamp(0, input as i64 - 1) as usize, w));
            taps.rows.push(row.collect());
            taps.outside.push(outside);
        }
        Ok(taps)
    }
}

/// Applies taps along one axis.
fn apply(cx: &mut Cx, v: ValueId, axis: usize, taps: &Taps, nearest: bool) -> Result<ValueId> {
    let rank = cx.rank(v);
    let widest = taps.rows.iter().map(Vec::len).max().unwrap_or(0);
    if nearest {
        let pick =
            |row: &Vec<(usize, f64)>| row.iter().find(|t| t.1 == 1.0).map_or(0, |t| t.0 as i64);
        let index: Vec<i64> = taps.rows.iter().map(pick).collect();
        let index = cx.int_vec(&index)?;
        return cx.op(Op::Gather(axis), &[v, index]);
    }
    let dtype = cx.dtype(v);
    if widest <= 4 {
        // A few gathers, weighted.
        let mut sum: Option<ValueId> = None;
        for j in 0..widest {
            let index: Vec<i64> =
                taps.rows.iter().map(|r| r.get(j).map_or(0, |t| t.0 as i64)).collect();
            let weights: Vec<f64> =
                taps.rows.iter().map(|r| r.get(j).map_or(0.0, |t| t.1)).collect();
            let index = cx.int_vec(&index)?;
            let w = cx.constant(Tensor::from_f64s(dtype, &[weights.len()], &weights)?);
            let w = cx.along(w, axis, rank)?;
            let part = cx.op(Op::Gather(axis), &[v, index])?;
            sum = Some(match sum {
                None => cx.mul(part, w)?,
                Some(s) => cx.map(&[s, part, w], |p| p[0] + p[1] * p[2])?,
            });
        }
        return sum.ok_or_else(|| Error::bug("resampling without taps"));
    }
    let input = cx.shape(v)[axis].as_const().unwrap_or(0) as usize;
    let mut matrix = vec![0.0; taps.rows.len() * input];
    for (o, row) in taps.rows.iter().enumerate() {
        for &(i, w) in row {
            matrix[o * input + i] += w;
        }
    }
    let m = cx.constant(Tensor::from_f64s(dtype, &[taps.rows.len(), input], &matrix)?);
    let letters: String =
        (0..rank).map(|i| if i == axis { 'i' } else { char::from(b'A' + i as u8) }).collect();
    let out = letters.replace('i', "o");
    cx.contract(&format!("{letters},oi->{out}"), v, m)
}

pub(crate) fn resize(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let dims = cx.shape(x);
    let rank = dims.len();
    // Operator set 10 has (X, scales).
    let (roi_at, scales_at, sizes_at) = if n.opset < 11 { (9, 1, 9) } else { (1, 2, 3) };
    let on = match n.ints("axes")? {
        Some(list) => axes(&list, rank)?,
        None => (0..rank).collect(),
    };
    let some = |cx: &mut Cx, i: usize| -> Result<Option<ValueId>> {
        Ok(n.opt(i)?.filter(|&v| !cx.shape(v).first().is_some_and(|d| d.is(0))))
    };
    let how = Resample {
        mode: n.str("mode", "nearest")?,
        nearest: n
            .str("nearest_mode", if n.opset < 11 { "floor" } else { "round_prefer_floor" })?,
        coordinates: n.str(
            "coordinate_transformation_mode",
            if n.opset < 11 { "asymmetric" } else { "half_pixel" },
        )?,
        cubic_a: n.float("cubic_coeff_a", -0.75)?,
        antialias: n.flag("antialias", false)?,
        exclude_outside: n.flag("exclude_outside", false)?,
    };
    let (scales, sizes) = (some(cx, scales_at)?, some(cx, sizes_at)?);
    let scales: Option<Vec<f64>> = match (scales, n.floats("scales")?) {
        (Some(v), _) => Some(cx.tensor(v, "scales")?.to_f64s()),
        (None, given) => given,
    };
    let sizes: Option<Vec<Dim>> = match (sizes, &scales) {
        (Some(v), None) => Some(cx.ints(v, "sizes")?),
        _ => None,
    };
    if scales.as_ref().map_or(sizes.as_ref().map_or(0, Vec::len), Vec::len) != on.len() {
        return Err(Error::user("scales or sizes do not fit the number of axes"));
    }
    let roi = match some(cx, roi_at)? {
        Some(v) if how.coordinates == "tf_crop_and_resize" => Some(cx.tensor(v, "roi")?.to_f64s()),
        _ => None,
    };
    let policy = n.str("keep_aspect_ratio_policy", "stretch")?;
    let mut plan: Vec<(usize, Dim, f64)> = Vec::new();
    if let Some(scales) = &scales {
        for (&a, &s) in on.iter().zip(scales) {
            if s.is_nan() || s <= 0.0 || s > 1e9 {
                return Err(Error::user(format!("a scale of {s}")));
            }
            let size = match dims[a].as_const() {
                Some(d) => Dim::new((d as f64 * s).floor() as i64),
                None if s.fract() == 0.0 => &dims[a] * (s as i64),
                None => {
                    return Err(Error::unsupported(format!("scaling {} by {s}", dims[a])));
                }
            };
            plan.push((a, size, s));
        }
    } else if let Some(sizes) = &sizes {
        let mut common = None;
        if policy != "stretch" {
            let mut ratios = Vec::new();
            for (&a, size) in on.iter().zip(sizes) {
                let d = cx.static_dim(&dims[a], "Resize with an aspect ratio")?;
                ratios.push(cx.static_dim(size, "Resize with an aspect ratio")? as f64 / d as f64);
            }
            let pick = if policy == "not_larger" { f64::min } else { f64::max };
            common = ratios.into_iter().reduce(pick);
        }
        for (&a, size) in on.iter().zip(sizes) {
            match common {
                Some(s) => {
                    let d = cx.static_dim(&dims[a], "Resize")?;
                    // Half away from zero.
                    plan.push((a, Dim::new((s * d as f64 + 0.5).floor() as i64), s));
                }
                None if *size == dims[a] => plan.push((a, size.clone(), 1.0)),
                None => {
                    let d = cx.static_dim(&dims[a], "Resize")?;
                    let to = cx.static_dim(size, "Resize to a symbolic size")?;
                    plan.push((a, size.clone(), to as f64 / d as f64));
                }
            }
        }
    } else {
        return Err(Error::user("Resize needs scales or sizes"));
    }
    let dtype = cx.dtype(x);
    let nearest = how.mode == "nearest";
    let compute = if nearest {
        dtype
    } else if dtype.is_float() {
        dtype.compute()
    } else {
        DType::F32
    };
    let fill = n.float("extrapolation_value", 0.0)?;
    let mut v = cx.cast(x, compute)?;
    for (i, (axis, size, scale)) in plan.into_iter().enumerate() {
        if size == dims[axis] && scale == 1.0 && roi.is_none() {
            continue;
        }
        let Some(input) = dims[axis].as_const() else {
            v = repeat(cx, v, axis, scale as i64, &how)?;
            continue;
        };
        let to = cx.static_dim(&size, "Resize")?;
        if input < 1 || !(0..1 << 31).contains(&to) {
            return Err(Error::user(format!("resizing {input} to {to}")));
        }
        let range = match &roi {
            Some(r) => match (r.get(i), r.get(i + on.len())) {
                (Some(&lo), Some(&hi)) => Some((lo, hi)),
                _ => return Err(Error::user("roi has too few values")),
            },
            None => None,
        };
        let taps = how.taps(input as usize, to as usize, scale, range)?;
        v = apply(cx, v, axis, &taps, nearest)?;
        if taps.outside.iter().any(|&o| o) {
            let flags: Vec<i64> = taps.outside.iter().map(|&o| o.into()).collect();
            let flags = cx.constant(Tensor::from_i64s(DType::Bool, &[flags.len()], &flags)?);
            let flags = cx.along(flags, axis, rank)?;
            v = cx.map(&[flags, v], |p| p[0].select(p[1].number(fill), p[1]))?;
        }
    }
    if dtype.is_int() && !nearest {
        let (lo, hi) = match dtype.is_signed_int() {
            true => {
                (-(2f64.powi(dtype.bits() as i32 - 1)), 2f64.powi(dtype.bits() as i32 - 1) - 1.0)
            }
            false => (0.0, 2f64.powi(dtype.bits() as i32) - 1.0),
        };
        v = cx.map(&[v], |p| p[0].round().clamp(lo, hi))?;
    }
    one(cx.cast(v, dtype)?)
}

/// Whole multiples of a symbolic extent: each element repeated.
fn repeat(cx: &mut Cx, v: ValueId, axis: usize, times: i64, how: &Resample) -> Result<ValueId> {
    let plain = how.mode == "nearest"
        && match how.coordinates.as_str() {
            "asymmetric" => how.nearest == "floor",
            "half_pixel" | "pytorch_half_pixel" => how.nearest.starts_with("round"),
            _ => false,
        };
    if !plain {
        return Err(Error::unsupported("this kind of Resize over a symbolic extent"));
    }
    let mut out = cx.shape(v);
    let wide = cx.unsqueeze(v, &[axis + 1])?;
    let mut shape = cx.shape(wide);
    shape[axis + 1] = Dim::new(times);
    let wide = cx.expand(wide, &shape)?;
    out[axis] = &out[axis] * times;
    cx.reshape(wide, &out)
}

pub(crate) fn affine_grid(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let theta = n.x(0)?;
    let size = cx.const_ints(n.x(1)?, "size")?;
    let align = n.flag("align_corners", false)?;
    let spatial = size.get(2..).unwrap_or_default().to_vec();
    let total: i64 = spatial.iter().product();
    if !(2..=3).contains(&spatial.len()) || !(0..1 << 26).contains(&total) {
        return Err(Error::user(format!("AffineGrid of size {size:?}")));
    }
    // Homogeneous coordinates, innermost axis first.
    let columns = spatial.len() + 1;
    let mut points = Vec::with_capacity(total as usize * columns);
    for flat in 0..total {
        let mut rest = flat;
        for &d in spatial.iter().rev() {
            let i = (rest % d) as f64;
            rest /= d;
            let d = d as f64;
            points.push(if align {
                -1.0 + i * 2.0 / (d - 1.0)
            } else {
                -1.0 + (2.0 * i + 1.0) / d
            });
        }
        points.push(1.0);
    }
    let points = Tensor::from_f64s(cx.dtype(theta), &[total as usize, columns], &points)?;
    let points = cx.constant(points);
    let grid = cx.contract("nrc,pc->npr", theta, points)?;
    let mut out = vec![cx.shape(theta)[0].clone()];
    out.extend(spatial.iter().map(|&d| Dim::new(d)));
    out.push(Dim::from(spatial.len()));
    one(cx.reshape(grid, &out)?)
}

/// Reflects a coordinate at both borders until it lies between them.
fn reflect(cx: &mut Cx, v: ValueId, lo: f64, hi: f64) -> Result<ValueId> {
    let range = hi - lo;
    if range <= 0.0 {
        return cx.map(&[v], |p| p[0] * 0.0);
    }
    cx.map(&[v], |p| {
        // A triangle wave of period 2 * range.
        let t = (p[0] - lo).modulo(2.0 * range);
        t.gt(range).select(t.number(2.0 * range) - t, t) + lo
    })
}

pub(crate) fn grid_sample(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let (x, grid) = (n.x(0)?, n.x(1)?);
    let dtype = cx.dtype(x);
    cx.float(x)?;
    let dims = cx.shape(x);
    let rank = dims.len().saturating_sub(2);
    if !(1..=3).contains(&rank) || cx.rank(grid) != rank + 2 {
        return Err(Error::user(format!("GridSample of {} by {}", cx.ty(x), cx.ty(grid))));
    }
    let mode = n.str("mode", "linear")?;
    let padding = n.str("padding_mode", "zeros")?;
    let align = n.flag("align_corners", false)?;
    let mut extents = Vec::new();
    for d in &dims[2..] {
        extents.push(cx.static_dim(d, "GridSample")? as f64);
    }
    let grid = cx.cast(grid, DType::F32)?;
    // Data with channels last, so that one gather fetches all channels of a point.
    let mut perm = vec![0];
    perm.extend(2..rank + 2);
    perm.push(1);
    let data = cx.permute(x, &perm)?;
    let taps: i64 = match mode.as_str() {
        "nearest" => 1,
        "linear" | "bilinear" => 2,
        "cubic" | "bicubic" => 4,
        other => return Err(Error::user(format!("GridSample mode `{other}`"))),
    };
    // Per axis: the integer position of each tap, whether it is inside, and its weight.
    let mut per_axis: Vec<Vec<(ValueId, Option<ValueId>, ValueId)>> = Vec::new();
    for (i, &d) in extents.iter().enumerate() {
        // Coordinates come innermost axis first.
        let last = cx.rank(grid) - 1;
        let g = cx.pick(grid, last, (rank - 1 - i) as i64)?;
        let (lo, hi) = if align { (0.0, d - 1.0) } else { (-0.5, d - 0.5) };
        let mut at = cx.map(&[g], |p| match align {
            true => (p[0] + 1.0) * (0.5 * (d - 1.0)),
            false => ((p[0] + 1.0) * d - 1.0) * 0.5,
        })?;
        if taps == 1 {
            at = cx.map(&[at], |p| p[0].round())?;
        }
        let inside = |cx: &mut Cx, v: ValueId, fixed: ValueId| {
            cx.map(&[v, fixed], |p| p[0].lt(lo).or(p[0].gt(hi)).select(p[1], p[0]))
        };
        match padding.as_str() {
            "border" => {
                let fixed = cx.map(&[at], |p| p[0].clamp(0.0, d - 1.0))?;
                at = inside(cx, at, fixed)?;
            }
            "reflection" => {
                let fixed = reflect(cx, at, lo, hi)?;
                at = inside(cx, at, fixed)?;
            }
            "zeros" => {}
            other => return Err(Error::user(format!("padding_mode `{other}`"))),
        }
        let base = cx.map(&[at], |p| p[0].floor())?;
        let mut list = Vec::new();
        for tap in 0..taps {
            let offset = tap as f64 - f64::from(u8::from(taps == 4));
            let weight = match taps {
                1 => cx.map(&[at], |p| p[0] * 0.0 + 1.0)?,
                2 => cx.map(&[at, base], |p| {
                    let f = p[0] - p[1];
                    if tap == 0 { f.number(1.0) - f } else { f }
                })?,
                _ => cx.map(&[at, base], |p| {
                    let a = -0.75;
                    let t = (p[0] - p[1] - offset).abs();
                    let near = ((t * (a + 2.0)) - (a + 3.0)) * t * t + 1.0;
                    let far = ((t * a - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a;
                    if tap == 1 || tap == 2 { near } else { far }
                })?,
            };
            let point = cx.map(&[base], |p| p[0] + offset)?;
            let mask = match padding.as_str() {
                "zeros" => Some(cx.map(&[point], |p| p[0].ge(0.0).and(p[0].le(d - 1.0)))?),
                _ => None,
            };
            let point = match padding.as_str() {
                "reflection" => {
                    let fixed = reflect(cx, point, lo, hi)?;
                    let fixed = inside(cx, point, fixed)?;
                    cx.map(&[fixed], |p| p[0].trunc())?
                }
                _ => point,
            };
            let point =
                cx.map_as(&[point], DType::F32, DType::I64, |p| p[0].clamp(0.0, d - 1.0))?;
            list.push((point, mask, weight));
        }
        per_axis.push(list);
    }
    let compute = dtype.compute();
    let mut sum: Option<ValueId> = None;
    let combinations = taps.pow(rank as u32);
    for c in 0..combinations {
        let mut rest = c;
        let mut coordinates = Vec::new();
        let mut weight: Option<ValueId> = None;
        for list in &per_axis {
            let (point, mask, w) = list[(rest % taps) as usize];
            rest /= taps;
            let last = cx.rank(point);
            coordinates.push(cx.unsqueeze(point, &[last])?);
            let w = match mask {
                Some(m) => cx.map(&[m, w], |p| p[0].select(p[1], 0.0))?,
                None => w,
            };
            weight = Some(match weight {
                None => w,
                Some(v) => cx.mul(v, w)?,
            });
        }
        let Some(weight) = weight else { return Err(Error::bug("GridSample without axes")) };
        let last = cx.rank(coordinates[0]) - 1;
        let index = cx.concat(&coordinates, last)?;
        let values = cx.op(Op::GatherNd { batch: 1 }, &[data, index])?;
        let values = cx.cast(values, compute)?;
        let at = cx.rank(weight);
        let weight = cx.unsqueeze(weight, &[at])?;
        let weight = cx.cast(weight, compute)?;
        sum = Some(match sum {
            None => cx.mul(values, weight)?,
            Some(s) => cx.map(&[s, values, weight], |p| p[0] + p[1] * p[2])?,
        });
    }
    let Some(sum) = sum else { return Err(Error::bug("GridSample without taps")) };
    let mut perm = vec![0, rank + 1];
    perm.extend(1..=rank);
    let v = cx.permute(sum, &perm)?;
    one(cx.cast(v, dtype)?)
}

/// Regions known at import become gathers with constant positions and weights.
pub(crate) fn roi_align(cx: &mut Cx, n: &N<'_>) -> Result<Vec<Val>> {
    let x = n.x(0)?;
    let rois = cx.tensor(n.x(1)?, "the regions of RoiAlign")?;
    let batches = cx.const_ints(n.x(2)?, "the batch indices of RoiAlign")?;
    let dims = cx.shape(x);
    if dims.len() != 4 || rois.len() != batches.len() * 4 {
        return Err(Error::user(format!(
            "RoiAlign of {} with {:?} regions",
            cx.ty(x),
            rois.shape()
        )));
    }
    let (height, width) =
        (cx.static_dim(&dims[2], "RoiAlign")?, cx.static_dim(&dims[3], "RoiAlign")?);
    let (ph, pw) = (n.int("output_height", 1)?, n.int("output_width", 1)?);
    let ratio = n.int("sampling_ratio", 0)?;
    let scale = n.float("spatial_scale", 1.0)?;
    let half =
        n.opset >= 16 && n.str("coordinate_transformation_mode", "half_pixel")? == "half_pixel";
    let most = n.str("mode", "avg")? == "max";
    let offset = if half { 0.5 } else { 0.0 };
    if !(1..4096).contains(&ph) || !(1..4096).contains(&pw) || !(0..256).contains(&ratio) {
        return Err(Error::user(format!("RoiAlign to {ph}x{pw}, {ratio} samples")));
    }
    // Per region and bin: lists of (position, weight) fours.
    let mut bins: Vec<Vec<[(i64, f64); 4]>> = Vec::new();
    for (r, &batch) in batches.iter().enumerate() {
        let edge = |i: usize| rois.get_f64(r * 4 + i) * scale - offset;
        let (x0, y0, x1, y1) = (edge(0), edge(1), edge(2), edge(3));
        let (mut w, mut h) = (x1 - x0, y1 - y0);
        if !half {
            (w, h) = (w.max(1.0), h.max(1.0));
        }
        let samples = |extent: f64, bins: i64| match ratio {
            0 => (extent / bins as f64).ceil() as i64,
            r => r,
        };
        let (sy, sx) = (samples(h, ph), samples(w, pw));
        if sx.max(sy) > 4096 {
            return Err(Error::user("a region of RoiAlign is too large"));
        }
        for by in 0..ph {
            for bx in 0..pw {
                let mut list = Vec::new();
                for iy in 0..sy {
                    for ix in 0..sx {
                        let at = |start: f64, b: i64, extent: f64, bins: i64, i: i64, s: i64| {
                            let bin = extent / bins as f64;
                            start + b as f64 * bin + (i as f64 + 0.5) * bin / s as f64
                        };
                        let y = at(y0, by, h, ph, iy, sy);
                        let x = at(x0, bx, w, pw, ix, sx);
                        list.push(corners(y, x, height, width, batch * height * width));
                    }
                }
                bins.push(list);
            }
        }
    }
    let each = bins.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let (mut index, mut weights) = (Vec::new(), Vec::new());
    for list in &bins {
        let count = list.len().max(1) as f64;
        for s in 0..each {
            // The maximum may see a sample twice, the mean must not.
            let four = match (list.get(s), list.first()) {
                (Some(f), _) => *f,
                (None, Some(f)) if most => *f,
                _ => [(0, 0.0); 4],
            };
            for (at, w) in four {
                index.push(at);
                weights.push(if most { w } else { w / count });
            }
        }
    }
    // [N, C, H, W] -> [N*H*W, C]
    let v = cx.permute(x, &[0, 2, 3, 1])?;
    let v = cx.reshape(v, &[&dims[0] * (height * width), dims[1].clone()])?;
    let shape = [bins.len(), each * 4];
    let index = cx.constant(Tensor::from_i64s(DType::I64, &shape, &index)?);
    let dtype = cx.dtype(x);
    let weights = cx.constant(Tensor::from_f64s(dtype, &[shape[0], shape[1], 1], &weights)?);
    let v = cx.op(Op::Gather(0), &[v, index])?;
    let v = cx.mul(v, weights)?;
    let kind = if most { ReduceKind::Max } else { ReduceKind::Sum };
    let v = cx.reduce(kind, v, &[1], false)?;
    let out = [Dim::from(batches.len()), Dim::new(ph), Dim::new(pw), dims[1].clone()];
    let v = cx.reshape(v, &out)?;
    one(cx.permute(v, &[0, 3, 1, 2])?)
}

/// The four neighbours of a point with bilinear weights; nothing outside.
fn corners(mut y: f64, mut x: f64, height: i64, width: i64, base: i64) -> [(i64, f64); 4] {
    if !(y >= -1.0 && y <= height as f64 && x >= -1.0 && x <= width as f64) {
        return [(0, 0.0); 4];
    }
    (y, x) = (y.max(0.0), x.max(0.0));
    let split = |v: f64, extent: i64| {
        let low = (v as i64).min(extent - 1);
        if low >= extent - 1 { (low, low, 0.0) } else { (low, low + 1, v - low as f64) }
    };
    let ((y0, y1, fy), (x0, x1, fx)) = (split(y, height), split(x, width));
    [
        (base + y0 * width + x0, (1.0 - fy) * (1.0 - fx)),
        (base + y0 * width + x1, (1.0 - fy) * fx),
        (base + y1 * width + x0, fy * (1.0 - fx)),
        (base + y1 * width + x1, fy * fx),
    ]
}
