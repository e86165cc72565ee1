"""The scalar head: float32 whatever the states are, and scores of order one when new."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.models import heads
from jaxreward.parallel import specs as sp


def test_scalar_by_hand():
    """Catches a bias, a transposed kernel, or a score axis that is not dropped."""
    kernel = {"kernel": jnp.array([[2.0], [-1.0], [0.5]])}
    h = jnp.array([[[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]]])
    np.testing.assert_array_equal(heads.scalar(kernel, h), [[2.0, -1.0]])


def test_several_scores_keep_their_axis():
    """Catches a squeeze that also drops the axis of several scores."""
    kernel = {"kernel": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
    np.testing.assert_array_equal(heads.scalar(kernel, jnp.array([[2.0, 5.0]])), [[2.0, 15.0]])


def test_bfloat16_states_and_kernel_give_a_float32_product():
    """Catches a product taken in bfloat16, whose three digits tie close rewards."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(20, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(64, 1)), jnp.bfloat16)
    got = heads.scalar({"kernel": kernel}, h)
    assert got.dtype == jnp.float32
    want = np.asarray(h, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(got, want[:, 0], rtol=1e-5, atol=1e-5)


def test_new_scores_are_of_order_one():
    """Catches an initial scale that saturates the loss or makes all scores equal."""
    assert heads.scalar_specs(99)["kernel"].scale == pytest.approx(0.1)
    assert heads.scalar_specs(99, scale=0.0)["kernel"].scale == 0.0
    (kernel,) = heads.scalar_specs(99, scores=3).values()
    sp.check({"kernel": np.zeros((99, 3))}, {"kernel": kernel})
