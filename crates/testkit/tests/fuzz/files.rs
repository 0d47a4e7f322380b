//! Fuzz targets for the readers of files: whatever the bytes, they return a model or an error.

use tilewright_graph::verify;
use tilewright_import::hf::{self, LoadOptions, safetensors};
use tilewright_import::onnx;
use tilewright_testkit::fuzz::fuzz;

#[test]
fn fuzz_onnx() {
    let corpus: [&[u8]; 2] =
        [include_bytes!("../data/shapes.onnx"), include_bytes!("../data/network.onnx")];
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

/// A safetensors file with this header, in front of this many bytes of data.
fn with_header(header: &[u8], data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + data_len, 0x3c);
    file
}

/// What the reader gives covers the data exactly, and no tensor is longer than its shape says.
fn check_safetensors(file: &[u8], data_len: usize) {
    let Ok(contents) = safetensors::read_bytes(file) else { return };
    let mut covered = 0;
    for (name, tensor) in &contents.tensors {
        let expected = tensor.dtype().bytes_for(tensor.shape().iter().product());
        assert_eq!(Some(tensor.bytes().len()), expected, "{name}");
        covered += tensor.bytes().len();
    }
    let whole = contents.foreign.is_empty();
    assert!(covered == data_len || !whole && covered < data_len, "{covered} of {data_len} bytes");
}

const HEADERS: [&[u8]; 3] = [
    br#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"I64","shape":[5],"data_offsets":[24,64]}}"#,
    br#"{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]},"e":{"dtype":"U8","shape":[0,7],"data_offsets":[64,64]}}"#,
    br#"{"s":{"dtype":"F8_E8M0","shape":[64],"data_offsets":[0,64]}, "scalar":{"dtype":"F64","shape":[],"data_offsets":[64,64]}}"#,
];

const HEADER_WORDS: [&[u8]; 17] = [
    b"\"dtype\":\"F32\",",
    b"\"shape\":[1,64],",
    b"\"data_offsets\":[0,64]",
    b"\"F16\"",
    b"\"F4\"",
    b"\"BOOL\"",
    b"18446744073709551615",
    b"9223372036854775808",
    b"4294967296,4294967296",
    b"-1",
    b"1e30",
    b"0",
    b"64",
    b"[[[[[[[[",
    b"{",
    b"}",
    b"\"__metadata__\":",
];

/// Headers of the right length before 64 bytes of data: the checks behind the JSON are reached.
#[test]
fn fuzz_safetensors_headers() {
    for header in &HEADERS[..2] {
        safetensors::read_bytes(&with_header(header, 64)).expect("the corpus is valid");
    }
    fuzz("safetensors headers", &HEADERS, &HEADER_WORDS, |header| {
        check_safetensors(&with_header(header, 64), 64);
    });
}

/// Whole files: the length in front may be wrong too.
#[test]
fn fuzz_safetensors() {
    let files = HEADERS.map(|header| with_header(header, 64));
    let corpus: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let mut words = HEADER_WORDS.to_vec();
    words.extend_from_slice(&[b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\x80"]);
    fuzz("safetensors", &corpus, &words, |file| {
        let header = file.first_chunk::<8>().map(|len| u64::from_le_bytes(*len));
        let data_len = header.and_then(|len| (file.len() as u64).checked_sub(8)?.checked_sub(len));
        check_safetensors(file, data_len.unwrap_or(0) as usize);
    });
}

/// Configurations before the weights of two families: a graph or an error.
#[test]
fn fuzz_config() {
    let models: [(&[u8], &[u8]); 2] = [
        (
            include_bytes!("../../../../tests/hf/bert/config.json"),
            include_bytes!("../../../../tests/hf/bert/model.safetensors"),
        ),
        (
            include_bytes!("../../../../tests/hf/qwen3/config.json"),
            include_bytes!("../../../../tests/hf/qwen3/model.safetensors"),
        ),
    ];
    let words: [&[u8]; 20] = [
        b"\"hidden_size\": 16,",
        b"\"hidden_size\": 8,",
        b"\"num_hidden_layers\": 1,",
        b"\"num_attention_heads\": 1,",
        b"\"num_key_value_heads\": 4,",
        b"\"head_dim\": 8,",
        b"\"architectures\": [\"BertForMaskedLM\"],",
        b"\"architectures\": [\"Qwen2ForCausalLM\"],",
        b"\"model_type\": \"gpt2\",",
        b"\"rope_type\": \"linear\",",
        b"\"hidden_act\": \"silu\",",
        b"9223372036854775807",
        b"-1",
        b"1e308",
        b"0",
        b"null",
        b"true",
        b"[[[[[[[[",
        b"{",
        b"}",
    ];
    let options = LoadOptions::default();
    for (config, weights) in models {
        hf::load_bytes(config, weights, &options).expect("the corpus is valid");
    }
    fuzz("config.json", &models.map(|(config, _)| config), &words, |config| {
        for (_, weights) in models {
            if let Ok(model) = hf::load_bytes(config, weights, &options) {
                verify(&model.graph).expect("the importer's graphs are well formed");
            }
        }
    });
}
