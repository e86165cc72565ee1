"""The training step: named totals, one division, microbatches that change nothing.

    objective = sum_k coef[k] * total[k] / weight[k]

`weights(batch)` counts every denominator on the whole batch before it is cut into microbatches,
and the loss returns sums. Gradients are therefore the same for every number of microbatches, and
two terms may have different denominators (pairs and tokens, say).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreward.core import metrics as m
from jaxreward.core.masked import safe_divide
from jaxreward.core.types import TrainState

PyTree = Any
Loss = Callable[..., tuple[dict[str, jax.Array], dict[str, Any], PyTree]]
Weights = Callable[[Any], dict[str, jax.Array]]


def _names(expected: Mapping, got: Mapping, what: str):
    if set(expected) != set(got):
        raise ValueError(
            f"the config's losses are {sorted(expected)}, but {what} are named {sorted(got)}; "
            "every loss needs a coefficient, a total and a weight under one name"
        )


def _cut(batch, microbatches: int):
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


def make_gradient(loss: Loss, weights: Weights, coef: Mapping[str, float], microbatches: int = 1):
    """A function (params, frozen, batch, key, extra) -> (gradient, objective, metrics, extra).

    The gradient is float32, whatever the parameters are.
    """

    def one(params, frozen, rows, key, extra, denominators):
        totals, metrics, extra = loss(params, frozen, rows, key, extra)
        _names(coef, totals, "the totals that the loss returns")
        terms = {k: coef[k] * safe_divide(totals[k], denominators[k]) for k in totals}
        return sum(terms.values()), (terms, metrics, extra)

    def gradient(params, frozen, batch, key, extra):
        denominators = weights(batch)
        _names(coef, denominators, "the weights of the batch")
        differentiate = jax.value_and_grad(one, has_aux=True)
        if microbatches == 1:
            (value, (terms, metrics, extra)), grads = differentiate(
                params, frozen, batch, key, extra, denominators
            )
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return grads, value, terms, metrics, extra

        def body(carry, xs):
            grads, value, terms, extra = carry
            rows, i = xs
            (v, (t, metrics, extra)), g = differentiate(
                params, frozen, rows, jax.random.fold_in(key, i), extra, denominators
            )
            grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, g)
            return (grads, value + v, {k: terms[k] + t[k] for k in terms}, extra), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        start = (zeros, jnp.float32(0), dict.fromkeys(coef, jnp.float32(0)), extra)
        (grads, value, terms, extra), stacked = jax.lax.scan(
            body, start, (_cut(batch, microbatches), jnp.arange(microbatches))
        )
        return grads, value, terms, m.over_axis(stacked), extra

    return gradient


def make_train_step(
    loss: Loss,
    weights: Weights,
    coef: Mapping[str, float],
    tx: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    batch_sharding: Any = None,
    microbatches: int = 1,
    clip: float | None = None,
):
    """The jitted step (state, frozen, batch) -> (state, metrics). The state is donated.

    Args:
      loss: (params, frozen, rows, key, extra) -> (totals by name, metrics, extra).
      weights: batch -> denominators by name, from the whole batch.
      coef: Coefficient of each named loss.
      tx: The optax chain.
      shardings: TrainState of shardings, pinned on both sides; None without a mesh.
      batch_sharding: Sharding of the batch's leading axis.
      microbatches: Parts of the batch that run one after the other.
      clip: Largest global gradient norm, or None.

    Returns:
      A function; its metrics are accumulators (`core.metrics`): "loss", one "loss/<name>" per
      term when there are several, "grad_norm" (before clipping), and what the loss reports.
    """
    gradient = make_gradient(loss, weights, coef, microbatches)

    def step(state: TrainState, frozen: PyTree, batch):
        key = jax.random.fold_in(state.key, state.step)
        grads, value, terms, metrics, extra = gradient(
            state.params, frozen, batch, key, state.extra
        )
        norm = optax.tree.norm(grads)
        if clip is not None:
            shrink = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        # The optimizer's state was made in the parameters' dtypes and keeps them.
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {"loss": m.Mean(value, jnp.float32(1)), "grad_norm": m.Last(norm), **metrics}
        if len(terms) > 1:
            metrics |= {f"loss/{k}": m.Mean(v, jnp.float32(1)) for k, v in terms.items()}
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            extra=extra,
        )
        return state, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, batch_sharding),
        out_shardings=(shardings, None),
    )
