"""Masked statistics. Padding never leaks, and an empty mask gives 0, not NaN.

Everything is computed in float32. A NaN under the mask is discarded; a NaN outside it is let
through, since hiding a genuine NaN hides a bug.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from jaxreward.core.types import Array


def safe_divide(numerator: Shaped[Array, "..."], denominator: Shaped[Array, "..."]):
    """numerator / denominator in float32, and 0 where the denominator is 0.

    The denominator is replaced before dividing, so the untaken branch cannot poison gradients.
    """
    numerator, denominator = jnp.asarray(numerator), jnp.asarray(denominator)
    zero = denominator == 0
    quotient = numerator.astype(jnp.float32) / jnp.where(zero, 1, denominator).astype(jnp.float32)
    return jnp.where(zero, 0.0, quotient)


def total(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis=None):
    """Sum of x where mask is True, float32."""
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0), axis=axis)


def mean(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis=None):
    """Mean of x where mask is True, float32; 0 where nothing is."""
    count = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=axis, dtype=jnp.float32)
    return safe_divide(total(x, mask, axis=axis), count)


def std(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis=None, ddof=0):
    """Standard deviation of x where mask is True, float32; 0 where nothing is.

    The gradient at zero spread is 0 (the square root is taken of a safe value).
    """
    # Hidden values leave before the square: 0 times its slope at a NaN would be a NaN gradient.
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    centre = mean(x, mask, axis=axis)
    if axis is not None:
        centre = jnp.expand_dims(centre, axis)
    squares = total(jnp.square(x - centre), mask, axis=axis)
    count = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=axis, dtype=jnp.float32)
    variance = safe_divide(squares, jnp.maximum(count - ddof, 0))
    flat = variance == 0  # not "variance > 0", which would turn a NaN into 0
    return jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, variance)))


def pick(x: Float[Array, "B T *rest"], index: Int[Array, "B K"]):
    """x at the slots `index` of each row; 0 where the index is -1. Returns [B, K, *rest]."""
    index_ = jnp.maximum(index, 0)
    picked = jax.vmap(lambda row, i: row[i])(x, index_)
    keep = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.where(keep, picked, 0)
