"""Judges in both orders: every measure by hand, votes, and verdicts from graded answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxreward.evals import judges
from jaxreward.evals.sampled import Answered
from jaxreward.rewards.verdict import agreement

# Five judges of one pair each, greedy: right twice; wrong twice; always A; always B; half unread.
FIVE = np.int8([[0, 0], [1, 1], [0, 1], [1, 0], [0, -1]])[..., None]


def test_five_pairs_by_hand():
    """Catches orders exchanged, unreadable verdicts that count as right or as consistent."""
    found = judges.outcomes(FIVE)
    assert found["single_accuracy"].tolist() == [1, 0, 0.5, 0.5, 0.5]
    assert found["pair_accuracy"].tolist() == [1, 0, 0, 0, 0]
    assert found["consistency"].tolist() == [1, 1, 0, 0, 0]
    assert found["unparseable"].tolist() == [0, 0, 0, 0, 0.5]
    assert found["first"].tolist() == [0.5, 0.5, 1, 0, 1]


def test_samples_by_hand():
    """Catches samples paired by their number: any sample of one order meets any of the other."""
    found = judges.outcomes(np.int8([[[0, 0, 0, 1], [0, 0, 1, -1]]]))
    assert found["single_accuracy"][0] == (3 / 4 + 2 / 4) / 2
    assert found["pair_accuracy"][0] == 3 / 4 * 2 / 4
    assert found["consistency"][0] == 3 / 4 * 2 / 4 + 1 / 4 * 1 / 4
    assert found["unparseable"][0] == 1 / 8
    np.testing.assert_allclose(found["first"][0], (3 / 4 + 1 / 3) / 2)


def test_one_order_alone():
    """Catches a pair that is called inconsistent since it was asked once."""
    found = judges.outcomes(np.int8([[[0], [-2]], [[-2], [1]], [[-2], [-1]]]))
    assert found["single_accuracy"].tolist() == [1, 0, 0]
    assert found["first"][:2].tolist() == [1, 1] and np.isnan(found["first"][2])
    assert np.isnan(found["pair_accuracy"]).all() and np.isnan(found["consistency"]).all()
    names = dict(judges.measures(np.int8([[[0], [-2]]]), samples=10))
    assert "pair_accuracy" not in names and names["pairs_both"] == 0 and names["pairs"] == 1


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.int8, st.tuples(st.integers(1, 5), st.just(2), st.integers(1, 4)),
                     elements=st.sampled_from([0, 1, -1])))  # fmt: skip
def test_bounds_and_symmetry(verdicts):
    """Catches measures that depend on which order comes first, and impossible combinations."""
    found, turned = judges.outcomes(verdicts), judges.outcomes(verdicts[:, ::-1])
    for name in ("single_accuracy", "pair_accuracy", "consistency", "unparseable"):
        np.testing.assert_allclose(found[name], turned[name])
    np.testing.assert_allclose(found["first"], 1 - turned["first"])  # NaN where nothing is read
    assert (found["pair_accuracy"] <= found["consistency"] + 1e-12).all()
    assert (found["pair_accuracy"] <= found["single_accuracy"] + 1e-12).all()
    assert (found["single_accuracy"] + found["unparseable"] <= 1 + 1e-12).all()


def test_votes_by_hand():
    """Catches unreadable samples that vote, another rule at a tie, and orders voted together."""
    verdicts = np.int8([[[1, -1, -1, 1], [0, 1, 1, 0]], [[-1, -1, -1, -1], [-2, -2, -2, -2]]])
    assert judges.vote(verdicts)[..., 0].tolist() == [[1, 0], [-1, -2]]
    assert judges.vote(verdicts, on_tie="none")[..., 0].tolist() == [[1, -1], [-1, -2]]


def test_subsets_and_intervals():
    """Catches a macro mean weighted by size, and an interval that leaves out the mean."""
    verdicts = np.repeat(np.int8([[[0], [0]], [[1], [1]]]), [30, 10], axis=0)
    subsets = ["easy"] * 20 + ["hard"] * 20
    found = dict(judges.measures(verdicts, subsets))
    assert found["pair_accuracy"] == 0.75
    assert found["pair_accuracy/easy"] == 1 and found["pair_accuracy/hard"] == 0.5
    uneven = dict(judges.measures(verdicts, ["easy"] * 30 + ["hard"] * 10, samples=10))
    assert uneven["pair_accuracy"] == 0.75 and uneven["pair_accuracy_macro"] == 0.5
    assert 0.55 < found["pair_accuracy_low"] < 0.75 < found["pair_accuracy_high"] < 0.9
    assert found["consistency_low"] == found["consistency_high"] == 1
    assert found["pairs"] == found["pairs_both"] == 40
    unnamed = dict(judges.measures(verdicts, samples=10))
    assert not any("/" in name or name.endswith("_macro") for name in unnamed)


def prompt(label, **fields):
    return {"record": {"id": f"{fields.get('pair', 'x')}:{label}", "label": label, **fields}}


def answered(accuracy, read, form=None):
    accuracy, read = np.float32(accuracy), np.float32(read)
    form = read if form is None else np.float32(form)
    parts = {"judge/accuracy": accuracy, "judge/format": form, "judge/read": read}
    ones = np.ones_like(accuracy)
    return Answered(
        outcome=accuracy, reward=accuracy, length=3 * ones, finished=ones > 0, parts=parts
    )


PROMPTS = [prompt("B", pair="p", subset="s"), prompt("A", pair="q"), prompt("A", pair="p")]


def test_verdicts_of_graded_answers():
    """Catches pairs put together by place in the list, and letters in place of answers."""
    verdicts, subsets = judges.verdicts_of(
        PROMPTS, np.float32([[1, 0], [0, 0], [0, 1]]), np.float32([[1, 1], [0, 1], [0, 0]])
    )
    assert verdicts.tolist() == [[[-1, 0], [0, 1]], [[-1, 1], [-2, -2]]]
    assert subsets == ["s", ""]


def test_the_evaluator():
    """Catches a vote over prompts, a measure of one order that is not there, and lost numbers."""
    seen = []

    def predict(prompts, n, temperature):
        seen.append((len(prompts), n, temperature))
        return answered([[1, 1, 0], [0, 0, 1], [1, 0, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 1]])

    found = dict(judges.both_orders(predict, PROMPTS, n=3, temperature=1.0, samples=10))
    assert seen == [(3, 3, 1.0)]
    np.testing.assert_allclose(found["single_accuracy"], ((2 / 3 + 1 / 3) / 2 + 1 / 3) / 2)
    np.testing.assert_allclose(found["pair_accuracy"], 2 / 3 * 1 / 3)
    # p is right as B and wrong as A, by majority; the samples of q are 1, unreadable, 0: 1 wins.
    assert found["vote/single_accuracy"] == 0.25 and found["vote/pair_accuracy"] == 0
    assert found["vote/first"] == 0 and "vote/pairs" not in found
    assert (found["pairs"], found["pairs_both"]) == (2, 1)
    assert (found["length"], found["finished"]) == (3, 1)
    np.testing.assert_allclose(found["format"], 8 / 9)
    one = lambda prompts, n, temperature: answered([[1]] * 3, [[1]] * 3)
    assert not any(name.startswith("vote") for name, _ in judges.both_orders(one, PROMPTS))


def test_a_letter_in_a_broken_form_is_a_verdict():
    """Catches a judge that always says B, out of form, which is taken for one that says nothing."""
    says = ("B is better. <answer>B</answer>", "<think>x</think><answer>B</answer>", "no idea")
    both = [prompt(label, pair=f"p{i}") for i in range(3) for label in "AB"]

    def predict(prompts, n, temperature):
        grades = [agreement("", says[int(p["record"]["pair"][1])], p["record"]) for p in prompts]
        return answered(*([[g[k]] for g in grades] for k in ("accuracy", "read", "format")))

    found = dict(judges.both_orders(predict, both, samples=10))
    assert found["single_accuracy"] == pytest.approx(1 / 3)  # the first two, in one order each
    assert found["unparseable"] == pytest.approx(1 / 3) and found["first"] == 0
    assert found["consistency"] == found["pair_accuracy"] == 0
    assert found["format"] == pytest.approx(1 / 3)  # the second, in both orders
    # One answer said out of form in both orders: wrong, and consistent.
    wrong = judges.both_orders(lambda *_: answered([[0], [0]], [[1], [1]], [[0], [0]]), both[:2])
    wrong = dict(wrong)
    assert (wrong["consistency"], wrong["unparseable"], wrong["format"]) == (1, 0, 0)
    assert wrong["first"] == 0.5 and wrong["single_accuracy"] == 0


@pytest.mark.parametrize(
    ("verdicts", "text"),
    [
        (np.zeros((3, 2)), r"must be \[pairs, 2 orders, samples\]; got \(3, 2\)"),
        (np.zeros((3, 1, 1)), r"got \(3, 1, 1\)"),
        (np.zeros((3, 2, 0)), r"got \(3, 2, 0\)"),
        (np.full((1, 2, 1), 2), "a verdict is 0, 1, -1 .* got 2"),
        (np.int8([[[0, -2], [0, 0]]]), "in all its samples or in none"),
    ],
)
def test_arrays_of_another_form_are_refused(verdicts, text):
    """Catches numbers of something else."""
    for function in (judges.outcomes, judges.vote):
        with pytest.raises(ValueError, match=text):
            function(verdicts)


def test_what_the_evaluator_cannot_use_is_named():
    """Catches greedy votes, another reward, letters that are none, and one order twice."""
    run = lambda prompts, n=1, **kw: list(
        judges.both_orders(
            lambda p, n, t: answered([[1]] * len(p), [[1]] * len(p)), prompts, n=n, **kw
        )
    )
    with pytest.raises(ValueError, match="4 greedy answers to a prompt are one"):
        run(PROMPTS, n=4)
    with pytest.raises(
        ValueError, match=r"needs the parts other/accuracy, other/format, other/read; .* judge/"
    ):
        run(PROMPTS, reward="other")
    with pytest.raises(ValueError, match="'x:C': label must be A or B; got 'C'"):
        run([prompt("C")])
    with pytest.raises(ValueError, match="'p' is asked twice with the right answer as A"):
        run([*PROMPTS, prompt("A", pair="p")])
    with pytest.raises(ValueError, match="5 pairs and 1 subsets"):
        list(judges.measures(FIVE, ["a"]))
