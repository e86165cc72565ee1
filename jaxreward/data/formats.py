"""Rows of a file, whatever it is stored in: JSON Lines, Parquet, ArrayRecord.

A row is a dict; a row that is none is handed on as `Bad`, so that the reader decides whether it
stops the run or is counted. Files are read piece by piece, never whole.
"""

import contextlib
import difflib
import gzip
import json
import math
import sys
import zlib
from pathlib import Path

# A longer line is no record but a file of another kind, or a broken one.
LONGEST = 64 << 20
_ROWS = 256  # of a Parquet file at a time


class Bad(ValueError):
    """A row that cannot be used: the field, and why in words that hold for many rows."""

    def __init__(self, reason, *, field=None, came=""):
        super().__init__(f"{reason}{f'; received {came}' if came else ''}")
        self.reason, self.field = reason, field


def rows(path):
    """Reads the rows of a file.

    Args:
      path: .parquet; .arrayrecord or .array_record, each record a JSON object; any other name is
        read as JSON Lines, gzip-compressed if it ends in .gz; "-" is standard input.

    Yields:
      (number from 1, dict or Bad). For JSON Lines the number is that of the line. Blank lines are
      skipped. Parquet's times and decimals become text, its NaN null, and bytes their count.

    Raises:
      FileNotFoundError: if there is no such file; names near misses.
      ValueError: if the file is empty, cut short or of another kind.
    """
    if str(path) == "-":
        read = _json_lines
    else:
        exists(path)
        suffix = Path(path).suffix.lower()
        read = {
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


def name(path):
    """The path as messages have it."""
    return "standard input" if str(path) == "-" else str(path)


def exists(path):
    """Raises FileNotFoundError, with near misses, unless the path is a file."""
    path = Path(path)
    if path.is_file():
        return
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise FileNotFoundError(f"data file {path} does not exist or is no file{hint}")


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
