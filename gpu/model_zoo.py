"""The models that `gpu/models.py` measures, in plain PyTorch, and how `tw` gets the same ones.

Each is built from a case (sizes and the shape of its input), gets random weights from a seed, and is exported: language and
vision transformers as a Hugging Face directory (config.json, model.safetensors), convolution networks as an ONNX file
(`onnx_writer.py`). Attention is `scaled_dot_product_attention`; batch norms are folded into the convolutions, on both sides.
To add a model: its class with `forward`, `inputs` and `export`, and its rows in `CASES` and `KINDS`. `NAME@8x512` is a model with
other sizes of its inputs than its row has.
"""

import json
import math
import struct

import torch
import torch.nn.functional as F
from torch import nn

from onnx_writer import OnnxWriter

CASES = {
    "bert": dict(kind="bert", hidden=768, layers=12, heads=12, inner=3072, vocab=30522, positions=512, shape=(32, 128)),
    "minilm": dict(kind="bert", hidden=384, layers=6, heads=12, inner=1536, vocab=30522, positions=512, shape=(32, 128)),
    "gpt2": dict(kind="gpt2", hidden=768, layers=12, heads=12, vocab=50257, positions=1024, shape=(8, 512)),
    "vit": dict(kind="vit", hidden=768, layers=12, heads=12, inner=3072, image=224, patch=16, shape=(64,)),
    "llama": dict(kind="llama", hidden=2048, layers=16, heads=32, kv=8, inner=8192, vocab=128256, positions=4096, shape=(1, 2048)),
    "llama8b": dict(kind="llama", hidden=4096, layers=32, heads=32, kv=8, inner=14336, vocab=128256, positions=4096, shape=(1, 2048),
                    stored=torch.bfloat16),
    "resnet50": dict(kind="resnet50", image=224, classes=1000, shape=(64,)),
    "resnext50": dict(kind="resnext50", image=224, classes=1000, shape=(64,)),
    "mobilenetv3": dict(kind="mobilenetv3", image=224, classes=1000, shape=(64,)),
    "efficientnet": dict(kind="efficientnet", image=224, classes=1000, shape=(64,)),
}


def case_of(name):
    """The row of a model, with the sizes behind `@` for its inputs."""
    base, _, sizes = name.partition("@")
    return CASES[base] | ({"shape": tuple(int(n) for n in sizes.split("x"))} if sizes else {})


class Linear(nn.Linear):
    pass


class BertLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, i = c["hidden"], c["inner"]
        self.q, self.k, self.v, self.o = (Linear(h, h) for _ in range(4))
        self.up, self.down = Linear(h, i), Linear(i, h)
        self.n1, self.n2 = nn.LayerNorm(h, 1e-12), nn.LayerNorm(h, 1e-12)
        self.heads = c["heads"]

    def forward(self, x, mask):
        b, s, h = x.shape
        split = lambda y: y.view(b, s, self.heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)), attn_mask=mask)
        x = self.n1(self.o(y.transpose(1, 2).reshape(b, s, h)) + x)
        return self.n2(self.down(F.gelu(self.up(x))) + x)


class Bert(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden"]
        self.words, self.types = nn.Embedding(c["vocab"], h), nn.Embedding(2, h)
        self.places = nn.Embedding(c["positions"], h)
        self.norm = nn.LayerNorm(h, 1e-12)
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c["layers"]))

    def forward(self, ids, mask, types):
        x = self.words(ids) + self.types(types) + self.places.weight[: ids.shape[1]]
        x = self.norm(x)
        low = torch.finfo(x.dtype).min
        add = ((1 - mask) * low).to(x.dtype)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, add)
        return x

    def export(self, c):
        config = dict(architectures=["BertModel"], model_type="bert", hidden_size=c["hidden"], hidden_act="gelu",
                      num_hidden_layers=c["layers"], num_attention_heads=c["heads"], intermediate_size=c["inner"],
                      vocab_size=c["vocab"], type_vocab_size=2, max_position_embeddings=c["positions"],
                      layer_norm_eps=1e-12)
        names = {"words": "embeddings.word_embeddings", "types": "embeddings.token_type_embeddings",
                 "places": "embeddings.position_embeddings", "norm": "embeddings.LayerNorm"}
        parts = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
                 "o": "attention.output.dense", "n1": "attention.output.LayerNorm", "up": "intermediate.dense",
                 "down": "output.dense", "n2": "output.LayerNorm"}
        for i in range(c["layers"]):
            names |= {f"layers.{i}.{p}": f"encoder.layer.{i}.{n}" for p, n in parts.items()}
        return config, names, {}

    @staticmethod
    def inputs(c, g):
        ids = torch.randint(0, c["vocab"], c["shape"], generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


class Gpt2Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden"]
        self.n1, self.n2 = nn.LayerNorm(h, 1e-5), nn.LayerNorm(h, 1e-5)
        self.qkv, self.o, self.up, self.down = Linear(h, 3 * h), Linear(h, h), Linear(h, 4 * h), Linear(4 * h, h)
        self.heads = c["heads"]

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = (y.view(b, s, self.heads, -1).transpose(1, 2) for y in self.qkv(self.n1(x)).split(h, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.words, self.places = nn.Embedding(c["vocab"], c["hidden"]), nn.Embedding(c["positions"], c["hidden"])
        self.layers = nn.ModuleList(Gpt2Layer(c) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(c["hidden"], 1e-5)

    def forward(self, ids):
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def export(self, c):
        config = dict(architectures=["GPT2Model"], model_type="gpt2", n_embd=c["hidden"], n_layer=c["layers"],
                      n_head=c["heads"], n_positions=c["positions"], vocab_size=c["vocab"],
                      activation_function="gelu_new", layer_norm_epsilon=1e-5)
        names = {"words": "wte", "places": "wpe", "norm": "ln_f"}
        parts = {"n1": "ln_1", "n2": "ln_2", "qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        for i in range(c["layers"]):
            names |= {f"layers.{i}.{p}": f"h.{i}.{n}" for p, n in parts.items()}
        # GPT-2's files hold these transposed.
        turned = {f"layers.{i}.{p}.weight" for i in range(c["layers"]) for p in ("qkv", "o", "up", "down")}
        return config, names, turned

    @staticmethod
    def inputs(c, g):
        ids = torch.randint(0, c["vocab"], c["shape"], generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class VitLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, i = c["hidden"], c["inner"]
        self.n1, self.n2 = nn.LayerNorm(h, 1e-12), nn.LayerNorm(h, 1e-12)
        self.q, self.k, self.v, self.o = (Linear(h, h) for _ in range(4))
        self.up, self.down = Linear(h, i), Linear(i, h)
        self.heads = c["heads"]

    def forward(self, x):
        b, s, h = x.shape
        split = lambda y: y.view(b, s, self.heads, -1).transpose(1, 2)
        n = self.n1(x)
        y = F.scaled_dot_product_attention(split(self.q(n)), split(self.k(n)), split(self.v(n)))
        x = x + self.o(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Vit(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden"]
        patches = (c["image"] // c["patch"]) ** 2
        self.patch = nn.Conv2d(3, h, c["patch"], c["patch"])
        self.first, self.places = nn.Parameter(torch.zeros(1, 1, h)), nn.Parameter(torch.zeros(1, patches + 1, h))
        self.layers = nn.ModuleList(VitLayer(c) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(h, 1e-12)

    def forward(self, pixels):
        x = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def export(self, c):
        config = dict(architectures=["ViTModel"], model_type="vit", hidden_size=c["hidden"], hidden_act="gelu",
                      num_hidden_layers=c["layers"], num_attention_heads=c["heads"], intermediate_size=c["inner"],
                      image_size=c["image"], patch_size=c["patch"], num_channels=3, qkv_bias=True, layer_norm_eps=1e-12)
        names = {"patch": "embeddings.patch_embeddings.projection", "norm": "layernorm",
                 "first": "embeddings.cls_token", "places": "embeddings.position_embeddings"}
        parts = {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value",
                 "o": "attention.output.dense", "n1": "layernorm_before", "up": "intermediate.dense",
                 "down": "output.dense", "n2": "layernorm_after"}
        for i in range(c["layers"]):
            names |= {f"layers.{i}.{p}": f"encoder.layer.{i}.{n}" for p, n in parts.items()}
        return config, names, {}

    @staticmethod
    def inputs(c, g):
        return {"pixel_values": torch.randn(c["shape"][0], 3, c["image"], c["image"], generator=g)}


class RmsNorm(nn.Module):
    def __init__(self, h, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(h)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LlamaLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, i, d = c["hidden"], c["inner"], c["hidden"] // c["heads"]
        self.n1, self.n2 = RmsNorm(h), RmsNorm(h)
        self.q, self.o = Linear(h, h, bias=False), Linear(h, h, bias=False)
        self.k, self.v = (Linear(h, c["kv"] * d, bias=False) for _ in range(2))
        self.gate, self.up, self.down = Linear(h, i, bias=False), Linear(h, i, bias=False), Linear(i, h, bias=False)
        self.d = d

    def forward(self, x, cos, sin):
        b, s, h = x.shape
        split = lambda y: y.view(b, s, -1, self.d).transpose(1, 2)

        def turn(y):
            a, c = y.chunk(2, -1)
            return y * cos + torch.cat([-c, a], -1) * sin

        n = self.n1(x)
        q, k, v = turn(split(self.q(n))), turn(split(self.k(n))), split(self.v(n))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, h))
        n = self.n2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.words = nn.Embedding(c["vocab"], c["hidden"])
        self.layers = nn.ModuleList(LlamaLayer(c) for _ in range(c["layers"]))
        self.norm = RmsNorm(c["hidden"])
        self.d = c["hidden"] // c["heads"]

    def forward(self, ids):
        x = self.words(ids)
        at = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        rate = 500000.0 ** (-torch.arange(0, self.d, 2, device=ids.device, dtype=torch.float32) / self.d)
        angle = at[:, None] * rate[None, :]
        angle = torch.cat([angle, angle], -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def export(self, c):
        config = dict(architectures=["LlamaModel"], model_type="llama", hidden_size=c["hidden"], hidden_act="silu",
                      num_hidden_layers=c["layers"], num_attention_heads=c["heads"], num_key_value_heads=c["kv"],
                      head_dim=c["hidden"] // c["heads"], intermediate_size=c["inner"], vocab_size=c["vocab"],
                      max_position_embeddings=c["positions"], rms_norm_eps=1e-5, rope_theta=500000.0,
                      attention_bias=False, mlp_bias=False, tie_word_embeddings=True)
        names = {"words": "embed_tokens", "norm": "norm"}
        parts = {"n1": "input_layernorm", "n2": "post_attention_layernorm", "q": "self_attn.q_proj",
                 "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
                 "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
        for i in range(c["layers"]):
            names |= {f"layers.{i}.{p}": f"layers.{i}.{n}" for p, n in parts.items()}
        return config, names, {}

    @staticmethod
    def inputs(c, g):
        ids = torch.randint(0, c["vocab"], c["shape"], generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Net(nn.Module):
    """A convolution network as a list of steps `(operator, operands, attributes)`: run by PyTorch, written as ONNX."""

    def __init__(self, c):
        super().__init__()
        self.steps, self.layers, self.channels = [], nn.ModuleList(), [3]
        self.build(c)

    def step(self, op, operands, channels, **attributes):
        self.steps.append((op, operands, attributes))
        self.channels.append(channels)
        return len(self.channels) - 1

    def conv(self, x, channels, kernel=1, stride=1, groups=1, act=None, gain=1.0):
        layer = nn.Conv2d(self.channels[x], channels, kernel, stride, kernel // 2, groups=groups)
        std = gain * math.sqrt(2 / (self.channels[x] // groups * kernel * kernel))
        nn.init.normal_(layer.weight, 0, std)
        nn.init.normal_(layer.bias, 0, 0.1)
        self.layers.append(layer)
        x = self.step("conv", [x], channels, layer=len(self.layers) - 1)
        return x if act is None else self.act(x, act)

    def linear(self, x, width):
        layer = nn.Linear(self.channels[x], width)
        nn.init.normal_(layer.weight, 0, math.sqrt(1 / self.channels[x]))
        self.layers.append(layer)
        return self.step("linear", [x], width, layer=len(self.layers) - 1)

    def act(self, x, kind):
        return self.step(kind, [x], self.channels[x])

    def forward(self, x):
        values = [x.to(self.layers[0].weight.dtype)]
        for op, operands, a in self.steps:
            v = [values[i] for i in operands]
            values.append({
                "conv": lambda: self.layers[a["layer"]](v[0]), "linear": lambda: self.layers[a["layer"]](v[0]),
                "relu": lambda: F.relu(v[0]), "hardswish": lambda: F.hardswish(v[0]),
                "hardsigmoid": lambda: F.hardsigmoid(v[0]), "silu": lambda: F.silu(v[0]), "sigmoid": lambda: torch.sigmoid(v[0]), "add": lambda: v[0] + v[1], "mul": lambda: v[0] * v[1],
                "maxpool": lambda: F.max_pool2d(v[0], 3, 2, 1), "mean": lambda: F.adaptive_avg_pool2d(v[0], 1),
                "flatten": lambda: v[0].flatten(1),
            }[op]())
        return values[-1]

    def write(self, c, path):
        onnx = OnnxWriter("input", ["batch", 3, c["image"], c["image"]], "output", ["batch", c["classes"]])
        last = len(self.steps)
        name = lambda i: "input" if i == 0 else "output" if i == last else f"v{i}"
        for at, (op, operands, a) in enumerate(self.steps, 1):
            ins, out = [name(i) for i in operands], name(at)
            if op in ("conv", "linear"):
                layer = self.layers[a["layer"]]
                ins += [onnx.weight(f"l{a['layer']}.{p}", getattr(layer, p)) for p in ("weight", "bias")]
            if op == "conv":
                k, s, p = layer.kernel_size, layer.stride, layer.padding
                onnx.node("Conv", ins, out, kernel_shape=list(k), strides=list(s), pads=list(p * 2), group=layer.groups)
            elif op == "linear":
                onnx.node("Gemm", ins, out, transB=1)
            elif op == "maxpool":
                onnx.node("MaxPool", ins, out, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
            elif op == "silu":
                onnx.node("Sigmoid", ins, f"{out}.gate")
                onnx.node("Mul", [*ins, f"{out}.gate"], out)
            elif op == "hardsigmoid":
                onnx.node("HardSigmoid", ins, out, alpha=1 / 6)
            else:
                kinds = {"relu": "Relu", "sigmoid": "Sigmoid", "hardswish": "HardSwish", "add": "Add", "mul": "Mul", "mean": "GlobalAveragePool",
                         "flatten": "Flatten"}
                onnx.node(kinds[op], ins, out)
        path.write_bytes(onnx.bytes())

    @staticmethod
    def inputs(c, g):
        return {"input": torch.randn(c["shape"][0], 3, c["image"], c["image"], generator=g)}


class ResNet50(Net):
    # Groups of the 3x3 convolutions, and their width over that of ResNet-50.
    GROUPS, WIDER = 1, 1

    def build(self, c):
        x = self.conv(0, 64, 7, 2, act="relu")
        x = self.step("maxpool", [x], 64)
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for block in range(blocks):
                s = stride if block == 0 else 1
                y = self.conv(x, width * self.WIDER, act="relu")
                y = self.conv(y, width * self.WIDER, 3, s, groups=self.GROUPS, act="relu")
                y = self.conv(y, 4 * width, gain=0.3)
                skip = self.conv(x, 4 * width, 1, s) if block == 0 else x
                x = self.act(self.step("add", [y, skip], 4 * width), "relu")
        x = self.step("mean", [x], self.channels[x])
        self.linear(self.step("flatten", [x], self.channels[x]), c["classes"])


class ResNeXt50(ResNet50):
    # 32 groups of 4 channels: table 1 of arXiv:1611.05431.
    GROUPS, WIDER = 32, 2


class MobileNetV3(Net):
    # Kernel, expanded width, width, squeeze and excite, activation, stride: table 1 of arXiv:1905.02244.
    ROWS = ((3, 16, 16, 0, "relu", 1), (3, 64, 24, 0, "relu", 2), (3, 72, 24, 0, "relu", 1), (5, 72, 40, 1, "relu", 2),
            (5, 120, 40, 1, "relu", 1), (5, 120, 40, 1, "relu", 1), (3, 240, 80, 0, "hardswish", 2),
            (3, 200, 80, 0, "hardswish", 1), (3, 184, 80, 0, "hardswish", 1), (3, 184, 80, 0, "hardswish", 1),
            (3, 480, 112, 1, "hardswish", 1), (3, 672, 112, 1, "hardswish", 1), (5, 672, 160, 1, "hardswish", 2),
            (5, 960, 160, 1, "hardswish", 1), (5, 960, 160, 1, "hardswish", 1))

    def build(self, c):
        x = self.conv(0, 16, 3, 2, act="hardswish")
        for kernel, wide, width, squeeze, act, stride in self.ROWS:
            y = x if wide == self.channels[x] else self.conv(x, wide, act=act)
            y = self.conv(y, wide, kernel, stride, groups=wide, act=act)
            if squeeze:
                s = self.step("mean", [y], wide)
                s = self.conv(s, (wide // 4 + 7) // 8 * 8, act="relu")
                s = self.act(self.conv(s, wide), "hardsigmoid")
                y = self.step("mul", [y, s], wide)
            y = self.conv(y, width, gain=0.7)
            x = self.step("add", [x, y], width) if stride == 1 and width == self.channels[x] else y
        x = self.conv(x, 960, act="hardswish")
        x = self.step("mean", [x], 960)
        x = self.linear(self.step("flatten", [x], 960), 1280)
        self.linear(self.act(x, "hardswish"), c["classes"])


class EfficientNet(Net):
    # EfficientNet-B0: kernel, expansion, width, stride, blocks: table 1 of arXiv:1905.11946.
    ROWS = ((3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 2, 3), (5, 6, 112, 1, 3), (5, 6, 192, 2, 4),
            (3, 6, 320, 1, 1))

    def build(self, c):
        x = self.conv(0, 32, 3, 2, act="silu")
        for kernel, expand, width, first, blocks in self.ROWS:
            for block in range(blocks):
                have, stride = self.channels[x], first if block == 0 else 1
                y = x if expand == 1 else self.conv(x, have * expand, act="silu")
                y = self.conv(y, have * expand, kernel, stride, groups=have * expand, act="silu")
                s = self.step("mean", [y], have * expand)
                s = self.conv(s, max(have // 4, 1), act="silu")
                s = self.act(self.conv(s, have * expand), "sigmoid")
                y = self.conv(self.step("mul", [y, s], have * expand), width, gain=0.7)
                x = self.step("add", [x, y], width) if stride == 1 and width == have else y
        x = self.conv(x, 1280, act="silu")
        x = self.step("mean", [x], 1280)
        self.linear(self.step("flatten", [x], 1280), c["classes"])


KINDS = {"bert": Bert, "gpt2": Gpt2, "vit": Vit, "llama": Llama, "resnet50": ResNet50, "resnext50": ResNeXt50, "mobilenetv3": MobileNetV3,
         "efficientnet": EfficientNet}


def make(name, device="cuda"):
    """The model of a case, with its weights, and its inputs in the order in which `tw` names them."""
    case = case_of(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = KINDS[case["kind"]](case).eval()
    if not isinstance(model, Net):
        for p in model.parameters():
            if p.dim() > 1:
                # Sums of a row keep their size, so that activations and scores look like a trained model's.
                nn.init.normal_(p, 0, 0.02 if p.dim() != 2 else 0.7 / math.sqrt(p.shape[1]))
    inputs = KINDS[case["kind"]].inputs(case, torch.Generator().manual_seed(1))
    return model, inputs


def given(name, inputs, device="cuda"):
    """What the PyTorch model takes of the inputs: decoders make their mask themselves."""
    tensors = [t.to(device) for t in inputs.values()]
    if issubclass(KINDS[case_of(name)["kind"]], Net):
        return [tensors[0].to(memory_format=torch.channels_last)]
    return tensors[:1] if case_of(name)["kind"] in ("gpt2", "llama") else tensors


def save(path, tensors, dtype=torch.float32):
    """A safetensors file in float32 or bfloat16: length of the header, the header, the data."""
    header, at = {}, 0
    for name, t in tensors.items():
        size = t.numel() * dtype.itemsize
        header[name] = {"dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for t in tensors.values():
            f.write(t.detach().to(dtype).contiguous().view(torch.uint8).cpu().numpy().data)


def export(name, model, folder):
    """Writes the model for `tw`, and says what to open."""
    case = case_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Net):
        model.write(case, folder / "model.onnx")
        return folder / "model.onnx"
    config, names, turned = model.export(case)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for key, t in model.state_dict().items():
        stem, _, last = key.rpartition(".")
        to = names[key] if key in names else f"{names[stem]}.{last}"
        tensors[to] = t.T if key in turned else t
    save(folder / "model.safetensors", tensors, case.get("stored", torch.float32))
    return folder
