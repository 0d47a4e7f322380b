"""Tilewright's functions inside JAX: values and gradients beside JAX's own, under `jit` and `vmap`; wrong arguments.

    python tests/python/test_jax.py [cuda] [TEST...] [I/N] [--jobs N]

Needs JAX (python/requirements-jax.txt). With `cuda` it runs on JAX's default device; tests by their functions' names; `1/4` takes every
fourth of the cases (`CASES`) only; with `--jobs` so many processes share them.
"""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

if "cuda" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libtilewright_python.so"


def install() -> None:
    """Puts the package with the library of this build first on the path, with a cache of its own."""
    if "TILEWRIGHT_PACKAGE" in os.environ:
        sys.path.insert(0, os.environ["TILEWRIGHT_PACKAGE"])
        return
    folder = tempfile.mkdtemp(prefix="tilewright-jax-")
    package = pathlib.Path(folder, "tilewright")
    shutil.copytree(ROOT / "python" / "tilewright", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(LIBRARY, package / "_native.abi3.so")
    os.environ["TILEWRIGHT_CACHE"] = str(pathlib.Path(folder, "cache"))
    sys.path.insert(0, folder)


install()

import jax  # noqa: E402
import jax.export  # noqa: E402
import jax.test_util  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import tilewright.jax as tj  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
NUMBERS = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(NUMBERS.normal(size=shape), dtype)


def near(found, wanted, dtype, what, times=1.0):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (what, found.dtype, found.shape, wanted.shape)
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    scale = max(np.abs(wanted).max(initial=0.0), 1e-30)
    error = np.abs(found - wanted).max(initial=0.0) / scale
    assert error <= times * {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}[jnp.dtype(dtype).name], (what, error)


def widened(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def layer_norm(x, w, b):
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return (y * widened(w) + widened(b)).astype(x.dtype)


def rms_norm(x, w):
    wide = widened(x)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6) * widened(w)).astype(x.dtype)


def attention(q, k, v):
    return textbook(q, k, v, q.shape[-1] ** -0.5, causal=True)


def textbook(q, k, v, scale, causal=False, mask=None):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(t.astype(wide), q.shape[1] // k.shape[1], axis=1) for t in (k, v))
    score = jnp.einsum("bhqd,bhkd->bhqk", q.astype(wide), k, precision="highest") * scale
    if mask is not None:
        score = jnp.where(mask, score, -jnp.inf) if mask.dtype == jnp.bool_ else score + mask
    if causal:
        rows, columns = score.shape[-2:]
        score = jnp.where(jnp.tril(jnp.ones((rows, columns), bool), columns - rows), score, -jnp.inf)
    seen = (score > -jnp.inf).any(-1, keepdims=True)
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, 0.0), -1), 0.0)
    return jnp.einsum("bhqk,bhkd->bhqd", p, v, precision="highest").astype(q.dtype)


def losses(x, targets, ignore=-100, smoothing=0.0, z_loss=0.0, softcap=0.0):
    z = widened(x)
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    lse = jax.scipy.special.logsumexp(z, -1)
    picked = jnp.take_along_axis(z, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    loss = lse - (1 - smoothing) * picked - smoothing * z.mean(-1) + z_loss * lse * lse
    return jnp.where(targets == ignore, 0.0, loss)


def rotated(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return x * cos[:, None] + jnp.concatenate([-b, a], -1) * sin[:, None]


def beside(pair):
    return jnp.concatenate(pair, -1)


def dropped(x, key, p):
    """Dropout by numbers that are drawn here, one after the other."""
    kept = np.array(philox(x.size, key)).reshape(x.shape) >= round(p * 2**32)
    return jnp.where(kept, x / (1 - p), 0.0).astype(x.dtype)


def philox(count, key):
    words = []
    for counter in range(-(-count // 4)):
        c, k = [counter & LOW, counter >> 32, 0, 0], [key & LOW, key >> 32 & LOW]
        for _ in range(7):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [q >> 32 ^ c[1] ^ k[0], q & LOW, p >> 32 ^ c[3] ^ k[1], p & LOW]
            k = [k[0] + 0x9E3779B9 & LOW, k[1] + 0xBB67AE85 & LOW]
        words += c
    return words[:count]


LOW = 0xFFFFFFFF
ALLOWED = jnp.asarray(NUMBERS.integers(0, 2, (2, 1, 8, 24)), bool).at[0, 0, 3].set(False)
TARGETS = jnp.asarray(NUMBERS.integers(0, 33, (3, 5)), jnp.int32).at[1, 2].set(-100)
TABLES = [array(n, 6, 8) for n in (1, 1, 2, 2)]
GELU = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
CASES = {
    "softmax": (tj.softmax, jax.nn.softmax, [(5, 33)]),
    "softmax of the first axis": (lambda x: tj.softmax(x, 0), lambda x: jax.nn.softmax(x, 0), [(7, 3)]),
    "log_softmax": (tj.log_softmax, jax.nn.log_softmax, [(2, 3, 17)]),
    "layer_norm": (tj.layer_norm, layer_norm, [(4, 6, 40), (40,), (40,)]),
    "rms_norm": (tj.rms_norm, rms_norm, [(9, 48), (48,)]),
    "swiglu": (tj.swiglu, lambda a, b: jax.nn.silu(a) * b, [(6, 20), (6, 20)]),
    "geglu": (tj.geglu, lambda a, b: GELU(a) * b, [(6, 20), (6, 20)]),
    "tanh glu": (lambda a, b: tj.glu(a, b, "gelu_tanh"), lambda a, b: jax.nn.gelu(a) * b, [(3, 8), (3, 8)]),
    "linear": (tj.linear, lambda x, w: x @ w, [(2, 5, 16), (16, 24)]),
    "linear with bias": (tj.linear, lambda x, w, b: x @ w + b, [(7, 16), (16, 24), (24,)]),
    "linear, gelu": (
        lambda x, w, b: tj.linear(x, w, b, "gelu"), lambda x, w, b: GELU(x @ w + b), [(7, 16), (16, 24), (24,)],
    ),
    "linear, relu": (lambda x, w: tj.linear(x, w, None, "relu"), lambda x, w: jax.nn.relu(x @ w), [(7, 16), (16, 8)]),
    "rms_norm of a sum": (
        lambda x, r, w: beside(tj.rms_norm(x, w, residual=r)), lambda x, r, w: beside((rms_norm(x + r, w), x + r)), [(9, 48), (9, 48), (48,)],
    ),
    "layer_norm of a sum": (
        lambda x, r, w, b: beside(tj.layer_norm(x, w, b, residual=r)), lambda x, r, w, b: beside((layer_norm(x + r, w, b), x + r)),
        [(4, 3, 40), (4, 3, 40), (40,), (40,)],
    ),
    "rotary": (lambda x: tj.rotary(x, *TABLES[:2]), lambda x: rotated(x, *TABLES[:2]), [(2, 4, 6, 8)]),
    "rotary, tables of each batch": (lambda x: tj.rotary(x, *TABLES[2:]), lambda x: rotated(x, *TABLES[2:]), [(2, 4, 6, 8)]),
    "cross_entropy": (
        lambda x: tj.cross_entropy(x, TARGETS, reduction="none").astype(x.dtype), lambda x: losses(x, TARGETS), [(3, 5, 33)],
    ),
    "cross_entropy with all terms": (
        lambda x: tj.cross_entropy(x, TARGETS, label_smoothing=0.1, z_loss=1e-2, softcap=3.0, reduction="none").astype(x.dtype),
        lambda x: losses(x, TARGETS, -100, 0.1, 1e-2, 3.0), [(3, 5, 33)],
    ),
    "quick gelu": (tj.elementwise("x * sigmoid(1.702 * x)"), lambda x: x * jax.nn.sigmoid(1.702 * x), [(3, 7)]),
    "a formula of three": (
        tj.elementwise("where(x > 0 && !(y < x), x * y, exp(x) + min(y, z) % 0.75)"),
        lambda x, y, z: jnp.where((x > 0) & ~(y < x), x * y, jnp.exp(x) + jnp.fmod(jnp.minimum(y, z), 0.75)), [(3, 7), (3, 7), (3, 7)],
    ),
    "silu": (tj.silu, jax.nn.silu, [(2, 3, 5)]),
    "gelu": (tj.gelu, jax.nn.gelu, [(2, 3, 5)]),
    "exact gelu": (lambda x: tj.gelu(x, approximate=False), GELU, [(2, 3, 5)]),
    "linear, silu, bias and residual": (
        lambda x, w, b, r: tj.linear(x, w, b, "silu", residual=r), lambda x, w, b, r: jax.nn.silu(x @ w + b) + r, [(7, 16), (16, 24), (24,), (7, 24)],
    ),
    "linear with residual": (lambda x, w, r: tj.linear(x, w, residual=r), lambda x, w, r: x @ w + r, [(2, 3, 16), (16, 24), (2, 3, 24)]),
    "dropout": (lambda x: tj.dropout(x, 7, 0.3), lambda x: dropped(x, 7, 0.3), [(3, 11)]),
    "dropout with residual": (lambda x, r: tj.dropout(x, 1 << 40, 0.6, residual=r), lambda x, r: dropped(x, 1 << 40, 0.6) + r, [(3, 11), (3, 11)]),
    "attention with a mask": (
        lambda q, k, v, m: tj.attention(q, k, v, mask=m), lambda q, k, v, m: textbook(q, k, v, 16**-0.5, mask=m),
        [(2, 2, 8, 16), (2, 1, 24, 16), (2, 1, 24, 16), (1, 2, 8, 24)],
    ),
    "attention where it is allowed": (
        lambda q, k, v: tj.attention(q, k, v, True, 0.3, ALLOWED), lambda q, k, v: textbook(q, k, v, 0.3, True, ALLOWED),
        [(2, 2, 8, 16), (2, 2, 24, 16), (2, 2, 24, 32)],
    ),
    "attention": (
        lambda q, k, v: tj.attention(q, k, v, causal=True), attention, [(2, 4, 16, 32), (2, 2, 16, 32), (2, 2, 16, 32)],
    ),
}  # fmt: skip


def values_and_gradients_are_those_of_jax():
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, (ours, theirs, shapes) in CASES.items():
            arrays = [array(*shape, dtype=dtype) for shape in shapes]
            wanted = theirs(*[a.astype(jnp.float32) for a in arrays]).astype(dtype)
            near(jax.jit(ours)(*arrays), wanted, dtype, name)
            weight = array(*wanted.shape)

            def loss(function):
                return lambda *xs: (function(*xs).astype(jnp.float32) * weight).sum()

            numbers = tuple(range(len(arrays)))
            found = jax.jit(jax.grad(loss(ours), numbers))(*arrays)
            exact = jax.grad(loss(theirs), numbers)(*[a.astype(jnp.float32) for a in arrays])
            for i, (f, e) in enumerate(zip(found, exact)):
                near(f, e.astype(dtype), dtype, f"{name}, gradient {i}")


def calls_are_batched():
    """`vmap` over all arguments, over the first, and over the others: one call each, with gradients."""
    for name, (ours, theirs, shapes) in CASES.items():
        first = (0,) + (None,) * (len(shapes) - 1)
        others = (None,) + (0,) * (len(shapes) - 1)
        for axes in {(0,) * len(shapes), first, others if len(shapes) > 1 else first}:
            arrays = [array(*((3,) if axis == 0 else ()), *shape) for axis, shape in zip(axes, shapes)]
            batched = jax.jit(jax.vmap(ours, axes))
            wanted = jax.vmap(theirs, axes)(*arrays)
            near(batched(*arrays), wanted, jnp.float32, f"vmap {axes} of {name}")
            calls = batched.lower(*arrays).as_text().count(f"@{tj.TARGET}")
            assert calls == 1, f"vmap {axes} of {name}: {calls} calls"
            weight = array(*wanted.shape[1:])
            numbers = tuple(range(len(arrays)))

            def slopes(function):
                return jax.vmap(jax.grad(lambda *xs: (function(*xs) * weight).sum(), numbers), axes)

            for i, (f, e) in enumerate(zip(jax.jit(slopes(ours))(*arrays), slopes(theirs)(*arrays))):
                near(f, e, jnp.float32, f"vmap {axes} of {name}, gradient {i}")


def losses_are_reduced():
    """Means leave out rows that are ignored, targets may be of 64 bits, and have a batch of their own."""
    x = array(3, 5, 33)
    each = losses(x, TARGETS)
    for reduction, wanted in (("mean", each.sum() / 14), ("sum", each.sum())):
        near(jax.jit(lambda x: tj.cross_entropy(x, TARGETS, reduction=reduction))(x), wanted, jnp.float32, reduction)  # noqa: B023
    found = jax.jit(jax.vmap(lambda x, t: tj.cross_entropy(x, t, reduction="sum"), (None, 0)))(x[0], TARGETS)
    near(found, jnp.stack([losses(x[0], t).sum() for t in TARGETS]), jnp.float32, "targets with a batch")
    hidden = jnp.full((3, 5), -100, jnp.int32)
    assert jnp.isnan(tj.cross_entropy(x, hidden)) and tj.cross_entropy(x, hidden, reduction="sum") == 0
    empty = tj.cross_entropy(x[:0], TARGETS[:0], reduction="none")
    assert empty.shape == (0, 5)


def losses_behind_products():
    """As the losses of logits, in chunks of all sizes; gradients of all operands."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, w, b = array(15, 24, dtype=dtype), array(24, 33, dtype=dtype) / 4, array(33, dtype=dtype)
        t = TARGETS.reshape(-1)
        exact = [a.astype(jnp.float32) for a in (x, w, b)]
        for rows, bias, reduction in ((None, True, "mean"), (4, True, "mean"), (1, False, "sum"), (5, False, "mean"), (7, True, "sum")):
            def ours(x, w, *b):
                return tj.linear_cross_entropy(x, w, t, b[0] if b else None, -100, 0.1, 1e-2, 9.0, reduction, rows)  # noqa: B023

            def theirs(x, w, *b):
                each = losses(x @ w + (b[0] if b else 0.0), t, -100, 0.1, 1e-2, 9.0)
                return each.sum() / (14 if reduction == "mean" else 1)  # noqa: B023

            n = 3 if bias else 2
            arrays = (x, w, b)[:n]
            what = f"linear_cross_entropy {dtype.__name__}, rows={rows}, {reduction}"
            near(jax.jit(ours)(*arrays), theirs(*exact[:n]), dtype, what)
            found = jax.jit(jax.grad(lambda *a: 3 * ours(*a), tuple(range(n))))(*arrays)  # noqa: B023
            for i, (f, e) in enumerate(zip(found, jax.grad(lambda *a: 3 * theirs(*a), tuple(range(n)))(*exact[:n]))):  # noqa: B023
                near(f, e.astype(dtype), dtype, f"{what}, gradient {i}")


def losses_behind_products_are_never_all_there():
    """The largest thing in memory is a chunk's logits."""
    x, w, t = jnp.ones((512, 8)), jnp.ones((8, 4096)), jnp.zeros(512, jnp.int32)
    step = jax.jit(jax.grad(lambda x, w: tj.linear_cross_entropy(x, w, t, rows=32), (0, 1)))
    most = step.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    assert most < 8 * 32 * 4096 * 4 < 512 * 4096 * 4, most


def random_numbers_follow_their_key():
    """Keys in all their forms; one key for a batch and a key for each; shares."""
    x = jnp.ones((4, 1000))
    wanted = dropped(x, 5, 0.25)
    for key in (5, np.int64(5), jnp.int32(5), jax.random.key(5), jax.random.PRNGKey(5)):
        near(jax.jit(lambda x, k: tj.dropout(x, k, 0.25))(x, key), wanted, jnp.float32, f"key {key!r}")
    near(tj.dropout(x, jnp.int32(-3), 0.25), dropped(x, -3, 0.25), jnp.float32, "a negative key")
    share = float((tj.dropout(jnp.ones(100_000), jax.random.key(1, impl="rbg"), 0.25) > 0).mean())
    assert abs(share - 0.75) < 0.01, share
    near(jax.vmap(lambda x: tj.dropout(x, 5, 0.25))(x), jnp.stack([dropped(one, 5, 0.25) for one in x]), jnp.float32, "one key for all")
    each = jax.vmap(lambda x, k: tj.dropout(x, k, 0.25))(x, jnp.arange(4))
    near(each, jnp.stack([dropped(one, k, 0.25) for k, one in enumerate(x)]), jnp.float32, "a key for each")
    same = jax.vmap(lambda k: tj.dropout(x[0], k, 0.25))(jnp.arange(4))
    near(same, jnp.stack([dropped(x[0], k, 0.25) for k in range(4)]), jnp.float32, "keys alone")
    assert (tj.dropout(x, 0, 1.0) == 0).all() and (tj.dropout(x, 0, 0.0) == x).all()
    assert (tj.dropout(x, 0, 0.9, training=False, residual=x) == 2 * x).all()
    h = dropped(x, 9, 0.5) + x
    for found, exact in zip(tj.dropout_rms_norm(x, x, 9, p=0.5), (rms_norm(h, jnp.ones(1000)), h)):
        near(found, exact, jnp.float32, "dropout and rms_norm")
    for found, exact in zip(tj.dropout_layer_norm(x, x, 9, p=0.5), (layer_norm(h, jnp.ones(1000), jnp.zeros(1000)), h)):
        near(found, exact, jnp.float32, "dropout and layer_norm")


def derivatives_have_derivatives():
    """Gradients of gradients, forwards over backwards and backwards over backwards, beside those of JAX's own functions."""
    for name, (ours, theirs, shapes) in CASES.items():
        arrays = [array(*shape) for shape in shapes]
        wanted = theirs(*arrays)
        weight, directions = array(*wanted.shape), [array(*shape) for shape in shapes]
        numbers = tuple(range(len(arrays)))

        def slopes(function):
            return jax.grad(lambda *xs: (jnp.sin(function(*xs)) * weight).sum(), numbers)  # noqa: B023

        def along(function):
            return lambda *xs: sum((g * d).sum() for g, d in zip(slopes(function)(*xs), directions))  # noqa: B023

        exact = jax.grad(along(theirs), numbers)(*arrays)
        found = jax.jit(jax.grad(along(ours), numbers))(*arrays)
        for i, (f, e) in enumerate(zip(found, exact)):
            near(f, e, jnp.float32, f"{name}, second derivative {i}", 20)
        found = jax.jit(lambda *xs: jax.jvp(slopes(ours), xs, tuple(directions))[1])(*arrays)  # noqa: B023
        for i, (f, e) in enumerate(zip(found, exact)):
            near(f, e, jnp.float32, f"{name}, forwards over backwards {i}", 20)


def hessians_are_those_of_jax():
    x, w = array(3, 5), array(5)
    for name, ours, theirs in (
        ("rms_norm", lambda x: jnp.square(tj.rms_norm(x, w)).sum(), lambda x: jnp.square(rms_norm(x, w)).sum()),
        ("silu", lambda x: jnp.sin(tj.silu(x)).sum(), lambda x: jnp.sin(jax.nn.silu(x)).sum()),
    ):
        near(jax.hessian(ours)(x), jax.hessian(theirs)(x), jnp.float32, f"hessian of {name}", 20)
        third = lambda f: jax.grad(lambda x: jnp.sin(jax.hessian(f)(x)).sum())  # noqa: E731
        near(third(ours)(x), third(theirs)(x), jnp.float32, f"third derivative of {name}", 50)
    try:
        jax.jvp(tj.silu, (x,), (x,))
    except TypeError as error:
        assert "custom_vjp" in str(error), error
    else:
        raise AssertionError("forward mode alone has been made: say so in docs/src/jax.md")


def narrow_attention():
    """Gradients of attention of 16 bits, which devices have kernels for, and their derivatives."""
    for dtype in (jnp.bfloat16, jnp.float16):
        for causal in (False, True):
            q, k, v, dy = (array(2, heads, 64, 64, dtype=dtype) for heads in (4, 2, 2, 4))
            slopes = lambda f, dy: lambda q, k, v: jax.vjp(f, q, k, v)[1](dy)  # noqa: E731
            ours = slopes(lambda q, k, v: tj.attention(q, k, v, causal, 0.1), dy)  # noqa: B023
            exact = [t.astype(jnp.float32) for t in (q, k, v)]
            theirs = slopes(lambda q, k, v: textbook(q, k, v, 0.1, causal), dy.astype(jnp.float32))  # noqa: B023
            for i, (f, e) in enumerate(zip(jax.jit(ours)(q, k, v), theirs(*exact))):
                near(f, e.astype(dtype), jnp.bfloat16, f"{dtype.__name__}, causal={causal}, gradient {i}")
            second = jax.jit(lambda *a: jax.jvp(ours, a, a)[1])(q, k, v)  # noqa: B023
            for i, (f, e) in enumerate(zip(second, jax.jvp(theirs, tuple(exact), tuple(exact))[1])):
                near(f, e.astype(dtype), jnp.bfloat16, f"{dtype.__name__}, causal={causal}, second derivative {i}", 2)


def double_precision():
    """With x64: values to fifteen digits and gradients beside differences, `jax.test_util`'s."""
    with jax.enable_x64(True):
        for name, (ours, theirs, shapes) in CASES.items():
            arrays = [array(*shape, dtype=jnp.float64) for shape in shapes]
            found, wanted = jax.jit(ours)(*arrays), theirs(*arrays)
            assert found.dtype == jnp.float64, name
            error = np.abs(np.asarray(found) - np.asarray(wanted)).max()
            assert error < 1e-12 * max(1.0, np.abs(np.asarray(wanted)).max()), (name, error)
            jax.test_util.check_grads(ours, arrays, order=1, modes=["rev"], eps=1e-6, atol=1e-5, rtol=1e-5)
        x = jnp.ones(100)
        assert (tj.dropout(x, jnp.int64(2**40 + 3), 0.5) == dropped(x, 2**40 + 3, 0.5)).all()


def bags_of(weight, indices, offsets, mode, weights=None, padding=None):
    """Bags one after the other, by JAX's own operators. `offsets` has the end, too."""
    found = []
    for begin, end in zip(offsets, offsets[1:]):
        places = [p for p in range(begin, end) if int(indices[p]) != padding]
        rows = widened(weight)[indices[jnp.asarray(places, jnp.int32)]]
        if weights is not None:
            rows = rows * widened(weights)[jnp.asarray(places, jnp.int32)][:, None]
        none = jnp.zeros(weight.shape[1:], rows.dtype)
        of = {"sum": lambda r: r.sum(0), "mean": lambda r: r.mean(0), "max": lambda r: r.max(0)}[mode]
        found.append(of(rows) if places else none)
    return jnp.stack(found).astype(weight.dtype)


def bags_of_rows():
    """All modes with ragged bags, empty ones, a row that does not count, weights; values, gradients and their derivatives."""
    indices = jnp.asarray(NUMBERS.integers(0, 9, 17), jnp.int32)
    offsets = np.array([0, 4, 4, 5, 12, 17])
    for dtype in (jnp.float32, jnp.bfloat16):
        for mode, weighted, padding in (("sum", False, None), ("sum", True, 3), ("mean", False, 3), ("max", False, None), ("max", False, 5)):
            table, weights = array(9, 21, dtype=dtype), array(17, dtype=dtype)
            exact = [table.astype(jnp.float32), weights.astype(jnp.float32)]
            ours = lambda t, w: tj.embedding_bag(indices, t, jnp.asarray(offsets[:-1]), mode, w if weighted else None, padding)  # noqa: E731, B023
            theirs = lambda t, w: bags_of(t, indices, offsets, mode, w if weighted else None, padding)  # noqa: E731, B023
            what = f"{mode} of bags, {dtype.__name__}, {weighted}, {padding}"
            near(jax.jit(ours)(table, weights), theirs(*exact).astype(dtype), dtype, what)
            weight = array(5, 21)
            slopes = lambda f: jax.grad(lambda t, w: (jnp.sin(f(t, w).astype(jnp.float32)) * weight).sum(), (0, 1))  # noqa: E731, B023
            for i, (f, e) in enumerate(zip(jax.jit(slopes(ours))(table, weights), slopes(theirs)(*exact))):
                near(f, e.astype(dtype), dtype, f"{what}, gradient {i}")
            if dtype == jnp.float32:
                second = lambda f: jax.grad(lambda t, w: sum(jnp.square(g).sum() for g in slopes(f)(t, w)), (0, 1))  # noqa: E731, B023
                for i, (f, e) in enumerate(zip(jax.jit(second(ours))(table, weights), second(theirs)(*exact))):
                    near(f, e, dtype, f"{what}, second derivative {i}", 20)
    matrix = indices[:15].reshape(3, 5)
    wanted = bags_of(table, matrix.reshape(-1), np.array([0, 5, 10, 15]), "mean")
    near(tj.embedding_bag(matrix, table), wanted, dtype, "bags as lines")
    near(tj.embedding_bag(indices, table, jnp.asarray(offsets), "sum", include_last_offset=True), bags_of(table, indices, offsets, "sum"), dtype, "the end given")
    tables = array(2, 9, 21)
    each = jax.jit(jax.vmap(lambda t: tj.embedding_bag(matrix, t)))(tables)
    near(each, jnp.stack([tj.embedding_bag(matrix, t) for t in tables]), jnp.float32, "a table for each")
    if "cuda" in sys.argv:
        assert jnp.isnan(tj.embedding_bag(jnp.array([[9]]), table)).all()
    else:
        try:
            jax.block_until_ready(tj.embedding_bag(jnp.array([[9]]), table))
        except Exception as error:
            assert "outside" in str(error), error
        else:
            raise AssertionError("a row outside of the table is taken")
    assert tj.embedding_bag(jnp.zeros((0, 4), jnp.int32), table).shape == (0, 21)
    assert (tj.embedding_bag(jnp.zeros((4, 0), jnp.int32), table) == 0).all()


def tree(dtype=jnp.float32):
    """Parameters of several shapes and types; one has no elements."""
    return {"a": array(33, 20, dtype=dtype), "b": [array(7), array(0, 4)], "c": array(5, 3, dtype=dtype), "d": array(dtype=dtype)}


def stepped(rule, params, grads, state, t, rate, b1, b2, decay, eps=1e-8):
    """A step in float64 of one array: what it is, and its moments."""
    w, g, (m, v) = np.asarray(params, np.float64), np.asarray(grads, np.float64), state
    if rule == "lion":
        c = b1 * m + (1 - b1) * g
        return w * (1 - rate * decay) - rate * np.sign(c), (b2 * m + (1 - b2) * g, v)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return w * (1 - rate * decay) - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), (m, v)


def optimizers_step():
    """Five steps beside float64, of all types, by `step` and by `update`, with clipping, schedules and f32 copies."""
    leaves = jax.tree.leaves
    for rule, make, b1, b2 in (("adamw", tj.adamw, 0.9, 0.999), ("lion", tj.lion, 0.9, 0.99)):
        for dtype, max_norm, how in ((jnp.float32, None, "step"), (jnp.float32, 1.5, "update"), (jnp.bfloat16, 0.7, "step"), (jnp.float16, None, "update")):
            opt = make(lambda count: 1e-2 / (count + 1), weight_decay=0.1, max_norm=max_norm)
            params = tree(dtype)
            state = opt.init(params)
            exact = [np.asarray(p, np.float64) for p in leaves(params)]
            moments = [(np.zeros(p.shape), np.zeros(p.shape)) for p in exact]
            step = jax.jit(opt.step if how == "step" else opt.update)
            for t in range(1, 6):
                grads = jax.tree.map(lambda p: array(*p.shape, dtype=p.dtype), params)  # noqa: B023
                if how == "step":
                    params, state = step(params, grads, state)
                else:
                    updates, state = step(grads, state, params)
                    params = jax.tree.map(lambda p, u: p + u, params, updates)
                norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in leaves(grads)))
                clip = 1.0 if max_norm is None else min(1.0, max_norm / norm)
                for i, g in enumerate(leaves(grads)):
                    g = np.asarray(g, np.float64) * clip
                    exact[i], moments[i] = stepped(rule, exact[i], g, moments[i], t, 1e-2 / t, b1, b2, 0.1)
            assert int(state.count) == 5
            for i, (p, e) in enumerate(zip(leaves(params), exact)):
                near(p, jnp.asarray(e, p.dtype), p.dtype, f"{rule} {dtype.__name__} {how}, parameter {i}")
            for i, (m, e) in enumerate(zip(leaves(state.mu), moments)):
                near(m, jnp.asarray(e[0], jnp.float32), jnp.float32, f"{rule} {dtype.__name__} {how}, moment {i}")
            narrow = dtype != jnp.float32
            assert (state.masters is not None) == narrow
            if narrow:
                near(state.masters["a"], jnp.asarray(exact[0], jnp.float32), jnp.float32, f"{rule}, the f32 copy")
    with jax.enable_x64(True):
        w, opt = array(100, dtype=jnp.float64), tj.adamw(0.5, weight_decay=0.1)
        after, state = jax.jit(opt.step)(w, w, opt.init(w))
        wanted = stepped("adamw", w, w, (0.0, 0.0), 1, 0.5, 0.9, 0.999, 0.1)[0]
        assert after.dtype == state.nu.dtype == jnp.float64 and np.abs(np.asarray(after) - wanted).max() < 1e-12


def optimizers_step_in_place():
    """Donated parameters and states are written where they are: XLA copies nothing. What was not donated stays as it was."""
    for opt in (tj.adamw(1e-2, max_norm=1.0), tj.lion(1e-2)):
        for dtype in (jnp.float32, jnp.bfloat16):
            params = tree(dtype)
            grads, state = params, opt.init(params)
            kept = jax.tree.map(np.array, params)
            first, _ = opt.step(params, grads, state)
            now, first = (jax.tree.map(np.array, t) for t in (params, first))
            for old, new, before in zip(*map(jax.tree.leaves, (now, first, kept))):
                assert (old == before).all() and (new.size == 0 or (new != before).any())
            grads = jax.tree.map(jnp.copy, params)
            compiled = jax.jit(opt.step, donate_argnums=(0, 2)).lower(params, grads, state).compile()
            memory = compiled.memory_analysis()
            given = sum(a.nbytes for a in jax.tree.leaves((params, state)))
            assert memory.alias_size_in_bytes >= given, (memory.alias_size_in_bytes, given)
            copied = re.findall(r"= (\S+) copy\(", compiled.as_text())
            assert all("[0,4]" in shape or shape == "s32[]" for shape in copied), copied
            second, _ = compiled(params, grads, state)
            assert params["a"].is_deleted()
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
                assert (a == np.asarray(b)).all()


def optimizers_refuse():
    params = tree()
    opt = tj.adamw()
    state = opt.init(params)
    wrong = [
        (lambda: tj.adamw(-1.0), ValueError, "learning_rate"),
        (lambda: tj.adamw(b1=1.0), ValueError, "beta1"),
        (lambda: tj.lion(max_norm=0.0), ValueError, "max_norm"),
        (lambda: opt.update(params, state), ValueError, "parameters"),
        (lambda: opt.init({"a": jnp.ones(3, jnp.int32)}), TypeError, "int32"),
        (lambda: opt.step(params, {"a": params["a"]}, state), ValueError, "grads"),
        (lambda: opt.step(params, {**params, "a": jnp.ones(3)}, state), ValueError, "(3,)"),
        (lambda: opt.step(params, params, state._replace(mu=tree(jnp.bfloat16))), TypeError, "state.mu"),
    ]
    for call, kind, text in wrong:
        try:
            call()
        except kind as error:
            assert text in str(error), (text, error)
        else:
            raise AssertionError(f"nothing was said about {text}")


def batches_of_batches():
    x, w = array(2, 5, 4, 10), array(5, 10)
    for ours, theirs in ((tj.rms_norm, rms_norm), (lambda a, b: tj.linear(a, b[:, None]), lambda a, b: a @ b[:, None])):
        nested = jax.vmap(jax.vmap(ours), (0, None))
        near(jax.jit(nested)(x, w), jax.vmap(jax.vmap(theirs), (0, None))(x, w), jnp.float32, "vmap of vmap")
        crossed = jax.vmap(jax.vmap(ours, (0, None)), (None, 0))
        near(crossed(x[0], w), jax.vmap(jax.vmap(theirs, (0, None)), (None, 0))(x[0], w), jnp.float32, "vmap across vmap")


def calls_are_recorded():
    """On a GPU XLA records a chain of calls as a command buffer; replays of it read what is new."""

    @jax.jit
    def chain(x, w):
        for _ in range(4):
            x = tj.softmax(tj.rms_norm(x, w)) + tj.swiglu(x, x)
        return x, tj.linear(x, w[:, None] * w)

    def wanted(x, w):
        for _ in range(4):
            x = jax.nn.softmax(rms_norm(x, w)) + jax.nn.silu(x) * x
        return x, x @ (w[:, None] * w)

    w = array(64)
    for _ in range(5):
        x = array(32, 64)
        for found, exact in zip(chain(x, w), wanted(x, w)):
            near(found, exact, jnp.float32, "a chain of calls")


def arrays_are_donated():
    """A donated array's memory is the result's; what was in it has been read before."""
    x, w = array(64, 128), array(128)
    wanted = np.asarray(rms_norm(x, w))
    step = jax.jit(lambda x, w: tj.rms_norm(x, w), donate_argnums=0)
    assert step.lower(x, w).compile().memory_analysis().alias_size_in_bytes == x.nbytes
    found = step(x, w)
    assert x.is_deleted() and not w.is_deleted()
    near(found, wanted, jnp.float32, "donated")


def empty_and_extreme_arrays():
    assert tj.softmax(jnp.zeros((0, 5))).shape == (0, 5)
    assert tj.rms_norm(jnp.zeros((0, 8)), jnp.ones(8)).shape == (0, 8)
    none = jnp.zeros((0, 8))
    for function in (tj.silu, lambda x: tj.swiglu(x, x), lambda x: tj.dropout(x, 3), lambda x: tj.linear(x, jnp.ones((8, 4)), residual=x[:, :4])):
        value, slope = function(none), jax.grad(lambda x: function(x).sum())(none)  # noqa: B023
        assert value.shape[0] == 0 and slope.shape == (0, 8)
    targets = jnp.zeros(0, jnp.int32)
    slopes = jax.grad(lambda x, w: tj.linear_cross_entropy(x, w, targets, reduction="sum"), (0, 1))(none, jnp.ones((8, 5)))
    assert slopes[0].shape == (0, 8) and (slopes[1] == 0).all()
    q, k = jnp.zeros((2, 3, 0, 4)), jnp.ones((2, 3, 5, 4))
    slopes = jax.grad(lambda q, k: tj.attention(q, k, k).sum(), (0, 1))(q, k)
    assert slopes[0].shape == q.shape and (slopes[1] == 0).all()
    y = tj.softmax(jnp.array([[1e30, -jnp.inf, 0.0], [jnp.nan, 1.0, 2.0]]))
    np.testing.assert_array_equal(np.asarray(y[0]), [1.0, 0.0, 0.0])
    assert np.isnan(np.asarray(y[1])).all()


def wrong_arguments_are_named():
    wrong = [
        (lambda: tj.softmax(array(2, 3), 2), ValueError, "axis"),
        (lambda: tj.rms_norm(array(2, 3), array(4)), ValueError, "last axis"),
        (lambda: tj.linear(array(2, 3), array(4, 5)), ValueError, "first of weight"),
        (lambda: tj.linear(array(2, 3), array(3, 5), activation="cube"), ValueError, "cube"),
        (lambda: tj.softmax(jnp.ones((2, 3), jnp.complex64)), TypeError, "complex64"),
        (lambda: tj.attention(array(1, 3, 4, 8), array(1, 2, 4, 8), array(1, 2, 4, 8)), ValueError, "multiple"),
        (lambda: tj.cross_entropy(array(2, 3), jnp.zeros(3, jnp.int32)), ValueError, "axes of logits"),
        (lambda: tj.cross_entropy(array(2, 3), jnp.zeros(2)), TypeError, "signed integers"),
        (lambda: tj.rotary(array(1, 2, 4, 7), array(1, 4, 7), array(1, 4, 7)), ValueError, "even"),
        (lambda: tj.rms_norm(array(2, 3), array(3), residual=array(3)), ValueError, "shape of x"),
        (lambda: tj.elementwise("x +"), ValueError, "expression"),
        (lambda: tj.elementwise("1 + 2"), ValueError, "no variables"),
        (lambda: tj.elementwise("x * y")(array(2)), TypeError, "variables"),
        (lambda: tj.elementwise("x * y")(array(2), array(3)), ValueError, "(3,)"),
        (lambda: tj.gelu(jnp.ones(3, jnp.int32)), TypeError, "int32"),
        (lambda: tj.dropout(array(2, 3), 0, 1.5), ValueError, "0..1"),
        (lambda: tj.dropout(array(2, 3), jnp.zeros(3)), TypeError, "jax.random"),
        (lambda: tj.dropout(array(2, 3), jax.random.split(jax.random.key(0))), ValueError, "array of keys"),
        (lambda: tj.dropout(array(2, 3), 0, residual=array(3, 2)), ValueError, "(3, 2)"),
        (lambda: tj.linear(array(2, 3), array(3, 5), residual=array(2, 3)), ValueError, "(2, 5)"),
        (lambda: tj.linear(array(2, 3), array(3, 5).astype(jnp.bfloat16)), TypeError, "bfloat16"),
        (lambda: tj.linear_cross_entropy(array(2, 3), array(3, 5), jnp.zeros(3, jnp.int32)), ValueError, "(2,)"),
        (lambda: tj.attention(*[array(1, 2, 4, 8)] * 3, mask=array(1, 3, 4, 4)), ValueError, "(1, 3, 4, 4)"),
        (lambda: tj.embedding_bag(jnp.zeros(3), array(4, 2), jnp.zeros(1, jnp.int32)), TypeError, "float32"),
        (lambda: tj.embedding_bag(jnp.zeros(3, jnp.int32), array(4, 2)), ValueError, "offsets"),
        (lambda: tj.embedding_bag(jnp.zeros((3, 2), jnp.int32), array(4, 2), mode="min"), ValueError, "min"),
        (lambda: tj.embedding_bag(jnp.zeros((3, 2), jnp.int32), array(4, 2), mode="sum", per_sample_weights=array(2, 3)), ValueError, "(2, 3)"),
        # The handler's own errors: XLA hands them on.
        (lambda: bare("nonsense"), Exception, "graph"),
    ]
    for call, kind, text in wrong:
        try:
            jax.block_until_ready(call())
        except kind as error:
            assert text in str(error), (text, error)
        else:
            raise AssertionError(f"nothing was said about {text}")


def bare(text):
    call = jax.ffi.ffi_call(tj.TARGET, jax.ShapeDtypeStruct((2,), jnp.float32))
    return call(jnp.ones(2), graph=text)


def devices_share():
    """In `shard_map` a call is each device's own; under `jit` arrays that are spread are gathered first, and results are right."""
    devices = jax.devices()[:2]
    if len(devices) < 2:
        return
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    x, w, t = array(8, 48), array(48, 48), jnp.asarray(NUMBERS.integers(0, 48, 8), jnp.int32)

    def ours(x, w, t):
        hidden = tj.dropout(tj.swiglu(tj.rms_norm(x, w[0]), x), 3, 0.25)
        bags = tj.embedding_bag(t[:, None] * jnp.ones((1, 3), jnp.int32), w)
        loss = tj.linear_cross_entropy(hidden + bags, tj.linear(w.T, w), t, rows=3, reduction="sum")
        return loss + tj.cross_entropy(hidden, t, reduction="sum") + tj.attention(*[hidden[None, None]] * 3).sum()

    rows, none = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()

    def total(x, w, t):
        # Each device has rows of its own, and one `w` with the others.
        part = jax.shard_map(lambda *a: jax.lax.psum(ours(*a), "rows"), mesh=mesh, in_specs=(rows, none, rows), out_specs=none)
        return part(x, w, t)

    halves = lambda x, w, t: sum(ours(x[i : i + 4], w, t[i : i + 4]) for i in (0, 4))  # noqa: E731
    for f, e in zip(jax.jit(jax.grad(total, (0, 1)))(x, w, t), jax.grad(halves, (0, 1))(x, w, t)):
        near(f, e, jnp.float32, "shard_map")
    inside = jax.shard_map(lambda *a: jax.grad(ours, (0, 1))(*a), mesh=mesh, in_specs=(rows, none, rows), out_specs=(rows, none))
    for f, e in zip(jax.jit(inside)(x, w, t), jax.grad(halves, (0, 1))(x, w, t)):
        near(f, e, jnp.float32, "gradients inside of shard_map")
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, rows))
    slope = lambda x, w, t: jax.grad(ours)(x, w, t)  # noqa: E731
    near(jax.jit(slope)(placed, w, t), slope(x, w, t), jnp.float32, "jit of arrays that are spread")


def programs_are_exported():
    """A program that was exported carries all that it needs."""
    x, w = array(6, 24), array(24)

    def ours(x, w):
        return jax.grad(lambda x: tj.dropout(tj.silu(tj.rms_norm(x, w)), 3, 0.25).sum())(x)

    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (tj.TARGET, "tilewright_kernel")]
    exported = jax.export.export(jax.jit(ours), disabled_checks=checks)(x, w)
    near(jax.jit(exported.call)(x, w), ours(x, w), jnp.float32, "an exported program")


def training_goes_down():
    """A small network, all of it in one jitted step."""
    x, target = array(64, 16), jnp.asarray(NUMBERS.integers(0, 4, 64), jnp.int32)
    weights = [array(16, 32) / 4, jnp.ones(32), array(32, 4) / 6]
    for opt in (tj.adamw(1e-2, max_norm=1.0), tj.lion(1e-3)):

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(weights, state, key):
            def loss(weights):
                hidden = tj.dropout(tj.linear(x, weights[0], None, "gelu"), key, 0.1)
                return tj.linear_cross_entropy(tj.rms_norm(hidden, weights[1]), weights[2], target, rows=16)

            value, slopes = jax.value_and_grad(loss)(weights)
            return value, *opt.step(weights, slopes, state)  # noqa: B023

        losses = []
        now = jax.tree.map(jnp.copy, weights)
        state = opt.init(now)
        for i in range(30):
            value, now, state = step(now, state, jax.random.key(i))
            losses.append(float(value))
        assert losses[-1] < 0.9 * losses[0], losses


# Tests that go through the cases, and those that do not.
OF_CASES = (
    values_and_gradients_are_those_of_jax,
    calls_are_batched,
    derivatives_have_derivatives,
    double_precision,
)
OTHERS = (
    losses_are_reduced,
    losses_behind_products,
    losses_behind_products_are_never_all_there,
    random_numbers_follow_their_key,
    hessians_are_those_of_jax,
    narrow_attention,
    bags_of_rows,
    optimizers_step,
    optimizers_step_in_place,
    optimizers_refuse,
    batches_of_batches,
    calls_are_recorded,
    arrays_are_donated,
    empty_and_extreme_arrays,
    wrong_arguments_are_named,
    devices_share,
    programs_are_exported,
    training_goes_down,
)


def in_processes(jobs: int, words: list[str]) -> None:
    """Shares of the cases, and the other tests, each in a process of its own."""
    shares = [[*(test.__name__ for test in OF_CASES), f"{i + 1}/{jobs}"] for i in range(jobs)]
    shares.append([test.__name__ for test in OTHERS])
    start = lambda share: subprocess.Popen([sys.executable, __file__, *words, *share], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: E731
    running = [start(share) for share in shares]
    for process in running:
        print(process.communicate()[0], end="", flush=True)
    if any(process.returncode for process in running):
        sys.exit("test_jax: a process failed")


def main() -> None:
    if "--jobs" in sys.argv:
        return in_processes(int(sys.argv[sys.argv.index("--jobs") + 1]), [word for word in sys.argv[1:] if word == "cuda"])
    chosen = [name for name in sys.argv[1:] if name != "cuda" and "/" not in name]
    for share in (name for name in sys.argv[1:] if "/" in name):
        first, step = map(int, share.split("/"))
        for name in [name for i, name in enumerate(CASES) if i % step != first - 1]:
            del CASES[name]
    for test in (*OF_CASES, *OTHERS):
        if chosen and test.__name__ not in chosen:
            continue
        test()
        print(f"ok: {test.__name__}", flush=True)


if __name__ == "__main__":
    main()
