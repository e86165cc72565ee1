"""Accumulators: adding parts gives the whole."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import metrics as m


def test_the_mean_of_unequal_parts_is_that_of_the_whole():
    """Catches a mean of means: batches of 1 and 3 values must not count alike."""
    a = m.Mean.of(jnp.array([1.0]), jnp.ones(1))
    b = m.Mean.of(jnp.array([2.0, 3.0, 6.0]), jnp.ones(3))
    assert a.add(b).result() == 3.0
    assert m.Mean.of(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0])).result() == 2.0


def test_weight_zero_hides_a_nan_and_another_weight_does_not():
    """Catches 0 * NaN, and a guard that hides a real NaN."""
    values = jnp.array([4.0, np.nan])
    assert m.Mean.of(values, jnp.array([2.0, 0.0])).result() == 4.0
    assert math.isnan(m.Mean.of(values, jnp.array([2.0, 1.0])).result())


def test_nothing_counted_is_nan():
    """Catches a loss of 0 reported for a batch without pairs."""
    assert math.isnan(m.Mean.of(jnp.ones(3), jnp.zeros(3)).result())


def test_weights_broadcast_and_booleans_count():
    """Catches a weight counted once for several values."""
    assert m.Mean.of(jnp.ones((2, 3)), jnp.array([[1.0], [0.0]])).weight == 3
    assert m.Mean.of(jnp.array([True, False]), jnp.array([True, True])).result() == 0.5


def test_low_precision_is_summed_in_float32():
    """Catches accumulation in bfloat16, which stops counting at 256."""
    mean = m.Mean.of(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, jnp.bfloat16))
    assert mean.total == 1000 and mean.total.dtype == jnp.float32


def test_max_and_last():
    """Catches the two mixed up, or their order."""
    assert m.Max(jnp.float32(2)).add(m.Max(jnp.float32(-1))).result() == 2
    assert m.Last(jnp.float32(2)).add(m.Last(jnp.float32(-1))).result() == -1
    assert math.isnan(m.Max(jnp.float32(2)).add(m.Max(jnp.float32(np.nan))).result())


def batch(i):
    values = jnp.asarray([1.0, 4.0, 2.0]) * i
    return {
        "mean": m.Mean.of(values, jnp.asarray([1.0, 0.0, 3.0])),
        "max": m.Max(values.max()),
        "last": m.Last(values[0]),
    }


def test_adding_one_by_one_and_stacked_in_a_scan_agree():
    """Catches a reduction over microbatches that differs from the one over steps.

    Values are i, 4i, 2i with weights 1, 0, 3 for i = 3, 1, 2: mean 7 * 6 / 12, maximum 12, last 2.
    """
    one_by_one = m.add(m.add(batch(3.0), batch(1.0)), batch(2.0))
    _, stacked = jax.jit(lambda xs: jax.lax.scan(lambda c, i: (c, batch(i)), 0, xs))(
        jnp.array([3.0, 1.0, 2.0])
    )
    for tree in (one_by_one, m.over_axis(stacked), jax.jit(m.over_axis)(stacked)):
        assert m.results(tree) == {"mean": pytest.approx(3.5), "max": 12.0, "last": 2.0}


def test_results_are_plain_floats():
    """Catches arrays that json cannot write."""
    got = m.results(batch(1.0))
    assert set(got) == {"mean", "max", "last"}
    assert all(type(value) is float for value in got.values())
    assert m.results({}) == {}


def test_a_perplexity_is_of_the_mean_and_not_the_mean_of_perplexities():
    """Catches exponentials that are averaged, on one device, over microbatches and over steps."""
    a = m.Perplexity.of(jnp.array([0.0]), jnp.ones(1))
    b = m.Perplexity.of(jnp.array([1.0, 2.0, np.nan]), jnp.array([1.0, 1.0, 0.0]))
    both = m.add({"x": a}, {"x": b})
    assert m.results(both)["x"] == pytest.approx(math.e)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), a, b)
    assert m.over_axis({"x": stacked})["x"].result() == pytest.approx(math.e)
    none = m.only_if(jnp.array(False), {"x": b})["x"]
    assert math.isnan(none.result()) and isinstance(none, m.Perplexity)
    assert m.Perplexity.of(jnp.array([1e4]), jnp.ones(1)).result() == math.inf
