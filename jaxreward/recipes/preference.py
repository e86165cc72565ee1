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
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreward import __version__, presets, testing
from jaxreward.core import metrics as m
from jaxreward.core import trees as tr
from jaxreward.core.resolve import resolve
from jaxreward.core.types import PairRows
from jaxreward.data import pairs as pair_data
from jaxreward.data import pipeline, sources, tokenize
from jaxreward.evals import scorer
from jaxreward.hub import export, load
from jaxreward.models import trainable
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.train import checkpoint, compile_cache, loop, optim, state, step, writers

log = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass
class Built:
    """Everything of a run, so that a notebook can step by hand. `run` is a loop over this.

    Attributes:
      plan: Model and what of it is trained. rules: Mesh, or None on one device.
      tokenizer: Of the initial model. folder: The initial model's folder.
      state, frozen, step: The training state, what it does not train, and the jitted step.
      batches: Iterator of dicts of NumPy arrays; `to_device` makes the step's batch of one.
      train, heldout: Trees. steps: Length of the run.
      evaluate: state -> {metric: value}. schedule: step -> learning rate.
      meta: Facts stored with checkpoints. facts: Facts for environment.json.
    """

    plan: trainable.Plan
    rules: rules.Rules | None
    tokenizer: tokenize.Tokenizer
    folder: Path
    state: Any
    frozen: PyTree
    step: Callable
    batches: Any
    to_device: Callable
    train: list
    heldout: list
    steps: int
    evaluate: Callable
    schedule: Callable
    meta: dict
    facts: dict


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


def _by_prompt(records, fraction, seed):
    # Held out by prompt, not by pair: pairs of one prompt share answers.
    draw = lambda r: hashlib.sha256(f"{seed}:{json.dumps(r['prompt'])}".encode()).digest()
    held = [int.from_bytes(draw(r)[:4]) / 2**32 < fraction for r in records]
    return [r for r, h in zip(records, held) if not h], [r for r, h in zip(records, held) if h]


def load_data(config, tokenizer) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts). Held out by prompt when there is no `eval_path`."""
    records, facts = _records(config, "path")
    if config.data.path == "synthetic" or config.data.eval_path:
        heldout, eval_facts = _records(config, "eval_path")
    else:
        records, heldout = _by_prompt(records, config.data.eval_fraction, config.seed)
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


def build(config, workdir: str | Path) -> Built:
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
    plan = trainable.make_plan(cfg, model)
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
    tx = optim.make(config.optim, steps)
    loss, loss_weights, coef = make_loss(plan, config.losses, where)
    described = trainable.param_specs(plan)
    ema = config.train.ema
    placed = state.shardings(described, tx, where, ema=ema > 0) if where else None
    start = state.create(params, tx, key, ema=ema > 0)
    start = state.place(start, placed) if placed else start
    train_step = step.make_train_step(
        loss,
        loss_weights,
        coef,
        tx,
        rules=where,
        shardings=placed,
        batch_sharding=hosts.batch_sharding(where) if where else None,
        microbatches=config.train.microbatches,
        clip=config.optim.clip or None,
        trained=optim.trained(config.optim, params),
        ema=ema,
    )
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
    return Built(
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


def environment() -> dict:
    """Versions, platform, command and commit, for environment.json."""
    import flax
    import optax
    import orbax.checkpoint as ocp

    # Of a source checkout only: an installed package may lie inside somebody else's repository.
    where = Path(__file__).resolve().parents[2]
    commit = None
    if (where / "pyproject.toml").is_file():
        commit = _commit(where)
    return {
        "jaxreward": __version__,
        "commit": commit,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax-checkpoint": ocp.__version__,
        "command": " ".join(sys.argv),
    }


def _commit(where):
    try:
        return subprocess.run(
            ["git", "-C", str(where), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run(config, workdir: str | Path) -> Path:
    """Trains, or goes on where the workdir's newest checkpoint stands. Returns the workdir.

    Resume order: the run's own newest checkpoint that is whole, else `models.policy.init`; never
    from the start when there are checkpoints and none is whole. Compiled programs are kept for the
    next start (see `train.compile_cache`).
    """
    compile_cache.enable()
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(workdir)
    if hosts.is_writer():
        presets.save(config, workdir / "config.json")
    built = build(config, workdir)
    facts = {**environment(), **built.facts}
    say = functools.partial(print, file=sys.stderr) if hosts.is_writer() else lambda text: None
    if hosts.is_writer():
        (workdir / "environment.json").write_text(json.dumps(facts, indent=1, default=str))
    say(f"mesh        {built.facts['mesh']}")
    for name in ("data", "eval_data", "rows", "steps", "parameters"):
        shown = ", ".join(f"{k} {v}" for k, v in facts[name].items() if k != "sha256")
        say(f"{name:<11} {shown}")
    with checkpoint.Checkpoints(workdir, keep=config.train.keep) as checkpoints:
        start = built.state
        checkpoints.remove_unfinished()
        if checkpoints.latest() is not None:
            saved = checkpoints.meta()
            if saved["init_sha256"] != built.meta["init_sha256"]:
                raise ValueError(
                    f"{workdir}: the checkpoint was trained from other weights than those now in "
                    f"{built.folder}; put the old ones back or use a new workdir"
                )
            start, data, _ = checkpoints.restore(start)
            built.batches.set_state(data["iterator"])
            say(f"resumed     step {int(start.step)} of {built.steps}")
        metrics_file = writers.MetricsFile(workdir, step=int(start.step), writes=hosts.is_writer())
        try:
            loop.run(
                built.step,
                start,
                built.frozen,
                built.batches,
                to_device=built.to_device,
                steps=built.steps,
                metrics_file=metrics_file,
                checkpoints=checkpoints,
                meta=built.meta,
                schedule=built.schedule,
                evaluate=built.evaluate,
                log_every=config.train.log_every,
                eval_every=config.train.eval_every,
                save_every=config.train.save_every,
                max_skipped=config.train.max_skipped,
                total=functools.partial(hosts.total, rules=built.rules),
            )
        finally:
            metrics_file.close()
    return workdir
