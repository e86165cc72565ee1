"""Losses of masked diffusion: exact on enumerated tables, packed, masked, differentiated.

The table of n binary tokens stands for a denoiser: table[m][x] are the log-probabilities of the
tokens of x where the mask m hides some. Its conditionals may be those of one joint or disagree.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import denoising

ORDERS = {n: list(itertools.permutations(range(n))) for n in (1, 2, 3)}


def texts(n):
    return list(itertools.product((0, 1), repeat=n))


def joint(n):
    p = np.random.default_rng(n).dirichlet(np.ones(2**n))
    return dict(zip(texts(n), p))


def table(n, *, noise=0.0):
    """log p(x_i | what mask m leaves of x) of `joint(n)`, [mask][text] -> float[n], and disturbed.

    The disturbance depends on the slot and on what can be seen, and stays normalised over values.
    """
    p = joint(n)
    shift = np.random.default_rng(9).normal(size=(n, 3**n)) * noise

    def logp(mask, x, i):
        seen = [(j, x[j]) for j in range(n) if not mask[j]]
        both = [
            sum(q for y, q in p.items() if y[i] == v and all(y[j] == w for j, w in seen))
            for v in (0, 1)
        ]
        state = sum((2 if mask[j] else x[j]) * 3**j for j in range(n))
        z = np.log(both) + np.array([0, shift[i, state]])
        return z[x[i]] - np.logaddexp(*z)

    return {
        mask: {x: np.array([logp(mask, x, i) if mask[i] else np.nan for i in range(n)]) for x in p}
        for mask in texts(n)
    }


def by_order(tab, x, order):
    """-log p(x) by writing the tokens one by one in this order."""
    n, nll = len(x), 0.0
    for k in range(n):
        mask = tuple(int(j in order[k:]) for j in range(n))
        nll -= tab[mask][x][order[k]]
    return nll


def bound(tab, x):
    """The mean over all orders: what `elbo` has to come to."""
    return np.mean([by_order(tab, x, order) for order in ORDERS[len(x)]])


def mean_elbo(tab, x, low=0.0):
    """The exact expectation of `elbo` over masks and over times in [low, 1], a polynomial."""
    n = len(x)
    node, w = np.polynomial.legendre.leggauss(4)
    rates, w = low + (1 - low) * (node + 1) / 2, w / 2
    masks = np.array(texts(n), bool)
    logps = np.stack([tab[tuple(map(int, m))][x] for m in masks])
    full = lambda a: np.broadcast_to(a, (4, *masks.shape))
    rate = np.broadcast_to(rates[:, None, None], (4, *masks.shape))
    loss = denoising.elbo(
        full(logps).astype(np.float32), jnp.asarray(full(masks)), rate.astype(np.float32)
    )
    chance = np.where(masks, rate, 1 - rate).prod(-1)
    return float((w[:, None] * chance * np.asarray(loss).sum(-1)).sum())


# The bound


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_elbo_is_the_mean_over_all_orders(n, noise):
    """Catches a weight other than 1 / p, or a term of what the model could see."""
    tab = table(n, noise=noise)
    for x in texts(n):
        assert mean_elbo(tab, x) == pytest.approx(bound(tab, x), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_elbo_of_exact_conditionals_is_the_likelihood(n):
    """Catches a wrong factor: with the conditionals of one joint the bound is tight."""
    tab = table(n)
    for x, p in joint(n).items():
        assert mean_elbo(tab, x) == pytest.approx(-math.log(p), rel=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_elbo_of_inconsistent_conditionals_lies_above(n):
    """Catches a bound on the wrong side; the model writes its tokens in a random order."""
    tab = table(n, noise=1.5)
    likelihood = {
        x: np.mean([math.exp(-by_order(tab, x, order)) for order in ORDERS[n]]) for x in texts(n)
    }
    assert sum(likelihood.values()) == pytest.approx(1)
    for x, p in likelihood.items():
        assert mean_elbo(tab, x) > -math.log(p) + 1e-3


def test_times_from_eps_on_are_off_by_eps():
    """Catches an eps that is left out of the divisor; by hand for two tokens."""
    tab, eps = table(2, noise=1.0), 0.1
    for x in texts(2):
        one = tab[1, 0][x][0] + tab[0, 1][x][1]
        two = tab[1, 1][x].sum()
        want = -(1 - eps) / 2 * one - (1 + eps) / 2 * two
        assert mean_elbo(tab, x, low=eps) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_log_likelihood_over_all_counts_and_masks(n, noise):
    """Catches a factor other than L / l; for one token every estimate is exact."""
    tab = table(n, noise=noise)
    for x in texts(n):
        masks = [m for m in texts(n) if any(m)]
        counts = np.array([sum(m) for m in masks], np.int32)
        logps = np.stack([tab[m][x] for m in masks]).astype(np.float32)
        got = denoising.log_likelihood(logps, jnp.array(masks, bool), counts, n)
        by_count = [np.mean(np.asarray(got)[counts == c]) for c in range(1, n + 1)]
        assert np.mean(by_count) == pytest.approx(-bound(tab, x), rel=1e-5)
        if n == 1 and not noise:
            assert float(got[0]) == pytest.approx(math.log(joint(1)[x]), rel=1e-6)


def test_log_likelihood_of_several_texts_and_of_none():
    """Catches one length for all rows, a NaN where nothing is masked."""
    logps = jnp.array([[-1.0, -2.0, jnp.nan], [-3.0, jnp.nan, jnp.nan], [jnp.nan] * 3])
    masked = ~jnp.isnan(logps)
    length = jnp.array([3, 2, 0], jnp.int32)
    got = denoising.log_likelihood(logps, masked, jnp.array([2, 1, 0], jnp.int32), length)
    np.testing.assert_allclose(got, [-4.5, -6, 0])


# The mean over a batch

# Two texts with prompts of one slot, then padding; and the same texts in rows of their own.
PACKED = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
MASKABLE = np.array([[0, 1, 1, 1, 0, 1, 1, 1, 0]], bool)  # one of padding, which counts for nothing
APART = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32)
MASKABLE_APART = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]], bool)


def test_shares_by_hand():
    """Catches a text weighed by its length, a prompt or padding that counts."""
    third = 1 / 3
    got = denoising.shares(MASKABLE, PACKED, "sequence")
    np.testing.assert_allclose(got, [[0, third, third, third, 0, 0.5, 0.5, 0, 0]])
    assert denoising.weight(MASKABLE, PACKED, "sequence") == 2
    got = denoising.shares(MASKABLE, PACKED, "token")
    np.testing.assert_array_equal(got, [[0, 1, 1, 1, 0, 1, 1, 0, 0]])
    assert denoising.weight(MASKABLE, PACKED, "token") == 5
    prompts = np.where(PACKED == 1, False, MASKABLE)
    assert denoising.weight(prompts, PACKED, "sequence") == 1
    assert np.isfinite(denoising.shares(prompts, PACKED, "sequence")).all()


def test_a_packed_row_is_two_rows():
    """Catches a size, a count or a loss that crosses texts, or that padding or the cut changes."""
    rng = np.random.default_rng(0)
    logps, rate = -rng.exponential(size=(2, 1, 9)).astype(np.float32)
    rate = np.where(PACKED == 1, 0.3, 0.8).astype(np.float32)
    masked = MASKABLE & (rng.uniform(size=(1, 9)) < 0.7) & (PACKED > 0)
    assert masked.sum() > 2

    def apart(x):
        out = np.zeros((2, 5), x.dtype)
        out[0, :4], out[1, :3] = x[0, :4], x[0, 4:7]
        return out

    @jax.jit
    def total(logps, masked, rate, maskable, segments):
        loss = denoising.elbo(logps, masked, rate)
        return [
            (jnp.sum(denoising.shares(maskable, segments, mode) * loss),
             denoising.weight(maskable, segments, mode))
            for mode in ("sequence", "token")
        ]  # fmt: skip

    one = total(logps, masked, rate, MASKABLE, PACKED)
    two = total(apart(logps), apart(masked), apart(rate), MASKABLE_APART, APART)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    with jax.disable_jit():
        np.testing.assert_allclose(total(logps, masked, rate, MASKABLE, PACKED), one, rtol=1e-6)
    wide = [np.pad(x, ((0, 1), (0, 4))) for x in (logps, masked, rate, MASKABLE, PACKED)]
    np.testing.assert_allclose(total(*wide), one, rtol=1e-6)
    halves = [
        total(*(x[i : i + 1] for x in map(apart, (logps, masked, rate))), MASKABLE_APART[i : i + 1],
              APART[i : i + 1])
        for i in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(np.sum(halves, axis=0), one, rtol=1e-6)


def test_mean_of_a_uniform_model():
    """Catches a normaliser of masked slots: all masked at rate 1, both modes give log V."""
    logps = jnp.full((1, 9), -math.log(7.0))
    masked = jnp.asarray(MASKABLE & (PACKED > 0))
    loss = denoising.elbo(logps, masked, jnp.ones((1, 9)))
    for mode in ("sequence", "token"):
        shares = denoising.shares(MASKABLE, PACKED, mode)
        mean = jnp.sum(shares * loss) / denoising.weight(MASKABLE, PACKED, mode)
        assert float(mean) == pytest.approx(math.log(7))


# Steps of a trajectory


def test_one_slot_a_step_is_the_chain_rule():
    """Catches log-probs of slots that were not committed; summed over steps it is log p."""
    tab = table(3)
    for x, p in joint(3).items():
        for order in ORDERS[3]:
            masks = [tuple(int(j in order[k:]) for j in range(3)) for k in range(3)]
            logps = np.stack([tab[m][x] for m in masks]).astype(np.float32)
            committed = np.stack([np.arange(3) == i for i in order])
            got = denoising.step_logps(logps, committed)
            assert got.shape == (3,)
            assert float(got.sum()) == pytest.approx(math.log(p), rel=1e-5)


LOGPS = jnp.log(jnp.array([[0.5, 0.25, 0.1], [0.2, 0.4, 0.8]]))
OLD = jnp.log(jnp.array([[0.25, 0.25, 0.3], [0.1, 0.4, 0.8]]))
COMMITTED = jnp.array([[True, True, False], [False, False, False]])


def test_steps_by_hand():
    """Catches a sum for a mean, a length of the step for that of the response, a lost sign."""
    response = jnp.array([[True, True, True], [False, False, False]])
    returns = jnp.array([3.0, 5.0])

    @jax.jit
    def all_(logps):
        return (
            denoising.step_logps(logps, COMMITTED),
            denoising.step_ratio(logps, OLD, COMMITTED),
            denoising.trajectory_nll(logps, COMMITTED, response),
            denoising.reinforce(logps, returns, COMMITTED),
        )

    step, ratio, nll, policy = all_(LOGPS)
    np.testing.assert_allclose(step, [np.log(0.125), 0], rtol=1e-6)
    np.testing.assert_allclose(ratio, [np.sqrt(2), 1], rtol=1e-6)
    np.testing.assert_allclose(nll, [-np.log(0.125) / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(policy, [[3 * np.log(2), 3 * np.log(4), 0], [0, 0, 0]], rtol=1e-6)
    # The gradient of a step is that of its log-prob, times -R.
    grad = jax.jit(jax.grad(lambda x: denoising.reinforce(x, returns, COMMITTED).sum()))
    np.testing.assert_array_equal(grad(LOGPS), [[-3, -3, 0], [0, 0, 0]])


def test_ratio_is_cut_where_its_slope_would_overflow():
    """Catches an inf whose gradient is NaN at a step that the clip takes out."""
    logps, old = jnp.zeros((1, 2)), jnp.full((1, 2), -200.0)
    slope = jax.jit(jax.value_and_grad(lambda x: denoising.step_ratio(x, old, logps == 0).sum()))
    ratio, grad = slope(logps)
    assert float(ratio) == pytest.approx(math.exp(20), rel=1e-5)
    assert not np.asarray(grad).any()


# Masks


LOSSES = {
    "elbo": lambda x, on: denoising.elbo(x, on, jnp.full_like(x, 0.5)),
    "weighted": lambda x, on: denoising.weighted(x, on, jnp.full_like(x, 0.5)),
    "likelihood": lambda x, on: denoising.log_likelihood(x, on, on.sum(1), x.shape[1]),
    "step": denoising.step_logps,
    "ratio": lambda x, on: denoising.step_ratio(x, jnp.full_like(x, -0.5), on) - 1,
    "nll": lambda x, on: denoising.trajectory_nll(x, on, on),
    "reinforce": lambda x, on: denoising.reinforce(x, jnp.ones(len(x)), on),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_mask_hides_is_not_looked_at(name):
    """Catches a hidden NaN or inf in the value or the gradient, and a 0 / 0 if all is hidden."""
    rng = np.random.default_rng(3)
    x = -rng.exponential(size=(3, 4)).astype(np.float32)
    on = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    bad = np.where(on, x, [np.nan, np.inf, -np.inf, np.nan]).astype(np.float32)
    short = jnp.asarray(x, jnp.bfloat16)
    both = jax.jit(
        jax.value_and_grad(
            lambda x, on: (lambda y: (y.sum(), y))(LOSSES[name](x, on)), has_aux=True
        )
    )
    (_, want), slope = both(x, on)
    (_, got), grad = both(bad, on)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(grad, slope)
    assert np.isfinite(grad).all() and (np.asarray(grad)[on] != 0).all()
    assert not np.asarray(grad)[~on].any()
    np.testing.assert_allclose(LOSSES[name](x, on), want, rtol=1e-6)
    assert jax.eval_shape(LOSSES[name], short, on).dtype == jnp.float32
    (none, _), still = both(bad, np.zeros_like(on))
    assert none == 0 and not np.asarray(still).any()


def test_weighted_by_hand():
    """Catches a division by the weights."""
    got = denoising.weighted(LOGPS, COMMITTED, jnp.full((2, 3), 2.0))
    np.testing.assert_allclose(got, [[2 * np.log(2), 2 * np.log(4), 0], [0, 0, 0]], rtol=1e-6)


def test_refusals():
    """Catches silent broadcasting, a misspelt mode, a text that would fall out of the counts."""
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"elbo needs equal shapes.*'rate': \(2, 1\)"):
        denoising.elbo(x, x == 0, x[:, :1])
    with pytest.raises(ValueError, match=r"one return a step, \(2,\); received \(3,\)"):
        denoising.reinforce(x, jnp.zeros(3), x == 0)
    for fn in (denoising.shares, denoising.weight):
        with pytest.raises(ValueError, match='"sequence" or "token"; received \'tokens\''):
            fn(MASKABLE, PACKED, "tokens")
        with pytest.raises(ValueError, match="at most 9, the slots of a row; received 12"):
            fn(MASKABLE, np.where(PACKED == 2, 12, PACKED), "sequence")
