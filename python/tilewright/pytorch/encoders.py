"""What PyTorch has as one operator for speed in eager mode, taken apart into operators that have rules.

    _transformer_encoder_layer_fwd, _native_multi_head_attention    the "fast path" of `nn.TransformerEncoderLayer` and
                                                                     `nn.MultiheadAttention` in inference
    _weight_norm_interface_backward                                  the gradient of weight norm
    _embedding_bag and its gradient                                  sums and means of rows of a table, as products with zeros and ones
                                                                     where those are small
    fake_quantize_..._cachemask                                      rounding to codes and back
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx.experimental import proxy_tensor

aten = torch.ops.aten


def attention(x, heads, qkv_weight, qkv_bias, out_weight, out_bias, mask):
    """Self-attention of rows `[batch, length, width]`; a mask is true (or not zero) where nothing is looked at."""
    batch, length, width = x.shape
    parts = F.linear(x, qkv_weight, qkv_bias).view(batch, length, 3, heads, width // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    seen = None
    if mask is not None:
        seen = mask.to(torch.bool).logical_not()
    y = torch.ops.tilewright.whole_attention(q, k, v, seen, False, None, False)
    return F.linear(y.transpose(1, 2).reshape(batch, length, width), out_weight, out_bias)


def shaped(mask, mask_type, batch: int, length: int):
    """A mask with an axis for each of the scores': type 0 is of rows and columns, 1 of sequences, 2 has all axes."""
    if mask is None:
        return None
    if mask_type == 1:
        return mask.reshape(batch, 1, 1, length)
    return mask.reshape(1, 1, length, length) if mask.dim() == 2 else mask


def encoder_layer(
    src, width, heads, qkv_weight, qkv_bias, out_weight, out_bias, use_gelu, norm_first, eps,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, up_weight, up_bias, down_weight, down_bias, mask=None, mask_type=None,
):  # fmt: skip
    """The decomposition of `_transformer_encoder_layer_fwd`."""
    if src.dim() != 3 or src.layout is not torch.strided:
        return NotImplemented
    mask = shaped(mask, mask_type, src.shape[0], src.shape[1])
    x = src
    y = F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps) if norm_first else x
    x = x + attention(y, heads, qkv_weight, qkv_bias, out_weight, out_bias, mask)
    if not norm_first:
        x = F.layer_norm(x, (width,), norm1_weight, norm1_bias, eps)
    y = F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps) if norm_first else x
    y = F.linear(y, up_weight, up_bias)
    x = x + F.linear(F.gelu(y) if use_gelu else F.relu(y), down_weight, down_bias)
    return x if norm_first else F.layer_norm(x, (width,), norm2_weight, norm2_bias, eps)


def self_attention(
    query, key, value, width, heads, qkv_weight, qkv_bias, out_weight, out_bias,
    mask=None, need_weights=True, average_attn_weights=True, mask_type=None,
):  # fmt: skip
    """The decomposition of `_native_multi_head_attention` of one tensor, whose weights nobody asks for."""
    if query is not key or key is not value or need_weights or query.dim() != 3 or query.layout is not torch.strided:
        return NotImplemented
    mask = shaped(mask, mask_type, query.shape[0], query.shape[1])
    y = attention(query, heads, qkv_weight, qkv_bias, out_weight, out_bias, mask)
    return y, query.new_empty(0)


def weight_norm_backward(grad, v, g, norms, dim):
    """The decomposition of `_weight_norm_interface_backward`: of `v * g / norm(v)`, the norm over all axes but one."""
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    norms = norms.to(torch.float32) if v.dtype in (torch.float16, torch.bfloat16) else norms
    along = (grad * v).sum(axes, keepdim=True)
    grad_v = g / norms * (grad - v * (along / (norms * norms)))
    return grad_v.to(v.dtype), (along / norms).to(g.dtype)


# Multiplications up to which bags of different lengths are a product with zeros and ones.
BAGS_MAX = 2**22


def bag_length(indices, offsets, bags: int) -> int | None:
    """How many positions each bag has, where the graph says that all have as many: those that PyTorch makes of a matrix of positions."""
    mode = proxy_tensor.get_proxy_mode()
    slot = None if mode is None else proxy_tensor.get_proxy_slot(offsets, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    if node is None or node.target is not aten.arange.start_step or len(node.args) != 3:
        return None
    start, end, step = node.args
    count = indices.shape[0]
    return step if (start, end) == (0, count) and isinstance(step, int) and step > 0 and bags * step == count else None


def embedding_bag(
    weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None, include_last_offset=False, padding_idx=-1
):
    """The decomposition of `_embedding_bag`: sums (0) and means (1)."""
    bags = offsets.shape[0] - int(include_last_offset)
    sizes = [*weight.shape, *indices.shape, bags]
    if mode not in (0, 1) or indices.dim() != 1 or not all(isinstance(n, int) for n in sizes) or 0 in sizes:
        return NotImplemented
    count, width = indices.shape[0], weight.shape[1]
    length = bag_length(indices, offsets, bags)
    if length is None and count * bags * width > BAGS_MAX:
        return NotImplemented
    rows = aten.embedding(weight, indices)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    counts = indices != padding_idx if padding_idx >= 0 else torch.ones_like(indices, dtype=torch.bool)
    if padding_idx >= 0:
        rows = torch.where(counts.unsqueeze(1), rows, 0)
    place = torch.arange(count, device=indices.device, dtype=indices.dtype)
    if length is not None:
        bag = place // length
        total, sizes = rows.view(bags, length, width).sum(1), counts.view(bags, length).sum(1)
    else:
        bag = (place.unsqueeze(1) >= offsets[:bags].unsqueeze(0)).sum(1).to(indices.dtype) - 1
        member = bag.unsqueeze(0) == torch.arange(bags, device=indices.device, dtype=indices.dtype).unsqueeze(1)
        total, sizes = member.to(rows.dtype) @ rows, (member & counts.unsqueeze(0)).sum(1)
    if mode == 1:
        total = total / sizes.clamp(min=1).to(total.dtype).unsqueeze(1)
    return total, bag, sizes.to(indices.dtype), torch.zeros_like(sizes)


def embedding_bag_backward(
    grad, indices, offsets, bag, sizes, largest, rows, scale_grad_by_freq, mode, sparse, per_sample_weights, padding_idx=-1
):
    """The decomposition of `_embedding_bag_backward`: each position has the gradient of its bag."""
    if mode not in (0, 1) or sparse or scale_grad_by_freq or not all(isinstance(n, int) for n in (*grad.shape, *indices.shape)):
        return NotImplemented
    if bag.shape != indices.shape or 0 in (*grad.shape, *indices.shape):
        return NotImplemented
    if mode == 1:
        grad = grad / sizes.clamp(min=1).to(grad.dtype).unsqueeze(1)
    each = aten.index_select(grad, 0, bag)
    if per_sample_weights is not None:
        each = each * per_sample_weights.unsqueeze(1)
    return aten.embedding_dense_backward(each, indices, rows, padding_idx, False)


def bag_weights_backward(grad, weight, indices, offsets, bag, mode, padding_idx=-1):
    """The decomposition of `_embedding_bag_per_sample_weights_backward`: of a sum of rows times numbers."""
    if mode != 0 or bag.shape != indices.shape or not all(isinstance(n, int) and n for n in (*grad.shape, *indices.shape)):
        return NotImplemented
    found = (aten.index_select(grad, 0, bag) * aten.embedding(weight, indices)).sum(1)
    return torch.where(indices == padding_idx, 0, found) if padding_idx >= 0 else found


def quantized(x, scale, zero_point, low, high):
    """The decomposition of `fake_quantize_per_tensor_affine_cachemask`: codes and back, and which numbers had a code."""
    codes = torch.round(x * (1.0 / scale)) + zero_point
    return (codes.clamp(low, high) - zero_point) * scale, (codes >= low) & (codes <= high)


def quantized_by_channel(x, scale, zero_point, axis, low, high):
    """The decomposition of `fake_quantize_per_channel_affine_cachemask`."""
    shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    scale, zero_point = scale.view(shape), zero_point.view(shape)
    codes = torch.round(x * (1.0 / scale)) + zero_point
    found = (torch.minimum(torch.maximum(codes, torch.full_like(codes, low)), torch.full_like(codes, high)) - zero_point) * scale
    return found.to(x.dtype), (codes >= low) & (codes <= high)


DECOMPOSITIONS = {
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag,
    aten._embedding_bag_backward.default: embedding_bag_backward,
    aten._embedding_bag_per_sample_weights_backward.default: bag_weights_backward,
    aten.fake_quantize_per_tensor_affine_cachemask.default: quantized,
    aten.fake_quantize_per_channel_affine_cachemask.default: quantized_by_channel,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten._native_multi_head_attention.default: self_attention,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
}
