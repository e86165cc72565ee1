"""Losses of online reinforcement learning. Arrays in, one float32 value a token out.

A row may hold several answers. `answer` says which one a slot belongs to: int32[B, T], 0 to K - 1
within the row, -1 for slots that are not trained on (prompts, padding, tool output, answers that
were filtered out). Everything about a whole answer is summed over the slots that bear its number,
so packed rows give what rows of one answer give. Tensors about answers are [B, K].

    clipped, clipped_sequence, reinforce     the policy's loss
    kl, entropy_bonus                        terms beside it
    value_loss                               of a value head
    importance_weights                       for what sampler and trainer compute differently
    reduction                                how tokens are averaged, as weights and a denominator
    report                                   what to watch

Advantages come from `objectives.advantage`; docs/policy_objectives.md says which paper is which
combination. With w and d from `reduction`, the training step minimises

    sum_t w[t] * loss[t] / d

where d is counted on the whole batch before it is cut. So gradients do not depend on
microbatches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core import masked
from jaxreward.core import metrics as m
from jaxreward.core.types import Array

# Log-ratios are cut here before exp, whose slope would otherwise be inf, and 0 * inf a NaN, at a
# token that the clip has taken out.
HIGHEST = 20.0


def _visible(name: str, mask, **arrays) -> list:
    """The arrays in float32, of one shape, and 0 where the mask hides them."""
    given = arrays if mask is None else {**arrays, "mask or answer": mask}
    shapes = {k: x.shape for k, x in given.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name} needs equal shapes; received {shapes}")
    # Before any arithmetic: 0 times the slope at a hidden inf would be a NaN gradient.
    hide = lambda x: x if mask is None else jnp.where(mask, x, 0.0)
    return [hide(jnp.asarray(x, jnp.float32)) for x in arrays.values()]


def _ratio(log_ratio):
    return jnp.exp(jnp.where(log_ratio > HIGHEST, HIGHEST, log_ratio))


def _check_clip(name: str, clip_low, clip_high, dual):
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"{name} keeps ratios in [1 - clip_low, 1 + clip_high] and needs clip_low in [0, 1] "
            f"and clip_high >= 0; received {clip_low} and {clip_high}"
        )
    if dual is not None and not dual > 1:
        raise ValueError(f"{name} needs dual > 1, or None for none; received {dual}")


def _surrogate(log_ratio, advantages, clip_low, clip_high, dual):
    ratio = _ratio(log_ratio)
    # Of the two terms under the minimum, the sign of the advantage decides which clip can win.
    good = jnp.where(ratio > 1 + clip_high, 1 + clip_high, ratio)
    bad = jnp.where(ratio < 1 - clip_low, 1 - clip_low, ratio)
    if dual is not None:
        bad = jnp.where(bad > dual, dual, bad)
    return -advantages * jnp.where(advantages < 0, bad, good)


def clipped(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """PPO's clipped loss, token by token, with a clip for each side.

    .. math:: -\\min(\\rho A, \\mathrm{clip}(\\rho, 1 - \\epsilon_l, 1 + \\epsilon_h) A), \\quad
              \\rho = e^{\\log\\pi - \\log\\pi_{old}}

    and, with a dual clip c, at most c|A| where A < 0. Once a token is past the clip that its
    advantage pushes it to, its gradient is 0.

    Args:
      logps: Of the policy that is trained, float[...].
      old_logps: Of the policy at the start of the update, by the trainer's own forward pass, same
        shape. What the sampler reported belongs into `importance_weights`.
      advantages: A, same shape. Not differentiated if it comes from `objectives.advantage`.
      clip_low: epsilon_l. clip_high: epsilon_h; above clip_low it is DAPO's clip-higher.
      dual: c > 1, or None for none.
      mask: True where a token counts, same shape; what it hides is not looked at. None = all.

    Returns:
      Loss per token, float32[...], not reduced; 0 where the mask is False.

    Raises:
      ValueError: if shapes differ or a clip is out of its range.

    References: PPO, arXiv:1707.06347, eq. 7; clip-higher: DAPO, arXiv:2503.14476, eq. 10 and 12;
    dual clip: Ye et al., arXiv:1912.09729 (there c = 3). TRL's GRPOTrainer gives the same, with
    `delta` for c as long as delta > 1 + epsilon_h (it caps ratios of either sign of A); verl too.
    Deviation: the ratio is cut at e^20, where its gradient becomes 0 (verl does so, TRL does not).
    """
    _check_clip("clipped", clip_low, clip_high, dual)
    logps, old_logps, advantages = _visible(
        "clipped", mask, logps=logps, old_logps=old_logps, advantages=advantages
    )
    return _surrogate(logps - old_logps, advantages, clip_low, clip_high, dual)


def sequence_log_ratio(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    answer: Int[Array, "..."],
    *,
    num_answers: int,
    length: str = "mean",
    gradient: str = "sequence",
) -> Float[Array, "..."]:
    """Log-ratio of each whole answer, given to every one of its tokens.

    .. math:: \\log s_i = \\frac{1}{|y_i|} \\sum_t (\\log\\pi_t - \\log\\pi_{old, t})

    Args:
      logps, old_logps: Per token, float[B, T].
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none.
      num_answers: K, most answers of a row.
      length: "mean" divides by the length of the answer, so s is the geometric mean of the ratios
        of its tokens; "sum" does not, so s is the ratio of the probabilities of the answer.
      gradient: "sequence" lets the gradient through the mean, to all tokens alike. "token" stops it
        there and lets it through each token's own log-prob instead: equal values, and equal
        gradients as long as all tokens of an answer have one advantage and one weight 1 / length.

    Returns:
      float32[B, T], constant over an answer; 0 where `answer` is -1.

    Raises:
      ValueError: if shapes differ, or a word is unknown.

    References: GSPO, arXiv:2507.18071, eq. 7; "token" is its GSPO-token, eq. 13 and 14. "sum" is
    what TRL's RLOOTrainer clips.
    """
    if length not in ("mean", "sum"):
        raise ValueError(f'length must be "mean" or "sum"; received {length!r}')
    if gradient not in ("sequence", "token"):
        raise ValueError(f'gradient must be "sequence" or "token"; received {gradient!r}')
    logps, old_logps = _visible("sequence_log_ratio", answer >= 0, logps=logps, old_logps=old_logps)
    over = masked.mean_by if length == "mean" else masked.total_by
    whole = masked.spread(over(logps - old_logps, answer, num_answers), answer)
    if gradient == "token":
        stop = jax.lax.stop_gradient
        return stop(whole) + logps - stop(logps)
    return whole


def clipped_sequence(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    advantages: Float[Array, "..."],
    answer: Int[Array, "..."],
    *,
    num_answers: int,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual: float | None = None,
    length: str = "mean",
    gradient: str = "sequence",
) -> Float[Array, "..."]:
    """`clipped` on the ratio of whole answers: an answer is clipped or not as one.

    .. math:: -\\min(s_i A_i, \\mathrm{clip}(s_i, 1 - \\epsilon_l, 1 + \\epsilon_h) A_i)

    Each token carries the loss of its answer, so `reduction` "sequence" takes the mean over
    answers, which is the paper's.

    Args:
      logps, old_logps, advantages: As `clipped`, float[B, T].
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none.
      num_answers: K, most answers of a row.
      clip_low, clip_high: The defaults are GSPO's, for geometric means, which stay close to 1; with
        length="sum" take those of `clipped`.
      dual: As `clipped`.
      length, gradient: As `sequence_log_ratio`.

    Returns:
      Loss per token, float32[B, T], not reduced; 0 where `answer` is -1.

    Raises:
      ValueError: if shapes differ, a clip is out of its range, or a word is unknown.

    References: GSPO, arXiv:2507.18071, eq. 5, with the clips of its section 5.1. TRL's GRPOTrainer
    has it as importance_sampling_level="sequence", and its RLOOTrainer is length="sum".
    """
    _check_clip("clipped_sequence", clip_low, clip_high, dual)
    (advantages,) = _visible("clipped_sequence", answer >= 0, advantages=advantages)
    log_ratio = sequence_log_ratio(
        logps, old_logps, answer, num_answers=num_answers, length=length, gradient=gradient
    )
    return _surrogate(log_ratio, advantages, clip_low, clip_high, dual)


def reinforce(
    logps: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """The plain policy gradient's loss.

    .. math:: -A \\log\\pi

    Its value means nothing; its gradient is -A times the gradient of the log-prob, which is also
    that of `clipped` where the policy is still the old one.

    Args:
      logps: Of the policy that is trained, float[...].
      advantages: A, same shape.
      mask: As `clipped`.

    Returns:
      Loss per token, float32[...], not reduced; 0 where the mask is False.

    Raises:
      ValueError: if shapes differ.

    References: Williams, 1992. RLOO, arXiv:2402.14740, is this with `advantage.leave_one_out` and
    `reduction` "sequence_sum", which adds up the tokens of an answer.
    """
    logps, advantages = _visible("reinforce", mask, logps=logps, advantages=advantages)
    return -advantages * logps


def kl(
    logps: Float[Array, "..."],
    ref_logps: Float[Array, "..."],
    *,
    kind: str = "k3",
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """An estimate of KL(policy || reference) from the sampled tokens, token by token.

    .. math:: k_1 = -d, \\quad k_2 = d^2 / 2, \\quad k_3 = e^d - d - 1, \\qquad
              d = \\log\\pi_{ref} - \\log\\pi

    What is right depends on its use. With tokens sampled from the policy itself:

    - As a number to watch or to subtract from rewards (`advantage.token_rewards`), k1 and k3 are
      unbiased, k1 with the larger variance and of either sign; k2 is biased.
    - Subtracted from rewards, k1 gives the unbiased gradient of KL(policy || reference): each token
      answers for all the divergence after it, with `advantage.gae` or `reinforce_pp`. k3 does not.
    - As a term of the loss, differentiated, k2 has the gradient of KL(policy || reference) of the
      next token at given prefixes, k3 that of KL(reference || policy), and k1 has gradient 0 in
      expectation: noise. None of them answers for how a token changes the later prefixes.
    - Once the policy has moved away from the one that sampled, all of this holds only up to the
      ratio of the two.

    Args:
      logps: Of the policy, float[...]; the old policy's for rewards.
      ref_logps: Of the reference, same shape.
      kind: "k1", "k2" or "k3".
      mask: As `clipped`.

    Returns:
      Estimate per token, float32[...], not reduced; 0 where the mask is False. Its sum over an
      answer (`masked.total_by`) estimates the divergence of the whole answer.

    Raises:
      ValueError: if shapes differ or `kind` is unknown.

    References: Schulman, 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html);
    gradients: Tang and Munos, arXiv:2506.09477. GRPO, arXiv:2402.03300, eq. 4, has k3 in the loss.
    Deviation: in k3, d is cut at 20, where its gradient becomes 0; TRL does not cut.
    """
    logps, ref_logps = _visible("kl", mask, logps=logps, ref_logps=ref_logps)
    d = ref_logps - logps
    if kind == "k1":
        return -d
    if kind == "k2":
        return jnp.square(d) / 2
    if kind == "k3":
        d = jnp.where(d > HIGHEST, HIGHEST, d)
        return jnp.expm1(d) - d
    raise ValueError(f'kind must be "k1", "k2" or "k3"; received {kind!r}')


def entropy_bonus(
    entropy: Float[Array, "..."], *, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Minus the entropy of the policy, so that a positive coefficient in the config raises it.

    Args:
      entropy: Per token, as `supervised.token_logps` returns it, float[...].
      mask: As `clipped`.

    Returns:
      Term per token, float32[...], not reduced; 0 where the mask is False.

    Raises:
      ValueError: if shapes differ.

    References: Williams and Peng, 1991; PPO, arXiv:1707.06347, eq. 9.
    """
    (entropy,) = _visible("entropy_bonus", mask, entropy=entropy)
    return -entropy


def value_loss(
    values: Float[Array, "..."],
    old_values: Float[Array, "..."],
    returns: Float[Array, "..."],
    *,
    clip: float | None = 0.2,
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Half the squared error of a value head, with steps away from the old values clipped.

    .. math:: \\tfrac12 \\max((v - R)^2, (v_c - R)^2), \\quad
              v_c = v_{old} + \\mathrm{clip}(v - v_{old}, -\\epsilon, \\epsilon)

    Args:
      values: v, of the head that is trained, float[...].
      old_values: v_old, at the start of the update, same shape; those that `advantage.gae` was
        given.
      returns: R, from `advantage.gae`, same shape.
      clip: epsilon, in units of the reward; None = the plain squared error.
      mask: As `clipped`.

    Returns:
      Loss per token, float32[...], not reduced; 0 where the mask is False.

    Raises:
      ValueError: if shapes differ or the clip is negative.

    References: OpenAI Baselines' PPO2, as described by Huang et al., arXiv:2403.17031. verl has the
    factor 1/2; older TRL releases put it into a coefficient.
    """
    if clip is not None and clip < 0:
        raise ValueError(f"value_loss needs clip >= 0, or None for none; received {clip}")
    values, old_values, returns = _visible(
        "value_loss", mask, values=values, old_values=old_values, returns=returns
    )
    loss = jnp.square(values - returns) / 2
    if clip is None:
        return loss
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    other = jnp.square(near - returns) / 2
    return jnp.where(other > loss, other, loss)


def importance_weights(
    old_logps: Float[Array, "..."],
    sampler_logps: Float[Array, "..."],
    answer: Int[Array, "..."],
    *,
    num_answers: int,
    level: str = "token",
    cap: float = 2.0,
    low: float = 0.0,
    outside: str = "truncate",
) -> Float[Array, "..."]:
    """How much more likely the trainer finds what the sampler drew: a factor for the policy's loss.

    .. math:: w = \\min(e^{\\log\\pi_{old} - \\log\\pi_{sampler}}, C)

    Sampler and trainer hold the same weights and still differ: in kernels, precision, temperature
    or the renormalisation of top-p, or because the sampler's weights are older.

    Args:
      old_logps: By the trainer's forward pass, float[B, T].
      sampler_logps: As the sampler drew them, same shape.
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none.
      num_answers: K, most answers of a row.
      level: "token": each for itself. "sequence": the ratio of the whole answer, the product over
        its tokens. "mean": the geometric mean over its tokens.
      cap: C, the largest weight.
      low: The smallest.
      outside: What is done with ratios outside [low, cap]: "truncate" to the bound, or weight
        "zero", which leaves the token, or the answer, out of the numerator.

    Returns:
      float32[B, T], 0 where `answer` is -1. No gradient flows through it.

    Raises:
      ValueError: if shapes differ, a word is unknown, or the bounds exclude 1.

    References: Yao et al., 2025, "Your efficient RL framework secretly brings you off-policy RL
    training" (fengyao.notion.site/off-policy-rl), token level with C = 2. "zero" is masked
    importance sampling, at the token level IcePop's. TRL has level and outside as one
    `vllm_importance_sampling_mode` (its sequence levels are sums, as here). Deviation: TRL gives
    weight 1 where the sampler's log-prob is NaN; here it is let through, as every other NaN.
    """
    if level not in ("token", "sequence", "mean"):
        raise ValueError(f'level must be "token", "sequence" or "mean"; received {level!r}')
    if outside not in ("truncate", "zero"):
        raise ValueError(f'outside must be "truncate" or "zero"; received {outside!r}')
    if not 0 <= low <= 1 <= cap:
        raise ValueError(
            f"importance_weights needs 0 <= low <= 1 <= cap, or weights of policies that agree "
            f"would be changed; received low {low} and cap {cap}"
        )
    old_logps, sampler_logps = _visible(
        "importance_weights", answer >= 0, old_logps=old_logps, sampler_logps=sampler_logps
    )
    gap = old_logps - sampler_logps
    if level != "token":
        over = masked.total_by if level == "sequence" else masked.mean_by
        gap = masked.spread(over(gap, answer, num_answers), answer)
    ratio = _ratio(gap)
    if outside == "zero":
        weight = jnp.where((ratio < low) | (ratio > cap), 0.0, ratio)
    else:
        weight = jnp.clip(ratio, low, cap)
    return jax.lax.stop_gradient(jnp.where(answer >= 0, weight, 0.0))


class Reduction(NamedTuple):
    """How the losses of tokens become one number: sum(weight * loss) / denominator.

    Attributes:
      weight: Of each token, float32[B, T]; 0 where there is none.
      denominator: Of the whole batch, float32[]; 0 in an empty one.
    """

    weight: Float[Array, "B T"]
    denominator: Float[Array, ""]


def reduction(
    answer: Int[Array, "..."],
    *,
    num_answers: int,
    mode: str,
    length: int | None = None,
    group: Int[Array, "..."] | None = None,
    num_groups: int | None = None,
) -> Reduction:
    """How the tokens of a batch are averaged, as weights that survive any cut of the batch.

    =============  =======================  ===================  ==============================
    mode           weight of a token        denominator          that is
    =============  =======================  ===================  ==============================
    token          1                        tokens               mean over tokens
    sequence       1 / length of its answer answers              mean over answers of token means
    sequence_sum   1                        answers              mean over answers of token sums
    fixed          1 / `length`             answers              the same over a constant
    group          1 / tokens of its group  groups               mean over groups of token means
    =============  =======================  ===================  ==============================

    Answers without tokens, and groups without answers, are not counted. So an answer that was
    taken out (`answer` = -1) leaves numerator and denominator.

    Args:
      answer: Which answer a slot belongs to, int32[B, T]; -1 = none. Of the *whole* batch of an
        update: mode "group" looks beyond a row, and so does every denominator.
      num_answers: K, most answers of a row.
      mode: A word of the table.
      length: For "fixed": a constant, such as the longest answer that may be sampled.
      group: For "group": the group of each answer, int32[B, K]; -1 = none.
      num_groups: For "group": how many groups there are.

    Returns:
      `Reduction`. The weights belong into the rows; the denominator is what the step divides by.

    Raises:
      ValueError: if the mode is unknown, or an argument that it needs is missing.

    References: token: DAPO, arXiv:2503.14476, eq. 12 as its code has it (TRL "dapo" and "bnpo",
    verl "token-mean"); group: the same equation as printed, where the mean over tokens is within
    one prompt. sequence: GRPO, arXiv:2402.03300, eq. 3 (TRL "grpo", verl "seq-mean-token-mean").
    sequence_sum: RLOO (verl "seq-mean-token-sum", TRL "luspo"). fixed: Dr. GRPO, arXiv:2503.20783
    (TRL "dr_grpo", verl "seq-mean-token-sum-norm"). Deviation: TRL's "grpo", "luspo" and "dr_grpo"
    also count answers whose tokens are all masked, which shrinks the loss.
    """
    modes = ("token", "sequence", "sequence_sum", "fixed", "group")
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}; received {mode!r}")
    if mode == "fixed" and (length is None or length <= 0):
        raise ValueError(f'mode "fixed" needs a length, at least 1 token; received {length}')
    if mode == "group" and (group is None or num_groups is None):
        raise ValueError('mode "group" needs the group of each answer and num_groups')
    live = answer >= 0
    tokens = masked.count_by(answer, num_answers)
    ones = live.astype(jnp.float32)
    answers = jnp.sum(tokens > 0).astype(jnp.float32)
    if mode == "token":
        return Reduction(ones, jnp.sum(tokens).astype(jnp.float32))
    if mode == "sequence":
        return Reduction(masked.safe_divide(ones, masked.spread(tokens, answer)), answers)
    if mode == "sequence_sum":
        return Reduction(ones, answers)
    if mode == "fixed":
        return Reduction(ones / length, answers)
    if group.shape != tokens.shape:
        raise ValueError(
            f"group must give one of each answer, {tokens.shape}; received {group.shape}"
        )
    size = masked.total_by(tokens.ravel(), group.ravel(), num_groups)
    of_answer = masked.spread(size, group.ravel()).reshape(group.shape)
    weight = masked.safe_divide(ones, masked.spread(of_answer, answer))
    return Reduction(weight, jnp.sum(size > 0).astype(jnp.float32))


def report(
    logps: Float[Array, "..."],
    old_logps: Float[Array, "..."],
    advantages: Float[Array, "..."],
    *,
    mask: Bool[Array, "..."],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    sampler_logps: Float[Array, "..."] | None = None,
) -> dict[str, Any]:
    """What to watch while a policy is trained, as accumulators of `core.metrics`.

    For `clipped_sequence`, give `sequence_log_ratio(...)` as logps and zeros as old_logps.

    Args:
      logps, old_logps, advantages: As `clipped`, float[...].
      mask: True where a token counts, same shape.
      clip_low, clip_high, dual: Those of the loss.
      sampler_logps: As the sampler drew the tokens, same shape, or None.

    Returns:
      Means over tokens: "ratio"; "clipped_low", "clipped_high" and "clipped_dual", the shares whose
      gradient the clip has taken away; "policy_kl", the divergence KL(old || policy) so far, by k3;
      with sampler_logps "sampler_gap", |old_logps - sampler_logps|. Largest: "ratio_max",
      "sampler_gap_max".

    Raises:
      ValueError: if shapes differ.

    References: names and conditions as TRL's clip_ratio/low_mean and high_mean, and
    sampling_logp_difference; policy_kl: Schulman, 2020, on samples of the old policy.
    """
    logps, old_logps, advantages = jax.lax.stop_gradient(
        _visible("report", mask, logps=logps, old_logps=old_logps, advantages=advantages)
    )
    ratio = _ratio(logps - old_logps)
    bad = advantages < 0
    share = lambda condition: m.Mean.of(condition.astype(jnp.float32), mask)
    largest = lambda x: m.Max(jnp.max(jnp.where(mask, x, -jnp.inf)))
    out = {
        "ratio": m.Mean.of(ratio, mask),
        "ratio_max": largest(ratio),
        "clipped_low": share((ratio < 1 - clip_low) & bad),
        "clipped_high": share((ratio > 1 + clip_high) & (advantages > 0)),
        "policy_kl": m.Mean.of(kl(old_logps, logps), mask),
    }
    if dual is not None:
        out["clipped_dual"] = share((ratio > dual) & bad)
    if sampler_logps is not None:
        (drawn,) = _visible("report", mask, sampler_logps=sampler_logps)
        gap = jnp.abs(old_logps - drawn)
        out |= {"sampler_gap": m.Mean.of(gap, mask), "sampler_gap_max": largest(gap)}
    return out
