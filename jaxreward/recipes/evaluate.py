"""What is done with a trained model: score, evaluate, export. No training."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreward import presets
from jaxreward.core import provenance
from jaxreward.data import pairs, points, sources, tokenize
from jaxreward.evals import pairwise, pointwise, scorer
from jaxreward.hub import export as hub_export
from jaxreward.hub import load
from jaxreward.models import heads, trainable
from jaxreward.parallel import hosts, rules
from jaxreward.parallel import specs as sp
from jaxreward.recipes import denoisers
from jaxreward.train import checkpoint, session

PyTree = Any
_ABOUT = {
    "scalar": "A scalar reward model.",
    "scores": "A reward model that scores several aspects of an answer.",
    "classes": "A reward model that tells the class of an answer.",
}


@dataclasses.dataclass
class Model:
    """A reward model ready to score.

    Attributes:
      plan, params, frozen: As in training; for a Hugging Face folder everything is in `params`.
      tokenizer: Its tokenizer. folder: Where tokenizer and untrained weights come from.
      template: "chat" or "plain". max_len: Longest input it was trained on, or None. Longer
        ones are scored whole, as transformers would.
      protocol: Facts that belong beside any number it gives.
      predict: trees -> rewards, one float32[answers] per tree.
      outputs: trees -> all outputs of the head (`plan.head.outputs`), float32[answers, C] per tree.
    """

    plan: trainable.Plan
    params: PyTree
    frozen: PyTree
    tokenizer: tokenize.Tokenizer
    folder: Path
    template: str
    max_len: int | None
    protocol: dict
    predict: Any
    outputs: Any


def _from_folder(folder: Path, where):
    cfg, weights, score = load.load(folder, rules=where)
    if score is None:
        raise ValueError(
            f"{folder} has no score head (score.weight): it is a language model, not a reward "
            "model. Train one with `jaxreward train`, or give a *ForSequenceClassification folder"
        )
    plan = trainable.Plan(cfg, "all", head=load.read_head(folder, score))
    params, frozen = trainable.init(plan, weights, jax.random.key(0), score=score, rules=where)
    made = load.read_config(folder).get("jaxreward") or {}
    return plan, params, frozen, folder, recorded_template(folder), made.get("max_len")


def recorded_template(folder: str | Path) -> str:
    """The template that a folder of ours says its model was trained with, else "auto"."""
    return (load.read_config(folder).get("jaxreward") or {}).get("template", "auto")


def from_workdir(workdir: Path, where):
    """(plan, params, frozen, folder, template, max_len) of a run's newest checkpoint: a reward
    model's or a language model's."""
    config = presets.read(workdir / "config.json")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        meta = checkpoints.meta()
        folder = Path(meta["init"])
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{workdir} was trained from {folder}, which does not exist any more; its frozen "
                "weights and tokenizer are needed. Export a run to make it stand alone"
            )
        found = load.content_hash(folder)
        if found != meta["init_sha256"]:
            raise ValueError(
                f"{folder} has changed since {workdir} was trained from it (sha256 {found[:12]}, "
                f"expected {meta['init_sha256'][:12]}); put the old folder back"
            )
        cfg, weights, _ = load.load(folder, rules=where)
        cfg = dataclasses.replace(cfg, compute=config.train.compute)
        if "from_causal" in config.models.policy:
            cfg = denoisers.of_model(cfg, config.models.policy, tokenize.load_tokenizer(folder))
        plan = trainable.make_plan(cfg, config.models.policy)
        _, frozen = trainable.split(plan, weights)
        del weights
        described = trainable.param_specs(plan)
        like = sp.abstract(described, rules=where)
        if where is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like
            )
        # Absent in runs of older versions.
        params = checkpoints.params(like, ema=config.train.get("ema", 0) > 0)
    return plan, params, frozen, folder, meta["template"], meta["max_len"]


def load_model(
    model: str | Path, *, template: str = "auto", batch: int = 8, compute: str | None = None
) -> Model:
    """Loads a reward model from a workdir (newest checkpoint) or a Hugging Face folder.

    A run with a moving average of its parameters (`train.ema`) is scored with the average.

    Args:
      model: The folder.
      template: "chat" or "plain" overrides what the model recorded; "auto" takes it.
      batch: Rows that run at a time.
      compute: Dtype of matrix products; None takes that of training, float32 for a folder.

    Raises:
      FileNotFoundError, ValueError: saying what is missing or does not fit.
    """
    model = Path(model)
    where = rules.on_mesh()
    if checkpoint.is_workdir(model):
        got = from_workdir(model, where)
    else:
        got = _from_folder(model, where)
    plan, params, frozen, folder, recorded, max_len = got
    if plan.head is None:
        raise ValueError(
            f"{model} is a run of a language model, which gives no scores; "
            f"`jaxreward export --model {model} --out FOLDER` makes a folder that generates"
        )
    if compute is not None:
        plan = dataclasses.replace(plan, cfg=dataclasses.replace(plan.cfg, compute=compute))
    tokenizer = tokenize.load_tokenizer(folder)
    if template == "auto":
        template = recorded
    template = tokenize.chosen_template(tokenizer, template)
    outputs = functools.partial(
        scorer.make_predict_outputs(plan, rules=where, batch=batch), params, frozen
    )
    return Model(
        plan=plan,
        params=params,
        frozen=frozen,
        tokenizer=tokenizer,
        folder=folder,
        template=template,
        max_len=max_len,
        protocol={
            "model": str(model),
            "template": template,
            "max_len": max_len,
            "compute": plan.cfg.compute,
            "truncation": "none",
        },
        predict=lambda trees: [np.asarray(heads.reward(plan.head, x)) for x in outputs(trees)],
        outputs=outputs,
    )


def scorer_of(model: str | Path, *, batch: int = 8):
    """A function (P prompts, P lists of G answers) -> rewards f32[P, G] of a model.

    The answers to a prompt share its computation. An answer that cannot be encoded (an empty one,
    where no template adds a token) gets NaN.

    Args:
      model: The folder of a reward model, or the workdir of its run, as `load_model` takes it.
      batch: Rows that run at a time.
    """
    loaded = load_model(model, batch=batch)
    encode = functools.partial(
        tokenize.encode_tree, loaded.tokenizer, template=loaded.template, id=str(model)
    )

    def encodable(prompt, answer):
        try:
            encode(prompt, [answer])
        except ValueError:
            return False
        return True

    def scores(prompts, groups):
        found = np.full((len(groups), len(groups[0])), np.nan, np.float32)
        trees, kept = [], []
        for p, (prompt, answers) in enumerate(zip(prompts, groups, strict=True)):
            fit = np.array([encodable(prompt, answer) for answer in answers])
            if fit.any():
                trees.append(encode(prompt, [a for a, ok in zip(answers, fit) if ok]))
                kept.append((p, fit))
        for (p, fit), values in zip(kept, loaded.predict(trees), strict=True):
            found[p, fit] = values
        return found

    return scores


def _warn_long(loaded, trees) -> int:
    """Says how many inputs are longer than those the model was trained on."""
    if loaded.max_len is None:
        return 0
    longest = [len(tree.prompt) + max(map(len, tree.answers)) for tree in trees]
    over = sum(length > loaded.max_len for length in longest)
    if over:
        print(
            f"{over} of {len(trees)} prompts with their answers take more than the "
            f"{loaded.max_len} tokens of training; they are scored whole",
            file=sys.stderr,
        )
    return over


def score(
    model: str | Path,
    input: str | Path,
    output: str | Path,
    *,
    template: str = "auto",
    batch: int = 8,
    corpus: str = "",
) -> None:
    """Adds `score`, or `chosen_score` and `rejected_score`, to every line of a JSONL file.

    Where the head has several outputs, `score` is the reward made of them (`heads.reward`), and
    `outputs` (`chosen_outputs`, `rejected_outputs`) holds them by name. Lines keep their order and
    their other fields. "-" is standard input or output; nothing but records goes to standard
    output.

    Raises:
      ValueError: naming a line that cannot be scored, before anything is written.
    """
    records = sources.read_answers(input, corpus=session.corpus({"corpus": corpus}))
    loaded = load_model(model, template=template, batch=batch)
    trees = []
    for record in records:
        try:
            trees.append(
                tokenize.encode_tree(
                    loaded.tokenizer,
                    record["prompt"],
                    record["answers"],
                    template=loaded.template,
                    id=record["id"],
                )
            )
        except ValueError as error:
            raise ValueError(f"{input}: record {record['id']!r}: {error}") from error
    _warn_long(loaded, trees)
    out = []
    head = loaded.plan.head
    for record, values in zip(records, loaded.outputs(trees)):
        row = dict(record["row"])
        front = [f"{name}_" if len(record["names"]) == 2 else "" for name in record["names"]]
        for name, reward, each in zip(front, np.asarray(heads.reward(head, values)), values):
            row[f"{name}score"] = float(reward)
            if len(head.outputs) > 1:
                row[f"{name}outputs"] = dict(zip(head.outputs, map(float, each)))
        out.append(row)
    if hosts.is_writer():
        sources.write_jsonl(output, out)


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    output: str | Path | None = None,
    name: str = "heldout",
    batch: int = 8,
    form: str = "pairs",
    corpus: str = "",
) -> dict:
    """Accuracy on a file of pairs, whole and by subset, with 95 % intervals over prompts; or how
    well the outputs fit answers with labels or scores of their own.

    Args:
      model: A workdir or a Hugging Face folder.
      data: File of pairs or of labelled answers.
      output: Where the result goes; default `<workdir>/evals/<name>.json` for a workdir, and
        nowhere for a Hugging Face folder.
      name: Of the evaluation.
      batch: Rows that run at a time.
      form: "pairs" or "points".
      corpus: Function of `data.corpora` that makes our rows of others, with keywords behind it as
        in "pku_saferlhf.pairs,which=safer", or "".

    Returns:
      {"name", "protocol", "environment", "metrics"} as written.

    Raises:
      ValueError, KeyError, FileNotFoundError: saying what does not fit.
    """
    if form not in ("pairs", "points"):
        raise ValueError(f"form must be 'pairs' or 'points'; received {form!r}")
    convert = session.corpus({"corpus": corpus})
    read = sources.read_pairs if form == "pairs" else points.read
    records, report = read(data, corpus=convert)
    loaded = load_model(model, batch=batch)
    head, template = loaded.plan.head, loaded.template
    if form == "pairs":
        trees, _ = pairs.encode_pairs(loaded.tokenizer, records, template=template)
        metrics = _pair_metrics(loaded, trees)
    else:
        trees, _ = points.encode(
            loaded.tokenizer, records, kind=head.kind, outputs=head.outputs, template=template
        )
        measure = pointwise.classes if head.kind == "classes" else pointwise.scores
        metrics = dict(measure(loaded.outputs, trees, outputs=head.outputs))
    result = {
        "name": name,
        "protocol": {
            **loaded.protocol,
            "data": str(data),
            **({"corpus": corpus} if corpus else {}),
            "sha256": sources.data_hash(data),
            "read": report["read"],
            "longer than in training": _warn_long(loaded, trees),
            **({"intervals": "95 %, prompts resampled 2000 times"} if form == "pairs" else {}),
        },
        "environment": provenance.environment(),
        "metrics": metrics,
    }
    if output is None and checkpoint.is_workdir(model):
        output = Path(model) / "evals" / f"{name}.json"
    if output is not None and hosts.is_writer():
        write_json(output, result)
    return result


def _pair_metrics(loaded: Model, trees) -> dict:
    found = pairwise.outcomes(trees, loaded.predict(trees))
    metrics = {}
    for metric, value in pairwise.measures(found, samples=2000):
        if isinstance(value, tuple):
            value = dict(zip(("value", "low", "high"), value))
        metrics[metric] = value
    return metrics


def write_json(path: str | Path, value: dict) -> None:
    """Writes JSON that appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def export(workdir: str | Path, out: str | Path, *, dtype: str = "float32") -> Path:
    """Writes a run's newest checkpoint as a Hugging Face folder that stands alone.

    Adapters are merged and frozen parts put back; tokenizer and chat template are kept.

    Args:
      workdir: A run: of a reward model, or of a language model.
      out: New folder.
      dtype: float32, bfloat16 or float16.

    Raises:
      ValueError, FileNotFoundError: saying what is missing or in the way.
    """
    if not checkpoint.is_workdir(workdir):
        raise ValueError(
            f"{workdir} is not a workdir (no config.json with a recipe); export takes the folder "
            "that was given to `jaxreward train --workdir`"
        )
    stages = sorted(presets.read(Path(workdir) / "config.json").get("stages", ()))
    if stages:
        raise ValueError(
            f"{workdir} is a run of several stages; export one of them: "
            f"{', '.join(str(Path(workdir) / name) for name in stages)}"
        )
    plan, params, frozen, folder, template, max_len = from_workdir(Path(workdir), rules.on_mesh())
    whole, head = trainable.join(plan, params, frozen)
    tokenizer = tokenize.load_tokenizer(folder)
    return hub_export.write(
        out,
        plan.cfg,
        whole,
        source=folder,
        score=head,
        head=plan.head or heads.SCALAR,
        template=tokenize.chosen_template(tokenizer, template),
        max_len=max_len,
        adds_bos=tokenizer.bos_id if tokenizer.adds_bos else None,
        dtype=dtype,
        about=(
            "A fine-tuned language model."
            if head is None and plan.cfg.mask == "causal"
            else "A masked diffusion language model."
            if head is None
            else _ABOUT[plan.head.kind]
        ),
        origin=f"Initial weights: {folder.name}. What was trained: {plan.train}.",
        facts=_provenance(workdir),
    )


def _provenance(workdir) -> dict:
    """Where exported weights come from. What is exported is often published, so files go by their
    name and content hash, and command lines stay here."""
    with checkpoint.Checkpoints(workdir) as checkpoints:
        step, meta = checkpoints.latest(), checkpoints.meta()
    public = lambda made: {k: v for k, v in made.items() if k != "command"}
    name = lambda data: {k: Path(v).name if k == "path" else v for k, v in data.items()}
    return {
        "exported": public(provenance.environment()),
        "trained": {
            "step": step,
            "init_sha256": meta["init_sha256"],
            # Absent in runs of older versions.
            **{k: name(meta[k]) for k in ("data", "eval_data") if k in meta},
            "environment": public(meta.get("environment", {})),
        },
    }
