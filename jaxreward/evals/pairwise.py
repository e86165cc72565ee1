"""Accuracy on preference pairs, whole and by subset, with intervals."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxreward.data.tokenize import Tree


def outcomes(trees: list[Tree], scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One entry per pair, in the order of the trees.

    Returns:
      dict of `gap` (chosen minus rejected score, float64), `right` (1, 0, or 0.5 for a tie),
      `weight`, `tree` (its index: pairs of one prompt are not independent) and `subset`.
    """
    rows = []
    for i, (tree, values) in enumerate(zip(trees, scores, strict=True)):
        for (a, b), weight in zip(tree.pairs, tree.weight, strict=True):
            gap = float(values[a]) - float(values[b])
            rows.append((gap, 0.5 * (1 + np.sign(gap)), weight, i, tree.subset or ""))
    columns = list(zip(*rows)) if rows else [()] * 5
    names = ("gap", "right", "weight", "tree", "subset")
    return {name: np.asarray(column) for name, column in zip(names, columns)}


def bootstrap(
    values: np.ndarray,
    groups: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Weighted mean with a percentile interval, resampling whole groups.

    Answers to one problem are not independent, so problems are drawn, not answers.

    Args:
      values: [n]. groups: Group of each value, [n]. weights: [n] or None for equal.
      samples: Resamples. seed: Of the resampling. level: Of the interval.

    Returns:
      (mean, low, high); NaNs if nothing has weight.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    _, inverse = np.unique(groups, return_inverse=True)
    count = inverse.max() + 1 if len(values) else 0
    total = np.bincount(inverse, values * weights, minlength=count)
    weight = np.bincount(inverse, weights, minlength=count)
    if not weight.sum() > 0:
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(samples):
        drawn = rng.multinomial(count, np.full(count, 1 / count))
        below = drawn @ weight
        if below > 0:
            means.append((drawn @ total) / below)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(total.sum() / weight.sum()), float(low), float(high)


def accuracy(
    predict: Callable[[list[Tree]], list[np.ndarray]], trees: list[Tree], **kw: Any
) -> Iterator[tuple[str, float]]:
    """Yields "accuracy" (ties count one half), "margin" (mean score gap), "loss" (mean
    Bradley-Terry loss), "pairs" (those with weight), and "accuracy/<subset>" for every named
    subset. Pairs count by their weight.
    """
    for name, value in measures(outcomes(trees, predict(trees)), **kw):
        yield name, value[0] if isinstance(value, tuple) else value


def measures(found: dict[str, np.ndarray], *, samples: int = 0, seed: int = 0) -> Iterator:
    """Metrics of `outcomes`: (name, value), or (name, (value, low, high)) when samples > 0."""
    weight = found["weight"]
    if not len(weight) or not weight.sum() > 0:
        yield "pairs", 0.0
        return

    def mean(values, where=slice(None)):
        if samples:
            return bootstrap(
                values[where],
                found["tree"][where],
                weights=weight[where],
                samples=samples,
                seed=seed,
            )
        return float(np.average(values[where], weights=weight[where]))

    yield "accuracy", mean(found["right"])
    yield "margin", mean(found["gap"])
    yield "loss", mean(np.logaddexp(0.0, -found["gap"]))
    yield "pairs", float(np.count_nonzero(weight))
    for subset in sorted(set(found["subset"]) - {""}):
        where = found["subset"] == subset
        if weight[where].sum() > 0:
            yield f"accuracy/{subset}", mean(found["right"], where)
