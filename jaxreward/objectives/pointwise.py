"""Losses on single answers: what a head says of each against what is known of it.

A recipe takes a function for one of these by the names of its first two parameters, `outputs` and
`targets`. Both end in an axis of outputs; where a target is not known the recipe puts 0 there and
leaves the entry out. Everything is float32 and unreduced.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxreward.core.types import Array


def regression(
    outputs: Float[Array, "... C"], targets: Float[Array, "... E"]
) -> Float[Array, "... C"]:
    """Squared error of each output.

    .. math:: (o_k - s_k)^2

    Args:
      outputs: Of the head, float[..., C].
      targets: Scores of the answer, one for each output.

    Returns:
      Loss per output, float32[..., C], not reduced. No factor 1/2.

    Raises:
      ValueError: if the shapes differ.

    References: ArmoRM, arXiv:2406.12845, its regression of several reward objectives, of which a
    row of the data may know only some.
    """
    _same("regression", outputs, targets)
    return jnp.square(outputs.astype(jnp.float32) - targets.astype(jnp.float32))


def logistic(
    outputs: Float[Array, "... C"], targets: Float[Array, "... E"]
) -> Float[Array, "... C"]:
    """Negative log-likelihood of independent yes-or-no labels.

    .. math:: -y_k \\log\\sigma(o_k) - (1 - y_k) \\log\\sigma(-o_k)

    Args:
      outputs: Logits of the head, float[..., C].
      targets: y in [0, 1], one for each output.

    Returns:
      Loss per output, float32[..., C], not reduced.

    Raises:
      ValueError: if the shapes differ.

    References: with one output, an outcome reward model: Cobbe et al., arXiv:2110.14168, train
    verifiers on whether a solution is right. Deviation: the cross-entropy of a logit at the last
    token alone.
    """
    _same("logistic", outputs, targets)
    o, y = outputs.astype(jnp.float32), targets.astype(jnp.float32)
    return y * jax.nn.softplus(-o) + (1 - y) * jax.nn.softplus(o)


def cross_entropy(
    outputs: Float[Array, "... C"], targets: Float[Array, "... E"]
) -> Float[Array, "... 1"]:
    """Negative log-likelihood of one class.

    .. math:: \\log \\sum_k e^{o_k} - o_c

    Args:
      outputs: Logits of the head, float[..., C].
      targets: Index c of the class, as a float, [..., 1].

    Returns:
      Loss per answer, float32[..., 1], not reduced. An index outside 0..C-1 gives NaN, so that it
      is seen; the reader of the data refuses one before.

    Raises:
      ValueError: if `targets` does not end in one index.
    """
    if targets.shape != (*outputs.shape[:-1], 1):
        raise ValueError(
            f"cross_entropy: targets must hold one class index, {(*outputs.shape[:-1], 1)} for "
            f"outputs of shape {outputs.shape}; received {targets.shape}"
        )
    o = outputs.astype(jnp.float32)
    index = jnp.arange(o.shape[-1], dtype=jnp.float32)
    hit = index == targets.astype(jnp.float32)
    picked = jnp.sum(jnp.where(hit, o, 0.0), axis=-1, keepdims=True)
    loss = jax.nn.logsumexp(o, axis=-1, keepdims=True) - picked
    return jnp.where(hit.any(axis=-1, keepdims=True), loss, jnp.nan)


def _same(name, outputs, targets):
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name}: outputs and targets must have one shape; received {outputs.shape} and "
            f"{targets.shape}"
        )
