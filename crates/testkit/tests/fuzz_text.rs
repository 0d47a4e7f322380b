//! Fuzz targets for the parsers of text: whatever comes in, they return, and what they accept they can
//! print and read back.

use tilewright_expr::{CompileOptions, compile};
use tilewright_layout::Dim;
use tilewright_testkit::fuzz::fuzz_text;

#[test]
fn fuzz_expressions() {
    let corpus = [
        "x * 2 + y / 3",
        "gelu(x) = 0.5 * x * (1 + erf(x / sqrt(2))); gelu(a) - max(b, 0)",
        "let t = clamp(x, -1e30, 0x1F); t > 0 ? t ** 2 : -t",
        "where(isnan(x) || !isfinite(y), nan, i64(x) << 3 & 255 ^ ~7)",
        "f(a, b) = { let c = a % b; c * c }; f(x, f(y, z))",
    ];
    let words = [
        "(",
        ")",
        "((((((((",
        "let ",
        "=",
        "==",
        ";",
        ",",
        "? 1 : 2",
        "**",
        "-",
        "inf",
        "nan",
        "pi",
        "1e999",
        "9223372036854775808",
        "0.1e-400",
        "f32(",
        "bool(",
        "µ",
        "\0",
        "x",
        "<<",
        "true",
    ];
    fuzz_text("expressions", &corpus, &words, |text| {
        let _ = compile(text, &CompileOptions::default());
    });
}

#[test]
fn fuzz_sizes() {
    let corpus = ["B*S + 1", "ceil(M/BM)", "floor(x/2) - 3*y*y", "min(a, max(b, 4)) % 8", "-7"];
    let words = [
        "(",
        ")",
        "floor(",
        "ceil(",
        "min(",
        "max(",
        "*",
        "/",
        "%",
        "-",
        "0",
        "N",
        ",",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775808",
        "((((((((",
        " ",
    ];
    fuzz_text("sizes", &corpus, &words, |text| {
        if let Ok(dim) = text.parse::<Dim>() {
            let printed = dim.to_string();
            let again = printed.parse::<Dim>();
            assert_eq!(again.as_ref(), Ok(&dim), "{text:?} prints as {printed:?}");
        }
    });
}
