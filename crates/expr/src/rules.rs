//! The simplifier's rules, as data; `simplify.rs` applies them.
//!
//! `pattern => result` in the language itself. `a b c d` match anything, `p` a `bool`, `C` and `D`
//! constants; a number matches that constant (-0.0 is not 0.0) and `K` is a constant that the
//! condition finds. Constants stand on the right of commutative operators. `on` lists the classes
//! of `a` for which the rule holds: `f` floats, `s` signed, `u` unsigned, `b` bool.
//!
//! A rule of [`EXACT`] gives the same bits for every input, NaN and -0.0 included; those of
//! [`FAST`] treat floats as real numbers and are only used on demand. A new rule is a row here;
//! the example beside it, and every input that the tests try, must agree.

use crate::eval::wrap;
use crate::ir::Value;
use std::collections::BTreeMap;
use tilewright_base::DType;

/// One rule.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) name: &'static str,
    pub(crate) on: &'static str,
    /// One or more `pattern => result`, separated by `;`.
    pub(crate) text: &'static str,
    /// The condition, beyond the pattern; may bind `K`.
    pub(crate) when: When,
    /// Type, expression and what becomes of it.
    #[cfg_attr(not(test), allow(dead_code, reason = "documentation that the tests check"))]
    pub(crate) example: (DType, &'static str, &'static str),
}

/// A condition on the constants of a match.
pub(crate) type When = fn(DType, &mut BTreeMap<char, Value>) -> bool;

const fn rule(
    name: &'static str,
    on: &'static str,
    text: &'static str,
    when: When,
    example: (DType, &'static str, &'static str),
) -> Rule {
    Rule { name, on, text, when, example }
}

fn always(_: DType, _: &mut BTreeMap<char, Value>) -> bool {
    true
}

fn int(constants: &BTreeMap<char, Value>, name: char) -> Option<u64> {
    match constants.get(&name) {
        Some(Value::Int(v)) => Some(*v as u64),
        _ => None,
    }
}

/// `C` is 2, 4, 8, ... (positive also in signed types).
fn power_of_two(dtype: DType, constants: &BTreeMap<char, Value>) -> Option<u32> {
    let c = int(constants, 'C')?;
    let negative = dtype.is_signed_int() && (c as i64) < 0;
    (c > 1 && c.is_power_of_two() && !negative).then(|| c.trailing_zeros())
}

/// `C` is a power of two, `K` its logarithm.
fn log2(dtype: DType, constants: &mut BTreeMap<char, Value>) -> bool {
    let log = power_of_two(dtype, constants);
    constants.insert('K', Value::Int(log.unwrap_or(0).into()));
    log.is_some()
}

/// `C` is a power of two, `K` is `C - 1`.
fn mask(dtype: DType, constants: &mut BTreeMap<char, Value>) -> bool {
    let log = power_of_two(dtype, constants);
    constants.insert('K', Value::Int((1i64 << log.unwrap_or(0)).wrapping_sub(1)));
    log.is_some()
}

/// Shifts by `C` and then `D` stay below the width.
fn shifts_fit(dtype: DType, constants: &mut BTreeMap<char, Value>) -> bool {
    let sum = int(constants, 'C').and_then(|c| c.checked_add(int(constants, 'D')?));
    // The sum must also be a number of the type: 4-bit signed types hold 7.
    sum.is_some_and(|s| s < dtype.bits().into() && wrap(dtype, s as i64) == s as i64)
}

/// `C` is a float power of two whose reciprocal `K` is a normal number of the type.
fn exact_reciprocal(dtype: DType, constants: &mut BTreeMap<char, Value>) -> bool {
    let Some(Value::Float(c)) = constants.get(&'C').copied() else { return false };
    let power = c.is_normal() && c.to_bits() & ((1 << 52) - 1) == 0;
    let limit = match dtype {
        DType::F64 => 1022,
        DType::F32 | DType::BF16 => 126,
        DType::F16 | DType::F8E5M2 => 14,
        _ => 6,
    };
    let k = 1.0 / c;
    constants.insert('K', Value::Float(k));
    power && c.abs().log2().abs() <= f64::from(limit)
}

/// `C` has a finite reciprocal `K`, which is not tiny.
fn any_reciprocal(_: DType, constants: &mut BTreeMap<char, Value>) -> bool {
    let Some(Value::Float(c)) = constants.get(&'C').copied() else { return false };
    constants.insert('K', Value::Float(1.0 / c));
    c != 0.0 && c.abs() < 1e4 && c.abs() > 1e-4
}

use DType::{Bool, F32, I32, U8};

/// Rules that keep every bit.
#[rustfmt::skip]
pub(crate) const EXACT: &[Rule] = &[
    // Sums. `a + 0.0` stays for floats: it turns -0.0 into 0.0.
    rule("add-zero",        "su",  "a + 0 => a; a - 0 => a",                  always, (I32, "a + 0", "a")),
    rule("add-minus-zero",  "f",   "a + -0.0 => a; a - 0.0 => a",             always, (F32, "a - 0", "a")),
    rule("sub-from-zero",   "su",  "0 - a => -a",                             always, (I32, "0 - a", "-a")),
    rule("sub-from-zero-f", "f",   "-0.0 - a => -a",                          always, (F32, "-0.0 - a", "-a")),
    rule("add-negated",     "fsu", "a + -b => a - b; -a + b => b - a",        always, (F32, "a + -b", "a - b")),
    rule("sub-negated",     "fsu", "a - -b => a + b",                         always, (F32, "a - -b", "a + b")),
    rule("sub-self",        "su",  "a - a => 0",                              always, (I32, "a - a", "i32(0)")),
    rule("sum-of-constants","su",  "a + C + D => a + (C + D); a - C - D => a - (C + D); a + C - D => a + (C - D); a - C + D => a + (D - C)",
                                                                              always, (I32, "a + 3 + 4", "a + 7")),
    rule("negate-twice",    "fsu", "-(-a) => a",                              always, (F32, "-(-a)", "a")),
    rule("negate-sub",      "su",  "-(a - b) => b - a",                       always, (I32, "-(a - b)", "b - a")),
    rule("negate-product",  "fsu", "-(a * C) => a * -C; -a * C => a * -C",    always, (F32, "-a * 3", "a * -3.0")),
    // Products and quotients.
    rule("mul-one",         "fsu", "a * 1 => a; a / 1 => a",                  always, (F32, "a * 1", "a")),
    rule("mul-minus-one",   "fsu", "a * -1 => -a",                            always, (F32, "a * -1", "-a")),
    rule("div-minus-one",   "fs",  "a / -1 => -a",                            always, (F32, "a / -1", "-a")),
    rule("mul-zero",        "su",  "a * 0 => 0; a / 0 => 0; 0 / a => 0",      always, (I32, "a * 0", "i32(0)")),
    rule("rem-trivial",     "su",  "a % 1 => 0; mod(a, 1) => 0; a % 0 => 0; mod(a, 0) => 0; 0 % a => 0; mod(0, a) => 0",
                                                                              always, (I32, "a % 1", "i32(0)")),
    rule("mul-negated",     "fsu", "-a * -b => a * b",                        always, (F32, "-a * -b", "a * b")),
    rule("div-negated",     "f",   "-a / -b => a / b; -a / C => a / -C",      always, (F32, "-a / -b", "a / b")),
    rule("product-of-constants", "su", "a * C * D => a * (C * D)",            always, (I32, "a * 3 * 5", "a * 15")),
    rule("mul-to-shift",    "su",  "a * C => a << K",                         log2,   (I32, "a * 8", "a << 3")),
    rule("div-to-shift",    "u",   "a / C => a >> K",                         log2,   (U8,  "a / 8", "a >> 3")),
    rule("rem-to-mask",     "u",   "a % C => a & K",                          mask,   (U8,  "a % 8", "a & 7")),
    rule("mod-to-mask",     "su",  "mod(a, C) => a & K",                      mask,   (I32, "mod(a, 8)", "a & 7")),
    rule("div-to-mul",      "f",   "a / C => a * K",                 exact_reciprocal, (F32, "a / 8", "a * 0.125")),
    rule("shift-zero",      "su",  "a << 0 => a; a >> 0 => a; 0 << a => 0; 0 >> a => 0", always, (I32, "a << 0", "a")),
    rule("shift-twice",     "su",  "(a << C) << D => a << (C + D); (a >> C) >> D => a >> (C + D)", shifts_fit,
                                                                                      (I32, "a << 3 << 4", "a << 7")),
    rule("fma-trivial",     "fsu", "fma(a, 1, b) => a + b; fma(a, -1, b) => b - a", always, (F32, "fma(a, 1, b)", "a + b")),
    rule("fma-no-sum",      "f",   "fma(a, b, -0.0) => a * b",                always, (F32, "fma(a, b, -0.0)", "a * b")),
    rule("fma-int",         "su",  "fma(a, b, 0) => a * b; fma(a, 0, b) => b",always, (I32, "fma(a, b, 0)", "a * b")),
    // Powers.
    rule("pow-small",       "fsu", "a ** 0 => 1; a ** 1 => a; a ** 2 => a * a; 1 ** a => 1", always, (F32, "a ** 2", "a * a")),
    rule("pow-minus-one",   "f",   "a ** -1 => 1 / a",                        always, (F32, "a ** -1", "1.0 / a")),
    rule("pow-cube",        "su",  "a ** 3 => a * a * a",                     always, (I32, "a ** 3", "a * a * a")),
    // Signs and roundings.
    rule("abs",             "fs",  "abs(-a) => abs(a); abs(abs(a)) => abs(a)",always, (F32, "abs(-a)", "abs(a)")),
    rule("abs-square",      "f",   "abs(a * a) => a * a",                     always, (F32, "abs(a * a)", "a * a")),
    rule("abs-unsigned",    "u",   "abs(a) => a",                             always, (U8,  "abs(a)", "a")),
    rule("sign-twice",      "fsu", "sign(sign(a)) => sign(a)",                always, (F32, "sign(sign(a))", "sign(a)")),
    rule("round-twice",     "f",   "floor(floor(a)) => floor(a); floor(ceil(a)) => ceil(a); floor(round(a)) => round(a); floor(trunc(a)) => trunc(a); ceil(floor(a)) => floor(a); ceil(ceil(a)) => ceil(a); ceil(round(a)) => round(a); ceil(trunc(a)) => trunc(a); round(floor(a)) => floor(a); round(ceil(a)) => ceil(a); round(round(a)) => round(a); round(trunc(a)) => trunc(a); trunc(floor(a)) => floor(a); trunc(ceil(a)) => ceil(a); trunc(round(a)) => round(a); trunc(trunc(a)) => trunc(a)",
                                                                              always, (F32, "floor(ceil(a))", "ceil(a)")),
    rule("isnan-sign",      "f",   "isnan(-a) => isnan(a); isnan(abs(a)) => isnan(a); isinf(-a) => isinf(a); isinf(abs(a)) => isinf(a)",
                                                                              always, (F32, "isnan(-a)", "isnan(a)")),
    // Minima and maxima.
    rule("min-self",        "fsub","min(a, a) => a; max(a, a) => a",          always, (F32, "min(a, a)", "a")),
    rule("min-twice",       "fsub","min(min(a, b), b) => min(a, b); min(a, min(a, b)) => min(a, b); max(max(a, b), b) => max(a, b); max(a, max(a, b)) => max(a, b)",
                                                                              always, (F32, "min(min(a, b), b)", "min(a, b)")),
    rule("min-constants",   "fsu", "min(min(a, C), D) => min(a, min(C, D)); max(max(a, C), D) => max(a, max(C, D))",
                                                                              always, (F32, "max(max(a, 1), 2)", "max(a, 2.0)")),
    rule("min-infinity",    "f",   "min(a, inf) => a; max(a, -inf) => a",     always, (F32, "min(a, inf)", "a")),
    rule("min-unsigned",    "u",   "min(a, 0) => 0; max(a, 0) => a",          always, (U8,  "max(a, 0)", "a")),
    rule("min-bool",        "b",   "min(a, b) => a & b; max(a, b) => a | b",  always, (Bool, "min(a, b)", "a && b")),
    rule("min-absorbs",     "su",  "min(a, max(a, b)) => a; max(a, min(a, b)) => a", always, (I32, "min(a, max(a, b))", "a")),
    // Bits.
    rule("and-trivial",     "sub", "a & a => a; a & 0 => 0; a & -1 => a; a & !a => 0; !a & a => 0", always, (I32, "a & a", "a")),
    rule("or-trivial",      "sub", "a | a => a; a | 0 => a; a | -1 => -1; a | !a => -1; !a | a => -1", always, (I32, "a | 0", "a")),
    rule("xor-trivial",     "sub", "a ^ a => 0; a ^ 0 => a; a ^ -1 => !a",    always, (I32, "a ^ a", "i32(0)")),
    rule("bit-constants",   "sub", "a & C & D => a & (C & D); (a | C) | D => a | (C | D); a ^ C ^ D => a ^ (C ^ D)",
                                                                              always, (I32, "a & 12 & 6", "a & 4")),
    rule("not-twice",       "sub", "!(!a) => a",                              always, (Bool, "!(!a)", "a")),
    // Comparisons.
    rule("not-equal",       "fsub","!(a == b) => a != b; !(a != b) => a == b",always, (F32, "!(a == b)", "a != b")),
    rule("not-less",        "sub", "!(a < b) => a >= b; !(a <= b) => a > b; !(a > b) => a <= b; !(a >= b) => a < b",
                                                                              always, (I32, "!(a < b)", "a >= b")),
    rule("compare-self",    "sub", "a == a => true; a != a => false; a <= a => true; a >= a => true", always, (I32, "a == a", "true")),
    rule("less-self",       "fsub","a < a => false; a > a => false",          always, (F32, "a < a", "false")),
    rule("equal-self",      "f",   "a == a => !isnan(a); a != a => isnan(a)", always, (F32, "a != a", "isnan(a)")),
    rule("below-unsigned",  "ub",  "a < 0 => false; a >= 0 => true",          always, (U8,  "a < 0", "false")),
    rule("compare-bool",    "b",   "a == true => a; a != true => !a; a == false => !a; a != false => a", always, (Bool, "a == true", "a")),
    rule("compare-diff",    "su",  "a - b == 0 => a == b; a - b != 0 => a != b", always, (I32, "a - b == 0", "a == b")),
    // Selection.
    rule("where-constant",  "fsub","where(true, a, b) => a; where(false, b, a) => a", always, (F32, "where(true, a, b)", "a")),
    rule("where-same",      "fsub","where(p, a, a) => a",                     always, (F32, "where(p > 0, a, a)", "a")),
    rule("where-not",       "fsub","where(!p, a, b) => where(p, b, a)",       always, (F32, "where(!(a < b), a, b)", "where(a < b, b, a)")),
    rule("where-bool",      "b",   "where(a, true, false) => a; where(a, false, true) => !a", always, (Bool, "where(a, true, false)", "a")),
    rule("where-nested",    "fsub","where(p, where(p, a, b), c) => where(p, a, c); where(p, a, where(p, b, c)) => where(p, a, c)",
                                                                              always, (F32, "where(a < b, a, where(a < b, a, b))", "where(a < b, a, b)")),
    rule("where-min",       "su",  "where(a < b, a, b) => min(a, b); where(a <= b, a, b) => min(a, b); where(a > b, a, b) => max(a, b); where(a >= b, a, b) => max(a, b)",
                                                                              always, (I32, "where(a < b, a, b)", "min(a, b)")),
];

/// Rules of real arithmetic, for floats that may change in the last places and in special cases.
#[rustfmt::skip]
pub(crate) const FAST: &[Rule] = &[
    rule("fast-zero",       "f", "a + 0 => a; 0 - a => -a; a - a => 0; a * 0 => 0; a / a => 1", always, (F32, "a + 0", "a")),
    rule("fast-reciprocal", "f", "a / C => a * K",                            any_reciprocal, (F32, "a / 10", "a * 0.1")),
    rule("fast-constants",  "f", "a + C + D => a + (C + D); a - C + D => a + (D - C); a + C - D => a + (C - D); a * C * D => a * (C * D)",
                                                                              always, (F32, "a * 3 * 5", "a * 15.0")),
    rule("fast-negate-sub", "f", "-(a - b) => b - a",                         always, (F32, "-(a - b)", "b - a")),
    rule("fast-pow",        "f", "a ** 3 => a * a * a; a ** 4 => (a * a) * (a * a); a ** 0.5 => sqrt(a); a ** -0.5 => rsqrt(a); a ** -2 => 1 / (a * a)",
                                                                              always, (F32, "a ** 3", "a * a * a")),
    rule("fast-rsqrt",      "f", "a / sqrt(b) => a * rsqrt(b); 1 * rsqrt(a) => rsqrt(a); rsqrt(a) * 1 => rsqrt(a)", always, (F32, "a / sqrt(b)", "a * rsqrt(b)")),
    rule("fast-sqrt",       "f", "sqrt(a) * sqrt(a) => a",                    always, (F32, "sqrt(a) * sqrt(a)", "a")),
    rule("fast-exp",        "f", "exp(a) * exp(b) => exp(a + b); 1 / exp(a) => exp(-a); log(exp(a)) => a; exp(log(a)) => a",
                                                                              always, (F32, "exp(a) * exp(b)", "exp(a + b)")),
    rule("fast-near-zero",  "f", "exp(a) - 1 => expm1(a); log(a + 1) => log1p(a)", always, (F32, "log(1 + a)", "log1p(a)")),
    rule("fast-sigmoid",    "f", "1 / (exp(-a) + 1) => sigmoid(a)",           always, (F32, "1 / (1 + exp(-a))", "sigmoid(a)")),
    rule("fast-odd-even",   "f", "sin(-a) => -sin(a); cos(-a) => cos(a); tanh(-a) => -tanh(a); erf(-a) => -erf(a)", always, (F32, "cos(-a)", "cos(a)")),
    rule("fast-where-min",  "f", "where(a < b, a, b) => min(a, b); where(a > b, a, b) => max(a, b)", always, (F32, "where(a < b, a, b)", "min(a, b)")),
    rule("fast-factor",     "f", "a * b + a * c => a * (b + c); b * a + c * a => (b + c) * a", always, (F32, "a * b + a * c", "a * (b + c)")),
    rule("fast-contract",   "f", "a * b + c => fma(a, b, c); c + a * b => fma(a, b, c); a * b - c => fma(a, b, -c); c - a * b => fma(-a, b, c)",
                                                                              always, (F32, "a * b + c", "fma(a, b, c)")),
];
