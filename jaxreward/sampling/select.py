"""Choosing among sampled answers: the best of n, the majority, the one to learn from.

Host side, on small NumPy arrays. An answer is a class 0..C-1; -1 stands for one that could not be
read, which never wins.
"""

import numpy as np
from jaxtyping import Bool, Float, Int


def best_of_n(
    scores: Float[np.ndarray, "P n"], valid: Bool[np.ndarray, "P n"] | None = None
) -> Int[np.ndarray, " P"]:
    """The answer with the highest score, of each of P prompts.

    Args:
      scores: Of n answers a prompt.
      valid: False where an answer cannot be chosen; None allows all.

    Returns:
      Indices into n; -1 where none is valid. Of equal scores the first answer wins.

    Raises:
      ValueError: for a NaN among the valid scores, which has no order.
    """
    valid = np.ones(scores.shape, bool) if valid is None else valid
    if np.isnan(scores[valid]).any():
        raise ValueError("a score is NaN; score every answer, or mark it as not valid")
    masked = np.where(valid, scores, -np.inf)
    # Not argmax of `masked` alone: a valid answer may itself have the score -inf.
    best = np.argmax(valid & (masked == masked.max(axis=1, keepdims=True)), axis=1)
    return np.where(valid.any(axis=1), best, -1)


def majority_vote(
    answers: Int[np.ndarray, " n"], *, classes: int, on_tie: str = "first"
) -> tuple[int, float]:
    """The most frequent answer.

        margin = (votes of the first - votes of the second) / votes of all

    Args:
      answers: Classes in the order in which they were sampled; -1 does not vote.
      classes: C.
      on_tie: "first" lets the answer that was sampled first win, "none" nobody.

    Returns:
      (class or -1 if nobody won, margin in [0, 1]; 0 at a tie and without votes).

    Raises:
      ValueError: for an answer outside of -1..C-1 or another `on_tie`.

    References:
      Voting of MSRL (arXiv:2603.25108), 16 samples there. What it does at a tie is not known.
    """
    if on_tie not in ("first", "none"):
        raise ValueError(f'on_tie must be "first" or "none"; received {on_tie!r}')
    if answers.size and not -1 <= answers.min() <= answers.max() < classes:
        raise ValueError(
            f"answers must be -1..{classes - 1}; received {answers.min()}..{answers.max()}"
        )
    votes = np.bincount(answers[answers >= 0], minlength=classes)
    if not votes.sum():
        return -1, 0.0
    second, first = np.sort(np.append(votes, 0))[-2:]
    margin = float(first - second) / float(votes.sum())
    if margin == 0.0 and on_tie == "none":
        return -1, 0.0
    return next(int(a) for a in answers if a >= 0 and votes[a] == first), margin


def select_cmkd(
    answers: Int[np.ndarray, " n"],
    well_formed: Bool[np.ndarray, " n"],
    confidence: Float[np.ndarray, " n"],
    *,
    classes: int = 2,
    gold: int | None = None,
    tie_break: Float[np.ndarray, " n"] | None = None,
) -> tuple[int, int]:
    """The sampled answer that a student learns from, in cross-modal knowledge distillation.

    Answers that are wrong are left out, then those that do not keep the form; of the rest the most
    confident is taken. Without a gold label, the majority of the readable answers is right.

    Args:
      answers: Classes, -1 for one that could not be read.
      well_formed: Whether each keeps its form.
      confidence: Of each in its answer, for example the probability of the answer's token.
      classes: C.
      gold: The right class, or None for the majority.
      tie_break: Decides between equal confidences, larger first; then the earlier sample does.

    Returns:
      (index of the answer, the class taken for right). The index is -1 if no answer is left; both
      are -1 if the vote is tied or empty.

    Raises:
      ValueError: for a gold label or answer that is no class, or a NaN among the confidences.

    References:
      MSRL (arXiv:2603.25108), CMKD: the order of the filters is that of the overview figure, the
      vote that of readers' notes. The number of samples and the formula of the confidence are not
      public; no code for this step was released.
    """
    if gold is not None and not 0 <= gold < classes:
        raise ValueError(f"gold must be 0..{classes - 1} or None; received {gold}")
    voted, _ = majority_vote(answers, classes=classes, on_tie="none")
    label = voted if gold is None else gold
    left = np.flatnonzero((answers == label) & (answers >= 0) & well_formed)
    if not left.size:
        return -1, label
    second = np.zeros(len(answers)) if tie_break is None else tie_break
    if np.isnan(confidence[left]).any() or np.isnan(second[left]).any():
        raise ValueError("a confidence or tie_break is NaN; give one for every well-formed answer")
    return int(max(left, key=lambda i: (confidence[i], second[i], -i))), label
