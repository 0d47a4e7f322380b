"""The operator pack: fused operators for PyTorch, in eager mode, under torch.compile and in torch.export.

    from tilewright import ops
    y = ops.rms_norm(x, weight)                       # forward and backward are one kernel each
    y, h = ops.rms_norm(x, weight, residual=r)        # h = x + r, y its norm, in one pass
    y = ops.swiglu(gate, up)
    quick_gelu = ops.elementwise("x * sigmoid(1.702 * x)")

Kernels are compiled when a type and a row length are first met, and kept on disk. Importing this module registers the
operators as `torch.ops.tilewright.*`; it needs PyTorch 2.10 or later.
"""

from .. import _torch

_torch("ops")

from .attentions import attention  # noqa: E402
from .bags import embedding_bag  # noqa: E402
from .dropouts import dropout, dropout_layer_norm, dropout_rms_norm  # noqa: E402
from .formulas import Formula, elementwise, geglu, gelu, silu, swiglu  # noqa: E402
from .linears import linear, linear_cross_entropy  # noqa: E402
from .losses import cross_entropy  # noqa: E402
from .norms import layer_norm, rms_norm  # noqa: E402
from .rotations import rotary  # noqa: E402
from .softmaxes import log_softmax, softmax  # noqa: E402

__all__ = [
    "Formula",
    "attention",
    "cross_entropy",
    "dropout",
    "dropout_layer_norm",
    "dropout_rms_norm",
    "elementwise",
    "embedding_bag",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rotary",
    "silu",
    "softmax",
    "swiglu",
]
