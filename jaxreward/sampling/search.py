"""Search while denoising: several continuations of a canvas, of which the best is gone on with.

    canvas --every steps--> width continuations --reward--> the best --every steps--> ...

A greedy search: one canvas a prompt is kept. What is good is for the caller to say, after every
group of steps, from the canvas and from the draft that the group's last step predicted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array
from jaxreward.diffusion.trajectory import Canvas
from jaxreward.models import decoder
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import denoise, select

PyTree = Any


class Found(NamedTuple):
    """What a search has found.

    Attributes:
      canvas: The full canvas of each prompt, B rows.
      rewards: Of every continuation in each group of steps, float32[G, B, W].
      chosen: Which of them was gone on with, int[G, B].
    """

    canvas: Canvas
    rewards: Float[np.ndarray, "G B W"]
    chosen: Int[np.ndarray, "G B"]


def search(
    params: PyTree,
    cfg: decoder.Config,
    prompts: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    keys: Array,
    reward: Callable[[Canvas, int], Any],
    *,
    schedule: denoise.Schedule,
    every: int,
    width: int,
    rules: Rules | None = None,
) -> Found:
    """Fills a canvas behind every prompt, and after every group of steps keeps the best of several.

    All continuations of all prompts are one batch of B * width rows, and one program serves all
    groups. Between groups the rewards come to the host.

    Args:
      params, cfg, prompts, mask, rules: As `denoise.sample`.
      keys: One typed key a prompt, [B]. Continuation i of it samples with fold_in(key, i), so with
        a width of 1 the search is `denoise.sample` with the keys fold_in(key, 0).
      reward: (canvas of B * width rows, number of the group) -> a number a row, float[B * width],
        on host or device. The continuations of a prompt lie side by side. `canvas.drafts[group]` is
        what the last step of the group predicted, with no position left open; `group * every +
        every - 1` is that step.
      schedule: How the canvas is filled; without cache and threshold. A deterministic one gives
        equal continuations.
      every: Steps of a group, a divisor of the schedule's; takes the place of `schedule.every`.
      width: Continuations of each prompt.

    Returns:
      Found. Of equal rewards the first continuation wins. A prompt's results depend on the prompt
      and its key, and on whatever else the reward looks at.

    Raises:
      ValueError: if every or width is below 1, a reward is NaN or there is not one a row; for the
        schedule as `denoise.Schedule`, for the model as `denoise.begin`.

    References: MRO, arXiv:2510.21473, test-time scaling: 4 continuations of 32 steps, temperature
    0.25, half as many steps as positions. With ground truth in the reward and a width of 2 or 4 it
    makes the trajectories of the paper's rejection sampling. What a tie does is ours.
    """
    if every < 1 or width < 1:
        raise ValueError(
            f"a search needs every and width of at least 1; received every={every}, width={width}"
        )
    schedule = dataclasses.replace(schedule, every=every)
    B = len(prompts)
    of_prompt = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(of_prompt, in_axes=(0, None))(keys, jnp.arange(width)).reshape(-1)
    wide = lambda x: np.repeat(np.asarray(x), width, axis=0)
    canvas = denoise.begin(wide(prompts), wide(mask), schedule, cfg)
    rewards, chosen = [], []
    for group in range(schedule.steps // every):
        canvas = denoise.advance(params, cfg, canvas, keys, every, schedule=schedule, rules=rules)
        scores = np.asarray(reward(canvas, group), np.float32)
        if scores.shape != (B * width,):
            raise ValueError(
                f"the reward of group {group} must be a number for each of the {B} * {width} rows "
                f"of the canvas; received an array {scores.shape}"
            )
        scores = scores.reshape(B, width)
        best = select.best_of_n(scores)
        canvas = take(canvas, wide(np.arange(B) * width + best))
        rewards.append(scores)
        chosen.append(best)
    return Found(take(canvas, np.arange(B) * width), np.stack(rewards), np.stack(chosen))


@jax.jit
def take(canvas: Canvas, rows: Int[Array, " N"]) -> Canvas:
    """The canvas of some rows, in the order given; a row may come several times.

    Args:
      canvas: At any step, with or without drafts and states.
      rows: Indices of its rows.
    """
    of = lambda x: x[rows]
    by_step = lambda x: None if x is None else x[:, rows]
    return canvas.replace(
        tokens=of(canvas.tokens),
        segments=of(canvas.segments),
        given=of(canvas.given),
        reveal=of(canvas.reveal),
        logps=of(canvas.logps),
        full_logps=of(canvas.full_logps),
        drafts=by_step(canvas.drafts),
        states=by_step(canvas.states),
    )


def pseudo_labels(answers: list[list[str | None]]) -> list[str | None]:
    """What most continuations of a prompt answer, to stand in for a label that is not known.

    Args:
      answers: The final answers of the continuations of each prompt, in order; None where none
        could be read, which never votes. Compared as they are: bring them to one form before.

    Returns:
      An answer a prompt, the first seen of those with most votes; None if nobody votes.

    References: MRO, arXiv:2510.21473, test-time scaling without labels. The tie is ours.
    """
    labels = []
    for mine in answers:
        known = list(dict.fromkeys(a for a in mine if a is not None))
        votes = np.array([-1 if a is None else known.index(a) for a in mine], np.int64)
        winner, _ = select.majority_vote(votes, classes=len(known))
        labels.append(None if winner < 0 else known[winner])
    return labels
