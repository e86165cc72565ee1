"""MRO in miniature: does a denoiser that is rewarded for tokens that go together need fewer steps?

A denoiser of 0.2M parameters that reads bytes first learns, by imitation, to fill in 4x4 Sudoku. It
is then measured at several numbers of steps: as it is, with a search, after rejection sampling, and
after RL with each reward by itself and all together.

    python docs/papers/miniature/mro.py --work runs/mro_miniature [--seeds 0,1,2] [--only rl-all]

A run that is done is not made again; one that was killed goes on. Lines go to `mro.jsonl` beside
this file, and the picture to `mro.png`.
"""

import argparse
import time
from pathlib import Path

import common
import jax
import numpy as np

from jaxreward.data.corpora import sudoku
from jaxreward.recipes import diffusion_rl, evaluate, online_rl, sft

PUZZLES, CANVAS = 4000, 20  # drawn; positions of an answer: 16 digits, and ends
STEPS = (20, 10, 5, 3, 2)  # at which everything is measured
SFT = dict(steps=2000, batch=8, lr=4e-3)
TRAINED, ROUNDS, RATE = 4, 30, 3e-4  # steps of a trajectory, rounds and learning rate of RL
GROUPS = (1, 2, 4)  # steps of a group whose gradients are compared

# Weights of the rewards of drafts, and of the answer, by variant.
REWARDS = {
    "rl-all": dict(verification=1.0, fluency=1.0, answer=1.0),
    "rl-verification": dict(verification=1.0, fluency=0.0, answer=0.0),
    "rl-fluency": dict(verification=0.0, fluency=1.0, answer=0.0),
    "rl-answer": dict(verification=0.0, fluency=0.0, answer=1.0),
    "rejection": dict(verification=1.0, fluency=1.0, answer=1.0),
}
SEARCHES = {
    "search-verification": dict(verification=1.0),
    "search-confidence": dict(confidence=1.0),
}


def data(seed):
    """(training puzzles, held-out ones): no grid is on both sides."""
    drawn = sudoku.problems(PUZZLES, seed=seed)
    train, held = sudoku.held_out_grids(drawn, fraction=0.2, seed=seed)
    return train, held[:100]


def trained(folder, rows, *, seed, denoiser):
    """A small model that imitates the rows, a denoiser or a causal one, as a folder."""
    out = folder / "model"
    if out.is_dir():
        return out
    start = common.new(folder / "new", seed=seed, denoiser=denoiser)
    overrides = [
        f"seed={seed}",
        f"models.policy.init=hf:{start}",
        f"data.path={common.write(folder / 'rows.jsonl', rows)}",
        "data.template=plain",
        "data.max_len=64",
        "data.row_len=256",
        f"data.batch={SFT['batch']}",
        "data.eval_fraction=0.02",
        f"optim.lr={SFT['lr']}",
        "optim.warmup=0.05",
        f"train.steps={SFT['steps']}",
        "train.log_every=100",
        "train.eval_every=0",
        "train.save_every=500",
    ]
    if denoiser:
        overrides += [f"data.canvas={CANVAS}", "data.padding=noised", "optim.decay=0.0"]
    name = "diffusion/sft" if denoiser else "sft/chat"
    sft.run(common.load(name, overrides), folder / "run")
    return evaluate.export(folder / "run", out)


def config_of(name, *, seed, base, reader, folder, train, held, every=2):
    """The config of a variant: RL or rejection sampling."""
    reward = dict(REWARDS.get(name, REWARDS["rl-all"]))
    answer = reward.pop("answer")
    imitates = name == "rejection"
    made = common.load(
        "mro/rejection" if imitates else "mro/rl",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{base}",
            f"models.perplexity.init=hf:{reader}",
            f"data.path={common.write(folder / 'train.jsonl', train)}",
            f"data.eval_path={common.write(folder / 'held.jsonl', held)}",
            "data.template=plain",
            "data.max_len=32",
            "data.batch=16",
            "rollouts.prompts=16",
            "rollouts.answers=8",
            f"rollouts.max_new={CANVAS}",
            f"rollouts.steps={TRAINED}",
            "rollouts.block=0",
            f"rollouts.every={every}",
            "rollouts.groups=0",
            "rollouts.workers=0",
            "rollouts.show=1",
            "rollouts.outcome=sudoku/accuracy",
            f"search.every={every}",
            f"optim.lr={RATE}",
            "optim.warmup=0.1",
            f"train.steps={ROUNDS}",
            "train.eval_every=0",
            f"train.save_every={ROUNDS // 2}",
            "train.compute=float32",
            *(f"intra.{key}={value}" for key, value in reward.items()),
            *([] if imitates else ["advantages.baseline=group"]),
        ],
        rewards=dict(sudoku=dict(fn="puzzles.sudoku", form="plain", weights=dict(accuracy=answer))),
        mesh=dict(data=-1, fsdp=1, context=1, expert=1, tensor=1),
        evals={
            f"steps{s}": dict(fn="sampled.denoised", n=2, temperature=0.25, steps=s) for s in STEPS
        },
    )
    return made


def searched(name, config):
    """The same config with the evaluations of a search in place of the plain ones."""
    made = config.copy_and_resolve_references().unlock()
    made.intra.update(verification=0.0, fluency=0.0)
    made.intra.update(**SEARCHES[name])
    made.search.labels = "none"
    how = dict(fn="sampled.denoised", n=2, temperature=0.25, steps=TRAINED, width=4)
    made.evals = {f"steps{TRAINED}": how}
    return made.lock()


def measured(config, folder):
    """What the evaluators say of the initial model."""
    built = diffusion_rl.build(config, folder)
    found = built.evaluate(built.state)
    built.batches.close()
    return found


def spread(config, folder, rounds=8):
    """Variance of the policy gradient over its squared mean, both summed, of some rounds."""
    built = diffusion_rl.build(config, folder)
    loss, weights, _ = online_rl.make_loss(built.plan, config)

    def total(params, rows):
        return loss(params, built.frozen, rows, None, {})[0]["policy"] / weights(rows)["policy"]

    slope = jax.jit(jax.grad(total))
    found = []
    for _ in range(rounds):
        built.batches.before(built.state)
        rows = built.to_device(next(built.batches))
        flat = jax.tree.leaves(slope(built.state.params, rows))
        found.append(np.concatenate([np.ravel(x) for x in flat]))
    built.batches.close()
    found = np.stack(found).astype(np.float64)
    mean = found.mean(axis=0)
    variance = ((found - mean) ** 2).sum() / (rounds - 1)
    return float(variance / max((mean**2).sum() - variance / rounds, 1e-30))


def main():
    """Makes what is missing, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--out", type=Path, default=common.HERE / "mro.jsonl")
    args = parser.parse_args()
    known = ["base", *SEARCHES, *(f"spread-{w}" for w in GROUPS), *REWARDS]
    names = args.only.split(",") if args.only else known
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        train, held = data(seed)
        rows = [dict(id=p["id"], prompt=p["prompt"], completion=p["answer"]) for p in train]
        base = trained(folder / "base", rows, seed=seed, denoiser=True)
        reader = trained(folder / "reader", rows, seed=seed, denoiser=False)
        of = dict(seed=seed, base=base, reader=reader, folder=folder, train=train, held=held)
        for name in names:
            if results.has(variant=name, seed=seed):
                continue
            start, curve, more = time.monotonic(), [], {}
            if name.startswith("spread-"):
                config = config_of("rl-all", every=int(name.partition("-")[2]), **of)
                more = dict(spread=spread(config, folder / name))
            elif name in SEARCHES:
                more = measured(searched(name, config_of("rl-all", **of)), folder / name)
            elif name == "base":
                more = measured(config_of("rl-all", **of), folder / name)
            else:
                diffusion_rl.run(config_of(name, **of), folder / name)
                more, rounds = common.after(folder / name)
                curve = [row["train/rollouts/outcome"] for row in rounds]
            took = round(time.monotonic() - start)
            results.add(variant=name, seed=seed, seconds=took, curve=curve, **more)
    picture(results.rows, common.HERE / "mro.png")


def picture(rows, path):
    """Accuracy against steps, the ablation at the fewest, and the spread of gradients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    shown = ["base", "rejection", "rl-all", *SEARCHES]
    for row in rows:
        of = lambda s: row.get(f"steps{s}/outcome")
        if row["variant"] in shown:
            color = f"C{shown.index(row['variant'])}"
            at = [s for s in STEPS + (TRAINED,) if of(s) is not None]
            label = row["variant"] if row["seed"] == rows[0]["seed"] else None
            axes[0].plot(sorted(at), [of(s) for s in sorted(at)], "o-", color=color, label=label)
        if row["variant"] in ("base", *REWARDS):
            axes[1].plot(of(min(STEPS)), row["variant"], "o", color=f"C{row['seed']}")
        if "spread" in row:
            w = int(row["variant"].partition("-")[2])
            axes[2].plot(w, row["spread"], "o", color=f"C{row['seed']}")
    axes[0].set(xlabel="denoising steps", ylabel="puzzles solved", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel=f"puzzles solved in {min(STEPS)} steps")
    axes[2].set(xlabel="steps of a group, w", ylabel="variance of the gradient / squared mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
