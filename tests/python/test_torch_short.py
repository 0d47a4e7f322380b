"""A short pass over everything that PyTorch sees of this package: for `make test` where PyTorch is installed, and for its versions.

    python tests/python/test_torch_short.py

Needs PyTorch alone: no transformers, no torchvision. The other tests of this folder go into each part at length.
"""

import io

from torch_package import install

install()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import tilewright  # noqa: E402
from tilewright import ops, optim  # noqa: E402
from tilewright.pytorch import backend  # noqa: E402


def operators_and_their_gradients():
    torch.manual_seed(0)
    x, w, up = torch.randn(9, 32), torch.randn(32), torch.randn(24, 32)
    q, t = torch.randn(2, 4, 7, 16), torch.randint(0, 24, (9,))
    for name, ours, theirs, tensors in (
        ("rms_norm", ops.rms_norm, lambda x, w: F.rms_norm(x, (32,), w, 1e-6), (x, w)),
        ("layer_norm", ops.layer_norm, lambda x, w: F.layer_norm(x, (32,), w), (x, w)),
        ("swiglu", lambda a, b: ops.swiglu(a, b), lambda a, b: F.silu(a) * b, (x, x + 1)),
        ("softmax", ops.softmax, lambda x: torch.softmax(x, -1), (x,)),
        ("linear", lambda x, u: ops.linear(x, u, None, "gelu"), lambda x, u: F.gelu(F.linear(x, u)), (x, up)),
        ("attention", lambda q, k: ops.attention(q, k, k, causal=True), lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (q, q + 1)),
        ("cross_entropy", lambda x, u: ops.cross_entropy(x @ u.T, t), lambda x, u: F.cross_entropy(x @ u.T, t), (x, up)),
        ("linear_cross_entropy", lambda x, u: ops.linear_cross_entropy(x, u, t), lambda x, u: F.cross_entropy(x @ u.T, t), (x, up)),
    ):
        mine, exact = [v.clone().requires_grad_() for v in tensors], [v.double().requires_grad_() for v in tensors]
        got, want = ours(*mine), theirs(*exact)
        down = torch.randn(want.shape)
        pairs = zip((got, *torch.autograd.grad(got, mine, down)), (want, *torch.autograd.grad(want, exact, down.double())))
        for number, (a, b) in enumerate(pairs):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}, value {number}: {m}")
    torch.library.opcheck(torch.ops.tilewright.rms_norm.default, (x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-6))


class Block(torch.nn.Module):
    """A transformer's block."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.norm = heads, torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(x)))


def outside(seen) -> set:
    """What is PyTorch's, and why."""
    left = {f"{n.target}: {why}" for g in seen for n, why in g.reasons.items() if "getitem" not in str(n.target)}
    return left | {g.failure for s in seen for g in s.groups if g.failure}


def compiled_models():
    torch.manual_seed(0)
    models = (
        (torch.nn.Sequential(Block(), Block()), lambda n: torch.randn(n, 6, 32)),
        (
            torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(), torch.nn.Linear(8, 5),
            ),
            lambda n: torch.randn(n, 3, 17, 17),
        ),
    )  # fmt: skip
    for model, batch in models:
        seen = []
        backend.OBSERVERS.append(seen.append)
        try:
            torch._dynamo.reset()
            run = torch.compile(model.eval(), backend=backend.tilewright_backend)
            with torch.no_grad():
                x = batch(3)
                torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
            # One plan for a range of batches.
            torch._dynamo.reset()
            counted, dynamic = len(seen), torch.compile(model, backend=backend.tilewright_backend, dynamic=True)
            with torch.no_grad():
                for n in (2, 5, 7):
                    x = batch(n)
                    torch.testing.assert_close(dynamic(x), model(x), rtol=1e-4, atol=1e-5)
            assert len(seen) == counted + 1, "compiled again inside of the range"
            torch._dynamo.reset()
            model.train()
            run, x = torch.compile(model, backend=backend.tilewright_backend), batch(4)
            gradients = []
            for f in (run, model):
                model.zero_grad()
                f(x).square().mean().backward()
                gradients.append([p.grad.clone() for p in model.parameters()])
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            assert not outside(seen), outside(seen)
        finally:
            backend.OBSERVERS.remove(seen.append)


def exported_explained_and_verified():
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 6, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        torch.testing.assert_close(tilewright.compile(torch.export.load(file))(x), model(x), rtol=1e-4, atol=1e-5)
        found = tilewright.explain(model, x)
        assert found.groups and not found.graph_breaks and found.fallback_share == 0.0, str(found)
        assert tilewright.verify(model, x)


def optimizers_take_steps():
    for kind, other in ((optim.AdamW, torch.optim.AdamW), (optim.Lion, None)):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 4)
        twin = torch.nn.Linear(16, 4)
        twin.load_state_dict(model.state_dict())
        mine, x = kind(model.parameters(), lr=1e-2), torch.randn(8, 16)
        theirs = other(twin.parameters(), lr=1e-2) if other else None
        losses = []
        for _ in range(5):
            for m, o in ((model, mine), (twin, theirs)):
                if o is not None:
                    o.zero_grad()
                    loss = m(x).square().mean()
                    loss.backward()
                    o.step()
                    losses.append(loss.item())
        assert losses[-1] < losses[0]
        if other:
            torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    print(f"PyTorch {torch.__version__}")
    for test in (operators_and_their_gradients, compiled_models, exported_explained_and_verified, optimizers_take_steps):
        test()
        print(f"ok: {test.__name__}", flush=True)
