"""Numbers of public suites: against the release of RewardBench, and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward.data.corpora import suites
from jaxreward.evals import reward_bench

GOLDENS = json.loads(
    (Path(__file__).parents[1] / "goldens/rewardbench.json").read_text(encoding="utf-8")
)
FEW = {"samples": 20}


def item(subset, section=None, *, id="0", answers=2, right=(0,), prompt=None, **more):
    """An item as `suites.read` gives it; prompts differ unless they are given."""
    return {
        "id": id,
        "subset": subset,
        "section": section or subset,
        "prompt": prompt or f"{subset} {id}",
        "answers": ["x"] * answers,
        "right": list(right),
        **more,
    }


def value(metric):
    return metric["value"]


# RewardBench 1 and 2, against the release


def test_the_tables_are_those_of_the_release():
    """Catches a count or a subset that is mistyped."""
    ours = {name: list(subsets) for name, subsets in suites.REWARD_BENCH.items()}
    assert ours == GOLDENS["subset mapping"]
    counts = {s: n for subsets in suites.REWARD_BENCH.values() for s, n in subsets.items()}
    assert counts == GOLDENS["example counts"]


@pytest.fixture(scope="module")
def first():
    """(items, scores) of the golden pairs of RewardBench 1 with prior sets."""
    section = {s: name for name, part in suites.REWARD_BENCH.items() for s in part}
    items, scores = [], []
    for subset, pairs in GOLDENS["first"]["scores"].items():
        for number, pair in enumerate(pairs):
            items.append(item(subset, section.get(subset, suites.PRIOR), id=str(number)))
            scores.append(pair)
    return items, np.array(scores)


def test_sections_equal_the_release(first):
    """Catches a mean over rows in place of the release's counts, and ties that count as half."""
    got = reward_bench.measure("reward_bench", *first, **FEW)
    want = GOLDENS["first"]
    for name, score in want["sections"].items():
        assert value(got[name]) == pytest.approx(score, abs=1e-12)
    assert value(got["Prior Sets"]) == pytest.approx(want["Prior Sets"], abs=1e-12)
    assert value(got["overall with Prior Sets"]) == pytest.approx(want["average"], abs=1e-12)
    without = want["average without prior sets"]
    assert value(got["overall"]) == pytest.approx(without, abs=1e-12)
    assert got["ties"] >= 27 and got["items"] == len(first[0])
    for metric in (got["overall"], got["Chat"], got["hep-go"]):
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_best_of_four_equals_the_release():
    """Catches a shared highest score that counts as a win, or as none."""
    golden = GOLDENS["second"]["best of four"]
    items = [item("Math", id=str(i), answers=4) for i in range(len(golden["scores"]))]
    for one, scores, want in zip(items, golden["scores"], golden["results"]):
        got = reward_bench.measure("reward_bench_2", [one], [scores], partial=True, **FEW)
        assert value(got["Math"]) == pytest.approx(want, abs=1e-12)
    got = reward_bench.measure("reward_bench_2", items, golden["scores"], partial=True, **FEW)
    assert value(got["Math"]) == pytest.approx(np.mean(golden["results"]))
    assert got["ties"] == 3


def ties_of(rows):
    items, scores = [], []
    for row in rows:
        kind, _, place = row["id"].partition(":")
        n = row["num_correct"]
        more = {"answers": len(row["scores"]), "right": range(n), "tie": (kind, int(place))}
        items.append(item("Ties", id=row["id"], **more))
        scores.append(np.array(row["scores"]))
    return items, scores


@pytest.mark.parametrize("name", GOLDENS["second"]["ties"])
def test_ties_equal_the_release(name):
    """Catches a term over the wrong questions: those without a partner, or without a gap."""
    case = GOLDENS["second"]["ties"][name]
    items, scores = ties_of(case["rows"])
    got = reward_bench.measure("reward_bench_2", items, scores, partial=True, **FEW)
    assert value(got["Ties"]) == pytest.approx(case["score"], abs=1e-12)


def test_ties_by_hand():
    """0.3 + 0.3 + 0.2 + 0.2 + 0.01 tanh(1.5 / 0.5 - 1): catches the golden and us wrong alike."""
    rows = [
        {"id": "ref:0", "scores": [2.0, 0.5], "num_correct": 1},
        {"id": "tied:0", "scores": [3.5, 3.0, 1.0], "num_correct": 2},
    ]
    got = reward_bench.measure("reward_bench_2", *ties_of(rows), partial=True, **FEW)
    assert value(got["Ties"]) == pytest.approx(1 + 0.01 * np.tanh(1.5 / 0.5 - 1))


def test_the_whole_of_rewardbench_two_is_the_mean_of_six():
    """Catches Ties whose weights sum to 1.01 pulling at the mean."""
    wins = {"Factuality": 1, "Precise IF": 0, "Math": 1, "Safety": 0, "Focus": 1}
    items = [item(name, answers=4) for name in wins]
    scores = [np.array([0.5, 1 - w, 0, 0]) for w in wins.values()]
    case = GOLDENS["second"]["ties"]["both kinds"]
    more, their = ties_of(case["rows"])
    got = reward_bench.measure("reward_bench_2", items + more, scores + their, **FEW)
    assert value(got["overall"]) == pytest.approx((3 + case["score"]) / 6)


# The others, by hand


def test_rm_bench_by_hand():
    """Catches rows and columns swapped, which trades easy for hard, and a heavier domain."""
    matrix = np.array([0.0, 2, 4, 1, 3, 5])  # wins where its style is the fancier one
    better = np.array([3.0, 3, 3, 1, 2, 3])  # loses only where equal: to the fanciest
    domains = [("chat", matrix), ("chat", matrix), ("math", better), ("code", better)]
    domains += [("safety-refuse", matrix), ("safety-response", better)]
    items = [
        item(name, name.split("-")[0], id=str(i), answers=6, right=(0, 1, 2))
        for i, (name, _) in enumerate(domains)
    ]
    got = reward_bench.measure("rm_bench", items, [s for _, s in domains], **FEW)
    flat = {name: value(x) for name, x in got.items() if isinstance(x, dict)}
    assert [flat[f"chat/{k}"] for k in ("easy", "normal", "hard")] == [1, 0, 0]
    assert [flat[f"math/{k}"] for k in ("easy", "normal", "hard")] == pytest.approx(
        [1, 2 / 3, 1 / 3]
    )
    assert flat["safety/normal"] == pytest.approx(1 / 3)
    assert flat["safety-refuse"] == pytest.approx(1 / 3)
    assert flat["easy"] == pytest.approx(1)
    assert flat["normal"] == pytest.approx((0 + 2 / 3 + 2 / 3 + 1 / 3) / 4)
    assert flat["hard"] == pytest.approx((0 + 1 / 3 + 1 / 3 + 1 / 6) / 4)
    assert flat["overall"] == pytest.approx((flat["easy"] + flat["normal"] + flat["hard"]) / 3)
    assert got["ties"] == 9  # of three items, each right style equals the last wrong one


def test_accuracy_suites_by_hand():
    """Catches a mean of means for a mean, a macro over subsets, and an equal score that wins."""
    sections = ["helpful", "helpful", "helpful", "honest", "harmless", "other"]
    items = [item(s, id=str(i), right=(i % 2,)) for i, s in enumerate(sections)]
    scores = np.array([[1, 0], [0, 1], [1, 1], [1, 0], [1, 0], [2, 3]], float)
    got = reward_bench.measure("hhh", items, scores, **FEW)
    assert value(got["helpful"]) == pytest.approx(2 / 3)
    assert value(got["accuracy"]) == pytest.approx((2 + 0 + 1 + 1) / 6)
    assert value(got["macro"]) == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert got["ties"] == 1


def test_judgebench_groups_by_source_section_and_model():
    """Catches a section that is an average over sources, and models mixed up."""
    rows = [("mmlu-pro-law", "Knowledge", 1), ("mmlu-pro-law", "Knowledge", 0)]
    rows += [("mmlu-pro-math", "Knowledge", 1), ("livebench-math", "Math", 0)]
    items = [
        item(source, section, id=str(i), response_model="gpt" if i < 2 else "claude")
        for i, (source, section, _) in enumerate(rows)
    ]
    scores = np.array([[w, 0.5] for *_, w in rows])
    got = reward_bench.measure("judgebench", items, scores, partial=True, **FEW)
    assert got["missing"] == ["Reasoning", "Coding"]
    assert value(got["Knowledge"]) == pytest.approx(2 / 3)
    assert [value(got[k]) for k in ("mmlu-pro-law", "gpt", "claude", "accuracy")] == [0.5] * 4


def test_llmbar_keeps_other_sets_out_of_its_accuracy():
    """Catches MT-Bench pairs in LLMBar's number, and a macro that lacks a subset."""
    items = [item(name, "LLMBar", id="0") for name in suites.LLMBAR]
    items += [item(suites.LLMBAR[1], "LLMBar", id="1"), item("Processed/MT-Bench", "Processed")]
    scores = np.array([[w, 0.5] for w in (1, 0, 1, 1, 1, 0, 0)])
    got = reward_bench.measure("llmbar", items, scores, **FEW)
    assert value(got["accuracy"]) == pytest.approx(4 / 6)
    assert value(got["Adversarial"]) == pytest.approx(3 / 4)
    assert value(got["macro"]) == pytest.approx(4 / 5)
    assert value(got["Processed/MT-Bench"]) == 0


PANDA = [
    # labels, scores
    ((1, 1, 2), (2.0, 1.0)),
    ((2, 2, 2), (2.0, 1.0)),
    ((0, 0, 1), (1.0, 1.25)),
    ((1, 2, 0), (5.0, 0.0)),  # no majority: the first annotator's
    ((0, 0, 0), (1.0, 4.0)),
]


def panda():
    items = [item("test", id=str(i), labels=list(x)) for i, (x, _) in enumerate(PANDA)]
    return items, np.array([s for _, s in PANDA])


def test_pandalm_by_hand():
    """Catches ties that no threshold makes, a majority that sorts, and F1 over two classes."""
    got = reward_bench.measure("pandalm", *panda(), threshold=0.5, **FEW)
    # majority 1 2 0 1 0; said 1 1 0 1 2
    assert value(got["accuracy"]) == pytest.approx(3 / 5)
    assert value(got["accuracy/no_ties"]) == pytest.approx(2 / 3)
    f1 = [2 * 1 / (1 + 2), 2 * 2 / (3 + 2), 0.0]
    assert got["macro_f1"] == pytest.approx(np.mean(f1))
    assert value(got["agreement/annotator1"]) == pytest.approx(3 / 5)
    assert value(got["agreement/annotator3"]) == pytest.approx(0)
    assert value(got["agreement/people"]) == pytest.approx((1 / 3 + 1 + 1 / 3 + 0 + 1) / 5)
    assert (got["predicted_ties"], got["majority_ties"]) == (1 / 5, 2 / 5)
    assert got["threshold"] == 0.5 and got["matched/threshold"] == 1.0
    assert got["matched/predicted_ties"] == 3 / 5  # two gaps of 1 are equal
    none = reward_bench.measure("pandalm", *panda(), **FEW)
    assert none["predicted_ties"] == 0


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.integers(-8, 8), min_size=2 * n, max_size=2 * n)
    ),
    st.integers(1, 5),
    st.integers(-50, 50),
)
def test_only_the_order_of_scores_counts(numbers, scale, shift):
    """Catches a metric that reads the scale of a model: any a s + b with a > 0 is the same."""
    scores = np.array(numbers, float).reshape(-1, 2)
    items = [item("honest", id=str(i)) for i in range(len(scores))]
    kw = {"partial": True, "samples": 5}
    one = reward_bench.measure("hhh", items, scores, **kw)
    assert one == reward_bench.measure("hhh", items, scale * scores + shift, **kw)
    assert value(one["accuracy"]) == np.mean(scores[:, 0] > scores[:, 1])


def test_prompts_are_resampled_and_not_pairs():
    """Catches an interval that takes answers to one prompt for independent."""
    kw = {"samples": 200, "partial": True}
    scores = np.array([[1, 0], [0, 1]] * 10, float)
    one = [item("honest", id=str(i), prompt="the same") for i in range(20)]
    each = [item("honest", id=str(i)) for i in range(20)]
    got = reward_bench.measure("hhh", one, scores, **kw)["accuracy"]
    assert got == {"value": 0.5, "low": 0.5, "high": 0.5}
    got = reward_bench.measure("hhh", each, scores, **kw)["accuracy"]
    assert got["low"] < 0.4 < 0.6 < got["high"]


# Judges


def test_verdicts_go_through_the_same_sections():
    """Catches an order that is dropped, and a judge that always says A above one half."""
    items = [item("helpful", id="0"), item("honest", id="1")]
    items += [item("harmless", id="2"), item("other", id="3")]
    always_a = np.array([[[0], [1]]] * 4, np.int8)
    got = reward_bench.from_verdicts("hhh", items, always_a, **FEW)
    assert value(got["single_accuracy/macro"]) == 0.5
    assert value(got["pair_accuracy/accuracy"]) == value(got["consistency/honest"]) == 0
    right = np.zeros((4, 2, 1), np.int8)
    right[3] = -1
    got = reward_bench.from_verdicts("hhh", items, right, **FEW)
    assert value(got["pair_accuracy/macro"]) == 0.75 and value(got["unparseable"]) == 0.25
    once = np.array([[[0], [-2]]] * 4, np.int8)  # one order: nothing that needs both
    got = reward_bench.from_verdicts("hhh", items, once, **FEW)
    assert value(got["single_accuracy/accuracy"]) == 1
    assert not any(name.startswith(("pair", "consistency")) for name in got)


def test_judgebench_counts_the_orders_as_its_code_does():
    """right + none is right there, right + wrong is not: catches pair accuracy in its place."""
    items = [item("mmlu-pro-law", "Knowledge", id=str(i), response_model="m") for i in range(5)]
    verdicts = np.array([[0, 0], [0, -1], [0, 1], [-1, -1], [-1, 0]], np.int8)[:, :, None]
    got = reward_bench.from_verdicts("judgebench", items, verdicts, partial=True, **FEW)
    assert value(got["accuracy"]) == pytest.approx(3 / 5)
    assert value(got["pair_accuracy/accuracy"]) == pytest.approx(1 / 5)
    # With two samples an order: the mean over all ways to put one beside the other.
    two = np.array([[[0, -1], [0, 1]]], np.int8)
    got = reward_bench.from_verdicts("judgebench", items[:1], two, partial=True, **FEW)
    assert value(got["accuracy"]) == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_rm_bench_is_nine_comparisons_for_a_judge():
    """Catches comparisons in another order than verdicts are read in."""
    one = item("chat", id="7", answers=6, right=(0, 1, 2))
    one["answers"] = ["c0", "c1", "c2", "r0", "r1", "r2"]
    pairs = reward_bench.comparisons("rm_bench", [one])
    assert [(p["chosen"], p["rejected"]) for p in pairs[:4]] == [
        ("c0", "r0"),
        ("c0", "r1"),
        ("c0", "r2"),
        ("c1", "r0"),
    ]
    assert len({p["id"] for p in pairs}) == 9
    # A judge that picks the fancier answer, and the right one of equals.
    verdicts = np.array([[int(r > c)] * 2 for c in range(3) for r in range(3)], np.int8)
    got = reward_bench.from_verdicts("rm_bench", [one], verdicts[:, :, None], partial=True, **FEW)
    levels = [value(got[f"pair_accuracy/chat/{k}"]) for k in ("easy", "normal", "hard")]
    assert levels == pytest.approx([1, 1, 0])


def test_pandalm_calls_what_orders_disagree_on_a_tie():
    """Catches a verdict of one order taken for both, and an unreadable one for an answer."""
    items, _ = panda()
    verdicts = np.array([[0, 0], [1, 1], [0, 1], [-1, 0], [-1, -1]], np.int8)[:, :, None]
    got = reward_bench.from_verdicts("pandalm", items, verdicts, **FEW)
    assert value(got["accuracy"]) == pytest.approx(4 / 5)  # 1 2 0 0 0 against 1 2 0 1 0
    assert got["predicted_ties"] == 3 / 5 and value(got["consistency"]) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="vote first"):
        reward_bench.from_verdicts("pandalm", items, np.zeros((5, 2, 3), np.int8))
    with pytest.raises(ValueError, match="both orders"):
        reward_bench.from_verdicts("pandalm", items, np.full((5, 2, 1), [[0], [-2]], np.int8))


# Errors


def test_scores_of_another_shape_are_refused():
    """The scores of several outputs, [answers, C]: upstream takes the first or breaks in Ties."""
    one = item("Ties", id="ref:0", answers=2, tie=("ref", 0))
    for scores, said in (
        ([[[1.0, 2.0], [0.0, 3.0]]], r"Ties/ref:0: scores must be \[2\].*got \[2, 2\].*heads"),
        ([[[1.0], [0.0]]], r"got \[2, 1\]"),
        ([[1.0]], r"got \[1\]"),
        ([[1.0, float("nan")]], "must be finite"),
        ([], "1 items and scores of 0"),
    ):
        with pytest.raises(ValueError, match=said):
            reward_bench.measure("reward_bench_2", [one], scores, partial=True)


def test_a_missing_part_is_named_unless_a_part_is_asked_for(first):
    """Catches a number under the suite's name that is of another suite."""
    items, scores = first
    kept = [i for i, one in enumerate(items) if one["subset"] not in ("math-prm", "shp")]
    some = [items[i] for i in kept]
    with pytest.raises(ValueError, match=r"reward_bench lacks math-prm: .* --limit N"):
        reward_bench.measure("reward_bench", some, scores[kept])
    got = reward_bench.measure("reward_bench", some, scores[kept], partial=True, **FEW)
    assert got["missing"] == ["math-prm"]
    chat = [i for i, one in enumerate(items) if one["section"] == "Chat"]
    some = [items[i] for i in chat]
    got = reward_bench.measure("reward_bench", some, scores[chat], partial=True, **FEW)
    assert "overall" not in got and value(got["Chat"]) == pytest.approx(
        GOLDENS["first"]["sections"]["Chat"]
    )
    with pytest.raises(ValueError, match="hhh: no items"):
        reward_bench.measure("hhh", [], [])
    with pytest.raises(KeyError, match="no suite 'rmbench'"):
        reward_bench.measure("rmbench", items, scores)


def test_verdicts_that_do_not_fit_are_refused():
    """Catches verdicts of other comparisons, and best of four as pairs."""
    items = [item("honest")]
    with pytest.raises(ValueError, match="1 comparisons and verdicts of 2"):
        reward_bench.from_verdicts("hhh", items, np.zeros((2, 2, 1), np.int8), partial=True)
    with pytest.raises(ValueError, match="no suite of pairs"):
        reward_bench.from_verdicts("reward_bench_2", items, np.zeros((1, 2, 1), np.int8))
