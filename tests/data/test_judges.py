"""Pairs as work for a judge: orders, layouts, rationales, replay, and GRAM's finished prompts."""

import json

import numpy as np
import pytest

from jaxreward.core.resolve import resolve_words
from jaxreward.data import conversations, judges, prompts, sources
from jaxreward.data.corpora import gram
from jaxreward.data.corpora import judged as corpus
from jaxreward.rewards import verdict


def pair(number, **fields):
    known = {"id": f"p{number}", "prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}
    return {**known, **fields}


PAIRS = [pair(n) for n in range(400)]


def test_the_order_depends_on_seed_and_id_alone():
    """Catches an order that moves with the rest of the data, or that always puts chosen first."""
    made = {row["id"]: row for row in judges.rows(PAIRS, seed=3)}
    some = judges.rows(PAIRS[::-7], seed=3)
    assert all(made[row["id"]] == row for row in some)
    share = np.mean([row["label"] == "A" for row in made.values()])
    assert 0.4 < share < 0.6
    other = judges.rows(PAIRS, seed=4)
    changed = np.mean([made[row["id"]]["label"] != row["label"] for row in other])
    assert 0.4 < changed < 0.6


def test_the_label_is_where_the_chosen_answer_is_shown():
    """Catches a label that stays when the answers are swapped."""
    for row in judges.rows(PAIRS[:20], seed=0):
        a, b = row["prompt"].index("Seven."), row["prompt"].index("Nine.")
        assert (row["label"] == "A") == (a < b)
        assert row["first"] == ("chosen" if a < b else "rejected")


def test_both_orders():
    """Catches a judge of one position that does not score 50 %, and orders that drift apart."""
    drawn = judges.rows(PAIRS[:20], seed=5)
    both = judges.rows(PAIRS[:20], seed=5, both=True)
    assert [row["label"] == "A" for row in both].count(True) == 20
    for one, first, second in zip(drawn, both[::2], both[1::2]):
        assert (first["id"], second["id"]) == (f"{one['id']}:1", f"{one['id']}:2")
        assert first["pair"] == second["pair"] == one["id"]
        assert first["prompt"] == one["prompt"] and first["label"] == one["label"]
        assert second["label"] == verdict.swapped(first["label"])
        assert second == {
            **judges.row(PAIRS[0], second["first"]),
            "id": second["id"],
            "pair": one["id"],
        }


def test_what_a_pair_brings_along():
    """Catches a lost subset, weight or task, and null fields."""
    full = pair(0, subset="safety", weight=0.5, extra={"task_type": "image_generation", "x": 1})
    row = judges.row(full, "rejected")
    assert {key: row[key] for key in row if key != "prompt"} == {
        "id": "p0",
        "label": "B",
        "first": "rejected",
        "held_out_by": "Name a prime.",
        "subset": "safety",
        "weight": 0.5,
        "task_type": "image_generation",
    }
    none = {"id", "prompt", "label", "first", "held_out_by"}
    assert set(judges.row(pair(0), "chosen")) == none


def test_the_form_that_is_asked_for_is_the_form_that_is_read():
    """Catches a layout that asks for tags which the reward calls a fault, or in another order."""
    for stage, tags in verdict.STAGES.items():
        text = judges.reasoned("q", "a", "b", stage=stage)
        places = [text.index(f"<{tag}>\n") for tag in tags]
        assert places == sorted(places)
        assert all(text.count(f"<{tag}>") == (tag in tags) for tag in verdict.STAGES["media"])
    assert "[Caption]\na red car\n" in judges.reasoned("q", "a", "b", caption="a red car")
    with pytest.raises(ValueError, match="gives away"):
        judges.reasoned("q", "a", "b", stage="media", caption="a red car")
    with pytest.raises(ValueError, match="stage must be one of text, caption, media"):
        judges.reasoned("q", "a", "b", stage="video")


def test_captions_are_shown_only_in_their_stage():
    """Catches a caption in the prompt of a judge that is to look at the image itself."""
    seen = pair(0, extra={"caption": "a red car", "task_type": "image understanding"})
    for stage in verdict.STAGES:
        assert ("a red car" in judges.row(seen, "chosen", stage=stage)["prompt"]) == (
            stage == "caption"
        )


def test_layouts_show_everything_once_and_in_order():
    """Catches a dropped turn, a swapped answer, and text that a template engine would expand."""
    prompt = [
        {"role": "system", "content": "Be brief. {prompt} %s"},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    first = [{"role": "assistant", "content": "{first} \\1"}]
    asked = "System: Be brief. {prompt} %s\n\nUser: One?\n\nAssistant: 1\n\nUser: Two?\n\n"
    for text, names in (
        (judges.reasoned(prompt, first, "two"), ("A's Response", "B's Response")),
        (judges.scored(prompt, first, "two"), ("1's Answer", "2's Answer")),
    ):
        shown = "\n\n".join(
            f"[The Start of Assistant {name}]\n{answer}\n[The End of Assistant {name}]"
            for name, answer in zip(names, ("{first} \\1", "two"))
        )
        assert text.count(asked + shown) == 1
    text = judges.pointwise("One?", first)
    assert "One?" in text and "{first} \\1" in text and "Assistant 2" not in text
    assert judges.rows([pair(0)], seed=0, layout=judges.scored)[0]["prompt"].startswith(
        "[Question]"
    )


RATIONALE = {
    "chosen": "Right, unlike {rejected}.",
    "rejected": "Nine is 3 * 3.",
    "comparison": "{chosen} beats {rejected}.",
}


def test_rationales_follow_the_order():
    """Catches a rationale that praises the other letter after the swap."""
    pairs = [pair(n, extra={"rationale": RATIONALE}) for n in range(8)]
    records, report = judges.completions(pairs, seed=0)
    assert report == {"read": 8, "kept": 8, "skipped": {}}
    labels = set()
    for record, asked in zip(records, judges.rows(pairs, seed=0)):
        read = verdict.parse(record["completion"])
        assert read.fault is None and read.verdict == asked["label"]
        assert record["prompt"] == asked["prompt"]
        good, bad = asked["label"], verdict.swapped(asked["label"])
        lines = [
            f"Response {good}: Right, unlike Response {bad}.",
            f"Response {bad}: Nine is 3 * 3.",
        ]
        assert read.blocks["think"] == (
            f"Feedback:\n{lines[good == 'B']}\n{lines[good == 'A']}\n\n"
            f"Comparison:\nResponse {good} beats Response {bad}.\n\n"
            f"Conclusion:\nResponse {good} is better."
        )
        labels.add(good)
    assert labels == {"A", "B"}


def test_a_rationale_with_letters_keeps_its_order():
    """Catches a text about A and B shown with A and B exchanged."""
    for first, label in (("chosen", "A"), ("rejected", "B")):
        pairs = [
            pair(n, extra={"rationale": f"{label} is prime.", "first": first}) for n in range(6)
        ]
        for record in judges.completions(pairs, seed=0)[0]:
            read = verdict.parse(record["completion"])
            assert read.verdict == label and read.blocks["think"] == f"{label} is prime."
            assert (record["prompt"].index("Seven.") < record["prompt"].index("Nine.")) == (
                label == "A"
            )


def test_pairs_without_a_usable_rationale_are_counted():
    """Catches pairs that vanish, and a target that breaks its own form."""
    pairs = [
        pair(0, extra={"rationale": RATIONALE}),
        pair(1),
        pair(2, extra={"rationale": {"comparison": "use <answer>"}}),
    ]
    with pytest.warns(UserWarning, match=r"2 of 3 pairs are left out: no rationale \(1\); a rat"):
        records, report = judges.completions(pairs, seed=0)
    assert [record["id"] for record in records] == ["p0"]
    assert sum(report["skipped"].values()) == 2
    with pytest.raises(ValueError, match=r"no pair of 1 has a rationale .*no rationale \(1\)"):
        judges.completions(pairs[1:2], seed=0)


@pytest.mark.parametrize(
    ("extra", "stage", "text"),
    [
        ({"rationale": "A."}, "text", "'p0': rationale is one text, so a field first"),
        ({"rationale": "A.", "first": "A"}, "text", "chosen or rejected; received 'A'"),
        ({"rationale": {"better": "x"}}, "text", "'p0': rationale must be str, or a dict"),
        ({"rationale": {"chosen": 3}}, "text", "'p0': rationale must be str, or a dict"),
        ({"rationale": ["x"]}, "text", "'p0': rationale must be str, or a dict"),
        ({"rationale": RATIONALE}, "caption", "needs a field task_type, .*received None"),
        ({"rationale": RATIONALE, "task_type": "audio"}, "media", "received 'audio'"),
    ],
)
def test_rationales_of_another_form_are_named(extra, stage, text):
    """Catches a rationale that is shown with the wrong letters or dropped in silence."""
    with pytest.raises(ValueError, match=text):
        judges.completions([pair(0, extra=extra)], seed=0, stage=stage)


def test_later_stages_teach_type_and_caption():
    """Catches a caption that is given away in the prompt instead of taught."""
    extra = {"rationale": RATIONALE, "task_type": "image-understanding", "caption": "a red car"}
    for stage in ("caption", "media"):
        ((record,), _) = judges.completions([pair(0, extra=extra)], seed=0, stage=stage)
        read = verdict.parse(record["completion"], stage=stage)
        assert read.fault is None and read.blocks["type"] == "image understanding"
        assert read.blocks.get("caption") == ("a red car" if stage == "media" else None)
        assert ("a red car" in record["prompt"]) == (stage == "caption")


def test_what_is_made_is_read_as_conversations(tmp_path):
    """Catches records that supervised training does not take."""
    records, _ = judges.completions([pair(0, extra={"rationale": RATIONALE})], seed=0)
    sources.write_jsonl(tmp_path / "sft.jsonl", records)
    assert conversations.read(tmp_path / "sft.jsonl")[0] == records


def taken(steps, **kw):
    parts = [judges.replay_indices(step, **kw) for step in steps]
    return tuple(np.concatenate(part) for part in zip(*parts))


@pytest.mark.parametrize("ratio", [(5, 1), (4, 1), (1, 1), (2, 3)])
def test_replay_holds_its_ratio_everywhere(ratio):
    """Catches a ratio that holds on average only, or that starts anew with every batch."""
    _, is_old = taken(range(9), new=50, old=7, batch=7, seed=0, ratio=ratio)
    size = sum(ratio)
    for start in range(len(is_old) - size + 1):
        assert is_old[start : start + size].sum() == ratio[1]


def test_replay_goes_through_all_records_and_resumes():
    """Catches a record that is never shown, an order that repeats, and a resume that differs."""
    kw = dict(new=10, old=4, batch=6, seed=1)
    indices, is_old = taken(range(8), **kw)
    fresh, replayed = indices[~is_old], indices[is_old]
    assert len(fresh) == 40 and len(replayed) == 8
    for epoch in np.split(fresh, 4):
        assert sorted(epoch) == list(range(10))
    for epoch in np.split(replayed, 2):
        assert sorted(epoch) == list(range(4))
    assert not np.array_equal(fresh[:10], fresh[10:20])
    again = taken(range(5, 8), **kw)
    np.testing.assert_array_equal(again[0], indices[30:])
    np.testing.assert_array_equal(again[1], is_old[30:])
    assert not np.array_equal(taken(range(8), **{**kw, "seed": 2})[0], indices)


def test_replay_can_be_off():
    """Catches a division by no old records."""
    indices, is_old = judges.replay_indices(0, new=4, old=0, batch=4, seed=0, ratio=(1, 0))
    assert sorted(indices) == [0, 1, 2, 3] and not is_old.any()


@pytest.mark.parametrize(
    "kw",
    [
        {"new": 0},
        {"old": 0},
        {"batch": 0},
        {"ratio": (0, 1)},
        {"ratio": (0, 0)},
        {"ratio": (5, -1)},
    ],
)
def test_replay_of_nothing_is_refused(kw):
    """Catches an index into an empty set."""
    with pytest.raises(ValueError, match="replay needs batch >= 1"):
        judges.replay_indices(0, **{"new": 4, "old": 2, "batch": 2, "seed": 0, **kw})


def asked(question="Why?", a="One.", b="Two.", what="Answer"):
    shown = "\n\n".join(
        f"[The Start of Assistant {name}'s {what}]\n{text}\n[The End of Assistant {name}'s {what}]"
        for name, text in (("A", a), ("B", b))
    )
    return f"Judge.\n\n[User Question]\n{question}\n\n{shown}\n\n#Preferred:"


def read(tmp_path, *rows, **kw):
    path = tmp_path / "gram.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.read_pairs(path, corpus=gram.pairs, **kw)[0]


def test_gram(tmp_path):
    """Catches a preference that changes sides, and marks that stay in the text."""
    rows = [
        {"instruction": asked(), "input": "", "output": "B"},
        {"instruction": asked("Q\n\n1", "x\ny", "z"), "input": "", "output": "A"},
    ]
    assert read(tmp_path, *rows) == [
        {"id": "1", "prompt": "Why?", "chosen": "Two.", "rejected": "One."},
        {"id": "2", "prompt": "Q\n\n1", "chosen": "x\ny", "rejected": "z"},
    ]


def test_gram_with_rationales_teaches_a_judge(tmp_path):
    """Catches a rationale of GRAM-R² that is lost, or shown with the letters exchanged."""
    output = "<think>\nFeedback: B is short.\n</think>\n<answer>\nB\n</answer>"
    (record,) = read(tmp_path, {"instruction": asked(what="Response"), "output": output})
    assert record["extra"] == {"rationale": "Feedback: B is short.", "first": "rejected"}
    ((made,), _) = judges.completions([record], seed=0)
    assert verdict.parse(made["completion"]).verdict == "B"
    assert made["prompt"].index("One.") < made["prompt"].index("Two.")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "[User Question]\nq", "output": "A"}, "1:instruction: must hold"),
        ({"instruction": asked(a="[The End of Assistant A's Answer]"), "output": "A"}, "must hold"),
        ({"instruction": asked("x [User Question]"), "output": "A"}, "1:instruction: must hold"),
        ({"instruction": asked(), "output": "C"}, "1:output: names neither A nor B; .*'C'"),
        ({"instruction": asked(), "output": asked()}, "1:output: names neither"),
        ({"instruction": asked()}, "1:output: missing"),
        ({"output": "A"}, "1:instruction: missing"),
        ({"instruction": asked(a="Two."), "output": "A"}, "1:rejected: identical answers"),
    ],
)
def test_gram_rows_that_cannot_be_used_are_named(tmp_path, row, text):
    """Catches text of one answer that ends up in the other, or a guess at the preference."""
    with pytest.raises(ValueError, match=text):
        read(tmp_path, row)


HELPSTEER3 = {
    "context": "Name a prime.",
    "response1": "Seven.",
    "response2": "Nine.",
    "overall_preference": -2,
    "domain": "general",
    "individual_preference": [
        {"score": -2, "reasoning": "@Response 1 is right.", "feedback1": "Yes.", "feedback2": "No."}
    ],
}


def judged(tmp_path, text, *rows, reader=prompts.read, **kw):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reader(path, corpus=resolve_words("data.corpora", text), **kw)[0]


def test_a_corpus_of_judge_prompts(tmp_path):
    """Catches an order that is not the drawn one, and fields that do not reach the reward."""
    rows = [{**HELPSTEER3, "id": f"p{n}"} for n in range(12)]
    made = judged(tmp_path, "judged.prompts,source=helpsteer3.pairs,seed=3", *rows)
    pairs = [pair(n, subset="general") for n in range(12)]
    want = judges.rows(pairs, seed=3)
    assert [{k: r[k] for k in r if k != "extra"} | r["extra"] for r in made] == want
    assert not any("held_out_by" in r["extra"] for r in made)  # no reward is told
    assert {r["extra"]["label"] for r in made} == {"A", "B"}
    for record in made:
        graded = verdict.agreement(
            "", f"<answer>{record['extra']['label']}</answer>", record["extra"]
        )
        assert graded["accuracy"] == 1


def test_a_corpus_of_both_orders(tmp_path):
    """Catches a second order under the id of the first."""
    made = judged(tmp_path, "judged.prompts,both=1", *PAIRS[:2])
    assert [r["id"] for r in made] == ["p0:1", "p0:2", "p1:1", "p1:2"]
    assert [r["extra"]["pair"] for r in made] == ["p0", "p0", "p1", "p1"]
    # Written and read again, with a source that could not read them: they pass.
    rows = judges.rows(PAIRS[:2], seed=0, both=True)
    assert judged(tmp_path, "judged.prompts,source=gram.pairs", *rows) == made
    with pytest.raises(ValueError, match=r"rows\.jsonl:5:label: is no row of judges\.row"):
        judged(tmp_path, "judged.prompts", *rows, PAIRS[0])


# Three pairs of each of 30 requests, ten of which are messages.
ASKED = [
    pair(
        n,
        prompt=f"Request {n % 30}?"
        if n % 30 < 20
        else [{"role": "user", "content": f"Request {n % 30}?"}],
        chosen=f"Yes, {n}.",
        extra={"rationale": "A is better.", "first": "chosen"},
    )
    for n in range(90)
]


@pytest.mark.parametrize("way", ["rows", "corpus", "one order", "completions", "written"])
def test_a_request_is_held_out_whole(tmp_path, way):
    """Catches two pairs of a request, or the two orders of a pair, on both sides of the split: from
    pairs, through either corpus, and through a file of rows; and a side that depends on the way."""
    flat = [{k: p[k] for k in p if k != "extra"} | p["extra"] for p in ASKED]
    if way == "rows":
        made = judges.rows(ASKED, seed=0, both=True)
    elif way == "corpus":
        made = judged(tmp_path, "judged.prompts,both=1", *flat)
    elif way == "one order":
        made = judged(tmp_path, "judged.prompts", *flat)
    elif way == "completions":
        made = judged(tmp_path, "judged.completions", *flat, reader=conversations.read)
    else:
        rows = judges.rows(ASKED, seed=0, both=True)
        made = judged(tmp_path, "judged.prompts", *rows)
    assert len(made) == (180 if way in ("rows", "corpus", "written") else 90)
    request = lambda r: int(r["id"].split(":")[0][1:]) % 30
    want = {request(p) for p in sources.by_prompt(ASKED, 0.3, 0)[1]}
    assert {n < 20 for n in want} == {True, False}
    for records in (made, made[::-1]):
        train, held = sources.by_prompt(records, 0.3, 0)
        assert {request(r) for r in held} == want
        assert {request(r) for r in train} == set(range(30)) - want


def test_pairs_without_a_prompt_are_held_out_whole():
    """Catches orders that part where there is no request to hold out by."""
    bare = [pair(n, prompt="", chosen=f"Seven {n}.") for n in range(40)]
    train, held = sources.by_prompt(judges.rows(bare, seed=0, both=True), 0.3, 0)
    assert held and not {r["pair"] for r in train} & {r["pair"] for r in held}


def test_pairs_that_say_what_they_are_held_out_by_are_heard(tmp_path):
    """Catches a pair's own field that the corpus drops, and one that is no text."""
    (made,) = judged(tmp_path, "judged.prompts", pair(0, held_out_by="a book"))
    assert made["held_out_by"] == "a book"
    with pytest.raises(ValueError, match=r"1:held_out_by: must be str or a list of messages"):
        judged(tmp_path, "judged.prompts", pair(0, held_out_by=3))


def test_a_corpus_of_judge_completions(tmp_path):
    """Catches a letter or a rationale of the other answer; what has none is named and counted."""
    read = conversations.read
    rows = [{**HELPSTEER3, "id": f"p{n}"} for n in range(6)]
    text = "judged.completions,source=helpsteer3.pairs"
    made = judged(tmp_path, text, *rows, reader=read)
    asked = judges.rows([pair(n) for n in range(6)], seed=0)
    for record, want in zip(made, asked, strict=True):
        said = verdict.parse(record["completion"])
        assert (record["id"], record["prompt"]) == (want["id"], want["prompt"])
        assert said.fault is None and said.verdict == want["label"]
        assert f"Response {want['label']}: Yes." in said.blocks["think"]
    tie = {**HELPSTEER3, "overall_preference": 0}
    bare = {**HELPSTEER3, "individual_preference": []}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2:overall_preference: tie"):
        judged(tmp_path, text, HELPSTEER3, tie, reader=read)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no rationale"):
        judged(tmp_path, text, bare, reader=read)
    with pytest.warns(UserWarning, match=r"skipped 2 of 3 .* tie \(1\); no rationale \(1\)"):
        judged(tmp_path, text, HELPSTEER3, tie, bare, reader=read, on_bad="skip")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: pair 'p0': rationale must be"):
        judged(tmp_path, "judged.completions", {**PAIRS[0], "rationale": 3}, reader=read)


def test_every_source_is_the_corpus_of_its_name():
    """Catches a name that stands for another corpus."""
    for name, function in corpus.SOURCES.items():
        assert resolve_words("data.corpora", name).func is function


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("judged.prompts,source=gram", KeyError, "no source 'gram'; sources: gram.pairs, helpst"),
        ("judged.prompts,both=2", ValueError, "both must be 0 or 1; received 2"),
        ("judged.prompts,stage=video", ValueError, "stage must be one of text, caption, media"),
        ("judged.prompts,which=safer", ValueError, "does not take which, and no source is named"),
        ("judged.completions,source=gram.pairs,which=x", ValueError, "source gram.pairs .*'which'"),
    ],
)
def test_words_that_a_corpus_does_not_know(text, error, says, tmp_path):
    """Catches a misspelt word that leaves the pairs as they are."""
    with pytest.raises(error, match=says):
        judged(tmp_path, text, PAIRS[0])


def test_keywords_reach_the_source(tmp_path):
    """Catches a word that stops at the judge: here, which answer is the better one."""
    row = {
        "prompt": "Name a prime.",
        "response_0": "Seven.",
        "response_1": "Nine.",
        "better_response_id": 0,
        "safer_response_id": 1,
        "is_response_0_safe": True,
        "is_response_1_safe": True,
    }
    made = [
        judged(tmp_path, f"judged.prompts,source=pku_saferlhf.pairs{more}", row)[0]
        for more in ("", ",which=safer")
    ]
    # The same draw, so the better answer is shown in the same place, and it is another answer.
    assert made[0]["extra"]["label"] == made[1]["extra"]["label"]
    a = [m["prompt"].index("Seven.") < m["prompt"].index("Nine.") for m in made]
    assert a[0] != a[1]
