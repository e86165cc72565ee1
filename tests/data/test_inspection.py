"""What a data file holds: kinds, places of bad rows, supervised tokens, cuts, lengths, the text."""

import itertools
import json
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxreward import testing
from jaxreward.data import inspection, inspection_text, pairs, points, prompts, tokenize
from jaxreward.data.corpora import helpsteer3

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
END = "<|im_end|>"
# One token a byte: 1 + 5 for USER, 1 + 10 for ASSISTANT, 2 for what closes a turn.
AROUND = 6 + 2 + 11
CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One byte a token, ChatML."""
    return tokenize.load_tokenizer(testing.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def file(tmp_path):
    """Writes rows, or lines as they are, into a file."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (pair("p", "a", "b"), ("pairs", ["chosen", "rejected"])),
        ({"messages": CHAT}, ("chats", ["messages"])),
        ({"prompt": "p", "completion": "a"}, ("chats", ["completion"])),
        ({"text": "a"}, ("chats", ["text"])),
        ({"prompt": "p", "answer": "a"}, ("prompts", ["prompt"])),
        ({"prompt": "p", "answer": "a", "label": False}, ("points", ["answer", "label"])),
        ({"prompt": "p", "completion": "a", "label": 0}, ("points", ["completion", "label"])),
        ({"prompt": "p", "response": "a", "scores": {"u": 1}}, ("points", ["response", "scores"])),
        ({"messages": CHAT, "label": True}, ("chats", ["messages"])),
        (pair("p", "a", "b", label="A"), ("pairs", ["chosen", "rejected"])),
        ({"prompt": "p", "chosen": None, "messages": None}, ("prompts", ["prompt"])),
    ],
)
def test_the_kind_comes_from_the_fields(file, row, kind):
    """Catches a prompt that outweighs the answers beside it, and null taken for a value."""
    assert inspection.kind_of(file("{broken", {"id": 1}, row)) == kind


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([pair("p", "a", "b", messages=CHAT)], "pairs (chosen, rejected) and of chats (messages)"),
        (
            [pair("p", "a", "b", answer="a", label=1)],
            "pairs (chosen, rejected) and of points (answer, label); say with --kind",
        ),
        ([pair("p", "a", "b"), {"text": "a"}], "--kind which they are. Fields: prompt, chosen"),
        ([{"question": "q", "id": 3}], "received question, id; rename the fields"),
        (["{broken", "[1]"], "no row can be used; the first: "),
    ],
)
def test_a_kind_that_is_not_clear_is_asked_for(file, rows, text):
    """Catches a guess, and an error that does not say what was seen."""
    with pytest.raises(ValueError) as error:
        inspection.kind_of(file(*rows))
    assert text in str(error.value)


def test_bad_rows_are_counted_and_placed(file):
    """Catches a stop at the first bad row, line numbers that are off, and rows that are refused
    before they are parsed."""
    good = pair("p", "a", "b")
    path = file(
        good, "{broken", pair("p", "a", "a"), good, pair("p", "a", "a"), {**good, "images": ["x"]}
    )
    records, report = inspection.read(path, "pairs")
    assert [record["id"] for record in records] == ["1", "4"]
    assert (report["read"], report["kept"]) == (6, 2)
    assert report["places"] == {
        "line must be a JSON object": [2],
        "rejected: identical answers": [3, 5],
        "images: is not read, only text is; leave such rows out": [6],
    }
    assert report["skipped"] == {reason: len(at) for reason, at in report["places"].items()}
    flat = " ".join(inspection_text.render(inspection.inspect(path)).split())
    assert f"2 × rejected: identical answers ({path}:3, 5)" in flat
    assert f"1 × images: is not read, only text is; leave such rows out ({path}:6)" in flat


def test_rows_that_a_corpus_refuses_are_placed(file):
    """Catches ties and the like that are counted, and whose lines are not told."""
    row = {"context": "q", "response1": "a", "response2": "b"}
    path = file(*({**row, "overall_preference": score} for score in (0, 1, 0, 9)))
    _, report = inspection.read(path, "pairs", corpus=helpsteer3.pairs)
    assert report["places"] == {
        "overall_preference: tie": [1, 3],
        "overall_preference: must be from -3 to 3": [4],
    }


def test_a_corpus_and_a_limit_are_passed_on(file):
    """Catches a corpus that maps only what the kind is told from, and a limit that is ignored."""
    path = file(*({"q": f"p{i}", "good": "a", "bad": "b"} for i in range(3)))
    corpus = lambda rows: ((n, pair(row["q"], row["good"], row["bad"])) for n, row in rows)
    report = inspection.inspect(path, corpus=corpus, limit=2, other=path)
    assert report["kind"] == "pairs" and report["read"]["kept"] == 2
    assert report["overlap"]["exact_ids"] == [("1", "1"), ("2", "2")]
    assert "--limit 2 stopped it there" in inspection_text.render(report)


def test_the_supervised_tokens_of_a_pair_are_marked(tokenizer):
    """Catches a mask that is off by one at either end of an answer."""
    record = {"id": "7", **pair("hi", "yes", "nö", margin=0.5, weight=2.0, subset="s")}
    shown = inspection.example(record, "pairs", tokenizer)
    head = (f"{USER}hi{END}\n{ASSISTANT}", False)
    assert shown == {
        "id": "7",
        "margin": 0.5,
        "weight": 2.0,
        "subset": "s",
        "too_long": False,
        "answers": [
            {
                "name": "chosen",
                "prompt": AROUND + 2,
                "answer": 5,
                "supervised": 4,
                "dropped": 0,
                "spans": [head, (f"yes{END}", True), ("\n", False)],
            },
            {
                "name": "rejected",
                "prompt": AROUND + 2,
                "answer": 5,
                "supervised": 4,
                "dropped": 0,
                "spans": [head, (f"nö{END}", True), ("\n", False)],
            },
        ],
    }


def test_every_turn_of_the_assistant_is_marked(tokenizer):
    """Catches a user's turn shown as supervised, and turns of plain text that are left out."""
    record = {"id": "1", "prompt": CHAT[:1], "completion": CHAT[1:]}
    (answer,) = inspection.example(record, "chats", tokenizer)["answers"]
    assert [text for text, supervised in answer["spans"] if supervised] == [f"2{END}", f"four{END}"]
    plain = inspection.example(record, "chats", tokenizer, template="plain")["answers"]
    assert [answer["name"] for answer in plain] == ["completion 1 of 2", "completion 2 of 2"]
    assert [answer["spans"] for answer in plain] == [
        [("\n\nHuman: 1+1?\n\nAssistant:", False), (f" 2{END}", True)],
        [
            ("\n\nHuman: 1+1?\n\nAssistant: 2\n\nHuman: 2+2?\n\nAssistant:", False),
            (f" four{END}", True),
        ],
    ]


def test_a_prompt_to_sample_from_has_nothing_supervised(tokenizer):
    """Catches prompts rendered as if they were answered."""
    (shown,) = inspection.example({"id": "1", "prompt": "hi"}, "prompts", tokenizer)["answers"]
    assert shown["spans"] == [(f"{USER}hi{END}\n{ASSISTANT}", False)]
    assert (shown["prompt"], shown["answer"], shown["supervised"]) == (AROUND + 2, 0, 0)


def test_an_example_says_what_is_cut_and_what_is_skipped(tokenizer):
    """Catches an example shown otherwise than it is trained on."""
    record = {"id": "1", **pair("hello", "yes", "no")}
    chosen, rejected = inspection.example(record, "pairs", tokenizer, max_len=27)["answers"]
    # Whole they are 24 + 5 and 24 + 4 tokens; the BOS in front stays.
    assert (chosen["dropped"], chosen["prompt"], chosen["answer"]) == (2, 22, 5)
    assert (rejected["dropped"], rejected["prompt"], rejected["answer"]) == (1, 23, 4)
    assert chosen["spans"][0][0].startswith("<|im_start|>er\nhello")
    shown = inspection.example(record, "pairs", tokenizer, max_len=5)
    assert shown["too_long"] and shown["answers"][0]["dropped"] == 0


def test_lengths_and_cuts_are_counted(tokenizer):
    """Catches a prompt counted once an answer, a pair skipped for another's length, and lengths
    measured after the cut."""
    records = [
        {"id": "fits", **pair("p", "a", "b")},
        {"id": "cut", **pair("p" * 20, "aaa", "b")},
        {"id": "long", **pair("p", "a", "b" * 40)},
        {"id": "same prompt", **pair("p", "a", "c")},
    ]
    found = inspection.encode(tokenizer, records, "pairs", max_len=40)
    assert found["lengths"] == [
        {"prompt": 20, "chosen": 3, "rejected": 3, "longest": 23},
        {"prompt": 39, "chosen": 5, "rejected": 3, "longest": 44},
        {"prompt": 20, "chosen": 3, "rejected": 42, "longest": 62},
        {"prompt": 20, "chosen": 3, "rejected": 3, "longest": 23},
    ]
    # Of "cut" the answers lose 4 and 2. "long" fits after its BOS and no prompt: 1 + 42 > 40.
    assert (found["truncated"], found["dropped_tokens"], found["skipped"]) == (1, 6, 1)
    assert sum(len(tree.pairs) for tree in found["trees"]) == 3
    found = inspection.encode(tokenizer, records[2:3], "pairs", max_len=40)
    assert (found["skipped"], found["trees"]) == (1, [])


def test_lengths_of_chats_and_prompts(tokenizer):
    """Catches user turns counted as supervised, and turns of plain text counted twice."""
    records = [{"id": "1", "prompt": CHAT[:1], "completion": CHAT[1:]}]
    (found,) = inspection.encode(tokenizer, records, "chats")["lengths"]
    turns = AROUND + 4 + 3 + AROUND + 4 + 6
    assert found == {
        "prompt": AROUND + 4,
        "completion": turns - AROUND - 4,
        "supervised": 2 + 5,
        "longest": turns,
    }
    (found,) = inspection.encode(tokenizer, records, "chats", template="plain")["lengths"]
    whole = len("\n\nHuman: 1+1?\n\nAssistant: 2\n\nHuman: 2+2?\n\nAssistant: four") + 1
    first = len("\n\nHuman: 1+1?\n\nAssistant:")
    assert found == {
        "prompt": first,
        "completion": whole - first,
        "supervised": len(" 2") + 1 + len(" four") + 1,
        "longest": whole,
    }
    asked = [{"id": "1", "prompt": "hi"}, {"id": "2", "prompt": "hello there"}]
    found = inspection.encode(tokenizer, asked, "prompts", max_len=AROUND + 4)
    assert found["lengths"] == [{"prompt": AROUND + 2}, {"prompt": AROUND + 11}]
    assert (found["truncated"], found["dropped_tokens"], found["skipped"]) == (0, 0, 1)
    assert [tree.id for tree in found["trees"]] == ["1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made, counts = prompts.encode(tokenizer, asked, max_len=AROUND + 4, on_long="skip")
    assert [p["id"] for p in made] == ["1"] and counts["skipped"] == 1


POINTS = [
    {"id": "fits", "prompt": "p", "answer": "a", "label": "good"},
    {"id": "cut", "prompt": "p" * 20, "answer": "aaa", "label": 0.5},
    {"id": "long", "prompt": "p", "answer": "b" * 40, "scores": {"u": 1.0, "v": None}},
    {"id": "same prompt", "prompt": "p", "answer": "cc", "label": True},
]


def test_lengths_and_cuts_of_labelled_answers(tokenizer):
    """Catches an answer measured as its neighbour, and labels that a head would have to know."""
    found = inspection.encode(tokenizer, POINTS, "points", max_len=40)
    assert found["lengths"] == [
        {"prompt": 20, "answer": 3, "longest": 23},
        {"prompt": 39, "answer": 5, "longest": 44},
        {"prompt": 20, "answer": 42, "longest": 62},
        {"prompt": 20, "answer": 4, "longest": 24},
    ]
    assert (found["truncated"], found["dropped_tokens"], found["skipped"]) == (1, 4, 1)
    shown = inspection.example(POINTS[2], "points", tokenizer, max_len=5)
    assert shown["too_long"] and shown["scores"] == {"u": 1.0, "v": None}
    (answer,) = inspection.example(POINTS[0], "points", tokenizer)["answers"]
    head = (f"{USER}p{END}\n{ASSISTANT}", False)
    assert answer["name"] == "answer" and answer["spans"][:2] == [head, (f"a{END}", True)]


@pytest.mark.parametrize("max_len", [None, 40])
def test_labelled_answers_are_packed_as_training_packs_them(tokenizer, max_len):
    """Catches answers to one prompt that are measured as trees of their own, or the reverse."""
    records = [{**record, "label": 1.0} for record in POINTS]
    records += [{**records[0], "id": str(i), "answer": f"{i}"} for i in range(18)]
    found = inspection.encode(tokenizer, records, "points", max_len=max_len)
    for record in records:
        record.pop("scores", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trees, _ = points.encode(tokenizer, records, max_len=max_len, on_long="skip")
    text = lambda tree: [x.tolist() for x in (tree.prompt, *tree.answers)]
    assert sorted(map(text, found["trees"])) == sorted(map(text, trees))
    # 16 and 5 answers to one prompt; the long one takes the other 15 of its group apart.
    assert len(trees) == (3 if max_len is None else 15 + 1 + 1)


@pytest.mark.parametrize("max_len", [None, 48, 36, 30])
def test_what_is_packed_is_what_training_packs(tokenizer, max_len):
    """Catches trees, cuts and skips that differ from those of the recipe."""
    made = testing.synthetic_pairs(12)
    records = [*made, *({**r, "rejected": r["rejected"] * 3} for r in made[:5])]
    found = inspection.encode(tokenizer, records, "pairs", max_len=max_len)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trees, report = pairs.encode_pairs(tokenizer, records, max_len=max_len, on_long="skip")
    text = lambda tree: [x.tolist() for x in (tree.prompt, *tree.answers, *tree.loss)]
    assert sorted(map(text, found["trees"])) == sorted(map(text, trees))
    assert {k: found[k] for k in ("truncated", "dropped_tokens", "skipped")} == {
        k: report[k] for k in ("truncated", "dropped_tokens", "skipped")
    }


def test_rows_are_packed_as_the_recipes_pack_them(tokenizer):
    """Catches a row length that is no longer the recipes' own."""
    from jaxreward.evals import scorer

    for count in (1, 8):
        trees, _ = pairs.encode_pairs(tokenizer, testing.synthetic_pairs(count))
        found = inspection.packing(trees)
        assert found["row_len"] == scorer.row_len(trees)
        used = sum(tree.size for tree in trees)
        assert found["efficiency"] == used / (found["rows"] * found["row_len"])


def test_rows_that_cannot_be_rendered_are_named_and_left_out(tokenizer, file):
    """Catches one row that stops the whole command, or that takes the pairs of its prompt along."""
    system = [{"role": "system", "content": "s"}, *CHAT]
    path = file({"id": "odd", "messages": system}, {"messages": CHAT})
    report = inspection.inspect(path, tokenizer=tokenizer, template="plain")
    ((name, why),) = report["encoded"]["refused"]
    assert name == "odd" and "knows the roles user and assistant" in why
    assert report["examples"][0]["id"] == "2" and len(report["lengths"]["prompt"]) == 1
    assert "1 row cannot be rendered" in inspection_text.render(report)
    with pytest.raises(ValueError, match=r"none of 1 rows can be rendered; the first: .*'odd'"):
        inspection.inspect(
            file({"id": "odd", "messages": system}), tokenizer=tokenizer, template="plain"
        )
    answer = [{"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"}]
    records = [
        {"id": "good", **pair("p", [CHAT[1]], [CHAT[3]])},
        {"id": "odd", **pair("p", [CHAT[1]], answer)},
    ]
    found = inspection.encode(tokenizer, records, "pairs", template="plain")
    assert [name for name, _ in found["refused"]] == ["odd"] and len(found["trees"]) == 1


def test_a_summary_by_hand():
    """Catches a median or a percentile of another definition."""
    assert inspection.summary([4, 1, 2, 3, 10]) == {
        "min": 1.0,
        "median": 3.0,
        "mean": 4.0,
        "p95": pytest.approx(8.8),
        "max": 10.0,
    }


def test_a_histogram_by_hand():
    """Catches edges that overlap, and a tail that stretches the bins."""
    values = [*range(1, 11), *[10] * 190, 500]
    table = [(i, i, 1) for i in range(1, 10)] + [(10, 500, 192)]
    assert inspection.histogram(values) == table
    assert inspection.histogram([120, 150, 260], bins=2) == [(100, 199, 2), (200, 299, 1)]
    assert inspection.histogram([7]) == [(7, 7, 1)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(1, 15))
def test_a_histogram_counts_every_value_once(values, bins):
    """Catches values that fall between bins or into two."""
    table = inspection.histogram(values, bins=bins)
    assert len(table) <= bins
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(table))
    assert [sum(low <= v <= high for v in values) for low, high, _ in table] == [
        count for *_, count in table
    ]
    assert sum(count for *_, count in table) == len(values)


def test_length_bias_by_hand():
    """Catches a sign, and ties counted as longer."""
    assert inspection.length_bias([5, 1, 3, 9], [1, 2, 3, 2]) == {
        "chosen": 4.5,
        "rejected": 2.0,
        "difference": 2.5,
        "longer": 0.5,
        "equal": 0.25,
        "shorter": 0.25,
    }


@pytest.fixture
def rows(file):
    """A file with something of everything."""
    return file(
        pair(
            "What is up?", "good\tone", "bad " * 60, subset="a", chosen_score=7, rejected_score=3.5
        ),
        pair("What is up?", "bad " * 60, "good\tone", subset="b"),
        pair("\x1b[31mred\x1b[0m", "x\ny", "z" * 300, margin=1.5, subset="a"),
        pair("\x1b[31mred\x1b[0m", "x\ny", "z" * 300, margin=1.5, subset="a"),
        "{broken",
    )


def test_the_text_shows_marks_and_numbers(rows, tokenizer, file):
    """Catches a section that is missing or speaks of other numbers."""
    other = file(pair("what is UP", "a", "b"), pair("new", "a", "b"), name="test.jsonl")
    report = inspection.inspect(rows, tokenizer=tokenizer, max_len=200, show=1, other=other)
    text = inspection_text.render(report)
    flat = " ".join(text.split())
    for part in (
        f"{rows}: 4 pairs",
        "kind pairs, as the rows have chosen, rejected",
        "5 rows, 4 kept, 1 skipped",
        f"1 × line must be a JSON object ({rows}:5)",
        "pairs with margin 2, scores 1",
        "1. id 1 subset a scores 7 and 3.5",
        "skipped in training: an answer alone exceeds max_len 200; whole:",
        "prompt, 30 tokens │ <|im_start|>user↵ │ What is up?<|im_end|>↵ │ <|im_start|>assistant↵",
        r"chosen, 10 tokens, 9 of them supervised │ ⟦good\tone<|im_end|>⟧↵",
        "skipped 4 of 4 pairs: an answer alone is longer",
        "prompt + longer answer",
        "chosen is the longer one in 25.0 % of the pairs and the shorter in 75.0 %",
        "prompts 2 different; 2 of them in several rows, up to 2",
        "copies 1 row says what an earlier one says: ids 3 = 4",
        "contradictions 1 × two answers preferred in both orders: ids 1 against 2",
        "subset a 3, b 1",
        f"file {other}, read as pairs: 2 rows, 2 kept, none skipped",
        "exactly here 0 (0.0 %)",
        "nearly here 1 (50.0 %), ids there = here: 1 = 1",
    ):
        assert part in flat, part
    assert "packing" not in text  # there is nothing left to pack


def test_the_text_of_labelled_answers(file, tokenizer):
    """Catches labels that are not shown, scores without their nulls, and a file of completions with
    labels whose other reading is not named."""
    path = file(
        {"prompt": "p", "completion": "a", "label": True, "subset": "s"},
        {"prompt": "p", "completion": "a", "label": False},
        {"prompt": "p", "completion": "b", "scores": {"helpfulness": 3, "verbosity": None}},
        {"prompt": "p", "completion": "c", "scores": {"helpfulness": 4.5}, "weight": 2},
        {"prompt": "p", "completion": "d"},
    )
    report = inspection.inspect(path, tokenizer=tokenizer, show=3)
    flat = " ".join(inspection_text.render(report).split())
    for part in (
        f"{path}: 4 labelled answers",
        "kind points, as the rows have completion, label, scores; --kind chats takes them as",
        f"1 × label: needs exactly one of label and scores ({path}:5)",
        "answers with weight 1, label 2, scores 2",
        "a reward model reads its score at an answer's last token",
        "1. id 1 subset s label True",
        "3. id 3 scores helpfulness 3, verbosity null",
        "answer, 3 tokens, 2 of them supervised │ ⟦a<|im_end|>⟧↵",
        "prompt + answer 23 23 23.0 23 23",
        "contradictions 1 × one answer labelled in several ways: ids 1 against 2",
        "Values subset s 1 label True 1, False 1 min mean max known null",
        "scores.helpfulness 3 3.75 4.5 2 0",
        "scores.verbosity null null null 0 2",
    ):
        assert part in flat, part
    assert "--kind" not in inspection_text.render(inspection.inspect(path, kind="points"))


def test_the_text_of_prompts_says_that_none_is_cut(file, tokenizer):
    """Catches prompts shown as if they lost their beginning, at which training stops."""
    path = file({"prompt": "hi"}, {"prompt": "hello there"}, {"prompt": "x" * 30})
    seen = lambda **kw: inspection.inspect(path, tokenizer=tokenizer, show=2, **kw)
    flat = lambda report: " ".join(inspection_text.render(report).split())
    text = flat(seen(max_len=AROUND + 4))
    for part in (
        "2. id 2 refused, or skipped with data.on_bad=skip: the prompt exceeds max_len 23; whole: "
        "prompt, 30 tokens │ <|im_start|>user↵ │ hello there",
        "Too long for --max_len 23 prompts 2 of 3 prompts (66.7 %); none is cut: training stops at "
        "the first of them, or with data.on_bad=skip leaves them out and says how many. The longest"
        " takes 49 tokens",
        "prompt 21 30 33.3 47 49",
    ):
        assert part in text, part
    assert text.count("refused, or skipped") == 1 and "cut off" not in text.lower()
    assert "Too long for --max_len 49 prompts none of 3 prompts" in flat(seen(max_len=49))
    report = seen(max_len=5)
    assert report["encoded"]["kept"] == 0 and "3 of 3 prompts (100.0 %)" in flat(report)
    assert "Too long: none, as no --max_len is given; the longest takes 49" in flat(seen())


def test_the_text_fits_and_cannot_steer_a_terminal(rows, tokenizer):
    """Catches lines that the terminal folds, and escapes of the data that reach it."""
    for kw in ({}, {"tokenizer": tokenizer}, {"tokenizer": tokenizer, "max_len": 400}):
        report = inspection.inspect(rows, show=4, **kw)
        text = inspection_text.render(report)
        assert "\x1b" not in text and r"\x1b[31mred" in text
        assert [
            line for line in text.split("\n") if len(line) > 100 and "rows.jsonl" not in line
        ] == []
        coloured = inspection_text.render(report, colour=True)
        assert "\x1b[31m" not in coloured and "\x1b[1mLengths in" in coloured


def test_colour_marks_what_brackets_mark(rows, tokenizer):
    """Catches colour without the marks, or on the wrong part."""
    report = inspection.inspect(rows, tokenizer=tokenizer, show=1)
    coloured = inspection_text.render(report, colour=True)
    assert f"\x1b[32m⟦good\\tone{END}⟧\x1b[0m\x1b[2m↵\x1b[0m" in coloured


def test_long_texts_are_shown_by_their_ends(file, tokenizer):
    """Catches a screen full of one prompt, and an answer whose end token is not shown."""
    path = file(pair("\n".join(f"line {i}" for i in range(99)), "yes", "no\n" * 99))
    text = inspection_text.render(inspection.inspect(path, tokenizer=tokenizer))
    assert "│ line 0↵" in text and "│ line 98<|im_end|>↵" in text and "│ line 50↵" not in text
    assert text.count(" lines …") == 2 and f"│ {END}⟧↵" in text
    assert len(text.split("\n")) < 90


def test_without_a_tokenizer_lengths_are_characters(rows):
    """Catches characters that are called tokens, and marks where nothing is known."""
    report = inspection.inspect(rows)
    assert report["lengths"]["chosen"] == [8, 240, 3, 3]
    assert report["lengths"]["longest"] == [251, 251, 312, 312]
    text = inspection_text.render(report)
    assert "Lengths in characters" in text and "--model HF_FOLDER counts tokens" in text
    assert "⟦" not in text and "token," not in text and "packing" not in text


def test_examples_without_a_tokenizer_are_the_texts_of_the_file():
    """Catches a kind without answers, and a dialogue that does not say who speaks."""
    texts = lambda record, kind: [
        (answer["name"], [text for text, _ in answer["spans"]])
        for answer in inspection.example({"id": "1", **record}, kind)["answers"]
    ]
    assert texts({"prompt": "hi"}, "prompts") == [("prompt", ["hi"])]
    assert texts(pair("hi", "a", "b"), "pairs") == [
        ("chosen", ["hi", "a"]),
        ("rejected", ["hi", "b"]),
    ]
    assert texts({"prompt": CHAT[:1], "completion": CHAT[1:]}, "chats") == [
        ("completion", ["[user] 1+1?", "[assistant] 2\n[user] 2+2?\n[assistant] four"])
    ]


def test_what_does_not_fit_is_said(file, tokenizer):
    """Catches arguments that are dropped in silence."""
    path = file(pair("p", "a", "b"))
    for kw, text in (
        (
            {"kind": "pair"},
            "kind must be one of auto, pairs, points, chats, prompts; received 'pair'; did",
        ),
        ({"max_len": 8}, "max_len counts tokens, which takes a tokenizer"),
        ({"show": -1}, "show must be 0 or more; received -1"),
        ({"tokenizer": tokenizer, "template": "chatt"}, "did you mean 'chat'"),
        ({"kind": "chats"}, "holds no usable conversation in 1 lines"),
        ({"other": "-"}, "standard input can be read only once"),
    ):
        with pytest.raises(ValueError) as error:
            inspection.inspect(path, **kw)
        assert text in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nope\.jsonl does not exist"):
        inspection.inspect(path.with_name("nope.jsonl"))
