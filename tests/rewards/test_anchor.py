"""Anchors, tails and the rewards on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward import testing
from jaxreward.data import tokenize
from jaxreward.rewards import anchor, math_answer

DERIVED = (
    "First we add the two numbers, so 2 + 3 = 5.\n\nThe answer is 5, which is all we need.\n\n"
)
CHECKED = "Wait, let me check that again. Indeed 2 + 3 = 5, so the answer is 5 as before.\n\n"
CHANGED = "Hmm, on second thoughts it is more. So I think the answer is 7 after all, really.\n\n"
OUT = "</think>It is \\boxed{5}."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer, which cuts every character beyond ASCII into several tokens."""
    return tokenize.load_tokenizer(testing.write_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A byte-level BPE with merges, whose tokens begin or end inside characters."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["héé wörld 🙂🙃 x.\n\ny 中文 the answer is 5.\n\n"] * 20, trainer)
    return bpe


def byte_spans(text):
    """The truth for one token a byte: every byte belongs to its character."""
    return [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]


def cut(text, **kw):
    return anchor.segment(text, byte_spans(text), **kw)


def grade(text, record=None, **kw):
    record = {"answer": "5", "offsets": byte_spans(text), **(record or {})}
    return anchor.apr("What is 2 + 3?", text, record, **{"grace": 0, **kw})


# --- token spans


def test_spans_of_characters_split_over_tokens(tokenizer):
    """A mask that is shifted by a token: é is two bytes, 🙂 four, and each byte a token."""
    text = "aé🙂.\n\n中b"
    spans = anchor.token_spans(tokenizer.ids(text), tokenizer.decode)
    assert spans == byte_spans(text)
    assert spans[:7] == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3)]


def test_spans_of_tokens_that_straddle_characters(merging):
    """A token that ends inside a character and one that begins there both cover it."""
    byte = {char: i for char, i in merging.get_vocab().items() if len(char) == 1}
    table = dict(zip("aÃ©b", ("a", "Ã", "©", "b")))
    joined = {"a+half": "aÃ", "half+b": "©b"}
    texts = {byte[table["a"]]: b"a", byte["Ã"]: b"\xc3", byte["©"]: b"\xa9", byte["b"]: b"b"}
    texts |= {1000: joined["a+half"].replace("Ã", "").encode() + b"\xc3", 1001: b"\xa9b"}
    decode = lambda ids: b"".join(texts[i] for i in ids).decode("utf-8", errors="replace")
    assert decode([1000, 1001]) == "aéb"
    assert anchor.token_spans([1000, 1001], decode) == [(0, 2), (1, 3)]
    assert anchor.token_spans([1000, byte["©"], byte["b"]], decode) == [(0, 2), (1, 2), (2, 3)]


def test_spans_of_bytes_that_are_no_text():
    """Random policies sample broken UTF-8; spans must still rise and cover the text."""
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")
    ids = [0x61, 0xFF, 0x80, 0x62, 0xE2, 0x82, 0x63, 0xC3]
    spans = anchor.token_spans(ids, decode)
    assert decode(ids) == "a\ufffd\ufffdb\ufffdc\ufffd"
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 5), (5, 6), (6, 7)]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aé🙂 \n.中ö5xh", max_size=40))
def test_spans_against_the_bytes(merging, text):
    """Against an independent count: the bytes of each token, laid over the bytes of the text."""
    encoding = merging.encode(text)
    of_byte = byte_spans(text)
    alphabet = {char: i for i, char in enumerate(sorted(_bytes_of_alphabet()))}
    at, expected = 0, []
    for token in encoding.tokens:
        size = sum(char in alphabet for char in token)
        expected.append((of_byte[at][0], of_byte[at + size - 1][1]))
        at += size
    decode = lambda ids: merging.decode(ids, skip_special_tokens=False)
    assert anchor.token_spans(encoding.ids, decode) == expected


def _bytes_of_alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def test_spans_of_a_tokenizer_that_is_not_byte_level():
    """Decoders that trim per call give spans that do not fit; that must be an error."""
    words = {0: " the", 1: " cat"}
    decode = lambda ids: "".join(words[i] for i in ids).strip()
    with pytest.raises(ValueError, match=r"byte-level tokenizer.*'the cat'.*'thecat'"):
        anchor.token_spans([0, 1], decode)


# --- segmentation


def test_segment_at_blank_lines():
    """Chunks end with their white space, in tokens of the answer, "<think>" included."""
    text = "<think>\n" + DERIVED + CHECKED + OUT
    parts = cut(text, min_tokens=20)
    lengths = [len(chunk) for chunk in parts.chunks]
    assert parts.ends == list(len("<think>") + np.cumsum(lengths))
    assert parts.think_end == parts.ends[-1] == text.index("</think>")
    assert [chunk[:9] for chunk in parts.chunks] == [
        "\nFirst we",
        "The answe",
        "Wait, let",
        "Indeed 2 ",
    ]
    assert parts.chunks[0].endswith("= 5.\n\n") and parts.chunks[1].endswith("need.\n\n")


def test_short_chunks_join_the_next():
    """Chunks below min_tokens would make anchors of single words; and a short rest is no chunk."""
    text = "So.\n\nOk.\n\nthe sum is written down here.\n\nFine." + OUT
    assert cut(text, min_tokens=16).chunks == [text[: text.index("</think>")]]
    assert len(cut(text, min_tokens=1).chunks) == 4
    assert len(cut("12345678\n\n12345678" + OUT, min_tokens=10).chunks) == 1
    assert len(cut("12345678\n\n1234567890" + OUT, min_tokens=10).chunks) == 2
    assert cut(text, min_tokens=10**6).ends == [text.index("</think>")]


def test_short_paragraphs_do_not_hide_a_tail():
    """Many short paragraphs must not grow one chunk without end, or the tail in it were free."""
    text = DERIVED + "Wait.\n\nYes, 5.\n\n" * 40 + OUT
    parts = cut(text, min_tokens=16)
    assert max(len(chunk) for chunk in parts.chunks) < 60


def test_sentences_outside_mathematics():
    """A full stop inside mathematics, a decimal, a list's number or "e.g." ends no sentence."""
    inside = "Let us put $a = 1. b = 2$ and \\(c. d\\) and 3.5 e.g. this one here. "
    text = inside + "Then comes another sentence of some length. 1. Now this is the third.\n" + OUT
    parts = cut(text, min_tokens=16)
    assert parts.chunks[0] == inside
    assert [chunk[:4] for chunk in parts.chunks] == ["Let ", "Then", "1. N"]
    assert cut("1. one is here\n2. two is here too" + OUT, min_tokens=8).chunks == [
        "1. one is here\n2. two is here too"
    ]
    blank = "\\[ a = 1\n\n + 2 \\] is what we have"
    assert cut(blank + OUT, min_tokens=4).chunks == [blank]
    assert cut("unclosed \\[ a = 1\n\n + 2 is what" + OUT, min_tokens=4).ends == [20, 31]


def test_a_token_over_a_cut():
    """A token with the last character of a chunk belongs to it, one with only white space too."""
    text = "it is = 5.\n\nWait, no" + "</think>5"
    spans = [(0, 2), (2, 9), (9, 12), (12, 16), (16, 20), (20, 28), (28, 29)]
    assert anchor.segment(text, spans, min_tokens=1).ends == [3, 5]
    spans = [(0, 2), (2, 9), (9, 10), (10, 12), (12, 16), (16, 20), (20, 28), (28, 29)]
    assert anchor.segment(text, spans, min_tokens=1).ends == [4, 6]
    # A token over the cut belongs to the chunk whose last character it holds.
    spans = [(0, 2), (2, 12), (12, 16), (16, 21), (21, 27), (27, 28)]
    parts = anchor.segment(
        "it is = 5. Wait, no!</think>", [*spans[:3], (16, 20), (20, 28)], min_tokens=1
    )
    assert parts.ends == [2, 4]
    # " Wait" with the space in front begins the next chunk; "no</" is no part of the tail.
    text = "it is = 5. Wait, no</think>5"
    spans = [(0, 2), (2, 10), (10, 15), (15, 16), (16, 21), (21, 27), (27, 28)]
    parts = anchor.segment(text, spans, min_tokens=1)
    assert parts.chunks == ["it is = 5. ", "Wait, no"]
    assert (parts.ends, parts.think_end) == ([2, 4], 4)


@pytest.mark.parametrize(
    "text",
    ["no tags at all", "<think>cut off", "a</think>b</think>c", "a<think>b</think>c", "", "</thin"],
)
def test_no_chunks_without_one_closing_tag(text):
    """A truncated or malformed trace must never be judged."""
    assert cut(text) == anchor.Segments([], [], None)


def test_empty_thinking():
    """Nothing before "</think>" is no chunk, and no division by zero."""
    assert cut("</think>5") == anchor.Segments([], [], 0)
    assert cut("<think></think>5") == anchor.Segments([], [], 7)
    assert grade("</think>5")["rho"] == 0.0


def test_offsets_of_another_text():
    """Offsets of another text would shift the tail silently."""
    with pytest.raises(ValueError, match="reach the end of the answer; received 2 that end at"):
        anchor.segment("abc</think>d", [(0, 1), (1, 2)])
    with pytest.raises(ValueError, match="must rise"):
        anchor.segment("ab", [(1, 2), (0, 2)])
    with pytest.raises(ValueError, match="min_tokens >= 1"):
        anchor.segment("ab", [(0, 2)], min_tokens=0)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a b", "5.", "$", " ", "\n", "\n\n", "é", "x = 5", "\\(", "! "])),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_segment_properties(pieces, least, rng):
    """Chunks partition the thinking part; ends rise strictly and end at "</think>"."""
    thinking = "".join(pieces)
    text = thinking + "</think>5"
    at, spans = 0, []
    while at < len(text):
        size = rng.randint(1, 4)
        spans.append((at, min(at + size, len(text))))
        at += size
    parts = anchor.segment(text, spans, min_tokens=least)
    assert "".join(parts.chunks) == (thinking if parts.chunks else "")
    assert parts.ends == sorted(set(parts.ends)) and len(parts.ends) == len(parts.chunks)
    assert parts.think_end == sum(end <= len(thinking) for _, end in spans)
    if parts.ends:
        assert parts.ends[-1] == parts.think_end
        sizes = np.diff([0, *parts.ends])
        assert len(sizes) == 1 or sizes.min() >= least
    else:
        assert parts.think_end == 0


# --- candidates


def test_explicit_candidates():
    """Stated answers are carried on until another is stated; nothing is stated before the first."""
    chunks = ["We think.", "So 2 + 3 = 5.", "Wait, 8 or 9?", "The answer is 7.", "= \\boxed{5}"]
    assert anchor.candidate_answers(chunks) == [None, "5", "5", "7", "5"]
    assert anchor.candidate_answers([]) == []


@pytest.mark.parametrize(
    ("chunk", "answer"),
    [
        ("There are 5 apples here.", None),  # a bare mention
        ("Is the answer 5?", None),  # a question
        ("The answer is 5?", None),
        ("we know 2 + 3 = 5 and so on", None),  # an equation that does not end the chunk
        ("The answer is not 5.", None),
        ("a == 5", None),  # no equation
        ("so a >= 5", None),
        ("so the total is = 1,234.50 dollars.\n\n", "2469/2"),
        ("hence \\(x = \\frac{1}{2}\\).", "1/2"),
        ("first = 4\nthen = 5", "5"),
        ("The answer is x = 5.", "5"),
        ("so \\boxed{ 5\\text{ cm} }", "5"),
        ("\\boxed{4}, no: the answer is 5", "5"),  # the last one counts, not a kind
        ("the answer is 5, no: \\boxed{4}", "4"),
        ("**Final answer:** (B)", "b"),
        ("= 4 = 5", "5"),
    ],
)
def test_what_counts_as_stated(chunk, answer):
    """Each case is a way to take, or to miss, a number that nobody claimed as the answer."""
    assert anchor.candidate_answers([chunk]) == [answer]


def test_working_it_out_again_is_no_change_of_mind():
    """Intermediate results after the answer would end every tail that checks step by step."""
    chunks = ["16 - 3 = 13.", "13 - 4 = 9.", "The answer is 9.", "16 - 3 = 13.", "13 - 4 = 9."]
    assert anchor.candidate_answers(chunks) == ["13", "9", "9", "9", "9"]
    assert anchor.candidate_answers([*chunks, "so \\boxed{8}"])[-1] == "8"
    assert anchor.find_anchor(anchor.candidate_answers(chunks), "9") == 1


def test_numbers_of_the_problem_do_not_count():
    """Restating the problem ("x = 5") must not set an anchor; a box or a statement may."""
    problem = "Let x = 5 and y = 1,000. What is x?"
    assert anchor.candidate_answers(["we have x = 5."], problem=problem) == [None]
    assert anchor.candidate_answers(["we have y = 1000."], problem=problem) == [None]
    assert anchor.candidate_answers(["we have x = 6."], problem=problem) == ["6"]
    assert anchor.candidate_answers(["so b = 3."], problem="2a-3 is b") == [None]
    assert anchor.candidate_answers(["so b = -3."], problem="2a-3 is b") == [None]
    assert anchor.candidate_answers(["the answer is 5."], problem=problem) == ["5"]
    assert anchor.candidate_answers(["\\boxed{5}"], problem=problem) == ["5"]


def test_forced_candidates():
    """The caller's function sees all prefixes at once, and its answers are spelled alike."""
    seen = []

    def forced(prefixes):
        seen.extend(prefixes)
        return [None, "5.0", "\\frac{10}{2}"]

    found = anchor.candidate_answers(["a ", "b ", "c"], "forced", forced=forced)
    assert (found, seen) == ([None, "5", "5"], ["a ", "a b ", "a b c"])
    with pytest.raises(ValueError, match="one answer a prefix; received 3 for 1"):
        anchor.candidate_answers(["a"], "forced", forced=forced)
    with pytest.raises(ValueError, match="mode 'explicit', or 'forced' with a function"):
        anchor.candidate_answers(["a"], "forced")
    with pytest.raises(ValueError, match="received mode 'extractor'"):
        anchor.candidate_answers(["a"], "extractor")


def test_forced_candidates_show_an_answer_that_is_held_back():
    """Stating the answer late moves the explicit anchor and saves nothing; an audit sees it."""
    chunks = ["It must be five. ", "Let us look around. ", "So the answer is 5."]
    forced = lambda prefixes: ["5"] * len(prefixes)
    assert anchor.find_anchor(anchor.candidate_answers(chunks), "5") == 2
    assert anchor.find_anchor(anchor.candidate_answers(chunks, "forced", forced=forced), "5") == 0


# --- anchors and tails


@pytest.mark.parametrize(
    ("cands", "final", "stable", "first", "left"),
    [
        ([None, "5", "5", "5"], "5", 1, 1, 0),
        (["5", "7", "5"], "5", 2, 0, 1),
        (["3", "3"], "5", None, None, 0),
        (["5", "7"], "5", None, 0, 1),
        (["5", None, "5"], "5", 2, 0, 1),
        ([], "5", None, None, 0),
        (["5"], None, None, None, 0),
    ],
)
def test_find_anchor(cands, final, stable, first, left):
    """The worked cases, and that a missing final answer anchors nothing."""
    assert anchor.find_anchor(cands, final) == stable
    assert anchor.find_anchor(cands, final, mode="first") == first
    assert anchor.excursions(cands, final) == left


def test_find_anchor_compares_as_told():
    """Order-insensitive sets need the comparison that is passed, reference first."""
    cands = ["2,1", "\\{1,2\\}"]
    assert anchor.find_anchor(cands, "1, 2") == 0
    assert anchor.find_anchor(cands, "1, 2", lambda a, b: a == b) is None
    with pytest.raises(ValueError, match="'stable' or 'first'; received 'last'"):
        anchor.find_anchor([], "5", mode="last")


def test_tail_stats():
    """Lengths add up, grace is subtracted once, and no anchor means no tail."""
    assert anchor.tail_stats([10, 30, 40], 0, 40) == (10, 40, 30, 0.75)
    assert anchor.tail_stats([10, 30, 40], 0, 40, grace=20) == (30, 40, 10, 0.25)
    assert anchor.tail_stats([10, 30, 40], 1, 40, grace=64) == (40, 40, 0, 0.0)
    assert anchor.tail_stats([10, 30, 40], None, 40) == (40, 40, 0, 0.0)
    assert anchor.tail_stats([], None, 0) == (0, 0, 0, 0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data(), st.integers(0, 80))
def test_tail_properties(sizes, data, grace):
    """tau + tail = think and rho in [0, 1), whatever the chunks."""
    ends = list(np.cumsum(sizes))
    at = data.draw(st.integers(0, len(ends) - 1))
    tail = anchor.tail_stats(ends, at, ends[-1], grace)
    assert tail.tau + tail.tail == tail.think == ends[-1]
    assert tail.tau >= ends[at] and 0 <= tail.rho < 1


# --- the text reward


def test_apr_by_hand():
    """Anchor, tail and reward of a trace whose chunks can be counted."""
    text = DERIVED + CHECKED + OUT
    tau = DERIVED.index("\n\n") + 2  # "= 5." ends the first paragraph
    got = grade(text)
    think = len(DERIVED + CHECKED)
    assert (got["tau"], got["think"], got["tail"]) == (tau, think, think - tau)
    assert got["rho"] == (think - tau) / think
    assert got["reward"] == pytest.approx(1 - 0.5 * (think - tau) / think, abs=1e-6)
    assert (got["accuracy"], got["anchor"], got["format"], got["excursions"]) == (1, 1, 1, 0)
    assert (got["tokens"], got["in_tokens"]) == (len(text.encode()), 1)
    free = grade(text, grace=10**4)
    assert free["reward"] == 1 and free["charged"] == 0 and free["tail"] == got["tail"]
    assert (free["pre"], free["rho"], free["tau"]) == (got["pre"], got["rho"], think)


@pytest.mark.parametrize("kind", ["ratio", "tokens"])
def test_a_longer_tail_lowers_the_reward_of_right_answers_only(kind):
    """Strictly lower with every check that changes nothing; wrong answers stay at 0."""
    rewards, wrong = [], []
    for checks in range(4):
        text = DERIVED + CHECKED * checks + OUT
        rewards.append(grade(text, kind=kind)["reward"])
        wrong.append(grade(text, {"answer": "6"}, kind=kind)["reward"])
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 4
    assert wrong == [0.0] * 4 and min(rewards) > 0


def test_padding_before_the_anchor():
    """The known weakness of "ratio", and that "tokens" does not have it."""
    padding = "Let us look at this problem from many sides before we begin.\n\n" * 3
    for kind, better in (("ratio", True), ("tokens", False)):
        short = grade(DERIVED + CHECKED + OUT, kind=kind)
        padded = grade(padding + DERIVED + CHECKED + OUT, kind=kind)
        assert padded["tail"] == short["tail"] and padded["pre"] > short["pre"]
        assert (padded["reward"] > short["reward"]) == better
        assert (padded["reward"] == short["reward"]) != better


def test_a_changed_answer_moves_the_stable_anchor():
    """Verification that changes the answer is not tail for "stable"; for "first" it is."""
    text = CHECKED + CHANGED + DERIVED + OUT
    stable, first = grade(text), grade(text, anchor="first")
    assert stable["pre"] > len(CHECKED + CHANGED) > first["pre"]
    assert stable["excursions"] == first["excursions"] == 1
    assert stable["reward"] > first["reward"]


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + DERIVED + CHECKED,  # cut off while thinking
        DERIVED + OUT + OUT,  # two ends
        DERIVED,
    ],
)
def test_malformed_traces_get_nothing(text):
    """A tail must never be judged on a truncated trace, nor may it be rewarded."""
    got = grade(text)
    assert got["reward"] == got["accuracy"] == got["format"] == got["tail"] == got["anchor"] == 0
    assert got["tokens"] == len(text)


def test_truncated_by_the_record():
    """A sampler that ran out of tokens after "</think>" says so; that is not a right answer."""
    got = grade(DERIVED + OUT, {"truncated": True})
    assert got["reward"] == 0 and got["tail"] == 0 and got["format"] == 1


def test_an_answer_that_is_never_stated():
    """No anchor means no penalty, and is logged."""
    got = grade("We look at it for quite a while and see what it must be.\n\n" * 4 + OUT)
    assert (got["anchor"], got["reward"], got["tail"], got["tau"]) == (0, 1, 0, got["think"])


def test_words_stand_in_for_tokens():
    """Without offsets the same trace is counted in words, and says so."""
    text = DERIVED + CHECKED + OUT
    got = anchor.apr("", text, {"answer": "5"}, grace=0, min_tokens=4)
    words = len((DERIVED + CHECKED).split())
    assert (got["in_tokens"], got["think"]) == (0, words)
    assert 0 < got["tail"] < words and got["tokens"] == words + 4


def test_tokens_and_positions_agree_with_the_tokenizer(tokenizer):
    """From ids to a mask: the masked tokens decode to exactly the tail."""
    head, tail = "<think>né = 5. So the answer is 5.\n\n", "Is it? Yes: the answer is 5.\n\n🙂"
    text = head + tail + OUT
    ids = tokenizer.ids(text)
    record = {"answer": "5", "offsets": anchor.token_spans(ids, tokenizer.decode)}
    got = anchor.apr("", text, record, grace=0)
    mask = anchor.tail_mask(np.int32([got["tau"]]), np.int32([got["think"]]), len(ids))[0]
    assert tokenizer.decode(np.asarray(ids)[mask]) == tail
    assert mask.sum() == got["tail"] == len(tail.encode())


def test_messages_and_other_verifiers():
    """A prompt of messages is read for its numbers; a verifier by name decides what is right."""
    prompt = [{"role": "user", "content": "Let x = 5. What is x?"}]
    text = "We have been told at the very start that x = 5.\n\nSo that was not too hard." + OUT
    got = anchor.apr(prompt, text, {"answer": "5"}, grace=0, min_tokens=4)
    assert got["anchor"] == 0 and got["accuracy"] == 1
    calls = []

    def verify(prompt, answer, record):
        calls.append((prompt, record["task"]))
        return {"accuracy": 1.0}

    got = anchor.apr("p", text, {"task": "t"}, verify=verify)
    assert got["accuracy"] == 1 and calls == [("p", "t")]
    with pytest.raises(KeyError, match="did you mean same"):
        anchor.apr("", text, {"answer": "5"}, equiv="math_answer.sam")


def test_kinds_of_the_text_reward():
    """What needs a group is left to the batch: the reward is then the accuracy."""
    text = DERIVED + CHECKED + OUT
    for kind in ("group", "token_level"):
        assert grade(text, kind=kind)["reward"] == 1.0
    with pytest.raises(ValueError, match=r"takes kind 'ratio', .*received 'rato'"):
        grade(text, kind="rato")
    with pytest.raises(KeyError, match="'answer'"):
        anchor.apr("", text, {"id": "a"})


# --- rewards of a batch

CORRECT = np.float32([1, 1, 0, 1, 1])
THINK = np.float32([100, 100, 100, 50, 0])
TAIL = np.float32([50, 20, 90, 25, 0])
FOUND = np.float32([1, 1, 1, 0, 1])
GROUP = np.int32([0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ratio", [0.75, 0.9, 0, 1, 1]),
        ("tokens", [0.5, 0.75, 0, 1, 1]),
        ("group", [0.5, 0.8, 0, 1, 1]),
        ("token_level", [1, 1, 0, 1, 1]),
    ],
)
def test_apr_reward_by_hand(kind, expected):
    """Every formula; only right answers with an anchor may set a group's longest tail."""
    kw = dict(kind=kind, reference=40.0, group=GROUP, groups=2)
    got = anchor.apr_reward(CORRECT, THINK, TAIL, FOUND, **kw)
    np.testing.assert_allclose(got, np.float32(expected), rtol=1e-6)
    assert got.dtype == np.float32
    jitted = jax.jit(lambda *x: anchor.apr_reward(*x, **{**kw, "group": jnp.asarray(GROUP)}))
    of_jax = jitted(*map(jnp.asarray, (CORRECT, THINK, TAIL, FOUND)))
    assert isinstance(of_jax, jax.Array) and of_jax.dtype == jnp.float32
    np.testing.assert_allclose(of_jax, got, rtol=1e-6)


def test_right_beats_wrong_for_every_lambda_below_one():
    """A lambda of 1 or more would let a wrong answer win."""
    for kind in ("ratio", "tokens", "group"):
        got = anchor.apr_reward(
            np.float32([1, 0]),
            np.float32([1000, 10]),
            np.float32([999, 0]),
            np.float32([1, 1]),
            kind=kind,
            lam=0.999,
            reference=1.0,
            group=np.int32([0, 0]),
            groups=1,
        )
        assert got[0] > got[1] == 0
    for lam in (1.0, -0.1):
        with pytest.raises(ValueError, match="0 <= lam < 1"):
            anchor.apr_reward(CORRECT, THINK, TAIL, FOUND, lam=lam)
    with pytest.raises(ValueError, match="kind 'ratio'"):
        anchor.apr_reward(CORRECT, THINK, TAIL, FOUND, kind="share")
    with pytest.raises(ValueError, match="needs group"):
        anchor.apr_reward(CORRECT, THINK, TAIL, FOUND, kind="group")


def test_rewards_ignore_what_stands_in_rows_that_do_not_count():
    """NaN lengths of a wrong answer, as padding may hold, must not reach anybody's reward."""
    think, tail = THINK.copy(), TAIL.copy()
    think[2] = tail[2] = np.nan
    for kind in ("ratio", "tokens", "group"):
        kw = dict(kind=kind, reference=40.0, group=GROUP, groups=2)
        clean = anchor.apr_reward(CORRECT, THINK, TAIL, FOUND, **kw)
        np.testing.assert_array_equal(anchor.apr_reward(CORRECT, think, tail, FOUND, **kw), clean)


def test_tail_mask():
    """No token at or before the anchor's last, none at or after "</think>"; as many as the tail."""
    tau, think_end = np.int32([3, 5, 0, 2]), np.int32([6, 5, 0, 99])
    mask = anchor.tail_mask(tau, think_end, 8)
    assert mask.dtype == bool and mask.shape == (4, 8)
    assert mask[0].tolist() == [False, False, False, True, True, True, False, False]
    assert mask.sum(1).tolist() == [3, 0, 0, 6]
    of_jax = jax.jit(anchor.tail_mask, static_argnums=2)(tau, think_end, 8)
    np.testing.assert_array_equal(of_jax, mask)


def test_process_by_hand():
    """Less on the tail, more at "</think>" without one; wrong or without an anchor: nothing."""
    correct, found = np.float32([1, 1, 0, 1]), np.float32([1, 1, 1, 0])
    tau, think = np.int32([1, 3, 1, 1]), np.int32([3, 3, 3, 3])
    kw = dict(slots=5, penalty=0.25, bonus=0.125, scale=np.float32([2.0, 1, 1, 1]))
    got = anchor.process(correct, tau, think, found, **kw)
    expected = [[0, -0.5, -0.5, 0, 0], [0, 0, 0, 0.125, 0], [0] * 5, [0] * 5]
    np.testing.assert_allclose(got, np.float32(expected), rtol=1e-6)
    jitted = jax.jit(lambda *x: anchor.process(*x, **kw))
    of_jax = jitted(*map(jnp.asarray, (correct, tau, think, found)))
    assert of_jax.dtype == got.dtype == np.float32
    np.testing.assert_allclose(of_jax, got, rtol=1e-6)
    plain = anchor.process(correct, tau, think, found, slots=5, penalty=0.0)
    np.testing.assert_array_equal(plain, np.zeros((4, 5)))
    with pytest.raises(ValueError, match="penalty and bonus >= 0; received -1"):
        anchor.process(correct, tau, think, found, slots=5, penalty=-1)


def test_no_bonus_for_what_was_cut_off():
    """A "</think>" beyond the row, or one that was never written, earns nothing."""
    one = np.float32([1])
    for think in (4, 9, -1):
        at = np.int32([think])
        got = anchor.process(one, at, at, one, slots=4, penalty=1.0, bonus=1.0)
        np.testing.assert_array_equal(got, np.zeros((1, 4)))


def test_the_text_reward_is_the_formula():
    """One formula: what `apr` says of each text is what `apr_reward` says of the batch."""
    texts = [DERIVED + OUT, DERIVED + CHECKED + OUT, DERIVED + CHECKED * 3 + OUT]
    rows = [grade(text, kind="tokens", reference=200, grace=9) for text in texts]
    columns = [np.float32([r[k] for r in rows]) for k in ("accuracy", "think", "charged", "anchor")]
    got = anchor.apr_reward(*columns, kind="tokens", reference=200)
    np.testing.assert_array_equal(got, np.float32([r["reward"] for r in rows]))
    assert math_answer.same("5", "5.0") and len(set(got.tolist())) == 3
