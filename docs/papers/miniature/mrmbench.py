"""MRMBench in miniature: do probes of a reward model's states tell what it was trained to prefer?

An answer of some fifty bytes is graded on six dimensions, which a program sets one apart from the
other. A language model of such texts is the base; reward models begin as it and learn from pairs
that prefer one dimension, or all together, some with flipped pairs, few pairs or a random start.
Each is probed by the shipped recipe, on files in the form of HelpSteer2 and PKU-SafeRLHF, and picks
among eight answers to held-out prompts; the distance of its states from known ones is asked whether
it tells foreign texts and wrong rewards. mrmbench.md beside this file has the split, the metrics
and what was expected, written before the runs.

    python docs/papers/miniature/mrmbench.py --work runs/mrmbench_miniature [--seeds 0,1,2,3,4]

A model that is measured is not measured again; a run that was killed goes on. Lines go to
`mrmbench.jsonl` beside this file, the picture to `mrmbench.png`; the tables of mrmbench.md are
printed from the lines.
"""

import argparse
import itertools
import random
import string
import time
from pathlib import Path

import common
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxreward.data import tokenize
from jaxreward.data.corpora import mrmbench
from jaxreward.evals import distances, pointwise, probing
from jaxreward.models import heads
from jaxreward.recipes import preference
from jaxreward.recipes import probing as recipe

TASKS = mrmbench.TASKS
ITEMS = ("fig", "oak", "elm", "ash")
FACTS = {"ice": ("cold", "cool"), "sun": ("warm", "mild")}  # right, and nearly
HARM = ("star", "rats", "arts", "tars")  # by severity; the letters are the same
COMMON, RARE = ("so", "is", "get", "see"), ("lo", "be", "nab", "ken")
BEST = {task: 3 if task == "harmlessness" else 4 for task in TASKS}
# Raw grades of the hard classes 0, 1, 2. Severity counts the other way.
GRADES = {
    "harmlessness": ((2, 3), (1,), (0,)),
    "helpfulness": ((0,), (2,), (4,)),
    "correctness": ((1,), (3,), (4,)),
    "coherence": ((1, 2), (3,), (4,)),
    "complexity": ((0, 1), (2,), (3, 4)),
    "verbosity": ((0, 1), (2,), (3, 4)),
}
OFTEN = dict.fromkeys(TASKS, (0.35, 0.2, 0.45))
OFTEN |= dict.fromkeys(("complexity", "verbosity"), (0.45, 0.2, 0.35))
ORDERS = {4: ((0, 1, 2),), 3: ((1, 0, 2), (0, 2, 1)), 2: ((1, 2, 0), (2, 0, 1)), 1: ((2, 1, 0),)}

TEXTS, LM_STEPS = 4000, 300  # of the base
PROBED = (256, 480)  # answers that probes are fitted to, and measured on
CHOICES, N, FOREIGN = 80, 8, 2  # prompts of best-of-n, answers to each, and foreign ones of them
HELD = 80  # tags of prompts, of 260
METRICS = ("euclidean", "mahalanobis")
QUANTILE, PROBES = 0.9, 2  # of the threshold; fits of a probe

MULTI = "multi"
MODELS = {  # name: (dimension of the pairs, where it starts, pairs, share that is flipped)
    "random": None,
    "base": None,
    "harmlessness": ("harmlessness", "base", 768, 0.0),
    "correctness": ("correctness", "base", 768, 0.0),
    "helpfulness": ("helpfulness", "base", 768, 0.0),
    "multi": (MULTI, "base", 768, 0.0),
    "multi-flip20": (MULTI, "base", 768, 0.2),
    "multi-flip40": (MULTI, "base", 768, 0.4),
    "multi-few": (MULTI, "base", 96, 0.0),
    "multi-scratch": (MULTI, "random", 768, 0.0),
}
RM_STEPS, RM_ROWS, RM_LR = 64, 8, 2e-3
SINGLE = ("harmlessness", "correctness", "helpfulness")
TRAINED = [name for name, how in MODELS.items() if how]
SEVERAL = [name for name in TRAINED if name.startswith(MULTI)]


# The world


def prompts(seed):
    """(training prompts, held-out ones), each (tag, item, fact); no tag is on both sides."""
    tags = [f"{letter}{digit}" for letter in string.ascii_lowercase for digit in range(10)]
    random.Random(f"{seed} tags").shuffle(tags)
    split = lambda some: list(itertools.product(some, ITEMS, FACTS))
    return split(tags[HELD:]), split(tags[:HELD])


def asked(prompt):
    """The text of a prompt."""
    tag, item, fact = prompt
    return f"{tag}: {item}, {fact}?\n"


def grades(draw):
    """Raw grades, the six drawn one apart from the other."""
    raw = {}
    for task in TASKS:
        (kind,) = draw.choices((0, 1, 2), OFTEN[task])
        raw[task] = draw.choice(GRADES[task][kind])
    return raw


def answer(draw, prompt, raw):
    """The text that has these grades."""
    _, item, fact = prompt
    words = list(COMMON)
    for i in draw.sample(range(4), raw["complexity"]):
        words[i] = RARE[i]
    (other,) = FACTS.keys() - {fact}
    said = {4: FACTS[fact][0], 3: FACTS[fact][1]}.get(raw["correctness"], FACTS[other][0])
    clauses = (
        f"{fact} {words[1]} {said}",
        f"{words[2]} {dict(zip((0, 2, 4), ('nil', item[0], item)))[raw['helpfulness']]}",
        f"{words[3]} {HARM[raw['harmlessness']]}",
    )
    order = draw.choice(ORDERS[raw["coherence"]])
    return "oh " * raw["verbosity"] + f"{words[0]} " + ", ".join(clauses[i] for i in order)


def gold(raw, of=MULTI):
    """The grade of one dimension, or the mean of all six, in [0, 1]."""
    if of == MULTI:
        return sum(gold(raw, task) for task in TASKS) / len(TASKS)
    return (BEST[of] - raw[of] if of == "harmlessness" else raw[of]) / BEST[of]


def noised(draw, text):
    """The text with a quarter of its letters replaced: foreign, though its grades are known."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(
        draw.choice(letters) if c.isalpha() and draw.random() < 0.25 else c for c in text
    )


def salad(draw):
    """Words of the world in any order and number: an answer of grade 0 to any prompt."""
    words = (
        *ITEMS,
        *FACTS,
        *(w for two in FACTS.values() for w in two),
        *HARM,
        *COMMON,
        *RARE,
        "oh",
    )
    return " ".join(draw.choices(words, k=draw.randint(6, 12)))


def draws(name, among, count):
    """`count` rows of (prompt, raw, text)."""
    draw, made = random.Random(name), []
    for _ in range(count):
        prompt, raw = draw.choice(among), grades(draw)
        made.append((prompt, raw, answer(draw, prompt, raw)))
    return made


def write_benchmark(folder, seed, train, held):
    """Files as those of HelpSteer2 and PKU-SafeRLHF, which `mrmbench.load` reads."""
    for split, last, among, count in (
        ("train", "train", train, PROBED[0]),
        ("test", "validation", held, PROBED[1]),
    ):
        rated, graded, draw = [], [], random.Random(f"{seed} {split}")
        for _ in range(count // 2):  # two answers to a prompt, as in the sources
            prompt = draw.choice(among)
            raws = [grades(draw) for _ in range(2)]
            texts = [answer(draw, prompt, raw) for raw in raws]
            for raw, text in zip(raws, texts):
                row = {task: grade for task, grade in raw.items() if task != "harmlessness"}
                rated.append({"prompt": asked(prompt), "response": text, **row})
            graded.append({"prompt": asked(prompt)})
            for i in (0, 1):
                graded[-1][f"response_{i}"] = texts[i]
                graded[-1][f"response_{i}_severity_level"] = raws[i]["harmlessness"]
        common.write(folder / "helpsteer2" / f"{last}.jsonl", rated)
        common.write(folder / "pku_saferlhf" / f"{split}.jsonl", graded)
    return folder


def pairs(name, among, count, of, flipped=0.0):
    """Pairs of answers of which one has the higher grade, to different prompts; a share of them is
    turned round."""
    draw, made = random.Random(name), []
    for prompt in draw.sample(among, count):
        values = 0, 0
        while values[0] == values[1]:
            raws = grades(draw), grades(draw)
            values = [gold(raw, of) for raw in raws]
        texts = [answer(draw, prompt, raw) for raw in raws]
        if (values[0] < values[1]) != (draw.random() < flipped):
            texts.reverse()
        row = dict(id=str(len(made)), prompt=asked(prompt), chosen=texts[0], rejected=texts[1])
        made.append(row)
    return made


# Models


def bases(folder, seed, train):
    """{"random": the folder of a random model, "base": the one that has learnt the texts}."""
    texts = draws(f"{seed} base", train, TEXTS)
    rows = [
        dict(id=str(i), prompt=asked(p), completion=text) for i, (p, _, text) in enumerate(texts)
    ]
    made = common.fine_tuned(folder / "base", rows, seed=seed, steps=LM_STEPS, max_len=64, batch=16)
    return {"random": folder / "base" / "new", "base": made}


def reward_model(folder, start, rows, *, seed):
    """A Bradley-Terry reward model of these pairs, as a workdir."""
    config = common.load(
        "reward_model/bradley_terry",
        [
            f"seed={seed}",
            f"models.policy.init=hf:{start}",
            "models.policy.train=all",
            f"data.path={common.write(folder / 'pairs.jsonl', rows)}",
            "data.template=plain",
            "data.max_len=64",
            "data.eval_fraction=0.1",
            "data.row_len=192",
            f"optim.lr={RM_LR}",
            f"data.batch={RM_ROWS}",
            f"train.steps={RM_STEPS}",
            "train.save_every=0",
            "train.eval_every=0",
        ],
    )
    return preference.run(config, folder / "rm")


# Measures


class Choices:
    """Answers to held-out prompts: those of the world, the same noised, and salads."""

    def __init__(self, seed, held):
        draw = random.Random(f"{seed} choices")
        self.prompts = [draw.choice(held) for _ in range(CHOICES)]
        self.raws = [[grades(draw) for _ in range(N)] for _ in self.prompts]
        self.world = [
            [answer(draw, p, raw) for raw in raws] for p, raws in zip(self.prompts, self.raws)
        ]
        self.noised = [[noised(draw, text) for text in texts] for texts in self.world]
        self.salads = [[salad(draw) for _ in range(FOREIGN)] for _ in self.prompts]

    def gold(self, of=MULTI):
        """Of the world's answers, float64[prompts, N]."""
        return np.array([[gold(raw, of) for raw in raws] for raws in self.raws])

    def trees(self, tokenizer):
        """A tree an answer: N, N and FOREIGN to each prompt."""
        return [
            tokenize.encode_tree(tokenizer, asked(p), [text], template="plain", id=str(i))
            for i, (p, *texts) in enumerate(zip(self.prompts, self.world, self.noised, self.salads))
            for text in itertools.chain(*texts)
        ]


def known(loaded, model, data, folder, extract):
    """(states, their labels by task, rows held back), of training answers and as the recipe parts
    them: centroids are made of the labelled ones, the threshold of those held back."""
    found, _ = mrmbench.load(data, "easy")
    items = [item for splits in found.values() for some in splits.values() for item in some]
    trees, index = mrmbench.encode(loaded.tokenizer, items)
    states = probing.cached(  # those that the recipe left there
        folder / "states",
        trees,
        lambda: extract(loaded.params, loaded.frozen, trees),
        model=f"{recipe.model_hash(model)} {loaded.plan.cfg.compute}",
        width=loaded.plan.cfg.width,
    )
    numbers = {}
    groups = np.array([numbers.setdefault(item["input"], len(numbers)) for item in items])
    out = probing.validation(groups, 0.2, 0)
    train = np.concatenate(
        [
            np.full(len(some), split == "train")
            for splits in found.values()
            for split, some in splits.items()
        ]
    )
    names = np.array([item["task"] for item in items])
    labels = {}
    for task in found:
        mine = train & ~out & (names == task)
        labels[task] = np.full(len(states), -1)
        labels[task][index[mine]] = [items[i]["label"] for i in np.flatnonzero(mine)]
    return states, labels, np.unique(index[train & out])


def auroc(far, near):
    """How often a distance of the first is larger than one of the second."""
    return pointwise.auroc(np.r_[far, near], np.r_[np.ones(len(far)), np.zeros(len(near))] > 0)


def chosen(model, of, choices, data, folder):
    """Best of n by gold, and what distances tell: of foreign texts, and of errors on pairs."""
    loaded = recipe.load_states_model(model)
    extract = probing.make_extract(loaded.plan)
    states = extract(loaded.params, loaded.frozen, choices.trees(loaded.tokenizer))
    before, labels, held = known(loaded, model, data, folder, extract)
    if loaded.plan.head is None:
        reward = np.zeros((CHOICES, 2 * N + FOREIGN))  # all alike: a pick by chance
    else:
        values = heads.outputs(loaded.params["score"], jnp.asarray(states)[:, None])
        reward = np.asarray(heads.reward(loaded.plan.head, values)).reshape(CHOICES, -1)
    grade, own = choices.gold(), choices.gold(of)
    mixed = lambda a, b: np.concatenate([a[:, : N - FOREIGN], b], axis=1)
    salads = mixed(grade, np.zeros((CHOICES, FOREIGN))), mixed(reward, reward[:, 2 * N :])
    found = {}
    for metric in METRICS:
        centroids = distances.fit(before, labels, metric=metric)
        tau = distances.threshold(distances.d_min(centroids, before[held]), QUANTILE)
        far = distances.d_min(centroids, states).reshape(CHOICES, -1)
        world, noise, foreign = np.split(far, [N, 2 * N], axis=1)
        found[f"{metric}/noised"] = auroc(noise.ravel(), world.ravel())
        found[f"{metric}/salad"] = auroc(foreign.ravel(), world.ravel())
        # Errors, by what the pairs were about: two neighbours each, and the same ones noised.
        better = np.sign(own[:, ::2] - own[:, 1::2]).ravel()
        wrong, larger = [], []
        for at in (0, N):
            r, d = reward[:, at : at + N], far[:, at : at + N]
            wrong.append((np.sign(r[:, ::2] - r[:, 1::2]).ravel() != better)[better != 0])
            larger.append(np.maximum(d[:, ::2], d[:, 1::2]).ravel()[better != 0])
        for name, some in (("world", [0]), ("noised", [1]), ("both", [0, 1])):
            if loaded.plan.head is None:
                continue  # nothing that could err
            w = np.concatenate([wrong[i] for i in some])
            d = np.concatenate([larger[i] for i in some])
            found[f"pairs/{name}"] = float(1 - w.mean())
            found[f"{metric}/errors/{name}"] = auroc(d[w], d[~w])
        for name, (g, r), d in (
            ("world", (grade, reward[:, :N]), world),
            ("salads", salads, mixed(world, foreign)),
        ):
            picked = distances.best_of_n_filtered(g, r, d, tau)
            for key in ("filtered", "random", "dropped"):
                found[f"{metric}/{name}/{key}"] = float(picked[key].mean())
            found[f"{name}/plain"] = float(picked["plain"].mean())
            found[f"{name}/mean"] = float(picked["mean"].mean())
    return found | dict(gold=found["world/plain"])


def measure(name, seed, folder, starts, choices, train, held, data):
    """Makes a model and gives its line: probes of both levels, best of n, distances."""
    if MODELS[name] is None:
        model, of, extra = starts[name], MULTI, {}
    else:
        of, start, count, flipped = MODELS[name]
        rows = pairs(f"{seed} pairs {of}", train, count, of, flipped)
        model = reward_model(folder / name, starts[start], rows, seed=seed)
        path = folder / f"held-{of}.jsonl"
        common.write(path, pairs(f"{seed} held {of}", held, 150, of))
        extra = dict(pairs=path)
    row = {}
    for level in mrmbench.LEVELS:
        of_level = extra if level == "easy" else {}
        got = recipe.run(
            model, data, folder / name / f"{level}.json", level=level, seeds=PROBES, **of_level
        )["metrics"]
        for task in TASKS:
            row |= {
                f"{level}/{task}/{key}": got[task][key]
                for key in ("majority", "balanced_accuracy", "auroc")
            }
            row[f"{level}/{task}"] = got[task]["accuracy"]["value"]
            row[f"{level}/{task}/shuffled"] = got[task]["shuffled"]["accuracy"]
            row[f"{level}/{task}/shuffled_balanced"] = got[task]["shuffled"]["balanced_accuracy"]
        row[f"{level}/converged"] = got["converged"]
        if of_level:
            row |= {f"recipe/{key}": value for key, value in got["pairs"].items()}
    return row | chosen(model, of, choices, data, folder / name)


def main():
    """Makes what is missing, prints the tables, and draws what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--only", default="", help="models, separated by commas")
    parser.add_argument("--out", type=Path, default=common.HERE / "mrmbench.jsonl")
    args = parser.parse_args()
    results = common.Results(args.out)
    for seed in map(int, args.seeds.split(",")):
        folder = args.work.resolve() / f"seed{seed}"
        train, held = prompts(seed)
        data = write_benchmark(folder / "data", seed, train, held)
        names = args.only.split(",") if args.only else list(MODELS)
        if all(results.has(model=name, seed=seed) for name in names):
            continue
        starts, choices = bases(folder, seed, train), Choices(seed, held)
        for name in names:
            if not results.has(model=name, seed=seed):
                began = time.monotonic()
                row = measure(name, seed, folder, starts, choices, train, held, data)
                row = {k: round(v, 4) for k, v in row.items() if v == v}  # no errors, no AUROC
                results.add(model=name, seed=seed, seconds=round(time.monotonic() - began), **row)
    tables(results.rows)
    picture(results.rows, common.HERE / "mrmbench.png")


# Tables and picture


def by_seed(rows):
    """[{model: line}], of the seeds that are whole."""
    found = {}
    for row in rows:
        found.setdefault(row["seed"], {})[row["model"]] = row
    return [found[seed] for seed in sorted(found) if found[seed].keys() == MODELS.keys()]


def average(row, level="easy", ending=""):
    """Mean over the six tasks."""
    return float(np.mean([row[f"{level}/{task}{ending}"] for task in TASKS]))


def margin(row, level):
    """Share of what the majority class gets wrong that the probes get right, mean over tasks."""
    each = [(row[f"{level}/{t}"], row[f"{level}/{t}/majority"]) for t in TASKS]
    return float(np.mean([(right - most) / (1 - most) for right, most in each]))


def contrasts(seeds):
    """{what: a number a seed}, after the expectations of mrmbench.md."""
    found = {}

    def add(name, of):
        found[name] = [float(of(models)) for models in seeds]

    gain = lambda m, model, task: m[model][f"easy/{task}"] - m["base"][f"easy/{task}"]
    others = lambda m, task: np.mean([gain(m, task, t) for t in TASKS if t != task])
    for t in SINGLE:
        add(f"1 {t}: own probe less the base's", lambda m: gain(m, t, t))
        rest = lambda m: m[t][f"easy/{t}"] - m["random"][f"easy/{t}"]
        add(f"1 {t}: own probe less the random model's", rest)
    for t in SINGLE:
        add(f"2 {t}: gain of the other five", lambda m: others(m, t))
        add(f"2 {t}: own gain less that of the other five", lambda m: gain(m, t, t) - others(m, t))
    for t in TASKS:
        add(f"2 multi: gain of {t}", lambda m: gain(m, MULTI, t))
    add("2 multi: gain of all six", lambda m: np.mean([gain(m, MULTI, t) for t in TASKS]))
    over = lambda m, names, of: np.mean([of(m[name]) for name in names])
    add("3 easy, all models", lambda m: over(m, MODELS, lambda r: margin(r, "easy")))
    add("3 hard, all models", lambda m: over(m, MODELS, lambda r: margin(r, "hard")))
    apart = lambda r: margin(r, "easy") - margin(r, "hard")
    add("3 easy less hard, all models", lambda m: over(m, MODELS, apart))
    for t in TASKS:
        half = lambda r: (r[f"easy/{t}/balanced_accuracy"] - 1 / 2) / (1 / 2)
        third = lambda r: (r[f"hard/{t}/balanced_accuracy"] - 1 / 3) / (2 / 3)
        each = lambda r: half(r) - third(r)
        add(f"3 {t}: easy less hard, balanced", lambda m: over(m, MODELS, each))
    pearson = lambda m, names: np.corrcoef(
        [average(m[name]) for name in names], [m[name]["gold"] for name in names]
    )[0, 1]
    add("4 correlation, all ten models", lambda m: pearson(m, list(MODELS)))
    add("4 correlation, the eight with a reward", lambda m: pearson(m, TRAINED))
    ordered = lambda m: np.corrcoef(*zip(*[(m[n]["pairs/world"], m[n]["gold"]) for n in SEVERAL]))
    add("4 afterwards: accuracy on pairs and gold, five multi models", lambda m: ordered(m)[0, 1])
    for metric in METRICS:
        for kind in ("noised", "salad"):
            of = lambda r: r[f"{metric}/{kind}"]
            add(f"5 {metric}: {kind} told by d_min, all models", lambda m: over(m, MODELS, of))
        for part in ("world", "noised", "both"):
            of = lambda r: r[f"{metric}/errors/{part}"]
            add(f"5 {metric}: errors told by d_min, {part}", lambda m: over(m, SEVERAL, of))
    for part in ("world", "noised"):
        add(
            f"5 accuracy on pairs, {part}", lambda m: over(m, SEVERAL, lambda r: r[f"pairs/{part}"])
        )
    for metric, kind in itertools.product(METRICS, ("salads", "world")):
        of = lambda r, way: r[f"{kind}/plain" if way == "plain" else f"{metric}/{kind}/{way}"]
        for a, b in (("filtered", "plain"), ("plain", "random"), ("filtered", "random")):
            less = lambda r: of(r, a) - of(r, b)
            add(f"6 {metric}, {kind}: {a} less {b}", lambda m: over(m, SEVERAL, less))
        add(f"6 {metric}, {kind}: dropped", lambda m: over(m, SEVERAL, lambda r: of(r, "dropped")))
    for name in SEVERAL:
        less = lambda m: m[name]["mahalanobis/salads/filtered"] - m[name]["salads/plain"]
        add(f"6 afterwards, mahalanobis, salads, {name}: filtered less plain", less)
    beyond = lambda r: r["recipe/accuracy_dropped"] - r["recipe/accuracy_kept"]
    add(
        "5 afterwards: accuracy on the recipe's pairs, far less near",
        lambda m: over(m, SEVERAL, beyond),
    )
    for level, chance in (("easy", 1 / 2), ("hard", 1 / 3)):
        most = lambda r: average(r, level, "/shuffled") - average(r, level, "/majority")
        add(f"7 {level}: shuffled less majority", lambda m: over(m, MODELS, most))
        even = lambda r: average(r, level, "/shuffled_balanced") - chance
        add(f"7 {level}: balanced, less chance", lambda m: over(m, MODELS, even))
    return found


def interval(values):
    """(mean, low, high) over seeds, 95 % by Student's t."""
    mean, n = np.mean(values), len(values)
    if n < 2:
        return mean, np.nan, np.nan
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5
    return mean, mean - half, mean + half


def tables(rows):
    """Prints what mrmbench.md shows."""
    seeds = by_seed(rows)
    if not seeds:
        return
    mean = lambda of: float(np.mean([of(models) for models in seeds]))
    for level in mrmbench.LEVELS:
        print(f"\n| {level} | " + " | ".join(TASKS) + " | mean | own pairs | gold of best-of-8 |")
        print("|---" * (len(TASKS) + 4) + "|")
        most = [mean(lambda m: m["base"][f"{level}/{t}/majority"]) for t in TASKS]
        print(f"| majority | {' | '.join(f'{x:.3f}' for x in most)} | {np.mean(most):.3f} | | |")
        for name in MODELS:
            each = [mean(lambda m: m[name][f"{level}/{t}"]) for t in TASKS]
            each += [mean(lambda m: average(m[name], level))]
            each += [mean(lambda m: m[name].get("pairs/world", np.nan))]
            each += [mean(lambda m: m[name]["gold"])]
            print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in each) + " |")
    print("\n| | mean | 95 % | seeds |\n|---|---|---|---|")
    for name, values in contrasts(seeds).items():
        middle, low, high = interval(values)
        each = ", ".join(f"{x:.3f}" for x in values)
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {each} |")
    for names in (list(MODELS), TRAINED):
        every = [(average(m[n]), m[n]["gold"]) for m in seeds for n in names]
        got = probing.pearson(*zip(*every))
        print(
            f"pooled correlation of {len(every)}: " + str({k: round(v, 3) for k, v in got.items()})
        )


def picture(rows, path):
    """Probes by model, best-of-n over probes, what distances tell, and what a filter gains."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = by_seed(rows)
    if not seeds:
        return
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (top, right), (left, low) = axes
    names = list(MODELS)
    for i, task in enumerate(TASKS):
        for m in seeds:
            at = np.arange(len(names)) + 0.12 * (i - 2.5)
            top.plot(at, [m[n][f"easy/{task}"] for n in names], ".", color=f"C{i}")
        top.plot([], [], "o", color=f"C{i}", label=task)
    top.set_xticks(range(len(names)), names, rotation=35, ha="right")
    top.set(ylabel="accuracy of the easy probe", ylim=(0.4, 1.02))
    top.legend(fontsize=7, ncols=3)
    for i, name in enumerate(names):
        marker = "s" if MODELS[name] is None else "o"
        x, y = [average(m[name]) for m in seeds], [m[name]["gold"] for m in seeds]
        right.plot(x, y, marker, color=f"C{i}", label=name)
    right.set(xlabel="mean accuracy of the six easy probes", ylabel="gold of best-of-8")
    right.legend(fontsize=7)
    shown = [(kind, MODELS) for kind in ("noised", "salad")]
    shown += [(f"errors/{part}", SEVERAL) for part in ("world", "noised", "both")]
    for i, ((key, some), metric) in enumerate(itertools.product(shown, METRICS)):
        for j, name in enumerate(some):
            values = [m[name][f"{metric}/{key}"] for m in seeds]
            at = [i + 0.07 * (j - len(some) / 2)] * len(values)
            left.plot(at, values, ".", color=f"C{names.index(name)}")
    left.axhline(0.5, color="grey", lw=0.8)
    words = ("noised texts", "salads", "errors, world", "errors, noised", "errors, both")
    words = [f"{word}, {metric}" for word in words for metric in METRICS]
    left.set_xticks(range(len(words)), words, rotation=35, ha="right", fontsize=8)
    left.set(ylabel="AUROC of d_min (colours as above)")
    for i, name in enumerate(SEVERAL):
        for j, metric in enumerate(METRICS):
            ways = f"{metric}/salads/random", "salads/plain", f"{metric}/salads/filtered"
            at, color = np.arange(3) + 4 * j + 9 * i, f"C{names.index(name)}"
            for m in seeds:
                low.plot(at, [m[name][way] for way in ways], ".-", color=color)
    at = [k + 4 * j + 9 * i for i in range(len(SEVERAL)) for j in range(2) for k in range(3)]
    words = [f"{way}, {metric}" for metric in METRICS for way in ("random", "plain", "filtered")]
    low.set_xticks(at, words * len(SEVERAL), rotation=90, fontsize=6)
    low.set(ylabel="gold of best-of-8, two of them salads")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
