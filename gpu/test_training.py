#!/usr/bin/env python3
"""Training under `torch.compile(backend="tilewright")` on a GPU: losses of several steps beside eager PyTorch's, launched kernel by
kernel and as recorded graphs; how many groups there are; dropout; graphs that were kept.

    gpu/test_training.py [bert | gpt2 | llama | vit | whole | whole-bert | whole-gpt2 | whole-llama | whole-vit | dropout]...
"""

import copy
import functools
import gc
import os
import sys
import tempfile
import time

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="tilewright-training-"))

import torch
import transformers
from torch._dynamo.utils import counters

from tilewright.pytorch import backend
from tilewright.pytorch.group import PROGRAMS, Group

transformers.logging.set_verbosity_error()
MODES = (None, "reduce-overhead")


def bert(dropout=0.0):
    config = transformers.BertConfig(num_hidden_layers=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)
    return transformers.BertModel(config), torch.randint(0, 30522, (8, 128), device="cuda")


def gpt2():
    config = transformers.GPT2Config(n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return transformers.GPT2LMHeadModel(config), torch.randint(0, 50257, (2, 256), device="cuda")


def llama():
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, vocab_size=32000)
    config = transformers.LlamaConfig(num_hidden_layers=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config), torch.randint(0, 32000, (1, 512), device="cuda")


def vit():
    import torchvision

    sizes = dict(image_size=64, patch_size=16, num_heads=4, hidden_dim=256, mlp_dim=512, num_classes=100)
    model = torchvision.models.VisionTransformer(num_layers=2, **sizes)
    # Its own are zeros, with which nothing has a gradient.
    torch.nn.init.normal_(model.heads[0].weight, std=0.05)
    return model, torch.randn(8, 3, 64, 64, device="cuda")


def loss_of(model, run, ids):
    if hasattr(model, "lm_head"):
        return run(ids, labels=ids).loss
    if hasattr(model, "heads"):
        out = run(ids.to(model.heads[0].weight.dtype)).float()
        return torch.nn.functional.cross_entropy(out, torch.arange(len(out), device="cuda"))
    out = run(ids)[0].float()
    return (out * torch.linspace(-1, 1, out.shape[-1], device="cuda")).mean() + out.square().mean()


def steps(model, ids, mode, count=6, seed=None):
    """Losses of `count` steps of a copy of the model, how often AOTAutograd's cache was hit, the seconds of the first step, and how many
    programs there are that this process planned and that it read."""
    torch._dynamo.reset()
    counters.clear()
    # As in another process: what is shared here is forgotten.
    PROGRAMS.clear()
    before = {id(o) for o in gc.get_objects() if type(o) is Group}
    model = copy.deepcopy(model)
    run = model if mode == "eager" else torch.compile(model, backend=backend.tilewright_backend, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses, start, first = [], time.perf_counter(), 0.0
    for step in range(count):
        if seed is not None:
            torch.manual_seed(seed[step])
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(model, run, ids)
        loss.backward()
        if seed is None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        first = first or time.perf_counter() - start
    groups = [o for o in gc.get_objects() if type(o) is Group and id(o) not in before and o.program is not None]
    read = len({id(g.program) for g in groups if g.program.kept})
    planned = len({id(g.program) for g in groups if not g.program.kept})
    return losses, counters["aot_autograd"]["autograd_cache_hit"], first, (planned, read)


def training(make):
    torch.manual_seed(0)
    model, ids = make()
    model = model.cuda().train()
    exact, *_ = steps(model, ids, "eager")
    model = model.bfloat16()
    eager, *_ = steps(model, ids, "eager")
    budget = 3 * max(abs(a - b) for a, b in zip(eager, exact)) + 2e-3 * abs(exact[0])
    for mode in MODES:
        for again in (False, True):
            losses, hits, first, (planned, read) = steps(model, ids, mode)
            off = max(abs(a - b) for a, b in zip(losses, exact))
            said = f"{losses[0]:.4f} to {losses[-1]:.4f}, eager {eager[-1]:.4f}, off by {off:.1e}"
            print(f"{make.__name__} {mode}{' again' if again else ''}: first step {first:.2f} s, {planned} programs planned, {read} read, {said}", flush=True)
            assert off <= budget, (losses, exact, budget)
            assert losses[-1] < losses[0]
            assert (hits > 0) is again, "the second time the graphs are those that were kept"
            assert (read > 0, planned > 0) == (again, not again), "and so are the programs"


def whole(makes):
    """Attention does not cut a model: one group forward, and one backward but for what follows the gradient of an embedding."""
    for make in makes:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, given = make()
        model = model.cuda().bfloat16().train()
        seen = []
        backend.OBSERVERS.append(seen.append)
        try:
            run = torch.compile(model, backend=backend.tilewright_backend)
            loss_of(model, run, given).backward()
        finally:
            backend.OBSERVERS.remove(seen.append)
        left = sorted({str(n.target) for g in seen for n in g.reasons if "getitem" not in str(n.target)})
        print(f"{make.__name__}: groups {[(g.kind, len(g.groups)) for g in seen]}, left to PyTorch {left}", flush=True)
        # Where the loss is a graph of its own (GPT-2's), there are two of each.
        assert {g.kind for g in seen} == {"forward", "backward"}
        assert all(len(g.groups) <= (1 if g.kind == "forward" else 2) for g in seen)
        assert not any("attention" in name for name in left)
        assert all(g.program is not None for c in seen for g in c.groups), [g.failure for c in seen for g in c.groups]


def dropout():
    torch.manual_seed(0)
    model, ids = bert(0.1)
    model = model.cuda().bfloat16().train()
    found = [steps(model, ids, mode, seed=(1, 2, 1, 3, 2, 1))[0] for mode in MODES]
    for losses in found:
        a, b, c, d, e, f = losses
        assert a == c == f and b == e, losses
        assert len({a, b, d}) == 3, losses
    assert found[0] == found[1], "recorded graphs draw the same"
    print("dropout:", [f"{x:.6f}" for x in found[0]], flush=True)


if __name__ == "__main__":
    models = (bert, gpt2, llama, vit)
    cases = {make.__name__: functools.partial(training, make) for make in models} | {"whole": functools.partial(whole, models), "dropout": dropout}
    parts = {f"whole-{make.__name__}": functools.partial(whole, (make,)) for make in models}
    for name in sys.argv[1:] or cases:
        (cases | parts)[name]()
        print(f"ok: {name}", flush=True)
