"""Problems from reasoning_gym."""

import json
import math

import pytest

from jaxreward.data.corpora import reasoning_gym as corpus


@pytest.fixture(autouse=True)
def _needs(require):
    require("reasoning_gym")


def test_all_one_digit_products():
    """There are exactly 55 unordered pairs of digits; a wrong key gives another number."""
    drawn = corpus.problems("products_1", count=55, seed=0)
    assert len({p["key"] for p in drawn}) == 55
    assert {p["key"] for p in drawn} == {f"{a}*{b}" for a in range(10) for b in range(a, 10)}
    with pytest.raises(ValueError, match="55 distinct problems; count is 56"):
        corpus.problems("products_1", count=56, seed=0)


def test_all_one_digit_sums():
    """55 sums and 100 differences: subtraction must not be treated as commutative."""
    keys = {p["key"] for p in corpus.problems("chain_sum_1", count=155, seed=3)}
    assert sum("+" in key for key in keys) == 55
    assert sum("-" in key for key in keys) == 100


def test_both_orders_share_a_key():
    """Ordered problems are 200 and 100; a split must still keep 3 + 5 and 5 + 3 together."""
    drawn = corpus.problems("chain_sum_1", count=200, seed=0, both_orders=True)
    assert len({p["prompt"] for p in drawn}) == 200 and len({p["key"] for p in drawn}) == 155
    rest, held = corpus.split(drawn, fraction=0.4, seed=0)
    assert not {p["key"] for p in rest} & {p["key"] for p in held}
    assert len(corpus.problems("products_1", count=100, seed=0, both_orders=True)) == 100
    with pytest.raises(ValueError, match="100 distinct problems; count is 101"):
        corpus.problems("products_1", count=101, seed=0, both_orders=True)


def test_keys_of_operand_orders():
    """3 + 5 and 5 + 3 are one problem, 3 - 5 and 5 - 3 two; 10 sorts after 9 as a number."""
    key = corpus.problem_key
    assert key("3 + 5") == key("5 + 3") == "3+5"
    assert key("3 * 5") == key("5 * 3")
    assert key("3 - 5") != key("5 - 3")
    assert key("10 + 9") == "9+10"


def test_deterministic_and_right():
    """The same seed gives the same problems, another seed others, and answers are true."""
    one = corpus.problems("chain_sum_2", count=40, seed=1)
    assert one == corpus.problems("chain_sum_2", count=40, seed=1)
    assert one != corpus.problems("chain_sum_2", count=40, seed=500)
    for problem in one:
        left, operation, right = problem["prompt"].split(": ")[1].removesuffix(" =").split(" ")
        value = int(left) + int(right) if operation == "+" else int(left) - int(right)
        assert problem["answer"] == str(value)


def test_split_has_no_key_on_both_sides():
    """The same problem in another operand order must not leak into the held-out side."""
    drawn = corpus.problems("chain_sum_1", count=100, seed=0)
    sums = [p for p in drawn if "+" in p["key"]]
    swapped = []
    for p in sums:
        a, b = p["key"].split("+")
        for left, right in ((a, b), (b, a)):
            expression = f"{left} + {right}"
            swapped.append({**p, "key": corpus.problem_key(expression)})
    rest, held = corpus.split(drawn + swapped, fraction=0.3, seed=0)
    assert len(rest) + len(held) == len(drawn) + len(swapped)
    assert not {p["key"] for p in rest} & {p["key"] for p in held}
    assert len({p["key"] for p in held}) == 30
    assert corpus.split(drawn + swapped, fraction=0.3, seed=0) == (rest, held)
    assert corpus.split(drawn, fraction=0.3, seed=1) != corpus.split(drawn, fraction=0.3, seed=0)


def test_split_is_never_empty():
    """A small fraction must still hold something out."""
    drawn = corpus.problems("products_1", count=3, seed=0)
    rest, held = corpus.split(drawn, fraction=0.01, seed=0)
    assert (len(rest), len(held)) == (2, 1)
    rest, held = corpus.split(drawn, fraction=0.99, seed=0)
    assert (len(rest), len(held)) == (1, 2)
    with pytest.raises(ValueError, match="at least 2 distinct"):
        corpus.split(drawn[:1], fraction=0.5, seed=0)


def test_check():
    """The last number decides; partial credit of the checker and odd text are wrong answers."""
    problem = {"task": "chain_sum_1", "answer": "-4", "id": "", "prompt": "", "key": ""}
    for text in ("-4", "5 - 9 = -4", "The answer is **−4**.", "-4.0"):
        assert corpus.check(problem, text), text
    for text in ("", "four", "4", "-4 or 5", "-40", "1e999999999", "-44"):
        assert not corpus.check(problem, text), text


def test_unknown_task():
    """A misspelt task must name the known ones."""
    with pytest.raises(KeyError, match="chain_sum_1"):
        corpus.problems("chain_sums", count=1, seed=0)


def test_generate_any_task():
    """Distinct problems with what scoring needs, in plain JSON, the same for the same seed."""
    drawn = corpus.generate("gcd", count=12, seed=2, config={"max_value": 30})
    assert drawn == corpus.generate("gcd", count=12, seed=2, config={"max_value": 30})
    assert len({p["prompt"] for p in drawn}) == len({p["id"] for p in drawn}) == 12
    for problem in drawn:
        numbers = json.loads(problem["metadata"])["numbers"]
        assert max(numbers) <= 30 and str(math.gcd(*numbers)) == problem["answer"]
        assert (problem["task"], json.loads(problem["config"])) == ("gcd", {"max_value": 30})
    assert all(isinstance(value, str) for p in drawn for value in p.values())


def test_generate_leaves_repeated_problems_out():
    """A small task draws the same again and again; ids must still be names of one problem each."""
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    drawn = corpus.generate("products", count=40, seed=0, config=config)
    assert [p["id"] for p in drawn] == [f"products-{i}" for i in range(40)]
    assert len({p["key"] for p in drawn}) == 40


def test_generate_splits_by_problem():
    """Nearby seeds draw the same problems; a split by key must not let one stand on both sides."""
    drawn = [p for seed in (0, 1) for p in corpus.generate("gcd", count=30, seed=seed)]
    assert len({p["key"] for p in drawn}) < len(drawn)
    rest, held = corpus.split(drawn, fraction=0.3, seed=0)
    assert not {p["prompt"] for p in rest} & {p["prompt"] for p in held}


def test_generate_errors():
    """A misspelt task or setting, and a task that runs out, must say so."""
    with pytest.raises(KeyError, match="did you mean basic_arithmetic"):
        corpus.generate("basic_arithmetics", count=1, seed=0)
    with pytest.raises(KeyError, match="unknown task 'composite'"):
        corpus.generate("composite", count=1, seed=0)
    with pytest.raises(ValueError, match=r"its settings are .*max_terms"):
        corpus.generate("chain_sum", count=1, seed=0, config={"terms": 2})
    with pytest.raises(ValueError, match="task gcd does not take config"):
        corpus.generate("gcd", count=1, seed=0, config={"min_value": 10, "max_value": 1})
    with pytest.raises(ValueError, match=r"gave \d+ distinct problems in 700 draws; count is 200"):
        config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        corpus.generate("products", count=200, seed=0, config=config)
