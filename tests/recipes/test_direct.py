"""Policies straight from preferences at toy size: the loss is the formula, whatever the layout;
the reference runs once or not at all; KTO's estimate is of the whole batch; a run learns and is
exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreward import cli, presets
from jaxreward.core import metrics as m
from jaxreward.core.types import TrainState
from jaxreward.data import pairs as pair_data
from jaxreward.data import pipeline, sources, tokenize
from jaxreward.evals import likelihood, scorer
from jaxreward.hub import load
from jaxreward.models import trainable
from jaxreward.parallel import mesh, rules
from jaxreward.recipes import direct
from jaxreward.train import step


def config(folder, words="smoke", *overrides):
    """A smoke config, from a model that is already there; nothing is computed twice in what is
    compiled."""
    fixed = [f"models.policy.init=hf:{folder}", "train.remat=none"]
    return presets.load(f"direct/dpo:{words}", [*fixed, *overrides])


@pytest.fixture
def one_device(monkeypatch):
    """Compiles faster; what is on a mesh has tests of its own."""
    real = mesh.make_mesh
    monkeypatch.setattr(
        mesh, "make_mesh", lambda sizes=None: real(sizes, devices=jax.devices()[:1])
    )


# The loss and its gradient


def referred(trees):
    """Trees with a made-up reference that differs from answer to answer."""
    made = lambda tree: np.array([-1.7 * len(x) - x[0] % 7 for x in tree.answers], np.float32)
    return [dataclasses.replace(tree, ref_logps=made(tree)) for tree in trees]


@pytest.fixture(scope="module")
def base(tiny_folder, pairs_file):
    """(plan, parameters, trees in which pairs share prompts, trees of one pair, a function that
    gives gradient and objective of trees packed like this, on a mesh and in two microbatches)."""
    cfg, weights, _ = load.load(tiny_folder)
    plan = trainable.Plan(dataclasses.replace(cfg, remat="none"), "all", head=None)
    params, _ = trainable.init(plan, weights, jax.random.key(0))
    records, _ = sources.read_pairs(pairs_file)
    tokenizer = tokenize.load_tokenizer(tiny_folder)
    together, _ = pair_data.encode_pairs(tokenizer, records)
    apart = [pair_data.encode_pairs(tokenizer, [record])[0][0] for record in records]
    made = presets.load("direct/dpo:ipo", ["losses.lm.coef=0.5"])
    losses = direct.read_losses(made.losses)

    where = rules.on_mesh(dict(data=2, fsdp=2, tensor=1, context=1, expert=1))
    slope = jax.jit(step.make_gradient(*direct.make_loss(plan, losses, where), 2, rules=where))

    def gradient(trees, packed, change=lambda rows: rows, params=params):
        fixed = dict(row_len=256, batch=40, answers_per_row=16, pairs_per_row=8)
        raw = next(pipeline.batches(trees, seed=0, plan=packed, **fixed))
        rows = change(scorer.pair_rows(raw, where))
        grads, value, *_ = slope(params, {}, rows, jax.random.key(0), {})
        return jax.device_get((grads, value))

    return plan, params, referred(together), referred(apart), gradient


@pytest.mark.slow
def test_the_loss_is_the_formula_and_layout_changes_nothing(base):
    """Catches pairs that take each other's answers or references, the mean of rows or of trees, a
    weight that does not count, and the wrong answer in the auxiliary term; a denominator per row,
    microbatch or device, neighbours that are seen, and a shared prompt that gives other log-probs
    than the pair by itself."""
    plan, params, together, apart, gradient = base
    found = likelihood.make_predict(plan)(params, {}, together)
    total = weight = 0.0
    for tree, values in zip(together, found, strict=True):
        (logps, count), ref = values.T.astype(np.float64), tree.ref_logps
        for (a, b), w in zip(tree.pairs, tree.weight, strict=True):
            gap = (logps[a] - ref[a]) / count[a] - (logps[b] - ref[b]) / count[b]
            total += w * ((gap - 1 / 0.2) ** 2 + 0.5 * -logps[a] / count[a])
            weight += w
    assert weight == 20 * 1.25  # of `pairs_file`
    assert len(together) == len(apart) / 2
    alone = gradient(apart, [[i] for i in range(len(apart))])
    np.testing.assert_allclose(alone[1], total / weight, rtol=1e-5)
    packed = pipeline.pack(together, row_len=256, answers_per_row=16, pairs_per_row=8)
    assert len(packed) < len(together) / 2
    other = gradient(together, packed)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, alone, other)
    # Along the gradient the objective rises by its norm.
    size = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(alone[0])))
    moved = lambda by: jax.tree.map(lambda p, g: p + by * g / size, params, alone[0])
    up, down = (gradient(together, packed, params=moved(by))[1] for by in (0.02, -0.02))
    np.testing.assert_allclose((up - down) / 0.04, size, rtol=1e-2)


def test_pairs_without_weight_give_nothing(base):
    """Catches 0 times NaN: no gradient from pairs of weight 0 whatever their reference is."""
    _, _, trees, _, gradient = base
    nothing = lambda rows: rows.replace(
        weight=0 * rows.weight, ref_logps=jnp.full_like(rows.ref_logps, jnp.inf)
    )
    grads, value = gradient(trees, [[i] for i in range(len(trees))], nothing)
    assert value == 0
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


# The reference


def test_the_reference_is_the_initial_model_and_runs_once(
    tiny_folder, tmp_path, one_device, monkeypatch
):
    """Catches a reference of other answers, of held-out trees only, one that is computed again at
    every start, and one that adapters change."""
    made = config(tiny_folder)
    built = direct.build(made, tmp_path)
    (path,) = (tmp_path / "reference").iterdir()
    stamp = path.stat().st_mtime_ns
    trees = built.train + built.heldout
    want = likelihood.make_predict(built.plan, rules=built.rules)(
        built.state.params, built.frozen, trees
    )
    for tree, values in zip(trees, want, strict=True):
        np.testing.assert_allclose(tree.ref_logps, values[:, 0], atol=1e-4)
    never = lambda *_, **__: pytest.fail("the reference is computed again")
    monkeypatch.setattr(direct.likelihood, "make_predict", never)
    lora = ("models.policy.train=lora", "models.policy.lora_rank=2")
    for again in (made, config(tiny_folder, "smoke", *lora)):
        other = direct.build(again, tmp_path)
        for one, two in zip(trees, other.train + other.heldout, strict=True):
            np.testing.assert_array_equal(one.ref_logps, two.ref_logps)
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("words", ["simpo", "orpo", "cpo"])
def test_without_a_reference_none_is_computed(
    words, tiny_folder, tmp_path, one_device, monkeypatch
):
    """Catches a forward pass of the whole data set for losses that do not ask for it."""
    monkeypatch.setattr(direct.likelihood, "make_predict", lambda *_, **__: pytest.fail("computed"))
    built = direct.build(config(tiny_folder, f"{words},smoke"), tmp_path)
    assert not (tmp_path / "reference").exists()
    assert built.to_device(next(built.batches)).ref_logps is None


# KTO


def test_the_estimate_is_over_answers_to_other_prompts(base):
    """Catches an estimate on a prompt's own answers, strangers that count as one of them, one of a
    microbatch, one below 0, and one that is not in front of the step."""
    plan, params, trees, _, _ = base
    more = direct.with_strangers([dataclasses.replace(x, ref_logps=None) for x in trees])
    says = lambda tree: [x[learnt].tolist() for x, learnt in zip(tree.answers, tree.loss)]
    for i, (tree, other) in enumerate(zip(trees, more, strict=True)):
        *own, stranger = other.answers
        jax.tree.map(np.testing.assert_array_equal, own, tree.answers)
        said = stranger[other.loss[-1]].tolist()
        assert said in says(trees[i - 1])
        assert other.loss[-1].any() and other.pairs == tree.pairs
    found = [x[:, 0] for x in likelihood.make_predict(plan)(params, {}, more)]
    # Own answers are far from the reference, strangers are 1.5 or so above it.
    made = lambda x, i: np.array([*(x[:-1] + 99.0), x[-1] - 1.5 - i % 3], np.float32)
    more = [
        dataclasses.replace(tree, ref_logps=made(x, i))
        for i, (tree, x) in enumerate(zip(more, found, strict=True))
    ]
    want = np.mean([1.5 + i % 3 for i in range(len(more))])
    rows = scorer.pair_rows(next(pipeline.batches(more, row_len=256, batch=12, seed=0)))
    assert int(direct._strangers(rows).sum()) == len(more)
    seen = lambda state, frozen, rows: (state, frozen)
    measure = direct.with_kl(seen, plan, None, size=256, parts=2)
    state = TrainState(jnp.int32(0), params, (), {}, jax.random.key(0))
    copied = jax.tree.map(jnp.copy, state)
    _, frozen = measure(copied, {"policy": {}}, rows)
    assert frozen["policy"] == {} and float(frozen["kl"]) == pytest.approx(want, abs=1e-4)
    _, frozen = measure(state, {}, rows.replace(ref_logps=rows.ref_logps + 9.0))
    assert frozen["kl"] == 0
    with pytest.raises(ValueError, match=r"one\s+prompt only"):
        direct.with_strangers([trees[0], trees[0]])
    # Of two trees of one prompt neither gets the other's answers; what of the prompt stands in the
    # answers stays in front of the stranger, and is not learnt.
    first, second = trees[0], trees[1]
    longer = [np.concatenate([[7], x]).astype(np.int32) for x in first.answers]
    loss = [np.concatenate([[False], x]) for x in first.loss]
    cut = dataclasses.replace(first, answers=longer, loss=loss)
    for tree in direct.with_strangers([second, cut, cut])[1:]:
        stranger, learnt = tree.answers[-1], tree.loss[-1]
        assert stranger[0] == 7 and not learnt[0]
        assert stranger[learnt].tolist() in says(second)


def test_answers_with_labels(tiny_folder, tmp_path, one_device):
    """Catches labels the wrong way round, strangers that are learnt from, and an evaluation that
    cannot read rewards of single answers.

    By hand: the reference lies 2 below the model on good answers and 3 above it on bad ones, z is
    1 and beta 0.1: losses of 1 - sigmoid(0.1) and 1 - sigmoid(0.4).
    """
    made = config(tiny_folder, "kto,unpaired,smoke")
    built = direct.build(made, tmp_path)
    rows = built.to_device(next(built.batches))
    good = np.nan_to_num(np.asarray(rows.targets[..., 0])) > 0
    there = np.asarray(rows.answer_weight) > 0
    count = int(there.sum())
    assert np.sum(np.asarray(rows.ends) >= 0) == 2 * count  # as many strangers
    moved = np.where(there, np.where(good, -2.0, 3.0), 777.0)
    rows = rows.replace(ref_logps=rows.ref_logps + jnp.asarray(moved, jnp.float32))
    loss, weights, _ = direct.make_loss(built.plan, direct.read_losses(made.losses), built.rules)
    frozen = {**built.frozen, "kl": jnp.float32(1.0)}
    totals, metrics, _ = jax.jit(loss)(built.state.params, frozen, rows, None, {})
    share = (good & there).sum() / count
    want = share / (1 + np.exp(0.1)) + (1 - share) / (1 + np.exp(0.4))
    assert float(weights(rows)["policy"]) == count and 0.2 < share < 0.8
    assert float(totals["policy"]) / count == pytest.approx(want, abs=1e-5)
    got = m.results(metrics)
    assert got["reward/chosen"] == pytest.approx(0.2, abs=1e-4)
    assert got["reward/rejected"] == pytest.approx(-0.3, abs=1e-4)
    assert got["kl"] == 1.0 and "accuracy" not in got
    evals = built.evaluate(built.state)  # rewards of 0 against labels of 0 and 1
    labels = np.concatenate([tree.targets for tree in built.heldout])
    assert evals["heldout/mse"] == pytest.approx(labels.mean(), abs=1e-4)
    assert evals["heldout/answers"] == len(labels) == 16


# The reference where it does not fit


def test_references_of_some_answers_are_refused(base):
    """Catches log-probs of 0 where there are none, and those of other answers."""
    _, _, trees, _, _ = base
    some = [trees[0], dataclasses.replace(trees[1], ref_logps=None)]
    with pytest.raises(ValueError, match=r"carries no ref_logps and tree .* does"):
        pipeline.materialise(some, [0, 1], row_len=512, answers_per_row=8, pairs_per_row=8)
    rows = scorer.pair_rows(next(pipeline.batches(trees, row_len=256, batch=8, seed=0)))
    rows.validate()
    with pytest.raises(ValueError, match=r"PairRows\.ref_logps .* must have the shape of ends"):
        rows.replace(ref_logps=rows.ref_logps[:, :-1]).validate()


# Runs


@pytest.mark.slow
def test_a_run_learns_and_is_exported(tiny_folder, tmp_path):
    """Catches a flipped sign, a reference that is not that of the start, an estimate that does not
    get into the step on a mesh, an evaluation by another reward than training has, and an export of
    the initial model."""
    workdir, out = tmp_path / "run", tmp_path / "model"
    flags = {
        "models.policy.init": f"hf:{tiny_folder}",
        "optim.lr": "3e-3",
        "train.steps": 12,
        "train.save_every": 12,
        "train.eval_every": 12,
        "train.remat": "none",
    }
    flags = [f"--config.{k}={v}" for k, v in flags.items()]
    argv = ["train", "--config", "direct/dpo:kto,smoke", "--workdir", str(workdir), "--debug"]
    assert cli.main([*argv, *flags]) == 0
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    first, last, after = lines[0], lines[-2], lines[-1]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-4)
    for key in ("margin", "reward/chosen", "reward/rejected", "kl"):
        assert first[f"train/{key}"] == pytest.approx(0.0, abs=1e-3)
    assert first["train/logps/chosen"] < -10
    assert last["train/loss"] < 0.45 and last["train/accuracy"] > 0.9 and "train/kl" in last
    margin = last["train/reward/chosen"] - last["train/reward/rejected"]
    assert last["train/margin"] == pytest.approx(margin, abs=1e-4)
    assert after["eval/heldout/accuracy"] > 0.9 and after["eval/heldout/loss"] < 0.65
    assert cli.main(["export", "--model", str(workdir), "--out", str(out), "--debug"]) == 0
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    (_, new, score), (_, old, _) = load.load(out), load.load(tiny_folder)
    assert score is None
    assert np.abs(new["embed"]["table"] - old["embed"]["table"]).max() > 1e-3


# What can be wrong


def mine(chosen_logps, rejected_logps, *, temperature):
    """A loss that asks for what nobody gives."""


def test_losses_that_do_not_fit_are_named():
    """Catches a fault that is told by a traceback of the first step."""
    entry = lambda **kw: dict(coef=1.0, **kw)
    with pytest.raises(
        ValueError, match=r"losses\.a: .*mine takes temperature.*gives chosen_logps"
    ):
        direct.read_losses({"a": entry(fn=f"{__name__}:mine")})
    with pytest.raises(ValueError, match=r"no loss that compares answers"):
        direct.read_losses({"a": entry(fn="direct.nll"), "b": dict(fn="direct.dpo", coef=0.0)})
    with pytest.raises(ValueError, match=r"dpo does not take gamma"):
        direct.read_losses({"a": entry(fn="direct.dpo", gamma=1.0)})
    made = presets.load("direct/dpo:smoke", ["data.form=points"])
    with pytest.raises(ValueError, match=r"losses\.policy: dpo is a loss of pairs"):
        direct.load_data(made, direct.read_losses(made.losses), None)
    made.data.form = "lines"
    with pytest.raises(ValueError, match=r"'pairs' or 'points'; received 'lines'"):
        direct.load_data(made, direct.read_losses(made.losses), None)


def test_words_that_do_not_go_together_are_refused():
    """Catches the last word winning without a word."""
    for words in ("ipo,kto", "unpaired", "simpo,unpaired"):
        with pytest.raises(ValueError, match=r"one of ipo, hinge.*at a time, and unpaired with"):
            presets.load(f"direct/dpo:{words}")


def test_data_and_models_that_do_not_fit_are_named(tiny_folder, tmp_path):
    """Catches pairs without a rejected answer, labels that are no labels, and a reward model as the
    policy."""
    lone = tmp_path / "lone.jsonl"
    sources.write_jsonl(lone, [{"prompt": "a", "chosen": "b"}] * 2)
    with pytest.raises(ValueError, match=r"lone\.jsonl:1:rejected"):
        direct.build(config(tiny_folder, "smoke", f"data.path={lone}"), tmp_path)
    graded = tmp_path / "graded.jsonl"
    points = [{"prompt": f"{i}", "answer": "b", "label": 0.5} for i in range(4)]
    sources.write_jsonl(graded, points)
    flags = [f"data.path={graded}", "data.eval_fraction=0.3"]
    with pytest.raises(ValueError, match=r"label must be true or false .*; received 0\.5"):
        direct.build(config(tiny_folder, "kto,unpaired,smoke", *flags), tmp_path)
    with pytest.raises(ValueError, match=r"language model needs .*head='lm'; received .*'scalar'"):
        direct.build(config(tiny_folder, "simpo,smoke", "models.policy.head=scalar"), tmp_path)
