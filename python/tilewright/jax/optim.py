"""AdamW and Lion over all parameters in one kernel: in place (`step`), or in the shape of optax (`init`, `update`).

    opt = tj.adamw(3e-4, weight_decay=0.1, max_norm=1.0)
    state = opt.init(params)
    step = jax.jit(opt.step, donate_argnums=(0, 2))
    params, state = step(params, grads, state)
"""

from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from .core import NAMES, floats, kernel, need, wide


class State(NamedTuple):
    """What an optimizer remembers: how many steps it made, and trees like the parameters. `nu` is AdamW's; `masters` has f32 copies of
    parameters of 16 bits, where they are wanted."""

    count: jax.Array
    mu: Any
    nu: Any
    masters: Any


class _Transformation(NamedTuple):
    init: Callable
    update: Callable


class Optimizer(_Transformation):
    """`init` and `update` as those of optax (`GradientTransformation`), and `step`, which is one kernel in place.

    * `init(params)`: the state.
    * `update(grads, state, params)`: `(updates, state)`; `params + updates` are the new parameters, but for rounding.
    * `step(params, grads, state)`: `(params, state)`. Under `jax.jit` with parameters and state donated nothing is copied.
    """

    step: Callable


def _made(rule: str, rate, numbers: dict, max_norm, masters: bool) -> Optimizer:
    need(callable(rate) or isinstance(rate, jax.Array) or rate >= 0, f"learning_rate is {rate}; it must be at least 0")
    need(max_norm is None or max_norm > 0, f"max_norm is {max_norm}; it must be above 0, or None")
    for name, number in numbers.items():
        whole = name not in ("beta1", "beta2") or number < 1
        need(number >= 0 and math.isfinite(number) and whole, f"{name} is {number}; it must be at least 0, and a beta below 1")
    adam = rule == "adamw"

    def init(params):
        def zeros():
            return jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)

        for p in jax.tree.leaves(params):
            floats(**{"a parameter": p})
        narrow = masters and any(p.dtype.itemsize == 2 for p in jax.tree.leaves(params))
        copies = jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype.itemsize == 2 else None, params) if narrow else None
        return State(jnp.zeros((), jnp.int32), zeros(), zeros() if adam else None, copies)

    def step(params, grads, state):
        leaves, tree = jax.tree.flatten(params)
        lists = [_like(tree, leaves, grads, "grads", None), _like(tree, leaves, state.mu, "state.mu", wide)]
        lists.append(_like(tree, leaves, state.nu, "state.nu", wide) if adam else [None] * len(leaves))
        lists.append([None] * len(leaves) if state.masters is None else tree.flatten_up_to(state.masters))
        count = state.count + 1
        now = rate(state.count) if callable(rate) else rate
        factor = jnp.ones((), jnp.float32)
        if max_norm is not None:
            squares = sum((jnp.square(g.astype(wide(g.dtype))).sum() for g in lists[0]), start=jnp.zeros((), jnp.float32))
            factor = jnp.minimum(1.0, max_norm / (jnp.sqrt(squares) + 1e-6)).astype(jnp.float32)
        known = [count.astype(jnp.float32), jnp.asarray(now, jnp.float32).reshape(()), factor]
        results = [list(leaves), *(list(one) for one in lists[1:])]
        groups: dict[tuple, list[int]] = {}
        for i, p in enumerate(leaves):
            if p.size:
                groups.setdefault((p.dtype, lists[3][i] is not None), []).append(i)
        for (dtype, copied), places in groups.items():
            text = f"{rule} dtype={NAMES[dtype.name]} tensors={len(places)} masters={int(copied)} " + " ".join(
                f"{name}={number!r}" for name, number in numbers.items()
            )
            weights, gradients = [leaves[i] for i in places], [lists[0][i].astype(dtype) for i in places]
            kept = [k for k in (1, 2, 3) if lists[k][places[0]] is not None]
            moments = [lists[k][i] for k in kept for i in places]
            n = len(places)
            # All but the gradients are written where they are.
            inputs = [*range(3, 3 + n), *range(3 + 2 * n, 3 + 2 * n + len(moments))]
            found = kernel(text, [*weights, *moments], *known, *weights, *gradients, *moments, aliases={i: o for o, i in enumerate(inputs)})
            for k, into in enumerate((0, *kept)):
                for j, i in enumerate(places):
                    results[into][i] = found[k * n + j]
        back = tree.unflatten
        after = State(count, back(results[1]), back(results[2]) if adam else None, None if state.masters is None else back(results[3]))
        return back(results[0]), after

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("update takes the parameters, too: update(grads, state, params)")
        after, state = step(params, grads, state)
        return jax.tree.map(lambda new, old: new - old, after, params), state

    made = Optimizer(init, update)
    made.step = step
    return made


def _like(tree, leaves, given, name, of):
    """The leaves of a tree like the parameters."""
    try:
        found = tree.flatten_up_to(given)
    except ValueError as error:
        raise ValueError(f"{name} is no tree like params: {error}") from None
    for p, g in zip(leaves, found):
        need(jnp.shape(g) == p.shape, f"{name} has an array of shape {jnp.shape(g)} for a parameter of shape {p.shape}")
        if of is not None and g.dtype != of(p.dtype):
            raise TypeError(f"{name} has an array of {g.dtype} for a parameter of {p.dtype}; it must be {of(p.dtype)}")
    return found


def adamw(
    learning_rate=1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    max_norm: float | None = None,
    masters: bool = True,
    maximize: bool = False,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019); names and defaults are optax's.

    `learning_rate` is a number, an array of one, or a function of the number of steps that were made. `max_norm` clips all gradients together to this
    norm, within the step. With `masters`, parameters of 16 bits are updated in f32 copies; without, in f32 from what they are. Moments are f32
    (f64 for f64).
    """
    numbers = dict(beta1=float(b1), beta2=float(b2), eps=float(eps), decay=float(weight_decay), maximize=int(maximize))
    return _made("adamw", learning_rate, numbers, max_norm, masters)


def lion(
    learning_rate=1e-4,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    max_norm: float | None = None,
    masters: bool = True,
    maximize: bool = False,
) -> Optimizer:
    """Lion (Chen et al., 2023): steps of one size in the direction of a moment's sign. As `adamw`; names and defaults are optax's."""
    numbers = dict(beta1=float(b1), beta2=float(b2), decay=float(weight_decay), maximize=int(maximize))
    return _made("lion", learning_rate, numbers, max_norm, masters)


__all__ = ["Optimizer", "State", "adamw", "lion"]
