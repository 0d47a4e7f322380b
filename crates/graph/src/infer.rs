//! Type rules: the result types of an operator from the types of its operands.
//!
//! One function per group, all reached from [`infer`]. The message of an error is written for the
//! person whose model it is; callers add which node it was.

use crate::ir::TensorType;
use crate::op::{ConvAttrs, Op, ReduceKind, WindowAttrs};
use tilewright_base::{DType, Error, Result};
use tilewright_expr::{Func, Node};
use tilewright_layout::{Dim, broadcast_shapes, numel};

fn list(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(", "))
}

fn axis_ok(axis: usize, ty: &TensorType) -> Result<()> {
    if axis < ty.rank() {
        return Ok(());
    }
    Err(Error::user(format!("axis {axis} is outside shape {}", list(&ty.shape))))
}

fn same_dtype(a: &TensorType, b: &TensorType) -> Result<()> {
    if a.dtype == b.dtype {
        return Ok(());
    }
    Err(Error::user(format!("operands have different types {} and {}", a.dtype, b.dtype)))
}

/// Two sizes that can never be equal: different numbers.
fn conflict(a: &Dim, b: &Dim) -> bool {
    matches!((a.as_const(), b.as_const()), (Some(x), Some(y)) if x != y)
}

/// The result types of `op` on operands of these types.
pub fn infer(op: &Op, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let (least, most) = operand_count(op);
    if inputs.len() < least || inputs.len() > most {
        return Err(Error::user(format!(
            "{} operands where {least} to {most} are taken",
            inputs.len()
        )));
    }
    let one = |ty: TensorType| Ok(vec![ty]);
    match op {
        Op::Map(func) => {
            if func.params().len() != inputs.len() {
                return Err(Error::user(format!(
                    "{} operands for a function of {} parameters",
                    inputs.len(),
                    func.params().len()
                )));
            }
            operations_exist(func)?;
            let mut shape: Vec<Dim> = Vec::new();
            for (ty, param) in inputs.iter().zip(func.params()) {
                if ty.dtype != param.dtype {
                    return Err(Error::user(format!(
                        "operand `{}` is {}, the function takes {}",
                        param.name, ty.dtype, param.dtype
                    )));
                }
                shape = broadcast_shapes(&shape, &ty.shape).ok_or_else(|| {
                    Error::user(format!(
                        "shapes {} and {} do not broadcast",
                        list(&shape),
                        list(&ty.shape)
                    ))
                })?;
            }
            one(TensorType::new(func.dtype(), shape))
        }
        Op::Reshape(shape) => {
            let (from, to) = (numel(&inputs[0].shape), numel(shape));
            if conflict(&from, &to) {
                return Err(Error::user(format!(
                    "cannot reshape {} ({from} elements) to {} ({to} elements)",
                    list(&inputs[0].shape),
                    list(shape)
                )));
            }
            one(TensorType::new(inputs[0].dtype, shape.clone()))
        }
        Op::Permute(perm) => {
            let mut seen = vec![false; perm.len()];
            let valid = perm.len() == inputs[0].rank()
                && perm.iter().all(|&p| p < perm.len() && !std::mem::replace(&mut seen[p], true));
            if !valid {
                return Err(Error::user(format!(
                    "{perm:?} is not a permutation of the axes of {}",
                    list(&inputs[0].shape)
                )));
            }
            let shape: Vec<Dim> = perm.iter().map(|&p| inputs[0].shape[p].clone()).collect();
            one(TensorType::new(inputs[0].dtype, shape))
        }
        Op::Expand(shape) => match broadcast_shapes(&inputs[0].shape, shape) {
            Some(result) if &result == shape => one(TensorType::new(inputs[0].dtype, result)),
            _ => Err(Error::user(format!(
                "cannot broadcast {} to {}",
                list(&inputs[0].shape),
                list(shape)
            ))),
        },
        Op::Slice { starts, lens, steps } => {
            let rank = inputs[0].rank();
            if starts.len() != rank || lens.len() != rank || steps.len() != rank {
                return Err(Error::user(format!(
                    "slice of {} needs {rank} entries",
                    list(&inputs[0].shape)
                )));
            }
            for axis in 0..rank {
                let extent = &inputs[0].shape[axis];
                let numbers = (starts[axis].as_const(), lens[axis].as_const(), extent.as_const());
                if let (Some(start), Some(len), Some(extent)) = numbers {
                    let last =
                        start.saturating_add(steps[axis].saturating_mul(len.saturating_sub(1)));
                    let inside = |i: i64| (0..extent).contains(&i);
                    if steps[axis] == 0 || len < 0 || (len > 0 && !(inside(start) && inside(last)))
                    {
                        return Err(Error::user(format!(
                            "slice start {start}, length {len}, step {} leaves axis {axis} of {}",
                            steps[axis],
                            list(&inputs[0].shape)
                        )));
                    }
                }
            }
            one(TensorType::new(inputs[0].dtype, lens.clone()))
        }
        Op::Pad { lo, hi, .. } => {
            if lo.len() != inputs[0].rank() || hi.len() != inputs[0].rank() {
                return Err(Error::user("padding needs one amount per axis and side"));
            }
            let shape: Vec<Dim> =
                inputs[0].shape.iter().zip(lo).zip(hi).map(|((d, l), h)| d + l + h).collect();
            if shape.iter().any(|d| d.as_const().is_some_and(|v| v < 0)) {
                return Err(Error::user(format!(
                    "padding crops {} below nothing",
                    list(&inputs[0].shape)
                )));
            }
            one(TensorType::new(inputs[0].dtype, shape))
        }
        Op::Concat(axis) => concat(*axis, inputs),
        Op::Iota { ty, axis } => {
            axis_ok(*axis, ty)?;
            one(ty.clone())
        }
        Op::Dims(dims) => one(TensorType::new(DType::I64, vec![Dim::from(dims.len())])),
        Op::Reduce { axes, keep, .. } => {
            if axes.windows(2).any(|w| w[0] >= w[1]) {
                return Err(Error::user(format!("reduction axes {axes:?} are not ascending")));
            }
            axes.iter().try_for_each(|&a| axis_ok(a, &inputs[0]))?;
            one(TensorType::new(inputs[0].dtype, reduced(&inputs[0].shape, axes, *keep)))
        }
        Op::ArgReduce { kind, axis, keep, .. } => {
            axis_ok(*axis, &inputs[0])?;
            if !matches!(kind, ReduceKind::Max | ReduceKind::Min) {
                return Err(Error::user("an index reduction is max or min"));
            }
            one(TensorType::new(DType::I64, reduced(&inputs[0].shape, &[*axis], *keep)))
        }
        Op::Scan { axis, .. } => {
            axis_ok(*axis, &inputs[0])?;
            one(inputs[0].clone())
        }
        Op::Contract { lhs, rhs, out, dtype, .. } => contract(lhs, rhs, out, *dtype, inputs),
        Op::GroupProduct { group } => group_product(*group, inputs),
        Op::Conv(attrs) => conv(attrs, inputs),
        Op::Window(attrs) => window(attrs, inputs),
        Op::Attention(attrs) => attention(attrs, inputs),
        Op::Gather(axis) => {
            axis_ok(*axis, &inputs[0])?;
            index_type(&inputs[1])?;
            let mut shape = inputs[0].shape[..*axis].to_vec();
            shape.extend_from_slice(&inputs[1].shape);
            shape.extend_from_slice(&inputs[0].shape[axis + 1..]);
            one(TensorType::new(inputs[0].dtype, shape))
        }
        Op::GatherElements(axis) => {
            axis_ok(*axis, &inputs[0])?;
            index_type(&inputs[1])?;
            if inputs[0].rank() != inputs[1].rank() {
                return Err(Error::user("data and indices have different ranks"));
            }
            one(TensorType::new(inputs[0].dtype, inputs[1].shape.clone()))
        }
        Op::GatherNd { batch } => {
            index_type(&inputs[1])?;
            let (data, idx) = (&inputs[0], &inputs[1]);
            let depth =
                idx.shape.last().and_then(Dim::as_const).and_then(|d| usize::try_from(d).ok());
            let Some(depth) = depth.filter(|d| batch + d <= data.rank() && *batch < idx.rank())
            else {
                return Err(Error::user(format!(
                    "coordinates {} do not fit data {}",
                    list(&idx.shape),
                    list(&data.shape)
                )));
            };
            let mut shape = idx.shape[..idx.rank() - 1].to_vec();
            shape.extend_from_slice(&data.shape[batch + depth..]);
            one(TensorType::new(data.dtype, shape))
        }
        Op::ScatterElements { axis, .. } => {
            axis_ok(*axis, &inputs[0])?;
            index_type(&inputs[1])?;
            same_dtype(&inputs[0], &inputs[2])?;
            one(inputs[0].clone())
        }
        Op::ScatterNd { .. } => {
            index_type(&inputs[1])?;
            same_dtype(&inputs[0], &inputs[2])?;
            one(inputs[0].clone())
        }
        Op::TopK { axis, k, .. } => {
            axis_ok(*axis, &inputs[0])?;
            if let (Some(k), Some(extent)) = (k.as_const(), inputs[0].shape[*axis].as_const())
                && (k > extent || k < 0)
            {
                return Err(Error::user(format!("top {k} of {extent} elements")));
            }
            let mut shape = inputs[0].shape.clone();
            shape[*axis] = k.clone();
            Ok(vec![
                TensorType::new(inputs[0].dtype, shape.clone()),
                TensorType::new(DType::I64, shape),
            ])
        }
        Op::Random { ty, .. } => one(ty.clone()),
        Op::Softmax { axis, .. } => {
            axis_ok(*axis, &inputs[0])?;
            float(&inputs[0])?;
            one(inputs[0].clone())
        }
        Op::LayerNorm { axis, .. } | Op::RmsNorm { axis, .. } => {
            axis_ok(*axis, &inputs[0])?;
            float(&inputs[0])?;
            for ty in &inputs[1..] {
                same_dtype(&inputs[0], ty)?;
                if broadcast_shapes(&inputs[0].shape, &ty.shape).as_ref() != Some(&inputs[0].shape)
                {
                    return Err(Error::user(format!(
                        "scale or bias {} does not broadcast to {}",
                        list(&ty.shape),
                        list(&inputs[0].shape)
                    )));
                }
            }
            one(inputs[0].clone())
        }
        Op::BatchNorm { .. } | Op::GroupNorm { .. } => {
            if inputs[0].rank() < 2 {
                return Err(Error::user("normalisation needs a batch and a channel axis"));
            }
            float(&inputs[0])?;
            for ty in &inputs[1..] {
                if ty.rank() != 1 || ty.shape[0] != inputs[0].shape[1] {
                    return Err(Error::user(format!(
                        "per-channel operand {} for data {}",
                        list(&ty.shape),
                        list(&inputs[0].shape)
                    )));
                }
            }
            one(inputs[0].clone())
        }
        Op::Host(host) => Ok(host.types.clone()),
    }
}

/// Each operation of a function must exist on its operands' types (no square root of an integer).
fn operations_exist(func: &Func) -> Result<()> {
    for (_, node, _) in func.nodes() {
        if let Node::Op(op, args) = node
            && let Some(operand) = args.last().map(|a| func.dtype_of(*a))
            && !op.accepts(operand.class())
        {
            return Err(Error::user(format!("{op:?} does not exist for {operand}")));
        }
    }
    Ok(())
}

fn operand_count(op: &Op) -> (usize, usize) {
    match op {
        Op::Map(_) | Op::Host(_) => (0, usize::MAX),
        Op::Concat(_) => (1, usize::MAX),
        Op::Attention(_) => (3, usize::MAX),
        Op::Iota { .. } | Op::Dims(_) | Op::Random { .. } => (0, 0),
        Op::Contract { .. } | Op::Conv(_) | Op::RmsNorm { .. } => (2, 2),
        Op::Gather(_) | Op::GatherElements(_) | Op::GatherNd { .. } => (2, 2),
        Op::ScatterElements { .. } | Op::ScatterNd { .. } | Op::GroupNorm { .. } => (3, 3),
        Op::LayerNorm { .. } => (2, 3),
        Op::GroupProduct { .. } => (3, 5),
        Op::BatchNorm { .. } => (5, 5),
        Op::Reshape(_)
        | Op::Permute(_)
        | Op::Expand(_)
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Reduce { .. }
        | Op::ArgReduce { .. }
        | Op::Scan { .. }
        | Op::Window(_)
        | Op::TopK { .. }
        | Op::Softmax { .. } => (1, 1),
    }
}

fn group_product(group: i64, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let (x, codes, scales) = (&inputs[0], &inputs[1], &inputs[2]);
    // Activations that are codes themselves come with their scales.
    let coded = x.dtype == DType::I8;
    if !coded {
        float(x)?;
    } else if inputs.len() < 4 {
        return Err(Error::user("x of 8-bit integers without its scales"));
    }
    if !codes.dtype.is_int() || codes.dtype.bits() > 8 {
        let message = format!("codes are integers of 4 or 8 bits, not {}", codes.dtype);
        return Err(Error::user(message));
    }
    if group < 1 {
        return Err(Error::user(format!("groups of {group}")));
    }
    let (Some(depth), [n, k]) = (x.shape.last(), codes.shape.as_slice()) else {
        let (x, codes) = (list(&x.shape), list(&codes.shape));
        return Err(Error::user(format!(
            "x {x} and codes {codes}, which should be [..., K], [N, K]"
        )));
    };
    if depth != k {
        let (x, codes) = (list(&x.shape), list(&codes.shape));
        return Err(Error::user(format!("x {x} and codes {codes} differ in depth")));
    }
    let groups = k.ceil_div(&Dim::new(group));
    let zeros = inputs.get(if coded { 4 } else { 3 });
    for (name, ty) in [("scales", scales)].into_iter().chain(zeros.map(|t| ("zeros", t))) {
        float(ty)?;
        if ty.shape != [n.clone(), groups.clone()] {
            let (is, want) = (list(&ty.shape), list(&[n.clone(), groups.clone()]));
            return Err(Error::user(format!("{name} are {is}, and should be {want}")));
        }
    }
    let mut shape = x.shape.clone();
    shape.pop();
    let mut dtype = x.dtype;
    if let Some(own) = inputs.get(3).filter(|_| coded) {
        float(own)?;
        shape.push(groups.clone());
        if own.shape != shape {
            let (is, want) = (list(&own.shape), list(&shape));
            return Err(Error::user(format!("scales of x are {is}, and should be {want}")));
        }
        shape.pop();
        dtype = own.dtype;
    } else if inputs.len() > 4 {
        return Err(Error::user("five operands for an x that is no integer"));
    }
    shape.push(n.clone());
    Ok(vec![TensorType::new(dtype, shape)])
}

fn float(ty: &TensorType) -> Result<()> {
    if ty.dtype.is_float() {
        return Ok(());
    }
    Err(Error::user(format!("needs a floating-point operand, not {}", ty.dtype)))
}

fn index_type(ty: &TensorType) -> Result<()> {
    if ty.dtype.is_int() {
        return Ok(());
    }
    Err(Error::user(format!("indices must be integers, not {}", ty.dtype)))
}

fn reduced(shape: &[Dim], axes: &[usize], keep: bool) -> Vec<Dim> {
    let mut out = Vec::with_capacity(shape.len());
    for (i, d) in shape.iter().enumerate() {
        if !axes.contains(&i) {
            out.push(d.clone());
        } else if keep {
            out.push(Dim::new(1));
        }
    }
    out
}

fn concat(axis: usize, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let mut ty = inputs[0].clone();
    axis_ok(axis, &ty)?;
    for other in &inputs[1..] {
        same_dtype(&ty, other)?;
        let fits = other.rank() == ty.rank()
            && (0..ty.rank()).all(|i| i == axis || !conflict(&ty.shape[i], &other.shape[i]));
        if !fits {
            return Err(Error::user(format!(
                "cannot join {} and {} along axis {axis}",
                list(&inputs[0].shape),
                list(&other.shape)
            )));
        }
        ty.shape[axis] = &ty.shape[axis] + &other.shape[axis];
    }
    Ok(vec![ty])
}

fn contract(
    lhs: &str,
    rhs: &str,
    out: &str,
    dtype: DType,
    inputs: &[TensorType],
) -> Result<Vec<TensorType>> {
    let mut sizes: Vec<(char, Dim)> = Vec::new();
    for (letters, ty) in [(lhs, &inputs[0]), (rhs, &inputs[1])] {
        if letters.chars().count() != ty.rank() {
            return Err(Error::user(format!("`{letters}` names the axes of {}", list(&ty.shape))));
        }
        for (i, letter) in letters.chars().enumerate() {
            if letters.chars().take(i).any(|l| l == letter) {
                return Err(Error::user(format!("letter `{letter}` occurs twice in `{letters}`")));
            }
            let size = &ty.shape[i];
            match sizes.iter_mut().find(|(l, _)| *l == letter) {
                None => sizes.push((letter, size.clone())),
                Some((_, known)) if known.is(1) => *known = size.clone(),
                Some((_, known)) if conflict(known, size) && !size.is(1) => {
                    return Err(Error::user(format!(
                        "axis `{letter}` is {known} in one operand and {size} in the other \
                         ({} and {})",
                        list(&inputs[0].shape),
                        list(&inputs[1].shape)
                    )));
                }
                Some(_) => {}
            }
        }
    }
    let shape: Result<Vec<Dim>> =
        out.chars()
            .map(|letter| {
                sizes.iter().find(|(l, _)| *l == letter).map(|(_, d)| d.clone()).ok_or_else(|| {
                    Error::user(format!("result letter `{letter}` is in no operand"))
                })
            })
            .collect();
    Ok(vec![TensorType::new(dtype, shape?)])
}

/// Output extent of a sliding window: `floor((in + pads - dilation*(k-1) - 1) / stride) + 1`.
fn windowed(extent: &Dim, kernel: &Dim, stride: i64, pads: i64, dilation: i64) -> Result<Dim> {
    let reach = (kernel - 1) * dilation + 1;
    let room = extent + pads - reach;
    if room.as_const().is_some_and(|r| r < 0) {
        return Err(Error::user(format!(
            "a window of {kernel} does not fit an extent of {extent}"
        )));
    }
    Ok(room.floor_div(&Dim::new(stride)) + 1)
}

fn geometry(spatial: usize, lists: &[&[i64]]) -> Result<()> {
    if lists.iter().any(|l| l.len() != spatial) || lists[0].iter().any(|&s| s < 1) {
        return Err(Error::user(format!(
            "{spatial} spatial axes need as many strides, pads and dilations"
        )));
    }
    Ok(())
}

fn conv(attrs: &ConvAttrs, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let (x, w) = (&inputs[0], &inputs[1]);
    same_dtype(x, w)?;
    if x.rank() < 3 || x.rank() != w.rank() {
        return Err(Error::user(format!(
            "convolution of {} with {}",
            list(&x.shape),
            list(&w.shape)
        )));
    }
    let spatial = x.rank() - 2;
    geometry(spatial, &[&attrs.strides, &attrs.pads_lo, &attrs.pads_hi, &attrs.dilations])?;
    if attrs.groups < 1 || conflict(&x.shape[1], &(&w.shape[1] * attrs.groups)) {
        return Err(Error::user(format!(
            "{} channels for weights {} in {} groups",
            x.shape[1],
            list(&w.shape),
            attrs.groups
        )));
    }
    let mut shape = vec![x.shape[0].clone(), w.shape[0].clone()];
    for i in 0..spatial {
        let pads = attrs.pads_lo[i].saturating_add(attrs.pads_hi[i]);
        shape.push(windowed(
            &x.shape[i + 2],
            &w.shape[i + 2],
            attrs.strides[i],
            pads,
            attrs.dilations[i],
        )?);
    }
    Ok(vec![TensorType::new(x.dtype, shape)])
}

fn window(attrs: &WindowAttrs, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let x = &inputs[0];
    if x.rank() < 3 || attrs.kernel.len() != x.rank() - 2 {
        return Err(Error::user(format!(
            "a window of {} axes over {}",
            attrs.kernel.len(),
            list(&x.shape)
        )));
    }
    geometry(
        attrs.kernel.len(),
        &[&attrs.strides, &attrs.pads_lo, &attrs.pads_hi, &attrs.dilations],
    )?;
    let mut shape = x.shape[..2].to_vec();
    for i in 0..attrs.kernel.len() {
        let pads = attrs.pads_lo[i].saturating_add(attrs.pads_hi[i]);
        let kernel = Dim::new(attrs.kernel[i]);
        shape.push(windowed(&x.shape[i + 2], &kernel, attrs.strides[i], pads, attrs.dilations[i])?);
    }
    Ok(vec![TensorType::new(x.dtype, shape)])
}

fn attention(attrs: &crate::op::AttentionAttrs, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
    let (q, k, v) = (&inputs[0], &inputs[1], &inputs[2]);
    same_dtype(q, k)?;
    same_dtype(q, v)?;
    float(q)?;
    if [q, k, v].iter().any(|t| t.rank() != 4) {
        return Err(Error::user("attention takes q, k and v of four axes"));
    }
    let bad = conflict(&q.shape[3], &k.shape[3])
        || conflict(&k.shape[2], &v.shape[2])
        || conflict(&k.shape[1], &v.shape[1])
        || matches!((q.shape[1].as_const(), k.shape[1].as_const()), (Some(h), Some(g)) if g == 0 || h % g != 0);
    if bad {
        return Err(Error::user(format!(
            "attention of q {}, k {}, v {}",
            list(&q.shape),
            list(&k.shape),
            list(&v.shape)
        )));
    }
    let scores =
        vec![q.shape[0].clone(), q.shape[1].clone(), q.shape[2].clone(), k.shape[2].clone()];
    if attrs.score.params().len() != inputs.len() - 2 {
        return Err(Error::user("the score function takes the score and each extra operand"));
    }
    operations_exist(&attrs.score)?;
    if !attrs.score.params()[0].dtype.is_float() || !attrs.score.dtype().is_float() {
        return Err(Error::user("the score function maps a float to a float"));
    }
    for (extra, param) in inputs[3..].iter().zip(&attrs.score.params()[1..]) {
        if extra.dtype != param.dtype
            || broadcast_shapes(&scores, &extra.shape).as_ref() != Some(&scores)
        {
            return Err(Error::user(format!(
                "extra operand {extra} does not fit scores {}",
                list(&scores)
            )));
        }
    }
    let shape =
        vec![q.shape[0].clone(), q.shape[1].clone(), q.shape[2].clone(), v.shape[3].clone()];
    Ok(vec![TensorType::new(q.dtype, shape)])
}
