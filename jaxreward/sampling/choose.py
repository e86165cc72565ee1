"""How the next token is chosen: tiny frozen dataclasses, usable as static arguments of jit."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxreward.core.types import Array


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; ties go to the lowest id."""

    def __call__(self, logits: Float[Array, "B V"], keys) -> Int[Array, "B"]:
        """Token ids; the keys are not used."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def logits(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Greedy choice reports log-probabilities of the unscaled distribution."""
        return logits


def _first_above(weights, cumulative, target):
    """Index of the first positive weight whose cumulative sum exceeds `target`, else of the last.

    Parallel sums are not monotone: rounding may lift them at a weight of 0, which must not win.
    """
    possible = weights > 0
    hit = possible & (cumulative > target)
    last = weights.shape[0] - 1 - jnp.argmax(possible[::-1])
    return jnp.where(hit.any(), jnp.argmax(hit), last)


def _draw(probabilities, uniform, block: int = 256):
    """Index whose cumulative probability first exceeds `uniform`; one row.

    Exact inverse sampling in two levels: sums of blocks choose a block, the block's own sums choose
    the index. One uniform number a row replaces V Gumbel draws, which cost more than the head here.
    """
    V = probabilities.shape[0]
    blocks = jnp.pad(probabilities, (0, -V % block)).reshape(-1, block)
    sums = blocks.sum(axis=1)
    ends = jnp.cumsum(sums)
    # Scaled by the sum as added up here, so that rounding cannot point past the last block.
    target = uniform * ends[-1]
    b = _first_above(sums, ends, target)
    within = jnp.cumsum(blocks[b]) + jnp.where(b > 0, ends[b - 1], 0.0)
    return b * block + _first_above(blocks[b], within, target)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A sample from softmax(logits / temperature)."""

    temperature: float | int = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive; received {self.temperature}. Use Greedy for 0"
            )

    def __call__(self, logits: Float[Array, "B V"], keys) -> Int[Array, "B"]:
        """Token ids, one key a row: a row's sample does not depend on its neighbours."""
        uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        probabilities = jax.nn.softmax(self.logits(logits), axis=-1)
        return jax.vmap(_draw)(probabilities, uniform).astype(jnp.int32)

    def logits(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits of the distribution actually sampled from."""
        return logits / self.temperature


def make(temperature: float | int) -> Greedy | Temperature:
    """Greedy for 0, otherwise a temperature."""
    return Greedy() if temperature == 0 else Temperature(temperature)
