"""Tilewright's kernels inside JAX: functions that work under `jit`, `grad` and `vmap`, on CPUs and CUDA devices.

    import tilewright.jax as tj

    y = tj.rms_norm(x, weight)
    loss = jax.jit(jax.grad(lambda w: tj.softmax(tj.linear(x, w)).sum()))(w)
    quick_gelu = tj.elementwise("x * sigmoid(1.702 * x)")

Each function writes a graph for the shapes and types of its arguments, once; XLA carries the graph's text in a custom call
(its typed foreign function interface), and the handler compiles the text for the device of the call when it first runs.
On a GPU it runs in XLA's stream and memory. Narrow floats (f16, bf16) are computed in f32 and rounded once.

Gradients are graphs of the same kind. Their own derivatives, of any order, JAX finds in what the graphs compute.
Under `vmap` a call stays one call: the mapped axis goes in front, as more rows, or as a batch axis of a product whose weight
is mapped too.

JAX is needed for this module, and imported nowhere else in the package.
"""

from .attentions import attention
from .bags import embedding_bag
from .core import TARGET
from .dropouts import dropout, dropout_layer_norm, dropout_rms_norm
from .formulas import ACTIVATIONS, elementwise, geglu, gelu, glu, silu, swiglu
from .linears import linear, linear_cross_entropy
from .losses import cross_entropy
from .norms import layer_norm, rms_norm
from .optim import adamw, lion
from .rotations import rotary
from .softmaxes import log_softmax, softmax

__all__ = [
    "ACTIVATIONS",
    "TARGET",
    "adamw",
    "attention",
    "cross_entropy",
    "dropout",
    "dropout_layer_norm",
    "dropout_rms_norm",
    "elementwise",
    "embedding_bag",
    "geglu",
    "gelu",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lion",
    "log_softmax",
    "rms_norm",
    "rotary",
    "silu",
    "softmax",
    "swiglu",
]
