"""Preference pairs to trees: pairs about one prompt share its computation."""

import collections
import dataclasses
import json

from jaxreward.data.tokenize import AnswerTooLong, Tree, encode_tree, shortened


def group(records, *, most=16):
    """Puts pairs with the same prompt and subset together.

    Equal answers become one answer. A prompt with more than `most` different answers is cut into
    several groups; every pair is in exactly one.

    Args:
      records: From `sources.read_pairs`.
      most: Most answers of a group, at least 2.

    Returns:
      list of dict(id, prompt, subset, answers, pairs, margin, weight, records), in order of first
      appearance; `pairs` are (chosen, rejected) as indices into `answers`, and `records` the
      index of each pair's record.
    """
    if most < 2:
        raise ValueError(f"a group needs room for 2 answers; received most={most}")
    done, open_ = [], {}
    for number, record in enumerate(records):
        key = json.dumps([record["prompt"], record.get("subset")], sort_keys=True)
        texts = [json.dumps(record[side], sort_keys=True) for side in ("chosen", "rejected")]
        entry = open_.get(key)
        if entry is None or len({*entry["index"], *texts}) > most:
            entry = {
                "id": record["id"],
                "prompt": record["prompt"],
                "subset": record.get("subset"),
                "answers": [],
                "pairs": [],
                "margin": [],
                "weight": [],
                "records": [],
                "index": {},
            }
            open_[key] = entry
            done.append(entry)
        for side, text in zip(("chosen", "rejected"), texts):
            if text not in entry["index"]:
                entry["index"][text] = len(entry["answers"])
                entry["answers"].append(record[side])
        entry["pairs"].append(tuple(entry["index"][text] for text in texts))
        entry["margin"].append(record.get("margin", 0.0))
        entry["weight"].append(record.get("weight", 1.0))
        entry["records"].append(number)
    return [{k: v for k, v in entry.items() if k != "index"} for entry in done]


def encode_pairs(
    tokenizer, records, *, template="auto", max_len=None, on_long="error", most=16
) -> tuple[list[Tree], dict]:
    """Encodes preference pairs, those about one prompt in one tree.

    Args:
      tokenizer: Tokenizer.
      records: From `sources.read_pairs`.
      template: As `tokenize.encode_conversation`.
      max_len: Most tokens of prompt and one answer, or None.
      on_long: What to do with a pair whose answer alone exceeds max_len: "error", or "skip",
        which counts.
      most: Most answers of a tree.

    Returns:
      (trees, report). The report is dict(pairs, trees, skipped, truncated = trees that lost prompt
      tokens, dropped_tokens). Warns once, with counts, if anything was truncated or skipped.

    Raises:
      ValueError: naming the record; or when no pair is left.
    """
    if on_long not in ("error", "skip"):
        raise ValueError(f'on_long must be "error" or "skip"; received {on_long!r}')
    trees, skipped = [], 0
    pending = collections.deque(group(records, most=most))
    while pending:
        entry = pending.popleft()
        try:
            tree = encode_tree(
                tokenizer,
                entry["prompt"],
                entry["answers"],
                template=template,
                max_len=max_len,
                id=entry["id"],
            )
        except ValueError as error:
            if len(entry["pairs"]) > 1:
                # One by one: a bad answer must not take the other pairs of its prompt along, and
                # the message must name its own pair.
                single = [group([records[i]])[0] for i in entry["records"]]
                pending.extendleft(reversed(single))
                continue
            long = isinstance(error, AnswerTooLong)
            if long and on_long == "skip":
                skipped += 1
                continue
            kind = AnswerTooLong if long else ValueError
            raise kind(f"pair {entry['id']!r}: {error}") from error
        scores = [records[i].get("scores") for i in entry["records"]]
        trees.append(
            dataclasses.replace(
                tree,
                **{key: entry[key] for key in ("pairs", "margin", "weight", "subset")},
                scores=scores if any(scores) else [],
            )
        )
    report = shortened(trees, skipped, max_len, total=len(records), what="pair")
    return trees, {"pairs": sum(len(tree.pairs) for tree in trees), **report}
