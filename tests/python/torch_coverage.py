"""The PyTorch backend over a wide list of models: inference and one training step of each, against eager and float64.

    python tests/python/torch_coverage.py [--device cuda] [--jobs N] [--share S] [--json FILE] [MODEL...]

Not part of `make test-torch`: on a processor it takes minutes. For each model: the errors as multiples of the budget
(see `tilewright.verify`), what is left to PyTorch and its share of the time. Exits with 1 when a result is outside of its
budget, something raises, or PyTorch takes more than `--share` of a model's time. With `--jobs`, so many processes work
side by side, the slowest models first.
"""

import argparse
import copy
import json
import multiprocessing
import time
import traceback

import torch_models
from torch.utils import _pytree as pytree
from torch_models import MODELS, MORE, compiled, first, graphs, tilewright, torch
from torch_zoo import ZOO


def made(name):
    """A model with seeded weights, in inference, and its arguments."""
    if name not in ZOO:
        return torch_models.made(name)
    torch.manual_seed(0)
    model, arguments = ZOO[name]()
    return model.eval(), arguments


def moved(tree, device):
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, tree)


def without_dropout(model):
    """Random numbers differ between element types."""
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if ("drop" in attribute or attribute == "p") and isinstance(value, float):
                setattr(module, attribute, 0.0)


def gradients(model, arguments, run):
    model.zero_grad()
    loss = first(run(**arguments)).square().mean()
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return loss.item(), grads


def distance(grads, exact) -> float:
    size = sum(e.double().square().sum() for e in exact).sqrt()
    return float(sum((g.double() - e.double()).square().sum() for g, e in zip(grads, exact)).sqrt() / size)


def left(seen) -> list[str]:
    """What PyTorch runs, and why."""
    found = {f"{n.target}: {why}" for g in seen for n, why in g.reasons.items() if "getitem" not in str(n.target)}
    found |= {f"group {group.name}: {group.failure.splitlines()[0]}" for g in seen for group in g.groups if group.failure}
    return sorted(found)


def training(name, device):
    model, arguments = made(name)
    model, arguments = model.to(device).train(), moved(arguments, device)
    without_dropout(model)
    double = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    exact_model = copy.deepcopy(model).double()
    _, exact = gradients(exact_model, pytree.tree_map(double, arguments), exact_model)
    eager_model = copy.deepcopy(model)
    _, eager = gradients(eager_model, arguments, eager_model)
    with graphs() as seen:
        _, ours = gradients(model, arguments, compiled(model))
    return distance(ours, exact), distance(eager, exact), left(seen)


def checked(name, device) -> dict:
    model, arguments = made(name)
    model, arguments = model.to(device), moved(arguments, device)
    row = {"model": name, "device": device}
    with graphs() as seen:
        found = tilewright.verify(model, **arguments)
    worst = max(found.outputs, key=lambda o: o.ratio)
    row |= {"inference_of_budget": worst.ratio, "inference_left": left(seen)}
    ours, eager, outside = training(name, device)
    row |= {"gradients": ours, "eager_gradients": eager, "training_left": outside}
    with torch.no_grad():
        row["left_share"] = tilewright.explain(model, runs=3, **arguments).fallback_share
    # Gradients of deep networks magnify the roundings of the forward pass, in eager as in ours.
    row["right"] = bool(found) and ours <= max(4 * eager, 2e-5)
    return row


# Those that take longest come first.
SLOW = ("shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "vgg11_bn", "swin", "convnext", "efficientnet", "resnet50", "mobilenet_large", "t5", "whisper", "mobilenet", "resnet")


def guarded(task) -> dict:
    """A model's row, whatever happens."""
    name, device, share = task
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    try:
        row = checked(name, device)
        row["right"] &= row["left_share"] <= share
    except Exception as error:
        row = {"model": name, "right": False, "error": f"{type(error).__name__}: {error}"[:500]}
        traceback.print_exc(limit=-6)
    return row | {"seconds": time.perf_counter() - start}


def said(row) -> str:
    mark = "ok " if row["right"] else "BAD"
    if "error" in row:
        return f"{mark} {row['model']}: {row['error']}"
    return (
        f"{mark} {row['model']:<16} inference {row['inference_of_budget']:.2f} of the budget, "
        f"gradients {row['gradients']:.1e} (eager {row['eager_gradients']:.1e}), {100 * row['left_share']:.1f} % in PyTorch, "
        f"{row['seconds']:.0f} s; left: {row['inference_left']} / {row['training_left']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.02, help="of the time of inference, PyTorch's at most")
    parser.add_argument("--json")
    parser.add_argument("models", nargs="*")
    arguments = parser.parse_args()
    names = arguments.models or [*MODELS, *MORE, *ZOO]
    names.sort(key=lambda n: SLOW.index(n) if n in SLOW else len(SLOW))
    tasks = [(name, arguments.device, arguments.share) for name in names]
    rows = []

    def done(row):
        rows.append(row)
        print(said(row), flush=True)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(rows, file, indent=1)

    if arguments.jobs > 1:
        # Forked before anything starts threads or opens a device.
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            for row in pool.imap_unordered(guarded, tasks):
                done(row)
    else:
        for task in tasks:
            done(guarded(task))
    wrong = sum(not row["right"] for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} models are right")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
