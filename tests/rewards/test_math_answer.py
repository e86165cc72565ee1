"""Final answers: reading them, and comparing them without hanging."""

import json
import subprocess
import sys
import threading
import time

import pytest

from jaxreward.rewards import math_answer

HOSTILE = [
    "9^{9^{9}}",
    "9**9**9",
    "9^(9^9)",
    "10^{10^{10}}",
    "2^{1000000}",
    "(x+1)^{1000}",
    "(x+y+z)^{60}",
    "x^{9^9}",
    "\\sum_{i=1}^{100000} \\frac{1}{i}",
    "\\prod_{i=1}^{10^9} i",
    "\\int_0^1 e^{x^{x^x}} dx",
    "10000000!",
    "(9!)!",
    "\\binom{1000000}{500000}",
    "\\binom{100}{x}",
    "\\gamma(10^9)",
    "\\log_{2}(10^{10^{8}})",
    "\\sin(" * 100 + "1" + ")" * 100,
    "(" * 500 + "1" + ")" * 500,
    "{" * 3000,
    "\\boxed{" * 3000,
    "\\frac{" * 2000,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "9" * 100_000,
    "1," * 20_000,
    "x+" * 20_000 + "1",
    "$" * 20_000,
    "answer: " * 5_000,
    "1e999999999",
    "\\mod(10^{10^{9}}, 7)",
    "__import__('os')",
    "\x00\ud800",
]


@pytest.fixture(autouse=True)
def _needs(require):
    require("math_verify")


@pytest.mark.parametrize(
    ("text", "answer", "how"),
    [
        ("so \\boxed{18}.", "18", "boxed"),
        ("\\boxed{1}, and \\boxed{\\frac{1}{2}}", "1, \\frac{1}{2}", "boxed"),  # a list
        ("first \\boxed{1}; later \\boxed{2}", "2", "boxed"),
        ("\\boxed{5} and \\boxed{5}", "5", "boxed"),
        ("\\boxed{\\boxed{5}}", "5", "boxed"),
        ("\\boxed{3 unclosed, then \\boxed{4}", "4", "boxed"),
        ("\\fbox{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
        ("\\boxed{} #### 7", None, "none"),  # "####" begins a line
        ("\\boxed{5}, that is, the answer is five.", "5", "boxed"),
        ("9 * 2 = <<9*2=18>>18 a day.\n#### 18", "18", "stated"),
        ("#### Step 1: go", "1", "number"),  # a heading
        ("The answer is 18 dollars a day.", "18", "stated"),
        ("The answer is $18.50.", "$18.50", "stated"),
        ("**Answer:** $\\frac{3}{4}$ of it", "\\frac{3}{4}", "stated"),
        ("Answer: (B) 12 cm", "B", "stated"),
        ("the answer to the second part is x = 5.", "x = 5", "stated"),
        ("The answers are 1, 2 and 3.", "1, 2 and 3", "stated"),
        ("The answer is yes, of course", "yes", "stated"),
        ("The answer is a prime number", None, "none"),
        ("Is the answer 5? No.", "5", "number"),
        ("The answer is 5? No, 6", "6", "number"),
        ("So 1,234.5 it is", "1234.5", "number"),
        ("<think>\\boxed{3}</think>Thus \\boxed{4}", "4", "boxed"),
        ("the answer is 3</think>4", "4", "number"),
        ("<think>the answer is 3, but", None, "none"),  # cut off
        ("", None, "none"),
        ("nothing", None, "none"),
    ],
)
def test_final_answer(text, answer, how):
    """Each case is a way to grade a number that was not the answer."""
    if text.startswith("\\boxed{}"):
        assert math_answer.final_answer(text, last_number=False) == (answer, how)
    else:
        assert math_answer.final_answer(text) == (answer, how)


def test_boxes_by_position():
    """A box inside a box is no answer of its own, and none may be lost to an unclosed brace."""
    text = "{ \\boxed{a \\boxed{5} b} and so \\boxed{{6}} }}"
    assert math_answer.boxed(text) == [(2, 23, "a \\boxed{5} b"), (31, 42, "{6}")]
    assert math_answer.boxed("\\boxed{\\{1\\}}") == [(0, 13, "\\{1\\}")]


def test_no_last_number_unless_asked():
    """Where a format is taught, a number in passing must not count."""
    assert math_answer.final_answer("we get 5", last_number=False) == (None, "none")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18.0"),
        ("1/2", "\\frac{1}{2}"),
        ("\\frac12", "0.5"),
        ("1234", "1,234"),
        ("\\$1{,}234.00", "1234"),
        ("72", "72\\text{ clips}"),
        ("5", "5 cm"),
        ("45", "45^\\circ"),
        ("5", "x = 5"),
        ("50", "50\\%"),
        ("B", "(B)"),
        ("\\text{Paris}", "paris"),
        ("1,2", "2, 1"),
        ("\\{1, 2\\}", "\\{2,1\\}"),
        ("1 and 2", "2, 1"),
        ("(1, 2)", "\\left( 1, 2 \\right)"),
        ("-5", "−5"),
        ("1e3", "1000"),
    ],
)
def test_one_answer_in_other_dress(gold, answer):
    """A right answer that is graded wrong for how it is written."""
    assert math_answer.same(gold, answer) and math_answer.same(answer, gold)
    assert math_answer.equivalent(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("0.5", "50\\%"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("1/3", "0.333333"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\pm 2", "2, -2"),
        ("1+x", "x+1"),
        ("2^{2024}-1", "2 \\cdot 2^{2023} - 1"),
        ("[1,2]", "x \\in [1,2]"),
        ("\\{1, 1/2\\}", "\\{0.5, 1\\}"),
        ("120", "5!"),
        ("3.0\\times 10^{2}", "300"),
    ],
)
def test_equal_by_mathematics(gold, answer):
    """What strings cannot see; and that the comparison does reach math-verify."""
    assert math_answer.equivalent(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "19"),
        ("18", "180"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("x = 1, y = 2", "x = 2, y = 1"),
        ("x = 1, y = 2", "z = 1, y = 2"),
        ("1,2", "1,2,3"),
        ("yes", "sey"),  # letters multiply in any order
        ("even", "never"),
        ("A", "B"),
        ("x+1", "x-1"),
        ("\\frac{1}{2}", "\\frac{1}{3}"),
        ("5", ""),
        ("", ""),
        ("5", "$"),
        ("12", "1, 2"),
        ("5/0", "5"),
    ],
)
def test_different(gold, answer):
    """A wrong answer that is graded right."""
    assert not math_answer.equivalent(gold, answer)
    assert not math_answer.same(gold, answer)


@pytest.fixture(scope="module")
def hostile():
    """Seconds and verdict of each hostile answer, graded in a thread of a process of its own."""
    code = (
        "import json, sys, threading, time\n"
        "from jaxreward.rewards import math_answer as m\n"
        "cases, out = json.load(sys.stdin), []\n"
        "m.equivalent('1/3', '0.3333333')\n"
        "def work():\n"
        "  for case in cases:\n"
        "    start = time.monotonic()\n"
        "    got = [m.equivalent(gold, case) for gold in ('5', 'x+5', '\\\\sqrt{3}')]\n"
        "    for form in ('The answer is %s', '\\\\boxed{%s}', '%s'):\n"
        "      got.append(m.grade('', form % case, {'answer': '5'})['accuracy'])\n"
        "    out.append((time.monotonic() - start, any(got)))\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start(); thread.join()\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(HOSTILE, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case[:20].encode("unicode_escape"))
def test_hostile_answers_end(hostile, case):
    """An answer on which sympy would compute for ever, and with it the whole run."""
    seconds, right = hostile[case]
    assert seconds < 5 and not right


def test_tame_lets_real_answers_through():
    """Guards so tight that ordinary answers are never compared."""
    for answer in (
        "\\frac{\\sqrt{3}+1}{2}",
        "x^{10}+1",
        "2^{100}",
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "\\binom{10}{3}",
        "(-\\infty, 2] \\cup [3, \\infty)",
        "\\sqrt[3]{4}",
        "e^{2\\pi i / 3}",
    ):
        assert math_answer.tame(answer), answer
    assert not math_answer.tame("999!^{9}") and not math_answer.tame("(" * 7 + "1" + ")" * 7)
    assert not math_answer.tame("100^{100}", "\\log_{10} 7")  # harmless apart, endless together


def test_works_in_threads_and_leaves_signals_alone():
    """math-verify's own limits raise in threads and cancel the caller's alarm."""
    import signal

    found = []
    thread = threading.Thread(
        target=lambda: found.append(math_answer.equivalent("\\sqrt{12}", "2\\sqrt{3}"))
    )
    thread.start()
    thread.join()
    assert found == [True]
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        assert math_answer.equivalent("\\sqrt{27}", "3\\sqrt{3}")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_reading_is_linear():
    """Ten times the text may not take a hundred times as long to read."""
    for piece in ("\\boxed{", "\\boxed{1} ", "answer is ", "{", "the answer to the ", "#### \n"):
        start = time.monotonic()
        math_answer.final_answer(piece * (60_000 // len(piece)))
        assert time.monotonic() - start < 2, piece


def test_long_answers_are_not_taken_apart():
    """Sorting the parts of a list that fills an answer would take a second."""
    text = "2,1" * 200
    assert math_answer.canonical(text) == text


def test_grade():
    """The text reward: accuracy by the reference, format by how it was stated."""
    grade = lambda answer, gold="#### 18", **kw: math_answer.grade(
        "", answer, {"answer": gold}, **kw
    )
    assert grade("\\boxed{18}") == {"accuracy": 1.0, "format": 1.0}
    assert grade("\\boxed{19}") == {"accuracy": 0.0, "format": 1.0}
    assert grade("it is 18") == {"accuracy": 1.0, "format": 0.0}
    assert grade("it is 18", last_number=False) == {"accuracy": 0.0, "format": 0.0}
    assert grade("") == {"accuracy": 0.0, "format": 0.0}
    assert grade("\\boxed{\\frac{36}{2}}", 18)["accuracy"] == 1.0
    assert grade("\\boxed{x+1}", "so it is \\boxed{1+x}.")["accuracy"] == 1.0
    with pytest.raises(KeyError, match=r"record 'a' needs a field 'answer'.*it has id"):
        math_answer.grade("", "5", {"id": "a"})


def test_missing_package(monkeypatch):
    """Without the extra, the error must say what to install, on the first answer already."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math_answer._math_verify.cache_clear()
    math_answer.equivalent.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"jaxreward\[real\]"):
            math_answer.equivalent("5", "5")
    finally:
        math_answer._math_verify.cache_clear()
