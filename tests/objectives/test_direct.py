"""Losses on log-probs of answers: values by hand, and values and gradients from TRL; extremes,
lengths of 0, shapes."""

import inspect
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import direct

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "trl_direct.json").read_text())
PAIRS = GOLDEN["inputs"]["pairs"]
LOSSES = {
    "dpo": direct.dpo,
    "hinge": direct.hinge,
    "ipo": direct.ipo,
    "simpo": direct.simpo,
    "orpo": direct.orpo,
    "cpo": direct.cpo,
    "nll": direct.nll,
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def given(fn, chosen, rejected, **more):
    """What a loss takes, by the names of its parameters."""
    known = {"chosen_logps": chosen, "rejected_logps": rejected, **more}
    return {key: known[key] for key in inspect.signature(fn).parameters if key in known}


def recorded_inputs():
    sums = lambda side: jnp.array([sum(pair[side]) for pair in PAIRS])
    lens = lambda side: jnp.array([float(len(pair[side])) for pair in PAIRS])
    refs = jnp.array(GOLDEN["inputs"]["reference"]).T
    return (
        sums(0),
        sums(1),
        dict(ref_chosen=refs[0], ref_rejected=refs[1], chosen_len=lens(0), rejected_len=lens(1)),
    )


def ours(case):
    """The function that a recorded case stands for, of (chosen, rejected) and the rest."""
    keys = {k: case[k] for k in ("beta", "gamma", "smoothing") if k in case}
    name = case["name"]
    if name == "orpo":
        weight = keys.pop("beta")
        parts = [(direct.nll, 1.0, {}), (direct.orpo, weight, {})]
    elif name == "cpo nll":
        parts = [(direct.cpo, 1.0, keys), (direct.nll, case["alpha"], {})]
    elif name == "nll":
        parts = [(direct.nll, 1.0, {})]
    else:
        parts = [({"sigmoid": direct.dpo}.get(name) or LOSSES[name], 1.0, keys)]

    def loss(chosen, rejected, more):
        return sum(c * fn(**given(fn, chosen, rejected, **more), **kw) for fn, c, kw in parts)

    return loss


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda c: f"{c['name']} {c.get('beta', '')}",
)
def test_values_and_gradients_are_those_of_trl(case):
    """Catches a sign, a factor, a length left out or taken twice, and a reference with a gradient
    of its own, in any of the losses."""
    chosen, rejected, more = recorded_inputs()
    loss = ours(case)
    np.testing.assert_allclose(loss(chosen, rejected, more), case["loss"], rtol=2e-6, atol=1e-8)
    slopes = jax.grad(lambda c, r: loss(c, r, more).sum(), argnums=(0, 1))(chosen, rejected)
    for slope, side in zip(slopes, ("chosen", "rejected"), strict=True):
        np.testing.assert_allclose(slope, case[side], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("case", GOLDEN["unpaired"], ids=lambda c: f"{c['name']} {c['beta']}")
def test_kto_is_that_of_trl(case):
    """Catches good and bad the wrong way round, an estimate below 0 that counts, one with a
    gradient, and weights on the wrong side."""
    at = GOLDEN["inputs"]
    sums = lambda name: jnp.array([sum(x) for x in at[name]])
    which = case["name"].split()[-1]
    estimate = jnp.mean(sums("others") - jnp.array(at["others reference"][which]))
    assert max(float(estimate), 0.0) == case["kl"]

    def loss(logps, kl):
        weights = {k: case[k] for k in ("beta", "desirable_weight", "undesirable_weight")}
        ref = jnp.array(at["answers reference"])
        return direct.kto(logps, jnp.array(at["desirable"]), ref_logps=ref, kl=kl, **weights).mean()

    value, (slope, of_kl) = jax.value_and_grad(loss, (0, 1))(sums("answers"), estimate)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(slope, case["gradient"], rtol=1e-5)
    assert of_kl == 0


def test_hand_values_at_the_reference():
    """Catches a reference that is not subtracted: log 2, 1 / (4 beta^2), 1 and half the weight,
    whatever the log-probs are."""
    chosen, rejected = jnp.array([-3.0, -40.0]), jnp.array([-7.0, -2.0])
    at = dict(ref_chosen=chosen, ref_rejected=rejected)
    lens = dict(chosen_len=jnp.array([3.0, 9.0]), rejected_len=jnp.array([5.0, 1.0]))
    np.testing.assert_allclose(direct.dpo(chosen, rejected, **at, beta=0.3), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(direct.hinge(chosen, rejected, **at, beta=0.3), 1.0)
    np.testing.assert_allclose(
        direct.ipo(chosen, rejected, **at, **lens, beta=0.25), 1 / (4 * 0.25**2), rtol=1e-6
    )
    good = jnp.array([True, False])
    weights = dict(desirable_weight=1.0, undesirable_weight=3.0)
    np.testing.assert_allclose(
        direct.kto(chosen, good, ref_logps=chosen, kl=0.0, **weights), [0.5, 1.5]
    )


def test_hand_values_without_a_reference():
    """Catches sums where there should be means. Means of -1 and -2: SimPO at beta 2 and gamma 1 is
    softplus(-1), CPO at beta 1 and sums of -2 and -8 softplus(-6), ORPO compares odds of
    e^-1 / (1 - e^-1) and e^-2 / (1 - e^-2)."""
    chosen, rejected = jnp.array([-2.0]), jnp.array([-8.0])
    lens = dict(chosen_len=jnp.array([2.0]), rejected_len=jnp.array([4.0]))
    got = direct.simpo(chosen, rejected, **lens, beta=2.0, gamma=1.0)
    np.testing.assert_allclose(got, math.log1p(math.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(
        direct.cpo(chosen, rejected, beta=1.0), math.log1p(math.exp(-6)), rtol=1e-5
    )
    odds = lambda p: p / (1 - p)
    want = math.log1p(odds(math.exp(-2)) / odds(math.exp(-1)))
    np.testing.assert_allclose(direct.orpo(chosen, rejected, **lens), want, rtol=1e-6)
    np.testing.assert_allclose(direct.nll(chosen, chosen_len=lens["chosen_len"]), 1.0)


def test_smoothing_pulls_back_once_the_gap_is_large():
    """Catches smoothing that TRL's `robust` has, and none at all: the smallest loss is where
    sigmoid of the gap is 1 - epsilon."""
    best = math.log(0.8 / 0.2)
    zero = jnp.zeros(())
    slope = jax.grad(
        lambda c: direct.dpo(c, zero, ref_chosen=zero, ref_rejected=zero, beta=1.0, smoothing=0.2)
    )
    np.testing.assert_allclose(slope(jnp.float32(best)), 0.0, atol=1e-6)
    assert slope(jnp.float32(best - 1)) < 0 < slope(jnp.float32(best + 1))


@every_loss
def test_answers_without_tokens_have_finite_values_and_gradients(name):
    """Catches 0 / 0, the odds of probability 1 (and their gradient through a `where`), which a pair
    of weight 0 would carry into the step as NaN."""
    fn = LOSSES[name]
    zeros = jnp.zeros(2)
    more = dict.fromkeys(("ref_chosen", "ref_rejected", "chosen_len", "rejected_len"), zeros)

    def loss(chosen, rejected):
        return fn(**given(fn, chosen, rejected, **more)).sum()

    value, slopes = jax.value_and_grad(loss, (0, 1))(zeros, zeros)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in slopes)
    if "chosen_len" in inspect.signature(fn).parameters:
        np.testing.assert_array_equal(np.asarray(slopes), 0.0)


@every_loss
@pytest.mark.parametrize("gap", [3e4, -3e4])
def test_extreme_gaps_are_finite(name, gap):
    """Catches exp and log of what float32 does not hold."""
    fn = LOSSES[name]
    chosen, rejected = (jnp.array([-1.0]), jnp.array([-1.0 - abs(gap)]))[:: 1 if gap > 0 else -1]
    more = dict.fromkeys(("ref_chosen", "ref_rejected"), jnp.array([-1.0]))
    more |= dict.fromkeys(("chosen_len", "rejected_len"), jnp.array([1.0]))
    loss = lambda c, r: fn(**given(fn, c, r, **more)).sum()
    value, slopes = jax.value_and_grad(loss, (0, 1))(chosen, rejected)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in slopes)


@every_loss
def test_float32_whatever_comes_in_and_jit_changes_nothing(name):
    """Catches products in bfloat16, and a check of values that tracing cannot pass."""
    chosen, rejected, more = recorded_inputs()
    fn = LOSSES[name]
    kw = given(fn, chosen, rejected, **more)
    plain = fn(**kw)
    np.testing.assert_allclose(jax.jit(lambda kw: fn(**kw))(kw), plain, rtol=1e-5, atol=1e-7)
    low = fn(**{k: v.astype(jnp.bfloat16) for k, v in kw.items()})
    assert plain.dtype == low.dtype == jnp.float32 and plain.shape == (len(PAIRS),)


@every_loss
def test_unequal_shapes_are_refused(name):
    """Catches [B, 1] against [B], which would compare every answer with every other."""
    fn = LOSSES[name]
    wrong = {k: jnp.zeros((3, 1) if i else 3) for i, k in enumerate(given(fn, 0, 0, **NAMES))}
    if len(wrong) > 1:
        with pytest.raises(ValueError, match=rf"{name} needs equal shapes; received \(3,\)"):
            fn(**wrong)


NAMES = dict.fromkeys(("ref_chosen", "ref_rejected", "chosen_len", "rejected_len"), 0)


def test_numbers_out_of_range_are_named():
    """Catches a beta of 0, which compares nothing, and a negative margin."""
    zero = jnp.zeros(1)
    pair = dict(ref_chosen=zero, ref_rejected=zero)
    lens = dict(chosen_len=zero, rejected_len=zero)
    with pytest.raises(ValueError, match=r"dpo needs beta above 0; received 0"):
        direct.dpo(zero, zero, **pair, beta=0.0)
    with pytest.raises(ValueError, match=r"ipo needs beta above 0; received -1"):
        direct.ipo(zero, zero, **pair, **lens, beta=-1.0)
    with pytest.raises(ValueError, match=r"simpo needs gamma at or above 0"):
        direct.simpo(zero, zero, **lens, gamma=-0.5)
    with pytest.raises(ValueError, match=r"smoothing in \[0, 0.5\]"):
        direct.cpo(zero, zero, smoothing=0.6)


def test_the_implicit_reward_is_what_losses_compare():
    """Catches a reward in other units than the loss: softplus of minus its gap is DPO, and with
    lengths SimPO."""
    chosen, rejected, more = recorded_inputs()
    ref = jnp.stack([more["ref_chosen"], more["ref_rejected"]])
    length = jnp.stack([more["chosen_len"], more["rejected_len"]])
    both = jnp.stack([chosen, rejected])
    good, bad = direct.implicit_reward(both, ref_logps=ref, beta=0.5)
    want = direct.dpo(**given(direct.dpo, chosen, rejected, **more), beta=0.5)
    np.testing.assert_allclose(jax.nn.softplus(bad - good), want, rtol=1e-6)
    good, bad = direct.implicit_reward(both, length=length, beta=2.0)
    want = direct.simpo(**given(direct.simpo, chosen, rejected, **more), beta=2.0, gamma=0.0)
    np.testing.assert_allclose(jax.nn.softplus(bad - good), want, rtol=1e-6)
