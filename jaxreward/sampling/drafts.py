"""Whether the tokens of a draft go together, asked of the denoiser that wrote it.

    draft      [prompt | every position filled by the prediction of one step]
    copy       the draft with one predicted position masked again
    answer     how likely the model now finds the token that stood there

Tokens of one step are predicted independently of each other. Seen together, each should still be
likely given the others: that is what the draft's verification measures.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jaxreward.core import masked
from jaxreward.core.types import Array, Rows
from jaxreward.models import decoder
from jaxreward.parallel.rules import Rules

PyTree = Any
# Tokens of copies in one pass of the model, which bounds the memory that it takes.
PASS = 8192


@functools.partial(jax.jit, static_argnames=("cfg", "samples", "log", "rules"))
def verification(
    params: PyTree,
    cfg: decoder.Config,
    drafts: Int[Array, "M T"],
    segments: Int[Array, "M T"],
    candidates: Bool[Array, "M T"],
    keys: Array,
    *,
    samples: int = 1,
    log: bool = False,
    rules: Rules | None = None,
) -> Float[Array, " M"]:
    """Token verification: the mean probability of predicted tokens, each given all the others.

    .. math:: R_{tv} = \\frac{1}{N} \\sum_{n = 1}^{N}
              p_\\theta(\\hat x^{m_n} \\mid p, \\hat x \\text{ with position } m_n \\text{ masked})

    where m_1 to m_N are drawn without replacement from the positions that the step predicted. The
    mean over all of them is what any number of samples estimates.

    The distribution is the model's own, at temperature 1 and without guidance; the mask itself is
    no candidate, as in `denoise.sample`. No gradient flows through the result.

    Args:
      params: Weights of `decoder.specs(cfg)`, with embedding and head.
      cfg: The model, a denoiser.
      drafts: Token ids, such as a row of `Canvas.drafts`; those of several steps may be stacked.
      segments: 1 where a slot belongs to the text, 0 on padding.
      candidates: True at the positions that the step predicted, that is, where the model saw a
        mask: `trajectory.state_at(canvas, step, cfg.mask_id) == cfg.mask_id`. Padding does not
        count, nor, where the model predicts a token from the one before it, the first of a text.
      keys: One typed key a draft, [M].
      samples: N, copies of a draft that are run; all candidates of a draft that has fewer.
      log: The mean of log-probabilities instead.
      rules: Mesh and layouts, or None.

    Returns:
      float32[M], from 0 to 1 (with `log`, at most 0). A draft of which nothing was predicted gets 1
      (0), the value of one that agrees with itself.

    A draft's result depends on the draft, its candidates and its key alone: not on its neighbours,
    the padding before it, or the passes in which copies are run.

    Raises:
      ValueError: if the model is no denoiser, or samples is below 1.

    References: MRO, arXiv:2510.21473, token verification reward; one sample a draft, and copies
    run as a batch, are the paper's. That it is a probability, not its logarithm, is inferred: the
    sums that the paper reports are positive.
    """
    if cfg.mask == "causal" or cfg.mask_id < 0:
        raise ValueError(
            f"verification needs a denoiser with a mask token; this model has mask={cfg.mask!r} "
            f"and mask_id={cfg.mask_id}. See models.families.as_denoiser"
        )
    if samples < 1:
        raise ValueError(f"verification needs at least 1 sample a draft; received {samples}")
    T = drafts.shape[1]
    real = segments > 0
    live = candidates & real
    if cfg.predict_offset:
        live &= jnp.pad(real[:, :-1], ((0, 0), (1, 0)))
    slots, drawn = _drawn(keys, live, min(samples, T))
    places = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0).astype(jnp.int32)
    again = jnp.arange(T) == slots[..., None]
    copies = jnp.where(again, cfg.mask_id, drafts[:, None]).astype(jnp.int32)
    each = lambda x: jnp.repeat(x, slots.shape[1], axis=0)
    whole = (
        copies.reshape(-1, T),
        each(jnp.asarray(segments, jnp.int32)),
        each(places),
        slots.reshape(-1),
        jnp.take_along_axis(drafts, slots, axis=1).reshape(-1),
    )
    logps = _in_passes(functools.partial(_logps, params, cfg, rules), whole, T)
    logps = logps.reshape(slots.shape)
    values = masked.mean(logps if log else jnp.exp(logps), drawn, axis=1)
    return jax.lax.stop_gradient(jnp.where(drawn.any(axis=1), values, 0.0 if log else 1.0))


def _drawn(keys, live, count):
    """Slots of up to `count` live positions of each row, and whether there is one: both [M, N].

    The number of a position depends on its place among those that are live, which padding before it
    does not change.
    """
    place = jnp.cumsum(live, axis=1) - 1
    uniform = lambda key, i: jax.random.uniform(jax.random.fold_in(key, i))
    score = jax.vmap(jax.vmap(uniform, in_axes=(None, 0)))(keys, place)
    score, slots = jax.lax.top_k(jnp.where(live, score, -1.0), count)
    return slots, score >= 0


def _logps(params, cfg, rules, part):
    """Log-probability of a token at one slot of each row, float32[R]."""
    tokens, segments, places, slot, token = part
    real = segments > 0
    rows = Rows(tokens, real, real, places[..., None], segments, jnp.zeros_like(segments))
    states = decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, rows, rules=rules),
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
        rules=rules,
    ).states
    at = jnp.maximum(slot - cfg.predict_offset, 0)[:, None, None]
    state = jnp.take_along_axis(states, at, axis=1)[:, 0]
    head = decoder.head_matrix(params, cfg).astype(cfg.compute)
    logits = decoder.logits(state, head, cfg).at[:, cfg.mask_id].set(-jnp.inf)
    own = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def _in_passes(run, whole, width):
    """`run` on rows of `width` slots, about `PASS` tokens at a time."""
    rows, most = len(whole[0]), max(1, PASS // width)
    if rows <= most:
        return run(whole)
    size = -(-rows // -(-rows // most))
    # Whole eights divide over the devices of a mesh.
    size += -size % min(8, most)
    passes = -(-rows // size)
    pad = lambda x: jnp.pad(x, ((0, passes * size - rows), *((0, 0),) * (x.ndim - 1)))
    split = lambda x: pad(x).reshape(passes, size, *x.shape[1:])
    return jax.lax.map(run, jax.tree.map(split, whole)).reshape(-1)[:rows]
