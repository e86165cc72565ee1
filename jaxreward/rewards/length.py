"""Rewards that tax the whole length of right answers: baselines for `anchor`.

The first baseline, accuracy alone, needs no function. Arrays are NumPy's or JAX's, one number an
answer; results are float32, of the library of what came in. With the settings that are accepted,
any right answer beats any wrong one, save beyond the target of `truncation`.
"""

import numpy as np


def in_float32(*values):
    """The library that values belong to, and they as its float32 arrays.

    Args:
      *values: NumPy or JAX arrays (tracers too), or numbers.

    Returns:
      (jax.numpy if any is a JAX array, else numpy; list of arrays).
    """
    spaces = [v.__array_namespace__() for v in values if hasattr(v, "__array_namespace__")]
    xp = next((space for space in spaces if space is not np), np)
    return xp, [xp.asarray(v, dtype=xp.float32) for v in values]


def group_max(xp, values, where, group, groups):
    """For each row, the largest value of its group.

    Args:
      xp: numpy or jax.numpy.
      values: Not negative, float32[B].
      where: Which values count, bool[B].
      group: Group of each row, int[B] in 0..groups-1.
      groups: Number of groups, int.

    Returns:
      float32[B]; 0 where nothing of the group counts.

    Raises:
      ValueError: without group or groups.
    """
    if group is None or groups is None:
        raise ValueError("a reward by groups needs group (int[B]) and groups (how many there are)")
    mine = (xp.asarray(group)[None, :] == xp.arange(groups)[:, None]) & where[None, :]
    return xp.max(xp.where(mine, values[None, :], 0.0), axis=1)[xp.asarray(group)]


def truncation(correct, length, *, target):
    """Baseline: right answers count only up to a length, as a hard cut does in DLER.

    Args:
      correct: [B]. length: Tokens of the whole answer, [B]. target: Longest that counts.

    Returns:
      float32[B]: c where length <= target, else 0.
    """
    xp, (correct, length) = in_float32(correct, length)
    return xp.where(length <= target, correct, 0.0)


def cosine(correct, length, *, max_length, short=1.0, long=0.5):
    """Baseline: right answers lose along half a cosine from length 0 to `max_length`.

    .. math:: R = c (r_l + (r_s - r_l) (1 + \\cos(\\pi \\min(L / L_{max}, 1))) / 2)

    Args:
      correct: [B]. length: Tokens of the whole answer, [B]. max_length: L_max.
      short, long: r_s at length 0 and r_l from L_max on; r_s >= r_l > 0.

    Returns:
      float32[B].

    Raises:
      ValueError: unless short >= long > 0.

    References: after the cosine reward of "Demystifying Long Chain-of-Thought Reasoning in LLMs",
    arXiv:2502.03373. Deviations: the end points are ours, wrong answers get 0 at any length, and
    there is no penalty for repetition.
    """
    if not short >= long > 0:
        raise ValueError(f"cosine needs short >= long > 0; received {short} and {long}")
    xp, (correct, length) = in_float32(correct, length)
    share = xp.minimum(length / max_length, 1.0)
    return correct * (long + (short - long) * (1 + xp.cos(np.pi * share)) / 2)


def total_ratio(correct, length, *, max_length, lam=0.5):
    """Baseline: right answers lose in proportion to their whole length.

    .. math:: R = c (1 - \\lambda \\min(L / L_{max}, 1))

    Args:
      correct: [B]. length: Tokens of the whole answer, [B]. max_length: L_max. lam: lambda.

    Returns:
      float32[B].

    Raises:
      ValueError: for lambda outside [0, 1).
    """
    if not 0 <= lam < 1:
        raise ValueError(f"total_ratio needs 0 <= lam < 1; received {lam}")
    xp, (correct, length) = in_float32(correct, length)
    return correct * (1 - lam * xp.minimum(length / max_length, 1.0))


def group_length(correct, length, *, group, groups):
    """Baseline: LC-R1's length term, to be added to the accuracy.

    .. math:: r = 1 - L / \\max_{\\text{right answers of the group}} L

    Args:
      correct: [B]. length: Tokens of the whole answer, [B].
      group: Group of each answer, int[B] in 0..groups-1. groups: Number of groups.

    Returns:
      float32[B], 0 for wrong answers and for the longest right one.

    References: LC-R1, arXiv:2506.14755. Deviation: 0 for wrong answers is ours.
    """
    xp, (correct, length) = in_float32(correct, length)
    longest = group_max(xp, length, correct > 0, group, groups)
    return xp.where(correct > 0, 1 - length / xp.maximum(longest, 1.0), 0.0)
