"""Losses on pairs of answers. Arrays in, one float32 loss a pair out."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxreward.core.types import Array


def bradley_terry(
    chosen: Float[Array, "..."],
    rejected: Float[Array, "..."],
    *,
    margin: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Negative log-likelihood that `chosen` beats `rejected`, by at least `margin`.

    .. math:: -\\log\\sigma(r_c - r_r - m)

    Computed as softplus(m + r_r - r_c), which neither overflows nor loses digits for large gaps.

    Args:
      chosen: Rewards of the preferred answers, float[...].
      rejected: Rewards of the others, same shape.
      margin: Preference strength to demand, same shape; None means 0.

    Returns:
      Loss per pair, float32[...]. Not reduced: the training step divides once, by an exact weight.

    Raises:
      ValueError: if the shapes differ. (Broadcasting [B, 1] scores against [B] margins would
        compare every answer with every other.)

    References: Bradley and Terry, 1952; the margin as in Touvron et al., arXiv:2307.09288, eq. 2.
    """
    shapes = {"chosen": chosen.shape, "rejected": rejected.shape}
    if margin is not None:
        shapes["margin"] = margin.shape
    if len(set(shapes.values())) > 1:
        raise ValueError(f"bradley_terry needs equal shapes; received {shapes}")
    gap = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    if margin is not None:
        gap = gap - margin.astype(jnp.float32)
    return jax.nn.softplus(-gap)
