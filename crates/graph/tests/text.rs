//! The text form: every operator round-trips, errors point, garbage does not panic.

use std::collections::BTreeMap;
use tilewright_base::{DType, Kind};
use tilewright_data::Tensor;
use tilewright_graph::{Constants, Graph, verify};

/// One of each operator, as the printer writes it.
const EVERYTHING: &str = r#"graph @everything(N in 1..64, found in 0..) {
  %0 "x": f32[N,8] = input
  %1 "image": f32[2,4,9,9] = input
  %2 "ids": i64[3] = input
  %3: f32[8] = const [0.5, -0.0, nan, inf, -inf, 1e-7, 3.4028235e38, 2.0]
  %4: f32[N,8] = map { a, b -> max(a + b, 0.0) } %0, %3  # block/add
  %5: f32[8*N] = reshape [8*N] %4
  %6: f32[8,N] = permute [1, 0] %4
  %7: f32[8,N,8] = expand [8, N, 8] %4
  %8: f32[N,3] = slice starts=[0, 7] lens=[N, 3] steps=[1, -2] %4
  %9: f32[N + 1,9] = pad lo=[1, 0] hi=[0, 1] constant=0.5 %4
  %10: f32[N,10] = pad lo=[0, 1] hi=[0, 1] reflect %4
  %11: f32[2*N,8] = concat axis=0 %4, %0  # "  odd \n origin"
  %12: i64[N,2] = iota axis=1
  %13: i64[2] = dims [N, 2*N - 1]
  %14: f32[N,1] = reduce max axes=[1] keep %4
  %15: i64[N] = arg_reduce min axis=1 last %4
  %16: f32[N,8] = scan sum axis=0 exclusive reverse %4
  %17: f32[N,N] = contract "mk,nk->mn" acc=f32 %4, %4
  %18: f32[4,2,3,3] = const @weights
  %19: f32[2,4,5,5] = conv strides=[2, 2] pads_lo=[1, 1] pads_hi=[1, 1] dilations=[1, 1] groups=2 %1, %18
  %20: f32[2,4,2,2] = window mean_with_pad kernel=[2, 2] strides=[2, 2] pads_lo=[0, 0] pads_hi=[0, 0] dilations=[1, 1] %19
  %21: f32[2,4,9,9] = attention score=f32 { s, m -> s * 0.125 + m } causal %1, %1, %1, %22
  return "y": %21
}
"#;

fn weights() -> BTreeMap<String, Tensor> {
    BTreeMap::from([("weights".to_string(), Tensor::zeros(DType::F32, [4, 2, 3, 3]).unwrap())])
}

fn parse(text: &str) -> tilewright_base::Result<Graph> {
    let table = weights();
    Graph::parse_with("test", text, Constants::Table(&table))
}

/// Wraps statements on an f32[N,8], an image and ids.
fn with_body(body: &str, output: &str) -> String {
    let head = EVERYTHING.split("  %4:").next().unwrap();
    format!("{head}{body}\n  return \"y\": {output}\n}}\n")
}

fn round_trip(text: &str) -> String {
    let g = parse(text).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
    verify(&g).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
    let (printed, table) = g.text_with_data();
    let back = Graph::parse_with("printed", &printed, Constants::Table(&table)).unwrap();
    assert_eq!(back.to_string(), printed);
    for ((_, a), (_, b)) in g.live().zip(back.live()) {
        assert_eq!((&a.op, &a.origin), (&b.op, &b.origin));
    }
    printed
}

#[test]
fn the_graph_of_the_book_is_one() {
    let page = include_str!("../../../docs/src/languages.md");
    let start = page.find("graph @").unwrap();
    let text = page[start..].split("```").next().unwrap();
    let graph = Graph::parse_with("<book>", text, Constants::Zeros).unwrap();
    verify(&graph).unwrap();
}

#[test]
fn printed_text_is_what_was_read() {
    let text = EVERYTHING.replace(
        "%21: f32[2,4,9,9] = attention score=f32 { s, m -> s * 0.125 + m } causal %1, %1, %1, %22",
        "%21: f32[2,4,9,9] = attention score=f32 { s -> s * 0.125 } causal %1, %1, %1",
    );
    let printed = round_trip(&text);
    let weights = printed.split("const @").nth(1).unwrap().split('\n').next().unwrap();
    assert_eq!(printed.replace(weights, "weights"), text);
}

#[test]
fn the_other_operators_round_trip() {
    let body = r#"
  %4: f32[3,8] = gather axis=0 %0, %2
  %5: i64[1,8] = const [0, 1, 2, 0, 1, 2, 0, 1]
  %6: f32[1,8] = gather_elements axis=0 %4, %5
  %7: i64[1,1] = const [2]
  %8: f32[1,8] = gather_nd batch=0 %4, %7
  %9: f32[3,8] = scatter_elements add axis=0 %4, %5, %6
  %10: f32[3,8] = scatter_nd max %9, %7, %8
  %11 "top": f32[3,2], %12 "where": i64[3,2] = top_k axis=1 k=[2] largest %10
  %13: f16[4] = random seed=18446744073709551615
  %14: f32[3,8] = softmax axis=1 log %10
  %15: f32[3,8] = layer_norm axis=1 eps=1e-5 %14, %3, %3
  %16: f32[3,8] = rms_norm axis=1 eps=1e-12 %15, %3
  %17: f32[4] = const [1.0, 1.0, 1.0, 1.0]
  %18: f32[2,4,9,9] = batch_norm eps=0.001 %1, %17, %17, %17, %17
  %19: f32[2,4,9,9] = group_norm groups=2 eps=0.001 %18, %17, %17
  %20: i64[2,found] = host "nonzero" a=1 b=2.5 c="text \"quoted\"" d=[1, -2] e=f[1.0, inf] %16
  %21: i64[2*found] = reshape [2*found] %20
  %22: bool[2] = const [true, false]
  %23: u64[] = const 18446744073709551615
  %24: i4[3] = const [-8, 7, 0]
  %25: f8e4m3[2] = const [448.0, -0.001953125]
  %26: f64[0] = const []
  %27: f64[1] = const [0.1]
  %28: f64[1] = concat axis=0 %26, %27
  %29: bool[2] = concat axis=0 %22
  %30: i4[3] = concat axis=0 %24
  %31: f8e4m3[2] = concat axis=0 %25
  %32: u64[] = map { x -> x + 1 } %23"#;
    let printed = round_trip(&with_body(body, "%21, \"z\": %11"));
    for line in body.lines().filter(|l| l.contains("eps=") || l.contains("host")) {
        let tail = line.split(" = ").nth(1).unwrap().split(" %").next().unwrap();
        assert!(printed.contains(tail), "{tail}\n{printed}");
    }
}

#[test]
fn types_may_be_left_out_and_labels_are_free() {
    let text = "graph @g(N in 1..9) {\n  // a comment\n  %x \"x\": f32[N,2] = input\n\n  # another\n  \
        %sum = map { a, b -> a + b } %x, %x\n  %r = reduce sum axes=[0, 1] %sum\n  return \"r\": %r\n}";
    let g = parse(text).unwrap();
    assert_eq!(g.ty(g.outputs[0].1).to_string(), "f32[]");
}

#[test]
fn errors_point_at_their_place() {
    let cases = [
        ("  %4 = map { a -> sqrt(b) } %0", "b", "%4"),
        ("  %4 = reshape [8*M] %0", "8*M", "the symbol M is not declared"),
        ("  %4: f32[N,9] = softmax axis=1 %0", "4", "the type of `%4` is f32[N,8]"),
        ("  %4 = softmax axis=2 %0", "softmax axis=2 %0", "axis 2 is outside shape [N, 8]"),
        ("  %4 = softmax axis=1 fast %0", "fast", "has no attribute `fast`"),
        ("  %4 = softmax %0", "softmax", "needs `axis=`"),
        ("  %4 = frobnicate %0", "frobnicate", "there is no operator `frobnicate`"),
        ("  %4 = softmax axis=1 %9", "9", "`%9` is not defined"),
        ("  %4: f32[2] = const [1.0]", "[1.0]", "1 elements for shape [2]"),
        ("  %4: u8[1] = const [256]", "[256]", "`256` is not a number of type u8"),
        ("  %4: f32[1] = const @nowhere", "nowhere", "there is no constant @nowhere"),
        ("  %2: f32[1] = const [1.0]", "2", "defined twice"),
        ("  %4 = permute [1, 0 %0", "[", "this list is not closed"),
    ];
    for (line, marked, message) in cases {
        let text = with_body(line, "%0");
        let error = parse(&text).unwrap_err();
        assert_eq!(error.kind(), Kind::User);
        let span = error.span().unwrap_or_else(|| panic!("{line}: no span"));
        let line_start = text.find(line).unwrap();
        assert!((line_start..line_start + line.len()).contains(&span.start), "{line}: {error:?}");
        assert_eq!(&text[span.start..span.start + span.len], marked, "{line}: {error:?}");
        let said = format!("{error:?}");
        assert!(message == "%4" || said.contains(message), "{said} lacks {message}");
    }
    assert!(parse(EVERYTHING).unwrap_err().to_string().contains("`%22` is not defined"));
}

/// A small generator, so that the test needs no crate: SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n as u64) as usize
    }
}

#[test]
fn garbage_is_an_error_and_never_a_panic() {
    let mut random = Random(1);
    let base: Vec<char> = EVERYTHING.chars().collect();
    let noise: Vec<char> =
        "%@[](){}=,\"\\#-+*/.:<>0123456789 \n\tabefnx\u{e9}\u{1f600}\0".chars().collect();
    for round in 0..20_000 {
        let mut text = base.clone();
        if round % 8 == 0 {
            text = (0..random.below(60)).map(|_| noise[random.below(noise.len())]).collect();
        }
        for _ in 0..1 + random.below(4) {
            let at = random.below(text.len().max(1)).min(text.len());
            match random.below(4) {
                0 if at < text.len() => _ = text.remove(at),
                1 => text.insert(at, noise[random.below(noise.len())]),
                2 => text.truncate(at),
                _ => {
                    // Move a piece elsewhere.
                    let len = random.below(30).min(text.len() - at);
                    let piece: Vec<char> = text.drain(at..at + len).collect();
                    let to = random.below(text.len() + 1);
                    text.splice(to..to, piece);
                }
            }
        }
        let text: String = text.into_iter().collect();
        if let Err(e) = parse(&text) {
            // The report with its caret must print as well.
            assert!(!format!("{e:?}").is_empty());
        }
    }
    for deep in ["(", "[", "{", "-", "floor("] {
        let deep = deep.repeat(100_000);
        assert!(parse(&with_body(&format!("  %4 = reshape [{deep}] %0"), "%0")).is_err());
        assert!(parse(&with_body(&format!("  %4 = map {{ a -> {deep} }} %0"), "%0")).is_err());
    }
}
