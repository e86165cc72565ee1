"""Files that are damaged, foreign or huge: one clear error with its place, or a count."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest

from jaxreward.data import conversations, formats, points, sources
from jaxreward.data.corpora import helpsteer3, unpaired

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
POINT = {"prompt": "q", "answer": "a", "label": 1}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
DONE = {"prompt": "q", "completion": "a"}
READERS = {
    "pairs": (sources.read_pairs, PAIR),
    "prompts": (sources.read_prompts, {"prompt": "q"}),
    "answers": (sources.read_answers, {"prompt": "q", "answer": "a"}),
    "points": (points.read, POINT),
    "conversations": (conversations.read, DONE),
}
SKIPPING = ["pairs", "points", "conversations"]


def write(folder, *rows, name="rows.jsonl", end=b"\n"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + end for line in lines))
    return path


WRONG = {
    "text": [3, True, 1.5, {}, {"role": "user"}, [], [3], [[]], [None], [{}], [{"role": "user"}]],
    "number": ["1", True, [], {}, [1], 10**400, float("nan"), float("inf")],
    "name": [1.5, True, [], {}, [1]],
    "str": [3, True, [], {}],
}
FIELDS = [
    *(("pairs", PAIR, field, "text") for field in PAIR),
    *(
        ("pairs", {**PAIR, "chosen_score": 1, "rejected_score": 2}, field, "number")
        for field in ("margin", "weight", "chosen_score", "rejected_score")
    ),
    *((name, row, "id", "name") for name, (_, row) in READERS.items()),
    *((name, row, "prompt", "text") for name, (_, row) in READERS.items()),
    *((name, READERS[name][1], "subset", "str") for name in ("pairs", "points")),
    ("answers", READERS["answers"][1], "answer", "text"),
    ("points", POINT, "answer", "text"),
    ("points", POINT, "weight", "number"),
    ("conversations", DONE, "completion", "text"),
    ("conversations", CHAT, "messages", "text"),
    ("conversations", {"text": "t"}, "text", "text"),
]


@pytest.mark.parametrize(("reader", "row", "field", "kind"), FIELDS)
def test_a_wrong_type_is_named(tmp_path, reader, row, field, kind):
    """Catches a field whose wrong type passes, or ends in an error without its place."""
    read, _ = READERS[reader]
    for value in WRONG[kind]:
        path = write(tmp_path, row, {**row, field: value})
        with pytest.raises(ValueError, match=rf"rows\.jsonl:2:{field}(\[0\])?: \w"):
            read(path)
        if reader in SKIPPING:
            with pytest.warns(UserWarning, match="skipped 1 of 2 lines"):
                _, report = read(path, on_bad="skip")
            assert report["kept"] == 1 and sum(report["skipped"].values()) == 1


@pytest.mark.parametrize("reader", SKIPPING)
def test_nothing_left_after_skipping(tmp_path, reader):
    """Catches a run on no data where every row was skipped, with a corpus and without."""
    read, _ = READERS[reader]
    path = write(tmp_path, {"x": 1}, b"{", {"x": 2})
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no usable .* in 3 lines: .*\(2\)"):
        read(path, on_bad="skip")
    with pytest.raises(ValueError, match=r"no usable .* in 3 rows of the corpus: .*\(2\)"):
        read(path, on_bad="skip", corpus=helpsteer3.pairs)
    with pytest.raises(ValueError, match=r"no usable .* in 0 rows of the corpus"):
        read(path, on_bad="skip", corpus=lambda rows: iter(()))


@pytest.mark.parametrize("reader", READERS)
def test_nul_is_refused(tmp_path, reader):
    """Catches a NUL, the mark of a damaged file, that goes on to the tokenizer; escaped in JSON it
    is a character, and raw it is no JSON at all."""
    read, row = READERS[reader]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2:prompt: holds a NUL character"):
        read(write(tmp_path, row, {**row, "prompt": "a\0b"}))
    messages = [{"role": "user", "content": "\0"}]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1:prompt\[0\]\.content: holds a NUL"):
        read(write(tmp_path, {**row, "prompt": messages}))
    for line in (b'{"prompt": "a\0b"}', b"\0" * 100):
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: line must be a JSON object"):
            read(write(tmp_path, row, line))


def test_ten_megabytes_are_read(tmp_path):
    """Catches a long document that is refused, cut or altered."""
    long = "wörd " * 2_000_000
    path = write(tmp_path, {**PAIR, "prompt": long})
    assert path.stat().st_size > 10 << 20
    ((record,), _) = sources.read_pairs(path)
    assert record["prompt"] == long
    (record,), _ = conversations.read(write(tmp_path, {"text": long}))
    assert record["completion"] == long


HUGE = "x" * (10 << 20)


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (sources.read_pairs, {**PAIR, "chosen": [HUGE]}),
        (sources.read_pairs, {**PAIR, "chosen": {"a": HUGE}}),
        (sources.read_pairs, {**PAIR, "margin": HUGE}),
        (sources.read_pairs, {**PAIR, "id": [HUGE]}),
        (sources.read_pairs, {**PAIR, "subset": [HUGE] * 2}),
        (sources.read_pairs, {"prompt": HUGE, "chosen": HUGE, "rejected": HUGE}),
        (sources.read_pairs, {"chosen": "\n\nHuman:" + HUGE, "rejected": "\n\nHuman:" + HUGE}),
        (sources.read_pairs, {"chosen": [{"role": HUGE, "content": "a"}], "rejected": [{}]}),
        (
            sources.read_pairs,
            {key: [{"role": HUGE, "content": key}] for key in ("chosen", "rejected")},
        ),
        (sources.read_pairs, b'"' + HUGE.encode() + b'"'),
        (sources.read_pairs, b"{" + HUGE.encode()),
        (sources.read_answers, {HUGE: 1}),
        (sources.read_answers, {f"{i}": 1 for i in range(100_000)}),
        (conversations.read, {HUGE: 1}),
        (conversations.read, {"messages": HUGE}),
        (conversations.read, {"messages": [{"role": "user", "content": "x"}] * 100_000}),
        (conversations.read, {"prompt": "a", "completion": [{"role": HUGE, "content": "a"}]}),
        (points.read, {**POINT, "scores": HUGE, "label": None}),
    ],
)
def test_errors_stay_short(tmp_path, read, row):
    """Catches a message that carries the whole value into the terminal and the log."""
    with pytest.raises(ValueError, match=r"rows\.jsonl:1:?") as caught:
        read(write(tmp_path, row))
    assert len(str(caught.value)) < len(str(tmp_path)) + 600


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_line_ends_are_no_text(tmp_path, end):
    """Catches files of Windows: a byte order mark, and line ends of both kinds in one file."""
    path = write(tmp_path, PAIR, PAIR, end=end)
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n \t\r\n" + json.dumps(PAIR).encode()
    )
    records, report = sources.read_pairs(path)
    assert report["read"] == 3 and [r["id"] for r in records] == ["1", "2", "5"]
    assert all({**PAIR, "id": r["id"]} == r for r in records)
    utf16 = tmp_path / "utf16.jsonl"
    utf16.write_bytes(json.dumps(PAIR).encode("utf-16"))
    with pytest.raises(ValueError, match=r"utf16\.jsonl:1: line must be UTF-8; received byte 0xff"):
        sources.read_pairs(utf16)


def test_a_gzip_file_cut_short_says_where(tmp_path):
    """Catches half a download that trains: the rows before the cut are no data set."""
    rows = [{**PAIR, "prompt": f"{i} {os.urandom(300).hex()}"} for i in range(200)]
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path = tmp_path / "rows.jsonl.gz"
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for on_bad in ("error", "skip"):
            with pytest.raises(ValueError, match=r"gz:\d+: not a complete gzip file") as caught:
                sources.read_pairs(path, on_bad=on_bad)
    assert ":201:" in str(caught.value)
    path.write_bytes(json.dumps(PAIR).encode())
    with pytest.raises(ValueError, match=r"gz:1: not a complete gzip file \(Not a gzipped file"):
        sources.read_pairs(path)


@pytest.mark.parametrize("act", [sources.read_pairs, sources.data_hash, formats.exists])
def test_a_folder_is_no_file(tmp_path, act):
    """Catches an error that does not say which file of the folder to give."""
    write(tmp_path, PAIR, name="train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"is a folder; give one file of it: train\.jsonl"):
        act(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"it is empty"):
        (tmp_path / "none").mkdir()
        act(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrayrecord"]
)
def test_a_file_that_may_not_be_read_is_named(name):
    """Catches missing permission told as a damaged file, whose remedy would not help."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = write(Path(folder), PAIR, name=name)
        path.chmod(0)
        me = os.geteuid()
        try:
            if me == 0:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(PermissionError, match=rf"{name} may not be read by this user"):
                sources.read_pairs(path)
        finally:
            os.seteuid(me)


def test_a_corpus_is_applied_before_parsing(tmp_path):
    """Catches a reader that leaves the corpus out, or applies it to what it parsed."""
    seen = []

    def corpus(rows):
        for number, row in rows:
            seen.append(row)
            yield number + 10, {**row, "prompt": "new", "completion": "c", "label": 1}

    path = write(tmp_path, {"any": 1})
    assert sources.read_prompts(path, corpus=corpus)[0]["prompt"] == "new"
    assert sources.read_answers(path, corpus=corpus)[0]["answers"] == ["c"]
    assert conversations.read(path, corpus=corpus)[0][0]["id"] == "11"
    assert points.read(path, corpus=corpus)[0][0]["answer"] == "c"
    with pytest.raises(ValueError, match=r"rows\.jsonl:11:chosen: missing.*unpaired\.pairs"):
        sources.read_pairs(path, corpus=corpus)
    assert seen == [{"any": 1}] * 5
    rows = [{"prompt": "q", "completion": c, "label": c == "a"} for c in "ab"]
    (record,), report = sources.read_pairs(write(tmp_path, *rows), corpus=unpaired.pairs)
    assert record == {**PAIR, "id": "1-2"} and report["read"] == 1
