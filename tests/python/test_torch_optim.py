"""Optimizers, dropout and embedding bags on the CPU, beside PyTorch's own. The GPU's side is gpu/test_ops.py."""

import copy
import math

import torch.nn.functional as F
from torch_models import run_all, torch

from tilewright import ops, optim

PACK = torch.ops.tilewright


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.LayerNorm(33), torch.nn.Conv1d(1, 3, 5, bias=True), torch.nn.Linear(29, 5))
    return model.to(dtype)


def gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def groups(model):
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 3e-2}]


def same(a, b, tolerance):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def adamw_steps_as_pytorchs():
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        for options in ({}, {"maximize": True, "betas": (0.5, 0.7), "eps": 1e-3}, {"amsgrad": True, "betas": (0.8, 0.5)}):
            mine, theirs = net(dtype), net(dtype)
            a = optim.AdamW(groups(mine), lr=1e-2, **options)
            b = torch.optim.AdamW(groups(theirs), lr=1e-2, **options)
            for step in range(20):
                for model, optimizer in ((mine, a), (theirs, b)):
                    gradients(model, step)
                    if step % 3 == 1:  # A parameter that makes no step.
                        model[0].bias.grad = None
                    optimizer.step()
            same(mine, theirs, tolerance)
            for p, q in zip(mine.parameters(), theirs.parameters()):
                assert a.state[p]["step"].item() == b.state[q]["step"].item()
                torch.testing.assert_close(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def large_tensors_and_strange_layouts_too():
    torch.manual_seed(0)
    start = [torch.randn(300_007), torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(40, 7).t(), torch.randn(0, 3), torch.tensor(2.0)]
    lists = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    assert not lists[0][1].is_contiguous()
    for params, kind in zip(lists, (optim.AdamW, torch.optim.AdamW)):
        optimizer = kind(params, lr=1e-2)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for x, y in zip(*lists):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def narrow_parameters_are_roundings_of_wide_ones():
    mine, wide = net(torch.bfloat16), net(torch.float32)
    with torch.no_grad():
        for p, q in zip(mine.parameters(), wide.parameters()):
            q.copy_(p)
    a, b = optim.AdamW(mine.parameters(), lr=1e-3), torch.optim.AdamW(wide.parameters(), lr=1e-3)
    for step in range(50):
        gradients(mine, step)
        for p, q in zip(mine.parameters(), wide.parameters()):
            q.grad = p.grad.float()
        a.step()
        b.step()
    for p, q in zip(mine.parameters(), wide.parameters()):
        assert torch.equal(p, a.state[p]["master"].bfloat16())
        torch.testing.assert_close(a.state[p]["master"], q, rtol=1e-5, atol=1e-6)
    half = net(torch.float16)
    gradients(half, 0)
    optimizer = optim.AdamW(half.parameters(), master=False)
    optimizer.step()
    assert "master" not in optimizer.state[half[0].weight]


def lion(params, grads, moments, lr, betas, decay):
    for p, g, m in zip(params, grads, moments):
        update = torch.sign(betas[0] * m + (1 - betas[0]) * g)
        p.mul_(1 - lr * decay).sub_(lr * update)
        m.mul_(betas[1]).add_(g, alpha=1 - betas[1])


def lion_is_what_its_paper_says():
    mine, theirs = net(), net()
    optimizer = optim.Lion(mine.parameters(), lr=1e-2, weight_decay=0.1)
    moments = [torch.zeros_like(p) for p in theirs.parameters()]
    for step in range(10):
        gradients(mine, step)
        gradients(theirs, step)
        optimizer.step()
        with torch.no_grad():
            lion(theirs.parameters(), [p.grad for p in theirs.parameters()], moments, 1e-2, (0.9, 0.99), 0.1)
    same(mine, theirs, 1e-6)
    twice = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(twice)
    assert torch.equal(optimizer.state[mine[0].weight]["exp_avg"], twice["state"][0]["exp_avg"])


def gradients_are_clipped_to_a_norm():
    for most in (0.5, 1e9):
        mine, theirs = net(), net()
        a = optim.AdamW(mine.parameters(), lr=1e-2, max_norm=most)
        b = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
        for step in range(5):
            gradients(mine, step)
            gradients(theirs, step)
            before = mine[0].weight.grad.clone()
            a.step()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most)
            b.step()
            torch.testing.assert_close(a.grad_norm, norm)
            assert torch.equal(mine[0].weight.grad, before)
        same(mine, theirs, 1e-6)
    norm, factor = optim.gradient_norm([torch.ones(4), torch.full((2,), float("nan"))], 1.0)
    assert norm.isnan() and factor.isnan()
    norm, _ = optim.gradient_norm([torch.ones(4), torch.ones(5, dtype=torch.bfloat16)])
    assert norm == 3.0


def state_dicts_are_pytorchs():
    mine, theirs = net(), net()
    a, b = optim.AdamW(groups(mine), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(3):
        gradients(theirs, step)
        b.step()
    mine.load_state_dict(theirs.state_dict())
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0]["weight_decay"] == 0.3
    for step in range(3, 6):
        for model, optimizer in ((mine, a), (theirs, b)):
            gradients(model, step)
            optimizer.step()
    same(mine, theirs, 1e-6)
    third = net()
    third.load_state_dict(mine.state_dict())
    c = torch.optim.AdamW(groups(third), lr=1e-2)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    gradients(third, 6)
    gradients(mine, 6)
    a.step()
    c.step()
    same(mine, third, 1e-6)
    narrow = net(torch.bfloat16)
    d = optim.AdamW(narrow.parameters(), lr=1e-2)
    gradients(narrow, 0)
    d.step()
    held = copy.deepcopy(d.state_dict())
    d.load_state_dict(held)
    state = d.state[narrow[0].weight]
    assert state["exp_avg"].dtype == state["master"].dtype == torch.float32
    assert torch.equal(state["master"], held["state"][0]["master"])


def rates_may_be_tensors_and_follow_schedules():
    mine, theirs = net(), net()
    rate = torch.tensor(1e-2)
    a, b = optim.AdamW(mine.parameters(), lr=rate), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    plans = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (a, b)]
    for step in range(5):
        for model, optimizer, plan in zip((mine, theirs), (a, b), plans):
            gradients(model, step)
            optimizer.step()
            plan.step()
    same(mine, theirs, 1e-6)
    assert optim.AdamW(mine.parameters()).step(lambda: torch.tensor(3.0)) == 3.0


def amsgrad_moves_between_state_dicts():
    mine, theirs = net(), net()
    a, b = optim.AdamW(mine.parameters(), amsgrad=True), torch.optim.AdamW(theirs.parameters(), amsgrad=True)
    gradients(theirs, 0, 5.0)
    b.step()
    mine.load_state_dict(theirs.state_dict())
    a.load_state_dict(b.state_dict())
    for step in range(1, 4):
        for model, optimizer in ((mine, a), (theirs, b)):
            gradients(model, step)
            optimizer.step()
    same(mine, theirs, 2e-6)
    b.load_state_dict(a.state_dict())
    p, q = next(mine.parameters()), next(theirs.parameters())
    assert torch.equal(a.state[p]["max_exp_avg_sq"], b.state[q]["max_exp_avg_sq"])
    assert (b.state[q]["max_exp_avg_sq"] > b.state[q]["exp_avg_sq"]).any()


def a_scaler_neither_waits_nor_steps_over_infinities():
    """The scaled steps are the plain ones; a step whose gradients are not finite changes nothing, and does not count."""
    for kind, options in ((optim.AdamW, {}), (optim.AdamW, {"max_norm": 0.5}), (optim.AdamW, {"amsgrad": True}), (optim.Lion, {})):
        mine, plain = net(), net()
        a, b = kind(mine.parameters(), lr=1e-2, **options), kind(plain.parameters(), lr=1e-2, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))  # Makes the scale's tensor.
        for step in range(6):
            before = [p.detach().clone() for p in mine.parameters()]
            gradients(mine, step, scaler.get_scale())
            if step in (0, 3):
                mine[0].weight.grad[2, 3] = math.inf if step else math.nan
            else:
                gradients(plain, step)
                b.step()
            reads = []
            original, torch.Tensor.item = torch.Tensor.item, lambda t: reads.append(t) or original(t)
            try:
                scaler.step(a)
            finally:
                torch.Tensor.item = original
            assert not reads, "the step waits for the device"
            if step in (0, 3):
                assert all(map(torch.equal, before, mine.parameters()))
            scaler.update()
            assert not hasattr(a, "found_inf") and not hasattr(a, "grad_scale")
        assert scaler.get_scale() == 256.0
        same(mine, plain, 1e-6)
        if kind is optim.AdamW:
            assert a.state[mine[0].weight]["step"].item() == 4
        if "max_norm" in options:
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)


def optimizers_refuse_in_words():
    p = torch.nn.Parameter(torch.ones(3))
    for call, error, words in (
        (lambda: optim.AdamW([p], differentiable=True), NotImplementedError, "differentiable"),
        (lambda: optim.AdamW([torch.nn.Parameter(torch.ones(2, 2).to_sparse())]), TypeError, "sparse"),
        (lambda: optim.AdamW([p], betas=(1.0, 0.9)), ValueError, "betas"),
        (lambda: optim.AdamW([p], lr=-1.0), ValueError, "lr"),
        (lambda: optim.AdamW([p], max_norm=0.0), ValueError, "max_norm"),
        (lambda: optim.AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError, "complex"),
        (lambda: PACK.adamw_([p], [], [p], [p], [], [], p, None, None, None, 0.1, 0.9, 0.9, 0.0, 0.0, False), RuntimeError, "0 grads for 1 params"),
        (lambda: PACK.lion_([torch.ones(3, 3)[:, :2]], [torch.ones(3, 2)], [torch.ones(3, 2)], [], None, None, None, 0.1, 0.9, 0.9, 0.0, False), NotImplementedError, "gaps"),
        (lambda: PACK.lion_([torch.ones(3).long()], [], [], [], None, None, None, 0.1, 0.9, 0.9, 0.0, False), RuntimeError, "i64"),
        (lambda: PACK.lion_([p.data], [p.data.double()], [p.data.clone()], [], None, None, None, 0.1, 0.9, 0.9, 0.0, False), RuntimeError, "grads[0]"),
        (lambda: PACK.lion_([p.data], [p.data], [p.data], [], None, None, None, 0.1, 0.9, 0.9, 0.0, False), RuntimeError, "share memory"),
        (lambda: optim.gradient_norm([]), ValueError, "no gradients"),
    ):
        refused(call, error, words)
    table = torch.nn.EmbeddingBag(4, 3, sparse=True)
    table(torch.tensor([[1, 2]])).sum().backward()
    refused(optim.AdamW(table.parameters()).step, RuntimeError, "sparse")


def refused(call, error, words):
    try:
        call()
    except (*(error if isinstance(error, tuple) else (error,)), RuntimeError) as problem:
        assert words in str(problem), f"{words!r} is not in {str(problem)[:300]!r}"
        return
    raise AssertionError(f"not refused: {words}")


# ---- dropout -------------------------------------------------------------------------------------------


def dropout_repeats_scales_and_is_its_own_gradient():
    from tilewright.ops import dropouts

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(501, 67).to(dtype)
        torch.manual_seed(7)
        a = ops.dropout(x, 0.3)
        torch.manual_seed(7)
        b = ops.dropout(x, 0.3)
        assert torch.equal(a, b) and not torch.equal(a, ops.dropout(x, 0.3))
        share = (a == 0).double().mean().item()
        assert abs(share - 0.3) < 5 * math.sqrt(0.21 / x.numel()), share
        key = torch.tensor([-5])
        torch.testing.assert_close(PACK.dropout(x, x, key, 0.3), dropouts._composed(x, x, key, 0.3))
        for p, wanted in ((0.0, x), (1.0, torch.zeros_like(x))):
            assert torch.equal(PACK.dropout(x, None, key, p), wanted)
    x, r = torch.randn(40, 50, requires_grad=True), torch.randn(40, 50, requires_grad=True)
    torch.manual_seed(3)
    y = ops.dropout(x, 0.5, residual=r)
    seed = torch.randn(40, 50)
    y.backward(seed)
    kept = (y - r).detach() != 0
    torch.testing.assert_close(x.grad, seed * kept * 2)
    assert torch.equal(r.grad, seed)
    assert ops.dropout(x, 0.5, training=False) is x


def dropout_passes_pytorchs_checks_and_compiles():
    key = torch.tensor([99])
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    r = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    f = lambda x, r: PACK.dropout(x * x, r, key, 0.4)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, r))
    assert torch.autograd.gradgradcheck(f, (x, r))
    torch.library.opcheck(PACK.dropout.default, (x, r, key, 0.4))
    fast = torch.compile(lambda x, w: ops.dropout_rms_norm(x, x, w, p=0.5)[1].sum(), fullgraph=True, backend="aot_eager")
    a = torch.randn(64, 64, requires_grad=True)
    fast(a, torch.ones(64)).backward()
    assert set(a.grad.unique().tolist()) == {1.0, 3.0}
    torch.manual_seed(1)
    y, h = ops.dropout_layer_norm(a, a, torch.ones(64), p=0.25)
    torch.testing.assert_close(y, F.layer_norm(h, (64,)), rtol=1e-4, atol=1e-5)
    assert ops.dropout(torch.randn(0, 3)).shape == (0, 3)
    refused(lambda: ops.dropout(a, 1.5), ValueError, "p is 1.5")
    refused(lambda: PACK.dropout(a.detach(), None, torch.tensor([1.0]), 0.5), RuntimeError, "key is f32")
    refused(lambda: ops.dropout(torch.ones(3).to(torch.complex64)), RuntimeError, "complex")


# ---- embedding bags -------------------------------------------------------------------------------------


def bags_are_pytorchs():
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 50, (300,), generator=generator)
    offsets = torch.tensor([0, 0, 5, 5, 17, 120, 299, 300])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)):
        for mode in ("sum", "mean", "max"):
            for padding in (None, 7, -3):
                for weighted in (False, True) if mode == "sum" else (False,):
                    start = torch.randn(50, 21, generator=generator).to(dtype)
                    weights = torch.rand(300, generator=generator).to(dtype) if weighted else None
                    seed = torch.randn(8, 21, generator=generator).to(dtype)
                    found = []
                    for bag in (ops.embedding_bag, F.embedding_bag):
                        table = start.clone().requires_grad_()
                        w = None if weights is None else weights.clone().requires_grad_()
                        y = bag(indices, table, offsets, mode=mode, per_sample_weights=w, padding_idx=padding)
                        y.backward(seed)
                        found.append((y.detach(), table.grad, None if w is None else w.grad))
                    for a, b in zip(*found):
                        if a is not None:
                            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 3, msg=lambda m: f"{mode} {dtype} {padding}: {m}")
    lines = indices.reshape(30, 10).int()
    torch.testing.assert_close(ops.embedding_bag(lines, start.float()), F.embedding_bag(lines, start.float()))


def bags_pass_pytorchs_checks():
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    indices, offsets = torch.tensor([0, 5, 5, 2, 1]), torch.tensor([0, 2])
    f = lambda t, w: ops.embedding_bag(indices, t, offsets, "sum", w)  # noqa: E731
    assert torch.autograd.gradcheck(f, (table, weights))
    assert torch.autograd.gradcheck(lambda t: ops.embedding_bag(indices, t, offsets, "max"), (table,))
    torch.library.opcheck(PACK.embedding_bag.default, (table, indices, offsets, weights, 0, -1))
    torch.library.opcheck(PACK.embedding_bag.default, (table, indices, offsets, None, 2, 5))
    order, position = torch.sort(indices, stable=True)
    _, bag_of, count, place = PACK.embedding_bag.default(table.detach(), indices, offsets, None, 1, -1)
    torch.library.opcheck(PACK.embedding_bag_backward.default, (torch.ones(2, 3), order, position, None, bag_of, count, place, 6, 1, -1))
    fast = torch.compile(ops.embedding_bag, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(indices, table, offsets), F.embedding_bag(indices, table, offsets))
    assert ops.embedding_bag(torch.zeros(0, dtype=torch.long), table, torch.zeros(2, dtype=torch.long)).abs().sum() == 0
    for call, words in (
        (lambda: ops.embedding_bag(torch.tensor([6]), table, torch.tensor([0])), "outside of a table of 6 rows"),
        (lambda: ops.embedding_bag(indices, table, torch.tensor([0, 9])), "offsets must begin with 0"),
        (lambda: ops.embedding_bag(indices, table, torch.tensor([3, 1])), "offsets must begin with 0"),
        (lambda: ops.embedding_bag(indices, table, offsets, "median"), "mode is 'median'"),
        (lambda: ops.embedding_bag(indices, table), "need offsets"),
        (lambda: ops.embedding_bag(indices.float(), table, offsets), "input is torch.float32"),
        (lambda: ops.embedding_bag(indices, table[0], offsets), "weight has shape"),
    ):
        refused(call, (RuntimeError, ValueError, TypeError), words)


if __name__ == "__main__":
    run_all(
        [
            adamw_steps_as_pytorchs,
            large_tensors_and_strange_layouts_too,
            narrow_parameters_are_roundings_of_wide_ones,
            lion_is_what_its_paper_says,
            gradients_are_clipped_to_a_norm,
            state_dicts_are_pytorchs,
            rates_may_be_tensors_and_follow_schedules,
            amsgrad_moves_between_state_dicts,
            a_scaler_neither_waits_nor_steps_over_infinities,
            optimizers_refuse_in_words,
            dropout_repeats_scales_and_is_its_own_gradient,
            dropout_passes_pytorchs_checks_and_compiles,
            bags_are_pytorchs,
            bags_pass_pytorchs_checks,
        ]
    )
