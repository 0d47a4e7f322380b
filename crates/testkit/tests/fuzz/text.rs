//! Fuzz targets for the parsers of text: whatever comes in, they return, and what they accept they can
//! print and read back.

use std::collections::BTreeMap;
use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_expr::{CompileOptions, compile};
use tilewright_graph::{Constants, Graph, verify};
use tilewright_layout::Dim;
use tilewright_testkit::fuzz::fuzz_text;
use tilewright_tile::Kernel;

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

#[test]
fn fuzz_graphs() {
    let corpus = [
        "graph @mlp(N in 1..4096) {\n  %0 \"x\": f32[N,784] = input\n  %1: f32[784] = const @w\n  \
         %2: f32[N,784] = map { a, b -> max(a * b, 0.0) } %0, %1  # fc1\n  return \"y\": %2\n}\n",
        "graph @mix(N in 1..64, found in 0..) {\n  %0 \"x\": f32[N,8] = input\n  \
         %3: f32[8] = const [0.5, -0.0, nan, inf, -inf, 1e-7, 3.4028235e38, 2.0]\n  \
         %4: f32[N,8] = map { a, b -> a + b } %0, %3\n  %5: f32[8*N] = reshape [8*N] %4\n  \
         %6: f32[8,N] = permute [1, 0] %4\n  %9: f32[N + 1,9] = pad lo=[1, 0] hi=[0, 1] constant=0.5 %4\n  \
         %14: f32[N,1] = reduce max axes=[1] keep %4\n  \
         %17: f32[N,N] = contract \"mk,nk->mn\" acc=f32 %4, %4\n  \
         return \"y\": %17, \"z\": %6, \"p\": %9, \"r\": %14, \"s\": %5\n}\n",
        "graph @conv() {\n  %1 \"image\": f32[2,4,9,9] = input\n  %18: f32[4,2,3,3] = const @weights\n  \
         %19: f32[2,4,5,5] = conv strides=[2, 2] pads_lo=[1, 1] pads_hi=[1, 1] dilations=[1, 1] \
         groups=2 %1, %18\n  %20: f32[2,4,2,2] = window mean_with_pad kernel=[2, 2] strides=[2, 2] \
         pads_lo=[0, 0] pads_hi=[0, 0] dilations=[1, 1] %19\n  return \"y\": %20\n}\n",
    ];
    let words = [
        "input",
        "const ",
        "map { x -> x } ",
        "reshape [",
        "slice starts=[0] lens=[1] steps=[1] ",
        "%0",
        "%4",
        "%99",
        "f32[N]",
        "i64[]",
        "[-1]",
        "[9223372036854775807, 4]",
        "[0]",
        "axis=7 ",
        "N",
        "in 1..",
        "return",
        "\"",
        "\n",
        "groups=0 ",
        "keep ",
        "{",
        "}",
        "@weights",
        "scan sum axis=0 ",
    ];
    fuzz_text("graphs", &corpus, &words, |text| {
        let table = BTreeMap::from([
            ("w".to_owned(), Tensor::zeros(DType::F32, [784]).expect("small")),
            ("weights".to_owned(), Tensor::zeros(DType::F32, [4, 2, 3, 3]).expect("small")),
        ]);
        let Ok(graph) = Graph::parse_with("fuzz", text, Constants::Table(&table)) else { return };
        if verify(&graph).is_ok() {
            let (printed, table) = graph.text_with_data();
            let again = Graph::parse_with("printed", &printed, Constants::Table(&table));
            let again =
                again.unwrap_or_else(|e| panic!("printed text is refused: {e:?}\n{printed}"));
            assert_eq!(again.to_string(), printed);
        }
    });
}

#[test]
fn fuzz_kernels() {
    let corpus = [
        include_str!("../../../tile/tests/kernels/gemm.tile"),
        include_str!("../../../tile/tests/kernels/softmax.tile"),
        include_str!("../../../tile/tests/kernels/attention.tile"),
        include_str!("../../../tile/tests/kernels/conv.tile"),
    ];
    let words = [
        "for i in 0..4 { ",
        "if N < 3 {",
        "} else {",
        "}",
        "yield ",
        "%0",
        "%x",
        "reduce max ",
        "arg min ",
        "scan sum ",
        "axis 0",
        "axis 9",
        " limit N",
        " along (0,1)",
        " step (1,-2)",
        " fill nan",
        "full 0 : ",
        "f32[BM,BN]",
        "i64[]",
        "bool[-1]",
        "9223372036854775808",
        " at (N,(2,4)):(4,(N,1))+3",
        "inout ",
        "sizes(",
        "#",
        "µ",
    ];
    fuzz_text("kernels", &corpus, &words, |text| {
        let Ok(kernel) = Kernel::parse("fuzz", text) else { return };
        let printed = kernel.to_string();
        // A kernel that is not well-formed prints too; only the others must be read back.
        if tilewright_tile::verify(&kernel).is_ok() {
            let again = Kernel::parse("printed", &printed)
                .unwrap_or_else(|e| panic!("printed text is refused: {e:?}\n{printed}"));
            assert_eq!(again.to_string(), printed);
        }
    });
}
