"""The decoder: one value however it is computed, laid out, cached or sharded; and its HF side."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import trees
from jaxreward.core.types import Rows
from jaxreward.models import attention, decoder
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.testing import tiny_config

CFG = tiny_config()
RNG = np.random.default_rng(0)
PROMPT, FIRST, SECOND = (RNG.integers(0, CFG.vocab, n) for n in (4, 3, 5))
LENGTH = 12
# The same random direction wherever a slot is read: [slots, width].
DIRECTION = RNG.normal(size=(LENGTH, CFG.width)).astype(np.float32)


def weights(cfg, seed=0):
    """Large weights, so that attention and rotation decide the result; drawn by NumPy."""
    rng = np.random.default_rng(seed)
    scale = lambda p: (1.0, 0.3) if p.init == "ones" else (0.0, 0.2)
    return jax.tree.map(
        lambda p: rng.normal(*scale(p), size=p.shape).astype(np.float32),
        decoder.specs(cfg),
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


# Everything that a family may have and Llama has not, in layers of two kinds.
RICH = tiny_config(
    bias=True,
    qk_norm=True,
    post_norms=True,
    plus_one=True,
    embed_scale=True,
    act="gelu_tanh",
    query_scalar=5.0,
    attn_softcap=4.0,
    window=3,
    windowed=(True, False),
    window_theta=300.0,
    rope_scaling=attention.Scaling("llama3", 4.0, 1.0, 4.0, 64),
)


@pytest.fixture(scope="module", params=["plain", "rich"])
def cfg(request):
    """Every property holds for the plainest and for the richest decoder."""
    return CFG if request.param == "plain" else RICH


@pytest.fixture(scope="module")
def params(cfg):
    return jax.tree.map(jnp.asarray, weights(cfg))


@pytest.fixture(scope="module")
def plain():
    return jax.tree.map(jnp.asarray, weights(CFG))


def rows(*texts, batch=4):
    """Rows of parts (tokens, segment, trunk, first position); segment 0 is padding.

    Rows of padding fill the batch up to one size, so that few shapes are compiled.
    """
    made = []
    length = sum(len(part[0]) for part in texts[0])
    for parts in [*texts, *[[pad(length)]] * (batch - len(texts))]:
        ids, segment, trunk, positions = [], [], [], []
        for tokens, s, t, start in parts:
            n = len(tokens)
            ids += list(tokens)
            segment += [s] * n
            trunk += [t] * n
            positions += [start + i if s else 0 for i in range(n)]
        made.append((ids, segment, trunk, positions))
    ids, segment, trunk, positions = (np.array(x, np.int32) for x in zip(*made))
    return Rows(ids, segment > 0, segment > 0, positions[..., None], segment, trunk).validate()


def pad(n):
    return (np.full(n, 7), 0, 0, 0)


def outputs(params, cfg, batch, rules=None, ends=None):
    return decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, batch, rules=rules),
        positions=batch.positions,
        segments=batch.segments,
        trunk=batch.trunk,
        rules=rules,
        ends=ends,
    ).states


@functools.partial(jax.jit, static_argnames=("cfg",))
def states(params, batch, cfg=CFG):
    return outputs(params, cfg, batch)


@functools.partial(jax.jit, static_argnames=("cfg", "rules"))
def slope(params, batch, weight, cfg=CFG, rules=None):
    """States, and the gradient of a random linear function of them."""

    def f(params):
        out = outputs(params, cfg, batch, rules)
        return jnp.sum(weight * out), out

    grads, out = jax.grad(f, has_aux=True)(params)
    return {"states": out, "gradient": grads}


def close(a, b, tolerance=1e-5):
    """Trees equal up to `tolerance` times their own largest entry."""
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), err_msg=path)


@pytest.fixture(scope="module")
def batch():
    """Four rows with everything in them: padding, packing, and answers to a shared prompt."""
    tree = [(PROMPT, 1, 0, 0), (FIRST, 2, 1, 4), (SECOND, 3, 1, 4)]
    packed = [(SECOND, 1, 0, 0), (PROMPT, 2, 0, 0), (FIRST, 3, 0, 0)]
    left = [pad(4), (FIRST, 1, 0, 0), (SECOND, 1, 0, 3)]
    right = [(PROMPT, 5, 0, 0), (FIRST, 6, 5, 4), pad(5)]
    return rows(tree, packed, left, right)


# What is computed


def numpy_states(params, cfg, tokens):
    """One unpadded text through the decoder in float64, from the formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    norm = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * s
    T, half = len(tokens), cfg.head_dim // 2
    angle = np.arange(T)[:, None] * cfg.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)

    def rotate(x):
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    x = p["embed"]["table"][tokens]
    for i in range(cfg.depth):
        w = jax.tree.map(lambda a: a[i], p["layers"])
        h = norm(x, w["attn_norm"]["scale"])
        for n in range(cfg.heads):
            group = n // (cfg.heads // cfg.kv_heads)
            q = rotate(h @ w["attn"]["q"]["kernel"][:, n])
            k = rotate(h @ w["attn"]["k"]["kernel"][:, group])
            v = h @ w["attn"]["v"]["kernel"][:, group]
            scores = q @ k.T / np.sqrt(cfg.head_dim)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + weights @ v @ w["attn"]["o"]["kernel"][n]
        h = norm(x, w["mlp_norm"]["scale"])
        gate = h @ w["mlp"]["gate"]["kernel"]
        up = h @ w["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp"]["down"]["kernel"]
    return norm(x, p["norm"]["scale"])


def test_states_are_the_formulas(plain):
    """Catches any change of the arithmetic: norms, rotation, grouping, SwiGLU, residuals."""
    tokens = RNG.integers(0, CFG.vocab, LENGTH)
    got = states(plain, rows([(tokens, 1, 0, 0)]))[0]
    want = numpy_states(plain, CFG, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "change",
    [{"scan": False}, {"remat": "none"}, {"remat": "full"}],
    ids=["unrolled", "none", "full"],
)
def test_scan_and_remat_change_nothing(cfg, params, batch, change):
    """Catches an unrolled or recomputed block that differs from the scanned one."""
    weight = np.broadcast_to(DIRECTION, (4, *DIRECTION.shape))
    changed = dataclasses.replace(cfg, **change)
    close(slope(params, batch, weight, cfg=changed), slope(params, batch, weight, cfg=cfg))


def test_padding_changes_nothing(cfg, params):
    """Catches padding that is attended to, or positions counted from the slot."""
    alone = states(params, rows([(SECOND, 1, 0, 0)], batch=1), cfg=cfg)[0]
    both = states(
        params,
        rows([pad(7), (SECOND, 1, 0, 0)], [(SECOND, 3, 0, 0), pad(7)]),
        cfg=cfg,
    )
    close({"": both[0, 7:]}, {"": alone})
    close({"": both[1, :5]}, {"": alone})
    assert np.isfinite(both).all()


def test_packing_changes_nothing(cfg, params):
    """Catches texts of one row that see each other."""
    other = RNG.integers(0, CFG.vocab, 7)
    packed = states(params, rows([(other, 1, 0, 0), (SECOND, 2, 0, 0)]), cfg=cfg)[0]
    alone = states(params, rows([(other, 1, 0, 0), pad(5)], [(SECOND, 1, 0, 0), pad(7)]), cfg=cfg)
    close({"": packed[:7]}, {"": alone[0, :7]})
    close({"": packed[7:]}, {"": alone[1, :5]})


def test_shared_prompt_equals_its_copies(cfg, params):
    """Catches a tree mask or positions that make a pair score differently when packed."""
    tree = rows([(PROMPT, 1, 0, 0), (FIRST, 2, 1, 4), (SECOND, 3, 1, 4)])
    copies = rows(
        [(PROMPT, 1, 0, 0), (FIRST, 1, 0, 4), pad(5)],
        [(PROMPT, 1, 0, 0), (SECOND, 1, 0, 4), pad(3)],
    )
    # Only answers are read, so that the prompt's gradient comes through both of them.
    weight, unshared = np.zeros((2, 4, LENGTH, CFG.width), np.float32)
    weight[0, 4:] = DIRECTION[4:]
    unshared[0, 4:7], unshared[1, 4:9] = DIRECTION[4:7], DIRECTION[7:]
    want, got = slope(params, copies, unshared, cfg=cfg), slope(params, tree, weight, cfg=cfg)
    close({"": got["states"][0, :7]}, {"": want["states"][0, :7]})
    close({"": got["states"][0, 7:]}, {"": want["states"][1, 4:9]})
    close(got["gradient"], want["gradient"])


def test_ends_alone_are_those_of_all_slots(cfg, params):
    """Catches an end that sees less or more than its segment and trunk, and one that is no slot."""
    if any(cfg.windowed):
        cfg = dataclasses.replace(cfg, windowed=(False, True), scan=False)
    tree = rows(
        [(PROMPT, 1, 0, 0), (FIRST, 2, 1, 4), (SECOND, 3, 1, 4)],
        [(SECOND, 1, 0, 0), (PROMPT, 2, 0, 0), pad(3)],
        batch=2,
    )
    ends = np.array([[6, 11, -1], [8, -1, 4]], np.int32)
    whole = np.asarray(states(params, tree, cfg=cfg))
    got = np.asarray(jax.jit(outputs, static_argnums=1)(params, cfg, tree, ends=ends))
    want = np.where(ends[..., None] < 0, 0.0, whole[np.arange(2)[:, None], ends])
    close({"": got}, {"": want})
    assert got.shape == (2, 3, cfg.width) and np.ptp(want) > 1
    if cfg.scan:
        spread = jax.jit(outputs, static_argnums=(1, 3))
        rules = Rules(make_mesh({"fsdp": 2, "tensor": 2}))
        placed = jax.device_put(params, sp.shardings(decoder.specs(cfg), rules))
        close({"": spread(placed, cfg, tree, rules, ends=ends)}, {"": want})


def test_positions_decide(plain):
    """Catches a test above that passes because positions are ignored: running on must differ."""
    tree = [(PROMPT, 1, 0, 0), (FIRST, 2, 1, 4)]
    restarted = states(plain, rows([*tree, (SECOND, 3, 1, 4)]))[0, 7:]
    running = states(plain, rows([*tree, (SECOND, 3, 1, 7)]))[0, 7:]
    assert np.abs(restarted - running).max() > 1e-2


def test_full_mask_sees_the_future_and_causal_does_not(plain):
    """Catches a denoiser config that still runs the causal mask, and a causal leak."""
    text = RNG.integers(0, CFG.vocab, LENGTH)
    changed = np.where(np.arange(LENGTH) == LENGTH - 1, (text + 1) % CFG.vocab, text)
    both = rows([(text, 1, 0, 0)], [(changed, 1, 0, 0)])
    causal = states(plain, both)
    np.testing.assert_array_equal(causal[0, :-1], causal[1, :-1])
    full = states(plain, both, cfg=tiny_config(mask="full"))
    assert np.abs(full[0] - full[1]).max(axis=-1).min() > 1e-3


def test_bfloat16_computes_in_bfloat16_near_float32(plain, batch):
    """Catches a float32 leak (the result would be float32) and norms taken in bfloat16."""
    short = states(plain, batch, cfg=tiny_config(compute="bfloat16"))
    assert short.dtype == jnp.bfloat16
    live = np.asarray(batch.mask)
    full = np.asarray(states(plain, batch))[live]
    error = np.asarray(short, np.float32)[live] - full
    assert np.sqrt((error**2).mean() / (full**2).mean()) < 0.05


def test_features_replace_the_embedding(plain, batch):
    """Catches cached inputs that are ignored, or looked up again."""
    x = decoder.embed(plain, CFG, batch)
    doubled = decoder.embed(plain, CFG, batch.replace(features=2 * x))
    np.testing.assert_array_equal(doubled, 2 * x)


# Cache


@functools.partial(jax.jit, static_argnames=("cfg",))
def step(params, batch, cache, cfg=CFG):
    hidden = decoder.backbone(
        params,
        cfg,
        decoder.embed(params, cfg, batch),
        positions=batch.positions,
        segments=batch.segments,
        trunk=batch.trunk,
        cache=cache,
    )
    return hidden.states, hidden.cache


def cut(batch, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], batch)


@pytest.mark.parametrize("layers", ["scanned", "unrolled", "apart"])
def test_cache_equals_teacher_forcing(cfg, params, layers):
    """Catches keys written to the wrong slot or layer, a layer apart from its window or sight, and
    a causal mask without its offset."""
    cfg = dataclasses.replace(cfg, scan=layers == "scanned")
    texts = [RNG.integers(0, CFG.vocab, n) for n in (12, 9, 7)]
    batch = rows(*([pad(12 - len(t)), (t, 1, 0, 0)] for t in texts))  # the fourth row is empty
    want = np.asarray(states(params, batch, cfg=cfg))
    cache = decoder.empty_cache(cfg, 4, 14)  # two slots are never filled
    if layers == "apart":
        params, cache = decoder.apart(params), cache.apart()
        np.testing.assert_allclose(np.asarray(states(params, batch, cfg=cfg)), want, atol=1e-5)
    got, cache = step(params, cut(batch, 0, 8), cache, cfg=cfg)
    parts = [got]
    for t in range(8, 12):
        got, cache = step(params, cut(batch, t, t + 1), cache, cfg=cfg)
        parts.append(got)
    assert int(cache.length) == 12
    got = np.concatenate(parts, axis=1)
    live = np.asarray(batch.mask)
    np.testing.assert_allclose(got[live], want[live], atol=1e-5)


@pytest.mark.parametrize("apart", ["nothing", "cache", "both"])
def test_answers_go_on_from_one_cached_prompt(cfg, params, apart):
    """Catches answers that read another prompt's keys, its padding, or each other's."""
    prompts = [RNG.integers(0, CFG.vocab, n) for n in (8, 5)]
    answers = [RNG.integers(0, CFG.vocab, 4) for _ in range(6)]
    first = rows(*([pad(8 - len(p)), (p, 1, 0, 0)] for p in prompts), batch=2)
    _, cache = step(params, first, decoder.empty_cache(cfg, 2, 8), cfg=cfg)
    cache = decoder.empty_cache(cfg, 6, 4, trunk=cache)
    whole_params = params
    params = decoder.apart(params) if apart == "both" else params
    cache = cache if apart == "nothing" else cache.apart()
    later = rows(*([(a, 1, 0, len(prompts[i // 3]))] for i, a in enumerate(answers)))
    parts = []
    for t in range(4):
        got, cache = step(params, cut(later, t, t + 1), cache, cfg=cfg)
        parts.append(got)
    whole = rows(
        *(
            [(np.concatenate([prompts[i // 3], a]), 1, 0, 0), pad(8 - len(prompts[i // 3]))]
            for i, a in enumerate(answers)
        )
    )
    want = np.asarray(states(whole_params, whole, cfg=cfg))
    assert want.shape[:2] == (6, 12)
    for i, got in enumerate(np.concatenate(parts, axis=1)):
        n = len(prompts[i // 3])
        np.testing.assert_allclose(got, want[i, n : n + 4], atol=1e-5)


# Sharding


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}],
    ids=["data4", "fsdp2-tensor2", "data2-fsdp2"],
)
def test_sharded_equals_single_device(cfg, params, batch, sizes):
    """Catches a layout that changes values: sums over the wrong axis, gradients counted twice."""
    rules = Rules(make_mesh(sizes))
    weight = np.broadcast_to(DIRECTION, (4, *DIRECTION.shape))
    placed = jax.device_put(params, sp.shardings(decoder.specs(cfg), rules))
    over = jax.sharding.NamedSharding(rules.mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    batch_placed = jax.device_put(batch, over)
    got = slope(placed, batch_placed, jax.device_put(weight, over), cfg=cfg, rules=rules)
    close(got, slope(params, batch, weight, cfg=cfg))


# Structure


def test_split_and_join_are_inverse():
    """Catches a layer that is lost or doubled at the cut, and parts that miss a norm or a table."""
    cfg = tiny_config(tied=False)
    whole = weights(cfg)
    for at in (1, 2):
        lower, upper = decoder.split_params(whole, at)
        lower_cfg, upper_cfg = decoder.split(cfg, at)
        sp.check(lower, decoder.specs(lower_cfg))
        sp.check(upper, decoder.specs(upper_cfg))
        joined = decoder.join_params(lower, upper)
        assert trees.flatten(joined).keys() == trees.flatten(whole).keys()
        jax.tree.map(np.testing.assert_array_equal, joined, whole)


@pytest.mark.parametrize("at", [0, 3])
def test_split_outside_the_model_is_refused(at):
    """Catches a cut that would leave one part without layers below it."""
    with pytest.raises(ValueError, match=f"cannot split 2 layers at {at}; choose 1 to 2"):
        decoder.split(CFG, at)


def test_lower_and_upper_part_make_the_whole(cfg, params, batch):
    """Catches a norm applied in the middle, or twice."""
    lower, upper = decoder.split_params(params, 1)
    lower_cfg, upper_cfg = decoder.split(cfg, 1)
    middle = states(lower, batch, cfg=lower_cfg)
    got = states(upper, batch.replace(features=middle), cfg=upper_cfg)
    close({"": got}, {"": states(params, batch, cfg=cfg)})


def test_unsupported_inputs_are_refused(plain, batch):
    """Catches per-layer inputs and three-axis positions that would be dropped silently."""
    call = functools.partial(
        decoder.backbone,
        plain,
        CFG,
        np.zeros((4, LENGTH, CFG.width), np.float32),
        segments=batch.segments,
        trunk=batch.trunk,
    )
    with pytest.raises(ValueError, match="no per-layer inputs"):
        call(positions=batch.positions, layer_xs={"window": np.zeros(2)})
    with pytest.raises(ValueError, match="one rotary axis; positions have 3"):
        call(positions=np.repeat(batch.positions, 3, axis=2))
    with pytest.raises(ValueError, match="ends of segments need mask='causal' and no cache"):
        decoder.backbone(
            *(plain, dataclasses.replace(CFG, mask="full"), call.args[2]),
            positions=batch.positions,
            segments=batch.segments,
            trunk=batch.trunk,
            ends=np.zeros((4, 1), np.int32),
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kv_heads": 3}, "4 heads do not share 3 key heads"),
        ({"mask": "block"}, "mask='block'"),
        ({"act": "relu"}, "unknown act 'relu'"),
        ({"windowed": (True, False)}, "received window=0"),
        ({"windowed": (True,) * 2, "window": 4, "mask": "full"}, "mask='full'"),
        ({"windowed": (True,), "window": 4}, "1 flags for 2 layers"),
    ],
)
def test_impossible_configs_are_refused(change, text):
    """Catches a config error that would surface as a shape error deep inside a jit."""
    with pytest.raises(ValueError, match=text):
        tiny_config(**change)


def test_logits_are_capped():
    """Catches a cap that sampling or scoring leaves out."""
    states, head = np.array([[1.0, -2.0]], np.float32), np.array([[30.0], [0.0]], np.float32)
    plain = decoder.logits(states, head, CFG)
    capped = decoder.logits(states, head, dataclasses.replace(CFG, logit_softcap=10.0))
    np.testing.assert_allclose(plain, [[30.0]])
    np.testing.assert_allclose(capped, [[10 * np.tanh(3.0)]], rtol=1e-6)
