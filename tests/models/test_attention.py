"""Rotary positions, visibility and attention, against hand-drawn masks and float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.models import attention

attend = jax.jit(attention.attend)
rotary = jax.jit(attention.rotary, static_argnums=2)

# One row: prompt 1, its answers 2 and 3, a second prompt 4, then padding.
SEGMENTS = np.array([[1, 1, 2, 2, 3, 4, 0]], np.int32)
TRUNK = np.array([[0, 0, 1, 1, 1, 0, 0]], np.int32)


def may_see(segments, trunk, key_segments, offset=0, mask="causal"):
    """The visibility rule, one query and one key at a time."""
    B, T = segments.shape
    see = np.zeros((B, T, key_segments.shape[1]), bool)
    for b, t, s in np.ndindex(*see.shape):
        own = segments[b, t] != 0 and key_segments[b, s] == segments[b, t]
        prompt = trunk[b, t] != 0 and key_segments[b, s] == trunk[b, t]
        see[b, t, s] = own if mask == "full" else (own or prompt) and s <= t + offset
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


def test_visible_by_hand():
    """Catches answers that see each other, prompts that see answers, and visible padding."""
    got = attention.visible(SEGMENTS, TRUNK, SEGMENTS)[0].astype(int)
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
    """Catches a denoiser that is still causal, or that sees past its segment."""
    got = attention.visible(SEGMENTS, np.zeros_like(TRUNK), SEGMENTS, mask="full")[0].astype(int)
    np.testing.assert_array_equal(got[2], [0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(got[3], got[2])
    assert got[6].sum() == 0


@pytest.mark.parametrize("seed", range(5))
def test_visible_is_the_rule(seed):
    """Catches a slip in the broadcasting of segments, trunks and cache offsets."""
    segments, trunk = layout(seed)
    for mask in attention.MASKS:
        np.testing.assert_array_equal(
            attention.visible(segments, trunk, segments, mask=mask),
            may_see(segments, trunk, segments, mask=mask),
        )
    np.testing.assert_array_equal(
        attention.visible(segments[:, 4:], trunk[:, 4:], segments, offset=4),
        may_see(segments[:, 4:], trunk[:, 4:], segments, offset=4),
    )


def test_unknown_mask_is_refused():
    """Catches a misspelt mask that would silently mean causal."""
    with pytest.raises(ValueError, match=r"'block'.*causal, full"):
        attention.visible(SEGMENTS, TRUNK, SEGMENTS, mask="block")


# Attention


@pytest.mark.parametrize("seed", range(3))
def test_attend_is_dense_attention(seed):
    """Catches query heads read against the wrong key head, a wrong scale, and masked keys."""
    segments, trunk = layout(seed)
    see = may_see(segments, trunk, segments)
    q, k, v = draw(seed)
    want = reference(q, k, v, see)
    np.testing.assert_allclose(attend(q, k, v, see), want, atol=2e-6)


def test_attend_without_grouping():
    """Catches folding that only works when several query heads share a key head."""
    q, k, v = draw(3, N=2, K=2)
    see = may_see(*layout(3), layout(3)[0])
    np.testing.assert_allclose(attend(q, k, v, see), reference(q, k, v, see), atol=2e-6)


def test_a_query_that_sees_nothing_gets_zero_and_a_finite_gradient():
    """Catches 0/0 on padding, which would turn every gradient of the batch into NaN."""
    q, k, v = draw(4)
    see = np.zeros((2, 7, 7), bool)
    see[0, 3, :2] = True
    out = attend(q, k, v, see)
    assert not np.asarray(out[1]).any()
    assert not np.asarray(out[0, [0, 1, 2, 4, 5, 6]]).any()
    grads = jax.grad(lambda *a: jnp.sum(attend(*a, see) ** 2), argnums=(0, 1, 2))(q, k, v)
    for g in grads:
        assert np.isfinite(g).all()
        assert not np.asarray(g[1]).any()
    assert np.asarray(grads[0][0, 3]).any()


def test_attend_survives_scores_of_any_size():
    """Catches exp of a raw score: at scores of thousands the largest key takes everything."""
    q, k, v = draw(5)
    see = np.tril(np.ones((7, 7), bool))[None].repeat(2, 0)
    out = attend(300 * q, 300 * k, v, see)
    np.testing.assert_allclose(out, reference(300 * q, 300 * k, v, see), atol=2e-2)
    assert np.isfinite(attend(q, -1e15 * k, v, see)).all()


def test_attend_gradient_is_the_slope_of_the_reference():
    """Catches a broken backward pass (the stopped maximum, the masked weights)."""
    segments, trunk = layout(6)
    see = may_see(segments, trunk, segments)
    primals, tangents = draw(6), draw(7)
    c = np.random.default_rng(8).normal(size=(2, 7, 4, 8))
    f = lambda *a: jnp.sum(c.astype(np.float32) * attend(*a, see))
    grads = jax.grad(f, argnums=(0, 1, 2))(*primals)
    slope = sum(float(jnp.vdot(g, t)) for g, t in zip(grads, tangents))
    step = 1e-5
    moved = lambda sign: [p.astype(np.float64) + sign * step * t for p, t in zip(primals, tangents)]
    value = lambda a: np.sum(c * reference(*a, see))
    assert slope == pytest.approx((value(moved(1)) - value(moved(-1))) / (2 * step), rel=1e-4)


def test_attend_keeps_the_dtype_of_its_inputs():
    """Catches float32 leaking out of the softmax into a bfloat16 model, and sums in bfloat16."""
    q, k, v = draw(9)
    see = np.tril(np.ones((7, 7), bool))[None].repeat(2, 0)
    out = attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), see)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), reference(q, k, v, see), atol=0.05)


def test_shared_prompt_is_the_same_as_its_copies():
    """Catches rows matched to the wrong prompt, and a wrong merge of the two softmax parts."""
    P, B, S = 2, 6, 5  # three answers to each of two prompts
    q, k, v = draw(10, B=B, T=2, S=3)
    _, trunk_k, trunk_v = draw(11, B=P, S=S)
    # Different sizes of scores in the two parts: the merge must rescale both.
    trunk_k[1] *= 6
    mask = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]], bool)
    own = np.array([[1, 0, 0], [1, 1, 0]], bool)[None].repeat(B, 0)
    out = attend(q, k, v, own, trunk=(trunk_k, trunk_v, mask))
    whole_k, whole_v = (
        np.concatenate([a.repeat(3, 0), b], axis=2) for a, b in ((trunk_k, k), (trunk_v, v))
    )
    see = np.concatenate([mask[:, None].repeat(2, 1).repeat(3, 0), own], axis=2)
    np.testing.assert_allclose(out, reference(q, whole_k, whole_v, see), atol=2e-6)


def test_shared_prompt_with_one_part_empty():
    """Catches NaN when a row sees only the prompt, only itself, or nothing at all."""
    q, k, v = draw(12, B=2, T=2, S=3)
    _, trunk_k, trunk_v = draw(13, B=2, S=4)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    own = np.zeros((2, 2, 3), bool)
    own[0, 1, 0] = own[1, 1, 0] = True
    f = lambda q: attend(q, k, v, own, trunk=(trunk_k, trunk_v, mask))
    see = np.concatenate([mask[:, None].repeat(2, 1), own], axis=2)
    whole = (np.concatenate(pair, axis=2) for pair in ((trunk_k, k), (trunk_v, v)))
    np.testing.assert_allclose(f(q), reference(q, *whole, see), atol=2e-6)
    assert not np.asarray(f(q)[1, 0]).any()
    assert np.isfinite(jax.grad(lambda q: jnp.sum(f(q) ** 2))(q)).all()


@pytest.mark.parametrize("T", [6, 7])
def test_long_rows_in_chunks_are_the_same(monkeypatch, T):
    """Catches a chunk that sees another's keys, padding that leaks, and a gradient lost between."""
    q, k, v = (jnp.asarray(x) for x in draw(11, T=T, S=T))
    see = jnp.asarray(may_see(*layout(12, T=T), layout(12, T=T)[0]))
    see = see.at[0, 2].set(False)

    def value_and_slopes():
        def total(q, k, v):
            out = attention.attend(q, k, v, see)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    whole, out = value_and_slopes()
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "CHUNK", 2)
    chunked, got = value_and_slopes()
    np.testing.assert_allclose(got, reference(q, k, v, np.asarray(see)), atol=1e-6)
    np.testing.assert_allclose(got, out, atol=1e-6)
    for a, b in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_long_rows_keep_no_square_matrix():
    """Catches scores of a whole row, forward or backward: [T, T] floats are what runs out first."""
    T = 1024
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, 2, 4), (1, 1, T, 4)))
    see = jax.ShapeDtypeStruct((1, T, T), bool)
    slope = jax.grad(lambda q, k, v, see: jnp.sum(attention.attend(q, k, v, see)), argnums=(0, 1))
    text = jax.jit(slope).lower(q, k, k, see).as_text()
    # Two query heads share the one key head, and so a chunk's rows.
    assert f"{2 * attention.CHUNK}x{T}xf32" in text
    assert f"{T}x{T}xf32" not in text
