"""Items of a test set that stand in training data."""

import numpy as np
import pytest

from jaxreward.data import overlap

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def record(prompt, chosen="yes"):
    return {"id": "r", "prompt": prompt, "chosen": chosen, "rejected": "no"}


def test_runs_are_windows_of_words_whatever_their_writing():
    words = LONG.split()
    got = overlap.runs(LONG, 4)
    assert got.shape == (12,) and got.dtype == np.uint64 and len(set(got.tolist())) == 12
    same = overlap.runs("  Five, six -- SEVEN eight!", 4)
    assert same.tolist() == [got[4]]
    assert overlap.runs(" ".join(reversed(words[4:8])), 4)[0] not in got, "order counts"
    assert overlap.runs("one two three", 4).shape == (0,)


def test_runs_of_a_brute_comparison():
    """Against tuples of words in a set: no run is lost or made up by the arithmetic."""
    rng = np.random.default_rng(0)
    text = lambda: " ".join(f"w{i}" for i in rng.integers(0, 3, 60))
    train, test = [text() for _ in range(5)], [text() for _ in range(20)]
    windows = lambda t: [tuple(t.split()[i : i + 5]) for i in range(56)]
    known = {w for t in train for w in windows(t)}
    made = overlap.index(train, 5)
    assert len(made) == len(known)
    for t in test:
        want = np.mean([w in known for w in windows(t)])
        assert overlap.share(t, made, 5) == pytest.approx(want)


def test_a_prompt_is_found_whole_by_runs_or_not_at_all():
    records = [record("What is 2 + 2?"), record("x", chosen=f"As I said: {LONG}."), record(LONG)]
    items = [
        {"prompt": "what is 2 + 2"},  # the same but for its writing
        {"prompt": f"zero {LONG} sixteen"},  # most of its runs, in an answer
        {"prompt": [{"role": "user", "content": LONG}]},  # both
        {"prompt": "What is 2 + 3?"},  # a short one that is new
        {"prompt": " ".join(reversed(LONG.split()))},
    ]
    found = overlap.Training(records).seen(items)
    assert found["exact"].tolist() == [True, False, True, False, False]
    assert found["ngram"].tolist() == [False, True, True, False, False]
    assert found["any"].tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(found["share"], [np.nan, 3 / 5, 1, np.nan, 0])
    assert not overlap.Training(records).seen(items, threshold=0.7)["ngram"][1]


def test_report_counts_by_subset():
    found = overlap.Training([record(LONG)]).seen(
        [{"prompt": LONG}, {"prompt": "new"}, {"prompt": "old"}]
    )
    assert overlap.report(found, ["a", "a", "b"]) == {
        "": dict(items=3, exact=1, ngram=1, any=1, short=2),
        "a": dict(items=2, exact=1, ngram=1, any=1, short=1),
        "b": dict(items=1, exact=0, ngram=0, any=0, short=1),
    }
    with pytest.raises(ValueError, match="3 items and 1 subsets"):
        overlap.report(found, ["a"])


def test_nothing_to_compare_with():
    found = overlap.Training([]).seen([{"prompt": LONG}])
    assert found["share"].tolist() == [0.0] and not found["any"].any()
    # A prompt of punctuation alone says nothing, and is equal to nothing.
    assert not overlap.Training([record("...")]).seen([{"prompt": "!?"}])["exact"].any()


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one word; received n = 0"):
        overlap.Training([], n=0)
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match="a share in"):
            overlap.Training([]).seen([], threshold=threshold)
