"""Recorded graphs of whole compiled functions: `torch.compile(model, backend="tilewright", mode="reduce-overhead")`.

A forward or backward graph is recorded with all that is in it, our kernels and PyTorch's, and replayed with one call. The memory
of recordings, and which one follows which, is the work of PyTorch's own trees of recordings (`torch._inductor.cudagraph_trees`);
its rules hold here too: results lie in memory that the next step uses again, so what is to last longer is cloned, or
`torch.compiler.cudagraph_mark_step_begin()` says where a step begins.

What a recording cannot hold (tensors on the CPU, sizes that depend on data, arguments that are written) runs as without the mode, with a
line in the log `tilewright`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

import torch
from torch import fx

log = logging.getLogger("tilewright")


def refused(graph: fx.GraphModule, static: set[int]) -> str | None:
    """Why a graph is not recorded."""
    from torch._dynamo.backends.cudagraphs import find_input_mutations
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    if written := find_input_mutations(graph.graph) - static:
        return f"it writes {len(written)} of its arguments"
    devices = set()
    for node in graph.graph.nodes:
        held = node.meta.get("val")
        for tensor in held if isinstance(held, (list, tuple)) else [held]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cuda" and node.op != "output":
                return f"{node.name} is on the {tensor.device.type}"
            if isinstance(tensor, torch.Tensor):
                devices.add(tensor.device)
    if len({d for d in devices if d.type == "cuda"}) > 1:
        return "it is on several devices"
    if node := get_first_incompatible_cudagraph_node(graph):
        return f"{node.name} cannot be recorded"
    return None


@dataclasses.dataclass
class Recording:
    """What is to be known of a graph to record it. Plain data, for the cache."""

    kind: str
    device: int
    static: list[int]
    why_not: str | None
    stack_traces: list
    placeholders: list
    written: tuple

    @staticmethod
    def of(graph: fx.GraphModule, static: set[int], device: torch.device, kind: str) -> "Recording":
        """`static`: arguments whose addresses stay; `kind`: forward, backward or inference."""
        from torch._dynamo.backends.cudagraphs import find_input_mutations
        from torch._inductor.cudagraph_utils import get_placeholder_info

        why, traces = refused(graph, static), _stack_traces(graph.graph)
        written = tuple(sorted(find_input_mutations(graph.graph)))
        return Recording(kind, device.index, sorted(static), why, traces, get_placeholder_info(graph.graph), written)


def recorded(run, what: Recording):
    """`run` (one list of arguments, which it empties) behind recordings."""
    from torch._dynamo.utils import preserve_rng_state
    from torch._inductor import cudagraph_trees

    if what.why_not is not None:
        log.warning("the %s graph is not recorded: %s", what.kind, what.why_not)
        if what.kind != "backward":
            return run

        def unrecorded(args):
            # The trees must know that a step goes on.
            manager = cudagraph_trees.get_manager(what.device, create_if_none_exists=False)
            if manager is not None:
                manager.set_to_running_backward()
            return run(args)

        unrecorded._boxed_call = True
        return unrecorded
    options = {
        "device_index": what.device,
        "is_backward": what.kind == "backward",
        "is_inference": what.kind == "inference",
        "stack_traces": what.stack_traces,
        "placeholders": what.placeholders,
        "mutated_input_idxs": what.written,
    }
    made = None

    def replay(args):
        nonlocal made
        if made is None:
            with preserve_rng_state():
                made = cudagraph_trees.cudagraphify_impl(run, args, what.static, **options)
        return made(args)

    replay._boxed_call = True
    return replay


def _stack_traces(graph: fx.Graph) -> list:
    results = graph.output_node().args[0]
    results = results if isinstance(results, (list, tuple)) else [results]
    return [n.stack_trace if isinstance(n, fx.Node) else None for n in results]


def static_arguments() -> set[int]:
    """Arguments of the forward graph being compiled whose addresses stay: parameters and buffers."""
    context = torch._guards.TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    return set(metadata.static_input_indices) if metadata is not None else set()


def saved_arguments(graph: fx.Graph) -> set[int]:
    """Arguments of a backward graph that the forward graph made, in its recording: all but the gradients that come in."""
    names = [n.name for n in graph.find_nodes(op="placeholder")]
    return {i for i, name in enumerate(names) if "tangents" not in name}


def reset() -> None:
    """Forgets all recordings (`torch.compiler.reset`)."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()
