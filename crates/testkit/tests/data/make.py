"""Writes the small ONNX models that the fuzz target starts from (package: onnx).

Usage:  python crates/testkit/tests/data/make.py
"""

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).parent


def save(name, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        initializer=[numpy_helper.from_array(v, n) for n, v in initializers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="")
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, HERE / f"{name}.onnx")


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, **attributes)


F = TensorProto.FLOAT
save(
    "shapes",
    [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Concat", ["n", "tail"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["r"]),
        node("ConstantOfShape", ["t"], ["c"], value=helper.make_tensor("v", F, [1], [2.0])),
        node("Slice", ["r", "zero", "tail"], ["p"]),
        node("Expand", ["c", "t"], ["e"]),
        node("Add", ["r", "e"], ["y"]),
    ],
    [("x", F, ["N", 2, 3])],
    [("y", F, ["N", 6]), ("p", F, ["M", "K"])],
    [("zero", np.array([0])), ("tail", np.array([6]))],
)
save(
    "network",
    [
        node("Conv", ["x", "w"], ["c"], kernel_shape=[2, 2], pads=[1, 0, 0, 1], strides=[2, 1]),
        node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], ceil_mode=1),
        node("Flatten", ["m"], ["f"], axis=1),
        node("Gemm", ["f", "g"], ["h"], alpha=0.5, transB=1),
        node("Softmax", ["h"], ["y"], axis=-1),
    ],
    [("x", F, [1, 1, 4, 4])],
    [("y", F, [1, 2])],
    [("w", np.ones((2, 1, 2, 2), np.float32)), ("g", np.ones((2, 6), np.float32))],
)
