#!/usr/bin/env python3
"""The integration with PyTorch on a GPU: reports, patched models, exported programs, optimizers, bad input.

    gpu/test_torch.py [--device cuda:0] [--only WORD] [--list]

One line per case; exits with 1 when one fails. `--device cpu` runs what a processor can, for those who write the cases. The
models come from tests/python (`TILEWRIGHT_TORCH_PACKAGE` names the package's folder, as there).
"""

import argparse
import copy
import io
import math
import os
import pathlib
import subprocess
import sys
import time
import traceback

here = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent / "tests" / "python"), str(here.parent / "tests")]

from torch_models import bert, compiled, graphs, llama, tilewright, torch, vit  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

F = torch.nn.functional
DEVICE = torch.device("cpu")


def moved(tree):
    return pytree.tree_map(lambda t: t.to(DEVICE) if isinstance(t, torch.Tensor) else t, tree)


def small(make, dtype=torch.float32):
    torch.manual_seed(0)
    model, arguments = make()
    model, arguments = model.to(DEVICE, dtype).eval(), moved(arguments)
    return model, {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


# ---- reports -----------------------------------------------------------------------------------------


def explain_names_kernels_and_ceilings():
    model, arguments = small(bert, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    with torch.no_grad():
        found = tilewright.explain(model, runs=3, **arguments)
    steps = [s for g in found.groups for s in g.steps]
    assert steps and all(s.least > 0 and s.roof in ("compute", "memory", "launch") and s.fraction > 0 for s in steps)
    assert found.fallback_share < 0.02 and not found.graph_breaks, str(found)
    page = found.html()
    assert page.startswith("<!doctype html>") and all(s.label in page for s in steps)
    return f"{len(steps)} kernels, {100 * found.fallback_share:.1f} % left to PyTorch"


def verify_finds_no_fault_and_names_one():
    from tilewright.pytorch import group as groups_of

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(DEVICE)
    x = torch.randn(16, 64, device=DEVICE)
    found = tilewright.verify(model, x, gradients=True)
    assert found and found.responsible is None, str(found)
    run = groups_of.Group.__call__

    def wrong(self, *args):
        return tuple(r + 0.01 if self.name == "backward_0" else r for r in run(self, *args))

    groups_of.Group.__call__ = wrong
    try:
        torch._dynamo.reset()
        found = tilewright.verify(model, x, gradients=True)
    finally:
        groups_of.Group.__call__ = run
    assert not found and found.responsible.name == "backward_0", str(found)


def verify_of_models():
    for make in (vit, llama):
        model, arguments = small(make)
        torch._dynamo.reset()
        found = tilewright.verify(model, **arguments)
        assert found, f"{make.__name__}: {found}"


# ---- transformers ------------------------------------------------------------------------------------


def patched_families():
    import test_torch_ops as tests

    names = []
    for model, inputs in tests.small_models():
        name = type(model).__name__
        model, inputs = model.to(DEVICE), moved(inputs)
        value, grads = tests.outcome(model, inputs)
        done = tilewright.patch(model)
        patched, patched_grads = tests.outcome(model, inputs)
        torch.testing.assert_close(patched, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(patched_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        done.undo()
        again, _ = tests.outcome(model, inputs)
        assert torch.equal(again, value), f"{name} is not what it was"
        names.append(name)
    return ", ".join(names)


def attention_implementation_in_bfloat16():
    import test_torch_ops as tests
    from tilewright import patching

    patching.register_attention()
    if DEVICE.type == "cpu":
        return "for GPUs"
    for model, inputs in tests.small_models():
        name = type(model).__name__
        model, inputs = model.to(DEVICE, torch.bfloat16).eval(), moved(inputs)
        inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        want, want_grads = tests.outcome(model, inputs)
        model.set_attn_implementation("tilewright")
        got, grads = tests.outcome(model, inputs)
        torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2, msg=lambda m, n=name: f"{n}: {m}")
        size = sum(g.double().square().sum() for g in want_grads).sqrt()
        far = sum((a.double() - b.double()).square().sum() for a, b in zip(grads, want_grads, strict=True)).sqrt()
        assert far < 0.08 * size, f"{name}: gradients differ by {float(far / size):.3f}"


# ---- programs and files ------------------------------------------------------------------------------


def exported_programs_and_files():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 5))
    model = model.eval().to(DEVICE)
    example = torch.randn(2, 3, 10, 10, device=DEVICE)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (tilewright.compile(exported), tilewright.compile(torch.export.load(file))):
        with torch.no_grad():
            for n in (1, 2, 7):
                x = torch.randn(n, 3, 10, 10, device=DEVICE)
                torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
        elsewhere = torch.device("cpu") if DEVICE.type == "cuda" else torch.device("meta")
        for wrong in (torch.randn(2, 3, 10, 10, device=elsewhere), torch.randn(2, 3, 10, device=DEVICE), "text"):
            refused(lambda: program(wrong), (ValueError, TypeError, RuntimeError))


def a_file_of_pt2():
    import tempfile

    model, arguments = small(vit)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "vit.pt2")
        torch.export.save(torch.export.export(model, (), arguments), path)
        program = tilewright.compile(torch.export.load(path))
    with torch.no_grad():
        torch.testing.assert_close(program(**arguments), model(**arguments), rtol=1e-4, atol=1e-4)


def a_model_file_on_the_device():
    demo = here.parent / "demo" / "digits"
    if DEVICE.type == "cpu" or not demo.exists():
        return "no GPU, or no model"
    import numpy as np

    images, labels = np.load(demo / "test_images.npy"), np.load(demo / "test_labels.npy")
    model = tilewright.load(demo / "digits.onnx", device=str(DEVICE))
    for count in (1, 7, len(images)):
        found = model(images[:count])
    right = (found.argmax(-1) == labels[: len(images)]).mean()
    assert right > 0.9, f"{right:.3f} of the digits are known"
    for wrong in (images.astype(np.float64), images[0], images[:, :-1]):
        refused(lambda: model(wrong), ValueError)
    return f"{100 * right:.1f} % of the digits are known"


# ---- optimizers --------------------------------------------------------------------------------------


def optimizers_under_a_scaler():
    from tilewright import optim

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.LayerNorm(33), torch.nn.Linear(33, 5)).to(DEVICE)

    def fill(model, step, scale=1.0):
        generator = torch.Generator().manual_seed(100 + step)
        for p in model.parameters():
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(DEVICE)

    for options in ({}, {"amsgrad": True, "betas": (0.8, 0.5)}, {"max_norm": 0.5}):
        mine, plain = net(), net()
        theirs = {k: v for k, v in options.items() if k != "max_norm"}
        a, b = optim.AdamW(mine.parameters(), lr=1e-2, **options), torch.optim.AdamW(plain.parameters(), lr=1e-2, **theirs)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        scaler.scale(torch.ones((), device=DEVICE))
        for step in range(6):
            before = [p.detach().clone() for p in mine.parameters()]
            fill(mine, step, scaler.get_scale())
            if step in (0, 3):
                mine[0].weight.grad[2, 3] = math.inf if step else math.nan
            else:
                fill(plain, step)
                if "max_norm" in options:
                    torch.nn.utils.clip_grad_norm_(plain.parameters(), options["max_norm"])
                b.step()
            mode = torch.cuda.get_sync_debug_mode() if DEVICE.type == "cuda" else None
            if mode is not None:
                torch.cuda.set_sync_debug_mode("error")  # A step that waits for the device raises.
            try:
                scaler.step(a)
            finally:
                if mode is not None:
                    torch.cuda.set_sync_debug_mode(mode)
            if step in (0, 3):
                assert all(map(torch.equal, before, mine.parameters())), "a step over infinities changed something"
            scaler.update()
        assert scaler.get_scale() == 256.0
        for p, q in zip(mine.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
        assert a.state[mine[0].weight]["step"].item() == 4


# ---- bad and odd input -------------------------------------------------------------------------------


def refused(call, errors=(RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)):
    try:
        call()
    except errors:
        return
    raise AssertionError("not refused")


def odd_tensors_in_compiled_models():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16)).eval().to(DEVICE)

    def made(*shape):
        return torch.randn(*shape, device=DEVICE)

    poisoned = made(6, 8)
    poisoned[1, 3], poisoned[2, 0] = float("nan"), float("inf")
    odd = {
        "a transposed view": made(8, 6).t(),
        "every second row": made(12, 8)[::2],
        "one row, repeated": made(1, 8).expand(6, 8),
        "an odd address": made(6 * 8 + 1)[1:].view(6, 8),
        "NaN and infinity": poisoned,
    }
    with graphs(), torch.no_grad():
        run = compiled(model)
        for name, value in odd.items():
            torch.testing.assert_close(run(value), model(value), equal_nan=True, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert run(made(0, 8)).shape == (0, 16)
        wrong = [made(3, 8).double(), made(3, 8).int(), made(3, 7), torch.randn(3, 8, device="meta"), "text"]
        if DEVICE.type == "cuda":
            wrong.append(torch.randn(3, 8))
        for value in wrong:
            refused(lambda: run(value), Exception)
            refused(lambda: model(value), Exception)
        torch.testing.assert_close(run(made(6, 8) * 0), model(made(6, 8) * 0))
    with graphs(), torch.inference_mode():
        x = made(6, 8)
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)


def sparse_and_complex_tensors_stay_pytorchs():
    with graphs(), torch.no_grad():
        x = torch.randn(4, 4, device=DEVICE, dtype=torch.complex64)
        torch.testing.assert_close(compiled(lambda x: (x * 2).real + x.imag)(x), (x * 2).real + x.imag)
    with graphs(), torch.no_grad():
        dense = torch.eye(4, device=DEVICE)
        sparse = dense.to_sparse()
        torch.testing.assert_close(compiled(lambda s, d: torch.sparse.mm(s, d) + 1)(sparse, dense), dense + 1)


def writes_to_inputs_and_views():
    def writes(x, y):
        x.mul_(2)
        part = y[1:, :2]
        part.add_(x[1:, :2])
        return x.t(), part, y * 2, x

    a, b = torch.randn(4, 5, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    mine, theirs = (a.clone(), b.clone()), (a.clone(), b.clone())
    with graphs():
        results, expected = compiled(writes)(*mine), writes(*theirs)
    for got, want in zip((*results, *mine), (*expected, *theirs)):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def odd_tensors_in_the_pack():
    from tilewright import ops

    x, w = torch.randn(6, 64, device=DEVICE), torch.randn(64, device=DEVICE)
    with torch.inference_mode():
        y = torch.randn(6, 64, device=DEVICE)
        torch.testing.assert_close(ops.softmax(y), torch.softmax(y, -1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ops.rms_norm(y, w), F.rms_norm(y, (64,), w, 1e-6), rtol=1e-4, atol=1e-5)
    for value in (x.to_sparse(), x.to(torch.complex64), x.long(), x.bool()):
        refused(lambda: ops.softmax(value))
        refused(lambda: ops.rms_norm(value, w))
        refused(lambda: ops.swiglu(value, value))
    if DEVICE.type == "cuda":
        for call in (
            lambda: ops.rms_norm(x, w.cpu()), lambda: ops.swiglu(x, x.cpu()), lambda: ops.linear(x, x.cpu()),
            lambda: ops.cross_entropy(x, torch.zeros(6, dtype=torch.int64)), lambda: ops.attention(x[None, None], x[None, None].cpu(), x[None, None]),
            lambda: ops.dropout(x, 0.1, residual=x.cpu()),
        ):  # fmt: skip
            refused(call)
    for shape in ((0, 64), (3, 0, 64)):
        z = torch.randn(shape, device=DEVICE, requires_grad=True)
        for call in (lambda: ops.softmax(z), lambda: ops.rms_norm(z, w), lambda: ops.layer_norm(z, w, w), lambda: ops.swiglu(z, z), lambda: ops.gelu(z), lambda: ops.dropout(z, 0.5)):
            got = call()
            assert got.shape == z.shape
            got.sum().backward()
            assert z.grad.shape == z.shape
    # A view that is written to afterwards: autograd notices, as for PyTorch's own.
    z = torch.randn(6, 64, device=DEVICE, requires_grad=True)
    h = z * 1
    y = ops.rms_norm(h, w)
    h[0].mul_(2)
    refused(lambda: y.sum().backward(), RuntimeError)


def many_sizes_one_plan():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).to(DEVICE).eval()
    with graphs() as seen, torch.no_grad():
        run = compiled(model, dynamic=True)
        for n in (4, 9, 33, 257):
            x = torch.randn(n, 32, device=DEVICE)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 1, f"compiled {len(seen)} times"


def copies_of_models_and_threads():
    """A model that is compiled, copied, and used by two threads."""
    import threading

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU()).to(DEVICE).eval()
    other = copy.deepcopy(model)
    x = torch.randn(16, 32, device=DEVICE)
    wrong = []

    def work(run, model):
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-5):
                    wrong.append(1)

    with graphs(), torch.no_grad():
        pairs = [(compiled(m), m) for m in (model, other)]
        for run, m in pairs:
            run(x)
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


def kernels_are_compiled_beside_the_rest():
    """Backward graphs are planned before they run, a capture beside the compilation of their kernels holds, and so does an early end."""
    if DEVICE.type != "cuda":
        return "on GPUs only"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.GELU(), torch.nn.LayerNorm(160), torch.nn.Linear(160, 96)).to(DEVICE)
    x = torch.randn(37, 96, device=DEVICE)
    # Nothing that an earlier run kept.
    ours = compiled(model, options={"cache": False})
    held = ours(x)
    y = torch.randn(1 << 20, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = y * 2
    graph.replay()
    assert torch.equal(z, y * 2)
    held.square().mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    for a, b in zip(found, model.parameters()):
        torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-6)
    program = """
import torch
from tilewright.pytorch.backend import tilewright_backend
m = torch.nn.Sequential(torch.nn.Linear(96, 224), torch.nn.GELU(), torch.nn.LayerNorm(224)).cuda()
print(float(torch.compile(m, backend=tilewright_backend, options={"cache": False})(torch.randn(41, 96, device="cuda")).sum()) < 1e9)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout.strip()) == (0, "True"), ended.stderr[-2000:]
    return ""


CASES = [
    explain_names_kernels_and_ceilings,
    verify_finds_no_fault_and_names_one,
    verify_of_models,
    patched_families,
    attention_implementation_in_bfloat16,
    exported_programs_and_files,
    a_file_of_pt2,
    a_model_file_on_the_device,
    optimizers_under_a_scaler,
    odd_tensors_in_compiled_models,
    sparse_and_complex_tensors_stay_pytorchs,
    writes_to_inputs_and_views,
    odd_tensors_in_the_pack,
    many_sizes_one_plan,
    copies_of_models_and_threads,
    kernels_are_compiled_beside_the_rest,
]


def main():
    global DEVICE
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if given.list:
        print("\n".join(case.__name__ for case in CASES))
        return
    DEVICE = torch.device(given.device)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bad = 0
    for case in CASES:
        if given.only not in case.__name__:
            continue
        start = time.perf_counter()
        try:
            said = case() or ""
            print(f"ok  {case.__name__} [{time.perf_counter() - start:.1f} s] {said}", flush=True)
        except Exception as error:  # noqa: BLE001
            bad += 1
            print(f"BAD {case.__name__} [{time.perf_counter() - start:.1f} s] {type(error).__name__}: {str(error)[:600]}", flush=True)
            traceback.print_exc(limit=-4)
    print(f"{bad} bad")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
