"""MSRL's text stages: the paper's values, the way of the data into both recipes, and toy runs."""

import json
import re
from pathlib import Path

import pytest

from jaxreward import presets
from jaxreward.data import sources, tokenize
from jaxreward.recipes import online_rl, sft
from jaxreward.rewards import verdict

SIZES = {
    "models.policy.init",
    "data.max_len",
    "data.row_len",
    "data.batch",
    "data.eval_fraction",
    "rollouts.prompts",
    "rollouts.max_new",
    "mesh.data",
    "mesh.fsdp",
    "train.microbatches",
    "train.save_every",
    "train.eval_every",
    "train.compute",
    "train.remat",
}
ROW = {
    "context": "Name a prime.",
    "response1": "Seven.",
    "response2": "Nine.",
    "overall_preference": -2,
    "domain": "general",
    "individual_preference": [
        {"score": -2, "reasoning": "@Response 1 is right.", "feedback1": "Yes.", "feedback2": "No."}
    ],
}


def test_the_values_of_the_first_stage():
    """Catches a value that is no longer the released scripts'."""
    c = presets.load("msrl/rationale_sft")
    assert (c.recipe, c.models.policy.train, c.train.compute) == ("sft", "all", "bfloat16")
    assert (c.optim.lr, c.train.epochs, c.optim.warmup, c.data.batch) == (1e-5, 3, 0.05, 128)
    assert (c.data.max_len, c.optim.schedule, c.optim.decay, c.optim.b2) == (
        4096,
        "cosine",
        0.1,
        0.95,
    )


def test_the_values_of_the_second_stage():
    """Catches a value that is no longer the released scripts', and a loss of another kind."""
    c = presets.load("msrl/text_grpo")
    assert (c.recipe, c.models.policy.train, c.train.compute) == ("online_rl", "all", "bfloat16")
    assert (c.optim.lr, c.train.epochs, c.optim.warmup) == (1e-6, 1, 0.0)
    at = c.rollouts
    assert (at.prompts, at.answers, at.prompts * at.answers, at.updates) == (16, 8, 128, 1)
    assert (at.max_new, c.data.max_len + at.max_new) == (1024, 4096)
    assert (at.temperature, at.top_p, at.top_k, at.reduction) == (1.0, 1.0, 0, "sequence")
    assert dict(c.rewards.judge.weights) == {
        name: verdict.WEIGHTS["paper"][name] for name in ("accuracy", "format")
    }
    assert dict(c.advantages) == {"fn": "advantage.group_relative", "scale": "none"}
    policy = c.losses.policy
    assert (policy.fn, policy.clip_low, policy.clip_high) == ("policy.clipped", 0.2, 0.28)
    assert c.losses.kl.coef == 0 and not online_rl.needs(c, "ref_logps")


@pytest.mark.parametrize("name", ["rationale_sft", "text_grpo"])
def test_a_laptop_changes_sizes_only(name):
    """Catches a small run that is another method, and words that do not go together."""
    changed = presets.diff(presets.load(f"msrl/{name}"), presets.load(f"msrl/{name}:laptop"))
    assert "data.max_len" in changed and set(changed) <= SIZES
    both = presets.load(f"msrl/{name}:laptop,smoke")
    assert both.data.path == "synthetic" and both.train.steps == 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows as of HelpSteer3 with one tie; and for the evaluation what docs/papers/msrl.md says."""
    folder = tmp_path_factory.mktemp("judged")
    rows = [{**ROW, "id": f"p{n}"} for n in range(4)]
    sources.write_jsonl(folder / "train.jsonl", [*rows, {**ROW, "overall_preference": 0}])
    sources.write_jsonl(folder / "validation.jsonl", [{**ROW, "id": f"q{n}"} for n in range(2)])
    page = (Path(__file__).resolve().parents[2] / "docs/papers/msrl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    for name in ("validation.jsonl", "judged.jsonl"):
        code = re.sub(rf'"{name}(\.gz)?"', repr(str(folder / name)), code)
    exec(code, {})
    return folder


def loaded(recipe, name, tiny_folder, files, *overrides):
    text = [f"data.path={files / 'train.jsonl'}", *overrides]
    tokenizer = tokenize.load_tokenizer(tiny_folder)
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 rows of the corpus: .*tie \(1\)"):
        return recipe.load_data(presets.load(f"msrl/{name}", text), tokenizer)


def test_pairs_become_prompts_with_letters(tiny_folder, files):
    """Catches a label that the reward does not get, and an evaluation in one order only."""
    train, held, facts = loaded(
        online_rl,
        "text_grpo",
        tiny_folder,
        files,
        "data.corpus=judged.prompts,source=helpsteer3.pairs",
        f"data.eval_path={files / 'judged.jsonl'}",
    )
    assert len(train) == 4 and facts["data"]["kept"] == 4
    for prompt in train:
        record = prompt["record"]
        text = verdict.render(record["label"], "So it is.")
        assert verdict.agreement("", text, record) == {"accuracy": 1, "format": 1, "read": 1}
    assert [prompt["record"]["pair"] for prompt in held] == ["q0", "q0", "q1", "q1"]
    assert {prompt["record"]["label"] for prompt in held[:2]} == {"A", "B"}


def test_pairs_become_conversations_in_the_form(tiny_folder, files):
    """Catches a prompt that is learnt, and a completion that is not all of it."""
    train, _, facts = loaded(sft, "rationale_sft", tiny_folder, files, "data.eval_fraction=0.0")
    tokenizer = tokenize.load_tokenizer(tiny_folder)
    assert facts["data"]["truncated"] == 0 and len(train) == 4
    for tree in train:
        learnt = tree.answers[0][tree.loss[0]]
        read = verdict.parse(tokenizer.decode(learnt))
        assert read.fault is None and f"Response {read.verdict}: Yes." in read.blocks["think"]


@pytest.mark.slow
def test_the_judge_is_measured_in_both_orders_as_it_trains(tiny_folder, files, tmp_path):
    """Catches an evaluator that the recipe cannot call, and rewards that fail."""
    config = presets.load(
        "msrl/text_grpo:smoke",
        [
            f"models.policy.init=hf:{tiny_folder}",
            "data.corpus=judged.prompts,source=helpsteer3.pairs",
            f"data.path={files / 'train.jsonl'}",
            f"data.eval_path={files / 'judged.jsonl'}",
            "data.max_len=2048",
            "data.batch=4",
            "rollouts.workers=0",
            "train.steps=2",
            "train.compute=float32",
            "evals.heldout.n=3",
            "evals.heldout.temperature=1.0",
        ],
    )
    with pytest.warns(UserWarning, match="skipped 1 of 5"):
        online_rl.run(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if "eval/heldout/pairs" in line][-1:]
    assert last["eval/heldout/pairs"] == last["eval/heldout/pairs_both"] == 2
    assert last["eval/heldout/unparseable"] == 1 and last["eval/heldout/vote/pair_accuracy"] == 0
    assert all(line["train/rollouts/failed"] == 0 for line in lines if "train/loss" in line)
