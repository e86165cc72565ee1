"""Whether two models differ: on the items that both have, corrected for how many were compared.

Two intervals that overlap say little: what makes an item hard for both models cancels in their
difference. So items are paired. The interval of a difference resamples items. The p-value flips the
signs of the differences of items instead: of few items all resamples may agree, while the flips
still say how little was seen.
"""

from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["LEVEL", "compare", "holm", "ordered", "resample", "won"]

DRAWS = 10_000
LEVEL = 0.05


def won(row: Mapping) -> float | None:
    """Share of an item's comparisons that a model got right; an equal score is a lost one.

    Args:
        row: line of FILE.items.jsonl, with `right` and `scores`, or `verdicts` of one comparison
            (0 is the right answer, -2 was not asked).

    Returns:
        A number in [0, 1], or None where the item has no right or no wrong answer.
    """
    verdicts = row.get("verdicts")
    if verdicts is not None:
        values = np.asarray(verdicts, float)
        values = values[values > -2]
        return float((values == 0).mean()) if values.size else None
    good, bad = sides(row)
    if not good.size or not bad.size:
        return None
    return float((good[:, None] > bad).mean())


def sides(row: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the right and of the wrong answers of an item, float64[a] and float64[b]."""
    scores = np.asarray(row.get("scores") or [], float)
    right = np.zeros(len(scores), bool)
    right[[place for place in row.get("right") or [] if place < len(scores)]] = True
    return scores[right], scores[~right]


def ordered(s: np.ndarray, r: np.ndarray, delta: float = 0.0) -> float | None:
    """Share of the pairs of hypotheses that s orders as r does; a tie of s counts one half.

    Args:
        s, r: Scores of a model and of a proxy, [n]; NaN leaves a hypothesis out.
        delta: Pairs that r holds this close are left out.

    Returns:
        A number in [0, 1], or None where no pair is left.
    """
    live = np.isfinite(s) & np.isfinite(r)
    i, j = np.triu_indices(int(live.sum()), 1)
    s, r = s[live], r[live]
    a, b = s[i] - s[j], r[i] - r[j]
    kept = np.abs(b) > delta
    if not kept.any():
        return None
    return float((0.5 * (1 + np.sign(a[kept] * b[kept]))).mean())


def compare(a: Mapping[str, float], b: Mapping[str, float], *, seed: int = 0) -> dict | None:
    """Mean difference of two models over the items that both have.

    .. math:: \\bar d = \\frac1n \\sum_i (a_i - b_i)

    Args:
        a, b: {item: value} of each model.
        seed: Of the draws.

    Returns:
        {"items", "difference", "low", "high", "p"}: a 95 % percentile interval with items
        resampled, and the two-sided p-value of flipped signs; None without a common item.
    """
    common = [key for key in a if key in b]
    if not common:
        return None
    values = np.round(np.array([a[key] - b[key] for key in common], float), 12)
    # Few values differ, and how often each is drawn is all that a mean needs.
    kinds, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    n, means = len(values), []
    for part in np.array_split(np.arange(DRAWS), max(1, len(kinds) // 64)):
        means.append(rng.multinomial(n, counts / n, size=len(part)) @ kinds / n)
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    sizes = np.unique(np.abs(values), return_counts=True)
    flipped = sum(s * (2.0 * rng.binomial(count, 0.5, DRAWS) - count) for s, count in zip(*sizes))
    seen = np.abs(flipped) >= abs(float(values.sum())) - 1e-9
    difference = float(values.mean())
    p = float((seen.sum() + 1) / (DRAWS + 1))
    low, high = float(low), float(high)
    return {"items": n, "difference": difference, "low": low, "high": high, "p": p}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: below a level where the chance of any false find is below it.

    .. math:: \\tilde p_{(i)} = \\max_{j \\le i} \\min(1, (m - j + 1) p_{(j)})

    of m p-values in ascending order.

    References: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted, most, m = [0.0] * len(p), 0.0, len(p)
    for place, i in enumerate(sorted(range(m), key=lambda i: p[i])):
        most = max(most, min(1.0, (m - place) * p[i]))
        adjusted[i] = most
    return adjusted


def resample(
    values: np.ndarray, bins: np.ndarray, groups: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean of each bin, whole groups resampled at once.

    Args:
        values: [n]. bins: Bin of each, int[n], from 0. groups: Item of each, int[n], from 0.
        draws, seed: Of the resampling.

    Returns:
        (low, high), float64[bins].
    """
    shape = int(groups.max()) + 1, int(bins.max()) + 1
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (groups, bins), values)
    np.add.at(count, (groups, bins), 1.0)
    rng, means = np.random.default_rng(seed), []
    chance = np.full(shape[0], 1 / shape[0])
    for _ in range(draws):
        drawn = rng.multinomial(shape[0], chance)
        below = drawn @ count
        means.append(np.where(below > 0, drawn @ total / np.maximum(below, 1), np.nan))
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return low, high
