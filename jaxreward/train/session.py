"""A run around the loop: what a recipe hands over, where it goes on, what it leaves in the workdir.

config.json  environment.json  metrics.jsonl  checkpoints/
"""

import dataclasses
import functools
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxreward import __version__
from jaxreward.data import tokenize
from jaxreward.models import trainable
from jaxreward.parallel import hosts, rules
from jaxreward.train import checkpoint, compile_cache, loop, optim, state, step, writers

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


def prepare(
    config,
    params: PyTree,
    described: PyTree,
    losses: tuple,
    steps: int,
    key: jax.Array,
    where: rules.Rules | None,
) -> tuple[Any, Callable]:
    """(state at step 0, jitted step) of a run.

    Args:
      config: Its sections `optim` and `train` are read.
      params: What is trained. described: Their spec tree.
      losses: (loss, weights, coef) as `make_train_step` takes them.
      steps: Length of the run, for the schedule.
      key: Of the run.
      where: Mesh and layouts, or None.
    """
    tx = optim.make(config.optim, steps)
    ema = config.train.ema
    placed = state.shardings(described, tx, where, ema=ema > 0) if where else None
    start = state.create(params, tx, key, ema=ema > 0)
    start = state.place(start, placed) if placed else start
    train_step = step.make_train_step(
        *losses,
        tx,
        rules=where,
        shardings=placed,
        batch_sharding=hosts.batch_sharding(where) if where else None,
        microbatches=config.train.microbatches,
        clip=config.optim.clip or None,
        trained=optim.trained(config.optim, params),
        ema=ema,
    )
    return start, train_step


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


def enter(workdir: str | Path) -> Path:
    """Makes the workdir, checks that all processes share it, and keeps compiled programs."""
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
    """
    facts = {**environment(), **built.facts}
    say = functools.partial(print, file=sys.stderr) if hosts.is_writer() else lambda text: None
    if hosts.is_writer():
        (workdir / "environment.json").write_text(json.dumps(facts, indent=1, default=str))
    say(f"mesh        {built.facts['mesh']}")
    for name in ("data", "eval_data", "rows", "steps", "parameters"):
        shown = ", ".join(f"{k} {v}" for k, v in facts[name].items() if k != "sha256")
        say(f"{name:<11} {shown}")
    with checkpoint.Checkpoints(workdir, keep=train.keep) as checkpoints:
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
                log_every=train.log_every,
                eval_every=train.eval_every,
                save_every=train.save_every,
                max_skipped=train.max_skipped,
                total=functools.partial(hosts.total, rules=built.rules),
            )
        finally:
            metrics_file.close()
