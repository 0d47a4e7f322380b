//! Products on a device, against float64. Without a device, each test says that it was skipped; with
//! `TILEWRIGHT_REQUIRE_GPU=1` it fails instead.

use tilewright_base::DType;
use tilewright_cuda::{Gpu, Nvrtc, Stream};
use tilewright_data::Tensor;
use tilewright_kernels::gemm::{GemmSpec, Math, Order};
use tilewright_launch::{Loader, Operand};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, StoreKind, lower};

fn loader() -> Option<Loader> {
    let open = || Ok::<_, tilewright_base::Error>(Loader::new(Gpu::open(0)?, Nvrtc::open(None)?));
    match open() {
        Ok(loader) if loader.gpu().properties().major == 9 => Some(loader),
        Ok(_) => {
            println!("skipped: the device is not Hopper");
            None
        }
        Err(error) => {
            let required = std::env::var("TILEWRIGHT_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(!required, "{error:?}");
            println!("skipped: no device");
            None
        }
    }
}

/// A matrix on host and device, with `leading` elements between lines.
struct Matrix {
    rows: usize,
    cols: usize,
    order: Order,
    leading: usize,
}

impl Matrix {
    fn new(rows: usize, cols: usize, order: Order, pad: usize) -> Matrix {
        let along = if order == Order::Row { cols } else { rows };
        Matrix { rows, cols, order, leading: along.next_multiple_of(16) + pad }
    }

    fn len(&self) -> usize {
        self.leading * if self.order == Order::Row { self.rows } else { self.cols }
    }

    fn at(&self, i: usize, j: usize) -> usize {
        if self.order == Order::Row { i * self.leading + j } else { i + j * self.leading }
    }

    /// Small values with few bits, the gaps filled with something that would show.
    fn filled(&self, dtype: DType, seed: usize) -> Tensor {
        let mut values = vec![100.0; self.len()];
        for i in 0..self.rows {
            for j in 0..self.cols {
                let mixed = (i * 7919 + j * 104_729 + seed * 1_299_709) % 1009;
                values[self.at(i, j)] = (mixed % 17) as f64 - 8.0;
            }
        }
        Tensor::from_f64s(dtype, &[self.len()], &values).unwrap()
    }
}

fn sums_of(operand: DType) -> (DType, DType) {
    match operand {
        DType::I8 => (DType::I32, DType::I32),
        DType::F8E4M3 => (DType::F32, DType::BF16),
        // Wide results show every sum exactly.
        _ => (DType::F32, DType::F32),
    }
}

/// Runs one product with these orders and compares every element with the exact sum. Operands are
/// integers from -8 to 8, so that every product and every sum of a float type is exact.
fn check(
    loader: &Loader,
    stream: &Stream,
    operand: DType,
    orders: [Order; 3],
    [m, n, k]: [usize; 3],
    store: StoreKind,
    cluster: u32,
) {
    let (sum, result) = sums_of(operand);
    let math = if operand == DType::F32 { Math::Tf32 } else { Math::Exact };
    let [a, b, c] = orders;
    let spec = GemmSpec { math, a, b, c, ..GemmSpec::plain(operand, sum, result) };
    let bk = 128 / operand.size() as i64;
    let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", bk)]);
    (schedule.store, schedule.cluster) = (store, cluster);
    let program = lower(&spec.program("gemm"), &schedule).unwrap();
    let kernel = loader.load(&program).unwrap_or_else(|e| panic!("{e:?}"));
    let a = Matrix::new(m, k, orders[0], 0);
    let b = Matrix::new(k, n, orders[1], 16);
    let c = Matrix::new(m, n, orders[2], 32);
    let (host_a, host_b) = (a.filled(operand, 1), b.filled(operand, 2));
    let device_a = stream.upload(host_a.bytes()).unwrap();
    let device_b = stream.upload(host_b.bytes()).unwrap();
    let device_c = stream.alloc(c.len() * result.size()).unwrap();
    device_c.poison(stream).unwrap();
    let list =
        [("M", m), ("N", n), ("K", k), ("lda", a.leading), ("ldb", b.leading), ("ldc", c.leading)];
    let sizes: Env = list.iter().map(|(name, v)| ((*name).into(), *v as i64)).collect();
    let buffers = [&device_a, &device_b, &device_c];
    let operands = buffers.map(|b| Operand { address: b.address(), bytes: b.len() as u64 });
    let bound = kernel.bind(&sizes, &operands).unwrap_or_else(|e| panic!("{e:?}"));
    // SAFETY: the buffers live to the end of this function, which waits for the stream.
    unsafe { bound.launch(stream).unwrap() };
    let got = device_c.to_vec(stream).unwrap();
    let (wide_a, wide_b) = (host_a.to_f64s(), host_b.to_f64s());
    let what = format!("{operand} {orders:?} {m}x{n}x{k} {store:?} cluster {cluster}");
    let got = Tensor::new(result, [c.len()], tilewright_data::Bytes::copy_from(&got)).unwrap();
    let mut inside = vec![false; c.len()];
    for i in 0..m {
        for j in 0..n {
            let exact: f64 = (0..k).map(|p| wide_a[a.at(i, p)] * wide_b[b.at(p, j)]).sum();
            // Rounded once, to the result's type.
            let want = Tensor::from_f64s(result, &[1], &[exact]).unwrap().get_f64(0);
            let at = c.at(i, j);
            inside[at] = true;
            assert_eq!(got.get_f64(at), want, "{what}: element ({i}, {j})");
        }
    }
    let size = result.size();
    for (at, _) in inside.iter().enumerate().filter(|(_, inside)| !**inside) {
        let bytes = &got.bytes()[at * size..][..size];
        assert!(bytes.iter().all(|b| *b == 0xff), "{what}: wrote outside, at {at}");
    }
}

const ROW: Order = Order::Row;
const COL: Order = Order::Col;

#[test]
fn products_of_every_type_are_exact_on_small_integers() {
    let Some(loader) = loader() else { return };
    let stream = loader.gpu().stream().unwrap();
    for operand in [DType::BF16, DType::F16, DType::F32, DType::I8, DType::F8E4M3] {
        let stores = [StoreKind::Tma, StoreKind::Direct];
        for (store, cluster) in stores.iter().flat_map(|s| [(*s, 1), (*s, 2)]) {
            for [m, n, k] in [[128_usize, 128, 64], [129, 127, 65], [1, 1, 1], [257, 130, 200]] {
                // The copy engine stores whole units of 16 bytes.
                let n = if store == StoreKind::Tma { n.next_multiple_of(16) } else { n };
                let shape = [m, n, k];
                check(&loader, &stream, operand, [ROW, COL, ROW], shape, store, cluster);
            }
        }
    }
}

#[test]
fn every_order_of_the_operands_is_the_same_product() {
    let Some(loader) = loader() else { return };
    let stream = loader.gpu().stream().unwrap();
    for a in [ROW, COL] {
        for b in [ROW, COL] {
            for c in [ROW, COL] {
                let shape = [130, 200, 97];
                check(&loader, &stream, DType::BF16, [a, b, c], shape, StoreKind::Direct, 1);
            }
        }
    }
}

#[test]
fn a_program_is_compiled_once_and_a_bad_schedule_gives_way() {
    let Some(loader) = loader() else { return };
    let kernel = GemmSpec::plain(DType::BF16, DType::F32, DType::BF16).program("gemm");
    let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", 64)]);
    let good = lower(&kernel, &schedule).unwrap();
    let first = loader.load(&good).unwrap();
    assert!(std::ptr::eq(first.program(), loader.load(&good).unwrap().program()));
    assert_eq!(u64::from(first.clusters_at_once()), u64::from(loader.gpu().properties().sm_count));
    // More stages than a multiprocessor has shared memory for.
    schedule.stages = 16;
    let large = lower(&kernel, &schedule);
    let taken = loader.load_or_next([large, Ok(good)], |kernel| Ok(kernel.clone())).unwrap();
    assert_eq!((taken.index, taken.failures.len()), (1, 1));
    assert!(taken.failures[0].message().contains("shared memory"), "{:?}", taken.failures[0]);
}

#[test]
fn what_does_not_compile_is_kept_with_its_log_and_gives_way() {
    let Some(loader) = loader() else { return };
    let loader = loader.failing_first(1);
    let kernel = GemmSpec::plain(DType::BF16, DType::F32, DType::BF16).program("gemm");
    let program = |bn| lower(&kernel, &GpuSchedule::hopper(&[("BM", 128), ("BN", bn), ("BK", 64)]));
    let (bad, good) = (program(64).unwrap(), program(128).unwrap());
    let taken = loader.load_or_next([Ok(bad), Ok(good)], |kernel| Ok(kernel.clone())).unwrap();
    assert_eq!((taken.index, taken.failures.len()), (1, 1));
    let failure = format!("{:?}", taken.failures[0]);
    println!("{failure}");
    let folder = failure.split("the text is in ").nth(1).and_then(|rest| rest.lines().next());
    let folder = std::path::Path::new(folder.unwrap_or_else(|| panic!("no folder in {failure}")));
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    assert!(text("kernel.cu").starts_with("#error"));
    // The compiler's log is part of the error.
    assert!(failure.contains("error:"), "{failure}");
}
