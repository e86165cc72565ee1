"""The next token: exact probabilities, no impossible token, ties, and one key a row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreward.sampling import choose

draw = jax.jit(jax.vmap(choose._draw, in_axes=(None, 0)))
BELOW_ONE = np.float32(1 - 2.0**-24)
pick = jax.jit(lambda chooser, logits, keys: chooser(logits, keys), static_argnums=0)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


# Greedy


def test_greedy_takes_the_lowest_of_equal_ids():
    """Catches ties broken at random or by the last id: greedy answers must repeat exactly."""
    logits = jnp.array([[0.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-jnp.inf, -5, -5, -9]])
    token = choose.Greedy()(logits, keys(3))
    np.testing.assert_array_equal(token, [1, 0, 1])
    assert token.dtype == jnp.int32
    np.testing.assert_array_equal(choose.Greedy().logits(logits), logits)


def test_make_and_its_refusals():
    """Catches temperature 0 that divides by zero, and a negative one that prefers the worst."""
    assert choose.make(0) == choose.Greedy()
    assert choose.make(0.7) == choose.Temperature(0.7)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"must be positive; received .*Use Greedy for 0"):
            choose.Temperature(bad)


def test_temperature_divides_the_logits():
    """Catches a multiplication, by hand: softmax of [0, log 9] / 2 is [1, 3] / 4."""
    logits = jnp.log(jnp.array([[1.0, 9.0]]))
    got = jax.nn.softmax(choose.Temperature(2.0).logits(logits))
    np.testing.assert_allclose(got, [[0.25, 0.75]], rtol=1e-6)


# The draw itself: exact inverse sampling


@pytest.mark.parametrize("size", [3, 256, 257, 700, 1024])
def test_draw_is_exact_inverse_sampling(size):
    """Catches any bias, and any slip where one block of the two-level search meets the next.

    Probabilities are multiples of 2^-12, so every sum is exact, and so is the answer.
    """
    rng = np.random.default_rng(size)
    chance = rng.dirichlet(np.full(size, 0.5))
    counts = rng.multinomial(4096, chance)
    p = (counts / 4096).astype(np.float32)
    for shift in (0.0, 0.5, 1 - 2.0**-10):  # from the left edge to just below the right one
        u = ((np.arange(4096) + shift) / 4096).astype(np.float32)
        got = np.asarray(draw(p, u))
        np.testing.assert_array_equal(np.bincount(got, minlength=size), counts)
        np.testing.assert_array_equal(got, np.searchsorted(np.cumsum(counts), u * 4096, "right"))


@pytest.mark.parametrize(
    "possible",
    [[0], [699], [255, 256], [511, 512], [256], [3, 698], [254, 513]],
    ids=str,
)
def test_draw_at_the_ends_stays_possible(possible):
    """Catches a uniform of 0 or almost 1 that falls on padding or on a token of probability 0."""
    p = np.zeros(700, np.float32)
    p[possible] = 1 / len(possible)
    got = np.asarray(draw(p, np.array([0.0, 1e-38, BELOW_ONE], np.float32)))
    assert list(got) == [possible[0], possible[0], possible[-1]]


def test_draw_never_falls_into_a_rounding_gap():
    """Catches impossible tokens drawn because a parallel cumulative sum is not monotone.

    With this many blocks XLA adds up in a tree, and neighbouring sums differ although nothing
    lies between them. Uniforms sit on every such edge.
    """
    rng = np.random.default_rng(0)
    for _ in range(3):
        p = np.zeros((600, 256), np.float32)
        p[:, 7] = rng.exponential(size=600) * (rng.random(600) < 0.5)
        p /= p.sum()
        ends = np.asarray(jnp.cumsum(jnp.asarray(p).sum(axis=1)))
        u = np.concatenate([ends / ends[-1] * (1 - k * 2.0**-24) for k in range(3)])
        u = u[(u >= 0) & (u < 1)].astype(np.float32)
        got = np.asarray(draw(p.reshape(-1), u))
        assert (p.reshape(-1)[got] > 0).all()


# The distribution, keys included


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_small_vocabulary_follows_softmax(temperature):
    """Catches a wrong temperature, keys that are not independent, and a biased draw."""
    logits = np.array([0.3, -1.2, 2.0, 0.0, -np.inf, 1.1], np.float32)
    n = 20_000
    token = pick(choose.Temperature(temperature), np.tile(logits, (n, 1)), keys(n))
    p = np.exp(logits.astype(np.float64) / temperature)
    counts = np.bincount(token, minlength=6)
    assert counts[4] == 0
    live = p > 0
    assert stats.chisquare(counts[live], n * p[live] / p.sum()).pvalue > 1e-3


def test_large_vocabulary_follows_softmax():
    """Catches a bias between or inside the blocks of a vocabulary that fills 2.7 of them."""
    size, n, rounds = 700, 4000, 5
    logits = np.random.default_rng(1).normal(size=size).astype(np.float32)
    impossible = [0, 17, 255, 256, 511, 699]
    logits[impossible] = -np.inf
    tiled = np.tile(logits, (n, 1))
    counts = sum(
        np.bincount(pick(choose.Temperature(0.9), tiled, keys(n, seed)), minlength=size)
        for seed in range(rounds)
    )
    assert not counts[impossible].any()
    p = np.exp(logits.astype(np.float64) / 0.9)
    live = p > 0
    assert stats.chisquare(counts[live], n * rounds * p[live] / p.sum()).pvalue > 1e-3
    # Whole blocks, and the two sides of each edge, in fewer and therefore sharper classes.
    for edges in ([0, 256, 512, 700], [0, 250, 262, 506, 518, 700]):
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        seen = [counts[part].sum() for part in parts]
        want = [n * rounds * p[part].sum() / p.sum() for part in parts]
        assert stats.chisquare(seen, want).pvalue > 1e-3


def test_impossible_tokens_are_never_drawn():
    """Catches -inf logits that leak through rounding: here they surround every possible token."""
    logits = np.full(700, -np.inf, np.float32)
    possible = [1, 254, 257, 510, 513, 698]
    logits[possible] = [0.0, -3.0, 1.0, -6.0, 0.5, -9.0]
    token = pick(choose.Temperature(1.0), np.tile(logits, (4000, 1)), keys(4000, 3))
    assert set(np.unique(token)) <= set(possible)


def test_a_row_does_not_depend_on_its_neighbours():
    """Catches one key shared by the batch: an answer must repeat in any batch."""
    rng = np.random.default_rng(2)
    logits, key = rng.normal(size=(6, 300)).astype(np.float32), keys(6, 4)
    temperature = choose.Temperature(1.3)
    whole = np.asarray(pick(temperature, logits, key))
    order = np.array([4, 2, 0, 5, 1, 3])
    np.testing.assert_array_equal(pick(temperature, logits[order], key[order]), whole[order])
    np.testing.assert_array_equal(pick(temperature, logits[2:4], key[2:4]), whole[2:4])
    assert len(set(pick(temperature, np.tile(logits[:1], (6, 1)), key).tolist())) > 1
