//! Elementary functions as vector code: each is one LLVM function per vector width, in the module
//! that uses it.
//!
//! Single precision has its own polynomials where speed matters; the rest runs in double precision
//! and is rounded. Largest error in units in the last place, as `tests/math.rs`
//! measures it against a correctly rounded result:
//!
//! | function | f32 | f64 | domain of the bound |
//! |---|---|---|---|
//! | exp, exp2 | 1 | 2 | all |
//! | expm1 | 2.5 | 4 | all |
//! | sigmoid, tanh | 2 | 4 | all |
//! | log | 1.5 | 1.5 | all |
//! | log2, log1p | 1 | 3 | all |
//! | erf | 1.5 | 2 | all |
//! | sin, cos, tan | 1 | 3 | f32: up to 2^40; f64: up to 2^30, away from multiples of pi/2 |
//! | asin, acos, atan, atan2 | 1 | 3 | all |
//! | sinh, cosh, asinh, acosh, atanh | 1 | 4 | all |
//! | pow | 1 | 1100 | f64: grows with the logarithm of the result |
//!
//! To add one: an arm in [`Body::write`] and a row here and in the test.

use crate::ops::{Code, float_lit, splat_lit, suffix, vector};
use std::fmt::Write;
use tilewright_base::DType;

impl Code {
    /// An elementary function by its name, on registers of type `d`.
    pub(crate) fn math(&mut self, name: &str, d: DType, lanes: u32, x: &[&str]) -> String {
        let e = crate::ops::reg_elem(d);
        self.helper_call(name, e, lanes, e, x)
    }

    /// Calls a helper function on vectors of `lanes`, writing it first if it is new.
    pub(crate) fn helper_call(
        &mut self,
        name: &str,
        ret: &str,
        lanes: u32,
        arg: &str,
        x: &[&str],
    ) -> String {
        let full = format!("tw.{name}.{}", suffix(arg, lanes));
        let (v, ret) = (vector(arg, lanes), vector(ret, lanes));
        if !self.helpers.contains_key(&full) {
            // Reserves the name: helpers call each other, never themselves.
            self.helpers.insert(full.clone(), String::new());
            let mut code = Code { vector_bits: self.vector_bits, ..Code::default() };
            code.t = crate::text::Text::new();
            std::mem::swap(&mut code.helpers, &mut self.helpers);
            let mut body = Body { c: &mut code, e: arg, n: lanes };
            let names: Vec<String> =
                ["%x", "%y", "%z"][..x.len()].iter().map(|s| (*s).into()).collect();
            let result = body.write(name, &names);
            let params: Vec<String> = names.iter().map(|p| format!("{v} {p}")).collect();
            let mut text =
                format!("define internal {ret} @{full}({}) #2 {{\nstart:\n", params.join(", "));
            text.push_str(&code.t.allocas);
            text.push_str(&code.t.body);
            let _ = write!(text, "  ret {ret} {result}\n}}\n");
            std::mem::swap(&mut code.helpers, &mut self.helpers);
            self.t.declares.extend(code.t.declares);
            self.helpers.insert(full.clone(), text);
        }
        let args: Vec<String> = x.iter().map(|x| format!("{v} {x}")).collect();
        self.t.ins(format_args!("call {ret} @{full}({})", args.join(", ")))
    }

    /// Uniform numbers in [0, 1) from Philox4x32-10: word `counter % 4` of block `counter / 4`, as
    /// many of its top bits as the type has; `f64` takes two words of block `counter / 2`.
    pub(crate) fn random(&mut self, d: DType, seed: u64, counter: &str, lanes: u32) -> String {
        let seed_text = splat_lit("i64", &(seed as i64).to_string(), lanes);
        let wide = d == DType::F64;
        let name = if wide { "philox64" } else { "philox32" };
        let word = self.helper_call(name, "i64", lanes, "i64", &[counter, &seed_text]);
        let (elem, bits, shift) = match d {
            DType::F64 => ("double", 53, 11),
            DType::F32 => ("float", 24, 8),
            DType::F16 => ("float", 11, 21),
            DType::BF16 => ("float", 8, 24),
            DType::F8E4M3 => ("float", 4, 28),
            _ => ("float", 3, 29),
        };
        let shift = splat_lit("i64", &shift.to_string(), lanes);
        let top = self.bin("lshr", "i64", lanes, &word, &shift);
        let x = self.conv("sitofp", "i64", elem, lanes, &top);
        let scale = splat_lit(elem, &float_lit(elem, 2f64.powi(-bits)), lanes);
        self.bin("fmul", elem, lanes, &x, &scale)
    }
}

/// An instruction that takes sixteen lanes of `f32`, on vectors of `lanes`, several times that.
pub(crate) fn by_sixteen(
    c: &mut Code,
    lanes: u32,
    x: &[&str],
    write: impl Fn(&mut Code, &[String]) -> String,
) -> String {
    if lanes == 16 {
        let x: Vec<String> = x.iter().map(|x| (*x).to_owned()).collect();
        return write(c, &x);
    }
    let mut parts: Vec<(u32, String)> = Vec::new();
    for first in (0..lanes).step_by(16) {
        let x: Vec<String> =
            x.iter().map(|x| c.shuffled(lanes, [x, "poison"], first, 16)).collect();
        parts.push((16, write(c, &x)));
    }
    c.side_by_side(parts)
}

/// The body of a helper function being written: short names for vector instructions on one type.
struct Body<'c> {
    c: &'c mut Code,
    /// Element type of the arguments.
    e: &'c str,
    n: u32,
}

impl Body<'_> {
    fn lit(&self, v: f64) -> String {
        splat_lit(self.e, &float_lit(self.e, v), self.n)
    }
    fn add(&mut self, a: &str, b: &str) -> String {
        self.c.bin("fadd", self.e, self.n, a, b)
    }
    fn sub(&mut self, a: &str, b: &str) -> String {
        self.c.bin("fsub", self.e, self.n, a, b)
    }
    fn mul(&mut self, a: &str, b: &str) -> String {
        self.c.bin("fmul", self.e, self.n, a, b)
    }
    fn div(&mut self, a: &str, b: &str) -> String {
        self.c.bin("fdiv", self.e, self.n, a, b)
    }
    fn fma(&mut self, a: &str, b: &str, c: &str) -> String {
        self.c.call("fma", self.e, self.n, &[a, b, c])
    }
    fn un(&mut self, name: &str, a: &str) -> String {
        self.c.call(name, self.e, self.n, &[a])
    }
    fn neg(&mut self, a: &str) -> String {
        self.c.t.ins(format_args!("fneg {} {a}", vector(self.e, self.n)))
    }
    fn sign_of(&mut self, magnitude: &str, sign: &str) -> String {
        self.c.call("copysign", self.e, self.n, &[magnitude, sign])
    }
    fn cmp(&mut self, cc: &str, a: &str, b: &str) -> String {
        self.c.cmp(cc, self.e, self.n, a, b)
    }
    fn sel(&mut self, c: &str, a: &str, b: &str) -> String {
        self.c.select(self.e, self.n, c, a, b)
    }
    /// Clamps `x` into `lo..=hi`; NaN stays.
    fn clamp(&mut self, x: &str, lo: f64, hi: f64) -> String {
        let (lo, hi) = (self.lit(lo), self.lit(hi));
        let low = self.cmp("olt", x, &lo);
        let x = self.sel(&low, &lo, x);
        let high = self.cmp("ogt", &x, &hi);
        self.sel(&high, &hi, &x)
    }
    /// Polynomial, highest coefficient first.
    fn poly(&mut self, x: &str, coefficients: &[f64]) -> String {
        let mut acc = self.lit(coefficients[0]);
        for c in &coefficients[1..] {
            let c = self.lit(*c);
            acc = self.fma(&acc, x, &c);
        }
        acc
    }
    fn call(&mut self, name: &str, x: &[&str]) -> String {
        self.c.helper_call(name, self.e, self.n, self.e, x)
    }
    fn int(&self) -> &'static str {
        if self.e == "double" { "i64" } else { "i32" }
    }
    fn ilit(&self, v: i64) -> String {
        splat_lit(self.int(), &v.to_string(), self.n)
    }
    fn ibin(&mut self, op: &str, a: &str, b: &str) -> String {
        self.c.bin(op, self.int(), self.n, a, b)
    }
    fn bits(&mut self, x: &str) -> String {
        self.c.conv("bitcast", self.e, self.int(), self.n, x)
    }
    fn float(&mut self, x: &str) -> String {
        self.c.conv("bitcast", self.int(), self.e, self.n, x)
    }
    /// A float with a whole value, small, as an integer of the same width.
    fn int_of(&mut self, x: &str) -> String {
        if self.e == "double" {
            let i = self.c.conv("fptosi", "double", "i32", self.n, x);
            return self.c.conv("sext", "i32", "i64", self.n, &i);
        }
        self.c.conv("fptosi", "float", "i32", self.n, x)
    }
    fn float_of(&mut self, x: &str) -> String {
        if self.e == "double" {
            let i = self.c.conv("trunc", "i64", "i32", self.n, x);
            return self.c.conv("sitofp", "i32", "double", self.n, &i);
        }
        self.c.conv("sitofp", "i32", "float", self.n, x)
    }
    fn is_f32(&self) -> bool {
        self.e == "float"
    }
    /// Computes in double precision and rounds.
    fn in_double(&mut self, name: &str, x: &[String]) -> String {
        let wide: Vec<String> =
            x.iter().map(|x| self.c.conv("fpext", "float", "double", self.n, x)).collect();
        let wide: Vec<&str> = wide.iter().map(String::as_str).collect();
        let y = self.c.helper_call(name, "double", self.n, "double", &wide);
        self.c.conv("fptrunc", "double", "float", self.n, &y)
    }

    /// An instruction that takes sixteen lanes, on vectors of several times that.
    fn by_sixteen(&mut self, x: &[&str], write: impl Fn(&mut Code, &[String]) -> String) -> String {
        by_sixteen(self.c, self.n, x, write)
    }

    /// `y * 2^k` for a float `k` with a whole value between about -1100 and 1100 (f32: 150), with
    /// correct overflow and underflow.
    fn scale(&mut self, y: &str, k: &str) -> String {
        if self.is_f32() && self.n.is_multiple_of(16) && self.c.vector_bits == 512 {
            return self.by_sixteen(&[y, k], |c, x| {
                let (v, y, k) = (vector("float", 16), &x[0], &x[1]);
                let args =
                    [(&*v, &**y), (&v, k), (&v, "zeroinitializer"), ("i16", "-1"), ("i32", "4")];
                c.t.intrinsic(&v, "llvm.x86.avx512.mask.scalef.ps.512", &args)
            });
        }
        let i = self.int_of(k);
        let one = self.ilit(1);
        let half = self.ibin("ashr", &i, &one);
        let rest = self.ibin("sub", &i, &half);
        let (bias, shift) = if self.is_f32() { (127, 23) } else { (1023, 52) };
        let (bias, shift) = (self.ilit(bias), self.ilit(shift));
        let mut y = y.to_owned();
        for part in [half, rest] {
            let b = self.ibin("add", &part, &bias);
            let b = self.ibin("shl", &b, &shift);
            let f = self.float(&b);
            y = self.mul(&y, &f);
        }
        y
    }

    /// `e^r - 1` for |r| <= 0.35.
    fn expm1_core(&mut self, r: &str) -> String {
        if self.is_f32() {
            let p = self.poly(
                r,
                &[
                    1.9875691500e-4,
                    1.3981999507e-3,
                    8.3334519073e-3,
                    4.1665795894e-2,
                    1.6666665459e-1,
                    5.0000001201e-1,
                ],
            );
            let rr = self.mul(r, r);
            return self.fma(&p, &rr, r);
        }
        // Cephes: e^r = 1 + 2 r P(r^2) / (Q(r^2) - r P(r^2)).
        let z = self.mul(r, r);
        let p = self.poly(
            &z,
            &[1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1],
        );
        let q = self.poly(
            &z,
            &[3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1, 2.0],
        );
        let rp = self.mul(r, &p);
        let d = self.sub(&q, &rp);
        let y = self.div(&rp, &d);
        self.add(&y, &y)
    }

    /// `x = n ln 2 + r` with whole `n`.
    fn split_ln2(&mut self, x: &str) -> (String, String) {
        let log2e = self.lit(std::f64::consts::LOG2_E);
        let n = self.mul(x, &log2e);
        let n = self.un("roundeven", &n);
        let (hi, lo) = if self.is_f32() {
            (0.693_359_375, -2.121_944_4e-4)
        } else {
            (6.931_471_803_691_238_2e-1, 1.908_214_929_270_587_7e-10)
        };
        let (hi, lo) = (self.lit(-hi), self.lit(-lo));
        let r = self.fma(&n, &hi, x);
        let r = self.fma(&n, &lo, &r);
        (n, r)
    }

    fn exp(&mut self, x: &str) -> String {
        let x =
            if self.is_f32() { self.clamp(x, -105.0, 90.0) } else { self.clamp(x, -750.0, 710.0) };
        let (n, r) = self.split_ln2(&x);
        if self.is_f32() {
            let y = self.poly(
                &r,
                &[
                    1.381_461_0e-3,
                    8.368_711e-3,
                    4.166_838_9e-2,
                    1.666_652_1e-1,
                    4.999_999_4e-1,
                    1.0,
                    1.0,
                ],
            );
            return self.scale(&y, &n);
        }
        let m = self.expm1_core(&r);
        let one = self.lit(1.0);
        let y = self.add(&m, &one);
        self.scale(&y, &n)
    }

    fn exp2(&mut self, x: &str) -> String {
        let x = if self.is_f32() {
            self.clamp(x, -152.0, 129.0)
        } else {
            self.clamp(x, -1080.0, 1025.0)
        };
        let n = self.un("roundeven", &x);
        let f = self.sub(&x, &n);
        if self.is_f32() {
            let y = self.poly(
                &f,
                &[
                    1.535_336_2e-4,
                    1.339_887_5e-3,
                    9.618_437e-3,
                    5.550_332_4e-2,
                    2.402_264_8e-1,
                    6.931_471_8e-1,
                    1.0,
                ],
            );
            return self.scale(&y, &n);
        }
        let ln2 = self.lit(std::f64::consts::LN_2);
        let r = self.mul(&f, &ln2);
        let m = self.expm1_core(&r);
        let one = self.lit(1.0);
        let y = self.add(&m, &one);
        self.scale(&y, &n)
    }

    fn expm1(&mut self, x: &str) -> String {
        let (lo, hi) = if self.is_f32() { (-30.0, 88.0) } else { (-60.0, 709.0) };
        let c = self.clamp(x, lo, hi);
        let (n, r) = self.split_ln2(&c);
        let q = self.expm1_core(&r);
        // 2^n q + (2^n - 1); n is within the exponent's range here.
        let i = self.int_of(&n);
        let (bias, shift) = if self.is_f32() { (127, 23) } else { (1023, 52) };
        let (bias, shift) = (self.ilit(bias), self.ilit(shift));
        let b = self.ibin("add", &i, &bias);
        let b = self.ibin("shl", &b, &shift);
        let power = self.float(&b);
        let one = self.lit(1.0);
        let less = self.sub(&power, &one);
        let y = self.fma(&power, &q, &less);
        // Above, the 1 does not count; tiny arguments (and -0) are their own result.
        let hi = self.lit(hi);
        let big = self.cmp("ogt", x, &hi);
        let e = self.exp(x);
        let y = self.sel(&big, &e, &y);
        let zero = self.lit(0.0);
        let none = self.cmp("oeq", x, &zero);
        self.sel(&none, x, &y)
    }

    /// `x = 2^k (1 + f)` with `1 + f` in [sqrt(1/2), sqrt(2)], for positive finite x.
    fn split_exponent(&mut self, x: &str) -> (String, String) {
        let (tiny, up, up_bits, shift, sqrt_half) = if self.is_f32() {
            (f64::from(f32::MIN_POSITIVE), 8_388_608.0, 23, 23, 0x3f35_04f3i64)
        } else {
            (f64::MIN_POSITIVE, 18_014_398_509_481_984.0, 54, 52, 0x3fe6_a09e_667f_3bcdi64)
        };
        let (tiny, up) = (self.lit(tiny), self.lit(up));
        let low = self.cmp("olt", x, &tiny);
        let raised = self.mul(x, &up);
        let x = self.sel(&low, &raised, x);
        let bits = self.bits(&x);
        // Exponent relative to sqrt(1/2), so that the rest lies around one.
        let base = self.ilit(sqrt_half);
        let from = self.ibin("sub", &bits, &base);
        let shift_lit = self.ilit(shift);
        let k = self.ibin("ashr", &from, &shift_lit);
        let down = self.ibin("shl", &k, &shift_lit);
        let m = self.ibin("sub", &bits, &down);
        let m = self.float(&m);
        let kf = self.float_of(&k);
        let drop = self.lit(-f64::from(up_bits));
        let adjusted = self.add(&kf, &drop);
        let kf = self.sel(&low, &adjusted, &kf);
        let minus = self.lit(-1.0);
        let f = self.add(&m, &minus);
        (kf, f)
    }

    /// log(1 + f) - f + f*f/2 for the double core, as fdlibm: `s*(hfsq+R)` is returned with hfsq.
    fn log_core64(&mut self, f: &str) -> (String, String) {
        let two = self.lit(2.0);
        let d = self.add(f, &two);
        let s = self.div(f, &d);
        let z = self.mul(&s, &s);
        let r = self.poly(
            &z,
            &[
                1.479819860511658591e-01,
                1.531383769920937332e-01,
                1.818357216161805012e-01,
                2.222219843214978396e-01,
                2.857142874366239149e-01,
                3.999999999940941908e-01,
                6.666666666666735130e-01,
            ],
        );
        let r = self.mul(&r, &z);
        let half = self.lit(0.5);
        let hf = self.mul(f, &half);
        let hfsq = self.mul(&hf, f);
        let sum = self.add(&hfsq, &r);
        (self.mul(&s, &sum), hfsq)
    }

    /// Results of logarithms for arguments that are not positive and finite.
    fn log_edges(&mut self, x: &str, y: &str) -> String {
        let (zero, inf) = (self.lit(0.0), self.lit(f64::INFINITY));
        let (nan, minus_inf) = (self.lit(f64::NAN), self.lit(f64::NEG_INFINITY));
        let is_inf = self.cmp("oeq", x, &inf);
        let y = self.sel(&is_inf, &inf, y);
        let is_zero = self.cmp("oeq", x, &zero);
        let y = self.sel(&is_zero, &minus_inf, &y);
        let bad = self.cmp("ult", x, &zero);
        self.sel(&bad, &nan, &y)
    }

    fn log(&mut self, x: &str) -> String {
        let (k, f) = self.split_exponent(x);
        let y = if self.is_f32() {
            let p = self.poly(
                &f,
                &[
                    7.0376836292e-2,
                    -1.1514610310e-1,
                    1.1676998740e-1,
                    -1.2420140846e-1,
                    1.4249322787e-1,
                    -1.6668057665e-1,
                    2.0000714765e-1,
                    -2.4999993993e-1,
                    3.3333331174e-1,
                ],
            );
            let z = self.mul(&f, &f);
            let fz = self.mul(&f, &z);
            let lo = self.lit(-2.121_944_4e-4);
            let y = self.mul(&k, &lo);
            let y = self.fma(&fz, &p, &y);
            let half = self.lit(-0.5);
            let y = self.fma(&z, &half, &y);
            let y = self.add(&y, &f);
            let hi = self.lit(0.693_359_375);
            self.fma(&k, &hi, &y)
        } else {
            let (s, hfsq) = self.log_core64(&f);
            let lo = self.lit(1.908_214_929_270_587_7e-10);
            let y = self.fma(&k, &lo, &s);
            let y = self.sub(&hfsq, &y);
            let y = self.sub(&f, &y);
            let hi = self.lit(6.931_471_803_691_238_2e-1);
            self.fma(&k, &hi, &y)
        };
        self.log_edges(x, &y)
    }

    fn log2(&mut self, x: &str) -> String {
        let (k, f) = self.split_exponent(x);
        let (s, hfsq) = self.log_core64(&f);
        let rest = self.sub(&hfsq, &s);
        let log = self.sub(&f, &rest);
        let scale = self.lit(std::f64::consts::LOG2_E);
        let y = self.fma(&log, &scale, &k);
        self.log_edges(x, &y)
    }

    fn log1p(&mut self, x: &str) -> String {
        let one = self.lit(1.0);
        let u = self.add(x, &one);
        let back = self.sub(&u, &one);
        let lost = self.sub(x, &back);
        let c = self.div(&lost, &u);
        let l = self.log(&u);
        let y = self.add(&l, &c);
        // -1 and infinity have no correction; tiny arguments (and -0) are their own result.
        let (minus, inf) = (self.lit(-1.0), self.lit(f64::INFINITY));
        let at_edge = self.cmp("oeq", x, &minus);
        let y = self.sel(&at_edge, &l, &y);
        let at_inf = self.cmp("oeq", x, &inf);
        let y = self.sel(&at_inf, &inf, &y);
        let zero = self.lit(0.0);
        let none = self.cmp("oeq", x, &zero);
        self.sel(&none, x, &y)
    }

    fn tanh(&mut self, x: &str) -> String {
        let a = self.un("fabs", x);
        let top = if self.is_f32() { 10.0 } else { 22.0 };
        let a = self.clamp(&a, 0.0, top);
        let two = self.lit(2.0);
        let twice = self.mul(&a, &two);
        // As expm1, without its edges: the argument is small and not negative.
        let (n, r) = self.split_ln2(&twice);
        let q = self.expm1_core(&r);
        let one = self.lit(1.0);
        let power = self.scale(&one, &n);
        let less = self.sub(&power, &one);
        let t = self.fma(&power, &q, &less);
        // t / (t + 2). The sum's rounding may cost an ulp of it, so the remainder is taken without the sum:
        // t - y (t + 2) = (t - y t) - 2 y, whose last step is exact.
        let d = self.add(&t, &two);
        let inverse = self.div(&one, &d);
        let y = self.mul(&t, &inverse);
        let minus_y = self.neg(&y);
        let rest = self.fma(&minus_y, &t, &t);
        let rest = self.fma(&minus_y, &two, &rest);
        let y = self.fma(&rest, &inverse, &y);
        self.sign_of(&y, x)
    }

    fn sigmoid(&mut self, x: &str) -> String {
        let a = self.un("fabs", x);
        let a = self.neg(&a);
        let e = self.exp(&a);
        let (one, zero) = (self.lit(1.0), self.lit(0.0));
        let positive = self.cmp("oge", x, &zero);
        let top = self.sel(&positive, &one, &e);
        let d = self.add(&one, &e);
        let y = self.div(&top, &d);
        // What the sum lost to rounding may be an ulp of the quotient: y / (1 + lost/d). It matters where e is
        // small, and there d is nearly one.
        let back = self.sub(&d, &one);
        let lost = self.sub(&e, &back);
        let minus_y = self.neg(&y);
        self.fma(&minus_y, &lost, &y)
    }

    fn erf32(&mut self, x: &str) -> String {
        let t = self.un("fabs", x);
        let s = self.mul(x, x);
        // Near zero a polynomial; else 1 - exp of one.
        let lo = self.lit(-1.72853470e-5);
        let c = self.lit(3.83197126e-4);
        let r = self.fma(&lo, &t, &c);
        let a = self.lit(-3.88396438e-3);
        let b = self.lit(2.42546219e-2);
        let u = self.fma(&a, &t, &b);
        let mut r = self.fma(&r, &s, &u);
        for c in [-1.06777877e-1, -6.34846687e-1, -1.28717512e-1] {
            let c = self.lit(c);
            r = self.fma(&r, &t, &c);
        }
        let minus = self.neg(&t);
        let r = self.fma(&r, &t, &minus);
        let e = self.exp(&r);
        let one = self.lit(1.0);
        let big = self.sub(&one, &e);
        // Far out the polynomial in the exponent turns around.
        let far = self.lit(4.0);
        let is_far = self.cmp("ogt", &t, &far);
        let big = self.sel(&is_far, &one, &big);
        let big = self.sign_of(&big, x);
        let small = self.poly(
            &s,
            &[
                -5.96761703e-4,
                4.99119423e-3,
                -2.67681349e-2,
                1.12819925e-1,
                -3.76125336e-1,
                1.28379166e-1,
            ],
        );
        let small = self.fma(&small, x, x);
        let edge = self.lit(0.927_734_375);
        let outside = self.cmp("ogt", &t, &edge);
        self.sel(&outside, &big, &small)
    }

    fn erf64(&mut self, x: &str) -> String {
        let one = self.lit(1.0);
        let a = self.un("fabs", x);
        let z = self.mul(x, x);
        let p = self.poly(
            &z,
            &[
                -2.37630166566501626084e-05,
                -5.77027029648944159157e-03,
                -2.84817495755985104766e-02,
                -3.25042107247001499370e-01,
                1.28379167095512558561e-01,
            ],
        );
        let q = self.poly(
            &z,
            &[
                -3.96022827877536812320e-06,
                1.32494738004321644526e-04,
                5.08130628187576562776e-03,
                6.50222499887672944485e-02,
                3.97917223959155352819e-01,
                1.0,
            ],
        );
        let y = self.div(&p, &q);
        let near = self.fma(x, &y, x);
        // Around one.
        let s = self.sub(&a, &one);
        let p = self.poly(
            &s,
            &[
                -2.16637559486879084300e-03,
                3.54783043256182359371e-02,
                -1.10894694282396677476e-01,
                3.18346619901161753674e-01,
                -3.72207876035701323847e-01,
                4.14856118683748331666e-01,
                -2.36211856075265944077e-03,
            ],
        );
        let q = self.poly(
            &s,
            &[
                1.19844998467991074170e-02,
                1.36370839120290507362e-02,
                1.26171219808761642112e-01,
                7.18286544141962662868e-02,
                5.40397917702171048937e-01,
                1.06420880400844228286e-01,
                1.0,
            ],
        );
        let pq = self.div(&p, &q);
        let erx = self.lit(8.45062911510467529297e-01);
        let middle = self.add(&erx, &pq);
        // Beyond: through erfc.
        let capped = self.clamp(&a, 0.5, 6.0);
        let sq = self.mul(&capped, &capped);
        let s = self.div(&one, &sq);
        let ra = self.poly(
            &s,
            &[
                -9.81432934416914548592e+00,
                -8.12874355063065934246e+01,
                -1.84605092906711035994e+02,
                -1.62396669462573470355e+02,
                -6.23753324503260060396e+01,
                -1.05586262253232909814e+01,
                -6.93858572707181764372e-01,
                -9.86494403484714822705e-03,
            ],
        );
        let sa = self.poly(
            &s,
            &[
                -6.04244152148580987438e-02,
                6.57024977031928170135e+00,
                1.08635005541779435134e+02,
                4.29008140027567833386e+02,
                6.45387271733267880336e+02,
                4.34565877475229228821e+02,
                1.37657754143519042600e+02,
                1.96512716674392571292e+01,
                1.0,
            ],
        );
        let rb = self.poly(
            &s,
            &[
                -4.83519191608651397019e+02,
                -1.02509513161107724954e+03,
                -6.37566443368389627722e+02,
                -1.60636384855821916062e+02,
                -1.77579549177547519889e+01,
                -7.99283237680523006574e-01,
                -9.86494292470009928597e-03,
            ],
        );
        let sb = self.poly(
            &s,
            &[
                -2.24409524465858183362e+01,
                4.74528541206955367215e+02,
                2.55305040643316442583e+03,
                3.19985821950859553908e+03,
                1.53672958608443695994e+03,
                3.25792512996573918826e+02,
                3.03380607434824582924e+01,
                1.0,
            ],
        );
        let cut = self.lit(1.0 / 0.35);
        let left = self.cmp("olt", &a, &cut);
        let r = self.sel(&left, &ra, &rb);
        let s = self.sel(&left, &sa, &sb);
        let rs = self.div(&r, &s);
        // exp(-a*a - 0.5625 + r/s): the square in two parts.
        let bits = self.bits(&capped);
        let mask = self.ilit(-4_294_967_296);
        let high = self.ibin("and", &bits, &mask);
        let zh = self.float(&high);
        let nz = self.neg(&zh);
        let off = self.lit(-0.5625);
        let e1 = self.fma(&nz, &zh, &off);
        let e1 = self.exp(&e1);
        let d = self.sub(&zh, &capped);
        let t = self.add(&zh, &capped);
        let e2 = self.fma(&d, &t, &rs);
        let e2 = self.exp(&e2);
        let c = self.mul(&e1, &e2);
        let c = self.div(&c, &capped);
        let far = self.sub(&one, &c);
        let (e0, e1, e6) = (self.lit(0.84375), self.lit(1.25), self.lit(6.0));
        let is_far = self.cmp("oge", &a, &e1);
        let y = self.sel(&is_far, &far, &middle);
        let end = self.cmp("oge", &a, &e6);
        let y = self.sel(&end, &one, &y);
        let y = self.sign_of(&y, x);
        let is_near = self.cmp("ult", &a, &e0);
        self.sel(&is_near, &near, &y)
    }

    /// sin and cos by `x = n pi/2 + r`; `quarter` shifts n.
    fn sin_cos(&mut self, x: &str, quarter: i64) -> String {
        let (s, c, n) = self.sin_cos_parts(x);
        let q = self.ilit(quarter);
        let n = self.ibin("add", &n, &q);
        let (one, two, zero) = (self.ilit(1), self.ilit(2), self.ilit(0));
        let odd = self.ibin("and", &n, &one);
        let (i, lanes) = (self.int(), self.n);
        let odd = self.c.cmp("ne", i, lanes, &odd, &zero);
        let y = self.sel(&odd, &c, &s);
        let flip = self.ibin("and", &n, &two);
        let flip = self.c.cmp("ne", i, lanes, &flip, &zero);
        let minus = self.neg(&y);
        self.sel(&flip, &minus, &y)
    }

    /// sin(r), cos(r) and the low bits of n.
    fn sin_cos_parts(&mut self, x: &str) -> (String, String, String) {
        let scale = self.lit(std::f64::consts::FRAC_2_PI);
        let n = self.mul(x, &scale);
        let n = self.un("roundeven", &n);
        // pi/2 in three parts of 53 bits.
        let mut r = x.to_owned();
        for part in
            [-1.570_796_326_794_896_6, -6.123_233_995_736_766e-17, 1.497_384_904_859_169_8e-33]
        {
            let part = self.lit(part);
            r = self.fma(&n, &part, &r);
        }
        // The low bits of n, from the bits of a number near 1.5 * 2^52.
        let magic = self.lit(6_755_399_441_055_744.0);
        let big = self.add(&n, &magic);
        let ni = self.bits(&big);
        let z = self.mul(&r, &r);
        let s = self.poly(
            &z,
            &[
                1.58969099521155010221e-10,
                -2.50507602534068634195e-08,
                2.75573137070700676789e-06,
                -1.98412698298579493134e-04,
                8.33333333332248946124e-03,
                -1.66666666666666324348e-01,
            ],
        );
        let zr = self.mul(&z, &r);
        let s = self.fma(&s, &zr, &r);
        let c = self.poly(
            &z,
            &[
                -1.13596475577881948265e-11,
                2.08757232129817482790e-09,
                -2.75573143513906633035e-07,
                2.48015872894767294178e-05,
                -1.38888888888741095749e-03,
                4.16666666666666019037e-02,
                -0.5,
            ],
        );
        let one = self.lit(1.0);
        let c = self.fma(&c, &z, &one);
        (s, c, ni)
    }

    fn tan(&mut self, x: &str) -> String {
        let (s, c, n) = self.sin_cos_parts(x);
        let (one, zero) = (self.ilit(1), self.ilit(0));
        let odd = self.ibin("and", &n, &one);
        let (i, lanes) = (self.int(), self.n);
        let odd = self.c.cmp("ne", i, lanes, &odd, &zero);
        let minus = self.neg(&c);
        let top = self.sel(&odd, &minus, &s);
        let bottom = self.sel(&odd, &s, &c);
        self.div(&top, &bottom)
    }

    /// atan of `top/bottom` in [0, 1], both not negative.
    fn atan_unit(&mut self, top: &str, bottom: &str) -> String {
        // Around 0, 1/2 and 1, so that the series' argument stays below 7/16.
        let q = self.div(top, bottom);
        let (c0, c1) = (self.lit(7.0 / 16.0), self.lit(11.0 / 16.0));
        let past0 = self.cmp("ogt", &q, &c0);
        let past1 = self.cmp("ogt", &q, &c1);
        let (one, two) = (self.lit(1.0), self.lit(2.0));
        let minus = self.lit(-1.0);
        let t = self.fma(&q, &two, &minus);
        let d = self.add(&q, &two);
        let half_arg = self.div(&t, &d);
        let t = self.sub(&q, &one);
        let d = self.add(&q, &one);
        let one_arg = self.div(&t, &d);
        let v = self.sel(&past0, &half_arg, &q);
        let v = self.sel(&past1, &one_arg, &v);
        let z = self.mul(&v, &v);
        let p = self.poly(
            &z,
            &[
                1.62858201153657823623e-02,
                -3.65315727442169155270e-02,
                4.97687799461593236017e-02,
                -5.83357013379057348645e-02,
                6.66107313738753120669e-02,
                -7.69187620504482999495e-02,
                9.09088713343650656196e-02,
                -1.11111104054623557880e-01,
                1.42857142725034663711e-01,
                -1.99999999998764832476e-01,
                3.33333333333329318027e-01,
            ],
        );
        let zv = self.mul(&z, &v);
        let corr = self.mul(&p, &zv);
        let zero = self.lit(0.0);
        let (hi0, lo0) =
            (self.lit(4.63647609000806093515e-01), self.lit(2.26987774529616870924e-17));
        let (hi1, lo1) =
            (self.lit(7.85398163397448278999e-01), self.lit(3.06161699786838301793e-17));
        let hi = self.sel(&past0, &hi0, &zero);
        let hi = self.sel(&past1, &hi1, &hi);
        let lo = self.sel(&past0, &lo0, &zero);
        let lo = self.sel(&past1, &lo1, &lo);
        let c = self.sub(&corr, &lo);
        let c = self.sub(&c, &v);
        self.sub(&hi, &c)
    }

    fn atan2(&mut self, y: &str, x: &str) -> String {
        let (a, b) = (self.un("fabs", y), self.un("fabs", x));
        let steep = self.cmp("ogt", &a, &b);
        let top = self.sel(&steep, &b, &a);
        let bottom = self.sel(&steep, &a, &b);
        // 0/0 is 0, inf/inf is 1.
        let (zero, one, inf) = (self.lit(0.0), self.lit(1.0), self.lit(f64::INFINITY));
        let none = self.cmp("oeq", &bottom, &zero);
        let bottom = self.sel(&none, &one, &bottom);
        let t_inf = self.cmp("oeq", &top, &inf);
        let top = self.sel(&t_inf, &one, &top);
        let bottom = self.sel(&t_inf, &one, &bottom);
        let r = self.atan_unit(&top, &bottom);
        let half_pi = self.lit(std::f64::consts::FRAC_PI_2);
        let rest = self.lit(6.123_233_995_736_766e-17);
        let t = self.sub(&r, &rest);
        let turned = self.sub(&half_pi, &t);
        let r = self.sel(&steep, &turned, &r);
        let pi = self.lit(std::f64::consts::PI);
        let pi_rest = self.lit(1.224_646_799_147_353_2e-16);
        let t = self.sub(&r, &pi_rest);
        let mirrored = self.sub(&pi, &t);
        let xb = self.bits(x);
        let zero_i = self.ilit(0);
        let (i, lanes) = (self.int(), self.n);
        let negative = self.c.cmp("slt", i, lanes, &xb, &zero_i);
        let r = self.sel(&negative, &mirrored, &r);
        let r = self.sign_of(&r, y);
        // NaN of either side.
        let bad = self.cmp("uno", y, x);
        let nan = self.lit(f64::NAN);
        self.sel(&bad, &nan, &r)
    }

    fn asin_acos(&mut self, x: &str, cosine: bool) -> String {
        let one = self.lit(1.0);
        let (a, b) = (self.sub(&one, x), self.add(&one, x));
        let p = self.mul(&a, &b);
        let c = self.un("sqrt", &p);
        if cosine { self.call("atan2", &[&c, x]) } else { self.call("atan2", &[x, &c]) }
    }

    fn sinh_cosh(&mut self, x: &str, cosine: bool) -> String {
        let a = self.un("fabs", x);
        let (half, one) = (self.lit(0.5), self.lit(1.0));
        let y = if cosine {
            let e = self.exp(&a);
            let inv = self.div(&one, &e);
            let sum = self.add(&e, &inv);
            self.mul(&sum, &half)
        } else {
            let t = self.call("expm1", &[&a]);
            let u = self.add(&t, &one);
            let v = self.div(&t, &u);
            let sum = self.add(&t, &v);
            self.mul(&sum, &half)
        };
        // Near the top exp overflows before its half does.
        let edge = self.lit(709.0);
        let big = self.cmp("ogt", &a, &edge);
        let h = self.mul(&a, &half);
        let e = self.exp(&h);
        let he = self.mul(&e, &half);
        let top = self.mul(&he, &e);
        let y = self.sel(&big, &top, &y);
        if cosine { y } else { self.sign_of(&y, x) }
    }

    fn inverse_hyperbolic(&mut self, name: &str, x: &str) -> String {
        let (one, two, half) = (self.lit(1.0), self.lit(2.0), self.lit(0.5));
        let ln2 = self.lit(std::f64::consts::LN_2);
        let huge = self.lit(1e150);
        match name {
            "asinh" => {
                let a = self.un("fabs", x);
                let capped = self.clamp(&a, 0.0, 1e150);
                let sq = self.mul(&capped, &capped);
                let root = self.add(&sq, &one);
                let root = self.un("sqrt", &root);
                let d = self.add(&root, &one);
                let q = self.div(&sq, &d);
                let t = self.add(&capped, &q);
                let y = self.call("log1p", &[&t]);
                let l = self.call("log", &[&a]);
                let far = self.add(&l, &ln2);
                let is_far = self.cmp("ogt", &a, &huge);
                let y = self.sel(&is_far, &far, &y);
                self.sign_of(&y, x)
            }
            "acosh" => {
                let t = self.sub(x, &one);
                let t2 = self.add(&t, &two);
                let p = self.mul(&t, &t2);
                let root = self.un("sqrt", &p);
                let s = self.add(&t, &root);
                let y = self.call("log1p", &[&s]);
                let l = self.call("log", &[x]);
                let far = self.add(&l, &ln2);
                let is_far = self.cmp("ogt", x, &huge);
                let y = self.sel(&is_far, &far, &y);
                let below = self.cmp("olt", x, &one);
                let nan = self.lit(f64::NAN);
                self.sel(&below, &nan, &y)
            }
            _ => {
                let a = self.un("fabs", x);
                let d = self.sub(&one, &a);
                let t = self.add(&a, &a);
                let q = self.div(&t, &d);
                let l = self.call("log1p", &[&q]);
                let y = self.mul(&l, &half);
                self.sign_of(&y, x)
            }
        }
    }

    fn pow(&mut self, x: &str, y: &str) -> String {
        let (zero, one, half) = (self.lit(0.0), self.lit(1.0), self.lit(0.5));
        let inf = self.lit(f64::INFINITY);
        let a = self.un("fabs", x);
        let l = self.call("log", &[&a]);
        let p = self.mul(y, &l);
        let e = self.exp(&p);
        // Whole exponents give negative bases a sign; other exponents give NaN.
        let floor = self.un("trunc", y);
        let whole = self.cmp("oeq", &floor, y);
        // Small whole exponents multiply out: exact wherever the power is (3^6 is 729).
        let e = self.small_power(&a, y, &whole, &e);
        let h = self.mul(y, &half);
        let hf = self.un("trunc", &h);
        let even = self.cmp("oeq", &hf, &h);
        let xb = self.bits(x);
        let zero_i = self.ilit(0);
        let (i, lanes) = (self.int(), self.n);
        let negative = self.c.cmp("slt", i, lanes, &xb, &zero_i);
        let minus = self.neg(&e);
        let ones = splat_lit("i1", "true", lanes);
        let odd = self.c.bin("xor", "i1", lanes, &even, &ones);
        let odd = self.c.bin("and", "i1", lanes, &odd, &whole);
        let flip = self.c.bin("and", "i1", lanes, &odd, &negative);
        let r = self.sel(&flip, &minus, &e);
        let below = self.cmp("olt", x, &zero);
        let broken = self.c.bin("xor", "i1", lanes, &whole, &ones);
        let finite = self.cmp("olt", &a, &inf);
        let bad = self.c.bin("and", "i1", lanes, &below, &broken);
        let bad = self.c.bin("and", "i1", lanes, &bad, &finite);
        let nan = self.lit(f64::NAN);
        let r = self.sel(&bad, &nan, &r);
        // 1^y and x^0 are 1 for everything; (-1)^inf is 1.
        let ya = self.un("fabs", y);
        let y_inf = self.cmp("oeq", &ya, &inf);
        let unit = self.cmp("oeq", &a, &one);
        let both = self.c.bin("and", "i1", lanes, &y_inf, &unit);
        let is_one = self.cmp("oeq", x, &one);
        let y_zero = self.cmp("oeq", y, &zero);
        let any = self.c.bin("or", "i1", lanes, &both, &is_one);
        let any = self.c.bin("or", "i1", lanes, &any, &y_zero);
        self.sel(&any, &one, &r)
    }

    /// `a^y` by repeated squaring where `y` is whole and at most 63 in magnitude, else `other`.
    fn small_power(&mut self, a: &str, y: &str, whole: &str, other: &str) -> String {
        const BITS: usize = 6;
        let (one, zero) = (self.lit(1.0), self.lit(0.0));
        let limit = self.lit(((1 << BITS) - 1) as f64);
        let magnitude = self.un("fabs", y);
        let small = self.cmp("ole", &magnitude, &limit);
        let small = self.c.bin("and", "i1", self.n, &small, whole);
        let exponent = self.sel(&small, &magnitude, &zero);
        let exponent = self.int_of(&exponent);
        let none = self.ilit(0);
        let (mut result, mut square) = (one.clone(), a.to_string());
        for bit in 0..BITS {
            let mask = self.ilit(1 << bit);
            let taken = self.ibin("and", &exponent, &mask);
            let taken = self.c.cmp("ne", self.int(), self.n, &taken, &none);
            let product = self.mul(&result, &square);
            result = self.sel(&taken, &product, &result);
            square = self.mul(&square, &square);
        }
        let inverse = self.div(&one, &result);
        let down = self.cmp("olt", y, &zero);
        let result = self.sel(&down, &inverse, &result);
        self.sel(&small, &result, other)
    }

    /// Calls a scalar function for each lane.
    fn per_lane(&mut self, name: &str, x: &[String]) -> String {
        let (e, n) = (self.e, self.n);
        let v = vector(e, n);
        let mut out = "poison".to_owned();
        for lane in 0..n {
            let args: Vec<String> = x
                .iter()
                .map(|x| self.c.t.ins(format_args!("extractelement {v} {x}, i64 {lane}")))
                .collect();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let y = self.c.helper_call(name, e, 1, e, &args);
            out = self.c.t.ins(format_args!("insertelement {v} {out}, {e} {y}, i64 {lane}"));
        }
        out
    }

    /// C's fmod: subtracts the divisor's largest multiples by powers of two, each exactly.
    fn fmod(&mut self, x: &[String]) -> String {
        if self.n > 1 {
            return self.per_lane("fmod", x);
        }
        let (x, y) = (&x[0], &x[1]);
        let a = self.un("fabs", x);
        let m = self.un("fabs", y);
        let inf = self.lit(f64::INFINITY);
        let slot = self.c.t.alloca("double");
        self.c.t.stmt(format_args!("store double {a}, ptr {slot}"));
        let usable_a = self.cmp("olt", &a, &inf);
        let zero = self.lit(0.0);
        let usable_m = self.cmp("ogt", &m, &zero);
        let usable = self.c.bin("and", "i1", 1, &usable_a, &usable_m);
        self.c.t.br_if(&usable, "head", "done");
        self.c.t.place("head");
        let r = self.c.t.ins(format_args!("load double, ptr {slot}"));
        let more = self.cmp("oge", &r, &m);
        self.c.t.br_if(&more, "turn", "done");
        self.c.t.place("turn");
        // 2^exponent(r / m), with the quotient brought into range.
        let down = self.lit(2f64.powi(-600));
        let q = self.div(&r, &m);
        let huge = self.cmp("oeq", &q, &inf);
        let rs = self.mul(&r, &down);
        let qs = self.div(&rs, &m);
        let q = self.sel(&huge, &qs, &q);
        let bits = self.bits(&q);
        let keep = self.ilit(0x7ff0_0000_0000_0000);
        let power = self.ibin("and", &bits, &keep);
        let power = self.float(&power);
        let t = self.mul(&m, &power);
        let up = self.lit(2f64.powi(600));
        let tu = self.mul(&t, &up);
        let t = self.sel(&huge, &tu, &t);
        let over = self.cmp("ogt", &t, &r);
        let half = self.lit(0.5);
        let th = self.mul(&t, &half);
        let t = self.sel(&over, &th, &t);
        let next = self.sub(&r, &t);
        self.c.t.stmt(format_args!("store double {next}, ptr {slot}"));
        self.c.t.br("head");
        self.c.t.place("done");
        let r = self.c.t.ins(format_args!("load double, ptr {slot}"));
        let nan = self.lit(f64::NAN);
        let r = self.sel(&usable, &r, &nan);
        // NaN divisors, too.
        let bad = self.cmp("uno", x, y);
        let r = self.sel(&bad, &nan, &r);
        self.sign_of(&r, x)
    }

    fn pymod(&mut self, x: &[String]) -> String {
        let r = self.call("fmod", &[&x[0], &x[1]]);
        let zero = self.lit(0.0);
        let some = self.cmp("une", &r, &zero);
        let (i, lanes) = (self.int(), self.n);
        let (rb, yb) = (self.bits(&r), self.bits(&x[1]));
        let differ = self.ibin("xor", &rb, &yb);
        let zero_i = self.ilit(0);
        let differ = self.c.cmp("slt", i, lanes, &differ, &zero_i);
        let fix = self.c.bin("and", "i1", lanes, &some, &differ);
        let moved = self.add(&r, &x[1]);
        let y = self.sel(&fix, &moved, &r);
        // A zero has the divisor's sign.
        let signed = self.sign_of(&y, &x[1]);
        let none = self.cmp("oeq", &y, &zero);
        self.sel(&none, &signed, &y)
    }

    fn ipow(&mut self, name: &str, x: &[String]) -> String {
        // The type of the argument says its width, the name its sign.
        let (e, n) = (self.e, self.n);
        let signed = name.contains("_i");
        let bits = crate::ops::bits_of(e);
        let lit = |v: i64| splat_lit(e, &v.to_string(), n);
        let (zero, one) = (lit(0), lit(1));
        let mut power = x[0].clone();
        let mut result = one.clone();
        for i in 0..bits {
            let bit = self.c.bin("lshr", e, n, &x[1], &lit(i64::from(i)));
            let bit = self.c.bin("and", e, n, &bit, &one);
            let set = self.c.cmp("ne", e, n, &bit, &zero);
            let product = self.c.bin("mul", e, n, &result, &power);
            result = self.c.select(e, n, &set, &product, &result);
            power = self.c.bin("mul", e, n, &power, &power);
        }
        if !signed {
            return result;
        }
        // Negative exponents: 1 stays, -1 alternates, all else is 0 truncated.
        let below = self.c.cmp("slt", e, n, &x[1], &zero);
        let is_one = self.c.cmp("eq", e, n, &x[0], &one);
        let minus_one = lit(-1);
        let is_minus = self.c.cmp("eq", e, n, &x[0], &minus_one);
        let low = self.c.bin("and", e, n, &x[1], &one);
        let odd = self.c.cmp("ne", e, n, &low, &zero);
        let alternate = self.c.select(e, n, &odd, &minus_one, &one);
        let r = self.c.select(e, n, &is_minus, &alternate, &zero);
        let r = self.c.select(e, n, &is_one, &one, &r);
        self.c.select(e, n, &below, &r, &result)
    }

    fn philox(&mut self, wide: bool, x: &[String]) -> String {
        // Counter and key as pairs of 32-bit words, each in an i64.
        let n = self.n;
        let lit = |v: i64| splat_lit("i64", &v.to_string(), n);
        let (low, s32) = (lit(0xffff_ffff), lit(32));
        let per_block = if wide { 1 } else { 2 };
        let block = self.c.bin("lshr", "i64", n, &x[0], &lit(per_block));
        let mut c: [String; 4] = [
            self.c.bin("and", "i64", n, &block, &low),
            self.c.bin("lshr", "i64", n, &block, &s32),
            lit(0),
            lit(0),
        ];
        let mut k =
            [self.c.bin("and", "i64", n, &x[1], &low), self.c.bin("lshr", "i64", n, &x[1], &s32)];
        for round in 0..10 {
            if round > 0 {
                for (word, weyl) in k.iter_mut().zip([0x9E37_79B9i64, 0xBB67_AE85]) {
                    let sum = self.c.bin("add", "i64", n, word, &lit(weyl));
                    *word = self.c.bin("and", "i64", n, &sum, &low);
                }
            }
            let p0 = self.c.bin("mul", "i64", n, &c[0], &lit(0xD251_1F53));
            let p1 = self.c.bin("mul", "i64", n, &c[2], &lit(0xCD9E_8D57));
            let (h0, l0) =
                (self.c.bin("lshr", "i64", n, &p0, &s32), self.c.bin("and", "i64", n, &p0, &low));
            let (h1, l1) =
                (self.c.bin("lshr", "i64", n, &p1, &s32), self.c.bin("and", "i64", n, &p1, &low));
            let a = self.c.bin("xor", "i64", n, &h1, &c[1]);
            let a = self.c.bin("xor", "i64", n, &a, &k[0]);
            let b = self.c.bin("xor", "i64", n, &h0, &c[3]);
            let b = self.c.bin("xor", "i64", n, &b, &k[1]);
            c = [a, l1, b, l0];
        }
        if wide {
            let odd = self.c.bin("and", "i64", n, &x[0], &lit(1));
            let odd = self.c.cmp("ne", "i64", n, &odd, &lit(0));
            let high = self.c.select("i64", n, &odd, &c[2], &c[0]);
            let rest = self.c.select("i64", n, &odd, &c[3], &c[1]);
            let high = self.c.bin("shl", "i64", n, &high, &s32);
            return self.c.bin("or", "i64", n, &high, &rest);
        }
        let pick = self.c.bin("and", "i64", n, &x[0], &lit(3));
        let mut word = c[3].clone();
        for (i, w) in c.iter().enumerate().take(3).rev() {
            let here = self.c.cmp("eq", "i64", n, &pick, &lit(i as i64));
            word = self.c.select("i64", n, &here, w, &word);
        }
        word
    }

    /// Double to float, rounding to odd: a later rounding to fewer bits is then the only one.
    fn round_odd(&mut self, x: &str) -> String {
        let n = self.n;
        let y = self.c.conv("fptrunc", "double", "float", n, x);
        let back = self.c.conv("fpext", "float", "double", n, &y);
        let (ba, xa) = (self.un("fabs", &back), self.un("fabs", x));
        let over = self.cmp("ogt", &ba, &xa);
        let differs = self.cmp("one", &back, x);
        let bits = self.c.conv("bitcast", "float", "i32", n, &y);
        let one = splat_lit("i32", "1", n);
        let less = self.c.bin("sub", "i32", n, &bits, &one);
        let bits = self.c.select("i32", n, &over, &less, &bits);
        let odd = self.c.bin("or", "i32", n, &bits, &one);
        let bits = self.c.select("i32", n, &differs, &odd, &bits);
        self.c.conv("bitcast", "i32", "float", n, &bits)
    }

    fn decode_f8(&mut self, e4m3: bool, x: &str) -> String {
        let n = self.n;
        let lit = |v: i64| splat_lit("i32", &v.to_string(), n);
        if !e4m3 {
            let up = self.c.bin("shl", "i32", n, x, &lit(8));
            let h = self.c.conv("trunc", "i32", "i16", n, &up);
            let h = self.c.conv("bitcast", "i16", "half", n, &h);
            return self.c.conv("fpext", "half", "float", n, &h);
        }
        let magnitude = self.c.bin("and", "i32", n, x, &lit(0x7f));
        let up = self.c.bin("shl", "i32", n, &magnitude, &lit(20));
        let normal = self.c.bin("add", "i32", n, &up, &lit(120 << 23));
        let small = self.c.conv("uitofp", "i32", "float", n, &magnitude);
        let unit = splat_lit("float", &float_lit("float", 2f64.powi(-9)), n);
        let small = self.c.bin("fmul", "float", n, &small, &unit);
        let small = self.c.conv("bitcast", "float", "i32", n, &small);
        let is_small = self.c.cmp("ult", "i32", n, &magnitude, &lit(8));
        let y = self.c.select("i32", n, &is_small, &small, &normal);
        let is_nan = self.c.cmp("eq", "i32", n, &magnitude, &lit(0x7f));
        let y = self.c.select("i32", n, &is_nan, &lit(0x7fc0_0000), &y);
        let sign = self.c.bin("and", "i32", n, x, &lit(0x80));
        let sign = self.c.bin("shl", "i32", n, &sign, &lit(24));
        let y = self.c.bin("or", "i32", n, &y, &sign);
        self.c.conv("bitcast", "i32", "float", n, &y)
    }

    fn encode_f8(&mut self, e4m3: bool, x: &str) -> String {
        let n = self.n;
        let lit = |v: i64| splat_lit("i32", &v.to_string(), n);
        let (man, bias, unit, largest, top) = if e4m3 {
            (3, 7, 2f64.powi(9), 448.0, 0x7e)
        } else {
            (2, 15, 2f64.powi(16), 57344.0, 0x7b)
        };
        let shift = 23 - man;
        let bits = self.c.conv("bitcast", "float", "i32", n, x);
        let a = self.c.bin("and", "i32", n, &bits, &lit(0x7fff_ffff));
        let af = self.c.conv("bitcast", "i32", "float", n, &a);
        let lsb = self.c.bin("lshr", "i32", n, &a, &lit(shift));
        let lsb = self.c.bin("and", "i32", n, &lsb, &lit(1));
        let r = self.c.bin("add", "i32", n, &a, &lit((1 << (shift - 1)) - 1));
        let r = self.c.bin("add", "i32", n, &r, &lsb);
        let r = self.c.bin("lshr", "i32", n, &r, &lit(shift));
        let normal = self.c.bin("sub", "i32", n, &r, &lit((127 - bias) << man));
        let f = |v: f64| splat_lit("float", &float_lit("float", v), n);
        let capped = self.cmp("olt", &af, &f(1.0));
        let small = self.c.select("float", n, &capped, &af, &f(1.0));
        let small = self.c.bin("fmul", "float", n, &small, &f(unit));
        let small = self.c.call("roundeven", "float", n, &[&small]);
        let small = self.c.conv("fptoui", "float", "i32", n, &small);
        let edge = f(2f64.powi(1 - bias as i32));
        let is_small = self.cmp("olt", &af, &edge);
        let y = self.c.select("i32", n, &is_small, &small, &normal);
        let over = self.cmp("oge", &af, &f(largest));
        let y = self.c.select("i32", n, &over, &lit(top), &y);
        let y = if e4m3 {
            y
        } else {
            let inf = self.cmp("oeq", &af, &f(f64::INFINITY));
            self.c.select("i32", n, &inf, &lit(0x7c), &y)
        };
        let nan = self.cmp("uno", x, x);
        let y = self.c.select("i32", n, &nan, &lit(0x7f), &y);
        let sign = self.c.bin("lshr", "i32", n, &bits, &lit(24));
        let sign = self.c.bin("and", "i32", n, &sign, &lit(0x80));
        self.c.bin("or", "i32", n, &y, &sign)
    }

    /// The body of helper `name`; returns its result.
    fn write(&mut self, name: &str, x: &[String]) -> String {
        match name {
            "decode_f8e4m3" => return self.decode_f8(true, &x[0]),
            "decode_f8e5m2" => return self.decode_f8(false, &x[0]),
            "encode_f8e4m3" => return self.encode_f8(true, &x[0]),
            "encode_f8e5m2" => return self.encode_f8(false, &x[0]),
            "round_odd" => return self.round_odd(&x[0]),
            "philox32" => return self.philox(false, x),
            "philox64" => return self.philox(true, x),
            _ if name.starts_with("ipow_") => return self.ipow(name, x),
            "exp" => return self.exp(&x[0]),
            "exp2" => return self.exp2(&x[0]),
            "expm1" => return self.expm1(&x[0]),
            "log" => return self.log(&x[0]),
            "tanh" => return self.tanh(&x[0]),
            "sigmoid" => return self.sigmoid(&x[0]),
            "erf" if self.is_f32() && self.c.vector_bits >= 512 => {
                return crate::erf::erf(self.c, self.n, &x[0]);
            }
            "erf" if self.is_f32() => return self.erf32(&x[0]),
            _ => {}
        }
        if self.is_f32() {
            return self.in_double(name, x);
        }
        match name {
            "erf" => self.erf64(&x[0]),
            "log2" => self.log2(&x[0]),
            "log1p" => self.log1p(&x[0]),
            "sin" => self.sin_cos(&x[0], 0),
            "cos" => self.sin_cos(&x[0], 1),
            "tan" => self.tan(&x[0]),
            "atan" => {
                let one = self.lit(1.0);
                self.atan2(&x[0], &one)
            }
            "atan2" => self.atan2(&x[0], &x[1]),
            "asin" => self.asin_acos(&x[0], false),
            "acos" => self.asin_acos(&x[0], true),
            "sinh" => self.sinh_cosh(&x[0], false),
            "cosh" => self.sinh_cosh(&x[0], true),
            "asinh" | "acosh" | "atanh" => self.inverse_hyperbolic(name, &x[0]),
            "pow" => self.pow(&x[0], &x[1]),
            "fmod" => self.fmod(x),
            "pymod" => self.pymod(x),
            // Every operation has an arm; the test over all of them keeps it so.
            _ => "poison".to_owned(),
        }
    }
}
