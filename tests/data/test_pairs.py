"""Pairs about one prompt go into one tree; nothing is lost, doubled or dropped unsaid."""

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward import testing
from jaxreward.data import pairs, tokenize


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenize.load_tokenizer(testing.write_tokenizer(tmp_path_factory.mktemp("bytes")))


def record(name, prompt, chosen, rejected, **more):
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_group_by_hand():
    """Catches answers that are not shared, indices of another group, and lost margins."""
    records = [
        record("a", "P", "x", "y", margin=2.0),
        record("b", "Q", "y", "x", weight=0.5),
        record("c", "P", "z", "x"),
        record("d", "P", "z", "y", margin=1.0, weight=3.0),
    ]
    first, second = pairs.group(records)
    assert first == {
        "id": "a",
        "prompt": "P",
        "subset": None,
        "answers": ["x", "y", "z"],
        "pairs": [(0, 1), (2, 0), (2, 1)],
        "margin": [2.0, 0.0, 1.0],
        "weight": [1.0, 1.0, 3.0],
        "records": [0, 2, 3],
    }
    assert (second["answers"], second["pairs"]) == (["y", "x"], [(0, 1)])
    assert (second["weight"], second["records"]) == ([0.5], [1])


def test_group_parts_subsets_and_kinds_of_prompt():
    """Catches a subset counted under another's name, and a str taken for a message."""
    message = [{"role": "user", "content": "P"}]
    swapped = [{"content": "P", "role": "user"}]
    records = [
        record("a", "P", "x", "y"),
        record("b", "P", "x", "z", subset="s"),
        record("c", message, "x", "y"),
        record("d", swapped, "y", "x"),  # the same message; the order of its keys says nothing
    ]
    assert [group["records"] for group in pairs.group(records)] == [[0], [1], [2, 3]]
    assert [group["subset"] for group in pairs.group(records)] == [None, "s", None]


def test_group_splits_at_most():
    """Catches a group of one answer too many, and a pair whose answers end up in two groups."""
    records = [
        record("a", "P", "1", "2"),
        record("b", "P", "3", "1"),
        record("c", "P", "4", "2"),  # a fourth answer: opens a second group
        record("d", "P", "2", "5"),
        record("e", "P", "1", "2"),  # 1 is not in the second group, which is full
    ]
    groups = pairs.group(records, most=3)
    assert [group["answers"] for group in groups] == [["1", "2", "3"], ["4", "2", "5"], ["1", "2"]]
    assert [group["pairs"] for group in groups] == [[(0, 1), (2, 0)], [(0, 1), (1, 2)], [(0, 1)]]
    assert [group["id"] for group in groups] == ["a", "c", "e"]
    assert len(pairs.group(records, most=5)) == 1
    with pytest.raises(ValueError, match="room for 2 answers; received most=1"):
        pairs.group(records, most=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("PQ"), st.integers(0, 6), st.integers(0, 6)), max_size=30),
    st.integers(2, 5),
)
def test_every_pair_is_in_one_group(drawn, most):
    """Catches any pair that is lost, doubled or changed on the way into its group."""
    records = [record(i, p, f"a{x}", f"a{y}", margin=float(i)) for i, (p, x, y) in enumerate(drawn)]
    groups = pairs.group(records, most=most)
    seen = []
    for group in groups:
        assert len(group["answers"]) == len(set(group["answers"])) <= most
        assert len({len(group[key]) for key in ("pairs", "margin", "weight", "records")}) == 1
        assert group["records"] == sorted(group["records"])
        for (chosen, rejected), margin, number in zip(
            group["pairs"], group["margin"], group["records"]
        ):
            assert records[number]["prompt"] == group["prompt"]
            assert records[number]["chosen"] == group["answers"][chosen]
            assert records[number]["rejected"] == group["answers"][rejected]
            assert margin == number
            seen.append(number)
    assert sorted(seen) == list(range(len(records)))
    assert [group["records"][0] for group in groups] == sorted(g["records"][0] for g in groups)


def test_encode_pairs_shares_the_prompt(tokenizer):
    """Catches trees whose pairs, margins or ids are of another tree."""
    records = [
        record("a", "What?", "yes", "no", margin=2.0),
        record("b", "Who?", "you", "me", weight=0.5, subset="s"),
        record("c", "What?", "maybe", "yes"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trees, report = pairs.encode_pairs(tokenizer, records)
    assert report == {"pairs": 3, "trees": 2, "truncated": 0, "dropped_tokens": 0, "skipped": 0}
    assert [tree.id for tree in trees] == ["a", "b"]
    assert (trees[0].pairs, trees[0].margin, trees[0].weight) == (
        [(0, 1), (2, 0)],
        [2.0, 0.0],
        [1.0, 1.0],
    )
    assert (trees[1].subset, trees[1].weight, trees[1].pairs) == ("s", [0.5], [(0, 1)])
    for tree, prompt, answers in zip(trees, ("What?", "Who?"), (["yes", "no", "maybe"], None)):
        for answer, tokens in zip(answers or ["you", "me"], tree.answers, strict=True):
            alone = tokenize.encode_conversation(tokenizer, prompt, answer)
            assert [*tree.prompt, *tokens] == alone.tokens
    assert len(trees[0].prompt) == tokenize.encode_conversation(tokenizer, "What?").prompt_len
    split, report = pairs.encode_pairs(tokenizer, records, most=2)
    assert report["trees"] == 3 and [tree.id for tree in split] == ["a", "b", "c"]


# A byte is a token. "plain" adds one EOS and no BOS: prompt "q" and 4 bytes of answer are 6 tokens.
LONG = [
    record("a", "q", "good", "bad"),
    record("b", "q", "z" * 40, "bad"),
    record("c", "q", "best", "good", margin=1.5),
    record("d", "w" * 12, "up", "no"),
]


def test_a_long_answer_leaves_its_siblings_alone(tokenizer):
    """Catches pairs lost only because they share a prompt with a pair that is too long."""
    with pytest.warns(UserWarning, match=r"max_len 8: 1 of 3 prompts lost .* 1 pairs were skipped"):
        trees, report = pairs.encode_pairs(
            tokenizer, LONG, template="plain", max_len=8, on_long="skip"
        )
    assert [tree.id for tree in trees] == ["a", "c", "d"]
    assert [tree.margin for tree in trees] == [[0.0], [1.5], [0.0]]
    # "d" is 12 + 2 + 1 tokens for each of its two answers: 7 too many, twice.
    assert report == {"pairs": 3, "trees": 3, "truncated": 1, "dropped_tokens": 14, "skipped": 1}


def test_the_pair_with_the_long_answer_is_named(tokenizer):
    """Catches an error that names the first pair of the prompt instead of the one at fault."""
    with pytest.raises(tokenize.AnswerTooLong, match=r"pair 'b': .*41 tokens.* max_len 8"):
        pairs.encode_pairs(tokenizer, LONG, template="plain", max_len=8)


def test_other_errors_name_their_pair(tmp_path):
    """Catches a template's refusal without a record, or with a sibling's."""
    folder = testing.write_tokenizer(tmp_path)
    refuses = "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no') }}"
    refuses += "{% endif %}{{ m['content'] }}{% endfor %}"
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    settings_["chat_template"] = refuses
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer = tokenize.load_tokenizer(folder)
    records = [record("a", "q", "x", "y"), record("b", "q", "x", "bad")]
    for on_long in ("error", "skip"):  # only long answers may be skipped
        with pytest.raises(ValueError, match=r"pair 'b': .*no") as caught:
            pairs.encode_pairs(tokenizer, records, on_long=on_long)
        assert not isinstance(caught.value, tokenize.AnswerTooLong)


def test_nothing_left_is_an_error(tokenizer):
    """Catches a run on no data, and a misspelt on_long taken for "skip"."""
    with pytest.raises(ValueError, match=r"no pair is left of 1: 1 were longer than max_len 8"):
        pairs.encode_pairs(tokenizer, LONG[1:2], template="plain", max_len=8, on_long="skip")
    with pytest.raises(ValueError, match='must be "error" or "skip"; received \'drop\''):
        pairs.encode_pairs(tokenizer, LONG, on_long="drop")


def test_scores_stay_with_their_pairs(tokenizer):
    """Catches scores that are lost or change pairs where prompts are shared."""
    records = [
        record("a", "P", "x", "y", scores=(3.0, 1.0)),
        record("b", "Q", "x", "y"),
        record("c", "P", "z", "x", scores=(9.0, 3.0)),
        record("d", "P", "z", "y"),
    ]
    (first, second), _ = pairs.encode_pairs(tokenizer, records)
    assert first.scores == [(3.0, 1.0), (9.0, 3.0), None] and second.scores == []
