"""Losses of online RL on packed rows: as alone, in any order, under masks, jit and microbatches."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import masked
from jaxreward.objectives import policy
from jaxreward.train import step

MODES = ("token", "sequence", "sequence_sum", "fixed", "group")


def _rows(seed, rows=6):
    """Packed rows of up to three answers, with holes, and all that a loss needs."""
    rng = np.random.default_rng(seed)
    answer = np.full((rows, 12), -1)
    for row in answer:
        at = 1
        for k in range(rng.integers(1, 4)):
            n = rng.integers(1, 5)
            row[at : at + n] = k
            if n > 2 and at + n < 12:
                row[at + 1] = -1
            at += n + rng.integers(0, 2)
    group = np.where(masked.count_by(answer, 3) > 0, rng.integers(0, 3, size=(rows, 3)), -1)
    reward = rng.normal(size=(rows, 3)).astype(np.float32)
    of = dict(zip(("old", "step", "reference", "sampler"), rng.normal(size=(4, rows, 12)) * 0.3))
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in of.items()}
    batch["advantages"] = masked.spread(reward, answer)
    return {**batch, "answer": jnp.asarray(answer), "group": jnp.asarray(group)}


def _losses(logps, rows):
    """Every loss of the file, per token, by name."""
    answer, advantages = rows["answer"], rows["advantages"]
    live, K = answer >= 0, 3
    near = dict(clip_low=0.2, clip_high=0.3)
    weights = policy.importance_weights(rows["old"], rows["sampler"], answer, num_answers=K)
    whole = policy.importance_weights(
        rows["old"], rows["sampler"], answer, num_answers=K, level="sequence", outside="zero"
    )
    sequence = functools.partial(
        policy.clipped_sequence, logps, rows["old"], advantages, answer, num_answers=K, **near
    )
    return {
        "clipped": policy.clipped(logps, rows["old"], advantages, dual=2.0, mask=live, **near),
        "weighted": weights * policy.clipped(logps, rows["old"], advantages, mask=live),
        "sequence": sequence() * whole,
        "sum": sequence(length="sum"),
        "token": sequence(gradient="token"),
        "reinforce": policy.reinforce(logps, advantages, mask=live),
        **{k: policy.kl(logps, rows["reference"], kind=k, mask=live) for k in ("k1", "k2", "k3")},
        "entropy": policy.entropy_bonus(logps, mask=live),
        "value": policy.value_loss(logps, rows["old"], rows["reference"], mask=live),
    }


def _reduce_plainly(rows):
    of = functools.partial(policy.reduction, rows["answer"], num_answers=3)
    return {mode: of(mode=mode, length=10, group=rows["group"], num_groups=3) for mode in MODES}


_reduce = jax.jit(_reduce_plainly)


@jax.jit
def _each(logps, rows, weight):
    """Every loss per token, and the gradient of all of them, summed with one weight a token."""

    def summed(logps):
        each = _losses(logps, rows)
        live = weight != 0
        sums = [jnp.sum(jnp.where(live, x * weight, 0.0)) for x in each.values()]
        return sum((i + 1) * x for i, x in enumerate(sums)), each

    slope, each = jax.grad(summed, has_aux=True)(logps)
    return each, slope


def _compare(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def packed():
    """Rows of several answers, and log-probs of a policy that has moved."""
    rows = _rows(4)
    return rows["old"] + rows["step"], rows


@pytest.fixture(scope="module")
def alone(packed):
    """The same answers in rows of their own: (log-probs, rows, which row they came from)."""
    logps, rows = packed
    where = np.argwhere(np.asarray(masked.count_by(rows["answer"], 3)) > 0)
    source = where[:, 0]
    out = {k: v[source] for k, v in rows.items()}
    out["answer"] = jnp.where(out["answer"] == where[:, 1:], 0, -1)
    group = np.full((len(where), 3), -1)
    group[:, 0] = rows["group"][source, where[:, 1]]
    out["group"] = jnp.asarray(group)
    return logps[source], out, source


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_are_the_same_answers_alone(mode, packed, alone):
    """Catches sums over a row where an answer was meant, in any loss or reduction, and holes."""
    (logps, rows), (singly, apart, source) = packed, alone
    assert len(source) > 6 and (np.asarray(rows["answer"])[:, 1:-1] < 0).any()
    reduction, other = _reduce(rows)[mode], _reduce(apart)[mode]
    assert reduction.denominator == other.denominator

    def together(x):
        out = np.zeros(logps.shape)
        np.add.at(out, source, np.asarray(x) * (np.asarray(apart["answer"]) >= 0))
        return out

    np.testing.assert_allclose(together(other.weight), reduction.weight, rtol=1e-6)
    each, slope = _each(logps, rows, reduction.weight)
    each_alone, slope_alone = _each(singly, apart, other.weight)
    _compare({k: together(v) for k, v in each_alone.items()}, each)
    _compare({"slope": together(slope_alone)}, {"slope": slope})


def test_the_order_of_rows_and_of_answers_does_not_matter(packed):
    """Catches a result that depends on where an answer stands."""
    logps, rows = packed
    order, names = np.array([3, 0, 5, 1, 4, 2]), np.array([2, 0, 1])
    moved = {k: v[order] for k, v in rows.items()}
    moved["answer"] = jnp.where(moved["answer"] < 0, -1, names[moved["answer"]])
    moved["group"] = moved["group"][:, np.argsort(names)]
    reductions, others = _reduce(rows), _reduce(moved)
    for mode in MODES:
        a, b = reductions[mode], others[mode]
        assert a.denominator == b.denominator
        np.testing.assert_array_equal(a.weight[order], b.weight, err_msg=mode)
    each, slope = _each(logps, rows, a.weight)
    other, slope_moved = _each(logps[order], moved, b.weight)
    _compare({k: v[order] for k, v in each.items()}, other)
    _compare({"slope": slope[order]}, {"slope": slope_moved})


def test_jit_changes_nothing(packed):
    """Catches a choice made on a value, which jit cannot make."""
    logps, rows = packed
    _compare(_losses(logps, rows), _each(logps, rows, rows["advantages"])[0])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        _reduce_plainly(rows),
        _reduce(rows),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 200.0])
def test_what_is_hidden_reaches_neither_value_nor_gradient(bad, packed):
    """Catches 0 * NaN and 0 * inf at prompts, padding and filtered answers, in any loss."""
    logps, rows = packed
    # An answer that is taken out is as good as padding.
    rows = {**rows, "answer": rows["answer"].at[1].set(-1)}
    live = rows["answer"] >= 0
    weight = live.astype(jnp.float32)
    names = ("old", "reference", "sampler", "advantages")
    dirty = {k: jnp.where(live, v, bad) if k in names else v for k, v in rows.items()}
    each, slope = _each(logps, rows, weight)
    other, slope_dirty = _each(jnp.where(live, logps, bad), dirty, weight)
    _compare(each, other)
    np.testing.assert_array_equal(slope, slope_dirty)
    for name, x in {**other, "slope": slope_dirty}.items():
        assert not np.asarray(x)[~np.asarray(live)].any(), name


def test_masked_is_removed(packed):
    """Catches an answer that was taken out and still counts in a denominator or a weight."""
    logps, rows = packed
    keep = np.array([0, 2, 3, 4, 5])
    out = {**rows, "answer": rows["answer"].at[1].set(-1)}
    reductions, others = _reduce(out), _reduce({k: v[keep] for k, v in rows.items()})
    for mode in MODES:
        a, b = reductions[mode], others[mode]
        assert a.denominator == b.denominator and not a.weight[1].any(), mode
        np.testing.assert_array_equal(a.weight[keep], b.weight, err_msg=mode)
    each, other = _each(logps, rows, a.weight)[0], _each(logps, out, a.weight)[0]
    _compare({k: v[keep] for k, v in each.items()}, {k: v[keep] for k, v in other.items()})


def test_fully_masked_is_zero(packed):
    """Catches 0 / 0 in a batch whose groups were all filtered out."""
    logps, rows = packed
    rows = {**rows, "answer": jnp.full_like(rows["answer"], -1)}
    assert not any(np.any(x) for x in jax.tree.leaves(_reduce(rows)))
    assert not any(np.any(x) for x in jax.tree.leaves(_each(logps, rows, jnp.ones_like(logps))))


def test_microbatches_change_nothing():
    """Catches a denominator of the part: gradients of the real step, cut into 1 and into 3."""
    rows = _rows(5)
    reduce = functools.partial(policy.reduction, num_answers=3, mode="group", num_groups=3)
    rows["weight"] = reduce(rows["answer"], group=rows["group"]).weight
    table = jnp.asarray(np.random.default_rng(0).normal(size=12) * 0.1, jnp.float32)

    def loss(params, frozen, part, keys, extra):
        logps = part["old"] + part["step"] * params
        pg = policy.clipped_sequence(
            logps, part["old"], part["advantages"], part["answer"], num_answers=3, clip_high=0.2
        )
        near = policy.kl(logps, part["reference"], mask=part["answer"] >= 0)
        return {k: jnp.sum(x * part["weight"]) for k, x in (("pg", pg), ("kl", near))}, {}, extra

    def weights(batch):
        return dict.fromkeys(
            ("pg", "kl"), reduce(batch["answer"], group=batch["group"]).denominator
        )

    made = {}
    for cuts in (1, 3):
        gradient = step.make_gradient(loss, weights, {"pg": 1.0, "kl": 0.1}, cuts)
        made[cuts] = jax.jit(gradient)(table, {}, rows, jax.random.key(0), {})[:2]
    assert np.abs(made[1][0]).max() > 1e-3
    np.testing.assert_allclose(made[3][0], made[1][0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(made[3][1], made[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_example_of_the_page_runs():
    """Catches a page that shows what no longer works: docs/policy_objectives.md."""
    page = Path(__file__).parents[2] / "docs" / "policy_objectives.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(block, str(page), "exec"), names)
    answer = np.asarray(names["answer"])
    np.testing.assert_array_equal(names["kept"], np.where(np.arange(2)[:, None] == 0, answer, -1))
    # Rewards 1 and 0 of the first row: its tokens move, those of equal rewards do not.
    moved = np.asarray(names["slope"]) != 0
    np.testing.assert_array_equal(moved, np.asarray(names["kept"]) >= 0)
    np.testing.assert_array_equal(np.asarray(names["dler"]) != 0, moved)
