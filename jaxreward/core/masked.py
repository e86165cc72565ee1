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


def pick(x: Shaped[Array, "B T *rest"], index: Int[Array, "B K"]):
    """x at the slots `index` of each row; 0 where the index is -1. Returns [B, K, *rest]."""
    index_ = jnp.maximum(index, 0)
    picked = jax.vmap(lambda row, i: row[i])(x, index_)
    keep = (index >= 0).reshape(index.shape + (1,) * (x.ndim - 2))
    return jnp.where(keep, picked, 0)


def _members(ids, num: int):
    """True where entry n bears the id k, bool[..., N, num].

    Comparing, unlike scattering, adds up in one order on every device. Compiled for a TPU it is
    fused into the sum after it; a CPU holds [..., N, num] in float32 for the time of the sum.
    """
    if not isinstance(ids, jax.core.Tracer) and ids.size and int(ids.max()) >= num:
        raise ValueError(
            f"ids must lie below {num}, the number of them that was given; received {ids.max()}. "
            "-1 marks an entry that belongs to none"
        )
    return ids[..., None] == jnp.arange(num, dtype=jnp.int32)


def total_by(x: Shaped[Array, "*rest N"], ids: Int[Array, "*rest N"], num: int):
    """Sum of x over the entries of each id, along the last axis: float32[*rest, num].

    Args:
      x: Values; one whose id is -1 is not looked at.
      ids: Which of the `num` sums an entry belongs to, 0 to num - 1; -1 = none.
      num: A Python number: the shape of the result.

    Raises:
      ValueError: if an id is `num` or more (seen outside `jit` only).
    """
    return jnp.sum(jnp.where(_members(ids, num), x[..., None].astype(jnp.float32), 0.0), axis=-2)


def mean_by(x: Shaped[Array, "*rest N"], ids: Int[Array, "*rest N"], num: int):
    """Mean of x over the entries of each id, float32[*rest, num]; 0 where there are none."""
    return safe_divide(total_by(x, ids, num), count_by(ids, num))


def count_by(ids: Int[Array, "*rest N"], num: int):
    """How many entries bear each id, int32[*rest, num]."""
    return jnp.sum(_members(ids, num), axis=-2, dtype=jnp.int32)


def spread(values: Shaped[Array, "*rest K"], ids: Int[Array, "*rest N"]):
    """The value of each entry's id, float32[*rest, N]; 0 where the id is -1."""
    member = _members(ids, values.shape[-1])
    return jnp.sum(jnp.where(member, values[..., None, :].astype(jnp.float32), 0.0), axis=-1)


def deviations_by(x: Shaped[Array, "*rest N"], ids: Int[Array, "*rest N"], num: int, *, ddof=1):
    """How far each entry lies from the mean of its id, and the variance of each id.

    Entries are taken relative to the largest of their id before anything is added up. So equal
    values deviate by exactly 0, however large, and a large common offset costs no digits.

    Args:
      x, ids, num: As `total_by`.
      ddof: The variance divides by the number of entries less this.

    Returns:
      (deviations float32[*rest, N], 0 where the id is -1; variances float32[*rest, num], 0 where
      no degree of freedom is left).
    """
    member = _members(ids, num)
    x = jnp.where(ids >= 0, x.astype(jnp.float32), 0.0)
    top = jnp.max(jnp.where(member, x[..., None], -jnp.inf), axis=-2)
    x = jnp.where(ids >= 0, x - spread(top, ids), 0.0)
    x = x - spread(mean_by(x, ids, num), ids)
    squares = total_by(jnp.square(x), ids, num)
    return x, safe_divide(squares, jnp.maximum(count_by(ids, num) - ddof, 0))
