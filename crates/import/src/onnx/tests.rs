//! Tests of the walk, of tensor data and of errors, on models written by hand. Operators are tested
//! by the official node tests (the crate `conformance`).

use super::proto::*;
use super::*;
use prost::Message;
use tilewright_base::{DType, Kind};
use tilewright_graph::Op;
use tilewright_interp::{Mode, run};

fn attr_i(name: &str, i: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i, r#type: AttributeType::Int as i32, ..Default::default() }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        attribute,
        ..Default::default()
    }
}

/// An `f32` input; a dimension is a number or a name.
fn input(name: &str, dims: &[&str]) -> ValueInfoProto {
    let dim = dims.iter().map(|d| Dimension {
        value: Some(match d.parse() {
            Ok(v) => DimensionValue::Value(v),
            Err(_) => DimensionValue::Param(d.to_string()),
        }),
    });
    let shape = Some(TensorShapeProto { dim: dim.collect() });
    let value = Some(TypeValue::Tensor(TensorTypeProto { elem_type: 1, shape }));
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value }) }
}

fn output(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: name.into(), r#type: None }
}

fn ints(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: name.into(),
        data_type: 7,
        dims: vec![values.len() as i64],
        int64_data: values.to_vec(),
        ..Default::default()
    }
}

fn graph(node: Vec<NodeProto>, input: Vec<ValueInfoProto>, outputs: &[&str]) -> GraphProto {
    let output = outputs.iter().map(|o| output(o)).collect();
    GraphProto { node, name: "test".into(), input, output, ..Default::default() }
}

fn model(graph: GraphProto) -> ModelProto {
    let set = |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version };
    ModelProto {
        ir_version: 9,
        graph: Some(graph),
        opset_import: vec![set("", 18), set("local", 1)],
        ..Default::default()
    }
}

fn load(model: &ModelProto) -> Result<Graph> {
    load_bytes(&model.encode_to_vec(), None)
}

fn user_error(model: &ModelProto, part: &str) {
    let e = load(model).expect_err("the model is wrong");
    assert_eq!(e.kind(), Kind::User, "{e:?}");
    assert!(e.to_string().contains(part), "{e} says nothing of `{part}`");
}

#[test]
fn computed_shapes_become_sizes() {
    // reshape(x, concat(shape(x)[0:2], [4, -1])) splits heads of a symbolic batch and length.
    let mut g = graph(
        vec![
            node("Shape", &["x"], &["s"], vec![attr_i("end", 2)]),
            node("Concat", &["s", "tail"], &["to"], vec![attr_i("axis", 0)]),
            node("Reshape", &["x", "to"], &["y"], vec![]),
        ],
        vec![input("x", &["B", "S", "32"])],
        &["y"],
    );
    g.initializer.push(ints("tail", &[4, -1]));
    let got = load(&model(g)).unwrap();
    assert_eq!(got.ty(got.outputs[0].1).to_string(), "f32[B,S,4,8]");
    assert_eq!(got.order.len(), 1, "the shape arithmetic is gone");
}

#[test]
fn inputs_that_decide_shapes_are_asked_for() {
    let mut shape = input("to", &["2"]);
    if let Some(TypeProto { value: Some(TypeValue::Tensor(t)) }) = &mut shape.r#type {
        t.elem_type = 7;
    }
    let nodes = vec![node("Reshape", &["x", "to"], &["y"], vec![])];
    let bytes = model(graph(nodes, vec![input("x", &["6"]), shape], &["y"])).encode_to_vec();
    let mut options = ImportOptions::default();
    match import_bytes(&bytes, None, &options).unwrap() {
        Imported::Needs(names) => assert_eq!(names, ["to"]),
        Imported::Graph(_) => panic!("the shape is not known"),
    }
    assert_eq!(load_bytes(&bytes, None).unwrap_err().kind(), Kind::Unsupported);
    let to = Tensor::from_i64s(DType::I64, &[2], &[3, -1]).unwrap();
    options.specialise.insert("to".into(), to);
    let got = load_bytes_with(&bytes, None, &options).unwrap();
    assert_eq!(got.ty(got.outputs[0].1).to_string(), "f32[3,2]");
    assert_eq!(got.inputs.len(), 1);
}

#[test]
fn everything_unsupported_is_listed_at_once() {
    let mut other = node("Fancy", &["a"], &["c"], vec![]);
    other.domain = "acme".into();
    let nodes = vec![
        node("Whirl", &["x"], &["a"], vec![]),
        node("Whirl", &["x"], &["b"], vec![]),
        other,
        node("Add", &["a", "b"], &["y"], vec![]),
    ];
    let e = load(&model(graph(nodes, vec![input("x", &["2"])], &["y", "c"]))).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert_eq!(
        e.notes(),
        ["operator Whirl (2x: Whirl -> a, Whirl -> b)", "operator acme.Fancy (1x: Fancy -> c)"]
    );
}

#[test]
fn malformed_graphs_are_the_users_errors() {
    let x = || vec![input("x", &["2"])];
    let relu = |a: &str, b: &str| node("Relu", &[a], &[b], vec![]);
    let cycle = vec![node("Add", &["x", "b"], &["a"], vec![]), relu("a", "b")];
    user_error(&model(graph(cycle, x(), &["a"])), "cycle");
    user_error(&model(graph(vec![relu("z", "y")], x(), &["y"])), "which nothing computes");
    user_error(&model(graph(vec![relu("x", "y"), relu("x", "y")], x(), &["y"])), "two nodes");
    user_error(&model(graph(vec![relu("x", "y")], x(), &["q"])), "nothing computes the output");
    user_error(&model(graph(vec![relu("x", "y")], vec![output("x")], &["y"])), "has no type");
    let twice = vec![input("x", &["2"]), input("x", &["2"])];
    user_error(&model(graph(vec![relu("x", "y")], twice, &["y"])), "two inputs");
    let clash = vec![input("x", &["2"]), input("w", &["3"])];
    let add = vec![node("Add", &["x", "w"], &["y"], vec![])];
    user_error(&model(graph(add, clash, &["y"])), "do not broadcast");
    user_error(&ModelProto { ir_version: 9, ..Default::default() }, "no graph");
    assert_eq!(load_bytes(b"", None).unwrap_err().kind(), Kind::User);
    assert_eq!(load_bytes(b"MZ\x90\x00 not a model", None).unwrap_err().kind(), Kind::User);
}

#[test]
fn nodes_out_of_order_are_sorted() {
    let nodes = vec![node("Relu", &["a"], &["y"], vec![]), node("Neg", &["x"], &["a"], vec![])];
    let got = load(&model(graph(nodes, vec![input("x", &["2"])], &["y"]))).unwrap();
    let x = Tensor::from_slice(&[2], &[1f32, -3.]).unwrap();
    assert_eq!(run(&got, &[x], Mode::Exact).unwrap()[0].to_f64s(), [0.0, 3.0]);
}

#[test]
fn functions_are_inlined_with_their_attributes() {
    let mut axis = attr_i("axis", 0);
    axis.ref_attr_name = "along".into();
    let function = |body: Vec<NodeProto>| FunctionProto {
        name: "Twice".into(),
        domain: "local".into(),
        input: vec!["v".into()],
        output: vec!["w".into()],
        node: body,
        opset_import: vec![
            OperatorSetIdProto { domain: String::new(), version: 18 },
            OperatorSetIdProto { domain: "local".into(), version: 1 },
        ],
        ..Default::default()
    };
    let mut call = node("Twice", &["x"], &["y"], vec![attr_i("along", 1)]);
    call.domain = "local".into();
    let mut m = model(graph(vec![call.clone()], vec![input("x", &["2", "3"])], &["y"]));
    m.functions = vec![function(vec![node("Concat", &["v", "v"], &["w"], vec![axis])])];
    let got = load(&m).unwrap();
    assert_eq!(got.ty(got.outputs[0].1).to_string(), "f32[2,6]");

    let mut inner = node("Twice", &["v"], &["w"], vec![]);
    inner.domain = "local".into();
    m.functions = vec![function(vec![inner])];
    user_error(&m, "nested too deeply");
}

#[test]
fn a_branch_with_a_constant_condition_is_inlined() {
    let branch = |name: &str, op: &str| AttributeProto {
        name: name.into(),
        g: Some(graph(vec![node(op, &["x"], &["r"], vec![])], vec![], &["r"])),
        r#type: AttributeType::Graph as i32,
        ..Default::default()
    };
    let branches = vec![branch("then_branch", "Neg"), branch("else_branch", "NoSuchThing")];
    let mut g = graph(vec![node("If", &["c"], &["y"], branches)], vec![input("x", &["2"])], &["y"]);
    g.initializer.push(TensorProto {
        name: "c".into(),
        data_type: 9,
        int32_data: vec![1],
        ..Default::default()
    });
    let got = load(&model(g)).unwrap();
    let x = Tensor::from_slice(&[2], &[1f32, -3.]).unwrap();
    assert_eq!(run(&got, &[x], Mode::Exact).unwrap()[0].to_f64s(), [-1.0, 3.0]);
}

/// `y = x + w` where `w` lies in another file.
fn external(location: &str, offset: &str, length: &str) -> ModelProto {
    let entry =
        |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
    let mut g =
        graph(vec![node("Add", &["x", "w"], &["y"], vec![])], vec![input("x", &["3"])], &["y"]);
    g.initializer.push(TensorProto {
        name: "w".into(),
        data_type: 1,
        dims: vec![3],
        data_location: 1,
        external_data: vec![
            entry("location", location),
            entry("offset", offset),
            entry("length", length),
        ],
        ..Default::default()
    });
    model(g)
}

#[test]
fn external_data_is_found_beside_the_model_and_nowhere_else() {
    let dir = std::env::temp_dir().join(format!("tilewright-onnx-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let data: Vec<u8> = [9f32, 1., 2., 3.].iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(dir.join("w.bin"), &data).unwrap();
    let at = |location: &str, offset: &str, length: &str| {
        let path = dir.join("m.onnx");
        std::fs::write(&path, external(location, offset, length).encode_to_vec()).unwrap();
        super::load(&path)
    };
    let got = at("w.bin", "4", "12").unwrap();
    let x = Tensor::from_slice(&[3], &[1f32, 1., 1.]).unwrap();
    assert_eq!(run(&got, &[x], Mode::Exact).unwrap()[0].to_f64s(), [2.0, 3.0, 4.0]);
    for (location, offset, length, part) in [
        ("missing.bin", "0", "12", "cannot be read"),
        ("../w.bin", "0", "12", "leads out"),
        ("/etc/passwd", "0", "12", "leads out"),
        ("", "0", "12", "leads out"),
        ("w.bin", "8", "12", "has 16 bytes"),
        ("w.bin", "4", "8", "8 bytes where the shape needs 12"),
        ("w.bin", "-4", "12", "not a size"),
        ("w.bin", "18446744073709551615", "12", "has 16 bytes"),
    ] {
        let e = at(location, offset, length).expect_err(location);
        assert_eq!(e.kind(), Kind::User, "{e:?}");
        assert!(e.to_string().contains(part), "{e}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn initialisers_of_every_kind_of_storage() {
    let proto = |data_type, dims: &[i64]| TensorProto {
        data_type,
        dims: dims.to_vec(),
        ..Default::default()
    };
    let read = |p: &TensorProto| read_tensor(&p.encode_to_vec());
    // f16 1.5 and -2 by bits; i4 -1 and 7 packed; raw bf16 1.
    let half = TensorProto { int32_data: vec![0x3e00, 0xc000], ..proto(10, &[2]) };
    assert_eq!(read(&half).unwrap().to_f64s(), [1.5, -2.0]);
    let nibbles = TensorProto { int32_data: vec![0x7f], ..proto(22, &[2]) };
    assert_eq!(read(&nibbles).unwrap().to_i64s(), [-1, 7]);
    let raw = TensorProto { raw_data: Some(vec![0x80, 0x3f].into()), ..proto(16, &[]) };
    assert_eq!(read(&raw).unwrap().to_f64s(), [1.0]);
    let f8 = TensorProto { int32_data: vec![0x7e], ..proto(17, &[1]) };
    assert_eq!(read(&f8).unwrap().to_f64s(), [448.0]);
    let unsigned = TensorProto { uint64_data: vec![u64::MAX], ..proto(13, &[1]) };
    assert_eq!(read(&unsigned).unwrap().to_i64s(), [-1]);
    let few = TensorProto { float_data: vec![1.0], ..proto(1, &[2]) };
    assert_eq!(read(&few).unwrap_err().kind(), Kind::User);
    let huge = proto(1, &[i64::MAX, i64::MAX]);
    assert_eq!(read(&huge).unwrap_err().kind(), Kind::User);
    let negative = proto(1, &[-1]);
    assert_eq!(read(&negative).unwrap_err().kind(), Kind::User);
    let text = TensorProto { string_data: vec![vec![b'a'].into()], ..proto(8, &[1]) };
    assert_eq!(read(&text).unwrap_err().kind(), Kind::Unsupported);
}

/// `MatMulNBits` with codes of `bits`, rows of `K = 5` in blocks of 4, and zero points when `zeros` are given.
fn n_bits(bits: i64, codes: &[u8], zeros: Option<&[u8]>, more: &[(&str, i64)]) -> ModelProto {
    let bytes = |name: &str, values: &[u8]| TensorProto {
        name: name.into(),
        data_type: 2,
        dims: vec![values.len() as i64],
        raw_data: Some(values.to_vec().into()),
        ..Default::default()
    };
    let scales = TensorProto {
        name: "s".into(),
        data_type: 1,
        dims: vec![4],
        float_data: vec![1.0, 2.0, 0.5, 4.0],
        ..Default::default()
    };
    let mut attributes = vec![attr_i("K", 5), attr_i("N", 2), attr_i("bits", bits)];
    attributes.push(attr_i("block_size", 4));
    attributes.extend(more.iter().map(|(n, v)| attr_i(n, *v)));
    let mut operands = vec!["x", "b", "s"];
    operands.extend(zeros.map(|_| "z"));
    let mut product = node("MatMulNBits", &operands, &["y"], attributes);
    product.domain = "com.microsoft".into();
    let mut g = graph(vec![product], vec![input("x", &["M", "5"])], &["y"]);
    g.initializer = vec![bytes("b", codes), scales];
    g.initializer.extend(zeros.map(|z| bytes("z", z)));
    let mut m = model(g);
    m.opset_import.push(OperatorSetIdProto { domain: "com.microsoft".into(), version: 1 });
    m
}

#[test]
fn products_with_codes_of_few_bits_are_those_of_the_matrix() {
    let x =
        tilewright_data::Tensor::from_f64s(DType::F32, &[1, 5], &[1.0, 10.0, 100.0, 1000.0, 1e4]);
    let x = [x.unwrap()];
    // Row 0: 9 8 7 6 | 5; row 1: 0 1 2 3 | 15; what is behind the fifth is padding.
    let four = [0x89, 0x67, 0x05, 0xff, 0x10, 0x32, 0x0f, 0x00];
    let eight = [137, 136, 135, 134, 133, 1, 2, 3, 128, 129, 130, 131, 143, 0, 0, 0];
    let row = |w: [f64; 5]| {
        [1.0, 10.0, 100.0, 1000.0, 1e4].iter().zip(w).map(|(x, w)| x * w).sum::<f64>()
    };
    let plain = [row([1.0, 0.0, -1.0, -2.0, -6.0]), row([-4.0, -3.5, -3.0, -2.5, 28.0])];
    let wide = [row([9.0, 8.0, 7.0, 6.0, 10.0]), row([0.0, 0.5, 1.0, 1.5, 60.0])];
    // Zero points 1 and 2 for row 0, 3 and 4 for row 1.
    let moved = [row([8.0, 7.0, 6.0, 5.0, 6.0]), row([-1.5, -1.0, -0.5, 0.0, 44.0])];
    for (model, want) in [
        (n_bits(4, &four, None, &[]), plain),
        (n_bits(8, &eight, None, &[]), wide),
        (n_bits(4, &four, Some(&[0x21, 0x43]), &[]), moved),
    ] {
        let got = run(&load(&model).unwrap(), &x, Mode::F64).unwrap();
        assert_eq!(got[0].to_f64s(), want);
    }
    user_error(&n_bits(4, &four[1..], None, &[]), "codes");
    user_error(&n_bits(4, &four, Some(&[0x21]), &[]), "zero points");
    let e = load(&n_bits(3, &four, None, &[])).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported, "{e}");
}

/// A convolution of bytes by its definition: `sum (x - zx) * (w - zw)` over a window, zero points of weights per channel.
struct ByteConv {
    x: [usize; 4],
    w: [usize; 4],
    strides: [usize; 2],
    dilations: [usize; 2],
    pads: [usize; 4],
    signed: [bool; 2],
    zx: i64,
    zw: Vec<i64>,
}

impl ByteConv {
    fn numbers(&self, which: usize) -> Vec<i64> {
        let (shape, low) = ([&self.x, &self.w][which], if self.signed[which] { -128 } else { 0 });
        let n: usize = shape.iter().product();
        (0..n as i64).map(|i| (i * 37 + i / 7 * 91 + which as i64 * 5) % 256 + low).collect()
    }

    fn tensor(&self, name: &str, which: usize, dims: &[usize], values: &[i64]) -> TensorProto {
        TensorProto {
            name: name.into(),
            data_type: if self.signed[which] { 3 } else { 2 },
            dims: dims.iter().map(|&d| d as i64).collect(),
            raw_data: Some(values.iter().map(|&v| v as u8).collect::<Vec<u8>>().into()),
            ..Default::default()
        }
    }

    fn model(&self) -> ModelProto {
        let list = |name: &str, values: &[usize]| AttributeProto {
            name: name.into(),
            ints: values.iter().map(|&v| v as i64).collect(),
            r#type: AttributeType::Ints as i32,
            ..Default::default()
        };
        let attrs = vec![
            list("strides", &self.strides),
            list("dilations", &self.dilations),
            list("pads", &self.pads),
        ];
        let mut x = input("x", &self.x.map(|d| d.to_string()).each_ref().map(|d| d.as_str()));
        if let Some(TypeProto { value: Some(TypeValue::Tensor(t)) }) = &mut x.r#type {
            t.elem_type = if self.signed[0] { 3 } else { 2 };
        }
        let zw_dims = if self.zw.len() == 1 { vec![] } else { vec![self.zw.len()] };
        let mut g = graph(
            vec![node("ConvInteger", &["x", "w", "zx", "zw"], &["y"], attrs)],
            vec![x],
            &["y"],
        );
        g.initializer = vec![
            self.tensor("w", 1, &self.w, &self.numbers(1)),
            self.tensor("zx", 0, &[], &[self.zx]),
            self.tensor("zw", 1, &zw_dims, &self.zw),
        ];
        model(g)
    }

    fn definition(&self) -> Vec<i64> {
        let (x, w) = (self.numbers(0), self.numbers(1));
        let ([n, c, h, wd], [o, _, kh, kw]) = (self.x, self.w);
        let out = |i: usize, size: usize, k: usize| {
            (size + self.pads[i] + self.pads[i + 2] - (k - 1) * self.dilations[i] - 1)
                / self.strides[i]
                + 1
        };
        let (oh, ow) = (out(0, h, kh), out(1, wd, kw));
        let mut y = Vec::new();
        for (b, f, i, j) in (0..n * o * oh * ow)
            .map(|at| (at / ow / oh / o, at / ow / oh % o, at / ow % oh, at % ow))
        {
            let mut sum = 0;
            for (ch, ki, kj) in (0..c * kh * kw).map(|at| (at / kw / kh, at / kw % kh, at % kw)) {
                let r = (i * self.strides[0] + ki * self.dilations[0]).checked_sub(self.pads[0]);
                let q = (j * self.strides[1] + kj * self.dilations[1]).checked_sub(self.pads[1]);
                if let (Some(r), Some(q)) = (r.filter(|&r| r < h), q.filter(|&q| q < wd)) {
                    let zw = self.zw[if self.zw.len() == 1 { 0 } else { f }];
                    sum += (x[((b * c + ch) * h + r) * wd + q] - self.zx)
                        * (w[((f * c + ch) * kh + ki) * kw + kj] - zw);
                }
            }
            y.push(sum);
        }
        y
    }
}

#[test]
fn convolutions_of_bytes_are_products_of_bytes() {
    let case = |x, w, strides, dilations, pads, signed, zx, zw: &[i64]| ByteConv {
        x,
        w,
        strides,
        dilations,
        pads,
        signed,
        zx,
        zw: zw.to_vec(),
    };
    for (c, product) in [
        (
            case([1, 8, 5, 6], [3, 8, 3, 3], [1, 1], [1, 1], [1, 1, 1, 1], [false, true], 7, &[0]),
            true,
        ),
        (
            case(
                [2, 9, 7, 5],
                [4, 9, 3, 2],
                [2, 1],
                [1, 2],
                [0, 2, 1, 0],
                [false, false],
                128,
                &[120],
            ),
            true,
        ),
        (case([1, 16, 4, 4], [5, 16, 1, 1], [1, 1], [1, 1], [0; 4], [true, true], -3, &[0]), true),
        (
            case([1, 8, 6, 6], [2, 8, 1, 1], [2, 2], [1, 1], [0; 4], [true, false], 0, &[128, 9]),
            true,
        ),
        (
            case([1, 3, 6, 6], [2, 3, 3, 3], [1, 1], [1, 1], [1; 4], [false, true], 5, &[1, -2]),
            false,
        ),
    ] {
        let graph = load(&c.model()).unwrap();
        let products =
            graph.nodes.iter().filter(|(_, n)| matches!(n.op, Op::Contract { .. })).count();
        let convs = graph.nodes.iter().filter(|(_, n)| matches!(n.op, Op::Conv(_))).count();
        assert_eq!((products, convs), if product { (1, 0) } else { (0, 1) });
        let dtype = if c.signed[0] { DType::I8 } else { DType::U8 };
        let x = Tensor::from_i64s(dtype, &c.x, &c.numbers(0)).unwrap();
        let y = run(&graph, &[x], Mode::Exact).unwrap().remove(0);
        assert_eq!((y.dtype(), y.to_i64s()), (DType::I32, c.definition()));
    }
}
