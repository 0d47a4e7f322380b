"""Train the digits classifier that `make demo` falls back to, and write it as ONNX.

Writes beside this file: `digits.onnx` (the network, batch size symbolic), `test_images.npy` and
`test_labels.npy` (the first 64 images it was not trained on). The data are the 1,797 images of 8 x 8
pixels that scikit-learn ships (the UCI "optical recognition of handwritten digits" test set).

Usage:  python demo/digits/train.py        (packages: numpy, onnx, torch, scikit-learn)
"""

import pathlib
import sys

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

HERE = pathlib.Path(__file__).parent
SEED = 7
EPOCHS = 60
N_TEST = 360
MIN_ACCURACY = 0.95


def network() -> torch.nn.Sequential:
    """Two convolutions, two dense layers: about 86,000 weights."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 4 * 4, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


def varied(images: torch.Tensor) -> torch.Tensor:
    """Each image slightly turned, scaled, sheared and shifted, as another writer might write it."""
    n = len(images)
    matrix = torch.eye(2).repeat(n, 1, 1) + 0.12 * torch.randn(n, 2, 2)
    shift = 0.12 * torch.randn(n, 2, 1)
    grid = torch.nn.functional.affine_grid(
        torch.cat([matrix, shift], 2), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def train(images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Sequential:
    torch.manual_seed(SEED)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(
                model(varied(images[batch])), labels[batch]
            ).backward()
            optimiser.step()
        schedule.step()
    return model.eval()


def to_onnx(model: torch.nn.Sequential) -> onnx.ModelProto:
    """The network as a graph written out by hand, so that it does not change with an exporter."""
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    names = {"0": "conv1", "2": "conv2", "6": "dense1", "8": "dense2"}
    initializers = [
        numpy_helper.from_array(value, f"{names[key.split('.')[0]]}_{key.split('.')[1]}")
        for key, value in weights.items()
    ]

    def node(op, inputs, output, **attributes):
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", ["image", "conv1_weight", "conv1_bias"], "conv1", **conv),
        node("Relu", ["conv1"], "relu1"),
        node("Conv", ["relu1", "conv2_weight", "conv2_bias"], "conv2", **conv),
        node("Relu", ["conv2"], "relu2"),
        node("MaxPool", ["relu2"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["pool"], "flat", axis=1),
        node("Gemm", ["flat", "dense1_weight", "dense1_bias"], "dense1", transB=1),
        node("Relu", ["dense1"], "relu3"),
        node("Gemm", ["relu3", "dense2_weight", "dense2_bias"], "logits", transB=1),
        node("Softmax", ["logits"], "probabilities", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        initializer=initializers,
    )
    result = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="tilewright-demo"
    )
    result.ir_version = 8
    onnx.checker.check_model(result, full_check=True)
    return result


def main() -> int:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy((digits.images / 16.0).astype(np.float32)[:, None])
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # The last images come from writers whose other digits are not among the first.
    model = train(images[:-N_TEST], labels[:-N_TEST])
    with torch.no_grad():
        right = model(images[-N_TEST:]).argmax(1) == labels[-N_TEST:]
    accuracy = right.float().mean().item()
    print(f"accuracy on {N_TEST} held-out images: {accuracy:.4f}")
    if accuracy < MIN_ACCURACY:
        print(f"below {MIN_ACCURACY}: nothing is written", file=sys.stderr)
        return 1
    onnx.save(to_onnx(model), HERE / "digits.onnx")
    np.save(HERE / "test_images.npy", images[-N_TEST:][:64].numpy())
    np.save(HERE / "test_labels.npy", labels[-N_TEST:][:64].numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())
