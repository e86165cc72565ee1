"""Accuracy against length, and what of the length is verification after the answer.

Nothing is sampled here: answers come with their records. What an anchor and a tail are is said in
`rewards.anchor`; the definitions are this project's, after the idea of APR (arXiv:2602.00760).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxreward.rewards import anchor

_OF_ALL = ("accuracy", "length", "no_anchor", "unfinished")
_OF_RIGHT = ("pre_anchor", "tail", "rho")


def outcomes(
    samples: Iterable[tuple[Mapping, str, int | None]],
    *,
    reward: Callable[..., Mapping[str, float]] = anchor.apr,
    **kw: Any,
) -> dict[str, np.ndarray]:
    """One entry a sample, in their order.

    Args:
      samples: (record, answer, tokens). The record has what `reward` needs, `prompt`, and
        optionally `id` (samples of one problem share it) and `subset`. tokens: How many the answer
        took, thinking and end token included; None counts what the reward counts.
      reward: `anchor.apr`, or a text reward with its parts.
      **kw: Keywords of the reward.

    Returns:
      dict of accuracy, length, no_anchor (1 where no anchor was found), unfinished (1 without
      exactly one "</think>"), pre_anchor, tail, rho, wavered (1 where reasoning left the final
      answer after having held it), in_tokens (0 where lengths are in words), all float64; problem
      (an int, the same for one id) and subset (str).
    """
    rows, problems = [], {}
    for i, (record, answer, tokens) in enumerate(samples):
        parts = reward(record.get("prompt", ""), answer, record, **kw)
        problem = problems.setdefault(record.get("id", ("sample", i)), len(problems))
        rows.append(
            {
                "accuracy": parts["accuracy"],
                "length": parts["tokens"] if tokens is None else tokens,
                "no_anchor": 1 - parts["anchor"],
                "unfinished": 1 - parts["format"],
                "pre_anchor": parts["pre"],
                "tail": parts["tail"],
                "rho": parts["rho"],
                "wavered": float(parts["excursions"] > 0),
                "in_tokens": parts["in_tokens"],
                "problem": problem,
                "subset": record.get("subset") or "",
            }
        )
    if not rows:
        return {}
    return {
        name: np.asarray(
            [row[name] for row in rows],
            {"problem": np.int64, "subset": np.str_}.get(name, np.float64),
        )
        for name in rows[0]
    }


def sampled(
    predict: Callable[..., Any],
    prompts: list[Any],
    *,
    reward: str = "apr",
    n: int = 4,
    temperature: float = 1.0,
) -> Iterator[tuple[str, float]]:
    """`measures` of answers that are sampled here, for `config.evals` of online RL.

    Args:
      predict: (prompts, n, temperature) -> `evals.sampled.Answered`.
      prompts: Held out, from `data.prompts.encode`; a record may have a `subset`.
      reward: Which entry of `config.rewards` is `anchor.apr`, whose parts are read.
      n: Answers to each. temperature: Of sampling.

    Raises:
      KeyError: if no reward of that name gives an anchor.
    """
    answered = predict(prompts, n, temperature)
    if f"{reward}/anchor" not in answered.parts:
        raise KeyError(
            f"evals read the parts of rewards.{reward}, which gives no anchor; name the entry that "
            f"is anchor.apr. There are {', '.join(answered.parts)}"
        )
    part = lambda name: answered.parts[f"{reward}/{name}"].ravel().astype(np.float64)
    subsets = [prompt["record"].get("subset") or "" for prompt in prompts]
    yield from measures(
        {
            "accuracy": part("accuracy"),
            "length": answered.length.ravel().astype(np.float64),
            "no_anchor": 1 - part("anchor"),
            "unfinished": 1 - part("format"),
            "pre_anchor": part("pre"),
            "tail": part("tail"),
            "rho": part("rho"),
            "wavered": (part("excursions") > 0).astype(np.float64),
            "in_tokens": part("in_tokens"),
            "problem": np.repeat(np.arange(len(prompts)), n),
            "subset": np.repeat(np.asarray(subsets, np.str_), n),
        }
    )


def measures(found: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """Metrics of `outcomes`.

    Yields "accuracy" (pass@1: the mean over the samples of a problem, then over problems), "length"
    (of all answers), "no_anchor", "unfinished" and "wavered" (shares; the last of finished
    answers), "pre_anchor", "tail" and "rho" (of right answers with an anchor, never of unfinished
    ones), "samples" and "in_tokens". With subsets, "<name>/<subset>" for each, and the plain names
    are unweighted means over the subsets, as is usual for several benchmarks. What has no sample to
    be measured on is left out.

    For an interval, pass a column and `problem` to `pairwise.bootstrap`.
    """
    if not found:
        yield "samples", 0.0
        return
    # Each problem counts once, whether it was answered 16 or 64 times.
    weight = 1.0 / np.bincount(found["problem"])[found["problem"]]
    right = (found["accuracy"] > 0) & (found["no_anchor"] == 0)
    where = {name: np.ones_like(right) for name in _OF_ALL} | dict.fromkeys(_OF_RIGHT, right)
    where["wavered"] = found["unfinished"] == 0
    subsets = sorted(set(found["subset"].tolist()))
    for name, rows in where.items():
        values = {}
        for subset in subsets:
            these = rows & (found["subset"] == subset)
            if these.any():
                values[subset] = float(np.average(found[name][these], weights=weight[these]))
        if values:
            yield name, float(np.mean(list(values.values())))
        yield from ((f"{name}/{subset}", value) for subset, value in values.items() if subset)
    yield "samples", float(len(weight))
    yield "in_tokens", float(found["in_tokens"].mean())


def overthinking(
    samples: Iterable[tuple[Mapping, str, int | None]], **kw: Any
) -> Iterator[tuple[str, float]]:
    """`measures` of the `outcomes` of samples; keywords as there."""
    yield from measures(outcomes(samples, **kw))


def pareto_front(accuracy: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which of M models no other beats.

    A model is beaten if another is at least as accurate and at most as long, and better in one of
    the two. Equal models stand together.

    Args:
      accuracy: float[M]. length: float[M].

    Returns:
      bool[M].

    Raises:
      ValueError: if shapes differ or a number is NaN.
    """
    accuracy, length = np.asarray(accuracy, np.float64), np.asarray(length, np.float64)
    if accuracy.shape != length.shape or accuracy.ndim != 1:
        raise ValueError(
            f"pareto_front needs accuracy[M] and length[M]; received {accuracy.shape} and "
            f"{length.shape}"
        )
    if np.isnan(accuracy).any() or np.isnan(length).any():
        raise ValueError("pareto_front received NaN; leave models without a result out")
    as_good = (accuracy[:, None] >= accuracy) & (length[:, None] <= length)
    better = (accuracy[:, None] > accuracy) | (length[:, None] < length)
    return ~(as_good & better).any(axis=0)


def aes(
    accuracy: float,
    length: float,
    *,
    base_accuracy: float,
    base_length: float,
    alpha: float = 1.0,
    beta: float = 3.0,
    gamma: float = 5.0,
) -> dict[str, float]:
    """Accuracy-efficiency score against a base model, with the coefficients it was computed with.

    .. math:: \\alpha \\Delta_L + \\beta |\\Delta_A| \\text{ if } \\Delta_A \\ge 0, \\text{ else }
              \\alpha \\Delta_L - \\gamma |\\Delta_A|

    with the relative changes Delta_L = (L_0 - L) / L_0 and Delta_A = (A - A_0) / A_0. Scores with
    other coefficients are not comparable; papers use 1/3/5 and 1/5/10 among others.

    Args:
      accuracy, length: A and L of the model.
      base_accuracy, base_length: A_0 and L_0.
      alpha, beta, gamma: The coefficients.

    Returns:
      dict of aes, shorter (Delta_L), gain (Delta_A), alpha, beta, gamma.

    Raises:
      ValueError: unless the base is positive in both.

    References: the score of O1-Pruner and its successors, as they are summarised by others.
    """
    if not (base_accuracy > 0 and base_length > 0):
        raise ValueError(
            f"aes needs a base with positive accuracy and length; received {base_accuracy} and "
            f"{base_length}"
        )
    shorter = (base_length - length) / base_length
    gain = (accuracy - base_accuracy) / base_accuracy
    score = alpha * shorter + (beta if gain >= 0 else -gamma) * abs(gain)
    return {
        "aes": score,
        "shorter": shorter,
        "gain": gain,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
    }
