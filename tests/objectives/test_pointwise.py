"""Losses on single answers, by hand and by their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import pointwise


def test_by_hand():
    """Catches a factor 1/2, a swapped label, and a softmax over the wrong axis."""
    outputs = jnp.array([[1.0, -2.0], [0.0, 3.0]])
    np.testing.assert_allclose(
        pointwise.regression(outputs, jnp.array([[3.0, -2.0], [0.5, 0.0]])), [[4, 0], [0.25, 9]]
    )
    got = pointwise.logistic(jnp.array([[0.0, np.log(3.0)]]), jnp.array([[0.5, 0.0]]))
    np.testing.assert_allclose(got, [[np.log(2), np.log(4)]], rtol=1e-6)
    got = pointwise.cross_entropy(
        jnp.array([[0.0, np.log(3.0)], [5.0, 5.0]]), jnp.array([[1.0], [0.0]])
    )
    np.testing.assert_allclose(got, [[np.log(4 / 3)], [np.log(2)]], rtol=1e-6)


def test_large_outputs_stay_finite():
    """Catches exponentials that overflow in the value or the gradient."""
    outputs = jnp.array([[1e4, -1e4]])
    for loss, targets in (
        (pointwise.logistic, jnp.array([[0.0, 1.0]])),
        (pointwise.cross_entropy, jnp.array([[1.0]])),
    ):
        value, slope = jax.value_and_grad(lambda o: loss(o, targets).sum())(outputs)
        assert np.isfinite(value) and np.isfinite(slope).all() and value >= 1e4


def test_gradient_of_cross_entropy_is_softmax_minus_one_hot():
    """Catches a gradient that also reaches the class through the comparison of indices."""
    outputs = jnp.array([[0.3, -1.0, 2.0]])
    slope = jax.grad(lambda o: pointwise.cross_entropy(o, jnp.array([[2.0]])).sum())(outputs)
    want = jax.nn.softmax(outputs) - jnp.array([[0.0, 0.0, 1.0]])
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_a_class_that_is_none_is_seen():
    """Catches an index out of range that silently costs the full normaliser."""
    assert np.isnan(pointwise.cross_entropy(jnp.zeros((1, 2)), jnp.array([[2.0]]))).all()


def test_shapes_are_checked_and_bfloat16_is_lifted():
    """Catches [B,1] targets broadcast against [B,C] outputs, and losses in half precision."""
    with pytest.raises(ValueError, match=r"one shape; received \(4, 2\) and \(4, 1\)"):
        pointwise.regression(jnp.zeros((4, 2)), jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"one class index, \(4, 1\) .*received \(4, 2\)"):
        pointwise.cross_entropy(jnp.zeros((4, 2)), jnp.zeros((4, 2)))
    half = jnp.ones((2, 2), jnp.bfloat16)
    assert pointwise.regression(half, half).dtype == jnp.float32
    assert jax.jit(pointwise.logistic)(half, half).dtype == jnp.float32
