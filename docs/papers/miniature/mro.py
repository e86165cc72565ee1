"""MRO in miniature: does a denoiser that is rewarded for tokens that go together need fewer steps?

A prompt names three pairs of letters, "bd ca eh", and an answer writes one letter of each pair
twice: "bbaahh", or another of eight. Each letter alone is the toss of a coin, and only its partner
says more; so letters of a pair that are filled in together agree by luck. A denoiser of 0.2M
parameters that reads bytes first learns this by imitation. It is then measured at several numbers
of steps: as it is, with a search, after rejection sampling, and after RL with each reward by itself
and all together. README.md beside this file has the split, the metric, the stopping rule and what
was expected, written before the runs.

    python docs/papers/miniature/mro.py --work runs/mro_miniature [--seeds 0,1,2] [--only rl-all]

A run that is done is not made again; one that was killed goes on. Lines go to `mro.jsonl` beside
this file, and the picture to `mro.png`.
"""

import argparse
import itertools
import random
import time
from pathlib import Path

import common
import jax
import numpy as np

from jaxreward.recipes import diffusion_rl, evaluate, online_rl, sft

LETTERS, PAIRS, CANVAS = "abcdefgh", 3, 8  # of an answer: 6 letters, and ends
HELD = 100  # prompts
STEPS = (8, 4, 2, 1)  # at which everything is measured
SFT = dict(batch=8, lr=4e-3)
WRITER, READER = 1000, 300  # steps of imitation: of the denoiser, and of the model of fluency
TRAINED, ROUNDS, RATE = 4, 24, 5e-4  # steps of a trajectory, rounds and learning rate of RL
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
    """(training prompts, held-out ones): no three pairs are on both sides, in whatever order."""
    pairs = list(itertools.combinations(LETTERS, 2))
    every = [p for p in itertools.combinations(pairs, PAIRS) if len(set(sum(p, ()))) == 2 * PAIRS]
    draw, made = random.Random(seed), []
    draw.shuffle(every)
    for i, three in enumerate(every):
        for j, order in enumerate(itertools.permutations(three)):
            named = ["".join(draw.sample(pair, 2)) for pair in order]
            answer = "".join(2 * draw.choice(pair) for pair in named)
            row = dict(id=f"{i}-{j}", prompt=" ".join(named) + "\n", answer=answer)
            made.append((i, row))
    held = [row for i, row in made if i < HELD and row["id"] == f"{i}-0"]
    return [row for i, row in made if i >= HELD], held


def fits(prompt, answer, record):
    """The reward: 1 if the answer is one letter of each pair, twice. `alike` is the share of pairs
    that are alike, whatever they say."""
    named, letters = prompt.split(), answer.strip()
    written = [letters[i : i + 2] for i in range(0, 2 * PAIRS, 2)]
    right = all(len(w) == 2 and w[0] == w[1] and w[0] in pair for w, pair in zip(written, named))
    alike = sum(len(w) == 2 and w[0] == w[1] for w in written) / PAIRS
    return dict(accuracy=float(right and len(letters) == 2 * PAIRS), alike=alike)


def trained(folder, rows, *, seed, steps, denoiser):
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
        "data.row_len=128",
        f"data.batch={SFT['batch']}",
        "data.eval_fraction=0.02",
        f"optim.lr={SFT['lr']}",
        "optim.warmup=0.05",
        f"train.steps={steps}",
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
            "rollouts.outcome=pairs/accuracy",
            "rollouts.temperature=1.0",
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
        rewards=dict(pairs=dict(fn="mro:fits", weights=dict(accuracy=answer))),
        mesh=dict(data=-1, fsdp=1, context=1, expert=1, tensor=1),
        evals={
            f"steps{s}": dict(fn="sampled.denoised", n=4, temperature=1.0, steps=s) for s in STEPS
        },
    )
    return made


def searched(name, config):
    """The same config with the evaluations of a search in place of the plain ones."""
    made = config.copy_and_resolve_references().unlock()
    made.intra.update(verification=0.0, fluency=0.0)
    made.intra.update(**SEARCHES[name])
    made.search.labels = "none"
    how = dict(fn="sampled.denoised", n=4, temperature=1.0, steps=TRAINED, width=4)
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
        base = trained(folder / "base", rows, seed=seed, steps=WRITER, denoiser=True)
        reader = trained(folder / "reader", rows, seed=seed, steps=READER, denoiser=False)
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
    axes[0].set(xlabel="denoising steps", ylabel="answers right", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel=f"answers right in {min(STEPS)} step")
    axes[2].set(xlabel="steps of a group, w", ylabel="variance of the gradient / squared mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
