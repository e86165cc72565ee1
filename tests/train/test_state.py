"""A new state owns its buffers, and its optimizer leaves lie where their parameters lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxreward.parallel import mesh, rules
from jaxreward.parallel import specs as sp
from jaxreward.train import state

SPECS = {
    "up": {"kernel": sp.Param((8, 12), ("embed", "mlp"))},
    "norm": {"scale": sp.Param((6,), ("embed",), init="ones")},
}


def test_create_copies_and_starts_at_0():
    """Catches buffers shared with the caller, which the donating step would delete."""
    params = sp.init(SPECS, jax.random.key(0))
    key = jax.random.key(7)
    made = state.create(params, optax.adam(1e-3), key)
    assert int(made.step) == 0 and made.step.dtype == jnp.int32 and made.extra == {}
    assert (jax.random.key_data(made.key) == jax.random.key_data(key)).all()
    assert not jax.tree.reduce(lambda a, b: a or bool(b.any()), made.opt_state[0].mu, False)
    jax.tree.map(np.testing.assert_array_equal, made.params, params)
    jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(made)
    assert not any(x.is_deleted() for x in [*jax.tree.leaves(params), key])
    jax.random.normal(key)  # still usable


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3, mask={"up": {"kernel": True}, "norm": {"scale": False}}),
        optax.chain(
            optax.add_decayed_weights(0.1, lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
            optax.sgd(optax.constant_schedule(0.1), momentum=0.9),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_optimizer_state_follows_its_parameters(tx):
    """Catches moments that are replicated, or that take another parameter's layout."""
    where = rules.Rules(mesh.make_mesh({"fsdp": 2, "tensor": 2}))
    placed = state.shardings(SPECS, tx, where)
    assert placed.params["up"]["kernel"].spec == P("fsdp", "tensor")
    assert placed.params["norm"]["scale"].spec == P("fsdp")
    assert placed.step.spec == P() and placed.key.spec == P()
    params = sp.init(SPECS, jax.random.key(0), rules=where)
    made = state.place(state.create(params, tx, jax.random.key(1)), placed)
    kernels = scales = 0
    for leaf in jax.tree.leaves(made.opt_state):
        if leaf.shape == (8, 12):
            assert leaf.sharding.spec == P("fsdp", "tensor")
            kernels += 1
        elif leaf.shape == (6,):
            assert leaf.sharding.spec == P("fsdp")
            scales += 1
        else:
            assert leaf.shape == () and leaf.sharding.is_fully_replicated
    assert kernels == scales >= 1
    assert {d.id for d in made.key.sharding.device_set} == {0, 1, 2, 3}
    jax.tree.map(np.testing.assert_array_equal, made.params, params)
