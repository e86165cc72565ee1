"""Measures of single answers, against values worked out by hand."""

import numpy as np
import pytest

from jaxreward.data.tokenize import Tree
from jaxreward.evals import pointwise

NAN = float("nan")


def tree(targets, weight=None):
    count = len(targets)
    return Tree(
        id="t",
        prompt=np.zeros(1, np.int32),
        answers=[np.zeros(1, np.int32)] * count,
        loss=[np.ones(1, bool)] * count,
        targets=[np.asarray(t, np.float32) for t in targets],
        answer_weight=[1.0] * count if weight is None else weight,
    )


def test_scores():
    """Catches unknown scores that count, and weights left out of the error."""
    trees = [tree([[1.0, 5.0], [2.0, NAN]], [1.0, 3.0]), tree([[4.0, 1.0]])]
    outputs = [np.array([[1.0, 4.0], [3.0, 9.0]]), np.array([[5.0, 2.0]])]
    got = dict(pointwise.scores(lambda _: outputs, trees, outputs=("help", "verb")))
    assert got["mse/help"] == pytest.approx((0 + 3 * 1 + 1) / 5)
    assert got["mse/verb"] == pytest.approx((1 + 1) / 2)
    assert got["mse"] == pytest.approx((0.8 + 1.0) / 2)
    assert got["spearman/help"] == pytest.approx(1.0)
    assert got["pearson/help"] == pytest.approx(np.corrcoef([1, 3, 5], [1, 2, 4])[0, 1])
    assert got["answers"] == 3 and "auroc/help" not in got


def test_labels_of_a_scalar_head_have_an_auroc():
    """Catches a verifier that is judged by its error alone."""
    trees = [tree([[1.0], [0.0], [1.0], [0.0]])]
    got = dict(pointwise.scores(lambda _: [np.array([[2.0], [1.0], [0.5], [0.0]])], trees))
    assert got["auroc"] == got["auroc/0"] == pytest.approx(0.75)


def test_classes():
    """Catches recall taken for precision, absent classes in the mean, and unweighted counts."""
    logits = np.log(
        np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05]])
    )
    trees = [tree([[0], [1], [1]]), tree([[0]], [2.0])]
    got = dict(
        pointwise.classes(lambda _: [logits[:3], logits[3:]], trees, outputs=("x", "y", "z"))
    )
    # truth x y y x(2), said x y x x(2)
    assert got["accuracy"] == pytest.approx(4 / 5) and got["majority"] == pytest.approx(3 / 5)
    assert got["recall/x"] == 1 and got["recall/y"] == 0.5 and "recall/z" not in got
    assert got["balanced_accuracy"] == 0.75
    assert got["macro_f1"] == pytest.approx((2 * 3 / (3 + 4) + 2 * 1 / (2 + 1)) / 2)
    nll = -(np.log(0.5) + np.log(0.7) + np.log(0.3) + 2 * np.log(0.9)) / 5
    assert got["log_loss"] == pytest.approx(nll)
    assert "auroc" not in got and got["answers"] == 4


def test_auroc():
    """Catches ties that count as wins, and a side that is empty."""
    assert pointwise.auroc([3, 2, 2, 1], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert np.isnan(pointwise.auroc([1.0, 2.0], [True, True]))
    two = dict(
        pointwise.classes(lambda _: [np.array([[0.0, 1.0], [0.0, 2.0]])], [tree([[1], [0]])])
    )
    assert two["auroc"] == 0.0


def test_weightless_answers_do_not_count_and_names_are_checked():
    """Catches answers of weight 0 in the measures, and names of another head."""
    trees = [tree([[1.0], [9.0]], [1.0, 0.0])]
    predict = lambda _: [np.array([[1.0], [0.0]])]
    assert dict(pointwise.scores(predict, trees)) == {"mse/0": 0.0, "mse": 0.0, "answers": 1.0}
    with pytest.raises(ValueError, match=r"2 outputs are named \(a, b\), and the head has 1"):
        dict(pointwise.scores(predict, trees, outputs=("a", "b")))
