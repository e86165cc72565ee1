"""Losses of masked diffusion. Arrays in, unreduced float32 arrays out.

A denoiser is shown texts in which some tokens are masked, and `logps` is what it gives the true
token of every slot: log p(x_i | the partly masked text, prompt). A row holds several texts;
`segments` says which one a slot belongs to, int32[B, T], at most T, 0 = padding.

    elbo, weighted             a slot's part of the bound on -log p of its text; other weights
    shares, weight             how slots are averaged: a factor for each, and one denominator
    log_likelihood             an estimate of the same bound for a whole text, with less variance
    step_logps, step_ratio     of what one step of a sampler has committed
    trajectory_nll, reinforce  losses on such steps

With w from `shares` and d from `weight`, the training step minimises

    sum of w * elbo(logps, masked, rate) over all slots / d

where d is counted on the whole batch before it is cut and before anything is masked. It is never
the number of masked slots, which would take the time out of the bound. Which slots are maskable is
the data's decision: end tokens that pad an answer are learned from only if they are among them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core import masked as where_masked
from jaxreward.core.types import Array

# Mean log-ratios are cut here before exp, as in `objectives.policy`.
HIGHEST = 20.0


def _visible(name: str, mask, **arrays) -> list:
    """The arrays in float32, of the mask's shape, and 0 where it is False."""
    shapes = {k: x.shape for k, x in {**arrays, "mask": mask}.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name} needs equal shapes; received {shapes}")
    # Before any arithmetic: 0 times the slope at a hidden inf would be a NaN gradient.
    return [jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in arrays.values()]


def elbo(
    logps: Float[Array, "..."], masked: Bool[Array, "..."], rate: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The negative evidence lower bound, slot by slot.

    .. math:: \\frac{-\\log p_\\theta(x_i \\mid x_t)}{p(t)} \\; [x_{t, i} = M]

    Its expectation over times and masks, summed over a text, is at least -log p(text | prompt):
    it is the mean over all orders of writing the tokens one by one. It is equal if the conditional
    probabilities of the model are those of one joint distribution.

    Args:
      logps: Of the true tokens, float[B, T]; what is not masked is not looked at.
      masked: True where the model saw the mask token.
      rate: p(t), the probability with which the slot was masked, `Corrupted.rate`.

    Returns:
      float32[B, T], not reduced; 0 where nothing is masked.

    Raises:
      ValueError: if shapes differ.

    References: LLaDA, arXiv:2502.09992, pre-training and SFT, and its code, which divides by
    p = (1 - eps) t + eps. Since p is at least eps, the expectation is off the bound by O(eps).
    """
    logps, rate = _visible("elbo", masked, logps=logps, rate=rate)
    return jnp.where(masked, -logps / jnp.where(masked, rate, 1.0), 0.0)


def weighted(
    logps: Float[Array, "..."], masked: Bool[Array, "..."], weights: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Cross-entropy of masked slots times weights that take the place of 1 / p(t).

    .. math:: -w_i \\log p_\\theta(x_i \\mid x_t) \\; [x_{t, i} = M]

    It bounds nothing. With `diffusion.process.context_weights` it is Dream's CART: a slot counts
    the more, the more clean tokens are near.

    Args:
      logps, masked: As `elbo`.
      weights: w, same shape. Not differentiated if they come from `context_weights`.

    Returns:
      float32[B, T], not reduced; 0 where nothing is masked.

    Raises:
      ValueError: if shapes differ.

    References: Dream 7B, arXiv:2508.15487.
    """
    logps, weights = _visible("weighted", masked, logps=logps, weights=weights)
    return -weights * logps


def text_sizes(maskable: Bool[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B N"]:
    """How many maskable slots each text of a row has, int32[B, T + 1] by segment; 0 at padding's.

    Raises:
      ValueError: if a segment is above T (seen outside `jit` only).
    """
    T = segments.shape[1]
    if not isinstance(segments, jax.core.Tracer) and segments.size and int(segments.max()) > T:
        raise ValueError(
            f"segments must be at most {T}, the slots of a row; received {segments.max()}. "
            "Count the texts of each row from 1"
        )
    live = (maskable & (segments > 0)).astype(jnp.int32)
    return jax.vmap(lambda m, s: jnp.zeros(T + 1, jnp.int32).at[s].add(m))(live, segments)


def shares(
    maskable: Bool[Array, "B T"], segments: Int[Array, "B T"], mode: str
) -> Float[Array, "B T"]:
    """What each slot weighs in the mean; the whole adds up to `weight` of the same mode.

    Args:
      maskable: True where a slot could have been masked: those of the answers in SFT, all of a text
        in pre-training.
      segments: Which text a slot belongs to.
      mode: "sequence" gives each text the same weight, 1 / L a slot if L of its slots are maskable.
        "token" gives each slot the same, 1.

    Returns:
      float32[B, T]; 0 where a slot is not maskable. A text without maskable slots has no weight.

    Raises:
      ValueError: if the mode is unknown, or a segment above T.

    References: "sequence" is LLaDA's SFT, where L counts the end tokens that pad an answer; "token"
    is its pre-training and d1's SFT (arXiv:2504.12216), whose code divides by the answers' tokens.
    """
    _known(mode)
    live = maskable & (segments > 0)
    if mode == "token":
        return live.astype(jnp.float32)
    sizes = jnp.take_along_axis(text_sizes(maskable, segments), segments, axis=1)
    return jnp.where(live, 1.0 / jnp.maximum(sizes, 1).astype(jnp.float32), 0.0)


def weight(
    maskable: Bool[Array, "B T"], segments: Int[Array, "B T"], mode: str
) -> Float[Array, ""]:
    """The denominator of `shares`: texts with anything maskable, or maskable slots, float32[].

    It knows nothing of what was masked, so it is exact for every cut of the batch.

    Raises:
      ValueError: as `shares`.

    References: as `shares`. Deviation: d1's code counts the tokens of a microbatch; here they are
    counted once, on the whole batch.
    """
    _known(mode)
    if mode == "token":
        return jnp.sum(maskable & (segments > 0), dtype=jnp.float32)
    return jnp.sum(text_sizes(maskable, segments) > 0, dtype=jnp.float32)


def _known(mode):
    if mode not in ("sequence", "token"):
        raise ValueError(f'mode must be "sequence" or "token"; received {mode!r}')


def log_likelihood(
    logps: Float[Array, "B T"],
    masked: Bool[Array, "B T"],
    counts: Int[Array, " B"],
    length: Int[Array, "..."] | int,
) -> Float[Array, " B"]:
    """An estimate of log p(text | prompt) from one masking of it a row.

    .. math:: \\frac{L}{l} \\sum_{i \\; masked} \\log p_\\theta(x_i \\mid x_l)

    With l uniform on 1 to L and exactly l of the L slots masked (`diffusion.process`'s
    `stratified_counts` and `corrupt_exactly`) its mean is minus that of `elbo`: a lower bound on
    the log-likelihood, which is exact where L = 1. It varies less, since l does not vary about L t.

    Args:
      logps: Of the true tokens; what is not masked is not looked at.
      masked: True where the model saw the mask token.
      counts: l, how many slots of a row are masked.
      length: L, how many could be: a number, int32[] or int32[B].

    Returns:
      float32[B], one estimate a row, for the caller to average; 0 where l is 0.

    Raises:
      ValueError: if shapes differ.

    References: LLaDA, arXiv:2502.09992, and its code, which averages 128 estimates in general.
    """
    (logps,) = _visible("log_likelihood", masked, logps=logps)
    return jnp.sum(logps, axis=-1) * where_masked.safe_divide(jnp.asarray(length), counts)


def step_logps(logps: Float[Array, "..."], committed: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Log-probability of what one step of a sampler has committed, float32[...].

    .. math:: \\sum_{i \\in J_t} \\log p_\\theta(r_{t-1}^i \\mid p, r_t)

    J_t are the slots that were masked before the step and are not after it. They are drawn
    independently of each other given r_t; that the sampler chose just these is not counted, which
    is a bias that everybody accepts. With one slot a step the sum over all steps is the chain rule.

    Args:
      logps: Of the tokens, as the model saw the text before the step, float[..., T].
      committed: J_t, bool[..., T].

    Raises:
      ValueError: if shapes differ.

    References: MRO, arXiv:2510.21473; J_t is our reading, the paper leaves it open.
    """
    (logps,) = _visible("step_logps", committed, logps=logps)
    return jnp.sum(logps, axis=-1)


def step_ratio(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    committed: Bool[Array, "..."],
) -> Float[Array, "..."]:
    """How much likelier a step has become, per committed token, float32[...]; 1 if it has none.

    .. math:: \\exp\\Big(\\frac{1}{|J_t|} \\sum_{i \\in J_t} (\\log p_i - \\log p_{old, i})\\Big)

    Args:
      logps, committed: As `step_logps`.
      old_logps: Of the policy that sampled, at the same r_t.

    Raises:
      ValueError: if shapes differ.

    References: ours, a geometric mean as GSPO's (arXiv:2507.18071, eq. 7) over a step instead of an
    answer: MRO mentions importance sampling and gives no formula. Deviation: the ratio is cut at
    e^20, where its gradient becomes 0.
    """
    logps, old = _visible("step_ratio", committed, logps=logps, old_logps=old_logps)
    mean = where_masked.mean(logps - old, committed, axis=-1)
    return jnp.exp(jnp.where(mean > HIGHEST, HIGHEST, mean))


def trajectory_nll(
    logps: Float[Array, "..."],
    committed: Bool[Array, "..."],
    response: Bool[Array, "..."],
) -> Float[Array, "..."]:
    """The loss of one step of a kept trajectory; add it up over the steps that are learned from.

    .. math:: -\\frac{1}{L_r} \\sum_{i \\in J_t} \\log p_\\theta(r_{t-1}^i \\mid p, r_t)

    Unlike `elbo` it trains on the states that a sampler has gone through, not on random masks.

    Args:
      logps, committed: As `step_logps`.
      response: True at the slots of the response, bool[..., T]; there are L_r.

    Returns:
      float32[...], not reduced; 0 where L_r is 0.

    Raises:
      ValueError: if shapes differ.

    References: MRO, arXiv:2510.21473, rejection sampling. The paper takes two consecutive steps.
    """
    logps, _ = _visible("trajectory_nll", committed, logps=logps, response=response)
    size = jnp.sum(response, axis=-1, dtype=jnp.float32)
    return where_masked.safe_divide(-jnp.sum(logps, axis=-1), size)


def reinforce(
    logps: Float[Array, "..."],
    returns: Float[Array, "..."],
    committed: Bool[Array, "..."],
) -> Float[Array, "..."]:
    """The plain policy gradient's loss of a step, slot by slot.

    .. math:: -R \\log p_\\theta(r_{t-1}^i \\mid p, r_t) \\; [i \\in J_t]

    Args:
      logps, committed: As `step_logps`.
      returns: R of each step: what its group of steps was rewarded with, less a baseline if there
        is one. float[...].

    Returns:
      float32[..., T], not reduced; its sum over T is -R times `step_logps`.

    Raises:
      ValueError: if shapes differ.

    References: MRO, arXiv:2510.21473, which has no baseline, no clip and no KL term, and R the sum
    over the steps of a group. `policy.clipped` takes the same slots where samples are used again.
    """
    if returns.shape != logps.shape[:-1]:
        raise ValueError(
            f"reinforce needs one return a step, {logps.shape[:-1]}; received {returns.shape}"
        )
    (logps,) = _visible("reinforce", committed, logps=logps)
    return -jnp.where(committed, returns[..., None].astype(jnp.float32), 0.0) * logps
