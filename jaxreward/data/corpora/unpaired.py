"""Unpaired preferences, answers with a thumb up or down, made into pairs.

Form: TRL's "unpaired preference" type, `prompt`, `completion` (each a str or messages) and `label`
(bool), from the "Dataset formats and types" page of its documentation; the form of KTO
(Ethayarajh et al. 2024, arXiv:2402.01306). `answer` and `response` are taken for `completion`, and
0 and 1 for the label, as labelled answers have them.

*Unverified: not yet run on a real file.*
"""

import itertools
import json

from jaxreward.data import sources
from jaxreward.data.formats import Bad, show


def pairs(rows, *, most=16):
    """Pairs every good answer with every bad one to the same prompt.

    All rows are read before the first pair comes, as those of a prompt may lie anywhere. Prompts
    keep the order of their first rows. Where a prompt has more than `most` pairs the first ones
    are taken of an order that goes through all its good answers before it takes one again.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      most: Most pairs of a prompt, at least 1.

    Returns:
      Iterator of (number, dict or Bad): prompt, chosen, rejected, and id ("3-7" for the rows 3 and
      7, or their ids). The number, and subset and weight where given, are those of the good
      answer's row. A prompt whose answers are all good, or all bad, is one `Bad` at its first row.

    Raises:
      ValueError: if `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1; received {most}")
    return _pairs(rows, most)


def _pairs(rows, most):
    prompts = {}  # prompt as JSON -> ([bad], [good]), each (number, record)
    for number, row in rows:
        try:
            if isinstance(row, Bad):
                raise row
            record, good = _labelled(row, number)
        except Bad as bad:
            yield number, bad
            continue
        key = json.dumps(record["prompt"], sort_keys=True)
        prompts.setdefault(key, ([], []))[good].append((number, record))
    for bad, good in prompts.values():
        if not bad or not good:
            (number, _), *_ = bad or good
            yield number, Bad(f"has only {'good' if good else 'bad'} answers", field="prompt")
        turns = (
            (one, (i + turn) % len(bad)) for turn in range(len(bad)) for i, one in enumerate(good)
        )
        for (number, one), other in itertools.islice(turns, most):
            _, two = bad[other]
            yield (
                number,
                {
                    **one,
                    "id": f"{one['id']}-{two['id']}",
                    "chosen": one["chosen"],
                    "rejected": two["chosen"],
                },
            )


def _labelled(row, number):
    found = sources.answer_of(row, number)
    if len(found["answers"]) != 1:
        raise Bad("is a pair; an unpaired answer stands alone", field="chosen")
    label = row.get("label")
    if label not in (0, 1):
        raise Bad("must be true or false", field="label", came=show(label))
    record = {key: row[key] for key in ("weight", "subset") if row.get(key) is not None}
    record |= {"id": found["id"], "prompt": found["prompt"], "chosen": found["answers"][0]}
    return record, bool(label)
