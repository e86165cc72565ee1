"""The step: one division by exact weights, one gradient however the batch is cut or sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreward.core import metrics as m
from jaxreward.core import trees
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.parallel import specs as sp
from jaxreward.train import state as states
from jaxreward.train import step as steps

# A two-layer network gives every token a number. "tokens" is a squared error per token, "pairs"
# a logistic loss on the first two tokens of a row: two denominators that have nothing in common.
B, T, D, F = 8, 4, 4, 8
SPECS = {
    "up": {"kernel": sp.Param((D, F), ("embed", "mlp"), scale=0.5)},
    "down": {"kernel": sp.Param((F, 1), ("mlp", "scores"), scale=0.5)},
}
COEF = {"tokens": 0.7, "pairs": 1.3}


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.6
    mask[:, 0] = True
    return {
        "x": rng.normal(size=(B, T, D)).astype(np.float32),
        "y": rng.normal(size=(B, T)).astype(np.float32),
        "mask": mask,
        "weight": np.array([1, 0, 2, 0.5, 0, 0, 1, 3], np.float32),
    }


def make_loss(where=None):
    def loss(params, frozen, rows, keys, extra):
        del keys
        params = sp.gather(params, SPECS, where)
        hidden = jnp.tanh((rows["x"] + frozen["shift"]) @ params["up"]["kernel"])
        hidden = rules.constrain(hidden, ("batch", "length", "mlp"), where)
        out = (hidden @ params["down"]["kernel"])[..., 0]
        square = jnp.square(out - rows["y"])
        pair = jax.nn.softplus(out[:, 1] - out[:, 0])
        totals = {
            "tokens": jnp.sum(jnp.where(rows["mask"], square, 0.0)),
            "pairs": jnp.sum(pair * rows["weight"]),
        }
        return totals, {"error": m.Mean.of(square, rows["mask"])}, extra

    return loss


def weights(rows):
    return {"tokens": jnp.sum(rows["mask"]), "pairs": jnp.sum(rows["weight"])}


FROZEN = {"shift": jnp.full((D,), 0.25)}
ARGUMENTS = (jax.random.key(3), {})


@pytest.fixture(scope="module")
def params():
    return sp.init(SPECS, jax.random.key(0))


@pytest.fixture(scope="module")
def whole(params):
    """The gradient and objective of the uncut batch on one device."""
    gradient = jax.jit(steps.make_gradient(make_loss(), weights, COEF))
    return gradient(params, FROZEN, make_batch(), *ARGUMENTS)


def objective(up, down, batch):
    """The objective in float64 NumPy, from the formula."""
    hidden = np.tanh((batch["x"].astype(np.float64) + 0.25) @ up)
    out = (hidden @ down)[..., 0]
    tokens = ((out - batch["y"]) ** 2)[batch["mask"]].sum() / batch["mask"].sum()
    pair = np.log1p(np.exp(out[:, 1] - out[:, 0]))
    pairs = (pair * batch["weight"]).sum() / batch["weight"].sum()
    return 0.7 * tokens + 1.3 * pairs, tokens, pairs


def close(got, want, rtol=1e-6):
    """Equal to `rtol` of the largest entry of each leaf."""
    for path, leaf in trees.flatten(want).items():
        other = np.asarray(trees.flatten(got)[path])
        np.testing.assert_allclose(
            other, leaf, rtol=0, atol=rtol * np.abs(leaf).max(), err_msg=path
        )


def test_objective_and_gradient_against_numpy(params, whole):
    """Catches one denominator for both losses, a lost coefficient, and a wrong gradient."""
    batch = make_batch()
    up = np.asarray(params["up"]["kernel"], np.float64)
    down = np.asarray(params["down"]["kernel"], np.float64)
    grads, value, terms, metrics, _ = whole
    want, tokens, pairs = objective(up, down, batch)
    got = [value, terms["tokens"], terms["pairs"]]
    np.testing.assert_allclose(got, [want, 0.7 * tokens, 1.3 * pairs], rtol=1e-6)
    assert m.results(metrics)["error"] == pytest.approx(tokens, rel=1e-6)
    h = 1e-5
    for array, got in ((up, grads["up"]["kernel"]), (down, grads["down"]["kernel"])):
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            at = array[index]
            array[index] = at + h
            above = objective(up, down, batch)[0]
            array[index] = at - h
            numeric[index] = (above - objective(up, down, batch)[0]) / (2 * h)
            array[index] = at
        np.testing.assert_allclose(got, numeric, rtol=0, atol=2e-6 * np.abs(numeric).max())


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(params, whole, microbatches):
    """Catches means of means: the parts hold different numbers of tokens and of pairs."""
    gradient = jax.jit(steps.make_gradient(make_loss(), weights, COEF, microbatches))
    grads, value, terms, metrics, _ = gradient(params, FROZEN, make_batch(), *ARGUMENTS)
    close(grads, whole[0])
    np.testing.assert_allclose(value, whole[1], rtol=1e-6)
    np.testing.assert_allclose(list(terms.values()), list(whole[2].values()), rtol=1e-6)
    assert m.results(metrics)["error"] == pytest.approx(m.results(whole[3])["error"], rel=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_meshes_change_nothing(params, whole, sizes, microbatches):
    """Catches a device that divides by its own rows' weight, and a part summed twice or not."""
    where = rules.Rules(mesh.make_mesh(sizes))
    gradient = steps.make_gradient(make_loss(where), weights, COEF, microbatches, rules=where)
    placed = jax.device_put(params, sp.shardings(SPECS, where))
    batch = hosts.to_global(make_batch(), where)
    grads, value, _, metrics, _ = jax.jit(gradient)(placed, FROZEN, batch, *ARGUMENTS)
    close(grads, whole[0])
    np.testing.assert_allclose(value, whole[1], rtol=1e-6)
    assert m.results(metrics)["error"] == pytest.approx(m.results(whole[3])["error"], rel=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}], ids=str)
def test_whole_step_on_a_mesh_equals_one_device(params, sizes):
    """Catches pinned shardings that change an update or wander off after a step."""
    where = rules.Rules(mesh.make_mesh(sizes))
    tx = optax.adamw(1e-2)
    placed = states.shardings(SPECS, tx, where)
    alone = states.create(params, tx, jax.random.key(1))
    spread = states.place(states.create(params, tx, jax.random.key(1)), placed)
    kw = dict(microbatches=2, clip=0.5)
    one = steps.make_train_step(make_loss(), weights, COEF, tx, **kw)
    many = steps.make_train_step(
        make_loss(where),
        weights,
        COEF,
        tx,
        rules=where,
        shardings=placed,
        batch_sharding=hosts.batch_sharding(where),
        **kw,
    )
    for seed in range(3):
        alone, _ = one(alone, FROZEN, jax.tree.map(jnp.asarray, make_batch(seed)))
        spread, _ = many(spread, FROZEN, hosts.to_global(make_batch(seed), where))
    close(spread.params, alone.params)
    assert jax.tree.map(lambda x: x.sharding, spread) == placed


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_weight_gives_no_gradient(params, microbatches):
    """Catches 0 / 0 on a batch of padding, and one empty loss that takes the other along."""
    gradient = jax.jit(steps.make_gradient(make_loss(), weights, COEF, microbatches))
    empty = {k: np.zeros_like(v) for k, v in make_batch().items()}
    grads, value, terms, _, _ = gradient(params, FROZEN, empty, *ARGUMENTS)
    assert float(value) == 0 and all(float(v) == 0 for v in terms.values())
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    unpaired = {**make_batch(), "weight": np.zeros(B, np.float32)}
    grads, value, terms, _, _ = gradient(params, FROZEN, unpaired, *ARGUMENTS)
    up, down = (np.asarray(params[k]["kernel"], np.float64) for k in ("up", "down"))
    with np.errstate(invalid="ignore"):
        _, tokens, _ = objective(up, down, unpaired)
    np.testing.assert_allclose(value, 0.7 * tokens, rtol=1e-6)
    assert float(terms["pairs"]) == 0
    assert all(np.isfinite(g).all() and np.asarray(g).any() for g in jax.tree.leaves(grads))


# A linear model small enough for pencil and paper: total = sum(x) * w[0] + 2 w[1], weight = rows.


def line(params, frozen, rows, keys, extra):
    del frozen, keys
    count = rows["x"].shape[0]
    return {"line": jnp.sum(rows["x"]) * params["w"][0] + 2 * count * params["w"][1]}, {}, extra


def rows_of(rows):
    return {"line": jnp.float32(rows["x"].shape[0])}


X = {"x": jnp.array([1.0, 2.0, 3.0, 6.0])}  # mean 3: the gradient of w is (3, 2) times coef


def logged(values):
    """Names that the log shows: not the flags of a skipped step."""
    return {k for k in values if not k.startswith("nonfinite/") and k != "skipped"}


def start(tx, w=(1.0, -1.0), key=0):
    return states.create({"w": jnp.array(w)}, tx, jax.random.key(key))


@pytest.mark.parametrize(("clip", "factor"), [(None, 1.0), (100.0, 1.0), (1.3, 1.3 / 13**0.5)])
def test_one_sgd_step_by_hand(clip, factor):
    """Catches clipping of what is below the norm, and a norm logged after clipping."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(line, rows_of, {"line": 0.5}, tx, clip=clip and clip / 2)
    state, metrics = step(start(tx), {}, X)
    np.testing.assert_allclose(state.params["w"], [1 - 0.15 * factor, -1 - 0.1 * factor], rtol=1e-6)
    values = m.results(metrics)
    assert logged(values) == {"loss", "grad_norm"}  # one loss is not logged twice
    assert values["grad_norm"] == pytest.approx(0.5 * 13**0.5, rel=1e-6)
    assert values["loss"] == pytest.approx(0.5 * (3 - 2), rel=1e-6)
    assert int(state.step) == 1


def test_two_adamw_steps_by_hand():
    """Catches an optimizer that sees no parameters, or state that is not carried on."""
    tx = optax.adamw(0.1, b1=0.8, b2=0.9, weight_decay=0.5)
    step = steps.make_train_step(line, rows_of, {"line": 1.0}, tx)
    state = start(tx)
    w, g = np.array([1.0, -1.0]), np.array([3.0, 2.0])
    for _ in range(2):
        state, _ = step(state, {}, X)
        # A constant gradient: both moments are unbiased at once, so that Adam's part is g / |g|.
        w = w - 0.1 * (g / (np.abs(g) + 1e-8) + 0.5 * w)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)


def test_terms_are_logged_apart_when_there_are_several(params):
    """Catches a sum that hides which loss falls."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(make_loss(), weights, COEF, tx, microbatches=2)
    _, metrics = step(states.create(params, tx, jax.random.key(0)), FROZEN, make_batch())
    values = m.results(metrics)
    assert logged(values) == {"loss", "loss/tokens", "loss/pairs", "grad_norm", "error"}
    assert values["loss"] == pytest.approx(values["loss/tokens"] + values["loss/pairs"], rel=1e-6)


def test_names_must_match():
    """Catches a loss without coefficient, or without weight, that would train as if it were 0."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(line, rows_of, {"lime": 1.0}, tx)
    with pytest.raises(ValueError, match=r"\['lime'\], but the weights .* named \['line'\]"):
        step(start(tx), {}, X)
    step = steps.make_train_step(line, lambda rows: {"lime": 1.0}, {"lime": 1.0}, tx)
    with pytest.raises(ValueError, match=r"\['lime'\], but the totals .* named \['line'\]"):
        step(start(tx), {}, X)


def test_a_batch_that_does_not_split_names_its_divisors():
    """Catches rows that are dropped without a word."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(line, rows_of, {"line": 1.0}, tx, microbatches=3)
    with pytest.raises(ValueError, match=r"batch of 4 .* into 3 .* divisor \[1, 2, 4\]"):
        step(start(tx), {}, X)


def test_the_state_is_donated_and_nothing_else(params):
    """Catches a second copy of parameters and moments, and frozen weights deleted by a step."""
    tx = optax.adamw(0.1)
    step = steps.make_train_step(make_loss(), weights, COEF, tx, microbatches=2)
    batch = jax.tree.map(jnp.asarray, make_batch())
    key = jax.random.key(0)
    state = states.create(params, tx, key)
    bytes_ = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    compiled = step.lower(state, FROZEN, batch).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_
    new, _ = step(state, FROZEN, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    kept = [*jax.tree.leaves((FROZEN, batch, params)), key]
    assert not any(x.is_deleted() for x in kept)
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_frozen_weights_get_no_gradient(params):
    """Catches a gradient taken over frozen weights, or updates that leave the parameters' tree."""
    gradient = steps.make_gradient(make_loss(), weights, COEF)
    grads = jax.eval_shape(gradient, params, FROZEN, make_batch(), *ARGUMENTS)[0]
    assert set(trees.flatten(grads)) == set(trees.flatten(params))
    # An integer frozen leaf could not be differentiated at all.
    frozen = {**FROZEN, "table": jnp.arange(3)}
    jax.eval_shape(gradient, params, frozen, make_batch(), *ARGUMENTS)


def drawn(params, frozen, rows, keys, extra):
    """A loss whose gradient is a random number a row."""
    del frozen, rows
    number = jax.vmap(jax.random.uniform)(keys)
    return {"line": jnp.sum(number) * params["w"][0]}, {"number": m.Sum(jnp.sum(number))}, extra


def test_every_row_draws_from_its_own_key_whatever_the_cut():
    """Catches equal randomness in every step, part or device, and a key that drifts."""
    tx = optax.sgd(1.0)
    where = rules.Rules(mesh.make_mesh({"data": 2, "fsdp": 2}))
    x = {"x": jnp.arange(8.0)}
    for microbatches, on in ((1, None), (2, None), (2, where)):
        kw = {} if on is None else {"rules": on}
        step = steps.make_train_step(
            drawn, rows_of, {"line": 1.0}, tx, microbatches=microbatches, **kw
        )
        state = start(tx, key=5)
        for number in range(2):
            before = float(state.params["w"][0])
            batch = x if on is None else hosts.to_global(jax.tree.map(np.asarray, x), on)
            state, metrics = step(state, {}, batch)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(5), number), 8)
            want = np.asarray(jax.vmap(jax.random.uniform)(keys))
            assert m.results(metrics)["number"] == pytest.approx(want.sum(), rel=1e-6)
            moved = before - float(state.params["w"][0])
            assert moved == pytest.approx(want.mean(), abs=1e-6)
            same = jax.random.key_data(state.key) == jax.random.key_data(jax.random.key(5))
            assert same.all()


def counting(params, frozen, rows, keys, extra):
    """`line`, with a count of its calls in extra."""
    totals, metrics, _ = line(params, frozen, rows, keys, extra)
    return totals, metrics, {"calls": extra["calls"] + 1}


def test_a_loss_keeps_state_of_its_own():
    """Catches state that is lost between microbatches, or kept once a device."""
    tx = optax.sgd(1.0)
    where = rules.Rules(mesh.make_mesh({"data": 2, "fsdp": 2}))
    for on in (None, where):
        step = steps.make_train_step(counting, rows_of, {"line": 1.0}, tx, microbatches=2, rules=on)
        state = start(tx).replace(extra={"calls": jnp.int32(0)})
        for _ in range(2):
            state, _ = step(state, {}, X)
        assert int(state.extra["calls"]) == 4


def root(params, frozen, rows, keys, extra):
    """A loss with an infinite slope where x is 0, and no value where it is below."""
    del frozen, keys
    value = jnp.sum(jnp.sqrt(rows["x"] * params["w"][0]))
    return {"line": value}, {"value": m.Mean(value, jnp.float32(1)), "top": m.Max(value)}, extra


@pytest.mark.parametrize(
    ("x", "loss_bad"), [([4.0, 0.0], 0.0), ([4.0, -1.0], 1.0)], ids=["slope", "value"]
)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(x, loss_bad, microbatches):
    """Catches NaN in parameters, moments or averages, and in the means of the log."""
    tx = optax.adamw(0.1)
    step = steps.make_train_step(
        root, rows_of, {"line": 1.0}, tx, microbatches=microbatches, ema=0.5, clip=1.0
    )
    state = states.create({"w": jnp.array([1.0, -1.0])}, tx, jax.random.key(0), copies=["ema"])
    state, good = step(state, {}, {"x": jnp.array([1.0, 4.0])})
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.extra))
    state, metrics = step(state, {}, {"x": jnp.array(x)})
    new = jax.tree.map(np.asarray, (state.params, state.opt_state, state.extra))
    jax.tree.map(np.testing.assert_array_equal, new, kept)
    assert int(state.step) == 2
    values = m.results(metrics)
    assert values["skipped"] == 1 and values["nonfinite/grad_norm"] == 1
    assert values["nonfinite/loss"] == loss_bad
    both = m.results(m.add(good, metrics))
    assert both["loss"] == m.results(good)["loss"] and both["skipped"] == 1
    assert both["grad_norm"] == m.results(good)["grad_norm"]
    assert both["value"] == m.results(good)["value"] and both["top"] == m.results(good)["top"]


def test_average_of_the_parameters_by_hand():
    """Catches an average of the parameters before the update, and swapped factors."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(line, rows_of, {"line": 1.0}, tx, ema=0.75)
    state = states.create({"w": jnp.array([1.0, -1.0])}, tx, jax.random.key(0), copies=["ema"])
    for _ in range(2):
        state, _ = step(state, {}, X)
    # w: 1, 0.7, 0.4 and -1, -1.2, -1.4
    np.testing.assert_allclose(state.params["w"], [0.4, -1.4], rtol=1e-6)
    first = 0.75 * np.array([1, -1]) + 0.25 * np.array([0.7, -1.2])
    want = 0.75 * first + 0.25 * np.array([0.4, -1.4])
    np.testing.assert_allclose(state.extra["ema"]["w"], want, rtol=1e-6)


def test_frozen_leaves_stay_and_cost_no_gradient(params):
    """Catches a frozen leaf that decays, moves, or counts in the norm that is clipped."""
    trained = {"up": {"kernel": False}, "down": {"kernel": True}}
    tx = optax.masked(optax.adamw(0.1, weight_decay=0.5), trained)
    step = steps.make_train_step(make_loss(), weights, COEF, tx, trained=trained, microbatches=2)
    state, metrics = step(states.create(params, tx, jax.random.key(0)), FROZEN, make_batch())
    np.testing.assert_array_equal(state.params["up"]["kernel"], params["up"]["kernel"])
    assert (np.asarray(state.params["down"]["kernel"]) != params["down"]["kernel"]).all()
    gradient = steps.make_gradient(make_loss(), weights, COEF, trained=trained)
    grads = gradient(params, FROZEN, make_batch(), *ARGUMENTS)[0]
    assert grads["up"]["kernel"] is None
    norm = float(jnp.linalg.norm(grads["down"]["kernel"]))
    assert m.results(metrics)["grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_a_step_compiles_once(params):
    """Catches types or layouts of the state that change after the first step."""
    tx = optax.adamw(0.1)
    step = steps.make_train_step(make_loss(), weights, COEF, tx, microbatches=2, clip=1.0)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for tree in (params, half):
        state = states.create(tree, tx, jax.random.key(0))
        before = jax.tree.map(lambda x: x.dtype, (state.params, state.opt_state))
        count = step._cache_size()
        for seed in range(3):
            state, metrics = step(state, FROZEN, jax.tree.map(jnp.asarray, make_batch(seed)))
        assert step._cache_size() == count + 1
        assert metrics["grad_norm"].total.dtype == jnp.float32
        assert jax.tree.map(lambda x: x.dtype, (state.params, state.opt_state)) == before
