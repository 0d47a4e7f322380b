"""Bad and odd input: every operator of the pack, the optimizers and a compiled model, with each of their tensors replaced in turn.

    python tests/python/test_torch_bad_input.py [cuda] [--jobs N]

With --jobs, so many processes share the operators and the other tests: on a GPU most of the time is compilation. An operator refuses a tensor in words, or gives what PyTorch gives in float64. That the process lives to the end is part of the test.
"""

import subprocess
import sys
import time

from torch_package import install

install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import tilewright  # noqa: E402, F401
from tilewright import ops, optim  # noqa: E402
from tilewright.pytorch import backend  # noqa: E402

DEVICE = "cuda" if "cuda" in sys.argv else "cpu"
# AttributeError: what Python says to something that is no tensor, in PyTorch's own functions as well.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError)
NO_TENSORS = ("no tensor", "text", "a list", "NumPy")


def rms(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def attended(q, k, v):
    """PyTorch's fused form on processors gives 0 for a query that is not a number."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


# Ours, PyTorch's, shapes of tensors; a shape in a list is that of whole numbers below 6.
CASES = {
    "rms_norm": (ops.rms_norm, rms, (4, 6), (6,)),
    "rms_norm, residual": (lambda x, w, r: ops.rms_norm(x, w, residual=r)[0], lambda x, w, r: rms(x + r, w), (4, 6), (6,), (4, 6)),
    "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (6,), w, b), (4, 6), (6,), (6,)),
    "softmax": (ops.softmax, lambda x: torch.softmax(x, -1), (4, 6)),
    "gelu": (ops.gelu, F.gelu, (4, 6)),
    "swiglu": (ops.swiglu, lambda a, b: F.silu(a) * b, (4, 6), (4, 6)),
    "a formula of three": (ops.elementwise("a * b + tanh(c)"), lambda a, b, c: a * b + torch.tanh(c), (4, 6), (4, 6), (4, 6)),
    "cross_entropy": (ops.cross_entropy, F.cross_entropy, (4, 6), [4]),
    "linear_cross_entropy": (ops.linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w), t), (4, 8), (6, 8), [4]),
    "rotary": (ops.rotary, rotated, (2, 3, 5, 4), (2, 5, 4), (2, 5, 4)),
    "linear": (ops.linear, F.linear, (4, 8), (6, 8), (6,)),
    "attention": (ops.attention, attended, (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
    "dropout of nothing": (lambda x, r: ops.dropout(x, 0.0, residual=r), lambda x, r: x + r, (4, 6), (4, 6)),
    "embedding_bag": (lambda w, i: ops.embedding_bag(i, w), lambda w, i: F.embedding_bag(i, w), (6, 8), [(3, 4)]),
}


def with_value(t, value):
    t = t.clone()
    t.view(-1)[1 % t.numel()] = value
    return t


WRONGS = {
    "integers": lambda t: t.long(),
    "truth values": lambda t: t > 0,
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "float64": lambda t: t.double(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "another device": lambda t: t.to("meta" if DEVICE == "cpu" else "cpu"),
    "no axes": lambda t: t.reshape(-1)[0],
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t[0],
    "longer rows": lambda t: torch.cat((t, t[..., :1]), -1),
    "more rows": lambda t: torch.cat((t, t[:1]), 0),
    "no columns": lambda t: t[..., :0],
    "no rows": lambda t: t[:0],
    "memory in another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "one row, repeated": lambda t: t[:1].expand_as(t),
    "one element, repeated": lambda t: t.reshape(-1)[0].expand_as(t),
    "an odd address": lambda t: torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1:].view_as(t),
    "a lazy minus": lambda t: torch._neg_view(t) if t.is_floating_point() else t,
    "NaN": lambda t: with_value(t, float("nan")) if t.is_floating_point() else t,
    "infinity": lambda t: with_value(t, float("inf")) if t.is_floating_point() else t,
    "large numbers": lambda t: t * 1e15 if t.is_floating_point() else t + (1 << 40),
    "numbers below zero": lambda t: -t,
    "no tensor": lambda t: None,
    "text": lambda t: "text",
    "a list": lambda t: t.tolist(),
    "NumPy": lambda t: t.cpu().numpy(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}


def made(shapes):
    generator = torch.Generator().manual_seed(0)
    out = []
    for shape in shapes:
        if isinstance(shape, list):
            out.append(torch.randint(0, 6, shape if isinstance(shape[0], int) else shape[0], generator=generator).to(DEVICE))
        else:
            out.append(torch.randn(shape, generator=generator).to(DEVICE))
    return out


def outcome(function, args):
    try:
        return function(*args)
    except REFUSALS as error:
        assert str(error).strip(), f"{type(error).__name__} without a word"
        return error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def compared(what, got, args, reference):
    """What was not refused is what PyTorch gives in float64."""
    if not isinstance(got, torch.Tensor) or any(a is None for a in args):
        return  # Some tensors may be left out.
    if got.device.type == "meta":
        assert any(isinstance(a, torch.Tensor) and a.device.type == "meta" for a in args), f"{what}: a result without values"
        return
    indices = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.numel()]
    beyond = any(i.min() < 0 or i.max() > 5 for i in indices) or (indices and what == "embedding_bag" and args[0].shape[:1] < (6,))
    if DEVICE == "cuda" and beyond:
        return  # Kernels raise no errors, and PyTorch has no answer.
    # On a processor, where indices out of range do not end the process' use of the device.
    got, args = got.cpu(), [a.cpu() if isinstance(a, torch.Tensor) and a.device.type != "meta" else a for a in args]
    try:
        want = reference(*[wide(a) for a in args])
    except Exception as error:
        if DEVICE == "cuda" and "out of" in str(error):
            return  # Kernels raise no errors.
        # Types that PyTorch does not mix, and rows that it does not take empty.
        empty = any(isinstance(a, torch.Tensor) and a.numel() == 0 for a in (got, *args))
        mixed = any(word in str(error) for word in ("dtype", "same", "expected", "not implemented for"))
        assert empty or mixed, f"{what}: a result of {list(got.shape)}, where PyTorch says {error}"
        return
    assert got.shape == want.shape, f"{what}: {list(got.shape)} instead of {list(want.shape)}"
    if all(a.dtype == torch.float32 for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()):
        # Where float32 is not enough, PyTorch overflows as well.
        with_limits = outcome(reference, args)
        if isinstance(with_limits, Exception):
            return  # The reference takes this in one type and not in another.
        if torch.allclose(got, with_limits, rtol=2e-4, atol=2e-5, equal_nan=True):
            return
    narrow = any(isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, torch.float16) for a in args)
    close = dict(rtol=3e-2, atol=3e-2) if narrow else dict(rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(got.double(), want.double(), equal_nan=True, msg=lambda m: f"{what}: {m}", **close)


def operators(part=0, parts=1):
    """Every operator, or one process's share of them."""
    refused = right = 0
    wrongs = []
    for name, (ours, theirs, *shapes) in list(CASES.items())[part::parts]:
        good = made(shapes)
        compared(name, ours(*good), good, theirs)
        for place in range(len(good)):
            for wrong, change in WRONGS.items():
                args = list(good)
                args[place] = change(args[place])
                for gradients in (False, True):
                    given = [a.detach().requires_grad_() if gradients and plain(a) else a for a in args]
                    got = None
                    try:
                        got = outcome(ours, given)
                        assert wrong in NO_TENSORS or not isinstance(got, AttributeError), str(got)
                        compared(name, got, given, theirs)
                    except AssertionError as problem:
                        wrongs.append(f"{name}, tensor {place}: {wrong}: {problem}"[:400])
                    if gradients and isinstance(got, torch.Tensor) and got.requires_grad and got.device.type != "meta":
                        outcome(lambda y: torch.autograd.grad(y.sum(), [a for a in given if plain(a)], allow_unused=True), (got,))
                    refused, right = refused + isinstance(got, REFUSALS), right + isinstance(got, torch.Tensor)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert not wrongs, "\n".join([f"{len(wrongs)} wrong", *wrongs])
    print(f"  {refused} refused, {right} right")


def plain(a) -> bool:
    return isinstance(a, torch.Tensor) and a.is_floating_point() and a.layout is torch.strided and not a.is_nested


def sizes_beyond_32_bits_are_shapes_too():
    """On the meta device nothing is stored, so nothing limits a size."""
    x = torch.empty((1 << 31) + 8, 4, dtype=torch.bfloat16, device="meta")
    assert ops.softmax(x).shape == x.shape and ops.rms_norm(x).shape == x.shape and ops.gelu(x).shape == x.shape
    assert ops.linear(x, torch.empty(8, 4, dtype=torch.bfloat16, device="meta")).shape == (x.shape[0], 8)


def inference_mode_takes_what_asks_for_gradients():
    x, w = made([(4, 6), (6,)])
    x.requires_grad_()
    with torch.inference_mode():
        for y in (ops.rms_norm(x, w), ops.softmax(x), ops.gelu(x), ops.swiglu(x, x)):
            assert not y.requires_grad and y.is_inference()
        kept = ops.softmax(x.detach())
    # A tensor of inference mode gives results, and no gradients.
    y = ops.softmax(kept)
    torch.testing.assert_close(y, torch.softmax(kept, -1))
    refused = outcome(lambda: ops.rms_norm(kept, w.requires_grad_()).sum().backward(), ())
    assert isinstance(refused, RuntimeError) and "nference" in str(refused), refused


def results_may_be_written_into_views():
    for run in (lambda f: f, lambda f: torch.compile(f, backend=backend.tilewright_backend)):
        base, same = made([(4, 6)])[0], made([(4, 6)])[0]

        def written(t, softmax):
            t[1:].copy_(softmax(t[1:]))
            t.view(-1)[3:9].mul_(2).add_(softmax(t[:, 0])[0])
            return t

        torch._dynamo.reset()
        run(lambda t: written(t, ops.softmax))(base)
        torch.testing.assert_close(base, written(same, lambda t: torch.softmax(t, -1)))
    # A leaf that a derivative needs is not to be written: autograd says so.
    x = made([(4, 6)])[0].requires_grad_()
    y = ops.softmax(x * 1)
    loss = y.square().sum()
    y.data, before = y.data, y._version
    with torch.no_grad():
        y.mul_(2)
    assert y._version > before
    assert isinstance(outcome(loss.backward, ()), RuntimeError)


def optimizers():
    (p,) = made([(4, 6)])
    for kind in (optim.AdamW, optim.Lion):
        for wrong, change in WRONGS.items():
            if wrong in ("nested",):
                continue
            value = change(p)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided:
                value = value.detach().clone() if wrong != "one row, repeated" else value.detach()
                value.requires_grad_()

            def step():
                optimizer = kind([value], lr=1e-2)
                if isinstance(value, torch.Tensor):
                    value.grad = torch.ones_like(value)
                optimizer.step()
                return value

            outcome(step, ())
        for gradient in (p.to_sparse(), torch.full_like(p, float("nan")), torch.full_like(p, float("inf")), p.t().contiguous().t(), None):
            value = p.clone().requires_grad_()
            value.grad = gradient
            outcome(lambda: kind([value], lr=1e-2).step(), ())
        for options in (dict(lr=-1.0), dict(lr=1e-2, betas=(1.5, 0.9)), dict(lr=1e-2, weight_decay=-1.0)):
            refused = outcome(lambda: kind([p.clone().requires_grad_()], **options), ())
            assert isinstance(refused, ValueError), f"{kind.__name__}({options}) was taken"


def compiled_models():
    """As in eager mode: an error where it has one, its values where it has none."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.LayerNorm(8)).to(DEVICE).eval()
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend.tilewright_backend)
    (good,) = made([(4, 6)])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for wrong, change in WRONGS.items():
                value = change(good)
                eager, ours = (outcome(f, (value,)) for f in (model, run))
                if wrong in (*NO_TENSORS, "nested"):
                    continue
                assert isinstance(ours, Exception) == isinstance(eager, Exception), f"{wrong}: {eager} in eager mode, ours {ours}"
                if isinstance(ours, torch.Tensor) and ours.device.type != "meta":
                    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{wrong}: {m}")


def shared_out(jobs):
    """One process for each share; whether all passed."""
    call = [a for a in sys.argv if a not in ("--jobs", str(jobs))]
    started = [subprocess.Popen([sys.executable, *call, "--part", f"{part}/{jobs}"]) for part in range(jobs)]
    return all([process.wait() == 0 for process in started])


def main():
    start = time.perf_counter()
    if "--jobs" in sys.argv:
        sys.exit(not shared_out(int(sys.argv[sys.argv.index("--jobs") + 1])))
    part, parts = map(int, sys.argv[sys.argv.index("--part") + 1].split("/")) if "--part" in sys.argv else (0, 1)
    operators(part, parts)
    others = (
        sizes_beyond_32_bits_are_shapes_too,
        inference_mode_takes_what_asks_for_gradients,
        results_may_be_written_into_views,
        optimizers,
        compiled_models,
    )
    for test in others[part::parts]:
        test()
        print(f"ok: {test.__name__}", flush=True)
    print(f"ok: share {part} of {parts}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
