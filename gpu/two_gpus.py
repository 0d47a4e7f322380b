#!/usr/bin/env python3
"""Several GPUs in one process: operators, compiled models, training and optimizers on a device that is not the current one.

    gpu/two_gpus.py [--one]

Needs two GPUs of one process, with PyTorch (CUDA), transformers and torchvision beside this package (TILEWRIGHT_TORCH_PACKAGE names
the folder that holds it); nothing is fetched, and 30 to 60 seconds are enough, most of which is the first compilation of kernels. One
line per case; exits with 1 when one fails. Expected: `0 bad`. With `--one` the first GPU stands in for both, which tries the script
itself.
"""

import pathlib
import sys
import time
import traceback

here = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent / "tests" / "python"), str(here.parent / "tests")]

from torch_models import bert, compiled, graphs, tilewright, torch  # noqa: E402

from tilewright import ops, optim  # noqa: E402

F = torch.nn.functional
ONE = "--one" in sys.argv
DEVICES = [torch.device("cuda", 0 if ONE else i) for i in range(2)]
FIRST, SECOND = map(str, DEVICES)


def operators_run_where_their_tensors_are():
    for current in DEVICES:
        with torch.cuda.device(current):
            for device in DEVICES:
                x = torch.randn(64, 256, device=device, requires_grad=True)
                w = torch.randn(256, device=device, requires_grad=True)
                for ours, theirs in (
                    (lambda: ops.rms_norm(x, w), lambda: F.rms_norm(x, (256,), w, 1e-6)),
                    (lambda: ops.softmax(x), lambda: torch.softmax(x, -1)),
                    (lambda: ops.swiglu(x, x + 1), lambda: F.silu(x) * (x + 1)),
                    (lambda: ops.linear(x, x, None), lambda: F.linear(x, x)),
                ):
                    got, want = ours(), theirs()
                    assert got.device == device
                    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
                    a, b = torch.autograd.grad(got.square().sum(), x), torch.autograd.grad(want.square().sum(), x)
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
                y = ops.dropout(x, 0.5)
                assert y.device == device and 0.4 < (y == 0).float().mean().item() < 0.6
            assert torch.cuda.current_device() == current.index, "the current device was changed"


def operators_take_the_stream_of_their_device():
    with torch.cuda.device(FIRST):
        stream = torch.cuda.Stream(device=SECOND)
        big = torch.randn(4096, 4096, device=SECOND)
        torch.cuda.synchronize(SECOND)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            big.mul_(0).add_(2)
            y = ops.rms_norm(big)
        stream.synchronize()
        torch.testing.assert_close(y, torch.ones_like(y), rtol=1e-4, atol=1e-4)


def tensors_of_two_devices_are_refused():
    x, w = torch.randn(8, 64, device=FIRST), torch.randn(64, device=SECOND)
    for call in (lambda: ops.rms_norm(x, w), lambda: ops.swiglu(x, x.to(SECOND)), lambda: ops.linear(x, x.to(SECOND))):
        try:
            call()
        except RuntimeError as error:
            assert "cuda" in str(error).lower(), error
        else:
            raise AssertionError("not refused")


def models_on_either_device():
    for current in DEVICES:
        with torch.cuda.device(current):
            for device in DEVICES:
                torch.manual_seed(0)
                model, arguments = bert()
                model = model.to(device).eval()
                arguments = {k: v.to(device) for k, v in arguments.items()}
                with graphs() as seen, torch.no_grad():
                    run = compiled(model)
                    for _ in range(3):  # The third is a replay.
                        got = run(**arguments)[0]
                    torch.testing.assert_close(got, model(**arguments)[0], rtol=1e-3, atol=1e-4)
                assert got.device == device and not any(g.failure for s in seen for g in s.groups)


def one_process_trains_on_both():
    def made(device):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128), torch.nn.Linear(128, 8)).to(device)

    results = []
    for device in DEVICES:
        model = made(device)
        optimizer = optim.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
        generator = torch.Generator().manual_seed(1)
        with graphs():
            run = compiled(model)
            for _ in range(4):
                x = torch.randn(32, 64, generator=generator).to(device)
                optimizer.zero_grad()
                run(x).square().mean().backward()
                optimizer.step()
        results.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def a_model_over_both_devices():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 64).to(FIRST), torch.nn.Linear(64, 8).to(SECOND)

    def run(x):
        return second(ops.gelu(first(x)).to(SECOND))

    parameters = [*first.parameters(), *second.parameters()]
    optimizer = optim.AdamW(parameters, lr=1e-2, max_norm=0.1)
    twins = [p.detach().clone().requires_grad_() for p in parameters]
    other = torch.optim.AdamW(twins, lr=1e-2)
    x = torch.randn(16, 64, device=FIRST)
    with graphs():
        fast = compiled(run)
        for _ in range(3):
            optimizer.zero_grad()
            loss = fast(x).square().mean()
            loss.backward()
            for p, q in zip(parameters, twins):
                q.grad = p.grad.clone()
            norm = torch.stack([q.grad.norm().cpu() for q in twins]).norm()
            factor = min(1.0, 0.1 / (norm.item() + 1e-6))
            for q in twins:
                q.grad.mul_(factor)
            other.step()
            optimizer.step()
            torch.testing.assert_close(optimizer.grad_norm.cpu(), norm, rtol=1e-4, atol=1e-6)
    for p, q in zip(parameters, twins):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        report = tilewright.explain(run, x)
    assert report.groups


CASES = [
    operators_run_where_their_tensors_are,
    operators_take_the_stream_of_their_device,
    tensors_of_two_devices_are_refused,
    models_on_either_device,
    one_process_trains_on_both,
    a_model_over_both_devices,
]


def main():
    if torch.cuda.device_count() < 2 and not ONE:
        raise SystemExit("two GPUs are needed")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bad = 0
    for case in CASES:
        if ONE and case is tensors_of_two_devices_are_refused:
            continue
        start = time.perf_counter()
        try:
            case()
            for device in DEVICES:
                torch.cuda.synchronize(device)
            print(f"ok  {case.__name__} [{time.perf_counter() - start:.1f} s]", flush=True)
        except Exception as error:  # noqa: BLE001
            bad += 1
            print(f"BAD {case.__name__} [{time.perf_counter() - start:.1f} s] {type(error).__name__}: {str(error)[:600]}", flush=True)
            traceback.print_exc(limit=-5)
    print(f"{bad} bad")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
