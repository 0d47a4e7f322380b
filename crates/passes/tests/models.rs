//! The benchmark models come out of the pipeline as the kernels want them.
//!
//! `bench/export_models.py` writes the files; a model that is not there is left out, aloud.

use std::path::Path;
use tilewright_graph::{Graph, Op};
use tilewright_passes::{Histogram, PassContext, choose_layouts};

fn optimised(name: &str) -> Option<Graph> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/models").join(name);
    if !path.exists() {
        println!("{name} is not exported: left out");
        return None;
    }
    let mut graph = tilewright_import::onnx::load(&path).unwrap();
    let report = tilewright_passes::run(&mut graph, &PassContext::default()).unwrap();
    assert!(report.unstable.is_empty(), "{:?}", report.unstable);
    Some(graph)
}

/// Per layer: four projections and two of the feed-forward network, one attention whose operands
/// and result are views, two norms, and elementwise chains. Nothing else.
#[test]
fn transformers() {
    for (name, layers) in [("bert_base.onnx", 12), ("minilm.onnx", 6)] {
        let Some(graph) = optimised(name) else { continue };
        let counts = Histogram::of(&graph);
        assert_eq!(counts.count("contract"), 6 * layers, "{counts}");
        assert_eq!(counts.count("attention"), layers, "{counts}");
        assert_eq!(counts.count("layer_norm"), 2 * layers + 1, "{counts}");
        assert_eq!(counts.count("gather"), 2, "{counts}");
        // Heads: q, k, v and the result; and the mask once.
        assert_eq!(counts.count("permute"), 4 * layers, "{counts}");
        assert_eq!(counts.count("reshape"), 4 * layers + 1, "{counts}");
        let known = ["contract", "attention", "layer_norm", "gather", "permute", "reshape", "map"];
        assert!(counts.0.keys().all(|k| known.contains(&k.as_str())), "{counts}");
        // Every permute touches an attention.
        let users = graph.users();
        for (_, node) in graph.live().filter(|(_, n)| matches!(n.op, Op::Permute(_))) {
            let reads = graph.producer(node.inputs[0]).map(|id| &graph.nodes[id].op);
            let read_by = users[node.outputs[0]]
                .iter()
                .all(|&id| matches!(graph.nodes[id].op, Op::Attention(_)));
            assert!(matches!(reads, Some(Op::Attention(_))) || read_by);
        }
        // Every projection's weights are packed.
        assert_eq!(choose_layouts(&graph, &PassContext::default()).len(), 6 * layers);
    }
}

#[test]
fn convolutional_networks() {
    for (name, convolutions) in [("resnet50.onnx", 53), ("mobilenetv3.onnx", 62)] {
        let Some(graph) = optimised(name) else { continue };
        let counts = Histogram::of(&graph);
        assert_eq!(counts.count("conv"), convolutions, "{counts}");
        let known = ["conv", "map", "window", "reduce", "contract"];
        assert!(counts.0.keys().all(|k| known.contains(&k.as_str())), "{counts}");
        // Channels are blocked everywhere but at the ends and where there are too few.
        let layouts = choose_layouts(&graph, &PassContext::default());
        let plain: Vec<_> = graph
            .live()
            .filter(|(_, n)| matches!(n.op, Op::Conv(_) | Op::Map(_) | Op::Window(_)))
            .map(|(_, n)| n.outputs[0])
            .filter(|v| graph.shape(*v).len() == 4 && !layouts.contains_key(v))
            .collect();
        assert!(plain.is_empty(), "{name}: {plain:?}");
    }
}
