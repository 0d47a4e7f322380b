//! The prelude: functions of the language written in the language itself.
//!
//! They are expanded where they are called, in any float type. A new one is a line of [`TEXT`]
//! (uses of functions below their definition are fine). Activation functions are written so that their
//! derivatives at kinks are those of PyTorch's: `where` says which side a kink belongs to, `max` gives it to its first operand.

use crate::ast::Program;
use crate::lex::Source;
use crate::parse::{Form, parse};
use std::sync::OnceLock;

/// The definitions.
pub(crate) const TEXT: &str = "
# Shapes of numbers
sqr(x) = x * x;
cube(x) = x * x * x;
recip(x) = 1 / x;
lerp(a, b, t) = a + t * (b - a);
clamp(x, low, high) = min(max(x, low), high);
saturate(x) = clamp(x, 0, 1);
fract(x) = x - floor(x);
step(edge, x) = where(x < edge, 0, 1);
smoothstep(a, b, x) = { let t = saturate((x - a) / (b - a)); t * t * (3 - 2 * t) };
hypot(x, y) = sqrt(x * x + y * y);
copysign(x, s) = where(s < 0 || 1 / s < 0, -abs(x), abs(x));
isfinite(x) = !(isnan(x) || isinf(x));
degrees(x) = x * (180 / pi);
radians(x) = x * (pi / 180);
log10(x) = log(x) * 0.43429448190325182765112891891660508;
exp10(x) = exp(x * 2.30258509299404568401799145468436421);
erfc(x) = 1 - erf(x);
logit(x) = log(x / (1 - x));

# Activation functions
relu(x) = where(x <= 0, 0, x);
relu6(x) = where(x <= 0, 0, where(x >= 6, 6, x));
leaky_relu(x, a) = where(x > 0, x, a * x);
prelu(x, a) = leaky_relu(x, a);
elu(x, a) = where(x > 0, x, a * expm1(x));
celu(x, a) = where(x > 0, x, a * expm1(x / a));
selu(x) = 1.0507009873554804934193349852946
    * where(x > 0, x, 1.6732632423543772848170429916717 * expm1(x));
silu(x) = x * sigmoid(x);
swish(x, b) = x * sigmoid(b * x);
gelu(x) = 0.5 * x * (1 + erf(x * 0.70710678118654752440084436210484904));
gelu_tanh(x) = 0.5 * x * (1 + tanh(0.79788456080286535587989211986876373 * (x + 0.044715 * x * x * x)));
quick_gelu(x) = x * sigmoid(1.702 * x);
softplus(x) = where(x > 0, x, 0) + log1p(exp(where(x > 0, -x, x)));
logsigmoid(x) = -softplus(-x);
softsign(x) = x / (1 + abs(x));
mish(x) = x * tanh(softplus(x));
hardtanh(x) = where(x <= -1, -1, where(x >= 1, 1, x));
hardsigmoid(x) = where(x <= -3, 0, where(x >= 3, 1, x / 6 + 0.5));
hardswish(x) = x * hardsigmoid(x);
tanhshrink(x) = x - tanh(x);
softshrink(x, l) = where(x > l, x - l, where(x < -l, x + l, 0));
hardshrink(x, l) = where(x > l || x < -l, x, 0);
threshold(x, t, v) = where(x > t, x, v);
";

/// The parsed prelude.
pub(crate) fn prelude() -> &'static Program {
    static PROGRAM: OnceLock<Program> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        parse(&Source::new("<prelude>", TEXT), Form::Prelude)
            .unwrap_or_else(|errors| panic!("the prelude does not parse: {errors:?}"))
    })
}
