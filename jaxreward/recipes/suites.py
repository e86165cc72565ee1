"""Public reward-model suites, end to end: read, score or ask, measure, write with the protocol."""

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxreward.core import provenance
from jaxreward.data import inspection, judges, sources, tokenize
from jaxreward.data import overlap as seen_in
from jaxreward.data.corpora import suites
from jaxreward.evals import judges as judged
from jaxreward.evals import likelihood, reward_bench
from jaxreward.hub import load
from jaxreward.models import families, heads, trainable
from jaxreward.parallel import hosts, rules
from jaxreward.recipes import evaluate, generate
from jaxreward.rewards import verdict
from jaxreward.train import checkpoint

BY = {
    "score": "the reward of the model's head, read at the last token of prompt and answer",
    "likelihood": "mean log-probability a token of the answer and its end, given the prompt",
    "judge": "the letter that a judge of both answers writes",
}
_OUTPUT = "this output of the model's head, read at the last token of prompt and answer"


def run(
    model: str | Path,
    names: Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    *,
    limit: int | None = None,
    batch: int = 8,
    by: str = "score",
    max_new: int = 256,
    overlap: str | Path | None = None,
) -> dict:
    """Measures a model on public suites.

    Rows that cannot be used are left out and counted. A suite without one of its parts is an error,
    unless there is a limit: then what needs the part is left out, and "missing" names it.

    Args:
      model: A workdir or the Hugging Face folder of a reward model; with another `by` the folder of
        a language model.
      names: Of `suites.SUITES`.
      data: Folder with the suites' files (`suites.files`), or the file of a single suite.
      out: JSON file for the result, or None. Beside it, with the ending .items.jsonl, one line an
        item: suite, id, subset, right, and its scores; of judges one line a comparison, with the
        verdicts of both orders. What a judge was asked and wrote stands beside it too.
      limit: The first so many items of each suite.
      batch: Rows that run at a time.
      by: One of `BY`; or, of a head of several outputs, the name of the one to compare answers by,
        of classes by its probability. max_new: Most tokens of a judge's answer.
      overlap: A file of training data: of every suite the items that stand in it are counted
        (`data.overlap`), and the metrics are given without them too.

    Returns:
      {"model", "protocol", "environment", "suites": {name: {"metrics", "items", "skipped", "files",
      of scores how many items are longer than the model knows, and "overlap"}}} as written.

    Raises:
      KeyError, FileNotFoundError, ValueError: saying what does not fit, before anything is scored
        where that is possible.
    """
    names = list(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"give one or more different suites; received {', '.join(names) or 'none'}"
        )
    if Path(data).is_file() and len(names) > 1:
        raise ValueError(
            f"{data} is one file and {len(names)} suites are asked for; give the folder that holds "
            "a file or folder of each"
        )
    if by == "judge" and out is None:
        raise ValueError("a judge's answers are kept beside the result; give --output FILE.json")
    if by == "judge" and "reward_bench_2" in names:
        raise ValueError(
            "reward_bench_2 has no pairs for a judge: its judges rate each of four answers; leave "
            "it out, or give such ratings to evals.reward_bench.measure"
        )
    partial = limit is not None
    read = {name: suites.read(name, data, on_bad="skip", limit=limit) for name in names}
    for name, (items, _) in read.items():
        reward_bench.check(name, items, partial=partial)
    known = None if overlap is None else seen_in.Training(_training(overlap))
    own = {"likelihood": _likelihoods, "judge": _verdicts}
    ask = own.get(by, functools.partial(_rewards, by=by))
    respond, protocol = ask(model, batch, out, max_new)
    found, lines = {}, []
    result = {
        "model": str(model),
        "protocol": {
            **protocol,
            "by": f"{by}: {BY.get(by, _OUTPUT)}",
            "equal scores": "lost; shared in reward_bench_2; a tie in pandalm",
            "limit": limit,
            **({} if known is None else {"overlap": _facts(overlap)}),
            "intervals": "95 %, prompts resampled 2000 times",
        },
        "environment": provenance.environment(),
        "suites": found,
    }
    for name, (items, report) in read.items():
        items, values, extra = respond(name, items)
        measure = reward_bench.from_verdicts if by == "judge" else reward_bench.measure
        metrics = measure(name, items, values, partial=partial)
        lines += (_judged_lines if by == "judge" else _scored_lines)(name, items, values)
        if known is not None:
            extra["overlap"] = _overlap(name, items, values, known, measure)
        skipped = {**report["skipped"], **extra.pop("skipped")}
        files = [{"path": f, "sha256": sources.data_hash(f)} for f in report["files"]]
        found[name] = {
            "metrics": metrics,
            "items": len(items),
            "skipped": skipped,
            "files": files,
            **extra,
        }
        print(f"{name}: {len(items)} items", file=sys.stderr)
        # After each: a suite that fails does not take those before it along.
        if out is not None and hosts.is_writer():
            evaluate.write_json(out, result)
            sources.write_jsonl(Path(out).with_suffix(".items.jsonl"), lines)
    return result


def _training(path):
    """The records of a file of training data, whatever form it has."""
    kind, _ = inspection.kind_of(path)
    return inspection.read(path, kind)[0]


def _facts(path):
    how = (
        f"prompts equal after normalisation, or {seen_in.THRESHOLD:g} of their runs of "
        f"{seen_in.WORDS} words in prompts or answers of the file"
    )
    return {"path": str(path), "sha256": sources.data_hash(path), "how": how}


def _overlap(name, items, values, known, measure):
    """Items of a suite that stand in training data by subset, and the metrics without them."""
    found = known.seen(items)
    kept = [item for item, out in zip(items, found["any"]) if not out]
    each = [1] * len(items)
    if measure is reward_bench.from_verdicts:
        each = [len(reward_bench.comparisons(name, [item])) for item in items]
    left = np.repeat(~found["any"], each)
    rest = [value for value, stays in zip(values, left, strict=True) if stays]
    if measure is reward_bench.from_verdicts:
        rest = np.asarray(rest)
    return {
        "subsets": seen_in.report(found, [item["subset"] for item in items]),
        "without": measure(name, kept, rest, partial=True) if kept else None,
    }


def _scored_lines(name, items, values):
    for item, scores in zip(items, values):
        row = {key: item[key] for key in ("id", "subset", "right")}
        labels = {"labels": item["labels"]} if "labels" in item else {}
        yield {"suite": name, **row, **labels, "scores": [float(x) for x in scores]}


def _judged_lines(name, items, values):
    for pair, both in zip(reward_bench.comparisons(name, items), values):
        row = {key: pair[key] for key in ("id", "subset")}
        yield {"suite": name, **row, "verdicts": both.tolist()}


# How a model answers: (name, items) -> (items that it could answer, values, facts)


def _rewards(model, batch, out, max_new, *, by="score"):
    try:
        loaded = evaluate.load_model(model, batch=batch)
    except ValueError as error:
        if by in BY:
            raise
        raise ValueError(
            f"by={by!r} is none of {', '.join(BY)}, so it would be an output of a reward model: "
            f"{error}"
        ) from error
    head = loaded.plan.head
    several = head.outputs if head.kind != "scalar" else ()
    if by not in ("score", *several):
        has = f"those of {model}: {', '.join(several)}" if several else f"{model} has one alone"
        raise ValueError(
            f"by must be one of {', '.join(BY)}, or an output of a head of several ({has}); "
            f"received {by!r}"
        )
    if by != "score":
        head = dataclasses.replace(head, weights=tuple(float(x == by) for x in head.outputs))
    facts = {"head": head.kind, "outputs": list(head.outputs), "weights": list(head.weights)}

    def respond(name, items):
        kept, trees, extra = _encoded(loaded.tokenizer, items, loaded.template, name)
        values = [np.asarray(heads.reward(head, each)) for each in loaded.outputs(trees)]
        return kept, values, extra | _over(trees, loaded.max_len, loaded.plan.cfg)

    protocol = {k: v for k, v in loaded.protocol.items() if k != "model"}
    return respond, protocol | facts | _kind(model) | {"order": "each answer alone"}


def _likelihoods(model, batch, out, max_new):
    _no_workdir(model)
    where = rules.on_mesh()
    cfg, weights, _ = load.load(model, rules=where)
    if cfg.mask != "causal":
        raise ValueError(f"{model} is a denoiser; a likelihood a token needs a causal model")
    plan = trainable.Plan(cfg, head=None)
    params, frozen = trainable.split(plan, weights)
    predict = likelihood.make_predict(plan, rules=where, batch=batch)
    tokenizer = tokenize.load_tokenizer(model)
    template = tokenize.chosen_template(tokenizer, evaluate.recorded_template(model))

    def respond(name, items):
        kept, trees, extra = _encoded(tokenizer, items, template, name, supervised=True)
        found = predict(params, frozen, trees)
        return kept, [each[:, 0] / each[:, 1] for each in found], extra | _over(trees, None, cfg)

    protocol = {"template": template, "max_len": None, "compute": cfg.compute, "truncation": "none"}
    return respond, protocol | _kind(model) | {"order": "each answer alone"}


def _verdicts(model, batch, out, max_new):
    _no_workdir(model)
    tokenizer = tokenize.load_tokenizer(model)
    room = families.hf_config(load.read_config(model)).max_len - max_new
    fits = lambda row: len(tokenize.encode_conversation(tokenizer, row["prompt"]).tokens) <= room

    def respond(name, items):
        asked = lambda some: judges.rows(reward_bench.comparisons(name, some), seed=0, both=True)
        kept = [item for item in items if all(map(fits, asked([item])))]
        if not kept:
            raise ValueError(
                f"{name}: every question to the judge is longer than the {room} tokens that "
                f"{model} has room for beside an answer of {max_new}"
            )
        lost = len(items) - len(kept)
        skipped = {"longer than the judge's window": lost} if lost else {}
        items = kept
        pairs = reward_bench.comparisons(name, items)
        rows = judges.rows(pairs, seed=0, both=True)
        file, said = (Path(out).with_suffix(f".{name}.{x}.jsonl") for x in ("asked", "said"))
        file.parent.mkdir(parents=True, exist_ok=True)
        sources.write_jsonl(file, rows)
        generate.run(model, file, said, n=1, temperature=0.0, max_new=max_new, batch=batch)
        answers = [row["answers"][0]["text"] for _, row in sources.read_jsonl(said)]
        values = np.full((len(pairs), 2, 1), judged.UNREADABLE, np.int8)
        place = {pair["id"]: i for i, pair in enumerate(pairs)}
        for row, text in zip(rows, answers, strict=True):
            letter = verdict.parse(text, mode="released").verdict
            if letter is not None:
                order = "AB".index(row["label"])
                values[place[row["pair"]], order, 0] = letter != row["label"]
        return items, values, {"skipped": skipped}

    protocol = {
        "template": tokenize.chosen_template(tokenizer, "auto"),
        "compute": "float32",
        "truncation": "none",
        "asked": "data.judges.reasoned, stage text",
        "read": 'rewards.verdict.parse, mode "released"',
        "temperature": 0.0,
        "max_new": max_new,
        "order": "both",
    }
    return respond, protocol | _kind(model)


def _no_workdir(model):
    if checkpoint.is_workdir(model):
        raise ValueError(
            f"{model} is a run; `jaxreward export --model {model} --out FOLDER` makes a folder of "
            "its language model"
        )


def _kind(model):
    return {} if checkpoint.is_workdir(model) else {"model_sha256": load.content_hash(model)}


def _over(trees, max_len, cfg):
    """Facts about lengths: nothing is cut, so what is longer than the model knows is said."""
    sizes = [len(tree.prompt) + max(map(len, tree.answers)) for tree in trees]
    known = {"longer than in training": max_len, "longer than the model's window": cfg.max_len}
    over = {k: sum(n > most for n in sizes) for k, most in known.items() if most is not None}
    return {"longest": max(sizes), **over}


def _encoded(tokenizer, items, template, name, *, supervised=False):
    """(items, trees, facts) of those that have tokens to score."""
    kept, trees, skipped, first = [], [], collections.Counter(), ""
    for item in items:
        at = f"{name}: {item['subset']}/{item['id']}"
        try:
            tree = tokenize.encode_tree(
                tokenizer, item["prompt"], item["answers"], template=template, id=at
            )
        except ValueError as error:
            skipped["cannot be encoded"] += 1
            first = first or f"{at}: {error}"
            continue
        if supervised and not all(each.any() for each in tree.loss):
            skipped["an answer without tokens"] += 1
            first = first or f"{at}: an answer without tokens has no likelihood"
            continue
        kept.append(item)
        trees.append(tree)
    if not kept:
        raise ValueError(f"{name}: no item can be scored; the first: {first}")
    if skipped:
        print(f"{name}: left out {json.dumps(skipped)}; the first: {first}", file=sys.stderr)
    return kept, trees, {"skipped": skipped}
