"""Losses on pairs of answers. Arrays in, one float32 loss a pair out.

All are functions of rewards that somebody else computed. Rewards, margins and scores of one pair
stand in the same place of arrays of one shape: nothing is broadcast, since [B, 1] rewards against
[B] margins would compare every answer with every other and raise no error.

    bradley_terry, log_exp      the likelihood of the preference, with a margin if wanted
    soft_label                  the likelihood of a preference that is not certain
    hinge                       no more force once the gap is large enough
    margin_regression           the gap is a number to be hit, not only to be passed
    absolute_regression         each reward is a number to be hit
    centring                    an auxiliary term: rewards of a pair around 0
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxreward.core.types import Array


def _float32(name: str, **arrays) -> list:
    """The arrays in float32, checked to have one shape; Python numbers stand for every pair."""
    shapes = {k: x.shape for k, x in arrays.items() if not isinstance(x, int | float)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name} needs equal shapes; received {shapes}")
    return [jnp.asarray(x, jnp.float32) for x in arrays.values()]


def bradley_terry(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    margin: Float[Array, "..."] | float | None = None,
) -> Float[Array, "..."]:
    """Negative log-likelihood that `chosen` beats `rejected`, by at least `margin`.

    .. math:: -\\log\\sigma(r_c - r_r - m)

    Computed as softplus(m + r_r - r_c), which neither overflows nor loses digits for large gaps.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.
      margin: Preference strength to demand, same shape, or one number for all pairs; None means 0.
        With the difference of a teacher's scores it is the `margin` baseline of RM-Distiller.

    Returns:
      Loss per pair, float32[...]. Not reduced: the training step divides once, by an exact weight.

    Raises:
      ValueError: if the shapes differ. (Broadcasting [B, 1] scores against [B] margins would
        compare every answer with every other.)

    References: Bradley and Terry, 1952; the margin as in Touvron et al., arXiv:2307.09288, eq. 2.
    TRL's RewardTrainer computes the same, margins included.
    """
    given = {"chosen": chosen, "rejected": rejected}
    if margin is not None:
        given["margin"] = margin
    chosen, rejected, *rest = _float32("bradley_terry", **given)
    gap = chosen - rejected
    for m in rest:
        gap = gap - m
    return jax.nn.softplus(-gap)


def log_exp(chosen: Float[Array, "..."], rejected: Float[Array, "..."]) -> Float[Array, "..."]:
    """`bradley_terry` without a margin, under the name and in the form that OpenRLHF gives it.

    .. math:: \\log(1 + e^{r_r - r_c})

    The two forms are equal: -log sigmoid(x) = log(1 + exp(-x)). It is here so that a config can
    name what its source names.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if the shapes differ.

    References: OpenRLHF, `LogExpLoss`, after arXiv:2204.05862. Deviation: computed without the
    exponential of the gap, which overflows float32 from 89 on.
    """
    chosen, rejected = _float32("log_exp", chosen=chosen, rejected=rejected)
    return jnp.logaddexp(0.0, rejected - chosen)


def soft_label(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    probability: Float[Array, "..."] | float = 1.0,
    smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """Cross-entropy with the probability that `chosen` really is the better one.

    .. math:: -q \\log\\sigma(r_c - r_r) - (1 - q) \\log\\sigma(r_r - r_c), \\quad
              q = (1 - \\epsilon) p + \\epsilon (1 - p)

    Smallest where sigmoid of the gap is q; so unlike `bradley_terry` it never asks for an infinite
    gap, unless q is 1.

    Args:
      chosen: Rewards of the answers named as better, float[...].
      rejected: Rewards of the others, same shape.
      probability: p, same shape or one number, in [0, 1]. Of a teacher's scores it is
        sigmoid(s_c - s_r). Arrays are taken as they are.
      smoothing: epsilon in [0, 0.5], how often labels are flipped.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if the shapes differ, or a number is out of its range.

    References: RM-Distiller, arXiv:2601.14032, baseline `lsam` of its code, which has p =
    sigmoid(s_c - s_r) and epsilon = 0. Smoothing alone (p = 1) is conservative DPO (Mitchell, 2023,
    "A note on DPO with noisy preferences", eq. 3) on rewards. Deviations: RM-Distiller adds 1e-8
    inside the logarithm, which caps the loss at 18; here both sides are log-sigmoids. TRL's
    `robust` is another loss: it subtracts the flipped term.
    """
    if isinstance(probability, int | float) and not 0 <= probability <= 1:
        raise ValueError(f"soft_label needs probability in [0, 1]; received {probability}")
    if not 0 <= smoothing <= 0.5:
        raise ValueError(
            f"soft_label needs smoothing in [0, 0.5]; received {smoothing}. Labels that are wrong "
            "more often than not are to be swapped"
        )
    chosen, rejected, p = _float32(
        "soft_label", chosen=chosen, rejected=rejected, probability=probability
    )
    q = (1 - smoothing) * p + smoothing * (1 - p)
    gap = chosen - rejected
    return q * jax.nn.softplus(-gap) + (1 - q) * jax.nn.softplus(gap)


def hinge(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    margin: Float[Array, "..."] | float = 1.0,
) -> Float[Array, "..."]:
    """How much the gap falls short of the margin.

    .. math:: \\max(0, m - (r_c - r_r))

    The gradient is 0 where the gap is the margin or more.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.
      margin: m, same shape or one number for all pairs.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if the shapes differ.

    References: SLiC-HF, arXiv:2305.10425, its rank calibration loss, on rewards instead of sequence
    log-probabilities. TRL's DPO `hinge` is this with m = 1 on beta times log-ratios.
    """
    chosen, rejected, m = _float32("hinge", chosen=chosen, rejected=rejected, margin=margin)
    return jax.nn.relu(m - (chosen - rejected))


def margin_regression(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    margin: Float[Array, "..."] | float,
) -> Float[Array, "..."]:
    """Squared error of the gap against the gap that is wanted.

    .. math:: ((r_c - r_r) - m)^2

    Blind to a constant added to both rewards; at the optimum rewards are in the units of m.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.
      margin: m, the difference of two scores s_c - s_r, same shape, or one number.

    Returns:
      Loss per pair, float32[...], not reduced. No factor 1/2.

    Raises:
      ValueError: if the shapes differ.

    References: RM-Distiller, arXiv:2601.14032, its margin-aware objective, pair by pair. Deviation
    from one of its two trainers, where [B] rewards meet [B, 1] score differences and every pair is
    regressed on the margins of all. IPO, arXiv:2310.12036, eq. 17, is this with m = 1 / (2 tau) on
    log-ratios.
    """
    chosen, rejected, m = _float32(
        "margin_regression", chosen=chosen, rejected=rejected, margin=margin
    )
    return jnp.square(chosen - rejected - m)


def absolute_regression(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    chosen_score: Float[Array, "..."],
    rejected_score: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Squared error of each reward against the score of its answer.

    .. math:: (r_c - s_c)^2 + (r_r - s_r)^2

    Not blind to a constant: rewards are scores, comparable across prompts if the scores are.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.
      chosen_score: s_c, same shape. rejected_score: s_r, same shape.

    Returns:
      Loss per pair, float32[...], not reduced: the sum of both errors, as in the source, so twice
      the mean square per answer.

    Raises:
      ValueError: if the shapes differ.

    References: RM-Distiller, arXiv:2601.14032, baseline `steerlm` of its code; the regression of
    attribute scores is that of SteerLM, arXiv:2310.05344, which predicts them as text instead.
    """
    chosen, rejected, good, bad = _float32(
        "absolute_regression",
        chosen=chosen,
        rejected=rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )
    return jnp.square(chosen - good) + jnp.square(rejected - bad)


def centring(chosen: Float[Array, "..."], rejected: Float[Array, "..."]) -> Float[Array, "..."]:
    """Auxiliary term that keeps the rewards of a pair around 0.

    .. math:: (r_c + r_r)^2

    The losses of the gap leave a constant free for every prompt; this fixes it. Added to one of
    them with a small coefficient, 0.01 in the source.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.

    Returns:
      Term per pair, float32[...], not reduced.

    Raises:
      ValueError: if the shapes differ.

    References: Eisenstein et al., arXiv:2312.09244, the regulariser of their reward models; TRL's
    RewardTrainer has it as `center_rewards_coefficient`.
    """
    chosen, rejected = _float32("centring", chosen=chosen, rejected=rejected)
    return jnp.square(chosen + rejected)
