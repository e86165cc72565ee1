"""Token verification: copy by copy, on a model known exactly, and what must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_denoiser import MASK, PROMPT, A, B, pair_model

from jaxreward.core.types import Rows
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import drafts
from jaxreward.testing import tiny_config

HIDDEN, L, P = 19, 5, 4
CFG = tiny_config(vocab=20, depth=1, mask="full", mask_id=HIDDEN, predict_offset=0)
# In blocks of positions, so that padding must not count as positions.
SHIFTED = dataclasses.replace(CFG, mask="block", block=3, predict_offset=1)
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 18, n + L) for n in (4, 2, 1)]
# Which of the answer's positions the step predicted: several, one, none.
OPEN = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.4, p.shape), jnp.float32
        ),
        decoder.specs(CFG),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


def batch(texts, open_, prompt=P):
    """(drafts, segments, candidates), padded on the left with what must not be read."""
    tokens = np.full((len(texts), prompt + L), 7, np.int32)
    segments, live = np.zeros_like(tokens), np.ones(tokens.shape, bool)
    for row, seg, text in zip(tokens, segments, texts):
        row[-len(text) :], seg[-len(text) :] = text, 1
    live[:, prompt:] = open_
    return tokens, segments, live & ((segments == 0) | (np.arange(prompt + L) >= prompt))


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, cfg, tokens, segments):
    places = jnp.broadcast_to(jnp.arange(P + L), tokens.shape)[..., None]
    rows = Rows(tokens, segments > 0, segments > 0, places, segments, 0 * segments)
    kw = dict(positions=places, segments=segments, trunk=rows.trunk)
    states = decoder.backbone(params, cfg, decoder.embed(params, cfg, rows), **kw).states
    return decoder.logits(states, decoder.head_matrix(params, cfg), cfg)


def copy_by_copy(params, cfg, text, open_):
    """Log-probability of each open token, its text at the left; the loop is over copies."""
    places = len(text) - L + np.flatnonzero(open_)
    copies = np.tile(np.pad(text, (0, P + L - len(text))), (L, 1))
    for copy, at in zip(copies, places):
        copy[at] = HIDDEN
    segments = np.tile(np.arange(P + L) < len(text), (L, 1)).astype(np.int32)
    logits = np.array(_logits(params, cfg, copies, segments), np.float64)
    logits[..., HIDDEN] = -np.inf
    found = [z[at - cfg.predict_offset] for z, at in zip(logits, places)]
    return np.array([z[text[at]] - np.log(np.exp(z).sum()) for z, at in zip(found, places)])


@pytest.mark.parametrize(("cfg", "log"), [(CFG, False), (SHIFTED, True)], ids=["plain", "shifted"])
def test_all_samples_are_the_mean_over_copies(params, cfg, log):
    """Catches the state of another slot, positions that count padding, the mask's probability, a
    mean over copies that mask nothing, and a draft without candidates that is called bad."""
    given = batch(TEXTS, OPEN)
    got = drafts.verification(params, cfg, *given, keys(3), samples=L, log=log)
    assert got.dtype == jnp.float32
    for i in (0, 1):
        want = copy_by_copy(params, cfg, TEXTS[i], OPEN[i])
        np.testing.assert_allclose(got[i], (want if log else np.exp(want)).mean(), rtol=1e-4)
    assert got[2] == (0.0 if log else 1.0)


def test_samples_are_different_positions_each_as_often(params):
    """Catches drawing with replacement, from the whole row, or not evenly: of three values each
    result is the mean of two."""
    n = 300
    given = batch([TEXTS[0]] * n, OPEN[:1])
    got = np.asarray(drafts.verification(params, CFG, *given, keys(n), samples=2))
    a, b, c = np.exp(copy_by_copy(params, CFG, TEXTS[0], OPEN[0]))
    near = np.isclose(got[:, None], np.array([a + b, a + c, b + c]) / 2, rtol=1e-4)
    assert (near.sum(axis=1) == 1).all()
    assert (abs(near.mean(axis=0) - 1 / 3) < 0.1).all()


def test_neighbours_padding_passes_and_mesh_do_not_matter(params, monkeypatch):
    """Catches keys by row or by slot, and rows that passes exchange, drop or make up."""
    open_ = np.ones((3, L), bool)
    order = [2, 0]
    some = batch([TEXTS[i] for i in order], open_[:2], prompt=7)
    alone = drafts.verification(params, CFG, *some, keys(3)[jnp.array(order)], samples=2)
    # Four rows of nine slots a pass: six copies are two passes, of which the second is filled up.
    monkeypatch.setattr(drafts, "PASS", 4 * (P + L))
    rules = Rules(make_mesh({"data": 2, "tensor": 2}))
    run = functools.partial(drafts.verification.__wrapped__, samples=2, rules=rules)
    whole = jax.jit(run, static_argnums=1)(params, CFG, *batch(TEXTS, open_), keys(3))
    np.testing.assert_allclose(alone, whole[jnp.array(order)], atol=1e-5)


def test_pairs_that_agree_and_pairs_that_do_not():
    """A model that copies the partner: 1 for a draft that it would write itself, 0 for one that
    independent draws have spoilt."""
    params, cfg = pair_model()
    pairs = np.array([[PROMPT, A, A], [PROMPT, B, B], [PROMPT, A, B], [PROMPT, B, A]])
    live = np.arange(3) > np.zeros((4, 1), int)
    got = drafts.verification(params, cfg, pairs, np.ones_like(pairs), live, keys(4))
    np.testing.assert_allclose(got, [1, 1, 0, 0], atol=1e-5)


def test_errors_say_what_to_do():
    params, cfg = pair_model()
    row = np.array([[PROMPT, A, MASK]])
    of = functools.partial(drafts.verification, drafts=row, segments=row, candidates=row > 0,
                           keys=keys(1))  # fmt: skip
    with pytest.raises(ValueError, match="needs a denoiser with a mask token"):
        of(params, dataclasses.replace(cfg, mask="causal"))
    with pytest.raises(ValueError, match="at least 1 sample a draft; received 0"):
        of(params, cfg, samples=0)
