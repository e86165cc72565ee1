"""Masked diffusion without a model: rates, counts, choices, confidences, weights of context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreward.diffusion import process
from jaxreward.objectives import denoising

MASK = 99
B, T = 64, 200
# Two texts of 100 and 60 slots, then padding; the first 10 slots of each are a prompt.
SEGMENTS = np.tile(np.repeat([1, 2, 0], [100, 60, 40]), (B, 1)).astype(np.int32)
MASKABLE = (SEGMENTS > 0) & ~((np.arange(T) < 10) | ((np.arange(T) >= 100) & (np.arange(T) < 110)))
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T) % MASK

corrupt = jax.jit(process.corrupt, static_argnames=("eps", "stratified"))
times = jax.jit(process.times, static_argnames=("eps", "stratified"))
exactly = jax.jit(process.corrupt_exactly)
chosen = jax.jit(process.chosen)
weights = jax.jit(process.context_weights, static_argnums=2)


def keys(n=B, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.fixture(scope="module")
def drawn():
    return jax.tree.map(np.asarray, corrupt(keys(), TOKENS, MASKABLE, SEGMENTS, MASK))


# Times and masks


def test_only_maskable_slots_are_masked(drawn):
    """Catches a masked prompt or padding, a lost token, a rate by which nobody may divide."""
    assert not (drawn.masked & ~MASKABLE).any()
    np.testing.assert_array_equal(drawn.tokens, np.where(drawn.masked, MASK, TOKENS))
    assert drawn.tokens.dtype == np.int32 and drawn.rate.dtype == np.float32
    assert (drawn.rate[~MASKABLE] == 1).all()
    padding = corrupt(keys(), TOKENS, np.ones_like(MASKABLE), SEGMENTS, MASK)
    assert not np.asarray(padding.masked)[SEGMENTS == 0].any()


def test_each_text_has_one_time_of_its_own(drawn):
    """Catches a time a row, a time a slot, and times that are not uniform from eps to 1."""
    one, two = drawn.rate[:, 10:100], drawn.rate[:, 110:160]
    assert (one == one[:, :1]).all() and (two == two[:, :1]).all()
    assert abs(np.corrcoef(one[:, 0], two[:, 0])[0, 1]) < 0.4
    for rates in (one[:, 0], two[:, 0]):
        assert stats.kstest((rates - 1e-3) / (1 - 1e-3), "uniform").pvalue > 1e-3


def test_slots_are_masked_at_the_rate_of_their_text(drawn):
    """Catches masks at 1 - p, or drawn once a text; z-scores of counts are those of a binomial."""
    z = []
    for span in (slice(10, 100), slice(110, 160)):
        rate, n = drawn.rate[:, span.start], span.stop - span.start
        z.append((drawn.masked[:, span].sum(1) - n * rate) / np.sqrt(n * rate * (1 - rate)))
    z = np.concatenate(z)
    assert abs(z.mean()) < 0.3 and 0.7 < z.std() < 1.3


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(drawn):
    """Catches one stream of random numbers for the batch, or times that depend on the length."""
    rows = [3, 40, 7]
    some = corrupt(keys()[jnp.array(rows)], TOKENS[rows], MASKABLE[rows], SEGMENTS[rows], MASK)
    wide = corrupt(
        keys(), *(np.pad(x, ((0, 0), (0, 24))) for x in (TOKENS, MASKABLE, SEGMENTS)), MASK
    )
    for name in ("tokens", "masked", "rate"):
        want = getattr(drawn, name)
        np.testing.assert_array_equal(getattr(some, name), want[rows])
        np.testing.assert_array_equal(np.asarray(getattr(wide, name))[:, :T], want)
    assert len({tuple(row) for row in drawn.masked}) > B - 3


def test_jit_changes_nothing(drawn):
    """Catches a draw that depends on how it was compiled."""
    eager = process.corrupt(keys(), TOKENS, MASKABLE, SEGMENTS, MASK)
    np.testing.assert_array_equal(eager.tokens, drawn.tokens)
    np.testing.assert_allclose(eager.rate, drawn.rate, rtol=1e-6)


def test_given_rates_replace_the_draw():
    """Catches a rate that is ignored: 0 masks nothing, 1 everything, for SFT by d1's full mask."""
    rate = np.where(SEGMENTS == 1, 0.0, 1.0).astype(np.float32)
    out = corrupt(keys(), TOKENS, MASKABLE, SEGMENTS, MASK, rate=rate)
    np.testing.assert_array_equal(out.masked, MASKABLE & (SEGMENTS == 2))
    np.testing.assert_array_equal(out.rate, np.where(MASKABLE, rate, 1))


def test_eps_bounds_the_weight():
    """Catches 1 / p that explodes: no rate lies below eps, and at eps = 1 all is masked."""
    for eps in (0.2, 1.0):
        rate = np.asarray(times(keys(), SEGMENTS, eps=eps))
        assert rate.min() >= np.float32(eps) and rate.max() <= 1
    assert (rate == 1).all()


def test_stratified_times_are_even_over_the_texts_of_a_row():
    """Catches a place counted over numbers instead of texts, a time that is not uniform."""
    segments = np.tile(np.repeat([2, 3, 5, 9, 0], [3, 1, 4, 2, 2]), (B, 1)).astype(np.int32)
    p = np.asarray(times(keys(), segments, eps=1e-3, stratified=True))
    t = (p[:, [0, 3, 4, 8]] - 1e-3) / (1 - 1e-3)
    np.testing.assert_allclose(np.diff(t, axis=1) % 1, 0.25, atol=1e-5)
    assert (p[:, -2:] == 1).all() and (p[:, :3] == p[:, :1]).all()
    assert stats.kstest(t[:, 2], "uniform").pvalue > 1e-3
    alone = np.where(segments == 3, 3, 0)
    out = corrupt(keys(), segments, alone > 0, alone, MASK, stratified=True)
    assert stats.kstest((out.rate[:, 3] - 1e-3) / (1 - 1e-3), "uniform").pvalue > 1e-3
    # Drawn apart from the times: at slot 0 the time's own number would mask always.
    first = corrupt(keys(), segments, segments > 0, segments, MASK, stratified=True)
    assert 0.25 < np.asarray(first.masked)[:, 0].mean() < 0.75


def test_masks_and_losses_together_are_the_bound():
    """Catches a rate that is not the one masked with: the mean loss of 4 tokens at log 2 each."""
    shape = (4000, 4)
    ones = np.ones(shape, np.int32)
    out = corrupt(keys(len(ones), 5), ones, ones > 0, ones, MASK)
    loss = denoising.elbo(jnp.full(shape, -np.log(2)), out.masked, out.rate).sum(1)
    error = float(loss.std()) / np.sqrt(len(ones))
    assert abs(float(loss.mean()) - 4 * np.log(2)) < 4 * error


# Exact counts


def test_exactly_so_many_and_every_set_alike():
    """Catches a count that is missed, a slot that is preferred, a rate of the wrong share."""
    n = 6000
    maskable = np.tile([True, False, True, True, True], (n, 1))
    counts = np.arange(n, dtype=np.int32) % 7  # up to more than there are
    out = exactly(keys(n), np.zeros((n, 5), np.int32), maskable, MASK, counts)
    masked, rate = np.asarray(out.masked), np.asarray(out.rate)
    np.testing.assert_array_equal(masked.sum(1), np.minimum(counts, 4))
    assert not (masked & ~maskable).any()
    np.testing.assert_array_equal(np.asarray(out.tokens) == MASK, masked)
    np.testing.assert_allclose(rate[:, 0], np.minimum(counts, 4) / 4)
    assert (rate[:, 1] == 1).all()
    pairs = masked[counts == 2][:, [0, 2, 3, 4]] @ [1, 2, 4, 8]
    assert stats.chisquare(np.unique(pairs, return_counts=True)[1]).pvalue > 1e-3
    assert len(set(pairs)) == 6


@pytest.mark.parametrize(("count", "length"), [(4, 8), (2, 5), (8, 3)])
def test_stratified_counts_are_uniform_and_spread(count, length):
    """Catches halves rounded to even, a count of 0 or above L, copies that all get one count."""
    draw = jax.jit(jax.vmap(lambda key: process.stratified_counts(key, count, length)))
    got = np.asarray(draw(keys(4000, 2)))
    assert got.shape == (4000, count) and got.min() == 1 and got.max() == length
    for column in got.T:
        seen = np.bincount(column, minlength=length + 1)[1:]
        assert stats.chisquare(seen).pvalue > 1e-4
    apart = np.floor(np.arange(count) * length / count + 0.5) % length
    np.testing.assert_array_equal((got - got[:, :1]) % length, np.tile(apart, (4000, 1)))
    if count > length:  # as many copies as lengths, or more: none is left out
        assert all(len(set(row)) == length for row in got[:50])


def test_stratified_counts_of_several_texts():
    """Catches lengths that must be one static number; a text without slots has none to mask."""
    draw = jax.jit(lambda key, length: process.stratified_counts(key, 4, length))
    length = np.array([5, 0, 1, 300], np.int32)
    got = np.stack([draw(key, length) for key in keys(20)])
    assert (got[:, 1] == 0).all() and (got[:, 2] == 1).all()
    assert ((got >= 1) & (got <= length))[:, [0, 2, 3]].all()
    # A text of the same length as its neighbours gets what it gets among them.
    same = draw(keys()[0], np.full(4, 300, np.int32))
    assert same[3] == draw(keys()[0], length)[3]


# What a step reveals


def test_transfer_counts_by_hand():
    """Catches a remainder that is lost or given to the last steps."""
    got = process.transfer_counts(jnp.array([7, 8, 2, 0], jnp.int32), 4)
    np.testing.assert_array_equal(got, [[2, 2, 2, 1], [2, 2, 2, 2], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert got.dtype == jnp.int32
    n = np.arange(200, dtype=np.int32)
    counts = jax.jit(process.transfer_counts, static_argnums=1)
    for steps in (3, 64):
        np.testing.assert_array_equal(np.asarray(counts(n, steps)).sum(1), n)


def sorted_choice(confidence, allowed, count):
    out = np.zeros_like(allowed)
    for row, conf, free, k in zip(out, confidence, allowed, count):
        best = sorted(np.flatnonzero(free), key=lambda i: (-conf[i], i))
        row[best[: max(k, 0)]] = True
    return out


def test_chosen_is_a_stable_sort():
    """Catches a tie broken wrongly, a slot that is not allowed, one too many or too few."""
    rng = np.random.default_rng(0)
    few = rng.choice([-np.inf, -1.0, -0.0, 0.0, 0.5, 1e-45, 3e38, np.inf], size=(200, 12))
    conf = np.where(rng.uniform(size=(200, 1)) < 0.5, few, rng.normal(size=(200, 12)))
    conf = conf.astype(np.float32)
    allowed = rng.uniform(size=conf.shape) < rng.uniform(size=(200, 1))
    count = rng.integers(-1, 14, size=200).astype(np.int32)
    got = np.asarray(chosen(conf, allowed, count))
    np.testing.assert_array_equal(got, sorted_choice(conf, allowed, count))
    np.testing.assert_array_equal(got.sum(1), np.clip(count, 0, allowed.sum(1)))
    np.testing.assert_array_equal(process.chosen(conf, allowed, count), got)


def test_chosen_takes_nan_last():
    """Catches a NaN that wins, or that makes a step reveal fewer than it must."""
    conf = jnp.array([[np.nan, 0.1, -np.nan, 0.2]])
    for count, want in ((2, [0, 1, 0, 1]), (3, [1, 1, 0, 1]), (4, [1, 1, 1, 1])):
        got = chosen(conf, jnp.ones((1, 4), bool), jnp.array([count]))
        np.testing.assert_array_equal(got, np.array([want], bool))


@pytest.mark.parametrize("steps", [1, 8])
def test_dreams_timetable(steps):
    """Catches a timetable that leaves masks at the end, or is a step late; against linspace."""
    t = np.linspace(1, 1e-3, steps + 1)
    step = jnp.arange(steps)
    share = jax.jit(jax.vmap(lambda j: process.revealed_share(j, steps)))(step)
    np.testing.assert_allclose(share[:-1], (1 - t[1:] / t[:-1])[:-1], rtol=1e-4)
    assert share[-1] == 1 and share.dtype == jnp.float32
    count = jax.jit(lambda n, j: process.revealed_count(n, j, steps))
    left = np.array([8, 100, 3, 0], np.int32)
    for j in range(steps):
        now = np.asarray(count(left, j))
        if j < steps - 1:
            np.testing.assert_array_equal(now, np.floor(left * (1 - t[j + 1] / t[j])))
        left = left - now
    assert not left.any()
    if steps == 8:
        assert process.revealed_count(jnp.array([8]), 0, 8)[0] == 0


# Confidences


def test_confidences_by_hand():
    """Catches the wrong token's probability, a margin to the third, entropy of the other sign."""
    p = np.array([[[0.5, 0.25, 0.25, 0.0], [0.1, 0.4, 0.1, 0.4], [0.0, 1.0, 0.0, 0.0]]])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(p) + 3, jnp.float32)
    candidate = jnp.array([[1, 3, 1]])
    got = jax.jit(process.low_confidence)(logits, candidate)
    np.testing.assert_allclose(got, [[0.25, 0.4, 1]], rtol=1e-6)
    got = jax.jit(process.margin)(logits, candidate)
    np.testing.assert_allclose(got, [[0.25, 0, 1]], atol=1e-6)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    got = jax.jit(process.negative_entropy)(logits, candidate)
    np.testing.assert_allclose(got, -entropy, atol=1e-6)
    for fn in (process.low_confidence, process.margin, process.negative_entropy):
        short = jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16)
        assert jax.eval_shape(fn, short, candidate).dtype == jnp.float32


def test_random_confidence_is_a_rows_own():
    """Catches numbers that are shared between rows or change when one is dropped."""
    all_ = np.asarray(process.random_confidence(keys(), (B, 50)))
    some = process.random_confidence(keys()[jnp.array([5, 1])], (2, 50))
    np.testing.assert_array_equal(some, all_[[5, 1]])
    assert all_.dtype == np.float32 and len(np.unique(all_[:, 0])) == B
    assert stats.kstest(all_.ravel(), "uniform").pvalue > 1e-3


# Weights of context


def by_formula(clean, segments, p):
    n = np.arange(clean.shape[1])
    gap = np.abs(n[:, None] - n)
    with np.errstate(divide="ignore"):
        geo = np.where(gap > 0, 0.5 * p * (1 - p) ** np.maximum(gap - 1, 0.0), 0)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    return (same * geo * clean[:, None, :]).sum(-1)


@pytest.mark.parametrize("p", [0.1, 0.8])
def test_context_weights_are_the_formula(p):
    """Catches a sum that runs on into the next text, counts the slot itself, or is a slot late."""
    rng = np.random.default_rng(0)
    segments = np.array(
        [np.repeat([1, 2, 3, 0], [1, 20, 12, 7]), np.repeat([7, 0], [20, 20]), np.full(40, 4)],
        np.int32,
    )
    clean = rng.uniform(size=segments.shape) < 0.4
    clean[1, :20] = clean[0, 1:21]  # the second text again, alone in a row
    clean[:2, -2:] = True  # padding is no context, whatever it says
    got = np.asarray(weights(clean, segments, p))
    want = by_formula(clean, segments, p)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got[1, :20], got[0, 1:21], atol=1e-6)
    assert got[0, 0] == 0 and not got[segments == 0].any()


def test_context_weights_by_hand():
    """Catches a lost factor 1/2: at p = 1 a slot between two clean neighbours weighs 1."""
    clean = jnp.array([[True, False, True, False, False]])
    ones = jnp.ones((1, 5), jnp.int32)
    np.testing.assert_allclose(weights(clean, ones, 1.0), [[0, 1, 0, 0.5, 0]])
    want = [[0.125, 0.5, 0.125, 0.3125, 0.15625]]
    np.testing.assert_allclose(weights(clean, ones, 0.5), want)
    np.testing.assert_allclose(process.context_weights(clean, ones, 0.5), want)


def test_refusals():
    """Catches numbers out of range that would divide by 0 or silently do nothing."""
    ones = np.ones((2, 3), np.int32)
    for eps in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eps above 0 and at most 1; received"):
            process.corrupt(keys(2), ones, ones > 0, ones, MASK, eps=eps)
    with pytest.raises(ValueError, match=r"a rate a slot, \(2, 3\); received \(2, 1\)"):
        process.corrupt(keys(2), ones, ones > 0, ones, MASK, rate=np.ones((2, 1)))
    with pytest.raises(ValueError, match="at most 3, the slots of a row; received 5"):
        process.times(keys(2), 5 * ones, stratified=True)
    with pytest.raises(ValueError, match="2 rows need a key each"):
        process.random_confidence(keys(3), (2, 3))
    with pytest.raises(ValueError, match="positive number of copies; received 0"):
        process.stratified_counts(keys()[0], 0, 3)
    for call in (process.transfer_counts, lambda n, s: process.revealed_count(n, 0, s)):
        with pytest.raises(ValueError, match="at least one step; received 0"):
            call(jnp.array([3]), 0)
    with pytest.raises(ValueError, match="eps from 0 to below 1; received 1"):
        process.revealed_share(0, 3, eps=1.0)
    for p in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"p above 0 and at most 1; received {p}"):
            process.context_weights(ones > 0, ones, p)
