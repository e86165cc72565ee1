"""Stop strings over tokens find what a search in the decoded text finds, at the same token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward.data import stop, tokenize

TEXT = "a stop, abab aab: stop\n\nstopped ab  aé日本 <end> " * 3


def loaded(folder, made):
    made.save(str(folder / "tokenizer.json"))
    return tokenize.load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Bytes and merges, with a special token, and an added one that holds a space."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens([tokenizers.AddedToken("a stop"), tokenizers.AddedToken("<é>")])
    return loaded(tmp_path_factory.mktemp("byte_level"), made)


PIECES = ["<unk>", "<s>", "▁", "a", "b", "ab", "▁ab", "▁▁a", "é", "▁stop", "st", "op", ":", "\n"]


@pytest.fixture(scope="module", params=["llama", "gemma", "metaspace"])
def pieces(request, tmp_path_factory):
    """Pieces with a mark for the space, and a token for every byte, decoded in three ways."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {t: i for i, t in enumerate(PIECES + [f"<0x{b:02X}>" for b in range(256)])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if request.param == "llama":
        chain.append(decoders.Strip(" ", 1, 0))
    if request.param == "metaspace":
        chain = [decoders.ByteFallback(), decoders.Metaspace()]
    made.decoder = decoders.Sequence(chain)
    made.add_special_tokens(["<unk>", "<s>"])
    return loaded(tmp_path_factory.mktemp(request.param), made)


def found(table, ids):
    """(number of tokens up to the end of a string, that string's number), or None."""
    state = 0
    for n, token in enumerate(ids, start=1):
        state = int(table[state, token])
        if state >= len(table):
            return n, state - len(table)
    return None


def searched(tokenizer, strings, ids):
    """The same by looking into the decoded text, token by token."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        ends = [(text.find(s) + len(s), j) for j, s in enumerate(strings) if s in text]
        if ends:
            # Ends are compared in bytes, as the last of the text may be part of a character.
            return n, min((len(text[:end].encode()), j) for end, j in ends)[1]
    return None


def agree(tokenizer, strings, ids):
    got = found(stop.matcher(tokenizer, strings), ids)
    assert got == searched(tokenizer, strings, ids), (strings, ids, tokenizer.decode(ids))


TEXTS = st.lists(st.sampled_from(["a", "b", "ab", " ", "stop", "é", "日", ":", "\n", "<end>"]))
STRINGS = st.lists(TEXTS.map(lambda parts: "".join(parts[:3])).filter(bool), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_byte_level_equals_a_search_of_the_text(byte_level, data):
    """Catches strings that begin or end inside tokens, failure links that skip an overlap, and
    special tokens that end a match. Texts are cut into other tokens than the tokenizer's own."""
    strings = data.draw(STRINGS)
    ids = []
    for part in data.draw(st.lists(st.one_of(TEXTS, st.just(["<|end|>"])), max_size=4)):
        if part == ["<|end|>"]:
            ids.append(0)
        elif data.draw(st.booleans()):
            ids += byte_level.ids("".join(part))
        else:
            ids += [i for piece in part for i in byte_level.ids(piece)]
    agree(byte_level, strings, ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_equal_a_search_of_the_text(pieces, data):
    """Catches the space that decoding drops in front, marks read as characters, and characters
    spelt by their bytes."""
    strings = data.draw(
        st.lists(
            st.sampled_from(["ab", " ab", "a", " ", "éa", "日", "stop", "b s", "\n"]), min_size=1
        )
    )
    ids = []
    for token in data.draw(
        st.lists(st.sampled_from([*range(len(PIECES)), "日", "é"]), max_size=10)
    ):
        spelt = isinstance(token, str)
        ids += [len(PIECES) + b for b in token.encode()] if spelt else [token]
    agree(pieces, strings, ids)


def test_by_hand(byte_level):
    """Catches an order of precedence that depends on the automaton: the first to end wins, then
    the first listed; and a state that is lost after part of a string."""
    ids = [byte_level.ids(c)[0] for c in "abcabd"]
    assert found(stop.matcher(byte_level, ["abd"]), ids) == (6, 0)
    assert found(stop.matcher(byte_level, ["bca", "abc", "c"]), ids) == (3, 1)
    assert found(stop.matcher(byte_level, ["bca", "c", "abc"]), ids) == (3, 1)
    assert found(stop.matcher(byte_level, ["abca", "ca", "a"]), ids) == (1, 2)
    assert found(stop.matcher(byte_level, ["x", "abcabda"]), ids) is None
    # Both end inside one token: the one that ends first in the text.
    added = byte_level.backend.token_to_id("a stop")
    assert found(stop.matcher(byte_level, ["top", "sto"]), [added]) == (1, 1)


def test_ids_beyond_the_tokenizer_are_silent(byte_level):
    """Catches a table that is narrower than the model's logits, or made of too wide a type."""
    table = stop.matcher(byte_level, ["ab"], vocab=400)
    assert table.shape == (2, 400) and table.dtype == np.uint8
    beyond = table[:, byte_level.vocab_size :]
    np.testing.assert_array_equal(beyond, np.full_like(beyond, 1) * [[0], [1]])
    a, b = (byte_level.ids(c)[0] for c in "ab")
    assert found(table, [a, 399, 0, b]) == (4, 0)
    assert stop.matcher(byte_level, ["x" * 300]).dtype == np.uint16


def test_what_is_refused(byte_level, tiny_folder, tmp_path):
    """Catches a match that silently never comes: no strings, or a decoder that joins tokens in
    ways that are not known."""
    for strings in ([], [""], ["a", ""], "ab", [3]):
        with pytest.raises(ValueError, match="stop strings must be a list of texts, none empty"):
            stop.matcher(byte_level, strings)
    with pytest.raises(ValueError, match=r"vocab=9 is less than the \d+ ids of the tokenizer"):
        stop.matcher(byte_level, ["a"], vocab=9)
    raw = json.loads(byte_level.backend.to_str())
    for decoder, said in (
        (None, "is missing"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, r"is \['WordPiece'\]"),
    ):
        raw["decoder"] = decoder
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=f"decodes token by token .* {said}. Stop at token"):
            stop.matcher(tokenize.load_tokenizer(tmp_path), ["a"])
