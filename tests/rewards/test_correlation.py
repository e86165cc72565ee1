"""Rewards of denoising steps: by hand, at their limits, and what shaping must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.rewards import correlation

close = np.testing.assert_allclose
RNG = np.random.default_rng(0)
INTRA, QUALITY = RNG.random((6, 3), np.float32), RNG.random((6, 3), np.float32)


def test_fluency_by_hand_and_at_its_ends():
    """Catches a perplexity that overflows, a reward below 0 beyond the cap, and cap and scale
    exchanged."""
    nll = np.log([1.0, 50.0, 99.0, 100.0, 101.0])
    close(correlation.fluency(nll), [0.99, 0.5, 0.01, 0, 0], atol=1e-5)
    close(correlation.fluency(nll, cap=80.0, scale=40.0), [79 / 40, 0.75, 0, 0, 0], atol=1e-5)
    far = correlation.fluency(np.float32([5.0, 89.0, 1e30, np.inf]))
    assert far.dtype == np.float32 and not far.any()
    assert correlation.fluency(np.float32(-np.inf)) == 1.0


def test_fluency_falls_with_perplexity():
    made = correlation.fluency(np.linspace(0.0, 4.5, 50))
    assert (np.diff(made) < 0).all() and made.max() < 1.0 and made.min() > 0.0


def test_step_rewards_by_hand():
    """Catches groups of the wrong steps, quality given to every group, and a first group without
    its quality."""
    intra = np.float32([[1, 10], [2, 20], [3, 30], [4, 40]])
    of = correlation.step_rewards
    close(of(intra, [100, 200]), [[1, 10], [2, 20], [3, 30], [104, 240]])
    close(of(intra, [100, 200], every=2), [[3, 30], [107, 270]])
    quality = np.float32([[9, 9], [5, 0], [9, 9], [6, 2]])
    close(of(intra, quality, every=2), [[3, 30], [13, 72]])
    close(of(intra, quality, every=2, shaping=True), [[8, 30], [8, 72]])


@pytest.mark.parametrize("every", [1, 2, 3, 6])
def test_shaping_moves_reward_but_makes_none(every):
    """Over the groups both add up to the rewards within steps and the final quality."""
    total = INTRA.sum(axis=0) + QUALITY[-1]
    for shaping in (False, True):
        made = correlation.step_rewards(INTRA, QUALITY, every=every, shaping=shaping)
        assert made.shape == (6 // every, 3) and made.dtype == np.float32
        close(made.sum(axis=0), total, rtol=1e-5)


def test_jax_arrays_and_jit_change_nothing():
    made = jax.jit(
        lambda i, q: (
            correlation.step_rewards(correlation.fluency(i), q[-1], every=2),
            correlation.step_rewards(i, q, every=3, shaping=True),
        )
    )(jnp.asarray(INTRA), jnp.asarray(QUALITY))
    plain = correlation.step_rewards(correlation.fluency(INTRA), QUALITY[-1], every=2)
    assert isinstance(made[0], jax.Array)
    close(made[0], plain, atol=1e-5)
    close(made[1], correlation.step_rewards(INTRA, QUALITY, every=3, shaping=True), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: correlation.fluency(INTRA, cap=0.0), "cap > 0 and scale > 0; received 0.0"),
        (lambda: correlation.step_rewards(INTRA, QUALITY[:, :2]), r"\(6, 3\) and \(6, 2\)"),
        (lambda: correlation.step_rewards(INTRA[0], QUALITY[0]), "needs intra"),
        (lambda: correlation.step_rewards(INTRA, QUALITY, every=4), "of 4 do not divide 6"),
        (lambda: correlation.step_rewards(INTRA, QUALITY, every=0), "of 0 do not divide 6"),
        (
            lambda: correlation.step_rewards(INTRA, QUALITY[0], shaping=True),
            "the quality of every measured draft",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    """Catches quality broadcast over answers, and steps that a group would lose."""
    with pytest.raises(ValueError, match=message):
        call()
