"""The other losses on pairs: by hand, against TRL's own code, and as functions of the gap.

tests/goldens/trl.json holds values and gradients that tests/goldens/record_trl.py read off the
installed TRL release.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import preference as p

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "trl.json").read_text())
INPUTS = {k: jnp.asarray(v, jnp.float32) for k, v in GOLDEN["inputs"].items()}


def ours(case):
    """Our loss of the recorded case, one number a pair, as a function of both rewards."""
    name, margin = case["name"], INPUTS["margin"]
    if name.startswith("reward"):
        kw = {"margin": margin} if "margin" in name else {}
        centre = case.get("centre", 0.0)
        return lambda c, r: p.bradley_terry(c, r, **kw) + centre * p.centring(c, r)
    beta = case["beta"]
    smoothing = case.get("smoothing", 0.0)
    return {
        "sigmoid": lambda c, r: p.log_exp(beta * c, beta * r),
        "aot": lambda c, r: p.soft_label(beta * c, beta * r, smoothing=smoothing),
        "hinge": lambda c, r: p.hinge(beta * c, beta * r),
        "ipo": lambda c, r: p.margin_regression(c, r, margin=1 / (2 * beta)),
        # Each answer against a number of its own: half and minus half of 1 / beta.
        "sppo_hard": lambda c, r: p.absolute_regression(
            c, r, chosen_score=0 * c + 0.5 / beta, rejected_score=0 * r - 0.5 / beta
        ),
    }[name]


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: "-".join(str(v) for v in c.values() if np.isscalar(v))
)
def test_values_and_gradients_are_those_of_trl(case):
    """Catches a formula that its author believes in: sign, scale, margin or a mean of the wrong
    pairs."""
    loss = ours(case)
    whole = np.isscalar(case["loss"])  # TRL's mean over the batch; else one pair a batch
    reduce = (lambda x: x.mean()) if whole else (lambda x: x.sum())
    slopes = jax.grad(lambda *a: reduce(loss(*a)), argnums=(0, 1))
    got = loss(INPUTS["chosen"], INPUTS["rejected"])
    np.testing.assert_allclose(got.mean() if whole else got, case["loss"], rtol=1e-6, atol=1e-12)
    for slope, side in zip(slopes(INPUTS["chosen"], INPUTS["rejected"]), ("chosen", "rejected")):
        np.testing.assert_allclose(slope, case[side], rtol=2e-6, atol=1e-9, err_msg=side)


def test_the_golden_file_says_where_it_is_from():
    """Catches numbers without a release, and a file that was recorded for a part of the losses."""
    assert GOLDEN["trl"] == "1.16.0" and GOLDEN["torch"].startswith("2.13")
    names = {case["name"].split()[0] for case in GOLDEN["cases"]}
    assert names == {"reward", "sigmoid", "hinge", "ipo", "sppo_hard", "aot"}


C, R = jnp.array([2.0, 0.0, -1.0]), jnp.array([1.0, 0.0, 3.0])


def test_by_hand():
    """Catches every slip that a person with a pencil can find: gaps are 1, 0 and -4."""
    log = lambda gap: math.log1p(math.exp(-gap))
    bt = [log(1), log(0), log(-4)]
    np.testing.assert_allclose(p.log_exp(C, R), bt, rtol=1e-6)
    np.testing.assert_allclose(p.hinge(C, R, margin=1.5), [0.5, 1.5, 5.5], rtol=1e-6)
    margin = jnp.array([1.0, 2.0, -4.0])
    np.testing.assert_allclose(p.hinge(C, R, margin=margin), [0, 2, 0], atol=1e-6)
    np.testing.assert_allclose(p.margin_regression(C, R, margin=margin), [0, 4, 0], atol=1e-6)
    scores = dict(chosen_score=jnp.array([2.0, 1.0, 0.0]), rejected_score=jnp.array([0.0, 0.0, 1]))
    np.testing.assert_allclose(p.absolute_regression(C, R, **scores), [1, 1, 5], rtol=1e-6)
    np.testing.assert_allclose(p.centring(C, R), [9, 0, 4], rtol=1e-6)
    half = [0.5 * (a + b) for a, b in zip(bt, [log(-1), log(0), log(4)])]
    np.testing.assert_allclose(p.soft_label(C, R, probability=0.5), half, rtol=1e-6)
    quarter = [0.75 * a + 0.25 * b for a, b in zip(bt, [log(-1), log(0), log(4)])]
    np.testing.assert_allclose(p.soft_label(C, R, smoothing=0.25), quarter, rtol=1e-6)


def test_a_soft_label_is_least_at_its_own_probability():
    """Catches a probability that goes to the wrong answer: there the gradient is 0."""
    q = jnp.array([0.2, 0.5, 0.9])
    gap = jnp.log(q / (1 - q))
    slope = jax.grad(lambda g: p.soft_label(g, 0 * g, probability=q).sum())(gap)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (p.log_exp, ()),
        (p.soft_label, ("probability",)),
        (p.hinge, ("margin",)),
        (p.margin_regression, ("margin",)),
        (p.absolute_regression, ("chosen_score", "rejected_score")),
        (p.centring, ()),
    ],
)
def test_shapes_dtypes_and_jit(loss, names):
    """Catches broadcasting of one pair's numbers over others, half precision, and jit."""
    rng = np.random.default_rng(0)
    c, r, *rest = (jnp.asarray(rng.uniform(0, 1, (2, 3)), jnp.bfloat16) for _ in range(4))
    kw = dict(zip(names, rest))
    got = loss(c, r, **kw)
    assert got.dtype == jnp.float32 and got.shape == (2, 3)
    np.testing.assert_allclose(jax.jit(loss)(c, r, **kw), got, rtol=1e-6)
    with pytest.raises(ValueError, match=f"{loss.__name__} needs equal shapes"):
        loss(c, r[:, :1], **kw)
    for name in names:
        with pytest.raises(ValueError, match=f"{loss.__name__} needs equal shapes"):
            loss(c, r, **{**kw, name: kw[name][0]})


def test_large_gaps_stay_finite():
    """Catches an exponential of the gap, which overflows from 89 on, and logs of 0."""
    far = jnp.array([1e4, -1e4])
    for loss in (p.log_exp, lambda c, r: p.soft_label(c, r, probability=0.3)):
        value, slope = jax.value_and_grad(lambda c: loss(c, 0 * far).sum())(far)
        assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("kw", "text"),
    [
        ({"smoothing": 0.6}, "smoothing in \\[0, 0.5\\]; received 0.6"),
        ({"probability": 1.5}, "probability in \\[0, 1\\]; received 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(kw, text):
    """Catches labels flipped more often than not, and percentages."""
    with pytest.raises(ValueError, match=text):
        p.soft_label(C, R, **kw)
