//! The simplifier: rebuilds a function from its operands up, and applies rules at every node.
//!
//! At each node, in this order: constant operands fold (with the exact evaluator, so folding is
//! what the operation would have computed); constants move to the right of commutative operators;
//! the rules of `rules.rs` are tried, and what they give is built the same way; conversions of
//! conversions are merged where the first loses nothing. Common subexpressions need no step: the
//! builder shares equal nodes.

use crate::ast::{AstId, AstKind, Program};
use crate::ir::{ExprId, Func, FuncBuilder, Node, Value};
use crate::lex::Source;
use crate::op::Op;
use crate::parse::{Form, parse};
use crate::rules::{EXACT, FAST, Rule};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use tilewright_base::{Class, DType};

/// Rules applied on top of each other at one node; a limit for rules that would chase each other.
const DEPTH_MAX: usize = 24;
/// Passes over the function; nearly always the second changes nothing.
const PASSES_MAX: usize = 4;

impl Func {
    /// An equal function, bit for bit on every input (all NaNs being one), and usually a cheaper
    /// one.
    #[must_use]
    pub fn simplify(&self) -> Func {
        simplify(self, false)
    }

    /// As [`Func::simplify`], and treats floats as real numbers: the result may differ by rounding
    /// and for NaN, infinities and the sign of zero.
    #[must_use]
    pub fn simplify_fast(&self) -> Func {
        simplify(self, true)
    }
}

fn simplify(func: &Func, fast: bool) -> Func {
    let mut func = func.clone();
    for _ in 0..PASSES_MAX {
        let mut s = Simplifier { b: FuncBuilder::new(), fast };
        for p in func.params() {
            s.b.param(&p.name, p.dtype);
        }
        let mut map: Vec<ExprId> = Vec::new();
        for (_, node, dtype) in func.nodes() {
            let id = match node {
                Node::Param(p) => ExprId(*p),
                Node::Const(v) => s.b.value(*v, dtype),
                Node::Op(op, args) => {
                    let args: Vec<ExprId> = args.iter().map(|a| map[a.index()]).collect();
                    s.make(*op, args, dtype, 0)
                }
            };
            map.push(id);
        }
        let next = s.b.finish(map[func.result().index()]);
        if next == func {
            break;
        }
        func = next;
    }
    func
}

/// A rule with its text parsed: pattern and result are blocks of one program each.
struct Parsed {
    rule: &'static Rule,
    pattern: Program,
    result: Program,
}

fn root(program: &Program) -> AstId {
    program.body().map_or(AstId(0), |b| b.result)
}

/// The operation at the root of a pattern.
fn root_op(program: &Program, id: AstId) -> Option<Op> {
    match &program.node(id).kind {
        AstKind::Unary(op, _) | AstKind::Binary { op, .. } => Some(*op),
        AstKind::Conditional(_) => Some(Op::Select),
        AstKind::Call { name, .. } => Op::from_name(name),
        _ => None,
    }
}

/// The parsed rules by the operation that they start with.
fn index(fast: bool) -> &'static BTreeMap<Op, Vec<Parsed>> {
    static INDEX: [OnceLock<BTreeMap<Op, Vec<Parsed>>>; 2] = [OnceLock::new(), OnceLock::new()];
    INDEX[usize::from(fast)].get_or_init(|| {
        let mut map: BTreeMap<Op, Vec<Parsed>> = BTreeMap::new();
        for rule in if fast { FAST } else { EXACT } {
            for parsed in parse_rule(rule) {
                let op = root_op(&parsed.pattern, root(&parsed.pattern));
                map.entry(op.expect("a pattern starts with an operation"))
                    .or_default()
                    .push(parsed);
            }
        }
        map
    })
}

fn parse_rule(rule: &'static Rule) -> impl Iterator<Item = Parsed> {
    rule.text.split(';').map(move |text| {
        let half = |text: &str| {
            parse(&Source::new(rule.name, text), Form::Program)
                .unwrap_or_else(|e| panic!("rule {}: {e:?}", rule.name))
        };
        let (pattern, result) = text.split_once("=>").expect("pattern => result");
        Parsed { rule, pattern: half(pattern), result: half(result) }
    })
}

/// What the variables of a pattern stand for.
#[derive(Default)]
struct Bindings {
    nodes: BTreeMap<char, ExprId>,
    constants: BTreeMap<char, Value>,
}

/// The constant that a number in a rule means for a type; `-1` is all ones in unsigned types.
fn number(text: &str, negative: bool, dtype: DType) -> Value {
    let magnitude: f64 = text.parse().expect("numbers in rules are simple");
    let mut b = FuncBuilder::new();
    let value = if negative { -magnitude } else { magnitude };
    let id = if dtype.is_float() {
        b.constant(value, dtype)
    } else {
        b.constant_int(value as i64, dtype)
    };
    match b.node(id) {
        Node::Const(v) => *v,
        _ => unreachable!("a constant"),
    }
}

fn first_char(name: &str) -> char {
    name.chars().next().unwrap_or('?')
}

struct Simplifier {
    b: FuncBuilder,
    fast: bool,
}

impl Simplifier {
    fn constant(&self, id: ExprId) -> Option<Value> {
        match self.b.node(id) {
            Node::Const(v) => Some(*v),
            _ => None,
        }
    }

    /// The simplest node for an operation on simplified operands.
    fn make(&mut self, op: Op, mut args: Vec<ExprId>, dtype: DType, depth: usize) -> ExprId {
        if let Some(folded) = self.fold(op, &args, dtype) {
            return folded;
        }
        if op == Op::Cast {
            return self.cast(args[0], dtype);
        }
        let op = self.order(op, &mut args);
        if depth < DEPTH_MAX {
            for fast in [false, true] {
                if fast && !self.fast {
                    break;
                }
                for parsed in index(fast).get(&op).map_or(&[][..], |v| v) {
                    if let Some(id) = self.apply(parsed, op, &args, depth) {
                        return id;
                    }
                }
            }
        }
        self.b.op(op, &args)
    }

    /// The value of an operation on constants.
    fn fold(&mut self, op: Op, args: &[ExprId], dtype: DType) -> Option<ExprId> {
        let values: Vec<Value> = args.iter().map(|a| self.constant(*a)).collect::<Option<_>>()?;
        let mut b = FuncBuilder::new();
        let params: Vec<ExprId> = args.iter().map(|a| b.param("x", self.b.dtype_of(*a))).collect();
        let result = if op == Op::Cast { b.cast(params[0], dtype) } else { b.op(op, &params) };
        let value = b.finish(result).eval(&values);
        Some(self.b.value(value, dtype))
    }

    /// Moves a constant to the right where the operands may change places, and uses a sum or
    /// product that exists with its operands the other way round.
    fn order(&self, op: Op, args: &mut [ExprId]) -> Op {
        let swapped = match op {
            Op::Add | Op::Mul | Op::Min | Op::Max | Op::And | Op::Or | Op::Xor => op,
            Op::Fma | Op::Eq | Op::Ne => op,
            Op::Lt => Op::Gt,
            Op::Gt => Op::Lt,
            Op::Le => Op::Ge,
            Op::Ge => Op::Le,
            _ => return op,
        };
        let left = self.constant(args[0]).is_some();
        let right = self.constant(args[1]).is_some();
        let mut other = args.to_vec();
        other.swap(0, 1);
        if (left && !right) || (left == right && self.b.has_op(swapped, &other)) {
            args.swap(0, 1);
            return swapped;
        }
        op
    }

    fn apply(&mut self, parsed: &Parsed, op: Op, args: &[ExprId], depth: usize) -> Option<ExprId> {
        let mut bindings = Bindings::default();
        let pattern = &parsed.pattern;
        let at = root(pattern);
        for (p, a) in pattern.children(at).iter().zip(args) {
            if !self.matches(pattern, *p, *a, &mut bindings) {
                return None;
            }
        }
        let dtype = self.b.dtype_of(*bindings.nodes.get(&'a')?);
        let letter = match dtype.class() {
            Class::Float => 'f',
            Class::Signed => 's',
            Class::Unsigned => 'u',
            Class::Bool => 'b',
        };
        if !parsed.rule.on.contains(letter) || !(parsed.rule.when)(dtype, &mut bindings.constants) {
            return None;
        }
        let result_type =
            if op.is_predicate() { DType::Bool } else { self.b.dtype_of(*args.last()?) };
        Some(self.build(
            &parsed.result,
            root(&parsed.result),
            result_type,
            dtype,
            &bindings,
            depth + 1,
        ))
    }

    fn matches(&self, pattern: &Program, at: AstId, id: ExprId, bindings: &mut Bindings) -> bool {
        let dtype = self.b.dtype_of(id);
        match &pattern.node(at).kind {
            AstKind::Name(name) => {
                let name = first_char(name);
                if name.is_ascii_uppercase() {
                    let Some(value) = self.constant(id) else { return false };
                    bindings.constants.insert(name, value);
                }
                *bindings.nodes.entry(name).or_insert(id) == id
            }
            AstKind::Number(n) => self.constant(id) == Some(number(&n.text, n.negative, dtype)),
            AstKind::Bool(b) => {
                dtype == DType::Bool && self.constant(id) == Some(Value::Int((*b).into()))
            }
            _ => {
                let Node::Op(op, args) = self.b.node(id) else { return false };
                root_op(pattern, at) == Some(*op)
                    && pattern
                        .children(at)
                        .iter()
                        .zip(args)
                        .all(|(p, a)| self.matches(pattern, *p, *a, bindings))
            }
        }
    }

    /// Builds the result of a rule. `dtype` is the type of the node, `operand` that of `a`, which
    /// is the type of numbers under a comparison.
    fn build(
        &mut self,
        result: &Program,
        at: AstId,
        dtype: DType,
        operand: DType,
        bindings: &Bindings,
        depth: usize,
    ) -> ExprId {
        match &result.node(at).kind {
            AstKind::Name(name) => {
                let name = first_char(name);
                match bindings.constants.get(&name) {
                    Some(value) => self.b.value(*value, dtype),
                    None => bindings.nodes[&name],
                }
            }
            AstKind::Number(n) => self.b.value(number(&n.text, n.negative, dtype), dtype),
            AstKind::Bool(b) => self.b.constant_int((*b).into(), DType::Bool),
            _ => {
                let op = root_op(result, at).expect("results are made of operations");
                let inner = if op.is_predicate() { operand } else { dtype };
                let args: Vec<ExprId> = result
                    .children(at)
                    .iter()
                    .enumerate()
                    .map(|(i, c)| {
                        let condition = op == Op::Select && i == 0;
                        let inner = if condition { DType::Bool } else { inner };
                        self.build(result, *c, inner, operand, bindings, depth)
                    })
                    .collect();
                self.make(op, args, dtype, depth)
            }
        }
    }

    /// A conversion, past an inner one that loses nothing.
    fn cast(&mut self, x: ExprId, to: DType) -> ExprId {
        if let Node::Op(Op::Cast, args) = self.b.node(x) {
            let inner = args[0];
            if merges(self.b.dtype_of(inner), self.b.dtype_of(x), to) {
                return self.cast(inner, to);
            }
        }
        self.b.cast(x, to)
    }
}

/// Whether converting by way of `middle` is the same as converting at once.
fn merges(from: DType, middle: DType, to: DType) -> bool {
    if !lossless(from, middle) {
        return false;
    }
    let (int_from, int_middle) = (!from.is_float(), !middle.is_float());
    if !int_from || int_middle || to == DType::Bool {
        return true;
    }
    // Integer to float to something: floats saturate where integers wrap, and integers reach the
    // narrow floats by way of f32.
    match to.class() {
        Class::Float => matches!(to, DType::F64 | DType::F32) || value_bits(from) <= 24,
        _ => lossless(from, to),
    }
}

/// Bits of the magnitude of an integer type.
fn value_bits(dtype: DType) -> u32 {
    match dtype.class() {
        Class::Bool => 1,
        Class::Signed => dtype.bits() - 1,
        _ => dtype.bits(),
    }
}

/// Digits of the significand, largest exponent, exponent of the smallest number.
fn float_range(dtype: DType) -> (u32, i32, i32) {
    match dtype {
        DType::F64 => (53, 1023, -1074),
        DType::F32 => (24, 127, -149),
        DType::F16 => (11, 15, -24),
        DType::BF16 => (8, 127, -133),
        DType::F8E4M3 => (4, 8, -9),
        _ => (3, 15, -16),
    }
}

/// Whether every value of `from` is a value of `to`.
fn lossless(from: DType, to: DType) -> bool {
    if from == to {
        return true;
    }
    match (from.is_float(), to.is_float()) {
        (true, true) => {
            let (a, b) = (float_range(from), float_range(to));
            a.0 <= b.0 && a.1 <= b.1 && a.2 >= b.2
        }
        (true, false) => false,
        (false, true) => {
            let (digits, exponent, _) = float_range(to);
            value_bits(from) <= digits && value_bits(from) as i32 <= exponent
        }
        (false, false) => {
            let sign_fits = !from.is_signed_int() || to.is_signed_int();
            to != DType::Bool && sign_fits && value_bits(from) <= value_bits(to)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{CompileOptions, compile};
    use crate::testgen;
    use proptest::prelude::*;

    fn compiled(text: &str, default: DType) -> Func {
        let options = CompileOptions { default, ..CompileOptions::default() };
        compile(text, &options).unwrap_or_else(|e| panic!("{e:?}")).func
    }

    fn body(func: &Func) -> String {
        let text = func.to_string();
        let (_, body) = text.split_once("-> ").unwrap();
        body.trim_end_matches(" }").to_string()
    }

    #[test]
    fn every_rule_does_what_its_example_says() {
        for (rules, fast) in [(EXACT, false), (FAST, true)] {
            for rule in rules {
                let (dtype, before, after) = rule.example;
                let func = simplify(&compiled(before, dtype), fast);
                assert_eq!(body(&func), after, "{}: {before}", rule.name);
            }
        }
    }

    /// The pattern of a rule as a function: variables become parameters.
    fn pattern_func(parsed: &Parsed, dtype: DType, c: Value, d: Value) -> Func {
        let mut s = Simplifier { b: FuncBuilder::new(), fast: false };
        let mut bindings = Bindings::default();
        for name in ['a', 'b', 'c', 'd'] {
            bindings.nodes.insert(name, s.b.param(&name.to_string(), dtype));
        }
        bindings.nodes.insert('p', s.b.param("p", DType::Bool));
        bindings.constants.insert('C', c);
        bindings.constants.insert('D', d);
        // Built plainly: the pattern itself must not be simplified.
        fn plain(
            s: &mut Simplifier,
            p: &Program,
            at: AstId,
            t: DType,
            o: DType,
            e: &Bindings,
        ) -> ExprId {
            match root_op(p, at) {
                None => s.build(p, at, t, o, e, 0),
                Some(op) => {
                    let inner = match op {
                        Op::Not if t == DType::Bool && o != DType::Bool => DType::Bool,
                        _ if op.is_predicate() => o,
                        _ => t,
                    };
                    let args: Vec<ExprId> = p
                        .children(at)
                        .iter()
                        .enumerate()
                        .map(|(i, c)| {
                            let inner =
                                if op == Op::Select && i == 0 { DType::Bool } else { inner };
                            plain(s, p, *c, inner, o, e)
                        })
                        .collect();
                    s.b.op(op, &args)
                }
            }
        }
        let at = root(&parsed.pattern);
        // `!` over a comparison is the only pattern whose own type is not `a`'s.
        let negated =
            parsed.pattern.children(at).first().and_then(|c| root_op(&parsed.pattern, *c));
        let comparison =
            negated.is_some_and(Op::is_predicate) && root_op(&parsed.pattern, at) == Some(Op::Not);
        let t = if comparison { DType::Bool } else { dtype };
        let id = plain(&mut s, &parsed.pattern, at, t, dtype, &bindings);
        s.b.finish(id)
    }

    fn edge(dtype: DType, v: f64) -> Value {
        let mut b = FuncBuilder::new();
        let id = b.constant(v, dtype);
        match b.node(id) {
            Node::Const(v) => *v,
            _ => unreachable!(),
        }
    }

    /// Each exact rule on each type, with many constants, over all pairs of edge values.
    #[test]
    fn exact_rules_keep_every_bit_on_edge_values() {
        let constants = [
            -128.0,
            -3.0,
            -1.0,
            -0.0,
            0.0,
            0.1,
            0.5,
            1.0,
            2.0,
            3.0,
            4.0,
            8.0,
            16.0,
            128.0,
            1024.0,
            3e38,
            1e-38,
            2f64.powi(-126),
            2f64.powi(127),
            2f64.powi(-149),
            5e-324,
            -9.3e18,
            f64::INFINITY,
            f64::NAN,
        ];
        let mut fired = 0;
        for rule in EXACT {
            for (dtype, _, class, _) in DType::TABLE {
                let letter = match class {
                    Class::Float => 'f',
                    Class::Signed => 's',
                    Class::Unsigned => 'u',
                    Class::Bool => 'b',
                };
                if !rule.on.contains(letter) {
                    continue;
                }
                for parsed in parse_rule(rule) {
                    let mut columns: Vec<Vec<Value>> = vec![Vec::new(); 5];
                    for (i, a) in testgen::EDGES.iter().enumerate() {
                        for (j, b) in testgen::EDGES.iter().enumerate() {
                            columns[0].push(edge(dtype, *a));
                            columns[1].push(edge(dtype, *b));
                            columns[2]
                                .push(edge(dtype, testgen::EDGES[(i + j) % testgen::EDGES.len()]));
                            columns[3].push(edge(dtype, *b));
                            columns[4].push(Value::Int((i + j) as i64 % 2));
                        }
                    }
                    let slices: Vec<&[Value]> = columns.iter().map(|c| &c[..]).collect();
                    let uses = |c: &str| parsed.pattern.source.text.contains(c);
                    for c in constants.iter().take(if uses("C") { 99 } else { 1 }) {
                        for d in constants.iter().step_by(3).take(if uses("D") { 99 } else { 1 }) {
                            let before =
                                pattern_func(&parsed, dtype, edge(dtype, *c), edge(dtype, *d));
                            let after = before.simplify();
                            if after == before {
                                continue;
                            }
                            fired += 1;
                            let mut want = vec![Value::Int(0); columns[0].len()];
                            let mut got = want.clone();
                            before.eval_many(&slices, &mut want);
                            after.eval_many(&slices, &mut got);
                            if let Some(i) = (0..want.len()).find(|i| want[*i] != got[*i]) {
                                let args: Vec<Value> = columns.iter().map(|c| c[i]).collect();
                                panic!(
                                    "{} on {dtype}: {before} is {:?}, {after} is {:?} for {args:?}",
                                    rule.name, want[i], got[i]
                                );
                            }
                        }
                    }
                }
            }
        }
        assert!(fired > 1500, "only {fired} instances changed");
    }

    #[test]
    fn fast_rules_agree_on_ordinary_numbers() {
        for rule in FAST {
            let (dtype, before, _) = rule.example;
            let _ = dtype;
            let func = compiled(before, DType::F64);
            let fast = func.simplify_fast();
            for x in [0.3, 0.7, 1.1, 1.9] {
                let args: Vec<f64> =
                    (0..func.params().len()).map(|i| x + 0.37 * i as f64).collect();
                let (want, got) = (func.eval_f64(&args), fast.eval_f64(&args));
                assert!(
                    (want - got).abs() <= 1e-14 * want.abs().max(1.0),
                    "{}: {want} {got}",
                    rule.name
                );
            }
        }
    }

    #[test]
    fn conversions_merge_only_when_nothing_is_lost() {
        use DType::*;
        for (from, middle, to, text) in [
            (F16, F32, BF16, "bf16(x)"),
            (F32, F16, F32, "f32(f16(x))"),
            (BF16, F32, BF16, "x"),
            (Bool, I32, F32, "f32(x)"),
            (I32, F64, I8, "i8(f64(x))"),
            (I8, F32, I32, "i32(x)"),
            (I64, I32, I8, "i8(i32(x))"),
            (I32, I64, I8, "i8(x)"),
            (U8, I8, I32, "i32(i8(x))"),
        ] {
            let mut b = FuncBuilder::new();
            let x = b.param("x", from);
            let y = b.cast(x, middle);
            let z = b.cast(y, to);
            assert_eq!(body(&b.finish(z).simplify()), text);
        }
    }

    proptest! {
        #![proptest_config(testgen::config(4000))]
        #[test]
        fn simplified_functions_compute_the_same_bits(
            func in testgen::func(25),
            bits in proptest::collection::vec(any::<u64>(), 3 * 64),
        ) {
            let after = func.simplify();
            let columns: Vec<Vec<Value>> = func.params().iter().enumerate().map(|(p, param)| {
                (0..64).map(|i| testgen::value(param.dtype, bits[p * 64 + i])).collect()
            }).collect();
            let slices: Vec<&[Value]> = columns.iter().map(|c| &c[..]).collect();
            let (mut want, mut got) = (vec![Value::Int(0); 64], vec![Value::Int(0); 64]);
            func.eval_many(&slices, &mut want);
            after.eval_many(&slices, &mut got);
            for i in 0..64 {
                let args: Vec<Value> = columns.iter().map(|c| c[i]).collect();
                prop_assert_eq!(want[i], got[i], "{} => {} for {:?}", func, after, args);
            }
            // Simplifying again changes nothing, and fast simplification at least ends.
            prop_assert_eq!(after.dtype(), func.dtype());
            let _ = func.simplify_fast();
        }
    }
}
