//! [`Text`]: the text of one LLVM function while it is written.
//!
//! Values are their spelling (`%t3`, `7`, `splat (float 0x...)`); names are numbered in order of
//! creation, so the same calls give the same text. Loops are opened and closed in pairs.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fmt::Write;

/// An open counted loop.
#[derive(Debug)]
pub(crate) struct LoopText {
    id: u32,
    step: String,
    /// The induction variable.
    pub(crate) iv: String,
}

/// A function being written.
#[derive(Debug, Default)]
pub(crate) struct Text {
    /// Allocations, placed at the top of the entry block.
    pub(crate) allocas: String,
    /// Everything else.
    pub(crate) body: String,
    next: u32,
    block: String,
    /// Declarations of intrinsics that the text needs.
    pub(crate) declares: BTreeSet<String>,
}

impl Text {
    pub(crate) fn new() -> Text {
        Text { block: "start".into(), ..Text::default() }
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// `%tN = expr`; returns `%tN`.
    pub(crate) fn ins(&mut self, expr: impl Display) -> String {
        let n = self.fresh();
        let _ = writeln!(self.body, "  %t{n} = {expr}");
        format!("%t{n}")
    }

    /// An instruction without a result.
    pub(crate) fn stmt(&mut self, line: impl Display) {
        let _ = writeln!(self.body, "  {line}");
    }

    /// A remark in the text.
    pub(crate) fn comment(&mut self, words: impl Display) {
        let _ = writeln!(self.body, "  ; {words}");
    }

    /// A stack slot.
    pub(crate) fn alloca(&mut self, ty: &str) -> String {
        let n = self.fresh();
        let _ = writeln!(self.allocas, "  %a{n} = alloca {ty}");
        format!("%a{n}")
    }

    /// A new label, not placed yet.
    pub(crate) fn label(&mut self) -> String {
        format!("L{}", self.fresh())
    }

    /// Starts a block.
    pub(crate) fn place(&mut self, label: &str) {
        let _ = writeln!(self.body, "{label}:");
        self.block = label.to_owned();
    }

    /// Unconditional jump.
    pub(crate) fn br(&mut self, label: &str) {
        self.stmt(format_args!("br label %{label}"));
    }

    /// Conditional jump.
    pub(crate) fn br_if(&mut self, cond: &str, yes: &str, no: &str) {
        self.stmt(format_args!("br i1 {cond}, label %{yes}, label %{no}"));
    }

    /// Opens `for iv in (lo..hi).step_by(step)`.
    pub(crate) fn begin_loop(&mut self, lo: &str, hi: &str, step: &str) -> LoopText {
        let id = self.fresh();
        let before = self.block.clone();
        self.br(&format!("H{id}"));
        self.place(&format!("H{id}"));
        let iv = format!("%i{id}");
        self.stmt(format_args!("{iv} = phi i64 [ {lo}, %{before} ], [ %n{id}, %C{id} ]"));
        self.stmt(format_args!("%c{id} = icmp slt i64 {iv}, {hi}"));
        self.br_if(&format!("%c{id}"), &format!("B{id}"), &format!("X{id}"));
        self.place(&format!("B{id}"));
        LoopText { id, step: step.to_owned(), iv }
    }

    /// Closes a loop.
    pub(crate) fn end_loop(&mut self, open: LoopText) {
        let LoopText { id, step, iv } = open;
        self.br(&format!("C{id}"));
        self.place(&format!("C{id}"));
        self.stmt(format_args!("%n{id} = add nsw i64 {iv}, {step}"));
        self.br(&format!("H{id}"));
        self.place(&format!("X{id}"));
    }

    /// A call of an intrinsic, declared on the way. Arguments are `(type, value)`; attributes of an
    /// argument go between.
    pub(crate) fn intrinsic(&mut self, ret: &str, name: &str, args: &[(&str, &str)]) -> String {
        self.tagged(ret, name, args, "")
    }

    /// As [`Text::intrinsic`], with metadata behind the call.
    pub(crate) fn tagged(
        &mut self,
        ret: &str,
        name: &str,
        args: &[(&str, &str)],
        tag: &str,
    ) -> String {
        let types: Vec<&str> =
            args.iter().map(|(t, _)| t.split(" align").next().unwrap_or(t)).collect();
        self.declares.insert(format!("declare {ret} @{name}({})", types.join(", ")));
        let list: Vec<String> = args.iter().map(|(t, v)| format!("{t} {v}")).collect();
        let call = format!("call {ret} @{name}({}){tag}", list.join(", "));
        if ret == "void" {
            self.stmt(call);
            String::new()
        } else {
            self.ins(call)
        }
    }
}

impl LoopText {
    /// Replaces the step by a value that the body computed.
    pub(crate) fn set_step(&mut self, step: &str) {
        self.step = step.to_owned();
    }
}
