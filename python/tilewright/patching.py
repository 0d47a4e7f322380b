"""`patch`: the pack's operators in a model of transformers, and back."""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable

from . import _torch

_torch("patching")

import torch  # noqa: E402

from . import ops  # noqa: E402
from .ops import attentions, formulas, rotations  # noqa: E402


class Patch:
    """What was changed. `undo()` takes it back; as a context manager it does so at the end."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self._back: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Makes the model what it was."""
        while self._back:
            self._back.pop()()
        self.changes = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for change in self.changes:
            what = change.split(": ", 1)[1]
            counts[what] = counts.get(what, 0) + 1
        return "\n".join(f"{n:4} x {what}" for what, n in counts.items()) or "nothing changed"

    __repr__ = __str__

    def _forward(self, name: str, module: torch.nn.Module, forward: Callable, what: str, *first: Any) -> None:
        # Not a method: those are pickled by their name, which the module's class does not have.
        module.forward = functools.partial(forward, *first, module)
        self._back.append(lambda: module.__dict__.pop("forward", None))
        self.changes.append(f"{name}: {type(module).__name__} is {what}")


def patch(model: torch.nn.Module, norms=True, activations=True, rotary=True, loss=True, attention=True) -> Patch:
    """Puts the pack's operators into a model of transformers, in place: norms, activations of MLPs, rotary embedding, loss and
    attention. The result lists what was changed, and `undo()` takes it back. Modules that are not known stay as they are.

    Rotary embeddings are functions that all models of a kind share: they change for all of them.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch takes a module, not {type(model).__name__}")
    done = Patch()
    for name, module in model.named_modules():
        name = name or "model"
        if "forward" in module.__dict__:
            continue
        if norms:
            _norm(done, name, module)
        if activations:
            _activation(done, name, module)
    if rotary:
        _rotary(done, model)
    if loss and hasattr(model, "loss_function"):
        _loss(done, model)
    if attention and hasattr(model, "set_attn_implementation"):
        _attention(done, model)
    return done


# ---- norms ---------------------------------------------------------------------------------------------


def _norm(done: Patch, name: str, module: torch.nn.Module) -> None:
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.LayerNorm):
        if len(module.normalized_shape) == 1:
            done._forward(name, module, _layer_norm, "tilewright.ops.layer_norm")
    elif kind.endswith("RMSNorm") and isinstance(weight, torch.Tensor) and weight.dim() == 1:
        if kind.startswith("Gemma") and not kind.startswith("Gemma3n"):
            if hasattr(module, "eps"):
                done._forward(name, module, _gemma_norm, "tilewright.ops.rms_norm")
        elif hasattr(module, "variance_epsilon"):
            done._forward(name, module, _rms_norm, "tilewright.ops.rms_norm")


def _layer_norm(self, x):
    return ops.layer_norm(x, self.weight, self.bias, self.eps)


def _rms_norm(self, x):
    return ops.rms_norm(x, self.weight, self.variance_epsilon)


def _gemma_norm(self, x):
    return ops.rms_norm(x, self.weight + 1, self.eps)


# ---- activations ---------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "GELUActivation": formulas._GELU,
    "NewGELUActivation": formulas._GELU_TANH,
    "GELUTanh": formulas._GELU_TANH,
    "PytorchGELUTanh": formulas._GELU_TANH,
    "QuickGELUActivation": formulas.elementwise("x * sigmoid(1.702 * x)"),
    "SiLUActivation": formulas._SILU,
    "SiLU": formulas._SILU,
}
_GATED = {
    "SiLUActivation": formulas._SWIGLU,
    "SiLU": formulas._SWIGLU,
    "GELUActivation": formulas._GEGLU,
    "NewGELUActivation": formulas._GEGLU_TANH,
    "GELUTanh": formulas._GEGLU_TANH,
    "PytorchGELUTanh": formulas._GEGLU_TANH,
}


def _formula(module: torch.nn.Module, table: dict) -> Any:
    if isinstance(module, torch.nn.GELU):
        kind = "GELUActivation" if module.approximate == "none" else "GELUTanh"
        return table.get(kind)
    return table.get(type(module).__name__)


def _activation(done: Patch, name: str, module: torch.nn.Module) -> None:
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if all(isinstance(part, torch.nn.Module) for part in parts) and type(module).__name__.endswith("MLP"):
        formula = _formula(parts[3], _GATED)
        if formula is not None:
            done._forward(name, module, _gated, f"gated by {formula!r}", formula)
        return
    formula = _formula(module, _ACTIVATIONS)
    if formula is not None:
        done._forward(name, module, _activated, repr(formula), formula)


def _gated(formula, self, x):
    return self.down_proj(formula(self.gate_proj(x), self.up_proj(x)))


def _activated(formula, self, x):
    return formula(x)


# ---- rotary embedding, loss, attention -----------------------------------------------------------------


def _rotary(done: Patch, model: torch.nn.Module) -> None:
    for name in sorted({type(m).__module__ for m in model.modules()}):
        source = sys.modules.get(name)
        known = getattr(source, "apply_rotary_pos_emb", None)
        plain = getattr(source, "rotate_half", None)
        # Only the form by halves, which every model's own `rotate_half` shows.
        if known is None or plain is None or known is rotations.apply_rotary_pos_emb or not name.startswith("transformers."):
            continue
        x = torch.arange(4.0)
        if not torch.equal(plain(x), torch.tensor([-2.0, -3.0, 0.0, 1.0])):
            continue
        code = known.__code__
        if code.co_varnames[: code.co_argcount] not in (_ROTARY, _ROTARY[:4]) or not _turns_alike(known):
            continue
        source.apply_rotary_pos_emb = rotations.apply_rotary_pos_emb
        done._back.append(lambda source=source, known=known: setattr(source, "apply_rotary_pos_emb", known))
        done.changes.append(f"{name}.apply_rotary_pos_emb: rotary embedding is tilewright.ops.rotary")


_ROTARY = ("q", "k", "cos", "sin", "unsqueeze_dim")


def _turns_alike(known: Callable) -> bool:
    """Whether a model's own function gives what ours gives, with tables as wide as the heads, and half as wide where it takes such."""
    q, k = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4), torch.linspace(-2, 1, 12).reshape(1, 1, 3, 4)
    for width in (4, 2):
        table = torch.linspace(0, 3, 3 * width).reshape(1, 3, width)
        try:
            wanted = known(q, k, table.cos(), table.sin())
        except RuntimeError:
            if width == 4:
                return False
            continue
        found = rotations.apply_rotary_pos_emb(q, k, table.cos(), table.sin())
        if any(a.shape != b.shape or not torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found)):
            return False
    return True


def _causal_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _loss_of(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def _masked_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **_):
    return _loss_of(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def _loss_of(logits, labels, vocab_size, count, ignore_index):
    logits, labels = logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device)
    loss = ops.cross_entropy(logits, labels, ignore_index, reduction="mean" if count is None else "sum")
    return loss if count is None else loss / count


def _loss(done: Patch, model: Any) -> None:
    known = model.loss_function
    ours = {"ForCausalLMLoss": _causal_loss, "ForMaskedLMLoss": _masked_loss}.get(getattr(known, "__name__", ""))
    if ours is None:
        return
    before = model.__dict__.get("_loss_function")
    model.loss_function = ours

    def back():
        if before is None:
            model.__dict__.pop("_loss_function", None)
        else:
            model.loss_function = before

    done._back.append(back)
    done.changes.append("loss_function: the loss is tilewright.ops.cross_entropy")


def register_attention() -> None:
    """Makes `attn_implementation="tilewright"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("tilewright", attentions.transformers_attention)
    AttentionMaskInterface.register("tilewright", sdpa_mask)


if "transformers" in sys.modules:
    # A patched model that is read from a file names it.
    register_attention()


def _attention(done: Patch, model: Any) -> None:
    before = getattr(model.config, "_attn_implementation", None)
    # Models without PyTorch's fused attention have what ours lacks as well: caps of scores, sinks.
    if before not in ("sdpa", "eager") or not getattr(model, "_supports_sdpa", False):
        return
    register_attention()
    try:
        model.set_attn_implementation("tilewright")
    except ValueError:
        return
    if model.config._attn_implementation != "tilewright":
        return
    done._back.append(lambda: model.set_attn_implementation(before))
    done.changes.append("attention: attention is tilewright.ops.attention")
