"""Tilewright's functions inside JAX: values and gradients beside JAX's own, under `jit` and `vmap`; wrong arguments.

    python tests/python/test_jax.py [cuda] [TEST...]

Needs JAX (python/requirements-jax.txt). With `cuda` it runs on JAX's default device; tests by their functions' names.
"""

import os
import pathlib
import shutil
import sys
import tempfile

if "cuda" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

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
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import tilewright.jax as tj  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
NUMBERS = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(NUMBERS.normal(size=shape), dtype)


def near(found, wanted, dtype, what):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (what, found.dtype, found.shape, wanted.shape)
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    scale = max(np.abs(wanted).max(initial=0.0), 1e-30)
    error = np.abs(found - wanted).max(initial=0.0) / scale
    assert error <= {"float32": 2e-5, "bfloat16": 2e-2}[jnp.dtype(dtype).name], (what, error)


def layer_norm(x, w, b):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return (y * w.astype(jnp.float32) + b.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x, w):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6) * w.astype(jnp.float32)).astype(x.dtype)


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
    z = x.astype(jnp.float32)
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
        (lambda: tj.cross_entropy(array(2, 3), jnp.zeros(2)), ValueError, "signed integers"),
        (lambda: tj.rotary(array(1, 2, 4, 7), array(1, 4, 7), array(1, 4, 7)), ValueError, "even"),
        (lambda: tj.rms_norm(array(2, 3), array(3), residual=array(3)), ValueError, "shape of x"),
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


def training_goes_down():
    """A small network, all of it in one jitted step."""
    x, target = array(64, 16), array(64, 4)
    weights = [array(16, 32) / 4, jnp.ones(32), array(32, 4) / 6]

    @jax.jit
    def step(weights):
        def loss(weights):
            hidden = tj.rms_norm(tj.linear(x, weights[0], None, "gelu"), weights[1])
            return ((tj.linear(hidden, weights[2]) - target) ** 2).mean()

        value, slopes = jax.value_and_grad(loss)(weights)
        return value, [w - 0.05 * s for w, s in zip(weights, slopes)]

    losses = []
    for _ in range(30):
        value, weights = step(weights)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0], losses


def main() -> None:
    tests = (
        values_and_gradients_are_those_of_jax,
        calls_are_batched,
        losses_are_reduced,
        batches_of_batches,
        calls_are_recorded,
        arrays_are_donated,
        empty_and_extreme_arrays,
        wrong_arguments_are_named,
        training_goes_down,
    )
    chosen = [name for name in sys.argv[1:] if name != "cuda"]
    for test in tests:
        if chosen and test.__name__ not in chosen:
            continue
        test()
        print(f"ok: {test.__name__}", flush=True)


if __name__ == "__main__":
    main()
