"""Embedding bags: sums, means and maxima of rows of a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._define import pair, single, traced

_MODES = {"sum": 0, "mean": 1, "max": 2}
_NONE = -(2**63)


def _composed(weight, indices, offsets, per_sample_weights, mode, padding_idx):
    bag_of = torch.searchsorted(offsets, torch.arange(indices.numel(), device=indices.device), right=True) - 1
    kept = indices != padding_idx
    count = torch.zeros_like(offsets).index_add(0, bag_of, kept.long())
    name = {v: k for k, v in _MODES.items()}[mode]
    padding = None if padding_idx == _NONE else padding_idx
    y = F.embedding_bag(indices, weight, offsets, mode=name, per_sample_weights=per_sample_weights, padding_idx=padding)
    place = offsets.new_empty((0,))
    if mode == 2:
        columns = weight.shape[1]
        at = torch.arange(indices.numel(), device=indices.device).unsqueeze(1).expand(-1, columns)
        hit = (weight[indices] == y[bag_of]) & kept.unsqueeze(1)
        none = at.new_full((offsets.numel(), columns), indices.numel())
        place = none.scatter_reduce(0, bag_of.unsqueeze(1).expand(-1, columns), at.where(hit, indices.numel()), "amin")
        place = place.where(place < indices.numel(), -1).reshape(-1)
    return y, bag_of, count, place


def _fake(weight, indices, offsets, per_sample_weights, mode, padding_idx):
    bags, columns = offsets.shape[0], weight.shape[1]
    place = offsets.new_empty((bags * columns if mode == 2 else 0,))
    return weight.new_empty((bags, columns)), torch.empty_like(indices), torch.empty_like(offsets), place


def _backward_composed(dy, order, position, per_sample_weights, bag_of, count, place, rows, mode, padding_idx):
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    bag = bag_of[position]
    g = dy.to(wide)[bag]
    if mode == 1:
        g = g / count[bag].clamp(min=1).unsqueeze(1)
    if per_sample_weights is not None:
        g = g * per_sample_weights.to(wide)[position].unsqueeze(1)
    if mode == 2:
        g = torch.where(place.reshape(dy.shape)[bag] == position.unsqueeze(1), g, 0)
    g = torch.where((order == padding_idx).unsqueeze(1), 0, g)
    return torch.zeros(rows, dy.shape[1], dtype=wide, device=dy.device).index_add_(0, order, g).to(dy.dtype)


def _weights_composed(dy, weight, indices, bag_of, padding_idx):
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    g = (weight[indices].to(wide) * dy[bag_of].to(wide)).sum(1)
    return torch.where(indices == padding_idx, 0, g).to(dy.dtype)


_backward = single(
    "embedding_bag_backward",
    fake=lambda dy, order, position, weights, bag_of, count, place, rows, *_: dy.new_empty((rows, dy.shape[1])),
    composed=_backward_composed,
)
_weights_backward = single(
    "embedding_bag_weights_backward",
    fake=lambda dy, weight, indices, *_: dy.new_empty(indices.shape),
    composed=_weights_composed,
)


def _save(ctx, inputs, output):
    weight, indices, _, per_sample_weights, ctx.mode, ctx.padding_idx = inputs
    _, bag_of, count, place = output
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(weight if per_sample_weights is not None else None, indices, per_sample_weights, bag_of, count, place)
    ctx.mark_non_differentiable(bag_of, count, place)


def _gradient(ctx, dy, *_):
    weight, indices, per_sample_weights, bag_of, count, place = ctx.saved_tensors
    if dy is None:
        return (None,) * 6
    table = weights = None
    if ctx.needs_input_grad[0]:
        order, position = torch.sort(indices, stable=True)
        table = _backward(dy, order, position, per_sample_weights, bag_of, count, place, ctx.rows, ctx.mode, ctx.padding_idx)
    if per_sample_weights is not None and ctx.needs_input_grad[3]:
        weights = _weights_backward(dy, weight, indices, bag_of, ctx.padding_idx)
    return table, None, None, weights, None, None


_bag = pair("embedding_bag", fake=_fake, composed=_composed, save=_save, gradient=_gradient, kept=1)
_now = _bag.now


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: torch.Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
) -> torch.Tensor:
    """Sums, means or maxima of rows of `weight [N, D]`, as `torch.nn.functional.embedding_bag` without `max_norm` and `sparse`.

    `input` is one axis of row numbers with `offsets`, where each bag begins, or a matrix, a bag per line. Numbers are int32 or int64.
    `per_sample_weights` are for sums. The gradient of `weight` is dense, and its sums have one order. On the CPU a number outside of the table
    is refused; on a GPU its bag is NaN.
    """
    plain = offsets is not None and per_sample_weights is None and not include_last_offset and mode in _MODES and not traced()
    if plain and input.dim() == 1 and input.dtype == offsets.dtype == torch.int64:
        padding = _NONE if padding_idx is None else padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0]
        y = _now(weight, input, offsets, None, _MODES[mode], padding)
        if y is not None:
            return y
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {list(_MODES)}")
    if per_sample_weights is not None and mode != "sum":
        raise NotImplementedError("per_sample_weights are for mode='sum' only")
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        raise ValueError(f"per_sample_weights has shape {list(per_sample_weights.shape)}, and input {list(input.shape)}")
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("a matrix of row numbers takes no offsets")
        lines, length = input.shape
        offsets = torch.arange(0, lines * length, length, device=input.device) if length else input.new_zeros((lines,))
        input = input.reshape(-1)
    elif input.dim() != 1:
        raise ValueError(f"input has shape {list(input.shape)}; it must have one axis or two")
    elif offsets is None:
        raise ValueError("row numbers of one axis need offsets")
    elif include_last_offset:
        if offsets.numel() == 0:
            raise ValueError("include_last_offset needs at least one offset")
        input = input[: int(offsets[-1])] if input.device.type == "cpu" else input
        offsets = offsets[:-1]
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)[: input.shape[0]].to(weight.dtype)
    for name, numbers in (("input", input), ("offsets", offsets)):
        if numbers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {numbers.dtype}; it must be int32 or int64")
    padding = _NONE if padding_idx is None else padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
    return _bag(weight, input.long(), offsets.long(), weights, _MODES[mode], padding)
