//! What is multiplied.
//!
//! A line of the list of shapes is `TYPES M N K [xBATCH] [ORDERS] [ENDING]`: types separated by commas, or `all`
//! (every kind that is marked so in [`NUMBERS`]); `x64` for 64 products; `rcr` for a row-major A, a
//! column-major B and a row-major C (without, each kind has its own); `swiglu` for what follows the sums, by the names of
//! `ending.rs`. `#` starts a comment.

use crate::ending::{Ending, unit};
use tilewright_base::{DType, Error, Result};
use tilewright_cuda::peer::{MatmulSpec, MatrixSpec};
use tilewright_kernels::gemm::{Order, Precision, Problem};

/// A kind of numbers: types, and how exactly they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Numbers {
    pub name: &'static str,
    pub operand: DType,
    pub result: DType,
    pub precision: Precision,
    /// cuBLASLt may round to TF32.
    pub tf32: bool,
    /// For 8-bit floats: sums of one tile depth are added in f32.
    pub promoted: bool,
    /// Orders when a line gives none. 8-bit products and TF32 want both operands contiguous along
    /// the depth, in the tensor cores as in cuBLASLt.
    pub orders: &'static str,
    /// `all` means this one, too.
    pub in_all: bool,
}

/// Every kind.
#[rustfmt::skip]
pub const NUMBERS: &[Numbers] = &[
    Numbers { name: "bf16",   operand: DType::BF16,   result: DType::BF16, precision: Precision::F32,    tf32: false, promoted: false, orders: "rrr", in_all: true },
    Numbers { name: "f16",    operand: DType::F16,    result: DType::F16,  precision: Precision::F32,    tf32: false, promoted: false, orders: "rrr", in_all: true },
    Numbers { name: "tf32",   operand: DType::F32,    result: DType::F32,  precision: Precision::Tf32,   tf32: true,  promoted: false, orders: "rcr", in_all: true },
    Numbers { name: "f32",    operand: DType::F32,    result: DType::F32,  precision: Precision::F32,    tf32: false, promoted: false, orders: "rrr", in_all: true },
    Numbers { name: "f32x3",  operand: DType::F32,    result: DType::F32,  precision: Precision::Tf32x3, tf32: false, promoted: false, orders: "rrr", in_all: false },
    Numbers { name: "i8",     operand: DType::I8,     result: DType::I32,  precision: Precision::F32,    tf32: false, promoted: false, orders: "rcr", in_all: true },
    Numbers { name: "f8",     operand: DType::F8E4M3, result: DType::BF16, precision: Precision::F32,    tf32: false, promoted: false, orders: "rcr", in_all: true },
    // Sums of each tile's depth are added in f32.
    Numbers { name: "f8p",    operand: DType::F8E4M3, result: DType::BF16, precision: Precision::F32,    tf32: false, promoted: true,  orders: "rcr", in_all: false },
    // cuBLASLt has no products of two of these.
    Numbers { name: "f8e5m2", operand: DType::F8E5M2, result: DType::BF16, precision: Precision::F32,    tf32: false, promoted: false, orders: "rcr", in_all: false },
];

impl Numbers {
    /// The kind of this name.
    pub fn named(name: &str) -> Option<&'static Numbers> {
        NUMBERS.iter().find(|n| n.name == name)
    }

    /// The greatest error that counts as right where there is nobody to compare with: TF32 keeps 11 digits, sums of
    /// 8-bit floats about 13, and plain f32 sums lose some with the depth.
    pub fn lone_error_max(&self) -> f64 {
        match (self.operand, self.precision) {
            _ if !self.result.is_float() => 0.0,
            (DType::F32, Precision::F32 | Precision::Tf32x3) => 2f64.powi(-17),
            _ => 2f64.powi(-8).max(self.result_unit()),
        }
    }

    /// Relative error of rounding to the result's type: no implementation can promise less.
    pub fn result_unit(&self) -> f64 {
        unit(self.result)
    }
}

/// How one matrix lies in its buffer, counted in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Contiguous axis.
    pub order: Order,
    /// First element.
    pub offset: u64,
    /// Between lines.
    pub leading: u64,
    /// Between matrices of a batch; 0 repeats one.
    pub stride: u64,
    /// Rows and columns.
    pub shape: (u64, u64),
    /// Matrices.
    pub batch: u64,
    /// Their type.
    pub dtype: DType,
}

impl Place {
    /// Without gaps.
    pub fn dense(dtype: DType, order: Order, rows: u64, cols: u64, batch: u64) -> Place {
        let leading = if order == Order::Row { cols } else { rows };
        let (stride, shape) = (rows * cols, (rows, cols));
        Place { order, offset: 0, leading, stride, shape, batch, dtype }
    }

    /// Elements between lines grown by `pad`, matrices as far apart as that makes them.
    #[must_use]
    pub fn padded(mut self, pad: u64) -> Place {
        self.leading += pad;
        let lines = if self.order == Order::Row { self.shape.0 } else { self.shape.1 };
        self.stride = self.leading * lines;
        self
    }

    /// Strides of batch, row and column.
    pub fn strides(&self) -> [u64; 3] {
        match self.order {
            Order::Row => [self.stride, self.leading, 1],
            Order::Col => [self.stride, 1, self.leading],
        }
    }

    /// Elements up to the last, the first one's offset included; 0 for an empty one.
    pub fn elements(&self) -> u64 {
        let (rows, cols) = self.shape;
        if rows == 0 || cols == 0 || self.batch == 0 {
            return 0;
        }
        let [batch, row, col] = self.strides();
        self.offset + (self.batch - 1) * batch + (rows - 1) * row + (cols - 1) * col + 1
    }

    /// Bytes up to the last element.
    pub fn bytes(&self) -> usize {
        self.elements() as usize * self.dtype.size()
    }

    /// The greatest power of two up to 256 that divides the address in a buffer.
    pub fn alignment(&self) -> u32 {
        let byte = self.offset * self.dtype.size() as u64;
        1 << byte.trailing_zeros().min(8)
    }

    fn of_peer(&self) -> MatrixSpec {
        MatrixSpec {
            row_major: self.order == Order::Row,
            leading: self.leading as i64,
            batch_stride: self.stride as i64,
            alignment_bytes: self.alignment(),
        }
    }
}

/// A product with the places of its matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Case {
    pub numbers: &'static Numbers,
    pub m: u64,
    pub n: u64,
    pub k: u64,
    pub batch: u64,
    pub a: Place,
    pub b: Place,
    pub c: Place,
    pub ending: Ending,
}

impl Case {
    /// The same with another ending, in the type that it leaves.
    #[must_use]
    pub fn ending(mut self, ending: Ending) -> Case {
        self.ending = ending;
        self.c.dtype = ending.result(self.numbers);
        self
    }

    /// Where what the ending reads lies: vectors along columns and rows, the residual, and of a pair the second vector
    /// along columns.
    pub fn extras(&self) -> [Option<Place>; 4] {
        let e = self.ending.epilogue(self.numbers);
        let vector = |t: Option<DType>, n| t.map(|t| Place::dense(t, Order::Row, 1, n, 1));
        let residual = e.residual.map(|dtype| Place { dtype, ..self.c });
        let second = e.col_vector.filter(|_| self.ending.is_pair());
        [
            vector(e.col_vector, self.n),
            vector(e.row_vector, self.m),
            residual,
            vector(second, self.n),
        ]
    }

    /// How many right operands there are.
    pub fn rights(&self) -> u64 {
        1 + u64::from(self.ending.is_pair())
    }

    /// Without gaps, in these orders.
    pub fn dense(
        numbers: &'static Numbers,
        [m, n, k, batch]: [u64; 4],
        orders: [Order; 3],
    ) -> Case {
        let [oa, ob, oc] = orders;
        Case {
            numbers,
            m,
            n,
            k,
            batch,
            a: Place::dense(numbers.operand, oa, m, k, batch),
            b: Place::dense(numbers.operand, ob, k, n, batch),
            c: Place::dense(numbers.result, oc, m, n, batch),
            ending: Ending::Plain,
        }
    }

    /// As our planner takes it.
    pub fn problem(&self) -> Problem {
        let numbers = self.numbers;
        let size = |v: u64| v as i64;
        let dense =
            Problem::dense(size(self.m), size(self.n), size(self.k), numbers.operand, self.c.dtype);
        let each = |f: &dyn Fn(&Place) -> i64| (f(&self.a), f(&self.b), f(&self.c));
        Problem {
            batch: size(self.batch),
            precision: numbers.precision,
            promoted: numbers.promoted,
            order: (self.a.order, self.b.order, self.c.order),
            leading: each(&|p| size(p.leading)),
            stride: each(&|p| size(p.stride)),
            align: each(&|p| i64::from(p.alignment())),
            epilogue: self.ending.epilogue(numbers),
            ..dense
        }
    }

    /// As cuBLASLt takes it; with an ending it is the product alone, of a pair with both right operands as one matrix,
    /// and its result is dense and row-major.
    pub fn of_peer(&self) -> MatmulSpec {
        if self.ending != Ending::Plain {
            let n = self.n * self.rights();
            let c = Place::dense(self.numbers.result, Order::Row, self.m, n, self.batch);
            return Case { n, c, ending: Ending::Plain, ..*self }.of_peer();
        }
        MatmulSpec {
            m: self.m,
            n: self.n,
            k: self.k,
            batch: self.batch as u32,
            operand: self.numbers.operand,
            result: self.c.dtype,
            tf32: self.numbers.tf32,
            a: self.a.of_peer(),
            b: self.b.of_peer(),
            c: self.c.of_peer(),
        }
    }

    /// Operations: a multiplication and an addition each.
    pub fn operations(&self) -> f64 {
        2.0 * self.m as f64 * (self.n * self.rights()) as f64 * self.k as f64 * self.batch as f64
    }

    /// Bytes of all matrices and of what the ending reads.
    pub fn bytes(&self) -> usize {
        let extras: usize = self.extras().iter().flatten().map(Place::bytes).sum();
        self.a.bytes() + self.right_bytes() + self.c.bytes() + extras
    }

    /// `4096x4096x4096`, `512x64x512 x64`.
    pub fn shape_text(&self) -> String {
        let shape = format!("{}x{}x{}", self.m, self.n, self.k);
        if self.batch == 1 { shape } else { format!("{shape} x{}", self.batch) }
    }

    /// The same with the ending, if there is one: `4096x4096x4096 swiglu`.
    pub fn title(&self) -> String {
        match self.ending {
            Ending::Plain => self.shape_text(),
            ending => format!("{} {}", self.shape_text(), ending.name()),
        }
    }

    /// Elements from the first one of the right operand to that of the second one: the two together are one matrix of
    /// twice the columns where its lines are columns.
    pub fn second_at(&self) -> u64 {
        let lines = if self.b.order == Order::Col { self.n } else { self.k };
        (lines * self.b.leading).max(self.b.elements()).next_multiple_of(256)
    }

    /// Where the second right operand lies in the memory of the first.
    pub fn second(&self) -> Place {
        Place { offset: self.b.offset + self.second_at(), ..self.b }
    }

    /// Bytes of the right operands.
    pub fn right_bytes(&self) -> usize {
        if self.ending.is_pair() { self.second().bytes() } else { self.b.bytes() }
    }

    /// `rcr`.
    pub fn orders_text(&self) -> String {
        let letter = |p: &Place| if p.order == Order::Row { 'r' } else { 'c' };
        [letter(&self.a), letter(&self.b), letter(&self.c)].iter().collect()
    }
}

/// Orders from three letters.
pub fn orders(text: &str) -> Option<[Order; 3]> {
    let list: Vec<Order> = text
        .chars()
        .map(|c| match c {
            'r' => Some(Order::Row),
            'c' => Some(Order::Col),
            _ => None,
        })
        .collect::<Option<_>>()?;
    list.try_into().ok()
}

/// Reads a list of shapes. `types` restricts it to some kinds; none means no restriction.
///
/// # Errors
/// The user's, with the line.
pub fn read_list(name: &str, text: &str, types: &[String]) -> Result<Vec<Case>> {
    if let Some(unknown) = types.iter().find(|t| Numbers::named(t).is_none()) {
        return Err(
            Error::user(format!("there is no kind of numbers `{unknown}`")).with_hint(known())
        );
    }
    let mut cases = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        read_line(&words, types, &mut cases).map_err(|message| {
            Error::user(message)
                .with_context(format!("{name}, line {}", index + 1))
                .with_hint("a line is: TYPES M N K [xBATCH] [ORDERS] [ENDING]")
        })?;
    }
    Ok(cases)
}

fn known() -> String {
    let names: Vec<&str> = NUMBERS.iter().map(|n| n.name).collect();
    format!("known: {}", names.join(", "))
}

fn read_line(words: &[&str], types: &[String], cases: &mut Vec<Case>) -> Result<(), String> {
    let (Some(kinds), Some(sizes)) = (words.first(), words.get(1..4)) else {
        return Err("too few words".into());
    };
    let number = |w: &str| match w.parse::<u64>() {
        Ok(v) if (1..=1 << 30).contains(&v) => Ok(v),
        _ => Err(format!("`{w}` is not a size from 1 to 2^30")),
    };
    let mut batch = 1;
    let mut given = None;
    let mut ending = Ending::Plain;
    for word in &words[4..] {
        if let Some(count) = word.strip_prefix('x') {
            batch = number(count)?;
        } else if let Some(named) = Ending::named(word) {
            ending = named;
        } else {
            given = Some(orders(word).ok_or(format!("`{word}` are not orders such as rcr"))?);
        }
    }
    let sizes = [number(sizes[0])?, number(sizes[1])?, number(sizes[2])?, batch];
    let kinds: Vec<&'static Numbers> = match *kinds {
        "all" => NUMBERS.iter().filter(|n| n.in_all).collect(),
        list => list
            .split(',')
            .map(|name| {
                Numbers::named(name).ok_or(format!("no kind of numbers `{name}`; {}", known()))
            })
            .collect::<Result<_, _>>()?,
    };
    for numbers in kinds {
        if types.is_empty() || types.iter().any(|t| t == numbers.name) {
            let own = orders(numbers.orders).ok_or("orders of NUMBERS")?;
            cases.push(Case::dense(numbers, sizes, given.unwrap_or(own)).ending(ending));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_mistakes_have_their_line() {
        let text = "# squares\nbf16,i8 128 256 64\n\nf8 1 2 3 x4 ccr # small\n";
        let cases = read_list("list", text, &[]).unwrap();
        let texts: Vec<String> = cases
            .iter()
            .map(|c| format!("{} {} {}", c.numbers.name, c.shape_text(), c.orders_text()))
            .collect();
        assert_eq!(texts, ["bf16 128x256x64 rrr", "i8 128x256x64 rcr", "f8 1x2x3 x4 ccr"]);
        assert_eq!(read_list("list", text, &["i8".into()]).unwrap().len(), 1);
        for bad in ["bf16 1 2", "bf17 1 2 3", "bf16 0 2 3", "bf16 1 2 3 rcx", "bf16 1 2 3 x"] {
            let error = read_list("list", &format!("\n{bad}"), &[]).unwrap_err();
            assert!(error.context().any(|c| c == "list, line 2"), "{error:?}");
        }
        assert!(read_list("list", "", &["q4".into()]).is_err());
    }

    #[test]
    fn the_committed_list_has_what_it_promises() {
        let cases =
            read_list("bench", include_str!("../../../bench/gemm_shapes.txt"), &[]).unwrap();
        let bf16 = cases.iter().filter(|c| c.numbers.name == "bf16");
        let mut shapes: Vec<String> = bf16.map(Case::shape_text).collect();
        let wanted = [
            "1024x1024x1024",
            "16384x16384x16384",
            "4096x14336x4096",
            "8192x1024x8192",
            "64x8192x8192",
            "1x8192x28672",
            "5000x3333x2222",
            "512x64x512 x64",
        ];
        for want in wanted {
            assert!(shapes.iter().any(|s| s == want), "{want}");
        }
        let count = shapes.len();
        shapes.sort();
        shapes.dedup();
        assert_eq!(shapes.len(), count, "a shape stands twice");
        assert!(count >= 45, "{count} shapes");
    }

    #[test]
    fn places_count_their_elements() {
        let place = Place { offset: 3, ..Place::dense(DType::BF16, Order::Col, 5, 2, 3).padded(1) };
        // Two lines of 6 each, three times; the last line ends at its fifth element.
        assert_eq!((place.leading, place.stride), (6, 12));
        assert_eq!(place.elements(), 3 + 24 + 6 + 5);
        assert_eq!(place.alignment(), 2);
        assert_eq!(Place::dense(DType::BF16, Order::Row, 0, 2, 1).elements(), 0);
        assert_eq!(Place::dense(DType::F32, Order::Row, 4, 2, 1).alignment(), 256);
    }
}
