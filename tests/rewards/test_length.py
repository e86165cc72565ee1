"""Baselines that tax whole lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.rewards import length

LENGTHS = np.int32([100, 50, 500, 200])
RIGHT = np.array([True, True, False, True])


@pytest.mark.parametrize(
    ("name", "kw", "expected"),
    [
        ("truncation", dict(target=100), [1, 1, 0, 0]),
        ("cosine", dict(max_length=100, short=1.0, long=0.5), [0.5, 0.75, 0, 0.5]),
        ("total_ratio", dict(max_length=100, lam=0.5), [0.5, 0.75, 0, 0.5]),
        ("group_length", dict(group=np.int32([0, 0, 0, 1]), groups=3), [0, 0.5, 0, 0]),
    ],
)
def test_baselines_by_hand(name, kw, expected):
    """Each formula at its ends, wrong answers at 0, and NumPy equal to jitted JAX."""
    function = getattr(length, name)
    got = function(RIGHT, LENGTHS, **kw)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.float32(expected), atol=1e-7)
    of_jax = jax.jit(lambda a, b: function(a, b, **kw))(jnp.asarray(RIGHT), jnp.asarray(LENGTHS))
    assert isinstance(of_jax, jax.Array)
    np.testing.assert_allclose(of_jax, got, atol=1e-6)


def test_baselines_refuse_settings_in_which_wrong_could_win():
    """The constraint that any right answer beats any wrong one."""
    with pytest.raises(ValueError, match="0 <= lam < 1; received 1"):
        length.total_ratio(RIGHT, LENGTHS, max_length=10, lam=1)
    with pytest.raises(ValueError, match="short >= long > 0"):
        length.cosine(RIGHT, LENGTHS, max_length=10, long=0.0)
    with pytest.raises(ValueError, match="needs group"):
        length.group_length(RIGHT, LENGTHS, group=None, groups=2)
