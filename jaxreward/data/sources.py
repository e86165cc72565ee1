"""Preference pairs, prompts and answers, in and out, with errors that name file, row and field.

They are read from JSON Lines (also .gz, and "-" for standard input), Parquet, ArrayRecord and
TFDS (`data/formats.py`), and written as JSON Lines. Where a data set names its fields otherwise, a
function of `data/corpora` brings its rows into this form as they are read.
"""

import difflib
import gzip
import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

from jaxreward.data import formats
from jaxreward.data.corpora import hh_rlhf

_SCORES = ("chosen_score", "rejected_score")
_PAIR_FIELDS = ("id", "prompt", "chosen", "rejected", "margin", "weight", "subset", *_SCORES)
ANSWER_FIELDS = ("answer", "completion", "response")

# Fields by which rows of another form are known, and what brings them into pairs.
_OTHER_FORMS = (
    (("response1", "response2", "overall_preference"), "helpsteer3.pairs"),
    (("response_1", "response_2", "preference_strength"), "helpsteer2.pairs"),
    (("response", "helpfulness"), "helpsteer2.pairs"),
    (("response_0", "response_1", "better_response_id"), "pku_saferlhf.pairs"),
    (("completion", "label"), "unpaired.pairs"),
)
# What `by_prompt` parts by in place of the prompt, in rows of every kind.
_HELD_OUT_BY = "held_out_by"
# Columns beside the text without which a row would be another one.
_NOT_TEXT = ("images", "tools")


def read_jsonl(path, *, what="record"):
    """Reads JSON objects, one a line.

    Args:
      path: File, .gz for gzip, or "-" for standard input.
      what: What a line holds, for messages.

    Returns:
      list of (line number from 1, dict).

    Raises:
      FileNotFoundError: if there is no such file; names near misses.
      ValueError: naming file:line for a line that is no JSON object in UTF-8, or for an empty file.
    """
    rows = []
    for number, row in formats.rows(path):
        if isinstance(row, formats.Bad):
            raise ValueError(f"{formats.name(path)}:{number}: {what}: {row}") from row
        rows.append((number, row))
    return rows


def read_pairs(path, *, on_bad="error", limit=None, corpus=None):
    """Reads preference pairs.

    A line has `chosen` and `rejected`, each a str or a list of {"role", "content"} messages, and
    `prompt`, a str or messages. `prompt` may be missing when both answers are message lists or
    HH-RLHF dialogues; their common beginning is then the prompt. Message lists that repeat the
    given prompt lose the repetition. Optional: `margin` (number), `weight` (number >= 0),
    `chosen_score` and `rejected_score` (numbers, both or neither), `subset` (str), `id` (str or
    int; else the line number), and in rows of every kind `held_out_by` (str or messages, see
    `by_prompt`). Null counts as missing.

    Args:
      path: As `formats.rows`.
      on_bad: "error" stops at the first bad line, "skip" leaves bad lines out, counts them by
        reason and warns once.
      limit: Read at most this many good pairs; None reads all.
      corpus: Brings rows of another form into this one: a function, such as those of
        `data/corpora`, from numbered rows as `formats.rows` yields them to such rows. What it
        cannot use it yields as `formats.Bad`. None takes rows as they are.

    Returns:
      (records, report). Records are dict(id, prompt, chosen, rejected) with margin, weight, subset
      and scores = (chosen, rejected) where given, and all other fields under "extra". The report
      is dict(read=int, kept=int, skipped={reason: int}).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field, what was expected and what came; or when no pair is left.
    """
    return read_rows(path, pair_of, what="pair", on_bad=on_bad, limit=limit, corpus=corpus)


def read_prompts(path, *, limit=None, corpus=None):
    """Reads prompts to answer.

    Args:
      path, corpus: As `read_pairs`.
      limit: Read at most this many; None reads all.

    Returns:
      list of dict(id: str, prompt: str or messages), other fields under "extra".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field.
    """
    return read_rows(path, prompt_of, what="prompt", limit=limit, corpus=corpus)[0]


def read_answers(path, *, limit=None, corpus=None):
    """Reads answers to score.

    A line has `prompt` and one of `answer`, `completion` or `response`, or is a pair as in
    `read_pairs`. As there, `prompt` may be missing if the answer is a message list or an HH-RLHF
    dialogue; all but its last turn is then the prompt.

    Args:
      path, corpus: As `read_pairs`.
      limit: Read at most this many lines; None reads all.

    Returns:
      list of dict(id: str, prompt: str or messages, answers: list of str or messages,
      names: the field each answer came from, row: the line as it was).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field.
    """
    return read_rows(path, answer_of, what="answer", limit=limit, corpus=corpus)[0]


def write_jsonl(path, records):
    """Writes one JSON object a line; the file appears whole or not at all.

    Args:
      path: File (.gz is compressed), replaced if it exists, or "-" for standard output.
      records: Iterable of dicts of plain JSON values.

    Returns:
      Number of lines written.

    Raises:
      ValueError: naming the record that JSON cannot hold (an array, a NaN, a set).
      FileNotFoundError: if the folder is missing.
    """
    if str(path) == "-":
        count = _dump(sys.stdout.buffer, records, "standard output")
        sys.stdout.buffer.flush()
        return count
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it first")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(temporary)
    try:
        with os.fdopen(handle, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream:
                    count = _dump(stream, records, path)
            else:
                count = _dump(raw, records, path)
        # mkstemp makes files private; give the mode that open() would have given
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count


def data_hash(path):
    """Content hash of a file, as recorded with a run.

    Args:
      path: As `formats.rows`; not "-", which can be read only once.

    Returns:
      sha256 of its bytes as 64 hex digits. Of a TFDS data set that of the names and hashes of all
      files of its version, one a line as sha256sum writes them.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    formats.exists(path)
    if not formats.is_tfds(path):
        return _sha256(Path(path))
    folder, _ = formats.tfds_folder(path)
    lines = [
        f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file()
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path):
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def by_prompt(records, fraction, seed):
    """Parts records of any kind into (training, held out) by their `held_out_by`, where they have
    it, else by their `prompt`.

    By prompt and not by record: records of one prompt share text. A prompt falls on the same side
    whatever else is in the data, and so do records made of it that are held out by it, such as
    those of `judges.rows`. Where it is empty, as of plain text, the rest is drawn by.

    Args:
      records: Dicts with a `prompt`.
      fraction: Share of the prompts to hold out, in expectation.
      seed: Of the draw.
    """
    text = lambda r: (
        r.get(_HELD_OUT_BY)
        or r["prompt"]
        or [r.get(k) for k in ("completion", "answer", "chosen", "rejected")]
    )
    draw = lambda r: hashlib.sha256(f"{seed}:{json.dumps(text(r))}".encode()).digest()
    held = [int.from_bytes(draw(r)[:4]) / 2**32 < fraction for r in records]
    return [r for r, h in zip(records, held) if not h], [r for r, h in zip(records, held) if h]


def read_rows(path, parse, *, what, on_bad="error", limit=None, corpus=None, noted=None):
    """Reads the rows of a file into records, with what they are held out by (`record_of`).

    Args:
      path: As `formats.rows`.
      parse: (row, number) -> record; raises `formats.Bad`.
      what: What a record is, for messages.
      on_bad, limit, corpus: As `read_pairs`.
      noted: Called with (number, reason) for each row that is skipped, or None.

    Returns:
      (records, report) as `read_pairs`. With a corpus the rows it yields are counted, which may be
      more or fewer than the file's lines.

    Raises:
      FileNotFoundError, ValueError: as `read_pairs`.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f'on_bad must be "error" or "skip"; received {on_bad!r}')
    records, read, skipped = [], 0, {}
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None; received {limit}")
    rows, lines = formats.rows(path), "lines"
    if corpus is not None:
        rows, lines = corpus(rows), "rows of the corpus"
    for number, row in rows:
        read += 1
        try:
            if isinstance(row, formats.Bad):
                raise row
            for field in _NOT_TEXT:
                if row.get(field):
                    raise formats.Bad("is not read, only text is; leave such rows out", field=field)
            records.append(record_of(parse, row, number))
        except formats.Bad as bad:
            place = f"{formats.name(path)}:{number}" + (f":{bad.field}" if bad.field else "")
            if on_bad == "error":
                raise ValueError(f"{place}: {bad}") from bad
            reason = f"{bad.field}: {bad.reason}" if bad.field else bad.reason
            skipped[reason] = skipped.get(reason, 0) + 1
            if noted is not None:
                noted(number, reason)
        if len(records) == limit:
            break
    counts = "; ".join(f"{reason} ({count})" for reason, count in skipped.items())
    if not records:
        raise ValueError(f"{formats.name(path)} holds no usable {what} in {read} {lines}: {counts}")
    if skipped:
        warnings.warn(
            f"{formats.name(path)}: skipped {sum(skipped.values())} of {read} {lines}: {counts}",
            stacklevel=3,
        )
    return records, {"read": read, "kept": len(records), "skipped": skipped}


def record_of(parse, row, number):
    """A row as a record, of whatever kind: parse(row, number), with `held_out_by` (str or messages,
    see `by_prompt`) where the row has it. Raises `formats.Bad`."""
    record = parse(row, number)
    if row.get(_HELD_OUT_BY) is not None:
        record[_HELD_OUT_BY] = text_of(row, _HELD_OUT_BY)
    return record


def pair_of(row, number):
    """A record of `read_pairs` of a row. Raises `formats.Bad`."""
    if row.get("chosen") is None:
        for fields, name in _OTHER_FORMS:
            if all(row.get(field) is not None for field in fields):
                raise formats.Bad(
                    f"missing; the fields {', '.join(fields)} are another form of preferences, "
                    f"read with data.corpus={name} (--corpus {name})",
                    field="chosen",
                )
    prompt, (chosen, rejected) = parted(row, ["chosen", "rejected"])
    if chosen == rejected:
        raise formats.Bad("identical answers", field="rejected")
    record = {"id": id_of(row, number), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    for field in ("margin", "weight"):
        if row.get(field) is not None:
            record[field] = formats.number(row[field], field)
    scored = [name for name in _SCORES if row.get(name) is not None]
    if len(scored) == 1:
        (missing,) = {*_SCORES} - {*scored}
        raise formats.Bad(f"missing; {scored[0]} is there, and a pair has both", field=missing)
    if scored:
        record["scores"] = tuple(formats.number(row[name], name) for name in _SCORES)
    if row.get("subset") is not None:
        record["subset"] = label_of(row, "subset")
    return with_extra(record, row, _PAIR_FIELDS)


def prompt_of(row, number):
    """A record of `read_prompts` of a row. Raises `formats.Bad`."""
    record = {"id": id_of(row, number), "prompt": text_of(row, "prompt")}
    return with_extra(record, row, ("id", "prompt"))


def answer_of(row, number):
    """dict(id, prompt, answers, names, row) of a row, as `read_answers`. Raises `formats.Bad`."""
    names = [name for name in ANSWER_FIELDS if row.get(name) is not None]
    if not names and (row.get("chosen") is not None or row.get("rejected") is not None):
        pair = pair_of(row, number)
        names, prompt = ["chosen", "rejected"], pair["prompt"]
        answers = [pair["chosen"], pair["rejected"]]
    elif len(names) == 1:
        prompt, answers = parted(row, names)
    else:
        raise formats.Bad(
            f"needs exactly one of {', '.join(ANSWER_FIELDS)}, or chosen and rejected",
            field="answer",
            came=", ".join(names) or f"the fields {', '.join(map(repr, row)) or '(none)'}",
        )
    return {
        "id": id_of(row, number),
        "prompt": prompt,
        "answers": answers,
        "names": names,
        "row": row,
    }


def parted(row, names):
    """(prompt, answers) of the fields `names`, one or two: what they begin with in common is taken
    off, and is the prompt if the row gives none. Raises `formats.Bad`."""
    answers = [text_of(row, name) for name in names]
    if len({type(answer) for answer in answers}) > 1:
        raise formats.Bad(
            f"{' and '.join(names)} must both be str or both be messages",
            field=names[1],
            came=" and ".join(type(answer).__name__ for answer in answers),
        )
    prompt = None if row.get("prompt") is None else text_of(row, "prompt")
    if isinstance(answers[0], str):
        if prompt is not None:
            return prompt, answers
        if not all(hh_rlhf.is_dialogue(answer) for answer in answers):
            raise formats.Bad(
                "missing; give a prompt, or answers as messages or HH-RLHF dialogues that begin "
                'with "\\n\\nHuman:", or pairs that begin alike with data.corpus=implicit.pairs',
                field="prompt",
            )
        try:
            answers = [hh_rlhf.to_messages(answer) for answer in answers]
        except ValueError as error:
            raise formats.Bad(
                str(error), field=names[0] if len(names) == 1 else "chosen|rejected"
            ) from None
    for name, answer in zip(names, answers):
        if answer[-1]["role"] != "assistant":
            raise formats.Bad(
                "last message must be the assistant's", field=name, came=answer[-1]["role"]
            )
    if prompt is not None and all(answer[0]["role"] == "assistant" for answer in answers):
        return prompt, answers
    if isinstance(prompt, list):
        size = len(prompt)
        if all(len(answer) > size and answer[:size] == prompt for answer in answers):
            return prompt, [answer[size:] for answer in answers]
        if prompt[-1]["role"] == "assistant":
            return prompt, answers  # the dialogues part at a user turn
    if len(answers) == 2:
        front, *rest = hh_rlhf.split_pair(*answers)
    else:
        front, rest = answers[0][:-1], [answers[0][-1:]]
    if prompt is None:
        if not front and len(answers) == 1:
            raise formats.Bad("missing; the answer holds nothing but itself", field="prompt")
        return front, rest
    said = front[-1]["content"] if front and front[-1]["role"] == "user" else None
    if isinstance(prompt, str) and said == prompt:
        return front, rest
    raise formats.Bad(
        f"does not agree with the messages in {' and '.join(names)}, which begin before the "
        "answer; leave it out, or start the answers at the assistant's message",
        field="prompt",
    )


def with_extra(record, row, fields):
    """The record, with the row's other fields under "extra", but for those of `record_of`."""
    extra = {k: value for k, value in row.items() if k not in fields and k != _HELD_OUT_BY}
    return {**record, "extra": extra} if extra else record


def id_of(row, number):
    """The row's `id` as str, or its number. Raises `formats.Bad`."""
    value = row.get("id")
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise formats.Bad("must be str or int", field="id", came=formats.show(value))
    return str(value)


def number_of(row, field, *, needed=True):
    """The finite float in a field, or None where it may be missing. Raises `formats.Bad`."""
    if row.get(field) is not None:
        return formats.number(row[field], field)
    if needed:
        raise formats.Bad("missing", field=field)
    return None


def preferred(row, field, first, second):
    """(chosen, rejected, margin) of a row with one preference from -3, which is all for the answer
    in the field `first`, to 3, all for `second`. Raises `formats.Bad`, also for a tie."""
    answers = text_of(row, first), text_of(row, second)
    strength = number_of(row, field)
    if not strength:
        raise formats.Bad("tie", field=field)
    if abs(strength) > 3:
        raise formats.Bad("must be from -3 to 3", field=field, came=formats.show(strength))
    chosen, rejected = answers if strength < 0 else answers[::-1]
    return chosen, rejected, abs(strength)


def label_of(row, field):
    """The str or None in a field that is no text to read. Raises `formats.Bad`."""
    value = row.get(field)
    if value is not None and not isinstance(value, str):
        raise formats.Bad("must be str", field=field, came=formats.show(value))
    return value


def text_of(row, field):
    """The str or message list in a field. Raises `formats.Bad`."""
    if row.get(field) is None:
        near = difflib.get_close_matches(field, row, n=1)
        hint = f" (did you mean the field {near[0]!r}?)" if near and near[0] != field else ""
        raise formats.Bad(f"missing{hint}", field=field)
    value = row[field]
    if isinstance(value, str):
        _readable(value, field)
        return value
    if not isinstance(value, list):
        raise formats.Bad(
            "must be str or a list of messages", field=field, came=formats.show(value)
        )
    if not value:
        raise formats.Bad("list of messages must not be empty", field=field)
    for index, message in enumerate(value):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                came = message.get(key) if isinstance(message, dict) else message
                raise formats.Bad(
                    f"message must have a str {key}",
                    field=f"{field}[{index}]",
                    came=formats.show(came),
                )
            _readable(message[key], f"{field}[{index}].{key}")
        if message.get("tool_calls"):
            raise formats.Bad(
                "is not read, only text is; leave such rows out",
                field=f"{field}[{index}].tool_calls",
            )
    return value


def _readable(text, field):
    if "\0" in text:
        raise formats.Bad("holds a NUL character, as damaged files do", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise formats.Bad(
            "holds half of a surrogate pair, which is no character",
            field=field,
            came=f"{text[error.start]!r}",
        ) from None


def _dump(stream, records, name):
    count = 0
    for count, record in enumerate(records, start=1):
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: record {count} cannot be written as JSON ({error}); "
                "give plain numbers, strings, lists and dicts"
            ) from error
        stream.write(line + b"\n")
    return count
