"""Rotary positions, visibility and attention, against hand-drawn masks and float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.models import attention

attend = jax.jit(attention.attend)


@functools.partial(jax.jit, static_argnums=2)
def rotary(x, positions, theta):
    return attention.rotary(x, attention.angles(positions, x.shape[-1], theta))


@pytest.fixture(params=["one tile", "tiles of 2", "tiles of 3"])
def tiling(request, monkeypatch):
    """Attention with all scores in one tile, and in tiles that do and do not divide the rows."""
    if request.param != "one tile":
        monkeypatch.setattr(attention, "SMALL", 4)
        monkeypatch.setattr(attention, "CHUNK", int(request.param[-1]))


# One row: prompt 1, its answers 2 and 3, a second prompt 4, then padding.
SEGMENTS = np.array([[1, 1, 2, 2, 3, 4, 0]], np.int32)
TRUNK = np.array([[0, 0, 1, 1, 1, 0, 0]], np.int32)


def may_see(segments, trunk, key_segments=None, offset=0, mask="causal", block=0, positions=None):
    """The visibility rule, one query and one key at a time."""
    keys = segments if key_segments is None else key_segments
    B, T = segments.shape
    see = np.zeros((B, T, keys.shape[1]), bool)
    for b, t, s in np.ndindex(*see.shape):
        own = segments[b, t] != 0 and keys[b, s] == segments[b, t]
        prompt = trunk[b, t] != 0 and keys[b, s] == trunk[b, t] and segments[b, t] != 0
        if mask == "causal":
            see[b, t, s] = (own or prompt) and s <= t + offset
        elif mask == "full":
            see[b, t, s] = own
        else:
            see[b, t, s] = own and positions[b, s] // block <= positions[b, t] // block
    return see


def reference(q, k, v, see):
    """Attention in float64, one head of one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    G = N // k.shape[1]
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(see[b, t])
        if len(keys):
            scores = k[b, n // G, keys] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, n // G, keys]
    return out


def draw(seed, B=2, T=7, S=7, N=4, K=2, H=8):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, K, S, H), (B, K, S, H)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def layout(seed, B=2, T=7):
    """Random packed rows: prompts, answers that hang from them, and padding."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    trunk = np.where(segments > 1, rng.integers(0, segments + 1), 0).astype(np.int32)
    return segments, trunk


# Rotary


def test_rotary_turns_by_the_position_with_halves_paired():
    """Catches interleaved pairing, a wrong frequency, and a wrong sign."""
    x = jnp.array([1.0, 10.0, 2.0, 20.0]).reshape(1, 1, 1, 4)
    # Frequencies 1 and theta^(-1/2) = 0.1; pairs are (0, 2) and (1, 3).
    got = rotary(x, jnp.array([[3]]), 100.0)[0, 0, 0]
    a, b = 3.0, 0.3
    want = [
        1 * np.cos(a) - 2 * np.sin(a),
        10 * np.cos(b) - 20 * np.sin(b),
        2 * np.cos(a) + 1 * np.sin(a),
        20 * np.cos(b) + 10 * np.sin(b),
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_rotary_keeps_scores_of_equal_distances():
    """Catches angles that do not add up: a score may depend on the distance alone."""
    q, k, _ = draw(0, B=1, T=1, S=1, N=1, K=1)
    score = lambda i, j: float(
        jnp.sum(rotary(q, jnp.array([[i]]), 10000.0) * rotary(k, jnp.array([[j]]), 10000.0))
    )
    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-2
    np.testing.assert_array_equal(rotary(q, jnp.array([[0]]), 10000.0), q)


def test_rotary_returns_the_dtype_it_got_but_computes_in_float32():
    """Catches angles in bfloat16, which are off by whole turns at position 1000."""
    q = draw(1, B=1, T=1)[0]
    at = jnp.array([[1001]])
    short = rotary(jnp.asarray(q, jnp.bfloat16), at, 10000.0)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(short.astype(jnp.float32), rotary(q, at, 10000.0), atol=0.03)


# Visibility


def seen(sight):
    """The square mask that a Sight stands for, without its padding."""
    queries = sight.segments, sight.trunk, sight.order, sight.place
    keys = sight.key_segments, sight.key_order, sight.key_place
    return np.asarray(attention.visible(queries, keys, sight.reach))


def test_visible_by_hand():
    """Catches answers that see each other, prompts that see answers, and visible padding."""
    got = seen(attention.sight(SEGMENTS, TRUNK))[0].astype(int)
    want = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(got, want)


def test_visible_full_sees_the_whole_segment_and_nothing_else():
    """Catches a denoiser that is still causal, that sees past its segment, or shares a prompt."""
    got = seen(attention.sight(SEGMENTS, TRUNK, mask="full"))[0].astype(int)
    np.testing.assert_array_equal(got[2], [0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(got[3], got[2])
    assert got[6].sum() == 0


def test_visible_block_sees_its_block_and_those_before():
    """Catches blocks counted from the row instead of the text, and causal order inside a block."""
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2]], np.int32)
    sight = attention.sight(segments, 0 * segments, mask="block", positions=positions, block=2)
    got = seen(sight)[0].astype(int)
    np.testing.assert_array_equal(got[0], [1, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(got[2], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(got[4], [1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(got[5], [0, 0, 0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("seed", range(5))
def test_visible_is_the_rule(seed):
    """Catches a slip in the broadcasting of segments, trunks and cache offsets."""
    segments, trunk = layout(seed)
    positions = np.random.default_rng(seed).integers(0, 9, segments.shape)
    for mask in attention.MASKS:
        kw = {"positions": positions, "block": 3} if mask == "block" else {}
        np.testing.assert_array_equal(
            seen(attention.sight(segments, trunk, mask=mask, **kw)),
            may_see(segments, trunk, mask=mask, **kw),
        )
    np.testing.assert_array_equal(
        seen(attention.sight(segments[:, 4:], trunk[:, 4:], segments, offset=4)),
        may_see(segments[:, 4:], trunk[:, 4:], segments, offset=4),
    )


def test_tiles_are_those_in_which_something_is_visible(tiling):
    """Catches a skipped tile that matters, and empty tiles that are computed."""
    segments, trunk = layout(3, T=12)
    sight = attention.sight(segments, trunk)
    if sight.tiles is None:
        return
    n = sight.sizes[0]
    whole = np.zeros((2, sight.segments.shape[1], sight.segments.shape[1]), bool)
    whole[:, :12, :12] = may_see(segments, trunk)
    want = whole.reshape(2, -1, n, whole.shape[2] // n, n).any((0, 2, 4))
    np.testing.assert_array_equal(sight.tiles, want)
    assert not want.all()


def test_unknown_mask_is_refused():
    """Catches a misspelt mask that would silently mean causal, and blocks without positions."""
    with pytest.raises(ValueError, match=r"'blocks'.*causal, full, block"):
        attention.sight(SEGMENTS, TRUNK, mask="blocks")
    with pytest.raises(ValueError, match="needs positions, block >= 1 and no cache; received bl"):
        attention.sight(SEGMENTS, TRUNK, mask="block")


# Attention


@pytest.mark.parametrize("mask", attention.MASKS)
@pytest.mark.parametrize("seed", range(2))
def test_attend_is_dense_attention(seed, mask, tiling):
    """Catches query heads read against the wrong key head, a wrong scale, and masked keys."""
    segments, trunk = layout(seed)
    positions = np.random.default_rng(seed).integers(0, 9, segments.shape)
    kw = {"positions": positions, "block": 3} if mask == "block" else {}
    see = may_see(segments, trunk, mask=mask, **kw)
    q, k, v = draw(seed)
    got = attend(q, k, v, attention.sight(segments, trunk, mask=mask, **kw))
    np.testing.assert_allclose(got, reference(q, k, v, see), atol=2e-6)


def test_attend_over_a_cache(tiling):
    """Catches an offset that is lost between tiles, and empty slots of the cache."""
    segments, trunk = layout(1, T=9)
    q, k, v = draw(1, T=5, S=9)
    part = segments[:, 4:], trunk[:, 4:], segments
    want = reference(q, k, v, may_see(*part, offset=4))
    got = attend(q, k, v, attention.sight(*part, offset=jnp.int32(4)))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_attend_without_grouping(tiling):
    """Catches folding that only works when several query heads share a key head."""
    q, k, v = draw(3, N=2, K=2)
    got = attend(q, k, v, attention.sight(*layout(3)))
    np.testing.assert_allclose(got, reference(q, k, v, may_see(*layout(3))), atol=2e-6)


def test_a_query_that_sees_nothing_gets_zero_and_a_finite_gradient(tiling):
    """Catches 0/0 on padding, which would turn every gradient of the batch into NaN."""
    q, k, v = draw(4)
    segments = np.zeros((2, 7), np.int32)
    segments[0, 3:5] = 1
    see = attention.sight(segments, 0 * segments)
    out = attend(q, k, v, see)
    assert not np.asarray(out[1]).any()
    assert not np.asarray(out[0, [0, 1, 2, 5, 6]]).any()
    grads = jax.grad(lambda *a: jnp.sum(attend(*a, see) ** 2), argnums=(0, 1, 2))(q, k, v)
    for g in grads:
        assert np.isfinite(g).all()
        assert not np.asarray(g[1]).any()
    assert np.asarray(grads[0][0, 4]).any()


def test_attend_survives_scores_of_any_size(tiling):
    """Catches exp of a raw score: at scores of thousands the largest key takes everything."""
    q, k, v = draw(5)
    ones = np.ones((2, 7), np.int32)
    sight, see = attention.sight(ones, 0 * ones), may_see(ones, 0 * ones)
    out = attend(300 * q, 300 * k, v, sight)
    np.testing.assert_allclose(out, reference(300 * q, 300 * k, v, see), atol=2e-2)
    assert np.isfinite(attend(q, -1e15 * k, v, sight)).all()


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_attend_gradient_is_the_slope_of_the_reference(mask, tiling):
    """Catches a slip in the hand-written backward pass, for each of q, k and v alone."""
    segments, trunk = layout(6)
    sight, see = attention.sight(segments, trunk, mask=mask), may_see(segments, trunk, mask=mask)
    primals, tangents = draw(6), draw(7)
    c = np.random.default_rng(8).normal(size=(2, 7, 4, 8))
    f = jax.jit(
        jax.grad(
            lambda *a: jnp.sum(c.astype(np.float32) * attention.attend(*a, sight)),
            argnums=(0, 1, 2),
        )
    )
    for which, (g, t) in enumerate(zip(f(*primals), tangents)):
        step = 1e-5
        value = []
        for sign in (1, -1):
            moved = [p.astype(np.float64) for p in primals]
            moved[which] = moved[which] + sign * step * t
            value.append(np.sum(c * reference(*moved, see)))
        assert float(jnp.vdot(g, t)) == pytest.approx((value[0] - value[1]) / (2 * step), rel=1e-4)


def test_log_normaliser_and_its_gradient(tiling):
    """Catches a backward pass that ignores the log-normaliser, on which merged parts depend."""
    segments, trunk = layout(2)
    sight, see = attention.sight(segments, trunk), may_see(segments, trunk)
    q, k, v = draw(2)
    live = see.any(axis=2)[:, :, None, None]

    def dense(q, k):
        scores = jnp.einsum("btkgh,bksh->btkgs", q.reshape(2, 7, 2, 2, 8), k) / np.sqrt(8)
        scores = jnp.where(see[:, :, None, None], scores, -jnp.inf)
        return jnp.where(live, jax.nn.logsumexp(jnp.where(live[..., None], scores, 0), -1), 0)

    ours = lambda q, k: attention.attend_part(q, k, v, sight, 8**-0.5)[1].reshape(2, 7, 2, 2)
    np.testing.assert_allclose(np.where(live, ours(q, k), 0), dense(q, k), atol=2e-6)
    c = np.random.default_rng(9).normal(size=(2, 7, 2, 2)).astype(np.float32)
    slope = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(jnp.where(live, c * f(*a), 0)), (0, 1)))
    for a, b in zip(slope(ours)(q, k), slope(dense)(q, k)):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_attend_keeps_the_dtype_of_its_inputs(tiling):
    """Catches float32 leaking out of the softmax into a bfloat16 model, and sums in bfloat16."""
    q, k, v = draw(9)
    ones = np.ones((2, 7), np.int32)
    sight = attention.sight(ones, 0 * ones)
    short = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = attend(*short, sight)
    assert out.dtype == jnp.bfloat16
    want = reference(q, k, v, may_see(ones, 0 * ones))
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.05)
    grads = jax.grad(lambda *a: attend(*a, sight).astype(jnp.float32).sum(), (0, 1, 2))(*short)
    assert all(g.dtype == jnp.bfloat16 for g in grads)


def of_prompt(mask, segments, **kw):
    """What answers see of prompts whose tokens stand at the places of the mask."""
    at = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
    places = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
    return attention.shared_sight(places + mask.shape[1], mask, at, **kw)


def prompt_case(seed):
    """Three answers to each of two prompts; the two parts have scores of different sizes."""
    q, k, v = draw(seed, B=6, T=2, S=2)
    _, trunk_k, trunk_v = draw(seed + 1, B=2, S=5)
    trunk_k[1] *= 6
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)
    segments = np.ones((6, 2), np.int32)
    see = np.concatenate(
        [mask[:, None].repeat(2, 1).repeat(3, 0), may_see(segments, 0 * segments)], axis=2
    )
    return (q, k, v, trunk_k, trunk_v), mask, segments, see


def copied(q, k, v, trunk_k, trunk_v):
    """The same attention with the prompt's keys and values copied in front of each answer."""
    return q, *(
        np.concatenate([a.repeat(3, 0), b], axis=2) for a, b in ((trunk_k, k), (trunk_v, v))
    )


def test_shared_prompt_is_the_same_as_its_copies(tiling):
    """Catches rows matched to the wrong prompt, and a wrong merge of the two softmax parts."""
    arrays, mask, segments, see = prompt_case(10)
    q, k, v, trunk_k, trunk_v = arrays
    shared = (trunk_k, trunk_v, of_prompt(mask, segments))
    out = attend(q, k, v, attention.sight(segments, 0 * segments), trunk=shared)
    np.testing.assert_allclose(out, reference(*copied(*arrays), see), atol=2e-6)


def test_gradient_through_a_shared_prompt(tiling):
    """Catches a prompt whose slope comes from one answer only, and a merge that is not undone."""
    arrays, mask, segments, see = prompt_case(14)
    tangents, _, _, _ = prompt_case(16)
    c = np.random.default_rng(8).normal(size=(6, 2, 4, 8))

    def total(q, k, v, trunk_k, trunk_v):
        sight = attention.sight(segments, 0 * segments)
        shared = (trunk_k, trunk_v, of_prompt(mask, segments))
        out = attention.attend(q, k, v, sight, trunk=shared)
        return jnp.sum(c.astype(np.float32) * out)

    grads = jax.jit(jax.grad(total, argnums=range(5)))(*arrays)
    for which in range(5):
        value = []
        for sign in (1e-5, -1e-5):
            moved = [x.astype(np.float64) for x in arrays]
            moved[which] = moved[which] + sign * tangents[which]
            value.append(np.sum(c * reference(*copied(*moved), see)))
        slope = float(np.vdot(grads[which], tangents[which]))
        assert slope == pytest.approx((value[0] - value[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_shared_prompt_with_one_part_empty(tiling):
    """Catches NaN when a row sees only the prompt, only itself, or nothing at all."""
    q, k, v = draw(12, B=2, T=2, S=2)
    _, trunk_k, trunk_v = draw(13, B=2, S=4)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    segments = np.array([[0, 1], [0, 1]], np.int32)
    sight = attention.sight(segments, 0 * segments)
    shared = (trunk_k, trunk_v, of_prompt(mask, segments))
    f = jax.jit(lambda q: attention.attend(q, k, v, sight, trunk=shared))
    see = np.concatenate([mask[:, None].repeat(2, 1), may_see(segments, 0 * segments)], axis=2)
    whole = (np.concatenate(pair, axis=2) for pair in ((trunk_k, k), (trunk_v, v)))
    np.testing.assert_allclose(f(q), reference(q, *whole, see), atol=2e-6)
    assert not np.asarray(f(q)[1, 0]).any()
    assert np.isfinite(jax.grad(lambda q: jnp.sum(f(q) ** 2))(q)).all()


# Windows, soft caps, scales

# A prompt (1), two answers that hang from it (2, 3), a text of its own (4): places in the texts.
PLACES = np.array([[0, 1, 2, 3, 2, 0, 0]], np.int32)


def test_window_by_hand(tiling):
    """Catches a window counted over the row: the second answer stands next to its prompt's end."""
    got = seen(attention.sight(SEGMENTS, TRUNK, positions=PLACES, window=2))[0][:7, :7]
    want = [
        "1......",
        "11.....",
        ".11....",
        "..11...",
        ".1..1..",
        ".....1.",
        ".......",
    ]
    assert ["".join(".1"[int(x)] for x in row) for row in got] == want


def test_window_needs_what_it_reads():
    """Catches a window that is silently ignored."""
    with pytest.raises(ValueError, match="positions missing"):
        attention.sight(SEGMENTS, TRUNK, window=2)
    with pytest.raises(ValueError, match="mask='full'"):
        attention.sight(SEGMENTS, TRUNK, window=2, mask="full", positions=PLACES)
    with pytest.raises(ValueError, match="key_positions missing"):
        attention.sight(SEGMENTS, TRUNK, SEGMENTS, window=2, positions=PLACES)


@pytest.mark.parametrize("local", [True, False])
def test_layers_of_two_kinds(tiling, local):
    """Catches tiles or a reach of the other kind of layer."""
    q, k, v = draw(20, B=1)
    windowed = attention.sight(SEGMENTS, TRUNK, positions=PLACES, window=2)
    whole = attention.sight(SEGMENTS, TRUNK)
    sight = attention.either(jnp.bool_(local), windowed, whole)
    see = seen(windowed if local else whole)[:, :7, :7]
    np.testing.assert_allclose(attend(q, k, v, sight), reference(q, k, v, see), atol=2e-6)


def test_window_over_a_shared_prompt(tiling):
    """Catches answers that see all of a prompt, or another part of it than its copies show."""
    arrays, mask, segments, _ = prompt_case(21)
    q, k, v, trunk_k, trunk_v = arrays
    at = np.broadcast_to(np.array([5, 6], np.int32), segments.shape)
    sight = attention.sight(segments, 0 * segments, positions=at, window=4)
    shared = (trunk_k, trunk_v, of_prompt(mask, segments, window=4))
    see = np.zeros((6, 2, 7), bool)
    for t in range(2):
        see[:, t, 5 : 6 + t] = True
        see[:, t, :5] = mask.repeat(3, 0) & (5 + t - np.arange(5) < 4)
    out = attend(q, k, v, sight, trunk=shared)
    np.testing.assert_allclose(out, reference(*copied(*arrays), see), atol=2e-6)


def test_scale_and_softcap(tiling):
    """Catches a cap before the scale, over the mask, or one that the gradient forgets."""
    q, k, v = draw(22)
    q *= 4
    ones = np.ones((2, 7), np.int32)
    sight, see = attention.sight(ones, 0 * ones), may_see(ones, 0 * ones)

    def dense(q, k, v):
        scores = jnp.einsum("btkgh,bksh->btkgs", q.reshape(2, 7, 2, 2, 8), k) * 0.3
        scores = 1.5 * jnp.tanh(scores / 1.5)
        scores = jnp.where(see[:, :, None, None], scores, -jnp.inf)
        return jnp.einsum("btkgs,bksh->btkgh", jax.nn.softmax(scores), v).reshape(q.shape)

    ours = lambda q, k, v: attention.attend(q, k, v, sight, scale=0.3, softcap=1.5)
    np.testing.assert_allclose(jax.jit(ours)(q, k, v), dense(q, k, v), atol=2e-6)
    c = np.random.default_rng(23).normal(size=q.shape).astype(np.float32)
    slope = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(c * f(*a)), (0, 1, 2)))(q, k, v)
    for a, b in zip(slope(ours), slope(dense)):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_stretched_frequencies_by_hand():
    """Catches the ramp of Llama 3.1 upside down, and linear scaling of the wrong sign."""
    plain = attention.frequencies(8, 1e4)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    linear = attention.frequencies(8, 1e4, attention.Scaling("linear", 4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    # Over 1000 positions: 159, 15.9, 1.59 and 0.159 turns; between 1 and 4 lies the third.
    got = attention.frequencies(8, 1e4, attention.Scaling("llama3", 8.0, 1.0, 4.0, 1000))
    keep = (10 / (2 * np.pi) - 1) / 3
    want = [1, 0.1, 0.01 * ((1 - keep) / 8 + keep), 0.001 / 8]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_long_rows_keep_no_square_matrix():
    """Catches scores or a mask of a whole row, forward or backward: what runs out first."""
    T = 1024
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 2, 4), (1, 1, T, 4)))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def slope(q, k, v, segments, trunk):
        total = lambda *a: jnp.sum(attention.attend(*a, attention.sight(segments, trunk)))
        return jax.grad(total, argnums=(0, 1))(q, k, v)

    text = jax.jit(slope).lower(q, k, k, ids, ids).as_text()
    # Two query heads share the one key head, and so a tile's rows; keys come first in its scores.
    assert f"{attention.CHUNK}x{2 * attention.CHUNK}xf32" in text
    assert f"{T}x{T}x" not in text
