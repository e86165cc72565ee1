"""A run around the loop: what a recipe hands over, where it goes on, what it leaves in the workdir.

    config.json  environment.json  metrics.jsonl  checkpoints/  (tensorboard/  wandb/  profile/)

What `config.seed` decides, and nothing else that is random does:

- the initial values of what is new: heads and adapters;
- which prompts are held out where there is no `data.eval_path`, and the pairs of "synthetic";
- the order in which trees are packed into rows, once, and the shuffle of rows in each epoch;
- one random key a row and step, for what a loss draws (dropout, noise).

(The weights of `init=tiny` are always the same ones.) What stays equal:

- the same config, data and software on the same machine: every bit, and every bit of a run that
  was killed and resumed. On a GPU, XLA adds some sums in no fixed order, unless
  XLA_FLAGS=--xla_gpu_deterministic_ops=true;
- another mesh, number of processes or `train.microbatches`: the batches in their order, the row
  keys and the initial values exactly; losses and gradients up to the rounding of float32 (1e-5);
- a run resumed on another mesh: goes on with the same global batch;
- another seed, `data.batch`, row length, template or data: nothing; it is another run.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreward.core.provenance import environment
from jaxreward.core.resolve import keywords, resolve, resolve_words
from jaxreward.data import pipeline, sources, tokenize
from jaxreward.models import trainable
from jaxreward.parallel import hosts, mesh, rules
from jaxreward.train import checkpoint, compile_cache, loop, optim, state, step, tracking, writers
from jaxreward.train.plan import peak

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
      before: Called with the state before each batch is taken, or None.
      whole: Whether the run may be saved now, or None if it always may.
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
    before: Callable | None = None
    whole: Callable | None = None


def stepper(
    config,
    *,
    plan: trainable.Plan,
    params: PyTree,
    key: jax.Array,
    where: rules.Rules | None,
    steps: int,
    losses: tuple,
    microbatches: int | Callable[[int], int],
    copies: Sequence[str] = (),
) -> tuple[Any, Callable, Callable]:
    """(training state at step 0, the jitted step, step -> learning rate) of a run.

    Args:
      config: Its sections `optim` and `train` are read.
      plan, params: What is trained. key: Of the run. where: Mesh and layouts, or None.
      steps: Length of the run.
      losses, microbatches: (loss, weights, coef) and the cut, as `make_train_step` takes them.
      copies: Of the parameters in the state, beside the average (`state.create`).
    """
    tx = optim.make(config.optim, steps)
    ema = config.train.ema
    copies = (["ema"] if ema else []) + list(copies)
    described = trainable.param_specs(plan)
    placed = state.shardings(described, tx, where, copies=copies) if where else None
    start = state.create(params, tx, key, copies=copies)
    start = state.place(start, placed) if placed else start
    train_step = step.make_train_step(
        *losses,
        tx,
        rules=where,
        shardings=placed,
        batch_sharding=hosts.batch_sharding(where) if where else None,
        microbatches=microbatches,
        clip=config.optim.clip or None,
        trained=optim.trained(config.optim, params),
        ema=ema,
    )
    return start, train_step, optim.schedule(config.optim, steps)


def evaluator(config, predict: Callable, frozen: PyTree, held: list) -> Callable:
    """The function state -> {metric: value} that `config.evals` describes.

    Args:
      config: Its sections `evals` and `train` are read.
      predict: (params, frozen, what is held out) -> what the evaluators read.
      frozen, held: What is not trained, and what is held out; nothing is measured on nothing.

    Raises:
      ValueError, KeyError: naming an evaluator that is not there or its keyword.
    """
    evals = {}
    for name, entry in config.evals.items():
        evals[name] = resolve("evals", entry["fn"], **keywords(entry))

    def evaluate(at):
        if not held:
            return {}
        params = at.extra["ema"] if config.train.ema else at.params
        measured = functools.partial(predict, params, frozen)
        return {f"{name}/{k}": v for name, fn in evals.items() for k, v in fn(measured, held)}

    return evaluate


def origin(config, folder: Path, source_hash: str, tokenizer: tokenize.Tokenizer) -> dict:
    """What a checkpoint says of the model it goes on from, and of how text became tokens."""
    return {
        "init": str(folder.resolve()),
        "init_sha256": source_hash,
        "template": tokenize.chosen_template(tokenizer, config.data.template),
        "max_len": config.data.max_len,
    }


def assemble(
    config,
    *,
    plan: trainable.Plan,
    params: PyTree,
    frozen: PyTree,
    counts: dict,
    train: list,
    held: list,
    facts: dict,
    length: int,
    losses: Callable,
    predict: Callable,
    to_device: Callable,
    tokenizer: tokenize.Tokenizer,
    folder: Path,
    source_hash: str,
    key: jax.Array,
    where: rules.Rules | None,
) -> Built:
    """What every recipe does once it has a model and trees: rows, batches, state, step, evaluation.

    Args:
      config: Its sections `data`, `optim`, `train`, `evals` and the seed are read.
      plan, params, frozen: The model. counts: Of its parameters, for the facts.
      train, held, facts: From `load_data`.
      length: Slots of a row.
      losses: Packing plan -> (loss, weights, coef), as `make_train_step` takes them.
      predict: (params, frozen, trees) -> what the evaluators of `config.evals` read.
      to_device: A batch of NumPy arrays -> the step's.
      tokenizer, folder, source_hash: Of the initial model.
      key: Of the run. where: Mesh and layouts, or None.
    """
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
    start, train_step, schedule = stepper(
        config,
        plan=plan,
        params=params,
        key=key,
        where=where,
        steps=steps,
        losses=losses(packed),
        microbatches=config.train.microbatches,
    )
    slots = pipeline.efficiency(train, packed, row_len=length)
    return Built(
        plan=plan,
        rules=where,
        tokenizer=tokenizer,
        folder=folder,
        state=start,
        frozen=frozen,
        step=train_step,
        batches=batches,
        to_device=to_device,
        train=train,
        heldout=held,
        steps=steps,
        evaluate=evaluator(config, predict, frozen, held),
        schedule=schedule,
        meta=origin(config, folder, source_hash, tokenizer),
        facts=facts
        | {
            "rows": {"count": len(packed), "length": length, "efficiency": round(slots, 4)},
            "steps": {"per epoch": epoch, "total": steps},
            "parameters": counts,
            "mesh": mesh.describe(where.mesh) if where else "one device",
        },
    )


def load_data(
    config, tokenizer, *, read: Callable, made: Callable, encode: Callable, what: str
) -> tuple[list, list, dict]:
    """(training trees, held-out trees, facts). Held out by prompt when there is no `eval_path`.

    Args:
      config: Its section `data` and its seed are read.
      tokenizer: Of the model.
      read: (path, on_bad=..., corpus=...) -> (records, report). encode: (tokenizer, records, ...)
        -> (trees, report), as `data.pairs.encode_pairs`.
      made: (count, seed) -> records, for data.path="synthetic".
      what: What a record is, for messages.

    Raises:
      ValueError, FileNotFoundError: what in the config or the data does not fit.
    """

    def records_of(part):
        if config.data.path == "synthetic":
            count = 64 if part == "path" else 16
            return made(count, config.seed + (part != "path")), {"path": "synthetic"}
        path = config.data[part]
        if not path:
            raise ValueError(
                f"data.{part} is empty; pass --config.data.{part}=FILE, which may be .jsonl, "
                ".parquet, .arrayrecord or tfds:NAME"
            )
        records, report = read(path, on_bad=config.data.on_bad, corpus=corpus(config.data))
        return records, {"path": str(path), "sha256": sources.data_hash(path), **report}

    records, facts = records_of("path")
    if config.data.path == "synthetic" or config.data.eval_path:
        heldout, eval_facts = records_of("eval_path")
    else:
        records, heldout = sources.by_prompt(records, config.data.eval_fraction, config.seed)
        eval_facts = {"held out of path": len(heldout)}
    if not records:
        raise ValueError(f"no {what} is left; lower data.eval_fraction or give more data")
    kw = dict(
        template=config.data.template,
        max_len=config.data.max_len,
        on_long="error" if config.data.on_bad == "error" else "skip",
    )
    train, counts = encode(tokenizer, records, **kw)
    held, held_counts = encode(tokenizer, heldout, **kw) if heldout else ([], {})
    return train, held, {"data": {**facts, **counts}, "eval_data": {**eval_facts, **held_counts}}


def corpus(data) -> Callable | None:
    """The function that `data.corpus` names, such as "pku_saferlhf.pairs,which=safer", or None.

    Raises:
      ValueError, KeyError: as `resolve_words`.
    """
    text = data.get("corpus", "")  # absent in runs of older versions
    return resolve_words("data.corpora", text) if text else None


def enter(workdir: str | Path, train=None) -> Path:
    """Makes the workdir, checks that all processes share it, and keeps compiled programs.

    Args:
      workdir: The run's folder.
      train: The config's section `train`; what it asks for and is not there fails at once, and
        not after the model is read.

    Raises:
      ValueError, ImportError: as `tracking.check`, and if the processes do not share the folder.
    """
    if train is not None:
        tracking.check(train)
    compile_cache.enable()
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(workdir)
    return workdir


def run(built: Built, workdir: Path, train) -> None:
    """Trains, or goes on where the workdir's newest checkpoint stands.

    Resume order: the run's own newest checkpoint that is whole, else `models.policy.init`; never
    from the start when there are checkpoints and none is whole. Compiled programs are kept for the
    next start (see `train.compile_cache`).

    Args:
      built: From a recipe's `build`. workdir: From `enter`. train: The config's section `train`.

    Raises:
      ValueError: if the checkpoints were trained from other weights, or none is whole.
      ImportError: if a tracker that `train` asks for is not installed.
    """
    made_by = environment()
    facts = {**made_by, **built.facts}
    data = {name: _source(built.facts.get(name, {})) for name in ("data", "eval_data")}
    meta = {**built.meta, **data, "environment": made_by}
    writes = hosts.is_writer()
    say = writers.say if writes else lambda text: None
    if writes:
        (workdir / "environment.json").write_text(json.dumps(facts, indent=1, default=str))
    say(f"mesh        {built.facts['mesh']}")
    for name in ("data", "eval_data", "rows", "steps", "parameters"):
        shown = ", ".join(f"{k} {v}" for k, v in facts[name].items() if k != "sha256")
        say(f"{name:<11} {shown}")
    with checkpoint.Checkpoints(workdir, keep=train.keep) as checkpoints:
        start, skipped = built.state, None
        checkpoints.remove_unfinished()
        if checkpoints.latest() is not None:
            saved = checkpoints.meta()
            if saved["init_sha256"] != built.meta["init_sha256"]:
                raise ValueError(
                    f"{workdir}: the checkpoint was trained from other weights than those now in "
                    f"{built.folder}; put the old ones back or use a new workdir"
                )
            start, position, saved = checkpoints.restore(start)
            was, now = (x.get("data", {}).get("sha256") for x in (saved, meta))
            if was and was != now:
                log.warning(
                    "%s: the checkpoint was trained on other data than those now in %s; the run "
                    "goes on at the same step of another order",
                    workdir,
                    data["data"].get("path"),
                )
            built.batches.set_state(position["iterator"])
            skipped = position.get("skipped")
            say(f"resumed     step {int(start.step)} of {built.steps}")
        at = int(start.step)
        profile = tracking.Profile(
            workdir / "profile", train.profile_from, train.profile_steps, start=at
        )
        with (
            tracking.Metrics(workdir, train, step=at, facts=facts, writes=writes) as metrics,
            contextlib.closing(profile),
        ):
            loop.run(
                built.step,
                start,
                built.frozen,
                built.batches,
                to_device=built.to_device,
                steps=built.steps,
                metrics_file=metrics,
                checkpoints=checkpoints,
                meta=meta,
                schedule=built.schedule,
                evaluate=built.evaluate,
                log_every=train.log_every,
                eval_every=train.eval_every,
                save_every=train.save_every,
                max_skipped=train.max_skipped,
                skipped=skipped,
                total=functools.partial(hosts.total, rules=built.rules),
                peak=peak(built.rules.mesh.devices.flat if built.rules else jax.devices()[:1]),
                profile=profile if writes else None,
                before=built.before,
                whole=built.whole,
            )


def _source(facts):
    """Of the facts about data, those that name it."""
    return {k: facts[k] for k in ("path", "sha256") if k in facts}
