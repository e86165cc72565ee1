"""Search while denoising: against plain sampling, and on a model whose one-step answers fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoiser import MASK, PROMPT, A, pair_model

from jaxreward.diffusion import trajectory
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.sampling import denoise, drafts, search
from jaxreward.testing import tiny_config

CFG = tiny_config(vocab=20, depth=1, mask="full", mask_id=19, predict_offset=0)
L, P, EVERY, WIDTH = 4, 3, 2, 3
SCHEDULE = denoise.llada(L, 4, temperature=1.0, order="random")
PROMPTS = np.array([[7, 1, 2], [3, 4, 5], [7, 7, 6], [1, 9, 9]], np.int32)
THERE = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]], bool)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.3, p.shape), jnp.float32
        ),
        decoder.specs(CFG),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def likes(canvas, group):
    """Low tokens: how far the predicted answer lies below 20, a whole number."""
    return (20 - canvas.drafts[group][:, P:]).sum(axis=1)


def found(params, order=slice(None), *, reward=likes, **kw):
    kw = dict(schedule=SCHEDULE, every=EVERY, width=WIDTH) | kw
    return search.search(params, CFG, PROMPTS[order], THERE[order], keys(4)[order], reward, **kw)


@pytest.fixture(scope="module")
def searched(params):
    """(found, the canvas of every group as the reward saw it)."""
    seen = []

    def reward(canvas, group):
        seen.append(canvas)
        return likes(canvas, group)

    return found(params, reward=reward), seen


def test_equal_rewards_are_plain_sampling(params):
    """Catches keys that change between groups, a schedule that begins anew, and a tie that goes to
    another than the first: the search is then what a width of 1 is, the keys fold_in(key, 0)."""
    got = found(params, reward=lambda canvas, group: jnp.zeros(4 * WIDTH))
    own = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys(4))
    own = jnp.repeat(own, WIDTH)  # rows that make it the program that the search has run
    plain = dataclasses.replace(SCHEDULE, every=EVERY)
    start = denoise.begin(PROMPTS.repeat(WIDTH, 0), THERE.repeat(WIDTH, 0), plain, CFG)
    whole = denoise.advance(params, CFG, start, own, plain.steps, schedule=plain)
    want = search.take(whole, np.arange(4) * WIDTH)
    for (name, mine), plain in zip(vars(got.canvas).items(), vars(want).values(), strict=True):
        if mine is not None:
            np.testing.assert_array_equal(mine, plain, err_msg=name)
    assert not got.chosen.any()


def test_the_kept_continuation_has_the_highest_reward(params, searched):
    """Catches rewards read in another order than rows, a tie that goes to the last, and a canvas
    of which only some fields follow: all that was done in a group stays in the next."""
    got, seen = searched
    assert got.rewards.shape == (2, 4, WIDTH) and got.chosen.shape == (2, 4)
    np.testing.assert_array_equal(got.chosen, got.rewards.argmax(axis=2))
    assert (got.rewards.max(axis=2) > got.rewards.min(axis=2)).any()
    after = [*seen[1:], got.canvas]
    for group, (canvas, later) in enumerate(zip(seen, after)):
        np.testing.assert_array_equal(got.rewards[group].ravel(), likes(canvas, group))
        kept = np.arange(4) * WIDTH + got.chosen[group]
        kept = np.repeat(kept, len(later.tokens) // 4)
        done = np.asarray(canvas.reveal[kept] >= 0)
        for name in ("tokens", "reveal", "logps", "full_logps"):
            mine, same = (np.asarray(getattr(c, name)) for c in (canvas, later))
            np.testing.assert_array_equal(same[done], mine[kept][done], err_msg=name)
        for name in ("segments", "given"):
            np.testing.assert_array_equal(getattr(later, name), getattr(canvas, name)[kept])
        np.testing.assert_array_equal(later.drafts[group], canvas.drafts[group][kept])
    np.testing.assert_array_equal(got.canvas.tokens[:, :P], PROMPTS)
    assert not np.asarray(got.canvas.open).any()


def test_prompts_do_not_see_each_other(params, searched):
    """Catches continuations that are dealt out to other prompts."""
    order = np.array([2, 0, 3, 1])
    got = found(params, order)
    np.testing.assert_array_equal(got.canvas.tokens, searched[0].canvas.tokens[order])
    np.testing.assert_array_equal(got.chosen, searched[0].chosen[:, order])
    np.testing.assert_array_equal(got.rewards, searched[0].rewards[:, order])


def test_verification_repairs_decoding_in_one_step():
    """Half of the pairs that one step draws do not agree; the draft that verifies best does. A
    reward that knows nothing of pairs gets what it asks for and repairs nothing."""
    params, cfg = pair_model()
    n, width = 64, 8
    given = np.full((n, 1), PROMPT, np.int32), np.ones((n, 1), bool)
    once = denoise.llada(2, 1, temperature=1.0)
    kw = dict(schedule=once, every=1, width=width)
    of = lambda reward: search.search(params, cfg, *given, keys(n), reward, **kw).canvas.tokens
    agree = lambda tokens: float((tokens[:, 1] == tokens[:, 2]).mean())
    liked = lambda tokens: np.asarray(tokens[:, 1:] == A).sum(axis=1)

    def verified(canvas, group):
        live = trajectory.state_at(canvas, group, MASK) == MASK
        row = canvas.drafts[group], canvas.segments, live, keys(len(live), 1)
        return drafts.verification(params, cfg, *row)

    plain = of(lambda canvas, group: np.zeros(n * width))
    assert abs(agree(plain) - 0.5) < 0.2
    assert agree(of(verified)) > 0.95
    more = of(lambda canvas, group: liked(canvas.tokens))
    assert (liked(more) >= liked(plain)).all()
    assert liked(more).mean() > liked(plain).mean() + 0.5


def test_take_carries_states_along_their_rows():
    """Catches states indexed by step, and a canvas without drafts."""
    canvas = denoise.begin(PROMPTS, THERE, SCHEDULE, CFG)
    states, rows = jnp.arange(5 * 4 * 7).reshape(5, 4, 7), np.array([3, 3, 0])
    got = search.take(canvas.replace(states=states), rows)
    assert got.drafts is None
    np.testing.assert_array_equal(got.states, states[:, rows])
    np.testing.assert_array_equal(got.segments, canvas.segments[rows])


def test_pseudo_labels_are_the_majority_of_each_prompt():
    """Catches votes for what could not be read, and for answers to another prompt."""
    answers = [["2", "3", "3"], [None, None, "3"], ["4", "2", None, "2", "4"], [None], []]
    assert search.pseudo_labels(answers) == ["3", "3", "4", None, None]


def test_errors_say_what_was_expected(params):
    """Catches one number for all rows, groups that lose steps, and a NaN that would win."""
    with pytest.raises(ValueError, match="`every` must divide"):
        found(params, every=3)
    with pytest.raises(ValueError, match="at least 1; received every=0, width=3"):
        found(params, every=0)
    with pytest.raises(ValueError, match="goes with neither cache nor threshold"):
        found(params, schedule=dataclasses.replace(SCHEDULE, cache="dual"))
    with pytest.raises(ValueError, match=r"each of the 4 \* 3 rows .* received an array \(4,\)"):
        found(params, reward=lambda canvas, group: np.zeros(4))
    with pytest.raises(ValueError, match="a score is NaN"):
        found(params, reward=lambda canvas, group: np.full(12, np.nan))
