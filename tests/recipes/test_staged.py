"""Staged runs: weights are passed on, killed runs go on where they were, faults are named."""

import jax
import numpy as np
import pytest

from jaxreward import presets
from jaxreward.core import trees
from jaxreward.hub import load
from jaxreward.recipes import evaluate, online_rl, sft, staged
from jaxreward.train import checkpoint


def config(*stages, seed=0):
    """{"1": ..., "2": ...} of (config, overrides...)."""
    made = presets.load("staged/sft_then_rl")
    made.unlock()
    made.seed = seed
    made.stages = {
        str(i): dict(config=name, overrides=tuple(more))
        for i, (name, *more) in enumerate(stages, start=1)
    }
    return made.lock()


def test_a_stage_starts_from_the_export_of_the_one_before(tmp_path):
    """Catches an order, a seed or an override that is lost, and a word that does not reach it."""
    smoke = staged.configs(presets.load("staged/sft_then_rl:smoke", ["seed=3"]), tmp_path)
    assert list(smoke) == ["1_sft", "2_rl"] and smoke["2_rl"].recipe == "online_rl"
    assert smoke["1_sft"].models.policy.init == "tiny"
    assert smoke["2_rl"].models.policy.init == f"hf:{tmp_path / '1_sft' / 'export'}"
    assert smoke["2_rl"].data.path == "synthetic" and smoke["2_rl"].seed == 3
    made = config(("sft/chat", "optim.lr=0.5"), ("reward_model/bradley_terry", "seed=5"), seed=4)
    first, second = staged.configs(made, tmp_path).values()
    assert (first.optim.lr, first.seed, second.seed) == (0.5, 4, 5)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([], "names no stage"),
        (
            [("reward_model/bradley_terry",), ("sft/chat",)],
            r"stage 2 \(sft, models\.policy\.head=lm\) cannot start from stage 1 \(preference, "
            r"models\.policy\.head=scalar\)",
        ),
        (
            [("reward_model/bradley_terry",), ("reward_model/classes",)],
            r"head=classes\) cannot start from stage 1 \(preference, models\.policy\.head=scalar\)",
        ),
        ([("sft/chat", "optim.rate=1")], r"stage 1 \(sft/chat\): unknown key config\.optim\.rate"),
        ([("sft/chat",), ("sft/chatt",)], r"stage 2 \(sft/chatt\): no config 'sft/chatt'"),
        ([("sft/chat:smok",)], r"stage 1 \(sft/chat:smok\): unknown word 'smok'"),
        ([("sft/chat",), ("sft/chat", "models.policy.init=tiny")], "export of stage 1 before it"),
        ([("staged/sft_then_rl",)], r"stage 1 \(staged/sft_then_rl\): .*models"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_runs(tmp_path, stages, text):
    """Told by the names of the stages, and not hours later by the second."""
    with pytest.raises(ValueError, match=text):
        staged.run(config(*stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_changed_stage_is_refused(tmp_path):
    """Catches a stage that goes on under another config, also one that has not been reached."""
    made = config(("sft/chat:smoke",), ("sft/chat:smoke",))
    stages = staged.configs(made, tmp_path)
    (tmp_path / "2" / "checkpoints" / "2").mkdir(parents=True)
    presets.save(stages["2"], tmp_path / "2" / "config.json")
    changed = config(("sft/chat:smoke",), ("sft/chat:smoke", "optim.lr=0.5"))
    with pytest.raises(ValueError, match=r"stage 2: .*\n  optim\.lr: 1e-05 there, 0\.5 now"):
        staged.run(changed, tmp_path)
    assert not (tmp_path / "1").exists()
    longer = config(("sft/chat:smoke",), ("sft/chat:smoke", "train.steps=9"))
    (tmp_path / "2" / "export").mkdir()
    with pytest.raises(ValueError, match=r"stage 2 has ended.*train\.steps cannot be raised"):
        staged.run(longer, tmp_path)


def test_a_stage_that_failed_before_it_did_anything_may_change(tiny_folder, tmp_path, monkeypatch):
    """Catches a mistyped path that a workdir is held to for ever."""
    stage = ("sft/chat:smoke", f"models.policy.init=hf:{tiny_folder}")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        staged.run(config((*stage, "data.path=absent.jsonl")), tmp_path)
    assert (tmp_path / "1" / "config.json").is_file()
    ran = []
    monkeypatch.setattr(sft, "run", lambda config, workdir: ran.append((config, workdir)))
    staged.run(config(stage), tmp_path)
    assert [(c.data.path, folder) for c, folder in ran] == [("synthetic", tmp_path / "1")]


@pytest.mark.slow
def test_a_run_killed_between_stages_goes_on(tiny_folder, tmp_path, monkeypatch):
    """Catches a first stage that runs twice, and a second that starts from other weights."""
    made = config(
        (
            "sft/chat:smoke",
            f"models.policy.init=hf:{tiny_folder}",
            "models.policy.train=lora",
            "models.policy.lora_rank=2",
            "optim.lr=1e-2",
        ),
        ("online_rl/math:smoke", "data.batch=4", "rollouts.workers=0", "train.eval_every=0"),
    )
    whole = online_rl.run

    def killed(*args):
        raise OSError("killed")

    monkeypatch.setattr(online_rl, "run", killed)
    with pytest.raises(OSError, match="killed"):
        staged.run(made, tmp_path / "run")
    first = tmp_path / "run" / "1"
    lines = (first / "metrics.jsonl").read_bytes()
    exported = load.content_hash(first / "export")
    seen = {}

    def watched(config, workdir):
        built = online_rl.build(config, workdir)
        seen["params"], seen["meta"] = jax.device_get(built.state.params["model"]), built.meta
        built.batches.close()
        return whole(config, workdir)

    def twice(*args):
        raise AssertionError("the first stage ran again")

    monkeypatch.setattr(sft, "run", twice)
    monkeypatch.setattr(online_rl, "run", watched)
    assert staged.run(made, tmp_path / "run") == tmp_path / "run"
    assert (first / "metrics.jsonl").read_bytes() == lines
    assert load.content_hash(first / "export") == exported == seen["meta"]["init_sha256"]
    # The adapters are in these weights, bit for bit.
    _, want, _ = load.load(first / "export")
    _, old, _ = load.load(tiny_folder)
    want, old, got = (trees.flatten(x) for x in (want, old, seen["params"]))
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[path], got[path]) for path in want)
    assert any(not np.array_equal(want[path], old[path]) for path in want)
    with checkpoint.Checkpoints(tmp_path / "run" / "2") as checkpoints:
        assert checkpoints.latest() == 4
    assert not (tmp_path / "run" / "2" / "export").exists()
    evaluate.export(tmp_path / "run" / "2", tmp_path / "out")
    assert load.read_config(tmp_path / "out")["vocab_size"]
