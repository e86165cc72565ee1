"""What a denoiser did to a canvas, step by step, and how its earlier states are read again.

A canvas is a prompt and the positions of an answer, B rows side by side. Each step commits tokens
at some positions. Where a committed token stays, the step at which it came is all that is needed
to rebuild every state: O(T) numbers a row instead of O(S T). A sampler that takes tokens back
stores its states instead. Callers read both through `state_at`.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array


@struct.dataclass
class Canvas:
    """Rows on their way from masks to answers, and the record of how they came there.

    Attributes:
      tokens: Token ids, int32[B, T]; the mask id where nothing is committed yet.
      segments: 1 where a slot belongs to the text, 0 on padding, int32[B, T].
      given: Prompt and padding: what is never masked, bool[B, T].
      reveal: Step at which a token was committed, int32[B, T]; -1 where none was, or it was given.
      logps: Log-probability of a committed token under what it was drawn from, float32[B, T]; else
        0. full_logps: The same under the model's own distribution at temperature 1.
      step: Steps done, int32[].
      block, turn: The block that is worked on and the steps done in it, int32[] both.
      whole: Steps that ran the model over all slots, int32[]; the others ran it over a part.
      drafts: Row g is the canvas with every open position filled by the prediction of step
        (g + 1) * every - 1, before that step chose what to commit, int32[S / every, B, T]; or None.
      states: The canvas before each step, int32[S + 1, B, T], for a sampler that takes tokens back;
        None where `reveal` says it all.
    """

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    given: Bool[Array, "B T"]
    reveal: Int[Array, "B T"]
    logps: Float[Array, "B T"]
    full_logps: Float[Array, "B T"]
    step: Int[Array, ""]
    block: Int[Array, ""]
    turn: Int[Array, ""]
    whole: Int[Array, ""]
    drafts: Any = None
    states: Any = None

    @property
    def open(self) -> Bool[Array, "B T"]:
        """Positions that are still masked."""
        return ~self.given & (self.reveal < 0)


def state_at(canvas: Canvas, step: Any, mask_id: int) -> Int[Array, "B T"]:
    """The tokens that the model saw in a step.

    .. math:: r_s^i = y^i \\text{ if given or } reveal^i < s, \\text{ else } M

    Args:
      canvas: After sampling, or in the midst of it.
      step: 0 is all masks and the number of steps is the end; an int, or int32[B] for a step of
        each row's own.
      mask_id: Token of a masked position.
    """
    step = jnp.asarray(step, jnp.int32)
    if canvas.states is not None:
        if step.ndim:
            return canvas.states[step, jnp.arange(len(canvas.tokens))]
        return canvas.states[step]
    done = canvas.given | ((canvas.reveal >= 0) & (canvas.reveal < step[..., None]))
    return jnp.where(done, canvas.tokens, mask_id)


def committed(canvas: Canvas, first: Any, last: Any) -> Bool[Array, "B T"]:
    """Positions that steps first <= s < last committed: J of the MRO paper, section 3.

    Args:
      canvas: After sampling. Where states are stored, the positions whose token changed.
      first, last: int, or int32[B] for steps of each row's own.
    """
    first, last = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)
    if canvas.states is not None:
        rows = jnp.arange(len(canvas.tokens))
        at = lambda s: canvas.states[s, rows] if s.ndim else canvas.states[s]
        return ~canvas.given & (at(first) != at(last))
    return (canvas.reveal >= first[..., None]) & (canvas.reveal < last[..., None])


def group_ends(steps: int, every: int) -> Int[Array, " G"]:
    """The step after each group of `every` steps: every, 2 * every, …; the last may be shorter.

    Raises:
      ValueError: unless 1 <= every <= steps.
    """
    if not 1 <= every <= steps:
        raise ValueError(f"a group takes from 1 to all {steps} steps; received groups of {every}")
    return jnp.minimum(jnp.arange(every, steps + every, every, dtype=jnp.int32), steps)


def answer_length(
    canvas: Canvas, prompt: int, ends: Int[Array, " E"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Tokens of each answer up to its first end token, and whether there is one.

    Args:
      canvas: After sampling. prompt: Slots of the prompts.
      ends: Token ids that end an answer.

    Returns:
      (length, end token included, int32[B]; ended, bool[B]).
    """
    answer = canvas.tokens[:, prompt:]
    hit = (answer[..., None] == ends).any(axis=-1)
    ended = hit.any(axis=1)
    length = jnp.where(ended, jnp.argmax(hit, axis=1) + 1, answer.shape[1])
    return length.astype(jnp.int32), ended
