"""What is trained: every mode starts as the plain model, trains its own leaves and joins back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward.core import trees
from jaxreward.core.types import Rows
from jaxreward.models import decoder, heads, lora, trainable
from jaxreward.parallel import specs as sp
from jaxreward.testing import tiny_config

CFG = tiny_config(tied=False)
LORA = lora.Config(rank=2, alpha=6.0)
PLANS = {
    "all": trainable.Plan(CFG, "all"),
    "lora": trainable.Plan(CFG, "lora", lora=LORA),
    "lora-top": trainable.Plan(CFG, "lora", top_layers=1, lora=LORA),
    "top": trainable.Plan(CFG, "top", top_layers=1),
    "head": trainable.Plan(CFG, "head"),
}
CUT = {"all": 0, "lora": 0, "lora-top": 1, "top": 1, "head": 2}
every_mode = pytest.mark.parametrize("mode", list(PLANS))

RNG = np.random.default_rng(0)
# One packed row (prompt, two answers) and one padded on the left.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 1, 1, 1, 1, 1]], np.int32)
TRUNK = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 3, 4, 5], [0, 0, 0, 1, 2, 3, 4, 5]], np.int32)
ROWS = Rows(
    RNG.integers(0, CFG.vocab, (2, 8)).astype(np.int32),
    SEGMENTS > 0,
    SEGMENTS > 0,
    POSITIONS[..., None],
    SEGMENTS,
    TRUNK,
).validate()
WEIGHT = RNG.normal(size=(2, 8, CFG.width)).astype(np.float32)


def draw(specs, seed):
    rng = np.random.default_rng(seed)
    scale = lambda p: (1.0, 0.3) if p.init == "ones" else (0.0, 0.2)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(*scale(p), size=p.shape), jnp.float32),
        specs,
        is_leaf=lambda x: isinstance(x, sp.Param),
    )


@pytest.fixture(scope="module")
def weights():
    """A whole decoder with its own language head."""
    return draw(decoder.specs(CFG), 1)


@pytest.fixture(scope="module")
def fresh(weights):
    """(params, frozen) of every mode before training, from one key."""
    return {mode: trainable.init(plan, weights, jax.random.key(7)) for mode, plan in PLANS.items()}


@pytest.fixture(scope="module")
def trained(fresh):
    """The same with every trained leaf moved, adapters included."""

    def moved(params):
        rng = np.random.default_rng(2)
        return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)

    return {mode: (moved(params), frozen) for mode, (params, frozen) in fresh.items()}


@functools.partial(jax.jit, static_argnames="plan")
def run(plan, params, frozen, rows):
    """States, and gradients with respect to what is trained and what is frozen."""

    def f(params, frozen):
        h = trainable.states(plan, params, frozen, rows)
        reward = heads.scalar(params["score"], h)
        return jnp.sum(WEIGHT * h) + jnp.sum(reward), h

    grads, h = jax.grad(f, argnums=(0, 1), has_aux=True)(params, frozen)
    return h, *grads


@jax.jit
def plain(whole, score):
    """The same for a whole decoder run straight through."""

    def f(whole, score):
        h = decoder.backbone(
            whole,
            CFG,
            decoder.embed(whole, CFG, ROWS),
            positions=ROWS.positions,
            segments=ROWS.segments,
            trunk=ROWS.trunk,
        ).states
        return jnp.sum(WEIGHT * h) + jnp.sum(heads.scalar(score, h)), h

    grads, h = jax.grad(f, argnums=(0, 1), has_aux=True)(whole, score)
    return h, *grads


features = jax.jit(trainable.features, static_argnums=0)


def close(got, want, path, tolerance=1e-5):
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), err_msg=path)


@every_mode
def test_untrained_states_are_the_plain_model(mode, weights, fresh):
    """Catches adapters that start away from zero, and a cut that loses a layer or the norm."""
    body = {k: v for k, v in weights.items() if k != "head"}
    params, frozen = fresh[mode]
    close(run(PLANS[mode], params, frozen, ROWS)[0], plain(body, params["score"])[0], mode)


@every_mode
def test_join_is_the_trained_model(mode, trained):
    """Catches an export that differs from what was trained: adapters, their scale, the cut."""
    params, frozen = trained[mode]
    whole, score = trainable.join(PLANS[mode], params, frozen)
    described = decoder.specs(CFG)
    sp.check(whole, {k: v for k, v in described.items() if k != "head"})
    assert score is params["score"]
    close(plain(whole, score)[0], run(PLANS[mode], params, frozen, ROWS)[0], mode)


@every_mode
def test_training_moves_the_states(mode, fresh, trained):
    """Catches trained leaves that the forward pass does not read (the head reads states only)."""
    before, after = (run(PLANS[mode], *pair[mode], ROWS)[0] for pair in (fresh, trained))
    difference = float(np.abs(before - after)[np.asarray(ROWS.mask)].max())
    assert difference == 0 if mode == "head" else difference > 1e-2


@every_mode
def test_gradients_are_those_of_the_joined_model(mode, trained):
    """Catches gradients that miss a trained leaf, take a wrong factor, or reach a frozen layer.

    With W = W0 + s a b, the chain rule gives dL/da = s G b^T and dL/db = s a^T G, where G is the
    plain model's gradient at the merged kernel.
    """
    plan, (params, frozen) = PLANS[mode], trained[mode]
    whole, score = trainable.join(plan, params, frozen)
    _, full, head = plain(whole, score)
    _, got, below = run(plan, params, frozen, ROWS)
    close(got["score"]["kernel"], head["kernel"], "score")
    wanted = {
        "all": {"model", "score"},
        "top": {"model", "score"},
        "lora": {"adapters", "score"},
        "lora-top": {"adapters", "score"},
        "head": {"score"},
    }
    assert set(got) == wanted[mode]
    full, cut = trees.flatten(full), CUT[mode]
    upper = lambda path: full[path][cut:] if path.startswith("layers/") else full[path]
    for path, g in trees.flatten(got.get("model", {})).items():
        assert np.asarray(g).any(), path
        close(g, upper(path), path)
    adapters = trees.flatten(params.get("adapters", {}))
    for path, g in trees.flatten(got.get("adapters", {})).items():
        kernel, part = path.rsplit("/", 1)
        a, b = (np.asarray(adapters[f"{kernel}/{x}"], np.float64) for x in "ab")
        G = np.asarray(upper(kernel), np.float64).reshape(a.shape[0], a.shape[1], b.shape[2])
        scale = LORA.alpha / LORA.rank
        close(g, scale * (G @ b.mT if part == "a" else a.mT @ G), path, tolerance=1e-4)
    for path, g in trees.flatten(below).items():
        if path.startswith("policy/lower/"):
            assert not np.asarray(g).any(), path


@pytest.mark.parametrize("mode", ["lora-top", "top", "head"])
def test_cached_features_change_nothing(mode, trained):
    """Catches features taken at the wrong layer, and cached ones that are computed again."""
    plan, (params, frozen) = PLANS[mode], trained[mode]
    h, grads, _ = run(plan, params, frozen, ROWS)
    cached = ROWS.replace(features=features(plan, frozen, ROWS))
    # With the lower layers gone, only the cache can give the same answer.
    gone = jax.tree.map(jnp.zeros_like, frozen["policy"]["lower"])
    without = {"policy": {**frozen["policy"], "lower": gone}}
    again, grads_again, _ = run(plan, params, without, cached)
    close(again, h, mode)
    for path, g in trees.flatten(grads).items():
        close(trees.flatten(grads_again)[path], g, path)


@pytest.mark.parametrize("mode", ["lora", "head"])
def test_ends_alone_are_those_of_all_slots(mode, trained):
    """Catches a last layer without its adapters, and one that is looked for above the cut."""
    plan, (params, frozen) = PLANS[mode], trained[mode]
    ends = jnp.array([[-1, 7], [-1, 7]])
    got = trainable.states(plan, params, frozen, ROWS, ends=ends)
    h, *_ = run(plan, params, frozen, ROWS)
    close(got[:, 1], h[:, 7], mode)
    assert not np.asarray(got[:, 0]).any()


def test_features_ignore_features_that_are_there(trained):
    """Catches a second pass over the data that feeds cached features to the lower layers."""
    plan, (_, frozen) = PLANS["top"], trained["top"]
    want = features(plan, frozen, ROWS)
    rubbish = jnp.full((2, 8, CFG.width), 9.0)
    np.testing.assert_array_equal(features(plan, frozen, ROWS.replace(features=rubbish)), want)


@every_mode
def test_cut_counts_the_frozen_layers(mode, weights, fresh):
    """Catches a split whose parts do not add up to the model, or a trained leaf left frozen."""
    plan = PLANS[mode]
    assert plan.cut == CUT[mode]
    params, frozen = fresh[mode]
    sp.check(params, trainable.param_specs(plan))
    if plan.cut:
        sp.check(frozen["policy"]["lower"], decoder.specs(plan.lower))
    expected = {
        "all": set(),
        "top": {"lower"},
        "lora": {"upper"},
        "lora-top": {"lower", "upper"},
        "head": {"lower", "upper"},
    }
    assert set(frozen.get("policy", {})) == expected[mode]
    # Nothing is held twice: trained and frozen model leaves add up to the decoder.
    held = trees.count(params.get("model", {})) + trees.count(frozen)
    assert held == trees.count(weights) - weights["head"]["kernel"].size


def test_the_head_depends_on_the_key_alone(weights, fresh):
    """Catches modes that are compared from different starting points."""
    kernels = [np.asarray(params["score"]["kernel"]) for params, _ in fresh.values()]
    assert kernels[0].std() > 0.05
    for kernel in kernels[1:]:
        np.testing.assert_array_equal(kernel, kernels[0])
    other, _ = trainable.init(PLANS["head"], weights, jax.random.key(8))
    assert np.abs(other["score"]["kernel"] - kernels[0]).max() > 1e-2


def test_an_imported_head_is_taken_over(weights):
    """Catches going on from a reward model with a new head, or with one of another size."""
    score = {"kernel": jnp.arange(CFG.width, dtype=jnp.float32)[:, None]}
    params, _ = trainable.init(PLANS["head"], weights, jax.random.key(0), score=score)
    np.testing.assert_array_equal(params["score"]["kernel"], score["kernel"])
    wide = {"kernel": jnp.zeros((CFG.width, 2))}
    with pytest.raises(ValueError, match=r"imported score head.*\[32, 2\], expected \[32, 1\]"):
        trainable.init(PLANS["head"], weights, jax.random.key(0), score=wide)


def test_several_scores(weights):
    """Catches outputs that do not reach the head."""
    plan = trainable.Plan(CFG, "head", head=heads.Config("scores", ("a", "b", "c")))
    params, _ = trainable.init(plan, weights, jax.random.key(0))
    assert params["score"]["kernel"].shape == (CFG.width, 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"train": "adapter"}, "'adapter'; use one of all, lora, top, head"),
        ({"train": "top"}, r"top_layers in 1\.\.1; received 0"),
        ({"train": "top", "top_layers": 2}, r"top_layers in 1\.\.1; received 2"),
        ({"train": "lora"}, "lora_rank >= 1.*received None"),
        ({"train": "lora", "lora": LORA, "top_layers": 3}, r"top_layers in 0\.\.2"),
        ({"train": "lora", "lora": LORA, "top_layers": -1}, r"top_layers in 0\.\.2"),
    ],
)
def test_impossible_plans_are_refused(arguments, text):
    """Catches a plan that would train nothing, or something else than asked."""
    with pytest.raises(ValueError, match=text):
        trainable.Plan(CFG, **arguments)
