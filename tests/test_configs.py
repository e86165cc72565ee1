"""Every shipped config: it loads, has the fixed sections, and its smoke variant is the same run."""

import ast
import fnmatch
import re

import pytest

from jaxreward import overrides, presets

SECTIONS = {"seed", "recipe", "models", "data", "losses", "optim", "mesh", "train", "evals"}
_RL = {"rollouts", "rewards", "advantages"}
MORE = {"online_rl": _RL, "diffusion_rl": _RL | {"intra", "search"}}  # a recipe's own sections
STAGED = {"seed", "recipe", "stages"}  # all else is in the configs that it names
# What `:smoke` may change: sizes, steps and the data's path. Written out here and not taken from
# presets, so that widening it there fails here.
SMOKE_MAY_CHANGE = (
    "models.*.init",
    "models.*.top_layers",
    "data.path",
    "data.eval_path",
    "data.max_len",
    "data.row_len",
    "data.batch",
    "data.eval_batch",
    "rollouts.prompts",
    "rollouts.answers",
    "rollouts.max_new",
    "rollouts.updates",
    "rollouts.slots",
    "rollouts.overlong",
    "rollouts.steps",
    "rollouts.every",
    "rollouts.block",
    "search.every",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.eval_every",
    "train.microbatches",
    "stages.*.config",
)
NAMES = sorted(presets.shipped())

every_config = pytest.mark.parametrize("name", NAMES)


def test_there_are_shipped_configs():
    """Catches a loader that finds none, which would empty every test below."""
    assert "reward_model/bradley_terry" in NAMES


@every_config
def test_it_has_the_fixed_sections_and_named_functions(name):
    """Catches a section of another name, and losses or evaluators without a function."""
    config = presets.load(name)
    if config.recipe == "staged":
        assert set(config) == STAGED
        assert all(set(stage) == {"config", "overrides"} for stage in config.stages.values())
        return
    noise = {"noise"} & set(config)  # of a denoiser that imitates
    assert set(config) == SECTIONS | MORE.get(config.recipe, set()) | noise
    assert re.fullmatch(r"[a-z][a-z0-9_]*", config.recipe)
    assert set(config.mesh) == {"data", "fsdp", "context", "expert", "tensor"}
    for entry in [*config.losses.values(), *config.evals.values()]:
        assert re.fullmatch(r"[\w.]+[.:]\w+", entry.fn)
    assert all(isinstance(entry.coef, float) for entry in config.losses.values())


@every_config
def test_smoke_is_the_same_run_at_toy_size(name):
    """Catches a smoke variant that tries another loss, optimizer, head or recipe."""
    changed = presets.diff(presets.load(name), presets.load(f"{name}:smoke"))
    outside = [
        key
        for key in changed
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in SMOKE_MAY_CHANGE)
    ]
    assert not outside


@every_config
def test_smoke_needs_no_files_and_few_steps(name):
    """Catches a config that forgets to call presets.smoke."""
    config = presets.load(f"{name}:smoke")
    if config.recipe == "staged":
        whole = presets.load(name).stages
        assert all(config.stages[k].config == f"{v.config}:smoke" for k, v in whole.items())
        return
    assert config.data.path == "synthetic" and config.data.eval_path == ""
    assert all(model.init == "tiny" for model in config.models.values())
    whole = presets.load(name).train
    assert config.train.steps <= 4 and bool(config.train.steps) == bool(whole.steps or whole.epochs)


@every_config
def test_it_can_be_saved_and_read_back(name, tmp_path):
    """Catches values that config.json cannot hold."""
    config = presets.load(name)
    presets.save(config, tmp_path / "config.json")
    assert presets.diff(config, presets.read(tmp_path / "config.json")) == {}


@every_config
def test_every_value_can_be_set_from_the_command_line(name):
    """Catches fields of no type (None) and numbers written as int where a float is meant."""
    flat = presets.diff({}, presets.load(name))
    leaves = {key: value for key, (_, value) in flat.items() if value != {}}
    assert (
        presets.diff(
            presets.load(
                name, [f"{key}={overrides.spell(value)}" for key, value in leaves.items()]
            ),
            presets.load(name),
        )
        == {}
    )


@every_config
def test_an_unknown_word_is_refused(name):
    """Catches a config that ignores its argument."""
    with pytest.raises(ValueError, match="unknown word 'smoek'"):
        presets.load(f"{name}:smoek")


@every_config
def test_it_is_documented_and_imports_only_what_a_config_may(name):
    """Catches a missing command, cost or expectation, and configs that reach into the library."""
    tree = ast.parse(presets.shipped()[name].read_text(encoding="utf-8"))
    text = ast.get_docstring(tree)
    for part in ("Command:", "Cost:", "Expected:", "Smoke:", f"--config {name}"):
        assert part in text
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            allowed = ("ml_collections", "jaxreward")
            assert node.module in allowed and (
                node.module != "jaxreward" or [a.name for a in node.names] == ["presets"]
            )
        if isinstance(node, ast.Import):
            assert all(a.name in ("ml_collections", "jaxreward.presets") for a in node.names)


def test_the_bradley_terry_config_is_bradley_terry():
    """Catches another loss or evaluator; tests/test_docs.py holds all keys to docs/configs.md."""
    config = presets.to_dict(presets.load("reward_model/bradley_terry"))
    assert config["recipe"] == "preference"
    assert config["losses"] == {
        "bt": {"fn": "preference.bradley_terry", "coef": 1.0, "margin": "none"}
    }
    assert config["evals"] == {"heldout": {"fn": "pairwise.accuracy"}}


@pytest.mark.parametrize(
    ("path", "chosen"),
    [
        ("layers/q/kernel", True),
        ("layers/down/kernel", True),
        ("layers/norm/kernel", False),
        ("layers/q/bias", False),
    ],
)
def test_the_lora_targets_match_whole_names(path, chosen):
    """Catches a pattern that misses a projection or takes in norms and biases."""
    pattern = presets.load("reward_model/bradley_terry").models.policy.lora_targets
    assert bool(re.fullmatch(pattern, path)) is chosen
