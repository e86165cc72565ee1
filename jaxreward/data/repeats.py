"""What stands twice in data: the same rows, rows that contradict each other, and prompts that a
second file shares; and what values there are.

Contents are compared, not how they are written: a str is the same as one message that holds it. Of
plain text, which has no prompt, the text itself counts as the prompt.
"""

import collections
import unicodedata

_SIDES = ("chosen", "rejected", "completion", "answer")


def said(text):
    """The text of a str, or of messages without their roles."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _key(text):
    if isinstance(text, str):
        return text
    turns = tuple((message["role"], message["content"]) for message in text)
    return turns[0][1] if len(turns) == 1 else turns


def _asked(record):
    return record["prompt"] or record.get("completion") or record.get("answer", "")


def _mark(record):
    """What a labelled answer is labelled with, in a form that can be compared; else None."""
    if "label" in record:
        return record["label"]
    scores = record.get("scores")
    return tuple(sorted(scores.items())) if isinstance(scores, dict) else None


def duplicates(records):
    """Records that say the same, and records that say the opposite of one another.

    Args:
      records: dicts with id, prompt, and chosen and rejected, or completion, or answer with label
        or scores, or neither, from the readers. Only prompt, answers and labels are compared.

    Returns:
      dict(prompts: how many different ones; repeated: how many of them stand in several records;
      most: records of the most frequent one; copies: records that say what an earlier one said;
      copied: ids of such, [[first, later, …], …]; contradictions: how often two answers to a
      prompt are preferred in both orders, or one answer is labelled in several ways; contradicted:
      ids of such, [([those of one order or label, …], [those of another, …], …), …]).
    """
    prompts = collections.Counter()
    rows = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records:
        prompts[_key(_asked(record))] += 1
        parts = [record["prompt"], *(record[side] for side in _SIDES if side in record)]
        rows[tuple(map(_key, parts))][_mark(record)].append(record["id"])
    copied = [ids for marked in rows.values() for ids in marked.values() if len(ids) > 1]
    contradicted, done = [], set()
    for key, marked in rows.items():
        for scored in (False, True):  # a label and scores do not speak of the same
            sides = [ids for mark, ids in marked.items() if isinstance(mark, tuple) is scored]
            if len(sides) > 1:
                contradicted.append(tuple(sides))
        swapped = (key[0], *reversed(key[1:]))
        if len(key) == 3 and swapped in rows and swapped not in done:
            done.add(key)
            contradicted.append((marked[None], rows[swapped][None]))
    return {
        "prompts": len(prompts),
        "repeated": sum(count > 1 for count in prompts.values()),
        "most": max(prompts.values(), default=0),
        "copies": sum(len(ids) - 1 for ids in copied),
        "copied": copied,
        "contradictions": len(contradicted),
        "contradicted": contradicted,
    }


def counts(records):
    """How many records have each value of `subset` and of `label`.

    Args:
      records: As `duplicates`; a field may stand in the record or under "extra".

    Returns:
      {field: {value as str: records}}, most frequent first, of the fields that are there.
    """
    found = {}
    for field in ("subset", "label"):
        values = [record.get(field, record.get("extra", {}).get(field)) for record in records]
        plain = [
            f"{value:g}" if isinstance(value, float) else str(value)
            for value in values
            if isinstance(value, str | int | float)
        ]
        if plain:
            found[field] = dict(collections.Counter(plain).most_common())
    return found


def numbers(records):
    """Lowest, mean and highest value of labels that are numbers, and of scores by name.

    Args:
      records: As `duplicates`.

    Returns:
      {"label" or "scores.NAME": dict(min, mean, max, known = records that have it, null = records
      with scores of which this one is null or missing)}. min, mean and max are None where no record
      has it.
    """
    found, scored = collections.defaultdict(list), 0
    for record in records:
        label, scores = record.get("label"), record.get("scores")
        if isinstance(label, float):
            found["label"].append(label)
        if isinstance(scores, dict):
            scored += 1
            for name, value in scores.items():
                found[f"scores.{name}"] += [] if value is None else [value]
    return {
        field: {
            "min": min(values, default=None),
            "mean": sum(values) / len(values) if values else None,
            "max": max(values, default=None),
            "known": len(values),
            "null": 0 if field == "label" else scored - len(values),
        }
        for field, values in found.items()
    }


class _Punctuation(dict):
    """For str.translate: punctuation becomes a space, found out once a character."""

    def __missing__(self, code):
        self[code] = " " if unicodedata.category(chr(code)).startswith("P") else code
        return self[code]


_SPACED = _Punctuation()


def normalised(text):
    """A text without what two copies of it may differ in: Unicode form (NFKC), case, punctuation
    and whitespace. Symbols such as + and < stay."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).translate(_SPACED).split())


def overlap(records, others):
    """Prompts of one data set that also stand in another, as test prompts in training data.

    Args:
      records: Where to look, as `duplicates`.
      others: Whose prompts to look for.

    Returns:
      dict(prompts: different ones of `others`; exact: how many of them stand in `records`;
      normalised: how many do after `normalised`, the exact ones included; exact_ids, more_ids:
      [(id in others, id in records), …] of the exact ones, and of those found only by normalising).
    """
    exact, close, first = {}, {}, {}
    for record in records:
        exact.setdefault(_key(_asked(record)), record["id"])
        close.setdefault(normalised(said(_asked(record))), record["id"])
    for other in others:
        first.setdefault(_key(_asked(other)), other)
    close.pop("", None)  # nothing but punctuation says nothing
    same, more = [], []
    for key, other in first.items():
        if key in exact:
            same.append((other["id"], exact[key]))
        elif (text := normalised(said(_asked(other)))) in close:
            more.append((other["id"], close[text]))
    return {
        "prompts": len(first),
        "exact": len(same),
        "normalised": len(same) + len(more),
        "exact_ids": same,
        "more_ids": more,
    }
