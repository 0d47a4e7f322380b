"""Write a BERT-type encoder directory (config.json, model.safetensors) as an ONNX file.

ONNX Runtime reads no Hugging Face directories; with this it runs the same weights without PyTorch. The
graph has the form that PyTorch's exporter gives, node for node where it matters, so that ONNX Runtime's
own fusions (attention, GELU, skip layer norm) find their patterns. The mask input is left out: every
position counts, as in a batch of one.

Usage:  python demo/export_minilm.py DIRECTORY OUT.onnx [--sequence 128]
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

OPSET = 17


class Builder:
    """A graph that grows by calls: each returns the name of its result."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = np.ascontiguousarray(value)
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def linear(self, x: str, name: str) -> str:
        kernel = self.constant(f"{name}.kernel", self.weights[f"{name}.weight"].T)
        return self.op("Add", self.weight(f"{name}.bias"), self.op("MatMul", x, kernel))

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def encoder(config: dict, weights: dict[str, np.ndarray], sequence: int) -> onnx.ModelProto:
    b = Builder(weights)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width, epsilon = hidden // heads, config["layer_norm_eps"]
    split = b.constant("split", np.array([1, sequence, heads, width], np.int64))
    merge = b.constant("merge", np.array([1, sequence, hidden], np.int64))
    scale = b.constant("scale", np.array(np.sqrt(width), np.float32))
    half, one = b.constant("half", np.array(0.5, np.float32)), b.constant("one", np.array(1.0, np.float32))
    root = b.constant("root", np.array(np.sqrt(2.0), np.float32))

    position = b.constant(
        "positions", weights["embeddings.position_embeddings.weight"][None, :sequence]
    )
    words = b.op("Gather", b.weight("embeddings.word_embeddings.weight"), "input_ids", axis=0)
    types = b.op("Gather", b.weight("embeddings.token_type_embeddings.weight"), "token_type_ids", axis=0)
    x = b.op("Add", b.op("Add", words, types), position)
    x = b.layer_norm(x, "embeddings.LayerNorm", epsilon)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"

        def heads_of(name: str, perm: list[int]) -> str:
            y = b.op("Reshape", b.linear(x, f"{prefix}.attention.self.{name}"), split)
            return b.op("Transpose", y, perm=perm)

        query = heads_of("query", [0, 2, 1, 3])
        key = heads_of("key", [0, 2, 3, 1])
        value = heads_of("value", [0, 2, 1, 3])
        scores = b.op("Softmax", b.op("Div", b.op("MatMul", query, key), scale), axis=-1)
        mixed = b.op("Transpose", b.op("MatMul", scores, value), perm=[0, 2, 1, 3])
        attended = b.linear(b.op("Reshape", mixed, merge), f"{prefix}.attention.output.dense")
        x = b.layer_norm(b.op("Add", attended, x), f"{prefix}.attention.output.LayerNorm", epsilon)
        y = b.linear(x, f"{prefix}.intermediate.dense")
        gelu = b.op("Add", b.op("Erf", b.op("Div", y, root)), one)
        y = b.linear(b.op("Mul", b.op("Mul", y, gelu), half), f"{prefix}.output.dense")
        x = b.layer_norm(b.op("Add", y, x), f"{prefix}.output.LayerNorm", epsilon)

    b.nodes[-1].output[0] = "last_hidden_state"
    ids = [1, sequence]
    graph = helper.make_graph(
        b.nodes,
        "encoder",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ids) for n in ("input_ids", "token_type_ids")],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [1, sequence, hidden])],
        initializer=[numpy_helper.from_array(v, k) for k, v in b.initializers.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="tilewright-demo"
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--sequence", type=int, default=128)
    arguments = parser.parse_args()
    config = json.loads((arguments.directory / "config.json").read_text())
    weights = load_file(arguments.directory / "model.safetensors")
    partial = arguments.out.with_suffix(".partial")
    onnx.save(encoder(config, weights, arguments.sequence), partial)
    partial.rename(arguments.out)


if __name__ == "__main__":
    main()
