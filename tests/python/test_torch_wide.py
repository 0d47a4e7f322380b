"""What models beyond the listed ones use: each rule's values and gradients against float64, and that nothing of it is left to PyTorch.

`torch_coverage.py` has the models.
"""

from test_torch_gradients import ours_alone
from torch_models import compiled, graphs, run_all, tilewright, torch

F, nn = torch.nn.functional, torch.nn


def left(seen) -> set[str]:
    found = {f"{n.target}: {why}" for g in seen for n, why in g.reasons.items() if "getitem" not in str(n.target)}
    return found | {group.failure for g in seen for group in g.groups if group.failure}


def same(function, *arguments, tolerance=1e-5):
    """A function's values, all of them ours, beside eager PyTorch's: exact where they are no floats."""
    with graphs() as seen, torch.no_grad():
        ours, want = compiled(function)(*arguments), function(*arguments)
    assert seen and not left(seen), left(seen)
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def windows_with_sizes_rounded_up():
    torch.manual_seed(0)
    for size, kernel, step, padding in ((9, 3, 2, 0), (8, 3, 2, 0), (15, 3, 2, 1), (10, 2, 3, 0)):
        x = torch.randn(2, 3, size, size + 1)
        ours_alone(lambda x: F.max_pool2d(x, kernel, step, padding, ceil_mode=True), x)  # noqa: B023
        ours_alone(lambda x: F.avg_pool2d(x, kernel, step, padding, ceil_mode=True), x)  # noqa: B023
    same(lambda x: F.max_pool2d(x, 2, return_indices=True), torch.randn(3, 8, 8))


def gradients_of_means_over_windows():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 12, 9)
    ours_alone(lambda x: F.avg_pool2d(x, 3), x)
    ours_alone(lambda x: F.avg_pool2d(x, 3, 2, 1), x)
    ours_alone(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), x)
    ours_alone(lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5), x)
    ours_alone(lambda x: F.avg_pool3d(x, 2, 1), torch.randn(2, 3, 4, 5, 6))
    ours_alone(lambda x: F.adaptive_avg_pool2d(x, (6, 3)), x)
    ours_alone(lambda x: F.adaptive_avg_pool2d(x, (5, 13)), x)
    ours_alone(lambda x: F.adaptive_max_pool2d(x, (6, 3)), x)


def transposed_convolutions_and_their_gradients():
    torch.manual_seed(2)
    for step, padding, more, dilation, kernel, groups in (
        (1, 0, 0, 1, 3, 1), (2, 1, 0, 1, 4, 1), (2, 1, 1, 1, 3, 2), (2, 0, 2, 3, 2, 1), (3, 0, 0, 1, 2, 4)
    ):  # fmt: skip
        weight = torch.randn(4, 8 // groups, kernel, kernel)

        def run(x, w, b):
            return F.conv_transpose2d(x, w, b, step, padding, more, groups, dilation)  # noqa: B023

        ours_alone(run, torch.randn(2, 4, 5, 6), weight, torch.randn(8))
    ours_alone(lambda x, w: F.conv_transpose1d(x, w, None, 2, 1), torch.randn(2, 4, 7), torch.randn(4, 3, 4))


def norms_of_groups_and_instances():
    torch.manual_seed(3)
    x, w, b = torch.randn(2, 6, 5, 4), torch.randn(6), torch.randn(6)
    ours_alone(lambda x, w, b: F.group_norm(x, 3, w, b), x, w, b)
    ours_alone(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), x, w, b)
    ours_alone(lambda x, w, b: F.group_norm(x, 2, w, b), x.bfloat16(), w.bfloat16(), b.bfloat16())
    # Under autocast: data in 16 bits, statistics in 32.
    mean, variance = torch.randn(6), torch.rand(6) + 0.5
    same(lambda x: F.batch_norm(x, mean, variance, w, b), x.bfloat16(), tolerance=2e-2)


def resizing_with_antialiasing():
    torch.manual_seed(4)
    for mode in ("bilinear", "bicubic"):
        for size in ((5, 7), (13, 12), (8, 1)):
            ours_alone(lambda x: F.interpolate(x, size, mode=mode, antialias=True), torch.randn(2, 3, 8, 10))  # noqa: B023


def losses_with_weights_and_over_pictures():
    torch.manual_seed(5)
    weight, target = torch.rand(5) + 0.5, torch.randint(0, 5, (2, 4, 3))
    target[0, 1, 2] = -100
    for reduction in ("mean", "sum", "none"):
        ours_alone(lambda x: F.cross_entropy(x, target, reduction=reduction), torch.randn(2, 5, 4, 3))  # noqa: B023
        for dtype in (torch.float32, torch.float64):

            def loss(x):
                return F.cross_entropy(x, target[0, 0], weight.to(x.dtype), reduction=reduction)  # noqa: B023

            same(loss, torch.randn(3, 5, dtype=dtype))
    mine = [torch.randn(3, 5).requires_grad_() for _ in range(2)]
    mine[1].data.copy_(mine[0].data)
    with graphs() as seen:
        compiled(lambda x: F.cross_entropy(x, target[0, 1], weight))(mine[0]).backward()
    F.cross_entropy(mine[1], target[0, 1], weight).backward()
    assert not left(seen), left(seen)
    torch.testing.assert_close(mine[0].grad, mine[1].grad)


def weight_norm_and_bags_of_rows():
    torch.manual_seed(6)
    ours_alone(lambda v, g: torch._weight_norm(v, g, 0), torch.randn(4, 3, 2), torch.rand(4, 1, 1) + 0.5)
    table, rows = torch.randn(20, 8), torch.randint(0, 20, (12,))
    starts, ignored = torch.tensor([0, 3, 3, 9]), int(rows[1])
    for mode in ("sum", "mean"):
        ours_alone(lambda i, t: F.embedding_bag(i.view(3, 4), t, mode=mode), rows, table)  # noqa: B023
        ours_alone(lambda i, t: F.embedding_bag(i, t, starts, mode=mode), rows, table)  # noqa: B023
        ours_alone(lambda i, t: F.embedding_bag(i, t, starts, mode=mode, padding_idx=ignored), rows, table)  # noqa: B023
    ours_alone(lambda t, s: F.embedding_bag(rows, t, starts, mode="sum", per_sample_weights=s), table, torch.rand(12))


def layers_that_pytorch_runs_as_one_operator():
    torch.manual_seed(7)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    for first in (False, True):
        for activation in ("relu", "gelu"):
            layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, activation, batch_first=True, norm_first=first).eval()
            encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
            x = torch.randn(2, 6, 16)
            for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal}, {"mask": causal, "src_key_padding_mask": padding}):
                with graphs() as seen, torch.no_grad():
                    ours, want = compiled(encoder)(x, **options), encoder(x, **options)
                assert not left(seen), left(seen)
                torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def what_is_in_order():
    torch.manual_seed(8)
    x = torch.randn(4, 9)
    same(lambda x: x.topk(3), x)
    same(lambda x: x.sort(descending=True), x)
    same(lambda x: torch.sort(x, stable=True), torch.tensor([[2, 1, 2, 1], [3, 3, 0, 3]]))
    y = torch.tensor([1.0, 3.0, 3.0, float("nan"), 2.0, float("nan"), 5.0])
    same(lambda y: (torch.cummax(y, 0), torch.cummin(y, 0)), y)
    edges = torch.tensor([-1.0, 0.0, 0.0, 2.0])
    for right in (False, True):
        same(lambda x: (torch.bucketize(x, edges, right=right), torch.searchsorted(edges, x, right=right)), torch.tensor([[-2.0, -1, 0], [1, 2, float("nan")]]))  # noqa: B023
    same(lambda x: torch.nonzero_static(x > 0, size=5, fill_value=-7), torch.tensor([[0, 1, 0], [1, 1, 0]]))


def places_that_a_mask_names():
    torch.manual_seed(9)
    x, mask = torch.randn(3, 4, 5), torch.rand(3, 4) > 0.5

    same(lambda x, new: x.masked_scatter(mask.unsqueeze(-1).expand_as(x), new), x, torch.randn(12, 5))
    same(lambda x, new: x.masked_scatter(x > 0, new), x, torch.randn(80))
    same(lambda x: x.index_put((mask,), torch.tensor(2.0)), x)
    same(lambda x: x.index_put((mask,), torch.arange(5.0), accumulate=True), x)
    ours_alone(lambda x, d: torch.diagonal_scatter(x, d, 1), torch.randn(4, 6), torch.randn(4))
    ours_alone(lambda x, d: torch.diagonal_scatter(x, d, -2, 0, 2), torch.randn(4, 3, 6), torch.randn(3, 2))
    same(lambda x, s: torch.as_strided_scatter(x, s, (2, 3), (8, 2), 1), torch.randn(4, 6), torch.randn(2, 3))
    at = torch.tensor([[0, -1, 2], [4, 4, 1]])
    same(lambda a, s: a.scatter(1, at % 5, s), torch.randn(2, 5), torch.randn(2, 3))
    same(lambda a, s: a.scatter_add(1, at % 5, s), torch.randn(2, 5), torch.randn(2, 3))
    large = torch.randn(300, 50)
    ours_alone(lambda x: x.max(-1)[0], large)


def elementwise_of_all_kinds():
    x = torch.tensor([0.0, -0.0, 1.5, -2.5, float("inf"), -float("inf"), 30.0, -30.0, float("nan"), 8.0])
    same(lambda x: torch.signbit(x), x)
    same(lambda x: torch.copysign(x.abs(), x.flip(0)), x[:8])
    same(lambda x: (torch.special.erfc(x), torch.special.erfcx(x.clamp(min=-5))), torch.cat([x, torch.linspace(-5, 9, 50)]))
    ours_alone(lambda x: torch.special.log_ndtr(x), torch.linspace(-8, 8, 33))
    for p in (0.0, 1.0, 2.0, float("inf")):
        same(lambda a, b: torch.cdist(a, b, p), torch.randn(2, 5, 3), torch.randn(2, 7, 3))  # noqa: B023
    q, scales, zeros = torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2], dtype=torch.int32)
    same(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127), q)
    same(lambda x: torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, -8, 7), q)


def variances_of_sizes_that_change():
    def function(x):
        return x.var(-1), x.var((0, 1), correction=0), x.std()

    run = compiled(function, dynamic=True)
    for shape in ((3, 4, 5), (2, 7, 9), (6, 2, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), function(x))


def slices_from_the_end_by_sizes_that_change():
    def function(x, y):
        return x[:, -y.shape[1] :] * 2 + y

    run = compiled(function, dynamic=True)
    with graphs() as seen:
        for rows, count in ((2, 3), (3, 5), (4, 7)):
            x, y = torch.randn(rows, 9), torch.randn(rows, count)
            torch.testing.assert_close(run(x, y), function(x, y))
    assert len(seen) == 1 and not left(seen), left(seen)


def products_that_no_kernel_takes_as_sums():
    """On a GPU a group whose product has no kernel is compiled once more with small ones as sums; the same graphs run here."""
    from tilewright.pytorch.group import Group

    def in_sums(self, args):
        self.sums = True
        return write(self, args)

    torch.manual_seed(10)
    write, Group.write = Group.write, in_sums
    try:
        for spec, a, b in (("ij,jk->ik", (3, 5), (5, 7)), ("bij,bjk->bik", (2, 3, 5), (2, 5, 4)), ("i,i->", (5,), (5,)), ("abc,bz->azc", (2, 3, 4), (3, 6))):
            with graphs() as seen:
                x, y = torch.randn(a), torch.randn(b)
                torch.testing.assert_close(compiled(lambda x, y: torch.einsum(spec, x, y))(x, y), torch.einsum(spec, x, y))  # noqa: B023
            texts = [g.write(None).builder.builder.text() for c in seen for g in c.groups]
            assert texts and not any("contract" in text for text in texts), texts
    finally:
        Group.write = write


def odd_calls():
    """Modules that models of all kinds have, in inference and in a training step."""
    torch.manual_seed(11)
    modules = {
        "generator": (nn.Sequential(nn.ConvTranspose2d(8, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()), (2, 8, 1, 1)),
        "discriminator": (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2, True), nn.InstanceNorm2d(8)), (2, 3, 8, 8)),
        "causal convolution": (nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, dilation=2)), nn.PReLU()), (2, 4, 9)),
        "responses": (nn.Sequential(nn.LocalResponseNorm(3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4)), (2, 4, 6, 6)),
    }
    for name, (module, shape) in modules.items():
        found = tilewright.verify(module.eval(), torch.randn(shape))
        assert found, f"{name}\n{found}"
        found = tilewright.verify(module.train(), torch.randn(shape), gradients=True)
        assert found, f"{name} in training\n{found}"


if __name__ == "__main__":
    run_all(
        [
            windows_with_sizes_rounded_up,
            gradients_of_means_over_windows,
            transposed_convolutions_and_their_gradients,
            norms_of_groups_and_instances,
            resizing_with_antialiasing,
            losses_with_weights_and_over_pictures,
            weight_norm_and_bags_of_rows,
            layers_that_pytorch_runs_as_one_operator,
            what_is_in_order,
            places_that_a_mask_names,
            elementwise_of_all_kinds,
            variances_of_sizes_that_change,
            slices_from_the_end_by_sizes_that_change,
            products_that_no_kernel_takes_as_sums,
            odd_calls,
        ]
    )
