"""One finished run, shared by the tests of training and of what is done with its result."""

import shutil

import pytest

from jaxreward import presets, testing
from jaxreward.data import sources


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """40 pairs, two of each prompt, and a field that the recipes only pass on."""
    records = testing.synthetic_pairs(20, seed=5)
    more = [
        {**r, "id": r["id"] + "b", "rejected": "nope", "margin": 0.5, "weight": 0.25}
        for r in records
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    sources.write_jsonl(path, [{**r, "source": "toy"} for r in records + more])
    return path


@pytest.fixture(scope="session")
def finished(tiny_folder, pairs_file, tmp_path_factory):
    """(config, workdir) of 4 steps of LoRA on a file, lower layer cached; not to be written into.

    Its initial model is a folder of its own, that a test may hide for a moment.
    """
    from jaxreward.recipes import preference

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_folder, folder / "base")
    config = presets.load(
        "reward_model/bradley_terry:smoke",
        [
            f"models.policy.init=hf:{folder / 'base'}",
            "models.policy.train=lora",
            "models.policy.lora_rank=4",
            f"data.path={pairs_file}",
            "data.eval_fraction=0.3",
            "data.batch=4",
            "optim.lr=3e-2",
        ],
    )
    return config, preference.run(config, folder / "run")
