"""Over-optimisation in miniature: a policy is trained on a reward model, and the truth is known.

The policy is the model of `apr.py` that overthinks. The gold reward is that of `anchor.apr`: right,
less a part for the tail. A reward model learns it from a few pairs of the policy's own answers, and
the policy is then trained on the reward model's scores alone. Shown are proxy and gold over the
divergence from the initial policy, and where gold turns. README.md beside this file has what was
expected, written before the runs.

    python docs/papers/miniature/overoptimisation.py --work runs/overoptimisation [--seeds 0,1,2]

A run that is done is not made again; one that was killed goes on. Lines go to
`overoptimisation.jsonl` beside this file, and the picture to `overoptimisation.png`.
"""

import argparse
import json
import time
from pathlib import Path

import apr
import common
import numpy as np

from jaxreward.recipes import generate, online_rl, preference
from jaxreward.rewards import anchor

PAIRS, RM_STEPS, ROUNDS = 192, 60, 60
GOLD = dict(kind="tokens", lam=0.9, reference=64, grace=0, min_tokens=1)


def gold(record, text):
    """The gold reward of a text; a byte is a token here."""
    spans = [(i, i + 1) for i in range(len(text))]
    return anchor.apr(record["prompt"], text, {**record, "offsets": spans}, **GOLD)["reward"]


def labelled(path):
    """Pairs of answers to one prompt, the better one by gold first."""
    made = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        graded = sorted(
            ((gold(record, a["text"]), a["text"]) for a in record["answers"] if a["finished"]),
            key=lambda pair: pair[0],
        )
        if len(graded) > 1 and graded[-1][0] > graded[0][0] + 0.05:
            made.append(
                dict(
                    id=record["id"],
                    prompt=record["prompt"],
                    chosen=graded[-1][1],
                    rejected=graded[0][1],
                )
            )
    return made


def reward_model(folder, base, train, *, seed):
    """A reward model on pairs of the base's answers, as a workdir."""
    asked = common.write(folder / "asked.jsonl", train[: 2 * PAIRS])
    answered = folder / "answered.jsonl"
    generate.run(base, asked, answered, n=6, temperature=1.0, max_new=208, seed=seed)
    pairs = labelled(answered)[:PAIRS]
    path = common.write(folder / "pairs.jsonl", pairs)
    config = common.load(
        "reward_model/bradley_terry",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{base}",
            "models.policy.train=all",
            f"data.path={path}",
            "data.template=plain",
            "data.max_len=256",
            "data.eval_fraction=0.2",
            "optim.lr=1e-3",
            "data.batch=8",
            f"train.steps={RM_STEPS}",
            "train.save_every=0",
            "train.eval_every=0",
        ],
    )
    return preference.run(config, folder / "rm")


def main():
    """Makes what is missing, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=common.HERE / "overoptimisation.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        if results.has(variant="proxy", seed=seed):
            continue
        start = time.monotonic()
        folder = args.work.resolve() / f"seed{seed}"
        train, held = apr.data(folder, seed)
        base = apr.overthinker(folder / "base", train, seed=seed)
        scorer = reward_model(folder, base, train, seed=seed)
        config = apr.config_of(
            "accuracy", seed=seed, base=base, folder=folder, train=train, held=held
        )
        config.unlock()
        config.train.steps, config.optim.lr = ROUNDS, 2e-4
        config.rollouts.filter = "none"
        config.rewards = dict(
            rm=dict(model=str(scorer), weights=dict(score=1.0)),
            apr=dict(fn="anchor.apr", weights={}, **GOLD),
        )
        # Too small to hold anything back: it is there so that the divergence is measured.
        config.losses.kl = dict(fn="policy.kl", coef=1e-6, kind="k3")
        online_rl.run(config.lock(), folder / "run")
        _, rounds = common.after(folder / "run")
        of = lambda name: [row[f"train/{name}"] for row in rounds]
        rm = json.loads((folder / "rm" / "metrics.jsonl").read_text().splitlines()[-1])
        results.add(
            variant="proxy",
            seed=seed,
            seconds=round(time.monotonic() - start),
            rm_accuracy=rm["eval/heldout/accuracy"],
            proxy=of("rollouts/part/rm/score"),
            gold=of("rollouts/part/apr/reward"),
            accuracy=of("rollouts/outcome"),
            length=of("rollouts/length"),
            kl=[a * b for a, b in zip(of("reference_kl"), of("rollouts/length"))],
        )
    picture(results.rows, common.HERE / "overoptimisation.png")


def smooth(values, width=9):
    """Running means, so that a turning point is no single round."""
    return np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, "valid")


def turning(row):
    """(root of the divergence, gold) where smoothed gold is highest, and gold at the end."""
    kl, true = smooth(row["kl"]), smooth(row["gold"])
    best = int(np.argmax(true))
    return float(np.sqrt(max(kl[best], 0))), float(true[best]), float(true[-1])


def picture(rows, path):
    """Proxy and gold over the root of the divergence; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for row in rows:
        color = f"C{row['seed']}"
        distance = np.sqrt(np.maximum(smooth(row["kl"]), 0))
        left.plot(distance, smooth(row["gold"]), color=color, label=f"seed {row['seed']}")
        right.plot(distance, smooth(row["proxy"]), color=color)
        at, best, _ = turning(row)
        left.plot(at, best, "o", color=color)
    left.set(xlabel="root of the divergence of an answer, nats", ylabel="gold reward")
    right.set(
        xlabel="root of the divergence of an answer, nats", ylabel="score of the reward model"
    )
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
