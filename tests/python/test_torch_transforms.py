"""The operators where PyTorch does more than call them: transforms of `torch.func`, forward derivatives, traces, graphs that are kept, other processes."""

import copy
import pickle
import subprocess
import sys

from torch_package import install

install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.func import grad, jacrev, jvp, vmap  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_models import backend, run_all  # noqa: E402

import tilewright  # noqa: E402
from tilewright import ops  # noqa: E402

ROWS = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(2))
VECTOR = torch.linspace(0.5, 2, 8)

PAIRS = {
    "rms_norm": (lambda x: ops.rms_norm(x, VECTOR), lambda x: F.rms_norm(x, (8,), VECTOR, 1e-6)),
    "layer_norm, residual": (lambda x: ops.layer_norm(x, VECTOR, VECTOR, residual=x)[0], lambda x: F.layer_norm(x + x, (8,), VECTOR, VECTOR)),
    "softmax": (ops.softmax, lambda x: torch.softmax(x, -1)),
    "gelu": (ops.gelu, F.gelu),
    "swiglu": (lambda x: ops.swiglu(x, 2 * x), lambda x: F.silu(x) * 2 * x),
    "a formula of three": (lambda x: ops.elementwise("max(a, b * 0.5) + tanh(c)")(x, x, x), lambda x: torch.maximum(x, x * 0.5) + torch.tanh(x)),
    "linear": (lambda x: ops.linear(x, WEIGHT, activation="relu"), lambda x: F.relu(F.linear(x, WEIGHT))),
    "cross_entropy": (lambda x: ops.cross_entropy(x, TARGETS[0]), lambda x: F.cross_entropy(x, TARGETS[0])),
    "linear_cross_entropy": (lambda x: ops.linear_cross_entropy(x, WEIGHT, TARGETS[0]), lambda x: F.cross_entropy(x @ WEIGHT.T, TARGETS[0])),
    "dropout of all": (lambda x: ops.dropout(x * x, 1.0, residual=x), lambda x: x),
}


def square(f):
    return lambda x: f(x).square().sum()


def tangent(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(ROWS[0], ROWS[1]))).tangent


def transforms_give_what_pytorchs_operators_give():
    """With dual numbers, kernels of ours would drop the tangents without a word."""
    for name, (ours, theirs) in PAIRS.items():
        for kind, run in {
            "grad": lambda f: grad(square(f))(ROWS[0]),
            "jvp": lambda f: jvp(f, (ROWS[0],), (ROWS[1],))[1],
            "dual numbers": tangent,
            "second derivative": lambda f: jacrev(grad(square(f)))(ROWS[0]),
            "vmap": lambda f: vmap(f, randomness="different")(ROWS),
            "vmap of grad": lambda f: vmap(grad(square(f)), randomness="different")(ROWS),
        }.items():
            torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-4, msg=lambda m: f"{kind} of {name}: {m}")
    each = [vmap(grad(lambda x, t: f(x @ WEIGHT.T, t)))(ROWS, TARGETS) for f in (ops.cross_entropy, F.cross_entropy)]
    torch.testing.assert_close(*each)
    bags = [vmap(lambda i: f(i, WEIGHT))(TARGETS[:, None]) for f in (ops.embedding_bag, F.embedding_bag)]
    torch.testing.assert_close(*bags)


def compiled_functions_take_transforms():
    ours, theirs = (lambda x: ops.softmax(x) + ops.gelu(x)), (lambda x: torch.softmax(x, -1) + F.gelu(x))
    for transform in (lambda f: grad(square(f)), vmap, lambda f: lambda x: jvp(f, (x,), (x,))[1]):
        torch.compiler.reset()
        fast = torch.compile(transform(ours), backend=backend.tilewright_backend, fullgraph=True)
        torch.testing.assert_close(fast(ROWS[0]), transform(theirs)(ROWS[0]), rtol=1e-4, atol=1e-5)
    # Tangents that arrive at a graph that was compiled without them.
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
    fast = torch.compile(model, backend=backend.tilewright_backend)
    with torch.no_grad():
        fast(ROWS[0])
        torch.testing.assert_close(tangent(fast), tangent(model))


def graphs_that_are_kept_run_again():
    for reduction in ("mean", "sum"):
        for dtype in (torch.float32, torch.float16):
            x = ROWS[0].to(dtype).requires_grad_()
            (want,) = torch.autograd.grad(F.cross_entropy(x.float(), TARGETS[0], reduction=reduction), x)
            loss = ops.cross_entropy(x, TARGETS[0], reduction=reduction)
            for scale in (0.0, float("nan"), 1e-38, 2.0):
                (got,) = torch.autograd.grad(loss * scale, x, retain_graph=True)
                got.add_(1)  # What is handed out is the caller's.
            (got,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 if dtype is torch.float16 else 1e-6)
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 8))
    x = ROWS[0].clone().requires_grad_()
    loss = torch.compile(model, backend=backend.tilewright_backend)(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])


def traces_and_tensors_without_values():
    ignored = TARGETS[0].clone()
    ignored[0] = -100
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x, t: ops.cross_entropy(x, t), tracing_mode=mode)(ROWS[0], TARGETS[0])
        torch.testing.assert_close(graph(ROWS[0], ignored), F.cross_entropy(ROWS[0], ignored))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.randn(4, 8, requires_grad=True)
        ops.cross_entropy(x, torch.zeros(4, dtype=torch.long)).backward()
        assert x.grad.shape == (4, 8)
        q = torch.randn(1, 2, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        assert ops.attention(q, q, q).shape == q.shape


def formulas_travel():
    """A formula's number is its process's, so another process must not take it over."""
    formula = ops.elementwise("x * 77.0")
    program = "import pickle, sys; from tilewright import ops\nfor i in range(99): ops.elementwise(f'x + {i}.5')\n"
    program += "import torch; f = pickle.loads(bytes.fromhex(sys.argv[1])); assert f(torch.ones(2)).tolist() == [77.0, 77.0], f(torch.ones(2))"
    folder = tilewright.__file__.rsplit("/", 2)[0]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{program}", pickle.dumps(formula).hex()]
    subprocess.run(command, check=True, timeout=300)
    assert copy.deepcopy(formula)(torch.ones(1)).item() == 77.0


def kinks_have_pytorchs_slopes():
    at = torch.tensor([-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0])
    for text, theirs in {
        "relu(x)": F.relu, "relu6(x)": F.relu6, "leaky_relu(x, 0.1)": lambda x: F.leaky_relu(x, 0.1), "celu(x, 0.7)": lambda x: F.celu(x, 0.7),
        "softplus(x)": F.softplus, "logsigmoid(x)": F.logsigmoid, "mish(x)": F.mish, "hardtanh(x)": F.hardtanh, "hardsigmoid(x)": F.hardsigmoid,
        "hardswish(x)": F.hardswish, "elu(x, 0.7)": lambda x: F.elu(x, 0.7), "selu(x)": F.selu, "softsign(x)": F.softsign, "abs(x)": torch.abs,
        "softshrink(x, 0.5)": F.softshrink, "hardshrink(x, 0.5)": F.hardshrink,
    }.items():  # fmt: skip
        a, b = at.clone().requires_grad_(), at.clone().requires_grad_()
        ours, wanted = ops.elementwise(text)(a), theirs(b)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6, msg=lambda m: f"{text}: {m}")
        ours.sum().backward(), wanted.sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=lambda m: f"the slope of {text}: {m}")
    x = torch.zeros(3, 8, requires_grad=True)
    ops.linear(x, WEIGHT, activation="relu").sum().backward()
    assert not x.grad.any()


def autocast_reaches_products():
    tensors = [t.clone().requires_grad_() for t in (ROWS[0], WEIGHT)]
    q = ROWS[0].view(1, 1, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(*tensors, TARGETS[0])
        assert ops.attention(q, q.bfloat16(), q).dtype == torch.bfloat16
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(F.linear(*tensors), TARGETS[0]), tensors)
    for t, g in zip(tensors, want):
        assert t.grad.dtype == torch.float32
        torch.testing.assert_close(t.grad, g, rtol=0.05, atol=0.02)


if __name__ == "__main__":
    run_all(
        [
            transforms_give_what_pytorchs_operators_give,
            compiled_functions_take_transforms,
            graphs_that_are_kept_run_again,
            traces_and_tensors_without_values,
            formulas_travel,
            kinks_have_pytorchs_slopes,
            autocast_reaches_products,
        ]
    )
