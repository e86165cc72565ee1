"""How likely a language model finds the answers of a held-out file."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward.core.types import PairRows
from jaxreward.data.tokenize import Tree
from jaxreward.evals import scorer
from jaxreward.models import trainable
from jaxreward.objectives import supervised
from jaxreward.parallel.rules import Rules

PyTree = Any


def answer_logps(
    plan: trainable.Plan,
    params: PyTree,
    frozen: PyTree,
    rows: PairRows,
    *,
    rules: Rules | None = None,
    size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each answer's supervised tokens, and their number, float32[B, K] both.

    .. math:: \\sum_{t \\in \\text{supervised}} \\log p(y_t \\mid x, y_{<t})

    Both are 0 where there is no answer.

    Args:
      plan, params, frozen, rows, rules: The model and its rows.
      size: Most supervised tokens of a row, which alone meet the head; None takes the row's length.
    """
    at = supervised.scored(
        rows.tokens,
        rows.loss_mask,
        rows.segments,
        rows.trunk,
        size=size,
        predict_offset=plan.cfg.predict_offset,
    )
    nll = supervised.cross_entropy(
        trainable.states(plan, params, frozen, rows, rules=rules),
        trainable.head_matrix(plan, params, frozen, rules=rules),
        at,
        softcap=plan.cfg.logit_softcap,
    )
    return supervised.answer_logps(-nll, at, rows.segments, rows.ends)


def make_predict(
    plan: trainable.Plan, *, rules: Rules | None = None, batch: int = 8
) -> Callable[[PyTree, PyTree, list[Tree]], list[np.ndarray]]:
    """A function (params, frozen, trees) -> one float32[answers, 2] a tree: (log-prob, tokens).

    Rows, batches and compilations as those of `scorer.make_predict`.
    """

    def measure(params, frozen, rows):
        return jnp.stack(answer_logps(plan, params, frozen, rows, rules=rules), axis=-1)

    return scorer.over_trees(measure, 2, rules=rules, batch=batch)


def perplexity(
    predict: Callable[[list[Tree]], list[np.ndarray]], trees: list[Tree]
) -> Iterator[tuple[str, float]]:
    """Yields "loss" (mean nats a supervised token), "perplexity" (its exponential), "answer_logp"
    (mean log-probability of a whole answer) and "tokens" (those counted).
    """
    found = np.concatenate(predict(trees)).astype(np.float64)
    logp, tokens = found.sum(axis=0)
    if tokens == 0:
        yield "tokens", 0.0
        return
    yield "loss", float(-logp / tokens)
    yield "perplexity", math.exp(min(-logp / tokens, 700.0))
    yield "answer_logp", float(logp / len(found))
    yield "tokens", float(tokens)
