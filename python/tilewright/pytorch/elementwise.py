"""Rules for elementwise operators: one line each where a formula is all there is.

A formula's operands `{a} {b} {c}` are converted to the type in which PyTorch computes (`wide` of the result's, or
the promoted type of the operands for comparisons), and the result is rounded once. Scalars become literals.
"""

from __future__ import annotations

import torch

from .sizes import Unsupported
from .writer import Value, Writer, dtype_name, literal, rule, wide

aten = torch.ops.aten
prims = torch.ops.prims

# Formulas of one operand, in the result's type.
UNARY = {
    aten.abs: "abs({a})",
    aten.neg: "-{a}",
    aten.exp: "exp({a})",
    aten.exp2: "exp2({a})",
    aten.expm1: "expm1({a})",
    aten.log: "log({a})",
    aten.log2: "log2({a})",
    aten.log1p: "log1p({a})",
    aten.sqrt: "sqrt({a})",
    aten.rsqrt: "rsqrt({a})",
    aten.reciprocal: "1 / {a}",
    aten.square: "{a} * {a}",
    aten.sin: "sin({a})",
    aten.cos: "cos({a})",
    aten.tan: "tan({a})",
    aten.asin: "asin({a})",
    aten.acos: "acos({a})",
    aten.atan: "atan({a})",
    aten.sinh: "sinh({a})",
    aten.cosh: "cosh({a})",
    aten.tanh: "tanh({a})",
    aten.erf: "erf({a})",
    aten.sigmoid: "sigmoid({a})",
    aten.relu: "max({a}, 0)",
    aten.relu6: "clamp({a}, 0, 6)",
    aten.silu: "{a} * sigmoid({a})",
    aten.mish: "mish({a})",
    aten.hardswish: "{a} * clamp({a} + 3, 0, 6) / 6",
    aten.hardsigmoid: "clamp({a} + 3, 0, 6) / 6",
    aten.floor: "floor({a})",
    aten.ceil: "ceil({a})",
    aten.trunc: "trunc({a})",
    aten.bitwise_not: "~{a}",
}

# Comparisons: in the promoted type of the operands, giving bool.
COMPARISONS = {aten.eq: "==", aten.ne: "!=", aten.lt: "<", aten.le: "<=", aten.gt: ">", aten.ge: ">="}

# Formulas of two operands, in the result's type.
BINARY = {
    aten.mul: "{a} * {b}",
    aten.maximum: "max({a}, {b})",
    aten.minimum: "min({a}, {b})",
    aten.atan2: "atan2({a}, {b})",
    aten.bitwise_and: "{a} & {b}",
    aten.bitwise_or: "{a} | {b}",
    aten.bitwise_xor: "{a} ^ {b}",
}


def formula(w: Writer, text: str, operands, compute: torch.dtype, result: torch.dtype) -> Value:
    """`text` of operands (values, numbers or symbolic sizes), computed in one type and rounded to another."""
    names, values = {}, []
    for name, operand in zip("abcdefgh", operands):
        if isinstance(operand, torch.SymInt):
            operand = w.number(operand, compute)
        if isinstance(operand, Value):
            parameter = "xyzuvpqr"[len(values)]
            source, word = w.narrow(operand), parameter
            for held, wanted in ((source, operand.dtype), (operand, compute)):
                if held.dtype != wanted:
                    word = f"{dtype_name(wanted)}({word})"
            values.append(source)
            names[name] = word
        elif isinstance(operand, (bool, int, float)):
            names[name] = literal(operand, compute)
        else:
            raise Unsupported(f"the operand {operand!r}")
    if not values:
        raise Unsupported("no tensor among the operands")
    body = text.format(**names)
    boolean = any(f" {sign} " in text for sign in COMPARISONS.values()) and "where" not in text
    if not boolean and compute != result:
        body = f"{dtype_name(result)}({body})"
    parameters = ", ".join("xyzuvpqr"[: len(values)])
    return w.op(f"map {{ {parameters} -> {body} }}", *values, dtype=result)


def in_result_type(w: Writer, node, text: str, *operands) -> Value:
    """A formula in the type of the node's result."""
    result = node.meta["val"].dtype
    return formula(w, text, operands, wide(result), result)


def promoted(node) -> torch.dtype:
    """The type that PyTorch promotes a node's first two operands to."""
    return torch.result_type(*(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args[:2]))


def _register() -> None:
    for packet, text in UNARY.items():

        @rule(packet.default)
        def unary(w, node, a, text=text):
            if node.target is aten.bitwise_not.default and a.dtype is torch.bool:
                return w.map("!{a}", a, dtype=torch.bool)
            return in_result_type(w, node, text, a)

    for packet, text in BINARY.items():
        for overload in ("Tensor", "Scalar", "default"):
            if hasattr(packet, overload):

                @rule(getattr(packet, overload))
                def binary(w, node, a, b, text=text):
                    return in_result_type(w, node, text, a, b)

    for packet, sign in COMPARISONS.items():
        for overload in ("Tensor", "Scalar"):

            @rule(getattr(packet, overload))
            def compare(w, node, a, b, sign=sign):
                common = promoted(node)
                if common is torch.bool:
                    common = torch.uint8
                return formula(w, f"{{a}} {sign} {{b}}", (a, b), common, torch.bool)


_register()


@rule(aten.add.Tensor, aten.add.Scalar)
def add(w, node, a, b, alpha=1):
    return in_result_type(w, node, "{a} + {b}", a, b) if alpha == 1 else in_result_type(w, node, "{a} + {b} * {c}", a, b, alpha)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(w, node, a, b, alpha=1):
    return in_result_type(w, node, "{a} - {b}", a, b) if alpha == 1 else in_result_type(w, node, "{a} - {b} * {c}", a, b, alpha)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(w, node, a, b, alpha=1):
    return in_result_type(w, node, "{b} - {a}", a, b) if alpha == 1 else in_result_type(w, node, "{b} - {a} * {c}", a, b, alpha)


@rule(aten.addcmul.default)
def addcmul(w, node, a, b, c, value=1):
    return in_result_type(w, node, "{a} + {d} * {b} * {c}", a, b, c, value)


@rule(aten.addcdiv.default)
def addcdiv(w, node, a, b, c, value=1):
    return in_result_type(w, node, "{a} + {d} * {b} / {c}", a, b, c, value)


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def div(w, node, a, b):
    return in_result_type(w, node, "{a} / {b}", a, b)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def div_mode(w, node, a, b, rounding_mode="floor"):
    result = node.meta["val"].dtype
    if not result.is_floating_point:
        # PyTorch raises an error for a zero divisor, which cannot be seen from here.
        if not isinstance(b, int) or b == 0:
            raise Unsupported("integer division by a tensor")
        text = "{a} / {b}" if rounding_mode == "trunc" else "({a} - mod({a}, {b})) / {b}"
        return in_result_type(w, node, "{a} / {b}" if rounding_mode is None else text, a, b)
    if rounding_mode == "floor":
        # PyTorch corrects the rounding of the quotient, and has its own rules for infinities.
        raise Unsupported("floor division of floats")
    return in_result_type(w, node, "trunc({a} / {b})" if rounding_mode else "{a} / {b}", a, b)


@rule(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor)
def remainder(w, node, a, b):
    name = "mod" if node.target in (aten.remainder.Scalar, aten.remainder.Tensor) else "rem"
    if not node.meta["val"].dtype.is_floating_point and (not isinstance(b, int) or b == 0):
        raise Unsupported("integer division by a tensor")
    return in_result_type(w, node, f"{name}({{a}}, {{b}})", a, b)


@rule(aten.pow.Tensor_Scalar)
def pow_scalar(w, node, a, exponent):
    simple = {2: "{a} * {a}", 3: "{a} * {a} * {a}", 1: "{a}", 0.5: "sqrt({a})", -0.5: "rsqrt({a})", -1: "1 / {a}"}
    result = node.meta["val"].dtype
    if exponent in simple and (result.is_floating_point or exponent in (1, 2, 3)):
        return in_result_type(w, node, simple[exponent], a)
    if not result.is_floating_point:
        raise Unsupported("integer powers")
    return in_result_type(w, node, "{a} ** {b}", a, exponent)


@rule(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(w, node, a, b):
    if not node.meta["val"].dtype.is_floating_point:
        raise Unsupported("integer powers")
    return in_result_type(w, node, "{a} ** {b}", a, b)


@rule(aten.sign.default)
def sign(w, node, a):
    return in_result_type(w, node, "where({a} > {d}, {b}, where({a} < {d}, {c}, {d}))", a, 1, -1, 0)


@rule(aten.round.default)
def round_(w, node, a):
    return in_result_type(w, node, "round({a})", a) if a.dtype.is_floating_point else a


@rule(aten.isnan.default, aten.isinf.default)
def is_nan(w, node, a):
    if not a.dtype.is_floating_point:
        raise Unsupported("integers that are not numbers")
    return w.map("isnan({a})" if node.target is aten.isnan.default else "isinf({a})", a, dtype=torch.bool)


@rule(aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default)
def logical(w, node, a, b):
    sign = {aten.logical_and.default: "&", aten.logical_or.default: "|"}.get(node.target, "^")
    return w.map(f"{{a}} {sign} {{b}}", w.cast(a, torch.bool), w.cast(b, torch.bool), dtype=torch.bool)


@rule(aten.logical_not.default)
def logical_not(w, node, a):
    return w.map("!{a}", w.cast(a, torch.bool), dtype=torch.bool)


@rule(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def clamp(w, node, a, low=None, high=None):
    if node.target is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    if low is None:
        return in_result_type(w, node, "min({a}, {b})", a, high)
    if high is None:
        return in_result_type(w, node, "max({a}, {b})", a, low)
    return in_result_type(w, node, "min(max({a}, {b}), {c})", a, low, high)


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(w, node, a, low):
    return in_result_type(w, node, "max({a}, {b})", a, low)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(w, node, a, high):
    return in_result_type(w, node, "min({a}, {b})", a, high)


@rule(aten.where.self)
def where(w, node, condition, a, b):
    result = node.meta["val"].dtype
    condition = w.cast(condition, torch.bool)
    a = a if isinstance(a, Value) else w.number(a, result)
    b = b if isinstance(b, Value) else w.number(b, result)
    return w.map("where({a}, {b}, {c})", condition, w.cast(a, result), w.cast(b, result), dtype=result)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(w, node, a, mask, value):
    if not isinstance(value, Value):
        value = w.number(value, a.dtype)
    return w.map("where({a}, {b}, {c})", w.cast(mask, torch.bool), w.cast(value, a.dtype), a, dtype=a.dtype)


@rule(aten.gelu.default)
def gelu(w, node, a, approximate="none"):
    return in_result_type(w, node, "gelu({a})" if approximate == "none" else "gelu_tanh({a})", a)


@rule(aten.leaky_relu.default)
def leaky_relu(w, node, a, slope=0.01):
    return in_result_type(w, node, "where({a} > 0, {a}, {a} * {b})", a, slope)


@rule(aten.elu.default)
def elu(w, node, a, alpha=1.0, scale=1.0, input_scale=1.0):
    text = "where({a} > 0, {a} * {c}, expm1({a} * {d}) * {b} * {c})"
    return in_result_type(w, node, text, a, alpha, scale, input_scale)


@rule(aten.softplus.default)
def softplus(w, node, a, beta=1.0, threshold=20.0):
    return in_result_type(w, node, "where({a} * {b} > {c}, {a}, log1p(exp({a} * {b})) / {b})", a, beta, threshold)


@rule(aten.threshold_backward.default)
def threshold_backward(w, node, grad, a, threshold):
    return in_result_type(w, node, "where({b} <= {c}, 0, {a})", grad, a, threshold)


@rule(aten._to_copy.default, prims.convert_element_type.default)
def to_copy(w, node, a, dtype=None, **options):
    del dtype, options
    return w.cast(a, node.meta["val"].dtype)


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default)
def same(w, node, a, **options):
    del options
    return a


@rule(aten.copy.default)
def copy(w, node, a, source, *rest):
    del rest
    return w.expand(w.cast(source, a.dtype), node.meta["val"].shape)


@rule(aten.scalar_tensor.default)
def scalar_tensor(w, node, value, **options):
    return w.number(value, node.meta["val"].dtype)


@rule(aten.full.default, aten.full_like.default)
def full(w, node, _shape, value, **options):
    wanted = node.meta["val"]
    return w.expand(w.number(value, wanted.dtype), wanted.shape)


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def zeros_or_ones(w, node, *args, **options):
    wanted = node.meta["val"]
    ones = node.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
    return w.expand(w.number(int(ones), wanted.dtype), wanted.shape)


@rule(aten.new_full.default)
def new_full(w, node, _a, _shape, value, **options):
    wanted = node.meta["val"]
    return w.expand(w.number(value, wanted.dtype), wanted.shape)
