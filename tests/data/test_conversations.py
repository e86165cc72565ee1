"""Conversations: what a file may hold, which tokens are learnt, what is held out."""

import dataclasses
import json

import numpy as np
import pytest

from jaxreward import testing
from jaxreward.data import conversations, sources, tokenize
from jaxreward.data.corpora import chosen

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One byte a token, ChatML."""
    return tokenize.load_tokenizer(testing.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def file(tmp_path):
    """Writes rows into a file."""

    def write(*rows):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def learnt(tokenizer, tree):
    """The text of the supervised tokens."""
    tokens = np.concatenate(tree.answers)[np.concatenate(tree.loss)]
    return tokenizer.decode(tokens, skip_special=False)


def test_both_forms_become_records(file):
    """Catches a prompt that ends too late, and a last user turn that is kept."""
    path = file(
        {"messages": CHAT, "source": "x"},
        {"id": "b", "prompt": "hi", "completion": "hello"},
        {"prompt": CHAT[:2], "completion": CHAT[2:5]},
    )
    records, report = conversations.read(path)
    assert records == [
        {"id": "1", "prompt": CHAT[:2], "completion": CHAT[2:5]},
        {"id": "b", "prompt": "hi", "completion": "hello"},
        {"id": "3", "prompt": CHAT[:2], "completion": CHAT[2:5]},
    ]
    assert report == {"read": 3, "kept": 3, "skipped": {}}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "x"}, " a row needs messages, or prompt and completion, or text; .* prompt"),
        ({"prompt": "x", "text": "y"}, " a row needs .*; received prompt, text"),
        ({"text": ""}, "text: must be str and not empty; received str ''"),
        ({"text": CHAT}, "text: must be str and not empty; received list"),
        ({"text": 3}, "text: must be str or a list.*int 3"),
        ({"text": "a\0b"}, "text: holds a NUL character"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, " .*data.corpus=chosen.completions"),
        ({"prompt": "x", "completion": "y", "label": False}, "label: is false: an answer not to"),
        (
            {"messages": [*CHAT[:2], {**CHAT[2], "tool_calls": [{}]}]},
            r"messages\[2\]\.tool_calls: is",
        ),
        ({"messages": [*CHAT[:2], {**CHAT[2], "content": [{}]}]}, r"messages\[2\]: .* str content"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "tools: is not read, only text is"),
        ({"prompt": "x", "completion": "y", "messages": CHAT}, ".*received completion, messages"),
        ({"messages": CHAT[:2]}, "messages: .* of the assistant; received the roles system, user"),
        ({"messages": CHAT[2:]}, "messages: .*something to answer .* received the roles assistant"),
        ({"messages": "hi"}, "messages: must be a list of messages; received str 'hi'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: message must have a str content"),
        ({"prompt": "x", "completion": CHAT[3:5]}, "completion: must begin and end .* user and as"),
        ({"prompt": 3, "completion": "y"}, "prompt: must be str or a list of messages.*int 3"),
        ({"prompt": "x", "completion": "y", "id": 1.5}, "id: must be str or int; .*1.5"),
    ],
)
def test_a_bad_row_is_named(file, row, text):
    """Catches rows that are taken for something they are not, and errors without line and field."""
    path = file({"prompt": "a", "completion": "b"}, row)
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2:{text}"):
        conversations.read(path)
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 lines"):
        records, report = conversations.read(path, on_bad="skip")
    assert len(records) == 1 and sum(report["skipped"].values()) == 1


def test_nothing_left_is_an_error(file):
    """Catches an empty training set, and an unknown word for what to do."""
    with pytest.raises(ValueError, match="no usable conversation in 1 lines"):
        conversations.read(file({"texts": "x"}), on_bad="skip")
    with pytest.raises(ValueError, match="on_bad must be"):
        conversations.read("x", on_bad="ignore")


def test_the_assistant_alone_is_learnt(tokenizer, file):
    """Catches user text, role headers or line ends among the supervised tokens, and a turn whose
    end token is not learnt."""
    records, _ = conversations.read(file({"messages": CHAT}))
    (tree,), report = conversations.encode(tokenizer, records)
    assert learnt(tokenizer, tree) == "2<|im_end|>four<|im_end|>"
    assert report["tokens"] == 7 and report["trees"] == 1
    whole = tokenizer.decode(np.concatenate([tree.prompt, *tree.answers]), skip_special=False)
    assert whole == tokenizer.hf.apply_chat_template(CHAT[:5], tokenize=False)


def test_plain_text_learns_turn_by_turn(tokenizer, file):
    """Catches the user's words in the middle of a plain dialogue among the supervised tokens."""
    records, _ = conversations.read(file({"messages": CHAT[1:]}))
    trees, report = conversations.encode(tokenizer, records, template="plain")
    assert [learnt(tokenizer, tree).strip() for tree in trees] == ["2<|im_end|>", "four<|im_end|>"]
    assert report["trees"] == 2
    assert b"2+2?" in tokenizer.decode(trees[1].prompt).encode()


def test_plain_text_is_learnt_whole(tokenizer, file):
    """Catches a chat template around a text that is no dialogue, and a text learnt in part."""
    rows = [{"text": "Once"}, {"text": "upon", "messages": CHAT}, {"prompt": "", "completion": "a"}]
    records, report = conversations.read(file(*rows))
    assert records[0] == {"id": "1", "prompt": "", "completion": "Once"}
    assert records[1]["prompt"] == CHAT[:2] and report["kept"] == 3
    for template in ("auto", "chat", "plain"):
        trees, _ = conversations.encode(tokenizer, records[::2], template=template)
        assert [learnt(tokenizer, tree) for tree in trees] == ["Once<|im_end|>", "a<|im_end|>"]
        assert [tree.size for tree in trees] == [5, 2]


def test_plain_text_has_the_beginning_that_the_tokenizer_adds(tokenizer, file):
    """Catches a text without BOS, whose first token nothing predicts, and a BOS that is learnt."""
    adds = dataclasses.replace(tokenizer, adds_bos=True)
    records, _ = conversations.read(file({"text": "Once"}))
    (tree,), _ = conversations.encode(adds, records)
    assert tree.prompt.tolist() == [tokenizer.bos_id]
    assert learnt(tokenizer, tree) == "Once<|im_end|>"


def test_texts_are_held_out_one_by_one(file):
    """Catches plain texts that fall on one side together, as they share the empty prompt."""
    records, _ = conversations.read(file(*({"text": f"text {i % 40}"} for i in range(80))))
    train, held = sources.by_prompt(records, 0.3, 1)
    assert 4 <= len(held) <= 48
    assert not {r["completion"] for r in train} & {r["completion"] for r in held}


def test_what_was_chosen_can_be_learnt(file):
    """Catches the rejected answer, or the prompt twice, among what is learnt of pairs."""
    path = file(
        {"id": "x", "prompt": "q", "chosen": "a", "rejected": "b", "margin": 1},
        {"chosen": CHAT[:3], "rejected": [*CHAT[:2], {"role": "assistant", "content": "3"}]},
        {"prompt": CHAT[1]["content"], "chosen": CHAT[:3]},
        {"prompt": "q", "rejected": "b"},
    )
    with pytest.raises(ValueError, match=r"chats\.jsonl:4:chosen: missing"):
        conversations.read(path, corpus=chosen.completions)
    with pytest.warns(UserWarning, match="skipped 1 of 4 rows of the corpus"):
        records, _ = conversations.read(path, corpus=chosen.completions, on_bad="skip")
    assert records == [
        {"id": "x", "prompt": "q", "completion": "a"},
        {"id": "2", "prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"id": "3", "prompt": CHAT[:2], "completion": CHAT[2:3]},
    ]


def test_too_long(tokenizer, file):
    """Catches a completion that is cut, and rows that vanish without a count."""
    records, _ = conversations.read(
        file({"prompt": "p" * 50, "completion": "yes"}, {"prompt": "p", "completion": "y" * 90})
    )
    with pytest.raises(tokenize.AnswerTooLong, match="conversation '2': the answer takes"):
        conversations.encode(tokenizer, records, max_len=40)
    with pytest.warns(UserWarning, match=r"1 of 1 prompts lost .* 1 conversations were skipped"):
        (tree,), report = conversations.encode(tokenizer, records, max_len=40, on_long="skip")
    assert learnt(tokenizer, tree) == "yes<|im_end|>" and tree.size == 40
    assert (report["skipped"], report["truncated"]) == (1, 1)
    with pytest.raises(ValueError, match=r"no conversation is left of 1.*raise data\.max_len"):
        conversations.encode(tokenizer, records[1:], max_len=40, on_long="skip")
