"""Metric accumulators as pytrees: added up on the device over microbatches and steps, read once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from jaxreward.core.types import Array


@struct.dataclass
class Mean:
    """A weighted mean kept as its two sums, so that adding accumulators is exact."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(cls, values: Float[Array, "..."], weights: Float[Array, "..."]):
        """Sums of values * weights and of weights, float32. A weight of 0 hides even a NaN."""
        weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
        values = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
        return cls(jnp.sum(values * weights), jnp.sum(weights))

    def add(self, other):
        """The accumulator of both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def result(self) -> float:
        """The mean as a Python float; NaN when nothing was counted."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


@struct.dataclass
class Perplexity:
    """The exponential of a weighted mean of negative log-likelihoods, kept as the two sums."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(cls, values: Float[Array, "..."], weights: Float[Array, "..."]):
        """As `Mean.of`."""
        mean = Mean.of(values, weights)
        return cls(mean.total, mean.weight)

    def add(self, other):
        """The accumulator of both."""
        return Perplexity(self.total + other.total, self.weight + other.weight)

    def result(self) -> float:
        """exp(mean) as a Python float, inf above e^700; NaN when nothing was counted."""
        mean = Mean(self.total, self.weight).result()
        return math.exp(mean) if not mean > 700 else math.inf


@struct.dataclass
class Sum:
    """A plain sum, for counts."""

    value: Float[Array, ""]

    def add(self, other):
        """The accumulator of both."""
        return Sum(self.value + other.value)

    def result(self) -> float:
        """The sum as a Python float."""
        return float(self.value)


@struct.dataclass
class Max:
    """The largest value seen."""

    value: Float[Array, ""]

    def add(self, other):
        """The accumulator of both."""
        return Max(jnp.maximum(self.value, other.value))

    def result(self) -> float:
        """The maximum as a Python float."""
        return float(self.value)


@struct.dataclass
class Last:
    """The most recent value, for quantities such as the learning rate."""

    value: Float[Array, ""]

    def add(self, other):
        """The later of the two."""
        return other

    def result(self) -> float:
        """The value as a Python float."""
        return float(self.value)


def _is_metric(x):
    return isinstance(x, Mean | Perplexity | Sum | Max | Last)


def add(a, b):
    """Adds two equal trees of accumulators."""
    return jax.tree.map(lambda x, y: x.add(y), a, b, is_leaf=_is_metric)


def over_axis(stacked):
    """Accumulators stacked on a leading axis (the output of a scan), added up."""

    def one(m):
        if isinstance(m, Mean | Perplexity):
            return type(m)(jnp.sum(m.total, axis=0), jnp.sum(m.weight, axis=0))
        if isinstance(m, Sum):
            return Sum(jnp.sum(m.value, axis=0))
        if isinstance(m, Max):
            return Max(jnp.max(m.value, axis=0))
        return Last(m.value[-1])

    return jax.tree.map(one, stacked, is_leaf=_is_metric)


def over_mesh(tree, axis):
    """Accumulators of each part of a mapped mesh axis, added up; for use inside `shard_map`."""

    def one(m):
        if isinstance(m, Mean | Perplexity | Sum):
            return jax.lax.psum(m, axis)
        if isinstance(m, Max):
            return jax.lax.pmax(m, axis)
        last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
        return Last(jax.lax.psum(jnp.where(last, m.value, 0), axis))

    return jax.tree.map(one, tree, is_leaf=_is_metric)


def only_if(ok, tree):
    """The accumulators where `ok`, else empty ones. A `Last` has no empty form and stays."""

    def one(m):
        if isinstance(m, Mean | Perplexity | Sum):
            return jax.tree.map(lambda x: jnp.where(ok, x, 0), m)
        if isinstance(m, Max):
            return Max(jnp.where(ok, m.value, -jnp.inf))
        return m

    return jax.tree.map(one, tree, is_leaf=_is_metric)


def results(tree) -> dict[str, float]:
    """{name: float} of a dict of accumulators, with one transfer from the device."""
    host = jax.tree.map(np.asarray, jax.device_get(tree))
    return {name: metric.result() for name, metric in host.items()}
