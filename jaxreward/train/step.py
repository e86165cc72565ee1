"""The training step: named totals, one division, microbatches and meshes that change nothing.

    objective = sum_k coef[k] * total[k] / weight[k]

`weights(batch)` counts every denominator on the whole batch before it is cut into microbatches,
and the loss returns sums. Gradients are therefore the same for every number of microbatches, and
two terms may have different denominators (pairs and tokens, say). Randomness comes as one key a
row, so it does not depend on the cut either.

On a mesh with a `data` axis each group of devices runs its microbatches alone, and gradients cross
that axis, the slowest, once a step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreward.core import metrics as m
from jaxreward.core import trees
from jaxreward.core.masked import safe_divide
from jaxreward.core.types import TrainState
from jaxreward.parallel.rules import Rules, over_data

PyTree = Any
Loss = Callable[..., tuple[dict[str, jax.Array], dict[str, Any], PyTree]]
Weights = Callable[[Any], dict[str, jax.Array]]
# Entries of `extra` that are the step's, and the recipe's; all others are the loss's.
EMA, SAMPLER = "ema", "sampler"


def _names(expected: Mapping, got: Mapping, what: str):
    if set(expected) != set(got):
        raise ValueError(
            f"the config's losses are {sorted(expected)}, but {what} are named {sorted(got)}; "
            "every loss needs a coefficient, a total and a weight under one name"
        )


def cut(batch, microbatches: int):
    """[B, ...] to [M, B/M, ...]: microbatch m takes rows m, m + M, ..., so rows stay in place."""

    def one(x):
        B = x.shape[0]
        if B % microbatches:
            divisors = [d for d in range(1, B + 1) if B % d == 0]
            raise ValueError(
                f"batch of {B} does not split into {microbatches} microbatches; set "
                f"train.microbatches to a divisor {divisors}"
            )
        return jnp.moveaxis(x.reshape(B // microbatches, microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, batch)


def make_gradient(
    loss: Loss,
    weights: Weights,
    coef: Mapping[str, float],
    microbatches: int | Callable[[int], int] = 1,
    *,
    rules: Rules | None = None,
    trained: PyTree | None = None,
):
    """(params, frozen, batch, key, extra) -> (gradient, objective, terms, metrics, extra).

    The gradient is float32, whatever the parameters are, and None at leaves that `trained` leaves
    out. Other arguments as `make_train_step`. A loss that keeps state of its own in `extra` runs
    its microbatches on the whole mesh, since that state is one and not one a part.
    """

    def one(params, held, frozen, rows, keys, extra, denominators):
        params = params if held is None else trees.combine(params, held)
        totals, metrics, extra = loss(params, frozen, rows, keys, extra)
        _names(coef, totals, "the totals that the loss returns")
        terms = {k: coef[k] * safe_divide(totals[k], denominators[k]) for k in totals}
        return sum(terms.values()), (terms, metrics, extra)

    differentiate = jax.value_and_grad(one, has_aux=True)

    def accumulate(params, held, frozen, batch, keys, extra, denominators, parts):
        if parts == 1:
            (value, (terms, metrics, extra)), grads = differentiate(
                params, held, frozen, batch, keys, extra, denominators
            )
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return grads, value, terms, metrics, extra

        def body(carry, part):
            grads, value, terms, extra = carry
            (v, (t, metrics, extra)), g = differentiate(
                params, held, frozen, *part, extra, denominators
            )
            grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, g)
            return (grads, value + v, {k: terms[k] + t[k] for k in terms}, extra), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        start = (zeros, jnp.float32(0), dict.fromkeys(coef, jnp.float32(0)), extra)
        (grads, value, terms, extra), stacked = jax.lax.scan(body, start, cut((batch, keys), parts))
        return grads, value, terms, m.over_axis(stacked), extra

    def part_of_data(parts, *args):
        grads, value, terms, metrics, _ = accumulate(*args[:5], {}, args[5], parts)
        grads, value, terms = jax.lax.psum((grads, value, terms), "data")
        return grads, value, terms, m.over_mesh(metrics, "data"), {}

    def gradient(params, frozen, batch, key, extra):
        denominators = weights(batch)
        _names(coef, denominators, "the weights of the batch")
        held = None
        if trained is not None:
            params, held = trees.partition(params, trained)
        rows = jax.tree.leaves(batch)[0].shape[0]
        parts = microbatches(rows) if callable(microbatches) else microbatches
        keys = jax.random.split(key, rows)
        if rules is None or rules.mesh.shape["data"] == 1 or extra:
            return accumulate(params, held, frozen, batch, keys, extra, denominators, parts)
        part = functools.partial(part_of_data, parts)
        apart = over_data(part, rules, (0, 0, 0, 1, 1, 0), (0, 0, 0, 0, 0))
        return apart(params, held, frozen, batch, keys, denominators)

    return gradient


def make_train_step(
    loss: Loss,
    weights: Weights,
    coef: Mapping[str, float],
    tx: optax.GradientTransformation,
    *,
    rules: Rules | None = None,
    shardings: TrainState | None = None,
    batch_sharding: Any = None,
    microbatches: int | Callable[[int], int] = 1,
    clip: float | None = None,
    trained: PyTree | None = None,
    ema: float = 0.0,
):
    """The jitted step (state, frozen, batch) -> (state, metrics). The state is donated.

    A step whose objective or gradient norm is not finite changes nothing but the step number; its
    metrics say so.

    Args:
      loss: (params, frozen, rows, keys, extra) -> (totals by name, metrics, extra). `keys` is one
        typed PRNG key a row; `extra` is the loss's own state, {} for most.
      weights: batch -> denominators by name, from the whole batch.
      coef: Coefficient of each named loss.
      tx: The optax chain.
      rules: Mesh and layouts, or None for one device.
      shardings: TrainState of shardings, pinned on both sides; None without a mesh.
      batch_sharding: Sharding of the batch's leading axis.
      microbatches: Parts of the batch that run one after the other (on a mesh with `data`, parts
        of each group's rows), or a function that gives them from the number of rows.
      clip: Largest global gradient norm, or None.
      trained: Tree of bools, False for leaves that get no gradient and no update; None trains all.
      ema: Decay of the moving average of the parameters in `extra["ema"]`, 0 for none:
        average = ema * average + (1 - ema) * params, after each update.

    Returns:
      A function; its metrics are accumulators (`core.metrics`): "loss", one "loss/<name>" per
      term when there are several, "grad_norm" (before clipping), what the loss reports, "skipped",
      and "nonfinite/<name>" for each of the former (1 where the step met a number that is not
      finite there).
    """
    gradient = make_gradient(loss, weights, coef, microbatches, rules=rules, trained=trained)

    def step(state: TrainState, frozen: PyTree, batch):
        key = jax.random.fold_in(state.key, state.step)
        own = {k: v for k, v in state.extra.items() if k not in (EMA, SAMPLER)}
        grads, value, terms, reported, own = gradient(state.params, frozen, batch, key, own)
        norm = optax.tree.norm(grads)
        terms = terms if len(terms) > 1 else {}
        measured = {"loss": value, **{f"loss/{k}": v for k, v in terms.items()}, "grad_norm": norm}
        ok = jnp.isfinite(value) & jnp.isfinite(norm)
        if clip is not None:
            shrink = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        if trained is not None:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads = trees.combine(grads, zeros)
        # The optimizer's state was made in the parameters' dtypes and keeps them.
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = {**own, **{k: v for k, v in state.extra.items() if k == SAMPLER}}
        if ema:
            extra = {**extra, EMA: optax.incremental_update(params, state.extra[EMA], 1 - ema)}
        new = (params, opt_state, extra)
        old = (state.params, state.opt_state, state.extra)
        params, opt_state, extra = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        one = jnp.float32(1)
        metrics = {**{k: m.Mean(v, one) for k, v in measured.items()}, **reported}
        metrics = m.only_if(ok, metrics)
        bad = lambda x: m.Sum(1 - jnp.isfinite(x).astype(jnp.float32))
        metrics |= {f"nonfinite/{k}": bad(v) for k, v in measured.items()}
        metrics["skipped"] = m.Sum(1 - ok.astype(jnp.float32))
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return state, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, batch_sharding),
        out_shardings=(shardings, None),
    )
