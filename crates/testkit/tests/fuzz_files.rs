//! Fuzz targets for the readers of files: whatever the bytes, they return a model or an error.

use tilewright_graph::verify;
use tilewright_import::onnx;
use tilewright_testkit::fuzz::fuzz;

#[test]
fn fuzz_onnx() {
    let corpus: [&[u8]; 2] =
        [include_bytes!("data/shapes.onnx"), include_bytes!("data/network.onnx")];
    let words: [&[u8]; 16] = [
        b"\x00",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x7f",
        b"\x80\x80\x80\x80\x10",
        b"Loop",
        b"Reshape",
        b"Concat",
        b"Gather",
        b"Slice",
        b"axis",
        b"axes",
        b"\x0a\x01x",
        b"\x12\x01y",
        b"N",
        b"raw_data",
        b"location",
    ];
    for model in corpus {
        onnx::load_bytes(model, None).expect("the corpus is valid");
    }
    fuzz("onnx", &corpus, &words, |bytes| {
        if let Ok(graph) = onnx::load_bytes(bytes, None) {
            verify(&graph).expect("the importer's graphs are well formed");
        }
    });
}
