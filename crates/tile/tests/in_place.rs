//! Which results may lie over which operands: one kernel for each clause of the proof, and one beside
//! it that lacks just that.

use tilewright_tile::{Access, Kernel, may_overwrite};

/// The verdict on the first input and the first output of a kernel on `[N, K]` tensors.
fn verdict(head: &str, body: &str) -> bool {
    let text = format!("kernel @k({head}) {{\n{body}\n}}");
    let kernel = Kernel::parse("<test>", &text).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
    tilewright_tile::verify(&kernel).unwrap_or_else(|e| panic!("{e:?}\n{text}"));
    let first = |access| kernel.params.iter().find(|(_, p)| p.access == access).unwrap().0;
    may_overwrite(&kernel, first(Access::In), first(Access::Out))
}

const ROWS: &str = "%A: f32[N,K], %r: f32[K], out %B: f32[N,K], out %C: f32[N,K]) \
                    tile(S, T) grid(p in ceil(N/S)";

fn rows(body: &str) -> bool {
    verdict(ROWS, body)
}

#[test]
fn elementwise_at_the_stored_coordinates() {
    let load = "%x = load %A[p*S, 0] : f32[S,T]\n";
    assert!(rows(&format!("{load}store %B[p*S, 0], %x")));
    assert!(rows(&format!(
        "{load}%b = load %r[0] : f32[T]\n%y = map(%x, %b along 1) {{ x, b -> x * b }} : f32[S,T]\n\
         store %B[p*S, 0], %y"
    )));
    assert!(rows(&format!(
        "{load}%y = reshape %x : f32[S,1,T]\n%z = map(%y) {{ x -> x + 1 }} : f32[S,1,T]\n\
         %w = reshape %z : f32[S,T]\nstore %B[p*S, 0], %w"
    )));
    // A neighbour's element.
    assert!(!rows("%x = load %A[p*S, 1] : f32[S,T]\nstore %B[p*S, 0], %x"));
    assert!(!rows("%x = load %A[p*S, 0] step (1,2) : f32[S,T]\nstore %B[p*S, 0], %x"));
    // One element for all.
    assert!(!rows(
        "%x = load %A[p*S, 0] : f32[S,1]\n%y = broadcast %x along (0,1) : f32[S,T]\n\
         store %B[p*S, 0], %y"
    ));
    // Another block's rows.
    assert!(!rows("%x = load %A[N - p*S, 0] : f32[S,T]\nstore %B[p*S, 0], %x"));
    // A turned square.
    let square = "%A: f32[N,N], out %B: f32[N,N]) tile(S) grid(p in ceil(N/S), q in ceil(N/S)";
    let turned = |perm| {
        format!(
            "%x = load %A[p*S, q*S] : f32[S,S]\n%y = permute %x ({perm}) : f32[S,S]\nstore %B[p*S, q*S], %y"
        )
    };
    assert!(verdict(square, &turned("0,1")));
    assert!(!verdict(square, &turned("1,0")));
}

#[test]
fn layouts_and_blocks() {
    let body = "%x = load %A[p*S] : f32[S]\nstore %B[p*S], %x";
    let on = |a: &str, b: &str, grid: &str| {
        verdict(&format!("%A: {a}, out %B: {b}) tile(S) grid({grid}"), body)
    };
    assert!(on("f32[N]", "f32[N]", "p in ceil(N/S)"));
    assert!(!on("f32[N]", "f32[M]", "p in ceil(N/S)"));
    // Blocks that do the same twice.
    assert!(!on("f32[N]", "f32[N]", "q in 2, p in ceil(N/S)"));
    assert!(on("f32[N]", "f32[N]", "q in 1, p in ceil(N/S)"));
    // Tiles that overlap.
    assert!(!verdict(
        "%A: f32[N], out %B: f32[N]) tile(S) grid(p in N",
        "%x = load %A[p] : f32[S]\nstore %B[p], %x"
    ));
}

#[test]
fn what_stands_before_and_after_the_store() {
    let load = "%x = load %A[p*S, 0] : f32[S,T]\n";
    let sum = "%s = reduce sum %x axis 1 : f32[S]\n";
    let by_sum = "%y = map(%x, %s along 0) { x, s -> x / s } : f32[S,T]\n";
    assert!(rows(&format!("{load}{sum}{by_sum}store %B[p*S, 0], %y")));
    // Other stores: before, the operand is whole; after, it is not.
    let other = "store %C[p*S, 0], %x\n";
    assert!(rows(&format!("{load}{sum}{by_sum}{other}store %B[p*S, 0], %y")));
    assert!(!rows(&format!("{load}{sum}{by_sum}store %B[p*S, 0], %y\n{other}")));
    // Two stores of the result.
    assert!(!rows(&format!("{load}store %B[p*S, 0], %x\nstore %B[p*S, 0], %x")));
    // A loop that stores: earlier loops may read the block's whole rows, the own one only its part.
    let total = "%z = full 0 : f32[S]\n%t = for k in 0..ceil(K/T) carry(%c = %z) {\n\
                 %v = load %A[p*S, k*T] : f32[S,T]\n%w = reduce sum %v axis 1 : f32[S]\n\
                 %d = map(%c, %w) { a, b -> a + b } : f32[S]\nyield %d\n}\n";
    let store = |at: &str, axis: &str| {
        format!(
            "for j in 0..ceil(K/T) {{\n%x = load %A[{at}] : f32[S,T]\n\
             %y = map(%x, %t along 0) {{ x, s -> x / s }} : f32[S,T]\nstore %B[{axis}], %y\n}}"
        )
    };
    assert!(rows(&format!("{total}{}", store("p*S, j*T", "p*S, j*T"))));
    assert!(!rows(&format!("{total}{}", store("p*S, 0", "p*S, j*T"))));
    assert!(!rows(&format!("{total}{}", store("p*S, j*T", "p*S, 0"))));
    let again =
        total.replace("%z", "%z2").replace("%t", "%t2").replace("k ", "m ").replace("k*", "m*");
    let again =
        again.replace("%v", "%v2").replace("%w", "%w2").replace("%c", "%c2").replace("%d", "%d2");
    assert!(!rows(&format!("{total}{}\n{again}", store("p*S, j*T", "p*S, j*T"))));
    assert!(rows(&format!("{total}{again}{}", store("p*S, j*T", "p*S, j*T"))));
}

#[test]
fn products_take_nothing_but_the_residual() {
    let head = "%A: f32[N,K], %W: f32[K,K], %X: f32[N,K], out %B: f32[N,K]) \
                tile(S, T) grid(p in ceil(N/S), q in ceil(K/T)";
    let product = |a: &str| {
        format!(
            "%z = full 0 : f32[S,T]\n%r = load %A[p*S, q*T] : f32[S,T]\n\
             %acc = for k in 0..ceil(K/T) carry(%c = %z) {{\n%a = load %{a}[p*S, k*T] : f32[S,T]\n\
             %b = load %W[k*T, q*T] : f32[T,T]\n%m = mma %c, %a, %b : f32[S,T]\nyield %m\n}}\n\
             %y = map(%acc, %r) {{ x, y -> x + y }} : f32[S,T]\n"
        )
    };
    let store = "store %B[p*S, q*T], %y";
    assert!(verdict(head, &format!("{}{store}", product("X"))));
    // The operand of the product itself.
    assert!(!verdict(head, &format!("{}{store}", product("A"))));
    // The store may run before this sum.
    let sum = "%s = reduce sum %r axis 1 : f32[S]\n";
    assert!(!verdict(head, &format!("{}{sum}{store}", product("X"))));
}
