//! Each rule of the verifier, broken by a kernel that is otherwise well-formed.

use std::sync::Arc;
use tilewright_expr::Value;
use tilewright_layout::{Dim, Layout};
use tilewright_tile::*;

const HEAD: &str = "kernel @k(%A: f32[N,8], %I: i32[N], out %B: f32[N,8], inout %C: f32[N]) \
                    tile(S, T) grid(p in ceil(N/S)) {\n";
const BODY: &str = "%x = load %A[p*S, 0] : f32[S,T]\n%r = reduce sum %x axis 1 : f32[S]\n\
                    %n = iota axis 0 from 0 : i32[S]\n%e = full 1 : i32[S,T]\n";

fn parse(body: &str) -> Kernel {
    Kernel::parse("<test>", &format!("{HEAD}{BODY}{body}}}")).unwrap_or_else(|e| panic!("{e:?}"))
}

/// The violations found.
fn found(kernel: &Kernel) -> Vec<String> {
    verify(kernel).map_or_else(|e| e.notes().to_vec(), |()| Vec::new())
}

#[test]
fn what_is_right_passes() {
    let kernel =
        parse("store %B[p*S, 0], %x\natomic_add %C[p*S], %r\nfor k in 0..N {}\nfor k in 0..N {}\n");
    assert_eq!(found(&kernel), [""; 0]);
}

/// Rules that a text can break.
#[test]
fn operations_that_do_not_fit_are_reported() {
    for (body, message) in [
        // 2: scopes.
        ("%y = full 0 : f32[p]", "%y: `p` in `p` is not in scope"),
        ("%y = full 0 : f32[-1]", "%y: negative extent -1"),
        // 4: access, ranks, types, constants.
        ("%y = load %B[0, 0] : f32[S,T]", "%y: parameter B is Out"),
        ("store %A[0, 0], %x", "store: parameter A is In"),
        ("atomic_add %B[0, 0], %x", "atomic_add: parameter B is Out"),
        ("%y = load %A[0] : f32[S,T]", "%y: 1 coordinates in A of rank 2"),
        ("%y = load %A[0, 0] : f32[S]", "%y: a tile of rank 1 in A of rank 2"),
        ("%y = load %A[0, 0] : f64[S,T]", "%y: f64 in A of type f32"),
        ("%y = load %A[0, 0] step (1) : f32[S,T]", "%y: 1 steps for 2 coordinates"),
        ("store %B[0], %x", "store: 1 coordinates in B of rank 2"),
        ("store %B[0, 0], %r", "store of %r: a tile of rank 1 in B of rank 2"),
        ("store %B[0, 0], %e", "store of %e: i32 in B of type f32"),
        ("%y = full 300 : i8[S]", "%y: Int(300) does not fit i8"),
        ("%y = full -1 : u8[S]", "%y: Int(-1) does not fit u8"),
        // 5: maps and broadcasts.
        ("%y = map(%x) { x -> x > 0 } : f32[S,T]", "%y: the function gives bool, not f32"),
        ("%y = map(%r) { x -> x } : f32[S,T]", "%y: %r: f32[S] along 2 axes"),
        ("%y = map(%r along 1) { x -> x } : f32[S,T]", "%y: %r: extent S along axis 1 of extent T"),
        ("%y = map(%r along 2) { x -> x } : f32[S,T]", "%y: %r: f32[S,T] has no axis 2"),
        ("%y = map(%x along (1,0)) { x -> x } : f32[T,S]", "%y: %x: axes [1, 0] do not ascend"),
        ("%y = broadcast %x : f64[S,T]", "%y: broadcast of f32[S,T] to f64[S,T]"),
        ("%y = broadcast %r along 1 : f32[S,T]", "%y: %r: extent S along axis 1 of extent T"),
        // 6: reductions, scans, iota.
        ("%y = reduce sum %x axis 2 : f32[S]", "%y: f32[S,T] has no axis 2"),
        ("%y = reduce sum %x axis 0 : f32[S]", "%y: the result is f32[S], not f32[T]"),
        ("%y = reduce max %x axis 0 : i64[T]", "%y: the result is i64[T], not f32[T]"),
        ("%y = arg max %x axis 0 : i32[T]", "%y: the result is i32[T], not i64[T]"),
        ("%y = arg sum %x axis 0 : i64[T]", "%y: position of Sum"),
        ("%y = scan sum %x axis 2 : f32[S,T]", "%y: f32[S,T] has no axis 2"),
        ("%y = scan sum %x axis 0 : f32[T]", "%y: the result is f32[T], not f32[S,T]"),
        ("%y = iota axis 1 from 0 : f32[S]", "%y: f32[S] has no axis 1"),
        ("%y = iota axis 0 from 0 : bool[S]", "%y: iota of type bool"),
        // 7: matrix products.
        ("%y = mma %x, %x, %x : f32[S,T]", "%y: mma of f32[S,T], f32[S,T], f32[S,T]"),
        ("%b = full 0 : i32[T,T] %y = mma %x, %e, %b : f32[S,T]", "%y: mma in f32 of i32 and i32"),
        ("%b = full 0 : f64[T,T] %y = mma %x, %x, %b : f32[S,T]", "%y: mma in f32 of f32 and f64"),
        // 8: permutations, reshapes, random numbers, gathers.
        ("%y = permute %x (0,0) : f32[S,S]", "%y: [0, 0] is no order of the axes of f32[S,T]"),
        ("%y = permute %x (1,0) : f32[S,T]", "%y: the result is f32[S,T], not f32[T,S]"),
        ("%y = reshape %x : f32[S]", "%y: reshape of f32[S,T] to f32[S]"),
        ("%y = reshape %x : f64[S*T]", "%y: reshape of f32[S,T] to f64[S*T]"),
        ("%y = random seed 1 from 0 : i32[S]", "%y: random numbers of type i32"),
        ("%y = gather %A[0, 0] axis 0 rows %r : f32[S,T]", "%y: rows of type f32"),
        ("%y = gather %A[0, 0] axis 1 rows %n : f32[S,T]", "%y: rows i32[S] along extent T"),
        ("%y = gather %A[0, 0] axis 2 rows %n : f32[S,T]", "%y: f32[S,T] has no axis 2"),
        // 9: loops and branches.
        ("%y = for k in 0..4 carry(%c = %x) { yield %r }", "for k: %r is f32[S], not f32[S,T]"),
        ("%y = if N < 3 { yield %x } else { yield %r }", "if: %r is f32[S], not f32[S,T]"),
    ] {
        assert_eq!(found(&parse(body)), [message], "{body}");
    }
}

/// Applies a change to a well-formed kernel and expects one violation.
fn broken(body: &str, change: impl FnOnce(&mut Kernel), message: &str) {
    let mut kernel = parse(body);
    assert_eq!(found(&kernel), [""; 0], "{body}");
    change(&mut kernel);
    assert_eq!(found(&kernel), [message], "{kernel}");
}

/// Rules that the parser keeps by itself.
#[test]
fn what_no_text_can_say_is_reported() {
    let x = TileId(0);
    // 1: names.
    broken("", |k| k.name = "a b".into(), "kernel \"a b\" is not called by an identifier");
    broken("", |k| k.params[ParamId(0)].name = "B".into(), "parameter B: the name is taken");
    broken(
        "",
        |k| k.tiles.push("S..2".into()),
        "tile size \"S..2\" is not called by an identifier",
    );
    broken("", |k| k.tiles.push("N".into()), "tile size N: the name is taken");
    broken("", |k| k.tiles.push("vector".into()), "tile size vector is called like a knob");
    broken(
        "",
        |k| k.bounds.push(("N".into(), Bound::Exactly(1))),
        "bound of N: there is no such tile size",
    );
    broken(
        "",
        |k| k.bounds.push((k.tiles[0].clone(), Bound::Divides(0))),
        "tile size S divides 0 allows none",
    );
    broken(
        "",
        |k| k.bounds.extend([1, 0].map(|i| (k.tiles[i].clone(), Bound::AtLeast(1)))),
        "bound of S stands behind a later tile size's",
    );
    broken("", |k| k.grid.push(k.grid[0].clone()), "grid index p: the name is taken");
    broken("", |k| k.values[x].name = "r".into(), "tile r: the name is taken");
    broken("", |k| k.values[x].name = "3".into(), "tile \"3\" is not called by an identifier");
    broken("", |k| k.symbols[0].range.max = -1, "size N has an empty range");
    broken(
        "for k in 0..N {}",
        |k| {
            if let Some(Stmt::For(l)) = k.body.stmts.last_mut() {
                l.var = "p".into();
            }
        },
        "loop variable p: the name is taken",
    );
    // 2: scopes.
    let layout = |shape: &[Dim]| Layout::row_major(shape);
    broken(
        "",
        |k| k.params[ParamId(1)].layout = layout(&[Dim::sym("S")]),
        "parameter I: `S` in `S` is not in scope",
    );
    broken(
        "",
        |k| k.params[ParamId(1)].layout = layout(&[Dim::new(-2)]),
        "parameter I: negative extent -2",
    );
    broken(
        "",
        |k| {
            k.params[ParamId(1)].layout.axes[0].block =
                Some(tilewright_layout::Block { size: 0, stride: Dim::new(1) })
        },
        "parameter I: blocks of 0 elements",
    );
    broken("", |k| k.grid[0].extent = Dim::sym("p"), "grid index p: `p` in `p` is not in scope");
    broken(
        "for k in 0..N {} store %B[0, 0], %x",
        |k| {
            if let Some(Stmt::Store { index, .. }) = k.body.stmts.last_mut() {
                index[1] = Dim::sym("k");
            }
        },
        "store: `k` in `k` is not in scope",
    );
    // 3: definitions.
    broken("", |k| k.body.stmts.push(k.body.stmts[0].clone()), "%x is defined twice");
    broken(
        "",
        |k| {
            k.body.stmts.insert(
                0,
                Stmt::Store { param: ParamId(2), index: vec![Dim::new(0), Dim::new(0)], value: x },
            )
        },
        "store: %x is read before it is defined",
    );
    broken(
        "for k in 0..N { %y = full 0 : f32[S,T] } store %B[0, 0], %x",
        |k| {
            let y = TileId(4);
            if let Some(Stmt::Store { value, .. }) = k.body.stmts.last_mut() {
                *value = y;
            }
        },
        "store: %y is not in scope",
    );
    // 4: what does not exist, and constants.
    let first = |k: &mut Kernel, change: &dyn Fn(&mut TileOp)| {
        if let Some(Stmt::Let(_, op)) = k.body.stmts.first_mut() {
            change(op);
        }
    };
    broken(
        "",
        |k| first(k, &|op| *op = TileOp::Full(Value::Int(0))),
        "%x: Int(0) does not fit f32",
    );
    let fill = |op: &mut TileOp| {
        if let TileOp::Load { fill, .. } = op {
            *fill = Value::Int(0);
        }
    };
    broken("", |k| first(k, &fill), "%x: Int(0) does not fit f32");
    let lost = |op: &mut TileOp| {
        if let TileOp::Load { param, .. } = op {
            *param = ParamId(9);
        }
    };
    broken("", |k| first(k, &lost), "%x: there is no parameter p9");
    // 5: operands.
    let last = |k: &mut Kernel, change: &dyn Fn(&mut TileOp)| {
        if let Some(Stmt::Let(_, op)) = k.body.stmts.last_mut() {
            change(op);
        }
    };
    let map = "%y = map(%x, %x) { a, b -> a + b } : f32[S,T]";
    let drop_arg = |op: &mut TileOp| {
        if let TileOp::Map { args, .. } = op {
            args.truncate(1);
        }
    };
    broken(map, |k| last(k, &drop_arg), "%y: 1 operands for 2 parameters");
    let swap_arg = |op: &mut TileOp| {
        if let TileOp::Map { args, .. } = op {
            args[1].tile = TileId(3);
        }
    };
    broken(map, |k| last(k, &swap_arg), "%y: %e is i32[S,T], the function takes f32");
    // 9: counts.
    broken(
        "%y = for k in 0..N carry(%c = %x) { yield %c }",
        |k| {
            if let Some(Stmt::For(l)) = k.body.stmts.last_mut() {
                l.yields.clear();
            }
        },
        "for k: 1 tiles are carried, 0 yielded, 1 results",
    );
    broken(
        "%y = if N < 3 { yield %x } else { yield %x }",
        |k| {
            if let Some(Stmt::If(b)) = k.body.stmts.last_mut() {
                b.then_yields.clear();
            }
        },
        "if: 0 tiles yielded, 1 results",
    );
    // A tile that is no tile at all.
    broken(
        "",
        |k| k.body.stmts.push(Stmt::Let(TileId(99), TileOp::Reshape(x))),
        "%4: there is no tile 99",
    );
}

#[test]
fn all_violations_are_reported() {
    let kernel =
        parse("%y = reduce sum %x axis 0 : f32[S]\nstore %A[k, 0], %y".replace('k', "p").as_str());
    let error = verify(&kernel).unwrap_err();
    assert_eq!(error.message(), "kernel `k` is not well-formed: 3 violations");
    assert_eq!(error.exit_code(), 70);
}

#[test]
fn schedules_that_are_not_legal_are_reported() {
    let kernel = parse("%y = reshape %x : f32[T*S]\n%z = full 0 : f32[S - 2]");
    let check = |text: &str| {
        let schedule = Schedule::parse("<test>", text).unwrap();
        verify_schedule(&kernel, &schedule).map_or_else(|e| e.notes().to_vec(), |()| Vec::new())
    };
    assert_eq!(check("S=4 T=8"), [""; 0]);
    assert_eq!(check("S=4 T=8 vector=512 mma=14x2 unroll=2 chains=4"), [""; 0]);
    for (text, message) in [
        ("S=4", "tile size T has no value"),
        ("S=4 T=0", "tile size T is 0"),
        ("S=4 T=8 U=1", "the kernel has no tile size U"),
        ("S=2 T=8", "%z: f32[S - 2] has no elements, or too many"),
        ("S=4 T=8 vector=128", "vectors of 128 bits: 256 or 512 are known"),
        ("S=4 T=8 unroll=0", "unroll is 0"),
        ("S=4 T=8 chains=0", "chains is 0"),
        ("S=4 T=8 unit=bf16dot", "unit=bf16dot with vectors of 256 bits"),
        ("S=4 T=8 vector=512 mma=48x2 unit=bf16tile", "mma=48x2 uses 11 of 8 tile registers"),
        ("S=4 T=8 mma=0x2", "mma rows is 0"),
        ("S=4 T=8 mma=6x0", "mma vectors is 0"),
        ("S=4 T=8 mma=14x2", "mma=14x2 uses 31 of 16 registers"),
    ] {
        assert_eq!(check(text), [message], "{text}");
    }
    let mut bounded = kernel.clone();
    let bound = |tile: &str, b: Bound| (Arc::<str>::from(tile), b);
    bounded.bounds = vec![
        bound("S", Bound::AtLeast(4)),
        bound("T", Bound::Divides(24)),
        bound("T", Bound::Exactly(8)),
    ];
    assert!(verify(&bounded).is_ok());
    for (text, messages) in [
        ("S=4 T=8", &[][..]),
        ("S=5 T=8", &[]),
        ("S=3 T=8", &["tile size S is 3, not S >= 4"]),
        ("S=4 T=12", &["tile size T is 12, not T == 8"]),
        ("S=4 T=16", &["tile size T is 16, not T divides 24", "tile size T is 16, not T == 8"]),
    ] {
        let schedule = Schedule::parse("<test>", text).unwrap();
        let found = verify_schedule(&bounded, &schedule);
        let notes = found.map_or_else(|e| e.notes().to_vec(), |()| Vec::new());
        assert_eq!(notes, messages, "{text}");
    }
    let ragged = parse("%y = full 0 : f32[4*ceil(S/4)]\n%z = reshape %y : f32[ceil(S/4),4]");
    assert!(verify_schedule(&ragged, &Schedule::parse("<test>", "S=3 T=1").unwrap()).is_ok());
}
