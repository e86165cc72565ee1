"""Losses on log-probabilities of whole answers: policies trained straight from preferences.

Arrays in, one float32 loss a pair out (`kto`: an answer). No model and no reference is in here: the
reference's log-probabilities are arguments like the policy's, and a loss that has none in its
parameters needs no reference.

    dpo, hinge, ipo     the gap of log-ratios to a reference: classified, up to a margin, or hit
    simpo, orpo, cpo    the gap of the policy's own log-probabilities: a token, as odds, or as it is
    kto                 answers that are good or bad, each for itself
    nll                 an auxiliary term: likelihood of the preferred answer

    implicit_reward     what a trained policy says of an answer, for metrics and evaluation

Log-probabilities are sums over an answer's tokens, its end token among them, in nats. A `_len` is
the number of those tokens; an answer of no token counts as one of probability 1, with gradient 0.
The forms of a preference in `objectives/preference.py` do the rest.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxreward.core.masked import safe_divide
from jaxreward.core.types import Array
from jaxreward.objectives import preference

# The largest mean log-probability whose odds are formed: 1 - p loses its digits beyond it.
_SURE = -1e-6


def _positive(name: str, **numbers: float) -> None:
    for key, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} needs {key} above 0; received {value}")


def _same(name: str, *arrays) -> list:
    """The arrays in float32, checked to have one shape."""
    shapes = [x.shape for x in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name} needs equal shapes; received {', '.join(map(str, shapes))}")
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def dpo(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    ref_chosen: Float[Array, "..."],
    ref_rejected: Float[Array, "..."],
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """Direct preference optimisation: `preference.soft_label` on log-ratios to a reference.

    .. math:: -(1 - \\epsilon) \\log\\sigma(m) - \\epsilon \\log\\sigma(-m), \\quad
              m = \\beta \\left[(\\ell_c - \\ell^0_c) - (\\ell_r - \\ell^0_r)\\right]

    log 2 where the policy is the reference.

    Args:
      chosen_logps: Log-probability of the preferred answers by the policy, float[...].
      rejected_logps: Of the others, same shape.
      ref_chosen, ref_rejected: Of both by the reference, same shape.
      beta: What a nat of log-ratio weighs; the larger, the closer to the reference.
      smoothing: epsilon in [0, 0.5], how often labels are flipped: conservative DPO above 0.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ, beta is not positive or smoothing out of its range.

    References: Rafailov et al., arXiv:2305.18290, eq. 7; smoothing: Mitchell, 2023, "A note on DPO
    with noisy preferences", eq. 3. TRL's DPOTrainer has the first as `sigmoid`. Its `robust` is
    another loss, which subtracts the flipped term.
    """
    _positive("dpo", beta=beta)
    chosen, rejected, ref_c, ref_r = _same(
        "dpo", chosen_logps, rejected_logps, ref_chosen, ref_rejected
    )
    return preference.soft_label(
        beta * (chosen - ref_c), beta * (rejected - ref_r), smoothing=smoothing
    )


def hinge(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    ref_chosen: Float[Array, "..."],
    ref_rejected: Float[Array, "..."],
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """How much the gap of DPO falls short of 1.

    .. math:: \\max(0, 1 - m), \\quad m \\text{ as in } \\texttt{dpo}

    1 where the policy is the reference; no gradient where m is 1 or more.

    Args:
      chosen_logps, rejected_logps, ref_chosen, ref_rejected: As `dpo`.
      beta: 1 / beta is the gap of log-ratios, in nats, that is enough.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ or beta is not positive.

    References: SLiC-HF, arXiv:2305.10425, whose gap is of log-probabilities; with a reference
    as in RSO, arXiv:2309.06657. TRL's DPOTrainer: `hinge`.
    """
    _positive("hinge", beta=beta)
    chosen, rejected, ref_c, ref_r = _same(
        "hinge", chosen_logps, rejected_logps, ref_chosen, ref_rejected
    )
    return preference.hinge(beta * (chosen - ref_c), beta * (rejected - ref_r), margin=1.0)


def ipo(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    ref_chosen: Float[Array, "..."],
    ref_rejected: Float[Array, "..."],
    chosen_len: Float[Array, "..."],
    rejected_len: Float[Array, "..."],
    beta: float = 0.1,
) -> Float[Array, "..."]:
    """Identity preference optimisation: the gap of log-ratios a token is to be 1 / (2 beta).

    .. math:: \\left(\\frac{\\ell_c - \\ell^0_c}{|c|} - \\frac{\\ell_r - \\ell^0_r}{|r|}
              - \\frac{1}{2\\beta}\\right)^2

    1 / (4 beta^2) where the policy is the reference.

    Args:
      chosen_logps, rejected_logps, ref_chosen, ref_rejected: As `dpo`.
      chosen_len, rejected_len: Tokens of the answers, same shape.
      beta: The paper's tau. The gap aimed at is in nats a token.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ or beta is not positive.

    References: Azar et al., arXiv:2310.12036, eq. 17. Deviation, the one that TRL's DPOTrainer
    (`ipo`) makes, too, and ascribes to the authors: log-ratios are means over tokens, where the
    equation has sums.
    """
    _positive("ipo", beta=beta)
    chosen, rejected, ref_c, ref_r, len_c, len_r = _same(
        "ipo", chosen_logps, rejected_logps, ref_chosen, ref_rejected, chosen_len, rejected_len
    )
    return preference.margin_regression(
        safe_divide(chosen - ref_c, len_c),
        safe_divide(rejected - ref_r, len_r),
        margin=1 / (2 * beta),
    )


def simpo(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    chosen_len: Float[Array, "..."],
    rejected_len: Float[Array, "..."],
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Float[Array, "..."]:
    """Simple preference optimisation: the gap of log-probabilities a token, by a margin.

    .. math:: -\\log\\sigma\\left(\\beta\\frac{\\ell_c}{|c|} - \\beta\\frac{\\ell_r}{|r|}
              - \\gamma\\right)

    Args:
      chosen_logps, rejected_logps: Log-probabilities by the policy, float[...]. There is no
        reference.
      chosen_len, rejected_len: Tokens of the answers, same shape.
      beta: What a nat a token weighs.
      gamma: The margin, at least 0, in units of the loss: gamma / beta nats a token.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ, beta is not positive or gamma negative.

    References: Meng et al., arXiv:2405.14734, eq. 6. TRL's CPOTrainer: `simpo` with `simpo_gamma`
    and `cpo_alpha=0`.
    """
    _positive("simpo", beta=beta)
    if gamma < 0:
        raise ValueError(f"simpo needs gamma at or above 0; received {gamma}")
    chosen, rejected, len_c, len_r = _same(
        "simpo", chosen_logps, rejected_logps, chosen_len, rejected_len
    )
    return preference.bradley_terry(
        beta * safe_divide(chosen, len_c), beta * safe_divide(rejected, len_r), margin=gamma
    )


def orpo(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    chosen_len: Float[Array, "..."],
    rejected_len: Float[Array, "..."],
) -> Float[Array, "..."]:
    """The term of odds ratio preference optimisation that tells the two answers apart.

    .. math:: -\\log\\sigma\\left(\\log\\frac{p_c}{1 - p_c} - \\log\\frac{p_r}{1 - p_r}\\right),
              \\quad p = e^{\\ell / |y|}

    The method is `nll` plus this with a coefficient (lambda, 0.1 in the source's runs).

    Args:
      chosen_logps, rejected_logps, chosen_len, rejected_len: As `simpo`.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ.

    References: Hong et al., arXiv:2403.07691, eq. 6 and 7. TRL's ORPOTrainer calls the coefficient
    `beta`. Deviation: a mean log-probability above -1e-6 counts as -1e-6 and has no gradient, since
    its odds are infinite in float32.
    """
    chosen, rejected, len_c, len_r = _same(
        "orpo", chosen_logps, rejected_logps, chosen_len, rejected_len
    )

    def log_odds(logps, length):
        mean = jnp.minimum(safe_divide(logps, length), _SURE)
        return mean - jnp.log(-jnp.expm1(mean))

    return preference.bradley_terry(log_odds(chosen, len_c), log_odds(rejected, len_r))


def cpo(
    chosen_logps: Float[Array, "..."],
    rejected_logps: Float[Array, "..."],
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Float[Array, "..."]:
    """The preference term of contrastive preference optimisation: DPO with a uniform reference.

    .. math:: -(1 - \\epsilon) \\log\\sigma(m) - \\epsilon \\log\\sigma(-m), \\quad
              m = \\beta (\\ell_c - \\ell_r)

    The method adds `nll`.

    Args:
      chosen_logps, rejected_logps: As `simpo`.
      beta, smoothing: As `dpo`.

    Returns:
      Loss per pair, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ, beta is not positive or smoothing out of its range.

    References: Xu et al., arXiv:2401.08417, its L_prefer. TRL's CPOTrainer: `sigmoid`, whose
    `cpo_alpha` is the coefficient of the other term.
    """
    _positive("cpo", beta=beta)
    chosen, rejected = _same("cpo", chosen_logps, rejected_logps)
    return preference.soft_label(beta * chosen, beta * rejected, smoothing=smoothing)


def kto(
    logps: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    *,
    ref_logps: Float[Array, "..."],
    kl: Float[Array, ""] | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "..."]:
    """Kahneman-Tversky optimisation: an answer's log-ratio against a point of reference.

    .. math:: \\lambda_D \\left(1 - \\sigma(\\beta(\\ell - \\ell^0 - z))\\right)
              \\text{ if desirable, else }
              \\lambda_U \\left(1 - \\sigma(\\beta(z - \\ell + \\ell^0))\\right)

    Half the weight where the policy is the reference and z is 0.

    Args:
      logps: Log-probability of each answer by the policy, float[...].
      desirable: Whether it is a good one, bool[...], same shape.
      ref_logps: By the reference, same shape.
      kl: z, an estimate of the policy's divergence from the reference in nats, one number. Below 0
        it counts as 0. It gets no gradient.
      beta: What a nat weighs; the larger, the sooner an answer is good or bad enough.
      desirable_weight, undesirable_weight: lambda_D and lambda_U, to balance unequal numbers.

    Returns:
      Loss per answer, float32[...], not reduced.

    Raises:
      ValueError: if shapes differ or beta is not positive.

    References: Ethayarajh et al., arXiv:2402.01306, its L_KTO. TRL's KTOTrainer: `kto`.
    """
    _positive("kto", beta=beta)
    logps, ref, good = _same("kto", logps, ref_logps, desirable)
    z = jax.lax.stop_gradient(jnp.maximum(jnp.asarray(kl, jnp.float32), 0.0))
    gap = beta * (logps - ref - z)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits.
    return jnp.where(
        good != 0,
        desirable_weight * jax.nn.sigmoid(-gap),
        undesirable_weight * jax.nn.sigmoid(gap),
    )


def nll(
    chosen_logps: Float[Array, "..."],
    *,
    chosen_len: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Negative log-likelihood a token of the preferred answers: SFT beside a preference.

    .. math:: -\\frac{\\ell_c}{|c|}

    Args:
      chosen_logps: Log-probability of the preferred answers by the policy, float[...].
      chosen_len: Their tokens, same shape.

    Returns:
      Term per pair, float32[...], not reduced.

    Raises:
      ValueError: if the shapes differ.

    References: the SFT term of ORPO (arXiv:2403.07691, eq. 2) and of iterative RPO
    (arXiv:2404.19733). Deviations: CPO's L_NLL (arXiv:2401.08417) is printed as a sum over tokens;
    TRL takes the mean over all tokens of a micro-batch (`sft` of its DPOTrainer, and CPOTrainer),
    so that long answers count more, and its ORPOTrainer counts the prompt's tokens, too.
    """
    chosen, length = _same("nll", chosen_logps, chosen_len)
    return -safe_divide(chosen, length)


def implicit_reward(
    logps: Float[Array, "..."],
    *,
    ref_logps: Float[Array, "..."] | None = None,
    length: Float[Array, "..."] | None = None,
    beta: float = 1.0,
) -> Float[Array, "..."]:
    """What a policy prefers, as a number for each answer: the quantity whose gap a loss looks at.

    .. math:: \\beta \\, (\\ell - \\ell^0) / |y|

    Args:
      logps: Log-probability of each answer by the policy, float[...].
      ref_logps: By the reference, same shape; None leaves it out.
      length: Tokens of the answers, same shape; None leaves the division out.
      beta: Of the loss.

    Returns:
      float32[...]. Rewards of answers to one prompt may be compared, no others: in DPO a term of
      the prompt is missing.

    Raises:
      ValueError: if the shapes differ.

    References: arXiv:2305.18290, eq. 5, without the term of the prompt.
    """
    if ref_logps is not None:
        logps, ref = _same("implicit_reward", logps, ref_logps)
        logps = logps - ref
    if length is not None:
        logps = safe_divide(*_same("implicit_reward", logps, length))
    return beta * logps.astype(jnp.float32)
