"""Sampling in one loop: the same answers alone, in a batch, shared, refilled, sharded or forced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreward.core.types import Rows
from jaxreward.models import decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.sampling import autoregressive
from jaxreward.sampling.choose import Filtered, Greedy, Temperature
from jaxreward.testing import tiny_config
from jaxreward.train import plan

CFG = tiny_config(vocab=300)  # more than one block of the two-level draw
MAX_NEW = 6
NEVER = np.array([-1], np.int32)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, CFG.vocab, n) for n in (5, 3, 6, 1)]
HOT = Temperature(1.5)


def weights(cfg):
    """Large enough that the prompt decides the answer, and logits are far from equal."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: jnp.asarray(
            np.ones(p.shape) if p.init == "ones" else rng.normal(0, 0.2, p.shape), jnp.float32
        ),
        decoder.specs(cfg),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


@pytest.fixture(scope="module")
def params():
    return weights(CFG)


def left(prompts, length=6):
    """(tokens, mask) padded on the left with a token that also occurs in prompts."""
    tokens, mask = np.full((len(prompts), length), 7, np.int32), np.zeros((len(prompts), length))
    for row, flag, prompt in zip(tokens, mask, prompts):
        row[length - len(prompt) :] = prompt
        flag[length - len(prompt) :] = 1
    return tokens, mask.astype(bool)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def sample(params, prompts, key, *, length=6, cfg=CFG, **given):
    given = dict(choose=HOT, stop=NEVER, max_new=MAX_NEW) | given
    return autoregressive.sample(params, cfg, *left(prompts, length), key, **given)


def same(got, want):
    """Equal answers; log-probabilities up to the rounding of sums in another order."""
    for name in ("tokens", "length", "reason"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    for name in ("logps", "full_logps"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)


@pytest.fixture(scope="module")
def free(params):
    """Answers that nothing stops: the reference for what a stop token cuts off."""
    return sample(params, PROMPTS, keys(4))


@functools.partial(jax.jit, static_argnames="cfg")
def all_logits(params, rows, cfg):
    """The logits after every slot, without a cache."""
    h = decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, rows),
        positions=rows.positions,
        segments=rows.segments,
        trunk=rows.trunk,
    ).states
    return h @ decoder.head_matrix(params, cfg)


def forced(params, prompts, answers, temperature=1.0, cfg=CFG):
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
    logits = np.asarray(all_logits(params, rows, cfg), np.float64) / temperature
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = answers.shape[1]
    return np.stack([logps[b, len(p) - 1 : len(p) - 1 + n] for b, p in enumerate(prompts)])


@pytest.mark.parametrize("choose", [HOT, Greedy()], ids=["hot", "greedy"])
def test_logps_equal_teacher_forcing(params, choose):
    """Catches states one token late, positions that count padding, a wrong temperature, and a slot
    that goes on from another answer's keys: two slots take four answers."""
    out = sample(params, PROMPTS, keys(4), choose=choose, slots=2)
    tokens = np.asarray(out.tokens)
    at = lambda logps: np.take_along_axis(logps, tokens[..., None], axis=2)[..., 0]
    full = forced(params, PROMPTS, tokens)
    np.testing.assert_allclose(out.full_logps, at(full), atol=1e-5)
    drawn = forced(params, PROMPTS, tokens, 1.5) if choose is HOT else full
    np.testing.assert_allclose(out.logps, at(drawn), atol=1e-5)
    assert len(np.unique(tokens)) > 8  # answers that differ, or the test says little


def test_logps_under_what_is_sampled_and_under_the_whole(params):
    """Catches log-probs that are not renormalised over the tokens a filter leaves, or are so in
    `full_logps`, which a trainer compares with its own."""
    out = sample(params, PROMPTS, keys(4), choose=Filtered(1.5, 20, 0.8))
    tokens = np.asarray(out.tokens)
    at = lambda logps: np.take_along_axis(logps, tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(out.full_logps, at(forced(params, PROMPTS, tokens)), atol=1e-5)
    drawn = forced(params, PROMPTS, tokens, 1.5)
    kth = np.sort(drawn, axis=2)[..., -20:-19]
    drawn = np.where(drawn >= kth, drawn, -np.inf)
    drawn -= np.log(np.exp(drawn).sum(axis=2, keepdims=True))
    likelier = (drawn[..., None, :] > drawn[..., :, None]) * np.exp(drawn)[..., None, :]
    drawn = np.where(likelier.sum(axis=3) < 0.8, drawn, -np.inf)
    kept = np.isfinite(drawn).sum(axis=2)
    assert kept.min() < 20 and kept.max() > 5
    drawn -= np.log(np.exp(drawn).sum(axis=2, keepdims=True))
    np.testing.assert_allclose(out.logps, at(drawn), atol=1e-5)


def test_sampling_follows_the_model(params):
    """Catches any bias of the whole loop: answers of two tokens over five, against the product of
    the model's probabilities, from slots that are refilled several times."""
    cfg = tiny_config(vocab=5)
    params = weights(cfg)
    n, prompt = 4000, [1, 3]
    given = dict(cfg=cfg, choose=Temperature(2.0), samples=n, slots=1000, max_new=2)
    out = sample(params, [prompt], keys(n), length=2, **given)
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.asarray(out.tokens).T), 1)
    pairs = [np.array([a, 0]) for a in range(5)]
    logps = forced(params, [prompt] * 5, np.array(pairs), 2.0, cfg=cfg)
    chance = np.exp(logps[0, 0][:, None] + logps[:, 1])
    assert np.ptp(chance) > 0.02 and (n * chance).min() > 5
    assert stats.chisquare(counts.ravel(), n * chance.ravel() / chance.sum()).pvalue > 1e-3


def test_greedy_takes_the_most_likely_token_at_every_step(params):
    """Catches a stale cache: each greedy token must win under teacher forcing."""
    out = sample(params, PROMPTS, keys(4), choose=Greedy(), slots=2)
    tokens = np.asarray(out.tokens)
    np.testing.assert_array_equal(tokens, forced(params, PROMPTS, tokens).argmax(axis=-1))
    again = sample(params, PROMPTS, keys(4, seed=9), choose=Greedy(), slots=2)
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
        assert int(out.reason[i]) == (-1 if end is None else list(stop).index(tokens[i, end - 1]))
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

    def pick(self, logits, keys):
        jax.debug.callback(lambda: CALLS.append(1))
        return HOT.pick(logits, keys)

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


# Slots that are refilled


# Everything in attention that counts positions or bends scores, in layers of two kinds.
RICH = tiny_config(
    vocab=300, window=3, windowed=(True, False), window_theta=300.0, attn_softcap=4.0, qk_norm=True
)


@pytest.fixture(scope="module")
def many():
    """(params, inputs, answers of all lengths when every answer has its slot)."""
    params = weights(RICH)
    prompts = [*PROMPTS, RNG.integers(0, 300, 9), RNG.integers(0, 300, 2)]
    given = dict(max_new=12, choose=HOT, stop=np.arange(40, dtype=np.int32), samples=4, fill=-7)
    arrays = (*autoregressive.padded(prompts), keys(32))
    whole = autoregressive.sample(params, RICH, *arrays, **given)
    length = np.asarray(whole.length)
    assert len(set(length[:24])) > 6 and length[:24].min() == 1 and length.max() == 12
    return params, arrays, given, whole


def test_rows_without_a_prompt_get_no_answer(many):
    """Catches padding of the batch that is decoded, or counted as useful."""
    *_, whole = many
    np.testing.assert_array_equal(whole.length[24:], 0)
    np.testing.assert_array_equal(whole.tokens[24:], -7)
    assert not np.asarray(whole.finished[24:]).any() and not np.asarray(whole.logps[24:]).any()
    assert int(whole.steps) == 12 and whole.slots == 32


def test_layers_apart_change_nothing(many, monkeypatch):
    """What a CPU runs where layers are large: catches keys and values that go to another layer."""
    params, arrays, given, whole = many
    monkeypatch.setattr(decoder, "prefers_apart", lambda cfg: True)
    anew = jax.jit(
        functools.partial(autoregressive.sample.__wrapped__, cfg=RICH, slots=6, share=2, **given)
    )
    same(anew(params, prompts=arrays[0], mask=arrays[1], keys=arrays[2]), whole)


@pytest.mark.parametrize("layout", [dict(slots=8), dict(slots=6, share=2)], ids=str)
def test_answers_do_not_depend_on_slots(many, layout, monkeypatch):
    """Catches keys left by the last answer of a slot, positions, random keys or a matcher that go
    on from it, a prompt copied to the wrong lane, and windows counted in slots. With prompts run in
    passes of three, which do not divide eight: their keys must be put together in order."""
    params, arrays, given, whole = many
    if "share" in layout:
        monkeypatch.setattr(autoregressive, "PREFILL", 3 * arrays[0].shape[1])
    got = autoregressive.sample(params, RICH, *arrays, **given, **layout)
    same(got, whole)
    assert got.slots == layout["slots"]
    used = float(got.utilisation)
    assert used == pytest.approx(int(got.length.sum()) / (got.slots * int(got.steps)))
    assert used > 1.5 * float(whole.utilisation)


def test_answers_do_not_depend_on_the_order(many):
    """Catches results written in the order in which answers end, or rows mixed with empty ones."""
    params, (tokens, mask, key), given, whole = many
    order = np.array([7, 3, 5, 0, 6, 2, 4, 1])
    rows = (4 * order[:, None] + np.arange(4)).ravel()
    arrays = tokens[order], mask[order], key[rows]
    got = autoregressive.sample(params, RICH, *arrays, slots=8, **given)
    same(got, jax.tree.map(lambda x: x[rows] if x.ndim else x, whole))


def test_prompts_are_run_once(params, monkeypatch):
    """Catches a prompt that is run again for each of its answers or for each refill: while the
    program is traced, only P prompts and single tokens of W slots may go through the layers."""
    seen, backbone = [], decoder.backbone

    def noting(params, cfg, x, **kw):
        seen.append(x.shape[:2])
        return backbone(params, cfg, x, **kw)

    monkeypatch.setattr(decoder, "backbone", noting)
    autoregressive.sample.clear_cache()
    given = dict(max_new=MAX_NEW, choose=HOT, stop=NEVER, samples=3, slots=2)
    autoregressive.sample.trace(params, CFG, *left(PROMPTS), keys(12), **given)
    assert seen == [(4, 6), (2, 1)]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Answers whose lengths are drawn: each token is the last with a chance of 0.1."""

    def logits(self, logits):
        return logits

    def pick(self, logits, keys):
        draw = jax.vmap(jax.random.uniform)(keys)
        return jnp.where(draw < 0.1, 0, 1 + jnp.argmax(logits[:, 1:], axis=-1)).astype(jnp.int32)


def test_slots_are_of_use(params):
    """Catches slots that wait: of answers with long tails, lock-step decoding wastes most."""
    tokens, mask = left([RNG.integers(0, 300, 4)] * 64)
    given = dict(max_new=96, choose=Ends(), stop=np.zeros(1, np.int32), samples=4)
    out = autoregressive.sample(params, CFG, tokens, mask, keys(256), slots=16, **given)
    length = np.asarray(out.length)
    assert length.max() > 4 * length.mean() and 8 < length.mean() < 12
    assert float(out.utilisation) >= 0.85 > 3 * length.mean() / length.max()


@pytest.mark.slow
def test_compilations_are_bounded(params):
    """Catches a shape that follows the number of prompts or their lengths, and an argument that is
    static without need."""

    def run(count, longest, seed):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 300, n) for n in rng.integers(1, longest + 1, count)]
        prompts[0] = rng.integers(0, 300, longest)
        tokens, mask = autoregressive.padded(prompts)
        given = dict(max_new=4, choose=Greedy(), stop=np.array([seed, 7], np.int32), slots=2)
        autoregressive.sample(params, CFG, tokens, mask, keys(len(tokens), seed), **given)

    for size, sizes in (((8, 16), [(5, 3), (8, 16), (6, 9)]), ((4, 32), [(3, 17), (4, 32)])):
        assert autoregressive.padded([[1] * size[1]] * size[0])[0].shape == size
        with plan.compilations() as found:
            for seed, (count, longest) in enumerate(sizes):
                run(count, longest, seed)
        assert found["jit(sample)"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bytes_each"), [("bfloat16", 2), ("float32", 4)])
def test_memory_is_one_cache(monkeypatch, dtype, bytes_each):
    """Catches a second copy of pool, lanes or ring, as a buffer makes that is not updated in place,
    and a bfloat16 cache that is kept in float32 somewhere, as all are where layers are apart."""
    monkeypatch.setattr(autoregressive, "PREFILL", 512)
    monkeypatch.setattr(decoder, "prefers_apart", lambda cfg: True)
    cfg = tiny_config(vocab=300, depth=4, head_dim=32)
    shapes = jax.eval_shape(lambda: sp.init(decoder.specs(cfg), jax.random.key(0)))
    tokens, mask = np.zeros((32, 256), np.int32), np.ones((32, 256), bool)
    given = dict(max_new=128, choose=HOT, stop=NEVER, samples=2, slots=16, cache_dtype=dtype)
    program = autoregressive.sample.lower(shapes, cfg, tokens, mask, keys(64), **given)
    held = plan.memory(program.compile()).temporaries
    size = lambda *slots: 2 * cfg.depth * cfg.kv_heads * cfg.head_dim * bytes_each * sum(slots)
    pool, lanes, ring, one_pass = 32 * 256, 16 * 256, 16 * 128, 512
    whole = size(pool, lanes, ring)
    assert whole < held < 1.15 * (whole + size(one_pass)) + 2 * 2**20 < 1.5 * whole


@pytest.mark.slow
def test_a_bfloat16_cache_is_near(params):
    """Catches a cache that is rounded twice or read in bfloat16: its rounding alone moves
    log-probabilities of a float32 model by less than 0.05 here."""
    out = sample(params, PROMPTS, keys(4), slots=2, cache_dtype="bfloat16")
    tokens = np.asarray(out.tokens)
    want = np.take_along_axis(forced(params, PROMPTS, tokens), tokens[..., None], axis=2)[..., 0]
    off = np.abs(out.full_logps - want)
    assert 1e-6 < off.max() < 0.05


# Stop strings, as a table over tokens


def test_stop_strings_end_an_answer(params, free):
    """Catches a matcher that sees tokens after the end, is not reset when its slot is refilled, or
    loses to a stop id at the same token."""
    tokens = np.asarray(free.tokens)
    table = np.zeros((2, 300), np.uint8)
    # String 0: the second and third token of row 0. String 1: the fourth of row 1, at once.
    table[:, tokens[0, 1]] = 1
    table[1, tokens[0, 2]] = 2
    table[:, tokens[1, 3]] = 3
    stop = np.array([299, tokens[2, 2]], np.int32)
    want = []
    for row in tokens:
        state, end = 0, (MAX_NEW, -1)
        for n, token in enumerate(row, start=1):
            state = table[state, token]
            if token in stop or state > 1:
                end = n, list(stop).index(token) if token in stop else state
                break
        want.append(end)
    assert want[0] == (3, 2) and want[1] == (4, 3) and want[2] == (3, 1)
    out = sample(params, PROMPTS, keys(4), stop=stop, matcher=table, slots=1)
    np.testing.assert_array_equal(out.length, [n for n, _ in want])
    np.testing.assert_array_equal(out.reason, [reason for _, reason in want])
    for i, (n, _) in enumerate(want):
        np.testing.assert_array_equal(out.tokens[i, :n], tokens[i, :n])


# Several devices


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
def test_sharded_sampling_gives_the_same_answers(many, monkeypatch, apart):
    """Catches a cache or a draw that changes with the layout of weights and batch, prompts that a
    group of devices takes from another one's queue, and keys and values that travel when a lane is
    refilled: what devices send each other in the loop is far less than one prompt's cache."""
    params, (tokens, mask, key), given, whole = many
    wide = lambda x: np.pad(x, ((0, 0), (256 - x.shape[1], 0)))
    monkeypatch.setattr(autoregressive, "PREFILL", 4 * 256)
    monkeypatch.setattr(decoder, "prefers_apart", lambda cfg: apart)
    rules = Rules(make_mesh({"fsdp": 2, "tensor": 2}))
    placed = jax.device_put(params, sp.shardings(decoder.specs(RICH), rules))
    arrays = dict(prompts=wide(tokens), mask=wide(mask), keys=key, stop=given["stop"])
    how = {k: v for k, v in given.items() if k not in arrays}
    # Not the jitted function itself, which keeps what it has traced under the other layout.
    of = functools.partial(autoregressive.sample.__wrapped__, cfg=RICH, rules=rules, slots=8, **how)
    program = jax.jit(of).lower(placed, **arrays).compile()
    same(program(placed, **arrays), whole)
    moved = ("all-gather", "collective-permute")
    sent = plan.collectives(program, rules.mesh)
    inside = [c.bytes for c in sent if c.loops and c.kind in moved]
    one_prompt = 2 * RICH.depth * RICH.kv_heads * RICH.head_dim * 4 * 256
    assert inside and max(inside) < one_prompt / 4


# What does not fit


def test_errors(params):
    """What a caller can get wrong, told by name and before anything is compiled."""
    run = functools.partial(sample, params, PROMPTS, keys(12), samples=3)
    for bad in (dict(slots=4, share=3), dict(slots=4, share=2), dict(slots=0), dict(share=0)):
        with pytest.raises(ValueError, match="share must divide both samples and slots; received"):
            run(**bad)
    with pytest.raises(ValueError, match="knows 9 token ids and the model has 300; make it with"):
        run(matcher=np.zeros((1, 9), np.uint8))
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="expected prompts of at least one token"):
            autoregressive.padded(bad)
    with pytest.raises(ValueError, match="2 prompts of up to 3 tokens do not fit into 2 x 2"):
        autoregressive.padded([[1], [1, 2, 3]], rows=2, length=2)
    cache = decoder.empty_cache(CFG, 1, 4, ring=True)
    zeros = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="a ring takes one token a row at a time; received 2"):
        decoder.backbone(
            params, CFG, jnp.zeros((1, 2, 32)), positions=zeros[..., None], segments=zeros,
            trunk=zeros, cache=cache,
        )  # fmt: skip
