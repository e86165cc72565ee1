"""How well a head's outputs fit answers with scores or classes of their own.

Means count every answer by its weight; rank statistics count those with weight once.
"""

from collections.abc import Callable, Iterator

import numpy as np

from jaxreward.data.tokenize import Tree

Predict = Callable[[list[Tree]], list[np.ndarray]]


def _gathered(predict, trees, names):
    """(outputs [n, C], targets [n, E], weight [n]) of all answers with weight."""
    outputs = [np.asarray(values, np.float64) for values in predict(trees)]
    width = outputs[0].shape[1] if outputs else 0
    if names and len(names) != width:
        raise ValueError(
            f"evals: {len(names)} outputs are named ({', '.join(names)}), and the head has "
            f"{width}; give the names of models.policy.outputs"
        )
    weight = np.concatenate([np.asarray(tree.answer_weight, np.float64) for tree in trees])
    targets = np.concatenate([np.asarray(tree.targets, np.float64) for tree in trees])
    live = weight > 0
    return np.concatenate(outputs)[live], targets[live], weight[live]


def scores(
    predict: Predict, trees: list[Tree], *, outputs: tuple[str, ...] = ()
) -> Iterator[tuple[str, float]]:
    """Yields, for each output, "mse/<name>", "pearson/<name>" and "spearman/<name>" over the
    answers whose score is known, "auroc/<name>" where all scores are 0 or 1, the means of each
    over the outputs under its bare name, and "answers".

    A correlation needs at least two answers that differ on both sides; else it is left out.

    Args:
      predict: trees -> one float[answers, C] a tree.
      trees: With targets.
      outputs: Names of the C outputs; () numbers them.

    Raises:
      ValueError: if there are not C names.
    """
    from scipy import stats

    values, targets, weight = _gathered(predict, trees, outputs)
    found: dict[str, list[float]] = {}
    for k, name in enumerate(outputs or map(str, range(values.shape[1]))):
        known = ~np.isnan(targets[:, k])
        if not known.any():
            continue
        got, want = values[known, k], targets[known, k]
        measured = {"mse": np.average((got - want) ** 2, weights=weight[known])}
        if np.ptp(got) > 0 and np.ptp(want) > 0:
            measured["pearson"] = stats.pearsonr(got, want).statistic
            measured["spearman"] = stats.spearmanr(got, want).statistic
            if set(want) == {0.0, 1.0}:
                measured["auroc"] = auroc(got, want == 1)
        for metric, value in measured.items():
            found.setdefault(metric, []).append(float(value))
            yield f"{metric}/{name}", float(value)
    for metric, each in found.items():
        yield metric, float(np.mean(each))
    yield "answers", float(len(weight))


def classes(
    predict: Predict, trees: list[Tree], *, outputs: tuple[str, ...] = ()
) -> Iterator[tuple[str, float]]:
    """Yields "accuracy", "majority" (of always saying the most frequent class), "balanced_accuracy"
    (mean recall of the classes that occur), "macro_f1" (over classes that occur or are said),
    "log_loss", "recall/<name>" of each class that occurs, with two classes "auroc", and "answers".

    Args:
      predict: trees -> logits, one float[answers, C] a tree.
      trees: Whose targets are class indices.
      outputs: Names of the C classes; () numbers them.

    Raises:
      ValueError: if there are not C names.
    """
    logits, targets, weight = _gathered(predict, trees, outputs)
    truth, said = targets[:, 0].astype(int), logits.argmax(axis=1)
    count = logits.shape[1]
    share = np.bincount(truth, weight, minlength=count)
    right = said == truth
    hits = np.bincount(truth[right], weight[right], minlength=count)
    calls = np.bincount(said, weight, minlength=count)
    some = share > 0
    recall = hits[some] / share[some]
    top = logits.max(axis=1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    nll = normaliser - logits[np.arange(len(truth)), truth]
    seen = some | (calls > 0)
    yield "accuracy", float(np.average(right, weights=weight))
    yield "majority", float(share.max() / share.sum())
    yield "balanced_accuracy", float(recall.mean())
    yield "macro_f1", float((2 * hits[seen] / (share + calls)[seen]).mean())
    yield "log_loss", float(np.average(nll, weights=weight))
    names = outputs or tuple(map(str, range(count)))
    for k, value in zip(np.flatnonzero(some), recall):
        yield f"recall/{names[k]}", float(value)
    if count == 2 and some.all():
        yield "auroc", auroc(logits[:, 1] - logits[:, 0], truth == 1)
    yield "answers", float(len(weight))


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has the larger value than a negative; ties count one half.

    Args:
      values: [n]. positive: bool[n].

    Returns:
      The area under the ROC curve; NaN unless both kinds are there.
    """
    from scipy import stats

    values, positive = np.asarray(values, np.float64), np.asarray(positive, bool)
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return float("nan")
    ranks = stats.rankdata(values)[positive].sum()
    return float((ranks - p * (p + 1) / 2) / (p * n))
