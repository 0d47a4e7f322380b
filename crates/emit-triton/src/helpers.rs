//! Functions that generated modules call, each printed only where it is used.
//!
//! To add one: a row; the text may call earlier rows only if it names them in `needs`.

/// A function of a generated module.
pub(crate) struct Helper {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its text.
    pub(crate) text: &'static str,
    /// What it calls.
    pub(crate) needs: &'static [&'static str],
}

/// All of them, in the order in which they are printed.
pub(crate) const HELPERS: &[Helper] = &[
    Helper {
        name: "floor_mod",
        needs: &[],
        text: "\
@triton.jit
def floor_mod(a, b):  # the sign follows b, which is positive
    return (a % b + b) % b
",
    },
    Helper {
        name: "floor_div",
        needs: &["floor_mod"],
        text: "\
@triton.jit
def floor_div(a, b):  # rounds down, for positive b
    return (a - floor_mod(a, b)) // b
",
    },
    Helper {
        name: "nan_max",
        needs: &[],
        text: "\
@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
",
    },
    Helper {
        name: "nan_min",
        needs: &[],
        text: "\
@triton.jit
def nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
",
    },
    Helper {
        name: "int_max",
        needs: &[],
        text: "\
@triton.jit
def int_max(a, b):
    return tl.maximum(a, b)
",
    },
    Helper {
        name: "int_min",
        needs: &[],
        text: "\
@triton.jit
def int_min(a, b):
    return tl.minimum(a, b)
",
    },
    Helper {
        name: "add",
        needs: &[],
        text: "\
@triton.jit
def add(a, b):
    return a + b
",
    },
    Helper {
        name: "multiply",
        needs: &[],
        text: "\
@triton.jit
def multiply(a, b):
    return a * b
",
    },
    Helper {
        name: "first_max",
        needs: &[],
        text: "\
@triton.jit
def first_max(a, i, b, j):  # values and their positions; NaN is largest
    a_wins = ((a != a) & (b == b)) | (a > b)
    b_wins = ((b != b) & (a == a)) | (b > a)
    take_a = a_wins | ((b_wins == 0) & (i < j))
    return tl.where(take_a, a, b), tl.where(take_a, i, j)
",
    },
    Helper {
        name: "last_max",
        needs: &[],
        text: "\
@triton.jit
def last_max(a, i, b, j):  # values and their positions; NaN is largest
    a_wins = ((a != a) & (b == b)) | (a > b)
    b_wins = ((b != b) & (a == a)) | (b > a)
    take_a = a_wins | ((b_wins == 0) & (i > j))
    return tl.where(take_a, a, b), tl.where(take_a, i, j)
",
    },
    Helper {
        name: "first_min",
        needs: &[],
        text: "\
@triton.jit
def first_min(a, i, b, j):  # values and their positions; NaN is smallest
    a_wins = ((a != a) & (b == b)) | (a < b)
    b_wins = ((b != b) & (a == a)) | (b < a)
    take_a = a_wins | ((b_wins == 0) & (i < j))
    return tl.where(take_a, a, b), tl.where(take_a, i, j)
",
    },
    Helper {
        name: "last_min",
        needs: &[],
        text: "\
@triton.jit
def last_min(a, i, b, j):  # values and their positions; NaN is smallest
    a_wins = ((a != a) & (b == b)) | (a < b)
    b_wins = ((b != b) & (a == a)) | (b < a)
    take_a = a_wins | ((b_wins == 0) & (i > j))
    return tl.where(take_a, a, b), tl.where(take_a, i, j)
",
    },
    Helper {
        name: "uniform",
        needs: &[],
        text: "\
@triton.jit
def uniform(seed: tl.constexpr, at, BITS: tl.constexpr, SCALE: tl.constexpr):
    # Word at % 4 of Philox4x32-10 at counter at // 4: its top BITS bits as a number below 1.
    block = at.to(tl.uint64) >> 2
    zero = (block & 0).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    which = at & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return (word >> (32 - BITS)).to(tl.float32) * SCALE
",
    },
    Helper {
        name: "uniform_f64",
        needs: &[],
        text: "\
@triton.jit
def uniform_f64(seed: tl.constexpr, at):
    # Two words of Philox4x32-10 at counter at // 2: their top 53 bits as a number below 1.
    block = at.to(tl.uint64) >> 1
    zero = (block & 0).to(tl.uint32)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    odd = (at & 1) == 1
    top = tl.where(odd, w2, w0).to(tl.uint64)
    bottom = tl.where(odd, w3, w1).to(tl.uint64)
    return (((top << 32) | bottom) >> 11).to(tl.float64) * 1.1102230246251565e-16
",
    },
];

/// What the launcher of every module calls.
pub(crate) const HOST: &str = "\
def _shape(name, tensor, dtype, rank):
    if str(tensor.dtype).removeprefix(\"torch.\") != dtype:
        raise TypeError(f\"{name} is of type {tensor.dtype}, not {dtype}\")
    if len(tensor.shape) != rank:
        raise ValueError(f\"{name} has {len(tensor.shape)} axes, not {rank}\")
    if any(extent >= 2**31 - 2**20 for extent in tensor.shape):
        raise ValueError(f\"{name} has an axis of 2**31 elements or more\")
    return tuple(tensor.shape)


def _expect(name, shape, expected):
    if shape != expected:
        raise ValueError(f\"{name} has shape {shape}, not {expected}\")


def _last(tensor):  # offset of the last element
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))


def _on(stream):
    if stream is None:
        return contextlib.nullcontext()
    import torch

    return torch.cuda.stream(stream)
";

/// For parameters with blocked layouts.
pub(crate) const HOST_MEMORY: &str = "\
def _memory(name, tensor, dtype, elements):
    if str(tensor.dtype).removeprefix(\"torch.\") != dtype:
        raise TypeError(f\"{name} is of type {tensor.dtype}, not {dtype}\")
    if not tensor.is_contiguous() or tensor.numel() < elements:
        raise ValueError(f\"{name} must be contiguous memory of at least {elements} elements\")
";
