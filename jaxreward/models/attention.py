"""Rotary positions, the visibility rule, and attention.

Visibility is decided by segments alone: a token sees the earlier tokens of its own segment, and
all tokens of its trunk (the prompt it shares with other answers). Equal text therefore gets equal
states whether it stands alone, is padded, packed beside others, or hangs from a shared prompt.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array

MASKS = ("causal", "full")
# Longer rows run in chunks of queries, so that scores of a whole row are never kept.
LONG, CHUNK = 512, 256


def rotary(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float):
    """Rotates the two halves of each head by position-dependent angles (RoPE, half-split form).

    Angles and the rotation are float32; the result has the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def visible(
    segments: Int[Array, "B T"],
    trunk: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    offset: Int[Array, ""] | int = 0,
    mask: str = "causal",
) -> Bool[Array, "B T S"]:
    """Which keys each query may see.

    Args:
      segments: Segment of each query, 0 = padding.
      trunk: Segment whose tokens a query may also see, 0 = none.
      key_segments: Segment of each key slot, 0 = empty.
      offset: Key slot of query 0 (0 without a cache).
      mask: "causal", or "full" for denoisers (every token of the segment is visible).

    Raises:
      ValueError: on an unknown mask.
    """
    if mask not in MASKS:
        raise ValueError(f"unknown attention mask {mask!r}; use one of {', '.join(MASKS)}")
    query, key = segments[:, :, None], key_segments[:, None, :]
    own = (query == key) & (query > 0)
    if mask == "full":
        return own
    shared = (trunk[:, :, None] == key) & (trunk[:, :, None] > 0)
    T, S = segments.shape[1], key_segments.shape[1]
    past = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + offset
    return (own | shared) & past[None]


def _part(q, k, v, see):
    """Unnormalised attention over one set of keys: largest score, sum of weights, weighted sum."""
    scores = jnp.einsum("bkxh,bksh->bkxs", q, k, preferred_element_type=jnp.float32)
    scores = scores * (1 / math.sqrt(q.shape[-1]))
    # A finite floor keeps queries that see nothing free of NaN, forward and backward.
    scores = jnp.where(see, scores, -1e30)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(see, jnp.exp(scores - top), 0.0)
    mixed = jnp.einsum("bkxs,bksh->bkxh", weights.astype(v.dtype), v)
    return top, jnp.sum(weights, axis=-1, keepdims=True), mixed.astype(jnp.float32)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    see: Bool[Array, "B T S"],
    *,
    trunk: tuple | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over the visible keys; a query that sees nothing gets 0.

    Query heads that share a key head are folded into its query rows, so keys and values are
    never repeated; keys and values come head by head, so that both products are plain batched
    matrix products. Scores and softmax are float32. Rows of more than `LONG` queries run in chunks,
    whose scores the backward pass computes again.

    Args:
      q, k, v, see: Queries, keys, values, and which key each query may see.
      trunk: Keys and values that G = B / P consecutive rows share, all visible where the mask is
        True: (k [P,K,S',H], v [P,K,S',H], mask [P,S']). They are read once per P, not per B, and
        merged with the rows' own part by their log-sum-exp.
    """
    B, T, N, H = q.shape
    if T > LONG and trunk is None:
        return _in_chunks(q, k, v, see)
    K = k.shape[1]
    G = N // K
    folded = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    top, norm, mixed = _part(folded, k, v, jnp.tile(see, (1, G, 1))[:, None])
    if trunk is not None:
        trunk_k, trunk_v, mask = trunk
        P = trunk_k.shape[0]
        shared = folded.reshape(P, B // P, K, G * T, H).swapaxes(1, 2).reshape(P, K, -1, H)
        parts = _part(shared, trunk_k, trunk_v, mask[:, None, None, :])
        back = lambda x: x.reshape(P, K, B // P, G * T, -1).swapaxes(1, 2).reshape(B, K, G * T, -1)
        top2, norm2, mixed2 = (back(x) for x in parts)
        highest = jnp.maximum(top, top2)
        a, b = jnp.exp(top - highest), jnp.exp(top2 - highest)
        norm, mixed = a * norm + b * norm2, a * mixed + b * mixed2
    mixed = (mixed / jnp.where(norm == 0, 1.0, norm)).astype(q.dtype)
    return mixed.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _in_chunks(q, k, v, see):
    """`attend` over chunks of queries; the backward pass computes each chunk's scores again."""
    T = q.shape[1]
    short = -T % CHUNK
    # Queries added at the end see nothing and are cut off again.
    q = jnp.pad(q, ((0, 0), (0, short), (0, 0), (0, 0)))
    see = jnp.pad(see, ((0, 0), (0, short), (0, 0)))
    cut = lambda x: x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)
    one = jax.checkpoint(lambda part: attend(part[0], k, v, part[1]))
    out = jax.lax.map(one, (cut(q), cut(see))).swapaxes(0, 1)
    return out.reshape(q.shape)[:, :T]
