"""Best-of-n against the enumeration of all draws, and by hand."""

import itertools
import math

import numpy as np
import pytest

from jaxreward.evals import best_of_n


def enumerated(correct, scores, n):
    """Mean grade of the winner over all draws, tied winners sharing one."""
    grades = []
    for draw in itertools.combinations(range(len(correct)), n):
        best = max(scores[i] for i in draw)
        tied = [i for i in draw if scores[i] == best]
        grades.append(sum(correct[i] for i in tied) / len(tied))
    return sum(grades) / len(grades)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_picked_is_the_mean_over_all_draws(n, levels):
    """Catches a wrong count of draws, for all scores tied, some, or none, up to n = m = 6."""
    rng = np.random.default_rng(n * 1000 + levels)
    for _ in range(5):
        correct = rng.integers(0, 2, 6)
        scores = rng.integers(0, levels, 6) / 7
        got = best_of_n.picked(correct, scores, n)
        assert got == pytest.approx(enumerated(correct, scores, n), abs=1e-12)
        order = rng.permutation(6)
        assert best_of_n.picked(correct[order], scores[order], n) == pytest.approx(got, abs=1e-12)


def test_picked_by_hand():
    """Catches swapped ends: scores 3 > 2 > 1 with only the middle one right, two drawn.

    Draws: {3,2} picks wrong, {3,1} wrong, {2,1} right: 1/3.
    """
    assert best_of_n.picked([0, 1, 0], [3.0, 2.0, 1.0], 2) == pytest.approx(1 / 3)
    assert best_of_n.picked([0, 1, 0], [3.0, 2.0, 1.0], 1) == pytest.approx(1 / 3)
    assert best_of_n.picked([0, 1, 0], [3.0, 2.0, 1.0], 3) == 0
    assert best_of_n.picked([0, 1, 0], [1.0, 2.0, 1.0], 3) == 1
    assert best_of_n.picked([0, 1, 1], [2.0, 2.0, 1.0], 3) == 0.5
    assert best_of_n.picked([1, 0], [-np.inf, 0.0], 1) == 0.5  # -inf is a score


def test_picked_takes_many_answers():
    """Catches binomials that overflow: the best of 500 is among 250 drawn half of the time."""
    correct = [1] + [0] * 999
    assert best_of_n.picked(correct, -np.arange(1000.0), 500) == pytest.approx(0.5)


@pytest.mark.parametrize("n", [0, 4, -1])
def test_n_out_of_range_is_refused(n):
    """Catches an oracle of answers that were never sampled."""
    with pytest.raises(ValueError, match=f"best-of-{n} needs at least {n} answers"):
        best_of_n.picked([0, 1, 0], [1.0, 2.0, 3.0], n)
    with pytest.raises(ValueError, match=f"majority of {n} needs at least {n} answers"):
        best_of_n.majority([0, 1, 0], ["1", "2", "3"], n)


def test_a_nan_score_is_refused():
    """Catches an unscored answer that wins, or never does."""
    with pytest.raises(ValueError, match="a score is NaN"):
        best_of_n.picked([0, 1], [np.nan, 1.0], 1)


def test_majority_by_hand():
    """Catches ties decided by order, votes of answers without a final answer, and wrong draws."""
    majority = best_of_n.majority
    assert majority([1, 1, 0], ["4", "4", "5"], 3) == 1
    assert majority([1, 0, 0], ["4", "5", "5"], 3) == 0
    assert majority([1, 0], ["4", "5"], 2) == 0.5  # one vote each
    assert majority([1, 1, 0, 0, 0], ["4", "4", "5", "5", "6"], 5) == 0.5
    assert majority([1, 0, 0], ["4", None, None], 3) == 1  # only one vote is cast
    assert majority([0, 0], [None, None], 2) == 0
    # Of three answers two are drawn: {4,4} right, {4,5} even, {4,5} even.
    assert majority([1, 1, 0], ["4", "4", "5"], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    # A draw without a vote falls back to its mean: {None,None}; the other two have one vote.
    assert majority([0, 1, 0], [None, None, "5"], 2) == pytest.approx((0.5 + 0 + 0) / 3)


def test_majority_of_one_is_the_mean():
    """Catches a lone answer that is not its own majority, with or without a final answer."""
    assert best_of_n.majority([1, 0, 1, 0], ["1", "2", None, None], 1) == 0.5


PROBLEMS = [
    {"correct": [1, 0, 0], "finals": ["a", "b", "b"], "scores": {"rm": [3.0, 2.0, 1.0]}},
    {"correct": [0, 0, 0], "finals": ["a", "b", "c"], "scores": {"rm": [1.0, 2.0, 3.0]}},
    {"correct": [True, True, False], "finals": ["a", "a", "b"], "scores": {"rm": [0.0, 0.0, 0.0]}},
]


def test_per_problem_by_hand():
    """Catches an oracle or a mean of other answers; two of three are drawn."""
    got = best_of_n.per_problem(PROBLEMS, ["rm"], n=2)
    assert list(got) == ["mean", "rm", "majority", "oracle"]
    np.testing.assert_allclose(got["mean"], [1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(got["rm"], [2 / 3, 0, 2 / 3])
    np.testing.assert_allclose(got["majority"], [1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(got["oracle"], [2 / 3, 0, 1])
    assert best_of_n.recovered(got, "rm") == pytest.approx((4 / 9 - 1 / 3) / (5 / 9 - 1 / 3))
    assert best_of_n.recovered(got, "oracle") == 1 and best_of_n.recovered(got, "mean") == 0
    nothing = best_of_n.per_problem(PROBLEMS[1:2], ["rm"], n=2)
    assert math.isnan(best_of_n.recovered(nothing, "rm"))  # no gap to close


def test_with_one_answer_every_selector_is_the_mean():
    """Catches a selector that gains before there is anything to choose from."""
    got = best_of_n.per_problem(PROBLEMS, ["rm"], n=1)
    for name in ("rm", "majority", "oracle"):
        np.testing.assert_allclose(got[name], got["mean"])


def test_pair_accuracy_by_hand():
    """Catches problems of one kind counted, or a tie counted as right."""
    shares, where = best_of_n.pair_accuracy(PROBLEMS, "rm")
    np.testing.assert_array_equal(shares, [1.0, 0.5])
    np.testing.assert_array_equal(where, [0, 2])
    mixed = {"correct": [0, 1, 1, 0], "scores": {"rm": [5.0, 4.0, 1.0, 1.0]}}
    shares, _ = best_of_n.pair_accuracy([mixed], "rm")
    np.testing.assert_allclose(shares, [(0 + 1 + 0 + 0.5) / 4])
    assert best_of_n.pair_accuracy(PROBLEMS[1:2], "rm")[0].shape == (0,)


def test_interval_of_two_problems():
    """Catches wrong tails: two problems 0 and 1 give means 0, 1/2, 1 with odds 1 : 2 : 1."""
    got = best_of_n.interval(np.array([0.0, 1.0]), samples=500)
    assert got == {"value": 0.5, "low": 0.0, "high": 1.0}


def test_paired_differences_resample_problems_together():
    """Catches two selectors resampled apart: a constant difference has no spread at all."""
    a = np.random.default_rng(0).random(20)
    got = best_of_n.paired(a, a - 0.25, samples=300)
    assert got == pytest.approx({"difference": 0.25, "low": 0.25, "high": 0.25})
    back = best_of_n.paired(a - 0.25, a, samples=300)
    assert back["difference"] == pytest.approx(-0.25)


def test_the_interval_covers_the_truth():
    """Catches an interval that is far too narrow or too wide: 95 % of 300 studies, 60 problems."""
    rng = np.random.default_rng(5)
    hits = 0
    for study in range(300):
        got = best_of_n.interval(rng.beta(2, 3, size=60), samples=400, seed=study)
        assert got["low"] < got["value"] < got["high"]
        hits += got["low"] <= 0.4 <= got["high"]
    assert 0.90 <= hits / 300 <= 0.99


def test_problems_of_one_group_are_drawn_together():
    """Catches 3 + 5 and 5 + 3 taken for two independent problems."""
    values = np.random.default_rng(1).random(10)
    twice, groups = np.tile(values, 2), [f"{i}" for i in range(10)] * 2
    once = best_of_n.interval(values, samples=300)
    assert best_of_n.interval(twice, groups, samples=300) == pytest.approx(once)
    assert best_of_n.interval(np.array([0.0, 1.0]), ["a", "a"]) == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
    }
    got = best_of_n.paired(twice, 0 * twice, groups, samples=300)
    assert got["low"] == pytest.approx(once["low"]) and got["high"] == pytest.approx(once["high"])
