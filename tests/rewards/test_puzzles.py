"""Rewards of puzzles: what is right, what is paid, and that nothing of an answer is run."""

import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxreward.core.resolve import resolve
from jaxreward.rewards import puzzles, workers

THREE = {"id": "c", "numbers": [3, 5, 7], "target": 22}
GRID = "1234341221434321"
FOUR = {"id": "s", "puzzle": "0034341221434320", "solution": GRID}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3+5", 8),
        ("3-5", -2),
        ("3*5", 15),
        ("3/5", Fraction(3, 5)),  # floating point, or whole division
        ("7-2-1", 4),  # from right to left this is 6
        ("8/4/2", 1),
        ("8/4*2", 4),
        ("2+3*4", 14),  # no precedence gives 20
        ("(2+3)*4", 20),
        ("-3+5", 2),
        ("--3", 3),
        ("2*-3", -6),
        ("-(2+3)*+2", -10),
        (" 3 +\n5 ", 8),
        ("8/(3-8/3)", 24),
        ("0*5", 0),
        ("(" * 20 + "1" + ")" * 20, 1),
        ("9" * 200, int("9" * 200)),
    ],
)
def test_expressions(text, value):
    """Catches a wrong precedence, direction or sign, and anything that is not exact."""
    assert puzzles.evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "3+",
        "*3",
        "3 5",
        "3(5)",
        "(3",
        "3)",
        "()",
        "7 // 2",
        "7//2",
        "2**3",
        "9**9**9**9",
        "9^9",
        "1e9",
        "1_0",
        "1.5",
        "07",
        "00",
        "3+x",
        "3×5",
        "3+5=8",
        "٣+٥",
        "__import__('os')",
        "3;5",
        "(" * 21 + "1" + ")" * 21,
        "(" * 100_000,
        "-" * 100_000 + "1",
        "9" * 201,
        "3+5\0",
    ],
)
def test_what_is_no_expression(text):
    """Catches code, powers and bombs: refused at once, with no exception."""
    start = time.perf_counter()
    assert puzzles.evaluate(text) == (None, None)
    assert time.perf_counter() - start < 0.5


def test_division_by_zero_is_no_value_and_no_error():
    """Catches an exception out of a reward, and a text that is broken further on."""
    assert puzzles.evaluate("3/(5-5)+7") == (None, [3, 5, 5, 7])
    assert puzzles.evaluate("-(3/0)") == (None, [3, 0])
    assert puzzles.evaluate("3/0)") == (None, None)


@settings(deadline=None, max_examples=150)
@given(st.text("0123456789+-*/() ", max_size=14))
@example("7//2")
def test_expressions_are_pythons(text):
    """Catches a grammar wider than Python's without powers and //, and other values."""
    value, numbers = puzzles.evaluate(text)
    if numbers is not None:
        exact = re.sub(r"[0-9]+", r"Fraction(\g<0>)", text.strip())
        try:
            assert value == eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            assert value is None
        assert numbers == [int(run) for run in re.findall("[0-9]+", text)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("3*5+7", (1, 1, 1.0)),
        ("(7 + 5 * 3)", (1, 1, 1.0)),
        ("-(-7)+5*3", (1, 1, 1.0)),
        ("3+5+7", (0, 1, 0.1)),
        ("3*5+7-5+5", (0, 0, 0.0)),  # a number used again
        ("3*5", (0, 0, 0.0)),  # one left out
        ("22", (0, 0, 0.0)),
        ("35-7", (0, 0, 0.0)),  # numbers joined
        ("3/(7-5-2)", (0, 0, 0.0)),
        ("3*5+7=22", (0, 0, 0.0)),
        ("7 // 3 + 5", (0, 0, 0.0)),
        ("", (0, 0, 0.0)),
    ],
)
def test_countdown(text, parts):
    """Catches a number used twice, missing or joined, and the scale of 1, 0.1 and 0."""
    names = ("accuracy", "attempt", "reward")
    expected = dict(zip(names, parts))
    assert puzzles.countdown("", f"{text}\n", THREE, form="plain") == expected
    tagged = f"<think>3+5+7</think><answer>0</answer> no: <answer> {text} </answer> so"
    assert puzzles.countdown("", tagged, THREE) == expected


def test_countdown_as_released():
    """d1's code pays 0.1 for anything in an answer block; a strict reward pays only attempts."""
    words = "<answer>I give up</answer>"
    assert puzzles.countdown("", words, THREE)["reward"] == 0
    assert puzzles.countdown("", words, THREE, mode="released")["reward"] == 0.1
    assert puzzles.countdown("", "3*5+7", THREE, mode="released")["reward"] == 0
    division = puzzles.countdown(
        "", "<answer>4/(2-2)</answer>", {"numbers": [4, 2, 2], "target": 0}
    )
    assert division == {"accuracy": 0.0, "attempt": 1.0, "reward": 0.1}
    boxed = puzzles.countdown("", "<x>3*5+7</x>", THREE, tag="x")
    assert boxed["reward"] == 1


def test_sudoku_counts_blank_cells_alone():
    """Catches givens that are paid for, and a changed given that passes for right."""

    def parts(text):
        return tuple(puzzles.sudoku("", f"<answer>{text}</answer>", FOUR).values())

    assert parts(GRID) == (1, 1, 1)
    assert parts("12 34 | 34 12\n21 43 | 43 21") == (1, 1, 1)
    assert parts("1334341221434321") == (0, 1, 2 / 3)
    assert parts("4334341221434324") == (0, 1, 0)
    assert parts("1244341221434321") == (0, 0, 1)  # a given changed
    assert parts("12") == (0, 0, 2 / 3)  # cut off: two of three blanks
    assert parts(GRID + "1") == (0, 1, 1)  # too long
    assert parts("") == parts("none") == (0, 0, 0)
    assert puzzles.sudoku("", GRID, FOUR)["reward"] == 0  # no block
    assert puzzles.sudoku("", GRID, FOUR, form="plain")["accuracy"] == 1


def test_paired():
    """Catches pairs counted across their border, and answers too long or short."""
    record = {"pairs": 2}
    for text, parts in {
        "aabb": (1, 1),
        "bbbb\n": (1, 1),
        "abba": (0, 0),  # b and b in the middle are no pair
        "aaab": (0, 0.5),
        "aa": (0, 0.5),
        "aabbaa": (0, 1),
        "ccaa": (0, 0.5),
        "": (0, 0),
    }.items():
        assert tuple(puzzles.paired("", text, record).values()) == parts, text


def test_form():
    """Exactly one block of reasoning, then exactly one answer, and nothing else."""
    good = "<think>3*5=15\n</think>\n<answer>3*5+7</answer>\n"
    assert puzzles.in_form(good)
    assert puzzles.in_form(good.replace("think", "reasoning"), think="reasoning")
    for bad in (
        "",
        "3*5+7",
        good + good,
        good + "done",
        "well: " + good,
        good.replace("\n<answer>", " so <answer>"),
        good.replace("</think>", ""),
        good.replace("<think>", "<think><think>"),
        good.replace("3*5=15\n", " "),
        good.replace("3*5+7", ""),
        "<answer>3*5+7</answer><think>3*5=15</think>",
        "<think>a<answer>3*5+7</think></answer>",
        good.replace("think", "reasoning"),
    ):
        assert not puzzles.in_form(bad), bad


def test_quality():
    """R_q = a [correct] + b [form], the two independent of each other; the check is by name."""
    words = dict(check="puzzles.countdown", acc_weight=2.0, format_weight=0.5)
    form, answer = "<think>x</think>", "<answer>3*5+7</answer>"
    wrong = "<answer>3+5+7</answer>"
    for text, parts in {
        form + answer: (1, 1, 2.5),
        answer: (1, 0, 2.0),
        form + wrong: (0, 1, 0.5),  # an attempt is not correct
        wrong: (0, 0, 0.0),
        "3*5+7": (0, 0, 0.0),
    }.items():
        assert tuple(puzzles.quality("", text, THREE, **words).values()) == parts, text
    other = (form + answer).replace("answer", "a").replace("think", "r")
    kw = dict(check="puzzles.countdown", think="r", tag="a")
    assert puzzles.quality("", other, THREE, **kw)["reward"] == 2
    gold = {"answer": r"so it is \boxed{\frac12}"}
    boxed = form + r"<answer>\boxed{0.5}</answer>"
    assert puzzles.quality("", boxed, gold, check="puzzles.final")["reward"] == 2
    assert (
        puzzles.quality("", form + "<answer>2</answer>", gold, check="puzzles.final")["reward"] == 1
    )
    with pytest.raises(ValueError, match="does not take tag"):
        puzzles.quality("", other, gold, check="math_answer.grade", tag="a")
    with pytest.raises(KeyError, match="did you mean"):
        puzzles.quality("", other, THREE, check="puzzles.countdwn")
    with pytest.raises(KeyError, match="must give a part named accuracy; it gives a, b"):
        puzzles.quality("", other, THREE, check=f"{__name__}:no_accuracy")


def no_accuracy(prompt, answer, record):
    """A reward that names its parts otherwise."""
    return {"a": 1.0, "b": 0.0}


def test_gsm8k_by_hand():
    """d1's five terms, each alone; 3.5 and 0.5 for the marks is the most there is."""
    record = {"answer": "48/2=24\n#### 72"}
    best = "<reasoning>\n24+48\n</reasoning>\n<answer>\n72\n</answer>\n"
    parts = puzzles.gsm8k("", best, record)
    assert parts == dict(accuracy=1, integer=1, soft=1, strict=1, marks=0.5, reward=4.0)
    assert puzzles.gsm8k("", best.replace("72", "71"), record)["reward"] == 2.0
    assert puzzles.gsm8k("", best.replace("72", "72.0"), record)["reward"] == 1.5
    one_line = "<reasoning>24+48</reasoning> <answer>72</answer>"
    assert puzzles.gsm8k("", one_line, record)["reward"] == 3.0
    assert puzzles.gsm8k("", "72", record)["reward"] == 2.5  # the whole text is the answer
    parts = puzzles.gsm8k("", best + "bye", record)  # 3 characters beyond, counted twice
    assert parts["marks"] == pytest.approx(0.5 - 2 * 0.003) and parts["strict"] == 0
    named = best.replace("reasoning", "think").replace("answer", "a")
    assert puzzles.gsm8k("", named, record, think="think", tag="a")["reward"] == 4.0


PIECES = ("<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "7")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("<reasoning>\n</reasoning>\n<answer>\n</answer>\n")
@example("<reasoning>\n\n</reasoning>\n<answer>\n</answer>\n")
@example("<reasoning>\n7\n</reasoning>\n<answer>\n7\n</answer>\n\n")
@example("<reasoning>\n\n</reasoning>\n<answer>\n\n</answer>\n")
def test_forms_of_gsm8k_are_the_regular_expressions(text):
    """What is found in one pass is what these patterns find, which can take quadratic time."""
    soft = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    strict = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    parts = puzzles.gsm8k("", text, {"answer": "7"})
    assert parts["soft"] == bool(re.match(soft, text, re.DOTALL))
    assert parts["strict"] == bool(re.match(strict, text, re.DOTALL))


def test_math():
    """The four cases of the format; as released no box is ever seen, but the answer in it is."""
    record = {"answer": r"thus \boxed{\frac{1}{2}}"}
    for text, accuracy, form, released in (
        (r"<answer>\boxed{0.5}</answer>", 1, 1.0, 0.75),
        (r"\boxed{3} <answer>1/2</answer>", 0, 0.75, 0.75),
        (r"it is \boxed{\frac12}", 1, 0.5, 0.25),
        ("1/2", 1, 0.25, 0.25),
        ("no", 0, 0.25, 0.25),
    ):
        parts = puzzles.math("", text, record)
        assert parts == dict(accuracy=accuracy, format=form, reward=2 * accuracy + form), text
        assert puzzles.math("", text, record, mode="released")["format"] == released


def test_errors_name_record_and_remedy():
    """A broken record or word must say which and what was expected."""
    with pytest.raises(
        KeyError, match="record 'c' needs numbers, target; it lacks numbers and has"
    ):
        puzzles.countdown("", "", {"id": "c", "target": 3})
    with pytest.raises(ValueError, match="record 'c': numbers must be a list of int"):
        puzzles.countdown("", "", {"id": "c", "numbers": "3 5", "target": 3})
    with pytest.raises(ValueError, match="record 's': puzzle and solution must be digits"):
        puzzles.sudoku("", "", {**FOUR, "puzzle": GRID})
    with pytest.raises(ValueError, match=r"pairs must be an int, at least 1; received 0"):
        puzzles.paired("", "", {"pairs": 0})
    with pytest.raises(ValueError, match="form must be 'tags' or 'plain'; received 'tag'"):
        puzzles.extract("", form="tag")
    with pytest.raises(ValueError, match="mode must be 'strict' or 'released'"):
        puzzles.countdown("", "", THREE, mode="paper")


def test_by_name_with_the_words_of_a_config():
    """As a run calls them: resolved by name, graded in processes, each part a finite number."""
    rewards = {
        "task": resolve("rewards", "puzzles.countdown", form="plain"),
        "quality": resolve("rewards", "puzzles.quality", check="puzzles.countdown"),
    }
    with workers.Workers(rewards, workers=1) as crew:
        graded = crew.grade([("", "3*5+7", THREE), ("", "(" * 100_000, THREE)])
    assert graded["task"].values.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert graded["quality"].ok.all() and not graded["quality"].values.any()
