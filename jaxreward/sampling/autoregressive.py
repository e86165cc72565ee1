"""Autoregressive sampling: prefill once per prompt, then decode in one jitted loop.

Prompts are padded on the left, and the G answers to a prompt read its keys and values in place.
Padding has segment 0 and is never attended to; positions count real tokens only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Float, Int

from jaxreward.core.types import Array, Rows
from jaxreward.models import decoder
from jaxreward.parallel.rules import Rules

PyTree = Any


@struct.dataclass
class Completion:
    """Sampled answers. G answers per prompt, in order, make B * G rows.

    Attributes:
      tokens: int32[B*G, max_new]; `fill` after the end.
      length: Tokens of each answer, its end token included, int32[B*G].
      finished: True if the answer reached an end token, bool[B*G].
      logps: Log-probabilities under the distribution actually sampled from, float32[B*G, max_new].
      full_logps: The same under softmax(logits), float32[B*G, max_new].
    """

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    finished: Bool[Array, "B"]
    logps: Float[Array, "B T"]
    full_logps: Float[Array, "B T"]


@functools.partial(
    jax.jit, static_argnames=("cfg", "max_new", "choose", "rules", "samples", "fill")
)
def sample(
    params: PyTree,
    cfg: decoder.Config,
    prompts: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: Array,
    *,
    max_new: int,
    choose: Callable,
    stop: Int[Array, "E"],
    rules: Rules | None = None,
    samples: int = 1,
    fill: int = 0,
) -> Completion:
    """Samples `samples` answers to every prompt.

    Args:
      params: Weights of `decoder.specs(cfg)`, with embedding and head.
      cfg: The model.
      prompts: Token ids, padded on the left.
      mask: True where a slot holds a token.
      keys: One typed PRNG key an answer, [B * samples]: an answer depends on its prompt and its
        key alone, not on the batch it is computed in.
      max_new: Most tokens of an answer.
      choose: `choose.Greedy()`, `choose.Temperature(t)`, or a hashable like them: called with
        logits and keys, and with a method `logits`.
      stop: Token ids that end an answer (all end-of-sequence ids of the model).
      rules: Mesh and layouts, or None.
      samples: Answers per prompt; the prompt is run once.
      fill: Token id written after the end.

    Returns:
      A Completion of B * samples rows. Decoding stops as soon as every row has ended.
    """
    B, T = prompts.shape
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0).astype(jnp.int32)
    segments = mask.astype(jnp.int32)
    rows = Rows(prompts, mask, mask, positions[..., None], segments, jnp.zeros_like(segments))
    hidden = decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, rows, rules=rules),
        positions=rows.positions,
        segments=segments,
        trunk=rows.trunk,
        rules=rules,
        cache=decoder.empty_cache(cfg, B, T),
    )
    G = samples
    spread = lambda x: jnp.repeat(x, G, axis=0)
    # The answers' own tokens; all G answers read the prompt's keys and values in place.
    cache = decoder.empty_cache(cfg, B * G, max_new, trunk=hidden.cache)
    head = decoder.head_matrix(params, cfg).astype(cfg.compute)
    last = spread(hidden.states[:, -1])
    start = spread(mask.sum(axis=1).astype(jnp.int32))
    out = Completion(
        tokens=jnp.full((B * G, max_new), fill, jnp.int32),
        length=jnp.zeros(B * G, jnp.int32),
        finished=jnp.zeros(B * G, bool),
        logps=jnp.zeros((B * G, max_new), jnp.float32),
        full_logps=jnp.zeros((B * G, max_new), jnp.float32),
    )
    ones = jnp.ones((B * G, 1), jnp.int32)

    def body(carry):
        i, last, cache, out = carry
        logits = decoder.logits(last, head, cfg)
        token = choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        at = lambda x: jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]
        scaled = choose.logits(logits)
        logp = at(scaled) - jax.nn.logsumexp(scaled, axis=-1)
        full = at(logits) - jax.nn.logsumexp(logits, axis=-1)
        live = ~out.finished
        write = lambda x, value, empty: x.at[:, i].set(jnp.where(live, value, empty))
        out = Completion(
            tokens=write(out.tokens, token, fill),
            length=out.length + live,
            finished=out.finished | (live & jnp.isin(token, stop)),
            logps=write(out.logps, logp, 0.0),
            full_logps=write(out.full_logps, full, 0.0),
        )
        rows = Rows(token[:, None], ones > 0, ones > 0, (start + i)[:, None, None], ones, ones * 0)
        # The state after the last token is never read, but a branch here would cost a copy.
        hidden = decoder.backbone(
            params,
            cfg,
            decoder.embed(params, cfg, rows, rules=rules),
            positions=rows.positions,
            segments=rows.segments,
            trunk=rows.trunk,
            rules=rules,
            cache=cache,
        )
        return i + 1, hidden.states[:, 0], hidden.cache, out

    def unfinished(carry):
        i, _, _, out = carry
        return (i < max_new) & ~jnp.all(out.finished)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), last, cache, out))[-1]
