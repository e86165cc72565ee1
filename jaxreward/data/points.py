"""Answers with numbers of their own, as records and as trees: attribute scores, classes, labels.

What a row's numbers mean is the head's to say: see `target`.
"""

import collections
import dataclasses
import json
import math

import numpy as np

from jaxreward.data import formats, sources, tokenize
from jaxreward.data.formats import Bad
from jaxreward.data.tokenize import AnswerTooLong, encode_tree

LABELS = ("label", "scores")
_FIELDS = ("id", "prompt", "weight", "subset", *LABELS, *sources.ANSWER_FIELDS)


def read(path, *, on_bad="error", limit=None, corpus=None):
    """Reads answers with labels or scores.

    A row has `prompt` and one of `answer`, `completion` or `response`, each a str or messages, as
    `sources.read_answers` has it; and `label` (bool, number or str), or `scores`, a dict of numbers
    by name in which null is "not known". Optional: `weight` (number >= 0), `subset` (str), `id`.

    Args:
      path, on_bad, limit, corpus: As `sources.read_pairs`.

    Returns:
      (records, report). Records are dict(id, prompt, answer) with `label` or `scores`, and weight
      and subset where given; all other fields under "extra".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field, what was expected and what came; or when no row is left.
    """
    return sources.read_rows(
        path, point_of, what="labelled answer", on_bad=on_bad, limit=limit, corpus=corpus
    )


def point_of(row, number):
    """A record of `read` of a row. Raises `formats.Bad`."""
    found = sources.answer_of(row, number)
    if len(found["answers"]) != 1:
        raise Bad("is a pair; a labelled answer stands alone", field="chosen")
    record = {"id": found["id"], "prompt": found["prompt"], "answer": found["answers"][0]}
    given = [name for name in LABELS if row.get(name) is not None]
    if len(given) != 1:
        raise Bad("needs exactly one of label and scores", field="label", came=", ".join(given))
    if given == ["label"]:
        label = row["label"]
        if not isinstance(label, bool | str):
            label = formats.number(label, "label")
        record["label"] = label
    else:
        scores = row["scores"]
        if not isinstance(scores, dict) or not scores:
            raise Bad("must be numbers by name", field="scores", came=formats.show(scores))
        record["scores"] = {
            name: None if value is None else formats.number(value, f"scores.{name}")
            for name, value in scores.items()
        }
    if row.get("weight") is not None:
        record["weight"] = formats.number(row["weight"], "weight")
    if row.get("subset") is not None:
        record["subset"] = sources.label_of(row, "subset")
    return sources.with_extra(record, row, _FIELDS)


def target(record, kind, outputs):
    """The numbers of a record as a head's targets.

    Args:
      record: From `read`.
      kind: "scalar": `label` is the number wanted (true 1, false 0). "scores": `scores` by the
        names of the outputs. "classes": `label` is an output's name, or its index; of two classes
        false is the first and true the second.
      outputs: Names of the head's outputs, C of them.

    Returns:
      float32[1] for "scalar" and "classes" (the index), float32[C] for "scores", NaN where a score
      is null or missing.

    Raises:
      ValueError: naming the field and what was expected.
    """
    if kind == "scores":
        scores = record.get("scores")
        known = [(scores or {}).get(name) for name in outputs]
        if all(value is None for value in known):
            came = "no scores" if scores is None else f"scores of {', '.join(scores)}"
            raise ValueError(
                f"the head gives {', '.join(outputs)}, and at least one of them must be in the "
                f"row's scores; received {came}"
            )
        return np.asarray([math.nan if v is None else v for v in known], np.float32)
    if "label" not in record:
        raise ValueError(f"a head of kind {kind!r} takes a label; the row has scores")
    label = record["label"]
    if kind == "scalar":
        if isinstance(label, str):
            raise ValueError(f"a scalar head takes a number or bool as label; received {label!r}")
        return np.asarray([label], np.float32)
    if isinstance(label, str):
        index = outputs.index(label) if label in outputs else None
    elif isinstance(label, bool):
        index = int(label) if len(outputs) == 2 else None
    else:
        index = int(label) if label in range(len(outputs)) else None
    if index is None:
        raise ValueError(
            f"label must be one of {', '.join(outputs)}, or an index from 0 to {len(outputs) - 1}"
            f"{' or a bool' * (len(outputs) == 2)}; received {label!r}"
        )
    return np.asarray([index], np.float32)


def group(records, *, most=16):
    """Puts answers to the same prompt, with the same subset, together.

    Args:
      records: From `read`.
      most: Most answers of a group, at least 1.

    Returns:
      list of lists of indices into `records`, in order of first appearance.
    """
    groups, open_ = [], {}
    for number, record in enumerate(records):
        key = json.dumps([record["prompt"], record.get("subset")], sort_keys=True)
        if len(open_.get(key, ())) in (0, most):
            open_[key] = []
            groups.append(open_[key])
        open_[key].append(number)
    return groups


def encode(
    tokenizer,
    records,
    *,
    kind="scalar",
    outputs=("score",),
    template="auto",
    max_len=None,
    on_long="error",
    most=16,
):
    """Encodes labelled answers, those to one prompt in one tree.

    Args:
      tokenizer: Tokenizer.
      records: From `read`.
      kind, outputs: The head, as `target` takes them.
      template: As `tokenize.encode_conversation`.
      max_len: Most tokens of prompt and one answer, or None.
      on_long: What to do with an answer that alone exceeds max_len: "error", or "skip", which
        counts.
      most: Most answers of a tree.

    Returns:
      (trees, report). The report is dict(answers, trees, skipped, truncated = trees that lost
      prompt tokens, dropped_tokens). Warns once, with counts, if anything was truncated or skipped.

    Raises:
      ValueError: naming the record; or when none is left.
    """
    if on_long not in ("error", "skip"):
        raise ValueError(f'on_long must be "error" or "skip"; received {on_long!r}')
    trees, skipped = [], 0
    pending = collections.deque(
        [records[i] for i in indices] for indices in group(records, most=most)
    )
    while pending:
        members = pending.popleft()
        first = members[0]
        try:
            targets = [target(record, kind, outputs) for record in members]
            tree = encode_tree(
                tokenizer,
                first["prompt"],
                [record["answer"] for record in members],
                template=template,
                max_len=max_len,
                id=first["id"],
            )
        except ValueError as error:
            if len(members) > 1:  # one by one: only the answer at fault goes, and is named
                pending.extendleft([record] for record in reversed(members))
                continue
            long = isinstance(error, AnswerTooLong)
            if long and on_long == "skip":
                skipped += 1
                continue
            kind_of = AnswerTooLong if long else ValueError
            raise kind_of(f"answer {first['id']!r}: {error}") from error
        trees.append(
            dataclasses.replace(
                tree,
                targets=targets,
                answer_weight=[record.get("weight", 1.0) for record in members],
                subset=first.get("subset"),
            )
        )
    report = tokenize.shortened(trees, skipped, max_len, total=len(records), what="answer")
    return trees, {"answers": sum(len(tree.answers) for tree in trees), **report}
