"""The training state: made under jit with its shardings, or abstract for restoring into."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreward.core.types import TrainState
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules

PyTree = Any


def create(
    params: PyTree,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    copies: Collection[str] = (),
) -> TrainState:
    """Step 0 with fresh optimizer state.

    Args:
      params: What the optimizer updates. Copied: the step donates its state, and the buffers
        given here may be shared with someone else.
      tx: The optax chain.
      key: Typed PRNG key, stored as it is; the step folds its number into it.
      copies: Entries of `extra` that are trees like the parameters and start equal to them:
        "ema", their moving average; "sampler", those that answers were sampled from.
    """

    def make(params):
        params = jax.tree.map(jnp.copy, params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            extra={name: jax.tree.map(jnp.copy, params) for name in copies},
            key=key,
        )

    return jax.jit(make)(params)


def shardings(
    param_specs: PyTree,
    tx: optax.GradientTransformation,
    rules: Rules,
    *,
    copies: Collection[str] = (),
) -> TrainState:
    """A TrainState of NamedShardings: optimizer leaves follow the parameter they belong to."""
    whole = jax.sharding.NamedSharding(rules.mesh, jax.sharding.PartitionSpec())
    abstract = sp.abstract(param_specs)
    by_param = sp.shardings(param_specs, rules)
    opt = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, abstract),
        by_param,
        transform_non_params=lambda _: whole,
    )
    extra = dict.fromkeys(copies, by_param)
    return TrainState(step=whole, params=by_param, opt_state=opt, extra=extra, key=whole)


def place(state: TrainState, where: TrainState) -> TrainState:
    """Moves a state to its shardings."""
    return jax.device_put(state, where)
