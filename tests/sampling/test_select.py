"""Choosing among sampled answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxreward.sampling import select

A, B, NONE = 0, 1, -1


def vote(answers, **kw):
    return select.majority_vote(np.asarray(answers, np.int32), classes=2, **kw)


def test_best_of_n_by_hand():
    """Catches a pick that is not valid, and a tie that goes to the last."""
    scores = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [0.0, -np.inf, 9.0], [1.0, 1.0, 1.0]])
    valid = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(select.best_of_n(scores), [1, 0, 2, 0])
    np.testing.assert_array_equal(select.best_of_n(scores, valid), [1, 0, 1, -1])


def test_best_of_n_refuses_nan():
    """Catches NaN that wins, as it does in argmax; an answer that is not valid may have none."""
    scores = np.array([[1.0, np.nan]])
    with pytest.raises(ValueError, match="a score is NaN"):
        select.best_of_n(scores)
    assert select.best_of_n(scores, np.array([[True, False]])).tolist() == [0]


@pytest.mark.parametrize(
    ("answers", "winner", "margin"),
    [
        ([A, B, B], B, 1 / 3),
        ([A, A, A, B], A, 0.5),
        ([B, B], B, 1.0),
        ([NONE, NONE, A], A, 1.0),  # what cannot be read does not vote
        ([], -1, 0.0),
        ([NONE], -1, 0.0),
    ],
)
def test_majority_by_hand(answers, winner, margin):
    """Catches unreadable answers that vote, and a margin over all answers instead of votes."""
    for on_tie in ("first", "none"):
        label, got = vote(answers, on_tie=on_tie)
        assert label == winner and got == pytest.approx(margin)


def test_a_tie():
    """Catches a tie that always goes to A, or that counts as a win."""
    assert vote([B, A]) == (B, 0.0) and vote([A, B]) == (A, 0.0)
    assert vote([NONE, B, A, A, B]) == (B, 0.0)
    assert vote([B, A], on_tie="none") == (-1, 0.0)
    three = np.array([2, 1, 0, 0, 1])
    assert select.majority_vote(three, classes=3) == (1, 0.0)  # 2 came first but is not in the tie


@given(st.lists(st.integers(-1, 1), max_size=9), st.randoms())
def test_a_majority_does_not_depend_on_the_order(answers, random):
    """Catches a vote that weighs places; only ties may."""
    mixed = random.sample(answers, len(answers))
    (one, margin), (other, same) = vote(answers), vote(mixed)
    assert margin == same and (one == other or margin == 0.0)
    swapped, _ = vote([a if a < 0 else 1 - a for a in answers])
    assert swapped == (one if one < 0 else 1 - one)


def test_votes_are_checked():
    """Catches a class that no answer can have."""
    with pytest.raises(ValueError, match=r"answers must be -1\.\.1; received 0\.\.2"):
        vote([0, 2])
    with pytest.raises(ValueError, match="on_tie must be"):
        vote([0], on_tie="last")


def pick(answers, form, confidence, **kw):
    return select.select_cmkd(
        np.asarray(answers, int), np.asarray(form, bool), np.asarray(confidence, float), **kw
    )


def test_cmkd_by_hand():
    """Catches confidence that beats accuracy or form, and a vote that outdoes a gold label."""
    answers, form, confidence = [A, B, A, B, A], [1, 1, 0, 1, 1], [0.5, 0.99, 0.98, 0.9, 0.7]
    assert pick(answers, form, confidence) == (4, A)
    assert pick(answers, form, confidence, gold=B) == (1, B)
    assert pick(answers, [0, 1, 0, 1, 0], confidence) == (-1, A)  # nothing is left
    assert pick([A, A], [1, 1], [0.9, 0.9], gold=B) == (-1, B)
    assert pick([A, B], [1, 1], [0.9, 0.1]) == (-1, -1)  # a tied vote teaches nothing
    assert pick([NONE, NONE], [1, 1], [0.9, 0.1]) == (-1, -1)
    assert pick([], [], []) == (-1, -1)


def test_cmkd_ties():
    """Catches a choice between equal confidences that is left to chance."""
    assert pick([A, A], [1, 1], [0.9, 0.9]) == (0, A)
    assert pick([A, A], [1, 1], [0.9, 0.9], tie_break=np.array([-2.0, -1.0])) == (1, A)


def test_cmkd_is_checked():
    """Catches NaN that wins, and a gold label of another kind; NaN elsewhere does no harm."""
    with pytest.raises(ValueError, match="a confidence or tie_break is NaN"):
        pick([A, A], [1, 1], [0.5, np.nan])
    assert pick([A, A], [1, 0], [0.5, np.nan]) == (0, A)
    with pytest.raises(ValueError, match=r"gold must be 0\.\.1 or None; received 2"):
        pick([A], [1], [0.5], gold=2)
