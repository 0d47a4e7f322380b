//! Attention for training, of 16-bit types on Hopper: the result with the log-sum-exp of each row, and the gradients from them. Scores
//! are never in memory, sums have one order. Tensors are read as they lie where the copy engine can.

use crate::plans::attention_training;
use crate::tensors::{float, like, same_device};
use tilewright_base::{DType, Error, Result};
use tilewright_runtime_gpu::{AttentionCall, AttentionMask, AttentionPlaces};
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// The tensor, or a copy, as the copy engine takes it: neighbours along the depth side by side, lines at multiples of 16 bytes.
fn lines(tensor: Tensor) -> Result<Tensor> {
    let far = tensor.sizes().iter().zip(tensor.strides()).rev().skip(1);
    let fits = tensor.strides().last() == Some(&1)
        && far.clone().all(|(size, stride)| *size == 1 || (*stride > 0 && stride % 8 == 0))
        && tensor.address()?.is_multiple_of(16);
    if fits { Ok(tensor) } else { tensor.laid_out(16) }
}

/// Distances along the first three axes; 0 along those of one element.
fn strides(tensor: &Tensor) -> Result<[i64; 3]> {
    let along = |axis: usize| match (tensor.sizes().get(axis), tensor.strides().get(axis)) {
        (Some(1), _) => Ok(0),
        (Some(_), Some(stride)) => Ok(*stride),
        _ => Err(Error::bug("a tensor of four axes")),
    };
    Ok([along(0)?, along(1)?, along(2)?])
}

/// Queries, keys and values, checked, and their device.
fn checked(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    causal: bool,
) -> Result<(AttentionCall, u32)> {
    let dtype = float("q", q)?;
    let (&[b, h, s, d], &[kb, g, t, kd], &[vb, vg, vt, e]) = (q.sizes(), k.sizes(), v.sizes())
    else {
        return Err(Error::user("q, k and v must have the axes [batch, heads, length, depth]"));
    };
    let fits = kb == b && vb == b && vg == g && kd == d && vt == t && g > 0 && h % g == 0;
    if !fits {
        let (q, k, v) = (q.sizes(), k.sizes(), v.sizes());
        let message =
            format!("q, k and v have shapes {q:?}, {k:?} and {v:?}, which do not go together");
        return Err(Error::user(message));
    }
    for (name, tensor) in [("k", k), ("v", v)] {
        same_device(name, tensor, q)?;
        if tensor.dtype()? != dtype {
            return Err(Error::user(format!("{name} is {}, and q {dtype}", tensor.dtype()?)));
        }
    }
    if !scale.is_finite() {
        return Err(Error::user(format!("scale is {scale}")));
    }
    let Device::Cuda(index) = q.device() else {
        return Err(Error::unsupported("attention with its log-sum-exp on a processor"));
    };
    if [b, h, s, t, d, e].contains(&0) {
        return Err(Error::unsupported("attention of nothing with its log-sum-exp"));
    }
    let (queries, keys, depth, width, kv_heads) = (s, t, d, e, g);
    let strides = [[0; 3]; 8];
    let (batch, heads) = (b, h);
    let call = AttentionCall {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        depth,
        width,
        dtype,
        scale,
        causal,
        mask: None,
        strides,
    };
    Ok((call, index))
}

/// The mask as the kernels take it, and where it lies; it must live as long as the call.
fn masked(
    call: &mut AttentionCall,
    mask: Option<Tensor>,
    q: &Tensor,
) -> Result<(Option<Tensor>, u64)> {
    let Some(mask) = mask else { return Ok((None, 0)) };
    same_device("mask", &mask, q)?;
    let AttentionCall { batch: b, heads: h, queries: s, keys: t, .. } = *call;
    let wanted = matches!(*mask.sizes(), [mb, mh, ms, mt]
        if (mb == 1 || mb == b) && (mh == 1 || mh == h) && (ms == 1 || ms == s) && mt == t);
    if !wanted {
        let found = mask.sizes();
        let message =
            format!("mask has shape {found:?}; it must be [{b} or 1, {h} or 1, {s} or 1, {t}]");
        return Err(Error::user(message));
    }
    let dtype = if mask.dtype()? == DType::Bool { DType::Bool } else { float("mask", &mask)? };
    let near = mask.strides().last() == Some(&1) && mask.strides().iter().all(|s| *s >= 0);
    let mask = if near { mask } else { mask.laid_out(16)? };
    let address = mask.address()?;
    let align = if address.is_multiple_of(16) { 16 } else { dtype.size() as i64 };
    call.mask = Some(AttentionMask { dtype, strides: strides(&mask)?, align });
    Ok((Some(mask), address))
}

/// A new tensor `[batch, heads, rows, depth]` that lies as `like` does where that is dense, so that what a model takes apart and puts
/// together again needs no copies.
fn beside(abi: &'static Abi, sizes: [i64; 4], like: &Tensor, dtype: DType) -> Result<Tensor> {
    let [b, h, s, e] = sizes;
    let rows_first = [h * s * e, e, h * e, 1];
    let found = like.strides();
    let by_rows = h > 1 && s > 1 && found.len() == 4 && found[1] < found[2];
    if !by_rows {
        return Tensor::empty(abi, &[b, h, s, e], dtype, like.device());
    }
    Tensor::empty_strided(abi, &[b, h, s, e], &rows_first, dtype, like.device())
}

/// Attention and the log-sum-exp of each row, f32 `[batch, heads, length]`.
pub(crate) struct AttentionLse;

impl Operator for AttentionLse {
    const NAME: &'static str = "attention_lse";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("q", Arg::Tensor),
        ("k", Arg::Tensor),
        ("v", Arg::Tensor),
        ("mask", Arg::Optional),
        ("scale", Arg::Float),
        ("causal", Arg::Bool),
    ];
    const RETURNS: &'static str = "(Tensor y, Tensor lse)";
    const OVERLOADS: &'static [&'static str] = &["inference"];

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [q, k, v, mask, scale, causal] = args else { return Err(Error::bug("arguments")) };
        let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
        let (mut call, index) = checked(&q, &k, &v, scale.float()?, causal.bool()?)?;
        let (_mask, mask) = masked(&mut call, mask.optional()?, &q)?;
        let y = beside(abi, [call.batch, call.heads, call.queries, call.width], &q, call.dtype)?;
        let lse = [call.batch, call.heads, call.queries];
        let lse = Tensor::empty(abi, &lse, DType::F32, q.device())?;
        let tensors = [lines(q)?, lines(k)?, lines(v)?];
        let mut places =
            AttentionPlaces { lse: lse.address()?, mask, ..AttentionPlaces::default() };
        for (i, tensor) in tensors.iter().chain([&y]).enumerate() {
            (call.strides[i], places.tensors[i]) = (strides(tensor)?, tensor.address()?);
        }
        attention_training(abi, index, &call, false, places)?;
        Ok(vec![Value::Tensor(y), Value::Tensor(lse)])
    }
}

/// The gradients of queries, keys and values, from what [`AttentionLse`] gave.
pub(crate) struct AttentionBackward;

impl Operator for AttentionBackward {
    const NAME: &'static str = "attention_backward";
    const ARGS: &'static [(&'static str, Arg)] = &[
        ("dy", Arg::Tensor),
        ("q", Arg::Tensor),
        ("k", Arg::Tensor),
        ("v", Arg::Tensor),
        ("y", Arg::Tensor),
        ("lse", Arg::Tensor),
        ("mask", Arg::Optional),
        ("scale", Arg::Float),
        ("causal", Arg::Bool),
    ];
    const RETURNS: &'static str = "(Tensor dq, Tensor dk, Tensor dv)";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [dy, q, k, v, y, lse, mask, scale, causal] = args else {
            return Err(Error::bug("arguments"));
        };
        let (dy, y, lse) = (dy.tensor()?, y.tensor()?, lse.tensor()?);
        let (q, k, v) = (q.tensor()?, k.tensor()?, v.tensor()?);
        let (mut call, index) = checked(&q, &k, &v, scale.float()?, causal.bool()?)?;
        let (_mask, mask) = masked(&mut call, mask.optional()?, &q)?;
        let result = [call.batch, call.heads, call.queries, call.width];
        same_device("y", &y, &q)?;
        if *y.sizes() != result || y.dtype()? != call.dtype {
            let message = format!("y is {} of shape {:?}, not {result:?}", y.dtype()?, y.sizes());
            return Err(Error::user(message));
        }
        like("dy", &dy, &y)?;
        same_device("lse", &lse, &q)?;
        if *lse.sizes() != result[..3] || lse.dtype()? != DType::F32 {
            let message = format!("lse is {} of shape {:?}", lse.dtype()?, lse.sizes());
            return Err(Error::user(message));
        }
        let made = |of: &Tensor| {
            let &[a, b, c, d] = of.sizes() else { return Err(Error::bug("four axes")) };
            beside(abi, [a, b, c, d], of, call.dtype)
        };
        let (dq, dk, dv) = (made(&q)?, made(&k)?, made(&v)?);
        let lse = lse.laid_out(16)?;
        let mut places =
            AttentionPlaces { lse: lse.address()?, mask, ..AttentionPlaces::default() };
        let read = [lines(q)?, lines(k)?, lines(v)?, lines(y)?, lines(dy)?];
        for (i, tensor) in read.iter().chain([&dq, &dk, &dv]).enumerate() {
            (call.strides[i], places.tensors[i]) = (strides(tensor)?, tensor.address()?);
        }
        attention_training(abi, index, &call, true, places)?;
        Ok(vec![Value::Tensor(dq), Value::Tensor(dk), Value::Tensor(dv)])
    }
}
