"""States, the probes on them, their controls, and distances to centroids."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreward import testing
from jaxreward.data import pipeline
from jaxreward.data.tokenize import Tree
from jaxreward.evals import distances, probes, probing, scorer
from jaxreward.models import decoder, trainable
from jaxreward.parallel import specs as sp

D, N = 8, 160


# States


@pytest.fixture(scope="module")
def model():
    """(plan without a score head, params, frozen): a language model whose layers matter."""
    plan, rng = trainable.Plan(testing.tiny_config(), head=None), np.random.default_rng(9)
    draw = lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.5
    specs = decoder.specs(plan.cfg)
    return plan, {"model": jax.tree.map(draw, specs, is_leaf=lambda x: isinstance(x, sp.Param))}, {}


def trees(*sizes, seed=0):
    """Trees of (prompt tokens, tokens of each answer)."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, 259, n, dtype=np.int32)
    return [
        Tree(f"t{i}", ids(p), [ids(n) for n in answers], [np.ones(n, bool) for n in answers])
        for i, (p, answers) in enumerate(sizes)
    ]


def test_states_are_those_of_each_text_alone_at_its_last_token(model):
    """Catches a state of padding, of a neighbour, or of the token before the last."""
    plan, params, frozen = model
    some = trees((9, (4, 7)), (0, (5,)), (30, (20, 1)))
    got = probing.make_extract(plan)(params, frozen, some)
    assert got.shape == (5, 32) and got.dtype == np.float32
    texts = [np.concatenate([t.prompt, a]) for t in some for a in t.answers]
    length = 64
    tokens = np.stack([np.pad(text, (0, length - len(text))) for text in texts])
    segments = jnp.asarray(np.arange(length) < np.array([[len(t)] for t in texts]), jnp.int32)
    run = jax.jit(
        lambda weights, x, segments: (
            decoder.backbone(
                weights,
                plan.cfg,
                x,
                positions=jnp.broadcast_to(jnp.arange(length)[:, None], (*segments.shape, 1)),
                segments=segments,
                trunk=jnp.zeros_like(segments),
            ).states
        )
    )
    weights = params["model"]
    states = run(weights, np.asarray(weights["embed"]["table"])[tokens], segments)
    want = np.asarray(states)[np.arange(5), [len(t) - 1 for t in texts]]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert np.ptp(want, axis=0).mean() > 0.5  # states that all agree would prove nothing


def test_no_gradient_reaches_the_model(model):
    """Catches a probe that would fine-tune what it measures: every gradient is exactly zero."""
    plan, params, frozen = model
    made = pipeline.batches(trees((4, (3, 2))), row_len=16, batch=1, seed=0, shuffle=False)
    rows = scorer.pair_rows(next(made))
    total = lambda p: jnp.sum(probing.representation(plan, p, frozen, rows))
    slope = jax.jit(jax.grad(total))(params)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(slope))


def test_states_are_read_back_for_the_same_texts_and_model_only(tmp_path):
    """Catches a stale file: other tokens, another model, or where a text ends."""
    some, calls = trees((4, (3, 2)), (1, (1,))), []

    def compute():
        calls.append(None)
        return np.arange(6, dtype=np.float32).reshape(3, 2) + len(calls)

    read = lambda trees, model: probing.cached(tmp_path, trees, compute, model=model, width=2)
    first = read(some, "m")
    np.testing.assert_array_equal(read(some, "m"), first)
    assert len(calls) == 1 and [p.suffix for p in tmp_path.iterdir()] == [".npy"]
    read(some, "n")
    read(trees((4, (3, 2)), (1, (1,)), seed=1), "m")
    whole = [np.concatenate([some[0].prompt, answer]) for answer in some[0].answers]
    joined = Tree("x", some[0].prompt[:0], whole, [])
    np.testing.assert_array_equal(read([joined, some[1]], "m"), first)  # how it is cut is no matter
    assert len(calls) == 3
    (path,) = [p for p in tmp_path.iterdir() if np.array_equal(np.load(p), first)]
    path.write_bytes(path.read_bytes()[:60])
    read(some, "m")
    assert len(calls) == 4


# Probes


def task(h, labels, *, train=slice(0, N // 2), test=slice(N // 2, N), groups=None):
    rows = np.arange(len(h))
    groups = rows if groups is None else groups
    return probing.Task(
        rows[train], labels[train], groups[train], rows[test], labels[test], groups[test]
    )


@pytest.fixture(scope="module")
def states():
    """Standard normal states away from the origin, and the direction of each of three classes."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(N, D)).astype(np.float32)
    return h + 3.0, (h @ np.eye(D)[:, :3]).argmax(axis=1)


@pytest.fixture(scope="module")
def measured(states):
    """Strong probes of a task that can be learnt and of one that cannot."""
    h, labels = states
    free = np.random.default_rng(1).choice(3, N, p=[0.6, 0.2, 0.2])
    tasks = {"known": task(h, labels), "free": task(h, free)}
    return tasks, probing.probe(h, tasks, classes=3, seeds=2, l2=(1e-3, 1.0))


def test_what_is_linear_is_found(measured):
    """Catches labels, rows or classes mixed up on their way through the padded program."""
    tasks, found = measured
    known = found["known"]
    assert known["accuracy"]["value"] > 0.9 and known["auroc"] > 0.95
    assert known["above_majority"]["low"] > 0.2 and found["converged"] == 1.0
    assert known["by_setting"]["0.001"] > known["by_setting"]["1"] and known["l2"] == 1e-3
    assert known["train"] == known["test"] == N // 2
    majority = np.bincount(tasks["free"].test_labels).max() / (N // 2)
    assert found["free"]["majority"] == pytest.approx(majority)
    assert found["majority"] == pytest.approx((majority + known["majority"]) / 2)


def test_separable_classes_are_told_apart_without_error(measured, states):
    """Tasks, seeds, settings and controls are one program, which the tasks of `measured` compiled.

    Catches a bias that is lost: without one, classes on one side of the origin stay mixed."""
    h, labels = states
    apart = (h * 0.1 + 5 * np.eye(D, dtype=np.float32)[labels] + 7).astype(np.float32)
    tasks = {"one": task(apart, labels), "two": task(apart, labels[::-1].copy())}
    assert len(measured[0]) == len(tasks)
    programs = probes.fit_strong._cache_size()
    found = probing.probe(apart, tasks, classes=3, seeds=2, l2=(1e-3, 1.0))
    assert probes.fit_strong._cache_size() == programs
    assert found["one"]["accuracy"]["value"] == found["one"]["balanced_accuracy"] == 1.0
    assert found["one"]["accuracy"]["low"] == found["one"]["auroc"] == 1.0


def test_controls_stay_near_the_majority(measured):
    """Catches a leak of test labels, and controls that are not what they are called."""
    _, found = measured
    for name in ("known", "free"):
        for control in probing.CONTROLS:
            got = found[name][control]
            assert got["accuracy"] < found[name]["majority"] + 0.15, (name, control)
            assert abs(got["balanced_accuracy"] - 1 / 3) < 0.15, (name, control)
    assert found["free"]["accuracy"]["value"] < found["free"]["majority"] + 0.1


def test_strong_probes_are_at_the_minimum(measured, states):
    """The gradient of the objective, written out in NumPy, vanishes on the part that is fitted."""
    h, _ = states
    tasks, _ = measured
    one = tasks["free"]
    y, h_, n = one.train_labels, h[one.train], N // 2
    part = np.random.default_rng(2).random((2, 2, n)) < 0.7
    index = np.stack([tasks["known"].train, one.train]).astype(np.int32)
    labels = np.stack([tasks["known"].train_labels, y]).astype(np.int32)
    probe, left = probes.fit_strong(h, index, labels, part, jnp.array([0.5, 0.02]), outputs=3)
    w, b = np.asarray(probe.w[1, 1, 1], np.float64), np.asarray(probe.b[1, 1, 1], np.float64)
    z = h_ @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(n), y] -= 1
    p = np.where(part[1, 1][:, None], p, 0) / part[1, 1].sum()
    spread = h_.std(axis=0)
    slope = ((h_ - h_.mean(axis=0)) / spread).T @ p + 0.02 * w * spread[:, None]
    assert np.abs(slope).max() < 1e-4 and np.abs(p.sum(0)).max() < 1e-4
    assert float(left.max()) <= probes.TOLERANCE and np.abs(w).max() > 0.1


def test_probes_do_not_depend_on_their_neighbours(measured, states):
    """Catches padding or another task that leaks into a fit."""
    h, _ = states
    tasks, found = measured
    short = {"short": task(h, tasks["free"].train_labels.repeat(2), train=slice(0, 20))}
    alone = probing.probe(h, {**short, "known": tasks["known"]}, classes=3, seeds=2, l2=(1e-3, 1.0))
    for name in ("accuracy", "by_setting", "auroc"):
        assert alone["known"][name] == pytest.approx(found["known"][name], abs=1e-3)


def reference_adamw(h, labels, w, order, lr, steps):
    """The loop of `fit_paper` for one logit, in plain NumPy."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for s in range(steps):
        rows = order[s * 8 : (s + 1) * 8]
        z = h[rows] @ w[:, 0]
        g = h[rows].T @ (1 / (1 + np.exp(-z)) - labels[rows])[:, None] / len(rows)
        g *= min(1, 1 / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        hat = m / (1 - 0.9 ** (s + 1)) / (np.sqrt(v / (1 - 0.95 ** (s + 1))) + 1e-8)
        w = w - lr * 0.5 * (1 + np.cos(np.pi * s / steps)) * (hat + 0.1 * w)
    return w


@pytest.fixture(scope="module")
def paper():
    """Probes of the paper's mode of two tasks, of 20 and 13 entries, in batches of 8."""
    rng = np.random.default_rng(3)
    h = (rng.normal(size=(40, D)) + 1).astype(np.float32)
    labels = probes.padded([rng.integers(0, 2, 20), rng.integers(0, 2, 13)], -1)
    index = probes.padded([np.arange(20), np.arange(20, 33)], 0)
    keys = jax.vmap(jax.vmap(jax.random.key))(np.arange(4).reshape(2, 2))
    lrs = jnp.array([0.1, 0.0])
    probe, losses = probes.fit_paper(h, index, labels, keys, lrs, outputs=1, batch=8)
    return h, index, labels, keys, probe, np.asarray(losses)


@pytest.mark.parametrize(("t", "count"), [(0, 20), (1, 13)])
def test_paper_probes_are_those_of_a_plain_loop(paper, t, count):
    """Catches another order of clip, decay and Adam, a schedule of another length for the shorter
    task, and steps after its last; learning rate 0 leaves the start in place."""
    h, index, labels, keys, probe, losses = paper
    start = np.asarray(probe.w[t, 1, 1], np.float64)
    assert np.abs(start).max() <= D**-0.5 and np.abs(start).max() > 0.1
    _, order_key = jax.random.split(keys[t, 1])
    drawn = np.asarray(jax.random.uniform(order_key, (20,)))
    order = [i for i in np.argsort(drawn) if labels[t, i] >= 0]
    steps = -(-count // 8)
    want = reference_adamw(
        h[index[t]].astype(np.float64), labels[t], start, np.array(order), 0.1, steps
    )
    np.testing.assert_allclose(probe.w[t, 1, 0], want, atol=2e-5)
    assert (losses[t, 1, 0, :steps] > 0).all() and (losses[t, 1, 0, steps:] == 0).all()
    assert not np.asarray(probe.b).any()


def test_one_logit_decides_as_two(paper):
    """A sigmoid on w and a softmax on (w0, w1) with w = w1 - w0 give the same loss and class."""
    h, *_ = paper
    rng = np.random.default_rng(4)
    w = rng.normal(size=(D, 2)).astype(np.float32)
    labels = rng.integers(0, 2, 40)
    two = np.asarray(h @ w)
    one = two[:, 1:] - two[:, :1]
    loss = jax.jit(probes.cross_entropy)
    np.testing.assert_allclose(loss(one, labels), loss(two, labels), rtol=1e-4, atol=1e-5)
    assert (probes.two_logits(one).argmax(1) == two.argmax(1)).all()
    a, b = probing.measures(one, labels), probing.measures(two, labels)
    assert a == pytest.approx(b)


def test_entries_without_a_label_cost_nothing():
    """Catches padding in the loss or its gradient, where a state may even be NaN."""
    values = jnp.array([[0.0], [jnp.nan]])
    labels = jnp.array([1, -1])
    loss = lambda z: jnp.sum(probes.cross_entropy(z, labels))
    assert float(loss(values)) == pytest.approx(np.log(2))


def test_measures_by_hand():
    """Catches recall and precision swapped, and an AUROC of the wrong class."""
    values = np.array([[2, 0, 1], [0, 2, 1], [0, 1, 2], [3, 1, 0]], float)
    got = probing.measures(values, np.array([0, 1, 1, 2]))
    assert got["accuracy"] == 0.5 and got["majority"] == 0.5
    assert got["balanced_accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert got["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert 0 < got["auroc"] < 1
    assert "auroc" not in probing.measures(np.ones((3, 1)), np.array([1, 1, 1]))


def test_validation_splits_by_group():
    """Catches two answers to one prompt on both sides, and a prompt that changes sides by task."""
    groups = np.repeat(np.arange(50), 2)
    part = probing.validation(groups[20:60], 0.3, 0)
    assert (part == probing.validation(groups, 0.3, 0)[20:60]).all()
    held = probing.validation(groups, 0.3, 0)
    assert (held[::2] == held[1::2]).all() and 0.1 < held.mean() < 0.5
    assert (held != probing.validation(groups, 0.3, 1)).any()


@pytest.mark.parametrize(
    ("kw", "words"),
    [({"mode": "fast"}, "mode must be one of paper, strong"), ({}, "answers of two classes")],
)
def test_wrong_calls_say_so(states, kw, words):
    """Catches a probe of one class, which would look perfect."""
    h, labels = states
    with pytest.raises(ValueError, match=words):
        probing.probe(h, {"t": task(h, labels * 0)}, classes=3, **kw)


def test_pearson():
    """Affine data correlate fully; catches an interval without its value, and constant data."""
    x = np.arange(8.0)
    got = probing.pearson(x, 3 - 2 * x)
    assert got == pytest.approx({"value": -1.0, "low": -1.0, "high": -1.0})
    noisy = probing.pearson(x, x + np.random.default_rng(0).normal(size=8) * 4)
    assert noisy["low"] < noisy["value"] < noisy["high"]
    with pytest.raises(ValueError, match="at least 3 numbers that differ"):
        probing.pearson(x, np.ones(8))


# Distances


@pytest.fixture(scope="module")
def cloud():
    """States far from the origin, and labels of two dimensions; some have none of the second."""
    rng = np.random.default_rng(5)
    h = rng.normal(size=(60, 5)) * np.array([1, 5, 1, 0.2, 1]) + 300
    first = (np.arange(60) % 3).astype(int)
    second = np.where(np.arange(60) < 40, np.arange(60) % 2, -1)
    return h.astype(np.float32), {"harm": first, "length": second}


@pytest.mark.parametrize("metric", distances.METRICS)
def test_distances_by_their_definition(cloud, metric):
    """Catches squares that cancel at a large mean, and a whitening that is transposed."""
    h, labels = cloud
    got = distances.fit(h, labels, metric=metric, ridge=0.3)
    far = distances.distances(got, h)
    groups = [h[v == k].astype(float) for v in labels.values() for k in np.unique(v) if k >= 0]
    means = np.stack([group.mean(0) for group in groups])
    gaps = h[:, None].astype(float) - means
    if metric == "euclidean":
        want = np.linalg.norm(gaps, axis=-1)
        np.testing.assert_allclose(got.points, means)
    elif metric == "mahalanobis":
        inside = np.concatenate([group - group.mean(0) for group in groups])
        sigma = inside.T @ inside / len(inside)
        sigma += 0.3 * np.trace(sigma) / 5 * np.eye(5)
        want = np.sqrt(np.einsum("nci,ij,ncj->nc", gaps, np.linalg.inv(sigma), gaps))
    else:
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
        mean = np.stack([unit(group).mean(0) for group in groups])
        want = 1 - unit(h.astype(float)) @ unit(mean).T
    np.testing.assert_allclose(far, want, rtol=1e-3, atol=1e-6)
    assert far.shape == (60, 5) and far.dtype == np.float32
    assert got.dimension.tolist() == [0, 0, 0, 1, 1] and got.label.tolist() == [0, 1, 2, 0, 1]


def test_a_centroid_is_at_distance_zero_and_d_min_is_the_least(cloud):
    """Catches a negative square, and a d_min above some dimension's distance."""
    h, labels = cloud
    got = distances.fit(h, labels)
    at = distances.distances(got, got.points)
    assert np.diag(at).max() < 1e-4 and (at >= 0).all()
    far = distances.distances(got, h)
    near, least = distances.by_dimension(got, far), distances.d_min(got, h)
    np.testing.assert_array_equal(near.min(axis=1), least)
    np.testing.assert_array_equal(near[:, 1], far[:, 3:].min(axis=1))


def test_explanations_name_the_nearest_label(cloud):
    """Catches the label of another dimension, and an order that is not by distance."""
    h, labels = cloud
    got = distances.fit(h, labels)
    words = {"harm": ("bad", "meh", "good"), "length": ("short", "long")}
    told = distances.explain(got, got.points[[1, 3]], words)
    assert told[0]["harm"][0] == "meh" and next(iter(told[0])) == "harm"
    assert told[1]["length"][0] == "short" and next(iter(told[1])) == "length"
    assert told[0]["harm"][1] < 1e-4 < told[0]["length"][1]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 100))
def test_kmeans_never_gets_worse_and_one_is_the_mean(k, seed):
    """Catches an update that raises the inertia, and empty clusters that become NaN."""
    h = np.random.default_rng(seed).integers(0, 3, size=(12, 2)).astype(float)
    points, nearest, inertia = distances.kmeans(h, k, seed=seed)
    assert points.shape == (k, 2) and np.isfinite(points).all() and nearest.max() < k
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(inertia))
    if k == 1:
        np.testing.assert_allclose(points[0], h.mean(axis=0))


def test_kmeans_finds_clusters_that_are_there():
    """Catches a start at one point; more centroids than states are refused."""
    centres = np.array([[0.0, 0], [50, 0], [0, 50]])
    h = np.repeat(centres, 10, 0) + np.random.default_rng(0).normal(size=(30, 2))
    points, *_ = distances.kmeans(h, 3)
    assert np.abs(points[np.lexsort(points.T)] - centres[np.lexsort(centres.T)]).max() < 2
    with pytest.raises(ValueError, match="1 <= k <= 30"):
        distances.kmeans(h, 31)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_thresholds(far, q, r):
    """A quantile drops at most 1 - q, and less the larger it is; catches the wrong side."""
    far = np.array(far)
    lose = lambda quantile: distances.dropped(far, distances.threshold(far, quantile)).mean()
    assert lose(q) <= 1 - q + 1e-9 and lose(1.0) == 0
    assert lose(max(q, r)) <= lose(min(q, r))


def test_a_threshold_drops_what_its_quantile_says():
    """Catches a threshold that drops nothing, which the property above would let through."""
    far = np.arange(100.0)
    assert distances.dropped(far, distances.threshold(far, 0.9)).sum() == 9
    assert distances.dropped(far, distances.threshold(far, 0.0)).sum() == 99


def test_best_of_n_filter_by_hand():
    """Catches the reward's pick among the dropped, a random arm with another count, and a prompt
    that loses all its answers."""
    gold = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    reward = np.array([[9.0, 5.0, 1.0], [1.0, 2.0, 3.0]])
    far = np.array([[8.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    got = distances.best_of_n_filtered(gold, reward, far, 5.0)
    assert got["plain"].tolist() == [0.0, 0.0] and got["filtered"].tolist() == [1.0, 0.0]
    # Two of three: {0,1} and {0,2} give answer 0, {1,2} gives answer 1.
    assert got["random"].tolist() == pytest.approx([1 / 3, 0.0])
    assert got["dropped"].tolist() == pytest.approx([1 / 3, 0.0])
    assert got["emptied"].tolist() == [0.0, 1.0] and got["oracle"].tolist() == [1.0, 1.0]
    kept = distances.best_of_n_filtered(gold, reward, far, 10.0)
    assert (kept["filtered"] == kept["plain"]).all() and (kept["random"] == kept["plain"]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h, y: distances.fit(h, y, metric="l1"), "metric must be one of euclidean"),
        (lambda h, y: distances.fit(h, {"a": y["harm"] * 0 - 1}), "no state has a label of a"),
        (lambda h, y: distances.fit(h * 0, y, metric="mahalanobis"), "differ within a label"),
        (lambda h, y: distances.threshold(h[:, 0], 1.5), "a quantile in \\[0, 1\\]"),
        (lambda h, y: distances.best_of_n_filtered(h, h, h[:1], 1), "need one shape"),
        (lambda h, y: distances.best_of_n_filtered(h, h, h * np.nan, 1), "distance is NaN"),
    ],
)
def test_wrong_distances_say_so(cloud, call, words):
    """Catches a silent fallback to another metric, or NaN that counts as near."""
    with pytest.raises(ValueError, match=words):
        call(*cloud)
