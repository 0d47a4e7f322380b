//! [`Func`]: a typed scalar function as a hash-consed graph.
//!
//! Nodes are stored in topological order (operands before users) and are unique: building the same
//! node twice gives the same [`ExprId`], so common subexpressions exist once. The function
//! `x, b -> max(x + b, 0)` on `f32`:
//!
//! | id | node | type |
//! |---|---|---|
//! | e0 | param 0 (`x`) | f32 |
//! | e1 | param 1 (`b`) | f32 |
//! | e2 | `Add e0 e1` | f32 |
//! | e3 | const 0 | f32 |
//! | e4 | `Max e2 e3` | f32 |

use crate::op::Op;
use std::collections::HashMap;
use std::sync::Arc;
use tilewright_base::{Class, DType, IdVec, typed_id};

typed_id!(
    /// A node of a [`Func`].
    ExprId,
    "e"
);

/// A constant's value. Floats compare by bits, so that NaN equals itself and -0.0 is not 0.0.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// For every float type, already rounded to it.
    Float(f64),
    /// For every integer type (`u64` as its two's complement bits) and `bool` (0 or 1).
    Int(i64),
}

impl PartialEq for Value {
    fn eq(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Float(a), Value::Float(b)) => a.to_bits() == b.to_bits(),
            (Value::Int(a), Value::Int(b)) => a == b,
            _ => false,
        }
    }
}
impl Eq for Value {}
impl std::hash::Hash for Value {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        match self {
            Value::Float(a) => (0u8, a.to_bits()).hash(state),
            Value::Int(a) => (1u8, *a as u64).hash(state),
        }
    }
}

/// What a node computes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The parameter with this number.
    Param(u32),
    /// A constant.
    Const(Value),
    /// An operation on earlier nodes.
    Op(Op, Vec<ExprId>),
}

/// A parameter: a name for people, and a type.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// As written or invented; unique within the function.
    pub name: Arc<str>,
    /// Type of the argument.
    pub dtype: DType,
}

/// A typed scalar function with one result; see the module's head.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Func {
    params: Vec<Param>,
    nodes: Vec<(Node, DType)>,
    result: ExprId,
}

impl Func {
    /// The parameters, in order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// All nodes with their types, operands before users.
    pub fn nodes(
        &self,
    ) -> impl DoubleEndedIterator<Item = (ExprId, &Node, DType)> + ExactSizeIterator {
        self.nodes.iter().enumerate().map(|(i, (node, dtype))| (ExprId(i as u32), node, *dtype))
    }

    /// One node.
    pub fn node(&self, id: ExprId) -> &Node {
        &self.nodes[id.index()].0
    }

    /// The type of one node.
    pub fn dtype_of(&self, id: ExprId) -> DType {
        self.nodes[id.index()].1
    }

    /// The node whose value the function returns.
    pub fn result(&self) -> ExprId {
        self.result
    }

    /// Type of the result.
    pub fn dtype(&self) -> DType {
        self.dtype_of(self.result)
    }

    /// The function that returns its only argument.
    pub fn identity(dtype: DType) -> Func {
        let mut b = FuncBuilder::new();
        let x = b.param("x", dtype);
        b.finish(x)
    }

    /// `x -> op(x)`. The result type follows the operation (`bool` for `IsNan`).
    pub fn unary(op: Op, dtype: DType) -> Func {
        let mut b = FuncBuilder::new();
        let x = b.param("x", dtype);
        let y = b.op(op, &[x]);
        b.finish(y)
    }

    /// `a, b -> op(a, b)` on one type.
    pub fn binary(op: Op, dtype: DType) -> Func {
        let mut f = FuncBuilder::new();
        let a = f.param("a", dtype);
        let b = f.param("b", dtype);
        let y = f.op(op, &[a, b]);
        f.finish(y)
    }

    /// `x -> cast(x)`.
    pub fn cast(from: DType, to: DType) -> Func {
        let mut b = FuncBuilder::new();
        let x = b.param("x", from);
        let y = b.cast(x, to);
        b.finish(y)
    }

    /// True for `x -> x`.
    pub fn is_identity(&self) -> bool {
        self.params.len() == 1 && matches!(self.node(self.result), Node::Param(0))
    }

    /// The single operation when the function is just `op(param 0, param 1, ...)` in order.
    pub fn as_single_op(&self) -> Option<Op> {
        match self.node(self.result) {
            Node::Op(op, args)
                if args.len() == self.params.len()
                    && args.iter().enumerate().all(
                        |(i, a)| matches!(self.node(*a), Node::Param(p) if *p as usize == i),
                    ) =>
            {
                Some(*op)
            }
            _ => None,
        }
    }

    /// The constant when the function returns one whatever its arguments.
    pub fn as_constant(&self) -> Option<Value> {
        match self.node(self.result) {
            Node::Const(v) => Some(*v),
            _ => None,
        }
    }

    /// True when the result depends on parameter `index`.
    pub fn uses_param(&self, index: usize) -> bool {
        // Builders only keep nodes that the result needs (see `FuncBuilder::finish`).
        self.nodes.iter().any(|(n, _)| matches!(n, Node::Param(p) if *p as usize == index))
    }
}

/// Builds a [`Func`] node by node, sharing equal nodes.
#[derive(Clone, Debug, Default)]
pub struct FuncBuilder {
    params: Vec<Param>,
    nodes: IdVec<ExprId, (Node, DType)>,
    seen: HashMap<(Node, DType), ExprId>,
}

impl FuncBuilder {
    /// No parameters, no nodes.
    pub fn new() -> FuncBuilder {
        FuncBuilder::default()
    }

    /// The type of a node built so far.
    pub fn dtype_of(&self, id: ExprId) -> DType {
        self.nodes[id].1
    }

    /// A node built so far.
    pub fn node(&self, id: ExprId) -> &Node {
        &self.nodes[id].0
    }

    fn intern(&mut self, node: Node, dtype: DType) -> ExprId {
        let key = (node, dtype);
        if let Some(id) = self.seen.get(&key) {
            return *id;
        }
        let id = self.nodes.push(key.clone());
        self.seen.insert(key, id);
        id
    }

    /// Adds a parameter. The name becomes one that the text form can hold: other characters than
    /// letters, digits and `_` are replaced, and a name already taken gets a number appended.
    pub fn param(&mut self, name: &str, dtype: DType) -> ExprId {
        let mut name: String =
            name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if !crate::lex::is_name(&name) || crate::parse::KEYWORDS.contains(&&*name) {
            name.insert(0, '_');
        }
        let mut unique: Arc<str> = name.as_str().into();
        let mut n = 1;
        while self.params.iter().any(|p| p.name == unique) {
            unique = format!("{name}{n}").into();
            n += 1;
        }
        self.params.push(Param { name: unique, dtype });
        self.intern(Node::Param(self.params.len() as u32 - 1), dtype)
    }

    /// A constant of any type, from a float: rounded, or truncated for integers.
    pub fn constant(&mut self, value: f64, dtype: DType) -> ExprId {
        // One NaN, so that equal functions are equal and print alike.
        let value = if value.is_nan() { f64::NAN } else { value };
        let mut bytes = [0u8; 8];
        let value = if dtype.is_float() {
            tilewright_data::from_f64(dtype, &mut bytes, 0, value);
            let rounded = tilewright_data::read_f64(dtype, &bytes, 0);
            Value::Float(if rounded.is_nan() { f64::NAN } else { rounded })
        } else if dtype == DType::Bool {
            Value::Int((value != 0.0).into())
        } else {
            tilewright_data::from_f64(dtype, &mut bytes, 0, value);
            Value::Int(tilewright_data::read_i64(dtype, &bytes, 0))
        };
        self.intern(Node::Const(value), dtype)
    }

    /// An integer constant, exact for all 64 bits; for float types as [`FuncBuilder::constant`].
    pub fn constant_int(&mut self, value: i64, dtype: DType) -> ExprId {
        if dtype.is_float() {
            return self.constant(value as f64, dtype);
        }
        let mut bytes = [0u8; 8];
        tilewright_data::from_i64(dtype, &mut bytes, 0, value);
        let value = tilewright_data::read_i64(dtype, &bytes, 0);
        self.intern(Node::Const(Value::Int(value)), dtype)
    }

    /// A constant given as a [`Value`].
    pub fn value(&mut self, value: Value, dtype: DType) -> ExprId {
        match value {
            Value::Float(v) => self.constant(v, dtype),
            Value::Int(v) => self.constant_int(v, dtype),
        }
    }

    /// An operation other than `Cast`. The result type is the operands', `bool` for comparisons
    /// and tests, and that of the branches for `Select`.
    ///
    /// # Panics
    /// When the operand count or types are wrong: callers check what comes from outside.
    pub fn op(&mut self, op: Op, args: &[ExprId]) -> ExprId {
        assert!(op != Op::Cast, "use FuncBuilder::cast");
        assert_eq!(args.len(), op.arity(), "{op:?} takes {} operands", op.arity());
        let operands = if op == Op::Select {
            assert_eq!(self.dtype_of(args[0]), DType::Bool, "select needs a bool condition");
            &args[1..]
        } else {
            args
        };
        let dtype = self.dtype_of(operands[0]);
        for a in operands {
            assert_eq!(self.dtype_of(*a), dtype, "operands of {op:?} have different types");
        }
        let dtype = if op.is_predicate() { DType::Bool } else { dtype };
        self.intern(Node::Op(op, args.to_vec()), dtype)
    }

    /// Whether this operation on these operands exists already.
    pub(crate) fn has_op(&self, op: Op, args: &[ExprId]) -> bool {
        let Some(first) = args.first() else { return false };
        let dtype = if op.is_predicate() { DType::Bool } else { self.dtype_of(*first) };
        self.seen.contains_key(&(Node::Op(op, args.to_vec()), dtype))
    }

    /// Conversion; nothing when the type is already right.
    pub fn cast(&mut self, x: ExprId, to: DType) -> ExprId {
        if self.dtype_of(x) == to { x } else { self.intern(Node::Op(Op::Cast, vec![x]), to) }
    }

    /// Copies the body of `func` with `args` for its parameters; an argument of another type than
    /// the parameter is converted. Returns the node of its result.
    pub fn inline(&mut self, func: &Func, args: &[ExprId]) -> ExprId {
        self.inline_nodes(func, args)[func.result.index()]
    }

    /// As [`FuncBuilder::inline`]; returns the copies of all nodes of `func`, in its order.
    pub fn inline_nodes(&mut self, func: &Func, args: &[ExprId]) -> Vec<ExprId> {
        assert_eq!(args.len(), func.params.len(), "inlining with the wrong number of arguments");
        let mut map: Vec<ExprId> = Vec::with_capacity(func.nodes.len());
        for (_, node, dtype) in func.nodes() {
            let id = match node {
                Node::Param(p) => self.cast(args[*p as usize], dtype),
                Node::Const(v) => self.intern(Node::Const(*v), dtype),
                Node::Op(op, operands) => {
                    let operands = operands.iter().map(|a| map[a.index()]).collect();
                    self.intern(Node::Op(*op, operands), dtype)
                }
            };
            map.push(id);
        }
        map
    }

    /// The function that returns `result`. Nodes that it does not need are dropped; parameters
    /// stay, used or not. The nodes are put in the order of a walk from the result (operands from
    /// left to right, each before its user), so that functions that compute the same graph are
    /// equal however they were built.
    pub fn finish(self, result: ExprId) -> Func {
        const NEW: u32 = u32::MAX;
        let mut map = vec![ExprId(NEW); self.nodes.len()];
        let mut nodes = Vec::new();
        // A node and how many of its operands have been visited.
        let mut walk = vec![(result, 0usize)];
        while let Some((id, visited)) = walk.pop() {
            if map[id.index()].0 != NEW {
                continue;
            }
            let (node, dtype) = &self.nodes[id];
            let args: &[ExprId] = if let Node::Op(_, args) = node { args } else { &[] };
            if let Some(arg) = args.get(visited) {
                walk.push((id, visited + 1));
                walk.push((*arg, 0));
                continue;
            }
            map[id.index()] = ExprId(nodes.len() as u32);
            let node = match node {
                Node::Op(op, args) => Node::Op(*op, args.iter().map(|a| map[a.index()]).collect()),
                other => other.clone(),
            };
            nodes.push((node, *dtype));
        }
        Func { params: self.params, nodes, result: map[result.index()] }
    }
}

impl Op {
    /// Number of operands.
    pub fn arity(self) -> usize {
        match self {
            Op::Select | Op::Fma => 3,
            op if op >= Op::Add => 2,
            _ => 1,
        }
    }

    /// True when the result is `bool` whatever the operands' type.
    pub fn is_predicate(self) -> bool {
        matches!(self, Op::IsNan | Op::IsInf | Op::Lt | Op::Le | Op::Gt | Op::Ge | Op::Eq | Op::Ne)
    }

    /// Whether the operation exists on a type of this class.
    pub fn accepts(self, class: Class) -> bool {
        match self {
            Op::Cast | Op::Select | Op::Eq | Op::Ne => true,
            Op::Not | Op::And | Op::Or | Op::Xor => class != Class::Float,
            Op::Shl | Op::Shr => matches!(class, Class::Signed | Class::Unsigned),
            Op::Neg
            | Op::Abs
            | Op::Sign
            | Op::Add
            | Op::Sub
            | Op::Mul
            | Op::Div
            | Op::Rem
            | Op::Mod
            | Op::Pow
            | Op::Fma => class != Class::Bool,
            Op::Min | Op::Max | Op::Lt | Op::Le | Op::Gt | Op::Ge => true,
            _ => class == Class::Float,
        }
    }
}
