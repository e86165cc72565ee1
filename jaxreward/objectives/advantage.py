"""How much better an answer, or a token, was than expected. Arrays in, float32 out.

Rewards of answers and the groups that they belong to (answers to one prompt) are arrays of one
shape, any shape: statistics run over all of it. `group` is 0 to num_groups - 1, and -1 for an
answer that is not there or was taken out: it enters no statistic and gets advantage 0. Tokens are
[B, T] with `answer` as in `objectives.policy`; rewards that meet tokens are [B, K].

    group_relative, leave_one_out, gdpo      a number an answer, from others to the same prompt
    reinforce_pp, whiten                     normalised over the tokens of the batch
    token_advantages, token_rewards, gae     from answers to tokens
    ppo                                      these two with a value head
    overlong_penalty, overlong_zero          what length does to rewards
    keep_groups, keep_answers                dynamic filtering

No gradient flows through any of them. An advantage of a batch depends on the whole batch: compute
them before it is cut.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core import masked
from jaxreward.core import metrics as m
from jaxreward.core.types import Array

_stop = jax.lax.stop_gradient


def _same_shape(name: str, **arrays):
    shapes = {k: x.shape for k, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name} needs equal shapes; received {shapes}")


def _deviations(rewards, group, num_groups):
    """(reward - mean of its group, variance of each group), over all answers."""
    flat, variance = masked.deviations_by(rewards.ravel(), group.ravel(), num_groups)
    return flat.reshape(rewards.shape), variance


def group_relative(
    rewards: Float[Array, "..."],
    group: Int[Array, "..."],
    *,
    num_groups: int,
    scale: str = "std",
    eps: float = 1e-4,
) -> Float[Array, "..."]:
    """Reward relative to the other answers to the prompt.

    .. math:: A_i = \\frac{r_i - \\mathrm{mean}(r_{group})}{\\sigma + \\epsilon}

    A group whose rewards are equal, and a group of one, has advantage exactly 0.

    Args:
      rewards: Of each answer, float[...].
      group: Of each answer, same shape; -1 = none.
      num_groups: How many groups there are.
      scale: What sigma is. "std": of the group, which gives nearly solved and nearly hopeless
        prompts as much weight as others. "batch": of all rewards of the batch. "none": no division.
      eps: Keeps rewards that differ by rounding alone from being blown up.

    Returns:
      Advantage of each answer, float32[...]; 0 where `group` is -1.

    Raises:
      ValueError: if shapes differ, the word is unknown, or a group number is too large.

    References: GRPO, arXiv:2402.03300, section 4.1.2 ("std"); Dr. GRPO, arXiv:2503.20783 ("none");
    arXiv:2508.08221 ("batch"). The papers have no eps and do not say which variance; TRL (eps 1e-4)
    and verl (1e-6) divide by n - 1, and so do we. Deviation: verl gives a group of one its reward.
    """
    _same_shape("group_relative", rewards=rewards, group=group)
    centred, variance = _deviations(rewards, group, num_groups)
    if scale == "std":
        sigma = masked.spread(jnp.sqrt(variance), group.ravel()).reshape(group.shape)
    elif scale == "batch":
        _, variance = _deviations(rewards, jnp.where(group >= 0, 0, -1), 1)
        sigma = jnp.sqrt(variance[0])
    elif scale == "none":
        return _stop(centred)
    else:
        raise ValueError(f'scale must be "std", "batch" or "none"; received {scale!r}')
    return _stop(masked.safe_divide(centred, sigma + eps))


def leave_one_out(
    rewards: Float[Array, "..."], group: Int[Array, "..."], *, num_groups: int
) -> Float[Array, "..."]:
    """Reward relative to the mean of the *other* answers to the prompt.

    .. math:: A_i = r_i - \\frac{1}{n - 1} \\sum_{j \\ne i} r_j
                  = \\frac{n}{n - 1} (r_i - \\mathrm{mean}(r_{group}))

    Args:
      rewards: Of each answer, float[...].
      group: Of each answer, same shape; -1 = none.
      num_groups: How many groups there are.

    Returns:
      Advantage of each answer, float32[...]; 0 where `group` is -1, and for an answer that has no
      others (TRL too; verl gives it its reward).

    Raises:
      ValueError: if shapes differ, or a group number is too large.

    References: Kool et al., 2019; RLOO, Ahmadian et al., arXiv:2402.14740.
    """
    _same_shape("leave_one_out", rewards=rewards, group=group)
    centred, _ = _deviations(rewards, group, num_groups)
    n = masked.count_by(group.ravel(), num_groups)
    factor = masked.spread(masked.safe_divide(n, n - 1), group.ravel()).reshape(group.shape)
    return _stop(centred * factor)


def whiten(
    x: Float[Array, "..."], mask: Bool[Array, "..."], *, eps: float = 1e-8
) -> Float[Array, "..."]:
    """Mean 0 and variance 1 over everything that the mask shows.

    .. math:: \\frac{x - \\mathrm{mean}(x)}{\\sqrt{\\mathrm{var}(x) + \\epsilon}}, \\quad
              \\mathrm{var}(x) = \\frac{1}{n - 1} \\sum (x - \\mathrm{mean}(x))^2

    Over tokens, an answer counts as often as it has tokens, so long answers weigh more: that is how
    DLER and REINFORCE++ are run. Equal values, however large, become exactly 0.

    Args:
      x: float[...]; usually advantages per token [B, T].
      mask: True where a value counts, same shape: all valid tokens of the *batch*.
      eps: Under the root.

    Returns:
      float32[...]; 0 where the mask is False.

    Raises:
      ValueError: if shapes differ.

    References: DLER, arXiv:2510.15110, "batch-wise reward normalization"; the formula is that of
    its released code (verl's `masked_whiten`).
    """
    _same_shape("whiten", x=x, mask=mask)
    centred, variance = _deviations(x, jnp.where(mask, 0, -1), 1)
    return _stop(centred / jnp.sqrt(variance[0] + eps))


def gdpo(
    rewards: Float[Array, "*answers R"],
    group: Int[Array, "*answers"],
    *,
    num_groups: int,
    weights: Float[Array, " R"] | None = None,
    valid: Bool[Array, "*answers R"] | None = None,
    batch: bool = True,
    eps: float = 1e-4,
) -> Float[Array, "*answers"]:
    """Several rewards, each normalised within its group before they are added up.

    .. math:: A_i = \\sum_k w_k \\frac{r_{ik} - \\mathrm{mean}(r_{group, k})}
                  {\\mathrm{std}(r_{group, k}) + \\epsilon}

    and then, with `batch`, divided by the standard deviation over all answers of the batch, plus
    epsilon. (Its mean over the batch is 0 by construction, and is taken to be.) Adding the rewards
    first would give different mixtures of them the same advantage.

    Args:
      rewards: R numbers an answer, float[..., R].
      group: Of each answer, int32[...]; -1 = none.
      num_groups: How many groups there are.
      weights: w, float[R]; None = all 1.
      valid: False where an answer has no such reward, bool[..., R]: it enters neither mean nor std
        of that reward, and gets 0 for it. A reward that exists for correct answers only (how short,
        say) is compared among those. None = all valid. An answer without any valid reward stays
        out of the batch statistics and gets 0.
      batch: False to leave out the last step, because tokens are whitened instead (`whiten`).
      eps: As `group_relative`.

    Returns:
      Advantage of each answer, float32[...]; 0 where `group` is -1.

    Raises:
      ValueError: if shapes differ, or a group number is too large.

    References: GDPO, arXiv:2601.05242. Its code for TRL has eps 1e-4 twice and normalises over
    answers, as here (TRL: multi_objective_aggregation="normalize_then_sum"); its code for verl
    whitens over tokens: batch=False, then `token_advantages` and `whiten`.
    """
    if rewards.shape[:-1] != group.shape:
        raise ValueError(f"gdpo needs a group an answer, {rewards.shape[:-1]}; got {group.shape}")
    R = rewards.shape[-1]
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    weights = jnp.ones(R, jnp.float32) if weights is None else weights
    _same_shape("gdpo", rewards=rewards, valid=valid)
    total = jnp.zeros(group.shape, jnp.float32)
    for k in range(R):
        members = jnp.where(valid[..., k], group, -1)
        each = group_relative(rewards[..., k], members, num_groups=num_groups, eps=eps)
        total = total + weights[k] * each
    if not batch:
        return _stop(total)
    present = jnp.sum((group >= 0) & jnp.any(valid, axis=-1))
    variance = masked.safe_divide(jnp.sum(jnp.square(total)), jnp.maximum(present - 1, 0))
    return _stop(masked.safe_divide(total, jnp.sqrt(variance) + eps))


def token_advantages(
    advantages: Float[Array, "B K"], answer: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The advantage of its answer for each token.

    Args:
      advantages: Of the answers of each row, float[B, K].
      answer: Which of them a slot belongs to, int32[B, T]; -1 = none.

    Returns:
      float32[B, T]; 0 where `answer` is -1.

    Raises:
      ValueError: if an answer number is K or more.
    """
    return _stop(masked.spread(advantages, answer))


def _next(answer):
    """(slot of the next token of any answer, T where none follows; whether it is of the same)."""
    T = answer.shape[1]
    slots = jnp.where(answer >= 0, jnp.arange(T, dtype=jnp.int32), T)
    after = jnp.pad(slots[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    after = jax.lax.cummin(after, axis=1, reverse=True)
    following = jnp.take_along_axis(answer, jnp.minimum(after, T - 1), axis=1)
    return after, (answer >= 0) & (after < T) & (following == answer)


def token_rewards(
    rewards: Float[Array, "B K"],
    answer: Int[Array, "B T"],
    *,
    penalty: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The reward of each answer at its last token, less a penalty at every token.

    .. math:: r_t = [t \\text{ is last}] R - p_t

    With p = beta * `policy.kl(old_logps, ref_logps, kind="k1")` this is the KL term in the reward.

    Args:
      rewards: Of the answers of each row, float[B, K].
      answer: Which of them a slot belongs to, int32[B, T]; -1 = none. The slots of an answer may
        have gaps, but no other answer may lie in them.
      penalty: p, float[B, T], or None.

    Returns:
      float32[B, T]; 0 where `answer` is -1. For one number an answer instead, as RLOO has it, take
      rewards - masked.total_by(p, answer, K).

    Raises:
      ValueError: if shapes differ.

    References: Ziegler et al., arXiv:1909.08593, eq. 2; PPO for language models has it so since.
    """
    _, same = _next(answer)
    live = answer >= 0
    out = jnp.where(live & ~same, masked.spread(rewards, answer), 0.0)
    if penalty is not None:
        _same_shape("token_rewards", answer=answer, penalty=penalty)
        out = out - jnp.where(live, penalty.astype(jnp.float32), 0.0)
    return _stop(out)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    answer: Int[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation within each answer.

    .. math:: \\delta_t = r_t + \\gamma V_{t+1} - V_t, \\quad
              A_t = \\delta_t + \\gamma \\lambda A_{t+1}, \\quad R_t = A_t + V_t

    t + 1 is the next slot of the same answer, over any gap (the output of a tool). After its last
    token an answer has ended: V = A = 0 there, also if it was cut off at the longest length.

    Args:
      rewards: Per token, float[B, T], as from `token_rewards`.
      values: V of the value head, before the token was chosen, float[B, T].
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none. As in `token_rewards`.
      gamma: Discount. lam: 1 is reward to go less V, 0 one step.

    Returns:
      (advantages, returns for the value loss), float32[B, T] each; 0 where `answer` is -1. Not
      whitened; verl does so on top (`whiten`).

    Raises:
      ValueError: if shapes differ.

    References: Schulman et al., arXiv:1506.02438, eq. 16.
    """
    _same_shape("gae", rewards=rewards, values=values, answer=answer)
    live = answer >= 0
    rewards = jnp.where(live, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(live, values.astype(jnp.float32), 0.0)
    after, same = _next(answer)
    following = jnp.take_along_axis(values, jnp.minimum(after, answer.shape[1] - 1), axis=1)
    delta = rewards + gamma * jnp.where(same, following, 0.0) - values
    # A gap hands on what comes after it; the last token of an answer takes nothing from there.
    decay = jnp.where(live, gamma * lam * same, 1.0)
    delta = jnp.where(live, delta, 0.0)

    def compose(later, earlier):
        (a, b), (c, d) = later, earlier
        return a * c, d + c * b

    _, advantages = jax.lax.associative_scan(compose, (decay, delta), axis=1, reverse=True)
    advantages = jnp.where(live, advantages, 0.0)
    return _stop(advantages), _stop(advantages + values)


def ppo(
    rewards: Float[Array, "B K"],
    values: Float[Array, "B T"],
    answer: Int[Array, "B T"],
    *,
    penalty: Float[Array, "B T"] | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """PPO with a value head: `gae` of `token_rewards`.

    Args:
      rewards: Of the answers of each row, float[B, K].
      values: V of the value head, before the token was chosen, float[B, T].
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none.
      penalty: Per token, as in `token_rewards`, or None.
      gamma, lam: As `gae`.

    Returns:
      (advantages, returns for `policy.value_loss`), float32[B, T] each; 0 where `answer` is -1.

    Raises:
      ValueError: if shapes differ.

    References: PPO, arXiv:1707.06347, with GAE, arXiv:1506.02438. It is usual to whiten the
    advantages of the batch (Huang et al., arXiv:2403.17031; `rollouts.whiten`), never the returns.
    """
    each = token_rewards(rewards, answer, penalty=penalty)
    return gae(each, values, answer, gamma=gamma, lam=lam)


def reinforce_pp(
    rewards: Float[Array, "B K"],
    answer: Int[Array, "B T"],
    *,
    group: Int[Array, "B K"] | None = None,
    num_groups: int | None = None,
    penalty: Float[Array, "B T"] | None = None,
    eps: float = 1e-8,
) -> Float[Array, "B T"]:
    """REINFORCE++: reward to go, normalised over all tokens of the batch.

    .. math:: A_t = R - \\sum_{s \\ge t} p_s, \\quad \\text{whitened over the batch}

    With groups, R is first taken relative to the mean of its group: the variant with a baseline,
    which is also the estimator that DLER is run with.

    Args:
      rewards: R of the answers of each row, float[B, K].
      answer: Which of them a slot belongs to, int32[B, T]; -1 = none.
      group: Of each answer, int32[B, K]; None = no baseline.
      num_groups: How many groups there are; needed with `group`.
      penalty: p per token, as in `token_rewards`, or None.
      eps: As `whiten`.

    Returns:
      Advantage of each token, float32[B, T]; 0 where `answer` is -1.

    Raises:
      ValueError: if shapes differ, or `group` comes without `num_groups`.

    After whitening, a group of equal rewards no longer has advantage 0, but the distance of 0 from
    the mean over tokens: take such groups out first (`keep_groups`).

    References: REINFORCE++, arXiv:2501.03262; its variant with baseline has no penalty here but a
    k2 term in the loss. Verl's `reinforce_plus_plus` and `reinforce_plus_plus_baseline` are this
    with gamma = 1. Deviation: verl leaves the reward of a group of one as it is; here it is 0.
    """
    if group is not None:
        if num_groups is None:
            raise ValueError("reinforce_pp needs num_groups with group")
        rewards = group_relative(rewards, group, num_groups=num_groups, scale="none")
    each = token_rewards(rewards, answer, penalty=penalty)
    to_go, _ = gae(each, jnp.zeros_like(each), answer, gamma=1.0, lam=1.0)
    return whiten(to_go, answer >= 0, eps=eps)


def overlong_penalty(
    lengths: Int[Array, "..."], *, longest: int, cache: int
) -> Float[Array, "..."]:
    """What to add to the reward of an answer that comes close to the longest length.

    .. math:: 0 \\text{ up to } L - C, \\quad \\frac{L - C - n}{C} \\text{ up to } L, \\quad -1
              \\text{ beyond}

    Args:
      lengths: Tokens of each answer, n, int32[...].
      longest: L. cache: C, the last tokens before it, over which the penalty grows.

    Returns:
      Penalty of each answer, float32[...], in [-1, 0].

    Raises:
      ValueError: unless 0 < cache <= longest.

    References: DAPO, arXiv:2503.14476, eq. 13.
    """
    if not 0 < cache <= longest:
        raise ValueError(
            f"overlong_penalty needs 0 < cache <= longest; received {cache} and {longest}"
        )
    return _stop(jnp.clip((longest - cache - lengths.astype(jnp.float32)) / cache, -1.0, 0.0))


def overlong_zero(
    rewards: Float[Array, "..."], lengths: Int[Array, "..."], *, longest: int
) -> Float[Array, "..."]:
    """Rewards, and 0 for answers of more than `longest` tokens.

    An answer that sampling cut off at `longest` is not longer than that: it gets no reward because
    it has not ended, which is the reward function's to say.

    Args:
      rewards: Of each answer, float[...].
      lengths: Tokens of each answer, int32[...].
      longest: The limit.

    Returns:
      float32[...].

    Raises:
      ValueError: if shapes differ.

    References: DLER, arXiv:2510.15110: truncation as the length penalty, at 4000 tokens.
    """
    _same_shape("overlong_zero", rewards=rewards, lengths=lengths)
    return _stop(jnp.where(lengths > longest, 0.0, rewards.astype(jnp.float32)))


def keep_groups(
    outcomes: Float[Array, "..."],
    group: Int[Array, "..."],
    *,
    num_groups: int,
    shaped: Float[Array, "..."] | None = None,
) -> tuple[Bool[Array, "..."], dict[str, Any]]:
    """Dynamic filtering: which answers belong to a group that can teach something.

    .. math:: \\min_{group} o < \\max_{group} o

    Outcomes, not shaped rewards, decide: a length penalty that differs between wrong answers would
    otherwise keep a group in which nothing is right.

    Args:
      outcomes: Of each answer, such as 1 = right and 0 = wrong, float[...].
      group: Of each answer, same shape; -1 = none.
      num_groups: How many groups there are.
      shaped: The rewards that advantages are made of, same shape, if all-right groups still carry a
        signal in them: then a group is kept if any outcome is above 0 and shaped rewards differ.

    Returns:
      (keep bool[...], an answer's; accumulators of `core.metrics`: "groups_kept", "groups_wrong"
      and "groups_right", shares of the groups that have answers; wrong: all outcomes are equal and
      at most 0; right: equal and above). A group of one never has spread.

    Raises:
      ValueError: if shapes differ, or a group number is too large.

    References: DAPO, arXiv:2503.14476, eq. 11, and its code. Deviations: groups are left out
    (`keep_answers`) and not sampled again, which is the recipe's affair; verl keeps groups of one.
    `shaped` is ours.
    """
    _same_shape("keep_groups", outcomes=outcomes, group=group)
    ids = group.ravel()
    deviation, _ = masked.deviations_by(outcomes.ravel(), ids, num_groups)
    differ = lambda x: masked.total_by(x != 0, ids, num_groups) > 0
    mixed = differ(deviation)
    any_right = masked.total_by(outcomes.ravel() > 0, ids, num_groups) > 0
    kept = mixed
    if shaped is not None:
        _same_shape("keep_groups", outcomes=outcomes, shaped=shaped)
        kept = any_right & differ(masked.deviations_by(shaped.ravel(), ids, num_groups)[0])
    present = masked.count_by(ids, num_groups) > 0
    share = lambda condition: m.Mean.of(condition.astype(jnp.float32), present)
    counted = {
        "groups_kept": share(kept),
        "groups_wrong": share(~mixed & ~any_right),
        "groups_right": share(~mixed & any_right),
    }
    return masked.spread(kept, ids).reshape(group.shape) > 0, counted


def keep_answers(answer: Int[Array, "B T"], keep: Bool[Array, "B K"]) -> Int[Array, "B T"]:
    """`answer` without the answers that are not kept: -1 in their slots.

    Their tokens then have weight 0 in `policy.reduction` and leave its denominator, too.

    Args:
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none.
      keep: Of the answers of each row, bool[B, K].

    Returns:
      int32[B, T].
    """
    return jnp.where(masked.spread(keep, answer) > 0, answer, -1)
