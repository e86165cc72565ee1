"""Losses of online RL: values by hand and from TRL, gradients, reductions, extremes, errors."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import masked
from jaxreward.core import metrics as m
from jaxreward.objectives import policy

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "trl_policy.json").read_text())
GIVEN = {k: jnp.asarray(v) for k, v in GOLDEN["inputs"].items() if k not in ("lengths", "rewards")}
MODES = ("token", "sequence", "sequence_sum", "fixed", "group")
close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=1e-7)


def answers_alone(lengths, width=5):
    """`answer` of rows that hold one answer each."""
    return np.where(np.arange(width) < np.array(lengths)[:, None], 0, -1)


def total(loss, reduction):
    """What the training step makes of losses and their reduction."""
    live = reduction.weight != 0
    value = jnp.sum(jnp.where(live, loss * reduction.weight, 0.0))
    return masked.safe_divide(value, reduction.denominator)


# TRL


def _reduction(loss_type, answer):
    word = {
        "grpo": "sequence",
        "bnpo": "token",
        "dapo": "token",
        "dr_grpo": "fixed",
        "luspo": "sequence_sum",
        "rloo": "sequence",
    }[loss_type]
    return policy.reduction(answer, num_answers=1, mode=word, length=8)


def _ours(case, answer):
    """Our loss of the log-probs for one recorded case."""
    live = answer >= 0
    advantages = jnp.where(live, GIVEN["advantages"][:, None], 0.0)
    clip = dict(zip(("clip_low", "clip_high"), case.get("clip", (0.2, 0.2))))
    if case.get("delta"):
        clip["dual"] = case["delta"]
    beta, drawn = case.get("beta", 0.0), case.get("drawn")
    reduction = _reduction(case.get("loss_type", "rloo"), answer)

    def loss(logps):
        if case["trainer"] == "rloo" or case.get("level") == "sequence":
            length = "sum" if case["trainer"] == "rloo" else "mean"
            each = policy.clipped_sequence(
                logps, GIVEN["old"], advantages, answer, num_answers=1, length=length, **clip
            )
        else:
            each = policy.clipped(logps, GIVEN["old"], advantages, mask=live, **clip)
        if drawn:
            each = each * jnp.asarray(drawn)
        if beta:
            each = each + beta * policy.kl(logps, GIVEN["reference"], mask=live)
        return total(each, reduction)

    return loss


@pytest.mark.parametrize(
    "case",
    GOLDEN["losses"],
    ids=lambda c: "-".join(str(v) for k, v in c.items() if k not in ("loss", "gradient", "drawn")),
)
def test_values_and_gradients_are_those_of_trl(case):
    """Catches any departure from TRL's own code, recorded by goldens/record_trl_policy.py."""
    lengths = case.get("lengths", GOLDEN["inputs"]["lengths"])
    loss = _ours(case, answers_alone(lengths))
    value, gradient = jax.value_and_grad(loss)(GIVEN["logps"])
    # TRL divides by all rows, also by one without tokens; we do not.
    counted = len(lengths) / sum(n > 0 for n in lengths)
    close(value, case["loss"] * counted)
    close(gradient, np.array(case["gradient"]) * counted)


@pytest.mark.parametrize("case", GOLDEN["ratios"], ids=lambda c: f"{c['mode']}-{c['cap']}")
def test_importance_weights_are_those_of_trl(case):
    """Catches a mean where TRL sums, the wrong sign, and a bound on the wrong side."""
    level, outside = case["mode"].split("_")
    answer = answers_alone(GOLDEN["inputs"]["lengths"])
    weights = policy.importance_weights(
        GIVEN["old"],
        GIVEN["sampler"],
        answer,
        num_answers=1,
        level=level,
        outside={"truncate": "truncate", "mask": "zero"}[outside],
        cap=case["cap"],
        low=case["low"],
    )
    want = np.broadcast_to(np.array(case["weights"]), weights.shape)
    close(weights, np.where(answer >= 0, want, 0.0))


def test_the_golden_says_what_made_it():
    """Catches a golden of an unknown release, or one of fewer cases."""
    assert GOLDEN["trl"] == "1.16.0"
    assert [len(GOLDEN[k]) for k in ("losses", "advantages", "ratios")] == [29, 15, 8]


# By hand


def test_clipping_by_hand():
    """Catches a clip on the wrong side of the advantage, and clip-higher that is not higher."""
    ratios = jnp.array([1.25, 1.25, 0.7, 0.7, 1.25, 5.0, 5.0, 5.0])
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0, 0.0, 2.0, -2.0, -1.0])
    loss = functools.partial(policy.clipped, jnp.log(ratios), jnp.zeros(8), advantages)
    close(loss(), [-1.2, 1.25, -0.7, 0.8, 0, -2.4, 10, 5])
    close(loss(clip_high=0.28), [-1.25, 1.25, -0.7, 0.8, 0, -2.56, 10, 5])
    close(loss(dual=3.0), [-1.2, 1.25, -0.7, 0.8, 0, -2.4, 6, 3])


def test_the_gradient_of_two_tokens_by_hand():
    """Catches a gradient past the clip, and a ratio without the chain rule.

    Ratios 0.9 and 1.5, advantages 2 and 2: the first gives -0.9 * 2, the second is past 1.2.
    """
    logps, old = jnp.log(jnp.array([0.45, 0.3])), jnp.log(jnp.array([0.5, 0.2]))

    @jax.jit
    def slopes(advantage):
        a = jnp.full(2, advantage)
        of = lambda **kw: jax.grad(lambda x: policy.clipped(x, old, a, **kw).sum())(logps)
        return of(), of(dual=1.25)

    close(slopes(2.0)[0], [-1.8, 0.0])
    # The same ratios, pushed the other way: 0.9 is not below 0.8, 1.5 is free.
    close(slopes(-2.0)[0], [1.8, 3.0])
    close(slopes(-2.0)[1], [1.8, 0.0])


def test_equal_clips_without_dual_are_ppo():
    """Catches any difference from the minimum of two terms, with ratios on all sides."""
    rng = np.random.default_rng(0)
    logps, old, advantages = rng.normal(size=(3, 200)).astype(np.float32)
    ratio = np.exp(np.float64(logps) - old)
    want = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    loss = functools.partial(policy.clipped, jnp.asarray(logps), old, advantages)
    np.testing.assert_allclose(loss(), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss(dual=np.inf), want, rtol=1e-5, atol=1e-6)


def test_at_the_old_policy_all_losses_have_the_gradient_of_reinforce():
    """Catches a ratio that is not 1 there; clips of 0 must not matter either."""
    logps, advantages = GIVEN["old"], jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)))
    answer = answers_alone([5] * 6)
    reduction = policy.reduction(answer, num_answers=1, mode="sequence")
    plain = jax.grad(lambda x: total(policy.reinforce(x, advantages), reduction))(logps)
    for clip in (0.2, 0.0):
        ours = lambda x: policy.clipped(x, logps, advantages, clip_low=clip, clip_high=clip)
        close(jax.grad(lambda x: total(ours(x), reduction))(logps), plain)
    same = jnp.broadcast_to(advantages[:, :1], (6, 5))
    plain = jax.grad(lambda x: total(policy.reinforce(x, same), reduction))(logps)
    for way in ("sequence", "token"):
        ours = lambda x: policy.clipped_sequence(
            x, logps, same, answer, num_answers=1, gradient=way
        )
        close(jax.grad(lambda x: total(ours(x), reduction))(logps), plain)


def test_sequence_ratio_by_hand():
    """Catches a ratio of the sum, a ratio over the row, and a gradient that stops at the mean.

    Steps 0.1 and 0.3 of one answer have mean 0.2; the other answer of the row has 0.6.
    """
    logps, old = jnp.array([[0.1, 0.3, 9.0, 0.6]]), jnp.zeros((1, 4))
    answer = np.array([[0, 0, -1, 1]])

    @jax.jit
    def made(logps):
        of = functools.partial(policy.sequence_log_ratio, num_answers=2)
        ratio = lambda x, way: jnp.exp(of(x, old, answer, gradient=way))[0, 0]
        slope = jax.grad(ratio)
        return [
            of(logps, old, answer),
            of(logps, old, answer, length="sum"),
            of(logps, old, answer, gradient="token"),
            slope(logps, "sequence"),
            slope(logps, "token"),
        ]

    e = np.exp(0.2)
    want = [[0.2, 0.2, 0, 0.6], [0.4, 0.4, 0, 0.6], [0.2, 0.2, 0, 0.6], [e / 2, e / 2, 0, 0]]
    for got, row in zip(made(logps), [*want, [e, 0, 0, 0]], strict=True):
        close(got, [row])


def test_both_ways_of_the_sequence_gradient_agree_and_clip_whole_answers():
    """Catches a token variant that is another method; a clipped answer has no gradient at all."""
    answer = answers_alone(GOLDEN["inputs"]["lengths"])
    advantages = jnp.broadcast_to(GIVEN["advantages"][:, None], (6, 5))
    reduction = policy.reduction(answer, num_answers=1, mode="sequence")

    def gradient(way, clip):
        loss = lambda x: policy.clipped_sequence(
            x,
            GIVEN["old"],
            advantages,
            answer,
            num_answers=1,
            clip_low=clip,
            clip_high=clip,
            gradient=way,
        )
        return jax.grad(lambda x: total(loss(x), reduction))(GIVEN["logps"])

    close(gradient("token", 0.2), gradient("sequence", 0.2))
    moved = np.asarray(gradient("sequence", 0.2)).any(axis=1)
    # Means of the steps: -0.0125, 0.104, 0.219, 0.328, -0.078, 0.175; advantage 0 at the last.
    np.testing.assert_array_equal(moved, [True, True, False, True, True, False])


def test_kl_by_hand():
    """Catches a swapped ratio: with d = 1 the three are -1, 1/2 and e - 2."""
    logps, ref = jnp.array([-2.0, -1.0, -1.0]), jnp.array([-1.0, -2.0, -1.0])
    close(policy.kl(logps, ref, kind="k1"), [-1, 1, 0])
    close(policy.kl(logps, ref, kind="k2"), [0.5, 0.5, 0])
    close(policy.kl(logps, ref), [np.e - 2, np.exp(-1), 0])
    # e^d - 1 - d of a small d, added up in that order, is off by 10 % here.
    np.testing.assert_allclose(
        policy.kl(jnp.zeros(1), jnp.array([1e-3])), [5.0016671e-7], rtol=1e-3
    )


def test_which_kl_estimates_and_which_gradients_are_unbiased():
    """Catches a docstring that promises what is not so, by adding up over all five tokens."""
    logits, ref = np.random.default_rng(2).normal(size=(2, 5)).astype(np.float32)
    ref = ref - np.log(np.exp(ref).sum())
    kinds = ("k1", "k2", "k3")

    @jax.jit
    def everything(logits):
        now = jax.nn.log_softmax(logits)
        p, cost = jnp.exp(now), {k: policy.kl(now, ref, kind=k) for k in kinds}
        expected = lambda each: lambda z: jnp.sum(p * each(jax.nn.log_softmax(z)))
        both = lambda f: jax.value_and_grad(f)(logits)
        return {
            "reverse": both(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - ref))),
            "forward": both(lambda z: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z)))),
            "loss": {k: both(expected(lambda x: policy.kl(x, ref, kind=k))) for k in kinds},
            # An advantage of -k, with the policy gradient's loss.
            "reward": {k: both(expected(lambda x: policy.reinforce(x, -cost[k]))) for k in kinds},
        }

    made = everything(logits)
    value, slope = made["reverse"]
    far = lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max()
    values = {k: far(made["loss"][k][0], value) for k in kinds}
    assert values["k1"] < 1e-6 and values["k3"] < 1e-6 and values["k2"] > 0.01
    slopes = {k: made["loss"][k][1] for k in kinds}
    assert far(slopes["k1"], 0) < 1e-6
    assert far(slopes["k2"], slope) < 1e-6
    assert far(slopes["k3"], made["forward"][1]) < 1e-6 and far(slopes["k3"], slope) > 0.01
    rewards = {k: far(made["reward"][k][1], slope) for k in kinds}
    assert rewards["k1"] < 1e-6 and rewards["k2"] > 0.01 and rewards["k3"] > 0.01


def test_value_loss_by_hand():
    """Catches a minimum in place of the maximum, and a gradient once the step is clipped.

    Old value 1, clip 0.2: 2 counts as 1.2. Against returns of 3 the clipped error is the larger.
    """
    values, old = jnp.array([2.0, 2.0, 1.1]), jnp.ones(3)
    returns = jnp.array([3.0, 0.0, 2.0])

    @jax.jit
    def made(values):
        loss = lambda v, **kw: policy.value_loss(v, old, returns, **kw)
        return loss(values), jax.grad(lambda v: loss(v).sum())(values), loss(values, clip=None)

    loss, slope, plain = made(values)
    close(loss, [1.8**2 / 2, 2.0, 0.9**2 / 2])
    close(slope, [0.0, 2.0, -0.9])
    close(plain, [0.5, 2.0, 0.405])


def test_entropy_bonus_and_reinforce_by_hand():
    """Catches a sign: a positive coefficient must raise entropy and probable good tokens."""
    close(policy.entropy_bonus(jnp.array([0.5, 2.0])), [-0.5, -2.0])
    close(policy.reinforce(jnp.array([-1.0, -2.0]), jnp.array([3.0, -0.5])), [3.0, -1.0])


def test_importance_weights_by_hand_carry_no_gradient():
    """Catches a geometric mean in place of the product, answers of a row mixed up, a gradient."""
    old = jnp.log(jnp.array([[0.5, 0.3, 0.9, 0.2, 0.8]]))
    drawn = jnp.log(jnp.array([[0.25, 0.2, 0.9, 0.4, 0.1]]))
    answer = np.array([[0, 0, -1, 1, 1]])

    @jax.jit
    def made(old, drawn):
        weights = functools.partial(policy.importance_weights, num_answers=2, answer=answer)
        of = lambda **kw: weights(old, drawn, **kw)
        values = [
            of(cap=4.0),
            of(cap=4.0, outside="zero"),
            of(cap=4.0, low=0.75, outside="zero"),
            of(cap=10.0, level="sequence"),
            of(cap=10.0, level="mean"),
        ]
        return values, jax.grad(lambda a, b: weights(a, b).sum(), argnums=(0, 1))(old, drawn)

    values, gradients = made(old, drawn)
    want = [[2, 1.5, 0, 0.5, 4], [2, 1.5, 0, 0.5, 0], [2, 1.5, 0, 0, 0], [3, 3, 0, 4, 4]]
    for got, row in zip(values, [*want, [3**0.5, 3**0.5, 0, 2, 2]], strict=True):
        close(got, [row])
    assert not np.any(gradients)


# Reductions


ANSWER = np.array([[-1, 0, 0, 0, 1, -1], [0, -1, 2, 2, 2, 2], [-1, -1, -1, -1, -1, -1]])
GROUP = np.array([[0, 1, -1], [1, -1, 1], [2, -1, -1]])


@pytest.fixture(scope="module")
def reductions():
    """`ANSWER` in every mode."""
    of = functools.partial(policy.reduction, ANSWER, num_answers=3, length=10, num_groups=4)
    return jax.jit(lambda group: {mode: of(mode=mode, group=group) for mode in MODES})(GROUP)


def test_reductions_by_hand(reductions):
    """Catches a wrong weight or denominator: 9 tokens in answers of 3, 1, 1 and 4; groups 3, 6."""
    one = (ANSWER >= 0).astype(np.float32)
    third, quarter = np.zeros((3, 6)), np.zeros((3, 6))
    third[0, 1:4], quarter[1, 2:] = 1 / 3, 1 / 4
    alone = np.zeros((3, 6))
    alone[0, 4] = alone[1, 0] = 1
    want = {
        "token": (one, 9),
        "sequence": (third + quarter + alone, 4),
        "sequence_sum": (one, 4),
        "fixed": (one / 10, 4),
        "group": (np.where(third > 0, 1 / 3, one / 6), 2),
    }
    for mode, (weight, denominator) in want.items():
        got = reductions[mode]
        close(got.weight, weight, err_msg=mode)
        assert got.denominator == denominator and got.weight.dtype == jnp.float32, mode


def test_reductions_mean_what_they_say(reductions):
    """Catches a table in the docstring that is not so, by means taken answer by answer."""
    loss = np.random.default_rng(3).normal(size=ANSWER.shape).astype(np.float32)
    texts = {(b, k): loss[b][ANSWER[b] == k] for b in range(3) for k in range(3)}
    texts = {k: v for k, v in texts.items() if len(v)}
    groups = [np.concatenate([v for k, v in texts.items() if GROUP[k] == g]) for g in (0, 1)]
    want = {
        "token": np.concatenate(list(texts.values())).mean(),
        "sequence": np.mean([x.mean() for x in texts.values()]),
        "sequence_sum": np.mean([x.sum() for x in texts.values()]),
        "fixed": np.mean([x.sum() / 10 for x in texts.values()]),
        "group": np.mean([x.mean() for x in groups]),
    }
    for mode in MODES:
        made = total(loss, reductions[mode])
        np.testing.assert_allclose(made, want[mode], rtol=1e-5, err_msg=mode)


# Extremes and errors


def test_extreme_ratios_have_finite_values_and_gradients():
    """Catches the slope of exp at 200, inf, times the 0 of a clip: NaN in every gradient."""
    old, answer = jnp.zeros((1, 1)), np.zeros((1, 1), int)

    @jax.jit
    def made(gap, sign):
        losses = {
            "clipped": lambda x: policy.clipped(x, old, old + sign),
            "dual": lambda x: policy.clipped(x, old, old + sign, dual=3.0),
            "sequence": lambda x: policy.clipped_sequence(
                x, old, old + sign, answer, num_answers=1
            ),
            "k3": lambda x: policy.kl(x, old),
        }
        both = lambda f: jax.value_and_grad(lambda x: f(x).sum())(old + gap)
        return {name: both(f) for name, f in losses.items()}

    for gap in (200.0, -200.0, 60.0):
        for sign in (1.0, -1.0, 0.0):
            out = made(gap, sign)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(out)), (gap, sign, out)
    close(made(200.0, 1.0)["clipped"][0], -1.2)
    close(made(200.0, -1.0)["dual"][0], 3.0)
    # The reference must go on pulling a policy that is sure of what the reference excludes.
    assert made(200.0, 1.0)["k3"][1] > 0.99


def test_low_precision_gives_float32():
    """Catches a difference of log-probs taken in bfloat16, where -1000.5 and -1000 are equal."""
    old = jnp.full((1, 2), -1000.0, jnp.bfloat16)
    logps = jnp.full((1, 2), -1000.5, jnp.float32)
    answer = np.zeros((1, 2), int)
    ones = jnp.ones((1, 2), jnp.bfloat16)

    @jax.jit
    def made(logps, old, ones):
        return [
            policy.clipped(logps, old, ones),
            policy.clipped_sequence(logps, old, ones, answer, num_answers=1, clip_low=1.0),
            policy.kl(old, old),
            policy.reinforce(old, ones),
            policy.entropy_bonus(ones),
        ]

    losses = made(logps, old, ones)
    assert {x.dtype for x in losses} == {np.dtype(np.float32)}
    for loss in losses[:2]:
        close(loss, np.full((1, 2), -np.exp(-0.5)))


def test_report_by_hand():
    """Catches a share that counts padding, or tokens that the clip left alone."""
    ratio = jnp.array([0.5, 0.5, 1.5, 1.5, 4.0, 1.0, 99.0, 1.25])
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    mask = np.array([True] * 6 + [False, True])
    old = jnp.full(8, -1.0)
    sampler = old + jnp.array([0.5, 0, 0, 0, 0, -0.25, 9, 0])
    made = policy.report(
        old + jnp.log(ratio),
        old,
        advantages,
        mask=mask,
        clip_high=0.28,
        dual=3.0,
        sampler_logps=sampler,
    )
    kept = np.asarray(ratio)[mask]
    want = {
        "ratio": kept.mean(),
        "ratio_max": 4.0,
        "clipped_low": 1 / 7,
        "clipped_high": 1 / 7,
        "clipped_dual": 1 / 7,
        "policy_kl": (kept - 1 - np.log(kept)).mean(),
        "sampler_gap": 0.75 / 7,
        "sampler_gap_max": 0.5,
    }
    got = m.results(made)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    fewer = policy.report(old, old, advantages, mask=mask)
    assert set(fewer) == set(want) - {"clipped_dual", "sampler_gap", "sampler_gap_max"}


X = jnp.zeros((2, 3))
A = np.zeros((2, 3), int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy.clipped(X, X, X[:, :1]), r"equal shapes; .*'advantages': \(2, 1\)"),
        (lambda: policy.clipped(X, X, X, mask=A[:1] == 0), r"'mask or answer': \(1, 3\)"),
        (lambda: policy.clipped(X, X, X, clip_low=1.5), r"clip_low in \[0, 1\].*received 1.5"),
        (lambda: policy.clipped(X, X, X, dual=1.0), "dual > 1, .*received 1.0"),
        (lambda: policy.kl(X, X, kind="k4"), '"k1", "k2" or "k3"; received \'k4\''),
        (lambda: policy.value_loss(X, X, X, clip=-1.0), "clip >= 0"),
        (
            lambda: policy.clipped_sequence(X, X, X, A, num_answers=1, length="max"),
            '"mean" or "sum"; received \'max\'',
        ),
        (
            lambda: policy.sequence_log_ratio(X, X, A, num_answers=1, gradient="none"),
            '"sequence" or "token"; received \'none\'',
        ),
        (lambda: policy.sequence_log_ratio(X, X, A + 4, num_answers=2), "below 2, .*received 4"),
        (
            lambda: policy.importance_weights(X, X, A, num_answers=1, level="row"),
            "level must be .*received 'row'",
        ),
        (
            lambda: policy.importance_weights(X, X, A, num_answers=1, outside="drop"),
            "outside must be .*received 'drop'",
        ),
        (
            lambda: policy.importance_weights(X, X, A, num_answers=1, cap=0.5),
            "low <= 1 <= cap.*cap 0.5",
        ),
        (lambda: policy.reduction(A, num_answers=1, mode="mean"), "mode must be one of token"),
        (lambda: policy.reduction(A, num_answers=1, mode="fixed"), '"fixed" needs a length'),
        (lambda: policy.reduction(A, num_answers=1, mode="group"), '"group" needs the group'),
        (
            lambda: policy.reduction(A, num_answers=1, mode="group", group=A, num_groups=1),
            r"one of each answer, \(2, 1\); received \(2, 3\)",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    """Catches a silent broadcast, and a misspelt word that would train something else."""
    with pytest.raises(ValueError, match=message):
        call()
