"""Models through the PyTorch backend: inference and training steps against eager and float64, sizes that change."""

import copy

from torch_models import MODELS, compiled, first, graphs, made, run_all, tilewright, torch

# Operators that a training step leaves to PyTorch. The list may only get shorter.
LEFT_IN_TRAINING = {
    "aten.convolution_backward.default",
    "aten.embedding_dense_backward.default",
    "aten.max_pool2d_with_indices.default",
    "aten.max_pool2d_with_indices_backward.default",
}


def inference_is_inside_the_budget_and_all_ours():
    for name in MODELS:
        model, arguments = made(name)
        with graphs() as seen:
            found = tilewright.verify(model, **arguments)
        assert found, f"{name}\n{found}"
        assert len(seen) == 1 and len(seen[0].groups) == 1 and not seen[0].reasons, (name, seen[0].reasons)
        assert not any(g.failure for g in seen[0].groups), [g.failure for g in seen[0].groups]
        worst = max(found.outputs, key=lambda o: o.ratio)
        print(f"    {name:<10} {worst.error:.1e} (eager {worst.eager_error:.1e}), {worst.ratio:.2f} of the budget")


def gradients(model, arguments, run):
    model.zero_grad()
    loss = first(run(**arguments)).square().mean()
    loss.backward()
    return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def distance(grads, exact) -> float:
    """Of all gradients together, relative: single ones may be zero up to rounding."""
    size = sum(e.double().square().sum() for e in exact).sqrt()
    return float(sum((g.double() - e).square().sum() for g, e in zip(grads, exact)).sqrt() / size)


def training_steps_have_the_gradients_of_float64():
    for name in MODELS:
        model, arguments = made(name)
        # Random numbers differ between element types, so none here; the next file has dropout.
        model.train()
        for module in model.modules():
            for attribute, value in list(vars(module).items()):
                if ("dropout" in attribute or attribute == "p") and isinstance(value, float):
                    setattr(module, attribute, 0.0)
        exact_model = copy.deepcopy(model).double()
        exact_arguments = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
        }
        eager_model = copy.deepcopy(model)
        exact_loss, exact = gradients(exact_model, exact_arguments, exact_model)
        _, eager = gradients(eager_model, arguments, eager_model)
        with graphs() as seen:
            loss, ours = gradients(model, arguments, compiled(model))
        left = {str(n.target) for g in seen for n in g.reasons if "getitem" not in str(n.target)}
        assert left <= LEFT_IN_TRAINING, (name, left)
        assert [g.kind for g in seen] == ["forward", "backward"], [g.kind for g in seen]
        assert not any(group.failure for g in seen for group in g.groups)
        theirs, error = distance(eager, exact), distance(ours, exact)
        assert error <= max(3 * theirs, 2e-6), (name, error, theirs)
        assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss), (name, loss, exact_loss)
        print(f"    {name:<10} gradients {error:.1e} (eager {theirs:.1e}); left to PyTorch: {', '.join(sorted(left)) or '-'}")
        for (key, mine), theirs in zip(model.named_buffers(), eager_model.buffers()):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{name}: buffer {key}")


def one_plan_serves_all_batches():
    for name in MODELS:
        model, arguments = made(name)
        with graphs() as seen, torch.no_grad():
            run = compiled(model, dynamic=True)
            for batch in (2, 3, 5, 8):
                wider = {
                    k: v.repeat(4, *[1] * (v.dim() - 1))[:batch] if isinstance(v, torch.Tensor) else v
                    for k, v in arguments.items()
                }
                torch.testing.assert_close(first(run(**wider)), first(model(**wider)), rtol=1e-4, atol=2e-5)
            assert len(seen) == 1, (name, len(seen))
            plans = [group.program for group in seen[0].groups]
        assert all(p is not None and p.symbols for p in plans), (name, [g.failure for g in seen[0].groups])


def training_takes_any_batch_too():
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 5))
    with graphs() as seen:
        run = compiled(model, dynamic=True)
        for batch in (4, 7, 9):
            x = torch.randn(batch, 12, generator=torch.Generator().manual_seed(batch))
            _, eager = gradients(model, dict(input=x), model)
            eager = [g.clone() for g in eager]
            _, ours = gradients(model, dict(input=x), run)
            assert distance(ours, eager) < 1e-6, batch
        assert [g.kind for g in seen] == ["forward", "backward"], [g.kind for g in seen]


if __name__ == "__main__":
    run_all(
        (
            inference_is_inside_the_budget_and_all_ours,
            training_steps_have_the_gradients_of_float64,
            one_plan_serves_all_batches,
            training_takes_any_batch_too,
        )
    )
