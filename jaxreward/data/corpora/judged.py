"""Preference pairs as work for a judge: prompts with a letter for RL, completions to learn from.

    data.corpus=judged.prompts,source=gram.pairs             recipe online_rl
    data.corpus=judged.completions,source=helpsteer3.pairs   recipe sft

`source` says which corpus makes pairs of the file's rows; without it they are pairs already. What
the judge is asked, and which answer is A, is that of `data.judges`.

**Held-out prompts.** A recipe without an `eval_path` holds out by the request that a pair answers,
which its rows carry in the field `held_out_by`: neither two pairs of one request nor the two orders
of a pair (`both=1`) stand on both sides, and both recipes hold out the same, with one seed and one
`eval_fraction`. To learn from one order and evaluate on both, write the rows of the evaluation with
`judges.rows(..., both=True)`: such rows pass `prompts` as they are.
"""

import functools
import inspect
import itertools

from jaxreward.data import judges, sources
from jaxreward.data.corpora import (
    gram,
    helpsteer2,
    helpsteer3,
    implicit,
    pku_saferlhf,
    skywork,
    ultrafeedback,
    unpaired,
)
from jaxreward.data.formats import Bad
from jaxreward.rewards import verdict

SOURCES = {
    "gram.pairs": gram.pairs,
    "helpsteer2.pairs": helpsteer2.pairs,
    "helpsteer3.pairs": helpsteer3.pairs,
    "implicit.pairs": implicit.pairs,
    "pku_saferlhf.pairs": pku_saferlhf.pairs,
    "skywork.pairs": skywork.pairs,
    "ultrafeedback.pairs": ultrafeedback.pairs,
    "unpaired.pairs": unpaired.pairs,
}


def prompts(rows, *, source="", seed=0, both=0, stage="text", **kw):
    """Brings numbered rows into the form of `sources.read_prompts`, with what a reward needs.

    Args:
      rows: (number, dict or Bad), as `formats.rows` yields them.
      source: A name of `SOURCES`, or "" where the rows are pairs as of `sources.read_pairs`.
      seed: Of the order, drawn a pair (`judges.first_of`).
      both: 1 makes both orders of each pair, one row each.
      stage: "text" or "caption", as `judges.reasoned`.
      **kw: Keywords of the source, such as `which=safer` of pku_saferlhf.

    Returns:
      Iterator of the same, with fields as of `judges.row`: id, prompt, label, first, held_out_by;
      and where they are there pair, subset, weight and task_type. Where the first row of the file
      has label A or B, first, and no chosen, its rows are of this form already, and pass as they
      are.

    Raises:
      ValueError: for a keyword out of range. KeyError: for an unknown source.
    """
    if both not in (0, 1):
        raise ValueError(f"judged.prompts: both must be 0 or 1; received {both!r}")
    make = lambda pair: judges.rows([pair], seed=seed, both=both == 1, stage=stage)
    return _made_unless_there(rows, _source(source, stage, kw), make)


def completions(rows, *, source="", seed=0, stage="text", **kw):
    """Brings numbered rows into the form of `conversations.read`: a judge's prompt, and a rationale
    with the right letter in the form that `rewards.verdict.parse` reads.

    Args:
      rows, source, seed, stage, **kw: As `prompts`.

    Returns:
      Iterator of the same, with fields id, prompt, completion and held_out_by. A pair without a
      rationale, or with one that `judges.completions` refuses, is `Bad`.

    Raises:
      ValueError, KeyError: as `prompts`.
    """
    make = lambda pair: [judges.completion(pair, seed=seed, stage=stage)]
    return _made(rows, _source(source, stage, kw), make)


def _source(name, stage, kw):
    """The function that makes pairs of rows. Checks here, before a row is read."""
    if stage not in verdict.STAGES:
        raise ValueError(
            f"judged: stage must be one of {', '.join(verdict.STAGES)}; received {stage!r}"
        )
    if name and name not in SOURCES:
        raise KeyError(f"judged: no source {name!r}; sources: {', '.join(SOURCES)}")
    if not name and kw:
        raise ValueError(f"judged does not take {', '.join(kw)}, and no source is named")
    pairs = SOURCES[name] if name else (lambda rows: rows)
    try:
        inspect.signature(pairs).bind(None, **kw)
    except TypeError as error:
        raise ValueError(
            f"judged: keywords that the source {name} does not take: {error}"
        ) from None
    return functools.partial(pairs, **kw)


def _is_row(row):
    """Whether a row is one of `judges.row`."""
    return (
        not isinstance(row, Bad)
        and row.get("chosen") is None
        and row.get("label") in verdict.CHOICES
        and row.get("first") in ("chosen", "rejected")
    )


def _made(rows, pairs, make):
    for number, row in pairs(rows):
        try:
            if isinstance(row, Bad):
                raise row
            made = make(sources.record_of(sources.pair_of, row, number))
        except Bad as bad:
            made = [bad]
        except ValueError as error:
            made = [Bad(str(error))]
        yield from ((number, one) for one in made)


def _made_unless_there(rows, pairs, make):
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    rows = itertools.chain([first], rows)
    if not _is_row(first[1]):
        yield from _made(rows, pairs, make)
        return
    for number, row in rows:
        if not isinstance(row, Bad) and not _is_row(row):
            row = Bad("is no row of judges.row, as the first of this file is", field="label")
        yield number, row
