"""Advantages of groups of denoising steps: by hand, without spread, what does not go together."""

import functools

import jax
import numpy as np
import pytest

from jaxreward.objectives import steps

close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=1e-6)


STEPS = np.float32([[1, 3, np.nan, 10, 20], [2, 2, np.inf, 6, 6]])
OF = np.array([0, 0, -1, 1, 1])


@jax.jit
def _of_steps(rewards):
    of = functools.partial(steps.advantages, rewards, OF, num_groups=2)
    return {
        "none": of(),
        "total": of(total=True),
        "batch": of(baseline="batch"),
        "group": of(baseline="group"),
        "white": of(baseline="batch", scale="batch"),
        "white group": of(baseline="group", scale="batch"),
        "std": of(baseline="group", scale="std"),
        "total std": of(baseline="group", scale="std", total=True),
    }


def test_steps_by_hand():
    """Catches a baseline of other steps or prompts, sums over answers, and an answer that was left
    out but counts.

    The eight rewards that count have mean 6.25; the deviations within groups are 1, 5 and 0.
    """
    made = _of_steps(STEPS)
    seen = np.where(OF >= 0, STEPS, 0)
    close(made["none"], seen)
    close(made["total"], [[3, 5, 0, 16, 26]] * 2)
    left = np.where(OF >= 0, seen - 6.25, 0)
    close(made["batch"], left)
    within = np.float64([[-1, 1, 0, -5, 5], [0, 0, 0, 0, 0]])
    close(made["group"], within)
    close(made["white"], left / seen[:, OF >= 0].std(ddof=1))
    close(made["white group"], within / (52 / 7) ** 0.5)
    close(made["std"], np.sign(within) / 2**0.5, rtol=1e-4)
    close(made["total std"], np.sign(within[:1] + [[0] * 5] * 2) / 2**0.5, rtol=1e-4)


def test_steps_that_teach_nothing_have_exactly_nothing():
    """Catches equal rewards whose rounding is blown up, with every scale that is accepted."""
    made = _of_steps(np.full((2, 5), 1e6 + 0.1, np.float32))
    for name in ("batch", "group", "white", "white group", "std", "total std"):
        assert not np.any(made[name]), name


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        (dict(group=OF[:2]), r"rewards \[G, N\] and group \[N\]; received \(2, 5\) and \(2,\)"),
        (dict(baseline="mean"), "received 'mean' and 'none'"),
        (dict(scale="batch"), "would be divided by 0"),
        (dict(baseline="batch", scale="std"), "does not go with baseline='batch'"),
    ],
)
def test_steps_say_what_they_need(kw, message):
    """Catches words that train something else, and a scale that blows equal rewards up."""
    with pytest.raises(ValueError, match=message):
        steps.advantages(STEPS, **{"group": OF, "num_groups": 2, **kw})


def test_imitation_takes_the_good_ones():
    """Catches a wrong answer that is imitated, and groups that are treated differently."""
    got = steps.imitation(np.array([0.0, 1.0, 0.5], np.float32), groups=2)
    np.testing.assert_array_equal(got, [[0, 1, 1], [0, 1, 1]])
    assert np.asarray(steps.imitation(np.zeros(2), groups=1, least=-1)).all()
