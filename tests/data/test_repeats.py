"""What stands twice: copies, contradictions, values, and prompts that two files share."""

import pytest

from jaxreward.data import repeats


def pair(id, prompt, chosen, rejected, **more):
    return {"id": id, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def user(text):
    return [{"role": "user", "content": text}]


def test_copies_repeated_prompts_and_contradictions_are_told_apart():
    """Catches a swapped pair counted as a copy, a contradiction counted from both sides, and ids or
    margins that keep two rows from being the same."""
    found = repeats.duplicates(
        [
            pair("a", "p", "x", "y"),
            pair("b", "q", "x", "y"),
            pair("c", "p", "y", "x"),
            pair("d", "p", "x", "y", margin=2.0),
            pair("e", "p", "x", "z"),
            pair("f", "r", "x", "y"),
        ]
    )
    assert found == {
        "prompts": 3,
        "repeated": 1,
        "most": 4,
        "copies": 1,
        "copied": [["a", "d"]],
        "contradictions": 1,
        "contradicted": [(["a", "d"], ["c"])],
    }


def test_a_text_is_the_same_as_one_message_of_it():
    """Catches copies that are missed since one is written as messages, and dialogues taken for the
    same although other people say the words."""
    answer = [{"role": "assistant", "content": "x"}]
    rows = [pair("a", "p", "x", "y"), pair("b", user("p"), answer, "y")]
    assert repeats.duplicates(rows)["copied"] == [["a", "b"]]
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "q"}]
    swapped = [{"role": "assistant", "content": "p"}, {"role": "user", "content": "q"}]
    rows = [{"id": "a", "prompt": turns}, {"id": "b", "prompt": swapped}]
    assert repeats.duplicates(rows)["copies"] == 0


def test_prompts_and_completions_have_copies_and_no_contradictions():
    """Catches a key that only pairs have."""
    rows = [{"id": i, "prompt": "p", "completion": text} for i, text in zip("abc", "xyx")]
    found = repeats.duplicates(rows)
    assert found["copied"] == [["a", "c"]] and found["contradictions"] == 0
    assert repeats.duplicates([{"id": i, "prompt": "p"} for i in "ab"])["copied"] == [["a", "b"]]


def test_of_plain_text_the_text_is_what_is_compared():
    """Catches documents that all count as one prompt, since theirs is empty."""
    rows = [{"id": i, "prompt": "", "completion": text} for i, text in zip("abc", "xyx")]
    found = repeats.duplicates(rows)
    assert (found["prompts"], found["repeated"], found["most"]) == (2, 1, 2)
    assert repeats.overlap(rows, rows[1:2])["exact_ids"] == [("b", "b")]
    assert repeats.overlap(rows, [{"id": "z", "prompt": "", "completion": "w"}])["exact"] == 0


def point(id, prompt, answer, **more):
    return {"id": id, "prompt": prompt, "answer": answer, **more}


def test_one_answer_with_two_labels_is_a_contradiction_and_no_copy():
    """Catches labels that keep no two rows apart, scores taken for a pair's, and true against 1."""
    rows = [
        point("a", "p", "x", label=True),
        point("b", "p", "x", label=1.0),
        point("c", "p", "x", label=False),
        point("d", "p", "y", label=False),
        point("e", "q", "x", scores={"u": 1.0, "v": None}),
        point("f", "q", "x", scores={"v": None, "u": 1.0}),
        point("g", "q", "x", scores={"u": 2.0, "v": None}),
        point("h", "q", "x", label=1.0),
    ]
    found = repeats.duplicates(rows)
    assert found["copied"] == [["a", "b"], ["e", "f"]] and found["copies"] == 2
    assert found["contradicted"] == [(["a", "b"], ["c"]), (["e", "f"], ["g"])]
    assert (found["prompts"], found["contradictions"]) == (2, 2)


def test_scores_are_summed_up_by_name():
    """Catches null counted as 0, a name that only some rows have, and labels that are no numbers.
    By hand: u is 1, 4 and 4; v is 2 and twice unknown."""
    rows = [
        point("a", "p", "x", scores={"u": 1.0, "v": None}),
        point("b", "p", "y", scores={"u": 4.0}),
        point("c", "p", "z", scores={"u": 4.0, "v": 2.0, "w": None}),
        point("d", "p", "w", label=True),
        pair("e", "p", "x", "y", scores=(1.0, 2.0)),
    ]
    assert repeats.numbers(rows) == {
        "scores.u": {"min": 1.0, "mean": 3.0, "max": 4.0, "known": 3, "null": 0},
        "scores.v": {"min": 2.0, "mean": 2.0, "max": 2.0, "known": 1, "null": 2},
        "scores.w": {"min": None, "mean": None, "max": None, "known": 0, "null": 3},
    }
    labels = [point(str(i), "p", "x", label=label) for i, label in enumerate([-1.0, 0.5, "no"])]
    assert repeats.numbers(labels) == {
        "label": {"min": -1.0, "mean": -0.25, "max": 0.5, "known": 2, "null": 0}
    }
    assert repeats.counts(labels) == {"label": {"-1": 1, "0.5": 1, "no": 1}}


def test_values_are_counted_wherever_the_reader_left_them():
    """Catches labels under "extra" that are missed, 0 and False taken for missing, and a list."""
    rows = [
        pair("a", "p", "x", "y", subset="easy", extra={"label": False}),
        pair("b", "p", "x", "y", subset="hard", extra={"label": 0}),
        pair("c", "p", "x", "y", subset="hard", extra={"label": [1]}),
        pair("d", "p", "x", "y"),
    ]
    found = repeats.counts(rows)
    assert found == {"subset": {"hard": 2, "easy": 1}, "label": {"False": 1, "0": 1}}
    assert list(found["subset"]) == ["hard", "easy"]
    assert repeats.counts(rows[3:]) == {}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("What is  2+2?\n", "what is 2+2"),
        ("“Don’t”", "don't"),
        ("ﬁne", "fine"),
        ("Straße", "STRASSE"),
        ("snake_case", "snake case"),
    ],
)
def test_what_two_copies_may_differ_in_goes(text, same):
    """Catches a copy that is missed for its quotes, case, ligatures or spaces."""
    assert repeats.normalised(text) == repeats.normalised(same)


@pytest.mark.parametrize(("text", "other"), [("3 < 5", "3 > 5"), ("a b", "ab"), ("1 + 2", "1 2")])
def test_what_says_something_stays(text, other):
    """Catches symbols and word borders that are taken for punctuation."""
    assert repeats.normalised(text) != repeats.normalised(other)


def test_overlap_tells_exact_from_nearly():
    """Catches an exact match counted twice, a prompt counted once a row, and ids of the wrong
    file."""
    train = [pair("t1", "What is 2+2?", "x", "y"), pair("t2", user("Hello"), "x", "y")]
    test = [
        {"id": "e1", "prompt": "Hello"},
        {"id": "e2", "prompt": "what is  2+2"},
        {"id": "e3", "prompt": "Hello"},
        {"id": "e4", "prompt": "new"},
    ]
    assert repeats.overlap(train, test) == {
        "prompts": 3,
        "exact": 1,
        "normalised": 2,
        "exact_ids": [("e1", "t2")],
        "more_ids": [("e2", "t1")],
    }


def test_prompts_of_punctuation_alone_match_only_exactly():
    """Catches "???" found in "!", as both normalise to nothing."""
    train = [{"id": "t", "prompt": "!"}, {"id": "u", "prompt": "??"}]
    found = repeats.overlap(train, [{"id": "e", "prompt": "???"}, {"id": "f", "prompt": "!"}])
    assert (found["exact"], found["normalised"]) == (1, 1)
