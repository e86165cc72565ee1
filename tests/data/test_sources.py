"""JSON Lines: what is read, what is refused, and what the refusal says."""

import collections
import gzip
import hashlib
import io
import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxreward.data import formats, sources

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return path


def test_read_pairs_fields(tmp_path):
    """Optional fields, the default id and unknown fields must all survive."""
    full = {**GOOD, "id": 7, "margin": 1, "weight": 0.5, "subset": "s", "note": [1], "lang": None}
    records, report = sources.read_pairs(write(tmp_path, GOOD, b"", full))
    assert records[0] == {**GOOD, "id": "1"}
    assert records[1] == {
        **GOOD,
        "id": "7",
        "margin": 1.0,
        "weight": 0.5,
        "subset": "s",
        "extra": {"note": [1], "lang": None},
    }
    assert report == {"read": 2, "kept": 2, "skipped": {}}


@pytest.mark.parametrize(
    ("row", "place", "words"),
    [
        (b"{", "2", "must be a JSON object"),
        (b"[1]", "2", "received list"),
        (b'{"prompt": "\xff"}', "2", "UTF-8; received byte 0xff"),
        (b"[" * 100_000, "2", "too deeply"),
        (b'{"margin": ' + b"1" * 5000 + b"}", "2", "must be a JSON object"),
        ({"prompt": "q", "chosen": "a"}, "2:rejected", "missing"),
        ({"prompt": "q", "chosen": "a", "rejectd": "b"}, "2:rejected", "did you mean .*rejectd"),
        ({**GOOD, "rejected": None}, "2:rejected", "missing"),
        ({**GOOD, "chosen": 3}, "2:chosen", "str or a list of messages; received int 3"),
        ({**GOOD, "chosen": []}, "2:chosen", "must not be empty"),
        ({**GOOD, "rejected": [assistant("b")]}, "2:rejected", "received str and list"),
        ({**GOOD, "prompt": [{"role": "user"}]}, r"2:prompt\[0\]", "str content"),
        ({**GOOD, "prompt": ["q"]}, r"2:prompt\[0\]", "str role; received str 'q'"),
        ({**GOOD, "rejected": "a"}, "2:rejected", "identical answers"),
        ({**GOOD, "margin": "1"}, "2:margin", "must be a number; received str '1'"),
        ({**GOOD, "margin": True}, "2:margin", "must be a number; received bool"),
        ({**GOOD, "margin": float("nan")}, "2:margin", "must be finite"),
        ({**GOOD, "weight": -1}, "2:weight", ">= 0; received float -1.0"),
        ({**GOOD, "weight": 10**400}, "2:weight", "must be finite"),
        ({**GOOD, "subset": 3}, "2:subset", "must be str"),
        ({**GOOD, "id": [1]}, "2:id", "str or int"),
        ({**GOOD, "chosen": "\ud800"}, "2:chosen", "surrogate"),
        ({"chosen": "a", "rejected": "b"}, "2:prompt", "give a prompt"),
        (
            {"chosen": "\n\nHuman: q\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            r"2:chosen\|rejected",
            "both Human",
        ),
        (
            {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "2:chosen",
            "assistant's",
        ),
        (
            {
                **GOOD,
                "chosen": [user("z"), assistant("a")],
                "rejected": [user("z"), assistant("b")],
            },
            "2:prompt",
            "does not agree",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, row, place, words):
    """Each fault must be refused with file, line, field and what came; skipping counts it."""
    path = write(tmp_path, GOOD, row)
    with pytest.raises(ValueError, match=f"data.jsonl:{place}: .*{words}"):
        sources.read_pairs(path)
    with pytest.warns(UserWarning, match="skipped 1 of 2 lines"):
        records, report = sources.read_pairs(path, on_bad="skip")
    assert len(records) == report["kept"] == 1
    assert sum(report["skipped"].values()) == 1


def test_skips_are_counted_by_reason(tmp_path):
    """Equal faults with different values must be counted together, and said once."""
    rows = [GOOD, {**GOOD, "margin": "x"}, {**GOOD, "margin": "y"}, {**GOOD, "rejected": "a"}]
    with pytest.warns(UserWarning) as caught:
        _, report = sources.read_pairs(write(tmp_path, *rows), on_bad="skip")
    assert len(caught) == 1
    assert report["skipped"] == {"margin: must be a number": 2, "rejected: identical answers": 1}


def test_nothing_left(tmp_path):
    """An empty file, and one whose every row is bad, must not pass as an empty data set."""
    with pytest.raises(ValueError, match=r"data.jsonl is empty"):
        sources.read_pairs(write(tmp_path, b"", b"  "))
    with pytest.raises(ValueError, match=r"no usable pair in 1 lines: rejected: identical"):
        sources.read_pairs(write(tmp_path, {**GOOD, "rejected": "a"}), on_bad="skip")


def test_missing_file_names_near_misses(tmp_path):
    """A misspelt path should suggest the file that is there."""
    write(tmp_path, GOOD, name="pairs.jsonl")
    with pytest.raises(FileNotFoundError, match=r"did you mean pairs.jsonl"):
        sources.read_pairs(tmp_path / "pair.jsonl")


def test_limit_and_options(tmp_path):
    """The limit counts good rows; wrong options are named."""
    path = write(tmp_path, GOOD, GOOD, b"{")
    assert sources.read_pairs(path, limit=2)[1]["read"] == 2
    with pytest.raises(ValueError, match="on_bad"):
        sources.read_pairs(path, on_bad="ignore")
    with pytest.raises(ValueError, match="limit"):
        sources.read_pairs(path, limit=0)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (  # HH-RLHF as published: no prompt field
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: b",
            },
            [user("q")],
            [assistant("a")],
            [assistant("b")],
        ),
        (  # message lists sharing their beginning
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            [user("q")],
            [assistant("a")],
            [assistant("b")],
        ),
        (  # the prompt both as text and inside the lists must not be asked twice
            {
                "prompt": "q",
                "chosen": [{"role": "system", "content": "s"}, user("q"), assistant("a")],
                "rejected": [{"role": "system", "content": "s"}, user("q"), assistant("b")],
            },
            [{"role": "system", "content": "s"}, user("q")],
            [assistant("a")],
            [assistant("b")],
        ),
        (
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [user("q")],
            [assistant("a")],
            [assistant("b")],
        ),
        (  # dialogues that part at a user turn, as `read_pairs` itself writes them
            {
                "prompt": [user("q"), assistant("p")],
                "chosen": [user("r"), assistant("a")],
                "rejected": [user("s"), assistant("b")],
            },
            [user("q"), assistant("p")],
            [user("r"), assistant("a")],
            [user("s"), assistant("b")],
        ),
        (
            {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "q",
            [assistant("a")],
            [assistant("b")],
        ),
    ],
)
def test_prompt_is_split_off(tmp_path, row, prompt, chosen, rejected):
    """Wherever the prompt stands, it ends up in `prompt` once and in no answer."""
    (record,), _ = sources.read_pairs(write(tmp_path, row))
    assert (record["prompt"], record["chosen"], record["rejected"]) == (prompt, chosen, rejected)


def test_read_prompts(tmp_path):
    """Fields that checkers need later must come through."""
    path = write(tmp_path, {"prompt": "q", "answer": "4"}, {"prompt": [user("q")], "id": "x"})
    assert sources.read_prompts(path) == [
        {"id": "1", "prompt": "q", "extra": {"answer": "4"}},
        {"id": "x", "prompt": [user("q")]},
    ]


def test_read_answers(tmp_path):
    """Every accepted spelling gives answers in order, with the row as it was."""
    rows = [
        {"prompt": "q", "response": "a", "k": 1},
        {"completion": "\n\nHuman: q\n\nAssistant: a"},
        GOOD,
    ]
    one, two, three = sources.read_answers(write(tmp_path, *rows))
    assert one == {
        "id": "1",
        "prompt": "q",
        "answers": ["a"],
        "names": ["response"],
        "row": rows[0],
    }
    assert (two["prompt"], two["answers"]) == ([user("q")], [[assistant("a")]])
    assert (three["answers"], three["names"]) == (["a", "b"], ["chosen", "rejected"])
    with pytest.raises(ValueError, match=r"data.jsonl:1:answer: .*received answer, response"):
        sources.read_answers(write(tmp_path, {"prompt": "q", "answer": "a", "response": "b"}))
    with pytest.raises(ValueError, match=r"data.jsonl:1:answer: .*received the fields 'prompt'"):
        sources.read_answers(write(tmp_path, {"prompt": "q"}))


def test_read_jsonl_numbers_lines(tmp_path):
    """Blank lines and U+2028 inside a string must not shift or split lines; a BOM is no text."""
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\n\n{"a": 2}'.encode())
    assert sources.read_jsonl(path) == [(1, {"a": "x\u2028y"}), (3, {"a": 2})]
    with pytest.raises(ValueError, match=r"x.jsonl:1: config: line must"):
        sources.read_jsonl(write(tmp_path, b"7", name="x.jsonl"), what="config")


def test_write_is_atomic_and_round_trips(tmp_path):
    """A record that fails half-way must leave the old file and no litter behind."""
    path = tmp_path / "out.jsonl"
    assert sources.write_jsonl(path, [{"a": "é"}, {"b": 2}]) == 2
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"b": 2}\n'
    with pytest.raises(ValueError, match="record 2 cannot be written as JSON"):
        sources.write_jsonl(path, [{"a": 1}, {"b": float("nan")}])
    with pytest.raises(ValueError, match="record 1 cannot be written as JSON"):
        sources.write_jsonl(path, [{"a": {1}}])
    assert sources.read_jsonl(path) == [(1, {"a": "é"}), (2, {"b": 2})]
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(FileNotFoundError, match="create it first"):
        sources.write_jsonl(tmp_path / "no" / "x.jsonl", [])


def test_gzip_round_trip_and_damage(tmp_path):
    """.gz must be compressed, read back, written the same every time, and refused when cut."""
    path = tmp_path / "out.jsonl.gz"
    sources.write_jsonl(path, [GOOD])
    first = path.read_bytes()
    assert gzip.decompress(first) == json.dumps(GOOD).encode() + b"\n"
    assert sources.read_pairs(path)[0][0]["chosen"] == "a"
    sources.write_jsonl(path, [GOOD])
    assert path.read_bytes() == first
    for damaged in (first[:-6], b"no gzip", first[:12] + b"\xff\xff\xff" + first[15:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"out.jsonl.gz:\d+: not a complete gzip file"):
            sources.read_jsonl(path)


def test_standard_streams(monkeypatch):
    """ "-" must mean the streams, and nothing else may be written to them."""
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "q"}\n{')))
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(ValueError, match="standard input:2: line must"):
        sources.read_prompts("-")
    sources.write_jsonl("-", [{"a": 1}])
    assert out.buffer.getvalue() == b'{"a": 1}\n'


def test_data_hash(tmp_path):
    """The hash recorded with a run is that of the bytes."""
    path = write(tmp_path, GOOD)
    assert sources.data_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.data_hash(tmp_path / "none")


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "user"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_ROW = st.dictionaries(
    st.sampled_from(["id", "prompt", "chosen", "rejected", "margin", "weight", "subset"]), _JSON
)
_LINE = st.one_of(
    st.binary(max_size=40),
    _JSON.map(json.dumps).map(str.encode),
    _ROW.map(json.dumps).map(str.encode),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(_LINE, max_size=4))
@pytest.mark.parametrize("read", [sources.read_pairs, sources.read_answers, sources.read_prompts])
def test_garbage_raises_value_error_only(tmp_path, read, lines):
    """Whatever a file holds, a reader answers with records or a ValueError, never a crash."""
    path = tmp_path / "garbage.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        read(path)
    except ValueError as error:
        assert "garbage.jsonl" in str(error)


def test_scores_of_a_pair(tmp_path):
    """Catches scores that stay among the unknown fields, change sides, or come for one answer."""
    given = {**GOOD, "chosen_score": 8, "rejected_score": 2.5}
    (record,), _ = sources.read_pairs(write(tmp_path, given))
    assert record["scores"] == (8.0, 2.5) and "extra" not in record
    (record,), _ = sources.read_pairs(write(tmp_path, {**GOOD, "chosen_score": None}))
    assert "scores" not in record
    with pytest.raises(ValueError, match="jsonl:1:rejected_score: missing; chosen_score is there"):
        sources.read_pairs(write(tmp_path, {**GOOD, "chosen_score": 1}))
    with pytest.raises(ValueError, match="jsonl:1:chosen_score: must be a number"):
        sources.read_pairs(write(tmp_path, {**given, "chosen_score": "8"}))


def test_a_prompt_is_on_one_side():
    """Catches one prompt on both sides, and a draw that depends on the other records."""
    records = [{"prompt": f"p{i % 40}", "n": i} for i in range(80)]
    train, held = sources.by_prompt(records, 0.3, 1)
    assert len(train) + len(held) == 80 and 4 <= len(held) <= 48
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert sources.by_prompt(records[:40], 0.3, 1)[1] == [r for r in held if r["n"] < 40]
    assert sources.by_prompt(records, 0.0, 1) == (records, [])


def test_records_are_held_out_by_what_they_say(tmp_path):
    """Catches a field that a reader drops or hands to rewards, and one that is outweighed by the
    prompt."""
    rows = [{"prompt": f"p{i}", "held_out_by": f"book {i % 10}", "n": i} for i in range(40)]
    path = write(tmp_path, *rows, {"prompt": "p", "held_out_by": None})
    records = sources.read_prompts(path)
    assert records[3] == {"id": "4", "prompt": "p3", "held_out_by": "book 3", "extra": {"n": 3}}
    assert records.pop() == {"id": "41", "prompt": "p"}
    train, held = sources.by_prompt(records, 0.3, 1)
    assert train and held
    assert not {r["held_out_by"] for r in train} & {r["held_out_by"] for r in held}
    books = [{"prompt": f"book {i}"} for i in range(10)]
    named = {r["prompt"] for r in sources.by_prompt(books, 0.3, 1)[1]}
    assert {r["held_out_by"] for r in held} == named


def test_skipped_rows_are_noted_where_they_stand(tmp_path):
    """Catches rows that are counted and not noted: no JSON, images, refused by a corpus, and bad;
    and rows noted that are kept."""
    bad = {**GOOD, "rejected": "a"}
    path = write(tmp_path, b"{", GOOD, {**GOOD, "images": ["x"]}, bad, {**GOOD, "no": 1}, bad)

    def refused(row):
        if "no" in row:
            raise formats.Bad("no", field="no")
        return row

    corpus = lambda rows: formats.mapped(rows, refused)
    for convert, kept in ((None, ["2", "5"]), (corpus, ["2"])):
        noted = []
        with pytest.warns(UserWarning):
            records, report = sources.read_rows(
                path,
                sources.pair_of,
                what="pair",
                on_bad="skip",
                corpus=convert,
                noted=lambda number, reason: noted.append((number, reason)),
            )
        assert [record["id"] for record in records] == kept
        assert {number for number, _ in noted} == {1, 2, 3, 4, 5, 6} - {int(k) for k in kept}
        assert collections.Counter(reason for _, reason in noted) == report["skipped"]
