//! [`Support`]: inputs, the float64 reference and digests, on the device (`support.cu`).

use crate::case::{Case, Place};
use tilewright_base::{Error, Result};
use tilewright_cuda::{
    Arch, Args, Buffer, CompileRequest, Gpu, LaunchShape, Module, Nvrtc, Stream,
};

/// A row of a result: which matrix of the batch, and which row.
pub type Sample = (u64, u64);

/// The compiled helpers.
#[derive(Debug)]
pub struct Support {
    module: Module,
    sms: u32,
}

/// A digest of a result, and how many of its elements have only ones for bits, as a poisoned buffer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Digest {
    pub sum: u64,
    pub all_ones: u64,
}

/// The helpers' text with its header.
fn request(arch: Arch) -> CompileRequest {
    let mut request =
        CompileRequest::new("gemm_support", include_str!("support.cu"), arch).option("-std=c++17");
    for (name, text) in tilewright_emit_cuda::headers() {
        request = request.header(*name, *text);
    }
    request
}

impl Support {
    /// Compiles (or finds) and loads them.
    pub fn new(gpu: &Gpu, nvrtc: &Nvrtc) -> Result<Support> {
        let module = gpu.load(&nvrtc.compile(&request(gpu.arch()))?)?;
        Ok(Support { module, sms: gpu.properties().sm_count })
    }

    fn launch(&self, stream: &Stream, name: &str, grid: [u32; 3], args: &Args) -> Result<()> {
        let shape = LaunchShape { grid, block: [256, 1, 1], ..LaunchShape::default() };
        let launch = self.module.function(name)?.prepare(&shape, args)?;
        // SAFETY: the callers below pass what the kernel takes, with places that lie inside their
        // buffers (`needs`), and use the buffers in the order of this stream.
        unsafe { launch.launch(stream) }
    }

    /// A grid for a loop over all elements.
    fn wide(&self, elements: u64) -> [u32; 3] {
        [elements.div_ceil(256).clamp(1, u64::from(self.sms) * 16) as u32, 1, 1]
    }

    /// Gives every element of a matrix a value that its coordinates and the seed decide: normal (0, 1),
    /// for integers the whole range. The gaps stay.
    pub fn fill(&self, stream: &Stream, buffer: &Buffer, place: &Place, seed: u64) -> Result<()> {
        needs(buffer, place)?;
        if place.elements() == 0 {
            return Ok(());
        }
        let (rows, cols) = place.shape;
        let args = strides(
            Args::new().value(start(buffer, place)).value(place.batch).value(rows).value(cols),
            place,
        )
        .value(seed);
        let name = format!("fill_{}", place.dtype);
        self.launch(stream, &name, self.wide(place.batch * rows * cols), &args)
    }

    /// Rows of the exact product, in float64.
    pub fn reference(
        &self,
        stream: &Stream,
        case: &Case,
        [a, b]: [&Buffer; 2],
        samples: &[Sample],
    ) -> Result<Vec<f64>> {
        needs(a, &case.a)?;
        needs(b, &case.b)?;
        in_range(case, samples)?;
        let per_block = if case.b.strides()[2] == 1 { 32 } else { 8 };
        let rows = upload(stream, samples)?;
        let out = stream.alloc(samples.len() * case.n as usize * 8)?;
        let args = Args::new()
            .value(start(a, &case.a))
            .value(start(b, &case.b))
            .buffer(&rows)
            .value(case.n)
            .value(case.k);
        let args = strides(strides(args, &case.a), &case.b).buffer(&out);
        let grid = [case.n.div_ceil(per_block) as u32, samples.len() as u32, 1];
        self.launch(stream, &format!("reference_{}", case.numbers.operand), grid, &args)?;
        doubles(stream, &out)
    }

    /// Rows of the product as tensor cores sum 8-bit floats (`cut_sums` in `support.cu`); `apart` is the depth after
    /// which sums are promoted, 0 for never.
    pub fn cut_sums(
        &self,
        stream: &Stream,
        case: &Case,
        [a, b]: [&Buffer; 2],
        samples: &[Sample],
        apart: u64,
    ) -> Result<Vec<f64>> {
        needs(a, &case.a)?;
        needs(b, &case.b)?;
        in_range(case, samples)?;
        let rows = upload(stream, samples)?;
        let out = stream.alloc(samples.len() * case.n as usize * 8)?;
        let args = Args::new()
            .value(start(a, &case.a))
            .value(start(b, &case.b))
            .buffer(&rows)
            .value(case.n)
            .value(case.k);
        let args = strides(strides(args, &case.a), &case.b).value(apart).buffer(&out);
        let grid = [case.n.div_ceil(256) as u32, samples.len() as u32, 1];
        self.launch(stream, &format!("cut_sums_{}", case.numbers.operand), grid, &args)?;
        doubles(stream, &out)
    }

    /// Rows of a result, in float64.
    pub fn gather(
        &self,
        stream: &Stream,
        case: &Case,
        c: &Buffer,
        samples: &[Sample],
    ) -> Result<Vec<f64>> {
        needs(c, &case.c)?;
        in_range(case, samples)?;
        let rows = upload(stream, samples)?;
        let out = stream.alloc(samples.len() * case.n as usize * 8)?;
        let args = Args::new().value(start(c, &case.c)).buffer(&rows).value(case.n);
        let args = strides(args, &case.c).buffer(&out);
        let grid = [case.n.div_ceil(256).min(4096) as u32, samples.len() as u32, 1];
        self.launch(stream, &format!("gather_{}", case.c.dtype), grid, &args)?;
        doubles(stream, &out)
    }

    /// A digest of all elements of a result.
    pub fn digest(&self, stream: &Stream, place: &Place, c: &Buffer) -> Result<Digest> {
        needs(c, place)?;
        let found = stream.upload(&[0; 16])?;
        let (rows, cols) = place.shape;
        let args = Args::new().value(start(c, place)).value(place.batch).value(rows).value(cols);
        let args = strides(args, place).buffer(&found);
        let grid = self.wide(place.batch * rows * cols);
        self.launch(stream, &format!("digest_{}", place.dtype), grid, &args)?;
        let bytes = found.to_vec(stream)?;
        let words = bytes.as_chunks::<8>().0;
        let word = |at: usize| words.get(at).map_or(0, |w| u64::from_le_bytes(*w));
        Ok(Digest { sum: word(0), all_ones: word(1) })
    }
}

/// Up to `most` rows, spread over the result, the first and the last one among them.
pub fn spread_samples(case: &Case, most: u64) -> Vec<Sample> {
    let rows = case.m * case.batch;
    let count = rows.min(most);
    let at = |i: u64| {
        if count == 1 { 0 } else { (i as u128 * (rows - 1) as u128 / (count - 1) as u128) as u64 }
    };
    (0..count).map(|i| (at(i) / case.m, at(i) % case.m)).collect()
}

/// How far apart two lists are: `|got - want| / |want|` in the Euclidean norm; infinite when something is
/// not a number.
pub fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    let square = |x: f64| x * x;
    let apart: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    let norm: f64 = want.iter().map(|w| square(*w)).sum();
    if got.len() != want.len() || !apart.is_finite() {
        return f64::INFINITY;
    }
    if apart == 0.0 { 0.0 } else { (apart / norm).sqrt() }
}

fn start(buffer: &Buffer, place: &Place) -> u64 {
    buffer.address() + place.offset * place.dtype.size() as u64
}

fn strides(args: Args, place: &Place) -> Args {
    place.strides().iter().fold(args, |args, stride| args.value(*stride))
}

fn needs(buffer: &Buffer, place: &Place) -> Result<()> {
    if buffer.len() >= place.bytes() {
        return Ok(());
    }
    Err(Error::bug(format!("{place:?} in a buffer of {} bytes", buffer.len())))
}

fn in_range(case: &Case, samples: &[Sample]) -> Result<()> {
    let grid_limit = 65535;
    if samples.iter().all(|(l, row)| *l < case.batch && *row < case.m)
        && samples.len() <= grid_limit
    {
        return Ok(());
    }
    Err(Error::bug(format!("{} samples, or one outside the result", samples.len())))
}

fn upload(stream: &Stream, samples: &[Sample]) -> Result<Buffer> {
    let bytes: Vec<u8> =
        samples.iter().flat_map(|(l, row)| [*l, *row]).flat_map(u64::to_le_bytes).collect();
    stream.upload(&bytes)
}

fn doubles(stream: &Stream, buffer: &Buffer) -> Result<Vec<f64>> {
    let bytes = buffer.to_vec(stream)?;
    let words = bytes.as_chunks::<8>().0.iter();
    Ok(words.map(|word| f64::from_le_bytes(*word)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::{Numbers, orders};

    #[test]
    fn samples_are_spread_from_the_first_row_to_the_last() {
        let numbers = Numbers::named("bf16").unwrap();
        let case = |m, batch| Case::dense(numbers, [m, 8, 8, batch], orders("rrr").unwrap());
        assert_eq!(spread_samples(&case(1, 1), 8), [(0, 0)]);
        assert_eq!(spread_samples(&case(2, 2), 8), [(0, 0), (0, 1), (1, 0), (1, 1)]);
        let many = spread_samples(&case(1000, 3), 8);
        assert_eq!((many.len(), many[0], many[7]), (8, (0, 0), (2, 999)));
    }

    #[test]
    fn errors_are_relative_and_what_is_no_number_is_infinitely_wrong() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_error(&[3.0, 5.0], &[3.0, 4.0]), 0.2);
        assert_eq!(relative_error(&[f64::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0], &[0.0]), f64::INFINITY);
    }

    #[test]
    fn the_helpers_compile() {
        let Ok(nvrtc) = Nvrtc::open(None) else {
            assert!(std::env::var("TILEWRIGHT_REQUIRE_NVRTC").is_err());
            println!("skipped: no NVRTC");
            return;
        };
        let compiled = nvrtc.compile(&request(Arch::SM_90A)).unwrap();
        assert_eq!(compiled.functions.iter().filter(|f| f.is_kernel).count(), 26);
        assert_eq!(compiled.warnings, []);
    }
}
