//! Products with few rows or few columns, by the kernels of `rows/gemv.rs`.

use crate::gemm::plan::{
    Candidate, Oriented, Place, Step, Workspace, aligned_elements, extras, lines, operand_places,
    sizes, sums_of,
};
use crate::gemm::problem::Problem;
use crate::gemm::program::{Math, Order, Pair, copy_program};
use crate::rows::{GemvForm, GemvSizes, GemvSpec, MOST_VECTORS};
use tilewright_base::{DType, Kind, Result};
use tilewright_device::Arch;
use tilewright_lower_gpu::lower;
use tilewright_target::Gpu;

/// Whether only these kernels come into question: one row or column, which tensor cores would waste and whose sums
/// want to be as exact as those of others; and few rows of f32 that is not to be rounded, for which the tiles of
/// plain multiply-adds are too large.
pub(super) fn alone(p: &Problem) -> bool {
    let few = p.m.min(p.n);
    let exact = p.operand == DType::F32 && p.spec().math != Math::Tf32;
    // Widening 8-bit floats takes as long as reading them: tensor cores may be faster.
    let cheap = !(p.operand.is_float() && p.operand.bits() == 8);
    (few == 1 && cheap) || (exact && few <= MOST_VECTORS)
}

/// The orientation without orders and distances that do not matter: with one row or column, an axis of one element
/// is called the strided one.
fn thin(p: &Problem, o: &Oriented) -> Oriented {
    let mut o = o.clone();
    if o.m == 1 && o.spec.a == Order::Col && o.leading.0 == 1 {
        (o.spec.a, o.leading.0) = (Order::Row, p.k);
    }
    if o.m == 1 && o.spec.a == Order::Row {
        o.leading.0 = p.k;
    }
    if o.m == 1 && o.spec.c == Order::Col && o.leading.2 == 1 {
        o.spec.c = Order::Row;
    }
    if o.m == 1 && o.spec.c == Order::Row {
        o.leading.2 = o.n;
    }
    if o.n == 1 && o.spec.b == Order::Row && o.leading.1 == 1 {
        (o.spec.b, o.leading.1) = (Order::Col, p.k);
    }
    o
}

/// Bytes of the matrix from which on vectors that do not lie along the depth are copied first: reading them element by
/// element, again and again, takes longer.
const COPY_FROM_BYTES: i64 = 8 << 20;

/// Whether the vectors are copied so that they lie along the depth.
fn copies(p: &Problem, o: &Oriented) -> bool {
    let bytes = o.n * p.k * p.batch * p.operand_bytes();
    o.spec.a == Order::Col && o.spec.b == Order::Col && bytes >= COPY_FROM_BYTES
}

/// The problem as it is after that copy.
fn copied(p: &Problem, o: &Oriented) -> Oriented {
    let mut o = o.clone();
    let padded = (p.k + 15) / 16 * 16;
    (o.spec.a, o.leading.0, o.stride.0, o.align.0) = (Order::Row, padded, padded * o.m, 256);
    o
}

/// Elements, a power of two up to 16, that accesses along the lines of the matrix may take.
fn vector(p: &Problem, o: &Oriented) -> i64 {
    let (size, out) = (p.operand_bytes(), p.result_bytes());
    let strided = |stride: i64| if p.batch == 1 { 0 } else { stride };
    let takes = |n: i64| {
        let line = |size: i64, align: i64, values: [i64; 3]| {
            align % (n.min(16 / size) * size) == 0 && values.iter().all(|v| v % n == 0)
        };
        if o.spec.b == Order::Col {
            let b = line(size, o.align.1, [p.k, o.leading.1, strided(o.stride.1)]);
            let a = line(size, o.align.0, [p.k, o.leading.0, strided(o.stride.0)]);
            b && (a || o.spec.a == Order::Col)
        } else {
            let b = line(size, o.align.1, [o.n, o.leading.1, strided(o.stride.1)]);
            let c = line(out, o.align.2, [o.n, o.leading.2, strided(o.stride.2)]);
            b && (c || o.spec.c == Order::Col)
        }
    };
    [16, 8, 4, 2].into_iter().find(|n| n * size <= 16 && takes(*n)).unwrap_or(1)
}

/// Candidates with these kernels, best first, at most `most`; none when neither side is short.
pub(super) fn candidates(
    p: &Problem,
    orientations: &[Oriented],
    gpu: &Gpu,
    most: usize,
) -> Result<Vec<Candidate>> {
    let arch = Arch::of_capability(gpu.capability);
    let mut ranked = Vec::new();
    let few: Vec<(Oriented, GemvSpec, GemvSizes)> = orientations
        .iter()
        .filter(|o| o.m <= MOST_VECTORS)
        .map(|o| {
            let o = thin(p, o);
            let o = if copies(p, &o) { copied(p, &o) } else { o };
            let spec = GemvSpec { gemm: o.spec.clone(), vectors: o.m };
            let sizes = GemvSizes { n: o.n, k: p.k, batch: p.batch, vector: vector(p, &o) };
            (o, spec, sizes)
        })
        .collect();
    for (index, (_, spec, sizes)) in few.iter().enumerate() {
        let forms = spec.space(gpu, sizes);
        ranked.extend(forms.into_iter().map(|f| (spec.estimate_us(gpu, sizes, &f), index, f)));
    }
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
    let mut out = Vec::new();
    for (estimate_us, index, form) in ranked {
        if out.len() >= most {
            break;
        }
        let (o, spec, _) = &few[index];
        let given = orientations.iter().find(|g| g.swapped == o.swapped).unwrap_or(o);
        let candidate = build(p, given, o, spec, &form, (estimate_us, arch))?;
        match candidate.steps.iter().try_for_each(|s| lower(&s.kernel, &s.schedule).map(drop)) {
            Ok(()) => out.push(candidate),
            Err(e) if e.kind() == Kind::Unsupported => {}
            Err(e) => return Err(e),
        }
    }
    Ok(out)
}

/// `given` is the orientation before copies.
fn build(
    p: &Problem,
    given: &Oriented,
    o: &Oriented,
    spec: &GemvSpec,
    form: &GemvForm,
    (estimate_us, arch): (f64, Arch),
) -> Result<Candidate> {
    let places = operand_places(o);
    let pair = o.spec.epilogue.pair;
    let two = |place: Place, is: bool| [place, Place::B2].into_iter().take(1 + usize::from(is));
    let mut vectors: Vec<Place> = two(places.0, pair == Pair::Left).collect();
    let matrices = two(places.1, pair == Pair::Right);
    let mut workspace = Workspace::default();
    let mut steps = Vec::new();
    let given = thin(p, given);
    if copies(p, &given) {
        let batched = p.batch != 1;
        let kernel = copy_program("copy", p.operand, Order::Col, Order::Row, batched, false);
        let mut values =
            vec![("R", o.m), ("C", p.k), ("ldx", given.leading.0), ("ldy", o.leading.0)];
        if batched {
            values.extend([("L", p.batch), ("sx", given.stride.0), ("sy", o.stride.0)]);
        }
        let aligned = aligned_elements(given.align.0, p.operand_bytes());
        for vectors in &mut vectors {
            let place = workspace.take(o.stride.0 * p.batch * p.operand_bytes());
            let from = std::mem::replace(vectors, place);
            let operands = vec![from, place];
            steps.push(lines(arch, kernel.clone(), sizes(&values), operands, aligned)?);
        }
    }
    let mut operands: Vec<Place> = vectors.into_iter().chain(matrices).collect();
    let mut values = vec![("N", o.n), ("K", p.k), ("lda", o.leading.0), ("ldb", o.leading.1)];
    if p.batch != 1 {
        let (sa, sb, sc) = o.stride;
        values.extend([("L", p.batch), ("sa", sa), ("sb", sb), ("sc", sc)]);
    }
    let schedule = spec.schedule(arch, form);
    if form.splits == 1 {
        values.push(("ldc", o.leading.2));
        operands.extend(extras(&o.spec, o.swapped));
        let kernel = spec.program("gemv", false);
        steps.push(Step { kernel, schedule, sizes: sizes(&values), operands });
        return Ok(Candidate { steps, workspace_bytes: workspace.bytes, estimate_us });
    }
    let (_, bk) = spec.tile(form);
    let depth = (p.k + bk - 1) / bk;
    let part = (depth + form.splits - 1) / form.splits;
    let splits = (depth + part - 1) / part;
    let column_major = o.spec.c == Order::Col;
    let (line, lines_of) = if column_major { (o.m, o.n) } else { (o.n, o.m) };
    let padded = (line + 3) / 4 * 4;
    let sp = padded * lines_of;
    let parts: Vec<Place> =
        (0..sums_of(&o.spec)).map(|_| workspace.take(sp * splits * 4)).collect();
    values.extend([("ldc", padded), ("S", splits), ("part", part), ("sp", sp)]);
    operands.extend(&parts);
    let kernel = spec.program("gemv_part", true);
    steps.push(Step { kernel, schedule, sizes: sizes(&values), operands });
    let (m, n) = if column_major { (o.n, o.m) } else { (o.m, o.n) };
    let values =
        [("M", m), ("N", n), ("S", splits), ("ldp", padded), ("ldc", o.leading.2), ("sp", sp)];
    let mut view = o.spec.clone();
    if column_major {
        view.epilogue = view.epilogue.transposed();
    }
    let mut operands = parts;
    operands.extend(extras(&view, o.swapped != column_major));
    let aligned = aligned_elements(o.align.2, p.result_bytes());
    let kernel = o.spec.sum_program("gemv_sum");
    steps.push(lines(arch, kernel, sizes(&values), operands, aligned)?);
    Ok(Candidate { steps, workspace_bytes: workspace.bytes, estimate_us })
}
