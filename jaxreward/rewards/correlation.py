"""Rewards of denoising steps: whether the tokens of an answer go together (MRO, arXiv:2510.21473).

A denoiser predicts the tokens of a step independently of each other. MRO rewards what it then gets

    within a step      token verification (`sampling.drafts.verification`) and `fluency`, of the
                       draft that a step predicted; their sum is `intra` here
    between steps      the quality of the final answer (`rewards.reasoning`, `rewards.puzzles`)

and `step_rewards` puts them together, one number for each group of steps ("SGRO").

What is the paper's and what is ours. The three rewards, their plain sum with the quality at the
last step, groups of w steps, and C = F = 100 are the paper's. The formula of `fluency` is inferred
from the roles of C and F. Shaping is the paper's idea; its potential Phi is not defined there and
its lambda not given: here Phi is the quality of the draft, if it is measured, and lambda is 1.

Arrays are NumPy's or JAX's; results are float32, of the library of what came in.
"""

import math

from jaxreward.rewards.length import in_float32


def fluency(nll, *, cap=100.0, scale=100.0):
    """How fluent a draft is to a causal language model, from its perplexity.

    .. math:: R_{ppl} = \\frac{C - \\min(\\mathrm{PPL}, C)}{F}, \\quad \\mathrm{PPL} = e^{nll}

    Measure it on text: a mask token, or the end tokens that fill a canvas, are none. A model finds
    repetition fluent, so look at the share of distinct n-grams beside it.

    Args:
      nll: Mean negative log-likelihood a token, float[...]; any size, infinite ones too.
      cap: C, the perplexity from which on the reward is 0. scale: F.

    Returns:
      float32[...], from 0 to C / F.

    Raises:
      ValueError: unless cap and scale are positive.

    References: MRO, arXiv:2510.21473: C = F = 100, stable for C of 80 to 130. The form is inferred.
    """
    if not (cap > 0 and scale > 0):
        raise ValueError(f"fluency needs cap > 0 and scale > 0; received {cap} and {scale}")
    xp, (nll,) = in_float32(nll)
    # Cut before exp, above the logarithm of the cap: then nothing overflows, and C stays exact.
    perplexity = xp.exp(xp.minimum(nll, math.log(cap) + 1.0))
    return (cap - xp.minimum(perplexity, cap)) / scale


def step_rewards(intra, quality, *, every=1, shaping=False):
    """What each group of denoising steps is rewarded with.

    .. math:: R_g = \\sum_{m \\in g} intra_m + \\begin{cases}
              [g \\text{ is last}] \\, q_{end} & \\text{without shaping} \\\\
              q_{end(g)} - q_{end(g - 1)} & \\text{with it, } q_{end(-1)} = 0 \\end{cases}

    Over all groups either adds up to the same: shaping tells a group at once what it did to the
    quality, instead of telling all of them at the end.

    Args:
      intra: Verification plus fluency of N answers at M measured steps in their order, float[M, N].
      quality: Of the final answers, float[N], or of the draft at each measured step, float[M, N];
        of these, only the ends of groups are looked at.
      every: Measured steps of a group. 1 where a group is measured at its last step alone; w, the
        steps of a group, where every step is measured and added up.
      shaping: As above; needs quality [M, N].

    Returns:
      float32[G, N], G = M / every.

    Raises:
      ValueError: if shapes do not fit, `every` does not divide M, or shaping lacks the drafts'
        quality.

    References: MRO, arXiv:2510.21473, SGRO. Its Algorithm 1 adds up the rewards of all steps of a
    group (`every` = w), which costs what groups are said to save; measuring at the end of a group
    (`every` = 1) is our reading. The difference of qualities is its text on RL; that a group begins
    where the one before it ended is inferred, Phi = q and lambda = 1 are ours.
    """
    xp, (intra, quality) = in_float32(intra, quality)
    if intra.ndim != 2 or quality.shape not in (intra.shape, intra.shape[1:]):
        raise ValueError(
            "step_rewards needs intra [M, N] and quality [N] or [M, N]; received "
            f"{intra.shape} and {quality.shape}"
        )
    if every < 1 or not len(intra) or len(intra) % every:
        raise ValueError(
            f"groups of {every} do not divide {len(intra)} measured steps; measure at the last "
            "step of each group with every=1, or at all of its steps with every = their number"
        )
    sums = xp.sum(intra.reshape(-1, every, intra.shape[1]), axis=1)
    if not shaping:
        final = quality if quality.ndim == 1 else quality[-1]
        return xp.concatenate([sums[:-1], sums[-1:] + final])
    if quality.ndim == 1:
        raise ValueError(
            "step_rewards with shaping needs the quality of every measured draft, "
            f"{intra.shape}; received that of final answers, {quality.shape}"
        )
    ends = quality[every - 1 :: every]
    return sums + ends - xp.concatenate([xp.zeros_like(ends[:1]), ends[:-1]])
