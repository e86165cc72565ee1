"""Scores of trees: packed, alone, permuted and from cached features they are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import testing
from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree
from jaxreward.evals import scorer
from jaxreward.models import decoder, trainable
from jaxreward.parallel import specs as sp
from jaxreward.parallel.mesh import make_mesh
from jaxreward.parallel.rules import Rules
from jaxreward.train.plan import compilations

BATCH = 4
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
# (prompt tokens, tokens of each answer); the prompt of one tree is empty.
SIZES = [(9, (4, 7)), (0, (5, 3)), (14, (1, 1)), (30, (20, 6)), (3, (2, 8)), (11, (12, 2))]


def make_trees(seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, 259, n, dtype=np.int32)
    return [
        Tree(
            id=f"t{i}",
            prompt=ids(prompt),
            answers=[ids(n) for n in answers],
            loss=[np.ones(n, bool) for n in answers],
            pairs=[(0, 1)],
            margin=[0.0],
            weight=[1.0],
        )
        for i, (prompt, answers) in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def weights():
    """A decoder whose attention and MLP matter: wider draws than those of a fresh model."""
    cfg = testing.tiny_config()
    drawn = sp.init(decoder.specs(cfg), jax.random.key(0))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, drawn)


@pytest.fixture(scope="module")
def model(weights):
    """(plan, params, frozen, predict) of a model whose upper layer is trained."""
    plan = trainable.Plan(testing.tiny_config(), "top", top_layers=1)
    params, frozen = trainable.init(plan, weights, jax.random.key(1))
    return plan, params, frozen, scorer.make_predict(plan, batch=BATCH)


@pytest.fixture(scope="module")
def together(model):
    """The trees, and their scores from one call."""
    _, params, frozen, predict = model
    trees = make_trees()
    return trees, predict(params, frozen, trees)


@pytest.fixture(scope="module")
def features(model, together):
    """What `cache_features` makes of the trees, and the progress it reported."""
    plan, _, frozen, _ = model
    seen = []
    made = scorer.cache_features(
        plan, frozen, together[0], batch=2, progress=lambda *at: seen.append(at)
    )
    return made, seen


def test_several_trees_share_a_row(together):
    """Catches tests below that would hold for unpacked rows only."""
    trees, _ = together
    packed = pipeline.pack(trees, row_len=scorer.row_len(trees))
    assert len(packed) < len(trees) and max(map(len, packed)) > 1


def test_scores_are_those_of_the_plain_sequences(weights, model, together):
    """Catches a score read at the wrong slot, or an answer that sees another.

    The reference runs prompt + answer as one sequence of its own, without trees or packing.
    """
    plan, params, _, _ = model
    cfg = plan.cfg
    trees, scores = together
    length = max(p + max(a) for p, a in SIZES)
    texts = [np.concatenate([t.prompt, a]) for t in trees for a in t.answers]
    tokens = np.stack([np.pad(text, (0, length - len(text))) for text in texts])
    segments = jnp.asarray(np.arange(length) < np.array([[len(text)] for text in texts]), jnp.int32)
    states = decoder.backbone(
        weights,
        cfg,
        jnp.take(weights["embed"]["table"], tokens, axis=0),
        positions=jnp.broadcast_to(jnp.arange(length)[:, None], (*tokens.shape, 1)),
        segments=segments,
        trunk=jnp.zeros_like(segments),
    ).states
    ends = np.array([len(text) - 1 for text in texts])
    kernel = np.asarray(params["score"]["kernel"], np.float64)[:, 0]
    want = np.asarray(states, np.float64)[np.arange(len(texts)), ends] @ kernel
    np.testing.assert_allclose(np.concatenate(scores), want, **CLOSE)
    assert np.ptp(want) > 0.5  # scores that all agree would prove nothing


def test_every_answer_gets_one_float32(together):
    """Catches an answer left at NaN or a ragged result."""
    trees, scores = together
    assert [s.shape for s in scores] == [(len(t.answers),) for t in trees]
    assert all(s.dtype == np.float32 and np.isfinite(s).all() for s in scores)


def test_trees_together_score_as_each_alone(model, together):
    """Catches scores that depend on the neighbours in a row or in a batch."""
    _, params, frozen, predict = model
    trees, scores = together
    for tree, packed in zip(trees, scores):
        (alone,) = predict(params, frozen, [tree])
        np.testing.assert_allclose(packed, alone, **CLOSE)


def test_batches_side_by_side_come_back_to_their_trees(model, together):
    """Catches scores of one batch that go to another's trees, and a program compiled twice."""
    plan, params, frozen, _ = model
    trees, scores = together
    predict = scorer.make_predict(plan, batch=1)
    with compilations() as counts:
        got = predict(params, frozen, trees * 8)
    assert len(scorer.packed(trees * 8)[256]) > 4
    assert counts["jit(score_rows)"] == 1
    for found, want in zip(got, scores * 8, strict=True):
        np.testing.assert_allclose(found, want, **CLOSE)


def test_scores_follow_a_permutation_of_the_trees(model, together):
    """Catches scores handed back in the order of packing."""
    _, params, frozen, predict = model
    trees, scores = together
    order = [4, 0, 5, 2, 1, 3]
    moved = predict(params, frozen, [trees[i] for i in order])
    for i, got in zip(order, moved):
        np.testing.assert_allclose(got, scores[i], **CLOSE)


def test_swapping_answers_swaps_their_scores(model, together):
    """Catches scores that belong to the slot and not to the answer."""
    _, params, frozen, predict = model
    trees, scores = together
    swapped = [dataclasses.replace(t, answers=t.answers[::-1], loss=t.loss[::-1]) for t in trees]
    for got, want in zip(predict(params, frozen, swapped), scores):
        np.testing.assert_allclose(got[::-1], want, **CLOSE)


def test_no_trees_no_scores(model):
    """Catches a crash on an empty file."""
    plan, params, frozen, predict = model
    assert predict(params, frozen, []) == []
    assert scorer.cache_features(plan, frozen, []) == []


def test_features_fit_their_trees(model, together, features):
    """Catches features cut at the wrong slots: the empty prompt, the last answer of a row."""
    trees, _ = together
    made, seen = features
    for tree, parts in zip(trees, made, strict=True):
        want = [(len(x), 32) for x in (tree.prompt, *tree.answers)]
        assert [part.shape for part in parts] == want
        assert all(part.dtype == np.float32 and part.base is None for part in parts)
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) >= 1


def test_features_are_the_states_below_the_cut(weights, model, together, features):
    """Catches features of another layer: layer 1 of a prompt that runs through it alone."""
    plan, *_ = model
    cfg = dataclasses.replace(plan.cfg, depth=1, has_norm=False)
    tree, parts = together[0][3], features[0][3]
    x = jnp.take(weights["embed"]["table"], tree.prompt[None], axis=0)
    first = jax.tree.map(lambda w: w[:1], weights["layers"])
    ones = jnp.ones((1, len(tree.prompt)), jnp.int32)
    positions = jnp.arange(len(tree.prompt))[None, :, None]
    below = decoder.backbone(
        {"layers": first}, cfg, x, positions=positions, segments=ones, trunk=ones * 0
    )
    np.testing.assert_allclose(parts[0], below.states[0], **CLOSE)


def test_scores_from_features_are_those_of_the_whole_model(model, together, features):
    """Catches an upper part that starts from other states. The lower layers are not even there."""
    _, params, _, predict = model
    trees, scores = together
    carrying = [dataclasses.replace(t, features=f) for t, f in zip(trees, features[0])]
    for got, want in zip(predict(params, {}, carrying), scores):
        np.testing.assert_allclose(got, want, **CLOSE)
    # And the features are what is used, not the tokens.
    blind = [dataclasses.replace(t, prompt=t.prompt * 0) for t in carrying]
    for got, want in zip(predict(params, {}, blind), scores):
        np.testing.assert_allclose(got, want, **CLOSE)


def test_gradients_from_features_are_those_of_the_whole_model(model, together, features):
    """Catches a gradient that changes when the lower layers are cached."""
    plan, params, frozen, _ = model
    trees, _ = together
    carrying = [dataclasses.replace(t, features=f) for t, f in zip(trees, features[0])]

    def rows(trees):
        length = scorer.row_len(trees)
        made = pipeline.batches(trees, row_len=length, batch=BATCH, seed=0, shuffle=False)
        return scorer.pair_rows(next(made))

    @jax.jit
    def slope(params, frozen, rows):
        return jax.grad(lambda p: jnp.sum(scorer.rewards(plan, p, frozen, rows)))(params)

    full, cached = slope(params, frozen, rows(trees)), slope(params, {}, rows(carrying))
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(cached), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_long_tree_lengthens_no_other_row(model, together):
    """Catches one outlier that makes all rows long, and scores lost between the rows."""
    _, params, frozen, predict = model
    trees, scores = together
    longest = max(trees, key=lambda t: t.size)
    long = dataclasses.replace(longest, prompt=np.tile(longest.prompt, 40))
    mixed = [trees[0], long, *trees[1:]]
    found = scorer.packed(mixed)
    rows = [(length, row) for length, some in found.items() for row in some]
    assert sorted(i for _, row in rows for i in row) == list(range(len(mixed)))
    assert all(sum(mixed[i].size for i in row) <= length for length, row in rows)
    # The long one has a row of its length, and the short ones stand in what it leaves of that.
    assert [length for length, _ in rows] == [4096]
    many = scorer.packed([long, *trees * 40])
    assert {length: len(some) for length, some in many.items()} == {4096: 1, 1024: 3}
    assert set(scorer.packed(trees)) == {256}
    got = predict(params, frozen, mixed)
    for a, b in zip([got[0], *got[2:]], scores, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    alone = predict(params, frozen, [long])[0]
    np.testing.assert_allclose(got[1], alone, **CLOSE)


def test_long_rows_run_a_few_at_a_time():
    """Catches attention scores of many long rows at once, and a batch that a mesh cannot share."""
    assert scorer._rows_at_once(8, 256, None) == 8
    assert scorer._rows_at_once(8, 1024, None) == 2
    assert scorer._rows_at_once(8, 8192, None) == 1
    rules = Rules(make_mesh({"data": 2, "fsdp": 2}))
    assert scorer._rows_at_once(6, 256, rules) == 4
    assert scorer._rows_at_once(1, 8192, rules) == 4


def test_absent_answers_score_zero(model):
    """Catches the state of slot -1, the last of the row, scored for an answer that is not there."""
    plan, params, frozen, _ = model
    rows = jax.tree.map(jnp.asarray, testing.empty_pair_rows(2, 8))
    np.testing.assert_array_equal(scorer.rewards(plan, params, frozen, rows), np.zeros((2, 2)))


def test_scores_on_four_devices_are_those_of_one(weights, model, together):
    """Catches a layout that changes results, or rows gathered in another order."""
    plan, params, frozen, _ = model
    trees, scores = together
    rules = Rules(make_mesh({"fsdp": 2, "tensor": 2}))
    placed = jax.device_put(params, sp.shardings(trainable.param_specs(plan), rules))
    lower = sp.shardings(decoder.specs(plan.lower), rules)
    below = {"policy": {"lower": jax.device_put(frozen["policy"]["lower"], lower)}}
    predict = scorer.make_predict(plan, rules=rules, batch=BATCH)
    for got, want in zip(predict(placed, below, trees), scores):
        np.testing.assert_allclose(got, want, **CLOSE)
