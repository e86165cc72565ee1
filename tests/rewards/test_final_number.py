"""Reading the last number of a text."""

import pytest

from jaxreward.rewards.final_number import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", "1234"),  # a grouped number read as 234
        ("it costs 1,234,567.50 now", "1234567.50"),
        ("-5", "-5"),  # a lost sign
        ("= -5", "-5"),
        ("x=-5", "-5"),
        ("3.", "3"),  # the full stop taken for a decimal point
        ("**8**", "8"),
        ("**-8**", "-8"),
        ("$8$", "8"),
        ("-$8", "-8"),
        ("−5", "-5"),  # U+2212
        ("= 12.50", "12.50"),
        ("3-5", "5"),  # a subtraction taken for a sign
        ("4 - 1", "1"),
        ("3−5", "5"),
        ("(2)-5", "5"),
        (r"\boxed{42}", "42"),
        ("- 7 apples", "7"),  # a list item taken for a negative number
        ("1, 2", "2"),
        ("1,2345", "2345"),
        ("first 8, then 9.", "9"),
        ("-.5", "-.5"),
        ("1e5", "1e5"),
        ("007", "007"),
    ],
)
def test_reads(text, number):
    """Each case is one way in which graders misread a last number."""
    assert final_number(text) == number


@pytest.mark.parametrize("text", ["", "none", "-", "٣", "$", ",."])
def test_no_number(text):
    """Text without ASCII digits must give None, not crash or an empty string."""
    assert final_number(text) is None
