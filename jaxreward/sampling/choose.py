"""How the next token is chosen: tiny frozen dataclasses, usable as static arguments of jit.

Each has two methods. `logits` turns a model's logits into those of the distribution that is sampled
from, which log-probabilities are reported under; `pick` takes a token from them. Calling the object
does one after the other.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxreward.core.types import Array

# Tokens among which a nucleus is looked for first. Most are smaller; the rest are found by
# bisection, which took six times as long on two CPU cores. A sort took thirty times as long
# (benchmarks/draw.jsonl).
HEAD = 256


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; ties go to the lowest id."""

    def __call__(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """Token ids; the keys are not used."""
        return self.pick(logits, keys)

    def pick(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """The same: the distribution is not changed."""
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


def _drawn(logits, keys):
    """A sample from softmax(logits) a row, one key a row: it does not depend on its neighbours."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jax.vmap(_draw)(probabilities, uniform).astype(jnp.int32)


def _positive(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; received {temperature}. Use Greedy for 0")


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A sample from softmax(logits / temperature)."""

    temperature: float | int = 1.0

    def __post_init__(self):
        _positive(self.temperature)

    def __call__(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """Token ids, one key a row: a row's sample does not depend on its neighbours."""
        return self.pick(self.logits(logits), keys)

    def pick(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """A sample from softmax(logits), that is, from what `logits` returned."""
        return _drawn(logits, keys)

    def logits(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits of the distribution actually sampled from."""
        return logits / self.temperature


@dataclasses.dataclass(frozen=True)
class Filtered:
    """A sample from the likelier tokens alone, renormalised.

    Applied in this order, as transformers does, each to the distribution that the one before left:

    - temperature: softmax(logits / temperature).
    - top_k: a token stays if its logit is at least the k-th largest; 0 = all stay.
    - top_p: a token stays if those that are strictly likelier have a mass below top_p; 1 = all.
    - min_p: a token stays if its probability is at least min_p times the largest; 0 = all.

    Equal logits stay or go together, so nothing depends on an order of ids or of a sort. The first
    token always stays. What goes gets a logit of -inf.

    References: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751,
    section 3.1 (top-p; ours keeps all of several tokens that are equally the last of the nucleus);
    Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0

    def __post_init__(self):
        _positive(self.temperature)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(
                f"top_k must be a number of tokens, or 0 for all; received {self.top_k!r}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all); received {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 (all) to 1; received {self.min_p}")

    def __call__(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """Token ids, one key a row: a row's sample does not depend on its neighbours."""
        return self.pick(self.logits(logits), keys)

    def pick(self, logits: Float[Array, "B V"], keys) -> Int[Array, " B"]:
        """A sample from softmax(logits), that is, from what `logits` returned."""
        return _drawn(logits, keys)

    def logits(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits of the distribution actually sampled from: -inf where a token was left out."""
        logits = logits / self.temperature
        cut = lambda logits, least: jnp.where(logits >= least, logits, -jnp.inf)
        if 0 < self.top_k < logits.shape[-1]:
            logits = cut(logits, jax.lax.top_k(logits, self.top_k)[0][:, -1:])
        if self.top_p < 1:
            logits = cut(logits, _nucleus(logits, self.top_p))
        if self.min_p > 0:
            logits = cut(logits, logits.max(axis=-1, keepdims=True) + math.log(self.min_p))
        return logits


def _nucleus(logits, top_p):
    """The smallest logit [B, 1] above which the mass is less than `top_p`, without a sort.

    Which of the two ways finds it is decided row by row; the second runs when any row needs it.
    """
    V = logits.shape[-1]
    highest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    mass = top_p * weights.sum(axis=-1, keepdims=True)
    first = jax.lax.top_k(logits, min(HEAD, V))[0]
    full = jnp.cumsum(jnp.exp(first - highest), axis=-1) >= mass
    if V <= HEAD:
        full = full.at[:, -1].set(True)
    # The first place at which the nucleus is full is its last token.
    least = jnp.take_along_axis(first, jnp.argmax(full, axis=-1, keepdims=True), axis=-1)
    if V <= HEAD:
        return least
    found = full[:, -1:]
    among_all = lambda: _bisected(logits, weights, mass, highest)
    return jnp.where(found, least, jax.lax.cond(found.all(), lambda: least, among_all))


def _bisected(logits, weights, mass, highest):
    """The same among all tokens: the bits of a float32, read as an integer, are in its order."""

    def order(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    def value(place):
        bits = place ^ ((place >> 31) & 0x7FFFFFFF)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_, ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.where(logits > value(middle), weights, 0).sum(axis=-1, keepdims=True)
        return jnp.where(above < mass, low, middle), jnp.where(above < mass, middle, high)

    # Above -inf lies everything, above the highest nothing.
    ends = order(jnp.full_like(highest, -jnp.inf)), order(highest)
    return value(jax.lax.fori_loop(0, 32, halve, ends)[1])


def make(
    temperature: float | int, top_k: int = 0, top_p: float | int = 1.0, min_p: float | int = 0.0
) -> Greedy | Temperature | Filtered:
    """Greedy for a temperature of 0, which no filter changes; otherwise the least that is needed.

    Raises:
      ValueError: naming the number that does not fit.
    """
    filtered = Filtered(temperature or 1.0, top_k, top_p, min_p)
    if temperature == 0:
        return Greedy()
    if filtered == Filtered(temperature):
        return Temperature(temperature)
    return filtered
