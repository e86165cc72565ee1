"""Heads of several scores, of classes, with a hidden layer: trained, judged, scored, exported."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxreward import presets, testing
from jaxreward.data import sources, tokenize
from jaxreward.recipes import evaluate, preference

NAMES = ("kind", "brief")


def config(name, tiny_folder, *overrides):
    return presets.load(
        f"reward_model/{name}:smoke",
        [f"models.policy.init=hf:{tiny_folder}", "data.cache_frozen=false", *overrides],
    )


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("points") / "points.jsonl"
    sources.write_jsonl(path, testing.synthetic_points(40, seed=3, kind="scores", outputs=NAMES))
    return path


@pytest.fixture(scope="module")
def attributes(tiny_folder, scores_file, tmp_path_factory):
    """(config, workdir) of a run with two scores and a hidden layer with dropout, on a file."""
    made = config(
        "attributes",
        tiny_folder,
        "models.policy.head_hidden=16",
        "models.policy.head_dropout=0.1",
        f"models.policy.outputs={NAMES}",
        "models.policy.output_weights=(1.0, -0.5)",
        f"evals.heldout.outputs={NAMES}",
        f"data.path={scores_file}",
        "data.eval_fraction=0.3",
        "optim.lr=3e-2",
        "train.steps=12",
        "train.log_every=2",
    )
    return made, preference.run(made, tmp_path_factory.mktemp("attributes") / "run")


@pytest.fixture(scope="module")
def classes(tiny_folder, tmp_path_factory):
    """The workdir of a run with two classes, on generated answers."""
    made = config("classes", tiny_folder, "optim.lr=1e-2", "train.steps=16")
    return preference.run(made, tmp_path_factory.mktemp("classes") / "run")


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_scores_are_learnt(attributes):
    """Catches targets that do not reach the loss, or come in another order."""
    trained = [line["train/loss"] for line in lines(attributes[1]) if "train/loss" in line]
    assert trained[-1] < 0.5 * trained[0]
    last = lines(attributes[1])[-1]
    assert last["eval/heldout/spearman/kind"] > 0.5
    assert {"eval/heldout/mse/brief", "eval/heldout/answers"} <= last.keys()


@pytest.mark.slow
def test_classes_are_learnt(classes):
    """Catches a classifier whose labels are shuffled on the way."""
    last = [line for line in lines(classes) if "eval/heldout/accuracy" in line][-1]
    assert last["eval/heldout/accuracy"] > 0.8 and last["eval/heldout/auroc"] > 0.9


@pytest.mark.slow
def test_a_step_does_not_depend_on_microbatches(tiny_folder, scores_file, tmp_path):
    """Catches a mean over answers or known scores of a microbatch instead of the batch."""
    found = []
    for n in (1, 4):
        made = config(
            "attributes",
            tiny_folder,
            f"models.policy.outputs={NAMES}",
            "models.policy.output_weights=(1.0, 1.0)",
            f"data.path={scores_file}",
            f"train.microbatches={n}",
            "mesh.data=2",
            "mesh.fsdp=2",
            "data.batch=16",
            "data.row_len=64",
        )
        built = preference.build(made, tmp_path / str(n))
        state, metrics = built.step(built.state, built.frozen, built.to_device(next(built.batches)))
        found.append((state.params["score"]["kernel"], metrics["loss"].result()))
    (one, loss), (four, other) = found
    assert loss == pytest.approx(other, rel=1e-5)
    np.testing.assert_allclose(one, four, atol=1e-6)


def test_known_targets_alone_count(tiny_folder):
    """Catches a NaN of an unknown target in loss or gradient, and answers that are not there."""
    made = config("attributes", tiny_folder, f"models.policy.outputs={NAMES}")
    made.models.policy.output_weights = ()
    tokenizer = tokenize.load_tokenizer(tiny_folder)
    made.data.path = "synthetic"
    train, _, _ = preference.load_data(made, tokenizer)
    known = ~np.isnan(np.concatenate([tree.targets for tree in train]))
    assert known.all(axis=0).tolist() == [True, False]
    rows = testing.empty_pair_rows(1, 8, answers=3).replace(
        targets=np.array([[[1.0, np.nan], [2.0, 3.0], [np.nan, np.nan]]], np.float32),
        answer_weight=np.array([[2.0, 1.0, 0.0]], np.float32),
    )
    weight, targets = preference._known(rows)
    np.testing.assert_array_equal(weight, [[[2, 0], [1, 1], [0, 0]]])
    np.testing.assert_array_equal(targets, [[[1, 0], [2, 3], [0, 0]]])


def test_data_and_loss_must_agree(tiny_folder, tmp_path):
    """Catches a pairwise loss that runs on data without pairs, and reports 0."""
    made = config("attributes", tiny_folder, "losses.regression.fn=preference.bradley_terry")
    with pytest.raises(ValueError, match=r"is a loss of pairs, and the data were read as points"):
        preference.build(made, tmp_path)
    made = presets.load("reward_model/bradley_terry:smoke", ["losses.bt.margin=none"])
    made.unlock()
    made.losses = dict(reg=dict(fn="pointwise.regression", coef=1.0))
    made.models.policy.init = f"hf:{tiny_folder}"
    with pytest.raises(ValueError, match=r"is a loss of points, and the data were read as pairs"):
        preference.build(made, tmp_path)


CASES = [("Say hi", "thanks: 3"), ("What is 1 + 1?", "whatever: 2")]


def in_torch(folder, tmp_path):
    """What the card's own snippet gives for CASES."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)
    code += f"\nimport json\nprint(json.dumps([score(p, a) for p, a in {CASES!r}]))\n"
    script = tmp_path / "snippet.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def scored(model, tmp_path):
    sources.write_jsonl(tmp_path / "in.jsonl", [{"prompt": p, "answer": a} for p, a in CASES])
    evaluate.score(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parity
def test_a_head_with_a_hidden_layer_stands_beside_the_model(
    attributes, scores_file, tmp_path, require
):
    """The bare model and score.safetensors give our scores, here and in transformers."""
    require("torch")
    _, workdir = attributes
    want = scored(workdir, tmp_path)
    out = evaluate.export(workdir, tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["LlamaModel"] and raw["jaxreward"]["pooling"] == "last token"
    assert (out / "score.safetensors").is_file()
    again = scored(out, tmp_path)
    for row, back, theirs in zip(want, again, in_torch(out, tmp_path), strict=True):
        assert row["score"] == pytest.approx(
            row["outputs"]["kind"] - 0.5 * row["outputs"]["brief"], abs=1e-5
        )
        assert back["outputs"] == pytest.approx(row["outputs"], abs=1e-5)
        assert back["score"] == pytest.approx(row["score"], abs=1e-5)
        assert theirs == pytest.approx(row["outputs"], abs=1e-4)
    from jaxreward.recipes import verify

    checks, _ = verify.verify(out)
    assert all(check.passed for check in checks), checks
    judged = evaluate.evaluate(out, scores_file, form="points")
    assert judged["metrics"]["answers"] == 40 and "mse/kind" in judged["metrics"]


@pytest.mark.slow
@pytest.mark.parity
def test_classes_export_as_sequence_classification(classes, tmp_path, require):
    """Names, kind and probabilities survive the way through transformers."""
    require("torch")
    want = scored(classes, tmp_path)
    out = evaluate.export(classes, tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert raw["id2label"] == {"0": "unsafe", "1": "safe"}
    assert raw["problem_type"] == "single_label_classification"
    for row, theirs in zip(want, in_torch(out, tmp_path), strict=True):
        assert theirs["safe"] == pytest.approx(row["score"], abs=1e-4)
    # A folder of somebody else says only what transformers says.
    del raw["jaxreward"]
    (out / "config.json").write_text(json.dumps(raw))
    foreign = evaluate.load_model(out).plan.head
    assert (foreign.kind, foreign.outputs) == ("classes", ("unsafe", "safe"))
