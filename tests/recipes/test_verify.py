"""The comparison with transformers: it passes for what is right and names what is wrong."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreward import cli
from jaxreward.recipes import evaluate, verify

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def torch(require):
    require("torch")


def by_name(checks):
    return {(c.name.split(" (")[0], c.dtype): c for c in checks}


def test_a_language_model_is_the_same(tiny_folder, capsys):
    """Catches a comparison that cannot pass, and a table without its verdict."""
    assert cli.main(["verify", str(tiny_folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("the same model") and "DIFFERENT" not in shown
    for word in ("greedy answers", "logits", "states", "float32", "bfloat16", "transformers"):
        assert word in shown


def test_a_reward_model_on_pairs(finished, pairs_file, tmp_path):
    """Catches scores read at another token, and pairs that are not counted."""
    _, workdir = finished
    out = evaluate.export(workdir, tmp_path / "out")
    checks, facts = verify.verify(out or tmp_path / "out", pairs=pairs_file, limit=6)
    assert "reward model" in facts["model"] and facts["texts"] > 6
    assert all(c.passed for c in checks), verify.table(checks, facts)
    flips = by_name(checks)["pairs flipped", "float32"]
    assert flips.ours == 0 and flips.note == "of 6"
    assert 0 < by_name(checks)["scores", "bfloat16"].ours < 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("rms_norm_eps", 0.05, id="norm", marks=pytest.mark.slow),
        pytest.param("rope_theta", 50.0, id="rope", marks=pytest.mark.slow),
    ],
)
def test_what_config_says_otherwise_is_found(tiny_folder, tmp_path, monkeypatch, field, value):
    """Catches tolerances that let a wrong epsilon or rotation pass: read differently here only."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    real = verify.load.load
    name = {"rms_norm_eps": "norm_eps"}.get(field, field)

    def wrong(*args, **kw):
        cfg, params, score = real(*args, **kw)
        return dataclasses.replace(cfg, **{name: value}), params, score

    monkeypatch.setattr(verify.load, "load", wrong)
    checks, facts = verify.verify(folder)
    found = by_name(checks)["states", "float32"]
    assert not found.passed and found.note == "first in layer 0 of 2"
    assert "NOT the same model" in verify.table(checks, facts)


def test_a_difference_exits_with_1(tiny_folder, monkeypatch, capsys):
    """Catches a script that goes on after a failed comparison."""
    real = verify.load.load

    def wrong(*args, **kw):
        cfg, params, score = real(*args, **kw)
        return cfg, {**params, "norm": jax.tree.map(lambda x: 1.1 * x, params["norm"])}, score

    monkeypatch.setattr(verify.load, "load", wrong)
    assert cli.main(["verify", str(tiny_folder)]) == 1
    got = capsys.readouterr()
    assert "NOT the same model: states" in got.out and "not the same model here" in got.err


def test_nan_never_passes(tiny_folder, tmp_path):
    """Catches a checkpoint with NaN that both sides agree on."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checks, _ = verify.verify(folder)
    assert not by_name(checks)["logits", "float32"].passed


def test_a_folder_that_cannot_be_read(tiny_folder, tmp_path):
    """Catches a comparison that starts before it is known that we can read the model."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attention_bias": True}))
    with pytest.raises(ValueError, match="attention_bias=True"):
        verify.verify(folder)
