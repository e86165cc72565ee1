"""Masked statistics against NumPy on the kept entries alone: masked means removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import masked

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 7)).astype(np.float32)
MASK = RNG.random((4, 7)) < 0.6
MASK[2] = False
STATISTICS = {
    "total": (masked.total, np.sum),
    "mean": (masked.mean, np.mean),
    "std": (masked.std, np.std),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_masked_is_removed(name):
    """Catches padding that enters a sum or a count."""
    ours, numpy = STATISTICS[name]
    kept = X[MASK].astype(np.float64)
    np.testing.assert_allclose(ours(X, MASK), numpy(kept), rtol=1e-6)
    rows = ours(jnp.asarray(X), MASK, axis=1)
    want = [numpy(X[i][MASK[i]].astype(np.float64)) if MASK[i].any() else 0.0 for i in range(4)]
    np.testing.assert_allclose(rows, want, rtol=2e-6, atol=1e-7)
    assert rows.dtype == jnp.float32 and rows[2] == 0


def test_hand_values():
    """Catches a wrong denominator: 1, 2, 4 have mean 7/3 and variances 14/9 and 7/3."""
    x, mask = jnp.array([1.0, 100.0, 2.0, 4.0]), np.array([True, False, True, True])
    np.testing.assert_allclose(masked.total(x, mask), 7.0)
    np.testing.assert_allclose(masked.mean(x, mask), 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked.std(x, mask), (14 / 9) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(masked.std(x, mask, ddof=1), (7 / 3) ** 0.5, rtol=1e-6)
    one = np.array([False, False, True, False])
    assert masked.std(x, one, ddof=1) == 0  # no degree of freedom left


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_the_mask_hides_reaches_neither_value_nor_gradient(name, bad):
    """Catches 0 * NaN: a NaN of a padded slot that poisons the value, or every gradient."""
    ours, _ = STATISTICS[name]
    poisoned = jnp.asarray(np.where(MASK, X, bad))
    value, gradient = jax.value_and_grad(lambda x: ours(x, MASK, axis=1).sum())(poisoned)
    clean, expected = jax.value_and_grad(lambda x: ours(x, MASK, axis=1).sum())(jnp.asarray(X))
    assert value == clean
    np.testing.assert_array_equal(gradient, expected)
    assert (np.asarray(gradient)[~MASK] == 0).all()


@pytest.mark.parametrize("name", STATISTICS)
def test_a_nan_outside_the_mask_is_let_through(name):
    """Catches a guard against NaN that hides a real one."""
    ours, _ = STATISTICS[name]
    x = X.copy()
    row, column = np.argwhere(MASK)[0]
    x[row, column] = np.nan
    assert np.isnan(ours(x, MASK))
    rows = np.asarray(ours(x, MASK, axis=1))
    assert np.isnan(rows[row]) and np.isfinite(np.delete(rows, row)).all()


@pytest.mark.parametrize("name", STATISTICS)
def test_fully_masked_gives_zero_with_zero_gradient(name):
    """Catches 0 / 0 in the value or, through the branch not taken, in the gradient."""
    ours, _ = STATISTICS[name]
    nothing = np.zeros_like(MASK)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: ours(x, nothing)))(X)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


def test_std_of_equal_values_has_a_finite_gradient():
    """Catches the infinite slope of the square root at 0: a group whose rewards are all equal."""
    value, gradient = jax.value_and_grad(lambda x: masked.std(x, x > 0))(jnp.full(4, 2.0))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_std_gradient_is_that_of_finite_differences():
    """Catches a stop or a sign in the safe branches; differences are of NumPy in float64."""
    x = np.array([0.5, -1.0, 2.0, 9.0])
    mask = np.array([True, True, True, False])
    gradient = jax.grad(lambda x: masked.std(x, mask))(jnp.asarray(x, jnp.float32))
    h = 1e-6
    for i in range(4):
        step = np.eye(4)[i] * h
        slope = ((x + step)[mask].std() - (x - step)[mask].std()) / (2 * h)
        np.testing.assert_allclose(gradient[i], slope, atol=1e-6)


def test_a_mask_broadcasts_over_the_last_axis_and_counts_it():
    """Catches a count taken of the small mask instead of the broadcast one."""
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[True, False, True], [False, False, False]])[..., None]
    assert masked.mean(x, mask) == (0 + 1 + 4 + 5) / 4
    np.testing.assert_array_equal(masked.mean(x, mask, axis=(1, 2)), [2.5, 0.0])
    np.testing.assert_allclose(
        masked.std(x, mask, axis=(1, 2)), [np.std([0, 1, 4, 5]), 0.0], rtol=1e-6
    )


def test_low_precision_is_summed_in_float32():
    """Catches a sum in bfloat16, which stops counting at 256."""
    ones = jnp.ones(1000, jnp.bfloat16)
    assert masked.total(ones, ones > 0) == 1000
    assert masked.mean(ones, ones > 0).dtype == jnp.float32


def test_safe_divide():
    """Catches a quotient by 0 that is not 0, and a gradient that is not finite there."""
    np.testing.assert_array_equal(
        masked.safe_divide(np.array([1, 2, 0]), np.array([4, 0, 0])), [0.25, 0.0, 0.0]
    )
    top, bottom = jax.grad(lambda a, b: masked.safe_divide(a, b).sum(), argnums=(0, 1))(
        jnp.array([3.0, 3.0]), jnp.array([2.0, 0.0])
    )
    np.testing.assert_array_equal(top, [0.5, 0.0])
    np.testing.assert_array_equal(bottom, [-0.75, 0.0])
    assert np.isnan(masked.safe_divide(jnp.float32(1), jnp.float32(np.nan)))


def test_pick():
    """Catches -1 read as "the last slot", and a gradient that reaches it."""
    x = jnp.arange(24, dtype=jnp.float32).reshape(2, 4, 3)
    index = jnp.array([[3, -1], [0, 2]])
    picked = masked.pick(x, index)
    np.testing.assert_array_equal(picked[0], [[9, 10, 11], [0, 0, 0]])
    np.testing.assert_array_equal(picked[1], [[12, 13, 14], [18, 19, 20]])
    np.testing.assert_array_equal(masked.pick(x[..., 0], index), [[9, 0], [12, 18]])
    gradient = jax.grad(lambda x: masked.pick(x, index).sum())(x)
    np.testing.assert_array_equal(gradient[..., 0], [[0, 0, 0, 1], [1, 0, 1, 0]])
    assert masked.pick(x.astype(jnp.bfloat16), index).dtype == jnp.bfloat16


# By id


IDS = np.array([[0, 2, -1, 2, 0, 0, 2], [1, 1, 1, -1, -1, 1, 1], [-1] * 7, [3, 0, 3, 1, 0, 2, 1]])


def _kept(row, k):
    return X[row][IDS[row] == k].astype(np.float64)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_sums_counts_and_means_by_id_are_those_of_the_entries_alone(wrap):
    """Catches an entry that is counted for another id, another row, or although its id is -1."""
    x = jnp.asarray(X)
    total, mean = (wrap(lambda x, f=f: f(x, IDS, 4))(x) for f in (masked.total_by, masked.mean_by))
    count = wrap(lambda ids: masked.count_by(ids, 4))(jnp.asarray(IDS))
    for row in range(4):
        for k in range(4):
            kept = _kept(row, k)
            assert count[row, k] == len(kept)
            np.testing.assert_allclose(total[row, k], kept.sum(), rtol=1e-6, atol=1e-7)
            want = kept.mean() if len(kept) else 0.0
            np.testing.assert_allclose(mean[row, k], want, rtol=1e-6, atol=1e-7)


def test_deviations_by_id_are_those_of_numpy():
    """Catches a variance over n where n - 1 was asked, or a mean of another id."""
    for ddof in (0, 1):
        deviation, variance = masked.deviations_by(jnp.asarray(X), IDS, 4, ddof=ddof)
        assert not deviation[IDS < 0].any()
        for row in range(4):
            for k in range(4):
                kept = _kept(row, k)
                near = dict(rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(
                    np.asarray(deviation[row])[IDS[row] == k],
                    kept - (kept.mean() if len(kept) else 0),
                    **near,
                )
                want = kept.var(ddof=ddof) if len(kept) > ddof else 0.0
                np.testing.assert_allclose(variance[row, k], want, **near)


def test_equal_values_deviate_by_exactly_nothing_however_large():
    """Catches the rounding of a mean: three times 1e6 + 0.1 add up to what is not three times it.

    Divided by a standard deviation of the same size, that rounding becomes advantages of 1.
    """
    x = jnp.asarray(np.float32([1e6 + 0.1] * 3 + [0.1] * 7 + [3e38] * 2))
    ids = np.array([0] * 3 + [1] * 7 + [2] * 2)
    deviation, variance = masked.deviations_by(x, ids, 3)
    assert not deviation.any() and not variance.any()


def test_a_large_common_offset_costs_no_digits():
    """Catches a variance that is the difference of two large numbers."""
    x = jnp.asarray(np.float32([2**23, 2**23 + 1, 2**23 + 5]))
    deviation, variance = masked.deviations_by(x, np.zeros(3, int), 1)
    np.testing.assert_allclose(deviation, [-2, -1, 3], rtol=1e-6)
    np.testing.assert_allclose(variance, [7.0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_without_id_reaches_neither_value_nor_gradient(bad):
    """Catches 0 * NaN, and a NaN that leaks from one id into another."""
    x = jnp.where(IDS < 0, bad, jnp.asarray(X))
    for f in (
        lambda x: masked.total_by(x, IDS, 4),
        lambda x: masked.mean_by(x, IDS, 4),
        lambda x: jnp.square(masked.deviations_by(x, IDS, 4)[0]),
        lambda x: masked.deviations_by(x, IDS, 4)[1],
    ):
        value, gradient = jax.value_and_grad(lambda x: f(x).sum())(x)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert not np.asarray(gradient)[IDS < 0].any()
        other = np.asarray(f(jnp.asarray(X).at[0, 0].set(jnp.nan)))
        assert np.isnan(other[0]).any() and np.isfinite(other[1:]).all()


def test_spread_gives_each_entry_the_value_of_its_id():
    """Catches -1 read as the last value, and the transpose: the gradient is the sum by id."""
    values = jnp.array([[1.0, 2.0, 3.0, jnp.nan]] * 4).at[3, 3].set(7.0)
    out = masked.spread(values, IDS)
    np.testing.assert_array_equal(out[0], [1, 3, 0, 3, 1, 1, 3])
    np.testing.assert_array_equal(out[2], np.zeros(7))
    np.testing.assert_array_equal(out[3], [7, 1, 7, 2, 1, 3, 2])
    weights = jnp.asarray(X)
    gradient = jax.grad(lambda v: (masked.spread(v, IDS) * weights).sum())(values)
    np.testing.assert_allclose(gradient, masked.total_by(weights, IDS, 4), rtol=1e-6, atol=1e-7)


def test_an_id_beyond_the_number_given_is_refused():
    """Catches answers that vanish without a word because num_groups was too small."""
    with pytest.raises(ValueError, match=r"ids must lie below 3, .* received 3"):
        masked.total_by(jnp.asarray(X), IDS, 3)
