"""Does a model order a fixed set of answers as a preference source does, and by as much?

Alignment as re-ranking, after HEAL (arXiv:2508.19922): each instruction has n hypotheses, the model
gives each a score s from its log-probability, a proxy gives each a score r, and the two are
compared. Nothing is sampled and nothing judged.

The abstract of the paper names two measures, ranking accuracy and preference strength correlation;
it was all that we could read. Every formula here is therefore ours or a textbook's.

Arrays are [I, n]: instructions, hypotheses. What `valid` rules out is never looked at. A function
that measures each instruction returns (values float64[I], has bool[I]); where `has` is False the
measure is not defined there and the value is 0, never NaN. Means are over instructions, not pairs:
a large set counts as one.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxreward.evals import pairwise

KINDS = ("sum", "mean", "implicit", "implicit_mean")
HOW = ("per_prompt", "fisher", "pooled", "differences")
_SURE = 1 - 1e-7  # Fisher's transform of a correlation of 1 is infinite


def scores(
    lp: np.ndarray,
    lp_ref: np.ndarray | None,
    length: np.ndarray,
    kind: str,
    beta: float = 0.1,
) -> np.ndarray:
    """The model's score of every hypothesis, float64[I, n].

    .. math:: \\ell, \\quad \\ell / |y|, \\quad \\beta (\\ell - \\ell_{ref}), \\quad
              \\beta (\\ell - \\ell_{ref}) / |y|

    for the kinds "sum", "mean", "implicit" (the reward that DPO trains) and "implicit_mean".

    Args:
      lp: Log-probability of each hypothesis, summed over its tokens, [I, n].
      lp_ref: The same under the model that training began from; only for the implicit kinds.
      length: Tokens of each, [I, n]; where it is 0 a mean is 0.
      kind: One of `KINDS`. beta: Of the implicit kinds.

    Raises:
      ValueError: for another kind, or an implicit one without a reference.

    References: which of the four the paper uses is not known to us; report them side by side.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of score {kind!r}; use one of {', '.join(KINDS)}")
    s = np.asarray(lp, np.float64)
    if kind.startswith("implicit"):
        if lp_ref is None:
            raise ValueError(
                f"kind {kind!r} compares with the model that training began from; give a "
                "reference, or use the kinds sum and mean"
            )
        s = beta * (s - np.asarray(lp_ref, np.float64))
    if kind.endswith("mean"):
        length = np.asarray(length, np.float64)
        s = np.where(length > 0, s / np.where(length > 0, length, 1), 0.0)
    return s


# Agreement, instruction by instruction


def ranking_accuracy(
    s: np.ndarray, r: np.ndarray, valid: np.ndarray, *, delta: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the pairs of an instruction that s orders as r does; a tie of s counts one half.

    .. math:: \\frac{\\sum_{i<j, |r_i - r_j| > \\delta} 1[(s_i - s_j)(r_i - r_j) > 0]
              + \\frac12 1[s_i = s_j]}{\\#\\{i<j, |r_i - r_j| > \\delta\\}}

    Without ties and with delta 0 it is (tau + 1) / 2, of Kendall's tau. Chance is one half.

    Args:
      s, r, valid: As the top of this file says. delta: Pairs that r holds this close are left out.

    Returns:
      (values, has): has is False where no pair is left.

    References: ours, for the measure that the abstract names; ties and delta are our choice.
    """
    s, r, valid = _checked(s, r, valid)
    right, counted = _outcomes(s, r, valid, delta)
    return _mean(right, counted)


def kendall_tau_b(s: np.ndarray, r: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's tau-b: concordant less discordant pairs, corrected for the ties of both.

    .. math:: \\frac{P - Q}{\\sqrt{(N - N_s)(N - N_r)}}

    with N pairs, of which N_s are tied in s and N_r in r. Not defined where all are tied in one.
    """
    s, r, valid = _checked(s, r, valid)
    a, b = (np.sign(_gaps(x)) * _upper(valid) for x in (s, r))
    norm = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    return _ratio((a * b).sum((1, 2)), norm)


def pearson(s: np.ndarray, r: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's correlation of s and r; not defined where one of them does not vary."""
    s, r, valid = _checked(s, r, valid)
    a, b = _centred(s, valid), _centred(r, valid)
    return _ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def spearman(s: np.ndarray, r: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's correlation of the ranks; ties share the mean of theirs."""
    s, r, valid = _checked(s, r, valid)
    return pearson(ranks(s, valid), ranks(r, valid), valid)


def partial_correlation(
    s: np.ndarray, r: np.ndarray, z: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of s and r given z: of what a line in z leaves of either.

    .. math:: \\frac{\\rho_{sr} - \\rho_{sz}\\rho_{rz}}
              {\\sqrt{(1 - \\rho_{sz}^2)(1 - \\rho_{rz}^2)}}

    With the length as z it says what agreement is left once length is accounted for. Not defined
    where z determines one of the two, as it always does with two hypotheses.

    Args:
      s, r, valid: As the top of this file says. z: What is held fixed, [I, n].
    """
    s, r, valid = _checked(s, r, valid)
    _, z, _ = _checked(s, z, valid)
    a, b, c = (_centred(x, valid) for x in (s, r, z))
    left = []
    for x in (a, b):
        slope, _ = _ratio((x * c).sum(1), (c * c).sum(1))
        rest = x - slope[:, None] * c
        # What rounding leaves of a score that z determines is no score.
        kept = (rest * rest).sum(1) > 1e-12 * (x * x).sum(1)
        left.append(np.where(kept[:, None], rest, 0.0))
    a, b = left
    return _ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def top1(s: np.ndarray, r: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the highest s is the highest r. Ties share: the chance that one drawn from the
    highest of s is among the highest of r. Not defined where r does not vary."""
    s, r, valid = _checked(s, r, valid)
    best = [(x == _top(x, valid)[:, None]) & valid for x in (s, r)]
    hit = (best[0] & best[1]).sum(1) / np.maximum(best[0].sum(1), 1)
    has = _varies(r, valid)
    return np.where(has, hit, 0.0), has


def ndcg(s: np.ndarray, r: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised discounted cumulative gain of all n hypotheses in the order of s.

    .. math:: \\frac{\\sum_i g_i d(\\text{place of } i \\text{ by } s)}
              {\\sum_i g_i d(\\text{place of } i \\text{ by } r)}, \\quad
              g_i = \\text{rank of } r_i - 1, \\quad d(p) = 1 / \\log_2(1 + p)

    The gain is the rank, from 0 for the worst, and not r itself, whose scale is the proxy's own.
    Ties of s share the discounts of their places. Not defined where r does not vary.
    """
    s, r, valid = _checked(s, r, valid)
    gain = np.where(valid, ranks(r, valid) - 1, 0.0)
    below = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(valid.shape[1]) + 2))])

    def gained(x):
        more = _count(_gaps(x) < 0, valid)
        ties = np.maximum(_count(_gaps(x) == 0, valid), 1)
        return (gain * (below[more + ties] - below[more]) / ties * valid).sum(1)

    value, has = _ratio(gained(s), gained(r))
    has &= _varies(r, valid)
    return np.where(has, value, 0.0), has


def space_mass(
    s: np.ndarray, r: np.ndarray, valid: np.ndarray, *, top: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the softmax of s over the hypotheses puts its mass.

    Args:
      s, r, valid: As the top of this file says; with the kind "sum", the softmax is what the model
        would draw if these were all the answers there are.
      top: How many of the best by r; ties at the border share.

    Returns:
      (entropy in nats float64[I], mass on the best `top` by r float64[I], has bool[I]).
    """
    s, r, valid = _checked(s, r, valid)
    p = np.exp(np.where(valid, s - _top(s, valid)[:, None], -np.inf))
    has = valid.any(1)
    p = p / np.where(has, p.sum(1), 1.0)[:, None]
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    more, ties = _count(_gaps(r) < 0, valid), np.maximum(_count(_gaps(r) == 0, valid), 1)
    share = np.clip((top - more) / ties, 0.0, 1.0)
    return entropy, (p * share).sum(1), has


# Strength over all instructions


def strength_correlation(
    s: np.ndarray, r: np.ndarray, valid: np.ndarray, *, how: str = "per_prompt"
) -> float:
    """Preference strength correlation: do s and r differ by as much?

    per_prompt   mean over instructions of Pearson's correlation
    fisher       the same, of arctanh, taken back by tanh: strong agreement counts for more
    pooled       one correlation over all, each instruction standardised first; this is the mean of
                 `per_prompt` weighted by the number of hypotheses
    differences  one correlation, through the origin, of all (s_i - s_j) with all (r_i - r_j) of one
                 instruction; for one instruction it is Pearson's. Instructions on which the scores
                 spread more count for more

    None compares raw scores of different instructions: those say mostly which prompts are hard.
    Instructions where s or r does not vary are left out.

    Returns:
      The correlation; 0 if no instruction is left.

    Raises:
      ValueError: for another `how`.

    References: ours, for the measure that the abstract names. Whether the paper's is Pearson's,
    and by prompt or pooled, is not known to us.
    """
    if how not in HOW:
        raise ValueError(f"unknown how={how!r}; use one of {', '.join(HOW)}")
    rho, has = pearson(s, r, valid)
    if not has.any():
        return 0.0
    if how == "per_prompt":
        return float(rho[has].mean())
    if how == "fisher":
        return float(np.tanh(np.arctanh(np.clip(rho[has], -_SURE, _SURE)).mean()))
    if how == "pooled":
        return float(np.average(rho[has], weights=np.asarray(valid)[has].sum(1)))
    s, r, valid = (x[has] for x in _checked(s, r, valid))
    a, b = (_gaps(x) * _upper(valid) for x in (s, r))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


# What training changed


def rank_bin_delta(
    lp: np.ndarray,
    lp_ref: np.ndarray,
    length: np.ndarray,
    r: np.ndarray,
    valid: np.ndarray,
    *,
    bins: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean change of log-probability a token, by rank of the proxy.

    .. math:: \\Delta_i = (\\ell(y_i) - \\ell_{ref}(y_i)) / |y_i|

    averaged over the hypotheses of each of `bins` equal parts of the ranks, from the worst (0) to
    the best. A profile that goes up and begins below 0 is what "captures the preferences and
    suppresses the negatives" would look like.

    Args:
      lp, lp_ref, length: As in `scores`. r, valid: As the top of this file says.
      bins: How many parts.

    Returns:
      (values float64[I, bins], has bool[I, bins]). Tied hypotheses share a bin. An instruction
      where r does not vary has none, nor has a hypothesis without tokens.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, the worst and the best; received {bins}")
    delta = scores(lp, lp_ref, length, "implicit_mean", 1.0)
    valid = np.asarray(valid) & (np.asarray(length) > 0)
    delta, r, valid = _checked(delta, r, valid)
    twice = np.rint(2 * ranks(r, valid)).astype(int)  # ranks in halves: the borders are exact
    n = np.maximum(valid.sum(1, keepdims=True), 1)
    part = np.clip((twice - 1) * bins // (2 * n), 0, bins - 1)
    live = valid & _varies(r, valid)[:, None]
    member = live[:, None] & (part[:, None] == np.arange(bins)[:, None])
    return _mean(delta[:, None], member, axis=2)


def displacement(delta: np.ndarray, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood displacement: 1 where even the best bin lost likelihood, with the worst.

    Args:
      delta, has: From `rank_bin_delta`.

    Returns:
      (values float64[I], has bool[I]): has needs both the best and the worst bin.
    """
    both = has[:, 0] & has[:, -1]
    return (both & (delta[:, 0] < 0) & (delta[:, -1] < 0)).astype(np.float64), both


def flip_matrix(
    before: np.ndarray,
    after: np.ndarray,
    r: np.ndarray,
    valid: np.ndarray,
    *,
    delta: float = 0.0,
) -> np.ndarray:
    """Pairs by whether they are ordered as r orders them, before and after training.

    Args:
      before, after: Scores of one kind by the two models, [I, n].
      r, valid, delta: As in `ranking_accuracy`.

    Returns:
      float64[I, 2, 2]: rows are wrong and right before, columns wrong and right after. A tie is
      half of each. A row's sum is the number of pairs that were wrong, or right, before.
    """
    before, r, valid = _checked(before, r, valid)
    after, _, _ = _checked(after, r, valid)
    first, counted = _outcomes(before, r, valid, delta)
    second, _ = _outcomes(after, r, valid, delta)
    sides = lambda x: np.stack([1 - x, x]) * counted
    return np.einsum("axij,bxij->xab", sides(first), sides(second))


# Intervals and metrics


def bootstrap(
    values: np.ndarray, has: np.ndarray, *, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) over the instructions that have a value: 95 %, instructions resampled.

    Args:
      values, has: [I] both, as the functions above return them. samples, seed: Of the resampling.
    """
    at = np.flatnonzero(has)
    return pairwise.bootstrap(np.asarray(values)[at], at, samples=samples, seed=seed)


def paired_bootstrap(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], **kw: int
) -> tuple[float, float, float]:
    """(difference, low, high) of two measures over the instructions that have both.

    Narrower than what two intervals suggest: what makes an instruction hard for both cancels.

    Args:
      a, b: (values, has) of the same instructions, such as of two models. **kw: As `bootstrap`.
    """
    return bootstrap(a[0] - b[0], a[1] & b[1], **kw)


def per_instruction(
    s: np.ndarray,
    r: np.ndarray,
    valid: np.ndarray,
    *,
    length: np.ndarray | None = None,
    delta: float = 0.0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (values, has)} of all measures of one score against one proxy; see `measures`."""
    found = {
        "ranking_accuracy": ranking_accuracy(s, r, valid, delta=delta),
        "strength": pearson(s, r, valid),
        "tau_b": kendall_tau_b(s, r, valid),
        "spearman": spearman(s, r, valid),
        "top1": top1(s, r, valid),
        "ndcg": ndcg(s, r, valid),
    }
    if length is not None:
        found["strength_given_length"] = partial_correlation(s, r, length, valid)
    entropy, mass, has = space_mass(s, r, valid)
    return found | {"entropy": (entropy, has), "top_mass": (mass, has)}


def measures(
    s: np.ndarray,
    r: np.ndarray,
    valid: np.ndarray,
    *,
    length: np.ndarray | None = None,
    domains: Sequence[str] | None = None,
    delta: float = 0.0,
    samples: int = 1000,
    seed: int = 0,
) -> Iterator[tuple[str, float | tuple[float, float, float]]]:
    """Metrics of one score against one proxy: (name, value), or (name, (value, low, high)).

    Yields means over instructions of "ranking_accuracy", "strength" (Pearson), "tau_b", "spearman",
    "top1", "ndcg", "strength_given_length", "entropy" and "top_mass"; then the other forms of
    strength, "strength_fisher", "strength_pooled" and "strength_differences" (never with an
    interval); "ranking_accuracy/<domain>"; and "instructions", those with a pair to order. What is
    defined on no instruction is left out.

    Args:
      s, r, valid: As the top of this file says. length: Tokens, for "strength_given_length".
      domains: Of each instruction; "" belongs to none. delta: As in `ranking_accuracy`.
      samples: Resamples; 0 gives no intervals. seed: Of the resampling.
    """
    found = per_instruction(s, r, valid, length=length, delta=delta)
    mean = lambda values, has: _summary(values, has, samples, seed)
    for name, (values, has) in found.items():
        if has.any():
            yield name, mean(values, has)
    rho, has = found["strength"]
    if has.any():
        z = mean(np.arctanh(np.clip(rho, -_SURE, _SURE)), has)
        yield "strength_fisher", tuple(map(float, np.tanh(z))) if samples else float(np.tanh(z))
        for how in ("pooled", "differences"):
            yield f"strength_{how}", strength_correlation(s, r, valid, how=how)
    accuracy, has = found["ranking_accuracy"]
    for domain in sorted(set(domains or ()) - {""}):
        inside = has & (np.asarray(domains) == domain)
        if inside.any():
            yield f"ranking_accuracy/{domain}", mean(accuracy, inside)
    yield "instructions", float(has.sum())


def changes(
    lp: np.ndarray,
    lp_ref: np.ndarray,
    length: np.ndarray,
    r: np.ndarray,
    valid: np.ndarray,
    *,
    bins: int = 3,
    delta: float = 0.0,
    samples: int = 1000,
    seed: int = 0,
) -> Iterator[tuple[str, float | tuple[float, float, float]]]:
    """What training changed, by a proxy's ranks; values as in `measures`.

    Yields "promotion" and "suppression" (mean change a token of the best and of the worst bin),
    "bin/<k>" of all, from 1 for the worst; "displacement" (share of instructions where both fell);
    the flags "captures" (1 where the mean profile goes up and begins below 0) and "displaced" (1
    where promotion and suppression are below 0); and of the pairs, ordered by log-probability a
    token, the shares that were "repaired" (wrong, then right), "broken", "kept_right" and
    "kept_wrong".

    Args:
      lp, lp_ref, length, bins: As in `rank_bin_delta`. r, valid: As the top of this file says.
      delta: As in `ranking_accuracy`. samples, seed: As in `measures`.
    """
    mean = lambda values, has: _summary(values, has, samples, seed)
    change, has = rank_bin_delta(lp, lp_ref, length, r, valid, bins=bins)
    for name, k in (("promotion", -1), ("suppression", 0)):
        if has[:, k].any():
            yield name, mean(change[:, k], has[:, k])
    for k in range(bins):
        if has[:, k].any():
            yield f"bin/{k + 1}", mean(change[:, k], has[:, k])
    values, both = displacement(change, has)
    if both.any():
        profile = np.array([x[h].mean() for x, h in zip(change.T, has.T) if h.any()])
        yield "displacement", mean(values, both)
        yield "captures", float((np.diff(profile) > 0).all() and profile[0] < 0)
        yield "displaced", float(profile[0] < 0 and profile[-1] < 0)
    pairs = flip_matrix(
        scores(lp_ref, None, length, "mean"),
        scores(lp, None, length, "mean"),
        r,
        valid,
        delta=delta,
    )
    total = pairs.sum((1, 2))
    if total.any():
        for name, (a, b) in {
            "repaired": (0, 1),
            "broken": (1, 0),
            "kept_right": (1, 1),
            "kept_wrong": (0, 0),
        }.items():
            yield name, mean(*_ratio(pairs[:, a, b], total))


def ranks(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rank of each valid entry among those of its row, from 1; ties share the mean of theirs.

    .. math:: 1 + \\#\\{j: x_j < x_i\\} + \\tfrac12 (\\#\\{j: x_j = x_i\\} - 1)
    """
    x, _, valid = _checked(x, x, valid)
    gaps = _gaps(x)
    found = 0.5 + _count(gaps > 0, valid) + 0.5 * _count(gaps == 0, valid)
    return np.where(valid, found, 0.0)


# Masked arrays


def _checked(s, r, valid):
    """float64 with 0 under the mask, and bool."""
    valid = np.asarray(valid, bool)
    out = []
    for name, x in (("s", s), ("r", r)):
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape != valid.shape:
            raise ValueError(
                f"expected {name} and valid of one shape [instructions, hypotheses]; received "
                f"{list(x.shape)} and {list(valid.shape)}"
            )
        bad = np.argwhere(valid & ~np.isfinite(x))
        if len(bad):
            i, j = bad[0]
            raise ValueError(
                f"{name}[{i}, {j}] is {x[i, j]}; make valid False where a score is missing"
            )
        out.append(np.where(valid, x, 0.0))
    return *out, valid


def _gaps(x):
    """x_i - x_j, [I, n, n]."""
    return x[:, :, None] - x[:, None, :]


def _upper(valid):
    """Pairs i < j of valid entries, [I, n, n]."""
    n = valid.shape[1]
    return valid[:, :, None] & valid[:, None, :] & np.triu(np.ones((n, n), bool), 1)


def _count(where, valid):
    """How many valid j each i has, int[I, n]; of an i that is valid."""
    return np.where(valid, (where & valid[:, None, :]).sum(2), 0)


def _outcomes(s, r, valid, delta):
    """(1, 0 or 0.5 a pair, pairs that count), [I, n, n] both."""
    counted = _upper(valid) & (np.abs(_gaps(r)) > delta)
    return 0.5 * (1 + np.sign(_gaps(s)) * np.sign(_gaps(r))), counted


def _top(x, valid):
    """Highest of each row; 0 where it is empty."""
    return np.where(valid.any(1), np.where(valid, x, -np.inf).max(1, initial=-np.inf), 0.0)


def _varies(x, valid):
    return _top(x, valid) > -_top(-x, valid)


def _centred(x, valid):
    """Deviations from the row's mean, the largest of them 1: squares neither over- nor underflow;
    0 in a row that does not vary."""
    count = np.maximum(valid.sum(1, keepdims=True), 1)
    x = np.where(valid, x - x.sum(1, keepdims=True) / count, 0.0)
    scale = np.abs(x).max(1, initial=0.0, keepdims=True)
    return np.where(_varies(x, valid)[:, None], x / np.where(scale > 0, scale, 1.0), 0.0)


def _ratio(a, b):
    has = b > 0
    return np.where(has, a / np.where(has, b, 1.0), 0.0), has


def _mean(x, where, axis=(1, 2)):
    """(mean of x where True, whether there is any)."""
    return _ratio(np.where(where, x, 0.0).sum(axis), where.sum(axis).astype(np.float64))


def _summary(values, has, samples, seed):
    if samples:
        return bootstrap(values, has, samples=samples, seed=seed)
    return float(values[has].mean())
