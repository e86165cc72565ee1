"""Inference-time probing: how far an answer's state lies from what a reward model knows.

For each dimension the states of validation answers are grouped by label and each group gets its
centroids. Of a new state, a dimension is as near as its nearest centroid (it is said to be relied
on), and the state as near as its nearest dimension: a state far from all is off known ground, and
its reward is not to be trusted. NumPy, float64 inside: the squares cancel where states are near.

References: Wang et al., arXiv:2511.12464, by a summary of its text; the released code has none of
  it. One centroid a label, thresholds by quantile, other metrics and the best-of-n filter are ours.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreward.evals import best_of_n

METRICS = ("euclidean", "mahalanobis", "cosine")
_ROWS = 1024  # of states at a time


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Centroids of every label of every dimension.

    Attributes:
      points: float64[C, D], after `whiten`. dimension: int[C], which of `names`. label: int[C].
      names: Of the dimensions.
      metric: One of `METRICS`.
      whiten: float64[D, D] that states are multiplied with first, or None.
    """

    points: np.ndarray
    dimension: np.ndarray
    label: np.ndarray
    names: tuple[str, ...]
    metric: str = "euclidean"
    whiten: np.ndarray | None = None


def squared(h: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances :math:`h^2 - 2hc + c^2`, not below 0, float64[N, C].

    Both are moved to the mean of the points first, which changes no distance and keeps the
    difference from cancelling where states share a large mean.

    Args:
      h: [N, D]. points: [C, D].
    """
    points = np.asarray(points, np.float64)
    centre = points.mean(axis=0)
    points = points - centre
    out = np.empty((len(h), len(points)))
    for at in range(0, len(h), _ROWS):
        x = np.asarray(h[at : at + _ROWS], np.float64) - centre
        out[at : at + _ROWS] = (x**2).sum(1)[:, None] - 2 * x @ points.T + (points**2).sum(1)
    return np.maximum(out, 0.0)


def kmeans(
    h: np.ndarray, k: int, *, seed: int = 0, iterations: int = 50
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Lloyd's algorithm from a k-means++ start. One centroid is the mean.

    Args:
      h: [N, D]. k: Centroids, at most N. seed: Of the start. iterations: At most.

    Returns:
      (centroids float64[k, D], nearest centroid of each row int[N], inertia after each iteration).
      A centroid that nothing is nearest to stays where it was.

    Raises:
      ValueError: if k is not in 1..N.

    References: Arthur and Vassilvitskii 2007, "k-means++".
    """
    if not 1 <= k <= len(h):
        raise ValueError(f"k-means needs 1 <= k <= {len(h)} (the number of states); received {k}")
    h = np.asarray(h, np.float64)
    if k == 1:
        points = h.mean(axis=0, keepdims=True)
        return points, np.zeros(len(h), int), [float(squared(h, points).sum())]
    rng = np.random.default_rng(seed)
    points = h[[rng.integers(len(h))]]
    while len(points) < k:
        weight = squared(h, points).min(axis=1)
        total = weight.sum()
        chosen = rng.choice(len(h), p=weight / total) if total > 0 else rng.integers(len(h))
        points = np.concatenate([points, h[[chosen]]])
    inertia: list[float] = []
    for _ in range(iterations):
        nearest = squared(h, points).argmin(axis=1)
        for j in np.unique(nearest):
            points[j] = h[nearest == j].mean(axis=0)
        each = squared(h, points)
        inertia.append(float(each[np.arange(len(h)), nearest].sum()))
        if (each.argmin(axis=1) == nearest).all():
            break
    return points, nearest, inertia


def fit(
    states: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    k: int = 1,
    metric: str = "euclidean",
    ridge: float = 0.1,
    seed: int = 0,
) -> Centroids:
    """Centroids of the states of each label of each dimension.

    "mahalanobis" multiplies with L^-1 of the states' spread around their label's mean, over all
    dimensions: :math:`L L^\\top = \\Sigma + \\rho \\frac{\\mathrm{tr} \\Sigma}{D} I`. "cosine" is
    :math:`1 - \\cos`, half the squared distance of states of length 1.

    Args:
      states: [M, D].
      labels: {dimension: int[M], -1 where a state has none}.
      k: Centroids a label, fewer where it has fewer states. metric: One of `METRICS`.
      ridge: rho. seed: Of k-means.

    Raises:
      ValueError: for an unknown metric, or a dimension without labels.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; received {metric!r}")
    for name, given in labels.items():
        if not (np.asarray(given) >= 0).any():
            raise ValueError(f"no state has a label of {name}; leave the dimension out")
    groups = [
        (d, label, np.flatnonzero(np.asarray(given) == label))
        for d, given in enumerate(labels.values())
        for label in np.unique(given)
        if label >= 0
    ]
    whiten = None
    if metric == "mahalanobis":
        whiten = _whitening(states, [rows for *_, rows in groups], ridge)
    points, where, which = [], [], []
    for d, label, rows in groups:
        found, *_ = kmeans(_moved(states[rows], metric, whiten), min(k, len(rows)), seed=seed)
        points.append(found)
        where += [d] * len(found)
        which += [label] * len(found)
    points = np.concatenate(points)
    if metric == "cosine":
        points = _unit(points)
    return Centroids(points, np.array(where), np.array(which), tuple(labels), metric, whiten)


def _whitening(states, groups, ridge):
    width = states.shape[1]
    total, count = np.zeros((width, width)), 0
    for rows in groups:
        x = np.asarray(states[rows], np.float64)
        x = x - x.mean(axis=0)
        total += x.T @ x
        count += len(rows)
    sigma = total / count
    level = ridge * np.trace(sigma) / width
    if not level > 0:
        raise ValueError(
            f"mahalanobis needs states that differ within a label and ridge > 0; received "
            f"ridge={ridge} and a mean variance of {np.trace(sigma) / width:g}"
        )
    return np.linalg.inv(np.linalg.cholesky(sigma + level * np.eye(width))).T


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _moved(h, metric, whiten):
    h = np.asarray(h, np.float64)
    if metric == "cosine":
        return _unit(h)
    return h if whiten is None else h @ whiten


def distances(centroids: Centroids, h: np.ndarray) -> np.ndarray:
    """Distance of each state to each centroid, float32[N, C].

    Args:
      centroids: From `fit`. h: [N, D].
    """
    far = squared(_moved(h, centroids.metric, centroids.whiten), centroids.points)
    return (0.5 * far if centroids.metric == "cosine" else np.sqrt(far)).astype(np.float32)


def by_dimension(centroids: Centroids, far: np.ndarray) -> np.ndarray:
    """Distance to the nearest centroid of each dimension, float32[N, dimensions].

    The smaller, the more the dimension is said to be relied on. The row's least is `d_min`.

    Args:
      centroids: From `fit`. far: [N, C], from `distances`.
    """
    count = len(centroids.names)
    return np.stack([far[:, centroids.dimension == d].min(axis=1) for d in range(count)], axis=1)


def d_min(centroids: Centroids, h: np.ndarray) -> np.ndarray:
    """Distance of each state to the nearest centroid of all, float32[N]."""
    return distances(centroids, h).min(axis=1)


def nearest_label(centroids: Centroids, far: np.ndarray) -> np.ndarray:
    """Label of the nearest centroid of each dimension, int[N, dimensions].

    Args:
      centroids: From `fit`. far: [N, C], from `distances`.
    """
    out = np.empty((len(far), len(centroids.names)), int)
    for d in range(len(centroids.names)):
        mine = np.flatnonzero(centroids.dimension == d)
        out[:, d] = centroids.label[mine[far[:, mine].argmin(axis=1)]]
    return out


def explain(
    centroids: Centroids, h: np.ndarray, words: Mapping[str, Sequence[str]]
) -> list[dict[str, tuple[str, float]]]:
    """What each state is near to, one dict a state: {dimension: (label, distance)}, nearest first.

    Args:
      centroids: From `fit`. h: [N, D]. words: Names of the labels of each dimension.
    """
    far = distances(centroids, h)
    nearest, near = nearest_label(centroids, far), by_dimension(centroids, far)
    names = centroids.names
    return [
        {
            names[d]: (words[names[d]][labels[d]], float(row[d]))
            for d in np.argsort(row, kind="stable")
        }
        for row, labels in zip(near, nearest)
    ]


def threshold(far: np.ndarray, quantile: float) -> float:
    """The d_min that a share `quantile` of validation answers does not exceed.

    Args:
      far: d_min of validation answers, which the centroids were not made of. quantile: In [0, 1].

    Raises:
      ValueError: if the quantile is none, or there are no answers.
    """
    if not 0 <= quantile <= 1 or not len(far):
        raise ValueError(
            f"a threshold needs answers and a quantile in [0, 1]; received {len(far)} and "
            f"{quantile}"
        )
    return float(np.quantile(far, quantile, method="higher"))


def dropped(far: np.ndarray, tau: float) -> np.ndarray:
    """Which answers lie farther than tau from every centroid, bool like `far` (d_min)."""
    return np.asarray(far) > tau


def best_of_n_filtered(
    gold: np.ndarray, reward: np.ndarray, far: np.ndarray, tau: float
) -> dict[str, np.ndarray]:
    """Gold grade of the answer picked by reward, where far ones were dropped before.

    Where all answers to a prompt are far, all stay.

    Args:
      gold: Grade of each answer, [N, n]. reward: What is picked by, [N, n]. far: d_min, [N, n].
      tau: Threshold.

    Returns:
      One float64[N] each: "plain" (nothing dropped), "filtered", "random" (as many answers dropped
      at random, in expectation over which), "mean", "oracle", "dropped" (share of the answers) and
      "emptied" (1 where all were far). Ties in reward share. `best_of_n.paired` compares two.

    Raises:
      ValueError: if the shapes differ, or a reward or distance is NaN.
    """
    gold, reward, far = (np.asarray(x, np.float64) for x in (gold, reward, far))
    if gold.ndim != 2 or not gold.shape == reward.shape == far.shape:
        raise ValueError(
            f"gold, reward and distances need one shape [prompts, answers]; received {gold.shape}, "
            f"{reward.shape} and {far.shape}"
        )
    if np.isnan(far).any():
        raise ValueError("a distance is NaN; compute the distance of every answer")
    drop = dropped(far, tau)
    emptied = drop.all(axis=1)
    keep = ~drop | emptied[:, None]
    rows = []
    for grades, values, kept in zip(gold, reward, keep):
        n, m = len(grades), int(kept.sum())
        rows.append(
            {
                "plain": best_of_n.picked(grades, values, n),
                "filtered": best_of_n.picked(grades[kept], values[kept], m),
                "random": best_of_n.picked(grades, values, m),
                "mean": float(grades.mean()),
                "oracle": float(grades.max()),
                "dropped": 1 - m / n,
            }
        )
    out = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {**out, "emptied": emptied.astype(np.float64)}
