"""Rows of every format: equal contents, named faults, nothing half read in silence."""

import datetime
import decimal
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward.data import formats, sources

ROWS = [
    {
        "prompt": f"Say {i}.",
        "chosen": f"{i}",
        "rejected": "ß no\u2028",
        "margin": i / 2,
        "id": f"p{i}",
    }
    for i in range(5)
]


def write(path, rows):
    """The rows in the format that the name asks for."""
    lines = [json.dumps(row).encode() for row in rows]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrayrecord":
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            writer.write(line)
        writer.close()
    else:
        data = b"".join(line + b"\n" for line in lines)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


NAMES = ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrayrecord"]


@pytest.mark.parametrize("file", NAMES)
def test_the_format_changes_nothing(file, tmp_path):
    """Catches rows lost between pieces, another order, and numbers that come back as text."""
    path = write(tmp_path / file, ROWS)
    assert list(formats.rows(path)) == list(enumerate(ROWS, start=1))
    assert sources.read_pairs(path) == sources.read_pairs(write(tmp_path / "x.jsonl", ROWS))


@pytest.mark.parametrize("file", NAMES)
def test_a_file_cut_short_is_named(file, tmp_path):
    """Catches a partial download that trains on what arrived, or an error of the library."""
    path = write(tmp_path / file, ROWS * 50)
    whole = path.read_bytes()
    for size in (len(whole) // 2 + 7, len(whole) - 5, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file}"):
            sources.read_pairs(path)


@pytest.mark.parametrize("file", NAMES)
def test_empty_files_are_named(file, tmp_path):
    """Catches a run on no data."""
    if file.endswith("parquet"):
        table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
        pyarrow.parquet.write_table(table, tmp_path / file)
    else:
        write(tmp_path / file, [])
    with pytest.raises(ValueError, match=f"{file} is empty"):
        sources.read_pairs(tmp_path / file)


@pytest.mark.parametrize("file", NAMES)
def test_a_bad_row_is_named_or_counted(file, tmp_path):
    """Catches a format whose faults cannot be skipped, or are skipped without a count."""
    path = write(tmp_path / file, [*ROWS[:2], {**ROWS[2], "rejected": None}, *ROWS[3:]])
    with pytest.raises(ValueError, match=rf"{file}:3:rejected: missing"):
        sources.read_pairs(path)
    with pytest.warns(UserWarning, match="skipped 1 of 5"):
        records, report = sources.read_pairs(path, on_bad="skip")
    assert len(records) == 4 and report["skipped"] == {"rejected: missing": 1}


def test_ultrafeedback_binarized_as_it_is(tmp_path):
    """Catches message lists of Parquet that are not understood: prompt a text, answers whole
    dialogues, with the field names of HuggingFaceH4/ultrafeedback_binarized."""
    say = lambda role, content: {"role": role, "content": content}
    row = {
        "prompt": "Name a prime.",
        "prompt_id": "f0e37e9f",
        "chosen": [say("user", "Name a prime."), say("assistant", "7")],
        "rejected": [say("user", "Name a prime."), say("assistant", "9")],
        "messages": [say("user", "Name a prime."), say("assistant", "7")],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    (record,), _ = sources.read_pairs(write(tmp_path / "train_prefs.parquet", [row]))
    plain = {**row, "chosen": "7", "rejected": "9"}
    (same,), _ = sources.read_pairs(write(tmp_path / "same.jsonl", [plain]))
    for name in ("chosen", "rejected"):
        answer = record[name]
        assert answer == same[name] or answer == [say("assistant", same[name])]
    assert record["extra"]["score_chosen"] == 8.5


def test_what_json_lacks_is_made_plain(tmp_path):
    """Catches a run that scores everything and then cannot write the row back."""
    row = {
        **ROWS[0],
        "time": datetime.datetime(2026, 1, 2, 3),
        "price": decimal.Decimal("1.50"),
        "image": b"\x00\x01",
        "nan": float("nan"),
    }
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    ((_, got),) = formats.rows(path)
    assert got["time"].startswith("2026-01-02") and got["price"] == "1.50"
    assert got["image"] == "2 bytes" and got["nan"] is None
    sources.write_jsonl(tmp_path / "out.jsonl", [got])


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    """Catches a file of another kind that is read into memory as one line."""
    monkeypatch.setattr(formats, "LONGEST", 1 << 10)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 2000)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: line of more than"):
        list(formats.rows(path))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), file=st.sampled_from(NAMES))
def test_any_bytes_give_rows_or_one_clear_error(data, file, tmp_path_factory):
    """Catches an exception of a library, or a crash, on a file that is something else."""
    path = tmp_path_factory.mktemp("fuzz") / file
    path.write_bytes(gzip.compress(data) if file.endswith(".gz") and len(data) % 2 else data)
    try:
        for number, row in formats.rows(path):
            assert number >= 1 and isinstance(row, dict | formats.Bad)
    except ValueError as error:
        assert str(path) in str(error)


def test_csv_keeps_text_as_it_is(tmp_path):
    """Catches puzzles that lose their zeros, and a short row that is filled up in silence."""
    path = tmp_path / "puzzles.csv"
    path.write_bytes('\ufeffPuzzle,Solution\n0042,"1,2"\n7\n'.encode())
    (number, row), (_, bad) = formats.rows(path)
    assert (number, row) == (2, {"Puzzle": "0042", "Solution": "1,2"})
    assert isinstance(bad, formats.Bad)
    assert "as many values" in bad.reason
    path.write_bytes(b'Puzzle\n"open\n')
    with pytest.raises(ValueError, match=r"puzzles\.csv:2: not CSV"):
        list(formats.rows(path))
