//! Random programs: the pipeline, and each pass alone, keep what they compute.
//!
//! Programs are chains of operators on a growing pool of values whose axes are drawn from a few
//! sizes (1 among them, and a symbol), so that views, broadcasts and contractions fit each other
//! often. A failure prints the seed, the program before and after.

mod common;
use common::*;
use tilewright_base::DType;
use tilewright_graph::{Graph, GraphBuilder, Op, PadMode, ReduceKind, TensorType, ValueId, verify};
use tilewright_interp::{Mode, run};
use tilewright_layout::{Dim, Env, Range};
use tilewright_passes::{PIPELINE, PassContext};

fn pick<T: Clone>(rng: &mut Rng, items: &[T]) -> T {
    items[rng.next() as usize % items.len()].clone()
}

fn random_perm(rng: &mut Rng, rank: usize) -> Vec<usize> {
    let mut perm: Vec<usize> = (0..rank).collect();
    for i in (1..rank).rev() {
        perm.swap(i, rng.next() as usize % (i + 1));
    }
    perm
}

/// Another shape for the same elements: joins and splits of neighbours, or units put in.
fn random_reshape(rng: &mut Rng, shape: &[Dim]) -> Vec<Dim> {
    let mut new = shape.to_vec();
    match rng.next() % 4 {
        0 if new.len() >= 2 => {
            let at = rng.next() as usize % (new.len() - 1);
            let joined = &new[at] * &new[at + 1];
            new.splice(at..at + 2, [joined]);
        }
        1 => {
            if let Some(at) =
                new.iter().position(|d| d.as_const().is_some_and(|n| n % 2 == 0 && n > 0))
            {
                let half = Dim::new(new[at].as_const().unwrap() / 2);
                new.splice(at..=at, [Dim::new(2), half]);
            }
        }
        2 => new.insert(rng.next() as usize % (new.len() + 1), Dim::new(1)),
        _ => new.retain(|d| !d.is(1)),
    }
    new
}

fn random_graph(seed: u64) -> Graph {
    let mut rng = Rng(seed);
    let mut b = GraphBuilder::new(format!("random{seed}"));
    let n = b.symbol("N", Range { min: 1, max: 16 });
    let sizes = [Dim::new(1), Dim::new(2), Dim::new(4), n];
    let mut pool: Vec<ValueId> = Vec::new();
    let random_shape = |rng: &mut Rng| -> Vec<Dim> {
        (0..1 + rng.next() % 4).map(|_| pick(rng, &sizes)).collect()
    };
    for i in 0..3 {
        let shape = random_shape(&mut rng);
        pool.push(b.input(format!("x{i}"), TensorType::new(DType::F32, shape)));
    }
    let functions =
        ["{ x -> x * 0.5 }", "{ x -> exp(x * 0.1) }", "{ x -> max(x, 0) }", "{ x -> x + 1 }"];
    let pairs =
        ["{ a, b -> a + b }", "{ a, b -> a * b }", "{ a, b -> max(a, b) }", "{ a, b -> a - b }"];
    for _ in 0..4 + rng.next() % 14 {
        // Recent values more often: chains.
        let recent = pool[pool.len().saturating_sub(3)..].to_vec();
        let x = if rng.one_in(4) { pick(&mut rng, &pool) } else { pick(&mut rng, &recent) };
        let shape = b.shape(x);
        let rank = shape.len();
        let made = match rng.next() % 14 {
            0 | 1 => b.map_text(pick(&mut rng, &functions), &[x]),
            2 | 3 => {
                let y = pick(&mut rng, &pool);
                b.map_text(pick(&mut rng, &pairs), &[x, y])
            }
            4 => {
                let c: Option<Vec<usize>> =
                    shape.iter().map(|d| d.as_const().map(|v| v as usize)).collect();
                let c = c.unwrap_or_else(|| {
                    shape.last().and_then(Dim::as_const).map_or(vec![], |v| vec![v as usize])
                });
                let c = weight(&mut b, &mut rng, &c);
                b.map_text(pick(&mut rng, &pairs), &[x, c])
            }
            5 | 6 => b.permute(x, &random_perm(&mut rng, rank)),
            7 | 8 => {
                let to = random_reshape(&mut rng, &shape);
                b.reshape(x, &to)
            }
            9 => {
                let mut to: Vec<Dim> = shape
                    .iter()
                    .map(|d| if d.is(1) { pick(&mut rng, &sizes) } else { d.clone() })
                    .collect();
                if rng.one_in(2) && rank < 4 {
                    to.insert(0, Dim::new(2));
                }
                b.expand(x, &to)
            }
            10 if rank > 0 => {
                let axis = rng.next() as usize % rank;
                let kind = pick(&mut rng, &[ReduceKind::Sum, ReduceKind::Max]);
                b.reduce(kind, x, &[axis], rng.one_in(2))
            }
            11 if rank > 0 => {
                let axis = rng.next() as usize % rank;
                b.op(Op::Softmax { axis, log: rng.one_in(4) }, &[x])
            }
            12 if rank > 0 => {
                let axis = rng.next() as usize % rank;
                if rng.one_in(2) {
                    b.op(Op::Concat(axis), &[x, x])
                } else {
                    let zeros = vec![Dim::new(0); rank];
                    let mut hi = zeros.clone();
                    hi[axis] = Dim::new(1);
                    let mode = PadMode::Constant(tilewright_expr::Value::Float(0.0));
                    b.op(Op::Pad { lo: zeros, hi, mode }, &[x])
                }
            }
            13 if rank > 0 => {
                // Contract with another value: letters by size.
                let y = pick(&mut rng, &pool);
                let other = b.shape(y);
                let letters: Vec<char> = "abcdefgh".chars().collect();
                let lhs: String = letters[..rank].iter().collect();
                let mut rhs = String::new();
                for (j, d) in other.iter().enumerate() {
                    let shared = (0..rank).find(|&i| shape[i] == *d && !rhs.contains(letters[i]));
                    match shared {
                        Some(i) if !rng.one_in(3) => rhs.push(letters[i]),
                        _ => rhs.push(['w', 'x', 'y', 'z', 'v', 'u', 't', 's'][j % 8]),
                    }
                }
                let all: Vec<char> =
                    lhs.chars().chain(rhs.chars().filter(|c| !lhs.contains(*c))).collect();
                let mut out = String::new();
                for i in random_perm(&mut rng, all.len()) {
                    if !rng.one_in(3) && out.len() < 4 {
                        out.push(all[i]);
                    }
                }
                b.contract(&format!("{lhs},{rhs}->{out}"), x, y)
            }
            _ => b.map_text("{ x -> -x }", &[x]),
        };
        // Shapes that do not fit are part of the game.
        if let Ok(v) = made
            && b.shape(v).len() <= 6
        {
            pool.push(v);
        }
    }
    let last = *pool.last().unwrap();
    b.output("y", last);
    let also = pick(&mut rng, &pool);
    b.output("z", also);
    b.finish()
}

fn check(seed: u64, before: &Graph, after: &Graph, what: &str) {
    verify(after).unwrap_or_else(|e| panic!("seed {seed} {what}: {e:?}\n{before}"));
    for n in [1, 3] {
        let env: Env = [("N".into(), n)].into();
        let given = inputs(before, &mut Rng(seed), &env);
        let a = run(before, &given, Mode::F64);
        let b = run(after, &given, Mode::F64);
        let (Ok(a), Ok(b)) = (&a, &b) else {
            assert!(a.is_err() || b.is_ok(), "seed {seed} {what} fails: {b:?}\n{before}\n{after}");
            continue;
        };
        let d = difference(a, b);
        assert!(d <= ROUNDED_CONSTANTS, "seed {seed} {what}: differ by {d}\n{before}\n{after}");
    }
}

#[test]
fn the_pipeline_keeps_the_meaning() {
    let count = std::env::var("RANDOM_GRAPHS").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    for seed in 0..count {
        let before = random_graph(seed);
        verify(&before).unwrap();
        let mut after = before.clone();
        let report = tilewright_passes::run(&mut after, &PassContext::default())
            .unwrap_or_else(|e| panic!("seed {seed}: {e:?}\n{before}"));
        check(seed, &before, &after, "pipeline");
        assert!(
            report.unstable.is_empty(),
            "seed {seed}: {:?}\n{before}\n{after}",
            report.unstable
        );
    }
}

#[test]
fn each_pass_alone_keeps_the_meaning() {
    for seed in 1000..1150 {
        let before = random_graph(seed);
        for pass in PIPELINE.iter().flat_map(|g| g.passes) {
            let mut after = before.clone();
            (pass.run)(&mut after, &PassContext::default())
                .unwrap_or_else(|e| panic!("seed {seed} {}: {e:?}\n{before}", pass.name));
            check(seed, &before, &after, pass.name);
        }
    }
}
