"""How often a run compiles: once for the step, once for each row length that is scored."""

import pytest

from jaxreward import presets, testing
from jaxreward.data import sources
from jaxreward.recipes import preference
from jaxreward.train import plan


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Pairs from 60 to about 400 tokens, so that batches differ."""
    records = testing.synthetic_pairs(16, seed=3)
    for i, record in enumerate(records):
        record["prompt"] = record["prompt"] + " and again" * (2 * i)
    path = tmp_path_factory.mktemp("varied") / "pairs.jsonl"
    sources.write_jsonl(path, records)
    return path


def test_batches_and_epochs_compile_nothing_new(varied, tiny_folder, tmp_path):
    """Catches a shape, a dtype or a static argument that changes from batch to batch: the slowest
    defect there is on a TPU, and invisible but for the clock."""
    config = presets.load(
        "reward_model/bradley_terry:smoke",
        [
            f"models.policy.init=hf:{tiny_folder}",
            "models.policy.train=top",
            f"data.path={varied}",
            f"data.eval_path={varied}",
            "data.max_len=512",
            "data.batch=4",
            "train.steps=8",
        ],
    )
    with plan.compilations() as first:
        built = preference.build(config, tmp_path)
        state = steps(built, built.state, 2)
        built.evaluate(state)
    assert first["jit(step)"] == 1
    # All in rows of 1024, and not one program a batch.
    assert first["jit(score_rows)"] == 1
    # Into the third epoch, and after another evaluation.
    with plan.compilations() as later:
        state = steps(built, state, 4)
        built.evaluate(state)
    assert not later


def steps(built, state, count):
    for _ in range(count):
        state, _ = built.step(state, built.frozen, built.to_device(next(built.batches)))
    return state
