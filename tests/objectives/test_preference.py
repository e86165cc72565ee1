"""Bradley-Terry: values by hand and in float64, extremes, gradients, shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import preference


def formula(chosen, rejected, margin=0.0):
    """-log sigmoid of the gap, in float64."""
    return np.log1p(np.exp(-(np.float64(chosen) - np.float64(rejected) - np.float64(margin))))


def test_hand_values():
    """Catches a sign or the wrong answer in front: log 2 at no gap, log(1 + e^-2) at a gap of 2."""
    loss = preference.bradley_terry(jnp.array([0.0, 3.0, 1.0]), jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(loss, [0.6931472, 0.1269280, 2.1269280], rtol=1e-6)


def test_margins_belong_to_their_own_pair():
    """Catches margins broadcast against other pairs.

    With equal rewards the losses at margins 0, 5 and -5 are log 2, 5.0067153 and 0.0067153, so
    their mean is 1.9021926; every answer against every margin would give the same mean here, which
    is why the gaps below differ from pair to pair.
    """
    margin = jnp.array([0.0, 5.0, -5.0])
    loss = preference.bradley_terry(jnp.zeros(3), jnp.zeros(3), margin=margin)
    np.testing.assert_allclose(loss, [0.6931472, 5.0067153, 0.0067153], rtol=1e-5)
    chosen, rejected = np.array([2.0, 0.5, -1.0]), np.array([1.0, -1.0, 3.0])
    loss = preference.bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected), margin=margin)
    np.testing.assert_allclose(loss, formula(chosen, rejected, np.array([0, 5, -5])), rtol=1e-6)
    assert loss.shape == (3,)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin"),
    [
        ((3, 1), (3, 1), (3,)),
        ((3, 1), (3,), None),
        ((3,), (), None),
        ((3,), (3,), (1,)),
        ((3,), (3,), ()),
    ],
)
def test_unequal_shapes_are_refused_by_name(chosen, rejected, margin):
    """Catches the broadcast of [B, 1] against [B], which gives [B, B] losses and no error."""
    margin = None if margin is None else jnp.zeros(margin)
    with pytest.raises(ValueError, match=r"equal shapes; received .*'chosen': \(3,"):
        preference.bradley_terry(jnp.zeros(chosen), jnp.zeros(rejected), margin=margin)


@pytest.mark.parametrize("gap", [1e4, -1e4, 60.0, -60.0])
def test_extreme_gaps_have_finite_values_and_gradients(gap):
    """Catches log(sigmoid(x)), which is -inf far below 0 and has a NaN gradient there."""
    value, gradient = jax.value_and_grad(lambda c: preference.bradley_terry(c, jnp.float32(0)))(
        jnp.float32(gap)
    )
    np.testing.assert_allclose(value, max(-gap, 0.0), atol=1e-6)
    np.testing.assert_allclose(gradient, -1.0 if gap < 0 else 0.0, atol=1e-6)


def test_digits_are_kept_for_large_gaps():
    """Catches 1 - sigmoid: at a gap of 30 the loss is e^-30, not 0."""
    loss = preference.bradley_terry(jnp.float32(30), jnp.float32(0))
    np.testing.assert_allclose(loss, np.exp(-30.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_scores_give_a_float32_loss(dtype):
    """Catches a subtraction in the dtype of the scores: 1.0078125 - 256 rounds to -255 there."""
    chosen, rejected = jnp.array([1.0078125, 2.0], dtype), jnp.array([256.0, 1.5], dtype)
    margin = jnp.array([0.0, 1.0], dtype)
    loss = preference.bradley_terry(chosen, rejected, margin=margin)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula([1.0078125, 2.0], [256.0, 1.5], [0.0, 1.0]), rtol=1e-6)
    assert preference.bradley_terry(chosen, rejected).dtype == jnp.float32


def test_the_gradient_is_that_of_finite_differences_and_jit_changes_nothing():
    """Catches a stopped or doubled gradient in any of the three arguments."""
    rng = np.random.default_rng(1)
    chosen, rejected, margin = (rng.normal(size=6) for _ in range(3))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (chosen, rejected, margin))
    loss = lambda c, r, m: preference.bradley_terry(c, r, margin=m)
    plain = loss(*arrays)
    np.testing.assert_allclose(jax.jit(loss)(*arrays), plain, rtol=1e-6)
    gradients = jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1, 2))(*arrays)
    h = 1e-6
    steps = [(h, 0, 0), (0, h, 0), (0, 0, h)]
    for gradient, (a, b, c) in zip(gradients, steps):
        up = formula(chosen + a, rejected + b, margin + c)
        down = formula(chosen - a, rejected - b, margin - c)
        np.testing.assert_allclose(gradient, (up - down) / (2 * h), atol=1e-6)


def test_shifting_both_rewards_changes_nothing_and_swapping_mirrors():
    """Catches a term that is not a function of the gap: loss(a, b) - loss(b, a) = b - a."""
    chosen, rejected = jnp.array([[1.0, -2.0]]), jnp.array([[0.25, 0.5]])
    loss = preference.bradley_terry(chosen, rejected)
    np.testing.assert_allclose(preference.bradley_terry(chosen + 8, rejected + 8), loss, rtol=1e-6)
    swapped = preference.bradley_terry(rejected, chosen)
    np.testing.assert_allclose(loss - swapped, rejected - chosen, rtol=1e-6, atol=1e-6)
    assert loss.shape == (1, 2)


def test_a_nan_is_not_hidden():
    """Catches a clip or a guard that turns a diverged score into a harmless loss."""
    assert np.isnan(preference.bradley_terry(jnp.float32(np.nan), jnp.float32(0)))
