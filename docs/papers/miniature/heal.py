"""HEAL in miniature: how methods of learning from preferences reorder a fixed set of answers.

A prompt names a letter, "PLEASE SHOW ccc:", and an answer is a short row of letters. Gold is how
often the letter that was asked for stands there, less what its length would give by chance. Two
annotators add a taste of their own: each likes half of the other letters. A model of 177k
parameters that reads bytes first learns to write such rows, whatever they are worth. Pairs of its
answers, the better by the first annotator, then train it by several methods; and what each says of
answers to unseen prompts is compared with both annotators, with gold and with the length. heal.md
beside this file has the split, the metric, the stopping rule and what was expected, written before
the runs.

    python docs/papers/miniature/heal.py --work runs/heal_miniature [--seeds 0,1,2,3,4] [--show]

A run that is done is not made again; one that was killed goes on. Lines go to `heal.jsonl` beside
this file, and the picture to `heal.png`.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import common
import numpy as np

from jaxreward.data import hypotheses as sets
from jaxreward.evals import hypothesis
from jaxreward.recipes import direct, generate, hypotheses

ASKED, TASTED, FILLER = "abcdefgh", "mnpqrstu", "-"
SHARES = dict(asked=0.20, other=0.05, tasted=0.45, filler=0.30)  # of the letters of an answer
LENGTHS, ROOM = (4, 16), 20  # letters of an answer, and most tokens of a sampled one
STARTS = ("", "NOW ", "PLEASE ", "THEN ", "NEXT ", "SO ", "AND ", "AGAIN ")
VERBS = ("GIVE", "SHOW", "WRITE", "MAKE", "BRING", "SEND", "ADD", "DRAW")
HELD = 8  # ways of asking that are held out, each with every letter
TASTE = 0.6  # what a letter that an annotator likes adds, and one that it dislikes takes
WRITER = dict(steps=300, batch=32, lr=4e-3, max_len=48)
CANDIDATES = 6  # answers of the base of which best and worst make a pair
TEMPERATURES, EACH = (0.3, 0.7, 1.0, 1.3), 2  # of the hypotheses
STEPS, BATCH, KEPT = 120, 16, 4  # of every method; checkpoints of DPO
RATE, GENTLE = 1e-3, 1e-4  # the learning rate, and that of dpo-gentle
METHODS = ("dpo", "dpo-gentle", "ipo", "simpo", "orpo", "kto", "dpo-shuffled")
PROXIES = ("in", "out", "gold", "length")
MEASURES = ("ranking_accuracy", "strength")


# The world


def data(seed):
    """(training prompts, held-out ones): a way of asking is on one side, with all letters."""
    ways = list(itertools.product(STARTS, VERBS))
    random.Random(seed).shuffle(ways)
    made = [
        (i, dict(id=f"{i}-{letter}", prompt=f"{start}{verb} {3 * letter}:", asked=letter))
        for i, (start, verb) in enumerate(ways)
        for letter in ASKED
    ]
    return [row for i, row in made if i >= HELD], [row for i, row in made if i < HELD]


def answer(letter, draw):
    """An answer that nobody has judged: letters by `SHARES`, of any length."""
    others = ASKED.replace(letter, "")
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=draw.randint(*LENGTHS))
    of = dict(asked=letter, other=others, tasted=TASTED, filler=FILLER)
    return "".join(draw.choice(of[kind]) for kind in kinds)


def asked(prompt):
    """The letter that a prompt names."""
    return prompt[-2]


def proxies(seed):
    """{name: function (prompt, text) -> score}: the annotator of the pairs, another, gold, and the
    length. What the two annotators like is uncorrelated over the letters."""
    order = random.Random(f"taste {seed}").sample(TASTED, len(TASTED))
    half, quarter = len(order) // 2, len(order) // 4

    def gold(prompt, text):
        return text.count(asked(prompt)) - SHARES["asked"] * len(text)

    def tasting(likes):
        liking = {letter: TASTE if letter in likes else -TASTE for letter in TASTED}
        return lambda prompt, text: gold(prompt, text) + sum(liking.get(x, 0.0) for x in text)

    return {
        "in": tasting(order[:half]),
        "out": tasting(order[quarter : quarter + half]),
        "gold": gold,
        "length": lambda prompt, text: float(len(text)),
    }


# Runs


def base_of(folder, train, *, seed):
    """The model that writes answers whatever they are worth."""
    draw = random.Random(f"answers {seed}")
    rows = [
        dict(id=f"{p['id']}-{i}", prompt=p["prompt"], completion=answer(p["asked"], draw))
        for p in train
        for i in range(8)
    ]
    return common.fine_tuned(folder, rows, seed=seed, **WRITER)


def pairs_of(folder, base, train, annotator, *, seed):
    """Best and worst by the annotator of some answers of the base to each training prompt."""
    path = folder / "answered.jsonl"
    if not path.exists():
        prompts = common.write(folder / "train.jsonl", train)
        generate.run(
            base, prompts, path, n=CANDIDATES, temperature=1.0, max_new=ROOM, seed=seed, batch=192
        )
    made = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        texts = {a["text"] for a in row["answers"] if a["finished"] and a["text"].strip()}
        ranked = sorted((annotator(row["prompt"], text), text) for text in texts)
        if len(ranked) > 1 and ranked[-1][0] > ranked[0][0]:
            best, worst = ranked[-1][1], ranked[0][1]
            made.append(dict(id=row["id"], prompt=row["prompt"], chosen=best, rejected=worst))
    return made


def shuffled(pairs, *, seed):
    """The same pairs with the labels of half of them turned round."""
    turned = set(random.Random(f"labels {seed}").sample(range(len(pairs)), len(pairs) // 2))
    turn = lambda p: p | dict(chosen=p["rejected"], rejected=p["chosen"])
    return [turn(p) if i in turned else p for i, p in enumerate(pairs)]


def hypotheses_of(folder, base, held, scores, *, seed):
    """Answers of the base to held-out prompts at several temperatures, with all proxies' scores."""
    out = folder / "hyps.jsonl"
    if out.exists():
        return out
    prompts, parts = common.write(folder / "held.jsonl", held), []
    for i, t in enumerate(TEMPERATURES):
        path, own = folder / f"held-{t}.jsonl", 10 * seed + i  # else they would share their luck
        generate.run(base, prompts, path, n=EACH, temperature=t, max_new=ROOM, seed=own, batch=128)
        parts.append((path, "base", t))
    made = folder / "sets.jsonl"
    print(hypotheses.build(parts, made))
    hypotheses.proxies(made, made, scores)
    return made.rename(out)


def trained(name, folder, base, pairs, *, seed):
    """A method's workdir, or its model's folder."""
    if name == "sft-on-chosen":
        rows = [dict(id=p["id"], prompt=p["prompt"], completion=p["chosen"]) for p in pairs]
        how = dict(steps=STEPS, batch=BATCH, lr=RATE, max_len=WRITER["max_len"])
        common.fine_tuned(folder, rows, seed=seed, start=base, **how)
        return folder / "run"
    if name == "dpo-shuffled":
        pairs = shuffled(pairs, seed=seed)
    word = name.partition("-")[0]
    config = common.load(
        "direct/dpo" + ("" if word == "dpo" else f":{word}"),
        [
            f"seed={seed}",
            f"models.policy.init=hf:{base}",
            f"data.path={common.write(folder / 'pairs.jsonl', pairs)}",
            "data.template=plain",
            "data.max_len=80",
            # A pair a row; KTO adds an answer to another prompt.
            f"data.row_len={96 if word == 'kto' else 72}",
            f"data.batch={BATCH}",
            "data.eval_fraction=0.02",
            f"optim.lr={GENTLE if name == 'dpo-gentle' else RATE}",
            f"train.steps={STEPS}",
            f"train.keep={KEPT}",
            f"train.save_every={STEPS // KEPT if name == 'dpo' else 0}",
            "train.eval_every=0",
        ],
    )
    return direct.run(config, folder)


# Measuring


def short(value):
    """A value, or one with its interval, in three digits."""
    if isinstance(value, dict):
        return [round(value[k], 3) for k in ("value", "low", "high")]
    return round(value, 3)


def summary(metrics):
    """Of one model: {proxy: {kind: {measure: ...}}}, and what changed by the annotator's ranks."""
    kept = (*MEASURES, *(f"{name}_gain" for name in MEASURES))
    made = {
        proxy: {
            kind: {name: short(v) for name, v in found.items() if name in kept}
            for kind, found in metrics[proxy].items()
            if kind != "change"
        }
        for proxy in PROXIES
    }
    if "change" in metrics["in"]:
        made["change"] = {name: short(v) for name, v in metrics["in"]["change"].items()}
    return made


def contrasts(lines, records):
    """Paired differences over instructions, of one model's log-probabilities: between kinds of
    score against the first annotator, and between the gains against both."""
    rows = {row["id"]: row for row in lines}
    array = lambda key: sets.padded([rows[record["id"]][key] for record in records])[0]
    lp, ref, length = array("logp"), array("reference"), array("tokens")
    rated = {name: sets.proxy_scores(records, name) for name in ("in", "out")}
    score = lambda kind, x=lp: hypothesis.scores(x, ref, length, kind)
    accuracy, made = hypothesis.ranking_accuracy, {}
    paired = lambda a, b: [round(x, 3) for x in hypothesis.paired_bootstrap(a, b)]
    for kind in ("mean", "sum"):
        both = [accuracy(score(k), *rated["in"]) for k in ("implicit", kind)]
        made[f"implicit - {kind}"] = paired(*both)
    for name, measure in (("ranking_accuracy", accuracy), ("strength", hypothesis.pearson)):
        gains = []
        for proxy in ("in", "out"):
            after, before = (measure(score("mean", x), *rated[proxy]) for x in (lp, ref))
            gains.append((after[0] - before[0], after[1] & before[1]))
        made[f"gain in - out {name}"] = paired(*gains)
    return made


def measured(folder, models, base, hyps, *, every=False):
    """{label: results} of models, from the readers that a user has."""
    out = folder / ("checkpoints.json" if every else "heal.json")
    how = dict(reference=base, annotator="in", every_checkpoint=every, batch=16)
    found = hypotheses.run(list(models.values()), hyps, out, **how)["metrics"]
    records, lines = sets.read(hyps), {}
    for line in out.with_suffix(".hypotheses.jsonl").read_text().splitlines():
        row = json.loads(line)
        lines.setdefault(row["model"], []).append(row)
    labels = {path.name: name for name, path in models.items()} | {Path(base).name: "base"}
    made = {}
    for model, metrics in found.items():
        if model == hypotheses.BETWEEN:
            made["proxies"] = {
                pair: {name: short(v[name]) for name in MEASURES} for pair, v in metrics.items()
            }
            continue
        name, _, step = model.partition("@")
        label = labels[name] + (f"@{step}" if step else "")
        made[label] = summary(metrics)
        if "reference" in lines[model][0]:
            made[label]["contrasts"] = contrasts(lines[model], records)
    return made


def main():
    """Makes what is missing, the tables, and the picture of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--show", action="store_true", help="tables and picture, no runs")
    parser.add_argument("--out", type=Path, default=common.HERE / "heal.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in () if args.show else map(int, args.seeds.split(",")):
        if results.has(variant="proxies", seed=seed):
            continue
        folder, start = args.work.resolve() / f"seed{seed}", time.monotonic()
        train, held = data(seed)
        scores = proxies(seed)
        base = base_of(folder / "base", train, seed=seed)
        pairs = pairs_of(folder, base, train, scores["in"], seed=seed)
        hyps = hypotheses_of(folder, base, held, scores, seed=seed)
        models, took = {}, {}
        for name in ("sft-on-chosen", *METHODS):
            began = time.monotonic()
            models[name] = trained(name, folder / name, base, pairs, seed=seed)
            took[name] = round(time.monotonic() - began)
        found = measured(folder, models, base, hyps)
        steps = measured(folder, dict(dpo=models["dpo"]), base, hyps, every=True)
        found = {k: v for k, v in steps.items() if "@" in k} | found
        found["proxies"] |= dict(pairs=len(pairs), seconds=round(time.monotonic() - start))
        # Last what says that a seed is done.
        for name in sorted(found, key=lambda x: x == "proxies"):
            if not results.has(variant=name, seed=seed):
                more = dict(seconds=took[name]) if name in took else {}
                results.add(variant=name, seed=seed, **more, **found[name])
    print(tables(results.rows))
    picture(results.rows, args.out.with_suffix(".png"))


# Tables and picture

SHOWN = ("base", "sft-on-chosen", *METHODS)


def of(rows, variant, *path):
    """What the rows of a variant have under a path: a list of values, or of intervals, by seed."""
    found = []
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["variant"] == variant:
            for key in path:
                row = row[key]
            found.append(row)
    return found


def said(values):
    """Mean over the seeds, and in brackets how many intervals lie above and below 0."""
    mean = np.mean([v[0] for v in values])
    above, below = sum(v[1] > 0 for v in values), sum(v[2] < 0 for v in values)
    return f"{mean:+.3f} ({above}, {below})"


def span(values):
    """Mean over the seeds, and the lowest and the highest of them."""
    x = [v[0] for v in values]
    return f"{np.mean(x):.3f} ({min(x):.2f} to {max(x):.2f})"


def steps_of(rows):
    """Steps of DPO's checkpoints."""
    names = {row["variant"] for row in rows if "@" in row["variant"]}
    return sorted(int(name.partition("@")[2]) for name in names)


def reached(rows, kind, measure):
    """Of each checkpoint of DPO, the share by seed of what the last has gained: over chance with
    implicit scores, over the base with others."""
    nothing = dict(ranking_accuracy=0.5, strength=0.0)[measure]
    values = lambda name: np.array([v[0] for v in of(rows, name, "in", kind, measure)])
    begin = nothing if kind.startswith("implicit") else values("base")
    every = [values(f"dpo@{step}") - begin for step in steps_of(rows)]
    return [x / every[-1] for x in every]


def tables(rows):
    """The tables of heal.md."""
    trained = [name for name in SHOWN if name != "base"]
    out = ["| against `in` | accuracy, mean | sum | implicit | implicit_mean | strength, mean |"]
    out[-1] += " implicit |"
    out.append("|---|---|---|---|---|---|---|")
    for name in SHOWN:
        cells = []
        kinds = ("mean", "sum", "implicit", "implicit_mean"), ("mean", "implicit")
        for measure, some in zip(MEASURES, kinds):
            for kind in some:
                there = name != "base" or not kind.startswith("implicit")
                cells.append(span(of(rows, name, "in", kind, measure)) if there else "")
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out += ["", "| gain, mean | accuracy, in | out | in - out | strength, in | out | in - out |"]
    out.append("|---|---|---|---|---|---|---|")
    for name in trained:
        cells = []
        for m in MEASURES:
            gains = [of(rows, name, proxy, "mean", f"{m}_gain") for proxy in ("in", "out")]
            cells += map(said, (*gains, of(rows, name, "contrasts", f"gain in - out {m}")))
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out += [
        "",
        "| change, nats a token | worst third | middle | best third | share where both fell |",
    ]
    out.append("|---|---|---|---|---|")
    for name in trained:
        cells = [said(of(rows, name, "change", f"bin/{k}")) for k in (1, 2, 3)]
        cells.append(span(of(rows, name, "change", "displacement")))
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out += ["", "| accuracy against `in` | implicit - mean | implicit - sum |", "|---|---|---|"]
    for name in trained:
        cells = [said(of(rows, name, "contrasts", f"implicit - {k}")) for k in ("mean", "sum")]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out += [
        "",
        "| dpo, share of the last gain | accuracy (seeds) | strength (seeds) |",
        "|---|---|---|",
    ]
    for kind in ("mean", "implicit"):
        both = [reached(rows, kind, measure) for measure in MEASURES]
        for step, *shares in zip(steps_of(rows), *both):
            each = (f"{x.mean():.2f} ({', '.join(f'{v:.2f}' for v in x)})" for x in shares)
            out.append(f"| {kind}, step {step} | " + " | ".join(each) + " |")
    out += ["", "| accuracy against the length | sum | mean | implicit | implicit_mean |"]
    out.append("|---|---|---|---|---|")
    for name in SHOWN:
        kinds = [k for k in hypothesis.KINDS if name != "base" or not k.startswith("implicit")]
        cells = [span(of(rows, name, "length", k, "ranking_accuracy")) for k in kinds]
        out.append(f"| {name} | " + " | ".join(cells + [""] * (4 - len(kinds))) + " |")
    out += ["", "| between | accuracy | strength |", "|---|---|---|"]
    for pair in of(rows, "proxies")[0]:
        if ", " in pair:
            cells = [span(of(rows, "proxies", pair, measure)) for measure in MEASURES]
            out.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def picture(rows, path):
    """Agreement by method, what changed by rank, DPO over its steps, and agreement with length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    (first, second), (third, fourth) = axes
    seeds = sorted({row["seed"] for row in rows})
    off = dict(zip(seeds, np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else [0.0]))

    def dots(axis, proxy, kind, at, marker, color):
        for x, name in enumerate(SHOWN):
            if name == "base" and kind.startswith("implicit"):
                continue
            for seed, v in zip(seeds, of(rows, name, proxy, kind, "ranking_accuracy")):
                label = f"{kind}, {proxy}" if (x, seed) == (1, seeds[0]) else None
                axis.errorbar(
                    x + at + off[seed],
                    v[0],
                    yerr=[[v[0] - v[1]], [v[2] - v[0]]],
                    fmt=marker,
                    color=color,
                    markersize=4,
                    linewidth=0.6,
                    label=label,
                )

    dots(first, "in", "mean", -0.28, "o", "C0")
    dots(first, "in", "implicit", 0.0, "s", "C1")
    dots(first, "out", "mean", 0.28, "^", "C2")
    first.set(ylabel="ranking accuracy")
    for x, kind in enumerate(("sum", "mean", "implicit")):
        dots(fourth, "length", kind, 0.28 * (x - 1), "os^"[x], f"C{x}")
    fourth.set(ylabel="ranking accuracy against the length")
    for axis in (first, fourth):
        axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(SHOWN)), SHOWN, rotation=20)
        axis.legend(fontsize=8)
    for i, name in enumerate(SHOWN[1:]):
        for seed in seeds:
            row = next(r for r in rows if (r["variant"], r["seed"]) == (name, seed))
            profile = [row["change"][f"bin/{k}"][0] for k in (1, 2, 3)]
            label = name if seed == seeds[0] else None
            second.plot(range(3), profile, "o-", color=f"C{i}", markersize=3, label=label)
    second.axhline(0, color="grey", linewidth=0.8)
    second.set_xticks(range(3), ["worst third", "middle", "best third"])
    second.set(ylabel="change of log-probability a token, nats", xlim=(-0.1, 2.9))
    second.legend(fontsize=8, loc="lower right")
    for measure, style in zip(MEASURES, "-:"):
        for kind, color in (("mean", "C0"), ("implicit", "C1")):
            shares = reached(rows, kind, measure)
            for i in range(len(seeds)):
                label = f"{measure.replace('_', ' ')}, {kind}" if i == 0 else None
                values = [x[i] for x in shares]
                third.plot(steps_of(rows), values, style, color=color, marker=".", label=label)
    third.set(xlabel="steps of DPO", ylabel="share of the last checkpoint's gain")
    third.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
