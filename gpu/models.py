#!/usr/bin/env python3
"""Whole models on a GPU: `tw --device cuda` beside PyTorch, the same weights and inputs, in turns.

    gpu/models.py --tw bin/tw --work FOLDER --json models.json [bert vit gpt2 minilm llama]

Each model is written here in plain PyTorch (its attention is `scaled_dot_product_attention`), gets random
weights from a seed, and is exported as a Hugging Face directory (config.json, model.safetensors), which `tw`
reads. Nothing but PyTorch and NumPy is needed.

Measured is a run on the device between two events, in rounds that alternate; the lowest median of the rounds
counts. For `tw` that is a replayed graph, for PyTorch (under `inference_mode`) those of --peers: `eager`,
`compile` (`torch.compile`), `graphs` (its mode `reduce-overhead`, which replays graphs, too), `autotune`
(`max-autotune`, which takes minutes). Outputs are compared with PyTorch in float32 without TF32: error relative
to the largest magnitude. Peak memory is what PyTorch's allocator reports, for `tw` the sum of its blocks.
"""

import argparse
import gc
import json
import math
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CASES = {
    "bert": dict(kind="bert", hidden=768, layers=12, heads=12, inner=3072, vocab=30522, positions=512, shape=(32, 128)),
    "minilm": dict(kind="bert", hidden=384, layers=6, heads=12, inner=1536, vocab=30522, positions=512, shape=(32, 128)),
    "gpt2": dict(kind="gpt2", hidden=768, layers=12, heads=12, vocab=50257, positions=1024, shape=(8, 512)),
    "vit": dict(kind="vit", hidden=768, layers=12, heads=12, inner=3072, image=224, patch=16, shape=(64,)),
    "llama": dict(kind="llama", hidden=2048, layers=16, heads=32, kv=8, inner=8192, vocab=128256, positions=4096, shape=(1, 2048)),
}


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


KINDS = {"bert": Bert, "gpt2": Gpt2, "vit": Vit, "llama": Llama}
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def save(path, tensors):
    """A safetensors file: length of the header, the header, the data."""
    header, at = {}, 0
    for name, t in tensors.items():
        size = t.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().numpy().tobytes())


def export(model, case, folder):
    folder.mkdir(parents=True, exist_ok=True)
    config, names, turned = model.export(case)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for name, t in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        to = names[name] if name in names else f"{names[stem]}.{last}"
        tensors[to] = t.T if name in turned else t
    save(folder / "model.safetensors", tensors)


def median_ms(step, runs, warmup=5):
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tw(args, command, folder, inputs, precision, more=()):
    call = [args.tw, command, str(folder), "--device", "cuda", "--precision", precision, "--json",
            "--cache", str(args.work / "cache"), *more]
    for name in inputs:
        call += ["--input", f"{name}={folder / (name + '.npy')}"]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.stderr.strip():
        print("   tw says:", done.stderr.strip()[:2000], file=sys.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"tw {command} ended with {done.returncode}: {done.stdout[:500]}")
    return json.loads(done.stdout)


def error(got, want):
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def measure(args, name, precision):
    case = CASES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = KINDS[case["kind"]](case).eval()
    for key, p in model.named_parameters():
        if p.dim() > 1:
            # Sums of a row keep their size, so that activations and scores look like a trained model's.
            nn.init.normal_(p, 0, 0.02 if p.dim() != 2 else 0.7 / math.sqrt(p.shape[1]))
    folder = args.work / name
    g = torch.Generator().manual_seed(1)
    inputs = KINDS[case["kind"]].inputs(case, g)
    if not (folder / "model.safetensors").exists():
        export(model, case, folder)
        for key, t in inputs.items():
            np.save(folder / f"{key}.npy", t.numpy())
    given = [t.cuda() for t in inputs.values()]
    if case["kind"] in ("gpt2", "llama"):
        given = given[:1]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result = {"model": name, "shape": case["shape"], "precision": precision, "runs": args.runs}
    with torch.inference_mode():
        want = model(*given).float().cpu().numpy()
        dtype = DTYPES[precision]
        model = model.to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        gc.collect()
        torch.cuda.empty_cache()
        modes = {"compile": "default", "graphs": "reduce-overhead", "autotune": "max-autotune"}
        peers = {}
        for peer in args.peers.split(","):
            # Each mode compiles anew, of an instance of its own.
            peers[peer] = model if peer == "eager" else torch.compile(model, mode=modes[peer], dynamic=False)
        for peer, run in peers.items():
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                got = run(*given).float().cpu().numpy()
            result[peer] = {"error": error(got, want), "ms": []}
            run(*given)
            torch.cuda.reset_peak_memory_stats()
            run(*given)
            result[peer]["peak_bytes"] = torch.cuda.max_memory_allocated()
        out = folder / f"out-{precision}"
        ran = tw(args, "run", folder, inputs, precision, ["--output", str(out)])
        got = np.load(out / "last_hidden_state.npy")
        result["tw"] = {"error": error(got, want), "ms": [], "host_steps": ran["host_steps"]}
        for _ in range(args.rounds):
            for peer, run in peers.items():
                result[peer]["ms"].append(median_ms(lambda: run(*given), args.runs))
            bench = tw(args, "bench", folder, inputs, precision, ["--runs", str(args.runs)])
            result["tw"]["ms"].append(bench["median_ms"])
            result["tw"] |= {k: bench[k] for k in ("memory_bytes", "weight_bytes", "arena_bytes", "launches", "graphs")}
    # The fastest round of each side: right after compiling, PyTorch's helpers still take the host's time.
    ours = min(result["tw"]["ms"])
    line = f"{name} {precision}: tw {ours:.3f} ms (error {result['tw']['error']:.1e}, {result['tw']['memory_bytes'] / 1e6:.0f} MB, {len(result['tw']['host_steps'])} host steps)"
    for peer in peers:
        ms = min(result[peer]["ms"])
        line += f"; {peer} {ms:.3f} ms ({ms / ours:.2f}x, error {result[peer]['error']:.1e}, {result[peer]['peak_bytes'] / 1e6:.0f} MB)"
    print(line, flush=True)
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", default=list(CASES))
    p.add_argument("--tw", default="tw")
    p.add_argument("--work", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "tw-models")
    p.add_argument("--precisions", default="bf16")
    p.add_argument("--runs", type=int, default=50)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--peers", default="eager,compile,graphs")
    p.add_argument("--json", type=pathlib.Path)
    args = p.parse_args()
    results = []
    for name in args.models:
        for precision in args.precisions.split(","):
            try:
                results.append(measure(args, name, precision))
            except Exception as e:  # The other models are measured all the same.
                print(f"{name} {precision}: failed: {e}", flush=True)
                results.append({"model": name, "precision": precision, "failed": str(e)})
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            if args.json:
                args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
