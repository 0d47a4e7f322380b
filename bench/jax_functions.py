"""Functions of `tilewright.jax` beside XLA's own, on a GPU.

    TILEWRIGHT_PACKAGE=python python bench/jax_functions.py [NAME...]

Milliseconds of a jitted call: medians of seven interleaved rounds of twenty calls. Gradients are of a gradient of the result that is given. Optimizers run
in a loop on the device, beside optax.
"""

import functools
import os
import statistics
import sys
import time

sys.path.insert(0, os.environ.get("TILEWRIGHT_PACKAGE", "python"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import tilewright.jax as tj  # noqa: E402

KEY = jax.random.key(0)


def array(*shape, dtype=jnp.bfloat16, seed=0):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape).astype(dtype)


def whole(most, *shape):
    return jax.random.randint(KEY, shape, 0, most)


def gradient(function):
    return lambda dy, *args: jax.vjp(function, *args)[1](dy)


def rms_norm(x, w):
    f = x.astype(jnp.float32)
    return (f * jax.lax.rsqrt((f * f).mean(-1, keepdims=True) + 1e-6) * w.astype(jnp.float32)).astype(x.dtype)


def dropout(x, r, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0).astype(x.dtype) + r


def losses(logits, targets):
    z = logits.astype(jnp.float32)
    return (jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, targets[:, None], -1)[:, 0]).mean()


def bags(table, rows):
    return table[rows].astype(jnp.float32).sum(1).astype(table.dtype)


def our_bags(table, rows):
    return tj.embedding_bag(rows, table, mode="sum")


def swiglu(a, b):
    return jax.nn.silu(a) * b


def cudnn(q):
    rows_first = jnp.swapaxes(q, 1, 2)
    return jnp.swapaxes(jax.nn.dot_product_attention(rows_first, rows_first, rows_first, is_causal=True, implementation="cudnn"), 1, 2)


def attention(q):
    return tj.attention(q, q, q, True)


def cases():
    """Name: ours, XLA's, what makes the arguments."""
    rows = lambda *more: lambda: (*(array(8192, 4096, seed=i) for i in range(2)), *more)  # noqa: E731
    w = array(4096, seed=3)
    logits = lambda: (array(4096, 32000), whole(32000, 4096))  # noqa: E731
    head = lambda: (array(4096, 4096), array(4096, 32000, seed=1) * 0.02, whole(32000, 4096))  # noqa: E731
    q = lambda: (array(4, 16, 2048, 128),)  # noqa: E731
    table = lambda: (array(100_000, 256), whole(100_000, 16384, 32))  # noqa: E731
    quick = tj.elementwise("x * sigmoid(1.702 * x)")
    grads = functools.partial(jax.grad, argnums=(0, 1))
    return {
        "quick_gelu": (quick, lambda x: x * jax.nn.sigmoid(1.702 * x), lambda: rows()()[:1]),
        "swiglu": (tj.swiglu, swiglu, rows()),
        "swiglu_grad": (gradient(tj.swiglu), gradient(swiglu), rows(array(8192, 4096, seed=2))),
        "rms_norm": (tj.rms_norm, rms_norm, lambda: (array(8192, 4096), w)),
        "rms_norm_grad": (gradient(tj.rms_norm), gradient(rms_norm), rows(w)),
        "add_rms_norm": (lambda x, r, w: tj.rms_norm(x, w, residual=r), lambda x, r, w: (rms_norm(x + r, w), x + r), rows(w)),
        "softmax": (tj.softmax, lambda x: jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype), lambda: rows()()[:1]),
        "dropout_residual": (lambda x, r, k: tj.dropout(x, k, 0.1, residual=r), dropout, rows(jax.random.key(3))),
        "cross_entropy": (tj.cross_entropy, losses, logits),
        "cross_entropy_grad": (jax.grad(tj.cross_entropy), jax.grad(losses), logits),
        "linear_cross_entropy_grad": (grads(tj.linear_cross_entropy), grads(lambda h, w, t: losses(h @ w, t)), head),
        "linear_gelu": (
            lambda h, w: tj.linear(h, w, None, "gelu_tanh"), lambda h, w: jax.nn.gelu(h @ w), lambda: (array(4096, 4096), array(4096, 16384, seed=1)),
        ),
        "attention": (attention, cudnn, q),
        "attention_grad": (gradient(attention), gradient(cudnn), lambda: q() * 2),
        "bags": (our_bags, bags, table),
        "bags_grad": (gradient(our_bags), gradient(bags), lambda: (array(16384, 256, seed=1), *table())),
    }  # fmt: skip


def timed(functions, args):
    jitted = [jax.jit(f) for f in functions]
    for f in jitted:
        jax.block_until_ready(f(*args))
    times = [[] for _ in jitted]
    for _ in range(7):
        for f, each in zip(jitted, times):
            jax.block_until_ready(f(*args))
            start = time.perf_counter()
            for _ in range(20):
                y = f(*args)
            jax.block_until_ready(y)
            each.append((time.perf_counter() - start) / 20 * 1e3)
    return [statistics.median(each) for each in times]


def optimizers(params, steps=20):
    """A step in place of ours and of optax, and by how much parameters differ after the first round."""
    import optax

    ours, theirs = tj.adamw(1e-3), optax.adamw(1e-3)

    def by_optax(params, grads, state):
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    times, after = [], []
    for step, init in ((ours.step, ours.init), (by_optax, theirs.init)):

        def many(params, grads, state, step=step):
            return jax.lax.fori_loop(0, steps, lambda _, c: step(c[0], grads, c[1]), (params, state))

        many = jax.jit(many, donate_argnums=(0, 2))
        p, s = many(*jax.tree.map(jnp.copy, (params, params, init(params))))
        after.append(jax.tree.map(jnp.copy, jax.block_until_ready(p)))
        each = []
        for _ in range(5):
            start = time.perf_counter()
            p, s = many(p, params, s)
            jax.block_until_ready(p)
            each.append((time.perf_counter() - start) / steps * 1e3)
        times.append(statistics.median(each))
    return times, max(float(jnp.abs(a - b).max()) for a, b in zip(*after))


def main() -> None:
    chosen = sys.argv[1:]
    names = [*cases(), "adamw_large", "adamw_small"]
    if unknown := [name for name in chosen if name not in names]:
        sys.exit(f"jax_functions: no {unknown}; there are {names}")
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    for name, (ours, theirs, arguments) in cases().items():
        if not chosen or name in chosen:
            a, b = timed((ours, theirs), arguments())
            print(f"{name:26} ours {a:8.4f}  XLA   {b:8.4f}  ratio {b / a:.2f}", flush=True)
    large = [array(4096, 4096, dtype=jnp.float32, seed=i) for i in range(8)]
    small = [array(768, 64 + i, dtype=jnp.float32, seed=i) for i in range(100)]
    for name, params in (("adamw_large", large), ("adamw_small", small)):
        if not chosen or name in chosen:
            (a, b), apart = optimizers(params)
            print(f"{name:26} ours {a:8.4f}  optax {b:8.4f}  ratio {b / a:.2f}  apart by {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
