"""Rows of a file, whatever it is stored in: JSON Lines, Parquet, ArrayRecord, TFDS.

A row is a dict; a row that is none is handed on as `Bad`, so that the reader decides whether it
stops the run or is counted. Files are read piece by piece, never whole.
"""

import contextlib
import csv
import difflib
import gzip
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path

# A longer line is no record but a file of another kind, or a broken one.
LONGEST = 64 << 20
_ROWS = 256  # of a Parquet file at a time
_CAME = 200  # characters of what came, in a message

_TFDS = re.compile(
    r"tfds:(?P<name>\w+)(?:/(?P<config>\w[\w.+-]*))?(?::(?P<version>\d+\.\d+\.\d+))?(?:@(?P<split>.+))?"
)


class Bad(ValueError):
    """A row that cannot be used: the field, and why in words that hold for many rows."""

    def __init__(self, reason, *, field=None, came=""):
        if len(came) > _CAME:
            came = f"{came[:_CAME]}..."
        super().__init__(f"{reason}{f'; received {came}' if came else ''}")
        self.reason, self.field = reason, field


def rows(path):
    """Reads the rows of a file.

    Args:
      path: .parquet; .arrayrecord or .array_record, each record a JSON object; .csv with names in
        the first line, all values str; any other name is read as JSON Lines, gzip-compressed if it
        ends in .gz; "-" is standard input.
        "tfds:NAME[/CONFIG][:VERSION][@SPLIT]" is a TFDS data set prepared as ArrayRecord in
        TFDS_DATA_DIR (or ~/tensorflow_datasets): the newest version and the split train unless
        given. SPLIT may be a part, as in tfds:my_pairs@train[:90%]. Nothing is downloaded and no
        TensorFlow needed.

    Yields:
      (number from 1, dict or Bad). For JSON Lines the number is that of the line. Blank lines are
      skipped. Parquet's times and decimals become text, its NaN null, and bytes their count. The
      texts of TFDS, which are bytes, become str, and its sequences of dicts lists of dicts.

    Raises:
      FileNotFoundError: if there is no such file; names near misses.
      PermissionError: if it may not be read.
      ValueError: if the file is empty, cut short or of another kind.
    """
    if str(path) == "-":
        read = _json_lines
    elif is_tfds(path):
        read = _tfds
    else:
        exists(path)
        suffix = Path(path).suffix.lower()
        read = {
            ".csv": _csv,
            ".parquet": _parquet,
            ".arrayrecord": _array_record,
            ".array_record": _array_record,
        }.get(suffix, _json_lines)
    some = False
    for number, row in read(path):
        some = True
        yield number, row
    if not some:
        raise ValueError(f"{name(path)} is empty; expected JSON objects, one a line")


def mapped(rows, convert):
    """Numbered rows, each brought into another form.

    Args:
      rows: (number, dict or Bad), as `rows` yields them.
      convert: dict -> dict; raises Bad, which then stands in the row's place.

    Yields:
      (number, dict or Bad).
    """
    for number, row in rows:
        if not isinstance(row, Bad):
            try:
                row = convert(row)
            except Bad as bad:
                row = bad
        yield number, row


def name(path):
    """The path as messages have it."""
    return "standard input" if str(path) == "-" else str(path)


def is_tfds(path):
    """Whether the path names a TFDS data set."""
    return str(path).startswith("tfds:")


def exists(path):
    """Raises FileNotFoundError, with near misses, unless the path is a file that can be read, or a
    TFDS data set; PermissionError if the file may not be read."""
    if is_tfds(path):
        tfds_folder(path)
        return
    path = Path(path)
    if path.is_dir():
        held = sorted(p.name for p in path.iterdir())
        raise FileNotFoundError(
            f"data file {path} does not exist or is no file: it is a folder; give one file of it: "
            f"{_few(held)}"
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"data file {path} does not exist or is no file{_near(path.name, beside)}"
        )
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise PermissionError(
            f"data file {path} may not be read by this user; change its permissions"
        ) from error


def _near(word, known):
    near = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _few(names):
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "it is empty"


def show(value):
    """A value for a message: its type and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@contextlib.contextmanager
def _opened(path):
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with gzip.open(path) if str(path).endswith(".gz") else Path(path).open("rb") as stream:
        yield stream


def _json_lines(path):
    number = 0
    with _opened(path) as stream:
        try:
            # Split at \n alone: JSON strings may hold U+2028 and other line ends of str.splitlines.
            while line := stream.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise ValueError(
                        f"{name(path)}:{number}: line of more than {LONGEST >> 20} MiB; expected "
                        "JSON Lines, one record a line"
                    )
                if line := line.strip():
                    yield number, _parse(line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{name(path)}:{number + 1}: not a complete gzip file ({error}); "
                "download or compress it again"
            ) from error


def _parse(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad("line must be UTF-8", came=f"byte {error.object[error.start]:#04x}")
    except RecursionError:
        return Bad("JSON is nested too deeply")
    except ValueError as error:  # also integers too long for Python to convert
        return Bad("line must be a JSON object", came=f"{line[:40]!r} ({error})")
    return row if isinstance(row, dict) else Bad("line must be a JSON object", came=show(row))


def _csv(path):
    number = 1
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, strict=True), start=2):
                uneven = None in row or None in row.values()
                yield number, Bad("must have as many values as the first line") if uneven else row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{name(path)}:{number + 1}: not CSV in UTF-8 ({error})") from error


def _parquet(path):
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _plain(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name(path)}:{number + 1}: not a whole Parquet file ({_first(error)}); download or "
            "write it again"
        ) from error


def _plain(value):
    """What JSON can hold: a row that is read can be written back, with scores beside it."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    # Times and decimals as their text; bytes, of images mostly, only by their number.
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _array_record(path):
    from array_record.python import array_record_module

    number = 0
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        try:
            count = reader.num_records()
            for start in range(0, count, _ROWS):
                for record in reader.read(start, min(count, start + _ROWS)):
                    number += 1
                    yield number, _parse(record)
        finally:
            reader.close()
    except (RuntimeError, IndexError, OSError) as error:
        raise ValueError(
            f"{name(path)}:{number + 1}: not a whole ArrayRecord file ({_first(error)}); write it "
            "again"
        ) from error


def tfds_folder(path):
    """Where a TFDS data set lies.

    Args:
      path: "tfds:NAME[/CONFIG][:VERSION][@SPLIT]".

    Returns:
      (folder of its version, split).

    Raises:
      ValueError: if the name is of another form.
      FileNotFoundError: if it is not prepared; says how to.
    """
    parts = _TFDS.fullmatch(str(path))
    if parts is None:
        raise ValueError(
            f"{path}: expected tfds:NAME[/CONFIG][:VERSION][@SPLIT], such as "
            "tfds:my_pairs:1.0.0@train[:90%]"
        )
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    named = parts["name"] + (f"/{parts['config']}" if parts["config"] else "")
    beside = [p.name for p in sorted(root.iterdir()) if p.is_dir()] if root.is_dir() else []
    inside = [p for p in (root / named).iterdir() if p.is_dir()] if (root / named).is_dir() else []
    versions = [p for p in inside if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    versions = [p for p in versions if (p / "dataset_info.json").is_file()]
    wanted = [p for p in versions if parts["version"] in (None, p.name)]
    if wanted:
        folder = max(wanted, key=lambda p: [int(x) for x in p.name.split(".")])
        return folder, parts["split"] or "train"
    if versions:
        found = f"holds the versions {_few(sorted(p.name for p in versions))}."
    elif inside:
        found = f"holds the configs {_few(sorted(p.name for p in inside))}."
    else:
        found = f"is not there{_near(parts['name'], beside) or '.'}"
    raise FileNotFoundError(
        f"{path} is not prepared: {root / named} {found} Set TFDS_DATA_DIR, or prepare it where "
        f"TensorFlow is installed: tfds build {named} --data_dir={root} --file_format=array_record"
    )


def _tfds(path):
    folder, split = tfds_folder(path)
    import tensorflow_datasets as tfds

    try:
        text = (folder / "features.json").read_text(encoding="utf-8")
        json.loads(text, object_hook=_only_own_classes)
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split)
        count, features = len(source), builder.info.features
    except Exception as error:  # TFDS, protobuf and ArrayRecord have no error in common
        raise ValueError(f"{path}: cannot be read from {folder} ({_first(error)})") from error
    for start in range(0, count, _ROWS):
        try:
            records = source.__getitems__(list(range(start, min(count, start + _ROWS))))
        except Exception as error:
            raise ValueError(
                f"{path}:{start + 1}: cannot be read from {folder} ({_first(error)}); prepare it "
                "again"
            ) from error
        for number, record in enumerate(records, start=start + 1):
            try:
                yield number, _from_tfds(record, features)
            except UnicodeDecodeError as error:
                came = f"byte {error.object[error.start]:#04x}"
                yield number, Bad("text must be UTF-8", came=came)


def _only_own_classes(entry):
    # TFDS imports the classes of features by the names that the file gives.
    for key in ("pythonClassName", "python_class_name", "type"):
        found = entry.get(key)
        if isinstance(found, str) and not found.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {found}, a class that is not of TFDS itself")
    return entry


def _from_tfds(value, feature):
    each = getattr(feature, "feature", None)  # of a sequence
    if isinstance(value, dict):
        if each is not None:  # a sequence of dicts comes as a dict of sequences
            value = [dict(zip(value, items)) for items in zip(*value.values(), strict=True)]
        else:
            return {key: _from_tfds(x, feature[key]) for key, x in value.items()}
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_from_tfds(x, each) for x in value]
    return _plain(value)


def _first(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def number(value, field):
    """A finite float, from what a field holds.

    Raises:
      Bad: naming the field.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Bad("must be a number", field=field, came=show(value))
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Bad("must be finite", field=field, came=show(value))
    if field == "weight" and value < 0:
        raise Bad("must be >= 0", field=field, came=show(value))
    return value
