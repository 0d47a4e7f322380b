//! Arguments of products under Hopper's schedules, without a device.

use super::*;
use tilewright_base::{DType, Kind};
use tilewright_cuda::WindowBox;
use tilewright_emit_cuda::emit;
use tilewright_kernels::gemm::{GemmSpec, Math, Order, Windows};
use tilewright_lower_gpu::{GpuSchedule, StoreKind, lower};

fn program(spec: &GemmSpec, store: StoreKind) -> Program {
    let bk = 128 / spec.operand.size() as i64;
    let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", bk)]);
    schedule.store = store;
    lower(&spec.program("gemm"), &schedule).unwrap()
}

fn sizes(list: &[(&str, i64)]) -> Env {
    list.iter().map(|(name, value)| ((*name).into(), *value)).collect()
}

fn bind(program: &Program, sizes: &Env, operands: &[Operand]) -> Result<Arguments> {
    arguments(program, &emit(program).unwrap().arguments, sizes, operands)
}

fn at(addresses: &[u64]) -> Vec<Operand> {
    addresses.iter().map(|address| Operand { address: *address, bytes: 1 << 40 }).collect()
}

fn maps(arguments: &Arguments) -> Vec<&TensorMapSpec> {
    arguments
        .values
        .iter()
        .filter_map(|v| if let Value::Map(spec) = v { Some(spec) } else { None })
        .collect()
}

fn bf16() -> GemmSpec {
    GemmSpec::plain(DType::BF16, DType::F32, DType::BF16)
}

#[test]
fn a_row_major_product_by_hand() {
    let program = program(&bf16(), StoreKind::Tma);
    let sizes =
        sizes(&[("M", 1000), ("N", 520), ("K", 640), ("lda", 648), ("ldb", 520), ("ldc", 528)]);
    let bound = bind(&program, &sizes, &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    assert_eq!(bound.items, 8 * 5);
    let maps = maps(&bound);
    let rows: Vec<_> =
        maps.iter().map(|m| (m.address, m.sizes.clone(), m.strides_bytes.clone())).collect();
    assert_eq!(
        rows,
        [
            (0x1000, vec![640, 1000], vec![1296]),
            (0x2000, vec![520, 640], vec![1040]),
            (0x3000, vec![520, 1000], vec![1056]),
        ]
    );
    // 64 elements of 2 bytes are a swizzle's span; a tile of A has 128 rows.
    assert_eq!((maps[0].box_sizes.clone(), maps[0].swizzle), (vec![64, 128], Swizzle::B128));
    let numbers: Vec<i32> = bound
        .values
        .iter()
        .filter_map(|v| if let Value::Size(n) = v { Some(*n) } else { None })
        .collect();
    assert_eq!(numbers, [1000, 520, 640, 648, 520, 528]);
}

#[test]
fn a_column_major_operand_has_its_rows_innermost() {
    let spec = GemmSpec { b: Order::Col, ..bf16() };
    let program = program(&spec, StoreKind::Tma);
    let sizes = sizes(&[("M", 8), ("N", 24), ("K", 16), ("lda", 16), ("ldb", 32), ("ldc", 24)]);
    let bound = bind(&program, &sizes, &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    let b = maps(&bound)[1];
    assert_eq!((b.sizes.clone(), b.strides_bytes.clone()), (vec![16, 24], vec![64]));
}

#[test]
fn windows_have_four_dimensions_and_the_corners_of_their_outputs() {
    // 3x3 taps two apart over images of 9 x 14 with one row and two columns of zeros before: steps 2 and 1.
    let windows = Windows { taps: [3, 3], steps: [2, 1], before: [1, 2], dilations: [2, 1] };
    let spec = GemmSpec { b: Order::Col, windows: Some(windows), ..bf16() };
    let program = program(&spec, StoreKind::Tma);
    let of = [("M", 3 * 4 * 14), ("N", 24), ("K", 64), ("lda", 72), ("ldb", 576), ("ldc", 24)];
    let mut of = sizes(&of);
    of.extend(sizes(&[("R", 3 * 9 * 14), ("H", 9), ("W", 14), ("P", 4), ("Q", 14)]));
    let bound = bind(&program, &of, &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    let a = maps(&bound)[0];
    assert_eq!(a.sizes, [64, 14, 9, 3]);
    assert_eq!(a.strides_bytes, [144, 144 * 14, 144 * 14 * 9]);
    assert_eq!(
        (&a.box_sizes[..], &a.element_strides[..]),
        (&[64, 128, 1, 1][..], &[1, 1, 2, 1][..])
    );
    // Columns first. The last window begins at column 13 - 2 of 13, and at row 3 * 2 - 1 of 8.
    assert_eq!(a.windows, Some(WindowBox { lower: [-2, -1], upper: [-2, -3] }));
    let b = maps(&bound)[1];
    assert_eq!((&b.sizes[..], &b.strides_bytes[..]), (&[64, 24, 9][..], &[1152, 128][..]));
    // Pixels that are no whole images.
    of.extend(sizes(&[("R", 3 * 9 * 14 + 1)]));
    let error = bind(&program, &of, &at(&[0x1000, 0x2000, 0x3000])).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
}

#[test]
fn f32_operands_are_rounded_to_tf32_and_results_are_not() {
    let plain = GemmSpec::plain(DType::F32, DType::F32, DType::F32);
    let program = program(&GemmSpec { math: Math::Tf32, b: Order::Col, ..plain }, StoreKind::Tma);
    let sizes = sizes(&[("M", 8), ("N", 8), ("K", 8), ("lda", 8), ("ldb", 8), ("ldc", 8)]);
    let bound = bind(&program, &sizes, &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    let elements: Vec<_> = maps(&bound).iter().map(|m| m.element).collect();
    assert_eq!(elements, [MapElement::TF32, MapElement::TF32, MapElement::F32]);
}

#[test]
fn batches_that_repeat_and_single_rows_have_legal_maps() {
    let program = program(&GemmSpec { batched: true, ..bf16() }, StoreKind::Tma);
    let list = [
        ("L", 3),
        ("M", 1),
        ("N", 64),
        ("K", 64),
        // One row: its distance to the next means nothing.
        ("lda", 7),
        ("ldb", 64),
        ("ldc", 64),
        ("sa", 64),
        // One B for all.
        ("sb", 0),
        ("sc", 64),
    ];
    let bound = bind(&program, &sizes(&list), &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    let maps = maps(&bound);
    assert_eq!(maps[0].sizes, [64, 1, 3]);
    assert_eq!(maps[0].strides_bytes, [16, 128]);
    assert_eq!(maps[1].strides_bytes, [128, 0]);
    for map in maps {
        assert_eq!(map.problem(), None);
    }
}

#[test]
fn what_the_copy_engine_cannot_address_is_said_in_words() {
    let tma = program(&bf16(), StoreKind::Tma);
    let even = [("M", 64), ("N", 64), ("K", 64), ("lda", 64), ("ldb", 64), ("ldc", 64)];
    let with = |name: &str, value: i64| {
        let list: Vec<_> =
            even.iter().map(|(n, v)| (*n, if *n == name { value } else { *v })).collect();
        sizes(&list)
    };
    let good = at(&[0x1000, 0x2000, 0x3000]);
    let refused = |sizes: &Env, operands: &[Operand], words: &str| {
        let error = bind(&tma, sizes, operands).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains(words), "{error:?}");
    };
    assert!(bind(&tma, &with("", 0), &good).is_ok());
    refused(&with("lda", 65), &good, "axis 0 of A are 130 bytes apart");
    refused(&with("ldc", 68), &good, "axis 0 of C are 136 bytes apart");
    refused(&with("", 0), &at(&[0x1008, 0x2000, 0x3000]), "A starts at 0x1008");
    // Stores from registers have no such limits.
    let direct = program(&bf16(), StoreKind::Direct);
    assert!(bind(&direct, &with("ldc", 67), &at(&[0x1000, 0x2000, 0x3002])).is_ok());
}

#[test]
fn what_does_not_fit_the_program_is_a_bug() {
    let program = program(&bf16(), StoreKind::Direct);
    let even = [("M", 64), ("N", 64), ("K", 64), ("lda", 64), ("ldb", 64), ("ldc", 64)];
    let good = at(&[0x1000, 0x2000, 0x3000]);
    let bug = |list: &[(&str, i64)], operands: &[Operand], words: &str| {
        let error = bind(&program, &sizes(list), operands).unwrap_err();
        assert_eq!(error.kind(), Kind::Bug);
        assert!(error.message().contains(words), "{error:?}");
    };
    bug(&even[..5], &good, "no value for the size ldc");
    bug(&even, &good[..2], "2 operands for 3 tensors");
    bug(&even, &at(&[0x1000, 0x2000, 0x3001]), "splits its elements");
    let mut short = good.clone();
    short[1].bytes = 64 * 64 * 2 - 1;
    bug(&even, &short, "B takes 8192 bytes, its operand has 8191");
    short[1].bytes += 1;
    assert!(bind(&program, &sizes(&even), &short).is_ok());
    let mut list = even;
    list[2].1 = 0;
    bug(&list, &good, "size K is 0, and the kernel takes 1 to");
    list[2].1 = 1 << 31;
    bug(&list, &good, "31 bits");
}

#[test]
fn an_empty_result_is_no_launch() {
    let program = program(&bf16(), StoreKind::Tma);
    let list = [("M", 0), ("N", 64), ("K", 0), ("lda", 64), ("ldb", 64), ("ldc", 64)];
    let nothing = [Operand { address: 0, bytes: 0 }; 3];
    let bound = bind(&program, &sizes(&list), &nothing).unwrap();
    assert_eq!(bound, Arguments { values: Vec::new(), items: 0 });
}

/// A tensor map starts at the first element of a layout, a pointer where the layout counts from: the text
/// adds the offset.
#[test]
fn offsets_of_layouts_are_in_maps_and_not_in_pointers() {
    let mut kernel = bf16().program("gemm");
    let params: Vec<_> = kernel.params.ids().collect();
    for id in params {
        kernel.params[id].layout.offset = Dim::new(64);
    }
    let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", 64)]);
    schedule.store = StoreKind::Direct;
    let program = lower(&kernel, &schedule).unwrap();
    let even = [("M", 64), ("N", 64), ("K", 64), ("lda", 64), ("ldb", 64), ("ldc", 64)];
    let bound = bind(&program, &sizes(&even), &at(&[0x1000, 0x2000, 0x3000])).unwrap();
    let addresses: Vec<u64> = maps(&bound).iter().map(|m| m.address).collect();
    assert_eq!(addresses, [0x1080, 0x2080]);
    assert!(bound.values.contains(&Value::Pointer(0x3000)));
    let result = tilewright_tile::ParamId(2);
    kernel.params[result].layout.offset = Dim::new(0);
    let without = lower(&kernel, &schedule).unwrap();
    let text = |program: &Program| emit(program).unwrap().text;
    assert_ne!(text(&program), text(&without), "the offset of C stands in the text");
}

/// Views that run backwards begin at their last element in memory: a pointer takes them, the copy engine does not.
#[test]
fn tensors_may_run_backwards_within_their_operand() {
    let mut kernel = bf16().program("gemm");
    let result = tilewright_tile::ParamId(2);
    let turn = |kernel: &mut tilewright_tile::Kernel, offset: i64| {
        kernel.params[result].layout.offset = Dim::new(offset);
        kernel.params[result].layout.axes[0].stride = Dim::new(-64);
    };
    let mut schedule = GpuSchedule::hopper(&[("BM", 128), ("BN", 128), ("BK", 64)]);
    schedule.store = StoreKind::Direct;
    let even = [("M", 64), ("N", 64), ("K", 64), ("lda", 64), ("ldb", 64), ("ldc", 64)];
    let addresses = at(&[0x1000, 0x2000, 0x3000]);
    let mut bound = |offset: i64, schedule: &GpuSchedule| {
        turn(&mut kernel, offset);
        bind(&lower(&kernel, schedule).unwrap(), &sizes(&even), &addresses)
    };
    assert!(bound(63 * 64, &schedule).is_ok());
    let before = bound(62 * 64, &schedule).unwrap_err();
    assert!(before.message().contains("starts 64 elements before its operand"), "{before:?}");
    schedule.store = StoreKind::Tma;
    let maps = bound(63 * 64, &schedule).unwrap_err();
    assert!(maps.message().contains("axis 0 of C runs backwards"), "{maps:?}");
}

/// A copy of a row, and its sum.
fn copied_and_summed(extent: Dim) -> tilewright_tile::Kernel {
    let mut k = tilewright_tile::KernelBuilder::new("copied");
    let range = tilewright_layout::Range { min: 0, max: i32::MAX.into() };
    k.symbol(tilewright_layout::Symbol { name: "N".into(), range });
    let row = tilewright_layout::Layout::row_major(std::slice::from_ref(&extent));
    let one = tilewright_layout::Layout::row_major(&[Dim::new(1)]);
    let x = k.param("x", DType::F32, row.clone(), Access::In);
    let y = k.param("y", DType::F32, row, Access::Out);
    let s = k.param("s", DType::F32, one, Access::Out);
    let tile = k.tile("BN");
    k.grid("p", Dim::new(1));
    let t = k.load(x, vec![Dim::new(0)], vec![tile]);
    k.store(y, vec![Dim::new(0)], t);
    let sum = k.reduce(tilewright_tile::ReduceKind::Sum, t, 0, Some(extent));
    let sum = k.reshape(sum, vec![Dim::new(1)]);
    k.store(s, vec![Dim::new(0)], sum);
    k.finish()
}

/// A schedule for rows of 64 that is not held to them.
fn of_any_length(kernel: &tilewright_tile::Kernel) -> GpuSchedule {
    let arch = tilewright_device::Arch::Sm90a;
    let mut schedule = GpuSchedule::lines_for(kernel, arch, &|_| Some(64)).unwrap().unwrap();
    schedule.sizes.clear();
    schedule
}

#[test]
fn a_sum_of_nothing_is_written_beside_a_row_of_nothing() {
    let kernel = copied_and_summed(Dim::sym("N"));
    let program = lower(&kernel, &of_any_length(&kernel)).unwrap();
    for n in [0, 64] {
        let bound = bind(&program, &sizes(&[("N", n)]), &at(&[0x1000, 0x2000, 0x3000])).unwrap();
        assert_eq!(bound.items, 1, "{n}");
    }
}

#[test]
fn an_axis_of_more_than_31_bits_is_refused_by_name() {
    let schedule = of_any_length(&copied_and_summed(Dim::sym("N")));
    let program = lower(&copied_and_summed(Dim::new(3 << 30)), &schedule).unwrap();
    let error = bind(&program, &sizes(&[("N", 1)]), &at(&[0x1000, 0x2000, 0x3000])).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.message().contains("3221225472 elements along one axis"), "{error:?}");
}
