"""The PyTorch backend: attention with masks, what is kept for the backward graph, reports, and what `verify` finds."""

from torch_models import compiled, graphs, run_all, tilewright, torch
from tilewright.pytorch import group as groups_of

F = torch.nn.functional


def attention_with_masks_is_whole():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 9, 9))
    keys = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keys[1, :, :, 4:] = False
    nothing = keys.clone()
    nothing[0] = False
    added = torch.randn(2, 4, 6, 9)
    square = torch.rand(6, 9) > 0.3
    square[2] = False
    # Nothing is seen in a row where minus infinity is added to all scores: 0, as with truth values.
    low = added.clone()
    low[1, :, 3] = float("-inf")
    for mask in (None, keys, keys.expand(2, 4, 6, 9), nothing, added, square, low):

        def function(q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(2, 6, 64)

        with graphs() as seen, torch.no_grad():
            ours = compiled(function)(q, k, v, mask)
        exact = function(*(t.double() for t in (q, k, v)), mask if mask is None or mask.dtype is torch.bool else mask.double())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
        assert not seen[0].reasons and not any(g.failure for g in seen[0].groups)
        assert any(anchor == "attention" for _, anchor, _ in seen[0].groups[0].program.steps)
    # Heads that share keys; a causal mask that counts from the beginning.
    for options in (dict(enable_gqa=True), dict(is_causal=True)):
        few = 2 if "enable_gqa" in options else 4
        function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # noqa: B023, E731
        with graphs() as seen, torch.no_grad():
            ours = compiled(function)(q, k[:, :few], v[:, :few])
        torch.testing.assert_close(ours, function(q, k[:, :few], v[:, :few]), rtol=1e-5, atol=1e-5)
        assert not seen[0].reasons


def a_value_in_several_shapes_is_kept_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    x = torch.randn(2, 3, 8, requires_grad=True)
    with graphs() as seen:
        compiled(model)(x).square().sum().backward()
    # The activation is made as [2,3,8], and read as [6,8] by the gradient of the weights.
    kept = []
    for node in seen[0].groups[0].outputs:
        while "view" in str(node.target):
            node = node.args[0]
        kept.append(node)
    assert len(set(kept)) == len(kept) and any("gelu" in str(n.target) for n in kept), kept
    found = x.grad.clone()
    x.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def integers_divided_by_zero_raise_as_in_eager():
    with torch.no_grad():
        function = compiled(lambda a, b: a // b)
        a, b = torch.tensor([7, -7, 3]), torch.tensor([2, 2, 1])
        assert function(a, b).tolist() == [3, -4, 3]
        try:
            function(a, torch.tensor([2, 0, 1]))
        except RuntimeError as error:
            assert "ZeroDivision" in str(error)
        else:
            raise AssertionError("no error")


def pages_say_what_text_says():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).eval()
    with torch.no_grad():
        found = tilewright.explain(model, torch.randn(16, 32))
    steps = [s for g in found.groups for s in g.steps]
    assert steps and all(s.least > 0 and s.roof in ("compute", "memory", "launch") and s.fraction > 0 for s in steps)
    page = found.html()
    assert page.startswith("<!doctype html>") and all(s.label in page for s in steps)
    assert "% of" in str(found) and "<script" not in page


def training_steps_are_explained():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8))
    model[0].weight.grad = kept = torch.ones(64, 32)
    x = torch.randn(16, 32, requires_grad=True)
    found = tilewright.explain(model, x, gradients=True)
    assert x.grad is None
    names = [g.name for g in found.groups]
    assert any(n.startswith("forward") for n in names) and any(n.startswith("backward") for n in names), names
    backward = next(g for g in found.groups if g.name.startswith("backward"))
    assert backward.steps and backward.seconds > 0 and all(s.least > 0 and s.seconds > 0 for s in backward.steps), str(found)
    assert "backward" in found.html() and "backward" not in str(tilewright.explain(model, x))
    assert model[0].weight.grad is kept and torch.equal(kept, torch.ones(64, 32)) and model[3].weight.grad is None
    try:
        tilewright.explain(torch.nn.ReLU(), x.detach(), gradients=True)
    except ValueError as error:
        assert "gradient" in str(error)
    else:
        raise AssertionError("a model without gradients was explained")


def what_cannot_be_checked_is_refused():
    x = torch.randn(2, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    for call, kind, words in (
        (lambda: tilewright.verify(model.train(), x), ValueError, "model.eval()"),
        (lambda: tilewright.verify(torch.sin, x), TypeError, "verify takes"),
        (lambda: tilewright.explain(None, x), TypeError, "explain takes"),
    ):
        try:
            call()
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words}: nothing was raised")
    assert tilewright.verify(model.eval(), x)


def verify_names_the_group_and_checks_training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = torch.randn(8, 16)
    found = tilewright.verify(model, x, gradients=True)
    assert found and found.responsible is None and len(found.groups) >= 2, str(found)
    assert [o.name for o in found.outputs if o.name.startswith("gradient of")] == [
        "gradient of 0.weight", "gradient of 0.bias", "gradient of 2.weight", "gradient of 2.bias",
    ]  # fmt: skip
    # A group that gives something else.
    run = groups_of.Group.__call__

    def wrong(self, *args):
        return tuple(r + 0.01 if self.name == "backward_0" else r for r in run(self, *args))

    groups_of.Group.__call__ = wrong
    try:
        found = tilewright.verify(model, x, gradients=True)
    finally:
        groups_of.Group.__call__ = run
    assert not found and found.responsible.name == "backward_0", str(found)
    assert "responsible: backward_0" in str(found)
    # What the type cannot hold, eager does not hold either.
    assert tilewright.verify(Overflows(), x)
    found = tilewright.verify(Draws(), x)
    assert not found and "draws random numbers" in str(found), str(found)


class Overflows(torch.nn.Module):
    def forward(self, x):
        return torch.exp(x * 1e3)


class Draws(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, True)


def reports_leave_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).train()
    x, before = torch.randn(4, 8), {n: b.clone() for n, b in model.named_buffers()}
    tilewright.explain(model, x, gradients=True)
    tilewright.verify(model, x, gradients=True)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters()) and model.training
    try:
        tilewright.explain(model, x, runs=0)
    except ValueError as error:
        assert "runs is 0" in str(error)
    else:
        raise AssertionError("no runs were explained")


if __name__ == "__main__":
    run_all(
        (
            attention_with_masks_is_whole,
            a_value_in_several_shapes_is_kept_once,
            integers_divided_by_zero_raise_as_in_eager,
            pages_say_what_text_says,
            training_steps_are_explained,
            what_cannot_be_checked_is_refused,
            verify_names_the_group_and_checks_training,
            reports_leave_the_model_as_it_was,
        )
    )
