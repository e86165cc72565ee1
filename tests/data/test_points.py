"""Labelled answers: what is read, what a head makes of the numbers, and how they reach the rows."""

import json
import math

import numpy as np
import pytest

from jaxreward.data import pipeline, points, tokenize


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return tokenize.load_tokenizer(tiny_folder)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read(tmp_path):
    """Catches labels of another type changed on the way, and fields that are lost."""
    path = written(
        tmp_path / "a.jsonl",
        {"prompt": "P", "completion": "x", "label": True, "weight": 2, "subset": "s", "more": [1]},
        {"id": 7, "prompt": "P", "answer": "y", "scores": {"a": 1, "b": None}},
        {"prompt": "Q", "response": [{"role": "assistant", "content": "z"}], "label": "safe"},
    )
    records, report = points.read(path)
    assert records[0] == {
        "id": "1",
        "prompt": "P",
        "answer": "x",
        "label": True,
        "weight": 2.0,
        "subset": "s",
        "extra": {"more": [1]},
    }
    assert records[1] == {"id": "7", "prompt": "P", "answer": "y", "scores": {"a": 1.0, "b": None}}
    assert records[2]["label"] == "safe" and records[2]["answer"][0]["content"] == "z"
    assert report["kept"] == 3


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"label": True}, r":1:answer: needs exactly one of answer, completion, response"),
        ({"answer": "x"}, r":1:label: needs exactly one of label and scores"),
        ({"answer": "x", "label": 1, "scores": {"a": 1}}, r"received label, scores"),
        ({"answer": "x", "label": [1]}, r":1:label: must be a number; received list"),
        ({"answer": "x", "scores": 3}, r":1:scores: must be numbers by name; received int 3"),
        ({"answer": "x", "scores": {"a": "1"}}, r":1:scores\.a: must be a number"),
        ({"answer": "x", "label": 1, "weight": -1}, r":1:weight: must be >= 0"),
        ({"answer": "x", "label": 1, "subset": 3}, r":1:subset: must be str; received int 3"),
        ({"chosen": "x", "rejected": "y", "label": 1}, r":1:chosen: is a pair"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, text):
    """Catches a row that is guessed at, or an error without its place."""
    with pytest.raises(ValueError, match=text):
        points.read(written(tmp_path / "a.jsonl", {"prompt": "P", **row}))


def test_what_the_numbers_mean():
    """Catches a bool as a class of three, an index out of range, and a missing score as 0."""
    of = lambda kind, outputs=("u", "s"), **record: points.target(record, kind, outputs).tolist()
    assert of("scalar", ("score",), label=True) == [1.0] and of("scalar", label=-2.5) == [-2.5]
    assert of("classes", label="s") == of("classes", label=1) == of("classes", label=True) == [1.0]
    (known, missing) = of("scores", scores={"u": 3, "x": 1})
    assert known == 3 and math.isnan(missing)
    for wrong, text in (
        (dict(kind="classes", label="t"), "one of u, s, or an index from 0 to 1 or a bool"),
        (dict(kind="classes", outputs=("a", "b", "c"), label=True), "received True"),
        (dict(kind="classes", label=2), "received 2"),
        (dict(kind="classes", label=0.5), "received 0.5"),
        (dict(kind="scalar", label="good"), "takes a number or bool"),
        (dict(kind="scalar", scores={"u": 1}), "takes a label; the row has scores"),
        (dict(kind="scores", scores={"x": 1}), r"received scores of x"),
        (dict(kind="scores", label=1), "received no scores"),
    ):
        with pytest.raises(ValueError, match=text):
            of(**wrong)


RECORDS = [
    {"id": "a", "prompt": "P", "answer": "one", "scores": {"u": 1.0}, "weight": 2.0},
    {"id": "b", "prompt": "Q", "answer": "two", "scores": {"u": 2.0, "s": 3.0}},
    {"id": "c", "prompt": "P", "answer": "three", "scores": {"s": 4.0}},
]


def test_answers_to_one_prompt_share_it_and_keep_their_numbers(tokenizer):
    """Catches targets that go to another answer, in the trees or in the packed row."""
    trees, report = points.encode(tokenizer, RECORDS, kind="scores", outputs=("u", "s"))
    assert [t.id for t in trees] == ["a", "b"] and report["answers"] == 3
    assert trees[0].answer_weight == [2.0, 1.0]
    np.testing.assert_array_equal(trees[0].targets, [[1.0, np.nan], [np.nan, 4.0]])
    (plan,) = pipeline.pack(trees, row_len=128)
    row = pipeline.materialise(trees, plan, row_len=128, answers_per_row=4, pairs_per_row=1)
    for k, (i, j) in enumerate(row["index"]):
        if i < 0:
            assert np.isnan(row["targets"][k]).all() and row["answer_weight"][k] == 0
            continue
        np.testing.assert_array_equal(row["targets"][k], trees[i].targets[j])
        assert row["answer_weight"][k] == trees[i].answer_weight[j]
        text = tokenizer.decode(row["tokens"][: row["ends"][k] + 1])
        assert {0: ["one", "three"], 1: ["two"]}[i][j] in text
    assert (row["weight"] == 0).all() and sorted(row["answer_weight"]) == [0.0, 1.0, 1.0, 2.0]


def test_at_most_so_many_answers_a_tree(tokenizer):
    """Catches a prompt with very many answers that makes one endless tree."""
    trees, _ = points.encode(
        tokenizer,
        [RECORDS[0] | {"id": str(i)} for i in range(5)],
        kind="scores",
        outputs=("u",),
        most=2,
    )
    assert [len(tree.answers) for tree in trees] == [2, 2, 1]


def test_only_the_answer_at_fault_goes(tokenizer):
    """Catches a long answer that takes its neighbours along, and one that is named wrongly."""
    records = [
        {"id": "a", "prompt": "P", "answer": "ok", "label": 1.0},
        {"id": "b", "prompt": "P", "answer": "x" * 80, "label": 0.0},
    ]
    with pytest.raises(ValueError, match=r"answer 'b': the answer takes 8\d tokens"):
        points.encode(tokenizer, records, max_len=40)
    with pytest.warns(UserWarning, match="1 answers were skipped as too long"):
        trees, report = points.encode(tokenizer, records, max_len=40, on_long="skip")
    assert [t.id for t in trees] == ["a"] and report["skipped"] == 1
    with pytest.raises(ValueError, match="no answer is left of 1: 1 were longer"):
        points.encode(tokenizer, records[1:], max_len=40, on_long="skip")
    with pytest.raises(ValueError, match=r"answer 'b': label must be one of"):
        points.encode(
            tokenizer, [records[0], records[1] | {"label": 5}], kind="classes", outputs=("n", "y")
        )
