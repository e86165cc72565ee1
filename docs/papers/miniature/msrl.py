"""MSRL's text stages in miniature: a judge by rationales first (1a) and rewards second (1b).

A judge of 177k parameters that reads bytes is shown a sum and two results, and names the right one.
Its base can work a sum out and say whether each result fits; but it does so one time in three, and
otherwise draws a letter. From there, at equally many updates:

    sft      imitates rationales of a few pairs
    rl       GRPO on many pairs that have a label and no rationale
    msrl     half of the updates the first, then half the second

README.md beside this file has the task, the split, the metric, the stopping rule and what was
expected, written before the runs.

    python docs/papers/miniature/msrl.py --work runs/msrl_miniature [--seeds 0,1,2]

A run that is done is not made again; one that was killed goes on. Lines go to `msrl.jsonl` beside
this file, and the picture to `msrl.png`.
"""

import argparse
import random
import time
from pathlib import Path

import common

from jaxreward.data import judges
from jaxreward.data.corpora import overthinking as world
from jaxreward.recipes import online_rl
from jaxreward.rewards import verdict

RATIONALES, LABELS, HELD = 64, 512, 128  # pairs
SUMS, VERDICTS = 3000, 3  # problems that the base sees, and verdicts on each
BASE = dict(steps=2400, batch=16, lr=4e-3, max_len=160)
UPDATES = 40
OFF = (-3, -2, -1, 1, 2, 3)  # what a wrong result is off by
ARMS = ("sft", "rl", "msrl")


def layout(prompt, first, second):
    """The judge's prompt: short, since the model reads bytes."""
    return f"{prompt}\nA {first}\nB {second}\n"


def pairs(seed):
    """Sums with the right result and a wrong one near it: (rationales, labels, held out)."""
    draw = random.Random(seed)
    made = []
    for problem in world.problems("hard", count=RATIONALES + LABELS + HELD, seed=seed):
        right = int(problem["answer"])
        wrong = max(0, right + draw.choice(OFF))
        wrong = wrong if wrong != right else right + 1
        question = problem["prompt"].partition("\n")[0]
        row = dict(id=problem["id"], prompt=question, chosen=str(right), rejected=str(wrong))
        row["key"] = problem["key"]
        made.append(row)
    return made[:RATIONALES], made[RATIONALES:-HELD], made[-HELD:]


def worked(question, shown=()):
    """The steps of a sum, as the world's traces have them; then whether each result fits."""
    steps, value = world.derivation(question.partition("=")[0])
    says = lambda x: "yes" if int(x) == value else "no"
    checked = [f"{value} {x} {says(x)} {letter}" for letter, x in zip("AB", shown)]
    return "\n".join([steps.partition("answer")[0].strip(), *checked])


def base_rows(seed, held):
    """What the base imitates: sums worked out, and verdicts, of which one in three is thought about
    and then mostly right; no sum of a held-out pair is among them."""
    unseen = {pair["key"] for pair in held}
    draw, rows = random.Random(seed + 1000), []
    for i, problem in enumerate(world.problems("hard", count=SUMS, seed=seed + 1000)):
        if problem["key"] in unseen:
            continue
        question = problem["prompt"].partition("\n")[0]
        rows.append(dict(id=f"s{i}", prompt=f"{question}\n", completion=worked(question)))
        for j in range(VERDICTS):
            right, off = problem["answer"], draw.choice(OFF)
            shown = draw.sample((right, str(max(0, int(right) + off))), 2)
            thought = draw.choice((worked(question, shown), "A or B?", "let me see"))
            letter = "AB"[shown.index(right)]
            if draw.random() < (0.1 if "=" in thought else 0.5):
                letter = "AB"["BA".index(letter)]
            rows.append(
                dict(
                    id=f"v{i}-{j}",
                    prompt=layout(question, *shown),
                    completion=verdict.render(letter, thought),
                )
            )
    return rows


def rationales(some, seed):
    """Rows of 1a: the sum worked out, and the letter that follows."""
    made = []
    for pair, row in zip(some, judges.rows(some, seed=seed, layout=layout)):
        shown = [line[2:] for line in row["prompt"].splitlines()[1:3]]
        text = verdict.render(row["label"], worked(pair["prompt"], shown))
        made.append(dict(id=row["id"], prompt=row["prompt"], completion=text))
    return made


def rl_config(folder, *, seed, start, labelled, held, steps):
    """GRPO as MSRL's 1b has it, at this size."""
    rows = judges.rows(labelled, seed=seed, layout=layout)
    test = judges.rows(held, seed=seed, both=True, layout=layout)
    return common.load(
        "msrl/text_grpo:laptop",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{start}",
            f"data.path={common.write(folder / 'labels.jsonl', rows)}",
            f"data.eval_path={common.write(folder / 'held.jsonl', test)}",
            "data.corpus=",
            "data.template=plain",
            "data.max_len=64",
            "data.batch=4",
            "rollouts.prompts=32",
            "rollouts.max_new=96",
            "rollouts.workers=0",
            "rollouts.show=1",
            "optim.lr=3e-4",
            "optim.schedule=constant",
            "optim.warmup=0.1",
            f"train.steps={steps}",
            "train.eval_every=0",
            "train.save_every=40",
            "evals.heldout.n=1",
        ],
    )


def main():
    """Makes what is missing, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=common.HERE / "msrl.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        some, labelled, held = pairs(seed)
        base = common.fine_tuned(folder / "base", base_rows(seed, held), seed=seed, **BASE)
        data = dict(seed=seed, labelled=labelled, held=held)

        def imitated(steps):
            rows = rationales(some, seed)
            kw = dict(seed=seed, steps=steps, start=base, lr=3e-4, max_len=160, batch=16)
            return common.fine_tuned(folder / f"sft{steps}", rows, **kw)

        def measured(start, name):
            config = rl_config(folder, start=start, steps=1, **data)
            return common.before(config, folder / f"measured-{name}")

        if not results.has(variant="base", seed=seed):
            results.add(variant="base", seed=seed, **measured(base, "base"))
        if not results.has(variant="sft-half", seed=seed):
            found = measured(imitated(UPDATES // 2), "sft-half")
            results.add(variant="sft-half", seed=seed, **found)
        for arm in ARMS:
            if results.has(variant=arm, seed=seed):
                continue
            began, curve = time.monotonic(), []
            if arm == "sft":
                found = measured(imitated(UPDATES), arm)
            else:
                half = arm == "msrl"
                start = imitated(UPDATES // 2) if half else base
                steps = UPDATES // 2 if half else UPDATES
                online_rl.run(rl_config(folder, start=start, steps=steps, **data), folder / arm)
                found, rounds = common.after(folder / arm)
                curve = [row["train/rollouts/outcome"] for row in rounds]
            took = round(time.monotonic() - began)
            results.add(variant=arm, seed=seed, seconds=took, curve=curve, **found)
    picture(results.rows, common.HERE / "msrl.png")


def picture(rows, path):
    """Accuracy in both orders by arm, and the curves of the rewards; every seed its own mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = ("base", "sft-half", *ARMS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row in rows:
        x = arms.index(row["variant"]) + 0.12 * (row["seed"] - 1)
        y = row["heldout/pair_accuracy"]
        bars = [[y - row["heldout/pair_accuracy_low"]], [row["heldout/pair_accuracy_high"] - y]]
        left.errorbar(x, y, yerr=bars, fmt="o", color=f"C{row['seed']}", capsize=2)
        if row.get("curve"):
            offset = UPDATES - len(row["curve"])
            style = "-" if row["variant"] == "msrl" else ":"
            places = [offset + i for i in range(len(row["curve"]))]
            right.plot(places, row["curve"], style, color=f"C{row['seed']}")
    left.set(xticks=range(len(arms)), xticklabels=arms, ylabel="right in both orders", ylim=(0, 1))
    right.set(xlabel="update", ylabel="right verdicts while training (msrl: lines, rl: dots)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
