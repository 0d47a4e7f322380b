//! The text form of kernels and schedules: what prints is read back, and bad text is an error.

use tilewright_base::DType;
use tilewright_expr::{Func, Value};
use tilewright_layout::{Dim, Layout, Range, Symbol};
use tilewright_tile::*;

const KERNELS: [&str; 4] = [
    include_str!("kernels/gemm.tile"),
    include_str!("kernels/softmax.tile"),
    include_str!("kernels/attention.tile"),
    include_str!("kernels/conv.tile"),
];

fn parse(text: &str) -> Kernel {
    Kernel::parse("<test>", text).unwrap_or_else(|e| panic!("{e:?}\n{text}"))
}

/// The post-condition of the parser: the printed text is read back to a kernel that prints the same,
/// and to that very kernel once its tiles are numbered in the order of the text.
fn comes_back(kernel: &Kernel) {
    let text = kernel.to_string();
    let again = parse(&text);
    assert_eq!(again.to_string(), text);
    assert_eq!(again.name, kernel.name);
    assert_eq!(again.params, kernel.params);
    assert_eq!(again.symbols, kernel.symbols);
    assert_eq!((&again.tiles, &again.grid), (&kernel.tiles, &kernel.grid));
    assert_eq!(again.bounds, kernel.bounds);
    assert_eq!(again.values.len(), kernel.values.len());
    assert_eq!(parse(&again.to_string()), again);
}

#[test]
fn the_kernel_of_the_book_is_one() {
    let page = include_str!("../../../docs/src/languages.md");
    let start = page.find("kernel @").unwrap();
    let kernel = parse(page[start..].split("```").next().unwrap());
    verify(&kernel).unwrap_or_else(|e| panic!("{e:?}\n{kernel}"));
    comes_back(&kernel);
}

#[test]
fn written_kernels_are_well_formed_and_come_back() {
    for text in KERNELS {
        let kernel = parse(text);
        verify(&kernel).unwrap_or_else(|e| panic!("{e:?}\n{kernel}"));
        comes_back(&kernel);
    }
}

#[test]
fn a_kernel_prints_as_it_is_usually_written() {
    let text = "kernel @odd(%A: u64[N,8] at (N,8):(8,1)+N - 3, inout %B: bf16[M,5] at \
                (M,(2,4)):(4,(4*M,1)))\n    sizes(N in 0.., M in -3..=7)\n    tile(T >= 2 divides 64 == 4, U) grid() {\n  \
                %0 = full nan : f16[]\n  %1 = load %A[0, min(M, N)] step (-1,1) fill \
                18446744073709551615 : u64[T,1]\n  %2 = broadcast %0 along () : f16[T]\n  \
                %3 = random seed 18446744073709551615 from M*N : f16[T]\n  \
                %s = scan sum %3 axis 0 exclusive reverse : f16[T]\n  \
                %5 = arg max %s axis 0 limit ceil(N/2) last : i64[]\n  \
                %6, %7 = if N - 1 <= (M % 4) {\n    yield %2, %s\n  } else {\n    \
                yield %s, %2\n  }\n  atomic_add %B[T, 0 - N], %1\n}";
    let kernel = parse(text);
    assert_eq!(kernel.to_string(), text.replace("0 - N", "-N"));
    assert_eq!(kernel.params[ParamId(1)].layout, {
        let mut layout = Layout::panels(&[Dim::sym("M"), Dim::new(5)], 1, 4);
        layout.axes[1].stride = Dim::sym("M") * 4;
        layout
    });
    comes_back(&kernel);
}

#[test]
fn the_sizes_of_the_shapes_are_declared_when_none_are() {
    let kernel = parse("kernel @k(%A: f32[N,2*M], out %B: f32[K*N]) tile() grid() {}");
    let names: Vec<&str> = kernel.symbols.iter().map(|s| &*s.name).collect();
    assert_eq!(names, ["N", "M", "K"]);
    assert_eq!(kernel.symbols[0].range, Range { min: 0, max: i64::MAX });
}

#[test]
fn errors_point_at_their_place() {
    let head = "kernel @k(%A: f32[N], out %B: f32[N]) tile(T) grid(p in N) {\n";
    for (body, marked, message) in [
        ("%x = full 1 : f32[Q]", "Q", "`Q` is not declared"),
        ("%x = full 1.5 : i32[T]", "1.5", "`1.5` is not a number of type i32"),
        ("%x = full 1 : f33[T]", "f33", "`f33` is not an element type"),
        ("%x = load %C[0] : f32[T]", "C", "no parameter is called `%C`"),
        ("%x = reshape %y : f32[T]", "y", "no tile is called `%y`"),
        ("%x = reshape %A : f32[T]", "A", "`%A` is a parameter: load it first"),
        ("%x = reshape %x : f32[T]", "x", "`%x` cannot be seen here"),
        ("%x = fold %x : f32[T]", "fold", "no operation is called `fold`"),
        ("%1x = full 1 : f32[T]", "1x", "a tile is called by a number or by a name"),
        ("%x = full 1 : f32[T] %x = full 1 : f32[T]", "x", "`%x` is defined twice"),
        ("for i in 0..T { %x = full 1 : f32[T] } store %B[0], %x", "x", "`%x` cannot be seen here"),
        ("for T in 0..4 { }", "T", "`T` is declared twice"),
        ("for i in i..4 { }", "i", "`i` is not declared"),
        (
            "%x = for i in 0..4 { }",
            "%x = for i in 0..4 { }}",
            "1 results, but the loop carries 0 tiles",
        ),
        ("yield %x", "x", "no tile is called `%x`"),
        ("%x = map() { -> y } : f32[T]", "y", "`y` is not known"),
        ("%x = load %A[0 : f32[T]", ":", "expected `,`, found `:`"),
        ("store %B[1/0], %x", "1/0", "division by zero in size `1/0`"),
        ("%x = map() { -> f32(1) : f32[T]", "{", "this `{` is not closed"),
    ] {
        let text = format!("{head}{body}}}");
        // The text that is marked ends where the line does.
        let error = Kernel::parse("<test>", &text).expect_err(body);
        let span = error.span().expect(body);
        let found = &text[span.start..span.start + span.len];
        if body.ends_with("f32(1) : f32[T]") {
            assert!(error.message().len() > 5, "{error:?}");
            continue;
        }
        assert_eq!((found, error.message()), (marked, message), "{body}");
    }
    let deep = "for i in 0..1 {".repeat(100_000);
    assert!(Kernel::parse("<test>", &format!("{head}{deep}")).is_err());
}

#[test]
fn a_schedule_comes_back() {
    let mut schedule = Schedule { cpu: CpuKnobs::avx512(), ..Schedule::default() };
    assert_eq!(Schedule::parse("<test>", &schedule.to_string()).unwrap(), schedule);
    schedule.tiles.insert("BM".into(), 64);
    schedule.tiles.insert("B.2".into(), -1);
    let text = "B.2=-1 BM=64 vector=512 mma=14x2 unroll=2 chains=4";
    assert_eq!(schedule.to_string(), text);
    assert_eq!(Schedule::parse("<test>", text).unwrap(), schedule);
    assert_eq!(Schedule::parse("<test>", "").unwrap(), Schedule::default());
    (schedule.cpu.stream, schedule.cpu.ahead) = (true, true);
    assert_eq!(schedule.to_string(), format!("{text} stream=1 ahead=1"));
    assert_eq!(Schedule::parse("<test>", &schedule.to_string()).unwrap(), schedule);
    for unit in MatrixUnit::ALL {
        schedule.cpu.unit = unit;
        let text = schedule.to_string();
        assert_eq!(text.contains("unit="), unit != MatrixUnit::Fma, "{text}");
        assert_eq!(Schedule::parse("<test>", &text).unwrap(), schedule);
    }
    for bad in [
        "stream=2",
        "unit=",
        "unit=4",
        "unit=best",
        "BM",
        "BM=",
        "BM=x",
        "4=4",
        "mma=6",
        "mma=6x",
        "vector=-1",
        "BM=1 BM=2",
        "BM=1,",
    ] {
        assert!(Schedule::parse("<test>", bad).is_err(), "{bad}");
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// An expression over these.
    fn dim(&mut self, of: &[Dim]) -> Dim {
        let (a, b) = (self.pick(of), self.pick(of));
        let c = Dim::new(self.below(9) as i64 - 4);
        match self.below(8) {
            0 => a,
            1 => a + b * c,
            2 => a.ceil_div(&b),
            3 => (a + c).floor_div(&Dim::new(4)),
            4 => (a + c).modulo(&b),
            5 => a.min_with(&(b + c)),
            6 => a * b + c,
            _ => c,
        }
    }
}

/// A random well-formed kernel: every operation, loops within loops, a branch at the end.
fn random_kernel(seed: u64) -> Kernel {
    let mut r = Random(seed);
    let mut b = KernelBuilder::new(format!("k{seed}"));
    let sizes: Vec<Dim> = ["N", "M", "batch.1"].map(Dim::sym).into();
    for name in ["N", "M", "batch.1"] {
        let max = r.pick(&[64, i64::MAX]);
        b.symbol(Symbol { name: name.into(), range: Range { min: 0, max } });
    }
    let tiles: Vec<Dim> = ["S", "T"].map(|t| b.tile(t)).into();
    let extent = r.dim(&sizes);
    let mut ints = [sizes.clone(), tiles.clone()].concat();
    ints.push(b.grid("p", extent));
    let rows = r.dim(&sizes).max_with(&Dim::new(0));
    let shape = [rows, sizes[0].clone()];
    let layout = match r.below(4) {
        0 => Layout::row_major(&shape),
        1 => Layout::row_major(&shape).permute(&[1, 0]),
        2 => Layout::panels(&shape, 1, 16),
        _ => Layout { offset: r.dim(&sizes), ..Layout::blocked(&shape, 0, 8) },
    };
    let dtype = r.pick(&[DType::F32, DType::BF16, DType::F64]);
    let x = b.param("X", dtype, layout.clone(), Access::In);
    let y = b.param("Y", dtype, layout, Access::InOut);
    // All tiles are S by T, so that each fits everywhere.
    let tile = TileType::new(dtype, tiles.clone());
    let mut live = vec![b.full(Value::Float(r.pick(&[0.0, -1.5, f64::INFINITY])), tile.clone())];
    let mut open: Vec<usize> = Vec::new();
    for step in 0..20 {
        let at = r.pick(&live);
        let value = r.pick(&[Value::Float(0.0), Value::Float(-0.0), Value::Float(f64::NAN)]);
        let index = vec![r.dim(&ints), r.dim(&ints)];
        let bound = r.dim(&ints);
        let limit = r.pick(&[None, Some(bound)]);
        let kind = r.pick(&[ReduceKind::Sum, ReduceKind::Prod, ReduceKind::Max, ReduceKind::Min]);
        let new = match r.below(14) {
            0 => b.load(x, index, tiles.clone()),
            1 => b.load_with(x, index, vec![r.pick(&[1, -2]), 3], value, tiles.clone()),
            2 => {
                let rows = b.iota(DType::I32, 0, r.dim(&ints), vec![tiles[0].clone()]);
                b.gather(y, 0, rows, index, tiles.clone())
            }
            3 => {
                let func = Func::parse("{ x, v -> fma(x, v, 1e-3) * x }", &[dtype; 2]).unwrap();
                let sum = b.reduce(kind, at, 0, limit);
                let args = vec![b.plain(at), Operand { tile: sum, along: vec![1] }];
                b.map(func, args, tiles.clone())
            }
            4 => b.scan(kind, at, r.below(2), r.below(2) == 0, r.below(2) == 0),
            5 => {
                let row = b.reduce(kind, at, 1, limit.clone());
                let one = b.reduce(kind, row, 0, limit);
                b.broadcast(b.plain(one), tiles.clone())
            }
            6 => {
                let kind = r.pick(&[ReduceKind::Max, ReduceKind::Min]);
                let at = b.arg_reduce(kind, at, r.below(2), limit, r.below(2) == 0);
                b.name(at, format!("arg{step}"));
                continue;
            }
            7 => {
                let square =
                    b.full(value, TileType::new(dtype, [tiles[1].clone(), tiles[1].clone()]));
                b.mma(at, at, square, limit)
            }
            8 => {
                let flipped = b.permute(at, &[1, 0]);
                b.permute(flipped, &[1, 0])
            }
            9 => {
                let flat = b.reshape(at, vec![&tiles[0] * &tiles[1]]);
                b.reshape(flat, tiles.clone())
            }
            10 => b.random(dtype, r.below(usize::MAX) as u64, r.dim(&ints), tiles.clone()),
            11 => {
                b.store(y, index.clone(), at);
                b.atomic_add(y, index, at);
                continue;
            }
            12 if open.len() < 4 => {
                let var = format!("i{}", open.len());
                let carry: Vec<TileId> = (0..r.below(3)).map(|_| r.pick(&live)).collect();
                let (lo, hi) = (r.dim(&ints), r.dim(&ints));
                let (var, inner) = b.begin_for(&var, lo, hi, &carry);
                ints.push(var);
                open.push(live.len());
                // The innermost loop's carried tiles are found again by the count.
                live.extend(&inner);
                open.push(inner.len());
                continue;
            }
            13 if !open.is_empty() => {
                close(&mut b, &mut r, &mut live, &mut open, &mut ints);
                continue;
            }
            _ => b.iota(dtype, r.below(2), r.dim(&ints), tiles.clone()),
        };
        if r.below(3) == 0 {
            b.name(new, format!("t{step}"));
        }
        live.push(new);
    }
    while !open.is_empty() {
        close(&mut b, &mut r, &mut live, &mut open, &mut ints);
    }
    let mut kernel = b.finish();
    let result = kernel.values.push(TileInfo { name: String::new(), ty: tile });
    let yields = [r.pick(&live), r.pick(&live)];
    kernel.body.stmts.push(Stmt::If(Box::new(If {
        lhs: r.dim(&ints),
        compare: r.pick(&[Compare::Lt, Compare::Le, Compare::Eq, Compare::Ne]),
        rhs: r.dim(&ints),
        then: Block::default(),
        then_yields: vec![yields[0]],
        otherwise: Block::default(),
        otherwise_yields: vec![yields[1]],
        results: vec![result],
    })));
    kernel
}

fn close(
    b: &mut KernelBuilder,
    r: &mut Random,
    live: &mut Vec<TileId>,
    open: &mut Vec<usize>,
    ints: &mut Vec<Dim>,
) {
    let (n_carried, outside) = (open.pop().unwrap(), open.pop().unwrap());
    let yields: Vec<TileId> = (0..n_carried).map(|_| r.pick(live)).collect();
    live.truncate(outside);
    live.extend(b.end_for(&yields));
    ints.pop();
}

#[test]
fn random_kernels_are_well_formed_and_come_back() {
    for seed in 0..500 {
        let kernel = random_kernel(seed);
        verify(&kernel).unwrap_or_else(|e| panic!("{e:?}\n{kernel}"));
        comes_back(&kernel);
    }
}

/// Texts of pieces of kernels in random order, and kernels with random bytes changed.
#[test]
fn garbage_is_an_error_and_no_panic() {
    let words: Vec<&str> =
        KERNELS.iter().flat_map(|k| k.split_inclusive([' ', '(', '['])).collect();
    let mut r = Random(7);
    for round in 0..4000 {
        let mut text = match round % 2 {
            0 => KERNELS[0][..40].to_string(),
            _ => r.pick(&KERNELS).to_string(),
        };
        if round % 2 == 0 {
            (0..r.below(60)).for_each(|_| text += words[r.below(words.len())]);
        } else {
            let mut bytes = text.into_bytes();
            for _ in 0..1 + r.below(4) {
                let at = r.below(bytes.len());
                bytes[at] = r.below(256) as u8;
            }
            text = String::from_utf8_lossy(&bytes).into_owned();
        }
        if let Ok(kernel) = Kernel::parse("<garbage>", &text) {
            // What is wrong with it is reported, and it prints.
            if verify(&kernel).is_ok() {
                comes_back(&kernel);
            }
        }
    }
}
