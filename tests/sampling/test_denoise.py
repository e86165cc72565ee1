"""Denoising in one loop: against a plain reference of each schedule, and what must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoiser import pair_model

from jaxreward.core.types import Rows
from jaxreward.diffusion import trajectory
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import denoise
from jaxreward.testing import tiny_config
from jaxreward.train import plan

MASK, END, L = 39, 5, 8
CFG = tiny_config(vocab=40, mask="full", mask_id=MASK, predict_offset=0)
SHIFTED = dataclasses.replace(CFG, predict_offset=1)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(6, 38, n) for n in (5, 3, 6, 1)]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.25, p.shape), jnp.float32
        ),
        decoder.specs(CFG),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


def left(prompts, length=6):
    tokens, mask = np.full((len(prompts), length), 7, np.int32), np.zeros((len(prompts), length))
    for row, flag, prompt in zip(tokens, mask, prompts):
        row[length - len(prompt) :] = prompt
        flag[length - len(prompt) :] = 1
    return tokens, mask.astype(bool)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def sample(params, prompts, key, schedule, *, cfg=CFG, length=6):
    return denoise.sample(params, cfg, *left(prompts, length), key, schedule=schedule)


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, tokens, cfg):
    ones = jnp.ones_like(tokens)
    places = jnp.arange(tokens.shape[1])[None, :, None]
    rows = Rows(tokens, ones > 0, ones > 0, places, ones, 0 * ones)
    hidden = decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, rows),
        positions=places,
        segments=ones,
        trunk=0 * ones,
    )
    return decoder.logits(hidden.states, decoder.head_matrix(params, cfg), cfg)


def logits_of(params, canvas, prompt, cfg, guidance):
    """Logits that predict each slot of one row without padding, float64[T, V]."""
    run = lambda x: np.asarray(_logits(params, jnp.asarray(x)[None], cfg)[0], np.float64)
    found = run(canvas)
    if guidance:
        bare = canvas.copy()
        bare[:prompt] = MASK
        without = run(bare)
        found = without + (guidance + 1) * (found - without)
    return np.concatenate([found[:1], found[:-1]]) if cfg.predict_offset else found


def reference(params, prompt, *, cfg=CFG, block=L, steps=L, guidance=0.0, last=(), linear=False,
              order="confidence"):  # fmt: skip
    """LLaDA's and Dream's loops, greedy, one row, as their authors' code has them."""
    P = len(prompt)
    canvas = np.concatenate([prompt, np.full(L, MASK)]).astype(np.int32)
    reveal, step = np.full(P + L, -1), 0
    turns = steps // (L // block)
    times = np.linspace(1, 1e-3, steps + 1)
    for first in range(P, P + L, block):
        for turn in range(turns):
            logits = logits_of(params, canvas, P, cfg, guidance)
            logits[:, MASK] = -1e9
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            token = logits.argmax(-1)
            ranked = np.sort(p, axis=-1)
            confidence = dict(
                confidence=p.max(-1),
                margin=ranked[:, -1] - ranked[:, -2],
                entropy=(p * np.log(np.maximum(p, 1e-30))).sum(-1),
            )[order]
            confidence = np.where(np.isin(token, last), confidence - 100, confidence)
            open_ = (reveal < 0) & (np.arange(P + L) >= first) & (np.arange(P + L) < first + block)
            if linear:
                share = 1 - times[step + 1] / times[step]
                count = int(open_.sum() * share) if step + 1 < steps else open_.sum()
            else:
                count = block // turns + (turn < block % turns)
            best = np.argsort(np.where(open_, -confidence, np.inf), kind="stable")[:count]
            canvas[best], reveal[best] = token[best], step
            step += 1
    return canvas, reveal


CASES = {
    "pure diffusion": (CFG, denoise.llada(L, 4), dict(steps=4)),
    "uneven blocks": (CFG, denoise.llada(L, 6, block=4), dict(block=4, steps=6)),
    "shifted": (SHIFTED, denoise.llada(L, 4, block=4), dict(block=4, steps=4)),
    "guided": (
        CFG,
        denoise.llada(L, 4, block=4, guidance=1.5),
        dict(block=4, steps=4, guidance=1.5),
    ),
    "ends last": (
        CFG,
        denoise.llada(L, L, ends="last", end_ids=tuple(range(20))),
        dict(last=range(20)),
    ),
    "dream, entropy": (
        SHIFTED,
        denoise.dream(L, 5, temperature=0.0),
        dict(steps=5, linear=True, order="entropy"),
    ),
    "dream, margin": (
        SHIFTED,
        denoise.dream(L, 3, temperature=0.0, order="margin"),
        dict(steps=3, linear=True, order="margin"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(params, case):
    """Batched, padded and in one program: the tokens and steps of a loop over one row."""
    cfg, schedule, kw = CASES[case]
    got = sample(params, PROMPTS, keys(4), schedule, cfg=cfg)
    for i, prompt in enumerate(PROMPTS):
        canvas, reveal = reference(params, prompt, cfg=cfg, **kw)
        np.testing.assert_array_equal(got.tokens[i, 6:], canvas[len(prompt) :], err_msg=str(i))
        np.testing.assert_array_equal(got.reveal[i, 6:], reveal[len(prompt) :], err_msg=str(i))
    assert int(got.step) == int(got.whole) == schedule.steps


HOT = denoise.llada(L, 4, block=4, temperature=1.0, order="random")


@pytest.fixture(scope="module")
def hot(params):
    return sample(params, PROMPTS, keys(4), HOT)


def test_what_every_sample_keeps(hot):
    """The prompt stays, no mask is left, and no step touches another block than its own."""
    tokens, mask = left(PROMPTS)
    np.testing.assert_array_equal(hot.tokens[:, :6], tokens)
    np.testing.assert_array_equal(hot.segments[:, :6] > 0, mask)
    assert not np.asarray(hot.open).any()
    reveal = np.asarray(hot.reveal)
    assert (reveal[:, :6] == -1).all()
    assert set(reveal[:, 6:10].ravel()) == {0, 1}
    assert set(reveal[:, 10:].ravel()) == {2, 3}


def test_a_row_depends_on_its_prompt_and_key_alone(params, hot):
    """Neighbours, padding and order do not show; another key does."""
    order = [2, 0]
    some = sample(params, [PROMPTS[i] for i in order], keys(4)[jnp.array(order)], HOT, length=9)
    for row, i in enumerate(order):
        np.testing.assert_array_equal(some.tokens[row, 9:], hot.tokens[i, 6:])
        np.testing.assert_allclose(some.logps[row, 9:], hot.logps[i, 6:], atol=1e-5)
    other = sample(params, PROMPTS, keys(4, 1), HOT)
    assert (np.asarray(other.tokens) != np.asarray(hot.tokens)).any()


def test_log_probabilities_are_those_of_each_step(params, hot):
    """What was reported equals the model run again on the state that `state_at` rebuilds."""
    for step in range(4):
        before = trajectory.state_at(hot, step, MASK)
        new = np.asarray(trajectory.committed(hot, step, step + 1))
        for i, prompt in enumerate(PROMPTS):
            P = len(prompt)
            row = np.asarray(before[i])[6 - P :]
            logits = logits_of(params, row, P, CFG, 0)
            full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            logits[:, MASK] = -1e9
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            at = new[i, 6 - P :]
            assert at.sum() == 2
            for got, want in ((hot.logps, logp), (hot.full_logps, full)):
                want = want[np.arange(P + L), np.asarray(hot.tokens[i])[6 - P :]]
                np.testing.assert_allclose(np.asarray(got[i])[6 - P :][at], want[at], atol=1e-5)


def test_going_on_in_parts_is_the_same(params, hot):
    """A search stops in the midst of a block and goes on."""
    canvas = denoise.begin(*left(PROMPTS), HOT, CFG)
    for steps in (1, 2, 5):
        canvas = denoise.advance(params, CFG, canvas, keys(4), steps, schedule=HOT)
    np.testing.assert_array_equal(canvas.tokens, hot.tokens)
    np.testing.assert_array_equal(canvas.reveal, hot.reveal)


def test_drafts_are_what_the_step_predicted(params):
    """A draft has no mask, keeps what was committed, and agrees with what its step committed."""
    schedule = dataclasses.replace(HOT, every=2)
    got = sample(params, PROMPTS, keys(4), schedule)
    assert got.drafts.shape == (2, 4, 6 + L)
    assert (np.asarray(got.drafts)[:, :, 6:] != MASK).all()
    for g, end in enumerate((2, 4)):
        done = np.asarray(trajectory.committed(got, 0, end))
        np.testing.assert_array_equal(got.drafts[g][done], got.tokens[done])


def test_a_threshold_commits_more_at_once(params):
    """At 1 one token a step, as the exact schedule of as many steps; at 0+ a block a step."""
    exact = sample(params, PROMPTS, keys(4), denoise.llada(L, L, block=4))
    slow = sample(params, PROMPTS, keys(4), denoise.llada(L, L, block=4, threshold=1.0))
    np.testing.assert_array_equal(slow.tokens, exact.tokens)
    assert int(slow.step) == L
    fast = sample(params, PROMPTS, keys(4), denoise.llada(L, L, block=4, threshold=1e-6))
    assert int(fast.step) == 2
    assert not np.asarray(fast.open).any()


@pytest.mark.parametrize("cache, cfg", [("prefix", CFG), ("dual", SHIFTED)])
def test_caches_change_nothing_where_nothing_is_stale(params, cache, cfg):
    """One step a block reads no cache; with more, a block's first step is exact."""
    once = denoise.llada(L, 2, block=4)
    want = sample(params, PROMPTS, keys(4), once, cfg=cfg)
    got = sample(params, PROMPTS, keys(4), dataclasses.replace(once, cache=cache), cfg=cfg)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    more = denoise.llada(L, 8, block=4, cache=cache)
    got = sample(params, PROMPTS, keys(4), more, cfg=cfg)
    assert int(got.step) == 8
    assert int(got.whole) == 2
    assert not np.asarray(got.open).any()
    # The first token of the first block was chosen before anything could be stale.
    first = np.asarray(got.reveal) == 0
    once = denoise.llada(L, 8, block=4, every=8)
    exact = sample(params, PROMPTS, keys(4), once, cfg=cfg)
    np.testing.assert_array_equal(first, np.asarray(exact.reveal) == 0)
    np.testing.assert_array_equal(np.asarray(got.tokens)[first], np.asarray(exact.tokens)[first])


def test_a_cache_is_filled_before_it_is_read(params):
    """Parts that begin with a block are `sample`; one that begins inside a block fills it anew."""
    schedule = denoise.llada(L, 8, block=4, cache="dual")
    whole = sample(params, PROMPTS, keys(4), schedule)
    canvas = denoise.begin(*left(PROMPTS), schedule, CFG)
    part = functools.partial(denoise.advance, params, CFG, schedule=schedule)
    halves = part(part(canvas, keys(4), 4), keys(4), 4)
    np.testing.assert_array_equal(halves.tokens, whole.tokens)
    for steps in (2, 3, 3):
        canvas = part(canvas, keys(4), steps)
    assert int(canvas.whole) == 4
    assert not np.asarray(canvas.open).any()


def test_dual_cache_sees_its_own_block(params):
    """Within a block keys are new: with the whole canvas as one block and nothing stale outside
    but the prompt's states, a model of one layer samples exactly the same."""
    one = dataclasses.replace(CFG, depth=1)
    lower, _ = decoder.split_params(params, 1)
    shallow = {**params, "layers": lower["layers"]}
    exact = sample(shallow, PROMPTS, keys(4), denoise.llada(L, 4), cfg=one)
    got = sample(shallow, PROMPTS, keys(4), denoise.llada(L, 4, cache="dual"), cfg=one)
    np.testing.assert_array_equal(got.tokens, exact.tokens)
    np.testing.assert_allclose(got.logps, exact.logps, atol=1e-5)


def test_ends_never_are_not_sampled(params):
    banned = tuple(range(30))
    got = sample(params, PROMPTS, keys(4), denoise.llada(L, 4, ends="never", end_ids=banned))
    assert not np.isin(np.asarray(got.tokens[:, 6:]), banned).any()


def test_pairs_need_a_second_step():
    """Two positions that must agree: half of the one-step answers are wrong, none of two steps."""
    params, cfg = pair_model()
    prompts = np.full((400, 1), 3, np.int32), np.ones((400, 1), bool)
    of = lambda steps: denoise.sample(
        params,
        cfg,
        *prompts,
        keys(400),
        schedule=denoise.llada(2, steps, temperature=1.0),
    )
    agree = lambda got: float((got.tokens[:, 1] == got.tokens[:, 2]).mean())
    assert agree(of(2)) == 1.0
    assert abs(agree(of(1)) - 0.5) < 0.1


def test_origin_reveals_independently(params):
    """Each position by itself: over many rows the first step commits about 1 - s / t."""
    prompts = [PROMPTS[0]] * 64
    schedule = denoise.dream(L, 4, order="origin", temperature=1.0, top_p=1.0)
    got = sample(params, prompts, keys(64), schedule)
    assert not np.asarray(got.open).any()
    assert abs((np.asarray(got.reveal[:, 6:]) == 0).mean() - 0.25) < 0.08


def test_order_temperature_draws_positions(params):
    """A high one commits anywhere, a low one the most confident."""
    prompts = [PROMPTS[0]] * 64
    of = lambda t: sample(params, prompts, keys(64), denoise.llada(L, L, order_temperature=t))
    exact = sample(params, prompts[:1], keys(1), denoise.llada(L, L))
    first = np.asarray(exact.reveal[0, 6:])
    assert (np.asarray(of(1e-6).reveal[:, 6:]) == first).all()
    counts = np.bincount(np.argmin(np.asarray(of(100.0).reveal[:, 6:]), axis=1), minlength=L)
    assert counts.min() >= 1


def test_in_chunks_is_the_same(params, hot, monkeypatch):
    """Logits of a few positions at a time: the same candidates."""
    monkeypatch.setattr(denoise, "LOGITS", 4 * CFG.vocab * 3)
    again = sample(params, PROMPTS, keys(4), dataclasses.replace(HOT, eps=0.5))  # compiles anew
    np.testing.assert_array_equal(again.tokens, hot.tokens)


def test_layers_apart_change_nothing(params, hot, monkeypatch):
    """What a CPU runs where layers are large."""
    monkeypatch.setattr(decoder, "prefers_apart", lambda cfg: True)
    again = sample(params, PROMPTS, keys(4), dataclasses.replace(HOT, eps=0.25))  # compiles anew
    np.testing.assert_array_equal(again.tokens, hot.tokens)


def test_sharded_is_the_same(params, hot):
    rules = Rules(make_mesh({"data": 2, "tensor": 2}))
    got = denoise.sample(params, CFG, *left(PROMPTS), keys(4), schedule=HOT, rules=rules)
    np.testing.assert_array_equal(got.tokens, hot.tokens)


def test_one_program_serves_all_blocks(params):
    """Four blocks or one: one compilation each, and the head meets only the block's states."""
    with plan.compilations() as counts:
        sample(params, PROMPTS, keys(4), denoise.llada(L, 8, block=2, temperature=0.5))
    assert counts["jit(sample)"] == 1, counts


BAD = {
    "does not split into blocks of 3": lambda: denoise.llada(8, 8, block=3),
    "do not divide over 2 blocks": lambda: denoise.llada(8, 3, block=4),
    "a step commits at least one": lambda: denoise.llada(8, 16),
    "unknown order='best'": lambda: denoise.llada(8, 8, order="best"),
    "know one block": lambda: denoise.llada(8, 8, block=4, order="origin"),
    "needs end_ids": lambda: denoise.llada(8, 8, ends="last"),
    "threshold is a probability": lambda: denoise.llada(8, 8, threshold=2.0),
    "`every` must divide": lambda: denoise.llada(8, 8, every=3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_schedules_say_what_to_do(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BAD[message]()


def test_bad_models_and_prompts(params):
    causal = dataclasses.replace(CFG, mask="causal")
    with pytest.raises(ValueError, match="needs a denoiser with a mask token"):
        sample(params, PROMPTS, keys(4), HOT, cfg=causal)
    with pytest.raises(ValueError, match="the model knows 10 positions"):
        sample(params, PROMPTS, keys(4), HOT, cfg=dataclasses.replace(CFG, max_len=10))
    nothing = np.zeros((1, 0), np.int32), np.zeros((1, 0), bool)
    with pytest.raises(ValueError, match="give it a prompt"):
        denoise.sample(params, SHIFTED, *nothing, keys(1), schedule=HOT)
