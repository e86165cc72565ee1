"""Sets of hypotheses: several answers to each instruction, fixed once, with scores of proxies.

A row of the file is one instruction:

    {"id": "7", "domain": "math", "prompt": "1 + 1?",
     "hyps": [{"text": "2", "source": "sft", "temp": 0.7}, {"text": "3", "source": "dpo"}],
     "scores": {"rm": [1.5, -0.2]}}

Records have the same form, so they are written by `sources.write_jsonl`. Sets are merged from what
several models wrote and from references; spoilt copies are added, which are known to be bad; and
what cannot be compared is dropped and counted.
"""

import collections
import json
import random
import re

import numpy as np

from jaxreward.data import formats, sources

CORRUPTIONS = ("truncated", "shuffled", "off_topic")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")


def read(path, *, limit=None):
    """Reads sets of hypotheses.

    `id` (str or int) may be missing and is then the line number; so may `domain`, a hypothesis's
    `source` and `temp` (its sampling temperature), and `scores`. A null score is one that the
    proxy could not give.

    Args:
      path: As `formats.rows`. limit: Read at most this many; None reads all.

    Returns:
      list of dict(id, domain: str, prompt: str or messages, hyps: list of dict(text, source: str,
      temp: float or None), scores: {proxy: list of float or None}).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file:line:field, or the id that stands twice.
    """
    records, _ = sources.read_rows(path, record_of, what="set of hypotheses", limit=limit)
    times = collections.Counter(record["id"] for record in records)
    twice = [id for id, count in times.items() if count > 1]
    if twice:
        raise ValueError(
            f"{formats.name(path)}: id {twice[0]!r} stands in {times[twice[0]]} rows; give each "
            "set of hypotheses an id of its own"
        )
    return records


def record_of(row, number):
    """A record of `read` of a row. Raises `formats.Bad`."""
    hyps = row.get("hyps")
    if not isinstance(hyps, list) or not hyps:
        raise formats.Bad(
            'must be a list of at least one {"text": ...}', field="hyps", came=formats.show(hyps)
        )
    scores = row.get("scores") or {}
    if not isinstance(scores, dict):
        raise formats.Bad("must be {proxy: list}", field="scores", came=formats.show(scores))
    for name, values in scores.items():
        if not isinstance(values, list) or len(values) != len(hyps):
            came = f"{len(values)} numbers" if isinstance(values, list) else formats.show(values)
            raise formats.Bad(
                "must be a list with one number or null for each of hyps",
                field=f"scores.{name}",
                came=f"{came} for {len(hyps)} hypotheses",
            )
    number_or_none = lambda x, field: None if x is None else formats.number(x, field)
    return {
        "id": sources.id_of(row, number),
        "domain": sources.label_of(row, "domain") or "",
        "prompt": sources.text_of(row, "prompt"),
        "hyps": [_hypothesis(hyp, f"hyps[{i}]") for i, hyp in enumerate(hyps)],
        "scores": {
            name: [number_or_none(x, f"scores.{name}[{i}]") for i, x in enumerate(values)]
            for name, values in scores.items()
        },
    }


def _hypothesis(hyp, field):
    if not isinstance(hyp, dict) or not isinstance(hyp.get("text"), str):
        came = hyp.get("text") if isinstance(hyp, dict) else hyp
        raise formats.Bad("must have a str text", field=field, came=formats.show(came))
    temp = hyp.get("temp")
    try:
        sources.text_of(hyp, "text")
        source = sources.label_of(hyp, "source") or ""
        temp = None if temp is None else formats.number(temp, "temp")
    except formats.Bad as bad:
        raise formats.Bad(str(bad), field=f"{field}.{bad.field}") from None
    return {"text": hyp["text"], "source": source, "temp": temp}


# Building


def read_source(path, *, source, temp=None):
    """Reads answers of one source as sets of hypotheses to merge.

    Args:
      path: What `jaxreward generate` wrote, with `answers` in each row; or reference answers or
        pairs, as `sources.read_answers` takes them.
      source: Name of the source. Of a pair the answers are named <source>/chosen and
        <source>/rejected.
      temp: Temperature that they were sampled at, which the file does not say, or None.

    Returns:
      Records as `read` gives them; hypotheses that were cut off at their longest length also have
      `finished` False, until `clean` drops them.

    Raises:
      FileNotFoundError, ValueError: as `read`.
    """

    def parse(row, number):
        if isinstance(row.get("answers"), list) and row["answers"]:
            hyps = [_hypothesis(hyp, f"answers[{i}]") for i, hyp in enumerate(row["answers"])]
            for hyp, answer in zip(hyps, row["answers"]):
                hyp |= {"source": source, "finished": answer.get("finished", True) is not False}
            prompt = sources.text_of(row, "prompt")
        else:
            found = sources.answer_of(row, number)
            prompt, several = found["prompt"], len(found["names"]) > 1
            hyps = [
                {"text": _text(answer, name), "source": f"{source}/{name}" if several else source}
                for name, answer in zip(found["names"], found["answers"])
            ]
        domain = sources.label_of(row, "domain") or ""
        hyps = [{**hyp, "temp": temp} for hyp in hyps]
        made = {"id": sources.id_of(row, number), "domain": domain, "prompt": prompt}
        return made | {"hyps": hyps, "scores": {}}

    return sources.read_rows(path, parse, what="answer")[0]


def _text(answer, field):
    if isinstance(answer, list):
        if len(answer) > 1:
            raise formats.Bad("must be one message to be a hypothesis", field=field)
        answer = answer[0]["content"]
    return answer


def merge(parts):
    """Sets of several sources as one: hypotheses of one id stand together.

    Args:
      parts: Lists of records, as of `read_source`; without scores, since those of one part say
        nothing about the hypotheses of another.

    Returns:
      Records in order of first appearance; an id may be in some of the parts only.

    Raises:
      ValueError: if one id has two prompts, or a record has scores.
    """
    merged = {}
    for part in parts:
        for record in part:
            if record["scores"]:
                raise ValueError(
                    f"record {record['id']!r} has scores already; merge first, then score"
                )
            into = merged.setdefault(record["id"], {**record, "hyps": []})
            if _key(into["prompt"]) != _key(record["prompt"]):
                raise ValueError(
                    f"id {record['id']!r} has two prompts, {into['prompt']!r:.80} and "
                    f"{record['prompt']!r:.80}; sources are joined by the ids of their prompts, so "
                    "generate from one file, or give ids that are unique over all files"
                )
            into["domain"] = into["domain"] or record["domain"]
            into["hyps"] += record["hyps"]
    return list(merged.values())


def _key(prompt):
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def corrupt(records, kinds=CORRUPTIONS, *, seed=0, source=None):
    """Adds spoilt copies of hypotheses, which a good proxy knows as bad.

    One hypothesis of each set is drawn and spoilt in every way: "truncated" keeps 20 to 60 % of its
    words; "shuffled" puts its sentences, or lines, into another order; "off_topic" takes one of
    another set in its place. What is added has the kind as its `source`.

    Args:
      records: Without scores. kinds: Which, of `CORRUPTIONS`.
      seed: Of the draws, with the record's id: other records do not change what is truncated or
        shuffled.
      source: Spoil hypotheses of this source, or of one that begins with it and "/"; None any.

    Returns:
      (records, {reason: how many could not be spoilt}).

    Raises:
      ValueError: for an unknown kind, or a source that no set has.
    """
    unknown = [kind for kind in kinds if kind not in CORRUPTIONS]
    if unknown:
        raise ValueError(f"unknown corruption {unknown[0]!r}; use one of {', '.join(CORRUPTIONS)}")
    wanted = lambda hyp: source is None or f"{hyp['source']}/".startswith(f"{source}/")
    texts = [[h["text"] for h in record["hyps"] if wanted(h)] for record in records]
    if kinds and not any(texts):
        held = sorted({hyp["source"] for record in records for hyp in record["hyps"]})
        raise ValueError(f"no hypothesis is of source {source!r}; there are {', '.join(held)}")
    if not kinds:
        return list(records), {}
    out, without = [], collections.Counter()
    prompts = [_key(record["prompt"]) for record in records] if "off_topic" in kinds else []
    for i, record in enumerate(records):
        rng = random.Random(f"{seed}:{record['id']}")
        added = []
        if not texts[i]:
            without[f"no hypothesis of {source}"] += 1
        text = rng.choice(texts[i]) if texts[i] else ""
        cut, order = rng.uniform(0.2, 0.6), rng.random()
        made = {
            "truncated": _truncated(text, cut),
            "shuffled": _shuffled(text, order),
            "off_topic": _of_another(rng, prompts, texts, i),
        }
        for kind in kinds if texts[i] else ():
            if made[kind] is None:
                without[f"{kind}: too short, or nothing to take"] += 1
            else:
                added.append({"text": made[kind], "source": kind, "temp": None})
        out.append({**record, "hyps": [*record["hyps"], *added]})
    return out, dict(without)


def _truncated(text, share):
    words = list(re.finditer(r"\S+", text))
    if len(words) < 2:
        return None
    return text[: words[max(1, int(share * len(words))) - 1].end()]


def _shuffled(text, seed):
    sentences = [part for part in _SENTENCES.split(text) if part.strip()]
    if len(set(sentences)) < 2:
        return None
    rng, mixed = random.Random(seed), sentences
    while mixed == sentences:
        mixed = rng.sample(sentences, len(sentences))
    return " ".join(mixed)


def _of_another(rng, prompts, texts, i):
    others = [j for j, p in enumerate(prompts) if texts[j] and p != prompts[i]]
    return rng.choice(texts[rng.choice(others)]) if others else None


def clean(records, *, most=None, length=len, least=2, keep_unfinished=False):
    """Drops what cannot be compared, and counts it.

    Args:
      records: With or without scores, which go with their hypotheses.
      most: Longest text that stays, by `length`; None keeps all.
      length: Text -> int; characters, or a count of tokens.
      least: Sets of fewer hypotheses are dropped.
      keep_unfinished: Keep answers that were cut off where they were sampled. A model ends them
        here where nobody did, so their score says little.

    Returns:
      (records, {reason: count}). Reasons are "unfinished", "empty", "too long" and "repeated" (a
      text that its set has already, but for space around it) of hypotheses, "repeated prompt"
      (the first set stays) and "too few left" of sets.
    """
    out, dropped, asked = [], collections.Counter(), set()
    for record in records:
        if _key(record["prompt"]) in asked:
            dropped["repeated prompt"] += 1
            continue
        asked.add(_key(record["prompt"]))
        kept, seen = [], set()
        for i, hyp in enumerate(record["hyps"]):
            text = hyp["text"].strip()
            reason = (
                "unfinished"
                if not (keep_unfinished or hyp.get("finished", True))
                else "empty"
                if not text
                else "too long"
                if most is not None and length(hyp["text"]) > most
                else "repeated"
                if text in seen
                else None
            )
            if reason:
                dropped[reason] += 1
            else:
                seen.add(text)
                kept.append(i)
        if len(kept) < least:
            dropped["too few left"] += 1
            continue
        hyps = [record["hyps"][i] for i in kept]
        made = {
            "hyps": [{k: hyp[k] for k in ("text", "source", "temp")} for hyp in hyps],
            "scores": {name: [x[i] for i in kept] for name, x in record["scores"].items()},
        }
        out.append({**record, **made})
    return out, dict(dropped)


# Arrays


def padded(rows):
    """Lists of different lengths as one array.

    Args:
      rows: I lists of numbers or None.

    Returns:
      (values float64[I, n], 0 where there is none; valid bool[I, n]).
    """
    n = max(map(len, rows), default=0)
    values, valid = np.zeros((len(rows), n)), np.zeros((len(rows), n), bool)
    for i, row in enumerate(rows):
        there = [j for j, x in enumerate(row) if x is not None]
        valid[i, there] = True
        values[i, there] = [row[j] for j in there]
    return values, valid


def proxies(records):
    """Names of the proxies, in order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record["scores"]))


def proxy_scores(records, name):
    """A proxy's scores of all sets as `padded` gives them; none of a set that it has not scored."""
    return padded([r["scores"].get(name) or [None] * len(r["hyps"]) for r in records])
