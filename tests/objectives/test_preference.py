"""Losses of pairs: values by hand, in float64 and from TRL; extremes, gradients, shapes."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import preference

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "trl.json").read_text())


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


# All losses

# One loss a pair, with what each needs beside the two rewards; float64 on the right, from the
# definitions.
sigmoid = lambda x: 1 / (1 + np.exp(-x))
LOSSES = {
    "bradley_terry": (("margin",), lambda c, r, m: np.logaddexp(0, m - c + r)),
    "log_exp": ((), lambda c, r: np.log(1 + np.exp(r - c))),
    "soft_label": (
        ("probability",),
        lambda c, r, p: -p * np.log(sigmoid(c - r)) - (1 - p) * np.log(sigmoid(r - c)),
    ),
    "hinge": (("margin",), lambda c, r, m: np.maximum(0, m - (c - r))),
    "margin_regression": (("margin",), lambda c, r, m: (c - r - m) ** 2),
    "absolute_regression": (
        ("chosen_score", "rejected_score"),
        lambda c, r, a, b: (c - a) ** 2 + (r - b) ** 2,
    ),
    "centring": ((), lambda c, r: (c + r) ** 2),
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def draw(name, shape=(6,), seed=3):
    """(rewards, what else the loss takes, the loss, its float64 formula)."""
    keys, formula = LOSSES[name]
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(2, *shape))
    more = {k: rng.uniform(0.1, 0.9, size=shape) for k in keys}
    return rewards, more, getattr(preference, name), formula


def singles(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize(
    ("name", "more", "want"),
    [
        ("log_exp", {}, [0.6931472, 0.1269280, 2.1269280]),
        ("soft_label", {"smoothing": 0.25}, [0.6931472, 0.6269280, 1.6269280]),
        ("soft_label", {"probability": [0.5, 1.0, 0.0]}, [0.6931472, 0.1269280, 0.1269280]),
        # q = 0.9 * 0.75 + 0.1 * 0.25 = 0.7
        ("soft_label", {"probability": 0.75, "smoothing": 0.1}, [0.6931472, 0.7269280, 1.5269280]),
        ("hinge", {}, [1.0, 0.0, 3.0]),
        ("hinge", {"margin": [0.0, 2.5, -3.0]}, [0.0, 0.5, 0.0]),
        ("bradley_terry", {"margin": 2.0}, [2.1269280, 0.6931472, 4.0181499]),
        ("margin_regression", {"margin": [0.0, 2.0, 2.0]}, [0.0, 0.0, 16.0]),
        ("margin_regression", {"margin": 1.0}, [1.0, 1.0, 9.0]),
        (
            "absolute_regression",
            {"chosen_score": [0.0, 4.0, 1.0], "rejected_score": [2.0, 1.0, 1.0]},
            [4.0, 1.0, 4.0],
        ),
        ("centring", {}, [0.0, 16.0, 16.0]),
    ],
)
def test_more_hand_values(name, more, want):
    """Catches a sign, a factor 1/2, a mean over the two answers, and q on the wrong side."""
    more = {k: jnp.array(v) if isinstance(v, list) else v for k, v in more.items()}
    loss = getattr(preference, name)(jnp.array([0.0, 3.0, 1.0]), jnp.array([0.0, 1.0, 3.0]), **more)
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-7)


@every_loss
def test_each_loss_is_its_formula_with_its_gradients(name):
    """Catches a stopped, doubled or flipped gradient in any argument, and jit that differs."""
    rewards, more, loss, formula = draw(name)
    arrays = [*rewards, *more.values()]
    ours = lambda *a: loss(*a[:2], **dict(zip(more, a[2:])))
    given = singles(arrays)
    plain = ours(*given)
    np.testing.assert_allclose(plain, formula(*arrays), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(ours)(*given), plain, rtol=1e-6, atol=1e-7)
    every = tuple(range(len(given)))
    slopes = jax.grad(lambda *a: ours(*a).sum(), argnums=every)(*given)
    h = 1e-6
    for i, slope in enumerate(slopes):
        moved = lambda d: formula(*(x + d * (j == i) for j, x in enumerate(arrays)))
        np.testing.assert_allclose(slope, (moved(h) - moved(-h)) / (2 * h), atol=2e-5)


@every_loss
def test_each_loss_is_of_its_own_pair(name):
    """Catches a broadcast or a batch statistic: pairs in another order, or alone, give the same."""
    rewards, more, loss, _ = draw(name)
    rewards, more = singles((rewards, more))
    whole = loss(*rewards, **more)
    assert whole.shape == (6,) and whole.dtype == jnp.float32
    order = np.array([4, 2, 5, 0, 3, 1])
    shuffled = loss(*rewards[:, order], **{k: x[order] for k, x in more.items()})
    np.testing.assert_array_equal(shuffled, whole[order])
    alone = [loss(*rewards[:, i], **{k: x[i] for k, x in more.items()}) for i in range(6)]
    np.testing.assert_allclose(alone, whole, rtol=1e-6)


@every_loss
def test_each_loss_refuses_unequal_shapes_by_name(name):
    """Catches [B, 1] against [B] in any argument, which would give [B, B] losses and no error."""
    rewards, more, loss, _ = draw(name, (3,))
    given = {"chosen": rewards[0], "rejected": rewards[1], **more}
    for key in given:
        wrong = {k: jnp.asarray(x[:, None] if k == key else x) for k, x in given.items()}
        with pytest.raises(ValueError, match=rf"{name} needs equal shapes; .*'{key}': \(3, 1\)"):
            loss(**wrong)


@every_loss
@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_each_loss_is_finite_far_out(name, gap):
    """Catches a logarithm of a saturated sigmoid, and an exponential that overflows."""
    _, more, loss, _ = draw(name, ())
    value, slope = jax.value_and_grad(lambda c: loss(c, jnp.float32(0), **singles(more)))(
        jnp.float32(gap)
    )
    assert np.isfinite(value) and np.isfinite(slope) and value >= 0


@every_loss
def test_each_loss_computes_in_float32(name):
    """Catches a subtraction in bfloat16, and a NaN that is hidden."""
    rewards, more, loss, formula = draw(name)
    short = [jnp.asarray(x, jnp.bfloat16) for x in (*rewards, *more.values())]
    got = loss(*short[:2], **dict(zip(more, short[2:])))
    assert got.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in short]
    np.testing.assert_allclose(got, formula(*exact), rtol=1e-5, atol=1e-6)
    nan = jnp.full(6, jnp.nan)
    assert np.isnan(loss(nan, singles(rewards[1]), **singles(more))).all()


@every_loss
def test_which_losses_feel_a_constant(name):
    """Catches a loss of the gap that is not one, and a centring that centres nothing."""
    rewards, more, loss, _ = draw(name)
    rewards, more = singles((rewards, more))
    same = np.allclose(loss(*(rewards + 2), **more), loss(*rewards, **more), atol=1e-5)
    assert same == (name not in ("absolute_regression", "centring"))


def test_where_the_soft_label_is_smallest():
    """Catches a probability of the other answer: the best gap is log(q / (1 - q)), 0 at a half."""
    p = jnp.array([0.5, 0.75, 0.9])
    gap = jnp.log(p / (1 - p))
    slope = jax.grad(lambda g: preference.soft_label(g, 0 * g, probability=p).sum())(gap)
    np.testing.assert_allclose(slope, np.zeros(3), atol=1e-6)
    whole = preference.soft_label(gap, 0 * gap)
    np.testing.assert_allclose(whole, preference.bradley_terry(gap, 0 * gap), rtol=1e-6)


@pytest.mark.parametrize("kw", [{"probability": 1.5}, {"smoothing": 0.6}, {"smoothing": -0.1}])
def test_soft_label_refuses_numbers_out_of_range(kw):
    """Catches labels that are flipped by a slip in the config."""
    (word,) = kw
    with pytest.raises(ValueError, match=f"soft_label needs {word} in .*received {kw[word]}"):
        preference.soft_label(jnp.zeros(2), jnp.zeros(2), **kw)


def test_regression_keeps_the_strength_of_each_pair():
    """Catches every pair regressed on the mean margin: gaps equal to their own margins cost 0."""
    gap = jnp.array([1.0, 5.0, 2.0, 8.0])
    loss = functools.partial(preference.margin_regression, gap, jnp.zeros(4))
    assert not loss(margin=gap).any()
    assert loss(margin=gap[::-1]).sum() == 2 * (49 + 9)


# TRL


def _ours(case):
    """Our function of (chosen, rejected) for one recorded case, unreduced."""
    kind, beta = case["name"], case.get("beta")
    margin = jnp.asarray(GOLDEN["inputs"]["margin"], jnp.float32)
    if kind.startswith("reward"):
        margin = margin if "margin" in kind else None
        centre = case.get("centre", 0.0)
        return lambda c, r: (
            preference.bradley_terry(c, r, margin=margin) + centre * preference.centring(c, r)
        )
    at = lambda c: jnp.full(c.shape, 0.5 / beta)
    return {
        "sigmoid": lambda c, r: preference.bradley_terry(beta * c, beta * r),
        "hinge": lambda c, r: preference.hinge(beta * c, beta * r),
        "ipo": lambda c, r: preference.margin_regression(c, r, margin=0.5 / beta),
        "sppo_hard": lambda c, r: preference.absolute_regression(
            c, r, chosen_score=at(c), rejected_score=-at(c)
        ),
        "aot": lambda c, r: preference.soft_label(beta * c, beta * r, smoothing=case["smoothing"]),
    }[kind]


@pytest.mark.parametrize(
    "case",
    GOLDEN["cases"],
    ids=lambda c: "-".join(str(v) for k, v in c.items() if k not in ("loss", "chosen", "rejected")),
)
def test_values_and_gradients_are_those_of_trl(case):
    """Catches any departure from TRL's own code, recorded by goldens/record_trl.py."""
    chosen, rejected = (jnp.asarray(GOLDEN["inputs"][k]) for k in ("chosen", "rejected"))
    ours = _ours(case)
    singly = isinstance(case["loss"], list)
    reduce = jnp.sum if singly else jnp.mean
    slopes = jax.grad(lambda c, r: reduce(ours(c, r)), argnums=(0, 1))(chosen, rejected)
    value = ours(chosen, rejected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12)
    close(value if singly else value.mean(), case["loss"])
    # Near its optimum the slope of a soft label is the difference of two terms of order 0.1.
    close(slopes[0], case["chosen"], atol=1e-9)
    close(slopes[1], case["rejected"], atol=1e-9)
    if case["name"] == "sigmoid":
        close(preference.log_exp(case["beta"] * chosen, case["beta"] * rejected), case["loss"])


def test_the_golden_says_what_made_it():
    """Catches a golden of an unknown release."""
    assert GOLDEN["trl"] == "1.16.0" and len(GOLDEN["cases"]) == 22
