"""Accuracy, length and tails over many answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward.data.corpora import overthinking as world
from jaxreward.evals import overthinking as evals
from jaxreward.evals.sampled import Answered
from jaxreward.rewards import anchor

FIRST = "first we add them up: 2 + 3 = 5\n\n"
AGAIN = "once again, 2 plus 3: the answer is 5\n\n"
OTHER = "or is that so? the answer is 7 now\n\n"
OUT = "</think>\\boxed{5}"


def sample(text, *, tokens=None, **record):
    spans = [(i, i + 1) for i in range(len(text))]
    return {"prompt": "2 and 3?", "answer": "5", "offsets": spans, **record}, text, tokens


def run(samples, **kw):
    return dict(evals.overthinking(samples, **{"grace": 0, **kw}))


def test_by_hand():
    """Every measure of four answers: right with a tail, right without, wrong, unfinished."""
    samples = [
        sample(FIRST + AGAIN + OUT, tokens=100),
        sample(FIRST + OUT, tokens=60),
        sample(FIRST + AGAIN + OUT, tokens=90, answer="6"),
        sample(FIRST + AGAIN * 9, tokens=400),
    ]
    got = run(samples)
    tail = len(AGAIN) / len(FIRST + AGAIN)
    assert got == {
        "accuracy": 0.5,
        "length": 162.5,
        "no_anchor": 0.25,
        "unfinished": 0.25,
        "pre_anchor": len(FIRST),
        "tail": len(AGAIN) / 2,
        "rho": pytest.approx(tail / 2),
        "wavered": 0.0,
        "samples": 4.0,
        "in_tokens": 1.0,
    }


def test_right_answers_without_an_anchor_have_no_lengths_before_it():
    """Their tail of 0 would make a model look cured that only stopped saying its answer."""
    silent = "let us see what that may be, by looking at it\n\n" + OUT
    got = run([sample(FIRST + AGAIN + OUT), sample(silent), sample(silent)])
    assert got["tail"] == len(AGAIN) and got["pre_anchor"] == len(FIRST)
    assert got["accuracy"] == 1.0 and got["no_anchor"] == pytest.approx(2 / 3)


def test_problems_count_once():
    """A problem that was answered more often must not count more."""
    good, bad = FIRST + OUT, FIRST + "</think>7"
    got = run([sample(good, id="a")] * 3 + [sample(bad, id="b")] + [sample(good, id="b")])
    assert got["accuracy"] == 0.75
    assert run([sample(good), sample(good), sample(bad)])["accuracy"] == pytest.approx(2 / 3)


def test_subsets_count_alike():
    """The plain name is the mean over benchmarks, whatever their sizes."""
    got = run(
        [sample(FIRST + OUT, subset="x", tokens=10)] * 3
        + [sample(FIRST + AGAIN + "</think>8", subset="y", tokens=50)]
    )
    assert (got["accuracy/x"], got["accuracy/y"], got["accuracy"]) == (1.0, 0.0, 0.5)
    assert (got["length/x"], got["length/y"], got["length"]) == (10, 50, 30)
    assert "rho/y" not in got and got["rho"] == got["rho/x"] == 0.0  # no right answer, no tail


def test_wavering_and_lengths_in_words():
    """Leaving the answer is counted. Without tokens otherwise words are, and that is said."""
    record, text, _ = sample(FIRST + OTHER + AGAIN + OUT)
    del record["offsets"]
    got = run([(record, text, None)], min_tokens=5)
    assert (got["wavered"], got["in_tokens"]) == (1.0, 0.0)
    assert got["length"] == len((FIRST + OTHER + AGAIN).split()) + 2
    assert run([]) == {"samples": 0.0}


def test_nothing_right_gives_no_tail_instead_of_nan():
    """A model that answers nothing must not put NaN into a report."""
    got = run([sample("mumble")])
    assert not {"rho", "tail", "pre_anchor", "wavered"} & set(got)
    assert all(np.isfinite(value) for value in got.values()) and got["unfinished"] == 1


def test_on_the_tiny_world():
    """Traces that are made to overthink show it, and their shortest forms do not."""
    rows = world.traces(
        [p for kind in world.KINDS for p in world.problems(kind, count=20, seed=0)], seed=0
    )
    long = run([sample(row["completion"], **row) for row in rows])
    short = [
        sample(row["completion"][: row["anchor"]] + f"</think>\\boxed{{{row['answer']}}}", **row)
        for row in rows
    ]
    brief = run(short)
    assert long["accuracy"] == brief["accuracy"] == 1.0
    assert long["pre_anchor"] == brief["pre_anchor"] and brief["rho"] == brief["tail"] == 0
    assert long["rho/easy"] > 0.5 and long["wavered/helps"] > 0 and long["wavered/easy"] == 0


def test_pareto_front_by_hand():
    """Beaten in one and equal in the other is beaten; equal twins both stand."""
    accuracy = np.array([0.5, 0.6, 0.6, 0.4, 0.5, 0.5])
    length = np.array([100, 200, 250, 90, 100, 120])
    got = evals.pareto_front(accuracy, length)
    assert got.tolist() == [True, True, False, True, True, False]
    with pytest.raises(ValueError, match="NaN"):
        evals.pareto_front(np.array([np.nan]), np.array([1.0]))
    with pytest.raises(ValueError, match=r"received \(2,\) and \(1,\)"):
        evals.pareto_front(np.zeros(2), np.zeros(1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_pareto_front_against_the_definition(points):
    """Against the definition in plain Python; and somebody always stands."""
    expected = [
        not any(a >= x and n <= y and (a > x or n < y) for a, n in points) for x, y in points
    ]
    accuracy, length = np.array(points, float).T
    got = evals.pareto_front(accuracy, length)
    assert got.tolist() == expected and got.any()


def test_aes_by_hand():
    """Gains and losses have different prices, and the prices come with the score."""
    base = dict(base_accuracy=0.5, base_length=1000.0)
    got = evals.aes(0.55, 600.0, **base)
    assert got["aes"] == pytest.approx(0.4 + 3 * 0.1)
    assert (got["alpha"], got["beta"], got["gamma"]) == (1.0, 3.0, 5.0)
    assert evals.aes(0.45, 600.0, **base)["aes"] == pytest.approx(0.4 - 5 * 0.1)
    assert evals.aes(0.45, 600.0, gamma=10, **base)["aes"] == pytest.approx(0.4 - 10 * 0.1)
    assert evals.aes(0.5, 1000.0, **base)["aes"] == 0
    with pytest.raises(ValueError, match="positive accuracy and length; received 0"):
        evals.aes(0.5, 1.0, base_accuracy=0, base_length=1)


def test_answers_that_are_sampled_are_measured_alike():
    """Catches a part under another name, a problem that is each of its samples, lost subsets."""
    texts = [FIRST + OUT, FIRST + AGAIN + OUT, OTHER + OUT, FIRST]
    samples = [sample(t, id=str(i // 2), subset="ab"[i // 2]) for i, t in enumerate(texts)]
    parts = [anchor.apr(r["prompt"], t, r, grace=0) for r, t, _ in samples]
    of = lambda name: np.float32([p[name] for p in parts]).reshape(2, 2)
    got = Answered(
        outcome=of("accuracy"),
        reward=of("reward"),
        length=of("tokens"),
        finished=np.ones((2, 2), bool),
        parts={f"apr/{name}": of(name) for name in parts[0]},
    )
    prompts = [{"record": {"subset": name}} for name in "ab"]
    found = dict(evals.sampled(lambda *args: got, prompts, n=2))
    want = run(samples)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    with pytest.raises(KeyError, match=r"rewards\.other, which gives no anchor"):
        list(evals.sampled(lambda *args: got, prompts, n=2, reward="other"))
