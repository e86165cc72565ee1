"""Accuracy on pairs and its interval, by hand."""

import math

import numpy as np
import pytest

from jaxreward.data.tokenize import Tree
from jaxreward.evals import pairwise


def tree(pairs, answers=2, weight=None, subset=None):
    """A tree of one-token answers; only its pairs matter here."""
    return Tree(
        id="t",
        prompt=np.zeros(1, np.int32),
        answers=[np.zeros(1, np.int32)] * answers,
        loss=[np.ones(1, bool)] * answers,
        pairs=pairs,
        margin=[0.0] * len(pairs),
        weight=weight or [1.0] * len(pairs),
        subset=subset,
    )


TREES = [
    tree([(0, 1)], subset="a"),
    tree([(1, 0), (2, 0), (1, 2)], answers=3, weight=[1.0, 2.0, 1.0], subset="b"),
    tree([(1, 0)]),
]
SCORES = [np.float32([2, 1]), np.float32([0, 3, 0]), np.float32([5, 1])]


def test_outcomes_keep_order_and_ties_count_half():
    """Catches swapped answers, a tie counted as right, or a pair under another tree's name."""
    got = pairwise.outcomes(TREES, SCORES)
    np.testing.assert_array_equal(got["gap"], [1, 3, 0, 3, -4])
    np.testing.assert_array_equal(got["right"], [1, 1, 0.5, 1, 0])
    np.testing.assert_array_equal(got["weight"], [1, 1, 2, 1, 1])
    np.testing.assert_array_equal(got["tree"], [0, 1, 1, 1, 2])
    assert got["subset"].tolist() == ["a", "b", "b", "b", ""]
    with pytest.raises(ValueError):
        pairwise.outcomes(TREES, SCORES[:2])


def test_accuracy_by_hand():
    """Catches pairs that ignore their weight: the tie above weighs two of six."""
    got = dict(pairwise.accuracy(lambda trees: SCORES, TREES))
    softplus = [math.log1p(math.exp(-g)) for g in (1, 3, 0, 3, -4)]
    want = {
        "accuracy": (1 + 1 + 2 * 0.5 + 1 + 0) / 6,
        "margin": (1 + 3 + 0 + 3 - 4) / 6,
        "loss": (softplus[0] + softplus[1] + 2 * softplus[2] + softplus[3] + softplus[4]) / 6,
        "pairs": 5.0,
        "accuracy/a": 1.0,
        "accuracy/b": (1 + 2 * 0.5 + 1) / 4,
    }
    assert list(got) == list(want)
    assert got == pytest.approx(want)


def test_the_loss_of_a_large_gap_is_finite():
    """Catches exp(1e4)."""
    got = dict(pairwise.accuracy(lambda t: [np.float32([0, 1e4])], [tree([(0, 1)])]))
    assert got["loss"] == pytest.approx(1e4) and got["accuracy"] == 0


def test_pairs_of_weight_zero_count_nowhere():
    """Catches a pair that was switched off and still makes up the number of pairs or a subset."""
    trees = [tree([(0, 1)]), tree([(0, 1)], weight=[0.0], subset="off")]
    got = dict(pairwise.accuracy(lambda t: [np.float32([2, 1]), np.float32([1, 2])], trees))
    assert got["accuracy"] == 1 and got["pairs"] == 1 and "accuracy/off" not in got
    assert dict(pairwise.accuracy(lambda t: [np.float32([1, 2])], trees[1:])) == {"pairs": 0.0}
    assert dict(pairwise.accuracy(lambda t: [], [])) == {"pairs": 0.0}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_score_is_not_hidden():
    """Catches an answer without a score that counts as a loss, or as a win."""
    got = dict(pairwise.accuracy(lambda t: [np.float32([np.nan, 1])], [tree([(0, 1)])]))
    assert math.isnan(got["accuracy"]) and math.isnan(got["margin"])


def test_measures_with_intervals():
    """Catches an interval around another number than the one without."""
    found = pairwise.outcomes(TREES, SCORES)
    plain, wide = dict(pairwise.measures(found)), dict(pairwise.measures(found, samples=200))
    assert list(plain) == list(wide)
    for name in plain:
        if name == "pairs":
            assert wide[name] == 5
            continue
        value, low, high = wide[name]
        assert value == pytest.approx(plain[name])
        assert low <= value <= high
    assert wide["accuracy/a"] == (1, 1, 1)  # one prompt: nothing to resample
    direct = dict(pairwise.accuracy(lambda t: SCORES, TREES, samples=200))
    assert direct == pytest.approx(plain)


def test_bootstrap_quantiles_of_two_groups():
    """Catches wrong tails: of two groups 0 and 1 the mean is 0, 1/2, 1 with odds 1 : 2 : 1."""
    values, groups = np.array([0.0, 1.0]), np.array([7, 3])
    assert pairwise.bootstrap(values, groups) == (0.5, 0.0, 1.0)
    assert pairwise.bootstrap(values, groups, level=0.4) == (0.5, 0.5, 0.5)
    # A quarter below at 0 and a quarter above at 1: only wider than 1/2 reaches them.
    assert pairwise.bootstrap(values, groups, level=0.6) == (0.5, 0.0, 1.0)


def test_bootstrap_draws_groups_not_values():
    """Catches intervals that shrink when every answer is copied ten times."""
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=12), np.arange(12)
    once = pairwise.bootstrap(values, groups, samples=500)
    copied = pairwise.bootstrap(values.repeat(10), groups.repeat(10), samples=500)
    assert copied == pytest.approx(once)
    apart = pairwise.bootstrap(values.repeat(10), np.arange(120), samples=500)
    assert apart[2] - apart[1] < 0.5 * (once[2] - once[1])
    # Names of groups and the order of values carry no meaning.
    named = pairwise.bootstrap(values, np.array([f"p{i:02}" for i in groups]), samples=500)
    assert named == pytest.approx(once)


def test_bootstrap_weights():
    """Catches a weight that moves the value but not the interval."""
    values, groups = np.array([0.0, 1.0, 5.0]), np.array([0, 1, 2])
    mean, low, high = pairwise.bootstrap(values, groups, weights=np.array([1.0, 3.0, 0.0]))
    assert (mean, low, high) == (0.75, 0.0, 1.0)
    doubled = pairwise.bootstrap(values, groups, weights=np.array([2.0, 6.0, 0.0]))
    assert doubled == (mean, low, high)


def test_bootstrap_of_nothing_and_of_one():
    """Catches a crash on an empty set and a spread made of a single group."""
    for values, weights in (([], None), ([1.0], [0.0])):
        got = pairwise.bootstrap(
            np.array(values), np.arange(len(values)), weights=weights and np.array(weights)
        )
        assert all(math.isnan(x) for x in got)
    assert pairwise.bootstrap(np.array([1.0, 2.0]), np.array([4, 4])) == (1.5, 1.5, 1.5)


def test_bootstrap_is_reproducible_and_depends_on_the_seed():
    """Catches an interval that changes from run to run."""
    values, groups = np.random.default_rng(1).normal(size=30), np.arange(30)
    first = pairwise.bootstrap(values, groups, samples=100)
    assert first == pairwise.bootstrap(values, groups, samples=100)
    assert first != pairwise.bootstrap(values, groups, samples=100, seed=1)


def test_the_interval_covers_the_truth():
    """Catches an interval that is far too narrow or too wide: 95 % of 300 studies of 50 prompts.

    Each prompt has three pairs that share its luck; drawing pairs instead would cover some 75 %.
    """
    rng = np.random.default_rng(2)
    hits = 0
    for study in range(300):
        luck = rng.random(50) < 0.7
        values, groups = luck.repeat(3).astype(float), np.arange(50).repeat(3)
        _, low, high = pairwise.bootstrap(values, groups, samples=400, seed=study)
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 300 <= 0.99
