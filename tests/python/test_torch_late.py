"""What is known only while a compiled model runs, or changes meanwhile: sizes, weights under other threads, gradients in batches, exported
programs that write their state; and what `torch.jit.trace` writes down of the operator pack."""

import subprocess
import sys
import tempfile
import threading

from torch_package import install

install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch_models import backend, run_all  # noqa: E402

import tilewright  # noqa: E402
from tilewright import ops  # noqa: E402

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.linspace(0.5, 2, 8)


def compiled(function, **options):
    return torch.compile(function, backend=backend.tilewright_backend, **options)


def parts_of(x, sizes):
    a, b = x.split(sizes.tolist())
    return a.relu().sum(0) + b.sum(0)


# Functions whose sizes, or numbers, are in their tensors.
LATE = {
    "a mask": (lambda x: F.gelu(x[x > 0]) * 2, ROWS),
    "sums over what a mask leaves": (lambda x: x.nonzero().sum(0) * 2, ROWS),
    "parts": (parts_of, ROWS, torch.tensor([1, 3])),
    "a number that fills": (lambda x, n: torch.full((3,), n.item()) * x[0, :3], ROWS, torch.tensor(3)),
    "a row": (lambda x, n: x[n.item()] * 2 + 1, ROWS, torch.tensor(2)),
    "rows from one on": (lambda x, n: x[n.item() :].relu() * 2, ROWS, torch.tensor(2)),
    "a product": (lambda x: (x @ x[x[:, 0] > 0].T).softmax(-1), ROWS),
    "repeated rows": (lambda x, n: F.gelu(torch.repeat_interleave(x, n, 0)), ROWS, torch.tensor([1, 0, 2, 1])),
}


def sizes_may_be_known_late():
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for name, (function, *args) in LATE.items():
            torch.compiler.reset()
            got = compiled(function, fullgraph=True)(*args)
            torch.testing.assert_close(got, function(*args), msg=lambda m: f"{name}: {m}")
        x = ROWS.clone().requires_grad_()
        torch.compiler.reset()

        def loss(x):
            return (x[x[:, 0] > 0] * 3).square().sum()

        torch.testing.assert_close(torch.autograd.grad(compiled(loss, fullgraph=True)(x), x), torch.autograd.grad(loss(x), x))


def threads_run_beside_weights_that_change():
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
    fast, x, problems = compiled(model), torch.randn(3, 64), []
    with torch.no_grad():
        fast(x)

    def run():
        try:
            with torch.no_grad():
                for _ in range(200):
                    fast(x)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(20):
            model[0].weight.mul_(1.01)
            fast(x)
        for thread in threads:
            thread.join()
        assert not problems, problems[0]
        torch.testing.assert_close(fast(x), model(x))


def gradients_come_in_batches():
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    q = ROWS.view(1, 2, 4, 4)
    for ours, theirs in (
        (compiled(model), model),
        (lambda x: ops.rms_norm(x, WEIGHT), lambda x: F.rms_norm(x, (8,), WEIGHT, 1e-6)),
        (lambda x: ops.cross_entropy(x, torch.arange(4)), lambda x: F.cross_entropy(x, torch.arange(4))),
        (lambda x: ops.linear_cross_entropy(x, ROWS, torch.arange(4)), lambda x: F.cross_entropy(x @ ROWS.T, torch.arange(4))),
        (lambda x: ops.attention(x.view(q.shape), q, q), lambda x: F.scaled_dot_product_attention(x.view(q.shape), q, q)),
        (lambda x: ops.swiglu(x, x), lambda x: F.silu(x) * x),
    ):
        x = ROWS.clone().requires_grad_()
        y, z = ours(x), theirs(x)
        down = torch.randn(3, *y.shape)
        got, want = (torch.autograd.grad(r, x, down, is_grads_batched=True)[0] for r in (y, z))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Sizes(torch.nn.Module):
    def forward(self, x, y):
        return F.gelu(x + y.view(-1, 2, 8)[:, 0]) * 2


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x):
        self.p.add_(x.sum(0))
        return x + self.p


def exported_programs_say_it_all():
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(Sizes(), (torch.randn(4, 8), torch.randn(8, 8)), dynamic_shapes=({0: n}, {0: 2 * n}))
    fast = tilewright.compile(program)
    for rows in (7, 64):
        x, y = torch.randn(rows, 8), torch.randn(2 * rows, 8)
        torch.testing.assert_close(fast(x, y), Sizes()(x, y))
    for rows in (13, 4):
        try:
            fast(torch.ones(7, 8), torch.ones(rows, 8))
        except (RuntimeError, ValueError) as error:
            assert "shape" in str(error), error
        else:
            raise AssertionError("sizes that do not fit were taken")
    fast, model = tilewright.compile(torch.export.export(Counting(), (ROWS,))), Counting()
    for _ in range(3):
        torch.testing.assert_close(fast(ROWS), model(ROWS))


def traces_hold_for_other_values():
    """A trace knows operators by name alone, and keeps what it is told: no counts of these targets, no numbers of this process."""
    ignored = torch.tensor([-100, 2, 3, -100])
    x, other = ROWS.clone().requires_grad_(), ROWS.flip(0).contiguous()
    for name, function in {
        "rms_norm": lambda x, t: ops.rms_norm(x, WEIGHT),
        "layer_norm, residual": lambda x, t: torch.cat(ops.layer_norm(x, WEIGHT, WEIGHT, residual=x)),
        "linear": lambda x, t: ops.linear(x, torch.eye(8), activation="gelu"),
        "formula": lambda x, t: ops.elementwise("x * 7.0 + y")(x, x),
        "cross_entropy": lambda x, t: ops.cross_entropy(x, t),
        "linear_cross_entropy": lambda x, t: ops.linear_cross_entropy(x, torch.eye(8), t),
    }.items():
        for given in (ROWS, x):
            trace = torch.jit.trace(function, (given, torch.arange(4)))
            torch.testing.assert_close(trace(other, ignored), function(other, ignored), msg=lambda m: f"{name}: {m}")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.jit.trace(lambda x: ops.elementwise("x * 77.0")(x), ROWS).save(file.name)
        program = "import sys, torch; from tilewright import ops\nfor i in range(99): ops.elementwise(f'x + {i}.5')\n"
        program += "y = torch.jit.load(sys.argv[1])(torch.ones(2)); assert y.tolist() == [77.0, 77.0], y"
        folder = tilewright.__file__.rsplit("/", 2)[0]
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{program}", file.name]
        subprocess.run(command, check=True, timeout=300)


if __name__ == "__main__":
    run_all(
        [
            sizes_may_be_known_late,
            threads_run_beside_weights_that_change,
            gradients_come_in_batches,
            exported_programs_say_it_all,
            traces_hold_for_other_values,
        ]
    )
