#!/usr/bin/env python3
"""Decoding step by step on a GPU beside PyTorch: Llama sizes of 1B and 8B, bf16, random weights, one sequence or several.

    python gpu/decode.py --tw bin/tw [--models 1b,8b] [--batch 1,2,4,8,16] [--position 512] [--max-length 1024] [--out record.json]
    python gpu/decode.py --tw bin/tw --check-prompts

PyTorch's step is written by hand and captured in a CUDA graph (no host in the loop, as ours): `eager` calls its operators,
`compiled` has each layer and the head through torch.compile. Keys and values are in a static cache; attention reads
the first `--max-length` positions under a mask (so do static caches of transformers). Times are of whole steps, sampling of
the likeliest token included, eight in a row between two events, medians; ours come from `tw generate --explain` (`launches`: with
`--many-kernels`).
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
}


def config(size):
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", dtype="bfloat16", hidden_act="silu",
                rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072, **SIZES[size])


def ours(tw, size, batch, position, max_length, *more):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config(size)))
        prompt = ",".join(str(i * 37 % 1000 + 1) for i in range(position))
        begin = time.time()
        done = subprocess.run([tw, "--json", "generate", folder, "--device", "cuda", "--random-weights", "1", "--tokens",
                               prompt, "--max-length", str(max_length), "--batch", str(batch), "--explain", *more], capture_output=True, text=True)
        if done.returncode != 0:
            return {"error": done.stdout[-2000:] + done.stderr[-2000:]}
        report = json.loads(done.stdout)
        report["whole_s"] = time.time() - begin
        return report


def peer(size, b, position, max_length, compiled):
    import torch
    import torch.nn.functional as F

    s = config(size)
    h, inner, heads, kv, d = (s[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads",
                                             "num_key_value_heads", "head_dim"))
    weight = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02
    one = lambda: torch.ones(h, device="cuda", dtype=torch.bfloat16)
    layers = [dict(n1=one(), qkv=weight((heads + 2 * kv) * d, h), o=weight(h, heads * d), n2=one(),
                   gate_up=weight(2 * inner, h), down=weight(h, inner),
                   k=torch.zeros(b, kv, max_length, d, device="cuda", dtype=torch.bfloat16),
                   v=torch.zeros(b, kv, max_length, d, device="cuda", dtype=torch.bfloat16))
              for _ in range(s["num_hidden_layers"])]
    table = weight(s["vocab_size"], h)
    head = table if s["tie_word_embeddings"] else weight(s["vocab_size"], h)
    norm = one()
    at = torch.tensor([position], device="cuda")
    token = torch.arange(7, 7 + b, device="cuda")[:, None]
    angles = torch.outer(torch.arange(max_length), 500000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
    cos, sin = angles.cos().cuda().bfloat16(), angles.sin().cuda().bfloat16()
    places = torch.arange(max_length, device="cuda")

    def turn(x, c, si):
        return x * c + torch.cat((-x[..., d // 2:], x[..., : d // 2]), -1) * si

    def layer(x, n1, qkv, o, n2, gate_up, down, k, v, at, c, si, mask):
        y = F.rms_norm(x, (h,), n1, 1e-5)
        q, nk, nv = F.linear(y, qkv).split([heads * d, kv * d, kv * d], -1)
        q = turn(q.view(b, 1, heads, d).transpose(1, 2), c, si)
        nk = turn(nk.view(b, 1, kv, d).transpose(1, 2), c, si)
        k.index_copy_(2, at, nk)
        v.index_copy_(2, at, nv.view(b, 1, kv, d).transpose(1, 2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(b, 1, heads * d), o)
        y = F.rms_norm(x, (h,), n2, 1e-5)
        g, u = F.linear(y, gate_up).split(inner, -1)
        return x + F.linear(F.silu(g) * u, down)

    def last(x):
        return F.linear(F.rms_norm(x, (h,), norm, 1e-5), head).argmax(-1)

    if compiled:
        layer = torch.compile(layer, dynamic=False, fullgraph=True)
        last = torch.compile(last, dynamic=False, fullgraph=True)

    def step():
        x = F.embedding(token, table)
        c, si = cos[at], sin[at]
        mask = (places <= at)[None, None, None]
        for w in layers:
            x = layer(x, w["n1"], w["qkv"], w["o"], w["n2"], w["gate_up"], w["down"], w["k"], w["v"], at, c, si, mask)
        token.copy_(last(x))

    with torch.no_grad():
        begin = time.time()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        ready = time.time() - begin
        times = []
        for _ in range(25):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            for _ in range(8):
                graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1e3 / 8)
    return {"step_us": statistics.median(times[5:]), "fastest_us": min(times[5:]), "ready_s": ready,
            "memory_bytes": torch.cuda.max_memory_allocated(), "torch": torch.__version__}


def check_prompts(tw):
    """Logits behind a prompt, taken token by token, in chunks, and at once through matrix products, each against the whole model
    in float64 within the bound of `tw generate --verify`. Three kinds of decoder, with weights of 16 bits, one and three sequences."""
    small = dict(config("1b"), hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
                 num_key_value_heads=2, head_dim=32, vocab_size=500, max_position_embeddings=512)
    kinds = {
        "llama": {},
        "qwen3": dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
        "mistral, a window of 20": dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=20),
    }
    cases = [(name, more, *case) for name, more in kinds.items() for case in [("bfloat16", 1, 150), ("float16", 1, 97), ("bfloat16", 3, 80)]]
    # Sizes with which a step is one launch.
    one = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, hidden_size=512, intermediate_size=1280)
    cases += [("one launch", one, "bfloat16", *case) for case in [(2, 40), (2, 150), (5, 20), (8, 80), (16, 30)]]
    qwen = dict(one, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    window = dict(one, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=20)
    cases += [("one launch, biases", qwen, "bfloat16", 2, 50), ("one launch, a window of 20", window, "bfloat16", 2, 50)]
    wide = dict(one, num_key_value_heads=1, head_dim=128, intermediate_size=2560, num_hidden_layers=2, tie_word_embeddings=False)
    deep = dict(one, intermediate_size=4096, num_hidden_layers=2)
    cases += [("one launch, deep products", deep, "bfloat16", *case) for case in [(8, 20), (16, 20)]]
    cases += [("one launch, wide heads", wide, "bfloat16", *case) for case in [(2, 100), (3, 20), (16, 70)]]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, more, dtype, batch, length in cases:
            (pathlib.Path(folder) / "config.json").write_text(json.dumps({**small, **more, "dtype": dtype}))
            prompt = ",".join(str((i * i * 37 + i) % 499 + 1) for i in range(length))
            done = subprocess.run([tw, "generate", folder, "--device", "cuda", "--random-weights", "1", "--batch", str(batch),
                                   "--tokens", prompt, "--max-tokens", "1", "--verify"], capture_output=True, text=True)
            failed += done.returncode != 0
            print(f"{name} {dtype} {batch} x {length}: {(done.stdout + done.stderr).strip()}", flush=True)
    sys.exit(failed != 0)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tw", default="bin/tw")
    p.add_argument("--models", default="1b,8b")
    p.add_argument("--batch", default="1", help="numbers of sequences")
    p.add_argument("--position", type=int, default=512)
    p.add_argument("--max-length", type=int, default=1024)
    p.add_argument("--kinds", default="ours,eager,compiled")
    p.add_argument("--out")
    p.add_argument("--peer", help=argparse.SUPPRESS)
    p.add_argument("--check-prompts", action="store_true", help="only compare long prompts with chunks of them")
    a = p.parse_args()
    if a.check_prompts:
        check_prompts(a.tw)
    if a.peer:
        size, batch, kind = a.peer.split(":")
        print(json.dumps(peer(size, int(batch), a.position, a.max_length, kind == "compiled")))
        return
    import torch

    machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    command = " ".join(["gpu/decode.py", *sys.argv[1:]])
    record = {"date": datetime.date.today().isoformat(), "commit": os.environ.get("TILEWRIGHT_COMMIT", "unknown"), "machine": machine,
              "command": command, "batch": a.batch, "position": a.position, "max_length": a.max_length, "models": {}}
    for size, batch in [(size, int(batch)) for size in a.models.split(",") for batch in a.batch.split(",")]:
        found = {"config": config(size)}
        record["models"][size if batch == 1 else f"{size} x {batch}"] = found
        for kind in a.kinds.split(","):
            if kind in ("ours", "launches"):
                more = ["--many-kernels"] if kind == "launches" else []
                found["tilewright" if kind == "ours" else kind] = ours(a.tw, size, batch, a.position, a.max_length, *more)
                continue
            # A process of its own: memory is free again after it.
            done = subprocess.run([sys.executable, __file__, "--peer", f"{size}:{batch}:{kind}", "--position", str(a.position),
                                   "--max-length", str(a.max_length)], capture_output=True, text=True)
            ok = done.returncode == 0
            found[kind] = json.loads(done.stdout.splitlines()[-1]) if ok else {"error": done.stderr[-2000:]}
        mine = found.get("tilewright", {})
        floor, step = (mine.get(k, math.nan) for k in ("floor_us", "step_us"))
        line = [f"{size} x {batch}: ours {step:.0f} us, {batch / step * 1e6:.0f} tokens/s (floor {floor:.0f} us, {100 * floor / step:.0f}%)"]
        line += [f"{k} {found[k].get('step_us', math.nan):.0f} us" for k in ("launches", "eager", "compiled") if k in found]
        print(", ".join(line), flush=True)
        for kind, value in found.items():
            if "error" in value:
                print(kind, value["error"], file=sys.stderr)
    if a.out:
        pathlib.Path(a.out).write_text(json.dumps(record, indent=1) + "\n")


main()
