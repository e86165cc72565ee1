"""Token log-probabilities against float64, torch-free: values, gradients, memory, packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.objectives import supervised


def draw(seed, B=2, S=5, D=6, V=23):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, S, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        rng.integers(0, V, (B, S)).astype(np.int32),
    )


def dense(states, head, targets, temperature=1.0):
    """Both outputs the plain way, from all logits."""
    logps = jax.nn.log_softmax(states @ head / temperature, axis=-1)
    picked = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
    return picked, -jnp.sum(jnp.exp(logps) * logps, axis=-1)


def test_logps_and_entropy_by_hand():
    """Catches a wrong normaliser and entropy in the wrong unit or sign."""
    states, head = jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    logps, entropy = supervised.token_logps(states, head, jnp.array([[2]]))
    p = np.array([1, 2, 5]) / 8
    np.testing.assert_allclose(logps, [[np.log(5 / 8)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-(p * np.log(p)).sum()]], rtol=1e-6)


# 23 entries: whole, slices that need padding, single columns.
@pytest.mark.parametrize("chunk", [None, 23, 8, 5, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_slices_of_the_vocabulary_change_nothing(chunk, temperature):
    """Catches columns counted twice or never, a padded column in the sum, a forgotten rescale."""
    states, head, targets = draw(0)
    head[:, 5] += 3  # a late maximum: what was summed before must be rescaled
    got = supervised.token_logps(states, head, targets, temperature=temperature, chunk=chunk)
    for a, b in zip(got, dense(states, head, targets, temperature)):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("chunk", [None, 8, 5])
@pytest.mark.parametrize("which", ["logps", "entropy", "both"])
def test_gradients_are_those_of_the_dense_formula(which, chunk):
    """Catches a slip in the hand-written backward pass of either output."""
    states, head, targets = draw(1)
    c, d = np.random.default_rng(2).normal(size=(2, 2, 5)).astype(np.float32)
    c, d = c * (which != "entropy"), d * (which != "logps")

    def total(f, states, head, **kw):
        logps, entropy = f(states, head, targets, temperature=0.8, **kw)
        return jnp.sum(c * logps + d * entropy)

    slope = lambda f, **kw: jax.jit(jax.grad(lambda *a: total(f, *a, **kw), argnums=(0, 1)))
    ours = slope(supervised.token_logps, chunk=chunk)(states, head)
    for a, b in zip(ours, slope(dense)(states, head)):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 5])
def test_capped_logits(chunk):
    """Catches a cap that the normaliser or the backward pass leaves out (Gemma 2)."""
    states, head, targets = draw(7)
    c, d = np.random.default_rng(8).normal(size=(2, 2, 5)).astype(np.float32)

    def capped(states, head, targets, temperature):
        bent = 2.0 * jnp.tanh(states @ head / 2.0)
        return dense(bent, jnp.eye(head.shape[1]), targets, temperature)

    def total(f, states, head, **kw):
        logps, entropy = f(states, head, targets, temperature=0.8, **kw)
        return jnp.sum(c * logps + d * entropy)

    slope = lambda f, **kw: jax.jit(
        jax.value_and_grad(lambda *a: total(f, *a, **kw), argnums=(0, 1))
    )
    ours = slope(supervised.token_logps, softcap=2.0, chunk=chunk)(states, head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(slope(capped)(states, head))):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_states_are_summed_in_float32():
    """Catches a softmax in bfloat16, which is off by percents over a large vocabulary."""
    states, head, targets = draw(3, V=4000)
    short, weights = jnp.asarray(states, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    logps, _ = supervised.token_logps(short, weights, targets)
    want, _ = dense(short.astype(jnp.float32), weights.astype(jnp.float32), targets)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, want, atol=1e-4)
    grads = jax.grad(lambda *a: supervised.token_logps(*a, targets)[0].sum(), (0, 1))(
        short, weights
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


def test_no_program_holds_all_logits(monkeypatch):
    """Catches [B, T, V] logits in the forward or the backward pass."""
    monkeypatch.setattr(supervised, "LOGITS", 64 * 1024)
    abstract = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 64, 8), "float32"), ((8, 8192), "float32"), ((1, 64), "int32"))
    ]
    slope = jax.grad(lambda x, w, y: supervised.token_logps(x, w, y)[0].sum(), argnums=(0, 1))
    text = jax.jit(slope).lower(*abstract).as_text()
    assert "64x1024xf32" in text
    assert "64x8192xf32" not in text


def test_positive_temperature_is_required():
    """Catches a division by zero that would come back as NaN."""
    with pytest.raises(ValueError, match="positive; received 0"):
        supervised.token_logps(*draw(0), temperature=0.0)


# Packed rows

# prompt 1 with answers 2 and 3, then a text without prompt (4), then padding
TOKENS = np.array([[10, 11, 20, 21, 30, 31, 40, 41, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 2, 2, 3, 3, 4, 4, 0]], np.int32)
TRUNK = np.array([[0, 0, 1, 1, 1, 1, 0, 0, 0]], np.int32)
LOSS = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0]], bool)


def test_scored_positions_by_hand():
    """Catches answers predicted by each other, a prompt end used once, and a text's first token."""
    at = supervised.scored(TOKENS, LOSS, SEGMENTS, TRUNK, size=6)
    np.testing.assert_array_equal(at.mask, [[1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(at.target, [[20, 21, 30, 31, 41, 0]])
    np.testing.assert_array_equal(at.source, [[1, 2, 1, 4, 6, 0]])
    np.testing.assert_array_equal(at.slot[:, :5], [[2, 3, 4, 5, 7]])


def test_scored_positions_of_a_denoiser():
    """Catches a shift where a state predicts its own slot."""
    at = supervised.scored(TOKENS, LOSS, SEGMENTS, TRUNK, size=6, predict_offset=0)
    np.testing.assert_array_equal(at.source, [[2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(at.target, [[20, 21, 30, 31, 40, 41]])


def test_cross_entropy_is_zero_where_nothing_is_scored():
    """Catches filler positions that leak into the loss or its gradient."""
    states, head, _ = draw(4, B=1, S=9)
    at = supervised.scored(TOKENS % 23, LOSS & (SEGMENTS == 3), SEGMENTS, TRUNK)
    loss = supervised.cross_entropy(states, head, at)
    logps, _ = dense(states[:, [1, 4]], head, TOKENS[:, 4:6] % 23)
    np.testing.assert_allclose(loss[0, :2], -logps[0], atol=1e-6)
    assert not np.asarray(loss[0, 2:]).any()
    grad = jax.grad(lambda s: supervised.cross_entropy(s, head, at).sum())(states)
    assert sorted(np.flatnonzero(np.abs(grad[0]).sum(-1))) == [1, 4]


ENDS = np.array([[3, 5, 7, -1]], np.int32)  # answers 2 and 3, text 4, none


def test_sums_of_answers_by_hand():
    """Catches tokens of a neighbour or of the prompt, fillers, and an absent answer that counts."""
    at = supervised.scored(TOKENS, LOSS, SEGMENTS, TRUNK, size=6)
    logps = np.array([[-1, -2, -4, -8, -16, np.nan]], np.float32)
    for f in (supervised.answer_logps, jax.jit(supervised.answer_logps)):
        sums, counts = f(logps, at, SEGMENTS, ENDS)
        np.testing.assert_array_equal(sums, [[-3, -12, -16, 0]])
        np.testing.assert_array_equal(counts, [[2, 2, 1, 0]])
        assert sums.dtype == counts.dtype == np.float32
    alone = supervised.answer_logps(logps, at, SEGMENTS, ENDS[:, 1:2])
    np.testing.assert_array_equal(alone[0], [[-12]])
    short = supervised.answer_logps(jnp.asarray(logps, jnp.bfloat16), at, SEGMENTS, ENDS)
    assert short[0].dtype == jnp.float32


def test_sums_of_answers_have_gradients_at_their_own_tokens_only():
    """Catches a sum through which other answers, or what lies under the mask, are trained."""
    at = supervised.scored(TOKENS, LOSS & (SEGMENTS != 2), SEGMENTS, TRUNK, size=6)
    times = np.array([[5, 2, 3, 7]])
    total = lambda x: (times * supervised.answer_logps(x, at, SEGMENTS, ENDS)[0]).sum()
    logps = np.array([[-1, -2, -4, np.nan, np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(jax.grad(total)(logps), [[2, 2, 3, 0, 0, 0]])
    sums, counts = supervised.answer_logps(logps, at, SEGMENTS, ENDS)
    assert (sums[0, 0], counts[0, 0]) == (0, 0)  # nothing of this answer is supervised
