//! The syntax tree of the language, with the place of every node in the text.
//!
//! Nodes live in one vector, operands before users and each subtree in one contiguous range
//! ([`AstNode::first`]), so that passes over the tree are loops and never run out of stack. Types
//! are found by `check.rs`, which also builds the [`crate::Func`]; a tree knows only the spelling.

use crate::lex::{Source, Span};
use crate::op::Op;
use std::fmt::Write;
use std::sync::Arc;
use tilewright_base::{DType, typed_id};

typed_id!(
    /// A node of a [`Program`].
    AstId,
    "n"
);

/// A number as written; which value it has depends on the type that it takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// Digits without `_`, or `inf` or `nan`; without a sign.
    pub text: Arc<str>,
    /// True after a `-` that belongs to the number.
    pub negative: bool,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub enum AstKind {
    /// A number.
    Number(Number),
    /// `true` or `false`.
    Bool(bool),
    /// A variable or a named constant.
    Name(Arc<str>),
    /// `-x`, `!x`, `~x`.
    Unary(Op, AstId),
    /// An infix operator. `logical` marks `&&` and `||`, which take only `bool`.
    Binary {
        /// Which operation.
        op: Op,
        /// True for `&&` and `||`.
        logical: bool,
        /// Operands.
        args: [AstId; 2],
    },
    /// A call: of an operation, a data type (conversion), or a function.
    Call {
        /// What is called.
        name: Arc<str>,
        /// Where the name stands.
        name_span: Span,
        /// Arguments.
        args: Vec<AstId>,
    },
    /// `c ? a : b` and `where(c, a, b)`.
    Conditional([AstId; 3]),
}

/// One node.
#[derive(Clone, Debug, PartialEq)]
pub struct AstNode {
    /// What it is.
    pub kind: AstKind,
    /// Where it stands.
    pub span: Span,
    /// The first node of its subtree, which is the range from there to the node itself.
    pub first: AstId,
}

/// A name that is introduced: of a function, of a parameter, or of a `let`.
#[derive(Clone, Debug, PartialEq)]
pub struct Binder {
    /// The name.
    pub name: Arc<str>,
    /// Where it stands.
    pub span: Span,
}

/// `let a = 1; let b = a * 2; a + b`
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Bindings in order.
    pub lets: Vec<(Binder, AstId)>,
    /// The value of the block.
    pub result: AstId,
    /// The first node of the block.
    pub first: AstId,
}

/// `f(x, y) = x * y;`
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its name.
    pub name: Binder,
    /// Its parameters.
    pub params: Vec<Binder>,
    /// What it returns.
    pub body: Block,
}

/// A parsed text: function definitions, then a block whose value is the result.
#[derive(Clone, Debug)]
pub struct Program {
    pub(crate) source: Source,
    pub(crate) nodes: Vec<AstNode>,
    pub(crate) functions: Vec<Function>,
    /// `{ a, b -> ... }`: the parameters, if the text names them.
    pub(crate) params: Option<Vec<Binder>>,
    /// Missing in a prelude, which has only functions.
    pub(crate) body: Option<Block>,
}

impl Program {
    /// One node.
    pub fn node(&self, id: AstId) -> &AstNode {
        &self.nodes[id.index()]
    }

    /// The function definitions in order.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The block whose value is the result.
    pub fn body(&self) -> Option<&Block> {
        self.body.as_ref()
    }

    /// Operands of a node.
    pub fn children(&self, id: AstId) -> &[AstId] {
        match &self.node(id).kind {
            AstKind::Number(_) | AstKind::Bool(_) | AstKind::Name(_) => &[],
            AstKind::Unary(_, a) => std::slice::from_ref(a),
            AstKind::Binary { args, .. } => args,
            AstKind::Call { args, .. } => args,
            AstKind::Conditional(args) => args,
        }
    }

    /// The tree, one node per line, indented by depth; `type_of` adds a column with types.
    pub(crate) fn tree_with(&self, type_of: &dyn Fn(AstId) -> Option<DType>) -> String {
        let mut out = String::new();
        for function in &self.functions {
            let params: Vec<&str> = function.params.iter().map(|p| &*p.name).collect();
            let _ = writeln!(out, "function {}({})", function.name.name, params.join(", "));
            self.block_tree(&function.body, &|_| None, &mut out);
        }
        if let Some(body) = &self.body {
            out.push_str("body\n");
            self.block_tree(body, type_of, &mut out);
        }
        out
    }

    /// The tree as text: one node per line, indented by depth.
    pub fn tree(&self) -> String {
        self.tree_with(&|_| None)
    }

    fn block_tree(
        &self,
        block: &Block,
        type_of: &dyn Fn(AstId) -> Option<DType>,
        out: &mut String,
    ) {
        for (binder, value) in &block.lets {
            let _ = writeln!(out, "  let {}", binder.name);
            self.node_tree(*value, 2, type_of, out);
        }
        self.node_tree(block.result, 1, type_of, out);
    }

    fn node_tree(
        &self,
        root: AstId,
        depth: usize,
        type_of: &dyn Fn(AstId) -> Option<DType>,
        out: &mut String,
    ) {
        let mut todo = vec![(root, depth)];
        while let Some((id, depth)) = todo.pop() {
            let node = self.node(id);
            let label = match &node.kind {
                AstKind::Number(n) => {
                    format!("number {}{}", if n.negative { "-" } else { "" }, n.text)
                }
                AstKind::Bool(b) => format!("bool {b}"),
                AstKind::Name(name) => format!("name {name}"),
                AstKind::Unary(op, _) => format!("unary {}", op.name()),
                AstKind::Binary { op, .. } => format!("binary {}", op.name()),
                AstKind::Call { name, .. } => format!("call {name}"),
                AstKind::Conditional(_) => "conditional".to_string(),
            };
            let ty = type_of(id).map(|t| format!(" : {t}")).unwrap_or_default();
            let (start, end) = (node.span.start, node.span.end);
            // Deep trees keep their order; only the indentation stops growing.
            let indent = "  ".repeat(depth.min(40));
            let _ = writeln!(out, "{indent}{label}{ty} @{start}..{end}");
            todo.extend(self.children(id).iter().rev().map(|c| (*c, depth + 1)));
        }
    }
}
