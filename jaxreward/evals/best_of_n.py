"""Best-of-n: how good is the answer that a selector picks, beside the mean and the oracle.

Answers are graded 0 or 1. A selector gives each answer a number and the highest wins; ties share
the pick evenly. Every figure is the exact expectation over which n of the sampled answers are
drawn without replacement, averaged over problems; intervals resample problems.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreward.evals.pairwise import bootstrap


def picked(correct: Sequence[float], scores: Sequence[float], n: int) -> float:
    """Expected grade of the highest-scored of n answers drawn without replacement; ties share.

    Args:
      correct: Grade of each of m answers. scores: Score of each. n: Answers drawn, n <= m.

    Raises:
      ValueError: if n is not in 1..m, or a score is NaN.
    """
    correct, scores = np.asarray(correct, np.float64), np.asarray(scores, np.float64)
    m = len(correct)
    if not 1 <= n <= m:
        raise ValueError(f"best-of-{n} needs at least {n} answers and n >= 1; there are {m}")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN; score every answer before selecting among them")
    # By groups of equal score, highest first: P(the best drawn answer lies in the group).
    total, above = 0.0, 0
    for value in np.unique(scores)[::-1]:
        group = scores == value
        size = int(group.sum())
        none_above = math.comb(m - above, n) - math.comb(m - above - size, n)
        total += none_above / math.comb(m, n) * correct[group].mean()
        above += size
    return total


def majority(correct: Sequence[float], finals: Sequence[str | None], n: int) -> float:
    """Expected grade of the most frequent final answer among n drawn without replacement.

    Ties share; answers without a final answer do not vote. Enumerates all draws: use small n.
    """
    if not 1 <= n <= len(correct):
        raise ValueError(f"majority of {n} needs at least {n} answers; there are {len(correct)}")
    grades = []
    for draw in itertools.combinations(range(len(correct)), n):
        votes = Counter(finals[i] for i in draw if finals[i] is not None)
        most = max(votes.values(), default=0)
        winners = [i for i in draw if finals[i] is not None and votes[finals[i]] == most]
        # One grade per distinct winner, so that a tie between two answers is an even choice.
        by_final: dict = {}
        for i in winners:
            by_final.setdefault(finals[i], []).append(correct[i])
        means = [float(np.mean(g)) for g in by_final.values()]
        grades.append(
            float(np.mean(means)) if means else float(np.mean([correct[i] for i in draw]))
        )
    return float(np.mean(grades))


def per_problem(
    problems: Sequence[Mapping], selectors: Sequence[str], *, n: int
) -> dict[str, np.ndarray]:
    """Expected grade per problem of every selector, and of "mean", "majority" and "oracle".

    Args:
      problems: Each with `correct` [m], `finals` [m] and `scores` {selector: [m]}.
      selectors: Names to look up in `scores`.
      n: Answers drawn.
    """
    rows: dict[str, list[float]] = {}
    for problem in problems:
        correct = problem["correct"]
        row = {"mean": float(np.mean(correct))}
        row |= {name: picked(correct, problem["scores"][name], n) for name in selectors}
        row["majority"] = majority(correct, problem["finals"], n)
        row["oracle"] = picked(correct, correct, n)
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: np.asarray(values) for name, values in rows.items()}


def pair_accuracy(problems: Sequence[Mapping], selector: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of (right, wrong) answer pairs of each problem that the selector orders correctly.

    Returns:
      (share per problem with both kinds, indices of these problems). Ties count one half.
    """
    shares, where = [], []
    for i, problem in enumerate(problems):
        correct = np.asarray(problem["correct"], bool)
        scores = np.asarray(problem["scores"][selector], np.float64)
        if correct.all() or not correct.any():
            continue
        gaps = scores[correct][:, None] - scores[~correct][None, :]
        shares.append(float(np.mean(0.5 * (1 + np.sign(gaps)))))
        where.append(i)
    return np.asarray(shares), np.asarray(where, int)


def interval(
    values: np.ndarray,
    groups: Sequence | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """{"value", "low", "high"}: mean over problems with a 95 % interval.

    Args:
      values: One per problem.
      groups: Problems of one group are drawn together, such as 3 + 5 and 5 + 3; default each alone.
      samples, seed: Of the resampling.
    """
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    mean, low, high = bootstrap(values, groups, samples=samples, seed=seed)
    return {"value": mean, "low": low, "high": high}


def paired(a: np.ndarray, b: np.ndarray, groups: Sequence | None = None, **kw) -> dict:
    """{"difference", "low", "high"} of two selectors over the same problems; see `interval`."""
    got = interval(np.asarray(a) - np.asarray(b), groups, **kw)
    return {"difference": got["value"], "low": got["low"], "high": got["high"]}


def recovered(values: Mapping[str, np.ndarray], selector: str) -> float:
    """Share of the gap from "mean" to "oracle" that a selector closes."""
    gap = float(values["oracle"].mean() - values["mean"].mean())
    return float(values[selector].mean() - values["mean"].mean()) / gap if gap else float("nan")
