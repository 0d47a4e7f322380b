"""A small ONNX writer: enough protobuf to save a network without the package `onnx`.

Field numbers are those of onnx.proto (ONNX 1.23): a message is a run of fields, a field its number and kind, then its value.
"""

import struct


def varint(value):
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def number(field, value):
    return varint(field << 3) + varint(value)


def data(field, value):
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def attribute(name, value):
    if isinstance(value, float):
        return data(1, name) + varint(2 << 3 | 5) + struct.pack("<f", value) + number(20, 1)
    if isinstance(value, int):
        return data(1, name) + number(3, value) + number(20, 2)
    return data(1, name) + b"".join(number(8, v) for v in value) + number(20, 7)


def value_info(name, shape):
    dims = b"".join(data(1, data(2, d) if isinstance(d, str) else number(1, d)) for d in shape)
    return data(1, name) + data(2, data(1, number(1, 1) + data(2, dims)))


class OnnxWriter:
    """A graph of float32 with one input and one output; a shape's strings are symbols."""

    def __init__(self, input_name, input_shape, output_name, output_shape):
        self.ends = data(11, value_info(input_name, input_shape)) + data(12, value_info(output_name, output_shape))
        self.nodes, self.weights = [], []

    def node(self, op, inputs, output, **attributes):
        text = b"".join(data(1, i) for i in inputs) + data(2, output) + data(3, f"{op}_{len(self.nodes)}") + data(4, op)
        self.nodes.append(data(1, text + b"".join(data(5, attribute(k, v)) for k, v in attributes.items())))

    def weight(self, name, tensor):
        """Stores a tensor, and gives its name."""
        raw = tensor.detach().float().cpu().contiguous().numpy().tobytes()
        dims = b"".join(number(1, d) for d in tensor.shape)
        self.weights.append(data(5, dims + number(2, 1) + data(8, name) + data(9, raw)))
        return name

    def bytes(self):
        graph = b"".join(self.nodes) + data(2, "net") + b"".join(self.weights) + self.ends
        return number(1, 8) + data(7, graph) + data(8, data(1, "") + number(2, 17))
