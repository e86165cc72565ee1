"""A run around the loop: what its seed decides, what follows it, where it says that it comes from,
and which config goes on with it."""

import functools
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from jaxreward import cli, presets, testing
from jaxreward.data import sources
from jaxreward.parallel import rules
from jaxreward.recipes import preference
from jaxreward.train import checkpoint, session


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Compiles faster; the mesh has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "on_mesh", lambda sizes: None)
        yield


def smoke(*overrides):
    """A config whose step compiles fast."""
    small = ("models.policy.train=head", "data.cache_frozen=false", "data.batch=2")
    more = ("train.steps=2", "train.save_every=0", "train.eval_every=0", *overrides)
    return presets.load("reward_model/bradley_terry:smoke", [*small, *more])


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(workdir, pairs, calls of a stub of wandb) of a run of 2 steps with all trackers."""
    folder, calls, wandb = tmp_path_factory.mktemp("followed"), [], ModuleType("wandb")
    log = lambda values, step: calls.append(("log", step, set(values)))
    finish = lambda exit_code: calls.append(("finish", exit_code))

    def init(**kw):
        calls.append(("init", kw["id"], kw["config"]))
        return SimpleNamespace(starting_step=0, url="https://w", log=log, finish=finish)

    wandb.init = init
    sources.write_jsonl(folder / "pairs.jsonl", testing.synthetic_pairs(12, seed=1))
    data = (f"data.path={folder / 'pairs.jsonl'}", "data.eval_fraction=0.0")
    trackers = ("train.tensorboard=true", "train.wandb=p", "train.profile_steps=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(sys, "argv", ["jaxreward", "train", "--token", "abc"])
        made = smoke(*data, *trackers)
        preference.run(made, folder / "run")
    return folder / "run", data, calls


def test_what_the_seed_decides(followed, tmp_path):
    """Catches a number drawn from somewhere else, and a seed that does not reach a part: with one
    seed every bit of a run is the same, with another one the head and the order are not."""
    workdir, data, _ = followed
    flat = lambda tree: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    starts, orders, bases = [], [], []
    for seed in (0, 1):
        built = preference.build(smoke(*data, f"seed={seed}"), tmp_path / str(seed))
        starts.append(flat(built.state.params))
        bases.append(flat(built.frozen))
        batches = [next(built.batches) for _ in range(2)]
        orders.append(flat(batches))
        if seed == 0:
            for raw in batches:
                built.state, _ = built.step(built.state, built.frozen, built.to_device(raw))
            with checkpoint.Checkpoints(workdir) as checkpoints:
                saved = checkpoints.params(built.state.params)
            assert flat(saved) == flat(built.state.params) != starts[0]
    assert starts[0] != starts[1] and orders[0] != orders[1]
    assert bases[0] == bases[1]  # the tiny model is always the same one


def test_a_config_turns_the_trackers_on(followed):
    """Catches a key of the config that reaches nothing."""
    workdir, _, calls = followed
    init, *logs, end = calls
    assert init[2]["train"]["wandb"] == "p" and init[2]["environment"]["jax"] == jax.__version__
    assert [(name, step) for name, step, _ in logs] == [("log", 1), ("log", 2)]
    assert {"train/loss", "train/lr"} <= logs[0][2] and end == ("finish", 0)
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_checkpoint_says_where_it_comes_from(followed):
    """Catches a model that nobody can trace to code and data, and a token that is kept in it."""
    workdir, data, _ = followed
    pairs = data[0].partition("=")[2]
    facts = json.loads((workdir / "environment.json").read_text())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        meta = checkpoints.meta()
    assert meta["data"] == {"path": pairs, "sha256": sources.data_hash(pairs)}
    assert meta["environment"].items() <= facts.items()
    assert {"commit", "dirty", "jax", "devices"} <= set(meta["environment"])
    assert meta["environment"]["command"] == "jaxreward train --token ***"
    for path in workdir.rglob("*"):
        assert not path.is_file() or b"--token abc" not in path.read_bytes(), path


def test_other_data_under_a_resumed_run_are_named(followed, tmp_path, caplog):
    """Catches a file that was exchanged below a run, which nobody notices."""
    workdir, _, _ = followed
    shutil.copytree(workdir, tmp_path / "run")
    sources.write_jsonl(tmp_path / "pairs.jsonl", testing.synthetic_pairs(12, seed=2))
    data = (f"data.path={tmp_path / 'pairs.jsonl'}", "data.eval_fraction=0.0")
    preference.run(smoke(*data), tmp_path / "run")
    (said,) = [r.getMessage() for r in caplog.records if r.name == session.__name__]
    assert "trained on other data than those now in" in said


# The command line


@pytest.mark.parametrize(
    ("absent", "now", "code"),
    [
        ("train.ema", "0", 0),
        ("optim.freeze", "", 0),
        ("losses.bt.margin", "none", 0),
        ("train.tensorboard", "true", 0),
        ("train.ema", "0.5", 2),
        ("optim.freeze", "model/embed/.*", 2),
        ("train.microbatches", "1", 2),
        ("data.template", "auto", 2),
    ],
)
def test_a_run_of_an_older_version_goes_on(tmp_path, monkeypatch, capsys, absent, now, code):
    """Catches an upgrade that strands every run, and a new key that changes what one computes."""
    monkeypatch.setattr(preference, "run", lambda config, workdir: None)
    old = presets.to_dict(presets.load("reward_model/bradley_terry:smoke"))
    *sections, key = absent.split(".")
    del functools.reduce(dict.__getitem__, sections, old)[key]
    (tmp_path / "config.json").write_text(json.dumps(old))
    argv = ["train", "--config", "reward_model/bradley_terry:smoke", "--workdir", str(tmp_path)]
    assert cli.main([*argv, f"--config.{absent}={now}"]) == code
    kept = json.loads((tmp_path / "config.json").read_text())
    if code:
        assert f"{absent}: (absent) there" in capsys.readouterr().err and kept == old
    else:
        assert key in functools.reduce(dict.__getitem__, sections, kept)
