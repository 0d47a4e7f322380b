"""The PyTorch backend over PyTorch's own database of operators (`op_db`): what is right, what is wrong, what falls back.

    python tests/python/torch_opinfo.py [--device cuda] [--samples N] [--dtypes ...] [--ops NAME...] [--every N] [--limit S]
                                        [--json FILE] [--table FILE] [--merge FILE...]

Each operator runs under `torch.compile(backend="tilewright")` on the processor or on a GPU, on samples that its OpInfo generates, beside eager
PyTorch, in processes that may crash or hang without harm to the others. For each operator and element type:

    native    right, and no operator was left to PyTorch
    partly    right, with some of the operators that it is made of left to PyTorch
    left      right, and none of its operators is ours
    wrong     a result outside of the budget (that of `tilewright.verify`), of another type or another shape
    error     raises where eager PyTorch does not
    crash     the process died, or ran longer than `--seconds`

With `--limit` nothing is started after so many seconds. `--merge` adds the rows of earlier `--json` files, so that a sweep can be
made in pieces (`--every 8 --first 0`, `1`, ...). Exits with 1 when something is wrong, raises or crashes. `--table` writes the page
docs/src/pytorch-operators.md from such files alone, those of both devices.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
import warnings

from torch_package import install

install()

import torch  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import tilewright  # noqa: E402, F401
from tilewright.pytorch import backend, check  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
BAD = ("wrong", "error", "crash")
RANKS = ("native", "partly", "left", *BAD)

# Their results are memory as it was found; the fused forms of attention give a state of random numbers that nothing drew.
UNDEFINED = (
    "torch.ops.aten._efficient_attention_forward", "torch.ops.aten._flash_attention_forward",
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_",
)  # fmt: skip


def database() -> dict:
    """The operators by name, variants apart."""
    from torch.testing._internal import common_methods_invocations as methods

    # The wrapper sets the seed inside of the function, which Dynamo does not capture; `one_sample` sets it outside.
    methods.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return {op.formatted_name: op for op in methods.op_db}


def spread(items: list, count: int) -> list:
    """So many of the items, over the whole list."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def copied(tree):
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, tree)


def doubled(tree):
    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def tensors(result) -> list:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def difference(ours, expected, exact) -> str | None:
    """What is wrong with a result; nothing when it is inside its budget. `exact` gives the result in float64."""
    ours, expected = tensors(ours), tensors(expected)
    if len(ours) != len(expected):
        return f"{len(ours)} results instead of {len(expected)}"
    for number, (o, e) in enumerate(zip(ours, expected)):
        if (o.dtype, o.shape) != (e.dtype, e.shape):
            return f"result {number} is {o.dtype}{list(o.shape)} instead of {e.dtype}{list(e.shape)}"
        if o.layout is not torch.strided:
            o, e = o.to_dense(), e.to_dense()
        with contextlib.suppress(AssertionError):
            torch.testing.assert_close(o, e, equal_nan=True)
            continue
        if e.dtype.is_floating_point:
            reference = exact()
            if reference is not None:
                errors = [check.relative_error(t, reference[number]) for t in (e, o)]
                if errors[1] <= max(check.FACTOR * errors[0], check.FLOOR * torch.finfo(e.dtype).eps):
                    continue
                return f"result {number}: an error of {errors[1]:.1e}, eager {errors[0]:.1e}: {o.flatten()[:6].tolist()} for {e.flatten()[:6].tolist()}"
        return f"result {number}: {o.flatten()[:8].tolist()} for {e.flatten()[:8].tolist()}"
    return None


def left(seen) -> tuple[list[str], int]:
    """What PyTorch ran, with the reasons, and how many operators were ours."""
    found, ours = set(), 0
    for graph in seen:
        for node, why in graph.reasons.items():
            if "getitem" not in str(node.target):
                found.add(f"{node.target}: {why}")
        for group in graph.groups:
            if group.failure:
                found.add(f"group: {group.failure.splitlines()[0][:200]}")
            else:
                ours += len(group.nodes)
    return sorted(found), ours


def one_sample(op, sample, device: str) -> dict | None:
    """One sample; nothing when eager PyTorch does not take it."""
    inputs = (sample.input, tuple(sample.args), dict(sample.kwargs))

    def call(input, args, kwargs):
        return op.op(input, *args, **kwargs)

    try:
        torch.manual_seed(0)
        expected = call(*copied(inputs))
    except Exception:
        return None

    def exact():
        with contextlib.suppress(Exception):
            torch.manual_seed(0)
            return tensors(call(*doubled(copied(inputs))))
        return None

    torch._dynamo.reset()
    seen = []
    backend.OBSERVERS.append(seen.append)
    try:
        options = {"threads": 1} if device == "cpu" else {}
        run = torch.compile(call, backend=backend.tilewright_backend, dynamic=False, options=options)
        torch.manual_seed(0)
        ours = run(*copied(inputs))
    except Exception as error:
        where = [f"{f.filename.split('/')[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-3:]
        return {"state": "error", "why": f"{type(error).__name__}: {str(error)[:300]} {where}"}
    finally:
        backend.OBSERVERS.remove(seen.append)
    why = None if op.name in UNDEFINED else difference(ours, expected, exact)
    if why is not None:
        return {"state": "wrong", "why": why}
    outside, count = left(seen)
    if not seen:
        outside = ["Dynamo does not capture it"]
    state = "native" if not outside else "partly" if count else "left"
    return {"state": state, "left": outside}


def one(op, dtype: torch.dtype, samples: int, device: str) -> dict:
    """One operator with one element type."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    inputs = spread(list(op.sample_inputs(device, dtype, requires_grad=False)), samples)
    row = {"state": "native", "samples": 0, "left": [], "why": []}
    for sample in inputs:
        found = one_sample(op, sample, device)
        if found is None:
            continue
        row["samples"] += 1
        row["state"] = max(row["state"], found["state"], key=RANKS.index)
        row["left"] = sorted({*row["left"], *found.get("left", [])})
        if "why" in found:
            row["why"].append(f"{found['why']} ({sample.summary()})"[:900])
    if not row["samples"]:
        row["state"] = "none"
    return row


def worker(pipe, ops, samples, device) -> None:
    """Takes names and types, gives rows; ends with its parent. Without `ops` it reads the database itself."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    ops = ops or database()
    while True:
        try:
            name, dtype = pipe.recv()
        except EOFError:
            return
        try:
            row = one(ops[name], DTYPES[dtype], samples, device)
        except BaseException as error:
            row = {"state": "error", "samples": 0, "left": [], "why": [f"{type(error).__name__}: {error}"[:400]]}
        pipe.send(row)


class Worker:
    """A process with one task at a time."""

    def __init__(self, context, ops, samples, device):
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=worker, args=(end, ops, samples, device), daemon=True)
        self.process.start()
        end.close()
        self.task, self.start = None, 0.0

    def give(self, task) -> None:
        self.task, self.start = task, time.monotonic()
        self.pipe.send(task)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(ops, tasks, count: int, samples: int, seconds: float, done, device: str = "cpu", limit: float = float("inf")) -> dict:
    """All tasks in `count` processes. Those that die or take too long are replaced. Tasks that `limit` leaves no time for have no row."""
    # A process in which the database was read may have opened the GPU, and no fork can use it then.
    context, given = (multiprocessing.get_context("fork"), ops) if device == "cpu" else (multiprocessing.get_context("spawn"), None)
    end = time.monotonic() + limit
    waiting, rows, workers = collections.deque(tasks), {}, []
    while waiting or any(w.task for w in workers):
        if time.monotonic() > end:
            waiting.clear()
            if time.monotonic() > end + 5:
                break
        while waiting and len(workers) < count:
            workers.append(Worker(context, given, samples, device))
        for w in workers:
            if w.task is None and waiting:
                w.give(waiting.popleft())
        multiprocessing.connection.wait([w.pipe for w in workers if w.task], timeout=1.0)
        for w in list(workers):
            if w.task is None:
                continue
            row = None
            try:
                if w.pipe.poll():
                    row = w.pipe.recv()
                elif time.monotonic() - w.start > seconds:
                    row = {"state": "crash", "samples": 0, "left": [], "why": [f"no end after {seconds} s"]}
            except (EOFError, OSError):
                w.process.join()
                row = {"state": "crash", "samples": 0, "left": [], "why": [f"the process ended with {w.process.exitcode}"]}
            if row is None:
                continue
            rows[w.task] = row
            done(w.task, row)
            if row["state"] == "crash":
                w.end()
                workers.remove(w)
            w.task = None
    for w in workers:
        w.end()
    return rows


def by_operator(rows) -> dict[str, str]:
    """The state of each operator: the worst of its types."""
    states: dict[str, str] = {}
    for (name, _), row in rows.items():
        if row["state"] != "none":
            states[name] = max(states.get(name, "native"), row["state"], key=RANKS.index)
    return states


def summary(rows) -> str:
    states = by_operator(rows)
    counts = collections.Counter(states.values())
    total = max(len(states), 1)
    parts = [f"{counts[s]} {s} ({100 * counts[s] / total:.1f} %)" for s in RANKS if counts[s]]
    samples = sum(row["samples"] for row in rows.values())
    return f"{len(states)} operators, {samples} samples: {', '.join(parts)}"


def table(files: list) -> str:
    """The page of results, from the rows of `--json` files."""
    devices: dict[str, dict] = {}
    versions: dict[str, str] = {}
    for row in files:
        device = row["device"].split(":")[0]
        devices.setdefault(device, {})[row["operator"], row["dtype"]] = row
        versions[device] = row["torch"]
    names = {"cpu": "processor", "cuda": "GPU"}
    order = [d for d in names if d in devices]
    types = [(d, t) for d in order for t in DTYPES if any(task[1] == t for task in devices[d])]
    lines = [
        "# Operators of PyTorch",
        "",
        "Written by `python tests/python/torch_opinfo.py --table docs/src/pytorch-operators.md --merge FILES`: the operators of PyTorch's own database (`op_db`) under",
        '`torch.compile(backend="tilewright")`, beside eager PyTorch. *native*: all of it is ours; *partly*: some of the operators',
        "that it is made of are left to PyTorch; *left*: PyTorch runs it.",
        "",
        *(f"- On a {names[d]}, PyTorch {versions[d]}: {summary(devices[d])}." for d in order),
        "",
        f"| operator | {' | '.join(f'{names[d]}, {t}' for d, t in types)} | left to PyTorch |",
        f"|---|{'---|' * len(types)}---|",
    ]
    for name in sorted({task[0] for rows in devices.values() for task in rows}):
        mine = {(d, t): devices[d][name, t] for d, t in types if devices[d].get((name, t), {"state": "none"})["state"] != "none"}
        if not mine:
            continue
        cells = [mine[column]["state"] if column in mine else "" for column in types]
        reasons = sorted({r for row in mine.values() for r in row["left"]})
        why = "; ".join(r.replace("|", "\\|") for r in reasons[:2]) + (" ..." if len(reasons) > 2 else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {why[:200]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=4, help="at most so many of each operator and type")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--ops", nargs="*", help="these operators (without a variant: all variants)")
    parser.add_argument("--every", type=int, default=1, help="every so many-th operator")
    parser.add_argument("--first", type=int, default=0, help="with --every: the first of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=120.0, help="for one operator and type")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--merge", nargs="*", default=[], help="files of --json whose rows are added")
    parser.add_argument("--json")
    parser.add_argument("--table")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    earlier = []
    for file in arguments.merge:
        with open(file) as lines:
            earlier += json.load(lines)
    if arguments.table:
        with open(arguments.table, "w") as file:
            file.write(table(earlier))
        return
    torch.set_num_threads(1)
    ops = database()
    if arguments.ops:
        ops = {n: op for n, op in ops.items() if n in arguments.ops or op.name in arguments.ops}
    names = list(ops)[arguments.first :: arguments.every]
    kinds = {n: ops[n].supported_dtypes(arguments.device.split(":")[0]) for n in names}
    tasks = [(n, d) for n in names for d in arguments.dtypes if DTYPES[d] in kinds[n]]

    def done(task, row) -> None:
        if row["state"] in BAD or not arguments.quiet:
            print(f"{row['state']:<7} {task[0]:<44} {task[1]:<9} {'; '.join((row['why'] or row['left'])[:2])[:500]}", flush=True)

    start = time.monotonic()
    known = {(row["operator"], row["dtype"]): row for row in earlier if row["device"] == arguments.device}
    rows = run(ops, tasks, arguments.workers, arguments.samples, arguments.seconds, done, arguments.device, arguments.limit)
    if len(rows) < len(tasks):
        print(f"{len(tasks) - len(rows)} of {len(tasks)} operators and types were not reached")
    rows = {(n, d): {"operator": n, "dtype": d, "device": arguments.device, "torch": torch.__version__, **row} for (n, d), row in rows.items()}
    rows = known | rows
    print(f"{summary(rows)}; {time.monotonic() - start:.0f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([row for _, row in sorted(rows.items())], file, indent=1)
    raise SystemExit(any(state in BAD for state in by_operator(rows).values()))


if __name__ == "__main__":
    main()
