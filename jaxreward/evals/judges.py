"""How often a generative judge is right, in both orders of a pair, and what its place decides.

Verdicts are int8[N, 2, k]: of N pairs, in both orders, k samples each. The value says which ANSWER
was chosen, the swap undone: 0 the right one, 1 the other, -1 where no verdict could be read, -2 in
an order that was not asked for. Order 0 shows the right answer as A, order 1 as B.

A verdict that can be read counts, also where the answer does not keep its form; an unreadable one
is a wrong one. A judge that always says A is right in one order of each pair: `single_accuracy`
0.5, `pair_accuracy` and `consistency` 0.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxreward.evals import pairwise
from jaxreward.evals.sampled import Answered
from jaxreward.sampling import select

UNREADABLE, NOT_ASKED = -1, -2


def outcomes(verdicts: np.ndarray) -> dict[str, np.ndarray]:
    """One number a pair; NaN where there is nothing to measure.

        single_accuracy   mean over the orders asked of p(right)
        pair_accuracy     p_0(right) p_1(right)
        consistency       sum over both answers c of p_0(c) p_1(c)
        unparseable       mean over the orders asked of p(unreadable: no letter at all)
        first             mean over the orders asked of p(says A | readable)

    p_o is the share of the k samples in order o; a product of two is the mean over all k^2 ways to
    put a sample of one order beside one of the other. With k = 1: both orders right, and the same
    answer chosen in both. An unreadable verdict is consistent with nothing. Whether an answer keeps
    its form plays no part.

    Args:
      verdicts: As above.

    Returns:
      dict of float64[N].

    Raises:
      ValueError: for another shape, another value, or an order of which only a part was asked.
    """
    verdicts = _checked(verdicts)
    asked = verdicts[:, :, 0] != NOT_ASKED
    p = {c: (verdicts == c).mean(axis=2) for c in (0, 1, UNREADABLE)}
    both = asked.all(axis=1)
    product = lambda c: np.where(both, p[c][:, 0] * p[c][:, 1], np.nan)
    place = np.arange(2)[None, :, None]  # order 0 shows answer 0 as A, order 1 answer 1
    return {
        "single_accuracy": _mean(p[0], asked),
        "pair_accuracy": product(0),
        "consistency": product(0) + product(1),
        "unparseable": _mean(p[UNREADABLE], asked),
        "first": _mean(
            (verdicts == place).sum(axis=2) / np.maximum((verdicts >= 0).sum(axis=2), 1),
            (verdicts >= 0).any(axis=2),
        ),
    }


def vote(verdicts: np.ndarray, *, on_tie: str = "first") -> np.ndarray:
    """The majority of the k samples of each order, int8[N, 2, 1]; unreadable ones do not vote.

    Args:
      verdicts: As above.
      on_tie: As `select.majority_vote`: "first" lets the answer sampled first win, "none" nobody,
        which counts as unreadable.

    Raises:
      ValueError: as `outcomes`, or for another `on_tie`.
    """
    verdicts = _checked(verdicts)
    out = np.full((*verdicts.shape[:2], 1), NOT_ASKED, np.int8)
    for pair, order in np.argwhere(verdicts[:, :, 0] != NOT_ASKED):
        won, _ = select.majority_vote(verdicts[pair, order], classes=2, on_tie=on_tie)
        out[pair, order] = won  # -1, nobody, is what an unreadable verdict is
    return out


def measures(
    verdicts: np.ndarray, subsets: Sequence[str] | None = None, *, samples: int = 2000
) -> Iterator[tuple[str, float]]:
    """Metrics of `outcomes`: "<name>" is the mean over all pairs that have it, "<name>_low" and
    "<name>_high" its 95 % interval (pairs resampled), "<name>/<subset>" the mean of a subset and
    "<name>_macro" the unweighted mean over the subsets. What nothing can be measured on is left
    out. "pairs" counts all, "pairs_both" those asked in both orders.

    Args:
      verdicts: As above.
      subsets: Of each pair, "" for none; or None.
      samples: Of the bootstrap.

    Raises:
      ValueError: as `outcomes`, or when `subsets` has another length.
    """
    found = outcomes(verdicts)
    subsets = np.asarray([""] * len(verdicts) if subsets is None else list(subsets), np.str_)
    if len(subsets) != len(verdicts):
        raise ValueError(f"{len(verdicts)} pairs and {len(subsets)} subsets; give one a pair")
    for name, values in found.items():
        there = np.isfinite(values)
        if not there.any():
            continue
        groups = np.flatnonzero(there)
        mean, low, high = pairwise.bootstrap(values[there], groups, samples=samples)
        yield name, mean
        yield f"{name}_low", low
        yield f"{name}_high", high
        parts = {s: values[there & (subsets == s)] for s in sorted(set(subsets.tolist()) - {""})}
        parts = {s: float(part.mean()) for s, part in parts.items() if len(part)}
        yield from ((f"{name}/{s}", value) for s, value in parts.items())
        if parts:
            yield f"{name}_macro", float(np.mean(list(parts.values())))
    yield "pairs", float(len(verdicts))
    yield "pairs_both", float(np.isfinite(found["pair_accuracy"]).sum())


def verdicts_of(
    prompts: Sequence[dict], accuracy: np.ndarray, read: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """(int8[N, 2, k] verdicts, [N] subsets) of graded answers, pairs in the order of their firsts.

    A right answer chose 0, a wrong one with a letter 1, in form or not; one without is unreadable.

    Args:
      prompts: P, each with a `record` that has `label`, the letter of the right answer, and
        optionally `pair`, which two prompts in different orders share, and `subset`.
      accuracy, read: [P, k], 1 where the verdict is the label, and where there is a verdict, as of
        `verdict.agreement` with two choices.

    Raises:
      ValueError: for a label that is not A or B, or two prompts of one pair in one order.
    """
    chosen = np.where(accuracy > 0, 0, np.where(read > 0, 1, UNREADABLE)).astype(np.int8)
    rows, subsets = {}, []
    out = np.full((len(prompts), 2, chosen.shape[1]), NOT_ASKED, np.int8)
    for prompt, values in zip(prompts, chosen, strict=True):
        record = prompt["record"]
        label = record.get("label")
        if label not in ("A", "B"):
            raise ValueError(f"prompt {record.get('id')!r}: label must be A or B; got {label!r}")
        # Without a pair an id is its own, also where ids repeat.
        key = ("pair", record["pair"]) if "pair" in record else ("row", len(rows))
        if key not in rows:
            rows[key] = len(rows)
            subsets.append(record.get("subset") or "")
        place = rows[key], "AB".index(label)
        if out[place][0] != NOT_ASKED:
            raise ValueError(
                f"prompt {record.get('id')!r}: pair {record['pair']!r} is asked twice with the "
                f"right answer as {label}; judges.rows(both=True) makes each order once"
            )
        out[place] = values
    return out[: len(rows)], subsets


def both_orders(
    predict: Callable[..., Answered],
    prompts: list[Any],
    *,
    reward: str = "judge",
    n: int = 1,
    temperature: float = 0.0,
    on_tie: str = "first",
    samples: int = 2000,
) -> Iterator[tuple[str, float]]:
    """Yields `measures` of a judge's sampled verdicts; with n > 1 also "vote/<name>", those of the
    majority of the n samples (voting@n); and the means "format" (answers that keep their form,
    whatever they say), "length" and "finished".

    Prompts are those of `judges.rows`: with both=True a pair's orders are put together, with one
    order a pair what needs both is left out.

    Args:
      predict: (prompts, n, temperature) -> Answered.
      prompts: Held out, as `data.prompts.encode` makes them.
      reward: The entry of config.rewards whose function is `verdict.agreement`.
      n: Answers to each. temperature: Of sampling; 0 is greedy, for which n must be 1.
      on_tie: As `vote`. samples: Of the bootstrap.

    Raises:
      ValueError: for several greedy answers, which are all the same; for a reward without the parts
        accuracy, format and read; or as `verdicts_of`.

    References:
      MSRL, arXiv:2603.25108: accuracy on pairs, greedy, or by voting over 16 samples. The orders,
      the parts by order, the intervals, and that an unreadable verdict is wrong are ours.
    """
    if n > 1 and temperature == 0:
        raise ValueError(f"evals: {n} greedy answers to a prompt are one; set temperature above 0")
    found = predict(prompts, n, temperature)
    names = [f"{reward}/{part}" for part in ("accuracy", "format", "read")]
    missing = [name for name in names if name not in found.parts]
    if missing:
        raise ValueError(
            f"evals: a judge needs the parts {', '.join(names)}; the rewards give "
            f"{', '.join(found.parts)}; name the entry of verdict.agreement with reward="
        )
    accuracy, form, read = (found.parts[name] for name in names)
    verdicts, subsets = verdicts_of(prompts, accuracy, read)
    yield from measures(verdicts, subsets, samples=samples)
    if n > 1:
        voted = vote(verdicts, on_tie=on_tie)
        for name, value in measures(voted, subsets, samples=samples):
            if not name.startswith("pairs"):
                yield f"vote/{name}", value
    yield "format", float(form.mean())
    yield "length", float(found.length.mean())
    yield "finished", float(found.finished.mean())


def _checked(verdicts):
    verdicts = np.asarray(verdicts)
    if verdicts.ndim != 3 or verdicts.shape[1] != 2 or not verdicts.shape[2]:
        raise ValueError(f"verdicts must be [pairs, 2 orders, samples]; got {verdicts.shape}")
    if not np.isin(verdicts, (0, 1, UNREADABLE, NOT_ASKED)).all():
        raise ValueError(
            f"a verdict is 0, 1, {UNREADABLE} (unreadable) or {NOT_ASKED} (not asked); got "
            f"{', '.join(map(str, np.unique(verdicts)))}"
        )
    out = (verdicts == NOT_ASKED).mean(axis=2)
    if ((out > 0) & (out < 1)).any():
        raise ValueError(f"an order is asked in all its samples or in none; {NOT_ASKED} is in some")
    return verdicts


def _mean(values, where):
    """Mean over the orders that count, [N]; NaN where none does."""
    count = where.sum(axis=1)
    return np.where(count > 0, (values * where).sum(axis=1) / np.maximum(count, 1), np.nan)
