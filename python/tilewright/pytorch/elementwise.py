"""Rules for elementwise operators: one line each where a formula is all there is.

A formula's operands `{a} {b} {c}` are converted to the type in which PyTorch computes (`wide` of the result's, or
the promoted type of the operands for comparisons), and the result is rounded once. Scalars become literals.
"""

from __future__ import annotations

import math

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
    aten.asinh: "asinh({a})",
    aten.acosh: "acosh({a})",
    aten.atanh: "atanh({a})",
    aten.log10: f"log({{a}}) * {1 / math.log(10)!r}",
    aten.erf: "erf({a})",
    aten.sigmoid: "sigmoid({a})",
    aten.relu: "max({a}, 0)",
    aten.relu6: "clamp({a}, 0, 6)",
    aten.silu: "{a} * sigmoid({a})",
    aten.mish: "mish({a})",
    aten.hardswish: "{a} * clamp({a} + 3, 0, 6) / 6",
    aten.hardsigmoid: "clamp({a} + 3, 0, 6) / 6",
    aten.bitwise_not: "~{a}",
    aten.deg2rad: f"{{a}} * {math.pi / 180!r}",
    aten.rad2deg: f"{{a}} * {180 / math.pi!r}",
    aten.special_entr: "where({a} > 0, -{a} * log({a}), where({a} == 0, 0, where(isnan({a}), {a}, -inf)))",
    aten.special_ndtr: f"(1 + erf({{a}} * {math.sqrt(0.5)!r})) / 2",
    aten.special_spherical_bessel_j0: "where(isinf({a}), 0, where(abs({a}) < 0.5, "
    "1 + {a} * {a} * (-1 / 6.0 + {a} * {a} * (1 / 120.0 + {a} * {a} * (-1 / 5040.0 + {a} * {a} * (1 / 362880.0)))), sin({a}) / {a}))",
}

# Integers are what they give already.
ROUNDING = {aten.floor: "floor({a})", aten.ceil: "ceil({a})", aten.trunc: "trunc({a})"}

# Comparisons: in the promoted type of the operands, giving bool.
COMPARISONS = {aten.eq: "==", aten.ne: "!=", aten.lt: "<", aten.le: "<=", aten.gt: ">", aten.ge: ">="}

# Formulas of two operands, in the result's type.
BINARY = {
    aten.fmax: "where(isnan({a}), {b}, where(isnan({b}), {a}, max({a}, {b})))",
    aten.fmin: "where(isnan({a}), {b}, where(isnan({b}), {a}, min({a}, {b})))",
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
                    if "isnan" in text and not node.meta["val"].dtype.is_floating_point:
                        return in_result_type(w, node, "max({a}, {b})" if "max" in text else "min({a}, {b})", a, b)
                    return in_result_type(w, node, text, a, b)

    for packet, text in ROUNDING.items():

        @rule(packet.default)
        def rounded(w, node, a, text=text):
            return in_result_type(w, node, text, a) if a.dtype.is_floating_point else a

    for packet, sign in COMPARISONS.items():
        for overload in ("Tensor", "Scalar"):

            @rule(getattr(packet, overload))
            def compare(w, node, a, b, sign=sign):
                common = promoted(node)
                if common is torch.bool:
                    common = torch.uint8
                return formula(w, f"{{a}} {sign} {{b}}", (a, b), common, torch.bool)


_register()


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(w, node, a, b):
    return in_result_type(w, node, "{a} & {b}" if node.meta["val"].dtype is torch.bool else "{a} * {b}", a, b)


@rule(aten.add.Tensor, aten.add.Scalar)
def add(w, node, a, b, alpha=1):
    if node.meta["val"].dtype is torch.bool:
        return in_result_type(w, node, "{a} | {b}" if alpha else "{a}", a, b)
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
        divides(w, b)
        text = "{a} / {b}" if rounding_mode == "trunc" else "({a} - mod({a}, {b})) / {b}"
        return in_result_type(w, node, "{a} / {b}" if rounding_mode is None else text, a, b)
    if rounding_mode == "floor":
        return floor_division(w, node, a, b)
    return in_result_type(w, node, "trunc({a} / {b})" if rounding_mode else "{a} / {b}", a, b)


def divides(w: Writer, b) -> None:
    """An integer divisor: PyTorch raises an error for zeros, so it must be seen before the group runs."""
    if isinstance(b, Value):
        w.divisor(b)
    elif not isinstance(b, int) or b == 0:
        raise Unsupported(f"integer division by {b}")


def floor_division(w, node, a, b):
    """The quotient is made of the remainder, and its rounding is corrected; zero divisors give infinities, as in PyTorch."""
    result = node.meta["val"].dtype
    score = wide(result)
    rest = formula(w, "rem({a}, {b})", (a, b), score, score)
    exact = formula(w, "({a} - {c}) / {b} - where(({c} != 0) & (({b} < 0) != ({c} < 0)), 1, 0)", (a, b, rest), score, score)
    near = formula(w, "floor({a}) + where({a} - floor({a}) > 0.5, 1, 0)", (exact,), score, score)
    # Infinite quotients come from plain division.
    text = "where({b} == 0, {a} / {b}, where({c} == 0, 0 * ({a} / {b}), {d}))"
    return formula(w, text, (a, b, exact, near), score, result)


@rule(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor, aten.remainder.Scalar_Tensor)
def remainder(w, node, a, b):
    name = "rem" if node.target in (aten.fmod.Scalar, aten.fmod.Tensor) else "mod"
    if not node.meta["val"].dtype.is_floating_point:
        divides(w, b)
    return in_result_type(w, node, f"{name}({{a}}, {{b}})", a, b)


@rule(aten.pow.Tensor_Scalar)
def pow_scalar(w, node, a, exponent):
    simple = {2: "{a} * {a}", 3: "{a} * {a} * {a}", 1: "{a}", 0.5: "sqrt({a})", -0.5: "rsqrt({a})", -1: "1 / {a}"}
    result = node.meta["val"].dtype
    if exponent in simple and (result.is_floating_point or exponent in (1, 2, 3)):
        return in_result_type(w, node, simple[exponent], a)
    if not result.is_floating_point:
        if not isinstance(exponent, int) or not 0 <= exponent <= 8:
            raise Unsupported("integers to a high power, or a negative one")
        return in_result_type(w, node, " * ".join(["{a}"] * exponent) or "{a} * 0 + 1", a)
    return in_result_type(w, node, "{a} ** {b}", a, exponent)


@rule(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(w, node, a, b):
    if not node.meta["val"].dtype.is_floating_point:
        raise Unsupported("integers to the power of a tensor")
    return in_result_type(w, node, "{a} ** {b}", a, b)


@rule(aten.sign.default)
def sign(w, node, a):
    return in_result_type(w, node, "where({a} > {d}, {b}, where({a} < {d}, {c}, {d}))", a, 1, -1, 0)


@rule(aten.round.default)
def round_(w, node, a):
    return in_result_type(w, node, "round({a})", a) if a.dtype.is_floating_point else a


@rule(aten.round.decimals)
def round_decimals(w, node, a, *, decimals=0):
    if not a.dtype.is_floating_point:
        raise Unsupported("decimals of integers")
    scale = 10.0 ** abs(decimals)
    text = "round({a} * {b}) / {b}" if decimals >= 0 else "round({a} / {b}) * {b}"
    return in_result_type(w, node, text, a, scale)


@rule(aten.bitwise_left_shift.Tensor, aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor, aten.bitwise_right_shift.Tensor_Scalar)
def shift(w, node, a, b):
    """Amounts below zero and beyond the width push every bit out."""
    bits = torch.iinfo(node.meta["val"].dtype).bits
    left = "left" in str(node.target)
    out = "0" if left else "where({a} < 0, -1, 0)" if node.meta["val"].dtype.is_signed else "0"
    inside = f"{{a}} {'<<' if left else '>>'} max({{b}}, 0)"
    return in_result_type(w, node, f"where(({{b}} < 0) | ({{b}} >= {bits}), {out}, {inside})", a, b)


# Whether a number has a minus, which zeros may have, too. Of NaN it says no.
NEGATIVE = "({x} < 0) | (({x} == 0) & ({one} / {x} < 0))"


@rule(aten.copysign.Tensor, aten.copysign.Scalar)
def copysign(w, node, a, b):
    return in_result_type(w, node, f"where({NEGATIVE.format(x='{b}', one='{c}')}, -abs({{a}}), abs({{a}}))", a, b, 1)


@rule(aten.signbit.default)
def signbit(w, node, a):
    if a.dtype.is_floating_point:
        return formula(w, NEGATIVE.format(x="{a}", one="{b}"), (a, 1), wide(a.dtype), torch.bool)
    return w.map("{a} < 0", a, dtype=torch.bool) if a.dtype is not torch.bool else w.expand(w.number(0, torch.bool), a.shape)


@rule(aten.hypot.default)
def hypot(w, node, a, b):
    """Scaled by the larger one, so that squares stay finite."""
    result = node.meta["val"].dtype
    score = wide(result)
    large = formula(w, "max(abs({a}), abs({b}))", (a, b), score, score)
    small = formula(w, "min(abs({a}), abs({b}))", (a, b), score, score)
    ratio = formula(w, "where({a} == {b}, 1, {a} / {b})", (small, large), score, score)
    text = "where(isinf({b}), {b}, where({b} == 0, 0, {b} * sqrt(1 + {a} * {a})))"
    return formula(w, text, (ratio, large), score, result)


@rule(aten.isnan.default, aten.isinf.default)
def is_nan(w, node, a):
    if not a.dtype.is_floating_point:
        return w.expand(w.number(0, torch.bool), node.meta["val"].shape)
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


@rule(
    aten.empty.memory_format,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.empty_like.default,
)
def empty(w, node, *args, **options):
    """Memory whose content nobody may rely on."""
    wanted = node.meta["val"]
    return w.expand(w.number(0, wanted.dtype), wanted.shape)


@rule(aten.new_full.default)
def new_full(w, node, _a, _shape, value, **options):
    wanted = node.meta["val"]
    return w.expand(w.number(value, wanted.dtype), wanted.shape)
