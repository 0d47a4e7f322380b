"""Gradients that PyTorch has as operators of their own, by our rules: convolutions, pooling by maxima, embeddings."""

from torch_models import compiled, graphs, run_all, torch

F = torch.nn.functional
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def ours_alone(function, *tensors):
    """Compares all gradients with float64, and that nothing was left to PyTorch."""
    mine = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    exact = [t.double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    with graphs() as seen:
        result = compiled(function)(*mine)
        down = torch.randn_like(result)
        result.backward(down)
    function(*exact).backward(down.double())
    left = {f"{n.target}: {why}" for g in seen for n, why in g.reasons.items() if "getitem" not in str(n.target)}
    left |= {group.failure for g in seen for group in g.groups if group.failure}
    assert not left, left
    for ours, want in zip(mine, exact):
        if ours.requires_grad:
            distance = (ours.grad.double() - want.grad).norm() / want.grad.norm()
            assert distance < TOLERANCE[ours.dtype], (tuple(ours.shape), float(distance))


def convolutions_with_all_settings():
    torch.manual_seed(0)
    settings = [
        # step, padding, dilation, kernel, groups
        (1, 1, 1, 3, 1), (2, 1, 1, 3, 1), (2, 0, 1, 1, 1), (2, 3, 1, 7, 1), (3, 1, 1, 2, 1), (2, 2, 2, 3, 1), (1, 1, 1, 3, 8),
        (4, 0, 1, 4, 1), (3, 2, 2, 3, 2), (2, 1, 3, 3, 1),
    ]  # fmt: skip
    for step, padding, dilation, kernel, groups in settings:
        weight = torch.randn(8, 8 // groups, kernel, kernel)

        def run(x, w, b):
            return F.conv2d(x, w, b, step, padding, dilation, groups)  # noqa: B023

        ours_alone(run, torch.randn(2, 8, 11, 14), weight, torch.randn(8))


def convolutions_over_one_and_three_axes_and_in_bfloat16():
    torch.manual_seed(1)
    ours_alone(lambda x, w: F.conv1d(x, w, None, 2, 1), torch.randn(2, 4, 15), torch.randn(6, 4, 3))
    ours_alone(lambda x, w: F.conv3d(x, w, None, 2, 1), torch.randn(2, 4, 5, 6, 7), torch.randn(6, 4, 3, 3, 3))
    x, w = torch.randn(2, 8, 9, 9).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16()
    ours_alone(lambda x, w: F.conv2d(x, w, None, 2, 1), x, w)


def windows_that_lie_side_by_side():
    """Patch embeddings are products of any size."""
    torch.manual_seed(4)
    pixels = torch.randn(2, 3, 64, 64)

    def embedding(w, b):
        return F.conv2d(pixels.to(w.dtype), w, b, 16)

    ours_alone(embedding, torch.randn(96, 3, 16, 16), torch.randn(96))
    for size, kernel in (((30, 29), (9, 8)), ((5, 70), (2, 14))):
        ours_alone(lambda x, w, b: F.conv2d(x, w, b, kernel), torch.randn(2, 24, *size), torch.randn(32, 24, *kernel), torch.randn(32))  # noqa: B023
    ours_alone(lambda x, w: F.conv1d(x, w, None, 400), torch.randn(2, 1, 8333), torch.randn(512, 1, 400))
    ours_alone(lambda x, w: F.conv3d(x, w, None, (2, 8, 8)), torch.randn(2, 3, 9, 16, 15), torch.randn(96, 3, 2, 8, 8))


def pooling_by_maxima():
    torch.manual_seed(2)
    for kernel, step, padding in ((2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)):
        ours_alone(lambda x: F.max_pool2d(x, kernel, step, padding), torch.randn(2, 3, 11, 14))  # noqa: B023
    for kernel, step, padding in ((2, 2, 0), (2, 1, 1), ((1, 3, 2), (2, 3, 1), (0, 1, 1))):
        ours_alone(lambda x: F.max_pool3d(x, kernel, step, padding), torch.randn(2, 3, 5, 8, 6).relu())  # noqa: B023
    # Equal elements: the first one's, as PyTorch's.
    ours_alone(lambda x: F.max_pool2d(x, 3, 2, 1), torch.randn(2, 3, 8, 8).relu())


def positions_of_maxima_are_pytorchs():
    y = torch.full((1, 1, 4, 4), -float("inf"))
    y[0, 0, 2, 2] = float("nan")
    y[0, 0, 0, 3] = y[0, 0, 3, 0] = y[0, 0, 3, 1] = 1

    def run(y):
        return F.max_pool2d(y, 3, 2, 1, return_indices=True)

    with graphs() as seen, torch.no_grad():
        ours, want = compiled(run)(y), run(y)
    assert not seen[0].reasons, seen[0].reasons
    assert torch.equal(ours[1], want[1]), (ours[1], want[1])
    torch.testing.assert_close(ours[0], want[0], equal_nan=True)
    space = torch.randint(0, 3, (2, 3, 6, 5, 7), generator=torch.Generator().manual_seed(1)).float()

    def run_in_space(y):
        return F.max_pool3d(y, (2, 2, 2), (1, 2, 2), (0, 1, 1), return_indices=True)

    with graphs() as seen, torch.no_grad():
        ours, want = compiled(run_in_space)(space), run_in_space(space)
    assert not seen[0].reasons, seen[0].reasons
    assert torch.equal(ours[1], want[1]) and torch.equal(ours[0], want[0])


def embeddings_with_and_without_padding():
    torch.manual_seed(3)
    table, at = torch.randn(20, 16), torch.randint(0, 20, (4, 7))
    at[0, :3] = 3
    ours_alone(lambda i, t: F.embedding(i, t, padding_idx=3), at, table)
    ours_alone(lambda i, t: F.embedding(i, t), at.int(), table)


def lookups_along_an_axis():
    """Gradients of tables of positions and of weights that are chosen for each row."""
    torch.manual_seed(5)
    at = torch.randint(-9, 9, (14, 11))
    for table, function in (
        (torch.randn(9, 40), lambda t: t[at.flatten()]),
        (torch.randn(9, 6, 8), lambda t: t[at]),
        (torch.randn(12, 9, 5), lambda t: t[:, at]),
        (torch.randn(7, 3, 9), lambda t: t[..., at.abs() % 9]),
    ):
        ours_alone(function, table)


def complex_numbers_between_real_ones():
    """Rotary embeddings as complex products, in inference and with gradients; angles that are computed, and that are an argument."""
    torch.manual_seed(6)
    x, at = torch.randn(2, 5, 3, 8), torch.arange(5)

    def turned(x, turns):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :, None, :]).flatten(3)

    def computed(x):
        angles = torch.outer(at.to(x.dtype), torch.full((4,), 0.7, dtype=x.dtype))
        return turned(x, torch.polar(torch.ones_like(angles), angles) * 0.5) + turned(x, torch.polar(angles, angles).conj())

    ours_alone(computed, x)
    given = torch.polar(torch.rand(5, 4), torch.randn(5, 4))
    with graphs() as seen, torch.no_grad():
        torch.testing.assert_close(compiled(turned)(x, given), turned(x, given))
    assert {str(n.target) for n in seen[0].reasons} <= {"aten.view_as_real.default"}, seen[0].reasons
    # What has no form for pairs stays as it was.
    odd = lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2)).sqrt() * 2j)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(compiled(odd)(x), odd(x))


def attention_that_pytorch_has_taken_apart():
    """The operators of PyTorch's fused kernels become the library's, forward and backward, with the gradients of products and a softmax."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from tilewright.ops import attentions as _attentions
    from tilewright.pytorch import attentions

    aten, packed = torch.ops.aten, torch.ops.tilewright
    names = {"flash": aten._scaled_dot_product_flash_attention, "efficient": aten._scaled_dot_product_efficient_attention,
             "cudnn": aten._scaled_dot_product_cudnn_attention}  # fmt: skip
    kernels, attentions._has_kernels = attentions._has_kernels, lambda *_: True
    torch.manual_seed(3)
    try:
        for name, length, masked, causal in (
            ("flash", 40, False, True), ("efficient", 40, False, False), ("efficient", 64, True, False), ("cudnn", 24, False, True),
            ("cudnn", 24, True, False),
        ):  # fmt: skip
            q, k, v, dy = (torch.randn(2, 4, length, 16) for _ in range(4))
            seen = torch.rand(2, 1, 1, length) > 0.3 if masked else None

            def bias(seen):
                return torch.where(seen, 0.0, -torch.inf).expand(2, 4, length, length)  # noqa: B023

            def both(q, k, v, dy, *seen):
                call = names[name].default  # noqa: B023
                further = () if name == "flash" else (bias(seen[0]) if seen else None, True)  # noqa: B023
                y = call(q, k, v, *further, 0.0, causal, scale=0.3)[0]  # noqa: B023
                return (y, *torch.autograd.grad(y, (q, k, v), dy))

            held = [t.requires_grad_() for t in (q, k, v)]
            given = (*held, dy, *([seen] if masked else []))
            traced = make_fx(both, decomposition_table=attentions.DECOMPOSITIONS, tracing_mode="fake")(*given)
            called = {n.target for n in traced.graph.nodes if "attention" in str(n.target)}
            assert called == {packed.attention_lse.default, packed.attention_backward.default}, (name, called)
            # The library's kernels are for GPUs: here the same is made of PyTorch's operators.
            composed = {packed.attention_lse.default: _attentions._lse_composed, packed.attention_backward.default: _attentions._backward_composed}
            for node in traced.graph.nodes:
                node.target = composed.get(node.target, node.target) if node.op == "call_function" else node.target
            traced.recompile()
            y = F.scaled_dot_product_attention(*held, bias(seen) if masked else None, is_causal=causal, scale=0.3)
            want = (y, *torch.autograd.grad(y, held, dy))
            for ours, exact in zip(traced(*given), want):
                torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
        # A mask that may have a gradient stays PyTorch's.
        mask = torch.randn(2, 4, 24, 24)
        traced = make_fx(
            lambda q, k, v, mask: names["efficient"].default(q, k, v, mask, True)[0],
            decomposition_table=attentions.DECOMPOSITIONS,
            tracing_mode="fake",
        )(*(torch.randn(2, 4, 24, 16) for _ in range(3)), mask)
        assert any(n.target is names["efficient"].default for n in traced.graph.nodes)
    finally:
        attentions._has_kernels = kernels


def losses_of_classes():
    """The gradient of the logits, also of rows that are ignored; no kernel walks a row for the sum of its gradient."""
    torch.manual_seed(4)
    x, at = torch.randn(24, 37), torch.randint(0, 37, (24,))
    at[3:6], at[7], at[8] = -100, 0, 36
    for reduction in ("mean", "sum", "none"):
        ours_alone(lambda x, t: F.cross_entropy(x, t, reduction=reduction), x, at)  # noqa: B023
    ours_alone(lambda x, t: F.cross_entropy(x.float(), t), x.bfloat16(), at)
    mine = x.clone().requires_grad_()
    with graphs() as seen:
        compiled(lambda x, t: F.cross_entropy(x, t))(mine, at).backward()
    backward = [n for g in seen if g.kind == "backward" for group in g.groups for n in group.nodes]
    assert backward and not any(n.target is torch.ops.aten.sum.dim_IntList for n in backward), backward


def kept_by(function, *tensors):
    """The operators whose results the forward graph returns, and those of the backward graph, of a function whose gradients are right."""
    ours_alone(function, *tensors)
    mine = [t.clone().requires_grad_() for t in tensors]
    with graphs() as found:
        compiled(function)(*mine).sum().backward()
    forward = {n.target for g in found if g.kind == "forward" for group in g.groups for n in group.outputs}
    backward = [n.target for g in found if g.kind == "backward" for group in g.groups for n in group.nodes]
    assert forward and backward
    return forward, backward


def queries_keys_and_values_of_one_product():
    """They are kept as the product, not as three copies, and their gradients are written side by side."""
    torch.manual_seed(6)
    aten = torch.ops.aten
    x, inner, outer = torch.randn(3, 10, 16), torch.randn(48, 16) / 4, torch.randn(16, 16) / 4

    def batch_first(x, inner, bias, outer, out_bias):
        # As `MultiheadAttention` with the batch first: positions come before samples inside of it.
        rows = F.layer_norm(x, (16,)).transpose(0, 1)
        options = {"need_weights": False}
        y = F.multi_head_attention_forward(
            rows, rows, rows, 16, 4, inner, bias, None, None, False, 0.0, outer, out_bias, **options
        )[0]
        return F.layer_norm(x + y.transpose(0, 1), (16,))

    def split(x, inner, bias, outer, out_bias):
        parts = (x @ inner.T + bias).split(16, dim=2)
        q, k, v = (p.view(3, 10, 4, 4).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 10, 16)
        return x + y @ outer.T + out_bias

    for function in (batch_first, split):
        forward, backward = kept_by(function, x, inner, torch.randn(48), outer, torch.randn(16))
        assert not forward & {aten.clone.default, aten.select.int, aten.slice.Tensor}, forward
        assert aten.cat.default in backward and aten.select_scatter.default not in backward, backward


def rows_of_products_stand_as_they_lie():
    """Products of turned tensors, with and without a bias, their gradients, and results that keep the strides that eager ones have."""
    torch.manual_seed(7)
    x, w, b = torch.randn(4, 6, 8), torch.randn(12, 8), torch.randn(12)

    def turned(x, w, b):
        return F.linear(x.transpose(0, 1).contiguous(), w, b).relu()

    def twice(x, w, b):
        y = F.linear(x.transpose(0, 1).contiguous(), w).transpose(0, 1)
        return F.linear((y + b).transpose(0, 1).contiguous(), w.T.contiguous()).sum(0)

    def heads(x, w, b):
        parts = F.linear(x, w, b).view(4, 6, 3, 4).permute(2, 1, 0, 3)
        return F.linear(parts.reshape(18, 16), torch.cat([w.T, w.T])[:, :5].T) * b[:5]

    def there_and_back(x, w, b):
        return F.linear(x.transpose(0, 1).contiguous(), w, b).transpose(0, 1).sin()

    for function in (turned, twice, heads, there_and_back):
        ours_alone(function, x, w, b)
        mine = [t.clone().requires_grad_() for t in (x, w, b)]
        ours, want = compiled(function)(*mine), function(*mine)
        assert ours.stride() == want.stride(), (ours.stride(), want.stride())
    found = []
    with graphs() as seen:
        compiled(lambda *given: there_and_back(*given).mean())(*(t.clone().requires_grad_() for t in (x, w, b))).backward()
        found += seen
    nodes = [n for g in found for group in g.groups for n in group.nodes]
    views, copy = (torch.ops.aten.view.default, torch.ops.aten.permute.default), torch.ops.aten.clone.default
    operands = {a for n in nodes if n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for a in n.all_input_nodes}
    while any(n.target in views for n in operands):
        operands = {n.args[0] if n.target in views else n for n in operands}
    assert operands and not any(n.target is copy for n in operands), operands


if __name__ == "__main__":
    run_all(
        (
            convolutions_with_all_settings,
            convolutions_over_one_and_three_axes_and_in_bfloat16,
            windows_that_lie_side_by_side,
            pooling_by_maxima,
            positions_of_maxima_are_pytorchs,
            embeddings_with_and_without_padding,
            lookups_along_an_axis,
            complex_numbers_between_real_ones,
            attention_that_pytorch_has_taken_apart,
            losses_of_classes,
            queries_keys_and_values_of_one_product,
            rows_of_products_stand_as_they_lie,
        )
    )
