"""Sampling in one loop: the same answers alone, in a batch, shared, sharded or forced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core.types import Rows
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import autoregressive
from jaxreward.sampling.choose import Greedy, Temperature
from jaxreward.testing import tiny_config

CFG = tiny_config(vocab=300)  # more than one block of the two-level draw
MAX_NEW = 6
NEVER = np.array([-1], np.int32)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CFG.vocab, n) for n in (5, 3, 6, 1)]
HOT = Temperature(1.5)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the prompt decides the answer, and logits are far from equal."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.2, p.shape), jnp.float32
        ),
        decoder.specs(CFG),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


def left(prompts, length=6):
    """(tokens, mask) padded on the left with a token that also occurs in prompts."""
    tokens, mask = np.full((len(prompts), length), 7, np.int32), np.zeros((len(prompts), length))
    for row, flag, prompt in zip(tokens, mask, prompts):
        row[length - len(prompt) :] = prompt
        flag[length - len(prompt) :] = 1
    return tokens, mask.astype(bool)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def sample(params, prompts, key, *, length=6, choose=HOT, stop=NEVER, max_new=MAX_NEW, **kw):
    return autoregressive.sample(
        params, CFG, *left(prompts, length), key, max_new=max_new, choose=choose, stop=stop, **kw
    )


@pytest.fixture(scope="module")
def free(params):
    """Answers that nothing stops: the reference for what a stop token cuts off."""
    return sample(params, PROMPTS, keys(4))


@jax.jit
def all_logits(params, rows):
    """The logits after every slot, without a cache."""
    h = decoder.backbone(
        params,
        CFG,
        decoder.embed(params, CFG, rows),
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
    ).states
    return h @ decoder.head_matrix(params, CFG)


def forced(params, prompts, answers, temperature=1.0):
    """Log-probabilities [B, T, V] of every token in place of each answer token, in float64, from
    one forward pass over texts padded on the right."""
    length = 6 + answers.shape[1]
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, flag, prompt, answer in zip(tokens, mask, prompts, answers):
        n = len(prompt) + len(answer)
        row[:n], flag[:n] = np.concatenate([prompt, answer]), True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32)[:, None], (*mask.shape, 1))
    segments = mask.astype(np.int32)
    rows = Rows(tokens, mask, mask, positions, segments, np.zeros_like(segments))
    logits = np.asarray(all_logits(params, rows), np.float64) / temperature
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = answers.shape[1]
    return np.stack([logps[b, len(p) - 1 : len(p) - 1 + n] for b, p in enumerate(prompts)])


@pytest.mark.parametrize("choose", [HOT, Greedy()], ids=["hot", "greedy"])
def test_logps_equal_teacher_forcing(params, choose):
    """Catches states one token late, positions that count padding, and a wrong temperature."""
    out = sample(params, PROMPTS, keys(4), choose=choose)
    tokens = np.asarray(out.tokens)
    at = lambda logps: np.take_along_axis(logps, tokens[..., None], axis=2)[..., 0]
    full = forced(params, PROMPTS, tokens)
    np.testing.assert_allclose(out.full_logps, at(full), atol=1e-5)
    drawn = forced(params, PROMPTS, tokens, 1.5) if choose is HOT else full
    np.testing.assert_allclose(out.logps, at(drawn), atol=1e-5)
    assert len(np.unique(tokens)) > 8  # answers that differ, or the test says little


def test_greedy_takes_the_most_likely_token_at_every_step(params):
    """Catches a stale cache: each greedy token must win under teacher forcing."""
    out = sample(params, PROMPTS, keys(4), choose=Greedy())
    tokens = np.asarray(out.tokens)
    np.testing.assert_array_equal(tokens, forced(params, PROMPTS, tokens).argmax(axis=-1))
    again = sample(params, PROMPTS, keys(4, seed=9), choose=Greedy())
    np.testing.assert_array_equal(again.tokens, tokens)


def test_an_answer_depends_on_its_prompt_and_key_alone(params, free):
    """Catches draws that depend on the batch: neighbours, order, size, or amount of padding."""
    order = np.array([2, 0, 3, 1])
    moved = sample(params, [PROMPTS[i] for i in order], keys(4)[order])
    np.testing.assert_array_equal(moved.tokens, free.tokens[order])
    alone = sample(params, PROMPTS[1:2], keys(4)[1:2], length=3)  # no padding at all
    np.testing.assert_array_equal(alone.tokens[0], free.tokens[1])
    np.testing.assert_allclose(alone.logps[0], free.logps[1], atol=1e-5)
    other = sample(params, PROMPTS, keys(4, seed=5))
    assert (np.asarray(other.tokens) != np.asarray(free.tokens)).any(axis=1).all()


def test_several_answers_to_one_prompt(params):
    """Catches answers matched to the wrong prompt or key when the prompt is run once."""
    key = keys(6, seed=2)
    out = sample(params, PROMPTS[:2], key, samples=3)
    copies = sample(params, [PROMPTS[i // 3] for i in range(6)], key)
    np.testing.assert_array_equal(out.tokens, copies.tokens)
    np.testing.assert_allclose(out.full_logps, copies.full_logps, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(out.tokens)[:3].tolist()}) == 3


def test_stop_ids_end_an_answer_and_fill_follows(params, free):
    """Catches a missed stop id, an end token left out, and tokens or logps after the end."""
    tokens = np.asarray(free.tokens)
    # Row 0 ends at its third token, row 1 at its first, row 2 at its last; row 3 as it comes.
    stop = np.array([tokens[0, 2], tokens[1, 0], tokens[2, -1]], np.int32)
    out = sample(params, PROMPTS, keys(4), stop=stop, fill=299)
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop), None) for row in tokens]
    assert ends[1] == 1 and ends[0] <= 3 and ends[2] is not None
    for i, end in enumerate(ends):
        n = MAX_NEW if end is None else end
        assert int(out.length[i]) == n
        assert bool(out.finished[i]) == (end is not None)
        np.testing.assert_array_equal(out.tokens[i, :n], tokens[i, :n])
        np.testing.assert_array_equal(out.tokens[i, n:], 299)
        for name in ("logps", "full_logps"):
            np.testing.assert_allclose(getattr(out, name)[i, :n], getattr(free, name)[i, :n])
            assert not np.asarray(getattr(out, name)[i, n:]).any()


def test_nothing_stops_a_free_answer(free):
    """Catches an answer that is called finished because it ran out of room."""
    assert not np.asarray(free.finished).any()
    np.testing.assert_array_equal(free.length, MAX_NEW)


CALLS = []


@dataclasses.dataclass(frozen=True)
class Counted:
    """Temperature sampling that records each turn of the loop."""

    def __call__(self, logits, keys):
        jax.debug.callback(lambda: CALLS.append(1))
        return HOT(logits, keys)

    def logits(self, logits):
        return HOT.logits(logits)


def test_the_loop_ends_with_its_last_answer(params):
    """Catches a loop that always runs to max_new: with 60 slots it must turn only as needed."""

    def turns(stop):
        CALLS.clear()
        out = sample(params, PROMPTS, keys(4), choose=Counted(), max_new=60, stop=stop)
        jax.block_until_ready(out)
        jax.effects_barrier()
        return out, len(CALLS)

    out, count = turns(np.full(4, -1, np.int32))
    assert count == 60
    tokens = np.asarray(out.tokens)
    # Every row now ends at its fourth token at the latest, then at its first.
    out, count = turns(tokens[:, 3])
    assert np.asarray(out.finished).all()
    assert count == int(np.max(out.length)) <= 4
    out, count = turns(tokens[:, 0])
    np.testing.assert_array_equal(out.length, 1)
    assert count == 1


def test_sharded_sampling_gives_the_same_answers(params, free):
    """Catches a cache or a draw that changes with the layout of weights and batch."""
    rules = Rules(make_mesh({"fsdp": 2, "tensor": 2}))
    placed = jax.device_put(params, sp.shardings(decoder.specs(CFG), rules))
    out = sample(placed, PROMPTS, keys(4), rules=rules)
    np.testing.assert_array_equal(out.tokens, free.tokens)
    np.testing.assert_allclose(out.logps, free.logps, atol=1e-5)
