"""Log-probabilities of tokens, and cross-entropy, without ever holding [B, T, V] logits.

States go in at the positions that are scored only, and meet the head matrix one slice of the
vocabulary at a time. Log-probability and entropy come out of one pass; the backward pass, written
by hand, makes the logits of each slice once more.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array

# Logits held at a time: positions x vocabulary entries (64 MiB in float32).
LOGITS = 1 << 24


# float32 operands are multiplied in float32 on GPU and TPU too; bfloat16 ones as ever.
_matmul = functools.partial(
    jnp.matmul, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
)


class Scored(NamedTuple):
    """Which states predict which tokens.

    Attributes:
      source: Slot of the state that predicts the token, int32[B, S].
      slot: Slot of the token itself, int32[B, S].
      target: The token, int32[B, S].
      mask: False where a row has fewer scored tokens, bool[B, S].
    """

    source: Int[Array, "B S"]
    slot: Int[Array, "B S"]
    target: Int[Array, "B S"]
    mask: Bool[Array, "B S"]


def scored(
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    trunk: Int[Array, "B T"],
    *,
    size: int | None = None,
    predict_offset: int = 1,
) -> Scored:
    """The supervised tokens of packed rows, moved together.

    A token is predicted by the one before it in its segment; the first token of an answer by the
    last token of its trunk, the prompt that it shares. A supervised token that nothing precedes
    is left out.

    Args:
      tokens, loss_mask, segments, trunk: As in `Rows`.
      size: Most supervised tokens of a row, S; further ones are left out, so take it from the
        data. None takes T.
      predict_offset: 1 for next-token models, 0 where the state of a slot predicts its own token.
    """
    B, T = tokens.shape
    slots = jnp.arange(T, dtype=jnp.int32)
    if predict_offset:
        # The last slot of every segment of the row; -1 for a segment that is not there.
        last = jax.vmap(
            lambda s: jnp.full(T + 1, -1, jnp.int32).at[s].max(jnp.where(s > 0, slots, -1))
        )(segments)
        before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :T]
        from_trunk = jnp.where(trunk > 0, jnp.take_along_axis(last, trunk, axis=1), -1)
        source = jnp.where(before == segments, slots - 1, from_trunk)
    else:
        source = jnp.broadcast_to(slots, (B, T))
    live = loss_mask & (segments > 0) & (source >= 0)
    slot = jnp.argsort(~live, axis=1, stable=True)[:, : T if size is None else size]
    slot = slot.astype(jnp.int32)
    at = lambda x: jnp.take_along_axis(x, slot, axis=1)
    mask = at(live)
    return Scored(jnp.where(mask, at(source), 0), slot, jnp.where(mask, at(tokens), 0), mask)


def _slices(head, positions, chunk):
    """The head matrix as [n, D, V / n] slices, and the number of columns that were added.

    Slice c holds columns c, c + n, ...: a vocabulary that is split over devices stays split, and
    every device holds its share of each slice.
    """
    V = head.shape[1]
    chunk = chunk or max(1024, LOGITS // max(positions, 1))
    least = math.ceil(V / min(chunk, V))
    # A number of slices that divides the vocabulary needs no padding; take one nearby.
    n = next((n for n in range(least, 2 * least) if V % n == 0), least)
    extra = -V % n
    head = jnp.pad(head, ((0, 0), (0, extra)))
    return jnp.moveaxis(head.reshape(head.shape[0], -1, n), 2, 0), extra


def _logits(x, w, c, n, extra, V, softcap):
    """Logits of slice c, float32[M, V / n], their bend in (-1, 1), and their vocabulary entries."""
    entry = jnp.arange(w.shape[1], dtype=jnp.int32) * n + c
    z = _matmul(x, w.astype(x.dtype))
    bend = jnp.tanh(z / softcap) if softcap else None
    z = softcap * bend if softcap else z
    return (jnp.where(entry < V, z, -jnp.inf) if extra else z), bend, entry


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logps(x, head, targets, scale, chunk, softcap):
    return _fwd(x, head, targets, scale, chunk, softcap)[0]


def _fwd(x, head, targets, scale, chunk, softcap):
    slices, extra = _slices(head, x.shape[0], chunk)
    n, V = len(slices), head.shape[1]

    def one(carry, xs):
        top, norm, weighted, target = carry
        w, c = xs
        z, _, entry = _logits(x, w, c, n, extra, V, softcap)
        z = z * scale
        highest = jnp.maximum(top, jnp.max(z, axis=1))
        weights = jnp.exp(z - highest[:, None])
        shrink = jnp.exp(top - highest)
        finite = jnp.where(jnp.isneginf(z), 0.0, z) if extra else z
        norm = shrink * norm + jnp.sum(weights, axis=1)
        weighted = shrink * weighted + jnp.sum(weights * finite, axis=1)
        target = target + jnp.sum(jnp.where(entry == targets[:, None], z, 0.0), axis=1)
        return (highest, norm, weighted, target), None

    zeros = jnp.zeros(x.shape[0], jnp.float32)
    start = (zeros - jnp.inf, zeros, zeros, zeros)
    (top, norm, weighted, target), _ = jax.lax.scan(one, start, (slices, jnp.arange(n)))
    lse = top + jnp.log(norm)
    entropy = lse - weighted / norm
    return (target - lse, entropy), (x, head, targets, lse, entropy)


def _bwd(scale, chunk, softcap, kept, cotangents):
    x, head, targets, lse, entropy = kept
    d_logp, d_entropy = cotangents
    slices, extra = _slices(head, x.shape[0], chunk)
    n, V = len(slices), head.shape[1]

    def one(dx, xs):
        w, c = xs
        z, bend, entry = _logits(x, w, c, n, extra, V, softcap)
        logp = z * scale - lse[:, None]
        p = jnp.exp(logp)
        surprise = jnp.where(jnp.isneginf(logp), 0.0, logp) if extra else logp
        dz = jnp.where(entry == targets[:, None], d_logp[:, None], 0.0) - p * (
            d_logp[:, None] + d_entropy[:, None] * (surprise + entropy[:, None])
        )
        if softcap:
            dz = dz * (1 - bend * bend)
        dz = (dz * scale).astype(x.dtype)
        dx = dx + _matmul(dz, w.astype(x.dtype).T)
        # Complete for these columns: the head's gradient is reduced over devices once.
        dw = _matmul(x.T, dz)
        return dx, dw.astype(head.dtype)

    dx, dws = jax.lax.scan(one, jnp.zeros(x.shape, jnp.float32), (slices, jnp.arange(n)))
    d_head = jnp.moveaxis(dws, 0, 2).reshape(head.shape[0], -1)[:, :V]
    return dx.astype(x.dtype), d_head, None


_token_logps.defvjp(_fwd, _bwd)


def token_logps(
    states: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Log-probability of each target, and entropy of its distribution.

    .. math:: z = W^\\top x / \\tau, \\quad \\log p_y = z_y - \\log\\sum_v e^{z_v}, \\quad
              H = \\log\\sum_v e^{z_v} - \\sum_v p_v z_v

    Products run in the dtype of the states with float32 results; everything after them is
    float32. Both outputs may be differentiated, with respect to states and head. Memory is one
    slice of logits, forward and backward; the backward pass makes the logits a second time.

    The vocabulary is cut rather than the positions: so each slice of the head's gradient is
    finished when it is made, and its sum over devices is taken once and not once a cut.

    Args:
      states: Hidden states at the scored positions; see `scored`.
      head: From states to logits (`head_matrix` of the model). May be split over its columns.
      targets: Token ids.
      temperature: Divides the logits; use the sampler's.
      softcap: Of the model's config (`logit_softcap`): c of c * tanh(z / c), before the
        temperature; 0 = none.
      chunk: Vocabulary entries at a time; None sizes slices so that at most about `LOGITS` logits
        exist at once (never fewer than 1024 entries).

    Returns:
      (logps float32[B, S], entropy float32[B, S] in nats).

    Raises:
      ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; received {temperature}")
    flat = states.reshape(-1, states.shape[-1])
    flat_targets = targets.reshape(-1)
    logps, entropy = _token_logps(flat, head, flat_targets, 1 / temperature, chunk, softcap)
    return logps.reshape(targets.shape), entropy.reshape(targets.shape)


def cross_entropy(
    states: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    at: Scored,
    *,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "B S"]:
    """Negative log-likelihood of the scored tokens, float32[B, S]; 0 where the mask is False.

    .. math:: -\\log p(y_t \\mid y_{<t})

    Args:
      states: Hidden states of all slots.
      head: From states to logits.
      at: From `scored`. Only its states reach the head.
      softcap, chunk: As `token_logps`.

    Returns:
      Loss per token, not reduced: the training step divides once, by an exact weight.
    """
    picked = jnp.take_along_axis(states, at.source[..., None], axis=1)
    logps, _ = token_logps(picked, head, at.target, softcap=softcap, chunk=chunk)
    return jnp.where(at.mask, -logps, 0.0)


def answer_logps(
    logps: Float[Array, "B S"],
    at: Scored,
    segments: Int[Array, "B T"],
    ends: Int[Array, "B K"],
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Log-probability of each answer's scored tokens together, and their number.

    .. math:: \\ell(y \\mid x) = \\sum_{t \\in y} \\log p(y_t \\mid x, y_{<t})

    The prompt's tokens, and those of other answers in the row, are in no answer's sum. A token of
    an answer is one whose slot lies in the segment of the answer's last slot.

    Args:
      logps: Of the scored tokens, as `token_logps` gives them at `at`. What lies under the mask is
        not looked at, and gets no gradient.
      at: From `scored`, of the same rows.
      segments: As in `Rows`.
      ends: Slot of the last token of each answer, as in `PairRows`; -1 = no such answer.

    Returns:
      (sums float32[B, K], counts float32[B, K]); both 0 where there is no answer, and where none
      of an answer's tokens is scored.
    """
    of = lambda slots: jnp.take_along_axis(segments, jnp.maximum(slots, 0), axis=1)
    # -1 is the segment of no slot.
    segment = jnp.where(ends >= 0, of(ends), -1)
    own = (of(at.slot)[:, None] == segment[:, :, None]) & at.mask[:, None]
    sums = jnp.sum(jnp.where(own, logps[:, None].astype(jnp.float32), 0.0), axis=2)
    return sums, jnp.sum(own, axis=2, dtype=jnp.float32)
