"""APR in miniature: does a penalty on the answer-stable tail shorten it, and what does it cost?

A model of 0.3M parameters that reads bytes first learns, by imitation, to overthink
(`data.corpora.overthinking`); then RL runs from it, once a variant and seed, all with the same
prompts, rounds and settings but for what the variant says. README.md beside this file has the
task, the split, the metric, the stopping rule and what was expected, written before the runs.

    python docs/papers/miniature/apr.py --work runs/apr_miniature [--seeds 0,1,2] [--only apr-0.5]

A run that is done is not made again; one that was killed goes on. Lines go to `apr.jsonl` beside
this file, and the picture to `apr.png`.
"""

import argparse
import time
from pathlib import Path

import common

from jaxreward.data.corpora import overthinking as world
from jaxreward.recipes import online_rl

# Problems of each kind that are drawn, and how many of them are held out.
DRAWN = {"easy": (90, 30), "hard": (1500, 60), "helps": (324, 24)}
LARGEST = 45  # of what a problem of "helps" gives from left to right: larger products take too long
EACH = {"easy": 8, "hard": 3, "helps": 20}  # traces that the base imitates, of one problem
SFT = dict(steps=1600, batch=8, lr=4e-3)
ROUNDS = 30


def shaped(fn, **kw):
    """Accuracy alone in the reward, and a function of the whole length in its place."""
    term = dict(fn=f"length.{fn}", coef=1.0, **kw)
    return dict(weights={}, shaping=dict(length=term))


# What each variant changes. `weights` are those of rewards.apr, whose other keys go into it.
VARIANTS = {
    "accuracy": dict(apr=dict(lam=0.0)),
    "apr-0.25": dict(apr=dict(lam=0.25)),
    "apr-0.5": dict(apr=dict(lam=0.5)),
    "apr-0.9": dict(apr=dict(lam=0.9)),
    "first-0.5": dict(apr=dict(lam=0.5, anchor="first")),
    "std-0.5": dict(
        apr=dict(lam=0.5),
        overrides=["rollouts.reduction=sequence", "losses.policy.clip_high=0.2"],
        advantages=dict(fn="advantage.group_relative", scale="std"),
    ),
    "total-0.5": shaped("total_ratio", max_length=208, lam=0.5),
    "truncation-90": shaped("truncation", target=90),
}


def data(work, seed):
    """(training problems, held-out ones): no two share a key."""
    train, held = [], []
    for kind, (count, out) in DRAWN.items():
        drawn = [p for p in world.problems(kind, count=count, seed=seed) if small(p)]
        held += drawn[:out]
        train += drawn[out:]
    drop = lambda rows: [{k: v for k, v in r.items() if k != "derivation"} for r in rows]
    return drop(train), drop(held)


def small(problem):
    """Whether a problem of "helps" is one that so small a model can learn; all others are."""
    if problem["subset"] != "helps":
        return True
    a, b, c = map(int, problem["prompt"].partition("=")[0].replace("*", "+").split("+"))
    return (a + b) * c <= LARGEST


def overthinker(folder, train, *, seed):
    """The model that all variants begin from."""
    rows = []
    for kind, each in EACH.items():
        some = [p for p in train if p["subset"] == kind]
        traces = world.traces(some, seed=seed, each=each)
        rows += [{k: t[k] for k in ("id", "prompt", "completion")} for t in traces]
    return common.fine_tuned(folder, rows, seed=seed, **SFT)


def config_of(name, *, seed, base, folder, train, held):
    """The config of a variant."""
    variant = dict(VARIANTS[name])
    overrides = variant.pop("overrides", [])
    made = common.load(
        "apr/miniature",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{base}",
            f"data.path={common.write(folder / 'train.jsonl', train)}",
            f"data.eval_path={common.write(folder / 'held.jsonl', held)}",
            f"train.steps={ROUNDS}",
            *overrides,
        ],
    )
    made.unlock()
    apr = dict(made.rewards.apr) | variant.pop("apr", {})
    if "weights" in variant:
        apr["weights"] = variant.pop("weights")
    made.rewards = dict(apr=apr)
    for section, value in variant.items():
        made[section] = value
    return made.lock()


def main():
    """Makes what is missing, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="variants, separated by commas")
    parser.add_argument("--out", type=Path, default=common.HERE / "apr.jsonl")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(VARIANTS)
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        train, held = data(folder, seed)
        base = overthinker(folder / "base", train, seed=seed)
        where = dict(base=base, folder=folder, train=train, held=held)
        if not results.has(variant="base", seed=seed):
            config = config_of("accuracy", seed=seed, **where)
            results.add(variant="base", seed=seed, **common.before(config, folder / "measured"))
        for name in names:
            if results.has(variant=name, seed=seed):
                continue
            start = time.monotonic()
            config = config_of(name, seed=seed, **where)
            online_rl.run(config, folder / name)
            found, rounds = common.after(folder / name)
            curve = [row["train/rollouts/outcome"] for row in rounds]
            took = round(time.monotonic() - start)
            results.add(variant=name, seed=seed, seconds=took, curve=curve, **found)
    table(results.rows)
    picture(results.rows, common.HERE / "apr.png")


def table(rows):
    """Prints means over the seeds, the tail of every seed, and the relative cuts of both parts."""
    columns = ["accuracy", *(f"accuracy/{kind}" for kind in DRAWN), "length", "pre_anchor", "tail"]
    base = {row["seed"]: row for row in rows if row["variant"] == "base"}
    for name in dict.fromkeys(row["variant"] for row in rows):
        some = [row for row in rows if row["variant"] == name]
        mean = lambda column, some: sum(r[f"heldout/{column}"] for r in some) / len(some)
        of = [base[row["seed"]] for row in some]
        cut = [1 - mean(c, some) / mean(c, of) for c in ("tail", "pre_anchor")]
        cells = [name, *(f"{mean(column, some):.3g}" for column in columns)]
        seeds = ", ".join(f"{row['heldout/tail']:.0f}" for row in some)
        print(f"| {' | '.join(cells)} ({seeds}) | {cut[0]:.2f} | {cut[1]:.2f} |")


def picture(rows, path):
    """Accuracy against length, and tail against what precedes it; every seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {"base": "k", "accuracy": "tab:gray", "apr": "tab:blue", "first": "tab:cyan"}
    kinds |= {"std": "tab:purple", "total": "tab:orange", "truncation": "tab:red"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shown = set()
    for row in rows:
        kind = row["variant"].partition("-")[0]
        label = kind if kind not in shown else None
        shown.add(kind)
        for axis, (x, y) in zip(axes, PANELS):
            axis.plot(
                row[f"heldout/{x}"],
                row[f"heldout/{y}"],
                "o",
                color=kinds[kind],
                label=label,
                alpha=0.8,
            )
    for axis, (x, y) in zip(axes, PANELS):
        axis.set(xlabel=x.replace("_", " ") + ", tokens", ylabel=y.replace("_", " "))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PANELS = (
    ("length/hard", "accuracy/hard"),
    ("length/helps", "accuracy/helps"),
    ("pre_anchor", "tail"),
)

if __name__ == "__main__":
    main()
