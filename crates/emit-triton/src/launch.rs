//! The launcher, and the module around the kernel.

use crate::Knobs;
use crate::emitter::{Emitter, LINE_MAX, StrideValue};
use crate::helpers::{HELPERS, HOST, HOST_MEMORY};
use crate::integers::Side;
use crate::types::torch;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use tilewright_layout::{Atom, Dim, linear_in};
use tilewright_tile::ParamId;

impl Emitter<'_> {
    /// Lines that split the program's number into the indices of the grid.
    pub(crate) fn grid_prologue(&mut self) -> Vec<String> {
        let kernel = self.kernel;
        let grid = &kernel.grid;
        let name =
            |e: &Self, axis: usize| e.integers.get(&grid[axis].name).cloned().unwrap_or_default();
        match grid.len() {
            0 => vec![],
            1 => vec![format!("{} = tl.program_id(0)", name(self, 0))],
            n => {
                let mut lines = vec!["pid = tl.program_id(0)".to_string()];
                for axis in (1..n).rev() {
                    let extent =
                        self.with_integers(Side::Kernel, &[], |p| p.atom(&grid[axis].extent));
                    let own = name(self, axis);
                    lines.push(format!("{own} = pid % {extent}"));
                    match axis {
                        1 => lines.push(format!("{} = pid // {extent}", name(self, 0))),
                        _ => lines.push(format!("pid = pid // {extent}")),
                    }
                }
                lines
            }
        }
    }

    /// The whole module.
    pub(crate) fn module(&mut self, name: &str, prologue: &[String], knobs: Knobs) -> String {
        if self.uses_floor.get() {
            self.helper("floor_div");
        }
        let needs: Vec<&'static str> = HELPERS
            .iter()
            .filter(|h| self.helpers.contains(h.name))
            .flat_map(|h| h.needs.iter().copied())
            .collect();
        self.helpers.extend(needs);
        let mut out = self.docstring(knobs);
        let uses_libdevice = self.funcs.iter().any(|f| f.2.contains("libdevice."));
        out += "\nimport contextlib\n\nimport triton\nimport triton.language as tl\n";
        if uses_libdevice {
            out += "from triton.language.extra import libdevice\n";
        }
        let sizes: Vec<String> = self
            .schedule
            .tiles
            .iter()
            .map(|(n, v)| format!("{} = {v}\n", self.integers[n]))
            .collect();
        if !sizes.is_empty() {
            out += "\n# Masks were left out where they are not needed for these sizes.\n";
            out += &sizes.concat();
        }
        for helper in HELPERS.iter().filter(|h| self.helpers.contains(h.name)) {
            let _ = write!(out, "\n\n{}", helper.text);
        }
        for (_, _, text) in &self.funcs {
            let _ = write!(out, "\n\n@triton.jit\n{text}");
        }
        let _ = write!(out, "\n\n{}", self.kernel_text(name, prologue));
        let _ = write!(out, "\n\n{HOST}");
        if (0..self.kernel.params.len()).any(|p| self.takes_memory(ParamId::from(p))) {
            let _ = write!(out, "\n\n{HOST_MEMORY}");
        }
        let _ = write!(out, "\n\n{}", self.launcher(name, knobs));
        out
    }

    fn docstring(&self, knobs: Knobs) -> String {
        let mut sizes: Vec<String> =
            self.schedule.tiles.iter().map(|(n, v)| format!(" --set {n}={v}")).collect();
        let usual = Knobs::default();
        for (name, value, usual) in [
            ("num_warps", knobs.num_warps, usual.num_warps),
            ("num_stages", knobs.num_stages, usual.num_stages),
        ] {
            if value != usual {
                sizes.push(format!(" --set {name}={value}"));
            }
        }
        let text = self.kernel.to_string();
        // Identifiers may hold letters that only Python's strings know.
        let text = text.replace('\\', "\\\\").replace('"', "\\\"");
        format!(
            "\"\"\"Printed by `tw inspect --tile FILE --emit triton{}` from\n\n{text}\n\"\"\"\n",
            sizes.concat()
        )
    }

    fn kernel_text(&self, name: &str, prologue: &[String]) -> String {
        let params: Vec<&str> = self.params.iter().map(|p| p.pointer.as_str()).collect();
        let symbols: Vec<&str> =
            self.kernel.symbols.iter().map(|s| self.integers[&s.name].as_str()).collect();
        let strides: Vec<&str> = self.stride_args.iter().map(|s| s.name.as_str()).collect();
        let mut constants: Vec<String> = self
            .schedule
            .tiles
            .keys()
            .map(|t| format!("{}: tl.constexpr", self.integers[t]))
            .collect();
        constants.push("INDEX: tl.constexpr".to_string());
        let mut out = format!("@triton.jit\ndef {name}(\n");
        for group in [&params, &symbols, &strides] {
            for line in wrapped(group) {
                let _ = writeln!(out, "    {line}");
            }
        }
        for constant in constants {
            let _ = writeln!(out, "    {constant},");
        }
        out += "):\n";
        let body = self.scopes.first().map(|s| s.lines.as_slice()).unwrap_or_default();
        for line in prologue.iter().chain(body) {
            let _ = writeln!(out, "    {line}");
        }
        if prologue.is_empty() && body.is_empty() {
            out += "    pass\n";
        }
        out
    }

    /// An integer in the launcher.
    fn host(&self, dim: &Dim) -> String {
        self.with_integers(Side::Host, &[], |p| p.text(dim))
    }

    /// For each size: the text that reads it from a shape.
    fn solved(&self) -> BTreeMap<Arc<str>, String> {
        let mut solved = BTreeMap::new();
        // Extents that are a size come before those from which one follows.
        for plain in [true, false] {
            for (id, param) in self.kernel.params.iter() {
                if self.takes_memory(id) {
                    continue;
                }
                let tensor = &self.params[id.index()].tensor;
                for (i, axis) in param.layout.axes.iter().enumerate() {
                    let extent = self.bound(&axis.extent);
                    let here = format!("{tensor}_shape[{i}]");
                    if let Some(symbol) = extent.as_symbol() {
                        solved.entry(symbol.clone()).or_insert(here);
                        continue;
                    }
                    let mut symbols = Vec::new();
                    extent.for_each_symbol(&mut |s| {
                        if !symbols.contains(s) {
                            symbols.push(s.clone());
                        }
                    });
                    let linear = extent
                        .terms()
                        .iter()
                        .all(|(m, _)| m.len() <= 1 && m.iter().all(|a| matches!(a, Atom::Sym(_))));
                    let ([symbol], false, true) = (symbols.as_slice(), plain, linear) else {
                        continue;
                    };
                    let Some((factor, rest)) = linear_in(&extent, symbol) else { continue };
                    let text = format!("({here} - {}) // {}", rest, factor);
                    solved.entry(symbol.clone()).or_insert(text);
                }
            }
        }
        solved
    }

    fn launcher(&self, name: &str, knobs: Knobs) -> String {
        let kernel = self.kernel;
        let solved = self.solved();
        let tensors: Vec<&str> = self.params.iter().map(|p| p.tensor.as_str()).collect();
        let mut signature: Vec<String> = tensors.iter().map(|t| t.to_string()).collect();
        signature.push("*".to_string());
        let unsolved = kernel.symbols.iter().filter(|s| !solved.contains_key(&s.name));
        signature.extend(unsolved.map(|s| self.integers[&s.name].clone()));
        signature.push(format!("num_warps={}", knobs.num_warps));
        signature.push(format!("num_stages={}", knobs.num_stages));
        signature.push("enable_fp_fusion=True".to_string());
        signature.push("stream=None".to_string());
        let head = format!("def launch({}):", signature.join(", "));
        let mut out = match head.len() {
            0..=LINE_MAX => format!("{head}\n"),
            _ => {
                let texts: Vec<&str> = signature.iter().map(String::as_str).collect();
                format!("def launch(\n    {}\n):\n", wrapped(&texts).join("\n    "))
            }
        };
        let mut line = |text: String| {
            let _ = writeln!(out, "    {text}");
        };
        let shaped = || kernel.params.iter().filter(|(id, _)| !self.takes_memory(*id));
        let memory = || kernel.params.iter().filter(|(id, _)| self.takes_memory(*id));
        for (id, param) in shaped() {
            let (tensor, dtype, rank) =
                (&self.params[id.index()].tensor, torch(param.dtype), param.layout.rank());
            line(format!("{tensor}_shape = _shape(\"{tensor}\", {tensor}, \"{dtype}\", {rank})"));
        }
        for symbol in &kernel.symbols {
            let own = &self.integers[&symbol.name];
            if let Some(text) = solved.get(&symbol.name) {
                line(format!("{own} = {text}"));
            }
            let condition = match (symbol.range.min, symbol.range.max) {
                (min, i64::MAX) => format!("{own} >= {min}"),
                (min, max) => format!("{min} <= {own} <= {max}"),
            };
            if symbol.range.min > 0 || symbol.range.max < i64::MAX {
                line(format!("if not {condition}:"));
                line(format!("    raise ValueError(f\"{own} is {{{own}}}, not {condition}\")"));
            }
        }
        for (id, param) in shaped() {
            let tensor = &self.params[id.index()].tensor;
            let shape: Vec<String> =
                param.layout.shape().iter().map(|d| self.host(&self.bound(d))).collect();
            let shape = match shape.as_slice() {
                [one] => format!("({one},)"),
                all => format!("({})", all.join(", ")),
            };
            line(format!("_expect(\"{tensor}\", {tensor}_shape, {shape})"));
        }
        for (id, param) in memory() {
            let (tensor, dtype) = (&self.params[id.index()].tensor, torch(param.dtype));
            let elements = self.host(&self.bound(&param.layout.alloc_elements()));
            line(format!("_memory(\"{tensor}\", {tensor}, \"{dtype}\", {elements})"));
        }
        let extents: Vec<String> = kernel
            .grid
            .iter()
            .map(|g| self.with_integers(Side::Host, &[], |p| p.factor(&g.extent)))
            .collect();
        let grid = if extents.is_empty() { "1".to_string() } else { extents.join(" * ") };
        line(format!("grid = {grid}"));
        line("if grid <= 0:".to_string());
        line("    return".to_string());
        let lasts: Vec<String> = shaped()
            .map(|(id, _)| format!("_last({})", self.params[id.index()].tensor))
            .chain(memory().map(|(id, _)| format!("{}.numel()", self.params[id.index()].tensor)))
            .collect();
        if !lasts.is_empty() {
            let largest = match lasts.as_slice() {
                [one] => one.clone(),
                all => format!("max({})", all.join(", ")),
            };
            line(format!("index = tl.int64 if {largest} >= 2**31 - 2**20 else tl.int32"));
        } else {
            line("index = tl.int32".to_string());
        }
        line("with _on(stream):".to_string());
        line(format!("    {name}[(grid,)]("));
        let mut group = |texts: &[String]| {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            for text in wrapped(&texts) {
                line(format!("        {text}"));
            }
        };
        group(&self.params.iter().map(|p| p.tensor.clone()).collect::<Vec<_>>());
        group(&kernel.symbols.iter().map(|s| self.integers[&s.name].clone()).collect::<Vec<_>>());
        let strides: Vec<String> = self
            .stride_args
            .iter()
            .map(|s| match &s.value {
                StrideValue::Tensor(tensor, axis) => format!("{tensor}.stride({axis})"),
                StrideValue::Layout(dim) => self.host(&self.bound(dim)),
            })
            .collect();
        group(&strides);
        let mut constants: Vec<String> =
            self.schedule.tiles.keys().map(|t| format!("{0}={0}", self.integers[t])).collect();
        constants.push("INDEX=index".to_string());
        group(&constants);
        let knobs = ["num_warps", "num_stages", "enable_fp_fusion"];
        group(&knobs.map(|knob| format!("{knob}={knob}")));
        line("    )".to_string());
        out
    }
}

/// Arguments in lines of moderate length, each ending in a comma.
fn wrapped(items: &[&str]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for item in items {
        match lines.last_mut() {
            Some(line) if line.len() + item.len() < 84 => {
                let _ = write!(line, " {item},");
            }
            _ => lines.push(format!("{item},")),
        }
    }
    lines
}
