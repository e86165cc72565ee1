"""What a model's states say about an answer: states computed once, and the probes on them measured.

The state of an answer is the last layer's at its last token, where a score head would read. It is
frozen: nothing here reaches the model.

References: MRMBench, arXiv:2511.12464. The controls, and all measures beside accuracy, are ours:
  in the published tables the accuracy of many probes is that of always saying one class.
"""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core.types import PairRows
from jaxreward.data.tokenize import Tree
from jaxreward.evals import best_of_n, pointwise, probes, scorer
from jaxreward.models import trainable
from jaxreward.parallel.rules import Rules

PyTree = Any
MODES = ("paper", "strong")
CONTROLS = ("shuffled", "random")
_MEASURES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


# States


def representation(
    plan: trainable.Plan, params: PyTree, frozen: PyTree, rows: PairRows, *, rules=None
) -> jax.Array:
    """State at the last token of each answer, float32[B, K, D], 0 where there is none.

    No gradient flows back.

    Args:
      plan, params, frozen, rows, rules: The model and its rows, as `scorer.outputs`.
    """
    states = scorer.at_ends(plan, params, frozen, rows, rules=rules)
    return jax.lax.stop_gradient(states.astype(jnp.float32))


def make_extract(
    plan: trainable.Plan, *, rules: Rules | None = None, batch: int = 8
) -> Callable[[PyTree, PyTree, list[Tree]], np.ndarray]:
    """A function (params, frozen, trees) -> states of all answers, float32[M, D], in the order of
    the trees.

    Rows, compilations and the mesh as `scorer.over_trees` says.

    Args:
      plan: The model. rules, batch: Mesh, and rows at a time.
    """

    def measure(params, frozen, rows):
        return representation(plan, params, frozen, rows, rules=rules)

    run = scorer.over_trees(measure, plan.cfg.width, rules=rules, batch=batch)

    def extract(params, frozen, trees):
        found = run(params, frozen, trees)
        return np.concatenate(found) if found else np.zeros((0, plan.cfg.width), np.float32)

    return extract


def cached(
    folder: str | Path,
    trees: list[Tree],
    compute: Callable[[], np.ndarray],
    *,
    model: str,
    width: int,
) -> np.ndarray:
    """States of all answers, computed or read back, as `scorer.kept` does it.

    The file is named after the hash of the model and of every text's tokens, wherever its prompt
    ends.

    Args:
      folder: Where the files lie.
      trees: The answers.
      compute: () -> float32[M, D].
      model: Hash of the weights, and of whatever else the states depend on.
      width: D.
    """
    digest = hashlib.sha256(f"{model} states".encode())
    for tree in trees:
        for answer in tree.answers:
            text = np.concatenate([tree.prompt, answer]).astype(np.int32)
            digest.update(np.asarray(len(text), np.int64).tobytes() + text.tobytes())
    path = Path(folder) / f"{digest.hexdigest()[:32]}.npy"
    shape = sum(len(tree.answers) for tree in trees), width
    return scorer.kept(path, shape, np.float32, compute)


# Probes


class Task(NamedTuple):
    """One task: entries to fit and entries to measure, N and n of them.

    Attributes:
      train, test: Rows of the states, int[N] and int[n].
      train_labels, test_labels: Classes, int[N] and int[n].
      train_groups, test_groups: Number of the prompt of each entry, int[N] and int[n], from 0 and
        the same in all tasks.
    """

    train: np.ndarray
    train_labels: np.ndarray
    train_groups: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    test_groups: np.ndarray


def measures(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, majority, balanced accuracy, macro F1 and AUROC of logits.

    As `pointwise.classes` defines them; of several classes AUROC is the mean over those that occur,
    each against the rest. What is not defined is left out.

    Args:
      values: Logits [n, K]; one column is the logit of class 1 of two, which wins above 0.
      labels: Classes, int[n].
    """
    labels = np.asarray(labels)
    values = probes.two_logits(np.asarray(values, np.float64))
    empty = np.zeros(0, np.int32)
    tree = Tree("", empty, [], [], targets=labels[:, None], answer_weight=np.ones(len(labels)))
    found = dict(pointwise.classes(lambda _: [values], [tree]))
    if values.shape[1] > 2:
        share = np.exp(values - values.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        each = [pointwise.auroc(share[:, k], labels == k) for k in np.unique(labels)]
        found["auroc"] = float(np.mean(each))
    keep = (*_MEASURES, "majority")
    return {name: found[name] for name in keep if not np.isnan(found.get(name, np.nan))}


def validation(groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which entries are held out of a fit, bool[N]: whole groups, in expectation a share of them.

    A group falls on the same side in every task.

    Args:
      groups: Number of the group of each entry, int[N], from 0.
      share: In [0, 1). seed: Of the draw.
    """
    groups = np.asarray(groups)
    drawn = np.random.default_rng(seed).random(groups.max(initial=-1) + 1)
    return drawn[groups] < share


def _fit(states, names, tasks, labels, mode, seeds, settings, classes, held):
    """(w [T, S, L, D, K], b, what is left of the gradient or None), in one program."""
    outputs = 1 if classes == 2 else classes
    index = probes.padded([task.train for task in tasks], 0)
    labels = probes.padded(labels, -1)
    settings = jnp.asarray(settings, jnp.float32)
    if mode == "paper":
        # By name: a task's probes do not depend on what else is fitted beside them.
        numbers = [[zlib.crc32(f"{name} {s}".encode()) for s in range(seeds)] for name in names]
        keys = jax.vmap(jax.vmap(jax.random.key))(np.asarray(numbers, np.uint32))
        probe, _ = probes.fit_paper(states, index, labels, keys, settings, outputs=outputs)
        return np.asarray(probe.w), np.asarray(probe.b), None
    part = np.zeros((len(tasks), seeds, index.shape[1]), bool)
    for t, some in enumerate(held):
        part[t, :, : some.shape[1]] = ~some
    probe, left = probes.fit_strong(states, index, labels, part, settings, outputs=outputs)
    return np.asarray(probe.w), np.asarray(probe.b), np.asarray(left)


def _logits(states, w, b):
    """[S, L, n, K] of the probes [S, L, D, K] of a task."""
    return np.matmul(states, w) + b[:, :, None, :]


def _log_loss(values, labels):
    values = probes.two_logits(values).astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    norm = top[..., 0] + np.log(np.exp(values - top).sum(axis=-1))
    return (norm - values[..., np.arange(len(labels)), labels]).mean(axis=-1)


def _run(states, names, tasks, labels, mode, seeds, settings, classes, held):
    """For each task (logits of the chosen setting [S, n, K], accuracy of each setting, chosen)."""
    w, b, left = _fit(states, names, tasks, labels, mode, seeds, settings, classes, held)
    found = []
    for t, task in enumerate(tasks):
        values = _logits(states[task.test], w[t], b[t])
        chosen = np.zeros(seeds, int)
        if mode == "strong":
            fitted = _logits(states[task.train], w[t], b[t])
            for s, out in enumerate(held[t]):
                chosen[s] = _log_loss(fitted[s][:, out], labels[t][out]).argmin()
        right = probes.two_logits(values).argmax(axis=-1) == task.test_labels
        found.append((values[np.arange(seeds), chosen], right.mean(axis=(0, 2)), chosen))
    return found, left


def probe(
    states: np.ndarray,
    tasks: Mapping[str, Task],
    *,
    classes: int,
    mode: str = "strong",
    seeds: int = 5,
    lrs: Sequence[float] = probes.LRS,
    l2: Sequence[float] = probes.L2,
    held_out: float = 0.2,
) -> dict:
    """Fits linear probes to all tasks, and to two controls, and measures them on the test entries.

    "paper": `probes.fit_paper`; the first of `lrs` is what is reported. "strong":
    `probes.fit_strong` on the training prompts but a part, drawn anew for each seed, that chooses
    l2 by its log loss. Controls: "shuffled" has the training labels in another order, "random" has
    noise with the mean and spread of the states. Both stay near the majority class.

    Args:
      states: float32[M, D], from `make_extract`.
      tasks: By name. classes: Of every task.
      mode: "paper" or "strong". seeds: Fits of each probe. lrs, l2: Settings of the two modes.
      held_out: Share of the training prompts that choose l2.

    Returns:
      Means over tasks under bare names, and for each task a dict: "accuracy" {value, low, high}
      (mean over seeds; 95 %, test prompts resampled), "majority", "above_majority" {difference,
      low, high}, "balanced_accuracy", "macro_f1", "auroc", "seed_sd" of accuracy, "by_setting"
      {setting: accuracy}, the measures of both controls, and how many entries there are. In
      "strong" also "converged", the share of the probes that have.

    Raises:
      ValueError: for an unknown mode, or a task without two classes to learn.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; received {mode!r}")
    names, each = list(tasks), list(tasks.values())
    settings = tuple(lrs if mode == "paper" else l2)
    labels = [np.asarray(task.train_labels) for task in each]
    held = [
        np.stack([validation(task.train_groups, held_out, seed) for seed in range(seeds)])
        for task in each
    ]
    for name, some, out in zip(names, labels, held):
        parts = [some] if mode == "paper" else [some[p] for o in out for p in (o, ~o)]
        if len(np.unique(some)) < 2 or not all(map(len, parts)):
            raise ValueError(
                f"{name}: a probe needs training answers of two classes, on both sides of the "
                f"validation split; received {len(some)} of {len(np.unique(some))}"
            )
    rng = np.random.default_rng(0)
    states = np.asarray(states, np.float32)
    if mode == "strong":
        # Standardised again for each task; a large mean common to all would only cost digits.
        states = states - states[np.concatenate([task.train for task in each])].mean(axis=0)
    noise = rng.standard_normal(states.shape, np.float32) * states.std(axis=0) + states.mean(axis=0)
    rest = (mode, seeds, settings, classes, held)
    real, left = _run(states, names, each, labels, *rest)
    shuffled, _ = _run(states, names, each, [rng.permutation(y) for y in labels], *rest)
    random, _ = _run(noise, names, each, labels, *rest)

    out: dict = {}
    for t, (name, task) in enumerate(zip(names, each)):
        values, by_setting, chosen = real[t]
        right = (probes.two_logits(values).argmax(axis=-1) == task.test_labels).astype(float)
        most = np.bincount(task.test_labels).argmax()
        sure = (task.test_labels == most).astype(float)
        resampled = {"groups": task.test_groups, "samples": 2000}
        found = {
            **_mean_measures(values, task.test_labels),
            "accuracy": best_of_n.interval(right.mean(axis=0), **resampled),
            "above_majority": best_of_n.paired(right.mean(axis=0), sure, **resampled),
            "seed_sd": float(right.mean(axis=1).std()),
            "by_setting": {f"{s:g}": float(x) for s, x in zip(settings, by_setting)},
            "train": float(len(task.train)),
            "test": float(len(task.test)),
        }
        if mode == "strong":
            found["l2"] = float(np.median(np.asarray(settings)[chosen]))
        for control, run in zip(CONTROLS, (shuffled, random)):
            found[control] = _mean_measures(run[t][0], task.test_labels)
        out[name] = found
    value = lambda x: x["value"] if isinstance(x, dict) else x
    over = lambda pick: float(np.mean([value(pick(task)) for task in out.values()]))
    shared = [m for m in (*_MEASURES, "majority") if all(m in task for task in out.values())]
    means = {m: over(lambda task, m=m: task[m]) for m in shared}
    means |= {
        f"{c}_{m}": over(lambda task, c=c, m=m: task[c][m])
        for c in CONTROLS
        for m in ("accuracy", "balanced_accuracy")
    }
    if left is not None:
        means["converged"] = float((left <= probes.TOLERANCE).mean())
    return {**means, **out}


def _mean_measures(values, labels):
    """Means over seeds of the measures of logits [S, n, K]."""
    each = [measures(one, labels) for one in values]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def pearson(
    x: Sequence[float], y: Sequence[float], *, samples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """{"value", "low", "high"}: correlation over models, with a 95 % bootstrap interval.

    Such as probe accuracy and the quality of policies trained with the models. Resamples in which
    one side does not vary are left out.

    Args:
      x, y: One number a model. samples, seed: Of the resampling.

    Raises:
      ValueError: if there are fewer than 3 models, or one side does not vary.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) != len(y) or len(x) < 3 or not np.ptp(x) > 0 or not np.ptp(y) > 0:
        raise ValueError(
            "a correlation needs two lists of one length, of at least 3 numbers that differ; "
            f"received {x.tolist()} and {y.tolist()}"
        )
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(x), size=(samples, len(x)))
    drawn = drawn[(np.ptp(x[drawn], axis=1) > 0) & (np.ptp(y[drawn], axis=1) > 0)]
    values = [np.corrcoef(x[i], y[i])[0, 1] for i in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.corrcoef(x, y)[0, 1]), "low": float(low), "high": float(high)}
