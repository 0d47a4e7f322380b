//! Tests of the language as a user meets it: meaning, messages, and survival of any input.

use crate::check::{CompileOptions, compile, parse_program};
use crate::ir::Func;
use crate::lex::PUNCTUATION;
use proptest::prelude::*;
use tilewright_base::DType;

fn value(text: &str, args: &[f64]) -> f64 {
    match compile(text, &CompileOptions::default()) {
        Ok(c) => c.func.eval_f64(args),
        Err(e) => panic!("{text}: {e:?}"),
    }
}

/// The whole report of a text with errors.
fn report(text: &str) -> String {
    let types = [("n".to_string(), DType::I32), ("b".to_string(), DType::Bool)].into();
    let options = CompileOptions { default: DType::F32, types, ..CompileOptions::default() };
    match compile(text, &options) {
        Ok(c) => panic!("{text} compiles to {}", c.func),
        Err(e) => format!("{e:?}"),
    }
}

#[test]
fn precedence_and_grouping() {
    for (text, want) in [
        ("2 + 3 * 4", 14.0),
        ("(2 + 3) * 4", 20.0),
        ("2 - 3 - 4", -5.0),
        ("2 ** 3 ** 2", 512.0),
        ("-2 ** 2", -4.0),
        ("2 ** -1", 0.5),
        ("7 % 4 * 2", 6.0),
        ("1 < 2 ? 10 : 20", 10.0),
        ("1 > 2 ? 10 : 3 > 2 ? 20 : 30", 20.0),
        ("1 < 2 && !(3 < 2) || false ? 1 : 0", 1.0),
        ("1 < 2 and not 3 < 2 ? 1 : 0", 1.0),
        ("f64(i32(1) + 2 << 3)", 24.0),
        ("f64(i32(6) | 1 & 3)", 7.0),
        ("i32(5) & 3 == 1 ? 1 : 0", 1.0),
        ("1e3 + .5 + 0x10", 1016.5),
        ("pi * 2 - tau", 0.0),
        ("let a = 3; let b = a * a; b - a", 6.0),
        ("let a = 3; let a = a + 1; a", 4.0),
        ("f(x) = x * x; g(x, y) = f(x) + y; g(3, 2)", 11.0),
        ("g(x) = f(x) + 1; f(x) = { let h = x / 2; h * h }; g(4)", 5.0),
        ("two() = 2; two() * two()", 4.0),
        ("positive(x) = x > 0; where(positive(3), 1, 2)", 1.0),
        ("i32(7 / 2)", 3.0),
        ("f64(i32(3.9))", 3.0),
    ] {
        assert_eq!(value(text, &[]), want, "{text}");
    }
}

#[test]
fn variables_become_parameters_in_order_of_use() {
    let c = compile("y * 2 + x / y", &CompileOptions::default()).unwrap();
    assert_eq!(c.func.to_string(), "{ y, x -> y * 2.0 + x / y }");
    assert_eq!(value("x * 2 + y / 3", &[4.0, 9.0]), 11.0);
    let types = [("k".to_string(), DType::I64)].into();
    let options = CompileOptions { default: DType::BF16, types, ..CompileOptions::default() };
    let c = compile("x * bf16(k + 1)", &options).unwrap();
    assert_eq!(c.func.to_string(), "{ x, k -> x * bf16(k + 1) }");
    assert_eq!(c.func.dtype(), DType::BF16);
}

#[test]
fn numbers_take_the_type_beside_them_even_through_let() {
    let types = [("i".to_string(), DType::I32)].into();
    let options = CompileOptions { default: DType::F32, types, ..CompileOptions::default() };
    let c = compile("let two = 1 + 1; x * two + f32(i * two)", &options).unwrap();
    assert_eq!(c.func.to_string(), "{ x, i -> x * (1.0 + 1.0) + f32(i * (1 + 1)) }");
}

#[test]
fn tokens_are_listed_with_their_places() {
    let list = crate::list_tokens("x * 2.5", &CompileOptions::default()).unwrap();
    assert_eq!(list, "0..1    a name     x\n2..3    `*`        *\n4..7    a number   2.5\n");
    let error = crate::list_tokens("x $ @", &CompileOptions::default()).unwrap_err();
    assert_eq!(error.notes().len(), 1);
}

#[test]
fn the_typed_tree_shows_types_and_places() {
    let c = compile("x * 2 < y", &CompileOptions::default()).unwrap();
    assert_eq!(
        c.tree(),
        "body
  binary lt : bool @0..9
    binary mul : f64 @0..5
      name x : f64 @0..1
      number 2 : f64 @4..5
    name y : f64 @8..9
"
    );
    let program = parse_program("f(x) = -x; f(1)", &CompileOptions::default()).unwrap();
    assert_eq!(
        program.tree(),
        "function f(x)
  unary neg @7..9
    name x @8..9
body
  call f @11..15
    number 1 @13..14
"
    );
}

#[test]
fn messages_say_what_where_and_what_to_do() {
    assert_eq!(
        report("x + sqr(y) * gleu(x)"),
        "there is no function `gleu`
  --> <expression>:1:14
   | x + sqr(y) * gleu(x)
   |              ^^^^ unknown function
  hint: did you mean `gelu`?"
    );
    assert_eq!(
        report("x +\n  n"),
        "the operands of `+` have the types f32 and i32
  --> <expression>:2:3
   |   n
   |   ^ this is i32
  hint: convert one of them: `f32(...)` or `i32(...)`"
    );
    for (text, message) in [
        ("x +", "expected an operand, found the end of the text"),
        ("(x + 1", "expected `)`, found the end of the text"),
        ("max(x", "this `(` is never closed"),
        ("x y", "expected an operator or the end of the text, found `y`"),
        ("", "the text has no result"),
        ("let a = 1;", "the text has no result"),
        ("exp(x, y)", "`exp` takes 1 argument, not 2"),
        ("clamp(x)", "`clamp` takes 3 arguments, not 1"),
        ("where(x, 1)", "`where` takes 3 arguments, not 2"),
        ("f(a, b) = a; f(x)", "`f` takes 2 arguments, not 1"),
        ("where(x, 1, 2)", "a condition must be bool, this is f32"),
        ("1 < x < 2", "comparisons cannot be chained"),
        ("x ^ 2", "`^` does not work on f32"),
        ("x && b", "`&&` joins conditions, this is f32"),
        ("sqrt(n)", "`sqrt` does not work on i32"),
        ("n * 1.5", "`1.5` is not an integer, and i32 is needed here"),
        ("n + 3000000000", "the number `3000000000` does not fit in i32"),
        ("x * 1e39", "the number `1e39` is too large for f32"),
        ("f8e4m3(x) * 1e4", "the number `1e4` is too large for f8e4m3"),
        ("b == 1", "`1` stands where a bool is needed"),
        ("gelu(n)", "`gelu` does not work on (i32)"),
        ("f(x) = f(x - 1); f(y)", "`f` is defined through itself"),
        ("f(x) = g(x); g(x) = f(x); f(y)", "`f` is defined through itself"),
        ("f(x) = x + a; f(1)", "`a` is not known in `f`"),
        ("f(x) = x; f(x) = 2; f(1)", "`f` is defined twice"),
        ("exp(x) = x; exp(1)", "`exp` is built in"),
        ("f(x, x) = x; f(1, 2)", "two parameters are named `x`"),
        ("let inf = 3; inf", "`inf` is a word of the language"),
        ("sin + 1", "`sin` is a function"),
        ("cast(x)", "`cast` needs a type"),
        ("x $ 2", "unexpected character `$`"),
    ] {
        let report = report(text);
        assert_eq!(report.lines().next(), Some(message), "{text}");
    }
}

#[test]
fn all_errors_are_reported() {
    let report = report("let a = ;\nlet b = 2x;\nfoo(1) + n * x + bar(2)");
    assert!(report.contains("`2x` is neither"), "{report}");
    assert!(report.contains("found `;`"), "{report}");
    let report = self::report("foo(1) + n * x + bar(2) + sqrt(n)");
    for part in ["no function `foo`", "types i32 and f32", "no function `bar`", "on i32"] {
        assert!(report.contains(part), "{part} in {report}");
    }
}

#[test]
fn hostile_sizes_end_in_errors() {
    let deep =
        |open: &str, close: &str| format!("{}x{}", open.repeat(50_000), close.repeat(50_000));
    for text in [
        deep("(", ")"),
        deep("-", ""),
        deep("exp(", ")"),
        deep("x ** ", ""),
        deep("b ? x : ", ""),
        deep("not ", ""),
    ] {
        assert!(report(&text).contains("levels of nesting"));
    }
    // Long is fine, deep is not.
    let long = "x + ".repeat(20_000) + "x";
    assert!(compile(&long, &CompileOptions::default()).is_ok());
    // 2^60 expansions of g0, and distinct ones.
    let mut shared = "g0(x) = x * x;".to_string();
    let mut distinct = shared.clone();
    for i in 1..60 {
        shared += &format!("g{i}(x) = g{}(x) + g{}(x);", i - 1, i - 1);
        distinct += &format!("g{i}(x) = g{}(x) + g{}(x + {i});", i - 1, i - 1);
    }
    compile(&(shared + "g59(x)"), &CompileOptions::default()).unwrap();
    assert!(report(&(distinct + "g59(x)")).contains("too many operations"));
    let mut chain = "g0(x) = x;".to_string();
    for i in 1..5000 {
        chain += &format!("g{i}(x) = g{}(x);", i - 1);
    }
    assert!(report(&(chain + "g4999(x)")).contains("inside each other"));
    let mut lets = "let a0 = 1;".to_string();
    for i in 1..5000 {
        lets += &format!("let a{i} = a{} + 1;", i - 1);
    }
    assert!(report(&(lets + "a4999 * x")).contains("inside each other"));
}

/// Anything that reads text must return.
fn survive(text: &str) {
    let _ = compile(text, &CompileOptions::default()).map(|c| {
        let _ = c.tree();
        let text = c.func.to_string();
        let types: Vec<DType> = c.func.params().iter().map(|p| p.dtype).collect();
        let back = Func::parse(&text, &types).unwrap_or_else(|e| panic!("{text}: {e:?}"));
        assert_eq!(back, c.func, "{text}");
    });
    for types in [&[][..], &[DType::F32], &[DType::I8, DType::Bool]] {
        let _ = Func::parse(text, types);
    }
}

proptest! {
    #![proptest_config(crate::testgen::config(3000))]
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        survive(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_tokens_are_survived(
        picks in proptest::collection::vec(any::<u16>(), 0..60),
        closed in any::<bool>(),
    ) {
        let words = [
            "x", "y", "f", "let", "1", "2.5", "1e400", "0x7f", "inf", "nan", "true", "pi", "f(x) =",
            "exp", "where", "f32", "i8", "bool", "gelu", "clamp", "and", "not", "if", "=>", "é", ".",
        ];
        let mut text = String::new();
        for pick in picks {
            let n = usize::from(pick) % (words.len() + PUNCTUATION.len());
            text += words.get(n).copied().unwrap_or_else(|| PUNCTUATION[n - words.len()].0);
            if pick % 7 > 0 {
                text.push(' ');
            }
        }
        survive(&if closed { format!("{{ x -> {text} }}") } else { text });
    }

    /// Texts that are nearly right: a function's text with some bytes changed.
    #[test]
    fn damaged_functions_are_survived(
        func in crate::testgen::func(20),
        damage in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = func.to_string().into_bytes();
        for (at, byte) in damage {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte % 128;
        }
        let text = String::from_utf8_lossy(&bytes);
        let types: Vec<DType> = func.params().iter().map(|p| p.dtype).collect();
        let _ = Func::parse(&text, &types);
        survive(text.trim_start_matches(|c| c != '>').trim_start_matches('>').trim_end_matches('}'));
    }
}
