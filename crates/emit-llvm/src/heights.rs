//! Rows of a product in groups: for which numbers of rows there are micro-kernels, and which one is next.

use crate::emitter::Emitter;
use crate::mma::{Micro, micro_kernel};
use tilewright_layout::Dim;

impl Emitter<'_> {
    /// Numbers of rows for which a micro-kernel is written.
    pub(crate) fn row_variants(&self, m: &Dim, rows: i64) -> Vec<i64> {
        if let Some(m) = m.as_const() {
            if m <= 0 {
                return vec![1];
            }
            let groups = (m + rows - 1) / rows;
            let (base, more) = (m / groups, m % groups);
            return if more == 0 { vec![base] } else { vec![base + 1, base] };
        }
        let most = self.facts.bounds(m).max;
        let mut all: Vec<i64> = Vec::new();
        for r in [rows, 16, 8, 4, 2, 1] {
            if r <= rows && !all.contains(&r) && (r <= most || all.is_empty()) {
                all.push(r.min(most.max(1)));
            }
        }
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.dedup();
        all
    }

    /// How many rows the group that starts at `i0` has.
    pub(crate) fn row_count(
        &mut self,
        m: &Dim,
        rows: i64,
        variants: &[i64],
        i0: &str,
        m_v: &str,
        even: bool,
    ) -> String {
        if let [only] = variants {
            return only.to_string();
        }
        if let Some(m) = m.as_const().filter(|_| even) {
            let groups = (m + rows - 1) / rows;
            let (base, more) = (m / groups, m % groups);
            let tall = more * (base + 1);
            let is_tall = self.c.t.ins(format_args!("icmp slt i64 {i0}, {tall}"));
            return self.c.t.ins(format_args!("select i1 {is_tall}, i64 {}, i64 {base}", base + 1));
        }
        let left = self.c.t.ins(format_args!("sub nsw i64 {m_v}, {i0}"));
        let mut count = variants.last().copied().unwrap_or(1).to_string();
        for r in variants.iter().rev().skip(1) {
            let fits = self.c.t.ins(format_args!("icmp sge i64 {left}, {r}"));
            count = self.c.t.ins(format_args!("select i1 {fits}, i64 {r}, i64 {count}"));
        }
        count
    }

    /// Micro-kernels for these numbers of rows, and their names.
    pub(crate) fn micro_kernels(
        &mut self,
        micro: &Micro,
        variants: &[i64],
        names: &[String],
    ) -> Vec<(i64, String)> {
        let mut functions = Vec::new();
        for &rows in variants {
            let name = format!("{}.mma{}.r{rows}", self.k.name, self.functions.len());
            let bits = self.knobs.vector_bits;
            let (text, code) = match micro.kind {
                _ if micro.kind.is_tile() => {
                    self.tiles = true;
                    let config = format!("@{}.tiles", self.k.name);
                    crate::amx::micro_kernel(micro, rows, [&name, &config], names, bits)
                }
                _ => micro_kernel(micro, rows, &name, names, bits),
            };
            functions.push((rows, name));
            self.functions.push(text);
            self.c.helpers.extend(code.helpers);
            self.c.t.declares.extend(code.t.declares);
        }
        functions
    }

    /// Calls the micro-kernel for `count` rows.
    pub(crate) fn call_for_rows(&mut self, functions: &[(i64, String)], count: &str, args: &str) {
        if let [(_, name)] = functions {
            return self.c.t.stmt(format_args!("call void @{name}({args})"));
        }
        let end = self.c.t.label();
        let labels: Vec<String> = functions.iter().map(|_| self.c.t.label()).collect();
        let cases: Vec<String> = functions[1..]
            .iter()
            .zip(&labels[1..])
            .map(|((rows, _), l)| format!("i64 {rows}, label %{l}"))
            .collect();
        let cases = cases.join(" ");
        self.c.t.stmt(format_args!("switch i64 {count}, label %{} [ {cases} ]", labels[0]));
        for ((_, name), label) in functions.iter().zip(&labels) {
            self.c.t.place(label);
            self.c.t.stmt(format_args!("call void @{name}({args})"));
            self.c.t.br(&end);
        }
        self.c.t.place(&end);
    }
}
