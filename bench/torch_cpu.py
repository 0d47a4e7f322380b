"""Compare `torch.compile` with this project's backend, with Inductor, and with eager PyTorch on a processor: first calls and steady state.

For each model, in inference and for a training step (forward, sum of squares, backward):

* the first call with empty caches, and the first call of a second process, of each compiler alone in a fresh process: from
  `torch.compile` to the first result, with the imports that this takes. Seconds of the clock, and seconds of processors (of the
  process and all its descendants, such as C++ compilers), which other work on the machine disturbs less;
* the time of later calls: all three in one process, in turns, medians; ratios are medians of the ratios of neighbouring calls.

Results are compared with eager PyTorch before anything is timed. Random weights; sizes are in `MODELS`.

Usage:  python bench/torch_cpu.py [--threads 2] [--seconds 6] [--kinds inference,training] [--parts cold,warm,steady] [--out FILE] [NAME ...]
Inductor needs a C++ compiler. To add a model: a line of `MODELS`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDES = ("tilewright", "inductor")
KINDS = ("inference", "training")
PARTS = ("cold", "warm", "steady")
MIN_SAMPLES = 7
MAX_SAMPLES = 200
# Agreement with eager PyTorch, of the largest magnitude of a result or of a gradient. The exact checks are the tests'.
TOLERANCE = 2e-3


def picture(name, size=224):
    def made(batch):
        import torch
        import torchvision

        return getattr(torchvision.models, name)(), (torch.randn(batch, 3, size, size),), {}

    return made


def text(architecture, length=128, sequences=2, decoder=0, **settings):
    def made(batch):
        import torch
        import transformers

        stem = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
        config = getattr(transformers, f"{stem}Config")(**settings)
        model = getattr(transformers, architecture)(config)
        inputs = {"input_ids": torch.randint(0, config.vocab_size, (sequences, length))}
        if decoder:
            inputs["decoder_input_ids"] = torch.randint(0, config.vocab_size, (sequences, decoder))
        return model, (), inputs if stem == "Bert" else inputs | {"use_cache": False}

    return made


def whisper(batch):
    import torch
    import transformers

    config = transformers.WhisperConfig(encoder_layers=4, decoder_layers=4, d_model=384, encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536)
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.randint(0, 500, (1, 32)), "use_cache": False}
    return transformers.WhisperModel(config), (), inputs


SHARED = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=2000)
# A function of the batch, and the batch in inference and in training.
MODELS = {
    "resnet18": (picture("resnet18"), 1, 2),
    "resnet50": (picture("resnet50"), 1, 2),
    "mobilenet_v3": (picture("mobilenet_v3_large"), 1, 2),
    "efficientnet_b0": (picture("efficientnet_b0"), 1, 2),
    "convnext_tiny": (picture("convnext_tiny"), 1, 2),
    "vit_b": (picture("vit_b_16"), 1, 2),
    "swin_t": (picture("swin_t"), 1, 2),
    "bert": (text("BertModel", hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=2000), 2, 2),
    "bert_base": (text("BertModel", sequences=1), 1, 1),
    "gpt2": (text("GPT2LMHeadModel", n_embd=256, n_layer=4, n_head=4, n_positions=128, vocab_size=2000), 2, 2),
    "llama": (text("LlamaForCausalLM", **SHARED), 2, 2),
    "mistral": (text("MistralForCausalLM", sliding_window=64, **SHARED), 2, 2),
    "qwen2": (text("Qwen2ForCausalLM", **SHARED), 2, 2),
    "t5": (text("T5Model", decoder=32, d_model=256, d_kv=64, d_ff=512, num_layers=4, num_heads=4, vocab_size=2000, decoder_start_token_id=0), 2, 2),
    "whisper_tiny": (whisper, 1, 1),
}


def cpu_seconds() -> float:
    """Processor time of this process and all its descendants."""
    parents, times = {}, {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        times[int(folder.name)] = sum(int(n) for n in fields[11:15])
    total = 0
    for process in times:
        above = process
        while above and above != os.getpid():
            above = parents.get(above, 0)
        total += times[process] if above else 0
    return total / os.sysconf("SC_CLK_TCK")


def without_dropout(model) -> None:
    """Random numbers differ between the sides."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def made(name: str, kind: str):
    import torch

    torch.manual_seed(0)
    build, *batches = MODELS[name]
    model, args, kwargs = build(batches[KINDS.index(kind)])
    without_dropout(model)
    return model.train(kind == "training"), args, kwargs


def first_of(result):
    import torch

    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


def step_of(call, model, kind, args, kwargs):
    """One call: the result, and in training the gradients of all parameters."""
    import torch

    if kind == "inference":

        def inference():
            with torch.no_grad():
                return [first_of(call(*args, **kwargs))]

        return inference

    def training():
        for parameter in model.parameters():
            parameter.grad = None
        result = first_of(call(*args, **kwargs))
        result.square().mean().backward()
        # Where nothing depends on a parameter, eager PyTorch has no gradient and compiled graphs have zeros.
        return [result.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]

    return training


def compiled(model, side: str):
    import torch

    if side == "inductor":
        return torch.compile(model)
    from tilewright.pytorch.backend import tilewright_backend

    return torch.compile(model, backend=tilewright_backend)


def first_call(name: str, kind: str, side: str) -> dict:
    model, args, kwargs = made(name, kind)
    step_of(model, model, kind, args, kwargs)()
    clock, cpu = time.perf_counter(), cpu_seconds()
    step_of(compiled(model, side), model, kind, args, kwargs)()
    return {"s": round(time.perf_counter() - clock, 2), "cpu_s": round(cpu_seconds() - cpu, 2)}


def difference(found, expected) -> float:
    """The largest difference of a result and of all gradients, each of its largest magnitude."""
    worst = 0.0
    scales = [float(e.abs().max()) for e in expected]
    # Gradients that are zero but for rounding have no scale of their own.
    floor = max(scales[1:], default=0.0) * 1e-2
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        scale = max(scales[number], floor if number else 0.0, 1e-30)
        worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def steady(name: str, kind: str, seconds: float) -> dict:
    model, args, kwargs = made(name, kind)
    arms = {"eager": step_of(model, model, kind, args, kwargs)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected, row = arms["eager"](), {}
    for side in SIDES:
        call = step_of(compiled(model, side), model, kind, args, kwargs)
        # Running statistics go on with each call.
        model.load_state_dict(state)
        off = difference(call(), expected)
        row[f"{side}_difference"] = float(f"{off:.2g}")
        if off <= TOLERANCE:
            arms[side] = call
    for call in arms.values():
        call()
        call()
    samples = {arm: [] for arm in arms}
    order, end = list(arms), time.monotonic() + seconds
    while len(samples["eager"]) < MIN_SAMPLES or (time.monotonic() < end and len(samples["eager"]) < MAX_SAMPLES):
        for arm in order:
            clock, cpu = time.perf_counter(), time.process_time()
            arms[arm]()
            samples[arm].append((time.perf_counter() - clock, time.process_time() - cpu))
        order.reverse()
    row["n_samples"] = len(samples["eager"])
    for arm, pairs in samples.items():
        row[f"{arm}_ms"] = float(f"{1e3 * statistics.median(p[0] for p in pairs):.4g}")
        row[f"{arm}_cpu_ms"] = float(f"{1e3 * statistics.median(p[1] for p in pairs):.4g}")
    for other in ("inductor", "eager"):
        if "tilewright" in samples and other in samples:
            for i, what in enumerate(("ratio", "cpu_ratio")):
                ratios = [a[i] / b[i] for a, b in zip(samples["tilewright"], samples[other]) if b[i] > 0]
                row[f"{what}_{other}"] = [round(v, 3) for v in statistics.quantiles(ratios, n=4, method="inclusive")]
    return row


def child(arguments, *words, **environment) -> dict:
    """A measurement in a process of its own: what its last line says."""
    call = [sys.executable, __file__, "--threads", str(arguments.threads), "--seconds", str(arguments.seconds), "--child", *words]
    done = subprocess.run(call, env={**os.environ, **environment}, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr or done.stdout).strip()[-1500:]}


def measured(arguments, name: str, kind: str) -> dict:
    row = {"model": name, "kind": kind, "batch": MODELS[name][1 + KINDS.index(kind)]}
    folder = tempfile.mkdtemp(prefix="tilewright-bench-")
    caches = {"TILEWRIGHT_CACHE": f"{folder}/tilewright", "TRITON_CACHE_DIR": f"{folder}/triton"}
    try:
        for side in arguments.sides.split(","):
            # Each with caches of its own: AOTAutograd's is in the same folder for both.
            own = caches | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor-{side}"}
            for part in ("cold", "warm"):
                if part in arguments.parts:
                    row[f"{side}_{part}"] = child(arguments, "first", name, kind, side, **own)
        if "steady" in arguments.parts:
            row |= child(arguments, "steady", name, kind, **caches, TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor-inductor")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def said(row: dict) -> str:
    words = [f"{row['model']:16s} {row['kind']:9s}"]
    for part in ("cold", "warm"):
        pair = [row.get(f"{side}_{part}", {}) for side in SIDES]
        words.append(f"{part} " + " / ".join(f"{p.get('s', float('nan')):.2f} s ({p.get('cpu_s', float('nan')):.2f})" for p in pair))
    if "eager_ms" in row:
        times = [f"{row.get(f'{arm}_ms', float('nan')):.4g} ({row.get(f'{arm}_cpu_ms', float('nan')):.4g})" for arm in ("tilewright", "inductor", "eager")]
        words.append("call ms " + " / ".join(times))
    for other in ("inductor", "eager"):
        if f"ratio_{other}" in row:
            words.append(f"of {other} {row[f'ratio_{other}'][1]:.2f} (cpu {row[f'cpu_ratio_{other}'][1]:.2f})")
    errors = [f"{key}: {value['error']}" for key, value in row.items() if isinstance(value, dict) and "error" in value]
    return "  ".join(words + errors + ([row["error"]] if "error" in row else []))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"which models (default: {', '.join(MODELS)})")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="of sampling per model and kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sides", default=",".join(SIDES), help="whose first calls")
    parser.add_argument("--out", type=pathlib.Path, help="the record, as JSON")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import torch

        torch.set_num_threads(arguments.threads)
        what, *words = arguments.child
        found = first_call(*words) if what == "first" else steady(*words, arguments.seconds)
        print(json.dumps(found))
        return 0
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}; known: {', '.join(MODELS)}")
    sys.path.insert(0, str(ROOT / "tests" / "python"))
    import torch_package

    torch_package.install()
    os.environ["PYTHONPATH"] = sys.path[0]
    from cpu_peers import commit, machine

    rows = []
    for name in arguments.names or MODELS:
        for kind in arguments.kinds.split(","):
            rows.append(measured(arguments, name, kind))
            print(said(rows[-1]), flush=True)
            if arguments.out:
                record = {"date": datetime.date.today().isoformat(), "commit": commit(), "machine": machine(), "threads": arguments.threads, "rows": rows}
                arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in str(row) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
