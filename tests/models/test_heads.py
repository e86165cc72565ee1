"""Heads: float32 whatever the states are, scores of order one when new, one reward an answer."""

import jax
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


MLP = heads.Config("scores", ("a", "b"), hidden=3)


def test_hidden_layer_by_hand():
    """Catches a missing bias or ReLU, and layers in the wrong order."""
    params = {
        "hidden": {
            "kernel": jnp.array([[1.0, -1.0, 0.0], [0.0, 2.0, 1.0]]),
            "bias": jnp.array([0.5, 0.0, -3.0]),
        },
        "out": {
            "kernel": jnp.array([[1.0, 0.0], [2.0, 1.0], [5.0, 5.0]]),
            "bias": jnp.array([0.0, 1.0]),
        },
    }
    sp.check(params, heads.specs(MLP, 2))
    # hidden = relu([1.5, 1, -2]) = [1.5, 1, 0]
    got = heads.outputs(params, jnp.array([[[1.0, 1.0]]]))
    np.testing.assert_allclose(got, [[[3.5, 2.0]]])


def test_new_hidden_heads_give_outputs_of_order_one():
    """Catches initial scales that shrink or blow up from layer to layer."""
    params = sp.init(heads.specs(heads.Config(hidden=256), 128), jax.random.key(0))
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 500, 128)), jnp.float32)
    assert 0.5 < float(jnp.std(heads.outputs(params, states))) < 1.5
    assert float(jnp.abs(params["hidden"]["bias"]).max()) == 0


def test_dropout_is_of_the_row_alone_and_keeps_the_mean():
    """Catches a mask shared by rows, one that depends on the batch, and kept inputs not scaled."""
    params = {"kernel": jnp.ones((64, 1))}
    states, keys = jnp.ones((8, 2, 64)), jax.random.split(jax.random.key(0), 8)
    got = heads.outputs(params, states, keys=keys, dropout=0.25)
    again = heads.outputs(params, states[3:5], keys=keys[3:5], dropout=0.25)
    np.testing.assert_allclose(got[3:5], again, rtol=1e-6)
    assert len(np.unique(np.round(got))) > 4 and abs(float(got.mean()) - 64) < 3
    np.testing.assert_array_equal(heads.outputs(params, states, keys=keys), 64.0)
    np.testing.assert_array_equal(heads.outputs(params, states, dropout=0.25), 64.0)


def test_one_reward_of_several_outputs():
    """Catches a softmax left out, default weights, and weights in another order."""
    values = jnp.array([[0.0, np.log(3.0)]])
    of = lambda *args: float(heads.reward(heads.Config(*args), values)[0])
    assert of("scores", ("a", "b")) == pytest.approx(np.log(3) / 2)
    assert of("scores", ("a", "b"), (2.0, 1.0)) == pytest.approx(np.log(3))
    assert of("classes", ("no", "yes")) == pytest.approx(0.75)
    assert of("classes", ("no", "yes"), (4.0, 1.0)) == pytest.approx(1.75)
    assert float(heads.reward(heads.SCALAR, jnp.array([[7.0]]))[0]) == 7.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("vector",), "unknown head 'vector'; use one of scalar, scores, classes"),
        (("scalar", ("a", "b")), "exactly one output"),
        (("classes", ("a",)), "at least two output"),
        (("scores", ()), "at least one output"),
        (("scores", ("a", "a")), "different names"),
        (("scores", ("a", "b"), (1.0,)), r"a number for each of the outputs"),
        (("scalar", ("a",), (1.0,)), "none for a scalar head"),
        (("scalar", ("a",), (), -1), "hidden >= 0"),
        (("scalar", ("a",), (), 0, 1.0), "dropout < 1"),
    ],
)
def test_impossible_heads_are_refused(arguments, text):
    """Catches a head that cannot be, before a model is loaded for it."""
    with pytest.raises(ValueError, match=text):
        heads.Config(*arguments)
