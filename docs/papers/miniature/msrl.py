"""MSRL's text stages in miniature: a judge by rationales first (1a) and rewards second (1b).

A judge of 177k parameters that reads bytes is shown two words, and names the one that is worth
more. Its base knows what letters are worth and can set two words side by side, if it is told to
think; as a judge it never does, and draws a verdict. From there, at equally many updates:

    sft      imitates rationales of a few pairs, of which two in three compare
    rl       GRPO on many pairs that have a label and no rationale
    msrl     half of the updates the first, then half the second

README.md beside this file has the task, the split, the metric, the stopping rule and what was
expected, written before the runs.

    python docs/papers/miniature/msrl.py --work runs/msrl_miniature [--seeds 3,4,5]

A run that is done is not made again; one that was killed goes on. Lines go to `msrl.jsonl` beside
this file, and the picture to `msrl.png`.
"""

import argparse
import random
import time
from pathlib import Path

import common

from jaxreward.data import judges
from jaxreward.recipes import online_rl
from jaxreward.rewards import verdict

ASKED, TOLD = "judge", "think"  # of one length: this model copies by distance
LETTERS, LONG = "abcdefghijklmnopqrstuvwxyz", 2  # of a word
WORTH = dict(zip(LETTERS, map(int, "83150726493850617294186320")))
RATIONALES, LABELS, HELD = 64, 512, 128  # pairs
SEEN = 6000  # rows of the base that think, and as many that judge
BASE = dict(steps=1000, batch=16, lr=4e-3, max_len=96)
SOUND = 2 / 3  # of the rationales of 1a
EMPTY = ("A or B?", "let me see")  # what the others say, and the base's verdicts
UPDATES = 60
ARMS = ("sft", "rl", "msrl")


def layout(prompt, first, second):
    """The judge's prompt: short, since the model reads bytes."""
    return f"{prompt}\nA {first}\nB {second}\n"


def worth(word):
    """What a word is worth: what its first letter is."""
    return WORTH[word[0]]


def two(draw):
    """Two words, the one that is worth more first."""
    while True:
        made = ["".join(draw.choices(LETTERS, k=LONG)) for _ in "AB"]
        if worth(made[0]) != worth(made[1]):
            return sorted(made, key=worth, reverse=True)


def pairs(seed):
    """(rationales, labels, held out), lists of pairs; no two have the same words."""
    draw, made = random.Random(seed), {}
    while len(made) < RATIONALES + LABELS + HELD:
        better, worse = two(draw)
        row = dict(id=f"p{len(made)}", prompt=ASKED, chosen=better, rejected=worse)
        made.setdefault(frozenset((better, worse)), row)
    made = list(made.values())
    return made[:RATIONALES], made[RATIONALES:-HELD], made[-HELD:]


def worked(shown):
    """What each word is worth, and which is more."""
    a, b = map(worth, shown)
    lines = [f"{word[0]}={n}" for word, n in zip(shown, (a, b))]
    return "\n".join([*lines, f"{a}{'>' if a > b else '<'}{b}"])


def base_rows(held, seed):
    """What the base imitates: told to think, it compares; asked to judge, it draws a letter. No
    held-out pair is among them."""
    unseen = {frozenset((pair["chosen"], pair["rejected"])) for pair in held}
    draw, rows = random.Random(seed + 1000), []
    while len(rows) < 2 * SEEN:
        thinks = len(rows) < SEEN
        better, worse = two(draw)
        if frozenset((better, worse)) in unseen:
            continue
        shown = draw.sample((better, worse), 2)
        letter = "AB"[shown.index(better)] if thinks else draw.choice("AB")
        text = verdict.render(letter, worked(shown) if thinks else draw.choice(EMPTY))
        prompt = layout(TOLD if thinks else ASKED, *shown)
        rows.append(dict(id=f"b{len(rows)}", prompt=prompt, completion=text))
    return rows


def rationales(some, seed):
    """Rows of 1a: the letter is always right, but two rationales in three compare."""
    draw, made = random.Random(seed + 2000), []
    for row in judges.rows(some, seed=seed, layout=layout):
        shown = [line[2:] for line in row["prompt"].splitlines()[1:3]]
        thought = worked(shown) if draw.random() < SOUND else draw.choice(EMPTY)
        text = verdict.render(row["label"], thought)
        made.append(dict(id=row["id"], prompt=row["prompt"], completion=text))
    return made


def rl_config(folder, *, seed, start, labelled, held, steps=1, asked=ASKED):
    """GRPO as MSRL's 1b has it, at this size, and the held-out pairs asked for in a word."""
    rows = judges.rows(labelled, seed=seed, layout=layout)
    test = [pair | {"prompt": asked} for pair in held]
    test = judges.rows(test, seed=seed, both=True, layout=layout)
    return common.load(
        "msrl/text_grpo:laptop",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{start}",
            f"data.path={common.write(folder / 'labels.jsonl', rows)}",
            f"data.eval_path={common.write(folder / f'{asked}.jsonl', test)}",
            "data.corpus=",
            "data.template=plain",
            "data.max_len=40",
            "data.batch=4",
            "rollouts.prompts=32",
            "rollouts.max_new=64",
            "rollouts.workers=0",
            "rollouts.show=1",
            "optim.lr=3e-4",
            "optim.schedule=constant",
            "optim.warmup=0.1",
            f"train.steps={steps}",
            "train.eval_every=0",
            "train.save_every=40",
            "evals.heldout.n=4",
            "evals.heldout.temperature=1.0",
        ],
    )


def main():
    """Makes what is missing, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="3,4,5")
    parser.add_argument("--out", type=Path, default=common.HERE / "msrl.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        some, labelled, held = pairs(seed)
        base = common.fine_tuned(folder / "base", base_rows(held, seed), seed=seed, **BASE)
        data = dict(seed=seed, labelled=labelled, held=held)

        def imitated(steps):
            rows = rationales(some, seed)
            kw = dict(seed=seed, steps=steps, start=base, lr=1e-3, max_len=96, batch=16)
            return common.fine_tuned(folder / f"sft{steps}", rows, **kw)

        def measured(start, name, **kw):
            config = rl_config(folder, start=start, **data, **kw)
            return common.before(config, folder / f"measured-{name}")

        if not results.has(variant="base", seed=seed):
            results.add(variant="base", seed=seed, **measured(base, "base"))
        if not results.has(variant="told", seed=seed):
            results.add(variant="told", seed=seed, **measured(base, "told", asked=TOLD))
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
    picture(results.rows, args.out.with_suffix(".png"))


def picture(rows, path):
    """Accuracy in both orders by arm, and the curves of the rewards; every seed its own mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = ("told", "base", "sft-half", *ARMS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row in rows:
        x = arms.index(row["variant"]) + 0.12 * (row["seed"] % 3 - 1)
        y = row["heldout/pair_accuracy"]
        bars = [[y - row["heldout/pair_accuracy_low"]], [row["heldout/pair_accuracy_high"] - y]]
        left.errorbar(x, y, yerr=bars, fmt="o", color=f"C{row['seed'] % 3}", capsize=2)
        if row.get("curve"):
            offset = UPDATES - len(row["curve"])
            style = "-" if row["variant"] == "msrl" else ":"
            places = [offset + i for i in range(len(row["curve"]))]
            right.plot(places, row["curve"], style, color=f"C{row['seed'] % 3}")
    left.set(xticks=range(len(arms)), xticklabels=arms, ylabel="right in both orders", ylim=(0, 1))
    right.set(xlabel="update", ylabel="right in training (msrl: lines, rl: dots)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
