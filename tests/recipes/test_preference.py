"""Training on pairs end to end at toy size: it learns, resumes bit for bit, and does not depend on
the mesh or on what is cached."""

import hashlib
import json
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.data import sources
from jaxreward.hub import load
from jaxreward.parallel import mesh
from jaxreward.recipes import preference
from jaxreward.train import checkpoint

LORA = ("models.policy.train=lora", "models.policy.lora_rank=4")
MODES = {
    "top": ("models.policy.train=top",),
    "lora": LORA,
    "head": ("models.policy.train=head",),
    "all": ("models.policy.train=all",),
}
# By hand for 2 layers of width 32, 4 and 2 heads of 8, mlp 64, vocabulary 259.
EMBED, LAYER, NORM, HEAD = 259 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32, 32, 32
ADAPTERS = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
COUNTS = {
    "top": (LAYER + NORM + HEAD, EMBED + LAYER),
    "lora": (ADAPTERS + HEAD, EMBED + 2 * LAYER + NORM),
    "head": (HEAD, EMBED + 2 * LAYER + NORM),
    "all": (EMBED + 2 * LAYER + NORM + HEAD, 0),
}


def config(folder, *overrides):
    """The smoke config, from a model that is already there."""
    return presets.load(
        "reward_model/bradley_terry:smoke", [f"models.policy.init=hf:{folder}", *overrides]
    )


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir, built, step):
    """Parameters of one checkpoint."""
    like = jax.eval_shape(lambda: built.state.params)
    like = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding),
        like,
        built.state.params,
    )
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return jax.device_get(checkpoints.params(like, step=step))


def by_hand(built, steps):
    """(final parameters, metrics of every step), without the loop."""
    state, out = built.state, []
    for _ in range(steps):
        state, metrics = built.step(state, built.frozen, built.to_device(next(built.batches)))
        out.append(m.results(metrics))
    return jax.device_get(state.params), out


@pytest.fixture(scope="module", params=list(MODES))
def trained(request, tiny_folder, tmp_path_factory):
    """A short training by hand, in each mode, with what it went through."""
    mode = request.param
    steps, lr = (30, "0.1") if mode == "head" else (24, "1e-2")
    made = config(tiny_folder, *MODES[mode], f"train.steps={steps}", f"optim.lr={lr}")
    workdir = tmp_path_factory.mktemp(f"trained_{mode}")
    built = preference.build(made, workdir)
    assert built.steps == steps
    at, metrics = [jax.device_get(built.state.params)], []
    state = built.state
    for _ in range(steps):
        state, got = built.step(state, built.frozen, built.to_device(next(built.batches)))
        metrics.append(m.results(got))
        at.append(jax.device_get(state.params))
    return {
        "mode": mode,
        "config": made,
        "workdir": workdir,
        "built": built,
        "params": at,
        "metrics": metrics,
        "evals": built.evaluate(state),
    }


def test_learns(trained):
    """Each way of training learns the toy preference; catches a flipped sign, a learning rate that
    does not arrive, and features that belong to other answers."""
    loss = [x["loss"] for x in trained["metrics"]]
    assert np.mean(loss[-4:]) < 0.7 * np.mean(loss[:4])
    # The head alone reads a random model's states, and still most of them.
    least = 0.8 if trained["mode"] == "head" else 0.9
    assert np.mean([x["accuracy"] for x in trained["metrics"][-4:]]) > least
    assert trained["evals"]["heldout/accuracy"] > least
    assert trained["evals"]["heldout/pairs"] == 16
    assert trained["evals"]["heldout/loss"] < 0.7 * np.log(2)


def test_trains_what_it_says(trained):
    """Counts by hand; every trained leaf moves and starts where the other modes start."""
    trained_count, frozen_count = COUNTS[trained["mode"]]
    assert trained["built"].facts["parameters"] == {
        "trained": trained_count,
        "frozen": frozen_count,
    }
    first, last = tr.flatten(trained["params"][0]), tr.flatten(trained["params"][-1])
    assert sum(x.size for x in first.values()) == trained_count
    assert [path for path in first if np.array_equal(first[path], last[path])] == []
    # The head's key is a function of the seed and its path, whatever else is trained.
    key = jax.random.fold_in(jax.random.key(0), 1)
    key = jax.random.fold_in(key, zlib.crc32(b"score/kernel"))
    expected = jax.random.normal(key, (32, 1)) / np.sqrt(33)
    np.testing.assert_allclose(first["score/kernel"], expected, atol=1e-6)


def test_cached_features_change_nothing(trained, tmp_path):
    """The frozen layers run once or at every step; catches features of another row, position or
    layer. Packing differs between the two passes, so a mix-up would show."""
    mode, made = trained["mode"], trained["config"]
    cached = trained["built"].train[0].features is not None
    assert cached == (mode != "all") == (trained["workdir"] / "features").is_dir()
    if mode not in ("top", "head"):  # lora is cut at the same place as top
        return
    made.data.cache_frozen = False
    built = preference.build(made, tmp_path)
    assert built.train[0].features is None and not (tmp_path / "features").exists()
    params, metrics = by_hand(built, 3)
    # Adam divides by the size of a gradient: rounding of the smallest ones grows to 1e-6.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, trained["params"][3], params)
    for one, other in zip(trained["metrics"], metrics):
        assert one == pytest.approx(other, abs=1e-5)


def test_features_in_bfloat16_are_read_back(tiny_folder, tmp_path):
    """As they were written: NumPy's files know the bytes of bfloat16 and not its name."""
    made = config(tiny_folder, *MODES["head"], "train.compute=bfloat16")
    first = preference.build(made, tmp_path)
    (path,) = (tmp_path / "features").iterdir()
    before = path.stat().st_mtime_ns
    again = preference.build(made, tmp_path)
    assert path.stat().st_mtime_ns == before
    for one, other in zip(first.train + first.heldout, again.train + again.heldout, strict=True):
        assert {x.dtype for x in [*one.features, *other.features]} == {jnp.dtype("bfloat16")}
        jax.tree.map(np.testing.assert_array_equal, one.features, other.features)


def test_workdir(finished, pairs_file, capsys):
    """What a run leaves behind is what the other commands and the report read."""
    made, workdir = finished
    assert presets.to_dict(presets.read(workdir / "config.json")) == presets.to_dict(made)
    environment = json.loads((workdir / "environment.json").read_text())
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "python", "platform", "command"):
        assert environment[name]
    assert environment["jax"] == jax.__version__
    data = environment["data"]
    assert data["sha256"] == hashlib.sha256(pairs_file.read_bytes()).hexdigest()
    assert (data["path"], data["read"], data["kept"]) == (str(pairs_file), 40, 40)
    held = environment["eval_data"]
    assert data["pairs"] + held["pairs"] == 40 and held["held out of path"] == held["pairs"]
    assert environment["mesh"].endswith("data 4")
    assert environment["steps"]["total"] == 4
    found = lines(workdir)
    assert [line["step"] for line in found] == [1, 2, 2, 3, 4, 4]
    evals = [line for line in found if "eval/heldout/accuracy" in line]
    assert [line["step"] for line in evals] == [2, 4]
    for subset in ("even", "odd"):
        assert 0 <= evals[-1][f"eval/heldout/accuracy/{subset}"] <= 1
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [2, 4]
    with checkpoint.Checkpoints(workdir) as checkpoints:
        meta = checkpoints.meta()
    assert (meta["step"], meta["template"], meta["max_len"]) == (4, "chat", 64)
    assert meta["init"] == made.models.policy.init.removeprefix("hf:")
    assert len(meta["init_sha256"]) == 64
    (features,) = (workdir / "features").iterdir()
    assert features.suffix == ".npy"


def test_resumed_equals_uninterrupted(finished, tmp_path):
    """A run cut off after step 2 ends in the same bits; catches a data iterator, schedule or
    optimizer that starts anew, and cached features that are not what was written."""
    made, workdir = finished
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    cache = next((again / "features").iterdir())
    before = cache.stat().st_mtime_ns
    preference.run(made, again)
    assert cache.stat().st_mtime_ns == before  # read, not computed again
    built = preference.build(made, again)
    first, second = (saved(w, built, 4) for w in (workdir, again))
    middle = saved(workdir, built, 2)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.array_equal(first["score"]["kernel"], middle["score"]["kernel"])
    clock = lambda key: key.endswith("_per_second") or key == "train/mfu"
    drop = lambda line: {k: v for k, v in line.items() if not clock(k)}
    assert [drop(x) for x in lines(again)] == [drop(x) for x in lines(workdir)]
    # Finished: the same command once more does nothing.
    preference.run(made, again)
    assert [drop(x) for x in lines(again)] == [drop(x) for x in lines(workdir)]


def test_other_base_weights_are_refused(finished, tmp_path, tiny_folder):
    """A checkpoint of the upper layers belongs to the lower layers that it was trained on."""
    made, workdir = finished
    base, again = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_folder, base)
    shutil.copytree(workdir, again)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(bytes(weights))
    made = presets.read(again / "config.json")
    made.models.policy.init = f"hf:{base}"
    with pytest.raises(ValueError, match=r"trained from other weights than those now in .*model;"):
        preference.run(made, again)


def test_tiny_model_is_made_in_the_workdir(tiny_folder, tmp_path):
    """The smoke config as it ships: the model comes from nothing, and is the same every time."""
    made = presets.load("reward_model/bradley_terry:smoke", ["data.cache_frozen=false"])
    built = preference.build(made, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny_model"]
    assert load.content_hash(tmp_path / "tiny_model") == load.content_hash(tiny_folder)
    assert built.meta["init"] == str(tmp_path / "tiny_model") and built.steps == 4


def sgd_steps(folder, workdir, **sizes):
    """(parameters, metrics) after 2 steps of SGD on a mesh; Adam would blow rounding up."""
    made = config(folder, *MODES["all"], "optim.name=sgd", "optim.lr=0.1", "data.batch=4")
    made.mesh.update(sizes)
    built = preference.build(made, workdir)
    kernel = built.state.params["model"]["layers"]["mlp"]["up"]["kernel"]
    placed = (len(kernel.sharding.device_set), kernel.addressable_shards[0].data.shape)
    return (*by_hand(built, 2), placed)


@pytest.fixture(scope="module")
def one_device(tiny_folder, tmp_path_factory):
    """The same steps without a mesh."""
    real = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda sizes=None: real(sizes, devices=jax.devices()[:1]))
        params, metrics, placed = sgd_steps(tiny_folder, tmp_path_factory.mktemp("one"))
    assert placed == (1, (2, 32, 64))
    return params, metrics


@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        (dict(data=2, fsdp=2), (2, 16, 64)),
        pytest.param(dict(data=4), (2, 32, 64), marks=pytest.mark.slow),
        pytest.param(dict(data=1, fsdp=4), (2, 8, 64), marks=pytest.mark.slow),
        pytest.param(dict(data=1, fsdp=2, tensor=2), (2, 16, 32), marks=pytest.mark.slow),
        pytest.param(dict(data=1, tensor=4), (2, 32, 16), marks=pytest.mark.slow),
    ],
)
def test_the_mesh_changes_nothing(tiny_folder, tmp_path, one_device, sizes, shard):
    """The same steps as on one device; catches a mean over devices, and a lost gradient shard."""
    params, metrics, placed = sgd_steps(tiny_folder, tmp_path, **sizes)
    assert placed == (4, shard)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, params, one_device[0])
    for one, other in zip(metrics, one_device[1], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_loss_is_the_weighted_mean_over_pairs(tiny_folder, pairs_file, tmp_path):
    """First loss and margin against the formula in float64, with margins and weights of the data;
    catches packing that pairs the wrong answers, and a mean over rows instead of pairs."""
    made = config(
        tiny_folder, f"data.path={pairs_file}", f"data.eval_path={pairs_file}", "data.batch=16"
    )
    made.unlock()
    made.losses.bt.margin = "data"
    made.losses.plain = dict(fn="preference.bradley_terry", coef=0.5)
    made.lock()
    built = preference.build(made, tmp_path)
    assert len(built.train) == 20  # two pairs of one prompt share a tree
    scorer = preference.scorer.make_predict(built.plan, rules=built.rules)
    gap, margin, weight = [], [], []
    for tree, scores in zip(built.train, scorer(built.state.params, built.frozen, built.train)):
        for (a, b), m_, w in zip(tree.pairs, tree.margin, tree.weight, strict=True):
            gap.append(float(scores[a]) - float(scores[b]))
            margin.append(m_)
            weight.append(w)
    gap, margin, weight = (np.array(x, np.float64) for x in (gap, margin, weight))
    assert sorted(set(zip(margin, weight))) == [(0.0, 1.0), (0.5, 0.25)] and len(gap) == 40
    mean = lambda x: float((x * weight).sum() / weight.sum())
    assert built.facts["rows"]["count"] <= 16  # one batch holds all pairs
    _, (first,) = by_hand(built, 1)
    with_margin = mean(np.log1p(np.exp(-(gap - margin))))
    without = mean(np.log1p(np.exp(-gap)))
    assert first["loss/bt"] == pytest.approx(with_margin, abs=1e-5)
    assert first["loss/plain"] == pytest.approx(0.5 * without, abs=1e-5)
    assert first["loss"] == pytest.approx(with_margin + 0.5 * without, abs=1e-5)
    assert first["margin"] == pytest.approx(mean(gap), abs=1e-5)
    assert first["accuracy"] == pytest.approx(mean(gap > 0), abs=1e-5)


def test_held_out_by_prompt(tiny_folder, pairs_file):
    """No prompt is on both sides, the split depends on the seed alone, and nothing is lost."""
    from jaxreward.data import tokenize

    tokenizer = tokenize.load_tokenizer(tiny_folder)

    def split(seed, fraction=0.3):
        made = config(tiny_folder, f"data.path={pairs_file}", f"seed={seed}")
        made.data.eval_fraction = fraction
        train, held, _ = preference.load_data(made, tokenizer)
        return [tree.prompt.tobytes() for tree in train], [tree.prompt.tobytes() for tree in held]

    train, held = split(0)
    assert not set(train) & set(held) and len(train) + len(held) == 20 and 2 <= len(held) <= 12
    assert split(0) == (train, held) and split(1) != (train, held)
    assert split(0, 0.0) == (split(0, 0.0)[0], []) and len(split(0, 0.0)[0]) == 20
    with pytest.raises(ValueError, match=r"no training pair is left; lower data\.eval_fraction"):
        split(0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data.path="], r"data\.path is empty; pass --config\.data\.path=FILE"),
        (["data.form=lists"], r"data\.form must be 'pairs' or 'points'; received 'lists'"),
        (["data.corpus=helpster.pairs", "data.path=x"], r"no module 'helpster'"),
        (["models.policy.family=mamba"], r"models\.policy.*family='mamba'"),
        (["models.policy.head=vector"], r"models\.policy.*head='vector'"),
        (["models.policy.train=lots"], r"unknown train='lots'; use one of all, lora"),
        (["models.policy.train=top", "models.policy.top_layers=2"], r"needs top_layers in 1\.\.1"),
        (["models.policy.train=lora"], r"LoRA rank must be at least 1; received 0"),
        (["models.policy.init=model"], r"write hf:model"),
        (["mesh.data=3"], r"needs 3 devices; there are 4"),
        (["optim.name=lion", "data.cache_frozen=false"], r"optim\.name='lion' is unknown"),
    ],
)
def test_what_a_config_can_get_wrong(tiny_folder, tmp_path, overrides, text):
    """Told by the name of the field, before anything is trained."""
    with pytest.raises((ValueError, KeyError), match=text):
        preference.build(config(tiny_folder, *overrides), tmp_path)


def test_batch_that_does_not_divide(tiny_folder, tmp_path):
    """A batch of 6 rows on 4 devices is refused by the name of the setting."""
    made = config(tiny_folder, "data.batch=6", "data.cache_frozen=false")
    with pytest.raises(ValueError, match=r"6 rows does not divide .* 4 devices; set data\.batch"):
        preference.build(made, tmp_path)


def test_unknown_margin(tiny_folder, tmp_path):
    """margin takes words; a number would be ignored."""
    made = config(tiny_folder, "data.cache_frozen=false")
    made.unlock()
    made.losses.bt.margin = "0.5"
    with pytest.raises(
        ValueError, match=r"losses\.bt\.margin must be 'data', 'scores', 'none' or a"
    ):
        preference.build(made, tmp_path)


def scored_file(tmp_path, drop=()):
    """Pairs with scores and margins that differ from pair to pair, two pairs of each prompt."""
    rows = []
    for i, pair in enumerate(testing.synthetic_pairs(12, seed=7)):
        more = {"chosen_score": 8 + 0.25 * i, "rejected_score": 7.5 - 0.5 * (i % 3)}
        rows.append({**pair, **({} if i in drop else more), "margin": 0.125 * i})
        rows.append({**rows[-1], "id": f"{i}b", "rejected": "nope", "weight": 0.5})
    path = tmp_path / "scored.jsonl"
    sources.write_jsonl(path, rows)
    return path


LOSSES = {
    "margin": dict(fn="preference.bradley_terry", margin="scores"),
    "soft": dict(fn="preference.soft_label", probability="scores", smoothing=0.1),
    "hinge": dict(fn="preference.hinge", margin="data"),
    "constant": dict(fn="preference.hinge", margin=2),
    "regression": dict(fn="preference.margin_regression", margin="scores"),
    "absolute": dict(fn="preference.absolute_regression"),
    "said": dict(fn="preference.absolute_regression", chosen_score="data", rejected_score="data"),
    "centring": dict(fn="preference.centring"),
    "log_exp": dict(fn="preference.log_exp", margin="none"),
}


def test_losses_take_scores_and_margins_of_their_own_pairs(tiny_folder, tmp_path):
    """Catches scores of another pair, swapped sides, a word that is not filled, and weights that
    are left out: every loss of the first step against float64."""
    path = scored_file(tmp_path)
    made = config(tiny_folder, f"data.path={path}", f"data.eval_path={path}", "data.batch=16")
    made.unlock()
    made.losses = {name: {"coef": 1.0, **entry} for name, entry in LOSSES.items()}
    made.lock()
    built = preference.build(made, tmp_path / "run")
    rows = []
    predict = preference.scorer.make_predict(built.plan, rules=built.rules)
    for tree, scores in zip(built.train, predict(built.state.params, built.frozen, built.train)):
        for (a, b), m_, w, (s, t) in zip(
            tree.pairs, tree.margin, tree.weight, tree.scores, strict=True
        ):
            rows.append((scores[a], scores[b], m_, w, s, t))
    c, r, margin, weight, s, t = np.array(rows, np.float64).T
    assert len(c) == 24 and len(set(s)) == 12 and built.facts["rows"]["count"] <= 16
    gap, wanted = c - r, s - t
    q = 1 / (1 + np.exp(-wanted))
    q = 0.9 * q + 0.1 * (1 - q)
    want = {
        "margin": np.logaddexp(0, wanted - gap),
        "soft": q * np.logaddexp(0, -gap) + (1 - q) * np.logaddexp(0, gap),
        "hinge": np.maximum(0, margin - gap),
        "constant": np.maximum(0, 2 - gap),
        "regression": (gap - wanted) ** 2,
        "absolute": (c - s) ** 2 + (r - t) ** 2,
        "said": (c - s) ** 2 + (r - t) ** 2,
        "centring": (c + r) ** 2,
        "log_exp": np.logaddexp(0, -gap),
    }
    _, (first,) = by_hand(built, 1)
    for name, each in want.items():
        mean = (each * weight).sum() / weight.sum()
        assert first[f"loss/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-5), name


def test_scores_of_pairs_that_do_not_count(tiny_folder):
    """Catches a NaN that comes back through the gradient of a pair of weight 0."""
    made = config(tiny_folder)
    cfg, weights, _ = load.load(tiny_folder)
    plan = preference.trainable.make_plan(cfg, made.models.policy)
    params, frozen = preference.trainable.init(plan, weights, jax.random.key(0))
    rows = testing.empty_pair_rows(1, 8, pairs=1).replace(scores=np.full((1, 1, 2), np.nan))
    entry = {"abs": dict(fn="preference.absolute_regression", coef=1.0)}
    loss, _, _ = preference.make_loss(plan, entry)
    total = lambda params: loss(params, frozen, rows, None, {})[0]["abs"]
    value, grads = jax.value_and_grad(total)(params)
    assert value == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            dict(fn="preference.hinge", margin="score"),
            r"losses\.x\.margin must be 'data', 'scores'",
        ),
        (dict(fn="preference.soft_label", probability="data"), r"probability must be 'scores'"),
        (dict(fn="preference.margin_regression"), r"losses\.x needs margin \('data', 'scores'\)"),
        (dict(fn="preference.centring", margin="data"), "centring does not take margin"),
        (dict(fn="preference.soft_label", smoothing=0.1, probability=2), None),
        (dict(fn="preference.absolute_regression"), r"losses\.x\.chosen_score is 'data', which"),
        (dict(fn="preference.bradley_terry", margin="scores"), r"x\.margin is 'scores', which"),
    ],
)
def test_what_a_loss_can_lack(tiny_folder, tmp_path, entry, text):
    """Catches a loss that trains on zeros where the data or the config say nothing."""
    if text is None:  # a number is passed on, and the function refuses it
        fn, _ = preference._entry("x", {"coef": 1.0, **entry})
        with pytest.raises(ValueError, match=r"probability in \[0, 1\]; received 2"):
            fn(jnp.zeros(1), jnp.zeros(1))
        return
    path = scored_file(tmp_path, drop=(5,))
    made = config(tiny_folder, f"data.path={path}", f"data.eval_path={path}")
    made.unlock()
    made.losses = {"x": {"coef": 1.0, **entry}}
    with pytest.raises(ValueError, match=text) as error:
        preference.build(made, tmp_path / "run")
    if "which" in text:
        assert "a pair of 'toy-5' has none" in str(error.value)


def test_margins_that_are_not_there(tiny_folder, tmp_path):
    """Catches margin='data' on data without margins, which would be plain Bradley-Terry."""
    made = config(tiny_folder, "losses.bt.margin=data")
    with pytest.raises(ValueError, match=r"losses\.bt\.margin is 'data', and no pair .* a margin"):
        preference.build(made, tmp_path)
