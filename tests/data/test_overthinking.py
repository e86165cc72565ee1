"""The tiny world of overthinking."""

import collections
import json
import re

import pytest

from jaxreward.data.corpora import overthinking as world
from jaxreward.data.corpora import reasoning_gym
from jaxreward.rewards import anchor


@pytest.fixture(scope="module")
def drawn():
    """Problems of all kinds."""
    return [p for kind in world.KINDS for p in world.problems(kind, count=80, seed=0)]


@pytest.fixture(scope="module")
def rows(drawn):
    """Several traces of each."""
    return world.traces(drawn, seed=1, each=4)


def test_problems_are_right_and_distinct(drawn):
    """Answers against Python's own arithmetic, which knows that * goes first."""
    for problem in drawn:
        expression, rest = problem["prompt"].split("=", 1)
        assert rest == "?\n<think>\n" and re.fullmatch(r"[1-9]([-+*][1-9])+", expression)
        assert problem["answer"] == str(eval(expression))
    assert len({p["key"] for p in drawn}) == len(drawn) == len({p["id"] for p in drawn})
    assert {len(p["prompt"]) for p in drawn if p["subset"] == "hard"} == {7 + 2 + 9}


def test_every_distinct_problem_can_be_drawn():
    """45 sums and 45 differences that are not negative; 9 times 36 products."""
    everything = world.problems("easy", count=90, seed=0)
    assert sum("+" in p["prompt"] for p in everything) == 45
    assert len(world.problems("helps", count=324, seed=0)) == 324
    for kind, count in (("easy", 91), ("helps", 325), ("hard", 0)):
        with pytest.raises(ValueError, match=f"distinct problems; count is {count}"):
            world.problems(kind, count=count, seed=0)
    with pytest.raises(KeyError, match="easy, hard, helps"):
        world.problems("medium", count=1, seed=0)


def test_a_seed_decides(drawn):
    """Runs must be repeatable, and another seed must be other data."""
    again = [p for kind in world.KINDS for p in world.problems(kind, count=80, seed=0)]
    assert again == drawn
    assert world.problems("hard", count=80, seed=1) != drawn[80:160]
    assert world.traces(drawn, seed=1) == world.traces(drawn, seed=1)
    assert world.traces(drawn, seed=1) != world.traces(drawn, seed=2)


def test_traces_keep_the_grammar(rows):
    """Derive, answer, check; every step is right but those that go from left to right."""
    for row in rows:
        thinking, _, end = row["completion"].partition("</think>")
        paragraphs = thinking.split("\n\n")
        assert paragraphs.pop() == "" and len(paragraphs) == row["checks"] + 1 >= 2
        assert end == f"\\boxed{{{row['answer']}}}"
        for i, paragraph in enumerate(paragraphs):
            first, *steps, said = [*([] if i else ["wait"]), *paragraph.split("\n")]
            assert first == "wait"
            for left, result in (step.split("=") for step in steps):
                assert str(eval(left)) == result and int(result) >= 0
            assert said == f"answer is {steps[-1].split('=')[1]}"
        assert paragraphs[-1].endswith(f"answer is {row['answer']}")
        assert len(row["completion"].encode()) == len(row["completion"]) < world.LIMIT


def test_the_anchor_by_construction_is_the_anchor_found(rows):
    """The whole chain of `rewards.anchor` against the truth, in bytes as tokens."""
    for row in rows:
        spans = [(i, i + 1) for i in range(len(row["completion"]))]
        got = anchor.apr(row["prompt"], row["completion"], {**row, "offsets": spans}, grace=0)
        assert got["pre"] == row["anchor"], row
        assert got["accuracy"] == 1 and got["tail"] == got["think"] - row["anchor"]
        if row["subset"] != "helps":
            assert row["anchor"] == row["derivation"]


def test_verification_helps(rows):
    """Who stops after the first paragraph is wrong in "helps", and only there."""
    for row in rows:
        first = row["completion"].split("\n\n")[0].rpartition(" ")[2]
        assert (first == row["answer"]) == (row["subset"] != "helps")


def test_wavering_parts_the_first_from_the_stable_anchor(drawn):
    """Without such traces the two kinds of anchor could not be told apart."""
    helps = [p for p in drawn if p["subset"] == "helps"]
    for wavers, left in ((1.0, {1}), (0.0, {0})):
        for row in world.traces(helps, seed=0, wavers=wavers):
            spans = [(i, i + 1) for i in range(len(row["completion"]))]
            record = {**row, "offsets": spans}
            stable = anchor.apr("", row["completion"], record, grace=0)
            first = anchor.apr("", row["completion"], record, grace=0, anchor="first")
            assert {stable["excursions"]} == left
            assert (first["pre"] < stable["pre"]) == bool(wavers)


def test_checks_are_geometric(drawn):
    """Half of the traces stop at each check, where there is room; a stop of 1 checks once."""
    easy = [p for p in drawn if p["subset"] == "easy"]
    counts = collections.Counter(row["checks"] for row in world.traces(easy, seed=0, each=50))
    assert 0.45 < counts[1] / sum(counts.values()) < 0.57 and 1.7 < counts[1] / counts[2] < 2.3
    assert max(counts) >= 5
    assert {row["checks"] for row in world.traces(easy, seed=0, stop=1.0)} == {1}
    for kw in (dict(stop=0.0), dict(stop=1.5), dict(wavers=-0.1)):
        with pytest.raises(ValueError, match="0 < stop <= 1"):
            world.traces(easy, seed=0, **kw)


def test_check(rows):
    """Right by the answer after the thinking, and only there."""
    row = rows[0]
    assert all(world.check(row, row["completion"]) for row in rows)
    wrong = str(int(row["answer"]) + 1)
    thinking = row["completion"].partition("</think>")[0]
    assert not world.check(row, f"{thinking}</think>\\boxed{{{wrong}}}")
    assert not world.check(row, thinking)  # cut off
    assert not world.check(row, row["completion"] * 2)
    assert not world.check(row, f"{thinking}</think>")
    assert world.check(row, f"</think>answer is {row['answer']}")


def test_split_and_json(drawn):
    """Held-out problems share no key with the rest in any order; rows are plain JSON."""
    rest, held = reasoning_gym.split(drawn, fraction=0.2, seed=0)
    assert not {p["key"] for p in rest} & {p["key"] for p in held} and len(held) == 48
    assert json.loads(json.dumps(world.traces(held, seed=0))) == world.traces(held, seed=0)
