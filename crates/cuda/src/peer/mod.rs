//! cuBLASLt: the matrix products that ours are measured against. Nothing of Tilewright computes with it.
//!
//! cuBLASLt thinks column-major: a row-major matrix is to it the transposed one. [`MatmulSpec`] is in
//! our terms, `C [M, N] = A [M, K] B [K, N]` with an order each; [`Plan::of`] is the translation. For
//! a row-major C it multiplies the other way round, `C^T = B^T A^T`.

mod api;

use crate::driver::{Buffer, Gpu, Stream};
use api::{Algorithm, Api, Handle, Heuristic, api, compute, matmul, matrix, preference};
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::null_mut;
use tilewright_base::{DType, Error, Result};

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatrixSpec {
    /// Neighbours along the columns' axis (the last one) are neighbours in memory.
    pub row_major: bool,
    /// Elements between neighbours along the other axis.
    pub leading: i64,
    /// Elements between matrices of a batch.
    pub batch_stride: i64,
    /// Of the first element's address: the greatest power of two, up to 256, that divides it.
    pub alignment_bytes: u32,
}

/// A matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct MatmulSpec {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    pub batch: u32,
    /// Type of A and B.
    pub operand: DType,
    /// Type of C.
    pub result: DType,
    /// f32 operands may be rounded to TF32.
    pub tf32: bool,
    pub a: MatrixSpec,
    pub b: MatrixSpec,
    pub c: MatrixSpec,
}

/// A matrix as cuBLASLt is told of it: column-major, and whether it is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Side {
    rows: u64,
    cols: u64,
    matrix: MatrixSpec,
    transposed: bool,
}

/// The product as cuBLASLt is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Its A is our B.
    swapped: bool,
    x: Side,
    y: Side,
    out: Side,
}

impl Plan {
    fn of(spec: &MatmulSpec) -> Plan {
        let swapped = spec.c.row_major;
        // A row-major [rows, cols] is a column-major [cols, rows]. Swapped, the operand is wanted
        // transposed, so a row-major one is as wanted.
        let side = |rows, cols, matrix: MatrixSpec| {
            let (rows, cols) = if matrix.row_major { (cols, rows) } else { (rows, cols) };
            Side { rows, cols, matrix, transposed: matrix.row_major != swapped }
        };
        let a = side(spec.m, spec.k, spec.a);
        let b = side(spec.k, spec.n, spec.b);
        let (x, y) = if swapped { (b, a) } else { (a, b) };
        Plan { swapped, x, y, out: side(spec.m, spec.n, spec.c) }
    }
}

/// `cudaDataType_t`.
fn data_type(dtype: DType) -> Result<c_int> {
    Ok(match dtype {
        DType::F32 => 0,
        DType::F16 => 2,
        DType::I8 => 3,
        DType::I32 => 10,
        DType::BF16 => 14,
        DType::F8E4M3 => 28,
        DType::F8E5M2 => 29,
        other => return Err(Error::unsupported(format!("cuBLASLt products of {other}"))),
    })
}

/// cuBLASLt on a device.
pub struct CublasLt {
    gpu: Gpu,
    api: &'static Api,
    handle: Handle,
}

// SAFETY: a handle, which cuBLASLt takes on any thread ("thread safe" in its manual).
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// Opens the library that `TILEWRIGHT_CUBLASLT` names (a file or its folder), or else one of a
    /// Python environment, of `/usr/local/cuda*`, or that the system's loader knows.
    pub fn open(gpu: &Gpu) -> Result<CublasLt> {
        let api = api()?;
        gpu.make_current()?;
        let mut handle = null_mut();
        // SAFETY: a place for the handle; the device's context is current.
        api.check(unsafe { (api.create)(&mut handle) }, "opening cuBLASLt")?;
        Ok(CublasLt { gpu: gpu.clone(), api, handle })
    }

    /// Major, minor and patch number.
    pub fn version(&self) -> (usize, usize, usize) {
        // SAFETY: no arguments.
        let version = unsafe { (self.api.version)() };
        (version / 10000, version / 100 % 100, version % 100)
    }

    /// The library's path.
    pub fn path(&self) -> &std::path::Path {
        &self.api.path
    }

    /// A product, with up to `at_most` algorithms that cuBLASLt proposes, its favourite first.
    ///
    /// # Errors
    /// Unsupported when it has none for these types, layouts and alignments.
    pub fn matmul(
        &self,
        spec: &MatmulSpec,
        workspace_bytes: usize,
        at_most: usize,
    ) -> Result<Matmul<'_>> {
        let api = self.api;
        self.gpu.make_current()?;
        let (compute_type, scale_type) = match spec.operand {
            DType::I8 => (compute::I32, DType::I32),
            DType::F32 if spec.tf32 => (compute::TF32, DType::F32),
            _ => (compute::F32, DType::F32),
        };
        let plan = Plan::of(spec);
        let fp8 = matches!(spec.operand, DType::F8E4M3 | DType::F8E5M2);
        let mut descriptor = null_mut();
        // SAFETY: a place for the descriptor.
        let code =
            unsafe { (api.matmul_create)(&mut descriptor, compute_type, data_type(scale_type)?) };
        api.check(code, "describing a product")?;
        let descriptor = Owned { handle: descriptor, destroy: api.matmul_destroy };
        let set = |attribute, bytes: &[u8]| {
            // SAFETY: a descriptor, and as many bytes as said.
            let code = unsafe {
                (api.matmul_set)(descriptor.handle, attribute, bytes.as_ptr().cast(), bytes.len())
            };
            api.check(code, "describing a product")
        };
        // CUBLAS_OP_N and CUBLAS_OP_T.
        set(matmul::TRANS_A, &i32::from(plan.x.transposed).to_ne_bytes())?;
        set(matmul::TRANS_B, &i32::from(plan.y.transposed).to_ne_bytes())?;
        let scale = if fp8 {
            set(matmul::FAST_ACCUMULATION, &1i8.to_ne_bytes())?;
            let stream = self.gpu.stream()?;
            let one = stream.upload(&1f32.to_ne_bytes())?;
            set(matmul::A_SCALE, &one.address().to_ne_bytes())?;
            set(matmul::B_SCALE, &one.address().to_ne_bytes())?;
            Some(one)
        } else {
            None
        };
        let x = self.matrix(&plan.x, spec.operand, spec.batch)?;
        let y = self.matrix(&plan.y, spec.operand, spec.batch)?;
        let out = self.matrix(&plan.out, spec.result, spec.batch)?;
        let mut handle = null_mut();
        // SAFETY: a place for the preference.
        let code = unsafe { (api.preference_create)(&mut handle) };
        api.check(code, "asking for algorithms")?;
        let wishes = Owned { handle, destroy: api.preference_destroy };
        let wish = |attribute, bytes: &[u8]| {
            // SAFETY: a preference, and as many bytes as said.
            let code = unsafe {
                (api.preference_set)(wishes.handle, attribute, bytes.as_ptr().cast(), bytes.len())
            };
            api.check(code, "asking for algorithms")
        };
        wish(preference::WORKSPACE_BYTES, &(workspace_bytes as u64).to_ne_bytes())?;
        let aligned = [
            (preference::ALIGNMENT_A, plan.x),
            (preference::ALIGNMENT_B, plan.y),
            (preference::ALIGNMENT_C, plan.out),
            (preference::ALIGNMENT_D, plan.out),
        ];
        for (attribute, side) in aligned {
            wish(attribute, &side.matrix.alignment_bytes.to_ne_bytes())?;
        }
        let mut found = vec![Heuristic::default(); at_most.max(1)];
        let mut count: c_int = 0;
        // SAFETY: descriptors that are alive, and room for as many results as said.
        let code = unsafe {
            (api.heuristic)(
                self.handle,
                descriptor.handle,
                x.handle,
                y.handle,
                out.handle,
                out.handle,
                wishes.handle,
                found.len() as c_int,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        api.check(code, "asking for algorithms")?;
        found.truncate(count.unsigned_abs() as usize);
        found.retain(|h| h.state == 0 && h.workspace_bytes <= workspace_bytes);
        if found.is_empty() {
            return Err(Error::unsupported(format!("cuBLASLt has no algorithm for {spec:?}")));
        }
        Ok(Matmul {
            peer: self,
            swapped: plan.swapped,
            integer: spec.operand == DType::I8,
            descriptor,
            x,
            y,
            out,
            found,
            _scale: scale,
        })
    }

    fn matrix(&self, side: &Side, dtype: DType, batch: u32) -> Result<Owned> {
        let api = self.api;
        let mut handle = null_mut();
        let leading = side.matrix.leading;
        // SAFETY: a place for the layout.
        let code = unsafe {
            (api.matrix_create)(&mut handle, data_type(dtype)?, side.rows, side.cols, leading)
        };
        api.check(code, "describing a matrix")?;
        let layout = Owned { handle, destroy: api.matrix_destroy };
        let set = |attribute, bytes: &[u8]| {
            // SAFETY: a layout, and as many bytes as said.
            let code =
                unsafe { (api.matrix_set)(handle, attribute, bytes.as_ptr().cast(), bytes.len()) };
            api.check(code, "describing a matrix")
        };
        set(matrix::BATCH_COUNT, &batch.cast_signed().to_ne_bytes())?;
        set(matrix::BATCH_STRIDE, &side.matrix.batch_stride.to_ne_bytes())?;
        Ok(layout)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        let _ = self.gpu.make_current();
        // SAFETY: our handle, used for the last time; products borrow us.
        let _ = unsafe { (self.api.destroy)(self.handle) };
    }
}

impl fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CublasLt({:?} on {:?})", self.version(), self.gpu)
    }
}

/// A descriptor that is given back.
struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: ours, used for the last time, and made by the function's counterpart.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// A product that is ready to run, in one of several ways.
pub struct Matmul<'a> {
    peer: &'a CublasLt,
    swapped: bool,
    integer: bool,
    descriptor: Owned,
    x: Owned,
    y: Owned,
    out: Owned,
    found: Vec<Heuristic>,
    /// The scale of both operands of an 8-bit floating-point product: 1.
    _scale: Option<Buffer>,
}

impl Matmul<'_> {
    /// How many algorithms there are; 0 is cuBLASLt's favourite.
    pub fn algorithms(&self) -> usize {
        self.found.len()
    }

    /// Bytes of workspace that an algorithm uses, and how many waves of blocks it takes.
    pub fn algorithm(&self, index: usize) -> Option<(usize, f32)> {
        self.found.get(index).map(|h| (h.workspace_bytes, h.waves))
    }

    /// Puts the product into the stream. `a`, `b` and `c` are addresses on the device.
    ///
    /// # Safety
    /// The matrices lie at these addresses as the specification says, aligned as it says, and stay
    /// until the product has run, as does the workspace, which has as many bytes as
    /// [`CublasLt::matmul`] was told. No other product uses the workspace at the same time.
    pub unsafe fn run(
        &self,
        index: usize,
        stream: &Stream,
        [a, b, c]: [u64; 3],
        workspace: &Buffer,
    ) -> Result<()> {
        let Some(Heuristic { algorithm, .. }) = self.found.get(index) else {
            return Err(Error::bug(format!("there is no algorithm {index}")));
        };
        self.peer.gpu.make_current()?;
        let (x, y) = if self.swapped { (b, a) } else { (a, b) };
        let address = |at: u64| std::ptr::with_exposed_provenance_mut::<c_void>(at as usize);
        let floats = [1f32, 0f32];
        let integers = [1i32, 0i32];
        let [alpha, beta]: [*const c_void; 2] = if self.integer {
            [(&raw const integers[0]).cast(), (&raw const integers[1]).cast()]
        } else {
            [(&raw const floats[0]).cast(), (&raw const floats[1]).cast()]
        };
        let algorithm: *const Algorithm = algorithm;
        // SAFETY: descriptors and factors are alive during the call (factors are read on the host,
        // the default); the addresses are the caller's promise.
        let code = unsafe {
            (self.peer.api.run)(
                self.peer.handle,
                self.descriptor.handle,
                alpha,
                address(x),
                self.x.handle,
                address(y),
                self.y.handle,
                beta,
                address(c),
                self.out.handle,
                address(c),
                self.out.handle,
                algorithm,
                address(workspace.address()),
                workspace.len(),
                stream.raw_handle(),
            )
        };
        self.peer.api.check(code, "running cuBLASLt")
    }
}

impl fmt::Debug for Matmul<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matmul({} algorithms)", self.found.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(a: bool, b: bool, c: bool) -> MatmulSpec {
        let matrix = |row_major, rows: i64, cols: i64| MatrixSpec {
            row_major,
            leading: if row_major { cols } else { rows },
            batch_stride: rows * cols,
            alignment_bytes: 16,
        };
        MatmulSpec {
            m: 2,
            n: 3,
            k: 4,
            batch: 1,
            operand: DType::F32,
            result: DType::F32,
            tf32: false,
            a: matrix(a, 2, 4),
            b: matrix(b, 4, 3),
            c: matrix(c, 2, 3),
        }
    }

    /// What cuBLASLt computes from a plan, on column-major memory.
    fn multiply(plan: &Plan, k: u64, a: &[f64], b: &[f64], c: &mut [f64]) {
        let (x, y) = if plan.swapped { (b, a) } else { (a, b) };
        let at = |side: &Side, memory: &[f64], row: u64, col: u64| {
            let (row, col) = if side.transposed { (col, row) } else { (row, col) };
            assert!(row < side.rows && col < side.cols);
            memory[(row + col * side.matrix.leading as u64) as usize]
        };
        for i in 0..plan.out.rows {
            for j in 0..plan.out.cols {
                let to = (i + j * plan.out.matrix.leading as u64) as usize;
                c[to] = (0..k).map(|p| at(&plan.x, x, i, p) * at(&plan.y, y, p, j)).sum();
            }
        }
    }

    #[test]
    fn every_combination_of_orders_is_the_same_product() {
        // Element (i, j) of a matrix is 10 i + j + 1; it lies where its order says.
        let memory = |rows: usize, cols: usize, row_major: bool| {
            let mut out = vec![0.0; rows * cols];
            for i in 0..rows {
                for j in 0..cols {
                    out[if row_major { i * cols + j } else { i + j * rows }] =
                        (10 * i + j + 1) as f64;
                }
            }
            out
        };
        for bits in 0..8 {
            let [a, b, c] = [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0];
            let spec = spec(a, b, c);
            let mut got = vec![0.0; 6];
            multiply(&Plan::of(&spec), spec.k, &memory(2, 4, a), &memory(4, 3, b), &mut got);
            for i in 0..2 {
                for j in 0..3 {
                    let want: usize = (0..4).map(|p| (10 * i + p + 1) * (10 * p + j + 1)).sum();
                    let at = if c { i * 3 + j } else { i + j * 2 };
                    assert_eq!(got[at], want as f64, "orders {a} {b} {c}, element {i} {j}");
                }
            }
        }
    }

    #[test]
    fn structures_are_as_large_as_the_library_s() {
        assert_eq!((size_of::<Algorithm>(), size_of::<Heuristic>()), (64, 96));
    }
}
