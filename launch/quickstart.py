"""The main job: from a model's own answers to a Hugging Face reward model.

SmolLM2-135M answers small sums and products several times, the tasks' own checkers say which
answers are right, and a reward model learns to tell right from wrong. On problems it has never
seen it must beat an untrained head and the length heuristic, and best-of-4 by its score must
recover at least a fifth of the gap between the mean answer and an oracle. Exits 1 if it does not.

Every phase leaves files behind and is skipped when they are there: interrupted, the same command
goes on. Run it through launch/quickstart.sh, which installs what it needs.

    python launch/quickstart.py [--workdir runs/quickstart]
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from jaxreward import cli
from jaxreward.data import sources
from jaxreward.data.corpora import reasoning_gym
from jaxreward.evals import best_of_n
from jaxreward.rewards.final_number import final_number

SEED = 0
# Task, problems. All one-digit sums and products (3 + 5 and 5 + 3 are two problems, on one side of
# the split), and a few with two digits, where SmolLM2 is mostly wrong.
TASKS = (("chain_sum_1", 200), ("products_1", 100), ("chain_sum_2", 20))
HELD_OUT = 0.4
ANSWERS = 5
BEST_OF = 4
MAX_NEW = 28
SELECTORS = {
    "trained": "trained reward model",
    "untrained": "untrained head",
    "length": "shortest answer",
    "logp": "mean log-prob",
}


class Missed(Exception):
    """The trained model did not reach what it must."""


def phase(name, make, *, done=None):
    """Runs one phase unless its product exists, and prints what it took."""
    began = time.monotonic()
    if done is not None and done.exists():
        print(f"[{name}] done before: {done}", flush=True)
        return
    print(f"[{name}]", flush=True)
    make()
    print(f"[{name}] {time.monotonic() - began:.0f} s", flush=True)


def command(*words):
    """One jaxreward command, as a user would type it."""
    print(f"  $ jaxreward {' '.join(map(str, words))}", flush=True)
    code = cli.main([str(word) for word in words])
    if code:
        sys.exit(code)


def write_problems(path, train_path, test_path):
    """Problems of all tasks, each once, split so that a sum and its mirror image stay together."""
    found = {}
    for task, count in TASKS:
        for problem in reasoning_gym.problems(task, count=count, seed=SEED, both_orders=True):
            found.setdefault(problem["prompt"], problem)
    train, test = reasoning_gym.split(list(found.values()), fraction=HELD_OUT, seed=SEED)
    sources.write_jsonl(train_path, train)
    sources.write_jsonl(test_path, test)
    sources.write_jsonl(path, train + test)
    print(f"  {len(train)} problems to train on, {len(test)} held out")


def graded(answers, keys):
    """The sampled records of these problems, each answer with `correct` and `final`."""
    out = []
    for record in sources.read_jsonl(answers):
        record = record[1]
        if record["key"] not in keys:
            continue
        for answer in record["answers"]:
            answer["correct"] = reasoning_gym.check(record, answer["text"])
            answer["final"] = final_number(answer["text"])
        out.append(record)
    return out


def write_pairs(path, records):
    """Every right answer against every wrong one; a problem's pairs weigh one together."""
    pairs = []
    for record in records:
        texts = {a["text"]: a["correct"] for a in record["answers"] if a["text"].strip()}
        right = [text for text, correct in texts.items() if correct]
        wrong = [text for text, correct in texts.items() if not correct]
        pairs += [
            {
                "id": f"{record['id']}-{i}-{j}",
                "prompt": record["prompt"],
                "chosen": a,
                "rejected": b,
                "weight": 1 / (len(right) * len(wrong)),
                "subset": record["task"],
            }
            for i, a in enumerate(right)
            for j, b in enumerate(wrong)
        ]
    sources.write_jsonl(path, pairs)
    problems = len({pair["prompt"] for pair in pairs})
    print(f"  {len(pairs)} pairs of {problems} problems that have right and wrong answers")


def finished(run):
    """True when training has reached its last step."""
    facts, metrics = run / "environment.json", run / "metrics.jsonl"
    if not facts.exists() or not metrics.exists():
        return False
    # Not parsed as JSON: a kill may have cut the last line short.
    steps = re.findall(r'^\{"step": (\d+),', metrics.read_text(), re.MULTILINE)
    last = max(map(int, steps), default=0)
    return last >= json.loads(facts.read_text())["steps"]["total"]


def train(run, words):
    """The training phase; stops the whole program if training was asked to stop."""
    if finished(run):
        print("  trained before")
        return
    command(*words)
    if not finished(run):
        sys.exit("stopped while training; the same command goes on from there")


def judge(run, records):
    """Scores of the held-out answers by every selector: a list of problems for `best_of_n`."""
    import jax

    from jaxreward.data import tokenize
    from jaxreward.evals import scorer
    from jaxreward.hub import load
    from jaxreward.models import trainable
    from jaxreward.recipes import evaluate

    model = evaluate.load_model(run)
    trees = [
        tokenize.encode_tree(
            model.tokenizer,
            record["prompt"],
            [answer["text"] for answer in record["answers"]],
            template=model.template,
            id=record["id"],
        )
        for record in records
    ]
    # The frozen layers run once for both models; the untrained one has the head and the layers
    # that training started from.
    features = scorer.cache_features(model.plan, model.frozen, trees)
    trees = [dataclasses.replace(tree, features=f) for tree, f in zip(trees, features)]
    _, weights, _ = load.load(model.folder)
    key = jax.random.fold_in(jax.random.key(SEED), 1)
    start, _ = trainable.init(model.plan, weights, key)
    predict = scorer.make_predict(model.plan)
    scored = {
        "trained": predict(model.params, model.frozen, trees),
        "untrained": predict(start, model.frozen, trees),
    }
    problems = []
    for i, record in enumerate(records):
        answers = record["answers"]
        problems.append(
            {
                "correct": [float(answer["correct"]) for answer in answers],
                "finals": [answer["final"] for answer in answers],
                "scores": {
                    **{name: scored[name][i].astype(float).tolist() for name in scored},
                    "length": [-float(answer["tokens"]) for answer in answers],
                    "logp": [answer["logp"] / answer["tokens"] for answer in answers],
                },
            }
        )
    return problems


def report_numbers(run, records, problems):
    """Writes evals/best_of_4.json and samples.jsonl, prints the table, returns what was missed."""
    values = best_of_n.per_problem(problems, list(SELECTORS), n=BEST_OF)
    names = {"mean": "mean answer", **SELECTORS, "majority": "majority vote", "oracle": "oracle"}
    pairs = {name: best_of_n.pair_accuracy(problems, name)[0] for name in SELECTORS}
    mixed = best_of_n.pair_accuracy(problems, "trained")[1]
    # 3 + 5 and 5 + 3 are drawn together when problems are resampled.
    keys = np.array([record["key"] for record in records])
    rows = {name: best_of_n.interval(values[name], keys) for name in names}
    pair_rows = {name: best_of_n.interval(pairs[name], keys[mixed]) for name in SELECTORS}
    paired = []
    for other in ("untrained", "length", "logp"):
        for metric, found, groups in (
            ("pair accuracy", pairs, keys[mixed]),
            (f"best of {BEST_OF}", values, keys),
        ):
            gap = best_of_n.paired(found["trained"], found[other], groups)
            paired.append({"a": names["trained"], "b": names[other], "metric": metric, **gap})
    recovered = best_of_n.recovered(values, "trained")

    show = lambda row: f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    print(f"\n{len(problems)} unseen problems, {ANSWERS} answers each; pair accuracy over the")
    print(f"{len(mixed)} with right and wrong answers. 95 % intervals, problems resampled.\n")
    print(f"{'':<22} {'pair accuracy':<24} best of {BEST_OF}")
    for name, title in names.items():
        pair = show(pair_rows[name]) if name in pair_rows else ""
        print(f"{title:<22} {pair:<24} {show(rows[name])}")
    print()
    for row in paired:
        print(
            f"{row['a']} - {row['b']}, {row['metric']}: "
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    print(f"recovered of the gap from mean to oracle: {recovered:.0%}\n")

    (run / "evals").mkdir(exist_ok=True)
    best = {
        "name": f"best_of_{BEST_OF}",
        "kind": "best_of_n",
        "n": BEST_OF,
        "problems": len(problems),
        "recovered": recovered,
        "selectors": [{"name": names[name], **rows[name]} for name in names],
        "paired": paired,
    }
    (run / "evals" / f"best_of_{BEST_OF}.json").write_text(json.dumps(best, indent=1))
    accuracy = {
        "name": "unseen_pairs",
        "protocol": {"problems": len(mixed), "weights": "problems equal", "ties": "one half"},
        "metrics": {f"accuracy, {names[name]}": row for name, row in pair_rows.items()},
    }
    (run / "evals" / "unseen_pairs.json").write_text(json.dumps(accuracy, indent=1))
    sources.write_jsonl(
        run / "samples.jsonl",
        [
            {
                "prompt": record["prompt"],
                "answers": [
                    {"text": answer["text"], "score": score, "correct": answer["correct"]}
                    for answer, score in zip(record["answers"], problem["scores"]["trained"])
                ],
            }
            for record, problem in zip(records, problems)
        ],
    )
    must = [row for row in paired if row["b"] != names["logp"]]
    missed = [f"{r['a']} does not beat {r['b']} on {r['metric']}" for r in must if r["low"] <= 0]
    if not recovered >= 0.2:
        missed.append(f"best-of-{BEST_OF} recovers {recovered:.0%} of the gap; 20 % are asked for")
    return missed


def check_export(run, exported, records, folder):
    """Scores held-out pairs with the workdir and with the exported folder; they must agree."""
    pairs = folder / "check.jsonl"
    write_pairs(pairs, records[:12])
    got = {}
    for name, model in (("workdir", run), ("exported", exported)):
        out = folder / f"check_{name}.jsonl"
        command("score", "--model", model, "--input", pairs, "--output", out)
        got[name] = [
            (row["chosen_score"], row["rejected_score"]) for _, row in sources.read_jsonl(out)
        ]
    worst = float(np.abs(np.subtract(got["workdir"], got["exported"])).max())
    print(f"  largest difference of {2 * len(got['exported'])} scores: {worst:.1e}")
    if not worst <= 1e-4:
        raise Missed(f"exported scores differ from the run's by {worst:.1e}")


def main(workdir):
    """All phases in order; returns the exit code."""
    began = time.monotonic()
    workdir.mkdir(parents=True, exist_ok=True)
    base, run, exported = workdir / "smollm2", workdir / "run", workdir / "reward_model"
    files = ("problems", "train", "test", "answers", "pairs")
    at = {name: workdir / f"{name}.jsonl" for name in files}
    config = "quickstart/arithmetic"
    settings = (f"--config.models.policy.init=hf:{base}", f"--config.data.path={at['pairs']}")
    keys = lambda part: {row["key"] for _, row in sources.read_jsonl(at[part])}
    sampling = ("--n", ANSWERS, "--temperature", 0.8, "--max_new", MAX_NEW, "--seed", SEED)
    held = []

    def evaluated():
        held.extend(graded(at["answers"], keys("test")))
        problems = judge(run, held)
        missed = report_numbers(run, held, problems)
        if missed:
            raise Missed("; ".join(missed))

    phase("import", lambda: command("import", "--from", "smollm2", "--out", base), done=base)
    phase(
        "problems",
        lambda: write_problems(at["problems"], at["train"], at["test"]),
        done=at["problems"],
    )
    phase(
        "sample",
        lambda: command(
            "generate", "--model", base, "--input", at["problems"], "--output", at["answers"],
            *sampling, "--batch", 52 * ANSWERS,  # six full batches
        ),
        done=at["answers"],
    )  # fmt: skip
    phase(
        "label",
        lambda: write_pairs(at["pairs"], graded(at["answers"], keys("train"))),
        done=at["pairs"],
    )
    words = ("train", "--config", config, "--workdir", run, *settings)
    phase("train", lambda: train(run, words))
    try:
        phase("evaluate", evaluated)
        if not exported.exists():
            phase("export", lambda: command("export", "--model", run, "--out", exported))
        phase("reload check", lambda: check_export(run, exported, held, workdir))
    except Missed as missed:
        print(f"MISSED: {missed}", file=sys.stderr)
        return 1
    finally:
        phase("report", lambda: command("report", "--workdir", run))
    print(f"reward model   {exported}\nreport         {run / 'report.html'}")
    print(f"all phases     {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    sys.exit(main(parser.parse_args().workdir))
