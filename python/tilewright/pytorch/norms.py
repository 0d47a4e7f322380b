"""The gradient of layer norms on GPUs: the operator pack's kernel, which reads each row once for all three gradients.

PyTorch's operator for the gradient has no `eps`, and the kernel works the statistics out again instead of reading them; so `eps` is that of
the node that made the saved statistics, found in the graph that is being traced. Where that fails, the gradient is decomposed as
elsewhere.
"""

from __future__ import annotations

import operator

import torch
from torch._decomp import decomposition_table
from torch.fx.experimental import proxy_tensor

from .. import ops  # noqa: F401  (registers the operators)

aten = torch.ops.aten

TYPES = (torch.float16, torch.bfloat16, torch.float32)
PACKED_BACKWARD = torch.ops.tilewright.layer_norm_backward.default

# Operators whose kernels are ours, outside of groups.
PACK = {PACKED_BACKWARD}


def eps_of(rstd: torch.Tensor) -> float | None:
    """The `eps` of the layer norm that gave `rstd` in the trace; `None` where that is not known."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(rstd, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    # Statistics that are saved for the backward graph are detached.
    while node is not None and node.target in (aten.detach.default, aten.alias.default):
        node = node.args[0]
    if node is None or node.target is not operator.getitem or node.args[0].target is not aten.native_layer_norm.default:
        return None
    eps = node.args[0].args[4]
    return float(eps) if isinstance(eps, (int, float)) else None


def layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask):
    """The decomposition of `native_layer_norm_backward`."""
    same = all(t is not None and t.dtype == x.dtype for t in (weight, bias))
    plain = x.device.type == "cuda" and x.dtype in TYPES and same and len(shape) == 1 and x.dim() > 1
    eps = eps_of(rstd) if plain and all(isinstance(n, int) for n in x.shape) else None
    if eps is None:
        return decomposition_table[aten.native_layer_norm_backward.default](dy, x, shape, mean, rstd, weight, bias, mask)
    dx, dw, db = PACKED_BACKWARD(dy.to(x.dtype), x, mean, rstd, None, weight, bias, eps)
    return tuple(t if wanted else None for t, wanted in zip((dx, dw, db), mask))


DECOMPOSITIONS = {aten.native_layer_norm_backward.default: layer_norm_backward}
