"""Language models from completions: supervised fine-tuning.

source -> chat template -> tokens -> packed rows -> one forward -> states before supervised tokens
-> cross-entropy in slices of the vocabulary -> one division by the supervised tokens -> step.

What this loop does that a textbook one does not: only the states that predict a supervised token
meet the language head, and never all of the vocabulary at once; a batch's mean is over its tokens,
whatever row, microbatch or device they are in.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import resolve
from jaxreward.core.types import Rows
from jaxreward.data import conversations, pipeline, sources, tokenize
from jaxreward.evals import likelihood, scorer
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.objectives import supervised
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.train import optim, session


def make_loss(
    plan: trainable.Plan, losses, where: rules.Rules | None = None, *, size: int | None = None
):
    """(loss, weights, coef) for `make_train_step`, from `config.losses`.

    Every entry has `fn` (a function of states, head matrix and `supervised.Scored` that gives one
    number a supervised token, resolved in `objectives`), `coef`, and further keywords of the
    function. The model's soft cap on logits is passed as `softcap`.

    Args:
      plan, losses, where: The model, the config's section, mesh and layouts.
      size: Most supervised tokens of a row; None takes the row's length.
    """
    fns, coef = {}, {}
    for name, entry in losses.items():
        kw = {k: v for k, v in dict(entry).items() if k not in ("fn", "coef")}
        fns[name] = resolve("objectives", entry["fn"], softcap=plan.cfg.logit_softcap, **kw)
        coef[name] = float(entry["coef"])

    def scored(rows: Rows):
        return supervised.scored(
            rows.tokens,
            rows.loss_mask,
            rows.segments,
            rows.trunk,
            size=size,
            predict_offset=plan.cfg.predict_offset,
        )

    def loss(params, frozen, rows: Rows, keys, extra):
        del keys
        at = scored(rows)
        states = trainable.states(plan, params, frozen, rows, rules=where)
        head = trainable.head_matrix(plan, params, frozen, rules=where)
        totals, metrics = {}, {}
        for name, fn in fns.items():
            each = fn(states, head, at)
            totals[name] = jnp.sum(jnp.where(at.mask, each, 0.0))
            if fn.func is supervised.cross_entropy:
                metrics["perplexity"] = m.Perplexity.of(each, at.mask)
        return totals, metrics, extra

    def weights(rows: Rows):
        return dict.fromkeys(fns, jnp.sum(scored(rows).mask, dtype=jnp.float32))

    return loss, weights, coef


def _records(config, part: str) -> tuple[list[dict], dict]:
    if config.data.path == "synthetic":
        count = 64 if part == "path" else 16
        pairs = testing.synthetic_pairs(count, seed=config.seed + (part != "path"))
        made = [{**{k: p[k] for k in ("id", "prompt")}, "completion": p["chosen"]} for p in pairs]
        return made, {"path": "synthetic"}
    if config.data.source != "jsonl":
        raise ValueError(f"data.source={config.data.source!r} is unknown; use jsonl")
    path = config.data[part]
    if not path:
        raise ValueError(f"data.{part} is empty; pass --config.data.{part}=FILE.jsonl")
    records, report = conversations.read(path, on_bad=config.data.on_bad)
    return records, {"path": str(path), "sha256": sources.data_hash(path), **report}


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts). Held out by prompt when there is no `eval_path`."""
    records, facts = _records(config, "path")
    if config.data.path == "synthetic" or config.data.eval_path:
        heldout, eval_facts = _records(config, "eval_path")
    else:
        records, heldout = conversations.by_prompt(records, config.data.eval_fraction, config.seed)
        eval_facts = {"held out of path": len(heldout)}
    if not records:
        raise ValueError("no conversation is left; lower data.eval_fraction or give more data")
    kw = dict(
        template=config.data.template,
        max_len=config.data.max_len,
        on_long="error" if config.data.on_bad == "error" else "skip",
    )
    train, counts = conversations.encode(tokenizer, records, **kw)
    held, held_counts = conversations.encode(tokenizer, heldout, **kw) if heldout else ([], {})
    if not counts["tokens"]:
        raise ValueError(
            f"data.path={config.data.path!r} holds no token to learn; see data.template"
        )
    return train, held, {"data": {**facts, **counts}, "eval_data": {**eval_facts, **held_counts}}


def _most_supervised(trees, packed) -> int:
    """The most supervised tokens of a row, rounded up: few sizes, hence few programs."""
    count = lambda i: sum(int(loss.sum()) for loss in trees[i].loss)
    most = max(sum(count(i) for i in row) for row in packed)
    return -(-most // 64) * 64


def build(config, workdir: str | Path) -> session.Built:
    """Reads model and data and makes state, step and batches. Trains nothing.

    Raises:
      ValueError, KeyError, FileNotFoundError: what in the config or the data does not fit.
    """
    workdir = Path(workdir)
    model = config.models.policy
    with hosts.writer_first("initial model"):
        folder = export.init_folder(model.init, workdir)
    tokenizer = tokenize.load_tokenizer(folder)
    where = rules.on_mesh(dict(config.mesh))
    train, held, facts = load_data(config, tokenizer)
    cfg, weights, _ = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    plan = trainable.make_plan(cfg, model, head="lm")
    source_hash = load.content_hash(folder)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(plan, weights, jax.random.fold_in(key, 1), rules=where)
    del weights
    counts = {"trained": tr.count(params), "frozen": tr.count(frozen)}
    length = config.data.row_len or scorer.row_len(train)
    order = np.random.default_rng(config.seed).permutation(len(train))
    packed = pipeline.pack(train, row_len=length, order=order)
    batches = pipeline.batches(
        train,
        row_len=length,
        batch=config.data.batch,
        seed=config.seed,
        take=hosts.rows(where, config.data.batch),
        plan=packed,
    )
    epoch = pipeline.steps_per_epoch(len(packed), batch=config.data.batch)
    steps = config.train.steps or epoch * config.train.epochs
    size = min(length, _most_supervised(train, packed))
    losses = make_loss(plan, config.losses, where, size=size)
    described = trainable.param_specs(plan)
    start, train_step = session.prepare(config, params, described, losses, steps, key, where)
    predict = likelihood.make_predict(plan, rules=where, batch=config.data.eval_batch)
    evals = {}
    for name, entry in config.evals.items():
        kw = {k: v for k, v in dict(entry).items() if k != "fn"}
        evals[name] = resolve("evals", entry["fn"], **kw)

    def evaluate(at):
        if not held:
            return {}
        now = at.extra["ema"] if config.train.ema else at.params
        measured = functools.partial(predict, now, frozen)
        return {f"{name}/{k}": v for name, fn in evals.items() for k, v in fn(measured, held)}

    slots = pipeline.efficiency(train, packed, row_len=length)
    facts |= {
        "rows": {"count": len(packed), "length": length, "efficiency": round(slots, 4)},
        "steps": {"per epoch": epoch, "total": steps},
        "parameters": counts,
        "mesh": mesh.describe(where.mesh) if where else "one device",
    }
    meta = {
        "init": str(folder.resolve()),
        "init_sha256": source_hash,
        "template": tokenize.chosen_template(tokenizer, config.data.template),
        "max_len": config.data.max_len,
    }
    return session.Built(
        plan=plan,
        rules=where,
        tokenizer=tokenizer,
        folder=folder,
        state=start,
        frozen=frozen,
        step=train_step,
        batches=batches,
        to_device=functools.partial(scorer.pair_rows, rules=where),
        train=train,
        heldout=held,
        steps=steps,
        evaluate=evaluate,
        schedule=optim.schedule(config.optim, steps),
        meta=meta,
        facts=facts,
    )


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on where the workdir's newest checkpoint stands. Returns the workdir.

    See `train.session` for how a run goes on and for what it leaves in the workdir.
    """
    workdir = session.enter(workdir)
    if hosts.is_writer():
        presets.save(config, workdir / "config.json")
    session.run(build(config, workdir), workdir, config.train)
    return workdir
