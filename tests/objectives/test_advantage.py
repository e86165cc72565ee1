"""Advantages: values by hand, in float64 and from TRL; degenerate groups, packing, filtering."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import masked
from jaxreward.core import metrics as m
from jaxreward.evals import distances
from jaxreward.objectives import advantage, policy

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "trl_policy.json").read_text())
close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=1e-6)

# Five groups: mixed, all equal, one member, one member of two hidden, and one that is not there.
REWARDS = jnp.asarray(np.float32([1, 0, 0.5, 0.1, 0.1, 0.1, 7, np.nan, 2, 0, np.inf]))
GROUP = np.array([0, 0, 0, 1, 1, 1, 2, -1, 3, 0, -1])


def answers_alone(lengths, width):
    """`answer` of rows that hold one answer each."""
    return np.where(np.arange(width) < np.array(lengths)[:, None], 0, -1)


# TRL


def _golden_rewards(case):
    """(rewards, group, valid) of a recorded case; TRL writes NaN where we have valid = False."""
    inputs, name = GOLDEN["inputs"], case["name"]
    if name == "grpo same":
        return np.float32([0.1] * 3 + [1e6] * 3)[:, None], np.repeat([0, 1], 3), True
    table = np.array([[np.nan if x is None else x for x in row] for row in inputs["rewards"]])
    if name == "rloo kl":
        return table[:6, :1], np.repeat([0, 1], 3), True
    table = table if name.endswith("two") else table[:, :1]
    return table, np.repeat([0, 1], 4), ~np.isnan(table)


@jax.jit
def _all_methods(table, group, valid, penalty):
    """Ours of two groups, by the name that the recorder gives."""
    present = jnp.where(valid.any(axis=1), group, -1)
    # TRL adds the rewards that there are.
    rewards = jnp.where(valid, table, 0).sum(axis=1) - penalty
    relative = functools.partial(advantage.group_relative, rewards, present, num_groups=2)
    alone = advantage.leave_one_out(rewards, present, num_groups=2)
    one = jnp.where(present >= 0, 0, -1)
    return {
        "grpo group": relative(),
        "grpo batch": relative(scale="batch"),
        "grpo none": relative(scale="none"),
        "gdpo": advantage.gdpo(table, group, num_groups=2, valid=valid),
        "rloo": alone,
        "rloo normalised": advantage.group_relative(alone, one, num_groups=1),
    }


@pytest.mark.parametrize(
    "case",
    GOLDEN["advantages"],
    ids=lambda c: "-".join(str(v) for k, v in c.items() if k not in ("advantages", "lengths")),
)
def test_advantages_are_those_of_trl(case):
    """Catches any departure from TRL's own code, recorded by goldens/record_trl_policy.py."""
    table, group, valid = _golden_rewards(case)
    penalty = jnp.zeros(len(table))
    if "beta" in case:
        old, ref = (np.float32(GOLDEN["inputs"][k]) for k in ("old", "reference"))
        answer = answers_alone(case["lengths"], 5)
        kl = policy.kl(old, ref, kind="k1", mask=answer >= 0)
        penalty = case["beta"] * masked.total_by(kl, answer, 1)[:, 0]
    method = case["name"].split()[0]
    if method == "grpo":
        method = f"grpo {case['scale_rewards']}"
    if "normalize_advantages" in case:
        method = "rloo normalised"
    valid = np.broadcast_to(valid, table.shape)
    made = _all_methods(jnp.asarray(table, jnp.float32), group, valid, penalty)
    close(made[method], case["advantages"])


# By hand


METHODS = {
    "std": lambda r, g: advantage.group_relative(r, g, num_groups=5),
    "batch": lambda r, g: advantage.group_relative(r, g, num_groups=5, scale="batch"),
    "none": lambda r, g: advantage.group_relative(r, g, num_groups=5, scale="none"),
    "loo": lambda r, g: advantage.leave_one_out(r, g, num_groups=5),
    "gdpo": lambda r, g: advantage.gdpo(
        jnp.stack([r, -2 * r], axis=-1), g, num_groups=5, weights=jnp.array([1.0, 0.25])
    ),
}
# One program a method serves all tests below.
JITTED = {name: jax.jit(f) for name, f in METHODS.items()}


def test_group_relative_by_hand():
    """Catches a variance over n, a mean of the batch, and eps under the root.

    Rewards 1, 0, 0.5, 0 have mean 0.375 and variance 0.6875 / 3.
    """
    centred = np.float64([0.625, -0.375, 0.125, -0.375])
    at = np.flatnonzero(GROUP == 0)
    shown = np.float64([1, 0, 0.5, 0.1, 0.1, 0.1, 7, 2, 0])
    of = lambda name: JITTED[name](REWARDS, GROUP)[at]
    close(of("none"), centred)
    close(of("std"), centred / ((0.6875 / 3) ** 0.5 + 1e-4))
    close(of("batch"), centred / (shown.std(ddof=1) + 1e-4))
    wide = jax.jit(lambda r: advantage.group_relative(r, GROUP, num_groups=5, eps=0.5))
    close(wide(REWARDS)[at], centred / ((0.6875 / 3) ** 0.5 + 0.5))


def test_leave_one_out_by_hand():
    """Catches a mean that includes the answer itself: of 1, 0, 0.5, 0 the others of 1 have 1/6."""
    made = JITTED["loo"](REWARDS, GROUP)
    close(np.asarray(made)[GROUP == 0], [1 - 1 / 6, -0.5, 0.5 - 1 / 3, -0.5])


@pytest.mark.parametrize("name", METHODS)
def test_groups_that_teach_nothing_have_exactly_nothing(name):
    """Catches NaN of a group of one, a hidden NaN or inf that leaks, and rounding blown up.

    Three rewards of 0.1 have a float32 mean that is not 0.1.
    """
    made = np.asarray(JITTED[name](REWARDS, GROUP))
    assert np.isfinite(made).all() and made.dtype == np.float32
    assert not made[GROUP != 0].any()
    assert (made[GROUP == 0] != 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_large_equal_rewards_have_exactly_nothing(name):
    """Catches the rounding of a mean at 1e6, which a standard deviation of that size makes 1."""
    rewards = jnp.where(GROUP == 1, 1e6 + 0.1, 3e4 - 0.3).astype(jnp.float32)
    if name == "batch":  # two values in all, so that the batch has spread
        assert not np.any(JITTED[name](rewards, GROUP))
    same = jnp.full(11, 1e6 + 0.1, jnp.float32)
    for x in (rewards, same):
        assert not np.any(JITTED[name](x, GROUP))


@pytest.mark.parametrize("name", METHODS)
def test_advantages_sum_to_zero_and_do_not_see_a_constant(name):
    """Catches a baseline of other groups: one may be shifted against another."""
    rng = np.random.default_rng(0)
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, -1, 0, 1])
    rewards = rng.normal(size=11).astype(np.float32)
    made = np.asarray(JITTED[name](rewards, group))
    shifted = rewards + np.array([3.0, -5.0, 0.5, 0.0])[group].astype(np.float32)
    if name != "batch":
        close(JITTED[name](shifted, group), made, atol=1e-5)
    close(masked.total_by(made, group, 3), np.zeros(3), atol=2e-6)


def _by_definition(name, rewards, group):
    """Advantages in float64, group by group, of rewards that all count."""
    out = np.zeros(len(rewards))
    for g in set(group):
        r = rewards[group == g].astype(np.float64)
        centred = r - r.mean()
        scale = {"std": r.std(ddof=1) + 1e-4, "gdpo": r.std(ddof=1) + 1e-4, "none": 1}
        scale |= {"batch": rewards.std(ddof=1) + 1e-4, "loo": (len(r) - 1) / len(r)}
        out[group == g] = centred / scale[name]
    if name == "gdpo":  # the second reward is -2 times the first and weighs 1/4
        out = out * 0.75
        out = out / (out.std(ddof=1) + 1e-4)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_masked_is_removed_and_order_does_not_matter(name):
    """Catches groups that must lie side by side, as in [prompts, answers], and hidden ones."""
    rng = np.random.default_rng(1)
    group = np.array([0, 1, 2, 0, 1, 2, 0, 1, -1, 0, 1])
    rewards = rng.normal(size=11).astype(np.float32)
    few = group >= 0
    made = np.asarray(JITTED[name](rewards, group))
    close(made[few], _by_definition(name, rewards[few], group[few]), rtol=2e-4)
    order = rng.permutation(11)
    close(JITTED[name](rewards[order], group[order]), made[order])


def test_jit_and_shape_change_nothing():
    """Catches a choice made on a value, and statistics of rows of [B, K] instead of all answers."""
    made = JITTED["std"](REWARDS, GROUP)
    rewards, group = jnp.append(REWARDS, 0.0).reshape(3, 4), np.append(GROUP, -1).reshape(3, 4)
    close(METHODS["std"](rewards, group).ravel()[:11], made)


def test_no_gradient_leaks():
    """Catches a reward model, or a value head, that would be trained through the advantages."""
    answer = np.array([[0, 0, 1, 1, 1, -1]])
    mask = answer >= 0

    @jax.jit
    def gradient(r, x):
        outputs = lambda r, x: [
            *(METHODS[name](r, np.array([[0, 0]])) for name in METHODS),
            advantage.whiten(x, mask),
            advantage.token_advantages(r, answer),
            advantage.token_rewards(r, answer, penalty=x),
            *advantage.gae(x, 2 * x, answer),
            advantage.reinforce_pp(r, answer, penalty=x),
            advantage.reinforce_pp(r, answer, group=np.array([[0, 0]]), num_groups=1),
            advantage.overlong_zero(r, np.array([[3, 5]]), longest=4),
        ]
        squares = lambda r, x: sum(jnp.square(y).sum() for y in outputs(r, x))
        return jax.grad(squares, argnums=(0, 1))(r, x)

    for slope in gradient(jnp.array([[1.0, 2.0]]), jnp.arange(6.0)[None]):
        np.testing.assert_array_equal(slope, np.zeros(slope.shape))


# Over tokens


WHITEN = jax.jit(advantage.whiten)


def test_whiten_by_hand_and_over_all_tokens():
    """Catches a variance over n, an eps outside the root, statistics of rows, and padding.

    1, 2 and 3 have variance 1 over n - 1.
    """
    x, mask = jnp.array([[1.0, 2.0], [np.nan, 3.0]]), np.array([[True, True], [False, True]])
    both = jax.jit(lambda x: (advantage.whiten(x, mask), advantage.whiten(x, mask, eps=3.0)))
    made, wide = both(x)
    close(made, [[-1, 0], [0, 1]])
    close(wide, [[-0.5, 0], [0, 0.5]])
    x = np.random.default_rng(2).normal(size=(4, 9)).astype(np.float32) * 5 + 3
    mask = np.random.default_rng(3).random((4, 9)) < 0.6
    made = np.asarray(WHITEN(x, mask))
    assert abs(made[mask].mean()) < 1e-6 and abs(made[mask].var(ddof=1) - 1) < 1e-5
    assert not made[~mask].any()


@pytest.mark.parametrize("count", [0, 1, 36])
def test_whitening_what_has_no_spread_gives_exactly_nothing(count):
    """Catches 0 / 0 of one token, and the rounding of a mean of large equal values."""
    mask = np.arange(36).reshape(4, 9) < count
    made = WHITEN(np.full((4, 9), 1e6 + 0.1, np.float32), mask)
    np.testing.assert_array_equal(made, np.zeros((4, 9)))


ANSWER = np.array([[-1, 0, 0, -1, 0, 1, 1, -1], [2, 2, 2, -1, -1, 0, -1, -1], [-1] * 8])
SCORES = jnp.array([[1.0, -2.0, 9.0], [0.5, 9.0, 3.0], [9.0, 9.0, 9.0]])


def test_answers_to_tokens_by_hand():
    """Catches the reward on a padded slot, or before a gap that the answer goes on after."""

    @jax.jit
    def made(scores, penalty):
        rewards = advantage.token_rewards
        tokens = advantage.token_advantages(scores, ANSWER)
        return tokens, rewards(scores, ANSWER), rewards(scores, ANSWER, penalty=penalty)

    tokens, plain, less = made(SCORES, jnp.where(ANSWER >= 0, 0.25, np.nan))
    spread = [[0, 1, 1, 0, 1, -2, -2, 0], [3, 3, 3, 0, 0, 0.5, 0, 0], [0] * 8]
    last = [[0, 0, 0, 0, 1, 0, -2, 0], [0, 0, 3, 0, 0, 0.5, 0, 0], [0] * 8]
    np.testing.assert_array_equal(tokens, spread)
    np.testing.assert_array_equal(plain, last)
    np.testing.assert_array_equal(less, np.array(last) - 0.25 * (ANSWER >= 0))


def test_gae_by_hand():
    """Catches values of the next answer, of a prompt, and a reward that is discounted once more.

    Two tokens, reward 1 at the last, values 0.5 and 0.25, gamma 0.5, lambda 0.5:
    A_2 = 1 - 0.25, A_1 = 0.5 * 0.25 - 0.5 + 0.25 * 0.75.
    """
    rewards = jnp.array([[9.0, 0.0, 1.0, 9.0, 4.0]])
    values = jnp.array([[9.0, 0.5, 0.25, 9.0, 1.0]])
    answer = np.array([[-1, 0, 0, -1, 1]])
    gae = jax.jit(functools.partial(advantage.gae, gamma=0.5, lam=0.5))
    made, returns = gae(rewards, values, answer)
    close(made, [[0, -0.1875, 0.75, 0, 3]])
    close(returns, [[0, 0.3125, 1, 0, 4]])


def _gae_loop(rewards, values, gamma, lam):
    """Of one answer, in float64."""
    out, following, after = np.zeros(len(rewards)), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * after - values[t] + gamma * lam * following
        out[t], after = following, values[t]
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_gae_of_packed_rows_is_that_of_each_answer(gamma, lam):
    """Catches what crosses from one answer to the next, and a gap that ends an answer."""
    rng = np.random.default_rng(4)
    rewards, values = rng.normal(size=(2, 3, 8)).astype(np.float32)
    dirty = [np.where(ANSWER < 0, np.nan, x) for x in (rewards, values)]
    gae = jax.jit(functools.partial(advantage.gae, gamma=gamma, lam=lam))
    made, returns = (np.asarray(x) for x in gae(*dirty, ANSWER))
    for b in range(3):
        for k in range(3):
            at = ANSWER[b] == k
            want = _gae_loop(rewards[b][at], values[b][at], gamma, lam)
            close(made[b][at], want, atol=1e-5)
            close(returns[b][at], want + values[b][at], atol=1e-5)
    assert not made[ANSWER < 0].any() and not returns[ANSWER < 0].any()


def test_reinforce_pp_by_hand():
    """Catches a penalty summed over past tokens, and statistics over answers instead of tokens.

    Rewards 1 and 5, penalty 1 a token: reward to go is -1, 0 in the first answer and 4 in the
    second, with mean 1 and variance 7.
    """
    answer = np.array([[0, 0, 1]])
    run = jax.jit(lambda r, p: advantage.reinforce_pp(r, answer, penalty=p))
    made = run(jnp.array([[1.0, 5.0]]), jnp.ones((1, 3)))
    close(made, np.array([[-2, -1, 3]]) / 7**0.5)


def test_reinforce_pp_with_groups_is_what_dler_runs():
    """Catches a baseline after whitening: centre in the group, broadcast, whiten over tokens."""
    group = np.array([[0, 0, -1], [0, -1, 1], [-1, -1, -1]])
    made = jax.jit(lambda r: advantage.reinforce_pp(r, ANSWER, group=group, num_groups=2))(SCORES)
    centred = np.float64([[1, -2, 0], [0.5, 0, 0]]) - np.float64([[-1, -1, 0], [-1, 0, 0]]) / 6
    tokens = np.where(ANSWER[:2] >= 0, np.take_along_axis(centred, ANSWER[:2] % 3, axis=1), 0)
    live = tokens[ANSWER[:2] >= 0]
    want = (tokens - live.mean()) / np.sqrt(live.var(ddof=1) + 1e-8)
    close(made[:2], np.where(ANSWER[:2] >= 0, want, 0), atol=1e-5)
    assert not np.any(made[2])
    # The group of one has advantage 0 before whitening, not its reward of 3.
    assert made[1, 0] == made[1, 2] and abs(made[1, 0]) < 0.1


# Several rewards


def test_gdpo_keeps_apart_what_a_sum_would_merge():
    """Catches rewards that are added first: (0, 1) and (1, 0) beside (0, 0), twice, and (1, 1).

    Means 1/2 and 1/4; standard deviations sqrt(1/3) and 1/2.
    """
    rewards = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    group = np.zeros(4, int)
    a, b = 0.5 / (1 / 3) ** 0.5, 0.25 / 0.5
    weights = jnp.array([1.0, 0.5])

    @jax.jit
    def made(rewards):
        of = functools.partial(advantage.gdpo, rewards, group, num_groups=1, eps=0.0)
        summed = advantage.group_relative(rewards.sum(-1), group, num_groups=1)
        return of(batch=False), of(batch=False, weights=weights), of(weights=weights), summed

    each, lighter, whole, summed = made(rewards)
    weighted = np.array([a - b / 2, -a + 1.5 * b, -a - b / 2, a - b / 2])
    close(each, [a - b, -a + 3 * b, -a - b, a - b])
    close(lighter, weighted)
    close(whole, weighted / weighted.std(ddof=1))
    assert summed[0] == summed[1]  # GRPO cannot tell them apart


def test_gdpo_compares_a_reward_among_those_that_have_it():
    """Catches the length of wrong answers in the mean for right ones, and NaN where one is missing.

    The second reward exists for the first two answers: 3 and 1 are half a standard deviation of
    sqrt(2) from their mean, on either side. The last answer has no reward at all.
    """
    rewards = jnp.array([[1.0, 3.0], [1.0, 1.0], [0.0, np.nan], [0.0, 99.0], [np.nan, np.inf]])
    valid = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]], bool)
    of = functools.partial(
        advantage.gdpo, group=np.zeros(5, int), num_groups=1, valid=valid, eps=0.0
    )
    each, whole = jax.jit(lambda r: (of(r, batch=False), of(r)))(rewards)
    a, b = 0.5 / (1 / 3) ** 0.5, 0.5**0.5
    want = np.array([a + b, a - b, -a, -a])
    close(each, [*want, 0])
    close(whole, [*(want / want.std(ddof=1)), 0])


# Length and filters


def test_overlong_penalty_is_continuous_and_ends_at_minus_one():
    """Catches a penalty of the wrong sign, and a jump at either end of the cache."""
    lengths = np.array([0, 15, 16, 17, 18, 19, 20, 21, 99])
    made = advantage.overlong_penalty(lengths, longest=20, cache=4)
    np.testing.assert_array_equal(made, [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1])


def test_overlong_zero():
    """Catches the answer of just the longest length that loses its reward, and a NaN kept."""
    rewards = jnp.array([1.0, 2.0, np.nan])
    made = advantage.overlong_zero(rewards, np.array([3, 4, 5]), longest=4)
    np.testing.assert_array_equal(made, [1, 2, 0])


# Groups: mixed, all right, all wrong, one answer, a hidden member that differs, not there.
OUTCOMES = jnp.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, np.nan, 0.0]])
GROUPS = np.array([[0, 0, 1, 1], [2, 2, 3, 4], [4, -1, -1, 0]])
SHAPED = jnp.array([[1.0, 0.0, 0.75, 0.5], [-0.5, 0.0, 1.0, 0.0], [0.0, 9.0, 9.0, 0.0]])


def test_groups_are_kept_by_their_outcomes():
    """Catches a filter on shaped rewards, a hidden member that counts, and groups counted wrong."""
    of = functools.partial(advantage.keep_groups, group=GROUPS, num_groups=6)
    (keep, counted), (keep_shaped, counted_shaped) = jax.jit(lambda o, s: (of(o), of(o, shaped=s)))(
        OUTCOMES, SHAPED
    )
    shares = lambda counted: [m.results(counted)[f"groups_{k}"] for k in ("kept", "wrong", "right")]
    np.testing.assert_array_equal(keep, GROUPS == 0)
    close(shares(counted), [0.2, 0.4, 0.4])
    # All right, of different length: kept. All wrong, of different length: not.
    np.testing.assert_array_equal(keep_shaped, (GROUPS == 0) | (GROUPS == 1))
    close(shares(counted_shaped), [0.4, 0.4, 0.4])


def test_filtered_groups_leave_numerator_and_denominator():
    """Catches tokens of a filtered answer that still dilute the mean."""
    answer = np.array([[0, 0, 1, 1, 2, 3], [0, 1, 2, 2, 2, 3], [0, 0, 3, 3, 3, -1]])

    @jax.jit
    def made(outcomes):
        keep, _ = advantage.keep_groups(outcomes, GROUPS, num_groups=6)
        kept = advantage.keep_answers(answer, keep)
        of = functools.partial(policy.reduction, kept, num_answers=4)
        return kept, of(mode="token"), of(mode="sequence")

    kept, token, sequence = made(OUTCOMES)
    np.testing.assert_array_equal(kept, [[0, 0, 1, 1, -1, -1], [-1] * 6, [-1, -1, 3, 3, 3, -1]])
    assert (token.denominator, sequence.denominator) == (7, 3)
    for reduction in (token, sequence):
        assert not np.asarray(reduction.weight)[kept < 0].any()


@pytest.mark.parametrize("tau", [1.0, 0.6, -1.0], ids=["none far", "some far", "all far"])
def test_ppo_without_answers_that_are_far(tau):
    """MRMBench leaves answers far from all centroids out of PPO's update. Catches a filter that
    changes plain PPO where nothing is far, and far answers that pull, dilute or give NaN."""
    rng = np.random.default_rng(0)
    logps, old, each = rng.normal(size=(3, 3, 6)).astype(np.float32)
    answer = np.array([[0, 0, 1, 1, 2, 3], [0, 1, 2, 2, 2, 3], [0, 0, 3, 3, 3, -1]])
    keep = ~distances.dropped(np.linspace(0, 1, 12).reshape(3, 4), tau)

    @jax.jit
    def taught(keep):
        kept = advantage.keep_answers(answer, keep)
        by = policy.reduction(kept, num_answers=4, mode="token")
        of = lambda x: policy.clipped(x, old, each, mask=kept >= 0) * by.weight
        return jax.value_and_grad(lambda x: of(x).sum() / jnp.maximum(by.denominator, 1))(logps)

    loss, gradient = taught(keep)
    stays = np.take_along_axis(keep, np.maximum(answer, 0), axis=1) & (answer >= 0)
    ratio = np.exp(np.float64(logps) - old)
    want = -np.minimum(ratio * each, np.clip(ratio, 0.8, 1.2) * each)
    close(loss, want[stays].mean() if stays.any() else 0)
    assert not np.asarray(gradient)[~stays].any()
    assert np.asarray(gradient)[stays].any() == stays.any() and keep.all() == (tau == 1)


X, G = jnp.zeros((2, 3)), np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: advantage.group_relative(X, G[:1], num_groups=1),
            r"group_relative needs equal shapes; .*'group': \(1, 3\)",
        ),
        (
            lambda: advantage.group_relative(X, G, num_groups=1, scale="group"),
            'scale must be "std", "batch" or "none"; received \'group\'',
        ),
        (lambda: advantage.leave_one_out(X, G + 7, num_groups=7), "below 7, .*received 7"),
        (lambda: advantage.leave_one_out(X, G[0], num_groups=1), "leave_one_out needs equal"),
        (lambda: advantage.whiten(X, G[:1] == 0), "whiten needs equal shapes"),
        (
            lambda: advantage.reinforce_pp(X, G, group=G),
            "reinforce_pp needs num_groups with group",
        ),
        (
            lambda: advantage.overlong_penalty(G, longest=3, cache=4),
            "0 < cache <= longest; received 4 and 3",
        ),
        (lambda: advantage.overlong_zero(X, G[0], longest=3), "overlong_zero needs equal"),
        (lambda: advantage.keep_groups(X, G[0], num_groups=1), "keep_groups needs equal"),
        (
            lambda: advantage.keep_groups(X, G, num_groups=1, shaped=X[0]),
            "keep_groups needs equal",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    """Catches a silent broadcast, and a misspelt word that would train something else."""
    with pytest.raises(ValueError, match=message):
        call()


def test_ppo_by_hand():
    """Catches returns that are whitened or lack the values, and a reward at another token."""
    answer = jnp.array([[0, 0, -1]])
    values = jnp.array([[0.5, 0.25, 9.0]])
    got, returns = advantage.ppo(jnp.array([[1.0]]), values, answer, gamma=1.0, lam=0.5)
    # delta: 0 + 0.25 - 0.5, 1 - 0.25; advantage of the first: -0.25 + 0.5 x 0.75.
    np.testing.assert_allclose(got, [[0.125, 0.75, 0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.625, 1.0, 0]], atol=1e-6)
