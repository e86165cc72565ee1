"""Heads over hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxreward.core.types import Array
from jaxreward.parallel.specs import Param

PyTree = Any


def scalar_specs(width: int, *, scores: int = 1, scale: float | None = None) -> PyTree:
    """One bias-free linear map from a state to `scores` numbers, as `*ForSequenceClassification`.

    Args:
      width: Size of a state.
      scores: Numbers per answer; 1 for a scalar reward.
      scale: Standard deviation of the initial weights; default 1 / sqrt(width + 1), so that new
        scores are of order one.
    """
    scale = (width + 1) ** -0.5 if scale is None else scale
    return {"kernel": Param((width, scores), ("embed", "scores"), scale=scale)}


def scalar(params: PyTree, states: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Rewards of states, float32; the last axis is dropped when the head has one score.

    .. math:: r = h^\\top w

    The product is taken in float32 whatever the dtype of the states: rewards are compared to each
    other, and bfloat16 keeps only three digits of them.
    """
    kernel = params["kernel"].astype(jnp.float32)
    out = jnp.matmul(states.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return out[..., 0] if kernel.shape[-1] == 1 else out
