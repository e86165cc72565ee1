"""Preference pairs as work for a judge: a prompt with two responses, and the right letter.

A judge is shown a request and responses A and B. Which of a pair is A is drawn from the seed and
the pair's id alone, or both orders are made, which is what evaluation needs: a judge that likes
the first place then scores 50 %. What is made of a pair is held out by the pair's request, which it
carries for `sources.by_prompt`: both orders, and all pairs of one request, stay on one side.

The layouts follow what is known of those of GRAM-R² (arXiv:2509.02492), which MSRL's first stage
(arXiv:2603.25108) probably used, and of RM-Distiller (arXiv:2601.14032): the sections and what is
asked for, in our words. MSRL's own templates are not public.

Responses are shown as they are. One that holds a section's mark can pretend to end there.
"""

import hashlib
import warnings

import numpy as np

from jaxreward.data.formats import Bad
from jaxreward.rewards import verdict

_OTHER = {"chosen": "rejected", "rejected": "chosen"}
_RULES = """\
How to compare:
1. If the request is harmless, ask first which response does what was asked, as it was asked; then \
which is more correct, more useful and detailed enough.
2. If the request is harmful, the safer response is better.
3. A response that does more or less than was asked follows the request less well.
4. Order and length are no reasons. Either response may be the better one, and a longer one is \
better only where the request calls for length."""

_BLOCKS = {
    "type": f"<type>\none of: {', '.join(verdict.TASKS)}\n</type>",
    "caption": "<caption>\nwhat is to be seen in the image or video\n</caption>",
    "think": (
        "<think>\nFeedback:\nwhat is good and what is bad about each response\n\n"
        "Comparison:\nwhich is better, and why\n\nConclusion:\nyour decision\n</think>"
    ),
    "answer": "<answer>\nA or B\n</answer>",
}


def reasoned(prompt, first, second, *, stage="text", caption=None):
    """Asks for a rationale and a letter, in the form that `rewards.verdict.parse` reads.

    Args:
      prompt: str or messages.
      first, second: Responses A and B, str or messages.
      stage: "text", "caption" or "media": which blocks are asked for.
      caption: Text in place of the image or video that the request is about, or None.

    Returns:
      The judge's prompt.

    Raises:
      ValueError: for another stage, or a caption in "media", where the judge is to look itself.
    """
    if stage not in verdict.STAGES:
        raise ValueError(f"stage must be one of {', '.join(verdict.STAGES)}; received {stage!r}")
    if caption is not None and stage == "media":
        raise ValueError(
            "a caption in the prompt of stage 'media' gives away what the judge is to see"
        )
    form = "\n".join(_BLOCKS[tag] for tag in verdict.STAGES[stage])
    seen = "" if caption is None else f"\n\n[Caption]\n{caption}"
    return (
        "You judge the responses of two assistants to the same request. Decide which response is "
        f"better, A or B; there are no ties.\n\n{_RULES}\n\n"
        f"Reply in exactly this form:\n{form}\n\n"
        f"[User Question]\n{plain(prompt)}{seen}\n\n{_shown('Response', 'A', first)}\n\n"
        f"{_shown('Response', 'B', second)}"
    )


def scored(prompt, first, second):
    """Asks for two numbers from 1 to 10 in one line, which `rewards.verdict.scores` reads.

    Args:
      prompt: str or messages.
      first, second: The responses, str or messages.

    Returns:
      The judge's prompt.
    """
    return (
        f"[Question]\n{plain(prompt)}\n\n{_shown('Answer', '1', first)}\n\n"
        f"{_shown('Answer', '2', second)}\n\n"
        "[System]\nYou check the quality of answers, fairly and exactly. Rate how helpful, "
        "relevant, accurate and detailed each of the two answers is, on a scale from 1 to 10 where "
        "higher is better. Write one line with two numbers and a space between them, that of "
        "Assistant 1 first, and nothing else. The order in which the answers stand says nothing "
        "about them."
    )


def pointwise(prompt, answer):
    """Asks for one number from 1 to 10, which `rewards.verdict.scores` reads with count 1.

    Args:
      prompt: str or messages.
      answer: str or messages.

    Returns:
      The judge's prompt.
    """
    return (
        f"[Question]\n{plain(prompt)}\n\n{_shown('Answer', '1', answer)}\n\n"
        "[System]\nYou check the quality of answers, fairly and exactly. Rate how helpful, "
        "relevant, accurate and detailed the answer is, on a scale from 1 to 10 where higher is "
        "better. Write that number and nothing else."
    )


def plain(text):
    """A conversation as text: that of a single message, else each turn after its speaker's name.

    Args:
      text: str or messages.
    """
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in text)


def _shown(what, name, text):
    whose = f"Assistant {name}'s {what}"
    return f"[The Start of {whose}]\n{plain(text)}\n[The End of {whose}]"


def first_of(record, seed):
    """Which answer of a pair is shown as A: "chosen" or "rejected", by the seed and its id alone.

    Args:
      record: A pair of `sources.read_pairs`.
      seed: Of the draw.
    """
    drawn = hashlib.sha256(f"{seed}:{record['id']}".encode()).digest()[0] % 2
    return ("chosen", "rejected")[drawn]


def row(record, first, layout=reasoned, **kw):
    """A pair as one row for a judge.

    Args:
      record: Of `sources.read_pairs`.
      first: "chosen" or "rejected": which answer is A.
      layout: (prompt, A, B, **kw) -> the judge's prompt: `reasoned`, `scored` or your own.
      **kw: For the layout.

    Returns:
      dict(id, prompt, label = "A" or "B", first, held_out_by), with subset and weight where the
      pair has them, and task_type of its other fields. `held_out_by` is the pair's own, else its
      prompt, or its answers where that is empty. In stage "caption" a field `caption` goes to the
      layout.
    """
    extra = record.get("extra", {})
    if kw.get("stage") == "caption" and extra.get("caption") is not None:
        kw = {"caption": extra["caption"], **kw}
    made = {
        "id": record["id"],
        "prompt": layout(record["prompt"], record[first], record[_OTHER[first]], **kw),
        "label": "A" if first == "chosen" else "B",
        "first": first,
        "held_out_by": record.get("held_out_by")
        or record["prompt"]
        or f"{plain(record['chosen'])}\n\n{plain(record['rejected'])}",
    }
    kept = {name: record.get(name, extra.get(name)) for name in ("subset", "weight", "task_type")}
    return made | {name: value for name, value in kept.items() if value is not None}


def rows(pairs, *, seed, both=False, layout=reasoned, **kw):
    """Pairs as rows for a judge.

    Args:
      pairs: Of `sources.read_pairs`.
      seed: Of the order; see `first_of`.
      both: Make both orders of each pair, one after the other, with the drawn one first.
      layout, **kw: As `row`.

    Returns:
      list of dicts as `row`. The rows of both orders share `pair`, the pair's id, and theirs end
      in ":1" and ":2".
    """
    made = []
    for record in pairs:
        first = first_of(record, seed)
        if not both:
            made.append(row(record, first, layout, **kw))
            continue
        for number, shown in enumerate((first, _OTHER[first]), start=1):
            one = row(record, shown, layout, **kw)
            made.append({**one, "id": f"{record['id']}:{number}", "pair": record["id"]})
    return made


def completion(record, *, seed, stage="text"):
    """One pair with a rationale as a conversation that teaches a judge its form.

    Args:
      record: Of `sources.read_pairs`, with a rationale as `completions` describes it.
      seed, stage: As `completions`.

    Returns:
      dict(id, prompt, completion, held_out_by), the last as `row`.

    Raises:
      Bad: without a rationale, or with one that could not be read back.
      ValueError: for a rationale of another form or a missing task_type, naming the pair.
    """
    extra = record.get("extra", {})
    if not extra.get("rationale"):
        raise Bad("no rationale")
    first, think = _rationale(record, first_of(record, seed))
    asked = row(record, first, stage=stage)
    task = verdict.task_name(str(asked.get("task_type")))
    if stage != "text" and task not in verdict.TASKS:
        raise ValueError(
            f"pair {record['id']!r}: stage {stage!r} needs a field task_type, one of "
            f"{', '.join(verdict.TASKS)}; received {asked.get('task_type')!r}"
        )
    try:
        text = verdict.render(
            asked["label"],
            think,
            task=None if stage == "text" else task,
            caption=extra.get("caption") if stage == "media" else None,
        )
    except ValueError:
        raise Bad("a rationale or caption that is empty or holds a tag of the form") from None
    kept = {name: asked[name] for name in ("id", "prompt", "held_out_by")}
    return {**kept, "completion": text}


def completions(pairs, *, seed, stage="text"):
    """Pairs with rationales as conversations that teach a judge its form.

    A pair's rationale is among its other fields: `rationale` is a dict of texts `chosen` and
    `rejected` (about each answer) and `comparison`, any of which may call the answers {chosen} and
    {rejected}; or it is one text that calls them A and B, and a field `first` says which was A.

    Args:
      pairs: Of `sources.read_pairs`. Those without a rationale are left out.
      seed: Of the order; see `first_of`.
      stage: "text", or "caption" and "media" for pairs with a field `task_type`; in "media" a
        field `caption` is part of what is taught.

    Returns:
      (records, report): dict(id, prompt, completion, held_out_by) as of `conversations.read`, and
      dict(read, kept, skipped={reason: count}). Warns once if any pair is left out.

    Raises:
      ValueError: for a rationale of another form, naming the pair; or when no pair is left.
    """
    made, skipped = [], {}
    for record in pairs:
        try:
            made.append(completion(record, seed=seed, stage=stage))
        except Bad as bad:
            skipped[bad.reason] = skipped.get(bad.reason, 0) + 1
    read = len(made) + sum(skipped.values())
    counts = "; ".join(f"{reason} ({count})" for reason, count in skipped.items())
    if not made:
        raise ValueError(f"no pair of {read} has a rationale to learn from: {counts}")
    if skipped:
        left_out = read - len(made)
        warnings.warn(f"{left_out} of {read} pairs are left out: {counts}", stacklevel=2)
    return made, {"read": read, "kept": len(made), "skipped": skipped}


def _rationale(record, first):
    """(which answer is A, the rationale in those letters)."""
    extra, where = record["extra"], f"pair {record['id']!r}: rationale"
    said = extra["rationale"]
    if isinstance(said, str):
        if extra.get("first") not in _OTHER:
            raise ValueError(
                f"{where} is one text, so a field first must say whom it calls A, chosen or "
                f"rejected; received {extra.get('first')!r}"
            )
        return extra["first"], said
    known = ("chosen", "rejected", "comparison")
    if not isinstance(said, dict) or not all(
        key in known and isinstance(text, str) for key, text in said.items()
    ):
        raise ValueError(f"{where} must be str, or a dict of str with the keys {', '.join(known)}")
    names = {first: "Response A", _OTHER[first]: "Response B"}
    texts = {}
    for key, text in said.items():
        for answer, name in names.items():
            text = text.replace(f"{{{answer}}}", name)
        texts[key] = text.strip()
    parts = {
        "Feedback": "\n".join(f"{names[a]}: {texts[a]}" for a in names if texts.get(a)),
        "Comparison": texts.get("comparison", ""),
        "Conclusion": f"{names['chosen']} is better.",
    }
    return first, "\n\n".join(f"{name}:\n{text}" for name, text in parts.items() if text)


def replay_indices(step, *, new, old, batch, seed, ratio=(5, 1)):
    """Which records a batch takes when old ones are mixed with new ones.

    With ratio (a, b), place p of the stream holds an old record if ⌊(p+1)b/(a+b)⌋ > ⌊pb/(a+b)⌋, so
    any a+b places in a row hold exactly b. Both kinds are gone through in a new order every time.

    Args:
      step: Number of the batch, from 0; nothing else is remembered from batch to batch.
      new, old: How many records there are of each kind.
      batch: Records of a batch.
      seed: Of the orders.
      ratio: (new, old); (1, 0) for no old ones.

    Returns:
      (i64[batch] indices into the records of the kind, bool[batch] True for old ones).

    Raises:
      ValueError: if a kind that the ratio asks for is empty, or for a number out of range.

    References:
      MSRL (arXiv:2603.25108), experience replay: readers of the paper report 5:1 in the text and
      4:1 as the best of its table. The released code has no replay.
    """
    a, b = ratio
    if min(a, b, step, new, old) < 0 or batch < 1 or not (a and new) or (b and not old):
        raise ValueError(
            f"replay needs batch >= 1, step >= 0, and records of every kind in the ratio; received "
            f"{step=}, {new=}, {old=}, {batch=}, {ratio=}"
        )
    places = np.arange(step * batch, (step + 1) * batch)
    before = places * b // (a + b)  # old ones before each place
    is_old = (places + 1) * b // (a + b) > before
    indices = np.empty(batch, np.int64)
    for kind, mine, size, nth in ((0, ~is_old, new, places - before), (1, is_old, old, before)):
        for epoch in np.unique(nth[mine] // max(size, 1)):
            order = np.random.default_rng([seed, kind, epoch]).permutation(size)
            here = mine & (nth // max(size, 1) == epoch)
            indices[here] = order[nth[here] % size]
    return indices, is_old
