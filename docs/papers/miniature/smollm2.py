"""A real run: GRPO of SmolLM2-135M on small sums and products, measured on problems it never saw.

The problems are the quickstart's (`reasoning_gym`), split so that 3 + 5 and 5 + 3 are on one side;
the reward is 1 for the right last number. docs/online_rl.md has what was expected and what came.

    jaxreward import --from smollm2 --out models/smollm2
    python docs/papers/miniature/smollm2.py --model models/smollm2 --work runs/grpo_smollm2

A run that was killed goes on. Lines go to `smollm2.jsonl` beside this file, and the picture to
`smollm2.png`.
"""

import argparse
import time
from pathlib import Path

import common

from jaxreward.data.corpora import reasoning_gym
from jaxreward.recipes import online_rl

TASKS = (("chain_sum_1", 200), ("products_1", 100), ("chain_sum_2", 20))
ROUNDS, EVAL_EVERY = 40, 20


def problems():
    """(training problems, unseen ones)."""
    found = {}
    for task, count in TASKS:
        for problem in reasoning_gym.problems(task, count=count, seed=0, both_orders=True):
            found.setdefault(problem["prompt"], problem)
    return reasoning_gym.split(list(found.values()), fraction=0.4, seed=0)


def config_of(model, work, *, seed):
    """GRPO with adapters on the upper layers."""
    train, held = problems()
    made = common.load(
        "online_rl/math",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{model.resolve()}",
            "models.policy.train=lora",
            "models.policy.lora_rank=16",
            "models.policy.lora_alpha=32",
            "models.policy.top_layers=8",
            f"data.path={common.write(work / 'train.jsonl', train)}",
            f"data.eval_path={common.write(work / 'held.jsonl', held)}",
            "data.max_len=96",
            "data.batch=2",
            "rollouts.prompts=8",
            "rollouts.answers=8",
            "rollouts.max_new=28",
            "rollouts.temperature=0.8",
            "rewards.answer.weights.format=0.0",
            "optim.lr=2e-4",
            f"train.steps={ROUNDS}",
            "train.save_every=5",
            f"train.eval_every={EVAL_EVERY}",
            "train.remat=none",
            "evals.heldout.n=2",
            "evals.heldout.temperature=0.8",
        ],
    )
    return made


def main():
    """Measures, trains, measures again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=common.HERE / "smollm2.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        config = config_of(args.model, folder, seed=seed)
        if not results.has(variant="base", seed=seed):
            found = common.before(config, folder / "measured")
            results.add(variant="base", seed=seed, **found)
        if not results.has(variant="grpo", seed=seed):
            start = time.monotonic()
            online_rl.run(config, folder / "run")
            found, rounds = common.after(folder / "run")
            took = round(time.monotonic() - start)
            curve = [row["train/rollouts/outcome"] for row in rounds]
            unseen = common.evaluations(folder / "run", "heldout/outcome")
            results.add(
                variant="grpo", seed=seed, seconds=took, curve=curve, unseen=unseen, **found
            )
    picture(results.rows, common.HERE / "smollm2.png")


def picture(rows, path):
    """Accuracy on the prompts of a round, and on unseen problems with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for row in rows:
        color = f"C{row['seed']}"
        if row["variant"] == "base":
            points = [(0, *(row[f"heldout/outcome{end}"] for end in ("", "_low", "_high")))]
        else:
            places = range(1, len(row["curve"]) + 1)
            axis.plot(places, row["curve"], color=color, alpha=0.5, label="prompts of the round")
            points = row["unseen"]
        for step, mean, low, high in points:
            axis.errorbar(
                step, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3
            )
    axis.set(xlabel="round", ylabel="right answers", ylim=(0, 1))
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
