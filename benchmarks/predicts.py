"""Whether a suite's number predicts how well a reward model picks answers.

Claim (docs/evaluation.md): what was expected stands there, and what came below it.

Reward models of varied quality are linear heads on two trunks, SmolLM2-135M and the quickstart's
reward model, fitted by the preference recipe to different pairs. Each text is read once for all of
them: a frozen trunk's state at the last token is all that a head sees. Gold is the share of the
quickstart's unseen problems whose best-of-4 answer by the reward model is right, by the problems'
own checker. Each suite's score is then ranked against gold over the reward models.

    python benchmarks/predicts.py --quickstart runs/quickstart --data suites --work runs/predicts

--data holds the suites and `hh_rlhf_harmless`; nothing of it is copied. Killed, the same command
goes on. Writes `predicts.jsonl`; --lines appends the numbers of both trunks on RM-Bench and
JudgeBench, as benchmarks/suites.py writes them.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))

import jax
import numpy as np
import quickstart
from scipy import stats

from jaxreward import presets
from jaxreward.core import masked, provenance
from jaxreward.data import pairs, pipeline, sources, tokenize
from jaxreward.data.corpora import suites
from jaxreward.evals import best_of_n, reward_bench, scorer
from jaxreward.hub import load
from jaxreward.models import decoder, trainable
from jaxreward.objectives import supervised
from jaxreward.parallel import specs
from jaxreward.recipes import preference
from jaxreward.report import paired
from jaxreward.train import session

TOP, SEED, DRAWS = 3, 0, 10_000
# Items of each suite: all, the first, or every so-many-th of what is at hand.
PARTS = {
    "hhh": slice(None),
    "llmbar": slice(100),
    "pandalm": slice(109),
    "judgebench": slice(None, None, 6),
    "rm_bench": slice(None, None, 6),
}
LIKELY = ("judgebench", "rm_bench")  # whose answers' likelihood is read too
SETTINGS = ("optim.lr=1e-2", "optim.decay=0.1", "train.epochs=20")
LEARNT = {"harmless": (160, 160), "people": (320, 60)}  # most tokens of a tree, and most trees


@dataclasses.dataclass
class Trunk:
    """A frozen model: its `plan` trains the head alone. `at` are its columns of what is read."""

    plan: trainable.Plan
    frozen: dict
    top: dict
    head: dict | None
    at: slice


def trunks(work):
    """(lower layers, {"base", "quickstart"}); both have the same lower layers."""
    lowers, found = [], {}
    for i, (name, folder) in enumerate((("base", "smollm2"), ("quickstart", "reward_model"))):
        cfg, weights, head = load.load(work / folder)
        plan = trainable.Plan(cfg, "head")
        upper = trainable.split(plan, weights)[1]["policy"]["upper"]
        lower, top = decoder.split_params(weights, cfg.depth - TOP)
        columns = slice(i * cfg.width, (i + 1) * cfg.width)
        found[name] = Trunk(plan, {"policy": {"upper": upper}}, top, head, columns)
        lowers.append(lower)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *lowers)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{work}: the models differ below their upper {TOP} layers; expected none")
    return lowers[0], found


def reader(lower, trunks):
    """(rows, likely) -> both trunks' states of each answer; if likely, log-prob and tokens too."""
    plan = trunks["base"].plan
    below, above = decoder.split(plan.cfg, plan.cfg.depth - TOP)
    layers, _ = decoder.split(above, TOP)

    def run(part, cfg, x, rows):
        kw = {name: getattr(rows, name) for name in ("positions", "segments", "trunk")}
        return decoder.backbone(part, cfg, x, **kw).states

    @functools.partial(jax.jit, static_argnums=4)
    def measure(lower, tops, frozen, rows, likely):
        shared = run(lower, below, decoder.embed(lower, below, rows), rows)
        states = {name: run(top, layers, shared, rows) for name, top in tops.items()}
        ends = [masked.pick(states[name], rows.ends) for name in trunks]
        if not likely:
            return jax.numpy.concatenate(ends, axis=-1)
        read = trainable.states(plan, {}, frozen, rows.replace(features=states["base"]))
        at = supervised.scored(rows.tokens, rows.loss_mask, rows.segments, rows.trunk)
        nll = supervised.cross_entropy(read, decoder.head_matrix(lower, plan.cfg), at)
        logps = supervised.answer_logps(-nll, at, rows.segments, rows.ends)
        return jax.numpy.concatenate([*ends, jax.numpy.stack(logps, axis=-1)], axis=-1)

    tops = {name: trunk.top for name, trunk in trunks.items()}
    frozen = trunks["base"].frozen
    return lambda rows, likely: np.asarray(measure(lower, tops, frozen, rows, likely))


def read(name, trees, measure, folder, width):
    """What `measure` says of the answers of each tree, from disk where it was read before."""
    likely = name in LIKELY
    width = 2 * width + 2 * likely
    groups = collections.defaultdict(list)
    for i, tree in enumerate(trees):
        groups[max(512, -(-tree.size // 256) * 256)].append(i)
    out = [None] * len(trees)
    for length, members in sorted(groups.items()):
        some = [trees[i] for i in members]
        counts = [len(tree.answers) for tree in some]

        def made(some=some, length=length, counts=counts):
            found = [np.zeros((n, width), np.float32) for n in counts]
            rows = pipeline.batches(some, row_len=length, batch=1, seed=0, epochs=1, shuffle=False)
            for raw in rows:
                values = measure(scorer.pair_rows(raw), likely)
                for b, k in np.argwhere(raw["index"][..., 0] >= 0):
                    tree, answer = raw["index"][b, k]
                    found[tree][answer] = values[b, k]
            print(
                f"{name}: {len(some)} prompts with answers, of {length} tokens or less",
                file=sys.stderr,
                flush=True,
            )
            return np.concatenate(found)

        path = folder / f"{name}-{length}-{scorer.fingerprint(some, width)}.npy"
        flat = scorer.kept(path, (sum(counts), width), np.float32, made)
        for i, values in zip(members, np.split(flat, np.cumsum(counts)[:-1])):
            out[i] = values
    return out


def ends(trees, found, trunk):
    """The trees cut to the last token of each answer, with the trunk's states there."""
    last = lambda parts: [part[-1:] for part in parts]
    made = []
    for tree, values in zip(trees, found, strict=True):
        states = values[:, trunk.at]
        cut = dict(answers=last(tree.answers), loss=last(tree.loss), prompt=tree.prompt[:0])
        made.append(dataclasses.replace(tree, **cut, features=[states[:0], *states[:, None]]))
    return made


def swapped(trees, share):
    """Trees with this share of their pairs turned round."""
    draw = np.random.default_rng(SEED).random
    turn = lambda pair: pair[::-1] if draw() < share else pair
    return [dataclasses.replace(tree, pairs=[turn(p) for p in tree.pairs]) for tree in trees]


def by_length(trees, sizes):
    """Trees whose longer answers are the chosen ones."""
    longer = lambda pair, n: tuple(sorted(pair, key=lambda a: -n[a]))
    return [
        dataclasses.replace(tree, pairs=[longer(p, n) for p in tree.pairs])
        for tree, n in zip(trees, sizes, strict=True)
    ]


def fitted(trunk, trees, folder, tokenizer, *, seed=SEED, settings=SETTINGS):
    """A head's parameters, after the preference recipe's steps on these trees; None: none."""
    config = presets.load(
        "quickstart/arithmetic",
        ["models.policy.train=head", "models.policy.top_layers=0", f"seed={seed}", *settings],
    )
    key = jax.random.key(seed)
    params = specs.init(trainable.param_specs(trunk.plan), key)
    if trees is None:
        return params
    built = session.assemble(
        config,
        plan=trunk.plan,
        params=params,
        frozen=trunk.frozen,
        counts={},
        train=trees,
        held=[],
        facts={},
        length=scorer.row_len(trees),
        losses=lambda packed: preference.make_loss(trunk.plan, config.losses),
        predict=scorer.make_predict(trunk.plan),
        to_device=scorer.pair_rows,
        tokenizer=tokenizer,
        folder=folder,
        source_hash="",
        key=key,
        where=None,
    )
    state = built.state
    for _ in range(built.steps):
        state, _ = built.step(state, built.frozen, built.to_device(next(built.batches)))
    return state.params


def majority(labels):
    """What most of PandaLM's annotators say: 1 or 2, or 0 for a tie or none."""
    label, count = collections.Counter(labels).most_common(1)[0]
    return label if count > len(labels) / 2 else 0


def items_of(suite, data):
    """(the part of a suite that is measured, the rest)."""
    items, _ = suites.read(suite, data, on_bad="skip")
    kept = items[PARTS[suite]]
    prompts = {words(item["prompt"]) for item in kept}
    return kept, [item for item in items if words(item["prompt"]) not in prompts]


def words(prompt):
    """A prompt as one text, whether it is one or messages."""
    parts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
    return "\n".join(parts).strip()


def lessons(data, quick, encode):
    """{name: trees with pairs} to learn from; none shares a prompt with what is measured."""
    rows, _ = sources.read_pairs(quick / "pairs.jsonl")
    harmless, _ = sources.read_pairs(data / "hh_rlhf_harmless" / "pairs.jsonl", on_bad="skip")
    _, rest = items_of("pandalm", data)
    measured = {words(item["prompt"]) for suite in PARTS for item in items_of(suite, data)[0]}
    people = [
        {"id": x["id"], "prompt": x["prompt"], "chosen": x["answers"][y - 1],
         "rejected": x["answers"][2 - y]}
        for x in rest
        if words(x["prompt"]) not in measured
        and (y := majority(x["labels"]))
        and all(a.strip() for a in x["answers"])
    ]  # fmt: skip
    trees = {"harmless": encode(harmless), "people": encode(people)}
    for name, (longest, most) in LEARNT.items():
        trees[name] = [tree for tree in trees[name] if tree.size <= longest][:most]
    return {"arithmetic": encode(rows), **trees}


def heads(trunk, name, taught, folder, tokenizer):
    """{reward model: parameters} on one trunk; `taught` are lessons and what was read of them."""
    trees, sizes = {}, {}
    for lesson, (full, found) in taught.items():
        trees[lesson] = ends(full, found, trunk)
        sizes[lesson] = [[len(answer) for answer in tree.answers] for tree in full]
    sums = trees["arithmetic"]
    learnt = {
        "arithmetic": sums,
        "arithmetic, a quarter": sums[::4],
        "arithmetic, a sixteenth": sums[::16],
        "arithmetic, 20 % flipped": swapped(sums, 0.2),
        "arithmetic, 40 % flipped": swapped(sums, 0.4),
        "arithmetic, all flipped": swapped(sums, 1.0),
        "harmless": trees["harmless"],
        "people": trees["people"],
        "all three": sums + trees["harmless"] + trees["people"],
        "longer": by_length(trees["harmless"], sizes["harmless"]),
        "untrained": None,
    }
    if trunk.head is not None:  # learnt from the same sums already, with the layers below
        for lesson in ("", ", a quarter", ", a sixteenth", ", 20 % flipped"):
            del learnt[f"arithmetic{lesson}"]
    made = {f"{name}: {k}": fitted(trunk, v, folder, tokenizer) for k, v in learnt.items()}
    return made | ({} if trunk.head is None else {f"{name}: its own": {"score": trunk.head}})


def spearman(x, y):
    """Rank correlation along the last axis; NaN where one side does not vary."""
    x, y = (stats.rankdata(v, axis=-1) for v in (x, y))
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def resampled(values, groups, rng):
    """Means [DRAWS, models] of values [models, n] with whole groups drawn."""
    _, place = np.unique(groups, return_inverse=True)
    count = place.max() + 1
    weight = rng.multinomial(count, np.full(count, 1 / count), DRAWS)[:, place].astype(float)
    return weight @ values.T / weight.sum(axis=1, keepdims=True)


def correlation(sides):
    """Mean rank correlation over sides (x [models, n], its groups, y [models, m], its groups).

    "models" is the 95 % interval with reward models resampled; "both" that with the items and
    problems resampled too, which all reward models share.
    """
    rng = np.random.default_rng(SEED)
    models = len(sides[0][0])
    drawn = rng.integers(models, size=(DRAWS, models))
    found = {"value": [], "models": [], "both": []}
    for x, x_groups, y, y_groups in sides:
        a, b = x.mean(axis=1), y.mean(axis=1)
        found["value"].append(spearman(a, b))
        found["models"].append(spearman(a[drawn], b[drawn]))
        a, b = (resampled(v, g, rng) for v, g in ((x, x_groups), (y, y_groups)))
        pick = lambda v: np.take_along_axis(v, drawn, axis=1)
        found["both"].append(spearman(pick(a), pick(b)))
    made = {name: np.mean(value, axis=0) for name, value in found.items()}
    span = lambda v: [round(float(q), 3) for q in np.nanquantile(v, [0.025, 0.975])]
    return {"value": float(made["value"])} | {k: span(made[k]) for k in ("models", "both")}


def won(suite, items, scores):
    """(share of each item's comparisons that is won, [n]; the item's prompt); ties left out."""
    shares, prompts = [], []
    for item, values in zip(items, scores, strict=True):
        right = item["right"]
        if suite == "pandalm":
            right = [label - 1] if (label := majority(item["labels"])) else []
        share = paired.won({"right": right, "scores": values.tolist()})
        if share is not None:
            shares.append(share)
            prompts.append(json.dumps(item["prompt"]))
    return np.array(shares), prompts


def main(args):
    """Reads, fits, scores, ranks; writes lines and prints tables."""
    lower, both = trunks(args.quickstart)
    folder = args.quickstart / "smollm2"
    tokenizer = tokenize.load_tokenizer(folder)
    measure, width = reader(lower, both), both["base"].plan.cfg.width
    hashes = [load.content_hash(args.quickstart / x) for x in ("smollm2", "reward_model")]
    states = args.work / f"states-{'-'.join(x[:8] for x in hashes)}"  # of these weights
    reading = lambda name, trees: read(name, trees, measure, states, width)
    encode = lambda rows: pairs.encode_pairs(tokenizer, rows, template="chat", on_long="skip")[0]
    tree = lambda prompt, answers, id: tokenize.encode_tree(
        tokenizer, prompt, answers, template="chat", id=id
    )
    taught = {
        name: (trees, reading(name, trees))
        for name, trees in lessons(args.data, args.quickstart, encode).items()
    }
    keys = {row["key"] for _, row in sources.read_jsonl(args.quickstart / "test.jsonl")}
    unseen = quickstart.graded(args.quickstart / "answers.jsonl", keys)
    asked = {
        "unseen": [tree(r["prompt"], [a["text"] for a in r["answers"]], r["id"]) for r in unseen]
    }
    items = {suite: items_of(suite, args.data)[0] for suite in PARTS}
    for suite, some in items.items():
        asked[suite] = [tree(i["prompt"], i["answers"], i["id"]) for i in some]
    answered = {name: reading(name, trees) for name, trees in asked.items()}

    scores = {}
    for name, trunk in both.items():
        predict = scorer.make_predict(trunk.plan, batch=32)
        cut = {part: ends(trees, answered[part], trunk) for part, trees in asked.items()}
        for model, params in heads(trunk, name, taught, folder, tokenizer).items():
            scores[model] = {part: predict(params, trunk.frozen, t) for part, t in cut.items()}
    problems = [
        {
            "correct": [float(a["correct"]) for a in record["answers"]],
            "finals": [a["final"] for a in record["answers"]],
            "scores": {model: found["unseen"][i].tolist() for model, found in scores.items()},
        }
        for i, record in enumerate(unseen)
    ]
    names = list(scores)
    gold = best_of_n.per_problem(problems, names, n=quickstart.BEST_OF)
    report(names, scores, items, problems, gold, [r["key"] for r in unseen], args)
    if args.lines:
        suite_lines(scores, items, answered, args)


def report(names, scores, items, problems, gold, keys, args):
    """One line a reward model and one of the correlations, and both as tables."""
    keys = np.array(keys)
    good = np.array([gold[name] for name in names])
    own, mixed = zip(*(best_of_n.pair_accuracy(problems, name) for name in names))
    own, mixed = np.array(own), mixed[0]
    # The control shares no problem with gold: pairs of one half against best-of-4 of the other.
    half = np.random.default_rng(SEED).permutation(np.unique(keys))[::2]
    one = np.isin(keys, half)
    sides = [
        (own[:, part[mixed]], keys[mixed][part[mixed]], good[:, ~part], keys[~part])
        for part in (one, ~one)
    ]
    shares = {}
    for suite, some in items.items():
        each = [won(suite, some, scores[name][suite]) for name in names]
        shares[suite] = np.array([share for share, _ in each]), each[0][1]
    # Looked at after the first run: which domain of RM-Bench it is.
    values, prompts = shares["rm_bench"]
    sections = np.array([item["section"] for item in items["rm_bench"]])
    for section in np.unique(sections):
        here = sections == section
        shares[f"rm_bench, {section}"] = values[:, here], np.array(prompts)[here].tolist()
    lines = []
    for m, name in enumerate(names):
        line = {"model": name, "gold": best_of_n.interval(good[m], keys)}
        line["own pairs"] = best_of_n.interval(own[m], keys[mixed])
        line |= {s: best_of_n.interval(v[m], prompts) for s, (v, prompts) in shares.items()}
        lines.append(line)
    found = {}
    meant = [m for m, name in enumerate(names) if "all flipped" not in name]
    for what, kept in (("all", list(range(len(names)))), ("without flipped", meant)):
        found[what] = {
            "reward models": len(kept),
            "own pairs": correlation([(a[kept], b, c[kept], d) for a, b, c, d in sides]),
            **{s: correlation([(v[kept], p, good[kept], keys)]) for s, (v, p) in shares.items()},
        }
    counts = {"problems": len(problems), "own pairs": int(own.shape[1])}
    counts |= {suite: len(prompts) for suite, (_, prompts) in shares.items()}
    facts = {"correlation": found, "counted": counts, "settings": SETTINGS, "seed": SEED}
    lines.append(facts | made_by(args))
    sources.write_jsonl(args.out, lines)

    columns = ["gold", "own pairs", *shares]
    print(f"| reward model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for line in lines[:-1]:
        values = " | ".join(f"{line[column]['value']:.2f}" for column in columns)
        print(f"| {line['model']} | {values} |")
    print(f"\n{json.dumps(counts)}\n")
    for what, each in found.items():
        print(f"| {what}: {each.pop('reward models')} | rank correlation | models | and items |")
        print("|---|---|---|---|")
        for name, row in each.items():
            spans = [f"{low:.2f} to {high:.2f}" for low, high in (row["models"], row["both"])]
            print(f"| {name} | {row['value']:.2f} | {' | '.join(spans)} |")


def made_by(args):
    """Machine, date and software of a line."""
    environment = {k: v for k, v in provenance.environment().items() if k != "command"}
    today = datetime.date.today().isoformat()
    return {"date": today, "machine": args.machine, "environment": environment}


def suite_lines(scores, items, answered, args):
    """Appends what benchmarks/suites.py would of the quickstart's two models."""
    means = {suite: [v[:, -2] / v[:, -1] for v in answered[suite]] for suite in LIKELY}
    for model, by, found in (
        ("reward_model", "score: the reward of the model's head", scores["quickstart: its own"]),
        ("smollm2", "likelihood: mean log-probability a token of the answer and its end", means),
    ):
        result = {}
        for suite in LIKELY:
            some = items[suite]
            metrics = reward_bench.measure(suite, some, found[suite], partial=True)
            part = PARTS[suite]
            which = f"rows {part.start or 0}:{part.stop or 'end'}:{part.step or 1}"
            result[suite] = {
                "items": len(some),
                "which": which,
                "sha256": [sources.data_hash(path) for path, _ in suites.files(args.data, suite)],
                "metrics": metrics,
            }
        protocol = {"template": "chat", "compute": "float32", "truncation": "none", "by": by}
        protocol |= {"order": "each answer alone", "by script": "benchmarks/predicts.py"}
        line = made_by(args) | {"model": model, "protocol": protocol, "suites": result}
        with args.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/predicts"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--lines", type=Path, help="such as benchmarks/suites.jsonl")
    parser.add_argument("--machine", default="not named")
    main(parser.parse_args())
