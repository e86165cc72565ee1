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
logits_of = jax.jit(lambda chooser, logits: chooser.logits(logits), static_argnums=0)
bisected = jax.jit(choose._bisected)


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
    assert choose.make(0.7, top_k=3) == choose.Filtered(0.7, 3)
    assert choose.make(0, 3, 0.5, 0.1) == choose.Greedy()
    for bad in (0.0, -1.0, float("nan")):
        for kind in (choose.Temperature, choose.Filtered):
            with pytest.raises(ValueError, match=r"must be positive; received .*Use Greedy for 0"):
                kind(bad)
    with pytest.raises(ValueError, match="temperature must be positive; received -1"):
        choose.make(-1.0)
    for bad, said in (
        (dict(top_k=-1), "top_k must be a number of tokens, or 0 for all; received -1"),
        (dict(top_k=True), "top_k must be a number of tokens, or 0 for all; received True"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1"),
        (dict(top_p=1.5), "top_p must be above 0 and at most 1"),
        (dict(min_p=-0.1), "min_p must be from 0"),
        (dict(min_p=float("nan")), "min_p must be from 0"),
    ):
        with pytest.raises(ValueError, match=said):
            choose.make(0, **bad)


def test_temperature_divides_the_logits():
    """Catches a multiplication, by hand: softmax of [0, log 9] / 2 is [1, 3] / 4."""
    logits = jnp.log(jnp.array([[1.0, 9.0]]))
    got = jax.nn.softmax(choose.Temperature(2.0).logits(logits))
    np.testing.assert_allclose(got, [[0.25, 0.75]], rtol=1e-6)


# Filters


def kept(*args, logits):
    """The ids that stay, for one row of logits given as masses."""
    out = logits_of(choose.Filtered(*args), jnp.log(jnp.array([logits])))[0]
    assert np.isfinite(out).any()
    return np.flatnonzero(np.isfinite(out)).tolist()


def test_filters_by_hand():
    """Catches a token too many or too few at the edge of each filter, and their order."""
    masses = [0.1, 0.4, 0.05, 0.25, 0.2]
    assert kept(1.0, 2, logits=masses) == [1, 3]
    assert kept(1.0, 9, logits=masses) == [0, 1, 2, 3, 4]
    assert kept(1.0, 0, 0.3, logits=masses) == [1]  # the first alone passes 0.3
    assert kept(1.0, 0, 0.6, logits=masses) == [1, 3]
    assert kept(1.0, 0, 0.66, logits=masses) == [1, 3, 4]  # 0.65 is less
    assert kept(1.0, 0, 1.0, 0.45, logits=masses) == [1, 3, 4]  # 0.45 * 0.4 = 0.18
    # Of the three that top_k leaves the first two have 0.65 / 0.85 = 0.76; of all they have 0.65.
    assert kept(1.0, 3, 0.7, logits=masses) == [1, 3]
    assert kept(1.0, 0, 0.7, logits=masses) == [1, 3, 4]
    # At temperature 2 the masses are as their roots: the first two have 0.54, not 0.65.
    assert kept(2.0, 0, 0.6, logits=masses) == [1, 3, 4]
    # A tiny top_p and a min_p of 1 still leave the likeliest.
    assert kept(1.0, 0, 1e-6, 1.0, logits=masses) == [1]


def test_equal_logits_stay_or_go_together():
    """Catches an answer that depends on how a sort happens to order ties."""
    masses = [0.15, 0.3, 0.15, 0.1, 0.3]
    assert kept(1.0, 1, logits=masses) == [1, 4]
    assert kept(1.0, 3, logits=masses) == [0, 1, 2, 4]
    assert kept(1.0, 0, 0.2, logits=masses) == [1, 4]
    assert kept(1.0, 0, 0.7, logits=masses) == [0, 1, 2, 4]
    many = np.zeros((1, 700), np.float32)  # more ties than are looked at first
    assert np.isfinite(logits_of(choose.Filtered(1.0, 1, 0.5, 0.9), many)).all()


def test_filtered_logits_keep_their_differences():
    """Catches masses that are lost or doubled: what stays is the tempered softmax, renormalised."""
    logits = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    out = np.asarray(logits_of(choose.Filtered(0.7, 40, 0.9, 0.02), logits), np.float64)
    stays = np.isfinite(out)
    assert (stays.sum(axis=1) > 3).all() and (stays.sum(axis=1) < 40).all()
    np.testing.assert_allclose(out[stays], logits[stays] / 0.7, rtol=1e-6)
    # Whatever goes is less likely than whatever stays.
    for row, keep in zip(logits, stays):
        assert row[~keep].max() < row[keep].min()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0], ids=["flat", "normal", "peaked"])
def test_both_ways_to_the_nucleus_agree(scale):
    """Catches a wrong bisection: over negative numbers, zeros, ties and tokens already left out."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(8, 900)) * scale).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, ::2] = -np.inf
    logits[3] += 50
    logits[4] -= 50
    logits[5, 100:] = 0.0
    logits[5, 200:300] = -0.0
    logits[6] = -1e30
    logits[6, 7] = 0.0
    highest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - highest)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        chooser = choose.Filtered(1.0, 0, top_p)
        got = np.isfinite(logits_of(chooser, logits))
        mass = top_p * weights.sum(axis=1, keepdims=True)
        np.testing.assert_array_equal(got, logits >= bisected(logits, weights, mass, highest))
        exact = weights.astype(np.float64)
        for row, w, keep in zip(logits, exact, got):
            # The definition, in float64; masses this close to top_p may fall either way.
            likelier = np.array([w[row > x].sum() for x in row]) / w.sum()
            clear = np.abs(likelier - top_p) > 1e-6
            np.testing.assert_array_equal(keep[clear], (likelier < top_p)[clear])


def test_a_filtered_row_does_not_depend_on_its_neighbours():
    """Catches a way to the nucleus that is chosen for the whole batch: beside a flat row, which
    needs the bisection, the peaked row must keep the same tokens, logits and sample."""
    rng = np.random.default_rng(4)
    peaked, flat = rng.normal(size=(2, 1, 700)).astype(np.float32)
    chooser = choose.Filtered(0.4, 0, 0.95)
    alone = logits_of(chooser, peaked * 2)
    assert 10 < np.isfinite(alone).sum() < 256 < np.isfinite(logits_of(chooser, flat / 9)).sum()
    both = np.concatenate([peaked * 2, flat / 9])
    np.testing.assert_array_equal(logits_of(chooser, both)[0], alone[0])
    key = keys(2)
    np.testing.assert_array_equal(
        pick(chooser, both, key)[0], pick(chooser, peaked * 2, key[:1])[0]
    )


@pytest.mark.parity
def test_filters_equal_transformers(require):
    """Catches another definition or order of the filters than transformers' warpers have."""
    require("torch")
    import torch
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(5)
    for scale in (0.1, 1.0, 4.0):
        logits = (scale * rng.normal(size=(16, 900))).astype(np.float32)
        for settings in (
            (1.0, 0, 0.9, 0.0),
            (0.7, 5, 1.0, 0.0),
            (1.0, 0, 1.0, 0.1),
            (1.3, 50, 0.8, 0.05),
            (2.0, 3, 0.5, 0.3),
        ):
            temperature, top_k, top_p, min_p = settings
            want = theirs.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
            if top_k:
                want = theirs.TopKLogitsWarper(top_k)(None, want)
            if top_p < 1:
                want = theirs.TopPLogitsWarper(top_p)(None, want)
            if min_p:
                want = theirs.MinPLogitsWarper(min_p)(None, want)
            got = logits_of(choose.Filtered(*settings), logits)
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


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


@pytest.mark.parametrize("settings", [(0.8, 3), (1.0, 0, 0.8), (1.5, 4, 0.9, 0.3)], ids=str)
def test_small_vocabulary_follows_the_filtered_softmax(settings):
    """Catches a sample that ignores a filter, or masses that are not renormalised."""
    logits = np.array([0.3, -1.2, 2.0, 0.0, -np.inf, 1.1], np.float32)
    n = 20_000
    chooser = choose.Filtered(*settings)
    counts = np.bincount(pick(chooser, np.tile(logits, (n, 1)), keys(n)), minlength=6)
    stays = np.isfinite(logits_of(chooser, logits[None])[0])
    assert 1 < stays.sum() < 5 and not counts[~stays].any()
    p = np.where(stays, np.exp(logits.astype(np.float64) / settings[0]), 0.0)
    assert stats.chisquare(counts[stays], n * p[stays] / p.sum()).pvalue > 1e-3


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
