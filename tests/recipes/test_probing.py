"""MRMBench from files to the result, of a language model and of a reward model."""

import json
import shutil

import numpy as np
import pytest

from jaxreward.data import pairs, sources
from jaxreward.data.corpora import mrmbench
from jaxreward.evals import pairwise
from jaxreward.evals import probing as evals
from jaxreward.recipes import evaluate, probing


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The toy, as files of HelpSteer2 and PKU-SafeRLHF."""
    return mrmbench.write_toy(tmp_path_factory.mktemp("bench"), train=96, test=48)


@pytest.fixture(scope="module")
def easy(tiny_folder, bench, tmp_path_factory):
    """(result, its file) of a language model."""
    out = tmp_path_factory.mktemp("easy") / "evals" / "easy.json"
    return probing.run(tiny_folder, bench, out, seeds=2, quantile=0.8), out


def test_the_result_is_whole(easy, bench):
    """Catches a task or control that is left out, and a file that is not what is returned."""
    result, out = easy

    def refuse(text):
        raise ValueError(text)  # NaN is no JSON

    assert json.loads(out.read_text(), parse_constant=refuse) == result
    metrics, protocol = result["metrics"], result["protocol"]
    assert result["name"] == "mrmbench-easy-strong" and "jax" in result["environment"]
    for task in mrmbench.TASKS:
        got = metrics[task]
        assert got["train"] == 96 and got["test"] == 48
        assert got["accuracy"]["low"] <= got["accuracy"]["value"] <= got["accuracy"]["high"]
        for control in evals.CONTROLS:
            assert set(got[control]) >= {"accuracy", "balanced_accuracy", "macro_f1", "auroc"}
        assert 0 <= metrics["distances"][task]["balanced_accuracy"] <= 1
        assert protocol["test prompts that training has too"][task] == 0
    mean = np.mean([metrics[task]["accuracy"]["value"] for task in mrmbench.TASKS])
    assert metrics["accuracy"] == pytest.approx(mean) and metrics["converged"] == 1.0
    assert len(protocol["data"]) == 4 and protocol["template"] == "chat"
    assert 0 <= metrics["distances"]["dropped"] <= 1
    assert [len(x["near"]) for x in result["examples"]] == [6, 6, 6]
    for shown in result["examples"]:
        assert shown["d_min"] == min(near["distance"] for near in shown["near"].values())


def test_what_stands_in_the_text_is_found(easy):
    """Catches labels that lost their texts: the last words of an answer say whether it is rude."""
    metrics = easy[0]["metrics"]["harmlessness"]
    assert metrics["balanced_accuracy"] > metrics["random"]["balanced_accuracy"] + 0.15
    assert metrics["auroc"] > 0.75


def test_states_are_kept_for_the_other_level_and_mode(easy, tiny_folder, bench, monkeypatch):
    """Catches a second extraction of the same texts, which is most of the time."""
    result, out = easy
    monkeypatch.setattr(evals, "make_extract", lambda *_, **__: None)
    other = probing.run(
        tiny_folder, bench, out.with_name("hard.json"), level="hard", mode="paper", seeds=2
    )
    assert len(list((out.parent / "states").iterdir())) == 1
    assert list(other["metrics"]["verbosity"]["by_setting"]) == ["5e-05", "2e-05", "1e-05"]
    assert other["protocol"]["model_sha256"] == result["protocol"]["model_sha256"]
    with pytest.raises(TypeError):
        probing.run(tiny_folder, bench, out.with_name("x.json"), form="template", seeds=1)


def test_a_reward_model_and_its_errors(finished, bench, pairs_file, tmp_path, monkeypatch):
    """Rewards from states are those of scoring, and distances are held against their errors;
    catches states of another layer than the head reads, and pairs in another order."""
    monkeypatch.setattr(evals, "probe", lambda *_, **kw: {"mode": kw["mode"]})
    _, workdir = finished
    how = {"form": "template", "tasks": ("verbosity",), "pairs": pairs_file, "quantile": 0.5}
    got = probing.run(workdir, bench, tmp_path / "rm.json", distance="mahalanobis", **how)[
        "metrics"
    ]
    loaded = evaluate.load_model(workdir)
    trees, _ = pairs.encode_pairs(loaded.tokenizer, sources.read_pairs(pairs_file)[0])
    want = pairwise.outcomes(trees, loaded.predict(trees))["right"]
    assert got["pairs"]["pairs"] == 40 and got["pairs"]["accuracy"] == pytest.approx(want.mean())
    assert list(got["distances"]) == ["threshold", "dropped", "verbosity"]
    kept = got["pairs"].get("accuracy_kept", 0) * (1 - got["pairs"]["dropped"])
    beyond = got["pairs"].get("accuracy_dropped", 0) * got["pairs"]["dropped"]
    assert kept + beyond == pytest.approx(want.mean())
    assert ("auroc" in got["pairs"]) == (0 < (want < 0.5).mean() < 1)


def test_the_hash_of_a_run_is_of_its_weights(tmp_path):
    """Catches states of an earlier checkpoint read back, and a hash of the optimizer's state."""
    run = tmp_path / "run"
    for item in ("params", "opt"):
        (run / "checkpoints" / "4" / item).mkdir(parents=True)
        (run / "checkpoints" / "4" / item / "d").write_bytes(b"1")
    (run / "config.json").write_text('{"recipe": "preference"}')
    first = probing.model_hash(run)
    (run / "checkpoints" / "4" / "opt" / "d").write_bytes(b"2")
    assert probing.model_hash(run) == first
    (run / "checkpoints" / "4" / "params" / "d").write_bytes(b"2")
    assert probing.model_hash(run) != first
    shutil.move(run / "checkpoints" / "4", run / "checkpoints" / "5")
    assert probing.model_hash(run) != first


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        ({"mode": "fast"}, "expected mode in"),
        ({"form": "chat"}, "expected mode in"),
        ({"distance": "l1"}, "distance must be one of"),
        ({"pairs": "pairs.jsonl"}, "gives no rewards that could err"),
        ({"whole": True}, "has 1038 answers; received 48"),
        ({"max_len": 4}, "no text is left"),
    ],
)
def test_what_does_not_fit_is_said(tiny_folder, bench, tmp_path, kw, words):
    """Catches an option that is ignored; nothing is written."""
    with pytest.raises(ValueError, match=words):
        probing.run(tiny_folder, bench, tmp_path / "x.json", **kw)
    assert not list(tmp_path.iterdir())
