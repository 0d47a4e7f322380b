"""What PyTorch has as one operator for speed in eager mode, taken apart into operators that have rules.

    _transformer_encoder_layer_fwd, _native_multi_head_attention    the "fast path" of `nn.TransformerEncoderLayer` and
                                                                     `nn.MultiheadAttention` in inference
    _weight_norm_interface_backward                                  the gradient of weight norm
    _embedding_bag and its gradient                                  sums and means of rows of a table, as products with zeros and ones
                                                                     where those are small
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


DECOMPOSITIONS = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten._native_multi_head_attention.default: self_attention,
    aten._weight_norm_interface_backward.default: weight_norm_backward,
}
