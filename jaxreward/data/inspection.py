"""What a data file holds, before anything is trained on it: examples as tokens, what is cut off,
lengths, duplicates, and prompts that two files share.

`inspect` does all of it and returns plain dicts; `data/inspection_text.py` makes text of them. The
parts stand alone too.
"""

import collections
import difflib
import itertools
import warnings

import numpy as np

from jaxreward.data import (
    conversations,
    formats,
    pairs,
    pipeline,
    points,
    prompts,
    repeats,
    sources,
    tokenize,
)

KINDS = ("pairs", "points", "chats", "prompts")
# The fields that tell the kinds apart; a prompt alone is only to be answered, and an answer beside
# a label or scores is a point.
SIGNS = {"pairs": ("chosen", "rejected"), "chats": ("messages", "completion", "text")}
_SIDES = {
    "pairs": ("chosen", "rejected"),
    "points": ("answer",),
    "chats": ("completion",),
    "prompts": (),
}
_PARSE = {
    "pairs": (sources.pair_of, "pair"),
    "points": (points.point_of, "labelled answer"),
    "chats": (conversations.conversation_of, "conversation"),
    "prompts": (sources.prompt_of, "prompt"),
}
_OPTIONAL = ("margin", "weight", "label", "scores")
_FIRST = 20  # rows that decide the kind


def inspect(
    path,
    *,
    tokenizer=None,
    kind="auto",
    corpus=None,
    template="auto",
    max_len=None,
    show=2,
    other=None,
    limit=None,
):
    """Looks at a data file in every way there is here.

    Args:
      path: File.
      tokenizer: Tokenizer, or None; lengths are then in characters, and what only tokens can tell
        is left out.
      kind: One of `KINDS`, or "auto" as `kind_of`.
      corpus: What brings numbered rows into the fields that the readers know, or None.
      template, max_len: As `tokenize.encode_conversation`.
      show: Examples to show.
      other: Second file, of any kind and read with the same `corpus`, whose prompts are looked for
        in the first; or None.
      limit: Most records of the first file to use; None for all.

    Returns:
      dict(path, sha256, kind, fields = those that said so, unit = "tokens" or "characters",
      read = the report of `read`, given = {optional field: records that have it}, examples =
      [`example`], lengths = {part: [int]} as `encode`, duplicates, counts and numbers as in
      `repeats`); of pairs also bias = `length_bias`; with a tokenizer also folder, template,
      encoded = `encode` without lengths and trees, with kept = the number of trees, packing =
      `packing`; with `other` also overlap = as in `repeats`, with its path, kind and read.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the argument that does not fit, or when no row is left.
    """
    known = ("auto", *KINDS)
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind must be one of {', '.join(known)}; received {kind!r}{hint}")
    if max_len is not None and tokenizer is None:
        raise ValueError("max_len counts tokens, which takes a tokenizer; give a model folder too")
    if "-" in (str(path), str(other)):
        raise ValueError("standard input can be read only once; write it into a file first")
    if show < 0:
        raise ValueError(f"show must be 0 or more; received {show}")
    fields = []
    if kind == "auto":
        kind, fields = kind_of(path, corpus=corpus)
    records, read_report = read(path, kind, corpus=corpus, limit=limit)
    report = {
        "path": str(path),
        "sha256": sources.data_hash(path),
        "kind": kind,
        "fields": fields,
        "read": read_report,
        "given": {name: sum(name in r for r in records) for name in _OPTIONAL},
        "unit": "characters",
        "max_len": max_len,
        "limit": limit,
    }
    if other is not None:
        second, _ = kind_of(other, corpus=corpus)
        theirs, theirs_report = read(other, second, corpus=corpus)
        report["overlap"] = {
            "path": str(other),
            "kind": second,
            "read": theirs_report,
            **repeats.overlap(records, theirs),
        }
    shown = records
    if tokenizer is None:
        measured = [_characters(record, kind) for record in records]
    else:
        encoded = encode(tokenizer, records, kind, template=template, max_len=max_len)
        shown = [record for record, own in zip(records, encoded["lengths"]) if own]
        measured = [own for own in encoded.pop("lengths") if own]
        trees = encoded.pop("trees")
        report |= {
            "unit": "tokens",
            "folder": tokenizer.folder,
            "template": tokenize.chosen_template(tokenizer, template),
            "encoded": {**encoded, "kept": len(trees)},
            # A prompt to sample from is laid out by the sampler, not packed.
            "packing": packing(trees) if trees and kind != "prompts" else None,
        }
    report["lengths"] = {part: [own[part] for own in measured] for part in measured[0]}
    report["examples"] = [
        example(record, kind, tokenizer, template=template, max_len=max_len)
        for record in shown[:show]
    ]
    if kind == "pairs":
        report["bias"] = length_bias(*(report["lengths"][side] for side in ("chosen", "rejected")))
    report["duplicates"] = repeats.duplicates(records)
    report["counts"] = repeats.counts(records)
    report["numbers"] = repeats.numbers(records)
    return report


# Reading


def _rows(path, corpus):
    rows = formats.rows(path)
    return rows if corpus is None else corpus(rows)


def kind_of(path, *, corpus=None):
    """What the rows of a file are, from the fields of the first ones.

    `chosen` or `rejected` make pairs; `label` or `scores` beside `answer`, `completion` or
    `response` make points; `messages`, `text` or a `completion` without those make chats; and where
    there is none of these, `prompt` makes prompts.

    Args:
      path, corpus: As `inspect`.

    Returns:
      (one of `KINDS`, the fields that said so).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the fields seen, if they fit none or several.
    """
    good, seen, bad = 0, {}, None
    for number, row in _rows(path, corpus):
        if isinstance(row, formats.Bad):
            bad = bad or f"{path}:{number}: {row}"
            continue
        seen |= {name: None for name, value in row.items() if value is not None}
        good += 1
        if good == _FIRST:
            break
    if not good:
        raise ValueError(f"no row can be used; the first: {bad}")
    found = {kind: [n for n in names if n in seen] for kind, names in SIGNS.items()}
    answers, labels = (
        [n for n in names if n in seen] for names in (sources.ANSWER_FIELDS, points.LABELS)
    )
    if answers and labels:
        found["points"] = [*answers, *labels]
        found["chats"] = [n for n in found["chats"] if n not in answers]
    found = {kind: names for kind, names in found.items() if names}
    if not found and "prompt" in seen:
        found = {"prompts": ["prompt"]}
    if len(found) == 1:
        return next(iter(found.items()))
    listed = ", ".join(seen) or "none"
    if found:
        what = " and of ".join(f"{kind} ({', '.join(names)})" for kind, names in found.items())
        raise ValueError(
            f"{path}: the rows have fields of {what}; say with --kind which they are. "
            f"Fields: {listed}"
        )
    known = ", ".join([*itertools.chain(*SIGNS.values()), "prompt"])
    raise ValueError(
        f"{path}: no field says what the rows are; expected one of {known}, received {listed}; "
        "rename the fields, or map them with --corpus"
    )


def read(path, kind, *, corpus=None, limit=None):
    """Reads the rows that can be used, as training with data.on_bad="skip" does, and says where
    the others stand.

    Args:
      path, corpus, limit: As `inspect`.
      kind: One of `KINDS`.

    Returns:
      (records, report). The report is dict(read=int, kept=int, skipped={reason: int},
      places={reason: [line or row numbers]}).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: when no row is left, with the reasons.
    """
    parse, what = _PARSE[kind]
    places = collections.defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report says it all
        records, report = sources.read_rows(
            path,
            parse,
            what=what,
            on_bad="skip",
            limit=limit,
            corpus=corpus,
            noted=lambda number, reason: places[reason].append(number),
        )
    return records, {**report, "places": dict(places)}


# Tokens and lengths


def _encode_prompts(tokenizer, records, **kw):
    """Prompts as trees without answers, whole: none that is too long is cut."""
    made, report = prompts.encode(tokenizer, records, **kw)
    return [tokenize.Tree(prompt["id"], prompt["ids"], [], []) for prompt in made], report


def _encode_points(tokenizer, records, **kw):
    """Labelled answers as trees. What a label means is a head's to say, so none is read."""
    bare = [{k: v for k, v in r.items() if k not in points.LABELS} | {"label": 0} for r in records]
    return points.encode(tokenizer, bare, **kw)


_ENCODE = {
    "pairs": pairs.encode_pairs,
    "points": _encode_points,
    "chats": conversations.encode,
    "prompts": _encode_prompts,
}


def encode(tokenizer, records, kind, *, template="auto", max_len=None):
    """Encodes records as training does, and counts what `max_len` cuts.

    Args:
      tokenizer: Tokenizer.
      records, kind: From `read`.
      template, max_len: As `tokenize.encode_conversation`.

    Returns:
      dict(lengths: of each record its tokens before any cut, {part: int}, or None where it was
      refused; trees: what training packs; truncated: trees that lost the beginning of their prompt;
      dropped_tokens: how many tokens, over all answers; skipped: records with an answer that alone
      exceeds max_len, or of prompts to answer, which are never cut, with a prompt that does;
      refused: [(id, reason)] of records that cannot be rendered, at which training stops). The
      parts are prompt, chosen, rejected and longest (prompt and longer
      answer) of pairs; prompt, answer and longest of points; prompt, completion, supervised and
      longest of chats; prompt of prompts. A prompt is what comes before the first supervised token.

    Raises:
      ValueError: for an unknown template, or when every record is refused.
    """
    template = tokenize.chosen_template(tokenizer, template)
    measured, trees, refused, skipped = [None] * len(records), [], [], 0
    if kind == "pairs":  # those of one prompt are one tree
        units = collections.deque(group["records"] for group in pairs.group(records))
    elif kind == "points":
        units = collections.deque(points.group(records))
    else:
        units = collections.deque([i] for i in range(len(records)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the counts are returned
        while units:
            unit = units.popleft()
            these = [records[i] for i in unit]
            try:
                made, _ = _ENCODE[kind](tokenizer, these, template=template)
            except ValueError as error:
                if len(unit) > 1:
                    units.extendleft([i] for i in reversed(unit))
                else:
                    refused.append((these[0]["id"], str(error)))
                continue
            for number, i in enumerate(unit):
                measured[i] = _tokens(made, kind, number)
            if max_len is not None and max(_whole(tree, j) for tree, j in _all(made)) > max_len:
                try:
                    made, cut = _ENCODE[kind](
                        tokenizer, these, template=template, max_len=max_len, on_long="skip"
                    )
                    skipped += cut["skipped"]
                except ValueError:  # it passed above, so none of it is short enough
                    made, skipped = [], skipped + len(these)
            trees += made
    if len(refused) == len(records):
        raise ValueError(f"none of {len(records)} rows can be rendered; the first: {refused[0][1]}")
    return {
        "lengths": measured,
        "trees": trees,
        "truncated": sum(tree.truncated > 0 for tree in trees),
        "dropped_tokens": sum(tree.truncated for tree in trees),
        "skipped": skipped,
        "refused": refused,
    }


def _all(trees):
    """Every (tree, answer), with None for the prompt of a tree that has no answer."""
    return [(tree, j) for tree in trees for j in (range(len(tree.answers)) or [None])]


def _whole(tree, j):
    return len(tree.prompt) + (0 if j is None else len(tree.answers[j]))


def _before(tree, j):
    """Tokens before the first supervised one of an answer."""
    if j is None or not tree.loss[j].any():
        return _whole(tree, j)
    return len(tree.prompt) + int(tree.loss[j].argmax())


def _tokens(trees, kind, number):
    """Lengths of the number-th record of these trees; of chats the trees are one record's."""
    first, last = trees[0], trees[-1]
    if kind == "prompts":
        return {"prompt": len(first.prompt)}
    if kind == "pairs":
        own = dict(zip(("chosen", "rejected"), first.pairs[number]))
        answers = {side: _whole(first, j) - _before(first, j) for side, j in own.items()}
        longest = max(_whole(first, j) for j in own.values())
        return {"prompt": _before(first, own["chosen"]), **answers, "longest": longest}
    if kind == "points":
        before, longest = _before(first, number), _whole(first, number)
        return {"prompt": before, "answer": longest - before, "longest": longest}
    before, longest = _before(first, 0), _whole(last, 0)
    return {
        "prompt": before,
        "completion": longest - before,
        "supervised": sum(int(tree.loss[0].sum()) for tree in trees),
        "longest": longest,
    }


def _characters(record, kind):
    sides = _SIDES[kind]
    size = {part: len(repeats.said(record[part])) for part in ("prompt", *sides)}
    if sides:
        size["longest"] = size["prompt"] + max(size[side] for side in sides)
    return size


def packing(trees):
    """How well training packs trees, in rows as long as the recipes choose them.

    Args:
      trees: list of Tree, at least one.

    Returns:
      dict(row_len, rows, trees, efficiency = share of the slots that hold tokens).
    """
    sizes = [tree.size for tree in trees]
    row_len = pipeline.suggest_row_len([max(sizes), min(2 * int(np.mean(sizes)), 2048)])
    order = np.random.default_rng(0).permutation(len(trees))
    plan = pipeline.pack(trees, row_len=row_len, order=order)
    return {
        "row_len": row_len,
        "rows": len(plan),
        "trees": len(trees),
        "efficiency": pipeline.efficiency(trees, plan, row_len=row_len),
    }


def summary(values):
    """dict(min, median, mean, p95, max) of numbers, at least one."""
    low, median, p95, high = np.quantile(values, [0, 0.5, 0.95, 1]).tolist()
    return {"min": low, "median": median, "mean": float(np.mean(values)), "p95": p95, "max": high}


def histogram(values, *, bins=15):
    """Counts of whole numbers in equal steps of 1, 2 or 5 times a power of ten.

    Args:
      values: Integers, at least one.
      bins: Most bins. The last one also holds what is beyond the 99th percentile.

    Returns:
      list of (lowest, highest, count), in which every value is counted once.
    """
    low, high = min(values), int(np.quantile(values, 0.99))
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    step = next(step for step in steps if high // step - low // step < bins)
    counted = collections.Counter(min(value // step, high // step) for value in values)
    table = [
        (i * step, (i + 1) * step - 1, counted[i]) for i in range(low // step, high // step + 1)
    ]
    first, last, count = table[-1]
    return [*table[:-1], (first, max(last, max(values)), count)]


def length_bias(chosen, rejected):
    """Whether the longer answer tends to be the chosen one, which a reward model learns first.

    Args:
      chosen, rejected: Lengths of the answers of each pair.

    Returns:
      dict(chosen, rejected: mean lengths; difference = chosen - rejected; longer, equal, shorter:
      shares of the pairs in which the chosen answer is so).
    """
    gap = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    return {
        "chosen": float(np.mean(chosen)),
        "rejected": float(np.mean(rejected)),
        "difference": float(gap.mean()),
        "longer": float((gap > 0).mean()),
        "equal": float((gap == 0).mean()),
        "shorter": float((gap < 0).mean()),
    }


# Examples


def example(record, kind, tokenizer=None, *, template="auto", max_len=None):
    """One record as training sees it.

    Args:
      record, kind: From `read`.
      tokenizer: Tokenizer, or None for the texts as they stand in the file.
      template, max_len: As `tokenize.encode_conversation`.

    Returns:
      dict(id; subset, margin, weight, label, scores where the record has them; too_long = an
      answer, or a prompt to answer, alone exceeds max_len, so training refuses or skips the record
      (data.on_bad), shown whole here; answers = [dict(name,
      prompt, answer, supervised, dropped: numbers of tokens, or None without a tokenizer, spans:
      [(text, supervised)], the whole with its prompt)]).

    Raises:
      ValueError: naming the record, if it cannot be rendered.
    """
    facts = {k: record[k] for k in ("id", "subset", *_OPTIONAL) if k in record}
    sides = _SIDES[kind]
    if tokenizer is None:
        none = dict.fromkeys(("prompt", "answer", "supervised", "dropped"))
        prompt = (_dialogue(record["prompt"]), False)
        texts = {side: [prompt, (_dialogue(record[side]), False)] for side in sides}
        texts = texts or {"prompt": [prompt]}
        answers = [{"name": name, **none, "spans": spans} for name, spans in texts.items()]
        return {**facts, "too_long": False, "answers": answers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole, _ = _ENCODE[kind](tokenizer, [record], template=template)
        cut, too_long = whole, False
        if kind == "prompts":
            too_long = max_len is not None and len(whole[0].prompt) > max_len
        else:
            try:
                cut, _ = _ENCODE[kind](tokenizer, [record], template=template, max_len=max_len)
            except tokenize.AnswerTooLong:
                too_long = True
    if kind == "pairs":
        names = dict(zip(whole[0].pairs[0], sides))
        names = [names[j] for _, j in _all(whole)]
    else:
        names = [*sides] or ["prompt"]
        if len(whole) > 1:
            names = [f"completion {turn} of {len(whole)}" for turn in range(1, len(whole) + 1)]
    answers = []
    for name, (full, j), (tree, k) in zip(names, _all(whole), _all(cut), strict=True):
        tokens, mask = tree.prompt, np.zeros(len(tree.prompt), np.bool_)
        if k is not None:
            tokens = np.concatenate([tokens, tree.answers[k]])
            mask = np.concatenate([mask, tree.loss[k]])
        answers.append(
            {
                "name": name,
                "prompt": _before(tree, k),
                "answer": _whole(tree, k) - _before(tree, k),
                "supervised": int(mask.sum()),
                "dropped": _whole(full, j) - _whole(tree, k),
                "spans": _spans(tokenizer, tokens, mask),
            }
        )
    return {**facts, "too_long": too_long, "answers": answers}


def _dialogue(text):
    if isinstance(text, str):
        return text
    return "\n".join(f"[{message['role']}] {message['content']}" for message in text)


def _spans(tokenizer, tokens, mask):
    """Runs of equal mask as [(text, supervised)]."""
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(tokens)]
    # From the beginning each time: some tokenizers drop the space in front of what they decode.
    texts = [tokenizer.decode(tokens[:edge], skip_special=False) for edge in edges]
    spans = []
    for (begin, end), (before, text) in zip(itertools.pairwise(edges), itertools.pairwise(texts)):
        own = text.startswith(before)  # no, where a character is cut in two
        text = text[len(before) :] if own else tokenizer.decode(tokens[begin:end], False)
        spans.append((text, bool(mask[begin])))
    return spans
