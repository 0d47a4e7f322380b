//! Scalar functions of maps, each printed once as a device function.

use std::collections::HashMap;
use tilewright_expr::{ExprId, Func, FuncBuilder, Node, Op};

/// Printed functions, in order of first use.
#[derive(Debug, Default)]
pub(crate) struct Funcs {
    numbers: HashMap<(Func, bool), usize>,
    text: String,
}

impl Funcs {
    /// The name under which `func` can be called. With `unrounded` a last conversion to a narrower
    /// float is left to whoever stores the result.
    pub(crate) fn name(&mut self, func: &Func, unrounded: bool) -> String {
        let short = func.dtype().is_float() && func.dtype().bits() == 16;
        let stripped = if unrounded { without_last_cast(func) } else { None };
        let func = stripped.as_ref().unwrap_or(func);
        let next = self.numbers.len();
        let number = *self.numbers.entry((func.clone(), short)).or_insert(next);
        let name = format!("f{number}");
        if number == next {
            self.text.push_str(&match short {
                true => func.to_cuda_for_16_bits(&name),
                false => func.to_cuda(&name),
            });
        }
        name
    }

    /// Whether anything was printed.
    pub(crate) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// All definitions.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

/// `x -> g(x)` for a function that ends in a cast of the f32 value `g(x)` to a narrower float.
fn without_last_cast(func: &Func) -> Option<Func> {
    let Node::Op(Op::Cast, args) = func.node(func.result()) else { return None };
    let inner = args[0];
    let is_narrowing = func.dtype_of(inner) == tilewright_base::DType::F32
        && func.dtype().is_float()
        && func.dtype().bits() < 32;
    is_narrowing.then(|| returning(func, inner))
}

/// The function that returns an inner node of `func`.
fn returning(func: &Func, inner: ExprId) -> Func {
    let mut b = FuncBuilder::new();
    let params: Vec<ExprId> = func.params().iter().map(|p| b.param(&p.name, p.dtype)).collect();
    let nodes = b.inline_nodes(func, &params);
    b.finish(nodes[inner.index()])
}
