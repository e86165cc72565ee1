"""Numbers, intervals, verdicts and labels in words, for reading."""

import math

import pytest

from jaxreward.report import words


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.08, "a is higher than b: the whole interval lies above zero."),
        (-0.08, -0.01, "a is lower than b: the whole interval lies below zero."),
        (0.0, 0.08, "Undecided: the interval includes zero, so these 250 problems do not tell"),
        (None, None, "No interval was recorded, so no verdict."),
    ],
)
def test_the_verdict_follows_the_interval(low, high, said):
    """Catches a win that is claimed although the interval holds zero, or the wrong way round."""
    pair = {"a": "a", "b": "b", "metric": "solved", "difference": 0.04, "low": low, "high": high}
    assert words.verdict(pair, 250).startswith(said)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (-2.5, "−2.5"),
        (2e-5, "2e−5"),
        (12_345.6, "12,346"),
        (1_500_000, "1,500,000"),
        (3.0, "3"),
        (0.0, "0"),
        (-0.0, "0"),
        (2.5e12, "2.5e12"),
        (math.nan, "not finite"),
        (10**400, "not finite"),
        (None, "–"),
    ],
)
def test_numbers_are_written_for_reading(value, shown):
    """Catches 0.12345600000000001, 1.235e+04 and a crash on a number no float can hold."""
    assert words.number(value) == shown


def test_labels_are_one_line_and_keep_both_ends():
    """Catches set_1 and set_2 of one family under the same label, and a label of two lines."""
    assert words.label("a_long_name_of_an_evaluation_set_12") == "a_long_name_…tion_set_12"
    assert words.label("two\nlines\x07 here") == "two lines here"


def test_shares_are_per_cent_and_other_values_are_not():
    """Catches a learning rate of 0.00002 shown as 0.0 %, and an accuracy shown as 0.712."""
    assert words.percent(0.7123) == "71.2\u00a0%"
    assert words.is_share("eval/heldout/accuracy", 0.7) and words.is_share("win_rate", 0.5, None)
    assert not words.is_share("train/learning_rate", 0.1) and not words.is_share("lr", 0.1)
    assert not words.is_share("accuracy", 71.2)
    assert words.interval(0.683, 0.739, True) == "68.3 to 73.9\u00a0%"
    assert words.points(0.0625, True) == "+6.2" and words.points(-1.5, False) == "−1.5"
