"""Rules for special functions, written with what our expressions have.

All are computed in f64 and rounded once: power series near zero, asymptotic ones far from it, where both are more exact than f32.
f64 tensors stay PyTorch's, whose functions are exact to its last digits.

    I, J, K, Y      series in x^2/4 up to a bound, then Hankel's expansions
    lgamma          Lanczos (g = 7, nine terms) with the reflection formula
    digamma         recurrence up to arguments above 8, then Bernoulli's terms
    erfinv          Winitzki's start, four steps of Halley
    erfc, erfcx     `t exp(polynomial(t))`, `t = 2 / (2 + |x|)`
"""

from __future__ import annotations

import math

import torch

from .elementwise import formula
from .sizes import Unsupported
from .writer import Value, Writer, rule, wide

aten = torch.ops.aten
F64 = torch.float64
EULER = 0.5772156649015329


def polynomial(coefficients, x: str) -> str:
    """Horner's form, from the constant on."""
    text = f"({coefficients[-1]!r})"
    for c in reversed(coefficients[:-1]):
        text = f"({c!r} + {x} * {text})"
    return text


def series(order: int, terms: int, sign: int, weight=lambda k: 1.0) -> list[float]:
    """Coefficients in `x^2/4` of `sum sign^k weight(k) / (k! (k + order)!)`."""
    return [sign**k * weight(k) / (math.factorial(k) * math.factorial(k + order)) for k in range(terms)]


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


def hankel(order: int, terms: int) -> list[float]:
    """The numbers of Hankel's expansions: `prod (4 order^2 - (2j-1)^2) / (k! 8^k)`."""
    found = [1.0]
    for k in range(1, terms):
        found.append(found[-1] * (4 * order * order - (2 * k - 1) ** 2) / (8 * k))
    return found


class Text:
    """A rule's values in f64, each named by a formula of those before."""

    def __init__(self, w: Writer, node, x: Value):
        if node.meta["val"].dtype is F64:
            raise Unsupported("special functions of f64")
        self.w, self.result = w, node.meta["val"].dtype
        self.x = w.cast(x, F64)

    def __call__(self, text: str, *operands) -> Value:
        return formula(self.w, text, operands, F64, F64)

    def polynomial(self, coefficients, x: Value) -> Value:
        """Horner's form in pieces, since formulas may not nest deeply."""
        value, rest = None, list(coefficients)
        while rest:
            piece, rest = rest[-12:], rest[:-12]
            if value is None:
                value = self(polynomial(piece, "{a}"), x)
            else:
                text = polynomial([*piece, 1.0], "{a}")
                value = self(text.replace("(1.0)", "{b}"), x, value)
        return value

    def done(self, text: str, *operands) -> Value:
        return formula(self.w, text, operands, F64, self.result)


def modified_first(t: Text, order: int, scaled: bool) -> Value:
    """I of order 0 or 1; `scaled`: times exp(-|x|)."""
    size = t("abs({a})", t.x)
    quarter = t("{a} * {a} / 4", t("min({a}, 20)", size))
    near = t.polynomial(series(order, 45, 1), quarter)
    near = t("{a} * exp(-{b})" + ("" if order == 0 else " * {b} / 2"), near, t("min({a}, 20)", size))
    signs = [c * (-1) ** k for k, c in enumerate(hankel(order, 12))]
    inverse = t("1 / max({a}, 20)", size)
    far = t(f"{polynomial(signs, '{a}')} * sqrt({{a}} / {2 * math.pi!r})", inverse)
    value = t("where({a} < 20, {b}, {c})", size, near, far)
    value = value if scaled else t("{a} * exp({b})", value, size)
    text = "{a}" if order == 0 else "where({b} < 0, -{a}, {a})"
    return t.done(f"where(isnan({{b}}), {{b}}, {text})", value, t.x)


def modified_second(t: Text, order: int, scaled: bool) -> Value:
    """K of order 0 or 1; infinite at 0, and not a number below."""
    bound = t("min(max({a}, 1e-300), 8)", t.x)
    quarter = t("{a} * {a} / 4", bound)
    first = t.polynomial(series(order, 30, 1), quarter)
    if order == 0:
        sums = t.polynomial(series(0, 30, 1, harmonic), quarter)
        near = t(f"{{a}} - (log({{b}} / 2) + {EULER!r}) * {{c}}", sums, bound, first)
    else:
        weight = lambda k: harmonic(k) + harmonic(k + 1) - 2 * EULER  # noqa: E731
        sums = t.polynomial(series(1, 30, 1, weight), quarter)
        near = t("1 / {b} + {b} / 2 * (log({b} / 2) * {c} - {a} / 2)", sums, bound, first)
    near = t("{a} * exp({b})", near, bound)
    inverse = t("1 / max({a}, 8)", t.x)
    far = t(f"{polynomial(hankel(order, 14), '{a}')} * sqrt({{a}} * {math.pi / 2!r})", inverse)
    value = t("where({a} < 8, {b}, {c})", t.x, near, far)
    value = value if scaled else t("{a} * exp(-{b})", value, t.x)
    return t.done("where({b} < 0, nan, where({b} == 0, inf, {a}))", value, t.x)


def waves(t: Text, size: Value, order: int) -> tuple[Value, Value]:
    """The amplitudes of cosine and sine, and the factor in front, of Hankel's expansions for large arguments."""
    numbers = hankel(order, 16)
    inverse = t("1 / max({a}, 12)", size)
    even = [numbers[k] * (-1) ** (k // 2) for k in range(0, 16, 2)]
    odd = [numbers[k] * (-1) ** (k // 2) for k in range(1, 16, 2)]
    square = t("{a} * {a}", inverse)
    p = t(f"{polynomial(even, '{a}')} * sqrt({{b}} * {2 / math.pi!r})", square, inverse)
    q = t(f"{polynomial(odd, '{a}')} * {{b}} * sqrt({{b}} * {2 / math.pi!r})", square, inverse)
    return p, q


def bessel(t: Text, order: int, second: bool) -> Value:
    """J and Y of order 0 or 1."""
    size = t("abs({a})", t.x)
    bound = t("max(min({a}, 12), 1e-300)", size)
    quarter = t("{a} * {a} / 4", bound)
    first = t("{a} * {b} / 2" if order else "{a}", t.polynomial(series(order, 40, -1), quarter), bound)
    near = first
    if second and order == 0:
        sums = t.polynomial(series(0, 40, -1, harmonic), quarter)
        near = t(f"((log({{b}} / 2) + {EULER!r}) * {{c}} - {{a}}) * {2 / math.pi!r}", sums, bound, first)
    elif second:
        weight = lambda k: harmonic(k) + harmonic(k + 1) - 2 * EULER  # noqa: E731
        sums = t.polynomial(series(1, 40, -1, weight), quarter)
        text = f"(-2 / {{b}} + 2 * log({{b}} / 2) * {{c}} - {{b}} / 2 * {{a}}) / {math.pi!r}"
        near = t(text, sums, bound, first)
    p, q = waves(t, size, order)
    angle = t(f"{{a}} - {math.pi / 4 + order * math.pi / 2!r}", size)
    text = "{a} * sin({c}) + {b} * cos({c})" if second else "{a} * cos({c}) - {b} * sin({c})"
    far = t(f"where(isinf({{c}}), 0, {text})", p, q, angle)
    value = t("where({a} < 12, {b}, {c})", size, near, far)
    if second:
        return t.done("where({b} < 0, nan, where({b} == 0, -inf, {a}))", value, t.x)
    return t.done("{a}" if order == 0 else "where({b} < 0, -{a}, {a})", value, t.x)


def _register() -> None:
    table = [
        ("i0", modified_first, 0, False), ("special_i0e", modified_first, 0, True),
        ("special_i1", modified_first, 1, False), ("special_i1e", modified_first, 1, True),
        ("special_modified_bessel_i0", modified_first, 0, False), ("special_modified_bessel_i1", modified_first, 1, False),
        ("special_modified_bessel_k0", modified_second, 0, False), ("special_modified_bessel_k1", modified_second, 1, False),
        ("special_scaled_modified_bessel_k0", modified_second, 0, True),
        ("special_scaled_modified_bessel_k1", modified_second, 1, True),
        ("special_bessel_j0", bessel, 0, False), ("special_bessel_j1", bessel, 1, False),
        ("special_bessel_y0", bessel, 0, True), ("special_bessel_y1", bessel, 1, True),
    ]  # fmt: skip
    for name, function, order, flag in table:

        @rule(getattr(aten, name).default)
        def special(w, node, x, function=function, order=order, flag=flag):
            return function(Text(w, node, x), order, flag)


_register()

LANCZOS = [
    0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
    12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
]  # fmt: skip


@rule(aten.lgamma.default)
def lgamma(w, node, x):
    t = Text(w, node, x)
    z = t("where({a} < 0.5, -{a}, {a} - 1)", t.x)
    terms = " + ".join([repr(LANCZOS[0]), *(f"({c!r}) / ({{a}} + {i})" for i, c in enumerate(LANCZOS) if i)])
    total = t(terms, z)
    base = t("{a} + 7.5", z)
    value = t(f"{math.log(2 * math.pi) / 2!r} + ({{a}} + 0.5) * log({{b}}) - {{b}} + log({{c}})", z, base, total)
    # sin(pi x) of the fraction, which is exact.
    sine = t(f"abs(sin({math.pi!r} * ({{a}} - round({{a}}))))", t.x)
    mirrored = t(f"{math.log(math.pi)!r} - log({{a}}) - {{b}}", sine, value)
    result = t("where({a} < 0.5, {b}, {c})", t.x, mirrored, value)
    return t.done("where(isinf({b}) | (({b} <= 0) & (floor({b}) == {b})), inf, {a})", result, t.x)


@rule(aten.digamma.default)
def digamma(w, node, x):
    t = Text(w, node, x)
    z = t("where({a} < 0.5, 1 - {a}, {a})", t.x)
    steps = t(" + ".join(f"1 / ({{a}} + {i})" for i in range(8)), z)
    far = t("1 / ({a} + 8)", z)
    square = t("{a} * {a}", far)
    bernoulli = [1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132]
    value = t(f"-log({{a}}) - {{a}} / 2 - {{b}} * {polynomial(bernoulli, '{b}')} - {{c}}", far, square, steps)
    fraction = t("{a} - round({a})", t.x)
    mirrored = t(f"{{a}} - {math.pi!r} * cos({math.pi!r} * {{b}}) / sin({math.pi!r} * {{b}})", value, fraction)
    result = t("where({a} < 0.5, {b}, {c})", t.x, mirrored, value)
    # At zero PyTorch gives the infinity of the other sign.
    edges = "where({b} == 0, -1 / {b}, where(({b} < 0) & (floor({b}) == {b}), nan, where({b} == inf, inf, {a})))"
    return t.done(edges, result, t.x)


@rule(aten.polygamma.default)
def polygamma(w, node, n, x):
    if int(n) != 0:
        raise Unsupported("derivatives of digamma")
    return digamma(w, node, x)


def inverse_erf(t: Text, x: Value) -> Value:
    """Winitzki's approximation, then Halley's steps; infinite at the ends."""
    inside = t("min(max({a}, -0.99999999999999), 0.99999999999999)", x)
    logarithm = t("log(1 - {a} * {a})", inside)
    part = t(f"{2 / (math.pi * 0.147)!r} + {{a}} / 2", logarithm)
    y = t("sqrt(max(sqrt({a} * {a} - {b} / 0.147) - {a}, 0))", part, logarithm)
    y = t("where({b} < 0, -{a}, {a})", y, inside)
    for _ in range(4):
        step = t(f"(erf({{a}}) - {{b}}) / ({2 / math.sqrt(math.pi)!r} * exp(-{{a}} * {{a}}))", y, inside)
        y = t("{a} - {b} / (1 + {a} * {b})", y, step)
    return t("where(abs({b}) > 1, nan, where({b} == 1, inf, where({b} == -1, -inf, where({b} == 0, {b}, {a}))))", y, x)


@rule(aten.erfinv.default)
def erfinv(w, node, x):
    t = Text(w, node, x)
    return t.done("{a}", inverse_erf(t, t.x))


@rule(aten.angle.default)
def angle(w, node, x):
    result = node.meta["val"].dtype
    score = wide(result)
    return formula(w, "where({a} != {a}, {a}, where({a} < 0, {b}, {c}))", (x, math.pi, 0.0), score, result)


# Of the logarithm of `erfc(x) exp(x^2) / t` in `2t - 1`, `t = 2 / (2 + x)`, for x from 0 on: least squares at 64 Chebyshev points; errors below 1e-12.
COMPLEMENT = [
    -0.6717940840570035, 0.6726432239801888, 0.04734330690396467, -0.04689561041932332, -0.009872691406257926,
    0.008824942685071934, 0.0017589595130712116, -0.002345854179877469, -0.00014641400598572237, 0.0006739112493355534,
    -9.312060405263712e-05, -0.00017508769322470132, 7.004272196219675e-05, 3.3422946392202405e-05, -2.838081678980735e-05,
    -2.1644383751724245e-06, 7.222565238876158e-06, -9.568633795786494e-07, -9.025567824964785e-07, 2.3447561996272805e-07,
]  # fmt: skip


def complement_of(t: Text, size: Value) -> Value:
    """`erfcx` of numbers that are not negative."""
    part = t("2 / (2 + {a})", size)
    exponent = t.polynomial(COMPLEMENT, t("2 * {a} - 1", part))
    return t("{a} * exp({b})", part, exponent)


@rule(aten.erfc.default, aten.special_erfc.default)
def erfc(w, node, x):
    t = Text(w, node, x)
    size = t("abs({a})", t.x)
    tail = t("{a} * exp(-{b} * {b})", complement_of(t, t("min({a}, 40)", size)), t("min({a}, 40)", size))
    return t.done("where({b} != {b}, {b}, where({b} < 0, 2 - {a}, {a}))", tail, t.x)


@rule(aten.special_erfcx.default)
def erfcx(w, node, x):
    t = Text(w, node, x)
    size = t("min(abs({a}), 1e300)", t.x)
    tail = complement_of(t, size)
    return t.done("where({b} != {b}, {b}, where({b} < 0, 2 * exp({c} * {c}) - {a}, {a}))", tail, t.x, size)
