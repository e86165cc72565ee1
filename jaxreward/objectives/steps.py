"""Advantages of denoising steps: what each group of steps of a trajectory is weighed with.

Rewards of step groups come from `rewards.correlation.step_rewards`; the losses that these
advantages go into are those of `objectives.policy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxreward.core.types import Array
from jaxreward.objectives import advantage


def advantages(
    rewards: Float[Array, "G N"],
    group: Int[Array, "..."],
    *,
    num_groups: int,
    baseline: str = "none",
    scale: str = "none",
    total: bool = False,
) -> Float[Array, "G N"]:
    """What each group of denoising steps is weighed with in a policy gradient.

    .. math:: A_{g, n} = \\frac{R_{g, n} - b}{\\sigma}

    Args:
      rewards: Of G groups of steps of each of N answers, as from `correlation.step_rewards`.
      group: Which prompt an answer belongs to, int[N]; -1 = none.
      num_groups: How many prompts there are.
      baseline: b. "none": 0. "batch": the mean of everything. "group": the mean over the answers to
        the same prompt, of the same group of steps.
      scale: sigma. "none": 1. "batch": the standard deviation of everything that the baseline has
        left, as `advantage.whiten`. "std": that of the answers to the prompt in the same group of
        steps, as `advantage.group_relative`.
      total: Give each group of steps the sum over all of them instead: R_acc, the reward of the
        answer's whole trajectory.

    Returns:
      float32[G, N]; 0 where `group` is -1, which enters no statistic.

    Raises:
      ValueError: if shapes do not fit, a word is unknown, a scale has no baseline to be measured
        from ("std" needs "group"; equal rewards would be blown up), or a group number is too large.

    References: MRO, arXiv:2510.21473: REINFORCE without a baseline, `total` where steps are not
    grouped. Its camera-ready names none, and a baseline is ours: "batch" with "batch" is the
    normalisation of REINFORCE++ (arXiv:2501.03262), "group" with "batch" that of its variant with a
    baseline, "group" with "std" GRPO's (arXiv:2402.03300), all over groups of steps.
    """
    if rewards.ndim != 2 or rewards.shape[1:] != group.shape:
        raise ValueError(
            f"steps.advantages needs rewards [G, N] and group [N]; received {rewards.shape} and "
            f"{group.shape}"
        )
    known = ("none", "batch", "group"), ("none", "batch", "std")
    if baseline not in known[0] or scale not in known[1]:
        raise ValueError(
            f"baseline must be one of {known[0]} and scale one of {known[1]}; received "
            f"{baseline!r} and {scale!r}"
        )
    if (scale, baseline) == ("batch", "none") or (scale == "std" and baseline != "group"):
        raise ValueError(
            f"scale={scale!r} does not go with baseline={baseline!r}: equal rewards would be "
            'divided by 0. Use baseline="group" with "std", and either baseline with "batch"'
        )
    shape = rewards.shape
    present = group >= 0
    if total:
        rewards = jnp.sum(rewards.astype(jnp.float32), axis=0, keepdims=True)
    there = jnp.broadcast_to(present, rewards.shape)
    if baseline == "group":
        each = "std" if scale == "std" else "none"
        of = lambda row: advantage.group_relative(row, group, num_groups=num_groups, scale=each)
        rewards = jax.vmap(of)(rewards)
    elif baseline == "batch":
        one = jnp.where(there, 0, -1)
        rewards = advantage.group_relative(rewards, one, num_groups=1, scale="none")
    if scale == "batch":
        rewards = advantage.whiten(rewards, there)
    kept = jnp.where(there, rewards.astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(jnp.broadcast_to(kept, shape))


def imitation(
    outcome: Float[Array, " N"], *, groups: int, least: float | int = 0.0
) -> Float[Array, "G N"]:
    """Advantages with which `policy.reinforce` imitates: 1 for trajectories that are good enough.

    .. math:: A_{g,n} = [o_n > least]

    Args:
      outcome: How good each trajectory's answer is, float[N].
      groups: Step groups of a trajectory, G.
      least: What the outcome must exceed; below every outcome, all trajectories are imitated.

    Returns:
      float32[G, N].

    References: MRO, arXiv:2510.21473, rejection sampling: the loss is -1/L of the log-probability
    of what the steps committed, that is `policy.reinforce` with the reduction "fixed". That wrong
    answers are left out is ours.
    """
    good = jnp.asarray(outcome, jnp.float32) > least
    return jnp.broadcast_to(good.astype(jnp.float32), (groups, len(outcome)))
