//! One line (or a few) of Triton for each tile operation.
//!
//! To add an operation: an arm in `Emitter::op`. What cannot be said is reported with
//! `Emitter::problem`; the text goes on, so that everything unsupported is found at once.

use crate::emitter::Emitter;
use crate::types::{Axis, across, constant, element, identity, narrow, tuple};
use tilewright_base::DType;
use tilewright_expr::Func;
use tilewright_layout::Dim;
use tilewright_tile::{Operand, ReduceKind, TileId, TileOp};

/// Elements of the products that are summed without `tl.dot`, at most: they stand in registers.
const PRODUCTS_MAX: i64 = 1 << 16;

impl<'a> Emitter<'a> {
    /// Prints `id = op`; `target` is a name that the result must have.
    pub(crate) fn op(&mut self, id: TileId, op: &'a TileOp, target: Option<String>) {
        self.defs[id.index()] = Some(op);
        // Operations that only rename.
        let renames = match op {
            TileOp::Permute { x, perm } => {
                let visible: Vec<usize> = self.axes(*x).iter().map(|a| a.logical).collect();
                let moved: Vec<usize> =
                    perm.iter().copied().filter(|p| visible.contains(p)).collect();
                (moved == visible).then_some(*x)
            }
            TileOp::Reshape(x) => {
                let (from, to) = (self.axes(*x), self.axes(id));
                let same = from.len() == to.len()
                    && from.iter().zip(&to).all(|(a, b)| a.extent == b.extent);
                same.then_some(*x)
            }
            TileOp::Broadcast(x) => {
                (self.axes(x.tile).len() == self.axes(id).len()).then_some(x.tile)
            }
            TileOp::Reduce { x, limit: None, .. } => {
                (self.axes(*x).len() == self.axes(id).len()).then_some(*x)
            }
            TileOp::Scan { x, axis, exclusive: false, .. } => {
                self.axes(*x).iter().all(|a| a.logical != *axis).then_some(*x)
            }
            _ => None,
        };
        if let (Some(x), None) = (renames, &target) {
            self.tiles[id.index()] = self.tile(x);
            return;
        }
        let name = match target {
            Some(name) => {
                self.tiles[id.index()] = name.clone();
                self.check_type(id);
                name
            }
            None => self.define(id),
        };
        if let Some(x) = renames {
            let x = self.tile(x);
            return self.line(format!("{name} = {x}"));
        }
        match op {
            TileOp::Full(value) => {
                let (shape, ty) = (self.shape(id), self.element(id));
                let value = constant(*value, self.kernel.ty(id).dtype);
                self.line(format!("{name} = tl.full({shape}, {value}, {ty})"));
            }
            TileOp::Load { param, index, steps, fill } => {
                self.load(&name, id, *param, index, steps, *fill);
            }
            TileOp::Gather { .. } => self.gather(&name, id, op),
            TileOp::Map { func, args } => self.map(&name, id, func, args),
            TileOp::Reduce { kind, x, axis, limit } => {
                self.reduce(&name, id, *kind, *x, *axis, limit.as_ref());
            }
            TileOp::ArgReduce { .. } => self.arg_reduce(&name, op),
            TileOp::Scan { .. } => self.scan(&name, id, op),
            TileOp::Mma { .. } => self.mma(&name, id, op),
            TileOp::Permute { x, perm } => {
                let visible: Vec<usize> = self.axes(*x).iter().map(|a| a.logical).collect();
                let order: Vec<String> = perm
                    .iter()
                    .filter_map(|p| visible.iter().position(|v| v == p))
                    .map(|p| p.to_string())
                    .collect();
                let x = self.tile(*x);
                self.line(format!("{name} = tl.permute({x}, ({}))", order.join(", ")));
            }
            TileOp::Reshape(x) => self.reshape(&name, id, *x),
            TileOp::Broadcast(operand) => {
                let axes = self.axes(id);
                let value = self.operand(operand, &axes).0;
                self.line(format!("{name} = tl.broadcast_to({value}, {})", tuple(&axes)));
            }
            TileOp::Iota { axis, start } => self.iota(&name, id, *axis, start),
            TileOp::Random { seed, start } => self.random(&name, id, *seed, start),
        }
    }

    /// An operand with ones for the axes of the result that it lacks, and the axes that it has.
    fn operand(&self, operand: &Operand, axes: &[Axis]) -> (String, Vec<usize>) {
        let at: Vec<usize> = self
            .axes(operand.tile)
            .iter()
            .filter_map(|a| axes.iter().position(|r| r.logical == operand.along[a.logical]))
            .collect();
        (across(&self.tile(operand.tile), &at, axes.len()), at)
    }

    /// The value in the type that computes.
    fn computing(&self, tile: TileId, text: String) -> String {
        if narrow(self.kernel.ty(tile).dtype) { format!("{text}.to(tl.float32)") } else { text }
    }

    /// What rounds a computed value to its type.
    fn rounding(&self, tile: TileId) -> String {
        match narrow(self.kernel.ty(tile).dtype) {
            true => format!(".to({})", self.element(tile)),
            false => String::new(),
        }
    }

    fn map(&mut self, name: &str, id: TileId, func: &Func, args: &[Operand]) {
        let known = self.funcs.iter().find(|(f, ..)| f == func).map(|(_, n, _)| n.clone());
        let callee = match known {
            Some(callee) => callee,
            None => {
                let callee = self.names.fresh(&format!("map_{name}"));
                match func.to_triton(&callee) {
                    Ok(text) => self.funcs.push((func.clone(), callee.clone(), text)),
                    Err(e) => self.problem(id, format_args!("map: {}", e.message())),
                }
                callee
            }
        };
        let axes = self.axes(id);
        let mut covered = vec![false; axes.len()];
        let mut values = Vec::new();
        for arg in args {
            let (text, at) = self.operand(arg, &axes);
            at.iter().for_each(|&q| covered[q] = true);
            values.push(self.computing(arg.tile, text));
        }
        let suffix = self.rounding(id);
        if covered.iter().all(|&c| c) {
            return self.call(name, &callee, &values, &suffix);
        }
        let value = format!("{callee}({}){suffix}", values.join(", "));
        self.call(name, "tl.broadcast_to", &[value, tuple(&axes)], "");
    }

    /// The condition under which position `q` of `axes` counts: below the limit and no padding.
    /// Nothing when all count.
    fn counts(&self, axes: &[Axis], q: usize, limit: Option<&Dim>) -> Option<String> {
        let axis = &axes[q];
        let lanes = across(&format!("tl.arange(0, {})", axis.text), &[q], axes.len());
        let mut conditions = Vec::new();
        if let Some(limit) = limit
            && !self.proves_non_negative(&(limit - axis.extent))
        {
            conditions.push(format!("{lanes} < {}", self.int(limit)));
        }
        if axis.is_padded() {
            conditions.push(format!("{lanes} < {}", axis.extent));
        }
        match conditions.as_slice() {
            [] => None,
            [one] => Some(one.clone()),
            all => Some(format!("({})", all.join(") & ("))),
        }
    }

    /// The operand of a reduction: elements that do not count are the identity.
    fn counted(
        &mut self,
        name: &str,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: Option<&Dim>,
    ) -> (String, Option<usize>) {
        let dtype = self.kernel.ty(x).dtype;
        let axes = self.axes(x);
        let text = self.computing(x, self.tile(x));
        let none = constant(identity(kind, dtype), dtype);
        let Some(q) = axes.iter().position(|a| a.logical == axis) else {
            let Some(limit) = limit else { return (text, None) };
            return (format!("tl.where({} > 0, {text}, {none})", self.int(limit)), None);
        };
        let already = limit.is_some_and(|l| {
            !axes[q].is_padded() && self.beyond(x, axis, l) == Some(identity(kind, dtype))
        });
        let condition = if already { None } else { self.counts(&axes, q, limit) };
        let Some(condition) = condition else { return (text, Some(q)) };
        let counted = self.names.fresh(&format!("{name}_of"));
        self.call(&counted, "tl.where", &[condition, text, none], "");
        (counted, Some(q))
    }

    fn reduce(
        &mut self,
        name: &str,
        id: TileId,
        kind: ReduceKind,
        x: TileId,
        axis: usize,
        limit: Option<&Dim>,
    ) {
        let dtype = self.kernel.ty(x).dtype;
        if dtype == DType::Bool && matches!(kind, ReduceKind::Sum | ReduceKind::Prod) {
            return self.problem(id, format_args!("reduce {kind:?} of bool"));
        }
        let (mut value, at) = self.counted(name, kind, x, axis, limit);
        let mut suffix = self.rounding(id);
        let Some(q) = at else { return self.line(format!("{name} = {value}{suffix}")) };
        if !dtype.is_float() {
            // Small integers are reduced in 32 bits.
            match dtype {
                DType::Bool => {
                    value = format!("{value}.to(tl.int32)");
                    suffix = " != 0".to_string();
                }
                _ if dtype.bits() < 32 => suffix = format!(".to({})", self.element(id)),
                _ => {}
            }
        }
        let float = dtype.is_float();
        let combine = match kind {
            ReduceKind::Sum => {
                return self.line(format!("{name} = tl.sum({value}, axis={q}){suffix}"));
            }
            ReduceKind::Max if !float => {
                return self.line(format!("{name} = tl.max({value}, axis={q}){suffix}"));
            }
            ReduceKind::Min if !float => {
                return self.line(format!("{name} = tl.min({value}, axis={q}){suffix}"));
            }
            // Triton's own lose NaN.
            ReduceKind::Max => self.helper("nan_max"),
            ReduceKind::Min => self.helper("nan_min"),
            ReduceKind::Prod => self.helper("multiply"),
        };
        self.line(format!("{name} = tl.reduce({value}, {q}, {combine}){suffix}"));
    }

    fn arg_reduce(&mut self, name: &str, op: &TileOp) {
        let TileOp::ArgReduce { kind, x, axis, limit, last } = op else { return };
        let axes = self.axes(*x);
        let Some(q) = axes.iter().position(|a| a.logical == *axis) else {
            let shape = tuple(&axes);
            return self.line(format!("{name} = tl.full({shape}, 0, tl.int64)"));
        };
        let (value, _) = self.counted(name, *kind, *x, *axis, limit.as_ref());
        let combine = self.helper(match (kind, last) {
            (ReduceKind::Max, false) => "first_max",
            (ReduceKind::Max, true) => "last_max",
            (_, false) => "first_min",
            (_, true) => "last_min",
        });
        let lanes = across(&format!("tl.arange(0, {})", axes[q].text), &[q], axes.len());
        let pair = self.names.fresh(&format!("{name}_at"));
        match axes.len() {
            1 => self.line(format!("{pair} = {lanes}")),
            _ => self.call(&pair, "tl.broadcast_to", &[lanes, tuple(&axes)], ""),
        }
        // What does not count must not win a tie: the first is before it anyway.
        let condition = self.counts(&axes, q, limit.as_ref()).filter(|_| *last);
        if let Some(condition) = &condition {
            let arguments = [condition.clone(), pair.clone(), "-1".to_string()];
            self.call(&pair, "tl.where", &arguments, "");
        }
        let best = self.names.fresh(&format!("{name}_value"));
        self.line(format!("{best}, {pair} = tl.reduce(({value}, {pair}), {q}, {combine})"));
        match condition {
            Some(_) => self.line(format!("{name} = tl.maximum({pair}, 0).to(tl.int64)")),
            None => self.line(format!("{name} = {pair}.to(tl.int64)")),
        }
    }

    fn scan(&mut self, name: &str, id: TileId, op: &TileOp) {
        let TileOp::Scan { kind, x, axis, exclusive, reverse } = op else { return };
        let dtype = self.kernel.ty(*x).dtype;
        if dtype == DType::Bool {
            return self.problem(id, "scan of bool");
        }
        let axes = self.axes(*x);
        let none = constant(identity(*kind, dtype), dtype);
        let Some(q) = axes.iter().position(|a| a.logical == *axis) else {
            // Exclusive over one element: nothing.
            let (shape, ty) = (tuple(&axes), self.element(id));
            return self.line(format!("{name} = tl.full({shape}, {none}, {ty})"));
        };
        let mut value = self.computing(*x, self.tile(*x));
        let mut suffix = self.rounding(id);
        if !dtype.is_float() && dtype.bits() < 32 {
            value = format!("{value}.to(tl.int32)");
            suffix = format!(".to({})", self.element(id));
        }
        if let Some(condition) = self.counts(&axes, q, None).filter(|_| *reverse) {
            // From the end, the padding comes first.
            value = format!("tl.where({condition}, {value}, {none})");
        }
        let combine = self.helper(match (kind, dtype.is_float()) {
            (ReduceKind::Sum, _) => "add",
            (ReduceKind::Prod, _) => "multiply",
            (ReduceKind::Max, true) => "nan_max",
            (ReduceKind::Min, true) => "nan_min",
            (ReduceKind::Max, false) => "int_max",
            (ReduceKind::Min, false) => "int_min",
        });
        let mut arguments = vec![value, q.to_string(), combine.to_string()];
        if *reverse {
            arguments.push("reverse=True".to_string());
        }
        if !*exclusive {
            return self.call(name, "tl.associative_scan", &arguments, &suffix);
        }
        // The neighbour's inclusive value.
        let all = self.names.fresh(&format!("{name}_all"));
        self.call(&all, "tl.associative_scan", &arguments, "");
        let lanes = across(&format!("tl.arange(0, {})", axes[q].text), &[q], axes.len());
        let end = axes[q].extent - 1;
        let (neighbour, inside) = match reverse {
            false => (format!("tl.maximum({lanes} - 1, 0)"), format!("{lanes} > 0")),
            true => (format!("tl.minimum({lanes} + 1, {end})"), format!("{lanes} < {end}")),
        };
        let at = self.names.fresh(&format!("{name}_at"));
        let shape = tuple(&axes);
        self.line(format!("{at} = tl.broadcast_to({neighbour}, {shape})"));
        let value = format!("tl.gather({all}, {at}, {q})");
        self.call(name, "tl.where", &[inside, value, none], &suffix);
    }

    fn mma(&mut self, name: &str, id: TileId, op: &TileOp) {
        let TileOp::Mma { acc, a, b, limit } = op else { return };
        let (of_a, of_b, of_acc) = (self.axes(*a), self.axes(*b), self.axes(*acc));
        let (ta, tb, to) =
            (self.kernel.ty(*a).dtype, self.kernel.ty(*b).dtype, self.kernel.ty(*acc).dtype);
        let depth = of_a.iter().find(|x| x.logical == 1).cloned();
        // Operands whose elements past the limit must not count.
        let mut texts = [self.tile(*a), self.tile(*b)];
        if let Some(depth) = &depth {
            for (text, tile, axes, logical) in [(0, *a, &of_a, 1), (1, *b, &of_b, 0)] {
                let Some(q) = axes.iter().position(|x| x.logical == logical) else { continue };
                let dtype = self.kernel.ty(tile).dtype;
                let zero = identity(ReduceKind::Sum, dtype);
                let filled = |l: &Dim| self.beyond(tile, logical, l) == Some(zero);
                if !depth.is_padded() && limit.as_ref().is_none_or(filled) {
                    continue;
                }
                let Some(condition) = self.counts(axes, q, limit.as_ref()) else { continue };
                let counted = self.names.fresh(&format!("{}_counted", texts[text]));
                let arguments = [condition, texts[text].clone(), constant(zero, dtype)];
                self.call(&counted, "tl.where", &arguments, "");
                texts[text] = counted;
            }
        } else if let Some(limit) = limit
            && !self.proves_non_negative(&(limit - 1))
        {
            // One product, or none.
            let none = constant(identity(ReduceKind::Sum, ta), ta);
            for text in &mut texts {
                *text = format!("tl.where({} > 0, {text}, {none})", self.int(limit));
            }
        }
        let compute = element(to.compute()).unwrap_or("tl.float32");
        let suffix = self.rounding(id);
        let acc_text = self.computing(*acc, self.tile(*acc));
        let depth_min = if ta.bits() == 8 && ta == tb { 32 } else { 16 };
        let dot = of_acc.len() == 2
            && depth.as_ref().is_some_and(|d| d.padded >= depth_min)
            && match to.is_float() {
                true => true,
                false => ta == DType::I8 && tb == DType::I8 && to.bits() >= 32,
            };
        if !dot {
            return self.products(name, id, &texts, [&of_a, &of_b], &acc_text, compute);
        }
        let float8 = |t: DType| t.is_float() && t.bits() == 8;
        let mut options = Vec::new();
        if to == DType::F64 || (ta != tb && !(float8(ta) && float8(tb))) {
            // One type for both: that of the sum holds either.
            for (text, ty) in texts.iter_mut().zip([ta, tb]) {
                if ty != to.compute() {
                    *text = format!("{text}.to({compute})");
                }
            }
            if to != DType::F64 {
                options.push("input_precision=\"ieee\"".to_string());
            }
        } else if ta == DType::F32 {
            options.push("input_precision=\"ieee\"".to_string());
        } else if float8(ta) {
            // Every sum in f32.
            options.push("max_num_imprecise_acc=0".to_string());
        }
        let [ta_text, tb_text] = texts;
        if to == DType::F64 {
            options.push("out_dtype=tl.float64".to_string());
        }
        if !to.is_float() && to != DType::I32 {
            let dot = format!("tl.dot({ta_text}, {tb_text})");
            return self.line(format!("{name} = {acc_text} + {dot}.to({})", self.element(id)));
        }
        let mut arguments = vec![ta_text, tb_text, acc_text];
        arguments.append(&mut options);
        self.call(name, "tl.dot", &arguments, &suffix);
    }

    /// A product that `tl.dot` does not do (a vector, a short depth, integers), as products that are
    /// summed.
    fn products(
        &mut self,
        name: &str,
        id: TileId,
        texts: &[String; 2],
        axes: [&[Axis]; 2],
        acc: &str,
        compute: &str,
    ) {
        // The axes m, k, n that have more than one element.
        let find =
            |axes: &[Axis], logical: usize| axes.iter().find(|x| x.logical == logical).cloned();
        let all = [find(axes[0], 0), find(axes[0], 1), find(axes[1], 1)];
        let elements = all.iter().flatten().fold(1i64, |n, x| n.saturating_mul(x.padded));
        if elements > PRODUCTS_MAX {
            let [a, b] = axes.map(tuple);
            self.problem(
                id,
                format_args!("mma of {a} and {b}: tl.dot wants floats (or i8) and a depth of 16 (8-bit types: 32)"),
            );
        }
        let present: Vec<usize> = (0..3).filter(|&i| all[i].is_some()).collect();
        let rank = present.len();
        let factor = |text: &str, of: [usize; 2]| {
            let at: Vec<usize> =
                of.iter().filter_map(|i| present.iter().position(|p| p == i)).collect();
            format!("{}.to({compute})", across(text, &at, rank))
        };
        let product = format!("{} * {}", factor(&texts[0], [0, 1]), factor(&texts[1], [1, 2]));
        let sum = match present.iter().position(|&p| p == 1) {
            Some(q) => {
                let products = self.names.fresh(&format!("{name}_products"));
                self.line(format!("{products} = {product}"));
                format!("tl.sum({products}, axis={q})")
            }
            None => product,
        };
        match self.rounding(id) {
            suffix if suffix.is_empty() => self.line(format!("{name} = {acc} + {sum}")),
            suffix => self.line(format!("{name} = ({acc} + {sum}){suffix}")),
        }
    }

    /// Splits both shapes into the smallest groups with equal products: padding may only be in
    /// groups that do not change.
    fn reshape(&mut self, name: &str, id: TileId, x: TileId) {
        let (from, to) = (self.axes(x), self.axes(id));
        let (mut i, mut j) = (0, 0);
        let mut sound = true;
        while i < from.len() || j < to.len() {
            let (first_i, first_j) = (i, j);
            let (mut left, mut right) = (1i64, 1i64);
            loop {
                if left <= right && i < from.len() {
                    left = left.saturating_mul(from[i].extent);
                    i += 1;
                } else if j < to.len() {
                    right = right.saturating_mul(to[j].extent);
                    j += 1;
                } else {
                    break;
                }
                if left == right {
                    break;
                }
            }
            let (a, b) = (&from[first_i..i], &to[first_j..j]);
            let unchanged = a.len() == 1 && b.len() == 1 && a[0].extent == b[0].extent;
            sound &= unchanged || a.iter().chain(b).all(|x| !x.is_padded());
        }
        if !sound {
            let from = self.kernel.ty(x);
            self.problem(
                id,
                format_args!("reshape of {from}: an extent that is no power of two changes"),
            );
        }
        let x = self.tile(x);
        self.line(format!("{name} = tl.reshape({x}, {})", tuple(&to)));
    }

    fn iota(&mut self, name: &str, id: TileId, axis: usize, start: &Dim) {
        let dtype = self.kernel.ty(id).dtype;
        let (axes, ty) = (self.axes(id), self.element(id));
        let wide = dtype.bits() == 64;
        let start_text = if wide { self.wide(start) } else { self.int(start) };
        let Some(q) = axes.iter().position(|a| a.logical == axis) else {
            let value = format!("tl.cast({start_text}, {ty})");
            return match axes.is_empty() {
                true => self.line(format!("{name} = {value}")),
                false => self.line(format!("{name} = tl.broadcast_to({value}, {})", tuple(&axes))),
            };
        };
        let lanes = format!("tl.arange(0, {})", axes[q].text);
        let plain = axes.len() == 1 && dtype == DType::I32;
        let value = match (start.is(0), plain) {
            (true, _) => lanes,
            (false, true) => format!("{start_text} + {lanes}"),
            (false, false) => format!("({start_text} + {lanes})"),
        };
        let value = if dtype == DType::I32 { value } else { format!("{value}.to({ty})") };
        if axes.len() == 1 {
            return self.line(format!("{name} = {value}"));
        }
        let value = across(&value, &[q], axes.len());
        self.line(format!("{name} = tl.broadcast_to({value}, {})", tuple(&axes)));
    }

    fn random(&mut self, name: &str, id: TileId, seed: u64, start: &Dim) {
        let dtype = self.kernel.ty(id).dtype;
        let axes = self.axes(id);
        // Row-major position among all elements of the tile, without the padding.
        let mut position = vec![self.wide(start)];
        let mut stride = 1i64;
        for (q, axis) in axes.iter().enumerate().rev() {
            let lanes = across(&format!("tl.arange(0, {})", axis.text), &[q], axes.len());
            position.push(if stride == 1 { lanes } else { format!("{lanes} * {stride}") });
            stride = stride.saturating_mul(axis.extent);
        }
        let at = self.names.fresh(&format!("{name}_at"));
        self.line(format!("{at} = {}", position.join(" + ")));
        let (bits, scale) = match dtype {
            DType::F64 => {
                let helper = self.helper("uniform_f64");
                return self.line(format!("{name} = {helper}({seed}, {at})"));
            }
            DType::F32 => (24, 2f64.powi(-24)),
            DType::F16 => (11, 2f64.powi(-11)),
            DType::BF16 => (8, 2f64.powi(-8)),
            DType::F8E4M3 => (4, 2f64.powi(-4)),
            _ => (3, 2f64.powi(-3)),
        };
        let (helper, suffix) = (self.helper("uniform"), self.rounding(id));
        self.line(format!("{name} = {helper}({seed}, {at}, {bits}, {scale:?}){suffix}"));
    }
}
