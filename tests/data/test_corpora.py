"""Public data sets: their documented rows, made up here, become the pairs and points they mean."""

import functools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxreward.data import conversations, formats, judges, points, sources
from jaxreward.data.corpora import (
    chosen,
    helpsteer2,
    helpsteer3,
    implicit,
    pku_saferlhf,
    skywork,
    ultrafeedback,
    unpaired,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def file(tmp_path):
    """Writes rows into a file."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def skipping(path, corpus, lines):
    """Pairs by `on_bad="skip"`, and what was skipped; the warning must count all rows."""
    with pytest.warns(UserWarning, match=rf"of {lines} rows of the corpus"):
        records, report = sources.read_pairs(path, on_bad="skip", corpus=corpus)
    return records, report["skipped"]


def test_ultrafeedback(file):
    """Catches scores that stay among the unknown fields or change sides, and a lost id."""
    row = {
        "prompt": "Name a prime.",
        "prompt_id": "f0e37e9f",
        "chosen": [user("Name a prime."), assistant("7")],
        "rejected": [user("Name a prime."), assistant("9")],
        "messages": [user("Name a prime."), assistant("7")],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    (record,), _ = sources.read_pairs(file(row), corpus=ultrafeedback.pairs)
    assert record == {
        "id": "f0e37e9f",
        "prompt": [user("Name a prime.")],
        "chosen": [assistant("7")],
        "rejected": [assistant("9")],
        "scores": (8.5, 2.0),
    }
    for field, value, words in (
        ("score_chosen", "8.5", "must be a number; received str '8.5'"),
        ("score_rejected", None, "missing"),
        ("prompt_id", 7, "must be str; received int 7"),
        ("chosen", None, "missing"),
    ):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{field}: {words}"):
            sources.read_pairs(file(row, {**row, field: value}), corpus=ultrafeedback.pairs)


def rated(prompt, response, helpfulness, **kw):
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 4,
        "complexity": 2,
        "verbosity": 1,
        **kw,
    }


def test_helpsteer2_pairs_neighbours(file):
    """Catches a swapped pair, a lost strength, ties that train, and pairs of different prompts."""
    path = file(
        rated("p", "worse", 1),
        rated("p", "better", 4),
        rated("q", "best", 3),
        rated("q", "good", 2),
        rated("tie", "a", 2),
        rated("tie", "b", 2),
        rated("alone", "a", 2),
        rated("r", "a", "2"),
        rated("r", "b", 3),
        rated("s", "a", 0),
        rated("s", "b", 4),
        rated("last", "a", 4),
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:5:helpfulness: tie"):
        sources.read_pairs(path, corpus=helpsteer2.pairs)
    records, skipped = skipping(path, helpsteer2.pairs, 8)
    assert records == [
        dict(id="1", prompt="p", chosen="better", rejected="worse", margin=3.0, scores=(4.0, 1.0)),
        dict(id="3", prompt="q", chosen="best", rejected="good", margin=1.0, scores=(3.0, 2.0)),
        dict(id="10", prompt="s", chosen="b", rejected="a", margin=4.0, scores=(4.0, 0.0)),
    ]
    assert skipped == {
        "helpfulness: tie": 1,
        "prompt: no second row beside it has this prompt": 3,
        "helpfulness: must be a number": 1,
    }


def test_helpsteer2_preferences(file):
    """Catches the wrong sign, a tie that trains, and validation rows in a training set."""
    row = {"prompt": "p", "response_1": "one", "response_2": "two", "split": "train"}
    path = file(
        {**row, "preference_strength": -2},
        {**row, "preference_strength": 3, "split": "val"},
        {**row, "preference_strength": 0},
        {**row, "preference_strength": 4},
        {**row, "preference_strength": 1, "response_1": None},
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:3:preference_strength: tie"):
        sources.read_pairs(path, corpus=helpsteer2.pairs)
    records, skipped = skipping(path, helpsteer2.pairs, 5)
    assert [(r["chosen"], r["rejected"], r["margin"]) for r in records] == [
        ("one", "two", 2.0),
        ("two", "one", 3.0),
    ]
    assert skipped == {
        "preference_strength: tie": 1,
        "preference_strength: must be from -3 to 3": 1,
        "response_1: missing": 1,
    }
    only = functools.partial(helpsteer2.pairs, split="val")
    ((record,), report) = sources.read_pairs(path, corpus=only)
    assert record["id"] == "2" and report == {"read": 1, "kept": 1, "skipped": {}}


def test_helpsteer2_turns_become_messages(file):
    """Catches markers of turns that are read as the user's words."""
    prompt = "hi\n\nthere\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nbye"
    path = file(rated(prompt, "a", 1), rated(prompt, "b", 2))
    (record,), _ = sources.read_pairs(path, corpus=helpsteer2.pairs)
    assert record["prompt"] == [user("hi\n\nthere"), assistant("hello"), user("bye")]
    assert (record["chosen"], record["rejected"]) == ("b", "a")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1:prompt: last turn must be the user's"):
        sources.read_pairs(
            file(rated("a\n<extra_id_1>Assistant\nb", "c", 1)), corpus=helpsteer2.pairs
        )


def test_helpsteer2_points(file):
    """Catches an attribute that is lost or renamed, and a null that becomes a number."""
    path = file(rated("p", "a", 3, verbosity=None), rated("p", "b", 0))
    rows = list(helpsteer2.points(formats.rows(path)))
    assert [number for number, _ in rows] == [1, 2]
    assert rows[0][1] == {
        "id": None,
        "prompt": "p",
        "completion": "a",
        "scores": dict(helpfulness=3, correctness=4, coherence=4, complexity=2, verbosity=None),
    }
    records, _ = points.read(path, corpus=helpsteer2.points)
    assert [r["answer"] for r in records] == ["a", "b"] and records[1]["scores"]["helpfulness"] == 0
    nothing = dict.fromkeys(helpsteer2.ATTRIBUTES)
    for bad, field in ((nothing, "helpfulness"), ({"coherence": "4"}, "coherence")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1:{field}: m"):
            points.read(file({**rated("p", "a", 3), **bad}), corpus=helpsteer2.points)


def test_helpsteer3(file):
    """Catches the wrong sign: below 0 the first response is better, as the card's scale says."""
    row = {
        "domain": "code",
        "language": "python",
        "context": [user("q"), assistant("r"), user("s")],
        "response1": "one",
        "response2": "two",
        "individual_preference": [{"score": -2, "reasoning": "clear"}],
    }
    path = file(
        {**row, "overall_preference": -2},
        {**row, "overall_preference": 1, "domain": "stem", "context": "q"},
        {**row, "overall_preference": 0},
        {**row, "overall_preference": 0},
        {**row, "overall_preference": 2, "domain": 3},
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:3:overall_preference: tie"):
        sources.read_pairs(path, corpus=helpsteer3.pairs)
    records, skipped = skipping(path, helpsteer3.pairs, 5)
    assert records[0] == {
        "id": "1",
        "prompt": row["context"],
        "chosen": "one",
        "rejected": "two",
        "margin": 2.0,
        "subset": "code",
        "extra": {"language": "python", "rationale": {"comparison": "clear"}},
    }
    assert records[1]["extra"] == {"language": "python"}  # the annotator preferred the other one
    assert (records[1]["prompt"], records[1]["chosen"], records[1]["margin"]) == ("q", "two", 1.0)
    assert skipped == {"overall_preference: tie": 2, "domain: must be str": 1}
    # Not only pairs: the same rows are answers to score.
    (answers,) = sources.read_answers(path, corpus=helpsteer3.pairs, limit=1)
    assert (answers["answers"], answers["names"]) == (["one", "two"], ["chosen", "rejected"])
    (prompt,) = sources.read_prompts(path, corpus=helpsteer3.pairs, limit=1)
    assert prompt["prompt"] == row["context"]


OPINIONS = [
    {"score": 1, "reasoning": "@Response 2 is shorter.", "feedback1": "f", "feedback2": "g"},
    {"score": 0, "reasoning": "About the same.", "feedback1": "f", "feedback2": "g"},
    {
        "score": -2,
        "reasoning": "@Response 1 is better than @response 2 by far.",
        "feedback1": "Complete, unlike Response 2.",
        "feedback2": "",
    },
    {"score": -3, "reasoning": "Later.", "feedback1": "f", "feedback2": "g"},
]


def test_helpsteer3_rationales(file):
    """Catches the words of one who preferred the other answer, feedback on the wrong side, and
    numbers of responses that the judge does not see."""
    row = {"context": "q", "response1": "one", "response2": "two"}
    path = file(
        {**row, "overall_preference": -2, "individual_preference": OPINIONS},
        {**row, "overall_preference": 1, "individual_preference": OPINIONS},
        {**row, "overall_preference": 1, "individual_preference": None},
        {**row, "overall_preference": 1, "individual_preference": OPINIONS[1:]},
    )
    records, _ = sources.read_pairs(path, corpus=helpsteer3.pairs)
    assert [record["extra"].get("rationale") for record in records] == [
        {
            "chosen": "Complete, unlike {rejected}.",
            "comparison": "{chosen} is better than {rejected} by far.",
        },
        {"chosen": "g", "rejected": "f", "comparison": "{chosen} is shorter."},
        None,
        None,
    ]
    for seed in (0, 1):
        first = judges.first_of(records[0], seed)
        assert first == ("rejected", "chosen")[seed]  # else one order is not tried
        (made,), _ = judges.completions(records[:1], seed=seed)
        better, worse = "AB" if first == "chosen" else "BA"
        assert f"Response {better} is better than Response {worse} by far." in made["completion"]
        assert f"Response {better}: Complete, unlike Response {worse}." in made["completion"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no", "individual_preference: must be a list of objects; received str 'no'"),
        ([3], "individual_preference: must be a list of objects; received list"),
        ([{"score": "1"}], r"individual_preference\[0\]\.score: must be a number"),
        ([{}, {"score": -1, "reasoning": 3}], r"preference\[1\]\.reasoning: must be str; received"),
    ],
)
def test_helpsteer3_opinions_of_another_form_are_named(file, value, words):
    """Catches opinions that are dropped in silence, and an error without its place."""
    row = {"context": "q", "response1": "one", "response2": "two", "overall_preference": -1}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1:.*{words}"):
        sources.read_pairs(file({**row, "individual_preference": value}), corpus=helpsteer3.pairs)


SAFE = {
    "prompt": "q",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def test_pku_saferlhf_pairs(file):
    """Catches helpful taken for safe, and an id that is no index."""
    (record,), _ = sources.read_pairs(file(SAFE), corpus=pku_saferlhf.pairs)
    assert record == {"id": "1", "prompt": "q", "chosen": "one", "rejected": "zero"}
    safer = functools.partial(pku_saferlhf.pairs, which="safer")
    (record,), _ = sources.read_pairs(file(SAFE), corpus=safer)
    assert (record["chosen"], record["rejected"]) == ("zero", "one")
    for value in (2, True, None, "1"):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1:safer_response_id: must be 0 or 1"):
            sources.read_pairs(file({**SAFE, "safer_response_id": value}), corpus=safer)
    with pytest.raises(ValueError, match="which must be 'better' or 'safer'; received 'best'"):
        pku_saferlhf.pairs(iter([]), which="best")


def test_pku_saferlhf_points(file):
    """Catches a label on the wrong answer, and two answers with one id."""
    path = file({**SAFE, "id": "x"}, {**SAFE, "is_response_0_safe": 1})
    records = [row for _, row in pku_saferlhf.points(formats.rows(path))]
    assert records[0] == {"id": "x-0", "prompt": "q", "completion": "zero", "label": True}
    assert records[1] == {"id": "x-1", "prompt": "q", "completion": "one", "label": False}
    with pytest.warns(UserWarning, match="skipped 1 of 4 rows"):
        read, report = points.read(path, corpus=pku_saferlhf.points, on_bad="skip")
    assert [(r["id"], r["label"]) for r in read] == [("x-0", True), ("x-1", False), ("2-1", False)]
    assert report["skipped"] == {"is_response_0_safe: must be a bool": 1}


def test_skywork(file):
    """Catches a prompt that stays in the answers, and a source that is no subset."""
    row = {
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "source": "magpie_ultra",
    }
    (record,), _ = sources.read_pairs(file(row), corpus=skywork.pairs)
    assert record == {
        "id": "1",
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "subset": "magpie_ultra",
    }
    with pytest.raises(ValueError, match=r"rows\.jsonl:1:source: must be str"):
        sources.read_pairs(file({**row, "source": ["x"]}), corpus=skywork.pairs)


def judged(prompt, completion, label, **kw):
    return {"prompt": prompt, "completion": completion, "label": label, **kw}


def test_unpaired(file):
    """Catches a pair of two good answers or across prompts, and prompts that vanish uncounted."""
    path = file(
        judged("p", "good 1", True, subset="s"),
        judged("only good", "a", True),
        judged("p", "bad", False),
        judged("only bad", "a", False),
        judged([user("p")], [assistant("good")], 1),
        judged("p", "good 2", True, weight=2),
        judged("only bad", "b", 0),
        judged([user("p")], [assistant("bad")], False),
        judged("p", "x", "yes"),
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:9:label: must be true or false; .*'yes'"):
        sources.read_pairs(path, corpus=unpaired.pairs)
    records, skipped = skipping(path, unpaired.pairs, 6)
    assert records == [
        dict(id="1-3", prompt="p", chosen="good 1", rejected="bad", subset="s"),
        dict(id="6-3", prompt="p", chosen="good 2", rejected="bad", weight=2.0),
        dict(id="5-8", prompt=[user("p")], chosen=[assistant("good")], rejected=[assistant("bad")]),
    ]
    assert skipped == {
        "label: must be true or false": 1,
        "prompt: has only good answers": 1,
        "prompt: has only bad answers": 1,
    }
    numbers = [n for n, row in unpaired.pairs(formats.rows(path)) if isinstance(row, formats.Bad)]
    assert numbers == [9, 2, 4]


@pytest.mark.parametrize("most", [1, 3, 5, 6, 100])
def test_unpaired_takes_at_most_so_many_pairs(file, most):
    """Catches the product of all answers of a prompt, pairs twice, and answers never taken."""
    rows = [judged("p", f"g{i}", True) for i in range(3)]
    rows += [judged("p", f"b{i}", False) for i in range(2)]
    corpus = functools.partial(unpaired.pairs, most=most)
    records, _ = sources.read_pairs(file(*rows), corpus=corpus)
    pairs = [(r["chosen"], r["rejected"]) for r in records]
    assert len(pairs) == len(set(pairs)) == min(most, 6)
    assert {c for c, _ in pairs} == {f"g{i}" for i in range(min(most, 3))}
    assert sources.read_pairs(file(*rows), corpus=corpus)[0] == records
    with pytest.raises(ValueError, match="most must be at least 1; received 0"):
        unpaired.pairs(iter([]), most=0)


def test_implicit_prompts(file):
    """Catches a word that is cut in two, and texts that have nothing in common."""
    path = file(
        {"chosen": "The sky is blue.", "rejected": "The sky is black.", "id": "x", "margin": 2},
        {"chosen": "A b", "rejected": "A b c"},
    )
    records, _ = sources.read_pairs(path, corpus=implicit.pairs)
    assert records[0] == {
        "id": "x",
        "prompt": "The sky is",
        "chosen": " blue.",
        "rejected": " black.",
        "margin": 2.0,
    }
    assert (records[1]["prompt"], records[1]["chosen"]) == ("A", " b")
    for row, words in (
        ({"chosen": "blue", "rejected": "black"}, "chosen: has no whole word in common"),
        ({"chosen": "", "rejected": "black"}, "chosen: has no whole word in common"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "prompt: is there"),
        ({"chosen": [user("a")], "rejected": "b"}, "chosen: must be str; messages need no corpus"),
    ):
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1:{words}"):
            sources.read_pairs(file(row), corpus=implicit.pairs)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (judged("p", "a", True), "unpaired.pairs"),
        (judged("p", "a", False), "unpaired.pairs"),
        (rated("p", "a", 0), "helpsteer2.pairs"),
        (
            dict(prompt="p", response_1="a", response_2="b", preference_strength=0),
            "helpsteer2.pairs",
        ),
        (
            dict(context="p", response1="a", response2="b", overall_preference=0),
            "helpsteer3.pairs",
        ),
        (SAFE, "pku_saferlhf.pairs"),
        (dict(chosen="a b", rejected="a c"), "implicit.pairs"),
    ],
)
def test_the_plain_reader_names_the_corpus(file, row, name):
    """Catches a newcomer's error that says only which field is missing."""
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1:\w+: missing; .*data\.corpus={name}"):
        sources.read_pairs(file(row))


def test_bad_lines_keep_their_numbers(tmp_path):
    """Catches an adapter that hides a line that is no JSON, or shifts the numbers after it."""
    path = tmp_path / "rows.jsonl"
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    path.write_text(f"{json.dumps(row)}\n\n{{\n{json.dumps({**row, 'source': 1})}\n")
    for corpus in (*PAIRS.values(), chosen.completions):
        bad = [(n, r) for n, r in corpus(formats.rows(path)) if isinstance(r, formats.Bad)]
        assert any(n == 3 and "line must be a JSON object" in r.reason for n, r in bad)
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: line must be a JSON object"):
        sources.read_pairs(path, corpus=skywork.pairs)
    records, skipped = skipping(path, skywork.pairs, 3)
    assert [r["id"] for r in records] == ["1"]
    assert skipped == {"line must be a JSON object": 1, "source: must be str": 1}


PAIRS = {
    "ultrafeedback": ultrafeedback.pairs,
    "helpsteer2": helpsteer2.pairs,
    "helpsteer3": helpsteer3.pairs,
    "pku_saferlhf": pku_saferlhf.pairs,
    "skywork": skywork.pairs,
    "unpaired": unpaired.pairs,
    "implicit": implicit.pairs,
}
_DIALOGUES = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
_RATED = [rated("p", "a", 1), rated("p", "b", 2)]
_PREFERRED = {"response_1": "a", "response_2": "b", "preference_strength": 1, "prompt": "p"}
_JUDGED = [judged("p", "a", True), judged("p", "b", False)]
# What reads, and good rows to spoil.
READERS = {
    "ultrafeedback": [{**_DIALOGUES, "prompt": "q", "score_chosen": 2, "score_rejected": 1}],
    "helpsteer2": [*_RATED, _PREFERRED],
    "helpsteer3": [
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -1}
    ],
    "pku_saferlhf": [SAFE],
    "skywork": [{**_DIALOGUES, "source": "s"}],
    "unpaired": _JUDGED,
    "implicit": [{"chosen": "b c", "rejected": "b d"}],
}
READERS = {
    name: (functools.partial(sources.read_pairs, corpus=PAIRS[name]), rows)
    for name, rows in READERS.items()
}
READERS |= {
    "pairs": (sources.read_pairs, [{**_DIALOGUES, "margin": 1, "weight": 1, "subset": "s"}]),
    "conversations": (
        conversations.read,
        [{"messages": _DIALOGUES["chosen"]}, {"text": "t"}, {"prompt": "p", "completion": "c"}],
    ),
    "chosen": (functools.partial(conversations.read, corpus=chosen.completions), [_DIALOGUES]),
    "helpsteer2 points": (functools.partial(points.read, corpus=helpsteer2.points), _RATED),
    "pku_saferlhf points": (functools.partial(points.read, corpus=pku_saferlhf.points), [SAFE]),
}
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "a\n<extra_id_1>User\nb", "a\0", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def spoilt(rows):
    """One of the rows, with up to two fields replaced."""
    fields = st.sampled_from(
        sorted({"id", "images", "tools", *(key for row in rows for key in row)})
    )
    changes = st.dictionaries(fields, _JSON, max_size=2)
    return st.builds(lambda row, change: {**row, **change}, st.sampled_from(rows), changes)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_any_rows_give_records_or_one_clear_error(file, name, data):
    """Catches a crash inside an adapter, and a row that stops a run that was told to skip it."""
    read, good = READERS[name]
    path = file(*data.draw(st.lists(spoilt(good), min_size=1, max_size=4)))
    try:
        read(path)
    except ValueError as error:
        assert "rows.jsonl" in str(error) and len(str(error)) < 1000
    try:
        records, report = read(path, on_bad="skip")
    except ValueError as error:
        assert "holds no usable" in str(error)
    else:
        assert report["read"] == report["kept"] + sum(report["skipped"].values())
        assert len(records) == report["kept"]
