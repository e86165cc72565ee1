"""The training state: made under jit with its shardings, or abstract for restoring into."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreward.core.types import TrainState
from jaxreward.parallel import specs as sp
from jaxreward.parallel.rules import Rules

PyTree = Any


def create(params: PyTree, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Step 0 with fresh optimizer state.

    Args:
      params: What the optimizer updates. Copied: the step donates its state, and the buffers
        given here may be shared with someone else.
      tx: The optax chain.
      key: Typed PRNG key, stored as it is; the step folds its number into it.
    """

    def make(params):
        params = jax.tree.map(jnp.copy, params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            extra={},
            key=key,
        )

    return jax.jit(make)(params)


def shardings(param_specs: PyTree, tx: optax.GradientTransformation, rules: Rules) -> TrainState:
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
    return TrainState(step=whole, params=by_param, opt_state=opt, extra={}, key=whole)


def place(state: TrainState, where: TrainState) -> TrainState:
    """Moves a state to its shardings."""
    return jax.device_put(state, where)
