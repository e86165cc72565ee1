"""HEAL's evaluation: hypothesis sets, proxies' scores of them, and how models order them.

    parts = [("sft.jsonl", "sft", 0.7), ("dpo.jsonl", "dpo", 1.0), ("gold.jsonl", "gold", None)]
    build(parts, "hyps.jsonl")
    proxies("hyps.jsonl", "hyps.jsonl", {"rm": "runs/rm", "length": lambda prompt, text: len(text)})
    run(["models/sft", "runs/dpo"], "hyps.jsonl", "heal.json", reference="models/sft")

The sets are made once and shared by all models, so that numbers of models may be compared. What is
measured is in `evals.hypothesis`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreward import presets
from jaxreward.core import provenance
from jaxreward.data import hypotheses, sources, tokenize
from jaxreward.evals import hypothesis, likelihood
from jaxreward.hub import load
from jaxreward.models import trainable
from jaxreward.parallel import hosts, rules
from jaxreward.recipes import evaluate
from jaxreward.train import checkpoint

BETWEEN = "between proxies"
ROOM = 4096  # tokens of a row that holds more than one answer
PyTree = Any


# Building


def build(
    parts: Sequence[tuple[str | Path, str, float | None]],
    out: str | Path,
    *,
    corruptions: Sequence[str] = (),
    spoil: str | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    most: int | None = None,
    keep_unfinished: bool = False,
) -> dict:
    """Merges answers of several sources into one file of hypothesis sets.

    Args:
      parts: (file, name of the source, temperature or None) of each source, as
        `hypotheses.read_source` takes them: several models, one model at several temperatures,
        reference answers.
      out: JSON Lines to write.
      corruptions: Spoilt copies to add to each set, of `hypotheses.CORRUPTIONS`.
      spoil: Source whose answers are spoilt; None any.
      seed: Of the spoiling.
      tokenizer: Model folder whose tokens `most` counts; None counts characters.
      most: Longest hypothesis that stays; None keeps all.
      keep_unfinished: As in `hypotheses.clean`.

    Returns:
      {"sets", "hypotheses", "sources": {name: hypotheses}, "dropped": {reason: count},
      "not spoilt": {reason: count}}.

    Raises:
      ValueError, FileNotFoundError: saying what does not fit; also when no set is left.
    """
    read = [hypotheses.read_source(path, source=name, temp=temp) for path, name, temp in parts]
    records, without = hypotheses.corrupt(
        hypotheses.merge(read), corruptions, seed=seed, source=spoil
    )
    length = len
    if tokenizer is not None:
        ids = tokenize.load_tokenizer(tokenizer).ids
        length = lambda text: len(ids(text))
    records, dropped = hypotheses.clean(
        records, most=most, length=length, keep_unfinished=keep_unfinished
    )
    if not records:
        raise ValueError(f"no set of at least 2 hypotheses is left; dropped: {dropped}")
    if hosts.is_writer():
        sources.write_jsonl(out, records)
    names = [hyp["source"] for record in records for hyp in record["hyps"]]
    return {
        "sets": len(records),
        "hypotheses": len(names),
        "sources": {name: names.count(name) for name in sorted(set(names))},
        "dropped": dropped,
        "not spoilt": without,
    }


def proxies(
    data: str | Path,
    out: str | Path,
    models: Mapping[str, str | Path | Callable[[Any, str], float]],
    *,
    batch: int = 8,
) -> None:
    """Adds what proxies think of every hypothesis to a file of sets, as they score it.

    Args:
      data: File of sets. out: File to write; may be the same.
      models: {name: reward model} as `evaluate.scorer_of` takes it, or a function (prompt, text)
        -> float, such as a length, which tells what agreement is worth. A name that is there
        already is scored anew.
      batch: Rows that run at a time.

    Raises:
      ValueError, FileNotFoundError: saying what does not fit.
    """
    records = hypotheses.read(data)
    # A model scores groups of one size at a time.
    sizes: dict[int, list[dict]] = {}
    for record in records:
        sizes.setdefault(len(record["hyps"]), []).append(record)
    for name, model in models.items():
        scores = _each(model) if callable(model) else evaluate.scorer_of(model, batch=batch)
        for group in sizes.values():
            texts = [[hyp["text"] for hyp in record["hyps"]] for record in group]
            found = scores([record["prompt"] for record in group], texts)
            for record, row in zip(group, found, strict=True):
                record["scores"][name] = [float(x) if np.isfinite(x) else None for x in row]
        if hosts.is_writer():  # after each, so that one that fails loses no scores
            sources.write_jsonl(out, records)


def _each(score):
    return lambda prompts, groups: np.array(
        [[score(prompt, text) for text in group] for prompt, group in zip(prompts, groups)], float
    )


# Models


class Language(NamedTuple):
    """A language model that says how likely texts are.

    Attributes:
      plan, frozen: As in training. steps: {step: function that gives its parameters}; the only
        step of a folder is None.
      tokenizer: Its own. template: "chat" or "plain".
      predict: (params, frozen, trees) -> log-probabilities and tokens, as `likelihood` gives them.
    """

    plan: trainable.Plan
    frozen: PyTree
    steps: dict[int | None, Callable[[], PyTree]]
    tokenizer: tokenize.Tokenizer
    template: str
    predict: Callable[..., list[np.ndarray]]


def language_model(
    model: str | Path, *, batch: int = 8, every_checkpoint: bool = False
) -> Language:
    """Loads a causal language model from a workdir or a Hugging Face folder.

    Args:
      model: The folder.
      batch: Rows that run at a time.
      every_checkpoint: All checkpoints that a workdir keeps, in place of the newest.

    Raises:
      ValueError, FileNotFoundError: saying what is missing or does not fit.
    """
    model, where = Path(model), rules.on_mesh()
    if checkpoint.is_workdir(model):
        plan, params, frozen, folder, template, _ = evaluate.from_workdir(model, where)
        if plan.head is not None:
            raise ValueError(_not_a_language_model(model))
        steps = _checkpoints(model, params, every_checkpoint)
    else:
        folder = model
        cfg, weights, score = load.load(folder, rules=where)
        if score is not None:
            raise ValueError(_not_a_language_model(model))
        plan = trainable.Plan(cfg, "all", head=None)
        params, frozen = trainable.split(plan, weights)
        template = (load.read_config(folder).get("jaxreward") or {}).get("template", "auto")
        steps = {None: lambda: params}
    if plan.cfg.mask != "causal":
        raise ValueError(
            f"{model} is a denoiser, whose log-probabilities are only bounded; hypotheses are "
            "ordered by causal models"
        )
    tokenizer = tokenize.load_tokenizer(folder)
    predict = likelihood.make_predict(plan, rules=where, batch=batch)
    template = tokenize.chosen_template(tokenizer, template)
    return Language(plan, frozen, steps, tokenizer, template, predict)


def _not_a_language_model(model):
    return (
        f"{model} is a reward model; its scores are those of a proxy, and what is measured here "
        "are language models"
    )


def _checkpoints(workdir, newest, every):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        # Of the newest that is whole, whose parameters these are.
        last, folder = checkpoints.meta()["step"], checkpoints.folder
    steps = {last: lambda: newest}
    if not every:
        return steps
    config = presets.read(workdir / "config.json")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), newest
    )

    def read(step):
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return checkpoints.params(like, step=step, ema=config.train.get("ema", 0) > 0)

    held = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return {step: functools.partial(read, step) for step in held if step != last} | steps


def encode(language: Language, records: Sequence[dict], *, template: str) -> list[tokenize.Tree]:
    """One tree a set, with the model's own tokens: prompts are shared, and answers end with their
    end token, which counts.

    Raises:
      ValueError: naming a set that is longer than the model reads.
    """
    trees = []
    for record in records:
        texts = [hyp["text"] for hyp in record["hyps"]]
        tree = tokenize.encode_tree(
            language.tokenizer, record["prompt"], texts, template=template, id=record["id"]
        )
        longest = len(tree.prompt) + max(map(len, tree.answers))
        if longest > language.plan.cfg.max_len:
            raise ValueError(
                f"set {record['id']!r} holds a hypothesis of {longest} tokens with its prompt; "
                f"{language.tokenizer.folder} reads {language.plan.cfg.max_len}. Build the sets "
                "with a smaller `most`"
            )
        trees.append(tree)
    return trees


def _likelihoods(language, params, trees):
    """(log-probability, tokens) of every hypothesis, lists of float64[n]."""
    parts = [cut(tree) for tree in trees]
    found = iter(language.predict(params, language.frozen, [p for part in parts for p in part]))
    whole = [np.concatenate([next(found) for _ in part]).astype(np.float64) for part in parts]
    return [x[:, 0] for x in whole], [x[:, 1] for x in whole]


def cut(tree: tokenize.Tree, *, room: int = ROOM) -> list[tokenize.Tree]:
    """A tree as trees of at most `room` tokens, each with the whole prompt and at least one answer:
    sets of many long answers would make rows that no memory holds."""
    members: list[list[int]] = []
    left = 0
    for i, answer in enumerate(tree.answers):
        if not members or len(answer) > left:
            members.append([])
            left = room - len(tree.prompt)
        members[-1].append(i)
        left -= len(answer)
    return [
        dataclasses.replace(
            tree, answers=[tree.answers[i] for i in some], loss=[tree.loss[i] for i in some]
        )
        for some in members
    ]


# Measuring


def run(
    models: Sequence[str | Path],
    data: str | Path,
    out: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    kinds: Sequence[str] = hypothesis.KINDS,
    beta: float = 0.1,
    delta: float = 0.0,
    bins: int = 3,
    annotator: str = "",
    every_checkpoint: bool = False,
    samples: int = 1000,
    batch: int = 8,
) -> dict:
    """How language models order hypotheses, against every proxy and by every kind of score.

    Args:
      models: Workdirs (newest checkpoint) or Hugging Face folders of causal language models; each
        sees the sets in its own chat template.
      data: File of sets with scores of at least one proxy.
      out: JSON to write, or None. Beside it, with the ending .hypotheses.jsonl, go the
        log-probabilities, one line a model and set.
      reference: The model that training began from. It is measured too, and adds the implicit
        kinds, what training changed (`hypothesis.changes`), and gains over it.
      kinds: Of `hypothesis.KINDS`; without a reference the implicit ones are left out.
      beta: Of the implicit kinds. delta, bins: As in `hypothesis.ranking_accuracy` and
        `hypothesis.rank_bin_delta`.
      annotator: Proxy that made the pairs of training, if one did: adds how much better each model
        agrees with it than with each of the others.
      every_checkpoint: Measure every checkpoint that a workdir keeps, as <model>@<step>.
      samples: Resamples of an interval. batch: Rows that run at a time.

    Returns:
      {"name": "heal", "protocol", "environment", "metrics"} as written. Metrics are
      {model: {proxy: {kind: {measure: value or {value, low, high}}, "change": {...}},
      "<annotator> - <other>": {kind: {...}}}}, and "between proxies" has what proxies say of one
      another: no model can be asked to agree more than they do.

    Raises:
      ValueError, KeyError, FileNotFoundError: saying what does not fit.
    """
    records = hypotheses.read(data)
    names = hypotheses.proxies(records)
    if not names:
        raise ValueError(f"{data} has no scores of any proxy; add them with `proxies` first")
    if annotator and annotator not in names:
        raise KeyError(f"annotator {annotator!r} is no proxy of {data}; it has {', '.join(names)}")
    unknown = [kind for kind in kinds if kind not in hypothesis.KINDS]
    if unknown:
        raise ValueError(f"unknown kind of score {unknown[0]!r}; use {', '.join(hypothesis.KINDS)}")
    if reference is None:
        kinds = [kind for kind in kinds if not kind.startswith("implicit")]
        if not kinds:
            raise ValueError("implicit kinds of score need a reference; none was given")
    found, protocols = _all_likelihoods(models, records, reference, batch, every_checkpoint)
    how = dict(bins=bins, delta=delta, samples=samples)
    metrics = _metrics(found, records, kinds, beta, annotator, **how)
    result = {
        "name": "heal",
        "protocol": {
            "data": str(data),
            "sha256": sources.data_hash(data),
            "sets": len(records),
            "hypotheses": sum(len(record["hyps"]) for record in records),
            "models": protocols,
            "reference": None if reference is None else str(reference),
            "beta": beta,
            "delta": delta,
            "bins": bins,
            "annotator": annotator,
            "tokens": "of the answer, its end token included",
            "intervals": f"95 %, instructions resampled {samples} times" if samples else "none",
        },
        "environment": provenance.environment(),
        "metrics": metrics,
    }
    if out is not None and hosts.is_writer():
        evaluate.write_json(out, result)
        sources.write_jsonl(Path(out).with_suffix(".hypotheses.jsonl"), _rows(found, records))
    return result


def _all_likelihoods(models, records, reference, batch, every_checkpoint):
    """({name: {"step", "lp", "length", "ref"}}, {name: facts}); ref, the log-probabilities of the
    reference, is None without one, and for the reference itself."""
    paths = [Path(model) for model in models]
    reference = None if reference is None else Path(reference)
    if reference is not None and reference not in paths:
        paths.insert(0, reference)
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(
            f"models must be different, and at least one; received {list(map(str, models))}"
        )
    base = None if reference is None else language_model(reference, batch=batch)

    @functools.cache
    def of_reference(template):
        own = encode(base, records, template=template)
        (params,) = base.steps.values()
        return own, *_likelihoods(base, params(), own)

    found, protocols = {}, {}
    for path in paths:
        unique = sum(other.name == path.name for other in paths) == 1
        name = path.name if unique else str(path)
        own = base if path == reference else None
        language = own or language_model(path, batch=batch, every_checkpoint=every_checkpoint)
        protocols[name] = {
            "model": str(path),
            "template": language.template,
            "compute": language.plan.cfg.compute,
        }
        if own:
            _, lp, length = of_reference(own.template)
            found[name] = {"step": None, "lp": lp, "length": length, "ref": None}
            continue
        trees, ref = encode(language, records, template=language.template), None
        if base is not None:
            theirs, ref, _ = of_reference(language.template)
            _agree(trees, theirs, path, reference)
        for step, params in language.steps.items():
            lp, length = _likelihoods(language, params(), trees)
            label = f"{name}@{step}" if every_checkpoint and step is not None else name
            found[label] = {"step": step, "lp": lp, "length": length, "ref": ref}
    return found, protocols


def _agree(trees, theirs, path, reference):
    pieces = lambda tree: [tree.prompt, *tree.answers]
    for tree, other in zip(trees, theirs, strict=True):
        if not all(map(np.array_equal, pieces(tree), pieces(other))):
            raise ValueError(
                f"{path} and the reference {reference} make other tokens of set {tree.id!r}; a "
                "reference is the model that training began from, with the same tokenizer"
            )


def _metrics(found, records, kinds, beta, annotator, *, bins, delta, samples):
    arrays = lambda rows: None if rows is None else hypotheses.padded([list(x) for x in rows])[0]
    held = {model: [arrays(x[k]) for k in ("lp", "length", "ref")] for model, x in found.items()}
    # One set for all models: a hypothesis that one of them gives no token is left out for all.
    live = np.all([length > 0 for _, length, _ in held.values()], axis=0)
    rated = {}
    for name in hypotheses.proxies(records):
        r, valid = hypotheses.proxy_scores(records, name)
        rated[name] = r, valid & live
    how = dict(delta=delta, samples=samples)
    domains = [record["domain"] for record in records]
    metrics: dict[str, Any] = {}
    for model, (lp, length, ref) in held.items():
        known = [kind for kind in kinds if ref is not None or not kind.startswith("implicit")]
        scored = {kind: hypothesis.scores(lp, ref, length, kind, beta) for kind in known}
        metrics[model] = {}
        for name, (r, valid) in rated.items():
            made = metrics[model][name] = {}
            for kind, s in scored.items():
                got = hypothesis.measures(s, r, valid, length=length, domains=domains, **how)
                made[kind] = dict(map(_entry, got))
                if ref is not None and not kind.startswith("implicit"):
                    before = hypothesis.scores(ref, None, length, kind)
                    made[kind] |= _less((s, r, valid), (before, r, valid), "_gain", **how)
            if ref is not None:
                got = hypothesis.changes(lp, ref, length, r, valid, bins=bins, **how)
                made["change"] = dict(map(_entry, got))
        for other in rated if annotator else ():
            if other != annotator:
                metrics[model][f"{annotator} - {other}"] = {
                    kind: _less((s, *rated[annotator]), (s, *rated[other]), **how)
                    for kind, s in scored.items()
                }
    names = list(rated)
    between = {
        f"{a}, {b}": dict(
            map(_entry, hypothesis.measures(*(rated[a][0], rated[b][0], valid), **how))
        )
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for valid in [rated[a][1] & rated[b][1]]
    }
    return metrics | ({BETWEEN: between} if between else {})


def _entry(named):
    name, value = named
    if isinstance(value, tuple):
        value = dict(zip(("value", "low", "high"), value))
    return name, value


def _less(a, b, suffix="", *, delta, samples):
    """Paired differences of (s, r, valid) a less b, in the two measures of the paper."""
    out = {}
    for name, measure in (
        ("ranking_accuracy", functools.partial(hypothesis.ranking_accuracy, delta=delta)),
        ("strength", hypothesis.pearson),
    ):
        first, second = measure(*a), measure(*b)
        both = first[1] & second[1]
        if both.any():
            value = float((first[0] - second[0])[both].mean())
            if samples:
                value = hypothesis.paired_bootstrap(first, second, samples=samples)
            out |= [_entry((name + suffix, value))]
    return out


def _rows(found, records):
    for model, x in found.items():
        for i, record in enumerate(records):
            row = {
                "model": model,
                "step": x["step"],
                "id": record["id"],
                "logp": [round(float(v), 6) for v in x["lp"][i]],
                "tokens": [int(v) for v in x["length"][i]],
            }
            if x["ref"] is not None:
                row["reference"] = [round(float(v), 6) for v in x["ref"][i]]
            yield row
