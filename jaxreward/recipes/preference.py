"""Reward models from preference pairs.

source -> chat template -> tokens -> packed rows (prompt once) -> one forward -> scalar head at the
last token of each answer -> pairs -> named losses -> one division -> step.

What this loop does that a textbook one does not: pairs about one prompt share its computation,
frozen lower layers run once for the whole data set (`data.cache_frozen`), and every loss is
divided by a weight counted on the whole batch.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import resolve
from jaxreward.core.types import PairRows
from jaxreward.data import conversations, pipeline, sources, tokenize
from jaxreward.data import pairs as pair_data
from jaxreward.evals import scorer
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.train import optim, session, writers

log = logging.getLogger(__name__)
PyTree = Any


def make_loss(plan: trainable.Plan, losses, where: rules.Rules | None = None):
    """(loss, weights, coef) for `make_train_step`, from `config.losses`.

    Every entry has `fn` (a function of chosen and rejected rewards, resolved in `objectives`),
    `coef`, and further keywords of the function; `margin="data"` passes the batch's margins.
    """
    fns, coef, margins = {}, {}, set()
    for name, entry in losses.items():
        kw = {k: v for k, v in dict(entry).items() if k not in ("fn", "coef", "margin")}
        fns[name] = resolve("objectives", entry["fn"], **kw)
        coef[name] = float(entry["coef"])
        if entry.get("margin") not in (None, "", "none", "data"):
            raise ValueError(
                f"losses.{name}.margin must be 'data' or 'none'; received {entry['margin']!r}"
            )
        if entry.get("margin") == "data":
            margins.add(name)

    def loss(params, frozen, rows: PairRows, keys, extra):
        del keys
        scores = scorer.rewards(plan, params, frozen, rows, rules=where)
        pick = jnp.maximum(rows.pairs, 0)
        chosen = jnp.take_along_axis(scores, pick[..., 0], axis=1)
        rejected = jnp.take_along_axis(scores, pick[..., 1], axis=1)
        totals = {}
        for name, fn in fns.items():
            kw = {"margin": rows.margin} if name in margins else {}
            totals[name] = jnp.sum(
                jnp.where(rows.weight != 0, fn(chosen, rejected, **kw) * rows.weight, 0.0)
            )
        gap = chosen - rejected
        live = rows.ends >= 0
        return (
            totals,
            {
                "accuracy": m.Mean.of(0.5 * (1 + jnp.sign(gap)), rows.weight),
                "margin": m.Mean.of(gap, rows.weight),
                "reward": m.Mean.of(scores, live),
            },
            extra,
        )

    def weights(rows: PairRows):
        total = jnp.sum(rows.weight)
        return dict.fromkeys(fns, total)

    return loss, weights, coef


def _records(config, part: str) -> tuple[list[dict], dict]:
    if config.data.path == "synthetic":
        count = 64 if part == "path" else 16
        made = testing.synthetic_pairs(count, seed=config.seed + (part != "path"))
        return made, {"path": "synthetic"}
    if config.data.source != "jsonl":
        raise ValueError(f"data.source={config.data.source!r} is unknown; use jsonl")
    path = config.data[part]
    if not path:
        raise ValueError(f"data.{part} is empty; pass --config.data.{part}=FILE.jsonl")
    records, report = sources.read_pairs(path, on_bad=config.data.on_bad)
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
        raise ValueError("no training pair is left; lower data.eval_fraction or give more data")
    kw = dict(
        template=config.data.template,
        max_len=config.data.max_len,
        on_long="error" if config.data.on_bad == "error" else "skip",
    )
    train, counts = pair_data.encode_pairs(tokenizer, records, **kw)
    held, held_counts = pair_data.encode_pairs(tokenizer, heldout, **kw) if heldout else ([], {})
    return train, held, {"data": {**facts, **counts}, "eval_data": {**eval_facts, **held_counts}}


def _cached(plan, frozen, train, held, source_hash, config, workdir, where):
    """The trees with `features`, computed or read back from the workdir."""
    every = [*train, *held]
    digest = hashlib.sha256(f"{source_hash} {plan.cut} {plan.cfg.compute}".encode())
    for tree in every:
        for part in (tree.prompt, *tree.answers):
            digest.update(np.asarray(len(part), np.int64).tobytes() + part.tobytes())
    folder = Path(workdir) / "features"
    path = folder / f"{digest.hexdigest()[:16]}.npy"
    lengths = [len(part) for tree in every for part in (tree.prompt, *tree.answers)]
    flat = None
    if path.is_file():
        # A file of NumPy does not know bfloat16 by name, only its bytes.
        flat = np.load(path, allow_pickle=False).view(plan.cfg.compute)
        if flat.shape != (sum(lengths), plan.cfg.width):
            log.warning("%s does not fit the data and is computed again", path)
            flat = None
    # All processes run the frozen layers, or none does: each has its part of every batch.
    if not hosts.all_true(flat is not None):
        began = time.monotonic()
        progress = None

        def show(done, total):
            nonlocal progress
            progress = progress or writers.Progress(
                total, label="frozen layers", shows=hosts.is_writer()
            )
            if done == total or done % max(total // 10, 1) == 0:
                progress.update(done)

        made = scorer.cache_features(
            plan, frozen, every, rules=where, batch=config.data.eval_batch, progress=show
        )
        progress.close()
        flat = np.concatenate([np.asarray(x) for parts in made for x in parts])
        if hosts.is_writer():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, flat, allow_pickle=False)
            os.replace(partial, path)
        log.info("frozen layers ran once in %s", writers.duration(time.monotonic() - began))
    cuts = np.split(flat, np.cumsum(lengths)[:-1])
    out, at = [], 0
    for tree in every:
        n = 1 + len(tree.answers)
        out.append(dataclasses.replace(tree, features=cuts[at : at + n]))
        at += n
    return out[: len(train)], out[len(train) :]


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
    cfg, weights, score = load.load(folder, rules=where)
    cfg = dataclasses.replace(cfg, compute=config.train.compute, remat=config.train.remat)
    plan = trainable.make_plan(cfg, model, head="scalar")
    source_hash = load.content_hash(folder)
    key = jax.random.key(config.seed)
    params, frozen = trainable.init(
        plan, weights, jax.random.fold_in(key, 1), score=score, rules=where
    )
    del weights
    counts = {"trained": tr.count(params), "frozen": tr.count(frozen)}
    if plan.cut and config.data.cache_frozen:
        train, held = _cached(plan, frozen, train, held, source_hash, config, workdir, where)
        # Their output is what the step needs; the weights below the cut would only take memory.
        frozen = {"policy": {k: v for k, v in frozen["policy"].items() if k != "lower"}}
    length = config.data.row_len or scorer.row_len(train)
    rng_order = np.random.default_rng(config.seed).permutation(len(train))
    packed = pipeline.pack(train, row_len=length, order=rng_order)
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
    losses = make_loss(plan, config.losses, where)
    described = trainable.param_specs(plan)
    start, train_step = session.prepare(config, params, described, losses, steps, key, where)
    ema = config.train.ema
    predict = scorer.make_predict(plan, rules=where, batch=config.data.eval_batch)
    evals = {}
    for name, entry in config.evals.items():
        kw = {k: v for k, v in dict(entry).items() if k != "fn"}
        evals[name] = resolve("evals", entry["fn"], **kw)

    def evaluate(at):
        if not held:
            return {}
        scored = functools.partial(predict, at.extra["ema"] if ema else at.params, frozen)
        return {f"{name}/{k}": v for name, fn in evals.items() for k, v in fn(scored, held)}

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
