//! Rows of a product in groups: for which numbers of rows there are micro-kernels, and which one is next.

use crate::emitter::Emitter;
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
}
