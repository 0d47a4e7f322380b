"""Cross-entropy in training: taken apart so that a backward graph computes it again from the logits.

Whole, `log_softmax` and the gradient of `nll_loss` make AOTAutograd keep the logarithms of all probabilities, in float32: for a language model
several times what its logits take. Taken apart, what is kept are the logits as they are and two numbers per row, and both graphs have one
kernel that reads the logits.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten


def log_softmax(x, dim, half_to_float):
    """The decomposition of `_log_softmax`."""
    if not x.dim() or not x.numel():
        return NotImplemented
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    shifted = wide - torch.amax(wide, dim, keepdim=True)
    y = shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))
    return y if half_to_float else y.to(x.dtype)


def nll_loss_backward(gradient, x, target, weight, reduction, ignore_index, total_weight):
    """The decomposition of `nll_loss_backward`, for rows of classes that weigh the same."""
    if x.dim() != 2 or weight is not None:
        return NotImplemented
    if reduction == 1:
        gradient = gradient / total_weight
    gradient = gradient.reshape(-1, 1) if reduction == 0 else gradient.reshape(1, 1)
    target = target.reshape(-1, 1)
    of_row = torch.where(target != ignore_index, -gradient, 0.0)
    classes = torch.arange(x.shape[1], dtype=target.dtype, device=x.device)
    return torch.where(classes == target, of_row, 0.0).to(x.dtype)


DECOMPOSITIONS = {aten._log_softmax.default: log_softmax, aten.nll_loss_backward.default: nll_loss_backward}
